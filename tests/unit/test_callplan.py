"""The generated fast path of a call: it accepts exactly what its cache entry was made for and gives optree's leaves."""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import Any, NamedTuple

import numpy as np
import optree
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tracejit as tj
from tracejit import nn
from tracejit.callplan import builder, reader
from tracejit.trees import NAMESPACE

X = np.arange(6, dtype=np.float32).reshape(2, 3)


class Pair(NamedTuple):
    w: Any
    b: Any


def linear(seed: int, n: int = 2) -> nn.Linear:
    return nn.Linear(3, n, rng=np.random.default_rng(seed))


LEAVES = st.sampled_from([X, X[0], np.zeros((0, 2)), np.array(3.0), 1, 2.5, True, False, "a", "it's"])
TREES = st.recursive(
    st.one_of(LEAVES, st.none()),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.text("abc'\"\\\n", max_size=3), inner, max_size=3),
        st.dictionaries(st.integers(-3, 3), inner, max_size=3),
        st.tuples(inner, inner).map(lambda t: Pair(*t)),
    ),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(st.lists(TREES, max_size=3), st.dictionaries(st.sampled_from(["x", "y", "z"]), TREES, max_size=2))
def test_a_reader_gives_the_leaves_in_optrees_order(args: list[Any], kwargs: dict[str, Any]) -> None:
    read = reader(tuple(args), kwargs)
    assert read is not None
    expected = optree.tree_leaves((tuple(args), kwargs), namespace=NAMESPACE)
    found = read(tuple(args), kwargs)
    assert found is not None and len(found) == len(expected)
    assert all(a is b for a, b in zip(found, expected))
    # One argument more is another structure.
    assert read((*args, X), kwargs) is None


@settings(max_examples=150, deadline=None)
@given(TREES, TREES)
def test_a_reader_accepts_what_has_the_same_signature_and_nothing_else(a: Any, b: Any) -> None:
    def signature(tree: Any) -> Any:
        leaves, spec = optree.tree_flatten(tree, namespace=NAMESPACE)
        parts = [
            (v.dtype, v.shape)
            if isinstance(v, np.ndarray)
            else (type(v), v if type(v) in (bool, str) else None)
            for v in leaves
        ]
        return spec, parts

    read = reader((a,), {})
    assert read is not None
    assert (read((b,), {}) is not None) == (signature(a) == signature(b))


DIFFERENT = {
    "dtype": ([X], [X.astype(np.float64)]),
    "byte order": ([X], [X.astype(">f4")]),
    "shape": ([X], [X.T]),
    "scalar for array": ([X], [1.0]),
    "numpy scalar": ([np.zeros(())], [np.float64(0)]),
    "int for float": ([1.0], [1]),
    "bool for int": ([1], [True]),
    "None for array": ([X], [None]),
    "array for None": ([None], [X]),
    "list for tuple": ([[X]], [(X,)]),
    "named tuple for tuple": ([(X, X)], [Pair(X, X)]),
    "longer list": ([[X]], [[X, X]]),
    "empty list": ([[X]], [[]]),
    "array for a list": ([[X, X]], [X]),
    "another key": ([{"a": X}], [{"b": X}]),
    "one key more": ([{"a": X}], [{"a": X, "b": X}]),
    "string": (["a"], ["b"]),
    "module for list": ([linear(0)], [[X, X]]),
    "static field": ([nn.LayerNorm(3, eps=1e-5)], [nn.LayerNorm(3, eps=1e-3)]),
    "module without bias": ([linear(0)], [nn.Linear(3, 2, bias=False, rng=np.random.default_rng(0))]),
    "subclass of array": ([X], [np.ma.masked_array(X)]),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_anything_else_is_left_to_the_general_path(name: str) -> None:
    same, other = DIFFERENT[name]
    read = reader(tuple(same), {})
    assert read is not None
    assert read(tuple(same), {}) is not None
    assert read(tuple(other), {}) is None
    assert read(tuple(same), {"device": "cpu"}) is None


@pytest.mark.parametrize("value", [OrderedDict(a=X), deque([X]), len, {1.5: X}])
def test_unusual_containers_and_leaves_have_no_reader(value: Any) -> None:
    assert reader((value,), {}) is None
    f = tj.trace(lambda v: v)
    for _ in range(5):
        f(value)
    assert f.cache_info()[:2] == (4, 1)


@settings(max_examples=100, deadline=None)
@given(TREES)
def test_a_builder_rebuilds_any_result(tree: Any) -> None:
    leaves, spec = optree.tree_flatten(tree, namespace=NAMESPACE)
    build = builder(spec, [("out", i) for i in range(len(leaves))], ())
    assert build is not None
    again, new_spec = optree.tree_flatten(build(leaves), namespace=NAMESPACE)
    assert new_spec == spec and all(a is b for a, b in zip(again, leaves))


def test_a_builder_keeps_constants_scalars_modules_and_the_order_of_keys() -> None:
    tree = {"z": linear(0), "a": [None, np.zeros(()), "text"]}
    leaves, spec = optree.tree_flatten(tree, namespace=NAMESPACE)
    text = leaves.index("text")
    scalar = next(i for i, v in enumerate(leaves) if np.shape(v) == () and i != text)
    sources = [("const", v) if i == text else ("out", i) for i, v in enumerate(leaves)]
    built = builder(spec, sources, [scalar])(leaves)
    assert list(built) == ["z", "a"] and built["a"][0] is None and built["a"][2] == "text"
    assert type(built["a"][1]) is np.float64
    assert type(built["z"]) is nn.Linear
    assert built["z"].weight is tree["z"].weight  # type: ignore[attr-defined]
    np.testing.assert_array_equal(built["z"](X), tree["z"](X))  # type: ignore[operator]


# -- the whole call --------------------------------------------------------------------------------------------------


def test_calls_alternate_between_signatures_devices_and_keywords() -> None:
    @tj.trace
    def f(tree: Any, x: Any, *, scale: Any = 1.0) -> Any:
        return {"y": tree["w"] * x * scale, "n": len(tree)}

    calls = [
        (({"w": X}, X), {}, X * X),
        (({"w": X}, X), {"device": "numpy"}, X * X),
        (({"w": X}, X), {"scale": 2.0}, X * X * 2),
        (({"w": X, "v": X}, X), {"scale": X}, X * X * X),
        (({"w": X[0]}, X[1]), {"device": None, "watch": False}, X[0] * X[1]),
        (({"w": X}, 3), {}, X * 3),
        (({"w": X}, True), {}, X),
    ]
    for _ in range(6):
        for args, kwargs, want in calls:
            got = f(*args, **kwargs)
            np.testing.assert_array_equal(got["y"], want)
            assert got["n"] == len(args[0])
    info = f.cache_info()
    assert info.misses == len(calls) and info.hits == 5 * len(calls)


def test_each_way_to_choose_a_device_has_a_fast_path(monkeypatch: pytest.MonkeyPatch) -> None:
    f = tj.trace(lambda x, scale=1.0: x * scale)
    general = 0
    slow = type(f)._general

    def count(*args: Any, **kwargs: Any) -> Any:
        nonlocal general
        general += 1
        return slow(*args, **kwargs)

    monkeypatch.setattr(type(f), "_general", count)
    for _ in range(6):
        np.testing.assert_array_equal(f(X), X)
        np.testing.assert_array_equal(f(X, device="numpy"), X)
        np.testing.assert_array_equal(f(X, scale=2.0), X * 2)
        with tj.device("numpy"):
            np.testing.assert_array_equal(f(X), X)
            np.testing.assert_array_equal(f(X, device="cpu"), X)
    assert f.cache_info().misses == 3
    before = general
    test = (lambda: f(X), lambda: f(X, device="numpy"), lambda: f(X, scale=2.0))
    for call in test:
        call()
    with tj.device("numpy"):
        f(X)
        f(X, device="cpu")
    assert general == before
    with tj.disable_jit():
        f(X)
    assert general == before + 1


def test_eviction_and_clearing_drop_the_fast_path_too() -> None:
    f = tj.trace(lambda x: x + 1, cache_size=2)
    for n in (1, 2, 3, 1, 2, 3):
        for _ in range(5):
            np.testing.assert_array_equal(f(np.zeros(n)), np.ones(n))
    assert f.cache_info().currsize == 2
    f.cache_clear()
    f(np.zeros(3))
    assert f.cache_info()[:2] == (0, 1)


def test_a_wrong_number_of_arguments_is_still_pythons_error() -> None:
    f = tj.trace(lambda x, y: x + y)
    for _ in range(5):
        f(X, X)
    for args in ((X,), (X, X, X), ()):
        with pytest.raises(TypeError, match="positional argument"):
            f(*args)
