"""NumPy's elementwise functions that are not ufuncs: selection, clipping, rounding to decimals, dtype conversion.

Re-exported by ``tracejit.functions``; on concrete arrays each is NumPy's own.
"""

from __future__ import annotations

import builtins
import math
from typing import Any

import numpy as np

from tracejit.dtypes import BOOL, canonical
from tracejit.errors import TracingError, UnsupportedFunctionError
from tracejit.functions import elementwise as el
from tracejit.functions import promotion as pr
from tracejit.functions import reductions
from tracejit.ops import elementwise as ew
from tracejit.source import named_scope
from tracejit.tensor import Tensor


def where(condition: Any, x: Any = None, y: Any = None, /) -> Any:
    """Elements of ``x`` where ``condition`` holds, of ``y`` elsewhere; all three broadcast. As ``np.where``.

    ``where(condition)`` alone is an UnsupportedFunctionError: the shape of its result depends on values.
    """
    if x is None and y is None:
        if not pr.any_tensor(condition):
            return np.where(condition)
        raise UnsupportedFunctionError.make(
            "with one argument the shape of the result depends on values, which are not known while tracing",
            op="where",
            got={"condition": condition},
            hint="use np.where(condition, x, y)",
        )
    if not pr.any_tensor(condition, x, y):
        return np.where(condition, x, y)
    dtype = pr.common_dtype("where", x, y)
    mask = pr.tensor(condition, "where", BOOL)
    return ew.where(*pr.broadcast("where", mask, pr.tensor(x, "where", dtype), pr.tensor(y, "where", dtype)))


def clip(
    a: Any,
    a_min: Any = None,
    a_max: Any = None,
    out: Any = None,
    *,
    min: Any = None,
    max: Any = None,
    **kwargs: Any,
) -> Any:
    """``a`` limited to ``[a_min, a_max]``; either may be None. As ``np.clip``.

    The gradient is that of ``minimum(maximum(a, a_min), a_max)``: half at a limit itself.
    """
    low = a_min if min is None else min
    high = a_max if max is None else max
    if (min is not None and a_min is not None) or (max is not None and a_max is not None):
        raise ValueError(
            "Passing `min` or `max` keyword argument when `a_min` and `a_max` are provided is forbidden."
        )
    if not pr.any_tensor(a, low, high):
        return np.clip(a, low, high, out=out, **kwargs)
    dtype = kwargs.pop("dtype", None)
    pr.reject_keywords("clip", out, **kwargs)
    low, high = (_within(v, a, dtype) for v in (low, high))
    given = [v for v in (a, low, high) if v is not None]
    found = pr.common_dtype("clip", *given) if dtype is None else canonical(dtype, op="clip")
    result: Any = pr.tensor(a, "clip", found)
    if low is not None:
        result = el.maximum(result, pr.tensor(low, "clip", found))
    if high is not None:
        result = el.minimum(result, pr.tensor(high, "clip", found))
    return result


def _within(limit: Any, a: Any, dtype: Any) -> Any:
    """A Python integer that the integer dtype of ``a`` cannot hold limits nothing or everything: its nearest value."""
    kind = np.dtype(dtype) if dtype is not None else getattr(a, "dtype", None)
    if type(limit) is not int or kind is None or kind.kind not in "iu" or pr.is_weak(a):
        return limit
    info = np.iinfo(kind)
    return builtins.min(builtins.max(limit, info.min), info.max)


def round(a: Any, decimals: int = 0, out: Any = None) -> Any:
    """``a`` rounded to ``decimals`` places, halves to even; negative ``decimals`` round left of the point.

    As ``np.round``, including its way of scaling by a power of ten.
    """
    if not pr.any_tensor(a):
        return np.round(a, decimals, out=out)
    pr.reject_keywords("round", out)
    if a.dtype.kind in "iu":
        if decimals >= 0:
            return a
        step = pr.tensor(float(10.0**-decimals), "round", np.dtype(np.float64))
        scaled = ew.rint(el.divide(a, step))
        return ew.convert(el.multiply(scaled, step), dtype=a.dtype)
    if decimals == 0:
        return el.rint(a)
    a = pr.tensor(a, "round", pr.ufunc_dtypes(np.rint, (a,))[0])
    factor = float(10.0 ** (decimals if decimals > 0 else -decimals))
    if decimals > 0:
        return ew.rint(a * factor) / factor
    return ew.rint(a / factor) * factor


around = round


def fix(x: Any, out: Any = None) -> Any:
    """As ``np.fix``: the fraction cut off, towards zero."""
    if not pr.any_tensor(x):
        return np.fix(x, out=out)
    return el.trunc(x, out=out)


def sinc(x: Any) -> Any:
    """``sin(πx)/(πx)``, 1 at 0. As ``np.sinc``, with the right gradient (0) at 0."""
    if not pr.any_tensor(x):
        return np.sinc(x)
    with named_scope("sinc"):
        x = pr.tensor(x, "sinc", pr.ufunc_dtypes(np.multiply, (x, 1.0))[-1])
        zero = ew.equal(x, pr.constant_like(x, 0.0))
        y = ew.where(zero, pr.constant_like(x, 1.0), x) * math.pi
        return ew.where(zero, pr.constant_like(x, 1.0), ew.div(ew.sin(y), y))


def nan_to_num(x: Any, copy: bool = True, nan: float = 0.0, posinf: Any = None, neginf: Any = None) -> Any:
    """NaN replaced by ``nan``, infinities by ``posinf``/``neginf`` (the largest finite numbers by default)."""
    if not pr.any_tensor(x):
        return np.nan_to_num(x, copy=copy, nan=nan, posinf=posinf, neginf=neginf)
    if not copy:
        raise TracingError.make(
            "copy=False writes into the operand, which is immutable in traced code", op="nan_to_num"
        )
    if x.dtype.kind != "f":
        return pr.tensor(x, "nan_to_num")
    with named_scope("nan_to_num"):
        x = pr.tensor(x, "nan_to_num")
        top, bottom = pr.constant_like(x, math.inf), pr.constant_like(x, -math.inf)
        limits = np.finfo(x.dtype)
        high = pr.constant_like(x, float(limits.max) if posinf is None else posinf)
        low = pr.constant_like(x, float(limits.min) if neginf is None else neginf)
        finite = ew.where(ew.equal(x, top), high, ew.where(ew.equal(x, bottom), low, x))
        return ew.where(ew.isnan(x), pr.constant_like(x, nan), finite)


def astype(x: Any, dtype: Any, /, *, copy: bool = True, device: Any = None) -> Any:
    """``x`` converted to ``dtype`` as NumPy converts: float to int cuts the fraction, non-zero is True."""
    if not pr.any_tensor(x):
        return np.asarray(x).astype(dtype, copy=copy)
    return pr.tensor(x, "astype", canonical(dtype, op="astype"))


def isclose(a: Any, b: Any, rtol: Any = 1e-05, atol: Any = 1e-08, equal_nan: bool = False) -> Any:
    """``|a - b| ≤ atol + rtol·|b|``, elementwise; equal infinities are close. As ``np.isclose``."""
    if not pr.any_tensor(a, b, rtol, atol):
        return np.isclose(a, b, rtol=rtol, atol=atol, equal_nan=equal_nan)
    with named_scope("isclose"):
        dtype = pr.common_dtype("isclose", b, 1.0)
        y = pr.tensor(b, "isclose", dtype)
        distance = el.absolute(el.subtract(a, y))
        bound = el.add(atol, el.multiply(rtol, el.absolute(y)))
        near = el.logical_and(el.less_equal(distance, bound), el.isfinite(y))
        result = el.logical_or(near, el.equal(a, y))
        if equal_nan:
            result = el.logical_or(result, el.logical_and(el.isnan(a), el.isnan(y)))
        return result


def allclose(a: Any, b: Any, rtol: Any = 1e-05, atol: Any = 1e-08, equal_nan: bool = False) -> Any:
    """Whether all elements are close: a bool tensor of shape (). As ``np.allclose``."""
    if not pr.any_tensor(a, b, rtol, atol):
        return np.allclose(a, b, rtol=rtol, atol=atol, equal_nan=equal_nan)
    return reductions.all(isclose(a, b, rtol, atol, equal_nan))


def array_equal(a1: Any, a2: Any, equal_nan: bool = False) -> Any:
    """Whether shapes and elements are equal: False at once for different shapes, else a bool tensor of shape ()."""
    if not pr.any_tensor(a1, a2):
        return np.array_equal(a1, a2, equal_nan=equal_nan)
    if pr.shape_of(a1, "array_equal") != pr.shape_of(a2, "array_equal"):
        return False
    same = el.equal(a1, a2)
    if equal_nan:
        same = el.logical_or(same, el.logical_and(el.isnan(a1), el.isnan(a2)))
    return reductions.all(same)


def isposinf(x: Any, out: Any = None) -> Any:
    """Where ``x`` is +∞."""
    if not pr.any_tensor(x):
        return np.isposinf(x, out=out)
    pr.reject_keywords("isposinf", out)
    return el.equal(x, math.inf)


def isneginf(x: Any, out: Any = None) -> Any:
    """Where ``x`` is -∞."""
    if not pr.any_tensor(x):
        return np.isneginf(x, out=out)
    pr.reject_keywords("isneginf", out)
    return el.equal(x, -math.inf)


def real(val: Any) -> Any:
    """``val`` itself: there are no complex numbers."""
    return val if isinstance(val, Tensor) else np.real(val)


def imag(val: Any) -> Any:
    """Zeros: there are no complex numbers."""
    return pr.constant_like(val, 0) if isinstance(val, Tensor) else np.imag(val)


def conjugate(x: Any, **kwargs: Any) -> Any:
    """``x`` itself: there are no complex numbers."""
    return x if isinstance(x, Tensor) else np.conjugate(x, **kwargs)


conj = conjugate


def isreal(x: Any) -> Any:
    """True everywhere: there are no complex numbers."""
    return (
        pr.broadcast_to(pr.tensor(True, "isreal", BOOL), x.shape) if isinstance(x, Tensor) else np.isreal(x)
    )


def iscomplex(x: Any) -> Any:
    """False everywhere: there are no complex numbers."""
    return el.logical_not(isreal(x)) if isinstance(x, Tensor) else np.iscomplex(x)


def real_if_close(a: Any, tol: float = 100) -> Any:
    """``a`` itself: there are no complex numbers."""
    return a if isinstance(a, Tensor) else np.real_if_close(a, tol)


def angle(z: Any, deg: bool = False) -> Any:
    """π (or 180) for negative numbers, else 0; NaN for NaN. As ``np.angle`` of real numbers."""
    if not isinstance(z, Tensor):
        return np.angle(z, deg)
    return el.arctan2(0.0, z) * (180 / math.pi if deg else 1.0)


def copy(a: Any, order: str = "K", subok: bool = False) -> Any:
    """``a`` itself if it is a tensor, since recorded values are immutable; else a copy."""
    return a if isinstance(a, Tensor) else np.copy(a, order=order, subok=subok)  # type: ignore[call-overload]


__all__ = [
    "allclose", "angle", "around", "array_equal", "astype", "clip", "conj", "conjugate", "copy", "fix", "imag", "isclose",
    "iscomplex", "isneginf", "isposinf", "isreal", "nan_to_num", "real", "real_if_close", "round", "sinc", "where",
]  # fmt: skip
