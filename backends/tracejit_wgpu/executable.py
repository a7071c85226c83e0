"""A compiled program bound to a device: resolves buffers, keeps bind groups, runs one submission per call.

Made by the backend's ``compile``. A warm call does: outputs from the pool, one dictionary lookup for the recording of
these very buffers, one encode and submit. Temporaries belong to the executable and are given up under memory pressure.
"""

from __future__ import annotations

import os
import sys
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from sys import getrefcount
from typing import Any

import numpy as np

from tracejit.array import Array
from tracejit.backend import Timing
from tracejit.errors import DeviceLostError
from tracejit.events import KernelInfo
from tracejit.program import AttentionKernel, ContractKernel, Kernel, LoopKernel, Program
from tracejit_wgpu import fastpath, runtime
from tracejit_wgpu.compiler import Plan, Step, compile_plan, storage_bytes
from tracejit_wgpu.host import Context
from tracejit_wgpu.memory import Handle
from tracejit_wgpu.storage import WgpuStorage
from tracejit_wgpu.transfer import pack_scalar, to_storage

_RECORDINGS = 16
_MANY_RESULTS = 24  # from so many results on, a program keeps their handles (see ``_result_handles``)
_RESULT_SETS = 3
#: Reference counts are exact on CPython with the GIL only. A handle in one list, seen through map(): three references.
_COUNTED = sys.implementation.name == "cpython" and getattr(sys, "_is_gil_enabled", lambda: True)()
_UNSHARED = max(map(getrefcount, [object() for _ in range(2)]))
_SELECTING = frozenset({"take", "take_along_axis", "scatter_add", "scatter_add_along_axis"})
_ACCUMULATING = frozenset({"sum", "prod", "cumsum", "cumprod", "dot_general", "pow", "mul", "left_shift"})


def _kind(kernel: Kernel) -> str:
    if isinstance(kernel, LoopKernel):
        return "loop"
    if isinstance(kernel, ContractKernel):
        return "contract"
    return "attention" if isinstance(kernel, AttentionKernel) else "op"


class Executable:
    """See :class:`tracejit.backend.Executable`."""

    def __init__(self, program: Program, spec: str) -> None:
        self.program = program
        self.spec = spec
        self._buffers = {b.id: b for b in program.buffers}
        self._scalars = self._scalar_slots()
        self._inputs = [self._buffers[b] for b in program.inputs]
        nodes = getattr(program.graph, "outputs", ())
        shapes = [n.shape for n in nodes] if nodes else [self._buffers[b].shape for b in program.outputs]
        self._outputs = list(zip(program.outputs, shapes))
        self._quiet = self._indices_only()
        self._runtime: runtime.Runtime | None = None
        self._plan: Plan | None = None
        self._prepare(runtime.get(spec))
        self.kernels: Sequence[KernelInfo] = tuple(self._info(i, k) for i, k in enumerate(program.kernels))

    # ------------------------------------------------------------ building
    def _indices_only(self) -> frozenset[int]:
        """Positions of 64-bit integer inputs that only select or are compared: 32 bits lose nothing, so no warning."""
        graph = self.program.graph
        if not hasattr(graph, "users"):
            return frozenset()
        users, outputs = graph.users(), set(graph.outputs)
        quiet: set[int] = set()
        for position, node in enumerate(graph.inputs):
            if node.dtype.kind not in "iu" or node.dtype.itemsize < 8:
                continue
            stack, seen, only = [node], {node}, True
            while stack and only:
                value = stack.pop()
                only = value not in outputs
                for user in users[value]:
                    op = user.op.name
                    selects = op in _SELECTING and (user.inputs[0] is not value)
                    if selects or user.dtype.kind == "b":
                        continue
                    if user.dtype.kind not in "iu" or user.avals or op in _ACCUMULATING:
                        only = False
                    elif user not in seen:
                        seen.add(user)
                        stack.append(user)
            if only:
                quiet.add(position)
        return frozenset(quiet)

    def _scalar_slots(self) -> dict[int, int]:
        """Inputs that are weakly typed scalars travel in one uniform block."""
        slots: dict[int, int] = {}
        nodes = getattr(self.program.graph, "inputs", ())
        for position, buffer in enumerate(self.program.inputs):
            kind = nodes[position].attrs.get("kind") if position < len(nodes) else ""
            if kind in ("scalar", "weak") and buffer not in slots and buffer not in self.program.outputs:
                slots[buffer] = len(slots)
        return slots

    def _prepare(self, rt: runtime.Runtime) -> None:
        """Compile for a device (again after it was lost)."""
        program = self.program
        if os.environ.get("TRACEJIT_WGPU_TUNE", "0") == "1":
            from tracejit_wgpu.tuner import tune_program

            tune_program(rt, program, self._scalars)
        plan = compile_plan(program, rt.target, self.spec, self._scalars)
        for buffer in program.buffers:
            rt.pool.check(
                storage_bytes(plan.tables, buffer.id), f"a value of shape {buffer.shape or (buffer.size,)}"
            )
        dispatches = [s.dispatch for s in plan.steps if s.dispatch is not None]
        self._pipelines = rt.pipelines(dispatches)
        self._kinds = [rt.kinds(d) for d in dispatches]
        self._dispatches = dispatches
        self._groups: list[OrderedDict[tuple[int, ...], Any]] = [OrderedDict() for _ in dispatches]
        self._recordings: OrderedDict[tuple[int, ...], list[Any]] = OrderedDict()
        f16 = rt.target.f16
        self._consts = {
            b.id: rt.upload(to_storage(program.constants[b.index], b.dtype, f16, warn=False))
            for b in program.buffers
            if b.kind == "const"
        }
        self._uniform = rt.uniform(4 * len(self._scalars)) if self._scalars else None
        self._uniform_bytes = b""
        self._slots: list[Handle] = []
        self._fresh = [b for b in program.buffers if b.kind == "output"]
        self._fresh_bytes = {b.id: storage_bytes(plan.tables, b.id) for b in self._fresh}
        self._requests = [(rt.pool.size_for(n), n) for n in self._fresh_bytes.values()]
        self._fresh_ids = tuple(self._fresh_bytes)
        self._keep_results = _COUNTED and len(self._fresh_ids) >= _MANY_RESULTS
        self._result_sets: list[list[Handle]] = []
        self._plain_outputs = [
            (shape, self._buffers[number].dtype, self._buffers[number].size)
            for number, shape in self._outputs
        ]
        if [number for number, _ in self._outputs] != list(self._fresh_ids):
            self._plain_outputs = []
        self._input_slots = [(b.id, self._scalars.get(b.id, -1)) for b in self._inputs]
        self._quiet_ids = frozenset(self._inputs[p].id for p in self._quiet)
        self._segments = self._segment(plan.steps)
        self._runtime, self._plan = rt, plan
        rt.pool.caches.add(self)

    def _segment(self, steps: Sequence[Step]) -> list[tuple[int, int] | Step]:
        """Runs of dispatches (as ranges of dispatch numbers) with host steps between them."""
        out: list[tuple[int, int] | Step] = []
        start = number = 0
        for step in steps:
            if step.host is not None:
                if number > start:
                    out.append((start, number))
                out.append(step)
                start = number
            else:
                number += 1
        if number > start:
            out.append((start, number))
        return out

    def give_up(self) -> None:
        """Memory pressure: temporaries can be made again."""
        self._result_sets.clear()
        self._slots = []
        self._recordings.clear()
        for cache in self._groups:
            cache.clear()

    def _info(self, number: int, kernel: Kernel) -> KernelInfo:
        return KernelInfo(
            id=number,
            name=kernel.name,
            kind=_kind(kernel),
            nodes=kernel.nodes,
            bytes=kernel.bytes,
            flops=kernel.flops,
            source=lambda: self._source(number),
        )

    def _source(self, number: int) -> str:
        assert self._plan is not None
        parts = []
        for step in self._plan.steps:
            if step.kernel != number:
                continue
            if step.dispatch is not None:
                d = step.dispatch
                parts.append(
                    f"// {d.label}: grid {d.grid[0]} x {d.grid[1]} x {d.grid[2]} workgroups\n{d.code}"
                )
            elif step.host is not None:
                parts.append(f"// {step.host.label}: runs on the host\n")
        return "\n".join(parts)

    def inspect(self) -> Mapping[str, str]:
        """The WGSL of every kernel and what runs how."""
        assert self._plan is not None and self._runtime is not None
        wgsl = "\n".join(f"// ==== kernel {k.id}: {k.name}\n{self._source(k.id)}" for k in self.kernels)
        lines = [
            f"{len(self._dispatches)} dispatches, {len(self._plan.slot_sizes)} temporary buffers, "
            f"{sum(self._plan.slot_sizes):,} bytes on {self._runtime.adapter.name}"
        ]
        for step in self._plan.steps:
            if step.dispatch is not None:
                lines.append(
                    f"kernel {step.kernel}: {step.dispatch.label} grid {step.dispatch.grid} buffers {step.dispatch.buffers}"
                )
            elif step.host is not None:
                lines.append(f"kernel {step.kernel}: {step.host.label} on the host")
        return {"WGSL": wgsl, "dispatches": "\n".join(lines)}

    # ------------------------------------------------------------ running
    def __call__(self, inputs: Sequence[Any]) -> list[Any]:
        """Queue one run; the arrays returned are there when the device gets to them."""
        rt = self._live()
        with rt.lock:
            held, outputs = self._bind(rt, inputs)
            key = tuple([h.buffer.uid for h in held.values()])
            for segment in self._segments:
                if isinstance(segment, Step):
                    self._host(rt, segment, held, inputs)
                else:
                    rt.run(self._recording(rt, key, held, segment))
            return outputs

    def _live(self) -> runtime.Runtime:
        rt = self._runtime
        if rt is None or rt.dead is not None:
            rt = runtime.get(self.spec)
            self._prepare(rt)
        return rt

    def _bind(self, rt: runtime.Runtime, inputs: Sequence[Any]) -> tuple[dict[int, Handle], list[Any]]:
        """Handles of all inputs and outputs of this call, and the arrays to return."""
        held: dict[int, Handle] = {}
        packed: list[bytes] = [b"\0\0\0\0"] * len(self._scalars)
        values: dict[int, Any] = {}
        for (number, slot), value in zip(self._input_slots, inputs):
            if slot >= 0:
                packed[slot] = pack_scalar(value, self._buffers[number].dtype)
                continue
            if type(value) is Array:
                storage = value.storage
                if type(storage) is WgpuStorage and storage.runtime is rt:
                    held[number] = storage.handle
                    values[number] = value
                    continue
            held[number] = self._upload(rt, value, number)
        if self._uniform is not None:
            data = b"".join(packed)
            data += b"\0" * (-len(data) % 16)
            if data != self._uniform_bytes:
                rt.write_uniform(self._uniform, data)
                self._uniform_bytes = data
        fresh = self._result_handles(rt)
        held.update(zip(self._fresh_ids, fresh))
        if not self._slots and self._plan is not None and self._plan.slot_sizes:
            self._slots = [rt.pool.acquire(n) for n in self._plan.slot_sizes]
        if self._plain_outputs:  # the common case: every result lies in a buffer of its own
            return held, [
                Array(shape, dtype, WgpuStorage(rt, handle, size, dtype))
                for (shape, dtype, size), handle in zip(self._plain_outputs, fresh)
            ]
        outputs = []
        for number, shape in self._outputs:
            known = values.get(number)
            if known is None or known.shape != shape:  # views of one buffer share it
                buffer = self._buffers[number]
                storage = WgpuStorage(rt, self._handle(number, held), buffer.size, buffer.dtype)
                known = Array(shape, buffer.dtype, storage)
            values[number] = known
            outputs.append(known)
        return held, outputs

    def _result_handles(self, rt: runtime.Runtime) -> list[Handle]:
        """Buffers for the results of this call.

        A step with hundreds of results would spend most of its host time on giving buffers back and taking them again:
        it keeps the handles of its last calls, and takes a set up again once nobody else refers to any of it.
        """
        if not self._keep_results:
            return rt.pool.acquire_all(self._requests)
        for old in self._result_sets:
            if max(map(getrefcount, old)) <= _UNSHARED:
                return list(old)
        fresh = rt.pool.acquire_all(self._requests)
        self._result_sets.append(list(fresh))
        if len(self._result_sets) > _RESULT_SETS:
            del self._result_sets[0]
        return fresh

    def _upload(self, rt: runtime.Runtime, value: Any, number: int) -> Handle:
        dtype, warn = self._buffers[number].dtype, number not in self._quiet_ids
        if isinstance(value, Array):
            value = np.asarray(value)  # lives on another device
        weak = isinstance(value, bool | int | float)
        return rt.upload(to_storage(value, dtype, rt.target.f16, warn=warn and not weak))

    def _handle(self, buffer: int, held: Mapping[int, Handle]) -> Handle:
        found = held.get(buffer)
        if found is None:
            found = self._consts.get(buffer)
        if found is None:
            assert self._plan is not None
            found = self._slots[self._plan.slot_of[buffer]]
        return found

    def _recording(
        self, rt: runtime.Runtime, key: tuple[int, ...], held: Mapping[int, Handle], part: tuple[int, int]
    ) -> list[Any]:
        """The (pipeline, bind group, grid) list of a segment for exactly these buffers, from the cache if possible."""
        place = (*key, part[0])
        found = self._recordings.get(place)
        if found is not None:
            self._recordings.move_to_end(place)
            return found
        triples = []
        for number in range(*part):
            dispatch = self._dispatches[number]
            handles: list[Any] = [self._handle(b, held) for b in dispatch.buffers]
            mine = tuple(h.buffer.uid for h in handles)
            cache = self._groups[number]
            group = cache.get(mine)
            if group is None:
                if dispatch.uses_scalars:
                    handles.append(self._uniform)
                group = cache[mine] = rt.bind_group(self._kinds[number], handles)
                if len(cache) > 2 * _RECORDINGS:
                    cache.popitem(last=False)
            else:
                cache.move_to_end(mine)
            triples.append((self._pipelines[number], group, dispatch.grid))
        found = fastpath.record(triples)
        kept = self._recordings[place] = _Kept(found, triples)
        if len(self._recordings) > _RECORDINGS * len(self._segments):
            self._recordings.popitem(last=False)
        return kept

    def _host(
        self, rt: runtime.Runtime, step: Step, held: Mapping[int, Handle], inputs: Sequence[Any]
    ) -> None:
        assert step.host is not None and self._plan is not None
        by_id = {b.id: v for b, v in zip(self._inputs, inputs)}
        step.host.run(Context(rt, lambda b: self._handle(b, held), self._plan.tables, by_id.__getitem__))

    # ------------------------------------------------------------ observing
    def observed(self, inputs: Sequence[Any]) -> tuple[list[Any], Timing]:
        """Run once with times per kernel: timestamps inside the pass, per pass, or host clocks, as the device allows."""
        from tracejit_wgpu.observe import timed_segment

        rt = self._live()
        assert self._plan is not None
        numbers: list[int] = []
        starts: list[int] = []
        ends: list[int] = []
        kernel_of = [s.kernel for s in self._plan.steps if s.dispatch is not None]
        with rt.lock:
            held, outputs = self._bind(rt, inputs)
            key = tuple([h.buffer.uid for h in held.values()])
            for segment in self._segments:
                if isinstance(segment, Step):
                    rt.finish()
                    begin = time.perf_counter_ns()
                    self._host(rt, segment, held, inputs)
                    numbers.append(segment.kernel)
                    starts.append(begin)
                    ends.append(time.perf_counter_ns())
                else:
                    recording = self._recording(rt, key, held, segment)
                    for number, begin, end in timed_segment(
                        rt, recording, kernel_of[segment[0] : segment[1]]
                    ):
                        numbers.append(number)
                        starts.append(begin)
                        ends.append(end)
            rt.finish()
        base = sum(self._fresh_bytes.values())
        live = np.array([self._plan.live[n] + base for n in numbers], np.int64)
        timing = Timing(
            np.array(numbers, np.uint32),
            np.array(starts, np.int64),
            np.array(ends, np.int64),
            live,
            np.zeros(len(numbers), np.uint8),
        )
        return outputs, timing


class _Kept(list[Any]):
    """A raw recording that keeps the objects behind its handles alive."""

    __slots__ = ("owners",)

    def __init__(self, raw: list[Any], owners: list[Any]) -> None:
        super().__init__(raw)
        self.owners = owners


__all__ = ["DeviceLostError", "Executable"]
