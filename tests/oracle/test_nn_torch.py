"""nn and optim against PyTorch: values on arrays, values in traced code, gradients, whole optimiser
trajectories.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

import tracejit as tj
from tracejit import nn, optim

torch = pytest.importorskip("torch")
F = torch.nn.functional


@pytest.fixture(autouse=True)
def reference_backend() -> Iterator[None]:
    """These tests are about nn, not about devices: they run on the oracle of all backends."""
    with tj.device("numpy"):
        yield


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape) * scale


@dataclass
class Case:
    """One function: ours and torch's, on the same float64 arrays; gradients are taken for all of them."""

    name: str
    ours: Callable[..., Any]
    theirs: Callable[..., Any]
    arrays: tuple[np.ndarray, ...]

    def __repr__(self) -> str:
        return self.name


X = normal(4, 7, scale=3.0)
LABELS = np.array([0, 3, 6, 2])
IDS = np.array([[1, 4, 1], [0, 2, 4]])
IMAGES = normal(2, 4, 9, 8, seed=1)
Q, K, V = normal(2, 3, 5, 8, seed=2), normal(2, 3, 6, 8, seed=3), normal(2, 3, 6, 4, seed=4)
MASK = np.random.default_rng(5).random((2, 1, 5, 6)) > 0.4
MASK[..., 0] = True
BIAS = normal(5, 6, seed=6)
T = torch.from_numpy

CASES = [
    *(
        Case(name, getattr(nn, name), theirs, (X,))
        for name, theirs in {
            "relu": F.relu,
            "leaky_relu": F.leaky_relu,
            "elu": F.elu,
            "sigmoid": torch.sigmoid,
            "silu": F.silu,
            "softplus": F.softplus,
            "tanh": torch.tanh,
            "gelu": F.gelu,
        }.items()
    ),
    Case("gelu_tanh", lambda x: nn.gelu(x, "tanh"), lambda x: F.gelu(x, approximate="tanh"), (X,)),
    Case("leaky_relu_slope", lambda x: nn.leaky_relu(x, 0.3), lambda x: F.leaky_relu(x, 0.3), (X,)),
    Case("elu_alpha", lambda x: nn.elu(x, 0.3), lambda x: F.elu(x, 0.3), (X,)),
    *(
        Case(
            f"{name}_axis{axis}",
            lambda x, n=name, a=axis: getattr(nn, n)(x, a),
            lambda x, f=f, a=axis: f(x, a),
            (X,),
        )
        for name, f in {
            "softmax": F.softmax,
            "log_softmax": F.log_softmax,
            "logsumexp": torch.logsumexp,
        }.items()
        for axis in (0, -1)
    ),
    Case("logsumexp_all", lambda x: nn.logsumexp(x, None), lambda x: torch.logsumexp(x, (0, 1)), (X,)),
    Case(
        "layer_norm",
        nn.layer_norm,
        lambda x, w, b: F.layer_norm(x, (7,), w, b),
        (X, normal(7), normal(7, seed=1)),
    ),
    Case("layer_norm_plain", nn.layer_norm, lambda x: F.layer_norm(x, (7,)), (X,)),
    Case(
        "layer_norm_eps", lambda x: nn.layer_norm(x, eps=0.1), lambda x: F.layer_norm(x, (7,), eps=0.1), (X,)
    ),
    Case(
        "rms_norm",
        lambda x, w: nn.rms_norm(x, w, 1e-5),
        lambda x, w: F.rms_norm(x, (7,), w, 1e-5),
        (X, normal(7)),
    ),
    Case(
        "group_norm",
        lambda x, w, b: nn.group_norm(x, 2, w, b),
        lambda x, w, b: F.group_norm(x, 2, w, b),
        (IMAGES, normal(4), normal(4, seed=1)),
    ),
    Case("linear", nn.linear, F.linear, (X, normal(5, 7), normal(5))),
    Case("linear_vector", nn.linear, F.linear, (normal(7), normal(5, 7))),
    Case("embedding", lambda w: nn.embedding(IDS, w), lambda w: F.embedding(T(IDS), w), (normal(5, 3),)),
    Case(
        "cross_entropy", lambda x: nn.cross_entropy(x, LABELS), lambda x: F.cross_entropy(x, T(LABELS)), (X,)
    ),
    Case(
        "cross_entropy_smooth",
        lambda x: nn.cross_entropy(x, LABELS, 0.2),
        lambda x: F.cross_entropy(x, T(LABELS), label_smoothing=0.2),
        (X,),
    ),
    Case(
        "cross_entropy_ignore",
        lambda x: nn.cross_entropy(x, LABELS, ignore_index=3),
        lambda x: F.cross_entropy(x, T(LABELS), ignore_index=3),
        (X,),
    ),
    Case(
        "cross_entropy_none",
        lambda x: nn.cross_entropy(x, LABELS, reduction="none"),
        lambda x: F.cross_entropy(x, T(LABELS), reduction="none"),
        (X,),
    ),
    Case(
        "cross_entropy_sequences",
        lambda x: nn.cross_entropy(x.reshape(2, 2, 7), LABELS.reshape(2, 2), reduction="sum"),
        lambda x: F.cross_entropy(x, T(LABELS), reduction="sum"),
        (X,),
    ),
    Case(
        "nll_loss",
        lambda x: nn.nll_loss(nn.log_softmax(x), LABELS, ignore_index=6),
        lambda x: F.nll_loss(F.log_softmax(x, -1), T(LABELS), ignore_index=6),
        (X,),
    ),
    Case("mse_loss", nn.mse_loss, F.mse_loss, (X, normal(4, 7, seed=9))),
    Case("l1_loss", nn.l1_loss, F.l1_loss, (X, normal(4, 7, seed=9))),
    Case(
        "huber_loss",
        lambda x, y: nn.huber_loss(x, y, 1.5),
        lambda x, y: F.huber_loss(x, y, delta=1.5),
        (X, normal(4, 7)),
    ),
    Case(
        "bce",
        nn.binary_cross_entropy_with_logits,
        F.binary_cross_entropy_with_logits,
        (X, np.random.default_rng(1).random((4, 7))),
    ),
    Case("attention", nn.scaled_dot_product_attention, F.scaled_dot_product_attention, (Q, K, V)),
    Case(
        "attention_causal",
        lambda q, k, v: nn.scaled_dot_product_attention(q, k, v, is_causal=True),
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        (Q, K, V),
    ),
    Case(
        "attention_bool_mask",
        lambda q, k, v: nn.scaled_dot_product_attention(q, k, v, MASK),
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, T(MASK)),
        (Q, K, V),
    ),
    Case(
        "attention_float_mask",
        lambda q, k, v, m: nn.scaled_dot_product_attention(q, k, v, m, scale=0.3),
        lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, m, scale=0.3),
        (Q, K, V, BIAS),
    ),
    Case(
        "attention_causal_and_mask",
        lambda q, k, v: nn.scaled_dot_product_attention(q, k, v, MASK, is_causal=True),
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, T(MASK & np.tril(np.ones((5, 6), bool)))),
        (Q, K, V),
    ),
    Case("conv2d", nn.conv2d, F.conv2d, (IMAGES, normal(6, 4, 3, 3), normal(6))),
    Case(
        "conv2d_everything",
        lambda x, w, b: nn.conv2d(x, w, b, (2, 1), (1, 2), (1, 2), 2),
        lambda x, w, b: F.conv2d(x, w, b, (2, 1), (1, 2), (1, 2), 2),
        (IMAGES, normal(6, 2, 3, 2), normal(6)),
    ),
    Case(
        "conv2d_same",
        lambda x, w: nn.conv2d(x, w, padding="same"),
        lambda x, w: F.conv2d(x, w, padding="same"),
        (IMAGES, normal(6, 4, 3, 4)),
    ),
    Case("conv2d_unbatched", nn.conv2d, F.conv2d, (IMAGES[0], normal(6, 4, 3, 3))),
    Case("max_pool2d", lambda x: nn.max_pool2d(x, 2), lambda x: F.max_pool2d(x, 2), (IMAGES,)),
    Case(
        "max_pool2d_padded",
        lambda x: nn.max_pool2d(x, 3, 2, 1),
        lambda x: F.max_pool2d(x, 3, 2, 1),
        (IMAGES,),
    ),
    Case(
        "avg_pool2d",
        lambda x: nn.avg_pool2d(x, (3, 2), (1, 2)),
        lambda x: F.avg_pool2d(x, (3, 2), (1, 2)),
        (IMAGES,),
    ),
    Case(
        "avg_pool2d_padded",
        lambda x: nn.avg_pool2d(x, 3, 2, 1),
        lambda x: F.avg_pool2d(x, 3, 2, 1),
        (IMAGES,),
    ),
]


def with_dtype(arrays: tuple[np.ndarray, ...], dtype: str) -> list[np.ndarray]:
    return [a.astype(dtype) for a in arrays]


TOLERANCE = {"float32": 2e-5, "float64": 1e-11}


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("case", CASES, ids=repr)
def test_values_on_arrays_and_in_traced_code(case: Case, dtype: str) -> None:
    arrays = with_dtype(case.arrays, dtype)
    expected = case.theirs(*(T(a) for a in arrays)).numpy()
    for got in (case.ours(*arrays), tj.trace(lambda *a: case.ours(*a))(*arrays)):
        assert (got.shape, got.dtype) == (expected.shape, np.dtype(dtype))
        np.testing.assert_allclose(got, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("case", CASES, ids=repr)
def test_gradients(case: Case) -> None:
    """Of a weighted sum, so that no symmetry of the cotangent hides a mistake."""
    weights = normal(*np.shape(case.ours(*case.arrays)), seed=11)
    ours = tj.grad(lambda *a: np.sum(case.ours(*a) * weights), wrt=tuple(range(len(case.arrays))))(
        *case.arrays
    )
    tensors = [T(a.copy()).requires_grad_() for a in case.arrays]
    (case.theirs(*tensors) * T(np.asarray(weights))).sum().backward()
    for got, tensor in zip(ours, tensors, strict=True):
        np.testing.assert_allclose(got, tensor.grad.numpy(), rtol=1e-9, atol=1e-10)


SECOND_ORDER = ["silu", "gelu", "gelu_tanh", "softplus", "sigmoid", "softmax_axis-1", "log_softmax_axis-1"]
SECOND_ORDER += [
    "logsumexp_axis-1",
    "layer_norm",
    "rms_norm",
    "cross_entropy_smooth",
    "bce",
    "attention_causal",
]


@pytest.mark.parametrize("case", [c for c in CASES if c.name in SECOND_ORDER], ids=repr)
def test_second_derivatives(case: Case) -> None:
    """Of the squared gradient norm with respect to all arguments."""
    everything = tuple(range(len(case.arrays)))
    weights = normal(*np.shape(case.ours(*case.arrays)), seed=11)

    def penalty(*arrays: Any) -> Any:
        first = tj.grad(lambda *a: np.sum(case.ours(*a) * weights), wrt=everything)(*arrays)
        return sum(np.sum(g * g) for g in first)

    ours = tj.grad(penalty, wrt=everything)(*case.arrays)
    tensors = [T(a.copy()).requires_grad_() for a in case.arrays]
    value = (case.theirs(*tensors) * T(np.asarray(weights))).sum()
    first = torch.autograd.grad(value, tensors, create_graph=True)
    sum((g * g).sum() for g in first).backward()
    for got, tensor in zip(ours, tensors, strict=True):
        expected = np.zeros(tensor.shape) if tensor.grad is None else tensor.grad.numpy()
        np.testing.assert_allclose(got, expected, rtol=1e-8, atol=1e-9)


# -- modules -------------------------------------------------------------------------------------------------


def test_multi_head_attention_matches_torch() -> None:
    ours = nn.MultiHeadAttention(8, 2, rng=np.random.default_rng(0), dtype=np.float64)
    theirs = torch.nn.MultiheadAttention(8, 2, batch_first=True, dtype=torch.float64)
    theirs.in_proj_weight.data, theirs.in_proj_bias.data = T(ours.qkv.weight), T(ours.qkv.bias)
    theirs.out_proj.weight.data, theirs.out_proj.bias.data = T(ours.proj.weight), T(ours.proj.bias)
    x, context = normal(3, 5, 8), normal(3, 4, 8, seed=1)
    real = np.array([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]], bool)
    expected, _ = theirs(T(x), T(context), T(context), key_padding_mask=~T(real))
    np.testing.assert_allclose(
        ours(x, context, padding_mask=real), expected.detach().numpy(), rtol=1e-10, atol=1e-12
    )
    causal, _ = theirs(T(x), T(x), T(x), attn_mask=torch.triu(torch.ones(5, 5, dtype=torch.bool), 1))
    np.testing.assert_allclose(ours(x, is_causal=True), causal.detach().numpy(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("norm_first", [True, False])
def test_transformer_block_matches_torch_with_gradients(norm_first: bool) -> None:
    ours = nn.TransformerBlock(
        8, 2, rng=np.random.default_rng(0), hidden=16, norm_first=norm_first, dtype=np.float64
    )
    theirs = torch.nn.TransformerEncoderLayer(
        8, 2, 16, 0.0, "gelu", batch_first=True, norm_first=norm_first, dtype=torch.float64
    )
    pairs = {
        theirs.self_attn.in_proj_weight: ("attn", "qkv", "weight"),
        theirs.self_attn.in_proj_bias: ("attn", "qkv", "bias"),
        theirs.self_attn.out_proj.weight: ("attn", "proj", "weight"),
        theirs.self_attn.out_proj.bias: ("attn", "proj", "bias"),
        theirs.linear1.weight: ("mlp", "up", "weight"),
        theirs.linear1.bias: ("mlp", "up", "bias"),
        theirs.linear2.weight: ("mlp", "down", "weight"),
        theirs.linear2.bias: ("mlp", "down", "bias"),
        theirs.norm1.weight: ("norm1", "weight"),
        theirs.norm2.bias: ("norm2", "bias"),
    }

    def find(tree: Any, path: tuple[str, ...]) -> Any:
        for name in path:
            tree = getattr(tree, name)
        return tree

    for parameter, path in pairs.items():
        parameter.data = T(find(ours, path).copy())
    x, weights = normal(2, 5, 8), normal(2, 5, 8, seed=1)
    value, grads = tj.value_and_grad(lambda block, x: np.sum(block(x) * weights))(ours, x)
    expected = (theirs(T(x)) * T(weights)).sum()
    expected.backward()
    np.testing.assert_allclose(value, expected.item(), rtol=1e-10)
    for parameter, path in pairs.items():
        np.testing.assert_allclose(
            find(grads, path), parameter.grad.numpy(), rtol=1e-8, atol=1e-10, err_msg=str(path)
        )


# -- optimisers ----------------------------------------------------------------------------------------------

OPTIMISERS = {
    "sgd": (lambda: optim.sgd(0.1), lambda p: torch.optim.SGD(p, 0.1)),
    "momentum": (lambda: optim.momentum(0.1, 0.8), lambda p: torch.optim.SGD(p, 0.1, 0.8)),
    "nesterov_decay": (
        lambda: optim.nesterov(0.1, weight_decay=0.02),
        lambda p: torch.optim.SGD(p, 0.1, 0.9, weight_decay=0.02, nesterov=True),
    ),
    "rmsprop": (
        lambda: optim.rmsprop(0.01, momentum=0.5, weight_decay=0.1),
        lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.5, weight_decay=0.1),
    ),
    "adam": (
        lambda: optim.adam(0.01, weight_decay=0.1),
        lambda p: torch.optim.Adam(p, 0.01, weight_decay=0.1),
    ),
    "adamw": (
        lambda: optim.adamw(0.01, betas=(0.8, 0.99), weight_decay=0.1),
        lambda p: torch.optim.AdamW(p, 0.01, betas=(0.8, 0.99), weight_decay=0.1),
    ),
}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("traced", [False, True], ids=["arrays", "traced"])
@pytest.mark.parametrize("name", OPTIMISERS)
def test_optimiser_follows_torch_for_30_steps(name: str, traced: bool, dtype: str) -> None:
    make_ours, make_theirs = OPTIMISERS[name]
    params = {"w": normal(3, 2).astype(dtype), "deep": [normal(4, seed=1).astype(dtype)]}
    tensors = [torch.nn.Parameter(T(params["w"].copy())), torch.nn.Parameter(T(params["deep"][0].copy()))]
    ours, theirs = make_ours(), make_theirs(tensors)
    update = tj.trace(ours.update) if traced else ours.update
    state = ours.init(params)
    for step in range(30):
        grads = {
            "w": normal(3, 2, seed=step).astype(dtype),
            "deep": [normal(4, seed=100 + step).astype(dtype)],
        }
        tensors[0].grad, tensors[1].grad = T(grads["w"]), T(grads["deep"][0])
        theirs.step()
        params, state = update(params, grads, state)
    tolerance = 2e-5 if dtype == "float32" else 1e-10
    for got, tensor in zip((params["w"], params["deep"][0]), tensors, strict=True):
        assert got.dtype == np.dtype(dtype)
        np.testing.assert_allclose(got, tensor.detach().numpy(), rtol=tolerance, atol=tolerance)


def test_clip_by_global_norm_matches_torch() -> None:
    grads = {"a": normal(3, 2, scale=5.0), "b": normal(4, seed=1)}
    tensors = [
        torch.nn.Parameter(torch.zeros(3, 2, dtype=torch.float64)),
        torch.nn.Parameter(torch.zeros(4, dtype=torch.float64)),
    ]
    tensors[0].grad, tensors[1].grad = T(grads["a"].copy()), T(grads["b"].copy())
    norm = torch.nn.utils.clip_grad_norm_(tensors, 1.5)
    clipped = optim.clip_by_global_norm(1.5)(grads)
    np.testing.assert_allclose(optim.global_norm(grads), norm.item())
    np.testing.assert_allclose(clipped["a"], tensors[0].grad.numpy(), rtol=1e-6)
    np.testing.assert_allclose(clipped["b"], tensors[1].grad.numpy(), rtol=1e-6)
