"""The workloads in PyTorch: eager, ``torch.compile`` of loss and optimiser, and one compiled functional step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.benchmarks import workloads as w


def _loss(name: str, F: Any) -> Callable[..., Any]:
    import torch

    def loss(p, d):
        x = d["x"]
        if name in ("a", "b"):
            for i in (0, 2, 4):
                x = torch.addmm(p[i + 1], x, p[i])
                x = F.relu(x) if i < 4 else x
            return F.cross_entropy(x, d["y"])
        if name == "h":
            x = F.max_pool2d(F.relu(F.conv2d(x, p[0], p[1])), 2)
            x = F.max_pool2d(F.relu(F.conv2d(x, p[2], p[3])), 2)
            return F.cross_entropy(torch.addmm(p[5], x.flatten(1), p[4]), d["y"])
        if name == "c":
            batch, seq = x.shape
            dim = p[0].shape[1]
            heads = w.HEADS if dim == w.DIM else dim // 64
            h = p[0][x] + p[1]
            i = 2
            while i + 3 < len(p):
                n = F.layer_norm(h, (dim,), p[i], p[i + 1])
                q, k, v = (
                    (n @ p[i + 2] + p[i + 3]).view(batch, seq, 3, heads, dim // heads).permute(2, 0, 3, 1, 4)
                )
                o = (
                    F.scaled_dot_product_attention(q, k, v, is_causal=True)
                    .transpose(1, 2)
                    .reshape(batch, seq, dim)
                )
                h = h + o @ p[i + 4] + p[i + 5]
                n = F.layer_norm(h, (dim,), p[i + 6], p[i + 7])
                h = h + F.gelu(n @ p[i + 8] + p[i + 9], approximate="tanh") @ p[i + 10] + p[i + 11]
                i += 12
            h = F.layer_norm(h, (dim,), p[i], p[i + 1])
            logits = h @ p[i + 2]
            return F.cross_entropy(logits.view(batch * seq, -1), d["y"].view(-1))
        n = F.layer_norm(x, (512,), p[0], p[1])
        y = F.gelu(n @ p[2] + p[3], approximate="tanh") @ p[4] + p[5]
        return (y * d["gy"]).sum()

    return loss


def make(name: str, mode: str = "eager", device: str = "cpu") -> Callable[[], Any]:
    """One step of the workload; ``mode`` is eager, compile or func."""
    import torch
    import torch.nn.functional as F

    data, parameters = w.make(name)
    d = {k: torch.from_numpy(v).to(device) for k, v in data.items()}
    p = [torch.from_numpy(q).to(device) for q in parameters]
    loss = _loss(name, F)
    if name in w.OPTIMISER:
        return _train(name, mode, loss, p, d)
    if name == "f":
        return _gradients(mode, loss, p, d)
    functions = {
        "d": lambda x: torch.tanh(x * w.SCALE + w.SHIFT) * torch.exp(-x * x) + torch.sqrt(torch.abs(x)),
        "e1": lambda x: torch.softmax(x, -1),
        "e2": lambda x: F.layer_norm(x, (1024,), d["g"], d["b"]),
        "g0": lambda x: x.sum(0),
        "g1": lambda x: x.sum(1),
        "gall": lambda x: x.sum(),
    }
    fn = functions[name] if mode == "eager" else torch.compile(functions[name], fullgraph=True)

    def run() -> Any:
        with torch.no_grad():
            return fn(d["x"])

    return run


def _train(
    name: str, mode: str, loss: Callable[..., Any], p: list[Any], d: dict[str, Any]
) -> Callable[[], Any]:
    import torch

    rate, kind = w.LEARNING_RATE[name], w.OPTIMISER[name]
    if mode == "func":
        params = [q.clone() for q in p]
        m, v = [torch.zeros_like(q) for q in p], [torch.zeros_like(q) for q in p]
        held = {"t": torch.tensor(0.0, device=p[0].device)}

        def step(params, m, v, t, d):
            grads, value = torch.func.grad_and_value(lambda q: loss(q, d))(params)
            t = t + 1
            if kind == "sgd":
                for q, g in zip(params, grads):
                    q.sub_(rate * g)
                return value, t
            c1, c2 = 1 - 0.9**t, 1 - 0.999**t
            for q, g, a, b in zip(params, grads, m, v):
                a.mul_(0.9).add_(g * 0.1)
                b.mul_(0.999).add_(g * g * 0.001)
                if kind == "adamw":
                    q.mul_(1 - rate * 0.01)
                q.sub_(rate * (a / c1) / ((b / c2).sqrt() + 1e-8))
            return value, t

        compiled = torch.compile(step, fullgraph=True)

        def run_func() -> float:
            with torch.no_grad():
                value, held["t"] = compiled(params, m, v, held["t"], d)
            return float(value)

        return run_func
    params = [q.clone().requires_grad_() for q in p]
    fused = mode == "eager"
    if kind == "sgd":
        opt: Any = torch.optim.SGD(params, lr=rate, fused=fused)
    else:
        opt = (torch.optim.Adam if kind == "adam" else torch.optim.AdamW)(params, lr=rate, fused=fused)
    forward, update = (
        (loss, opt.step)
        if mode == "eager"
        else (torch.compile(loss, fullgraph=True), torch.compile(opt.step))
    )

    def run() -> float:
        opt.zero_grad(set_to_none=True)
        value = forward(params, d)
        value.backward()
        update()
        return float(value.detach())

    return run


def _gradients(mode: str, loss: Callable[..., Any], p: list[Any], d: dict[str, Any]) -> Callable[[], Any]:
    import torch

    if mode == "func":
        fn = torch.compile(
            lambda p, x: torch.func.grad_and_value(lambda a: loss(a[0], dict(d, x=a[1])))((p, x)),
            fullgraph=True,
        )

        def run_func() -> Any:
            with torch.no_grad():
                return fn([q.detach() for q in p], d["x"].detach())

        return run_func
    params = [q.requires_grad_() for q in p]
    d["x"].requires_grad_()
    forward = torch.compile(loss, fullgraph=True) if mode == "compile" else loss

    def run() -> float:
        value = forward(params, d)
        torch.autograd.grad(value, [*params, d["x"]])
        return float(value.detach())

    return run
