"""What a ``tj.Array`` on a wgpu device holds: a shared buffer handle and how to read it. Made by ``executable.py``."""

from __future__ import annotations

from typing import Any

import numpy as np

from tracejit_wgpu.memory import Handle, lost
from tracejit_wgpu.transfer import from_storage
from tracejit_wgpu.wgsl import storage_dtype


class WgpuStorage:
    """``size`` elements of ``dtype`` in device memory. Implements :class:`tracejit.array.Storage`."""

    __slots__ = ("dtype", "handle", "runtime", "size")

    def __init__(self, runtime: Any, handle: Handle, size: int, dtype: np.dtype) -> None:
        self.runtime, self.handle, self.size, self.dtype = runtime, handle, size, dtype

    @property
    def device(self) -> str:
        """The device string, e.g. ``"wgpu:0"``."""
        return str(self.runtime.name)

    def read(self, shape: tuple[int, ...]) -> np.ndarray:
        """Wait for the device and copy to the host; DeviceLostError if the device went away."""
        if self.runtime.dead is not None:
            raise lost(self.runtime.dead)
        store = storage_dtype(self.dtype, self.runtime.target.f16)
        raw = self.runtime.read(self.handle, self.size * store.itemsize, store)
        return from_storage(raw, shape, self.dtype)
