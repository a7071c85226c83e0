"""Whole programs on disk: the same bits without optimising and lowering again, and never a wrong program."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest

import tracejit as tj
from tests.benchmarks import peer_tracejit, workloads
from tracejit import compilation, events, fingerprint, nn
from tracejit.trees import flatten
from tracejit_cpu import codecache, programcache

X = np.linspace(-1, 1, 60, dtype=np.float32).reshape(6, 10)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty cache of this test; the directory of the CPU backend in it."""
    monkeypatch.delenv("TRACEJIT_DEBUG_PASSES", raising=False)  # who asks for checked passes gets passes
    monkeypatch.setenv("TRACEJIT_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "cpu"


def softmax_of(scale: float = 2.0, offset=0.0):
    return tj.trace(lambda x: nn.softmax(np.tanh(x) * scale + offset), device="cpu")


def entry_of(fn, *args):
    return fn._entry_for(args, {})[0]


def was_restored(entry) -> bool:
    return entry.executable._stored is not None


def program_file(folder):
    """The entry of the one program in the cache."""
    (file,) = (f for f in folder.glob("*.tjo") if b'"buffers"' in f.read_bytes()[:2000])
    return file


def test_the_second_time_nothing_is_optimised_or_lowered(monkeypatch):
    first = softmax_of()
    expected = first(X)
    assert not was_restored(entry_of(first, X))

    def fail(*args):
        raise AssertionError("should come from the disk")

    monkeypatch.setattr(compilation, "optimise", fail)
    monkeypatch.setattr(compilation, "build_program", fail)
    second = softmax_of()
    assert second(X).tobytes() == expected.tobytes()
    assert was_restored(entry_of(second, X))
    for _ in range(4):  # the native entry and the plan of the fast path too
        assert second(X).tobytes() == expected.tobytes()
    assert second(X[:, ::-1][:, ::-1]).tobytes() == expected.tobytes()


@pytest.mark.parametrize("name", ["a", "b", "e2", "f", "h"])
def test_workloads_give_the_same_bits(name):
    def results():
        data, params = workloads.make(name)
        if name in workloads.OPTIMISER:
            opt, step = peer_tracejit.train_step(name)
            state = opt.init(params)
            for _ in range(2):
                loss, params, state = step(params, state, data["x"], data["y"], device="cpu")
            used = next(iter(step._cache.values()))[0]
            return flatten((loss, params, state))[0], was_restored(used)
        if name == "f":
            step = tj.trace(tj.value_and_grad(peer_tracejit.model_loss("f"), wrt=(0, 1)), device="cpu")
            value = step(params, data["x"], data["gy"])
        else:
            step = tj.trace(lambda x: nn.layer_norm(x, data["g"], data["b"]), device="cpu")
            value = step(data["x"])
        return flatten(value)[0], was_restored(next(iter(step._cache.values()))[0])

    (fresh, old), (stored, new) = results(), results()
    assert (old, new) == (False, True)
    for a, b in zip(fresh, stored, strict=True):
        assert (
            np.asarray(a).tobytes() == np.asarray(b).tobytes() and np.asarray(a).dtype == np.asarray(b).dtype
        )


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: (x, x, x * 2, 3.0, np.arange(4)),  # inputs, constants and repeated results
        lambda x: x.sum(),
        lambda x: x[:0],
        lambda x: {"a": x.astype(np.float64) + 1, "b": x > 0, "c": np.argmax(x, axis=1)},
        lambda x: tj.where(x > 0, np.float32(np.nan), -0.0 * x),
        lambda x: x @ np.linspace(0, 1, 30, dtype=np.float32).reshape(10, 3),
    ],
)
def test_unusual_results(fn):
    results = []
    for _ in range(2):
        leaves, tree = flatten(tj.trace(fn, device="cpu")(X))
        results.append(([(type(v), np.asarray(v).dtype, np.asarray(v).tobytes()) for v in leaves], tree))
    assert results[0] == results[1]


def test_what_python_runs_is_not_stored_and_works(folder):
    def fn(x):
        return tj.cond(x.sum() > 0, lambda v: np.sort(v, axis=0), lambda v: -v, x)

    for _ in range(2):
        f = tj.trace(fn, device="cpu")
        np.testing.assert_array_equal(f(X + 1), np.sort(X + 1, axis=0))
        assert not was_restored(entry_of(f, X))


def test_looking_inside_lowers_again():
    first = softmax_of()
    first(X)
    second = softmax_of()
    second(X)
    assert was_restored(entry_of(second, X))
    a, b = first.inspect(X), second.inspect(X)
    assert str(a.optimised) and a.memory == b.memory and a.code == b.code
    assert [(k.name, k.kind, k.nodes, k.bytes, k.flops) for k in a.kernels] == [
        (k.name, k.kind, k.nodes, k.bytes, k.flops) for k in b.kernels
    ]
    assert all(k.source() for k in b.kernels)
    third = softmax_of()
    profile = third.profile(X, repeat=2)
    assert a.kernels[0].name in str(profile) and third.graph(X) is entry_of(third, X).optimised


def test_observers_see_the_kernels():
    softmax_of()(X)
    f = softmax_of()
    expected = f(X)
    assert was_restored(entry_of(f, X))
    recorder = events.Recorder()
    with events.observe(recorder):
        assert f(X).tobytes() == expected.tobytes()
    (compiled,), (step,) = recorder.compiles, recorder.steps
    assert len(compiled.kernels) == len(entry_of(f, X).program.kernels) >= 1
    assert len(step.kernels) == len(compiled.kernels) and (step.end > step.start).all()
    recorder.want[compiled.program] = (0, 1)
    with events.observe(recorder):
        f(X)
    assert sorted(recorder.steps[-1].values) == [0, 1]


def test_graphs_that_differ_have_other_keys():
    def key(fn, *args):
        return fingerprint.program_key(entry_of(tj.trace(fn, device="cpu"), *args).traced.graph)

    Y = X.astype(np.float64)
    base = key(lambda x: x * 2.0 + x.sum(0), X)
    assert base == key(lambda x: x * 2.0 + x.sum(0), X)
    different = [
        key(lambda x: x * 2.5 + x.sum(0), X),
        key(lambda x: x * 2.0 + x.sum(1, keepdims=True), X),
        key(lambda x: x * 2.0 + x.max(0), X),
        key(lambda x: x * 2.0 - x.sum(0), X),
        key(lambda x: x.sum(0) + 2.0 * x.T.T * 1, X),
        key(lambda x: x * 2.0 + x.sum(0), X[:5]),
        key(lambda x: x * 2.0 + x.sum(0), Y),
        key(lambda x: (x * 2.0 + x.sum(0), x), X),
        key(lambda x: x * -0.0 + x.sum(0), X),
        key(lambda x: x * 0.0 + x.sum(0), X),
        key(lambda x: x + np.array([1, 2], np.float32).repeat(5), X),
        key(lambda x: tj.where(x > 0, x, 1.0), X),
        key(lambda x: tj.where(x > 0, 1.0, x), X),
    ]
    assert len({base, *different}) == len(different) + 1


def test_sources_are_part_of_the_key(monkeypatch):
    softmax_of()(X)
    monkeypatch.setattr(fingerprint, "sources", lambda: "other")
    f = softmax_of()
    f(X)
    assert not was_restored(entry_of(f, X))


def test_every_source_file_counts(tmp_path, monkeypatch):
    package = tmp_path / "package"
    (package / "lower").mkdir(parents=True)
    inner = package / "lower" / "fusion.py"
    inner.write_text("a = 1\n")
    monkeypatch.setattr(fingerprint, "__file__", str(package / "fingerprint.py"))
    digest = fingerprint.sources.__wrapped__
    before = digest()
    assert digest() == before
    inner.write_text("a = 2\n")  # as long as before
    os.utime(inner, ns=(1, 1))
    changed = digest()
    assert changed != before
    (package / "new.py").write_text("")
    assert digest() not in (before, changed)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-1] + bytes([data[-1] ^ 1]),
        lambda data: data[: len(data) // 2],
        lambda data: b"",
        lambda data: b"\x80\x04cos\nsystem\n",  # nothing is unpickled
    ],
)
def test_a_damaged_entry_is_not_used(folder, damage):
    expected = softmax_of()(X)
    file = program_file(folder)
    file.write_bytes(damage(file.read_bytes()))
    f = softmax_of()
    assert f(X).tobytes() == expected.tobytes()
    assert not was_restored(entry_of(f, X))
    g = softmax_of()  # it was written anew
    assert g(X).tobytes() == expected.tobytes() and was_restored(entry_of(g, X))


@pytest.mark.parametrize("drop", ["object", "buffers", "kernels", "outputs", "constants", "arena"])
def test_an_entry_of_another_form_is_not_used(folder, drop):
    f = softmax_of()
    expected = f(X)
    key = fingerprint.program_key(entry_of(f, X).traced.graph)
    meta, data = codecache.read(f"program:{key}")
    del meta[drop]
    codecache.write(f"program:{key}", meta, data)
    g = softmax_of()
    assert g(X).tobytes() == expected.tobytes() and not was_restored(entry_of(g, X))


def test_without_its_object_code_a_program_is_compiled_again(folder):
    f = softmax_of()
    expected = f(X)
    for file in folder.glob("*.tjo"):
        if file != program_file(folder):
            file.unlink()
    g = softmax_of()
    assert g(X).tobytes() == expected.tobytes() and not was_restored(entry_of(g, X))


def test_large_constants_and_switched_off(folder, monkeypatch):
    monkeypatch.setattr(programcache, "_LIMIT_BYTES", 10)
    f = tj.trace(lambda x: x + np.arange(10, dtype=np.float32)[[3, 1, 2, 0, 4, 5, 6, 7, 8, 9]], device="cpu")
    f(X)
    monkeypatch.setenv("TRACEJIT_CACHE_DIR", "off")
    f.cache_clear()
    assert f(X)[0, 0] == X[0, 0] + 3
    assert not was_restored(entry_of(f, X))


def test_another_process_finds_it_whatever_the_hash_seed(tmp_path):
    code = (
        "import numpy as np, tracejit as tj; from tests.benchmarks import peer_tracejit\n"
        "opt, step = peer_tracejit.train_step('a')\n"
        "from tests.benchmarks import workloads\n"
        "data, params = workloads.make('a')\n"
        "loss, params, state = step(params, opt.init(params), data['x'], data['y'], device='cpu')\n"
        "entry = next(iter(step._cache.values()))[0]\n"
        "import json; print(json.dumps([entry.executable._stored is not None, params[0].tobytes().hex()]))"
    )
    runs = []
    for seed in ("1", "2"):
        env = {**os.environ, "PYTHONHASHSEED": seed}
        out = subprocess.run(
            [sys.executable, "-c", code], env=env, check=True, capture_output=True, text=True
        )
        runs.append(json.loads(out.stdout))
    assert [r[0] for r in runs] == [False, True] and runs[0][1] == runs[1][1]
