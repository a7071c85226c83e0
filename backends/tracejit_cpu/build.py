"""Emits the code of a program: kernels to functions, equal ones once, consecutive native kernels in one LLVM module.

``compiler.py`` calls :func:`build_parts` when a program is not in the disk cache, ``inspect()`` to show the code. The code
generators of attention, products and single ops are imported by the first program that has any.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

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
from tracejit_cpu.body import Local, localize
from tracejit_cpu.compiler import HostStep, stable
from tracejit_cpu.host import host
from tracejit_cpu.irbuilder import Module
from tracejit_cpu.loops import compile_body
from tracejit_cpu.plan import Planner, describe_units, overlaps
from tracejit_cpu.stages import Compiled

if TYPE_CHECKING:
    from tracejit_cpu.compiler import Part


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
            from tracejit_cpu import gemm

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
        from tracejit_cpu import attention

        numbers: dict[int, int] = {}
        changes: dict[str, Any] = {"reads": (), "writes": (), "after": ()}
        for field_ in dataclasses.fields(kernel):
            access = getattr(kernel, field_.name)
            if isinstance(access, Access):
                local = numbers.setdefault(access.buffer, len(numbers))
                changes[field_.name] = Access(local, access.strides, access.offset)
        named = dataclasses.replace(kernel, **changes)
        return self._shared("attention", named, numbers, attention.compile_attention)

    def _op(self, kernel: OpKernel) -> list[tuple[Compiled, list[int]]]:
        """An op kernel; equal ones on other buffers share code."""
        from tracejit_cpu import ops

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
        key = f"op{in_place}{stable(named)}{dtypes}"
        if key not in self.parts:
            name = f"k{len(self.shared) + len(self.parts)}o"
            self.parts[key] = ops.compile_op(
                self.module, named, lambda n: self.dtype(original[n]), name, in_place
            )
        return [(compiled, [original[n] for n in local]) for compiled, local in self.parts[key]]

    def _contract(self, c: Contract) -> tuple[Compiled, list[int]]:
        """A product; equal ones on other buffers share code."""
        from tracejit_cpu import gemm

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
        return self._shared("gemm", named, numbers, gemm.compile_contract)

    def _shared(
        self,
        kind: str,
        named: Any,
        numbers: dict[int, int],
        compile_: Callable[..., tuple[Compiled, list[int]]],
    ) -> tuple[Compiled, list[int]]:
        """Code of a kernel whose buffers are numbered by ``numbers``, compiled once for all equal ones, and its buffers."""
        original = {v: k for k, v in numbers.items()}
        dtypes = [self.dtype(original[i]).name for i in range(len(original))]
        key = f"{kind}{stable(named)}{dtypes}"

        def make(name: str) -> Compiled:
            compiled, local = compile_(self.module, named, lambda n: self.dtype(original[n]), name)
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
        from tracejit_cpu import ops

        return ops.supports(kernel, lambda b: program.buffers[b].dtype)
    return isinstance(kernel, LoopKernel | ContractKernel | AttentionKernel)


def build_parts(program: Program) -> tuple[list[Part], list[HostStep | int]]:
    """Emit IR for every native part. Returns the parts and the order of steps (an int is a part's number)."""
    parts: list[Part] = []
    steps: list[HostStep | int] = []
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


def _part(program: Program, kernels: list[int]) -> Part:
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
    if len(kernels) == len(program.kernels):
        return program
    where = {k: i for i, k in enumerate(kernels)}
    chosen = []
    for k in kernels:
        kernel = program.kernels[k]
        chosen.append(dataclasses.replace(kernel, after=tuple(where[a] for a in kernel.after if a in where)))
    return dataclasses.replace(program, kernels=tuple(chosen))
