"""NumPy's reductions on tensors: sums, means, spreads, extrema and their positions, with its ``axis`` and dtype rules.

Reached through methods, ``np.*`` dispatch and ``tracejit.functions``; on concrete arrays NumPy's own result.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np

from tracejit.dtypes import BOOL, FLOAT32, FLOAT64, INT64, DType, canonical
from tracejit.errors import DTypeError, ShapeError
from tracejit.functions import elementwise as el
from tracejit.functions import promotion as pr
from tracejit.ops import elementwise as ew
from tracejit.ops import reduction, rules
from tracejit.ops.registry import Op
from tracejit.source import named_scope
from tracejit.tensor import Tensor

_NO_VALUE: Any = getattr(np, "_NoValue", None)
Axes = tuple[int, ...]


def normalize_axis(axis: Any, ndim: int, op: str) -> int:
    """``axis`` counted from the front; ShapeError (NumPy's AxisError) if there is no such axis."""
    try:
        index = operator.index(axis)
    except TypeError:
        raise TypeError(f"[{op}] axis must be an integer, got {axis!r}") from None
    if not -ndim <= index < ndim:
        raise ShapeError.make(f"axis {index} is out of bounds for an array of {ndim} dimensions", op=op)
    return index % ndim


def normalize_axes(axis: Any, ndim: int, op: str) -> Axes:
    """The sorted non-negative axes that ``axis`` (None for all, an integer, or a tuple) names, each once."""
    if axis is None:
        return tuple(range(ndim))
    given = axis if isinstance(axis, tuple) else (axis,)
    axes = [normalize_axis(a, ndim, op) for a in given]
    if len(set(axes)) != len(axes):
        raise ShapeError.make(f"duplicate axis in axis={axis}", op=op)
    return tuple(sorted(axes))


def restore_axes(result: Any, shape: tuple[int, ...], axes: Axes, keepdims: Any) -> Any:
    if not keepdims or keepdims is _NO_VALUE:
        return result
    return rules.reshape(result, tuple(1 if i in axes else s for i, s in enumerate(shape)))


def _masked(x: Tensor, where: Any, neutral: Any, op: str) -> Tensor:
    """``x`` with ``neutral`` where the mask ``where`` does not hold; the mask broadcasts to ``x``."""
    if where is True or where is _NO_VALUE or where is None:
        return x
    mask = pr.tensor(where, op, BOOL)
    if pr.broadcast_shapes(op, (x, mask), [x.shape, mask.shape]) != x.shape:
        raise ShapeError.make(
            "where= must broadcast to the shape of the operand", op=op, got={"x": x, "where": mask}
        )
    return ew.where(pr.broadcast_to(mask, x.shape), x, pr.constant_like(x, neutral))


def _given(value: Any) -> bool:
    return value is not None and value is not _NO_VALUE


def _accumulator(x: Any, dtype: Any, op: str) -> DType:
    """The dtype NumPy adds and multiplies in: bools and small integers become (u)int64."""
    if _given(dtype):
        return canonical(dtype, op=op)
    if x.dtype.kind in "bi":
        return INT64
    return np.dtype(np.uint64) if x.dtype.kind == "u" else x.dtype


def sum(
    a: Any,
    axis: Any = None,
    dtype: Any = None,
    out: Any = None,
    keepdims: Any = False,
    initial: Any = None,
    where: Any = True,
) -> Any:
    """Sum over ``axis``. Bools and small integers are added as (u)int64, float16 in float32. As ``np.sum``."""
    if not pr.any_tensor(a, where):
        return np.sum(a, axis=axis, dtype=dtype, out=out, keepdims=keepdims, **_optional(initial, where))
    return _fold("sum", reduction.sum_, el.add, 0, a, axis, dtype, out, keepdims, initial, where)


def prod(
    a: Any,
    axis: Any = None,
    dtype: Any = None,
    out: Any = None,
    keepdims: Any = False,
    initial: Any = None,
    where: Any = True,
) -> Any:
    """Product over ``axis``, with the dtypes of :func:`sum`. As ``np.prod``; the gradient is exact at zeros."""
    if not pr.any_tensor(a, where):
        return np.prod(a, axis=axis, dtype=dtype, out=out, keepdims=keepdims, **_optional(initial, where))
    return _fold("prod", reduction.prod, el.multiply, 1, a, axis, dtype, out, keepdims, initial, where)


def _optional(initial: Any, where: Any) -> dict[str, Any]:
    """The keywords as NumPy wants them when they were given; NumPy tells absent from None."""
    keywords: dict[str, Any] = {}
    if _given(initial):
        keywords["initial"] = initial
    if where is not True and where is not _NO_VALUE:
        keywords["where"] = where
    return keywords


def _fold(
    name: str, op: Op, combine: Callable[..., Any], neutral: int, a: Any, axis: Any, dtype: Any, out: Any, keepdims: Any,
    initial: Any, where: Any,
) -> Any:  # fmt: skip
    pr.reject_keywords(name, out)
    x = pr.tensor(a, name)
    wide = _accumulator(x, dtype, name)
    if wide == BOOL:  # dtype=bool: NumPy's sum is then "any", its product "all"
        x, op = pr.tensor(x, name, BOOL), reduction.any_ if name == "sum" else reduction.all_
    x = _masked(pr.tensor(x, name, wide), where, neutral, name)
    axes = normalize_axes(axis, x.ndim, name)
    result = op(x, axes=axes)
    if _given(initial):
        result = combine(result, pr.tensor(initial, name, wide))
    return restore_axes(result, x.shape, axes, keepdims)


def mean(
    a: Any, axis: Any = None, dtype: Any = None, out: Any = None, keepdims: Any = False, *, where: Any = True
) -> Any:
    """Arithmetic mean over ``axis``; of integers in float64, of float16 through float32. NaN for no elements."""
    if not pr.any_tensor(a, where):
        return np.mean(a, axis=axis, dtype=dtype, out=out, keepdims=keepdims, **_optional(None, where))
    pr.reject_keywords("mean", out)
    x = pr.tensor(a, "mean")
    result = (_given(dtype) and canonical(dtype, op="mean")) or (x.dtype if x.dtype.kind == "f" else FLOAT64)
    with named_scope("mean"):
        return pr.tensor(
            _mean(pr.tensor(x, "mean", _wide(result)), axis, keepdims, where, "mean"), "mean", result
        )


def _wide(dtype: DType) -> DType:
    return FLOAT32 if dtype == np.float16 else dtype


def _mean(x: Tensor, axis: Any, keepdims: Any, where: Any, op: str, ddof: Any = 0) -> Any:
    """Sum over count; the divisor is ``max(count - ddof, 0)``, as in NumPy's variance."""
    axes = normalize_axes(axis, x.ndim, op)
    total = reduction.sum_(_masked(x, where, 0, op), axes=axes)
    if where is True or where is _NO_VALUE:
        n = 1
        for i in axes:
            n *= x.shape[i]
        return restore_axes(el.divide(total, _non_negative(n - ddof)), x.shape, axes, keepdims)
    ones = _masked(pr.constant_like(x, 1), where, 0, op)
    count = reduction.sum_(ones, axes=axes)
    divisor = el.maximum(el.subtract(count, ddof), 0) if not _is_zero(ddof) else count
    return restore_axes(el.divide(total, divisor), x.shape, axes, keepdims)


def _is_zero(ddof: Any) -> bool:
    return isinstance(ddof, int | float) and ddof == 0


def _non_negative(value: Any) -> Any:
    return el.maximum(value, 0) if isinstance(value, Tensor) else float(value) if value > 0 else 0.0


def var(
    a: Any, axis: Any = None, dtype: Any = None, out: Any = None, ddof: Any = 0, keepdims: Any = False, *,
    where: Any = True, mean: Any = None, correction: Any = None,
) -> Any:  # fmt: skip
    """Variance over ``axis``: mean of squared deviations, with divisor ``n - ddof``. As ``np.var``.

    ``mean`` may be given with its axes kept. Float16 is computed in float32.
    """
    if not pr.any_tensor(a, where, mean):
        return np.var(a, axis=axis, dtype=dtype, out=out, ddof=ddof, keepdims=keepdims,
                      **_optional(None, where), **_var_keywords(mean, correction))  # fmt: skip
    pr.reject_keywords("var", out)
    with named_scope("var"):
        return _var(a, axis, dtype, _ddof(ddof, correction), keepdims, where, mean, "var")


def std(
    a: Any, axis: Any = None, dtype: Any = None, out: Any = None, ddof: Any = 0, keepdims: Any = False, *,
    where: Any = True, mean: Any = None, correction: Any = None,
) -> Any:  # fmt: skip
    """Standard deviation: the square root of :func:`var`. As ``np.std``."""
    if not pr.any_tensor(a, where, mean):
        return np.std(a, axis=axis, dtype=dtype, out=out, ddof=ddof, keepdims=keepdims,
                      **_optional(None, where), **_var_keywords(mean, correction))  # fmt: skip
    pr.reject_keywords("std", out)
    with named_scope("std"):
        return el.sqrt(_var(a, axis, dtype, _ddof(ddof, correction), keepdims, where, mean, "std"))


def _var_keywords(mean: Any, correction: Any) -> dict[str, Any]:
    return {k: v for k, v in (("mean", mean), ("correction", correction)) if _given(v)}


def _ddof(ddof: Any, correction: Any) -> Any:
    if not _given(correction):
        return ddof
    if not _is_zero(ddof):
        raise ValueError("ddof and correction can't be provided simultaneously.")
    return correction


def _var(a: Any, axis: Any, dtype: Any, ddof: Any, keepdims: Any, where: Any, mean: Any, op: str) -> Any:
    x = pr.tensor(a, op)
    result = (_given(dtype) and canonical(dtype, op=op)) or (x.dtype if x.dtype.kind == "f" else FLOAT64)
    if result.kind != "f":
        raise DTypeError.make(
            f"cannot compute a variance in {result}", op=op, got={"x": x}, hint="use a float dtype"
        )
    x = pr.tensor(x, op, _wide(result))
    centre = pr.tensor(mean, op, x.dtype) if _given(mean) else _mean(x, axis, True, where, op)
    deviation = el.subtract(x, centre)
    return pr.tensor(_mean(el.multiply(deviation, deviation), axis, keepdims, where, op, ddof), op, result)


def average(
    a: Any, axis: Any = None, weights: Any = None, returned: bool = False, *, keepdims: Any = False
) -> Any:
    """Weighted mean ``Σ w·a / Σ w`` over ``axis``; 1-D ``weights`` run along one axis. As ``np.average``."""
    if not pr.any_tensor(a, weights):
        return np.average(a, axis=axis, weights=weights, returned=returned, keepdims=keepdims)  # type: ignore[call-overload]
    x = pr.tensor(a, "average")
    if weights is None:
        result = mean(x, axis, keepdims=keepdims)
        axes = normalize_axes(axis, x.ndim, "average")
        count = 1
        for i in axes:
            count *= x.shape[i]
        return (result, pr.constant_like(result, count)) if returned else result
    with named_scope("average"):
        dtype = pr.common_dtype("average", x, weights)
        if x.dtype.kind != "f":
            dtype = pr.common_dtype("average", Tensor(x.node, x.ctx), weights, np.empty(0, FLOAT64))
        w = pr.tensor(weights, "average", dtype)
        x = pr.tensor(x, "average", dtype)
        axes = normalize_axes(axis, x.ndim, "average")
        if w.shape != x.shape:
            if axis is None:
                raise TypeError("Axis must be specified when shapes of a and weights differ.")
            if w.shape != tuple(x.shape[i] for i in axes):
                raise ShapeError.make(
                    "weights must have the shape of the averaged axes",
                    op="average",
                    got={"a": x, "weights": w},
                )
            w = rules.reshape(w, tuple(s if i in axes else 1 for i, s in enumerate(x.shape)))
        w = pr.broadcast_to(w, x.shape)
        total = reduction.sum_(w, axes=axes)
        result = ew.div(reduction.sum_(ew.mul(x, w), axes=axes), total)
        result = restore_axes(result, x.shape, axes, keepdims)
        return (result, restore_axes(total, x.shape, axes, keepdims)) if returned else result


# -- extrema -------------------------------------------------------------------------------------------------


def max(
    a: Any, axis: Any = None, out: Any = None, keepdims: Any = False, initial: Any = None, where: Any = True
) -> Any:
    """Largest element over ``axis``; NaN if there is one. ShapeError for no elements without ``initial``."""
    if not pr.any_tensor(a, where):
        return np.max(a, axis=axis, out=out, keepdims=keepdims, **_optional(initial, where))
    return _extremum("max", reduction.max_, el.maximum, a, axis, out, keepdims, initial, where)


def min(
    a: Any, axis: Any = None, out: Any = None, keepdims: Any = False, initial: Any = None, where: Any = True
) -> Any:
    """Smallest element over ``axis``; NaN if there is one. ShapeError for no elements without ``initial``."""
    if not pr.any_tensor(a, where):
        return np.min(a, axis=axis, out=out, keepdims=keepdims, **_optional(initial, where))
    return _extremum("min", reduction.min_, el.minimum, a, axis, out, keepdims, initial, where)


amax, amin = max, min


def _extremum(
    name: str,
    op: Op,
    combine: Callable[..., Any],
    a: Any,
    axis: Any,
    out: Any,
    keepdims: Any,
    initial: Any,
    where: Any,
) -> Any:
    pr.reject_keywords(name, out)
    x = pr.tensor(a, name)
    axes = normalize_axes(axis, x.ndim, name)
    masked = where is not True and where is not _NO_VALUE
    if masked and not _given(initial):
        raise ValueError(f"reduction operation '{name}' needs initial= together with where=")
    if _given(initial):
        start = pr.tensor(initial, name, x.dtype)
        if masked:
            mask = pr.broadcast_to(pr.tensor(where, name, BOOL), x.shape)
            x = ew.where(mask, x, pr.broadcast_to(start, x.shape))
        if 0 in (x.shape[i] for i in axes):
            kept = tuple(s for i, s in enumerate(x.shape) if i not in axes)
            return restore_axes(pr.broadcast_to(start, kept), x.shape, axes, keepdims)
        return restore_axes(combine(op(x, axes=axes), start), x.shape, axes, keepdims)
    return restore_axes(op(x, axes=axes), x.shape, axes, keepdims)


def ptp(a: Any, axis: Any = None, out: Any = None, keepdims: Any = False) -> Any:
    """Largest minus smallest element over ``axis``. As ``np.ptp``."""
    if not pr.any_tensor(a):
        return np.ptp(a, axis=axis, out=out, keepdims=False if keepdims is _NO_VALUE else keepdims)
    pr.reject_keywords("ptp", out)
    return el.subtract(max(a, axis, keepdims=keepdims), min(a, axis, keepdims=keepdims))


def argmax(a: Any, axis: Any = None, out: Any = None, *, keepdims: Any = False) -> Any:
    """Position (int64) of the first largest element along ``axis``, of the flattened array if None."""
    if not pr.any_tensor(a):
        return np.argmax(a, axis=axis, out=out, keepdims=keepdims)
    return _position("argmax", reduction.argmax, a, axis, out, keepdims)


def argmin(a: Any, axis: Any = None, out: Any = None, *, keepdims: Any = False) -> Any:
    """Position (int64) of the first smallest element along ``axis``, of the flattened array if None."""
    if not pr.any_tensor(a):
        return np.argmin(a, axis=axis, out=out, keepdims=keepdims)
    return _position("argmin", reduction.argmin, a, axis, out, keepdims)


def _position(name: str, op: Op, a: Any, axis: Any, out: Any, keepdims: Any) -> Any:
    pr.reject_keywords(name, out)
    x = pr.tensor(a, name)
    if axis is None:
        result = op(rules.reshape(x, (x.size,)), axis=0)
        return restore_axes(result, x.shape, tuple(range(x.ndim)), keepdims)
    index = normalize_axis(axis, x.ndim, name)
    return restore_axes(op(x, axis=index), x.shape, (index,), keepdims)


# -- truth ---------------------------------------------------------------------------------------------------


def any(a: Any, axis: Any = None, out: Any = None, keepdims: Any = False, *, where: Any = True) -> Any:
    """Whether any element over ``axis`` is true (non-zero; NaN is true). As ``np.any``."""
    if not pr.any_tensor(a, where):
        return np.any(a, axis=axis, out=out, keepdims=keepdims, **_optional(None, where))
    return _truth("any", reduction.any_, False, a, axis, out, keepdims, where)


def all(a: Any, axis: Any = None, out: Any = None, keepdims: Any = False, *, where: Any = True) -> Any:
    """Whether all elements over ``axis`` are true (non-zero; NaN is true). As ``np.all``."""
    if not pr.any_tensor(a, where):
        return np.all(a, axis=axis, out=out, keepdims=keepdims, **_optional(None, where))
    return _truth("all", reduction.all_, True, a, axis, out, keepdims, where)


def _truth(name: str, op: Op, neutral: bool, a: Any, axis: Any, out: Any, keepdims: Any, where: Any) -> Any:
    pr.reject_keywords(name, out)
    x = _masked(pr.tensor(a, name, BOOL), where, neutral, name)
    axes = normalize_axes(axis, x.ndim, name)
    return restore_axes(op(x, axes=axes), x.shape, axes, keepdims)


def count_nonzero(a: Any, axis: Any = None, *, keepdims: Any = False) -> Any:
    """Number (int64) of elements over ``axis`` that are not zero. As ``np.count_nonzero``."""
    if not pr.any_tensor(a):
        return np.count_nonzero(a, axis=axis, keepdims=keepdims)
    return sum(pr.tensor(a, "count_nonzero", BOOL), axis, INT64, keepdims=keepdims)


__all__ = [
    "all",
    "amax",
    "amin",
    "any",
    "argmax",
    "argmin",
    "average",
    "count_nonzero",
    "max",
    "mean",
    "min",
    "prod",
    "ptp",
    "std",
    "sum",
    "var",
]
