"""Helpers of the unit tests of functions: record a function, evaluate the graph node by node, compare with NumPy.

Deliberately independent of ``tracejit.trace``, ``tracejit.autograd`` and every backend, so that a failure here is a
failure of a function or an op.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tracejit.dtypes import WEAK_DTYPES
from tracejit.graph import Graph, Node
from tracejit.ops import registry
from tracejit.tensor import Tensor, TraceContext, recording

DTYPES = (
    "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16", "float32", "float64",
)  # fmt: skip
TOLERANCE = {np.dtype(np.float16): 4e-3, np.dtype(np.float32): 3e-6, np.dtype(np.float64): 1e-13}


def record(f: Callable[..., Any], *args: Any) -> tuple[list[Any], Graph, dict[Node, Any]]:
    """Results of ``f`` on symbolic arguments, its verified graph, and the arrays behind the inputs.

    Python scalars become weak inputs. A result that is no tensor stays as it is.
    """
    ctx = TraceContext("test")
    values: dict[Node, Any] = {}
    with recording(ctx):
        symbols: list[Any] = []
        for i, a in enumerate(args):
            weak = type(a) in WEAK_DTYPES
            array = np.asarray(a, dtype=WEAK_DTYPES[type(a)] if weak else None)
            node = ctx.add_input(f"x{i}", array.shape, array.dtype)
            values[node] = array
            symbols.append(Tensor(node, ctx, weak=weak))
        out = f(*symbols)
        results = list(out) if isinstance(out, tuple | list) else [out]
        outputs = [r.node for r in results if isinstance(r, Tensor)]
        values.update({node: np.asarray(array) for array, node in ctx.captured.values()})
        graph = Graph.build("test", ctx.inputs, outputs, [f"out{i}" for i in range(len(outputs))]).verify()
    return results, graph, values


def evaluate(graph: Graph, values: dict[Node, Any]) -> dict[Node, Any]:
    """The value of every node, by the reference implementations; each must have the inferred shape and dtype."""
    known = dict(values)
    for node in graph.nodes:
        if node in known:
            continue
        y = np.asarray(node.op.reference(*(known[i] for i in node.inputs), **node.attrs))
        assert (y.shape, y.dtype) == (node.shape, node.dtype), node
        known[node] = y
    return known


def run(f: Callable[..., Any], *args: Any) -> list[Any]:
    """What the traced ``f`` computes, as a list of arrays (or of whatever it returned that is no tensor)."""
    results, graph, values = record(f, *args)
    known = evaluate(graph, values)
    return [known[r.node] if isinstance(r, Tensor) else r for r in results]


def check(f: Callable[..., Any], *args: Any, rtol: float | None = None) -> None:
    """The traced ``f`` has exactly NumPy's shape and dtype, and its values to rounding (exactly for integers)."""
    with np.errstate(all="ignore"):
        expected = f(*args)
    wanted = [np.asarray(e) for e in (expected if isinstance(expected, tuple | list) else [expected])]
    actual = [np.asarray(a) for a in run(f, *args)]
    assert len(actual) == len(wanted)
    for a, w in zip(actual, wanted, strict=True):
        assert (a.shape, a.dtype) == (w.shape, w.dtype), (
            f"{a.dtype}{a.shape} instead of NumPy's {w.dtype}{w.shape}"
        )
        if w.dtype.kind == "f":
            tolerance = TOLERANCE[w.dtype] if rtol is None else rtol
            np.testing.assert_allclose(a.astype("f8"), w.astype("f8"), rtol=tolerance, atol=tolerance)
        else:
            np.testing.assert_array_equal(a, w)


def gradients(f: Callable[..., Any], *args: np.ndarray, seed: np.ndarray | None = None) -> list[np.ndarray]:
    """The cotangents of all arguments for the cotangent ``seed`` (ones) of the result, by the ops' rules."""
    (result,), graph, values = record(f, *args)
    known = evaluate(graph, values)
    cotangents = {result.node: np.ones(result.shape) if seed is None else np.asarray(seed)}
    with np.errstate(all="ignore"):
        for node in reversed(graph.nodes):
            g = cotangents.get(node)
            if g is None or not node.inputs or node.op.vjp is registry.NONDIFFERENTIABLE:
                continue
            assert callable(node.op.vjp)
            operands = [known[i] for i in node.inputs]
            for i, c in zip(node.inputs, node.op.vjp(g, known[node], *operands, **node.attrs), strict=True):
                if c is not None:
                    assert (c.shape, c.dtype) == (i.shape, i.dtype), (node, c.shape, c.dtype)
                    cotangents[i] = cotangents[i] + c if i in cotangents else c
    return [cotangents.get(i, np.zeros(i.shape)) for i in graph.inputs[: len(args)]]


def check_gradient(
    f: Callable[..., Any],
    *args: np.ndarray,
    wrt: Sequence[int] | None = None,
    rtol: float = 1e-6,
    step: float = 1e-6,
) -> None:
    """The gradient of ``Σ w·f(args)`` equals central differences, for random weights ``w``, in float64."""
    with np.errstate(all="ignore"):
        y = np.asarray(f(*args))
    weights = np.random.default_rng(7).normal(size=y.shape)
    actual = gradients(f, *args, seed=weights)
    for k in range(len(args)) if wrt is None else wrt:
        numeric = np.zeros(args[k].shape)
        for index in np.ndindex(args[k].shape):
            sides = []
            for sign in (1.0, -1.0):
                moved = [a.copy() for a in args]
                moved[k][index] += sign * step
                with np.errstate(all="ignore"):
                    sides.append(np.sum(weights * f(*moved)))
            numeric[index] = (sides[0] - sides[1]) / (2 * step)
        np.testing.assert_allclose(actual[k], numeric, rtol=rtol, atol=rtol)
