"""The graph: nodes are immutable and unique, rewrites are pure, and the verifier catches every kind of damage."""

from __future__ import annotations

import math

import numpy as np
import pytest

import tracejit as tj
from tracejit.errors import GraphError
from tracejit.graph import ArrayLiteral, Graph, GraphBuilder, Node, attr_key, inline

F32 = np.dtype(np.float32)
I64 = np.dtype(np.int64)


def an_input(
    builder: GraphBuilder, name: str = "x", shape: tuple[int, ...] = (2, 3), dtype: np.dtype = F32
) -> Node:
    attrs = {"index": len(builder.nodes), "kind": "argument", "shape": shape, "dtype": dtype}
    return builder.add("input", (), attrs, name=name)


def small_graph() -> Graph:
    """``sum(exp(x) * exp(x))`` over all axes."""
    b = GraphBuilder()
    x = an_input(b)
    e = b.add("exp", (x,))
    return Graph.build("small", [x], [b.add("sum", (b.add("mul", (e, e)),), {"axes": (0, 1)})])


# -- hash-consing ----------------------------------------------------------------------------------------------------


def test_equal_requests_give_the_same_node() -> None:
    b = GraphBuilder()
    x = an_input(b)
    assert b.add("exp", (x,)) is b.add("exp", (x,))
    assert b.add("sum", (x,), {"axes": (0,)}) is b.add("sum", (x,), {"axes": (0,)})
    assert b.add("sum", (x,), {"axes": (0,)}) is not b.add("sum", (x,), {"axes": (1,)})


def test_commutative_ops_are_unique_up_to_order_and_others_are_not() -> None:
    b = GraphBuilder()
    x, y = an_input(b, "x"), an_input(b, "y")
    assert b.add("add", (x, y)) is b.add("add", (y, x))
    assert b.add("mul", (x, y)) is b.add("mul", (y, x))
    assert b.add("sub", (x, y)) is not b.add("sub", (y, x))


def test_inputs_are_never_merged() -> None:
    b = GraphBuilder()
    attrs = {"index": 0, "kind": "argument", "shape": (2,), "dtype": F32}
    assert b.add("input", (), attrs) is not b.add("input", (), attrs)


def test_literals_are_compared_by_content() -> None:
    b = GraphBuilder()
    one = b.add("literal", (), {"value": ArrayLiteral([1.0, 2.0])})
    assert one is b.add("literal", (), {"value": ArrayLiteral(np.array([1.0, 2.0]))})
    assert one is not b.add("literal", (), {"value": ArrayLiteral([1.0, 3.0])})
    assert one is not b.add("literal", (), {"value": ArrayLiteral(np.array([1.0, 2.0], np.float32))})
    assert one is not b.add("literal", (), {"value": ArrayLiteral([[1.0, 2.0]])})


def test_a_literal_keeps_its_value_when_the_source_array_changes() -> None:
    source = np.array([1.0, 2.0])
    literal = ArrayLiteral(source)
    source[:] = 9
    np.testing.assert_array_equal(literal.array, [1.0, 2.0])
    with pytest.raises(ValueError):
        literal.array[0] = 5


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (1, 1.0),
        (1, True),
        (0, False),
        (0.0, -0.0),
        (1.0, True),
        ((1, 2), (1, 2.0)),
        ((0.0,), (-0.0,)),
        (0.0, 0),
    ],
)
def test_attributes_that_python_calls_equal_are_told_apart(a: object, b: object) -> None:
    assert attr_key(a) != attr_key(b)


def test_attribute_keys_of_the_same_value_are_equal_and_hashable() -> None:
    for value in (1, 1.0, True, -0.0, math.inf, (1, (2.0, False)), "text", None, np.dtype("f4"), math.nan):
        assert attr_key(value) == attr_key(value)
        hash(attr_key(value))
    assert attr_key(float("nan")) == attr_key(float("nan")), "one constant nan, not one per request"


def test_numpy_scalars_as_attributes_equal_their_python_values() -> None:
    assert attr_key(np.True_) == attr_key(True)
    assert attr_key(np.float64(0.5)) == attr_key(0.5)
    assert attr_key(np.float64(-0.0)) != attr_key(0.0)


def test_positive_and_negative_zero_and_nan_are_different_constants() -> None:
    b = GraphBuilder()
    assert b.const(0.0, F32) is not b.const(-0.0, F32)
    assert b.const(math.nan, F32) is b.const(math.nan, F32)
    assert b.const(1, F32) is not b.const(1, I64)
    assert b.const(1, F32) is b.const(True, F32), "the value is rounded to the dtype first"


def test_constants_are_rounded_to_their_dtype() -> None:
    b = GraphBuilder()
    assert b.const(0.1, F32).attrs["value"] == float(np.float32(0.1))
    assert b.const(0.1, F32) is b.const(float(np.float32(0.1)), F32)


def test_operand_count_is_checked() -> None:
    b = GraphBuilder()
    x = an_input(b)
    with pytest.raises(GraphError, match=r"\[add\] takes 2 operands, got 1"):
        b.add("add", (x,))
    with pytest.raises(GraphError, match="unknown op 'frobnicate'"):
        b.add("frobnicate", (x,))


# -- immutability ----------------------------------------------------------------------------------------------------


def test_nodes_cannot_be_changed() -> None:
    node = small_graph().nodes[1]
    for name in ("op", "inputs", "attrs", "shape", "dtype", "source", "anything"):
        with pytest.raises(AttributeError, match="immutable"):
            setattr(node, name, None)


def test_graphs_cannot_be_changed() -> None:
    graph = small_graph()
    with pytest.raises(AttributeError):
        graph.nodes = ()  # type: ignore[misc]
    assert isinstance(graph.nodes, tuple) and isinstance(graph.outputs, tuple)


# -- building and looking --------------------------------------------------------------------------------------------


def test_nodes_are_in_topological_order_inputs_first_dead_ones_left_out() -> None:
    b = GraphBuilder()
    x, unused = an_input(b, "x"), an_input(b, "unused")
    e = b.add("exp", (x,))
    b.add("tanh", (x,))  # dead
    graph = Graph.build("g", [x, unused], [b.add("neg", (e,))])
    assert [n.op.name for n in graph] == ["input", "input", "exp", "neg"]
    assert [graph.id(n) for n in graph] == [0, 1, 2, 3]
    assert graph.output_names == ("out",)


def test_a_deep_chain_does_not_overflow_the_python_stack() -> None:
    b = GraphBuilder()
    x = node = an_input(b)
    for _ in range(20_000):
        node = b.add("neg", (node,)) if node.op.name != "neg" else b.add("exp", (node,))
    assert len(Graph.build("deep", [x], [node]).verify()) == 20_001


def test_users_has_one_entry_per_reading_operand() -> None:
    graph = small_graph()
    x, e, mul, total = graph.nodes
    assert graph.users() == {x: [e], e: [mul, mul], mul: [total], total: []}


def test_asking_for_the_id_of_a_foreign_node_is_an_error() -> None:
    with pytest.raises(GraphError, match="not a node of graph 'small'"):
        small_graph().id(small_graph().nodes[0])


def test_equality_is_structural() -> None:
    def f(x):
        return np.exp(x) * 2

    def g(x):
        return np.exp(x) * 3

    def graph_of(function, x):  # one place, because the source line of a call is part of its graph
        return tj.trace(function).graph(x)

    x = np.zeros((2, 2), np.float32)
    one = graph_of(f, x)
    assert one == graph_of(f, x)
    assert hash(one) == hash(graph_of(f, x))
    assert one != graph_of(g, x)
    assert one != graph_of(f, np.zeros((2, 3), np.float32))
    assert one != "a string"


def test_sizes_in_bytes() -> None:
    graph = small_graph()
    assert graph.nodes[0].nbytes == 24 and graph.nodes[0].size == 6 and graph.nodes[0].ndim == 2
    assert graph.nodes[-1].nbytes == 4 and graph.nodes[-1].size == 1


# -- rewrite and inline ----------------------------------------------------------------------------------------------


def test_rewrite_replaces_nodes_and_leaves_the_original_alone() -> None:
    graph = small_graph()
    before = [n.op.name for n in graph]
    tanh = graph.rewrite(lambda b, n, i: b.add("tanh", i, like=n) if n.op.name == "exp" else None)
    assert [n.op.name for n in tanh.verify()] == ["input", "tanh", "mul", "sum"]
    assert [n.op.name for n in graph] == before
    assert set(graph.nodes) & set(tanh.nodes) == {graph.nodes[0]}, (
        "what did not change is shared, being immutable"
    )


def test_an_identity_rewrite_gives_an_equal_graph() -> None:
    graph = small_graph()
    assert graph.rewrite(lambda b, n, i: None) == graph


def test_rewrite_merges_what_has_become_equal() -> None:
    b = GraphBuilder()
    x = an_input(b)
    graph = Graph.build("g", [x], [b.add("add", (b.add("exp", (x,)), b.add("tanh", (x,))))])
    merged = graph.rewrite(lambda b, n, i: b.add("exp", i, like=n) if n.op.name == "tanh" else None)
    assert [n.op.name for n in merged] == ["input", "exp", "add"]


def test_rewrite_keeps_names_sources_scopes_and_forward_nodes() -> None:
    def loss(w, x):
        with tj.named_scope("layer"):
            y = np.tanh(x @ w)
        return (y * y).sum()

    graph = tj.trace(tj.grad(loss)).graph(np.ones((3, 2), np.float32), np.ones((4, 3), np.float32))
    copy = graph.rewrite(lambda b, n, i: None)
    assert copy == graph
    gradient = [n for n in copy if n.grad_of is not None]
    assert gradient, "gradient nodes know their forward nodes"
    assert {n.name for n in copy.inputs} == {"w", "x"}
    assert any(n.scope.endswith("layer") and n.source for n in gradient), "in the scope of the forward node"


def test_inline_copies_a_graph_behind_other_inputs() -> None:
    graph = small_graph()
    b = GraphBuilder()
    y = an_input(b, "y")
    (total,) = inline(b, graph, [b.add("neg", (y,))])
    result = Graph.build("outer", [y], [total]).verify()
    assert [n.op.name for n in result] == ["input", "neg", "exp", "mul", "sum"]
    with pytest.raises(ValueError):
        inline(b, graph, [])


# -- the verifier ----------------------------------------------------------------------------------------------------


def damaged(node: Node, **changes: object) -> Node:
    """A copy of ``node`` with fields that no builder would have made."""
    fields = {
        k: getattr(node, k)
        for k in ("op", "inputs", "attrs", "shape", "dtype", "source", "scope", "name", "avals")
    }
    fields.update(changes)
    op, inputs, attrs = fields.pop("op"), fields.pop("inputs"), fields.pop("attrs")
    return Node(op, inputs, attrs, fields.pop("shape"), fields.pop("dtype"), **fields)


def test_a_good_graph_verifies_and_is_returned() -> None:
    graph = small_graph()
    assert graph.verify() is graph


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shape": (3, 2)}, r"exp.*should be \(\(2, 3\)"),
        ({"dtype": np.dtype(np.float64)}, r"exp.*should be"),
    ],
)
def test_a_wrong_shape_or_dtype_is_caught(changes: dict, message: str) -> None:
    x, e, *_ = small_graph().nodes
    bad = damaged(e, **changes)
    with pytest.raises(GraphError, match=message):
        Graph("g", (x, bad), (x,), (bad,), ("out",)).verify()


def test_wrong_attributes_are_caught_by_the_shape_rule() -> None:
    graph = small_graph()
    x, e, mul, total = graph.nodes
    bad = damaged(total, attrs={"axes": (0,)})
    with pytest.raises(GraphError):
        Graph("g", (x, e, mul, bad), (x,), (bad,), ("out",)).verify()


def test_an_operand_that_comes_later_is_caught() -> None:
    x, e, mul, total = small_graph().nodes
    with pytest.raises(GraphError, match="comes later or is missing"):
        Graph("g", (x, mul, e, total), (x,), (total,), ("out",)).verify()


def test_a_missing_operand_is_caught() -> None:
    x, _, mul, total = small_graph().nodes
    with pytest.raises(GraphError, match="comes later or is missing"):
        Graph("g", (x, mul, total), (x,), (total,), ("out",)).verify()


def test_an_input_node_outside_of_the_inputs_is_caught() -> None:
    x, e, mul, total = small_graph().nodes
    with pytest.raises(GraphError, match="input node that is not among the inputs"):
        Graph("g", (x, e, mul, total), (), (total,), ("out",)).verify()


def test_an_output_that_is_not_in_the_graph_is_caught() -> None:
    x, e, _, total = small_graph().nodes
    with pytest.raises(GraphError, match="not a node of the graph"):
        Graph("g", (x, e), (x,), (total,), ("out",)).verify()


def test_a_wrong_number_of_output_names_is_caught() -> None:
    x, e, *_ = small_graph().nodes
    with pytest.raises(GraphError, match="1 outputs but 2 names"):
        Graph("g", (x, e), (x,), (e,), ("a", "b")).verify()


def test_a_wrong_operand_count_is_caught() -> None:
    x, e, *_ = small_graph().nodes
    bad = damaged(e, inputs=(x, x))
    with pytest.raises(GraphError, match="exp"):
        Graph("g", (x, bad), (x,), (bad,), ("out",)).verify()


def test_a_node_listed_twice_is_caught() -> None:
    x, e, *_ = small_graph().nodes
    with pytest.raises(GraphError, match="twice"):
        Graph("g", (x, e, e), (x,), (e,), ("out",)).verify()


def test_a_forward_node_that_is_no_node_is_caught() -> None:
    """``grad_of`` may point at a forward node that the optimiser removed, but never at something that is not a node."""
    x, e, *_ = small_graph().nodes
    bad = damaged(e, grad_of="exp")
    with pytest.raises(GraphError, match="grad_of"):
        Graph("g", (x, bad), (x,), (bad,), ("out",)).verify()


def test_a_bad_subgraph_is_caught() -> None:
    def f(x):
        return tj.cond(x.sum() > 0, lambda v: v * 2, lambda v: v + 1, x)

    graph = tj.trace(f).graph(np.ones(3, np.float32))
    node = next(n for n in graph if n.op.name == "cond")
    inner = node.attrs["true_graph"]
    wrong = damaged(inner.nodes[-1], shape=(7,))
    broken = Graph("inner", (*inner.nodes[:-1], wrong), inner.inputs, (wrong,), inner.output_names)
    bad = damaged(node, attrs={**node.attrs, "true_graph": broken})
    before = graph.nodes[: graph.id(node)]
    with pytest.raises(GraphError):
        Graph("g", (*before, bad), graph.inputs, (), ()).verify()
