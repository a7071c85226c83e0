"""NumPy's shape functions on tensors: reshape, transpose, broadcast, flip and their relatives.

Reached through methods, ``np.*`` dispatch and ``tracejit.functions``; on concrete arrays NumPy's own result.
"""

from __future__ import annotations

import builtins
import math
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np

from tracejit.errors import ShapeError, TraceError, UnsupportedFunctionError
from tracejit.functions import promotion as pr
from tracejit.functions.reductions import normalize_axes, normalize_axis
from tracejit.ops import shape as ops
from tracejit.ops.creation import literal
from tracejit.tensor import Tensor

Shape = tuple[int, ...]
_any = builtins.any


def shape_argument(value: Any, op: str) -> Shape:
    """A shape given as an integer or a sequence of integers; scalars being traced are read (and guarded)."""
    try:
        if hasattr(value, "__index__") and not (isinstance(value, np.ndarray | Tensor) and value.ndim):
            return (operator.index(value),)
        return tuple(operator.index(v) for v in value)
    except TraceError:
        raise
    except TypeError:
        raise TypeError(f"[{op}] a shape is an integer or a sequence of integers, got {value!r}") from None


def literal_array(array: np.ndarray) -> Any:
    """A constant held by the graph: for small tables of indices that tracejit itself computes."""
    from tracejit.graph import ArrayLiteral

    return literal(value=ArrayLiteral(array))


def reshape_to(x: Tensor, shape: Shape) -> Tensor:
    """``x`` with exactly this shape; ``x`` itself if it has it."""
    return x if x.shape == shape else ops.reshape(x, shape=shape)


# -- one array, another shape ----------------------------------------------------------------------


def reshape(a: Any, /, shape: Any = None, order: str = "C", *, newshape: Any = None, copy: Any = None) -> Any:
    """As ``np.reshape``; one size may be -1."""
    shape = newshape if shape is None else shape
    if not pr.any_tensor(a):
        return np.reshape(a, shape, order=order)  # type: ignore[call-overload]
    x = pr.tensor(a, "reshape")
    wanted = shape_argument(shape, "reshape")
    if wanted.count(-1) > 1 or min(wanted, default=0) < -1:
        raise ShapeError.make(f"at most one size may be -1, got {wanted}", op="reshape", got={"x": x})
    if -1 in wanted:
        known = math.prod(n for n in wanted if n != -1)
        if known == 0 or x.size % known:
            raise ShapeError.make(f"cannot reshape {x.size} elements to {wanted}", op="reshape", got={"x": x})
        wanted = tuple(x.size // known if n == -1 else n for n in wanted)
    if math.prod(wanted) != x.size:
        raise ShapeError.make(f"cannot reshape {x.size} elements to {wanted}", op="reshape", got={"x": x})
    if order == "F":
        return transpose(reshape_to(transpose(x), wanted[::-1]))
    if order not in ("C", "A"):
        raise UnsupportedFunctionError.make(f"order={order!r} is not supported; use 'C' or 'F'", op="reshape")
    return reshape_to(x, wanted)


def ravel(a: Any, order: str = "C") -> Any:
    """As ``np.ravel``: one axis with all elements."""
    if not pr.any_tensor(a):
        return np.ravel(a, order)  # type: ignore[call-overload]
    return reshape(a, -1 if a.size else 0, order="C" if order == "K" else order)


def transpose(a: Any, axes: Any = None) -> Any:
    """As ``np.transpose``: the axes reversed, or in the order ``axes``."""
    if not pr.any_tensor(a):
        return np.transpose(a, axes)
    x = pr.tensor(a, "transpose")
    if axes is None:
        perm = tuple(reversed(range(x.ndim)))
    else:
        perm = tuple(normalize_axis(p, x.ndim, "transpose") for p in axes)
        if sorted(perm) != list(range(x.ndim)):
            raise ShapeError.make(f"axes {tuple(axes)} do not match", op="transpose", got={"x": x})
    return x if perm == tuple(range(x.ndim)) else ops.transpose(x, perm=perm)


permute_dims = transpose


def matrix_transpose(x: Any, /) -> Any:
    """As ``np.matrix_transpose``: the last two axes swapped."""
    if not pr.any_tensor(x):
        return np.matrix_transpose(x)
    if x.ndim < 2:
        raise ShapeError.make("a matrix needs at least two axes", op="matrix_transpose", got={"x": x})
    return swapaxes(x, -1, -2)


def moveaxis(a: Any, source: Any, destination: Any) -> Any:
    """As ``np.moveaxis``."""
    if not pr.any_tensor(a):
        return np.moveaxis(a, source, destination)
    pairs = []
    for given in (source, destination):
        axes = [given] if not isinstance(given, Sequence) else list(given)
        pairs.append([normalize_axis(i, a.ndim, "moveaxis") for i in axes])
        if len(set(pairs[-1])) != len(pairs[-1]):
            raise ShapeError.make(f"repeated axis in {given}", op="moveaxis", got={"x": a})
    if len(pairs[0]) != len(pairs[1]):
        raise ShapeError.make(
            "source and destination need the same number of axes", op="moveaxis", got={"x": a}
        )
    perm = [i for i in range(a.ndim) if i not in pairs[0]]
    for to, come in sorted(zip(pairs[1], pairs[0], strict=True)):
        perm.insert(to, come)
    return transpose(a, perm)


def rollaxis(a: Any, axis: int, start: int = 0) -> Any:
    """As ``np.rollaxis``."""
    if not pr.any_tensor(a):
        return np.rollaxis(a, axis, start)
    axis = normalize_axis(axis, a.ndim, "rollaxis")
    if not -a.ndim <= start <= a.ndim:
        raise ShapeError.make(
            f"start {start} is out of bounds for {a.ndim} axes", op="rollaxis", got={"x": a}
        )
    start = start + a.ndim if start < 0 else start
    return moveaxis(a, axis, start - 1 if axis < start else start)


def swapaxes(a: Any, axis1: int, axis2: int) -> Any:
    """As ``np.swapaxes``."""
    if not pr.any_tensor(a):
        return np.swapaxes(a, axis1, axis2)
    i, j = (normalize_axis(k, a.ndim, "swapaxes") for k in (axis1, axis2))
    perm = list(range(a.ndim))
    perm[i], perm[j] = perm[j], perm[i]
    return transpose(a, perm)


def expand_dims(a: Any, axis: Any) -> Any:
    """As ``np.expand_dims``: new axes of size one at these places of the result."""
    if not pr.any_tensor(a):
        return np.expand_dims(a, axis)
    x = pr.tensor(a, "expand_dims")
    count = len(axis) if isinstance(axis, tuple | list) else 1
    axes = normalize_axes(axis, x.ndim + count, "expand_dims")
    sizes = iter(x.shape)
    return reshape_to(x, tuple(1 if i in axes else next(sizes) for i in range(x.ndim + count)))


def squeeze(a: Any, axis: Any = None) -> Any:
    """As ``np.squeeze``: without axes of size one."""
    if not pr.any_tensor(a):
        return np.squeeze(a, axis)
    x = pr.tensor(a, "squeeze")
    if axis is None:
        axes = tuple(i for i, n in enumerate(x.shape) if n == 1)
    else:
        axes = normalize_axes(axis, x.ndim, "squeeze")
        if _any(x.shape[i] != 1 for i in axes):
            raise ShapeError.make(
                f"cannot drop axis {axis}, whose size is not one", op="squeeze", got={"x": x}
            )
    return reshape_to(x, tuple(n for i, n in enumerate(x.shape) if i not in axes))


def _at_least(n: int, name: str) -> Any:
    def one(a: Any) -> Any:
        if not isinstance(a, Tensor):
            return getattr(np, name)(a)
        x = pr.tensor(a, name)
        if x.ndim >= n:
            return x
        if n == 3:  # NumPy's own order: (1, N, 1) and (M, N, 1)
            return reshape_to(x, {0: (1, 1, 1), 1: (1, *x.shape, 1), 2: (*x.shape, 1)}[x.ndim])
        return reshape_to(x, (1,) * (n - x.ndim) + x.shape)

    def function(*arys: Any) -> Any:
        return one(arys[0]) if len(arys) == 1 else tuple(map(one, arys))

    function.__name__ = function.__qualname__ = name
    function.__doc__ = f"As ``np.{name}``: new axes of size one until there are {n}."
    return function


atleast_1d = _at_least(1, "atleast_1d")
atleast_2d = _at_least(2, "atleast_2d")
atleast_3d = _at_least(3, "atleast_3d")


def copy(a: Any, order: str = "K", subok: bool = False) -> Any:
    """The tensor itself: recorded values are immutable."""
    return pr.tensor(a, "copy") if isinstance(a, Tensor) else np.array(a, order=order, subok=subok, copy=True)  # type: ignore[call-overload]


def shape(a: Any) -> Shape:
    """As ``np.shape``."""
    return a.shape if isinstance(a, Tensor) else np.shape(a)


def ndim(a: Any) -> int:
    """As ``np.ndim``."""
    return a.ndim if isinstance(a, Tensor) else np.ndim(a)


def size(a: Any, axis: Any = None) -> int:
    """As ``np.size``."""
    if not isinstance(a, Tensor):
        return np.size(a, axis)
    return math.prod(a.shape[i] for i in normalize_axes(axis, a.ndim, "size"))


# -- broadcast -------------------------------------------------------------------------------------


def broadcast_to(array: Any, shape: Any, subok: bool = False) -> Any:
    """As ``np.broadcast_to``."""
    if not pr.any_tensor(array):
        return np.broadcast_to(array, shape)
    return pr.broadcast_to(pr.tensor(array, "broadcast_to"), shape_argument(shape, "broadcast_to"))


def broadcast_arrays(*args: Any, subok: bool = False) -> Any:
    """As ``np.broadcast_arrays``: a tuple of arrays of one shape."""
    if not pr.any_tensor(*args):
        return np.broadcast_arrays(*args)
    return pr.broadcast("broadcast_arrays", *(pr.tensor(a, "broadcast_arrays") for a in args))


# -- flip ----------------------------------------------------------------------------


def flip(m: Any, axis: Any = None) -> Any:
    """As ``np.flip``: elements in reverse order along ``axis`` (all axes by default)."""
    if not pr.any_tensor(m):
        return np.flip(m, axis)
    x = pr.tensor(m, "flip")
    axes = normalize_axes(axis, x.ndim, "flip")
    return ops.flip(x, axes=axes) if axes else x


def fliplr(m: Any) -> Any:
    """As ``np.fliplr``: axis 1 reversed."""
    if not pr.any_tensor(m):
        return np.fliplr(m)
    return flip(m, 1)


def flipud(m: Any) -> Any:
    """As ``np.flipud``: axis 0 reversed."""
    if not pr.any_tensor(m):
        return np.flipud(m)
    return flip(m, 0)


def rot90(m: Any, k: int = 1, axes: Any = (0, 1)) -> Any:
    """As ``np.rot90``: turned by 90 degrees ``k`` times, from the first towards the second axis."""
    if not pr.any_tensor(m):
        return np.rot90(m, k, axes)
    i, j = (normalize_axis(a, m.ndim, "rot90") for a in axes)
    if i == j:
        raise ShapeError.make("the two axes must differ", op="rot90", got={"x": m})
    k = operator.index(k) % 4
    if k == 0:
        return pr.tensor(m, "rot90")
    if k == 2:
        return flip(m, (i, j))
    return swapaxes(flip(m, j), i, j) if k == 1 else flip(swapaxes(m, i, j), j)


__all__ = [
    "atleast_1d",
    "atleast_2d",
    "atleast_3d",
    "broadcast_arrays",
    "broadcast_to",
    "copy",
    "expand_dims",
    "flip",
    "fliplr",
    "flipud",
    "matrix_transpose",
    "moveaxis",
    "ndim",
    "permute_dims",
    "ravel",
    "reshape",
    "rollaxis",
    "rot90",
    "shape",
    "size",
    "squeeze",
    "swapaxes",
    "transpose",
]
