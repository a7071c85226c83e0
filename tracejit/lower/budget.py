"""The bindings budget: kernels that touch more buffers than a device can bind are cut at a value that gets stored.

Called by ``lower`` after code generation; what it returns is stored by force in the next attempt.
"""

from __future__ import annotations

from collections.abc import Sequence

from tracejit.lower.cluster import Cluster
from tracejit.lower.fusion import Fusion
from tracejit.lower.horizontal import bindings
from tracejit.lower.layout import is_stored
from tracejit.lower.values import Value
from tracejit.program import Capabilities, Kernel


def over_budget(kernel: Kernel, caps: Capabilities, buffers: Sequence[object]) -> bool:
    """True if the kernel binds too many buffers."""
    ids = {*kernel.reads, *kernel.writes}
    return caps.max_buffers is not None and bindings(buffers, ids, caps.separate_outputs) > caps.max_buffers  # type: ignore[arg-type]


def cuts(c: Cluster, fusion: Fusion, caps: Capabilities) -> set[int]:
    """Graph nodes to store by themselves so that the kernel of ``c`` shrinks; empty if there is none."""
    limit = caps.max_buffers
    assert limit is not None
    forced = fusion.forced
    if c.contract is not None and c.contract.nid not in forced and (c.members or len(homes(c)) > 1):
        return {c.contract.nid}
    stored = [v for v in homes(c) if v.nid not in forced and v is not c.root]
    if len(stored) >= limit // 2:
        return {stored[len(stored) // 2].nid}
    below: dict[Value, frozenset[Value]] = {}
    best: tuple[int, int] | None = None
    for v in sorted(c.members, key=lambda v: v.index):
        leaves: frozenset[Value] = frozenset()
        for x in v.inputs:
            if x in below:
                leaves |= below[x]
            elif c in x.maps:
                leaves |= {x}
        below[v] = leaves
        if v.nid in forced or v.nid < 0 or v.kind == "view" or v is c.root or (v.home is c and is_stored(v)):
            continue
        if 2 <= len(leaves) <= limit - 1 and (best is None or (len(leaves), v.index) > best):
            best = (len(leaves), v.index)
            chosen = v
    if best is not None:
        return {chosen.nid}
    return {stored[0].nid} if stored else set()


def homes(c: Cluster) -> list[Value]:
    """What a cluster stores."""
    return [v for v in c.reads if v.home is c and is_stored(v)]
