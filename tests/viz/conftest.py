"""Fixtures of the viewer's tests: no window, no display, small graphs with invented timings."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ["SDL_VIDEODRIVER"] = "dummy"
os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
sys.path.insert(0, str(Path(__file__).parent))

import pytest
import synth

from tracejit_viz import place, wire
from tracejit_viz.history import Session, Trainer
from tracejit_viz.hub import Hub


def session_of(event, steps: int = 5, **kwargs) -> Session:
    """A session fed through the wire format, as the window's would be."""
    session = Session(event.to_json())
    encoder = wire.StepEncoder()
    for k in range(steps):
        data = bytes(encoder.encode(synth.step_event(event, k, begin=k * 20_000_000, **kwargs)))
        session.add_step(wire.decode_step(data[wire.HEAD.size :])[1])
    return session


@pytest.fixture(scope="session")
def grad_event():
    """339 nodes, forward and gradient, up to four nodes to a kernel."""
    return synth.compile_event(synth.load("grad_step"), device="wgpu:0", fuse=4)


@pytest.fixture
def grad_session(grad_event) -> Session:
    return session_of(grad_event)


@pytest.fixture
def small_event():
    """A random training step of a few dozen nodes."""
    return synth.compile_event(synth.random_graph(3, blocks=2, per_block=6), fuse=2)


@pytest.fixture
def small_session(small_event) -> Session:
    return session_of(small_event)


@pytest.fixture
def small_trainer(small_session) -> Trainer:
    return Trainer("test", {small_session.program: small_session}, small_session.program)


@pytest.fixture
def recording(tmp_path, small_event) -> Path:
    """A recording of eight steps."""
    from tracejit_viz.recording import RecordObserver

    path = tmp_path / "run.tjrec"
    with RecordObserver(path) as observer:
        observer.on_compile(small_event)
        for k in range(8):
            observer.on_step(synth.step_event(small_event, k, begin=k * 1_000_000))
    return path


@pytest.fixture
def meeting(tmp_path, monkeypatch) -> Path:
    """A private meeting place, so that tests never talk to a viewer of the user's."""
    monkeypatch.setenv("TRACEJIT_VIEWER_DIR", str(tmp_path / "meet"))
    return tmp_path / "meet"


@pytest.fixture(params=["unix", "tcp"])
def hub(request, meeting, monkeypatch):
    """A listening viewer without a window, over both transports."""
    if request.param == "tcp":
        monkeypatch.setenv("TRACEJIT_VIEWER_TCP", "1")
    elif not place.USE_UNIX:
        pytest.skip("no unix sockets on this system")
    hub = Hub(place.meeting_dir())
    yield hub
    hub.close()
