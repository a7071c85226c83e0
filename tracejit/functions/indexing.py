"""NumPy indexing on tensors: ``x[...]`` with everything NumPy allows that has a static shape, take and its
relatives.

Reached through ``x[index]``, ``np.*`` dispatch and ``tracejit.functions``; on concrete arrays NumPy's own
result. Indices that are known while tracing are checked against the bounds (IndexingError). Indices that only
exist at run time cannot raise: negative ones count from the end and what is then still outside is clipped, as
in JAX.
"""

from __future__ import annotations

import builtins
import operator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tracejit.dtypes import BOOL, INT64, canonical
from tracejit.errors import DTypeError, IndexingError, ShapeError, TracingError, UnsupportedFunctionError
from tracejit.functions import promotion as pr
from tracejit.functions.joining import stack
from tracejit.functions.reductions import normalize_axis
from tracejit.functions.shape import literal_array, ravel, reshape_to, transpose
from tracejit.ops import elementwise as ew
from tracejit.ops import indexing as gather
from tracejit.ops import shape as ops
from tracejit.ops.registry import get as op
from tracejit.tensor import Tensor, current_context, is_arraylike

# -- x[index] --------------------------------------------------------------------------------------


@dataclass
class _Plan:
    """An index taken apart: for each axis of ``x`` a slice, and in order of appearance what the result's axes
    are.

    ``tokens`` holds ``("slice", axis)``, ``("new", -1)``, ``("dots", -1)``, ``("int", axis)`` and ``("array",
    axis)``.
    """

    slices: list[slice] = field(default_factory=list)
    arrays: dict[int, Any] = field(default_factory=dict)
    tokens: list[tuple[str, int]] = field(default_factory=list)


def getitem(x: Any, index: Any) -> Any:
    """``x[index]`` by NumPy's rules: integers, slices, None, Ellipsis, integer arrays, concrete boolean masks.

    Integers and integer arrays may be traced. A traced boolean mask has no static result shape: IndexingError. A
    concrete mask decides the shape, so its value at trace time becomes part of the graph.
    """
    x = pr.tensor(x, "getitem")
    plan = _parse(x, index if isinstance(index, tuple) else (index,))
    y = _apply_slices(x, plan.slices)
    if plan.arrays:
        return _gather(y, plan)
    shown = [(kind, axis) for kind, axis in plan.tokens if kind in ("new", "slice")]
    return reshape_to(y, tuple(1 if kind == "new" else y.shape[axis] for kind, axis in shown))


def _parse(x: Tensor, items: tuple[Any, ...]) -> _Plan:
    items = tuple(_as_index(x, item) for item in items)
    consumed = sum(_consumes(item) for item in items)
    dots = [i for i, item in enumerate(items) if item is Ellipsis]
    if len(dots) > 1:
        raise IndexingError.make("an index can have only one ellipsis ('...')", op="getitem", got={"x": x})
    if consumed > x.ndim:
        raise IndexingError.make(
            f"too many indices: {consumed} for {x.ndim} axes", op="getitem", got={"x": x}
        )
    rest = (slice(None),) * (x.ndim - consumed)
    at = dots[0] if dots else len(items)
    plan, axis = _Plan(), 0
    for item in (*items[:at], Ellipsis, *rest, *items[at + 1 :]):
        if item is Ellipsis:
            if dots:  # separates index arrays even where it stands for no axis
                plan.tokens.append(("dots", -1))
            continue
        if item is None:
            plan.tokens.append(("new", -1))
            continue
        if getattr(item, "dtype", None) == BOOL:
            for positions in _mask_positions(x, item, axis):
                plan.arrays[axis] = positions
                plan.tokens.append(("array", axis))
                plan.slices.append(slice(None))
                axis += 1
            continue
        if isinstance(item, int):
            i = _bounded(x, item, axis)
            plan.slices.append(slice(i, i + 1))
            plan.tokens.append(("int", axis))
        elif isinstance(item, slice):
            plan.slices.append(item)
            plan.tokens.append(("slice", axis))
        else:
            if not isinstance(item, Tensor):
                check_bounds(item, x.shape[axis], axis, "getitem", x)
            plan.slices.append(slice(None))
            plan.arrays[axis] = item
            plan.tokens.append(("array", axis))
        axis += 1
    return plan


def _consumes(item: Any) -> int:
    if item is None or item is Ellipsis:
        return 0
    return item.ndim if getattr(item, "dtype", None) == BOOL else 1


def _as_index(x: Tensor, item: Any) -> Any:
    """One entry of an index as None, Ellipsis, int, slice, an integer array or a concrete boolean mask; or an
    error."""
    if item is None or item is Ellipsis or isinstance(item, slice):
        return item
    if isinstance(item, bool | np.bool_):
        raise IndexingError.make(
            "a single bool is not supported as an index",
            op="getitem",
            got={"x": x},
            hint="use x[None] or np.where",
        )
    if isinstance(item, int | np.integer):
        return int(item)
    if isinstance(item, list | tuple):
        item = (
            stack(item) if pr.any_tensor(*item) else np.asarray(item, dtype=None if len(item) else np.int64)
        )
    elif not is_arraylike(item):
        try:
            return operator.index(item)
        except TypeError:
            raise IndexingError.make(
                "only integers, slices, None, ... and arrays of integers or booleans are indices",
                op="getitem",
                got={"x": x, "index": item},
            ) from None
    if item.dtype == BOOL:
        if isinstance(item, Tensor):
            raise IndexingError.make(
                "indexing with a boolean array whose values are not known while tracing has no fixed result shape",
                op="getitem",
                got={"x": x, "mask": item},
                hint="use tj.where(mask, x, 0), or multiply by the mask",
            )
        return np.asarray(item)
    if item.dtype.kind not in "iu":
        raise IndexingError.make(
            "index arrays must be of integer or boolean type", op="getitem", got={"x": x, "index": item}
        )
    return item


def _mask_positions(x: Tensor, mask: np.ndarray, axis: int) -> list[Any]:
    expected = x.shape[axis : axis + mask.ndim]
    if mask.shape != expected or mask.ndim == 0:
        raise IndexingError.make(
            f"the boolean mask does not match axes {axis} to {axis + mask.ndim - 1}",
            op="getitem",
            got={"x": x, "mask": mask},
        )
    return [literal_array(p) for p in np.nonzero(mask)]


def _bounded(x: Tensor, i: int, axis: int) -> int:
    n = x.shape[axis]
    if not -n <= i < n:
        raise IndexingError.make(
            f"index {i} is out of bounds for axis {axis} with size {n}", op="getitem", got={"x": x}
        )
    return i % n


def check_bounds(index: Any, n: int, axis: int, name: str, x: Any) -> None:
    """IndexingError if an index array known while tracing leaves ``-n <= i < n``."""
    values = np.asarray(index)
    if values.size and not (-n <= values.min() and values.max() < n):
        bad = values[(values < -n) | (values >= n)].flat[0]
        raise IndexingError.make(
            f"index {bad} is out of bounds for axis {axis} with size {n}", op=name, got={"x": x}
        )


def _apply_slices(x: Tensor, slices: list[slice]) -> Tensor:
    """``x`` restricted to the slices. Negative steps become a slice with a positive step, then a flip."""
    start, stop, step, flipped = [], [], [], []
    for axis, (s, n) in enumerate(zip(slices, x.shape, strict=True)):
        bounds = (None if v is None else operator.index(v) for v in (s.start, s.stop, s.step))
        first, last, by = slice(*bounds).indices(n)
        count = len(range(first, last, by))
        if by < 0:
            first, by = first + (count - 1) * by, -by
            flipped.append(axis)
        if count == 0:
            first, by = 0, 1
        by = 1 if count <= 1 else by
        start.append(first)
        stop.append(first + (count - 1) * by + 1 if count else 0)
        step.append(by)
    if (tuple(start), tuple(stop), tuple(step)) != ((0,) * x.ndim, x.shape, (1,) * x.ndim):
        x = ops.slice_(x, start=tuple(start), stop=tuple(stop), step=tuple(step))
    axes = tuple(a for a in flipped if x.shape[a] > 1)
    return ops.flip(x, axes=axes) if axes else x


def _gather(y: Tensor, plan: _Plan) -> Tensor:
    """Integer-array indexing of ``y``, whose integer axes are already cut to size one.

    NumPy's placement: the axes of the broadcast index arrays replace the indexed axes if these are next to
    each other (integers count as arrays here), else they come first.
    """
    kept = [a for kind, a in plan.tokens if kind in ("slice", "array")]
    y = reshape_to(y, tuple(y.shape[a] for a in kept))
    place = {a: i for i, a in enumerate(kept)}
    indexed = [place[a] for a in plan.arrays]
    arrays = pr.broadcast("getitem", *(as_int64(i, "getitem") for i in plan.arrays.values()))
    shape = arrays[0].shape
    if len(indexed) == 1:
        axis = indexed[0]
        found = gather.take(y, arrays[0], axis=axis)
    else:
        others = [i for i in range(y.ndim) if i not in indexed]
        y = transpose(y, [*indexed, *others])
        sizes = y.shape[: len(indexed)]
        y = reshape_to(y, (int(np.prod(sizes, dtype=np.int64)), *y.shape[len(indexed) :]))
        found = gather.take(y, _linear(arrays, sizes), axis=0)
        axis = 0
    # Now ``found`` has the axes before ``axis``, the index axes, the rest. Bring the index axes where NumPy
    # has them.
    positions = [i for i, (kind, _) in enumerate(plan.tokens) if kind in ("array", "int")]
    adjacent = positions == list(range(positions[0], positions[-1] + 1))
    before = sum(kind == "slice" for kind, _ in plan.tokens[: positions[0]]) if adjacent else 0
    k = len(shape)
    rest = [i for i in range(found.ndim) if not axis <= i < axis + k]
    found = transpose(found, [*rest[:before], *range(axis, axis + k), *rest[before:]])
    sizes_left = iter([n for i, n in enumerate(found.shape) if not before <= i < before + k])
    result: list[int] = [] if adjacent else list(shape)
    for i, (kind, _) in enumerate(plan.tokens):
        if adjacent and i == positions[0]:
            result += shape
        if kind == "new":
            result.append(1)
        elif kind == "slice":
            result.append(next(sizes_left))
    return reshape_to(found, tuple(result))


def as_int64(index: Any, name: str) -> Tensor:
    """An index operand as an int64 tensor; DTypeError if it is no integer."""
    found = pr.tensor(index, name)
    if found.dtype.kind not in "iu":
        raise DTypeError.make("indices must be integers", op=name, got={"indices": found})
    return pr.tensor(found, name, INT64)


def _linear(arrays: tuple[Tensor, ...], sizes: tuple[int, ...]) -> Tensor:
    """Row-major positions for one index array per axis, each wrapped and clipped to its own axis first."""
    total: Any = None
    for index, n in zip(arrays, sizes, strict=True):
        inside = _wrap(index, n)
        total = inside if total is None else ew.add(ew.mul(total, pr.constant_like(total, n)), inside)
    return total


def _wrap(index: Tensor, n: int) -> Tensor:
    shifted = ew.where(
        ew.less(index, pr.constant_like(index, 0)), ew.add(index, pr.constant_like(index, n)), index
    )
    return _clip(shifted, n)


def _clip(index: Tensor, n: int) -> Tensor:
    return ew.minimum(ew.maximum(index, pr.constant_like(index, 0)), pr.constant_like(index, max(n - 1, 0)))


# -- take and its relatives ------------------------------------------------------------------------


def take(a: Any, indices: Any, axis: Any = None, out: Any = None, mode: str = "raise") -> Any:
    """As ``np.take``. Traced indices cannot raise: with ``mode="raise"`` they wrap once and are then
    clipped."""
    if not pr.any_tensor(a, indices):
        return np.take(a, indices, axis, out, mode)  # type: ignore[call-overload]
    pr.reject_keywords("take", out)
    x, index = pr.tensor(a, "take"), as_int64(indices, "take")
    if axis is None:
        x, axis = ravel(x), 0
    axis = normalize_axis(axis, x.ndim, "take")
    n = x.shape[axis]
    if mode == "raise" and not isinstance(indices, Tensor):
        check_bounds(indices, n, axis, "take", x)
    elif mode == "wrap":
        index = ew.mod(index, pr.constant_like(index, max(n, 1)))
    elif mode == "clip":
        index = _clip(index, n)
    elif mode != "raise":
        raise UnsupportedFunctionError.make(f"mode={mode!r} is not known; use raise, wrap or clip", op="take")
    return gather.take(x, index, axis=axis)


def take_along_axis(arr: Any, indices: Any, axis: Any = -1) -> Any:
    """As ``np.take_along_axis``: the other axes of array and indices broadcast."""
    if not pr.any_tensor(arr, indices):
        return np.take_along_axis(arr, indices, axis)
    x, index = pr.tensor(arr, "take_along_axis"), as_int64(indices, "take_along_axis")
    if axis is None:
        x, axis = ravel(x), 0
    axis = normalize_axis(axis, x.ndim, "take_along_axis")
    if x.ndim != index.ndim:
        raise ShapeError.make(
            "array and indices need as many axes", op="take_along_axis", got={"x": x, "indices": index}
        )
    if not isinstance(indices, Tensor):
        check_bounds(indices, x.shape[axis], axis, "take_along_axis", x)
    other = [((*s[:axis], 1, *s[axis + 1 :])) for s in (x.shape, index.shape)]
    common = list(pr.broadcast_shapes("take_along_axis", (x, index), other))
    x, index = (pr.broadcast_to(t, (*common[:axis], t.shape[axis], *common[axis + 1 :])) for t in (x, index))
    return gather.take_along_axis(x, index, axis=axis)


def put_along_axis(arr: Any, indices: Any, values: Any, axis: Any, mode: str = "raise") -> Any:
    """As ``np.put_along_axis`` on concrete arrays; it writes in place, so traced code gets a TracingError."""
    if not pr.any_tensor(arr, indices, values):
        return np.put_along_axis(arr, indices, values, axis)
    raise TracingError.make(
        "writes into its argument, which traced code cannot",
        op="put_along_axis",
        got={"x": arr},
        hint="use np.where(np.arange(n) == index, value, x)",
    )


def compress(condition: Any, a: Any, axis: Any = None, out: Any = None) -> Any:
    """As ``np.compress``; the condition must be known while tracing."""
    if not pr.any_tensor(condition, a):
        return np.compress(condition, a, axis, out)
    pr.reject_keywords("compress", out)
    if isinstance(condition, Tensor):
        raise IndexingError.make(
            "the number of elements depends on values",
            op="compress",
            got={"condition": condition},
            hint="use tj.where",
        )
    x = pr.tensor(a, "compress")
    if axis is None:
        x, axis = ravel(x), 0
    axis = normalize_axis(axis, x.ndim, "compress")
    (positions,) = np.nonzero(np.asarray(condition))
    check_bounds(positions, x.shape[axis], axis, "compress", x)
    return gather.take(x, literal_array(positions), axis=axis)


# -- choice by condition ---------------------------------------------------------------------------


def select(condlist: Any, choicelist: Any, default: Any = 0) -> Any:
    """As ``np.select``: for each element the choice of the first condition that holds."""
    conditions, choices = list(condlist), list(choicelist)
    if not pr.any_tensor(*conditions, *choices, default):
        return np.select(conditions, choices, default)
    if len(conditions) != len(choices) or not conditions:
        raise ShapeError.make(f"{len(conditions)} conditions but {len(choices)} choices", op="select")
    dtype = pr.common_dtype("select", *choices, default)
    masks = [pr.tensor(c, "select") for c in conditions]
    if builtins.any(m.dtype != BOOL for m in masks):
        raise DTypeError.make(
            "conditions must be boolean", op="select", got={f"cond{i}": m for i, m in enumerate(masks[:6])}
        )
    values = [pr.tensor(v, "select", dtype) for v in (*choices, default)]
    shaped = pr.broadcast("select", *masks, *values)
    masks, values = list(shaped[: len(masks)]), list(shaped[len(masks) :])
    result = values[-1]
    for mask, value in zip(reversed(masks), reversed(values[:-1]), strict=True):
        result = ew.where(mask, value, result)
    return result


def choose(a: Any, choices: Any, out: Any = None, mode: str = "raise") -> Any:
    """As ``np.choose``: element i of the result comes from array number ``a[i]``. Out-of-range numbers are
    clipped."""
    options = list(choices)
    if not pr.any_tensor(a, *options):
        return np.choose(a, options, out, mode)  # type: ignore[call-overload]
    pr.reject_keywords("choose", out)
    if not isinstance(a, Tensor) and mode == "raise":
        check_bounds(np.where(np.asarray(a) < 0, len(options), a), len(options), 0, "choose", a)
    index = as_int64(a, "choose")
    n = len(options)
    if mode == "wrap":
        index = ew.mod(index, pr.constant_like(index, n))
    dtype = canonical(np.result_type(*(pr.tensor(o, "choose").dtype for o in options)), op="choose")
    shaped = pr.broadcast("choose", index, *(pr.tensor(o, "choose", dtype) for o in options))
    index, values = shaped[0], shaped[1:]
    result = values[-1]
    for i in range(n - 2, -1, -1):
        result = ew.where(ew.less_equal(index, pr.constant_like(index, i)), values[i], result)
    return result


def searchsorted(a: Any, v: Any, side: str = "left", sorter: Any = None) -> Any:
    """As ``np.searchsorted``: where to insert ``v`` in the sorted 1-D array ``a``. Compares every pair."""
    if not pr.any_tensor(a, v, sorter):
        return np.searchsorted(a, v, side, sorter)  # type: ignore[call-overload]
    if side not in ("left", "right"):
        raise ValueError(f"[searchsorted] side must be 'left' or 'right', got {side!r}")
    row = pr.tensor(a, "searchsorted")
    if row.ndim != 1:
        raise ShapeError.make("the sorted array must have one axis", op="searchsorted", got={"a": row})
    if sorter is not None:
        row = take(row, sorter)
    dtype = pr.common_dtype("searchsorted", row, v)
    row, value = pr.tensor(row, "searchsorted", dtype), pr.tensor(v, "searchsorted", dtype)
    column, line = pr.broadcast("searchsorted", reshape_to(value, (*value.shape, 1)), row)
    before = (ew.less if side == "left" else ew.less_equal)(line, column)
    if dtype.kind == "f":  # NaN sorts after everything
        late = op("isnan")(column)
        if side == "left":
            late = ew.bitwise_and(late, op("invert")(op("isnan")(line)))
        before = ew.bitwise_or(before, late)
    return op("sum")(ew.convert(before, dtype=INT64), axes=(value.ndim,))


# -- diagonals and index grids ---------------------------------------------------------------------


def diag(v: Any, k: int = 0) -> Any:
    """As ``np.diag``: the k-th diagonal of a matrix, or the matrix with this diagonal."""
    if not pr.any_tensor(v):
        return np.diag(v, k)
    x, k = pr.tensor(v, "diag"), operator.index(k)
    if x.ndim == 2:
        return _diagonal(x, k)
    if x.ndim != 1:
        raise ShapeError.make("needs an array of one or two axes", op="diag", got={"x": x})
    # With n zeros between them, element i lands at i·(n + 1): the diagonal of an n-by-n matrix in row-major
    # order.
    n = x.shape[0]
    if n == 0:
        return ops.filled(0, (abs(k), abs(k)), x.dtype)
    square = ops.pad(x, low=(0,), high=(0,), interior=(n,), value=0)
    return ops.pad(
        reshape_to(square, (n, n)),
        low=(max(-k, 0), max(k, 0)),
        high=(max(k, 0), max(-k, 0)),
        interior=(0, 0),
        value=0,
    )


def _diagonal(x: Tensor, k: int) -> Tensor:
    rows, cols = x.shape
    count = max(0, min(rows + min(k, 0), cols - max(k, 0)))
    if count == 0:
        return ops.filled(0, (0,), x.dtype)
    y = getitem(x, (slice(max(-k, 0), max(-k, 0) + count), slice(max(k, 0), max(k, 0) + count)))
    flat = reshape_to(y, (count * count,))
    return getitem(flat, slice(0, None, count + 1))


def indices(dimensions: Any, dtype: Any = int, sparse: bool = False) -> Any:
    """As ``np.indices``: one array of positions per axis."""
    sizes = tuple(operator.index(d) for d in dimensions)
    if current_context() is None:
        return np.indices(sizes, dtype, sparse)  # type: ignore[call-overload]
    found = canonical(dtype, op="indices")
    iota = op("iota")
    if sparse:
        return tuple(
            reshape_to(
                iota(shape=(n,), axis=0, dtype=found), tuple(n if i == k else 1 for k in range(len(sizes)))
            )
            for i, n in enumerate(sizes)
        )
    if not sizes:
        return ops.filled(0, (0,), found)
    return stack([iota(shape=sizes, axis=i, dtype=found) for i in range(len(sizes))])


__all__ = [
    "choose",
    "compress",
    "diag",
    "getitem",
    "indices",
    "put_along_axis",
    "searchsorted",
    "select",
    "take",
    "take_along_axis",
]
