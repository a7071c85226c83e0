"""Layout invariants over random scoped graphs and traced ones: nothing overlaps, edges follow the flow, all is inside."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
import synth
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tracejit_viz.fold import Choices, arrange
from tracejit_viz.layout.columns import choose_columns
from tracejit_viz.layout.compound import LayoutCache, compound
from tracejit_viz.layout.layered import layered
from tracejit_viz.layout.score import Page, layout_page
from tracejit_viz.model import parse_graph

SLACK = 0.6  # page units; sizes are rounded


def overlap(a, b) -> bool:
    return (
        a[0] + SLACK < b[0] + b[2]
        and b[0] + SLACK < a[0] + a[2]
        and a[1] + SLACK < b[1] + b[3]
        and b[1] + SLACK < a[1] + a[3]
    )


def inside(inner, outer) -> bool:
    return (
        inner[0] >= outer[0] - SLACK
        and inner[1] >= outer[1] - SLACK
        and inner[0] + inner[2] <= outer[0] + outer[2] + SLACK
        and inner[1] + inner[3] <= outer[1] + outer[3] + SLACK
    )


def any_overlap(rects: list) -> tuple | None:
    """Sweep over x: the first overlapping pair."""
    rects = sorted(rects)
    for i, a in enumerate(rects):
        for b in rects[i + 1 :]:
            if b[0] >= a[0] + a[2]:
                break
            if overlap(a, b):
                return a, b
    return None


def check_page(page: Page, items) -> None:
    """Every invariant the drawing relies on."""
    assert any_overlap(list(page.items.values())) is None, "cards overlap"
    assert any_overlap([c.rect for c in page.cells]) is None, "cells overlap"
    cell_of = {i: c for c in page.cells for i in c.items}
    assert set(cell_of) == set(page.items)
    for i, rect in page.items.items():
        assert inside(rect, cell_of[i].rect), f"card {i} leaves its cell"
        assert cell_of[i].phase == items[i].phase
    for (phase, path), rect in page.groups.items():
        for i, r in page.items.items():
            if items[i].phase != phase:
                continue
            belongs = items[i].path[: len(path)] == path
            column = page.column_of[i]
            if belongs and (phase == "optimizer" or column == path[: len(column)]):
                assert inside(r, rect), f"card {i} leaves its scope {path}"
            elif not belongs and items[i].kind == "node":
                assert not overlap(r, rect), f"scope {path} covers card {i} of {items[i].path}"
    for stave in page.staves:
        for cell in page.cells:
            if cell.phase != stave.phase and overlap(cell.rect, stave.rect):
                pytest.fail(f"a {cell.phase} cell lies in the {stave.phase} stave")
    for (a, b), path in page.paths.items():
        assert path, (a, b)
        first, last = page.wires[path[0]].points[0], page.wires[path[-1]].points[-1]
        assert touches(first, page.items[a]) and touches(last, page.items[b]), (
            "an edge does not reach its cards"
        )
        for w, v in pairwise(path):
            p, q = page.wires[w].points[-1], page.wires[v].points[0]
            assert abs(p[0] - q[0]) < SLACK and abs(p[1] - q[1]) < SLACK, (
                "pieces of an edge do not join at the rim"
            )


def touches(point, rect) -> bool:
    x, y = point[:2]
    grown = (rect[0] - SLACK, rect[1] - SLACK, rect[2] + 2 * SLACK, rect[3] + 2 * SLACK)
    return grown[0] <= x <= grown[0] + grown[2] and grown[1] <= y <= grown[1] + grown[3]


# -- one level -------------------------------------------------------------------------------------------------------
@st.composite
def digraphs(draw):
    n = draw(st.integers(1, 24))
    pairs = st.tuples(st.integers(0, n - 1), st.integers(0, n - 1))
    edges = draw(st.lists(pairs, max_size=40))
    sizes = draw(st.lists(st.tuples(st.integers(10, 160), st.integers(10, 60)), min_size=n, max_size=n))
    return sizes, edges


@given(digraphs())
@settings(max_examples=40, deadline=None)
def test_layered_never_overlaps_and_covers_every_edge(graph):
    sizes, edges = graph
    plan = layered([w for w, _ in sizes], [h for _, h in sizes], edges)
    rects = [(x - w / 2, y - h / 2, w, h) for x, y, (w, h) in zip(plan.x, plan.y, sizes)]
    assert any_overlap(rects) is None
    assert set(plan.bends) == {e for e in edges if e[0] != e[1]}
    assert all(r[0] >= -SLACK and r[0] + r[2] <= plan.width + SLACK for r in rects)
    assert all(r[1] >= -SLACK and r[1] + r[3] <= plan.height + SLACK for r in rects)


@given(digraphs())
@settings(max_examples=40, deadline=None)
def test_layered_edges_of_an_acyclic_graph_point_down(graph):
    sizes, edges = graph
    dag = [(min(e), max(e)) for e in edges if e[0] != e[1]]
    plan = layered([w for w, _ in sizes], [h for _, h in sizes], dag)
    for s, d in dag:
        assert plan.y[s] + sizes[s][1] / 2 <= plan.y[d] - sizes[d][1] / 2
        assert plan.rank[s] < plan.rank[d]
        ys = [y for _, y in plan.bends[s, d]]
        assert ys == sorted(ys)


def test_layered_keeps_ports_at_the_rim():
    plan = layered([8, 100, 100, 8], [0, 40, 40, 0], [(0, 1), (1, 2), (1, 3)], first=[0], last=[3])
    assert plan.y[0] < min(plan.y[1], plan.y[2]) and plan.y[3] > max(plan.y[1], plan.y[2])


def test_layered_uncrosses_what_can_be_uncrossed():
    edges = [(0, 5), (1, 4), (2, 3)]  # three edges drawn crossed in index order
    plan = layered([50] * 6, [20] * 6, edges)
    assert plan.crossings == 0
    assert (
        sorted(range(3), key=lambda v: plan.x[v])
        == [5 - v for v in sorted(range(3, 6), key=lambda v: plan.x[v])][::1]
    )


# -- nested scopes ---------------------------------------------------------------------------------------------------
@given(st.integers(0, 10_000))
@settings(max_examples=20, deadline=None)
def test_compound_nests_and_joins(seed):
    rng = random.Random(seed)
    n = rng.randint(1, 40)
    scopes = {i: tuple(rng.choice(("a", "b", "c")) for _ in range(rng.randint(0, 3))) for i in range(n)}
    sizes = {i: (rng.randint(40, 140), rng.randint(20, 44)) for i in range(n)}
    edges = [(rng.randrange(i), i) for i in range(1, n) for _ in range(rng.randint(0, 2))]
    for mirrored in (False, True):
        out = compound(scopes, sizes, edges, mirrored=mirrored)
        assert any_overlap(list(out.items.values())) is None
        for i, r in out.items.items():
            for path, g in out.groups.items():
                if scopes[i][: len(path)] == path:
                    assert inside(r, g)
                else:
                    assert not overlap(r, g)
        for e in set(edges):
            path = out.paths[e]
            assert touches(out.wires[path[0]].points[0], out.items[e[0]])
            assert touches(out.wires[path[-1]].points[-1], out.items[e[1]])
            for w, v in pairwise(path):
                assert out.wires[w].points[-1][:2] == pytest.approx(out.wires[v].points[0][:2], abs=SLACK)


def test_equal_scopes_are_laid_out_once():
    """Twelve equal blocks cost one layout; closing one scope re-lays out only what contains it."""
    scopes, sizes, edges = {}, {}, []
    for b in range(12):
        for k in range(6):
            scopes[6 * b + k] = (f"block{b}", "inner")
            sizes[6 * b + k] = (100.0, 40.0)
            if k:
                edges.append((6 * b + k - 1, 6 * b + k))
    cache = LayoutCache()
    compound(scopes, sizes, edges, cache=cache)
    assert cache.misses == 3  # inner, block, page
    compound(scopes, sizes, edges, cache=cache)
    assert cache.misses == 3
    del scopes[71], sizes[71]
    compound(scopes, sizes, [e for e in edges if 71 not in e], cache=cache)
    assert (
        cache.misses == 6
    )  # the changed block, its inside and the page: the other eleven come from the cache


# -- the page --------------------------------------------------------------------------------------------------------
@given(st.integers(0, 10_000), st.integers(1, 4), st.integers(1, 10), st.booleans())
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_page_of_random_programs(seed, blocks, per_block, train):
    model = parse_graph(synth.random_graph(seed, blocks, per_block, train))
    for choices in (
        Choices(),
        Choices(collapse=False, fold_repeats=False),
        Choices(collapse=True, fold_repeats=True),
    ):
        a = arrange(model, choices)
        page = layout_page(a.items, list(a.edges))
        assert set(page.items) == {i.index for i in a.items}
        assert set(page.paths) == set(a.edges)
        check_page(page, a.items)


@pytest.mark.parametrize("name", ["grad_step", "train_step"])
@pytest.mark.parametrize("unfold", [False, True])
def test_page_of_traced_models(name, unfold):
    model = parse_graph(synth.load(name))
    choices = Choices(collapse=False, fold_repeats=False) if unfold else Choices()
    a = arrange(model, choices)
    page = layout_page(a.items, list(a.edges))
    check_page(page, a.items)
    aspect = page.width / page.height
    assert 1.0 < aspect < 3.4, "the page should suit a wide window"


def test_page_edges_follow_their_stave():
    """Inside a cell edges go down, or right (forward), or left (gradient)."""
    model = parse_graph(synth.load("grad_step"))
    a = arrange(model, Choices(collapse=False))
    page = layout_page(a.items, list(a.edges))
    for (s, d), path in page.paths.items():
        wires = [page.wires[w] for w in path]
        if any(w.cross for w in wires):
            continue
        for w in wires:
            (x0, y0, _, _), (x1, y1, _, _) = w.points[0], w.points[-1]
            right = x1 > x0 if w.phase == "forward" else x1 < x0
            assert y1 > y0 - SLACK or right, (a.items[s].label, a.items[d].label)


def test_layout_is_deterministic():
    def run():
        model = parse_graph(synth.random_graph(11, 4, 12))
        a = arrange(model)
        page = layout_page(a.items, list(a.edges), cache=LayoutCache())
        return page.items, page.groups, [w.points for w in page.wires]

    assert run() == run()


def test_columns_open_the_dominant_scope():
    paths = [("embed",)] * 3 + [("block", "attn")] * 20 + [("block", "mlp")] * 20 + [("head",)] * 3
    assert choose_columns(paths) == [("embed",), ("block", "attn"), ("block", "mlp"), ("head",)]


def test_empty_page_and_hidden_phases():
    assert layout_page([], []).items == {}
    a = arrange(parse_graph(synth.random_graph(5)))
    page = layout_page(a.items, list(a.edges), phases=("forward",))
    assert {c.phase for c in page.cells} == {"forward"}
    check_page(page, a.items)


@pytest.mark.parametrize("n", [1, 2, 400, 20_000])
def test_graphs_of_every_size_lay_out(n):
    """One node, and twenty thousand without any scope: cut into numbered parts, still an honest page."""
    model = parse_graph(synth.chain_graph(n))
    a = arrange(model)
    page = layout_page(a.items, list(a.edges))
    assert len(page.items) == len(a.items)
    assert any_overlap(list(page.items.values())) is None
    if n == 20_000:
        assert len(page.cells) > 20


def test_the_gradient_alone_still_flows_right_to_left():
    model = parse_graph(synth.load("grad_step"))
    a = arrange(model)
    page = layout_page(a.items, list(a.edges), phases=("gradient", "optimizer"))
    cell = {i: c for c in page.cells for i in c.items}
    left = right = 0
    for s, d in a.edges:
        if (
            s in cell
            and d in cell
            and cell[s] is not cell[d]
            and cell[s].phase == cell[d].phase == "gradient"
        ):
            stacked = abs(cell[s].rect[0] - cell[d].rect[0]) < 1
            left += not stacked and cell[d].rect[0] < cell[s].rect[0]
            right += not stacked and cell[d].rect[0] > cell[s].rect[0]
    assert left > 4 * right


def test_updates_of_a_family_and_shared_scalars_do_not_overlap():
    """The first column is a part of ``block0``, whose updates lie below all its columns; so do the shared scalars then."""
    nodes = []

    def add(op, inputs, scope, **extra):
        nodes.append(
            {
                "id": len(nodes),
                "op": op,
                "inputs": inputs,
                "attrs": {},
                "shape": [8],
                "dtype": "float32",
                "scope": scope,
            }
            | extra
        )
        return len(nodes) - 1

    x = add("input", [], "", name="x")
    params = []
    for part in ("norm1", "attn", "norm2", "mlp"):
        for k in range(6):
            p = add("input", [], "", name=f"params.{part}.w{k}")
            params.append(p)
            x = add("mul", [x, p], f"block0/{part}")
    loss = add("sum", [x], "loss", shape=[])
    rate = add("mul", [loss, loss], "optimizer/schedule", shape=[])
    for p in params:
        g = add("mul", [p, x], nodes[x]["scope"], grad_of=x)
        add("sub", [p, add("mul", [g, rate], "optimizer")], "optimizer")
    model = parse_graph(
        {"format": "tracejit-graph", "version": 1, "name": "t", "nodes": nodes, "outputs": []}
    )
    for budget in (30, 80, 200):
        a = arrange(model, budget=budget)
        page = layout_page(a.items, list(a.edges))
        check_page(page, a.items)
        assert len({c.column for c in page.cells if c.phase == "optimizer"}) <= 2
