"""Simplify iteration domains: axes in memory order, neighbours that are walked together merged into one.

Called by ``kernels.py`` on each finished body, so that backends see few axes and unit strides last.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

from tracejit.program import Access, Contract, Instr, LoopBody


def accesses(body: LoopBody) -> list[Access]:
    """All addresses of a body, random counters included."""
    out = []
    for i in body.instrs:
        if i.op in ("load", "store"):
            out.append(i.attrs["access"])
        elif i.op == "random_bits":
            out.append(Access(-1, i.attrs["strides"]))
    return out


def rewrite(body: LoopBody, groups: Sequence[Sequence[int]]) -> LoopBody:
    """The body with each group of old axes (outer to inner, walked together) as one new axis."""
    to_new = {a: i for i, g in enumerate(groups) for a in g}
    inner = [g[-1] for g in groups]
    same = [list(g) for g in groups] == [[a] for a in range(len(body.domain))]
    if same:
        return LoopBody(
            body.domain,
            tuple(Instr(*i) if isinstance(i, tuple) else i for i in body.instrs),
            body.reduce_axes,
        )
    axes_of: dict[tuple[int, ...], tuple[int, ...]] = {}

    def strides(old: Sequence[int]) -> tuple[int, ...]:
        return tuple(old[a] for a in inner)

    out = []
    for i in body.instrs:
        attrs: Any = i.attrs
        if attrs:
            if i.op in ("load", "store"):
                old: Access = attrs["access"]
                attrs = {**attrs, "access": Access(old.buffer, strides(old.strides), old.offset)}
            elif i.op == "random_bits":
                attrs = {**attrs, "strides": strides(attrs["strides"])}
            elif i.op == "index":
                attrs = {"axis": to_new[attrs["axis"]]}
        axes = axes_of.get(i.axes)
        if axes is None:
            axes = axes_of[i.axes] = tuple(sorted({to_new[a] for a in i.axes if a in to_new}))
        out.append(Instr(i.op, i.args, i.dtype, axes, attrs, i.node))
    domain = tuple(prod(body.domain[a] for a in g) for g in groups)
    reduce_axes = tuple(sorted({to_new[a] for a in body.reduce_axes if a in to_new}))
    return LoopBody(domain, tuple(out), reduce_axes)


def mergeable(strides: Sequence[Sequence[int]], domain: Sequence[int], outer: int, inner: int) -> bool:
    """True if stepping ``outer`` once equals stepping ``inner`` through its whole size, for every address."""
    n = domain[inner]
    return all(s[outer] == s[inner] * n for s in strides)


def grouped(
    order: Sequence[int],
    domain: Sequence[int],
    strides: Sequence[Sequence[int]],
    fixed: set[int],
    red: set[int],
) -> list[list[int]]:
    """Runs of ``order`` that can be merged; axes in ``fixed`` are used by position and stay alone."""
    groups: list[list[int]] = []
    for a in order:
        last = groups[-1][-1] if groups else -1
        if (
            groups
            and last not in fixed
            and a not in fixed
            and (last in red) == (a in red)
            and mergeable(strides, domain, last, a)
        ):
            groups[-1].append(a)
        else:
            groups.append([a])
    return groups


def coalesce(body: LoopBody) -> LoopBody:
    """Order the axes by memory and merge what can be merged."""
    rank = len(body.domain)
    if rank == 0:
        return rewrite(body, [])
    all_strides = [a.strides for a in accesses(body)]
    fixed = {i.attrs["axis"] for i in body.instrs if i.op == "index"}
    red = set(body.reduce_axes)
    order = memory_order(body, red)
    groups = grouped(order, body.domain, all_strides, fixed, red)
    return rewrite(body, groups)


def memory_order(body: LoopBody, red: set[int]) -> list[int]:
    """Axes from the largest stride to the smallest of the address that matters most."""
    rank = len(body.domain)
    best: Sequence[int] | None = None
    score = (-1, -1, -1)
    for i in body.instrs:
        if i.op in ("load", "store") and "gather" not in i.attrs:
            s = i.attrs["access"].strides
            points = prod(n for n, x in zip(body.domain, s, strict=True) if x)
            now = (points, int(i.op == "store"), int(1 in s))
            if now > score:
                best, score = s, now
    if best is None:
        return list(range(rank))
    reach = [max((abs(a.strides[d]) for a in accesses(body)), default=0) for d in range(rank)]
    order = sorted(range(rank), key=lambda d: (-abs(best[d]) if best[d] else -reach[d], d))
    if any(i.op == "reduce" and i.attrs["kind"] in ("argmax", "argmin") for i in body.instrs):
        inside = iter(sorted(red))  # positions count through the reduce axes in their own order
        order = [next(inside) if d in red else d for d in order]
    return order


def coalesce_contract(c: Contract) -> Contract:
    """Merge axes within batch, m, n and k for both operands and the epilogue together."""
    sizes = [*c.batch, *c.m, *c.n, *c.k]
    bounds = [0, len(c.batch), len(c.batch) + len(c.m), len(c.batch) + len(c.m) + len(c.n), len(sizes)]
    free = bounds[3]
    epilogue = [a.strides for a in accesses(c.epilogue)]
    operands = [c.a.strides, c.b.strides]
    outer = [(*s, *(0,) * (len(sizes) - free)) for s in epilogue] + [tuple(s) for s in operands]
    fixed = {i.attrs["axis"] for i in c.epilogue.instrs if i.op == "index"}
    kinds: list[list[list[int]]] = []
    for g in range(4):
        axes = list(range(bounds[g], bounds[g + 1]))
        if g == 3:
            axes.sort(key=lambda d: (-abs(c.a.strides[d]), d))
        kinds.append(grouped(axes, sizes, outer if g < 3 else operands, fixed, set()))
    flat = [g for kind in kinds for g in kind]

    def pick(a: Access) -> Access:
        return Access(a.buffer, tuple(a.strides[g[-1]] for g in flat), a.offset)

    def size(kind: list[list[int]]) -> tuple[int, ...]:
        return tuple(prod(sizes[a] for a in g) for g in kind)

    body = rewrite(c.epilogue, [g for kind in kinds[:3] for g in kind])
    return Contract(
        size(kinds[0]),
        size(kinds[1]),
        size(kinds[2]),
        size(kinds[3]),
        pick(c.a),
        pick(c.b),
        body,
        c.acc_dtype,
    )
