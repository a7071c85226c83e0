"""Activation functions and softmax, with PyTorch's names: composites of NumPy functions inside named scopes.

Used through ``tracejit.nn``; on NumPy arrays they compute at once, on tensors they record. float16, float32
and float64 keep their dtype; integers become float64 except in ``relu``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from tracejit.functions import erf
from tracejit.nn._common import check_axis, float_operand, named_scope, narrow, operand, widen, with_vjp

_SQRT_HALF = math.sqrt(0.5)
_INV_SQRT_TAU = 1.0 / math.sqrt(2.0 * math.pi)
_SQRT_2_OVER_PI = math.sqrt(2.0 / math.pi)
_GELU_CUBIC = 0.044715


def _pointwise(name: str, fn: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """``fn`` in the scope ``name``, computed in float32 for float16."""

    def apply(x: Any) -> Any:
        x = float_operand(x, name)
        with named_scope(name):
            return narrow(fn(widen(x)), x.dtype)

    return apply


# -- relu and its relatives ----------------------------------------------------------------------------------

_relu = with_vjp(
    "relu",
    lambda x: (np.maximum(x, 0), x),
    # 0 at x == 0 as in PyTorch and JAX, where maximum alone would share the gradient between its operands.
    lambda x, g: (np.where(x > 0, g, 0),),
)


def relu(x: Any) -> Any:
    """``max(x, 0)``, same shape and dtype as ``x``. NaN stays NaN; the gradient at 0 is 0."""
    x = operand(x, "relu")
    with named_scope("relu"):
        return _relu(x)


def leaky_relu(x: Any, negative_slope: float = 0.01) -> Any:
    """``x`` where positive, else ``negative_slope * x``; same shape as ``x``."""
    return _pointwise("leaky_relu", lambda v: np.where(v > 0, v, v * negative_slope))(x)


def elu(x: Any, alpha: float = 1.0) -> Any:
    """``x`` where positive, else ``alpha * (exp(x) - 1)`` (Clevert et al., 2015); same shape as ``x``."""
    # The minimum keeps exp of large positive values, which where() would discard, from overflowing.
    return _pointwise("elu", lambda v: np.where(v > 0, v, np.expm1(np.minimum(v, 0)) * alpha))(x)


# -- sigmoid family ------------------------------------------------------------------------------------------


def _logistic(x: Any) -> Any:
    z = np.exp(-np.abs(x))  # in (0, 1]: no overflow on either side
    return np.where(x >= 0, 1.0, z) / (1.0 + z)


def _silu_grad(x: Any, g: Any) -> tuple[Any]:
    s = _sigmoid(x)
    return (g * s * (1.0 + x * (1.0 - s)),)


def _sigmoid_fwd(x: Any) -> tuple[Any, Any]:
    y = _logistic(x)
    return y, y


_sigmoid = with_vjp("sigmoid", _sigmoid_fwd, lambda y, g: (g * y * (1.0 - y),))
_silu = with_vjp("silu", lambda x: (x * _logistic(x), x), _silu_grad)


def _softplus_value(x: Any) -> Any:
    return np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x)))


_softplus = with_vjp("softplus", lambda x: (_softplus_value(x), x), lambda x, g: (g * _sigmoid(x),))


def sigmoid(x: Any) -> Any:
    """``1 / (1 + exp(-x))`` without overflow; same shape as ``x``."""
    return _pointwise("sigmoid", _sigmoid)(x)


def silu(x: Any) -> Any:
    """``x * sigmoid(x)`` (also called swish); same shape as ``x``."""
    return _pointwise("silu", _silu)(x)


def softplus(x: Any) -> Any:
    """``log(1 + exp(x))`` without overflow; same shape as ``x``."""
    return _pointwise("softplus", _softplus)(x)


def tanh(x: Any) -> Any:
    """Hyperbolic tangent; same shape as ``x``."""
    return _pointwise("tanh", np.tanh)(x)


# -- gelu ----------------------------------------------------------------------------------------------------


def _gelu_exact_value(x: Any) -> Any:
    return x * 0.5 * (1.0 + erf(x * _SQRT_HALF))


def _gelu_exact_grad(x: Any, g: Any) -> tuple[Any]:
    cdf = 0.5 * (1.0 + erf(x * _SQRT_HALF))
    pdf = np.exp(x * x * -0.5) * _INV_SQRT_TAU
    return (g * (cdf + x * pdf),)


def _gelu_inner(x: Any) -> Any:
    return np.tanh(x * (_SQRT_2_OVER_PI + x * x * (_SQRT_2_OVER_PI * _GELU_CUBIC)))


def _gelu_tanh_value(x: Any) -> Any:
    return x * 0.5 * (1.0 + _gelu_inner(x))


def _gelu_tanh_grad(x: Any, g: Any) -> tuple[Any]:
    t = _gelu_inner(x)  # the forward pass has this node already
    slope = _SQRT_2_OVER_PI + x * x * (3.0 * _SQRT_2_OVER_PI * _GELU_CUBIC)
    return (g * (0.5 * (1.0 + t) + x * 0.5 * (1.0 - t * t) * slope),)


_gelu_exact = with_vjp("gelu", lambda x: (_gelu_exact_value(x), x), _gelu_exact_grad)
_gelu_tanh = with_vjp("gelu_tanh", lambda x: (_gelu_tanh_value(x), x), _gelu_tanh_grad)


def gelu(x: Any, approximate: str = "none") -> Any:
    """Gaussian error linear unit ``x * Phi(x)`` (Hendrycks & Gimpel, 2016); same shape as ``x``.

    ``approximate="tanh"`` is the cheaper form of GPT-2. ValueError for another ``approximate``.
    """
    if approximate not in ("none", "tanh"):
        raise ValueError(f"[gelu] approximate must be 'none' or 'tanh', not {approximate!r}")
    return _pointwise("gelu", _gelu_exact if approximate == "none" else _gelu_tanh)(x)


# -- softmax family ------------------------------------------------------------------------------------------
# The row maximum is subtracted, so huge inputs cannot overflow.


@functools.cache
def _softmax_along(axis: int) -> Callable[[Any], Any]:
    def fwd(x: Any) -> tuple[Any, Any]:
        e = np.exp(x - np.max(x, axis=axis, keepdims=True))
        y = e / np.sum(e, axis=axis, keepdims=True)
        return y, y

    def bwd(y: Any, g: Any) -> tuple[Any]:
        return (y * (g - np.sum(g * y, axis=axis, keepdims=True)),)

    return with_vjp("softmax", fwd, bwd)


@functools.cache
def _log_softmax_along(axis: int) -> Callable[[Any], Any]:
    def fwd(x: Any) -> tuple[Any, Any]:
        shifted = x - np.max(x, axis=axis, keepdims=True)
        y = shifted - np.log(np.sum(np.exp(shifted), axis=axis, keepdims=True))
        return y, y

    def bwd(y: Any, g: Any) -> tuple[Any]:
        return (g - np.exp(y) * np.sum(g, axis=axis, keepdims=True),)

    return with_vjp("log_softmax", fwd, bwd)


@functools.cache
def _logsumexp_along(axis: int | tuple[int, ...]) -> Callable[[Any], Any]:
    def fwd(x: Any) -> tuple[Any, Any]:
        top = np.max(x, axis=axis, keepdims=True)
        top = np.where(np.isfinite(top), top, 0)  # all -inf gives -inf, a +inf gives +inf, instead of NaN
        y = np.log(np.sum(np.exp(x - top), axis=axis, keepdims=True)) + top
        return y, (x, y)

    def bwd(residuals: Any, g: Any) -> tuple[Any]:
        x, y = residuals
        return (g * np.exp(x - y),)

    return with_vjp("logsumexp", fwd, bwd)


def softmax(x: Any, axis: int = -1) -> Any:
    """``exp(x) / sum(exp(x))`` along ``axis``; same shape as ``x``. A row of only -inf gives NaN, as in
    PyTorch.
    """
    x = float_operand(x, "softmax")
    check_axis(x, axis, "softmax")
    with named_scope("softmax"):
        return narrow(_softmax_along(axis)(widen(x)), x.dtype)


def log_softmax(x: Any, axis: int = -1) -> Any:
    """``log(softmax(x))`` along ``axis``, computed without the intermediate that underflows; same shape as
    ``x``.
    """
    x = float_operand(x, "log_softmax")
    check_axis(x, axis, "log_softmax")
    with named_scope("log_softmax"):
        return narrow(_log_softmax_along(axis)(widen(x)), x.dtype)


def logsumexp(x: Any, axis: int | tuple[int, ...] | None = -1, keepdims: bool = False) -> Any:
    """``log(sum(exp(x)))`` along ``axis`` (None: all axes) without overflow; ``axis`` is dropped unless
    ``keepdims``.
    """
    x = float_operand(x, "logsumexp")
    axes = tuple(range(x.ndim)) if axis is None else (axis,) if isinstance(axis, int) else tuple(axis)
    for a in axes:
        check_axis(x, a, "logsumexp")
    with named_scope("logsumexp"), np.errstate(divide="ignore", over="ignore"):
        y = _logsumexp_along(axes)(widen(x))
        return narrow(y if keepdims else np.squeeze(y, axis=axes), x.dtype)


#: Activations that modules accept by name.
ACTIVATIONS: dict[str, Callable[[Any], Any]] = {
    "relu": relu,
    "gelu": gelu,
    "gelu_tanh": functools.partial(gelu, approximate="tanh"),
    "silu": silu,
    "sigmoid": sigmoid,
    "tanh": tanh,
    "softplus": softplus,
    "leaky_relu": leaky_relu,
    "elu": elu,
}

__all__ = [
    "elu",
    "gelu",
    "leaky_relu",
    "log_softmax",
    "logsumexp",
    "relu",
    "sigmoid",
    "silu",
    "softmax",
    "softplus",
    "tanh",
]
