"""The workloads written as a tracejit user writes them: ``nn`` functions, ``value_and_grad``, ``optim``, one ``@trace``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

import tracejit as tj
from tests.benchmarks import workloads as w
from tracejit import nn, optim


def model_loss(name: str) -> Callable[..., Any]:
    """The loss function ``(params, x, y or gy) -> scalar`` of a training workload."""

    def mlp(p, x, y):
        for i in (0, 2, 4):
            x = x @ p[i] + p[i + 1]
            if i < 4:
                x = nn.relu(x)
        return nn.cross_entropy(x, y)

    def cnn(p, x, y):
        x = nn.max_pool2d(nn.relu(nn.conv2d(x, p[0], p[1])), 2)
        x = nn.max_pool2d(nn.relu(nn.conv2d(x, p[2], p[3])), 2)
        return nn.cross_entropy(x.reshape(x.shape[0], -1) @ p[4] + p[5], y)

    def gpt(p, x, y):
        batch, seq = x.shape
        dim = p[0].shape[1]
        heads = w.HEADS if dim == w.DIM else dim // 64
        h = p[0][x] + p[1]
        i = 2
        while i + 3 < len(p):
            with tj.named_scope("block", numbered=True):
                n = nn.layer_norm(h, p[i], p[i + 1])
                qkv = (
                    (n @ p[i + 2] + p[i + 3])
                    .reshape(batch, seq, 3, heads, dim // heads)
                    .transpose(2, 0, 3, 1, 4)
                )
                o = nn.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2], is_causal=True)
                h = h + o.transpose(0, 2, 1, 3).reshape(batch, seq, dim) @ p[i + 4] + p[i + 5]
                n = nn.layer_norm(h, p[i + 6], p[i + 7])
                h = h + nn.gelu(n @ p[i + 8] + p[i + 9], approximate="tanh") @ p[i + 10] + p[i + 11]
            i += 12
        h = nn.layer_norm(h, p[i], p[i + 1])
        logits = (h @ p[i + 2]).reshape(batch * seq, -1)
        return nn.cross_entropy(logits, y.reshape(-1))

    def ln_mlp(p, x, gy):
        n = nn.layer_norm(x, p[0], p[1])
        y = nn.gelu(n @ p[2] + p[3], approximate="tanh") @ p[4] + p[5]
        return (y * gy).sum()

    return {"a": mlp, "b": mlp, "c": gpt, "f": ln_mlp, "h": cnn}[name]


def train_step(name: str) -> tuple[Any, Callable[..., Any]]:
    """``(optimiser, traced step)`` of a training workload; the step is ``(params, state, x, y) -> loss, params, state``."""
    rate = w.LEARNING_RATE[name]
    opt = {"sgd": optim.sgd, "adam": optim.adam, "adamw": optim.adamw}[w.OPTIMISER[name]](rate)
    loss_fn = model_loss(name)

    @tj.trace
    def step(params, state, x, y):
        loss, grads = tj.value_and_grad(loss_fn)(params, x, y)
        params, state = opt.update(params, grads, state)
        return loss, params, state

    return opt, step


def make(name: str, device: str | None = None) -> Callable[[], Any]:
    """A function that runs one step of the workload and returns the loss or a result to wait for."""
    data, params = w.make(name)
    x = data["x"]
    if name in w.OPTIMISER:
        opt, step = train_step(name)
        held: dict[str, Any] = {"p": params, "s": opt.init(params)}

        def run() -> float:
            loss, held["p"], held["s"] = step(held["p"], held["s"], x, data["y"], device=device)
            return float(loss)

        return run
    if name == "f":
        gradients = tj.trace(tj.value_and_grad(model_loss("f"), wrt=(0, 1)))
        return lambda: float(gradients(params, x, data["gy"], device=device)[0])
    functions: dict[str, Callable[..., Any]] = {
        "d": lambda x: np.tanh(x * w.SCALE + w.SHIFT) * np.exp(-x * x) + np.sqrt(np.abs(x)),
        "e1": lambda x: nn.softmax(x),
        "e2": lambda x: nn.layer_norm(x, data["g"], data["b"]),
        "g0": lambda x: x.sum(axis=0),
        "g1": lambda x: x.sum(axis=1),
        "gall": lambda x: x.sum(),
    }
    fn = tj.trace(functions[name])
    return lambda: fn(x, device=device)
