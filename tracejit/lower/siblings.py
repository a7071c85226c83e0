"""Merging clusters with the same iteration space: results that read the same data are computed in one sweep.

Gradients of scale and shift of a layer norm (two column sums over the same gradient), several outputs of one input, a
late stage of a row pipeline that the walk of ``fusion.py`` had to leave outside. Runs right after that walk.
"""

from __future__ import annotations

from collections.abc import Sequence

from tracejit.lower.affine import Expr, Map
from tracejit.lower.cluster import Cluster
from tracejit.lower.fusion import Fusion
from tracejit.lower.values import Value

_MAX_MEMBERS = 600


def merge_siblings(fusion: Fusion) -> None:
    """Merge until nothing fits any more."""
    spaces: dict[tuple[tuple[int, ...], tuple[int, ...]], list[Cluster]] = {}
    for c in fusion.clusters:
        if c.kind == "loop" and c.contract is None:
            key = (tuple(c.sizes[a] for a in c.parallel), tuple(c.sizes[a] for a in c.red or ()))
            spaces.setdefault(key, []).append(c)
    gone: set[Cluster] = set()
    for group in spaces.values():
        for i, a in enumerate(group):
            if a in gone:
                continue
            big = big_reads(a)
            for b in group[i + 1 :]:
                if b in gone or not (big & big_reads(b)) or not mergeable(fusion, a, b):
                    continue
                merge(fusion, a, b)
                gone.add(b)
                big = big_reads(a)
    fusion.clusters = [c for c in fusion.clusters if c not in gone]


def big_reads(c: Cluster) -> set[Value]:
    """Values in memory that a cluster reads or writes and that are worth reading only once."""
    points = c.points()
    return {v for v in c.reads if v.size * 2 >= points and (v not in c.members or v.home is c) and points > 1}


def axis_map(a: Cluster, b: Cluster) -> dict[int, int]:
    """Axes of ``b`` to axes of ``a``: parallel ones in order, then reduced ones."""
    return dict(zip((*b.parallel, *(b.red or ())), (*a.parallel, *(a.red or ())), strict=True))


def renamed(m: Map, axes: dict[int, int]) -> Map:
    """A map of the other cluster in terms of this one's axes."""

    def expr(e: Expr) -> Expr:
        return (
            e[0],
            tuple(sorted((axes[a], s) for a, s in e[1])),
            tuple((v, renamed(x, axes), s, n) for v, x, s, n in e[2]),
        )

    return (tuple(map(expr, m[0])), tuple((expr(e), lo, hi) for e, lo, hi in m[1]), m[2])


def mergeable(fusion: Fusion, a: Cluster, b: Cluster) -> bool:
    """True if no other cluster lies between, what one makes for the other is read where it is made, and sizes allow."""
    if len(a.members) + len(b.members) > _MAX_MEMBERS:
        return False
    limit = fusion.caps.max_buffers
    if limit is not None:
        both = {v for c in (a, b) for v in c.reads if v not in c.members or v.home is c}
        if fusion.bound(both) > limit:
            return False
    forward, back = a.desc & b.bit, b.desc & a.bit
    for first, second, path in ((a, b, forward), (b, a, back)):
        if path and any(
            k is not first and k is not second and first.desc & k.bit and k.desc & second.bit
            for k in fusion.clusters
        ):
            return False
    axes = axis_map(a, b)
    for v in b.reads:
        if a in v.maps and (v.home is a or v.home is b):
            mine, theirs = set(v.maps[a]), {renamed(m, axes) for m in v.maps[b]}
            if mine != theirs or len(mine) != 1:
                return False
    for made, other in ((a, b), (b, a)):
        for v in other.reads:
            if v in fusion.parts and v not in other.members and made_in(fusion, v, made):
                return False
    for made in (a, b):
        if any(v.home is made and v not in (b if made is a else a).reads and v.parts > 1 for v in made.reads):
            return False
    return True


def made_in(fusion: Fusion, v: Value, c: Cluster) -> bool:
    """True if ``c`` writes (a part of) the assembled concatenation ``v``."""
    return any(x.home is c or (x in fusion.parts and made_in(fusion, x, c)) for x in fusion.parts[v])


def merge(fusion: Fusion, a: Cluster, b: Cluster) -> None:
    """Move everything of ``b`` into ``a``."""
    axes = axis_map(a, b)
    shared = [v for v in b.reads if v in a.reads]
    for v in b.reads:
        maps = v.maps.pop(b, {})
        v.maps.setdefault(a, {}).update({renamed(m, axes): None for m in maps})
        if v.consumers.pop(b, 0) is None:
            v.consumers[a] = None
        if v.home is b:
            v.home = a
        a.reads[v] = None
    a.members.update(b.members)
    a.bit |= b.bit
    a.desc = (a.desc | b.desc) & ~a.bit
    for k in fusion.clusters:
        if k.desc & a.bit:
            k.desc |= a.bit | a.desc
    fusion.decide("one sweep", roots(a, shared), "the same iteration space over the same data")


def roots(c: Cluster, shared: Sequence[Value]) -> list[Value]:
    """What a cluster stores."""
    return [v for v in c.reads if v.home is c] or list(shared)
