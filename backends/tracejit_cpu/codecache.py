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
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tracejit.forking import gate
from tracejit_cpu.host import host, llvm, once, target_machine

if TYPE_CHECKING:
    from pathlib import Path  # imported at run time only for those who ask: it costs 5 ms

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
    here = os.path.dirname(__file__)
    for name in sorted(n for n in os.listdir(here) if n.endswith(".py")):
        with open(os.path.join(here, name), "rb") as file:
            digest.update(file.read())
    digest.update(repr(llvm().version).encode())
    digest.update(host().key.encode())
    return digest.hexdigest()


def cache_dir() -> Path | None:
    """The directory, from ``TRACEJIT_CACHE_DIR`` or the user's cache directory; None when set to ``off`` or ``0``."""
    from pathlib import Path

    found = _folder()
    return None if found is None else Path(found)


def _folder() -> str | None:
    """As :func:`cache_dir`."""
    text = os.environ.get("TRACEJIT_CACHE_DIR")
    if text is not None and text.strip().lower() in ("", "0", "off", "none"):
        return None
    if text:
        return os.path.join(text, "cpu")
    home = os.path.expanduser("~")
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or os.path.join(home, "AppData", "Local")
    elif sys.platform == "darwin":
        base = os.path.join(home, "Library", "Caches")
    else:
        base = os.environ.get("XDG_CACHE_HOME") or os.path.join(home, ".cache")
    return os.path.join(base, "tracejit", "cpu")


def _trusted(path: str) -> bool:
    """A real directory of ours that nobody else may write to or read."""
    try:
        info = os.lstat(path)
    except OSError:
        return False
    if not stat.S_ISDIR(info.st_mode):
        return False
    if hasattr(os, "getuid"):
        return info.st_uid == os.getuid() and not info.st_mode & 0o077
    return True


def _prepare() -> str | None:
    """The directory, made as needed; None when it cannot be trusted (then nothing is cached).

    A directory of ours that others could have written to is closed and its entries are dropped. Anything else that stands
    in the way (a link, a file, somebody else's directory) is left alone: it may be the user's.
    """
    path = _folder()
    if path is None:
        return None
    try:
        if _trusted(path):
            return path
        if os.path.islink(path):
            return None
        if not os.path.isdir(path):
            os.makedirs(os.path.dirname(path), exist_ok=True)
            os.mkdir(path, 0o700)
        if hasattr(os, "getuid") and os.lstat(path).st_uid != os.getuid():
            return None
        os.chmod(path, 0o700)
        if not _trusted(path):
            return None
        for file in _entries(path):
            os.unlink(file)
        return path
    except OSError:
        return None


def _entries(path: str) -> list[str]:
    """Our files in the directory: entries, and temporary files of interrupted writes."""
    return [os.path.join(path, f) for f in os.listdir(path) if f.endswith(".tjo") or f.startswith("tmp")]


def _entry(key: str) -> str:
    return hashlib.sha256(f"{source_digest()}|{key}".encode()).hexdigest()[:40] + ".tjo"


def read(key: str) -> tuple[dict[str, Any], bytes] | None:
    """The stored (metadata, object code) of ``key``; a damaged entry is removed and not used."""
    global _hits, _misses
    path = _prepare()
    if path is not None:
        name = os.path.join(path, _entry(key))
        try:
            with open(name, "rb") as file:
                data = file.read()
        except OSError:
            data = b""
        if data:
            found = _decode(data)
            if found is not None:
                _hits += 1
                return found
            with contextlib.suppress(OSError):
                os.unlink(name)
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
        name = os.path.join(path, f"tmp{os.getpid()}-{os.urandom(8).hex()}")
        handle = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o600)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.replace(name, os.path.join(path, _entry(key)))
    except OSError:
        return


def _trim(path: str, extra: int) -> None:
    """Drop the oldest entries when the directory grows beyond its limit."""
    files = [(os.stat(f).st_mtime, os.stat(f).st_size, f) for f in _entries(path)]
    total = extra + sum(size for _, size, _ in files)
    for _, size, file in sorted(files):
        if total <= _LIMIT_BYTES:
            break
        with contextlib.suppress(OSError):
            os.unlink(file)
        total -= size


def cache_info() -> CacheInfo:
    """Where the cache is, how many entries and bytes it has, and this process's hits and misses."""
    path = _folder()
    if path is None or not os.path.isdir(path):
        return CacheInfo(path, 0, 0, _hits, _misses)
    sizes = [os.stat(f).st_size for f in _entries(path) if f.endswith(".tjo")]
    return CacheInfo(path, len(sizes), sum(sizes), _hits, _misses)


def cache_clear() -> int:
    """Delete all entries; returns how many there were."""
    path = _folder()
    if path is None or not os.path.isdir(path):
        return 0
    count = 0
    for file in _entries(path):
        with contextlib.suppress(OSError):
            os.unlink(file)
            count += file.endswith(".tjo")
    return count


def to_object(ir: str, level: int = 2) -> bytes:
    """Compile LLVM IR to object code: promote stack slots, tidy the blocks, then code generation.

    ``level`` 0 takes a quarter of the time: for code that is not in any loop that matters.

    Raises:
        RuntimeError: the IR is malformed (a bug in this package).
    """
    verify = bool(os.environ.get("TRACEJIT_CPU_VERIFY"))
    with gate:
        return llvm().generate(ir, target_machine(level), target_machine(), verify=verify)


def to_assembly(ir: str) -> str:
    """The assembly of the same pipeline, for ``inspect()``."""
    with gate:
        return llvm().generate(ir, target_machine(), target_machine(), assembly=True).decode()


class Loaded:
    """Object code in memory. Keep it alive as long as any of its functions may run."""

    def __init__(self, code: bytes, symbols: Mapping[str, int] | None = None) -> None:
        library = llvm()
        with gate, _lock:
            for name, address in (symbols or {}).items():
                library.add_symbol(name, address)
            self._engine = library.load(code, host().triple, host().features)

    def address(self, name: str) -> int:
        """Address of an exported function."""
        address = self._engine.function(name)
        if not address:
            raise RuntimeError(f"symbol {name} is missing from object code")
        return address

    def pointers(self, name: str, count: int) -> list[int]:
        """The first ``count`` entries of an exported table of addresses."""
        if not count:
            return []
        address = self._engine.table(name)
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
