"""Whole programs on disk: with one, a recorded graph runs without being optimised, lowered or compiled.

``CpuBackend.restore`` and ``remember`` call it. An entry lives in the directory of the object code, under the same checks
(``codecache.py``), and names the object code that belongs to it. It is JSON, with the bytes of constants behind it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from tracejit.program import Buffer, Program
from tracejit_cpu import codecache
from tracejit_cpu.compiler import Segment, stored_code
from tracejit_cpu.executable import CpuExecutable, Stored, kernel_rows

if TYPE_CHECKING:
    from tracejit.compilation import Stages
    from tracejit.graph import Graph

_LIMIT_BYTES = 16 << 20  # of constants


def remember(key: str, executable: CpuExecutable) -> None:
    """Store a program, unless parts of it run in Python: those need the kernels themselves."""
    program = executable.program
    constants = [np.ascontiguousarray(c) for c in executable.constants]
    if (
        not all(isinstance(s, Segment) for s in executable.steps)
        or sum(c.nbytes for c in constants) > _LIMIT_BYTES
    ):
        return
    meta = {
        "object": executable.key,
        "name": program.name,
        "arena": program.arena,
        "bound": program.live_bound,
        "inputs": program.inputs,
        "outputs": program.outputs,
        "buffers": [[b.size, b.dtype.name, b.kind, b.index, b.offset, b.shape] for b in program.buffers],
        "kernels": kernel_rows(program),
        "constants": [[c.dtype.name, c.shape] for c in constants],
    }
    codecache.write(f"program:{key}", meta, b"".join(c.tobytes() for c in constants))


def restore(key: str, graph: Graph, stages: Stages) -> CpuExecutable | None:
    """The executable of ``graph``, or None if it is not stored, or its object code is not any more."""
    found = codecache.read(f"program:{key}")
    if found is None:
        return None
    try:
        frame, kernels, code_key = _frame(graph, *found)
    except (KeyError, TypeError, ValueError):  # written by something that shares our key and is not us
        return None
    compiled = stored_code(code_key)
    return None if compiled is None else CpuExecutable(frame, Stored(compiled, kernels, stages))


def _frame(graph: Graph, meta: dict[str, Any], data: bytes) -> tuple[Program, list[list[Any]], str]:
    """The program without its kernels, the rows that describe those, and the key of the object code."""
    buffers = tuple(
        Buffer(i, size, np.dtype(dtype), kind, index, offset, tuple(shape))
        for i, (size, dtype, kind, index, offset, shape) in enumerate(meta["buffers"])
    )
    constants, at = [], 0
    for name, shape in meta["constants"]:
        dtype = np.dtype(name)
        count = int(np.prod(shape, dtype=np.int64))
        constants.append(np.frombuffer(data, dtype, count, at).reshape(shape).copy())
        at += count * dtype.itemsize
    frame = Program(
        meta["name"],
        graph,
        buffers,
        (),
        tuple(meta["inputs"]),
        tuple(meta["outputs"]),
        tuple(constants),
        meta["arena"],
        meta["bound"],
    )
    return frame, meta["kernels"], meta["object"]
