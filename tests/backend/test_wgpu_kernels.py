"""The wgpu generators that exist for speed: product tiles, sums beside products, transposed copies, attention, tuning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tracejit as tj
from tracejit import nn
from tracejit_wgpu import executable, runtime, tiled, tuning
from tracejit_wgpu.tuning import Tile

LAYOUTS = {"NN": ((0, 1), (0, 1)), "NT": ((0, 1), (1, 0)), "TN": ((1, 0), (0, 1))}


def rand(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def wgsl(fn: Any, *args: Any) -> str:
    """The generated code of a traced function."""
    return str(fn.inspect(*args, device="wgpu").code["WGSL"])


def near(got: Any, wanted: np.ndarray, tolerance: float = 1e-5) -> None:
    got, wanted = np.asarray(got, np.float64), np.asarray(wanted, np.float64)
    assert got.shape == wanted.shape
    assert np.linalg.norm(got - wanted) <= tolerance * max(1e-30, float(np.linalg.norm(wanted)))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "tile",
    [Tile(64, 128, 8, 8, 8), Tile(128, 64, 16, 8, 8), Tile(32, 64, 32, 4, 4, 2), Tile(64, 64, 16, 8, 4)],
    ids=str,
)
def test_products_on_every_kind_of_tile(layout: str, tile: Tile) -> None:
    pa, pb = LAYOUTS[layout]
    a, b = rand(*(np.array((128, 256))[list(pa)])), rand(*(np.array((256, 128))[list(pb)]), seed=1)
    fn = tj.trace(lambda a, b: a.transpose(pa) @ b.transpose(pb) + 1.0)
    with tuning.forced((128, 128, 256, 1, layout), tile):
        got = fn(a, b, device="wgpu")
        assert str(tile) in fn.inspect(a, b, device="wgpu").code["dispatches"]
    near(got, a.transpose(pa).astype(np.float64) @ b.transpose(pb) + 1.0)


@pytest.mark.parametrize(("rows", "width"), [(512, 64), (512, 96), (300, 64), (512, 33)])
def test_bias_gradients_beside_weight_gradients(rows: int, width: int) -> None:
    x, w, b, g = rand(rows, 64), rand(64, width, seed=1), rand(width, seed=2), rand(rows, width, seed=3)

    def loss(w: Any, b: Any) -> Any:
        return (np.tanh(x @ w + b) * g).sum()

    fn = tj.trace(tj.grad(loss, wrt=(0, 1)))
    dw, db = fn(w, b, device="wgpu")
    z = np.tanh(x.astype(np.float64) @ w + b)
    dz = g * (1 - z * z)
    near(dw, x.T.astype(np.float64) @ dz)
    near(db, dz.sum(axis=0))
    inside = "t_b +=" in wgsl(fn, w, b)
    assert inside == (rows % 16 == 0 and width % 32 == 0)  # else in a loop of its own


def test_batched_products_keep_their_sums_apart() -> None:
    layers = [(rand(64, 64, seed=i) * 0.1, rand(64, seed=i + 9)) for i in range(3)]
    x = rand(512, 64, seed=5)

    def loss(layers: Any) -> Any:
        h = x
        for w, b in layers:
            h = np.tanh(h @ w + b)
        return (h * h).sum()

    fn = tj.trace(tj.grad(loss))
    got, wanted = fn(layers, device="wgpu"), fn(layers, device="numpy")
    for (dw, db), (ew, eb) in zip(got, wanted, strict=True):
        near(dw, ew)
        near(db, eb)


def test_transposed_reads_go_through_tiles() -> None:
    x, y, z = rand(300, 400), rand(400, 300, seed=1), rand(5, 130, 257, seed=2)
    fn = tj.trace(lambda x, y: np.where(x.T > 0, y, 2 * x.T))
    near(fn(x, y, device="wgpu"), np.where(x.T > 0, y, 2 * x.T), 0.0)
    assert "a0 + lx" in wgsl(fn, x, y)
    batched = tj.trace(lambda z: -z.transpose(0, 2, 1))
    near(batched(z, device="wgpu"), -z.transpose(0, 2, 1), 0.0)
    assert "a0 + lx" in wgsl(batched, z)
    assert not tiled.usable(96) and tiled.usable(256)


@pytest.mark.parametrize(("length", "dim"), [(64, 32), (70, 32), (70, 20)])
@pytest.mark.parametrize("causal", [True, False])
def test_attention_at_the_edges_of_tiles(length: int, dim: int, causal: bool) -> None:
    q, k, v = (rand(1, 2, length, dim, seed=i) for i in range(3))

    def loss(q: Any, k: Any, v: Any) -> Any:
        return (nn.scaled_dot_product_attention(q, k, v, is_causal=causal) * v).sum()

    fn = tj.trace(tj.value_and_grad(loss, wrt=(0, 1, 2)))
    (value, grads), (wanted, expected) = fn(q, k, v, device="wgpu"), fn(q, k, v, device="numpy")
    near(value, wanted)
    for a, b in zip(grads, expected, strict=True):
        near(a, b)


def test_masked_loads_outside_the_array_are_valid_code() -> None:
    """A shift that leaves the array at a place known while generating: a validator rejects negative constants."""
    x = rand(5)
    f = tj.trace(tj.grad(lambda x: np.prod(np.pad(x, 1)) + np.prod(x)))
    near(f(x, device="wgpu"), np.prod(x) / x)


def test_results_of_earlier_calls_are_never_overwritten() -> None:
    many = executable._MANY_RESULTS + 4
    fn = tj.trace(lambda x: [x + i for i in range(many)])
    x = rand(64)
    first = fn(x, device="wgpu")
    kept = first[3]
    del first
    handles = []
    for i in range(6):
        again = fn(x + np.float32(i), device="wgpu")
        handles.append(again[0].storage.handle)
        near(again[5], x + np.float32(i) + 5, 1e-6)
    near(kept, x + 3, 1e-6)
    assert len({id(h) for h in handles}) == len(handles)  # all alive, none shared


def test_dropped_results_are_taken_up_again() -> None:
    many = executable._MANY_RESULTS + 4
    fn = tj.trace(lambda x: [x * i for i in range(many)])
    x = rand(64)
    seen = set()
    for _ in range(8):
        out = fn(x, device="wgpu")
        seen.add(out[-1].storage.handle.buffer.uid)
    assert len(seen) <= 3
    near(out[-1], x * (many - 1), 1e-6)


@pytest.fixture
def fresh_tiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No tuned tiles yet, and a cache directory of this test's own."""
    monkeypatch.setenv("TRACEJIT_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tuning, "_tuned", None)
    monkeypatch.setattr(tuning, "CANDIDATES", (Tile(32, 64, 16, 4, 4), Tile(32, 32, 16, 4, 4)))
    return tmp_path / "wgpu_tiles.json"


def test_tuned_tiles_are_kept_on_disk_per_adapter(fresh_tiles: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACEJIT_WGPU_TUNE", "1")
    a = rand(64, 64)
    near(tj.trace(lambda a: a @ a)(a, device="wgpu"), a.astype(np.float64) @ a)
    target = runtime.get("").target
    if "timestamp-query" not in runtime.get("").features:
        assert not fresh_tiles.exists()
        return
    (key,) = json.loads(fresh_tiles.read_text())
    assert key.startswith(target.adapter) and key.endswith("|64,64,64,1,NN")
    assert tuning.known(target, 64, 64, 64, 1, "NN")
    # Another process reads the file and uses it without tuning.
    fresh_tiles.write_text(json.dumps({key: [32, 64, 8, 4, 4, 1]}))
    monkeypatch.setattr(tuning, "_tuned", None)
    monkeypatch.delenv("TRACEJIT_WGPU_TUNE")
    fn = tj.trace(lambda a: a @ a - 1.0)
    near(fn(a, device="wgpu"), a.astype(np.float64) @ a - 1.0)
    assert "32x64x8/4x4" in fn.inspect(a, device="wgpu").code["dispatches"]


@pytest.mark.parametrize("text", ["", "[]", '{"x": [1, 2]}', '{"x": [3, 64, 16, 4, 4, 1]}', "{"])
def test_a_broken_tile_cache_is_ignored(text: str, fresh_tiles: Path) -> None:
    fresh_tiles.write_text(text)
    assert not tuning.known(runtime.get("").target, 64, 64, 64, 1, "NN")


@pytest.mark.parametrize(
    "key",
    [
        (4096, 768, 3072, 1, "NT"),
        (2048, 2048, 2048, 1, "NN"),
        (256, 256, 1024, 4, "TN"),
        (12, 3000, 64, 1, "NN"),
    ],
)
def test_rules_give_tiles_that_any_device_can_run(key: tuple[int, int, int, int, str]) -> None:
    tile = tuning.rule(*key)
    assert tuning._valid(tile) and tile.memory <= 16384
