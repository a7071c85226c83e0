"""What every functional form of ``tracejit.nn`` shares: operands, index grids, float16 widening, closed-form
gradients.

Called by the other files of this package only. Everything here works on NumPy arrays (computing at once) and
on tensors (recording), so that each composite is written once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tracejit import tensor as _tensor
from tracejit.custom import custom_vjp
from tracejit.dtypes import DType
from tracejit.errors import DTypeError, ShapeError
from tracejit.ops import registry
from tracejit.source import named_scope
from tracejit.tensor import Tensor

FLOAT16 = np.dtype(np.float16)


def operand(value: Any, op: str) -> Any:
    """``value`` as something with ``shape`` and ``dtype``.

    Inside a trace a tensor (arrays of the surroundings are captured by reference, so a conversion of them is
    recorded, not computed once and frozen); outside one a NumPy array.
    """
    if isinstance(value, Tensor):
        return value
    ctx = _tensor.current_context()
    if ctx is not None:
        return Tensor(_tensor.to_node(value, ctx, op=op), ctx)
    return np.asarray(_tensor.as_array(value, op=op))


def float_operand(value: Any, op: str) -> Any:
    """Like :func:`operand`, with integers and booleans converted to float64 as NumPy's true division does."""
    x = operand(value, op)
    return x if x.dtype.kind == "f" else x.astype(np.float64)


def widen(x: Any) -> Any:
    """float16 computed in float32 (sums and squares overflow at 65504); every other dtype as it is."""
    return x.astype(np.float32) if x.dtype == FLOAT16 else x


def narrow(y: Any, dtype: DType) -> Any:
    """Back to the caller's dtype after :func:`widen`."""
    return y if y.dtype == dtype else y.astype(dtype)


def iota(shape: Sequence[int], axis: int, dtype: Any = np.int32) -> Any:
    """An array of ``shape`` that counts along ``axis``: generated in the kernel when traced, never a captured
    array.
    """
    shape = tuple(shape)
    return registry.get("iota")(shape=shape, axis=axis % len(shape), dtype=np.dtype(dtype))


def with_vjp(
    name: str,
    fwd: Callable[..., tuple[Any, Any]],
    bwd: Callable[[Any, Any], tuple[Any, ...]],
) -> Callable[..., Any]:
    """The function ``fwd(*args)[0]`` with the closed-form gradient ``bwd(residuals, cotangent)``.

    ``bwd`` consists of differentiable operations, so derivatives of any order work.
    """

    def value(*args: Any) -> Any:
        return fwd(*args)[0]

    value.__name__ = value.__qualname__ = name
    f = custom_vjp(value)
    f.defvjp(fwd, bwd)
    return f


def check_axis(x: Any, axis: int, op: str) -> None:
    """ShapeError if ``x`` has no axis ``axis``."""
    if not -x.ndim <= axis < x.ndim:
        raise ShapeError.make(
            f"axis {axis} is out of bounds for an array of {x.ndim} axes", op=op, got={"x": x}
        )


def check_integer(labels: Any, op: str, name: str = "labels") -> None:
    """DTypeError unless ``labels`` holds integers."""
    if labels.dtype.kind not in "iu":
        raise DTypeError.make(
            f"{name} must be integers", op=op, got={name: labels}, hint=f"{name}.astype(np.int64)"
        )


def reduce_loss(values: Any, reduction: str, op: str) -> Any:
    """PyTorch's ``reduction``: ``mean`` over all elements, ``sum``, or ``none``."""
    if reduction == "mean":
        return np.mean(values)
    if reduction == "sum":
        return np.sum(values)
    if reduction == "none":
        return values
    raise ValueError(f"[{op}] reduction must be 'mean', 'sum' or 'none', not {reduction!r}")


__all__ = [
    "check_axis",
    "check_integer",
    "float_operand",
    "iota",
    "named_scope",
    "narrow",
    "operand",
    "reduce_loss",
    "widen",
    "with_vjp",
]
