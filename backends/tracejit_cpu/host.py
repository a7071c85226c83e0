"""What the host offers: CPU features, vector width, usable cores, an LLVM target machine. Called by every codegen module.

LLVM is loaded on first use only, so that ``import tracejit`` stays cheap.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import platform
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from tracejit_cpu.llvmlib import Library

T = TypeVar("T")


def once(make: Callable[[], T]) -> Callable[[], T]:
    """``functools.cache`` for a function without parameters that runs once even when two threads ask at a time.

    The preloading thread (``preload.py``) and the thread of the first call meet in these.
    """
    lock = threading.Lock()
    found: list[T] = []

    @functools.wraps(make)
    def get() -> T:
        if not found:
            with lock:
                if not found:
                    found.append(make())
        return found[0]

    return get


@once
def llvm() -> Library:
    """LLVM, with this machine's target initialised."""
    from tracejit_cpu.llvmlib import open_library

    return open_library()


@dataclass(frozen=True)
class Host:
    """Facts that generated code depends on; a part of every cache key.

    ``vector_bytes`` is the width of a vector register that we use, ``registers`` the number of such registers.
    """

    triple: str
    arch: str
    features: str
    vector_bytes: int
    registers: int
    fma: bool
    f16: bool

    @property
    def key(self) -> str:
        """A text that differs when compiled code could differ."""
        return f"{self.triple}|{self.features}|{self.vector_bytes}"


def _arch() -> str:
    machine = platform.machine().lower()
    if machine in ("x86_64", "amd64"):
        return "x86_64"
    return "aarch64" if machine in ("aarch64", "arm64") else machine


def _make_host(flags: dict[str, bool], triple: str, limit: int | None = None) -> Host:
    """Derive a Host from feature flags; ``limit`` caps the vector width in bytes (``TRACEJIT_CPU_VECTOR_BITS``)."""
    arch = _arch()
    have = {name for name, on in flags.items() if on}
    if arch == "x86_64":
        if {"avx512f", "avx512vl", "avx512bw", "avx512dq"} <= have:
            width, registers = 64, 32
        elif {"avx2", "fma"} <= have:
            width, registers = 32, 16
        else:
            width, registers = 16, 16
        fma, f16 = "fma" in have, "f16c" in have
    else:
        width, registers, fma, f16 = 16, 32, True, arch == "aarch64"
    if limit is not None and limit < width:
        width = limit
        if registers == 32 and arch == "x86_64":
            registers = 16
    features = ",".join(("+" if flags[name] else "-") + name for name in sorted(flags))
    return Host(triple, arch, features, width, registers, fma, f16)


@once
def host() -> Host:
    """The machine this process runs on. Feature flags are trusted, the CPU's name is not."""
    library = llvm()
    limit = os.environ.get("TRACEJIT_CPU_VECTOR_BITS")
    width = max(16, int(limit) // 8) if limit and limit.isdigit() else None
    return _make_host(library.features(), library.triple(), width)


_machines = threading.local()


def target_machine(level: int = 2) -> Any:
    """The calling thread's LLVM target machine for :func:`host`, generating code at ``level`` (0 to 3)."""
    name = f"level{level}"
    found = getattr(_machines, name, None)
    if found is None:
        here = host()
        found = llvm().machine(
            here.triple, here.features, level, "pic" if here.arch != "x86_64" else "default"
        )
        setattr(_machines, name, found)
    return found


def _cgroup_cores(
    root: str | os.PathLike[str] = "/sys/fs/cgroup", own: str | os.PathLike[str] = "/proc/self/cgroup"
) -> float:
    """The smallest CPU quota, in cores, of the process's cgroup and those above it; infinity where there is none."""
    quota, root = math.inf, os.fspath(root)
    try:
        with open(own, encoding="ascii", errors="replace") as file:
            lines = file.read().splitlines()
    except OSError:
        lines = []
    groups = {line.split(":", 2)[2].strip("/") for line in lines if line.count(":") >= 2}
    for group in {"", *groups}:
        parts = [p for p in group.split("/") if p not in ("", "..")]
        for depth in range(len(parts), -1, -1):
            above = parts[:depth]
            quota = min(quota, _quota(os.path.join(root, *above)), _quota(os.path.join(root, "cpu", *above)))
    return quota


def _quota(place: str) -> float:
    """The quota set in one cgroup directory (version 2, else version 1)."""
    with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
        limit, period = _words(place, "cpu.max")
        return math.inf if limit == "max" else int(limit) / int(period)
    with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
        limit_v1 = int(_words(place, "cpu.cfs_quota_us")[0])
        if limit_v1 > 0:
            return limit_v1 / int(_words(place, "cpu.cfs_period_us")[0])
    return math.inf


def _words(place: str, name: str) -> list[str]:
    with open(os.path.join(place, name), encoding="ascii") as file:
        return file.read().split()


def thread_count() -> int:
    """``TRACEJIT_NUM_THREADS`` or the cores this process may use (affinity and cgroup quota), at least 1.

    Raises:
        ValueError: the environment variable is not a positive integer.
    """
    text = os.environ.get("TRACEJIT_NUM_THREADS", "").strip()
    if text:
        if not text.isdigit() or int(text) < 1:
            raise ValueError(f"TRACEJIT_NUM_THREADS must be a positive integer, got {text!r}")
        return min(int(text), 256)
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    quota = _cgroup_cores()
    return max(1, min(cores, 256, math.ceil(quota) if math.isfinite(quota) else cores))
