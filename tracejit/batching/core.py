"""The machinery of ``vmap``: re-emit a graph of one example, node by node, as a graph of many examples at once.

A rule per op says how (``RULES``; the families are in the files beside this one). A value is a :class:`Lane`: a node and
whether its axis 0 runs over the examples; values that are the same for all examples stay as small as they are. Called by
``api.py`` and, for the sub-graphs of control flow, by ``flow.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tracejit.dtypes import DType
from tracejit.errors import UnsupportedFunctionError
from tracejit.graph import Graph, GraphBuilder, Node, Provenance, Shape, has_effect
from tracejit.ops.control import input_node
from tracejit.ops.registry import Op


@dataclass(frozen=True, slots=True)
class Lane:
    """A value for all examples: ``node`` with the examples along axis 0, or (not ``batched``) one value for all."""

    node: Node
    batched: bool

    @property
    def shape(self) -> Shape:
        """The shape for one example."""
        return self.node.shape[1:] if self.batched else self.node.shape


#: ``rule(batcher, node, operands)`` emits ``node`` for all examples; at least one operand is batched. The result is one
#: lane, or one per result for ops with several results.
Rule = Callable[["Batcher", Node, "list[Lane]"], "Lane | list[Lane]"]

RULES: dict[str, Rule] = {}


def batching_rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for some ops."""

    def register(rule: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, rule))
        return rule

    return register


def rule_for(op: Op) -> Rule:
    """The batching rule of ``op``; elementwise ops need none of their own."""
    found = RULES.get(op.name) or (RULES["elementwise"] if op.elementwise else None)
    if found is None:
        raise UnsupportedFunctionError.make(f"{op.name} has no batching rule", op="vmap")
    return found


class Batcher:
    """Emits nodes for ``size`` examples into ``builder``. New nodes keep source and scope of the one they stand for."""

    def __init__(self, builder: GraphBuilder, size: int) -> None:
        self.builder = builder
        self.size = size
        #: Nodes made so far that print.
        self.effects: list[Node] = []
        self._origin: Provenance | None = None

    # -- emitting ----------------------------------------------------------------------------------------------------

    def add(self, op: Op | str, inputs: Sequence[Node], attrs: Mapping[str, Any] | None = None) -> Node:
        """The node ``op(*inputs, **attrs)``."""
        return self._noted(self.builder.add(op, inputs, attrs, like=self._origin))

    def _noted(self, node: Node) -> Node:
        if has_effect(node) and node.op.name != "input" and node not in self.effects:
            self.effects.append(node)
        return node

    def results(self, node: Node, flags: Iterable[bool]) -> list[Lane]:
        """The results of a node that has several."""
        return [Lane(self.add("proj", (node,), {"index": i}), f) for i, f in enumerate(flags)]

    def full(self, value: Any, shape: Shape, dtype: DType) -> Node:
        """An array with every element ``value``."""
        return self.broadcast(self.builder.const(value, dtype, like=self._origin), shape)

    def reshape(self, x: Node, shape: Shape) -> Node:
        """``x`` with another shape."""
        return x if x.shape == shape else self.add("reshape", (x,), {"shape": shape})

    def transpose(self, x: Node, perm: Sequence[int]) -> Node:
        """``x`` with axis ``i`` of the result being axis ``perm[i]``."""
        perm = tuple(perm)
        return x if perm == tuple(range(len(perm))) else self.add("transpose", (x,), {"perm": perm})

    def move(self, x: Node, source: int, target: int) -> Node:
        """``x`` with one axis moved, as ``np.moveaxis``."""
        order = [i for i in range(x.ndim) if i != source]
        order.insert(target, source)
        return self.transpose(x, order)

    def broadcast(self, x: Node, shape: Shape) -> Node:
        """``x`` broadcast to ``shape``."""
        return x if x.shape == shape else self.add("broadcast_to", (x,), {"shape": shape})

    def every(self, lane: Lane) -> Node:
        """The value with an axis 0 for the examples, repeated along it if it is the same for all."""
        node = lane.node
        if lane.batched:
            return node
        shape = (self.size, *node.shape)
        if node.op.name == "broadcast_to" and node.inputs[0].shape == ():
            node = node.inputs[0]
        return self.broadcast(node, shape)

    # -- a whole graph -----------------------------------------------------------------------------------------------

    def run(self, graph: Graph, inputs: Sequence[Lane]) -> list[Lane]:
        """Emit ``graph`` with its inputs replaced by ``inputs``; the lanes of its outputs."""
        new: dict[Node, Lane | list[Lane]] = dict(zip(graph.inputs, inputs, strict=True))
        outer = self._origin
        try:
            for node in graph.nodes:
                if node not in new:
                    new[node] = self._emit(node, new)
        finally:
            self._origin = outer
        return [_single(new[n]) for n in graph.outputs]

    def _emit(self, node: Node, new: Mapping[Node, Lane | list[Lane]]) -> Lane | list[Lane]:
        if node.op.name == "proj":
            several = new[node.inputs[0]]
            assert isinstance(several, list)
            return several[node.attrs["index"]]
        operands = [_single(new[i]) for i in node.inputs]
        forward = self.builder.grad_of or _forward(node, new)
        # Inside a gradient rule the builder itself knows where new nodes belong.
        inherits = self.builder.grad_of is not None
        self._origin = None if inherits else Provenance(node.source, node.scope, forward, "")
        if any(lane.batched for lane in operands):
            return rule_for(node.op)(self, node, operands)
        copy = self._noted(self.builder.keep(node, tuple(lane.node for lane in operands), forward))
        return self.results(copy, [False] * len(node.avals)) if node.avals else Lane(copy, False)

    def subgraph(
        self,
        name: str,
        inputs: Sequence[Node],
        flags: Sequence[bool],
        emit: Callable[[Batcher, list[Lane]], list[Node]],
    ) -> Graph:
        """A new graph whose inputs are like ``inputs``, batched where ``flags`` says so; ``emit`` makes its outputs."""
        batcher = Batcher(GraphBuilder(), self.size)
        if self._origin is not None:  # the forward node is not part of the sub-graph
            batcher._origin = Provenance(self._origin.source, self._origin.scope, None, "")
        fresh = []
        for i, (node, flag) in enumerate(zip(inputs, flags, strict=True)):
            shape = (self.size, *node.shape) if flag else node.shape
            kind = node.attrs.get("kind", "argument")
            fresh.append(input_node(batcher.builder, i, (shape, node.dtype), node.name or f"x{i}", kind))
        outputs = emit(batcher, [Lane(n, f) for n, f in zip(fresh, flags, strict=True)])
        return Graph.build(name, fresh, outputs, (), batcher.effects)


def batched_outputs(graph: Graph, size: int, flags: Sequence[bool]) -> list[bool]:
    """Which outputs of ``graph`` differ between examples if the inputs marked in ``flags`` do."""
    found: list[bool] = []

    def emit(batcher: Batcher, lanes: list[Lane]) -> list[Node]:
        out = batcher.run(graph, lanes)
        found.extend(lane.batched for lane in out)
        return []

    Batcher(GraphBuilder(), size).subgraph(graph.name, graph.inputs, flags, emit)
    return found


def _single(value: Lane | list[Lane]) -> Lane:
    assert isinstance(value, Lane)
    return value


def _forward(node: Node, new: Mapping[Node, Lane | list[Lane]]) -> Node | None:
    """What the forward node of a gradient node became."""
    if node.grad_of is None:
        return None
    found = new.get(node.grad_of)
    if isinstance(found, list):
        found = found[0] if found else None
    return found.node if found is not None else None


def one_by_one(b: Batcher, node: Node, operands: list[Lane]) -> Lane | list[Lane]:
    """The last resort: a loop (``scan``) over the examples, in order. For what cannot happen for all at once: printing."""
    fixed = [lane.node for lane in operands if not lane.batched]
    moving = [lane.node for lane in operands if lane.batched]
    order = np.argsort([lane.batched for lane in operands], kind="stable")
    builder = GraphBuilder()
    avals = [(n.shape, n.dtype) for n in fixed] + [(n.shape[1:], n.dtype) for n in moving]
    inputs = [input_node(builder, i, aval, f"x{i}") for i, aval in enumerate(avals)]
    place = {int(k): inputs[i] for i, k in enumerate(order)}
    made = builder.add(
        node.op, [place[i] for i in range(len(operands))], node.attrs, like=_without_forward(node)
    )
    results = [builder.add("proj", (made,), {"index": i}) for i in range(len(made.avals))] or [made]
    body = Graph.build(
        node.op.name, inputs, [*inputs[: len(fixed)], *results], (), [made] if has_effect(made) else []
    )
    attrs = {"body_graph": body, "n_carry": len(fixed), "length": b.size, "reverse": False}
    loop = b.add("scan", [*fixed, *moving], attrs)
    lanes = b.results(loop, [False] * len(fixed) + [True] * len(results))[len(fixed) :]
    return lanes if made.avals else lanes[0]


def _without_forward(node: Node) -> Provenance:
    return Provenance(node.source, node.scope, None, "")
