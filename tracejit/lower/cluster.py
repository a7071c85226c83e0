"""Clusters: sets of values that become one kernel, with the index map of every member over the cluster's domain.

Made by ``fusion.py``; ``emit.py`` turns them into loop bodies. A map says at which elements a value is wanted;
:func:`operand_maps` carries it from a value to its operands, which is all there is to fusing views.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod
from typing import Any

from tracejit.lower import affine
from tracejit.lower.affine import SCALAR, ZERO, Expr, Map, Split
from tracejit.lower.values import CONST, GATHER_OPS, MAP, REDUCE, VIEW, Value


class Cluster:
    """One future kernel (``loop``, ``op``, ``attention``) or the operand side of one (``operand``).

    ``axes`` are the domain's axis ids in order, ``red`` those that are reduced. ``desc`` is a bit set of the clusters
    that depend on this one. ``contract`` is the product or convolution whose epilogue this is.
    """

    __slots__ = (
        "axes",
        "bit",
        "contract",
        "desc",
        "groups",
        "kind",
        "members",
        "owner",
        "reads",
        "red",
        "red_maps",
        "roles",
        "root",
        "sizes",
    )

    def __init__(self, kind: str, bit: int, owner: Cluster | None = None, root: Value | None = None) -> None:
        self.kind = kind
        self.bit = bit
        self.desc = 0
        self.owner = owner or self
        self.root = root
        self.axes: list[int] = []
        self.red: list[int] | None = None
        self.sizes: dict[int, int] = {}
        self.members: dict[Value, None] = {}
        self.reads: dict[Value, None] = {}
        self.contract: Value | None = None
        #: Operand regions: name -> axis ids (batch, m, n, k).
        self.groups: dict[str, list[int]] = {}
        #: Operand regions: role (a, b, q, k, ...) -> (value, map).
        self.roles: dict[str, tuple[Value, Map]] = {}
        #: Index of the reduced dims (sizes without ones) over the reduced axes.
        self.red_maps: dict[tuple[int, ...], Map] = {}

    def new_axis(self, size: int, before: int | None = None) -> int:
        """A new axis id; appended to the domain (or put in front of axis ``before``)."""
        axis = len(self.sizes)
        self.sizes[axis] = size
        if before is None:
            self.axes.append(axis)
        else:
            self.axes.insert(self.axes.index(before), axis)
        return axis

    def domain(self, shape: Sequence[int]) -> Map:
        """Add axes for ``shape`` and return its identity map."""
        return (tuple(affine.var(self.new_axis(n)) if n != 1 else ZERO for n in shape), (), False)

    @property
    def parallel(self) -> list[int]:
        """Axes that are not reduced."""
        return [a for a in self.axes if a not in self.red] if self.red else self.axes

    def points(self, axes: Iterable[int] | None = None) -> int:
        """Number of points over some axes (default: all)."""
        return prod(self.sizes[a] for a in (self.axes if axes is None else axes))

    def request(self, v: Value, m: Map) -> None:
        """Some member needs ``v`` at ``m``."""
        if v.kind == CONST:
            return
        v.maps.setdefault(self, {})[m] = None
        v.consumers[self.owner] = None
        self.reads[v] = None

    def request_role(self, role: str, v: Value, m: Map) -> None:
        """The kernel of this operand region reads ``v`` at ``m`` as its operand ``role``."""
        self.roles[role] = (v, m)
        self.request(v, m)

    def split(self, axis: int, inner: int) -> None:
        """Replace ``axis`` by (outer, inner) everywhere."""
        size = self.sizes[axis]
        outer = self.new_axis(size // inner, before=axis)
        low = self.new_axis(inner, before=axis)
        self.axes.remove(axis)
        for group in (*self.groups.values(), *([self.red] if self.red else [])):
            if axis in group:
                at = group.index(axis)
                group[at : at + 1] = [outer, low]

        def expr(e: Expr) -> Expr:
            if not e[2] and all(a != axis for a, _ in e[1]):
                return e
            terms: list[tuple[int, int]] = []
            for a, s in e[1]:
                terms += [(outer, s * inner), (low, s)] if a == axis else [(a, s)]
            return (e[0], tuple(sorted(terms)), tuple((v, rewrite(m), s, n) for v, m, s, n in e[2]))

        def rewrite(m: Map) -> Map:
            return (tuple(map(expr, m[0])), tuple((expr(e), lo, hi) for e, lo, hi in m[1]), m[2])

        for v in self.reads:
            if self in v.maps:
                v.maps[self] = {rewrite(m): None for m in v.maps[self]}
        self.roles = {k: (v, rewrite(m)) for k, (v, m) in self.roles.items()}
        self.red_maps = {k: rewrite(m) for k, m in self.red_maps.items()}

    def inline(self, v: Value) -> None:
        """Compute ``v`` inside this cluster, which requests its operands."""
        self.members[v] = None
        if v.kind == MAP and v.op not in GATHER_OPS:  # the common case, where the maps stay as they are
            maps = v.maps.get(self, {})
            for x in v.inputs:
                if x.kind != CONST:
                    x.maps.setdefault(self, {}).update(maps)
                    x.consumers[self.owner] = None
                    self.reads[x] = None
            return
        while True:
            try:
                wanted = [pair for m in v.maps.get(self, ()) for pair in operand_maps(self, v, m)]
                break
            except Split as s:
                self.split(s.axis, s.inner)
        for x, m in wanted:
            self.request(x, m)

    def reduce_map(self, dims: tuple[int, ...]) -> Map:
        """Index over ``dims`` (reduced sizes) in terms of the reduced axes; may raise Split."""
        found = self.red_maps.get(dims)
        if found is None:
            assert self.red is not None
            sizes = [self.sizes[a] for a in self.red]
            e = affine.linear([affine.var(a) for a in self.red], sizes)
            parts = affine.delinearize(e, dims, self.sizes)
            if parts is None:
                raise ValueError(f"reduced axes {sizes} do not match {dims}")
            found = self.red_maps[dims] = (tuple(parts), (), False)
        return found

    def __repr__(self) -> str:
        sizes = [self.sizes[a] for a in self.axes]
        return f"<{self.kind} {sizes} red={self.red} members={len(self.members)} contract={self.contract}>"


def can_carry(v: Value, m: Map) -> bool:
    """True if :func:`operand_maps` can take the map through ``v``; flat positions survive only elementwise ops."""
    if not m[2]:
        if v.op == "random_bits":
            return all(not e[2] and not e[0] for e in m[0])
        return True
    if v.op in ("take", "take_along_axis", "iota"):
        return False
    if v.op == "random_bits":
        e = m[0][0]
        return not e[2] and not e[0]
    if v.kind == VIEW:
        return v.op == "reshape" or v.inputs[0].kind == CONST
    return v.kind != REDUCE


def operand_maps(c: Cluster, v: Value, m: Map) -> list[tuple[Value, Map]]:
    """What ``v`` at ``m`` needs of its operands. May raise :class:`Split`."""
    exprs, preds, flat = m
    op = v.op
    if v.kind == VIEW:
        x = v.inputs[0]
        if x.kind == CONST and op != "pad":
            return []
        if flat:
            return [(x, m)]
        if op == "reshape":
            through = affine.through_reshape(exprs, v.shape, x.shape, c.sizes)
            assert through is not None
            return [(x, (through[0], preds, through[2]))]
        if op == "transpose":
            moved = [ZERO] * len(exprs)
            for e, p in zip(exprs, v.attrs["perm"], strict=True):
                moved[p] = e
            return [(x, (tuple(moved), preds, False))]
        if op == "broadcast_to":
            tail = exprs[len(exprs) - len(x.shape) :]
            return [
                (x, (tuple(ZERO if n == 1 else e for e, n in zip(tail, x.shape, strict=True)), preds, False))
            ]
        if op == "slice":
            start, step = v.attrs["start"], v.attrs["step"]
            return [
                (
                    x,
                    (
                        tuple(
                            affine.shift(affine.scale(e, s), a)
                            for e, a, s in zip(exprs, start, step, strict=True)
                        ),
                        preds,
                        False,
                    ),
                )
            ]
        if op == "flip":
            axes = v.attrs["axes"]
            return [
                (
                    x,
                    (
                        tuple(
                            affine.shift(affine.scale(e, -1), n - 1) if i in axes else e
                            for i, (e, n) in enumerate(zip(exprs, x.shape, strict=True))
                        ),
                        preds,
                        False,
                    ),
                )
            ]
        if op == "pad":
            inside, checks = [], list(preds)
            for e, low, n in zip(exprs, v.attrs["low"], x.shape, strict=True):
                e = affine.shift(e, -low)
                bottom, top = affine.bounds(e, c.sizes)
                if bottom < 0 or top >= n:
                    checks.append((e, 0, n))
                inside.append(ZERO if n == 1 else e)
            return [(x, (tuple(inside), tuple(checks), False))] if x.kind != CONST else []
        assert op == "concatenate", op
        axis = v.attrs["axis"]
        out: list[tuple[Value, Map]] = []
        for x, check, e in concat_parts(v, exprs[axis]):
            out.append(
                (
                    x,
                    (
                        (*exprs[:axis], ZERO if x.shape[axis] == 1 else e, *exprs[axis + 1 :]),
                        (*preds, check),
                        False,
                    ),
                )
            )
        return out
    if v.kind == REDUCE:
        x = v.inputs[0]
        axes = v.attrs["axes"] if "axes" in v.attrs else (v.attrs["axis"],)
        dims = tuple(x.shape[a] for a in axes if x.shape[a] != 1)
        inner = list(c.reduce_map(dims)[0])
        kept = list(exprs)
        index = []
        for i, n in enumerate(x.shape):
            if i in axes:
                index.append(inner.pop(0) if n != 1 else ZERO)
            else:
                index.append(kept.pop(0))
        return [(x, (tuple(index), preds, False))]
    if op == "take":
        x, idx = v.inputs
        axis, rank = v.attrs["axis"], len(idx.shape)
        at: Map = (exprs[axis : axis + rank], preds, False)
        gathered: Expr = (0, (), ((idx, at, 1, x.shape[axis]),))
        return [(idx, at), (x, ((*exprs[:axis], gathered, *exprs[axis + rank :]), preds, False))]
    if op == "take_along_axis":
        x, idx = v.inputs
        axis = v.attrs["axis"]
        gathered = (0, (), ((idx, m, 1, x.shape[axis]),))
        return [(idx, m), (x, ((*exprs[:axis], gathered, *exprs[axis + 1 :]), preds, False))]
    if op == "random_bits":
        return [(x, (SCALAR[0], (), False)) for x in v.inputs]
    return [(x, m) for x in v.inputs]


def concat_parts(v: Value, e: Expr) -> list[tuple[Value, Any, Expr]]:
    """For each operand of a concatenation: (operand, range check, position inside it)."""
    out = []
    at = 0
    for x in v.inputs:
        n = x.shape[v.attrs["axis"]]
        inside = affine.shift(e, -at)
        out.append((x, (inside, 0, n), inside))
        at += n
    return out
