"""What watching costs the training: workloads b and c with the viewer's window open, against the same without it.

Goals (issue 5): below 2% with the viewer open, nothing measurable when not watching. One process runs all kinds of turns in
alternation; the viewer is stopped (SIGSTOP) while an unwatched turn runs, so that its own use of the processor counts as
well, and its clocks are moved on by that time, so that a watched turn is one piece of a run that is always watched. An
unwatched turn is divided by its neighbours in the same way: that is the noise. Not watching at all is compared with a call
that has no test for observers.
``flock -x ... pytest tests/benchmarks/test_viewer_slowdown.py --benchmark-enable -s`` on an idle machine.
"""

from __future__ import annotations

import os
import signal
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest

import tracejit as tj
from tests.benchmarks import peer_tracejit
from tracejit import events
from tracejit.errors import hide_internal_frames
from tracejit.jit import TracedFunction
from tracejit.state import state
from tracejit_viz.client import LiveObserver

#: A turn is a few frames of the viewer (it draws one as soon as it may run again); as many turns as this noise needs.
TURNS, SECONDS, SETTLE = 40, 1.4, 5.0

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


@pytest.fixture
def viewer(tmp_path: Any, monkeypatch: Any) -> Any:
    """A window of its own (dummy driver unless VIEWER_DRIVER says x11) and the observer that feeds it."""
    monkeypatch.setenv("TRACEJIT_VIEWER_DIR", str(tmp_path / "meet"))
    monkeypatch.setenv("TRACEJIT_VIEWER_SIZE", os.environ.get("TRACEJIT_VIEWER_SIZE", "1600x900"))
    monkeypatch.setenv("SDL_VIDEODRIVER", os.environ.get("VIEWER_DRIVER", "dummy"))
    observer = LiveObserver()
    assert observer._process is not None
    yield observer
    observer._process.kill()
    observer._process.wait()
    observer.close()


def _turn(run: Callable[[], Any], seconds: float) -> list[float]:
    times, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 3:
        t = time.perf_counter()
        run()
        times.append(time.perf_counter() - t)
    return times


def _compare(
    kinds: Sequence[Callable[[], list[float]]], base: Callable[[], list[float]], turns: int
) -> list[list[float]]:
    """For each kind of turn, its mean call over that of the ``base`` turns before and after it."""
    ratios: list[list[float]] = [[] for _ in kinds]
    before = statistics.fmean(base())
    for _ in range(turns):
        for kind, found in zip(kinds, ratios, strict=True):
            mean = statistics.fmean(kind())
            after = statistics.fmean(base())
            found.append(2 * mean / (before + after) - 1)
            before = after
    return ratios


def _percent(ratios: Sequence[float]) -> str:
    """Median and its standard error."""
    error = 1.25 * statistics.stdev(ratios) / len(ratios) ** 0.5 if len(ratios) > 1 else 0.0
    return f"{100 * statistics.median(ratios):+.2f} +- {100 * error:.2f} %"


def _cpu_seconds(pid: int) -> float:
    with open(f"/proc/{pid}/schedstat") as file:
        return int(file.read().split()[0]) * 1e-9


@pytest.mark.parametrize("workload", ["b", "c"])
def test_watching_costs_little(benchmark: Any, viewer: Any, workload: str) -> None:
    """Ratio of the means over alternating turns, and the viewer's share of a core, in ``extra_info``."""
    run = peer_tracejit.make(workload if benchmark.enabled else "a", "cpu")
    pid = viewer._process.pid
    with events.observe(viewer):
        end = time.monotonic() + 20
        while viewer.sent < 2 and time.monotonic() < end:
            run()
        assert viewer.sent >= 2, "the viewer did not come up"
        if benchmark.enabled:
            _turn(run, SETTLE)  # the first picture of the page, once
    turns, seconds = (TURNS, SECONDS) if benchmark.enabled else (1, 0.05)
    share: list[float] = []
    left = time.monotonic()

    def watched() -> list[float]:
        nonlocal left
        for clock in ("_next_timed", "_next_step", "_next_light", "_next_poll", "_rest_until"):
            setattr(viewer, clock, getattr(viewer, clock) + time.monotonic() - left)
        os.kill(pid, signal.SIGCONT)
        before, t = _cpu_seconds(pid), time.perf_counter()
        with events.observe(viewer):
            times = _turn(run, seconds)
        share.append((_cpu_seconds(pid) - before) / (time.perf_counter() - t))
        os.kill(pid, signal.SIGSTOP)
        left = time.monotonic()
        return times

    def plain() -> list[float]:
        return _turn(run, seconds)

    os.kill(pid, signal.SIGSTOP)
    slower, noise = _compare([watched, plain], plain, turns)
    assert viewer.alive and viewer._process.poll() is None
    benchmark.extra_info["slowdown"], benchmark.extra_info["noise"] = slower, noise
    benchmark.extra_info["viewer_cores"] = statistics.fmean(share)
    if benchmark.enabled:
        print(
            f"\n{workload}: {_percent(slower)} slower while watched ({_percent(noise)} against itself), ",
            end="",
        )
        print(f"viewer {statistics.fmean(share):.3f} cores")
    with tj.device("cpu"):
        benchmark.pedantic(run, rounds=1)


@pytest.mark.parametrize("workload", ["a", "b"])
def test_not_watching_costs_nothing(benchmark: Any, workload: str) -> None:
    """The call path as it is against one without the test whether somebody watches; calls of the two in alternation."""
    run = peer_tracejit.make(workload if benchmark.enabled else "a", "cpu")
    _turn(run, 0.2)
    with_test = TracedFunction.__call__

    def without_test(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            for read, entry in self._plans.get(state.device, ()):
                leaves = read(args, kwargs)
                if leaves is not None and entry.matches(leaves):
                    self._hits += 1
                    entry.used = True
                    return entry.run(leaves)
            return self._general(args, kwargs)
        except Exception as error:
            raise hide_internal_frames(error)  # noqa: B904

    def turn() -> list[float]:
        return _turn(run, 0.05 if benchmark.enabled else 0.01)

    def bare() -> list[float]:
        TracedFunction.__call__ = without_test  # type: ignore[method-assign]
        try:
            return turn()
        finally:
            TracedFunction.__call__ = with_test  # type: ignore[method-assign]

    bare_ratio, noise = _compare([bare, turn], turn, 100 if benchmark.enabled else 1)
    benchmark.extra_info["bare"], benchmark.extra_info["noise"] = bare_ratio, noise
    if benchmark.enabled:
        print(f"\n{workload}: without the test {_percent(bare_ratio)}, against itself {_percent(noise)}")
    benchmark.pedantic(run, rounds=1)
