"""Contract kernels: register-tiled matrix products with arbitrary strides, several problems, split-K, fused epilogues.

Products too thin for tiles go to the loop generator as multiply-and-reduce bodies; the others to ``tile_kernel.py``.
Called by ``compiler.py``, and by ``tuner.py`` for one group of products at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod

import numpy as np

from tracejit.program import Access, Contract, Instr, LoopBody
from tracejit_wgpu import body as bodies
from tracejit_wgpu import tuning
from tracejit_wgpu.build import row_major
from tracejit_wgpu.emit import Dispatch, Shader, Tables
from tracejit_wgpu.loops import grid_of, loop_dispatches
from tracejit_wgpu.operands import loader, vector_ok, walks
from tracejit_wgpu.problem import Problem, normalise
from tracejit_wgpu.tile_kernel import SUMMING, summing_tile, tile_kernel


def contract_dispatches(problems: Sequence[Contract], tables: Tables, label: str) -> list[Dispatch]:
    """Compile a ContractKernel."""
    if not problems or any(s == 0 for c in problems for s in (*c.batch, *c.m, *c.n)):
        return []
    ready = [normalise(c) for c in problems]
    apart: list[LoopBody] = []  # sums of operands that the product's kernel cannot add up on the way
    for i, p in enumerate(ready):
        if _thin(p) or not sums_inside(p, tables):
            apart.extend(_sum_loop(p, side) for side in "ab" if getattr(p, side + "_sum") is not None)
            ready[i] = replace(p, a_sum=None, b_sum=None)
    out = loop_dispatches(apart, tables, label + "_sums") if apart else []
    if _thin(ready[0]):
        return out + loop_dispatches([_as_loop(p, tables) for p in ready], tables, label)
    return out + [d for group in _groups(ready, tables) for d in tile_dispatches(group, tables, label)]


def sums_inside(p: Problem, tables: Tables) -> bool:
    """True if every operand whose sum over k is wanted comes in by rows of k, one vector address per thread."""
    tile = SUMMING
    for side, rows, size in (("a", "m", tile.bm), ("b", "n", tile.bn)):
        access: Access = getattr(p, side)
        if getattr(p, side + "_sum") is None:
            continue
        vector = vector_ok(p, access, rows) and tables.dtype(access.buffer) == np.float32
        x = loader(side, p, access, rows, size, vector, "f32")
        if (
            p.batch
            or p.acc != np.float32
            or x.along_k
            or prod(p.k) % tile.bk
            or not walks(x, tile, tile.threads)
        ):
            return False
    return True


def _sum_loop(p: Problem, side: str) -> LoopBody:
    """The sum of an operand over k as a loop of its own."""
    access: Access = getattr(p, side)
    target: Access = getattr(p, side + "_sum")
    sizes, rows = (p.m, "m") if side == "a" else (p.n, "n")
    outer, inner = p.part(access, rows), p.part(access, "k")
    load = Instr("load", (), p.acc, (), {"access": Access(access.buffer, (*outer, *inner), access.offset)})
    total = Instr("reduce", (0,), p.acc, (), {"kind": "sum"})
    where = Access(target.buffer, (*row_major(sizes), *(0,) * len(p.k)), target.offset)
    store = Instr("store", (1,), p.acc, (), {"access": where})
    axes = tuple(range(len(sizes), len(sizes) + len(p.k)))
    return LoopBody((*sizes, *p.k), (load, total, store), axes)


def _groups(ready: Sequence[Problem], tables: Tables) -> list[list[Problem]]:
    """Runs of equal problems that fit the bindings of one dispatch."""
    groups: list[list[Problem]] = []
    for p in ready:
        if (
            groups
            and _alike(groups[-1][0], p)
            and _bindings([*groups[-1], p], tables) <= tables.target.buffers
        ):
            groups[-1].append(p)
        else:
            groups.append([p])
    return groups


def tile_groups(problems: Sequence[Contract], tables: Tables) -> list[list[Problem]]:
    """The groups of problems that run on tiles, each in one dispatch; none for products that are loops."""
    if not problems or any(s == 0 for c in problems for s in (*c.batch, *c.m, *c.n)):
        return []
    ready = [normalise(c) for c in problems]
    return [] if _thin(ready[0]) else _groups(ready, tables)


def tile_key(group: Sequence[Problem]) -> tuple[int, int, int, int, str]:
    """What the choice of a tile depends on: m, n, k, number of products, layout as in BLAS."""
    p = group[0]
    layout = ("N" if p.part(p.a, "k")[-1:] == (1,) else "T") + ("T" if p.part(p.b, "k")[-1:] == (1,) else "N")
    return prod(p.m), prod(p.n), prod(p.k), prod(p.batch) * len(group), layout


def _thin(p: Problem) -> bool:
    m, n, k = (prod(x) for x in (p.m, p.n, p.k))
    return min(m, n) < 4 or k < 4 or m * n * k * prod(p.batch) < 4096


def _alike(p: Problem, q: Problem) -> bool:
    same = (p.batch, p.m, p.n, p.k, p.acc) == (q.batch, q.m, q.n, q.k, q.acc)
    same = same and (p.a_sum is None, p.b_sum is None) == (q.a_sum is None, q.b_sum is None)
    return same and p.a.strides == q.a.strides and p.b.strides == q.b.strides


def _bindings(problems: Sequence[Problem], tables: Tables) -> int:
    found: set[int] = set()
    for p in problems:
        reads, writes = bodies.buffers(p.epilogue)
        found |= {
            tables.alias.get(b, b)
            for b in (p.a.buffer, p.b.buffer, *reads, *writes, *(s.buffer for s in (p.a_sum, p.b_sum) if s))
            if b not in tables.scalars
        }
    return len(found)


def _as_loop(p: Problem, tables: Tables) -> LoopBody:
    """The contraction as a multiply-and-reduce body: for vectors, thin and tiny products."""
    outer = len(p.batch) + len(p.m) + len(p.n)
    pad = (0,) * len(p.k)
    instrs: list[Instr] = []
    where: dict[int, int] = {}
    epilogue = p.epilogue
    acc = next(i for i, x in enumerate(epilogue.instrs) if x.op == "acc")
    axes = tuple(range(outer, outer + len(p.k)))
    domain = (*p.batch, *p.m, *p.n, *p.k)
    if not axes:
        axes, pad, domain = (outer,), (0,), (*domain, 1)

    def access(a: Access) -> Access:
        return a if p.k else replace(a, strides=(*a.strides, 0))

    factors = []
    for side in (p.a, p.b):
        dtype = tables.dtype(side.buffer)
        instrs.append(Instr("load", (), dtype, (), {"access": access(side)}))
        if dtype != p.acc:
            instrs.append(Instr("convert", (len(instrs) - 1,), p.acc, (), {"dtype": p.acc}))
        factors.append(len(instrs) - 1)
    instrs.append(Instr("mul", (factors[0], factors[1]), p.acc, ()))
    instrs.append(Instr("reduce", (len(instrs) - 1,), p.acc, (), {"kind": "sum"}))
    result = len(instrs) - 1
    for position, instr in enumerate(epilogue.instrs):
        if position == acc:
            where[position] = result
            continue
        attrs = dict(instr.attrs)
        if "access" in attrs:
            attrs["access"] = replace(attrs["access"], strides=attrs["access"].strides + pad)
        if "gather" in attrs:
            attrs["gather"] = tuple((where[q], s, z) for q, s, z in attrs["gather"])
        if instr.op == "load" and attrs.get("predicate") is not None:
            attrs["predicate"] = where[attrs["predicate"]]
        if instr.op == "random_bits":
            attrs["strides"] = tuple(attrs["strides"]) + pad
        instrs.append(replace(instr, args=tuple(where[q] for q in instr.args), attrs=attrs))
        where[position] = len(instrs) - 1
    return LoopBody(domain, tuple(instrs), axes)


def tile_dispatches(problems: Sequence[Problem], tables: Tables, label: str) -> list[Dispatch]:
    """A group of equal problems as one dispatch, and the sum of its parts if k is cut."""
    p = problems[0]
    m, n, nb = prod(p.m), prod(p.n), prod(p.batch)
    kind = {"f": "f32", "i": "i32", "u": "u32", "b": "u32"}[p.acc.kind]
    tile = tuning.choose(*tile_key(problems), tables.target)
    if p.a_sum or p.b_sum:
        tile = summing_tile(p, tile)
    shader = Shader(tables)
    split = tile.split
    naxis = len(p.batch) + len(p.m) + len(p.n) - 1
    wide = bool(p.n) and p.n[-1] % 4 == 0
    partial = (
        tables.scratch(split * nb * len(problems) * m * n, p.acc if p.acc.kind != "b" else np.uint32)
        if split > 1
        else None
    )
    for q in problems:
        shader.bind(q.a.buffer, vector=vector_ok(q, q.a, "m"), write=False)
        shader.bind(q.b.buffer, vector=vector_ok(q, q.b, "n"), write=False)
        if partial is None:
            shader.bind_body(q.epilogue, naxis if wide else None)
        for total in (q.a_sum, q.b_sum):
            if total is not None:
                shader.bind(total.buffer, vector=total.offset % 4 == 0, write=True)
    if partial is not None:
        shader.bind(partial, vector=n % 4 == 0, write=True)
    la = loader("a", p, p.a, "m", tile.bm, all(_bound_vector(shader, q.a) for q in problems), kind)
    lb = loader("b", p, p.b, "n", tile.bn, all(_bound_vector(shader, q.b) for q in problems), kind)
    text, groups = tile_kernel(shader, problems, tile, la, lb, kind, partial, wide)
    grid, number = grid_of(groups, tables.target.workgroups)
    guard = f" if (wg >= {groups}u) {{ return; }}\n" if grid[0] * grid[1] != groups else ""
    main = (
        f"@compute @workgroup_size({tile.threads}) fn main(@builtin(workgroup_id) wid: vec3<u32>, "
        f"@builtin(local_invocation_index) li: u32) {{\n let wg = {number};\n{guard}{text}}}\n"
    )
    out = [shader.dispatch(main, grid, f"{label} {tile}")]
    if partial is not None:
        summed = [_summed(q, partial, i, len(problems), split, tables) for i, q in enumerate(problems)]
        out.extend(loop_dispatches(summed, tables, label + "_sum"))
    return out


def _bound_vector(shader: Shader, access: Access) -> bool:
    return access.buffer not in shader.tables.scalars and shader.binding(access.buffer).vector


def _summed(p: Problem, partial: int, number: int, count: int, split: int, tables: Tables) -> LoopBody:
    """The epilogue of a split product: acc is the sum of the partial results, in their order."""
    m, n, nb = prod(p.m), prod(p.n), prod(p.batch)
    domain = p.epilogue.domain
    strides = [0] * len(domain)
    step = 1
    for axis in reversed(range(len(domain))):
        strides[axis] = step
        step *= domain[axis]
    acc = next(i for i, x in enumerate(p.epilogue.instrs) if x.op == "acc")
    load = Access(partial, (*strides, nb * count * m * n), number * nb * m * n)
    first = [
        Instr("load", (), tables.dtype(partial), (), {"access": load}),
        Instr("reduce", (0,), tables.dtype(partial), (), {"kind": "sum"}),
    ]
    if p.acc.kind == "b":
        first.append(Instr("convert", (1,), p.acc, (), {"dtype": p.acc}))
    where: dict[int, int] = {acc: len(first) - 1}
    out = list(first)
    for position, instr in enumerate(p.epilogue.instrs):
        if position == acc:
            continue
        attrs = dict(instr.attrs)
        if "access" in attrs:
            attrs["access"] = replace(attrs["access"], strides=(*attrs["access"].strides, 0))
        if "gather" in attrs:
            attrs["gather"] = tuple((where[q], s, z) for q, s, z in attrs["gather"])
        if instr.op == "load" and attrs.get("predicate") is not None:
            attrs["predicate"] = where[attrs["predicate"]]
        if instr.op == "random_bits":
            attrs["strides"] = (*attrs["strides"], 0)
        out.append(replace(instr, args=tuple(where[q] for q in instr.args), attrs=attrs))
        where[position] = len(out) - 1
    return LoopBody((*domain, split), tuple(out), (len(domain),))
