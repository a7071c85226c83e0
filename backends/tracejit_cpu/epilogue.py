"""Epilogues of products and convolutions: a LoopBody applied to a finished register tile. Used by ``gemm.py``, ``conv.py``.

An epilogue is up to three functions: one that computes, once per call of the task function, what is the same for every
element (an optimiser's bias corrections); one that prefetches the memory a tile will touch while the micro-kernel still
multiplies (an optimiser update reads and writes six arrays, each a new cache line per row of a tile); and the body.
"""

from __future__ import annotations

from collections.abc import Sequence

from tracejit_cpu.body import Emitter, Local, dependencies
from tracejit_cpu.irbuilder import Fn, Module, mask_first, memory_type, type_bytes, value_type, vec
from tracejit_cpu.micro import Tile

CACHE_LINE = 64


class Epilogue:
    """Emits and calls the epilogue of one kernel; ``outer`` are the batch axes of ``local``, ``m`` and ``n`` its row and
    column axes.

    In the task function: :meth:`begin` once at its start, then per tile :meth:`prefetch` before and :meth:`apply` after
    the micro-kernel.
    """

    def __init__(
        self, module: Module, local: Local, name: str, tile: Tile, outer: Sequence[int], m: int, n: int
    ) -> None:
        self.module, self.local, self.name, self.tile = module, local, name, tile
        self.outer, self.m, self.n = list(outer), m, n
        self._hoisted = self._uniform()
        self._bodies: dict[int, str] = {}
        self._fetch = self._emit_prefetch()
        self._slots = "null"
        if self._hoisted:
            self._emit_uniform()

    # -- calls, from the task function -----------------------------------------------------------------------------------
    def _buffers(self) -> list[str]:
        return [f"ptr %arg{i}" for i in range(len(self.local.buffers))]

    def begin(self, fn: Fn) -> None:
        """Compute what does not vary."""
        if self._hoisted:
            self._slots = fn.var(f"[{len(self._hoisted)} x i64]")
            fn.emit(f"call void @{self.name}_u({', '.join([*self._buffers(), f'ptr {self._slots}'])})")

    def prefetch(self, fn: Fn, index: Sequence[str], m0: str, rows: str | int, n0: str | int) -> None:
        """Ask for the memory of a tile early."""
        if self._fetch:
            places = [f"i64 {x}" for x in (*index, m0, rows, n0)]
            fn.emit(f"call void @{self._fetch}({', '.join([*self._buffers(), *places])})")

    def apply(
        self, fn: Fn, width: int, index: Sequence[str], m0: str, rows: str | int, n0: str | int, tile: str
    ) -> None:
        """Apply the body to ``rows`` rows of a tile of ``width`` columns whose accumulators start at ``tile``."""
        if width not in self._bodies:
            self._bodies[width] = self._emit_body(width)
        places = [f"i64 {x}" for x in (*index, m0, rows, n0)]
        args = [*self._buffers(), *places, f"ptr {tile}", f"ptr {self._slots}"]
        fn.emit(f"call void @{self._bodies[width]}({', '.join(args)})")

    # -- what is the same everywhere ---------------------------------------------------------------------------------------
    def _uniform(self) -> list[int]:
        """Values without axes that the body needs; constants stay constants, bits are cheap to compute again."""
        instrs = self.local.instrs
        alone = [not i.axes and i.op not in ("const", "acc", "store", "index") for i in instrs]
        passed = [a and i.dtype.kind != "b" for a, i in zip(alone, instrs)]
        wanted = {d for i, ins in enumerate(instrs) if not passed[i] for d in dependencies(ins)}
        return [i for i in range(len(instrs)) if passed[i] and i in wanted]

    def _emit_uniform(self) -> None:
        local = self.local
        fn = Fn(self.module, f"{self.name}_u", ", ".join([*self._buffers(), "ptr %slots"]))
        em = Emitter(fn, local, [f"%arg{i}" for i in range(len(local.buffers))], 1, self.n)
        em.copies = [{}]
        for i, ins in enumerate(local.instrs):
            if not ins.axes and ins.op not in ("acc", "store"):
                em.emit(i, 0)
        for slot, i in enumerate(self._hoisted):
            ty = value_type(local.instrs[i].dtype)
            fn.store(ty, em.raw(i, 0), fn.gep("%slots", slot, "i64"))
        fn.finish()

    # -- prefetch ----------------------------------------------------------------------------------------------------------
    def _places(self) -> str:
        return ", ".join(f"i64 %o{i}" for i in range(len(self.outer))) + (", " if self.outer else "")

    def _emit_prefetch(self) -> str:
        """A function that touches each cache line of a tile; empty where rows are not contiguous."""
        local = self.local
        streams: dict[tuple[int, tuple[int, ...], int], bool] = {}
        for ins in local.instrs:
            plain = ins.op in ("load", "store") and not ins.gather and ins.predicate < 0
            if plain and ins.strides[self.m] and ins.strides[self.n] == 1:
                key = (ins.buffer, ins.strides, ins.offset)
                streams[key] = streams.get(key, False) or ins.op == "store"
        if not streams:
            return ""
        name = f"{self.name}_p"
        args = f"{self._places()}i64 %m0, i64 %rows, i64 %n0"
        fn = Fn(self.module, name, ", ".join([*self._buffers(), args]))
        em = Emitter(fn, local, [], 1, -1)
        em.index = {axis: f"%o{i}" for i, axis in enumerate(self.outer)}
        em.index[self.n] = "%n0"
        fn.module.declare("declare void @llvm.prefetch.p0(ptr, i32, i32, i32)")
        with fn.loop(0, "%rows") as r:
            em.index[self.m] = fn.iadd("%m0", r)
            for (buffer, strides, offset), written in streams.items():
                ty = memory_type(local.dtypes[buffer])
                at = fn.gep(f"%arg{buffer}", em.linear(strides, offset, 0), ty)
                last = self.tile.nr * type_bytes(ty) - 1
                for byte in sorted({0, *range(CACHE_LINE, last, CACHE_LINE), last}):
                    line = fn.gep(at, byte, "i8")
                    fn.emit(f"call void @llvm.prefetch.p0(ptr {line}, i32 {int(written)}, i32 3, i32 1)")
        fn.finish()
        return name

    # -- the body ----------------------------------------------------------------------------------------------------------
    def _emit_body(self, width: int) -> str:
        """Accumulator rows lie ``tile.nr`` elements apart; what does not vary with the row is emitted once."""
        local, tile, m, n = self.local, self.tile, self.m, self.n
        name = f"{self.name}_e{width}"
        args = f"{self._places()}i64 %m0, i64 %rows, i64 %n0, ptr %tile, ptr %slots"
        fn = Fn(self.module, name, ", ".join([*self._buffers(), args]))
        em = Emitter(fn, local, [f"%arg{i}" for i in range(len(local.buffers))], tile.lanes, n)
        for i, axis in enumerate(self.outer):
            em.index[axis] = f"%o{i}"
        lanes = tile.lanes
        vectors = -(-width // lanes)
        tail = width % lanes

        def each(i: int) -> None:
            if n not in local.instrs[i].axes:
                em.emit(i, 0)
                return
            for u in range(vectors):
                em.mask = mask_first(tail, lanes) if tail and u == vectors - 1 and lanes > 1 else None
                em.emit(i, u)

        em.lane_index = [fn.iadd("%n0", u * lanes) for u in range(vectors)]
        em.copies = [{} for _ in range(vectors)]
        for slot, i in enumerate(self._hoisted):
            em.put(i, 0, fn.load(value_type(local.instrs[i].dtype), fn.gep("%slots", slot, "i64")))
        needed = self._needed()
        for i, ins in enumerate(local.instrs):
            if i in needed and m not in ins.axes and ins.op != "acc":
                each(i)
        with fn.loop(0, "%rows") as r:
            em.index[m] = fn.iadd("%m0", r)
            base = fn.gep("%tile", fn.imul(r, tile.nr), tile.ty)
            for i, ins in enumerate(local.instrs):
                if ins.op == "acc":
                    for u in range(vectors):
                        value = fn.load(tile.ty, fn.gep(base, u * lanes, tile.ty), lanes)
                        if ins.dtype.name == "float32" and tile.ty == "double":
                            value = fn.op(f"fptrunc {vec('double', lanes)} {value} to {vec('float', lanes)}")
                        em.put(i, u, value)
                elif m in ins.axes:
                    each(i)
        fn.finish()
        return name

    def _needed(self) -> set[int]:
        """Instructions that the body must emit: all that stores depend on, short of what is hoisted."""
        instrs = self.local.instrs
        hoisted = set(self._hoisted)
        needed: set[int] = set()
        for i in reversed(range(len(instrs))):
            if instrs[i].op == "store" or i in needed:
                needed.add(i)
                if i not in hoisted:
                    needed.update(dependencies(instrs[i]))
        return needed - hoisted
