"""NumPy's reductions that ignore NaN.

Re-exported by ``tracejit.functions``; on concrete arrays NumPy's own result.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tracejit.functions import elementwise as el
from tracejit.functions import promotion as pr
from tracejit.functions import reductions as rd
from tracejit.functions.indexing import take_along_axis
from tracejit.functions.ordering import _rows, cumprod, cumsum, median
from tracejit.functions.shape import reshape_to
from tracejit.ops import elementwise as ew
from tracejit.tensor import Tensor

_NO_VALUE: Any = getattr(np, "_NoValue", None)


def nansum(
    a: Any, axis: Any = None, dtype: Any = None, out: Any = None, keepdims: Any = False, **kwargs: Any
) -> Any:
    """:func:`~tracejit.functions.reductions.sum` with NaN counted as 0."""
    if not pr.any_tensor(a):
        return np.nansum(a, axis=axis, dtype=dtype, out=out, keepdims=keepdims, **_given_only(kwargs))
    return rd.sum(_replace_nan(a, 0.0, "nansum"), axis, dtype, out, keepdims, **_given_only(kwargs))


def nanprod(
    a: Any, axis: Any = None, dtype: Any = None, out: Any = None, keepdims: Any = False, **kwargs: Any
) -> Any:
    """:func:`~tracejit.functions.reductions.prod` with NaN counted as 1."""
    if not pr.any_tensor(a):
        return np.nanprod(a, axis=axis, dtype=dtype, out=out, keepdims=keepdims, **_given_only(kwargs))
    return rd.prod(_replace_nan(a, 1.0, "nanprod"), axis, dtype, out, keepdims, **_given_only(kwargs))


def nanmean(
    a: Any,
    axis: Any = None,
    dtype: Any = None,
    out: Any = None,
    keepdims: Any = False,
    *,
    where: Any = _NO_VALUE,
) -> Any:
    """:func:`~tracejit.functions.reductions.mean` of the elements that are not NaN; NaN where there are none."""
    if not pr.any_tensor(a, where):
        return np.nanmean(
            a, axis=axis, dtype=dtype, out=out, keepdims=keepdims, **_given_only({"where": where})
        )
    x, valid = _valid(a, where, "nanmean")
    return rd.mean(x, axis, dtype, out, keepdims, where=valid)


def nanvar(
    a: Any,
    axis: Any = None,
    dtype: Any = None,
    out: Any = None,
    ddof: Any = 0,
    keepdims: Any = False,
    *,
    where: Any = _NO_VALUE,
    **kwargs: Any,
) -> Any:
    """:func:`~tracejit.functions.reductions.var` of the elements that are not NaN."""
    if not pr.any_tensor(a, where):
        return np.nanvar(a, axis, dtype, out, ddof, keepdims, **_given_only({"where": where, **kwargs}))
    x, valid = _valid(a, where, "nanvar")
    variance = rd.var(x, axis, dtype, out, ddof, keepdims, where=valid, **_given_only(kwargs))
    if x.dtype.kind != "f":
        return variance
    # NumPy: as many elements as degrees of freedom taken away, or fewer, have no variance.
    count = rd.sum(pr.tensor(valid, "nanvar", x.dtype), axis, keepdims=keepdims)
    correction = kwargs.get("correction", ddof)
    enough = el.greater(count, ddof if correction is _NO_VALUE else correction)
    return ew.where(enough, variance, pr.constant_like(variance, np.nan))


def nanstd(
    a: Any, axis: Any = None, dtype: Any = None, out: Any = None, ddof: Any = 0, *args: Any, **kwargs: Any
) -> Any:
    """:func:`~tracejit.functions.reductions.std` of the elements that are not NaN."""
    if not pr.any_tensor(a, kwargs.get("where")):
        return np.nanstd(a, axis, dtype, out, ddof, *args, **_given_only(kwargs))
    return el.sqrt(nanvar(a, axis, dtype, out, ddof, *args, **kwargs))


def _valid(a: Any, where: Any, op: str) -> tuple[Tensor, Any]:
    """``a`` without NaN, and the mask of what counts."""
    x = pr.tensor(a, op)
    valid = el.logical_not(el.isnan(x))
    if where is not None and where is not _NO_VALUE and where is not True:
        valid = el.logical_and(valid, where)
    return _replace_nan(x, 0.0, op), valid


def nanmax(a: Any, axis: Any = None, out: Any = None, keepdims: Any = False, **kwargs: Any) -> Any:
    """:func:`~tracejit.functions.reductions.max` of the elements that are not NaN; NaN where there are none."""
    if not pr.any_tensor(a):
        return np.nanmax(a, axis=axis, out=out, keepdims=keepdims, **_given_only(kwargs))
    return _nan_extremum("nanmax", rd.max, -np.inf, a, axis, out, keepdims, kwargs)


def nanmin(a: Any, axis: Any = None, out: Any = None, keepdims: Any = False, **kwargs: Any) -> Any:
    """:func:`~tracejit.functions.reductions.min` of the elements that are not NaN; NaN where there are none."""
    if not pr.any_tensor(a):
        return np.nanmin(a, axis=axis, out=out, keepdims=keepdims, **_given_only(kwargs))
    return _nan_extremum("nanmin", rd.min, np.inf, a, axis, out, keepdims, kwargs)


def _nan_extremum(
    name: str,
    function: Callable[..., Any],
    neutral: float,
    a: Any,
    axis: Any,
    out: Any,
    keepdims: Any,
    kwargs: Any,
) -> Any:
    x = pr.tensor(a, name)
    if x.dtype.kind != "f":
        return function(x, axis, out, keepdims, **_given_only(kwargs))
    found = function(_replace_nan(x, neutral, name), axis, out, keepdims, **_given_only(kwargs))
    nothing = rd.all(el.isnan(x), axis, keepdims=keepdims)
    return ew.where(nothing, pr.constant_like(found, np.nan), found)


def nanargmax(a: Any, axis: Any = None, out: Any = None, *, keepdims: Any = False) -> Any:
    """As ``np.nanargmax``; 0 where all elements are NaN, which NumPy refuses but whose values are not known here."""
    if not pr.any_tensor(a):
        return np.nanargmax(a, axis=axis, out=out, keepdims=keepdims)
    return rd.argmax(_replace_nan(a, -np.inf, "nanargmax"), axis, out, keepdims=keepdims)


def nanargmin(a: Any, axis: Any = None, out: Any = None, *, keepdims: Any = False) -> Any:
    """As ``np.nanargmin``; 0 where all elements are NaN, which NumPy refuses but whose values are not known here."""
    if not pr.any_tensor(a):
        return np.nanargmin(a, axis=axis, out=out, keepdims=keepdims)
    return rd.argmin(_replace_nan(a, np.inf, "nanargmin"), axis, out, keepdims=keepdims)


def nancumsum(a: Any, axis: Any = None, dtype: Any = None, out: Any = None) -> Any:
    """As ``np.nancumsum``: a running total that counts NaN as 0."""
    if not pr.any_tensor(a):
        return np.nancumsum(a, axis=axis, dtype=dtype, out=out)
    return cumsum(_replace_nan(a, 0.0, "nancumsum"), axis, dtype, out)


def nancumprod(a: Any, axis: Any = None, dtype: Any = None, out: Any = None) -> Any:
    """As ``np.nancumprod``: a running product that counts NaN as 1."""
    if not pr.any_tensor(a):
        return np.nancumprod(a, axis=axis, dtype=dtype, out=out)
    return cumprod(_replace_nan(a, 1.0, "nancumprod"), axis, dtype, out)


def nanmedian(
    a: Any, axis: Any = None, out: Any = None, overwrite_input: bool = False, keepdims: Any = False
) -> Any:
    """As ``np.nanmedian``: the median of the elements that are not NaN; NaN where there are none."""
    if not pr.any_tensor(a):
        return np.nanmedian(a, axis, out, overwrite_input, keepdims)
    x = pr.tensor(a, "nanmedian")
    keepdims = bool(keepdims) and keepdims is not _NO_VALUE
    if x.dtype.kind != "f":
        return median(x, axis, out, overwrite_input, keepdims)
    rows, _, shape = _rows(x, axis, "nanmedian")  # NaN sorts last
    count = rd.sum(el.logical_not(el.isnan(rows)), axis=-1, keepdims=True)
    low, high = (take_along_axis(rows, el.maximum(i, 0), -1) for i in ((count - 1) // 2, count // 2))
    middle = pr.tensor((low + high) / 2, "nanmedian", x.dtype)
    # One middle element is itself, also where its double overflows.
    middle = rd.sum(ew.where(el.equal(low, high), low, middle), axis=-1)
    return reshape_to(middle, shape) if keepdims else middle


def _replace_nan(a: Any, value: float, op: str) -> Tensor:
    x = pr.tensor(a, op)
    return ew.where(ew.isnan(x), pr.constant_like(x, value), x) if x.dtype.kind == "f" else x


def _given_only(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in kwargs.items() if v is not _NO_VALUE}


__all__ = [
    "nanargmax", "nanargmin", "nancumprod", "nancumsum", "nanmax", "nanmean", "nanmedian", "nanmin", "nanprod",
    "nanstd", "nansum", "nanvar",
]  # fmt: skip
