"""Scatter-add and cumulative sums, deterministic for any number of threads. Called by ``ops.py``.

Scatter-add gives each task a range of target rows; it walks all indices in order and adds those in its range, so every
element receives its terms in index order whoever runs the task.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from tracejit.program import OpKernel
from tracejit_cpu import mathlib
from tracejit_cpu.irbuilder import Fn, Module, const, memory_type, value_type, vec
from tracejit_cpu.stages import Compiled, Stage

OPS = frozenset({"scatter_add", "scatter_add_along_axis", "cumsum", "cumprod"})
DtypeOf = Callable[[int], np.dtype]


class Element:
    """Reading, writing and adding elements of one dtype, scalars or vectors."""

    def __init__(self, fn: Fn, dtype: np.dtype) -> None:
        self.fn, self.dtype = fn, dtype
        self.ty, self.mem = value_type(dtype), memory_type(dtype)
        self.lanes = fn.module.host.vector_bytes // max(4, dtype.itemsize)

    def load(self, pointer: str, lanes: int = 1) -> str:
        """Read ``lanes`` elements in the computation type."""
        raw = self.fn.load(self.mem, pointer, lanes)
        if self.mem == self.ty:
            return raw
        how = "fpext" if self.mem == "half" else "trunc"
        return self.fn.op(f"{how} {vec(self.mem, lanes)} {raw} to {vec(self.ty, lanes)}")

    def store(self, value: str, pointer: str, lanes: int = 1) -> None:
        """Write ``lanes`` elements."""
        if self.mem != self.ty:
            how = "fptrunc" if self.mem == "half" else "zext"
            value = self.fn.op(f"{how} {vec(self.ty, lanes)} {value} to {vec(self.mem, lanes)}")
        self.fn.store(self.mem, value, pointer, lanes)

    def combine(self, kind: str, a: str, b: str, lanes: int = 1) -> str:
        """One step of a sum or product."""
        return mathlib.combine(self.fn, kind, self.dtype, lanes, a, b)

    def each(self, count: int, body: Callable[[str, int], None]) -> None:
        """Run ``body(position, lanes)`` over ``count`` contiguous elements."""
        whole = count // self.lanes * self.lanes
        if whole:
            with self.fn.loop(0, whole, self.lanes) as i:
                body(i, self.lanes)
        if count > whole:
            with self.fn.loop(whole, count) as i:
                body(i, 1)


def _index(fn: Fn, pointer: str, at: str, dtype: np.dtype, size: int) -> str:
    """An index wrapped once if negative, then clipped into the axis."""
    ty = memory_type(dtype)
    raw = mathlib.convert(fn, fn.load(ty, fn.gep(pointer, at, ty)), dtype, np.dtype(np.int64), 1)
    n = mathlib.Num(fn, "i64", 1)
    wrapped = n.select(n.cmp("slt", raw, "0"), n.add(raw, str(size)), raw)
    wrapped = n.select(n.cmp("slt", wrapped, "0"), "0", wrapped)
    return n.select(n.cmp("sgt", wrapped, str(size - 1)), str(size - 1), wrapped)


def compile_scatter(
    module: Module, kernel: OpKernel, dtype_of: DtypeOf, name: str, in_place: bool
) -> list[tuple[Compiled, list[int]]]:
    """Emit a scatter-add or a cumulative op. ``in_place``: the result is the first operand's memory already."""
    buffers = [*(b for b, _ in kernel.operands), kernel.results[0][0]]
    if kernel.op in ("cumsum", "cumprod"):
        stage = _cumulative(module, kernel, dtype_of, name)
    elif kernel.op == "scatter_add":
        stage = _scatter_rows(module, kernel, dtype_of, name, in_place)
    else:
        stage = _scatter_along(module, kernel, dtype_of, name, in_place)
    return [(Compiled([stage]), buffers)]


def _scatter_rows(module: Module, kernel: OpKernel, dtype_of: DtypeOf, name: str, in_place: bool) -> Stage:
    (base, shape), (idx, idx_shape), _ = kernel.operands
    axis = int(kernel.attrs["axis"])
    outer, size, inner = math.prod(shape[:axis]), shape[axis], math.prod(shape[axis + 1 :])
    count = math.prod(idx_shape)
    fn = Fn(module, f"{name}_s", "ptr %base, ptr %idx, ptr %upd, ptr %out, i64 %lo, i64 %hi, ptr %scr")
    e = Element(fn, dtype_of(base))
    ranges = max(1, min(16, size, inner * count // 2048)) if inner >= 8 else 1
    height = -(-size // ranges)
    ranges = -(-size // height)
    with fn.loop("%lo", "%hi") as task:
        part = fn.op(f"urem i64 {task}, {ranges}") if ranges > 1 else "0"
        o = fn.op(f"udiv i64 {task}, {ranges}") if ranges > 1 else task
        low = fn.imul(part, height)
        high = fn.imin(fn.iadd(low, height), size)
        plane = fn.imul(o, size * inner)
        if not in_place:
            start, stop = fn.imul(low, inner), fn.imul(high, inner)
            source, target = fn.gep("%base", plane, e.mem), fn.gep("%out", plane, e.mem)
            length = fn.op(f"sub i64 {stop}, {start}")
            whole = fn.iadd(start, fn.imul(fn.op(f"udiv i64 {length}, {e.lanes}"), e.lanes))
            with fn.loop(start, whole, e.lanes) as i:
                e.store(e.load(fn.gep(source, i, e.mem), e.lanes), fn.gep(target, i, e.mem), e.lanes)
            with fn.loop(whole, stop) as i:
                e.store(e.load(fn.gep(source, i, e.mem)), fn.gep(target, i, e.mem))
        with fn.loop(0, count) as k:
            row = _index(fn, "%idx", k, dtype_of(idx), size)
            ok = "true"
            if ranges > 1:
                offset = fn.op(f"sub i64 {row}, {low}")
                ok = fn.op(f"icmp ult i64 {offset}, {fn.op(f'sub i64 {high}, {low}')}")
            with fn.when(ok):
                target = fn.gep("%out", fn.iadd(plane, fn.imul(row, inner)), e.mem)
                source = fn.gep("%upd", fn.imul(fn.iadd(fn.imul(o, count), k), inner), e.mem)

                def add(i: str, lanes: int, target: str = target, source: str = source) -> None:
                    p = fn.gep(target, i, e.mem)
                    e.store(
                        e.combine("sum", e.load(p, lanes), e.load(fn.gep(source, i, e.mem), lanes), lanes),
                        p,
                        lanes,
                    )

                e.each(inner, add)
    fn.finish()
    return Stage(
        fn.name,
        [0, 1, 2, 3],
        outer * ranges,
        (outer * count * inner + math.prod(shape)) * 0.4 + outer * count * 3.0,
    )


def _scatter_along(module: Module, kernel: OpKernel, dtype_of: DtypeOf, name: str, in_place: bool) -> Stage:
    (base, shape), (idx, idx_shape), _ = kernel.operands
    axis = int(kernel.attrs["axis"])
    outer, size, inner = math.prod(shape[:axis]), shape[axis], math.prod(shape[axis + 1 :])
    count = idx_shape[axis]
    fn = Fn(module, f"{name}_a", "ptr %base, ptr %idx, ptr %upd, ptr %out, i64 %lo, i64 %hi, ptr %scr")
    e = Element(fn, dtype_of(base))
    with fn.loop("%lo", "%hi") as o:
        plane = fn.imul(o, size * inner)
        if not in_place:

            def copy(i: str, lanes: int) -> None:
                at = fn.iadd(plane, i)
                e.store(e.load(fn.gep("%base", at, e.mem), lanes), fn.gep("%out", at, e.mem), lanes)

            e.each(size * inner, copy)
        with fn.loop(0, count) as k, fn.loop(0, inner) as c:
            at = fn.iadd(fn.imul(fn.iadd(fn.imul(o, count), k), inner), c)
            row = _index(fn, "%idx", at, dtype_of(idx), size)
            pointer = fn.gep("%out", fn.iadd(plane, fn.iadd(fn.imul(row, inner), c)), e.mem)
            e.store(e.combine("sum", e.load(pointer), e.load(fn.gep("%upd", at, e.mem))), pointer)
    fn.finish()
    return Stage(fn.name, [0, 1, 2, 3], outer, outer * (count + size) * inner * 1.5)


def _cumulative(module: Module, kernel: OpKernel, dtype_of: DtypeOf, name: str) -> Stage:
    (source, shape) = kernel.operands[0]
    axis, kind = int(kernel.attrs["axis"]), "sum" if kernel.op == "cumsum" else "prod"
    outer, size, inner = math.prod(shape[:axis]), shape[axis], math.prod(shape[axis + 1 :])
    fn = Fn(module, f"{name}_c", "ptr %src, ptr %out, i64 %lo, i64 %hi, ptr %scr")
    out_dtype = dtype_of(kernel.results[0][0])
    a, e = Element(fn, dtype_of(source)), Element(fn, out_dtype)
    reverse = bool(kernel.attrs.get("reverse"))

    def read(at: str) -> str:
        return mathlib.convert(fn, a.load(fn.gep("%src", at, a.mem)), a.dtype, out_dtype, 1)

    with fn.loop("%lo", "%hi") as line:
        o, c = (
            (fn.op(f"udiv i64 {line}, {inner}"), fn.op(f"urem i64 {line}, {inner}"))
            if inner > 1
            else (line, "0")
        )
        start = fn.iadd(fn.imul(o, size * inner), c)
        total = fn.var(e.ty, const(mathlib.identity(kind, out_dtype), e.ty))
        with fn.loop(0, size) as k:
            place = fn.op(f"sub i64 {size - 1}, {k}") if reverse else k
            at = fn.iadd(start, fn.imul(place, inner))
            value = e.combine(kind, fn.get(e.ty, total), read(at))
            if e.mem == "half":  # NumPy rounds every partial result
                value = mathlib.convert(fn, value, np.dtype(np.float32), out_dtype, 1)
            fn.set(e.ty, value, total)
            e.store(value, fn.gep("%out", at, e.mem))
    fn.finish()
    return Stage(fn.name, [0, 1], outer * inner, outer * inner * size * 2.0)
