"""What a call costs on wgpu: one submission, nothing uploaded or built twice, nothing waited for, nothing leaked."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import tracejit as tj
from tracejit import nn, optim
from tracejit_wgpu import fastpath, runtime

RNG = np.random.default_rng(0)
X = RNG.standard_normal((32, 16)).astype(np.float32)
Y = RNG.integers(0, 4, 32).astype(np.int32)


def training() -> tuple[Any, Any, Any]:
    """(step, model, optimiser state) of a small classifier."""
    rng = np.random.default_rng(1)
    model = nn.Sequential(nn.Linear(16, 32, rng=rng), nn.relu, nn.Linear(32, 4, rng=rng))
    opt = optim.adamw(1e-3)

    @tj.trace(device="wgpu")
    def step(model: Any, state: Any, x: Any, y: Any, scale: float) -> Any:
        loss, grads = tj.value_and_grad(lambda m: nn.cross_entropy(m(x), y) * scale)(model)
        model, state = opt.update(model, grads, state)
        return loss, model, state

    return step, model, opt.init(model)


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """How often the device was asked for what."""
    rt = runtime.get()
    seen: Counter[str] = Counter()

    def count(owner: Any, name: str, label: str) -> None:
        plain = getattr(owner, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            seen[label] += 1
            return plain(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)

    count(fastpath, "submit", "submission")
    count(rt, "write", "upload")
    count(rt, "write_uniform", "uniform")
    count(rt, "read", "readback")
    count(rt, "bind_group", "bind group")
    count(rt.pool, "_create", "buffer")
    count(rt.device, "create_compute_pipeline", "pipeline")
    yield seen


def test_a_warm_training_step_is_one_submission_and_two_uploads(counts: Counter[str]) -> None:
    """Parameters and optimiser state stay on the device; batch and labels are the only data that changed hands."""
    gc.collect()  # buffers of other tests' garbage would come back, and be taken, in between
    step, model, state = training()
    for _ in range(6):
        loss, model, state = step(model, state, X, Y, 1.0)
    counts.clear()
    for n in range(5):
        loss, model, state = step(model, state, X, Y, 1.0)
        assert counts == {"submission": n + 1, "upload": 2 * (n + 1)}
    assert float(loss) < 2
    assert counts["readback"] == 1
    step(model, state, X, Y, 0.5)  # a Python number travels in the uniform block, and only when it changed
    assert counts["uniform"] == 1 and counts["upload"] == 12


def test_what_lies_on_the_device_is_not_uploaded_again(counts: Counter[str]) -> None:
    f = tj.trace(lambda x: x * 2 + 1)
    y = f(X, device="wgpu")
    y = f(y, device="wgpu")
    counts.clear()
    for _ in range(3):
        y = f(y, device="wgpu")
    assert counts["upload"] == 0 and counts["readback"] == 0
    np.asarray(y)
    assert counts["readback"] == 1


def test_an_array_changed_in_place_by_its_owner_is_seen() -> None:
    f = tj.trace(lambda x: x + 1)
    x = np.zeros(4, np.float32)
    first = f(x, device="wgpu")
    x[:] = 5
    np.testing.assert_array_equal(np.asarray(f(x, device="wgpu")), 6)
    np.testing.assert_array_equal(np.asarray(first), 1)


def test_equal_code_is_compiled_once_per_device(counts: Counter[str]) -> None:
    def make() -> Any:
        return tj.trace(lambda x: np.tanh(x) * 3.125)

    make()(X, device="wgpu")
    counts.clear()
    make()(X, device="wgpu")
    assert counts["pipeline"] == 0


def test_pipelines_are_compiled_in_parallel(monkeypatch: pytest.MonkeyPatch) -> None:
    if (os.cpu_count() or 1) < 2:
        return
    rt = runtime.get()
    build, threads = rt.pipeline, set()

    def slow(dispatch: Any) -> Any:
        threads.add(threading.get_ident())
        time.sleep(0.02)
        return build(dispatch)

    monkeypatch.setattr(rt, "pipeline", slow)
    a = RNG.standard_normal((9, 11)).astype(np.float32)
    tj.trace(lambda a: (np.sort(a @ a.T), np.cumsum(a), nn.softmax(a.T @ a)))(a, device="wgpu")
    assert len(threads - {threading.get_ident()}) >= 2


def test_pipelines_that_nobody_uses_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "PIPELINES", 3)
    for n in range(6):
        f = tj.trace(lambda x, n=n: x * (n + 0.123))
        np.testing.assert_allclose(np.asarray(f(X, device="wgpu")), X * np.float32(n + 0.123), rtol=1e-6)
    rt = runtime.get()
    assert len(rt._pipelines) <= 3
    assert tj.trace(lambda x: x * 0.123)(X, device="wgpu").shape == X.shape  # built again


def test_a_call_returns_before_the_device_has_finished() -> None:
    product = tj.trace(lambda a: np.tanh(a @ a) @ a)
    a = RNG.standard_normal((512, 512)).astype(np.float32)
    y = product(a, device="wgpu")
    np.asarray(y)
    begin = time.perf_counter()
    y = product(y, device="wgpu")
    queued = time.perf_counter() - begin
    np.asarray(y)
    assert queued < 0.5 * (time.perf_counter() - begin)


def test_a_loop_cannot_queue_without_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "IN_FLIGHT", 4)
    rt = runtime.get()
    waited: list[int | None] = []
    wait = fastpath.wait
    monkeypatch.setattr(
        fastpath, "wait", lambda device, index: (waited.append(index), wait(device, index))[1]
    )
    f = tj.trace(lambda x: x + 1)
    y = f(X, device="wgpu")
    rt.finish()
    waited.clear()
    for n in range(12):
        y = f(y, device="wgpu")
        assert len(rt._in_flight) <= 4
        assert len(waited) == max(0, n - 3)  # one in, the oldest out
    if waited[0] is not None:
        assert waited == sorted(waited, key=lambda i: i or 0)
    np.testing.assert_allclose(np.asarray(y), X + 13, rtol=1e-5)


def test_staging_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "STAGED_BYTES", 1 << 20)
    rt = runtime.get()
    rt.finish()
    x = np.ones(1 << 17, np.float32)  # 512 KiB
    total = tj.trace(lambda x: x.sum())
    for n in range(8):  # with calls between the uploads
        last = total(x + n, device="wgpu")
        assert rt._queued + rt._staged <= 2 << 20
    assert float(last) == 8 << 17
    handles = []
    for _ in range(8):  # without
        handles.append(rt.upload(x))
        assert rt._staged <= 1 << 20
    np.testing.assert_array_equal(rt.read(handles[0], x.nbytes, x.dtype), x)


def resident() -> int:
    """Resident memory of this process in bytes."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_training_loop_does_not_grow() -> None:
    """400 steps after a warm-up: no byte of device memory, no buffer, no pipeline, no resident memory to speak of."""
    from wgpu.backends.wgpu_native._helpers import generate_report

    gc.collect()
    step, model, state = training()

    def facts() -> tuple[Any, ...]:
        hub = generate_report()["hub"]
        pool = runtime.get().pool
        kept = [hub[k]["kept"] for k in ("buffers", "computePipelines", "commandBuffers")]
        return hub["bindGroups"]["kept"], [*kept, pool.total, len(pool._all)]

    def run(n: int) -> float:
        nonlocal model, state
        for _ in range(n):
            loss, model, state = step(model, state, X, Y, 1.0)
        return float(loss)

    first = run(100)
    (groups, before), memory = facts(), resident()
    assert run(400) < first
    now, after = facts()
    assert (
        after == before and now <= groups + 40
    )  # the cache keeps groups for some sets of buffers, not for ever more
    assert resident() < memory + (4 << 20)


def test_kept_results_do_not_slow_the_caches_or_change() -> None:
    """Losses kept as device arrays: a new buffer in every step, the caches stay bounded, the values stay."""
    step, model, state = training()
    kept, read = [], []
    for _ in range(60):
        loss, model, state = step(model, state, X, Y, 1.0)
        kept.append(loss)
        if len(read) < 5:
            read.append(float(loss))
    assert [float(v) for v in kept[:5]] == read
    assert len({v.storage.handle.buffer.uid for v in kept}) == 60
    (entry,) = step._cache.values()
    executable = entry[0].executable
    assert len(executable._recordings) <= 16 and all(len(g) <= 33 for g in executable._groups)


def test_threads_share_a_device() -> None:
    f = tj.trace(lambda x, k: np.tanh(x * k) @ x.T)
    expected = [f(X, float(k), device="numpy") for k in range(4)]
    wrong: list[Any] = []

    def work(k: int) -> None:
        for _ in range(10):
            y = np.asarray(f(X, float(k), device="wgpu"))
            if not np.allclose(y, expected[k], rtol=1e-4, atol=1e-5):
                wrong.append((k, y))

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def test_everything_works_on_wgpus_public_api_alone() -> None:
    """Without the raw handles (another build of wgpu-py): same numbers, waiting and profiling included."""
    code = """
import numpy as np, tracejit as tj
from tests.backend import test_wgpu_runtime as t
from tracejit_wgpu import fastpath, runtime
assert not fastpath.available()
runtime.IN_FLIGHT = 3
step, model, state = t.training()
for _ in range(12):
    loss, model, state = step(model, state, t.X, t.Y, 1.0)
assert len(runtime.get()._in_flight) <= 3
runtime.get().finish()
profile = step.profile(model, state, t.X, t.Y, 1.0, repeat=2)
assert profile.rows and sum(r.mean_us for r in profile.rows) > 0
print(float(loss))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "TRACEJIT_WGPU_FASTPATH": "0"},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    step, model, state = training()
    for _ in range(12):
        loss, model, state = step(model, state, X, Y, 1.0)
    assert float(done.stdout) == pytest.approx(float(loss), rel=1e-5)
