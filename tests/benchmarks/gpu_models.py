"""The GPT models of ``gpu.py``: sizes, data, parameters, and the step as a tracejit user writes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

import tracejit as tj
from tests.benchmarks.peer_tracejit import model_loss
from tracejit import optim

RATE = 3e-4


@dataclass(frozen=True)
class Sizes:
    """Sizes of a GPT: layers, width, heads, sequence length, batch, vocabulary."""

    layers: int
    dim: int
    heads: int
    seq: int
    batch: int
    vocab: int


#: ``small`` is workload c of ``workloads.py``; ``big`` has the layer sizes of GPT-2.
SIZES = {"small": Sizes(4, 256, 4, 128, 8, 512), "big": Sizes(12, 768, 12, 512, 8, 8192)}


def batch(s: Sizes) -> tuple[np.ndarray, np.ndarray]:
    """Random tokens and labels."""
    rng = np.random.default_rng(1)
    x, y = (rng.integers(0, s.vocab, (s.batch, s.seq)) for _ in range(2))
    return x.astype(np.int32), y.astype(np.int32)


def parameters(s: Sizes) -> list[np.ndarray]:
    """The parameters in the order of workload c."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, dtype=np.float32) * np.float32(0.02)

    def ones() -> np.ndarray:
        return np.ones(s.dim, np.float32)

    def zeros(n: int = 1) -> np.ndarray:
        return np.zeros(n * s.dim, np.float32)

    d = s.dim
    out = [normal(s.vocab, d), normal(s.seq, d)]
    for _ in range(s.layers):
        out += [ones(), zeros(), normal(d, 3 * d), zeros(3), normal(d, d), zeros(), ones(), zeros()]
        out += [normal(d, 4 * d), zeros(4), normal(4 * d, d), zeros()]
    return [*out, ones(), zeros(), normal(d, s.vocab)]


def loss_function() -> Callable[..., Any]:
    """``(params, x, y) -> loss``; the number of heads follows from the width as in ``peer_tracejit``."""
    return model_loss("c")


def train_step(s: Sizes) -> tuple[Any, Callable[..., Any]]:
    """``(optimiser, step)``; step is ``(params, state, x, y) -> loss, params, state``."""
    opt = optim.adamw(RATE)
    loss_fn = loss_function()
    assert s.heads * 64 == s.dim

    @tj.trace
    def step(params: Any, state: Any, x: Any, y: Any) -> Any:
        loss, grads = tj.value_and_grad(loss_fn)(params, x, y)
        params, state = opt.update(params, grads, state)
        return loss, params, state

    return opt, step
