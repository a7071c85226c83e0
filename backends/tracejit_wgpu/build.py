"""A small builder for LoopBodies that this backend makes by itself: convolution, pooling, padding, scans of short axes."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np

from tracejit.program import Access, Instr, LoopBody

I32 = np.dtype(np.int32)
BOOL = np.dtype(np.bool_)


def row_major(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides in elements of a contiguous array."""
    return tuple(prod(shape[i + 1 :]) for i in range(len(shape)))


class BodyBuilder:
    """Appends instructions and returns their positions."""

    def __init__(self, domain: Sequence[int], reduce_axes: Sequence[int] = ()) -> None:
        self.domain = tuple(domain)
        self.reduce_axes = tuple(reduce_axes)
        self.instrs: list[Instr] = []

    def op(self, name: str, *args: int, dtype: Any = None, **attrs: Any) -> int:
        """Any instruction; the dtype defaults to that of the last operand."""
        kind = np.dtype(dtype) if dtype is not None else self.instrs[args[-1]].dtype
        self.instrs.append(Instr(name, args, kind, (), attrs))
        return len(self.instrs) - 1

    def const(self, value: Any, dtype: Any = I32) -> int:
        """A constant."""
        return self.op("const", dtype=dtype, value=value)

    def index(self, axis: int) -> int:
        """The i32 position along an axis."""
        return self.op("index", dtype=I32, axis=axis)

    def load(
        self,
        buffer: int,
        strides: Sequence[int],
        dtype: Any,
        offset: int = 0,
        *,
        gather: Any = (),
        predicate: int | None = None,
        fill: Any = 0,
    ) -> int:
        """A load; see :class:`tracejit.program.Instr`."""
        attrs: dict[str, Any] = {"access": Access(buffer, tuple(strides), offset)}
        if gather:
            attrs["gather"] = tuple(gather)
        if predicate is not None:
            attrs["predicate"], attrs["fill"] = predicate, fill
        return self.op("load", dtype=dtype, **attrs)

    def store(self, value: int, buffer: int, strides: Sequence[int], offset: int = 0) -> None:
        """A store."""
        self.op("store", value, access=Access(buffer, tuple(strides), offset))

    def affine(self, terms: Sequence[tuple[int, int]], offset: int = 0) -> int:
        """``offset + sum(factor * index(axis))`` as an i32 value; terms are (axis, factor)."""
        total = self.const(offset)
        for axis, factor in terms:
            value = self.index(axis)
            if factor != 1:
                value = self.op("mul", value, self.const(factor))
            total = self.op("add", total, value)
        return total

    def within(self, value: int, size: int) -> int:
        """``0 <= value < size``."""
        low = self.op("greater_equal", value, self.const(0), dtype=BOOL)
        return self.op("bitwise_and", low, self.op("less", value, self.const(size), dtype=BOOL))

    def both(self, a: int, b: int) -> int:
        """Logical and."""
        return self.op("bitwise_and", a, b)

    def body(self) -> LoopBody:
        """The finished body."""
        return LoopBody(self.domain, tuple(self.instrs), self.reduce_axes)
