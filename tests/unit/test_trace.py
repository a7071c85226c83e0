"""The API of ``@trace``: forms of decoration, trees of arguments, devices, and the ways to look inside."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import optree
import pytest

import tracejit as tj
from tracejit import backend as backends
from tracejit_numpy import NumpyBackend

X = np.arange(6, dtype=np.float32).reshape(2, 3)


# -- decoration ------------------------------------------------------------------------------------------------------


def test_with_and_without_parentheses() -> None:
    @tj.trace
    def plain(x):
        """Doubles."""
        return x * 2

    @tj.trace()
    def empty(x):
        return x * 2

    @tj.trace(device="numpy", cache_size=4)
    def options(x):
        return x * 2

    for f in (plain, empty, options, tj.trace(lambda x: x * 2)):
        np.testing.assert_array_equal(f(X), X * 2)
    assert plain.__name__ == "plain" and plain.__doc__ == "Doubles." and plain.__wrapped__(3) == 6
    assert options.cache_info().maxsize == 4
    assert "traced plain: 1 programs" in repr(plain)


@pytest.mark.parametrize("thing", [np.tanh, np.sum, abs, len, print])
def test_functions_of_numpy_and_builtins_can_be_decorated(thing: Any) -> None:
    if thing in (len, print):
        tj.trace(thing)
    else:
        np.testing.assert_allclose(tj.trace(thing)(X), thing(X), rtol=1e-6)


def test_callable_objects_and_partials_can_be_decorated() -> None:
    import functools

    class Scale:
        def __init__(self, by: float) -> None:
            self.by = by

        def __call__(self, x):
            return x * self.by

    np.testing.assert_array_equal(tj.trace(Scale(3.0))(X), X * 3)
    np.testing.assert_array_equal(tj.trace(functools.partial(np.add, 1))(X), X + 1)


def test_what_cannot_be_decorated_is_refused_at_once() -> None:
    with pytest.raises(TypeError, match="takes a function, got int"):
        tj.trace(3)
    with pytest.raises(tj.TracingError, match="is a class"):
        tj.trace(int)
    with pytest.raises(tj.TracingError, match="below @staticmethod"):
        tj.trace(staticmethod(lambda x: x))
    with pytest.raises(ValueError, match="cache_size must be at least 1"):
        tj.trace(lambda x: x, cache_size=0)

    async def later(x):
        return x

    with pytest.raises(tj.TracingError, match="coroutine"):
        tj.trace(later)


def test_methods_static_methods_and_class_methods() -> None:
    class Model:
        gain = 2.0

        def __init__(self, w: np.ndarray) -> None:
            self.w = w

        @tj.trace
        def predict(self, x):
            return x * self.w

        @staticmethod
        @tj.trace
        def double(x):
            return x * 2

        @classmethod
        @tj.trace
        def scaled(cls, x):
            return x * cls.gain

    a, b = Model(X[0] + 1), Model(X[1] + 1)
    np.testing.assert_array_equal(a.predict(X), X * (X[0] + 1))
    np.testing.assert_array_equal(b.predict(X), X * (X[1] + 1))
    np.testing.assert_array_equal(Model.double(X), X * 2)
    np.testing.assert_array_equal(Model.scaled(X), X * 2)
    assert a.predict.cache_info().misses == 2
    assert len(a.predict.graph(X).outputs) == 1
    assert "predict" in str(a.predict.inspect(X))


def test_static_argument_names_accept_one_string_and_defaults() -> None:
    @tj.trace(static_argnames="mode")
    def f(x, mode="double", *, shift=0):
        assert isinstance(mode, str)
        return x * 2 + shift if mode == "double" else x

    np.testing.assert_array_equal(f(X), X * 2)
    np.testing.assert_array_equal(f(X, "same"), X)
    np.testing.assert_array_equal(f(X, mode="same", shift=1), X)
    with pytest.raises(tj.TracingError, match=r"'mode'.*not hashable"):
        f(X, mode=["a"])


def test_static_arguments_and_wrong_calls() -> None:
    @tj.trace(static_argnames="n")
    def f(x, n):
        return x * n

    with pytest.raises(TypeError, match=r"f\(\).*missing a required argument: 'n'"):
        f(X)
    with pytest.raises(TypeError, match="unexpected keyword argument 'm'"):
        f(X, 2, m=3)


# -- trees -----------------------------------------------------------------------------------------------------------


class Pair(NamedTuple):
    first: Any
    second: Any


@optree.dataclasses.dataclass(namespace="tracejit")
class Point:
    x: Any
    label: str = optree.dataclasses.field(default="", pytree_node=False)


def test_nested_trees_of_every_kind_go_in_and_come_out() -> None:
    tree = {"a": [X, (X + 1, None)], "b": Pair(X + 2, {"deep": 3.0}), "c": Point(X + 3, "here")}

    @tj.trace
    def f(t):
        return optree.tree_map(lambda v: v * 2, t, namespace="tracejit")

    for _ in range(2):
        out = f(tree)
        assert type(out["b"]) is Pair and type(out["c"]) is Point and out["c"].label == "here"
        assert out["a"][1][1] is None
        np.testing.assert_array_equal(out["a"][1][0], 2 * (X + 1))
        assert out["b"].second["deep"] == 6.0
        np.testing.assert_array_equal(out["c"].x, 2 * (X + 3))
    assert f.cache_info() == (1, 1, 128, 1)


def test_modules_are_arguments_and_results() -> None:
    layer = tj.nn.Linear(3, 2, rng=np.random.default_rng(0))

    @tj.trace
    def f(m, x):
        return optree.tree_map(lambda v: v * 2, m, namespace="tracejit"), m(x)

    doubled, y = f(layer, X)
    assert type(doubled) is type(layer)
    np.testing.assert_array_equal(doubled.weight, layer.weight * 2)
    np.testing.assert_allclose(y, layer(X), rtol=1e-6)


def test_keyword_only_varargs_and_keywords() -> None:
    @tj.trace
    def f(x, *more, scale=1.0, **named):
        return x * scale + sum(more) + sum(named.values())

    np.testing.assert_array_equal(f(X), X)
    np.testing.assert_array_equal(f(X, X, X, scale=2.0), X * 4)
    np.testing.assert_array_equal(f(X, a=X, b=X), X * 3)
    np.testing.assert_array_equal(f(X, b=X, a=X), X * 3)


def test_concrete_results_are_passed_through() -> None:
    marker = object()

    @tj.trace
    def f(x):
        return {
            "y": x + 1,
            "shape": x.shape,
            "name": "f",
            "obj": marker,
            "n": 3,
            "none": None,
            "np": np.float32(2),
        }

    for _ in range(2):
        out = f(X)
        assert out["shape"] == (2, 3) and out["name"] == "f" and out["obj"] is marker and out["n"] == 3
        assert out["none"] is None and out["np"] == 2


def test_a_signature_change_is_a_new_trace_and_back_is_a_hit() -> None:
    f = tj.trace(lambda x: x + 1)
    for x in (X, X.astype(np.float64), X[0], 3, 3.0, X):
        f(x)
    assert f.cache_info() == (1, 5, 128, 5)
    assert f.cache_info().hits == 1


# -- devices ---------------------------------------------------------------------------------------------------------


def test_every_device_computes_the_same(device: str) -> None:
    f = tj.trace(lambda x: np.tanh(x @ x.T).sum(axis=0))
    np.testing.assert_allclose(np.asarray(f(X, device=device)), np.tanh(X @ X.T).sum(axis=0), rtol=1e-5)


class Counting(NumpyBackend):
    """A device of our own: the reference interpreter, with its compilations counted."""

    name = "counting"
    priority = -1

    def __init__(self) -> None:
        self.compiled: list[str] = []

    def compile(self, program: Any, spec: str) -> Any:
        self.compiled.append(program.graph.name)
        return super().compile(program, "")

    def capabilities(self, spec: str) -> None:
        return None

    def devices(self) -> list[tj.DeviceInfo]:
        return [tj.DeviceInfo("counting", "counting", "cpu", True, "for tests")]


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> Counting:
    monkeypatch.setattr(backends, "_backends", dict(backends._backends))
    monkeypatch.setattr(backends, "_resolved", {})
    backend = Counting()
    tj.register_backend(backend)
    return backend


def test_a_registered_backend_is_a_device(counting: Counting) -> None:
    def f(x):
        return x * 2

    np.testing.assert_array_equal(tj.trace(f)(X, device="counting"), X * 2)
    assert counting.compiled == ["f"]
    assert "counting" in [d.name for d in tj.devices()]
    assert isinstance(counting, backends.Backend)


def test_the_device_of_a_call_beats_the_block_which_beats_the_decorator_default(counting: Counting) -> None:
    @tj.trace
    def f(x):
        return x * 2

    @tj.trace(device="counting")
    def g(x):
        return x * 3

    f(X, device="numpy")
    assert counting.compiled == []
    with tj.device("counting"):
        f(X)
        f(X)
        f(X, device="numpy")
    assert counting.compiled == ["f"]
    g(X)
    assert counting.compiled == ["f", "g"]
    with tj.device("numpy"):
        assert str(tj.trace(f).inspect(X).device) == "numpy"


def test_blocks_nest_and_end(counting: Counting) -> None:
    f = tj.trace(lambda x: x * 2)
    with tj.device("counting") as outer:
        assert str(outer) == "counting"
        with tj.device("numpy"):
            assert f.inspect(X).device == "numpy"
        assert f.inspect(X).device == "counting"
    assert f.inspect(X, device="numpy").device == "numpy"


def test_each_device_has_a_program_of_its_own(counting: Counting) -> None:
    f = tj.trace(lambda x: x * 2)
    f(X, device="numpy")
    f(X, device="counting")
    f(X, device="numpy")
    assert f.cache_info() == (1, 2, 128, 2)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cuda", r"(?s)unknown device 'cuda'.*installed: .*numpy"),
        ("nunpy", r"did you mean 'numpy'"),
        ("numpy:1", "no variants"),
        (7, r'must be a string such as "cpu"'),
    ],
)
def test_unknown_devices_are_explained(name: Any, message: str) -> None:
    f = tj.trace(lambda x: x * 2)
    with pytest.raises(tj.DeviceError, match=message):
        f(X, device=name)
    with pytest.raises(tj.DeviceError, match=message), tj.device(name):
        f(X)
    np.testing.assert_array_equal(f(X, device="numpy"), X * 2)


def test_a_backend_that_does_not_load_is_listed_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        name = "broken"

        def load(self) -> Any:
            raise ImportError("libbroken.so is missing")

    monkeypatch.setattr(backends, "_entry_points", {**backends._discover(), "broken": Broken()})
    monkeypatch.setattr(backends, "_broken", {})
    (found,) = [d for d in tj.devices() if d.backend == "broken"]
    assert not found.available and "libbroken.so is missing" in found.detail
    for _ in range(2):
        with pytest.raises(tj.DeviceError, match=r"libbroken\.so is missing"):
            tj.trace(lambda x: x)(X, device="broken")


def test_devices_lists_the_reference_backend() -> None:
    found = {d.name: d for d in tj.devices()}
    assert found["numpy"].available and found["numpy"].backend == "numpy"
    assert "NumPy" in found["numpy"].description


def run_python(code: str, **env: str) -> str:
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env={**os.environ, **env}
    )
    assert out.returncode == 0, out.stderr
    return out.stdout


def test_the_environment_chooses_the_device_of_a_process() -> None:
    code = "import numpy as np, tracejit as tj; print(tj.trace(lambda x: x * 2).inspect(np.ones(3)).device)"
    assert run_python(code, TRACEJIT_DEVICE="numpy").strip() == "numpy"
    failing = (
        "import numpy as np, tracejit as tj\n"
        "try: tj.trace(lambda x: x)(np.ones(3))\n"
        "except tj.DeviceError as e: print(e)\n"
    )
    assert "unknown device 'nonsense'" in run_python(failing, TRACEJIT_DEVICE="nonsense")


def test_the_environment_disables_the_jit() -> None:
    code = "import numpy as np, tracejit as tj; tj.trace(lambda x: print(type(x).__name__))(np.ones(3))"
    assert run_python(code, TRACEJIT_DISABLE_JIT="1").strip() == "ndarray"
    assert run_python(code, TRACEJIT_DISABLE_JIT="0", TRACEJIT_DEVICE="numpy").strip() == "Tensor"


def test_disable_jit_nests_and_ends() -> None:
    kinds = []

    def note(x):
        kinds.append(type(x))
        return x

    f = tj.trace(note)
    with tj.disable_jit():
        f(X)
        with tj.disable_jit(False):
            f(X)
        f(X, device="numpy")
    assert kinds == [np.ndarray, tj.Tensor, np.ndarray]
    f(X)
    assert kinds[3:] in ([], [tj.Tensor])


def test_disable_jit_runs_gradients_too() -> None:
    with tj.disable_jit():
        np.testing.assert_allclose(tj.grad(lambda x: (x * x).sum())(X), 2 * X)
        np.testing.assert_allclose(tj.trace(tj.grad(lambda x: (x * x).sum()))(X), 2 * X)


# -- looking inside --------------------------------------------------------------------------------------------------


def model(params, x):
    with tj.named_scope("dense"):
        h = np.tanh(x @ params["w"] + params["b"])
    return (h * h).sum()


PARAMS = {"w": np.ones((3, 4), np.float32), "b": np.zeros(4, np.float32)}


def test_the_graph_is_available_without_running() -> None:
    calls = []

    def f(x):
        calls.append(1)
        return np.tanh(x) + 1

    traced = tj.trace(f)
    graph = traced.graph(X)
    assert [n.name for n in graph.inputs] == ["x"]
    assert "tanh" in {n.op.name for n in graph}
    assert all("test_trace.py:" in n.source for n in graph if n.op.name == "tanh")
    assert tj.Graph.parse(str(graph)) == graph
    traced(X)
    assert calls == [1], "the call reuses the trace"


def test_graph_inputs_and_outputs_are_named_by_argument_path() -> None:
    graph = tj.trace(lambda params, x: {"loss": model(params, x), "n": [x * 2]}).graph(PARAMS, X)
    assert {n.name for n in graph.inputs} == {"params['w']", "params['b']", "x"}
    assert list(graph.output_names) == ["['loss']", "['n'][0]"]


def test_inspect_shows_every_stage(device: str) -> None:
    report = tj.trace(model).inspect(PARAMS, X, device=device)
    assert report.device.startswith(device) and report.name == "model"
    assert len(report.optimised) <= len(report.graph)
    assert report.passes[0][0] == "erase_markers"
    assert report.kernels
    text = str(report)
    for part in ("recorded graph", "passes", "optimised graph", "kernels", "memory", 'in "dense"'):
        assert part in text, part
    covered = {n for k in report.kernels for n in k.nodes}
    work = {i for i, n in enumerate(report.optimised) if n.op.name in ("tanh", "dot_general", "sum")}
    assert work <= covered, "every node that computes is in a kernel"


def test_profile_gives_a_table_and_a_chrome_trace(tmp_path: pathlib.Path, device: str) -> None:
    profile = tj.trace(model).profile(PARAMS, X, repeat=3, device=device)
    assert profile.name == "model" and profile.device.startswith(device)
    assert profile.rows and all(r.mean_us >= 0 for r in profile.rows)
    assert sum(r.share for r in profile.rows) == pytest.approx(1.0)
    assert [r.mean_us for r in profile.rows] == sorted((r.mean_us for r in profile.rows), reverse=True)
    assert len(profile.steps) == 3
    text = str(profile)
    assert "GFLOP/s" in text and "% peak" in text and " per call" in text
    path = tmp_path / "trace.json"
    profile.to_chrome_trace(path)
    events = json.loads(path.read_text())["traceEvents"]
    assert len([e for e in events if e["name"].startswith("step")]) == 3
    assert all(e["dur"] >= 0 and e["ts"] >= 0 for e in events if e["ph"] == "X")


def test_profile_refuses_a_repeat_below_one() -> None:
    with pytest.raises(ValueError, match="repeat must be at least 1"):
        tj.trace(model).profile(PARAMS, X, repeat=0)


def test_gradients_have_graphs_too() -> None:
    graph = tj.grad(model).graph(PARAMS, X)
    assert {n.grad_of is not None for n in graph} == {True, False}
    assert len(graph.outputs) == 2


# -- a trace sees the world of its call ------------------------------------------------------------------------------


def test_traced_functions_in_threads_have_their_own_devices(counting: Counting) -> None:
    import threading

    f = tj.trace(lambda x: x * 2)
    seen = {}

    def run(name: str) -> None:
        with tj.device(name):
            seen[name] = f.inspect(X).device

    threads = [threading.Thread(target=run, args=(n,)) for n in ("numpy", "counting")]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert seen == {"numpy": "numpy", "counting": "counting"}


def test_a_traced_function_survives_pickling_by_name_and_copying() -> None:
    import copy

    f = tj.trace(model)
    assert copy.copy(f)(PARAMS, X) == f(PARAMS, X)


@dataclass
class Plain:
    w: Any


def test_an_unregistered_mutable_dataclass_is_refused_with_advice() -> None:
    with pytest.raises(tj.DTypeError, match=r"(?s)argument p.*Plain.*register|frozen"):
        tj.trace(lambda p: p.w * 2)(Plain(X))


def test_a_new_structure_is_explained_by_what_is_new_and_what_is_missing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    from tracejit.config import set_log

    @tj.trace
    def f(p: Any, x: Any, training: bool = False) -> Any:
        return x + sum(p.values())

    x = np.ones(3)
    f({"w": x}, x)
    set_log("retrace")
    try:
        f({"w": x}, x, True)
        f({"w": x, "b": x}, x)
        f({"b": x, "c": x}, x)
        f({"w": x}, (x,))
    finally:
        set_log("")
    lines = capsys.readouterr().err.splitlines()
    assert "new tree structure (new: training)" in lines[0]
    assert "(new: p['b'])" in lines[1]
    assert "(new: p['c']; missing: p['w'])" in lines[2]
    assert "(new: x[0]; missing: x)" in lines[3]


def test_the_storm_warning_points_at_the_users_line() -> None:
    for f in (tj.trace(lambda x: x + 1), tj.grad(lambda x: x.sum()), tj.vmap(lambda x: x + 1)):
        with pytest.warns(tj.RetraceWarning) as caught:
            for n in range(1, 20):
                f(np.ones(n))
        assert caught[0].filename == __file__
