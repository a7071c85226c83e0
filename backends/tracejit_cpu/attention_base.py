"""What attention kernels are built from: scratch memory, padded copies, transposed blocks, causal bounds, masked scores.

:class:`AttentionBase` is the part that ``attention.py``'s forward and backward kernels share.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from tracejit.program import Access, AttentionKernel
from tracejit_cpu import mathlib
from tracejit_cpu.attention_tiles import heights, strip
from tracejit_cpu.irbuilder import Fn, Module, const, iota, mask_first, memory_type, value_type, vec
from tracejit_cpu.micro import pack, tile_for
from tracejit_cpu.stages import Compiled, Stage

DtypeOf = Callable[[int], np.dtype]

KEYS = 96  # keys per tile: the scores of a block of queries and the operands of a tile stay in the L1 cache
TALLEST = 24  # rows of keys are padded to a multiple of every strip's height


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _copy_rows(module: Module, ty: str, memory: str, lanes: int) -> str:
    """``void copy(ptr src, i64 rs, i64 cs, i64 rows, i64 cols, i64 all, ptr dst, i64 pitch)``: dst[r][c] = src[r*rs+c*cs].

    Columns up to ``pitch`` and rows up to ``all`` become zero.
    """
    name = f"copy_{memory}_{ty}"
    if name in module.functions:
        return name
    fn = Fn(module, name, "ptr %src, i64 %rs, i64 %cs, i64 %rows, i64 %cols, i64 %all, ptr %dst, i64 %pitch")
    flat = fn.op("icmp eq i64 %cs, 1") if memory == ty else "false"
    whole = fn.op(f"select i1 {flat}, i64 {fn.op(f'and i64 %cols, {-lanes}')}, i64 0")
    with fn.loop(0, "%rows") as r:
        src = fn.gep("%src", fn.imul(r, "%rs"), memory)
        dst = fn.gep("%dst", fn.imul(r, "%pitch"), ty)
        if memory == ty:
            with fn.loop(0, whole, lanes) as c:
                fn.store(ty, fn.load(ty, fn.gep(src, c, ty), lanes), fn.gep(dst, c, ty), lanes)
        with fn.loop(whole, "%cols") as c:
            x = fn.load(memory, fn.gep(src, fn.imul(c, "%cs"), memory))
            fn.store(ty, x if memory == ty else fn.op(f"fpext {memory} {x} to {ty}"), fn.gep(dst, c, ty))
        with fn.loop("%cols", "%pitch") as c:
            fn.store(ty, const(0.0, ty), fn.gep(dst, c, ty))
    with fn.loop("%rows", "%all") as r:
        dst = fn.gep("%dst", fn.imul(r, "%pitch"), ty)
        with fn.loop(0, "%pitch", lanes) as c:
            fn.store(ty, const(0.0, ty, lanes), fn.gep(dst, c, ty), lanes)
    fn.finish()
    return name


class AttentionBase:
    """Emits one attention kernel."""

    def __init__(self, module: Module, k: AttentionKernel, dtype_of: DtypeOf, name: str) -> None:
        self.module, self.k, self.dtype_of, self.name = module, k, dtype_of, name
        self.ty = value_type(k.dtype)
        tile = tile_for(module.host, self.ty)
        self.lanes, self.bytes = tile.lanes, tile.bytes
        self.most, self.wide = (
            tile.mr * tile.nv,
            tile.nv,
        )  # accumulators, and vectors of a row, that registers hold
        #: Scores are computed in this unit, in which ``exp_below`` takes its argument.
        self.unit = math.log(2.0) if self.ty == "float" else 1.0
        #: A block of queries is ``nr`` lanes in ``nv`` vectors.
        self.nv = 1 if k.tq <= self.lanes else tile.nv
        self.nr = self.nv * self.lanes
        self.blocks = -(-k.tq // self.nr)
        self.tall = _up(k.tk, TALLEST)
        self.dp, self.vp = _up(k.d, self.lanes), _up(k.dv_dim, self.lanes)
        self.buffers: list[int] = []
        self.used = 0
        self.heads = math.prod(k.batch)

    # -- memory ---------------------------------------------------------------------------------------------------------
    def _scratch(self, fn: Fn, items: int) -> str:
        """A region of the thread's scratch memory, in elements of the computation type."""
        at = self.used
        self.used += _up(items * self.bytes, 64) + 64
        return fn.gep("%scr", at, "i8")

    def _begin(self, names: list[str]) -> Fn:
        self.names = [n for n in names if getattr(self.k, n) is not None]
        for n in self.names:
            buffer = getattr(self.k, n).buffer
            if buffer not in self.buffers:
                self.buffers.append(buffer)
        params = [f"ptr %arg{i}" for i in range(len(self.buffers))]
        return Fn(self.module, f"{self.name}_a", ", ".join([*params, "i64 %lo", "i64 %hi", "ptr %scr"]))

    def _heads(self, fn: Fn, head: str) -> dict[str, str]:
        """Address of element (0, 0) of every operand for one head."""
        index: list[str] = []
        rest = head
        for axis in reversed(range(len(self.k.batch))):
            size = self.k.batch[axis]
            index.insert(0, rest if axis == 0 else fn.op(f"urem i64 {rest}, {size}"))
            rest = rest if axis == 0 else fn.op(f"udiv i64 {rest}, {size}")
        out = {}
        for n in self.names:
            access: Access = getattr(self.k, n)
            offset: str = str(access.offset)
            for at, stride in zip(index, access.strides):
                offset = fn.iadd(offset, fn.imul(at, stride))
            mem = memory_type(self.dtype_of(access.buffer))
            out[n] = fn.gep(f"%arg{self.buffers.index(access.buffer)}", offset, mem)
        return out

    def _copy(
        self,
        fn: Fn,
        name: str,
        pointer: str,
        rows: str | int,
        columns: int,
        dst: str,
        all_rows: int,
        pitch: int,
    ) -> None:
        """Copy rows of an operand to scratch, padded with zeros to ``all_rows`` rows of ``pitch``."""
        access: Access = getattr(self.k, name)
        mem = memory_type(self.dtype_of(access.buffer))
        rs, cs = access.strides[-2], access.strides[-1]
        copy = _copy_rows(self.module, self.ty, mem, self.lanes)
        sizes = f"i64 {rows}, i64 {columns}, i64 {all_rows}"
        fn.emit(f"call void @{copy}(ptr {pointer}, i64 {rs}, i64 {cs}, {sizes}, ptr {dst}, i64 {pitch})")

    def _at(self, fn: Fn, name: str, pointer: str, row: str) -> str:
        """Address of an operand's row."""
        access: Access = getattr(self.k, name)
        return fn.gep(pointer, fn.imul(row, access.strides[-2]), memory_type(self.dtype_of(access.buffer)))

    def _lanes_of(self, fn: Fn, source: str, pitch: int, depth: int, dst: str) -> None:
        """Transpose a padded block of query rows [nr][pitch] to [depth][nr]."""
        name = pack(self.module, self.ty, self.ty, self.lanes, self.nr)
        fn.emit(f"call void @{name}(ptr {source}, i64 1, i64 {pitch}, i64 {depth}, i64 {self.nr}, ptr {dst})")

    def _scale(self, fn: Fn, n: mathlib.Num, block: str, depth: int, factors: list[str]) -> None:
        """Multiply a block [depth][nr] by one vector of factors per vector of a row."""
        with fn.loop(0, depth) as c:
            for v in range(self.nv):
                p = fn.gep(block, fn.iadd(fn.imul(c, self.nr), v * self.lanes), self.ty)
                fn.store(self.ty, n.mul(fn.load(self.ty, p, self.lanes), factors[v]), p, self.lanes)

    def _clear(self, fn: Fn, pointer: str, items: str | int) -> None:
        """Zero ``items`` elements, a multiple of a vector."""
        with fn.loop(0, items, self.lanes) as i:
            fn.store(self.ty, const(0.0, self.ty, self.lanes), fn.gep(pointer, i, self.ty), self.lanes)

    def _store_block(
        self, fn: Fn, name: str, pointer: str, first: str, rows: str, columns: int, block: str, turned: str
    ) -> None:
        """Write a block [column][nr] of queries to rows of an operand, by way of ``turned``."""
        lanes = self.lanes
        turn = pack(self.module, self.ty, self.ty, lanes, lanes)
        for c in range(0, columns, lanes):
            src, dst = fn.gep(block, c * self.nr, self.ty), fn.gep(turned, c * self.nr, self.ty)
            fn.emit(
                f"call void @{turn}(ptr {src}, i64 1, i64 {self.nr}, i64 {self.nr}, i64 {lanes}, ptr {dst})"
            )
        self._store_rows(
            fn, name, self._at(fn, name, pointer, first), rows, columns, turned, lanes, self.nr * lanes
        )

    def _store_rows(
        self,
        fn: Fn,
        name: str,
        pointer: str,
        rows: str | int,
        columns: int,
        source: str,
        pitch: int,
        step: int,
        factor: str | None = None,
    ) -> None:
        """Write rows to an operand, times ``factor``; element (r, c) is at ``c // lanes * step + r * pitch + c % lanes``."""
        ty, lanes = self.ty, self.lanes
        access: Access = getattr(self.k, name)
        mem = memory_type(self.dtype_of(access.buffer))
        rs, cs = access.strides[-2], access.strides[-1]
        with fn.loop(0, rows) as r:
            base = fn.gep(pointer, fn.imul(r, rs), mem)
            row = fn.gep(source, fn.imul(r, pitch), ty)
            for at in range(0, columns, lanes):
                x = fn.load(ty, fn.gep(row, at // lanes * step, ty), lanes)
                if factor is not None:
                    x = fn.op(f"fmul {vec(ty, lanes)} {x}, {factor}")
                if mem != ty:
                    x = fn.op(f"fptrunc {vec(ty, lanes)} {x} to {vec(mem, lanes)}")
                mask = mask_first(columns - at, lanes) if columns - at < lanes else None
                if cs == 1 and mask is None:
                    fn.store(mem, x, fn.gep(base, at, mem), lanes)
                elif cs == 1:
                    fn.masked_store(mem, x, fn.gep(base, at, mem), lanes, mask or "")
                else:
                    start = fn.gep(base, at * cs, mem)
                    to = fn.op(f"getelementptr {mem}, ptr {start}, <{lanes} x i64> {iota('i64', lanes, cs)}")
                    fn.scatter(mem, x, to, lanes, mask or const(True, "i1", lanes))

    # -- products -------------------------------------------------------------------------------------------------------
    def _height(self, nv: int) -> int:
        """Rows of a strip of ``nv`` vectors: as many accumulators as registers allow, a divisor of ``TALLEST``."""
        return next(h for h in (24, 12, 8, 6, 4, 3, 2, 1) if h * nv <= self.most)

    def _scores(self, fn: Fn, keys: str, pitch: int, block: str, depth: int, count: str, out: str) -> None:
        """out[key][nr] = keys (rows of ``pitch``) times a block [depth][nr], for ``count`` keys rounded up to a strip."""
        mr = self._height(self.nv)
        f = strip(
            self.module, self.ty, self.lanes, mr, self.nv, (pitch, 1), self.nr, self.nr, depth, add=False
        )
        tiles = self._tiles(fn, count, mr)
        fn.emit(f"call void @{f}(ptr {keys}, ptr {block}, ptr {out}, i64 {tiles}, i64 0)")

    def _gather_keys(
        self, fn: Fn, values: str, pitch: int, depth: int, weights: str, count: str, out: str
    ) -> None:
        """out[column][nr] += values^T (rows of ``pitch``, ``depth`` columns) times ``count`` rows of weights [key][nr]."""
        at = 0
        for mr, tiles in heights(depth, max(1, self.most // self.nv)):
            f = strip(
                self.module, self.ty, self.lanes, mr, self.nv, (1, pitch), self.nr, self.nr, None, add=True
            )
            a, to = fn.gep(values, at, self.ty), fn.gep(out, at * self.nr, self.ty)
            fn.emit(f"call void @{f}(ptr {a}, ptr {weights}, ptr {to}, i64 {tiles}, i64 {count})")
            at += mr * tiles

    def _gather_queries(self, fn: Fn, weights: str, rows: str, width: int, count: str, out: str) -> None:
        """out[key][width] += weights [key][nr] times a block of query rows [nr][width], for ``count`` keys, rounded up."""
        at = 0
        while at < width // self.lanes:
            nv = min(self.wide, width // self.lanes - at)
            mr = self._height(nv)
            f = strip(self.module, self.ty, self.lanes, mr, nv, (self.nr, 1), width, width, self.nr, add=True)
            b, to = fn.gep(rows, at * self.lanes, self.ty), fn.gep(out, at * self.lanes, self.ty)
            tiles = self._tiles(fn, count, mr)
            fn.emit(f"call void @{f}(ptr {weights}, ptr {b}, ptr {to}, i64 {tiles}, i64 0)")
            at += nv

    def _tiles(self, fn: Fn, count: str, height: int) -> str:
        if count.isdigit():
            return str(-(-int(count) // height))
        return fn.op(f"udiv i64 {fn.iadd(count, height - 1)}, {height}")

    # -- scores ---------------------------------------------------------------------------------------------------------
    def _limit(self, fn: Fn, first: str) -> str:
        """How many keys the block of queries at ``first`` needs."""
        return fn.imin(fn.iadd(first, self.nr), self.k.tk) if self.k.causal else str(self.k.tk)

    def _open(self, fn: Fn, first: str, key: str, count: str) -> str:
        """How many of the ``count`` keys from ``key`` every query of the block at ``first`` sees, without a mask."""
        if self.k.mask is not None:
            return "0"
        if not self.k.causal:
            return count
        left = fn.op(f"sub i64 {fn.iadd(first, 1)}, {key}")
        left = fn.op(f"select i1 {fn.op(f'icmp slt i64 {left}, 0')}, i64 0, i64 {left}")
        return fn.imin(left, count)

    def _mask_rows(self, fn: Fn, first: str) -> list[str]:
        """Offsets of the mask's rows for every lane of a block; lanes beyond the queries repeat the last one."""
        if self.k.mask is None or self.k.mask.strides[-2] == 0:
            return [""] * self.nv
        lanes, out = self.lanes, []
        full = f"<{lanes} x i64>"
        for v in range(self.nv):
            row = fn.op(
                f"add {full} {fn.splat(fn.iadd(first, v * lanes), 'i64', lanes)}, {iota('i64', lanes)}"
            )
            last = f"splat (i64 {self.k.tq - 1})"
            row = fn.op(
                f"select <{lanes} x i1> {fn.op(f'icmp slt {full} {row}, {last}')}, {full} {row}, {full} {last}"
            )
            out.append(fn.op(f"mul {full} {row}, splat (i64 {self.k.mask.strides[-2]})"))
        return out

    def _masked(
        self, fn: Fn, n: mathlib.Num, x: str, key: str, first: str, v: int, rows: str, pointer: str | None
    ) -> str:
        """The score of ``key`` for vector ``v`` of the queries at ``first``, plus the mask; -inf where it is not seen."""
        lanes, live = self.lanes, None
        if self.k.causal:
            behind = fn.op(f"trunc i64 {fn.op(f'sub i64 {fn.iadd(key, -v * lanes)}, {first}')} to i32")
            live = fn.op(f"icmp sge <{lanes} x i32> {iota('i32', lanes)}, {fn.splat(behind, 'i32', lanes)}")
        if self.k.mask is not None and pointer is not None:
            access = self.k.mask
            dtype = self.dtype_of(access.buffer)
            mem = memory_type(dtype)
            start = fn.gep(pointer, fn.imul(key, access.strides[-1]), mem)
            if rows:
                at = fn.op(f"getelementptr {mem}, ptr {start}, <{lanes} x i64> {rows}")
                m = fn.gather(mem, at, lanes, const(True, "i1", lanes), "zeroinitializer")
            else:
                m = fn.splat(fn.load(mem, start), mem, lanes)
            if dtype.kind == "b":
                on = fn.op(f"icmp ne <{lanes} x i8> {m}, zeroinitializer")
                live = fn.op(f"and <{lanes} x i1> {live}, {on}") if live else on
            else:
                if mem == "half":
                    m, dtype = fn.op(f"fpext <{lanes} x half> {m} to <{lanes} x float>"), np.dtype(np.float32)
                m = mathlib.convert(fn, m, dtype, self._dtype(), lanes)
                x = n.add(x, n.mul(m, n.c(1.0 / self.unit)) if self.unit != 1.0 else m)
        return n.select(live, x, n.c(-math.inf)) if live else x

    def _dtype(self) -> np.dtype:
        return np.dtype(np.float32 if self.ty == "float" else np.float64)

    def _finish(self, fn: Fn, tasks: int, products: int) -> Compiled:
        k = self.k
        share = 0.55 if k.causal else 1.0
        scores = self.heads * k.tq * k.tk * share
        flops = scores * (k.d + k.dv_dim) * products
        cost = flops / (4 * self.lanes) * 0.5 + scores * 3 / self.lanes
        stage = Stage(fn.name, list(range(len(self.buffers))), tasks, cost, self.used + 4096)
        return Compiled([stage])
