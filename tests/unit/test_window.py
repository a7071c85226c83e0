"""Convolution and pooling: values against plain loops, gradients of every order, edge cases, errors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tracejit.errors import DTypeError, ShapeError
from tracejit.ops import window as ops

RNG = np.random.default_rng(0)
NONE = ((0, 0), (0, 0))

CONVOLUTIONS: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "plain": ((2, 3, 5, 6), (4, 3, 3, 2), {}),
    "one_by_one": ((2, 3, 4, 4), (5, 3, 1, 1), {}),
    "padded": ((1, 2, 4, 4), (3, 2, 3, 3), {"padding": ((1, 1), (1, 1))}),
    "padded_unevenly": ((1, 2, 4, 5), (3, 2, 2, 3), {"padding": ((0, 1), (2, 1))}),
    "strided": ((2, 1, 7, 8), (2, 1, 3, 3), {"stride": (2, 3)}),
    "strided_with_rest": ((1, 1, 8, 8), (1, 1, 3, 3), {"stride": (3, 3), "padding": ((1, 0), (0, 1))}),
    "dilated": ((1, 2, 7, 7), (2, 2, 3, 2), {"dilation": (2, 3)}),
    "grouped": ((2, 4, 5, 5), (6, 2, 3, 3), {"groups": 2}),
    "depthwise": ((1, 3, 5, 5), (3, 1, 3, 3), {"groups": 3, "padding": ((1, 1), (1, 1))}),
    "all_at_once": (
        (2, 4, 8, 9),
        (4, 2, 2, 3),
        {"stride": (2, 1), "padding": ((1, 0), (2, 1)), "dilation": (2, 2), "groups": 2},
    ),
}


def conv_attrs(name: str) -> dict[str, Any]:
    return {"stride": (1, 1), "padding": NONE, "dilation": (1, 1), "groups": 1, **CONVOLUTIONS[name][2]}


def conv_arrays(name: str) -> tuple[np.ndarray, np.ndarray]:
    x_shape, w_shape, _ = CONVOLUTIONS[name]
    return RNG.normal(size=x_shape), RNG.normal(size=w_shape)


def loops(x: np.ndarray, w: np.ndarray, stride: Any, padding: Any, dilation: Any, groups: int) -> np.ndarray:
    """The convolution by its definition."""
    x = np.pad(x, ((0, 0), (0, 0), *padding))
    (n, _, h, width), (o, per, kh, kw) = x.shape, w.shape
    out = np.zeros(
        (
            n,
            o,
            (h - dilation[0] * (kh - 1) - 1) // stride[0] + 1,
            (width - dilation[1] * (kw - 1) - 1) // stride[1] + 1,
        )
    )
    for b, f, i, j in np.ndindex(out.shape):
        for c, p, q in np.ndindex(per, kh, kw):
            channel = f // (o // groups) * per + c
            row, column = i * stride[0] + p * dilation[0], j * stride[1] + q * dilation[1]
            out[b, f, i, j] += x[b, channel, row, column] * w[f, c, p, q]
    return out


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_conv2d_by_its_definition(name: str) -> None:
    x, w = conv_arrays(name)
    attrs = conv_attrs(name)
    expected = loops(x, w, **attrs)
    assert ops.conv2d.infer(x, w, **attrs) == (expected.shape, x.dtype)
    np.testing.assert_allclose(ops.conv2d(x, w, **attrs), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_the_three_convolutions_are_the_derivatives_of_one_trilinear_form(name: str) -> None:
    """Σ conv2d(x, w)·g = Σ conv2d_input_grad(g, w)·x = Σ conv2d_weight_grad(x, g)·w, and each one's vjp says
    so."""
    (x, w), a = conv_arrays(name), conv_attrs(name)
    y = ops.conv2d(x, w, **a)
    g, x2, w2 = RNG.normal(size=y.shape), RNG.normal(size=x.shape), RNG.normal(size=w.shape)

    def form(x: np.ndarray, w: np.ndarray, g: np.ndarray) -> float:
        return float((loops(x, w, **a) * g).sum())

    dx = ops.conv2d_input_grad(g, w, shape=x.shape, **a)
    dw = ops.conv2d_weight_grad(x, g, shape=w.shape, **a)
    np.testing.assert_allclose((dx * x2).sum(), form(x2, w, g))
    np.testing.assert_allclose((dw * w2).sum(), form(x, w2, g))
    found = ops.conv2d.vjp(g, y, x, w, **a)  # type: ignore[operator]
    np.testing.assert_allclose(found[0], dx)
    np.testing.assert_allclose(found[1], dw)
    # The vjp of the first derivative: c stands where x stood.
    dg, dw2 = ops.conv2d_input_grad.vjp(x2, dx, g, w, shape=x.shape, **a)  # type: ignore[operator]
    np.testing.assert_allclose((dg * g).sum(), form(x2, w, g))
    np.testing.assert_allclose((dw2 * w2).sum(), form(x2, w2, g))
    dx2, dg = ops.conv2d_weight_grad.vjp(w2, dw, x, g, shape=w.shape, **a)  # type: ignore[operator]
    np.testing.assert_allclose((dx2 * x2).sum(), form(x2, w2, g))
    np.testing.assert_allclose((dg * g).sum(), form(x, w2, g))


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int32", "uint8"])
def test_conv2d_dtypes(dtype: str) -> None:
    x = RNG.integers(0, 4, (1, 2, 4, 4)).astype(dtype)
    w = RNG.integers(0, 3, (2, 2, 3, 3)).astype(dtype)
    y = ops.conv2d(x, w, stride=(1, 1), padding=NONE, dilation=(1, 1), groups=1)
    assert y.dtype == dtype
    np.testing.assert_array_equal(y, loops(x, w, (1, 1), NONE, (1, 1), 1))


def test_an_empty_batch() -> None:
    a = conv_attrs("plain")
    x, w = np.zeros((0, 3, 5, 6)), np.ones((4, 3, 3, 2))
    y = ops.conv2d(x, w, **a)
    assert y.shape == (0, 4, 3, 5)
    assert ops.conv2d_input_grad(y, w, shape=x.shape, **a).shape == x.shape
    np.testing.assert_array_equal(ops.conv2d_weight_grad(x, y, shape=w.shape, **a), np.zeros(w.shape))
    pool = {"kernel": (2, 2), "stride": (2, 2), "padding": NONE}
    assert ops.max_pool2d(np.zeros((0, 3, 4, 4)), **pool).shape == (0, 3, 2, 2)


# -- pooling ---------------------------------------------------------------------------------------

POOLS: dict[str, dict[str, Any]] = {
    "plain": {"kernel": (2, 2), "stride": (2, 2), "padding": NONE},
    "overlapping": {"kernel": (3, 2), "stride": (1, 1), "padding": NONE},
    "padded": {"kernel": (3, 3), "stride": (2, 2), "padding": ((1, 1), (1, 1))},
    "uneven": {"kernel": (2, 3), "stride": (3, 2), "padding": ((1, 0), (0, 2))},
    "whole": {"kernel": (5, 6), "stride": (1, 1), "padding": NONE},
}


def windows(
    x: np.ndarray, kernel: Any, stride: Any, padding: Any
) -> dict[tuple[int, int, int, int], list[tuple[int, ...]]]:
    """For each result element, the places of its window that lie inside the image, in row-major order."""
    n, c, h, w = x.shape
    (top, bottom), (left, right) = padding
    found = {}
    for i in range((h + top + bottom - kernel[0]) // stride[0] + 1):
        for j in range((w + left + right - kernel[1]) // stride[1] + 1):
            rows = [i * stride[0] - top + p for p in range(kernel[0])]
            columns = [j * stride[1] - left + q for q in range(kernel[1])]
            inside = [(r, s) for r in rows for s in columns if 0 <= r < h and 0 <= s < w]
            for b, k in np.ndindex(n, c):
                found[b, k, i, j] = [(b, k, r, s) for r, s in inside]
    return found


@pytest.mark.parametrize("kind", ["normal", "ties", "minus_inf", "nan", "integers"])
@pytest.mark.parametrize("name", POOLS)
def test_max_pool2d_takes_the_first_maximum(name: str, kind: str) -> None:
    x = RNG.normal(size=(2, 2, 5, 6))
    if kind == "ties":
        x = np.round(x)
    elif kind == "minus_inf":
        x = np.where(x < 0.5, -np.inf, x)
    elif kind == "nan":
        x = np.where(x > 1, np.nan, x)
    elif kind == "integers":
        x = RNG.integers(-3, 3, x.shape)
    y = ops.max_pool2d(x, **POOLS[name])
    assert ops.max_pool2d.infer(x, **POOLS[name]) == (y.shape, x.dtype)
    g, t = RNG.normal(size=y.shape), RNG.normal(size=x.shape)
    gradient, selected = np.zeros(x.shape), np.zeros(y.shape)
    for at, places in windows(x, **POOLS[name]).items():
        values = [x[p] for p in places]
        first = places[int(np.argmax(values))]  # argmax: the first maximum, or the first NaN
        np.testing.assert_array_equal(y[at], x[first])
        gradient[first] += g[at]
        selected[at] = t[first]
    np.testing.assert_allclose(ops.max_pool2d_grad(x, g, **POOLS[name]), gradient)
    np.testing.assert_allclose(ops.max_pool2d_select(x, t, **POOLS[name]), selected)


@pytest.mark.parametrize("name", POOLS)
def test_max_pool2d_family_is_closed(name: str) -> None:
    x, a = RNG.normal(size=(1, 2, 5, 6)), POOLS[name]
    y = ops.max_pool2d(x, **a)
    g, t = RNG.normal(size=y.shape), RNG.normal(size=x.shape)
    (dx,) = ops.max_pool2d.vjp(g, y, x, **a)  # type: ignore[operator]
    none, dg = ops.max_pool2d_grad.vjp(t, dx, x, g, **a)  # type: ignore[operator]
    assert none is None
    np.testing.assert_allclose((dg * g).sum(), (dx * t).sum())
    none, dt = ops.max_pool2d_select.vjp(g, dg, x, t, **a)  # type: ignore[operator]
    assert none is None
    np.testing.assert_allclose((dt * t).sum(), (dg * g).sum())


@pytest.mark.parametrize("name", POOLS)
def test_avg_pool2d_counts_padding(name: str) -> None:
    x, a = RNG.normal(size=(2, 2, 5, 6)), POOLS[name]
    y = ops.avg_pool2d(x, **a)
    g, area = RNG.normal(size=y.shape), a["kernel"][0] * a["kernel"][1]
    gradient = np.zeros(x.shape)
    for at, places in windows(x, **a).items():
        np.testing.assert_allclose(y[at], sum(x[p] for p in places) / area)
        for p in places:
            gradient[p] += g[at] / area
    (dx,) = ops.avg_pool2d.vjp(g, y, x, **a)  # type: ignore[operator]
    np.testing.assert_allclose(dx, gradient)
    t = RNG.normal(size=x.shape)
    (dg,) = ops.avg_pool2d_grad.vjp(t, dx, g, shape=x.shape, **a)  # type: ignore[operator]
    np.testing.assert_allclose((dg * g).sum(), (dx * t).sum())


# -- errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": (3, 5, 5)}, r"\[N, C, H, W\]"),
        ({"x": (1, 4, 5, 5)}, "channels"),
        ({"w": (3, 2, 3, 3), "groups": 2, "x": (1, 4, 5, 5)}, "channels"),
        ({"groups": 0}, "channels"),
        ({"x": (1, 2, 2, 5)}, "larger than the padded image"),
        ({"stride": (0, 1)}, "at least 1"),
        ({"dilation": (1, 0)}, "at least 1"),
        ({"padding": ((0, -1), (0, 0))}, "negative"),
    ],
)
def test_conv2d_explains_what_does_not_fit(change: dict[str, Any], words: str) -> None:
    a = {
        "x": (1, 2, 5, 5),
        "w": (3, 2, 3, 3),
        "stride": (1, 1),
        "padding": NONE,
        "dilation": (1, 1),
        "groups": 1,
        **change,
    }
    x, w = np.ones(a.pop("x")), np.ones(a.pop("w"))
    with pytest.raises(ShapeError, match=words):
        ops.conv2d.infer(x, w, **a)


def test_dtypes_must_agree() -> None:
    x, w = np.ones((1, 1, 3, 3)), np.ones((1, 1, 2, 2), np.float32)
    with pytest.raises(DTypeError, match="one dtype"):
        ops.conv2d.infer(x, w, **conv_attrs("plain"))
    with pytest.raises(DTypeError, match="float"):
        ops.avg_pool2d.infer(x.astype(int), **POOLS["plain"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kernel": (0, 1)}, "at least 1"),
        ({"kernel": (6, 1)}, "larger than the padded image"),
        ({"padding": ((2, 0), (0, 0))}, "smaller than the window"),
        ({"padding": ((-1, 0), (0, 0))}, "negative"),
    ],
)
def test_pooling_explains_what_does_not_fit(change: dict[str, Any], words: str) -> None:
    x, attrs = np.ones((1, 1, 5, 5)), {**POOLS["plain"], **change}
    for op in (ops.max_pool2d, ops.avg_pool2d):
        with pytest.raises(ShapeError, match=words):
            op.infer(x, **attrs)
