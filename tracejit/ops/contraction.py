"""``dot_general``: the one matrix product behind matmul, dot, tensordot and einsum.

Used by ``functions.linalg``. Semantics and result layout are those of ``jax.lax.dot_general``: batch axes first, then the
free axes of the left operand, then those of the right one.
"""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np

from tracejit.dtypes import FLOAT32
from tracejit.errors import DTypeError, GraphError, ShapeError
from tracejit.ops import rules
from tracejit.ops.registry import HasAval, define

Axes = tuple[int, ...]


def free_axes(ndim: int, batch: Axes, contract: Axes) -> Axes:
    """The axes that are neither batch nor contracted, in order."""
    return tuple(i for i in range(ndim) if i not in batch and i not in contract)


def _infer(
    lhs: HasAval, rhs: HasAval, *, lhs_batch: Axes, rhs_batch: Axes, lhs_contract: Axes, rhs_contract: Axes
) -> rules.Aval:
    rules.check_kind("dot_general", "iuf", lhs=lhs, rhs=rhs)
    if lhs.dtype != rhs.dtype:
        raise DTypeError.make(
            "both operands must have one dtype", op="dot_general", got={"lhs": lhs, "rhs": rhs}
        )
    for x, batch, contract in ((lhs, lhs_batch, lhs_contract), (rhs, rhs_batch, rhs_contract)):
        used = (*batch, *contract)
        if len(set(used)) != len(used) or any(not 0 <= a < len(x.shape) for a in used):
            raise GraphError(
                f"[dot_general] batch {batch} and contracted axes {contract} do not fit {tuple(x.shape)}"
            )
    if len(lhs_batch) != len(rhs_batch) or len(lhs_contract) != len(rhs_contract):
        raise GraphError("[dot_general] the operands have different numbers of batch or contracted axes")
    for a, b in zip(lhs_batch + lhs_contract, rhs_batch + rhs_contract, strict=True):
        if lhs.shape[a] != rhs.shape[b]:
            raise ShapeError.make(
                f"axis {a} of the left operand (size {lhs.shape[a]}) does not match axis {b} of the right one "
                f"(size {rhs.shape[b]})",
                op="dot_general",
                got={"lhs": lhs, "rhs": rhs},
            )
    shape = [lhs.shape[a] for a in lhs_batch]
    shape += [lhs.shape[a] for a in free_axes(len(lhs.shape), lhs_batch, lhs_contract)]
    shape += [rhs.shape[a] for a in free_axes(len(rhs.shape), rhs_batch, rhs_contract)]
    return tuple(shape), lhs.dtype


def _reference(
    lhs: Any, rhs: Any, *, lhs_batch: Axes, rhs_batch: Axes, lhs_contract: Axes, rhs_contract: Axes
) -> Any:
    dtype = lhs.dtype
    if dtype == np.float16:
        lhs, rhs = lhs.astype(FLOAT32), rhs.astype(FLOAT32)
    lhs_free = free_axes(lhs.ndim, lhs_batch, lhs_contract)
    rhs_free = free_axes(rhs.ndim, rhs_batch, rhs_contract)
    batch = tuple(lhs.shape[a] for a in lhs_batch)
    rows, columns = tuple(lhs.shape[a] for a in lhs_free), tuple(rhs.shape[a] for a in rhs_free)
    k = prod(lhs.shape[a] for a in lhs_contract)
    # matmul takes strided operands, so transposing costs a copy only where several axes have to be merged.
    a = lhs.transpose(lhs_batch + lhs_free + lhs_contract).reshape((*batch, prod(rows), k))
    b = rhs.transpose(rhs_batch + rhs_contract + rhs_free).reshape((*batch, k, prod(columns)))
    return np.matmul(a, b).reshape(batch + rows + columns).astype(dtype, copy=False)


def _vjp(
    g: Any,
    y: Any,
    lhs: Any,
    rhs: Any,
    *,
    lhs_batch: Axes,
    rhs_batch: Axes,
    lhs_contract: Axes,
    rhs_contract: Axes,
) -> tuple[Any, Any]:
    if not rules.is_float(lhs):
        return None, None
    batch = tuple(range(len(lhs_batch)))
    lhs_free = free_axes(len(lhs.shape), lhs_batch, lhs_contract)
    rhs_free = free_axes(len(rhs.shape), rhs_batch, rhs_contract)
    middle = len(batch) + len(lhs_free)
    g_rows, g_columns = tuple(range(len(batch), middle)), tuple(range(middle, middle + len(rhs_free)))
    # dlhs[batch, lhs free, contracted] = Σ g · rhs over the free axes of rhs, then back to the order of lhs.
    dlhs = dot_general(
        g, rhs, lhs_batch=batch, rhs_batch=rhs_batch, lhs_contract=g_columns, rhs_contract=rhs_free
    )
    dlhs = rules.transpose(dlhs, _restore(lhs_batch, lhs_free, lhs_contract, rhs_contract))
    drhs = dot_general(
        g, lhs, lhs_batch=batch, rhs_batch=lhs_batch, lhs_contract=g_rows, rhs_contract=lhs_free
    )
    drhs = rules.transpose(drhs, _restore(rhs_batch, rhs_free, rhs_contract, lhs_contract))
    return dlhs, drhs


def _restore(batch: Axes, free: Axes, contract: Axes, partner: Axes) -> Axes:
    """The permutation from (batch, free, contracted in the order of the partner's axes) to the operand's own order."""
    by_partner = [c for _, c in sorted(zip(partner, contract, strict=True))]
    layout = [*batch, *free, *by_partner]
    return tuple(layout.index(axis) for axis in range(len(layout)))


def _samples() -> list[tuple[tuple[np.ndarray, ...], dict[str, Any]]]:
    cases: list[tuple[tuple[int, ...], tuple[int, ...], tuple[Axes, Axes, Axes, Axes]]] = [
        ((3, 4), (4, 5), ((), (), (1,), (0,))),
        ((4,), (4,), ((), (), (0,), (0,))),
        ((2, 3, 4), (2, 4, 5), ((0,), (0,), (2,), (1,))),
        ((3, 2, 4), (5, 4, 2), ((1,), (2,), (2,), (1,))),
        ((2, 3, 4, 5), (4, 3, 6), ((), (), (2, 1), (0, 1))),
        ((2, 3), (4,), ((), (), (), ())),
        ((2, 3, 4), (3, 2, 4), ((1, 0), (0, 1), (), ())),
        ((3, 0), (0, 5), ((), (), (1,), (0,))),
    ]
    names = ("lhs_batch", "rhs_batch", "lhs_contract", "rhs_contract")
    out: list[tuple[tuple[np.ndarray, ...], dict[str, Any]]] = []
    for left, right, axes in cases:
        attrs = dict(zip(names, axes, strict=True))
        for dtype in ("float64", "float32"):
            out.append(((rules.floats(left, -2, 2, dtype, 0), rules.floats(right, -2, 2, dtype, 1)), attrs))
    plain = dict(zip(names, cases[0][2], strict=True))
    out.append(
        ((rules.integers((3, 4), -9, 9, "int32", 0), rules.integers((4, 5), -9, 9, "int32", 1)), plain)
    )
    out.append(
        ((rules.floats((3, 4), -2, 2, "float16", 0), rules.floats((4, 5), -2, 2, "float16", 1)), plain)
    )
    return out


dot_general = define(
    "dot_general",
    arity=2,
    infer=_infer,
    reference=rules.quiet(_reference),
    vjp=_vjp,
    category="contraction",
    meaning="Matrix product generalised to any axes: pairs of axes are contracted or run in parallel (batch).",
    formula="y[b, i, j] = Σₖ lhs[b, i, k]·rhs[b, j, k]",
    shape_rule="batch axes, then the free axes of the left operand, then those of the right one",
    grad_rule="dlhs = Σⱼ g[b, i, j]·rhs[b, j, k], drhs = Σᵢ g[b, i, j]·lhs[b, i, k]",
    samples=_samples,
    attrs={
        "lhs_batch": "batch axes of the left operand",
        "rhs_batch": "the matching axes of the right operand",
        "lhs_contract": "axes of the left operand to sum over",
        "rhs_contract": "the matching axes of the right operand",
    },
)
