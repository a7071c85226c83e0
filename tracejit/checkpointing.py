"""``tj.checkpoint``: trade computation for memory by recomputing a function in the backward pass, after ``jax.checkpoint``.

The method is that of Chen, Xu, Zhang & Guestrin 2016, "Training deep nets with sublinear memory cost".
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tracejit import trees
from tracejit.autograd import backward
from tracejit.custom import custom_vjp
from tracejit.errors import TracingError
from tracejit.graph import Graph, GraphBuilder, Node
from tracejit.ops.barrier import barrier
from tracejit.tensor import Tensor, TraceContext, current_context, recording, to_node


def checkpoint(fn: Callable[..., Any]) -> Callable[..., Any]:
    """``fn`` with the same values and gradients, but the backward pass keeps only its inputs and computes it once more.

    Gradients need the intermediate values of the function they are taken of. Wrapped around the blocks of a deep network,
    ``checkpoint`` makes the peak of memory that of one block plus the inputs of all, for one more forward pass:
    ``for block in blocks: x = tj.checkpoint(block)(x)``. Arguments and results are trees; closed-over values and values
    that are no arrays are as in ``fn``. Outside a trace, and where no gradient is taken, it is just ``fn``.
    """
    return _Checkpointed(fn)


class _Checkpointed:
    """What :func:`checkpoint` returns."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        if not callable(fn):
            raise TracingError.make(
                f"checkpoint takes a function, got {type(fn).__name__}", op="checkpoint", hint="wrap the function, "
                "then call it: tj.checkpoint(block)(x)",
            )  # fmt: skip
        self._fn = fn
        self._name: str = getattr(fn, "__name__", "function").strip("<>")
        functools.update_wrapper(self, fn, updated=())

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self if instance is None else functools.partial(self, instance)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        ctx = current_context()
        if ctx is None:
            return self._fn(*args, **kwargs)
        inner = TraceContext(self._name, parent=ctx)
        with recording(inner):
            leaves, tree = trees.flatten(self._fn(*args, **kwargs))
            slots = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
            nodes = [to_node(leaves[i], inner, op=self._name) for i in slots]
        # Everything that the function reads, arguments or not, has become an input.
        operands = [outer for outer, _ in inner.lifted.values()]
        graph = Graph.build(self._name, inner.inputs, nodes, (), inner.effects)
        rule = _Recomputed(ctx, graph, len(operands))
        record = custom_vjp(rule.forward)
        record.defvjp(lambda *xs: (rule.forward(*xs), xs), rule.backward)
        results = record(*operands) if operands else rule.forward()
        for i, result in zip(slots, results, strict=True):
            leaves[i] = Tensor(result.node, ctx, leaves[i].weak)
        return tree.unflatten(leaves)


class _Recomputed:
    """The forward and backward functions of one checkpointed call, for its recorded graph."""

    def __init__(self, ctx: TraceContext, graph: Graph, n_operands: int) -> None:
        self._ctx = ctx
        self._graph = graph
        self._silent = _without_prints(graph)
        self._n_operands = n_operands
        #: Node of the graph -> its copy in the running trace.
        self._made: Mapping[Node, Node] = {}

    def forward(self, *operands: Any) -> list[Tensor]:
        """Record the function."""
        ctx = self._ctx
        self._made = _copy(ctx.builder, self._graph, [to_node(x, ctx) for x in operands])
        for effect in self._graph.effects:
            if self._made[effect] not in ctx.effects:
                ctx.effects.append(self._made[effect])
        return [Tensor(self._made[n], ctx) for n in self._graph.outputs]

    def backward(self, residuals: Sequence[Any], cotangents: Sequence[Any]) -> tuple[Any, ...]:
        """Record the function once more, behind barriers that wait for the cotangents, and its gradient."""
        ctx = current_context()
        assert ctx is not None
        inputs = [to_node(x, ctx) for x in residuals]
        waiting = [to_node(c, ctx) for c in cotangents if c.dtype.kind == "f"]
        attrs = {"uid": len(ctx.builder.nodes)}
        fresh = [ctx.builder.add(barrier, (x, *waiting), attrs) for x in inputs]
        # The viewer shows a recomputed node beside the one it repeats, where both are in one graph.
        repeats = self._made if ctx is self._ctx else {}
        copies = _copy(ctx.builder, self._silent, fresh, repeats)
        roots = [
            (copies[n], c)
            for n, c in zip(self._silent.outputs, cotangents, strict=True)
            if n.dtype.kind == "f"
        ]
        wrt = [i for i, x in enumerate(fresh) if x.dtype.kind == "f"]
        found = dict(zip(wrt, backward(ctx, roots, [fresh[i] for i in wrt]), strict=True))
        return tuple(found.get(i) for i in range(self._n_operands))


def _copy(
    builder: GraphBuilder, graph: Graph, inputs: Sequence[Node], repeats: Mapping[Node, Node] | None = None
) -> dict[Node, Node]:
    """As :func:`tracejit.graph.inline`, but returns what every node became; ``repeats`` gives forward nodes."""
    new = dict(zip(graph.inputs, inputs, strict=True))
    for node in graph.nodes:
        if node not in new:
            forward = new.get(node.grad_of) if node.grad_of is not None else None
            if repeats:
                forward = repeats.get(node, forward)
            new[node] = builder.keep(node, tuple(new[i] for i in node.inputs), forward)
    return new


def _without_prints(graph: Graph) -> Graph:
    """``graph`` for its values only: what it prints was printed the first time."""
    if not graph.effects:
        return graph

    def rule(builder: GraphBuilder, node: Node, inputs: tuple[Node, ...]) -> Node | None:
        if node.op.name == "print":
            return inputs[0]
        if any(isinstance(v, Graph) for v in node.attrs.values()):
            attrs = {k: _without_prints(v) if isinstance(v, Graph) else v for k, v in node.attrs.items()}
            return builder.add(node.op, inputs, attrs, like=node)
        return None

    return graph.rewrite(rule)


__all__ = ["checkpoint"]
