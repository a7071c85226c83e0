"""What becomes a card: repeats folded, composites collapsed, calls told apart, constants beside their users."""

from __future__ import annotations

import pytest
import synth

from tracejit_viz.errors import GraphFormatError
from tracejit_viz.fold import Choices, arrange
from tracejit_viz.model import parse_graph


def graph(*rows, outputs=()):
    """Rows of (op, inputs, scope, extra)."""
    nodes = []
    for i, (op, inputs, scope, *extra) in enumerate(rows):
        node = {
            "id": i,
            "op": op,
            "inputs": inputs,
            "attrs": {},
            "shape": [4],
            "dtype": "float32",
            "scope": scope,
        }
        node.update(*extra)
        nodes.append(node)
    return {
        "format": "tracejit-graph",
        "version": 1,
        "name": "t",
        "nodes": nodes,
        "outputs": [{"name": "", "node": k} for k in outputs],
    }


def blocks(n: int, size: int = 60):
    """A chain of equal blocks, each with a parameter and ``size`` nodes."""
    rows = [("input", [], "", {"name": "x"})]
    last = 0
    for b in range(n):
        rows.append(("input", [], "", {"name": f"params.blocks[{b}].w"}))
        rows.append(("mul", [last, len(rows) - 1], f"block{b}/mlp"))
        for k in range(size):
            rows.append((("add", "exp", "tanh")[k % 3], [len(rows) - 1], f"block{b}/mlp"))
        last = len(rows) - 1
    return graph(*rows)


def test_every_node_has_a_card():
    for name in ("grad_step", "train_step"):
        model = parse_graph(synth.load(name))
        for choices in (Choices(), Choices(collapse=False, fold_repeats=False)):
            a = arrange(model, choices)
            assert min(a.item_of) >= 0
            shown = {v for it in a.items for v in it.nodes}
            assert shown == set(range(len(model.nodes)))


def test_repeated_blocks_fold_into_one():
    a = arrange(parse_graph(blocks(6)), Choices(collapse=False))
    assert [f.key for f in a.folds.values()] == [("block × 6",)]
    tanh = [it for it in a.items if it.label == "tanh"]
    assert tanh and all(it.copies == 6 for it in tanh)
    weights = [it for it in a.items if it.category == "parameter"]
    assert len(weights) == 1 and weights[0].copies == 6


def test_blocks_that_differ_are_not_folded():
    doc = blocks(4)
    for n in doc["nodes"]:
        if n["scope"].startswith("block2") and n["op"] == "exp":
            n["op"] = "sin"
        if n["scope"].startswith("block3") and n["op"] == "exp":
            n["op"] = "cos"
    assert arrange(parse_graph(doc), Choices(fold_repeats=True)).folds == {}


def test_a_block_with_a_few_nodes_more_still_folds():
    """Shared subexpressions live in the first block only; they must not keep it out of the fold."""
    doc = blocks(4, 40)
    first = next(n for n in doc["nodes"] if n["scope"] == "block0/mlp" and n["op"] == "add")
    first["op"] = "neg"
    a = arrange(parse_graph(doc), Choices(fold_repeats=True, collapse=False))
    assert [f.key for f in a.folds.values()] == [("block × 4",)]
    assert any(it.label == "neg" and it.copies == 1 for it in a.items)


def test_small_models_are_not_folded():
    assert arrange(parse_graph(blocks(3, 10))).folds == {}


def test_composites_collapse_and_open():
    doc = blocks(1, 50)
    for n in doc["nodes"][5:12]:
        n["scope"] = "block0/mlp/gelu"
    model = parse_graph(doc)
    a = arrange(model)
    card = next(it for it in a.items if it.kind == "group")
    assert (card.label, len(card.nodes), card.category) == ("gelu", 7, "activation")
    opened = arrange(model, Choices(opened={("forward", card.group)}))
    assert not any(it.kind == "group" for it in opened.items)
    assert ("forward", ("block0", "mlp", "gelu")) in opened.collapsible


def test_two_calls_of_one_scope_are_told_apart():
    doc = graph(
        ("input", [], "", {"name": "x"}),
        ("dot_general", [0], "linear"),
        ("add", [1], "linear"),
        ("maximum", [2], "relu"),
        ("dot_general", [3], "linear"),
        ("add", [4], "linear"),
        ("mul", [5], "linear", {"grad_of": 4}),
    )
    a = arrange(parse_graph(doc))
    assert [a.items[a.item_of[v]].path for v in (1, 2, 3, 4, 5, 6)] == [
        ("linear",),
        ("linear",),
        ("relu",),
        ("linear #2",),
        ("linear #2",),
        ("linear #2",),
    ]


def test_constants_stand_beside_each_user():
    """One hash-consed 0.5, broadcast, used in two scopes: two hexagons, no line across the page."""
    doc = graph(
        ("input", [], "", {"name": "x"}),
        ("const", [], "", {"attrs": {"value": 0.5}, "shape": []}),
        ("broadcast_to", [1], ""),
        ("mul", [0, 2], "a"),
        ("mul", [3, 2], "b"),
    )
    a = arrange(parse_graph(doc))
    halves = [it for it in a.items if it.label == "0.5"]
    assert len(halves) == 2 and {it.path for it in halves} == {("a",), ("b",)}
    assert all(it.category == "constant" for it in halves)
    assert min(a.item_of) >= 0


def test_optimizer_nodes_are_grouped_by_parameter():
    """At first one card per layer; opened, one scope per parameter under the layer that uses it."""
    model = parse_graph(synth.load("train_step"))
    updates = [it for it in arrange(model).items if it.phase == "optimizer" and it.kind == "group"]
    layer = next(it for it in updates if it.group == ("layer × 4",))
    assert layer.label == "update" and "tensors" in layer.detail
    opened = arrange(model, Choices(collapse=False))
    paths = {it.path for it in opened.items if it.phase == "optimizer"}
    assert len([p for p in paths if p[:1] == ("layer × 4",)]) > 10
    assert any(p[-1].endswith("wo") for p in paths) and any(p[-1].endswith("w1") for p in paths)


def test_updates_of_tensors_of_one_shape_stay_apart():
    """The learning rate, broadcast to their common shape, is shared by both updates and belongs to neither."""
    doc = graph(
        ("input", [], "", {"name": "params.a.w"}),
        ("input", [], "", {"name": "params.b.w"}),
        ("input", [], "", {"name": "state.lr", "shape": []}),
        ("mul", [0, 1], "a"),
        ("mul", [3, 1], "b"),
        ("mul", [4, 4], "b", {"grad_of": 4}),
        ("mul", [2, 2], "optimizer/schedule", {"shape": []}),
        ("broadcast_to", [6], "optimizer"),
        ("mul", [5, 7], "optimizer"),
        ("sub", [0, 8], "optimizer"),
        ("mul", [3, 7], "optimizer"),
        ("sub", [1, 10], "optimizer"),
    )
    a = arrange(parse_graph(doc), Choices(collapse=False))
    path = [a.items[a.item_of[v]].path for v in (6, 9, 11)]
    assert path == [("schedule",), ("a", "w"), ("a", "w (2)")] or path[1] != path[2]
    assert path[0] == ("schedule",)


def test_phases_and_gradient_links():
    model = parse_graph(synth.random_graph(7, 2, 8))
    counts = model.counts()
    assert counts["forward"] > 10 and counts["gradient"] > 5
    assert model.loss is not None and model.nodes[model.loss].category == "loss"
    for f, gs in model.gradient_of.items():
        assert model.nodes[f].phase == "forward" and all(model.nodes[g].grad_of == f for g in gs)


@pytest.mark.parametrize(
    ("doc", "words"),
    [
        ([], "not a graph document"),
        ({"nodes": 3}, "not a graph document"),
        ({"format": "onnx", "nodes": []}, "format is 'onnx'"),
        ({"version": 9, "nodes": []}, "version 9"),
        ({"nodes": [{"op": "add", "inputs": [4]}]}, "node 0 (add): input 4"),
        ({"nodes": [{"inputs": []}]}, 'node 0: expected an object with an "op"'),
        ({"nodes": [{"op": "add", "id": 3}]}, "id is 3"),
        ({"nodes": [{"op": "add", "shape": "4x4"}]}, "shape must be a list"),
        ({"nodes": [{"op": "input"}], "outputs": [{"node": 7}]}, "output 0 refers to node 7"),
    ],
)
def test_bad_graphs_say_what_is_wrong(doc, words):
    with pytest.raises(GraphFormatError, match=words.replace("(", r"\(").replace(")", r"\)")):
        parse_graph(doc)


# -- how much is shown at once -----------------------------------------------------------------------------------------
def cards(a) -> int:
    return sum(1 for it in a.items if it.category != "constant")


@pytest.mark.parametrize("budget", [24, 60, 140, 400])
def test_a_page_starts_with_about_as_many_cards_as_it_has_room_for(budget):
    model = parse_graph(synth.load("train_step"))
    least = cards(arrange(model, budget=1))
    assert cards(arrange(model, budget=budget)) <= max(1.35 * budget, least)


def test_more_room_opens_more():
    model = parse_graph(synth.load("grad_step"))
    counts = [cards(arrange(model, budget=b)) for b in (10, 40, 120, 500)]
    assert counts == sorted(counts) and counts[-1] > 3 * counts[0]


def test_equal_blocks_open_together_forward_and_gradient():
    model = parse_graph(synth.load("grad_step"))
    for budget in (30, 60, 90):
        a = arrange(model, Choices(fold_repeats=False), budget=budget)
        closed = {(it.phase, it.group) for it in a.items if it.kind == "group"}
        for phase, path in closed:
            twin = ("gradient" if phase == "forward" else "forward", path)
            if phase != "optimizer" and twin in a.collapsible:
                assert twin in closed, (budget, path)


def test_a_scope_of_many_parameters_stands_for_them():
    rows = [("input", [], "", {"name": "x"})]
    for k in range(6):
        rows += [("input", [], "", {"name": f"params.w{k}"}), ("mul", [len(rows) - 1, len(rows)], "block")]
    model = parse_graph(graph(*rows))
    shut = arrange(model, Choices(closed={("forward", ("block",))}))
    assert [it.label for it in shut.items] == ["block", "x"]
    assert min(shut.item_of) >= 0
    assert len(arrange(model).items) == 13
