"""NumPy's numerical analysis, editing and NaN-aware functions on tensors: NumPy's own values, dtypes and shapes."""

# ruff: noqa: E711

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import tracejit as tj

_rng = np.random.default_rng(0)
DATA = {
    "v": _rng.normal(size=4),
    "m": _rng.normal(size=(3, 4)),
    "x": np.arange(24.0).reshape(2, 3, 4),
    "n": np.where(_rng.random((3, 4)) < 0.4, np.nan, _rng.normal(size=(3, 4))),
}
DATA["n"][:, 0] = [1.0, 2.0, 3.0]

CASES: list[Callable[..., Any]] = [
    lambda m: np.block([[m, m], [m, m]]),
    lambda m, v: np.block([m, v[:, None][:3]]),
    lambda v: np.block([v, v]),
    lambda m: np.block([[m, np.ones((3, 2))], [np.zeros((2, 4)), np.ones((2, 2))]]),
    lambda v: np.insert(v, 1, 5.0),
    lambda v: np.insert(v, [1, 3], [5.0, 6.0]),
    lambda m, v: np.insert(m, 1, v, axis=0),
    lambda m: np.insert(m, 1, 9, axis=1),
    lambda m: np.insert(m, [0, 2], 9, axis=1),
    lambda m: np.insert(m, 1, [1, 2, 3], axis=1),
    lambda m: np.insert(m, -1, 3),
    lambda v: np.insert(v, slice(1, 3), 7.0),
    lambda v: np.delete(v, 1),
    lambda m: np.delete(m, [0, 2], axis=1),
    lambda m: np.delete(m, slice(None, None, 2), axis=1),
    lambda m: np.delete(m, -1, axis=0),
    lambda m: np.cross(m[:, :3], m[:, 1:]),
    lambda m: np.cross(m[:, :3], np.array([1.0, 2.0, 3.0])),
    lambda m: np.cross(m.T[:3], m.T[1:], axis=0),
    lambda m: np.diagflat(m),
    lambda v: np.diagflat(v, 1),
    lambda v: np.vander(v),
    lambda v: np.vander(v, 3, increasing=True),
    lambda v: np.digitize(v, np.array([0.0, 1.0])),
    lambda v: np.digitize(v, np.array([1.0, 0.0])),
    lambda v: np.digitize(v, np.array([0.0, 1.0]), right=True),
    lambda v: np.interp(v, np.array([0.0, 1.0, 2.0]), np.array([0.0, 2.0, -1.0])),
    lambda v: np.interp(v, np.array([0.0, 1.0]), np.array([0.0, 2.0]), left=-5, right=7),
    lambda v: np.interp(v.astype(np.float32), np.sort(v), v),
    lambda v: np.interp(0.5, np.sort(v), v),
    lambda v: np.convolve(v, v),
    lambda v: np.convolve(v, v[:2], mode="same"),
    lambda v: np.convolve(v[:2], v, mode="same"),
    lambda v: np.convolve(v, v[:3], mode="same"),
    lambda v: np.convolve(v, v[:2], mode="valid"),
    lambda v: np.convolve(v[:1], v[:2], mode="valid"),
    lambda v: np.correlate(v, v[:2]),
    lambda v: np.correlate(v[:2], v),
    lambda v: np.correlate(v[:2], v, "full"),
    lambda v: np.correlate(v, v[:3], "same"),
    lambda v: np.correlate(v[:3], v, "same"),
    lambda v: np.correlate(v[:2], v, "same"),
    lambda m: np.cov(m),
    lambda m: np.cov(m, rowvar=False),
    lambda v: np.cov(v, v**2),
    lambda m: np.cov(m, bias=True),
    lambda m: np.cov(m.astype(np.float32), ddof=0),
    lambda v: np.cov(v),
    lambda m: np.corrcoef(m),
    lambda v: np.corrcoef(v, v**2),
    lambda v: np.corrcoef(v),
    lambda v: np.polyval([1, 2, 3], v),
    lambda v: np.polyval(v, 2.0),
    lambda v, m: np.polyval(v, m),
    lambda m: np.apply_along_axis(lambda r: r.sum(), 0, m),
    lambda m: np.apply_along_axis(lambda r: r * 2, 1, m),
    lambda x: np.apply_along_axis(lambda r: r[:2], 0, x),
    lambda m: np.apply_along_axis(lambda r: np.outer(r, r), 1, m),
    lambda v: np.array_equiv(v, v),
    lambda m: np.array_equiv(m, m[:1]),
    lambda m, v: np.array_equiv(m, v[:3]),
    lambda m: np.unravel_index(np.argmax(m), m.shape),
    lambda m: np.unravel_index(np.argmax(m, axis=1), (2, 2)),
    lambda m: np.unravel_index(np.argmax(m), m.shape, order="F"),
    lambda v: np.ravel_multi_index((np.argmax(v), 0), (4, 4)),
    lambda m: np.ravel_multi_index((np.argmax(m, axis=0), np.argmax(m, axis=0)), (4, 4), order="F"),
    lambda m: np.ravel_multi_index((np.argmax(m, axis=0) + 5, np.argmax(m, axis=0)), (4, 4), mode="clip"),
    lambda m: np.maximum.accumulate(m, axis=1),
    lambda x: np.minimum.accumulate(x, axis=-1),
    lambda v: np.maximum.accumulate(v),
    lambda v: np.logaddexp.reduce(v),
    lambda m: np.logaddexp.reduce(m, axis=1),
    lambda m: np.logaddexp.reduce(m, axis=None),
    lambda m: np.logaddexp.reduce(m, axis=1, keepdims=True),
    lambda m: np.logaddexp.reduce(m - np.inf),
    lambda v: np.piecewise(v, [v < 0, v >= 0], [-1, 1]),
    lambda v: np.piecewise(v, [v < 0], [lambda q: -q, lambda q: q * 2]),
    lambda v: np.piecewise(v, v < 0, [lambda q: -q]),
    lambda v: np.gradient(v),
    lambda v: np.gradient(v, 0.5),
    lambda m: np.gradient(m),
    lambda m: np.gradient(m, axis=0),
    lambda m: np.gradient(m, axis=(0, 1)),
    lambda v: np.gradient(v, edge_order=2),
    lambda v: np.gradient(v, np.array([0.0, 1.0, 3.0, 4.0])),
    lambda v: np.gradient(v, np.array([0.0, 1.0, 3.0, 4.0]), edge_order=2),
    lambda m: np.gradient(m.astype(np.float32), 2.0, axis=1),
    lambda v: np.gradient(np.arange(4) * 2 + v.astype(int)),
    lambda v: np.lib.stride_tricks.sliding_window_view(v, 2),
    lambda m: np.lib.stride_tricks.sliding_window_view(m, (2, 3)),
    lambda m: np.lib.stride_tricks.sliding_window_view(m, 2, axis=1),
    lambda v: np.isin(v, [v[0], 2]),
    lambda v: np.isin(v, v[:2], invert=True),
    lambda m, v: np.isin(m, v),
    lambda n: np.nanargmax(n, axis=1),
    lambda n: np.nanargmin(n),
    lambda n: np.nanmedian(n),
    lambda n: np.nanmedian(n, axis=0),
    lambda n: np.nanmedian(n, axis=1, keepdims=True),
    lambda n: np.nancumsum(n, axis=1),
    lambda n: np.nancumprod(n),
    lambda v: np.isreal(v),
    lambda m: np.iscomplex(m),
    lambda v: np.real_if_close(v),
    lambda v: np.angle(v),
    lambda v: np.angle(v, deg=True),
    lambda v: np.argsort(v[0]),
    lambda v: np.median(v > 0),
    lambda v: np.clip((v * 3).astype(np.uint8), -1, 300),
    lambda v: (v * 3).astype(np.int8).clip(-1000, 2),
    lambda v: round(v[0]),
    lambda v: v == None,
    lambda v: v != None,
    lambda v: v == "text",
    lambda v: v.conjugate(),
    lambda v: v.imag,
    lambda v: np.sort(v).searchsorted(0.5),
]


def names(fn: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(fn).parameters)


def title(fn: Any) -> str:
    return (
        f"line{fn.__code__.co_firstlineno}" if hasattr(fn, "__code__") else str(getattr(fn, "__name__", fn))
    )


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("fn", CASES, ids=title)
def test_numpys_result(fn: Callable[..., Any]) -> None:
    args = [DATA[n] for n in names(fn)]
    want, got = fn(*args), tj.trace(fn)(*args, device="numpy")
    wants, gots = ((w,) if not isinstance(w, tuple | list) else w for w in (want, got))
    assert len(wants) == len(gots)
    for w, g in zip(wants, gots):
        assert (np.asarray(g).dtype, np.shape(g)) == (np.asarray(w).dtype, np.shape(w))
        np.testing.assert_allclose(
            g, w, rtol=1e-6 if np.asarray(w).dtype == np.float32 else 1e-11, atol=1e-12
        )


@pytest.mark.parametrize(
    "fn",
    [
        lambda v: np.convolve(v, v[:2]),
        lambda v: np.correlate(v, v[:2], "same"),
        lambda v: np.interp(v, np.array([-2.0, 0.0, 2.0]), np.array([1.0, 3.0, -1.0])),
        lambda v: np.interp(0.3, np.array([-3.0, 0.0, 1.0, 4.0]), v),
        lambda v: np.gradient(v, np.array([0.0, 1.0, 3.0, 4.0]), edge_order=2),
        lambda v: np.polyval(v, v),
        lambda v: np.logaddexp.reduce(v),
        lambda v: np.maximum.accumulate(v),
        lambda v: np.cov(v, v**2),
        lambda v: np.lib.stride_tricks.sliding_window_view(v, 2) ** 2,
        lambda v: np.insert(v, 1, v[0] ** 2) ** 2,
        lambda v: np.delete(v, [0, 2]) ** 2,
        lambda v: np.piecewise(v, [v < 0], [lambda q: -q, lambda q: q**2]),
        lambda v: np.apply_along_axis(lambda r: r * r.sum(), 0, v),
        lambda v: np.nanmedian(np.where(v > 1, np.nan, v)),
    ],
    ids=title,
)
def test_gradients_are_central_differences(fn: Callable[..., Any]) -> None:
    v, step = DATA["v"], 1e-6

    def loss(v: Any) -> Any:
        y = fn(v)
        return (y * np.cos(np.arange(float(y.size)).reshape(y.shape))).sum()

    want = [(loss(v + step * e) - loss(v - step * e)) / (2 * step) for e in np.eye(4)]
    np.testing.assert_allclose(tj.grad(loss)(v), want, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("fn", "error"),
    [
        (lambda v: np.gradient(v[:1]), ValueError),
        (lambda v: np.gradient(v, 1.0, 2.0), TypeError),
        (lambda v: np.lib.stride_tricks.sliding_window_view(v, 9), ValueError),
        (lambda v: np.delete(v, 7), IndexError),
        (lambda v: np.delete(v, np.argmax(v)), tj.UnsupportedFunctionError),
        (lambda v: np.convolve(v, v[:0]), ValueError),
        (lambda v: np.convolve(v, v, "other"), ValueError),
        (lambda v: np.cross(v, v), ValueError),
        (lambda v: np.block([[v], v]), ValueError),
        (lambda v: np.interp(v, v, v[:2]), ValueError),
        (lambda v: np.sum(v, axis=[0]), TypeError),
        (lambda v: np.ediff1d(v > 0), TypeError),
    ],
    ids=title,
)
def test_errors(fn: Callable[..., Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        tj.trace(fn)(DATA["v"])


def test_the_hint_for_numpys_own_memory() -> None:
    for fn in (
        lambda v: np.asarray(v),
        lambda v: np.full((2,), v[0]),
        lambda v: np.zeros(4).__setitem__(slice(2), v[:2]),
    ):
        with pytest.raises(tj.ConcretizationError, match=r"np\.stack.*np\.broadcast_to.*np\.where"):
            tj.trace(fn)(DATA["v"])
