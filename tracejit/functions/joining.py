"""NumPy's functions that join, split, repeat, shift and pad tensors.

Reached through ``np.*`` dispatch and ``tracejit.functions``; on concrete arrays NumPy's own result.
"""

from __future__ import annotations

import builtins
import itertools
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np

from tracejit.dtypes import DType, canonical
from tracejit.errors import ShapeError, UnsupportedFunctionError
from tracejit.functions import promotion as pr
from tracejit.functions.reductions import normalize_axis
from tracejit.functions.shape import (
    atleast_1d,
    atleast_2d,
    atleast_3d,
    expand_dims,
    literal_array,
    ravel,
    reshape,
    reshape_to,
    shape_argument,
    squeeze,
)
from tracejit.ops import indexing as gather
from tracejit.ops import shape as ops
from tracejit.tensor import Tensor, is_arraylike

_any = builtins.any

# -- join ------------------------------------------------------------------------------------------


def _strong(arrays: Sequence[Any], op: str, dtype: Any = None) -> list[Tensor]:
    """The arrays as tensors of one dtype; joining, unlike arithmetic, treats Python numbers as arrays."""
    tensors = [pr.tensor(a, op) for a in arrays]
    if not tensors:
        raise ShapeError.make("at least one array is needed", op=op)
    common: DType = canonical(
        dtype if dtype is not None else np.result_type(*(t.dtype for t in tensors)), op=op
    )
    return [pr.tensor(t, op, common) for t in tensors]


def _named(tensors: Sequence[Any]) -> dict[str, Any]:
    return {f"x{i}": t for i, t in enumerate(tensors[:6])}


def concatenate(
    arrays: Any, /, axis: Any = 0, out: Any = None, *, dtype: Any = None, casting: str = "same_kind"
) -> Any:
    """As ``np.concatenate``; ``axis=None`` joins the flattened arrays."""
    parts = list(arrays)
    if not pr.any_tensor(*parts):
        return np.concatenate(parts, axis, out, dtype=dtype, casting=casting)  # type: ignore[call-overload]
    pr.reject_keywords("concatenate", out)
    tensors = _strong(parts, "concatenate", dtype)
    if axis is None:
        tensors, axis = [ravel(t) for t in tensors], 0
    ndims = {t.ndim for t in tensors}
    if len(ndims) > 1 or ndims == {0}:
        what = "scalars cannot be joined; use np.stack" if ndims == {0} else "all arrays need as many axes"
        raise ShapeError.make(what, op="concatenate", got=_named(tensors))
    axis = normalize_axis(axis, ndims.pop(), "concatenate")
    return tensors[0] if len(tensors) == 1 else ops.concatenate(*tensors, axis=axis)


concat = concatenate


def append(arr: Any, values: Any, axis: Any = None) -> Any:
    """As ``np.append``: ``concatenate((arr, values), axis)``."""
    if not pr.any_tensor(arr, values):
        return np.append(arr, values, axis)
    return concatenate((arr, values), axis)


def stack(
    arrays: Any, axis: int = 0, out: Any = None, *, dtype: Any = None, casting: str = "same_kind"
) -> Any:
    """As ``np.stack``: arrays of one shape along a new axis."""
    parts = list(arrays)
    if not pr.any_tensor(*parts):
        return np.stack(parts, axis, out, dtype=dtype, casting=casting)  # type: ignore[call-overload]
    pr.reject_keywords("stack", out)
    tensors = _strong(parts, "stack", dtype)
    if _any(t.shape != tensors[0].shape for t in tensors):
        raise ShapeError.make("all arrays need the same shape", op="stack", got=_named(tensors))
    axis = normalize_axis(axis, tensors[0].ndim + 1, "stack")
    return concatenate([expand_dims(t, axis) for t in tensors], axis)


def vstack(tup: Any, *, dtype: Any = None, casting: str = "same_kind") -> Any:
    """As ``np.vstack``: rows on top of each other."""
    return concatenate([atleast_2d(a) for a in list(tup)], 0, dtype=dtype, casting=casting)


def hstack(tup: Any, *, dtype: Any = None, casting: str = "same_kind") -> Any:
    """As ``np.hstack``: side by side."""
    parts = [atleast_1d(a) for a in list(tup)]
    return concatenate(parts, 0 if parts and parts[0].ndim == 1 else 1, dtype=dtype, casting=casting)


def dstack(tup: Any) -> Any:
    """As ``np.dstack``: along the third axis."""
    return concatenate([atleast_3d(a) for a in list(tup)], 2)


def column_stack(tup: Any) -> Any:
    """As ``np.column_stack``: 1-D arrays become columns."""
    parts = [a if is_arraylike(a) else np.asarray(a) for a in list(tup)]
    return concatenate([a if len(a.shape) > 1 else reshape(a, (-1, 1)) for a in parts], 1)


# -- split -----------------------------------------------------------------------------------------


def _cut(x: Tensor, start: int, stop: int, axis: int) -> Tensor:
    """Elements ``start:stop`` along one axis, clipped as Python slices are."""
    n = x.shape[axis]
    start, stop, _ = slice(start, stop).indices(n)
    stop = max(start, stop)
    if (start, stop) == (0, n):
        return x
    return ops.slice_(
        x,
        start=tuple(start if i == axis else 0 for i in range(x.ndim)),
        stop=tuple(stop if i == axis else m for i, m in enumerate(x.shape)),
        step=(1,) * x.ndim,
    )


def array_split(ary: Any, indices_or_sections: Any, axis: int = 0) -> Any:
    """As ``np.array_split``: parts whose sizes differ by at most one, or parts between the given indices."""
    if not pr.any_tensor(ary):
        return np.array_split(ary, indices_or_sections, axis)
    x = pr.tensor(ary, "split")
    axis = normalize_axis(axis, x.ndim, "split")
    n = x.shape[axis]
    try:
        points = [0, *(operator.index(i) for i in indices_or_sections), n]
    except TypeError:
        count = operator.index(indices_or_sections)
        if count <= 0:
            raise ShapeError.make(
                f"the number of sections must be positive, is {count}", op="split"
            ) from None
        each, extra = builtins.divmod(n, count)
        points = [i * each + min(i, extra) for i in range(count + 1)]
    return [_cut(x, a, b, axis) for a, b in itertools.pairwise(points)]


def split(ary: Any, indices_or_sections: Any, axis: int = 0) -> Any:
    """As ``np.split``: equal parts, or parts between the given indices."""
    if not pr.any_tensor(ary):
        return np.split(ary, indices_or_sections, axis)
    if not hasattr(indices_or_sections, "__len__"):
        count = operator.index(indices_or_sections)
        if count > 0 and ary.shape[normalize_axis(axis, ary.ndim, "split")] % count:
            raise ShapeError.make(
                f"axis {axis} does not divide into {count} equal parts",
                op="split",
                got={"x": ary},
                hint="np.array_split allows it",
            )
    return array_split(ary, indices_or_sections, axis)


def _split_along(name: str, axis: int, least: int) -> Any:
    def function(ary: Any, indices_or_sections: Any) -> Any:
        if not pr.any_tensor(ary):
            return getattr(np, name)(ary, indices_or_sections)
        if ary.ndim < least:
            raise ShapeError.make(f"needs an array of {least} or more axes", op=name, got={"x": ary})
        return split(ary, indices_or_sections, 0 if name == "hsplit" and ary.ndim == 1 else axis)

    function.__name__ = function.__qualname__ = name
    function.__doc__ = f"As ``np.{name}``: ``np.split`` along axis {axis}."
    return function


hsplit = _split_along("hsplit", 1, 1)
vsplit = _split_along("vsplit", 0, 2)
dsplit = _split_along("dsplit", 2, 3)


def unstack(x: Any, /, *, axis: int = 0) -> Any:
    """As ``np.unstack``: the tuple of sub-arrays along ``axis``."""
    if not pr.any_tensor(x):
        return tuple(np.moveaxis(np.asarray(x), axis, 0))
    if x.ndim == 0:
        raise ShapeError.make("a scalar cannot be unstacked", op="unstack", got={"x": x})
    axis = normalize_axis(axis, x.ndim, "unstack")
    return tuple(squeeze(_cut(pr.tensor(x, "unstack"), i, i + 1, axis), axis) for i in range(x.shape[axis]))


# -- repeat, roll, tile ----------------------------------------------------------------------------


def roll(a: Any, shift: Any, axis: Any = None) -> Any:
    """As ``np.roll``: elements pushed off the end come back at the start."""
    if not pr.any_tensor(a):
        return np.roll(a, shift, axis)
    x = pr.tensor(a, "roll")
    if axis is None:
        return reshape_to(roll(ravel(x), shift, 0), x.shape)
    pairs = np.broadcast(np.asarray(shift), np.asarray(axis))
    if pairs.ndim > 1:
        raise ShapeError.make("shift and axis must be integers or 1-D sequences", op="roll")
    for by, along in pairs:
        i = normalize_axis(int(along), x.ndim, "roll")
        n = x.shape[i]
        by = int(by) % n if n else 0
        if by:
            x = ops.concatenate(_cut(x, n - by, n, i), _cut(x, 0, n - by, i), axis=i)
    return x


def repeat(a: Any, repeats: Any, axis: Any = None) -> Any:
    """As ``np.repeat``: each element ``repeats`` times; the counts must be known while tracing."""
    if not pr.any_tensor(a):
        return np.repeat(a, repeats, axis)
    x = pr.tensor(a, "repeat")
    if axis is None:
        x, axis = ravel(x), 0
    axis = normalize_axis(axis, x.ndim, "repeat")
    n = x.shape[axis]
    counts = np.asarray(repeats)
    if counts.dtype.kind not in "iu" or counts.ndim > 1 or counts.size not in (1, n):
        raise ShapeError.make(
            f"repeats must be an integer or {n} integers", op="repeat", got={"x": x, "repeats": counts}
        )
    if counts.size and counts.min() < 0:
        raise ShapeError.make("repeats cannot be negative", op="repeat", got={"repeats": counts})
    if counts.size != 1:
        return gather.take(x, literal_array(np.repeat(np.arange(n), counts)), axis=axis)
    times, (before, after) = int(counts.reshape(())), (x.shape[:axis], x.shape[axis + 1 :])
    wide = pr.broadcast_to(reshape_to(x, (*before, n, 1, *after)), (*before, n, times, *after))
    return reshape_to(wide, (*before, n * times, *after))


def tile(A: Any, reps: Any) -> Any:
    """As ``np.tile``: the whole array repeated along each axis."""
    if not pr.any_tensor(A):
        return np.tile(A, reps)
    x, counts = pr.tensor(A, "tile"), shape_argument(reps, "tile")
    if min(counts, default=1) < 0:
        raise ShapeError.make("repetitions cannot be negative", op="tile", got={"x": x, "reps": counts})
    rank = max(x.ndim, len(counts))
    sizes, counts = (1,) * (rank - x.ndim) + x.shape, (1,) * (rank - len(counts)) + counts
    pairs = list(zip(counts, sizes, strict=True))
    spread = reshape_to(x, tuple(s for _, n in pairs for s in (1, n)))
    wide = pr.broadcast_to(spread, tuple(s for pair in pairs for s in pair))
    return reshape_to(wide, tuple(c * n for c, n in pairs))


# -- pad -------------------------------------------------------------------------------------------


def _pairs(value: Any, rank: int, what: str) -> list[tuple[Any, Any]]:
    try:
        return [tuple(p) for p in np.broadcast_to(np.asarray(value), (rank, 2)).tolist()]
    except ValueError:
        raise ShapeError.make(
            f"{what} must be a value, a pair, or one pair per axis, got {value!r}", op="pad"
        ) from None


def pad(array: Any, pad_width: Any, mode: str = "constant", **kwargs: Any) -> Any:
    """As ``np.pad`` with the modes constant, edge, reflect, symmetric, wrap and empty (filled with zeros)."""
    if not pr.any_tensor(array):
        return np.pad(array, pad_width, mode, **kwargs)  # type: ignore[call-overload]
    x = pr.tensor(array, "pad")
    if isinstance(pad_width, dict):
        pad_width = [pad_width.get(i, pad_width.get(i - x.ndim, 0)) for i in range(x.ndim)]
        pad_width = [(w, w) if isinstance(w, int) else w for w in pad_width]
    widths = [(operator.index(a), operator.index(b)) for a, b in _pairs(pad_width, x.ndim, "pad_width")]
    if _any(w < 0 for pair in widths for w in pair):
        raise ShapeError.make("padding widths cannot be negative", op="pad", got={"x": x})
    if mode in ("constant", "empty"):
        return _pad_constant(x, widths, kwargs.pop("constant_values", 0))
    if mode not in ("edge", "reflect", "symmetric", "wrap") or kwargs.get("reflect_type", "even") != "even":
        raise UnsupportedFunctionError.make(
            f"mode={mode!r} is not supported in traced code",
            op="pad",
            hint="use constant, edge, reflect, symmetric or wrap",
        )
    for axis, (low, high) in enumerate(widths):
        if low or high:
            if x.shape[axis] == 0:
                raise ShapeError.make(
                    f"cannot extend the empty axis {axis} by mode {mode!r}", op="pad", got={"x": x}
                )
            positions = np.pad(np.arange(x.shape[axis]), (low, high), mode)  # type: ignore[call-overload]
            x = gather.take(x, literal_array(positions), axis=axis)
    return x


def _pad_constant(x: Tensor, widths: list[tuple[int, int]], values: Any) -> Tensor:
    if isinstance(values, Tensor):
        values = [(values, values)] * x.ndim
    elif np.ndim(values) == 0:
        value = np.asarray(values).astype(x.dtype).item()
        low, high = zip(*widths, strict=True) if widths else ((), ())
        if not _any((*low, *high)):
            return x
        return ops.pad(x, low=tuple(low), high=tuple(high), interior=(0,) * x.ndim, value=value)
    else:
        values = _pairs(values, x.ndim, "constant_values")
    for axis, (counts, ends) in enumerate(zip(widths, values, strict=True)):
        parts = [x]
        for i, (count, end) in enumerate(zip(counts, ends, strict=True)):
            if count:
                shape = tuple(count if k == axis else n for k, n in enumerate(x.shape))
                block = pr.broadcast_to(pr.tensor(end, "pad", x.dtype), shape)
                parts.insert(0 if i == 0 else len(parts), block)
        x = ops.concatenate(*parts, axis=axis) if len(parts) > 1 else x
    return x


__all__ = [
    "append",
    "array_split",
    "column_stack",
    "concat",
    "concatenate",
    "dsplit",
    "dstack",
    "hsplit",
    "hstack",
    "pad",
    "repeat",
    "roll",
    "split",
    "stack",
    "tile",
    "unstack",
    "vsplit",
    "vstack",
]
