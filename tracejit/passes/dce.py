"""Dead code elimination: drop nodes that no output and no effect needs. Part of the pipeline in ``passes/__init__.py``."""

from __future__ import annotations

from tracejit.graph import Graph


def eliminate_dead_code(graph: Graph) -> Graph:
    """The same graph without unused nodes; inputs stay, used or not, because callers pass them by position."""
    return Graph.build(graph.name, graph.inputs, graph.outputs, graph.output_names, graph.effects)
