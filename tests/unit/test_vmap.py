"""``tj.vmap``: every op's batching rule against a loop, axes as in JAX, and life together with grad, control flow, trees."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest

import tracejit as tj
from tracejit import nn
from tracejit.batching import rule_for
from tracejit.ops import registry

B = 3
X = np.arange(12.0).reshape(4, 3) / 7 - 0.6
W = np.arange(15.0).reshape(3, 5) / 11 - 0.5


def loop(fn: Callable[..., Any], *columns: Any) -> Any:
    """The meaning of vmap over axis 0: call for each example, stack."""
    return np.stack([np.asarray(fn(*row)) for row in zip(*columns, strict=True)])


# -- every op ---------------------------------------------------------------------------------------------------------

OPS = [op for op in registry.all_ops() if op.arity != 0 and op.name != "proj"]
# Their results are tuples, read through proj, or they print: they have tests of their own below.
SPECIAL = {"cond", "while_loop", "scan", "custom_vjp", "print"}


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_every_op_has_a_batching_rule(op: registry.Op) -> None:
    assert callable(rule_for(op))


def test_an_op_without_a_rule_is_refused_by_name() -> None:
    op = registry.get("input")
    with pytest.raises(tj.UnsupportedFunctionError, match="input has no batching rule"):
        rule_for(op)


def variants(array: np.ndarray, count: int) -> np.ndarray:
    """Different arrays that are as valid as ``array``: its elements rolled (and kept as they are the first time)."""
    return np.stack([np.roll(array, k).reshape(array.shape) for k in range(count)])


@pytest.mark.parametrize("op", [o for o in OPS if o.name not in SPECIAL], ids=lambda op: op.name)
def test_the_rule_of_every_op_agrees_with_a_loop(op: registry.Op) -> None:
    samples = op.samples()
    if op.elementwise:  # they share one rule, whatever the dtype
        samples = [s for s in samples if s[0][0].shape == (3, 4)][:1] or samples[:1]
    for arrays, attrs in samples:
        for mapped in itertools.product((True, False), repeat=len(arrays)):
            if not any(mapped):
                continue
            operands = [
                variants(a, B) if m else np.asarray(a) for a, m in zip(map(np.asarray, arrays), mapped)
            ]
            axes = tuple(0 if m else None for m in mapped)
            found = tj.vmap(lambda *xs, attrs=attrs: op(*xs, **attrs), in_axes=axes)
            with tj.device("numpy"):
                got = found(*operands)
            expected = np.stack(
                [
                    np.asarray(op.reference(*(x[k] if m else x for x, m in zip(operands, mapped)), **attrs))
                    for k in range(B)
                ]
            )
            assert got.dtype == expected.dtype
            exact = expected.dtype.kind != "f"
            np.testing.assert_allclose(
                got, expected, rtol=0 if exact else 1e-3 if expected.dtype == np.float16 else 1e-5, atol=1e-6
            )


# -- axes --------------------------------------------------------------------------------------------------------------


def test_an_int_maps_every_argument() -> None:
    np.testing.assert_allclose(tj.vmap(lambda a, b: a @ b)(X, X + 1), loop(lambda a, b: a @ b, X, X + 1))


def test_the_function_sees_one_example() -> None:
    seen = []

    def f(x: Any) -> Any:
        seen.append((x.shape, x.dtype, x.ndim, len(x)))
        return x

    tj.vmap(f, in_axes=1)(X)
    assert seen == [((4,), np.float64, 1, 4)]


def test_none_shares_an_argument() -> None:
    got = tj.vmap(lambda x, w: np.tanh(x @ w), in_axes=(0, None))(X, W)
    np.testing.assert_allclose(got, np.tanh(X @ W))


@pytest.mark.parametrize("axis", [0, 1, 2, -1, -2, -3])
def test_any_axis_may_be_mapped_and_put_anywhere(axis: int) -> None:
    x = np.arange(24.0).reshape(2, 3, 4)
    doubled = tj.vmap(lambda v: v * 2, in_axes=axis, out_axes=axis)(x)
    np.testing.assert_array_equal(doubled, x * 2)
    first = tj.vmap(lambda v: v * 2, in_axes=axis)(x)
    np.testing.assert_array_equal(first, np.moveaxis(x * 2, axis, 0))
    moved = tj.vmap(lambda v: v * 2, out_axes=axis)(x)
    np.testing.assert_array_equal(moved, np.moveaxis(x * 2, 0, axis))


class Pair(NamedTuple):
    left: Any
    right: Any


def test_axes_may_be_trees_and_prefixes_of_trees() -> None:
    params = {"w": W, "b": np.stack([np.arange(5.0)] * 4, 1), "list": [X, X + 1]}

    def f(p: Any, x: Any) -> Any:
        return {"y": x @ p["w"] + p["b"], "pair": Pair(p["list"][0] + x, p["list"][1].sum())}

    axes = ({"w": None, "b": 1, "list": 0}, 0)
    got = tj.vmap(f, in_axes=axes, out_axes={"y": 1, "pair": Pair(0, 0)})(params, X)
    np.testing.assert_allclose(got["y"], (X @ W + params["b"].T).T)
    np.testing.assert_allclose(got["pair"].left, X + X)
    np.testing.assert_allclose(got["pair"].right, (X + 1).sum(1))
    assert type(got["pair"]) is Pair


def test_a_list_of_axes_counts_as_a_tuple() -> None:
    np.testing.assert_allclose(tj.vmap(lambda x, w: x @ w, in_axes=[0, None])(X, W), X @ W)


def test_keyword_arguments_are_mapped_over_axis_0() -> None:
    got = tj.vmap(lambda x, *, scale: x * scale, in_axes=1)(X, scale=np.arange(3.0))
    np.testing.assert_allclose(got, (X * np.arange(3.0)).T)


def test_none_inside_an_argument_is_no_leaf() -> None:
    got = tj.vmap(lambda p, x: x if p["bias"] is None else 0, in_axes=(None, 0))({"bias": None}, X)
    np.testing.assert_allclose(got, X)
    got = tj.vmap(lambda p: p["x"] * 2)({"x": X, "bias": None})
    np.testing.assert_allclose(got, X * 2)


def test_results_that_are_the_same_for_all_are_repeated_or_left_alone() -> None:
    def f(x: Any, w: Any) -> Any:
        return x.sum(), w * 2, 7.0, np.ones(2)

    total, shared, number, constant = tj.vmap(f, in_axes=(0, None))(X, W)
    assert total.shape == (4,) and shared.shape == (4, 3, 5)
    np.testing.assert_array_equal(number, np.full(4, 7.0))
    np.testing.assert_array_equal(constant, np.ones((4, 2)))
    total, shared, number, constant = tj.vmap(f, in_axes=(0, None), out_axes=(0, None, None, None))(X, W)
    np.testing.assert_array_equal(shared, W * 2)
    assert number == 7.0 and constant.shape == (2,)


def test_unmapped_arguments_keep_python_values() -> None:
    def f(x: Any, n: int, mode: str) -> Any:
        for _ in range(n):
            x = x * 2 if mode == "double" else x + 1
        return x

    np.testing.assert_array_equal(tj.vmap(f, in_axes=(0, None, None))(X, 3, "double"), X * 8)
    np.testing.assert_array_equal(tj.vmap(f, in_axes=(0, None, None))(X, 2, "add"), X + 2)


def test_dtypes_follow_one_example_as_numpy_scalars_do() -> None:
    x = np.arange(4, dtype=np.float32)
    assert tj.vmap(lambda v: v * 2.5)(x).dtype == np.float32
    assert tj.vmap(lambda v: v * np.float64(2.5))(x).dtype == np.float64


# -- misuse ------------------------------------------------------------------------------------------------------------


def test_sizes_that_differ_name_the_arguments() -> None:
    with pytest.raises(tj.ShapeError, match=r"axis 0 of a has 4, axis 1 of b\['w'\] has 5") as caught:
        tj.vmap(lambda a, b: a, in_axes=(0, 1))(X, {"w": W})
    assert "test_vmap.py" in str(caught.value)


def test_scalars_and_strings_cannot_be_mapped() -> None:
    with pytest.raises(tj.ShapeError, match=r"scale has no axis 0 to map over.*None in in_axes"):
        tj.vmap(lambda x, scale: x * scale)(X, 2.0)
    with pytest.raises(tj.ShapeError, match="mode has no axis 0"):
        tj.vmap(lambda x, mode: x)(X, "fast")


def test_axes_out_of_range_are_refused() -> None:
    with pytest.raises(tj.ShapeError, match="in_axes maps axis 2 of x, which has 2 axes"):
        tj.vmap(lambda x: x, in_axes=2)(X)
    with pytest.raises(tj.ShapeError, match="in_axes maps axis -3 of x"):
        tj.vmap(lambda x: x, in_axes=-3)(X)
    with pytest.raises(tj.ShapeError, match="out_axes puts axis 1 into result, which has 1 axes"):
        tj.vmap(lambda x: x.sum(), out_axes=1)(X)


def test_something_must_be_mapped() -> None:
    with pytest.raises(tj.TracingError, match="nothing to map"):
        tj.vmap(lambda x: x, in_axes=None)(X)
    with pytest.raises(tj.TracingError, match="nothing to map"):
        tj.vmap(lambda: 1.0)()


def test_in_axes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(tj.ShapeError, match="in_axes has 1 entries, but f was called with 2"):

        def f(a: Any, b: Any) -> Any:
            return a

        tj.vmap(f, in_axes=(0,))(X, X)
    with pytest.raises(tj.ShapeError, match="in_axes does not fit the structure"):
        tj.vmap(lambda p: p["a"], in_axes=({"b": 0},))({"a": X})
    with pytest.raises(tj.ShapeError, match="out_axes does not fit the structure of what"):
        tj.vmap(lambda x: (x, x), out_axes=(0, 0, 0))(X)
    for wrong in ("0", 1.5, True, {"x": 0}):
        with pytest.raises(tj.TracingError, match="in_axes"):
            tj.vmap(lambda x: x, in_axes=wrong)
    with pytest.raises(tj.TracingError, match="out_axes consists of ints and None"):
        tj.vmap(lambda x: x, out_axes=(0, "1"))
    with pytest.raises(tj.TracingError, match="vmap takes a function, got int"):
        tj.vmap(3)  # type: ignore[arg-type]


def test_a_mapped_result_needs_an_axis() -> None:
    with pytest.raises(tj.ShapeError, match=r"out_axes is None for result\['y'\], which differs"):
        tj.vmap(lambda x: {"y": x}, out_axes=None)(X)
    with pytest.raises(tj.TracingError, match=r"result\[1\] is no array but a str"):
        tj.vmap(lambda x: (x, "text"))(X)


def test_python_control_flow_on_an_example_is_explained() -> None:
    with pytest.raises(tj.ConcretizationError, match="Python needs the bool"):
        tj.vmap(lambda x: x if x.sum() > 0 else -x)(X)


# -- inside traces, caching, closures ----------------------------------------------------------------------------------


def test_inside_a_trace_closures_over_outer_values_are_shared() -> None:
    @tj.trace
    def f(x: Any, w: Any, bias: Any) -> Any:
        scaled = w * 2
        return tj.vmap(lambda row: np.tanh(row @ scaled) + bias + TABLE[:5])(x)

    np.testing.assert_allclose(f(X, W, 0.5), np.tanh(X @ (W * 2)) + 0.5 + TABLE[:5])


TABLE = np.arange(8.0)


def test_shared_values_are_computed_once() -> None:
    graph = tj.vmap(lambda x, w: x + np.exp(w), in_axes=(0, None)).graph(np.ones((7, 5)), np.ones(5))
    (node,) = [n for n in graph.nodes if n.op.name == "exp"]
    assert node.shape == (5,)


def test_a_shared_matrix_makes_one_product() -> None:
    graph = tj.vmap(lambda x, w: x @ w, in_axes=(0, None)).graph(X, W)
    assert [n.op.name for n in graph.nodes] == ["input", "input", "dot_general"]


def test_calls_from_outside_are_cached_and_read_captured_arrays_anew() -> None:
    weights = W.copy()
    traces = []

    def f(x: Any) -> Any:
        traces.append(1)
        return x @ weights

    mapped = tj.vmap(f)
    np.testing.assert_allclose(mapped(X), X @ W)
    weights *= 2
    np.testing.assert_allclose(mapped(X + 1), (X + 1) @ (2 * W))
    assert len(traces) == 1
    mapped(X[:2])
    assert len(traces) == 2


def test_methods_and_modules_can_be_mapped(rng: np.random.Generator) -> None:
    layer = nn.Linear(3, 5, rng=rng)
    x = X.astype(np.float32)
    expected = loop(layer, x)
    np.testing.assert_allclose(tj.vmap(layer)(x), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        tj.vmap(lambda m, v: m(v), (None, 0))(layer, x), expected, rtol=1e-5, atol=1e-6
    )


def test_without_the_jit_it_is_a_loop() -> None:
    with tj.disable_jit():
        got = tj.vmap(lambda x, w: {"y": x @ w, "n": 1}, (0, None), {"y": 1, "n": None})(X, W)
    np.testing.assert_allclose(got["y"], (X @ W).T)
    assert got["n"] == 1


def test_nodes_keep_the_line_and_scope_of_the_function() -> None:
    def f(x: Any) -> Any:
        with tj.named_scope("inner"):
            return np.tanh(x)

    (node,) = [n for n in tj.vmap(f).graph(X).nodes if n.op.name == "tanh"]
    assert node.scope.endswith("inner") and "test_vmap.py" in node.source


def test_every_backend_runs_it(device: str) -> None:
    def f(x: Any, w: Any) -> Any:
        h = np.tanh(x @ w)
        return np.sort(h) - h.mean(), np.argmax(h), h[np.argsort(h)[:2]]

    x, w = X.astype(np.float32), W.astype(np.float32)
    with tj.device(device):
        got = tj.vmap(f, in_axes=(0, None))(x, w)
    h = np.tanh(x @ w)
    np.testing.assert_allclose(
        np.asarray(got[0]), np.sort(h) - h.mean(1, keepdims=True), rtol=1e-4, atol=1e-5
    )
    np.testing.assert_array_equal(np.asarray(got[1]), h.argmax(1))
    np.testing.assert_allclose(np.asarray(got[2]), np.sort(h)[:, :2], rtol=1e-4, atol=1e-5)


# -- nesting -----------------------------------------------------------------------------------------------------------


def test_nested_maps_make_outer_products() -> None:
    a, b = np.arange(3.0), np.arange(4.0)
    got = tj.vmap(tj.vmap(lambda x, y: x * y, (None, 0)), (0, None))(a, b)
    np.testing.assert_array_equal(got, np.outer(a, b))
    pairs = tj.vmap(lambda u: tj.vmap(lambda v: ((u - v) ** 2).sum())(X))(X)
    np.testing.assert_allclose(pairs, ((X[:, None] - X[None]) ** 2).sum(-1))


def mlp(params: Any, x: Any) -> Any:
    return np.tanh(x @ params["w"] + params["b"])


def square_loss(params: Any, x: Any, y: Any) -> Any:
    return ((mlp(params, x) - y) ** 2).mean()


PARAMS = {"w": W, "b": np.linspace(-1, 1, 5)}
Y = np.linspace(0, 1, 20).reshape(4, 5)


def test_per_example_gradients() -> None:
    got = tj.vmap(tj.grad(square_loss), in_axes=(None, 0, 0))(PARAMS, X, Y)
    each = [tj.grad(square_loss)(PARAMS, x, y) for x, y in zip(X, Y)]
    for name in PARAMS:
        np.testing.assert_allclose(got[name], np.stack([e[name] for e in each]), rtol=1e-10)
    values, again = tj.vmap(tj.value_and_grad(square_loss), in_axes=(None, 0, 0))(PARAMS, X, Y)
    np.testing.assert_allclose(values, loop(lambda x, y: square_loss(PARAMS, x, y), X, Y))
    np.testing.assert_allclose(again["w"], got["w"])


def test_the_gradient_through_a_map_is_the_sum_over_examples() -> None:
    def total(params: Any) -> Any:
        return tj.vmap(lambda x, y: square_loss(params, x, y))(X, Y).sum()

    got = tj.grad(total)(PARAMS)
    each = [tj.grad(square_loss)(PARAMS, x, y) for x, y in zip(X, Y)]
    for name in PARAMS:
        np.testing.assert_allclose(got[name], np.sum([e[name] for e in each], axis=0), rtol=1e-10)


def test_a_jacobian_by_mapping_gradients_over_basis_vectors() -> None:
    def f(x: Any) -> Any:
        return np.tanh(x @ W)

    x = X[0]
    jacobian = tj.vmap(lambda e: tj.grad(lambda v: (f(v) * e).sum())(x))(np.eye(5))
    np.testing.assert_allclose(jacobian, (1 - np.tanh(x @ W) ** 2)[:, None] * W.T)
    columns = tj.vmap(lambda t: tj.jvp(f, (x,), (t,))[1], out_axes=1)(np.eye(3))
    np.testing.assert_allclose(columns, jacobian)


def test_a_hessian_by_mapping_the_jvp_of_a_gradient() -> None:
    def f(x: Any) -> Any:
        return (np.sin(x) * x).sum() + x[0] * x[1]

    x = X[1]
    hessian = tj.vmap(lambda t: tj.jvp(tj.grad(f), (x,), (t,))[1])(np.eye(3))
    expected = np.diag(2 * np.cos(x) - x * np.sin(x))
    expected[0, 1] = expected[1, 0] = 1
    np.testing.assert_allclose(hessian, expected, atol=1e-12)


def test_jvp_of_a_map() -> None:
    value, tangent = tj.jvp(tj.vmap(lambda x: np.tanh(x).sum()), (X,), (np.ones_like(X),))
    np.testing.assert_allclose(value, np.tanh(X).sum(1))
    np.testing.assert_allclose(tangent, (1 - np.tanh(X) ** 2).sum(1))


def test_per_example_gradients_of_a_network_with_every_kind_of_layer(rng: np.random.Generator) -> None:
    images = rng.normal(size=(3, 2, 6, 6)).astype(np.float32)
    labels = np.array([0, 3, 1])
    params = {
        "kernel": rng.normal(size=(4, 2, 3, 3)).astype(np.float32),
        "weight": rng.normal(size=(4, 36)).astype(np.float32),
        "scale": np.ones(36, np.float32),
    }

    def loss(p: Any, image: Any, label: Any) -> Any:
        y = nn.relu(nn.conv2d(image[None], p["kernel"], padding=1))
        y = nn.max_pool2d(y, 2).reshape(-1)
        y = nn.layer_norm(y, p["scale"], None) if y.shape == p["scale"].shape else y
        return nn.cross_entropy((p["weight"] @ y)[None], label[None])

    got = tj.vmap(tj.grad(loss), in_axes=(None, 0, 0))(params, images, labels)
    each = [tj.grad(loss)(params, i, n) for i, n in zip(images, labels)]
    for name in params:
        np.testing.assert_allclose(got[name], np.stack([e[name] for e in each]), rtol=2e-4, atol=2e-5)


# -- rules given by the user -------------------------------------------------------------------------------------------


@tj.custom_vjp
def odd_square(x: Any, w: Any) -> Any:
    return (x * w) ** 2


odd_square.defvjp(
    lambda x, w: ((x * w) ** 2, (x, w, "static")),
    # Deliberately not the derivative, to see that the rule is used.
    lambda res, g: (g * 10 * res[0], (g * 100 * res[1]).sum(axis=0, keepdims=True) * np.ones_like(res[1])),
)


def test_user_given_rules_stay_in_force_inside_and_outside() -> None:
    w = np.array([1.0, 2.0, 3.0])

    def one(x: Any, w: Any) -> Any:
        return odd_square(x, w).sum()

    expected = [tj.grad(one, (0, 1))(x, w) for x in X]
    inside = tj.vmap(tj.grad(one, (0, 1)), in_axes=(0, None))(X, w)
    for k in (0, 1):
        np.testing.assert_allclose(inside[k], np.stack([e[k] for e in expected]))
    outside = tj.grad(lambda x, w: tj.vmap(one, in_axes=(0, None))(x, w).sum(), (0, 1))(X, w)
    np.testing.assert_allclose(outside[0], np.stack([e[0] for e in expected]))
    np.testing.assert_allclose(outside[1], np.sum([e[1] for e in expected], axis=0))


def test_user_given_rules_survive_two_maps() -> None:
    x = np.stack([X, X * 2])

    def one(v: Any) -> Any:
        return odd_square(v, np.ones(3)).sum()

    def total(x: Any) -> Any:
        return tj.vmap(tj.vmap(one))(x).sum()

    np.testing.assert_allclose(tj.grad(total)(x), 10 * x)


@tj.custom_vjp
def half_blind(x: Any, y: Any) -> Any:
    return {"sum": x + y, "note": "text"}


half_blind.defvjp(lambda x, y: ({"sum": x + y, "note": "text"}, None), lambda res, g: (None, g["sum"]))


def test_rules_may_give_no_gradient_for_an_argument() -> None:
    def total(x: Any, y: Any) -> Any:
        return tj.vmap(lambda a, b: half_blind(a, b)["sum"])(x, y).sum()

    gx, gy = tj.grad(total, (0, 1))(X, X)
    np.testing.assert_array_equal(gx, np.zeros_like(X))
    np.testing.assert_array_equal(gy, np.ones_like(X))


# -- control flow ------------------------------------------------------------------------------------------------------


def test_cond_with_a_shared_condition_runs_one_branch() -> None:
    def f(x: Any, flag: Any) -> Any:
        return tj.cond(flag, lambda v: np.sin(v), lambda v: np.ones(3), x)

    mapped = tj.trace(tj.vmap(f, in_axes=(0, None)))
    np.testing.assert_allclose(mapped(X, np.array(True)), np.sin(X))
    np.testing.assert_allclose(mapped(X, np.array(False)), np.ones_like(X))
    assert any(n.op.name == "cond" for n in mapped.graph(X, np.array(True)).nodes)


def test_cond_that_differs_between_examples_chooses() -> None:
    def f(x: Any) -> Any:
        return tj.cond(x.sum() > 0, lambda v: (v * 2, 1), lambda v: (-v, 2), x)

    value, branch = tj.vmap(f)(X)
    positive = X.sum(1) > 0
    np.testing.assert_allclose(value, np.where(positive[:, None], X * 2, -X))
    np.testing.assert_array_equal(branch, np.where(positive, 1, 2))
    gradient = tj.grad(lambda x: tj.vmap(f)(x)[0].sum())(X)
    np.testing.assert_allclose(gradient, np.where(positive[:, None], 2.0, -1.0) * np.ones_like(X))


def test_while_loop_runs_until_every_example_has_finished() -> None:
    def collatz(n: Any) -> Any:
        def step(state: Any) -> Any:
            n, count = state
            return tj.where(n % 2 == 0, n // 2, 3 * n + 1), count + 1

        return tj.while_loop(lambda s: s[0] != 1, step, (n, 0))[1]

    np.testing.assert_array_equal(tj.vmap(collatz)(np.array([1, 2, 3, 6, 7])), [0, 1, 7, 8, 16])


def test_while_loop_with_a_shared_condition() -> None:
    def power(x: Any, n: Any) -> Any:
        return tj.while_loop(lambda s: s[0] > 0, lambda s: (s[0] - 1, s[1] * x), (n, 1.0))[1]

    got = tj.vmap(power, in_axes=(0, None))(np.array([1.0, 2.0, 3.0]), np.array(4))
    np.testing.assert_allclose(got, [1.0, 16.0, 81.0])


@pytest.mark.parametrize("reverse", [False, True])
def test_scan_over_steps_for_many_examples(reverse: bool) -> None:
    xs = np.linspace(-1, 1, 4 * 6 * 3).reshape(4, 6, 3)
    u = np.eye(3) * 0.5

    def rnn(steps: Any, u: Any) -> Any:
        def step(h: Any, x: Any) -> Any:
            new = np.tanh(h @ u + x)
            return new, (new.sum(), TABLE[:2])

        return tj.scan(step, np.zeros(3), steps, reverse=reverse)

    one = tj.trace(rnn)
    last, (sums, shared) = tj.vmap(rnn, in_axes=(0, None))(xs, u)
    np.testing.assert_allclose(last, np.stack([one(x, u)[0] for x in xs]))
    np.testing.assert_allclose(sums, np.stack([one(x, u)[1][0] for x in xs]))
    assert shared.shape == (4, 6, 2)

    def loss(steps: Any, u: Any) -> Any:
        return (rnn(steps, u)[0] ** 2).sum()

    per_example = tj.vmap(tj.grad(loss, 1), in_axes=(0, None))(xs, u)
    np.testing.assert_allclose(per_example, np.stack([tj.grad(loss, 1)(x, u) for x in xs]), atol=1e-12)
    summed = tj.grad(lambda u: tj.vmap(loss, in_axes=(0, None))(xs, u).sum())(u)
    np.testing.assert_allclose(summed, per_example.sum(0), atol=1e-12)


def test_scan_whose_carry_only_becomes_different_in_the_body() -> None:
    def f(x: Any) -> Any:
        return tj.scan(lambda c, _: ((*c[1:], c[0] + x), None), (0.0, 1.0, 2.0), None, length=5)[0]

    xs = np.array([1.0, -2.0])
    got = tj.vmap(f)(xs)
    expected = [tj.trace(f)(v) for v in xs]
    for k in range(3):
        np.testing.assert_allclose(got[k], [e[k] for e in expected])


def test_a_map_inside_a_scan() -> None:
    def step(c: Any, x: Any) -> Any:
        return c + tj.vmap(lambda v: (v * x).sum())(np.asarray(X)), None

    expected = sum((X * x).sum(1) for x in X)
    np.testing.assert_allclose(tj.trace(lambda: tj.scan(step, np.zeros(4), X)[0])(), expected)


def test_print_shows_one_line_per_example(capfd: pytest.CaptureFixture[str]) -> None:
    def f(x: Any) -> Any:
        tj.print("x = {}", x)
        return x * 2

    np.testing.assert_array_equal(tj.vmap(f)(np.arange(3.0)), [0.0, 2.0, 4.0])
    assert capfd.readouterr().out.split("\n") == ["x = 0.0", "x = 1.0", "x = 2.0", ""]


def test_only_the_chosen_branch_prints(capfd: pytest.CaptureFixture[str]) -> None:
    def loud(x: Any) -> Any:
        tj.print("positive {}", x)
        return x

    got = tj.vmap(lambda x: tj.cond(x > 0, loud, lambda v: -v, x))(np.array([-1.0, 2.0, -3.0]))
    np.testing.assert_array_equal(got, [1.0, 2.0, 3.0])
    assert capfd.readouterr().out == "positive 2.0\n"


# -- random numbers ----------------------------------------------------------------------------------------------------


def test_every_example_draws_what_it_would_draw_alone() -> None:
    keys = tj.random.split(tj.random.key(3), 4)

    def draw(key: Any) -> Any:
        a, b = tj.random.split(key)
        return tj.random.uniform(a, (2, 3)), tj.random.normal(b, (5,)), tj.random.permutation(b, 6)

    got = tj.vmap(draw)(keys)
    expected = [draw(k) for k in keys]
    np.testing.assert_array_equal(got[0], np.stack([e[0] for e in expected]))
    np.testing.assert_allclose(got[1], np.stack([e[1] for e in expected]), rtol=1e-6)
    np.testing.assert_array_equal(got[2], np.stack([e[2] for e in expected]))


def test_embeddings_with_a_table_per_example() -> None:
    tables = np.arange(24.0).reshape(2, 4, 3)
    idx = np.array([[0, -1, 9], [2, 2, -9]])
    got = tj.vmap(lambda t, i: t[i % 4])(tables, idx)
    np.testing.assert_array_equal(got, np.stack([t[i % 4] for t, i in zip(tables, idx)]))
    gradient = tj.grad(lambda t: tj.vmap(lambda u, i: u[i % 4].sum())(t, idx).sum())(tables)
    expected = np.zeros_like(tables)
    for k in range(2):
        np.add.at(expected[k], idx[k] % 4, 1.0)
    np.testing.assert_array_equal(gradient, expected)
