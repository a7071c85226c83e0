"""Temporary memory of the native CPU backend: small, and never shared by what is in use at the same time."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

import tracejit as tj
from tests.backend import cpu_identity
from tests.benchmarks import peer_tracejit, workloads
from tracejit_cpu.compiler import build
from tracejit_cpu.executable import CpuExecutable, Memory


def entry_of(name):
    """The cache entry of a benchmark workload's train step, and its inputs."""
    data, params = workloads.make(name)
    opt, step = peer_tracejit.train_step(name)
    entry, leaves = step._entry_for((params, opt.init(params), data["x"], data["y"]), {"device": "cpu"})
    return entry, entry.gather(leaves)


def test_a_gpt_step_needs_little_more_than_what_is_alive():
    entry, _ = entry_of("c")
    program, executable = entry.program, entry.executable
    (segment,) = executable.segments
    assert segment.layout.shared
    assert program.arena <= 1.1 * program.live_bound
    everything = Memory(executable).arena.nbytes + sum(
        b.nbytes for b in program.buffers if b.kind == "temp" and b.offset is None
    )
    assert everything <= 1.1 * program.live_bound  # packed operands of products included
    assert segment.layout.scratch < 1 << 20


@pytest.mark.parametrize("name", ["b", "c", "h"])
def test_what_is_in_use_at_the_same_time_has_memory_of_its_own(name):
    entry, _ = entry_of(name)
    program = entry.program
    ((_, _, layout, planner),), _ = build(program)
    assert layout.shared
    used = {}  # (what) -> (begin, end, units)
    for t, (size, offset) in enumerate(layout.temps):
        used["temp", t] = (offset, offset + size, planner.temp_users[t])
    for b in program.buffers:
        if b.kind == "temp" and b.offset is not None:
            kernels = [i for i, k in enumerate(program.kernels) if b.id in (*k.reads, *k.writes)]
            units = [u for k in kernels for u in planner.all_units[k]]
            if units:
                used["buffer", b.id] = (b.offset, b.offset + b.nbytes, units)
    assert max(end for _, end, _ in used.values()) <= max(program.arena, layout.extra)
    phases = [u.phase for u in planner.units]
    kernels = [u.kernel for u in planner.units]
    overlapping = 0
    for (a, (low, high, mine)), (b, (begin, end, others)) in itertools.combinations(used.items(), 2):
        if a[0] == b[0] == "buffer" or low >= end or begin >= high:
            continue
        overlapping += 1
        for order in (phases, kernels):
            first, second = sorted(
                (min(order[u] for u in us), max(order[u] for u in us)) for us in (mine, others)
            )
            assert first[1] < second[0], (a, b)
    assert overlapping or name == "b"


@pytest.mark.parametrize("name", ["b", "h"])
def test_nothing_is_read_before_it_is_written(name):
    entry, inputs = entry_of(name)
    executable = entry.executable
    want = [np.array(x) for x in executable(inputs)]
    for filler in (0xFF, 0x7F):  # NaN; huge
        spare = executable._spare_memory()
        executable._spare.append(spare)
        for memory in (executable._memory, spare):
            memory.arena[:] = filler
            for part in memory.parts:
                part[:] = filler
        for got in (executable(inputs), executable._slow(inputs), executable.observed(inputs)[0]):
            for g, w in zip(got, want, strict=True):
                np.testing.assert_array_equal(g, w)


def test_programs_with_python_steps_do_not_share_the_arena():
    @tj.trace
    def f(x):
        y = np.tanh(x @ x.T / 30) @ x
        z = tj.while_loop(lambda s: np.abs(s).max() < 1e3, lambda s: s * 2, y)
        return z @ x.T, np.sort(y @ x.T, axis=0)

    x = np.random.default_rng(0).standard_normal((200, 200))
    parts, _ = build(f._entry_for((x,), {"device": "cpu"})[0].program)
    assert parts and not any(layout.shared for _, _, layout, _ in parts)
    for got, want in zip(f(x, device="cpu"), f(x, device="numpy"), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-9)


def test_the_identity_programs_agree_in_every_way_of_running():
    for make in cpu_identity.PROGRAMS:
        run = make()
        want = cpu_identity.digest(run())
        with tj.events.observe(tj.events.Recorder()):
            assert cpu_identity.digest(run()) == want, make.__name__


def test_scratch_is_per_thread():
    f = tj.trace(lambda x: x @ x.T, device="cpu")
    x = np.ones((300, 300), np.float32)
    executable: CpuExecutable = f._entry_for((x,), {})[0].executable
    memory, (segment,) = Memory(executable), executable.segments
    threads = executable._threads[0]
    assert memory.parts[-1].nbytes >= segment.layout.scratch * threads > 0
    assert memory.tables[0][3] == segment.layout.scratch
