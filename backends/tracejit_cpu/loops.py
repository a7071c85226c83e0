"""Loop kernels: elementwise nests, reductions and row pipelines. ``compile_body`` is called by ``build.py`` per LoopBody.

A body becomes one function per stage, ``void f(ptr..., i64 lo, i64 hi, ptr scratch)``, that runs the tasks ``lo..hi``.
How a body is cut into tasks depends on shapes only, never on the number of threads: results are bit-identical for any
number. Four plans exist:

* elementwise: no reduce axes; lanes along the axis with most contiguous accesses;
* rows: lanes along a reduce axis, one horizontal reduction at the end of a sweep;
* columns: lanes along a parallel axis, accumulators per lane;
* split: too few rows (or columns) for the machine: fixed chunks write partial results, a second stage combines them.
"""

from __future__ import annotations

import math

from tracejit_cpu.body import ARG, Local, is_full
from tracejit_cpu.irbuilder import Module
from tracejit_cpu.splits import Splits
from tracejit_cpu.stages import Compiled


class LoopCompiler(Splits):
    """Compiles one :class:`Local`: chooses a plan and emits its stages."""

    def compile(self) -> Compiled:
        """Choose the plan and emit all stages."""
        if self.size == 0 and not self.reduces:
            return Compiled([])
        if not self.local.reduce:
            self.elementwise()
            return Compiled(self.stages, self.temps)
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
        prefix: list[int] = []
        tasks = 1
        wanted = min(64, max(1, outer * size * self.cost // 20000))
        for axis in self.par:
            if tasks >= wanted and chunks == 1 and prefix:
                break
            prefix.append(axis)
            tasks *= self.local.domain[axis]
        fn, em, _ = self._begin(0, [])
        self._emit_depth(em, order, 0, lambda i: True)
        inner = self.par[len(prefix) :]
        with self._task_loop(em, prefix, chunks) as chunk:
            for d in range(1, len(prefix) + 1):
                self._emit_depth(em, order, d, lambda i: True)

            def innermost(depth: int) -> None:
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

            self._nest(em, order, inner, len(prefix) + 1, lambda i: True, innermost)
        self._end(fn, [], tasks * chunks, self.size)

    def _rows_plan(self) -> None:
        outer = math.prod(self.local.domain[a] for a in self.par)
        prefix: list[int] = []
        tasks = 1
        wanted = min(64, max(1, self.size * self.cost // 20000))
        for axis in self.par:
            if tasks >= wanted and prefix:
                break
            prefix.append(axis)
            tasks *= self.local.domain[axis]
        del outer
        kept = self._kept()
        fn, em, _ = self._begin(0, [])
        order = [*self.par, *self.red, self.v]
        pre = self._before_reduces()
        self._emit_depth(em, order, 0, pre)
        with self._task_loop(em, prefix):
            for d in range(1, len(prefix) + 1):
                self._emit_depth(em, order, d, pre)

            def innermost(depth: int) -> None:
                saved = dict(em.shared)
                self._sweeps(em, order, depth, kept, range(self.top + 1))
                em.shared = saved

            self._nest(em, order, self.par[len(prefix) :], len(prefix) + 1, pre, innermost)
        self._end(fn, [], tasks, self.size)

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


def compile_body(module: Module, local: Local, name: str, defer_stores: bool = False) -> Compiled:
    """Emit the functions of a body into ``module`` and say how to call them."""
    return LoopCompiler(module, local, name, defer_stores).compile()
