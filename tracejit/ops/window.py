"""Sliding-window ops on NCHW images: 2-D convolution and pooling, each family closed under differentiation.

Recorded by ``nn`` (conv2d, max_pool2d, avg_pool2d). T(x, w, g) = Σ conv2d(x, w)·g is linear in all three
operands; ``conv2d``, ``conv2d_input_grad`` and ``conv2d_weight_grad`` are its three partial derivatives, so
the gradient of each is given by the other two, to any order. References are im2col products, fast enough to
train a small CNN.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from tracejit.dtypes import DType
from tracejit.errors import DTypeError, ShapeError
from tracejit.ops.registry import HasAval, Op, define

Pair = tuple[int, int]
Padding = tuple[Pair, Pair]
Aval = tuple[tuple[int, ...], DType]


def window_counts(size: Pair, kernel: Pair, stride: Pair, padding: Padding, dilation: Pair = (1, 1)) -> Pair:
    """Windows along height and width: ``⌊(n + lo + hi − dilation·(k − 1) − 1) / stride⌋ + 1``."""
    h, w = (
        (n + lo + hi - d * (k - 1) - 1) // s + 1
        for n, k, s, (lo, hi), d in zip(size, kernel, stride, padding, dilation, strict=True)
    )
    return h, w


def _check_window(
    op: str, got: dict[str, HasAval], kernel: Pair, stride: Pair, padding: Padding, dilation: Pair
) -> None:
    if min(*kernel, *stride, *dilation) < 1:
        raise ShapeError.make("kernel size, stride and dilation must be at least 1", op=op, got=got)
    if min(*padding[0], *padding[1]) < 0:
        raise ShapeError.make(f"padding must not be negative, is {padding}", op=op, got=got)


# -- convolution -----------------------------------------------------------------------------------


def _conv_shape(
    op: str,
    got: dict[str, HasAval],
    x: tuple[int, ...],
    w: tuple[int, ...],
    stride: Pair,
    padding: Padding,
    dilation: Pair,
    groups: int,
) -> tuple[int, ...]:
    """The result shape (N, O, H', W') of a convolution of NCHW ``x`` with OIHW ``w``."""
    if len(x) != 4 or len(w) != 4:
        raise ShapeError.make("images are [N, C, H, W] and kernels [O, C/groups, kH, kW]", op=op, got=got)
    kernel = (w[2], w[3])
    _check_window(op, got, kernel, stride, padding, dilation)
    if groups < 1 or x[1] != w[1] * groups or w[0] % groups:
        raise ShapeError.make(
            f"{x[1]} input, {w[0]} output channels do not fit kernels for {w[1]} channels in {groups} groups",
            op=op,
            got=got,
        )
    counts = window_counts((x[2], x[3]), kernel, stride, padding, dilation)
    if min(counts) < 1:
        raise ShapeError.make("the kernel is larger than the padded image", op=op, got=got)
    return (x[0], w[0], *counts)


def _check_dtypes(op: str, got: dict[str, HasAval]) -> None:
    dtypes = {x.dtype for x in got.values()}
    if len(dtypes) > 1 or next(iter(dtypes)).kind == "b":
        raise DTypeError.make("the operands need one dtype, integer or float", op=op, got=got)


def _conv2d_infer(x: HasAval, w: HasAval, **a: Any) -> Aval:
    got = {"x": x, "weight": w}
    _check_dtypes("conv2d", got)
    return _conv_shape("conv2d", got, x.shape, w.shape, **a), x.dtype


def _conv2d_input_grad_infer(g: HasAval, w: HasAval, *, shape: tuple[int, ...], **a: Any) -> Aval:
    got = {"g": g, "weight": w}
    _check_dtypes("conv2d_input_grad", got)
    expected = _conv_shape("conv2d_input_grad", got, shape, w.shape, **a)
    if tuple(g.shape) != expected:
        raise ShapeError.make(
            f"the cotangent must have the shape {expected}", op="conv2d_input_grad", got=got
        )
    return shape, g.dtype


def _conv2d_weight_grad_infer(x: HasAval, g: HasAval, *, shape: tuple[int, ...], **a: Any) -> Aval:
    got = {"x": x, "g": g}
    _check_dtypes("conv2d_weight_grad", got)
    expected = _conv_shape("conv2d_weight_grad", got, x.shape, shape, **a)
    if tuple(g.shape) != expected:
        raise ShapeError.make(
            f"the cotangent must have the shape {expected}", op="conv2d_weight_grad", got=got
        )
    return shape, x.dtype


def _padded(x: np.ndarray, padding: Padding, value: Any = 0) -> np.ndarray:
    if padding == ((0, 0), (0, 0)):
        return x
    n, c, h, w = x.shape
    (top, bottom), (left, right) = padding
    out = np.full((n, c, h + top + bottom, w + left + right), value, x.dtype)
    out[:, :, top : top + h, left : left + w] = x
    return out


def _columns(
    x: np.ndarray, kernel: Pair, stride: Pair, padding: Padding, dilation: Pair, groups: int
) -> np.ndarray:
    """The windows of ``x`` as a view [groups, C/groups, kH, kW, N, H', W']."""
    extent = tuple(d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True))
    windows = sliding_window_view(_padded(x, padding), extent, axis=(2, 3))
    windows = windows[:, :, :: stride[0], :: stride[1], :: dilation[0], :: dilation[1]]
    n, c = x.shape[:2]
    grouped = windows.reshape(n, groups, c // groups, *windows.shape[2:]) if groups > 1 else windows[:, None]
    return grouped.transpose(1, 2, 5, 6, 0, 3, 4)


def _offsets(
    kernel: Pair, counts: Pair, stride: Pair, dilation: Pair
) -> Iterator[tuple[int, int, slice, slice]]:
    """For each kernel cell (i, j), the rows and columns of the padded image that it meets."""
    for i in range(kernel[0]):
        top = i * dilation[0]
        rows = slice(top, top + (counts[0] - 1) * stride[0] + 1, stride[0])
        for j in range(kernel[1]):
            left = j * dilation[1]
            yield i, j, rows, slice(left, left + (counts[1] - 1) * stride[1] + 1, stride[1])


def _conv2d_reference(
    x: np.ndarray, w: np.ndarray, *, stride: Pair, padding: Padding, dilation: Pair, groups: int
) -> np.ndarray:
    o, depth = w.shape[0], math.prod(w.shape[1:])
    columns = _columns(x, (w.shape[2], w.shape[3]), stride, padding, dilation, groups)
    n, counts = columns.shape[4], columns.shape[5:]
    product = w.reshape(groups, o // groups, depth) @ columns.reshape(groups, depth, -1)
    return np.ascontiguousarray(product.reshape(o, n, *counts).transpose(1, 0, 2, 3))


def _conv2d_input_grad_reference(
    g: np.ndarray,
    w: np.ndarray,
    *,
    shape: tuple[int, ...],
    stride: Pair,
    padding: Padding,
    dilation: Pair,
    groups: int,
) -> np.ndarray:
    n, c, h, width = shape
    o, per_group, *kernel = w.shape
    counts = (g.shape[2], g.shape[3])
    flat = g.transpose(1, 0, 2, 3).reshape(groups, o // groups, -1)
    columns = w.reshape(groups, o // groups, -1).transpose(0, 2, 1) @ flat
    columns = columns.reshape(groups, per_group, *kernel, n, *counts)
    (top, bottom), (left, right) = padding
    out = np.zeros((groups, per_group, n, h + top + bottom, width + left + right), g.dtype)
    for i, j, rows, cols in _offsets((kernel[0], kernel[1]), counts, stride, dilation):
        out[..., rows, cols] += columns[:, :, i, j]
    inner = out[..., top : top + h, left : left + width]
    return np.ascontiguousarray(inner.reshape(c, n, h, width).transpose(1, 0, 2, 3))


def _conv2d_weight_grad_reference(
    x: np.ndarray,
    g: np.ndarray,
    *,
    shape: tuple[int, ...],
    stride: Pair,
    padding: Padding,
    dilation: Pair,
    groups: int,
) -> np.ndarray:
    o, depth = shape[0], math.prod(shape[1:])
    # The view has exactly as many windows as g has positions.
    columns = _columns(x, (shape[2], shape[3]), stride, padding, dilation, groups).reshape(groups, depth, -1)
    flat = g.transpose(1, 0, 2, 3).reshape(groups, o // groups, -1)
    return (flat @ columns.transpose(0, 2, 1)).reshape(shape)


_CONV_ATTRS = {
    "stride": "(int, int)",
    "padding": "((top, bottom), (left, right))",
    "dilation": "(int, int)",
    "groups": "int",
}


def _conv_cases() -> list[dict[str, Any]]:
    return [
        {"stride": (1, 1), "padding": ((0, 0), (0, 0)), "dilation": (1, 1), "groups": 1},
        {"stride": (2, 1), "padding": ((1, 0), (1, 2)), "dilation": (1, 2), "groups": 2},
    ]


def _conv_arrays(a: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(5)
    x, w = rng.normal(size=(2, 4, 5, 6)), rng.normal(size=(2, 4 // a["groups"], 3, 2))
    return x, w, rng.normal(size=_conv_shape("conv2d", {}, x.shape, w.shape, **a))


conv2d: Op = define(
    "conv2d",
    arity=2,
    infer=_conv2d_infer,
    reference=_conv2d_reference,
    vjp=lambda g, y, x, w, **a: [
        conv2d_input_grad(g, w, shape=tuple(x.shape), **a),
        conv2d_weight_grad(x, g, shape=tuple(w.shape), **a),
    ],
    category="contraction",
    meaning="2-D convolution (cross-correlation) of images [N, C, H, W] with kernels [O, C/groups, kH, kW].",
    formula="y[n, o, i, j] = Σ_{c,p,q} x̃[n, c, i·s + p·d, j·s + q·d] · w[o, c, p, q], x̃ = x padded",
    shape_rule="[N, O, ⌊(H + top + bottom − d(kH − 1) − 1) / s⌋ + 1, …]",
    grad_rule="dx = conv2d_input_grad(g, w),  dw = conv2d_weight_grad(x, g)",
    samples=lambda: [(_conv_arrays(a)[:2], a) for a in _conv_cases()],
    attrs=_CONV_ATTRS,
)

conv2d_input_grad: Op = define(
    "conv2d_input_grad",
    arity=2,
    infer=_conv2d_input_grad_infer,
    reference=_conv2d_input_grad_reference,
    vjp=lambda c, y, g, w, *, shape, **a: [
        conv2d(c, w, **a),
        conv2d_weight_grad(c, g, shape=tuple(w.shape), **a),
    ],
    category="contraction",
    meaning="The gradient of conv2d for its image: the transposed convolution of g with the kernels.",
    formula="y[n, c, i·s + p·d, j·s + q·d] += g[n, o, i, j] · w[o, c, p, q]",
    shape_rule="the shape of the image",
    grad_rule="dg = conv2d(c, w),  dw = conv2d_weight_grad(c, g), c the cotangent",
    samples=lambda: [
        ((g, w), {"shape": x.shape, **a}) for a in _conv_cases() for x, w, g in [_conv_arrays(a)]
    ],
    attrs={"shape": "shape of the image", **_CONV_ATTRS},
)

conv2d_weight_grad: Op = define(
    "conv2d_weight_grad",
    arity=2,
    infer=_conv2d_weight_grad_infer,
    reference=_conv2d_weight_grad_reference,
    vjp=lambda c, y, x, g, *, shape, **a: [
        conv2d_input_grad(g, c, shape=tuple(x.shape), **a),
        conv2d(x, c, **a),
    ],
    category="contraction",
    meaning="The gradient of conv2d for its kernels: the correlation of the image with g.",
    formula="y[o, c, p, q] = Σ_{n,i,j} g[n, o, i, j] · x̃[n, c, i·s + p·d, j·s + q·d]",
    shape_rule="the shape of the kernels",
    grad_rule="dx = conv2d_input_grad(g, c),  dg = conv2d(x, c), c the cotangent",
    samples=lambda: [
        ((x, g), {"shape": w.shape, **a}) for a in _conv_cases() for x, w, g in [_conv_arrays(a)]
    ],
    attrs={"shape": "shape of the kernels", **_CONV_ATTRS},
)

# -- pooling ---------------------------------------------------------------------------------------


def _pool_shape(
    op: str, got: dict[str, HasAval], x: tuple[int, ...], kernel: Pair, stride: Pair, padding: Padding
) -> tuple[int, ...]:
    if len(x) != 4:
        raise ShapeError.make("images are [N, C, H, W]", op=op, got=got)
    _check_window(op, got, kernel, stride, padding, (1, 1))
    if any(max(p) >= k for p, k in zip(padding, kernel, strict=True)):
        raise ShapeError.make(
            f"padding {padding} must be smaller than the window {kernel}, so that no window is all padding",
            op=op,
            got=got,
        )
    counts = window_counts((x[2], x[3]), kernel, stride, padding)
    if min(counts) < 1 or min(x[2:]) < 1:
        raise ShapeError.make("the window is larger than the padded image", op=op, got=got)
    return (x[0], x[1], *counts)


def _max_pool2d_infer(x: HasAval, **a: Any) -> Aval:
    if x.dtype.kind == "b":
        raise DTypeError.make("the image must be integer or float", op="max_pool2d", got={"x": x})
    return _pool_shape("max_pool2d", {"x": x}, x.shape, **a), x.dtype


def _max_pool2d_grad_infer(x: HasAval, g: HasAval, **a: Any) -> Aval:
    got = {"x": x, "g": g}
    if tuple(g.shape) != _pool_shape("max_pool2d_grad", got, x.shape, **a):
        raise ShapeError.make(
            "the cotangent must have the shape of the pooled image", op="max_pool2d_grad", got=got
        )
    return x.shape, g.dtype


def _max_pool2d_select_infer(x: HasAval, t: HasAval, **a: Any) -> Aval:
    got = {"x": x, "t": t}
    shape = _pool_shape("max_pool2d_select", got, x.shape, **a)
    if tuple(t.shape) != tuple(x.shape):
        raise ShapeError.make(
            "both operands must have the shape of the image", op="max_pool2d_select", got=got
        )
    return shape, t.dtype


def _lowest(dtype: DType) -> Any:
    return -np.inf if dtype.kind == "f" else np.iinfo(dtype).min


def _max_pool2d_reference(x: np.ndarray, *, kernel: Pair, stride: Pair, padding: Padding) -> np.ndarray:
    shape = _pool_shape("max_pool2d", {}, x.shape, kernel, stride, padding)
    padded = _padded(x, padding, _lowest(x.dtype))
    out = np.full(shape, _lowest(x.dtype), x.dtype)
    for _, _, rows, cols in _offsets(kernel, shape[2:], stride, (1, 1)):  # type: ignore[arg-type]
        np.maximum(out, padded[:, :, rows, cols], out=out)  # NaN propagates
    return out


def _winners(x: np.ndarray, kernel: Pair, stride: Pair, padding: Padding) -> np.ndarray:
    """For each window, the row-major kernel cell of the first maximum inside the image; the first NaN wins."""
    shape = _pool_shape("max_pool2d", {}, x.shape, kernel, stride, padding)
    padded = _padded(x, padding, _lowest(x.dtype))
    top, left = (
        np.maximum(lo - s * np.arange(count), 0)
        for count, s, (lo, _) in zip(shape[2:], stride, padding, strict=True)
    )
    # Start at the first cell that is not padding, so that padding never wins over an image of -inf.
    winner = np.array(np.broadcast_to(top[:, None] * kernel[1] + left, shape))
    best = np.full(shape, _lowest(x.dtype), x.dtype)
    for i, j, rows, cols in _offsets(kernel, shape[2:], stride, (1, 1)):  # type: ignore[arg-type]
        value = padded[:, :, rows, cols]
        better = (value > best) | ((value != value) & (best == best))
        winner[better] = i * kernel[1] + j
        best = np.where(better, value, best)
    return winner


def _max_pool2d_grad_reference(
    x: np.ndarray, g: np.ndarray, *, kernel: Pair, stride: Pair, padding: Padding
) -> np.ndarray:
    winner = _winners(x, kernel, stride, padding)
    n, c, h, w = x.shape
    (top, bottom), (left, right) = padding
    out = np.zeros((n, c, h + top + bottom, w + left + right), g.dtype)
    for i, j, rows, cols in _offsets(kernel, g.shape[2:], stride, (1, 1)):
        out[:, :, rows, cols] += np.where(winner == i * kernel[1] + j, g, g.dtype.type(0))
    return np.ascontiguousarray(out[:, :, top : top + h, left : left + w])


def _max_pool2d_select_reference(
    x: np.ndarray, t: np.ndarray, *, kernel: Pair, stride: Pair, padding: Padding
) -> np.ndarray:
    winner = _winners(x, kernel, stride, padding)
    padded = _padded(t, padding)
    out = np.zeros(winner.shape, t.dtype)
    for i, j, rows, cols in _offsets(kernel, winner.shape[2:], stride, (1, 1)):
        np.copyto(out, padded[:, :, rows, cols], where=winner == i * kernel[1] + j)
    return out


def _avg_pool2d_infer(x: HasAval, **a: Any) -> Aval:
    if x.dtype.kind != "f":
        raise DTypeError.make("the image must be of a float dtype", op="avg_pool2d", got={"x": x})
    return _pool_shape("avg_pool2d", {"x": x}, x.shape, **a), x.dtype


def _avg_pool2d_grad_infer(g: HasAval, *, shape: tuple[int, ...], **a: Any) -> Aval:
    if tuple(g.shape) != _pool_shape("avg_pool2d_grad", {"g": g}, shape, **a):
        raise ShapeError.make(
            f"the cotangent does not fit the image {shape}", op="avg_pool2d_grad", got={"g": g}
        )
    return shape, g.dtype


def _avg_pool2d_reference(x: np.ndarray, *, kernel: Pair, stride: Pair, padding: Padding) -> np.ndarray:
    shape = _pool_shape("avg_pool2d", {}, x.shape, kernel, stride, padding)
    padded = _padded(x, padding)
    out = np.zeros(shape, x.dtype)
    for _, _, rows, cols in _offsets(kernel, shape[2:], stride, (1, 1)):  # type: ignore[arg-type]
        out += padded[:, :, rows, cols]
    return out * x.dtype.type(1 / (kernel[0] * kernel[1]))


def _avg_pool2d_grad_reference(
    g: np.ndarray, *, shape: tuple[int, ...], kernel: Pair, stride: Pair, padding: Padding
) -> np.ndarray:
    n, c, h, w = shape
    (top, bottom), (left, right) = padding
    share = g * g.dtype.type(1 / (kernel[0] * kernel[1]))
    out = np.zeros((n, c, h + top + bottom, w + left + right), g.dtype)
    for _, _, rows, cols in _offsets(kernel, g.shape[2:], stride, (1, 1)):
        out[:, :, rows, cols] += share
    return np.ascontiguousarray(out[:, :, top : top + h, left : left + w])


_POOL_ATTRS = {"kernel": "(int, int)", "stride": "(int, int)", "padding": "((top, bottom), (left, right))"}


def _pool_cases() -> list[dict[str, Any]]:
    return [
        {"kernel": (2, 2), "stride": (2, 2), "padding": ((0, 0), (0, 0))},
        {"kernel": (3, 2), "stride": (2, 1), "padding": ((1, 1), (0, 1))},
    ]


def _pool_arrays(a: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(6)
    x, t = rng.normal(size=(2, 3, 5, 4)), rng.normal(size=(2, 3, 5, 4))
    return x, t, rng.normal(size=_pool_shape("pool", {}, x.shape, **a))


max_pool2d: Op = define(
    "max_pool2d",
    arity=1,
    infer=_max_pool2d_infer,
    reference=_max_pool2d_reference,
    vjp=lambda g, y, x, **a: [max_pool2d_grad(x, g, **a)],
    category="window",
    meaning="The maximum of each window of an image [N, C, H, W]; padding never wins, NaN always does.",
    formula="y[n, c, i, j] = max_{p<kH, q<kW} x[n, c, i·s + p, j·s + q]",
    shape_rule="[N, C, ⌊(H + top + bottom − kH) / s⌋ + 1, …]",
    grad_rule="dx = max_pool2d_grad(x, g): g goes to the first maximum of each window",
    samples=lambda: [(_pool_arrays(a)[:1], a) for a in _pool_cases()],
    attrs=_POOL_ATTRS,
)

max_pool2d_grad: Op = define(
    "max_pool2d_grad",
    arity=2,
    infer=_max_pool2d_grad_infer,
    reference=_max_pool2d_grad_reference,
    vjp=lambda c, y, x, g, **a: [None, max_pool2d_select(x, c, **a)],
    category="window",
    meaning="Adds each element of g to the place of the first maximum of its window.",
    formula="y[argmax of window (i, j) of x] += g[i, j]",
    shape_rule="the shape of the image",
    grad_rule="dg = max_pool2d_select(x, c), c the cotangent; x only steers and gets none",
    samples=lambda: [((x, g), a) for a in _pool_cases() for x, _, g in [_pool_arrays(a)]],
    attrs=_POOL_ATTRS,
)

max_pool2d_select: Op = define(
    "max_pool2d_select",
    arity=2,
    infer=_max_pool2d_select_infer,
    reference=_max_pool2d_select_reference,
    vjp=lambda c, y, x, t, **a: [None, max_pool2d_grad(x, c, **a)],
    category="window",
    meaning="The element of t at the place of the first maximum of each window of x.",
    formula="y[i, j] = t[argmax of window (i, j) of x]",
    shape_rule="as max_pool2d",
    grad_rule="dt = max_pool2d_grad(x, c), c the cotangent; x only steers and gets none",
    samples=lambda: [((x, t), a) for a in _pool_cases() for x, t, _ in [_pool_arrays(a)]],
    attrs=_POOL_ATTRS,
)

avg_pool2d: Op = define(
    "avg_pool2d",
    arity=1,
    infer=_avg_pool2d_infer,
    reference=_avg_pool2d_reference,
    vjp=lambda g, y, x, **a: [avg_pool2d_grad(g, shape=tuple(x.shape), **a)],
    category="window",
    meaning="The mean of each window of an image [N, C, H, W]; padding counts as zeros.",
    formula="y[n, c, i, j] = (1 / kH·kW) Σ_{p<kH, q<kW} x̃[n, c, i·s + p, j·s + q]",
    shape_rule="[N, C, ⌊(H + top + bottom − kH) / s⌋ + 1, …]",
    grad_rule="dx = avg_pool2d_grad(g)",
    samples=lambda: [(_pool_arrays(a)[:1], a) for a in _pool_cases()],
    attrs=_POOL_ATTRS,
)

avg_pool2d_grad: Op = define(
    "avg_pool2d_grad",
    arity=1,
    infer=_avg_pool2d_grad_infer,
    reference=_avg_pool2d_grad_reference,
    vjp=lambda c, y, g, *, shape, **a: [avg_pool2d(c, **a)],
    category="window",
    meaning="Spreads each element of g evenly over its window.",
    formula="y[window (i, j)] += g[i, j] / (kH·kW)",
    shape_rule="the shape of the image",
    grad_rule="dg = avg_pool2d(c), c the cotangent",
    samples=lambda: [((g,), {"shape": x.shape, **a}) for a in _pool_cases() for x, _, g in [_pool_arrays(a)]],
    attrs={"shape": "shape of the image", **_POOL_ATTRS},
)
