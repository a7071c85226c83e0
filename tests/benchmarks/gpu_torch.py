"""PyTorch CUDA's side of ``gpu.py``: eager (fused AdamW, addmm, SDPA) and torch.compile. Needs torch with CUDA."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tests.benchmarks.gpu_models import RATE, Sizes

Pair = tuple[Callable[[], Any], Callable[[], Any]]


def available() -> bool:
    """True if torch sees a CUDA device."""
    if importlib.util.find_spec("torch") is None:
        return False
    import torch

    return bool(torch.cuda.is_available())


def describe() -> dict[str, str]:
    """Version and card, if there is one."""
    if not available():
        return {}
    import torch

    torch.backends.cuda.matmul.allow_tf32 = False
    return {"torch": torch.__version__, "card": torch.cuda.get_device_name(0)}


def loss_function(s: Sizes) -> Callable[..., Any]:
    """The same model as ``peer_tracejit``'s, with the fused forms a torch user would pick."""
    import torch
    import torch.nn.functional as F

    def loss(p: Sequence[Any], x: Any, y: Any) -> Any:
        d, rows = s.dim, s.batch * s.seq
        h = (p[0][x] + p[1]).view(rows, d)
        i = 2
        for _ in range(s.layers):
            n = F.layer_norm(h, (d,), p[i], p[i + 1])
            qkv = torch.addmm(p[i + 3], n, p[i + 2]).view(s.batch, s.seq, 3, s.heads, d // s.heads)
            q, k, v = qkv.permute(2, 0, 3, 1, 4)
            o = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(rows, d)
            h = h + torch.addmm(p[i + 5], o, p[i + 4])
            n = F.layer_norm(h, (d,), p[i + 6], p[i + 7])
            a = F.gelu(torch.addmm(p[i + 9], n, p[i + 8]), approximate="tanh")
            h = h + torch.addmm(p[i + 11], a, p[i + 10])
            i += 12
        h = F.layer_norm(h, (d,), p[i], p[i + 1])
        return F.cross_entropy(h @ p[i + 2], y.view(-1))

    return loss


def gradients(
    s: Sizes, params: Sequence[np.ndarray], x: np.ndarray, y: np.ndarray, double: bool, device: str = "cuda"
) -> tuple[float, list[np.ndarray]]:
    """Loss and gradients of one step, in float64 or float32."""
    import torch

    kind = torch.float64 if double else torch.float32
    p = [torch.tensor(v, dtype=kind, device=device, requires_grad=True) for v in params]
    value = loss_function(s)(
        p, torch.tensor(x.astype(np.int64), device=device), torch.tensor(y.astype(np.int64), device=device)
    )
    grads = torch.autograd.grad(value, p)
    return float(value.detach()), [g.cpu().numpy() for g in grads]


def train_sides(
    s: Sizes, params: Sequence[np.ndarray], x: np.ndarray, y: np.ndarray, peers: str
) -> dict[str, Pair]:
    """Training steps: name -> (step, wait)."""
    import torch

    out: dict[str, Pair] = {}
    for peer in peers.split(","):
        p = [torch.tensor(v, device="cuda", requires_grad=True) for v in params]
        tx, ty = (torch.tensor(v.astype(np.int64), device="cuda") for v in (x, y))
        opt: Any = torch.optim.AdamW(p, lr=RATE, weight_decay=0.01, fused=True)
        loss = loss_function(s)
        forward = torch.compile(loss, fullgraph=True) if peer == "compile" else loss

        def step(p=p, opt=opt, forward=forward, tx=tx, ty=ty) -> Any:
            opt.zero_grad(set_to_none=True)
            value = forward(p, tx, ty)
            value.backward()
            opt.step()
            return value.detach()

        out[f"torch {peer}"] = (step, torch.cuda.synchronize)
    return out


def losses(s: Sizes, params: Sequence[np.ndarray], x: np.ndarray, y: np.ndarray, steps: int) -> list[float]:
    """The loss curve of ``steps`` eager steps from the start."""
    ((step, _),) = train_sides(s, params, x, y, "eager").values()
    return [float(step()) for _ in range(steps)]


def matmul_sides(host: Sequence[np.ndarray], pa: Sequence[int], pb: Sequence[int]) -> dict[str, Pair]:
    """torch.mm on (transposed views of) the operands."""
    import torch

    a, b = (torch.tensor(h, device="cuda").permute(*q) for h, q in zip(host, (pa, pb)))
    c = torch.empty(a.shape[0], b.shape[1], device="cuda")
    return {"torch": (lambda: torch.mm(a, b, out=c), torch.cuda.synchronize)}


def copy_sides(x: np.ndarray) -> dict[str, Pair]:
    """A device-to-device copy."""
    import torch

    a = torch.tensor(x, device="cuda")
    b = torch.empty_like(a)
    return {"torch copy_": (lambda: b.copy_(a), torch.cuda.synchronize)}


def function_sides(name: str, x: np.ndarray) -> dict[str, Pair]:
    """The bandwidth-bound functions in eager torch."""
    import torch
    import torch.nn.functional as F

    a = torch.tensor(x, device="cuda")
    functions: dict[str, Callable[[Any], Any]] = {
        "-x": lambda v: -v,
        "x * a + b": lambda v: v * 0.7 + 0.1,
        "gelu": lambda v: F.gelu(v, approximate="tanh"),
        "tanh exp sqrt": lambda v: torch.tanh(v * 0.7 + 0.1) * torch.exp(-v * v) + torch.sqrt(torch.abs(v)),
        "softmax": lambda v: torch.softmax(v, -1),
        "layer_norm": lambda v: F.layer_norm(v, (v.shape[-1],)),
        "x.T copy": lambda v: v.T.contiguous(),
    }
    fn = functions[name]
    return {"torch": (lambda: fn(a), torch.cuda.synchronize)}
