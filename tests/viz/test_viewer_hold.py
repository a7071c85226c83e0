"""Stepping the program itself: the viewer holds it, lets it run one step, lets it go; whatever happens, it runs on."""

from __future__ import annotations

import os
import signal
import threading
import time

import numpy as np
import pygame
import pytest
from test_viewer_app import Driver
from test_viewer_live import pump

import tracejit as tj
from tracejit import events
from tracejit_viz import client, gate
from tracejit_viz.client import LiveObserver
from tracejit_viz.history import Trainer
from tracejit_viz.hub import Hub


class Program:
    """A thread that calls a watched function for ever, a millisecond apart."""

    def __init__(self, observer: LiveObserver | None = None) -> None:
        self.observer = observer or LiveObserver(spawn=False)
        self.calls = 0
        self.error: BaseException | None = None
        self._stop = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        @tj.trace
        def double(x):
            return (x * 2 + 1).sum()

        x = np.ones(64, np.float32)
        try:
            with events.observe(self.observer):
                while not self._stop:
                    assert float(double(x, device="cpu")) == 192.0
                    self.calls += 1
                    time.sleep(0.001)
        except BaseException as error:
            self.error = error

    def runs(self) -> bool:
        """Whether it gets on within a second."""
        before, end = self.calls, time.monotonic() + 1.0
        while self.calls < before + 3 and time.monotonic() < end:
            time.sleep(0.005)
        return self.calls >= before + 3

    def end(self) -> None:
        self._stop = True
        self._thread.join(5)
        assert not self._thread.is_alive() and self.error is None
        self.observer.close()


@pytest.fixture
def program():
    programs: list[Program] = []

    def start(observer: LiveObserver | None = None) -> Program:
        programs.append(Program(observer))
        return programs[-1]

    yield start
    for p in programs:
        p.observer._gate.hear(gate.GO)
        p.end()


def connected(hub: Hub, n: int = 1) -> Trainer:
    pump(
        hub,
        lambda: (
            len(hub.trainers) >= n and all(any(s.steps for s in t.sessions.values()) for t in hub.trainers)
        ),
    )
    return hub.trainers[-1]


def listen(hub: Hub, seconds: float) -> None:
    end = time.monotonic() + seconds
    pump(hub, lambda: time.monotonic() > end)


def stands(hub: Hub, trainer: Trainer, after: int = -1) -> int:
    """Wait until it is held at a later step than ``after``; the step."""
    pump(hub, lambda: trainer.held == "held" and trainer.held_at is not None and trainer.held_at[1] > after)
    assert trainer.held_at is not None
    return trainer.held_at[1]


def test_hold_step_and_go(hub, program, monkeypatch):
    """A program so settled that hardly any of its calls is timed: each step at which it stands is, and is shown."""
    monkeypatch.setattr(client, "SETTLED", 0.05)
    p = program()
    trainer = connected(hub)
    session = next(iter(trainer.sessions.values()))
    pump(hub, lambda: p.calls > 200)
    assert hub.hold(trainer)
    at = stands(hub, trainer)
    before = p.calls
    for step in range(at, at + 4):
        last = session.steps[-1]
        assert last.step == step and len(last.kernels) == len(session.kernels)
        assert hub.step(trainer) and trainer.held == "stepping"
        assert stands(hub, trainer, step) == step + 1
    assert p.calls == before + 4
    spent, since = time.process_time(), time.monotonic()
    while time.monotonic() < since + 0.6:
        time.sleep(0.1)
        hub.poll()
    assert time.process_time() - spent < 0.06 and p.calls == before + 4
    assert hub.ask_source(session, session.kernels[0].id)  # a held program answers
    pump(hub, lambda: session.kernels[0].source is not None)
    assert hub.release(trainer) and p.runs()
    pump(hub, lambda: session.total_steps > at + 20)
    assert trainer.held == ""
    assert hub.hold(trainer)  # and again
    assert stands(hub, trainer, at + 20) > at + 20


def test_a_viewer_that_goes_away_lets_the_program_run(hub, program):
    p = program()
    hub.hold(connected(hub))
    stands(hub, hub.trainers[0])
    assert not p.runs()
    hub.close()
    assert p.runs() and not p.observer.alive


def test_a_viewer_that_hangs_lets_the_program_run(hub, program, monkeypatch):
    """Alive but silent: after a while the program runs on, and says so when the viewer listens again."""
    monkeypatch.setattr(gate, "PATIENCE", 0.4)
    monkeypatch.setattr("tracejit_viz.hub.HEARTBEAT", 0.1)
    p = program()
    trainer = connected(hub)
    hub.hold(trainer)
    at = stands(hub, trainer)
    listen(hub, 1.0)  # heartbeats: it stays
    assert trainer.held_at == (trainer.active, at) and trainer.held == "held"
    time.sleep(0.5)
    assert p.runs() and p.observer.alive
    pump(hub, lambda: trainer.held == "")
    assert any("runs on: the viewer was not heard" in m for m in hub.messages)
    assert p.runs()


@pytest.fixture
def ctrl_c():
    """Python's own handler of SIGINT, whatever the shell that started the tests in the background made of it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_while_held(hub, ctrl_c):
    """KeyboardInterrupt comes out of the watched call at once; what the program does then is not held up."""
    observer = LiveObserver(spawn=False)
    asked = threading.Event()

    @tj.trace
    def double(x):
        return x * 2

    def user() -> None:
        trainer = connected(hub)
        hub.hold(trainer)
        stands(hub, trainer)
        asked.set()
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=user, daemon=True)
    thread.start()
    with events.observe(observer):
        with pytest.raises(KeyboardInterrupt):
            end = time.monotonic() + 20
            while time.monotonic() < end:
                double(np.ones(8, np.float32), device="cpu")
                time.sleep(0.002)
        assert asked.is_set()
        thread.join(5)
        for _ in range(3):
            double(np.ones(8, np.float32), device="cpu")
    pump(hub, lambda: hub.trainers[0].held == "")
    assert any("runs on: interrupted" in m for m in hub.messages)
    observer.close()


def test_threads_of_a_program_step_together_and_other_programs_run(hub, program):
    """Every watched call of the process stops at its end; the other process does not notice."""
    other = program()
    connected(hub)
    first = program()
    trainer = connected(hub, 2)
    second = program(first.observer)
    pump(hub, lambda: len(trainer.sessions) == 2 and second.calls > 3)
    hub.hold(trainer)
    stands(hub, trainer)
    listen(hub, 0.4)
    calls = first.calls, second.calls
    assert not first.runs() and not second.runs() and other.runs()
    hub.poll()
    hub.step(trainer)
    listen(hub, 0.6)
    assert (first.calls, second.calls) == (calls[0] + 1, calls[1] + 1)
    hub.release(trainer)
    assert first.runs() and second.runs()


def test_nobody_is_held_by_a_dead_trainer_or_a_recording(hub, program, driver_of_recording):
    p = program()
    trainer = connected(hub)
    p.end()
    pump(hub, lambda: not trainer.alive)
    assert not hub.hold(trainer) and not trainer.held
    driver = driver_of_recording
    driver.key(pygame.K_b)
    assert "only a running program" in driver.app.ui.toast and not driver.app.ui.held
    driver.key(pygame.K_o)
    assert not driver.app.ui.held


@pytest.fixture
def driver_of_recording(small_trainer):
    return Driver([small_trainer])


def test_keys_and_badge(hub, program):
    """B and O in the window, the badge in its bar, and the step that is shown."""
    p = program()
    connected(hub)
    driver = Driver([], size=(1600, 900))
    app = driver.app
    app.hub = hub

    def wait(question) -> None:
        end = time.monotonic() + 5
        while not question():
            assert time.monotonic() < end
            driver.frame()
            time.sleep(0.005)

    wait(lambda: app.ui.step is not None)
    driver.key(pygame.K_b)
    wait(lambda: app.ui.held == "held")
    assert app.ui.step is app.ui.session.last and app.ui.step.step == app.ui.held_step
    assert f"held at step {app.ui.held_step}" in app._title
    held, calls = app.ui.held_step, p.calls
    driver.key(pygame.K_LEFT)  # the replay is stepped as ever
    assert not app.ui.playing and p.calls == calls
    driver.key(pygame.K_o)
    wait(lambda: app.ui.held_step == held + 1)
    assert app.ui.step.step == held + 1 and p.calls == calls + 1 and not app.ui.playing
    zones = {action[0]: rect for rect, action in app.window.topbar.zones}
    driver.click(zones["step"].center)
    wait(lambda: app.ui.held_step == held + 2)
    for size in ((360, 200), (430, 420), (640, 420), (1000, 600), (1280, 800), (2560, 1440)):
        bar = app.window.topbar
        app.window.draw(pygame.Surface(size), app.ui, app.scene, app.camera, driver.now, None)
        rects = [rect for rect, action in bar.zones if action[0] in ("step", "hold")]
        assert rects and all(r.right <= size[0] for r in rects), size
    driver.frame()
    zones = {action[0]: rect for rect, action in app.window.topbar.zones}
    driver.click(zones["hold"].center)
    wait(lambda: not app.ui.held and p.calls > calls + 20)
    assert "held" not in app._title
