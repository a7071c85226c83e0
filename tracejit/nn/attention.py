"""Scaled dot-product attention and position codes. Used through ``tracejit.nn``.

Attention is written in one way only (product, scale, mask, softmax, product in the scope ``attention``),
which the compiler recognises and replaces by a kernel that never stores the scores.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from tracejit.errors import DTypeError, ShapeError
from tracejit.nn._common import FLOAT16, float_operand, iota, named_scope, operand
from tracejit.nn.activations import softmax
from tracejit.nn.dense import dropout


def scaled_dot_product_attention(
    q: Any,
    k: Any,
    v: Any,
    mask: Any = None,
    is_causal: bool = False,
    scale: float | None = None,
    *,
    dropout_p: float = 0.0,
    key: Any = None,
) -> Any:
    """``softmax(q @ k.T * scale + mask) @ v`` (Vaswani et al., 2017).

    ``q``: (..., L, d); ``k``: (..., S, d); ``v``: (..., S, dv). Returns (..., L, dv). ``mask`` broadcasts to
    (..., L, S): boolean (True takes part) or floating-point (added to the scores). ``is_causal`` lets query i
    see keys 0..i and may be combined with a mask. ``scale`` defaults to ``1/sqrt(d)``. A query that sees no
    key gives NaN, as in PyTorch. With ``dropout_p`` a ``tj.random`` ``key`` is needed. ShapeError or
    DTypeError if operands do not fit.
    """
    op = "scaled_dot_product_attention"
    q, k, v = float_operand(q, op), float_operand(k, op), float_operand(v, op)
    got = {"q": q, "k": k, "v": v}
    if min(q.ndim, k.ndim, v.ndim) < 2:
        raise ShapeError.make("q, k and v need at least the axes (positions, features)", op=op, got=got)
    if q.shape[-1] != k.shape[-1]:
        raise ShapeError.make("q and k must have the same number of features", op=op, got=got)
    if k.shape[-2] != v.shape[-2]:
        raise ShapeError.make("k and v must have the same number of positions", op=op, got=got)
    length, keys = q.shape[-2], k.shape[-2]
    if scale is None:
        scale = 1.0 / math.sqrt(q.shape[-1]) if q.shape[-1] else 1.0
    with named_scope("attention"):
        scores = np.matmul(q, np.swapaxes(k, -1, -2)) * scale
        if is_causal:
            visible = iota((length, keys), 0) >= iota((length, keys), 1)
            scores = np.where(visible, scores, -math.inf)
        if mask is not None:
            scores = _masked(scores, operand(mask, op), op)
        p = softmax(scores)
        if dropout_p:
            p = dropout(p, dropout_p, key)
        return np.matmul(p, v)


def _masked(scores: Any, mask: Any, op: str) -> Any:
    try:
        fits = np.broadcast_shapes(tuple(mask.shape), tuple(scores.shape)) == tuple(scores.shape)
    except ValueError:
        fits = False
    if not fits:
        raise ShapeError.make(
            "the mask must broadcast to the scores (..., queries, keys)",
            op=op,
            got={"mask": mask, "scores": scores},
        )
    if mask.dtype == np.bool_:
        return np.where(mask, scores, -math.inf)
    if mask.dtype.kind == "f":
        return scores + mask.astype(scores.dtype) if mask.dtype != scores.dtype else scores + mask
    raise DTypeError.make(
        "the mask must be boolean (True takes part) or floating-point (added)", op=op, got={"mask": mask}
    )


# -- positions -----------------------------------------------------------------------------------------------


def _angles(positions: Any, half: int, base: float) -> Any:
    """``positions * base**(-i/half)`` for i in 0..half-1: (..., half)."""
    frequency = np.exp(iota((half,), 0, positions.dtype) * (-math.log(base) / half))
    return np.expand_dims(positions, -1) * frequency


def sinusoidal_positions(length: int, dim: int, dtype: Any = np.float32, base: float = 10000.0) -> Any:
    """The fixed position code of Vaswani et al. (2017): (length, dim), sines in even and cosines in odd
    columns.
    """
    if length < 0 or dim < 2 or dim % 2:
        raise ShapeError.make(
            f"need length >= 0 and an even dim >= 2, got {length} and {dim}", op="sinusoidal_positions"
        )
    dtype = np.dtype(dtype)
    with named_scope("sinusoidal_positions"):
        wide = np.dtype(np.float32) if dtype == FLOAT16 else dtype
        angles = _angles(iota((length,), 0, wide), dim // 2, base)
        code = np.reshape(np.stack([np.sin(angles), np.cos(angles)], axis=-1), (length, dim))
        return code if wide == dtype else code.astype(dtype)


def rotary(x: Any, positions: Any = None, base: float = 10000.0) -> Any:
    """Rotary position embedding (Su et al., 2021): pairs ``(x[i], x[i+d/2])`` turned by ``position *
    base**(-2i/d)``.

    ``x``: (..., T, d) with even d; ``positions``: (T,) numbers, default 0..T-1. Returns the shape and dtype
    of ``x``. The pairing is that of GPT-NeoX and Llama (halves, not neighbours).
    """
    x = float_operand(x, "rotary")
    if x.ndim < 2 or x.shape[-1] % 2 or not x.shape[-1]:
        raise ShapeError.make(
            "x must be (..., positions, features) with an even number of features", op="rotary", got={"x": x}
        )
    half = x.shape[-1] // 2
    wide = np.dtype(np.float32) if x.dtype == FLOAT16 else x.dtype
    with named_scope("rotary"):
        if positions is None:
            positions = iota((x.shape[-2],), 0, wide)
        else:
            positions = operand(positions, "rotary").astype(wide)
            if tuple(positions.shape) != (x.shape[-2],):
                raise ShapeError.make(
                    "positions must be (T,)", op="rotary", got={"x": x, "positions": positions}
                )
        angles = _angles(positions, half, base)
        cos, sin = np.cos(angles).astype(x.dtype), np.sin(angles).astype(x.dtype)
        first, second = x[..., :half], x[..., half:]
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


__all__ = ["rotary", "scaled_dot_product_attention", "sinusoidal_positions"]
