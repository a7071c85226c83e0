"""From a Python function and its arguments to a graph: one run with symbolic tensors. Called on a cache miss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tracejit import source, trees
from tracejit.dtypes import WEAK_DTYPES, canonical
from tracejit.errors import TracingError
from tracejit.graph import Graph, GuardInfo, Node
from tracejit.signature import Static
from tracejit.tensor import Tensor, TraceContext, is_arraylike, recording, to_node


@dataclass(frozen=True)
class Traced:
    """The outcome of one trace.

    ``dynamic`` are the leaf positions that are graph inputs, ``captures`` the arrays behind the inputs that follow them,
    ``guards`` the scalar leaves whose value the graph depends on. ``outputs`` says for each result leaf where it comes
    from: ``("out", i)`` graph output i, ``("const", value)`` a concrete value known at trace time.
    """

    graph: Graph
    dynamic: tuple[int, ...]
    captures: tuple[Any, ...]
    guards: tuple[GuardInfo, ...]
    outputs: tuple[tuple[str, Any], ...]
    out_tree: Any
    #: How often each capture was used.
    uses: tuple[int, ...] = ()


def trace_function(
    fn: Callable[..., Any],
    name: str,
    leaves: Sequence[Any],
    keys: Sequence[Any],
    tree: Any,
    paths: Sequence[str],
) -> Traced:
    """Run ``fn(*args, **kwargs)``, with the leaves of ``(args, kwargs)`` replaced by tensors, and collect the graph."""
    ctx = TraceContext(name)
    dynamic: list[int] = []
    with recording(ctx), source.fresh_scopes():
        symbolic: list[Any] = []
        for i, (leaf, key, path) in enumerate(zip(leaves, keys, paths)):
            if isinstance(key, Static):
                symbolic.append(leaf)
                continue
            weak = type(leaf) in WEAK_DTYPES
            shape = () if weak else leaf.shape
            dtype = WEAK_DTYPES[type(leaf)] if weak else canonical(leaf.dtype)
            node = ctx.add_input(path, shape, dtype, "scalar" if weak else "argument")
            dynamic.append(i)
            if weak:
                ctx.scalars[node] = leaf
            symbolic.append(Tensor(node, ctx, weak))
        args, kwargs = trees.unflatten(tree, symbolic)
        result = fn(*args, **kwargs)
        out_leaves, out_tree = trees.flatten(result)
        names = [path or "out" for path in trees.paths(result)]
        outputs: list[tuple[str, Any]] = []
        nodes: list[Node] = []
        node_names: list[str] = []
        for leaf, leaf_name in zip(out_leaves, names):
            if isinstance(leaf, Tensor) or (is_arraylike(leaf) and not isinstance(leaf, np.generic)):
                outputs.append(("out", len(nodes)))
                nodes.append(to_node(leaf, ctx, op="return"))
                node_names.append(leaf_name)
            elif hasattr(leaf, "__next__"):
                raise TracingError.make(
                    f"{name} returns a {type(leaf).__name__}, which would run after the trace has ended",
                    hint="return a tuple or list instead",
                )
            else:
                outputs.append(("const", leaf))
    inputs = ctx.inputs
    captures = tuple(
        array for array, _ in sorted(ctx.captured.values(), key=lambda item: item[1].attrs["index"])
    )
    graph = Graph.build(name, inputs, nodes, node_names, ctx.effects)
    # Guards are recorded by input position; the call path compares leaves.
    guards = tuple(GuardInfo(dynamic[g.index], g.value, g.source) for g in ctx.guards.values())
    uses = tuple(ctx.uses[id(array)] for array in captures)
    return Traced(graph, tuple(dynamic), captures, guards, tuple(outputs), out_tree, uses)
