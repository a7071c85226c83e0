"""The command line, as a user types it: every command in a process of its own."""

from __future__ import annotations

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

import tracejit as tj
from tracejit.cli import main

MODEL = """
import numpy as np
import tracejit as tj

def predict(w, x, scale):
    return np.tanh(x @ w).mean() * scale

@tj.trace
def traced(x):
    return x + 1

class Holder:
    @staticmethod
    def double(x):
        return x * 2

def broken(x):
    return x @ np.ones((99, 2))

not_a_function = 3
"""


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    (tmp_path / "model.py").write_text(MODEL, encoding="utf-8")
    return tmp_path


def tracejit(*args: str, cwd: pathlib.Path | None = None) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "TRACEJIT_DEVICE": "numpy", "PYTHONIOENCODING": "utf-8"}
    return subprocess.run(
        [sys.executable, "-m", "tracejit", *args], capture_output=True, text=True, encoding="utf-8", timeout=120,
        cwd=cwd, env=env,
    )  # fmt: skip


def test_version() -> None:
    out = tracejit("--version")
    assert out.returncode == 0
    assert out.stdout.strip() == f"tracejit {tj.__version__}"


def test_without_a_command_the_help_is_shown_and_the_status_is_2() -> None:
    out = tracejit()
    assert out.returncode == 2
    for command in ("devices", "graph", "view", "export", "cache"):
        assert command in out.stdout


def test_devices_as_a_table_and_as_json() -> None:
    table = tracejit("devices")
    assert table.returncode == 0, table.stderr
    assert "numpy" in table.stdout and "ready" in table.stdout and "default" in table.stdout
    out = tracejit("devices", "--json")
    found = {d["name"]: d for d in json.loads(out.stdout)}
    assert found["numpy"]["available"] is True
    assert {"backend", "kind", "description", "detail", "properties"} <= set(found["numpy"])


def test_graph_prints_text_that_parses_back(folder: pathlib.Path) -> None:
    out = tracejit("graph", "model:predict", "float32[3,4]", "float32[2,3]", "0.5", cwd=folder)
    assert out.returncode == 0, out.stderr
    graph = tj.Graph.parse(out.stdout)
    assert graph.name == "predict"
    assert [n.name for n in graph.inputs] == ["w", "x", "scale"]
    assert "model.py:6" in out.stdout


def test_graph_as_json_of_a_file_by_path(folder: pathlib.Path) -> None:
    args = ("float32[3,4]", "float32[2,3]", "0.5")
    out = tracejit("graph", str(folder / "model.py") + ":predict", *args, "--form", "json")
    assert out.returncode == 0, out.stderr
    data = json.loads(out.stdout)
    assert data["format"] == "tracejit-graph"
    assert "tanh" in {n.op.name for n in tj.Graph.from_json(data)}


def test_graph_inspects_every_stage(folder: pathlib.Path) -> None:
    args = ("--form", "inspect", "--device", "numpy")
    out = tracejit("graph", "model:predict", "float32[3,4]", "float32[2,3]", "0.5", *args, cwd=folder)
    assert out.returncode == 0, out.stderr
    for part in ("recorded graph", "passes", "optimised graph", "kernels", "memory", "NumPy plan"):
        assert part in out.stdout


def test_graph_of_value_and_gradient(folder: pathlib.Path) -> None:
    out = tracejit("graph", "model:predict", "float32[3,4]", "float32[2,3]", "0.5", "--grad", cwd=folder)
    assert out.returncode == 0, out.stderr
    graph = tj.Graph.parse(out.stdout)
    assert len(graph.outputs) == 2 and graph.outputs[1].shape == (3, 4)
    assert "grad_of" in out.stdout


def test_graph_of_a_traced_function_and_of_a_static_method(folder: pathlib.Path) -> None:
    assert "add" in tracejit("graph", "model:traced", "int32[5]", cwd=folder).stdout
    assert "mul" in tracejit("graph", "model:Holder.double", "float64[]", cwd=folder).stdout


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("predict", "float32[3]"), "does not name a function"),
        (("model:", "float32[3]"), "does not name a function"),
        (("nowhere:f",), "cannot load 'nowhere:f'"),
        (("nowhere.py:f",), "no file nowhere.py"),
        (("model:missing",), "missing"),
        (("model:not_a_function", "1"), "is not a function but a int"),
        (("model:traced", "float33[2]"), "neither dtype.shape. nor a JSON value"),
        (("model:traced", "float32[2,x]"), "not of the form"),
        (("model:traced", "float32[-2]"), "negative|not of the form"),
        (("model:broken", "float32[2,3]"), r"\[matmul\].*f32\[2,3\].*model.py:18"),
        (("model:traced",), "missing a required argument: .x"),
        (("model:traced", "1", "2"), "too many positional arguments"),
        (("model:traced", "1", "--form", "inspect", "--device", "cuda"), "unknown device 'cuda'"),
    ],
)
def test_wrong_use_is_explained_on_stderr_and_status_1(
    args: tuple[str, ...],
    message: str,
    folder: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "model", raising=False)
    assert main(["graph", *args]) == 1
    out = capsys.readouterr()
    assert out.out == ""
    assert out.err.startswith("tracejit: ")
    assert re.search(message, out.err), out.err


def test_an_error_in_a_process_shows_no_traceback(folder: pathlib.Path) -> None:
    out = tracejit("graph", "model:broken", "float32[2,3]", cwd=folder)
    assert out.returncode == 1 and out.stdout == ""
    assert re.fullmatch(r"tracejit: \[matmul\] .*f32\[2,3\].*at model.py:18\n", out.stderr), out.stderr


def test_unknown_commands_and_options_are_refused_with_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    for args in (["frobnicate"], ["graph"], ["devices", "--xml"], ["graph", "m:f", "--form", "yaml"]):
        with pytest.raises(SystemExit) as info:
            main(args)
        assert info.value.code == 2
        assert "usage: tracejit" in capsys.readouterr().err


def test_cache_reports_or_says_that_there_is_none() -> None:
    out = tracejit("cache")
    assert out.returncode == 0, out.stderr
    assert out.stdout.strip()


def test_a_closed_pipe_is_no_error(folder: pathlib.Path) -> None:
    if sys.platform == "win32":
        return  # no shell pipelines of this kind
    command = f"{sys.executable} -m tracejit graph model:traced 'float32[3]' --form inspect | head -1"
    out = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=folder, timeout=120)
    assert "Traceback" not in out.stderr and "BrokenPipe" not in out.stderr


def test_the_table_of_devices_is_short_enough_to_read(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["devices"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) < 30 and max(map(len, lines)) <= 120
    assert "avx" not in "".join(lines)
