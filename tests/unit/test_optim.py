"""Optimisers, schedules and clipping: trees of any kind, dtypes, no retrace, bad input (formulas:
tests/oracle).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import optree
import pytest

import tracejit as tj
from tracejit import nn, optim


@pytest.fixture(autouse=True)
def reference_backend() -> Iterator[None]:
    """These tests are about nn, not about devices: they run on the oracle of all backends."""
    with tj.device("numpy"):
        yield


OPTIMISERS = {
    "sgd": lambda rate=0.1: optim.sgd(rate),
    "momentum": lambda rate=0.1: optim.momentum(rate),
    "nesterov": lambda rate=0.1: optim.nesterov(rate, weight_decay=0.01),
    "rmsprop": lambda rate=0.1: optim.rmsprop(rate, momentum=0.5),
    "adam": lambda rate=0.1: optim.adam(rate, weight_decay=0.01),
    "adamw": lambda rate=0.1: optim.adamw(rate),
    "chained": lambda rate=0.1: optim.chain(
        optim.clip_by_global_norm(1.0), optim.clip_by_value(0.5), optim.adamw(rate)
    ),
}
each_optimiser = pytest.mark.parametrize("make", OPTIMISERS.values(), ids=OPTIMISERS)


@each_optimiser
def test_minimises_a_quadratic_in_traced_code(make: Any) -> None:
    opt = make(0.05)
    target = np.array([1.0, -2.0, 3.0])

    @tj.trace
    def step(params: Any, state: Any) -> Any:
        grads = tj.grad(lambda p: np.sum((p["w"] - target) ** 2))(params)
        return opt.update(params, grads, state)

    params = {"w": np.zeros(3)}
    state = opt.init(params)
    for _ in range(400):
        params, state = step(params, state)
    np.testing.assert_allclose(params["w"], target, atol=0.1)
    assert int(state.step) == 400
    assert step.cache_info().misses == 1  # the step counter and the state never retrace


@each_optimiser
def test_arrays_and_traced_code_agree(make: Any) -> None:
    opt = make()
    model = nn.Linear(3, 2, rng=np.random.default_rng(0))
    grads = optree.tree_map(lambda w: np.sin(w * 100), model)
    state = opt.init(model)
    by_hand, traced = opt.update(model, grads, state), tj.trace(opt.update)(model, grads, state)
    assert optree.tree_structure(by_hand) == optree.tree_structure(traced)
    for a, b in zip(optree.tree_leaves(by_hand), optree.tree_leaves(traced), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-6)
        assert a.dtype == b.dtype


@each_optimiser
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_weights_and_state_keep_dtype_and_kind(make: Any, dtype: str) -> None:
    opt = make(optim.warmup_cosine(0.1, 2, 10))
    params = [np.ones(3, dtype), np.ones((), dtype)]
    state = opt.init(params)
    moved, after = opt.update(params, [np.full(3, 0.5, dtype), np.ones((), dtype)], state)
    for a, b in zip(optree.tree_leaves((params, state)), optree.tree_leaves((moved, after)), strict=True):
        assert isinstance(b, np.ndarray)
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
    assert (moved[0] < 1).all()


def test_float16_weights_have_float32_moments() -> None:
    """Squared gradients of 1e-4 are 1e-8, which float16 cannot hold."""
    opt = optim.adam(0.1)
    params = {"w": np.ones(2, np.float16)}
    params, state = opt.update(params, {"w": np.full(2, 1e-4, np.float16)}, opt.init(params))
    assert state.slots[0]["v"]["w"].dtype == np.float32
    np.testing.assert_allclose(params["w"], 0.9, rtol=1e-2)


def test_leaves_that_are_no_weights_are_untouched() -> None:
    opt = optim.adamw(0.1)
    tree = {
        "w": np.ones(2),
        "count": np.arange(3),
        "flag": True,
        "name": "x",
        "fn": nn.relu,
        "none": None,
        "n": 3,
    }
    grads = {
        "w": np.ones(2),
        "count": np.zeros(3, int),
        "flag": False,
        "name": None,
        "fn": None,
        "none": None,
        "n": 0,
    }
    new, state = opt.update(tree, grads, opt.init(tree))
    assert all(new[k] is tree[k] for k in ("count", "flag", "name", "fn", "none", "n"))
    assert (new["w"] < 1).all()
    assert list(state.slots[0]["m"]) == ["w"]


def test_python_floats_are_weights() -> None:
    opt = optim.sgd(0.1)
    params: Any = {"w": 2.0}
    state = opt.init(params)
    step = tj.trace(lambda p, s: opt.update(p, tj.grad(lambda p: p["w"] ** 2)(p), s))
    for _ in range(50):
        params, state = step(params, state)
    assert abs(float(params["w"])) < 1e-3


def test_nothing_is_changed_in_place() -> None:
    opt = optim.adam(0.1)
    params, grads = {"w": np.ones(2)}, {"w": np.ones(2)}
    state = opt.init(params)
    opt.update(params, grads, state)
    assert (params["w"] == 1).all()
    assert (state.slots[0]["m"]["w"] == 0).all()
    assert int(state.step) == 0


def test_adam_bias_correction_is_exact_in_float32() -> None:
    """The first step of Adam moves every weight by the learning rate, whatever the gradient."""
    opt = optim.adam(1e-3, eps=0.0)
    grads = np.float32([1e-3, 1.0, 1e3])
    params, _ = opt.update(np.zeros(3, np.float32), grads, opt.init(np.zeros(3, np.float32)))
    np.testing.assert_allclose(params, -1e-3, rtol=3e-7)


# -- learning rates ------------------------------------------------------------------------------------------


def test_learning_rate_may_be_a_traced_scalar() -> None:
    @tj.trace
    def step(w: Any, rate: Any) -> Any:
        opt = optim.sgd(rate)
        return opt.update(w, w, opt.init(w))[0]

    w = np.ones(2, np.float32)
    for rate in (0.1, 0.5, np.float32(0.25)):
        moved = step(w, rate)
        np.testing.assert_allclose(moved, 1 - float(rate), rtol=1e-6)
        assert moved.dtype == np.float32
    assert step.cache_info().misses <= 2  # a Python float and a float32 are two types; values never retrace


def test_numpy_scalar_rates_do_not_promote_float32() -> None:
    moved, _ = optim.sgd(np.float64(0.1)).update(
        np.ones(2, np.float32), np.ones(2, np.float32), optim.sgd(0.1).init(np.ones(2))
    )
    assert moved.dtype == np.float32


def test_schedules_follow_their_formulas() -> None:
    steps = np.arange(12)
    np.testing.assert_allclose([optim.constant(0.3)(s) for s in steps], 0.3)
    np.testing.assert_allclose(
        [optim.linear_warmup(1.0, 4)(s) for s in steps], np.minimum((steps + 1) / 4, 1), rtol=1e-6
    )
    expected = [0.1 + 0.9 * (1 + math.cos(math.pi * min(s / 10, 1))) / 2 for s in steps]
    np.testing.assert_allclose([optim.cosine(1.0, 10, final=0.1)(s) for s in steps], expected, rtol=1e-5)
    both = [float(optim.warmup_cosine(1.0, 2, 10)(s)) for s in steps]
    np.testing.assert_allclose(both[:3], [0.5, 1.0, 1.0])
    np.testing.assert_allclose(both[6], 0.5, atol=1e-6)
    np.testing.assert_allclose(both[10:], 0, atol=1e-6)
    assert (np.diff(both[1:]) <= 0).all()


def test_schedules_are_inside_the_trace() -> None:
    opt = optim.sgd(optim.linear_warmup(1.0, 4))
    step = tj.trace(lambda w, s: opt.update(w, np.ones_like(w), s))
    w: Any = np.zeros(1, np.float32)
    state: Any = opt.init(w)
    positions = []
    for _ in range(6):
        w, state = step(w, state)
        positions.append(float(w[0]))
    np.testing.assert_allclose(np.diff([0, *positions]), [-0.25, -0.5, -0.75, -1, -1, -1], rtol=1e-6)
    assert step.cache_info().misses == 1


# -- clipping ------------------------------------------------------------------------------------------------


def test_clip_by_global_norm_leaves_small_gradients_exactly_alone() -> None:
    grads = {"a": np.float32([0.3, 0.1]), "b": np.float32([[0.2]])}
    clipped = optim.clip_by_global_norm(1.0)(grads)
    np.testing.assert_array_equal(clipped["a"], grads["a"])
    np.testing.assert_array_equal(optim.clip_by_global_norm(1.0)(np.zeros(3)), 0)
    big = optim.clip_by_global_norm(1.0)({"a": np.float32([3.0]), "b": np.float32([4.0])})
    np.testing.assert_allclose([big["a"][0], big["b"][0]], [0.6, 0.8], rtol=1e-6)
    assert big["a"].dtype == np.float32


def test_global_norm_of_float16_does_not_overflow() -> None:
    np.testing.assert_allclose(optim.global_norm([np.full(4, 1e4, np.float16)]), 2e4, rtol=1e-3)
    assert optim.global_norm({"n": 3}) == 0


def test_clip_by_value() -> None:
    np.testing.assert_array_equal(
        optim.clip_by_value(0.5)([np.float32([-2, 0.1, 2])])[0], np.float32([-0.5, 0.1, 0.5])
    )


def test_chain_applies_in_order() -> None:
    opt = optim.chain(optim.clip_by_value(1.0), optim.clip_by_global_norm(1.0), optim.sgd(1.0))
    moved, _ = opt.update(np.zeros(4), np.full(4, 100.0), opt.init(np.zeros(4)))
    np.testing.assert_allclose(moved, -0.5)
    with pytest.raises(TypeError, match="then one optimiser, in this order"):
        optim.chain(optim.sgd(1.0), optim.clip_by_value(1.0))
    with pytest.raises(TypeError, match="chain takes transforms"):
        optim.chain()


# -- bad input -----------------------------------------------------------------------------------------------


def test_gradients_that_do_not_fit_are_named() -> None:
    opt = optim.sgd(0.1)
    params = {"layer": {"w": np.ones((2, 3))}}
    state = opt.init(params)
    with pytest.raises(
        tj.ShapeError, match=r"gradient of 'layer.w' does not fit.*weight: f64\[2,3\], gradient: f64\[3,2\]"
    ):
        opt.update(params, {"layer": {"w": np.ones((3, 2))}}, state)
    with pytest.raises(tj.ShapeError, match="another tree structure"):
        opt.update(params, {"layer": {"v": np.ones((2, 3))}}, state)


def test_states_of_something_else_are_refused() -> None:
    a, b = {"a": np.ones(2)}, {"b": np.ones(2)}
    with pytest.raises(tj.TraceError, match=r"another model: they differ at '[ab]'.*opt\.init\(model\)"):
        optim.adam().update(a, a, optim.adam().init(b))
    with pytest.raises(tj.TraceError, match="made by another optimiser"):
        optim.adam().update(a, a, optim.sgd(0.1).init(a))
    with pytest.raises(tj.TraceError, match="made by another optimiser"):
        optim.adam().update(a, a, optim.rmsprop(0.1).init(a))


@pytest.mark.parametrize(
    "make",
    [
        lambda: optim.sgd(-0.1),
        lambda: optim.sgd(0.1, momentum=1.5),
        lambda: optim.sgd(0.1, nesterov=True),
        lambda: optim.adam(betas=(0.9, 1.0)),
        lambda: optim.adamw(eps=-1.0),
        lambda: optim.rmsprop(0.1, alpha=2.0),
        lambda: optim.clip_by_global_norm(-1.0),
        lambda: optim.cosine(0.1, 0),
        lambda: optim.linear_warmup(0.1, True),
        lambda: optim.warmup_cosine(0.1, 10, 10),
    ],
)
def test_impossible_settings(make: Any) -> None:
    with pytest.raises(ValueError):
        make()


def test_rates_that_are_not_scalars() -> None:
    with pytest.raises(tj.ShapeError, match="learning rate must be a scalar"):
        optim.sgd(np.ones(2)).update(np.ones(2), np.ones(2), optim.sgd(0.1).init(np.ones(2)))


def test_every_node_of_the_update_is_in_the_scope_optimizer() -> None:
    opt = OPTIMISERS["chained"](optim.cosine(0.1, 10))
    w = np.ones(3, np.float32)
    graph = tj.trace(opt.update).graph(w, w, opt.init(w))
    assert {node.scope.split("/")[0] for node in graph.nodes if node.op.name not in ("input", "const")} == {
        "optimizer"
    }
