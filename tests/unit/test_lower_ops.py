"""Every op lowers and computes what its NumPy reference computes, whatever the backend can do."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import tracejit.ops  # noqa: F401  (fills the op table)
from tests.unit.lower_workloads import check
from tracejit.graph import Graph, GraphBuilder
from tracejit.ops import registry
from tracejit.program import Capabilities, OpKernel

CAPABILITIES = {
    "cpu": Capabilities(),
    "gpu": Capabilities(batch_contracts=8, separate_outputs=True, split_k=4, epilogue_buffers=4),
    "webgpu-defaults": Capabilities(max_buffers=8, attention=False),
    "nothing-fused": Capabilities(
        contract_epilogue=False, conv_epilogue=False, recompute_flops=0, horizontal=1
    ),
}
#: Ops that tests of the tracer may define stay out: only ours have samples that NumPy can run.
OPS = [op for op in registry.all_ops() if op.samples()]


def one_op(op: registry.Op, arrays: list[np.ndarray], attrs: dict[str, Any]) -> Graph:
    """The graph of one call of ``op``."""
    b = GraphBuilder()
    inputs = [
        b.add("input", (), {"index": i, "kind": "argument", "shape": a.shape, "dtype": a.dtype})
        for i, a in enumerate(arrays)
    ]
    node = b.add(op, inputs, attrs)
    outputs = [b.add("proj", (node,), {"index": i}) for i in range(len(node.avals))] if node.avals else [node]
    return Graph.build(op.name, inputs, outputs)


@pytest.mark.parametrize("caps", CAPABILITIES)
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_every_sample_of_every_op(op: registry.Op, caps: str) -> None:
    for arrays, attrs in op.samples():
        arrays = [np.asarray(a) for a in arrays]
        half = any(a.dtype == np.float16 for a in arrays)
        check(one_op(op, arrays, attrs), arrays, CAPABILITIES[caps], rtol=1e-2 if half else 1e-5, atol=1e-6)


def test_a_backend_can_ask_for_an_op_as_it_is() -> None:
    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    graph = one_op(registry.get("sum"), [x], {"axes": (1,)})
    program = check(graph, [x], Capabilities(op_kernels=frozenset({"sum"})))
    assert [k.op for k in program.kernels if isinstance(k, OpKernel)] == ["sum"]


def test_integer_products_are_loops() -> None:
    a, b = np.arange(6).reshape(2, 3), np.arange(12).reshape(3, 4)
    attrs = {"lhs_batch": (), "rhs_batch": (), "lhs_contract": (1,), "rhs_contract": (0,)}
    program = check(one_op(registry.get("dot_general"), [a, b], attrs), [a, b])
    assert [type(k).__name__ for k in program.kernels] == ["LoopKernel"]
