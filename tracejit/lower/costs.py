"""What a kernel touches and costs: buffers read and written, bytes moved, floating-point operations; and its name.

Called by ``kernels.py``, ``horizontal.py`` and ``attention.py`` whenever they make a kernel.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from math import prod

from tracejit.lower.cluster import Cluster
from tracejit.lower.values import DOT, REDUCE, WEIGHTS, Value
from tracejit.program import (
    Access,
    AttentionKernel,
    Buffer,
    Contract,
    ContractKernel,
    Kernel,
    LoopBody,
    LoopKernel,
    OpKernel,
)

_FREE = frozenset({"load", "store", "const", "index", "acc"})
_QUIET = frozenset(
    {"convert", "reshape", "transpose", "broadcast_to", "slice", "pad", "identity", "const", "iota"}
)


def body_accesses(body: LoopBody) -> Iterable[tuple[bool, Access, tuple[int, ...]]]:
    """(is store, access, axes) of every load and store."""
    for i in body.instrs:
        if i.op == "load" or i.op == "store":
            yield i.op == "store", i.attrs["access"], i.axes


def body_cost(body: LoopBody, buffers: Sequence[Buffer]) -> tuple[int, int]:
    """(bytes, flops) of one body: each buffer's distinct elements once per direction, each instruction per point."""
    touched: dict[tuple[int, bool], int] = {}
    points: dict[tuple[int, ...], int] = {}
    domain, reduced = body.domain, body.reduce_axes
    flops = 0.0
    for i in body.instrs:
        op, axes = i.op, i.axes
        if op == "reduce":
            axes = tuple(sorted({*axes, *reduced}))
        n = points.get(axes)
        if n is None:
            n = points[axes] = prod([domain[a] for a in axes])
        if op == "load" or op == "store":
            key = (i.attrs["access"].buffer, op == "store")
            touched[key] = max(n, touched.get(key, 0))
        elif op not in _FREE:
            flops += WEIGHTS.get(op, 1.0) * n
    moved = sum(min(n, buffers[b].size) * buffers[b].dtype.itemsize for (b, _), n in touched.items())
    return moved, int(flops)


def _contract_cost(c: Contract, buffers: Sequence[Buffer]) -> tuple[int, int]:
    domain = (*c.batch, *c.m, *c.n, *c.k)
    moved, flops = body_cost(c.epilogue, buffers)
    for a in (c.a, c.b):
        elements = prod(n for n, s in zip(domain, a.strides, strict=True) if s)
        moved += elements * buffers[a.buffer].dtype.itemsize
        flops += elements if (a is c.a and c.a_sum) or (a is c.b and c.b_sum) else 0
    return moved, flops + 2 * prod(domain)


def finish(kernel: Kernel, buffers: Sequence[Buffer]) -> Kernel:
    """``kernel`` with reads, writes, bytes and flops filled in."""
    reads: dict[int, None] = {}
    writes: dict[int, None] = {}
    moved = flops = 0

    def add_body(body: LoopBody) -> None:
        for store, access, _ in body_accesses(body):
            (writes if store else reads)[access.buffer] = None

    if isinstance(kernel, LoopKernel):
        for body in kernel.bodies:
            add_body(body)
            m, f = body_cost(body, buffers)
            moved, flops = moved + m, flops + f
    elif isinstance(kernel, ContractKernel):
        for p in kernel.problems:
            reads[p.a.buffer] = reads[p.b.buffer] = None
            add_body(p.epilogue)
            writes.update((s.buffer, None) for s in (p.a_sum, p.b_sum) if s is not None)
            m, f = _contract_cost(p, buffers)
            moved, flops = moved + m, flops + f
    elif isinstance(kernel, AttentionKernel):
        for a in (kernel.q, kernel.k, kernel.v, kernel.mask, kernel.dout):
            if a is not None:
                reads[a.buffer] = None
        for a in (kernel.out, kernel.lse):
            if a is not None:
                (reads if kernel.grad else writes)[a.buffer] = None
        for a in (kernel.dq, kernel.dk, kernel.dv):
            if a is not None:
                writes[a.buffer] = None
        rows = prod(kernel.batch)
        pairs = rows * kernel.tq * kernel.tk // (2 if kernel.causal else 1)
        flops = pairs * (kernel.d + kernel.dv_dim) * (5 if kernel.grad else 2)
        sides = rows * (kernel.tq * (kernel.d + kernel.dv_dim) + kernel.tk * (kernel.d + kernel.dv_dim))
        moved = sides * kernel.dtype.itemsize * (2 if kernel.grad else 1)
    elif isinstance(kernel, OpKernel):
        for b, _ in kernel.operands:
            reads[b] = None
        for b, _ in kernel.results:
            if b >= 0:
                writes[b] = None
        moved = sum(buffers[b].nbytes for b in (*reads, *writes))
        flops = _op_flops(kernel)
        if kernel.epilogue is not None:
            add_body(kernel.epilogue)
            m, f = body_cost(kernel.epilogue, buffers)
            moved, flops = moved + m, flops + f
    return replace(kernel, reads=tuple(reads), writes=tuple(writes), bytes=moved, flops=flops)


def joined(kernel: Kernel, parts: Sequence[Kernel]) -> Kernel:
    """``kernel``, made of the work of ``parts``, with their costs added up."""
    reads = dict.fromkeys(b for p in parts for b in p.reads)
    writes = dict.fromkeys(b for p in parts for b in p.writes)
    moved, flops = sum(p.bytes for p in parts), sum(p.flops for p in parts)
    return replace(kernel, reads=tuple(reads), writes=tuple(writes), bytes=moved, flops=flops)


def _op_flops(k: OpKernel) -> int:
    sizes = [prod(s) for _, s in k.operands]
    out = sum(prod(s) for _, s in k.results)
    if k.op.startswith("conv2d"):
        shapes = [s for _, s in (*k.operands, *k.results)]
        if k.op == "conv2d":
            _, w, y = shapes
        elif k.op == "conv2d_input_grad":
            y, w, _ = shapes
        else:
            _, y, w = shapes
        return 2 * prod(y) * w[1] * w[2] * w[3]
    if "pool" in k.op:
        return max([*sizes, out]) * prod(k.attrs.get("kernel", (1,)))
    return max([*sizes, out], default=0)


def kernel_name(c: Cluster) -> str:
    """A readable name for the kernel of a cluster: its anchor, then its most telling ops."""
    main: list[str] = []
    if c.contract is not None:
        main.append("matmul" if c.contract.kind == DOT else c.contract.op)
    ordered: list[Value] = sorted(c.members, key=lambda v: v.index)
    seen: dict[str, float] = {}
    for v in ordered:
        if v.op not in _QUIET:
            seen[v.op] = max(seen.get(v.op, 0), WEIGHTS.get(v.op, 1.0) + (50 if v.kind == REDUCE else 0))
    best = sorted(seen, key=lambda op: -seen[op])[:3]
    main += [op for op in seen if op in best]
    return "_".join(main) or "copy"
