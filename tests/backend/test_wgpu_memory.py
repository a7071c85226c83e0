"""Device memory of the wgpu backend: the pool, what feeds it, and what a loop may hold."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np

import tracejit as tj


def test_buffers_of_arrays_in_reference_cycles_can_be_used_again() -> None:
    """The collector finalises a cycle in any order; the pool must never hand out a buffer that was released with it."""
    double = tj.trace(lambda x: x * 2)
    x = np.arange(5, dtype=np.float32)
    for _ in range(5):
        cycle: list[Any] = [double(x, device="wgpu") for _ in range(20)]
        cycle.append(cycle)
        del cycle
        gc.collect()
        np.testing.assert_array_equal(np.asarray(double(x, device="wgpu")), x * 2)
