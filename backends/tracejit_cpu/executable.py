"""Running a compiled program: memory, the native entry, the Python path for everything unusual, observed runs.

``tracejit_cpu.backend.compile`` makes one :class:`CpuExecutable` per program.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tracejit.backend import Timing
from tracejit.events import KernelInfo
from tracejit.forking import gate
from tracejit.program import AttentionKernel, Buffer, ContractKernel, LoopKernel, OpKernel, Program
from tracejit_cpu import codecache, entry, hostops, micro, plan, runtime
from tracejit_cpu.compiler import CompiledProgram, HostStep, Segment, build, compile_program
from tracejit_cpu.host import once

if TYPE_CHECKING:
    from tracejit.compilation import Stages

_KINDS = (
    (LoopKernel, "loop"),
    (ContractKernel, "contract"),
    (AttentionKernel, "attention"),
    (OpKernel, "op"),
)


@once
def driver_address() -> int:
    """Address of ``tj_run``."""
    return runtime.pool().loaded.address("tj_run")


@dataclass
class Stored:
    """A program from the disk cache: its code, the rows of :func:`kernel_rows`, and how to get at the rest."""

    compiled: CompiledProgram
    kernels: list[list[Any]]
    stages: Stages


def kernel_rows(program: Program) -> list[list[Any]]:
    """Name, kind, graph nodes, bytes and flops of each kernel."""
    kinds = [next((name for cls, name in _KINDS if isinstance(k, cls)), "op") for k in program.kernels]
    return [
        [k.name, kind, list(k.nodes), int(k.bytes), int(k.flops)] for k, kind in zip(program.kernels, kinds)
    ]


def aligned_bytes(size: int) -> np.ndarray:
    """Uninitialised memory at a 64-byte boundary."""
    raw = np.empty(size + 64, np.uint8)
    start = (-raw.ctypes.data) % 64
    return raw[start : start + size]


class Memory:
    """The memory of one running call: arena, temporaries, scratch, and one pointer table per native part."""

    def __init__(self, owner: CpuExecutable) -> None:
        program = owner.frame
        shared = [s.layout.extra for s in owner.segments if s.layout.shared]
        self.arena = aligned_bytes(max(program.arena, *shared, 1))
        threads = runtime.pool().threads
        self.loose: dict[int, np.ndarray] = {}
        self.tables: list[np.ndarray] = []
        self.parts: list[np.ndarray] = []
        self.units: list[UnitTables] = []
        pointers = np.zeros(len(program.buffers), np.int64)
        for b in program.buffers:
            if b.kind == "const":
                pointers[b.id] = owner.constants[b.index].ctypes.data
            elif b.kind == "temp" and b.offset is not None:
                pointers[b.id] = self.arena.ctypes.data + b.offset
            elif b.kind == "temp":
                self.loose[b.id] = aligned_bytes(max(b.nbytes, 1))
                pointers[b.id] = self.loose[b.id].ctypes.data
        for segment, functions in zip(owner.segments, owner.task_functions):
            layout = segment.layout
            table = np.zeros(layout.slots, np.int64)
            extra = self.arena if layout.shared else aligned_bytes(max(layout.extra, 1))
            count = threads if segment.parallel else 1
            scratch = aligned_bytes(max(layout.scratch * count, 1))
            table[plan.HEADER : plan.HEADER + len(pointers)] = pointers
            for t, (_, offset) in enumerate(layout.temps):
                table[plan.HEADER + layout.buffers + t] = extra.ctypes.data + offset
            units = UnitTables(layout, functions, count)
            table[0], table[1] = units.everything(segment.parallel)
            table[2], table[3] = scratch.ctypes.data, layout.scratch
            self.tables.append(table)
            self.units.append(units)
            self.parts += [extra, scratch]


def _recycle(kept: list[np.ndarray], shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array of ``kept`` that only ``kept`` refers to, else a new one; ``kept`` holds a few."""
    for array in kept:
        free = sys.getrefcount(array) == 3 and not weakref.getweakrefcount(array)  # kept, the loop, the call
        if free and array.shape == shape and array.dtype is dtype and array.flags.carray:
            return array
    new = np.empty(shape, dtype)
    if len(kept) >= entry.RING:
        kept.pop(0)
    kept.append(new)
    return new


class UnitTables:
    """The unit lists that ``tj_run`` walks: the whole part, or one kernel of it for observed runs."""

    def __init__(self, layout: plan.Layout, functions: Sequence[int], threads: int) -> None:
        self._layout, self._functions, self._threads = layout, functions, threads
        flat = [s for u in layout.units for s in u[1]]
        self._slots = np.array(flat or [0], np.int64)
        self._start = np.cumsum([0, *(len(u[1]) for u in layout.units)])
        self._kept: list[np.ndarray] = []
        self._single: dict[int, tuple[int, int]] = {}

    def _rows(self, chosen: Sequence[int], step: Sequence[int]) -> tuple[int, int]:
        """(address, length) of a list of units; ``step`` is the phase or level that decides where barriers are."""
        rows = np.zeros((max(1, len(chosen)), plan.UNIT_WORDS), np.int64)
        before, single = 0, 0
        for at, (i, now) in enumerate(zip(chosen, step)):
            number, _, tasks, *_, steal = self._layout.units[i]
            if now != before:
                single = 0
            first = single if tasks == 1 else 0  # lone tasks of a phase go to different threads
            single += tasks == 1
            rows[at] = (
                self._functions[number],
                self._slots.ctypes.data + 8 * self._start[i],
                tasks,
                now != before,
                first,
                *self._sharing(tasks, steal),
            )
            before = now
        self._kept.append(rows)
        return rows.ctypes.data, len(chosen)

    def _sharing(self, tasks: int, steal: bool) -> tuple[int, int]:
        """(tasks per grab, address of the counters) of a unit; zeros for fixed shares."""
        if not steal or self._threads < 2 or tasks < 2:
            return 0, 0
        counters = aligned_bytes(plan.COUNTER_BYTES * self._threads)
        counters[:] = 0
        self._kept.append(counters)
        return max(1, tasks // (plan.GRABS * self._threads)), counters.ctypes.data

    def everything(self, parallel: bool) -> tuple[int, int]:
        """All units: phase by phase for several threads, kernel by kernel for one."""
        units = self._layout.units
        order = sorted(range(len(units)), key=lambda i: units[i][3]) if parallel else range(len(units))
        return self._rows(list(order), [units[i][3] if parallel else 0 for i in order])

    def kernel(self, index: int) -> tuple[int, int]:
        """The units of one kernel."""
        if index not in self._single:
            units = self._layout.units
            order = sorted((i for i, u in enumerate(units) if u[4] == index), key=lambda i: units[i][5])
            self._single[index] = self._rows(order, [units[i][5] for i in order])
        return self._single[index]


class CpuExecutable:
    """A compiled program; see :class:`tracejit.backend.Executable`."""

    def __init__(self, program: Program, stored: Stored | None = None) -> None:
        #: Buffers, inputs, outputs and constants; the kernels too unless the program came from the disk cache.
        self.frame = program
        self._stored = stored
        self.constants = [np.ascontiguousarray(c) for c in program.constants]
        compiled: CompiledProgram = compile_program(program) if stored is None else stored.compiled
        self.steps, self.key = compiled.steps, compiled.key
        self.segments = [s for s in self.steps if isinstance(s, Segment)]
        pool = runtime.pool()
        symbols: dict[str, int] = {}
        for segment in self.segments:
            symbols.update({name: micro.support(name, spec) for name, spec in segment.support.items()})
        self._loaded = [codecache.Loaded(s.code, symbols) for s in self.segments]
        self.task_functions = [
            loaded.pointers("tj_tasks", 1 + max((u[0] for u in s.layout.units), default=-1))
            for s, loaded in zip(self.segments, self._loaded)
        ]
        self._driver = driver_address()
        self._threads = [pool.threads if s.parallel else 1 for s in self.segments]
        self._memory: Memory | None = None  # of the native entry
        self._spare: list[Memory] = []  # of calls through Python
        self._recycled: list[list[np.ndarray]] = [[] for b in program.buffers if b.kind == "output"]
        self._lock = threading.Lock()
        self._inputs = [program.buffers[b] for b in program.inputs]
        self._targets = [b for b in program.buffers if b.kind == "output"]
        self._host = hostops.HostOps(program, self._compile_graph)  # a stored program has no host steps
        self._source: list[str] | None = None
        self._live_bytes: np.ndarray | None = None
        rows = kernel_rows(program) if stored is None else stored.kernels
        self.kernels: Sequence[KernelInfo] = [self._info(i, *row) for i, row in enumerate(rows)]
        self._shapes = [tuple(node.shape) for node in program.graph.outputs]
        self._plain = list(program.outputs) == [b.id for b in self._targets]
        self._plain = self._plain and all(b.shape == s for b, s in zip(self._targets, self._shapes))
        self._entry: entry.Entry | None = None
        self._run: Any = self._first

    # -- kernels ------------------------------------------------------------------------------------------------------
    @property
    def program(self) -> Program:
        """The whole program; one that came from the disk cache is lowered again for whoever looks inside."""
        return self.frame if self._stored is None else self._stored.stages.program

    def _info(
        self, index: int, name: str, kind: str, nodes: Sequence[int], traffic: int, flops: int
    ) -> KernelInfo:
        return KernelInfo(index, name, kind, tuple(nodes), traffic, flops, lambda: self._kernel_source(index))

    def _sources(self) -> list[str]:
        """LLVM IR per kernel, made again on request: it is not kept."""
        if self._source is None:
            out = ["" for _ in self.program.kernels]
            parts, _ = build(self.program)
            for kernels, module, _layout, planner in parts:
                for unit in planner.units:
                    out[kernels[unit.kernel]] += module.functions[unit.function] + "\n"
            self._source = [text or "; runs in Python between native parts\n" for text in out]
        return self._source

    def _kernel_source(self, index: int) -> str:
        return self._sources()[index]

    def inspect(self) -> Mapping[str, str]:
        """LLVM IR and assembly of the whole program."""
        parts, _ = build(self.program)
        texts = [module.text() for _, module, _, _ in parts]
        return {"LLVM IR": "\n".join(texts), "assembly": "\n".join(codecache.to_assembly(t) for t in texts)}

    def _compile_graph(self, graph: Any) -> CpuExecutable:
        """Compile a sub-graph of a control-flow op."""
        from tracejit.lower import lower
        from tracejit_cpu import backend

        return CpuExecutable(lower(graph, backend.capabilities("")))

    # -- calls --------------------------------------------------------------------------------------------------------
    def __call__(self, inputs: Sequence[Any]) -> list[Any]:
        """Run once."""
        return self._run(inputs)

    def _first(self, inputs: Sequence[Any]) -> list[Any]:
        """The first call: allocate memory, make the native entry, start the workers."""
        with gate, self._lock:
            if self._entry is None and len(self.steps) == 1 and self.segments and entry.available():
                if self._threads[0] > 1:
                    runtime.pool().start()
                memory = Memory(self)
                self._entry = entry.Entry(
                    self._driver,
                    memory.tables[0],
                    self._threads[0],
                    [(b.dtype, b.shape, plan.HEADER + b.id) for b in self._inputs],
                    [(b.dtype, b.shape, plan.HEADER + b.id) for b in self._targets],
                    self._slow,
                )
                self._memory = memory
        if self._entry is not None:
            self._run = self._entry.call if self._plain else self._native_then_arrange
        else:
            self._run = self._slow
        return self._run(inputs)

    def _native_then_arrange(self, inputs: Sequence[Any]) -> list[Any]:
        """Outputs that are inputs, constants or repeated are copied from where they are."""
        assert self._entry is not None
        return self._arrange(self._entry.call(inputs), [np.asarray(x) for x in inputs])

    def _arrange(self, results: Sequence[np.ndarray], inputs: Sequence[np.ndarray]) -> list[Any]:
        where = {b.id: r for b, r in zip(self._targets, results)}
        out: list[Any] = []
        used: set[int] = set()
        for number, shape in zip(self.frame.outputs, self._shapes, strict=True):
            b = self.frame.buffers[number]
            if b.kind == "input":
                out.append(np.array(inputs[b.index], b.dtype, order="C", copy=True).reshape(shape))
            elif b.kind == "const":
                out.append(self.constants[b.index].reshape(shape).copy())
            else:
                value = where[number].reshape(shape) if where[number].shape != shape else where[number]
                out.append(value.copy() if number in used else value)
                used.add(number)
        return out

    def _slow(self, inputs: Sequence[Any]) -> list[Any]:
        """The Python path: unusual inputs, a second thread calling at once, host steps, the first call after a fork."""
        arrays = [self._plain_array(x, b) for x, b in zip(inputs, self._inputs, strict=True)]
        if self._entry is not None and any(a is not x for a, x in zip(arrays, inputs)):
            results: Sequence[Any] = self._entry.call(arrays)  # all it minds were the inputs
            return list(results)
        results = self._results()
        with self._borrowed() as memory:
            self._execute(memory, arrays, results)
        return list(results) if self._entry is not None else self._arrange(results, arrays)

    @contextlib.contextmanager
    def _borrowed(self) -> Iterator[Memory]:
        """Memory for one call through Python; it is kept for the next."""
        memory = self._spare_memory()
        yield memory  # not kept after an error: an interrupt may have left it half way
        if len(self._spare) < 2:
            self._spare.append(memory)

    def _spare_memory(self) -> Memory:
        try:
            return self._spare.pop()
        except IndexError:
            return Memory(self)

    def _results(self) -> list[np.ndarray]:
        """Arrays for the results: earlier ones that nobody refers to any more, or new ones."""
        return [_recycle(kept, b.shape, b.dtype) for kept, b in zip(self._recycled, self._targets)]

    @staticmethod
    def _plain_array(value: Any, buffer: Buffer) -> np.ndarray:
        array = np.asarray(value)
        if array.dtype != buffer.dtype or not array.dtype.isnative:
            array = array.astype(buffer.dtype)
        elif array.dtype is not buffer.dtype:  # equal, but another object than the native entry knows
            array = array.view(buffer.dtype)
        if not (array.flags.c_contiguous and array.flags.aligned):
            array = np.array(array, order="C", copy=True)
        return array

    def _set_pointers(
        self, memory: Memory, arrays: Sequence[np.ndarray], results: Sequence[np.ndarray]
    ) -> None:
        for table in memory.tables:
            for b, a in zip(self._inputs, arrays):
                table[plan.HEADER + b.id] = a.ctypes.data
            for b, r in zip(self._targets, results):
                table[plan.HEADER + b.id] = r.ctypes.data

    def _execute(self, memory: Memory, arrays: Sequence[np.ndarray], results: Sequence[np.ndarray]) -> None:
        self._set_pointers(memory, arrays, results)
        part = 0
        for step in self.steps:
            if isinstance(step, HostStep):
                self._host.run(step.kernel, self._views(memory, arrays, results))
            else:
                runtime.pool().run(self._driver, memory.tables[part].ctypes.data, self._threads[part])
                part += 1

    def _views(
        self, memory: Memory, arrays: Sequence[np.ndarray], results: Sequence[np.ndarray]
    ) -> hostops.Views:
        """A way to see any buffer as an array."""
        given = {b.id: a for b, a in zip(self._inputs, arrays)}
        given.update({b.id: r for b, r in zip(self._targets, results)})

        def view(buffer: int, shape: tuple[int, ...]) -> np.ndarray:
            b = self.frame.buffers[buffer]
            if b.kind == "const":
                return self.constants[b.index].reshape(shape)
            if buffer in given:
                return given[buffer].reshape(shape)
            raw = memory.loose[buffer] if b.offset is None else memory.arena[b.offset : b.offset + b.nbytes]
            return raw[: b.nbytes].view(b.dtype).reshape(shape)

        return view

    # -- observation --------------------------------------------------------------------------------------------------
    def observed(self, inputs: Sequence[Any]) -> tuple[list[Any], Timing]:
        """Run kernel by kernel and report when each ran."""
        arrays = [self._plain_array(x, b) for x, b in zip(inputs, self._inputs, strict=True)]
        results = self._results()
        with self._borrowed() as memory:
            timing = self._timed(memory, arrays, results)
        return self._arrange(results, arrays), timing

    def _timed(self, memory: Memory, arrays: Sequence[np.ndarray], results: Sequence[np.ndarray]) -> Timing:
        self._set_pointers(memory, arrays, results)
        count = len(self.kernels)
        order, start, end = [], np.zeros(count, np.int64), np.zeros(count, np.int64)
        pool = runtime.pool()
        at = part = 0
        for step in self.steps:
            if isinstance(step, HostStep):
                start[at] = time.perf_counter_ns()
                self._host.run(step.kernel, self._views(memory, arrays, results))
                end[at] = time.perf_counter_ns()
                order.append(step.kernel)
                at += 1
                continue
            table = memory.tables[part]
            whole = table[:2].copy()
            lists = [memory.units[part].kernel(local) for local in range(len(step.kernels))]
            for local, kernel in enumerate(step.kernels):
                table[:2] = lists[local]
                start[at] = time.perf_counter_ns()
                pool.run(self._driver, table.ctypes.data, self._threads[part])
                end[at] = time.perf_counter_ns()
                order.append(kernel)
                at += 1
            table[:2] = whole
            part += 1
        return Timing(np.array(order, np.uint32), start, end, self._live(order), np.zeros(count, np.uint8))

    def _live(self, order: Sequence[int]) -> np.ndarray:
        """Bytes of intermediate and output memory in use while each kernel runs (the same on every call)."""
        if self._live_bytes is None:
            self._live_bytes = self._count_live(order)
        return self._live_bytes

    def _count_live(self, order: Sequence[int]) -> np.ndarray:
        buffers = {b.id: b for b in self.program.buffers if b.kind in ("temp", "output")}
        first: dict[int, int] = {}
        last: dict[int, int] = {}
        for at, index in enumerate(order):
            kernel = self.program.kernels[index]
            for b in (*kernel.reads, *kernel.writes):
                if b in buffers:
                    first.setdefault(b, at)
                    last[b] = at
        live = np.zeros(len(order), np.int64)
        for b, at in first.items():
            until = len(order) if buffers[b].kind == "output" else last[b] + 1
            live[at:until] += buffers[b].nbytes
        return live
