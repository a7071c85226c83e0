"""What a warm call costs beyond the work itself: flatten, key, look-up, guards, dispatch of an empty program.

Goals (issue 2): under 20 us for a 20-leaf nested dict (optree alone takes about 11), under 5 us for three arrays.
Run with ``pytest tests/benchmarks/test_call_overhead.py --benchmark-enable``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import optree
import pytest

import tracejit as tj
from tracejit.program import Program


class _EmptyExecutable:
    kernels = ()

    def __init__(self, program: Program) -> None:
        self._out = [np.zeros(n.shape, n.dtype) for n in program.graph.outputs]

    def __call__(self, inputs: Any) -> list[Any]:
        return list(self._out)


class _EmptyBackend:
    """Compiles every program to "return these zeros": what remains is the machinery."""

    name = "empty"
    priority = -1
    on_host = True

    def capabilities(self, spec: str) -> None:
        return None

    def compile(self, program: Program, spec: str) -> Any:
        return _EmptyExecutable(program)

    def devices(self) -> list[Any]:
        return []

    def to_device(self, array: np.ndarray, spec: str) -> np.ndarray:
        return array

    def from_device(self, array: np.ndarray) -> np.ndarray:
        return array


@pytest.fixture(scope="module", autouse=True)
def _empty_backend() -> None:
    tj.register_backend(_EmptyBackend())


def _nested() -> dict[str, Any]:
    return {
        f"layer{i}": {k: np.zeros((4, 4), np.float32) for k in ("w", "b", "gain", "shift")} for i in range(5)
    }


@tj.trace(device="empty")
def _first(params):
    return params["layer0"]["w"]


@tj.trace(device="empty")
def _three(a, b, c):
    return a


def test_20_leaf_nested_dict(benchmark) -> None:
    params = _nested()
    _first(params)
    benchmark(_first, params)


def test_three_arrays(benchmark) -> None:
    a, b, c = (np.zeros((4, 4), np.float32) for _ in range(3))
    _three(a, b, c)
    benchmark(_three, a, b, c)


def test_optree_alone_on_20_leaves(benchmark) -> None:
    benchmark(optree.tree_flatten, _nested(), namespace="tracejit")
