"""Program -> plan: which dispatches and host steps run, in what order, and which temporaries share memory.

``compile_plan`` turns every kernel into :class:`Step` objects by the generator for its kind; ``executable.py`` binds the
plan to buffers and runs it. Ops without a generator run their NumPy reference on the host between submissions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np

from tracejit.program import AttentionKernel, ContractKernel, Kernel, LoopKernel, OpKernel, Program
from tracejit_wgpu import wgsl
from tracejit_wgpu.emit import Dispatch, Tables, Target
from tracejit_wgpu.loops import loop_dispatches


@dataclass(frozen=True)
class HostStep:
    """A step that runs in Python between submissions: reads operands to the host, or drives sub-programs.

    ``run(context)`` gets the executable's :class:`tracejit_wgpu.host.Context`.
    """

    label: str
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    run: Callable[[Any], None]


@dataclass(frozen=True)
class Step:
    """One dispatch or host step, and the position in ``Program.kernels`` of the kernel that it belongs to."""

    kernel: int
    dispatch: Dispatch | None = None
    host: HostStep | None = None

    @property
    def buffers(self) -> tuple[int, ...]:
        """Buffer ids that it touches."""
        if self.dispatch is not None:
            return self.dispatch.buffers
        assert self.host is not None
        return (*self.host.reads, *self.host.writes)


@dataclass
class Plan:
    """Everything that does not depend on a device's state. ``slot_of`` maps a temporary or scratch buffer to a slot."""

    steps: list[Step]
    tables: Tables
    slot_of: dict[int, int] = field(default_factory=dict)
    slot_sizes: list[int] = field(default_factory=list)
    live: list[int] = field(default_factory=list)


#: ``generator(kernel, tables) -> list of Dispatch``; None when the generator does not take these sizes.
OpGenerator = Callable[[OpKernel, Tables], "list[Dispatch] | None"]


def op_generators() -> dict[str, OpGenerator]:
    """Native lowerings of OpKernels, by op."""
    from tracejit_wgpu import conv, scatter, sorting

    return {**conv.GENERATORS, **scatter.GENERATORS, **sorting.GENERATORS}


def kernel_steps(kernel: Kernel, number: int, tables: Tables, spec: str) -> list[Step]:
    """The steps of one kernel."""
    dispatches: list[Dispatch] | None
    match kernel:
        case LoopKernel():
            dispatches = loop_dispatches(kernel.bodies, tables, kernel.name)
        case ContractKernel():
            from tracejit_wgpu.contract import contract_dispatches

            dispatches = contract_dispatches(kernel.problems, tables, kernel.name)
        case AttentionKernel():
            from tracejit_wgpu.attention import attention_dispatches

            dispatches = attention_dispatches(kernel, tables)
        case OpKernel():
            from tracejit_wgpu.host import CONTROL, control_step, reference_steps

            if kernel.op in CONTROL:
                return [Step(number, host=control_step(kernel, tables, spec))]
            generator = op_generators().get(kernel.op)
            dispatches = generator(kernel, tables) if generator is not None else None
            if dispatches is None:
                return reference_steps(kernel, number, tables)
    return [Step(number, dispatch=d) for d in dispatches]


def compile_plan(program: Program, target: Target, spec: str, scalars: dict[int, int]) -> Plan:
    """All steps of a program and its memory plan."""
    buffers = {b.id: b for b in program.buffers}
    tables = Tables(buffers, target, _aliases(program, buffers, target), scalars)
    steps: list[Step] = []
    for number, kernel in enumerate(program.kernels):
        steps.extend(kernel_steps(kernel, number, tables, spec))
    plan = Plan(steps, tables)
    _assign(program, plan)
    return plan


def _spans(program: Program) -> dict[int, tuple[int, int]]:
    """First and last kernel that touches each temporary."""
    spans: dict[int, tuple[int, int]] = {}
    temps = {b.id for b in program.buffers if b.kind == "temp"}
    for number, kernel in enumerate(program.kernels):
        for buffer in (*kernel.reads, *kernel.writes):
            if buffer in temps:
                spans[buffer] = (spans.get(buffer, (number, 0))[0], number)
    return spans


def _aliases(program: Program, buffers: dict[int, Any], target: Target) -> dict[int, int]:
    """Temporaries that the lowering placed on a dying operand of the kernel that makes them: updated in place."""
    spans = _spans(program)
    out: dict[int, int] = {}
    for number, kernel in enumerate(program.kernels):
        if not isinstance(kernel, LoopKernel):
            continue
        taken: set[int] = set()
        for new in kernel.writes:
            mine = buffers[new]
            if mine.kind != "temp" or mine.offset is None or spans[new][0] != number or new in out:
                continue
            for old in kernel.reads:
                theirs = buffers[old]
                if old == new or theirs.kind != "temp" or theirs.offset != mine.offset or old in taken:
                    continue
                same = wgsl.storage_type(mine.dtype, target.f16) == wgsl.storage_type(
                    theirs.dtype, target.f16
                )
                if spans[old][1] == number and same and mine.size == theirs.size:
                    root = out.get(old, old)
                    out[new] = root
                    taken.add(old)
                    break
    return out


def _assign(program: Program, plan: Plan) -> None:
    """Slots for temporaries and scratch: reuse what died in an earlier kernel, separate buffers otherwise."""
    tables = plan.tables
    spans: dict[int, tuple[int, int]] = {}
    for step in plan.steps:
        for buffer in step.buffers:
            root = tables.alias.get(buffer, buffer)
            if root >= 0 and tables.buffers[root].kind != "temp":
                continue
            spans[root] = (spans.get(root, (step.kernel, 0))[0], step.kernel)
    ends: dict[int, list[int]] = {}
    starts: dict[int, list[int]] = {}
    for buffer, (first, last) in spans.items():
        starts.setdefault(first, []).append(buffer)
        ends.setdefault(last, []).append(buffer)

    def nbytes(buffer: int) -> int:
        return tables.size(buffer) * wgsl.storage_dtype(tables.dtype(buffer), tables.target.f16).itemsize

    free: list[int] = []
    alive = 0
    for number in range(len(program.kernels)):
        for buffer in sorted(starts.get(number, ()), key=nbytes, reverse=True):
            need = max(256, (nbytes(buffer) + 255) // 256 * 256)
            fits = [s for s in free if need <= plan.slot_sizes[s] <= 2 * need]
            if fits:
                slot = min(fits, key=lambda s: plan.slot_sizes[s])
                free.remove(slot)
            else:
                slot = len(plan.slot_sizes)
                plan.slot_sizes.append(need)
            plan.slot_of[buffer] = slot
            alive += nbytes(buffer)
        plan.live.append(alive)
        for buffer in ends.get(number, ()):
            free.append(plan.slot_of[buffer])
            alive -= nbytes(buffer)
    for buffer, root in tables.alias.items():
        if root in plan.slot_of:
            plan.slot_of[buffer] = plan.slot_of[root]


def elements(shape: Sequence[int]) -> int:
    """Number of elements of a shape."""
    return prod(int(s) for s in shape)


def storage_bytes(tables: Tables, buffer: int) -> int:
    """Bytes of a buffer on the device."""
    return tables.size(buffer) * wgsl.storage_dtype(tables.dtype(buffer), tables.target.f16).itemsize


__all__ = ["HostStep", "Plan", "Step", "compile_plan", "np"]
