"""Object code: compiled from LLVM IR, kept on disk in a private directory, loaded into the process.

Called by ``compiler.py`` and ``runtime.py``. The directory belongs to the user, has mode 0700 and is wiped when anything
about it is off; every entry carries a checksum and the key of the host and of this package's sources.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tracejit.forking import gate
from tracejit_cpu.host import host, llvm, once, target_machine

_MAGIC = b"tracejit-obj-1\n"
_LIMIT_BYTES = 512 << 20
_lock = threading.RLock()


@dataclass(frozen=True)
class CacheInfo:
    """What ``tracejit cache`` shows. ``path`` is None when the cache is off."""

    path: str | None
    entries: int
    bytes: int
    hits: int
    misses: int


_hits = 0
_misses = 0


@once
def source_digest() -> str:
    """A digest of this package's sources and of LLVM's version: code made by other sources is never loaded."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    digest.update(repr(llvm().llvm_version_info).encode())
    digest.update(host().key.encode())
    return digest.hexdigest()


def cache_dir() -> Path | None:
    """The directory, from ``TRACEJIT_CACHE_DIR`` or the user's cache directory; None when set to ``off`` or ``0``."""
    text = os.environ.get("TRACEJIT_CACHE_DIR")
    if text is not None and text.strip().lower() in ("", "0", "off", "none"):
        return None
    if text:
        return Path(text) / "cpu"
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "tracejit" / "cpu"


def _trusted(path: Path) -> bool:
    """A real directory of ours that nobody else may write to or read."""
    try:
        info = path.lstat()
    except OSError:
        return False
    if not stat.S_ISDIR(info.st_mode):
        return False
    if hasattr(os, "getuid"):
        return info.st_uid == os.getuid() and not info.st_mode & 0o077
    return True


def _prepare() -> Path | None:
    """The directory, made as needed; None when it cannot be trusted (then nothing is cached).

    A directory of ours that others could have written to is closed and its entries are dropped. Anything else that stands
    in the way (a link, a file, somebody else's directory) is left alone: it may be the user's.
    """
    path = cache_dir()
    if path is None:
        return None
    try:
        if _trusted(path):
            return path
        if path.is_symlink():
            return None
        path.mkdir(parents=True, mode=0o700, exist_ok=True)
        if hasattr(os, "getuid") and path.lstat().st_uid != os.getuid():
            return None
        path.chmod(0o700)
        if not _trusted(path):
            return None
        for file in _entries(path):
            file.unlink()
        return path
    except OSError:
        return None


def _entries(path: Path) -> list[Path]:
    """Our files in the directory: entries, and temporary files of interrupted writes."""
    return [f for f in path.iterdir() if f.suffix == ".tjo" or f.name.startswith("tmp")]


def _entry(key: str) -> str:
    return hashlib.sha256(f"{source_digest()}|{key}".encode()).hexdigest()[:40] + ".tjo"


def read(key: str) -> tuple[dict[str, Any], bytes] | None:
    """The stored (metadata, object code) of ``key``; a damaged entry is removed and not used."""
    global _hits, _misses
    path = _prepare()
    if path is not None:
        file = path / _entry(key)
        try:
            data = file.read_bytes()
        except OSError:
            data = b""
        if data:
            found = _decode(data)
            if found is not None:
                _hits += 1
                return found
            with contextlib.suppress(OSError):
                file.unlink()
    _misses += 1
    return None


def _decode(data: bytes) -> tuple[dict[str, Any], bytes] | None:
    if not data.startswith(_MAGIC):
        return None
    rest = data[len(_MAGIC) :]
    checksum, payload = rest[:32], rest[32:]
    if hashlib.sha256(payload).digest() != checksum or len(payload) < 8:
        return None
    size = int.from_bytes(payload[:8], "little")
    try:
        meta = json.loads(payload[8 : 8 + size])
    except ValueError:
        return None
    return meta, payload[8 + size :]


def write(key: str, meta: Mapping[str, Any], code: bytes) -> None:
    """Store an entry atomically; failures are silent because the cache is only a convenience."""
    path = _prepare()
    if path is None:
        return
    head = json.dumps(meta).encode()
    payload = len(head).to_bytes(8, "little") + head + code
    data = _MAGIC + hashlib.sha256(payload).digest() + payload
    try:
        _trim(path, len(data))
        handle, name = tempfile.mkstemp(dir=path, prefix="tmp")
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.replace(name, path / _entry(key))
    except OSError:
        return


def _trim(path: Path, extra: int) -> None:
    """Drop the oldest entries when the directory grows beyond its limit."""
    files = [(f.stat().st_mtime, f.stat().st_size, f) for f in _entries(path)]
    total = extra + sum(size for _, size, _ in files)
    for _, size, file in sorted(files, key=lambda t: t[0]):
        if total <= _LIMIT_BYTES:
            break
        with contextlib.suppress(OSError):
            file.unlink()
        total -= size


def cache_info() -> CacheInfo:
    """Where the cache is, how many entries and bytes it has, and this process's hits and misses."""
    path = cache_dir()
    if path is None or not path.is_dir():
        return CacheInfo(None if path is None else str(path), 0, 0, _hits, _misses)
    files = [f for f in path.iterdir() if f.suffix == ".tjo"]
    return CacheInfo(str(path), len(files), sum(f.stat().st_size for f in files), _hits, _misses)


def cache_clear() -> int:
    """Delete all entries; returns how many there were."""
    path = cache_dir()
    if path is None or not path.is_dir():
        return 0
    count = 0
    for file in _entries(path):
        with contextlib.suppress(OSError):
            file.unlink()
            count += file.suffix == ".tjo"
    return count


def to_object(ir: str, level: int = 2) -> bytes:
    """Compile LLVM IR to object code: promote stack slots, tidy the blocks, then code generation.

    ``level`` 0 takes a quarter of the time: for code that is not in any loop that matters.

    Raises:
        RuntimeError: the IR is malformed (a bug in this package).
    """
    with gate, _lock:
        module = _prepared(ir)
        if os.environ.get("TRACEJIT_CPU_VERIFY"):
            module.verify()
        return target_machine(level).emit_object(module)


def to_assembly(ir: str) -> str:
    """The assembly of the same pipeline, for ``inspect()``."""
    with gate, _lock:
        return target_machine().emit_assembly(_prepared(ir))


def _prepared(ir: str) -> Any:
    """The parsed module after the passes."""
    binding = llvm()
    module = binding.parse_assembly(ir)
    builder = binding.create_pass_builder(
        target_machine(), binding.create_pipeline_tuning_options(speed_level=1)
    )
    passes = binding.create_new_module_pass_manager()
    passes.add_sroa_pass()
    passes.add_simplify_cfg_pass()
    passes.run(module, builder)
    return module


class Loaded:
    """Object code in memory. Keep it alive as long as any of its functions may run."""

    def __init__(self, code: bytes, symbols: Mapping[str, int] | None = None) -> None:
        binding = llvm()
        with gate, _lock:
            for name, address in (symbols or {}).items():
                binding.add_symbol(name, address)
            empty = binding.parse_assembly(f'target triple = "{host().triple}"\n')
            machine = binding.Target.from_triple(host().triple).create_target_machine(
                cpu="", features=host().features, opt=2, jit=True
            )
            self._engine = binding.create_mcjit_compiler(empty, machine)
            self._engine.add_object_file(binding.object_file.ObjectFileRef.from_data(code))
            self._engine.finalize_object()

    def address(self, name: str) -> int:
        """Address of an exported function."""
        address = self._engine.get_function_address(name)
        if not address:
            raise RuntimeError(f"symbol {name} is missing from object code")
        return address

    def pointers(self, name: str, count: int) -> list[int]:
        """The first ``count`` entries of an exported table of addresses."""
        if not count:
            return []
        address = self._engine.get_global_value_address(name)
        if not address:
            raise RuntimeError(f"table {name} is missing from object code")
        return _read_pointers(address, count)


def _read_pointers(address: int, count: int) -> list[int]:
    import ctypes

    return list((ctypes.c_uint64 * count).from_address(address))


def load_support(
    name: str, make: Callable[[], str], symbols: Mapping[str, int] | None = None, level: int = 2
) -> Loaded:
    """Load a support module (thread pool, entry, micro-kernel) from the disk cache, or compile the IR ``make`` gives.

    ``level`` is as for :func:`to_object`.
    """
    found = read(f"support:{name}")
    if found is None:
        code = to_object(make(), level)
        write(f"support:{name}", {"name": name}, code)
    else:
        code = found[1]
    return Loaded(code, symbols)
