"""Times candidate tiles for the matrix products of a program on its device and keeps the best (``tuning.remember``).

Runs before a program is compiled when ``TRACEJIT_WGPU_TUNE=1``; products that were tuned before, by shape and adapter,
are looked up on disk instead. Without it the rules of ``tuning.py`` decide, which need no device time.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from tracejit.program import ContractKernel, Program
from tracejit_wgpu import fastpath, tuning
from tracejit_wgpu.compiler import storage_bytes
from tracejit_wgpu.contract import tile_dispatches, tile_groups, tile_key
from tracejit_wgpu.emit import Tables
from tracejit_wgpu.observe import timed_runs
from tracejit_wgpu.problem import Problem
from tracejit_wgpu.wgsl import storage_dtype

Key = tuple[int, int, int, int, str]
_log = logging.getLogger("tracejit")
_BURST_NS = 3e6  # device time of one measurement
_RAMP_S = 0.15  # a GPU that was idle runs at low clocks
_COLD_BYTES = 100 << 20  # operands are rotated until caches cannot hold them
_COPIES = 6
_ROUNDS = 2


def tune_program(rt: Any, program: Program, scalars: dict[int, int]) -> list[str]:
    """Tune every product of a program that has no entry yet; a line per product that was measured."""
    if "timestamp-query" not in rt.features:
        return []
    lines: list[str] = []
    buffers = {b.id: b for b in program.buffers}
    for kernel in program.kernels:
        if not isinstance(kernel, ContractKernel):
            continue
        tables = Tables(buffers, rt.target, {}, scalars)
        for group in tile_groups(kernel.problems, tables):
            key = tile_key(group)
            if tuning.known(rt.target, *key):
                continue
            found = sorted(_measure(rt, group, key, buffers, scalars), key=lambda f: f[0])
            tuning.remember(rt.target, *key, found[0][1])
            flops = 2.0 * key[0] * key[1] * key[2] * key[3]
            text = " | ".join(f"{flops / ns / 1e3:.1f} TF {ns / 1e3:.1f} us {tile}" for ns, tile in found[:4])
            rule = tuning.rule(*key)
            mine = next((f"; rule {rule} {ns / 1e3:.1f} us" for ns, tile in found if tile == rule), "")
            lines.append(f"tune {key}: {text}{mine}")
            _log.info(lines[-1])
    return lines


def _candidates(key: Key, rt: Any) -> list[tuning.Tile]:
    rule = tuning.rule(*key)
    out = [rule]
    m, n, k, _, _ = key
    for tile in tuning.CANDIDATES:
        for split in dict.fromkeys((1, rule.split)):
            t = tuning.Tile(tile.bm, tile.bn, tile.bk, tile.tm, tile.tn, split)
            fits = t.memory <= rt.target.workgroup_memory and t.threads <= rt.target.invocations
            if t not in out and fits and t.bm <= 2 * m and t.bn <= 2 * n and k >= t.bk * split:
                out.append(t)
    return out


def _dispatches(
    group: Sequence[Problem], key: Key, tile: tuning.Tile, rt: Any, buffers: Any, scalars: Any
) -> tuple[list[Any], Tables]:
    tables = Tables(buffers, rt.target, {}, scalars)
    with tuning.forced(key, tile):
        return tile_dispatches(group, tables, "tune"), tables


def _fill(rt: Any, group: Sequence[Problem], buffers: Any, scalars: Any, key: Key) -> list[dict[int, Any]]:
    """Sets of operand and result buffers, operands full of random numbers (zeros would run faster)."""
    dispatches, tables = _dispatches(group, key, tuning.rule(*key), rt, buffers, scalars)
    ids = [b for b in dict.fromkeys(b for d in dispatches for b in d.buffers) if b >= 0]
    total = sum(storage_bytes(tables, b) for b in ids)
    noise = np.random.default_rng(0).standard_normal(1 << 18, dtype=np.float32)
    sets = []
    for _ in range(max(1, min(_COPIES, _COLD_BYTES // max(1, total)))):
        handles = {b: rt.pool.acquire(storage_bytes(tables, b)) for b in ids}
        for b in ids:
            kind = storage_dtype(tables.dtype(b), rt.target.f16)
            if kind.kind == "f":
                rt.write(handles[b], np.resize(noise.astype(kind), tables.size(b)))
        sets.append(handles)
    return sets


def _recording(
    rt: Any, dispatches: Sequence[Any], tables: Tables, sets: Sequence[dict[int, Any]], uniform: Any
) -> tuple[list[Any], list[Any]]:
    """The dispatches on every set of buffers in turn, and what must stay alive meanwhile."""
    pipelines = rt.pipelines(dispatches)
    scratch = {b for d in dispatches for b in d.buffers if b < 0}
    triples, owners = [], []
    for known in sets:
        handles = {**known, **{b: rt.pool.acquire(storage_bytes(tables, b)) for b in scratch}}
        for dispatch, pipeline in zip(dispatches, pipelines):
            bound: list[Any] = [handles[b] for b in dispatch.buffers]
            if dispatch.uses_scalars:
                bound.append(uniform)
            triples.append((pipeline, rt.bind_group(rt.kinds(dispatch), bound), dispatch.grid))
        owners.append(handles)
    return fastpath.record(triples), [owners, triples]


def _measure(
    rt: Any, group: Sequence[Problem], key: Key, buffers: Any, scalars: Any
) -> list[tuple[float, tuning.Tile]]:
    uniform = rt.uniform(4 * len(scalars)) if scalars else None
    sets = _fill(rt, group, buffers, scalars, key)
    tiles = _candidates(key, rt)
    made = [_dispatches(group, key, tile, rt, buffers, scalars) for tile in tiles]
    rt.pipelines([d for dispatches, _ in made for d in dispatches])  # all at once: compiled in parallel
    recordings = [_recording(rt, dispatches, tables, sets, uniform) for dispatches, tables in made]
    start = time.perf_counter()
    while time.perf_counter() - start < _RAMP_S:  # compiling left the device idle
        rt.run(recordings[0][0] * 4)
        rt.finish()
    best = [float("inf")] * len(tiles)
    for _ in range(_ROUNDS):
        for i, (recording, _) in enumerate(recordings):
            once = best[i] if best[i] < float("inf") else timed_runs(rt, recording) / len(sets)
            repeat = max(1, min(50, int(_BURST_NS / max(once, 1e3) / len(sets))))
            best[i] = min(best[i], timed_runs(rt, recording * repeat) / (repeat * len(sets)))
    return list(zip(best, tiles))
