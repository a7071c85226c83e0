"""JIT traps around Python values: what other tracing compilers freeze, and what tracejit does instead."""

from __future__ import annotations

import enum
import types
from dataclasses import dataclass

import numpy as np
import pytest

import tracejit as tj
from tracejit.nn.module import Module, static_field

X = np.arange(6, dtype=np.float32).reshape(2, 3)


def test_changing_a_learning_rate_never_retraces() -> None:
    @tj.trace
    def step(w, lr):
        return w - lr * w

    for lr in (0.1, 0.01, 0.5):
        np.testing.assert_allclose(step(X, lr), X - np.float32(lr) * X, rtol=1e-6)
    assert step.cache_info().misses == 1


def test_python_int_argument_is_not_frozen() -> None:
    @tj.trace
    def shift(x, n):
        return x + n

    for n in (1, 2, -7):
        np.testing.assert_array_equal(shift(X, n), X + n)
    assert shift.cache_info().misses == 1


def test_scalar_used_in_if_is_guarded_by_its_value() -> None:
    @tj.trace
    def f(x, n):
        if n > 2:
            return x * 10
        return x

    np.testing.assert_array_equal(f(X, 1), X)
    np.testing.assert_array_equal(f(X, 3), X * 10)
    np.testing.assert_array_equal(f(X, 1), X)
    assert f.cache_info().misses == 2


def test_scalar_used_in_range_is_guarded() -> None:
    @tj.trace
    def repeat(x, n):
        for _ in range(n):
            x = x + 1
        return x

    for n in (0, 3, 1, 3):
        np.testing.assert_array_equal(repeat(X, n), X + n)
    assert repeat.cache_info() == (1, 3, 128, 1)


def test_scalar_used_as_shape_is_guarded() -> None:
    @tj.trace
    def f(x, rows):
        return x.reshape(rows, -1)

    assert f(X, 2).shape == (2, 3)
    assert f(X, 3).shape == (3, 2)
    assert f(X, 6).shape == (6, 1)


def test_guard_on_one_scalar_leaves_the_other_free() -> None:
    @tj.trace
    def f(x, n, scale):
        return x.reshape(n, -1) * scale

    for scale in (1.0, 2.0, 3.0):
        f(X, 2, scale)
    assert f.cache_info().misses == 1


def test_float_used_through_math_is_guarded() -> None:
    import math

    @tj.trace
    def f(x, t):
        return x * math.exp(t)

    for t in (0.0, 1.0, 2.0):
        np.testing.assert_allclose(f(X, t), X * np.float32(math.exp(t)), rtol=1e-6)


def test_bool_argument_selects_a_branch() -> None:
    @tj.trace
    def f(x, training):
        return x * 2 if training else x

    np.testing.assert_array_equal(f(X, True), X * 2)
    np.testing.assert_array_equal(f(X, False), X)


def test_true_and_one_are_different_arguments() -> None:
    @tj.trace
    def f(x, flag):
        return x + 1 if flag is True else x

    np.testing.assert_array_equal(f(X, True), X + 1)
    np.testing.assert_array_equal(f(X, 1), X)


def test_string_and_enum_arguments_are_static() -> None:
    class Mode(enum.Enum):
        DOUBLE = 2
        TRIPLE = 3

    @tj.trace
    def f(x, name, mode):
        x = np.exp(x) if name == "exp" else x
        return x * mode.value

    np.testing.assert_allclose(f(X, "exp", Mode.DOUBLE), np.exp(X) * 2, rtol=1e-6)
    np.testing.assert_allclose(f(X, "id", Mode.TRIPLE), X * 3, rtol=1e-6)
    assert f.cache_info().misses == 2


def test_frozen_config_object_is_static_by_value() -> None:
    @dataclass(frozen=True)
    class Config:
        power: int

    @tj.trace
    def f(x, config):
        return x**config.power

    np.testing.assert_allclose(f(X, Config(2)), X**2)
    np.testing.assert_allclose(f(X, Config(3)), X**3)
    f(X, Config(2))
    assert f.cache_info().misses == 2


def test_callable_argument_is_static() -> None:
    @tj.trace
    def f(x, activation):
        return activation(x)

    np.testing.assert_allclose(f(X, np.tanh), np.tanh(X), rtol=1e-6)
    np.testing.assert_allclose(f(X, np.exp), np.exp(X), rtol=1e-6)


SCALE = 2.0
BIAS = np.float32(1)
TABLE = np.array([1.0, 2.0, 3.0], np.float32)


def test_rebinding_a_global_scalar_takes_effect(monkeypatch: pytest.MonkeyPatch) -> None:
    @tj.trace
    def f(x):
        return x * SCALE

    np.testing.assert_array_equal(f(X), X * 2)
    monkeypatch.setitem(globals(), "SCALE", 5.0)
    np.testing.assert_array_equal(f(X), X * 5)


def test_rebinding_a_global_array_takes_effect(monkeypatch: pytest.MonkeyPatch) -> None:
    @tj.trace
    def f(x):
        return x + TABLE

    np.testing.assert_array_equal(f(X), X + TABLE)
    monkeypatch.setitem(globals(), "TABLE", np.array([10.0, 20.0, 30.0], np.float32))
    np.testing.assert_array_equal(f(X), X + np.array([10, 20, 30], np.float32))


def test_changing_a_closed_over_array_in_place_takes_effect() -> None:
    table = np.array([1.0, 2.0, 3.0], np.float32)

    @tj.trace
    def f(x):
        return x + table

    np.testing.assert_array_equal(f(X), X + table)
    table[:] = 100
    np.testing.assert_array_equal(f(X), X + 100)
    assert f.cache_info().misses == 1


def test_rebinding_a_closure_cell_takes_effect() -> None:
    rate = 1.0

    @tj.trace
    def f(x):
        return x * rate

    np.testing.assert_array_equal(f(X), X)
    rate = 3.0
    np.testing.assert_array_equal(f(X), X * 3)


def test_replacing_an_item_of_a_closed_over_dict_takes_effect() -> None:
    params = {"w": np.ones(3, np.float32)}

    @tj.trace
    def f(x):
        return x * params["w"]

    np.testing.assert_array_equal(f(X), X)
    params["w"] = np.full(3, 4, np.float32)
    np.testing.assert_array_equal(f(X), X * 4)


def helper(x):
    return x + 1


def test_redefining_a_helper_function_takes_effect(monkeypatch: pytest.MonkeyPatch) -> None:
    @tj.trace
    def f(x):
        return helper(x)

    np.testing.assert_array_equal(f(X), X + 1)
    monkeypatch.setitem(globals(), "helper", lambda x: x + 2)
    np.testing.assert_array_equal(f(X), X + 2)


def test_helpers_globals_are_watched_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def inner(x):
        return x * SCALE

    @tj.trace
    def f(x):
        return inner(x)

    np.testing.assert_array_equal(f(X), X * 2)
    monkeypatch.setitem(globals(), "SCALE", 7.0)
    np.testing.assert_array_equal(f(X), X * 7)


def test_attribute_of_a_global_config_is_watched() -> None:
    config = types.SimpleNamespace(lr=2.0)

    @tj.trace
    def f(x):
        return x * config.lr

    np.testing.assert_array_equal(f(X), X * 2)
    config.lr = 4.0
    np.testing.assert_array_equal(f(X), X * 4)


def test_attributes_of_self_are_watched() -> None:
    class Model:
        def __init__(self) -> None:
            self.w = np.ones(3, np.float32)
            self.gain = 2.0

        @tj.trace
        def predict(self, x):
            return x * self.w * self.gain

    model = Model()
    np.testing.assert_array_equal(model.predict(X), X * 2)
    model.gain = 3.0
    np.testing.assert_array_equal(model.predict(X), X * 3)
    model.w = np.full(3, 2, np.float32)
    np.testing.assert_array_equal(model.predict(X), X * 6)


def test_default_arguments_work_and_can_be_overridden() -> None:
    @tj.trace
    def f(x, scale=2.0, bias=BIAS):
        return x * scale + bias

    np.testing.assert_array_equal(f(X), X * 2 + 1)
    np.testing.assert_array_equal(f(X, 3.0), X * 3 + 1)
    np.testing.assert_array_equal(f(X, bias=np.float32(5)), X * 2 + 5)


def test_default_array_argument_is_read_at_each_call() -> None:
    table = np.ones(3, np.float32)

    @tj.trace
    def f(x, w=table):
        return x * w

    np.testing.assert_array_equal(f(X), X)
    table[:] = 9
    np.testing.assert_array_equal(f(X), X * 9)


def test_keyword_order_does_not_matter() -> None:
    @tj.trace
    def f(*, a, b):
        return a - b

    np.testing.assert_array_equal(f(a=X, b=X * 2), -X)
    np.testing.assert_array_equal(f(b=X * 2, a=X), -X)
    assert f.cache_info().misses == 1


def test_static_argnames_take_part_by_value() -> None:
    @tj.trace(static_argnames=("n",))
    def f(x, n):
        assert type(n) is int
        return x * n

    np.testing.assert_array_equal(f(X, 2), X * 2)
    np.testing.assert_array_equal(f(X, n=3), X * 3)
    np.testing.assert_array_equal(f(X, n=2), X * 2)
    assert f.cache_info().misses == 2


def test_static_fields_of_a_module_take_part_by_value_and_type() -> None:
    class Scale(Module):
        k: object = static_field()

        def __call__(self, x):
            return x * self.k

    f = tj.trace(lambda m, x: m(x))
    x = np.arange(3)
    for _ in range(2):
        for k in (2, 2.0, True, 3):
            got, want = f(Scale(k), x), x * k
            np.testing.assert_array_equal(got, want)
            assert got.dtype == want.dtype


def test_unknown_static_argname_is_refused_at_decoration() -> None:
    with pytest.raises(tj.TracingError, match=r"'m'.*not a parameter"):

        @tj.trace(static_argnames="m")
        def f(x, n):
            return x


@pytest.mark.parametrize("name", ["device", "watch"])
def test_reserved_parameter_names_are_refused_at_decoration(name: str) -> None:
    namespace: dict = {}
    exec(f"def f(x, {name}=None): return x", namespace)
    with pytest.raises(tj.TracingError, match=f"parameter named '{name}'"):
        tj.trace(namespace["f"])


def test_wrong_call_raises_typeerror_like_python() -> None:
    @tj.trace
    def f(x, y):
        return x + y

    with pytest.raises(TypeError, match="missing 1 required positional argument"):
        f(X)
    assert f.cache_info().currsize == 0
