"""The viewer with real traced programs on the NumPy backend: events, recordings, values, NaN, a graph of its own."""

from __future__ import annotations

import io
import time
import warnings

import numpy as np
import pygame
import pytest
from test_viewer_layout import check_page
from test_viewer_live import pump

import tracejit as tj
from tracejit import nn, optim
from tracejit.errors import TraceError
from tracejit_viz import place, viewer
from tracejit_viz.client import LiveObserver
from tracejit_viz.export import Shot, Stage
from tracejit_viz.fold import Choices
from tracejit_viz.history import Session
from tracejit_viz.hub import Hub
from tracejit_viz.recording import load_recording
from tracejit_viz.scene import DONE, Scene

WIDTH, VOCAB, LENGTH = 32, 40, 12


@pytest.fixture(autouse=True)
def numpy_device(monkeypatch):
    with tj.device("numpy"):
        yield


def mlp():
    rng = np.random.default_rng(0)
    model = {"up": nn.Linear(20, 16, rng=rng), "down": nn.Linear(16, 5, rng=rng)}

    def loss_fn(m, x, y):
        return nn.cross_entropy(m["down"](nn.relu(m["up"](x))), y)

    return model, loss_fn, (rng.normal(size=(8, 20)).astype(np.float32), rng.integers(0, 5, 8))


def cnn():
    rng = np.random.default_rng(0)
    model = {"conv": nn.Conv2d(1, 4, 3, rng=rng), "head": nn.Linear(4 * 5 * 5, 3, rng=rng)}

    def loss_fn(m, x, y):
        h = nn.max_pool2d(nn.relu(m["conv"](x)), 2)
        return nn.cross_entropy(m["head"](h.reshape(x.shape[0], -1)), y)

    return model, loss_fn, (rng.normal(size=(2, 1, 12, 12)).astype(np.float32), rng.integers(0, 3, 2))


def transformer(layers: int = 4):
    rng = np.random.default_rng(0)
    model = {
        "embed": nn.Embedding(VOCAB, WIDTH, rng=rng),
        "blocks": [nn.TransformerBlock(WIDTH, 4, rng=rng) for _ in range(layers)],
        "norm": nn.LayerNorm(WIDTH),
        "head": nn.Linear(WIDTH, VOCAB, rng=rng),
    }

    def loss_fn(m, x, y):
        h = m["embed"](x)
        for block in m["blocks"]:
            h = block(h)
        return nn.cross_entropy(m["head"](m["norm"](h)).reshape(-1, VOCAB), y.reshape(-1))

    x = rng.integers(0, VOCAB, (2, LENGTH))
    return model, loss_fn, (x, (x + 1) % VOCAB)


def trainer(make):
    """(traced train step, its first arguments)."""
    model, loss_fn, data = make()
    opt = optim.adamw(1e-2)

    @tj.trace
    def train_step(model, state, x, y):
        loss, grads = tj.value_and_grad(loss_fn)(model, x, y)
        model, state = opt.update(model, grads, state)
        return loss, model, state

    return train_step, (model, opt.init(model), *data)


def train(step, args, n: int):
    losses = []
    for _ in range(n):
        loss, model, state = step(*args)
        args = (model, state, *args[2:])
        losses.append(float(loss))
    return losses, args


@pytest.mark.parametrize("make", [mlp, cnn, transformer])
def test_record_replay_and_picture(make, tmp_path):
    """A recorded training: every step, its loss, every kernel in order, and a page that keeps all invariants."""
    step, args = trainer(make)
    path = tmp_path / "run.tjrec"
    with tj.watch(record=path):
        losses, _ = train(step, args, 3)
    loaded = load_recording(path)
    session = loaded.sessions[loaded.active]
    assert session.name == "train_step" and session.device == "numpy"
    assert [s.loss for s in session.steps] == pytest.approx(losses)
    counts = session.model.counts()
    assert min(counts.values()) > 3, counts  # forward, gradient and optimiser are all told apart
    assert session.model.loss is not None and session.model.gradient_of
    for s in session.steps:
        assert (s.end >= s.start).all() and s.start.min() >= 0 and s.end.max() <= s.duration
    for choices in (Choices(), Choices(collapse=False, fold_repeats=False)):
        scene = Scene(session, choices)
        check_page(scene.page, scene.items)
        scene.use_step(session.last)
        assert set(scene.moment(session.last.duration).state[scene.shown]) == {DONE}
        assert (scene.moment(-1.0).state[scene.shown] != DONE).any()
    picture = Stage(session, Shot(size=(800, 500))).picture(session.last, session.last.duration / 2, 1.0)
    colors = pygame.transform.average_color(picture)
    assert max(colors[:3]) > 16


def test_a_transformer_folds_to_one_block():
    step, args = trainer(transformer)
    graph = step.graph(*args)
    session = Session({"graph": graph.to_json(), "ops": {n.op.name: n.op.describe() for n in graph.nodes}})
    scene = Scene(session)
    (fold,) = scene.arrangement.folds.values()
    assert len(fold.members) == 4
    titles = [c.title for c in scene.page.cells if c.phase == "forward"]
    assert any("attn" in t for t in titles) and any("mlp" in t for t in titles)
    assert len(scene.items) < 0.2 * len(session.model.nodes)
    updates = [i for i in scene.items if i.phase == "optimizer" and i.kind == "group"]
    assert len(updates) < 40


def test_every_op_is_explained():
    """The op table that comes with a compile event has words for every op the viewer shows."""
    from tracejit_viz.describe import describe_item

    step, args = trainer(mlp)
    graph = step.graph(*args)
    session = Session({"graph": graph.to_json(), "ops": {n.op.name: n.op.describe() for n in graph.nodes}})
    scene = Scene(session, Choices(collapse=False))
    for i in scene.shown:
        facts = describe_item(scene, int(i), None)
        assert facts.meaning, facts.node.op
        assert facts.here
    sourced = [n for n in session.model.nodes if not n.is_source and n.phase == "forward"]
    assert sum(bool(n.source) for n in sourced) > 0.9 * len(sourced)


def test_values_of_a_running_program(meeting):
    """Asked through the socket, answered by the program's next call, equal to what the node computes."""
    hub = Hub(place.meeting_dir())
    observer = LiveObserver(spawn=False)
    step, args = trainer(mlp)
    with tj.events.observe(observer) if hasattr(tj, "events") else _observe(observer):
        _, args = train(step, args, 1)
        pump(hub, lambda: hub.trainers and hub.trainers[0].sessions)
        (session,) = hub.trainers[0].sessions.values()
        loss = session.model.loss
        assert hub.ask_values(session, loss)
        hub.poll()
        end = time.monotonic() + 10
        while loss not in session.values and time.monotonic() < end:
            _, args = train(step, args, 1)
            hub.poll()
    got = session.values[loss]
    assert got.stats["size"] == 1 and got.stats["min"] == got.stats["max"]
    assert 0 < got.stats["mean"] < 5
    observer.close()
    hub.close()


def _observe(observer):
    from tracejit import events

    return events.observe(observer)


def test_the_first_nan_is_named(tmp_path):
    @tj.trace
    def f(x):
        y = np.log(x)
        return (y * 2).sum()

    path = tmp_path / "nan.tjrec"
    with warnings.catch_warnings(), tj.watch(record=path), tj.debug_nans():
        warnings.simplefilter("ignore")
        f(np.array([1.0, 2.0], np.float32))
        with pytest.raises(TraceError):
            f(np.array([-1.0, 2.0], np.float32))
    loaded = load_recording(path)
    session = loaded.sessions[loaded.active]
    bad = session.last.nan_node
    assert (
        session.model.nodes[bad].op == "log" and "test_viewer_programs.py" in session.model.nodes[bad].source
    )


def test_notebook_picture():
    step, args = trainer(mlp)
    graph = step.graph(*args)
    png = viewer.render_png(graph.to_json(), {n.op.name: n.op.describe() for n in graph.nodes}, (640, 400))
    assert pygame.image.load(io.BytesIO(png)).get_size() == (640, 400)


def test_graphs_show_themselves_in_notebooks(monkeypatch):
    step, args = trainer(mlp)
    graph = step.graph(*args)
    assert pygame.image.load(io.BytesIO(graph._repr_png_())).get_size() == (1280, 720)
    page = graph._repr_html_()
    assert "data:image/png;base64," in page and f"{len(graph)} nodes" in page
    monkeypatch.setattr("tracejit.watching._viewer", None)
    monkeypatch.setattr("tracejit.plugins.find", lambda group: {})
    assert graph._repr_png_() is None and graph._repr_html_() is None  # no viewer: the text is shown


def test_viewing_a_graph_sends_it_to_the_window(meeting, monkeypatch):
    """``graph.view()``, ``tj.view(graph)`` and ``tj.view(fn, *args)``: nothing runs, the window gets the graph."""
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    hub = Hub(place.meeting_dir())

    @tj.trace
    def shown(x):
        return np.tanh(x).sum()

    x = np.ones(3, np.float32)
    shown.graph(x).view()
    tj.view(shown.graph(x))
    tj.view(shown, x)
    pump(hub, lambda: len(hub.trainers) == 3 and all(t.sessions for t in hub.trainers))
    for t in hub.trainers:
        (session,) = t.sessions.values()
        assert session.name == "shown" and session.device == "static" and not session.kernels
    hub.close()


def test_watch_argument(meeting, monkeypatch):
    """``fn(x, watch=True)`` and ``tj.watch()`` send their calls to the same window; results are the same."""
    hub = Hub(place.meeting_dir())
    monkeypatch.setattr(viewer, "_observer", None)

    @tj.trace
    def watched(x):
        return (x * 3).sum()

    x = np.ones(4, np.float32)
    assert float(watched(x, watch=True)) == 12
    with tj.watch():
        assert float(watched(x)) == 12
    pump(hub, lambda: hub.trainers and hub.trainers[0].sessions)
    (session,) = hub.trainers[0].sessions.values()
    pump(hub, lambda: session.total_steps)
    assert len(hub.trainers) == 1 and session.name == "watched"
    viewer._observer.close()
    hub.close()


def test_watched_calls_take_the_fast_path():
    """A program that is only ever watched is recognised by its generated reader, not by flattening its arguments."""
    from tracejit import events

    class Silent:
        steps = 0

        def on_compile(self, event):
            pass

        def on_step(self, event):
            self.steps += 1
            assert not len(event.kernels) and event.finish >= event.begin

        def wanted(self, program):
            return ()

        def timed(self, program):
            return False

    @tj.trace
    def f(x):
        return (x + 1).sum()

    silent, x = Silent(), np.ones(3, np.float32)
    with events.observe(silent):
        for _ in range(6):
            assert float(f(x)) == 6
    assert silent.steps == 6 and f._plans
    assert f.cache_info().hits == 5 and f.cache_info().misses == 1


def test_watching_changes_no_result(tmp_path):
    step, args = trainer(mlp)
    plain, _ = train(step, args, 3)
    with tj.watch(record=tmp_path / "r.tjrec"):
        watched, _ = train(step, args, 3)
    assert plain == watched
