"""From compiled stages to a schedule: units, phases between barriers, temporaries. Used by ``compiler.py``.

All units of a phase are independent; a barrier separates phases. Phases follow the true dependencies of the program
(``KernelBase.after``), not its order, so independent kernels share a phase and barriers are few.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from tracejit.program import Kernel, Program
from tracejit_cpu.stages import Compiled

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
    early: bool = False  # could run long before its kernel: it only reads
    phase: int = 0


HEADER = 4  # slots before the buffers: units, their number, scratch base, scratch bytes per thread
UNIT_WORDS = (
    7  # function, slots, tasks, barrier before, first thread, tasks per grab (0: fixed shares), counters
)
COUNTER_BYTES = 64  # one counter per thread and unit, each on its own cache line
STEAL_NS = 30_000.0  # units of less estimated work are cut into fixed shares
GRABS = 8  # how often a thread comes back for more in its own share


UnitRow = tuple[int, list[int], int, int, int, int, bool]


@dataclass
class Layout:
    """Pointer table of a native part: header, one slot per buffer, one per temporary.

    ``temps`` are (size, offset) of the temporaries in the extra arena of ``extra`` bytes, or, when ``shared``, in the
    program's arena, which must have that size; ``scratch`` is per thread.
    ``units`` are [task function number, slots, tasks, phase, kernel, level within the kernel, worth stealing] in kernel
    order.
    """

    buffers: int
    temps: list[tuple[int, int]] = field(default_factory=list)
    extra: int = 0
    scratch: int = 0
    shared: bool = False
    units: list[UnitRow] = field(default_factory=list)

    @property
    def slots(self) -> int:
        """Length of the table."""
        return HEADER + self.buffers + len(self.temps)


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


@dataclass
class Place:
    """Bytes that are in use during some phases (several threads) and some kernels (one thread, or observed)."""

    begin: int
    end: int
    phases: tuple[int, int]
    kernels: tuple[int, int]

    def meets(self, other: Place) -> bool:
        """Whether both are in use at the same time under either order."""
        return any(
            a[0] <= b[1] and b[0] <= a[1]
            for a, b in ((self.phases, other.phases), (self.kernels, other.kernels))
        )


def _spans(units: Sequence[Unit]) -> tuple[tuple[int, int], tuple[int, int]]:
    """First and last phase, first and last kernel."""
    phases, kernels = [u.phase for u in units] or [0], [u.kernel for u in units] or [0]
    return (min(phases), max(phases)), (min(kernels), max(kernels))


class Planner:
    """Collects the units of a program and schedules them.

    ``whole`` says that nothing runs besides these units, so that their temporaries may use gaps of the program's arena.
    """

    def __init__(self, program: Program, whole: bool = True) -> None:
        self.program, self.whole = program, whole
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
            early = stage.only_reads is not None
            self.units.append(
                Unit(index, stage.function, slots, stage.tasks, stage.cost, sorted(set(deps)), early)
            )
            mine.append(number)
            self.scratch = max(self.scratch, stage.scratch)
        self.all_units[index].extend(mine)

    def finish(self) -> Layout:
        """Assign phases and place the temporaries."""
        for unit in self.units:
            unit.phase = 1 + max((self.units[d].phase for d in unit.deps), default=-1)
        self._delay()
        layout = Layout(len(self.program.buffers))
        layout.scratch = -(-self.scratch // 4096) * 4096 + 4096 if self.scratch else 0
        placed = self._arena() if self.whole else []
        layout.shared = self.whole
        offsets = [0] * len(self.temp_sizes)
        for t in sorted(range(len(offsets)), key=lambda t: -self.temp_sizes[t]):
            users = [self.units[u] for u in self.temp_users[t]]
            mine = Place(0, 0, *_spans(users))
            size = -(-self.temp_sizes[t] // ALIGN) * ALIGN + ALIGN
            at = 0
            for other in sorted(placed, key=lambda p: p.begin):
                if other.meets(mine) and at < other.end and other.begin < at + size:
                    at = -(-other.end // ALIGN) * ALIGN
            mine.begin, mine.end = at, at + size
            placed.append(mine)
            offsets[t] = at
            layout.extra = max(layout.extra, at + size)
        layout.temps = list(zip(self.temp_sizes, offsets))
        return layout

    def _arena(self) -> list[Place]:
        """Where and when the program's own temporaries live: packed operands and the like fit in between."""
        touching: dict[int, list[Unit]] = {}
        for index, kernel in enumerate(self.program.kernels):
            for touched in {*kernel.reads, *kernel.writes}:
                touching.setdefault(touched, []).extend(self.units[u] for u in self.all_units[index])
        places = []
        for b in self.program.buffers:
            if b.kind == "temp" and b.offset is not None and touching.get(b.id):
                places.append(Place(b.offset, b.offset + b.nbytes, *_spans(touching[b.id])))
        return places

    def _delay(self) -> None:
        """Move packing of operands next to its use: the copies live shortly and are still in a cache then."""
        needed: dict[int, int] = {}
        for unit in self.units:
            for d in unit.deps:
                needed[d] = min(needed.get(d, unit.phase), unit.phase)
        for number in reversed(range(len(self.units))):
            unit = self.units[number]
            if unit.early and number in needed:
                unit.phase = needed[number] - 1
                for d in unit.deps:
                    needed[d] = min(needed[d], unit.phase)


def describe_units(planner: Planner, tasks: Sequence[str]) -> list[UnitRow]:
    """The rows of ``Layout.units``; ``tasks`` are the names behind the function numbers."""
    number = {name: i for i, name in enumerate(tasks)}
    level: list[int] = []
    rows: list[UnitRow] = []
    for unit in planner.units:
        same = [level[d] for d in unit.deps if planner.units[d].kernel == unit.kernel]
        level.append(1 + max(same, default=-1))
        slots = [HEADER + s for s in unit.slots]
        steal = unit.cost > STEAL_NS
        rows.append((number[unit.function], slots, unit.tasks, unit.phase, unit.kernel, level[-1], steal))
    return rows


def driver_ir() -> str:
    """LLVM IR of ``tj_run``, for ``support.py``: it walks a program's list of units; it is the same for every program.

    Each thread owns a share of a unit's tasks and takes them piece by piece; done with its own, it takes from the others',
    so that a thread that lost its core for a while holds up nobody. Which thread runs a task does not change its result.
    A counter says how much of a share is taken; it is tagged with the number of the launch, so nobody resets it.
    """
    return f"""
define void @tj_run(ptr %tab, i64 %tid, i64 %nt, ptr %st) {{
entry:
  %units = load ptr, ptr %tab
  %count.p = getelementptr i64, ptr %tab, i64 1
  %count = load i64, ptr %count.p
  %base.p = getelementptr i64, ptr %tab, i64 2
  %base = load ptr, ptr %base.p
  %each.p = getelementptr i64, ptr %tab, i64 3
  %each = load i64, ptr %each.p
  %offset = mul i64 %each, %tid
  %scr = getelementptr i8, ptr %base, i64 %offset
  %alone = icmp eq i64 %nt, 1
  %launch = load i32, ptr %st
  %epoch = zext i32 %launch to i64
  br label %head
head:
  %i = phi i64 [ 0, %entry ], [ %i1, %next ]
  %more = icmp ult i64 %i, %count
  br i1 %more, label %body, label %done
body:
  %at = mul i64 %i, {UNIT_WORDS}
  %unit = getelementptr i64, ptr %units, i64 %at
  %fn = load ptr, ptr %unit
  %slots.p = getelementptr i64, ptr %unit, i64 1
  %slots = load ptr, ptr %slots.p
  %tasks.p = getelementptr i64, ptr %unit, i64 2
  %tasks = load i64, ptr %tasks.p
  br i1 %alone, label %whole, label %shared
whole:
  call void %fn(ptr %tab, ptr %slots, i64 0, i64 %tasks, ptr %scr)
  br label %next
shared:
  %wait.p = getelementptr i64, ptr %unit, i64 3
  %wait = load i64, ptr %wait.p
  %must = icmp ne i64 %wait, 0
  br i1 %must, label %barrier, label %split
barrier:
  call void @tj_barrier(ptr %st, i64 %nt)
  br label %split
split:
  %first.p = getelementptr i64, ptr %unit, i64 4
  %first = load i64, ptr %first.p
  %turned = add i64 %tid, %first
  %me = urem i64 %turned, %nt
  %chunk.p = getelementptr i64, ptr %unit, i64 5
  %chunk = load i64, ptr %chunk.p
  %counters.p = getelementptr i64, ptr %unit, i64 6
  %counters = load ptr, ptr %counters.p
  %fixed = icmp eq i64 %chunk, 0
  br label %victim
victim:
  %v = phi i64 [ 0, %split ], [ %v1, %exhausted ]
  %other = add i64 %me, %v
  %owner = urem i64 %other, %nt
  %part = mul i64 %owner, %tasks
  %lo = udiv i64 %part, %nt
  %part1 = add i64 %part, %tasks
  %hi = udiv i64 %part1, %nt
  br i1 %fixed, label %share, label %steal
share:
  %some = icmp ult i64 %lo, %hi
  br i1 %some, label %run, label %next
run:
  call void %fn(ptr %tab, ptr %slots, i64 %lo, i64 %hi, ptr %scr)
  br label %next
steal:
  %line = mul i64 %owner, {COUNTER_BYTES}
  %counter = getelementptr i8, ptr %counters, i64 %line
  br label %look
look:
  %word = load atomic i64, ptr %counter monotonic, align 8
  %when = lshr i64 %word, 32
  %now = icmp eq i64 %when, %epoch
  %taken = and i64 %word, 4294967295
  %before = select i1 %now, i64 %taken, i64 0
  %from = add i64 %lo, %before
  %left = icmp ult i64 %from, %hi
  br i1 %left, label %grab, label %exhausted
grab:
  %end = add i64 %from, %chunk
  %over = icmp ugt i64 %end, %hi
  %to = select i1 %over, i64 %hi, i64 %end
  %gone = sub i64 %to, %lo
  %tag = shl i64 %epoch, 32
  %mark = or i64 %tag, %gone
  %pair = cmpxchg ptr %counter, i64 %word, i64 %mark monotonic monotonic
  %mine = extractvalue {{ i64, i1 }} %pair, 1
  br i1 %mine, label %work, label %look
work:
  call void %fn(ptr %tab, ptr %slots, i64 %from, i64 %to, ptr %scr)
  br label %look
exhausted:
  %v1 = add i64 %v, 1
  %others = icmp ult i64 %v1, %nt
  br i1 %others, label %victim, label %next
next:
  %i1 = add i64 %i, 1
  br label %head
done:
  ret void
}}
"""
