"""The functional forms of nn: dtypes, huge inputs, bad input, scopes and captured arrays (values:
tests/oracle).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import tracejit as tj
from tracejit import nn


@pytest.fixture(autouse=True)
def reference_backend() -> Iterator[None]:
    """These tests are about nn, not about devices: they run on the oracle of all backends."""
    with tj.device("numpy"):
        yield


FLOATS = ["float16", "float32", "float64"]
RNG = np.random.default_rng(0)
X = RNG.standard_normal((3, 4))
LABELS = np.array([0, 3, 1])

FORMS: dict[str, Callable[[Any], Any]] = {
    **{
        name: getattr(nn, name)
        for name in ("relu", "leaky_relu", "elu", "sigmoid", "silu", "softplus", "tanh")
    },
    **{
        name: getattr(nn, name)
        for name in ("gelu", "softmax", "log_softmax", "logsumexp", "layer_norm", "rms_norm")
    },
    "gelu_tanh": lambda x: nn.gelu(x, "tanh"),
    "group_norm": lambda x: nn.group_norm(x, 2),
    "cross_entropy": lambda x: nn.cross_entropy(x, LABELS, 0.1, ignore_index=3),
    "nll_loss": lambda x: nn.nll_loss(x, LABELS),
    "mse_loss": lambda x: nn.mse_loss(x, x * 2),
    "l1_loss": lambda x: nn.l1_loss(x, x * 2),
    "huber_loss": lambda x: nn.huber_loss(x, x * 2),
    "bce": lambda x: nn.binary_cross_entropy_with_logits(x, np.ones((3, 4), bool)),
    "linear": lambda x: nn.linear(x, x),
    "attention": lambda x: nn.scaled_dot_product_attention(x, x, x, is_causal=True),
    "rotary": nn.rotary,
    "dropout": lambda x: nn.dropout(x, 0.5, tj.random.key(0)),
    "conv2d": lambda x: nn.conv2d(x[None], x[None, None, :2, :2], padding=1),
    "max_pool2d": lambda x: nn.max_pool2d(x[None], 2),
    "avg_pool2d": lambda x: nn.avg_pool2d(x[None], 2),
}


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", FORMS)
def test_dtype_is_kept_on_arrays_and_in_traced_code_and_the_two_agree(name: str, dtype: str) -> None:
    x = X.astype(dtype)
    concrete = FORMS[name](x)
    traced = tj.trace(FORMS[name])(x)
    assert concrete.dtype == traced.dtype == np.dtype(dtype)
    assert concrete.shape == traced.shape
    np.testing.assert_allclose(traced, concrete, rtol=1e-2 if dtype == "float16" else 1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", FLOATS)
def test_gradients_keep_the_dtype(dtype: str) -> None:
    def everything(x: Any) -> Any:
        return sum(np.sum(FORMS[name](x)) for name in FORMS)

    grad = tj.grad(everything)(X.astype(dtype))
    assert grad.dtype == np.dtype(dtype)
    assert np.isfinite(grad).all()


@pytest.mark.parametrize("name", ["gelu", "sigmoid", "softmax", "layer_norm"])
def test_integers_become_float64(name: str) -> None:
    assert FORMS[name](np.array([[1, 2], [3, 5]])).dtype == np.float64


def test_relu_keeps_integers_and_nan() -> None:
    assert nn.relu(np.array([-1, 2])).dtype == np.int64
    assert np.isnan(nn.relu(np.array([np.nan]))).all()


def test_relu_gradient_at_zero_is_zero() -> None:
    np.testing.assert_array_equal(
        tj.grad(lambda x: np.sum(nn.relu(x)))(np.array([-1.0, 0.0, 2.0])), [0, 0, 1]
    )


# -- huge and extreme inputs ---------------------------------------------------------------------------------

HUGE = np.array([[1e4, -1e4, 0.0], [3e38, -3e38, 0.0], [-3e38, -3e38, -3e38]], np.float32)


@pytest.mark.parametrize("name", ["softmax", "sigmoid", "softplus", "silu", "elu", "gelu"])
def test_huge_inputs_give_no_overflow_and_finite_gradients(name: str) -> None:
    form = getattr(nn, name)
    with np.errstate(over="raise", invalid="raise"):
        assert np.isfinite(form(np.array([[1e4, -1e4, 0.0]], np.float32))).all()
    assert np.isfinite(tj.grad(lambda x: np.sum(form(x)))(np.array([[1e4, -1e4, 0.0]], np.float32))).all()


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_softmax_of_the_largest_floats() -> None:
    np.testing.assert_array_equal(nn.softmax(HUGE)[:2], [[1, 0, 0], [1, 0, 0]])
    np.testing.assert_allclose(nn.softmax(HUGE)[2], [1 / 3] * 3, rtol=1e-6)


def test_softmax_of_minus_infinity_is_zero_there() -> None:
    np.testing.assert_array_equal(nn.softmax(np.array([-np.inf, 0.0, 0.0])), [0, 0.5, 0.5])
    assert np.isfinite(tj.grad(lambda x: nn.softmax(x)[1])(np.array([-np.inf, 0.0, 0.0]))).all()


def test_logsumexp_at_infinity() -> None:
    x = np.array([[-np.inf, -np.inf], [np.inf, 0.0], [1000.0, 1000.0]])
    np.testing.assert_allclose(nn.logsumexp(x), [-np.inf, np.inf, 1000 + np.log(2)])
    assert nn.logsumexp(x, axis=(0, 1), keepdims=True).shape == (1, 1)


def test_cross_entropy_of_huge_logits() -> None:
    logits = np.array([[1e4, -1e4], [1e30, 0.0]], np.float32)
    np.testing.assert_allclose(nn.cross_entropy(logits, np.array([0, 0])), 0)
    np.testing.assert_allclose(nn.cross_entropy(logits[:1], np.array([1])), 2e4)
    grad = tj.grad(lambda z: nn.cross_entropy(z, np.array([1, 1])))(logits)
    np.testing.assert_allclose(grad, [[0.5, -0.5], [0.5, -0.5]])


def test_binary_cross_entropy_of_huge_logits() -> None:
    logits = np.array([1e4, -1e4], np.float32)
    assert nn.binary_cross_entropy_with_logits(logits, np.array([1, 0])) == 0
    assert nn.binary_cross_entropy_with_logits(logits, np.array([0, 1])) == 1e4


def test_float16_norms_do_not_overflow() -> None:
    x = np.array([[6e4, -6e4, 0, 0]], np.float16)  # squares are far above 65504
    np.testing.assert_allclose(nn.layer_norm(x), [[2**0.5, -(2**0.5), 0, 0]], rtol=1e-3)
    np.testing.assert_allclose(nn.rms_norm(x), [[2**0.5, -(2**0.5), 0, 0]], rtol=1e-3)


def test_layer_norm_of_a_constant_row_is_the_bias() -> None:
    x, bias = np.full((2, 4), 7.0), np.arange(4.0)
    np.testing.assert_array_equal(nn.layer_norm(x, np.ones(4), bias), [bias, bias])


def test_layer_norm_gradients_have_their_closed_form() -> None:
    """dx = rstd (dh - mean(dh) - xhat mean(dh xhat)), dh = g gamma; dgamma = sum g xhat; dbeta = sum g."""
    rng = np.random.default_rng(3)
    x, gamma, beta, g = (
        rng.standard_normal((5, 6)),
        rng.standard_normal(6),
        rng.standard_normal(6),
        rng.standard_normal((5, 6)),
    )
    dx, dgamma, dbeta = tj.grad(lambda *a: np.sum(nn.layer_norm(*a) * g), wrt=(0, 1, 2))(x, gamma, beta)
    rstd = 1 / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    xhat, dh = (x - x.mean(-1, keepdims=True)) * rstd, g * gamma
    expected = rstd * (dh - dh.mean(-1, keepdims=True) - xhat * (dh * xhat).mean(-1, keepdims=True))
    np.testing.assert_allclose(dx, expected, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(dgamma, (g * xhat).sum(0), rtol=1e-10)
    np.testing.assert_allclose(dbeta, g.sum(0), rtol=1e-10)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_layer_norm_gradients_match_finite_differences(which: int) -> None:
    rng = np.random.default_rng(4)
    args = [rng.standard_normal((3, 5)), rng.standard_normal(5), rng.standard_normal(5)]
    weights = rng.standard_normal((3, 5))

    def f(*a: Any) -> Any:
        return np.sum(nn.layer_norm(*a) * weights)

    grad = tj.grad(f, wrt=which)(*args)
    numeric = np.zeros_like(args[which])
    for index in np.ndindex(numeric.shape):
        values = []
        for step in (1e-5, -1e-5):
            moved = [a.copy() for a in args]
            moved[which][index] += step
            values.append(f(*moved))
        numeric[index] = (values[0] - values[1]) / 2e-5
    np.testing.assert_allclose(grad, numeric, rtol=1e-6, atol=1e-8)


# -- labels --------------------------------------------------------------------------------------------------


def test_cross_entropy_ignores_rows_in_the_mean_too() -> None:
    logits = RNG.standard_normal((4, 3))
    kept = nn.cross_entropy(logits[:2], np.array([0, 1]))
    np.testing.assert_allclose(
        nn.cross_entropy(logits, np.array([0, 1, -100, -100]), ignore_index=-100), kept
    )
    grad = tj.grad(lambda z: nn.cross_entropy(z, np.array([0, 1, -100, -100]), ignore_index=-100))(logits)
    assert (grad[2:] == 0).all()


def test_cross_entropy_of_nothing_is_nan_as_in_numpy_means() -> None:
    assert np.isnan(nn.cross_entropy(np.ones((2, 3)), np.array([9, 9]), ignore_index=9))


def test_cross_entropy_captures_closed_over_labels_by_reference() -> None:
    """The conversion of the labels inside must be recorded, not computed once at trace time."""
    labels = np.array([0, 1], np.int64)
    logits = np.array([[5.0, 0.0], [5.0, 0.0]])
    loss = tj.trace(lambda z: nn.cross_entropy(z, labels, reduction="none"))
    before = np.array(loss(logits))
    labels[:] = 1, 0
    np.testing.assert_allclose(loss(logits), before[::-1])


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", "int64", "uint64"])
def test_labels_of_every_integer_dtype(dtype: str) -> None:
    logits = RNG.standard_normal((3, 4)).astype(np.float32)
    expected = nn.cross_entropy(logits, LABELS)
    assert nn.cross_entropy(logits, LABELS.astype(dtype)) == expected
    np.testing.assert_allclose(tj.trace(nn.cross_entropy)(logits, LABELS.astype(dtype)), expected, rtol=1e-6)


@pytest.mark.parametrize("bad", [-1, 4])
def test_labels_out_of_range(bad: int) -> None:
    with pytest.raises(tj.IndexingError, match=rf"label {bad} is not one of the 4 classes"):
        nn.cross_entropy(X, np.array([0, bad, 1]))


def test_float_labels() -> None:
    with pytest.raises(tj.DTypeError, match="labels must be integers"):
        nn.cross_entropy(X, np.array([0.0, 1.0, 2.0]))


@pytest.mark.parametrize("shape", [(2,), (3, 1), (3, 4), ()])
def test_labels_of_a_wrong_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(
        tj.ShapeError, match="labels must have the shape of the scores without their last axis"
    ):
        nn.cross_entropy(X, np.zeros(shape, int))


def test_one_hot() -> None:
    np.testing.assert_array_equal(nn.one_hot(np.array([[0, 2]]), 3), [[[1, 0, 0], [0, 0, 1]]])
    assert nn.one_hot([1], 3).dtype == np.float32
    assert tj.trace(lambda i: nn.one_hot(i, 3, bool))(np.array([1])).dtype == np.bool_


# -- embedding and dropout -----------------------------------------------------------------------------------


def test_embedding_gradient_adds_up_repeated_ids() -> None:
    table = np.zeros((3, 2))
    np.testing.assert_array_equal(
        tj.grad(lambda w: np.sum(nn.embedding(np.array([1, 1, 0]), w)))(table), [[1, 1], [2, 2], [0, 0]]
    )


@pytest.mark.parametrize("bad", [-1, 3])
def test_embedding_ids_out_of_range(bad: int) -> None:
    with pytest.raises(tj.IndexingError, match=rf"id {bad} is outside the table of 3 rows"):
        nn.embedding(np.array([0, bad]), np.zeros((3, 2)))


def test_dropout_zeroes_about_p_and_keeps_the_mean() -> None:
    x = np.ones(20_000, np.float32)
    y = nn.dropout(x, 0.25, tj.random.key(3))
    assert abs((y == 0).mean() - 0.25) < 0.02
    np.testing.assert_allclose(np.unique(y), [0, 4 / 3], rtol=1e-6)
    np.testing.assert_array_equal(
        y, tj.trace(nn.dropout, static_argnames="p")(x, p=0.25, key=tj.random.key(3))
    )


def test_dropout_off() -> None:
    x = np.ones(3)
    assert nn.dropout(x, 0.5, training=False) is x
    assert nn.dropout(x, 0.0) is x
    np.testing.assert_array_equal(nn.dropout(x, 1.0, tj.random.key(0)), 0)


@pytest.mark.parametrize("p", [-0.1, 1.1])
def test_dropout_with_a_bad_probability(p: float) -> None:
    with pytest.raises(ValueError, match="p must be between 0 and 1"):
        nn.dropout(np.ones(3), p, tj.random.key(0))


def test_dropout_without_a_key() -> None:
    with pytest.raises(ValueError, match=r"tj\.random\.key"):
        nn.dropout(np.ones(3), 0.5)


# -- attention and positions ---------------------------------------------------------------------------------


def test_attention_is_causal() -> None:
    q = RNG.standard_normal((1, 6, 4))
    changed = q.copy()
    changed[:, 4:] += 10
    before, after = (nn.scaled_dot_product_attention(z, z, z, is_causal=True) for z in (q, changed))
    np.testing.assert_array_equal(before[:, :4], after[:, :4])
    assert not np.allclose(before[:, 4:], after[:, 4:])


def test_attention_records_no_captured_mask() -> None:
    """The causal mask is generated in the kernel: the graph has the three arguments as inputs and nothing
    else.
    """
    q = np.ones((2, 5, 4), np.float32)
    graph = tj.trace(lambda q, k, v: nn.scaled_dot_product_attention(q, k, v, is_causal=True)).graph(q, q, q)
    assert len(graph.inputs) == 3


def test_attention_errors() -> None:
    q = np.ones((2, 5, 4))
    with pytest.raises(tj.ShapeError, match="same number of features"):
        nn.scaled_dot_product_attention(q, np.ones((2, 5, 3)), q)
    with pytest.raises(tj.ShapeError, match="same number of positions"):
        nn.scaled_dot_product_attention(q, q, np.ones((2, 6, 4)))
    with pytest.raises(tj.ShapeError, match="mask must broadcast"):
        nn.scaled_dot_product_attention(q, q, q, np.ones((4, 4), bool))
    with pytest.raises(tj.DTypeError, match="mask must be boolean"):
        nn.scaled_dot_product_attention(q, q, q, np.ones((5, 5), int))


def test_rotary_scores_depend_on_distance_only() -> None:
    q, k = RNG.standard_normal((2, 8))
    at = lambda x, p: nn.rotary(x[None], np.array([p]))[0]  # noqa: E731
    np.testing.assert_allclose(at(q, 3) @ at(k, 1), at(q, 12) @ at(k, 10), rtol=1e-12)
    np.testing.assert_allclose(np.linalg.norm(at(q, 5)), np.linalg.norm(q))
    np.testing.assert_array_equal(at(q, 0), q)


def test_sinusoidal_positions_follow_the_formula() -> None:
    code = nn.sinusoidal_positions(10, 6, np.float64)
    for position in (0, 1, 9):
        for i in range(3):
            angle = position / 10000 ** (2 * i / 6)
            np.testing.assert_allclose(
                code[position, 2 * i : 2 * i + 2], [np.sin(angle), np.cos(angle)], atol=1e-12
            )
    assert nn.sinusoidal_positions(10, 6).dtype == np.float32


# -- shapes that do not fit, in the user's terms -------------------------------------------------------------


@pytest.mark.parametrize("traced", [False, True], ids=["arrays", "traced"])
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda x: nn.linear(x, np.ones((5, 3))),
            r"\[linear\] weight is \(out_features, in_features\).*x: f64\[3,4\].*weight",
        ),
        (lambda x: nn.linear(x, np.ones((5, 4)), np.ones(4)), r"\[linear\] bias must be \(out_features,\)"),
        (
            lambda x: nn.layer_norm(x, np.ones(3)),
            r"\[layer_norm\] weight must have the shape of the last axis of x, \(4,\)",
        ),
        (
            lambda x: nn.mse_loss(x, np.ones((3, 1))),
            r"\[mse_loss\] prediction and target must have the same shape",
        ),
        (lambda x: nn.group_norm(x, 3), r"\[group_norm\] x must be \(n, c, ...\) with c divisible"),
        (lambda x: nn.conv2d(x, np.ones((1, 1, 2, 2))), r"\[conv2d\] x must be \(n, c, h, w\)"),
        (
            lambda x: nn.conv2d(x[None], np.ones((1, 2, 2, 2))),
            r"\[conv2d\] with groups=1 the weight takes 2 input channels",
        ),
        (
            lambda x: nn.conv2d(x[None], np.ones((1, 1, 9, 2))),
            r"\[conv2d\] window 9 is larger than the padded image, 3",
        ),
        (lambda x: nn.max_pool2d(x[None], 2, padding=2), r"\[max_pool2d\] padding must be at most half"),
        (lambda x: nn.max_pool2d(x[None], 0), r"\[max_pool2d\] kernel_size must be an int or a pair"),
        (lambda x: nn.softmax(x, 2), r"\[softmax\] axis 2 is out of bounds"),
        (lambda x: nn.rotary(x[:, :3]), r"\[rotary\] x must be .* even"),
    ],
)
def test_wrong_shapes_name_the_operands_and_the_line(
    call: Callable[[Any], Any], message: str, traced: bool
) -> None:
    with pytest.raises(tj.ShapeError, match=message + r".*test_nn_functional\.py"):
        (tj.trace(call) if traced else call)(X)


def test_other_bad_arguments() -> None:
    with pytest.raises(ValueError, match="approximate must be"):
        nn.gelu(X, "sigmoid")
    with pytest.raises(ValueError, match="reduction must be"):
        nn.mse_loss(X, X, reduction="average")
    with pytest.raises(ValueError, match="label_smoothing must be between 0 and 1"):
        nn.cross_entropy(X, LABELS, label_smoothing=1.5)
    with pytest.raises(tj.DTypeError):
        nn.relu(np.array(["a"]))
    with pytest.raises(tj.DTypeError):
        nn.softmax(np.array([1 + 2j]))


# -- scopes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "scope"),
    [
        (nn.softmax, "softmax"),
        (nn.layer_norm, "layer_norm"),
        (nn.gelu, "gelu"),
        (lambda x: nn.cross_entropy(x, LABELS), "cross_entropy"),
        (lambda x: nn.scaled_dot_product_attention(x, x, x), "attention/softmax"),
    ],
)
def test_every_node_of_a_composite_carries_its_scope(call: Callable[[Any], Any], scope: str) -> None:
    graph = tj.trace(call).graph(X)
    scopes = {node.scope for node in graph.nodes if node.op.name not in ("input", "const")}
    assert scope in scopes
    assert all(s.split("/")[0] == scope.split("/")[0] for s in scopes)


def test_gradient_nodes_live_in_the_scope_of_the_forward_pass() -> None:
    graph = tj.trace(tj.grad(lambda x: np.sum(nn.layer_norm(x) ** 2))).graph(X)
    gradient = [node for node in graph.nodes if node.grad_of is not None]
    assert any(node.scope == "layer_norm" for node in gradient)
