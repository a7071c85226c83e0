"""Batching rules of look-ups, scatters and random bits.

Where each example has indices of its own into an array of its own, the arrays are laid end to end and the indices
shifted, so that one plain ``take`` or ``scatter_add`` does all. Registered on import by ``batching/__init__.py``.
"""

from __future__ import annotations

import math

import numpy as np

from tracejit.batching.core import Batcher, Lane, batching_rule, one_by_one
from tracejit.dtypes import INT64, UINT32
from tracejit.graph import Node


def _end_to_end(b: Batcher, x: Node, axis: int) -> Node:
    """[B, pre, n, post] -> [B·n, pre, post] for the axis of size n (counted without B)."""
    moved = b.move(x, axis + 1, 1)
    return b.reshape(moved, (moved.shape[0] * moved.shape[1], *moved.shape[2:]))


def _shifted(b: Batcher, idx: Node, n: int) -> Node:
    """Indices [B, ...] into arrays of length ``n`` as indices into the arrays laid end to end, wrapped and clipped as
    ``take`` does.
    """
    zero, size, last = (b.full(v, idx.shape, INT64) for v in (0, n, n - 1))
    wrapped = b.add("where", (b.add("less", (idx, zero)), b.add("add", (idx, size)), idx))
    clipped = b.add("minimum", (b.add("maximum", (wrapped, zero)), last))
    example = b.add("iota", (), {"shape": idx.shape, "axis": 0, "dtype": INT64})
    return b.add("add", (clipped, b.add("mul", (example, size))))


@batching_rule("take")
def _take(b: Batcher, node: Node, operands: list[Lane]) -> Lane:
    x, idx = operands
    axis, rank = node.attrs["axis"], len(idx.shape)
    if not idx.batched:
        return Lane(b.add(node.op, (x.node, idx.node), {"axis": axis + 1}), True)
    if not x.batched:
        return Lane(b.move(b.add(node.op, (x.node, idx.node), {"axis": axis}), axis, 0), True)
    if math.prod(node.shape) == 0:
        return Lane(b.full(0, (b.size, *node.shape), node.dtype), True)
    found = b.add(node.op, (_end_to_end(b, x.node, axis), _shifted(b, idx.node, x.shape[axis])), {"axis": 0})
    # [B, idx, pre, post] -> [B, pre, idx, post]
    after = 1 + rank
    pre = range(after, after + axis)
    perm = (0, *pre, *range(1, after), *range(after + axis, found.ndim))
    return Lane(b.transpose(found, perm), True)


@batching_rule("scatter_add")
def _scatter_add(b: Batcher, node: Node, operands: list[Lane]) -> Lane:
    base, idx, upd = operands
    axis, rank = node.attrs["axis"], len(idx.shape)
    full, updates = b.every(base), b.every(upd)
    if not idx.batched:
        return Lane(b.add(node.op, (full, idx.node, updates), {"axis": axis + 1}), True)
    if math.prod(upd.shape) == 0:
        return Lane(full, True)
    # [B, pre, idx, post] -> [B, idx, pre, post]
    at = range(1 + axis, 1 + axis + rank)
    updates = b.transpose(updates, (0, *at, *range(1, 1 + axis), *range(1 + axis + rank, updates.ndim)))
    flat = _end_to_end(b, full, axis)
    out = b.add(node.op, (flat, _shifted(b, idx.node, base.shape[axis]), updates), {"axis": 0})
    pre, post = base.shape[:axis], base.shape[axis + 1 :]
    return Lane(b.move(b.reshape(out, (b.size, base.shape[axis], *pre, *post)), 1, 1 + axis), True)


_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA


@batching_rule("random_bits")
def _random_bits(b: Batcher, node: Node, operands: list[Lane]) -> Lane | list[Lane]:
    """Threefry-2x32-20 (see ``ops/creation.py``) from elementwise ops, since ``random_bits`` itself takes one key only.

    Every example gets the bits that it would get alone.
    """
    shape = node.attrs["shape"]
    size = math.prod(shape)
    if size > np.iinfo(np.uint32).max:
        return one_by_one(b, node, operands)  # the counter would need its high word
    grid = (b.size, size)

    def constant(value: int, like: Node) -> Node:
        return b.full(value, like.shape, UINT32)

    def wide(key: Node) -> Node:
        return b.broadcast(b.reshape(key, (b.size, 1)), grid)

    k0, k1 = (b.every(lane) for lane in operands)
    both = b.add("bitwise_xor", (k0, k1))
    keys = tuple(map(wide, (k0, k1, b.add("bitwise_xor", (both, constant(_PARITY, both))))))
    x0 = b.add("add", (b.add("iota", (), {"shape": grid, "axis": 1, "dtype": UINT32}), keys[0]))
    x1 = keys[1]
    for group in range(5):
        for rotation in _ROTATIONS[group % 2]:
            x0 = b.add("add", (x0, x1))
            high = b.add("left_shift", (x1, constant(rotation, x1)))
            low = b.add("right_shift", (x1, constant(32 - rotation, x1)))
            x1 = b.add("bitwise_xor", (b.add("bitwise_or", (high, low)), x0))
        step = group + 1
        x0 = b.add("add", (x0, keys[step % 3]))
        x1 = b.add("add", (b.add("add", (x1, keys[(step + 1) % 3])), constant(step, x1)))
    return Lane(b.reshape(x0, (b.size, *shape)), True)
