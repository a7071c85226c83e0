"""``tj.debug_nans``: run a graph node by node and stop at the first NaN. Called by ``compilation.py``; slow by design."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tracejit import events
from tracejit.errors import NonFiniteError, describe
from tracejit.graph import Graph, Node
from tracejit.ops.control import interpret

if TYPE_CHECKING:
    from tracejit.compilation import Entry


def run_checked(entry: Entry, inputs: Sequence[Any], observers: Sequence[events.Observer]) -> list[Any]:
    """The outputs of ``entry`` for ``inputs``, computed with the NumPy references.

    Raises NonFiniteError naming the first node whose value has a NaN, the forward line it belongs to, and what its
    operands held. Observers are told the node (``StepEvent.nan_node``) before the error is raised.
    """
    graph = entry.optimised
    values, bad = _evaluate(graph, inputs)
    if bad is not None:
        _tell(entry, graph.id(bad), observers)
        inner = _descend(bad, [values[i] for i in bad.inputs])
        raise _error(*(inner or (graph, bad, values)))
    return [np.array(values[n]) for n in graph.outputs]


def _evaluate(graph: Graph, inputs: Sequence[Any]) -> tuple[dict[Node, Any], Node | None]:
    """The values of the nodes up to the first that has a NaN, and that node."""
    values: dict[Node, Any] = {n: np.asarray(v, dtype=n.dtype) for n, v in zip(graph.inputs, inputs)}
    for node in graph.nodes:
        if node not in values:
            with np.errstate(all="ignore"):
                values[node] = node.op.reference(*(values[i] for i in node.inputs), **node.attrs)
        results = values[node] if node.avals else (values[node],)
        if any(v.dtype.kind == "f" and np.isnan(v).any() for v in map(np.asarray, results)):
            return values, node
    return values, None


def _descend(node: Node, operands: Sequence[Any]) -> tuple[Graph, Node, dict[Node, Any]] | None:
    """The first node with a NaN inside the body of a control-flow node, found by running the body again, checked."""
    for graph, inputs in _bodies(node, operands):
        values, bad = _evaluate(graph, inputs)
        if bad is not None:
            return _descend(bad, [values[i] for i in bad.inputs]) or (graph, bad, values)
    return None


def _bodies(node: Node, operands: Sequence[Any]) -> Iterator[tuple[Graph, Sequence[Any]]]:
    """The sub-graphs that a control-flow node runs, in order, with their inputs."""
    at = node.attrs
    if node.op.name == "cond":
        yield at["true_graph"] if operands[0] else at["false_graph"], operands[1:]
    elif node.op.name == "while_loop":
        while interpret(at["cond_graph"], operands)[0]:
            yield at["body_graph"], operands
            operands = interpret(at["body_graph"], operands)
    elif node.op.name == "scan":
        n, order = at["n_carry"], range(at["length"])
        carry, xs = operands[:n], operands[n:]
        for i in reversed(order) if at["reverse"] else order:
            inputs = [*carry, *(x[i] for x in xs)]
            yield at["body_graph"], inputs
            carry = interpret(at["body_graph"], inputs)[:n]


def _error(graph: Graph, node: Node, values: dict[Node, Any]) -> NonFiniteError:
    results = [np.asarray(v) for v in (values[node] if node.avals else (values[node],))]
    value = next(v for v in results if v.dtype.kind == "f" and np.isnan(v).any())
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
