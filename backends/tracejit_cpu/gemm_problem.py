"""Matrix products before code: axes merged and padded, transposed where that suits the result, or turned into a loop.

``gemm.py`` and ``compiler.py`` call these on a :class:`tracejit.program.Contract`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from tracejit.program import Access, Contract, Instr, LoopBody


def as_loop(c: Contract, dtype_of: Callable[[int], np.dtype]) -> LoopBody:
    """The same product as a loop body with a sum over the contracted axes."""
    free = len(c.batch) + len(c.m) + len(c.n)
    domain = (*c.batch, *c.m, *c.n, *c.k)
    red = tuple(range(free, len(domain)))

    def varies(access: Access) -> tuple[int, ...]:
        return tuple(i for i, s in enumerate(access.strides) if s)

    acc = np.dtype(np.int32) if c.acc_dtype.kind == "b" else c.acc_dtype
    instrs: list[Instr] = []
    for access in (c.a, c.b):
        instrs.append(Instr("load", (), dtype_of(access.buffer), varies(access), {"access": access}))
    both = tuple(sorted({*instrs[0].axes, *instrs[1].axes}))
    instrs.append(Instr("convert", (0,), acc, instrs[0].axes, {"dtype": acc}))
    instrs.append(Instr("convert", (1,), acc, instrs[1].axes, {"dtype": acc}))
    instrs.append(Instr("mul", (2, 3), acc, both))
    kept = tuple(a for a in both if a < free)
    instrs.append(Instr("reduce", (4,), acc, kept, {"kind": "sum"}))
    instrs.append(Instr("convert", (5,), c.acc_dtype, kept, {"dtype": c.acc_dtype}))
    result = 6
    places: list[int] = []
    for ins in c.epilogue.instrs:
        if ins.op == "acc":
            places.append(result)
            continue
        attrs = dict(ins.attrs)
        if "access" in attrs:
            a = attrs["access"]
            attrs["access"] = Access(a.buffer, (*a.strides, *(0,) * len(c.k)), a.offset)
        if "strides" in attrs:
            attrs["strides"] = (*attrs["strides"], *(0,) * len(c.k))
        if "gather" in attrs:
            attrs["gather"] = tuple((places[p], s, n) for p, s, n in attrs["gather"])
        if attrs.get("predicate") is not None:
            attrs["predicate"] = places[attrs["predicate"]]
        places.append(len(instrs))
        instrs.append(Instr(ins.op, tuple(places[a] for a in ins.args), ins.dtype, ins.axes, attrs, ins.node))
    return LoopBody(domain, tuple(instrs), red)


@dataclass
class Operand:
    """One matrix of a product: local buffer number, element strides along (row, k), batch strides, offset."""

    buffer: int
    dtype: np.dtype
    free: int
    k: int
    batch: list[int]
    offset: int
    ktable: np.ndarray | None = None
    packed: int | None = None  # temporary that holds the packed panels


@dataclass
class Problem:
    """A contraction on merged axes: batch sizes, one row axis, one column axis, one k axis (or offset tables)."""

    batch: list[int]
    m: int
    n: int
    k: int
    a: Operand
    b: Operand
    epilogue: LoopBody
    groups: list[list[int]]


def pad_axes(c: Contract) -> Contract:
    """Give the product at least one row, column and k axis."""
    batch, m, n, k = c.batch, c.m or (1,), c.n or (1,), c.k or (1,)
    at_m = len(c.batch)
    at_n = at_m + len(m)

    def stretch(strides: Sequence[int], with_k: bool) -> tuple[int, ...]:
        s = list(strides)
        if not c.m:
            s.insert(at_m, 0)
        if not c.n:
            s.insert(at_n, 0)
        if with_k and not c.k:
            s.append(0)
        return tuple(s)

    if (m, n, k) == (c.m, c.n, c.k):
        return c
    instrs = []
    for ins in c.epilogue.instrs:
        attrs = dict(ins.attrs)
        if "access" in attrs:
            x = attrs["access"]
            attrs["access"] = Access(x.buffer, stretch(x.strides, False), x.offset)
        if "strides" in attrs:
            attrs["strides"] = stretch(attrs["strides"], False)
        if ins.op == "index":
            axis = attrs["axis"]
            attrs["axis"] = axis + (not c.m and axis >= at_m) + (not c.n and axis + (not c.m) >= at_n)
        instrs.append(Instr(ins.op, ins.args, ins.dtype, ins.axes, attrs, ins.node))
    epilogue = LoopBody((*batch, *m, *n), tuple(instrs))
    a = Access(c.a.buffer, stretch(c.a.strides, True), c.a.offset)
    b = Access(c.b.buffer, stretch(c.b.strides, True), c.b.offset)
    return Contract(batch, m, n, k, a, b, epilogue, c.acc_dtype)


def _runs(
    axes: Sequence[int], sizes: Sequence[int], rows: Sequence[Sequence[int]], split: set[int]
) -> list[list[int]]:
    """Merge adjacent axes along which every access in ``rows`` is linear; axes of size 1 vanish."""
    groups: list[list[int]] = []
    for axis in axes:
        if sizes[axis] == 1:
            continue
        if groups and not ({axis, groups[-1][-1]} & split):
            last = groups[-1][-1]
            if all(r[last] == r[axis] * sizes[axis] for r in rows):
                groups[-1].append(axis)
                continue
        groups.append([axis])
    return groups


def simplify(c: Contract, dtype_of: Callable[[int], np.dtype]) -> Problem:
    """Merge axes; extra row and column axes become batch axes; extra k axes become offset tables."""
    sizes = [*c.batch, *c.m, *c.n, *c.k]
    nb, nm, nn = len(c.batch), len(c.m), len(c.n)
    epi = [
        tuple(i.attrs["access"].strides) + (0,) * len(c.k) for i in c.epilogue.instrs if "access" in i.attrs
    ]
    epi += [tuple(i.attrs["strides"]) + (0,) * len(c.k) for i in c.epilogue.instrs if i.op == "random_bits"]
    indexed = {i.attrs["axis"] for i in c.epilogue.instrs if i.op == "index"}
    a, b = c.a.strides, c.b.strides
    batch = _runs(range(nb), sizes, [*epi, a, b], indexed)
    ms = _runs(range(nb, nb + nm), sizes, [*epi, a], indexed) or [[nb]]
    ns = _runs(range(nb + nm, nb + nm + nn), sizes, [*epi, b], indexed) or [[nb + nm]]
    ks = _runs(range(nb + nm + nn, len(sizes)), sizes, [a, b], set()) or [[len(sizes) - 1]]

    def size(g: list[int]) -> int:
        return math.prod(sizes[x] for x in g)

    m = max(ms, key=size) if size(ms[-1]) < 16 else ms[-1]
    n = max(ns, key=size) if size(ns[-1]) < 8 else ns[-1]
    batch += [g for g in ms if g is not m] + [g for g in ns if g is not n]
    total_k = math.prod(size(g) for g in ks)

    def operand(access: Access, free: list[int], number: int) -> Operand:
        s = access.strides
        table = None
        stride = s[ks[0][-1]]
        if len(ks) > 1:
            table = np.array(
                [
                    sum(i * s[g[-1]] for i, g in zip(p, ks))
                    for p in itertools.product(*(range(size(g)) for g in ks))
                ],
                np.int64,
            )
        return Operand(
            number,
            dtype_of(access.buffer),
            s[free[-1]],
            stride,
            [s[g[-1]] for g in batch],
            access.offset,
            table,
        )

    return Problem(
        [size(g) for g in batch],
        size(m),
        size(n),
        total_k,
        operand(c.a, m, -1),
        operand(c.b, n, -2),
        c.epilogue,
        [*batch, m, n],
    )


def swap(c: Contract) -> Contract:
    """The transposed problem: rows and columns change places."""
    nb, nm, nn = len(c.batch), len(c.m), len(c.n)
    order = [*range(nb), *range(nb + nm, nb + nm + nn), *range(nb, nb + nm)]
    full = [*order, *range(nb + nm + nn, nb + nm + nn + len(c.k))]
    where = {old: new for new, old in enumerate(order)}
    instrs = []
    for ins in c.epilogue.instrs:
        attrs = dict(ins.attrs)
        if "access" in attrs:
            x = attrs["access"]
            attrs["access"] = Access(x.buffer, tuple(x.strides[o] for o in order), x.offset)
        if "strides" in attrs:
            attrs["strides"] = tuple(attrs["strides"][o] for o in order)
        if ins.op == "index":
            attrs["axis"] = where[attrs["axis"]]
        instrs.append(
            Instr(ins.op, ins.args, ins.dtype, tuple(sorted(where[a] for a in ins.axes)), attrs, ins.node)
        )
    domain = tuple(c.epilogue.domain[o] for o in order)
    a = Access(c.b.buffer, tuple(c.b.strides[o] for o in full), c.b.offset)
    b = Access(c.a.buffer, tuple(c.a.strides[o] for o in full), c.a.offset)
    return Contract(c.batch, c.n, c.m, c.k, a, b, LoopBody(domain, tuple(instrs)), c.acc_dtype)


def prefers_loop(c: Contract) -> bool:
    """Products that the loop compiler does better: vectors, outer products, integers, empty ones."""
    m, n, k = (math.prod(x) for x in (c.m, c.n, c.k))
    if c.acc_dtype.name not in ("float32", "float64"):
        return True
    return m <= 1 or n <= 1 or k <= 1 or math.prod(c.batch) * m * n == 0


def wants_swap(c: Contract) -> bool:
    """True if results are contiguous along the rows and not along the columns."""
    nb, nm = len(c.batch), len(c.m)
    score = 0
    for ins in c.epilogue.instrs:
        if ins.op == "store":
            s = ins.attrs["access"].strides
            last_m = next((s[a] for a in range(nb + nm - 1, nb - 1, -1) if c.epilogue.domain[a] > 1), 0)
            last_n = next((s[a] for a in range(len(s) - 1, nb + nm - 1, -1) if c.epilogue.domain[a] > 1), 0)
            score += (last_m == 1) - (last_n == 1)
    return score > 0
