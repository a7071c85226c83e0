"""Fusion: every value is either computed inside the kernels that use it or stored once by one of them.

One walk from results to inputs. When a value is visited, all clusters that want it are known, and at which index maps.
It is *inlined* into all of them if that is cheap enough; else it is *realised*: hosted by the first cluster that
computes it once per element anyway, or by a cluster of its own. A reduction joins a cluster as a row pipeline when the
reduced axes agree; a product becomes the root of the cluster behind it (its epilogue). ``desc`` bit sets keep the cluster
graph free of cycles. Called by ``lower``; tested through the fusion report and program snapshots.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from tracejit.lower import affine
from tracejit.lower.affine import Map
from tracejit.lower.analysis import FREE_FACTOR, analyse, batch_sizes
from tracejit.lower.attention import match_attention, place_attention
from tracejit.lower.cluster import Cluster, can_carry
from tracejit.lower.prepare import Prepared
from tracejit.lower.values import ATTENTION, CONST, DOT, LEAF, MAP, OP, PROJ, REDUCE, VIEW, Value
from tracejit.program import Capabilities, Decision

_MAX_MEMBERS = 600  # instructions of one body: beyond, compile time and registers suffer
_SMALL = 64  # elements below which a value may be recomputed whatever it costs
_SMALL_COST = 200
_MAX_MAPS = 4  # a value may be recomputed at so many shifted positions of one body
_FEW_ROWS = 8  # pipelines over fewer rows than this leave threads idle ...
_LONG_ROW = 1 << 16  # ... once rows are this long


class Fusion:
    """The clusters of a program. ``forced`` values must be stored (a kernel would bind too many buffers otherwise)."""

    def __init__(self, prepared: Prepared, caps: Capabilities, forced: frozenset[int] = frozenset()) -> None:
        self.prepared = prepared
        self.caps = caps
        self.forced = forced
        self.clusters: list[Cluster] = []
        self.decisions: list[Decision] = []
        #: The value whose memory holds a required value in row-major order, where that is not its own.
        self.memory: dict[Value, Value] = {}
        #: The values that are written into the memory of an assembled concatenation.
        self.parts: dict[Value, list[Value]] = {}
        #: Operand side of each product.
        self.regions: dict[Value, Cluster] = {}
        self._bits = 0
        match_attention(prepared, caps, self.decisions)
        values = prepared.values
        analyse(values, prepared.outputs, caps)
        self.batches = batch_sizes(values, caps) if caps.split_k > 1 else {}
        for v in prepared.outputs:
            self.require(v, None)
        for v in reversed(values):
            self.visit(v)

    # -- clusters ----------------------------------------------------------------------------------

    def new_cluster(self, kind: str, owner: Cluster | None = None, root: Value | None = None) -> Cluster:
        """A fresh cluster; operand regions share the bit of their owner."""
        if owner is None:
            c = Cluster(kind, 1 << self._bits, None, root)
            self._bits += 1
            self.clusters.append(c)
            return c
        return Cluster(kind, owner.bit, owner, root)

    def depends(self, host: Cluster, consumers: Sequence[Cluster]) -> None:
        """Record that ``consumers`` run after ``host``."""
        before = host.desc
        for k in consumers:
            if k is not host:
                host.desc |= k.bit | k.desc
        if host.desc != before:
            for k in self.clusters:
                if k.desc & host.bit:
                    k.desc |= host.desc

    def decide(self, action: str, values: Sequence[Value], reason: str) -> None:
        """Add a line to the report."""
        self.decisions.append(Decision(action, tuple(v.nid for v in values), reason))

    # -- memory requirements -----------------------------------------------------------------------

    def require(self, v: Value, by: Cluster | None) -> None:
        """``v`` must lie in memory, contiguous: an output, or an operand of an op kernel."""
        base, strides = v, affine.contiguous(v.shape)
        while base.op in ("reshape", "transpose") and base.layout is None and not base.required:
            x = base.inputs[0]
            if x.kind == CONST:
                break
            inner: tuple[int, ...] | None
            if base.op == "transpose":
                moved = [0] * len(strides)
                for s, p in zip(strides, base.attrs["perm"], strict=True):
                    moved[p] = s
                inner = tuple(moved)
            else:
                inner = affine.reshape_strides(base.shape, strides, x.shape)
            if inner is None:
                break
            base, strides = x, inner
        plain = affine.same_layout(base.shape, strides, affine.contiguous(base.shape))
        taken = base.target is not None or (base.layout is not None and base.layout != strides)
        if taken and base is v:
            base = self.copy_of(v)
        elif (
            taken
            or (base.kind in (LEAF, OP, PROJ, CONST) and not plain)
            or (base.required and base.layout is None and not plain)
        ):
            base, plain = v, True
        if base is not v:
            self.memory[v] = base
        if not plain:
            base.layout = strides
        elif base.kind != LEAF:
            base.layout = affine.contiguous(base.shape)
        base.required = True
        if by is not None:
            base.consumers[by] = None
        if base.op == "identity":
            self.realise(base)

    def copy_of(self, v: Value, consumers: dict[Cluster, None] | None = None) -> Value:
        """A new value with the elements of ``v``, to be stored elsewhere."""
        copy = Value("identity", MAP, (v,), {}, v.shape, v.dtype, v.nid)
        copy.required = True
        copy.consumers.update(consumers or {})
        copy.index = v.index + 1
        return copy

    def assemble(self, v: Value) -> None:
        """A concatenation in memory: its operands are written straight into their places, or copied there."""
        axis = v.attrs["axis"]
        strides = v.target[1] if v.target else v.layout or self.preferred_layout(v)
        v.layout = strides
        self.parts[v] = []
        at = 0
        for x in v.inputs:
            offset = at * strides[axis]
            at += x.shape[axis]
            # A part that stands there twice lies in one place only; the other would be read from the middle of the first.
            part = self.part_of(x, strides) if v.inputs.count(x) == 1 else None
            if part is None:
                copy = self.copy_of(x, v.consumers)
                copy.target = (v, strides, offset)
                self.parts[v].append(copy)
                self.realise(copy)
            else:
                base, inner = part
                base.target = (v, inner, offset)
                self.parts[v].append(base)
                base.required = True
                base.consumers.update(v.consumers)
        self.decide("concatenate in place", [v], f"{len(v.inputs)} parts are written where they belong")

    def part_of(self, x: Value, strides: tuple[int, ...]) -> tuple[Value, tuple[int, ...]] | None:
        """The value to compute straight into a part of a concatenation, and its strides there; None if it needs a copy.

        Nothing else may read it: backends track hazards per buffer, and readers would wait for all the other parts.
        """
        while x.op in ("reshape", "transpose") and len(set(x.users)) == 1:
            if x.op == "transpose":
                moved = [0] * len(strides)
                for s, p in zip(strides, x.attrs["perm"], strict=True):
                    moved[p] = s
                strides = tuple(moved)
            else:
                inner = affine.reshape_strides(x.shape, strides, x.inputs[0].shape)
                if inner is None:
                    break
                strides = inner
            x = x.inputs[0]
        busy = x.required or x.layout is not None or x.target is not None or len(x.users) != 1
        if busy or x.kind in (LEAF, CONST, OP) or (x.kind == PROJ and x.inputs[0].kind == OP):
            return None
        return x, strides

    def preferred_layout(self, v: Value) -> tuple[int, ...]:
        """Strides for ``v``: contiguous in the order in which its readers want it, if they agree."""
        perms = {u.attrs["perm"] for u in v.users if u.op == "transpose"}
        others = [u for u in v.users if u.op != "transpose" and u.kind != ATTENTION]
        if len(perms) != 1 or others:
            return affine.contiguous(v.shape)
        (perm,) = perms
        inner = affine.contiguous([v.shape[p] for p in perm])
        strides = [0] * len(perm)
        for s, p in zip(inner, perm, strict=True):
            strides[p] = s
        return tuple(strides)

    # -- the walk ----------------------------------------------------------------------------------

    def visit(self, v: Value) -> None:
        """Decide about one value; all its users have been decided."""
        if v.kind in (LEAF, PROJ) or (v.kind == CONST and not v.required):
            return
        if v.kind == OP:
            self.visit_op(v)
            return
        if v.kind == ATTENTION:
            place_attention(self, v)
            return
        if not v.maps and not v.required:
            return
        regions = list(v.maps)
        if v.kind not in (REDUCE, DOT) and not v.required and v.nid not in self.forced:
            if all(self.can_inline(c, v) for c in regions) and self.worth_inlining(v, regions):
                for c in regions:
                    c.inline(v)
                return
        if v.op == "concatenate" and v.nid not in self.forced:
            self.assemble(v)
            return
        self.realise(v)

    def can_inline(self, c: Cluster, v: Value) -> bool:
        """True if ``v`` can be computed inside ``c`` at every map it is wanted at."""
        maps = v.maps[c]
        if c.kind == "operand" and (
            v.kind != VIEW or v.op in ("pad", "concatenate", "flip") or v.inputs[0].kind == CONST
        ):
            return False
        if len(c.members) > _MAX_MEMBERS:
            return False
        return all(can_carry(v, m) for m in maps)

    def worth_inlining(self, v: Value, regions: Sequence[Cluster]) -> bool:
        """Cost model: recompute ``v`` where it is used, or store it?"""
        limit = self.caps.recompute_flops
        if v.op == "concatenate":
            return len(regions) == 1 and len(v.inputs) <= 4 and all(x.cost <= limit for x in v.inputs)
        if v.kind == VIEW:
            return True
        for c in regions:
            if (
                self.caps.max_buffers is not None
                and v.leaves is not None
                and len(v.leaves) > 1
                and v.size > _SMALL
            ):
                if (
                    self.bound(touched(c, v) | v.leaves)
                    > self.caps.max_buffers - (c.contract is not None) * 2
                ):
                    return False
            maps = v.maps[c]
            if len(maps) > 1 and (len(maps) > _MAX_MAPS or v.cost * (len(maps) - 1) > 4 * limit):
                return False
            if v.cost > limit and v.size > 1 and any(self.evaluations(c, m) > 4 * v.size for m in maps):
                return False
        if len({c.owner for c in regions}) == 1:
            return True
        if v.leaves is None or v.sure:
            return False
        if (
            v.size <= _SMALL
            and v.cost <= _SMALL_COST
            and len(v.leaves) <= 4
            and all(x.size <= _SMALL for x in v.leaves)
        ):
            return True
        failing = 0
        big = [x for x in v.leaves if x.size * 2 > v.size and x.kind != CONST]
        for c in regions:
            extra = sum(x.nbytes for x in big if not self.pending(c, v, x))
            if not (v.cost <= limit and extra <= 1.25 * v.nbytes) and not (
                extra == 0 and v.cost <= FREE_FACTOR * limit
            ):
                failing += 1
        return failing <= 1

    def bound(self, values: set[Value] | frozenset[Value]) -> int:
        """Buffers that a kernel touching ``values`` binds, as far as can be told before memory is planned."""
        if self.caps.separate_outputs:
            return len(values)
        fixed = sum(1 for x in values if x.kind == LEAF or x.required)
        return fixed + (fixed < len(values))

    def pending(self, c: Cluster, v: Value, leaf: Value) -> bool:
        """True if ``c`` reads ``leaf`` whatever happens to ``v``: something else in it, not made from ``v``, needs it."""
        return c in leaf.maps or any(
            w.index < v.index and w.leaves is not None and leaf in w.leaves for w in c.reads
        )

    def evaluations(self, c: Cluster, m: Map) -> int:
        """How often a value wanted at ``m`` is computed when backends hoist what inner axes do not change."""
        used = affine.axes_of(m)
        if not used:
            return 1
        deepest = max(i for i, a in enumerate(c.axes) if a in used)
        if c.red and not used & set(c.red):
            return c.points(a for a in c.parallel)
        return prod(c.sizes[a] for a in c.axes[: deepest + 1])

    # -- realising ---------------------------------------------------------------------------------

    def realise(self, v: Value) -> None:
        """Store ``v``: in the cluster that computes it anyway, else in one of its own."""
        if v.nid in self.forced:
            host = None
        elif v.kind == DOT and (parts := self.split_parts(v)) > 1:
            if len(v.consumers) > 1:
                self.split_shared(v)
                return
            v.parts = parts
            host = None
        else:
            host = self.choose_host(v)
        if host is None:
            host = self.new_cluster("loop", root=v)
            v.maps.setdefault(host, {})[host.domain(v.shape)] = None
        elif v.kind == REDUCE:
            self.join_reduce(host, v)
        elif host.red is None and host.contract is None and v.kind in (MAP, VIEW):
            (m,) = v.maps[host]
            if len(affine.axes_of(m)) < len(host.axes):
                host.red = self.future_rows(host, v, m)
        v.home = host
        host.reads[v] = None
        self.depends(host, list(v.consumers))
        if v.kind == DOT:
            self.open_contract(host, v)
        elif v.kind == OP:
            host.contract = v
            for x in v.inputs:
                self.require(x, host)
        else:
            if v.kind == REDUCE and host.root is v:
                host.red = [host.new_axis(n) for n in reduced_dims(v)]
            host.inline(v)

    def choose_host(self, v: Value) -> Cluster | None:
        """The cluster to compute and store ``v``, or None for one of its own."""
        found: list[Cluster] = []
        for c, maps in v.maps.items():
            if c.kind != "loop" or len(maps) != 1:
                continue
            (m,) = maps
            if m[1] or m[2] or not self.fits(c, v, m):
                continue
            if self.caps.max_buffers is not None and v.size > _SMALL and v.kind not in (DOT, OP):
                if self.bound(touched(c, v) | {v} | (v.leaves or set())) > self.caps.max_buffers:
                    continue
            if any(r is not c and r.owner is c for r in v.maps) or any(
                k.desc & c.bit for k in v.consumers if k is not c
            ):
                continue
            if len(c.members) <= _MAX_MEMBERS:
                found.append(c)
        if not found:
            return None
        if v.epi is not None and v.kind != REDUCE:
            if self.caps.split_k > 1 and self.small_product(v.epi):
                # The parts of the product are added up where the row is read anyway.
                rows = [c for c in found if c.red is not None and inner_rows(c, next(iter(v.maps[c])))]
                host = self.first(rows)
                if host is not None:
                    return host
            plain = [c for c in found if c.red is None and c.contract is None]
            return plain[0] if len(plain) == 1 else self.first(plain)
        return self.first(found)

    def small_product(self, v: Value) -> bool:
        """True for a product that split-K would make faster."""
        if v.op != "dot_general" or v.size > self.caps.split_k_limit:
            return False
        return prod(v.inputs[0].shape[i] for i in v.attrs["lhs_contract"]) >= 256

    def first(self, found: list[Cluster]) -> Cluster | None:
        """A cluster that none of the others precedes."""
        for c in found:
            if not any(k.desc & c.bit for k in found if k is not c):
                return c
        return None

    def fits(self, c: Cluster, v: Value, m: Map) -> bool:
        """True if ``c`` computes every element of ``v`` exactly once at ``m`` (per point, or per row)."""
        if v.kind == REDUCE:
            return self.reduce_fits(c, v, m)
        everywhere = affine.is_bijection(m[0], c.axes, c.sizes, v.shape)
        if v.kind in (DOT, OP):
            allowed = self.caps.contract_epilogue if v.kind == DOT else self.caps.conv_epilogue
            limit = self.caps.epilogue_buffers
            if limit is not None and len(touched(c, v)) > limit:
                return False
            if self.caps.max_buffers is not None and self.bound(touched(c, v)) + 2 > self.caps.max_buffers:
                return False
            return allowed and everywhere and c.red is None and c.contract is None
        if everywhere:
            return not c.red or self.same_rows(c, v, m)
        if c.red:
            return affine.is_bijection(m[0], c.parallel, c.sizes, v.shape)
        return self.future_rows(c, v, m) is not None

    def future_rows(self, c: Cluster, v: Value, m: Map) -> list[int] | None:
        """The axes that ``c`` will reduce once the reduction behind the row value ``v`` joins it, or None."""
        if c.contract is not None or not v.reds:
            return None
        used = affine.axes_of(m)
        rest = [a for a in c.axes if a not in used]
        if not rest or not affine.is_bijection(m[0], [a for a in c.axes if a in used], c.sizes, v.shape):
            return None
        length = c.points(rest)
        sizes = [c.sizes[a] for a in rest]
        if any(r.size == v.size and affine.refinable(sizes, reduced_dims(r)) for r in v.reds):
            return rest if self.row_length_ok(length, v.size) else None
        return None

    def row_length_ok(self, length: int, rows: int) -> bool:
        """True if rows of this length may be kept on chip by one worker each."""
        return length <= self.caps.row_limit and (rows >= _FEW_ROWS or length <= _LONG_ROW)

    def same_rows(self, c: Cluster, v: Value, m: Map) -> bool:
        """True unless ``v`` depends on reductions of other rows than those of ``c``, which then could not join it."""
        assert c.red is not None
        length = c.points(c.red)
        inner = inner_rows(c, m)
        for r in v.rows:
            x = r.inputs[0]
            axes = r.attrs["axes"] if "axes" in r.attrs else (r.attrs["axis"],)
            wide = [i for i, n in enumerate(x.shape) if n != 1]
            if x.size // max(1, r.size) != length or (bool(wide) and wide[-1] in axes) != inner:
                return False
        return True

    def reduce_fits(self, c: Cluster, v: Value, m: Map) -> bool:
        """True if the reduction ``v`` can be a stage of the row pipeline ``c``."""
        if c.contract is not None or any(e[2] for e in m[0]):
            return False
        used = [a for a in c.axes if a in affine.axes_of(m)]
        if not affine.is_bijection(m[0], used, c.sizes, v.shape):
            return False
        length = v.inputs[0].size // max(1, v.size)
        if c.red is None and len(used) == len(c.axes):
            return True
        rest = c.red if c.red is not None else [a for a in c.axes if a not in used]
        if set(used) | set(rest) != set(c.axes) or set(used) & set(rest) or c.points(rest) != length:
            return False
        if not affine.refinable([c.sizes[a] for a in rest], reduced_dims(v)):
            return False
        return self.row_length_ok(length, v.size)

    def join_reduce(self, c: Cluster, v: Value) -> None:
        """Make ``v`` a stage of ``c``."""
        (m,) = v.maps[c]
        dims = reduced_dims(v)
        if c.red is None:
            used = affine.axes_of(m)
            rest = [a for a in c.axes if a not in used]
            if not rest:
                c.red = [c.new_axis(n) for n in dims]
            else:
                sizes = [c.sizes[a] for a in rest]
                if sizes != dims and sorted(sizes) == sorted(dims) and len(set(dims)) == len(dims):
                    rest.sort(key=lambda a: dims.index(c.sizes[a]))
                c.red = rest
            self.decide("row pipeline", [v], f"rows of {prod(dims)}")

    # -- products and ops --------------------------------------------------------------------------

    def split_parts(self, v: Value) -> int:
        """Split-K: how many partial sums of ``v`` the kernel behind it should add up (1: no split).

        Only where a loop over the results runs anyway and cannot be the epilogue: a row pipeline, an optimiser update.
        """
        if self.caps.split_k <= 1 or v.required or v.dtype.itemsize < 4 or v.size > self.caps.split_k_limit:
            return 1
        a = v.inputs[0]
        outer = [a.shape[i] for i in v.attrs["lhs_contract"]]
        k = prod(outer)
        parts, work = 1, v.size * self.batches.get(v, 1)
        while parts * 2 <= self.caps.split_k and k // (parts * 2) >= 128 and outer[0] % (parts * 2) == 0:
            if work * parts >= self.caps.split_k_work:
                break
            parts *= 2
        if parts == 1 or (any(c.kind != "loop" for c in v.maps) and len(v.consumers) == 1):
            return 1
        if len(v.consumers) == 1:
            ((c, maps),) = v.maps.items()
            return parts if len(maps) == 1 and not self.fits(c, v, next(iter(maps))) else 1
        return parts if self.adder(v) is not None else 1

    def adder(self, v: Value) -> Cluster | None:
        """The row pipeline that could add up the parts of ``v`` and store the sum for its other users."""
        kind, v.kind = v.kind, MAP  # as the sum of its parts
        host = self.choose_host(v)
        v.kind = kind
        return host if host is not None and host.red is not None else None

    def split_shared(self, v: Value) -> None:
        """A split product with several users: the row pipeline among them stores the sum of the parts."""
        product = Value(v.op, DOT, v.inputs, v.attrs, v.shape, v.dtype, v.nid)
        product.index, product.users, product.epi, v.epi = v.index, [v], product, product
        for x in v.inputs:
            x.users = [product if u is v else u for u in x.users]
        v.op, v.kind, v.inputs, v.attrs = "identity", MAP, (product,), {}
        self.realise(v)
        self.realise(product)

    def open_contract(self, c: Cluster, v: Value) -> None:
        """Attach product ``v`` to its epilogue ``c`` and ask for its operands."""
        c.contract = v
        if len(v.maps[c]) == 1 and len(c.reads) > 1:
            self.decide("epilogue", [v], "the loop behind the product runs on its results")
        region = self.new_cluster("operand", owner=c, root=v)
        self.regions[v] = region
        a, b = v.inputs
        at = v.attrs
        lf = [i for i in range(len(a.shape)) if i not in at["lhs_batch"] and i not in at["lhs_contract"]]
        rf = [i for i in range(len(b.shape)) if i not in at["rhs_batch"] and i not in at["rhs_contract"]]
        left: dict[int, affine.Expr] = {}
        right: dict[int, affine.Expr] = {}
        for name, la, ra in (
            ("batch", at["lhs_batch"], at["rhs_batch"]),
            ("m", lf, ()),
            ("n", (), rf),
            ("k", at["lhs_contract"], at["rhs_contract"]),
        ):
            region.groups[name] = []
            for i, size in enumerate([a.shape[x] for x in la] if la else [b.shape[x] for x in ra]):
                e = affine.ZERO
                if size != 1:
                    axis = region.new_axis(size)
                    region.groups[name].append(axis)
                    e = affine.var(axis)
                if la:
                    left[la[i]] = e
                if ra:
                    right[ra[i]] = e
        region.request_role("a", a, (tuple(left[i] for i in range(len(a.shape))), (), False))
        region.request_role("b", b, (tuple(right[i] for i in range(len(b.shape))), (), False))

    def visit_op(self, v: Value) -> None:
        """An op kernel: contiguous operands; a convolution may take the loop behind it as its epilogue."""
        results = [u for u in v.users if u.kind == PROJ]
        if v.op == "conv2d" and self.caps.conv_epilogue and (v.maps or v.required):
            self.realise(v)
            return
        if not (v.maps or v.required or results or "effect" in v.attrs or v in self.prepared.effects):
            return
        c = self.new_cluster("op", root=v)
        c.contract = v
        for u in [v, *results]:
            u.home = c
            u.required = True
            self.depends(c, list(u.consumers))
        for x in v.inputs:
            self.require(x, c)


def reduced_dims(v: Value) -> list[int]:
    """Sizes of the axes that a reduction removes, without those of size one."""
    x = v.inputs[0]
    axes = v.attrs["axes"] if "axes" in v.attrs else (v.attrs["axis"],)
    return [x.shape[a] for a in axes if x.shape[a] != 1]


def inner_rows(c: Cluster, m: Map) -> bool:
    """True if the rows that ``c`` reduces run along the last axis of a value wanted at ``m``."""
    last = next((e for e in reversed(m[0]) if e[1]), None)
    return last is not None and min(last[1], key=lambda t: t[1])[0] in (c.red or ())


def touched(c: Cluster, v: Value) -> set[Value]:
    """The values in memory that ``c`` reads and writes apart from ``v``, as far as can be told when ``v`` is visited."""
    seen: set[Value] = set()
    for x in c.reads:
        if x is v:
            continue
        if x in c.members:
            if x.home is c:
                seen.add(x)
        elif x.index < v.index and x.leaves is not None:
            seen |= x.leaves
        else:
            seen.add(x)
    seen.discard(v)
    return seen
