"""nn and optim on every backend: values, gradients and whole training runs agree with the reference backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import optree
import pytest

import tracejit as tj
from tracejit import nn, optim


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


LABELS = np.array([[0, 3, 6, 2], [1, 1, 6, 5]], np.int32)  # no 64-bit integers: WebGPU has none
FORMS: dict[str, tuple[Callable[..., Any], tuple[np.ndarray, ...]]] = {
    **{
        name: (getattr(nn, name), (normal(2, 4, 7) * 3,))
        for name in ("relu", "gelu", "silu", "sigmoid", "softplus", "leaky_relu", "elu", "tanh")
    },
    "gelu_tanh": (lambda x: nn.gelu(x, "tanh"), (normal(2, 4, 7) * 3,)),
    "softmax": (nn.softmax, (normal(2, 4, 70) * 3,)),
    "softmax_axis0": (lambda x: nn.softmax(x, 0), (normal(5, 7) * 3,)),
    "log_softmax": (nn.log_softmax, (normal(2, 4, 7) * 3,)),
    "logsumexp": (nn.logsumexp, (normal(2, 4, 7) * 3,)),
    "layer_norm": (nn.layer_norm, (normal(2, 4, 7), normal(7), normal(7, seed=1))),
    "rms_norm": (nn.rms_norm, (normal(2, 4, 7), normal(7))),
    "group_norm": (lambda x, w: nn.group_norm(x, 2, w), (normal(2, 4, 3, 5), normal(4))),
    "cross_entropy": (lambda x: nn.cross_entropy(x, LABELS, 0.1, ignore_index=6), (normal(2, 4, 7) * 3,)),
    "bce": (nn.binary_cross_entropy_with_logits, (normal(4, 5), np.abs(np.sin(normal(4, 5))))),
    "huber_loss": (nn.huber_loss, (normal(4, 5), normal(4, 5, seed=1))),
    "linear": (nn.linear, (normal(2, 4, 7), normal(5, 7), normal(5))),
    "embedding": (lambda w: nn.embedding(LABELS, w), (normal(7, 6),)),
    "rotary": (nn.rotary, (normal(2, 4, 6),)),
    "attention": (
        nn.scaled_dot_product_attention,
        (normal(2, 3, 5, 8), normal(2, 3, 6, 8), normal(2, 3, 6, 4)),
    ),
    "attention_causal": (
        lambda q, k, v: nn.scaled_dot_product_attention(q, k, v, is_causal=True),
        (normal(2, 3, 33, 16), normal(2, 3, 33, 16, seed=1), normal(2, 3, 33, 16, seed=2)),
    ),
    "attention_masked": (
        lambda q, k, v, m: nn.scaled_dot_product_attention(q, k, v, m),
        (normal(2, 3, 5, 8), normal(2, 3, 6, 8), normal(2, 3, 6, 4), normal(5, 6)),
    ),
    "conv2d": (
        lambda x, w, b: nn.conv2d(x, w, b, 2, 1, 1, 2),
        (normal(2, 4, 9, 8), normal(6, 2, 3, 2), normal(6)),
    ),
    "max_pool2d": (lambda x: nn.max_pool2d(x, 3, 2, 1), (normal(2, 4, 9, 8),)),
    "avg_pool2d": (lambda x: nn.avg_pool2d(x, 3, 2, 1), (normal(2, 4, 9, 8),)),
    "dropout": (lambda x: nn.dropout(x, 0.3, tj.random.key(1)), (normal(2, 4, 7),)),
}


@pytest.mark.parametrize("name", FORMS)
def test_values_and_gradients_agree_with_the_reference(name: str, device: str) -> None:
    form, arrays = FORMS[name]

    @tj.trace
    def both(*a: Any) -> Any:
        y = form(*a)
        weights = np.cos(np.arange(y.size, dtype=np.float32)).reshape(y.shape)
        return y, tj.grad(lambda *b: np.sum(form(*b) * weights), wrt=tuple(range(len(a))))(*a)

    for got, expected in zip(
        optree.tree_leaves(both(*arrays, device=device)),
        optree.tree_leaves(both(*arrays, device="numpy")),
        strict=True,
    ):
        np.testing.assert_allclose(np.asarray(got), expected, rtol=2e-4, atol=2e-5)


class GPT(nn.Module):
    """A Transformer with everything on: rotary and learned positions, gating, RMS norm, dropout."""

    embed: nn.Embedding
    positions: nn.LearnedPositions
    blocks: list[nn.TransformerBlock]
    norm: nn.RMSNorm
    head: nn.Linear

    def __init__(self, rng: np.random.Generator) -> None:
        self.embed, self.positions = nn.Embedding(19, 16, rng=rng), nn.LearnedPositions(12, 16, rng=rng)
        self.blocks = [
            nn.TransformerBlock(
                16, 2, is_causal=True, rng=rng, use_rotary=True, gated=True, norm="rms", dropout=0.1
            ),
            nn.TransformerBlock(16, 4, is_causal=True, rng=rng, norm_first=False, activation="gelu_tanh"),
        ]
        self.norm, self.head = nn.RMSNorm(16), nn.Linear(16, 19, bias=False, rng=rng)

    def __call__(self, ids: Any, key: Any) -> Any:
        x = self.positions(self.embed(ids))
        for block in self.blocks:
            x = block(x, key=key)
        return self.head(self.norm(x))


def make_cnn(rng: np.random.Generator) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1, rng=rng),
        nn.relu,
        nn.MaxPool2d(2),
        nn.Conv2d(4, 8, 3, stride=2, rng=rng),
        nn.GroupNorm(2, 8),
        nn.silu,
        nn.Flatten(),
        nn.Linear(32, 5, rng=rng),
    )


OPTIMISERS = {
    "adamw": lambda: optim.chain(
        optim.clip_by_global_norm(0.5), optim.adamw(optim.warmup_cosine(0.02, 2, 9))
    ),
    "nesterov": lambda: optim.nesterov(0.05, weight_decay=0.01),
    "rmsprop": lambda: optim.chain(optim.clip_by_value(0.1), optim.rmsprop(0.01, eps=1e-3)),
}


@pytest.mark.parametrize("optimiser", OPTIMISERS)
@pytest.mark.parametrize("kind", ["gpt", "cnn"])
def test_training_follows_the_reference(kind: str, optimiser: str, device: str) -> None:
    rng = np.random.default_rng(0)
    if kind == "gpt":
        model: Any = GPT(rng)
        x, y = rng.integers(0, 19, (2, 3, 12), np.int32)
        loss_fn = lambda m, x, y, key: nn.cross_entropy(m(x, key), y)  # noqa: E731
    else:
        model = make_cnn(rng)
        x, y = normal(6, 1, 12, 12), rng.integers(0, 5, 6, np.int32)
        loss_fn = lambda m, x, y, key: nn.cross_entropy(m(x), y)  # noqa: E731
    opt = OPTIMISERS[optimiser]()

    @tj.trace
    def train_step(model: Any, state: Any, x: Any, y: Any, key: Any) -> Any:
        loss, grads = tj.value_and_grad(loss_fn)(model, x, y, key)
        model, state = opt.update(model, grads, state)
        return loss, model, state

    runs = {}
    for where in (device, "numpy"):
        m, s, losses = model, opt.init(model), []
        for step in range(6):
            loss, m, s = train_step(m, s, x, y, tj.random.key(step), device=where)
            losses.append(float(loss))
        runs[where] = losses, m
    np.testing.assert_allclose(runs[device][0], runs["numpy"][0], rtol=2e-3)
    assert runs[device][0][-1] < runs[device][0][0]
    for got, expected in zip(*(optree.tree_leaves(runs[w][1]) for w in (device, "numpy")), strict=True):
        np.testing.assert_allclose(np.asarray(got), expected, rtol=2e-2, atol=5e-3)
