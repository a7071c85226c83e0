"""What fuses: kernel lists of the workloads of MEASURED.md, and snapshots of the generated bodies.

Run with ``TRACEJIT_UPDATE_SNAPSHOTS=1`` to rewrite ``tests/unit/snapshots`` after an intended change.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tracejit as tj
from tests.unit import lower_workloads as workloads
from tests.unit.lower_workloads import SMALL, check, optimised
from tracejit import nn, optim
from tracejit.lower import interpret, lower
from tracejit.lower.horizontal import bindings
from tracejit.lower.text import program_text
from tracejit.program import (
    AttentionKernel,
    Capabilities,
    ContractKernel,
    LoopKernel,
    OpKernel,
    Program,
)

CPU = Capabilities()
GPU = Capabilities(batch_contracts=16, separate_outputs=True, split_k=4, epilogue_buffers=4, horizontal=64)
WEB = Capabilities(
    batch_contracts=16, separate_outputs=True, split_k=4, epilogue_buffers=4, horizontal=64, max_buffers=8
)
UNFUSED = Capabilities(
    contract_epilogue=False,
    conv_epilogue=False,
    recompute_flops=0,
    attention=False,
    horizontal=1,
    max_buffers=6,
)
SNAPSHOTS = Path(__file__).parent / "snapshots"


def program_of(fn: Callable[..., Any], args: tuple[Any, ...], caps: Capabilities = CPU) -> Program:
    """Lower, check against the reference, return."""
    graph, leaves = optimised(fn, *args)
    return check(graph, leaves, caps)


def rand(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("caps", [CPU, GPU, WEB, UNFUSED], ids=["cpu", "gpu", "web", "unfused"])
@pytest.mark.parametrize("name", SMALL)
def test_workloads_are_right_for_every_backend(name: str, caps: Capabilities) -> None:
    program = program_of(*SMALL[name](), caps)
    if caps.max_buffers is not None:
        for k in program.kernels:
            assert (
                bindings(program.buffers, {*k.reads, *k.writes}, caps.separate_outputs) <= caps.max_buffers
            ), k.name


@pytest.mark.parametrize("name", ["d", "e1", "e2"])
def test_one_kernel(name: str) -> None:
    assert len(program_of(*SMALL[name]()).kernels) == 1


def test_sums_are_one_kernel_each() -> None:
    domains = []
    for fn, args in workloads.sums():
        (kernel,) = program_of(fn, args).kernels
        assert isinstance(kernel, LoopKernel)
        domains.append((kernel.bodies[0].domain, kernel.bodies[0].reduce_axes))
    assert domains == [((96, 96), (0,)), ((96, 96), (1,)), ((9216,), (0,))]


def test_row_pipelines_are_one_kernel_each() -> None:
    x, labels = rand(32, 48), np.arange(32) % 48
    cases: list[tuple[Callable[..., Any], tuple[Any, ...]]] = [
        (lambda x: nn.log_softmax(x), (x,)),
        (lambda x: nn.softmax(x, axis=0), (x,)),
        (lambda x: nn.rms_norm(x), (x,)),
        (
            lambda x: (
                nn.logsumexp(x)
                if hasattr(nn, "logsumexp")
                else np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1))
            ),
            (x,),
        ),
        (lambda x: (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True), (x,)),
        (lambda x: x.argmax(-1), (x,)),
    ]
    for fn, args in cases:
        assert len(program_of(fn, args).kernels) == 1
    # The loss of each row, then its mean.
    assert len(program_of(lambda x, y: nn.cross_entropy(x, y), (x, labels)).kernels) == 2


def test_cross_entropy_forward_and_backward_share_one_row_kernel() -> None:
    import tracejit as tj

    fn = lambda x, y: tj.value_and_grad(lambda x: nn.cross_entropy(x, y))(x)  # noqa: E731
    program = program_of(fn, (rand(32, 48), np.arange(32) % 48))
    rows = [k for k in program.kernels if isinstance(k, LoopKernel) and k.bodies[0].domain == (32, 48)]
    assert len(rows) == 1 and len(program.kernels) == 2


def test_layer_norm_gelu_mlp() -> None:
    """f: LN forward 1, GELU behind W1, its gradient behind the product, LN backward 1, column sums once."""
    program = program_of(*workloads.ln_mlp())
    products = [k for k in program.kernels if isinstance(k, ContractKernel)]
    assert len(products) == 6
    fused = [p for k in products for p in k.problems if any(i.op == "tanh" for i in p.epilogue.instrs)]
    assert len(fused) == 2
    rows = [
        b for k in program.kernels if isinstance(k, LoopKernel) for b in k.bodies if b.reduce_axes == (1,)
    ]
    assert len(rows) == 2
    columns = [
        b
        for k in program.kernels
        if isinstance(k, LoopKernel)
        for b in k.bodies
        if b.domain == (64, 32) and b.reduce_axes == (0,)
    ]
    stores = sorted(sum(i.op == "store" for i in b.instrs) for b in columns)
    assert stores == [1, 2], "bias of W2; scale and shift of the norm in one sweep"


def test_optimiser_updates_sit_in_the_epilogues_on_cpu_and_in_one_kernel_on_gpu() -> None:
    on_cpu = program_of(*SMALL["b"](), CPU)
    assert not [
        k
        for k in on_cpu.kernels
        if isinstance(k, LoopKernel) and all(not b.reduce_axes and len(b.domain) for b in k.bodies)
    ]
    wide = workloads.mlp((128, 96, 64, 10), 64, optim.sgd(0.1))
    on_gpu = lower(optimised(wide[0], *wide[1])[0], Capabilities(epilogue_buffers=2, horizontal=64))
    updates = [k for k in on_gpu.kernels if isinstance(k, LoopKernel) and len(k.bodies) > 3]
    assert len(updates) == 1


def test_gpt_step_kernels() -> None:
    """c: per layer and direction the kernels of the hand-written prototype, and nothing else that is big."""
    program = program_of(*SMALL["c"]())
    attention = [k for k in program.kernels if isinstance(k, AttentionKernel)]
    assert [k.grad for k in attention] == [False, False, True, True]
    products = [k for k in program.kernels if isinstance(k, ContractKernel)]
    assert len(products) == 2 * 12 + 3
    assert [k.op for k in program.kernels if isinstance(k, OpKernel)] == ["scatter_add"]
    assert len(program.kernels) <= 48


def test_equal_weight_gradients_become_one_batch() -> None:
    program = program_of(*SMALL["c"](), GPU)
    batches = sorted(
        len(k.problems) for k in program.kernels if isinstance(k, ContractKernel) if len(k.problems) > 1
    )
    assert batches == [2, 2, 2, 2]
    assert any(d.action == "batched products" for d in program.report)


def test_split_k_is_summed_in_the_row_kernel_behind() -> None:
    x, w, g = rand(64, 512), rand(512, 64), rand(64)
    program = program_of(lambda x, w, g: nn.layer_norm(x @ w, g), (x, w, g), GPU)
    product, norm = program.kernels
    assert (
        isinstance(product, ContractKernel)
        and product.problems[0].batch == (4,)
        and product.problems[0].k == (128,)
    )
    assert isinstance(norm, LoopKernel) and sum(i.op == "load" for i in norm.bodies[0].instrs) == 5


def test_views_cost_no_kernel() -> None:
    x, w = rand(2, 8, 24), rand(24, 24)

    def heads(x: Any, w: Any) -> Any:
        y = (x @ w).reshape(2, 8, 3, 2, 4).transpose(2, 0, 3, 1, 4)
        return (y[0] * y[1] + y[2]).transpose(0, 2, 1, 3).reshape(2, 8, 8) @ w[:8]

    program = program_of(heads, (x, w))
    assert [type(k).__name__ for k in program.kernels] == ["ContractKernel", "LoopKernel", "ContractKernel"]


def test_transposed_results_are_stored_in_place() -> None:
    program = program_of(lambda x, w: (x @ w).T, (rand(8, 12), rand(12, 6)))
    (kernel,) = program.kernels
    assert isinstance(kernel, ContractKernel)
    (store,) = [i for i in kernel.problems[0].epilogue.instrs if i.op == "store"]
    assert sorted(store.attrs["access"].strides) == [1, 8]


def test_gradients_of_slices_are_written_where_they_belong() -> None:
    import tracejit as tj

    def loss(qkv: Any, w: Any) -> Any:
        q, k = qkv[:, :8], qkv[:, 8:]
        return (np.tanh(q @ w) * np.tanh(k @ w)).sum()

    program = program_of(lambda a, w: tj.grad(loss)(a, w), (rand(16, 16), rand(8, 8)))
    assert any(d.action == "concatenate in place" for d in program.report)
    assert not any(k.name == "copy" for k in program.kernels)


def test_report_names_what_was_not_fused() -> None:
    program = program_of(
        lambda q, k, v: (lambda p: (p @ v, p))(nn.softmax(q @ k.T)), (rand(8, 4), rand(8, 4), rand(8, 4))
    )
    assert [d.reason for d in program.report if d.action == "no attention kernel"]


SNAPSHOT_PROGRAMS: dict[str, Callable[[], tuple[Program, bool]]] = {
    "softmax": lambda: (program_of(*workloads.softmax(8, 16)), True),
    "layer_norm": lambda: (program_of(*workloads.layer_norm(8, 16)), True),
    "mlp_step": lambda: (program_of(*SMALL["a"]()), True),
    "layer_norm_mlp": lambda: (program_of(*SMALL["f"]()), False),
    "gpt_step": lambda: (program_of(*SMALL["c"]()), False),
    "gpt_step_gpu": lambda: (program_of(*SMALL["c"](), GPU), False),
    "gpt_step_web": lambda: (program_of(*SMALL["c"](), WEB), False),
    "cnn_step": lambda: (program_of(*SMALL["h"]()), False),
    "adam": lambda: (program_of(*SMALL["b"](), Capabilities(contract_epilogue=False)), False),
}


@pytest.mark.parametrize("name", SNAPSHOT_PROGRAMS)
def test_snapshot(name: str) -> None:
    program, bodies = SNAPSHOT_PROGRAMS[name]()
    text = program_text(program, bodies=bodies) + "\n"
    path = SNAPSHOTS / f"{name}.txt"
    if os.environ.get("TRACEJIT_UPDATE_SNAPSHOTS"):
        path.write_text(text)
    assert text == path.read_text(), (
        f"{path} differs; TRACEJIT_UPDATE_SNAPSHOTS=1 rewrites it if that is intended"
    )


def test_positions_of_a_maximum_count_through_the_axes_in_their_own_order() -> None:
    """A tiled operand is read in another order than its axes have; argmax over both axes must not notice."""
    x = rand(3, 4)
    program = program_of(lambda x: np.argmax(np.tile(x, 2), axis=-1), (x,))
    assert len(program.kernels) == 1


def test_a_value_whose_transpose_and_reshape_are_both_results():
    """The value lies in the order of its transpose; a reshape that does not follow the axes counts positions."""
    x = np.random.default_rng(0).standard_normal((2, 3, 8)).astype(np.float32)

    def f(x):
        y = x / (x * x + 1)
        return y.T, y.reshape(4, -1), y.swapaxes(0, 2).reshape(-1, 9 - 3), y.reshape(16, 3).sum(axis=0)

    traced = tj.trace(f)
    want = traced(x, device="numpy")
    for got, w in zip(traced(x, device="cpu"), want, strict=True):
        np.testing.assert_allclose(got, w, rtol=1e-6, atol=1e-6)
    entry, leaves = traced._entry_for((x,), {"device": "cpu"})
    for got, w in zip(interpret.run(entry.program, list(entry.gather(leaves))), want, strict=True):
        np.testing.assert_allclose(got, w, rtol=1e-6, atol=1e-6)
