"""Device memory: buffers in size classes, reused through a pool that dead handles feed, with a bound on what lies idle.

A :class:`Handle` owns one buffer; when the last reference to it goes, the buffer returns to the pool. Work is ordered
by the queue, so a buffer may be handed out again while earlier submissions still read it. The pool itself refers to every
buffer: were a handle the only one, the cycle collector would finalise handle and wgpu buffer in any order, and the handle's
finaliser would put a buffer that is already released back into the pool.
"""

from __future__ import annotations

import gc
import heapq
import os
import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from typing import Any

from tracejit.errors import DeviceError, DeviceOutOfMemoryError

#: Idle bytes kept for reuse before the least recently used size class is freed.
POOL_BYTES = int(os.environ.get("TRACEJIT_WGPU_POOL_BYTES", 2 << 30))


def size_class(nbytes: int) -> int:
    """The buffer size for a request: multiples of 256 up to 1 MiB, above that at most 1/16 more than asked."""
    if nbytes <= 1 << 20:
        return max(256, (nbytes + 255) // 256 * 256)
    step = 1 << (nbytes.bit_length() - 5)
    return (nbytes + step - 1) // step * step


class DeviceBuffer:
    """One wgpu buffer with a process-wide unique number (never reused, so it can key caches)."""

    __slots__ = ("gpu", "size", "uid")

    def __init__(self, uid: int, gpu: Any, size: int) -> None:
        self.uid, self.gpu, self.size = uid, gpu, size


class Handle:
    """Shared ownership of a buffer: give the buffer back when nobody holds the handle."""

    __slots__ = ("__weakref__", "_pool", "buffer", "nbytes")

    def __init__(self, pool: Pool, buffer: DeviceBuffer, nbytes: int) -> None:
        self._pool, self.buffer, self.nbytes = pool, buffer, nbytes

    def __del__(self) -> None:
        self._pool.returned.append(self.buffer)


class Pool:
    """Free buffers by size class; the one with the lowest number first, so that a loop sees the same buffers again."""

    def __init__(self, create: Callable[[int], Any], limit: int, binding: int) -> None:
        self._create = create
        self._limit = min(limit, binding)
        #: Heaps of (number, buffer): plain tuples compare in C, and a training step pops hundreds per call.
        self._free: OrderedDict[int, list[tuple[int, DeviceBuffer]]] = OrderedDict()
        self._next = 0
        self._all: dict[int, DeviceBuffer] = {}
        self._lock = threading.RLock()
        #: Buffers whose handles died, in any thread; collected by the next request.
        self.returned: deque[DeviceBuffer] = deque()
        self.idle = 0
        self.total = 0
        #: Objects whose ``give_up()`` is called when memory runs out, to free what can be made again.
        self.caches: weakref.WeakSet[Any] = weakref.WeakSet()

    @property
    def in_use(self) -> int:
        """Bytes held by live handles."""
        with self._lock:
            self._collect()
            return self.total - self.idle

    def _collect(self) -> None:
        returned, free, push = self.returned, self._free, heapq.heappush
        while returned:
            buffer = returned.popleft()
            size = buffer.size
            heap = free.get(size)
            if heap is None:
                heap = free[size] = []
            push(heap, (buffer.uid, buffer))
            self.idle += size
        while self.idle > POOL_BYTES and free:
            self._drop(next(iter(free)))

    def _drop(self, size: int) -> None:
        for _, buffer in self._free.pop(size):
            del self._all[buffer.uid]
            buffer.gpu.destroy()
            self.idle -= buffer.size
            self.total -= buffer.size

    def trim(self) -> None:
        """Free everything idle."""
        with self._lock:
            self._collect()
            for size in list(self._free):
                self._drop(size)

    def check(self, nbytes: int, what: str = "an array") -> None:
        """DeviceOutOfMemoryError with the numbers for what no binding of this device can hold."""
        if nbytes > self._limit:
            raise DeviceOutOfMemoryError.make(
                f"{what} of {nbytes:,} bytes does not fit: this device binds at most {self._limit:,} bytes at once",
                op="wgpu",
                hint="split the array, or use device='cpu'",
            )

    def size_for(self, nbytes: int) -> int:
        """The size of the buffer that serves a request; DeviceOutOfMemoryError if none can."""
        self.check(nbytes)
        return min(size_class(max(nbytes, 4)), self._limit // 4 * 4) if nbytes else 256

    def acquire(self, nbytes: int) -> Handle:
        """A handle on a buffer of at least ``nbytes``. Contents are undefined."""
        return self.acquire_all(((self.size_for(nbytes), nbytes),))[0]

    def acquire_all(self, requests: Sequence[tuple[int, int]]) -> list[Handle]:
        """Handles for many (:meth:`size_for`, bytes) at once: what a call with hundreds of results uses."""
        out: list[Handle] = []
        with self._lock:
            self._collect()
            free, pop = self._free, heapq.heappop
            for size, nbytes in requests:
                heap = free.get(size)
                if heap:
                    out.append(Handle(self, pop(heap)[1], nbytes))
                    self.idle -= size
                    if not heap:
                        del free[size]
                else:
                    gpu = self._make(size)
                    self._next += 1
                    self.total += size
                    made = self._all[self._next] = DeviceBuffer(self._next, gpu, size)
                    out.append(Handle(self, made, nbytes))
            # Sizes in use are the last to be given up.
            for size in dict.fromkeys(size for size, _ in requests):
                if size in free:
                    free.move_to_end(size)
        return out

    def _make(self, size: int) -> Any:
        try:
            return self._create(size)
        except DeviceOutOfMemoryError:
            for cache in list(self.caches):
                cache.give_up()
            gc.collect()  # arrays in reference cycles hold memory that Python does not know to be scarce
            self.trim()
        try:
            return self._create(size)
        except DeviceOutOfMemoryError as error:
            raise DeviceOutOfMemoryError.make(
                f"no room for {size:,} bytes more; {self.total - self.idle:,} bytes are in use by arrays and programs",
                op="wgpu",
                hint="drop arrays you no longer need, or use a smaller batch",
            ) from error

    def forget(self) -> None:
        """The device is gone: its buffers with it."""
        with self._lock:
            self._free.clear()
            self._all.clear()
            self.returned.clear()
            self.idle = self.total = 0


def lost(message: str) -> DeviceError:
    """The error for anything that needs a device that is gone."""
    from tracejit.errors import DeviceLostError
    from tracejit_wgpu import adapters

    hint = "arrays that lived on it are gone; the next call starts it anew"
    return DeviceLostError.make(
        message, op="wgpu", hint=adapters.FORK_HINT if message is adapters.FORKED else hint
    )
