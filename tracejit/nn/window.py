"""Convolution and pooling over images in PyTorch's NCHW layout. Used through ``tracejit.nn``."""

from __future__ import annotations

from typing import Any

import numpy as np

from tracejit.errors import ShapeError
from tracejit.nn._common import float_operand, named_scope, operand
from tracejit.ops import registry

Pair = tuple[int, int]


def _pair(value: Any, name: str, op: str, low: int) -> Pair:
    """An int or a pair of ints, each at least ``low``, as a pair (height, width)."""
    pair = (value, value) if isinstance(value, int | np.integer) else tuple(value)
    if len(pair) != 2 or not all(isinstance(n, int | np.integer) and n >= low for n in pair):
        raise ShapeError.make(f"{name} must be an int or a pair of ints >= {low}, got {value!r}", op=op)
    return int(pair[0]), int(pair[1])


def _padding(padding: Any, kernel: Pair, stride: Pair, dilation: Pair, op: str) -> tuple[Pair, Pair]:
    """((top, bottom), (left, right)) from an int, a pair, ``"valid"`` or ``"same"`` (size kept; stride 1
    only).
    """
    if padding == "valid":
        return (0, 0), (0, 0)
    if padding == "same":
        if stride != (1, 1):
            raise ShapeError.make("padding='same' needs stride 1", op=op)
        total = [d * (k - 1) for k, d in zip(kernel, dilation)]
        return (total[0] // 2, total[0] - total[0] // 2), (total[1] // 2, total[1] - total[1] // 2)
    if isinstance(padding, str):
        raise ShapeError.make(f"padding must be an int, a pair, 'valid' or 'same', got {padding!r}", op=op)
    high, wide = _pair(padding, "padding", op, 0)
    return (high, high), (wide, wide)


def _images(x: Any, op: str) -> tuple[Any, bool]:
    """``x`` as (n, c, h, w), and whether the batch axis was missing."""
    x = float_operand(x, op)
    if x.ndim not in (3, 4):
        raise ShapeError.make("x must be (n, c, h, w) or (c, h, w)", op=op, got={"x": x})
    return (np.expand_dims(x, 0), True) if x.ndim == 3 else (x, False)


def _check_windows(x: Any, kernel: Pair, padding: tuple[Pair, Pair], dilation: Pair, op: str) -> None:
    for axis, size, k, (lo, hi), d in zip("hw", x.shape[2:], kernel, padding, dilation):
        if size + lo + hi < d * (k - 1) + 1:
            raise ShapeError.make(
                f"window {d * (k - 1) + 1} is larger than the padded image, {size + lo + hi}, along {axis}",
                op=op,
                got={"x": x},
            )


def conv2d(
    x: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Any:
    """Two-dimensional cross-correlation, as ``torch.nn.functional.conv2d``.

    ``x``: (n, c, h, w) or (c, h, w); ``weight``: (out, c // groups, kh, kw); ``bias``: (out,) or None.
    ``stride``, ``padding`` and ``dilation`` are ints or pairs (height, width) in pixels; ``padding`` may be
    "valid" or "same". Returns (n, out, h', w') with ``h' = (h + 2 ph - dilation (kh - 1) - 1) // stride +
    1``. ShapeError if they do not fit.
    """
    op = "conv2d"
    x, unbatched = _images(x, op)
    weight = operand(weight, op)
    if weight.ndim != 4:
        raise ShapeError.make("weight must be (out, in // groups, kh, kw)", op=op, got={"weight": weight})
    out, per_group = weight.shape[:2]
    if groups < 1 or out % groups or x.shape[1] != per_group * groups:
        raise ShapeError.make(
            f"with groups={groups} the weight takes {per_group * max(groups, 1)} input channels, "
            f"and its {out} outputs must be divisible by groups",
            op=op,
            got={"x": x, "weight": weight},
        )
    kernel = (weight.shape[2], weight.shape[3])
    strides, dilations = _pair(stride, "stride", op, 1), _pair(dilation, "dilation", op, 1)
    pads = _padding(padding, kernel, strides, dilations, op)
    _check_windows(x, kernel, pads, dilations, op)
    dtype = np.result_type(x.dtype, weight.dtype)
    with named_scope(op):
        x = x if x.dtype == dtype else x.astype(dtype)
        weight = weight if weight.dtype == dtype else weight.astype(dtype)
        y = registry.get("conv2d")(x, weight, stride=strides, padding=pads, dilation=dilations, groups=groups)
        if bias is not None:
            bias = operand(bias, op)
            if tuple(bias.shape) != (out,):
                raise ShapeError.make(
                    "bias must be (out_channels,)", op=op, got={"weight": weight, "bias": bias}
                )
            y = y + np.reshape(bias, (1, out, 1, 1))
        return np.squeeze(y, axis=0) if unbatched else y


def _pool(kind: str, x: Any, kernel_size: Any, stride: Any, padding: Any) -> Any:
    x, unbatched = _images(x, kind)
    kernel = _pair(kernel_size, "kernel_size", kind, 1)
    strides = kernel if stride is None else _pair(stride, "stride", kind, 1)
    pads = _padding(padding, kernel, strides, (1, 1), kind)
    if any(lo > k // 2 for (lo, _), k in zip(pads, kernel)):
        raise ShapeError.make(
            f"padding must be at most half the kernel size {kernel}, got {padding!r}", op=kind, got={"x": x}
        )
    _check_windows(x, kernel, pads, (1, 1), kind)
    with named_scope(kind):
        y = registry.get(kind)(x, kernel=kernel, stride=strides, padding=pads)
        return np.squeeze(y, axis=0) if unbatched else y


def max_pool2d(x: Any, kernel_size: Any, stride: Any = None, padding: Any = 0) -> Any:
    """Maximum over windows: ``x`` (n, c, h, w) or (c, h, w); ``stride`` defaults to ``kernel_size``. NaN
    wins.

    Padding counts as -inf; the gradient goes to the first maximum. ShapeError for a bad window.
    """
    return _pool("max_pool2d", x, kernel_size, stride, padding)


def avg_pool2d(x: Any, kernel_size: Any, stride: Any = None, padding: Any = 0) -> Any:
    """Mean over windows, padding counted as zeros (PyTorch's ``count_include_pad=True``). Shapes as
    ``max_pool2d``.
    """
    return _pool("avg_pool2d", x, kernel_size, stride, padding)


__all__ = ["avg_pool2d", "conv2d", "max_pool2d"]
