"""Ops that only rearrange elements: reshape, transpose, broadcast, slice, flip, pad, concatenate.

Recorded by ``functions/shape.py``, indexing and gradient rules; lowering folds them into index arithmetic.
The set is closed under differentiation: slice and pad are each other's gradient, broadcast_to's is a sum.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from tracejit.dtypes import DType
from tracejit.errors import DTypeError, ShapeError
from tracejit.ops import registry
from tracejit.ops.creation import const
from tracejit.ops.registry import HasAval, Op, define

Shape = tuple[int, ...]
Aval = tuple[Shape, DType]


def filled(value: Any, shape: Shape, dtype: DType) -> Any:
    """An array of ``shape`` with every element ``value``: recorded while tracing, else computed."""
    scalar = const(value=np.asarray(value).astype(dtype).item(), dtype=dtype)
    return broadcast_to(scalar, shape=shape) if shape else scalar


# -- reshape, transpose, broadcast_to --------------------------------------------------------------


def _reshape_infer(x: HasAval, *, shape: Shape) -> Aval:
    if math.prod(x.shape) != math.prod(shape) or min(shape, default=0) < 0:
        raise ShapeError.make(
            f"cannot reshape {math.prod(x.shape)} elements to {shape}", op="reshape", got={"x": x}
        )
    return shape, x.dtype


reshape: Op = define(
    "reshape",
    arity=1,
    infer=_reshape_infer,
    reference=lambda x, *, shape: np.reshape(x, shape),
    vjp=lambda g, y, x, *, shape: [reshape(g, shape=x.shape)],
    category="view",
    meaning="The same elements in row-major order under another shape.",
    formula="y[row-major i] = x[row-major i]",
    shape_rule="the shape attribute; the number of elements stays",
    grad_rule="dx = reshape(g, shape of x)",
    samples=lambda: [
        ((np.arange(6.0).reshape(2, 3),), {"shape": (3, 2)}),
        ((np.ones((2, 0, 3)),), {"shape": (0,)}),
        ((np.ones((1, 1)),), {"shape": ()}),
    ],
    attrs={"shape": "tuple of int"},
    traits=("view",),
)


def _transpose_infer(x: HasAval, *, perm: Shape) -> Aval:
    if sorted(perm) != list(range(len(x.shape))):
        raise ShapeError.make(f"{perm} is not a permutation of the axes", op="transpose", got={"x": x})
    return tuple(x.shape[p] for p in perm), x.dtype


def _inverse(perm: Shape) -> Shape:
    out = [0] * len(perm)
    for i, p in enumerate(perm):
        out[p] = i
    return tuple(out)


transpose: Op = define(
    "transpose",
    arity=1,
    infer=_transpose_infer,
    reference=lambda x, *, perm: np.transpose(x, perm),
    vjp=lambda g, y, x, *, perm: [transpose(g, perm=_inverse(perm))],
    category="view",
    meaning="The axes in another order.",
    formula="y[i_perm₀, i_perm₁, …] = x[i₀, i₁, …]",
    shape_rule="result axis k is operand axis perm[k]",
    grad_rule="dx = transpose(g, inverse of perm)",
    samples=lambda: [
        ((np.arange(6.0).reshape(2, 3),), {"perm": (1, 0)}),
        ((np.arange(24.0).reshape(2, 3, 4),), {"perm": (2, 0, 1)}),
    ],
    attrs={"perm": "tuple of int"},
    traits=("view",),
)


def _broadcast_to_infer(x: HasAval, *, shape: Shape) -> Aval:
    extra = len(shape) - len(x.shape)
    if extra < 0 or any(a not in (1, b) for a, b in zip(x.shape, shape[extra:], strict=False)):
        raise ShapeError.make(f"cannot broadcast to {shape}", op="broadcast_to", got={"x": x})
    return shape, x.dtype


def _broadcast_to_vjp(g: Any, y: Any, x: Any, *, shape: Shape) -> list[Any]:
    extra = len(shape) - len(x.shape)
    expanded = tuple(extra + i for i, n in enumerate(x.shape) if n == 1 and shape[extra + i] != 1)
    axes = (*range(extra), *expanded)
    total = registry.get("sum")(g, axes=axes) if axes else g
    return [reshape(total, shape=x.shape) if expanded else total]


broadcast_to: Op = define(
    "broadcast_to",
    arity=1,
    infer=_broadcast_to_infer,
    reference=lambda x, *, shape: np.broadcast_to(x, shape),
    vjp=_broadcast_to_vjp,
    category="view",
    meaning="Repeats along new leading axes and along axes of size one.",
    formula="y[…, i, …] = x[…, 0 or i, …]",
    shape_rule="the shape attribute; each trailing axis of x is equal to it or 1",
    grad_rule="dx = sum of g over the repeated axes",
    samples=lambda: [
        ((np.arange(3.0),), {"shape": (2, 3)}),
        ((np.arange(2.0).reshape(2, 1),), {"shape": (4, 2, 3)}),
        ((np.asarray(1.5),), {"shape": (2,)}),
    ],
    attrs={"shape": "tuple of int"},
    traits=("view",),
)

# -- slice, pad, flip ------------------------------------------------------------------------------


def _slice_infer(x: HasAval, *, start: Shape, stop: Shape, step: Shape) -> Aval:
    if not len(start) == len(stop) == len(step) == len(x.shape):
        raise ShapeError.make("one start, stop and step per axis is needed", op="slice", got={"x": x})
    sizes = []
    for a, b, s, n in zip(start, stop, step, x.shape, strict=True):
        if not (0 <= a <= b <= n and s > 0):
            raise ShapeError.make(
                f"slice {a}:{b}:{s} does not fit an axis of size {n}", op="slice", got={"x": x}
            )
        sizes.append(-(-(b - a) // s))
    return tuple(sizes), x.dtype


def _slice_vjp(g: Any, y: Any, x: Any, *, start: Shape, stop: Shape, step: Shape) -> list[Any]:
    low, high = [], []
    for a, s, n, m in zip(start, step, x.shape, g.shape, strict=True):
        first = a if m else n
        low.append(first)
        high.append(n - first - ((m - 1) * s + 1 if m else 0))
    return [pad(g, low=tuple(low), high=tuple(high), interior=tuple(s - 1 for s in step), value=0.0)]


slice_: Op = define(
    "slice",
    arity=1,
    infer=_slice_infer,
    reference=lambda x, *, start, stop, step: x[
        tuple(slice(a, b, s) for a, b, s in zip(start, stop, step, strict=True))
    ],
    vjp=_slice_vjp,
    category="view",
    meaning="A regular part of an array, with positive steps.",
    formula="y[i] = x[start + i·step], start ≤ start + i·step < stop, for each axis",
    shape_rule="⌈(stop − start) / step⌉ for each axis",
    grad_rule="dx = pad(g) with zeros at every position that was left out",
    samples=lambda: [
        ((np.arange(7.0),), {"start": (1,), "stop": (6,), "step": (2,)}),
        ((np.arange(12.0).reshape(3, 4),), {"start": (0, 1), "stop": (3, 4), "step": (1, 3)}),
        ((np.arange(4.0),), {"start": (2,), "stop": (2,), "step": (1,)}),
    ],
    attrs={"start": "tuple of int", "stop": "tuple of int", "step": "tuple of int > 0"},
    traits=("view",),
)


def _pad_infer(x: HasAval, *, low: Shape, high: Shape, interior: Shape, value: Any) -> Aval:
    if not len(low) == len(high) == len(interior) == len(x.shape):
        raise ShapeError.make("one low, high and interior width per axis is needed", op="pad", got={"x": x})
    if min((*low, *high, *interior), default=0) < 0:
        raise ShapeError.make("padding widths cannot be negative", op="pad", got={"x": x})
    sizes = (a + n + max(n - 1, 0) * i + b for n, a, b, i in zip(x.shape, low, high, interior, strict=True))
    return tuple(sizes), x.dtype


def _pad_reference(x: np.ndarray, *, low: Shape, high: Shape, interior: Shape, value: Any) -> np.ndarray:
    shape, _ = _pad_infer(x, low=low, high=high, interior=interior, value=value)
    out = np.full(shape, value, x.dtype)
    out[
        tuple(
            slice(a, a + n + max(n - 1, 0) * i, i + 1) for n, a, i in zip(x.shape, low, interior, strict=True)
        )
    ] = x
    return out


def _pad_vjp(g: Any, y: Any, x: Any, *, low: Shape, high: Shape, interior: Shape, value: Any) -> list[Any]:
    stop = tuple(a + n + max(n - 1, 0) * i for n, a, i in zip(x.shape, low, interior, strict=True))
    return [slice_(g, start=low, stop=stop, step=tuple(i + 1 for i in interior))]


pad: Op = define(
    "pad",
    arity=1,
    infer=_pad_infer,
    reference=_pad_reference,
    vjp=_pad_vjp,
    category="view",
    meaning="Puts a constant before, after and between the elements of each axis.",
    formula="y[low + i·(interior + 1)] = x[i], value elsewhere, for each axis",
    shape_rule="low + n + max(n − 1, 0)·interior + high for each axis",
    grad_rule="dx = slice(g) at the positions of the elements",
    samples=lambda: [
        ((np.arange(1.0, 4.0),), {"low": (1,), "high": (2,), "interior": (0,), "value": 0.0}),
        (
            (np.arange(6.0).reshape(2, 3),),
            {"low": (0, 1), "high": (1, 0), "interior": (2, 1), "value": -1.0},
        ),
        ((np.ones((0, 2)),), {"low": (1, 0), "high": (1, 0), "interior": (1, 0), "value": 2.0}),
    ],
    attrs={
        "low": "tuple of int ≥ 0",
        "high": "tuple of int ≥ 0",
        "interior": "tuple of int ≥ 0",
        "value": "scalar",
    },
)


def _flip_infer(x: HasAval, *, axes: Shape) -> Aval:
    if list(axes) != sorted(set(axes)) or any(not 0 <= a < len(x.shape) for a in axes):
        raise ShapeError.make(f"axes {axes} do not fit", op="flip", got={"x": x})
    return x.shape, x.dtype


flip: Op = define(
    "flip",
    arity=1,
    infer=_flip_infer,
    reference=lambda x, *, axes: np.flip(x, axes),
    vjp=lambda g, y, x, *, axes: [flip(g, axes=axes)],
    category="view",
    meaning="The order of elements reversed along some axes.",
    formula="y[…, i, …] = x[…, n − 1 − i, …]",
    shape_rule="same as the operand",
    grad_rule="dx = flip(g)",
    samples=lambda: [
        ((np.arange(3.0),), {"axes": (0,)}),
        ((np.arange(6.0).reshape(2, 3),), {"axes": (0, 1)}),
    ],
    attrs={"axes": "tuple of int, sorted"},
    traits=("view",),
)

# -- concatenate -----------------------------------------------------------------------------------


def _concatenate_infer(*xs: HasAval, axis: int) -> Aval:
    if not xs:
        raise ShapeError.make("at least one array is needed", op="concatenate")
    first = xs[0]
    if not 0 <= axis < len(first.shape):
        raise ShapeError.make(f"axis {axis} does not exist", op="concatenate", got={"x0": first})
    got = {f"x{i}": x for i, x in enumerate(xs[:6])}
    for x in xs[1:]:
        rest, own = (s[:axis] + s[axis + 1 :] for s in (first.shape, x.shape))
        if len(x.shape) != len(first.shape) or rest != own:
            raise ShapeError.make(
                f"all sizes except those of axis {axis} must be equal", op="concatenate", got=got
            )
        if x.dtype != first.dtype:
            raise DTypeError.make("all operands need one dtype", op="concatenate", got=got)
    size = sum(x.shape[axis] for x in xs)
    return (*first.shape[:axis], size, *first.shape[axis + 1 :]), first.dtype


def _concatenate_vjp(g: Any, y: Any, *xs: Any, axis: int) -> list[Any]:
    out, offset, ndim = [], 0, len(g.shape)
    for x in xs:
        n = x.shape[axis]
        start = tuple(offset if i == axis else 0 for i in range(ndim))
        stop = tuple(offset + n if i == axis else s for i, s in enumerate(g.shape))
        out.append(slice_(g, start=start, stop=stop, step=(1,) * ndim))
        offset += n
    return out


concatenate: Op = define(
    "concatenate",
    arity=None,
    infer=_concatenate_infer,
    reference=lambda *xs, axis: np.concatenate(xs, axis),
    vjp=_concatenate_vjp,
    category="view",
    meaning="Arrays joined along an axis.",
    formula="y = [x₀ | x₁ | …] along the axis",
    shape_rule="sizes of the axis add up; all others are equal",
    grad_rule="dxₖ = the slice of g that xₖ became",
    samples=lambda: [
        ((np.arange(2.0), np.arange(3.0)), {"axis": 0}),
        ((np.ones((2, 1)), np.zeros((2, 0)), np.full((2, 2), 3.0)), {"axis": 1}),
    ],
    attrs={"axis": "int"},
)
