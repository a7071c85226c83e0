"""Random graphs over all kinds of ops, for differential tests of lowering. Used by test_lower_random.py."""

from __future__ import annotations

from typing import Any

import numpy as np

import tracejit.ops  # noqa: F401  (fills the op table)
from tracejit.graph import Graph, GraphBuilder, Node

F32, I64 = np.dtype(np.float32), np.dtype(np.int64)
UNARY = ("neg", "abs", "tanh", "sin", "exp", "sqrt", "floor", "erf", "reciprocal")
BINARY = ("add", "sub", "mul", "maximum", "minimum", "div", "arctan2")
REDUCE = ("sum", "max", "min", "sum", "prod")
SIZES = (1, 2, 3, 4, 6)


class RandomGraph:
    """Builds one graph from a seed. Values stay within a few units, so that differences mean mistakes."""

    def __init__(self, seed: int, steps: int = 25) -> None:
        self.rng = np.random.default_rng(seed)
        self.b = GraphBuilder()
        self.inputs: list[Node] = []
        self.arrays: list[np.ndarray] = []
        self.pool: list[Node] = []
        for _ in range(int(self.rng.integers(1, 4))):
            self.add_input(self.shape())
        for _ in range(steps):
            made = self.step()
            if made is not None and made.size <= 4000 and len(made.shape) <= 5:
                self.pool.append(made)

    def graph(self) -> tuple[Graph, list[np.ndarray]]:
        """The graph and arrays for its inputs."""
        n = int(self.rng.integers(1, 4))
        outs = [self.pool[-1], *(self.pick() for _ in range(n - 1))]
        return Graph.build("random", self.inputs, outs).verify(), self.arrays

    def shape(self) -> tuple[int, ...]:
        return tuple(int(self.rng.choice(SIZES)) for _ in range(int(self.rng.integers(0, 4))))

    def add_input(self, shape: tuple[int, ...], dtype: Any = F32, array: Any = None) -> Node:
        attrs = {"index": len(self.inputs), "kind": "argument", "shape": shape, "dtype": dtype}
        node = self.b.add("input", (), attrs)
        self.inputs.append(node)
        self.arrays.append(self.rng.uniform(-2, 2, shape).astype(dtype) if array is None else array)
        if dtype == F32:
            self.pool.append(node)
        return node

    def pick(self) -> Node:
        recent = self.rng.random() < 0.6
        pool = self.pool[-4:] if recent else self.pool
        return pool[int(self.rng.integers(len(pool)))]

    def op(self, name: str, *inputs: Node, **attrs: Any) -> Node:
        return self.b.add(name, inputs, attrs)

    def tame(self, x: Node) -> Node:
        """Keep values in range: tanh after anything that may grow."""
        return self.op("tanh", x)

    def full(self, value: Any, shape: tuple[int, ...], dtype: Any = F32) -> Node:
        c = self.b.const(value, dtype)
        return self.op("broadcast_to", c, shape=shape) if shape else c

    def like(self, x: Node) -> Node:
        """Another value of the shape of ``x``, made by views if need be."""
        y = self.pick()
        if y.shape == x.shape:
            return y
        if y.size == x.size:
            return self.op("reshape", y, shape=x.shape)
        extra = len(x.shape) - len(y.shape)
        if extra >= 0 and all(a in (1, b) for a, b in zip(y.shape, x.shape[extra:], strict=True)):
            return self.op("broadcast_to", y, shape=x.shape)
        if x.shape and self.rng.random() < 0.5:
            axis = int(self.rng.integers(len(x.shape)))
            r = self.op("sum", x, axes=(axis,))
            kept = tuple(1 if i == axis else n for i, n in enumerate(x.shape))
            return self.tame(self.op("broadcast_to", self.op("reshape", r, shape=kept), shape=x.shape))
        return self.full(0.5, x.shape)

    def axes(self, x: Node) -> tuple[int, ...]:
        n = len(x.shape)
        k = int(self.rng.integers(1, n + 1))
        return tuple(sorted(int(a) for a in self.rng.choice(n, k, replace=False)))

    def step(self) -> Node | None:
        x = self.pick()
        kind = int(self.rng.integers(16))
        if kind <= 1:
            name = str(self.rng.choice(UNARY))
            if name in ("exp", "reciprocal", "sqrt"):
                x = self.op("add", self.op("abs", self.tame(x)), self.full(0.5, x.shape))
            return self.op(name, x)
        if kind <= 4:
            name = str(self.rng.choice(BINARY))
            y = self.like(x)
            if name == "div":
                y = self.op("add", self.op("abs", y), self.full(0.5, y.shape))
            return self.tame(self.op(name, x, y))
        if kind == 5:
            y = self.like(x)
            return self.op("where", self.op("less", x, y), y, x)
        if not x.shape:
            return self.op("broadcast_to", x, shape=self.shape())
        if kind in (6, 7):
            return self.tame(self.op(str(self.rng.choice(REDUCE)), x, axes=self.axes(x)))
        if kind == 8:
            m = self.op("max", x, axes=(len(x.shape) - 1,))
            kept = (*x.shape[:-1], 1)
            e = self.op(
                "exp",
                self.op("sub", x, self.op("broadcast_to", self.op("reshape", m, shape=kept), shape=x.shape)),
            )
            s = self.op("reshape", self.op("sum", e, axes=(len(x.shape) - 1,)), shape=kept)
            return self.op("div", e, self.op("broadcast_to", s, shape=x.shape))
        if kind == 9:
            return self.view(x)
        if kind == 10:
            return self.product(x)
        if kind == 11:
            return self.gather(x)
        if kind == 12:
            return self.padded(x)
        if kind == 13:
            axis = int(self.rng.integers(len(x.shape)))
            parts = [x, self.like(x)] + ([self.op("neg", x)] if self.rng.random() < 0.3 else [])
            return self.op("concatenate", *parts, axis=axis)
        if kind == 14:
            axis = int(self.rng.integers(len(x.shape)))
            name = str(self.rng.choice(("cumsum", "sort", "argmax", "iota")))
            if name == "cumsum":
                return self.tame(self.op("cumsum", x, axis=axis, reverse=False))
            if name == "sort":
                return self.op("sort", x, axis=axis)
            if name == "iota":
                i = self.op("iota", shape=x.shape, axis=axis, dtype=F32)
                return self.tame(self.op("add", i, x))
            return self.op("convert", self.op("argmax", x, axis=axis), dtype=F32)
        return self.view(self.view(x))

    def view(self, x: Node) -> Node:
        n = len(x.shape)
        kind = int(self.rng.integers(5))
        if kind == 0 and n:
            return self.op("transpose", x, perm=tuple(int(i) for i in self.rng.permutation(n)))
        if kind == 1:
            factors = []
            rest = x.size
            while rest > 1 and len(factors) < 4:
                f = int(self.rng.choice([f for f in range(1, rest + 1) if rest % f == 0]))
                factors.append(f)
                rest //= f
            return self.op("reshape", x, shape=(*factors, rest))
        if kind == 2 and n:
            start = tuple(int(self.rng.integers(0, s)) for s in x.shape)
            stop = tuple(int(self.rng.integers(a + 1, s + 1)) for a, s in zip(start, x.shape, strict=True))
            step = tuple(int(self.rng.integers(1, 3)) for _ in x.shape)
            return self.op("slice", x, start=start, stop=stop, step=step)
        if kind == 3 and n:
            return self.op("flip", x, axes=self.axes(x))
        return self.op("broadcast_to", x, shape=(int(self.rng.choice((2, 3))), *x.shape))

    def padded(self, x: Node) -> Node:
        low = tuple(int(i) for i in self.rng.integers(0, 3, len(x.shape)))
        high = tuple(int(i) for i in self.rng.integers(0, 2, len(x.shape)))
        interior = tuple(int(i) for i in self.rng.integers(0, 2, len(x.shape)))
        if self.rng.random() < 0.6:
            interior = (0,) * len(x.shape)
        p = self.op("pad", x, low=low, high=high, interior=interior, value=float(self.rng.choice((0.0, 1.0))))
        if self.rng.random() < 0.4 and x.shape[0] > 1:  # the gradient of two slices
            a = self.op(
                "pad",
                x,
                low=(0,) * len(x.shape),
                high=(x.shape[0], *(0,) * (len(x.shape) - 1)),
                interior=(0,) * len(x.shape),
                value=0.0,
            )
            b = self.op(
                "pad",
                self.like(x),
                low=(x.shape[0], *(0,) * (len(x.shape) - 1)),
                high=(0,) * len(x.shape),
                interior=(0,) * len(x.shape),
                value=0.0,
            )
            return self.op("add", a, b)
        return p

    def product(self, x: Node) -> Node:
        n = len(x.shape)
        k = x.shape[-1]
        batch = n >= 3 and self.rng.random() < 0.5
        columns = int(self.rng.choice(SIZES))
        shape = (x.shape[0], k, columns) if batch else (k, columns)
        w = self.add_input(shape)
        w = self.op("tanh", w) if self.rng.random() < 0.3 else w
        if self.rng.random() < 0.4:
            perm = (0, 2, 1) if batch else (1, 0)
            w = self.op(
                "transpose", self.add_input((shape[0], columns, k) if batch else (columns, k)), perm=perm
            )
        rhs = (1,) if batch else (0,)
        y = self.op(
            "dot_general",
            x,
            w,
            lhs_batch=(0,) if batch else (),
            rhs_batch=(0,) if batch else (),
            lhs_contract=(n - 1,),
            rhs_contract=rhs,
        )
        return self.tame(y)

    def gather(self, x: Node) -> Node:
        axis = int(self.rng.integers(len(x.shape)))
        kind = int(self.rng.integers(3))
        if kind == 0:
            shape = self.shape()
            idx = self.add_input(shape, I64, self.rng.integers(-x.shape[axis], x.shape[axis], shape))
            return self.op("take", x, idx, axis=axis)
        shape = tuple(1 if i == axis else s for i, s in enumerate(x.shape))
        idx = self.add_input(shape, I64, self.rng.integers(-x.shape[axis] - 1, x.shape[axis] + 1, shape))
        if kind == 1:
            return self.op("take_along_axis", x, idx, axis=axis)
        upd = self.op("take_along_axis", self.like(x), idx, axis=axis)
        return self.tame(self.op("scatter_add_along_axis", x, idx, upd, axis=axis))
