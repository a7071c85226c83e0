"""Pooling of the native CPU backend: windows side by side in vectors agree bit for bit with windows one by one."""

from __future__ import annotations

import numpy as np
import pytest

import tracejit as tj
from tracejit import nn
from tracejit_cpu import pooling

# kernel, stride, padding, height, width; widths around one and several vectors of windows
SHAPES = [
    (2, 2, 0, 6, 6), (2, 2, 0, 7, 35), (2, 2, 0, 2, 16), (2, 2, 0, 9, 33), (2, 2, 0, 4, 130),
    ((2, 2), (3, 2), 0, 11, 21), (3, 2, 0, 9, 38), (3, 1, 0, 8, 19), (2, 1, 0, 3, 18), ((1, 2), (1, 2), 0, 3, 50),
    ((3, 1), (2, 1), 0, 7, 9), (3, 3, 0, 9, 20), (3, 2, 1, 9, 20), (2, 2, 1, 6, 16), (5, 2, 0, 12, 43),
]  # fmt: skip


def image(h, w, dtype, special):
    rng = np.random.default_rng(h * w)
    x = rng.integers(-3, 4, (2, 3, h, w)).astype(
        dtype
    )  # many ties: the first maximum of a window gets the gradient
    x[x == 0] = -0.0
    if special:
        flat = x.reshape(-1)
        flat[rng.integers(0, flat.size, flat.size // 9)] = np.nan
        flat[rng.integers(0, flat.size, flat.size // 9)] = -np.inf
        flat[rng.integers(0, flat.size, flat.size // 20)] = np.inf
    return x


def results(op, x, shape):
    """Pooled image and a gradient with signed zeros, on the native backend, compiled anew."""
    kernel, stride, padding, _, _ = shape

    def loss(x):
        y = op(x, kernel, stride, padding)
        weight = (np.arange(y.size).reshape(y.shape) % 5 - 2).astype(y.dtype)
        return (y * weight).sum(), y

    value, gradient = tj.trace(tj.value_and_grad(loss, has_aux=True))(x, device="cpu")
    return value[1], gradient


def bits(a):
    return np.where(np.isnan(a), np.nan, a).view(np.uint32 if a.dtype == np.float32 else np.uint64)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("op", [nn.max_pool2d, nn.avg_pool2d])
def test_vectors_agree_with_single_windows(op, shape, monkeypatch):
    monkeypatch.setenv("TRACEJIT_CACHE_DIR", "off")
    for dtype, special in ((np.float32, False), (np.float32, True), (np.float64, True)):
        x = image(*shape[3:], dtype, special)
        in_vectors = results(op, x, shape)
        with monkeypatch.context() as patch:
            plain = pooling.Pool.__init__

            def one_by_one(self, *args, init=plain):
                init(self, *args)
                self.vectors = False

            patch.setattr(pooling.Pool, "__init__", one_by_one)
            single = results(op, x, shape)
        for a, b in zip(in_vectors, single, strict=True):
            np.testing.assert_array_equal(bits(a), bits(b))


@pytest.mark.parametrize("op", [nn.max_pool2d, nn.avg_pool2d])
def test_the_vector_path_is_taken_where_it_should_be(op, monkeypatch):
    taken = []
    plain = pooling.Pool.emit
    monkeypatch.setattr(
        pooling.Pool, "emit", lambda self: (taken.append((self.op, self.vectors)), plain(self))[1]
    )
    monkeypatch.setenv("TRACEJIT_CACHE_DIR", "off")
    results(op, image(8, 40, np.float32, False), (2, 2, 0, 8, 40))
    assert taken and all(vectors for _, vectors in taken)
    assert {name.endswith("_grad") for name, _ in taken} == {True, False}


@pytest.mark.parametrize("op", [nn.max_pool2d, nn.avg_pool2d])
def test_nothing_beside_the_image_is_touched(op):
    x = image(5, 18, np.float32, False)
    fenced = np.full(x.size + 32, np.nan, np.float32)
    fenced[16:-16] = x.reshape(-1)
    inside = fenced[16:-16].reshape(x.shape)
    f = tj.trace(lambda x: op(x, 2), device="cpu")
    np.testing.assert_array_equal(f(inside), f(x))
    assert np.isnan(fenced[:16]).all() and np.isnan(fenced[-16:]).all()
