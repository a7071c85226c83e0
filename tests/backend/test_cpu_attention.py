"""Flash attention of the native CPU backend against the interpreter's definition."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest

from tests.backend.test_cpu_loops import strides_of
from tracejit.lower import interpret
from tracejit.program import Access, AttentionKernel, Buffer, Program
from tracejit_cpu.executable import CpuExecutable


def programs(batch, tq, tk, d, dv, causal=False, mask=None, dtype="float32", heads_last=False):
    """(forward, backward) programs; ``mask`` is None, "bool" or "float" (shared by all heads)."""
    dtype = np.dtype(dtype)
    shapes = {
        "q": (tq, d),
        "k": (tk, d),
        "v": (tk, dv),
        "out": (tq, dv),
        "dout": (tq, dv),
        "dq": (tq, d),
        "dk": (tk, d),
        "dv": (tk, dv),
    }

    def make(grad):
        buffers, fields = [], {}

        def add(name, kind):
            index = sum(b.kind == kind for b in buffers)
            if name == "mask":
                shape = (tq, tk)
                buffers.append(
                    Buffer(
                        len(buffers),
                        tq * tk,
                        np.dtype(mask if mask == "bool" else dtype),
                        kind,
                        index,
                        None,
                        shape,
                    )
                )
                fields[name] = Access(len(buffers) - 1, (*(0,) * len(batch), tk, 1))
                return
            if name == "lse":
                shape = (*batch, tq)
                buffers.append(Buffer(len(buffers), math.prod(shape), dtype, kind, index, None, shape))
                fields[name] = Access(len(buffers) - 1, strides_of(shape))
                return
            t, c = shapes[name]
            if heads_last and len(batch) == 2:  # memory (b, t, h, c)
                shape = (batch[0], t, batch[1], c)
                s = strides_of(shape)
                strides = (s[0], s[2], s[1], s[3])
            else:
                shape = (*batch, t, c)
                strides = strides_of(shape)
            buffers.append(Buffer(len(buffers), math.prod(shape), dtype, kind, index, None, shape))
            fields[name] = Access(len(buffers) - 1, strides)

        names = ["q", "k", "v"] + (["mask"] if mask else []) + (["out", "lse", "dout"] if grad else [])
        for n in names:
            add(n, "input")
        results = ["dq", "dk", "dv"] if grad else ["out", "lse"]
        for n in results:
            add(n, "output")
        reads = tuple(range(len(names)))
        writes = tuple(range(len(names), len(buffers)))
        kernel = AttentionKernel(
            "att",
            (),
            reads,
            writes,
            batch=batch,
            tq=tq,
            tk=tk,
            d=d,
            dv_dim=dv,
            scale=d**-0.5,
            causal=causal,
            grad=grad,
            dtype=dtype,
            **fields,
        )
        graph = SimpleNamespace(outputs=[SimpleNamespace(shape=buffers[w].shape) for w in writes])
        return Program("p", graph, tuple(buffers), (kernel,), reads, writes)

    return make(False), make(True)


CASES = [
    {"batch": (2, 3), "tq": 16, "tk": 16, "d": 8, "dv": 8},
    {"batch": (2,), "tq": 50, "tk": 70, "d": 20, "dv": 12},
    {"batch": (2, 2), "tq": 128, "tk": 128, "d": 64, "dv": 64, "causal": True, "heads_last": True},
    {"batch": (1,), "tq": 100, "tk": 33, "d": 16, "dv": 24, "mask": "bool"},
    {"batch": (3,), "tq": 49, "tk": 97, "d": 16, "dv": 40, "mask": "float"},
    {"batch": (), "tq": 200, "tk": 200, "d": 32, "dv": 32, "causal": True},
    {"batch": (2,), "tq": 1, "tk": 300, "d": 32, "dv": 32},
    {"batch": (2,), "tq": 40, "tk": 40, "d": 16, "dv": 16, "dtype": "float64"},
    {"batch": (2, 2), "tq": 40, "tk": 40, "d": 16, "dv": 16, "dtype": "float16", "causal": True},
    {"batch": (2,), "tq": 150, "tk": 90, "d": 7, "dv": 3, "causal": True},
    {"batch": (1,), "tq": 70, "tk": 230, "d": 5, "dv": 33, "causal": True, "mask": "bool"},
    {"batch": (2,), "tq": 5, "tk": 130, "d": 8, "dv": 9, "mask": "float", "dtype": "float16"},
]


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_attention_and_its_gradient(case):
    forward, backward = programs(**case)
    rng = np.random.default_rng(0)
    inputs = []
    for number in forward.inputs:
        b = forward.buffers[number]
        inputs.append(
            rng.random(b.shape) < 0.8 if b.dtype.kind == "b" else rng.standard_normal(b.shape).astype(b.dtype)
        )
    tolerance = 2e-2 if case.get("dtype") == "float16" else 2e-5
    ex = CpuExecutable(forward)
    got, want = ex(inputs), interpret.run(forward, inputs)
    for g, w in zip(got, want):
        np.testing.assert_allclose(g, w, rtol=tolerance, atol=tolerance)
    dout = rng.standard_normal(want[0].shape).astype(want[0].dtype)
    back = [*inputs, *want, dout]
    grads, expected = CpuExecutable(backward)(back), interpret.run(backward, back)
    for g, w in zip(grads, expected):
        np.testing.assert_allclose(g, w, rtol=tolerance, atol=tolerance)
    np.testing.assert_array_equal(ex(inputs)[0], got[0])


def test_a_row_without_keys_is_nan_and_leaves_others_alone():
    forward, _ = programs(batch=(1,), tq=5, tk=7, d=8, dv=8, mask="bool")
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal(forward.buffers[i].shape).astype("f") for i in range(3))
    mask = np.ones((5, 7), bool)
    mask[2] = False
    out, lse = CpuExecutable(forward)([q, k, v, mask])
    assert np.isnan(out[0, 2]).all() and np.isnan(lse[0, 2])
    assert np.isfinite(np.delete(out, 2, axis=1)).all()


def _forward(q, k, v, **case):
    forward, backward = programs(
        batch=(1,), tq=q.shape[1], tk=k.shape[1], d=q.shape[2], dv=v.shape[2], **case
    )
    out, lse = CpuExecutable(forward)([q, k, v])
    return out, lse, backward


def test_scores_that_grow_from_tile_to_tile_are_rescaled():
    """Each tile of keys has far larger scores than the one before; sums of exponentials alone would overflow."""
    rng = np.random.default_rng(1)
    q = np.ones((1, 40, 4), "f")
    k = (rng.standard_normal((1, 400, 4)) + np.arange(400)[:, None] * 0.5).astype("f")
    v = rng.standard_normal((1, 400, 6)).astype("f")
    for keys in (k, k[:, ::-1].copy()):
        out, lse, _ = _forward(q, keys, v)
        scores = q.astype("d") @ keys.astype("d").transpose(0, 2, 1) * 0.5
        top = scores.max(-1, keepdims=True)
        p = np.exp(scores - top)
        np.testing.assert_allclose(out, p @ v / p.sum(-1, keepdims=True), rtol=2e-3, atol=2e-3)
        np.testing.assert_allclose(lse, (top + np.log(p.sum(-1, keepdims=True)))[..., 0], rtol=1e-6)


@pytest.mark.parametrize("payload", [0x7FC00000, 0x7FFFFFFF, 0xFFC00001])
def test_nan_reaches_the_rows_that_see_it_and_no_others(payload):
    """Whatever the bits of the NaN: the exponential works on bit patterns."""
    rng = np.random.default_rng(2)
    q, k, v, dout = (rng.standard_normal((1, 120, 8)).astype("f") for _ in range(4))
    k.view(np.uint32)[0, 100, 3] = payload
    out, lse, backward = _forward(q, k, v, causal=True)
    seen = np.arange(120) >= 100
    np.testing.assert_array_equal(np.isnan(out[0]).all(-1), seen)
    np.testing.assert_array_equal(np.isnan(lse[0]), seen)
    assert np.isfinite(out[0, :100]).all()
    dq, dk, dv = CpuExecutable(backward)([q, k, v, out, lse, dout])
    np.testing.assert_array_equal(np.isnan(dq[0]).all(-1), seen)
    assert np.isfinite(np.delete(dq[0, :100], 3, axis=-1)).all()  # column 3: 0 * NaN, as in the definition
    assert np.isnan(dk).any() and np.isnan(dv).any()


def test_infinite_scores_give_what_the_definition_gives():
    q, k = np.ones((1, 3, 2), "f"), np.ones((1, 4, 2), "f")
    k[0, 1] = np.inf
    q[0, 2] = 0
    v = np.ones((1, 4, 2), "f")
    out, _, _ = _forward(q, k, v)
    assert np.isnan(out).all()  # inf - inf, and 0 * inf
    k[0, 1] = -np.inf
    out, _, _ = _forward(q, k, v)
    np.testing.assert_allclose(out[0, :2], 1.0, rtol=1e-6)
    assert np.isnan(out[0, 2]).all()


def test_a_mask_shared_by_all_queries_is_read_once_per_key():
    """A row stride of zero, as a key-padding mask has."""
    forward, _ = programs(batch=(2,), tq=30, tk=110, d=8, dv=8, mask="bool")
    kernel = forward.kernels[0]
    mask = dataclasses.replace(kernel.mask, strides=(*kernel.mask.strides[:-2], 0, 1))
    forward = dataclasses.replace(forward, kernels=(dataclasses.replace(kernel, mask=mask),))
    rng = np.random.default_rng(3)
    inputs = [rng.standard_normal(forward.buffers[i].shape).astype("f") for i in range(3)]
    keep = rng.random((30, 110)) < 0.6
    got = CpuExecutable(forward)([*inputs, keep])
    for g, w in zip(got, interpret.run(forward, [*inputs, keep])):
        np.testing.assert_allclose(g, w, rtol=2e-5, atol=2e-5)
