"""Contract kernels: register-tiled matrix products with arbitrary strides, several problems, split-K, fused epilogues.

Both operands lie k-outer in workgroup memory as vec4 whatever their layout (stored transposed with an XOR swizzle when k
is contiguous), the next tile is prefetched into registers, each thread owns TM x TN results. Products too thin for
tiles go to the loop generator as multiply-and-reduce bodies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod

import numpy as np

from tracejit.program import Access, Contract, Instr, LoopBody
from tracejit_wgpu import body as bodies
from tracejit_wgpu import tuning, wgsl
from tracejit_wgpu.build import row_major
from tracejit_wgpu.emit import XYZW, Dispatch, Emitter, Shader, Tables, decompose
from tracejit_wgpu.loops import grid_of, loop_dispatches
from tracejit_wgpu.tuning import Tile


@dataclass(frozen=True)
class Problem:
    """A normalised contraction: axes merged, the result's contiguous axis in n. Strides are per axis of each group."""

    batch: tuple[int, ...]
    m: tuple[int, ...]
    n: tuple[int, ...]
    k: tuple[int, ...]
    a: Access
    b: Access
    epilogue: LoopBody
    acc: np.dtype
    #: Where the sums of the operands over k go, as flat (buffer, offset): their elements are contiguous.
    a_sum: Access | None = None
    b_sum: Access | None = None

    def part(self, access: Access, group: str) -> tuple[int, ...]:
        """The strides of an access along one group of axes."""
        sizes = {"batch": self.batch, "m": self.m, "n": self.n, "k": self.k}
        start = 0
        for name, axes in sizes.items():
            if name == group:
                return access.strides[start : start + len(axes)]
            start += len(axes)
        raise KeyError(group)


def normalise(c: Contract) -> Problem:
    """Merge axes inside each group where every access allows, and swap m and n if the result is contiguous along m."""
    sizes = (*c.batch, *c.m, *c.n, *c.k)
    outer = len(c.batch) + len(c.m) + len(c.n)
    bounds = [0, len(c.batch), len(c.batch) + len(c.m), outer, len(sizes)]
    epilogue = bodies.with_axes(c.epilogue)
    indexed = {i.attrs["axis"] for i in epilogue.instrs if i.op == "index"}
    strides = [bodies._strides(i) for i in epilogue.instrs]
    rows = [s for s in strides if s is not None]
    merged: list[list[tuple[int, ...]]] = []
    for g in range(4):
        groups: list[tuple[int, ...]] = []
        for axis in range(bounds[g], bounds[g + 1]):
            size = sizes[axis]
            if size == 1 and axis not in indexed:
                continue
            if groups:
                last = groups[-1][-1]
                fits = (
                    c.a.strides[last] == c.a.strides[axis] * size
                    and c.b.strides[last] == c.b.strides[axis] * size
                )
                fits = fits and not {last, axis} & indexed
                if fits and (g == 3 or all(s[last] == s[axis] * size for s in rows)):
                    groups[-1] = (*groups[-1], axis)
                    continue
            groups.append((axis,))
        merged.append(groups)
    store = next(i for i in epilogue.instrs if i.op == "store").attrs["access"].strides
    if merged[1] and merged[2] and store[merged[1][-1][-1]] == 1 and store[merged[2][-1][-1]] != 1:
        merged[1], merged[2] = merged[2], merged[1]
        first, second, sums = c.b, c.a, (c.b_sum, c.a_sum)
    else:
        first, second, sums = c.a, c.b, (c.a_sum, c.b_sum)
    order = [g[-1] for groups in merged for g in groups]

    def fix(access: Access) -> Access:
        return replace(access, strides=tuple(access.strides[x] for x in order))

    def total(groups: list[tuple[int, ...]]) -> tuple[int, ...]:
        return tuple(prod(sizes[x] for x in g) for g in groups)

    batch, m, n, k = (total(g) for g in merged)
    body = bodies.remap(epilogue, [*merged[0], *merged[1], *merged[2]])
    return Problem(batch, m, n, k, fix(first), fix(second), body, c.acc_dtype, *sums)


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


#: A tile with which every product for which ``sums_inside`` holds can add up its operands.
_SUMMING = Tile(32, 32, 16, 4, 4)


def sums_inside(p: Problem, tables: Tables) -> bool:
    """True if every operand whose sum over k is wanted comes in by rows of k, one vector address per thread."""
    tile = _SUMMING
    for side, rows, size in (("a", "m", tile.bm), ("b", "n", tile.bn)):
        access: Access = getattr(p, side)
        if getattr(p, side + "_sum") is None:
            continue
        vector = _vector_ok(p, access, rows) and tables.dtype(access.buffer) == np.float32
        x = _loader(side, p, access, rows, size, vector, "f32")
        if (
            p.batch
            or p.acc != np.float32
            or x.along_k
            or prod(p.k) % tile.bk
            or not _walks(x, tile, tile.threads)
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


# ---------------------------------------------------------------------------------------------------- tiled
@dataclass(frozen=True)
class _Loader:
    """How a tile of one operand comes in: along which direction four neighbours are taken, and whether as one vector."""

    name: str
    extent: int  # rows of the operand: prod(m) or prod(n)
    rows: tuple[int, ...]
    row_strides: tuple[int, ...]
    k_strides: tuple[int, ...]
    along_k: bool
    vector: bool
    tile: int  # BM or BN
    kind: str  # element type of the accumulator

    @property
    def zero(self) -> str:
        """The vector type."""
        return f"vec4<{self.kind}>"


def _loader(name: str, p: Problem, access: Access, rows: str, tile: int, vector: bool, kind: str) -> _Loader:
    sizes = p.m if rows == "m" else p.n
    row_strides, k_strides = p.part(access, rows), p.part(access, "k")
    along_k = not (row_strides and row_strides[-1] == 1) and bool(k_strides) and k_strides[-1] == 1
    return _Loader(name, prod(sizes), sizes, row_strides, k_strides, along_k, vector, tile, kind)


def _vector_ok(p: Problem, access: Access, rows: str) -> bool:
    """Can four neighbours be read as one vec4?"""
    sizes = p.m if rows == "m" else p.n
    row_strides, k_strides = p.part(access, rows), p.part(access, "k")
    others = list(p.part(access, "batch"))
    if row_strides and row_strides[-1] == 1 and sizes[-1] % 4 == 0:
        others += [*row_strides[:-1], *k_strides]
    elif k_strides and k_strides[-1] == 1 and p.k[-1] % 4 == 0:
        others += [*row_strides, *k_strides[:-1]]
    else:
        return False
    return access.offset % 4 == 0 and all(s % 4 == 0 for s in others)


def tile_dispatches(problems: Sequence[Problem], tables: Tables, label: str) -> list[Dispatch]:
    """A group of equal problems as one dispatch, and the sum of its parts if k is cut."""
    p = problems[0]
    m, n, nb = prod(p.m), prod(p.n), prod(p.batch)
    kind = {"f": "f32", "i": "i32", "u": "u32", "b": "u32"}[p.acc.kind]
    tile = tuning.choose(*tile_key(problems), tables.target)
    if p.a_sum or p.b_sum:
        tile = _summing(p, tile)
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
        shader.bind(q.a.buffer, vector=_vector_ok(q, q.a, "m"), write=False)
        shader.bind(q.b.buffer, vector=_vector_ok(q, q.b, "n"), write=False)
        if partial is None:
            shader.bind_body(q.epilogue, naxis if wide else None)
        for total in (q.a_sum, q.b_sum):
            if total is not None:
                shader.bind(total.buffer, vector=total.offset % 4 == 0, write=True)
    if partial is not None:
        shader.bind(partial, vector=n % 4 == 0, write=True)
    la = _loader("a", p, p.a, "m", tile.bm, all(_bound_vector(shader, q.a) for q in problems), kind)
    lb = _loader("b", p, p.b, "n", tile.bn, all(_bound_vector(shader, q.b) for q in problems), kind)
    text, groups = _kernel(shader, problems, tile, la, lb, kind, partial, wide)
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


def _kernel(
    shader: Shader,
    problems: Sequence[Problem],
    tile: Tile,
    la: _Loader,
    lb: _Loader,
    kind: str,
    partial: int | None,
    wide: bool,
) -> tuple[str, int]:
    p = problems[0]
    m, n, k, nb = prod(p.m), prod(p.n), prod(p.k), prod(p.batch)
    bk, tx_count, ty_count, threads = tile.bk, tile.bn // tile.tn, tile.bm // tile.tm, tile.threads
    mt, nt = -(-m // tile.bm), -(-n // tile.bn)
    span = -(-(-(-k // tile.split)) // bk) * bk  # k range of one part, whole tiles
    wx = min(8, tx_count)
    wy = min(max(1, 32 // wx), ty_count)
    warp = wx * wy
    vec = f"vec4<{kind}>"
    zero = f"{vec}()"
    memory = {x.name: shader.memory(vec, 0) for x in (la, lb)}
    sizes = {"a": tile.bm * bk // 4, "b": tile.bn * bk // 4}
    base = {"a": 0, "b": sizes["a"]}
    memory["a"] = memory["b"] = shader.memory(vec, sizes["a"] + sizes["b"])
    out = [
        f" let w = li / {warp}u; let l = li % {warp}u;\n"
        f" let tx = (w % {tx_count // wx}u) * {wx}u + l % {wx}u; let ty = (w / {tx_count // wx}u) * {wy}u + l / {wx}u;\n"
        f" let tile = wg % {mt * nt}u; let rest = wg / {mt * nt}u;\n"
        f" let m0 = (tile / {nt}u) * {tile.bm}u; let n0 = (tile % {nt}u) * {tile.bn}u;\n"
    ]
    if tile.split > 1:
        out.append(
            f" let part = rest % {tile.split}u; let bz = rest / {tile.split}u;\n let k0 = part * {span}u;\n"
        )
        out.append(f" let kend = min(k0 + {span}u, {k}u);\n")
    else:
        out.append(f" let bz = rest;\n let k0 = 0u; let kend = {k}u;\n")
    if len(problems) > 1:
        out.append(f" let problem = bz / {nb}u; let bi = bz % {nb}u;\n")
    else:
        out.append(" let bi = bz;\n")
    batch_index = decompose(shader, "bi", p.batch, out)
    tail = k % bk != 0 or (tile.split > 1 and k % span != 0)
    loads, stores, steps, sums = [], [], "", ""
    for x, access in ((la, p.a), (lb, p.b)):
        if not tail and bk <= 8 and _walks(x, tile, threads):
            step, code, load, store = _walk(
                shader, x, p.part(access, "batch"), batch_index, tile, base[x.name], memory[x.name], threads
            )
            steps += step
        else:
            batch = wgsl.u32_offset(zip(p.part(access, "batch"), batch_index), 0)
            out.append(f" let batch_{x.name} = {batch};\n")
            code, load, store = _stage(shader, x, p, tile, zero, tail, base[x.name], memory[x.name], threads)
        if (p.a_sum if x.name == "a" else p.b_sum) is not None:
            count = x.tile * bk // 4 // threads
            out.append(f" var t_{x.name} = {zero};\n")
            added = "".join(f" t_{x.name} += v_{x.name}{r};" for r in range(count))
            sums += f"  if ({_first(x)}) {{{added} }}\n"
        out.append(code)
        loads.append(load)
        stores.append(store)
    out.extend(f" var c{i}_{g} = {zero};\n" for i in range(tile.tm) for g in range(tile.tn // 4))

    def load_all(indent: str) -> str:
        if len(problems) == 1:
            return "".join(f(shader, (p.a, p.b)[s]) for s, f in enumerate(loads))
        cases = []
        for number, q in enumerate(problems):
            inner = "".join(f(shader, (q.a, q.b)[s]) for s, f in enumerate(loads))
            cases.append(
                f"{indent}{'default' if number == len(problems) - 1 else f'case {number}u'}: {{ {inner} }}\n"
            )
        return f"{indent}switch (problem) {{\n{''.join(cases)}{indent}}}\n"

    put = "".join(stores) + sums
    compute = _compute(tile, la, lb, base, memory, tx_count, ty_count, kind)
    out.append(" var kp = k0;\n" + load_all(" "))
    body = f"{put}  workgroupBarrier();\n{steps}{load_all('  ')}{compute}  workgroupBarrier();\n"
    out.append(f" for (kp = k0 + {bk}u; kp < kend; kp += {bk}u) {{\n{body} }}\n")
    out.append(f" {{\n{put}  workgroupBarrier();\n{compute} }}\n")
    if p.a_sum or p.b_sum:
        out.append(_store_sums(shader, problems, la, lb, memory["a"], threads))
    if partial is not None:
        out.append(_store_partial(shader, p, tile, partial, len(problems), tx_count, ty_count, m, n, nb))
    elif len(problems) == 1:
        out.append(_epilogue(shader, p, tile, batch_index, tx_count, ty_count, m, n, wide))
    else:
        out.append(" switch (problem) {\n")
        for number, q in enumerate(problems):
            head = "default" if number == len(problems) - 1 else f"case {number}u"
            out.append(
                f" {head}: {{\n{_epilogue(shader, q, tile, batch_index, tx_count, ty_count, m, n, wide)} }}\n"
            )
        out.append(" }\n")
    return "".join(out), mt * nt * tile.split * nb * len(problems)


def _summing(p: Problem, tile: Tile) -> Tile:
    """The tile, if a product with it can add up operands on the way, else the nearest that can; k is not cut."""
    whole = replace(tile, split=1)
    sides = [(n, b) for n, b, s in ((p.m, whole.bm, p.a_sum), (p.n, whole.bn, p.b_sum)) if s is not None]
    walks = all(prod(n) % b == 0 and whole.threads % (b // 4) == 0 for n, b in sides)
    if walks and all(b * whole.bk // 4 % whole.threads == 0 for _, b in sides) and prod(p.k) % whole.bk == 0:
        return whole
    return _SUMMING


def _first(x: _Loader) -> str:
    """True in the workgroups that add up operand ``x``: one per column of tiles."""
    return "n0 == 0u" if x.name == "a" else "m0 == 0u"


def _store_sums(
    shader: Shader, problems: Sequence[Problem], la: _Loader, lb: _Loader, memory: str, threads: int
) -> str:
    """Add up the threads that loaded the same columns, in their order, and store the sums of operands over k."""
    out = []
    for x, origin in ((la, "m0"), (lb, "n0")):
        if getattr(problems[0], x.name + "_sum") is None:
            continue
        across = x.tile // 4
        out.append(
            f" workgroupBarrier();\n if ({_first(x)}) {{ {memory}[li] = t_{x.name}; }}\n workgroupBarrier();\n"
        )
        lines = f"  var t = {memory}[li]; for (var i = 1u; i < {threads // across}u; i++) {{ t += {memory}[li + i * {across}u]; }}\n"
        for number, q in enumerate(problems):
            target: Access = getattr(q, x.name + "_sum")
            bound = shader.binding(target.buffer)
            if bound.vector:
                line = f"{bound.name}[{target.offset // 4}u + {origin} / 4u + li] = t;"
            else:
                line = " ".join(
                    f"{bound.name}[{target.offset}u + {origin} + li * 4u + {j}u] = t.{XYZW[j]};"
                    for j in range(4)
                )
            lines += f"  if (problem == {number}u) {{ {line} }}\n" if len(problems) > 1 else f"  {line}\n"
        out.append(f" if ({_first(x)} && li < {across}u) {{\n{lines} }}\n")
    return "".join(out)


def _walks(x: _Loader, tile: Tile, threads: int) -> bool:
    """True if a thread's pieces of a tile lie at constant distances, so that one address per operand walks along k."""
    across = tile.bk // 4 if x.along_k else x.tile // 4
    return (
        x.vector and len(x.k_strides) == 1 and len(x.rows) == 1 and x.extent % x.tile == 0
        and threads % across == 0 and (x.tile * tile.bk // 4) % threads == 0
    )  # fmt: skip


def _walk(
    shader: Shader, x: _Loader, batch_strides: Sequence[int], batch: Sequence[str], tile: Tile, base: int, memory: str, threads: int
) -> tuple[str, str, Callable[[Shader, Access], str], str]:  # fmt: skip
    """Step, set-up, loads and stores of an operand that ``_walks``: one vec4 address plus constants.

    The driver cannot find this by itself behind unsigned arithmetic; with shallow tiles the registers saved decide how
    many workgroups share a multiprocessor (39 -> 42 TFLOP/s on an H100); deep ones are 1-2% faster without.
    """
    bk4, bd4, name = tile.bk // 4, x.tile // 4, x.name
    count = x.tile * bk4 // threads
    row, along = x.row_strides[0], x.k_strides[0]
    origin = "m0" if name == "a" else "n0"
    start = wgsl.u32_offset([(s // 4, i) for s, i in zip(batch_strides, batch)], 0)
    if x.along_k:
        rows = threads // bk4
        place = f"({origin} + li / {bk4}u) * {row // 4}u + k0 / 4u + li % {bk4}u"
        distance, step = rows * row // 4, bk4
    else:
        place = f"(k0 + li / {bd4}u) * {along // 4}u + {origin} / 4u + li % {bd4}u"
        distance, step = threads // bd4 * along // 4, tile.bk * along // 4
    setup = f" var g_{name} = {place} + {start};\n"
    setup += "".join(f" var v_{name}{r}: {x.zero} = {x.zero}();\n" for r in range(count))
    stores = ""
    if x.along_k:
        swizzle = f"((li % {bk4}u * {32 // tile.bk}u) & {bd4 - 1}u)"
        setup += f" let q_{name} = (li / {bk4}u) & 3u;\n"
        straight = rows % 32 == 0  # the swizzle then leaves the distance between pieces alone
        for r in range(count):
            if r == 0 or not straight:
                where = f"((li / {bk4}u + {r * rows}u) >> 2u)" if r else f"(li / {4 * bk4}u)"
                setup += f" let s_{name}{r} = li % {bk4}u * {4 * bd4}u + ({where} ^ {swizzle});\n"
            lane = f"q_{name}" if rows % 4 == 0 else f"((li / {bk4}u + {r * rows}u) & 3u)"
            slot, shift = (f"s_{name}0", r * rows // 4) if straight else (f"s_{name}{r}", 0)
            for q in range(4):
                stores += f"  {memory}[{slot} + {base + q * bd4 + shift}u][{lane}] = v_{name}{r}.{XYZW[q]};\n"
    else:
        stores = "".join(f"  {memory}[li + {base + r * threads}u] = v_{name}{r};\n" for r in range(count))

    def load(sh: Shader, access: Access) -> str:
        dtype, array = sh.tables.dtype(access.buffer), sh.binding(access.buffer).name
        lines = ""
        for r in range(count):
            offset = access.offset // 4 + r * distance
            raw = f"{array}[g_{name} + {offset}u]" if offset else f"{array}[g_{name}]"
            lines += f"  v_{name}{r} = {vec_convert(sh, raw, dtype, x.kind)};\n"
        return lines

    return f"  g_{name} += {step}u;\n", setup, load, stores


def _stage(
    shader: Shader,
    x: _Loader,
    p: Problem,
    tile: Tile,
    zero: str,
    tail: bool,
    base: int,
    memory: str,
    threads: int,
):  # type: ignore[no-untyped-def]
    """Set-up code, a function that emits the global loads of a tile, and the stores into workgroup memory."""
    bk, bd, name = tile.bk, x.tile, x.name
    pieces = bd * bk // 4
    count = -(-pieces // threads)
    out: list[str] = []
    slots = []
    exact = x.extent % bd == 0
    origin = "m0" if name == "a" else "n0"
    single = len(x.k_strides) <= 1
    kstride = x.k_strides[0] if x.k_strides else 0
    for r in range(count):
        e = f"(li + {r * threads}u)" if r else "li"
        s = f"{name}{r}"
        if x.along_k:
            out.append(f" let d_{s} = {e} / {bk // 4}u; let k_{s} = ({e} % {bk // 4}u) * 4u;\n")
            rows = [f"{origin} + d_{s}"]
        else:
            out.append(f" let k_{s} = {e} / {bd // 4}u; let d_{s} = ({e} % {bd // 4}u) * 4u;\n")
            rows = (
                [f"{origin} + d_{s}"]
                if x.vector or (exact and x.rows and x.rows[-1] % 4 == 0 and len(x.rows) == 1)
                else [f"{origin} + d_{s} + {j}u" for j in range(4)]
            )
        limit = x.extent - (4 if not x.along_k and len(rows) == 1 else 1)
        for j, row in enumerate(rows):
            text = row if exact else f"min({row}, {limit}u)"
            out.append(f" let r_{s}_{j} = {text};\n")
            names = decompose(shader, f"r_{s}_{j}", x.rows, out)
            address = wgsl.u32_offset(zip(x.row_strides, names), 0)
            if single:
                address += f" + k_{s} * {kstride}u" if kstride != 1 else f" + k_{s}"
            out.append(f" let p_{s}_{j} = {address} + batch_{name};\n")
        out.append(f" var v_{s} = {zero};\n")
        slots.append((r, s, len(rows)))
    # addresses: p + offset + kp * stride, or with k decomposed each time when it has several axes

    def load(sh: Shader, access: Access) -> str:
        lines: list[str] = []
        dtype = sh.tables.dtype(access.buffer)
        kind = zero[5:-3]
        for r, s, rows in slots:
            guard = [f"li + {r * threads}u < {pieces}u"] if (r + 1) * threads > pieces else []
            body: list[str] = []
            if x.vector:
                guard_k = [f"kp + k_{s} < kend"] if tail else []
                where = _address(sh, x, p, access, f"p_{s}_0", f"kp + k_{s}", single, kstride, body)
                body.append(
                    f"v_{s} = {vec_convert(sh, f'{sh.binding(access.buffer).name}[({where}) >> 2u]', dtype, kind)};"
                )
                text = " ".join(body)
                if guard_k:
                    text = f"if ({guard_k[0]}) {{ {text} }} else {{ v_{s} = {zero}; }}"
            else:
                for j in range(4):
                    part: list[str] = []
                    row = f"p_{s}_{j if rows == 4 else 0}"
                    kk = f"kp + k_{s} + {j}u" if x.along_k else f"kp + k_{s}"
                    extra = 0 if rows == 4 or x.along_k else j * x.row_strides[-1]
                    where = _address(
                        sh, x, p, access, row, kk, single, kstride, part, j if x.along_k else 0, extra
                    )
                    value = sh.read(access.buffer, where)
                    value = f"select(0u, 1u, {value})" if dtype.kind == "b" else value
                    part.append(f"v_{s}.{XYZW[j]} = {value if dtype.kind == 'b' else f'{kind}({value})'};")
                    line = " ".join(part)
                    if tail:
                        line = f"if ({kk} < kend) {{ {line} }} else {{ v_{s}.{XYZW[j]} = {kind}(0); }}"
                    body.append(f"{{ {line} }}")
                text = " ".join(body)
            lines.append(f"  if ({guard[0]}) {{ {text} }}\n" if guard else f"  {{ {text} }}\n")
        return "".join(lines)

    stores = []
    step = 32 // bk
    for r, s, _ in slots:
        guard = f"if (li + {r * threads}u < {pieces}u) " if (r + 1) * threads > pieces else ""
        if x.along_k:
            swizzle = f"((d_{s} >> 2u) ^ (((k_{s} >> 2u) * {step}u) & {bd // 4 - 1}u))"
            lines = "".join(
                f" {memory}[{base}u + (k_{s} + {q}u) * {bd // 4}u + {swizzle}][d_{s} & 3u] = v_{s}.{XYZW[q]};"
                for q in range(4)
            )
            stores.append(f"  {guard}{{{lines} }}\n")
        else:
            stores.append(f"  {guard}{{ {memory}[{base}u + k_{s} * {bd // 4}u + (d_{s} >> 2u)] = v_{s}; }}\n")
    return "".join(out), load, "".join(stores)


def vec_convert(shader: Shader, raw: str, dtype: np.dtype, kind: str) -> str:
    """A loaded storage vector in the accumulator's type."""
    if dtype.kind == "b":
        return raw
    stored = wgsl.storage_type(dtype, shader.target.f16)
    return raw if stored == kind else f"vec4<{kind}>({raw})"


def _address(
    shader: Shader, x: _Loader, p: Problem, access: Access, row: str, kk: str, single: bool, kstride: int, out: list[str],
    lane: int = 0, extra: int = 0,
) -> str:  # fmt: skip
    """Element address of a piece; ``row`` already holds the row part (and, with one k axis, the thread's k)."""
    offset = access.offset + extra
    if single:
        along = f" + kp * {kstride}u" if kstride != 1 else " + kp"
        offset += lane * kstride
        return f"{row}{along if kstride else ''}" + (f" + {offset}u" if offset else "")
    name = shader.name("k")
    limit = prod(p.k) - 1
    out.append(f"let {name} = min({kk}, {limit}u);")
    names = decompose(shader, name, p.k, out)
    return f"{row} + " + wgsl.u32_offset(zip(x.k_strides, names), offset)


def _compute(
    tile: Tile,
    la: _Loader,
    lb: _Loader,
    base: dict[str, int],
    memory: dict[str, str],
    tx: int,
    ty: int,
    kind: str,
) -> str:
    """The inner product of one tile, fully unrolled over k."""
    out: list[str] = []
    step = 32 // tile.bk

    def read(x: _Loader, k: int, group: int, thread: str, count: int) -> str:
        start, place = base[x.name] + k * x.tile // 4, thread
        swizzle = ((k // 4) * step) & (x.tile // 4 - 1) if x.along_k else 0
        if group and swizzle >= count:
            place = f"(({thread} + {group * count}u) ^ {swizzle}u)"
        else:  # thread numbers below a power of two above the swizzle: the group's distance stays a constant
            start += group * count
            place = f"({thread} ^ {swizzle}u)" if swizzle else thread
        return f"{memory[x.name]}[{start}u + {place}]"

    for k in range(tile.bk):
        out.extend(f"  let a{k}_{g} = {read(la, k, g, 'ty', ty)};\n" for g in range(tile.tm // 4))
        out.extend(f"  let b{k}_{g} = {read(lb, k, g, 'tx', tx)};\n" for g in range(tile.tn // 4))
        for i in range(tile.tm):
            a = f"vec4<{kind}>(a{k}_{i // 4}.{XYZW[i % 4]})"
            for g in range(tile.tn // 4):
                c = f"c{i}_{g}"
                out.append(
                    f"  {c} = fma({a}, b{k}_{g}, {c});\n"
                    if kind == "f32"
                    else f"  {c} = {a} * b{k}_{g} + {c};\n"
                )
    return "".join(out)


def _row(tile: Tile, i: int, ty: int) -> str:
    return f"m0 + (ty + {(i // 4) * ty}u) * 4u + {i % 4}u"


def _store_partial(
    shader: Shader,
    p: Problem,
    tile: Tile,
    partial: int,
    count: int,
    tx: int,
    ty: int,
    m: int,
    n: int,
    nb: int,
) -> str:
    bound = shader.binding(partial)
    out = [f" let out = (part * {nb * count}u + bz) * {m * n}u;\n"]
    for i in range(tile.tm):
        for g in range(tile.tn // 4):
            row, col = _row(tile, i, ty), f"n0 + (tx + {g * tx}u) * 4u"
            guard = [] if m % tile.bm == 0 else ["r < " + f"{m}u"]
            if bound.vector:
                if n % tile.bn:
                    guard.append(f"c < {n}u")
                line = f"{bound.name}[(out + r * {n}u + c) >> 2u] = c{i}_{g};"
                line = f"if ({' && '.join(guard)}) {{ {line} }}" if guard else line
            else:
                line = ""
                for j in range(4):
                    inner = [*guard, f"c + {j}u < {n}u"]
                    line += f"if ({' && '.join(inner)}) {{ {bound.name}[out + r * {n}u + c + {j}u] = c{i}_{g}.{XYZW[j]}; }} "
            out.append(f" {{ let r = {row}; let c = {col}; {line} }}\n")
    return "".join(out)


def _epilogue(
    shader: Shader, p: Problem, tile: Tile, batch: Sequence[str], tx: int, ty: int, m: int, n: int, wide: bool
) -> str:
    """Run the epilogue body for each of the thread's results, four columns at a time where they are one vector."""
    body = p.epilogue
    nbatch, nm, nn = len(p.batch), len(p.m), len(p.n)
    acc = next(i for i, x in enumerate(body.instrs) if x.op == "acc")
    column_axes = set(range(nbatch + nm, nbatch + nm + nn))
    out: list[str] = []
    for g in range(tile.tn // 4):
        for j0 in range(1 if wide else 4):
            head: list[str] = []
            step = 4 if wide else 1
            head.append(f"  let col = n0 + (tx + {g * tx}u) * 4u" + (f" + {j0}u;\n" if j0 else ";\n"))
            inside_n = "" if n % tile.bn == 0 else f"col < {n}u"
            head.append("  let cc = col;\n" if not inside_n else f"  let cc = min(col, {n - step}u);\n")
            quarter = ""
            if wide:
                quarter = shader.name("q")
                names = decompose(shader, "cc", p.n, head)
                head.append(f"  let {quarter} = {names[-1]} >> 2u;\n")
            else:
                names = decompose(shader, "cc", p.n, head)
            index = [*batch, *([""] * nm), *names]
            emitter = Emitter(
                shader,
                body,
                index,
                axis=nbatch + nm + nn - 1 if wide else None,
                width=4 if wide else 1,
                quarter=quarter,
            )
            for position, instr in enumerate(body.instrs):
                if instr.op not in ("acc", "store") and set(instr.axes) <= column_axes:
                    emitter.emit(position)
            outer = set(emitter.values)
            out.append(" {\n" + "".join(head) + emitter.take())
            for i in range(tile.tm):
                lines: list[str] = []
                inside_m = "" if m % tile.bm == 0 else f"row < {m}u"
                lines.append(f"  let row = {_row(tile, i, ty)};\n")
                lines.append("  let rr = row;\n" if not inside_m else f"  let rr = min(row, {m - 1}u);\n")
                rows = decompose(shader, "rr", p.m, lines)
                emitter.index[nbatch : nbatch + nm] = rows
                emitter.values[acc] = _acc_lanes(f"c{i}_{g}", p.acc, range(4) if wide else [j0])
                guard = " && ".join(x for x in (inside_m, inside_n) if x)
                for position, instr in enumerate(body.instrs):
                    if instr.op == "store":
                        emitter.store(position, guard)
                    elif instr.op != "acc":
                        emitter.emit(position)
                out.append("  {\n" + "".join(lines) + emitter.take() + "  }\n")
                emitter.forget(outer)
            out.append(" }\n")
    return "".join(out)


def _acc_lanes(name: str, dtype: np.dtype, lanes: Sequence[int]) -> list[str]:
    if dtype.kind == "b":
        return [f"({name}.{XYZW[k]} != 0u)" for k in lanes]
    if dtype.kind in "iu" and dtype.itemsize < 4:
        return [f"({wgsl.wrap(f'{name}.{XYZW[k]}', dtype)})" for k in lanes]
    return [f"{name}.{XYZW[k]}" for k in lanes]
