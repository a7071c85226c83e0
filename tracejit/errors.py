"""Every error a user can meet, one class per mistake, each with an example. Raised everywhere; imported by users to catch.

All derive from :class:`TraceError` and, where NumPy or Python would raise a built-in error for the same mistake, from
that built-in too, so that ``except ValueError`` keeps working. A message has the form
``[op] what is wrong; got x: f32[2,3], w: f32[4,5]; at model.py:41 in block0/attn; hint``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from tracejit import source

_SHORT = {
    "bool": "bool",
    "float16": "f16",
    "float32": "f32",
    "float64": "f64",
    "int8": "i8",
    "int16": "i16",
    "int32": "i32",
    "int64": "i64",
    "uint8": "u8",
    "uint16": "u16",
    "uint32": "u32",
    "uint64": "u64",
}


def describe(value: Any) -> str:
    """``f32[2,3]`` for anything with shape and dtype, else a short repr: how values appear in messages."""
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    if shape is None or dtype is None:
        text = repr(value)
        return text if len(text) <= 60 else text[:57] + "..."
    return f"{_SHORT.get(str(dtype), str(dtype))}[{','.join(map(str, shape))}]"


class TraceError(Exception):
    """Base of every error of tracejit.

    Build one with :meth:`make`, which adds the user's source line and the current scope to the message.
    """

    @classmethod
    def make(
        cls,
        what: str,
        *,
        op: str = "",
        got: Mapping[str, Any] | None = None,
        hint: str = "",
        where: str | None = None,
    ) -> Self:
        """An error in the house's form; ``where`` overrides the source line found on the stack."""
        parts = [f"[{op}] {what}" if op else what]
        if got:
            parts.append("got " + ", ".join(f"{k}: {describe(v)}" for k, v in got.items()))
        if where is None:
            where = source.location()
            scope = source.current_scope()
            if where and scope:
                where = f"{where} in {scope}"
        if where:
            parts.append(f"at {where}")
        if hint:
            parts.append(hint)
        return cls("; ".join(parts))


class ShapeError(TraceError, ValueError):
    """Shapes that do not fit. Example: ``np.ones((2, 3)) @ np.ones((4, 5))`` inside a traced function."""


class DTypeError(TraceError, TypeError):
    """A dtype that an operation or tracejit does not take. Example: passing an array of Python objects or strings."""


class IndexingError(TraceError, IndexError):
    """An index that is out of bounds or of an unsupported form. Example: ``x[5]`` where ``x`` has 3 rows."""


class ConcretizationError(TraceError, TypeError):
    """Python needs a concrete value of an array that only exists at run time. Example: ``if x.sum() > 0:``."""


class LeakedTensorError(TraceError, RuntimeError):
    """A symbolic tensor used after its trace ended. Example: appending a tensor to a global list, used later."""


class UnsupportedFunctionError(TraceError, TypeError):
    """A NumPy function that cannot be traced. Example: ``np.unique(x)``, whose result shape depends on values."""


class GradientError(TraceError, TypeError):
    """A gradient that does not exist or was asked for wrongly. Example: ``grad`` of an array-valued function."""


class TracingError(TraceError, RuntimeError):
    """The traced function does something that cannot be recorded. Example: a traced function calling itself."""


class GraphError(TraceError, ValueError):
    """A malformed graph. Example: ``Graph.parse`` on truncated text."""


class DeviceError(TraceError, RuntimeError):
    """A device that is unknown, missing or failed. Example: ``fn(x, device="cuda")``."""


class DeviceLostError(DeviceError):
    """The device went away while in use (driver reset, unplugged). The next call recreates it."""


class DeviceOutOfMemoryError(DeviceError, MemoryError):
    """The device has no room for a buffer. Example: a 64 GiB array on an 8 GiB GPU."""


class CompileError(TraceError, RuntimeError):
    """Generated code was rejected by the compiler or driver: a bug of tracejit worth reporting, with its kernel."""


class FileFormatError(TraceError, ValueError):
    """A file that is truncated, corrupted or not what was expected. Example: ``tj.load`` of half a file."""


class NonFiniteError(TraceError, FloatingPointError):
    """Under ``tj.debug_nans()``: the first node whose value is NaN or infinite, with its forward source line."""


def hide_internal_frames(error: BaseException) -> BaseException:
    """Drop tracejit's own frames from the traceback of ``error`` (kept when ``TRACEJIT_TRACEBACK=full``).

    The frame that re-raises is added again by Python, so a traceback shows at most one line of ours.
    """
    if os.environ.get("TRACEJIT_TRACEBACK") == "full":
        return error
    frames: list[TracebackType] = []
    tb = error.__traceback__
    while tb is not None:
        if not source.is_internal(tb.tb_frame.f_code.co_filename):
            frames.append(tb)
        tb = tb.tb_next
    rebuilt: TracebackType | None = None
    for frame in reversed(frames):
        rebuilt = TracebackType(rebuilt, frame.tb_frame, frame.tb_lasti, frame.tb_lineno)
    cause = error.__cause__ or error.__context__
    if (
        cause is not None
        and cause is not error
        and isinstance(cause, TraceError)
        and sys.version_info >= (3, 11)
    ):
        hide_internal_frames(cause)
    return error.with_traceback(rebuilt)
