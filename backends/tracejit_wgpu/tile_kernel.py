"""The WGSL of a tiled product: loop over k, inner product, sums of operands, epilogue. Called by ``contract.py``.

Both operands lie k-outer in workgroup memory as vec4 whatever their layout (stored transposed with an XOR swizzle when k
is contiguous), the next tile is prefetched into registers, each thread owns TM x TN results.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import ceil, prod

import numpy as np

from tracejit.program import Access
from tracejit_wgpu import wgsl
from tracejit_wgpu.emit import XYZW, Emitter, Shader, decompose
from tracejit_wgpu.operands import Loader, stage, walk, walks
from tracejit_wgpu.problem import Problem
from tracejit_wgpu.tuning import Tile

#: A tile with which every product for which ``contract.sums_inside`` holds can add up its operands.
SUMMING = Tile(32, 32, 16, 4, 4)


def tile_kernel(
    shader: Shader,
    problems: Sequence[Problem],
    tile: Tile,
    la: Loader,
    lb: Loader,
    kind: str,
    partial: int | None,
    wide: bool,
) -> tuple[str, int]:
    """The body of the entry point and the number of workgroups; ``partial`` is the buffer of split-K parts, if any."""
    p = problems[0]
    m, n, k, nb = prod(p.m), prod(p.n), prod(p.k), prod(p.batch)
    bk, tx_count, ty_count, threads = tile.bk, tile.bn // tile.tn, tile.bm // tile.tm, tile.threads
    mt, nt = -(-m // tile.bm), -(-n // tile.bn)
    span = ceil(ceil(k / tile.split) / bk) * bk  # k range of one part, whole tiles
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
        if not tail and (bk <= 8 or len(problems) > 1) and walks(x, tile, threads):
            step, code, load, store = walk(
                shader, x, p.part(access, "batch"), batch_index, tile, base[x.name], memory[x.name], threads
            )
            steps += step
        else:
            batch = wgsl.u32_offset(zip(p.part(access, "batch"), batch_index), 0)
            out.append(f" let batch_{x.name} = {batch};\n")
            code, load, store = stage(shader, x, p, tile, zero, tail, base[x.name], memory[x.name], threads)
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


def summing_tile(p: Problem, tile: Tile) -> Tile:
    """The tile, if a product with it can add up operands on the way, else the nearest that can; k is not cut."""
    whole = replace(tile, split=1)
    sides = [(n, b) for n, b, s in ((p.m, whole.bm, p.a_sum), (p.n, whole.bn, p.b_sum)) if s is not None]
    walks = all(prod(n) % b == 0 and whole.threads % (b // 4) == 0 for n, b in sides)
    if walks and all(b * whole.bk // 4 % whole.threads == 0 for _, b in sides) and prod(p.k) % whole.bk == 0:
        return whole
    return SUMMING


def _first(x: Loader) -> str:
    """True in the workgroups that add up operand ``x``: one per column of tiles."""
    return "n0 == 0u" if x.name == "a" else "m0 == 0u"


def _store_sums(
    shader: Shader, problems: Sequence[Problem], la: Loader, lb: Loader, memory: str, threads: int
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
        more = f"for (var i = 1u; i < {threads // across}u; i++) {{ t += {memory}[li + i * {across}u]; }}"
        lines = f"  var t = {memory}[li]; {more}\n"
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


def _compute(
    tile: Tile,
    la: Loader,
    lb: Loader,
    base: dict[str, int],
    memory: dict[str, str],
    tx: int,
    ty: int,
    kind: str,
) -> str:
    """The inner product of one tile, fully unrolled over k."""
    out: list[str] = []
    step = 32 // tile.bk

    def read(x: Loader, k: int, group: int, thread: str, count: int) -> str:
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
