"""Adapters: which GPUs there are, which one a device string means, and what a device on it may use.

``"wgpu"`` is the best real GPU (a CPU adapter only when it is the only one), ``"wgpu:1"`` the adapter of that number in
``tj.devices()``, ``"wgpu:low-power"`` / ``"wgpu:high-performance"`` ask by kind, any other word matches the adapter's name.
``TRACEJIT_WGPU_ADAPTER`` (number, word or name) replaces the default. Called by ``runtime.py`` and ``__init__.py``.
"""

from __future__ import annotations

import logging
import os
import platform
import sys
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tracejit.errors import DeviceError

#: WebGPU's default limits, which every implementation grants.
DEFAULT_LIMITS = {
    "max-compute-workgroup-storage-size": 16384,
    "max-compute-invocations-per-workgroup": 256,
    "max-compute-workgroup-size-x": 256,
    "max-storage-buffer-binding-size": 128 << 20,
    "max-buffer-size": 256 << 20,
    "max-storage-buffers-per-shader-stage": 8,
    "max-compute-workgroups-per-dimension": 65535,
}
FEATURES = (
    "shader-f16",
    "subgroup",
    "subgroup-barrier",
    "timestamp-query",
    "timestamp-query-inside-passes",
    "pipeline-cache",
)
_RANK = {"DiscreteGPU": 0, "IntegratedGPU": 1, "VirtualGPU": 2, "Unknown": 3, "CPU": 4}
#: OpenGL is left out: it shows the same device again, and Mesa's shaders divide integers through floats there.
_BACKENDS = ("Vulkan", "Metal", "D3D12")

_lock = threading.Lock()
_found: list[Adapter] | None = None
_forked = False

FORKED = "a process forked from one that used a GPU cannot use it: the driver's threads stayed in the parent"
FORK_HINT = 'start it with multiprocessing.get_context("spawn"), or use device="cpu" in it'


def _in_child() -> None:
    """After a fork. What the parent found is kept, not freed: its destructors would wait for threads that are gone."""
    global _forked, _lock
    _lock = threading.Lock()
    _forked = _forked or _found is not None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)


@dataclass(frozen=True)
class Adapter:
    """One adapter: its number in the list, what the driver says of itself and of the limits, and the wgpu object."""

    index: int
    name: str
    vendor: str
    kind: str
    backend: str
    description: str
    limits: dict[str, int]
    features: frozenset[str]
    handle: Any

    @property
    def is_cpu(self) -> bool:
        """True for software drivers such as lavapipe."""
        return self.kind == "CPU"


def quiet() -> None:
    """Give drivers the directory that they complain about on stderr when it is missing."""
    if sys.platform.startswith("linux") and not os.path.isdir(os.environ.get("XDG_RUNTIME_DIR", "")):
        os.environ["XDG_RUNTIME_DIR"] = os.environ.get("TMPDIR", "/tmp")


def adapters() -> list[Adapter]:
    """All usable adapters, best first; the empty list without a driver. Enumerated once per process.

    Raises DeviceError in a process that was forked from one that used a GPU: the driver's threads stayed there.
    """
    global _found
    if _forked:
        raise DeviceError.make(FORKED, op="device", hint=FORK_HINT)
    with _lock:
        if _found is None:
            _found = _enumerate()
        return _found


def forget() -> None:
    """Enumerate again next time (after a device was lost for good)."""
    global _found
    with _lock:
        _found = None


def _enumerate() -> list[Adapter]:
    quiet()
    try:
        import wgpu
    except Exception as error:
        raise DeviceError.make(
            f"the wgpu package does not load ({type(error).__name__}: {error})",
            op="device",
            hint="pip install wgpu",
        ) from error
    logging.getLogger("wgpu").setLevel(logging.CRITICAL)
    try:
        handles = list(wgpu.gpu.enumerate_adapters_sync())
    except Exception:
        handles = []
    rows: list[tuple[int, int, int, Any]] = []
    for handle in handles:
        info = handle.info
        if info["backend_type"] not in _BACKENDS:
            continue
        rows.append(
            (_RANK.get(info["adapter_type"], 3), _BACKENDS.index(info["backend_type"]), len(rows), handle)
        )
    rows.sort(key=lambda r: r[:3])
    out = []
    for index, (_, _, _, handle) in enumerate(rows):
        info = handle.info
        limits = {k: int(v) for k, v in dict(handle.limits).items()}
        features = frozenset(handle.features)
        out.append(
            Adapter(
                index=index,
                name=str(info["device"] or info["description"]),
                vendor=str(info["vendor"]),
                kind=str(info["adapter_type"]),
                backend=str(info["backend_type"]),
                description=f"{info['description']}\n{summary(limits, features)}".strip(),
                limits=limits,
                features=features,
                handle=handle,
            )
        )
    return out


def summary(found: Mapping[str, int], features: Iterable[str]) -> str:
    """Limits and optional features in a line, for ``tracejit devices``."""
    limits = {**DEFAULT_LIMITS, **found}
    return (
        f"buffers up to {_size(limits['max-buffer-size'])}, bindings {_size(limits['max-storage-buffer-binding-size'])}, "
        f"workgroup memory {_size(limits['max-compute-workgroup-storage-size'])}, "
        f"{limits['max-compute-invocations-per-workgroup']} invocations; "
        f"features: {', '.join(sorted(set(FEATURES).intersection(features))) or 'none'}"
    )


def _size(nbytes: int) -> str:
    for unit, bits in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if nbytes >= 1 << bits:
            return f"{nbytes / (1 << bits):.3g} {unit}"
    return f"{nbytes} bytes"


def install_hint() -> str:
    """What to install on this operating system to get a GPU driver."""
    if sys.platform.startswith("linux"):
        return (
            "install a Vulkan driver: the GPU vendor's, or for a software device "
            f"{_linux_package()}; `tracejit devices` should then list it"
        )
    if sys.platform == "darwin":
        return "Metal needs macOS 10.15 or later on a Mac with a Metal-capable GPU (not in most virtual machines)"
    return (
        "install the GPU vendor's current driver (DirectX 12 or Vulkan); on servers and in virtual machines the WARP "
        "software adapter needs Windows 10 or later"
    )


def _linux_package() -> str:
    """The command that installs Mesa's software Vulkan driver on this distribution."""
    try:
        facts = platform.freedesktop_os_release()
    except (OSError, AttributeError):
        facts = {}
    family = {facts.get("ID", ""), *facts.get("ID_LIKE", "").split()}
    if family & {"fedora", "rhel", "centos"}:
        return "`dnf install mesa-vulkan-drivers vulkan-loader`"
    if family & {"arch"}:
        return "`pacman -S vulkan-swrast vulkan-icd-loader`"
    if family & {"suse", "opensuse"}:
        return "`zypper install libvulkan_lvp libvulkan1`"
    if family & {"alpine"}:
        return "`apk add mesa-vulkan-swrast vulkan-loader`"
    return "`apt install mesa-vulkan-drivers libvulkan1`"


def select(spec: str) -> Adapter:
    """The adapter for the part of a device string behind ``wgpu:``; DeviceError with what there is otherwise."""
    found = adapters()
    if not found:
        raise DeviceError.make("no GPU adapter was found", op="device", hint=install_hint())
    wanted = spec or os.environ.get("TRACEJIT_WGPU_ADAPTER", "")
    if not wanted:
        return found[0]
    if wanted.isdigit():
        if int(wanted) < len(found):
            return found[int(wanted)]
    elif wanted in ("low-power", "high-performance"):
        order = (
            {"IntegratedGPU": 0, "DiscreteGPU": 1}
            if wanted == "low-power"
            else {"DiscreteGPU": 0, "IntegratedGPU": 1}
        )
        return min(found, key=lambda a: (order.get(a.kind, 2 + _RANK.get(a.kind, 3)), a.index))
    elif wanted == "cpu":
        software = [a for a in found if a.is_cpu]
        if software:
            return software[0]
    else:
        named = [a for a in found if wanted.lower() in f"{a.name} {a.vendor}".lower()]
        if named:
            return named[0]
    names = ", ".join(f"wgpu:{a.index} = {a.name} ({a.kind})" for a in found)
    raise DeviceError.make(
        f"no adapter matches {wanted!r}",
        op="device",
        hint=f"there are: {names}; also low-power, high-performance, cpu",
    )


def required_limits(adapter: Adapter) -> dict[str, int]:
    """What to ask of the adapter: all it has, or WebGPU's defaults with ``TRACEJIT_WGPU_LIMITS=default``."""
    forced = os.environ.get("TRACEJIT_WGPU_LIMITS", "") == "default"
    out = {}
    for name, default in DEFAULT_LIMITS.items():
        real = adapter.limits.get(name, default)
        out[name] = min(default, real) if forced else real
    return out


def required_features(adapter: Adapter) -> list[str]:
    """Optional features to ask for; none with ``TRACEJIT_WGPU_LIMITS=default``."""
    if os.environ.get("TRACEJIT_WGPU_LIMITS", "") == "default":
        return []
    return [f for f in FEATURES if f in adapter.features]
