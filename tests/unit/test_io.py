"""tj.save and tj.load: round trips, atomicity, and every way in which a file can be wrong."""

from __future__ import annotations

import os
import pickle
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import optree
import pytest

import tracejit as tj
from tracejit import nn, optim


@pytest.fixture(autouse=True)
def reference_backend() -> Iterator[None]:
    """These tests are about nn, not about devices: they run on the oracle of all backends."""
    with tj.device("numpy"):
        yield


DTYPES = [
    "bool",
    "int8",
    "int16",
    "int32",
    "int64",
    "uint8",
    "uint16",
    "uint32",
    "uint64",
    "float16",
    "float32",
    "float64",
]


def same(a: Any, b: Any) -> None:
    assert optree.tree_structure(a) == optree.tree_structure(b)
    for x, y in zip(optree.tree_leaves(a), optree.tree_leaves(b), strict=True):
        assert type(x) is type(y)
        np.testing.assert_array_equal(x, y, strict=isinstance(x, np.ndarray))


@pytest.mark.parametrize("dtype", DTYPES)
def test_round_trip_of_every_dtype_and_shape(dtype: str, tmp_path: Path) -> None:
    tree = {
        "vector": np.array([0, 1, 1]).astype(dtype),
        "scalar": np.array(1).astype(dtype),
        "empty": np.zeros((0, 3), dtype),
        "deep": [np.ones((2, 1, 2), dtype), (np.zeros(1, dtype),)],
    }
    tj.save(tmp_path / "w", tree)
    same(tj.load(tmp_path / "w", like=tree), tree)


def test_special_values_survive(tmp_path: Path) -> None:
    x = np.array([np.nan, np.inf, -np.inf, -0.0, np.finfo(float).tiny / 2])
    tj.save(tmp_path / "w", x)
    assert tj.load(tmp_path / "w", like=x).tobytes() == x.tobytes()


def test_arrays_of_any_memory_layout(tmp_path: Path) -> None:
    x = np.arange(24, dtype=np.float32).reshape(4, 6)
    read_only = x.copy()
    read_only.flags.writeable = False
    tree = {
        "transposed": x.T,
        "strided": x[::2, ::3],
        "reversed": x[::-1],
        "swapped": x.astype(">f4"),
        "frozen": read_only,
    }
    tj.save(tmp_path / "w", tree)
    loaded = tj.load(tmp_path / "w", like=tree)
    for name, array in tree.items():
        np.testing.assert_array_equal(loaded[name], array)
        assert loaded[name].dtype == np.float32
        assert loaded[name].flags.writeable
        assert loaded[name].flags.c_contiguous


def test_a_model_with_its_optimiser(tmp_path: Path) -> None:
    model = nn.TransformerBlock(8, 2, rng=np.random.default_rng(0))
    opt = optim.adamw(0.1)
    model, state = opt.update(model, model, opt.init(model))
    tj.save(tmp_path / "w.safetensors", {"model": model, "state": state})
    fresh = nn.TransformerBlock(8, 2, rng=np.random.default_rng(1))
    loaded = tj.load(tmp_path / "w.safetensors", like={"model": fresh, "state": opt.init(fresh)})
    same(loaded, {"model": model, "state": state})
    assert "model.attn.qkv.weight" in tj.load(tmp_path / "w.safetensors")


def test_python_numbers_come_back_as_python_numbers(tmp_path: Path) -> None:
    tree = {"epoch": 7, "best": 0.25, "done": True, "w": np.ones(2)}
    tj.save(tmp_path / "w", tree)
    same(tj.load(tmp_path / "w", like={"epoch": 0, "best": 0.0, "done": False, "w": np.zeros(2)}), tree)


def test_static_leaves_come_from_like(tmp_path: Path) -> None:
    tj.save(tmp_path / "w", {"w": np.ones(2), "name": "first", "fn": nn.relu, "none": None})
    loaded = tj.load(tmp_path / "w", like={"w": np.zeros(2), "name": "second", "fn": nn.silu, "none": None})
    assert (loaded["name"], loaded["fn"], loaded["none"]) == ("second", nn.silu, None)
    assert (loaded["w"] == 1).all()


def test_without_like_a_dict_by_path(tmp_path: Path) -> None:
    tj.save(tmp_path / "w", {"a": [np.ones(2), np.zeros(1)]})
    loaded = tj.load(tmp_path / "w")
    assert sorted(loaded) == ["a.0", "a.1"]


def test_an_empty_tree(tmp_path: Path) -> None:
    tj.save(tmp_path / "w", {})
    assert tj.load(tmp_path / "w", like={}) == {}


# -- writing -------------------------------------------------------------------------------------------------


def test_saving_replaces_the_file_atomically(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A crash while writing leaves the old file, complete, and no litter."""
    path = tmp_path / "w"
    tj.save(path, np.ones(3))

    def crash(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        tj.save(path, np.zeros(3))
    assert os.listdir(tmp_path) == ["w"]
    assert (tj.load(path)["value"] == 1).all()


def test_a_failed_save_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "w"
    tj.save(path, {"w": np.ones(3)})
    with pytest.raises(tj.DTypeError, match="'w' cannot be stored"):
        tj.save(path, {"w": np.array([object()])})
    assert (tj.load(path)["w"] == 1).all()


@pytest.mark.skipif(os.name != "posix", reason="file modes are POSIX")
def test_saved_files_have_the_usual_permissions(tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(b"")
    tj.save(tmp_path / "w", np.ones(1))
    assert stat.S_IMODE((tmp_path / "w").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


@pytest.mark.parametrize(
    "bad", [np.array(["a"]), np.array([1j]), np.array([object()]), np.zeros(2, "datetime64[s]"), 1j]
)
def test_unsupported_dtypes_name_the_leaf(bad: Any, tmp_path: Path) -> None:
    with pytest.raises(tj.DTypeError, match=r"'layer\.bad' cannot be stored"):
        tj.save(tmp_path / "w", {"layer": {"bad": bad}})
    assert not os.listdir(tmp_path)


def test_two_leaves_with_one_name(tmp_path: Path) -> None:
    with pytest.raises(tj.FileFormatError, match=r"would both be called 'a\.b'"):
        tj.save(tmp_path / "w", {"a": {"b": np.ones(1)}, "a.b": np.ones(1)})


def test_saving_inside_traced_code(tmp_path: Path) -> None:
    with pytest.raises(tj.DTypeError, match="save outside of traced code"):
        tj.trace(lambda x: tj.save(tmp_path / "w", x))(np.ones(2))


def test_missing_directories_and_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        tj.save(tmp_path / "no" / "w", np.ones(1))
    with pytest.raises(FileNotFoundError):
        tj.load(tmp_path / "w")


# -- reading wrong files -------------------------------------------------------------------------------------


def stored(tmp_path: Path) -> Path:
    path = tmp_path / "w"
    tj.save(path, {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(4)})
    return path


LIKE = {"a": np.zeros((2, 3), np.float32), "b": np.zeros(4)}


def test_every_truncation_is_an_error(tmp_path: Path) -> None:
    path = stored(tmp_path)
    payload = path.read_bytes()
    for length in range(len(payload)):
        path.write_bytes(payload[:length])
        with pytest.raises(
            tj.FileFormatError, match=rf"w \({length} bytes\) is not a complete safetensors file"
        ):
            tj.load(path, like=LIKE)


@pytest.mark.parametrize(
    "content",
    [
        b"not a safetensors file",
        b"\xff" * 64,
        b"PK\x03\x04zip",
        b"\x00" * 100,
        (10).to_bytes(8, "little") + b"{}        ",
    ],
)
def test_other_files(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "w").write_bytes(content)
    with pytest.raises(tj.FileFormatError):
        tj.load(tmp_path / "w", like=LIKE)


def test_pickles_are_not_executed(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return (os.mkdir, (str(tmp_path / "exploded"),))

    (tmp_path / "w").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(tj.FileFormatError):
        tj.load(tmp_path / "w", like=LIKE)
    assert not (tmp_path / "exploded").exists()


def test_corrupted_headers_never_crash(tmp_path: Path) -> None:
    """Every single byte of the header flipped: an error of ours or, where only a name changed, a misfit."""
    path = stored(tmp_path)
    payload = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(payload[:8], "little")
    for position in range(header):
        changed = payload.copy()
        changed[position] ^= 0x15
        path.write_bytes(changed)
        try:
            loaded = tj.load(path, like=LIKE)
        except tj.TraceError:
            continue
        same(optree.tree_map(np.shape, loaded), optree.tree_map(np.shape, LIKE))  # the metadata was hit


def test_wrong_shapes_dtypes_and_leaves_are_named(tmp_path: Path) -> None:
    path = stored(tmp_path)
    with pytest.raises(tj.ShapeError, match=r"'a' has another shape.*file: f32\[2,3\], like: f32\[3,2\]"):
        tj.load(path, like={**LIKE, "a": np.zeros((3, 2), np.float32)})
    with pytest.raises(tj.FileFormatError, match=r"'b' has another dtype.*file: f64\[4\], like: f32\[4\]"):
        tj.load(path, like={**LIKE, "b": np.zeros(4, np.float32)})
    with pytest.raises(tj.FileFormatError, match="it lacks 'c'"):
        tj.load(path, like={**LIKE, "c": np.zeros(1)})
    with pytest.raises(tj.FileFormatError, match="it has in addition 'b'"):
        tj.load(path, like={"a": LIKE["a"]})
    many = {f"x{i}": np.zeros(1) for i in range(9)}
    with pytest.raises(
        tj.FileFormatError, match=r"it lacks 'x0', 'x1', 'x2', 'x3' and 5 more and has in addition"
    ):
        tj.load(path, like=many)
