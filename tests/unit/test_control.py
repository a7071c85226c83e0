"""``tj.cond``, ``while_loop``, ``scan`` and ``print``: jax.lax semantics, traced and as plain Python,
gradients, errors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import tracejit as tj
from tracejit.errors import (
    ConcretizationError,
    DTypeError,
    GradientError,
    GraphError,
    ShapeError,
    TracingError,
)
from tracejit.ops import control as ops
from tracejit.ops import registry
from tracejit.ops.control import interpret

RNG = np.random.default_rng(0)


def traced(f: Any, *args: Any) -> Any:
    return tj.trace(f)(*args, device="numpy")


def check_grad(f: Any, *args: np.ndarray, wrt: tuple[int, ...] = (0,), rtol: float = 1e-6) -> None:
    """``tj.grad`` of a scalar function against central differences of the function run as plain Python."""
    found = tj.grad(f, wrt=wrt)(*args)
    for k, actual in zip(wrt, found, strict=True):
        numeric = np.zeros(args[k].shape)
        for i in np.ndindex(args[k].shape):
            sides = []
            for step in (1e-6, -1e-6):
                moved = [np.array(a, copy=True) for a in args]
                moved[k][i] += step
                sides.append(float(f(*moved)))
            numeric[i] = (sides[0] - sides[1]) / 2e-6
        np.testing.assert_allclose(actual, numeric, rtol=rtol, atol=1e-7)


# -- the ops ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cond", "scan"])
def test_gradients_of_the_ops_on_their_samples(name: str) -> None:
    op = registry.get(name)
    for arrays, attrs in op.samples():
        ys = op(*arrays, **attrs)
        assert [(y.shape, y.dtype) for y in ys] == op.infer(*arrays, **attrs)
        g = [RNG.normal(size=y.shape) for y in ys]
        found = op.vjp(g, ys, *arrays, **attrs)  # type: ignore[operator]

        def total(*a: np.ndarray, g: Any = g, attrs: Any = attrs) -> float:
            return sum(float((y * w).sum()) for y, w in zip(op(*a, **attrs), g, strict=True))

        for k, x in enumerate(arrays):
            if x.dtype.kind != "f":
                assert found[k] is None
                continue
            for i in np.ndindex(x.shape):
                up, down = ([np.array(a, copy=True) for a in arrays] for _ in range(2))
                up[k][i] += 1e-6
                down[k][i] -= 1e-6
                numeric = (total(*up) - total(*down)) / 2e-6
                np.testing.assert_allclose(found[k][i], numeric, rtol=1e-6, atol=1e-7)


def test_the_ops_check_their_sub_graphs() -> None:
    ((flag, x), attrs), *_ = ops.cond.samples()
    with pytest.raises(DTypeError, match="boolean scalar"):
        ops.cond.infer(x, x, **attrs)
    with pytest.raises(GraphError, match="operands do not fit"):
        ops.cond.infer(flag, x[:2], **attrs)
    (arrays, attrs), *_ = ops.scan.samples()
    with pytest.raises(ShapeError, match="leading axis of size 5"):
        ops.scan.infer(*arrays, **{**attrs, "length": 5})
    with pytest.raises(GraphError, match="out of range"):
        ops.scan.infer(*arrays, **{**attrs, "n_carry": 3})
    ((i, x), attrs), *_ = ops.while_loop.samples()
    with pytest.raises(GraphError, match="inputs of the condition"):
        ops.while_loop.infer(x, i, **attrs)


# -- cond ------------------------------------------------------------------------------------------


def choose(x: Any) -> Any:
    return tj.cond(x.sum() > 0, lambda v: {"y": v * 2, "n": 1.0}, lambda v: {"y": np.sin(v), "n": v.sum()}, x)


@pytest.mark.parametrize("sign", [1, -1])
def test_cond_runs_one_branch_traced_or_not(sign: int) -> None:
    x = sign * np.arange(1, 4, dtype=np.float32)
    plain, recorded = choose(x), traced(choose, x)
    np.testing.assert_allclose(recorded["y"], plain["y"], rtol=1e-6)
    np.testing.assert_allclose(recorded["n"], plain["n"], rtol=1e-6)
    assert recorded["n"].dtype == np.float32, "the Python number 1.0 adapts to the other branch"


def test_cond_of_numbers_and_closures() -> None:
    w = np.array([1.0, 2.0])
    f = lambda n, x: tj.cond(n, lambda: x * w, lambda: x - w)  # noqa: E731
    for n in (0, 1, 7):
        np.testing.assert_array_equal(traced(f, np.int32(n), np.ones(2)), f(n, np.ones(2)))
    np.testing.assert_array_equal(
        traced(lambda x: tj.cond(True, lambda: x, lambda: x[:1]), w), w
    )  # known: plain Python


@pytest.mark.parametrize("sign", [1, -1])
def test_cond_gradient_is_that_of_the_branch_taken(sign: int) -> None:
    x = sign * RNG.uniform(0.5, 1, 3)
    check_grad(
        lambda x, w: tj.cond(x[0] > 0, lambda v: (v * w).sum(), lambda v: np.sin(v * v).sum(), x),
        x,
        RNG.normal(size=3),
        wrt=(0, 1),
    )


def test_nested_cond() -> None:
    def f(x: Any) -> Any:
        return tj.cond(x > 0, lambda: tj.cond(x > 1, lambda: x * x, lambda: x), lambda: -x)

    for v in (-2.0, 0.5, 3.0):
        assert traced(f, np.float64(v)) == f(v)
        check_grad(lambda x: f(x[0]), np.array([v]))


# -- while_loop ------------------------------------------------------------------------------------


def collatz(n: Any) -> Any:
    def step(state: Any) -> Any:
        n, count = state
        return np.where(n % 2 == 0, n // 2, 3 * n + 1), count + 1

    return tj.while_loop(lambda state: state[0] != 1, step, (n, 0))[1]


def test_while_loop() -> None:
    for n in (1, 6, 27):
        assert traced(collatz, np.int64(n)) == collatz(np.int64(n))


def test_while_loop_with_closures_and_weak_numbers() -> None:
    def f(x: Any) -> Any:
        return tj.while_loop(lambda v: v[0] < 5, lambda v: (v[0] + 1, v[1] * x), (0, 1.0))

    i, y = traced(f, np.float32(2))
    assert (i, y, y.dtype) == (5, 32.0, np.float32), "the weak 1.0 becomes float32 after the first step"
    assert f(np.float32(2)) == (5, 32.0)


def test_while_loop_that_never_runs() -> None:
    f = lambda x: tj.while_loop(lambda v: v.sum() < 0, lambda v: v * 2, x)  # noqa: E731
    np.testing.assert_array_equal(traced(f, np.ones(3)), np.ones(3))


def test_while_loop_has_no_reverse_gradient_and_says_so() -> None:
    with pytest.raises(GradientError, match=r"number of its iterations.*tj\.scan"):
        tj.grad(lambda x: tj.while_loop(lambda v: v < 5, lambda v: v * 2, x))(1.0)
    f = lambda x: (x * tj.stop_gradient(tj.while_loop(lambda v: v < 5, lambda v: v * 2, x))).sum()  # noqa: E731
    assert tj.grad(f)(np.float64(1.0)) == 8.0


# -- scan ------------------------------------------------------------------------------------------


def rnn(w: Any, h: Any, xs: Any, reverse: bool = False) -> Any:
    def step(carry: Any, x: Any) -> Any:
        new = np.tanh(carry["h"] @ w + x["a"] * x["b"])
        return {"h": new, "n": carry["n"] + 1}, {"norm": (new**2).sum(), "h": new}

    return tj.scan(step, {"h": h, "n": 0}, xs, reverse=reverse)


def rnn_arrays() -> tuple[Any, ...]:
    return (
        RNG.normal(size=(3, 3)),
        RNG.normal(size=3),
        {"a": RNG.normal(size=(5, 3)), "b": RNG.normal(size=(5, 1))},
    )


@pytest.mark.parametrize("reverse", [False, True])
def test_scan_traced_or_not(reverse: bool) -> None:
    arrays = rnn_arrays()
    plain = rnn(*arrays, reverse=reverse)
    recorded = traced(lambda *a: rnn(*a, reverse=reverse), *arrays)
    assert recorded[0]["n"] == plain[0]["n"] == 5
    np.testing.assert_allclose(recorded[0]["h"], plain[0]["h"])
    for key in ("norm", "h"):
        np.testing.assert_allclose(recorded[1][key], plain[1][key])


@pytest.mark.parametrize("reverse", [False, True])
def test_scan_gradient(reverse: bool) -> None:
    w, h, xs = rnn_arrays()

    def loss(w: Any, h: Any, a: Any, b: Any) -> Any:
        carry, ys = rnn(w, h, {"a": a, "b": b}, reverse)
        return carry["h"].sum() + (ys["norm"] * np.arange(5)).sum() + (ys["h"][2] ** 2).sum()

    check_grad(loss, w, h, xs["a"], xs["b"], wrt=(0, 1, 2, 3))


def test_scan_second_derivative() -> None:
    def cubes(x: Any) -> Any:
        return tj.scan(lambda c, _: (c * x, None), 1.0, None, length=3)[0]

    assert traced(cubes, np.float64(2)) == 8
    assert tj.grad(cubes)(2.0) == pytest.approx(12)
    assert tj.grad(tj.grad(cubes))(2.0) == pytest.approx(12)
    assert tj.grad(tj.grad(tj.grad(cubes)))(2.0) == pytest.approx(6)


def test_scan_saves_only_the_carries_that_change() -> None:
    """The backward scan must not stack the weights once per step."""
    w = np.ones((3, 3))
    graph = tj.grad(
        lambda w, xs: tj.scan(lambda c, x: (np.tanh(c @ w + x), None), np.zeros(3), xs)[0].sum()
    ).graph(w, np.ones((7, 3)))
    stacked = [shape for n in graph if n.op.name == "scan" for shape, _ in n.avals]
    assert (7, 3) in stacked, "the states are saved"
    assert (7, 3, 3) not in stacked, "the weights are not"


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("kind", ["nothing", "carry_in", "carry_out", "both"])
def test_scan_runs_forward_once_if_its_results_hold_the_carries(kind: str, reverse: bool) -> None:
    def f(w: Any, xs: Any) -> Any:
        def step(c: Any, x: Any) -> Any:
            new = np.tanh(c @ w + x)
            return new, {"nothing": None, "carry_in": c, "carry_out": new, "both": (new, c)}[kind]

        carry, ys = tj.scan(step, np.full(2, 0.3), xs, reverse=reverse)
        return (carry**2).sum() + (np.sin(ys).sum() if kind in ("carry_in", "carry_out") else 0)

    w, xs = RNG.normal(size=(2, 2)), RNG.normal(size=(4, 2))
    check_grad(f, w, xs, wrt=(0, 1))
    scans = [n for n in tj.grad(f).graph(w, xs) if n.op.name == "scan"]
    assert len(scans) == (3 if kind == "nothing" else 2)


def test_scan_with_length_only_and_no_results_per_step() -> None:
    f = lambda x: tj.scan(lambda c, none: (c + x, none), np.float32(0), None, length=4)  # noqa: E731
    total, ys = traced(f, np.float32(1.5))
    assert (total, ys) == (6.0, None)
    assert f(np.float32(1.5)) == (6.0, None)


def test_scan_of_length_zero_knows_the_shapes() -> None:
    f = lambda xs: tj.scan(lambda c, x: (c + x.sum(), (x * 2, c > 0)), np.float32(0), xs)  # noqa: E731
    for call in (f, lambda xs: traced(f, xs)):
        carry, (ys, flags) = call(np.zeros((0, 3), np.float32))
        assert carry == 0 and ys.shape == (0, 3) and ys.dtype == np.float32
        assert flags.shape == (0,) and flags.dtype == bool


def test_scan_inside_scan_uses_values_of_all_levels() -> None:
    def f(x: Any, ys: Any) -> Any:
        def outer(c: Any, y: Any) -> Any:
            inner, _ = tj.scan(lambda d, z: (d * x + z * c, None), y, ys)
            return inner, inner

        return tj.scan(outer, x, ys)

    x, ys = np.float64(0.7), RNG.normal(size=3)
    for a, b in zip(traced(f, x, ys), f(x, ys), strict=True):
        np.testing.assert_allclose(a, b)
    check_grad(lambda x, ys: f(x, ys)[1].sum(), np.array(0.7), ys, wrt=(0, 1))


def test_cond_inside_scan() -> None:
    def f(xs: Any) -> Any:
        def step(c: Any, x: Any) -> Any:
            c = tj.cond(x > 0, lambda: c * x, lambda: c - x)
            return c, c

        return tj.scan(step, 1.0, xs)[1].sum()

    xs = RNG.normal(size=6)
    np.testing.assert_allclose(traced(f, xs), f(xs))
    check_grad(f, xs)


def test_captured_arrays_are_read_at_each_call() -> None:
    table = np.ones(2)
    f = tj.trace(lambda x: tj.scan(lambda c, _: (c + table, None), x, None, length=3)[0])
    np.testing.assert_array_equal(f(np.zeros(2), device="numpy"), [3, 3])
    table[:] = 2
    np.testing.assert_array_equal(f(np.zeros(2), device="numpy"), [6, 6])


def test_numpy_functions_and_indexing_work_inside_bodies() -> None:
    x = RNG.normal(size=(4, 3))
    (y,) = (
        np.asarray(v)
        for v in [traced(lambda x: tj.scan(lambda c, i: (c, x[i, ::-1]), 0, np.arange(4))[1], x)]
    )
    np.testing.assert_array_equal(y, x[:, ::-1])


def test_every_device_agrees(device: str) -> None:
    arrays = [
        np.asarray(a, np.float32)
        for a in (RNG.normal(size=(3, 3)), RNG.normal(size=3), RNG.normal(size=(5, 3)))
    ]

    def f(w: Any, h: Any, xs: Any) -> Any:
        h, ys = tj.scan(lambda c, x: (np.tanh(c @ w + x), c.sum()), h, xs)
        n, _ = tj.while_loop(
            lambda v: v[1] < 40, lambda v: (v[0] + 1, v[1] * 2), (np.int32(0), np.float32(1))
        )
        return tj.cond(ys.sum() > 0, lambda: h * 2, lambda: h - 1), n

    value, n = tj.trace(f)(*arrays, device=device)
    expected, m = f(*arrays)
    np.testing.assert_allclose(np.asarray(value), expected, rtol=1e-5, atol=1e-6)
    assert int(n) == m == 6
    gradient = tj.grad(lambda *a: f(*a)[0].sum())
    with tj.device(device):
        actual = np.asarray(gradient(*arrays))
    with tj.device("numpy"):
        reference = np.asarray(gradient(*arrays))
    np.testing.assert_allclose(actual, reference, rtol=1e-4, atol=1e-5)


# -- print -----------------------------------------------------------------------------------------


def test_print_prints_at_every_run(capfd: pytest.CaptureFixture[str]) -> None:
    def f(x: Any) -> Any:
        tj.print("x = {}, mean {:.2f}", x, x.mean())
        return x * 2

    g = tj.trace(f)
    for x in (np.array([1.0, 2.0]), np.array([3.0, 5.0])):
        g(x, device="numpy")
    f(np.array([0.0, 1.0]))
    assert (
        capfd.readouterr().out == "x = [1. 2.], mean 1.50\nx = [3. 5.], mean 4.00\nx = [0. 1.], mean 0.50\n"
    )


def test_print_in_a_loop_whose_result_is_not_used(capfd: pytest.CaptureFixture[str], device: str) -> None:
    def f(x: Any) -> Any:
        def step(c: Any, v: Any) -> Any:
            tj.print("step {0} of {1:.1f}", c, v)
            return c + 1, None

        tj.scan(step, np.int32(0), x)
        tj.print("done")
        return x + 1

    tj.trace(f)(np.array([0.5, 1.5], np.float32), device=device)
    assert capfd.readouterr().out == "step 0 of 0.5\nstep 1 of 1.5\ndone\n"


def test_print_formats_each_element_and_reaches_no_attributes() -> None:
    assert ops.format_message("{:.1f} {}", [np.array([1.0, 2.25]), np.int64(3)]) == "[1.0 2.2] 3"
    assert ops.format_message("{1} {0} {{}}", [np.float32(1), True]) == "True 1.0 {}"
    for fmt in ("{0.__class__}", "{0[0]}", "{x}"):
        with pytest.raises(TracingError, match="does not fit"):
            tj.print(fmt, np.ones(2))
    with pytest.raises(TracingError, match="does not fit 1 values"):
        traced(lambda x: tj.print("{} {}", x), np.ones(2))
    with pytest.raises(TracingError, match="must be a string"):
        tj.print(3)  # type: ignore[arg-type]


# -- mistakes --------------------------------------------------------------------------------------

MISTAKES: dict[str, tuple[Any, type[Exception], str]] = {
    "pred_not_scalar": (lambda x: tj.cond(x > 0, lambda: x, lambda: x), ShapeError, r"scalar.*tj\.where"),
    "branch_not_callable": (lambda x: tj.cond(x[0] > 0, x, x), TracingError, "must be functions"),
    "branch_shape": (lambda x: tj.cond(x[0] > 0, lambda: x, lambda: x[:1]), ShapeError, "another shape"),
    "branch_dtype": (
        lambda x: tj.cond(x[0] > 0, lambda: x, lambda: x.astype(np.float32)),
        DTypeError,
        "another dtype",
    ),
    "branch_structure": (
        lambda x: tj.cond(x[0] > 0, lambda: x, lambda: (x, x)),
        TracingError,
        "different structure",
    ),
    "branch_string": (
        lambda x: tj.cond(x[0] > 0, lambda: "a", lambda: "b"),
        DTypeError,
        "arrays and numbers",
    ),
    "while_cond_shape": (
        lambda x: tj.while_loop(lambda v: v > 0, lambda v: v, x),
        TracingError,
        "one boolean scalar",
    ),
    "while_body_shape": (
        lambda x: tj.while_loop(lambda v: v.sum() > 2, lambda v: v[:1], x),
        ShapeError,
        "another shape",
    ),
    "while_body_tree": (
        lambda x: tj.while_loop(lambda v: v.sum() > 2, lambda v: (v,), x),
        TracingError,
        "structure",
    ),
    "scan_carry_shape": (lambda x: tj.scan(lambda c, v: (c[:1], v), x, x), ShapeError, "another shape"),
    "scan_carry_dtype": (lambda x: tj.scan(lambda c, v: (c > 0, v), x, x), DTypeError, "another dtype"),
    "scan_carry_tree": (lambda x: tj.scan(lambda c, v: ((c, c), v), x, x), TracingError, "structure"),
    "scan_no_pair": (lambda x: tj.scan(lambda c, v: c, x, x), TracingError, "pair"),
    "scan_lengths": (lambda x: tj.scan(lambda c, v: (c, v), x, (x, x[:1])), ShapeError, "different sizes"),
    "scan_length": (lambda x: tj.scan(lambda c, v: (c, v), x, x, length=5), ShapeError, "length 5"),
    "scan_nothing": (lambda x: tj.scan(lambda c, v: (c, v), x), ShapeError, "xs or length"),
    "scan_scalar_xs": (lambda x: tj.scan(lambda c, v: (c, v), x, x.sum()), ShapeError, "leading axis"),
    "scan_bad_init": (lambda x: tj.scan(lambda c, v: (c, v), "a", x), DTypeError, "init must consist"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_explained_when_traced(name: str) -> None:
    f, error, words = MISTAKES[name]
    with pytest.raises(error, match=words) as caught:
        traced(f, np.ones(3))
    assert "test_control.py" in str(caught.value), "the message names the user's line"


@pytest.mark.parametrize(
    "name", [n for n in MISTAKES if not n.startswith("branch_") or n == "branch_not_callable"]
)
def test_mistakes_are_explained_as_plain_python(name: str) -> None:
    f, error, words = MISTAKES[name]
    with pytest.raises(error, match=words):
        f(np.ones(3))


def test_python_branching_on_a_carry_points_to_cond() -> None:
    with pytest.raises(ConcretizationError, match=r"tj\.cond"):
        traced(lambda x: tj.scan(lambda c, v: (c if v > 0 else -c, None), x[0], x), np.ones(3))


def test_a_failed_body_leaves_the_trace_usable() -> None:
    def f(x: Any) -> Any:
        with pytest.raises(ZeroDivisionError):
            tj.scan(lambda c, v: (c / (1 // 0), None), x, x)
        return x * 2

    np.testing.assert_array_equal(traced(f, np.ones(2)), [2, 2])


def test_interpret_frees_and_reuses_nothing_it_should_not() -> None:
    (_, attrs), *_ = ops.scan.samples()
    carry, x = np.array([0.5, -1.0, 2.0]), np.array([1.0, 2.0, 3.0])
    before = carry.copy(), x.copy()
    first = interpret(attrs["body_graph"], [carry, x])
    second = interpret(attrs["body_graph"], [carry, x])
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(carry, before[0])
    np.testing.assert_array_equal(x, before[1])
