"""Loop bodies in the form the emitters want: local buffers, merged axes, levels, and the emission of single instructions.

``localize`` turns a :class:`tracejit.program.LoopBody` into a :class:`Local`; :class:`Emitter` emits its instructions at
a given position of a loop nest. Called by ``loops.py`` (whole nests) and ``gemm.py``/``conv.py`` (epilogues).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tracejit.program import Access, LoopBody
from tracejit_cpu import mathlib
from tracejit_cpu.irbuilder import Fn, const, iota, memory_type, type_bytes, value_type, vec
from tracejit_cpu.signs import nonpositive

ARG = ("argmax", "argmin")
# operations whose results are float16 numbers if their operands are
_EXACT_IN_FLOAT16 = frozenset(
    {"load", "const", "identity", "stop_gradient", "convert", "where", "maximum", "minimum"}
    | {"neg", "abs", "sign", "copysign", "floor", "ceil", "rint", "trunc"}
)


@dataclass
class Ins:
    """An instruction with its access resolved to a local buffer and its axes recomputed on the merged domain."""

    op: str
    args: tuple[int, ...]
    dtype: np.dtype
    axes: frozenset[int] = frozenset()
    attrs: dict[str, Any] = field(default_factory=dict)
    buffer: int = -1
    strides: tuple[int, ...] = ()
    offset: int = 0
    gather: tuple[tuple[int, int, int], ...] = ()
    predicate: int = -1


@dataclass
class Local:
    """A loop body over merged axes. ``buffers`` are program buffer ids; ``dtypes`` their element types."""

    domain: tuple[int, ...]
    reduce: frozenset[int]
    instrs: list[Ins]
    buffers: list[int]
    dtypes: list[np.dtype]
    rstrides: dict[int, int]  # axis -> stride of the linear position over the reduce axes

    def key(self) -> str:
        """Bodies with equal keys compile to the same code."""
        return repr((self.domain, sorted(self.reduce), self.instrs, [d.name for d in self.dtypes]))


def _access_rows(body: LoopBody) -> list[tuple[int, ...]]:
    rows = []
    for ins in body.instrs:
        if "access" in ins.attrs:
            rows.append(tuple(ins.attrs["access"].strides))
        if ins.op == "random_bits":
            rows.append(tuple(ins.attrs["strides"]))
    return rows


def merge_axes(body: LoopBody, keep: Sequence[int] = ()) -> list[list[int]]:
    """Groups of adjacent axes that behave as one; axes of size 1 vanish. ``keep`` are first axes of forced group starts."""
    rows = _access_rows(body)
    indexed = {ins.attrs["axis"] for ins in body.instrs if ins.op == "index"}
    groups: list[list[int]] = []
    last = -1
    for axis, size in enumerate(body.domain):
        if size == 1 and axis not in keep:
            continue
        same = (
            bool(groups)
            and axis not in keep
            and not (indexed & {axis, last})
            and (last in body.reduce_axes) == (axis in body.reduce_axes)
            and all(r[last] == r[axis] * size for r in rows)
        )
        if same and all(groups[-1][0] <= k or k > axis for k in keep):
            groups[-1].append(axis)
        else:
            groups.append([axis])
        last = axis
    return groups


def localize(
    body: LoopBody,
    dtype_of: Callable[[int], np.dtype],
    groups: list[list[int]] | None = None,
    resolve: bool = True,
) -> Local:
    """Rewrite ``body`` onto merged axes and local buffer numbers."""
    groups = merge_axes(body) if groups is None else groups
    domain = tuple(int(np.prod([body.domain[a] for a in g], dtype=np.int64)) for g in groups)
    where = {a: i for i, g in enumerate(groups) for a in g}
    reduce = frozenset(i for i, g in enumerate(groups) if g[0] in body.reduce_axes)
    buffers: list[int] = []
    local: dict[int, int] = {}
    out: list[Ins] = []

    def shrink(strides: Sequence[int]) -> tuple[int, ...]:
        return tuple(int(strides[g[-1]]) for g in groups)

    for ins in body.instrs:
        new = Ins(ins.op, tuple(ins.args), ins.dtype)
        axes = set().union(*[out[a].axes for a in ins.args]) if ins.args else set()
        attrs: Mapping[str, Any] = ins.attrs
        if "access" in attrs:
            access: Access = attrs["access"]
            number = local.setdefault(access.buffer, len(local))
            if number == len(buffers):
                buffers.append(access.buffer)
            new.buffer, new.strides, new.offset = number, shrink(access.strides), int(access.offset)
            axes |= {i for i, s in enumerate(new.strides) if s}
            new.gather = tuple((int(a), int(s), int(n)) for a, s, n in attrs.get("gather", ()))
            for position, _, _ in new.gather:
                axes |= out[position].axes
            predicate = attrs.get("predicate")
            if ins.op == "store" and len(ins.args) > 1:
                predicate = ins.args[1]
            if predicate is not None:
                new.predicate = int(predicate)
                axes |= out[new.predicate].axes
                new.attrs["fill"] = attrs.get("fill", 0)
        elif ins.op == "index":
            axis = attrs["axis"]
            if axis in where:
                axes.add(where[axis])
                new.attrs["axis"] = where[axis]
            else:
                new = Ins("const", (), ins.dtype, attrs={"value": 0})
        elif ins.op == "random_bits":
            new.strides = shrink(attrs["strides"])
            axes |= {i for i, s in enumerate(new.strides) if s}
        elif ins.op == "reduce" and not reduce:  # one element: nothing to combine
            if attrs["kind"] in ARG:
                new = Ins("const", (), ins.dtype, attrs={"value": 0})
                axes = set()
            else:
                new = Ins("convert", tuple(ins.args), ins.dtype)
        elif ins.op == "reduce":
            new.attrs["kind"] = attrs["kind"]
            axes -= reduce
        elif ins.op == "acc":
            axes |= set(range(len(domain)))
        elif ins.op == "const":
            new.attrs["value"] = attrs["value"]
        new.axes = frozenset(axes)
        out.append(new)
    rstrides: dict[int, int] = {}
    step = 1
    for axis in sorted(reduce, reverse=True):
        rstrides[axis] = step
        step *= domain[axis]
    return Local(domain, reduce, out, buffers, [dtype_of(b) for b in buffers], rstrides)


def lanes_for(instrs: Sequence[Ins], vector_bytes: int) -> int:
    """How many lanes one vector has: the widest floating type decides, else the widest integer that is in memory."""
    floats = [4 if i.dtype.name == "float16" else i.dtype.itemsize for i in instrs if i.dtype.kind == "f"]
    if floats:
        return vector_bytes // max(floats)
    memory = [i.dtype.itemsize for i in instrs if i.buffer >= 0]
    return (
        vector_bytes // min(max(memory, default=4), 8) if max(memory, default=4) >= 4 else vector_bytes // 4
    )


class Emitter:
    """Emits instructions of a :class:`Local` one by one at the current position of a loop nest.

    The caller sets ``index`` (axis -> i64 value) and, inside the vector loop, ``lane_index`` (one base position per
    unrolled copy) and ``mask`` (a constant lane mask in tails). Values that vary along the vector axis live in
    ``copies[u]``, the others in ``shared``.
    """

    def __init__(self, fn: Fn, local: Local, pointers: Sequence[str], lanes: int, vaxis: int) -> None:
        self.fn, self.local, self.pointers = fn, local, list(pointers)
        self.lanes, self.vaxis = lanes, vaxis
        self.index: dict[int, str] = {}
        self.lane_index: list[str] = []
        self.mask: str | None = None
        self.shared: dict[int, str] = {}
        self.copies: list[dict[int, str]] = []
        self._position: tuple[Any, str] = (None, "")
        self.nonpositive = nonpositive(local) if any(i.op == "exp" for i in local.instrs) else set()

    # -- values -----------------------------------------------------------------------------------------------------
    def is_vector(self, i: int) -> bool:
        """Whether instruction ``i`` has one value per lane."""
        return self.lanes > 1 and self.vaxis in self.local.instrs[i].axes

    def raw(self, i: int, u: int) -> str:
        """The value of ``i``: a vector if it varies along the lanes, else a scalar."""
        return self.shared[i] if i in self.shared else self.copies[u][i]

    def value(self, i: int, u: int, lanes: int) -> str:
        """The value of ``i`` widened to ``lanes``."""
        name = self.raw(i, u)
        if lanes > 1 and not self.is_vector(i):
            return self.fn.splat(name, value_type(self.local.instrs[i].dtype), lanes)
        return name

    def put(self, i: int, u: int, name: str) -> None:
        """Record the value of ``i``.

        float16 is computed in float32 but rounded after every operation, as NumPy does: the same value may be kept in
        memory by one kernel and computed again by another, and must compare equal.
        """
        ins = self.local.instrs[i]
        if ins.dtype.name == "float16" and ins.op not in _EXACT_IN_FLOAT16:
            name = mathlib.round_to_half(self.fn, name, self.lanes if self.is_vector(i) else 1)
        if self.vaxis in self.local.instrs[i].axes:
            self.copies[u][i] = name
        else:
            self.shared[i] = name

    # -- addresses --------------------------------------------------------------------------------------------------
    def linear(self, strides: Sequence[int], offset: int, u: int) -> str:
        """``offset + sum(strides * index)`` at the first lane of copy ``u``.

        Copies lie at constant distances, which an addressing mode holds: copy 0's position is computed once.
        """
        stride = strides[self.vaxis] if 0 <= self.vaxis < len(strides) else 0
        varying = bool(stride) and bool(self.lane_index)
        here = self.lane_index[0] if varying else ""
        key = (tuple(strides), offset, here, tuple(self.index.get(a) for a, s in enumerate(strides) if s))
        if u and varying and self._position[0] == key:
            return self.fn.iadd(self._position[1], u * self.lanes * stride)
        total: str | int = offset
        terms = []
        for axis, step in enumerate(strides):
            if not step:
                continue
            at = self.lane_index[u] if axis == self.vaxis and self.lane_index else self.index[axis]
            terms.append((axis == self.vaxis, self.fn.imul(at, step)))
        for _, term in sorted(terms, key=lambda t: t[0]):
            total = self.fn.iadd(total, term)
        if not u and varying:
            self._position = (key, str(total))
        return str(total)

    def _i64(self, i: int, u: int) -> str:
        """Integer value ``i`` as i64, scalar or vector."""
        ins = self.local.instrs[i]
        lanes = self.lanes if self.is_vector(i) else 1
        return mathlib.convert(self.fn, self.raw(i, u), ins.dtype, np.dtype(np.int64), lanes)

    def _clamped(self, i: int, size: int, u: int) -> str:
        lanes = self.lanes if self.is_vector(i) else 1
        x = self._i64(i, u)
        if not x.startswith(("%", "splat")):
            return x
        n = mathlib.Num(self.fn, "i64", lanes)
        x = n.select(n.cmp("slt", x, n.c(0)), n.c(0), x)
        return n.select(n.cmp("sgt", x, n.c(size - 1)), n.c(size - 1), x)

    def _address(self, ins: Ins, u: int) -> tuple[str, str | None]:
        """(scalar address, per-lane i64 offsets or None when lanes are contiguous or there is one lane)."""
        base = self.linear(ins.strides, ins.offset, u)
        per_lane: str | None = None
        for position, stride, size in ins.gather:
            at = self._clamped(position, size, u)
            if self.is_vector(position):
                n = mathlib.Num(self.fn, "i64", self.lanes)
                term = n.mul(at, n.c(stride)) if stride != 1 else at
                per_lane = term if per_lane is None else n.add(per_lane, term)
            else:
                base = self.fn.iadd(base, self.fn.imul(at, stride))
        return base, per_lane

    def _live_mask(self, ins: Ins, u: int) -> str | None:
        """Lane mask of tail and predicate together; None when every lane is live."""
        lanes = self.lanes
        if ins.predicate < 0:
            return self.mask
        predicate = self.value(ins.predicate, u, lanes)
        if self.mask is None:
            return predicate
        return self.fn.op(f"and <{lanes} x i1> {predicate}, {self.mask}")

    # -- memory -----------------------------------------------------------------------------------------------------
    def _from_memory(self, raw: str, dtype: np.dtype, lanes: int) -> str:
        if dtype.name == "bool":
            return self.fn.op(f"icmp ne {vec('i8', lanes)} {raw}, {const(0, 'i8', lanes)}")
        if dtype.name == "float16":
            return self.fn.op(f"fpext {vec('half', lanes)} {raw} to {vec('float', lanes)}")
        return raw

    def _to_memory(self, value: str, dtype: np.dtype, lanes: int) -> str:
        if dtype.name == "bool":
            return self.fn.op(f"zext {vec('i1', lanes)} {value} to {vec('i8', lanes)}")
        if dtype.name == "float16":
            return self.fn.op(f"fptrunc {vec('float', lanes)} {value} to {vec('half', lanes)}")
        return value

    def _lane_pointers(self, ins: Ins, ty: str, base: str, per_lane: str | None) -> str:
        lanes = self.lanes
        stride = ins.strides[self.vaxis]
        pointer = self.fn.gep(self.pointers[ins.buffer], base, ty)
        offsets = per_lane
        if stride:
            steps = iota("i64", lanes, stride)
            offsets = steps if offsets is None else self.fn.op(f"add <{lanes} x i64> {offsets}, {steps}")
        if offsets is None:
            offsets = const(0, "i64", lanes)
        return self.fn.op(f"getelementptr {ty}, ptr {pointer}, <{lanes} x i64> {offsets}")

    def load(self, i: int, u: int) -> str:
        """Emit a load."""
        ins, fn = self.local.instrs[i], self.fn
        ty = memory_type(ins.dtype)
        fill = ins.attrs.get("fill", 0)
        if not self.is_vector(i):
            base, _ = self._address(ins, u)
            pointer = fn.gep(self.pointers[ins.buffer], base, ty)
            if ins.predicate >= 0:
                dummy = fn.var(ty)
                fn.set(
                    ty,
                    const(fill, ty) if ty != "half" else f"0xH{np.float16(fill).view(np.uint16):04X}",
                    dummy,
                )
                pointer = fn.op(f"select i1 {self.raw(ins.predicate, u)}, ptr {pointer}, ptr {dummy}")
            return self._from_memory(fn.load(ty, pointer), ins.dtype, 1)
        lanes = self.lanes
        base, per_lane = self._address(ins, u)
        stride = ins.strides[self.vaxis]
        mask = self._live_mask(ins, u)
        filler = (
            const(fill, ty, lanes)
            if ty != "half"
            else f"splat (half 0xH{np.float16(fill).view(np.uint16):04X})"
        )
        if per_lane is None and stride == 1:
            pointer = fn.gep(self.pointers[ins.buffer], base, ty)
            raw = (
                fn.load(ty, pointer, lanes)
                if mask is None
                else fn.masked_load(ty, pointer, lanes, mask, filler)
            )
        elif per_lane is None and stride == -1 and mask is None:
            pointer = fn.gep(self.pointers[ins.buffer], fn.iadd(base, 1 - lanes), ty)
            forward = fn.load(ty, pointer, lanes)
            order = ", ".join(f"i32 {lanes - 1 - k}" for k in range(lanes))
            full = vec(ty, lanes)
            raw = fn.op(f"shufflevector {full} {forward}, {full} poison, <{lanes} x i32> <{order}>")
        else:
            pointers = self._lane_pointers(ins, ty, base, per_lane)
            raw = fn.gather(ty, pointers, lanes, mask or const(True, "i1", lanes), filler)
        return self._from_memory(raw, ins.dtype, lanes)

    def store(self, i: int, u: int) -> None:
        """Emit a store."""
        ins, fn = self.local.instrs[i], self.fn
        dtype = self.local.dtypes[ins.buffer]
        ty = memory_type(dtype)
        base, per_lane = self._address(ins, u)
        if not self.is_vector(i):
            value = self._to_memory(self.raw(ins.args[0], u), dtype, 1)
            if ins.predicate >= 0:
                with fn.when(self.raw(ins.predicate, u)):
                    fn.store(ty, value, fn.gep(self.pointers[ins.buffer], base, ty))
            else:
                fn.store(ty, value, fn.gep(self.pointers[ins.buffer], base, ty))
            return
        lanes = self.lanes
        value = self._to_memory(self.value(ins.args[0], u, lanes), dtype, lanes)
        mask = self._live_mask(ins, u)
        if per_lane is None and ins.strides[self.vaxis] == 1:
            pointer = fn.gep(self.pointers[ins.buffer], base, ty)
            if mask is None:
                fn.store(ty, value, pointer, lanes)
            else:
                fn.masked_store(ty, value, pointer, lanes, mask)
        else:
            pointers = self._lane_pointers(ins, ty, base, per_lane)
            fn.scatter(ty, value, pointers, lanes, mask or const(True, "i1", lanes))

    # -- everything else ----------------------------------------------------------------------------------------------
    def emit(self, i: int, u: int) -> None:
        """Emit instruction ``i`` for copy ``u`` (not ``reduce`` and not ``acc``, which the nest handles)."""
        ins, fn = self.local.instrs[i], self.fn
        if ins.op == "store":
            self.store(i, u)
            return
        lanes = self.lanes if self.is_vector(i) else 1
        ty = value_type(ins.dtype)
        if ins.op == "load":
            out = self.load(i, u)
        elif ins.op == "const":
            value = ins.attrs["value"]
            out = const(np.float16(value) if ins.dtype.name == "float16" else value, ty)
        elif ins.op == "index":
            out = self._index(ins, u, lanes, ty)
        elif ins.op == "random_bits":
            out = self._random(ins, u, lanes)
        else:
            args = [self.value(a, u, lanes) for a in ins.args]
            attrs = ins.attrs
            if ins.op == "exp" and ins.args[0] in self.nonpositive:
                attrs = {"nonpositive": True}
            out = mathlib.emit(
                fn, ins.op, args, [self.local.instrs[a].dtype for a in ins.args], ins.dtype, lanes, attrs
            )
        self.put(i, u, out)

    def _index(self, ins: Ins, u: int, lanes: int, ty: str) -> str:
        axis = ins.attrs["axis"]
        fn = self.fn
        at = self.lane_index[u] if axis == self.vaxis and self.lane_index else self.index[axis]
        if ty != "i64":
            at = fn.op(f"trunc i64 {at} to {ty}")
        if lanes == 1:
            return at
        return fn.op(f"add {vec(ty, lanes)} {fn.splat(at, ty, lanes)}, {iota(ty, lanes)}")

    def _random(self, ins: Ins, u: int, lanes: int) -> str:
        """Threefry-2x32 with 20 rounds (Salmon et al., 2011), counter (linear index, 0)."""
        fn = self.fn
        n = mathlib.Num(fn, "i32", lanes)
        k0, k1 = (self.value(a, u, lanes) for a in ins.args)
        at = fn.op(f"trunc i64 {fn.op(f'add i64 {self.linear(ins.strides, 0, u)}, 0')} to i32")
        x0 = fn.splat(at, "i32", lanes)
        if lanes > 1:
            x0 = n.add(x0, iota("i32", lanes, ins.strides[self.vaxis]))
        return threefry(n, k0, k1, x0)[0]


def threefry(n: mathlib.Num, k0: str, k1: str, x0: str, x1: str | None = None) -> tuple[str, str]:
    """Threefry-2x32-20; ``x1`` defaults to a zero counter."""
    x1 = n.c(0) if x1 is None else x1
    keys = [k0, k1, n._two("xor", n._two("xor", k0, k1), n.c(0x1BD11BDA))]
    x0, x1 = n.add(x0, keys[0]), n.add(x1, keys[1])
    rotations = ((13, 15, 26, 6), (17, 29, 16, 24))
    for block in range(5):
        for r in rotations[block % 2]:
            x0 = n.add(x0, x1)
            x1 = n._two("or", n._two("shl", x1, n.c(r)), n._two("lshr", x1, n.c(32 - r)))
            x1 = n._two("xor", x1, x0)
        x0 = n.add(x0, keys[(block + 1) % 3])
        x1 = n.add(n.add(x1, keys[(block + 2) % 3]), n.c(block + 1))
    return x0, x1


def is_full(local: Local, i: int) -> bool:
    """Whether instruction ``i`` runs per element of the reduce axes."""
    return bool(local.instrs[i].axes & local.reduce)


def levels(local: Local) -> list[int]:
    """Dependency level per instruction: how many reduces in sequence precede it."""
    out: list[int] = []
    for ins in local.instrs:
        deps = list(ins.args) + [g[0] for g in ins.gather] + ([ins.predicate] if ins.predicate >= 0 else [])
        level = 0
        for d in deps:
            level = max(level, out[d] + (1 if local.instrs[d].op == "reduce" else 0))
        out.append(level)
    return out


def dependencies(ins: Ins) -> list[int]:
    """All instructions whose values ``ins`` uses."""
    deps = list(ins.args) + [g[0] for g in ins.gather]
    if ins.predicate >= 0 and ins.predicate not in deps:
        deps.append(ins.predicate)
    return deps


def body_cost(local: Local) -> int:
    """Rough cost of one point in simple instructions."""
    return sum(mathlib.cost(i.op) for i in local.instrs if i.op != "const") + 1


_ = type_bytes
