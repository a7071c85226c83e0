"""What the host offers: CPU features, vector width, usable cores, an LLVM target machine. Called by every codegen module.

llvmlite is imported on first use only, so that ``import tracejit`` stays cheap.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import platform
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

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
def llvm() -> Any:
    """The ``llvmlite.binding`` module with the native target initialised."""
    import llvmlite.binding as binding

    try:
        binding.initialize_native_target()
        binding.initialize_native_asmprinter()
    except RuntimeError:  # newer llvmlite initialises by itself
        pass
    with contextlib.suppress(RuntimeError, ValueError):
        # a third of code generation time for nothing: our loops already step their own addresses
        binding.set_option("", "-disable-lsr")
    if sys.platform.startswith("linux"):  # libm's functions are looked up in the process
        with contextlib.suppress(RuntimeError):
            binding.load_library_permanently("libm.so.6")
    return binding


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
    binding = llvm()
    limit = os.environ.get("TRACEJIT_CPU_VECTOR_BITS")
    width = max(16, int(limit) // 8) if limit and limit.isdigit() else None
    try:
        flags = dict(binding.get_host_cpu_features())
    except RuntimeError:
        flags = {}
    return _make_host(flags, binding.get_process_triple(), width)


@functools.cache
def target_machine(level: int = 2) -> Any:
    """The LLVM target machine for :func:`host`, generating code at ``level`` (0 to 3)."""
    binding = llvm()
    here = host()
    return binding.Target.from_triple(here.triple).create_target_machine(
        cpu="",
        features=here.features,
        opt=level,
        reloc="pic" if here.arch != "x86_64" else "default",
        jit=True,
    )


def _cgroup_cores(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> float:
    """The smallest CPU quota, in cores, of the process's cgroup and those above it; infinity where there is none."""
    quota = math.inf
    try:
        lines = own.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        lines = []
    paths = {line.split(":", 2)[2].strip("/") for line in lines if line.count(":") >= 2}
    for path in {"", *paths}:
        at = root / path
        for place in (at, *at.parents):
            if root not in (place, *place.parents):
                break
            quota = min(quota, _quota(place), _quota(root / "cpu" / place.relative_to(root)))
    return quota


def _quota(place: Path) -> float:
    """The quota set in one cgroup directory (version 2, else version 1)."""
    with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
        limit, period = (place / "cpu.max").read_text(encoding="ascii").split()
        return math.inf if limit == "max" else int(limit) / int(period)
    with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
        limit_v1 = int((place / "cpu.cfs_quota_us").read_text(encoding="ascii"))
        if limit_v1 > 0:
            return limit_v1 / int((place / "cpu.cfs_period_us").read_text(encoding="ascii"))
    return math.inf


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
