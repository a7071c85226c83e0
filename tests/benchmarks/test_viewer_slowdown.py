"""What watching costs the training: workloads b and c with the viewer's window open, against the same without it.

Goals (issue 5): below 2% with the viewer open, nothing measurable when not watching. One process runs both in turns; the
viewer is stopped (SIGSTOP) while the unwatched turn runs, so that its own use of the processor counts as well.
``flock -x ... pytest tests/benchmarks/test_viewer_slowdown.py --benchmark-enable -s`` on an idle machine.
"""

from __future__ import annotations

import os
import signal
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest

import tracejit as tj
from tests.benchmarks import peer_tracejit
from tracejit import events
from tracejit_viz.client import LiveObserver

TURNS, SECONDS, SETTLE = 40, 0.3, 5.0

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="pauses the viewer with a POSIX signal")


@pytest.fixture
def viewer(tmp_path: Any, monkeypatch: Any) -> Any:
    """A window of its own (dummy driver unless VIEWER_DRIVER says x11) and the observer that feeds it."""
    monkeypatch.setenv("TRACEJIT_VIEWER_DIR", str(tmp_path / "meet"))
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


def _cpu_seconds(pid: int) -> float:
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


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
    ratios, share = [], []
    for _ in range(turns):
        os.kill(pid, signal.SIGSTOP)
        plain = _turn(run, seconds)
        os.kill(pid, signal.SIGCONT)
        before, t = _cpu_seconds(pid), time.perf_counter()
        with events.observe(viewer):
            watched = _turn(run, seconds)
        share.append((_cpu_seconds(pid) - before) / (time.perf_counter() - t))
        ratios.append(statistics.fmean(watched) / statistics.fmean(plain))
    assert viewer.alive and viewer._process.poll() is None
    benchmark.extra_info["slowdown"] = statistics.median(ratios) - 1
    benchmark.extra_info["viewer_cores"] = statistics.fmean(share)
    if benchmark.enabled:
        print(f"\n{workload}: {100 * (statistics.median(ratios) - 1):+.2f} % slower while watched, ", end="")
        print(
            f"turns {[round(100 * (r - 1), 1) for r in ratios]}, viewer {statistics.fmean(share):.2f} cores"
        )
    with tj.device("cpu"):
        benchmark.pedantic(run, rounds=1)
