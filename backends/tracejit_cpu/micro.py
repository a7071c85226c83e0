"""Building blocks of matrix products as shared functions: register-tile micro-kernels and panel packing.

Used by ``gemm.py``, ``conv.py`` and ``attention.py``. All take strides at run time, so each is compiled once per machine:
a program only declares what it calls (``Module.support``), and ``support`` here loads it from the cache or makes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tracejit_cpu import codecache
from tracejit_cpu.host import Host, host
from tracejit_cpu.irbuilder import Fn, Module, const, type_bytes, vec


@dataclass(frozen=True)
class Tile:
    """The register tile for an element type: ``mr`` rows by ``nv`` vectors of ``lanes``."""

    ty: str
    lanes: int
    mr: int
    nv: int

    @property
    def nr(self) -> int:
        """Columns of the tile."""
        return self.lanes * self.nv

    @property
    def bytes(self) -> int:
        """Bytes per element."""
        return type_bytes(self.ty)


def tile_for(host: Host, ty: str) -> Tile:
    """12x2 vectors with 32 wide registers (AVX-512), 6x4 on NEON, 6x2 with 16 registers."""
    lanes = host.vector_bytes // type_bytes(ty)
    if host.registers == 32:
        return Tile(ty, lanes, 12, 2) if host.vector_bytes >= 32 else Tile(ty, lanes, 6, 4)
    return Tile(ty, lanes, 6, 2)


def micro_kernel(module: Module, tile: Tile, mr: int, nv: int) -> str:
    """``void mk(ptr a, i64 rs, i64 ks, ptr b, i64 bs, i64 kc, ptr out, i64 add)``; returns its name.

    out[i, j] (row stride ``tile.nr``) = (out[i, j] if add else 0) + sum_k a[i*rs + k*ks] * b[k*bs + j] for ``mr`` rows
    and ``nv`` vectors. Strides in elements.
    """
    name = f"tj_mk_{tile.ty}_{mr}_{nv}_{tile.nr}"
    module.need(name, ("micro", tile.ty, mr, nv), "ptr, i64, i64, ptr, i64, i64, ptr, i64")
    return name


def _emit_micro(module: Module, name: str, tile: Tile, mr: int, nv: int) -> None:
    args = "ptr %a, i64 %rs, i64 %ks, ptr %b, i64 %bs, i64 %kc, ptr %out, i64 %add"
    fn = Fn(module, name, args, linkage="")
    ty, lanes = tile.ty, tile.lanes
    full = vec(ty, lanes)
    acc = [[fn.var(full, const(0.0, ty, lanes)) for _ in range(nv)] for _ in range(mr)]
    with fn.when(fn.op("icmp ne i64 %add, 0")):
        for i in range(mr):
            for j in range(nv):
                fn.set(full, fn.load(ty, fn.gep("%out", i * tile.nr + j * lanes, ty), lanes), acc[i][j])
    rows = [fn.imul("%rs", i) for i in range(mr)]

    def step(pa: str, pb: str) -> None:
        b = [fn.load(ty, fn.gep(pb, j * lanes, ty), lanes) for j in range(nv)]
        for i in range(mr):
            a = fn.splat(fn.load(ty, fn.gep(pa, rows[i], ty)), ty, lanes)
            for j in range(nv):
                old = fn.get(full, acc[i][j])
                if module.host.fma:
                    fn.set(full, fn.intrinsic("fma", ty, lanes, a, b[j], old), acc[i][j])
                else:
                    fn.set(full, fn.op(f"fadd {full} {fn.op(f'fmul {full} {a}, {b[j]}')}, {old}"), acc[i][j])

    pa, pb = fn.var("ptr", "%a"), fn.var("ptr", "%b")

    def advance(unroll: int) -> None:
        p, q = fn.get("ptr", pa), fn.get("ptr", pb)
        for _ in range(unroll):
            step(p, q)
            p, q = fn.gep(p, "%ks", ty), fn.gep(q, "%bs", ty)
        fn.set("ptr", p, pa)
        fn.set("ptr", q, pb)

    whole = fn.op("and i64 %kc, -2")
    with fn.loop(0, whole, 2):
        advance(2)
    with fn.loop(whole, "%kc"):
        advance(1)
    for i in range(mr):
        for j in range(nv):
            fn.store(ty, fn.get(full, acc[i][j]), fn.gep("%out", i * tile.nr + j * lanes, ty), lanes)
    fn.finish()


def transpose(fn: Fn, rows: list[str], ty: str, lanes: int) -> list[str]:
    """Transpose a square of ``lanes`` vectors in log2(lanes) rounds of shuffles."""
    full = vec(ty, lanes)
    rows = list(rows)
    step = 1
    while step < lanes:
        after = list(rows)
        for i in range(lanes):
            if i & step:
                continue
            a, b = rows[i], rows[i + step]
            low = ", ".join(f"i32 {j if not j & step else lanes + j - step}" for j in range(lanes))
            high = ", ".join(f"i32 {j + step if not j & step else lanes + j}" for j in range(lanes))
            after[i] = fn.op(f"shufflevector {full} {a}, {full} {b}, <{lanes} x i32> <{low}>")
            after[i + step] = fn.op(f"shufflevector {full} {a}, {full} {b}, <{lanes} x i32> <{high}>")
        rows = after
        step *= 2
    return rows


def pack(module: Module, ty: str, memory: str, lanes: int, width: int) -> str:
    """``void pack(ptr src, i64 ks, i64 ns, i64 kc, i64 n, ptr dst)``: a panel dst[k][width] from src[k*ks + j*ns].

    Columns ``n <= j < width`` become zero. ``memory`` is the source's element type (half is widened). Returns the name.
    """
    name = f"tj_pack_{memory}_{ty}_{width}_{lanes}"
    module.need(name, ("pack", ty, memory, lanes, width), "ptr, i64, i64, i64, i64, ptr")
    return name


def _emit_pack(module: Module, name: str, ty: str, memory: str, lanes: int, width: int) -> None:
    fn = Fn(module, name, "ptr %src, i64 %ks, i64 %ns, i64 %kc, i64 %n, ptr %dst", linkage="")
    vectors = -(-width // lanes)

    def widen(x: str, n: int) -> str:
        return x if memory == ty else fn.op(f"fpext {vec(memory, n)} {x} to {vec(ty, n)}")

    scalar, contiguous, transposed, done = (fn.new_label(p) for p in ("scalar", "flat", "turn", "done"))
    check, check2 = fn.new_label("check"), fn.new_label("check")
    whole = fn.op(f"icmp eq i64 %n, {width}")
    fn.emit(f"br i1 {whole}, label %{check}, label %{scalar}")
    fn.label(check)
    fn.emit(f"br i1 {fn.op('icmp eq i64 %ns, 1')}, label %{contiguous}, label %{check2}")
    fn.label(check2)
    turn = fn.op("icmp eq i64 %ks, 1") if memory == ty else "false"
    fn.emit(f"br i1 {turn}, label %{transposed}, label %{scalar}")

    fn.label(contiguous)
    with fn.loop(0, "%kc") as k:
        src = fn.gep("%src", fn.imul(k, "%ks"), memory)
        dst = fn.gep("%dst", fn.imul(k, width), ty)
        at = 0
        while at < width:
            part = lanes
            while part > width - at:
                part //= 2
            x = widen(fn.load(memory, fn.gep(src, at, memory), part), part)
            fn.store(ty, x, fn.gep(dst, at, ty), part)
            at += part
    fn.emit(f"br label %{done}")

    fn.label(transposed)
    blocks = fn.op(f"and i64 %kc, {-lanes}")
    with fn.loop(0, blocks, lanes) as k:
        columns: list[list[str]] = []
        for v in range(vectors):
            rows = []
            for r in range(lanes):
                j = v * lanes + r
                if j < width:
                    p = fn.gep("%src", fn.iadd(fn.imul("%ns", j), k), ty)
                    rows.append(fn.load(ty, p, lanes))
                else:
                    rows.append(const(0.0, ty, lanes))
            columns.append(transpose(fn, rows, ty, lanes))
        for q in range(lanes):
            dst = fn.gep("%dst", fn.imul(fn.iadd(k, q), width), ty)
            for v in range(vectors):
                count = min(lanes, width - v * lanes)  # a neighbouring panel may belong to another thread
                fn.store_first(ty, columns[v][q], fn.gep(dst, v * lanes, ty), lanes, count)
    with fn.loop(blocks, "%kc") as k:
        dst = fn.gep("%dst", fn.imul(k, width), ty)
        for j in range(width):
            x = fn.load(ty, fn.gep("%src", fn.iadd(fn.imul("%ns", j), k), ty))
            fn.store(ty, x, fn.gep(dst, j, ty))
    fn.emit(f"br label %{done}")

    fn.label(scalar)
    with fn.loop(0, "%kc") as k:
        src = fn.gep("%src", fn.imul(k, "%ks"), memory)
        dst = fn.gep("%dst", fn.imul(k, width), ty)
        with fn.loop(0, "%n") as column:
            x = widen(fn.load(memory, fn.gep(src, fn.imul(column, "%ns"), memory)), 1)
            fn.store(ty, x, fn.gep(dst, column, ty))
        with fn.loop("%n", width) as column:
            fn.store(ty, const(0.0, ty), fn.gep(dst, column, ty))
    fn.emit(f"br label %{done}")
    fn.label(done)
    fn.finish()


def pack_table(module: Module, ty: str, memory: str, width: int) -> str:
    """Like :func:`pack` with ``src[ktab[k] + ntab[j]]``: ``void f(ptr src, ptr ktab, ptr ntab, i64 kc, i64 n, ptr dst)``."""
    name = f"tj_packt_{memory}_{ty}_{width}"
    module.need(name, ("table", ty, memory, width), "ptr, ptr, ptr, i64, i64, ptr")
    return name


def _emit_pack_table(module: Module, name: str, ty: str, memory: str, width: int) -> None:
    fn = Fn(module, name, "ptr %src, ptr %ktab, ptr %ntab, i64 %kc, i64 %n, ptr %dst", linkage="")
    with fn.loop(0, "%kc") as k:
        src = fn.gep("%src", fn.load("i64", fn.gep("%ktab", k, "i64")), memory)
        dst = fn.gep("%dst", fn.imul(k, width), ty)
        with fn.loop(0, "%n") as j:
            x = fn.load(memory, fn.gep(src, fn.load("i64", fn.gep("%ntab", j, "i64")), memory))
            if memory != ty:
                x = fn.op(f"fpext {memory} {x} to {ty}")
            fn.store(ty, x, fn.gep(dst, j, ty))
        with fn.loop("%n", width) as j:
            fn.store(ty, const(0.0, ty), fn.gep(dst, j, ty))
    fn.finish()


_loaded: dict[str, codecache.Loaded] = {}


def support(name: str, spec: Sequence[Any]) -> int:
    """Address of a support function: loaded before, from the disk cache, or compiled now."""
    if name not in _loaded:

        def make() -> str:
            module = Module(host())
            kind, ty, *rest = spec
            if kind == "micro":
                _emit_micro(module, name, tile_for(host(), ty), *rest)
            elif kind == "pack":
                _emit_pack(module, name, ty, *rest)
            else:
                _emit_pack_table(module, name, ty, *rest)
            return module.text()

        _loaded[name] = codecache.load_support(name, make)
    return _loaded[name].address(name)
