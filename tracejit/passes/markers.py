"""Erase what only autograd needs: ``grad_input``, ``custom_vjp``, ``stop_gradient`` and ``identity`` nodes.

First in the pipeline: markers would hide equal nodes and patterns from every later pass.
"""

from __future__ import annotations

from tracejit.graph import Graph, GraphBuilder, Node

_ALIASES = frozenset({"grad_input", "stop_gradient", "identity"})


def erase_markers(graph: Graph) -> Graph:
    """Replace each marker by the value it marks, also inside the sub-graphs of control flow."""

    def rule(builder: GraphBuilder, node: Node, inputs: tuple[Node, ...]) -> Node | None:
        if node.op.name in _ALIASES:
            return inputs[0]
        if node.op.name == "custom_vjp":
            # Only proj nodes read it; pass the operand tuple on through the mapping below.
            marked[node] = inputs
            return inputs[0]
        if node.op.name == "proj" and node.inputs[0] in marked:
            return marked[node.inputs[0]][node.attrs["index"]]
        if any(isinstance(v, Graph) for v in node.attrs.values()):
            attrs = {k: erase_markers(v) if isinstance(v, Graph) else v for k, v in node.attrs.items()}
            return builder.add(node.op, inputs, attrs, like=node)
        return None

    marked: dict[Node, tuple[Node, ...]] = {}
    return graph.rewrite(rule)
