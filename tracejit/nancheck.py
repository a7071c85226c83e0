"""``tj.debug_nans``: run a graph node by node and stop at the first NaN. Called by ``compilation.py``; slow by design."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tracejit import events
from tracejit.errors import NonFiniteError, describe
from tracejit.graph import Graph, Node

if TYPE_CHECKING:
    from tracejit.compilation import Entry


def run_checked(entry: Entry, inputs: Sequence[Any], observers: Sequence[events.Observer]) -> list[Any]:
    """The outputs of ``entry`` for ``inputs``, computed with the NumPy references.

    Raises NonFiniteError naming the first node whose value has a NaN, the forward line it belongs to, and what its
    operands held. Observers are told the node (``StepEvent.nan_node``) before the error is raised.
    """
    graph = entry.optimised
    values: dict[Node, Any] = {}
    for node, value in zip(graph.inputs, inputs):
        values[node] = np.asarray(value, dtype=node.dtype)
    for node in graph.nodes:
        if node not in values:
            with np.errstate(all="ignore"):
                values[node] = node.op.reference(*(values[i] for i in node.inputs), **node.attrs)
        value = values[node]
        if not node.avals and node.dtype.kind == "f" and np.isnan(value).any():
            _tell(entry, graph.id(node), observers)
            raise _error(graph, node, values)
    return [np.array(values[n]) for n in graph.outputs]


def _error(graph: Graph, node: Node, values: dict[Node, Any]) -> NonFiniteError:
    value = np.asarray(values[node])
    count = int(np.isnan(value).sum())
    forward = node.grad_of
    where = node.source if forward is None else forward.source or node.source
    if node.scope:
        where = f"{where} in {node.scope}"
    if node.op.name == "input":
        what = f"the input {node.name} already holds {count} NaN in {value.size} elements"
    else:
        what = f"first NaN: {count} of {value.size} elements of %{graph.id(node)}"
        if forward is not None:
            what += f", in the gradient of {forward.op.name}"
    operands = []
    for i, operand in enumerate(node.inputs):
        if operand.avals:
            continue
        v = np.asarray(values[operand])
        text = describe(operand)
        if v.size and v.dtype.kind in "fiu":
            text += f" in [{v.min():.4g}, {v.max():.4g}]"
        operands.append(f"operand {i} ({operand.name or operand.op.name}): {text}")
    return NonFiniteError.make(what, op=node.op.name, where=where, hint="; ".join(operands))


def _tell(entry: Entry, node: int, observers: Sequence[events.Observer]) -> None:
    if not observers:
        return
    empty = np.zeros(0, np.int64)
    now = time.perf_counter_ns()
    event = events.StepEvent(
        entry.id,
        entry.steps,
        empty.astype(np.uint32),
        empty,
        empty,
        empty,
        empty.astype(np.uint8),
        now,
        now,
        nan_node=node,
    )
    for observer in observers:
        entry.announce(observer)
        observer.on_step(event)
