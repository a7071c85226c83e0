"""Small pieces that the op families share: type checks, constants inside gradient rules, sample arrays for tests.

Called by the family modules of this package when they define their ops and inside their gradient rules.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tracejit.dtypes import DType
from tracejit.errors import DTypeError, ShapeError
from tracejit.ops import registry
from tracejit.ops.registry import HasAval

Aval = tuple[tuple[int, ...], DType]

#: What the letters of ``kinds`` arguments stand for, in the words of error messages.
KIND_WORDS = {"b": "bool", "i": "integer", "u": "unsigned integer", "f": "float"}


def check_kind(op: str, kinds: str, **operands: HasAval) -> None:
    """DTypeError unless every operand's dtype kind is among ``kinds`` (letters of ``np.dtype.kind``)."""
    for x in operands.values():
        if x.dtype.kind not in kinds:
            allowed = " or ".join(
                dict.fromkeys(KIND_WORDS[k] for k in kinds if not (k == "u" and "i" in kinds))
            )
            raise DTypeError.make(
                f"needs {allowed} operands", op=op, got=operands, hint="convert with x.astype(...)"
            )


def check_same(op: str, **operands: HasAval) -> Aval:
    """The common shape and dtype of the operands of a strict op, or an error that shows them."""
    first, *rest = operands.values()
    for x in rest:
        if x.dtype != first.dtype:
            raise DTypeError.make("the operands of this primitive must have one dtype", op=op, got=operands)
        if x.shape != first.shape:
            raise ShapeError.make("the operands of this primitive must have one shape", op=op, got=operands)
    return tuple(first.shape), first.dtype


def is_float(x: HasAval) -> bool:
    """True if ``x`` can carry a gradient."""
    return x.dtype.kind == "f"


def quiet(function: Callable[..., Any]) -> Callable[..., Any]:
    """A reference implementation without NumPy's floating-point warnings: IEEE results are results."""

    def reference(*arrays: Any, **attrs: Any) -> Any:
        with np.errstate(all="ignore"):
            return function(*arrays, **attrs)

    return reference


# -- building blocks of gradient rules; they take tensors and arrays alike -----------------------------------


def full_like(x: HasAval, value: float) -> Any:
    """The constant ``value`` with the shape and dtype of ``x``."""
    constant = registry.get("const")(value=x.dtype.type(value).item(), dtype=x.dtype)
    return broadcast_to(constant, tuple(x.shape))


def broadcast_to(x: HasAval, shape: tuple[int, ...]) -> Any:
    """``x`` repeated along new leading axes and axes of size one; ``x`` itself if nothing changes."""
    return x if tuple(x.shape) == shape else registry.get("broadcast_to")(x, shape=shape)


def reshape(x: HasAval, shape: tuple[int, ...]) -> Any:
    """``x`` with another shape; ``x`` itself if nothing changes."""
    return x if tuple(x.shape) == shape else registry.get("reshape")(x, shape=shape)


def transpose(x: HasAval, perm: Sequence[int]) -> Any:
    """Axis ``i`` of the result is axis ``perm[i]`` of ``x``; ``x`` itself if nothing changes."""
    perm = tuple(perm)
    return x if perm == tuple(range(len(perm))) else registry.get("transpose")(x, perm=perm)


def convert(x: HasAval, dtype: DType) -> Any:
    """``x`` with another dtype; ``x`` itself if nothing changes."""
    return x if x.dtype == dtype else registry.get("convert")(x, dtype=dtype)


# -- samples -------------------------------------------------------------------------------------------------

#: Shapes that every family is sampled with: 0-d, vector, matrix, zero-size.
SHAPES: tuple[tuple[int, ...], ...] = ((), (5,), (3, 4), (2, 0))


def floats(
    shape: tuple[int, ...], low: float, high: float, dtype: str = "float64", seed: int = 0
) -> np.ndarray:
    """Uniform numbers in ``[low, high)``, the same ones in every run."""
    rng = np.random.default_rng([seed, len(shape), *shape])
    return np.asarray(rng.uniform(low, high, shape)).astype(dtype)


def integers(shape: tuple[int, ...], low: int, high: int, dtype: str = "int32", seed: int = 0) -> np.ndarray:
    """Uniform integers in ``[low, high)``, the same ones in every run."""
    rng = np.random.default_rng([seed, len(shape), *shape])
    return np.asarray(rng.integers(low, high, shape)).astype(dtype)


def bools(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Random truth values, the same ones in every run."""
    return integers(shape, 0, 2, "bool", seed)
