"""Reductions over axes: sum, product, extrema, any/all, and the positions of extrema.

Used by ``functions.reductions``, which handles dtypes, ``axis`` forms and ``keepdims``, and by gradient rules. ``axes``
is a sorted tuple of non-negative axes, which the result drops.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tracejit.dtypes import FLOAT32, INT64
from tracejit.errors import GraphError, ShapeError
from tracejit.ops import registry, rules
from tracejit.ops.registry import NONDIFFERENTIABLE, HasAval, Op, VjpRule, _NonDifferentiable, define

Axes = tuple[int, ...]


def reduced_shape(op: str, shape: tuple[int, ...], axes: Axes) -> tuple[int, ...]:
    """``shape`` without ``axes``; GraphError unless ``axes`` is sorted, unique and within range."""
    if list(axes) != sorted(set(axes)) or any(not 0 <= a < len(shape) for a in axes):
        raise GraphError(f"[{op}] axes {axes} must be sorted, unique and within 0..{len(shape) - 1}")
    return tuple(s for i, s in enumerate(shape) if i not in axes)


def unreduce(y: Any, shape: tuple[int, ...], axes: Axes) -> Any:
    """``y``, a result of reducing ``axes``, repeated along them to ``shape``."""
    kept = tuple(1 if i in axes else s for i, s in enumerate(shape))
    return rules.broadcast_to(rules.reshape(y, kept), tuple(shape))


def _samples(kinds: str, empty: bool) -> Callable[[], list[tuple[tuple[np.ndarray, ...], dict[str, Any]]]]:
    def samples() -> list[tuple[tuple[np.ndarray, ...], dict[str, Any]]]:
        cases: list[tuple[tuple[int, ...], Axes]] = [
            ((), ()), ((5,), (0,)), ((3, 4), (0,)), ((3, 4), (1,)),
            ((2, 3, 4), (0, 2)), ((2, 3, 4), (0, 1, 2)), ((3, 2), ()),
        ]  # fmt: skip
        cases += [((2, 0), (1,))] if empty else [((2, 0), ())]
        out: list[tuple[tuple[np.ndarray, ...], dict[str, Any]]] = []
        for shape, axes in cases:
            if "f" in kinds:
                out += [((rules.floats(shape, -2, 2, d),), {"axes": axes}) for d in ("float64", "float32")]
            if "i" in kinds:
                out.append(((rules.integers(shape, -9, 9, "int64"),), {"axes": axes}))
            if "b" in kinds:
                out.append(((rules.bools(shape),), {"axes": axes}))
        if "f" in kinds:
            out.append(((rules.floats((3, 40), -2, 2, "float16"),), {"axes": (1,)}))
        return out

    return samples


def _reduction(
    name: str,
    reference: Callable[..., Any],
    vjp: VjpRule | _NonDifferentiable,
    formula: str,
    meaning: str,
    grad_rule: str = "",
    *,
    kinds: str,
    empty: bool = True,
) -> Op:
    """Define a reduction with attribute ``axes``; ``empty`` tells whether reducing no elements has a result."""

    def infer(x: HasAval, *, axes: Axes) -> rules.Aval:
        rules.check_kind(name, kinds, x=x)
        shape = reduced_shape(name, tuple(x.shape), axes)
        if not empty and any(x.shape[a] == 0 for a in axes):
            raise ShapeError.make(f"the {name} of no elements does not exist", op=name, got={"x": x})
        return shape, x.dtype

    return define(
        name,
        arity=1,
        infer=infer,
        reference=rules.quiet(reference),
        vjp=vjp,
        category="reduction",
        meaning=meaning,
        formula=formula,
        shape_rule="the operand's shape without the reduced axes",
        grad_rule=grad_rule,
        samples=_samples(kinds, empty),
        attrs={"axes": "tuple of the axes to reduce, sorted, non-negative"},
        traits=("reduction",),
    )


def _accumulate(function: Callable[..., Any]) -> Callable[..., Any]:
    """Float16 adds and multiplies in float32, all other dtypes in themselves (NumPy would widen small integers)."""

    def reference(x: Any, *, axes: Axes) -> Any:
        wide = FLOAT32 if x.dtype == np.float16 else x.dtype
        return np.asarray(function(x, axis=axes, dtype=wide)).astype(x.dtype, copy=False)

    return reference


def _sum_vjp(g: Any, y: Any, x: Any, *, axes: Axes) -> tuple[Any]:
    return (unreduce(g, x.shape, axes) if rules.is_float(x) else None,)


sum_ = _reduction(
    "sum",
    _accumulate(np.sum),
    _sum_vjp,
    "y = Σ x",
    "Sum over axes; float16 is accumulated in float32.",
    "dx = g, repeated along the axes",
    kinds="iuf",
)


def _prod_vjp(g: Any, y: Any, x: Any, *, axes: Axes) -> tuple[Any]:
    if not rules.is_float(x):
        return (None,)
    shape = tuple(x.shape)
    kept = tuple(i for i in range(len(shape)) if i not in axes)
    perm = kept + tuple(axes)
    n = int(np.prod([shape[a] for a in axes], dtype=np.int64))
    lead = tuple(shape[i] for i in kept)
    rows = rules.reshape(rules.transpose(x, perm), (*lead, n))
    others = _times_all_others(rules.reshape(g, (*lead, 1)), rows)
    moved = rules.reshape(others, lead + tuple(shape[a] for a in axes))
    return (rules.transpose(moved, tuple(int(i) for i in np.argsort(perm))),)


def _times_all_others(g: Any, rows: Any) -> Any:
    """``g`` times the product of all other elements of each row, without division: exact at zeros, at any order.

    Works down a binary tree of pairwise products: an element's cotangent is its pair's, times its partner.
    """
    shape = tuple(rows.shape)
    n = shape[-1]
    if n <= 1:
        return rules.broadcast_to(g, shape) if n else rows
    half = (n + 1) // 2
    left, right = _columns(rows, 0, half), _columns(rows, half, n)
    partner = right
    if n % 2:
        one = rules.full_like(_columns(rows, 0, 1), 1.0)
        partner = registry.get("concatenate")(right, one, axis=len(shape) - 1)
    pairs = _times_all_others(g, left * partner)
    first, second = pairs * partner, pairs * left
    return registry.get("concatenate")(first, _columns(second, 0, n - half), axis=len(shape) - 1)


def _columns(x: Any, start: int, stop: int) -> Any:
    shape = tuple(x.shape)
    if (start, stop) == (0, shape[-1]):
        return x
    lead = (0,) * (len(shape) - 1)
    return registry.get("slice")(x, start=(*lead, start), stop=(*shape[:-1], stop), step=(1,) * len(shape))


prod = _reduction(
    "prod",
    _accumulate(np.prod),
    _prod_vjp,
    "y = Π x",
    "Product over axes; float16 is accumulated in float32.",
    "dx = g·(product of all other elements)",
    kinds="iuf",
)


def _extremum_vjp(g: Any, y: Any, x: Any, *, axes: Axes) -> tuple[Any]:
    if not rules.is_float(x):
        return (None,)
    is_extreme = registry.get("equal")(x, unreduce(y, x.shape, axes))
    mask = rules.convert(is_extreme, x.dtype)
    return (mask * unreduce(g / sum_(mask, axes=axes), x.shape, axes),)


max_ = _reduction(
    "max",
    lambda x, *, axes: np.max(x, axis=axes),
    _extremum_vjp,
    "y = max x",
    "Largest element over axes; NaN if there is one.",
    "dx = g, shared equally by the elements that are the maximum",
    kinds="biuf",
    empty=False,
)
min_ = _reduction(
    "min",
    lambda x, *, axes: np.min(x, axis=axes),
    _extremum_vjp,
    "y = min x",
    "Smallest element over axes; NaN if there is one.",
    "dx = g, shared equally by the elements that are the minimum",
    kinds="biuf",
    empty=False,
)
any_ = _reduction(
    "any",
    lambda x, *, axes: np.any(x, axis=axes),
    NONDIFFERENTIABLE,
    "y = x₀ ∨ x₁ ∨ …",
    "Whether any is True.",
    kinds="b",
)
all_ = _reduction(
    "all",
    lambda x, *, axes: np.all(x, axis=axes),
    NONDIFFERENTIABLE,
    "y = x₀ ∧ x₁ ∧ …",
    "Whether all are True.",
    kinds="b",
)


def _arg_extremum(name: str, reference: Callable[..., Any], word: str) -> Op:
    def infer(x: HasAval, *, axis: int) -> rules.Aval:
        shape = reduced_shape(name, tuple(x.shape), (axis,))
        if x.shape[axis] == 0:
            raise ShapeError.make(f"the {name} of no elements does not exist", op=name, got={"x": x})
        return shape, INT64

    def samples() -> list[tuple[tuple[np.ndarray, ...], dict[str, Any]]]:
        out: list[tuple[tuple[np.ndarray, ...], dict[str, Any]]] = []
        for shape, axis in (((5,), 0), ((3, 4), 0), ((3, 4), 1), ((2, 3, 4), 1), ((0, 3), 1)):
            out.append(((rules.floats(shape, -2, 2),), {"axis": axis}))
            out.append(((rules.integers(shape, 0, 3, "int32"),), {"axis": axis}))
            out.append(((rules.bools(shape),), {"axis": axis}))
        out.append(((np.array([1.0, np.nan, 3.0, np.nan], np.float32),), {"axis": 0}))
        return out

    return define(
        name,
        arity=1,
        infer=infer,
        reference=lambda x, *, axis: np.asarray(reference(x, axis=axis)).astype(np.int64, copy=False),
        vjp=NONDIFFERENTIABLE,
        category="reduction",
        meaning=f"Position of the first {word} element along an axis; the first NaN if there is one.",
        formula=f"y = {name} x",
        shape_rule="the operand's shape without the axis; int64",
        samples=samples,
        attrs={"axis": "the axis to search, non-negative"},
        traits=("reduction",),
    )


argmax = _arg_extremum("argmax", np.argmax, "largest")
argmin = _arg_extremum("argmin", np.argmin, "smallest")
