"""This machine's ceilings, measured with this backend's own code: what ``fn.profile()`` calls 100%."""

from __future__ import annotations

import functools
import time

import numpy as np

from tracejit_cpu import runtime


def peaks() -> tuple[float, float]:
    """(float32 GFLOP/s of a large matrix product, GB/s of reading and writing main memory); about 0.2 s the first time."""
    return _peaks(runtime.pool().threads)


@functools.cache
def _peaks(threads: int) -> tuple[float, float]:
    import tracejit as tj

    del threads  # only part of the cache's key
    square = np.ones((1024, 1024), np.float32)
    long = np.ones(16 << 20, np.float32)
    product, twice = tj.trace(lambda x: x @ x, device="cpu"), tj.trace(lambda x: x * 2, device="cpu")
    return 2 * 1024**3 / _best(product, square) / 1e9, 2 * long.nbytes / _best(twice, long) / 1e9


def _best(f: object, x: np.ndarray) -> float:
    """Seconds of the fastest of several calls; straight to the program, so that no observer sees them."""
    entry, leaves = f._entry_for((x,), {})  # type: ignore[attr-defined]
    times = []
    for _ in range(6):
        start = time.perf_counter()
        entry.run(leaves)
        times.append(time.perf_counter() - start)
    return min(times)
