"""Attention is recognised in its variants, forward and backward, and left alone when the scores are used elsewhere."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import tracejit as tj
from tests.unit.lower_workloads import check, optimised
from tracejit import nn
from tracejit.program import AttentionKernel, Capabilities, Program


def rand(*shape: int, seed: int = 0, dtype: Any = np.float32) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def qkv(
    *batch: int, tq: int = 8, tk: int = 8, d: int = 4, dv: int = 4, dtype: Any = np.float32
) -> list[np.ndarray]:
    shapes = ((*batch, tq, d), (*batch, tk, d), (*batch, tk, dv))
    return [rand(*s, seed=i, dtype=dtype) for i, s in enumerate(shapes)]


def attention_of(fn: Any, *args: Any, caps: Capabilities | None = None) -> list[AttentionKernel]:
    program: Program = check(*optimised(fn, *args), caps, rtol=1e-3, atol=1e-5)
    return [k for k in program.kernels if isinstance(k, AttentionKernel)]


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
@pytest.mark.parametrize("causal", [False, True])
def test_forward_is_one_kernel(batch: tuple[int, ...], causal: bool) -> None:
    fn = lambda q, k, v: nn.scaled_dot_product_attention(q, k, v, is_causal=causal)  # noqa: E731
    (kernel,) = attention_of(fn, *qkv(*batch))
    assert (kernel.batch, kernel.causal, kernel.grad, kernel.lse) == (batch, causal, False, None)
    assert kernel.scale == pytest.approx(0.5)


def test_cross_attention_and_float64() -> None:
    fn = lambda q, k, v: nn.scaled_dot_product_attention(q, k, v, scale=0.1)  # noqa: E731
    (kernel,) = attention_of(fn, *qkv(2, tq=5, tk=7, d=3, dv=6, dtype=np.float64))
    assert (kernel.tq, kernel.tk, kernel.d, kernel.dv_dim) == (5, 7, 3, 6)
    assert kernel.dtype == np.float64 and kernel.scale == pytest.approx(0.1)


@pytest.mark.parametrize("mask", ["bool", "float"])
def test_masks(mask: str) -> None:
    fn = lambda q, k, v, m: nn.scaled_dot_product_attention(q, k, v, mask=m)  # noqa: E731
    m = np.tril(np.ones((8, 8), bool)) if mask == "bool" else rand(3, 8, 8, seed=9)
    (kernel,) = attention_of(fn, *qkv(2, 3), m)
    assert kernel.mask is not None
    assert kernel.mask.strides == ((0, 0, 8, 1) if mask == "bool" else (0, 64, 8, 1))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_backward_is_one_kernel(causal: bool, masked: bool) -> None:
    mask = rand(8, 8, seed=7) > -1.0
    np.fill_diagonal(mask, True)

    def loss(q: Any, k: Any, v: Any, g: Any, m: Any) -> Any:
        return (
            nn.scaled_dot_product_attention(q, k, v, mask=m if masked else None, is_causal=causal) * g
        ).sum()

    fn = lambda q, k, v, g, m: tj.value_and_grad(loss, wrt=(0, 1, 2))(q, k, v, g, m)  # noqa: E731
    kernels = attention_of(fn, *qkv(2, 3), rand(2, 3, 8, 4, seed=5), mask)
    assert [k.grad for k in kernels] == [False, True]
    assert kernels[0].lse is not None and kernels[1].dq is not None and kernels[1].causal == causal


def test_gradients_go_straight_into_the_fused_projection() -> None:
    """q, k and v are slices of one product; their gradients are written side by side for the next product."""

    def loss(x: Any, w: Any) -> Any:
        h = (x @ w).reshape(2, 8, 3, 2, 4).transpose(2, 0, 3, 1, 4)
        o = nn.scaled_dot_product_attention(h[0], h[1], h[2], is_causal=True)
        return np.tanh(o.transpose(0, 2, 1, 3).reshape(2, 8, 8)).sum()

    fn = lambda x, w: tj.grad(loss, wrt=(0, 1))(x, w)  # noqa: E731
    _, backward = attention_of(fn, rand(2, 8, 8), rand(8, 24))
    assert backward.dq is not None and backward.dk is not None and backward.dv is not None
    assert backward.dq.buffer == backward.dk.buffer == backward.dv.buffer
    assert [a.offset for a in (backward.dq, backward.dk, backward.dv)] == [0, 8, 16]
    assert backward.dq.strides == (192, 4, 24, 1)


def test_output_has_the_layout_that_the_next_product_wants() -> None:
    def fn(q: Any, k: Any, v: Any, w: Any) -> Any:
        return nn.scaled_dot_product_attention(q, k, v).transpose(0, 2, 1, 3).reshape(2, 8, 12) @ w

    (kernel,) = attention_of(fn, *qkv(2, 3), rand(12, 5))
    assert kernel.out is not None and kernel.out.strides == (96, 4, 12, 1)


def test_scores_used_elsewhere() -> None:
    def fn(q: Any, k: Any, v: Any) -> Any:
        p = nn.softmax(q @ k.T)
        return p @ v, p

    assert attention_of(fn, *qkv()) == []


def test_dropout_and_missing_gradients_fall_back() -> None:
    def loss(q: Any, k: Any, v: Any) -> Any:
        return nn.scaled_dot_product_attention(q, k, v).sum()

    assert attention_of(lambda q, k, v: tj.grad(loss, wrt=0)(q, k, v), *qkv(2)) == []


def test_backends_may_have_none_or_only_small_heads() -> None:
    fn = lambda q, k, v: nn.scaled_dot_product_attention(q, k, v)  # noqa: E731
    assert attention_of(fn, *qkv(2), caps=Capabilities(attention=False)) == []
    assert attention_of(fn, *qkv(2), caps=Capabilities(attention_dim=2)) == []


def test_masked_rows_give_nan_like_the_composite() -> None:
    mask = np.ones((8, 8), bool)
    mask[3] = False
    fn = lambda q, k, v, m: nn.scaled_dot_product_attention(q, k, v, mask=m)  # noqa: E731
    assert len(attention_of(fn, *qkv(2), mask)) == 1
