"""Elementwise bodies that read across memory order (transposed copies): square tiles go through workgroup memory.

Without it every lane of a subgroup touches a memory line of its own. ``loops.py`` asks :func:`tile_axis` whether a body is
such and lets :func:`tiled_body` generate it.
"""

from __future__ import annotations

from math import prod

from tracejit.program import LoopBody
from tracejit_wgpu import wgsl
from tracejit_wgpu.emit import Emitter, Shader, decompose

SIDE = 32
_MIN_ELEMENTS = 1 << 16
_MAX_LOADS = 3  # tiles of (32 + 1) * 32 words: 12.4 KB of workgroup memory


def _crossing(body: LoopBody, axis: int) -> list[int]:
    """Plain loads whose neighbours lie along ``axis`` and far apart along the last axis."""
    last = len(body.domain) - 1
    out = []
    for p, i in enumerate(body.instrs):
        if i.op == "load" and set(i.attrs) == {"access"} and i.dtype.itemsize == 4:
            strides = i.attrs["access"].strides
            if strides[axis] == 1 and abs(strides[last]) >= SIDE:
                out.append(p)
    return out


def tile_axis(body: LoopBody) -> int | None:
    """The axis along which some loads of an elementwise body are contiguous while its stores are along the last one."""
    last = len(body.domain) - 1
    if body.reduce_axes or last < 1 or prod(body.domain) < _MIN_ELEMENTS or body.domain[last] < SIDE:
        return None
    if any(i.op == "store" and i.attrs["access"].strides[last] != 1 for i in body.instrs):
        return None
    found = {a: len(_crossing(body, a)) for a in range(last) if body.domain[a] >= SIDE}
    best = max(found, key=lambda a: found[a], default=None)
    return best if best is not None and 0 < found[best] <= _MAX_LOADS else None


def tiled_body(shader: Shader, body: LoopBody, axis: int, threads: int) -> tuple[str, int]:
    """WGSL of one workgroup's tile (``axis`` by last axis) and the number of workgroups."""
    last = len(body.domain) - 1
    loads = _crossing(body, axis)
    sizes = [-(-n // SIDE) if a in (axis, last) else n for a, n in enumerate(body.domain)]
    rounds = SIDE * SIDE // threads
    down, across = body.domain[axis], body.domain[last]
    out: list[str] = []
    names = decompose(shader, "wg", sizes, out)
    out.append(f"let d0 = {names[axis]} * {SIDE}u; let a0 = {names[last]} * {SIDE}u;\n")
    out.append(f"let lx = li % {SIDE}u; let ly = li / {SIDE}u;\n")
    step = threads // SIDE
    index = list(names)
    size = SIDE * (SIDE + 1)
    # In: neighbouring threads along ``axis``, where these loads are contiguous.
    for r in range(rounds):
        index[axis], index[last] = f"di{r}", f"ai{r}"
        out.append(
            f"let di{r} = min(d0 + lx, {down - 1}u); let ai{r} = min(a0 + ly + {r * step}u, {across - 1}u);\n"
        )
        emitter = Emitter(shader, body, index, prefix=f"x{r}_")
        for slot, p in enumerate(loads):
            emitter.emit(p)
            memory = shader.memory(wgsl.compute_type(body.instrs[p].dtype), len(loads) * size)
            place = f"{memory}[{slot * size}u + (ly + {r * step}u) * {SIDE + 1}u + lx]"
            emitter.lines.append(f"{place} = {emitter.lane(p, 0)};\n")
        out.append(emitter.take())
    out.append("workgroupBarrier();\n")
    # Out: neighbouring threads along the last axis.
    for r in range(rounds):
        index[axis], index[last] = "d", "a"
        emitter = Emitter(shader, body, index, prefix="v")
        for slot, p in enumerate(loads):
            memory = shader.memory(wgsl.compute_type(body.instrs[p].dtype), len(loads) * size)
            place = f"{memory}[{slot * size}u + lx * {SIDE + 1}u + ly + {r * step}u]"
            emitter.values[p] = [emitter.let(p, 0, place)]
        for p, instr in enumerate(body.instrs):
            if instr.op == "store":
                emitter.store(p)
            else:
                emitter.emit(p)
        inside = f"d < {down}u && a < {across}u"
        out.append(
            f"{{ let d = d0 + ly + {r * step}u; let a = a0 + lx; if ({inside}) {{\n{emitter.take()}}} }}\n"
        )
    return "".join(out), prod(sizes)


def usable(threads: int) -> bool:
    """True for workgroup sizes that cover a tile in whole rounds."""
    return threads % SIDE == 0 and SIDE * SIDE % threads == 0
