"""NumPy's numerical analysis on tensors: finite differences, convolution, interpolation, polynomials, covariance.

All are composites of other functions. Reached through ``np.*`` dispatch; on concrete arrays NumPy's own result.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tracejit.dtypes import FLOAT64
from tracejit.errors import ShapeError, UnsupportedFunctionError
from tracejit.functions import creation, joining, linalg, ordering
from tracejit.functions import elementwise as el
from tracejit.functions import numeric as nm
from tracejit.functions import promotion as pr
from tracejit.functions import reductions as rd
from tracejit.functions import shape as sh
from tracejit.functions.indexing import searchsorted, take
from tracejit.source import named_scope
from tracejit.tensor import Tensor


def _float(x: Any, op: str) -> Tensor:
    """``x`` as the floating-point tensor that NumPy computes in."""
    return pr.tensor(x, op, pr.common_dtype(op, x, 1.0) if not pr.is_weak(x) else FLOAT64)


# -- differences and products along an axis ------------------------------------------------------------------------


def gradient(f: Any, *varargs: Any, axis: Any = None, edge_order: int = 1) -> Any:
    """As ``np.gradient``: central differences inside, one-sided ones of order 1 or 2 at the ends."""
    if not pr.any_tensor(f, *varargs):
        return np.gradient(f, *varargs, axis=axis, edge_order=edge_order)  # type: ignore[call-overload]
    if edge_order not in (1, 2):
        raise ValueError("'edge_order' must be 1 or 2")
    x = _float(f, "gradient")
    axes = rd.normalize_axes(axis, x.ndim, "gradient")
    steps = list(varargs) or [1.0]
    steps = steps * len(axes) if len(steps) == 1 else steps
    if len(steps) != len(axes):
        raise TypeError("invalid number of arguments")
    for i in axes:
        if x.shape[i] < edge_order + 1:
            raise ShapeError.make(
                f"axis {i} needs at least edge_order + 1 = {edge_order + 1} elements",
                op="gradient",
                got={"f": x},
            )
    with named_scope("gradient"):
        found = [_gradient(x, i, h, edge_order) for i, h in zip(axes, steps, strict=True)]
    if np.ndim(axis) == 0 and axis is not None:
        return found[0]
    return found[0] if len(found) == 1 else tuple(found)


def _gradient(x: Tensor, axis: int, spacing: Any, order: int) -> Any:
    y = sh.moveaxis(x, axis, -1)
    if pr.shape_of(spacing, "gradient") == ():
        before = after = spacing
        inner = (y[..., 2:] - y[..., :-2]) / (2.0 * spacing)
        first = last = second = second_last = spacing
    else:
        h = ordering.diff(_float(spacing, "gradient"))
        before, after = h[:-1], h[1:]
        inner = (
            y[..., :-2] * (-after / (before * (before + after)))
            + y[..., 1:-1] * ((after - before) / (before * after))
            + y[..., 2:] * (before / (after * (before + after)))
        )
        first, last = h[0], h[-1]
        second, second_last = (h[1], h[-2]) if order == 2 else (first, last)
    if order == 1:
        low = (y[..., 1:2] - y[..., :1]) / first
        high = (y[..., -1:] - y[..., -2:-1]) / last
    else:
        low = _edge(y[..., :1], y[..., 1:2], y[..., 2:3], first, second)
        high = -_edge(y[..., -1:], y[..., -2:-1], y[..., -3:-2], last, second_last)
    return sh.moveaxis(joining.concatenate([low, inner, high], -1), -1, axis)


def _edge(y0: Any, y1: Any, y2: Any, h1: Any, h2: Any) -> Any:
    """The derivative at the first of three points, of second order."""
    a = -(2.0 * h1 + h2) / (h1 * (h1 + h2))
    return a * y0 + (h1 + h2) / (h1 * h2) * y1 - h1 / (h2 * (h1 + h2)) * y2


def cross(a: Any, b: Any, axisa: int = -1, axisb: int = -1, axisc: int = -1, axis: Any = None) -> Any:
    """As ``np.cross`` for vectors of three components."""
    if not pr.any_tensor(a, b):
        return np.cross(a, b, axisa, axisb, axisc, axis)
    if axis is not None:
        axisa = axisb = axisc = axis
    x, y = sh.moveaxis(pr.tensor(a, "cross"), axisa, -1), sh.moveaxis(pr.tensor(b, "cross"), axisb, -1)
    if x.shape[-1] != 3 or y.shape[-1] != 3:
        raise ShapeError.make("vectors must have three components", op="cross", got={"a": x, "b": y})
    with named_scope("cross"):
        parts = [x[..., i] * y[..., j] - x[..., j] * y[..., i] for i, j in ((1, 2), (2, 0), (0, 1))]
        return sh.moveaxis(joining.stack(parts, -1), -1, axisc)


def apply_along_axis(func1d: Callable[..., Any], axis: int, arr: Any, *args: Any, **kwargs: Any) -> Any:
    """As ``np.apply_along_axis``; the function is recorded once, for all rows."""
    if not pr.any_tensor(arr):
        return np.apply_along_axis(func1d, axis, arr, *args, **kwargs)
    from tracejit.batching import vmap

    x = pr.tensor(arr, "apply_along_axis")
    axis = rd.normalize_axis(axis, x.ndim, "apply_along_axis")
    rows = sh.moveaxis(x, axis, -1)
    outer = rows.shape[:-1]
    found = vmap(lambda row: func1d(row, *args, **kwargs))(rows.reshape((-1, x.shape[axis])))
    found = found.reshape((*outer, *found.shape[1:]))
    for i in range(found.ndim - len(outer)):
        found = sh.moveaxis(found, len(outer) + i, axis + i)
    return found


# -- convolution, interpolation, polynomials -----------------------------------------------------------------------


def convolve(a: Any, v: Any, mode: str = "full") -> Any:
    """As ``np.convolve``, by one matrix product with the shifted signal."""
    if not pr.any_tensor(a, v):
        return np.convolve(a, v, mode)  # type: ignore[call-overload]
    dtype = pr.common_dtype("convolve", a, v)
    x, y = sh.ravel(pr.tensor(a, "convolve", dtype)), sh.ravel(pr.tensor(v, "convolve", dtype))
    if min(x.size, y.size) == 0:
        raise ShapeError.make("both arrays need elements", op="convolve", got={"a": x, "v": y})
    x, y = (x, y) if x.size >= y.size else (y, x)
    n, m = x.size, y.size
    with named_scope("convolve"):
        padded = joining.pad(x, m - 1)
        windows = take(padded, np.arange(n + m - 1)[:, None] + np.arange(m))
        full = linalg.matmul(windows, y[::-1])
    if mode == "full":
        return full
    if mode not in ("same", "valid"):
        raise ValueError(f"mode must be one of 'valid', 'same', or 'full' (got {mode!r})")
    start, count = ((m - 1) // 2, n) if mode == "same" else (m - 1, n - m + 1)
    return full[start : start + count]


def correlate(a: Any, v: Any, mode: str = "valid") -> Any:
    """As ``np.correlate``."""
    if not pr.any_tensor(a, v):
        return np.correlate(a, v, mode)  # type: ignore[call-overload]
    x, y = pr.tensor(a, "correlate"), pr.tensor(v, "correlate")
    if x.size >= y.size or mode == "full":
        return convolve(x, y[::-1], mode)
    return convolve(y, x[::-1], mode)[::-1]


def interp(x: Any, xp: Any, fp: Any, left: Any = None, right: Any = None, period: Any = None) -> Any:
    """As ``np.interp``: piecewise linear through ``(xp, fp)``, constant outside; float64 as in NumPy."""
    if not pr.any_tensor(x, xp, fp, left, right):
        return np.interp(x, xp, fp, left, right, period)
    if period is not None:
        raise UnsupportedFunctionError.make("period= cannot be traced", op="interp", hint="take x % period")
    at, knots, values = (pr.tensor(v, "interp", FLOAT64) for v in (x, xp, fp))
    if knots.ndim != 1 or knots.shape != values.shape or not knots.size:
        raise ShapeError.make("xp and fp must be 1-D of one length", op="interp", got={"xp": xp, "fp": fp})
    low = values[0] if left is None else left
    high = values[-1] if right is None else right
    with named_scope("interp"):
        if knots.size == 1:
            inside = sh.broadcast_to(values[0], at.shape)
        else:
            j = nm.clip(searchsorted(knots, at, side="right") - 1, 0, knots.size - 2)
            x0, y0 = take(knots, j), take(values, j)
            slope = (take(values, j + 1) - y0) / (take(knots, j + 1) - x0)
            inside = nm.where(at == knots[-1], values[-1], slope * (at - x0) + y0)
        return nm.where(at < knots[0], low, nm.where(at > knots[-1], high, inside))


def polyval(p: Any, x: Any) -> Any:
    """As ``np.polyval``, by Horner's rule."""
    if not pr.any_tensor(p, x):
        return np.polyval(p, x)
    coefficients = p if isinstance(p, Tensor) else np.asarray(p)
    y: Any = creation.zeros_like(x) if isinstance(x, Tensor) else np.zeros_like(x)
    with named_scope("polyval"):
        for i in range(coefficients.shape[0]):
            y = y * x + coefficients[i]
    return y


def vander(x: Any, N: Any = None, increasing: bool = False) -> Any:
    """As ``np.vander``: powers of ``x`` as columns."""
    if not pr.any_tensor(x):
        return np.vander(x, N, increasing)
    n = x.shape[0] if N is None else operator.index(N)
    dtype = np.promote_types(x.dtype, int)
    powers = np.arange(n) if increasing else np.arange(n)[::-1]
    return pr.tensor(x, "vander", dtype)[:, None] ** powers.astype(dtype)


def piecewise(x: Any, condlist: Any, funclist: Sequence[Any], *args: Any, **kw: Any) -> Any:
    """As ``np.piecewise``; each function is applied to all of ``x`` and its values selected."""
    conditions = list(condlist) if isinstance(condlist, list | tuple) else [condlist]
    if not pr.any_tensor(x, *conditions):
        return np.piecewise(x, condlist, funclist, *args, **kw)
    if len(funclist) not in (len(conditions), len(conditions) + 1):
        raise ValueError(f"with {len(conditions)} condition(s), as many functions or one more are expected")
    x = pr.tensor(x, "piecewise")
    values = [f(x, *args, **kw) if callable(f) else f for f in funclist]
    result = values.pop() if len(values) > len(conditions) else 0
    for condition, value in zip(conditions, values, strict=True):
        result = nm.where(condition, value, result)
    return sh.broadcast_to(nm.astype(pr.tensor(result, "piecewise"), x.dtype), x.shape)


def digitize(x: Any, bins: Any, right: bool = False) -> Any:
    """As ``np.digitize``; bins that are traced must increase."""
    if not pr.any_tensor(x, bins):
        return np.digitize(x, bins, right)
    side = "left" if right else "right"
    if not isinstance(bins, Tensor) and np.all(np.diff(bins) <= 0) and len(bins) > 1:
        return len(bins) - searchsorted(np.asarray(bins)[::-1], x, side="right" if right else "left")
    return searchsorted(bins, x, side=side)


# -- statistics ----------------------------------------------------------------------------------------------------


def cov(
    m: Any, y: Any = None, rowvar: bool = True, bias: bool = False, ddof: Any = None, *, dtype: Any = None
) -> Any:
    """As ``np.cov`` without weights: rows are variables, columns observations."""
    if not pr.any_tensor(m, y):
        return np.cov(m, y, rowvar, bias, ddof, dtype=dtype)
    parts = [_variables(v, rowvar, dtype) for v in (m, y) if v is not None]
    x = parts[0] if len(parts) == 1 else joining.concatenate(parts, 0)
    n = x.shape[1] - ((0 if bias else 1) if ddof is None else ddof)
    with named_scope("cov"):
        centred = x - rd.mean(x, axis=1, keepdims=True)
        return sh.squeeze(linalg.matmul(centred, centred.T) / max(n, 0))


def _variables(value: Any, rowvar: bool, dtype: Any) -> Tensor:
    x = pr.tensor(
        value, "cov", np.dtype(dtype) if dtype is not None else np.result_type(value.dtype, FLOAT64)
    )
    if x.ndim > 2:
        raise ShapeError.make("at most two axes", op="cov", got={"m": x})
    x = sh.atleast_2d(x)
    return x if rowvar or x.shape[0] == 1 else x.T


def corrcoef(x: Any, y: Any = None, rowvar: bool = True, *, dtype: Any = None) -> Any:
    """As ``np.corrcoef``: covariances over the standard deviations, within [-1, 1]."""
    if not pr.any_tensor(x, y):
        return np.corrcoef(x, y, rowvar, dtype=dtype)
    c = cov(x, y, rowvar, dtype=dtype)
    with named_scope("corrcoef"):
        if c.ndim == 0:
            return c / c
        deviation = el.sqrt(linalg.diagonal(c))
        return nm.clip(c / deviation[:, None] / deviation[None, :], -1.0, 1.0)


# -- ufunc methods -------------------------------------------------------------------------------------------------


def logaddexp_reduce(a: Any, axis: Any = 0, out: Any = None, keepdims: bool = False) -> Any:
    """``np.logaddexp.reduce``: log of the sum of exponentials, stable."""
    pr.reject_keywords("logaddexp.reduce", out)
    x = _float(a, "logaddexp")
    with named_scope("logsumexp"):
        top = rd.max(x, axis=axis, keepdims=True)
        # Where all are -inf (or one is inf) the shift is left out, so that inf - inf never appears.
        shift = nm.where(el.isfinite(top), top, 0)
        total = el.log(rd.sum(el.exp(x - shift), axis=axis, keepdims=True)) + shift
        return total if keepdims else sh.squeeze(total, rd.normalize_axes(axis, x.ndim, "logaddexp"))


def maximum_accumulate(a: Any, axis: int = 0, dtype: Any = None) -> Any:
    """``np.maximum.accumulate``."""
    return _running(el.maximum, a, axis)


def minimum_accumulate(a: Any, axis: int = 0, dtype: Any = None) -> Any:
    """``np.minimum.accumulate``."""
    return _running(el.minimum, a, axis)


def _running(function: Any, a: Any, axis: int) -> Any:
    """A running extremum by doubling: after k rounds each element covers the 2**k before it."""
    x = pr.tensor(a, function.__name__)
    axis = rd.normalize_axis(axis, x.ndim, function.__name__)
    x, k = sh.moveaxis(x, axis, -1), 1
    while k < x.shape[-1]:
        x = joining.concatenate([x[..., :k], function(x[..., k:], x[..., :-k])], -1)
        k *= 2
    return sh.moveaxis(x, -1, axis)


__all__ = [
    "apply_along_axis", "convolve", "corrcoef", "correlate", "cov", "cross", "digitize", "gradient", "interp",
    "logaddexp_reduce", "maximum_accumulate", "minimum_accumulate", "piecewise", "polyval", "vander",
]  # fmt: skip
