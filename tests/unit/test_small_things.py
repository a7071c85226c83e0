"""Details a NumPy or Python user expects of traced functions and tensors: copies, pickles, prints, odd arguments."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest

import tracejit as tj
from tracejit import nn

X = np.arange(6, dtype=np.float32).reshape(2, 3)


@tj.trace
def module_level(x: Any) -> Any:
    return x + 1


def test_a_traced_function_is_copied_and_pickled_like_a_function() -> None:
    assert copy.copy(module_level) is module_level
    assert copy.deepcopy({"f": module_level})["f"] is module_level
    assert pickle.loads(pickle.dumps(module_level)) is module_level
    with pytest.raises((pickle.PicklingError, AttributeError)):
        pickle.dumps(tj.trace(lambda x: x))


def test_copying_a_tensor_is_the_tensor_and_pickling_it_an_error() -> None:
    f = tj.trace(lambda x: copy.deepcopy([x])[0] + copy.copy(x))
    np.testing.assert_array_equal(f(X), X * 2)
    with pytest.raises(tj.TracingError, match="pickled"):
        tj.trace(lambda x: pickle.dumps(x))(X)


def test_slices_and_ranges_are_static_arguments() -> None:
    f = tj.trace(lambda x, part: x[part])
    for part in (slice(1), slice(1, 2), slice(None, None, -1), slice(1)):
        np.testing.assert_array_equal(f(X, part), X[part])
    assert f.cache_info().misses == 3
    g = tj.trace(lambda x, r: sum(x * i for i in r))
    np.testing.assert_array_equal(g(X, range(3)), X * 3)


def test_gradients_at_python_integers_are_those_at_floats() -> None:
    assert tj.grad(lambda x: x**2)(3) == 6.0
    assert tj.grad(tj.grad(lambda x: x**3))(2) == 12.0
    value, gradient = tj.value_and_grad(lambda x, n: x * n)(3, 4)
    assert (value, gradient) == (12.0, 4.0)
    assert tj.trace(lambda n: tj.grad(lambda x: x * x)(n))(5) == 10.0
    assert [tj.grad(lambda x: x**2)(s) for s in (3.0, np.float64(3), np.array(3.0))] == [6.0, 6.0, 6.0]


def test_print_takes_values_without_a_format(capsys: pytest.CaptureFixture[str]) -> None:
    @tj.trace
    def f(x: Any) -> Any:
        tj.print("loss", x.sum())
        tj.print("{} of {:.1f}", x[0, 1], x.max())
        tj.print("done")
        return x

    f(X, device="numpy")
    assert capsys.readouterr().out.splitlines() == ["loss 15.0", "1.0 of 5.0", "done"]


def test_rounding_to_an_integer() -> None:
    assert type(tj.trace(lambda x: round(x[1, 2] * 0.7))(X)) is np.int64
    assert tj.trace(lambda x: round(x[1, 2] * np.float32(0.55), 1))(X) == np.float32(2.8)


def test_comparing_with_none_and_text() -> None:
    for value in (None, "text"):
        np.testing.assert_array_equal(tj.trace(lambda x, v=value: x == v)(X), np.zeros((2, 3), bool))
        np.testing.assert_array_equal(tj.trace(lambda x, v=value: x != v)(X), np.ones((2, 3), bool))
    assert tj.trace(lambda x: x if x is not None else None)(X) is not None


def test_mse_has_both_names() -> None:
    assert nn.mse is nn.mse_loss
    assert nn.mse(X, X + 2) == 4.0


def test_augmented_assignment_rebinds_and_leaves_the_argument_alone() -> None:
    @tj.trace
    def f(x: Any) -> Any:
        before = x
        x += 1
        x *= 2
        x **= 2
        x @= np.eye(3, dtype=np.float32)
        return x, before

    x = X.copy()
    after, before = f(x)
    np.testing.assert_array_equal(after, ((X + 1) * 2) ** 2)
    np.testing.assert_array_equal(before, X)
    np.testing.assert_array_equal(x, X)


def test_lists_that_hold_tensors_are_operands() -> None:
    f = tj.trace(lambda a, b: ([a, b] * a, np.add([a, b], b), b - (a, 1 + b), a == [a, b]))
    a, b = np.array([1.0, 2.0]), np.array([3.0, 2.0])
    for got, want in zip(f(a, b), ([a, b] * a, np.add([a, b], b), b - (a, 1 + b), a == [a, b])):
        np.testing.assert_array_equal(got, want)
