"""What attention kernels are built from: scratch memory, padded copies, products of tiles, causal bounds, scores.

:class:`AttentionBase` is the part that ``attention.py``'s forward and backward kernels share.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np

from tracejit.program import Access, AttentionKernel
from tracejit_cpu import mathlib
from tracejit_cpu.irbuilder import Fn, Module, const, iota, mask_first, memory_type, value_type, vec
from tracejit_cpu.micro import Tile, micro_kernel, pack, tile_for
from tracejit_cpu.stages import Compiled, Stage

DtypeOf = Callable[[int], np.dtype]


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
        self.tile: Tile = tile_for(module.host, self.ty)
        t = self.tile
        self.block = math.lcm(t.mr, t.nr)
        while self.block < 48:
            self.block *= 2
        self.tk = _up(k.tk, t.nr)  # width of a row of scores
        self.tall = _up(k.tk, t.mr)  # rows of dk and dv
        self.blocks = -(-k.tq // self.block)
        self.dp, self.vp = _up(k.d, t.nr), _up(k.dv_dim, t.nr)
        self.buffers: list[int] = []
        self.used = 0
        self.heads = math.prod(k.batch)

    # -- small helpers --------------------------------------------------------------------------------------------------
    def _scratch(self, fn: Fn, items: int) -> str:
        """A region of the thread's scratch memory, in elements of the computation type."""
        at = self.used
        self.used += _up(items * self.tile.bytes, 64) + 64
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
        self, fn: Fn, name: str, pointer: str, rows: int, columns: int, all_rows: int, pitch: int
    ) -> str:
        """Copy a whole operand of a head to scratch."""
        access: Access = getattr(self.k, name)
        mem = memory_type(self.dtype_of(access.buffer))
        rs, cs = access.strides[-2], access.strides[-1]
        dst = self._scratch(fn, all_rows * pitch)
        copy = _copy_rows(self.module, self.ty, mem, self.tile.lanes)
        sizes = f"i64 {rows}, i64 {columns}, i64 {all_rows}"
        fn.emit(f"call void @{copy}(ptr {pointer}, i64 {rs}, i64 {cs}, {sizes}, ptr {dst}, i64 {pitch})")
        return dst

    def _panels(self, fn: Fn, source: str, pitch: int, depth: int) -> str:
        """Transposed panels [key panel][depth][nr] of a padded copy [keys][pitch]."""
        t = self.tile
        dst = self._scratch(fn, self.tk * depth)
        name = pack(self.module, self.ty, self.ty, t.lanes, t.nr)
        with fn.loop(0, self.tk // t.nr) as p:
            src = fn.gep(source, fn.imul(p, t.nr * pitch), self.ty)
            out = fn.gep(dst, fn.imul(p, t.nr * depth), self.ty)
            fn.emit(f"call void @{name}(ptr {src}, i64 1, i64 {pitch}, i64 {depth}, i64 {t.nr}, ptr {out})")
        return dst

    def _product(
        self, fn: Fn, rows: str | int, panels: str | int, a: str, rs: int, ks: int, b: str, bstep: int, bs: int,
        depth: str | int, out: str, ostep: int, add: str | int, start: Callable[[str], str] | None = None,
        span: Callable[[str], tuple[str, str]] | None = None,
    ) -> None:  # fmt: skip
        """out[panel][row][nr] (+)= A B for ``rows`` (a multiple of mr) and ``panels``; steps and strides in elements.

        ``start`` gives the first row that a panel needs; ``span`` the part (first, count) of the sum that the tile at a
        row needs. Together they skip what causality makes zero.
        """
        t, ty = self.tile, self.ty
        mk = micro_kernel(self.module, t, t.mr, t.nv)
        with fn.loop(0, panels) as p:
            bp, op = fn.gep(b, fn.imul(p, bstep), ty), fn.gep(out, fn.imul(p, ostep), ty)
            with fn.loop(start(p) if start else 0, rows, t.mr) as r:
                ap, to = fn.gep(a, fn.imul(r, rs), ty), fn.gep(op, fn.imul(r, t.nr), ty)
                low, count = span(r) if span else ("0", str(depth))
                ap, part = fn.gep(ap, fn.imul(low, ks), ty), fn.gep(bp, fn.imul(low, bs), ty)
                fn.emit(
                    f"call void @{mk}(ptr {ap}, i64 {rs}, i64 {ks}, ptr {part}, i64 {bs}, i64 {count}, ptr {to}, i64 {add})"
                )

    def _seen(self, fn: Fn, first: str, r: str) -> str:
        """How many keys the tile of query rows at ``first + r`` sees; every row of it gets that many probabilities."""
        if not self.k.causal:
            return str(self.k.tk)
        return fn.imin(fn.iadd(fn.iadd(first, r), self.tile.mr), self.k.tk)

    def _tile_of(self, fn: Fn, r: str) -> str:
        return fn.op(f"sub i64 {r}, {fn.op(f'urem i64 {r}, {self.tile.mr}')}")

    def _behind(self, fn: Fn, first: str, key: str) -> str:
        """The first tile of rows (relative to ``first``) that sees ``key``."""
        if not self.k.causal:
            return "0"
        d = fn.op(f"sub i64 {key}, {first}")
        d = fn.op(f"select i1 {fn.op(f'icmp slt i64 {d}, 0')}, i64 0, i64 {d}")
        return self._tile_of(fn, d)

    def _start(self, fn: Fn, first: str, panel: str) -> str:
        return self._behind(fn, first, fn.imul(panel, self.tile.nr))

    def _forward_span(self, fn: Fn, first: str, r: str) -> tuple[str, str]:
        """The keys that the tile of queries at ``r`` sees."""
        return "0", self._seen(fn, first, r)

    def _backward_span(self, fn: Fn, first: str, rows: str, key: str) -> tuple[str, str]:
        """The queries of a block of ``rows`` that see the tile of keys at ``key``."""
        low = self._behind(fn, first, key)
        return low, fn.op(f"sub i64 {rows}, {low}")

    def _panels_for(self, fn: Fn, keys: str) -> str:
        if keys.isdigit():
            return str(-(-int(keys) // self.tile.nr))
        return fn.op(f"udiv i64 {fn.iadd(keys, self.tile.nr - 1)}, {self.tile.nr}")

    def _rows(self, fn: Fn, first: str) -> tuple[str, str]:
        """(rows of the block at ``first``, the same rounded up to whole tiles)."""
        rows = fn.imin(fn.op(f"sub i64 {self.k.tq}, {first}"), self.block)
        return rows, fn.imin(fn.op(f"sub i64 {_up(self.k.tq, self.tile.mr)}, {first}"), self.block)

    def _store_rows(
        self,
        fn: Fn,
        name: str,
        pointer: str,
        first: str,
        rows: str,
        columns: int,
        acc: str,
        step: int,
        scale: str | None,
    ) -> None:
        """Write accumulator rows [panel][row][nr] to an operand, row r scaled by scale[r]."""
        t, ty, lanes = self.tile, self.ty, self.tile.lanes
        access: Access = getattr(self.k, name)
        dtype = self.dtype_of(access.buffer)
        mem = memory_type(dtype)
        rs, cs = access.strides[-2], access.strides[-1]
        with fn.loop(0, rows) as r:
            factor = fn.splat(fn.load(ty, fn.gep(scale, r, ty)), ty, lanes) if scale else None
            base = fn.gep(pointer, fn.imul(fn.iadd(first, r), rs), mem)
            row = fn.gep(acc, fn.imul(r, t.nr), ty)
            for at in range(0, columns, lanes):
                panel, inside = divmod(at, t.nr)
                x = fn.load(ty, fn.gep(row, panel * step + inside, ty), lanes)
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

    def _key_loops(self, fn: Fn, limit: str, panels: str) -> Iterator[tuple[str, str | None]]:
        """The bodies of two loops over panels of keys, (panel, limit): first those that end below ``limit``, unmasked."""
        whole = "0" if self.k.mask is not None else fn.op(f"udiv i64 {limit}, {self.tile.nr}")
        if self.k.mask is None:
            with fn.loop(0, whole) as p:
                yield p, None
        with fn.loop(whole, panels) as p:
            yield p, limit

    def _score(
        self, fn: Fn, n: mathlib.Num, raw: str, row: str, key: str, limit: str | None, pointer: str | None
    ) -> str:
        """scale * s + mask for the lanes ``key...``; -inf at and beyond ``limit``, if there is one."""
        lanes, ty = self.tile.lanes, self.ty
        x = n.mul(raw, n.c(self.k.scale)) if self.k.scale != 1.0 else raw
        if limit is None:
            return x
        left = fn.op(f"trunc i64 {fn.op(f'sub i64 {limit}, {key}')} to i32")
        live = fn.op(f"icmp slt <{lanes} x i32> {iota('i32', lanes)}, {fn.splat(left, 'i32', lanes)}")
        if self.k.mask is not None and pointer is not None:
            access = self.k.mask
            dtype = self.dtype_of(access.buffer)
            mem = memory_type(dtype)
            base = fn.gep(pointer, fn.imul(row, access.strides[-2]), mem)
            stride = access.strides[-1]
            start = fn.gep(base, fn.imul(key, stride), mem)
            if stride == 1:
                m = fn.masked_load(
                    mem, start, lanes, live, const(0, mem, lanes) if mem != "half" else "zeroinitializer"
                )
            else:
                at = fn.op(f"getelementptr {mem}, ptr {start}, <{lanes} x i64> {iota('i64', lanes, stride)}")
                m = fn.gather(mem, at, lanes, live, "zeroinitializer")
            if dtype.kind == "b":
                on = fn.op(f"icmp ne <{lanes} x i8> {m}, zeroinitializer")
                live = fn.op(f"and <{lanes} x i1> {live}, {on}")
            else:
                x = n.add(
                    x,
                    mathlib.convert(
                        fn,
                        self._wide(fn, m, mem),
                        self._mask_dtype(dtype),
                        np.dtype(np.float32 if ty == "float" else np.float64),
                        lanes,
                    ),
                )
        return n.select(live, x, n.c(-math.inf))

    def _wide(self, fn: Fn, value: str, mem: str) -> str:
        lanes = self.tile.lanes
        return fn.op(f"fpext <{lanes} x half> {value} to <{lanes} x float>") if mem == "half" else value

    @staticmethod
    def _mask_dtype(dtype: np.dtype) -> np.dtype:
        return np.dtype(np.float32) if dtype.name == "float16" else dtype

    def _limit(self, fn: Fn, row: str) -> str:
        """How many keys query ``row`` sees."""
        return fn.imin(fn.iadd(row, 1), self.k.tk) if self.k.causal else str(self.k.tk)

    def _keys(self, fn: Fn, first: str, rows: str) -> str:
        """Keys that the block of queries starting at ``first`` needs."""
        return fn.imin(fn.iadd(first, rows), self.k.tk) if self.k.causal else str(self.k.tk)

    def _dtype(self) -> np.dtype:
        return np.dtype(np.float32 if self.ty == "float" else np.float64)

    def _exp(self, fn: Fn, n: mathlib.Num, x: str) -> str:
        return mathlib.emit(fn, "exp", [x], [self._dtype()], self._dtype(), n.lanes, {})

    def _copy_block(
        self, fn: Fn, name: str, pointer: str, first: str, rows: str, columns: int, dst: str, pitch: int
    ) -> None:
        """Copy one block of query rows, padded to a whole block."""
        access: Access = getattr(self.k, name)
        mem = memory_type(self.dtype_of(access.buffer))
        rs, cs = access.strides[-2], access.strides[-1]
        src = fn.gep(pointer, fn.imul(first, rs), mem)
        copy = _copy_rows(self.module, self.ty, mem, self.tile.lanes)
        sizes = f"i64 {rows}, i64 {columns}, i64 {self.block}"
        fn.emit(f"call void @{copy}(ptr {src}, i64 {rs}, i64 {cs}, {sizes}, ptr {dst}, i64 {pitch})")

    def _finish(self, fn: Fn, tasks: int, products: int) -> Compiled:
        k = self.k
        share = 0.55 if k.causal else 1.0
        flops = 2.0 * self.heads * k.tq * k.tk * (k.d + k.dv_dim) * products / 2 * share
        cost = flops / (4 * self.tile.lanes) * 0.7 + self.heads * k.tq * k.tk * share * 12 / self.tile.lanes
        stage = Stage(fn.name, list(range(len(self.buffers))), tasks, cost, self.used + 4096)
        return Compiled([stage])
