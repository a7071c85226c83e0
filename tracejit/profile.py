"""What ``fn.profile(...)`` returns: where the time of a call goes, kernel by kernel; also as a Chrome/Perfetto trace."""

from __future__ import annotations

import functools
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tracejit.events import KernelInfo, StepEvent

if TYPE_CHECKING:
    from tracejit.compilation import Entry


@dataclass(frozen=True)
class KernelProfile:
    """Times of one kernel over the profiled calls: microseconds per call, share of all kernel time, achieved rates."""

    kernel: KernelInfo
    mean_us: float
    p95_us: float
    share: float
    gflops: float
    gbytes: float


@dataclass(frozen=True)
class Profile:
    """The profile of one program. ``str()`` and ``print()`` show a table; ``rows`` are sorted by time.

    ``peak_gflops`` and ``peak_gbytes`` are this machine's measured ceilings on the device (GFLOP/s, GB/s), None where
    they were not measured; they give the "% peak" column, a kernel's distance to its roofline (Williams et al. 2009).
    """

    name: str
    device: str
    rows: Sequence[KernelProfile]
    wall_us: float
    steps: Sequence[StepEvent]
    peak_gflops: float | None = None
    peak_gbytes: float | None = None

    def percent_of_roofline(self, row: KernelProfile) -> float | None:
        """How close the kernel is to the bound that limits it, in percent."""
        if not self.peak_gflops or not self.peak_gbytes or row.mean_us <= 0:
            return None
        floor_s = max(
            row.kernel.flops / (self.peak_gflops * 1e9), row.kernel.bytes / (self.peak_gbytes * 1e9)
        )
        return 100.0 * floor_s * 1e6 / row.mean_us

    def table(self) -> Any:
        """The profile as a ``rich.table.Table``."""
        from rich.table import Table

        total = sum(r.mean_us for r in self.rows)
        table = Table(
            title=f"{self.name} on {self.device}: {self.wall_us:,.1f} us per call, "
            f"{total:,.1f} us in {len(self.rows)} kernels"
        )
        table.add_column("kernel")
        for column in ("mean us", "p95 us", "share", "GFLOP/s", "GB/s", "% peak"):
            table.add_column(column, justify="right")
        for r in self.rows:
            peak = self.percent_of_roofline(r)
            table.add_row(
                f"{r.kernel.name}",
                f"{r.mean_us:.2f}",
                f"{r.p95_us:.2f}",
                f"{100 * r.share:.1f}%",
                f"{r.gflops:.2f}" if r.kernel.flops else "",
                f"{r.gbytes:.2f}" if r.kernel.bytes else "",
                "" if peak is None else f"{peak:.0f}%",
            )
        return table

    def __str__(self) -> str:
        import io

        from rich.console import Console

        out = io.StringIO()
        Console(file=out, width=120).print(self.table())
        return out.getvalue()

    def __rich__(self) -> Any:
        return self.table()

    def to_chrome_trace(self, path: str | os.PathLike[str]) -> None:
        """Write the profiled calls as a Chrome trace (chrome://tracing, https://ui.perfetto.dev)."""
        kernels = {r.kernel.id: r.kernel for r in self.rows}
        trace: list[dict[str, Any]] = []
        origin = self.steps[0].begin if self.steps else 0
        for step in self.steps:
            trace.append(_span(f"step {step.step}", step.begin - origin, step.finish - origin, 0, {}))
            for k, start, end, lane, live in zip(step.kernels, step.start, step.end, step.lane, step.live):
                kernel = kernels[int(k)]
                args = {
                    "nodes": list(kernel.nodes),
                    "bytes": kernel.bytes,
                    "flops": kernel.flops,
                    "live_bytes": int(live),
                }
                trace.append(_span(kernel.name, int(start) - origin, int(end) - origin, 1 + int(lane), args))
        with open(path, "w", encoding="utf-8") as file:
            json.dump({"traceEvents": trace, "displayTimeUnit": "ns"}, file)


def _span(name: str, start_ns: int, end_ns: int, lane: int, args: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": name,
        "ph": "X",
        "ts": start_ns / 1e3,
        "dur": (end_ns - start_ns) / 1e3,
        "pid": 1,
        "tid": lane,
        "args": args,
    }


def profile_call(entry: Entry, leaves: Sequence[Any], repeat: int) -> Profile:
    """Run ``entry`` ``repeat`` times under observation, after two warm-up calls, and summarise."""
    if repeat < 1:
        raise ValueError(f"repeat must be at least 1, got {repeat}")
    for _ in range(2):
        entry.run(leaves)
    walls, steps = [], []
    for _ in range(repeat):
        t = time.perf_counter()
        _, event = entry.run_observed(leaves, ())
        walls.append(time.perf_counter() - t)
        steps.append(event)
    # The same kernel may run several times in a step (a loop body): add those up.
    per_kernel: dict[int, list[float]] = {k.id: [] for k in entry.executable.kernels}
    for step in steps:
        sums: dict[int, float] = dict.fromkeys(per_kernel, 0.0)
        for k, start, end in zip(step.kernels, step.start, step.end):
            sums[int(k)] += (int(end) - int(start)) / 1e3
        for k, total_us in sums.items():
            per_kernel[k].append(total_us)
    means = {k: float(np.mean(v)) for k, v in per_kernel.items()}
    total = sum(means.values()) or 1.0
    rows = [
        KernelProfile(
            kernel,
            means[kernel.id],
            float(np.percentile(per_kernel[kernel.id], 95)),
            means[kernel.id] / total,
            kernel.flops / (means[kernel.id] * 1e3) if means[kernel.id] > 0 else 0.0,
            kernel.bytes / (means[kernel.id] * 1e3) if means[kernel.id] > 0 else 0.0,
        )
        for kernel in entry.executable.kernels
    ]
    rows.sort(key=lambda r: -r.mean_us)
    peaks = host_peaks() if entry.device.backend.on_host else (None, None)
    return Profile(entry.name, str(entry.device), rows, float(np.median(walls)) * 1e6, steps, *peaks)


@functools.cache
def host_peaks() -> tuple[float, float]:
    """This machine's attainable GFLOP/s (float32 NumPy matmul) and GB/s (copy), measured once, in about 50 ms."""
    a = np.ones((768, 768), np.float32)
    best = min(_time(lambda: a @ a) for _ in range(4))
    source = np.ones(8 << 20, np.float32)
    target = np.empty_like(source)
    copy = min(_time(lambda: np.copyto(target, source)) for _ in range(4))
    return 2 * 768**3 / best / 1e9, 2 * source.nbytes / copy / 1e9


def _time(run: Any) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
