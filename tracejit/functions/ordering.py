"""NumPy's sorting, running totals, differences and order statistics on tensors.

Reached through methods, ``np.*`` dispatch and ``tracejit.functions``; on concrete arrays NumPy's own result.
"""

from __future__ import annotations

import operator
from typing import Any

import numpy as np

from tracejit.dtypes import FLOAT64, DType, canonical
from tracejit.errors import DTypeError, ShapeError, UnsupportedFunctionError
from tracejit.functions import elementwise as el
from tracejit.functions import promotion as pr
from tracejit.functions.indexing import getitem
from tracejit.functions.joining import concatenate, stack
from tracejit.functions.reductions import _accumulator as accumulator
from tracejit.functions.reductions import normalize_axes, normalize_axis
from tracejit.functions.shape import ravel, reshape_to, transpose
from tracejit.ops import elementwise as ew
from tracejit.ops import ordering as ops
from tracejit.ops.registry import Op
from tracejit.ops.registry import get as op
from tracejit.tensor import Tensor

# -- sort ------------------------------------------------------------------------------------------


def _sorting(primitive: Op, name: str, a: Any, axis: Any) -> Any:
    x = pr.tensor(a, name)
    if axis is None or (x.ndim == 0 and name == "argsort" and axis in (0, -1)):  # NumPy: argsort(3.0) is [0]
        x, axis = ravel(x), -1
    return primitive(x, axis=normalize_axis(axis, x.ndim, name))


def sort(a: Any, axis: Any = -1, kind: Any = None, order: Any = None, *, stable: Any = None) -> Any:
    """As ``np.sort``: ascending, NaN last."""
    if not pr.any_tensor(a):
        return np.sort(a, axis, kind, order, stable=stable)
    return _sorting(ops.sort, "sort", a, axis)


def argsort(a: Any, axis: Any = -1, kind: Any = None, order: Any = None, *, stable: Any = None) -> Any:
    """As ``np.argsort`` with a stable sort: equal elements keep their order."""
    if not pr.any_tensor(a):
        return np.argsort(a, axis, kind, order, stable=stable)
    return _sorting(ops.argsort, "argsort", a, axis)


def partition(a: Any, kth: Any, axis: Any = -1, kind: str = "introselect", order: Any = None) -> Any:
    """As ``np.partition``, by a full sort."""
    if not pr.any_tensor(a):
        return np.partition(a, kth, axis, kind, order)  # type: ignore[call-overload]
    return sort(a, axis)


def argpartition(a: Any, kth: Any, axis: Any = -1, kind: str = "introselect", order: Any = None) -> Any:
    """As ``np.argpartition``, by a full sort."""
    if not pr.any_tensor(a):
        return np.argpartition(a, kth, axis, kind, order)  # type: ignore[arg-type]
    return argsort(a, axis)


# -- running totals --------------------------------------------------------------------------------


def _cumulative(primitive: Op, name: str, a: Any, axis: Any, dtype: Any, out: Any) -> Tensor:
    pr.reject_keywords(name, out)
    x = pr.tensor(a, name)
    found = accumulator(x, dtype, name)
    if found.kind == "b":
        raise DTypeError.make("cannot accumulate in bool", op=name, got={"x": x}, hint="leave dtype= out")
    x = pr.tensor(x, name, found)
    if axis is None or (x.ndim == 0 and axis in (0, -1)):
        x, axis = ravel(x), 0
    return primitive(x, axis=normalize_axis(axis, x.ndim, name), reverse=False)


def cumsum(a: Any, axis: Any = None, dtype: Any = None, out: Any = None) -> Any:
    """As ``np.cumsum``: bools and small integers are added as (u)int64."""
    if not pr.any_tensor(a):
        return np.cumsum(a, axis, dtype, out)
    return _cumulative(ops.cumsum, "cumsum", a, axis, dtype, out)


def cumprod(a: Any, axis: Any = None, dtype: Any = None, out: Any = None) -> Any:
    """As ``np.cumprod``."""
    if not pr.any_tensor(a):
        return np.cumprod(a, axis, dtype, out)
    return _cumulative(ops.cumprod, "cumprod", a, axis, dtype, out)


def _cumulative_array_api(name: str, function: Any, start: int) -> Any:
    def cumulative(
        x: Any, /, *, axis: Any = None, dtype: Any = None, out: Any = None, include_initial: bool = False
    ) -> Any:
        if not pr.any_tensor(x):
            native = getattr(np, name)
            return native(x, axis=axis, dtype=dtype, out=out, include_initial=include_initial)
        if axis is None:
            if x.ndim != 1:
                raise ShapeError.make(
                    "axis must be given unless the array has one axis", op=name, got={"x": x}
                )
            axis = 0
        total = function(x, axis, dtype, out)
        if not include_initial:
            return total
        axis = normalize_axis(axis, total.ndim, name)
        shape = tuple(1 if i == axis else n for i, n in enumerate(total.shape))
        return concatenate([pr.broadcast_to(pr.tensor(start, name, total.dtype), shape), total], axis)

    cumulative.__name__ = cumulative.__qualname__ = name
    cumulative.__doc__ = f"As ``np.{name}``."
    return cumulative


cumulative_sum = _cumulative_array_api("cumulative_sum", cumsum, 0)
cumulative_prod = _cumulative_array_api("cumulative_prod", cumprod, 1)

# -- differences and integrals ---------------------------------------------------------------------


def _along(x: Any, axis: int, part: slice) -> Any:
    return getitem(x, (slice(None),) * axis + (part,))


def diff(a: Any, n: int = 1, axis: int = -1, prepend: Any = None, append: Any = None) -> Any:
    """As ``np.diff``: differences of neighbours, ``n`` times; bools differ or not."""
    ends = {
        k: v for k, v in (("prepend", prepend), ("append", append)) if v is not None and v is not np._NoValue
    }
    if not pr.any_tensor(a, *ends.values()):
        return np.diff(a, n, axis, **ends)
    x, n = pr.tensor(a, "diff"), operator.index(n)
    if n < 0:
        raise ShapeError.make(f"order must not be negative, is {n}", op="diff")
    if n == 0:
        return x
    axis = normalize_axis(axis, x.ndim, "diff")
    parts = [x]
    for key, value in ends.items():
        end = pr.tensor(value, "diff")
        if end.ndim == 0:
            end = pr.broadcast_to(end, tuple(1 if i == axis else s for i, s in enumerate(x.shape)))
        parts.insert(0 if key == "prepend" else len(parts), end)
    x = concatenate(parts, axis) if len(parts) > 1 else x
    step = el.not_equal if x.dtype.kind == "b" else el.subtract
    for _ in range(n):
        x = step(_along(x, axis, slice(1, None)), _along(x, axis, slice(None, -1)))
    return x


def ediff1d(ary: Any, to_end: Any = None, to_begin: Any = None) -> Any:
    """As ``np.ediff1d``: differences of the flattened array."""
    if not pr.any_tensor(ary, to_end, to_begin):
        return np.ediff1d(ary, to_end, to_begin)
    x = ravel(pr.tensor(ary, "ediff1d"))
    found = el.subtract(x[1:], x[:-1])
    parts = [found]
    for value, at in ((to_begin, 0), (to_end, 1)):
        if value is not None:
            parts.insert(at and len(parts), ravel(pr.tensor(value, "ediff1d", found.dtype)))
    return concatenate(parts) if len(parts) > 1 else found


def trapezoid(y: Any, x: Any = None, dx: Any = 1.0, axis: int = -1) -> Any:
    """As ``np.trapezoid``: the integral by the trapezoidal rule."""
    if not pr.any_tensor(y, x, dx):
        return np.trapezoid(y, x, dx, axis)
    values = pr.tensor(y, "trapezoid")
    axis = normalize_axis(axis, values.ndim, "trapezoid")
    width = dx
    if x is not None:
        points = pr.tensor(x, "trapezoid")
        width = diff(points, axis=axis if points.ndim > 1 else -1)
        if points.ndim == 1:
            shape = [1] * values.ndim
            shape[axis] = width.shape[0]
            width = reshape_to(width, tuple(shape))
    pairs = el.add(_along(values, axis, slice(1, None)), _along(values, axis, slice(None, -1)))
    from tracejit.functions import reductions

    return reductions.sum(el.divide(el.multiply(width, pairs), 2.0), axis)


# -- order statistics ------------------------------------------------------------------------------


def _rows(a: Any, axis: Any, name: str) -> tuple[Tensor, tuple[int, ...], tuple[int, ...]]:
    """The array with the reduced axes flattened into a sorted last one; the axes; the shape with them kept as
    one."""
    x = pr.tensor(a, name)
    if x.dtype.kind == "b" and name == "median":  # NumPy averages: counts as 0 and 1
        x = pr.tensor(x, name, FLOAT64)
    if x.dtype.kind == "b":
        raise DTypeError.make("needs numbers", op=name, got={"x": x}, hint="convert with x.astype(...)")
    axes = normalize_axes(axis, x.ndim, name)
    kept = [i for i in range(x.ndim) if i not in axes]
    flat = transpose(x, [*kept, *axes])
    count = int(np.prod([x.shape[i] for i in axes], dtype=np.int64))
    if count == 0:
        raise ShapeError.make("needs at least one element", op=name, got={"x": x})
    flat = reshape_to(flat, (*(x.shape[i] for i in kept), count))
    shape = tuple(1 if i in axes else n for i, n in enumerate(x.shape))
    return ops.sort(flat, axis=flat.ndim - 1), axes, shape


def _at(rows: Tensor, i: int) -> Tensor:
    return getitem(rows, (..., i))


def _nan_if_any(rows: Tensor, value: Tensor) -> Tensor:
    """NaN sorts last: if the last element is NaN, so is the statistic."""
    if rows.dtype.kind != "f":
        return value
    return ew.where(op("isnan")(_at(rows, -1)), pr.constant_like(value, np.nan), value)


def median(
    a: Any, axis: Any = None, out: Any = None, overwrite_input: bool = False, keepdims: bool = False
) -> Any:
    """As ``np.median``: NaN if any element is."""
    if not pr.any_tensor(a):
        return np.median(a, axis, out, overwrite_input, keepdims)
    pr.reject_keywords("median", out)
    rows, _, shape = _rows(a, axis, "median")
    n = rows.shape[-1]
    dtype = rows.dtype if rows.dtype.kind == "f" else FLOAT64
    high = pr.tensor(_at(rows, n // 2), "median", dtype)
    if n % 2 == 0:
        low = pr.tensor(_at(rows, n // 2 - 1), "median", dtype)
        high = ew.div(ew.add(low, high), pr.constant_like(high, 2))
    result = _nan_if_any(rows, high)
    return reshape_to(result, shape) if keepdims else result


def quantile(
    a: Any,
    q: Any,
    axis: Any = None,
    out: Any = None,
    overwrite_input: bool = False,
    method: str = "linear",
    keepdims: bool = False,
    **kwargs: Any,
) -> Any:
    """As ``np.quantile`` with the methods linear, lower, higher, nearest and midpoint; ``q`` must be
    known."""
    if not pr.any_tensor(a, q):
        return np.quantile(a, q, axis, out, overwrite_input, method, keepdims, **kwargs)  # type: ignore[call-overload]
    pr.reject_keywords("quantile", out, weights=kwargs.get("weights"))
    fractions = np.asarray(q, dtype=None)
    if not np.all((fractions >= 0) & (fractions <= 1)):
        raise ShapeError.make("quantiles must be in the range [0, 1]", op="quantile", got={"q": q})
    rows, _, shape = _rows(a, axis, "quantile")
    dtype = np.quantile(np.zeros(1, rows.dtype), q, method=method).dtype  # type: ignore[call-overload]
    results = [_quantile(rows, float(f), method, canonical(dtype)) for f in fractions.ravel()]
    results = [reshape_to(r, shape) if keepdims else r for r in results]
    if fractions.ndim == 0:
        return results[0]
    stacked = stack(results)
    return reshape_to(stacked, fractions.shape + stacked.shape[1:])


def _quantile(rows: Tensor, fraction: float, method: str, dtype: DType) -> Tensor:
    n = rows.shape[-1]
    position = fraction * (n - 1)
    low, high = int(np.floor(position)), min(int(np.floor(position)) + 1, n - 1)
    exact = position == low
    if method == "linear":
        weight = position - low
    elif method in ("lower", "higher"):
        weight = 0.0 if exact or method == "lower" else 1.0
    elif method == "nearest":
        weight = float(int(np.rint(position)) - low)
    elif method == "midpoint":
        weight = 0.0 if exact else 0.5
    else:
        raise UnsupportedFunctionError.make(
            f"method={method!r} is not supported in traced code", op="quantile"
        )
    a, b = _at(rows, low), _at(rows, high)
    # NumPy's interpolation: the step in the dtype of the data, the rest in the dtype of the result, and from
    # the nearer end, so that it is exact at both.
    step = pr.tensor(ew.sub(b, a), "quantile", dtype)
    a, b = (pr.tensor(v, "quantile", dtype) for v in (a, b))
    if weight in (0.0, 1.0):
        return _nan_if_any(rows, b if weight else a)
    if weight < 0.5:
        value = ew.add(a, ew.mul(step, pr.constant_like(step, weight)))
    else:
        value = ew.sub(b, ew.mul(step, pr.constant_like(step, 1 - weight)))
    return _nan_if_any(rows, value)


def percentile(
    a: Any,
    q: Any,
    axis: Any = None,
    out: Any = None,
    overwrite_input: bool = False,
    method: str = "linear",
    keepdims: bool = False,
    **kwargs: Any,
) -> Any:
    """As ``np.percentile``: quantiles in hundredths."""
    if not pr.any_tensor(a, q):
        return np.percentile(a, q, axis, out, overwrite_input, method, keepdims, **kwargs)  # type: ignore[call-overload]
    fractions = q / 100 if type(q) in (int, float) else np.true_divide(np.asarray(q), 100)[()]
    return quantile(a, fractions, axis, out, overwrite_input, method, keepdims, **kwargs)


__all__ = [
    "argpartition",
    "argsort",
    "cumprod",
    "cumsum",
    "cumulative_prod",
    "cumulative_sum",
    "diff",
    "ediff1d",
    "median",
    "partition",
    "percentile",
    "quantile",
    "sort",
    "trapezoid",
]
