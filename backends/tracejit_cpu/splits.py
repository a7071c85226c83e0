"""Plans for too few rows or columns to occupy the machine: fixed chunks write partial results, a later stage combines them.

The chunks depend on shapes only, so results are the same bits for any number of threads. Used by ``loops.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from tracejit_cpu import mathlib
from tracejit_cpu.body import ARG, Emitter, is_full
from tracejit_cpu.irbuilder import const, type_bytes, value_type, vec
from tracejit_cpu.reductions import Sweeps


class Splits(Sweeps):
    """Split rows and split columns."""

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

            def innermost(depth: int) -> None:
                count = fn.op(f"sub i64 {high}, {low}")
                whole = fn.imul(fn.op(f"udiv i64 {count}, {group}"), group)
                middle = fn.iadd(low, whole)
                with fn.loop(low, middle, group) as r:
                    rows_loop(group, r)
                if group > 1 and (rows % group or height % group):
                    with fn.loop(middle, high) as r:
                        rows_loop(1, r)

            self._nest(em, order, others, len(self.par) + 1, plain, innermost)
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
            tasks = outer * (chunks if not final or has_full_store else 1)
            no_store = self._without_stores(pre)
            self._emit_depth(em, order, 0, no_store)
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
        self.chosen = chosen
        try:
            self._one_sweep(em, order, len(self.par) + 1, {}, set(), level, bounds)
        finally:
            self.chosen = None

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
