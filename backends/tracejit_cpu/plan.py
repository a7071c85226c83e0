"""From compiled stages to a schedule: units, phases between barriers, temporaries. Used by ``compiler.py``.

All units of a phase are independent; a barrier separates phases. Phases follow the true dependencies of the program
(``KernelBase.after``), not its order, so independent kernels share a phase and barriers are few.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from tracejit.program import Kernel, Program
from tracejit_cpu.irbuilder import Fn, Module
from tracejit_cpu.loops import Compiled

ALIGN = 64


@dataclass
class Unit:
    """A call of one compiled function: ``slots`` are positions in the program's pointer table."""

    kernel: int
    function: str
    slots: list[int]
    tasks: int
    cost: float
    deps: list[int]
    phase: int = 0


@dataclass
class Layout:
    """Pointer table: one slot per buffer, then one per temporary, then scratch and the kernel selector.

    ``temps`` are (size, offset) of the temporaries in the extra arena of ``extra`` bytes; ``scratch`` is per thread.
    """

    buffers: int
    temps: list[tuple[int, int]] = field(default_factory=list)
    extra: int = 0
    scratch: int = 0

    @property
    def scratch_slot(self) -> int:
        """Slot of the scratch base pointer."""
        return self.buffers + len(self.temps)

    @property
    def select_slot(self) -> int:
        """Slot of the kernel number for observed runs."""
        return self.scratch_slot + 1

    @property
    def slots(self) -> int:
        """Length of the table."""
        return self.scratch_slot + 2


def byte_range(program: Program, buffer: int) -> tuple[str, int, int]:
    """Where a buffer lives: (memory space, first byte, end). Buffers in the arena may overlap."""
    b = program.buffers[buffer]
    if b.kind == "temp" and b.offset is not None:
        return "arena", b.offset, b.offset + max(b.nbytes, 1)
    return f"buffer{b.id}", 0, max(b.nbytes, 1)


def overlaps(program: Program, a: int, b: int) -> bool:
    """Whether two buffers share memory."""
    if a == b:
        return True
    x, y = byte_range(program, a), byte_range(program, b)
    return x[0] == y[0] and x[1] < y[2] and y[1] < x[2]


class Planner:
    """Collects the units of a program and schedules them."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.units: list[Unit] = []
        self.temp_sizes: list[int] = []
        self.temp_users: list[list[int]] = []
        self.last_units: list[list[int]] = []  # per kernel: its final units
        self.all_units: list[list[int]] = []
        self.scratch = 0

    def start_kernel(self) -> None:
        """Begin the next kernel of the program."""
        self.last_units.append([])
        self.all_units.append([])

    def _writers(self, index: int, buffers: Sequence[int]) -> list[int]:
        """Units of the last earlier kernels that wrote memory of ``buffers``."""
        out: list[int] = []
        for wanted in buffers:
            for k in range(index - 1, -1, -1):
                kernel: Kernel = self.program.kernels[k]
                if any(overlaps(self.program, wanted, w) for w in kernel.writes):
                    out.extend(self.all_units[k])
                    if wanted in kernel.writes:
                        break
        return out

    def add(self, compiled: Compiled, buffers: Sequence[int]) -> None:
        """Add the stages of one compiled body of the current kernel; ``buffers`` maps local numbers to buffer ids."""
        index = len(self.last_units) - 1
        kernel = self.program.kernels[index]
        first_temp = len(self.temp_sizes)
        self.temp_sizes.extend(compiled.temps)
        self.temp_users.extend([] for _ in compiled.temps)
        base_deps = [u for k in kernel.after for u in self.all_units[k]]
        mine: list[int] = []
        total = len(self.program.buffers)
        for position, stage in enumerate(compiled.stages):
            if stage.only_reads is not None:
                deps = self._writers(index, [buffers[b] for b in stage.only_reads])
            elif stage.after is not None:
                deps = [mine[s] for s in stage.after] + base_deps
            else:
                deps = [mine[-1], *base_deps] if position else list(base_deps)
            number = len(self.units)
            slots = []
            for p in stage.pointers:
                if p >= 0:
                    slots.append(buffers[p])
                else:
                    slots.append(total + first_temp + ~p)
                    self.temp_users[first_temp + ~p].append(number)
            self.units.append(Unit(index, stage.function, slots, stage.tasks, stage.cost, sorted(set(deps))))
            mine.append(number)
            self.scratch = max(self.scratch, stage.scratch)
        self.all_units[index].extend(mine)

    def finish(self) -> Layout:
        """Assign phases and place the temporaries."""
        for unit in self.units:
            unit.phase = 1 + max((self.units[d].phase for d in unit.deps), default=-1)
        spans = []
        for t, users in enumerate(self.temp_users):
            phases = [self.units[u].phase for u in users] or [0]
            spans.append((min(phases), max(phases), t))
        placed: list[tuple[int, int, int, int]] = []  # offset, end, first, last
        offsets = [0] * len(spans)
        end = 0
        for first, last, t in sorted(spans, key=lambda s: -self.temp_sizes[s[2]]):
            size = -(-self.temp_sizes[t] // ALIGN) * ALIGN + ALIGN
            at = 0
            for low, high, f, l in sorted(placed):
                if f <= last and first <= l and at < high and low < at + size:
                    at = high
            placed.append((at, at + size, first, last))
            offsets[t] = at
            end = max(end, at + size)
        layout = Layout(len(self.program.buffers), list(zip(self.temp_sizes, offsets)), end)
        layout.scratch = -(-self.scratch // 4096) * 4096 + 4096 if self.scratch else 0
        return layout


def emit_driver(module: Module, planner: Planner, layout: Layout, kernels: int) -> None:
    """Emit the entry points: ``seq`` (one thread), ``par`` (all threads), ``one`` (a single kernel, for observation)."""
    units = planner.units
    module.declare("declare void @tj_barrier(ptr, i64)")
    args = "ptr %tab, i64 %tid, i64 %nt, ptr %st"

    def call(fn: Fn, unit: Unit, low: str, high: str, scratch: str) -> None:
        pointers = [fn.op(f"load ptr, ptr {fn.gep('%tab', s, 'ptr')}") for s in unit.slots]
        params = ", ".join([*(f"ptr {p}" for p in pointers), f"i64 {low}", f"i64 {high}", f"ptr {scratch}"])
        fn.emit(f"call void @{unit.function}({params})")

    def begin(name: str, extra: str = "") -> tuple[Fn, str]:
        fn = Fn(module, name, args + extra, linkage="")
        base = fn.op(f"load ptr, ptr {fn.gep('%tab', layout.scratch_slot, 'ptr')}")
        scratch = fn.gep(base, fn.op(f"mul i64 %tid, {layout.scratch}"), "i8")
        return fn, scratch

    fn, scratch = begin("seq")
    for unit in units:
        call(fn, unit, "0", str(unit.tasks), scratch)
    fn.finish()

    def share(fn: Fn, unit: Unit, rotation: int, scratch: str) -> None:
        if unit.tasks == 1:
            owner = fn.op(f"urem i64 {rotation}, %nt") if rotation else "0"
            with fn.when(fn.op(f"icmp eq i64 %tid, {owner}")):
                call(fn, unit, "0", "1", scratch)
            return
        part = fn.op(f"mul i64 %tid, {unit.tasks}")
        low = fn.op(f"udiv i64 {part}, %nt")
        high = fn.op(f"udiv i64 {fn.op(f'add i64 {part}, {unit.tasks}')}, %nt")
        with fn.when(fn.op(f"icmp ult i64 {low}, {high}")):
            call(fn, unit, low, high, scratch)

    fn, scratch = begin("par")
    last = max((u.phase for u in units), default=0)
    for phase in range(last + 1):
        if phase:
            fn.emit("call void @tj_barrier(ptr %st, i64 %nt)")
        rotation = 0
        for unit in (u for u in units if u.phase == phase):
            share(fn, unit, rotation, scratch)
            rotation += unit.tasks == 1
    fn.finish()

    fn, scratch = begin("one")
    which = fn.op(f"load i64, ptr {fn.gep('%tab', layout.select_slot, 'ptr')}")
    labels = [fn.new_label("k") for _ in range(kernels)]
    done = fn.new_label("done")
    cases = " ".join(f"i64 {i}, label %{label}" for i, label in enumerate(labels))
    fn.emit(f"switch i64 {which}, label %{done} [ {cases} ]")
    for index, label in enumerate(labels):
        fn.label(label)
        mine = [u for u in units if u.kernel == index]
        level: dict[int, int] = {}
        for u in mine:
            number = units.index(u)
            level[number] = 1 + max((level[d] for d in u.deps if d in level), default=-1)
        for step in range(max(level.values(), default=-1) + 1):
            if step:
                fn.emit("call void @tj_barrier(ptr %st, i64 %nt)")
            for number, at in level.items():
                if at == step:
                    share(fn, units[number], 0, scratch)
        fn.emit(f"br label %{done}")
    fn.label(done)
    fn.finish()
