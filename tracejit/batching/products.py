"""Batching rules of matrix products, convolutions and pooling: the examples become a batch axis, more rows, or groups.

Registered on import by ``batching/__init__.py``.
"""

from __future__ import annotations

from tracejit.batching.core import Batcher, Lane, batching_rule
from tracejit.graph import Node
from tracejit.ops.contraction import free_axes


@batching_rule("dot_general")
def _dot_general(b: Batcher, node: Node, operands: list[Lane]) -> Lane:
    lhs, rhs = operands
    names = ("lhs_batch", "rhs_batch", "lhs_contract", "rhs_contract")
    sides = (lhs, rhs, lhs, rhs)
    axes = {n: tuple(a + x.batched for a in node.attrs[n]) for n, x in zip(names, sides, strict=True)}
    shared = len(node.attrs["lhs_batch"])
    if lhs.batched and rhs.batched:
        axes["lhs_batch"], axes["rhs_batch"] = (0, *axes["lhs_batch"]), (0, *axes["rhs_batch"])
        at = 0
    elif lhs.batched:  # the examples are the first of the free axes on the left: more rows of one product
        at = shared
    else:
        lhs_free = free_axes(len(lhs.shape), node.attrs["lhs_batch"], node.attrs["lhs_contract"])
        at = shared + len(lhs_free)
    return Lane(b.move(b.add(node.op, (lhs.node, rhs.node), axes), at, 0), True)


# -- folding the examples into another axis --------------------------------------------------------------------------


def _fold(b: Batcher, x: Node, axis: int) -> Node:
    """[B, ..., n, ...] -> [..., B·n, ...]: the examples become blocks of ``axis`` (counted without B)."""
    moved = b.move(x, 0, axis)
    s = moved.shape
    return b.reshape(moved, (*s[:axis], s[axis] * s[axis + 1], *s[axis + 2 :]))


def _unfold(b: Batcher, x: Node, axis: int) -> Node:
    """The inverse of :func:`_fold`."""
    s = x.shape
    split = b.reshape(x, (*s[:axis], b.size, s[axis] // b.size if b.size else 0, *s[axis + 1 :]))
    return b.move(split, axis, 0)


def _scaled(b: Batcher, shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    """``shape`` with the examples folded into ``axis``."""
    return (*shape[:axis], shape[axis] * b.size, *shape[axis + 1 :])


# -- convolution: images [N, C, H, W], kernels [O, C/groups, kH, kW] ---------------------------------------------------


@batching_rule("conv2d")
def _conv2d(b: Batcher, node: Node, operands: list[Lane]) -> Lane:
    x, w = operands
    attrs, groups = dict(node.attrs), node.attrs["groups"]
    if not w.batched:
        return Lane(_unfold(b, b.add(node.op, (_fold(b, x.node, 0), w.node), attrs), 0), True)
    if x.batched:
        attrs["groups"] = groups * b.size
        return Lane(_unfold(b, b.add(node.op, (_fold(b, x.node, 1), _fold(b, w.node, 0)), attrs), 1), True)
    # One image, many kernels: more output channels, in the order (group, example, channel of the group).
    o, *rest = w.shape
    per_group = o // groups
    kernels = b.move(b.reshape(w.node, (b.size, groups, per_group, *rest)), 0, 1)
    y = b.add(node.op, (x.node, b.reshape(kernels, (b.size * o, *rest))), attrs)
    n, _, *image = y.shape
    y = b.move(b.reshape(y, (n, groups, b.size, per_group, *image)), 2, 0)
    return Lane(b.reshape(y, (b.size, n, o, *image)), True)


@batching_rule("conv2d_input_grad")
def _conv2d_input_grad(b: Batcher, node: Node, operands: list[Lane]) -> Lane:
    g, w = operands
    attrs, shape = dict(node.attrs), node.attrs["shape"]
    if not w.batched:
        attrs["shape"] = _scaled(b, shape, 0)
        return Lane(_unfold(b, b.add(node.op, (_fold(b, g.node, 0), w.node), attrs), 0), True)
    attrs["shape"], attrs["groups"] = _scaled(b, shape, 1), node.attrs["groups"] * b.size
    return Lane(_unfold(b, b.add(node.op, (_fold(b, b.every(g), 1), _fold(b, w.node, 0)), attrs), 1), True)


@batching_rule("conv2d_weight_grad")
def _conv2d_weight_grad(b: Batcher, node: Node, operands: list[Lane]) -> Lane:
    x, g = (_fold(b, b.every(lane), 1) for lane in operands)
    shape, groups = _scaled(b, node.attrs["shape"], 0), node.attrs["groups"] * b.size
    return Lane(_unfold(b, b.add(node.op, (x, g), {**node.attrs, "shape": shape, "groups": groups}), 0), True)


@batching_rule("max_pool2d", "max_pool2d_grad", "max_pool2d_select", "avg_pool2d")
def _pool(b: Batcher, node: Node, operands: list[Lane]) -> Lane:
    return Lane(_unfold(b, b.add(node.op, [_fold(b, b.every(x), 0) for x in operands], node.attrs), 0), True)


@batching_rule("avg_pool2d_grad")
def _avg_pool2d_grad(b: Batcher, node: Node, operands: list[Lane]) -> Lane:
    attrs = {**node.attrs, "shape": _scaled(b, node.attrs["shape"], 0)}
    return Lane(_unfold(b, b.add(node.op, [_fold(b, operands[0].node, 0)], attrs), 0), True)
