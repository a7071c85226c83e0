"""cond, while_loop and scan: the host decides, values stay on the device, bodies are executables of their own.

Called by ``host.control_step``. A scan slices its operands and stacks its results with buffer copies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from tracejit.array import Array
from tracejit.program import OpKernel, Program
from tracejit_wgpu.storage import WgpuStorage
from tracejit_wgpu.transfer import to_storage
from tracejit_wgpu.wgsl import storage_dtype

if TYPE_CHECKING:
    from tracejit_wgpu.host import Context


class Subprograms:
    """Executables of a kernel's sub-graphs, compiled on first use."""

    def __init__(self, spec: str) -> None:
        self._spec = spec
        self._made: dict[str, Any] = {}

    def __call__(self, kernel: OpKernel, name: str) -> Any:
        """The executable of ``kernel``'s ``<name>_graph``."""
        found = self._made.get(name)
        if found is None:
            from tracejit_wgpu import backend
            from tracejit_wgpu.executable import Executable

            program = kernel.attrs.get(f"{name}_program")
            if not isinstance(program, Program):
                from tracejit.lower import lower

                program = lower(kernel.attrs[f"{name}_graph"], backend.capabilities(self._spec))
            found = self._made[name] = Executable(program, self._spec)
        return found


def _operand(context: Context, buffer: int, shape: tuple[int, ...]) -> Any:
    """An operand as an array that shares the buffer's memory."""
    dtype = context.tables.dtype(buffer)
    if buffer in context.tables.scalars:
        return np.asarray(context.scalar(buffer), dtype)
    return Array(shape, dtype, WgpuStorage(context.runtime, context.handle(buffer), prod(shape), dtype))


def _nbytes(context: Context, shape: Sequence[int], dtype: np.dtype) -> int:
    return prod(shape) * storage_dtype(dtype, context.tables.target.f16).itemsize


def _own(context: Context, value: Any) -> Array:
    """``value`` on this device."""
    if isinstance(value, Array):
        return value
    rt = context.runtime
    array = np.asarray(value)
    handle = rt.upload(to_storage(array, array.dtype, rt.target.f16, warn=False))
    return Array(array.shape, array.dtype, WgpuStorage(rt, handle, array.size, array.dtype))


def _deliver(context: Context, kernel: OpKernel, values: Sequence[Any]) -> None:
    """Copy results into the kernel's result buffers."""
    moves = []
    keep = [_own(context, v) for v in values]
    for (buffer, shape), value in zip(kernel.results, keep):
        nbytes = _nbytes(context, shape, context.tables.dtype(buffer))
        source, target = value.storage.handle, context.handle(buffer)  # type: ignore[attr-defined]
        if nbytes and source.buffer.uid != target.buffer.uid:
            moves.append((source, 0, target, 0, nbytes))
    if moves:
        context.runtime.copy(moves)


def cond(kernel: OpKernel, context: Context, programs: Subprograms) -> None:
    """Read the predicate, run one branch."""
    chosen = bool(np.asarray(_operand(context, *kernel.operands[0])))
    inputs = [_operand(context, b, s) for b, s in kernel.operands[1:]]
    _deliver(context, kernel, programs(kernel, "true" if chosen else "false")(inputs))


def while_loop(kernel: OpKernel, context: Context, programs: Subprograms) -> None:
    """Read the condition before every round."""
    values: list[Any] = [_operand(context, b, s) for b, s in kernel.operands]
    condition, body = programs(kernel, "cond"), programs(kernel, "body")
    while bool(np.asarray(condition(values)[0])):
        values = body(values)
    _deliver(context, kernel, values)


def scan(kernel: OpKernel, context: Context, programs: Subprograms) -> None:
    """Run the body ``length`` times without waiting for the device."""
    a, rt = kernel.attrs, context.runtime
    count, length = a["n_carry"], a["length"]
    carry: list[Any] = [_operand(context, b, s) for b, s in kernel.operands[:count]]
    xs = [(b, s[1:], context.tables.dtype(b)) for b, s in kernel.operands[count:]]
    stacked = kernel.results[count:]
    widths = [_nbytes(context, shape, dtype) for _, shape, dtype in xs]
    widths += [_nbytes(context, s[1:], context.tables.dtype(b)) for b, s in stacked]
    if any(w % 4 for w in widths):
        _scan_on_host(kernel, context)
        return
    body = programs(kernel, "body") if length else None
    for i in reversed(range(length)) if a["reverse"] else range(length):
        moves, slices = [], []
        for buffer, shape, dtype in xs:
            nbytes = _nbytes(context, shape, dtype)
            handle = rt.pool.acquire(nbytes)
            if nbytes:
                moves.append((context.handle(buffer), i * nbytes, handle, 0, nbytes))
            slices.append(Array(shape, dtype, WgpuStorage(rt, handle, prod(shape), dtype)))
        if moves:
            rt.copy(moves)
        assert body is not None
        values = [_own(context, v) for v in body([*carry, *slices])]
        carry = values[:count]
        moves = []
        for (buffer, shape), value in zip(stacked, values[count:]):
            nbytes = _nbytes(context, shape[1:], context.tables.dtype(buffer))
            if nbytes:
                moves.append((value.storage.handle, 0, context.handle(buffer), i * nbytes, nbytes))  # type: ignore[attr-defined]
        if moves:
            rt.copy(moves)
    head = OpKernel(kernel.name, (), (), (), op="scan", results=kernel.results[:count])
    _deliver(context, head, carry)


def _scan_on_host(kernel: OpKernel, context: Context) -> None:
    """Slices that are no multiple of four bytes (float16) cannot be copied on the device."""
    from tracejit.ops import registry

    operands = [context.read(b, s) for b, s in kernel.operands]
    attrs = {k: v for k, v in kernel.attrs.items() if not k.endswith("_program")}
    for (buffer, _), value in zip(kernel.results, registry.get("scan").reference(*operands, **attrs)):
        context.write(buffer, value)


RUNNERS: dict[str, Callable[[OpKernel, Any, Subprograms], None]] = {
    "cond": cond,
    "while_loop": while_loop,
    "scan": scan,
}
