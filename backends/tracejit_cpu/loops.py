"""Loop kernels: elementwise nests, reductions and row pipelines. ``compile_body`` is called by ``compiler.py`` per LoopBody.

A body becomes one function per stage, ``void f(ptr..., i64 lo, i64 hi, ptr scratch)``, that runs the tasks ``lo..hi``.
How a body is cut into tasks depends on shapes only, never on the number of threads: results are bit-identical for any
number. Four plans exist:

* elementwise: no reduce axes; lanes along the axis with most contiguous accesses;
* rows: lanes along a reduce axis, one horizontal reduction at the end of a sweep;
* columns: lanes along a parallel axis, accumulators per lane;
* split: too few rows (or columns) for the machine: fixed chunks write partial results, a second stage combines them.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from tracejit_cpu import mathlib
from tracejit_cpu.body import (
    ARG,
    Emitter,
    Ins,
    Local,
    body_cost,
    dependencies,
    is_full,
    lanes_for,
    levels,
)
from tracejit_cpu.stages import Compiled, Stage
from tracejit_cpu.irbuilder import Fn, Module, const, iota, mask_first, type_bytes, value_type, vec

KEEP_LIMIT = 1 << 17  # bytes of one kept row in a thread's scratch memory
_NO_INDEX = (1 << 63) - 1


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


class LoopCompiler:
    """Compiles one :class:`Local`."""

    def __init__(self, module: Module, local: Local, name: str, defer_stores: bool) -> None:
        self.module, self.local, self.name, self.defer = module, local, name, defer_stores
        self.v = choose_vector_axis(local, module.host.vector_bytes)
        self.V = lanes_for(local.instrs, module.host.vector_bytes) if self.v >= 0 else 1
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

    # -- common -----------------------------------------------------------------------------------------------------
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

    def _needed(self, targets: Sequence[int], stop: set[int] = frozenset()) -> set[int]:  # type: ignore[assignment]
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

    # -- elementwise --------------------------------------------------------------------------------------------------
    def elementwise(self) -> None:
        """No reduce axes."""
        size = self.local.domain[self.v] if self.v >= 0 else 1
        order = [*self.par, self.v] if self.v >= 0 else []
        unroll = self._unroll(len(self.local.buffers))
        step = self.V * unroll
        outer = math.prod(self.local.domain[a] for a in self.par)
        grain = max(2048 // max(1, self.cost // 20), -(-size // 256))
        grain = -(-grain // step) * step
        chunks = 1
        if outer < 64 and size > 2 * grain:
            chunks = -(-size // grain)
        # the shortest prefix of the outer axes that gives enough tasks, each of a sensible size
        prefix, tasks = [], 1
        wanted = min(64, max(1, outer * size * self.cost // 20000))
        for axis in self.par:
            if tasks >= wanted and chunks == 1 and prefix:
                break
            prefix.append(axis)
            tasks *= self.local.domain[axis]
        block = 1
        if len(prefix) == 1 and chunks == 1 and size * self.cost < 4096:
            pass
        fn, em, _ = self._begin(0, [])
        self._emit_depth(em, order, 0, lambda i: True)
        inner = self.par[len(prefix) :]
        with self._task_loop(em, prefix, chunks) as chunk:
            for d in range(1, len(prefix) + 1):
                self._emit_depth(em, order, d, lambda i: True)

            def nest(rest: Sequence[int], depth: int) -> None:
                if rest:
                    with fn.loop(0, self.local.domain[rest[0]]) as i:
                        em.index[rest[0]] = i
                        saved = dict(em.shared)
                        self._emit_depth(em, order, depth, lambda i: True)
                        nest(rest[1:], depth + 1)
                        em.shared = saved
                    return
                if self.v < 0:
                    return
                low, high = "0", str(size)
                if chunks > 1:
                    low = fn.imul(chunk, grain)
                    high = fn.imin(fn.iadd(low, grain), size)
                self._vector_loop(
                    em,
                    low,
                    high,
                    unroll,
                    size,
                    lambda: self._emit_depth(em, order, depth, lambda i: True),
                    chunks == 1,
                )

            nest(inner, len(prefix) + 1)
        self._end(fn, [], tasks * chunks * block, self.size)

    # -- reductions -----------------------------------------------------------------------------------------------------
    def _kept(self) -> dict[int, int]:
        """Costly full-level values used in more than one sweep -> byte offset of their row in scratch."""
        local = self.local
        span = math.prod(local.domain[a] for a in local.reduce)
        width = span if self.rows else span * self.V * 8
        needs = [self._needed(self._targets(l)) for l in range(self.top + 1)]
        kept: dict[int, int] = {}
        for i, ins in enumerate(local.instrs):
            if self.v not in ins.axes or ins.op in ("store", "reduce") or not is_full(local, i):
                continue
            if mathlib.cost(ins.op) < 5 and not ins.gather:
                continue
            if i in self._row_divided and mathlib.cost(ins.op) == mathlib.cost("div"):
                continue
            if sum(i in n for n in needs) < 2:
                continue
            ty = value_type(ins.dtype)
            if ty == "i1" or (width + 64) * type_bytes(ty) > KEEP_LIMIT:
                continue
            kept[i] = self.scratch
            self.scratch += -(-((width + 64) * type_bytes(ty)) // 64) * 64
        return kept

    def _targets(self, level: int) -> list[int]:
        """Reduces and full-level stores that belong to sweep ``level``."""
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

    def _find_row_divisions(self) -> None:
        """Divisions of a full-level value by a row-level one that came from a reduce: done with a reciprocal."""
        self._row_divided: set[int] = set()
        if not self.rows:
            return
        derived = [False] * len(self.local.instrs)
        for i, ins in enumerate(self.local.instrs):
            derived[i] = any(derived[d] or self.local.instrs[d].op == "reduce" for d in dependencies(ins))
            derived[i] = derived[i] or ins.op == "reduce"
            if ins.op == "div" and ins.dtype.kind == "f" and is_full(self.local, i):
                divisor = ins.args[1]
                if not is_full(self.local, divisor) and derived[divisor]:
                    self._row_divided.add(i)

    def compile(self) -> Compiled:
        """Choose the plan and emit all stages."""
        if self.size == 0 and not self.reduces:
            return Compiled([])
        if not self.local.reduce:
            self.elementwise()
            return Compiled(self.stages, self.temps)
        self._find_row_divisions()
        span = self._span()
        outer = self.size // max(span, 1)
        if span == 0 or outer == 0:
            if (
                outer == 0
                and math.prod(
                    self.local.domain[a] for a in range(len(self.local.domain)) if a not in self.local.reduce
                )
                == 0
            ):
                return Compiled([])
        if self.rows:
            if outer < 16 and span >= 32768:
                self._split_rows(span, outer)
            else:
                self._rows_plan()
        elif (
            self.top == 0
            and span >= 64
            and self._single_level()
            and not any(self.local.instrs[i].attrs["kind"] in ARG for i in self.reduces)
        ):
            self._split_columns(span)
        else:
            self._columns_plan()
        return Compiled(self.stages, self.temps)

    def _single_level(self) -> bool:
        return not any(i.op == "store" and is_full(self.local, k) for k, i in enumerate(self.local.instrs))

    def _rows_plan(self) -> None:
        outer = math.prod(self.local.domain[a] for a in self.par)
        prefix, tasks = [], 1
        wanted = min(64, max(1, self.size * self.cost // 20000))
        for axis in self.par:
            if tasks >= wanted and prefix:
                break
            prefix.append(axis)
            tasks *= self.local.domain[axis]
        del outer
        kept = self._kept()
        fn, em, _ = self._begin(0, [])
        em.fast_div = self._row_divided
        order = [*self.par, *self.red, self.v]
        pre = self._before_reduces()
        self._emit_depth(em, order, 0, pre)
        with self._task_loop(em, prefix):
            for d in range(1, len(prefix) + 1):
                self._emit_depth(em, order, d, pre)

            def nest(rest: Sequence[int], depth: int) -> None:
                if rest:
                    with fn.loop(0, self.local.domain[rest[0]]) as i:
                        em.index[rest[0]] = i
                        saved = dict(em.shared)
                        self._emit_depth(em, order, depth, pre)
                        nest(rest[1:], depth + 1)
                        em.shared = saved
                    return
                saved = dict(em.shared)
                self._sweeps(em, order, depth, kept, range(self.top + 1))
                em.shared = saved

            nest(self.par[len(prefix) :], len(prefix) + 1)
        self._end(fn, [], tasks, self.size)

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

    def _sweeps(
        self,
        em: Emitter,
        order: Sequence[int],
        depth: int,
        kept: dict[int, int],
        which: Sequence[int],
        chunk: tuple[int, str, str, int] | None = None,
    ) -> None:
        """All sweeps of one row (or of one block of columns), with row-level code between them."""
        saved: set[int] = set()
        for level in which:
            self._row_level(em, level)
            divisors = {
                self.local.instrs[i].args[1]
                for i in self._needed(self._targets(level), saved)
                if i in self._row_divided
            }
            for d in sorted(divisors):
                em.prepare_reciprocal(d)
            self._one_sweep(em, order, depth, kept, saved, level, chunk)
            saved |= {i for i in kept if i in self._needed(self._targets(level))}
        last = max(which, default=0) + 1
        top_row = max((self.level[i] for i, x in enumerate(self.local.instrs)), default=0)
        for level in range(last, top_row + 1):
            self._row_level(em, level)

    def _one_sweep(
        self,
        em: Emitter,
        order: Sequence[int],
        depth: int,
        kept: dict[int, int],
        saved: set[int],
        level: int,
        chunk: tuple[int, str, str, int] | None,
    ) -> None:
        targets = self._targets(level)
        if not targets:
            return
        fn, local = em.fn, self.local
        needed = self._needed(targets, saved)
        reuse = {i for i in saved if any(i in dependencies(local.instrs[k]) for k in needed) or i in targets}
        reduces = [i for i in targets if local.instrs[i].op == "reduce"]
        sweep_cost = sum(mathlib.cost(local.instrs[i].op) for i in needed)
        if self.rows:
            unroll = 4 if sweep_cost <= 12 else 2
            size = local.domain[self.v]
            while unroll > 1 and size < self.V * unroll:
                unroll //= 2
        else:
            unroll = len(em.lane_index)
        accs = {i: [self._accumulator(em, i) for _ in range(unroll)] for i in reduces}

        def wanted(i: int) -> bool:
            return i in needed and local.instrs[i].op != "reduce"

        def innermost() -> None:
            for u in range(len(em.lane_index)):
                for i in sorted(reuse):
                    em.put(i, u, self._scratch(em, i, kept[i], u, None))
            self._emit_depth(em, order, len(order), wanted)
            for u in range(len(em.lane_index)):
                for i in kept:
                    if i in needed and i not in saved:
                        self._scratch(em, i, kept[i], u, em.raw(i, u))
                for i in reduces:
                    self._accumulate(em, i, accs[i][u if u < len(accs[i]) else 0], u)

        def nest(rest: Sequence[int], at: int) -> None:
            if rest:
                axis = rest[0]
                low, high = "0", str(local.domain[axis])
                if chunk is not None and chunk[0] == axis:
                    low, high = chunk[1], chunk[2]
                with fn.loop(low, high) as i:
                    em.index[axis] = i
                    before = dict(em.shared), [dict(c) for c in em.copies]
                    if self.rows or rest[1:]:
                        self._emit_depth(em, order, at, wanted)
                        nest(rest[1:], at + 1)
                    else:
                        innermost()
                    em.shared, em.copies = before
                return
            if self.rows:
                low, high, whole = "0", str(local.domain[self.v]), True
                if chunk is not None and chunk[0] == self.v:
                    low, high, whole = chunk[1], chunk[2], False
                self._vector_loop(em, low, high, unroll, local.domain[self.v], innermost, whole)
            else:
                innermost()

        if not self.rows:
            em_lane_index = em.lane_index
        nest(self.red, depth)
        if not self.rows:
            em.lane_index = em_lane_index
        for i in reduces:
            self._finish_reduce(em, i, accs[i])

    # -- accumulators -----------------------------------------------------------------------------------------------------
    def _acc_lanes(self, i: int) -> int:
        if self.rows:
            return self.V
        return self.V if self.v in self.local.instrs[i].axes else 1

    def _accumulator(self, em: Emitter, i: int) -> tuple[str, str]:
        ins = self.local.instrs[i]
        lanes = self._acc_lanes(i)
        source = self.local.instrs[ins.args[0]].dtype
        kind = ins.attrs["kind"]
        if kind in ARG:
            ty = value_type(source)
            start = mathlib.identity("max" if kind == "argmax" else "min", source)
            value = em.fn.var(vec(ty, lanes), const(start, ty, lanes))
            return value, em.fn.var(vec("i64", lanes), const(_NO_INDEX, "i64", lanes))
        ty = value_type(ins.dtype)
        return em.fn.var(vec(ty, lanes), const(mathlib.identity(kind, ins.dtype), ty, lanes)), ""

    def _accumulate(self, em: Emitter, i: int, slot: tuple[str, str], u: int) -> None:
        fn, ins = em.fn, self.local.instrs[i]
        lanes, kind = self._acc_lanes(i), ins.attrs["kind"]
        source = self.local.instrs[ins.args[0]].dtype
        x = em.value(ins.args[0], u, lanes)
        if kind in ARG:
            self._accumulate_arg(em, i, slot, u, x, lanes)
            return
        if source != ins.dtype:
            x = mathlib.convert(fn, x, source, ins.dtype, lanes)
        ty = value_type(ins.dtype)
        if self.rows and em.mask is not None:
            neutral = const(mathlib.identity(kind, ins.dtype), ty, lanes)
            x = fn.op(f"select <{lanes} x i1> {em.mask}, {vec(ty, lanes)} {x}, {vec(ty, lanes)} {neutral}")
        full = vec(ty, lanes)
        fn.set(full, mathlib.combine(fn, kind, ins.dtype, lanes, fn.get(full, slot[0]), x), slot[0])

    def _accumulate_arg(self, em: Emitter, i: int, slot: tuple[str, str], u: int, x: str, lanes: int) -> None:
        fn, ins, local = em.fn, self.local.instrs[i], self.local
        source = local.instrs[ins.args[0]].dtype
        ty = value_type(source)
        strides = tuple(local.rstrides.get(a, 0) for a in range(len(local.domain)))
        at = em.linear(strides, 0, u)
        where = fn.splat(at, "i64", lanes)
        if self.rows and lanes > 1:
            where = fn.op(f"add <{lanes} x i64> {where}, {iota('i64', lanes, local.rstrides[self.v])}")
        if self.rows and em.mask is not None:
            start = const(
                mathlib.identity("max" if ins.attrs["kind"] == "argmax" else "min", source), ty, lanes
            )
            x = fn.op(f"select <{lanes} x i1> {em.mask}, {vec(ty, lanes)} {x}, {vec(ty, lanes)} {start}")
            none = const(_NO_INDEX, "i64", lanes)
            where = fn.op(f"select <{lanes} x i1> {em.mask}, <{lanes} x i64> {where}, <{lanes} x i64> {none}")
        old, old_at = fn.get(vec(ty, lanes), slot[0]), fn.get(vec("i64", lanes), slot[1])
        value, index = self._better(fn, ins, source, lanes, (x, where), (old, old_at))
        fn.set(vec(ty, lanes), value, slot[0])
        fn.set(vec("i64", lanes), index, slot[1])

    @staticmethod
    def _better(
        fn: Fn, ins: Ins, source: np.dtype, lanes: int, a: tuple[str, str], b: tuple[str, str]
    ) -> tuple[str, str]:
        """The winner of two (value, position) pairs: NaN first, then the larger (smaller) value, then the lower position."""
        ty = value_type(source)
        n, ni = mathlib.Num(fn, ty, lanes), mathlib.Num(fn, "i64", lanes)
        largest = ins.attrs["kind"] == "argmax"
        if n.float:
            how, same = ("ogt" if largest else "olt"), "oeq"
        else:
            how, same = ("s" if source.kind == "i" else "u") + ("gt" if largest else "lt"), "eq"
        wins, ties = n.cmp(how, a[0], b[0]), n.cmp(same, a[0], b[0])
        if n.float:
            nan_a, nan_b = n.isnan(a[0]), n.isnan(b[0])
            true = const(True, "i1", lanes)
            wins = n.logic(
                "or",
                n.logic("and", wins, n.logic("xor", nan_b, true)),
                n.logic("and", nan_a, n.logic("xor", nan_b, true)),
            )
            ties = n.logic("or", ties, n.logic("and", nan_a, nan_b))
        wins = n.logic("or", wins, n.logic("and", ties, ni.cmp("slt", a[1], b[1])))
        return n.select(wins, a[0], b[0]), ni.select(wins, a[1], b[1])

    def _finish_reduce(self, em: Emitter, i: int, slots: Sequence[tuple[str, str]]) -> None:
        """Combine the unrolled accumulators (rows: also the lanes) and record the result."""
        fn, ins = em.fn, self.local.instrs[i]
        lanes, kind = self._acc_lanes(i), ins.attrs["kind"]
        source = self.local.instrs[ins.args[0]].dtype
        if kind in ARG:
            ty = value_type(source)
            pairs = [(fn.get(vec(ty, lanes), s[0]), fn.get(vec("i64", lanes), s[1])) for s in slots]
            if not self.rows:
                for u, p in enumerate(pairs if self.v in ins.axes else pairs[:1]):
                    em.put(i, u, p[1])
                return
            best = pairs[0]
            for p in pairs[1:]:
                best = self._better(fn, ins, source, lanes, best, p)
            best = self._horizontal_arg(fn, ins, source, lanes, best)
            self._arg_value = best[0]
            em.put(i, 0, best[1])
            return
        ty = value_type(ins.dtype)
        parts = [fn.get(vec(ty, lanes), s[0]) for s in slots]
        if not self.rows:
            for u, p in enumerate(parts if self.v in ins.axes else parts[:1]):
                em.put(i, u, p)
            return
        while len(parts) > 1:
            parts = [
                mathlib.combine(fn, kind, ins.dtype, lanes, a, b) for a, b in zip(parts[::2], parts[1::2])
            ]
        em.put(i, 0, mathlib.horizontal(fn, kind, ins.dtype, lanes, parts[0]))

    def _horizontal_arg(
        self, fn: Fn, ins: Ins, source: np.dtype, lanes: int, pair: tuple[str, str]
    ) -> tuple[str, str]:
        ty = value_type(source)
        while lanes > 1:
            half = lanes // 2

            def split(x: str, t: str, lanes: int = lanes, half: int = half) -> tuple[str, str]:
                if half == 1:
                    return fn.op(f"extractelement {vec(t, lanes)} {x}, i64 0"), fn.op(
                        f"extractelement {vec(t, lanes)} {x}, i64 1"
                    )
                low = ", ".join(f"i32 {k}" for k in range(half))
                high = ", ".join(f"i32 {k + half}" for k in range(half))
                full = vec(t, lanes)
                return (
                    fn.op(f"shufflevector {full} {x}, {full} poison, <{half} x i32> <{low}>"),
                    fn.op(f"shufflevector {full} {x}, {full} poison, <{half} x i32> <{high}>"),
                )

            values, places = split(pair[0], ty), split(pair[1], "i64")
            pair = self._better(fn, ins, source, half, (values[0], places[0]), (values[1], places[1]))
            lanes = half
        return pair

    def _scratch(self, em: Emitter, i: int, offset: int, u: int, value: str | None) -> str:
        """Write (or read) a kept value at the current position of its scratch row."""
        fn, local = em.fn, self.local
        ty = value_type(local.instrs[i].dtype)
        base = fn.gep("%scr", offset, "i8")
        linear: str = "0"
        for axis in self.red:
            linear = fn.iadd(fn.imul(linear, local.domain[axis]), em.index[axis])
        if self.rows:
            width = local.domain[self.v]
            linear = fn.iadd(fn.imul(linear, width), em.lane_index[u])
        else:
            linear = fn.iadd(fn.imul(linear, self.V * 8), u * self.V)
        pointer = fn.gep(base, linear, ty)
        if value is None:
            return fn.load(ty, pointer, self.V)
        fn.store(ty, value, pointer, self.V)
        return value

    # -- columns --------------------------------------------------------------------------------------------------------
    def _columns_plan(self, local_override: Local | None = None) -> None:
        size = self.local.domain[self.v] if self.v >= 0 else 1
        unroll = 1
        if self.V > 1:
            unroll = 4 if self.cost <= 12 and len(self.reduces) == 1 else 2 if self.cost <= 40 else 1
            while unroll > 1 and size < self.V * unroll:
                unroll //= 2
        step = self.V * unroll
        chunks = -(-size // step) if self.v >= 0 else 1
        outer = math.prod(self.local.domain[a] for a in self.par)
        per = 1
        while outer * chunks // per > 256:
            per *= 2
        blocks = -(-chunks // per)
        kept = self._kept()
        fn, em, _ = self._begin(0, [])
        order = [*self.par, self.v, *self.red] if self.v >= 0 else [*self.par, *self.red]
        pre = self._before_reduces()
        self._emit_depth(em, order, 0, pre)
        with self._task_loop(em, self.par, blocks) as block:
            for d in range(1, len(self.par) + 1):
                self._emit_depth(em, order, d, pre)
            depth = len(self.par) + 1

            def columns() -> None:
                lane_index = em.lane_index
                self._emit_depth(em, order, depth, pre)
                self._sweeps(em, order, depth + 1, kept, range(self.top + 1))
                em.lane_index = lane_index

            if self.v < 0:
                em.lane_index, em.copies = ["0"], [{}]
                saved = dict(em.shared)
                self._sweeps(em, order, depth, kept, range(self.top + 1))
                em.shared = saved
            elif blocks == 1:
                self._vector_loop(em, "0", str(size), unroll, size, columns, True)
            else:
                low = fn.imul(block, step * per)
                high = fn.imin(fn.iadd(low, step * per), size)
                self._vector_loop(em, low, high, unroll, size, columns, False)
        self._end(fn, [], outer * blocks, self.size)

    # -- split plans ------------------------------------------------------------------------------------------------------
    def _split_columns(self, span: int) -> None:
        """Partial column sums of fixed chunks of rows in L1-sized accumulator rows, then their combination."""
        local, V = self.local, self.V
        axis = max(self.red, key=lambda a: local.domain[a])
        rows = local.domain[axis]
        size = local.domain[self.v]
        outer = math.prod(local.domain[a] for a in self.par)
        others = [a for a in self.red if a != axis]
        height = max(8, -(-rows // max(1, 32 // min(outer, 32))))
        height = max(height, min(rows, 4096 // max(1, size)))
        height = -(-height // 8) * 8
        chunks = -(-rows // height)
        temps = []
        for i in self.reduces:
            ty = value_type(local.instrs[i].dtype)
            temps.append(len(self.temps))
            self.temps.append(outer * chunks * size * max(1, type_bytes(ty)))
        fn, em, pointers = self._begin(0, temps)
        order = [*self.par, *others, axis, self.v]
        pre = self._before_reduces()
        targets = [i for i in self._targets(0) if local.instrs[i].op == "reduce"]
        needed = self._needed(targets)
        row_needed = pre
        self._emit_depth(
            em,
            order,
            0,
            lambda i: row_needed(i) and local.instrs[i].op != "store" and self.v not in local.instrs[i].axes,
        )

        def plain(i: int) -> bool:
            return (pre(i) and local.instrs[i].op != "store") or (
                i in needed and local.instrs[i].op != "reduce"
            )

        with self._task_loop(em, self.par, chunks) as chunk:
            for d in range(1, len(self.par) + 1):
                self._emit_depth(em, order, d, plain)
            base = "0"
            for a in self.par:
                base = fn.iadd(fn.imul(base, local.domain[a]), em.index[a])
            base = fn.imul(fn.iadd(fn.imul(base, chunks), chunk), size)
            low = fn.imul(chunk, height)
            high = fn.imin(fn.iadd(low, height), rows)
            outs = [fn.gep(p, base, self._partial_type(i)) for p, i in zip(pointers, self.reduces)]

            def clear() -> None:
                for out, i in zip(outs, self.reduces):
                    ins = local.instrs[i]
                    neutral = const(mathlib.identity(ins.attrs["kind"], ins.dtype), value_type(ins.dtype), V)
                    self._partial_store(em, i, out, neutral)

            self._vector_loop(em, "0", str(size), 1, size, clear, True)
            group = 8 if self.cost <= 12 else 4 if self.cost <= 30 else 1

            def rows_loop(count: int, at: str) -> None:
                """Add ``count`` rows starting at ``at`` to the accumulators."""

                def columns() -> None:
                    lane = em.lane_index
                    keep_shared, keep_copies = dict(em.shared), em.copies
                    totals = {i: self._partial_load(em, i, out) for out, i in zip(outs, self.reduces)}
                    base_shared, base_copies = dict(em.shared), [dict(c) for c in em.copies]
                    for r in range(count):
                        em.shared, em.copies = dict(base_shared), [dict(c) for c in base_copies]
                        em.index[axis] = fn.iadd(at, r)
                        em.lane_index = lane
                        for i, ins in enumerate(local.instrs):
                            if (
                                plain(i)
                                and (i in needed or self.v in ins.axes)
                                and i not in em.shared
                                and i not in em.copies[0]
                            ):
                                em.emit(i, 0)
                        for i in self.reduces:
                            ins = local.instrs[i]
                            x = em.value(ins.args[0], 0, V)
                            source = local.instrs[ins.args[0]].dtype
                            if source != ins.dtype:
                                x = mathlib.convert(fn, x, source, ins.dtype, V)
                            totals[i] = mathlib.combine(fn, ins.attrs["kind"], ins.dtype, V, totals[i], x)
                    for out, i in zip(outs, self.reduces):
                        self._partial_store(em, i, out, totals[i])
                    em.shared, em.copies = keep_shared, keep_copies

                self._vector_loop(em, "0", str(size), 1, size, columns, True)

            def nest(rest: Sequence[int], depth: int) -> None:
                if rest:
                    with fn.loop(0, local.domain[rest[0]]) as i:
                        em.index[rest[0]] = i
                        saved = dict(em.shared)
                        self._emit_depth(em, order, depth, plain)
                        nest(rest[1:], depth + 1)
                        em.shared = saved
                    return
                count = fn.op(f"sub i64 {high}, {low}")
                whole = fn.imul(fn.op(f"udiv i64 {count}, {group}"), group)
                middle = fn.iadd(low, whole)
                with fn.loop(low, middle, group) as r:
                    rows_loop(group, r)
                if group > 1 and (rows % group or height % group):
                    with fn.loop(middle, high) as r:
                        rows_loop(1, r)

            nest(others, len(self.par) + 1)
        self._end(fn, temps, outer * chunks, self.size)
        self._combine_columns(temps, chunks, outer)

    def _partial_type(self, i: int) -> str:
        ty = value_type(self.local.instrs[i].dtype)
        return "i8" if ty == "i1" else ty

    def _partial_load(self, em: Emitter, i: int, base: str, extra: str = "0") -> str:
        ty = self._partial_type(i)
        pointer = em.fn.gep(base, em.fn.iadd(extra, em.lane_index[0]), ty)
        if em.mask is None or self.V == 1:
            raw = em.fn.load(ty, pointer, self.V)
        else:
            raw = em.fn.masked_load(ty, pointer, self.V, em.mask, const(0, ty, self.V))
        if value_type(self.local.instrs[i].dtype) == "i1":
            return em.fn.op(f"trunc {vec('i8', self.V)} {raw} to {vec('i1', self.V)}")
        return raw

    def _partial_store(self, em: Emitter, i: int, base: str, value: str) -> None:
        ty = self._partial_type(i)
        if value_type(self.local.instrs[i].dtype) == "i1":
            value = em.fn.op(f"zext {vec('i1', self.V)} {value} to {vec('i8', self.V)}")
        pointer = em.fn.gep(base, em.lane_index[0], ty)
        if em.mask is None or self.V == 1:
            em.fn.store(ty, value, pointer, self.V)
        else:
            em.fn.masked_store(ty, value, pointer, self.V, em.mask)

    def _combine_columns(self, temps: Sequence[int], chunks: int, outer: int) -> None:
        local, V = self.local, self.V
        size = local.domain[self.v]
        grain = V * max(1, -(-size // (V * 64)))
        blocks = -(-size // grain)
        fn, em, pointers = self._begin(1, temps)
        order = [*self.par, self.v]
        pre = self._before_reduces()
        self._emit_depth(em, order, 0, pre)
        with self._task_loop(em, self.par, blocks) as block:
            for d in range(1, len(self.par) + 1):
                self._emit_depth(em, order, d, pre)
            row = "0"
            for a in self.par:
                row = fn.iadd(fn.imul(row, local.domain[a]), em.index[a])
            first = fn.imul(row, chunks * size)

            def columns() -> None:
                self._emit_depth(em, order, len(order), pre)
                for p, i in zip(pointers, self.reduces):
                    ins = local.instrs[i]
                    ty = value_type(ins.dtype)
                    base = fn.gep(p, first, self._partial_type(i))
                    total = fn.var(vec(ty, V), const(mathlib.identity(ins.attrs["kind"], ins.dtype), ty, V))
                    with fn.loop(0, chunks) as c:
                        x = self._partial_load(em, i, base, fn.imul(c, size))
                        fn.set(
                            vec(ty, V),
                            mathlib.combine(
                                fn, ins.attrs["kind"], ins.dtype, V, fn.get(vec(ty, V), total), x
                            ),
                            total,
                        )
                    result = fn.get(vec(ty, V), total)
                    em.put(
                        i,
                        0,
                        result
                        if self.v in ins.axes or V == 1
                        else fn.op(f"extractelement {vec(ty, V)} {result}, i64 0"),
                    )
                for level in range(1, max(self.level) + 1):
                    self._row_level(em, level)

            low = fn.imul(block, grain)
            high = fn.imin(fn.iadd(low, grain), size)
            self._vector_loop(em, low, high, 1, size, columns, blocks == 1)
        self._end(fn, temps, outer * blocks, outer * size * chunks)

    def _split_rows(self, span: int, outer: int) -> None:
        """Few long rows: per level, chunks write partial results; every later stage first combines them."""
        local = self.local
        chunks = max(1, min(64, span // 16384) // max(1, outer // 2))
        chunks = max(chunks, 2)
        axis, step = self.v, self.V * 4
        if self.red and local.domain[self.red[0]] >= chunks * 4:
            axis, step = self.red[0], 1
        size = local.domain[axis]
        height = -(-size // chunks)
        height = -(-height // step) * step
        chunks = -(-size // height)
        partial: dict[int, list[int]] = {}
        for i in self.reduces:
            ins = local.instrs[i]
            count = 2 if ins.attrs["kind"] in ARG else 1
            partial[i] = []
            for _ in range(count):
                partial[i].append(len(self.temps))
                self.temps.append(outer * chunks * 8)
        temps = list(range(len(self.temps)))
        has_full_store = any(x.op == "store" and is_full(local, k) for k, x in enumerate(local.instrs))
        last_level = max((self.level[i] for i in self.reduces), default=0)
        reduce_stages = last_level + 1
        order = [*self.par, *self.red, self.v]
        pre = self._before_reduces()
        for stage in range(reduce_stages + 1):
            final = stage == reduce_stages
            fn, em, pointers = self._begin(stage, temps)
            em.fast_div = self._row_divided
            tasks = outer * (chunks if not final or has_full_store else 1)
            no_store = self._without_stores(pre)
            self._emit_depth(em, order, 0, no_store if not final else no_store)
            with self._task_loop(em, self.par, chunks if not final or has_full_store else 1) as chunk:
                for d in range(1, len(self.par) + 1):
                    self._emit_depth(em, order, d, no_store)
                row = "0"
                for a in self.par:
                    row = fn.iadd(fn.imul(row, local.domain[a]), em.index[a])
                first = fn.imul(row, chunks)
                for level in range(stage):
                    self._row_level_quiet(em, level)
                    for i in self.reduces:
                        if self.level[i] == level:
                            self._load_partials(em, i, [pointers[t] for t in partial[i]], first, chunks)
                self._row_level_quiet(em, stage)
                low = fn.imul(chunk, height)
                high = fn.imin(fn.iadd(low, height), size)
                bounds = (axis, low, high, size)
                if not final:
                    self._sweep_part(em, order, stage, bounds, reduces=True)
                    for i in self.reduces:
                        if self.level[i] == stage:
                            self._store_partial(
                                em, i, [pointers[t] for t in partial[i]], fn.iadd(first, chunk)
                            )
                else:
                    for level in range(stage + 1, max(self.level) + 1):
                        self._row_level_quiet(em, level)
                    if has_full_store:
                        for level in range(self.top + 1):
                            self._sweep_part(em, order, level, bounds, reduces=False)
                        with fn.when(fn.op(f"icmp eq i64 {chunk}, 0")):
                            self._row_stores(em)
                    else:
                        self._row_stores(em)
            self._end(fn, temps, tasks, self.size if not final or has_full_store else outer * chunks)

    def _without_stores(self, pre: Callable[[int], bool]) -> Callable[[int], bool]:
        return lambda i: pre(i) and self.local.instrs[i].op != "store"

    def _row_level_quiet(self, em: Emitter, level: int) -> None:
        """Row-level instructions of ``level`` except stores."""
        for i, ins in enumerate(self.local.instrs):
            if (
                self.level[i] == level
                and level > 0
                and not is_full(self.local, i)
                and ins.op not in ("reduce", "store")
            ):
                em.emit(i, 0)

    def _row_stores(self, em: Emitter) -> None:
        for i, ins in enumerate(self.local.instrs):
            if ins.op == "store" and not is_full(self.local, i):
                em.emit(i, 0)

    def _sweep_part(
        self, em: Emitter, order: Sequence[int], level: int, bounds: tuple[int, str, str, int], reduces: bool
    ) -> None:
        """One sweep over a chunk: its reduces, or its stores."""
        everything = self._targets(level)
        chosen = [i for i in everything if (self.local.instrs[i].op == "reduce") == reduces]
        original = self._targets
        self._targets = lambda _level: chosen  # type: ignore[method-assign]
        try:
            for d in sorted(
                {self.local.instrs[i].args[1] for i in self._needed(chosen) if i in self._row_divided}
            ):
                em.prepare_reciprocal(d)
            self._one_sweep(em, order, len(self.par) + 1, {}, set(), level, bounds)
        finally:
            self._targets = original  # type: ignore[method-assign]

    def _store_partial(self, em: Emitter, i: int, pointers: Sequence[str], at: str) -> None:
        fn, ins = em.fn, self.local.instrs[i]
        if ins.attrs["kind"] in ARG:
            source = value_type(self.local.instrs[ins.args[0]].dtype)
            ty = "i8" if source == "i1" else source
            value = self._arg_value if source != "i1" else fn.op(f"zext i1 {self._arg_value} to i8")
            fn.store(ty, value, fn.gep(pointers[0], at, "i64"))
            fn.store("i64", em.raw(i, 0), fn.gep(pointers[1], at, "i64"))
            return
        ty, value = value_type(ins.dtype), em.raw(i, 0)
        if ty == "i1":
            ty, value = "i8", fn.op(f"zext i1 {value} to i8")
        fn.store(ty, value, fn.gep(pointers[0], at, "i64"))

    def _load_partials(self, em: Emitter, i: int, pointers: Sequence[str], first: str, chunks: int) -> None:
        """Combine the partial results of all chunks in order."""
        fn, ins = em.fn, self.local.instrs[i]
        kind = ins.attrs["kind"]
        source = self.local.instrs[ins.args[0]].dtype if kind in ARG else ins.dtype
        ty = value_type(source)

        def read(at: str) -> str:
            pointer = fn.gep(pointers[0], at, "i64")
            if ty == "i1":
                return fn.op(f"trunc i8 {fn.load('i8', pointer)} to i1")
            return fn.load(ty, pointer)

        best = fn.var(ty, read(first))
        place = fn.var("i64", fn.load("i64", fn.gep(pointers[1], first, "i64"))) if kind in ARG else ""
        with fn.loop(1, chunks) as c:
            at = fn.iadd(first, c)
            x, old = read(at), fn.get(ty, best)
            if kind in ARG:
                pair = (x, fn.load("i64", fn.gep(pointers[1], at, "i64")))
                value, index = self._better(fn, ins, source, 1, pair, (old, fn.get("i64", place)))
                fn.set("i64", index, place)
            else:
                value = mathlib.combine(fn, kind, ins.dtype, 1, old, x)
            fn.set(ty, value, best)
        em.put(i, 0, fn.get("i64", place) if kind in ARG else fn.get(ty, best))


def compile_body(module: Module, local: Local, name: str, defer_stores: bool = False) -> Compiled:
    """Emit the functions of a body into ``module`` and say how to call them."""
    return LoopCompiler(module, local, name, defer_stores).compile()
