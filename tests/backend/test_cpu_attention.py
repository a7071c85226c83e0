"""Flash attention of the native CPU backend against the interpreter's definition."""

from __future__ import annotations

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
