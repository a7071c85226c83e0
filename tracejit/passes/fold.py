"""Constant folding: compute at trace time what depends on constants only. Part of the pipeline in ``passes/__init__.py``."""

from __future__ import annotations

import numpy as np

from tracejit.graph import Graph, GraphBuilder, Node

#: Only scalars are folded: a folded array would bloat the graph and hide an iota or broadcast from the code generators.
_NEVER = frozenset({"input", "const", "literal", "iota", "random_bits", "broadcast_to"})


def fold_constants(graph: Graph) -> Graph:
    """Replace scalar nodes whose operands are all constants by their value, computed by the op's NumPy reference."""

    def rule(builder: GraphBuilder, node: Node, inputs: tuple[Node, ...]) -> Node | None:
        if (
            node.op.name in _NEVER
            or node.shape != ()
            or node.avals
            or not inputs
            or "effect" in node.op.traits
        ):
            return None
        if not all(i.op.name == "const" for i in inputs):
            return None
        with np.errstate(all="ignore"):
            value = node.op.reference(
                *(np.asarray(i.attrs["value"], dtype=i.dtype) for i in inputs), **node.attrs
            )
        return builder.const(np.asarray(value).item(), node.dtype, like=node)

    return graph.rewrite(rule)
