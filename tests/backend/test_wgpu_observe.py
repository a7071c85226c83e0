"""Seeing what the GPU does: times per kernel, events, the generated WGSL."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tracejit as tj
from tracejit import nn
from tracejit.events import Recorder
from tracejit.events import observe as observe_calls
from tracejit_wgpu import fastpath, observe, runtime

X = np.random.default_rng(0).standard_normal((64, 96)).astype(np.float32)
W = np.random.default_rng(1).standard_normal((96, 96)).astype(np.float32)


def model(x: Any, w: Any) -> Any:
    return nn.softmax(np.tanh(x @ w) @ w).sum(0)


@pytest.fixture(params=["inside passes", "per pass", "host clock"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The three ways to time kernels, as the adapter's features allow."""
    rt = runtime.get()
    missing = {
        "inside passes": set(),
        "per pass": {"timestamp-query-inside-passes"},
        "host clock": {"timestamp-query"},
    }
    monkeypatch.setattr(rt, "features", rt.features - missing[request.param])
    return str(request.param)


def test_profile_times_every_kernel(way: str, tmp_path: Path) -> None:
    profile = tj.trace(model).profile(X, W, device="wgpu", repeat=4)
    assert len(profile.rows) >= 3 and all(row.mean_us > 0 for row in profile.rows)
    text = str(profile)
    assert "wgpu" in text and "matmul" in text and "GFLOP/s" in text
    path = tmp_path / "trace.json"
    profile.to_chrome_trace(path)
    events = json.loads(path.read_text())
    assert len([e for e in events["traceEvents"] if e.get("ph") == "X"]) >= 4 * len(profile.rows)


def test_times_lie_in_the_call_and_in_order(way: str) -> None:
    recorder = Recorder()
    f = tj.trace(model)
    f(X, W, device="wgpu")
    with observe_calls(recorder):
        result = f(X, W, device="wgpu")
    np.testing.assert_allclose(np.asarray(result), f(X, W, device="numpy"), rtol=1e-4)
    (event,), (compiled,) = recorder.steps, recorder.compiles
    assert sorted(set(event.kernels.tolist())) == [k.id for k in compiled.kernels]
    assert np.all(event.end >= event.start)
    slack = 50_000_000  # the clocks are joined when the queue is empty
    assert event.start.min() > event.begin - slack and event.end.max() <= event.finish
    assert np.all(np.diff(event.end) >= 0)
    assert np.all(event.live > 0)


@pytest.mark.skipif(
    os.environ.get("TRACEJIT_WGPU_LIMITS") == "default", reason="WebGPU's defaults have no timestamps"
)
def test_timestamps_are_real() -> None:
    """A kernel with thousands of times the work takes longer than the small one beside it."""
    rt = runtime.get()
    if "timestamp-query" not in rt.features:
        pytest.fail("the test driver has timestamp queries")
    a, b = np.ones((16, 16), np.float32), np.ones((320, 320), np.float32)
    profile = tj.trace(lambda a, b: (a @ a, b @ b)).profile(a, b, device="wgpu", repeat=3)
    times = sorted(row.mean_us for row in profile.rows)
    assert times[-1] > 1.2 * times[0]  # a large GPU starts a kernel in about the time of the small one
    assert observe.timestamp_period(rt) > 0 and fastpath.available()


def test_observers_see_control_flow(way: str) -> None:
    f = tj.trace(lambda x: tj.while_loop(lambda v: v.sum() < 1000, lambda v: v * 2 + 1, x))
    x = np.ones(3, np.float32)
    profile = f.profile(x, device="wgpu", repeat=2)
    assert any("while" in row.kernel.name for row in profile.rows)


def test_inspect_shows_wgsl_and_dispatches() -> None:
    report = tj.trace(model).inspect(X, W, device="wgpu")
    wgsl, dispatches = report.code["WGSL"], report.code["dispatches"]
    assert wgsl.count("@compute") >= 3 and "var<storage, read>" in wgsl and "// ==== kernel 0" in wgsl
    assert "dispatches" in dispatches and "grid" in dispatches and "temporary buffers" in dispatches
    assert "WGSL" in str(report)


def test_a_rejected_shader_is_a_compile_error_with_its_file(monkeypatch: pytest.MonkeyPatch) -> None:
    from tracejit_wgpu import wgsl

    monkeypatch.setitem(wgsl._HELPED, "erf", "exp_(nonsense + ")
    monkeypatch.setattr(wgsl.Helpers, "__call__", lambda self, name: name)
    with pytest.raises(tj.CompileError, match=r"(?s)rejected generated code.*\.wgsl") as caught:
        tj.trace(lambda x: nn.gelu(x))(X, device="wgpu")
    path = Path(str(caught.value).rsplit("its WGSL is in ", 1)[1].split(";")[0].strip())
    assert "nonsense" in path.read_text()
    path.unlink()
