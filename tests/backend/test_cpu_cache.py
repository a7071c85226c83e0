"""The cache of object code on disk: it is used, private, checked, and never in the way."""

from __future__ import annotations

import dataclasses
import os
import stat
from pathlib import Path

import numpy as np
import pytest

import tracejit as tj
from tracejit.cli import main
from tracejit_cpu import codecache, host

X = np.linspace(-1, 1, 60, dtype=np.float32).reshape(6, 10)
posix = pytest.mark.skipif(not hasattr(os, "getuid"), reason="modes and owners are POSIX")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty cache of this test; the directory of the CPU backend in it."""
    run()  # loads what all programs share
    monkeypatch.setenv("TRACEJIT_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "cpu"


def run():
    """Trace and compile a program anew; True if its code came from the disk."""
    before = codecache.cache_info()
    np.testing.assert_allclose(
        tj.trace(lambda x: np.tanh(x) * 2 + x.sum(axis=1, keepdims=True), device="cpu")(X),
        np.tanh(X) * 2 + X.sum(axis=1, keepdims=True),
        rtol=1e-5,
    )
    after = codecache.cache_info()
    assert (after.hits + after.misses) - (before.hits + before.misses) >= 1
    return after.misses == before.misses


def entry(folder) -> Path:
    """The one program in the cache."""
    run()
    (file,) = folder.glob("*.tjo")
    return file


def mode(path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_second_compilation_takes_the_code_from_the_disk(folder):
    assert not run()
    assert run()
    assert len(list(folder.iterdir())) == 1


@posix
def test_the_directory_and_its_files_are_private(folder):
    file = entry(folder)
    assert mode(folder) == 0o700 and mode(file) & 0o077 == 0
    assert folder.stat().st_uid == os.getuid()


@pytest.mark.parametrize(
    "damage",
    [
        lambda b: b"",
        lambda b: b[:10],
        lambda b: b[: len(b) // 2],
        lambda b: b[:-1],
        lambda b: b[:60] + bytes([b[60] ^ 1]) + b[61:],
        lambda b: b[:-5] + b"\1" * 5,
        lambda b: b + b"more",
        lambda b: b"something else entirely" * 50,
    ],
    ids=["empty", "stub", "half", "short", "bit", "end", "long", "foreign"],
)
def test_a_damaged_entry_is_replaced(folder, damage):
    file = entry(folder)
    good = file.read_bytes()
    file.write_bytes(damage(good))
    assert not run()
    assert file.read_bytes() == good
    assert run()


def test_metadata_of_another_format_is_not_used(folder, monkeypatch):
    file = entry(folder)
    monkeypatch.setattr(codecache, "_decode", lambda data: ({"steps": [["nonsense"]]}, b""))
    run()  # compiled again, and right
    monkeypatch.undo()
    monkeypatch.setenv("TRACEJIT_CACHE_DIR", str(folder.parent))
    assert file.exists()


@posix
@pytest.mark.parametrize("open_to", [0o777, 0o770, 0o755])
def test_a_directory_that_others_can_reach_is_closed_and_emptied(folder, open_to):
    file = entry(folder)
    planted = folder / ("0" * 40 + ".tjo")
    planted.write_bytes(file.read_bytes())
    folder.chmod(open_to)
    assert not run()
    assert mode(folder) == 0o700 and not planted.exists()
    assert run()


@posix
def test_another_users_directory_is_neither_used_nor_touched(folder, monkeypatch):
    file = entry(folder)
    before = file.read_bytes(), sorted(folder.iterdir())
    me = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: me + 1)
    assert not run() and not run()
    assert (file.read_bytes(), sorted(folder.iterdir())) == before


@posix
def test_a_link_is_neither_followed_nor_removed(folder, tmp_path):
    target = tmp_path / "elsewhere"
    target.mkdir(mode=0o700)
    folder.parent.mkdir()
    folder.symlink_to(target, target_is_directory=True)
    assert not run() and not run()
    assert folder.is_symlink() and not list(target.iterdir())


def test_whatever_else_stands_in_the_way_stays(folder):
    folder.parent.mkdir()
    folder.write_text("mine")
    assert not run() and not run()
    assert folder.read_text() == "mine"


def test_files_that_are_not_ours_stay(folder):
    folder.mkdir(parents=True, mode=0o755)
    (folder / "notes.txt").write_text("mine")
    assert not run() and run()
    assert codecache.cache_clear() == 1
    assert [f.name for f in folder.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("off", ["off", "0", "none", ""])
def test_the_cache_can_be_off(folder, monkeypatch, off, capsys):
    monkeypatch.setenv("TRACEJIT_CACHE_DIR", off)
    assert codecache.cache_dir() is None and codecache.cache_info().path is None
    assert not run() and not run()
    assert main(["cache"]) == 0 and main(["cache", "--clear"]) == 0
    assert capsys.readouterr().out.count("cpu: off") == 2


def test_where_it_is_without_the_variable(monkeypatch):
    monkeypatch.delenv("TRACEJIT_CACHE_DIR", raising=False)
    monkeypatch.setattr(codecache.sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert codecache.cache_dir() == Path("/somewhere/tracejit/cpu")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert codecache.cache_dir() == Path("/home/someone/.cache/tracejit/cpu")


def test_features_of_the_host_and_versions_are_part_of_the_key(monkeypatch):
    digest = codecache.source_digest.__wrapped__
    here, same = host.host(), digest()
    assert digest() == same
    for change in (
        {"features": here.features + ",+new"},
        {"vector_bytes": 2 * here.vector_bytes},
        {"triple": "other"},
    ):
        monkeypatch.setattr(codecache, "host", lambda c=change: dataclasses.replace(here, **c))
        assert digest() != same, change
    monkeypatch.setattr(codecache, "host", lambda: here)

    class OtherLLVM:
        version = (99, 0, 0)

    monkeypatch.setattr(codecache, "llvm", lambda: OtherLLVM)
    assert digest() != same


def test_other_sources_do_not_load_this_code(folder, monkeypatch):
    entry(folder)
    monkeypatch.setattr(codecache, "source_digest", lambda: "other sources")
    assert not run()
    monkeypatch.undo()


def test_the_oldest_entries_make_room(folder, monkeypatch):
    file = entry(folder)
    monkeypatch.setattr(codecache, "_LIMIT_BYTES", 3 * file.stat().st_size)
    for i in range(6):
        codecache.write(f"key {i}", {"n": i}, file.read_bytes())
        os.utime(folder / codecache._entry(f"key {i}"), (1e9 + i, 1e9 + i))
    kept = [i for i in range(6) if codecache.read(f"key {i}") is not None]
    assert kept and kept == list(range(6))[-len(kept) :] and len(kept) <= 3


def test_the_command_shows_and_clears(folder, capsys):
    run()
    assert main(["cache"]) == 0
    assert f"cpu: 1 entries, 0.0 MB in {folder}" in capsys.readouterr().out
    assert main(["cache", "--clear"]) == 0
    assert f"cpu: removed 1 entries from {folder}" in capsys.readouterr().out
    assert not list(folder.iterdir())
    assert not run()
