"""Initial weights drawn from a NumPy Generator, with PyTorch's names. Called by the modules and by users.

Every initialiser is ``f(shape, rng, ..., dtype=np.float32) -> array``. Fans follow PyTorch: axis 0 of a
weight is its outputs, axis 1 its inputs, further axes are the receptive field.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from tracejit.dtypes import canonical
from tracejit.errors import DTypeError, ShapeError


def _fans(shape: Sequence[int], op: str) -> tuple[int, int]:
    """(fan_in, fan_out) of a weight (out, in, *receptive field)."""
    if len(shape) < 2:
        raise ShapeError.make(
            f"fans need a weight with at least two axes (out, in), got shape {tuple(shape)}", op=op
        )
    field = math.prod(shape[2:])
    return shape[1] * field, shape[0] * field


def _float(dtype: Any, op: str) -> np.dtype[Any]:
    found = canonical(dtype, op=op)
    if found.kind != "f":
        raise DTypeError.make(f"weights are floating-point, not {found}", op=op)
    return found


def _generator(rng: Any, op: str) -> np.random.Generator:
    if not isinstance(rng, np.random.Generator):
        raise TypeError(
            f"[{op}] rng must be a NumPy Generator, e.g. np.random.default_rng(0), not {type(rng).__name__}"
        )
    return rng


def uniform(
    shape: Sequence[int],
    rng: np.random.Generator,
    low: float = -1.0,
    high: float = 1.0,
    dtype: Any = np.float32,
) -> np.ndarray:
    """Uniform in [low, high)."""
    return _generator(rng, "uniform").uniform(low, high, tuple(shape)).astype(_float(dtype, "uniform"))


def normal(
    shape: Sequence[int],
    rng: np.random.Generator,
    std: float = 0.02,
    mean: float = 0.0,
    dtype: Any = np.float32,
) -> np.ndarray:
    """Gaussian with the given mean and standard deviation."""
    return _generator(rng, "normal").normal(mean, std, tuple(shape)).astype(_float(dtype, "normal"))


def zeros(
    shape: Sequence[int], rng: np.random.Generator | None = None, dtype: Any = np.float32
) -> np.ndarray:
    """All zeros (``rng`` is accepted so that initialisers are interchangeable)."""
    return np.zeros(tuple(shape), _float(dtype, "zeros"))


def ones(shape: Sequence[int], rng: np.random.Generator | None = None, dtype: Any = np.float32) -> np.ndarray:
    """All ones."""
    return np.ones(tuple(shape), _float(dtype, "ones"))


def xavier_uniform(
    shape: Sequence[int], rng: np.random.Generator, gain: float = 1.0, dtype: Any = np.float32
) -> np.ndarray:
    """Uniform with variance ``2 gain^2 / (fan_in + fan_out)`` (Glorot & Bengio, 2010), for tanh."""
    fan_in, fan_out = _fans(shape, "xavier_uniform")
    bound = gain * math.sqrt(6.0 / max(fan_in + fan_out, 1))
    return uniform(shape, rng, -bound, bound, dtype)


def xavier_normal(
    shape: Sequence[int], rng: np.random.Generator, gain: float = 1.0, dtype: Any = np.float32
) -> np.ndarray:
    """Gaussian with variance ``2 gain^2 / (fan_in + fan_out)`` (Glorot & Bengio, 2010)."""
    fan_in, fan_out = _fans(shape, "xavier_normal")
    return normal(shape, rng, gain * math.sqrt(2.0 / max(fan_in + fan_out, 1)), dtype=dtype)


def kaiming_uniform(
    shape: Sequence[int], rng: np.random.Generator, gain: float = math.sqrt(2.0), dtype: Any = np.float32
) -> np.ndarray:
    """Uniform with variance ``gain^2 / fan_in`` (He et al., 2015): the default gain suits relu."""
    fan_in, _ = _fans(shape, "kaiming_uniform")
    bound = gain * math.sqrt(3.0 / max(fan_in, 1))
    return uniform(shape, rng, -bound, bound, dtype)


def kaiming_normal(
    shape: Sequence[int], rng: np.random.Generator, gain: float = math.sqrt(2.0), dtype: Any = np.float32
) -> np.ndarray:
    """Gaussian with variance ``gain^2 / fan_in`` (He et al., 2015): the default gain suits relu."""
    fan_in, _ = _fans(shape, "kaiming_normal")
    return normal(shape, rng, gain / math.sqrt(max(fan_in, 1)), dtype=dtype)


__all__ = [
    "kaiming_normal",
    "kaiming_uniform",
    "normal",
    "ones",
    "uniform",
    "xavier_normal",
    "xavier_uniform",
    "zeros",
]
