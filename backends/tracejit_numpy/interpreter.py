"""Runs a graph node by node: a flat list of steps over slots, values freed at their last use, elementwise steps in place.

Made by the backend object in ``__init__.py``; the plan is built once per compile.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tracejit.backend import Timing
from tracejit.errors import DeviceOutOfMemoryError, describe
from tracejit.events import KernelInfo
from tracejit.graph import Graph, Node
from tracejit_numpy.schedule import low_peak_order

#: Elementwise ops that are exactly one NumPy ufunc: called directly, and able to write into a dying operand.
_UFUNCS: dict[str, np.ufunc] = {
    "neg": np.negative, "abs": np.absolute, "sign": np.sign, "floor": np.floor, "ceil": np.ceil, "rint": np.rint,
    "trunc": np.trunc, "exp": np.exp, "exp2": np.exp2, "expm1": np.expm1, "log": np.log, "log2": np.log2,
    "log10": np.log10, "log1p": np.log1p, "sqrt": np.sqrt, "cbrt": np.cbrt, "sin": np.sin, "cos": np.cos,
    "tan": np.tan, "tanh": np.tanh, "sinh": np.sinh, "cosh": np.cosh, "add": np.add, "sub": np.subtract,
    "mul": np.multiply, "div": np.divide, "pow": np.power, "maximum": np.maximum, "minimum": np.minimum,
    "bitwise_and": np.bitwise_and, "bitwise_or": np.bitwise_or, "bitwise_xor": np.bitwise_xor,
    "equal": np.equal, "not_equal": np.not_equal, "less": np.less, "less_equal": np.less_equal,
    "greater": np.greater, "greater_equal": np.greater_equal, "logical_not": np.logical_not, "invert": np.invert,
}  # fmt: skip
_FREE = frozenset(
    {"const", "literal", "input", "proj", "reshape", "transpose", "broadcast_to", "slice", "flip", "barrier"}
)


@dataclass(slots=True)
class _Step:
    """One node to compute. ``dying`` are slots freed afterwards; ``out`` a slot whose buffer takes the result, or -1."""

    call: Callable[..., Any]
    args: tuple[int, ...]
    slot: int
    dying: tuple[int, ...]
    out: int
    node: Node
    kernel: int


class Interpreter:
    """An executable over NumPy arrays (:class:`tracejit.backend.Executable`)."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._slots = len(graph.nodes)
        self._inputs = [(graph.id(n), n.dtype) for n in graph.inputs]
        self._outputs = [graph.id(n) for n in graph.outputs]
        self._constants: list[tuple[int, np.ndarray]] = []
        self._steps: list[_Step] = []
        self.kernels: Sequence[KernelInfo] = ()
        self._plan()

    # -- planning ----------------------------------------------------------------------------------------------------

    def _plan(self) -> None:
        graph = self._graph
        order = [n for n in graph.nodes if n.op.name != "input"]
        operands = {n: self._operands(n) for n in order}
        used = {i for n in order for i in operands[n]} | set(graph.outputs)
        effects = set(graph.effects)
        order = [n for n in order if n in used or n in effects]
        # A view keeps its base alive: liveness is that of the base.
        base: dict[Node, Node] = {}
        for n in order:
            is_view = ("view" in n.op.traits or n.op.name == "proj") and n.inputs
            base[n] = base.get(n.inputs[0], n.inputs[0]) if is_view else n
        kept = {base.get(n, n) for n in graph.outputs}
        order = low_peak_order(order, operands, lambda n: base.get(n, n), kept)
        last: dict[Node, int] = {}
        for i, n in enumerate(order):
            for o in operands[n]:
                last[base.get(o, o)] = i
        members: dict[Node, list[Node]] = {}
        for n in order:
            members.setdefault(base[n], []).append(n)
        kernels: list[KernelInfo] = []
        for i, n in enumerate(order):
            if n.op.name == "const":
                value = np.array(n.attrs["value"], dtype=n.dtype)
                self._constants.append((graph.id(n), value))
                continue
            if n.op.name == "literal":
                self._constants.append((graph.id(n), n.op.reference(**n.attrs)))
                continue
            args = operands[n]
            dead = [b for b in dict.fromkeys(base.get(o, o) for o in args) if last[b] == i and b not in kept]
            # Integer powers with a negative exponent are an error in the ufunc; the reference defines them.
            ufunc = None if n.op.name == "pow" and n.dtype.kind != "f" else _UFUNCS.get(n.op.name)
            out = -1
            if ufunc is not None:
                call: Callable[..., Any] = ufunc
                for o in args:
                    b = base.get(o, o)
                    # Only a buffer that some step here made, that nothing else views, and that fits may be overwritten.
                    reusable = (
                        b is o
                        and b in dead
                        and b.op.name not in ("const", "literal", "input")
                        and len(members[b]) == 1
                    )
                    if reusable and b.shape == n.shape and b.dtype == n.dtype and b.op.elementwise:
                        out = graph.id(b)
                        break
            else:
                call = functools.partial(n.op.reference, **n.attrs) if n.attrs else n.op.reference
            kernel = -1
            if n.op.name not in _FREE:
                kernel = len(kernels)
                kernels.append(
                    KernelInfo(kernel, _kernel_name(n), "op", (graph.id(n),), _bytes(n), _flops(n))
                )
            dying = tuple(graph.id(m) for b in dead for m in members.get(b, [b]))
            self._steps.append(_Step(call, tuple(map(graph.id, args)), graph.id(n), dying, out, n, kernel))
        self.kernels = tuple(kernels)

    @staticmethod
    def _operands(node: Node) -> tuple[Node, ...]:
        """The operands to pass: NumPy broadcasts by itself, so broadcast nodes in front of elementwise ops are skipped."""
        if node.op.name not in _UFUNCS or not node.inputs:
            return node.inputs
        short = [i.inputs[0] if i.op.name == "broadcast_to" else i for i in node.inputs]
        try:
            fits = np.broadcast_shapes(*(s.shape for s in short)) == node.shape
        except ValueError:
            fits = False
        return tuple(short) if fits else node.inputs

    # -- running -----------------------------------------------------------------------------------------------------

    def _start(self, inputs: Sequence[Any]) -> list[Any]:
        values: list[Any] = [None] * self._slots
        for slot, constant in self._constants:
            values[slot] = constant
        for (slot, dtype), value in zip(self._inputs, inputs):
            values[slot] = np.asarray(value, dtype=dtype)
        return values

    def __call__(self, inputs: Sequence[Any]) -> list[Any]:
        """Run once."""
        values = self._start(inputs)
        with np.errstate(all="ignore"):
            for step in self._steps:
                args = [values[a] for a in step.args]
                try:
                    target = values[step.out] if step.out >= 0 else None
                    if type(target) is np.ndarray and target.shape == step.node.shape:  # not a NumPy scalar
                        values[step.slot] = step.call(*args, out=target)
                    else:
                        values[step.slot] = step.call(*args)
                except MemoryError as error:
                    raise _out_of_memory(step.node) from error
                for d in step.dying:
                    values[d] = None
        return self._finish(values, inputs)

    def observed(self, inputs: Sequence[Any]) -> tuple[list[Any], Timing]:
        """Run once and report the time of each node and the bytes alive."""
        values = self._start(inputs)
        kernels, starts, ends, lives = [], [], [], []
        live = 0
        clock = time.perf_counter_ns
        with np.errstate(all="ignore"):
            for step in self._steps:
                args = [values[a] for a in step.args]
                start = clock()
                try:
                    value = step.call(*args)
                except MemoryError as error:
                    raise _out_of_memory(step.node) from error
                end = clock()
                values[step.slot] = value
                if step.kernel >= 0:
                    live += step.node.nbytes
                    kernels.append(step.kernel)
                    starts.append(start)
                    ends.append(end)
                    lives.append(live)
                for d in step.dying:
                    freed = self._graph.nodes[d]
                    if values[d] is not None and freed.op.name not in _FREE:
                        live -= freed.nbytes
                    values[d] = None
        timing = Timing(
            np.array(kernels, np.uint32),
            np.array(starts, np.int64),
            np.array(ends, np.int64),
            np.array(lives, np.int64),
            np.zeros(len(kernels), np.uint8),
        )
        return self._finish(values, inputs), timing

    def _finish(self, values: list[Any], inputs: Sequence[Any]) -> list[Any]:
        """Results that own their memory: a view of an argument would change when the caller changes the argument."""
        outs = []
        seen: set[int] = set()
        for slot in self._outputs:
            value = values[slot]
            node = self._graph.nodes[slot]
            if type(value) is not np.ndarray:
                value = np.asarray(value, dtype=node.dtype)
            base = value if value.base is None else value.base
            is_constant = node.op.name in ("const", "literal")
            if value.base is not None or node.op.name == "input" or is_constant or id(base) in seen:
                value = np.array(value, copy=True, order="C")
                base = value
            elif not value.flags.c_contiguous:
                value = base = np.ascontiguousarray(value)
            seen.add(id(base))
            outs.append(value)
        return outs

    def inspect(self) -> Mapping[str, str]:
        """The interpretation plan."""
        lines = []
        for s in self._steps:
            into = f" into %{s.out}" if s.out >= 0 else ""
            frees = f"  frees {', '.join(f'%{d}' for d in s.dying)}" if s.dying else ""
            lines.append(f"%{s.slot} = {s.node.op.name}({', '.join(f'%{a}' for a in s.args)}){into}{frees}")
        return {"NumPy plan": "\n".join(lines)}


def _out_of_memory(node: Node) -> DeviceOutOfMemoryError:
    where = node.source + (f" in {node.scope}" if node.scope else "")
    return DeviceOutOfMemoryError.make(
        f"no memory for {describe(node)}, {node.nbytes:,} bytes", op=node.op.name, where=where
    )


def _kernel_name(node: Node) -> str:
    """The last scope and the op: ``softmax.exp``."""
    scope = node.scope.rpartition("/")[2]
    return f"{scope}.{node.op.name}" if scope else node.op.name


def _bytes(node: Node) -> int:
    return node.nbytes + sum(i.nbytes for i in node.inputs)


def _flops(node: Node) -> int:
    """Floating-point operations of one node: 2 per multiply-add of a contraction, 1 per element otherwise."""
    if node.op.name == "dot_general":
        lhs = node.inputs[0]
        depth = 1
        for axis in node.attrs["lhs_contract"]:
            depth *= lhs.shape[axis]
        return 2 * node.size * depth
    if node.op.name.startswith("conv2d") and len(node.inputs) == 2:
        # Multiply-adds are the same in all three products: |y| * C/groups * kernel area.
        shapes = sorted((node.size, node.inputs[0].size, node.inputs[1].size))
        return 2 * shapes[1] * max(1, shapes[2] // max(1, node.shape[0]))
    if node.op.category == "view" or node.dtype.kind != "f":
        return 0
    return max((node.size, *(i.size for i in node.inputs)), default=0)
