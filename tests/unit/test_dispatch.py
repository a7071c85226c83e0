"""Plain NumPy calls on tensors: which functions trace, what methods of ufuncs do, and how everything else is refused."""

from __future__ import annotations

import numpy as np
import pytest

from tests.unit._evaluate import check, record, run
from tracejit.errors import TracingError, UnsupportedFunctionError
from tracejit.functions import dispatch
from tracejit.tensor import Tensor

X = np.arange(6.0).reshape(2, 3) + 0.5


@pytest.mark.parametrize(
    "name", ["add", "multiply", "maximum", "minimum", "fmax", "fmin", "logical_and", "logical_or"]
)
def test_reduce(name):
    ufunc = getattr(np, name)
    check(lambda x: ufunc.reduce(x), X)
    check(lambda x: ufunc.reduce(x, axis=1, keepdims=True), X)
    check(lambda x: ufunc.reduce(x, axis=None), X)
    check(lambda x: ufunc.reduce(x, (0, 1)), X)


def test_reduce_keeps_the_accumulator_rules_of_numpy():
    check(lambda x: np.add.reduce(x), X.astype("int8"))
    check(lambda x: np.add.reduce(x, dtype=np.float32), X.astype("int8"))
    check(lambda x: np.maximum.reduce(x, dtype=np.float32), X.astype("int8"))
    check(lambda x: np.add.reduce(x, initial=5.0), X)


def test_accumulate_and_outer():
    check(lambda x: np.add.accumulate(x, axis=1), X)
    check(lambda x: np.add.accumulate(x), X)
    check(lambda x: np.multiply.accumulate(x), X)
    check(lambda x: np.multiply.outer(x, x[0]), X)
    check(lambda x: np.subtract.outer(x, np.arange(2)), X)
    check(lambda x: np.less.outer(np.arange(2.0), x), X)


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda x: np.subtract.reduce(x), r"np\.subtract\.reduce cannot be traced"),
        (
            lambda x: np.subtract.accumulate(x),
            r"np\.subtract\.accumulate cannot be traced.*np\.add\.accumulate",
        ),
        (lambda x: np.add.reduceat(x, [0, 1]), r"np\.add\.reduceat cannot be traced"),
        (lambda x: np.gcd(x.astype(int), 2), r"np\.gcd cannot be traced"),
        (lambda x: np.unique(x), r"np\.unique cannot be traced: the shape of its result depends on values"),
        (lambda x: np.nonzero(x), r"depends on values"),
        (lambda x: np.linalg.svd(x), r"np\.linalg\.svd cannot be traced"),
        (lambda x: np.fft.fft(x), r"np\.fft\.fft cannot be traced"),
        (
            lambda x: np.copyto(np.zeros((2, 3)), x),
            r"np\.copyto cannot be traced: it writes into its operand",
        ),
        (lambda x: np.nanquantile(x, 0.5), r"nearest supported function is np\.quantile"),
        (lambda x: np.linalg.cond(x), r"np\.linalg\.cond"),
    ],
)
def test_unsupported_functions_say_why_and_name_the_nearest(call, message):
    with pytest.raises(UnsupportedFunctionError, match=message) as info:
        run(call, X)
    assert "test_dispatch.py" in str(info.value)


def test_unsupported_functions_of_other_libraries():
    class Other:
        """Not NumPy's: the protocol is offered functions by anybody who implements it."""

    def sum(x):
        return x

    sum.__module__ = "otherlib"
    with pytest.raises(UnsupportedFunctionError, match=r"otherlib\.sum cannot be traced"):
        run(lambda x: x.__array_function__(sum, (Other,), (x,), {}), X)
    mine = np.frompyfunc(lambda a, b: a, 2, 1)
    with pytest.raises(UnsupportedFunctionError):
        run(lambda x: mine(x, x), X)


def test_out_and_in_place_arrays_are_refused():
    with pytest.raises(TracingError, match="immutable"):
        run(lambda x: np.exp(x, out=np.zeros((2, 3))), X)

    def in_place(x):
        total = np.zeros((2, 3))
        total += x
        return total

    with pytest.raises(TracingError, match="write x = x \\+ y instead of x \\+= y"):
        run(in_place, X)

    def rebinding(x):
        y = x
        y += 1.0  # a tensor on the left makes a new tensor
        return x + y

    np.testing.assert_allclose(run(rebinding, X)[0], 2 * X + 1)


def test_questions_about_shape_and_type_are_answered_at_once():
    def f(x, s):
        assert np.shape(x) == (2, 3) and np.ndim(x) == 2 and np.size(x) == 6 and np.size(x, 1) == 3
        assert np.result_type(x, 1.0) == np.float32 and np.result_type(x, s) == np.float32
        assert np.result_type(x, np.float64) == np.float64 and np.can_cast(x, "float64")
        assert not np.iscomplexobj(x) and np.isrealobj(x)
        assert np.common_type(x, x) == np.float32 and not np.may_share_memory(x, x)
        return x

    record(f, X.astype("f4"), 2.0)


def test_results_of_numpy_functions_are_strong():
    (y,), _, _ = record(lambda s: np.add(s, s), 2.0)
    assert isinstance(y, Tensor) and not y.weak and y.dtype == np.float64
    (y,), _, _ = record(lambda s: np.clip(s, 0, 1), 2.0)
    assert not y.weak


@pytest.mark.parametrize(
    "name,message",
    [
        ("tobytes", "it needs the values"),
        ("fill", "writes into its operand"),
        ("nonzero", "depends on values"),
        ("strides", "memory layout"),
        ("cumsun", r"did you mean \.cumsum\?"),
        ("tanh", r"use np\.tanh\(x\)"),
        ("nonsense_name", "arrays have no attribute 'nonsense_name'"),
    ],
)
def test_missing_attributes(name, message):
    with pytest.raises(AttributeError, match=message) as info:
        run(lambda x: getattr(x, name), X)
    assert isinstance(info.value, UnsupportedFunctionError)
    record(lambda x: x if not hasattr(x, name) else None, X)


def test_supported_names_are_numpys():
    """Every name that error messages may suggest exists in NumPy."""
    for name in dispatch.supported_names():
        owner, _, last = name.rpartition(".")
        assert callable(getattr(getattr(np, owner) if owner else np, last)), name


METHODS = [
    lambda x: x.sum(axis=0), lambda x: x.mean(), lambda x: x.std(axis=1), lambda x: x.var(ddof=1), lambda x: x.prod(0),
    lambda x: x.max(axis=1, keepdims=True), lambda x: x.min(), lambda x: x.argmax(1), lambda x: x.argmin(),
    lambda x: (x > 1).any(axis=0), lambda x: (x > 1).all(), lambda x: x.clip(1, 2), lambda x: x.round(1), lambda x: x.conj(),
    lambda x: x.dot(x.T), lambda x: x.trace(), lambda x: x.diagonal(), lambda x: x.astype("f4"), lambda x: x.real,
    lambda x: x.copy(), lambda x: abs(-x), lambda x: +x, lambda x: ~(x > 1), lambda x: x // 2 + x % 2, lambda x: 2**x,
    lambda x: 1 / x - 3, lambda x: 3 & (x.astype(int) | 1) ^ 2, lambda x: (x.astype(int) << 2) >> 1,
]  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_methods_and_operators(method):
    check(method, X)
