"""Digests of the results of programs that use every kind of kernel: ``python -m tests.backend.cpu_identity`` prints JSON.

``test_cpu_threads.py`` runs it in processes with different numbers of threads and compares.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

import tracejit as tj
from tests.benchmarks import peer_tracejit
from tracejit import nn, optim


def gpt_step() -> Callable[[], Any]:
    """Two blocks: embedding and its scatter-add, layer norm, attention both ways, GELU, cross-entropy, AdamW."""
    rng = np.random.default_rng(0)
    vocab, dim, seq, batch = 50, 128, 40, 4

    def normal(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) * 0.05).astype(np.float32)

    params = [normal(vocab, dim), normal(seq, dim)]
    for _ in range(2):
        params += [1 + normal(dim), normal(dim), normal(dim, 3 * dim), normal(3 * dim)]
        params += [normal(dim, dim), normal(dim), 1 + normal(dim), normal(dim)]
        params += [normal(dim, 4 * dim), normal(4 * dim), normal(4 * dim, dim), normal(dim)]
    params += [1 + normal(dim), normal(dim), normal(dim, vocab)]
    x, y = rng.integers(0, vocab, (batch, seq)), rng.integers(0, vocab, (batch, seq))
    opt, loss = optim.adamw(1e-3), peer_tracejit.model_loss("c")

    @tj.trace
    def step(params: Any, state: Any) -> Any:
        value, grads = tj.value_and_grad(loss)(params, x, y)
        params, state = opt.update(params, grads, state)
        return value, params, state

    def run() -> Any:
        p, s, values = params, opt.init(params), []
        for _ in range(2):
            value, p, s = step(p, s)
            values.append(value)
        return values, p, s

    return run


def cnn_step() -> Callable[[], Any]:
    """Convolutions and pooling, both ways."""
    rng = np.random.default_rng(1)
    x, y = rng.standard_normal((8, 1, 20, 20)).astype(np.float32), rng.integers(0, 10, 8)
    shapes = [(16, 1, 3, 3), (16,), (32, 16, 3, 3), (32,), (288, 10), (10,)]
    params = [(rng.standard_normal(s) * 0.1).astype(np.float32) for s in shapes]
    step = tj.trace(tj.value_and_grad(peer_tracejit.model_loss("h")))
    return lambda: step(params, x, y)


def reductions() -> Callable[[], Any]:
    """Sums, means, extremes and scans along both axes, of both precisions."""
    rng = np.random.default_rng(2)
    x = rng.standard_normal((500, 333)).astype(np.float32)

    @tj.trace
    def f(x: Any, wide: Any) -> Any:
        out = [x.sum(axis=0), x.sum(axis=1), x.sum(), x.mean(), wide.sum(axis=0), wide.mean(), (x * x).sum()]
        return [
            *out,
            x.max(axis=0),
            x.argmax(axis=1),
            np.cumsum(x, axis=0),
            nn.softmax(x),
            nn.layer_norm(x.T),
        ]

    return lambda: f(x, x.astype(np.float64))


def products() -> Callable[[], Any]:
    """A long sum in several chunks, few rows, few columns, transposes, batches."""
    rng = np.random.default_rng(3)
    a, b = (
        rng.standard_normal((130, 2300)).astype(np.float32),
        rng.standard_normal((2300, 90)).astype(np.float32),
    )
    c = rng.standard_normal((6, 64, 48)).astype(np.float32)
    f = tj.trace(lambda a, b, c: (a @ b, b.T @ a.T, a[:3] @ b, a @ b[:, :2], c @ c.transpose(0, 2, 1)))
    return lambda: f(a, b, c)


def scatter() -> Callable[[], Any]:
    """A scatter-add whose targets collide."""
    rng = np.random.default_rng(4)
    table, at = rng.standard_normal((37, 64)).astype(np.float32), rng.integers(0, 37, 5000)
    weight = rng.standard_normal((5000, 64)).astype(np.float32)
    f = tj.trace(tj.grad(lambda table: (table[at] * weight).sum()))
    return lambda: f(table)


PROGRAMS = (gpt_step, cnn_step, reductions, products, scatter)


def arrays(value: Any) -> Iterator[np.ndarray]:
    """The arrays of a result, in order."""
    from tracejit import trees

    yield from (np.asarray(leaf) for leaf in trees.flatten_fast(value, None, False, trees.NAMESPACE)[0])


def digest(value: Any) -> str:
    """A digest of every bit of a result."""
    total = hashlib.sha256()
    for a in arrays(value):
        total.update(f"{a.dtype}{a.shape}".encode() + a.tobytes())
    return total.hexdigest()[:16]


def main() -> None:
    """Two runs of each program must agree; print one digest per program."""
    out = {}
    for make in PROGRAMS:
        run = make()
        first, second = digest(run()), digest(run())
        if first != second:
            sys.exit(f"{make.__name__} differs from run to run")
        out[make.__name__] = first
    print(json.dumps(out))


if __name__ == "__main__":
    main()
