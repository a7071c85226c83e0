"""Sorting and running totals along an axis: sort, argsort, cumsum, cumprod.

Recorded by ``functions/ordering.py``, the random permutation and gradient rules.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tracejit.dtypes import INT64, DType
from tracejit.errors import DTypeError, ShapeError
from tracejit.ops import registry
from tracejit.ops.indexing import take_along_axis
from tracejit.ops.registry import NONDIFFERENTIABLE, HasAval, Op, define
from tracejit.ops.shape import concatenate, filled, flip, pad, slice_

Aval = tuple[tuple[int, ...], DType]


def _check_axis(op: str, x: HasAval, axis: int) -> None:
    if not 0 <= axis < len(x.shape):
        raise ShapeError.make(f"axis {axis} does not exist", op=op, got={"x": x})


# -- sort, argsort ---------------------------------------------------------------------------------


def _sort_infer(x: HasAval, *, axis: int) -> Aval:
    _check_axis("sort", x, axis)
    return x.shape, x.dtype


def _argsort_infer(x: HasAval, *, axis: int) -> Aval:
    _check_axis("argsort", x, axis)
    return x.shape, INT64


argsort: Op = define(
    "argsort",
    arity=1,
    infer=_argsort_infer,
    reference=lambda x, *, axis: np.argsort(x, axis=axis, kind="stable"),
    vjp=NONDIFFERENTIABLE,
    category="sort",
    meaning="The positions that sort each row ascending; equal elements keep their order, NaN goes last.",
    formula="x[y₀] ≤ x[y₁] ≤ …, stable",
    shape_rule="same as the operand; int64",
    samples=lambda: [
        ((np.array([3.0, 1.0, 2.0, 1.0]),), {"axis": 0}),
        ((np.array([[2.0, np.nan, -1.0], [0.0, 0.0, -0.0]]),), {"axis": 1}),
    ],
    attrs={"axis": "int"},
)


def _sort_vjp(g: Any, y: Any, x: Any, *, axis: int) -> list[Any]:
    # The rank of each element is the inverse permutation: a gather instead of a scatter.
    rank = argsort(argsort(x, axis=axis), axis=axis)
    return [take_along_axis(g, rank, axis=axis)]


sort: Op = define(
    "sort",
    arity=1,
    infer=_sort_infer,
    reference=lambda x, *, axis: np.sort(x, axis=axis, kind="stable"),
    vjp=_sort_vjp,
    category="sort",
    meaning="Each row in ascending order; NaN goes last.",
    formula="y₀ ≤ y₁ ≤ …, a permutation of x",
    shape_rule="same as the operand",
    grad_rule="dx = g taken at the rank of each element",
    samples=lambda: [
        ((np.array([3.0, 1.0, 2.0]),), {"axis": 0}),
        ((np.array([[2.0, 5.0, -1.0], [0.5, 0.0, -2.0]]),), {"axis": 0}),
    ],
    attrs={"axis": "int"},
)

# -- cumsum, cumprod -------------------------------------------------------------------------------


def _cumulative_infer(op: str) -> Any:
    def infer(x: HasAval, *, axis: int, reverse: bool) -> Aval:
        _check_axis(op, x, axis)
        if x.dtype.kind == "b":
            raise DTypeError.make("booleans must be converted to integers first", op=op, got={"x": x})
        return x.shape, x.dtype

    return infer


def _cumulative_reference(function: np.ufunc) -> Any:
    def reference(x: np.ndarray, *, axis: int, reverse: bool) -> np.ndarray:
        if reverse:
            x = np.flip(x, axis)
        out = function.accumulate(x, axis=axis, dtype=x.dtype)
        return np.flip(out, axis) if reverse else out

    return reference


cumsum: Op = define(
    "cumsum",
    arity=1,
    infer=_cumulative_infer("cumsum"),
    reference=_cumulative_reference(np.add),
    vjp=lambda g, y, x, *, axis, reverse: [cumsum(g, axis=axis, reverse=not reverse)],
    category="sort",
    meaning="The running sum along an axis, from the start or (reverse) from the end.",
    formula="yᵢ = Σ_{k≤i} xₖ   (reverse: Σ_{k≥i} xₖ)",
    shape_rule="same as the operand",
    grad_rule="dx = cumsum(g) in the other direction",
    samples=lambda: [
        ((np.array([1.0, 2.0, 3.0]),), {"axis": 0, "reverse": False}),
        ((np.arange(6.0).reshape(2, 3),), {"axis": 1, "reverse": True}),
    ],
    attrs={"axis": "int", "reverse": "bool"},
)


def _shifted(x: Any, axis: int, by: int, fill: float) -> Any:
    """``y[i] = x[i + by]`` along ``axis``, ``fill`` where that is outside; ``by`` may be negative."""
    n, ndim = x.shape[axis], len(x.shape)
    lead, trail = max(by, 0), max(-by, 0)
    start = tuple(lead if i == axis else 0 for i in range(ndim))
    stop = tuple(n - trail if i == axis else s for i, s in enumerate(x.shape))
    kept = slice_(x, start=start, stop=stop, step=(1,) * ndim)
    low = tuple(trail if i == axis else 0 for i in range(ndim))
    high = tuple(lead if i == axis else 0 for i in range(ndim))
    return pad(kept, low=low, high=high, interior=(0,) * ndim, value=fill)


def _cumprod_vjp(g: Any, y: Any, x: Any, *, axis: int, reverse: bool) -> list[Any]:
    """No division, so zeros are right: dxⱼ = Pⱼ Sⱼ with Pⱼ = Π_{k<j} xₖ and Sⱼ = gⱼ + xⱼ₊₁ Sⱼ₊₁.

    The linear recurrence S is solved by doubling (Hillis & Steele 1986): log₂ n elementwise steps.
    """
    if reverse:
        x, g = flip(x, axes=(axis,)), flip(g, axes=(axis,))
    n, ndim = x.shape[axis], len(x.shape)
    if n == 0:
        return [g]
    mul, add = registry.get("mul"), registry.get("add")
    one_row = tuple(1 if i == axis else s for i, s in enumerate(x.shape))
    head = slice_(
        x,
        start=(0,) * ndim,
        stop=tuple(n - 1 if i == axis else s for i, s in enumerate(x.shape)),
        step=(1,) * ndim,
    )
    before = concatenate(filled(1, one_row, x.dtype), cumprod(head, axis=axis, reverse=False), axis=axis)
    factor, total, step = _shifted(x, axis, 1, 0.0), g, 1
    while step < n:
        total = add(total, mul(factor, _shifted(total, axis, step, 0.0)))
        factor = mul(factor, _shifted(factor, axis, step, 0.0))
        step *= 2
    dx = mul(before, total)
    return [flip(dx, axes=(axis,)) if reverse else dx]


cumprod: Op = define(
    "cumprod",
    arity=1,
    infer=_cumulative_infer("cumprod"),
    reference=_cumulative_reference(np.multiply),
    vjp=_cumprod_vjp,
    category="sort",
    meaning="The running product along an axis, from the start or (reverse) from the end.",
    formula="yᵢ = Π_{k≤i} xₖ   (reverse: Π_{k≥i} xₖ)",
    shape_rule="same as the operand",
    grad_rule="dxⱼ = Σ_{i≥j} gᵢ Π_{k≤i, k≠j} xₖ, without division, so exact where x is zero",
    samples=lambda: [
        ((np.array([1.5, 2.0, 0.5]),), {"axis": 0, "reverse": False}),
        ((np.array([[2.0, 0.0, 3.0], [0.0, 0.0, 1.0]]),), {"axis": 1, "reverse": True}),
    ],
    attrs={"axis": "int", "reverse": "bool"},
)
