"""Clusters become kernels with buffers: loop bodies, contractions with epilogues, op kernels, attention.

Called by ``lower``. Buffer ids are given on first use; the memory plan comes later.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from tracejit.lower import affine, costs
from tracejit.lower.attention import attention_kernel
from tracejit.lower.cluster import Cluster, operand_maps
from tracejit.lower.coalesce import coalesce, coalesce_contract, rewrite
from tracejit.lower.emit import BodyEmitter, accumulator
from tracejit.lower.fusion import Fusion
from tracejit.lower.layout import Place, memory_of, place_of
from tracejit.lower.values import DOT, LEAF, PROJ, Value
from tracejit.program import (
    Access,
    Buffer,
    Contract,
    ContractKernel,
    Instr,
    Kernel,
    LoopBody,
    LoopKernel,
    OpKernel,
)


class Unfusable(Exception):
    """These graph nodes must be stored by themselves: an epilogue does not line up, or a kernel binds too much."""

    def __init__(self, *nids: int) -> None:
        super().__init__(*nids)
        self.nids = frozenset(nids)


class KernelBuilder:
    """Turns clusters into kernels and hands out buffer ids."""

    def __init__(self, fusion: Fusion) -> None:
        self.fusion = fusion
        self.buffers: list[Buffer] = []
        self.ids: dict[Value, int] = {}
        self.constants: list[np.ndarray] = []
        prepared = fusion.prepared
        for i, v in enumerate(prepared.inputs):
            self._add(v, "input", i)
        self.outputs: list[int] = []
        for i, v in enumerate(prepared.outputs):
            root = memory_of(v, fusion)
            if root not in self.ids and root.kind != LEAF:
                self._add(root, "output", i, shape=v.shape)
            self.outputs.append(self.id_of(root))

    def _add(self, v: Value, kind: Any, index: int = -1, shape: tuple[int, ...] | None = None) -> int:
        i = len(self.buffers)
        size = v.size * v.parts
        self.buffers.append(Buffer(i, size, v.dtype, kind, index, None, v.shape if shape is None else shape))
        self.ids[v] = i
        return i

    def id_of(self, root: Value) -> int:
        """The buffer of a root value."""
        found = self.ids.get(root)
        if found is not None:
            return found
        if root.op == "literal":
            array = np.ascontiguousarray(root.attrs["value"].array)
            self.constants.append(array)
            return self._add(root, "const", len(self.constants) - 1)
        return self._add(root, "temp")

    # -- one cluster -------------------------------------------------------------------------------

    def kernel(self, c: Cluster) -> Kernel | None:
        """The kernel of a cluster, or None if it writes nothing."""
        if c.kind == "op":
            return self.op_kernel(c)
        if c.kind == "attention":
            return attention_kernel(self, c)
        if c.contract is not None:
            return self.contract_kernel(c) if c.contract.kind == DOT else self.conv_kernel(c)
        body = BodyEmitter(c, c.axes, self.fusion, self.id_of).body()
        if not any(i.op == "store" for i in body.instrs):
            return None
        body = coalesce(body)
        return costs.finish(LoopKernel(self.name(c), self.nodes(c), (), (), bodies=(body,)), self.buffers)

    def nodes(self, c: Cluster) -> tuple[int, ...]:
        """Graph nodes that a cluster covers."""
        covered = {v.nid for v in c.members}
        if c.contract is not None:
            covered.add(c.contract.nid)
            region = self.fusion.regions.get(c.contract)
            if region is not None:
                covered.update(v.nid for v in region.members)
        covered.discard(-1)
        return tuple(sorted(covered))

    def name(self, c: Cluster) -> str:
        """A readable name: what the kernel is, and its most telling ops."""
        return costs.kernel_name(c)

    # -- contractions ------------------------------------------------------------------------------

    def dim_axes(self, c: Cluster, v: Value) -> list[list[int]]:
        """For each axis of product ``v`` the axes of its epilogue cluster that walk it, outer to inner."""
        (m,) = v.maps[c]
        return [[a for a, _ in sorted(e[1], key=lambda t: -t[1])] for e in m[0]]

    def contract_kernel(self, c: Cluster) -> Kernel:
        """A product with its epilogue."""
        v = c.contract
        assert v is not None
        region = self.fusion.regions[v]
        dims = self.dim_axes(c, v)
        at = v.attrs
        nb = len(at["lhs_batch"])
        nm = len(v.inputs[0].shape) - nb - len(at["lhs_contract"])
        names = ["batch"] * nb + ["m"] * nm + ["n"] * (len(v.shape) - nb - nm)
        # Refine both sides to common factors, group by group (adjacent axes of a group are one run).
        for name in ("batch", "m", "n"):
            mine = [a for d, n in zip(dims, names, strict=True) if n == name for a in d]
            refine(c, mine, region, region.groups[name], v)
        dims = self.dim_axes(c, v)
        order = {
            name: [a for d, n in zip(dims, names, strict=True) if n == name for a in d]
            for name in ("batch", "m", "n")
        }
        if [c.sizes[a] for n in order for a in order[n]] != [
            region.sizes[a] for n in order for a in region.groups[n]
        ]:
            raise Unfusable(v.nid)
        body = BodyEmitter(c, [a for n in order for a in order[n]], self.fusion, self.id_of).body()
        axes = [a for n in ("batch", "m", "n", "k") for a in region.groups[n]]
        left, right = self.operand(region, "a", axes), self.operand(region, "b", axes)
        sizes = {n: tuple(region.sizes[a] for a in region.groups[n]) for n in region.groups}
        problem = Contract(
            sizes["batch"], sizes["m"], sizes["n"], sizes["k"], left, right, body, accumulator(v)
        )
        problem = coalesce_contract(problem)
        if v.parts > 1:
            at_k = next((i for i, n in enumerate(problem.k) if n % v.parts == 0), None)
            if at_k is None:
                raise Unfusable(v.nid)
            problem = split_k(problem, v.parts, v.size, at_k)
        return costs.finish(
            ContractKernel(self.name(c), self.nodes(c), (), (), problems=(problem,)), self.buffers
        )

    def operand(self, region: Cluster, role: str, axes: Sequence[int]) -> Access:
        """The address of an operand over the region's axes."""
        x, m = region.roles[role]
        while x in region.members:
            ((x, m),) = operand_maps(region, x, m)
        return address(self, place_of(x, self.fusion), m, axes)

    def conv_kernel(self, c: Cluster) -> Kernel:
        """A convolution with its epilogue over the result's shape."""
        v = c.contract
        assert v is not None
        dims = self.dim_axes(c, v)
        if any(len(d) != (n != 1) for d, n in zip(dims, v.shape, strict=True)):
            raise Unfusable(v.nid)
        order = []
        for d in dims:
            order.append(d[0] if d else c.new_axis(1))
        body = BodyEmitter(c, order, self.fusion, self.id_of).body()
        body = rewrite(body, [[a] for a in range(len(order))])
        stores = [i for i in body.instrs if i.op == "store"]
        operands = tuple((self.contiguous(x), x.shape) for x in v.inputs)
        results = tuple((s.attrs["access"].buffer, v.shape) for s in stores)
        plain = len(body.instrs) == 2 and stores[0].attrs["access"].strides == affine.contiguous(v.shape)
        kernel = OpKernel(
            self.name(c), self.nodes(c), (), (), op=v.op, attrs=v.attrs, operands=operands,
            results=results if plain else ((-1, v.shape),), epilogue=None if plain else body,
        )  # fmt: skip
        return costs.finish(kernel, self.buffers)

    # -- op kernels --------------------------------------------------------------------------------

    def contiguous(self, v: Value) -> int:
        """The buffer that holds exactly ``v``."""
        return self.id_of(memory_of(v, self.fusion))

    def op_kernel(self, c: Cluster) -> Kernel:
        """An op on whole buffers."""
        v = c.contract
        assert v is not None
        operands = tuple((self.contiguous(x), x.shape) for x in v.inputs)
        attrs = dict(v.attrs)
        avals = attrs.pop("avals", None)
        results: tuple[tuple[int, tuple[int, ...]], ...]
        if v.op == "print":
            results = ()
        elif avals is not None:
            by_index = {u.attrs["index"]: u for u in v.users if u.kind == PROJ}
            found = []
            for i, (shape, dtype) in enumerate(avals):
                u = by_index.get(i)
                if u is None:  # nobody reads this result, but the op writes it
                    u = Value("proj", PROJ, (v,), {"index": i}, tuple(shape), dtype, v.nid)
                    found.append((self._add(u, "temp"), u.shape))
                else:
                    found.append((self.contiguous(u), u.shape))
            results = tuple(found)
        else:
            results = ((self.contiguous(v), v.shape),)
        for key in [k for k in attrs if k.endswith("_graph")]:
            from tracejit.lower import lower

            attrs[key.removesuffix("_graph") + "_program"] = lower(attrs[key], self.fusion.caps)
        kernel = OpKernel(
            self.name(c), self.nodes(c), (), (), op=v.op, attrs=attrs, operands=operands, results=results
        )
        return costs.finish(kernel, self.buffers)


def address(builder: KernelBuilder, place: Place, m: affine.Map, axes: Sequence[int]) -> Access:
    """The access of an index map into a place, over ``axes``."""
    total = affine.shift(m[0][0], place.offset) if m[2] else (place.offset, (), ())
    if not m[2]:
        for e, s in zip(m[0], place.strides, strict=True):
            total = affine.add(total, affine.scale(e, s))
    terms = dict(total[1])
    return Access(builder.id_of(place.root), tuple(terms.get(a, 0) for a in axes), total[0])


def refine(c: Cluster, mine: list[int], region: Cluster, other: list[int], v: Value) -> None:
    """Split axes of both sides (innermost first) until the sizes agree; Unfusable if they cannot."""
    left, right = list(mine), list(other)
    while left and right:
        a, b = left[-1], right[-1]
        x, y = c.sizes[a], region.sizes[b]
        if x == y:
            left.pop()
            right.pop()
        elif x % y == 0:
            left[-1:] = split_axis(c, a, y)
        elif y % x == 0:
            right[-1:] = split_axis(region, b, x)
        else:
            raise Unfusable(v.nid)
    if left or right:
        raise Unfusable(v.nid)


def split_axis(c: Cluster, axis: int, inner: int) -> list[int]:
    """Split and return the new (outer, inner) ids."""
    c.split(axis, inner)
    return [len(c.sizes) - 2, len(c.sizes) - 1]


def split_k(p: Contract, parts: int, size: int, at_k: int) -> Contract:
    """The same product as ``parts`` partial sums over pieces of k axis ``at_k``, stored one after the other."""
    outer = p.k[at_k] // parts
    at = len(p.batch) + len(p.m) + len(p.n) + at_k

    def operand(a: Access) -> Access:
        return Access(a.buffer, (a.strides[at] * outer, *a.strides), a.offset)

    instrs = []
    for i in p.epilogue.instrs:
        axes = (0, *(a + 1 for a in i.axes))
        attrs: Any = i.attrs
        if i.op == "store":
            old: Access = attrs["access"]
            attrs = {"access": Access(old.buffer, (size, *old.strides), old.offset)}
        instrs.append(Instr(i.op, i.args, i.dtype, axes, attrs, i.node))
    body = LoopBody((parts, *p.epilogue.domain), tuple(instrs))
    return replace(
        p,
        batch=(parts, *p.batch),
        k=(*p.k[:at_k], outer, *p.k[at_k + 1 :]),
        a=operand(p.a),
        b=operand(p.b),
        epilogue=body,
    )
