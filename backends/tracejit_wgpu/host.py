"""Steps on the host: NumPy references of ops without a GPU lowering, and control flow that drives sub-programs.

They run between submissions: operands are read back, results uploaded. Called by ``compiler.py``; the executable passes
a :class:`Context`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from tracejit.program import OpKernel
from tracejit_wgpu.emit import Tables
from tracejit_wgpu.memory import Handle
from tracejit_wgpu.transfer import from_storage, to_storage
from tracejit_wgpu.wgsl import storage_dtype

CONTROL = frozenset({"cond", "while_loop", "scan"})


@dataclass
class Context:
    """What a host step may do: find buffers by id and move data."""

    runtime: Any
    handle: Callable[[int], Handle]
    tables: Tables
    scalar: Callable[[int], Any]

    def read(self, buffer: int, shape: tuple[int, ...]) -> np.ndarray:
        """A buffer's value on the host."""
        dtype = self.tables.dtype(buffer)
        if buffer in self.tables.scalars:
            return np.asarray(self.scalar(buffer), dtype).reshape(shape)
        store = storage_dtype(dtype, self.tables.target.f16)
        size = int(np.prod(shape, dtype=np.int64))
        raw = self.runtime.read(self.handle(buffer), size * store.itemsize, store)
        return from_storage(raw, shape, dtype)

    def write(self, buffer: int, value: Any) -> None:
        """Overwrite a buffer from the host."""
        data = to_storage(value, self.tables.dtype(buffer), self.tables.target.f16, warn=False)
        self.runtime.write(self.handle(buffer), data)


def reference_steps(kernel: OpKernel, number: int, tables: Tables) -> list[Any]:
    """The op's NumPy reference as a host step."""
    from tracejit.ops import registry
    from tracejit_wgpu.compiler import HostStep, Step

    op = registry.get(kernel.op)

    def run(context: Context) -> None:
        operands = [context.read(b, shape) for b, shape in kernel.operands]
        result = op.reference(*operands, **dict(kernel.attrs))
        results = result if isinstance(result, tuple | list) else (result,)
        for (buffer, _), value in zip(kernel.results, results):
            context.write(buffer, value)

    step = HostStep(
        kernel.op,
        tuple(b for b, _ in kernel.operands if b not in tables.scalars),
        tuple(b for b, _ in kernel.results),
        run,
    )
    return [Step(number, host=step)]


def control_step(kernel: OpKernel, tables: Tables, spec: str) -> Any:
    """cond, while_loop and scan: the host picks or repeats sub-programs whose values stay on the device."""
    from tracejit_wgpu.compiler import HostStep
    from tracejit_wgpu.control import RUNNERS, Subprograms

    programs = Subprograms(spec)
    runner = RUNNERS[kernel.op]

    def run(context: Context) -> None:
        runner(kernel, context, programs)

    return HostStep(
        kernel.op,
        tuple(b for b, _ in kernel.operands if b not in tables.scalars),
        tuple(b for b, _ in kernel.results),
        run,
    )
