"""Matrix products: packed panels, register tiles, fused epilogues. ``compile_contract`` is called by ``compiler.py``.

C is cut into blocks of tiles; a task computes one block, and the cut depends on the shape only. Operands whose layout
is bad for the micro-kernel are first packed by a stage of their own (all threads together), small ones are read in
place. Products with a side of one, or of integers, become loops with a reduction.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from tracejit.program import Contract
from tracejit_cpu.body import body_cost, localize
from tracejit_cpu.epilogue import Epilogue
from tracejit_cpu.gemm_problem import (
    Operand,
    as_loop,
    pad_axes,
    prefers_loop,
    simplify,
    swap,
    wants_swap,
)
from tracejit_cpu.irbuilder import Fn, Module, memory_type, value_type
from tracejit_cpu.micro import Tile, micro_kernel, pack, pack_table, tile_for
from tracejit_cpu.stages import Compiled, Stage

KC_MAX = 1024
SMALL_B = 64 << 10  # bytes of an operand that is read in place
PRIVATE_ROWS = 192  # with so few rows one task can cover them all
SLAB_ROWS = 36  # with fewer rows per task, B is read too often
PACK_K = 64  # a slab whose rows are contiguous is packed in pieces of this depth, which stay in a cache
PREFETCH_K = 64  # products with shorter sums finish before a prefetch would


class GemmCompiler:
    """Emits the stages of one contraction."""

    def __init__(self, module: Module, c: Contract, dtype_of: Callable[[int], np.dtype], name: str) -> None:
        self.module, self.name = module, name
        c = pad_axes(c)
        if wants_swap(c):
            c = swap(c)
        self.p = simplify(c, dtype_of)
        self.acc = value_type(c.acc_dtype)
        self.tile: Tile = tile_for(module.host, self.acc)
        self.local = localize(c.epilogue, dtype_of, self.p.groups)
        self.buffers = [*self.local.buffers, c.a.buffer, c.b.buffer]
        self.p.a.buffer, self.p.b.buffer = len(self.buffers) - 2, len(self.buffers) - 1
        self.temps: list[int] = []
        #: Few rows: the task that uses a panel of B packs it, into its own scratch memory.
        self.private_b = False
        #: Many rows: each task packs its own rows of A, this many row blocks; 0 if not.
        self.slab = 0
        self.stages: list[Stage] = []
        self.panels = -(-self.p.n // self.tile.nr)
        self.blocks = -(-self.p.m // self.tile.mr)
        # The last row block starts early and repeats rows of the one before, so that one kernel height serves all;
        # its epilogue skips the repeated rows.
        self.rows = min(self.tile.mr, self.p.m)

    def _reuse(self, op: Operand) -> int:
        """How many copies of a packed operand exist: one per batch index that it varies along."""
        return math.prod(n for n, s in zip(self.p.batch, op.batch) if s)

    def _decide_packing(self) -> tuple[bool, bool]:
        p, t = self.p, self.tile
        size = t.bytes
        a_mem, b_mem = memory_type(p.a.dtype), memory_type(p.b.dtype)
        pack_b = b_mem != t.ty or p.b.ktable is not None or p.b.free != 1
        if not pack_b and p.m > 4 * t.mr:
            pack_b = p.k * p.n * size > SMALL_B or (abs(p.b.k) * size % 4096 == 0 and p.k > 64)
        pack_a = a_mem != t.ty or p.a.ktable is not None
        if not pack_a and p.n > 2 * t.nr:
            if p.a.k == 1:
                pack_a = p.a.free * size % 2048 == 0 and p.k >= 128 and p.n > 4 * t.nr
            elif p.m * p.k * size > SMALL_B:
                pack_a = True
        return pack_a, pack_b

    # -- packing stages -----------------------------------------------------------------------------------------------
    def _pack_stage(self, op: Operand, width: int, count: int, tag: str, rows: bool) -> None:
        """Pack all panels of an operand; one task per panel (and batch index)."""
        p, t = self.p, self.tile
        copies = self._reuse(op)
        op.packed = len(self.temps)
        self.temps.append(copies * count * p.k * width * t.bytes + 256)
        memory = memory_type(op.dtype)
        fn = Fn(self.module, f"{self.name}_{tag}", "ptr %src, ptr %dst, i64 %lo, i64 %hi, ptr %scr")
        with fn.loop("%lo", "%hi") as task:
            block, rest = task, "0"
            if copies > 1:
                block, rest = fn.op(f"urem i64 {task}, {count}"), fn.op(f"udiv i64 {task}, {count}")
            offset: str = str(op.offset)
            axes = [(n, s) for n, s in zip(p.batch, op.batch) if s]
            for n, s in reversed(axes):
                at = rest if (n, s) is axes[0] else fn.op(f"urem i64 {rest}, {n}")
                offset = fn.iadd(offset, fn.imul(at, s))
                rest = fn.op(f"udiv i64 {rest}, {n}") if (n, s) is not axes[0] else rest
            if rows:
                first, number = self._first_row(fn, block), str(self.rows)
            else:
                first = fn.imul(block, width)
                number = fn.imin(fn.op(f"sub i64 {p.n}, {first}"), width)
            dst = fn.gep("%dst", fn.imul(task, p.k * width), t.ty)
            src = fn.gep("%src", offset, memory)
            self._emit_pack(fn, op, memory, src, first, number, width, dst, "0", str(p.k))
        fn.finish()
        moved = copies * count * p.k * width
        self.stages.append(
            Stage(fn.name, [op.buffer, ~op.packed], copies * count, moved * 0.25, only_reads=[op.buffer])
        )

    def _emit_pack(
        self, fn: Fn, op: Operand, memory: str, src: str, first: str, number: str, width: int, dst: str,
        k0: str, kn: str,
    ) -> None:  # fmt: skip
        """Pack rows or columns ``first``... of an operand over ``kn`` positions of the sum from ``k0``."""
        t, p = self.tile, self.p
        if op.ktable is None:
            src = fn.gep(fn.gep(src, fn.imul(first, op.free), memory), fn.imul(k0, op.k), memory)
            name = pack(self.module, t.ty, memory, t.lanes, width)
            fn.emit(
                f"call void @{name}(ptr {src}, i64 {op.k}, i64 {op.free}, i64 {kn}, i64 {number}, ptr {dst})"
            )
            return
        free = np.arange(max(p.m, p.n), dtype=np.int64) * op.free
        name = pack_table(self.module, t.ty, memory, width)
        ktab, ntab = fn.gep(self.module.table(op.ktable), k0, "i64"), self.module.table(free)
        at = fn.gep(ntab, first, "i64")
        fn.emit(f"call void @{name}(ptr {src}, ptr {ktab}, ptr {at}, i64 {kn}, i64 {number}, ptr {dst})")

    def _fill_slab(self, fn: Fn, a: str, slab: str, first: str, last: str, k0: str, kn: str) -> None:
        """Pack row blocks ``first`` to ``last`` of A over ``kn`` positions of the sum from ``k0``."""
        p, t = self.p, self.tile
        depth = PACK_K if p.a.free == 1 and p.a.ktable is None else int(kn)
        with fn.loop(0, kn, depth) as k, fn.loop(first, last) as block:
            place = fn.imul(fn.op(f"sub i64 {block}, {first}"), fn.imul(kn, t.mr))
            dst = fn.gep(slab, fn.iadd(place, fn.imul(k, t.mr)), t.ty)
            count = fn.imin(fn.op(f"sub i64 {kn}, {k}"), depth)
            self._emit_pack(
                fn, p.a, memory_type(p.a.dtype), a, self._first_row(fn, block), str(self.rows), t.mr, dst,
                fn.iadd(k0, k), count,
            )  # fmt: skip

    def _first_row(self, fn: Fn, block: str) -> str:
        """First row of row block ``block``."""
        if self.p.m % self.rows == 0:
            return fn.imul(block, self.rows)
        return fn.imin(fn.imul(block, self.rows), self.p.m - self.rows)

    # -- main stage -----------------------------------------------------------------------------------------------------
    def _wanted(self) -> int:
        """Number of tasks worth having."""
        flops = 2.0 * math.prod(self.p.batch) * self.p.m * self.p.n * self.p.k
        return min(24, max(1, int(flops / 400_000)))

    def _slab(self) -> int:
        """Row blocks per task when each task packs its own rows of A and goes over all columns; 0 where that is bad."""
        rows = -(-self.blocks * math.prod(self.p.batch) // self._wanted())
        rows = min(rows, self.blocks, max(1, 96 // self.tile.mr))
        return (
            rows
            if rows * self.tile.mr >= SLAB_ROWS and self._reuse(self.p.a) == math.prod(self.p.batch)
            else 0
        )

    def _blocking(self) -> tuple[int, int]:
        """Row blocks and panels per task."""
        p, t = self.p, self.tile
        mb, nb = min(self.blocks, max(1, 96 // t.mr)), min(self.panels, max(1, 128 // t.nr))
        if self.private_b:
            mb = self.blocks
        if self.slab:
            return self.slab, self.panels
        batch, wanted = math.prod(p.batch), self._wanted()
        while batch * -(-self.blocks // mb) * -(-self.panels // nb) < wanted and (mb > 1 or nb > 1):
            if nb > 1 and (nb * t.nr >= mb * t.mr or self.private_b):
                nb = -(-nb // 2)
            elif self.private_b:
                break
            elif mb > 1:
                mb = -(-mb // 2)
            else:
                nb = -(-nb // 2)
        # even out the last task of a row or column of tasks
        mb = -(-self.blocks // -(-self.blocks // mb))
        nb = -(-self.panels // -(-self.panels // nb))
        return mb, nb

    def compile(self) -> Compiled:
        """Emit everything."""
        p, t = self.p, self.tile
        pack_a, pack_b = self._decide_packing()
        if pack_b and p.m <= PRIVATE_ROWS and self._reuse(p.b) == math.prod(p.batch):
            self.private_b = True
        elif pack_b:
            self._pack_stage(p.b, t.nr, self.panels, "pb", rows=False)
        if pack_a and not self.private_b:
            self.slab = self._slab()
        if pack_a and not self.slab:
            self._pack_stage(p.a, t.mr, self.blocks, "pa", rows=True)
        self._main()
        self.stages[-1].after = list(range(len(self.stages) - 1))
        return Compiled(self.stages, self.temps)

    def _main(self) -> None:
        p, t = self.p, self.tile
        mb, nb = self._blocking()
        mt, nt = -(-self.blocks // mb), -(-self.panels // nb)
        batch = math.prod(p.batch)
        tail = p.n % t.nr
        chunks = -(-p.k // KC_MAX)
        kc = -(-p.k // chunks)
        tile_bytes = t.mr * t.nr * t.bytes
        acc_bytes = tile_bytes * (mb * nb if chunks > 1 else 1)
        tail_panel = bool(p.b.packed is None and not self.private_b and tail and tail % t.lanes)
        scratch = acc_bytes + (p.k * t.nr * t.bytes + 256 if tail_panel else 0)
        if self.private_b:
            scratch = acc_bytes + kc * t.nr * t.bytes + 256
        slab_at = -(-scratch // 64) * 64
        scratch = slab_at + self.slab * kc * t.mr * t.bytes
        outer = list(range(len(p.batch)))
        m_axis, n_axis = len(outer), len(outer) + 1
        epilogue = Epilogue(self.module, self.local, self.name, t, outer, m_axis, n_axis)
        temps = [x for x in (p.a.packed, p.b.packed) if x is not None]
        params = [f"ptr %arg{i}" for i in range(len(self.buffers))] + [f"ptr %p{x}" for x in temps]
        fn = Fn(self.module, f"{self.name}_mm", ", ".join([*params, "i64 %lo", "i64 %hi", "ptr %scr"]))
        epilogue.begin(fn)
        with fn.loop("%lo", "%hi") as task:
            rest = task
            nblock = fn.op(f"urem i64 {rest}, {nt}") if nt > 1 else "0"
            rest = fn.op(f"udiv i64 {rest}, {nt}") if nt > 1 else rest
            mblock = fn.op(f"urem i64 {rest}, {mt}") if mt > 1 else "0"
            rest = fn.op(f"udiv i64 {rest}, {mt}") if mt > 1 else rest
            index: list[str] = []
            for axis in reversed(range(len(p.batch))):
                at = rest if axis == 0 else fn.op(f"urem i64 {rest}, {p.batch[axis]}")
                rest = rest if axis == 0 else fn.op(f"udiv i64 {rest}, {p.batch[axis]}")
                index.insert(0, at)
            a = self._base(fn, p.a, index, t.mr * self.blocks)
            b = self._base(fn, p.b, index, t.nr * self.panels)
            panel = fn.gep("%scr", acc_bytes, "i8")
            if tail_panel:
                last = fn.op(f"icmp eq i64 {nblock}, {nt - 1}") if nt > 1 else "true"
                with fn.when(last):
                    name = pack(self.module, t.ty, t.ty, t.lanes, t.nr)
                    src = fn.gep(b, fn.imul(p.n - tail, p.b.free), t.ty)
                    fn.emit(
                        f"call void @{name}(ptr {src}, i64 {p.b.k}, i64 {p.b.free}, i64 {p.k}, i64 {tail}, ptr {panel})"
                    )
            first_panel = fn.imul(nblock, nb)
            last_panel = fn.imin(fn.iadd(first_panel, nb), self.panels) if nt > 1 else str(self.panels)
            first_block = fn.imul(mblock, mb)
            last_block = fn.imin(fn.iadd(first_block, mb), self.blocks) if mt > 1 else str(self.blocks)

            def run_blocks(pn: str, width: int, k0: str, kn: str, add: str, final: bool) -> None:
                n0 = fn.imul(pn, t.nr)
                vectors = -(-width // t.lanes)
                in_scratch = width != t.nr and tail_panel
                if p.b.packed is not None:
                    bp = fn.gep(b, fn.iadd(fn.imul(pn, p.k * t.nr), fn.imul(k0, t.nr)), t.ty)
                    bs = t.nr
                elif self.private_b:
                    memory = memory_type(p.b.dtype)
                    self._emit_pack(fn, p.b, memory, b, n0, str(width), t.nr, panel, k0, kn)
                    bp, bs = panel, t.nr
                elif in_scratch:
                    bp, bs = fn.gep(panel, fn.imul(k0, t.nr), t.ty), t.nr
                else:
                    bp, bs = fn.gep(b, fn.iadd(n0, fn.imul(k0, p.b.k)), t.ty), p.b.k

                rows = self.rows
                mk = micro_kernel(self.module, t, rows, vectors)
                with fn.loop(first_block, last_block) as block:
                    m0 = self._first_row(fn, block)
                    if self.slab:
                        local = fn.op(f"sub i64 {block}, {first_block}")
                        ap, rs, ks = fn.gep(slab, fn.imul(local, fn.imul(kn, t.mr)), t.ty), 1, t.mr
                    elif p.a.packed is not None:
                        ap = fn.gep(a, fn.iadd(fn.imul(block, p.k * t.mr), fn.imul(k0, t.mr)), t.ty)
                        rs, ks = 1, t.mr
                    else:
                        ap = fn.gep(a, fn.iadd(fn.imul(m0, p.a.free), fn.imul(k0, p.a.k)), t.ty)
                        rs, ks = p.a.free, p.a.k
                    out = "%scr"
                    if chunks > 1:
                        local = fn.iadd(
                            fn.imul(fn.op(f"sub i64 {pn}, {first_panel}"), mb),
                            fn.op(f"sub i64 {block}, {first_block}"),
                        )
                        out = fn.gep("%scr", fn.imul(local, tile_bytes), "i8")
                    if final and p.k >= PREFETCH_K:
                        epilogue.prefetch(fn, index, m0, rows, n0)
                    fn.emit(
                        f"call void @{mk}(ptr {ap}, i64 {rs}, i64 {ks}, ptr {bp}, i64 {bs}, i64 {kn}, ptr {out}, i64 {add})"
                    )
                    if final:
                        self._apply(fn, epilogue, width, block, m0, out, n0, index)

            slab = fn.gep("%scr", slab_at, "i8")

            def run_panels(k0: str, kn: str, add: str, final: bool) -> None:
                if self.slab:
                    self._fill_slab(fn, a, slab, first_block, last_block, k0, kn)
                full = self.panels - (1 if tail else 0)
                if full:
                    with fn.loop(first_panel, fn.imin(last_panel, full)) as pn:
                        run_blocks(pn, t.nr, k0, kn, add, final)
                if tail:
                    ends = fn.op(f"icmp eq i64 {last_panel}, {self.panels}") if nt > 1 else "true"
                    with fn.when(ends):
                        run_blocks(str(self.panels - 1), tail, k0, kn, add, final)

            if chunks == 1:
                run_panels("0", str(p.k), "0", True)
            else:
                with fn.loop(0, (chunks - 1) * kc, kc) as k0:
                    add = fn.op(f"zext i1 {fn.op(f'icmp ne i64 {k0}, 0')} to i64")
                    run_panels(k0, str(kc), add, False)
                run_panels(str((chunks - 1) * kc), str(p.k - (chunks - 1) * kc), "1", True)
        fn.finish()
        tasks = batch * mt * nt
        flops = 2.0 * batch * p.m * p.n * p.k
        cost = flops / (2 * t.lanes * 2) * 0.5 + batch * p.m * p.n * body_cost(self.local) * 0.4 / t.lanes
        pointers = [*range(len(self.buffers)), *(~x for x in temps)]
        self.stages.append(Stage(fn.name, pointers, tasks, cost, scratch))

    def _apply(
        self,
        fn: Fn,
        epilogue: Epilogue,
        width: int,
        block: str,
        m0: str,
        out: str,
        n0: str,
        index: Sequence[str],
    ) -> None:
        """Call the epilogue on the rows of a tile that no earlier block covered."""
        new, start, rows = str(self.rows), m0, self.rows
        if self.p.m % rows:
            start = fn.imul(block, rows)
            skip = fn.op(f"sub i64 {start}, {m0}")
            new = fn.op(f"sub i64 {rows}, {skip}")
            out = fn.gep(out, fn.imul(skip, self.tile.nr), self.tile.ty)
        epilogue.apply(fn, width, index, start, new, n0, out)

    def _base(self, fn: Fn, op: Operand, index: Sequence[str], rows: int) -> str:
        """Address of an operand (or of its packed copy) at the current batch index."""
        t, p = self.tile, self.p
        if op.packed is None:  # in place, in the type of memory
            offset: str = str(op.offset)
            for at, stride in zip(index, op.batch):
                offset = fn.iadd(offset, fn.imul(at, stride))
            return fn.gep(f"%arg{op.buffer}", offset, memory_type(op.dtype))
        number = "0"
        for at, size, stride in zip(index, p.batch, op.batch):
            if stride:
                number = fn.iadd(fn.imul(number, size), at)
        return fn.gep(f"%p{op.packed}", fn.imul(number, rows * p.k), t.ty)


def compile_contract(
    module: Module, c: Contract, dtype_of: Callable[[int], np.dtype], name: str
) -> tuple[Compiled, list[int]]:
    """Emit a contraction; returns its stages and the program buffers behind their local numbers."""
    g = GemmCompiler(module, c, dtype_of, name)
    return g.compile(), g.buffers


__all__ = ["GemmCompiler", "as_loop", "compile_contract", "prefers_loop"]
