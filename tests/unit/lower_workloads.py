"""The workloads of MEASURED.md as traced functions with small or original sizes, and a checker. Used by test_lower_*.py."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np

import tracejit as tj
from tracejit import nn, optim
from tracejit.graph import Graph
from tracejit.lower import lower
from tracejit.lower.interpret import run
from tracejit.passes import optimise
from tracejit.program import Capabilities, Program

F32 = np.float32
Workload = tuple[Callable[..., Any], tuple[Any, ...]]


def _normal(rng: np.random.Generator, *shape: int, scale: float = 1.0) -> np.ndarray:
    return (rng.standard_normal(shape) * scale).astype(F32)


def optimised(fn: Callable[..., Any], *args: Any) -> tuple[Graph, list[np.ndarray]]:
    """The optimised graph of ``fn`` and the arrays of its inputs."""
    import optree

    traced = fn if hasattr(fn, "graph") else tj.trace(fn)
    graph = optimise(traced.graph(*args))
    leaves = [np.asarray(x) for x in optree.tree_leaves(args, namespace="tracejit")]
    return graph, leaves


def evaluate(graph: Graph, inputs: list[np.ndarray]) -> list[np.ndarray]:
    """The graph by the reference of each op."""
    values: dict[Any, Any] = dict(zip(graph.inputs, inputs, strict=True))
    with np.errstate(all="ignore"):
        for node in graph.nodes:
            if node not in values:
                values[node] = node.op.reference(*(values[i] for i in node.inputs), **node.attrs)
    return [np.asarray(values[n]) for n in graph.outputs]


def check(
    graph: Graph,
    inputs: list[np.ndarray],
    caps: Capabilities | None = None,
    rtol: float = 1e-4,
    atol: float = 1e-5,
) -> Program:
    """Lower, interpret, compare with the reference; returns the program."""
    program = lower(graph, caps or Capabilities())
    inputs = [np.asarray(x).astype(n.dtype) for x, n in zip(inputs, graph.inputs, strict=True)]
    wanted = evaluate(graph, inputs)
    got = run(program, inputs)
    for i, (w, g) in enumerate(zip(wanted, got, strict=True)):
        assert w.dtype == g.dtype and w.shape == g.shape, (i, w.dtype, g.dtype)
        np.testing.assert_allclose(g, w, rtol=rtol, atol=atol, err_msg=f"output {i} of {graph.name}")
    return program


def mlp(sizes: tuple[int, ...] = (64, 64, 64, 10), batch: int = 32, opt: Any = None) -> Workload:
    """Workloads a and b: one training step."""
    rng = np.random.default_rng(0)
    opt = opt or optim.sgd(0.01)
    model = [nn.Linear(i, o, rng=rng) for i, o in itertools.pairwise(sizes)]
    x, y = _normal(rng, batch, sizes[0]), rng.integers(0, sizes[-1], batch)

    def loss(model: Any, x: Any, y: Any) -> Any:
        for layer in model[:-1]:
            x = nn.relu(layer(x))
        return nn.cross_entropy(model[-1](x), y)

    def step(model: Any, state: Any, x: Any, y: Any) -> Any:
        value, grads = tj.value_and_grad(loss)(model, x, y)
        model, state = opt.update(model, grads, state)
        return value, model, state

    return step, (model, opt.init(model), x, y)


def gpt(
    layers: int = 4, dim: int = 256, heads: int = 4, seq: int = 128, batch: int = 8, vocab: int = 512
) -> Workload:
    """Workload c, with attention as one scaled_dot_product_attention on a fused qkv product."""
    rng = np.random.default_rng(0)

    def linear(i: int, o: int) -> dict[str, np.ndarray]:
        return {"w": _normal(rng, i, o, scale=0.02), "b": np.zeros(o, F32)}

    def norm() -> dict[str, np.ndarray]:
        return {"g": np.ones(dim, F32), "b": np.zeros(dim, F32)}

    params = {
        "embed": _normal(rng, vocab, dim, scale=0.02),
        "pos": _normal(rng, seq, dim, scale=0.02),
        "blocks": [
            {
                "n1": norm(),
                "qkv": linear(dim, 3 * dim),
                "o": linear(dim, dim),
                "n2": norm(),
                "w1": linear(dim, 4 * dim),
                "w2": linear(4 * dim, dim),
            }
            for _ in range(layers)
        ],
        "n": norm(),
        "head": _normal(rng, dim, vocab, scale=0.02),
    }
    x, y = rng.integers(0, vocab, (batch, seq)), rng.integers(0, vocab, (batch, seq))
    opt = optim.adamw(3e-4)

    def loss(p: Any, x: Any, y: Any) -> Any:
        h = p["embed"][x] + p["pos"]
        for b in p["blocks"]:
            n = nn.layer_norm(h, b["n1"]["g"], b["n1"]["b"])
            qkv = (
                (n @ b["qkv"]["w"] + b["qkv"]["b"])
                .reshape(batch, seq, 3, heads, dim // heads)
                .transpose(2, 0, 3, 1, 4)
            )
            o = nn.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2], is_causal=True)
            h = h + o.transpose(0, 2, 1, 3).reshape(batch, seq, dim) @ b["o"]["w"] + b["o"]["b"]
            n = nn.layer_norm(h, b["n2"]["g"], b["n2"]["b"])
            h = h + nn.gelu(n @ b["w1"]["w"] + b["w1"]["b"], approximate="tanh") @ b["w2"]["w"] + b["w2"]["b"]
        h = nn.layer_norm(h, p["n"]["g"], p["n"]["b"])
        return nn.cross_entropy((h @ p["head"]).reshape(-1, vocab), y.reshape(-1))

    def step(p: Any, state: Any, x: Any, y: Any) -> Any:
        value, grads = tj.value_and_grad(loss)(p, x, y)
        p, state = opt.update(p, grads, state)
        return value, p, state

    return step, (params, opt.init(params), x, y)


def elementwise(n: int = 4000) -> Workload:
    """Workload d."""
    return (
        lambda x: np.tanh(x * 0.7 + 0.1) * np.exp(-x * x) + np.sqrt(np.abs(x)),
        (_normal(np.random.default_rng(0), n),),
    )


def softmax(rows: int = 64, columns: int = 128) -> Workload:
    """Workload e1."""
    return lambda x: nn.softmax(x), (_normal(np.random.default_rng(0), rows, columns),)


def layer_norm(rows: int = 64, columns: int = 128) -> Workload:
    """Workload e2."""
    rng = np.random.default_rng(0)
    return lambda x, g, b: nn.layer_norm(x, g, b), (
        _normal(rng, rows, columns),
        _normal(rng, columns),
        _normal(rng, columns),
    )


def ln_mlp(rows: int = 64, dim: int = 32, hidden: int = 128) -> Workload:
    """Workload f: layer norm, GELU MLP, all gradients."""
    rng = np.random.default_rng(0)
    params = [
        np.ones(dim, F32),
        np.zeros(dim, F32),
        _normal(rng, dim, hidden, scale=0.04),
        np.zeros(hidden, F32),
        _normal(rng, hidden, dim, scale=0.02),
        np.zeros(dim, F32),
    ]

    def loss(p: Any, x: Any, gy: Any) -> Any:
        n = nn.layer_norm(x, p[0], p[1])
        return ((nn.gelu(n @ p[2] + p[3], approximate="tanh") @ p[4] + p[5]) * gy).sum()

    def both(p: Any, x: Any, gy: Any) -> Any:
        return tj.value_and_grad(loss, wrt=(0, 1))(p, x, gy)

    return both, (params, _normal(rng, rows, dim), _normal(rng, rows, dim))


def sums(n: int = 96) -> list[Workload]:
    """Workload g."""
    x = _normal(np.random.default_rng(0), n, n)
    return [(lambda x: x.sum(0), (x,)), (lambda x: x.sum(1), (x,)), (lambda x: x.sum(), (x,))]


def cnn(batch: int = 4) -> Workload:
    """Workload h."""
    rng = np.random.default_rng(0)
    params = [
        _normal(rng, 16, 1, 3, 3, scale=0.3),
        np.zeros(16, F32),
        _normal(rng, 32, 16, 3, 3, scale=0.1),
        np.zeros(32, F32),
        _normal(rng, 32 * 5 * 5, 10, scale=0.03),
        np.zeros(10, F32),
    ]
    opt = optim.sgd(0.01)

    def loss(p: Any, x: Any, y: Any) -> Any:
        x = nn.max_pool2d(nn.relu(nn.conv2d(x, p[0], p[1])), 2)
        x = nn.max_pool2d(nn.relu(nn.conv2d(x, p[2], p[3])), 2)
        return nn.cross_entropy(x.reshape(batch, -1) @ p[4] + p[5], y)

    def step(p: Any, state: Any, x: Any, y: Any) -> Any:
        value, grads = tj.value_and_grad(loss)(p, x, y)
        p, state = opt.update(p, grads, state)
        return value, p, state

    return step, (params, opt.init(params), _normal(rng, batch, 1, 28, 28), rng.integers(0, 10, batch))


SMALL: dict[str, Callable[[], Workload]] = {
    "a": lambda: mlp((8, 16, 16, 10), 32),
    "b": lambda: mlp((16, 32, 24, 10), 32, optim.adam(1e-3)),
    "c": lambda: gpt(2, 32, 2, 16, 2, 24),
    "d": elementwise,
    "e1": softmax,
    "e2": layer_norm,
    "f": ln_mlp,
    "h": cnn,
}
