"""Differential test: random graphs, lowered for different backends, against the reference."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.unit.lower_random import RandomGraph
from tests.unit.lower_workloads import check
from tracejit.program import Capabilities

CAPABILITIES = [
    Capabilities(),
    Capabilities(
        batch_contracts=16, separate_outputs=True, split_k=4, epilogue_buffers=4, horizontal=64, max_buffers=8
    ),
    Capabilities(max_buffers=6, attention=False, recompute_flops=0),
    Capabilities(contract_epilogue=False, conv_epilogue=False, recompute_flops=100, horizontal=1),
    Capabilities(row_limit=2),
]


@pytest.mark.parametrize("seed", range(150))
def test_fixed_seeds(seed: int) -> None:
    graph, arrays = RandomGraph(seed, 10 + seed % 40).graph()
    check(graph, arrays, CAPABILITIES[seed % len(CAPABILITIES)], rtol=1e-3, atol=1e-4)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 2**31), st.sampled_from(CAPABILITIES), st.integers(3, 45))
def test_new_seeds(seed: int, caps: Capabilities, steps: int) -> None:
    graph, arrays = RandomGraph(seed, steps).graph()
    check(graph, arrays, caps, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("seed", [108, 109, 147, 154, 437, 981, 1193])
@pytest.mark.parametrize("caps", CAPABILITIES)
def test_seeds_that_once_failed(seed: int, caps: Capabilities) -> None:
    """Cycles through concatenation buffers, reduced axes without common factors, one value in two layouts."""
    graph, arrays = RandomGraph(seed, 10 + seed % 40).graph()
    check(graph, arrays, caps, rtol=1e-3, atol=1e-4)
