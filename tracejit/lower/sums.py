"""Bias gradients beside weight gradients: a sum over the rows of a product's operand moves into the product's kernel.

``dW = A^T dY`` walks over all of ``dY`` anyway; ``db``, the sum of its rows, then costs an addition per element loaded
instead of another sweep through memory. What followed the sum (an optimiser's update, say) stays a loop, over the few
results only. Called by ``lower`` on finished kernels, for backends whose capabilities state ``contract_sums``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod
from typing import Any

import numpy as np

from tracejit.lower import costs
from tracejit.program import (
    Access,
    Buffer,
    Capabilities,
    Contract,
    ContractKernel,
    Decision,
    Instr,
    Kernel,
    LoopBody,
    LoopKernel,
)

_MIN_ELEMENTS = 1 << 14  # below, a sweep costs nothing


def fuse_sums(
    kernels: Sequence[Kernel], ranks: Sequence[int], buffers: list[Buffer], caps: Capabilities
) -> tuple[list[Kernel], list[int], list[Decision]]:
    """Kernels and ranks with sums moved into products; new temporaries are added to ``buffers``."""
    out, decisions = list(kernels), []
    if caps.contract_sums:
        for i, kernel in enumerate(out):
            if not isinstance(kernel, LoopKernel) or len(kernel.bodies) != 1:
                continue
            at = summed_load(kernel.bodies[0])
            if at is None:
                continue
            load = kernel.bodies[0].instrs[at].attrs["access"]
            found = find_product(out, kernel, load, buffers, caps)
            if found is not None:
                j, side = found
                target = len(buffers)
                out[i], out[j] = moved(kernel, at, out[j], side, target, buffers)
                decisions.append(
                    Decision(
                        "sum in product",
                        out[j].nodes,
                        f"rows of operand {side} are added up beside the product",
                    )
                )
    return out, list(ranks), decisions


def summed_load(body: LoopBody) -> int | None:
    """Position of the load whose sum is the only thing that a body does over its reduce axes."""
    reduces = [i for i in body.instrs if i.op == "reduce"]
    if len(reduces) != 1 or reduces[0].attrs["kind"] != "sum" or reduces[0].dtype != np.float32:
        return None
    (at,) = reduces[0].args
    load = body.instrs[at]
    if load.op != "load" or set(load.attrs) != {"access"} or load.dtype != np.float32:
        return None
    red = set(body.reduce_axes)
    for p, instr in enumerate(body.instrs):
        if instr.op == "random_bits" or (p != at and at in instr.args and instr is not reduces[0]):
            return None
        if p != at and red & set(instr.axes):
            return None
        if instr.op == "store" and any(instr.attrs["access"].strides[a] for a in red):
            return None
    return at if prod(body.domain) >= _MIN_ELEMENTS else None


def walk(sizes: Sequence[int], strides: Sequence[int]) -> list[tuple[int, int]]:
    """(size, stride) of axes that matter, outer to inner."""
    return [(n, s) for n, s in zip(sizes, strides, strict=True) if n != 1]


def find_product(
    kernels: Sequence[Kernel], loop: LoopKernel, load: Access, buffers: Sequence[Buffer], caps: Capabilities
) -> tuple[int, str] | None:
    """(position, operand) of a product that reads the same elements with the summed axes as its k."""
    body = loop.bodies[0]
    red = body.reduce_axes
    free = [a for a in range(len(body.domain)) if a not in red]
    wanted = (
        walk([body.domain[a] for a in free], [load.strides[a] for a in free]),
        walk([body.domain[a] for a in red], [load.strides[a] for a in red]),
    )
    if any(s == 0 for side in wanted for _, s in side):
        return None  # a broadcast scalar: its sum is no sweep through memory
    for j, k in enumerate(kernels):
        if not isinstance(k, ContractKernel) or load.buffer not in k.reads or len(k.problems) != 1:
            continue
        c = k.problems[0]
        if c.batch or c.acc_dtype != np.float32:
            continue
        if caps.max_buffers is not None and len({*k.reads, *k.writes}) + 1 > caps.max_buffers:
            continue
        for side, access, taken in (("b", c.b, c.b_sum), ("a", c.a, c.a_sum)):
            m, n = len(c.m), len(c.n)
            outer = (c.n, access.strides[m : m + n]) if side == "b" else (c.m, access.strides[:m])
            same = access.buffer == load.buffer and access.offset == load.offset and taken is None
            if same and wanted == (walk(*outer), walk(c.k, access.strides[m + n :])):
                if not depends(kernels, k, loop):
                    return j, side
    return None


def depends(kernels: Sequence[Kernel], later: Kernel, earlier: Kernel) -> bool:
    """True if ``later`` needs, directly or not, what ``earlier`` writes."""
    writers: dict[int, list[Kernel]] = {}
    for k in kernels:
        for b in k.writes:
            writers.setdefault(b, []).append(k)
    stack, seen = [later], {id(later)}
    while stack:
        for b in stack.pop().reads:
            for w in writers.get(b, ()):
                if w is earlier:
                    return True
                if id(w) not in seen:
                    seen.add(id(w))
                    stack.append(w)
    return False


def moved(
    loop: LoopKernel, at: int, product: Kernel, side: str, target: int, buffers: list[Buffer]
) -> tuple[Kernel, Kernel]:
    """The loop without its sum and the product with it; the sum goes through the new buffer ``target``."""
    assert isinstance(product, ContractKernel)
    body, c = loop.bodies[0], product.problems[0]
    sizes = c.n if side == "b" else c.m
    inner = row_major(sizes)
    strides = (*(0,) * len(c.m), *inner) if side == "b" else (*inner, *(0,) * len(c.n))
    buffers.append(Buffer(target, prod(sizes), np.dtype(np.float32), "temp", shape=tuple(sizes)))
    access = Access(target, strides)
    node = next(i.node for i in body.instrs if i.op == "reduce")
    made: Contract = replace(c, b_sum=access) if side == "b" else replace(c, a_sum=access)
    nodes = tuple(sorted({*product.nodes, node} - {-1}))
    fused = costs.finish(replace(product, problems=(made,), nodes=nodes), buffers)
    rest = costs.finish(
        replace(
            loop, bodies=(without_sum(body, at, target),), nodes=tuple(n for n in loop.nodes if n != node)
        ),
        buffers,
    )
    return rest, fused


def row_major(sizes: Sequence[int]) -> tuple[int, ...]:
    """Strides of a contiguous array."""
    return tuple(prod(sizes[i + 1 :]) for i in range(len(sizes)))


def without_sum(body: LoopBody, at: int, target: int) -> LoopBody:
    """The body over its parallel axes, with the finished sum loaded from ``target``."""
    free = [a for a in range(len(body.domain)) if a not in body.reduce_axes]
    domain = tuple(body.domain[a] for a in free)
    new_axis = {a: i for i, a in enumerate(free)}
    out: list[Instr] = []
    where: dict[int, int] = {}
    for p, i in enumerate(body.instrs):
        if p == at:
            continue
        attrs: dict[str, Any] = dict(i.attrs)
        op, args = i.op, tuple(where[a] for a in i.args if a != at)
        if op == "reduce":
            op, args, attrs = "load", (), {"access": Access(target, row_major(domain))}
        elif "access" in attrs:
            old: Access = attrs["access"]
            attrs["access"] = Access(old.buffer, tuple(old.strides[a] for a in free), old.offset)
        if "gather" in attrs:
            attrs["gather"] = tuple((where[a], s, n) for a, s, n in attrs["gather"])
        if "predicate" in attrs:
            attrs["predicate"] = where[attrs["predicate"]]
        if op == "index":
            attrs["axis"] = new_axis[attrs["axis"]]
        axes = tuple(range(len(domain))) if i.op == "reduce" else tuple(sorted(new_axis[a] for a in i.axes))
        where[p] = len(out)
        out.append(Instr(op, args, i.dtype, axes, attrs, i.node))
    return LoopBody(domain, tuple(out))
