"""NumPy's array creation in traced code: constants and ranges as graph nodes instead of captured arrays.

Reached through ``np.zeros_like`` and relatives, ``like=``, and ``tracejit.functions``. Outside a trace
NumPy's own result. Sizes must be known while tracing; a traced scalar used as a size becomes a guard.
"""

from __future__ import annotations

import operator
from typing import Any

import numpy as np

from tracejit.dtypes import BOOL, INT64, canonical
from tracejit.errors import ShapeError
from tracejit.functions import elementwise as el
from tracejit.functions import promotion as pr
from tracejit.functions.joining import stack
from tracejit.functions.shape import moveaxis, reshape_to, shape_argument
from tracejit.ops import elementwise as ew
from tracejit.ops import shape as ops
from tracejit.ops.creation import iota
from tracejit.tensor import Tensor, current_context, is_arraylike

_any_tensor = pr.any_tensor


def _tracing(*operands: Any) -> bool:
    return current_context() is not None or _any_tensor(*operands)


# -- filled ----------------------------------------------------------------------------------------


def full(
    shape: Any, fill_value: Any, dtype: Any = None, order: str = "C", *, device: Any = None, like: Any = None
) -> Any:
    """As ``np.full``; the value may be traced and broadcasts to the shape."""
    if not _tracing(fill_value):
        return np.full(shape, fill_value, dtype, order)  # type: ignore[call-overload]
    value = pr.tensor(fill_value, "full", None if dtype is None else canonical(dtype, op="full"))
    return pr.broadcast_to(value, shape_argument(shape, "full"))


def zeros(shape: Any, dtype: Any = float, order: str = "C", *, device: Any = None, like: Any = None) -> Any:
    """As ``np.zeros``."""
    return full(shape, 0, float if dtype is None else dtype, order)


def ones(shape: Any, dtype: Any = None, order: str = "C", *, device: Any = None, like: Any = None) -> Any:
    """As ``np.ones``."""
    return full(shape, 1, float if dtype is None else dtype, order)


def empty(shape: Any, dtype: Any = float, order: str = "C", *, device: Any = None, like: Any = None) -> Any:
    """As ``np.zeros``: recorded arrays are never uninitialised."""
    return zeros(shape, dtype, order)


def full_like(
    a: Any,
    fill_value: Any,
    dtype: Any = None,
    order: str = "K",
    subok: bool = True,
    shape: Any = None,
    *,
    device: Any = None,
) -> Any:
    """As ``np.full_like``: filled with a value, with the shape and dtype of ``a``."""
    if not _any_tensor(a, fill_value):
        return np.full_like(a, fill_value, dtype, order, subok, shape)  # type: ignore[call-overload]
    like = a if is_arraylike(a) else np.asarray(a)
    return full(like.shape if shape is None else shape, fill_value, like.dtype if dtype is None else dtype)


def zeros_like(
    a: Any, dtype: Any = None, order: str = "K", subok: bool = True, shape: Any = None, *, device: Any = None
) -> Any:
    """As ``np.zeros_like``."""
    return full_like(a, 0, dtype, order, subok, shape)


def ones_like(
    a: Any, dtype: Any = None, order: str = "K", subok: bool = True, shape: Any = None, *, device: Any = None
) -> Any:
    """As ``np.ones_like``."""
    return full_like(a, 1, dtype, order, subok, shape)


def empty_like(
    prototype: Any,
    dtype: Any = None,
    order: str = "K",
    subok: bool = True,
    shape: Any = None,
    *,
    device: Any = None,
) -> Any:
    """As ``np.zeros_like``: recorded arrays are never uninitialised."""
    return full_like(prototype, 0, dtype, order, subok, shape)


# -- ranges ----------------------------------------------------------------------------------------


def _concrete(value: Any) -> Any:
    """A range bound as a Python number; a traced one is read (and guarded) or raises ConcretizationError."""
    return value.item() if isinstance(value, Tensor) else value


def arange(
    start: Any, stop: Any = None, step: Any = None, dtype: Any = None, *, device: Any = None, like: Any = None
) -> Any:
    """As ``np.arange``. The bounds decide the size, so traced ones must follow from scalar arguments."""
    bounds = [_concrete(v) for v in (start, stop, step)]
    if bounds[1] is None:
        bounds[:2] = [0, bounds[0]]
    if bounds[2] is None:
        bounds[2] = 1
    if current_context() is None:
        return np.arange(*bounds, dtype=dtype)
    found = canonical(np.arange(*bounds, dtype=dtype).dtype, op="arange")
    n = len(np.arange(*bounds, dtype=dtype))
    if n == 0 or found == BOOL:
        return (
            ops.filled(0, (n,), found)
            if n == 0
            else pr.tensor(np.arange(*bounds, dtype=dtype).tolist(), "arange", found)
        )
    # NumPy computes two elements and extrapolates: start + i·(second − first), in the dtype of the result.
    first = np.asarray(bounds[0]).astype(found)
    second = np.asarray(bounds[0] + bounds[2]).astype(found)
    with np.errstate(over="ignore"):
        delta = (second - first).item()
    position = iota(shape=(n,), axis=0, dtype=found)
    scaled = position if delta == 1 else ew.mul(position, pr.constant_like(position, delta))
    return scaled if first == 0 else ew.add(scaled, pr.constant_like(position, first.item()))


def linspace(
    start: Any,
    stop: Any,
    num: Any = 50,
    endpoint: bool = True,
    retstep: bool = False,
    dtype: Any = None,
    axis: int = 0,
    *,
    device: Any = None,
) -> Any:
    """As ``np.linspace``; the ends may be traced arrays, the number of points may not."""
    count = operator.index(num)
    if not _any_tensor(start, stop):
        return np.linspace(start, stop, count, endpoint, retstep, dtype, axis)  # type: ignore[call-overload]
    if count < 0:
        raise ShapeError.make(f"the number of points must not be negative, is {count}", op="linspace")
    first, last = el.multiply(start, 1.0), el.multiply(stop, 1.0)
    inner = pr.common_dtype("linspace", first, last, 0.0)
    low, high = pr.broadcast(
        "linspace", pr.tensor(first, "linspace", inner), pr.tensor(last, "linspace", inner)
    )
    intervals = count - 1 if endpoint else count
    width = ew.sub(high, low)
    shape = (count, *low.shape)
    steps = iota(shape=shape, axis=0, dtype=inner)
    step = ew.div(width, pr.constant_like(width, max(intervals, 1)))
    points = ew.add(ew.mul(steps, pr.broadcast_to(step, shape)), pr.broadcast_to(low, shape))
    if endpoint and count > 1:  # exactly the end, as NumPy does
        points = ew.where(
            ew.equal(steps, pr.constant_like(steps, count - 1)), pr.broadcast_to(high, shape), points
        )
    if dtype is not None:
        target = canonical(dtype, op="linspace")
        points = pr.tensor(el.floor(points) if target.kind in "iu" else points, "linspace", target)
    points = moveaxis(points, 0, axis)
    return (points, step) if retstep else points


# -- matrices --------------------------------------------------------------------------------------


def _band(n: int, m: int, k: int, compare: Any) -> Tensor:
    """bool [n, m]: ``compare(column, row + k)``."""
    rows, cols = iota(shape=(n, m), axis=0, dtype=INT64), iota(shape=(n, m), axis=1, dtype=INT64)
    return compare(cols, ew.add(rows, pr.constant_like(rows, k)) if k else rows)


def _cast(mask: Tensor, dtype: Any, name: str) -> Tensor:
    return pr.tensor(mask, name, canonical(dtype, op=name))


def eye(
    N: Any,
    M: Any = None,
    k: Any = 0,
    dtype: Any = float,
    order: str = "C",
    *,
    device: Any = None,
    like: Any = None,
) -> Any:
    """As ``np.eye``: ones on the k-th diagonal."""
    n = operator.index(N)
    m = n if M is None else operator.index(M)
    if current_context() is None:
        return np.eye(n, m, operator.index(k), dtype, order)  # type: ignore[call-overload]
    return _cast(_band(n, m, operator.index(k), ew.equal), dtype, "eye")


def identity(n: Any, dtype: Any = None, *, like: Any = None) -> Any:
    """As ``np.identity``."""
    return eye(n, dtype=float if dtype is None else dtype)


def tri(N: Any, M: Any = None, k: Any = 0, dtype: Any = float, *, like: Any = None) -> Any:
    """As ``np.tri``: ones at and below the k-th diagonal."""
    n = operator.index(N)
    m = n if M is None else operator.index(M)
    if current_context() is None:
        return np.tri(n, m, operator.index(k), dtype)
    return _cast(_band(n, m, operator.index(k), ew.less_equal), dtype, "tri")


def meshgrid(*xi: Any, copy: bool = True, sparse: bool = False, indexing: str = "xy") -> Any:
    """As ``np.meshgrid``: coordinate matrices from coordinate vectors."""
    if not _any_tensor(*xi):
        return np.meshgrid(*xi, copy=copy, sparse=sparse, indexing=indexing)  # type: ignore[call-overload]
    if indexing not in ("xy", "ij"):
        raise ValueError(f"[meshgrid] indexing must be 'xy' or 'ij', got {indexing!r}")
    vectors = [pr.tensor(x, "meshgrid") for x in xi]
    if max(v.ndim for v in vectors) > 1:
        raise ShapeError.make(
            "needs vectors", op="meshgrid", got={f"x{i}": v for i, v in enumerate(vectors[:6])}
        )
    n = len(vectors)
    place = list(range(n))
    if indexing == "xy" and n > 1:
        place[:2] = [1, 0]
    lines = [
        reshape_to(v, tuple(v.size if i == place[k] else 1 for i in range(n))) for k, v in enumerate(vectors)
    ]
    if sparse:
        return tuple(lines)
    shape = pr.broadcast_shapes("meshgrid", tuple(lines), [line.shape for line in lines])
    return tuple(pr.broadcast_to(line, shape) for line in lines)


# -- from other objects ----------------------------------------------------------------------------


def asarray(
    a: Any, dtype: Any = None, order: Any = None, *, device: Any = None, copy: Any = None, like: Any = None
) -> Any:
    """As ``np.asarray``: nested lists may hold tensors."""
    found = None if dtype is None else canonical(dtype, op="asarray")
    if not _holds_tensor(a):
        return np.asarray(a, dtype=found)
    return pr.tensor(_joined(a), "asarray", found)


def array(
    object: Any,
    dtype: Any = None,
    *,
    copy: Any = True,
    order: str = "K",
    subok: bool = False,
    ndmin: int = 0,
    like: Any = None,
) -> Any:
    """As ``np.array``: nested lists may hold tensors."""
    if not _holds_tensor(object):
        return np.array(object, dtype=dtype, copy=copy, order=order, subok=subok, ndmin=ndmin)  # type: ignore[call-overload]
    x = asarray(object, dtype)
    return reshape_to(x, (1,) * max(0, ndmin - x.ndim) + x.shape)


def _holds_tensor(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return any(map(_holds_tensor, value))
    return isinstance(value, Tensor)


def _joined(value: Any) -> Any:
    if not isinstance(value, list | tuple):
        return value
    return stack([_joined(v) for v in value])


__all__ = [
    "arange",
    "array",
    "asarray",
    "empty",
    "empty_like",
    "eye",
    "full",
    "full_like",
    "identity",
    "linspace",
    "meshgrid",
    "ones",
    "ones_like",
    "tri",
    "zeros",
    "zeros_like",
]
