"""Trainer and viewer over a real socket: delivery, back-pressure, death on either side, several trainers at once."""

from __future__ import annotations

import dataclasses
import os
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import synth

from tracejit import events
from tracejit_viz import place, wire
from tracejit_viz.client import LIGHT_RATE, LiveObserver, start_viewer
from tracejit_viz.errors import NoDisplayError, ViewerError
from tracejit_viz.hub import Hub
from tracejit_viz.plugin import Viewer


def pump(hub: Hub, until, seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < end, "timed out"
        hub.poll(0.01)
        time.sleep(0.002)


def send_steps(observer: LiveObserver, event, n: int, first: int = 0, gap: float = 0.02) -> None:
    for k in range(first, first + n):
        observer.on_step(synth.step_event(event, k, begin=time.perf_counter_ns()))
        time.sleep(gap)


def test_steps_arrive(hub, small_event):
    observer = LiveObserver(spawn=False)
    observer.on_compile(small_event)
    send_steps(observer, small_event, 5)
    pump(hub, lambda: hub.trainers and hub.trainers[0].sessions.get(1) and hub.trainers[0].sessions[1].steps)
    observer.close()
    pump(hub, lambda: not hub.trainers[0].alive)
    session = hub.trainers[0].sessions[1]
    assert session.steps[-1].step == 4 and session.ended
    assert session.model.name == small_event.name
    assert session.kernels[0].source is None  # generated code travels only on request


def test_the_last_step_is_delivered_even_when_steps_are_fast(hub, small_event):
    """A thousand steps in a moment: few are sent, the newest is always among them, and the skipped are counted."""
    observer = LiveObserver(spawn=False)
    observer.on_compile(small_event)
    event = synth.step_event(small_event, 0)
    for k in range(1000):
        observer.on_step(dataclasses.replace(event, step=k))
    observer.close()
    pump(hub, lambda: hub.trainers and not hub.trainers[0].alive)
    session = hub.trainers[0].sessions[1]
    assert len(session.steps) < 100 and session.steps[-1].step == 999
    assert len(session.steps) + sum(s.skipped for s in session.steps) >= 990


def test_a_viewer_that_does_not_read_never_blocks(hub, grad_event):
    """The pipe fills: steps are dropped, the program runs on at full speed."""
    observer = LiveObserver(spawn=False)
    observer.on_compile(grad_event)
    slowest = 0.0
    event = synth.step_event(grad_event, 0)
    for k in range(40_000):
        if observer.dropped > 50:
            break
        observer._next_step = 0.0  # as if every step were due
        t = time.perf_counter()
        observer.on_step(dataclasses.replace(event, step=k))
        slowest = max(slowest, time.perf_counter() - t)
    assert observer.dropped > 50 and observer.alive
    assert slowest < 1.0  # nothing waited for the reader
    pump(hub, lambda: hub.trainers and 1 in hub.trainers[0].sessions and hub.trainers[0].sessions[1].steps)
    steps = [s.step for s in hub.trainers[0].sessions[1].steps]
    assert steps == sorted(steps)


def test_killed_viewer_is_noticed_and_forgotten(hub, small_event):
    observer = LiveObserver(spawn=False)
    observer.on_compile(small_event)
    send_steps(observer, small_event, 2)
    pump(hub, lambda: hub.trainers and hub.trainers[0].sessions)
    hub.close()
    end = time.monotonic() + 5
    while observer.alive and time.monotonic() < end:
        send_steps(observer, small_event, 1)
    assert not observer.alive
    observer.on_step(synth.step_event(small_event, 9))  # nothing happens, nothing raises
    assert observer.wanted(1) == ()
    observer.close()


def test_killed_trainer_leaves_its_last_step(hub, small_event):
    """A trainer that dies in the middle of a frame: what arrived stays on screen."""
    s = place.connect(place.meeting_dir())
    frame = bytes(wire.StepEncoder().encode(synth.step_event(small_event, 3)))
    hello = wire.pack(wire.HELLO, {"title": "train.py", "token": place.token(place.meeting_dir())})
    s.sendall(hello + wire.compile_frame(small_event, with_source=False) + frame + frame[: len(frame) // 2])
    pump(hub, lambda: hub.trainers and 1 in hub.trainers[0].sessions and hub.trainers[0].sessions[1].steps)
    s.close()
    pump(hub, lambda: not hub.trainers[0].alive)
    session = hub.trainers[0].sessions[1]
    assert session.ended and [x.step for x in session.steps] == [3]
    assert any("train.py ended" in m for m in hub.messages)


def test_two_trainers_at_once(hub, small_event, grad_event):
    a, b = LiveObserver(spawn=False), LiveObserver(spawn=False)
    a.on_compile(small_event)
    b.on_compile(grad_event)
    for k in range(3):
        send_steps(a, small_event, 1, k)
        send_steps(b, grad_event, 1, k)
        hub.poll()
    pump(
        hub, lambda: len(hub.trainers) == 2 and all(t.sessions and t.sessions[1].steps for t in hub.trainers)
    )
    names = {next(iter(t.sessions.values())).name for t in hub.trainers}
    assert names == {small_event.name, grad_event.name}
    a.close()
    pump(hub, lambda: sum(t.alive for t in hub.trainers) == 1)
    b.close()


def test_values_and_code_are_sent_when_asked(hub, small_event):
    observer = LiveObserver(spawn=False)
    observer.on_compile(small_event)
    send_steps(observer, small_event, 2)
    pump(hub, lambda: hub.trainers and 1 in hub.trainers[0].sessions)
    session = hub.trainers[0].sessions[1]
    assert observer.wanted(1) == ()
    assert hub.ask_values(session, 4) and hub.ask_source(session, 0)
    hub.poll()
    end = time.monotonic() + 5
    while observer.wanted(1) != (4,):
        assert time.monotonic() < end
        time.sleep(0.02)
    array = np.linspace(0, 1, 50, dtype=np.float32)
    observer.on_step(dataclasses.replace(synth.step_event(small_event, 7), values={4: array}))
    pump(hub, lambda: 4 in session.values and session.kernels[0].source)
    assert session.values[4].stats["max"] == 1.0 and session.values[4].step == 7
    assert observer.wanted(1) == () and not session.wanted  # asked once, answered once
    observer.close()


def untimed(event):
    """The same call as one that ran at full speed, in half the time."""
    none = np.zeros(0, np.int64)
    return dataclasses.replace(
        event,
        kernels=none,
        start=none,
        end=none,
        live=none,
        lane=none,
        finish=event.begin + (event.finish - event.begin) // 2,
    )


def test_timing_kernels_takes_a_small_part_of_the_time(hub, small_event, monkeypatch):
    """A program whose timed calls take 40 ms instead of 20: it runs at full speed for seconds between two of them."""
    now = [100.0]
    monkeypatch.setattr("tracejit_viz.client.time.monotonic", lambda: now[0])
    observer = LiveObserver(spawn=False)
    observer.on_compile(small_event)
    slow = dataclasses.replace(synth.step_event(small_event, 0), begin=0, finish=40_000_000)
    spent = timed = 0.0
    for k in range(2000):
        whole = observer.timed(1)
        observer.on_step(dataclasses.replace(slow if whole else untimed(slow), step=k))
        now[0] += 0.04 if whole else 0.02
        spent += 0.04 if whole else 0.02
        timed += 0.02 * whole
    assert 0 < timed <= 0.012 * spent
    observer._wanted[1] = {3}
    assert observer.timed(1)  # values were asked for: the next call answers
    observer.close()


def test_the_program_is_left_alone_between_two_looks(hub, small_event, monkeypatch):
    """Most calls of a fast program are not even told to the observer; unknown programs and due steps always are."""
    now = [100.0]
    monkeypatch.setattr("tracejit_viz.client.time.monotonic", lambda: now[0])
    observer = LiveObserver(spawn=False)
    observer.on_compile(small_event)
    step = dataclasses.replace(synth.step_event(small_event, 0), begin=0, finish=2_000_000)
    told = 0
    for k in range(1500):
        now[0] += 0.002
        if observer.resting(1):
            assert k > 500  # a short run is told whole
            continue
        told += k > 500
        assert not observer.resting(2)
        observer.on_step(dataclasses.replace(step if observer.timed(1) else untimed(step), step=k))
    assert 20 < told < 60  # ten a second, and the steps that are sent
    now[0] += 0.1
    assert not observer.resting(1) and observer._held[False].step > 1448  # 0.1 s are 50 steps
    observer.close()


def test_untimed_steps_feed_the_curve_and_the_clock_only(hub, small_event):
    observer = LiveObserver(spawn=False)
    observer.on_compile(small_event)
    send_steps(observer, small_event, 1)
    for k in range(1, 6):
        event = dataclasses.replace(
            synth.step_event(small_event, k, begin=time.perf_counter_ns()), loss=1.0 / k
        )
        observer.on_step(untimed(event))
        time.sleep(1.1 / LIGHT_RATE)
    observer.close()
    pump(hub, lambda: hub.trainers and not hub.trainers[0].alive)
    session = hub.trainers[0].sessions[1]
    assert [s.step for s in session.steps] == [0] and session.total_steps == 6
    assert session.loss[-1] == pytest.approx(0.2) and len(session.loss) >= 4
    assert session.step_seconds(session.last) == session.plain > 0


def test_a_watched_program_runs_untimed_most_of_the_time(hub):
    """The core asks the observer; results are the same either way."""
    import tracejit as tj

    @tj.trace
    def f(x):
        return (x * 2 + 1).sum()

    observer = LiveObserver(spawn=False)
    seen = []
    send = observer.on_step
    observer.on_step = lambda event: (seen.append(len(event.kernels)), send(event))
    x = np.ones(64, np.float32)
    with events.observe(observer):
        results = {float(f(x, device="cpu")) for _ in range(200)}
    assert results == {192.0}
    assert len(seen) == 200 and 0 < sum(map(bool, seen)) < 60
    observer.close()


def test_nonsense_connections_are_closed_and_the_others_live(hub, small_event):
    observer = LiveObserver(spawn=False)
    observer.on_compile(small_event)
    send_steps(observer, small_event, 2)
    for data in (
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        wire.pack(wire.BYE),
        wire.HEAD.pack(b"TJ", 3, 1, 0, 0),
    ):
        s = place.connect(place.meeting_dir())
        s.sendall(data)
        pump(hub, lambda: hub.messages)
        assert "closed a connection" in hub.messages.pop()
        s.close()
    pump(hub, lambda: hub.trainers and 1 in hub.trainers[0].sessions)
    assert len(hub.trainers) == 1
    observer.close()


def test_tcp_needs_the_token(meeting, monkeypatch):
    monkeypatch.setenv("TRACEJIT_VIEWER_TCP", "1")
    hub = Hub(place.meeting_dir())
    s = place.connect(place.meeting_dir())
    s.sendall(wire.pack(wire.HELLO, {"token": "guess"}))
    pump(hub, lambda: hub.messages)
    assert not hub.trainers
    s.close()
    hub.close()


def test_one_viewer_per_user(hub):
    assert not Hub(place.meeting_dir()).listening


@pytest.mark.skipif(not place.USE_UNIX, reason="unix sockets")
def test_a_dead_viewers_socket_is_replaced(meeting):
    path = place.meeting_dir() / "viewer.sock"
    dead = socket.socket(socket.AF_UNIX)
    dead.bind(str(path))
    dead.close()
    hub = Hub(place.meeting_dir())
    assert hub.listening
    hub.close()


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="POSIX permissions")
def test_the_meeting_place_is_private(meeting):
    meeting.mkdir(mode=0o777)
    os.chmod(meeting, 0o777)
    assert place.meeting_dir().stat().st_mode & 0o077 == 0
    link = meeting.parent / "link"
    link.symlink_to(meeting)
    os.environ["TRACEJIT_VIEWER_DIR"] = str(link)
    with pytest.raises(ViewerError, match="another user"):
        place.meeting_dir()


def test_without_a_display_the_program_runs_and_is_told_once(meeting, monkeypatch, small_event):
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "SDL_VIDEODRIVER"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    with pytest.raises(NoDisplayError, match="tracejit export"):
        start_viewer(meeting)
    viewer = Viewer()
    with pytest.warns(RuntimeWarning, match="no display for the viewer") as seen:
        for k in range(3):
            with events.observe(viewer.watch_observer()) as observer:
                observer.on_compile(small_event)
                observer.on_step(synth.step_event(small_event, k))
    assert len(seen) == 1
    with pytest.raises(NoDisplayError):
        viewer.view_graph(synth.random_graph(1), {})


def test_a_viewer_that_cannot_start_says_why(meeting, monkeypatch, small_event):
    monkeypatch.setenv("SDL_VIDEODRIVER", "no_such_driver")
    observer = LiveObserver()
    with pytest.warns(RuntimeWarning, match="could not start: cannot open a window"):
        end = time.monotonic() + 20
        while observer.alive and time.monotonic() < end:
            send_steps(observer, small_event, 1)
    assert not observer.alive


def test_a_real_viewer_process(meeting, monkeypatch, small_event):
    """Started on first use, reused by the next observer, outlives the training, and can be killed without harm."""
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    monkeypatch.setenv("TRACEJIT_VIEWER_SIZE", "640x400")
    t = time.perf_counter()
    first = LiveObserver()
    assert time.perf_counter() - t < 2.0  # the program does not wait for the window
    process = first._process
    assert process is not None
    try:
        first.on_compile(small_event)
        send_steps(first, small_event, 3)
        first.close()
        assert first.sent or first._socket is None
        assert process.poll() is None
        second = LiveObserver()
        assert second._process is None  # the open window is reused
        second.on_compile(small_event)
        send_steps(second, small_event, 3)
        assert second.alive and second.sent > 0
        process.kill()
        process.wait()
        end = time.monotonic() + 5
        while second.alive and time.monotonic() < end:
            send_steps(second, small_event, 1)
        assert not second.alive
    finally:
        process.kill()


def test_a_forked_child_stays_silent(hub, small_event):
    if not hasattr(os, "fork"):
        pytest.skip("no fork here")
    observer = LiveObserver(spawn=False)
    observer.on_compile(small_event)
    observer._pid = -1  # what a child sees: another pid than the one that connected
    before = observer.sent
    observer.on_step(synth.step_event(small_event, 1))
    assert observer.sent == before and not observer.alive


def test_importing_the_viewer_loads_no_pygame():
    code = "import tracejit_viz, sys; assert 'pygame' not in sys.modules and 'PIL' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
