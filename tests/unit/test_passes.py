"""The passes: what each does, on before/after graphs, and that none changes a bit of a finite result or loses a NaN."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import tracejit as tj
from tests.fuzz_programs import random_program
from tests.unit._evaluate import record
from tracejit import passes
from tracejit.graph import Graph
from tracejit.passes import (
    eliminate_common_subexpressions,
    eliminate_dead_code,
    erase_markers,
    fold_constants,
    optimise,
    simplify,
)

X = np.arange(6, dtype=np.float32).reshape(2, 3) - 2.5


def recorded(f: Callable[..., Any], *args: Any) -> Graph:
    return record(f, *(args or (X,)))[1]


def with_effects(f: Callable[..., Any]) -> Graph:
    """The graph as ``@trace`` records it, effects included."""
    return tj.trace(f).inspect(X, device="numpy").graph


def ops(graph: Graph) -> list[str]:
    """The ops of a graph in order, without inputs."""
    return [n.op.name for n in graph if n.op.name != "input"]


def simplified(f: Callable[..., Any], *args: Any) -> list[str]:
    return ops(eliminate_dead_code(simplify(fold_constants(recorded(f, *args)))))


# -- dead code, common subexpressions --------------------------------------------------------------------------------


def test_dead_code_goes_and_inputs_stay() -> None:
    graph = recorded(lambda x, y: np.exp(x), X, X)
    bigger = Graph(
        graph.name,
        (*graph.nodes, *recorded(lambda x: np.tanh(x)).nodes),
        graph.inputs,
        graph.outputs,
        graph.output_names,
    )
    clean = eliminate_dead_code(bigger)
    assert ops(clean) == ["exp"]
    assert len(clean.inputs) == 2


def test_prints_are_not_dead() -> None:
    def f(x):
        tj.print("{}", x.sum())
        return x + 1

    assert "print" in ops(eliminate_dead_code(with_effects(f)))
    assert "print" in ops(optimise(with_effects(f)))


def test_equal_nodes_that_a_pass_made_are_merged() -> None:
    """``-(-x)`` becomes ``x``, which makes two exponentials equal."""
    graph = simplify(recorded(lambda x: np.exp(x) + np.exp(np.negative(-x))))
    assert ops(eliminate_common_subexpressions(graph)).count("exp") == 1


def test_equal_prints_are_not_merged() -> None:
    def f(x):
        tj.print("a {}", x.sum())
        tj.print("a {}", x.sum())
        return x

    assert ops(optimise(with_effects(f))).count("print") == 2


# -- constant folding ------------------------------------------------------------------------------------------------


def test_scalar_constants_are_computed_while_tracing() -> None:
    def f(x):
        two = np.zeros((), np.float32) + 2
        return x * np.sqrt(two * 8)

    graph = eliminate_dead_code(fold_constants(recorded(f)))
    assert [n.attrs["value"] for n in graph if n.op.name == "const"] == [4.0]
    assert "sqrt" not in ops(graph)


def test_folding_rounds_in_the_type_of_the_node() -> None:
    def f(x):
        tenth = np.zeros((), np.float32) + np.float32(0.1)
        return x * (tenth + tenth + tenth)

    graph = optimise(recorded(f))
    (value,) = [n.attrs["value"] for n in graph if n.op.name == "const"]
    tenth = np.float32(0.1)
    assert value == float(tenth + tenth + tenth)


def test_arrays_are_not_folded() -> None:
    """They would bloat the graph, and hide from the code generators that they are one number or a ramp."""
    graph = optimise(recorded(lambda x: x + np.arange(3, like=x) * 2))
    assert "literal" not in ops(graph)
    assert "iota" in ops(graph) or "const" in ops(graph)


# -- algebra ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("f", "left"),
    [
        (lambda x: x * 1, []),
        (lambda x: 1 * x, []),
        (lambda x: x - 0, []),
        (lambda x: x / 1, []),
        (lambda x: x**1, []),
        (lambda x: np.negative(-x), []),
        (lambda x: x * -1, ["neg"]),
        (lambda x: x**2, ["mul"]),
        (lambda x: np.transpose(np.transpose(x)), []),
        (lambda x: x.reshape(3, 2).reshape(6).reshape(2, 3), []),
        (lambda x: x.reshape(3, 2).reshape(6), ["reshape"]),
        (lambda x: np.broadcast_to(np.broadcast_to(x, (4, 2, 3)), (5, 4, 2, 3)), ["broadcast_to"]),
        (lambda x: x[:], []),
        (lambda x: x.astype(np.float64).astype(np.float32), []),
        (lambda x: x.astype(np.float32), []),
        (lambda x: np.concatenate([x]), []),
        (lambda x: np.where(np.ones((2, 3), bool) if False else x > x, x, x), []),
        (lambda x: x.sum(axis=()), []),
    ],
)
def test_identities_disappear(f: Callable[..., Any], left: list[str]) -> None:
    assert [o for o in simplified(f) if o != "const"] == left


def test_powers_of_two_are_gathered_into_one_factor() -> None:
    graph = eliminate_dead_code(simplify(recorded(lambda x: (x * 3.0) * 0.5)))
    assert ops(graph).count("mul") == 1
    assert [n.attrs["value"] for n in graph if n.op.name == "const"] == [1.5]


@pytest.mark.parametrize(
    "f",
    [
        lambda x: x * 0,
        lambda x: x - x,
        lambda x: x / x,
        lambda x: (x * 3.0) * 0.1,
        lambda x: (x + 1e8) - 1e8,
        lambda x: x / 3,
        lambda x: np.sqrt(x) ** 2,
        lambda x: x**0.5,
        lambda x: x.astype(np.float16).astype(np.float32),
        lambda x: x.astype(np.int32).astype(np.float32),
    ],
)
def test_what_would_change_a_result_is_left_alone(f: Callable[..., Any]) -> None:
    x = np.array([[1.1, np.nan, np.inf], [-np.inf, 0.0, 2.7e-3]], np.float32)
    graph = recorded(f, x)
    after = optimise(graph)
    with np.errstate(all="ignore"):
        (expected,) = outputs(graph, [x])
        (got,) = outputs(after, [x])
    np.testing.assert_array_equal(got, expected)


def test_the_transpose_of_a_product_is_a_product() -> None:
    assert simplified(lambda a, b: (a @ b).T, X, X.T.copy()) == ["dot_general"]


# -- markers ---------------------------------------------------------------------------------------------------------


def test_markers_of_autograd_are_erased() -> None:
    def f(x):
        with tj.named_scope("inner"):
            g = tj.grad(lambda v: (tj.stop_gradient(v) * v).sum())(x)
        return g

    graph = recorded(f)
    assert "grad_input" in ops(graph) and "stop_gradient" in ops(graph)
    after = erase_markers(graph)
    assert not {"grad_input", "stop_gradient", "custom_vjp", "identity"} & set(ops(after))


def test_custom_rules_are_erased_and_their_results_kept() -> None:
    @tj.custom_vjp
    def pair(x):
        return x * 2, x * 3

    pair.defvjp(lambda x: ((x * 2, x * 3), None), lambda res, g: (g[0] + g[1],))
    graph = recorded(lambda x: pair(x)[1])
    after = optimise(graph)
    assert ops(after) == ["const", "broadcast_to", "mul"]
    np.testing.assert_array_equal(outputs(after, [X])[0], X * 3)


# -- the pipeline ----------------------------------------------------------------------------------------------------


def outputs(graph: Graph, arrays: list[np.ndarray]) -> list[np.ndarray]:
    """The results of ``graph``, node by node with the reference implementations."""
    known: dict[Any, Any] = dict(zip(graph.inputs, arrays))
    for node in graph:
        if node not in known:
            known[node] = node.op.reference(*(known[i] for i in node.inputs), **node.attrs)
    return [np.asarray(known[n]) for n in graph.outputs]


def test_the_trail_names_every_pass_in_order() -> None:
    trail: list[tuple[str, Graph]] = []
    final = optimise(recorded(lambda x: x * 1 + 0), trail)
    assert [name for name, _ in trail] == [p.__name__ for p in passes.PIPELINE]
    assert trail[-1][1] is final


def test_passes_are_pure() -> None:
    graph = recorded(lambda x: np.exp(np.negative(-x) * 1) + 0)
    before = str(graph)
    optimise(graph)
    assert str(graph) == before


def test_optimising_twice_changes_nothing_more() -> None:
    for seed in range(20):
        program = random_program(seed)
        with np.errstate(all="ignore"):
            once = optimise(record(program.function(), *program.arrays())[1])
        assert ops(optimise(once)) == ops(once), program


@pytest.mark.parametrize("first", range(0, 100, 20))
def test_random_graphs_give_the_same_bits(first: int) -> None:
    for seed in range(first, first + 20):
        program = random_program(seed)
        graph, values = record(program.function(), *program.arrays())[1:]
        arrays = [values[n] for n in graph.inputs]
        with np.errstate(all="ignore"):
            expected = outputs(graph, arrays)
            got = outputs(optimise(graph), arrays)
        for name, g, e in zip(program.outputs, got, expected):
            assert (g.dtype, g.shape) == (e.dtype, e.shape)
            # Transposed products may sum in another order inside BLAS; everything else is equal to the bit.
            if any("@" in s or "dot" in s or "einsum" in s or "matmul" in s for _, s in program.steps):
                tolerance = 64 * np.finfo(e.dtype).eps if e.dtype.kind == "f" else 0
                np.testing.assert_allclose(
                    g, e, rtol=tolerance, atol=tolerance * (np.abs(e).max() if e.size else 0)
                )
            else:
                np.testing.assert_array_equal(g, e, err_msg=f"{name} of\n{program}")


@pytest.mark.parametrize("first", range(0, 60, 20))
def test_random_graphs_lose_no_nan(first: int) -> None:
    for seed in range(first, first + 20):
        program = random_program(seed)
        graph, values = record(program.function(), *program.arrays())[1:]
        rng = np.random.default_rng(seed)
        arrays = []
        for n in graph.inputs:
            a = values[n].copy()
            if a.dtype.kind == "f":
                special = rng.choice(np.array([np.nan, np.inf, -np.inf, -0.0, 0.0], a.dtype), a.shape)
                a = np.where(rng.random(a.shape) < 0.3, special, a)
            arrays.append(a)
        with np.errstate(all="ignore"):
            expected = outputs(graph, arrays)
            got = outputs(optimise(graph), arrays)
        for name, g, e in zip(program.outputs, got, expected):
            if e.dtype.kind == "f":
                np.testing.assert_array_equal(np.isnan(g), np.isnan(e), err_msg=f"{name} of\n{program}")
