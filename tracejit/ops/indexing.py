"""Gather and scatter: take, take_along_axis and their transposes scatter_add, scatter_add_along_axis.

Recorded by ``functions/indexing.py`` (integer-array indexing, embedding look-up) and by gradient rules.
Indices are int64; negative ones count from the end, and what is then still out of range is clipped to the
nearest element, so that no program can read or write outside an array. (Indices known while tracing are
checked before.)
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from tracejit.dtypes import INT64, DType
from tracejit.errors import DTypeError, IndexingError, ShapeError
from tracejit.ops import registry
from tracejit.ops.creation import iota
from tracejit.ops.registry import HasAval, Op, define
from tracejit.ops.shape import broadcast_to, filled

Shape = tuple[int, ...]
Aval = tuple[Shape, DType]


def _check(op: str, x: HasAval, idx: HasAval, axis: int) -> None:
    got = {"x": x, "indices": idx}
    if idx.dtype != INT64:
        raise DTypeError.make("indices must be int64", op=op, got=got)
    if not 0 <= axis < len(x.shape):
        raise ShapeError.make(f"axis {axis} does not exist", op=op, got=got)
    if x.shape[axis] == 0 and math.prod(idx.shape) > 0:
        raise IndexingError.make("cannot take from an axis of size zero", op=op, got=got)


def _wrapped(idx: np.ndarray, n: int) -> np.ndarray:
    """Indices within ``0 <= i < n``: negative ones from the end, then clipped."""
    return np.clip(np.where(idx < 0, idx + n, idx), 0, max(n - 1, 0))


def _wrapped_value(idx: Any, n: int) -> Any:
    """As :func:`_wrapped`, from recorded ops."""
    op = registry.get
    zero, size, last = (filled(v, idx.shape, INT64) for v in (0, n, max(n - 1, 0)))
    positive = op("where")(op("less")(idx, zero), op("add")(idx, size), idx)
    return op("minimum")(op("maximum")(positive, zero), last)


# -- take and scatter_add: whole sub-arrays --------------------------------------------------------


def _take_infer(x: HasAval, idx: HasAval, *, axis: int) -> Aval:
    _check("take", x, idx, axis)
    return (*x.shape[:axis], *idx.shape, *x.shape[axis + 1 :]), x.dtype


def _take_reference(x: np.ndarray, idx: np.ndarray, *, axis: int) -> np.ndarray:
    if idx.size == 0:
        return np.empty(_take_infer(x, idx, axis=axis)[0], x.dtype)
    return np.take(x, _wrapped(idx, x.shape[axis]), axis=axis)


take: Op = define(
    "take",
    arity=2,
    infer=_take_infer,
    reference=_take_reference,
    vjp=lambda g, y, x, idx, *, axis: [scatter_add(filled(0, x.shape, x.dtype), idx, g, axis=axis), None],
    category="gather",
    meaning="Sub-arrays picked by integer index along one axis (an embedding look-up).",
    formula="y[a…, j…, b…] = x[a…, idx[j…], b…]",
    shape_rule="the axis of x is replaced by the shape of idx",
    grad_rule="dx = scatter_add(0, idx, g)",
    samples=lambda: [
        ((np.arange(12.0).reshape(4, 3), np.array([[0, 3], [-1, 1]])), {"axis": 0}),
        ((np.arange(6.0).reshape(2, 3), np.array(2)), {"axis": 1}),
        ((np.arange(4.0), np.array([-9, 9])), {"axis": 0}),
    ],
    attrs={"axis": "int"},
)


def _scatter_add_infer(base: HasAval, idx: HasAval, upd: HasAval, *, axis: int) -> Aval:
    _check("scatter_add", base, idx, axis)
    expected = (*base.shape[:axis], *idx.shape, *base.shape[axis + 1 :])
    got = {"base": base, "indices": idx, "updates": upd}
    if tuple(upd.shape) != expected:
        raise ShapeError.make(f"the updates must have the shape {expected}", op="scatter_add", got=got)
    if upd.dtype != base.dtype:
        raise DTypeError.make("base and updates need one dtype", op="scatter_add", got=got)
    return base.shape, base.dtype


def _scatter_add_reference(base: np.ndarray, idx: np.ndarray, upd: np.ndarray, *, axis: int) -> np.ndarray:
    out = np.array(base, order="C")
    if idx.size == 0 or out.size == 0:
        return out
    flat = _wrapped(idx, base.shape[axis]).ravel()
    rows = np.moveaxis(out, axis, 0)
    lines = np.moveaxis(upd.reshape(*base.shape[:axis], flat.size, *base.shape[axis + 1 :]), axis, 0)
    # Rows grouped by target (stable, so sums keep the order of the updates) are added with one reduceat: far
    # faster than np.add.at for the wide rows of an embedding.
    order = np.argsort(flat, kind="stable")
    targets, starts = np.unique(flat[order], return_index=True)
    if rows.dtype == np.bool_:
        rows[targets] |= np.logical_or.reduceat(lines[order], starts, axis=0)
    else:
        rows[targets] += np.add.reduceat(lines[order], starts, axis=0, dtype=rows.dtype)
    return out


scatter_add: Op = define(
    "scatter_add",
    arity=3,
    infer=_scatter_add_infer,
    reference=_scatter_add_reference,
    vjp=lambda g, y, base, idx, upd, *, axis: [g, None, take(g, idx, axis=axis)],
    category="gather",
    meaning="Adds sub-arrays at integer positions along one axis; equal positions add up.",
    formula="y = base;  y[a…, idx[j…], b…] += upd[a…, j…, b…]",
    shape_rule="the shape of base",
    grad_rule="dbase = g,  dupd = take(g, idx)",
    samples=lambda: [
        ((np.zeros((4, 2)), np.array([1, 3, 1]), np.arange(6.0).reshape(3, 2)), {"axis": 0}),
        ((np.ones((2, 3)), np.array([[0, -1]]), np.arange(4.0).reshape(2, 1, 2)), {"axis": 1}),
    ],
    attrs={"axis": "int"},
)

# -- take_along_axis and scatter_add_along_axis: single elements -----------------------------------


def _same_but_axis(a: Shape, b: Shape, axis: int) -> bool:
    return len(a) == len(b) and all(i == axis or m == n for i, (m, n) in enumerate(zip(a, b, strict=True)))


def _take_along_axis_infer(x: HasAval, idx: HasAval, *, axis: int) -> Aval:
    _check("take_along_axis", x, idx, axis)
    if not _same_but_axis(x.shape, idx.shape, axis):
        raise ShapeError.make(
            f"array and indices must have equal sizes except along axis {axis}",
            op="take_along_axis",
            got={"x": x, "indices": idx},
        )
    return idx.shape, x.dtype


def _take_along_axis_reference(x: np.ndarray, idx: np.ndarray, *, axis: int) -> np.ndarray:
    if idx.size == 0:
        return np.empty(idx.shape, x.dtype)
    return np.take_along_axis(x, _wrapped(idx, x.shape[axis]), axis)


def _take_along_axis_vjp(g: Any, y: Any, x: Any, idx: Any, *, axis: int) -> list[Any]:
    zeros = filled(0, x.shape, x.dtype)
    if idx.shape[axis] == 1 and math.prod(x.shape) > 0:
        # One element per row: a comparison with the position fuses with its neighbours, a scatter would not.
        target = broadcast_to(_wrapped_value(idx, x.shape[axis]), shape=x.shape)
        hit = registry.get("equal")(iota(shape=x.shape, axis=axis, dtype=INT64), target)
        return [registry.get("where")(hit, broadcast_to(g, shape=x.shape), zeros), None]
    return [scatter_add_along_axis(zeros, idx, g, axis=axis), None]


take_along_axis: Op = define(
    "take_along_axis",
    arity=2,
    infer=_take_along_axis_infer,
    reference=_take_along_axis_reference,
    vjp=_take_along_axis_vjp,
    category="gather",
    meaning="One element per index, along one axis (the probability of each label).",
    formula="y[a…, j, b…] = x[a…, idx[a…, j, b…], b…]",
    shape_rule="the shape of idx, which equals that of x except along the axis",
    grad_rule="dx = g where the position equals idx (or scatter_add_along_axis), else 0",
    samples=lambda: [
        ((np.arange(6.0).reshape(2, 3), np.array([[2], [-3]])), {"axis": 1}),
        ((np.arange(6.0).reshape(3, 2), np.array([[2, 0], [0, 0], [2, 1], [1, 1]])), {"axis": 0}),
    ],
    attrs={"axis": "int"},
)


def _scatter_add_along_axis_infer(base: HasAval, idx: HasAval, upd: HasAval, *, axis: int) -> Aval:
    op = "scatter_add_along_axis"
    _check(op, base, idx, axis)
    got = {"base": base, "indices": idx, "updates": upd}
    if tuple(upd.shape) != tuple(idx.shape) or not _same_but_axis(base.shape, idx.shape, axis):
        raise ShapeError.make(
            f"indices and updates need the shape of base except along axis {axis}", op=op, got=got
        )
    if upd.dtype != base.dtype:
        raise DTypeError.make("base and updates need one dtype", op=op, got=got)
    return base.shape, base.dtype


def _scatter_add_along_axis_reference(
    base: np.ndarray, idx: np.ndarray, upd: np.ndarray, *, axis: int
) -> np.ndarray:
    out = np.array(base, order="C")
    if idx.size:
        where: list[np.ndarray] = list(np.ogrid[tuple(map(slice, idx.shape))])
        where[axis] = _wrapped(idx, base.shape[axis])
        np.add.at(out, tuple(where), upd)
    return out


scatter_add_along_axis: Op = define(
    "scatter_add_along_axis",
    arity=3,
    infer=_scatter_add_along_axis_infer,
    reference=_scatter_add_along_axis_reference,
    vjp=lambda g, y, base, idx, upd, *, axis: [g, None, take_along_axis(g, idx, axis=axis)],
    category="gather",
    meaning="Adds one element per index along one axis; equal positions add up.",
    formula="y = base;  y[a…, idx[a…, j, b…], b…] += upd[a…, j, b…]",
    shape_rule="the shape of base",
    grad_rule="dbase = g,  dupd = take_along_axis(g, idx)",
    samples=lambda: [
        (
            (np.zeros((2, 3)), np.array([[2, 2], [-1, 0]]), np.arange(1.0, 5.0).reshape(2, 2)),
            {"axis": 1},
        ),
        ((np.ones((3, 1)), np.array([[0], [1], [0], [2]]), np.arange(4.0).reshape(4, 1)), {"axis": 0}),
    ],
    attrs={"axis": "int"},
)
