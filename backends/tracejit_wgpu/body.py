"""LoopBody normalisation and analysis: drop and merge axes, dependency levels, which accesses can be vectors of four.

Pure functions from LoopBody to LoopBody or to facts about it; ``emit.py`` and the kernel generators call them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from math import prod

import numpy as np

from tracejit.program import Access, Instr, LoopBody

REDUCTIONS = frozenset({"sum", "prod", "max", "min", "any", "all", "argmax", "argmin"})


def accesses(body: LoopBody) -> list[Access]:
    """Every access of the body, in order."""
    return [i.attrs["access"] for i in body.instrs if i.op in ("load", "store")]


def buffers(body: LoopBody) -> tuple[list[int], list[int]]:
    """Buffer ids read and written, each once, in order of appearance."""
    reads = dict.fromkeys(i.attrs["access"].buffer for i in body.instrs if i.op == "load")
    writes = dict.fromkeys(i.attrs["access"].buffer for i in body.instrs if i.op == "store")
    return list(reads), list(writes)


def operands(instr: Instr) -> tuple[int, ...]:
    """All positions that an instruction reads, those in ``gather`` and ``predicate`` included."""
    extra: list[int] = [g[0] for g in instr.attrs.get("gather", ())]
    if instr.op == "load" and instr.attrs.get("predicate") is not None:
        extra.append(instr.attrs["predicate"])
    if instr.attrs.get("index_arg") is not None:  # argmax over partial results carries positions along
        extra.append(instr.attrs["index_arg"])
    return (*instr.args, *(e for e in extra if e not in instr.args))


def _strides(instr: Instr) -> tuple[int, ...] | None:
    if instr.op in ("load", "store"):
        return instr.attrs["access"].strides
    if instr.op == "random_bits":
        return tuple(instr.attrs["strides"])
    return None


def with_axes(body: LoopBody) -> LoopBody:
    """The body with ``axes`` of every instruction derived from its leaves, so that nothing relies on a caller's care."""
    found: list[frozenset[int]] = []
    instrs: list[Instr] = []
    reduced = frozenset(body.reduce_axes)
    everything = frozenset(range(len(body.domain)))
    for instr in body.instrs:
        axes = (
            frozenset[int]().union(*(found[p] for p in operands(instr))) if operands(instr) else frozenset()
        )
        strides = _strides(instr)
        if strides is not None:
            axes |= frozenset(a for a, s in enumerate(strides) if s)
        if instr.op == "index":
            axes |= {instr.attrs["axis"]}
        elif instr.op == "acc":
            axes = everything
        elif instr.op == "reduce":
            axes -= reduced
        found.append(axes)
        instrs.append(replace(instr, axes=tuple(sorted(axes))))
    return replace(body, instrs=tuple(instrs))


def remap(body: LoopBody, groups: Sequence[tuple[int, ...]]) -> LoopBody:
    """Merge each group of axes into one; the stride of the merged axis is that of the group's last axis."""
    where = {axis: g for g, group in enumerate(groups) for axis in group}
    kept = [group[-1] for group in groups]

    def fix(instr: Instr) -> Instr:
        attrs = dict(instr.attrs)
        if "access" in attrs:
            access = attrs["access"]
            attrs["access"] = replace(access, strides=tuple(access.strides[a] for a in kept))
        if instr.op == "random_bits":
            attrs["strides"] = tuple(attrs["strides"][a] for a in kept)
        if instr.op == "index":
            attrs["axis"] = where[attrs["axis"]]
        return replace(instr, attrs=attrs)

    reduce_axes = tuple(g for g, group in enumerate(groups) if group[-1] in body.reduce_axes)
    domain = tuple(prod(body.domain[a] for a in group) for group in groups)
    return with_axes(LoopBody(domain, tuple(fix(i) for i in body.instrs), reduce_axes))


def normalise(body: LoopBody, keep: Iterable[int] = ()) -> LoopBody:
    """Drop axes of size one and merge neighbours that every access walks as one. Axes in ``keep`` stay as they are."""
    fixed = set(keep)
    indexed = {i.attrs["axis"] for i in body.instrs if i.op == "index"}
    strides = [s for s in map(_strides, body.instrs) if s is not None]
    groups: list[tuple[int, ...]] = []
    for axis, size in enumerate(body.domain):
        if size == 1 and axis not in indexed and axis not in fixed:
            continue
        if groups:
            last = groups[-1][-1]
            joined = (
                not {last, axis} & (indexed | fixed)
                and (last in body.reduce_axes) == (axis in body.reduce_axes)
                and all(s[last] == s[axis] * size for s in strides)
            )
            if joined:
                groups[-1] = (*groups[-1], axis)
                continue
        groups.append((axis,))
    if body.reduce_axes and not any(group[-1] in body.reduce_axes for group in groups):
        # a reduction over a single element still needs an axis to run over
        groups.append((body.reduce_axes[-1],))
        groups.sort(key=lambda g: g[-1])
    return remap(body, groups)


def only(body: LoopBody, stores: Iterable[int]) -> LoopBody:
    """The body with only these stores and what they need."""
    needed = set(stores)
    stack = list(needed)
    while stack:
        fresh = set(operands(body.instrs[stack.pop()])) - needed
        needed |= fresh
        stack.extend(fresh)
    kept = sorted(needed)
    where = {old: new for new, old in enumerate(kept)}

    def fix(instr: Instr) -> Instr:
        attrs = dict(instr.attrs)
        if "gather" in attrs:
            attrs["gather"] = tuple((where[p], s, n) for p, s, n in attrs["gather"])
        for name in ("predicate", "index_arg"):
            if attrs.get(name) is not None:
                attrs[name] = where[attrs[name]]
        return replace(instr, args=tuple(where[p] for p in instr.args), attrs=attrs)

    return replace(body, instrs=tuple(fix(body.instrs[p]) for p in kept))


def levels(body: LoopBody) -> list[int]:
    """Per instruction: how many rounds of reductions must have finished before it can be computed."""
    out: list[int] = []
    for instr in body.instrs:
        level = max((out[p] for p in operands(instr)), default=0)
        out.append(level + 1 if instr.op == "reduce" else level)
    return out


def full_level(body: LoopBody) -> list[bool]:
    """Per instruction: does it run once per element (True) or once per point of the parallel axes."""
    reduced = set(body.reduce_axes)
    return [bool(reduced & set(i.axes)) and i.op != "reduce" for i in body.instrs]


def alignable(access: Access, axis: int, width: int = 4) -> bool:
    """True if ``width`` neighbours along ``axis`` are one aligned vector for every position of the other axes."""
    if access.strides[axis] != 1 or access.offset % width:
        return False
    return all(s % width == 0 for a, s in enumerate(access.strides) if a != axis)


def vector_gain(body: LoopBody, axis: int) -> float:
    """Elements moved per point by accesses that are vectors of four along ``axis``."""
    if body.domain[axis] % 4:
        return 0.0
    gain = 0.0
    for instr in body.instrs:
        if instr.op in ("load", "store"):
            access = instr.attrs["access"]
            aligned = all(g[1] % 4 == 0 for g in instr.attrs.get("gather", ()))
            if alignable(access, axis) and aligned:
                gain += 1.0
    return gain


def vector_buffers(body: LoopBody, axis: int | None) -> dict[int, bool]:
    """Per buffer: can all its accesses in the body be made on an array of vec4, vectorised along ``axis``."""
    out: dict[int, bool] = {}
    for instr in body.instrs:
        if instr.op not in ("load", "store"):
            continue
        access = instr.attrs["access"]
        ok = axis is not None and body.domain[axis] % 4 == 0 and alignable(access, axis)
        ok = ok and all(g[1] % 4 == 0 for g in instr.attrs.get("gather", ()))
        out[access.buffer] = out.get(access.buffer, True) and ok
    return out


def argument_dtype(body: LoopBody, instr: Instr) -> np.dtype:
    """dtype of the last operand (where: of the values; comparisons: of the operands)."""
    return body.instrs[instr.args[-1]].dtype if instr.args else instr.dtype
