"""The benchmark workloads a-h: data, parameters, optimisers. Every peer builds its program from these; see ``compare.py``.

=====  =============================================================================================
a      tiny MLP step: 32x64 -> 64 -> 64 -> 10, ReLU, cross-entropy, SGD
b      MLP step: 128x784 -> 512 -> 256 -> 10, ReLU, cross-entropy, Adam
c      GPT step: 4 layers, d 256, 4 heads, sequence 128, batch 8, vocabulary 512, AdamW
d      tanh(x*a+b) * exp(-x*x) + sqrt(|x|) on 4,000,000 elements
e1/e2  softmax / layer norm of (4096, 1024)
f      LayerNorm -> GELU MLP 512-2048-512 on 1024 rows, value and all gradients
g*     sum of (4096, 4096) over axis 0 / axis 1 / all
h      CNN step: 64x1x28x28, conv 16, pool, conv 32, pool, linear, cross-entropy, SGD
=====  =============================================================================================

All float32, labels int64.
"""

from __future__ import annotations

import itertools

import numpy as np

NAMES = ("a", "b", "c", "d", "e1", "e2", "f", "g0", "g1", "gall", "h")
BATCH, LAYERS, DIM, HEADS, SEQ, VOCAB = 8, 4, 256, 4, 128, 512
OPTIMISER = {"a": "sgd", "b": "adam", "c": "adamw", "h": "sgd"}
LEARNING_RATE = {"a": 0.01, "b": 1e-3, "c": 3e-4, "h": 0.01}
SCALE, SHIFT = 0.7, 0.1


class _Draw:
    def __init__(self) -> None:
        self.rng = np.random.default_rng(0)

    def normal(self, *shape: int, scale: float = 1.0) -> np.ndarray:
        return (self.rng.standard_normal(shape) * scale).astype(np.float32)

    def ints(self, high: int, *shape: int) -> np.ndarray:
        return self.rng.integers(0, high, shape)


def make(name: str) -> tuple[dict[str, np.ndarray], list[np.ndarray]]:
    """``(data, parameters)`` of a workload, the same on every call."""
    draw = _Draw()
    return _data(name, draw), _parameters(name, draw)


def _data(name: str, d: _Draw) -> dict[str, np.ndarray]:
    if name == "a":
        return {"x": d.normal(32, 64), "y": d.ints(10, 32)}
    if name == "b":
        return {"x": d.normal(128, 784), "y": d.ints(10, 128)}
    if name == "c":
        return {"x": d.ints(VOCAB, BATCH, SEQ), "y": d.ints(VOCAB, BATCH, SEQ)}
    if name == "d":
        return {"x": d.normal(4_000_000)}
    if name in ("e1", "e2"):
        return {"x": d.normal(4096, 1024), "g": d.normal(1024), "b": d.normal(1024)}
    if name == "f":
        return {"x": d.normal(1024, 512), "gy": d.normal(1024, 512)}
    if name in ("g0", "g1", "gall"):
        return {"x": d.normal(4096, 4096)}
    if name == "h":
        return {"x": d.normal(64, 1, 28, 28), "y": d.ints(10, 64)}
    raise ValueError(f"unknown workload {name!r}; there are {', '.join(NAMES)}")


def _parameters(name: str, d: _Draw) -> list[np.ndarray]:
    zeros = lambda n: np.zeros(n, np.float32)  # noqa: E731
    ones = lambda n: np.ones(n, np.float32)  # noqa: E731
    if name in ("a", "b"):
        sizes = [64, 64, 64, 10] if name == "a" else [784, 512, 256, 10]
        out: list[np.ndarray] = []
        for i, o in itertools.pairwise(sizes):
            out += [d.normal(i, o, scale=(2 / i) ** 0.5), zeros(o)]
        return out
    if name == "c":
        out = [d.normal(VOCAB, DIM, scale=0.02), d.normal(SEQ, DIM, scale=0.02)]
        for _ in range(LAYERS):
            out += [ones(DIM), zeros(DIM), d.normal(DIM, 3 * DIM, scale=0.02), zeros(3 * DIM)]
            out += [d.normal(DIM, DIM, scale=0.02), zeros(DIM), ones(DIM), zeros(DIM)]
            out += [
                d.normal(DIM, 4 * DIM, scale=0.02),
                zeros(4 * DIM),
                d.normal(4 * DIM, DIM, scale=0.02),
                zeros(DIM),
            ]
        return [*out, ones(DIM), zeros(DIM), d.normal(DIM, VOCAB, scale=0.02)]
    if name == "f":
        return [
            ones(512),
            zeros(512),
            d.normal(512, 2048, scale=0.04),
            zeros(2048),
            d.normal(2048, 512, scale=0.02),
            zeros(512),
        ]
    if name == "h":
        return [
            d.normal(16, 1, 3, 3, scale=0.3),
            zeros(16),
            d.normal(32, 16, 3, 3, scale=0.1),
            zeros(32),
            d.normal(800, 10, scale=0.03),
            zeros(10),
        ]
    return []
