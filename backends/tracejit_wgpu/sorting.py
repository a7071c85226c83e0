"""sort and argsort (stable), cumsum and cumprod along one axis.

Sorting is bitonic on (key, position) pairs, where the key is an order-preserving u32 of the value: pairs are distinct,
so the result is stable. Rows up to 1024 stay in workgroup memory; longer ones merge through memory.
"""

from __future__ import annotations

from math import prod

import numpy as np

from tracejit.program import OpKernel
from tracejit_wgpu import wgsl
from tracejit_wgpu.emit import Dispatch, Shader, Tables
from tracejit_wgpu.loops import grid_of

_BLOCK = 1024  # elements that one workgroup sorts or merges: 8 KiB of pairs


def _rows(shape: tuple[int, ...], axis: int) -> tuple[int, int, int]:
    """(outer, length, inner): element ``(o * length + j) * inner + i``."""
    return prod(shape[:axis]), shape[axis], prod(shape[axis + 1 :])


def sort_key(value: str, dtype: np.dtype, shader: Shader) -> str:
    """An unsigned key in the order of NumPy's sort: NaN last, both zeros equal."""
    if dtype.kind == "f":
        return f"{shader.use('fkey')}(select({value}, 0.0f, {value} == 0.0f))"
    if dtype.kind == "i":
        return f"(bitcast<u32>({value}) ^ 0x80000000u)"
    return f"select(0u, 1u, {value})" if dtype.kind == "b" else value


def _threads(tables: Tables) -> int:
    return min(256, tables.target.invocations)


def _main(shader: Shader, threads: int, groups: int, body: str, tables: Tables, label: str) -> Dispatch:
    grid, number = grid_of(groups, tables.target.workgroups)
    guard = f"if (wg >= {groups}u) {{ return; }}\n" if grid[0] * grid[1] != groups else ""
    main = (
        f"@compute @workgroup_size({threads}) fn main(@builtin(workgroup_id) wid: vec3<u32>, "
        f"@builtin(local_invocation_index) li: u32) {{\nlet wg = {number};\n{guard}{body}}}\n"
    )
    return shader.dispatch(main, grid, label)


def _local(
    tables: Tables, keys: int, places: int, size: int, blocks: int, start: int, label: str
) -> Dispatch:
    """Bitonic steps that stay inside blocks of ``min(size, 1024)``: all stages up to it, or the tail of stage ``start``."""
    block = min(size, _BLOCK)
    threads = min(_threads(tables), max(32, block // 2))
    shader = Shader(tables)
    shader.bind(keys, vector=False, write=True)
    shader.bind(places, vector=False, write=True)
    k, p = shader.binding(keys).name, shader.binding(places).name
    mk, mp = shader.memory("u32", 2 * block), shader.memory("u32", 2 * block)
    swap = (
        f"let i = 2u * j * (t / j) + t % j; let l = i + j; let up = (((base + i) & k) == 0u);\n"
        f"let a = {mk}[i]; let b = {mk}[l]; let x = {mp}[{block}u + i]; let y = {mp}[{block}u + l];\n"
        f"if (((a > b) || (a == b && x > y)) == up) {{ {mk}[i] = b; "
        f"{mk}[l] = a; {mp}[{block}u + i] = y; {mp}[{block}u + l] = x; }}\n"
    )
    steps = (
        f"for (var j = J; j > 0u; j = j / 2u) {{ workgroupBarrier();\n"
        f"for (var t = li; t < {block // 2}u; t += {threads}u) {{ {swap} }} }}\n"
    )
    body = f"let first = wg * {block}u; let base = first % {size}u;\n"
    body += (
        f"for (var t = li; t < {block}u; t += {threads}u) {{ {mk}[t] = {k}[first + t]; "
        f"{mp}[{block}u + t] = {p}[first + t]; }}\n"
    )
    if start:
        body += f"let k = {start}u;\n" + steps.replace("J;", f"{block // 2}u;")
    else:
        body += f"for (var k = 2u; k <= {block}u; k = k * 2u) {{ {steps.replace('J;', 'k / 2u;')} }}\n"
    body += "workgroupBarrier();\n"
    body += (
        f"for (var t = li; t < {block}u; t += {threads}u) {{ {k}[first + t] = {mk}[t]; "
        f"{p}[first + t] = {mp}[{block}u + t]; }}\n"
    )
    return _main(shader, threads, blocks * size // block, body, tables, label)


def _global(
    tables: Tables, keys: int, places: int, size: int, rows: int, k: int, j: int, label: str
) -> Dispatch:
    """One bitonic step over distance ``j``."""
    shader = Shader(tables)
    shader.bind(keys, vector=False, write=True)
    shader.bind(places, vector=False, write=True)
    a, p = shader.binding(keys).name, shader.binding(places).name
    total = rows * size // 2
    threads = _threads(tables)
    body = (
        f"let t = wg * {threads}u + li; if (t >= {total}u) {{ return; }}\n"
        f"let i = 2u * {j}u * (t / {j}u) + t % {j}u; let l = i + {j}u; let up = (((i % {size}u) & {k}u) == 0u);\n"
        f"let x = {a}[i]; let y = {a}[l]; let u = {p}[i]; let v = {p}[l];\n"
        f"if (((x > y) || (x == y && u > v)) == up) {{ {a}[i] = y; {a}[l] = x; {p}[i] = v; {p}[l] = u; }}\n"
    )
    return _main(shader, threads, -(-total // threads), body, tables, label)


def sort_pairs(tables: Tables, keys: int, places: int, rows: int, size: int, label: str) -> list[Dispatch]:
    """Sort ``rows`` rows of ``size`` (a power of two) pairs in scratch buffers."""
    out = [_local(tables, keys, places, size, rows, 0, label)]
    k = 2 * _BLOCK
    while k <= size:
        j = k // 2
        while j >= _BLOCK:
            out.append(_global(tables, keys, places, size, rows, k, j, label))
            j //= 2
        out.append(_local(tables, keys, places, size, rows, k, label))
        k *= 2
    return out


def _keys(
    tables: Tables, source: int, outer: int, length: int, inner: int, size: int, label: str
) -> tuple[int, int, Dispatch]:
    """Scratch buffers with keys and positions of all rows, padded to ``size`` with pairs that sort last."""
    rows = outer * inner
    keys, places = tables.scratch(rows * size, np.uint32), tables.scratch(rows * size, np.uint32)
    shader = Shader(tables)
    shader.bind(source, vector=False, write=False)
    shader.bind(keys, vector=False, write=True)
    shader.bind(places, vector=False, write=True)
    threads = _threads(tables)
    value = shader.read(source, f"((r / {inner}u) * {length}u + j) * {inner}u + r % {inner}u")
    key = sort_key("value", tables.dtype(source), shader)
    body = (
        f"let t = wg * {threads}u + li; if (t >= {rows * size}u) {{ return; }}\nlet r = t / {size}u; let j = t % {size}u;\n"
        f"var key = 0xffffffffu; if (j < {length}u) {{ let value = {value}; key = {key}; }}\n"
        f"{shader.binding(keys).name}[t] = key; {shader.binding(places).name}[t] = j;\n"
    )
    return keys, places, _main(shader, threads, -(-rows * size // threads), body, tables, label + "_keys")


def _sorted(kernel: OpKernel, tables: Tables, positions: bool) -> list[Dispatch] | None:
    (x, shape), (y, _) = kernel.operands[0], kernel.results[0]
    if prod(shape) == 0:
        return []
    outer, length, inner = _rows(shape, kernel.attrs["axis"])
    rows = outer * inner
    size = 1 << max(1, (length - 1).bit_length())
    if rows * size * 4 > tables.target.binding_bytes:
        return None
    keys, places, first = _keys(tables, x, outer, length, inner, size, kernel.name)
    out = [first, *sort_pairs(tables, keys, places, rows, size, kernel.name)]
    shader = Shader(tables)
    shader.bind(places, vector=False, write=False)
    if not positions:
        shader.bind(x, vector=False, write=False)
    shader.bind(y, vector=False, write=True)
    threads = _threads(tables)
    total = rows * length
    dtype = tables.dtype(y)
    value = shader.read(x, f"(o * {length}u + place) * {inner}u + i") if not positions else "i32(place)"
    body = (
        f"let t = wg * {threads}u + li; if (t >= {total}u) {{ return; }}\n"
        f"let i = t % {inner}u; let j = (t / {inner}u) % {length}u; let o = t / {inner * length}u;\n"
        f"let place = {shader.binding(places).name}[(o * {inner}u + i) * {size}u + j];\n"
        f"{shader.binding(y).name}[t] = {shader.stored(value, dtype)};\n"
    )
    out.append(_main(shader, threads, -(-total // threads), body, tables, kernel.name + "_gather"))
    return out


def sort(kernel: OpKernel, tables: Tables) -> list[Dispatch] | None:
    """Values in ascending order along an axis, NaN last."""
    return _sorted(kernel, tables, False)


def argsort(kernel: OpKernel, tables: Tables) -> list[Dispatch] | None:
    """Positions that sort an axis, stable."""
    return _sorted(kernel, tables, True)


# ---------------------------------------------------------------------------------------------------- scans
def _scan(kernel: OpKernel, tables: Tables, kind: str) -> list[Dispatch]:
    (x, shape), (y, _) = kernel.operands[0], kernel.results[0]
    if prod(shape) == 0:
        return []
    outer, length, inner = _rows(shape, kernel.attrs["axis"])
    rows = outer * inner
    shader = Shader(tables)
    shader.bind(x, vector=False, write=False)
    shader.bind(y, vector=False, write=True)
    dtype = tables.dtype(y)
    compute = wgsl.compute_type(dtype)
    start = wgsl.identity_element(kind, dtype)
    out_name = shader.binding(y).name
    place = f"{length - 1}u - j" if kernel.attrs.get("reverse") else "j"
    threads = _threads(tables)

    def joined(a: str, b: str) -> str:
        return wgsl.wrap(wgsl.combine(kind, a, b, dtype, shader.use), dtype)

    if inner >= 32 or rows >= 4096 or length <= 64:
        value = shader.read(x, "at")
        body = (
            f"let r = wg * {threads}u + li; if (r >= {rows}u) {{ return; }}\nvar total: {compute} = {start};\n"
            f"for (var j = 0u; j < {length}u; "
            f"j++) {{ let at = ((r / {inner}u) * {length}u + ({place})) * {inner}u + r % {inner}u;\n"
            f"total = {joined('total', value)}; {out_name}[at] = {shader.stored('total', dtype)}; }}\n"
        )
        return [_main(shader, threads, -(-rows // threads), body, tables, kernel.name)]
    # one workgroup per row: blocks of 4 elements per thread, a scan over the threads, a carry from block to block
    memory = shader.memory(compute, 2 * threads)
    value = shader.read(x, "at")
    block = 4 * threads
    body = (
        f"let o = wg / {inner}u; let i = wg % {inner}u;\nvar carry: {compute} = {start};\n"
        f"for (var b = 0u; b < {length}u; b += {block}u) {{\n var v: array<{compute}, 4>; var sum: {compute} = {start};\n"
        f" for (var q = 0u; q < 4u; q++) {{ let j = b + li * 4u + q; "
        f"if (j < {length}u) {{ let at = (o * {length}u + ({place})) * {inner}u + i;\n"
        f"  sum = {joined('sum', value)}; }} v[q] = sum; }}\n"
        f" {memory}[li] = sum; workgroupBarrier();\n var from_ = 0u;\n"
        f" for (var d = 1u; d < {threads}u; d = d * 2u) {{\n"
        f"  var s = {memory}[from_ * {threads}u + li]; "
        f"if (li >= d) {{ s = {joined(f'{memory}[from_ * {threads}u + li - d]', 's')}; }}\n"
        f"  {memory}[(1u - from_) * {threads}u + li] = s; from_ = 1u - from_; workgroupBarrier(); }}\n"
        f" var before: {compute} = carry; "
        f"if (li > 0u) {{ before = {joined('carry', f'{memory}[from_ * {threads}u + li - 1u]')}; }}\n"
        f" for (var q = 0u; q < 4u; q++) {{ let j = b + li * 4u + q; "
        f"if (j < {length}u) {{ let at = (o * {length}u + ({place})) * {inner}u + i;\n"
        f"  {out_name}[at] = {shader.stored(joined('before', 'v[q]'), dtype)}; }} }}\n"
        f" carry = {joined('carry', f'{memory}[from_ * {threads}u + {threads - 1}u]')}; workgroupBarrier();\n}}\n"
    )
    return [_main(shader, threads, rows, body, tables, kernel.name)]


def cumsum(kernel: OpKernel, tables: Tables) -> list[Dispatch]:
    """Running sums along an axis."""
    return _scan(kernel, tables, "sum")


def cumprod(kernel: OpKernel, tables: Tables) -> list[Dispatch]:
    """Running products along an axis."""
    return _scan(kernel, tables, "prod")


GENERATORS = {"sort": sort, "argsort": argsort, "cumsum": cumsum, "cumprod": cumprod}
