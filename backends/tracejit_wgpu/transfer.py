"""Host values to device bytes and back: which dtype is stored as what, range checks, and the one warning per precision.

float64 is kept as float32 and int64 as int32 (uint64 as uint32); an integer that does not fit is an error, never wrapped.
Called by ``executable.py`` and ``__init__.py``.
"""

from __future__ import annotations

import struct
import sys
import warnings
from typing import Any

import numpy as np

from tracejit import source
from tracejit.errors import DTypeError
from tracejit_wgpu.wgsl import storage_dtype

_warned: set[str] = set()


def warn_once(kind: str) -> None:
    """Tell once per process, at the user's line, that a 64-bit dtype is computed in 32 bits."""
    if kind not in _warned:
        _warned.add(kind)
        narrow = {
            "f": "float64 arrays are computed as float32",
            "i": "64-bit integers are computed as 32-bit",
        }[kind]
        message = f"WebGPU has no 64-bit types: {narrow} on device 'wgpu'"
        frame, level = sys._getframe(1), 2
        while frame.f_back is not None and source.is_internal(frame.f_code.co_filename):
            frame, level = frame.f_back, level + 1
        warnings.warn(message, UserWarning, stacklevel=level)


def check_range(array: np.ndarray) -> None:
    """DTypeError if a 64-bit integer does not fit the 32 bits of the device."""
    if array.size == 0:
        return
    low, high = int(array.min()), int(array.max())
    least, most = (0, (1 << 32) - 1) if array.dtype.kind == "u" else (-(1 << 31), (1 << 31) - 1)
    if low < least or high > most:
        bad = low if low < least else high
        raise DTypeError.make(
            f"{array.dtype} value {bad} does not fit {'uint32' if array.dtype.kind == 'u' else 'int32'}, the widest integer "
            "of device 'wgpu'",
            op="wgpu",
            got={"array": array},
            hint="run this on device='cpu', or rescale the values",
        )


def to_storage(value: Any, dtype: np.dtype, f16: bool, *, warn: bool = True) -> np.ndarray:
    """``value`` as a contiguous array in the storage dtype of ``dtype``."""
    array = np.asarray(value)
    if array.dtype.itemsize == 8 and array.dtype.kind in "iuf":
        if array.dtype.kind in "iu":
            check_range(array)
        if warn and array.ndim:
            warn_once("f" if array.dtype.kind == "f" else "i")
    target = storage_dtype(dtype, f16)
    if array.dtype.kind == "f" and array.dtype.itemsize > target.itemsize:
        with np.errstate(over="ignore"):
            return np.ascontiguousarray(array, target)
    return np.ascontiguousarray(array, target)


def from_storage(raw: np.ndarray, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """A device buffer's elements as the array a user sees."""
    if raw.dtype == dtype:
        return raw.reshape(shape)
    return (raw != 0).reshape(shape) if dtype.kind == "b" else raw.astype(dtype).reshape(shape)


def pack_scalar(value: Any, dtype: np.dtype) -> bytes:
    """Four bytes of the uniform block for a weak scalar input."""
    if dtype.kind == "f":
        with np.errstate(over="ignore"):
            return np.float32(np.float16(value) if dtype == np.float16 else value).tobytes()
    number = int(value)
    if dtype.kind == "b":
        return struct.pack("<I", number != 0)
    if dtype.kind == "u" and 0 <= number < 1 << 32:
        return struct.pack("<I", number)
    if dtype.kind == "i" and -(1 << 31) <= number < 1 << 31:
        return struct.pack("<i", number)
    check_range(np.asarray(number, np.uint64 if number >= 1 << 63 else np.int64))
    raise DTypeError.make(f"{number} does not fit {dtype}", op="wgpu")
