"""Tile sizes of matrix products: rules measured on an H100, and results of ``tune`` per adapter kept on disk as JSON.

``choose`` is called by ``contract.py``. The rules aim at 128 threads, 12 KB of workgroup memory and enough workgroups.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from tracejit_wgpu.emit import Target


@dataclass(frozen=True)
class Tile:
    """A workgroup computes ``bm x bn`` results in steps of ``bk``; a thread ``tm x tn`` of them; k is cut in ``split``."""

    bm: int
    bn: int
    bk: int
    tm: int
    tn: int
    split: int = 1

    @property
    def threads(self) -> int:
        """Workgroup size."""
        return (self.bm // self.tm) * (self.bn // self.tn)

    @property
    def memory(self) -> int:
        """Workgroup memory in bytes."""
        return (self.bm + self.bn) * self.bk * 4

    def __str__(self) -> str:
        return f"{self.bm}x{self.bn}x{self.bk}/{self.tm}x{self.tn}" + (
            f" split {self.split}" if self.split > 1 else ""
        )


#: Tuned tiles by "adapter|m,n,k,count,layout"; filled from disk on first use.
_tuned: dict[str, Tile] | None = None
_overrides: dict[tuple[int, int, int, int, str], Tile] = {}


def _tiles(m: int, n: int, tile: Tile, count: int) -> int:
    return -(-m // tile.bm) * -(-n // tile.bn) * count


def choose(m: int, n: int, k: int, count: int, layout: str, target: Target) -> Tile:
    """The tile for ``count`` products of ``m x k`` by ``k x n``; layout as in BLAS (``"NN"``, ``"NT"``, ``"TN"``)."""
    forced = _overrides.get((m, n, k, count, layout)) or _load().get(
        _key(target.adapter, m, n, k, count, layout)
    )
    if (
        forced is not None
        and forced.memory <= target.workgroup_memory
        and forced.threads <= target.invocations
    ):
        return forced
    tile = rule(m, n, k, count, layout)
    return tile if tile.memory <= target.workgroup_memory else Tile(32, 32, 16, 4, 4, tile.split)


def known(target: Target, m: int, n: int, k: int, count: int, layout: str) -> bool:
    """True if the tile of this product was tuned on this adapter, now or in an earlier process."""
    return _key(target.adapter, m, n, k, count, layout) in _load()


def rule(m: int, n: int, k: int, count: int, layout: str) -> Tile:
    """The default where nothing was tuned: limits between tiles as measured on an H100 (``tests/benchmarks/gpu.py``)."""
    results = m * n * count
    if min(m, n) <= 16:
        bk = 32 if k >= 64 else 16
        return _with_split(Tile(16, 64, bk, 4, 4) if m <= n else Tile(64, 16, bk, 4, 4), m, n, k, count)
    if min(m, n) >= 64 and results >= 2_200_000:
        if layout == "TN" or n < 128:
            wide = Tile(128, 64, 16, 8, 8) if m >= 128 else Tile(64, 128 if n >= 128 else 64, 16, 8, 8)
        else:
            wide = Tile(64, 128, 16, 8, 8)
        return _filling(wide, m, n, count, layout)
    if min(m, n) >= 64 and results >= 900_000:
        return Tile(64, 64, 16, 8, 4)
    bk = 32 if k >= 64 else 16
    if n >= 64 and results >= 200_000 and _tiles(m, n, Tile(32, 64, bk, 4, 4), count) >= 200:
        return _with_split(Tile(32, 64, bk if results < 600_000 else 16, 4, 4), m, n, k, count)
    return _with_split(Tile(32, 32, bk, 4, 4), m, n, k, count)


#: Multiprocessors of the GPU that the rules were measured on, and workgroups of a wide tile that share one, by depth.
_PROCESSORS = 132
_RESIDENT = {16: 2, 8: 3}
#: How much fuller the last wave of workgroups must be with shallow tiles, whose loops are a little slower.
_GAIN = {"NN": -0.01, "NT": 0.02, "TN": 0.06, "TT": 0.06}


def _filling(tile: Tile, m: int, n: int, count: int, layout: str) -> Tile:
    """Deep or shallow steps, whichever fills the waves of workgroups better: shallow ones need fewer registers."""
    groups = _tiles(m, n, tile, count)

    def share(bk: int) -> float:
        wave = _PROCESSORS * _RESIDENT[bk]
        return groups / (-(-groups // wave) * wave)

    shallow = share(8) > share(16) + _GAIN[layout]
    return Tile(tile.bm, tile.bn, 8 if shallow else 16, tile.tm, tile.tn)


def _with_split(tile: Tile, m: int, n: int, k: int, count: int) -> Tile:
    """Cut k when there are too few workgroups for a large GPU and k is long; the parts cost a dispatch of their own."""
    groups = _tiles(m, n, tile, count)
    split = 1
    while split < 16 and groups * split < 100 and k // (split * 2) >= 4 * tile.bk:
        split *= 2
    return Tile(tile.bm, tile.bn, tile.bk, tile.tm, tile.tn, split)


# ---------------------------------------------------------------------------------------------------- disk
def cache_file() -> Path:
    """Where tuned tiles are kept: ``TRACEJIT_CACHE_DIR`` or the user's cache directory."""
    root = os.environ.get("TRACEJIT_CACHE_DIR")
    if root is None:
        if sys.platform == "win32":
            root = os.environ.get("LOCALAPPDATA", str(Path.home()))
        elif sys.platform == "darwin":
            root = str(Path.home() / "Library" / "Caches")
        else:
            root = os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache"))
        root = str(Path(root) / "tracejit")
    return Path(root) / "wgpu_tiles.json"


def _key(adapter: str, m: int, n: int, k: int, count: int, layout: str) -> str:
    return f"{adapter}|{m},{n},{k},{count},{layout}"


def _load() -> dict[str, Tile]:
    global _tuned
    if _tuned is None:
        _tuned = {}
        try:
            stored = json.loads(cache_file().read_text())
            for key, value in stored.items():
                numbers = [int(v) for v in value]
                if len(numbers) == 6 and _valid(Tile(*numbers)):
                    _tuned[str(key)] = Tile(*numbers)
        except (OSError, ValueError, TypeError, AttributeError):
            _tuned = {}  # no cache, or one that is not ours: rules apply
    return _tuned


def _valid(tile: Tile) -> bool:
    powers = all(
        v > 0 and v & (v - 1) == 0 for v in (tile.bm, tile.bn, tile.bk, tile.tm, tile.tn, tile.split)
    )
    return (
        powers and tile.tm % 4 == 0 and tile.tn % 4 == 0 and 8 <= tile.bk <= 32 and tile.bm % tile.tm == 0
        and tile.bn % tile.tn == 0 and tile.bm >= 16 and tile.bn >= 16 and 32 <= tile.threads <= 256 and tile.split <= 64
    )  # fmt: skip


def remember(target: Target, m: int, n: int, k: int, count: int, layout: str, tile: Tile) -> None:
    """Keep a tuned tile in memory and on disk."""
    table = _load()
    table[_key(target.adapter, m, n, k, count, layout)] = tile
    path = cache_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(
            json.dumps({k: [t.bm, t.bn, t.bk, t.tm, t.tn, t.split] for k, t in table.items()})
        )
        os.replace(temporary, path)
    except OSError:
        pass  # a cache that cannot be written is not an error


CANDIDATES = (
    Tile(128, 64, 16, 8, 8), Tile(64, 128, 16, 8, 8), Tile(128, 64, 8, 8, 8), Tile(64, 128, 8, 8, 8),
    Tile(64, 64, 16, 8, 4), Tile(64, 64, 16, 4, 8), Tile(32, 64, 16, 4, 4), Tile(32, 64, 32, 4, 4),
    Tile(32, 32, 16, 4, 4), Tile(32, 32, 32, 4, 4), Tile(64, 32, 16, 4, 4), Tile(16, 64, 32, 4, 4),
    Tile(128, 128, 8, 16, 8), Tile(128, 128, 16, 8, 8),
)  # fmt: skip


class forced:
    """Context manager: use one tile for a product while tuning or testing."""

    def __init__(self, key: tuple[int, int, int, int, str], tile: Tile) -> None:
        self._key = key
        self._tile = tile

    def __enter__(self) -> None:
        _overrides[self._key] = self._tile

    def __exit__(self, *exc: object) -> None:
        _overrides.pop(self._key, None)
