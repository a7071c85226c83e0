"""Clusters become loop bodies: one SSA instruction per value and index map, loads and stores with affine addresses.

Called by ``kernels.py``. Axis ids of a cluster become positions of the body's domain in the given order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

import numpy as np

from tracejit.dtypes import BOOL, INT64, DType
from tracejit.lower import affine
from tracejit.lower.affine import Expr, Map
from tracejit.lower.cluster import Cluster, concat_parts, operand_maps
from tracejit.lower.fusion import Fusion
from tracejit.lower.layout import Place, is_stored, place_of
from tracejit.lower.values import CONST, DOT, GATHER_OPS, MAP, REDUCE, VIEW, Value
from tracejit.program import Access, LoopBody

_SPECIAL = GATHER_OPS | {"identity", "convert"}


class Raw(NamedTuple):
    """An instruction under construction: the fields of ``Instr``, several times cheaper to make."""

    op: str
    args: tuple[int, ...]
    dtype: DType
    axes: tuple[int, ...]
    attrs: Mapping[str, Any]
    node: int


class BodyEmitter:
    """Emits one body. ``buffer_ids`` gives the buffer id of a root value."""

    def __init__(self, cluster: Cluster, order: Sequence[int], fusion: Fusion, buffer_ids: Any) -> None:
        self.c = cluster
        self.order = list(order)
        self.position = {a: i for i, a in enumerate(self.order)}
        self.fusion = fusion
        self.buffer_ids = buffer_ids
        self.instrs: list[Any] = []
        self.memo: dict[Any, int] = {}
        self.reduced = frozenset(self.position[a] for a in (cluster.red or ()))

    # -- instructions ------------------------------------------------------------------------------

    def emit(
        self,
        op: str,
        args: tuple[int, ...],
        dtype: DType,
        attrs: Mapping[str, Any] | None = None,
        *,
        key: Any = None,
        axes: tuple[int, ...] | None = None,
        node: int = -1,
    ) -> int:
        """Append an instruction, or find an equal one."""
        full = (op, args, dtype, key)
        found = self.memo.get(full)
        if found is not None:
            return found
        if axes is None:
            instrs = self.instrs
            axes = instrs[args[0]].axes
            for i in args:
                if instrs[i].axes != axes:
                    axes = tuple(sorted({a for i in args for a in instrs[i].axes}))
                    break
        self.instrs.append(Raw(op, args, dtype, axes, attrs or {}, node))
        self.memo[full] = len(self.instrs) - 1
        return len(self.instrs) - 1

    def const(self, value: Any, dtype: DType) -> int:
        """A constant."""
        return self.emit("const", (), dtype, {"value": value}, key=(str(value), type(value)), axes=())

    def index(self, e: Expr) -> int:
        """An affine expression as an int64 value."""
        total: int | None = None
        for a, s in e[1]:
            p = self.position[a]
            i = self.emit("index", (), INT64, {"axis": p}, key=p, axes=(p,))
            if s != 1:
                i = self.emit("mul", (i, self.const(s, INT64)), INT64)
            total = i if total is None else self.emit("add", (total, i), INT64)
        for v, m, s, n in e[2]:
            i = self.gathered(v, m, n)
            if s != 1:
                i = self.emit("mul", (i, self.const(s, INT64)), INT64)
            total = i if total is None else self.emit("add", (total, i), INT64)
        if total is None:
            return self.const(e[0], INT64)
        return self.emit("add", (total, self.const(e[0], INT64)), INT64) if e[0] else total

    def gathered(self, v: Value, m: Map, n: int) -> int:
        """An index value brought into ``0 <= i < n``: negative ones count from the end, then clipped."""
        i = self.value(v, m)
        size, zero = self.const(n, INT64), self.const(0, INT64)
        wrapped = self.emit(
            "where", (self.emit("less", (i, zero), BOOL), self.emit("add", (i, size), INT64), i), INT64
        )
        low = self.emit("maximum", (wrapped, zero), INT64)
        return self.emit("minimum", (low, self.const(n - 1, INT64)), INT64)

    def predicate(self, preds: Sequence[Any]) -> int | None:
        """The conjunction of range checks, or None if they always hold."""
        total: int | None = None
        for e, low, high in preds:
            bottom, top = affine.bounds(e, self.c.sizes)
            checks = []
            if bottom < low:
                checks.append(self.emit("greater_equal", (self.index(e), self.const(low, INT64)), BOOL))
            if top >= high:
                checks.append(self.emit("less", (self.index(e), self.const(high, INT64)), BOOL))
            for i in checks:
                total = i if total is None or total == i else self.emit("bitwise_and", (total, i), BOOL)
        return total

    def access(self, place: Place, exprs: Sequence[Expr], flat: bool) -> tuple[Expr, Access]:
        """The address of an index into a place: as an expression, and as an Access without its gathers."""
        total: Expr = (place.offset, (), ())
        if flat:
            total = affine.shift(exprs[0], place.offset)
        else:
            for e, s in zip(exprs, place.strides, strict=True):
                if e != affine.ZERO:
                    total = affine.add(total, affine.scale(e, s))
        strides = [0] * len(self.order)
        for a, s in total[1]:
            strides[self.position[a]] = s
        return total, Access(self.buffer_ids(place.root), tuple(strides), total[0])

    def unravelled(
        self, e: Expr, shape: Sequence[int], strides: Sequence[int]
    ) -> tuple[tuple[int, int, int], ...]:
        """The row-major position ``e`` in an array that does not lie in that order (a transpose of it is an output too)."""
        at, inner = self.index(e), prod(shape)
        out = []
        for axis, (n, stride) in enumerate(zip(shape, strides, strict=True)):
            inner //= n
            if n == 1:
                continue
            i = at if inner == 1 else self.emit("floordiv", (at, self.const(inner, INT64)), INT64)
            if axis:
                i = self.emit("mod", (i, self.const(n, INT64)), INT64)
            out.append((i, stride, n))
        return tuple(out)

    def load(self, v: Value, m: Map, fill: Any = 0) -> int:
        """Read ``v`` from memory; partial sums of a split contraction are added up."""
        place = place_of(v, self.fusion)
        gather: tuple[tuple[int, int, int], ...]
        if m[2] and not affine.same_layout(v.shape, place.strides, affine.contiguous(v.shape)):
            access = Access(self.buffer_ids(place.root), (0,) * len(self.order), place.offset)
            gather = self.unravelled(m[0][0], v.shape, place.strides)
        else:
            total, access = self.access(place, m[0], m[2])
            gather = tuple((self.gathered(x, xm, n), s, n) for x, xm, s, n in total[2])
        predicate = self.predicate(m[1])
        attrs: dict[str, Any] = {"access": access}
        axes = {i for i, s in enumerate(access.strides) if s}
        for g, _, _ in gather:
            axes.update(self.instrs[g].axes)
        if gather:
            attrs["gather"] = gather
        if predicate is not None:
            fill = np.asarray(fill).astype(v.dtype).item()
            attrs |= {"predicate": predicate, "fill": fill}
            axes.update(self.instrs[predicate].axes)
        where = tuple(sorted(axes))
        key = (access, gather, predicate, str(fill) if predicate is not None else None)
        result = self.emit("load", (), v.dtype, attrs, key=key, axes=where, node=v.nid)
        for part in range(1, v.parts):
            shifted = Access(access.buffer, access.strides, access.offset + part * v.size)
            more = self.emit(
                "load",
                (),
                v.dtype,
                {**attrs, "access": shifted},
                key=(shifted, gather, predicate),
                axes=where,
                node=v.nid,
            )
            result = self.emit("add", (result, more), v.dtype, node=v.nid)
        return result

    # -- values ------------------------------------------------------------------------------------

    def value(self, v: Value, m: Map) -> int:
        """The instruction that holds ``v`` at ``m``."""
        if v.kind == CONST:
            return self.const(v.scalar, v.dtype)
        key = (v, m)
        found = self.memo.get(key)
        if found is None:
            if v not in self.c.members:
                found = self.acc(v) if v is self.c.contract else self.load(v, m)
            else:
                found = self.compute(v, m)
            self.memo[key] = found
        return found

    def acc(self, v: Value) -> int:
        """The accumulator of the product whose epilogue this is."""
        wide = accumulator(v)
        i = self.emit("acc", (), wide, axes=tuple(range(len(self.order))), node=v.nid)
        return (
            i
            if wide == v.dtype
            else self.emit("convert", (i,), v.dtype, {"dtype": v.dtype}, key=v.dtype, node=v.nid)
        )

    def compute(self, v: Value, m: Map) -> int:
        """Emit the instruction of ``v``."""
        op = v.op
        if v.kind == VIEW:
            return self.view(v, m)
        if v.kind == MAP and op not in _SPECIAL:
            positions = tuple([self.value(x, m) for x in v.inputs])
            key = tuple(sorted((k, str(x)) for k, x in v.attrs.items())) if v.attrs else None
            return self.emit(op, positions, v.dtype, v.attrs, key=key, node=v.nid)
        if op == "identity":
            return self.value(v.inputs[0], m)
        if op == "iota":
            i = self.index(m[0][v.attrs["axis"]])
            return (
                i
                if v.dtype == INT64
                else self.emit("convert", (i,), v.dtype, {"dtype": v.dtype}, key=v.dtype)
            )
        args = operand_maps(self.c, v, m)
        if op in ("take", "take_along_axis"):
            return self.value(*args[1])
        positions = tuple(self.value(x, xm) for x, xm in args)
        if op == "random_bits":
            e = m[0][0] if m[2] else affine.linear(m[0], v.shape)
            strides = [0] * len(self.order)
            for a, s in e[1]:
                strides[self.position[a]] = s
            axes = {i for i, s in enumerate(strides) if s} | {
                a for p in positions for a in self.instrs[p].axes
            }
            counter = tuple(strides)
            return self.emit(
                op,
                positions,
                v.dtype,
                {"strides": counter},
                key=counter,
                axes=tuple(sorted(axes)),
                node=v.nid,
            )
        if v.kind == REDUCE:
            axes_left = tuple(a for a in self.instrs[positions[0]].axes if a not in self.reduced)
            return self.emit("reduce", positions, v.dtype, {"kind": op}, key=op, axes=axes_left, node=v.nid)
        assert op == "convert", op
        return self.emit(op, positions, v.dtype, {"dtype": v.dtype}, key=v.dtype, node=v.nid)

    def view(self, v: Value, m: Map) -> int:
        """Views only change where operands are read; pads and concatenations select."""
        x = v.inputs[0]
        if x.kind == CONST and v.op != "pad":
            return self.const(x.scalar, x.dtype)
        if v.op == "concatenate":
            parts = list(zip(operand_maps(self.c, v, m), concat_parts(v, m[0][v.attrs["axis"]]), strict=True))
            result = self.value(*parts[-1][0])
            for (x, xm), (_, (e, _, high), _) in reversed(parts[:-1]):
                inside = self.emit("less", (self.index(e), self.const(high, INT64)), BOOL)
                result = self.emit("where", (inside, self.value(x, xm), result), v.dtype, node=v.nid)
            return result
        if v.op == "pad":
            wanted = operand_maps(self.c, v, m)
            if not wanted:
                checks = []
                for e, low, n in zip(m[0], v.attrs["low"], x.shape, strict=True):
                    checks.append((affine.shift(e, -low), 0, n))
                inside_x, xm = self.const(x.scalar, x.dtype), (None, tuple(checks))
            else:
                x, xm = wanted[0]
                if x not in self.c.members and x is not self.c.contract:
                    return self.load(x, xm, v.attrs["value"])
                inside_x = self.value(x, xm)
            predicate = self.predicate(xm[1])
            if predicate is None:
                return inside_x
            fill = self.const(np.asarray(v.attrs["value"]).astype(v.dtype).item(), v.dtype)
            return self.emit("where", (predicate, inside_x, fill), v.dtype, node=v.nid)
        return self.value(*operand_maps(self.c, v, m)[0])

    def store(self, v: Value) -> None:
        """Write ``v``, whose home this cluster is."""
        (m,) = v.maps[self.c]
        value = self.value(v, m)
        place = place_of(v, self.fusion)
        _, access = self.access(place, m[0], False)
        axes = {i for i, s in enumerate(access.strides) if s} | set(self.instrs[value].axes)
        self.instrs.append(Raw("store", (value,), v.dtype, tuple(sorted(axes)), {"access": access}, v.nid))

    def body(self) -> LoopBody:
        """The body, of raw instructions: ``coalesce`` makes the final ones."""
        members = sorted(self.c.members, key=lambda v: v.index)
        for v in members:
            for m in v.maps[self.c]:
                self.value(v, m)
        homes = [v for v in self.c.reads if v.home is self.c and is_stored(v)]
        for v in sorted(homes, key=lambda v: v.index):
            self.store(v)
        domain = tuple(self.c.sizes[a] for a in self.order)
        return LoopBody(domain, prune(tuple(self.instrs)), tuple(sorted(self.reduced)))


def accumulator(v: Value) -> DType:
    """The type in which a product is summed up."""
    return np.dtype(np.float32) if v.kind == DOT and v.dtype == np.float16 else v.dtype


def prune(instrs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Drop instructions that no store needs."""
    used = [False] * len(instrs)
    for i in range(len(instrs) - 1, -1, -1):
        ins = instrs[i]
        if ins.op == "store":
            used[i] = True
        if used[i]:
            for a in arguments(ins):
                used[a] = True
    if all(used):
        return instrs
    new: dict[int, int] = {}
    out: list[Any] = []
    for i, ins in enumerate(instrs):
        if used[i]:
            new[i] = len(out)
            out.append(renumber(ins, new))
    return tuple(out)


def arguments(ins: Any) -> list[int]:
    """All instructions that ``ins`` reads, through gathers and predicates too."""
    out = list(ins.args)
    if ins.op == "load":
        out += [g for g, _, _ in ins.attrs.get("gather", ())]
        if "predicate" in ins.attrs:
            out.append(ins.attrs["predicate"])
    return out


def renumber(ins: Any, new: Mapping[int, int]) -> Any:
    """``ins`` with argument positions mapped."""
    attrs = ins.attrs
    if ins.op == "load" and ("gather" in attrs or "predicate" in attrs):
        attrs = dict(attrs)
        if "gather" in attrs:
            attrs["gather"] = tuple((new[g], s, n) for g, s, n in attrs["gather"])
        if "predicate" in attrs:
            attrs["predicate"] = new[attrs["predicate"]]
    return Raw(ins.op, tuple(new[a] for a in ins.args), ins.dtype, ins.axes, attrs, ins.node)
