"""What all plans of loop kernels share: tasks, the vector loop with its tail, and which instructions belong where.

``loops.py`` builds the plans on :class:`Nest`, by way of ``reductions.py`` and ``splits.py``.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence, Set

from tracejit_cpu.body import Emitter, Local, body_cost, dependencies, is_full, lanes_for, levels
from tracejit_cpu.irbuilder import Fn, Module, mask_first
from tracejit_cpu.stages import Stage


def choose_vector_axis(local: Local, vector_bytes: int) -> int:
    """The axis whose accesses are contiguous most often; -1 for a body without axes."""
    lanes = lanes_for(local.instrs, vector_bytes)
    best, best_score = -1, -math.inf
    for axis, size in enumerate(local.domain):
        score = 0.0
        for ins in local.instrs:
            if ins.buffer < 0:
                continue
            gathered = any(axis in local.instrs[p].axes for p, _, _ in ins.gather)
            stride = ins.strides[axis]
            if gathered or stride not in (0, 1, -1):
                score -= 6
            elif stride == 1:
                score += 8 if ins.op == "store" else 6
            elif stride == -1:
                score += 3
            else:
                score += 0.5
        score += 3.0 * min(1.0, size / lanes) + 2.0 * size / max(1, -(-size // lanes) * lanes)
        if size < lanes:
            score -= 4.0 * (1 - size / lanes)
        if axis in local.reduce:
            score += 0.01
        if score >= best_score:
            best, best_score = axis, score
    return best


class Nest:
    """The loop nest of one :class:`Local` under construction: its axes, lanes, levels and finished stages."""

    def __init__(self, module: Module, local: Local, name: str, defer_stores: bool) -> None:
        self.module, self.local, self.name, self.defer = module, local, name, defer_stores
        self.v = choose_vector_axis(local, module.host.vector_bytes)
        self.V = lanes_for(local.instrs, module.host.vector_bytes) if self.v >= 0 else 1
        if self.v >= 0:
            while (
                self.V > 2 and local.domain[self.v] <= self.V // 2
            ):  # whole short vectors, not masked long ones
                self.V //= 2
        self.level = levels(local)
        self.reduces = [i for i, x in enumerate(local.instrs) if x.op == "reduce"]
        # the last sweep: of a value per element, or of a reduce whose operand is the same for every element
        swept = [i for i, x in enumerate(local.instrs) if is_full(local, i) or x.op == "reduce"]
        self.top = max((self.level[i] for i in swept), default=0)
        self.rows = self.v in local.reduce
        self.par = [a for a in range(len(local.domain)) if a not in local.reduce and a != self.v]
        self.red = [a for a in range(len(local.domain)) if a in local.reduce and a != self.v]
        self.cost = body_cost(local)
        # Two registers per value where a formula has more constants than there are registers: each is loaded once for both.
        self.wide = self.V > 1 and not local.reduce and self.cost >= 18 and module.host.registers <= 16
        if self.wide and local.domain[self.v] >= 4 * self.V:
            self.V *= 2
        self.size = math.prod(local.domain)
        self.temps: list[int] = []
        self.stages: list[Stage] = []
        self.scratch = 0
        self.chosen: list[int] | None = None  # replaces _targets while a chunk is swept for some of them only
        self._arg_value = ""

    def _begin(self, stage: int, temps: Sequence[int]) -> tuple[Fn, Emitter, list[str]]:
        count = len(self.local.buffers)
        params = [f"ptr %b{i}" for i in range(count)] + [f"ptr %p{t}" for t in temps]
        fn = Fn(self.module, f"{self.name}_{stage}", ", ".join([*params, "i64 %lo", "i64 %hi", "ptr %scr"]))
        emitter = Emitter(fn, self.local, [f"%b{i}" for i in range(count)], self.V, self.v)
        return fn, emitter, [f"%p{t}" for t in temps]

    def _end(self, fn: Fn, temps: Sequence[int], tasks: int, points: float) -> None:
        fn.finish()
        pointers = list(range(len(self.local.buffers))) + [~t for t in temps]
        per_vector = self.cost * 0.45
        self.stages.append(
            Stage(fn.name, pointers, tasks, points / max(self.V, 1) * per_vector, self.scratch)
        )

    def _needed(self, targets: Sequence[int], stop: Set[int] = frozenset()) -> set[int]:
        """Full-level instructions that ``targets`` need, except those in ``stop``."""
        out: set[int] = set()
        work = list(targets)
        while work:
            i = work.pop()
            if i in out or i in stop or (self.local.instrs[i].op == "reduce" and i not in targets):
                continue
            if not is_full(self.local, i) and i not in targets:
                continue
            out.add(i)
            work.extend(dependencies(self.local.instrs[i]))
        return out

    def _targets(self, level: int) -> list[int]:
        """Reduces and full-level stores that belong to sweep ``level``."""
        if self.chosen is not None:
            return self.chosen
        out = []
        for i, ins in enumerate(self.local.instrs):
            if ins.op == "reduce" and self.level[i] == level:
                out.append(i)
            if ins.op == "store" and is_full(self.local, i):
                at = self.top if self.defer else self.level[i]
                if at == level:
                    out.append(i)
        return out

    def _span(self) -> int:
        return math.prod(self.local.domain[a] for a in self.local.reduce)

    def _emit_depth(
        self, em: Emitter, order: Sequence[int], depth: int, wanted: Callable[[int], bool]
    ) -> None:
        """Emit the instructions whose innermost axis is at position ``depth`` of ``order`` (0: no axis)."""
        position = {a: k + 1 for k, a in enumerate(order)}
        for i, ins in enumerate(self.local.instrs):
            at = max((position.get(a, 99) for a in ins.axes), default=0)
            if at == depth and wanted(i):
                copies = len(em.lane_index) if self.v in ins.axes else 1
                for u in range(copies):
                    em.emit(i, u)

    def _nest(
        self,
        em: Emitter,
        order: Sequence[int],
        axes: Sequence[int],
        depth: int,
        wanted: Callable[[int], bool],
        innermost: Callable[[int], None],
    ) -> None:
        """Loops over ``axes``, one in the other, each with the instructions of its depth; ``innermost(depth)`` inside."""
        if not axes:
            innermost(depth)
            return
        with em.fn.loop(0, self.local.domain[axes[0]]) as i:
            em.index[axes[0]] = i
            saved = dict(em.shared)
            self._emit_depth(em, order, depth, wanted)
            self._nest(em, order, axes[1:], depth + 1, wanted, innermost)
            em.shared = saved

    @contextlib.contextmanager
    def _task_loop(self, em: Emitter, axes: Sequence[int], extra: int = 0) -> Iterator[str]:
        """Loop over tasks; the prefix ``axes`` are decoded from the task number, yields the remaining ``extra`` part."""
        fn = em.fn
        with fn.loop("%lo", "%hi") as task:
            rest = task
            tail = "0"
            if extra > 1:
                if axes:
                    tail = fn.op(f"urem i64 {rest}, {extra}")
                    rest = fn.op(f"udiv i64 {rest}, {extra}")
                else:
                    tail = rest
            for k, axis in enumerate(reversed(axes)):
                if k == len(axes) - 1:
                    em.index[axis] = rest
                else:
                    size = self.local.domain[axis]
                    em.index[axis] = fn.op(f"urem i64 {rest}, {size}")
                    rest = fn.op(f"udiv i64 {rest}, {size}")
            yield tail

    def _vector_loop(
        self, em: Emitter, low: str, high: str, unroll: int, size: int, body: Callable[[], None], whole: bool
    ) -> None:
        """Run ``body`` along the vector axis over [low, high) (a multiple of the step unless it ends at ``size``)."""
        fn, V = em.fn, self.V
        if V == 1:
            with fn.loop(low, high) as i:
                self._copies(em, i, 1, None, body)
            return
        main = size // (V * unroll) * V * unroll
        single = size // V * V
        if main:
            stop = str(main) if whole else fn.imin(high, main)
            if whole and main == V * unroll:
                self._copies(em, "0", unroll, None, body)
            else:
                with fn.loop(low, stop, V * unroll) as i:
                    self._copies(em, i, unroll, None, body)
        if main == size:
            return

        def rest() -> None:
            if single > main:
                if single - main == V:
                    self._copies(em, str(main), 1, None, body)
                else:
                    with fn.loop(main, single, V) as i:
                        self._copies(em, i, 1, None, body)
            if size > single:
                self._copies(em, str(single), 1, mask_first(size - single, V), body)

        if whole:
            rest()
        else:
            with fn.when(fn.op(f"icmp eq i64 {high}, {size}")):
                rest()

    def _copies(self, em: Emitter, base: str, count: int, mask: str | None, body: Callable[[], None]) -> None:
        em.lane_index = [em.fn.iadd(base, u * self.V) for u in range(count)]
        em.mask = mask
        saved_shared, saved_copies = dict(em.shared), em.copies
        em.copies = [{} for _ in range(count)]
        body()
        em.shared, em.copies = saved_shared, saved_copies
        em.lane_index, em.mask = [], None

    def _unroll(self, live: int) -> int:
        if self.V == 1:
            return 1
        if self.wide:
            return 1
        return 4 if self.cost <= 10 and live <= 6 else 2 if self.cost <= 40 else 1

    def _before_reduces(self) -> Callable[[int], bool]:
        """Row-level instructions that do not depend on a reduce."""
        local = self.local
        return lambda i: self.level[i] == 0 and not is_full(local, i) and local.instrs[i].op != "reduce"

    def _row_level(self, em: Emitter, level: int) -> None:
        """Row-level instructions that become ready after the reduces of level ``level - 1``."""
        for i, ins in enumerate(self.local.instrs):
            if self.level[i] == level and level > 0 and not is_full(self.local, i) and ins.op != "reduce":
                for u in range(max(1, len(em.lane_index)) if self.v in ins.axes else 1):
                    em.emit(i, u)
