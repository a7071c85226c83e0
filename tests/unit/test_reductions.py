"""Reductions agree with NumPy in value, dtype and shape for every form of ``axis``; gradients with finite differences."""

from __future__ import annotations

import numpy as np
import pytest

from tests.unit._evaluate import DTYPES, check, check_gradient, gradients, record, run
from tests.unit.test_elementwise import values
from tracejit import functions as F
from tracejit.errors import DTypeError, ShapeError, TracingError

AXES = (None, 0, 1, 2, -1, -3, (0,), (0, 2), (-1, 0), (0, 1, 2), ())
SUMS = ("sum", "prod", "mean", "var", "std", "any", "all", "count_nonzero")
EXTREMA = ("max", "min", "amax", "amin", "ptp")
NAN = ("nansum", "nanprod", "nanmean", "nanmax", "nanmin", "nanvar", "nanstd")


def close_enough(name: str, dtype: str) -> float | None:
    """Float16 is accumulated in float32 here, which is more accurate than NumPy's own float16 variance."""
    return 1e-2 if dtype == "float16" and name in ("var", "std", "nanvar", "nanstd", "sum", "prod") else None


@pytest.mark.parametrize("name", SUMS + EXTREMA)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_axis_form(name, dtype):
    function = getattr(np, name)
    if name == "ptp" and dtype == "bool":
        return  # NumPy has no difference of bools
    x = values(dtype, (2, 3, 4))
    for axis in AXES:
        if name == "count_nonzero" and axis == ():
            continue  # NumPy's count_nonzero has a different result dtype there
        for keepdims in (False, True):
            check(
                lambda x, a=axis, k=keepdims: function(x, axis=a, keepdims=k),
                x,
                rtol=close_enough(name, dtype),
            )


@pytest.mark.parametrize("name", ("argmax", "argmin"))
@pytest.mark.parametrize("dtype", DTYPES)
def test_positions(name, dtype):
    function = getattr(np, name)
    x = values(dtype, (3, 4))
    for axis in (None, 0, 1, -1):
        for keepdims in (False, True):
            check(lambda x, a=axis, k=keepdims: function(x, axis=a, keepdims=k), x)
    check(lambda x: getattr(x, name)(0), x)


def test_positions_of_ties_and_nan():
    x = np.array([[1.0, np.nan, np.nan], [2.0, 2.0, 1.0]])
    check(lambda x: np.argmax(x, axis=1), x)
    check(lambda x: np.argmin(x, axis=1), x)
    check(np.argmax, np.float64(3.0) * np.ones(()))


@pytest.mark.parametrize("name", SUMS + EXTREMA)
def test_zero_size_and_zero_dimensional(name):
    function = getattr(np, name)
    check(lambda x: function(x, axis=0), np.zeros((3, 0)))
    check(function, np.array(2.5))
    if name in EXTREMA:
        with pytest.raises(ShapeError, match="no elements"):
            run(lambda x: function(x, axis=1), np.zeros((3, 0)))
        with pytest.raises(ShapeError):
            run(function, np.zeros((0,)))
    else:
        import warnings

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # NumPy warns about means of nothing
            check(lambda x: function(x, axis=1), np.zeros((3, 0)))
            check(function, np.zeros((0, 2)))


def test_argmax_of_nothing_is_an_error():
    with pytest.raises(ShapeError, match="no elements"):
        run(lambda x: np.argmax(x, axis=1), np.zeros((3, 0)))


@pytest.mark.parametrize("dtype", [None, "float32", "float64", "int32", "int64", "bool"])
def test_dtype_keyword(dtype):
    for source in ("int8", "int32", "bool", "float32", "uint8"):
        x = values(source, (3, 4))
        check(lambda x: np.sum(x, axis=0, dtype=dtype), x)
        check(lambda x: np.prod(x, axis=0, dtype=dtype), x)
        if dtype in (None, "float32", "float64"):
            check(lambda x: np.mean(x, axis=0, dtype=dtype), x)
            check(lambda x: np.var(x, axis=0, dtype=dtype), x)


def test_float16_is_accumulated_in_float32():
    """Adding 0.1 four thousand times stalls in float16; through float32 the result is right."""
    x = np.full((1, 4000), 0.1, np.float16).T.copy()
    (total,) = run(lambda x: np.sum(x, axis=0), x)
    assert total.dtype == np.float16 and abs(float(total[0]) - 399.9) < 0.5
    check(lambda x: np.mean(x), np.full(70000, 10.0, np.float16))  # a float16 sum would be infinite


def test_ddof_and_correction():
    x = values("float64", (4, 5))
    for ddof in (0, 1, 2, 1.5):
        check(lambda x, d=ddof: np.var(x, axis=0, ddof=d), x)
        check(lambda x, d=ddof: x.std(axis=1, ddof=d, keepdims=True), x)
    check(lambda x: np.var(x, axis=0, correction=1), x)
    check(lambda x: np.var(x, axis=0, mean=np.mean(x, axis=0, keepdims=True)), x)
    with pytest.raises(ValueError, match="simultaneously"):
        run(lambda x: np.var(x, ddof=1, correction=1), x)
    (nothing_left,) = run(lambda x: np.var(x, axis=0, ddof=4), x)
    assert not np.isfinite(nothing_left).any()


def test_where_and_initial():
    x, mask = values("float64", (3, 4)), values("bool", (3, 4))
    mask[0] = True
    for name in ("sum", "prod", "mean", "var", "std"):
        f = getattr(np, name)
        check(lambda x, m, f=f: f(x, axis=0, where=m), x, mask)
    check(lambda x, m: np.mean(x, where=m[:, :1]), x, mask)
    check(lambda x, m: np.any(x > 1, axis=1, where=m), x, mask)
    check(lambda x, m: np.all(x > -1, axis=1, where=m), x, mask)
    check(lambda x: np.sum(x, initial=10.0), x)
    check(lambda x: np.prod(x, axis=0, initial=2.0), x)
    check(lambda x: np.max(x, axis=0, initial=0.5), x)
    check(lambda x, m: np.min(x, axis=0, initial=0.5, where=m), x, mask)
    check(lambda x: np.max(x, axis=1, initial=0.5), np.zeros((3, 0)))
    with pytest.raises(ValueError, match="initial="):
        run(lambda x, m: np.max(x, where=m), x, mask)


@pytest.mark.parametrize("weights", [None, (4,), (3, 4)])
def test_average(weights):
    x = values("float32", (3, 4))
    w = None if weights is None else np.abs(values("float64", weights)) + 0.1
    if w is None:
        check(lambda x: np.average(x, axis=1), x)
        check(np.average, values("int32"))
    else:
        check(lambda x, w: np.average(x, axis=1, weights=w), x, w)
        check(lambda x, w: np.average(x, axis=-1, weights=w, returned=True), x, w)
        check(lambda x, w: np.average(x, axis=1, weights=w, keepdims=True), values("int32", (3, 4)), w)
        check_gradient(lambda x, w: np.average(x, axis=1, weights=w), x.astype("f8"), w)


def test_average_errors():
    with pytest.raises(TypeError, match="Axis must be specified"):
        run(lambda x, w: np.average(x, weights=w), np.ones((3, 4)), np.ones(4))
    with pytest.raises(ShapeError, match="weights"):
        run(lambda x, w: np.average(x, axis=0, weights=w), np.ones((3, 4)), np.ones(4))


@pytest.mark.parametrize("name", NAN)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_ignoring_nan(name):
    function = getattr(np, name)
    x = values("float64", (3, 4))
    x[0, 1] = x[2, :] = np.nan
    for axis in (None, 0, 1):
        check(lambda x, a=axis: function(x, axis=a), x)
        check(lambda x, a=axis: function(x, axis=a, keepdims=True), x)
    check(lambda x: function(x, axis=0), values("int32", (3, 4)))


def test_nan_propagates_where_it_is_not_ignored():
    x = np.array([[1.0, np.nan], [2.0, 3.0]])
    for name in ("sum", "mean", "max", "min", "std"):
        function = getattr(np, name)
        check(lambda x, f=function: f(x, axis=1), x)


@pytest.mark.parametrize("name", ("sum", "mean", "var", "std", "prod", "max", "min", "ptp", "nanmean"))
@pytest.mark.parametrize("axis", [None, 0, -1, (0, 2)])
def test_gradients(name, axis):
    x = np.random.default_rng(5).uniform(0.5, 2.0, (2, 3, 4))
    function = getattr(np, name)
    check_gradient(lambda x: function(x, axis=axis), x)
    check_gradient(lambda x: function(x, axis=axis, keepdims=True) * 2.0, x)


def test_gradient_of_extrema_is_shared_by_ties():
    (g,) = gradients(lambda x: np.max(x, axis=1), np.array([[1.0, 3.0, 3.0], [2.0, 2.0, 2.0]]))
    np.testing.assert_allclose(g, [[0, 0.5, 0.5], [1 / 3, 1 / 3, 1 / 3]])
    (g,) = gradients(np.min, np.array([1.0, 1.0, 3.0]))
    np.testing.assert_allclose(g, [0.5, 0.5, 0.0])


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 8, 9])
def test_gradient_of_products_is_exact_at_zeros(n):
    """No division by the elements: one zero leaves the product of the others, two zeros leave nothing."""
    rng = np.random.default_rng(n)
    x = rng.uniform(0.5, 2.0, (3, n))
    x[1, 0] = 0.0
    x[2, : min(2, n)] = 0.0
    expected = np.array([[np.prod(np.delete(row, i)) for i in range(n)] for row in x])
    (g,) = gradients(lambda x: np.prod(x, axis=1), x)
    np.testing.assert_allclose(g, expected)
    (g,) = gradients(lambda x: np.prod(x, axis=0), x.T.copy())
    np.testing.assert_allclose(g, expected.T)


def test_second_gradient_of_a_product_at_zero():
    """∂²(abc)/∂a∂b = c, also where a = 0: the rule consists of products only."""

    def row(x):
        from tracejit.ops import reduction

        y = reduction.prod(x, axes=(0,))
        assert callable(reduction.prod.vjp)
        return reduction.prod.vjp(F.ones_like(y), y, x, axes=(0,))[0]

    (g,) = gradients(row, np.array([0.0, 2.0, 5.0]), seed=np.array([0.0, 1.0, 0.0]))
    np.testing.assert_allclose(g, [5.0, 0.0, 0.0])


def test_axis_errors_name_the_axis():
    x = np.ones((2, 3))
    with pytest.raises(ShapeError, match=r"\[sum\] axis 2 is out of bounds for an array of 2 dimensions"):
        run(lambda x: x.sum(axis=2), x)
    with pytest.raises(ShapeError, match="duplicate axis"):
        run(lambda x: np.mean(x, axis=(0, -2)), x)
    with pytest.raises(TypeError, match="must be an integer"):
        run(lambda x: np.sum(x, axis=1.0), x)  # type: ignore[call-overload]
    with pytest.raises(TracingError, match="out="):
        run(lambda x: np.sum(x, axis=0, out=np.zeros(3)), x)
    with pytest.raises(DTypeError, match="variance"):
        run(lambda x: np.var(x, dtype=np.int32), x)


def test_composites_live_in_a_named_scope():
    _, graph, _ = record(lambda x: np.var(x), np.ones(3))
    assert {n.scope for n in graph.nodes if n.inputs} == {"var"}


def test_concrete_arrays_stay_numpy():
    x = np.arange(6.0).reshape(2, 3)
    for name in (*SUMS, *EXTREMA, *NAN, "argmax", "argmin", "average"):
        np.testing.assert_array_equal(getattr(F, name)(x, axis=1), getattr(np, name)(x, axis=1))
