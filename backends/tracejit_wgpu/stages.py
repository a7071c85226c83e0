"""Multi-stage reductions: a body whose few rows are very long becomes bodies over ranges, sums of partials, and the rest.

Pure LoopBody -> LoopBody functions, called by ``loops.py``. Partials lie in scratch buffers as ``[part, point]``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import prod

import numpy as np

from tracejit.program import Access, Instr, LoopBody
from tracejit_wgpu import body as bodies
from tracejit_wgpu.emit import Tables


def _parallel(body: LoopBody) -> list[int]:
    return [a for a in range(len(body.domain)) if a not in body.reduce_axes]


def _point_strides(body: LoopBody) -> tuple[int, ...]:
    """Row-major strides over the parallel axes, 0 along the reduce axes."""
    strides = [0] * len(body.domain)
    step = 1
    for axis in reversed(_parallel(body)):
        strides[axis] = step
        step *= body.domain[axis]
    return tuple(strides)


def _load(buffer: int, strides: tuple[int, ...], dtype: np.dtype) -> Instr:
    return Instr("load", (), dtype, (), {"access": Access(buffer, strides)})


class _Builder:
    """Copies instructions of a body on demand, with reductions that are done replaced by loads of their results."""

    def __init__(self, body: LoopBody, done: Mapping[int, int], shift: int) -> None:
        self.body, self.done, self.shift = body, done, shift
        self.out: list[Instr] = []
        self.map: dict[int, int] = {}

    def add(self, instr: Instr) -> int:
        self.out.append(instr)
        return len(self.out) - 1

    def copy(self, position: int) -> int:
        """Position in the new body of an old instruction (its operands are copied first)."""
        if position in self.map:
            return self.map[position]
        instr = self.body.instrs[position]
        pad = (0,) * self.shift
        if instr.op == "reduce" and position in self.done:
            new = _load(self.done[position], pad + _point_strides(self.body), instr.dtype)
            self.map[position] = self.add(new)
            return self.map[position]
        attrs = dict(instr.attrs)
        args = tuple(self.copy(p) for p in instr.args)
        if "gather" in attrs:
            attrs["gather"] = tuple((self.copy(p), s, n) for p, s, n in attrs["gather"])
        if instr.op == "load" and attrs.get("predicate") is not None:
            attrs["predicate"] = self.copy(attrs["predicate"])
        if attrs.get("index_arg") is not None:
            attrs["index_arg"] = self.copy(attrs["index_arg"])
        if "access" in attrs:
            attrs["access"] = replace(attrs["access"], strides=pad + attrs["access"].strides)
        if instr.op == "random_bits":
            attrs["strides"] = pad + tuple(attrs["strides"])
        if instr.op == "index":
            attrs["axis"] += self.shift
        self.map[position] = self.add(replace(instr, args=args, attrs=attrs))
        return self.map[position]


def _reduces(body: LoopBody, level: int) -> list[int]:
    levels = bodies.levels(body)
    return [p for p, i in enumerate(body.instrs) if i.op == "reduce" and levels[p] == level]


def partial_body(
    body: LoopBody, level: int, parts: int, done: Mapping[int, int], tables: Tables
) -> tuple[LoopBody, dict[int, tuple[int, int | None]]]:
    """The reductions of one level over ``parts`` ranges (a new parallel axis 0, which the emitter turns into ranges)."""
    builder = _Builder(body, done, 1)
    points = prod(body.domain[a] for a in _parallel(body))
    strides = (points, *_point_strides(body))
    where: dict[int, tuple[int, int | None]] = {}

    def keep(position: int, dtype: np.dtype) -> int:
        scratch = tables.scratch(parts * points, dtype)
        builder.add(Instr("store", (position,), dtype, (), {"access": Access(scratch, strides)}))
        return scratch

    for p in _reduces(body, level):
        instr = body.instrs[p]
        new = builder.copy(p)
        if instr.attrs["kind"].startswith("arg"):
            arg = builder.map[instr.args[0]]
            value = builder.add(
                replace(
                    instr,
                    op="reduce",
                    args=(arg,),
                    dtype=builder.out[arg].dtype,
                    attrs={"kind": instr.attrs["kind"][3:]},
                )
            )
            where[p] = (keep(value, builder.out[arg].dtype), keep(new, instr.dtype))
        else:
            where[p] = (keep(new, instr.dtype), None)
    made = LoopBody((parts, *body.domain), tuple(builder.out), tuple(a + 1 for a in body.reduce_axes))
    return bodies.with_axes(made), where


def sum_body(
    body: LoopBody,
    level: int,
    parts: int,
    where: Mapping[int, tuple[int, int | None]],
    done: dict[int, int],
    tables: Tables,
    *,
    finish: bool,
) -> LoopBody:
    """Combine the partials. With ``finish`` also the row-level rest of the body; otherwise results go to scratch."""
    axes = _parallel(body)
    points = prod(body.domain[a] for a in axes)
    point = _point_strides(body)
    domain = (*(body.domain[a] for a in axes), parts)
    strides = (*(point[a] for a in axes), points)
    out: list[Instr] = []
    made: dict[int, int] = {}

    def add(instr: Instr) -> int:
        out.append(instr)
        return len(out) - 1

    for p, (values, indices) in where.items():
        instr = body.instrs[p]
        dtype = tables.dtype(values)
        value = add(_load(values, strides, dtype))
        attrs = dict(instr.attrs)
        attrs.pop("index_arg", None)
        if indices is not None:
            attrs["index_arg"] = add(_load(indices, strides, tables.dtype(indices)))
        made[p] = add(Instr("reduce", (value,), instr.dtype, (), attrs))
        if not finish:
            done[p] = tables.scratch(points, instr.dtype)
            add(
                Instr(
                    "store",
                    (made[p],),
                    instr.dtype,
                    (),
                    {"access": Access(done[p], (*(point[a] for a in axes), 0))},
                )
            )
    if finish:

        def copy(position: int) -> int:
            if position in made:
                return made[position]
            instr = body.instrs[position]
            attrs = dict(instr.attrs)
            args = tuple(copy(q) for q in instr.args)
            if "gather" in attrs:
                attrs["gather"] = tuple((copy(q), s, n) for q, s, n in attrs["gather"])
            if instr.op == "load" and attrs.get("predicate") is not None:
                attrs["predicate"] = copy(attrs["predicate"])
            if "access" in attrs:
                old = attrs["access"]
                attrs["access"] = replace(old, strides=(*(old.strides[a] for a in axes), 0))
            if instr.op == "random_bits":
                attrs["strides"] = (*(attrs["strides"][a] for a in axes), 0)
            if instr.op == "index":
                attrs["axis"] = axes.index(attrs["axis"])
            made[position] = add(replace(instr, args=args, attrs=attrs))
            return made[position]

        for p, instr in enumerate(body.instrs):
            if instr.op == "store":
                copy(p)
    return bodies.with_axes(LoopBody(domain, tuple(out), (len(axes),)))


def final_body(body: LoopBody, done: Mapping[int, int]) -> list[LoopBody]:
    """What remains once every reduction's result lies in scratch: element stores, and row stores as a body of their own."""
    out: list[LoopBody] = []
    stores = [p for p, i in enumerate(body.instrs) if i.op == "store"]
    along = [p for p in stores if any(body.instrs[p].attrs["access"].strides[a] for a in body.reduce_axes)]
    rows = [p for p in stores if p not in along]
    if along:
        builder = _Builder(body, done, 0)
        for p in along:
            builder.copy(p)
        out.append(bodies.with_axes(LoopBody(body.domain, tuple(builder.out), ())))
    if rows:
        builder = _Builder(body, done, 0)
        for p in rows:
            builder.copy(p)
        domain = tuple(1 if a in body.reduce_axes else s for a, s in enumerate(body.domain))
        out.append(bodies.with_axes(LoopBody(domain, tuple(builder.out), ())))
    return out
