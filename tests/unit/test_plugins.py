"""Finding entry points by reading ``entry_points.txt``: what ``importlib.metadata`` finds, at a tenth of the cost."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys

import pytest

from tracejit import plugins

TEXT = """
[console_scripts]
cpu = no:thing

[tracejit.backends]
# a comment
cpu = tracejit_cpu:backend
 other=some.module:made.of.parts [extra]

[tracejit.backends.more]
cpu = no:thing
"""


def install(folder, name: str, text: str) -> None:
    place = folder / f"{name}.dist-info"
    place.mkdir(parents=True)
    (place / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name.partition('-')[0]}\nVersion: 1\n")
    (place / "entry_points.txt").write_text(text)


def test_only_the_lines_of_the_group_count():
    assert plugins.parse(TEXT, "tracejit.backends") == [
        ("cpu", "tracejit_cpu:backend"),
        ("other", "some.module:made.of.parts [extra]"),
    ]
    assert plugins.parse(TEXT, "tracejit.viewers") == []


def test_it_finds_what_the_standard_library_finds():
    for group in ("tracejit.backends", "tracejit.viewers", "console_scripts", "pytest11"):
        ours = {name: e.value for name, e in plugins.find(group).items()}
        theirs = {e.name: e.value for e in importlib.metadata.entry_points(group=group)}
        assert ours.keys() == theirs.keys() and (group != "tracejit.backends" or ours == theirs)


def test_a_third_party_and_the_first_of_two_copies(tmp_path, monkeypatch):
    install(tmp_path / "a", "mine-1.0", "[g]\nx = sys:version_info.major\n")
    install(tmp_path / "b", "mine-2.0", "[g]\nx = sys:maxsize\ny = sys:maxsize\n")  # shadowed by the other
    install(tmp_path / "b", "yours-2.0", "[g]\nz = math\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "a"), str(tmp_path / "missing"), str(tmp_path / "b")])
    found = plugins.find("g")
    assert sorted(found) == ["x", "z"] == sorted(e.name for e in importlib.metadata.entry_points(group="g"))
    assert found["x"].load() == sys.version_info.major
    assert found["z"].load().__name__ == "math"
    with pytest.raises(ModuleNotFoundError):
        plugins.EntryPoint("n", "no_such_module:thing").load()


def test_other_places_for_distributions_are_left_to_the_standard_library(tmp_path, monkeypatch):
    import zipfile

    with zipfile.ZipFile(tmp_path / "bundle.zip", "w") as file:
        file.writestr("zipped-1.0.dist-info/METADATA", "Name: zipped\nVersion: 1\n")
        file.writestr("zipped-1.0.dist-info/entry_points.txt", "[g]\nq = math:pi\n")
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "bundle.zip")])
    assert list(plugins.find("g")) == ["q"]


def test_a_first_call_imports_nothing_heavy():
    code = (
        "import sys, numpy as np, tracejit as tj; tj.trace(lambda x: np.tanh(x) @ x, device='cpu')(np.ones((3, 3))); "
        "heavy = {'numpy.ma', 'importlib.metadata', 'llvmlite.binding', 'llvmlite.ir', 'wgpu', 'pygame', 'rich', "
        "'safetensors', 'tempfile', 'asyncio'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
