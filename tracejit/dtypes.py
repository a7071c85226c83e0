"""The dtypes that tracejit knows and NumPy's promotion rules (NEP 50), including weakly typed Python scalars.

Called wherever an operand enters: tensors, functions, the signature of a call.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np

from tracejit.errors import DTypeError

DType: TypeAlias = np.dtype[Any]

BOOL = np.dtype(np.bool_)
INT32 = np.dtype(np.int32)
INT64 = np.dtype(np.int64)
UINT32 = np.dtype(np.uint32)
FLOAT32 = np.dtype(np.float32)
FLOAT64 = np.dtype(np.float64)

NAMES = (
    "bool",
    "int8",
    "int16",
    "int32",
    "int64",
    "uint8",
    "uint16",
    "uint32",
    "uint64",
    "float16",
    "float32",
    "float64",
)
SUPPORTED: dict[str, DType] = {name: np.dtype(name) for name in NAMES}
_SUPPORTED_SET = frozenset(SUPPORTED.values())

#: The Python types whose values are weakly typed, and the dtype they have on their own.
WEAK_DTYPES: dict[type, DType] = {bool: BOOL, int: INT64, float: FLOAT64}


def canonical(dtype: Any, *, op: str = "") -> DType:
    """The supported native-endian dtype for anything NumPy takes as a dtype; DTypeError for all others."""
    try:
        found = np.dtype(dtype)
    except TypeError as error:
        raise DTypeError.make(f"{dtype!r} is not a dtype", op=op) from error
    if not found.isnative:
        found = found.newbyteorder("=")
    if found not in _SUPPORTED_SET:
        raise DTypeError.make(
            f"dtype {found} is not supported",
            op=op,
            hint=f"supported: {', '.join(NAMES)}"
            + ("; complex numbers are not" if found.kind == "c" else ""),
        )
    return SUPPORTED[found.name]


def is_float(dtype: DType) -> bool:
    """True for float16, float32 and float64."""
    return dtype.kind == "f"


def is_integer(dtype: DType) -> bool:
    """True for signed and unsigned integers (not bool)."""
    return dtype.kind in "iu"


def weak_type(dtype: DType) -> type:
    """The Python type that a weakly typed value of ``dtype`` stands for."""
    return {"b": bool, "i": int, "u": int, "f": float}[dtype.kind]
