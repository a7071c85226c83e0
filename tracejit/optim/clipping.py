"""Gradient clipping, as transforms for ``chain`` or called on a tree of gradients. Imported by users."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import optree

from tracejit.optim.base import (
    FLOAT16,
    FLOAT32,
    Leaves,
    Transform,
    as_dtype,
    check_range,
    scalar_as,
    stateless,
)
from tracejit.source import named_scope
from tracejit.tensor import is_arraylike


def _norm(arrays: list[Any]) -> Any:
    squares = []
    for a in arrays:
        a = as_dtype(a, FLOAT32) if a.dtype == FLOAT16 else a
        squares.append(np.sum(a * a))
    return np.sqrt(functools.reduce(lambda x, y: x + y, squares)) if squares else np.zeros((), FLOAT32)


def global_norm(tree: Any) -> Any:
    """The Euclidean norm of all floating-point arrays of a tree taken as one vector (a scalar)."""
    with named_scope("global_norm"):
        return _norm(
            [leaf for leaf in optree.tree_leaves(tree) if is_arraylike(leaf) and leaf.dtype.kind == "f"]
        )


def clip_by_global_norm(max_norm: float) -> Transform:
    """Scale all gradients by ``min(1, max_norm / norm)``, ``norm`` over the whole tree (Pascanu et al.,
    2013).

    A transform for :func:`chain`; on its own, ``clip_by_global_norm(1.0)(grads)`` is the clipped tree.
    """
    check_range("clip_by_global_norm", 0.0, float("inf"), {"max_norm": max_norm})

    def apply(grads: Leaves, weights: Leaves) -> Leaves:
        if not grads:
            return grads
        with named_scope("clip_by_global_norm"):
            norm = _norm(list(grads.values()))
            # The maximum keeps gradients below the limit exactly as they are and zero gradients from 0/0.
            limit = scalar_as(max_norm, norm.dtype)
            scale = limit / np.maximum(norm, limit) if max_norm else norm * 0.0
            return {name: g * as_dtype(scale, g.dtype) for name, g in grads.items()}

    return stateless(apply)


def clip_by_value(limit: float) -> Transform:
    """Clip every gradient element to ``[-limit, limit]``. A transform; ``clip_by_value(0.5)(grads)`` is the
    clipped tree.
    """
    check_range("clip_by_value", 0.0, float("inf"), {"limit": limit})

    def apply(grads: Leaves, weights: Leaves) -> Leaves:
        with named_scope("clip_by_value"):
            return {
                name: np.clip(g, -scalar_as(limit, g.dtype), scalar_as(limit, g.dtype))
                for name, g in grads.items()
            }

    return stateless(apply)


__all__ = ["clip_by_global_norm", "clip_by_value", "global_norm"]
