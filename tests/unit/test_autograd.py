"""``grad``, ``value_and_grad``, ``jvp``, ``custom_vjp``, ``stop_gradient``: what they return, nest into, and refuse."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest

import tracejit as tj

X = np.array([[0.5, -1.25, 2.0], [1.5, 0.25, -0.75]])
F32 = X.astype(np.float32)


def central(f: Callable[[np.ndarray], Any], x: np.ndarray, step: float = 1e-6) -> np.ndarray:
    """Central differences of a scalar function in float64."""
    out = np.zeros_like(x)
    for index in np.ndindex(x.shape):
        up, down = x.copy(), x.copy()
        up[index] += step
        down[index] -= step
        out[index] = (f(up) - f(down)) / (2 * step)
    return out


# -- what to differentiate -------------------------------------------------------------------------------------------


def product(a, b, c):
    return (a * b + c).sum()


def test_an_int_gives_one_gradient_and_a_tuple_a_tuple() -> None:
    a, b, c = X, X + 1, X + 2
    np.testing.assert_allclose(tj.grad(product)(a, b, c), b)
    np.testing.assert_allclose(tj.grad(product, wrt=1)(a, b, c), a)
    both = tj.grad(product, wrt=(2, 0))(a, b, c)
    assert type(both) is tuple and len(both) == 2
    np.testing.assert_allclose(both[0], np.ones_like(c))
    np.testing.assert_allclose(both[1], b)
    (only,) = tj.grad(product, wrt=(1,))(a, b, c)
    np.testing.assert_allclose(only, a)


def test_negative_positions_count_from_the_end() -> None:
    np.testing.assert_allclose(tj.grad(product, wrt=-2)(X, X + 1, X + 2), X)


def test_argnums_is_accepted_as_the_name_of_jax() -> None:
    np.testing.assert_allclose(tj.grad(product, argnums=1)(X, X + 1, X + 2), X)


def test_value_and_grad_returns_both() -> None:
    value, gradient = tj.value_and_grad(lambda x: (x**2).sum())(X)
    assert value == pytest.approx((X**2).sum())
    np.testing.assert_allclose(gradient, 2 * X)


def test_auxiliary_results_are_passed_through() -> None:
    def loss(x, scale):
        y = x * scale
        return (y * y).sum(), {"y": y, "text": "as it is"}

    (value, aux), gradient = tj.value_and_grad(loss, has_aux=True)(X, 2.0)
    assert value == pytest.approx((4 * X**2).sum())
    np.testing.assert_allclose(aux["y"], X * 2)
    assert aux["text"] == "as it is"
    np.testing.assert_allclose(gradient, 8 * X)
    gradient, aux = tj.grad(loss, has_aux=True)(X, 2.0)
    np.testing.assert_allclose(gradient, 8 * X)
    np.testing.assert_allclose(aux["y"], X * 2)


class Params(NamedTuple):
    w: Any
    b: Any


def test_gradients_have_the_tree_of_their_argument() -> None:
    params = {"layers": [Params(X, X[0]), Params(X * 2, X[1])], "scale": 3.0}

    def loss(p):
        return sum((layer.w * p["scale"] + layer.b).sum() for layer in p["layers"])

    g = tj.grad(loss)(params)
    assert set(g) == {"layers", "scale"} and type(g["layers"]) is list and type(g["layers"][0]) is Params
    np.testing.assert_allclose(g["layers"][0].w, np.full((2, 3), 3.0))
    np.testing.assert_allclose(g["layers"][1].b, np.full(3, 2.0))
    assert g["scale"] == pytest.approx(3 * X.sum())


def test_modules_are_trees_too() -> None:
    layer = tj.nn.Linear(3, 2, rng=np.random.default_rng(0))
    g = tj.grad(lambda m, x: m(x).sum())(layer, F32)
    assert type(g) is type(layer)
    np.testing.assert_allclose(g.bias, [2, 2])


def test_integer_boolean_and_static_leaves_get_zeros() -> None:
    params = {
        "w": X,
        "step": 7,
        "count": np.array([1, 2]),
        "mask": np.array([True, False]),
        "name": "adam",
        "none": None,
    }
    g = tj.grad(lambda p: (p["w"] ** 2).sum() * p["step"])(params)
    np.testing.assert_allclose(g["w"], 14 * X)
    assert g["step"] == 0
    np.testing.assert_array_equal(g["count"], [0, 0])
    assert g["count"].dtype == np.int64
    np.testing.assert_array_equal(g["mask"], [False, False])
    assert g["none"] is None


def test_unused_arguments_get_zeros() -> None:
    g = tj.grad(lambda x, y: (x * 2).sum(), wrt=(0, 1))(X, F32)
    np.testing.assert_array_equal(g[1], np.zeros((2, 3), np.float32))
    assert g[1].dtype == np.float32


def test_a_loss_that_depends_on_nothing_has_zero_gradient() -> None:
    value, g = tj.value_and_grad(lambda x: 3.0)(X)
    assert value == 3.0
    np.testing.assert_array_equal(g, np.zeros_like(X))


# -- the rules of calculus -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("other", [(3,), (1, 3), (2, 1), (1, 1), ()])
def test_broadcast_operands_get_the_sum_of_their_copies(other: tuple[int, ...]) -> None:
    y = np.linspace(1, 2, max(1, int(np.prod(other)))).reshape(other)
    gx, gy = tj.grad(lambda a, b: (a * b).sum(), wrt=(0, 1))(X, y)
    np.testing.assert_allclose(gx, np.broadcast_to(y, X.shape))
    assert np.shape(gy) == other
    np.testing.assert_allclose(gy, central(lambda v: float((X * v).sum()), y), rtol=1e-6)


def test_a_value_used_many_times_adds_up() -> None:
    g = tj.grad(lambda x: (x * x + x + np.exp(x) * x).sum())(X)
    np.testing.assert_allclose(g, 2 * X + 1 + np.exp(X) * (1 + X))


def test_the_same_array_as_two_arguments_is_two_variables() -> None:
    ga, gb = tj.grad(lambda a, b: (a * a * b).sum(), wrt=(0, 1))(X, X)
    np.testing.assert_allclose(ga, 2 * X * X)
    np.testing.assert_allclose(gb, X * X)


@pytest.mark.parametrize(
    "f",
    [
        lambda x: np.tanh(x).sum(),
        lambda x: np.prod(x + 3),
        lambda x: np.max(x * x),
        lambda x: np.var(x, axis=1).sum(),
        lambda x: np.linalg.norm(x),
        lambda x: (x @ x.T).sum() + np.einsum("ij,ij->", x, x),
        lambda x: np.cumsum(x, axis=1)[:, -1].sum() * x[0, 0],
        lambda x: np.where(x > 0, x**3, np.exp(x)).sum(),
        lambda x: np.sort(x, axis=1)[:, 0].sum() ** 2,
        lambda x: np.concatenate([x, x * 2])[1:3].sum() * np.flip(x)[0, 0],
        lambda x: x[np.array([0, 0, 1])].sum() * x[1, 2],
        lambda x: np.logaddexp(x, 1.0).sum() + np.clip(x, -1, 1).sum(),
        lambda x: tj.nn.softmax(x)[:, 1].sum() + tj.nn.gelu(x).sum(),
    ],
)
def test_first_and_second_derivatives_match_differences(f: Callable[..., Any]) -> None:
    gradient = tj.grad(f)
    np.testing.assert_allclose(gradient(X), central(lambda v: float(f(v)), X), rtol=1e-5, atol=1e-7)
    w = np.array([[1.0, -0.5, 2.0], [0.25, 1.0, -1.0]])
    second = tj.grad(lambda x: (gradient(x) * w).sum())(X)
    np.testing.assert_allclose(
        second, central(lambda v: float((gradient(v) * w).sum()), X), rtol=1e-4, atol=1e-5
    )


def test_third_derivatives() -> None:
    f = lambda x: np.sin(x) * np.exp(x)  # noqa: E731
    third = tj.grad(tj.grad(tj.grad(f)))
    x = 0.7
    # (e^x sin x)''' = 2 e^x (cos x - sin x)
    assert third(x) == pytest.approx(2 * math.exp(x) * (math.cos(x) - math.sin(x)), rel=1e-10)
    assert tj.grad(tj.grad(tj.grad(tj.grad(lambda x: x**5))))(2.0) == pytest.approx(240.0)


def test_third_derivative_of_an_array_function() -> None:
    def f(x):
        return (np.tanh(x @ x.T)).sum()

    v = X / 4
    first = tj.grad(f)
    second = tj.grad(lambda x: (first(x) ** 2).sum())
    third = tj.grad(lambda x: (second(x) * v).sum())
    np.testing.assert_allclose(
        third(v), central(lambda x: float((second(x) * v).sum()), v, 1e-5), rtol=1e-4, atol=1e-5
    )


def test_nested_gradients_do_not_confuse_their_variables() -> None:
    """d/dx [x · d/dy (x + y)] = 1, not 2: the classic perturbation confusion (Siskind & Pearlmutter 2005)."""
    assert tj.grad(lambda x: x * tj.grad(lambda y: x + y)(1.0))(1.0) == 1.0
    assert tj.grad(lambda x: x * tj.grad(lambda y: x * y)(2.0))(3.0) == 6.0
    # ... also when inner and outer differentiate with respect to the very same value.
    assert tj.grad(lambda x: tj.grad(lambda y: y * x)(x))(3.0) == 1.0


def test_the_inner_loss_may_be_used_outside() -> None:
    def f(x):
        value, g = tj.value_and_grad(lambda y: y**3)(x)
        return value * g  # 3 x^5

    assert tj.grad(f)(2.0) == pytest.approx(15 * 16)


# -- where it is called ----------------------------------------------------------------------------------------------


def test_the_same_inside_and_outside_of_a_trace() -> None:
    def loss(w, x):
        return np.tanh(x @ w).sum()

    w = np.ones((3, 2))
    outside = tj.grad(loss)(w, X)
    inside = tj.trace(tj.grad(loss))(w, X)
    wrapped = tj.trace(lambda a, b: tj.grad(loss)(a, b) * 1)(w, X)
    traced_loss = tj.grad(tj.trace(loss))(w, X)
    for other in (inside, wrapped, traced_loss):
        np.testing.assert_array_equal(outside, other)


def test_a_gradient_called_outside_is_traced_once() -> None:
    calls = []

    def loss(x):
        calls.append(1)
        return (x * x).sum()

    g = tj.grad(loss)
    for _ in range(3):
        g(X)
    assert len(calls) == 1


@pytest.mark.parametrize("x", [3.0, np.float32(3), np.float64(3), np.array(3.0), np.float16(3)])
def test_python_and_numpy_scalars_are_accepted(x: Any) -> None:
    g = tj.grad(lambda v: v**2)(x)
    assert g == 6.0
    if isinstance(x, np.generic):
        assert np.asarray(g).dtype == x.dtype


def test_a_scalar_function_that_uses_numpy_functions() -> None:
    assert tj.grad(np.tanh)(0.5) == pytest.approx(1 - math.tanh(0.5) ** 2)
    assert tj.grad(lambda x: np.sqrt(x) * np.log(x))(4.0) == pytest.approx(math.log(4) / 4 + 0.5)


def test_keyword_arguments_are_passed_on() -> None:
    def loss(x, *, scale):
        return (x * scale).sum()

    np.testing.assert_allclose(tj.grad(loss)(X, scale=3.0), np.full((2, 3), 3.0))


def test_methods_can_be_differentiated() -> None:
    class Model:
        def __init__(self) -> None:
            self.scale = 4.0

        def loss(self, x):
            return (x * self.scale).sum()

    np.testing.assert_allclose(tj.grad(Model().loss)(X), np.full((2, 3), 4.0))


def test_dtypes_of_gradients_are_those_of_the_arguments() -> None:
    def loss(a, b, c):
        return (a * b).sum() + c.sum().astype(np.float32)

    g = tj.grad(loss, wrt=(0, 1, 2))(F32, X, X.astype(np.float16))
    assert [x.dtype for x in g] == [np.float32, np.float64, np.float16]


# -- stopping and custom rules ---------------------------------------------------------------------------------------


def test_stop_gradient_is_a_constant_to_the_derivative() -> None:
    np.testing.assert_allclose(tj.grad(lambda x: (tj.stop_gradient(x) * x).sum())(X), X)
    np.testing.assert_array_equal(tj.stop_gradient(X), X)
    tree = tj.trace(lambda x: tj.stop_gradient({"a": x, "b": [x * 2]}))(X)
    np.testing.assert_array_equal(tree["b"][0], X * 2)


def clipped_identity() -> Any:
    """Identity whose gradient is clipped to [-1, 1]: a rule that is visibly not the function's own."""

    @tj.custom_vjp
    def f(x, scale):
        return x * scale

    f.defvjp(
        lambda x, scale: (x * scale, (x, scale)),
        lambda res, g: (np.clip(g * res[1], -1, 1), (g * res[0]).sum()),
    )
    return f


def test_a_custom_rule_replaces_the_derivative() -> None:
    f = clipped_identity()
    np.testing.assert_array_equal(f(X, 5.0), X * 5)
    np.testing.assert_allclose(tj.trace(f)(X, 5.0), X * 5)
    gx, gs = tj.grad(lambda x, s: f(x, s).sum(), wrt=(0, 1))(X, 5.0)
    np.testing.assert_allclose(gx, np.ones_like(X))
    assert gs == pytest.approx(X.sum())


def test_none_means_no_gradient_for_that_argument() -> None:
    @tj.custom_vjp
    def f(x, y):
        return x * y

    f.defvjp(lambda x, y: (x * y, y), lambda y, g: (g * y, None))
    gx, gy = tj.grad(lambda x, y: f(x, y).sum(), wrt=(0, 1))(X, X + 1)
    np.testing.assert_allclose(gx, X + 1)
    np.testing.assert_array_equal(gy, np.zeros_like(X))


def test_custom_rules_differentiate_to_higher_order() -> None:
    @tj.custom_vjp
    def cube(x):
        return x**3

    cube.defvjp(lambda x: (x**3, x), lambda x, g: (g * 3 * x**2,))
    assert tj.grad(cube)(2.0) == pytest.approx(12)
    assert tj.grad(tj.grad(cube))(2.0) == pytest.approx(12)
    assert tj.grad(tj.grad(tj.grad(cube)))(2.0) == pytest.approx(6)


def test_custom_rules_over_trees_with_static_residuals() -> None:
    @tj.custom_vjp
    def f(p, x):
        return {"y": p["w"] * x, "z": x + 1}

    def fwd(p, x):
        return {"y": p["w"] * x, "z": x + 1}, (p["w"], x, "static", 3)

    def bwd(res, g):
        w, x, text, n = res
        assert (text, n) == ("static", 3)
        return {"w": g["y"] * x}, g["y"] * w + g["z"]

    f.defvjp(fwd, bwd)

    def loss(p, x):
        out = f(p, x)
        return (out["y"] * 2 + out["z"]).sum()

    gp, gx = tj.grad(loss, wrt=(0, 1))({"w": X}, X + 1)
    np.testing.assert_allclose(gp["w"], 2 * (X + 1))
    np.testing.assert_allclose(gx, 2 * X + 1)


@pytest.mark.parametrize(
    ("bwd", "message"),
    [
        (lambda res, g: g, "must return a tuple"),
        (lambda res, g: (g, g), "returned 2 cotangents for 1 arguments"),
        (lambda res, g: (g[0],), "another shape or dtype"),
        (lambda res, g: ({"a": g, "b": g},), "another tree structure"),
    ],
)
def test_wrong_returns_of_a_backward_function_are_explained(bwd: Callable[..., Any], message: str) -> None:
    @tj.custom_vjp
    def f(x):
        return x * 2

    f.defvjp(lambda x: (x * 2, None), bwd)
    with pytest.raises(tj.GradientError, match=message):
        tj.grad(lambda x: f(x).sum())(X)


def test_a_custom_function_without_its_rule_is_refused() -> None:
    @tj.custom_vjp
    def f(x):
        return x * 2

    np.testing.assert_array_equal(f(X), X * 2)
    with pytest.raises(tj.GradientError, match="defvjp"):
        tj.grad(lambda x: f(x).sum())(X)


def test_a_wrong_forward_function_is_explained() -> None:
    @tj.custom_vjp
    def f(x):
        return x * 2

    f.defvjp(lambda x: x * 2, lambda res, g: (g,))
    with pytest.raises(tj.GradientError, match=r"\(result, residuals\)"):
        tj.grad(lambda x: f(x).sum())(X)


# -- jvp -------------------------------------------------------------------------------------------------------------


def test_jvp_is_the_directional_derivative() -> None:
    def f(x, y):
        return np.tanh(x @ y.T) * x[:, :1], (x * y).sum()

    v, w = np.cos(X), np.sin(X)
    (out, total), (d_out, d_total) = tj.jvp(f, (X, X + 1), (v, w))
    expected = f(X, X + 1)
    np.testing.assert_allclose(out, expected[0])
    assert total == pytest.approx(expected[1])
    h = 1e-6
    up, down = f(X + h * v, X + 1 + h * w), f(X - h * v, X + 1 - h * w)
    np.testing.assert_allclose(d_out, (up[0] - down[0]) / (2 * h), rtol=1e-6, atol=1e-8)
    assert d_total == pytest.approx((up[1] - down[1]) / (2 * h), rel=1e-6)


def test_jvp_agrees_with_grad() -> None:
    def f(x):
        return (np.exp(x) * np.sin(x)).sum() + np.max(x)

    v = np.cos(X)
    assert tj.jvp(f, (X,), (v,))[1] == pytest.approx((tj.grad(f)(X) * v).sum())


def test_hessian_vector_product_both_ways() -> None:
    def f(x):
        return (np.tanh(x) ** 2 * x).sum()

    v = np.cos(X)
    forward_over_reverse = tj.jvp(tj.grad(f), (X,), (v,))[1]
    reverse_over_reverse = tj.grad(lambda x: (tj.grad(f)(x) * v).sum())(X)
    np.testing.assert_allclose(forward_over_reverse, reverse_over_reverse, rtol=1e-10)


def test_jvp_of_trees_and_inside_a_trace() -> None:
    @tj.trace
    def push(x, v):
        return tj.jvp(lambda p: {"y": p["a"] * p["b"]}, ({"a": x, "b": x * 2},), ({"a": v, "b": v * 0},))

    out, tangent = push(X, np.ones_like(X))
    np.testing.assert_allclose(out["y"], 2 * X * X)
    np.testing.assert_allclose(tangent["y"], 2 * X)


def test_jvp_refuses_what_does_not_fit() -> None:
    with pytest.raises(tj.GradientError, match="1 primals but 2 tangents"):
        tj.jvp(np.tanh, (X,), (X, X))
    with pytest.raises(tj.GradientError, match="tree structures"):
        tj.jvp(lambda p: p["a"], ({"a": X},), (X,))
    with pytest.raises(tj.ShapeError, match="tangent"):
        tj.jvp(np.tanh, (X,), (X[0],))


# -- control flow ----------------------------------------------------------------------------------------------------


def test_gradient_through_cond_follows_the_branch_taken() -> None:
    def f(x, flag):
        return tj.cond(flag > 0, lambda v: (v**2).sum(), lambda v: (v * 5).sum(), x)

    np.testing.assert_allclose(tj.grad(f)(X, np.array(1)), 2 * X)
    np.testing.assert_allclose(tj.grad(f)(X, np.array(-1)), np.full_like(X, 5))


def test_gradient_through_scan() -> None:
    def f(w, xs):
        def step(h, x):
            h = np.tanh(h * w + x)
            return h, h * h

        last, ys = tj.scan(step, np.zeros(3), xs)
        return (last.sum() + ys.sum()) * 1.0

    w = np.array([0.5, -0.25, 0.75])
    gw, gx = tj.grad(f, wrt=(0, 1))(w, X)
    plain = lambda w, xs: float(f(w, xs))  # noqa: E731
    np.testing.assert_allclose(gw, central(lambda v: plain(v, X), w), rtol=1e-6)
    np.testing.assert_allclose(gx, central(lambda v: plain(w, v), X), rtol=1e-6)


def test_second_derivative_through_scan() -> None:
    def f(x):
        out, _ = tj.scan(lambda c, _: (c * x, None), np.float64(1.0), None, length=4)
        return out  # x^4

    assert tj.grad(f)(2.0) == pytest.approx(32)
    assert tj.grad(tj.grad(f))(2.0) == pytest.approx(48)


# -- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tj.grad(3), "takes a function, got int"),
        (lambda: tj.grad(np.sum, wrt="x"), "wrt must be"),
        (lambda: tj.grad(np.sum, wrt=()), "wrt must be"),
        (lambda: tj.grad(np.sum, wrt=1.0), "wrt must be"),
        (lambda: tj.grad(lambda x: x.sum(), wrt=2)(X), "wrt=2 but the function was called with 1"),
        (lambda: tj.grad(lambda x: x * 2)(X), r"must return a scalar.*f64\[2,3\].*sum"),
        (lambda: tj.grad(lambda x: (x.sum(), x))(X), "must return a scalar, got tuple.*has_aux"),
        (lambda: tj.grad(lambda x: None)(X), "must return a scalar, got NoneType"),
        (lambda: tj.grad(lambda x: x.sum(), has_aux=True)(X), r"\(loss, aux\)"),
        (lambda: tj.grad(lambda x: x.astype(int).sum())(X), "floating-point scalar"),
        (lambda: tj.grad(lambda x: x.sum())(np.arange(3)), "nothing to differentiate.*float"),
        (lambda: tj.grad(lambda x: x * 1.0)([3]), "nothing to differentiate.*3.0"),
        (lambda: tj.grad(lambda x: 1.0)("text"), "nothing to differentiate"),
        (lambda: tj.grad(lambda x: 1.0)({}), "nothing to differentiate"),
    ],
)
def test_wrong_use_is_explained(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(tj.GradientError, match=f"(?s){message}"):
        make()


def test_gradient_nodes_remember_line_scope_and_forward_node() -> None:
    def loss(x):
        with tj.named_scope("squash"):
            y = np.tanh(x)
        return y.sum()

    graph = tj.trace(tj.grad(loss)).graph(X)
    (tanh,) = [n for n in graph if n.op.name == "tanh"]
    backward = [n for n in graph if n.grad_of is tanh and n.op.name in ("mul", "sub")]
    assert len(backward) == 2, "1 - tanh(x)^2"
    assert all("test_autograd.py:" in n.source and n.source == tanh.source for n in backward)
    assert all(n.scope.endswith("squash") for n in backward)
