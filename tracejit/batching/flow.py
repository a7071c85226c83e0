"""Batching rules of control flow, printing and user-given gradient rules.

Sub-graphs are batched in turn. A condition that differs between examples turns ``cond`` into a choice between both results
and lets ``while_loop`` run until every example has finished, as in JAX. Registered on import by ``batching/__init__.py``.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from tracejit.batching.core import Batcher, Lane, batched_outputs, batching_rule, one_by_one
from tracejit.custom import _CustomRule
from tracejit.graph import Graph, Node

batching_rule("print")(one_by_one)


def _chosen(b: Batcher, pred: Node, yes: Lane, no: Lane) -> Lane:
    """Per example: ``yes`` where ``pred`` [B] holds, else ``no``."""
    if yes.node is no.node:
        return yes
    x, y = b.every(yes), b.every(no)
    mask = b.broadcast(b.reshape(pred, (b.size, *(1,) * (x.ndim - 1))), x.shape)
    return Lane(b.add("where", (mask, x, y)), True)


def _batched(b: Batcher, graph: Graph, flags: Sequence[bool], outputs: Sequence[bool]) -> Graph:
    """``graph`` for all examples; outputs marked in ``outputs`` get the axis of the examples even if they are all equal."""

    def emit(inner: Batcher, lanes: list[Lane]) -> list[Node]:
        found = inner.run(graph, lanes)
        return [inner.every(x) if f else x.node for x, f in zip(found, outputs, strict=True)]

    return b.subgraph(graph.name, graph.inputs, flags, emit)


@batching_rule("cond")
def _cond(b: Batcher, node: Node, operands: list[Lane]) -> Lane | list[Lane]:
    pred, *values = operands
    branches: tuple[Graph, Graph] = (node.attrs["true_graph"], node.attrs["false_graph"])
    if pred.batched:
        if any(g.effects for g in branches):
            return one_by_one(b, node, operands)  # only the chosen branch may print
        yes, no = (b.run(g, values) for g in branches)
        return [_chosen(b, pred.node, x, y) for x, y in zip(yes, no, strict=True)]
    flags = [x.batched for x in values]
    found = [batched_outputs(g, b.size, flags) for g in branches]
    outputs = [x or y for x, y in zip(*found, strict=True)]
    true_graph, false_graph = (_batched(b, g, flags, outputs) for g in branches)
    attrs = {"true_graph": true_graph, "false_graph": false_graph}
    return b.results(b.add("cond", [x.node for x in operands], attrs), outputs)


@batching_rule("while_loop")
def _while_loop(b: Batcher, node: Node, operands: list[Lane]) -> Lane | list[Lane]:
    test: Graph = node.attrs["cond_graph"]
    body: Graph = node.attrs["body_graph"]
    flags = [x.batched for x in operands]
    constant = [o is i for o, i in zip(body.outputs, body.inputs, strict=True)]
    while True:
        (differs,) = batched_outputs(test, b.size, flags)
        after = batched_outputs(body, b.size, flags)
        settled = [f or g or (differs and not c) for f, g, c in zip(flags, after, constant, strict=True)]
        if settled == flags:
            break
        flags = settled
    if differs and (test.effects or body.effects):
        return one_by_one(b, node, operands)

    def running(inner: Batcher, lanes: list[Lane]) -> list[Node]:
        (go,) = inner.run(test, lanes)
        return [inner.add("any", (go.node,), {"axes": (0,)})]

    def step(inner: Batcher, lanes: list[Lane]) -> list[Node]:
        (go,) = inner.run(test, lanes)
        new = inner.run(body, lanes)
        # Examples that have finished keep their values.
        return [_chosen(inner, go.node, x, old).node for x, old in zip(new, lanes, strict=True)]

    if differs:
        attrs = {
            "cond_graph": b.subgraph(test.name, test.inputs, flags, running),
            "body_graph": b.subgraph(body.name, body.inputs, flags, step),
        }
    else:
        attrs = {
            "cond_graph": _batched(b, test, flags, [False]),
            "body_graph": _batched(b, body, flags, flags),
        }
    start = [b.every(x) if f else x.node for x, f in zip(operands, flags, strict=True)]
    return b.results(b.add("while_loop", start, attrs), flags)


@batching_rule("scan")
def _scan(b: Batcher, node: Node, operands: list[Lane]) -> list[Lane]:
    body: Graph = node.attrs["body_graph"]
    n = node.attrs["n_carry"]
    flags = [x.batched for x in operands]
    while True:
        after = batched_outputs(body, b.size, flags)
        settled = [*(f or g for f, g in zip(flags, after[:n], strict=False)), *flags[n:]]
        if settled == flags:
            break
        flags = settled
    outputs = [*flags[:n], *after[n:]]
    start = [b.every(x) if f else x.node for x, f in zip(operands[:n], flags, strict=False)]
    # The loop runs over axis 0, so the examples come second in what is sliced and stacked.
    slices = [b.move(x.node, 0, 1) if x.batched else x.node for x in operands[n:]]
    attrs = {**node.attrs, "body_graph": _batched(b, body, flags, outputs)}
    results = b.results(b.add("scan", [*start, *slices], attrs), outputs)
    stacked = [Lane(b.move(x.node, 1, 0), True) if x.batched else x for x in results[n:]]
    return [*results[:n], *stacked]


@batching_rule("custom_vjp")
def _custom_vjp(b: Batcher, node: Node, operands: list[Lane]) -> list[Lane]:
    """The user's rule stays in force: its backward function is mapped over the examples in turn.

    Results and arguments get an axis for the examples, so that each example has a cotangent of its own; for an argument
    that all share, the gradient of ``broadcast_to`` adds them up.
    """
    n_out = node.attrs["n_out"]
    rule: Any = node.attrs["rule"]
    if not isinstance(rule, _CustomRule):  # a graph read from a file has lost its rules
        made = b.add(node.op, [b.every(x) for x in operands], node.attrs)
        return b.results(made, [True] * n_out)
    head = n_out + len(rule.arg_slots)
    nodes = [b.every(x) for x in operands[:head]] + [x.node for x in operands[head:]]
    mapped = iter([x.batched for x in operands[head:]])
    axes = [(0 if next(mapped) else None) if static is None else None for static in rule.res_static]
    many = copy.copy(rule)
    many.bwd = _mapped_backward(rule.bwd, axes, b.size, rule.name)
    return b.results(b.add(node.op, nodes, {**node.attrs, "rule": many}), [True] * n_out)


def _mapped_backward(bwd: Any, residual_axes: list[int | None], size: int, name: str) -> Any:
    from tracejit import trees
    from tracejit.batching.api import map_over
    from tracejit.tensor import Tensor, current_context

    def backward(residuals: Any, cotangents: Any) -> Any:
        ctx = current_context()
        assert ctx is not None
        res_leaves, _ = trees.flatten(residuals)
        ct_leaves, _ = trees.flatten(cotangents)
        leaves, tree = trees.flatten((residuals, cotangents))
        axes = [*residual_axes, *(0 for _ in ct_leaves)]
        assert len(axes) == len(leaves) == len(res_leaves) + len(ct_leaves)
        batcher, out, out_tree = map_over(lambda r, c: bwd(r, c), tree, leaves, axes, size, name)
        # Constants (0.0 for "no gradient") stay what they are: they adapt to the dtype of the argument.
        return out_tree.unflatten([Tensor(batcher.every(x), ctx) if isinstance(x, Lane) else x for x in out])

    return backward
