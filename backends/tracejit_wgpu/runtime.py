"""A device at work: wgpu device and queue, pipelines, bind groups, submission with back-pressure, upload and readback.

One :class:`Runtime` per adapter and process, made on first use by :func:`get` and made anew after a loss. The executables
(``executable.py``) record into it; nothing else talks to wgpu.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np

from tracejit.errors import CompileError, DeviceError, DeviceLostError, DeviceOutOfMemoryError
from tracejit_wgpu import adapters, fastpath
from tracejit_wgpu.emit import Dispatch, Target
from tracejit_wgpu.memory import Handle, Pool, lost

_T = TypeVar("_T")
#: Calls that may be queued before one waits for the oldest.
IN_FLIGHT = int(os.environ.get("TRACEJIT_WGPU_IN_FLIGHT", 16))
#: Bytes of host data that may wait in staging memory before one waits for the device.
STAGED_BYTES = int(os.environ.get("TRACEJIT_WGPU_STAGED_BYTES", 256 << 20))
#: Pipelines kept beside those that live programs hold; the least recently used go first.
PIPELINES = 4096

#: PCI vendor ids whose hardware has a single subgroup size: NVIDIA, Apple.
_ONE_SUBGROUP_SIZE = frozenset({0x10DE, 0x106B})

_PROBE = """
@group(0) @binding(0) var<storage, read_write> o: array<u32>;
@compute @workgroup_size(256) fn main(@builtin(local_invocation_index) i: u32, @builtin(subgroup_size) s: u32,
 @builtin(subgroup_invocation_id) k: u32) { o[i] = s * 1024u + k; }
"""


class Runtime:
    """Everything that lives as long as one wgpu device."""

    def __init__(self, adapter: adapters.Adapter) -> None:
        import wgpu

        self.adapter = adapter
        self.name = f"wgpu:{adapter.index}"
        self.lock = threading.RLock()
        self.dead: str | None = None
        limits = adapters.required_limits(adapter)
        features = adapters.required_features(adapter)
        try:
            self.device = adapter.handle.request_device_sync(
                required_features=features, required_limits=limits
            )
        except Exception as error:
            adapters.forget()
            raise DeviceError.make(
                f"{adapter.name} ({adapter.backend}) gave no device: {error}",
                op="wgpu",
                hint=adapters.install_hint(),
            ) from error
        self.queue = self.device.queue
        self.limits = limits
        self.features = frozenset(features)
        usage = wgpu.BufferUsage
        flags = usage.STORAGE | usage.COPY_SRC | usage.COPY_DST
        self._usage = usage
        self.pool = Pool(
            lambda size: self.guard(lambda: self.device.create_buffer(size=size, usage=flags)),
            limits["max-buffer-size"],
            limits["max-storage-buffer-binding-size"],
        )
        self._pipelines: OrderedDict[tuple[str, tuple[str, ...]], Any] = OrderedDict()
        self._pipeline_lock = (
            threading.Lock()
        )  # not ``lock``: its holder may wait for the threads that compile
        self._layouts: dict[tuple[str, ...], tuple[Any, Any]] = {}
        self._in_flight: deque[tuple[int | None, int]] = deque()  # (submission, bytes staged for it)
        self._staged = 0  # bytes staged since the last submission
        self._queued = 0  # bytes staged for submissions in flight
        self._fence: Handle | None = None
        self.target = Target(
            f16="shader-f16" in self.features,
            invocations=min(
                limits["max-compute-invocations-per-workgroup"], limits["max-compute-workgroup-size-x"]
            ),
            workgroup_memory=limits["max-compute-workgroup-storage-size"],
            workgroups=limits["max-compute-workgroups-per-dimension"],
            buffers=min(limits["max-storage-buffers-per-shader-stage"], 64),
            binding_bytes=limits["max-storage-buffer-binding-size"],
            adapter=f"{adapter.name} ({adapter.backend}, {limits['max-compute-workgroup-storage-size']} B)",
        )
        size = self._subgroup_size()
        if size:
            from dataclasses import replace

            self.target = replace(self.target, subgroup=size)

    # ------------------------------------------------------------ errors
    def guard(self, action: Callable[[], _T]) -> _T:
        """Run a wgpu call; its errors become ours."""
        if self.dead is not None:
            raise lost(self.dead)
        try:
            return action()
        except DeviceError:
            raise
        except Exception as error:
            raise self.translate(error) from error

    def translate(self, error: Exception) -> DeviceError | Exception:
        """A DeviceLostError, DeviceOutOfMemoryError or CompileError for what wgpu raised."""
        text, kind = str(error), type(error).__name__
        low = text.lower()
        if "lost" in low or "device is destroyed" in low or "parent device" in low:
            reason = text.strip().splitlines()[-1].strip() if text.strip() else kind
            self.kill(f"the device {self.name} ({self.adapter.name}) was lost: {reason}")
            return lost(self.dead or "")
        if "OutOfMemory" in kind or "out of memory" in low or "not enough memory" in low:
            return DeviceOutOfMemoryError.make(f"{self.adapter.name} is out of memory", op="wgpu")
        return error

    def kill(self, reason: str) -> None:
        """Mark the device as gone; :func:`get` makes a new one."""
        self.dead = reason
        self.pool.forget()
        self._pipelines.clear()
        with _lock:
            for key in [k for k, v in _runtimes.items() if v is self]:
                del _runtimes[key]
        adapters.forget()

    # ------------------------------------------------------------ pipelines
    def _subgroup_size(self) -> int:
        """The fixed subgroup size if lanes are numbered linearly and the size cannot vary, else 0."""
        if "subgroup" not in self.features or os.environ.get("TRACEJIT_WGPU_SUBGROUPS", "1") == "0":
            return 0
        info = self.adapter.handle.info
        low, high = (int(info.get(k, 0) or 0) for k in ("stackgroup_min_size", "stackgroup_max_size"))
        low, high = (
            int(info.get("subgroup_min_size", low) or 0),
            int(info.get("subgroup_max_size", high) or 0),
        )
        # Most drivers report a range of sizes even where the hardware knows one only; Intel's and AMD's compilers choose.
        one_size = "llvmpipe" in self.adapter.name or int(info.get("vendor_id", 0) or 0) in _ONE_SUBGROUP_SIZE
        if low != high and not one_size:
            return 0
        handle = self.pool.acquire(1024)
        try:
            pipeline = self.pipeline(Dispatch(_PROBE, (0,), frozenset({0}), (1, 1, 1), trusted=False))
            group = self.bind_group(("rw",), [handle])
            self.run(fastpath.record([(pipeline, group, (1, 1, 1))]))
            found = self.read(handle, 1024, np.dtype(np.uint32))
        except Exception:
            return 0
        size = int(found[0]) >> 10
        lanes = np.arange(256) % max(size, 1)
        fixed = bool(np.all(found >> 10 == size) and np.all((found & 1023) == lanes))
        return size if fixed and size >= 4 and size & (size - 1) == 0 and size <= 128 else 0

    def layout(self, kinds: tuple[str, ...]) -> tuple[Any, Any]:
        """(bind group layout, pipeline layout) for binding kinds ``"r"``, ``"rw"``, ``"u"``."""
        found = self._layouts.get(kinds)
        if found is None:
            names = {"r": "read-only-storage", "rw": "storage", "u": "uniform"}
            entries = [
                {"binding": i, "visibility": 4, "buffer": {"type": names[k]}} for i, k in enumerate(kinds)
            ]
            groups = self.guard(lambda: self.device.create_bind_group_layout(entries=entries))
            layout = self.guard(lambda: self.device.create_pipeline_layout(bind_group_layouts=[groups]))
            found = self._layouts[kinds] = (groups, layout)
        return found

    def kinds(self, dispatch: Dispatch) -> tuple[str, ...]:
        """Binding kinds of a dispatch."""
        out = tuple("rw" if b in dispatch.written else "r" for b in dispatch.buffers)
        return (*out, "u") if dispatch.uses_scalars else out

    def pipeline(self, dispatch: Dispatch) -> Any:
        """The compiled pipeline of a dispatch, made once per device."""
        kinds = self.kinds(dispatch)
        key = (dispatch.code, kinds)
        found = self._pipelines.get(key)
        if found is not None:
            with self._pipeline_lock:
                if key in self._pipelines:
                    self._pipelines.move_to_end(key)
            return found
        layout = self.layout(kinds)[1]
        try:
            module = fastpath.shader_module(self.device, dispatch.code, trusted=dispatch.trusted)
            found = self.device.create_compute_pipeline(
                layout=layout, compute={"module": module, "entry_point": "main"}
            )
        except Exception as error:
            better = self.translate(error)
            if isinstance(better, DeviceError):
                raise better from error
            path = _dump(dispatch)
            raise CompileError.make(
                f"the driver of {self.adapter.name} rejected generated code: {str(error)[:1200]}",
                op=dispatch.label or "wgpu",
                hint=f"this is a bug of tracejit; its WGSL is in {path}",
            ) from error
        with self._pipeline_lock:
            found = self._pipelines.setdefault(key, found)
            while len(self._pipelines) > PIPELINES:
                self._pipelines.popitem(last=False)
        return found

    def pipelines(self, dispatches: Sequence[Dispatch]) -> list[Any]:
        """Pipelines for all dispatches; new ones are compiled in parallel threads."""
        fresh = {
            (d.code, self.kinds(d)): d for d in dispatches if (d.code, self.kinds(d)) not in self._pipelines
        }
        if len(fresh) > 1 and (os.cpu_count() or 1) > 1:
            for d in fresh.values():
                self.layout(self.kinds(d))
            with ThreadPoolExecutor(min(12, os.cpu_count() or 1, len(fresh))) as threads:
                list(threads.map(self.pipeline, fresh.values()))
        return [self.pipeline(d) for d in dispatches]

    def bind_group(self, kinds: tuple[str, ...], handles: Sequence[Any]) -> Any:
        """A bind group of :class:`Handle` objects; an entry of kind ``"u"`` is a raw wgpu buffer."""
        entries = []
        for i, (kind, handle) in enumerate(zip(kinds, handles)):
            if kind == "u":
                entries.append(
                    {"binding": i, "resource": {"buffer": handle, "offset": 0, "size": handle.size}}
                )
            else:
                buffer = handle.buffer
                entries.append(
                    {"binding": i, "resource": {"buffer": buffer.gpu, "offset": 0, "size": buffer.size}}
                )
        return self.guard(
            lambda: self.device.create_bind_group(layout=self.layout(kinds)[0], entries=entries)
        )

    def uniform(self, nbytes: int) -> Any:
        """A uniform buffer for the weak scalars of a program."""
        flags = self._usage.UNIFORM | self._usage.COPY_DST
        return self.guard(lambda: self.device.create_buffer(size=(nbytes + 15) // 16 * 16, usage=flags))

    # ------------------------------------------------------------ work
    def run(self, recording: Sequence[tuple[Any, ...]]) -> None:
        """Encode and submit a recording as one compute pass; returns before the device has finished."""
        if not recording:
            return

        def action() -> None:
            encoder = self.device.create_command_encoder()
            compute = encoder.begin_compute_pass()
            fastpath.encode(compute, recording)
            compute.end()
            self._in_flight.append((fastpath.submit(self.queue, encoder.finish()), self._staged))
            self._queued += self._staged
            self._staged = 0

        with self.lock:
            while len(self._in_flight) >= IN_FLIGHT or (self._in_flight and self._queued > STAGED_BYTES):
                index, staged = self._in_flight.popleft()
                self._queued -= staged
                self._wait(index)
            self.guard(action)

    def copy(self, moves: Sequence[tuple[Handle, int, Handle, int, int]]) -> None:
        """Buffer to buffer copies: (source, offset, target, offset, bytes)."""

        def action() -> None:
            encoder = self.device.create_command_encoder()
            for source, a, target, b, nbytes in moves:
                encoder.copy_buffer_to_buffer(
                    source.buffer.gpu, a, target.buffer.gpu, b, (nbytes + 3) // 4 * 4
                )
            self.queue.submit([encoder.finish()])

        with self.lock:
            self.guard(action)

    def finish(self) -> None:
        """Wait for everything submitted."""
        with self.lock:
            if self.dead is None:
                self._forget_queue()
                self._wait(None)

    def _forget_queue(self) -> None:
        """Everything submitted is about to be waited for."""
        self._in_flight.clear()
        self._queued = 0

    def _wait(self, index: int | None) -> None:
        """Wait for a submission, or for all; without the raw path by reading four bytes back."""
        if not self.guard(lambda: fastpath.wait(self.device, index)):
            self._forget_queue()
            if self._fence is None:
                self._fence = self.pool.acquire(256)
            self.read(self._fence, 4, np.dtype(np.uint32))

    def upload(self, data: np.ndarray) -> Handle:
        """A buffer with a copy of ``data`` (contiguous, already in its storage dtype)."""
        handle = self.pool.acquire(data.nbytes)
        self.write(handle, data)
        return handle

    def write(self, handle: Handle, data: np.ndarray) -> None:
        """Overwrite a buffer from host memory, ordered after what was submitted before."""
        if data.nbytes == 0:
            return
        raw = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
        if raw.nbytes % 4:
            raw = np.concatenate([raw, np.zeros(4 - raw.nbytes % 4, np.uint8)])
        with self.lock:
            self.guard(lambda: self.queue.write_buffer(handle.buffer.gpu, 0, raw))
            self._staged += raw.nbytes
            if (
                self._staged > STAGED_BYTES
            ):  # uploads without calls between them: wgpu keeps a copy until a submission
                self.guard(lambda: self.queue.submit([]))
                self._staged = 0
                self.finish()

    def write_uniform(self, buffer: Any, data: bytes) -> None:
        """Overwrite a uniform buffer."""
        with self.lock:
            self.guard(lambda: self.queue.write_buffer(buffer, 0, data))

    def read(self, handle: Handle, nbytes: int, dtype: np.dtype) -> np.ndarray:
        """Wait for the queue and copy a buffer to the host: a flat array of ``dtype``."""
        if nbytes == 0:
            return np.empty(0, dtype)
        size = (nbytes + 3) // 4 * 4
        with self.lock:
            data = self.guard(lambda: self.queue.read_buffer(handle.buffer.gpu, 0, size))
        return np.frombuffer(data, np.uint8)[:nbytes].view(dtype).copy()


_lock = threading.RLock()
_runtimes: dict[str, Runtime] = {}


def _in_child() -> None:
    """After a fork the devices are dead here. Nothing of theirs is dropped: the driver would wait for lost threads."""
    global _lock
    _lock = threading.RLock()
    for rt in _runtimes.values():
        rt.dead = adapters.FORKED
        rt.lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)


def get(spec: str = "") -> Runtime:
    """The runtime of a device spec (what follows ``wgpu:``), started on first use and after a loss."""
    key = f"{spec}|{os.environ.get('TRACEJIT_WGPU_ADAPTER', '')}|{os.environ.get('TRACEJIT_WGPU_LIMITS', '')}"
    found = _runtimes.get(key)
    if found is not None and found.dead is None:
        return found
    with _lock:
        found = _runtimes.get(key)
        if found is None or found.dead is not None:
            adapter = adapters.select(spec)
            limits = os.environ.get("TRACEJIT_WGPU_LIMITS", "")
            same = [
                r
                for k, r in _runtimes.items()
                if r.adapter.index == adapter.index and k.endswith("|" + limits) and r.dead is None
            ]
            found = _runtimes[key] = same[0] if same else Runtime(adapter)
        return found


def _dump(dispatch: Dispatch) -> str:
    import tempfile

    with tempfile.NamedTemporaryFile("w", suffix=".wgsl", prefix="tracejit_", delete=False) as file:
        file.write(dispatch.code)
    return file.name


__all__ = ["DeviceLostError", "Runtime", "get"]
