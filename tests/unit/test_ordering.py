"""Sorting, running totals, differences and order statistics against NumPy itself, with gradients."""

from __future__ import annotations

import numpy as np
import pytest

import tracejit.functions as F
from tests.unit._evaluate import DTYPES, check, check_gradient, record
from tracejit.errors import DTypeError, ShapeError, UnsupportedFunctionError
from tracejit.ops import ordering as ops

RNG = np.random.default_rng(0)


def sample(shape: tuple[int, ...], dtype: str = "float64") -> np.ndarray:
    if dtype == "bool":
        return RNG.integers(0, 2, shape).astype(bool)
    return RNG.permutation(int(np.prod(shape)) or 1)[: int(np.prod(shape))].reshape(shape).astype(dtype)


FUNCTIONS = {
    "sort": lambda x: np.sort(x),
    "sort_axis": lambda x: np.sort(x, axis=0),
    "sort_flat": lambda x: np.sort(x, axis=None),
    "cumsum": lambda x: np.cumsum(x),
    "cumsum_axis": lambda x: np.cumsum(x, axis=-2),
    "cumprod": lambda x: np.cumprod(x, axis=1),
    "cumprod_flat": lambda x: np.cumprod(x),
    "cumulative_sum": lambda x: np.cumulative_sum(x, axis=-1, include_initial=True),
    "cumulative_prod": lambda x: np.cumulative_prod(x, axis=0, include_initial=True),
    "diff": lambda x: np.diff(x),
    "diff_twice": lambda x: np.diff(x, 2, axis=0, prepend=1.0),
    "diff_ends": lambda x: np.diff(x, axis=1, prepend=x[:, :1], append=0),
    "ediff1d": lambda x: np.ediff1d(x),
    "ediff1d_ends": lambda x: np.ediff1d(x, to_end=[1, 2], to_begin=-9),
    "trapezoid": lambda x: np.trapezoid(x),
    "trapezoid_dx": lambda x: np.trapezoid(x, dx=0.5, axis=0),
    "trapezoid_points": lambda x: np.trapezoid(x, [0.0, 1.0, 1.5, 4.0], axis=1),
    "trapezoid_arrays": lambda x: np.trapezoid(x, x * 2, axis=1),
    "median": lambda x: np.median(x),
    "median_axis": lambda x: np.median(x, axis=0),
    "median_even": lambda x: np.median(x, axis=-1, keepdims=True),
    "median_axes": lambda x: np.median(x, axis=(0, 1)),
    "quantile": lambda x: np.quantile(x, 0.3),
    "quantile_many": lambda x: np.quantile(x, [0.0, 0.25, 0.5, 0.9, 1.0], axis=1),
    "quantile_keepdims": lambda x: np.quantile(x, [[0.1], [0.2]], axis=0, keepdims=True),
    "percentile": lambda x: np.percentile(x, 60, axis=-1),
}
if not hasattr(np, "cumulative_sum"):  # NumPy 2.0
    FUNCTIONS = {name: f for name, f in FUNCTIONS.items() if not name.startswith("cumulative")}
for _method in ("lower", "higher", "nearest", "midpoint"):
    FUNCTIONS[f"quantile_{_method}"] = lambda x, m=_method: np.quantile(x, [0.1, 0.5, 0.77], method=m)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_as_numpy(name: str) -> None:
    check(FUNCTIONS[name], RNG.normal(size=(3, 4)))
    check(FUNCTIONS[name], RNG.normal(size=(3, 4)).astype(np.float32))
    check(FUNCTIONS[name], sample((3, 4), "int32"))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradient_as_central_differences(name: str) -> None:
    check_gradient(FUNCTIONS[name], RNG.normal(size=(3, 4)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["sort", "sort_axis", "cumsum", "cumsum_axis", "cumprod", "diff"])
def test_every_dtype(name: str, dtype: str) -> None:
    check(
        FUNCTIONS[name],
        sample((3, 4), dtype)
        if name != "cumprod"
        else sample((3, 4), dtype) % 3
        if dtype != "bool"
        else sample((3, 4), dtype),
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_argsort_is_stable(dtype: str) -> None:
    x = RNG.integers(0, 2, (4, 50)).astype(dtype)
    for axis in (0, -1, None):
        check(lambda x, a=axis: np.argsort(x, axis=a, kind="stable"), x)
    check(lambda x: np.argsort(x, kind="stable") if isinstance(x, np.ndarray) else x.argsort(), x)


def test_nan_goes_last_and_spoils_order_statistics() -> None:
    x = np.array([[2.0, np.nan, -1.0, np.inf], [0.0, -0.0, -np.inf, 1.0]])
    check(lambda x: np.sort(x), x)
    check(lambda x: np.argsort(x, kind="stable"), x)
    check(lambda x: np.median(x, axis=1), x)
    check(lambda x: np.quantile(x, 0.25, axis=1), x[1:, [0, 1, 3]])
    check(lambda x: np.quantile(x, [0.0, 0.4, 1.0], axis=1), x[:1])


def test_zero_size_and_single_elements() -> None:
    for f in (np.sort, lambda x: np.argsort(x, kind="stable"), np.cumsum, np.cumprod, np.diff):
        check(f, np.zeros((3, 0), np.float32))
        check(f, np.ones((2, 1)))
    check(np.cumsum, np.float64(3))
    check(np.cumprod, np.int32(3))
    check_gradient(np.cumprod, np.zeros((0,)))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("zeros", [0, 1, 2])
def test_cumprod_gradient_is_right_with_zeros(zeros: int, reverse: bool) -> None:
    x = RNG.normal(size=(2, 7))
    for row in x:
        row[RNG.permutation(7)[:zeros]] = 0
    g = RNG.normal(size=x.shape)
    (actual,) = ops.cumprod.vjp(g, None, x, axis=1, reverse=reverse)  # type: ignore[operator]
    expected = np.zeros_like(x)
    for r, i, j in np.ndindex(2, 7, 7):  # dx_j = sum_i g_i prod_{k in the first i, k != j} x_k
        span = range(i, 7) if reverse else range(i + 1)
        if j in span:
            expected[r, j] += g[r, i] * np.prod([x[r, k] for k in span if k != j])
    np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=1e-12)


def test_cumprod_second_derivative_is_right_with_zeros() -> None:
    x, g = np.array([0.5, 0.0, -2.0, 0.0, 3.0]), RNG.normal(size=5)

    def gradient(x):
        return ops.cumprod.vjp(np.asarray(g), None, x, axis=0, reverse=False)[0]  # type: ignore[operator]

    check_gradient(gradient, x, rtol=1e-5)


@pytest.mark.parametrize("reverse", [False, True])
def test_running_totals_from_either_end(reverse: bool) -> None:
    x = RNG.normal(size=(3, 4))
    turned = x[:, ::-1] if reverse else x
    for op, function in ((ops.cumsum, np.cumsum), (ops.cumprod, np.cumprod)):
        expected = function(turned, axis=1)
        np.testing.assert_allclose(op(x, axis=1, reverse=reverse), expected[:, ::-1] if reverse else expected)


def test_partition_is_a_full_sort() -> None:
    x = RNG.normal(size=9)
    check(lambda x: np.partition(x, 4)[4], x)
    check(lambda x: x[np.argpartition(x, 4)][4], x)


def test_concrete_calls_are_numpys() -> None:
    x = RNG.normal(size=(3, 4))
    np.testing.assert_array_equal(F.sort(x, axis=0), np.sort(x, axis=0))
    np.testing.assert_array_equal(F.cumsum(x), np.cumsum(x))
    np.testing.assert_array_equal(F.quantile(x, 0.2), np.quantile(x, 0.2))
    np.testing.assert_array_equal(F.diff(x, prepend=1), np.diff(x, prepend=1))


@pytest.mark.parametrize(
    ("f", "error", "words"),
    [
        (lambda x: np.sort(x, axis=2), ShapeError, "axis 2"),
        (lambda x: np.cumsum(x, axis=-3), ShapeError, "axis -3"),
        (lambda x: np.cumsum(x, dtype=bool), DTypeError, "bool"),
        (lambda x: np.cumulative_sum(x), ShapeError, "axis must be given"),
        (lambda x: np.diff(x, -1), ShapeError, "negative"),
        (lambda x: np.quantile(x, 1.5), ShapeError, "range"),
        (lambda x: np.quantile(x, 0.5, method="weibull"), UnsupportedFunctionError, "weibull"),
        (lambda x: np.median(x[:0]), ShapeError, "at least one"),
        (lambda x: np.quantile(x > 0, 0.5), DTypeError, "numbers"),
    ],
)
def test_mistakes_are_explained(f, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words) as caught:
        record(f, np.ones((2, 3)))
    assert "test_ordering.py" in str(caught.value), "the message names the user's line"
