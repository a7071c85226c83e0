"""Loop kernels of the native CPU backend on hand-built programs, against the NumPy interpreter of Programs."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest

from tracejit.lower import interpret
from tracejit.program import Access, Buffer, Instr, LoopBody, LoopKernel, Program
from tracejit_cpu.executable import CpuExecutable

F32, F64, I64, I32, BOOL = (np.dtype(d) for d in ("float32", "float64", "int64", "int32", "bool"))


def strides_of(shape):
    out, step = [], 1
    for n in reversed(shape):
        out.append(step)
        step *= n
    return tuple(reversed(out))


class Body:
    """Builds one LoopBody; buffers are made on the fly."""

    def __init__(self, domain, reduce_axes=()):
        self.domain, self.reduce_axes = tuple(domain), tuple(reduce_axes)
        self.instrs, self.buffers = [], []

    def _add(self, op, args, dtype, axes, **attrs):
        self.instrs.append(Instr(op, tuple(args), np.dtype(dtype), tuple(sorted(axes)), attrs))
        return len(self.instrs) - 1

    def _buffer(self, shape, dtype, kind):
        index = sum(b.kind == kind for b in self.buffers)
        self.buffers.append(
            Buffer(len(self.buffers), math.prod(shape), np.dtype(dtype), kind, index, None, tuple(shape))
        )
        return len(self.buffers) - 1

    def load(self, dtype=F32, axes=None, strides=None, offset=0, shape=None, **attrs):
        axes = tuple(range(len(self.domain))) if axes is None else axes
        shape = shape or tuple(self.domain[a] for a in axes)
        if strides is None:
            strides = [0] * len(self.domain)
            for a, s in zip(axes, strides_of(shape)):
                strides[a] = s
        buffer = self._buffer(shape, dtype, "input")
        varies = {a for a, s in enumerate(strides) if s and self.domain[a] > 1}
        for p, _, _ in attrs.get("gather", ()):
            varies |= set(self.instrs[p].axes)
        if "predicate" in attrs:
            varies |= set(self.instrs[attrs["predicate"]].axes)
        return self._add("load", (), dtype, varies, access=Access(buffer, tuple(strides), offset), **attrs)

    def const(self, value, dtype=F32):
        return self._add("const", (), dtype, (), value=value)

    def index(self, axis):
        return self._add("index", (), I64, (axis,), axis=axis)

    def op(self, name, *args, dtype=None, **attrs):
        axes = set().union(*[self.instrs[a].axes for a in args])
        dtype = np.dtype(dtype or self.instrs[args[-1]].dtype)
        number = self._add(name, args, dtype, axes, **attrs)
        if name == "convert":
            self.instrs[number].attrs["dtype"] = dtype
        return number

    def reduce(self, kind, arg, dtype=None):
        axes = set(self.instrs[arg].axes) - set(self.reduce_axes)
        dtype = I64 if kind.startswith("arg") else dtype or self.instrs[arg].dtype
        return self._add("reduce", (arg,), dtype, axes, kind=kind)

    def store(self, value, axes=None, strides=None, offset=0, shape=None, predicate=None):
        axes = tuple(range(len(self.domain))) if axes is None else axes
        shape = shape or tuple(self.domain[a] for a in axes)
        if strides is None:
            strides = [0] * len(self.domain)
            for a, s in zip(axes, strides_of(shape)):
                strides[a] = s
        buffer = self._buffer(shape, self.instrs[value].dtype, "output")
        args = (value,) if predicate is None else (value, predicate)
        self._add(
            "store", args, self.instrs[value].dtype, axes, access=Access(buffer, tuple(strides), offset)
        )

    def body(self):
        return LoopBody(self.domain, tuple(self.instrs), self.reduce_axes)

    def program(self):
        ins = tuple(b.id for b in self.buffers if b.kind == "input")
        outs = tuple(b.id for b in self.buffers if b.kind == "output")
        kernel = LoopKernel("k", (), ins, outs, bodies=(self.body(),))
        graph = SimpleNamespace(outputs=[SimpleNamespace(shape=self.buffers[b].shape) for b in outs])
        return Program("p", graph, tuple(self.buffers), (kernel,), ins, outs)


def values(dtype, shape, rng):
    dtype = np.dtype(dtype)
    if dtype.kind == "f":
        return rng.standard_normal(shape).astype(dtype)
    if dtype.kind == "b":
        return rng.random(shape) < 0.5
    low = 0 if dtype.kind == "u" else -100
    return rng.integers(low, 100, shape).astype(dtype)


def check(b, inputs=None, rtol=2e-6, atol=1e-6):
    program = b.program()
    rng = np.random.default_rng(0)
    if inputs is None:
        inputs = [values(x.dtype, x.shape, rng) for x in b.buffers if x.kind == "input"]
    got = CpuExecutable(program)(inputs)
    want = interpret.run(program, inputs)
    for g, w in zip(got, want, strict=True):
        assert g.dtype == w.dtype and g.shape == w.shape
        if g.dtype.kind == "f":
            np.testing.assert_allclose(g, w, rtol=rtol if g.dtype != np.float16 else 2e-3, atol=atol)
        else:
            np.testing.assert_array_equal(g, w)
    return got


@pytest.mark.parametrize("n", [0, 1, 3, 8, 31, 1000, 20011])
@pytest.mark.parametrize("dtype", ["float32", "float64", "int32", "int64", "int8", "float16"])
def test_elementwise_of_any_length(n, dtype):
    b = Body((n,))
    x, y = b.load(dtype), b.load(dtype)
    b.store(b.op("add", b.op("mul", x, y), x))
    check(b, atol=2e-3 if dtype == "float16" else 1e-6)


def test_broadcast_and_transposed_operands():
    b = Body((7, 33, 5))
    x = b.load()
    row = b.load(axes=(2,))
    column = b.load(axes=(0,))
    flipped = b.load(strides=(1, 7, 7 * 33))
    b.store(b.op("add", b.op("add", x, row), b.op("mul", column, flipped)))
    check(b)


def test_scalar_body():
    b = Body(())
    x = b.load()
    b.store(b.op("exp", x))
    check(b)


def test_reversed_and_strided_loads():
    b = Body((50,))
    back = b.load(strides=(-1,), offset=49, shape=(50,))
    even = b.load(strides=(2,), shape=(100,))
    b.store(b.op("sub", back, even))
    check(b)


@pytest.mark.parametrize("kind", ["sum", "max", "min", "prod"])
@pytest.mark.parametrize(
    "shape, axes",
    [
        ((5, 70), (1,)),
        ((70, 5), (0,)),
        ((300, 40), (0,)),
        ((200, 1000), (0,)),
        ((4, 6, 33), (0, 2)),
        ((100000,), (0,)),
        ((3, 40000), (1,)),
        ((40, 3, 700), (0, 2)),
        ((9, 2), (1,)),
    ],
)
def test_reductions(kind, shape, axes):
    b = Body(shape, axes)
    x = b.load()
    if kind == "prod":
        x = b.op("add", b.op("mul", x, b.const(1e-3)), b.const(1.0))
    r = b.reduce(kind, x)
    b.store(b.op("mul", r, b.const(2.0)), axes=tuple(a for a in range(len(shape)) if a not in axes))
    check(b, rtol=2e-4, atol=1e-3)


@pytest.mark.parametrize(
    "shape, axes", [((6, 37), (1,)), ((37, 6), (0,)), ((50000,), (0,)), ((4, 5, 6), (1, 2)), ((20, 3), (1,))]
)
@pytest.mark.parametrize("kind", ["argmax", "argmin"])
@pytest.mark.parametrize("nan", [False, True])
def test_first_extremum_wins_and_nan_beats_numbers(shape, axes, kind, nan):
    rng = np.random.default_rng(1)
    x = rng.integers(-5, 5, shape).astype(np.float32)
    if nan:
        x.flat[x.size // 2] = np.nan
        x.flat[x.size // 2 + 1] = np.nan
    b = Body(shape, axes)
    b.store(b.reduce(kind, b.load()), axes=tuple(a for a in range(len(shape)) if a not in axes))
    check(b, [x])


@pytest.mark.parametrize("kind", ["any", "all"])
def test_boolean_reductions(kind):
    for shape, axes in (((9, 40), (1,)), ((100, 9), (0,)), ((40000,), (0,))):
        b = Body(shape, axes)
        b.store(b.reduce(kind, b.load(BOOL)), axes=tuple(a for a in range(len(shape)) if a not in axes))
        check(b)


@pytest.mark.parametrize(
    "shape, axis",
    [((33, 100), 1), ((4, 7), 1), ((100, 33), 0), ((2, 3, 50), 2), ((1, 60000), 1), ((3, 17, 40), 1)],
)
def test_softmax_is_one_kernel(shape, axis):
    b = Body(shape, (axis,))
    x = b.load()
    e = b.op("exp", b.op("sub", x, b.reduce("max", x)))
    b.store(b.op("div", e, b.reduce("sum", e)))
    (y,) = check(b, rtol=3e-6)
    np.testing.assert_allclose(y.sum(axis), 1, rtol=1e-5)


@pytest.mark.parametrize("shape", [(33, 256), (5, 10), (2, 70000)])
def test_layer_norm_with_weights(shape):
    b = Body(shape, (1,))
    n = b.const(1 / shape[1])
    x, g, c = b.load(), b.load(axes=(1,)), b.load(axes=(1,))
    mean = b.op("mul", b.reduce("sum", x), n)
    d = b.op("sub", x, mean)
    var = b.op("mul", b.reduce("sum", b.op("mul", d, d)), n)
    r = b.op("div", b.const(1.0), b.op("sqrt", b.op("add", var, b.const(1e-5))))
    b.store(b.op("add", b.op("mul", b.op("mul", d, r), g), c))
    b.store(mean, axes=(0,))
    check(b, rtol=1e-4, atol=1e-5)


def test_embedding_gather_along_rows_and_lanes():
    rng = np.random.default_rng(2)
    b = Body((40, 24))
    i = b.load(I64, axes=(0,))
    row = b.load(shape=(10, 24), strides=(0, 1), gather=((i, 24, 10),))
    j = b.load(I32, axes=(1,))
    jj = b.op("convert", j, dtype=I64)
    scattered = b.load(shape=(9,), strides=(0, 0), gather=((jj, 1, 9),))
    b.store(b.op("add", row, scattered))
    idx = rng.integers(0, 10, 40)
    b_inputs = [
        idx,
        rng.standard_normal((10, 24)).astype(F32),
        rng.integers(0, 9, 24).astype(I32),
        rng.standard_normal(9).astype(F32),
    ]
    check(b, b_inputs)


def test_predicated_loads_do_not_touch_memory():
    b = Body((6, 20))
    i = b.index(1)
    inside = b.op("less", i, b.const(13, I64), dtype=BOOL)
    x = b.load(shape=(6, 13), strides=(13, 1), predicate=inside, fill=7.5)
    b.store(x)
    check(b)


def test_predicated_store():
    b = Body((100,))
    x = b.load()
    keep = b.op("greater", x, b.const(0.0), dtype=BOOL)
    b.store(x, predicate=keep)
    program = b.program()
    x0 = np.random.default_rng(0).standard_normal(100).astype(F32)
    (y,) = CpuExecutable(program)([x0])
    np.testing.assert_array_equal(y[x0 > 0], x0[x0 > 0])


def test_random_bits_are_threefry():
    b = Body((9, 21))
    k0, k1 = b.load(np.uint32, axes=()), b.load(np.uint32, axes=())
    axes = (0, 1)
    r = b._add("random_bits", (k0, k1), np.uint32, axes, strides=(21, 1))
    b.store(r)
    check(b, [np.array(123, np.uint32), np.array(456, np.uint32)])


def test_sum_is_the_same_for_any_thread_count():
    b = Body((300, 5000), (0, 1))
    b.store(b.reduce("sum", b.load()), axes=())
    x = np.random.default_rng(0).standard_normal((300, 5000)).astype(F32)
    ex = CpuExecutable(b.program())
    first = ex([x])[0]
    assert all(ex([x])[0] == first for _ in range(5))
    ex._threads = [1]

    assert ex._slow([x])[0] == first


@pytest.mark.parametrize("domain, reduce_axes", [((2, 4), (1,)), ((32,), (0,)), ((40, 3), (0,))])
def test_reductions_in_sequence_of_what_does_not_vary_along_them(domain, reduce_axes):
    """The variance of a value that is broadcast along the rows: the second reduce has no operand per element."""
    b = Body(domain, reduce_axes)
    x = b.const(2.5)
    mean = b.op("mul", b.reduce("sum", x), b.const(1 / math.prod(domain[a] for a in reduce_axes)))
    centred = b.op("sub", x, mean)
    total = b.reduce("sum", b.op("add", b.op("mul", centred, centred), b.const(1.0)))
    b.store(total, axes=[a for a in range(len(domain)) if a not in reduce_axes])
    want = np.full(
        [n for a, n in enumerate(domain) if a not in reduce_axes], math.prod(domain[a] for a in reduce_axes)
    )
    np.testing.assert_allclose(CpuExecutable(b.program())([])[0].reshape(want.shape), want, rtol=1e-5)


def test_float16_is_rounded_after_every_operation():
    """A value computed again equals the one that another kernel stored: NumPy's float16, not a wider one."""
    x = np.linspace(-3, 3, 257).astype(np.float16)
    b = Body(x.shape)
    v, stored = b.load("float16"), b.load("float16")
    b.store(b.op("equal", b.op("exp", v), stored, dtype=BOOL))
    b.store(b.op("sub", b.op("add", b.op("mul", v, v), v), v))
    same, out = CpuExecutable(b.program())([x, np.exp(x)])
    assert same.all()
    np.testing.assert_array_equal(out, x * x + x - x)


def test_a_quotient_computed_in_two_kernels_has_the_same_bits():
    """The gradient of a maximum compares the operand, computed again, with the stored maximum: both must divide alike."""
    import tracejit as tj

    def peak(x):
        e = np.exp(np.minimum(x, np.float32(2)))
        p = e / (np.sum(np.abs(e), axis=0, keepdims=True) + 1)
        chosen = np.take_along_axis(x, np.argsort(x, axis=0, kind="stable"), axis=0)
        return np.maximum(chosen, np.max(p, axis=0)).sum()

    gradient = tj.trace(tj.grad(peak))
    for seed in range(6):  # about every second one divides differently
        x = np.random.default_rng(seed).standard_normal(2).astype(np.float32)
        got, want = gradient(x, device="cpu"), gradient(x, device="numpy")
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
