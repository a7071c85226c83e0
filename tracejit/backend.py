"""What a device backend must offer, how backends are found, and which device a call runs on.

A backend is an object published under the entry-point group ``tracejit.backends``; tracejit names none of them. The
trace layer asks :func:`resolve` for the device of a call and hands a Program to the backend it gets.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np

from tracejit import plugins
from tracejit.errors import DeviceError
from tracejit.events import KernelInfo
from tracejit.forking import gate
from tracejit.program import Capabilities, Program
from tracejit.state import changed, state


@dataclass(frozen=True)
class DeviceInfo:
    """One device as ``tj.devices()`` reports it. ``name`` is what ``device=`` takes, e.g. ``"wgpu:1"``.

    ``available`` is False for a device that could exist here but cannot be used; ``detail`` then says why and what to do.
    """

    name: str
    backend: str
    kind: str
    available: bool
    description: str
    detail: str = ""
    properties: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Timing:
    """Times of one observed call, in the arrays of :class:`tracejit.events.StepEvent`."""

    kernels: np.ndarray
    start: np.ndarray
    end: np.ndarray
    live: np.ndarray
    lane: np.ndarray


@runtime_checkable
class Executable(Protocol):
    """A compiled program. Calling it takes the graph's inputs in order and returns its outputs in order.

    Inputs are arrays (NumPy, or ``tj.Array``) whose shapes and dtypes the caller has checked, or Python scalars for
    weakly typed inputs (shape ``()``). Outputs are arrays; 0-d results stay arrays here.
    """

    kernels: Sequence[KernelInfo]

    def __call__(self, inputs: Sequence[Any]) -> list[Any]:
        """Run once."""
        ...

    def observed(self, inputs: Sequence[Any]) -> tuple[list[Any], Timing]:
        """Run once and report when each kernel ran, on the ``time.perf_counter_ns`` clock."""
        ...

    def inspect(self) -> Mapping[str, str]:
        """Generated artefacts by title, e.g. ``{"LLVM IR": ..., "assembly": ...}`` or ``{"WGSL": ...}``."""
        ...


@runtime_checkable
class Backend(Protocol):
    """A way to execute programs. ``spec`` is what follows the colon of a device string (``"1"`` in ``"wgpu:1"``), or ``""``.

    ``priority`` decides the default device (highest wins; negative: never by default). ``on_host`` tells that results
    are NumPy arrays in host memory.

    A backend may also have ``prepare(spec)``, called before a function is traced, so that it can load what it needs in a
    thread of its own meanwhile; ``peaks(spec)``, measured (GFLOP/s, GB/s) for the "% peak" column of profiles; and, if it
    keeps code on disk, ``cache_info()`` (a dict with ``path``, ``entries``, ``bytes``) and ``cache_clear()`` for
    ``tracejit cache``. One that keeps whole programs has ``remember(key, executable)`` and ``restore(key, graph, stages,
    spec)``, which gives the executable of an earlier ``remember`` or None; ``stages.program`` lowers anew if need be.
    """

    name: str
    priority: int
    on_host: bool

    def capabilities(self, spec: str) -> Capabilities | None:
        """What steers the lowering; None means that the backend interprets ``program.graph`` and needs no kernels."""
        ...

    def compile(self, program: Program, spec: str) -> Executable:
        """Turn a program into something that runs."""
        ...

    def devices(self) -> list[DeviceInfo]:
        """The devices of this backend, usable or not. Never raises."""
        ...

    def to_device(self, array: Any, spec: str) -> Any:
        """``array`` (a NumPy array, or one of a device) as this backend keeps it between calls."""
        ...

    def from_device(self, array: Any) -> np.ndarray:
        """The NumPy array behind what :meth:`to_device` or an executable returned."""
        ...


@dataclass(frozen=True)
class Device:
    """A resolved device: backend plus spec. Hashable: it is part of the cache key."""

    backend_name: str
    spec: str

    def __str__(self) -> str:
        return f"{self.backend_name}:{self.spec}" if self.spec else self.backend_name

    @property
    def backend(self) -> Backend:
        """The backend object."""
        return get_backend(self.backend_name)


_lock = threading.RLock()
_backends: dict[str, Backend] = {}
_broken: dict[str, str] = {}
_entry_points: dict[str, Any] | None = None


def register_backend(backend: Backend) -> None:
    """Add a backend by hand (tests, experiments); packages use the entry-point group ``tracejit.backends``."""
    with _lock:
        _backends[backend.name] = backend
        _resolved.clear()


def _discover() -> dict[str, Any]:
    global _entry_points
    with gate, _lock:
        if _entry_points is None:
            _entry_points = plugins.find("tracejit.backends")
        return _entry_points


def backend_names() -> list[str]:
    """Names of all installed backends, loaded or not."""
    return sorted({*_backends, *_discover()})


def get_backend(name: str) -> Backend:
    """The backend called ``name``; DeviceError if it is unknown or its package does not import."""
    found = _backends.get(name)
    if found is not None:
        return found
    with gate, _lock:  # a child that was forked during an import could never finish it
        entry = _discover().get(name)
        if entry is None:
            import difflib

            near = difflib.get_close_matches(name, backend_names(), 1)
            raise DeviceError.make(
                f"unknown device {name!r}",
                op="device",
                hint=f"installed: {', '.join(backend_names()) or 'none'}"
                + (f"; did you mean {near[0]!r}?" if near else ""),
            )
        if name in _broken:
            raise DeviceError.make(f"device {name!r} cannot be used: {_broken[name]}", op="device")
        try:
            backend = entry.load()
        except Exception as error:
            _broken[name] = f"{type(error).__name__}: {error}"
            raise DeviceError.make(f"device {name!r} cannot be used: {_broken[name]}", op="device") from error
        _backends[name] = backend
        return backend


def prepare(device: Device) -> None:
    """Tell the backend of ``device`` that a program for it is on its way."""
    start = getattr(device.backend, "prepare", None)
    if start is not None:
        start(device.spec)


_resolved: dict[str | None, Device] = {}


def resolve(name: str | Device | None) -> Device:
    """The device for a call: its own ``device=``, else the innermost ``tj.device(...)``, else ``TRACEJIT_DEVICE``, else
    the fastest installed backend."""
    if name is None:
        ambient = state.device
        if ambient is not None:
            return ambient
    elif isinstance(name, Device):
        return name
    found = _resolved.get(name) if isinstance(name, str | None) else None
    return found if found is not None else _resolve_slow(name)


def _resolve_slow(name: Any) -> Device:
    chosen = name or os.environ.get("TRACEJIT_DEVICE") or None  # read once per process: the result is kept
    if chosen is None:
        device = Device(_default_backend(), "")
    else:
        if not isinstance(chosen, str):
            raise DeviceError.make(
                f'device must be a string such as "cpu" or "wgpu:1", got {name!r}', op="device"
            )
        backend, _, spec = chosen.partition(":")
        get_backend(backend)
        device = Device(backend, spec)
    _resolved[name] = device
    return device


def _default_backend() -> str:
    best: Backend | None = None
    for name in backend_names():
        try:
            backend = get_backend(name)
        except DeviceError:
            continue
        if backend.priority >= 0 and (best is None or backend.priority > best.priority):
            best = backend
    if best is None:
        raise DeviceError.make(
            "no backend is installed", op="device", hint="reinstall tracejit: pip install tracejit"
        )
    return best.name


@contextlib.contextmanager
def device(name: str) -> Iterator[Device]:
    """Run every traced call inside the block on ``name`` unless the call says otherwise: ``with tj.device("wgpu"): ...``."""
    resolved = resolve(name)
    with changed(device=resolved):
        yield resolved


def devices() -> list[DeviceInfo]:
    """All devices of all installed backends, including those that cannot be used here and why."""
    found: list[DeviceInfo] = []
    for name in backend_names():
        try:
            found.extend(get_backend(name).devices())
        except DeviceError as error:
            found.append(DeviceInfo(name, name, "unknown", False, "backend does not load", str(error)))
    return found
