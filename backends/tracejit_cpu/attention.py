"""Flash attention, forward and backward, on the micro-kernels of ``micro.py``. Called by ``compiler.py``.

One task handles the queries of one head (forward: or a group of query blocks). Scores exist only for a block of queries:
they are computed tile by tile, turned into probabilities row by row, and consumed at once (Dao, FlashAttention-2, 2023).
With ``causal`` the keys behind a block are skipped. Operands are first copied into scratch with rows padded to whole
tiles, which makes every layout and dtype alike; padded rows and columns only produce values that are never stored.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from tracejit.program import Access, AttentionKernel
from tracejit_cpu import mathlib
from tracejit_cpu.irbuilder import Fn, Module, const, iota, mask_first, memory_type, value_type, vec
from tracejit_cpu.loops import Compiled, Stage
from tracejit_cpu.micro import Tile, micro_kernel, pack, tile_for

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


class AttentionCompiler:
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
        fn.emit(
            f"call void @{copy}(ptr {pointer}, i64 {rs}, i64 {cs}, i64 {rows}, i64 {columns}, i64 {all_rows}, ptr {dst}, i64 {pitch})"
        )
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

    def _score(
        self, fn: Fn, n: mathlib.Num, raw: str, row: str, key: str, limit: str, pointer: str | None
    ) -> str:
        """scale * s + mask for the lanes ``key...``; -inf at and beyond ``limit``."""
        lanes, ty = self.tile.lanes, self.ty
        x = n.mul(raw, n.c(self.k.scale)) if self.k.scale != 1.0 else raw
        keys = fn.op(f"add <{lanes} x i64> {fn.splat(key, 'i64', lanes)}, {iota('i64', lanes)}")
        live = fn.op(f"icmp slt <{lanes} x i64> {keys}, {fn.splat(limit, 'i64', lanes)}")
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

    # -- forward ----------------------------------------------------------------------------------------------------------
    def forward(self) -> Compiled:
        """softmax(scale Q K^T + mask) V, block of queries by block of queries."""
        k, t, ty, lanes = self.k, self.tile, self.ty, self.tile.lanes
        fn = self._begin(["q", "k", "v", "mask", "out", "lse"])
        blocks = self.blocks
        groups = 1 if self.heads >= 16 else min(blocks, -(-16 // max(1, self.heads)))
        per = -(-blocks // groups)
        groups = -(-blocks // per)
        n = mathlib.Num(fn, ty, lanes)
        one = mathlib.Num(fn, ty, 1)
        full = vec(ty, lanes)
        with fn.loop("%lo", "%hi") as task:
            head = fn.op(f"udiv i64 {task}, {groups}") if groups > 1 else task
            group = fn.op(f"urem i64 {task}, {groups}") if groups > 1 else "0"
            at = self._heads(fn, head)
            kc = self._copy(fn, "k", at["k"], k.tk, k.d, self.tk, self.dp)
            kt = self._panels(fn, kc, self.dp, self.dp)
            vc = self._copy(fn, "v", at["v"], k.tk, k.dv_dim, self.tk, self.vp)
            qc = self._scratch(fn, self.block * self.dp)
            scores = self._scratch(fn, self.block * self.tk)
            probs = self._scratch(fn, self.block * self.tk)
            acc = self._scratch(fn, self.block * self.vp)
            inverse = self._scratch(fn, self.block)
            low = fn.imul(group, per)
            with fn.loop(low, fn.imin(fn.iadd(low, per), blocks)) as b:
                first = fn.imul(b, self.block)
                rows, whole = self._rows(fn, first)
                self._copy_block(fn, "q", at["q"], first, rows, k.d, qc, self.dp)
                step = self.block * t.nr
                self._product(
                    fn, whole, self._panels_for(fn, self._keys(fn, first, rows)), qc, self.dp, 1,
                    kt, t.nr * self.dp, t.nr, k.d, scores, step, 0,
                    start=lambda p, first=first: self._behind(fn, first, fn.imul(p, t.nr)),
                )  # fmt: skip
                with fn.loop(0, rows) as r:
                    row = fn.iadd(first, r)
                    limit = self._limit(fn, row)
                    panels = self._panels_for(fn, self._seen(fn, first, self._tile_of(fn, r)))
                    source, target = (
                        fn.gep(scores, fn.imul(r, t.nr), ty),
                        fn.gep(probs, fn.imul(r, self.tk), ty),
                    )
                    top = fn.var(full, n.c(-math.inf))
                    with fn.loop(0, panels) as p:
                        for v in range(t.nv):
                            key = fn.iadd(fn.imul(p, t.nr), v * lanes)
                            raw = fn.load(ty, fn.gep(source, fn.iadd(fn.imul(p, step), v * lanes), ty), lanes)
                            x = self._score(fn, n, raw, row, key, limit, at.get("mask"))
                            fn.store(ty, x, fn.gep(target, key, ty), lanes)
                            old = fn.get(full, top)
                            fn.set(full, n.select(n.cmp("ogt", x, old), x, old), top)
                    peak = mathlib.horizontal(fn, "max", self._dtype(), lanes, fn.get(full, top))
                    none = one.cmp("oeq", peak, one.c(-math.inf))
                    safe = fn.splat(one.select(none, one.c(0.0), peak), ty, lanes)
                    sums = [fn.var(full, n.c(0.0)) for _ in range(t.nv)]
                    with fn.loop(0, panels) as p:
                        for v in range(t.nv):
                            pointer = fn.gep(target, fn.iadd(fn.imul(p, t.nr), v * lanes), ty)
                            e = self._exp(fn, n, n.sub(fn.load(ty, pointer, lanes), safe))
                            fn.store(ty, e, pointer, lanes)
                            fn.set(full, n.add(fn.get(full, sums[v]), e), sums[v])
                    total = fn.get(full, sums[0])
                    for s in sums[1:]:
                        total = n.add(total, fn.get(full, s))
                    total = mathlib.horizontal(fn, "sum", self._dtype(), lanes, total)
                    empty = one.cmp("oeq", total, one.c(0.0))
                    total = one.select(empty, one.c(math.nan), total)
                    fn.store(ty, one.div(one.c(1.0), total), fn.gep(inverse, r, ty))
                    if k.lse is not None:
                        lse = one.add(
                            peak, mathlib.emit(fn, "log", [total], [self._dtype()], self._dtype(), 1, {})
                        )
                        dtype = self.dtype_of(k.lse.buffer)
                        mem = memory_type(dtype)
                        if mem == "half":
                            lse = fn.op(f"fptrunc float {lse} to half")
                        fn.store(mem, lse, fn.gep(at["lse"], fn.imul(row, k.lse.strides[-1]), mem))
                self._product(
                    fn, whole, self.vp // t.nr, probs, self.tk, 1, vc, t.nr, self.vp, 0, acc, step, 0,
                    span=lambda r, first=first: ("0", self._seen(fn, first, r)),
                )  # fmt: skip
                self._store_rows(fn, "out", at["out"], first, rows, k.dv_dim, acc, step, inverse)
        fn.finish()
        return self._finish(fn, self.heads * groups, 2)

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
        fn.emit(
            f"call void @{copy}(ptr {src}, i64 {rs}, i64 {cs}, i64 {rows}, i64 {columns}, i64 {self.block}, ptr {dst}, i64 {pitch})"
        )

    def _finish(self, fn: Fn, tasks: int, products: int) -> Compiled:
        k = self.k
        share = 0.55 if k.causal else 1.0
        flops = 2.0 * self.heads * k.tq * k.tk * (k.d + k.dv_dim) * products / 2 * share
        cost = flops / (4 * self.tile.lanes) * 0.7 + self.heads * k.tq * k.tk * share * 12 / self.tile.lanes
        stage = Stage(fn.name, list(range(len(self.buffers))), tasks, cost, self.used + 4096)
        return Compiled([stage])

    # -- backward -----------------------------------------------------------------------------------------------------------
    def backward(self) -> Compiled:
        """dq, dk and dv of one head per task; probabilities are recomputed from the stored log-sum-exp."""
        k, t, ty, lanes = self.k, self.tile, self.ty, self.tile.lanes
        fn = self._begin(["q", "k", "v", "mask", "out", "lse", "dout", "dq", "dk", "dv"])
        assert k.lse is not None
        n = mathlib.Num(fn, ty, lanes)
        step = self.block * t.nr
        with fn.loop("%lo", "%hi") as head:
            at = self._heads(fn, head)
            kc = self._copy(fn, "k", at["k"], k.tk, k.d, self.tk, self.dp)
            vc = self._copy(fn, "v", at["v"], k.tk, k.dv_dim, self.tk, self.vp)
            kt, vt = self._panels(fn, kc, self.dp, self.dp), self._panels(fn, vc, self.vp, self.vp)
            qc, gc = self._scratch(fn, self.block * self.dp), self._scratch(fn, self.block * self.vp)
            oc = self._scratch(fn, self.block * self.vp)
            scores, dprobs = self._scratch(fn, self.block * self.tk), self._scratch(fn, self.block * self.tk)
            probs, dscores = self._scratch(fn, self.block * self.tk), self._scratch(fn, self.block * self.tk)
            dq = self._scratch(fn, self.block * self.dp)
            dk, dv = self._scratch(fn, self.tall * self.dp), self._scratch(fn, self.tall * self.vp)
            for pointer, items in ((dk, self.tall * self.dp), (dv, self.tall * self.vp)):
                with fn.loop(0, items, lanes) as i:
                    fn.store(ty, n.c(0.0), fn.gep(pointer, i, ty), lanes)
            with fn.loop(0, self.blocks) as b:
                first = fn.imul(b, self.block)
                rows, whole = self._rows(fn, first)
                self._copy_block(fn, "q", at["q"], first, rows, k.d, qc, self.dp)
                self._copy_block(fn, "dout", at["dout"], first, rows, k.dv_dim, gc, self.vp)
                self._copy_block(fn, "out", at["out"], first, rows, k.dv_dim, oc, self.vp)
                keys = self._keys(fn, first, rows)
                panels = self._panels_for(fn, keys)

                def start(p: str, first: str = first) -> str:
                    return self._behind(fn, first, fn.imul(p, t.nr))

                self._product(
                    fn, whole, panels, qc, self.dp, 1, kt, t.nr * self.dp, t.nr, k.d, scores, step, 0, start
                )
                self._product(
                    fn,
                    whole,
                    panels,
                    gc,
                    self.vp,
                    1,
                    vt,
                    t.nr * self.vp,
                    t.nr,
                    k.dv_dim,
                    dprobs,
                    step,
                    0,
                    start,
                )
                with fn.loop(0, rows) as r:
                    seen = self._panels_for(fn, self._seen(fn, first, self._tile_of(fn, r)))
                    self._row_grad(fn, n, r, first, seen, step, at, (gc, oc, scores, dprobs, probs, dscores))
                # dq = dS K;  dv += P^T dO;  dk += dS^T Q
                self._product(
                    fn, whole, self.dp // t.nr, dscores, self.tk, 1, kc, t.nr, self.dp, 0, dq, step, 0,
                    span=lambda r, first=first: ("0", self._seen(fn, first, r)),
                )  # fmt: skip
                self._store_rows(fn, "dq", at["dq"], first, rows, k.d, dq, step, None)

                def span(key: str, first: str = first, rows: str = rows) -> tuple[str, str]:
                    low = self._behind(fn, first, key)
                    return low, fn.op(f"sub i64 {rows}, {low}")

                tall = self.tall * t.nr
                for what, grad, source, width in ((probs, dv, gc, self.vp), (dscores, dk, qc, self.dp)):
                    self._product(
                        fn,
                        keys,
                        width // t.nr,
                        what,
                        1,
                        self.tk,
                        source,
                        t.nr,
                        width,
                        0,
                        grad,
                        tall,
                        1,
                        span=span,
                    )
            tall = self.tall * t.nr
            self._store_rows(fn, "dk", at["dk"], "0", str(k.tk), k.d, dk, tall, None)
            self._store_rows(fn, "dv", at["dv"], "0", str(k.tk), k.dv_dim, dv, tall, None)
        fn.finish()
        return self._finish(fn, self.heads, 5)

    def _row_grad(
        self,
        fn: Fn,
        n: mathlib.Num,
        r: str,
        first: str,
        panels: str,
        step: int,
        at: dict[str, str],
        scratch: tuple[str, ...],
    ) -> None:
        """Probabilities and score gradients of one query row."""
        k, t, ty, lanes = self.k, self.tile, self.ty, self.tile.lanes
        gc, oc, scores, dprobs, probs, dscores = scratch
        full = vec(ty, lanes)
        row = fn.iadd(first, r)
        limit = self._limit(fn, row)
        total = fn.var(full, n.c(0.0))
        base = fn.imul(r, self.vp)
        with fn.loop(0, self.vp, lanes) as c:
            here = fn.iadd(base, c)
            x, y = fn.load(ty, fn.gep(gc, here, ty), lanes), fn.load(ty, fn.gep(oc, here, ty), lanes)
            fn.set(full, n.fma(x, y, fn.get(full, total)), total)
        delta = fn.splat(mathlib.horizontal(fn, "sum", self._dtype(), lanes, fn.get(full, total)), ty, lanes)
        assert k.lse is not None
        dtype = self.dtype_of(k.lse.buffer)
        mem = memory_type(dtype)
        lse = fn.load(mem, fn.gep(at["lse"], fn.imul(row, k.lse.strides[-1]), mem))
        if mem == "half":
            lse = fn.op(f"fpext half {lse} to float")
        lse = fn.splat(lse, ty, lanes)
        source = fn.imul(r, t.nr)
        target = fn.imul(r, self.tk)
        with fn.loop(0, panels) as p:
            for v in range(t.nv):
                key = fn.iadd(fn.imul(p, t.nr), v * lanes)
                here = fn.iadd(source, fn.iadd(fn.imul(p, step), v * lanes))
                x = self._score(
                    fn, n, fn.load(ty, fn.gep(scores, here, ty), lanes), row, key, limit, at.get("mask")
                )
                e = self._exp(fn, n, n.sub(x, lse))
                d = n.sub(fn.load(ty, fn.gep(dprobs, here, ty), lanes), delta)
                ds = n.mul(n.mul(e, d), n.c(k.scale))
                there = fn.iadd(target, key)
                fn.store(ty, e, fn.gep(probs, there, ty), lanes)
                fn.store(ty, ds, fn.gep(dscores, there, ty), lanes)


def compile_attention(
    module: Module, k: AttentionKernel, dtype_of: DtypeOf, name: str
) -> tuple[Compiled, list[int]]:
    """Emit an attention kernel; returns its stage and the program buffers behind its pointers."""
    compiler = AttentionCompiler(module, k, dtype_of, name)
    compiled = compiler.backward() if k.grad else compiler.forward()
    return compiled, compiler.buffers
