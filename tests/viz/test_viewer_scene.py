"""Scene and history: what is in which state at time t, what a click hits, which path connects two cards."""

from __future__ import annotations

import numpy as np
import pytest
import synth
from conftest import session_of

from tracejit_viz.fold import Choices
from tracejit_viz.history import KEEP_STEPS, LOSS_POINTS, STATS_WINDOW, Session, Step
from tracejit_viz.model import parse_graph
from tracejit_viz.scene import ACTIVE, DONE, PENDING, Scene


def tiny_session(recomputed: tuple[int, ...] = ()) -> Session:
    """x -> mul -> exp -> sum: kernel 7 covers mul and exp (100..200 ns), kernel 9 covers sum (300..450 ns)."""
    nodes = [
        {
            "id": 0,
            "op": "input",
            "inputs": [],
            "attrs": {},
            "shape": [4],
            "dtype": "float32",
            "scope": "",
            "name": "x",
        },
        {"id": 1, "op": "mul", "inputs": [0, 0], "attrs": {}, "shape": [4], "dtype": "float32", "scope": "a"},
        {"id": 2, "op": "exp", "inputs": [1], "attrs": {}, "shape": [4], "dtype": "float32", "scope": "a"},
        {"id": 3, "op": "sum", "inputs": [2], "attrs": {}, "shape": [], "dtype": "float32", "scope": "b"},
        {
            "id": 4,
            "op": "reshape",
            "inputs": [3],
            "attrs": {},
            "shape": [1],
            "dtype": "float32",
            "scope": "b",
        },
    ]
    kernels = [
        {"id": 7, "name": "mul_exp", "kind": "loop", "nodes": [1, 2], "bytes": 3200, "flops": 6400},
        {"id": 9, "name": "sum", "kind": "loop", "nodes": [*recomputed, 3], "bytes": 20, "flops": 4},
    ]
    graph = {
        "format": "tracejit-graph",
        "version": 1,
        "name": "tiny",
        "nodes": nodes,
        "outputs": [{"name": "", "node": 4}],
    }
    return Session(
        {"program": 1, "name": "tiny", "device": "cpu", "graph": graph, "kernels": kernels, "ops": {}}
    )


def step(number: int = 0, duration: int = 500, begin: int = 0, scale: float = 1.0, **extra) -> Step:
    times = (np.array([100, 300]) * scale).astype(np.int64), (np.array([200, 450]) * scale).astype(np.int64)
    return Step(
        number,
        np.array([7, 9], np.uint32),
        *times,
        np.array([64, 4]),
        np.zeros(2, np.uint8),
        int(duration * scale),
        begin,
        **extra,
    )


def states(scene: Scene, t: float) -> dict[str, int]:
    m = scene.moment(t)
    return {scene.items[i].label: int(m.state[i]) for i in scene.shown}


def test_state_follows_the_kernels():
    s = tiny_session()
    s.add_step(step())
    scene = Scene(s)
    scene.use_step(s.last)
    assert states(scene, 0) == {
        "x": PENDING,
        "mul": PENDING,
        "exp": PENDING,
        "sum": PENDING,
        "reshape": PENDING,
    }
    assert states(scene, 150) == {"x": DONE, "mul": ACTIVE, "exp": ACTIVE, "sum": PENDING, "reshape": PENDING}
    assert states(scene, 250)["exp"] == DONE
    assert states(scene, 300)["sum"] == ACTIVE
    assert states(scene, 449.9)["reshape"] == PENDING
    assert states(scene, 450) == dict.fromkeys(("x", "mul", "exp", "sum", "reshape"), DONE)


def test_nodes_without_a_kernel_are_ready_with_what_they_read():
    """A view is ready with its source; an input lights up with the first kernel that reads it."""
    s = tiny_session()
    s.add_step(step())
    start, end = s.node_times(s.last)
    assert (start[0], end[0]) == (100.0, 100.0)
    assert (start[4], end[4]) == (450.0, 450.0)


def test_a_node_that_two_kernels_compute_ran_in_the_first():
    """Cheap nodes are recomputed where they are used, in the gradient too: they do not run all the time between."""
    s = tiny_session(recomputed=(1,))
    s.add_step(step())
    start, end = s.node_times(s.last)
    assert (start[1], end[1]) == (100.0, 200.0)
    assert (start[3], end[3]) == (300.0, 450.0)


def test_without_steps_everything_counts_as_done():
    scene = Scene(tiny_session())
    assert set(states(scene, 0).values()) == {DONE}


def test_a_nan_step_stops_at_the_bad_node():
    s = tiny_session()
    none = np.zeros(0, np.int64)
    s.add_step(Step(3, none.astype(np.uint32), none, none, none, none.astype(np.uint8), 0, nan_node=2))
    scene = Scene(s)
    scene.use_step(s.last)
    now = states(scene, 0)
    assert now["mul"] == DONE and now["exp"] == now["sum"] == PENDING


def test_a_folded_card_runs_whenever_one_of_its_blocks_does(small_session):
    from test_viewer_fold import blocks

    event = synth.compile_event(blocks(4, 60))
    s = session_of(event, steps=1)
    scene = Scene(s, Choices(fold_repeats=True, collapse=False))
    scene.use_step(s.last)
    card = next(it for it in scene.items if it.copies == 4 and it.label == "tanh")
    begins = sorted(scene.node_start[v] for v in card.nodes)
    assert len(set(begins)) == 4
    for t in begins:
        assert scene.moment(t + 1).state[card.index] == ACTIVE
    assert scene.moment(begins[0] - 1).state[card.index] == PENDING
    between = scene.moment(scene.node_end[min(card.nodes)] + 1)
    assert between.state[card.index] == DONE and between.fraction[card.index] == pytest.approx(0.25)


def test_picking_and_paths(grad_session):
    scene = Scene(grad_session)
    for i in scene.shown[::7]:
        x, y, w, h = scene.rects[i]
        assert scene.at(x + w / 2, y + h / 2) == i
    assert scene.at(-500, -500) is None
    a, b = next(iter(scene.page.paths))
    assert scene.between(a, b) == scene.between(b, a) >= {a, b}
    assert a in scene.ancestors(b) and b in scene.descendants(a)
    assert a not in scene.descendants(b)


def test_gradient_partners_are_mutual(grad_session):
    scene = Scene(grad_session)
    linked = [i for i in scene.shown if scene.partners(int(i))]
    assert len(linked) > 40
    for i in linked[:30]:
        for j in scene.partners(int(i)):
            assert int(i) in scene.partners(j)
            assert {scene.items[i].phase, scene.items[j].phase} == {"forward", "gradient"}


@pytest.mark.parametrize(
    ("query", "check"),
    [
        ("matmul", lambda it, n: it.label == "matmul"),
        ("mlp dot_general", lambda it, n: "mlp" in n.scope and n.op == "dot_general"),
        ("2x64x128", lambda it, n: n.shape == (2, 64, 128)),
        ("gradient exp", lambda it, n: n.phase == "gradient" and "exp" in n.op),
        ("int32", lambda it, n: n.dtype == "int32"),
    ],
)
@pytest.mark.parametrize("collapse", [None, False])
def test_search(grad_session, query, check, collapse):
    """A card is found when one of its nodes matches every word, however much it stands for."""
    scene = Scene(grad_session, Choices(collapse=collapse))
    found = scene.search(query)
    nodes = scene.model.nodes
    assert all(any(check(scene.items[i], nodes[v]) for v in scene.items[i].nodes) for i in found)
    assert found or query in ("gradient exp", "matmul")


def test_search_for_nothing_finds_nothing(grad_session):
    scene = Scene(grad_session)
    assert scene.search("") == [] and scene.search("no_such_op") == []


def test_closing_a_scope_and_opening_it_again_restores_the_page(small_session):
    scene = Scene(small_session, Choices(collapse=False))
    before = dict(scene.page.items)
    group = next(g for g in sorted(scene.arrangement.collapsible) if g[0] == "forward")
    scene.choices.closed.add(group)
    scene.rebuild()
    assert len(scene.items) < len(before)
    scene.choices.closed.clear()
    scene.rebuild()
    assert scene.page.items == before


def test_show_only_one_side(grad_session):
    for show, phases in (
        ("forward", {"forward"}),
        ("gradient", {"gradient"}),
        ("both", {"forward", "gradient"}),
    ):
        scene = Scene(grad_session, show=show)
        assert {scene.items[i].phase for i in scene.shown} == phases


def test_timing_statistics():
    s = tiny_session()
    for k in range(10):
        s.add_step(step(k, begin=k * 1000, scale=1.0 if k < 9 else 2.0))
    t = s.timing(s.slots_of([1]))
    assert t is not None
    assert t.last == pytest.approx(200e-9) and t.mean == pytest.approx(110e-9) and t.samples == 10
    assert t.p95 == pytest.approx(np.percentile([100e-9] * 9 + [200e-9], 95))
    assert t.share == pytest.approx(0.2)
    assert t.flops_rate == pytest.approx(6400 / 110e-9) and t.bytes_rate == pytest.approx(3200 / 110e-9)
    assert s.timing([]) is None
    assert tiny_session().timing([0]) is None
    assert s.rate == pytest.approx(1e6, rel=0.01)


def test_history_is_bounded_and_keeps_the_newest():
    """An hour of steps: few full records, a loss curve that still spans everything."""
    s = tiny_session()
    n = 20_000
    for k in range(n):
        s.add_step(step(k, begin=k * 1000, loss=float(n - k)))
    assert len(s.steps) <= KEEP_STEPS and s.steps[-1].step == n - 1
    assert len(s.loss) <= LOSS_POINTS + 1
    assert s.loss[0] == n and s.loss[-1] == 1.0
    assert s.loss_steps == sorted(s.loss_steps)
    assert s.window.shape[0] == STATS_WINDOW
    assert s.total_steps == n


def test_heat_and_cell_times_add_up(grad_session):
    scene = Scene(grad_session)
    seconds = scene.item_seconds()
    assert seconds.sum() == pytest.approx(np.nansum(grad_session.mean_kernel_ns()) * 1e-9, rel=1e-6)
    cells = sum(scene.cell_seconds(seconds, c.items) for c in scene.page.cells)
    assert cells == pytest.approx(seconds.sum(), rel=1e-6)


def test_wires_reach_from_card_to_card(grad_session):
    scene = Scene(grad_session)
    for (a, b), _ in list(scene.page.paths.items())[::5]:
        line = scene.edge_path((a, b))
        for end, item in ((line[0], a), (line[-1], b)):
            x, y, w, h = scene.rects[item]
            assert x - 1 <= end[0] <= x + w + 1 and y - 1 <= end[1] <= y + h + 1


def test_facts_explain_from_the_op_table(grad_session):
    """The inspector's words come from the compile event's op table, not from the viewer."""
    from tracejit_viz.describe import describe_item, program_facts

    scene = Scene(grad_session)
    i = next(int(i) for i in scene.shown if scene.items[i].label == "exp")
    facts = describe_item(scene, i, grad_session.last)
    assert facts.meaning == synth.OPS["exp"]["meaning"] and facts.formula == synth.OPS["exp"]["formula"]
    assert ("gradient", synth.OPS["exp"]["grad_rule"]) in facts.rules
    assert dict(facts.tensor)["shape"].startswith("(2, ")
    assert dict(facts.timing)["mean / p95"]
    program = program_facts(scene, grad_session.last)
    assert dict(program.rows)["nodes"] == "339" and len(program.hottest) == 6


def test_unknown_ops_and_categories_are_shown_plainly():
    doc = {"nodes": [{"op": "frobnicate", "inputs": [], "shape": [2]}, {"op": "zap", "inputs": [0]}]}
    model = parse_graph(doc, {"zap": {"category": "no such category"}})
    assert model.nodes[1].category == "no such category"
    assert len(Scene(Session({"graph": doc})).shown) == 2
