"""What ``fn.profile(...)`` returns: where the time of a call goes, kernel by kernel; also as a Chrome/Perfetto trace."""

from __future__ import annotations

import functools
import io
import itertools
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from tracejit.events import KernelInfo, StepEvent

if TYPE_CHECKING:
    from tracejit.compilation import Entry
    from tracejit.graph import Graph

_WIDE = 100  # terminals from this width on get the column that says where in the model a kernel comes from
_HEAVY = ("dot_general", "conv", "scatter")  # ops beside which others in the same kernel hardly count
_ROWS = 30  # rows that printing shows; the rest is summed up


@dataclass(frozen=True)
class KernelProfile:
    """Times of one kernel over the profiled calls: microseconds per call, share of all kernel time, achieved rates.

    ``where`` is the scope (``block0/attn``) or the source line that the kernel's nodes have in common.
    """

    kernel: KernelInfo
    mean_us: float
    p95_us: float
    share: float
    gflops: float
    gbytes: float
    where: str = ""


@dataclass(frozen=True)
class Profile:
    """The profile of one program. ``str()`` and ``print()`` show a table; ``rows`` are sorted by time.

    ``wall_us`` is the median time of a whole call without observation; the kernels were timed in calls of their own, one
    after the other, so their sum may exceed it where kernels overlap.

    ``peak_gflops`` and ``peak_gbytes`` are this machine's measured ceilings on the device (float32 GFLOP/s, GB/s of main
    memory), None where they were not measured; they give the "% peak" column, a kernel's distance to its roofline
    (Williams et al. 2009). Kernels whose data stay in a cache can exceed the ceiling of main memory.
    """

    name: str
    device: str
    rows: Sequence[KernelProfile]
    wall_us: float
    steps: Sequence[StepEvent]
    peak_gflops: float | None = None
    peak_gbytes: float | None = None
    graph: Graph | None = field(default=None, repr=False, compare=False)

    @property
    def kernel_us(self) -> float:
        """Mean time of all kernels together, in microseconds per call."""
        return sum(r.mean_us for r in self.rows)

    def bound(self, row: KernelProfile) -> str | None:
        """What limits the kernel by its roofline: ``"compute"`` or ``"memory"``."""
        if not self.peak_gflops or not self.peak_gbytes:
            return None
        return (
            "compute"
            if row.kernel.flops * self.peak_gbytes > row.kernel.bytes * self.peak_gflops
            else "memory"
        )

    def percent_of_roofline(self, row: KernelProfile) -> float | None:
        """How close the kernel is to the bound that limits it, in percent."""
        if not self.peak_gflops or not self.peak_gbytes or row.mean_us <= 0:
            return None
        floor_s = max(
            row.kernel.flops / (self.peak_gflops * 1e9), row.kernel.bytes / (self.peak_gbytes * 1e9)
        )
        return 100.0 * floor_s * 1e6 / row.mean_us

    # -- as text -----------------------------------------------------------------------------------------------------

    def table(self, width: int = 120, limit: int | None = None) -> Any:
        """The profile as a ``rich.table.Table`` for ``width`` columns; with ``limit`` only the slowest kernels."""
        from rich import box
        from rich.table import Table
        from rich.text import Text

        count = len(self.rows)
        title = (
            f"{self.name} on {self.device}: {_time(self.wall_us)} per call; {count} kernel{'s' * (count != 1)}, "
            f"together {_time(self.kernel_us)}"
        )
        table = Table(
            box=box.SIMPLE_HEAD, title=title, title_style="bold", title_justify="left", pad_edge=False,
            caption=self._caption(), caption_justify="left",
        )  # fmt: skip
        wide = width >= _WIDE
        room = max(16, width - 58)
        table.add_column("kernel", no_wrap=True, overflow="ellipsis", max_width=room // 2 if wide else room)
        if wide:
            table.add_column(
                "where", no_wrap=True, overflow="ellipsis", max_width=room - room // 2, style="dim"
            )
        for column in ("mean us", "p95 us", "share", "GFLOP/s", "GB/s", "% peak"):
            table.add_column(column, justify="right", no_wrap=True)
        shown = self.rows if limit is None or count <= limit + 1 else self.rows[:limit]
        for r in shown:
            cells = [_number(r.mean_us), _number(r.p95_us), f"{100 * r.share:.1f}%"]
            cells += [
                _number(r.gflops) if r.kernel.flops else "",
                _number(r.gbytes) if r.kernel.bytes else "",
            ]
            table.add_row(Text(r.kernel.name), *([Text(r.where)] if wide else []), *cells, self._peak(r))
        if len(shown) < count:
            rest = self.rows[len(shown) :]
            cells = [_number(sum(r.mean_us for r in rest)), "", f"{100 * sum(r.share for r in rest):.1f}%"]
            more = Text(f"... {len(rest)} more", style="dim")
            table.add_row(more, *([""] if wide else []), *cells, "", "", "")
        return table

    def _caption(self) -> str | None:
        if not self.peak_gflops or not self.peak_gbytes:
            return None
        return (
            f"peak, measured here: {self.peak_gflops:,.0f} GFLOP/s (float32 matrix product), "
            f"{self.peak_gbytes:,.0f} GB/s (main memory); m: limited by memory"
        )

    def _peak(self, row: KernelProfile) -> str:
        percent = self.percent_of_roofline(row)
        if percent is None or not (row.kernel.flops or row.kernel.bytes):
            return ""
        return f"{percent:.0f}% " + ("m" if self.bound(row) == "memory" else " ")

    def __str__(self) -> str:
        from rich.console import Console

        width = shutil.get_terminal_size((120, 24)).columns if sys.stdout.isatty() else 120
        out = io.StringIO()
        Console(file=out, width=width, color_system=None).print(self)
        return "\n".join(line.rstrip() for line in out.getvalue().splitlines())

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        yield self.table(options.max_width, _ROWS)

    # -- as a trace ----------------------------------------------------------------------------------------------------

    def to_chrome_trace(self, path: str | os.PathLike[str]) -> None:
        """Write the profiled calls as a Chrome trace (chrome://tracing, https://ui.perfetto.dev)."""
        rows = {r.kernel.id: r for r in self.rows}
        origin = self.steps[0].begin if self.steps else 0
        trace: list[dict[str, Any]] = [_meta("process_name", 0, f"{self.name} on {self.device}")]
        trace.append(_meta("thread_name", 0, "calls"))
        for lane in sorted({int(x) for step in self.steps for x in step.lane}):
            trace.append(_meta("thread_name", 1 + lane, f"kernels {lane}" if lane else "kernels"))
        for step in self.steps:
            loss = {} if step.loss is None else {"loss": step.loss}
            trace.append(
                _span(f"step {step.step}", "call", step.begin - origin, step.finish - origin, 0, loss)
            )
            for k, start, end, lane, live in zip(step.kernels, step.start, step.end, step.lane, step.live):
                trace += self._kernel_events(
                    rows[int(k)], int(start) - origin, int(end) - origin, int(lane), int(live)
                )
        with open(path, "w", encoding="utf-8") as file:
            json.dump({"traceEvents": trace, "displayTimeUnit": "ns"}, file)

    def _kernel_events(
        self, row: KernelProfile, start: int, end: int, lane: int, live: int
    ) -> list[dict[str, Any]]:
        kernel = row.kernel
        args: dict[str, Any] = {
            "where": row.where,
            "bytes": kernel.bytes,
            "flops": kernel.flops,
            "live_bytes": live,
        }
        if self.graph is not None:
            args["nodes"] = [f"%{i} {self.graph.nodes[i].op.name}" for i in kernel.nodes]
        span = _span(kernel.name, kernel.kind, start, end, 1 + lane, args)
        return [
            span,
            {"name": "memory", "ph": "C", "ts": start / 1e3, "pid": 1, "args": {"live_bytes": live}},
        ]


def _span(
    name: str, kind: str, start_ns: int, end_ns: int, lane: int, args: dict[str, Any]
) -> dict[str, Any]:
    return {
        "name": name,
        "cat": kind,
        "ph": "X",
        "ts": start_ns / 1e3,
        "dur": (end_ns - start_ns) / 1e3,
        "pid": 1,
        "tid": lane,
        "args": args,
    }


def _meta(what: str, lane: int, name: str) -> dict[str, Any]:
    return {"name": what, "ph": "M", "pid": 1, "tid": lane, "args": {"name": name}}


def _number(value: float) -> str:
    """Three significant digits or all digits before the point."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _time(us: float) -> str:
    return f"{us:,.1f} us" if us < 10_000 else f"{us / 1e3:,.1f} ms"


def where(graph: Graph, nodes: Sequence[int]) -> str:
    """Where in the user's code a kernel comes from: a scope (``block0/attn``), else a source line (``model.py:41``).

    What all nodes of the kernel share; where they differ, as in a product fused with an optimiser's update, the place of
    its most expensive node. ``grad`` in front says that the node belongs to a gradient.
    """
    work = [graph.nodes[i] for i in nodes if graph.nodes[i].inputs] or [graph.nodes[i] for i in nodes]
    if not work:
        return ""
    scopes = [(n.scope or "").split("/") for n in work]
    common = [names[0] for names in itertools.takewhile(lambda names: len(set(names)) == 1, zip(*scopes))]
    heavy = [n for n in work if n.op.name.startswith(_HEAVY)]
    main = heavy[0] if heavy else max(work, key=lambda n: math.prod(n.inputs[0].shape) if n.inputs else 0)
    place = "/".join(common) or main.scope or os.path.basename(main.source or "")
    return f"grad {place}" if place and main.grad_of is not None else place


def profile_call(entry: Entry, leaves: Sequence[Any], repeat: int) -> Profile:
    """Run ``entry`` ``repeat`` times under observation and as often without, after two warm-up calls, and summarise."""
    if repeat < 1:
        raise ValueError(f"repeat must be at least 1, got {repeat}")
    finish = _finisher(entry)
    for _ in range(2):
        finish(entry.run(leaves))
    entry.run_observed(leaves, ())
    walls, steps = [], []
    for _ in range(repeat):
        walls.append(_seconds(lambda: finish(entry.run(leaves))))
        steps.append(entry.run_observed(leaves, ())[1])
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
            where(entry.optimised, kernel.nodes),
        )
        for kernel in entry.executable.kernels
    ]
    rows.sort(key=lambda r: -r.mean_us)
    wall_us = float(np.median(walls)) * 1e6
    return Profile(entry.name, str(entry.device), rows, wall_us, steps, *_peaks(entry), graph=entry.optimised)


def _finisher(entry: Entry) -> Callable[[Any], None]:
    """What makes a call's results ready: nothing on the host, a wait on a device that runs ahead of Python."""
    if entry.device.backend.on_host:
        return lambda result: None
    from tracejit.trees import NAMESPACE, flatten_fast

    def wait(result: Any) -> None:
        leaves = flatten_fast(result, None, False, NAMESPACE)[0]
        if leaves:
            np.asarray(
                min(leaves, key=lambda leaf: getattr(leaf, "nbytes", 0))
            )  # all of a call become ready together

    return wait


def _peaks(entry: Entry) -> tuple[float | None, float | None]:
    """The device's ceilings: from the backend if it has ``peaks(spec)``, of NumPy for other backends on the host."""
    backend = entry.device.backend
    measure = getattr(backend, "peaks", None)
    if measure is not None:
        gflops, gbytes = measure(entry.device.spec)
        return float(gflops), float(gbytes)
    return host_peaks() if backend.on_host else (None, None)


@functools.cache
def host_peaks() -> tuple[float, float]:
    """This machine's attainable GFLOP/s (float32 NumPy matmul) and GB/s (copy), measured once, in about 50 ms."""
    a = np.ones((768, 768), np.float32)
    best = min(_seconds(lambda: a @ a) for _ in range(4))
    source = np.ones(8 << 20, np.float32)
    target = np.empty_like(source)
    copy = min(_seconds(lambda: np.copyto(target, source)) for _ in range(4))
    return 2 * 768**3 / best / 1e9, 2 * source.nbytes / copy / 1e9


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
