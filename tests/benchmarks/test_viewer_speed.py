"""How fast the viewer lays out and draws, and that its memory stays bounded over an hour of steps.

Goals (issue 5): layout of 1,800 nodes below 0.3 s and of 6,000 below 1 s; 60 frames a second at 1080p while panning and
playing 1,800 nodes, 30 with 6,000 (dummy driver). ``pytest tests/benchmarks/test_viewer_speed.py --benchmark-enable``.
"""

from __future__ import annotations

import os
import sys
import tracemalloc
from pathlib import Path
from typing import Any

os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
sys.path.insert(0, str(Path(__file__).parent.parent / "viz"))

import pygame
import pytest
import synth

from tracejit_viz import wire
from tracejit_viz.app import App
from tracejit_viz.fold import Choices
from tracejit_viz.history import Session, Trainer
from tracejit_viz.model import parse_graph
from tracejit_viz.scene import Scene

GRAPHS = {"1761": lambda: synth.load("train_step"), "5996": lambda: synth.random_graph(1, 60, 36)}


def _session(graph: dict[str, Any], steps: int = 3) -> Session:
    event = synth.compile_event(graph, fuse=3)
    session = Session(event.to_json())
    encoder = wire.StepEncoder()
    for k in range(steps):
        frame = bytes(encoder.encode(synth.step_event(event, k, begin=k * 20_000_000)))
        session.add_step(wire.decode_step(frame[wire.HEAD.size :])[1])
    return session


@pytest.mark.parametrize("nodes", GRAPHS)
@pytest.mark.parametrize("cards", ["as it opens", "every node"])
def test_layout(benchmark: Any, nodes: str, cards: str) -> None:
    """From a parsed graph to a page with all its curves."""
    session = _session(GRAPHS[nodes](), 0)
    choices = Choices() if cards == "as it opens" else Choices(collapse=False, fold_repeats=False)
    scene = benchmark.pedantic(lambda: Scene(session, choices), rounds=5, warmup_rounds=1)
    assert len(scene.page.items) > 40


def test_parse(benchmark: Any) -> None:
    """Reading a graph of 6,000 nodes."""
    graph = GRAPHS["5996"]()
    assert len(benchmark.pedantic(lambda: parse_graph(graph), rounds=5).nodes) == 5996


@pytest.mark.parametrize("nodes", GRAPHS)
@pytest.mark.parametrize("cards", ["as it opens", "every node"])
def test_frames(benchmark: Any, nodes: str, cards: str) -> None:
    """One frame at 1080p while the page is panned and a step is played."""
    session = _session(GRAPHS[nodes]())
    pygame.display.init()
    screen = pygame.display.set_mode((1920, 1080))
    now = [0.0]
    app = App(screen, trainers=[Trainer("bench", {1: session}, 1)], clock=lambda: now[0])
    assert app.scene is not None
    if cards == "every node":
        app.scene.choices.collapse, app.scene.choices.fold_repeats = False, False
        app.rebuild()
    for _ in range(400 if benchmark.enabled else 2):  # the first picture of this size
        now[0] += 1 / 60
        app.frame([])
        if app.window.graph is not None and app.window.graph.sharp:
            break
    count = [0]

    def frame() -> None:
        count[0] += 1
        now[0] += 1 / 60
        app.camera.pan(3 if count[0] // 40 % 2 else -3, 1 if count[0] // 40 % 2 else -1)
        app.frame([])

    benchmark.pedantic(frame, rounds=240 if benchmark.enabled else 2, warmup_rounds=5)
    assert app.ui.playing and app.ui.t > 0


def test_an_hour_of_steps_stays_small(benchmark: Any) -> None:
    """216,000 steps (an hour at the sixty a second a trainer sends at most) of 200 kernels: a few megabytes."""
    steps = 216_000 if benchmark.enabled else 2_000
    event = synth.compile_event(synth.random_graph(2, 4, 50, train=False), fuse=1)
    session = Session(event.to_json())
    data = bytes(wire.StepEncoder().encode(synth.step_event(event, 0)))[wire.HEAD.size :]
    _, pattern = wire.decode_step(data)

    def hour() -> int:
        for k in range(steps):
            pattern.step, pattern.begin = k, k * 16_000_000
            session.add_step(type(pattern)(*(getattr(pattern, f) for f in pattern.__slots__)))
        return len(session.steps)

    tracemalloc.start()
    try:
        hour()
        used = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert used < 12 << 20 and len(session.steps) <= session.keep and len(session.loss) <= 4096
    benchmark.pedantic(lambda: session.timing(range(20)), rounds=20)
