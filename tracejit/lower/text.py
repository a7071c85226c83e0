"""A readable text form of a Program, for ``inspect()`` and snapshot tests. One-way: programs are not parsed back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

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
    Program,
)

_SHORT = {
    "bool": "bool", "float16": "f16", "float32": "f32", "float64": "f64", "int8": "i8", "int16": "i16", "int32": "i32",
    "int64": "i64", "uint8": "u8", "uint16": "u16", "uint32": "u32", "uint64": "u64",
}  # fmt: skip


def dtype_name(dtype: Any) -> str:
    """``f32`` for float32 and so on."""
    return _SHORT.get(np.dtype(dtype).name, str(dtype))


def program_text(program: Program, *, bodies: bool = True, costs: bool = True) -> str:
    """The whole program: buffers, kernels (with their instructions unless ``bodies`` is False), fusion report."""
    out = [
        f"program {program.name}: {len(program.kernels)} kernels, "
        f"arena {program.arena} bytes (live bound {program.live_bound})"
    ]
    for b in program.buffers:
        where = f" at {b.offset}" if b.offset is not None else ""
        index = f" {b.index}" if b.index >= 0 else ""
        shape = f" shape {list(b.shape)}" if b.shape else ""
        out.append(f"  b{b.id}: {dtype_name(b.dtype)}[{b.size}] {b.kind}{index}{where}{shape}")
    out.append(f"  inputs {list(program.inputs)} outputs {list(program.outputs)}")
    for i, k in enumerate(program.kernels):
        out += ["", *kernel_lines(i, k, bodies=bodies, costs=costs)]
    if program.report:
        out += ["", "report:"]
        out += [f"  {d.action} {['%' + str(n) for n in d.nodes]}: {d.reason}" for d in program.report]
    return "\n".join(out)


def kernel_lines(position: int, k: Kernel, *, bodies: bool = True, costs: bool = True) -> list[str]:
    """One kernel as lines of text."""
    kind = {LoopKernel: "loop", ContractKernel: "contract", AttentionKernel: "attention", OpKernel: "op"}[
        type(k)
    ]
    head = f"k{position} {kind} {k.name} reads {list(k.reads)} writes {list(k.writes)} after {list(k.after)}"
    if costs:
        head += f" [{k.bytes} B, {k.flops} flop]"
    out = [head]
    if isinstance(k, LoopKernel):
        for body in k.bodies:
            out += body_lines(body, bodies)
    elif isinstance(k, ContractKernel):
        for p in k.problems:
            out += contract_lines(p, bodies)
    elif isinstance(k, AttentionKernel):
        out.append(
            f"  batch {list(k.batch)} tq {k.tq} tk {k.tk} d {k.d} dv {k.dv_dim} "
            f"scale {k.scale:g} causal {k.causal} grad {k.grad}"
        )
        for name in ("q", "k", "v", "mask", "out", "lse", "dout", "dq", "dk", "dv"):
            access = getattr(k, name)
            if access is not None:
                out.append(f"  {name}: {access_text(access)}")
    else:
        attrs = {a: v for a, v in k.attrs.items() if isinstance(v, int | float | str | tuple)}
        out.append(f"  {k.op} {attrs} operands {list(k.operands)} results {list(k.results)}")
        if k.epilogue is not None:
            out += body_lines(k.epilogue, bodies)
    return out


def access_text(a: Access) -> str:
    """``b3[(64,1) + 5]``."""
    offset = f" + {a.offset}" if a.offset else ""
    return f"b{a.buffer}[({','.join(map(str, a.strides))}){offset}]"


def contract_lines(c: Contract, bodies: bool) -> list[str]:
    """Sizes, operands and epilogue of a contraction."""
    out = [f"  batch {list(c.batch)} m {list(c.m)} n {list(c.n)} k {list(c.k)} acc {dtype_name(c.acc_dtype)}"]
    out.append(f"  a {access_text(c.a)}  b {access_text(c.b)}")
    out += [f"  sum of {n} over k to {access_text(s)}" for n, s in (("a", c.a_sum), ("b", c.b_sum)) if s]
    return out + body_lines(c.epilogue, bodies)


def body_lines(body: LoopBody, instructions: bool) -> list[str]:
    """A loop body, one instruction per line."""
    reduced = f" reduce {list(body.reduce_axes)}" if body.reduce_axes else ""
    out = [f"  for {list(body.domain)}{reduced}: {len(body.instrs)} instructions"]
    if not instructions:
        return out
    for n, i in enumerate(body.instrs):
        out.append(f"    {n}: {instr_text(i)}")
    return out


def instr_text(i: Any) -> str:
    """One instruction."""
    args = " ".join(f"#{a}" for a in i.args)
    extra: Sequence[str] = ()
    if i.op in ("load", "store"):
        extra = [access_text(i.attrs["access"])]
        if "gather" in i.attrs:
            extra.append("gather " + ", ".join(f"#{a}*{s} (<{n})" for a, s, n in i.attrs["gather"]))
        if "predicate" in i.attrs:
            extra.append(f"if #{i.attrs['predicate']} else {i.attrs['fill']}")
    elif i.attrs:
        extra = [f"{k}={dtype_name(v) if isinstance(v, np.dtype) else v}" for k, v in i.attrs.items()]
    return " ".join(x for x in (f"{i.op}.{dtype_name(i.dtype)}", args, *extra, f"over {list(i.axes)}") if x)


def buffer_text(b: Buffer) -> str:
    """One buffer."""
    return f"b{b.id}: {dtype_name(b.dtype)}[{b.size}] {b.kind}"
