"""The window beside a program that needs the machine: how many cores nobody uses, and standing back in the queue.

Called by ``app`` and ``live``. Standard library only; where the system does not say, no core is spare (be polite).
"""

from __future__ import annotations

import contextlib
import os
import sys
import time

LOOK = 1.0  # seconds between looks


class Spare:
    """Idle processor cores, this process's own use counted as idle: what it may take without asking anyone."""

    def __init__(self) -> None:
        self.cores = 0.0
        self._seen = self._read()

    def update(self) -> float:
        """Idle cores over the last second or so; cheap when called more often."""
        now = time.monotonic()
        before = self._seen
        if now - before[0] < LOOK:
            return self.cores
        self._seen = self._read()
        seconds = self._seen[0] - before[0]
        own = (self._seen[2] - before[2]) / seconds
        if sys.platform.startswith(("linux", "win")):
            idle = (self._seen[1] - before[1]) / seconds
        else:  # the number of runnable threads, smoothed by the system
            idle = (os.cpu_count() or 1) - self._seen[1]
        self.cores = max(0.0, idle + own)
        return self.cores

    def _read(self) -> tuple[float, float, float]:
        """(clock, idle seconds of all cores since the start, or the load where there is no such count, own seconds)."""
        idle = 0.0 if sys.platform.startswith(("linux", "win")) else float(os.cpu_count() or 1)
        with contextlib.suppress(OSError, ValueError, IndexError, AttributeError):
            if sys.platform.startswith("linux"):
                with open("/proc/stat", encoding="ascii") as file:
                    fields = file.readline().split()
                idle = (int(fields[4]) + int(fields[5])) / os.sysconf("SC_CLK_TCK")
            elif sys.platform == "win32":
                idle = _windows_idle()
            else:
                idle = os.getloadavg()[0]
        return time.monotonic(), idle, time.process_time()


class Manners:
    """Where this process stands among those that want a processor: last, or in line while somebody touches the window."""

    def __init__(self) -> None:
        self._back: bool | None = None
        if hasattr(os, "nice"):
            with contextlib.suppress(OSError):
                os.nice(19)
        if sys.platform == "linux":  # never interrupt a running thread just because a frame is due
            with contextlib.suppress(OSError):
                os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))

    def stand_back(self, back: bool) -> None:
        """Linux groups processes by session, and between groups only the group's own nice value counts.

        With the group at 19 and SCHED_IDLE a program on all cores lost about two thirds of what it loses at 0; how much of
        that is the group alone was not measured. Any user may move the group in both directions, which is not true of the
        process's own value or of SCHED_IDLE.
        """
        if back == self._back or sys.platform != "linux":
            return
        with contextlib.suppress(OSError):  # no autogroups here; or moved less than 0.1 s ago: next time
            with open("/proc/self/autogroup", "w", encoding="ascii") as file:
                file.write("19" if back else "0")
            self._back = back


def _windows_idle() -> float:
    import ctypes

    idle = ctypes.c_uint64()
    ctypes.WinDLL("kernel32").GetSystemTimes(ctypes.byref(idle), None, None)  # type: ignore[attr-defined]
    return idle.value * 1e-7
