"""SGD, momentum, Nesterov, RMSprop, Adam, AdamW, with PyTorch's formulas and defaults. Imported by users.

Each returns an :class:`Optimizer`. ``learning_rate`` is a number, an array or traced scalar, or a schedule (a
function of the number of steps taken so far).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from tracejit.optim.base import (
    Leaves,
    Optimizer,
    Rate,
    Transform,
    arithmetic_dtype,
    as_dtype,
    check_range,
    stateless,
    zeros_like,
)

INFINITY = float("inf")


def _check_rate(owner: str, learning_rate: Rate) -> None:
    check_range(owner, 0.0, INFINITY, {"learning_rate": learning_rate})


def _add_decay(amount: float) -> Transform:
    """``g + amount * w``."""
    return stateless(
        lambda grads, weights: {
            name: g + as_dtype(weights[name], arithmetic_dtype(weights[name])) * amount
            for name, g in grads.items()
        }
    )


def _with_decay(amount: float) -> tuple[Transform, ...]:
    return (_add_decay(amount),) if amount else ()


def _momentum(beta: float, nesterov: bool) -> Transform:
    def apply(grads: Leaves, slots: Any, weights: Leaves, step: Any) -> tuple[Leaves, Any]:
        velocity = {name: slots["velocity"][name] * beta + g for name, g in grads.items()}
        moved = {name: g + velocity[name] * beta for name, g in grads.items()} if nesterov else velocity
        return moved, {"velocity": velocity}

    return Transform(lambda weights: {"velocity": zeros_like(weights)}, apply)


def sgd(
    learning_rate: Rate, momentum: float = 0.0, nesterov: bool = False, weight_decay: float = 0.0
) -> Optimizer:
    """``w -= rate * v`` with ``v = momentum * v + g`` (Polyak) and ``g`` including ``weight_decay * w``.

    ``nesterov`` uses ``g + momentum * v`` (Sutskever et al., 2013). ValueError for coefficients out of range.
    """
    _check_rate("sgd", learning_rate)
    check_range("sgd", 0.0, 1.0, {"momentum": momentum})
    check_range("sgd", 0.0, INFINITY, {"weight_decay": weight_decay})
    if nesterov and not momentum:
        raise ValueError("[sgd] nesterov needs a momentum above 0")
    stages = _with_decay(weight_decay) + ((_momentum(momentum, nesterov),) if momentum else ())
    return Optimizer(stages, learning_rate)


def momentum(learning_rate: Rate, beta: float = 0.9, weight_decay: float = 0.0) -> Optimizer:
    """:func:`sgd` with heavy-ball momentum ``beta``."""
    return sgd(learning_rate, momentum=beta, weight_decay=weight_decay)


def nesterov(learning_rate: Rate, beta: float = 0.9, weight_decay: float = 0.0) -> Optimizer:
    """:func:`sgd` with Nesterov momentum ``beta``."""
    return sgd(learning_rate, momentum=beta, nesterov=True, weight_decay=weight_decay)


def rmsprop(
    learning_rate: Rate,
    alpha: float = 0.99,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    momentum: float = 0.0,
) -> Optimizer:
    """``w -= rate * g / (sqrt(s) + eps)`` with ``s = alpha * s + (1 - alpha) * g^2`` (Tieleman & Hinton,
    2012).
    """
    _check_rate("rmsprop", learning_rate)
    check_range("rmsprop", 0.0, 1.0, {"alpha": alpha, "momentum": momentum})
    check_range("rmsprop", 0.0, INFINITY, {"eps": eps, "weight_decay": weight_decay})

    def apply(grads: Leaves, slots: Any, weights: Leaves, step: Any) -> tuple[Leaves, Any]:
        square = {name: slots["square"][name] * alpha + g * g * (1.0 - alpha) for name, g in grads.items()}
        return {name: g / (np.sqrt(square[name]) + eps) for name, g in grads.items()}, {"square": square}

    scale = Transform(lambda weights: {"square": zeros_like(weights)}, apply)
    stages = (*_with_decay(weight_decay), scale) + ((_momentum(momentum, False),) if momentum else ())
    return Optimizer(stages, learning_rate)


def _debias(beta: float, step: Any, dtype: Any) -> Any:
    """``1 - beta^step`` without the cancellation that ``beta^step`` near 1 suffers in float32."""
    if beta == 0.0:
        return 1.0
    return -np.expm1(as_dtype(step, dtype) * math.log(beta))


def _scale_by_adam(beta1: float, beta2: float, eps: float) -> Transform:
    def init(weights: Leaves) -> Any:
        return {"m": zeros_like(weights), "v": zeros_like(weights)}

    def apply(grads: Leaves, slots: Any, weights: Leaves, step: Any) -> tuple[Leaves, Any]:
        m = {name: slots["m"][name] * beta1 + g * (1.0 - beta1) for name, g in grads.items()}
        v = {name: slots["v"][name] * beta2 + g * g * (1.0 - beta2) for name, g in grads.items()}
        # (m / c1) / (sqrt(v / c2) + eps) with c = 1 - beta^step, the correction for the start at zero, written with
        # two scalars made once per dtype so that each weight needs one multiplication less.
        scalars: dict[Any, tuple[Any, Any]] = {}
        for g in grads.values():
            if g.dtype not in scalars:
                c1, c2 = _debias(beta1, step, g.dtype), _debias(beta2, step, g.dtype)
                scalars[g.dtype] = c1 / np.sqrt(c2), c1 * eps
        moved = {}
        for name, g in grads.items():
            scale, offset = scalars[g.dtype]
            moved[name] = m[name] / (np.sqrt(v[name]) * scale + offset)
        return moved, {"m": m, "v": v}

    return Transform(init, apply)


def _check_adam(
    owner: str, learning_rate: Rate, betas: tuple[float, float], eps: float, weight_decay: float
) -> None:
    _check_rate(owner, learning_rate)
    if len(betas) != 2 or not all(0.0 <= b < 1.0 for b in betas):
        raise ValueError(f"[{owner}] betas must be two numbers in [0, 1), not {betas!r}")
    check_range(owner, 0.0, INFINITY, {"eps": eps, "weight_decay": weight_decay})


def adam(
    learning_rate: Rate = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> Optimizer:
    """Adam (Kingma & Ba, 2015); ``weight_decay`` is L2, added to the gradient, as in ``torch.optim.Adam``."""
    _check_adam("adam", learning_rate, betas, eps, weight_decay)
    return Optimizer((*_with_decay(weight_decay), _scale_by_adam(*betas, eps)), learning_rate)


def adamw(
    learning_rate: Rate = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
) -> Optimizer:
    """Adam with decoupled decay ``w -= rate * weight_decay * w`` (Loshchilov & Hutter, 2019), as
    ``torch.optim.AdamW``.
    """
    _check_adam("adamw", learning_rate, betas, eps, weight_decay)
    return Optimizer((_scale_by_adam(*betas, eps),), learning_rate, weight_decay)


__all__ = ["adam", "adamw", "momentum", "nesterov", "rmsprop", "sgd"]
