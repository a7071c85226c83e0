"""Forward analysis before fusion: what it costs to recompute a value, from which stored values, behind which product.

Called once by ``fusion.py``. ``leaves`` are the values that will be in memory anyway, as far as can be told beforehand.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from tracejit.lower.values import (
    ATTENTION,
    CONST,
    DOT,
    GENERATOR,
    LEAF,
    MAP,
    OP,
    PROJ,
    REDUCE,
    VIEW,
    Value,
    weight,
)
from tracejit.program import Capabilities

#: Values computed from more stored values than this are never recomputed elsewhere.
MAX_LEAVES = 6
#: A value whose operands a kernel reads anyway may cost this many times ``recompute_flops``.
FREE_FACTOR = 10
_NONE: frozenset[Value] = frozenset()


def strip(v: Value) -> Value:
    """The value behind reshapes and transposes."""
    while v.op in ("reshape", "transpose"):
        v = v.inputs[0]
    return v


def analyse(values: Sequence[Value], outputs: Sequence[Value], caps: Capabilities) -> None:
    """Fill in ``cost``, ``leaves`` and ``epi``."""
    stored: set[Value] = {strip(v) for v in outputs}
    for v in values:
        if v.kind in (DOT, OP, ATTENTION):
            stored.update(strip(x) for x in v.inputs)
    limit = caps.recompute_flops * FREE_FACTOR
    for v in values:
        kind = v.kind
        if kind == CONST:
            continue
        if kind in (LEAF, REDUCE, DOT, OP, PROJ, ATTENTION):
            v.leaves = frozenset((v,))
            if (kind == DOT and caps.contract_epilogue) or (
                v.op == "conv2d" and kind == OP and caps.conv_epilogue
            ):
                v.epi = v
            continue
        inputs = set(v.inputs)
        # Backends hoist what does not vary along inner axes, so a row's value costs its elements only a share.
        cost, size = weight(v), max(1, v.size)
        leaves: frozenset[Value] | None = _NONE
        rows = reds = _NONE
        for x in inputs:
            if x.kind == CONST:
                continue
            cost += x.cost if x.size >= size else x.cost * x.size / size
            leaves = (
                None if leaves is None or x.leaves is None else x.leaves if not leaves else leaves | x.leaves
            )
            if x.rows:
                rows = rows | x.rows if rows else x.rows
            if x.kind == REDUCE:
                reds |= {x}
            elif x.reds:
                reds = reds | x.reds if reds else x.reds
        if reds and v.op == "broadcast_to" and v.size > v.inputs[0].size:
            rows, reds = rows | reds, _NONE
        v.rows, v.reds = rows, reds
        if leaves is not None and len(leaves) > MAX_LEAVES:
            leaves = None
        if kind == MAP or (kind == VIEW and v.op in ("reshape", "transpose")):
            for x in v.inputs:
                if x.epi is not None and x.size == v.size and len(set(x.users)) == 1:
                    v.epi = x.epi
        shared = len(set(v.users)) > 1
        if (kind in (MAP, GENERATOR) and shared and (v.epi is not None or cost > limit)) or v in stored:
            cost, leaves = 0.0, frozenset((v,))
            v.sure = True
        v.cost, v.leaves = cost, leaves


def batch_sizes(values: Sequence[Value], caps: Capabilities) -> dict[Value, int]:
    """For products that no other product needs (weight gradients): how many equal ones there are, one batch at most.

    An upper bound, made before kernels exist: whether two products are equal in strides too shows later.
    """
    needed: set[Value] = set()
    groups: dict[Hashable, list[Value]] = {}
    for v in reversed(values):
        if v.kind in (DOT, ATTENTION) or v in needed:
            needed.update(v.inputs)
        if v.kind == DOT and v not in needed:
            key = tuple(sorted((k, tuple(x)) for k, x in v.attrs.items() if isinstance(x, tuple | list)))
            shapes = tuple(x.shape for x in v.inputs)
            groups.setdefault((shapes, key), []).append(v)
    return {v: min(len(group), caps.batch_contracts) for group in groups.values() for v in group}
