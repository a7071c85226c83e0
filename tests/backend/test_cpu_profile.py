"""``profile`` and ``inspect`` on the native CPU backend: what a user sees and exports, and the events beneath."""

from __future__ import annotations

import dataclasses
import io
import json

import numpy as np
import pytest
from rich.console import Console

import tracejit as tj
from tracejit import nn
from tracejit.events import KernelInfo, Recorder, observe
from tracejit.profile import KernelProfile, Profile

PARAMS = {
    "w": np.full((64, 96), 0.01, np.float32),
    "b": np.zeros(96, np.float32),
    "v": np.full((96, 10), 0.02, np.float32),
}
X = np.linspace(-1, 1, 32 * 64, dtype=np.float32).reshape(32, 64)


def model(params, x):
    with tj.named_scope("dense"):
        h = nn.gelu(x @ params["w"] + params["b"], approximate="tanh")
    return nn.softmax(h @ params["v"])


def shown(value, width):
    out = io.StringIO()
    Console(file=out, width=width, color_system=None).print(value)
    return out.getvalue().splitlines()


@pytest.fixture(scope="module")
def profile():
    return tj.trace(model, device="cpu").profile(PARAMS, X, repeat=4)


# -- profile ----------------------------------------------------------------------------------------------------------


def test_rows_say_what_where_and_how_fast(profile):
    assert profile.device == "cpu" and profile.name == "model" and len(profile.steps) == 4
    by_place = {r.where: r for r in profile.rows}
    assert "dense" in by_place and "softmax" in by_place
    dense = by_place["dense"]
    assert dense.kernel.kind == "contract" and dense.kernel.flops >= 2 * 32 * 64 * 96
    assert dense.gflops == pytest.approx(dense.kernel.flops / dense.mean_us / 1e3)
    assert sum(r.share for r in profile.rows) == pytest.approx(1)
    assert profile.kernel_us == pytest.approx(sum(r.mean_us for r in profile.rows))
    assert profile.peak_gflops > 1 and profile.peak_gbytes > 0.5
    assert all(profile.percent_of_roofline(r) > 0 for r in profile.rows)
    assert profile.bound(by_place["softmax"]) == "memory"


@pytest.mark.parametrize("width", [80, 100, 120, 200])
def test_the_table_fits_the_terminal(profile, width):
    lines = shown(profile, width)
    assert max(map(len, map(str.rstrip, lines))) <= width
    head = next(line for line in lines if "mean us" in line)
    assert ("where" in head) == (width >= 100)
    for column in ("kernel", "p95 us", "share", "GFLOP/s", "GB/s", "% peak"):
        assert column in head
    text = "\n".join(lines)
    assert "model on cpu" in text and "peak, measured here" in text
    assert len([line for line in lines if line.count("%") == 2 or "% m" in line]) >= len(profile.rows)


def test_long_names_and_many_kernels_are_shortened():
    rows = []
    for i in range(90):
        kernel = KernelInfo(i, f"kernel_{i}_" + "add_" * 30, "loop", (), bytes=10**8, flops=10**11)
        rows.append(KernelProfile(kernel, 1e4 - i, 1e4, 1 / 90, 1e5, 100.0, "block0/" * 12))
    big = Profile("step", "cpu", rows, 9e8, (), 1e5, 100.0)
    for width in (80, 120):
        lines = shown(big, width)
        assert max(map(len, map(str.rstrip, lines))) <= width
        assert sum("kernel_" in line for line in lines) == 30
        (rest,) = [line for line in lines if "60 more" in line]
        assert "66.7%" in rest
        assert any("…" in line for line in lines)
    assert sum("kernel_" in line for line in shown(big.table(200), 200)) == 90
    assert "60 more" in str(big)
    assert "% peak" in str(dataclasses.replace(big, peak_gflops=None))


def test_the_trace_has_calls_kernels_and_memory(profile, tmp_path):
    path = tmp_path / "trace.json"
    profile.to_chrome_trace(path)
    events = json.loads(path.read_text())["traceEvents"]
    names = {e["name"]: e["args"]["name"] for e in events if e["ph"] == "M"}
    assert names["process_name"] == "model on cpu"
    calls = [e for e in events if e.get("cat") == "call"]
    kernels = [e for e in events if e["ph"] == "X" and e.get("cat") != "call"]
    memory = [e for e in events if e["ph"] == "C"]
    assert len(calls) == 4 and len(kernels) == len(memory) == 4 * len(profile.rows)
    for k in kernels:
        inside = [c for c in calls if c["ts"] <= k["ts"] and k["ts"] + k["dur"] <= c["ts"] + c["dur"] + 1e-3]
        assert len(inside) == 1
        assert k["args"]["bytes"] > 0 and k["args"]["live_bytes"] > 0
    assert any("dot_general" in node for k in kernels for node in k["args"]["nodes"])


def test_observed_runs_report_every_kernel_and_change_nothing():
    f = tj.trace(model, device="cpu")
    want = f(PARAMS, X).copy()
    recorder = Recorder()
    with observe(recorder):
        for _ in range(3):
            np.testing.assert_array_equal(f(PARAMS, X), want)
    (compiled,) = recorder.compiles
    for step in recorder.steps:
        assert sorted(step.kernels) == [k.id for k in compiled.kernels]
        assert (step.start <= step.end).all() and (step.end[:-1] <= step.start[1:]).all()
        assert step.begin <= step.start[0] and step.end[-1] <= step.finish
        assert (step.live > 0).all()


def test_observed_results_are_not_overwritten_by_the_next_call():
    f = tj.trace(lambda x: x * 2, device="cpu")
    with observe(Recorder()):
        results = [f(np.full(1000, i, np.float32)) for i in range(8)]
    for i, r in enumerate(results):
        assert (r == 2 * i).all()


# -- inspect ----------------------------------------------------------------------------------------------------------


def test_inspection_shows_every_stage_and_shortens_code():
    report = tj.trace(model, device="cpu").inspect(PARAMS, X)
    text = str(report)
    parts = (
        "recorded graph",
        "passes",
        "optimised graph",
        "kernels",
        "memory",
        "fusion report",
        "LLVM IR",
        "assembly",
    )
    places = [text.index(f"\n{part}\n") if part != "kernels" else text.index(" kernels\n") for part in parts]
    assert places == sorted(places)
    assert "more lines in .code['LLVM IR']" in text and "more lines in .code['assembly']" in text
    assert len(text.splitlines()) < 250
    full = report.report(code_lines=None)
    assert all(text.rstrip() in full for text in report.code.values()) and "more lines in" not in full
    assert "define" in report.code["LLVM IR"] and "fma" in report.code["LLVM IR"]
    assert "retq" in report.code["assembly"] or "ret" in report.code["assembly"]


def test_each_kernel_has_its_own_source():
    report = tj.trace(model, device="cpu").inspect(PARAMS, X)
    sources = [k.source() for k in report.kernels]
    assert all("define" in s for s in sources) and len(set(sources)) == len(sources)


def test_the_memory_plan_names_places_and_lives():
    text = tj.trace(model, device="cpu").inspect(PARAMS, X).memory
    assert "arena" in text and "lower bound" in text
    (hidden,) = [line for line in text.splitlines() if f"{32 * 96 * 4:,} bytes" in line]
    assert "k0-k1" in hidden and "offset" in hidden and "float32" in hidden
