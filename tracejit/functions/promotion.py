"""NumPy's promotion and broadcasting as explicit graph nodes: from any operands to tensors of one dtype and one shape.

Called by every user-level function before it reaches a primitive. NumPy itself decides the dtypes (NEP 50), so the
rules follow the installed NumPy.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np

from tracejit.dtypes import WEAK_DTYPES, DType, canonical
from tracejit.errors import DTypeError, ShapeError, TracingError, UnsupportedFunctionError
from tracejit.ops import elementwise as ew
from tracejit.ops import registry
from tracejit.tensor import (
    Tensor,
    as_array,
    aval_dtype,
    check_alive,
    context_of,
    current_context,
    is_arraylike,
    to_node,
)

Shape = tuple[int, ...]
_NO_VALUE = getattr(np, "_NoValue", None)


def any_tensor(*operands: Any) -> bool:
    """True if an operand is symbolic, so that the operation has to be recorded."""
    return any(isinstance(o, Tensor) for o in operands)


def is_weak(operand: Any) -> bool:
    """True for Python scalars and for tensors that stand for them."""
    return operand.weak if isinstance(operand, Tensor) else type(operand) in (bool, int, float)


@lru_cache(maxsize=4096)
def _resolve(ufunc: np.ufunc, dtypes: tuple[Any, ...], dtype: DType | None) -> tuple[DType, ...]:
    given: tuple[Any, ...] = tuple(np.dtype(bool) if d is bool else d for d in dtypes)
    if all(
        isinstance(d, type) for d in given
    ):  # Python scalars only: NumPy would fall back to objects for some ufuncs
        given = tuple(WEAK_DTYPES[d] for d in given)
    given += (None,) * ufunc.nout
    if dtype is None:
        return ufunc.resolve_dtypes(given)
    return ufunc.resolve_dtypes(given, signature=(None,) * ufunc.nin + (dtype,) * ufunc.nout)


def ufunc_dtypes(ufunc: np.ufunc, operands: tuple[Any, ...], dtype: Any = None) -> tuple[DType, ...]:
    """The dtypes that NumPy computes ``ufunc`` in: one per operand, then one per result.

    DTypeError with NumPy's reason where it has no loop, e.g. the difference of two bools.
    """
    name = ufunc.__name__
    avals = tuple(aval_dtype(o, op=name) for o in operands)
    wanted = None if dtype is None else canonical(dtype, op=name)
    try:
        return _resolve(ufunc, avals, wanted)
    except TypeError as error:
        reason = str(error).split(", and the inputs")[0].split("(types")[0].strip().rstrip(".")
        raise DTypeError.make(reason, op=name, got=got(operands)) from None


def common_dtype(op: str, *operands: Any) -> DType:
    """``np.result_type`` of the operands; Python scalars and weak tensors do not widen."""
    literals = {int: 0, float: 0.0, bool: False}
    avals = [aval_dtype(o, op=op) for o in operands]
    return canonical(np.result_type(*(literals[a] if isinstance(a, type) else a for a in avals)), op=op)


def got(operands: tuple[Any, ...]) -> Mapping[str, Any]:
    """The operands named as NumPy's documentation names them, for error messages."""
    named = {"x" if len(operands) == 1 else f"x{i + 1}": o for i, o in enumerate(operands)}
    return {k: np.asarray(o) if isinstance(o, list | tuple) and len(o) > 8 else o for k, o in named.items()}


def tensor(value: Any, op: str, dtype: DType | None = None) -> Tensor:
    """``value`` as a strong tensor of the running trace, converted to ``dtype`` if given.

    OverflowError, as NumPy raises, for Python integers that ``dtype`` cannot hold.
    """
    if isinstance(value, Tensor):
        check_alive(value)
        if dtype is not None and value.dtype != dtype:
            return ew.convert(value, dtype=dtype)
        return Tensor(value.node, value.ctx) if value.weak else value
    ctx = context_of((value,)) or current_context()
    if ctx is None:
        raise TracingError.make("there is no trace to record into", op=op, got={"x": value})
    if dtype is not None and isinstance(value, bool | int | float | np.generic):
        return Tensor(ctx.builder.const(_scalar(value, dtype), dtype), ctx)
    found = Tensor(to_node(value, ctx, op=op), ctx)
    return found if dtype is None or found.dtype == dtype else ew.convert(found, dtype=dtype)


def _scalar(value: Any, dtype: DType) -> Any:
    if type(value) is int and dtype.kind in "iu" and out_of_range(value, dtype):
        raise OverflowError(f"Python integer {value} out of bounds for {dtype}")
    with np.errstate(all="ignore"):
        return np.asarray(value).astype(dtype).item()


def out_of_range(value: int, dtype: DType) -> int:
    """-1 or 1 if the integer is below or above what the integer dtype holds, else 0."""
    info = np.iinfo(dtype)
    return -1 if value < info.min else 1 if value > info.max else 0


def shape_of(value: Any, op: str) -> Shape:
    """The shape of any operand; lists count as arrays."""
    if isinstance(value, bool | int | float):
        return ()
    return tuple(value.shape if is_arraylike(value) else as_array(value, op=op).shape)


def broadcast_shapes(op: str, operands: tuple[Any, ...], shapes: list[Shape]) -> Shape:
    """The common shape by NumPy's rules; the ShapeError names the first axis that does not fit."""
    ndim = max(map(len, shapes), default=0)
    out: list[int] = []
    for axis in range(-ndim, 0):
        sizes = {s[axis] for s in shapes if len(s) >= -axis} - {1}
        if len(sizes) > 1:
            different = " and ".join(str(s[axis]) for s in shapes if len(s) >= -axis)
            raise ShapeError.make(
                f"shapes do not broadcast: axis {axis} has sizes {different}",
                op=op,
                got=got(operands),
                hint="sizes must be equal or 1; x[:, None] adds an axis of size 1",
            )
        out.append(sizes.pop() if sizes else 1)
    return tuple(out)


def broadcast_to(x: Tensor, shape: Shape) -> Tensor:
    """``x`` repeated to ``shape``; ``x`` itself if it has it."""
    return x if x.shape == shape else registry.get("broadcast_to")(x, shape=shape)


def broadcast(op: str, *tensors: Tensor, operands: tuple[Any, ...] = ()) -> tuple[Tensor, ...]:
    """All tensors repeated to their common shape; ``operands`` are what the user gave, for the error message."""
    shapes = [t.shape for t in tensors]
    if all(s == shapes[0] for s in shapes):
        return tensors
    shape = broadcast_shapes(op, operands or tensors, shapes)
    return tuple(broadcast_to(t, shape) for t in tensors)


def constant_like(x: Tensor, value: Any) -> Tensor:
    """The constant ``value`` with shape and dtype of ``x``."""
    return broadcast_to(tensor(value, "constant", x.dtype), x.shape)


def weakly(result: Any, weak: bool) -> Any:
    """``result`` marked as standing for a Python scalar if ``weak``."""
    return Tensor(result.node, result.ctx, weak=True) if weak and not result.weak else result


def reject_keywords(op: str, out: Any = None, where: Any = True, **ignored: Any) -> None:
    """Errors for ``out=`` and ``where=``; ``order``, ``subok``, ``casting`` have no meaning for recorded values."""
    if out is not None and out is not _NO_VALUE and not (isinstance(out, tuple) and out == (None,)):
        raise TracingError.make(
            "out= cannot be used in traced code, because recorded values are immutable",
            op=op,
            hint="use the returned value",
        )
    if where is not True and where is not _NO_VALUE:
        raise UnsupportedFunctionError.make(
            "where= is not supported in traced code",
            op=op,
            hint="select with np.where(mask, x, neutral) instead",
        )
    unknown = set(ignored) - {"order", "subok", "casting"}
    for name in sorted(unknown):
        if ignored[name] is not None and ignored[name] is not _NO_VALUE:
            raise UnsupportedFunctionError.make(f"{name}= is not supported in traced code", op=op)
