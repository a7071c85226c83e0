"""Sweeps over a row or a block of columns: accumulators, reductions of their lanes, values kept between sweeps.

The plans in ``loops.py`` and ``splits.py`` call :meth:`Sweeps._sweeps` per row or block.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from tracejit_cpu import mathlib
from tracejit_cpu.body import ARG, Emitter, Ins, dependencies, is_full
from tracejit_cpu.irbuilder import Fn, const, iota, type_bytes, value_type, vec
from tracejit_cpu.nest import Nest

KEEP_LIMIT = 1 << 17  # bytes of one kept row in a thread's scratch memory
_NO_INDEX = (1 << 63) - 1


class Sweeps(Nest):
    """A nest whose rows (or columns) are swept once per level of reductions."""

    def _kept(self) -> dict[int, int]:
        """Costly full-level values used in more than one sweep -> byte offset of their row in scratch."""
        local = self.local
        span = math.prod(local.domain[a] for a in local.reduce)
        width = span if self.rows else span * self.V * 8
        needs = [self._needed(self._targets(level)) for level in range(self.top + 1)]
        kept: dict[int, int] = {}
        for i, ins in enumerate(local.instrs):
            if self.v not in ins.axes or ins.op in ("store", "reduce") or not is_full(local, i):
                continue
            if mathlib.cost(ins.op) < 5 and not ins.gather:
                continue
            if sum(i in n for n in needs) < 2:
                continue
            ty = value_type(ins.dtype)
            if ty == "i1" or (width + 64) * type_bytes(ty) > KEEP_LIMIT:
                continue
            kept[i] = self.scratch
            self.scratch += -(-((width + 64) * type_bytes(ty)) // 64) * 64
        return kept

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
            for u, part in enumerate(parts if self.v in ins.axes else parts[:1]):
                em.put(i, u, part)
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
