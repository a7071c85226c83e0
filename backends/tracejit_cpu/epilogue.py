"""Epilogues of products and convolutions: a LoopBody applied to a finished register tile. Used by ``gemm.py``, ``conv.py``."""

from __future__ import annotations

from collections.abc import Sequence

from tracejit_cpu.body import Emitter, Local
from tracejit_cpu.irbuilder import Fn, Module, mask_first, vec
from tracejit_cpu.micro import Tile


def emit_epilogue(
    module: Module, local: Local, name: str, tile: Tile, outer: Sequence[int], m: int, n: int, width: int
) -> str:
    """``void f(ptr buffers..., i64 outer..., i64 m0, i64 rows, i64 n0, ptr tile)`` for a tile of ``width`` columns.

    ``outer`` are the batch axes of ``local``; ``m`` and ``n`` its row and column axes. The accumulator's rows lie
    ``tile.nr`` elements apart. Instructions that do not vary with the row are emitted once per tile.
    """
    params = [f"ptr %arg{i}" for i in range(len(local.buffers))]
    params += [f"i64 %o{i}" for i in range(len(outer))] + ["i64 %m0", "i64 %rows", "i64 %n0", "ptr %tile"]
    fn = Fn(module, name, ", ".join(params))
    em = Emitter(fn, local, [f"%arg{i}" for i in range(len(local.buffers))], tile.lanes, n)
    for i, axis in enumerate(outer):
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
    for i, ins in enumerate(local.instrs):
        if m not in ins.axes and ins.op != "acc":
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
