"""Index maps: where, in each operand, the element lies that a point of an iteration domain needs.

An affine expression is a plain tuple ``(offset, terms, dynamic)``: ``terms`` are ``(axis, stride)`` pairs over the axis
ids of a cluster's domain, ``dynamic`` are ``(index value, its map, stride, size)`` for gathers. A map is a tuple
``(exprs, predicates, flat)``: one expression per axis of the value (or, if ``flat``, one for its row-major position);
``predicates`` are ``(expr, low, high)`` that must hold (``low <= expr < high``) for the element to exist (``pad``).
Plain tuples, because they are made and hashed tens of thousands of times per lowering.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, TypeAlias

Expr: TypeAlias = tuple[int, tuple[tuple[int, int], ...], tuple[Any, ...]]
Map: TypeAlias = tuple[tuple[Expr, ...], tuple[Any, ...], bool]

ZERO: Expr = (0, (), ())
SCALAR: Map = ((), (), False)


class Split(Exception):
    """The domain axis must be split into (outer, ``inner``) for a reshape to stay affine."""

    def __init__(self, axis: int, inner: int) -> None:
        super().__init__(axis, inner)
        self.axis = axis
        self.inner = inner


def var(axis: int) -> Expr:
    """The expression that is just one axis."""
    return (0, ((axis, 1),), ())


def shift(e: Expr, by: int) -> Expr:
    """``e + by``."""
    return (e[0] + by, e[1], e[2]) if by else e


def scale(e: Expr, by: int) -> Expr:
    """``e * by``."""
    if by == 1:
        return e
    return (e[0] * by, tuple((a, s * by) for a, s in e[1]), tuple((v, m, s * by, n) for v, m, s, n in e[2]))


def add(e: Expr, f: Expr) -> Expr:
    """``e + f``."""
    if not f[1] and not f[2]:
        return shift(e, f[0])
    if not e[1] and not e[2]:
        return shift(f, e[0])
    terms = dict(e[1])
    for a, s in f[1]:
        terms[a] = terms.get(a, 0) + s
    return (e[0] + f[0], tuple(sorted((a, s) for a, s in terms.items() if s)), e[2] + f[2])


def linear(exprs: Sequence[Expr], shape: Sequence[int]) -> Expr:
    """The row-major position of an index."""
    total: Expr = ZERO
    stride = 1
    for e, n in zip(reversed(exprs), reversed(shape), strict=True):
        if n != 1:
            total = add(total, scale(e, stride))
        stride *= n
    return total


def bounds(e: Expr, sizes: Mapping[int, int]) -> tuple[int, int]:
    """The smallest and largest value of an expression."""
    low = high = e[0]
    for a, s in e[1]:
        reach = s * (sizes[a] - 1)
        if reach >= 0:
            high += reach
        else:
            low += reach
    for _, _, s, n in e[2]:
        high += s * (n - 1)
    return low, high


def delinearize(e: Expr, dims: Sequence[int], sizes: Mapping[int, int]) -> list[Expr] | None:
    """The index over ``dims`` of row-major position ``e``; None if it is not affine. May raise :class:`Split`."""
    out: list[Expr] = []
    rest = e
    for n in reversed(dims[1:]):
        if n == 1:
            out.append(ZERO)
            continue
        if rest[2]:
            return None
        quotient: list[tuple[int, int]] = []
        remainder: list[tuple[int, int]] = []
        q0, r0 = divmod(rest[0], n)
        top = r0
        for a, s in rest[1]:
            if s % n == 0:
                quotient.append((a, s // n))
            elif s > 0 and s * (sizes[a] - 1) < n:
                remainder.append((a, s))
                top += s * (sizes[a] - 1)
            elif s > 0 and n % s == 0 and sizes[a] % (n // s) == 0:
                raise Split(a, n // s)
            else:
                return None
        if top >= n:
            return None
        out.append((r0, tuple(remainder), ()))
        rest = (q0, tuple(quotient), ())
    out.append(rest)
    out.reverse()
    return out


def reshape_groups(a: Sequence[int], b: Sequence[int]) -> list[tuple[int, int, int, int]]:
    """Split two shapes of equal size into the smallest runs ``a[i0:i1]``, ``b[j0:j1]`` of equal size."""
    groups = []
    i = j = 0
    while i < len(a) or j < len(b):
        i0, j0 = i, j
        x = a[i] if i < len(a) else 1
        y = b[j] if j < len(b) else 1
        i, j = min(i + 1, len(a)), min(j + 1, len(b))
        while x != y:
            if x < y:
                x *= a[i]
                i += 1
            else:
                y *= b[j]
                j += 1
        groups.append((i0, i, j0, j))
    return groups


def through_reshape(
    exprs: Sequence[Expr], out: Sequence[int], into: Sequence[int], sizes: Mapping[int, int]
) -> Map | None:
    """Index over ``into`` for an index over ``out``, both shapes of one array; a flat map if it must be; may Split."""
    result: list[Expr] = []
    if 0 in out:
        return None
    for i0, i1, j0, j1 in reshape_groups(into, out):
        dims = into[i0:i1]
        if not dims:
            continue
        e = linear(exprs[j0:j1], out[j0:j1])
        if len(dims) == 1:
            result.append(e)
            continue
        lead = 0
        while lead < len(dims) - 1 and dims[lead] == 1:
            lead += 1
        parts = delinearize(e, dims[lead:], sizes)
        if parts is None:
            return ((linear(exprs, out),), (), True)
        result.extend([ZERO] * lead)
        result.extend(parts)
    return (tuple(result), (), False)


def is_bijection(
    exprs: Sequence[Expr], axes: Sequence[int], sizes: Mapping[int, int], shape: Sequence[int]
) -> bool:
    """True if the points over ``axes`` and the elements of ``shape`` correspond one to one."""
    used: set[int] = set()
    for e, n in zip(exprs, shape, strict=True):
        if e[0] or e[2]:
            return False
        expected = 1
        for s, a in sorted((s, a) for a, s in e[1]):
            if s != expected or a in used:
                return False
            used.add(a)
            expected *= sizes[a]
        if expected != n:
            return False
    return used == set(axes)


def axes_of(m: Map) -> set[int]:
    """The domain axes that an index depends on, not looking into gathered indices."""
    return {a for e in m[0] for a, _ in e[1]}


def contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    """Row-major strides in elements."""
    out = [1] * len(shape)
    for i in range(len(shape) - 2, -1, -1):
        out[i] = out[i + 1] * shape[i + 1]
    return tuple(out)


def reshape_strides(
    shape: Sequence[int], strides: Sequence[int], new: Sequence[int]
) -> tuple[int, ...] | None:
    """Strides under which the same elements have the shape ``new`` (row-major equivalent), or None."""
    if 0 in shape:
        return contiguous(new)
    out: list[int] = []
    for i0, i1, j0, j1 in reshape_groups(shape, new):
        live = [(shape[i], strides[i]) for i in range(i0, i1) if shape[i] != 1]
        for (_, s), (n1, s1) in itertools.pairwise(live):
            if s != n1 * s1:
                return None
        step = live[-1][1] if live else 1
        tail: list[int] = []
        for n in reversed(new[j0:j1]):
            tail.append(step)
            step *= n
        out.extend(reversed(tail))
    return tuple(out)


def total(shape: Sequence[int]) -> int:
    """Number of elements."""
    return prod(shape)


def same_layout(shape: Sequence[int], a: Sequence[int], b: Sequence[int]) -> bool:
    """True if two stride tuples address the same elements; strides of axes of size one do not matter."""
    return all(n == 1 or x == y for n, x, y in zip(shape, a, b, strict=True))


def refinable(a: Sequence[int], b: Sequence[int]) -> bool:
    """True if axes of sizes ``a`` and of sizes ``b`` can be split so that both walk the same finer axes."""
    left, right = [n for n in a if n != 1], [n for n in b if n != 1]
    while left and right:
        x, y = left.pop(), right.pop()
        if x > y and x % y == 0:
            left.append(x // y)
        elif y > x and y % x == 0:
            right.append(y // x)
        elif x != y:
            return False
    return not left and not right
