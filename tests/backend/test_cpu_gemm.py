"""Matrix products of the native CPU backend on hand-built programs, against the NumPy interpreter of Programs."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest

from tests.backend.test_cpu_loops import F32, strides_of
from tracejit.lower import interpret
from tracejit.program import Access, Buffer, Contract, ContractKernel, Instr, LoopBody, Program
from tracejit_cpu.executable import CpuExecutable


def product(
    batch,
    m,
    n,
    k,
    order_a="bmk",
    order_b="bkn",
    order_c="bmn",
    dtype=F32,
    epilogue="bias",
    batch_a=True,
    batch_b=True,
):
    """A program for C = A B (+ bias, relu) whose operands lie in memory in the given axis orders."""
    dtype = np.dtype(dtype)
    sizes = {"b": batch, "m": m, "n": n, "k": k}
    flat = {key: math.prod(v) for key, v in sizes.items()}
    domain = (*batch, *m, *n)
    buffers = []

    def buffer(order, kind, dt=dtype):
        shape = tuple(flat[o] for o in order)
        index = sum(b.kind == kind for b in buffers)
        buffers.append(Buffer(len(buffers), math.prod(shape), dt, kind, index, None, shape))
        return len(buffers) - 1

    def access(order, number, axes):
        dims = tuple(s for o in order for s in sizes[o])
        flat_strides = strides_of(dims)
        out, at = {}, 0
        for o in order:
            out[o] = flat_strides[at : at + len(sizes[o])]
            at += len(sizes[o])
        return Access(number, tuple(s for o in axes for s in out.get(o, (0,) * len(sizes[o]))))

    if not batch_a:
        order_a = order_a.replace("b", "")
    if not batch_b:
        order_b = order_b.replace("b", "")
    a = access(order_a, buffer(order_a, "input"), "bmnk")
    b = access(order_b, buffer(order_b, "input"), "bmnk")
    acc_dtype = F32 if dtype == np.float16 else dtype
    every = tuple(range(len(domain)))
    instrs = [Instr("acc", (), acc_dtype, every)]
    if epilogue == "bias":
        bias = access("n", buffer("n", "input", acc_dtype), "bmn")
        column = access("m", buffer("m", "input", acc_dtype), "bmn")
        instrs.append(Instr("load", (), acc_dtype, every, {"access": bias}))
        instrs.append(Instr("load", (), acc_dtype, every, {"access": column}))
        instrs.append(Instr("add", (0, 1), acc_dtype, every))
        instrs.append(Instr("add", (3, 2), acc_dtype, every))
        instrs.append(Instr("const", (), acc_dtype, (), {"value": 0}))
        instrs.append(Instr("maximum", (4, 5), acc_dtype, every))
    if acc_dtype != dtype:
        instrs.append(Instr("convert", (len(instrs) - 1,), dtype, every, {"dtype": dtype}))
    last = len(instrs) - 1
    target = access(order_c, buffer(order_c, "output"), "bmn")
    instrs.append(Instr("store", (last,), dtype, every, {"access": target}))
    c = Contract(batch, m, n, k, a, b, LoopBody(domain, tuple(instrs)), acc_dtype)
    reads = tuple(x.id for x in buffers if x.kind == "input")
    out = buffers[-1]
    graph = SimpleNamespace(outputs=[SimpleNamespace(shape=out.shape)])
    return Program(
        "p",
        graph,
        tuple(buffers),
        (ContractKernel("mm", (), reads, (out.id,), problems=(c,)),),
        reads,
        (out.id,),
    )


def check(program, rtol=1e-4, atol=1e-4):
    rng = np.random.default_rng(0)
    inputs = []
    for number in program.inputs:
        b = program.buffers[number]
        x = rng.standard_normal(b.shape) if b.dtype.kind == "f" else rng.integers(-5, 5, b.shape)
        inputs.append(x.astype(b.dtype))
    got = CpuExecutable(program)(inputs)
    want = interpret.run(program, inputs)
    tolerance = 2e-2 if program.buffers[0].dtype == np.float16 else None
    np.testing.assert_allclose(got[0], want[0], rtol=tolerance or rtol, atol=tolerance or atol)
    return inputs, got[0]


SIZES = [
    (1, 1, 1),
    (1, 7, 5),
    (7, 1, 5),
    (6, 16, 4),
    (5, 3, 9),
    (32, 64, 64),
    (33, 10, 65),
    (13, 17, 1),
    (50, 100, 70),
    (128, 130, 300),
    (97, 33, 2100),
]


@pytest.mark.parametrize("m, n, k", SIZES)
@pytest.mark.parametrize("order_a", ["bmk", "bkm"])
@pytest.mark.parametrize("order_b", ["bkn", "bnk"])
def test_every_layout(m, n, k, order_a, order_b):
    check(product((), (m,), (n,), (k,), order_a, order_b), atol=1e-3)


def strategy(program):
    """How the compiler treats the operands: (A in slabs per task, B in panels per task, copies of whole operands)."""
    from tracejit_cpu.gemm import GemmCompiler
    from tracejit_cpu.host import host
    from tracejit_cpu.irbuilder import Module

    (kernel,) = program.kernels
    compiler = GemmCompiler(Module(host()), kernel.problems[0], lambda b: program.buffers[b].dtype, "k")
    compiler.compile()
    return compiler.slab > 0, compiler.private_b, len(compiler.temps)


@pytest.mark.parametrize("n, k", [(70, 130), (80, 512), (70, 1500), (33, 1030)])
@pytest.mark.parametrize("order_a", ["bmk", "bkm"])
def test_many_rows_are_packed_by_the_task_that_uses_them(n, k, order_a):
    program = product((), (1003,), (n,), (k,), order_a, "bkn")
    if order_a == "bkm":
        slab, private_b, copies = strategy(program)
        assert slab and not private_b and copies <= 1
    check(program, atol=1e-3)


@pytest.mark.parametrize("order_b", ["bkn", "bnk"])
@pytest.mark.parametrize("n, k", [(200, 130), (333, 1500)])
def test_few_rows_let_each_task_pack_its_panels(n, k, order_b):
    program = product((), (100,), (n,), (k,), "bmk", order_b)
    slab, private_b, _ = strategy(program)
    assert private_b and not slab
    check(program, atol=1e-3)


def test_tasks_that_pack_handle_halves_batches_and_k_tables():
    check(product((), (1000,), (48,), (90,), "bkm", "bkn", dtype="float16", epilogue="none"))
    check(product((), (60,), (300,), (90,), "bmk", "bnk", dtype="float16", epilogue="none"))
    check(product((3,), (900,), (70,), (140,), "bkm", "bnk"), atol=1e-3)
    check(product((3,), (50,), (160,), (300,), "bmk", "bnk"), atol=1e-3)
    program = product((), (960,), (80,), (6, 40), "bkm", "bkn")
    kernel = program.kernels[0]
    c = kernel.problems[0]
    # the two k axes swapped in memory on one side only: they cannot become one
    a = Access(c.a.buffer, (*c.a.strides[:2], c.a.strides[3], c.a.strides[3] * 6), 0)
    swapped = Contract(c.batch, c.m, c.n, c.k, a, c.b, c.epilogue, c.acc_dtype)
    new = ContractKernel("mm", (), kernel.reads, kernel.writes, problems=(swapped,))
    check(Program("p", program.graph, program.buffers, (new,), program.inputs, program.outputs), atol=1e-3)


@pytest.mark.parametrize("order_c", ["bmn", "bnm", "mbn", "nbm"])
def test_batches_and_result_layouts(order_c):
    check(product((3,), (20,), (24,), (9,), order_c=order_c))
    check(product((2, 3), (20,), (24,), (9,), "mbk", "nbk", order_c))


def test_operand_shared_by_all_batches():
    check(product((5,), (40,), (48,), (130,), batch_b=False))
    check(product((5,), (40,), (48,), (130,), batch_a=False))


def test_several_axes_per_group():
    check(product((2,), (4, 5), (3, 8), (2, 7)))
    check(product((2,), (4, 5), (3, 8), (2, 7), "kbm", "nkb", "nbm"))


def test_contraction_over_axes_that_do_not_merge():
    program = product((), (24,), (40,), (6, 10))
    kernel = program.kernels[0]
    c = kernel.problems[0]
    # a[m, k1, k0] with k = (k0, k1): the two k axes cannot become one
    a = Access(c.a.buffer, (60, 0, 1, 6), 0)
    swapped = Contract(c.batch, c.m, c.n, c.k, a, c.b, c.epilogue, c.acc_dtype)
    new = ContractKernel("mm", (), kernel.reads, kernel.writes, problems=(swapped,))
    check(Program("p", program.graph, program.buffers, (new,), program.inputs, program.outputs))


@pytest.mark.parametrize("dtype", ["float64", "float16", "int32", "int64"])
def test_other_dtypes(dtype):
    check(product((2,), (33,), (29,), (40,), dtype=dtype, epilogue="none"))
    check(product((), (3,), (50,), (20,), "bkm", "bnk", dtype=dtype, epilogue="none"))


def test_large_product_is_deterministic_over_threads():
    program = product((), (256,), (200,), (600,))
    inputs, first = check(program, atol=1e-2)
    ex = CpuExecutable(program)
    for _ in range(3):
        np.testing.assert_array_equal(ex(inputs)[0], first)
    ex._threads = [1]
    np.testing.assert_array_equal(ex._slow(inputs)[0], first)
