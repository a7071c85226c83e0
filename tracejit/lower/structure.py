"""Structural keys: kernels that differ only in the buffers they touch share one, so that backends compile them once.

``kernel_key(kernel, buffers)`` returns a hashable key and the kernel's buffers in the order of first use; two kernels with
equal keys do the same to their lists of buffers. Called by ``horizontal.py`` and by both code generators.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from tracejit.graph import attr_key
from tracejit.program import (
    Access,
    AttentionKernel,
    Buffer,
    Contract,
    ContractKernel,
    Kernel,
    LoopBody,
    LoopKernel,
    Program,
)

_ATTENTION_FIELDS = ("q", "k", "v", "mask", "out", "lse", "dout", "dq", "dk", "dv")


class Keys:
    """Numbers buffers by first use while keys are made."""

    def __init__(self, buffers: Sequence[Buffer]) -> None:
        self.buffers = buffers
        self.order: dict[int, int] = {}

    def buffer(self, b: int) -> Hashable:
        """Local number and dtype of a buffer."""
        if b < 0:
            return b
        return self.order.setdefault(b, len(self.order)), self.buffers[b].dtype.char

    def access(self, a: Access | None) -> Hashable:
        """Key of an address."""
        return None if a is None else (self.buffer(a.buffer), a.strides, a.offset)

    def body(self, body: LoopBody) -> Hashable:
        """Key of a loop body."""
        out: list[Any] = [body.domain, body.reduce_axes]
        for i in body.instrs:
            attrs = []
            for k, v in i.attrs.items():
                if k == "access":
                    v = self.access(v)
                elif isinstance(v, np.dtype):
                    v = v.char
                else:
                    v = attr_key(v)
                attrs.append((k, v))
            out.append((i.op, i.args, i.dtype.char, i.axes, tuple(attrs)))
        return tuple(out)

    def contract(self, c: Contract) -> Hashable:
        """Key of a contraction."""
        sizes = (c.batch, c.m, c.n, c.k, c.acc_dtype.char)
        sums = self.access(c.a_sum), self.access(c.b_sum)
        return (sizes, self.access(c.a), self.access(c.b), self.body(c.epilogue), sums)


def body_key(body: LoopBody, buffers: Sequence[Buffer]) -> tuple[Hashable, tuple[int, ...]]:
    """Key and buffers of one loop body."""
    keys = Keys(buffers)
    return keys.body(body), tuple(keys.order)


def contract_key(c: Contract, buffers: Sequence[Buffer]) -> tuple[Hashable, tuple[int, ...]]:
    """Key and buffers of one contraction."""
    keys = Keys(buffers)
    return keys.contract(c), tuple(keys.order)


def kernel_key(k: Kernel, buffers: Sequence[Buffer]) -> tuple[Hashable, tuple[int, ...]]:
    """Key and buffers (in order of first use) of a kernel."""
    keys = Keys(buffers)
    key: Hashable
    if isinstance(k, LoopKernel):
        key = ("loop", tuple(keys.body(b) for b in k.bodies))
    elif isinstance(k, ContractKernel):
        key = ("contract", tuple(keys.contract(p) for p in k.problems))
    elif isinstance(k, AttentionKernel):
        sizes = (k.batch, k.tq, k.tk, k.d, k.dv_dim, k.scale, k.causal, k.grad, k.dtype.char)
        key = ("attention", sizes, tuple(keys.access(getattr(k, f)) for f in _ATTENTION_FIELDS))
    else:
        attrs = []
        for name, v in sorted(k.attrs.items()):
            attrs.append(
                (name, id(v) if isinstance(v, Program) or not isinstance(v, Hashable) else attr_key(v))
            )
        places = tuple((keys.buffer(b), shape) for b, shape in (*k.operands, *k.results))
        key = ("op", k.op, tuple(attrs), places, keys.body(k.epilogue) if k.epilogue else None)
    return key, tuple(keys.order)
