"""``tj.checkpoint``: the same numbers, less memory. Values, gradients of any order, and what stays alive."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest

import tracejit as tj
from tracejit import nn
from tracejit.graph import Graph

X = np.linspace(-1, 1, 24).reshape(4, 6)
W = np.linspace(-0.5, 0.5, 36).reshape(6, 6)


def block(x: Any, w: Any) -> Any:
    return np.tanh(np.tanh(x @ w) @ w)


def same(name: str, wrap: Any) -> Any:
    """A loss over two blocks."""

    def loss(x: Any, w: Any) -> Any:
        return (wrap(block)(wrap(block)(x, w), w) ** 2).sum()

    loss.__name__ = name
    return loss


PLAIN, SAVED = same("plain", lambda f: f), same("saved", tj.checkpoint)


def count(graph: Graph, name: str) -> int:
    return sum(n.op.name == name for n in graph.nodes)


# -- the same numbers --------------------------------------------------------------------------------------------------


def test_values_and_gradients_are_those_of_the_function(device: str) -> None:
    x, w = X.astype(np.float32), W.astype(np.float32)
    with tj.device(device):
        value, gradients = tj.value_and_grad(SAVED, (0, 1))(x, w)
        expected, reference = tj.value_and_grad(PLAIN, (0, 1))(x, w)
    np.testing.assert_allclose(np.asarray(value), np.asarray(expected), rtol=1e-5)
    for g, r in zip(gradients, reference):
        np.testing.assert_allclose(np.asarray(g), np.asarray(r), rtol=1e-4, atol=1e-5)


def test_outside_a_trace_it_is_the_function() -> None:
    np.testing.assert_array_equal(tj.checkpoint(block)(X, W), block(X, W))
    assert tj.checkpoint(block).__name__ == "block"


def test_without_a_gradient_nothing_is_computed_twice() -> None:
    graph = tj.trace(SAVED).graph(X, W)
    assert count(graph, "tanh") == 4 and count(graph, "barrier") == 0


def test_the_gradient_computes_the_function_twice() -> None:
    assert count(tj.grad(PLAIN).graph(X, W), "tanh") == 4
    graph = tj.grad(SAVED).graph(X, W)
    assert count(graph, "tanh") == 8
    assert count(graph, "barrier") >= 2


def test_recomputed_nodes_know_the_node_they_repeat() -> None:
    graph = tj.value_and_grad(SAVED, (0, 1)).graph(X, W)
    repeated = [n for n in graph.nodes if n.op.name == "tanh" and n.grad_of is not None]
    assert len(repeated) == 4
    assert all(n.grad_of.op.name == "tanh" and n.source == n.grad_of.source for n in repeated)  # type: ignore[union-attr]


def test_higher_orders() -> None:
    def scalar(loss: Any) -> Any:
        return lambda x: loss(x, W)

    v = np.cos(X)

    def directional(loss: Any) -> Any:
        return lambda x: (tj.grad(scalar(loss))(x) * v).sum()

    np.testing.assert_allclose(tj.grad(directional(SAVED))(X), tj.grad(directional(PLAIN))(X), rtol=1e-9)

    def third(loss: Any) -> Any:
        return tj.grad(lambda x: (tj.grad(directional(loss))(x) * v).sum())

    np.testing.assert_allclose(third(SAVED)(X), third(PLAIN)(X), rtol=1e-8, atol=1e-10)


def test_forward_mode() -> None:
    got = tj.jvp(lambda x: tj.checkpoint(block)(x, W), (X,), (X + 1,))
    expected = tj.jvp(lambda x: block(x, W), (X,), (X + 1,))
    for a, b in zip(got, expected):
        np.testing.assert_allclose(a, b)


def test_nested_checkpoints() -> None:
    inner = tj.checkpoint(block)
    outer = tj.checkpoint(lambda x, w: inner(inner(x, w), w))
    got = tj.grad(lambda x: (outer(x, W) ** 2).sum())(X)
    np.testing.assert_allclose(got, tj.grad(PLAIN)(X, W))


# -- what a function may be --------------------------------------------------------------------------------------------


def test_trees_python_values_closures_and_integers() -> None:
    scale = np.full(6, 1.5)

    @tj.checkpoint
    def f(tree: Any, n: int, *, mode: str, idx: Any) -> Any:
        y = tree["x"]
        for _ in range(n):
            y = np.sin(y * tree["nested"][0] * scale)
        return {"y": y, "mode": mode, "rows": y[idx], "count": idx + 1, "number": 3}

    def loss(tree: Any, idx: Any, g: Any) -> Any:
        out = g(tree, 2, mode="fast", idx=idx)
        assert out["mode"] == "fast" and out["number"] == 3
        return (out["y"].sum() + (out["rows"] ** 2).sum()) * out["count"].sum()

    tree = {"x": X, "nested": [np.arange(6.0), None]}
    idx = np.array([0, 2, 2])
    got = tj.grad(lambda t, i: loss(t, i, f))(tree, idx)
    expected = tj.grad(lambda t, i: loss(t, i, f.__wrapped__))(tree, idx)
    np.testing.assert_allclose(got["x"], expected["x"])
    np.testing.assert_allclose(got["nested"][0], expected["nested"][0])


def test_gradients_of_closed_over_values() -> None:
    def loss(w: Any, wrap: Any) -> Any:
        return wrap(lambda x: np.tanh(x @ w * 2))(X).sum()

    got = tj.grad(lambda w: loss(w, tj.checkpoint))(W)
    np.testing.assert_allclose(got, tj.grad(lambda w: loss(w, lambda f: f))(W))


def test_results_that_are_arguments_or_constants() -> None:
    @tj.checkpoint
    def f(x: Any) -> Any:
        return x, np.ones(2), x * 2, 5.0

    def loss(x: Any) -> Any:
        a, b, c, d = f(x)
        return (a * c).sum() * b.sum() * d

    np.testing.assert_allclose(tj.grad(loss)(X), 40 * X)


def test_weak_scalars_stay_weak() -> None:
    @tj.trace
    def f(x: Any, lr: float) -> Any:
        return x * tj.checkpoint(lambda v: v * 2)(lr)

    assert f(X.astype(np.float32), 0.5).dtype == np.float32


def test_modules_methods_and_rules_given_by_nn(rng: np.random.Generator) -> None:
    layer = nn.TransformerBlock(8, 2, rng=rng)
    x = rng.normal(size=(2, 5, 8)).astype(np.float32)
    got = tj.grad(lambda m, x: (tj.checkpoint(m)(x) ** 2).mean())(layer, x)
    expected = tj.grad(lambda m, x: (m(x) ** 2).mean())(layer, x)
    import optree

    for a, b in zip(optree.tree_leaves(got), optree.tree_leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)

    class Model:
        @tj.checkpoint
        def run(self, x: Any) -> Any:
            return np.sin(x)

    np.testing.assert_allclose(tj.grad(lambda x: Model().run(x).sum())(X), np.cos(X))


def test_prints_once(capfd: pytest.CaptureFixture[str]) -> None:
    @tj.checkpoint
    def f(x: Any) -> Any:
        tj.print("sum {}", x.sum())
        return tj.cond(x.sum() > -1, shout, lambda v: v, np.sin(x))

    def shout(v: Any) -> Any:
        tj.print("shape {}", v.size)
        return v * 2

    got = tj.grad(lambda x: f(x).sum())(np.zeros(3))
    np.testing.assert_allclose(got, 2 * np.ones(3))
    assert capfd.readouterr().out == "sum 0.0\nshape 3\n"


def test_something_else_than_a_function_is_refused() -> None:
    with pytest.raises(tj.TracingError, match="checkpoint takes a function, got ndarray"):
        tj.checkpoint(X)  # type: ignore[arg-type]


# -- with the other transformations ------------------------------------------------------------------------------------


def test_inside_vmap_and_around_it() -> None:
    def loss(x: Any, w: Any) -> Any:
        return (tj.checkpoint(block)(x, w) ** 2).sum()

    each = np.stack([tj.grad(loss, 1)(x, W) for x in X])
    np.testing.assert_allclose(tj.vmap(tj.grad(loss, 1), (0, None))(X, W), each)
    np.testing.assert_allclose(tj.grad(lambda w: tj.vmap(lambda x: loss(x, w))(X).sum())(W), each.sum(0))
    mapped = tj.checkpoint(tj.vmap(block, (0, None)))
    np.testing.assert_allclose(tj.grad(lambda w: (mapped(X, w) ** 2).sum())(W), each.sum(0))


def test_the_map_of_a_checkpoint_still_recomputes() -> None:
    def total(x: Any, w: Any) -> Any:
        return tj.vmap(lambda v: (tj.checkpoint(block)(v, w) ** 2).sum())(x).sum()

    assert count(tj.grad(total).graph(X, W), "tanh") == 4


def test_inside_scan_and_cond() -> None:
    def loss(w: Any, wrap: Any) -> Any:
        def step(h: Any, x: Any) -> Any:
            new = tj.cond(x.sum() > -100, lambda h: wrap(block)(h, w) + x, lambda h: h, h)
            return new, new.sum()

        h, ys = tj.scan(step, np.zeros(6), X)
        return (h**2).sum() + (ys**2).sum()

    got = tj.grad(lambda w: loss(w, tj.checkpoint))(W)
    np.testing.assert_allclose(got, tj.grad(lambda w: loss(w, lambda f: f))(W), rtol=1e-9)


# -- less memory -------------------------------------------------------------------------------------------------------

LAYERS, WIDTH, ROWS = 10, 32, 512


def deep(wrap: Any) -> Any:
    """A deep MLP in blocks of three layers."""

    def three(x: Any, ws: Any) -> Any:
        for w in ws:
            x = nn.gelu(x @ w)
        return x

    def loss(weights: Any, x: Any) -> Any:
        for ws in weights:
            x = wrap(three)(x, ws)
        return (x**2).mean()

    return tj.value_and_grad(loss)


def deep_arguments() -> tuple[Any, np.ndarray]:
    rng = np.random.default_rng(0)
    weights = [
        [rng.normal(size=(WIDTH, WIDTH)).astype(np.float32) / 4 for _ in range(3)] for _ in range(LAYERS)
    ]
    return weights, rng.normal(size=(ROWS, WIDTH)).astype(np.float32)


def test_a_deep_network_needs_less_memory_when_it_runs() -> None:
    peaks = []
    weights, x = deep_arguments()
    leaves = [w for ws in weights for w in ws] + [x]
    for wrap in (lambda f: f, tj.checkpoint):
        run = deep(wrap)._outside()
        with tj.device("numpy"):
            entry, _ = run._entry_for((weights, x), {})
            _, timing = entry.executable.observed(leaves)
        peaks.append(int(max(timing.live)))
    one = x.nbytes
    assert peaks[0] > 3 * LAYERS * one, "without checkpoints every activation is kept"
    # The inputs of the blocks, what one block needs, and the gradients.
    assert peaks[1] < (LAYERS + 16) * one
    assert peaks[1] < 0.6 * peaks[0]


def test_the_memory_plan_of_compiled_backends_is_smaller(device: str) -> None:
    if device == "numpy":
        return  # it has no plan; the test above measures what it keeps
    bounds = []
    arguments = deep_arguments()
    for wrap in (lambda f: f, tj.checkpoint):
        with tj.device(device):
            inspection = deep(wrap)._outside().inspect(*arguments)
        assert f"lower bound {inspection.program.live_bound:,}" in inspection.memory
        bounds.append(inspection.program.live_bound)
    assert bounds[1] < 0.6 * bounds[0]


def test_a_graph_with_barriers_round_trips() -> None:
    graph = tj.grad(SAVED).graph(X, W)
    assert Graph.parse(str(graph)) == graph
    assert Graph.from_json(graph.to_json()) == graph


def test_text_is_the_same_in_every_trace_and_process() -> None:
    code = (
        "import numpy as np, tracejit as tj\n"
        "def f(x): return tj.checkpoint(lambda v: np.sin(np.sin(v)))(x).sum()\n"
        "tj.grad(lambda x: f(x) * 2)(np.ones(3)) if {first} else None\n"
        "print(tj.grad(f).graph(np.ones(3)))\n"
    )
    a, b = (
        subprocess.run(
            [sys.executable, "-c", code.format(first=k)], check=True, capture_output=True, text=True
        )
        for k in (0, 1)
    )
    assert "barrier" in a.stdout and a.stdout == b.stdout
