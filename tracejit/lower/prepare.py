"""First stage: a graph becomes values in a normal form that the fusion pass understands.

Markers vanish, chains of views shorten, degenerate products and reductions become simpler ones, dilating pads become
reshapes, sums of disjoint zero pads (the gradient of slicing one array several times) become one concatenation.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import numpy as np

from tracejit.dtypes import DType
from tracejit.graph import TUPLE, Graph, has_effect
from tracejit.lower.values import (
    CONST,
    DOT,
    GATHER_OPS,
    GENERATOR,
    GENERATOR_OPS,
    LEAF,
    MAP,
    OP,
    PROJ,
    REDUCE,
    REDUCE_OPS,
    VIEW,
    VIEW_OPS,
    Value,
    constant_of,
)
from tracejit.program import Capabilities

Shape = tuple[int, ...]
_IDENTITY = {"sum": 0, "prod": 1, "any": False, "all": True}


class Prepared:
    """Values in topological order, and those that stand for the graph's inputs, outputs and effects."""

    def __init__(self, graph: Graph, capabilities: Capabilities) -> None:
        self.graph = graph
        self.capabilities = capabilities
        self.values: list[Value] = []
        self.effects: list[Value] = []
        self.of_node: dict[Any, Value] = {}
        self._maximum: dict[tuple[Value, float], Value] = {}
        self._tuples: dict[Any, tuple[Value, ...]] = {}
        self._consts: dict[Any, Value] = {}
        for nid, node in enumerate(graph.nodes):
            if node.dtype == TUPLE and node.op.name == "custom_vjp":
                self._tuples[node] = tuple(self.of_node[i] for i in node.inputs)
                continue
            if node.op.name == "proj" and node.inputs[0] in self._tuples:
                self.of_node[node] = self._tuples[node.inputs[0]][node.attrs["index"]]
                continue
            inputs = [self.of_node[i] for i in node.inputs]
            self.of_node[node] = self.node(node, inputs, nid)
        self.inputs = [self.of_node[n] for n in graph.inputs]
        self.outputs = [self.of_node[n] for n in graph.outputs]
        self.live()

    # -- building ----------------------------------------------------------------------------------

    def make(
        self,
        op: str,
        kind: str,
        inputs: Sequence[Value],
        attrs: Mapping[str, Any],
        shape: Shape,
        dtype: DType,
        nid: int,
    ) -> Value:
        """A new value."""
        v = Value(op, kind, inputs, attrs, shape, dtype, nid)
        self.values.append(v)
        return v

    def const(self, value: Any, dtype: DType, nid: int = -1) -> Value:
        """A scalar constant."""
        value = np.asarray(value).astype(dtype).item()
        key = (str(value), type(value), dtype)
        found = self._consts.get(key)
        if found is None:
            found = self._consts[key] = self.make("const", CONST, (), {"value": value}, (), dtype, nid)
        return found

    def full(self, value: Any, shape: Shape, dtype: DType, nid: int = -1) -> Value:
        """A constant array."""
        return self.broadcast(self.const(value, dtype, nid), shape, nid)

    def reshape(self, x: Value, shape: Shape, nid: int = -1) -> Value:
        """``x`` with another shape; reshapes of reshapes collapse."""
        if x.op == "reshape":
            x = x.inputs[0]
        if x.shape == shape:
            return x
        return self.make("reshape", VIEW, (x,), {"shape": shape}, shape, x.dtype, nid)

    def transpose(self, x: Value, perm: Shape, nid: int = -1) -> Value:
        """``x`` with permuted axes; transposes of transposes collapse."""
        if x.op == "transpose":
            inner = x.attrs["perm"]
            x, perm = x.inputs[0], tuple(inner[p] for p in perm)
        if perm == tuple(range(len(perm))):
            return x
        return self.make(
            "transpose", VIEW, (x,), {"perm": perm}, tuple(x.shape[p] for p in perm), x.dtype, nid
        )

    def broadcast(self, x: Value, shape: Shape, nid: int = -1) -> Value:
        """``x`` broadcast to ``shape``."""
        if x.shape == shape:
            return x
        if x.op == "broadcast_to":
            inner = x.inputs[0]
            if inner.shape == () or len(inner.shape) == len(shape):
                x = inner
        return self.make("broadcast_to", VIEW, (x,), {"shape": shape}, shape, x.dtype, nid)

    def slice(self, x: Value, start: Shape, stop: Shape, step: Shape, nid: int = -1) -> Value:
        """A strided part of ``x``."""
        shape = tuple(-(-(b - a) // s) for a, b, s in zip(start, stop, step, strict=True))
        if shape == x.shape:
            return x
        return self.make(
            "slice", VIEW, (x,), {"start": start, "stop": stop, "step": step}, shape, x.dtype, nid
        )

    def map(
        self, op: str, inputs: Sequence[Value], dtype: DType, nid: int, attrs: Mapping[str, Any] | None = None
    ) -> Value:
        """An elementwise op."""
        return self.make(op, MAP, inputs, attrs or {}, inputs[0].shape, dtype, nid)

    def reduce(self, op: str, x: Value, axes: Shape, dtype: DType, nid: int) -> Value:
        """A reduction; over axes of size one it is a reshape."""
        shape = tuple(n for i, n in enumerate(x.shape) if i not in axes)
        if op in ("argmax", "argmin"):
            if all(x.shape[a] == 1 for a in axes):
                return self.full(0, shape, dtype, nid)
        elif all(x.shape[a] == 1 for a in axes):
            return self.reshape(x, shape, nid)
        elif op in ("max", "min", "any", "all") and constant_of(x) is not None:
            return self.full(constant_of(x), shape, dtype, nid)
        return self.make(op, REDUCE, (x,), {"axes": axes}, shape, dtype, nid)

    # -- one graph node ----------------------------------------------------------------------------

    def node(self, node: Any, inputs: list[Value], nid: int) -> Value:
        """The value of one graph node."""
        name, attrs, shape, dtype = node.op.name, node.attrs, node.shape, node.dtype
        if name == "input":
            return self.make(name, LEAF, (), attrs, shape, dtype, nid)
        if name == "const":
            return self.const(attrs["value"], dtype, nid)
        if name in ("identity", "stop_gradient", "barrier") or (
            name == "convert" and inputs[0].dtype == dtype
        ):
            return inputs[0]
        if name == "print":
            v = self.make(name, OP, inputs, attrs, shape, dtype, nid)
            self.effects.append(v)
            return inputs[0]
        if name == "proj":
            return self.make(name, PROJ, inputs, attrs, shape, dtype, nid)
        if dtype == TUPLE:
            v = self.make(name, OP, inputs, {**attrs, "avals": node.avals}, shape, dtype, nid)
            if has_effect(node):
                self.effects.append(v)
            return v
        if name == "literal":
            return self.make(name, LEAF, (), attrs, shape, dtype, nid)
        if prod(shape) == 0:
            return self.full(0, shape, dtype, nid)
        if name in self.capabilities.op_kernels or (inputs and any(i.size == 0 for i in inputs)):
            return self._forced(node, name, attrs, inputs, shape, dtype, nid)
        if name in VIEW_OPS:
            return self._view(name, attrs, inputs, shape, dtype, nid)
        if name in REDUCE_OPS:
            axes = attrs["axes"] if "axes" in attrs else (attrs["axis"],)
            return self.reduce(name, inputs[0], axes, dtype, nid)
        if name == "dot_general":
            return self._dot(attrs, inputs, shape, dtype, nid)
        if name in GENERATOR_OPS:
            return self.make(name, GENERATOR, inputs, attrs, shape, dtype, nid)
        if name in GATHER_OPS:
            return self.make(name, MAP, inputs, attrs, shape, dtype, nid)
        if node.op.elementwise:
            return self._elementwise(name, attrs, inputs, dtype, nid)
        return self.make(name, OP, inputs, attrs, shape, dtype, nid)

    def _forced(
        self,
        node: Any,
        name: str,
        attrs: Mapping[str, Any],
        inputs: list[Value],
        shape: Shape,
        dtype: DType,
        nid: int,
    ) -> Value:
        if any(i.size == 0 for i in inputs):
            if name in _IDENTITY:
                return self.full(_IDENTITY[name], shape, dtype, nid)
            if name == "dot_general":
                return self.full(0, shape, dtype, nid)
            if name == "pad":
                return self.full(attrs["value"], shape, dtype, nid)
            if name == "concatenate":
                return self._view(name, attrs, [i for i in inputs if i.size], shape, dtype, nid)
            if name.startswith("scatter_add"):
                return inputs[0]
        return self.make(name, OP, inputs, attrs, shape, dtype, nid)

    def _view(
        self, name: str, attrs: Mapping[str, Any], inputs: list[Value], shape: Shape, dtype: DType, nid: int
    ) -> Value:
        x = inputs[0]
        if name == "reshape":
            return self.reshape(x, shape, nid)
        if name == "transpose":
            return self.transpose(x, attrs["perm"], nid)
        if name == "broadcast_to":
            return self.broadcast(x, shape, nid)
        if name == "slice":
            return self.slice(x, attrs["start"], attrs["stop"], attrs["step"], nid)
        if name == "concatenate":
            if len(inputs) == 1:
                return x
            return self.make(name, VIEW, inputs, attrs, shape, dtype, nid)
        if name == "pad":
            return self._pad(x, attrs["low"], attrs["high"], attrs["interior"], attrs["value"], nid)
        return self.make(name, VIEW, inputs, attrs, shape, dtype, nid)

    def _pad(self, x: Value, low: Shape, high: Shape, interior: Shape, value: Any, nid: int) -> Value:
        for axis, gap in enumerate(interior):
            n = x.shape[axis]
            if gap and n > 1:
                # dilation: [a b c] -> [a 0 b 0 c], as (n, 1) -> (n, 1 + gap) -> cut the last gap off
                wide = self.reshape(x, (*x.shape[:axis], n, 1, *x.shape[axis + 1 :]), nid)
                zero = (0,) * len(wide.shape)
                right = tuple(gap if i == axis + 1 else 0 for i in range(len(wide.shape)))
                wide = self._plain_pad(wide, zero, right, value, nid)
                full = n * (1 + gap)
                x = self.reshape(wide, (*x.shape[:axis], full, *x.shape[axis + 1 :]), nid)
                stop = tuple(s - gap if i == axis else s for i, s in enumerate(x.shape))
                x = self.slice(x, (0,) * len(stop), stop, (1,) * len(stop), nid)
        return self._plain_pad(x, low, high, value, nid)

    def _plain_pad(self, x: Value, low: Shape, high: Shape, value: Any, nid: int) -> Value:
        if not any(low) and not any(high):
            return x
        shape = tuple(a + n + b for a, n, b in zip(low, x.shape, high, strict=True))
        v = self.make("pad", VIEW, (x,), {"low": low, "high": high, "value": value}, shape, x.dtype, nid)
        padded = [i for i in range(len(shape)) if low[i] or high[i]]
        if len(padded) == 1 and value == 0 and x.dtype.kind != "b":
            axis = padded[0]
            v.segments = (axis, ((low[axis], low[axis] + x.shape[axis], x),))
        return v

    def _join(self, a: Value, b: Value, nid: int) -> Value | None:
        """``a + b`` as a concatenation if both are zero but for disjoint stretches of one axis."""
        axis = a.segments[0]
        if axis != b.segments[0]:
            return None
        parts = sorted((*a.segments[1], *b.segments[1]), key=lambda s: s[0])
        if any(p[1] > q[0] for p, q in itertools.pairwise(parts)):
            return None
        pieces: list[Value] = []
        at = 0
        for low, high, x in [*parts, (a.shape[axis], a.shape[axis], None)]:
            if low > at:
                gap = tuple(low - at if i == axis else n for i, n in enumerate(a.shape))
                pieces.append(self.full(0, gap, a.dtype, nid))
            if x is not None:
                pieces.append(x)
            at = high
        v = self.make("concatenate", VIEW, pieces, {"axis": axis}, a.shape, a.dtype, nid)
        v.segments = (axis, tuple(parts))
        return v

    def _elementwise(
        self, name: str, attrs: Mapping[str, Any], inputs: list[Value], dtype: DType, nid: int
    ) -> Value:
        if name == "add":
            a, b = inputs
            if a.segments is not None and b.segments is not None:
                joined = self._join(a, b, nid)
                if joined is not None:
                    return joined
        elif name == "maximum":
            for x, y in (inputs, inputs[::-1]):
                c = constant_of(y)
                if c is not None and c == 0:
                    v = self.map(name, inputs, dtype, nid, attrs)
                    self._maximum[x, 0.0] = v
                    return v
        elif name == "greater" and constant_of(inputs[1]) == 0 and (inputs[0], 0.0) in self._maximum:
            # The mask of relu from its stored result: x > 0 exactly where max(x, 0) > 0 (NaN: neither).
            inputs = [self._maximum[inputs[0], 0.0], inputs[1]]
        return self.map(name, inputs, dtype, nid, attrs)

    def _dot(
        self, attrs: Mapping[str, Any], inputs: list[Value], shape: Shape, dtype: DType, nid: int
    ) -> Value:
        a, b = inputs
        lb, rb, lc, rc = (attrs[k] for k in ("lhs_batch", "rhs_batch", "lhs_contract", "rhs_contract"))
        lf = tuple(i for i in range(len(a.shape)) if i not in lb and i not in lc)
        rf = tuple(i for i in range(len(b.shape)) if i not in rb and i not in rc)
        m, n = prod(a.shape[i] for i in lf), prod(b.shape[i] for i in rf)
        k = prod(a.shape[i] for i in lc)
        if dtype.kind == "f" and m > 1 and n > 1 and k > 1:
            return self.make("dot_general", DOT, inputs, attrs, shape, dtype, nid)
        # Integer, matrix-vector and outer products: a plain loop is as fast, and every backend has loops.
        kshape = tuple(a.shape[i] for i in lc)
        full = (*shape, *kshape)
        left = self.transpose(a, (*lb, *lf, *lc), nid)
        right = self.transpose(b, (*rb, *rf, *rc), nid)
        nb, nm, nn = len(lb), len(lf), len(rf)
        left = self.reshape(left, (*left.shape[: nb + nm], *(1,) * nn, *kshape), nid)
        right = self.reshape(right, (*right.shape[:nb], *(1,) * nm, *right.shape[nb:]), nid)
        work = np.dtype(np.float32) if dtype == np.float16 else dtype
        x, y = self.broadcast(left, full, nid), self.broadcast(right, full, nid)
        if work != dtype:
            x, y = (self.map("convert", [z], work, nid, {"dtype": work}) for z in (x, y))
        p = self.map("mul", [x, y], work, nid)
        if kshape:
            p = self.reduce("sum", p, tuple(range(len(shape), len(full))), work, nid)
        return p if work == dtype else self.map("convert", [p], dtype, nid, {"dtype": dtype})

    # -- liveness ----------------------------------------------------------------------------------

    def live(self) -> None:
        """Keep the values that outputs and effects need; number them and list their users."""
        marked: set[Value] = set(self.inputs)
        stack: list[Value] = [*self.outputs, *self.effects]
        while stack:
            v = stack.pop()
            if v not in marked or v.kind == LEAF:
                marked.add(v)
                stack.extend(i for i in v.inputs if i not in marked)
        self.values = [v for v in self.values if v in marked]
        for i, v in enumerate(self.values):
            v.index = i
            v.users = []
        for v in self.values:
            for x in v.inputs:
                x.users.append(v)
