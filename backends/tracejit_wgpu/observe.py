"""Per-kernel device times of one recording: timestamps inside one pass, per pass, or host clocks, in that order.

Called by ``Executable.observed``. Device ticks are shifted onto ``time.perf_counter_ns`` so that the last kernel ends
when the host saw the queue empty.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import numpy as np

from tracejit_wgpu import fastpath

_MAX_QUERIES = 4096


def timed_segment(
    rt: Any, recording: Sequence[tuple[Any, ...]], kernels: Sequence[int]
) -> list[tuple[int, int, int]]:
    """Run a recording; (kernel, start, end) in ns of the host clock for each run of dispatches of one kernel."""
    runs = []
    for kernel, items in groupby(range(len(recording)), key=lambda i: kernels[i]):
        places = list(items)
        runs.append((kernel, places[0], places[-1] + 1))
    if "timestamp-query" not in rt.features:
        return _by_host(rt, recording, runs)
    out: list[tuple[int, int, int]] = []
    for start in range(0, len(runs), _MAX_QUERIES // 2):
        out.extend(_by_timestamps(rt, recording, runs[start : start + _MAX_QUERIES // 2]))
    return out


def timed_runs(rt: Any, recording: Sequence[tuple[Any, ...]]) -> float:
    """Device nanoseconds of a whole recording in one pass, for tuning."""
    ((_, start, end),) = _by_timestamps(rt, recording, [(0, 0, len(recording))])
    return float(end - start)


def _by_host(
    rt: Any, recording: Sequence[Any], runs: Sequence[tuple[int, int, int]]
) -> list[tuple[int, int, int]]:
    out = []
    rt.finish()
    for kernel, first, last in runs:
        begin = time.perf_counter_ns()
        rt.run(recording[first:last])
        rt.finish()
        out.append((kernel, begin, time.perf_counter_ns()))
    return out


def _by_timestamps(
    rt: Any, recording: Sequence[Any], runs: Sequence[tuple[int, int, int]]
) -> list[tuple[int, int, int]]:
    import wgpu

    count = 2 * len(runs)
    device = rt.device
    usage = wgpu.BufferUsage

    def action() -> np.ndarray:
        queries = device.create_query_set(type="timestamp", count=count)
        result = device.create_buffer(size=8 * count, usage=usage.QUERY_RESOLVE | usage.COPY_SRC)
        encoder = device.create_command_encoder()
        if "timestamp-query-inside-passes" in rt.features and fastpath.available():
            compute = encoder.begin_compute_pass()
            for n, (_, first, last) in enumerate(runs):
                fastpath.write_timestamp(compute, queries, 2 * n)
                fastpath.encode(compute, recording[first:last])
                fastpath.write_timestamp(compute, queries, 2 * n + 1)
            compute.end()
        else:
            for n, (_, first, last) in enumerate(runs):
                writes = {
                    "query_set": queries,
                    "beginning_of_pass_write_index": 2 * n,
                    "end_of_pass_write_index": 2 * n + 1,
                }
                compute = encoder.begin_compute_pass(timestamp_writes=writes)
                fastpath.encode(compute, recording[first:last])
                compute.end()
        encoder.resolve_query_set(queries, 0, count, result, 0)
        rt.queue.submit([encoder.finish()])
        data = np.frombuffer(rt.queue.read_buffer(result), np.uint64).copy()
        result.destroy()
        return data

    rt.finish()
    ticks = rt.guard(action)
    now = time.perf_counter_ns()
    period = timestamp_period(rt)
    ticks = ticks.astype(np.float64) if period != 1.0 else ticks.astype(np.int64)
    ns = ((ticks - ticks.max()) * period).astype(np.int64) + now
    return [
        (kernel, int(ns[2 * n]), int(max(ns[2 * n + 1], ns[2 * n]))) for n, (kernel, _, _) in enumerate(runs)
    ]


def timestamp_period(rt: Any) -> float:
    """Nanoseconds per tick of the queue's timestamps."""
    found = getattr(rt, "_period", None)
    if found is None:
        try:
            from wgpu.backends.wgpu_native import lib

            found = float(lib.wgpuQueueGetTimestampPeriod(rt.queue._internal)) or 1.0
        except (ImportError, AttributeError):
            found = 1.0
        rt._period = found
    return float(found)
