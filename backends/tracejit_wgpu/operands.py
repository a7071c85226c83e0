"""How the operands of a product come in: global loads of a tile into registers, and from there into workgroup memory.

``walk`` is for operands whose pieces lie at constant distances (one address per operand), ``stage`` for all others: odd
sizes, several axes, narrow types. Called by ``tile_kernel.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

from tracejit.program import Access
from tracejit_wgpu import wgsl
from tracejit_wgpu.emit import XYZW, Shader, decompose
from tracejit_wgpu.problem import Problem
from tracejit_wgpu.tuning import Tile


@dataclass(frozen=True)
class Loader:
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


def loader(name: str, p: Problem, access: Access, rows: str, tile: int, vector: bool, kind: str) -> Loader:
    """The loader of operand ``name`` ("a" or "b"), whose free axes are the group ``rows`` ("m" or "n")."""
    sizes = p.m if rows == "m" else p.n
    row_strides, k_strides = p.part(access, rows), p.part(access, "k")
    along_k = not (row_strides and row_strides[-1] == 1) and bool(k_strides) and k_strides[-1] == 1
    return Loader(name, prod(sizes), sizes, row_strides, k_strides, along_k, vector, tile, kind)


def vector_ok(p: Problem, access: Access, rows: str) -> bool:
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


def walks(x: Loader, tile: Tile, threads: int) -> bool:
    """True if a thread's pieces of a tile lie at constant distances, so that one address per operand walks along k."""
    across = tile.bk // 4 if x.along_k else x.tile // 4
    return (
        x.vector and len(x.k_strides) == 1 and len(x.rows) == 1 and x.extent % x.tile == 0
        and threads % across == 0 and (x.tile * tile.bk // 4) % threads == 0
    )  # fmt: skip


def walk(
    shader: Shader, x: Loader, batch_strides: Sequence[int], batch: Sequence[str], tile: Tile, base: int, memory: str,
    threads: int,
) -> tuple[str, str, Callable[[Shader, Access], str], str]:  # fmt: skip
    """Step, set-up, loads and stores of an operand that ``walks``: one vec4 address plus constants.

    The driver cannot find this by itself behind unsigned arithmetic. With shallow tiles the registers saved decide how
    many workgroups share a multiprocessor (39 -> 42 TFLOP/s on an H100), with several problems it keeps the code small
    (43 -> 44.6); single products on deep tiles are 1-2% faster without.
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


def stage(
    shader: Shader,
    x: Loader,
    p: Problem,
    tile: Tile,
    zero: str,
    tail: bool,
    base: int,
    memory: str,
    threads: int,
) -> tuple[str, Callable[[Shader, Access], str], str]:
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
                where = address_of(sh, x, p, access, f"p_{s}_0", f"kp + k_{s}", single, kstride, body)
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
                    where = address_of(
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


def address_of(
    shader: Shader, x: Loader, p: Problem, access: Access, row: str, kk: str, single: bool, kstride: int, out: list[str],
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
