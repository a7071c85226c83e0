"""Batching rules of elementwise ops, views, reductions, sorting and markers: the axis of the examples goes in front.

Registered on import by ``batching/__init__.py``.
"""

from __future__ import annotations

from tracejit.batching.core import Batcher, Lane, batching_rule
from tracejit.graph import Node


@batching_rule("elementwise")
def _elementwise(b: Batcher, node: Node, operands: list[Lane]) -> Lane:
    return Lane(b.add(node.op, [b.every(x) for x in operands], node.attrs), True)


@batching_rule("identity", "grad_input", "stop_gradient")
def _pass_on(b: Batcher, node: Node, operands: list[Lane]) -> Lane:
    return Lane(b.add(node.op, [operands[0].node], node.attrs), True)


@batching_rule("barrier")
def _barrier(b: Batcher, node: Node, operands: list[Lane]) -> Lane:
    # Only the first operand is a value; the others are waited for, whatever their shape.
    return Lane(b.add(node.op, [x.node for x in operands], node.attrs), operands[0].batched)


# -- reductions and ops along one axis ---------------------------------------------------------------------------------


@batching_rule("sum", "prod", "max", "min", "any", "all")
def _reduce(b: Batcher, node: Node, operands: list[Lane]) -> Lane:
    axes = tuple(a + 1 for a in node.attrs["axes"])
    return Lane(b.add(node.op, [operands[0].node], {"axes": axes}), True)


@batching_rule("argmax", "argmin", "sort", "argsort", "cumsum", "cumprod", "concatenate")
@batching_rule("take_along_axis", "scatter_add_along_axis")
def _along_axis(b: Batcher, node: Node, operands: list[Lane]) -> Lane:
    attrs = {**node.attrs, "axis": node.attrs["axis"] + 1}
    return Lane(b.add(node.op, [b.every(x) for x in operands], attrs), True)


# -- views -------------------------------------------------------------------------------------------------------------


@batching_rule("reshape")
def _reshape(b: Batcher, node: Node, operands: list[Lane]) -> Lane:
    return Lane(b.reshape(operands[0].node, (b.size, *node.shape)), True)


@batching_rule("broadcast_to")
def _broadcast_to(b: Batcher, node: Node, operands: list[Lane]) -> Lane:
    (x,) = operands
    ones = (1,) * (len(node.shape) - len(x.shape))
    return Lane(b.broadcast(b.reshape(x.node, (b.size, *ones, *x.shape)), (b.size, *node.shape)), True)


@batching_rule("transpose")
def _transpose(b: Batcher, node: Node, operands: list[Lane]) -> Lane:
    return Lane(b.transpose(operands[0].node, (0, *(p + 1 for p in node.attrs["perm"]))), True)


@batching_rule("flip")
def _flip(b: Batcher, node: Node, operands: list[Lane]) -> Lane:
    axes = tuple(a + 1 for a in node.attrs["axes"])
    return Lane(b.add(node.op, [operands[0].node], {"axes": axes}), True)


@batching_rule("slice")
def _slice(b: Batcher, node: Node, operands: list[Lane]) -> Lane:
    a = node.attrs
    attrs = {"start": (0, *a["start"]), "stop": (b.size, *a["stop"]), "step": (1, *a["step"])}
    return Lane(b.add(node.op, [operands[0].node], attrs), True)


@batching_rule("pad")
def _pad(b: Batcher, node: Node, operands: list[Lane]) -> Lane:
    a = node.attrs
    attrs = {**a, **{k: (0, *a[k]) for k in ("low", "high", "interior")}}
    return Lane(b.add(node.op, [operands[0].node], attrs), True)
