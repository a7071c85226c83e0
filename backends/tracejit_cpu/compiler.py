"""Program -> object code and a plan for running it. Called by ``executable.py``.

Every kernel is lowered to functions over ranges of tasks; equal kernels share a function. ``plan.py`` schedules them
into one native program. Ops without a native lowering become host steps that run the op's NumPy reference between two
native parts, so that every program runs.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tracejit.program import (
    Access,
    AttentionKernel,
    Contract,
    ContractKernel,
    Instr,
    Kernel,
    LoopBody,
    LoopKernel,
    OpKernel,
    Program,
)
from tracejit_cpu import attention, codecache, gemm, ops
from tracejit_cpu.body import Local, localize
from tracejit_cpu.host import host
from tracejit_cpu.irbuilder import Module
from tracejit_cpu.loops import Compiled, Stage, compile_body
from tracejit_cpu.plan import Layout, Planner, describe_units, overlaps

SERIAL_NS = 60_000.0  # below this much estimated work a program runs on one thread


@dataclass
class Segment:
    """Consecutive native kernels: ``kernels`` are their positions in the program."""

    kernels: list[int]
    layout: Layout
    parallel: bool
    code: bytes
    cost: float
    support: dict[str, list[Any]] = field(default_factory=dict)


@dataclass
class HostStep:
    """One kernel that Python runs."""

    kernel: int


@dataclass
class CompiledProgram:
    """What ``executable.py`` needs to run a program."""

    steps: list[Segment | HostStep] = field(default_factory=list)


class KernelCompiler:
    """Compiles kernels into one module, sharing the code of equal ones."""

    def __init__(self, program: Program, module: Module) -> None:
        self.program, self.module = program, module
        self.shared: dict[str, Compiled] = {}
        self.orders: dict[str, list[int]] = {}
        self.parts: dict[str, list[tuple[Compiled, list[int]]]] = {}

    def dtype(self, buffer: int) -> np.dtype[Any]:
        """Element type of a buffer."""
        return self.program.buffers[buffer].dtype

    def once(self, key: str, make: Callable[[str], Compiled]) -> Compiled:
        """Compile unless an equal kernel was compiled before."""
        if key not in self.shared:
            self.shared[key] = make(f"k{len(self.shared)}")
        return self.shared[key]

    def kernel(self, kernel: Kernel) -> list[tuple[Compiled, list[int]]]:
        """The compiled bodies of a kernel, each with its buffers."""
        out: list[tuple[Compiled, list[int]]] = []
        if isinstance(kernel, LoopKernel):
            for body in kernel.bodies:
                if math.prod(body.domain) == 0 and not any(i.op == "reduce" for i in body.instrs):
                    continue
                local = localize(body, self.dtype)
                out.append(self._loop(local, self._aliased(local)))
            return out
        if isinstance(kernel, ContractKernel):
            for c in kernel.problems:
                if gemm.prefers_loop(c):
                    out.append(self._loop(localize(gemm.as_loop(c, self.dtype), self.dtype)))
                else:
                    out.append(self._contract(c))
            return out
        if isinstance(kernel, AttentionKernel):
            return [self._attention(kernel)]
        if isinstance(kernel, OpKernel):
            return self._op(kernel)
        raise TypeError(f"no native lowering for {type(kernel).__name__}")

    def _loop(self, local: Local, defer: bool = False) -> tuple[Compiled, list[int]]:
        """One loop nest; equal ones share code."""
        key = f"loop{defer}{local.key()}"
        return self.once(key, lambda name: compile_body(self.module, local, name, defer)), local.buffers

    def _attention(self, kernel: AttentionKernel) -> tuple[Compiled, list[int]]:
        """An attention kernel; equal heads of other layers share code."""
        import dataclasses

        numbers: dict[int, int] = {}
        changes: dict[str, Any] = {"reads": (), "writes": (), "after": ()}
        for field_ in dataclasses.fields(kernel):
            access = getattr(kernel, field_.name)
            if isinstance(access, Access):
                local = numbers.setdefault(access.buffer, len(numbers))
                changes[field_.name] = Access(local, access.strides, access.offset)
        named = dataclasses.replace(kernel, **changes)
        original = {v: k for k, v in numbers.items()}
        key = f"attention{_stable(named)}{[self.dtype(original[i]).name for i in range(len(original))]}"

        def make(name: str) -> Compiled:
            compiled, local = attention.compile_attention(
                self.module, named, lambda n: self.dtype(original[n]), name
            )
            self.orders[key] = local
            return compiled

        compiled = self.once(key, make)
        return compiled, [original[n] for n in self.orders[key]]

    def _op(self, kernel: OpKernel) -> list[tuple[Compiled, list[int]]]:
        """An op kernel; equal ones on other buffers share code."""
        import dataclasses

        numbers: dict[int, int] = {}

        def rename(buffer: int) -> int:
            return numbers.setdefault(buffer, len(numbers))

        operands = tuple((rename(b), s) for b, s in kernel.operands)
        results = tuple((rename(b), s) for b, s in kernel.results)
        epilogue = kernel.epilogue
        if epilogue is not None:
            instrs = []
            for i in epilogue.instrs:
                attrs = dict(i.attrs)
                if "access" in attrs:
                    a = attrs["access"]
                    attrs["access"] = Access(rename(a.buffer), a.strides, a.offset)
                instrs.append(Instr(i.op, i.args, i.dtype, i.axes, attrs))
            epilogue = LoopBody(epilogue.domain, tuple(instrs))
        original = {v: k for k, v in numbers.items()}
        named = dataclasses.replace(
            kernel, operands=operands, results=results, epilogue=epilogue, reads=(), writes=(), after=()
        )
        in_place = bool(kernel.operands) and overlaps(
            self.program, kernel.operands[0][0], kernel.results[0][0]
        )
        dtypes = [self.dtype(original[i]).name for i in range(len(original))]
        key = f"op{in_place}{_stable(named)}{dtypes}"
        if key not in self.parts:
            name = f"k{len(self.shared) + len(self.parts)}o"
            self.parts[key] = ops.compile_op(
                self.module, named, lambda n: self.dtype(original[n]), name, in_place
            )
        return [(compiled, [original[n] for n in local]) for compiled, local in self.parts[key]]

    def _contract(self, c: Contract) -> tuple[Compiled, list[int]]:
        """A product; equal ones on other buffers share code."""
        numbers: dict[int, int] = {}

        def rename(access: Access) -> Access:
            return Access(numbers.setdefault(access.buffer, len(numbers)), access.strides, access.offset)

        instrs = []
        for i in c.epilogue.instrs:
            attrs = dict(i.attrs)
            if "access" in attrs:
                attrs["access"] = rename(attrs["access"])
            instrs.append(Instr(i.op, i.args, i.dtype, i.axes, attrs))
        a, b = rename(c.a), rename(c.b)
        named = Contract(
            c.batch, c.m, c.n, c.k, a, b, LoopBody(c.epilogue.domain, tuple(instrs)), c.acc_dtype
        )
        original = {v: k for k, v in numbers.items()}
        dtypes = [self.dtype(original[i]).name for i in range(len(original))]
        key = f"gemm{_stable(named)}{dtypes}"

        def make(name: str) -> Compiled:
            compiled, local = gemm.compile_contract(
                self.module, named, lambda n: self.dtype(original[n]), name
            )
            self.orders[key] = local
            return compiled

        compiled = self.once(key, make)
        return compiled, [original[n] for n in self.orders[key]]

    def _aliased(self, local: Any) -> bool:
        """Whether a store may overwrite memory that a later sweep still reads."""
        loads = {local.buffers[i.buffer] for i in local.instrs if i.op == "load"}
        stores = {local.buffers[i.buffer] for i in local.instrs if i.op == "store"}
        return any(overlaps(self.program, a, b) for a in loads for b in stores)


def is_native(program: Program, kernel: Kernel) -> bool:
    """Whether this backend has a native lowering of the kernel."""
    if isinstance(kernel, OpKernel):
        return ops.supports(kernel, lambda b: program.buffers[b].dtype)
    return isinstance(kernel, LoopKernel | ContractKernel | AttentionKernel)


def build(
    program: Program,
) -> tuple[list[tuple[list[int], Module, Layout, Planner]], list[Segment | HostStep | int]]:
    """Emit IR for every native part. Returns the parts and the order of steps (an int is a part's number)."""
    parts: list[tuple[list[int], Module, Layout, Planner]] = []
    steps: list[Any] = []
    run: list[int] = []

    def flush() -> None:
        if not run:
            return
        steps.append(len(parts))
        parts.append(_part(program, list(run)))
        run.clear()

    for index, kernel in enumerate(program.kernels):
        if is_native(program, kernel):
            run.append(index)
        else:
            flush()
            steps.append(HostStep(index))
    flush()
    return parts, steps


def _part(program: Program, kernels: list[int]) -> tuple[list[int], Module, Layout, Planner]:
    module = Module(host())
    compiler = KernelCompiler(program, module)
    sub = _restrict(program, kernels)
    planner = Planner(sub, whole=len(kernels) == len(program.kernels))
    for k in sub.kernels:
        planner.start_kernel()
        for compiled, buffers in compiler.kernel(k):
            planner.add(compiled, buffers)
    layout = planner.finish()
    layout.units = describe_units(planner, module.tasks)
    return kernels, module, layout, planner


def _restrict(program: Program, kernels: list[int]) -> Program:
    """The program with only ``kernels``; dependencies on others vanish because a host step lies between."""
    import dataclasses

    if len(kernels) == len(program.kernels):
        return program
    where = {k: i for i, k in enumerate(kernels)}
    chosen = []
    for k in kernels:
        kernel = program.kernels[k]
        chosen.append(dataclasses.replace(kernel, after=tuple(where[a] for a in kernel.after if a in where)))
    return dataclasses.replace(program, kernels=tuple(chosen))


def cache_key(program: Program) -> str:
    """A digest of everything that generated code depends on."""
    digest = hashlib.sha256()
    for b in program.buffers:
        digest.update(repr((b.size, b.dtype.str, b.kind, b.offset)).encode())
    for k in program.kernels:
        digest.update(_stable(k).encode())
    return digest.hexdigest()


def _stable(value: Any) -> str:
    """A text form without names, node numbers or sub-graphs."""
    import dataclasses

    if isinstance(value, Kernel):
        skip = {"name", "nodes", "bytes", "flops"}
        parts = [type(value).__name__]
        parts += [
            f"{f.name}={_stable(getattr(value, f.name))}"
            for f in dataclasses.fields(value)
            if f.name not in skip
        ]
        return "(" + ",".join(parts) + ")"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return (
            "("
            + ",".join(_stable(getattr(value, f.name)) for f in dataclasses.fields(value) if f.name != "node")
            + ")"
        )
    if isinstance(value, dict) or hasattr(value, "items"):
        return "{" + ",".join(f"{k}:{_stable(v)}" for k, v in value.items()) + "}"
    if isinstance(value, tuple | list):
        return "[" + ",".join(_stable(v) for v in value) + "]"
    if isinstance(value, np.dtype):
        return value.str
    if type(value).__name__ == "Graph":
        return "graph"
    return repr(value)


def compile_program(program: Program) -> CompiledProgram:
    """Compile, or take the object code from the disk cache."""
    key = cache_key(program)
    found = codecache.read(key)
    if found is not None:
        out = _from_cache(*found)
        if out is not None:
            return out
    parts, order = build(program)
    segments = []
    for kernels, module, layout, planner in parts:
        cost = sum(u.cost for u in planner.units)
        segments.append(
            Segment(
                kernels, layout, cost > SERIAL_NS, codecache.to_object(module.text()), cost, _support(module)
            )
        )
    steps: list[Segment | HostStep] = [segments[s] if isinstance(s, int) else s for s in order]
    compiled = CompiledProgram(steps)
    codecache.write(key, _meta(compiled), b"".join(s.code for s in segments))
    return compiled


def _support(module: Module) -> dict[str, list[Any]]:
    return {name: list(spec) for name, spec in module.support.items()}


def _meta(compiled: CompiledProgram) -> dict[str, Any]:
    steps: list[Any] = []
    for s in compiled.steps:
        if isinstance(s, HostStep):
            steps.append(s.kernel)
        else:
            layout = dataclasses.astuple(s.layout)
            steps.append([s.kernels, layout, s.parallel, len(s.code), s.cost, s.support])
    return {"steps": steps}


def _from_cache(meta: dict[str, Any], code: bytes) -> CompiledProgram | None:
    steps: list[Segment | HostStep] = []
    at = 0
    try:
        for s in meta["steps"]:
            if isinstance(s, int):
                steps.append(HostStep(s))
                continue
            kernels, (buffers, temps, extra, scratch, shared, units), parallel, size, cost, support = s
            places = [(size, offset) for size, offset in temps]
            layout = Layout(buffers, places, extra, scratch, shared, [tuple(u) for u in units])
            steps.append(Segment(kernels, layout, parallel, code[at : at + size], cost, support))
            at += size
    except (KeyError, TypeError, ValueError):
        return None
    return CompiledProgram(steps)


__all__ = [
    "AttentionKernel",
    "CompiledProgram",
    "ContractKernel",
    "HostStep",
    "Segment",
    "Stage",
    "compile_program",
]
