"""A NumPy interpreter of Programs: the oracle for both code generators and for the passes of this package.

``run(program, inputs)`` executes the kernels in order, one instruction at a time on whole domains (no blocking, no
threads). Temporaries really live at their arena offsets, so a wrong memory plan gives wrong numbers. Called by tests.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tracejit.ops import registry
from tracejit.ops.creation import threefry2x32
from tracejit.program import (
    Access,
    AttentionKernel,
    Contract,
    ContractKernel,
    LoopBody,
    LoopKernel,
    OpKernel,
    Program,
)

_POISON = 0xA5  # untouched arena bytes: neither zero nor anything plausible


def run(program: Program, inputs: Sequence[Any]) -> list[np.ndarray]:
    """Outputs of ``program`` for ``inputs`` (arrays in the order of the graph's inputs)."""
    memory = Memory(program, inputs)
    with np.errstate(all="ignore"):
        for kernel in program.kernels:
            execute(kernel, memory)
    out = []
    for node, buffer in zip(program.graph.outputs, program.outputs, strict=True):
        out.append(memory.data[buffer].reshape(node.shape).copy())
    return out


class Memory:
    """The flat arrays behind the buffers of a program."""

    def __init__(self, program: Program, inputs: Sequence[Any]) -> None:
        arena = np.full(program.arena, _POISON, np.uint8)
        self.data: dict[int, np.ndarray] = {}
        for b in program.buffers:
            if b.kind == "input":
                flat = np.ascontiguousarray(np.asarray(inputs[b.index], dtype=b.dtype)).reshape(-1)
                if flat.size != b.size:
                    raise ValueError(f"input {b.index} has {flat.size} elements, the program wants {b.size}")
                flat = flat.view()
                flat.flags.writeable = False
            elif b.kind == "const":
                flat = (
                    np.ascontiguousarray(program.constants[b.index]).reshape(-1).astype(b.dtype, copy=False)
                )
            elif b.kind == "temp" and b.offset is not None:
                flat = arena[b.offset : b.offset + b.nbytes].view(b.dtype)
            else:
                flat = np.full(b.size * b.dtype.itemsize, _POISON, np.uint8).view(b.dtype)
            self.data[b.id] = flat


def execute(kernel: Any, memory: Memory) -> None:
    """Run one kernel on ``memory``."""
    if isinstance(kernel, LoopKernel):
        for body in kernel.bodies:
            run_body(body, memory)
    elif isinstance(kernel, ContractKernel):
        for problem in kernel.problems:
            run_contract(problem, memory)
    elif isinstance(kernel, AttentionKernel):
        run_attention(kernel, memory)
    else:
        run_op(kernel, memory)


def _address(access_strides: Sequence[int], offset: int, domain: Sequence[int]) -> np.ndarray:
    """Addresses over ``domain``; axes with stride 0 keep size 1."""
    rank = len(domain)
    address = np.full((1,) * rank, offset, np.int64)
    for d, (size, stride) in enumerate(zip(domain, access_strides, strict=True)):
        if stride:
            shape = [1] * rank
            shape[d] = size
            address = address + (np.arange(size, dtype=np.int64) * stride).reshape(shape)
        elif size == 0:
            address = np.broadcast_to(address, (*address.shape[:d], 0, *address.shape[d + 1 :]))
    return address


def run_body(body: LoopBody, memory: Memory, acc: np.ndarray | None = None) -> None:
    """Run a loop body; ``acc`` is the value of its ``acc`` instruction (over the domain)."""
    rank, domain, red = len(body.domain), body.domain, body.reduce_axes
    if 0 in domain and not red:
        return
    values: list[Any] = []
    pending: list[tuple[np.ndarray, np.ndarray, Any, np.ndarray]] = []
    for i in body.instrs:
        args = [values[a] for a in i.args]
        result: Any = None
        if i.op == "const":
            result = np.full((1,) * rank, i.attrs["value"], i.dtype)
        elif i.op == "index":
            steps = [1] * rank
            steps[i.attrs["axis"]] = domain[i.attrs["axis"]]
            result = np.arange(domain[i.attrs["axis"]], dtype=np.int64).reshape(steps)
        elif i.op == "load":
            result = _load(i, memory, values, domain)
        elif i.op == "store":
            access: Access = i.attrs["access"]
            pending.append(
                (
                    memory.data[access.buffer],
                    _address(access.strides, access.offset, domain),
                    args[1:],
                    args[0],
                )
            )
        elif i.op == "reduce":
            result = _reduce(i.attrs["kind"], args[0], domain, red)
        elif i.op == "random_bits":
            counter = _address(i.attrs["strides"], 0, domain).astype(np.uint32)
            k0, k1 = (a.reshape(-1)[0] for a in args)
            result = threefry2x32(k0, k1, counter, np.zeros_like(counter))[0]
        elif i.op == "acc":
            assert acc is not None, "acc outside of an epilogue"
            result = acc.astype(i.dtype, copy=False)
        else:
            result = np.asarray(registry.get(i.op).reference(*args, **i.attrs))
        if result is not None:
            if result.dtype != i.dtype:
                raise TypeError(f"instruction {i.op} gave {result.dtype}, declared {i.dtype}")
            varies = {d for d in range(rank) if result.shape[d] != 1}
            if not varies <= set(i.axes):
                raise ValueError(f"instruction {i.op} varies along {sorted(varies)}, declared {i.axes}")
        values.append(result)
    # Loads come before stores of the same point in every backend; here all stores come last.
    for data, address, predicate, value in pending:
        shape = np.broadcast_shapes(address.shape, value.shape, *(p.shape for p in predicate))
        if np.unique(address).size != int(np.prod(shape, dtype=np.int64)) and 0 not in shape:
            raise ValueError("a store writes one element several times")
        if value.dtype != data.dtype:
            raise TypeError(f"store of {value.dtype} into a {data.dtype} buffer")
        address, value = np.broadcast_to(address, shape), np.broadcast_to(value, shape)
        if predicate:
            keep = np.broadcast_to(predicate[0], shape)
            address, value = address[keep], value[keep]
        data[address.reshape(-1)] = value.reshape(-1)


def _load(i: Any, memory: Memory, values: list[Any], domain: tuple[int, ...]) -> np.ndarray:
    access: Access = i.attrs["access"]
    data = memory.data[access.buffer]
    if data.dtype != i.dtype:
        raise TypeError(f"load of {i.dtype} from a {data.dtype} buffer")
    address = _address(access.strides, access.offset, domain)
    for arg, stride, size in i.attrs.get("gather", ()):
        address = address + np.clip(values[arg], 0, size - 1) * stride
    predicate = i.attrs.get("predicate")
    if predicate is None:
        return data[address]
    keep = values[predicate]
    fill = np.asarray(i.attrs.get("fill", 0)).astype(i.dtype)
    address, keep = np.broadcast_arrays(address, keep)
    if data.size == 0:
        return np.broadcast_to(fill, keep.shape)
    return np.where(keep, data[np.where(keep, address, 0)], fill)


def _reduce(kind: str, value: np.ndarray, domain: tuple[int, ...], red: tuple[int, ...]) -> np.ndarray:
    rank = len(domain)
    shape = tuple(domain[d] if d in red else value.shape[d] for d in range(rank))
    value = np.broadcast_to(value, shape)
    kept = tuple(1 if d in red else shape[d] for d in range(rank))
    if kind in ("argmax", "argmin"):
        moved = np.moveaxis(value, red, tuple(range(rank - len(red), rank)))
        flat = moved.reshape(*moved.shape[: rank - len(red)], -1)
        return (
            np.asarray(registry.get(kind).reference(flat, axis=flat.ndim - 1)).astype(np.int64).reshape(kept)
        )
    return np.asarray(registry.get(kind).reference(value, axes=red)).reshape(kept)


def _gather_operand(access: Access, memory: Memory, domain: tuple[int, ...]) -> np.ndarray:
    return memory.data[access.buffer][_address(access.strides, access.offset, domain)]


def run_contract(c: Contract, memory: Memory) -> None:
    """One batched product and its epilogue."""
    nb, nm, nn, nk = (len(x) for x in (c.batch, c.m, c.n, c.k))
    domain = (*c.batch, *c.m, *c.n, *c.k)
    a, b = _gather_operand(c.a, memory, domain), _gather_operand(c.b, memory, domain)
    sizes = [int(np.prod(x, dtype=np.int64)) for x in (c.batch, c.m, c.n, c.k)]
    if any(s != 1 for s in a.shape[nb + nm : nb + nm + nn]) or any(s != 1 for s in b.shape[nb : nb + nm]):
        raise ValueError("an operand of a contraction varies along the other operand's free axis")
    a = np.broadcast_to(a, (*c.batch, *c.m, *(1,) * nn, *c.k)).reshape(sizes[0], sizes[1], sizes[3])
    b = np.broadcast_to(b, (*c.batch, *(1,) * nm, *c.n, *c.k)).reshape(sizes[0], sizes[2], sizes[3])
    acc = np.matmul(a.astype(c.acc_dtype), b.astype(c.acc_dtype).swapaxes(1, 2))
    assert len(c.epilogue.domain) == nb + nm + nn == len(domain) - nk
    run_body(c.epilogue, memory, acc.reshape(*c.batch, *c.m, *c.n))
    for access, value, shape in ((c.a_sum, a, (*c.m, *(1,) * nn)), (c.b_sum, b, (*(1,) * nm, *c.n))):
        if access is not None:
            total = value.sum(axis=2, dtype=c.acc_dtype).reshape(*c.batch, *shape)
            memory.data[access.buffer][_address(access.strides, access.offset, (*c.batch, *shape))] = total


def run_attention(k: AttentionKernel, memory: Memory) -> None:
    """Flash attention by its definition."""

    def view(access: Access | None, *tail: int) -> np.ndarray:
        assert access is not None
        shape = (*k.batch, *tail)
        return np.broadcast_to(_gather_operand(access, memory, shape), shape)

    def put(access: Access | None, value: np.ndarray, *tail: int) -> None:
        assert access is not None
        data = memory.data[access.buffer]
        address = np.broadcast_to(
            _address(access.strides, access.offset, (*k.batch, *tail)), (*k.batch, *tail)
        )
        data[address.reshape(-1)] = value.astype(data.dtype).reshape(-1)

    q, key, v = view(k.q, k.tq, k.d), view(k.k, k.tk, k.d), view(k.v, k.tk, k.dv_dim)
    work = np.dtype(np.float32) if k.dtype == np.float16 else k.dtype
    scores = np.matmul(q.astype(work), key.astype(work).swapaxes(-1, -2)) * work.type(k.scale)
    if k.mask is not None:
        mask = view(k.mask, k.tq, k.tk)
        scores = np.where(mask, scores, -np.inf).astype(work) if mask.dtype == np.bool_ else scores + mask
    if k.causal:
        scores = np.where(np.arange(k.tk) <= np.arange(k.tq)[:, None], scores, -np.inf).astype(work)
    top = scores.max(axis=-1, keepdims=True)
    total = np.exp(scores - top).sum(axis=-1, keepdims=True)
    p = np.exp(scores - top) / total
    if not k.grad:
        put(k.out, np.matmul(p, v.astype(work)), k.tq, k.dv_dim)
        if k.lse is not None:
            put(k.lse, (np.log(total) + top)[..., 0], k.tq)
        return
    p = np.exp(scores - view(k.lse, k.tq)[..., None])
    out, dout = view(k.out, k.tq, k.dv_dim).astype(work), view(k.dout, k.tq, k.dv_dim).astype(work)
    delta = (out * dout).sum(axis=-1, keepdims=True)
    dp = np.matmul(dout, v.astype(work).swapaxes(-1, -2))
    ds = p * (dp - delta) * work.type(k.scale)
    put(k.dv, np.matmul(p.swapaxes(-1, -2), dout), k.tk, k.dv_dim)
    put(k.dq, np.matmul(ds, key.astype(work)), k.tq, k.d)
    put(k.dk, np.matmul(ds.swapaxes(-1, -2), q.astype(work)), k.tk, k.d)


def run_op(k: OpKernel, memory: Memory) -> None:
    """One op by its NumPy reference."""
    arrays = [memory.data[b].reshape(-1)[: int(np.prod(s, dtype=np.int64))].reshape(s) for b, s in k.operands]
    attrs = {key: value for key, value in k.attrs.items() if not isinstance(value, Program)}
    results = registry.get(k.op).reference(*arrays, **attrs)
    if k.epilogue is not None:
        run_body(k.epilogue, memory, np.asarray(results).reshape(k.epilogue.domain))
        return
    if not k.results:  # print
        return
    if not isinstance(results, tuple):
        results = (results,)
    for (buffer, shape), value in zip(k.results, results, strict=True):
        memory.data[buffer][:] = np.broadcast_to(np.asarray(value), shape).reshape(-1)
