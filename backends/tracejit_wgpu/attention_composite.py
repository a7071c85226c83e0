"""Attention through the score matrix, for head sizes whose tiles do not fit a small workgroup memory.

Two or five contractions and a row kernel on scratch memory: slower and O(tq tk) in memory, but any size works.
Called by ``attention.py``.
"""

from __future__ import annotations

from math import prod

import numpy as np

from tracejit.program import Access, AttentionKernel, Contract
from tracejit_wgpu.build import BOOL, BodyBuilder, row_major
from tracejit_wgpu.contract import contract_dispatches
from tracejit_wgpu.emit import Dispatch, Tables
from tracejit_wgpu.loops import loop_dispatches

_F = np.dtype(np.float32)


def _pair(access: Access, first: bool) -> tuple[int, ...]:
    """Strides over batch + (t, other, d): the operand varies along t (or, second, along the other axis) and d."""
    *batch, t, d = access.strides
    return (*batch, t, 0, d) if first else (*batch, 0, t, d)


def _product(
    k: AttentionKernel,
    tables: Tables,
    sizes: tuple[int, int, int],
    a: Access,
    b: Access,
    body: BodyBuilder,
    label: str,
) -> list[Dispatch]:
    m, n, inner = sizes
    problem = Contract(k.batch, (m,), (n,), (inner,), a, b, body.body(), _F)
    return contract_dispatches([problem], tables, f"{k.name}_{label}")


def _scaled(k: AttentionKernel, body: BodyBuilder, tables: Tables) -> int:
    """scale * acc, masked with -inf; domain batch + (tq, tk)."""
    nb = len(k.batch)
    score = body.op("mul", body.op("acc", dtype=_F), body.const(k.scale, _F))
    low = body.const(-np.inf, _F)
    if k.causal:
        score = body.op(
            "where", body.op("less_equal", body.index(nb + 1), body.index(nb), dtype=BOOL), score, low
        )
    if k.mask is not None:
        kind = tables.dtype(k.mask.buffer)
        mask = body.op("load", dtype=kind, access=k.mask)
        if kind.kind == "b":
            score = body.op("where", mask, score, low)
        else:
            score = body.op("add", score, mask if kind == _F else body.op("convert", mask, dtype=_F))
    return score


def _result(k: AttentionKernel, rows: int, width: int, access: Access, tables: Tables) -> BodyBuilder:
    """An epilogue that stores acc to a result of the kernel."""
    body = BodyBuilder((*k.batch, rows, width))
    value = body.op("acc", dtype=_F)
    dtype = tables.dtype(access.buffer)
    if dtype != _F:
        value = body.op("convert", value, dtype=dtype)
    body.store(value, access.buffer, access.strides, access.offset)
    return body


def forward(k: AttentionKernel, tables: Tables) -> list[Dispatch]:
    """out and lse."""
    assert k.q and k.k and k.v and k.out
    shape = (*k.batch, k.tq, k.tk)
    flat = row_major(shape)
    scores = tables.scratch(prod(shape), _F)
    body = BodyBuilder(shape)
    body.store(_scaled(k, body, tables), scores, flat)
    out = _product(k, tables, (k.tq, k.tk, k.d), Access(k.q.buffer, _pair(k.q, True), k.q.offset),
                   Access(k.k.buffer, _pair(k.k, False), k.k.offset), body, "scores")  # fmt: skip
    row = BodyBuilder(shape, (len(shape) - 1,))
    s = row.load(scores, flat, _F)
    top = row.op("reduce", s, kind="max")
    e = row.op("exp", row.op("sub", s, top))
    total = row.op("reduce", e, kind="sum")
    weights = tables.scratch(prod(shape), _F)
    row.store(row.op("div", e, total), weights, flat)
    if k.lse is not None:
        row.store(row.op("add", top, row.op("log", total)), k.lse.buffer, (*k.lse.strides, 0), k.lse.offset)
    out += loop_dispatches([row.body()], tables, f"{k.name}_softmax")
    *batch, t, d = k.v.strides
    probabilities = Access(weights, (*flat[:-1], 0, 1))
    values = Access(k.v.buffer, (*batch, 0, d, t), k.v.offset)
    return out + _product(
        k,
        tables,
        (k.tq, k.dv_dim, k.tk),
        probabilities,
        values,
        _result(k, k.tq, k.dv_dim, k.out, tables),
        "out",
    )


def backward(k: AttentionKernel, tables: Tables, delta: int) -> list[Dispatch]:
    """dq, dk, dv; ``delta`` holds the row sums of dout * out."""
    assert k.q and k.k and k.v and k.dout and k.lse and k.dq and k.dk and k.dv
    shape = (*k.batch, k.tq, k.tk)
    flat, rows = row_major(shape), row_major((*k.batch, k.tq))
    weights, grads = tables.scratch(prod(shape), _F), tables.scratch(prod(shape), _F)
    body = BodyBuilder(shape)
    lse = body.load(k.lse.buffer, (*k.lse.strides, 0), tables.dtype(k.lse.buffer), k.lse.offset)
    body.store(body.op("exp", body.op("sub", _scaled(k, body, tables), lse)), weights, flat)
    out = _product(k, tables, (k.tq, k.tk, k.d), Access(k.q.buffer, _pair(k.q, True), k.q.offset),
                   Access(k.k.buffer, _pair(k.k, False), k.k.offset), body, "scores")  # fmt: skip
    body = BodyBuilder(shape)
    p = body.load(weights, flat, _F)
    centred = body.op("sub", body.op("acc", dtype=_F), body.load(delta, (*rows, 0), _F))
    body.store(body.op("mul", body.op("mul", p, centred), body.const(k.scale, _F)), grads, flat)
    out += _product(k, tables, (k.tq, k.tk, k.dv_dim), Access(k.dout.buffer, _pair(k.dout, True), k.dout.offset),
                    Access(k.v.buffer, _pair(k.v, False), k.v.offset), body, "dp")  # fmt: skip

    def second(access: Access) -> Access:
        *batch, t, d = access.strides
        return Access(access.buffer, (*batch, 0, d, t), access.offset)

    straight, transposed = (*flat[:-1], 0, 1), (*flat[:-2], 1, 0, flat[-2])
    for label, matrix, strides, other, sizes, target in (
        ("dv", weights, transposed, k.dout, (k.tk, k.dv_dim, k.tq), k.dv),
        ("dk", grads, transposed, k.q, (k.tk, k.d, k.tq), k.dk),
        ("dq", grads, straight, k.k, (k.tq, k.d, k.tk), k.dq),
    ):
        result = _result(k, sizes[0], sizes[1], target, tables)
        out += _product(k, tables, sizes, Access(matrix, strides), second(other), result, label)
    return out
