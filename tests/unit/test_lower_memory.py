"""The memory plan and the schedule: nothing alive overlaps, every hazard is in ``after``, peaks stay near the bound."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from tests.unit import lower_workloads as workloads
from tests.unit.lower_random import RandomGraph
from tests.unit.lower_workloads import SMALL, check, optimised
from tracejit.lower import lower
from tracejit.lower.memory import ALIGN, lives, same_addresses
from tracejit.lower.structure import kernel_key
from tracejit.program import Capabilities, LoopKernel, Program


def programs() -> list[Program]:
    out = []
    for name in ("a", "c", "f", "h"):
        fn, args = SMALL[name]()
        out.append(lower(optimised(fn, *args)[0], Capabilities()))
    for seed in range(60):
        graph, _ = RandomGraph(seed, 30).graph()
        out.append(lower(graph, Capabilities()))
    return out


@pytest.fixture(scope="module")
def many() -> list[Program]:
    return programs()


def reachable(program: Program) -> list[set[int]]:
    """For each kernel, all kernels that are known to have finished before it."""
    out: list[set[int]] = []
    for k in program.kernels:
        before: set[int] = set()
        for j in k.after:
            before |= out[j] | {j}
        out.append(before)
    return out


def ranges(program: Program, ids: Sequence[int]) -> list[tuple[int, int, int]]:
    found = []
    for i in ids:
        b = program.buffers[i]
        if b.kind == "output":
            found.append((i, 0, 1))
        elif b.kind == "temp":
            assert b.offset is not None
            found.append((-1, b.offset, b.offset + b.nbytes))
    return found


def meet(a: list[tuple[int, int, int]], b: list[tuple[int, int, int]]) -> bool:
    return any(x[0] == y[0] and x[1] < y[2] and y[1] < x[2] for x in a for y in b)


def test_every_hazard_is_ordered(many: list[Program]) -> None:
    for p in many:
        before = reachable(p)
        for j, k in enumerate(p.kernels):
            assert all(i < j for i in k.after)
            for i in range(j):
                first = p.kernels[i]
                conflict = (
                    meet(ranges(p, first.writes), ranges(p, k.reads))
                    or meet(ranges(p, first.writes), ranges(p, k.writes))
                    or meet(ranges(p, first.reads), ranges(p, k.writes))
                )
                assert not conflict or i in before[j], (p.name, i, j)


def test_live_temporaries_do_not_overlap(many: list[Program]) -> None:
    for p in many:
        alive = list(lives(p.kernels, p.buffers).values())
        for i, a in enumerate(alive):
            b = p.buffers[a.buffer]
            assert b.offset is not None and b.offset % ALIGN == 0 and b.offset + b.nbytes <= p.arena
            for other in alive[:i]:
                if a.first > other.last or other.first > a.last:
                    continue
                one, two = ranges(p, [a.buffer]), ranges(p, [other.buffer])
                if not meet(one, two):
                    continue
                # In-place reuse: one dies in the kernel that makes the other, at the same addresses.
                old, new = (other, a) if other.first < a.first else (a, other)
                kernel = p.kernels[new.first]
                assert old.last == new.first and isinstance(kernel, LoopKernel)
                assert same_addresses(kernel.bodies[0], old.buffer, new.buffer)


def test_temporaries_are_written_before_they_are_read(many: list[Program]) -> None:
    for p in many:
        written: set[int] = {b.id for b in p.buffers if b.kind in ("input", "const")}
        for k in p.kernels:
            assert set(k.reads) - set(k.writes) <= written, k.name
            written |= set(k.writes)
        assert set(p.outputs) <= written


def test_gpt_step_stays_within_a_tenth_of_the_bound() -> None:
    for layers in (2, 4):
        fn, args = workloads.gpt(layers, 64, 2, 32, 4, 64)
        program = lower(optimised(fn, *args)[0], Capabilities())
        assert program.arena <= 1.1 * program.live_bound


def test_separate_outputs_have_no_offsets() -> None:
    fn, args = SMALL["f"]()
    program = check(*optimised(fn, *args), Capabilities(separate_outputs=True))
    assert program.arena == 0
    assert all(b.offset is None for b in program.buffers)


def test_inputs_that_are_outputs_are_passed_on() -> None:
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    program = check(*optimised(lambda x: (x, x.reshape(3, 2), x + 1), x))
    assert program.outputs[:2] == (program.inputs[0], program.inputs[0])
    assert len(program.kernels) == 1


def test_one_value_as_two_outputs_is_stored_once() -> None:
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    program = check(*optimised(lambda x: (lambda y: (y, y, y.reshape(-1)))(np.tanh(x)), x))
    assert len(set(program.outputs)) == 1


def test_equal_layers_share_structure() -> None:
    """A backend compiles as many kernels for five layers as for three."""
    kinds = []
    for layers in (3, 5):
        fn, args = workloads.gpt(layers, 32, 2, 16, 2, 24)
        program = lower(optimised(fn, *args)[0], Capabilities(horizontal=1))
        kinds.append(len({kernel_key(k, program.buffers)[0] for k in program.kernels}))
    assert kinds[1] == kinds[0]


def test_kernels_know_their_cost() -> None:
    x = np.ones((64, 32), np.float32)
    w = np.ones((32, 16), np.float32)
    (product,) = check(*optimised(lambda x, w: x @ w, x, w)).kernels
    assert product.flops == 2 * 64 * 32 * 16
    assert product.bytes == 4 * (64 * 32 + 32 * 16 + 64 * 16)
    (loop,) = check(*optimised(lambda x: x + 1, x)).kernels
    assert (loop.bytes, loop.flops) == (2 * x.nbytes, x.size)
