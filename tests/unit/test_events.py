"""The event stream: one compile event per program and observer, then one consistent step event per call."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import tracejit as tj
from tracejit.events import (
    CompileEvent,
    KernelInfo,
    Observer,
    Recorder,
    StepEvent,
    current_observers,
    observe,
)

X = np.arange(6, dtype=np.float32).reshape(2, 3)


def model(w, x):
    with tj.named_scope("dense"):
        h = np.tanh(x @ w)
    return (h * h).mean(), h


W = np.full((3, 4), 0.5, np.float32)


def test_one_compile_event_then_one_step_per_call(device: str) -> None:
    f = tj.trace(model)
    recorder = Recorder()
    with observe(recorder):
        for _ in range(3):
            f(W, X, device=device)
    assert len(recorder.compiles) == 1 and len(recorder.steps) == 3
    compiled = recorder.compiles[0]
    assert compiled.name == "model" and compiled.device.startswith(device)
    assert [s.step for s in recorder.steps] == [0, 1, 2]
    assert {s.program for s in recorder.steps} == {compiled.program}


def test_an_already_compiled_program_introduces_itself_to_a_new_observer(device: str) -> None:
    f = tj.trace(model)
    f(W, X, device=device)
    first, second = Recorder(), Recorder()
    with observe(first):
        f(W, X, device=device)
    with observe(second):
        f(W, X, device=device)
        f(W, X, device=device)
    assert len(first.compiles) == 1 and len(second.compiles) == 1
    assert first.compiles[0].program == second.compiles[0].program
    assert len(first.steps) == 1 and len(second.steps) == 2


def test_the_arrays_of_a_step_fit_together(device: str) -> None:
    recorder = Recorder()
    with observe(recorder):
        tj.trace(model)(W, X, device=device)
    step, compiled = recorder.steps[0], recorder.compiles[0]
    n = len(step.kernels)
    assert n > 0
    assert len(step.start) == len(step.end) == len(step.live) == len(step.lane) == n
    assert step.kernels.dtype == np.uint32 and step.lane.dtype == np.uint8
    assert step.start.dtype == step.end.dtype == step.live.dtype == np.int64
    assert (step.end >= step.start).all()
    assert step.begin <= step.finish
    assert (step.live >= 0).all() and step.live.max() > 0
    assert set(step.kernels.tolist()) <= {k.id for k in compiled.kernels}
    if device != "wgpu":  # device clocks are shifted onto the host's only approximately
        assert step.begin <= step.start.min() and step.end.max() <= step.finish


def test_kernels_cover_nodes_of_the_graph_that_was_sent(device: str) -> None:
    recorder = Recorder()
    with observe(recorder):
        tj.trace(tj.grad(lambda w, x: model(w, x)[0]))(W, X, device=device)
    compiled = recorder.compiles[0]
    nodes = compiled.graph["nodes"]
    covered = {i for k in compiled.kernels for i in k.nodes}
    assert covered <= set(range(len(nodes)))
    assert {i for i, n in enumerate(nodes) if n["op"] in ("tanh", "dot_general")} <= covered
    assert all(k.bytes >= 0 and k.flops >= 0 for k in compiled.kernels)
    assert any(k.flops > 0 for k in compiled.kernels)
    assert {n["op"] for n in nodes} == {name for name in compiled.ops if not name.endswith("/")}
    assert all(
        {"category", "meaning", "formula", "shape_rule", "grad_rule"} <= set(row)
        for row in compiled.ops.values()
    )


def test_results_are_the_same_observed_or_not(device: str) -> None:
    f = tj.trace(model)
    plain = f(W, X, device=device)
    with observe(Recorder()):
        watched = f(W, X, device=device)
    for a, b in zip(plain, watched):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_the_loss_is_the_first_scalar_floating_output(device: str) -> None:
    recorder = Recorder()
    with observe(recorder):
        value = tj.trace(model)(W, X, device=device)[0]
        tj.trace(lambda x: x * 2)(X, device=device)
        tj.trace(lambda x: (x * 2, x.astype(np.int32).sum(), x.max()))(X, device=device)
    assert recorder.steps[0].loss == pytest.approx(float(value))
    assert recorder.steps[1].loss is None
    assert recorder.steps[2].loss == 5.0


def test_wanted_values_come_with_the_step(device: str) -> None:
    f = tj.trace(model)
    recorder = Recorder()
    with observe(recorder):
        f(W, X, device=device)
        compiled = recorder.compiles[0]
        tanh = next(n["id"] for n in compiled.graph["nodes"] if n["op"] == "tanh")
        first = compiled.graph["inputs"][1]
        recorder.want[compiled.program] = (tanh, first)
        f(W, X, device=device)
        recorder.want.clear()
        f(W, X, device=device)
    assert not recorder.steps[0].values and not recorder.steps[2].values
    values = recorder.steps[1].values
    assert set(values) == {tanh, first}
    np.testing.assert_allclose(values[tanh], np.tanh(X @ W), rtol=1e-5)
    np.testing.assert_array_equal(values[first], X)


def test_wanted_values_are_the_observers_own() -> None:
    """Changing them changes neither the program's inputs nor its results."""
    f = tj.trace(lambda x: (x + 0, x))
    recorder = Recorder()
    x = X.copy()
    with observe(recorder):
        f(x)
        recorder.want[recorder.compiles[0].program] = (0,)
        f(x)
        recorder.steps[-1].values[0][:] = -1
    np.testing.assert_array_equal(x, X)


def test_nonsense_wishes_are_ignored() -> None:
    f = tj.trace(lambda x: x * 2)
    recorder = Recorder()
    with observe(recorder):
        f(X)
        recorder.want[recorder.compiles[0].program] = (10_000, -3)
        np.testing.assert_array_equal(f(X), X * 2)
    assert recorder.steps[1].values == {}


def test_several_observers_each_get_everything() -> None:
    outer, inner = Recorder(), Recorder()
    f = tj.trace(lambda x: x * 2)
    with observe(outer):
        f(X)
        with observe(inner):
            assert current_observers() == (outer, inner)
            f(X)
        f(X)
    assert len(outer.compiles) == 1 and len(outer.steps) == 3
    assert len(inner.compiles) == 1 and len(inner.steps) == 1
    assert outer.steps[1] is inner.steps[0], "one event for all"
    assert current_observers() == ()


def test_without_observers_no_event_is_ever_made(monkeypatch: pytest.MonkeyPatch) -> None:
    from tracejit import compilation

    def never(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("an event was made although nobody watches")

    f = tj.trace(lambda x: x * 2)
    monkeypatch.setattr(compilation.Entry, "compile_event", never)
    monkeypatch.setattr(compilation.Entry, "run_observed", never)
    monkeypatch.setattr(compilation.events, "StepEvent", never)
    f(X)
    f(X)


def test_observers_belong_to_their_thread() -> None:
    import threading

    recorder = Recorder()
    f = tj.trace(lambda x: x * 2)
    with observe(recorder):
        thread = threading.Thread(target=f, args=(X,))
        thread.start()
        thread.join()
    assert recorder.steps == []


def test_an_observer_that_raises_is_removed_by_leaving_the_block() -> None:
    class Failing(Recorder):
        def on_step(self, event: StepEvent) -> None:
            raise RuntimeError("observer")

    f = tj.trace(lambda x: x * 2)
    with pytest.raises(RuntimeError, match="observer"), observe(Failing()):
        f(X)
    np.testing.assert_array_equal(f(X), X * 2)


def test_nested_traced_functions_are_one_program() -> None:
    inner = tj.trace(lambda x: x * 2)
    recorder = Recorder()
    with observe(recorder):
        tj.trace(lambda x: inner(x) + inner(x + 1))(X)
    assert len(recorder.compiles) == 1 and len(recorder.steps) == 1


def test_retraces_are_new_programs() -> None:
    f = tj.trace(lambda x: x * 2)
    recorder = Recorder()
    with observe(recorder):
        f(X)
        f(X[0])
        f(X)
    assert len(recorder.compiles) == 2
    assert [s.program for s in recorder.steps] == [recorder.compiles[i].program for i in (0, 1, 0)]


def test_events_turn_into_json() -> None:
    import json

    recorder = Recorder()
    with observe(recorder):
        tj.trace(model)(W, X)
    data = json.loads(json.dumps(recorder.compiles[0].to_json()))
    assert data["schema"] == 1 and data["name"] == "model"
    assert tj.Graph.from_json(data["graph"]) is not None
    assert data["kernels"][0]["kind"]


def test_generated_source_is_sent_only_when_asked_for() -> None:
    calls = []

    def source() -> str:
        calls.append(1)
        return "code"

    kernel = KernelInfo(0, "k", "loop", (1,), 10, 20, source)
    assert "source" not in kernel.to_json() and calls == []
    assert kernel.to_json(with_source=True)["source"] == "code"


def test_the_recorder_is_an_observer() -> None:
    assert isinstance(Recorder(), Observer)
    assert CompileEvent(1, "f", "numpy", {}, ()).to_json()["kernels"] == []
