"""Device memory of the wgpu backend: the pool, what feeds it, and what a loop may hold."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import pytest
from wgpu import GPUOutOfMemoryError

import tracejit as tj
from tracejit_wgpu import memory, runtime


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


def limited(monkeypatch: pytest.MonkeyPatch, budget: int) -> memory.Pool:
    """The pool of the device, which from now on has ``budget`` bytes more than it uses."""
    pool = runtime.get().pool
    pool.trim()
    create, most = pool._create, pool.in_use + budget

    def stingy(size: int) -> Any:
        if pool.total + size > most:
            raise runtime.get().translate(GPUOutOfMemoryError("Not enough memory left."))
        return create(size)

    monkeypatch.setattr(pool, "_create", stingy)
    return pool


def test_the_driver_gets_idle_memory_back() -> None:
    pool = runtime.get().pool
    double = tj.trace(lambda x: x * 2)
    double(np.ones(1 << 20, np.float32), device="wgpu")
    pool.trim()
    assert pool.idle == 0 and pool.total == pool.in_use
    assert sum(b.size for b in pool._all.values()) == pool.total
    np.testing.assert_array_equal(np.asarray(double(np.ones(3, np.float32), device="wgpu")), 2)


def test_idle_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "POOL_BYTES", 3 << 20)
    pool = runtime.get().pool
    for n in range(1, 9):
        handle = pool.acquire(n << 18)
        del handle
    pool.acquire(4)
    assert pool.idle <= 3 << 20


def test_under_pressure_what_can_be_made_again_is_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Temporaries of other programs and arrays in reference cycles make room."""
    x = np.ones((256, 256), np.float32)
    products = tj.trace(lambda x: ((x @ x) @ (x @ x.T)) @ x)  # leaves temporaries behind
    first = products(x, device="wgpu")
    gc.collect()
    pool = limited(monkeypatch, 3 << 20)
    cycle: list[Any] = [pool.acquire(2 << 20)]
    cycle.append(cycle)
    del cycle
    big = pool.acquire(3 << 20)
    assert big.buffer.size >= 3 << 20
    del big
    np.testing.assert_allclose(np.asarray(first), x * 256.0**4)


def test_out_of_memory_is_a_clear_error_and_nothing_else_dies(monkeypatch: pytest.MonkeyPatch) -> None:
    double = tj.trace(lambda x: x * 2)
    small = np.ones(3, np.float32)
    kept = double(small, device="wgpu")
    pool = limited(monkeypatch, 4 << 20)
    with pytest.raises(
        tj.DeviceOutOfMemoryError, match=r"no room for .* bytes more; .* bytes are in use"
    ) as caught:
        double(np.ones(3 << 20, np.float32), device="wgpu")
    assert isinstance(caught.value, MemoryError) and "smaller batch" in str(caught.value)
    np.testing.assert_array_equal(np.asarray(kept), 2)
    np.testing.assert_array_equal(np.asarray(double(small, device="wgpu")), 2)
    np.testing.assert_array_equal(double(small, device="cpu"), 2)
    monkeypatch.undo()
    assert pool.in_use < 1 << 30
    assert double(np.ones(3 << 20, np.float32), device="wgpu").shape == (3 << 20,)


def test_a_huge_array_is_refused_before_anything_is_uploaded() -> None:
    rt = runtime.get()
    total = rt.pool.total
    limit = min(rt.limits["max-storage-buffer-binding-size"], rt.limits["max-buffer-size"])
    huge = np.broadcast_to(np.float32(1), (limit // 4 + 1,))
    with pytest.raises(tj.DeviceOutOfMemoryError, match=rf"{limit + 4:,} bytes.*at most {limit:,} bytes"):
        tj.trace(lambda x: x + 1)(huge, device="wgpu")
    assert rt.pool.total == total


def test_programs_that_are_dropped_release_their_memory() -> None:
    pool = runtime.get().pool
    x = np.ones((64, 64), np.float32)

    def use() -> None:
        f = tj.trace(lambda x: ((x @ x) + 1) @ x)
        f(x, device="wgpu")

    use()
    gc.collect()
    before, programs = pool.in_use, len(pool.caches)
    for _ in range(5):
        use()
    gc.collect()
    assert pool.in_use <= before and len(pool.caches) <= programs
