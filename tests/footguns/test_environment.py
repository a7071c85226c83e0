"""JIT traps around what a function reads besides its arguments: every change takes effect, as in plain Python."""

from __future__ import annotations

import dataclasses
import functools
import random
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import tracejit as tj
from tracejit import nn

X = np.array([1.0, 2.0, 3.0])


class Part:
    def __init__(self, gain: float = 2.0) -> None:
        self.gain = gain


class Model:
    """A plain Python model: attributes, an object inside, methods, a property, a call."""

    rate = 2.0

    def __init__(self) -> None:
        self.scale = 2.0
        self.w = np.ones(3)
        self.part = Part()
        self.parts = [Part(1.0), Part(1.0)]
        self.net = nn.Linear(3, 2, rng=np.random.default_rng(0))

    def forward(self, x: Any) -> Any:
        return x * self.scale * self.w

    def __call__(self, x: Any) -> Any:
        return self.forward(x)

    @property
    def double(self) -> float:
        return 2 * self.scale

    @tj.trace
    def traced(self, x: Any) -> Any:
        return self.forward(x) * self.part.gain


class Slotted:
    __slots__ = ("gain",)

    def __init__(self) -> None:
        self.gain = 2.0


@dataclasses.dataclass
class Settings:
    gain: float = 2.0


def _changes() -> Iterator[tuple[str, Callable[..., Any], Callable[[], None]]]:
    """(what is changed, a function of x that reads it, the change)."""
    m = Model()
    yield "attribute of an object", lambda x: x * m.scale, lambda: setattr(m, "scale", 3.0)
    m1 = Model()
    yield "attribute of a part", lambda x: x * m1.part.gain, lambda: setattr(m1.part, "gain", 3.0)
    m2 = Model()
    yield "what a method reads", lambda x: m2.forward(x), lambda: setattr(m2, "scale", 3.0)
    m3 = Model()
    yield "what a call reads", lambda x: m3(x), lambda: setattr(m3, "scale", 3.0)
    m4 = Model()
    yield "what a property reads", lambda x: x * m4.double, lambda: setattr(m4, "scale", 3.0)
    m5 = Model()
    yield "an array in a method", lambda x: m5.forward(x), lambda: setattr(m5, "w", np.full(3, 5.0))
    m6 = Model()
    yield "its contents", lambda x: m6.forward(x), lambda: m6.w.fill(7.0)
    m7 = Model()
    yield (
        "a part in a list",
        lambda x: x * sum(p.gain for p in m7.parts),
        lambda: setattr(m7.parts[1], "gain", 9.0),
    )
    m8 = Model()
    new = nn.Linear(3, 2, rng=np.random.default_rng(1))
    yield "a module of nn", lambda x: m8.net(x), lambda: setattr(m8, "net", new)
    m9 = Model()
    yield "self of a traced method", m9.traced, lambda: setattr(m9.part, "gain", 3.0)
    m10 = Model()
    yield "getattr", lambda x: x * getattr(m10, "scale"), lambda: setattr(m10, "scale", 3.0)  # noqa: B009
    slotted = Slotted()
    yield "an object with slots", lambda x: x * slotted.gain, lambda: setattr(slotted, "gain", 3.0)
    settings = Settings()
    yield "a dataclass", lambda x: x * settings.gain, lambda: setattr(settings, "gain", 3.0)
    space = types.SimpleNamespace(a=types.SimpleNamespace(b=2.0))
    yield "nested namespaces", lambda x: x * space.a.b, lambda: setattr(space.a, "b", 3.0)

    class Constants:
        gain = 2.0

        @staticmethod
        def apply(x: Any) -> Any:
            return x * Constants.gain

    yield "attribute of a class", lambda x: x * Constants.gain, lambda: setattr(Constants, "gain", 3.0)
    yield (
        "what a static method reads",
        lambda x: Constants.apply(x),
        lambda: setattr(Constants, "gain", 4.0),
    )
    module = types.ModuleType("settings")
    exec("gain = 2.0\ndef apply(x): return x * gain", module.__dict__)
    yield "attribute of a module", lambda x: x * module.gain, lambda: setattr(module, "gain", 3.0)
    yield "what its function reads", lambda x: module.apply(x), lambda: setattr(module, "gain", 4.0)
    yield "its function", lambda x: module.apply(x), lambda: setattr(module, "apply", lambda x: x * 9)
    seen = {1, 2}
    yield "a set", lambda x: x * len(seen), lambda: seen.add(3)
    names: dict[str, Any] = {"f": np.tanh}
    yield "a function in a dict", lambda x: names["f"](x), lambda: names.update(f=np.exp)
    table = np.array([1.0, 2.0, 3.0])
    yield "one element of an array", lambda x: x * table[1], lambda: table.__setitem__(1, 5.0)
    yield "the sum of an array", lambda x: x * table.sum(), lambda: table.__setitem__(1, 6.0)
    yield "an array through NumPy", lambda x: x * np.tanh(table), lambda: table.__setitem__(1, 7.0)
    yield "both ways at once", lambda x: x * table + table.max(), lambda: table.__setitem__(1, 8.0)
    yield "an array as a condition", lambda x: x if table[0] > 0 else -x, lambda: table.fill(-1.0)
    scalar = np.array(2.0)
    yield "float of an array", lambda x: x * float(scalar), lambda: scalar.fill(3.0)
    yield "a range over an array", lambda x: sum(x for _ in range(int(scalar))), lambda: scalar.fill(4.0)
    part = functools.partial(lambda a, x: x * a, np.ones(3))
    yield "an argument of a partial", part, lambda: part.args[0].fill(4.0)

    def with_default(x: Any, w: np.ndarray = np.ones(3)) -> Any:  # noqa: B008
        return x * w.mean()

    yield "a default argument", with_default, lambda: with_default.__defaults__[0].fill(4.0)  # type: ignore[index]
    gains = [1.0]

    def helper(x: Any) -> Any:
        return x * sum(gains)

    def decorated(fn: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(fn)
        def wrapper(x: Any) -> Any:
            return fn(x) * len(gains)

        return wrapper

    yield "a list two functions away", lambda x: (lambda y: helper(y))(x), lambda: gains.append(5.0)
    yield "what a decorator reads", decorated(lambda x: x + 1), lambda: gains.append(6.0)


CHANGES = {name: (fn, change) for name, fn, change in _changes()}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_takes_effect(name: str) -> None:
    fn, change = CHANGES[name]
    plain = fn.func if isinstance(fn, functools.partial) else fn
    plain = plain.__wrapped__.__get__(fn.__self__) if hasattr(fn, "__func__") else fn
    f = fn if hasattr(fn, "__func__") else tj.trace(fn)
    before = plain(X)
    for _ in range(3):
        np.testing.assert_allclose(f(X), before)
    misses = f.cache_info().misses
    assert misses == 1, "nothing changed: no retrace"
    change()
    after = plain(X)
    assert not np.array_equal(before, after)
    for _ in range(2):
        np.testing.assert_allclose(f(X), after)
    assert f.cache_info().misses <= 2


@pytest.mark.parametrize("use", [lambda x, t: x * t, lambda x, t: x @ t.T, lambda x, t: np.dot(t, x).sum()])
def test_an_array_used_in_the_graph_is_read_at_each_call_without_a_retrace(use: Callable[..., Any]) -> None:
    table = np.arange(9.0).reshape(3, 3)
    f = tj.trace(lambda x: use(x, table).reshape(-1)[: table.shape[0]] + len(table))
    for value in (1.0, 5.0, -2.0):
        table[:] = value
        np.testing.assert_allclose(f(X), use(X, table).reshape(-1)[:3] + 3)
    assert f.cache_info().misses == 1


def test_attributes_that_the_function_does_not_read_do_not_matter() -> None:
    class Trainer:
        def __init__(self) -> None:
            self.gain, self.seen, self.log = 2.0, 0, []

        @tj.trace
        def step(self, x: Any) -> Any:
            return x * self.gain

    trainer = Trainer()
    for _ in range(5):
        np.testing.assert_allclose(trainer.step(X), X * 2)
        trainer.seen += 1
        trainer.log.append(trainer.seen)
    assert trainer.step.cache_info().misses == 1


def test_a_function_given_as_an_argument_may_read_things_too() -> None:
    gain = [2.0]
    f = tj.trace(lambda x, g: g(x))

    def g(x: Any) -> Any:
        return x * gain[0]

    np.testing.assert_allclose(f(X, g), X * 2)
    gain[0] = 3.0
    np.testing.assert_allclose(f(X, g), X * 3)


@pytest.mark.parametrize("transform", [tj.grad, lambda f: tj.vmap(tj.grad(f))], ids=["grad", "vmap"])
def test_transforms_notice_changes(transform: Callable[..., Any]) -> None:
    part = Part(2.0)
    f = transform(lambda x: (x * part.gain).sum())
    np.testing.assert_allclose(f(np.stack([X, X]))[0], [2, 2, 2])
    part.gain = 3.0
    np.testing.assert_allclose(f(np.stack([X, X]))[0], [3, 3, 3])


def test_the_explanation_names_what_changed(capsys: pytest.CaptureFixture[str]) -> None:
    from tracejit.config import set_log

    part = Part(2.0)
    f = tj.trace(lambda x: x * part.gain)
    set_log("retrace")
    try:
        f(X)
        part.gain = 3.5
        f(X)
    finally:
        set_log("")
    assert "gain: 2.0 -> 3.5" in capsys.readouterr().err


@pytest.mark.parametrize("source", ["np.random", "random", "Generator"])
def test_random_numbers_frozen_into_a_trace_are_warned_about(source: str) -> None:
    rng = np.random.default_rng(0)
    draw = {
        "np.random": lambda: np.random.normal(size=3),  # noqa: NPY002
        "random": lambda: random.random(),
        "Generator": lambda: rng.normal(size=3),
    }[source]
    f = tj.trace(lambda x: x + draw())
    with pytest.warns(tj.FrozenValueWarning, match=rf"(?s){source}.*tj\.random") as caught:
        f(X)
    assert caught[0].filename == __file__


def test_tracejits_random_numbers_are_not_frozen() -> None:
    f = tj.trace(lambda x, key: x + tj.random.normal(key, (3,), dtype=np.float64))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        a, b = (f(X, k) for k in tj.random.split(tj.random.key(0)))
    assert not np.array_equal(a, b)


def _rebindings() -> Iterator[tuple[str, Callable[..., Any], Callable[[np.ndarray], None]]]:
    """(what is rebound, a function of x that reads it, the rebinding to a new array of three)."""
    cell = np.ones(3)

    def rebind_cell(value: np.ndarray) -> None:
        nonlocal cell
        cell = value

    yield "a closure cell", lambda x: x * cell, rebind_cell
    m = Model()
    yield "an attribute", lambda x: m.forward(x), lambda value: setattr(m, "w", value)
    params = {"w": np.ones(3), "b": [np.zeros(3)]}
    yield "an item", lambda x: x * params["w"] + params["b"][0], lambda value: params.update(w=value)
    nested = {"w": np.ones(3), "b": [np.zeros(3)]}
    yield (
        "a nested item",
        lambda x: x * nested["w"] + nested["b"][0],
        lambda value: nested["b"].__setitem__(0, value),
    )
    norm = nn.LayerNorm(3, dtype=np.float64)

    def rebind_norm(value: np.ndarray) -> None:
        nonlocal norm
        norm = norm.replace(weight=value, bias=value + 1)

    yield "a module", lambda x: norm(x), rebind_norm


REBINDINGS = {name: (fn, change) for name, fn, change in _rebindings()}


@pytest.mark.parametrize("name", REBINDINGS)
def test_another_array_of_the_same_type_needs_no_retrace(name: str) -> None:
    fn, rebind = REBINDINGS[name]
    f = tj.trace(fn)
    for i in range(6):
        np.testing.assert_allclose(f(X), fn(X), rtol=1e-12)
        np.testing.assert_allclose(f(X + 1), fn(X + 1), rtol=1e-12)
        rebind(np.array([1.0, 2.0, 3.0]) * i)
    assert f.cache_info().misses == 1


def test_an_array_of_another_type_or_known_by_two_names_does() -> None:
    part, other = Part(), Part()
    part.gain = other.gain = np.ones(3)  # type: ignore[assignment]
    f = tj.trace(lambda x: x * part.gain + other.gain)
    np.testing.assert_array_equal(f(X), X + 1)
    part.gain = np.full(3, 2.0)  # type: ignore[assignment]
    np.testing.assert_array_equal(f(X), X * 2 + 1)
    part.gain = np.full(3, 3.0)  # type: ignore[assignment]
    np.testing.assert_array_equal(f(X), X * 3 + 1)
    assert f.cache_info().misses == 2
    part.gain = np.full(1, 4.0)  # type: ignore[assignment]
    np.testing.assert_array_equal(f(X), X * 4 + 1)
    part.gain = np.full(3, 5.0, ">f8")  # type: ignore[assignment]
    np.testing.assert_array_equal(f(X), X * 5 + 1)
    part.gain = 6.0
    np.testing.assert_array_equal(f(X), X * 6 + 1)


def test_a_rebound_array_whose_values_were_used_while_tracing_retraces() -> None:
    part = Part()
    part.gain = np.ones(3)  # type: ignore[assignment]
    f = tj.trace(lambda x: x * part.gain if part.gain[0] > 0 else x)  # type: ignore[index]
    np.testing.assert_array_equal(f(X), X)
    for value in (2.0, -1.0, 3.0):
        part.gain = np.full(3, value)  # type: ignore[assignment]
        np.testing.assert_array_equal(f(X), X * value if value > 0 else X)


def test_the_same_through_an_item() -> None:
    params = {"w": np.ones(3), "b": np.ones(3)}
    f = tj.trace(lambda x: x * params["w"] if params["w"][0] > 0 else x + params["b"])
    for value in (2.0, -1.0, 3.0):
        params["w"] = np.full(3, value)
        np.testing.assert_array_equal(f(X), X * value if value > 0 else X + 1)
        params["w"][0] *= -1  # in place
        np.testing.assert_array_equal(f(X), X * params["w"] if value < 0 else X + 1)


def test_a_plain_python_model_trains_without_a_retrace() -> None:
    """Weights are attributes of two layers and of a list of layers; a step rebinds them all."""

    class Layer:
        def __init__(self, seed: int) -> None:
            self.w = np.random.default_rng(seed).normal(size=(3, 3))
            self.b = np.zeros(3)

    class Net:
        def __init__(self) -> None:
            self.first, self.last = Layer(0), Layer(1)
            self.middle = [Layer(2), Layer(3)]

        def __call__(self, x: Any) -> Any:
            x = np.tanh(x @ self.first.w + self.first.b)
            for layer in self.middle:
                x = np.tanh(x @ layer.w + layer.b)
            return x @ self.last.w + self.last.b

    net = Net()
    f = tj.trace(lambda x: net(x))
    for _ in range(5):
        np.testing.assert_allclose(f(X), net(X), rtol=1e-10)
        for layer in (net.first, net.last, *net.middle):
            layer.w, layer.b = layer.w * 0.9, layer.b + 1
    assert f.cache_info().misses == 1


def test_changes_deep_inside_containers_take_effect() -> None:
    settings = {"a": [1.0, {"b": (2.0, [3.0])}], "module": [nn.LayerNorm(3, dtype=np.float64)], "none": None}
    f = tj.trace(lambda x: settings["module"][0](x) * settings["a"][1]["b"][1][0] + settings["a"][0])  # type: ignore[index]

    def plain(x: Any) -> Any:
        return settings["module"][0](x) * settings["a"][1]["b"][1][0] + settings["a"][0]  # type: ignore[index]

    changes: list[Callable[[], Any]] = [
        lambda: None,
        lambda: settings["a"][1]["b"][1].__setitem__(0, 5.0),  # type: ignore[index]
        lambda: settings["a"].__setitem__(0, 4),  # type: ignore[index]
        lambda: settings["a"].__setitem__(0, 4.0),  # type: ignore[index]
        lambda: settings["module"].__setitem__(0, nn.LayerNorm(3, eps=1.0, dtype=np.float64)),  # type: ignore[index]
        lambda: settings["module"][0].weight.__setitem__(0, 9.0),  # type: ignore[index]
        lambda: settings.update(a=[0.5, {"b": (2.0, [7.0])}]),
    ]
    for change in changes:
        change()
        for _ in range(2):
            np.testing.assert_allclose(f(X), plain(X), rtol=1e-12)
            assert f(X).dtype == np.float64
