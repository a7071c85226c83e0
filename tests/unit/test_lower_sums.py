"""Bias gradients beside weight gradients (``lower/sums.py``), and how split-K counts the products of a batch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import tracejit as tj
from tests.unit.lower_workloads import check, optimised
from tracejit import nn, optim
from tracejit.lower.text import program_text
from tracejit.program import Capabilities, ContractKernel, LoopKernel, Program

GPU = Capabilities(
    batch_contracts=16,
    separate_outputs=True,
    epilogue_buffers=4,
    horizontal=64,
    max_buffers=64,
    contract_sums=True,
)


def rand(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def program_of(fn: Any, args: tuple[Any, ...], caps: Capabilities = GPU) -> Program:
    graph, leaves = optimised(fn, *args)
    return check(graph, leaves, caps)


def loss(p: Any, x: Any) -> Any:
    y = nn.relu(x @ p["w1"] + p["b1"]) @ p["w2"] + p["b2"]
    return (y * y).sum()


def model() -> dict[str, np.ndarray]:
    return {"w1": rand(48, 64), "b1": rand(64, seed=1), "w2": rand(64, 32, seed=2), "b2": rand(32, seed=3)}


def sums_of(program: Program) -> list[Any]:
    problems = [q for k in program.kernels if isinstance(k, ContractKernel) for q in k.problems]
    return [s for q in problems for s in (q.a_sum, q.b_sum) if s is not None]


def reduces_of(program: Program) -> list[int]:
    """Elements under each sum that is left to a loop."""
    return [
        int(np.prod(b.domain))
        for k in program.kernels
        if isinstance(k, LoopKernel)
        for b in k.bodies
        if b.reduce_axes
    ]


def test_bias_gradients_move_into_the_weight_gradients() -> None:
    program = program_of(tj.grad(loss), (model(), rand(1024, 48, seed=4)))
    assert len(sums_of(program)) == 2
    assert not reduces_of(program)  # nothing but products and elementwise loops
    assert sum(d.action == "sum in product" for d in program.report) == 2
    assert "sum of b over k to" in program_text(program)
    for s in sums_of(program):
        assert any(s.buffer in k.writes for k in program.kernels if isinstance(k, ContractKernel))


def test_the_update_behind_the_sum_stays_a_loop_over_the_results() -> None:
    params, opt = model(), optim.adamw(1e-2)

    def step(params: Any, state: Any, x: Any) -> Any:
        return opt.update(params, tj.grad(loss)(params, x), state)

    program = program_of(step, (params, opt.init(params), rand(1024, 48, seed=4)))
    targets = {s.buffer for s in sums_of(program)}
    assert len(targets) == 2
    readers = [k for k in program.kernels if isinstance(k, LoopKernel) and targets & set(k.reads)]
    assert readers and all(not b.reduce_axes for k in readers for b in k.bodies if b.domain in ((64,), (32,)))


def test_only_where_the_backend_asks_for_it() -> None:
    args = (model(), rand(1024, 48, seed=4))
    assert not sums_of(program_of(tj.grad(loss), args, replace(GPU, contract_sums=False)))
    assert not sums_of(program_of(tj.grad(loss), args, replace(GPU, max_buffers=3)))
    few = (model(), rand(8, 48, seed=4))  # a sweep over few elements costs nothing
    assert not sums_of(program_of(tj.grad(loss), few))


def test_a_product_that_needs_the_sum_does_not_make_it() -> None:
    x = rand(512, 64)

    def centred(x: Any) -> Any:
        total = x.sum(axis=0)
        return (x * 1.0).T @ (x + total)

    program = program_of(centred, (x,))
    assert not sums_of(program)


@pytest.mark.parametrize("shape", [(1024, 48), (8, 128, 48)])
def test_sums_of_either_operand_and_of_many_dimensions(shape: tuple[int, ...]) -> None:
    x = rand(*shape)
    y = rand(*shape[:-1], 40, seed=5)
    lead = tuple(range(len(shape) - 1))

    def both(x: Any, y: Any) -> Any:
        w = np.tensordot(x, y, axes=(lead, lead))
        return w, x.sum(axis=lead), y.sum(axis=lead)

    assert len(sums_of(program_of(both, (x, y)))) == 2


def test_split_k_counts_the_products_of_a_batch() -> None:
    caps = replace(GPU, split_k=8, split_k_work=1 << 16, contract_sums=False)
    params, opt = [rand(64, 64, seed=i) for i in range(4)], optim.adamw(0.1)

    def chain(params: Any, x: Any) -> Any:
        for w in params:
            x = np.tanh(x @ w)
        return (x * x).sum()

    def step(params: Any, state: Any, x: Any) -> Any:
        return opt.update(params, tj.grad(chain)(params, x), state)

    def parts(work: int) -> set[tuple[int, ...]]:
        program = program_of(
            step, (params, opt.init(params), rand(2048, 64)), replace(caps, split_k_work=work)
        )
        kernels = [k for k in program.kernels if isinstance(k, ContractKernel) and len(k.problems) == 4]
        assert kernels, "the weight gradients are one batch"
        return {q.batch for q in kernels[0].problems}

    assert parts(1 << 16) == {(4,)}  # 64 * 64 results, 4 products: 4 parts reach 2^16
    assert parts(1 << 14) == {()}
