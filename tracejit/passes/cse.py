"""Common subexpression elimination: equal nodes become one. Part of the pipeline in ``passes/__init__.py``."""

from __future__ import annotations

from tracejit.graph import Graph


def eliminate_common_subexpressions(graph: Graph) -> Graph:
    """Rebuild the graph through a builder, whose hash-consing merges equal nodes (Ershov 1958)."""
    return graph.rewrite(lambda builder, node, inputs: None)
