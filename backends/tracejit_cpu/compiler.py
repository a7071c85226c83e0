"""Program -> object code and a plan for running it. Called by ``executable.py``.

Every kernel is lowered to functions over ranges of tasks; equal kernels share a function (``build.py``). ``plan.py``
schedules them into one native program. Ops without a native lowering become host steps that run the op's NumPy reference
between two native parts, so that every program runs.
"""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from tracejit.program import Kernel, Program
from tracejit_cpu import codecache
from tracejit_cpu.plan import Layout

if TYPE_CHECKING:
    from tracejit_cpu.irbuilder import Module
    from tracejit_cpu.plan import Planner

    Part = tuple[list[int], Module, Layout, Planner]  # kernels of the program, their code, memory, schedule

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
    key: str = ""  # of the object code in the disk cache


def cache_key(program: Program) -> str:
    """A digest of everything that generated code depends on."""
    digest = hashlib.sha256()
    for b in program.buffers:
        digest.update(repr((b.size, b.dtype.str, b.kind, b.offset)).encode())
    for k in program.kernels:
        digest.update(stable(k).encode())
    return digest.hexdigest()


def stable(value: Any) -> str:
    """A text form without names, node numbers or sub-graphs."""
    if isinstance(value, Kernel):
        skip = {"name", "nodes", "bytes", "flops"}
        parts = [type(value).__name__]
        parts += [
            f"{f.name}={stable(getattr(value, f.name))}"
            for f in dataclasses.fields(value)
            if f.name not in skip
        ]
        return "(" + ",".join(parts) + ")"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return (
            "("
            + ",".join(stable(getattr(value, f.name)) for f in dataclasses.fields(value) if f.name != "node")
            + ")"
        )
    if isinstance(value, dict) or hasattr(value, "items"):
        return "{" + ",".join(f"{k}:{stable(v)}" for k, v in value.items()) + "}"
    if isinstance(value, tuple | list):
        return "[" + ",".join(stable(v) for v in value) + "]"
    if isinstance(value, np.dtype):
        return value.str
    if type(value).__name__ == "Graph":
        return "graph"
    return repr(value)


def build(program: Program) -> tuple[list[Part], list[HostStep | int]]:
    """Emit IR for every native part. Returns the parts and the order of steps (an int is a part's number)."""
    from tracejit_cpu.build import (
        build_parts,
    )  # the code generators: not needed for a program in the disk cache

    return build_parts(program)


def compile_program(program: Program) -> CompiledProgram:
    """Compile, or take the object code from the disk cache."""
    key = cache_key(program)
    out = stored_code(key)
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
    compiled = CompiledProgram(steps, key)
    codecache.write(key, _meta(compiled), b"".join(s.code for s in segments))
    return compiled


def stored_code(key: str) -> CompiledProgram | None:
    """The code that the disk cache has under ``key``."""
    found = codecache.read(key)
    return None if found is None else _from_cache(key, *found)


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


def _from_cache(key: str, meta: dict[str, Any], code: bytes) -> CompiledProgram | None:
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
    return CompiledProgram(steps, key)
