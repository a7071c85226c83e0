"""Ops that run in Python between native parts: the op's NumPy reference, and control flow over compiled sub-programs.

``executable.py`` calls :meth:`HostOps.run` for every kernel without a native lowering.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tracejit.program import OpKernel, Program

Views = Callable[[int, tuple[int, ...]], np.ndarray]


class HostOps:
    """Runs the host steps of one program. ``compile_graph`` turns a sub-graph into an executable."""

    def __init__(self, program: Program, compile_graph: Callable[[Any], Any]) -> None:
        self.program = program
        self._compile_graph = compile_graph
        self._subs: dict[tuple[int, str], Any] = {}

    def run(self, index: int, view: Views) -> None:
        """Execute kernel ``index`` on the current memory."""
        kernel = self.program.kernels[index]
        assert isinstance(kernel, OpKernel)
        operands = [view(b, shape) for b, shape in kernel.operands]
        control = {"cond": self._cond, "while_loop": self._while, "scan": self._scan}.get(kernel.op)
        if control is not None:
            results = control(index, kernel, operands)
        else:
            from tracejit.ops import registry

            with np.errstate(all="ignore"):
                value = registry.get(kernel.op).reference(*operands, **kernel.attrs)
            results = list(value) if isinstance(value, tuple) else [value]
        for (buffer, shape), value in zip(kernel.results, results):
            view(buffer, shape)[...] = value

    def _sub(self, index: int, name: str, kernel: OpKernel) -> Any:
        key = (index, name)
        if key not in self._subs:
            self._subs[key] = self._compile_graph(kernel.attrs[name])
        return self._subs[key]

    def _cond(self, index: int, kernel: OpKernel, operands: Sequence[np.ndarray]) -> list[np.ndarray]:
        branch = "true_graph" if bool(operands[0]) else "false_graph"
        return self._sub(index, branch, kernel)(list(operands[1:]))

    def _while(self, index: int, kernel: OpKernel, operands: Sequence[np.ndarray]) -> list[np.ndarray]:
        test, body = self._sub(index, "cond_graph", kernel), self._sub(index, "body_graph", kernel)
        state = [np.array(x) for x in operands]
        while bool(test(state)[0]):
            state = body(state)
        return state

    def _scan(self, index: int, kernel: OpKernel, operands: Sequence[np.ndarray]) -> list[np.ndarray]:
        body = self._sub(index, "body_graph", kernel)
        count, length = int(kernel.attrs["n_carry"]), int(kernel.attrs["length"])
        carry, xs = [np.array(x) for x in operands[:count]], operands[count:]
        stacked = [np.empty(shape, self.program.buffers[b].dtype) for b, shape in kernel.results[count:]]
        steps = range(length - 1, -1, -1) if kernel.attrs.get("reverse") else range(length)
        for t in steps:
            out = body([*carry, *(np.ascontiguousarray(x[t]) for x in xs)])
            carry = out[:count]
            for target, value in zip(stacked, out[count:]):
                target[t] = value
        return [*carry, *stacked]
