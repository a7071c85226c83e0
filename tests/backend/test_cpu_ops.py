"""Op kernels of the native CPU backend (convolution, pooling, scatter, running totals, host steps) against references."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest

from tests.backend.test_cpu_loops import strides_of
from tracejit.lower import interpret
from tracejit.ops import registry
from tracejit.program import Access, Buffer, Instr, LoopBody, OpKernel, Program
from tracejit_cpu.executable import CpuExecutable


def run_op(name, inputs, attrs, epilogue=None, extra=(), rtol=1e-4, atol=1e-5):
    """One op kernel over fresh buffers; compares with the op's NumPy reference and returns the results."""
    want = registry.get(name).reference(*inputs, **attrs)
    want = want if isinstance(want, tuple) else (want,)
    arrays = [*inputs, *extra]
    buffers = [Buffer(i, x.size, x.dtype, "input", i, None, x.shape) for i, x in enumerate(arrays)]
    first = len(buffers)
    for i, x in enumerate(want):
        x = np.asarray(x)
        buffers.append(Buffer(first + i, x.size, x.dtype, "output", i, None, x.shape))
    operands = tuple((i, x.shape) for i, x in enumerate(inputs))
    results = tuple((first + i, np.asarray(x).shape) for i, x in enumerate(want))
    ids = tuple(range(len(arrays)))
    outs = tuple(range(first, len(buffers)))
    body = epilogue(np.asarray(want[0]).shape, first, len(inputs)) if epilogue else None
    kernel = OpKernel(
        name, (), ids, outs, op=name, attrs=attrs, operands=operands, results=results, epilogue=body
    )
    graph = SimpleNamespace(outputs=[SimpleNamespace(shape=np.asarray(x).shape) for x in want])
    program = Program("p", graph, tuple(buffers), (kernel,), ids, outs)
    ex = CpuExecutable(program)
    got = ex(arrays)
    expected = interpret.run(program, arrays) if epilogue else want
    for g, w in zip(got, expected, strict=True):
        w = np.asarray(w)
        assert g.dtype == w.dtype
        half = g.dtype == np.float16
        np.testing.assert_allclose(g, w, rtol=2e-2 if half else rtol, atol=2e-2 if half else atol)
    again = ex(arrays)
    for g, a in zip(got, again, strict=True):
        np.testing.assert_array_equal(g, a)
    return ex, got


CONVS = [
    ((2, 3, 8, 9), (4, 3, 3, 3), (1, 1), ((0, 0), (0, 0)), (1, 1), 1),
    ((3, 4, 7, 7), (6, 2, 3, 2), (2, 1), ((1, 2), (0, 1)), (1, 1), 2),
    ((1, 1, 28, 28), (16, 1, 5, 5), (1, 1), ((2, 2), (2, 2)), (1, 1), 1),
    ((2, 5, 12, 11), (33, 5, 3, 3), (1, 2), ((1, 1), (1, 1)), (2, 1), 1),
    ((2, 4, 9, 9), (4, 1, 3, 3), (2, 2), ((1, 1), (1, 1)), (1, 1), 4),
    ((20, 3, 6, 6), (5, 3, 1, 1), (1, 1), ((0, 0), (0, 0)), (1, 1), 1),
    ((1, 2, 40, 50), (3, 2, 3, 3), (3, 3), ((0, 0), (0, 0)), (1, 1), 1),
    ((1, 48, 60, 60), (8, 48, 3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1), 1),
]


def conv_case(case, dtype="float32"):
    x_shape, w_shape, stride, padding, dilation, groups = case
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal(x_shape).astype(dtype), rng.standard_normal(w_shape).astype(dtype)
    attrs = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    return x, w, attrs


@pytest.mark.parametrize("case", CONVS)
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_convolution_and_its_gradients(case, dtype):
    x, w, attrs = conv_case(case, dtype)
    ex, (y,) = run_op("conv2d", [x, w], attrs, rtol=1e-3, atol=1e-3 if dtype != "float16" else 5e-2)
    assert len(ex.segments) == 1
    g = np.random.default_rng(1).standard_normal(y.shape).astype(dtype)
    if dtype == "float16":
        return
    run_op("conv2d_input_grad", [g, w], {"shape": x.shape, **attrs}, rtol=1e-3, atol=1e-3)
    run_op("conv2d_weight_grad", [x, g], {"shape": w.shape, **attrs}, rtol=1e-3, atol=2e-3)


def test_convolution_with_bias_and_relu_epilogue():
    x, w, attrs = conv_case(CONVS[0])

    def epilogue(shape, out, extra):
        every = (0, 1, 2, 3)
        f32 = np.dtype(np.float32)
        return LoopBody(
            shape,
            (
                Instr("acc", (), f32, every),
                Instr("load", (), f32, (1,), {"access": Access(extra, (0, 1, 0, 0))}),
                Instr("add", (0, 1), f32, every),
                Instr("const", (), f32, (), {"value": 0.0}),
                Instr("maximum", (2, 3), f32, every),
                Instr("store", (4,), f32, every, {"access": Access(out, strides_of(shape))}),
            ),
        )

    bias = np.random.default_rng(2).standard_normal(w.shape[0]).astype(np.float32)
    run_op("conv2d", [x, w], attrs, epilogue, [bias])


POOLS = [
    {"kernel": (2, 2), "stride": (2, 2), "padding": ((0, 0), (0, 0))},
    {"kernel": (3, 2), "stride": (2, 1), "padding": ((1, 1), (0, 1))},
    {"kernel": (3, 3), "stride": (1, 1), "padding": ((1, 1), (1, 1))},
]


@pytest.mark.parametrize("attrs", POOLS)
@pytest.mark.parametrize("special", [None, np.nan, -np.inf])
def test_pooling_and_its_gradients(attrs, special):
    rng = np.random.default_rng(0)
    x = rng.integers(-3, 3, (2, 3, 7, 8)).astype(np.float32)
    if special is not None:
        x[0, 0, 1:4, 2:5] = special
        x[1] = special
    _, (y,) = run_op("max_pool2d", [x], attrs)
    g = rng.standard_normal(y.shape).astype(np.float32)
    run_op("max_pool2d_grad", [x, g], attrs)
    run_op("max_pool2d_select", [x, rng.standard_normal(x.shape).astype(np.float32)], attrs)
    if special is None:
        run_op("avg_pool2d", [x], attrs)
        run_op("avg_pool2d_grad", [g], {"shape": x.shape, **attrs})


@pytest.mark.parametrize(
    "shape, axis, idx_shape",
    [((10, 24), 0, (200,)), ((512, 64), 0, (8, 32)), ((3, 7, 5), 1, (4, 2)), ((9,), 0, (50,))],
)
@pytest.mark.parametrize("dtype", ["float32", "int64", "float64"])
def test_scatter_add(shape, axis, idx_shape, dtype):
    rng = np.random.default_rng(0)
    idx = rng.integers(-shape[axis] - 2, shape[axis] + 2, idx_shape)
    base = (rng.standard_normal(shape) * 5).astype(dtype)
    update = (rng.standard_normal((*shape[:axis], *idx_shape, *shape[axis + 1 :])) * 5).astype(dtype)
    run_op("scatter_add", [base, idx, update], {"axis": axis}, rtol=1e-4, atol=1e-4)


def test_scatter_add_along_axis():
    rng = np.random.default_rng(0)
    for axis in (0, 1, 2):
        shape = [3, 6, 5]
        idx_shape = list(shape)
        idx_shape[axis] = 9
        idx = rng.integers(-shape[axis], shape[axis], idx_shape)
        run_op(
            "scatter_add_along_axis",
            [rng.standard_normal(shape).astype("f"), idx, rng.standard_normal(idx_shape).astype("f")],
            {"axis": axis},
        )


@pytest.mark.parametrize("op", ["cumsum", "cumprod"])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64", "int64"])
def test_running_totals(op, reverse, dtype):
    x = np.random.default_rng(0).uniform(0.5, 2, (4, 9, 5)).astype(dtype)
    for axis in range(3):
        run_op(op, [x], {"axis": axis, "reverse": reverse})


@pytest.mark.parametrize("op", ["sort", "argsort"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "int32", "bool"])
def test_sorting(op, dtype):
    rng = np.random.default_rng(0)
    x = (rng.integers(-9, 9, (5, 40, 3)) % 5).astype(dtype)
    if x.dtype.kind == "f":
        x[0, 3:5] = np.nan
        x[1, 1], x[1, 2] = -0.0, 0.0
    for axis in range(3):
        run_op(op, [x], {"axis": axis})


def test_an_op_without_native_lowering_runs_as_a_host_step():
    rng = np.random.default_rng(0)
    x = rng.integers(-5, 5, (1, 2, 6, 6))
    w = rng.integers(-5, 5, (2, 2, 3, 3))
    attrs = {"stride": (1, 1), "padding": ((0, 0), (0, 0)), "dilation": (1, 1), "groups": 1}
    ex, _ = run_op("conv2d", [x, w], attrs)
    assert len(ex.segments) == 0
    assert math.prod(x.shape) == 72
