"""scatter_add and scatter_add_along_axis without atomics: every destination gathers its updates in ascending order.

Wide rows (embedding gradients): a workgroup per destination marks matching indices in bit masks. Many updates: indices
are sorted first and each destination finds its range by binary search. Otherwise each element scans the indices.
"""

from __future__ import annotations

from math import prod

import numpy as np

from tracejit.program import OpKernel
from tracejit_wgpu import wgsl
from tracejit_wgpu.emit import Dispatch, Shader, Tables
from tracejit_wgpu.sorting import _keys, _main, _threads, sort_pairs

_CHUNK = 8192  # indices whose bit mask is in workgroup memory at a time: 1 KiB


def _wrapped(value: str, size: int, dtype: np.dtype) -> str:
    """The destination row of an index: negative from the end, then clipped."""
    if dtype.kind == "u":
        return f"min({value}, {size - 1}u)"
    return f"u32(clamp(select({value}, {value} + {size}i, {value} < 0i), 0i, {size - 1}i))"


def scatter_add(kernel: OpKernel, tables: Tables) -> list[Dispatch] | None:
    """base with sub-arrays of upd added at idx along an axis."""
    (base, shape), (idx, idx_shape), (upd, _) = kernel.operands
    out_buffer, axis = kernel.results[0][0], kernel.attrs["axis"]
    outer, rows, inner = prod(shape[:axis]), shape[axis], prod(shape[axis + 1 :])
    count = prod(idx_shape)
    if outer * rows * inner == 0:
        return []
    work = outer * rows * count
    if count > 1 and (work * (1 if inner >= 32 else inner) > 1 << 27 or (inner < 16 and work > 1 << 22)):
        size = 1 << max(1, (count - 1).bit_length())
        if size * 4 <= tables.target.binding_bytes:
            return _by_sorting(kernel, tables, (outer, rows, inner, count, size))
    if inner >= 16 and count > 0:
        return [_by_masks(kernel, tables, (outer, rows, inner, count))]
    shader = Shader(tables)
    names = _declare(shader, base, idx, upd, out_buffer)
    threads, total = _threads(tables), outer * rows * inner
    dtype = tables.dtype(out_buffer)
    index = shader.read(idx, "j")
    body = (
        f"let t = wg * {threads}u + li; if (t >= {total}u) {{ return; }}\n"
        f"let i = t % {inner}u; let v = (t / {inner}u) % {rows}u; "
        f"let o = t / {inner * rows}u;\nvar acc = {shader.read(base, 't')};\n"
        f"for (var j = 0u; j < {count}u; j++) {{ let x = {index}; if ({_wrapped('x', rows, tables.dtype(idx))} == v) {{\n"
        f"acc = {_add('acc', shader.read(upd, f'(o * {count}u + j) * {inner}u + i'), dtype, shader)}; }} }}\n"
        f"{names[-1]}[t] = {shader.stored('acc', dtype)};\n"
    )
    return [_main(shader, threads, -(-total // threads), body, tables, kernel.name)]


def _declare(shader: Shader, base: int, idx: int, upd: int, out: int) -> list[str]:
    for buffer in (base, idx, upd):
        shader.bind(buffer, vector=False, write=False)
    shader.bind(out, vector=False, write=True)
    return [shader.binding(b).name for b in (base, idx, upd, out) if b not in shader.tables.scalars]


def _add(a: str, b: str, dtype: np.dtype, shader: Shader) -> str:
    return wgsl.expression("add", (a, b), dtype, dtype, shader.use)


def _by_masks(kernel: OpKernel, tables: Tables, sizes: tuple[int, int, int, int]) -> Dispatch:
    """A workgroup per (outer, destination): mark, then add the marked rows in order."""
    outer, rows, inner, count = sizes
    (base, _), (idx, _), (upd, _) = kernel.operands
    shader = Shader(tables)
    names = _declare(shader, base, idx, upd, kernel.results[0][0])
    threads = min(_threads(tables), max(32, 1 << (inner - 1).bit_length()))
    dtype = tables.dtype(upd)
    columns = -(-inner // threads)
    chunk = min(_CHUNK, -(-count // 32) * 32)
    words = chunk // 32
    mask = shader.memory("u32", words)
    blocks = -(-columns // 4)  # up to four columns per thread at a time
    per = min(columns, 4)
    index = shader.read(idx, "j")
    hit = f"{_wrapped('x', rows, tables.dtype(idx))} == v"
    body = (
        f"let v = (wg / {blocks}u) % {rows}u; let o = wg / {blocks * rows}u; "
        f"let c = (wg % {blocks}u) * {per * threads}u + li;\n"
    )
    adds = ""
    for q in range(per):
        place = shader.read(base, f"(o * {rows}u + v) * {inner}u + c{q}")
        body += f"let c{q} = min(c + {q * threads}u, {inner - 1}u); var acc{q} = {place};\n"
        adds += f"acc{q} = {_add(f'acc{q}', shader.read(upd, f'(o * {count}u + j) * {inner}u + c{q}'), dtype, shader)}; "
    body += (
        f"for (var first = 0u; first < {count}u; first += {chunk}u) {{\n"
        f" for (var w = li; w < {words}u; w += {threads}u) {{ var m = 0u;\n"
        f"  for (var b = 0u; b < 32u; b++) {{ let j = first + w * 32u + b; "
        f"if (j < {count}u) {{ let x = {index}; if ({hit}) {{ m |= 1u << b; }} }} }}\n"
        f"  {mask}[w] = m; }}\n workgroupBarrier();\n"
        f" for (var w = 0u; w < {words}u; w++) {{ var m = {mask}[w]; while (m != 0u) {{\n"
        f"  let j = first + w * 32u + countTrailingZeros(m); m &= m - 1u; {adds} }} }}\n workgroupBarrier();\n}}\n"
    )
    for q in range(per):
        at = f"(o * {rows}u + v) * {inner}u + c + {q * threads}u"
        body += f"if (c + {q * threads}u < {inner}u) {{ {names[-1]}[{at}] = {shader.stored(f'acc{q}', dtype)}; }}\n"
    return _main(shader, threads, outer * rows * blocks, body, tables, kernel.name)


def _by_sorting(kernel: OpKernel, tables: Tables, sizes: tuple[int, int, int, int, int]) -> list[Dispatch]:
    """Sort the indices with their positions; each destination adds its run."""
    outer, rows, inner, count, size = sizes
    (base, _), (idx, _), (upd, _) = kernel.operands
    wrapped = tables.scratch(count, np.uint32)
    threads = _threads(tables)
    first = Shader(tables)
    first.bind(idx, vector=False, write=False)
    first.bind(wrapped, vector=False, write=True)
    body = (
        f"let t = wg * {threads}u + li; if (t >= {count}u) {{ return; }}\nlet x = {first.read(idx, 't')};\n"
        f"{first.binding(wrapped).name}[t] = {_wrapped('x', rows, tables.dtype(idx))};\n"
    )
    out = [_main(first, threads, -(-count // threads), body, tables, kernel.name + "_wrap")]
    keys, places, made = _keys(tables, wrapped, 1, count, 1, size, kernel.name)
    out += [made, *sort_pairs(tables, keys, places, 1, size, kernel.name + "_sort")]
    shader = Shader(tables)
    out_buffer = kernel.results[0][0]
    for buffer in (base, upd, keys, places):
        shader.bind(buffer, vector=False, write=False)
    shader.bind(out_buffer, vector=False, write=True)
    k, p = shader.binding(keys).name, shader.binding(places).name
    total, dtype = outer * rows * inner, tables.dtype(out_buffer)
    body = (
        f"let t = wg * {threads}u + li; if (t >= {total}u) {{ return; }}\n"
        f"let i = t % {inner}u; let v = (t / {inner}u) % {rows}u; let o = t / {inner * rows}u;\n"
        f"var low = 0u; var high = {count}u;\n"
        f"while (low < high) {{ let mid = (low + high) / 2u; "
        f"if ({k}[mid] < v) {{ low = mid + 1u; }} else {{ high = mid; }} }}\n"
        f"var acc = {shader.read(base, 't')};\n"
        f"for (var s = low; s < {count}u; s++) {{ if ({k}[s] != v) {{ break; }} let j = {p}[s];\n"
        f"acc = {_add('acc', shader.read(upd, f'(o * {count}u + j) * {inner}u + i'), dtype, shader)}; }}\n"
        f"{shader.binding(out_buffer).name}[t] = {shader.stored('acc', dtype)};\n"
    )
    out.append(_main(shader, threads, -(-total // threads), body, tables, kernel.name + "_add"))
    return out


def scatter_add_along_axis(kernel: OpKernel, tables: Tables) -> list[Dispatch] | None:
    """base with single elements added along an axis; each element scans the indices of its line."""
    (base, shape), (idx, idx_shape), (upd, _) = kernel.operands
    out_buffer, axis = kernel.results[0][0], kernel.attrs["axis"]
    rows, inner, count = shape[axis], prod(shape[axis + 1 :]), idx_shape[axis]
    total = prod(shape)
    if total == 0:
        return []
    if total * max(count, 1) > 1 << 33:
        return None
    shader = Shader(tables)
    names = _declare(shader, base, idx, upd, out_buffer)
    threads, dtype = _threads(tables), tables.dtype(out_buffer)
    at = f"(o * {count}u + j) * {inner}u + i"
    body = (
        f"let t = wg * {threads}u + li; if (t >= {total}u) {{ return; }}\n"
        f"let i = t % {inner}u; let v = (t / {inner}u) % {rows}u; "
        f"let o = t / {inner * rows}u;\nvar acc = {shader.read(base, 't')};\n"
        f"for (var j = 0u; j < {count}u; j++) {{ let x = {shader.read(idx, at)}; "
        f"if ({_wrapped('x', rows, tables.dtype(idx))} == v) {{\n"
        f"acc = {_add('acc', shader.read(upd, at), dtype, shader)}; }} }}\n"
        f"{names[-1]}[t] = {shader.stored('acc', dtype)};\n"
    )
    return [_main(shader, threads, -(-total // threads), body, tables, kernel.name)]


GENERATORS = {"scatter_add": scatter_add, "scatter_add_along_axis": scatter_add_along_axis}
