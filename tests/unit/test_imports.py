"""The house's one-way streets and light front door: who may import whom, and what ``import tracejit`` loads."""

from __future__ import annotations

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
PLUGINS = ("tracejit_numpy", "tracejit_cpu", "tracejit_wgpu", "tracejit_viz")


def _imports(path: pathlib.Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found.add(node.module.partition(".")[0])
    return found


def test_the_core_imports_no_plugin_and_no_heavy_library() -> None:
    for path in (ROOT / "tracejit").rglob("*.py"):
        bad = _imports(path) & {*PLUGINS, "llvmlite", "wgpu", "pygame", "PIL"}
        assert not bad, f"{path} imports {bad}"


@pytest.mark.parametrize("plugin", PLUGINS)
def test_plugins_do_not_import_each_other(plugin: str) -> None:
    for folder in ("backends", "viz"):
        for path in (ROOT / folder / plugin).rglob("*.py"):
            bad = _imports(path) & ({*PLUGINS} - {plugin})
            assert not bad, f"{path} imports {bad}"


def test_every_file_says_what_it_is_for() -> None:
    for folder in ("tracejit", "backends", "viz"):
        for path in (ROOT / folder).rglob("*.py"):
            docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
            assert docstring, f"{path} does not open with a docstring"


def test_import_tracejit_is_light() -> None:
    code = (
        "import sys, tracejit; tracejit.trace; "
        "heavy = {'llvmlite', 'wgpu', 'pygame', 'rich', 'safetensors', 'PIL', 'torch', 'jax'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
