"""The modules of Transformers: attention, feed-forward, block, positions. Used through ``tracejit.nn``.

Dropout is on when a call gets a ``tj.random`` key and off without one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from tracejit import random
from tracejit.errors import ShapeError
from tracejit.nn import init
from tracejit.nn._common import check_integer, iota, named_scope, operand
from tracejit.nn.activations import ACTIVATIONS
from tracejit.nn.attention import rotary, scaled_dot_product_attention, sinusoidal_positions
from tracejit.nn.dense import dropout, linear
from tracejit.nn.layers import LayerNorm, Linear, RMSNorm, Rng, check_positive
from tracejit.nn.module import Module, static_field


def _split(key: Any, count: int) -> list[Any]:
    """``count`` keys, or as many None when there is none."""
    return [None] * count if key is None else list(random.split(key, count))


def _maybe_dropout(x: Any, p: float, key: Any) -> Any:
    return x if key is None or p == 0.0 else dropout(x, p, key)


def _sequence(x: Any, dim: int, name: str, op: str) -> Any:
    x = operand(x, op)
    if x.ndim < 2 or x.shape[-1] != dim:
        raise ShapeError.make(f"{name} must be (..., positions, {dim})", op=op, got={name: x})
    return x


class MultiHeadAttention(Module):
    """Multi-head attention (Vaswani et al., 2017): (..., T, d_model) -> (..., T, d_model).

    Self-attention has one projection ``qkv``. With ``context_dim`` the keys and values come from a
    ``context`` of that many features (cross-attention) through the projections ``query`` and ``kv``.
    ``use_rotary`` turns queries and keys by their positions; ``is_causal`` is the default of the call's.
    """

    qkv: Linear | None
    query: Linear | None
    kv: Linear | None
    proj: Linear
    num_heads: int = static_field()
    is_causal: bool = static_field()
    use_rotary: bool = static_field()
    dropout: float = static_field()

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        *,
        rng: Rng,
        bias: bool = True,
        dropout: float = 0.0,
        is_causal: bool = False,
        use_rotary: bool = False,
        context_dim: int | None = None,
        dtype: Any = np.float32,
    ) -> None:
        check_positive("MultiHeadAttention", d_model=d_model, num_heads=num_heads)
        if d_model % num_heads:
            raise ShapeError.make(
                f"d_model={d_model} does not divide into num_heads={num_heads}", op="MultiHeadAttention"
            )
        if use_rotary and (d_model // num_heads) % 2:
            raise ShapeError.make(
                f"rotary positions need an even head size, got {d_model // num_heads}",
                op="MultiHeadAttention",
            )
        dense = functools.partial(Linear, bias=bias, rng=rng, dtype=dtype)
        self.qkv = dense(d_model, 3 * d_model) if context_dim is None else None
        self.query = dense(d_model, d_model) if context_dim is not None else None
        self.kv = dense(context_dim, 2 * d_model) if context_dim is not None else None
        self.proj = dense(d_model, d_model)
        self.num_heads, self.is_causal, self.use_rotary = int(num_heads), bool(is_causal), bool(use_rotary)
        self.dropout = float(dropout)

    def __call__(
        self,
        x: Any,
        context: Any = None,
        *,
        mask: Any = None,
        padding_mask: Any = None,
        is_causal: bool | None = None,
        key: Any = None,
    ) -> Any:
        """``x``: (..., T, d_model) attends to itself or to ``context``: (..., S, context_dim or d_model).

        ``mask``: broadcasts to (..., heads, T, S), boolean (True takes part) or added; ``padding_mask``:
        (..., S) boolean, True for real positions. Returns (..., T, d_model). ShapeError if they do not fit.
        """
        op = "MultiHeadAttention"
        d_model = self.proj.in_features
        x = _sequence(x, d_model, "x", op)
        with named_scope("qkv"):
            q, k, v = self._project(x, context, op)
        if self.use_rotary:
            q, k = rotary(q), rotary(k)
        if padding_mask is not None:
            mask = _with_padding(mask, operand(padding_mask, op), k, op)
        causal = self.is_causal if is_causal is None else is_causal
        drop_scores, drop_out = _split(key if self.dropout else None, 2)
        y = scaled_dot_product_attention(
            q, k, v, mask, causal, dropout_p=self.dropout if drop_scores is not None else 0.0, key=drop_scores
        )
        y = np.reshape(np.swapaxes(y, -3, -2), x.shape)
        with named_scope("proj"):
            return _maybe_dropout(self.proj(y), self.dropout, drop_out)

    def _project(self, x: Any, context: Any, op: str) -> list[Any]:
        """Queries, keys and values, each (..., heads, positions, head size)."""
        d_model = self.proj.in_features
        if self.qkv is None:
            assert self.query is not None and self.kv is not None
            if context is None:
                raise ShapeError.make("a module built with context_dim needs a context", op=op, got={"x": x})
            context = _sequence(context, self.kv.in_features, "context", op)
            return [*self._heads(self.query(x), 1), *self._heads(self.kv(context), 2)]
        if context is None:
            return self._heads(self.qkv(x), 3)
        context = _sequence(context, d_model, "context", op)
        weight, bias = operand(self.qkv.weight, op), self.qkv.bias
        bias = None if bias is None else operand(bias, op)
        query = linear(x, weight[:d_model], None if bias is None else bias[:d_model])
        pair = linear(context, weight[d_model:], None if bias is None else bias[d_model:])
        return [*self._heads(query, 1), *self._heads(pair, 2)]

    def _heads(self, y: Any, parts: int) -> list[Any]:
        """(..., T, parts * d_model) as ``parts`` arrays (..., heads, T, head size)."""
        *batch, length, width = y.shape
        y = np.reshape(y, (*batch, length, parts, self.num_heads, width // (parts * self.num_heads)))
        y = np.swapaxes(np.moveaxis(y, -3, 0), -3, -2)
        return [y[i] for i in range(parts)]


def _with_padding(mask: Any, padding: Any, keys: Any, op: str) -> Any:
    """``mask`` with the padded positions excluded; ``padding``: (..., S), True for real positions."""
    if padding.dtype != np.bool_ or padding.ndim < 1 or padding.shape[-1] != keys.shape[-2]:
        raise ShapeError.make(
            f"padding_mask must be boolean (..., {keys.shape[-2]}), True for real positions",
            op=op,
            got={"padding_mask": padding},
        )
    real = np.reshape(padding, (*padding.shape[:-1], 1, 1, padding.shape[-1]))
    if mask is None:
        return real
    mask = operand(mask, op)
    return mask & real if mask.dtype == np.bool_ else np.where(real, mask, -np.inf)


class FeedForward(Module):
    """``down(activation(up(x)))``: (..., d_model) -> (..., d_model); ``hidden`` defaults to ``4 * d_model``.

    ``gated`` multiplies the activation by a second projection (Shazeer, 2020: ``activation="silu"`` is
    SwiGLU).
    """

    up: Linear
    gate: Linear | None
    down: Linear
    activation: Callable[[Any], Any] = static_field()
    dropout: float = static_field()

    def __init__(
        self,
        d_model: int,
        hidden: int | None = None,
        activation: str | Callable[[Any], Any] = "gelu",
        *,
        rng: Rng,
        bias: bool = True,
        gated: bool = False,
        dropout: float = 0.0,
        dtype: Any = np.float32,
    ) -> None:
        hidden = 4 * d_model if hidden is None else hidden
        check_positive("FeedForward", d_model=d_model, hidden=hidden)
        self.up = Linear(d_model, hidden, bias, rng=rng, dtype=dtype)
        self.gate = Linear(d_model, hidden, bias, rng=rng, dtype=dtype) if gated else None
        self.down = Linear(hidden, d_model, bias, rng=rng, dtype=dtype)
        self.activation = _activation(activation)
        self.dropout = float(dropout)

    def __call__(self, x: Any, *, key: Any = None) -> Any:
        """(..., d_model) -> (..., d_model)."""
        with named_scope("up"):
            h = self.up(x)
        h = self.activation(h)
        if self.gate is not None:
            with named_scope("gate"):
                h = h * self.gate(x)
        with named_scope("down"):
            return _maybe_dropout(self.down(h), self.dropout, key)


def _activation(activation: str | Callable[[Any], Any]) -> Callable[[Any], Any]:
    if callable(activation):
        return activation
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"unknown activation {activation!r}; known: {', '.join(ACTIVATIONS)}, or any function"
        )
    return ACTIVATIONS[activation]


class TransformerBlock(Module):
    """Attention and feed-forward, each with a residual connection: (..., T, d_model) -> (..., T, d_model).

    Pre-norm ``x + f(norm(x))`` by default (GPT-2); ``norm_first=False`` is the post-norm ``norm(x + f(x))``
    of Vaswani et al. (2017). ``norm`` is "layer" or "rms". ``cross_attention`` (True, or the context's number
    of features) adds attention to a context between the two. Successive blocks of a trace get the scopes
    ``block0``, ``block1``, ...
    """

    norm1: LayerNorm | RMSNorm
    attn: MultiHeadAttention
    norm_cross: LayerNorm | RMSNorm | None
    cross: MultiHeadAttention | None
    norm2: LayerNorm | RMSNorm
    mlp: FeedForward
    norm_first: bool = static_field()

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        *,
        rng: Rng,
        hidden: int | None = None,
        activation: str | Callable[[Any], Any] = "gelu",
        gated: bool = False,
        norm: str = "layer",
        norm_first: bool = True,
        is_causal: bool = False,
        use_rotary: bool = False,
        cross_attention: bool | int = False,
        dropout: float = 0.0,
        bias: bool = True,
        dtype: Any = np.float32,
    ) -> None:
        if norm not in ("layer", "rms"):
            raise ValueError(f"norm must be 'layer' or 'rms', not {norm!r}")
        make_norm = functools.partial(LayerNorm if norm == "layer" else RMSNorm, d_model, dtype=dtype)
        attention = functools.partial(
            MultiHeadAttention, d_model, num_heads, rng=rng, bias=bias, dropout=dropout, dtype=dtype
        )
        self.norm1 = make_norm()
        self.attn = attention(is_causal=is_causal, use_rotary=use_rotary)
        context_dim = d_model if cross_attention is True else int(cross_attention)
        self.norm_cross = make_norm() if context_dim else None
        self.cross = attention(context_dim=context_dim) if context_dim else None
        self.norm2 = make_norm()
        self.mlp = FeedForward(
            d_model, hidden, activation, rng=rng, bias=bias, gated=gated, dropout=dropout, dtype=dtype
        )
        self.norm_first = bool(norm_first)

    def __call__(
        self,
        x: Any,
        context: Any = None,
        *,
        mask: Any = None,
        padding_mask: Any = None,
        is_causal: bool | None = None,
        context_mask: Any = None,
        context_padding_mask: Any = None,
        key: Any = None,
    ) -> Any:
        """``x``: (..., T, d_model); masks as in :class:`MultiHeadAttention`, the ``context_`` ones for
        ``context``.
        """
        x = _sequence(x, self.attn.proj.in_features, "x", "TransformerBlock")
        if context is not None and self.cross is None:
            raise ShapeError.make(
                "a context needs a block built with cross_attention", op="TransformerBlock", got={"x": x}
            )
        key_attn, key_cross, key_mlp = _split(key, 3)
        with named_scope("block", numbered=True):
            x = self._residual(
                x,
                "norm1",
                "attn",
                lambda h: self.attn(
                    h, mask=mask, padding_mask=padding_mask, is_causal=is_causal, key=key_attn
                ),
            )
            if self.cross is not None:
                cross = self.cross
                x = self._residual(
                    x,
                    "norm_cross",
                    "cross",
                    lambda h: cross(
                        h, context, mask=context_mask, padding_mask=context_padding_mask, key=key_cross
                    ),
                )
            return self._residual(x, "norm2", "mlp", lambda h: self.mlp(h, key=key_mlp))

    def _residual(self, x: Any, norm: str, part: str, f: Callable[[Any], Any]) -> Any:
        normalise = getattr(self, norm)
        if self.norm_first:
            with named_scope(norm):
                h = normalise(x)
            with named_scope(part):
                h = f(h)
            return x + h
        with named_scope(part):
            h = f(x)
        with named_scope(norm):
            return normalise(x + h)


# -- positions -----------------------------------------------------------------------------------------------


class LearnedPositions(Module):
    """``x + weight[:T]``: (..., T, dim) -> the same, for T up to ``max_length`` (GPT-2); Gaussian with
    ``std`` 0.02.
    """

    weight: Any

    def __init__(
        self, max_length: int, dim: int, *, rng: Rng, std: float = 0.02, dtype: Any = np.float32
    ) -> None:
        check_positive("LearnedPositions", max_length=max_length, dim=dim)
        self.weight = init.normal((max_length, dim), rng, std, dtype=dtype)

    def __call__(self, x: Any) -> Any:
        """(..., T, dim) -> (..., T, dim); ShapeError if T is above ``max_length``."""
        weight = operand(self.weight, "LearnedPositions")
        x = _sequence(x, weight.shape[1], "x", "LearnedPositions")
        if x.shape[-2] > weight.shape[0]:
            raise ShapeError.make(
                f"{x.shape[-2]} positions but the table has {weight.shape[0]}",
                op="LearnedPositions",
                got={"x": x},
            )
        with named_scope("positions"):
            return x + weight[: x.shape[-2]]


class SinusoidalPositions(Module):
    """``x + sinusoidal_positions(T, dim)``: (..., T, dim) -> the same; no weights, any length."""

    base: float = static_field(default=10000.0)

    def __call__(self, x: Any) -> Any:
        """(..., T, dim) -> (..., T, dim); dim must be even."""
        x = operand(x, "SinusoidalPositions")
        if x.ndim < 2:
            raise ShapeError.make(
                "x must be (..., positions, features)", op="SinusoidalPositions", got={"x": x}
            )
        with named_scope("positions"):
            return x + sinusoidal_positions(x.shape[-2], x.shape[-1], x.dtype, self.base)


class RotaryPositions(Module):
    """:func:`rotary` as a module: (..., T, d) -> the same."""

    base: float = static_field(default=10000.0)

    def __call__(self, x: Any, positions: Any = None) -> Any:
        """(..., T, d) -> (..., T, d)."""
        return rotary(x, positions, self.base)


def sequence_mask(lengths: Any, max_length: int) -> Any:
    """The ``padding_mask`` of sequences of the given lengths: integers (...) -> boolean (..., max_length)."""
    lengths = operand(lengths, "sequence_mask")
    check_integer(lengths, "sequence_mask", "lengths")
    return iota((*lengths.shape, max_length), -1) < np.expand_dims(lengths.astype(np.int32), -1)


__all__ = [
    "FeedForward",
    "LearnedPositions",
    "MultiHeadAttention",
    "RotaryPositions",
    "SinusoidalPositions",
    "TransformerBlock",
    "sequence_mask",
]
