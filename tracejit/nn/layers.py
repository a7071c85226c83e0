"""Modules with one job each: dense, embedding, norms, dropout, convolution, pooling, and their sequence.

Used through ``tracejit.nn``. Weights are float32 unless ``dtype`` says otherwise and come from a NumPy
Generator.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from tracejit import random
from tracejit.errors import ShapeError
from tracejit.nn import init
from tracejit.nn._common import operand
from tracejit.nn.dense import dropout, embedding, linear
from tracejit.nn.module import Module, static_field
from tracejit.nn.norms import group_norm, layer_norm, rms_norm
from tracejit.nn.window import avg_pool2d, conv2d, max_pool2d

Rng = np.random.Generator


def check_positive(owner: str, **sizes: Any) -> None:
    """ShapeError for a size that is not a positive int."""
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int | np.integer) or size < 1:
            raise ShapeError.make(f"{name} must be a positive int, got {size!r}", op=owner)


class Linear(Module):
    """``x @ weight.T + bias`` over the last axis: (..., in_features) -> (..., out_features).

    ``weight``: (out_features, in_features) and ``bias``: (out_features,), uniform in ``±1/sqrt(in_features)``
    as in PyTorch.
    """

    weight: Any
    bias: Any
    in_features: int = static_field()
    out_features: int = static_field()

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, *, rng: Rng, dtype: Any = np.float32
    ) -> None:
        check_positive("Linear", in_features=in_features, out_features=out_features)
        bound = 1.0 / math.sqrt(in_features)
        self.weight = init.uniform((out_features, in_features), rng, -bound, bound, dtype)
        self.bias = init.uniform((out_features,), rng, -bound, bound, dtype) if bias else None
        self.in_features, self.out_features = int(in_features), int(out_features)

    def __call__(self, x: Any) -> Any:
        """(..., in_features) -> (..., out_features); ShapeError otherwise."""
        return linear(x, self.weight, self.bias)


class Embedding(Module):
    """A table of ``num_embeddings`` vectors: integers (...) -> (..., dim). Gaussian with ``std`` 0.02, as in
    GPT-2.
    """

    weight: Any

    def __init__(
        self, num_embeddings: int, dim: int, *, rng: Rng, std: float = 0.02, dtype: Any = np.float32
    ) -> None:
        check_positive("Embedding", num_embeddings=num_embeddings, dim=dim)
        self.weight = init.normal((num_embeddings, dim), rng, std, dtype=dtype)

    def __call__(self, ids: Any) -> Any:
        """Integers (...) -> (..., dim)."""
        return embedding(ids, self.weight)


class LayerNorm(Module):
    """:func:`layer_norm` over a last axis of size ``dim`` with a learned scale (ones) and shift (zeros)."""

    weight: Any
    bias: Any
    eps: float = static_field()

    def __init__(self, dim: int, eps: float = 1e-5, bias: bool = True, *, dtype: Any = np.float32) -> None:
        check_positive("LayerNorm", dim=dim)
        self.weight = init.ones((dim,), dtype=dtype)
        self.bias = init.zeros((dim,), dtype=dtype) if bias else None
        self.eps = float(eps)

    def __call__(self, x: Any) -> Any:
        """(..., dim) -> (..., dim)."""
        return layer_norm(x, self.weight, self.bias, self.eps)


class RMSNorm(Module):
    """:func:`rms_norm` over a last axis of size ``dim`` with a learned scale (ones)."""

    weight: Any
    eps: float = static_field()

    def __init__(self, dim: int, eps: float = 1e-6, *, dtype: Any = np.float32) -> None:
        check_positive("RMSNorm", dim=dim)
        self.weight = init.ones((dim,), dtype=dtype)
        self.eps = float(eps)

    def __call__(self, x: Any) -> Any:
        """(..., dim) -> (..., dim)."""
        return rms_norm(x, self.weight, self.eps)


class GroupNorm(Module):
    """:func:`group_norm` with a learned scale (ones) and shift (zeros) per channel, on (n, c, ...)."""

    weight: Any
    bias: Any
    num_groups: int = static_field()
    eps: float = static_field()

    def __init__(
        self, num_groups: int, num_channels: int, eps: float = 1e-5, *, dtype: Any = np.float32
    ) -> None:
        check_positive("GroupNorm", num_groups=num_groups, num_channels=num_channels)
        if num_channels % num_groups:
            raise ShapeError.make(
                f"{num_channels} channels do not divide into {num_groups} groups", op="GroupNorm"
            )
        self.weight = init.ones((num_channels,), dtype=dtype)
        self.bias = init.zeros((num_channels,), dtype=dtype)
        self.num_groups, self.eps = int(num_groups), float(eps)

    def __call__(self, x: Any) -> Any:
        """(n, c, ...) -> (n, c, ...)."""
        return group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


class Dropout(Module):
    """:func:`dropout` with probability ``p`` when called with a ``tj.random`` key, identity when called
    without.
    """

    p: float = static_field(default=0.5)

    def __call__(self, x: Any, *, key: Any = None) -> Any:
        """(...) -> (...)."""
        return x if key is None else dropout(x, self.p, key)


class Lambda(Module):
    """A plain function as a module: ``Lambda(nn.relu)``."""

    fn: Callable[[Any], Any] = static_field()

    def __call__(self, x: Any) -> Any:
        """``fn(x)``."""
        return self.fn(x)


class Sequential(Module):
    """Modules and plain functions applied one after the other: ``Sequential(Linear(...), nn.relu,
    Linear(...))``.
    """

    layers: tuple[Any, ...]

    def __init__(self, *layers: Callable[..., Any]) -> None:
        for layer in layers:
            if not callable(layer):
                raise TypeError(f"Sequential takes modules and functions, not {type(layer).__name__}")
        self.layers = tuple(layer if isinstance(layer, Module) else Lambda(layer) for layer in layers)

    def __call__(self, x: Any, *, key: Any = None) -> Any:
        """The last layer's result. ``key`` turns the dropout layers on; each gets a key of its own."""
        with_key = [i for i, layer in enumerate(self.layers) if isinstance(layer, Dropout | Sequential)]
        keys = dict(zip(with_key, random.split(key, len(with_key)))) if key is not None and with_key else {}
        for i, layer in enumerate(self.layers):
            x = layer(x, key=keys[i]) if i in keys else layer(x)
        return x

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, index: int) -> Any:
        return self.layers[index]


class Conv2d(Module):
    """:func:`conv2d` in PyTorch's layouts: (n, in_channels, h, w) -> (n, out_channels, h', w').

    ``weight``: (out_channels, in_channels // groups, kh, kw), uniform in ``±1/sqrt(fan_in)`` as in PyTorch.
    """

    weight: Any
    bias: Any
    stride: Any = static_field()
    padding: Any = static_field()
    dilation: Any = static_field()
    groups: int = static_field()

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        rng: Rng,
        dtype: Any = np.float32,
    ) -> None:
        check_positive("Conv2d", in_channels=in_channels, out_channels=out_channels, groups=groups)
        if in_channels % groups or out_channels % groups:
            raise ShapeError.make(
                f"{in_channels} input and {out_channels} output channels do not divide into {groups} groups",
                op="Conv2d",
            )
        kh, kw = (kernel_size, kernel_size) if isinstance(kernel_size, int) else tuple(kernel_size)
        check_positive("Conv2d", kernel_height=kh, kernel_width=kw)
        bound = 1.0 / math.sqrt(in_channels // groups * kh * kw)
        self.weight = init.uniform((out_channels, in_channels // groups, kh, kw), rng, -bound, bound, dtype)
        self.bias = init.uniform((out_channels,), rng, -bound, bound, dtype) if bias else None
        self.stride, self.padding, self.dilation = _hashable(stride), _hashable(padding), _hashable(dilation)
        self.groups = int(groups)

    def __call__(self, x: Any) -> Any:
        """(n, in_channels, h, w) -> (n, out_channels, h', w')."""
        return conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


class MaxPool2d(Module):
    """:func:`max_pool2d` with fixed windows."""

    kernel_size: Any = static_field()
    stride: Any = static_field(default=None)
    padding: Any = static_field(default=0)

    def __call__(self, x: Any) -> Any:
        """(n, c, h, w) -> (n, c, h', w')."""
        return max_pool2d(x, self.kernel_size, self.stride, self.padding)


class AvgPool2d(Module):
    """:func:`avg_pool2d` with fixed windows."""

    kernel_size: Any = static_field()
    stride: Any = static_field(default=None)
    padding: Any = static_field(default=0)

    def __call__(self, x: Any) -> Any:
        """(n, c, h, w) -> (n, c, h', w')."""
        return avg_pool2d(x, self.kernel_size, self.stride, self.padding)


class Flatten(Module):
    """All axes after the first joined into one: (n, ...) -> (n, features)."""

    def __call__(self, x: Any) -> Any:
        """(n, ...) -> (n, features)."""
        x = operand(x, "flatten")
        if x.ndim == 0:
            raise ShapeError.make("a scalar has no batch axis", op="flatten", got={"x": x})
        return np.reshape(x, (x.shape[0], math.prod(x.shape[1:])))


__all__ = [
    "AvgPool2d",
    "Conv2d",
    "Dropout",
    "Embedding",
    "Flatten",
    "GroupNorm",
    "Lambda",
    "LayerNorm",
    "Linear",
    "MaxPool2d",
    "RMSNorm",
    "Sequential",
]
