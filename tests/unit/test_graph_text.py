"""The text and JSON forms of graphs: readable, stable, read back to equal graphs, and unimpressed by
malformed input."""

from __future__ import annotations

import contextlib
import json
import math
import random as stdlib_random
from typing import Any

import numpy as np
import pytest

import tracejit as tj
from tracejit import graph_text
from tracejit.errors import GraphError
from tracejit.graph import ArrayLiteral, Graph, Node
from tracejit.ops import registry
from tracejit.ops.control import interpret
from tracejit.tensor import Tensor, TraceContext, recording


def through_json(graph: Graph) -> Graph:
    return Graph.from_json(json.loads(json.dumps(graph.to_json(), allow_nan=False)))


def both_ways(graph: Graph) -> None:
    """Text and JSON give an equal graph, whose text is the same again."""
    text = str(graph)
    assert Graph.parse(text) == graph
    assert str(Graph.parse(text)) == text
    assert through_json(graph) == graph


def recorded(f, *shapes: tuple[int, ...], name: str = "g") -> Graph:
    ctx = TraceContext(name)
    with recording(ctx):
        x = [Tensor(ctx.add_input(f"x{i}", s, np.dtype("float32")), ctx) for i, s in enumerate(shapes)]
        out = f(*x)
    outputs = list(out) if isinstance(out, tuple) else [out]
    return Graph.build(name, ctx.inputs, [o.node for o in outputs], (), ctx.effects)


def test_how_it_looks() -> None:
    ctx = TraceContext("loss")
    with recording(ctx):
        x = Tensor(ctx.add_input("x", (8, 64), np.dtype("float32")), ctx)
        with tj.named_scope("block0"), tj.named_scope("scale"):
            y = x * 2
    graph = Graph.build("loss", ctx.inputs, [y.node], ["loss"])
    lines = str(graph).splitlines()
    assert lines[0] == "graph loss {"
    assert lines[1].startswith('  %0 = input {index=0, kind="argument"} : float32[8,64] name "x"')
    assert lines[2].startswith("  %1 = const {value=2.0, dtype=float32} : float32[] @")
    assert lines[3].startswith('  %2 = broadcast_to(%1) {shape=(8, 64)} : float32[8,64] @"')
    assert "  %3 = mul(%0, %2) : float32[8,64] @" in lines[4] and lines[4].endswith(' in "block0/scale"')
    assert lines[5] == '  return %3 as "loss"'
    assert lines[6] == "}"
    both_ways(graph)


@pytest.mark.parametrize("op", list(registry.all_ops()), ids=lambda op: op.name)
def test_every_op_in_the_table_goes_both_ways(op: Any) -> None:
    for arrays, attrs in op.samples():
        ctx = TraceContext("sample")
        inputs = [ctx.add_input(f"x{i}", a.shape, a.dtype) for i, a in enumerate(arrays)]
        both_ways(Graph.build("sample", ctx.inputs, [ctx.builder.add(op, inputs, attrs)]))


def test_a_whole_training_step_goes_both_ways() -> None:
    def loss(w, x):
        with tj.named_scope("layer"):
            return (np.tanh(x @ w) ** 2).mean()

    w, x = np.ones((3, 2), np.float32), np.ones((4, 3), np.float32)
    graph = tj.value_and_grad(loss).graph(w, x)
    assert any(n.grad_of is not None for n in graph)
    both_ways(graph)
    assert "grad_of %" in str(graph)


def test_control_flow_and_its_sub_graphs_go_both_ways() -> None:
    def f(x):
        carry, ys = tj.scan(lambda c, row: (c + row.sum(), np.sin(row)), np.float32(0), x)
        n, _ = tj.while_loop(lambda v: v[0] < 3, lambda v: (v[0] + 1, v[1] * 2), (0, carry))
        return tj.cond(carry > 0, lambda: ys.sum(), lambda: carry), n

    graph = recorded(f, (3, 4))
    both_ways(graph)
    assert str(graph).count("graph ") == 6  # the outer one, the scan's body, two of the loop, two branches
    x = np.ones((3, 4), np.float32)
    np.testing.assert_array_equal(interpret(Graph.parse(str(graph)), [x])[0], interpret(graph, [x])[0])


ODD = [
    "",
    " ",
    'a"b',
    "back\\slash",
    "new\nline",
    "tab\t",
    "é ∑ 🙂",
    "\u2028",
    "\x00\x1f",
    "\ud800",
    "%0",
    "graph",
    "nan",
    "}",
    "# no",
]


@pytest.mark.parametrize("name", ODD)
def test_odd_names(name: str) -> None:
    ctx = TraceContext(name)
    x = ctx.add_input(name, (2,), np.dtype("float32"))
    y = Node(registry.get("sin"), (x,), {}, (2,), np.dtype("float32"), source=name, scope=name, name=name)
    both_ways(Graph(name, (x, y), (x,), (y, x), (name, name + "!")))


VALUES: list[Any] = [
    None, True, False, 0, -7, 2**63, -(2**63), 10**30, 0.0, -0.0, 1.0, 1e16, 1e-320, 0.1, math.pi, math.inf, -math.inf,
    math.nan, "", 'quote " and \\', "line\nbreak", (), (1,), (1, (2.0, "x"), None), np.dtype("float16"), np.dtype("bool"),
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_attribute_values_in_text_are_exact(value: Any) -> None:
    text = graph_text._value_text(value, "")
    parser = graph_text._Parser(text)
    back = parser.value()
    assert type(back) is type(value)
    assert repr(back) == repr(value), "repr tells -0.0, nan, 1 and 1.0 apart"


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, -0.0, 5e-324, 1.0])
def test_constants_are_exact(value: float) -> None:
    graph = recorded(lambda x: x * np.float64(value), (2,))
    both_ways(graph)
    for again in (Graph.parse(str(graph)), through_json(graph)):
        (constant,) = (n.attrs["value"] for n in again if n.op.name == "const")
        assert repr(constant) == repr(value)


@pytest.mark.parametrize("dtype", ["bool", "int8", "uint64", "float16", "float64"])
@pytest.mark.parametrize("shape", [(), (3,), (2, 0), (2, 2)])
def test_literals(dtype: str, shape: tuple[int, ...]) -> None:
    array = np.arange(int(np.prod(shape))).reshape(shape).astype(dtype)
    ctx = TraceContext("g")
    node = ctx.builder.add("literal", (), {"value": ArrayLiteral(array)})
    graph = Graph.build("g", [], [node])
    both_ways(graph)
    np.testing.assert_array_equal(Graph.parse(str(graph)).outputs[0].attrs["value"].array, array)


def test_no_outputs_other_input_order_and_effects() -> None:
    graph = recorded(lambda x, y: x + y, (2,), (2,))
    swapped = Graph(graph.name, graph.nodes, graph.inputs[::-1], graph.outputs, graph.output_names)
    both_ways(swapped)
    assert Graph.parse(str(swapped)) != graph
    both_ways(Graph("nothing", graph.nodes[:2], graph.inputs, (), ()))

    def printing(x):
        tj.print("{}", x)
        return x * 2

    assert len(Graph.parse(str(recorded(printing, (2,)))).effects) == 1


def test_the_rule_of_a_custom_gradient_cannot_be_written() -> None:
    f = tj.custom_vjp(lambda x: x * 2)
    f.defvjp(lambda x: (x * 2, None), lambda _, g: (g,))
    graph = recorded(lambda x: f(x), (2,))
    for again in (Graph.parse(str(graph)), through_json(graph)):
        marker = next(n for n in again if n.op.name == "custom_vjp")
        assert isinstance(marker.attrs["rule"], graph_text.Opaque)
        np.testing.assert_array_equal(interpret(again, [np.ones(2, np.float32)])[0], [2, 2])
    assert str(Graph.parse(str(graph))) == str(graph)
    assert "opaque " in str(graph)


def test_comments_and_layout_do_not_matter() -> None:
    text = """
    # a comment
    graph "g" { %0=input{index=0,kind="argument"}:float32[2] # another
      %1 = sin ( %0 )
        : float32 [ 2 ] return %1 as "out" }
    """
    graph = Graph.parse(text)
    assert [n.op.name for n in graph] == ["input", "sin"]
    both_ways(graph)


# -- malformed input -------------------------------------------------------------------------------

GOOD = """graph g {
  %0 = input {index=0, kind="argument"} : float32[2,3]
  %1 = sum(%0) {axes=(1,)} : float32[2]
  %2 = exp(%1) : float32[2] grad_of %1
  return %2 as "out"
}"""


@pytest.mark.parametrize(
    ("before", "after", "line", "words"),
    [
        ("graph g", "graf g", 1, "expected 'graph'"),
        ("graph g {", "graph g", 2, "expected '{'"),
        ("sum(%0)", "summ(%0)", 3, "unknown op 'summ'"),
        ("sum(%0)", "sum(%0, %0)", 3, "takes 1 operands"),
        ("sum(%0)", "sum(%5)", 3, "comes later"),
        ("sum(%0)", "sum(%1)", 3, "comes later"),
        ("axes=(1,)", "axis=(1,)", 3, "attributes do not fit"),
        ("axes=(1,)", 'axes="x"', 3, ""),
        ("axes=(1,)", "axes=(1,), axes=(0,)", 3, "given twice"),
        ("axes=(1,)", "axes=(1", 3, "expected ','"),
        ("axes=(1,)", "axes=eval", 3, "unknown value 'eval'"),
        ("axes=(1,)", "axes=__import__", 3, "unknown value"),
        (": float32[2]\n", ": float32[3]\n", 3, "gives float32[2], not float32[3]"),
        (": float32[2]\n", ": float64[2]\n", 3, "gives float32[2], not float64[2]"),
        (": float32[2]\n", ": (float32[2])\n", 3, "gives"),
        (": float32[2]\n", ": complex64[2]\n", 3, "unknown dtype 'complex64'"),
        (": float32[2]\n", ": float32[-2]\n", 3, "absurd shape"),
        (": float32[2]\n", f": float32[{'9' * 39}]\n", 3, "absurd shape"),
        (": float32[2]\n", f": float32[{'9' * 50}]\n", 3, "cannot read"),
        ("grad_of %1", "grad_of %9", 1, "grad_of %9 is not a node"),
        ("%2 = exp", "%3 = exp", 4, "expected %2"),
        ("return %2", "return %7", 6, "%7 is not a node"),
        ('as "out"', "as out", 5, "the output's name"),
        ('as "out"', 'as "out', 5, "cannot read"),
        ('"argument"', '"\\q"', 2, "malformed string"),
        ("\n}", "", 5, "expected"),
        ("\n}", "\n} }", 6, "unexpected"),
        ("exp(%1)", "exp(%1) $", 4, "cannot read"),
        ('{index=0, kind="argument"}', "", 2, "attributes do not fit"),
    ],
)
def test_malformed_text_names_the_line(before: str, after: str, line: int, words: str) -> None:
    assert before in GOOD
    with pytest.raises(GraphError) as caught:
        Graph.parse(GOOD.replace(before, after, 1))
    message = str(caught.value)
    assert message.startswith(f"graph text, line {line}: "), message
    assert words in message


def test_every_truncation_and_many_corruptions_raise_graph_error_only() -> None:
    rng = stdlib_random.Random(0)
    for cut in range(len(GOOD)):
        with pytest.raises(GraphError):
            Graph.parse(GOOD[:cut])
    alphabet = GOOD + "@<>in\\0\x00é[](){}"
    for _ in range(2000):
        characters = list(GOOD)
        for _ in range(rng.randint(1, 4)):
            characters[rng.randrange(len(characters))] = rng.choice(alphabet)
        with contextlib.suppress(GraphError):
            Graph.parse("".join(characters)).verify()


def test_resource_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    deep = "(" * 5000 + ")" * 5000
    with pytest.raises(GraphError, match="nested more than"):
        Graph.parse(GOOD.replace("(1,)", deep))
    nested = "graph g { return }"
    for _ in range(40):
        nested = f"graph g {{ %0 = input {{index={nested}}} : float32[] return }}"
    with pytest.raises(GraphError, match="nested more than"):
        Graph.parse(nested)
    huge = 'graph g { %0 = literal {value=array<float64[1000000,1000000]>"AAAA"} : float64[1] return }'
    with pytest.raises(GraphError, match="has 3 bytes"):
        Graph.parse(huge)
    with pytest.raises(GraphError, match="array data"):
        Graph.parse('graph g { %0 = literal {value=array<float32[1]>"A?"} : float32[1] return }')
    with pytest.raises(GraphError, match="parsed from text"):
        Graph.parse(b"graph")  # type: ignore[arg-type]
    monkeypatch.setattr(graph_text, "MAX_TEXT", 10)
    with pytest.raises(GraphError, match="longer than 10"):
        Graph.parse(GOOD)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d.update(format="other"), "format"),
        (lambda d: d.update(version=2), "version 2"),
        (lambda d: d.update(version=True), "must be int"),
        (lambda d: d.pop("nodes"), "no 'nodes'"),
        (lambda d: d.update(nodes={}), "must be list"),
        (lambda d: d["nodes"].__setitem__(1, 5), r"graph\.nodes\[1\]"),
        (lambda d: d["nodes"][1].update(id=7), r"nodes\[1\]\.id"),
        (lambda d: d["nodes"][1].update(op="nope"), "unknown op"),
        (lambda d: d["nodes"][1].update(inputs=[1]), "not an earlier node"),
        (lambda d: d["nodes"][1].update(inputs=["0"]), "not an earlier node"),
        (lambda d: d["nodes"][1].update(shape=[5]), "gives float32"),
        (lambda d: d["nodes"][1].update(shape=[-1]), "absurd"),
        (lambda d: d["nodes"][1].update(dtype="object"), "unknown dtype"),
        (lambda d: d["nodes"][1].update(dtype=["float32"]), "unknown dtype"),
        (lambda d: d["nodes"][1].update(attrs={"axes": {"what": 1}}), "unknown value"),
        (lambda d: d["nodes"][1].update(attrs={"axes": {"float": []}}), "non-finite"),
        (lambda d: d["nodes"][2].update(grad_of=99), "not a node"),
        (lambda d: d["nodes"][2].update(scope=3), "scope must be str"),
        (lambda d: d.update(inputs=[2]), "inputs"),
        (lambda d: d["outputs"][0].update(node=9), "not a node"),
        (lambda d: d["outputs"].append(3), "must be an object"),
    ],
)
def test_malformed_json_names_the_place(change, words: str) -> None:
    data = Graph.parse(GOOD).to_json()
    change(data)
    with pytest.raises(GraphError, match=words):
        Graph.from_json(data)


def test_json_is_plain_and_as_documented() -> None:
    data = Graph.parse(GOOD).to_json()
    assert data["format"] == "tracejit-graph" and data["version"] == 1
    assert data["nodes"][1] == {
        "id": 1, "op": "sum", "inputs": [0], "attrs": {"axes": [1]}, "shape": [2], "dtype": "float32",
    }  # fmt: skip
    assert data["nodes"][2]["grad_of"] == 1
    assert data["inputs"] == [0] and data["outputs"] == [{"name": "out", "node": 2}]
    # A tool that writes 2.0 as 2 does no harm to a float constant.
    graph = recorded(lambda x: x * 2, (2,))
    data = json.loads(json.dumps(graph.to_json()).replace('"value": 2.0', '"value": 2'))
    assert Graph.from_json(data) == graph
