"""Normalisation over the last axis or over channel groups, with closed-form gradients.

Used through ``tracejit.nn``. Only the standardisation has a custom gradient; scale and shift differentiate as
the multiplication and addition they are, so the gradients of ``weight`` and ``bias`` are plain sums.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from tracejit.errors import ShapeError
from tracejit.nn._common import float_operand, named_scope, narrow, operand, widen, with_vjp


@functools.cache
def _standardize(eps: float) -> Callable[[Any], Any]:
    """``(x - mean) / sqrt(var + eps)`` over the last axis (biased variance)."""

    def fwd(x: Any) -> tuple[Any, Any]:
        centered = x - np.mean(x, axis=-1, keepdims=True)
        rstd = 1.0 / np.sqrt(np.mean(centered * centered, axis=-1, keepdims=True) + eps)
        xhat = centered * rstd
        return xhat, (xhat, rstd)

    def bwd(residuals: Any, dh: Any) -> tuple[Any]:
        # Mean and variance depend on x too: dx = rstd * (dh - mean(dh) - xhat * mean(dh * xhat)).
        xhat, rstd = residuals
        mean_dh = np.mean(dh, axis=-1, keepdims=True)
        mean_dh_xhat = np.mean(dh * xhat, axis=-1, keepdims=True)
        return (rstd * (dh - mean_dh - xhat * mean_dh_xhat),)

    return with_vjp("layer_norm", fwd, bwd)


@functools.cache
def _rms_scale(eps: float) -> Callable[[Any], Any]:
    """``x / sqrt(mean(x^2) + eps)`` over the last axis."""

    def fwd(x: Any) -> tuple[Any, Any]:
        rstd = 1.0 / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps)
        xhat = x * rstd
        return xhat, (xhat, rstd)

    def bwd(residuals: Any, dh: Any) -> tuple[Any]:
        xhat, rstd = residuals
        return (rstd * (dh - xhat * np.mean(dh * xhat, axis=-1, keepdims=True)),)

    return with_vjp("rms_norm", fwd, bwd)


def _affine(y: Any, weight: Any, bias: Any, x: Any, op: str) -> Any:
    for name, p in (("weight", weight), ("bias", bias)):
        if p is not None and tuple(p.shape) != (x.shape[-1],):
            raise ShapeError.make(
                f"{name} must have the shape of the last axis of x, ({x.shape[-1]},)",
                op=op,
                got={"x": x, name: p},
            )
    if weight is not None:
        y = y * widen(weight)
    if bias is not None:
        y = y + widen(bias)
    return y


def _checked(x: Any, weight: Any, bias: Any, op: str) -> tuple[Any, Any, Any]:
    x = float_operand(x, op)
    if x.ndim == 0:
        raise ShapeError.make("a scalar has no last axis to normalise over", op=op, got={"x": x})
    weight = None if weight is None else operand(weight, op)
    bias = None if bias is None else operand(bias, op)
    return x, weight, bias


def layer_norm(x: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Any:
    """``(x - mean) / sqrt(var + eps) * weight + bias`` over the last axis (Ba et al., 2016).

    ``x``: (..., d); ``weight`` and ``bias``: (d,) or None. Returns (..., d) in the dtype of ``x``. ShapeError
    if the parameters do not fit.
    """
    x, weight, bias = _checked(x, weight, bias, "layer_norm")
    with named_scope("layer_norm"):
        return narrow(_affine(_standardize(float(eps))(widen(x)), weight, bias, x, "layer_norm"), x.dtype)


def rms_norm(x: Any, weight: Any = None, eps: float = 1e-6) -> Any:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last axis (Zhang & Sennrich, 2019).

    ``x``: (..., d); ``weight``: (d,) or None. Returns (..., d) in the dtype of ``x``.
    """
    x, weight, _ = _checked(x, weight, None, "rms_norm")
    with named_scope("rms_norm"):
        return narrow(_affine(_rms_scale(float(eps))(widen(x)), weight, None, x, "rms_norm"), x.dtype)


def group_norm(x: Any, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Any:
    """Normalisation over groups of channels (Wu & He, 2018). ``x``: (n, c, ...); ``weight``, ``bias``: (c,)
    or None.

    Returns the shape and dtype of ``x``. ShapeError if ``num_groups`` does not divide ``c``.
    """
    x = float_operand(x, "group_norm")
    if x.ndim < 2 or num_groups < 1 or x.shape[1] % num_groups:
        raise ShapeError.make(
            f"x must be (n, c, ...) with c divisible by num_groups={num_groups}",
            op="group_norm",
            got={"x": x},
        )
    n, c = x.shape[:2]
    per_channel = (1, c) + (1,) * (x.ndim - 2)
    with named_scope("group_norm"):
        y = _standardize(float(eps))(np.reshape(widen(x), (n, num_groups, -1)))
        y = np.reshape(y, x.shape)
        for name, p in (("weight", weight), ("bias", bias)):
            if p is None:
                continue
            p = operand(p, "group_norm")
            if tuple(p.shape) != (c,):
                raise ShapeError.make(
                    f"{name} must have shape ({c},)", op="group_norm", got={"x": x, name: p}
                )
            p = np.reshape(widen(p), per_channel)
            y = y * p if name == "weight" else y + p
        return narrow(y, x.dtype)


__all__ = ["group_norm", "layer_norm", "rms_norm"]
