"""NumPy's functions that assemble, insert, delete and look up by position, on tensors.

Positions are known while tracing, values are not. Reached through ``np.*`` dispatch; on concrete arrays NumPy's own result.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import numpy as np

from tracejit.errors import ShapeError, UnsupportedFunctionError
from tracejit.functions import creation, joining
from tracejit.functions import elementwise as el
from tracejit.functions import promotion as pr
from tracejit.functions import reductions as rd
from tracejit.functions import shape as sh
from tracejit.functions.indexing import diag, take
from tracejit.tensor import Tensor

# -- assemble ------------------------------------------------------------------------------------------------------


def block(arrays: Any) -> Any:
    """As ``np.block``: nested lists, the innermost joined along the last axis."""
    depth = _depth(arrays)
    ndim = max([depth, *(len(pr.shape_of(leaf, "block")) for leaf in _leaves(arrays))])
    return _block(arrays, depth, ndim)


def _depth(value: Any) -> int:
    if not isinstance(value, list):
        return 0
    depths = {_depth(v) for v in value}
    if not value or len(depths) > 1:
        raise ShapeError.make("lists must be nested equally deep and not be empty", op="block")
    return 1 + depths.pop()


def _leaves(value: Any) -> list[Any]:
    return [leaf for v in value for leaf in _leaves(v)] if isinstance(value, list) else [value]


def _block(value: Any, depth: int, ndim: int) -> Any:
    if depth == 0:
        x = pr.tensor(value, "block")
        return sh.reshape_to(x, (1,) * (ndim - x.ndim) + x.shape)
    return joining.concatenate([_block(v, depth - 1, ndim) for v in value], -depth)


def insert(arr: Any, obj: Any, values: Any, axis: Any = None) -> Any:
    """As ``np.insert`` at positions that are known while tracing."""
    _known("insert", obj)
    if not pr.any_tensor(arr, values):
        return np.insert(arr, obj, values, axis)
    x = pr.tensor(arr, "insert")
    if axis is None:
        x, axis = sh.ravel(x), 0
    axis = rd.normalize_axis(axis, x.ndim, "insert")
    new = pr.tensor(values, "insert", x.dtype)
    n = x.shape[axis]
    single = np.ndim(obj) == 0 and not isinstance(obj, slice)
    if single and new.ndim:
        # As NumPy: one position takes values whose first axis runs along the insertion.
        new = sh.reshape_to(new, (1,) * (x.ndim - new.ndim) + new.shape)
        new = sh.moveaxis(new, 0, axis)
    count = new.shape[axis] if single and new.ndim == x.ndim else 1 if single else len(np.arange(n)[obj])
    rest = (*x.shape[:axis], count, *x.shape[axis + 1 :])
    order = np.insert(np.arange(n), obj, np.arange(n, n + count))
    return take(joining.concatenate([x, pr.broadcast_to(new, rest)], axis), order, axis=axis)


def delete(arr: Any, obj: Any, axis: Any = None) -> Any:
    """As ``np.delete`` of positions that are known while tracing."""
    _known("delete", obj)
    if not pr.any_tensor(arr):
        return np.delete(arr, obj, axis)
    x = pr.tensor(arr, "delete")
    if axis is None:
        x, axis = sh.ravel(x), 0
    axis = rd.normalize_axis(axis, x.ndim, "delete")
    return take(x, np.delete(np.arange(x.shape[axis]), obj), axis=axis)


def _known(op: str, positions: Any) -> None:
    if isinstance(positions, Tensor):
        raise UnsupportedFunctionError.make(
            "the positions must be known while tracing", op=op, got={"obj": positions}, hint="use np.where"
        )


def diagflat(v: Any, k: int = 0) -> Any:
    """As ``np.diagflat``: the flattened input on a diagonal."""
    if not pr.any_tensor(v):
        return np.diagflat(v, k)
    return diag(sh.ravel(v), k)


def sliding_window_view(x: Any, window_shape: Any, axis: Any = None, **kwargs: Any) -> Any:
    """As ``np.lib.stride_tricks.sliding_window_view``; a copy, as all traced values."""
    if not pr.any_tensor(x):
        return np.lib.stride_tricks.sliding_window_view(x, window_shape, axis=axis, **kwargs)
    sizes = tuple(window_shape) if isinstance(window_shape, list | tuple) else (operator.index(window_shape),)
    given = tuple(range(x.ndim)) if axis is None else axis if isinstance(axis, tuple) else (axis,)
    axes = [rd.normalize_axis(a, x.ndim, "sliding_window_view") for a in given]
    if len(axes) != len(sizes):
        raise ValueError("window_shape and axis must have as many entries")
    out: Any = pr.tensor(x, "sliding_window_view")
    for a, w in zip(axes, sizes, strict=True):
        if not 0 <= w <= out.shape[a]:
            raise ShapeError.make(
                "the window must fit into the array", op="sliding_window_view", got={"x": x}
            )
        starts = np.arange(out.shape[a] - w + 1)
        out = sh.moveaxis(take(out, starts[:, None] + np.arange(w), axis=a), a + 1, -1)
    return out


# -- look up -------------------------------------------------------------------------------------------------------


def isin(
    element: Any, test_elements: Any, assume_unique: bool = False, invert: bool = False, **kw: Any
) -> Any:
    """As ``np.isin``, by comparing with every test element."""
    if not pr.any_tensor(element, test_elements):
        return np.isin(element, test_elements, assume_unique, invert, **kw)
    x, tests = pr.tensor(element, "isin"), sh.ravel(pr.tensor(creation.asarray(test_elements), "isin"))
    found = rd.any(el.equal(sh.expand_dims(x, -1), tests), axis=-1)
    return el.logical_not(found) if invert else found


def array_equiv(a1: Any, a2: Any) -> Any:
    """As ``np.array_equiv``: equal after broadcasting; False at once for shapes that do not broadcast."""
    if not pr.any_tensor(a1, a2):
        return np.array_equiv(a1, a2)
    try:
        np.broadcast_shapes(pr.shape_of(a1, "array_equiv"), pr.shape_of(a2, "array_equiv"))
    except ValueError:
        return False
    return rd.all(el.equal(a1, a2))


def unravel_index(indices: Any, shape: Any, order: str = "C") -> Any:
    """As ``np.unravel_index``; indices out of bounds are not noticed, since their values are not known."""
    if not pr.any_tensor(indices):
        return np.unravel_index(indices, shape, order)  # type: ignore[call-overload]
    shape = tuple(shape) if isinstance(shape, list | tuple) else (shape,)
    axes = range(len(shape)) if order == "F" else reversed(range(len(shape)))
    rest, out = pr.tensor(indices, "unravel_index", np.dtype(np.int64)), {}
    for i in axes:
        out[i] = rest % shape[i]
        rest = rest // shape[i]
    return tuple(out[i] for i in range(len(shape)))


def ravel_multi_index(multi_index: Any, dims: Any, mode: Any = "raise", order: str = "C") -> Any:
    """As ``np.ravel_multi_index``; indices out of bounds are not noticed unless clipped or wrapped."""
    parts = list(multi_index)
    if not pr.any_tensor(*parts):
        return np.ravel_multi_index(multi_index, dims, mode, order)  # type: ignore[call-overload]
    dims = tuple(dims) if isinstance(dims, list | tuple) else (dims,)
    modes = mode if isinstance(mode, tuple) else (mode,) * len(dims)
    total: Any = 0
    for i, (part, size, how) in enumerate(zip(parts, dims, modes, strict=True)):
        part = pr.tensor(part, "ravel_multi_index", np.dtype(np.int64))
        if how == "wrap":
            part = part % size
        elif how == "clip":
            part = el.minimum(el.maximum(part, 0), size - 1)
        total = total + part * math.prod(dims[:i] if order == "F" else dims[i + 1 :])
    return total


__all__ = [
    "array_equiv", "block", "delete", "diagflat", "insert", "isin", "ravel_multi_index", "sliding_window_view",
    "unravel_index",
]  # fmt: skip
