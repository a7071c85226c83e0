"""Reverse-mode differentiation, graph to graph: ``grad``, ``value_and_grad``, ``vjp_graph``, ``jvp``.

The gradient of a graph is more graph: each op's ``vjp`` rule builds nodes from differentiable ops, stamped with the
forward node they belong to, so derivatives nest to any order. Follows the reverse sweep of Griewank & Walther,
*Evaluating Derivatives* (2008), ch. 3; the public functions follow ``jax.grad``.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from tracejit import source, trees
from tracejit.custom import pull_back_custom
from tracejit.errors import GradientError, ShapeError, describe, hide_internal_frames
from tracejit.graph import Graph, Node
from tracejit.ops import registry
from tracejit.ops.registry import NONDIFFERENTIABLE
from tracejit.state import changed, state
from tracejit.tensor import (
    Tensor,
    TraceContext,
    current_context,
    is_arraylike,
    lift,
    recording,
    to_node,
    zeros,
)

_uids = itertools.count()

GRAD_INPUT = registry.define(
    "grad_input",
    arity=1,
    infer=lambda x, uid: (x.shape, x.dtype),
    reference=lambda x, uid: x,
    vjp=lambda g, y, x, uid: (g,),
    category="control",
    meaning="marks the value that a gradient is taken with respect to; removed after differentiation",
    formula="y = x",
    shape_rule="same as x",
    grad_rule="x̄ = ȳ",
    attrs={"uid": "unique number"},
    samples=lambda: [((np.array([1.0, -2.0]),), {"uid": -1})],
)


# -- the reverse sweep ---------------------------------------------------------------------------------------------


def backward(
    ctx: TraceContext, roots: Sequence[tuple[Node, Tensor]], wrt: Sequence[Node]
) -> list[Tensor | None]:
    """Cotangents of ``wrt`` given cotangents of ``roots``; None where a root does not depend on the node.

    New nodes go to ``ctx.builder``. Nodes of ``wrt`` are leaves: nothing is propagated through them.
    """
    order = _ancestors([n for n, _ in roots])
    targets = set(wrt)
    needed: set[Node] = set()
    for node in order:
        if node in targets or any(i in needed for i in node.inputs):
            needed.add(node)
    cotangents: dict[Node, Any] = {}
    for node, cotangent in roots:
        if node in needed:
            _accumulate(cotangents, node, cotangent)
    builder = ctx.builder
    for node in reversed(order):
        if node in targets or node not in needed or node not in cotangents:
            continue
        outer, builder.grad_of = builder.grad_of, node
        try:
            with source.at_scope(node.scope):
                for operand, cotangent in zip(node.inputs, _pull_back(ctx, node, cotangents.pop(node))):
                    if cotangent is not None and operand in needed:
                        _accumulate(cotangents, operand, cotangent)
        finally:
            builder.grad_of = outer
    return [cotangents.get(n) for n in wrt]


def _ancestors(roots: Sequence[Node]) -> list[Node]:
    """Every node that ``roots`` depend on, in topological order."""
    done: dict[Node, None] = {}
    for root in roots:
        stack: list[tuple[Node, int]] = [(root, 0)]
        while stack:
            node, i = stack.pop()
            if node in done:
                continue
            if i < len(node.inputs):
                stack.append((node, i + 1))
                stack.append((node.inputs[i], 0))
            else:
                done[node] = None
    return list(done)


def _accumulate(cotangents: dict[Node, Any], node: Node, value: Any) -> None:
    before = cotangents.get(node)
    if isinstance(value, list):  # a multi-output node: one slot per result
        if before is None:
            cotangents[node] = value
        else:
            cotangents[node] = [b if v is None else v if b is None else b + v for b, v in zip(before, value)]
        return
    if (value.shape, value.dtype) != (node.shape, node.dtype):
        raise GradientError.make(
            f"the gradient rule of a user of {node!r} returned {describe(value)} for an operand {describe(node)}",
            op="grad",
        )
    cotangents[node] = value if before is None else registry.get("add")(before, value)


def _pull_back(ctx: TraceContext, node: Node, cotangent: Any) -> Sequence[Any]:
    """The cotangents of the operands of ``node``."""
    op = node.op
    if op.name == "proj":
        parent = node.inputs[0]
        slots: list[Any] = [None] * len(parent.avals)
        slots[node.attrs["index"]] = cotangent
        return [slots]
    if op.name == "custom_vjp":
        return pull_back_custom(ctx, node, cotangent)
    if op.vjp is NONDIFFERENTIABLE:
        return [None] * len(node.inputs)
    if node.avals:
        cotangent = [zeros(ctx, s, d) if c is None else c for c, (s, d) in zip(cotangent, node.avals)]
        result: Any = tuple(
            Tensor(ctx.builder.add("proj", (node,), {"index": i}), ctx) for i in range(len(node.avals))
        )
    else:
        result = Tensor(node, ctx)
    operands = [Tensor(n, ctx) for n in node.inputs]
    found = op.vjp(cotangent, result, *operands, **node.attrs)  # type: ignore[operator]
    if len(found) != len(node.inputs):
        raise GradientError.make(
            f"the gradient rule of {op.name} returned {len(found)} values for {len(node.inputs)} operands"
        )
    return [
        None if c is None or n.dtype.kind != "f" else c if isinstance(c, Tensor) else lift(c, ctx, n)
        for c, n in zip(found, node.inputs)
    ]


def _ones_like(ctx: TraceContext, node: Node) -> Tensor:
    return zeros(ctx, node.shape, node.dtype, 1)


# -- value_and_grad ------------------------------------------------------------------------------------------------


def value_and_grad(
    fn: Callable[..., Any],
    wrt: int | Sequence[int] = 0,
    has_aux: bool = False,
    *,
    argnums: int | Sequence[int] | None = None,
) -> Callable[..., Any]:
    """A function that returns ``(fn(...), gradients)``; ``fn`` must return a scalar (or ``(scalar, aux)`` with ``has_aux``).

    ``wrt`` says which positional argument(s) to differentiate: an int gives one gradient, a tuple a tuple of them, each
    with the argument's tree structure. Leaves that are integers get zeros. Works inside and outside of ``@trace``;
    outside, the whole is traced and cached like any traced function. ``argnums`` is accepted as JAX's name for ``wrt``.
    """
    return _Gradient(fn, wrt if argnums is None else argnums, has_aux, with_value=True)


def grad(
    fn: Callable[..., Any],
    wrt: int | Sequence[int] = 0,
    has_aux: bool = False,
    *,
    argnums: int | Sequence[int] | None = None,
) -> Callable[..., Any]:
    """As :func:`value_and_grad` but returns the gradients only (``(gradients, aux)`` with ``has_aux``)."""
    return _Gradient(fn, wrt if argnums is None else argnums, has_aux, with_value=False)


def _as_float(leaf: Any) -> Any:
    """A Python integer that is differentiated with respect to stands for a float, as it does in ``3 * 0.5``."""
    if type(leaf) is int:
        return float(leaf)
    if isinstance(leaf, Tensor) and leaf.weak and leaf.dtype.kind == "i":
        from tracejit import functions as F

        return Tensor(F.astype(leaf, np.float64).node, leaf.ctx, weak=True)
    return leaf


class _Gradient:
    """What ``grad`` and ``value_and_grad`` return. Holds a traced version of itself for calls from outside a trace."""

    def __init__(
        self, fn: Callable[..., Any], wrt: int | Sequence[int], has_aux: bool, with_value: bool
    ) -> None:
        if not callable(fn):
            raise GradientError.make(f"grad takes a function, got {type(fn).__name__}", op="grad")
        positions = tuple(wrt) if isinstance(wrt, list | tuple) else (wrt,)
        if not positions or not all(isinstance(p, int) and not isinstance(p, bool) for p in positions):
            raise GradientError.make(f"wrt must be an int or a tuple of ints, got {wrt!r}", op="grad")
        self._fn = fn
        self._wrt = wrt
        self._positions = positions
        self._has_aux = has_aux
        self._with_value = with_value
        self._traced: Any = None
        functools.update_wrapper(self, fn, updated=())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if current_context() is not None:
            return self._inside(args, kwargs)
        try:
            if state.disable_jit:  # a derivative is made by tracing, also where nothing is compiled
                with changed(disable_jit=False):
                    return self._outside()(*args, **kwargs)
            return self._outside()(*args, **kwargs)
        except Exception as error:
            # One line of ours in a traceback, not two.
            raise hide_internal_frames(error)  # noqa: B904

    def _outside(self) -> Any:
        if self._traced is None:
            from tracejit.jit import TracedFunction

            self._traced = TracedFunction(
                self._entry, name=f"grad({getattr(self._fn, '__name__', 'function')})", environment=self._fn
            )
        return self._traced

    def _entry(self, *args: Any, **kwargs: Any) -> Any:
        return self._inside(args, kwargs)

    def graph(self, *args: Any, **kwargs: Any) -> Graph:
        """The graph of value and gradients, as for a traced function."""
        return self._outside().graph(*args, **kwargs)

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self if instance is None else functools.partial(self, instance)

    def _inside(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        ctx = current_context()
        assert ctx is not None
        args_list = list(args)
        marked_trees: list[tuple[Any, list[Any], list[Tensor | None]]] = []
        for position in self._positions:
            if not -len(args) <= position < len(args):
                raise GradientError.make(
                    f"wrt={position} but the function was called with {len(args)} positional arguments",
                    op="grad",
                )
            leaves, tree = trees.flatten(args_list[position])
            if tree.num_nodes == 1:
                leaves = [_as_float(leaf) for leaf in leaves]
            marked = [self._mark(ctx, leaf) for leaf in leaves]
            if not any(m is not None for m in marked):
                raise GradientError.make(
                    f"argument {position} has nothing to differentiate",
                    op="grad",
                    got={"argument": args_list[position]},
                    hint="gradients exist for floating-point arrays and Python floats; use astype(np.float32) or pass 3.0",
                )
            args_list[position] = tree.unflatten(
                [leaf if m is None else m for leaf, m in zip(leaves, marked)]
            )
            marked_trees.append((tree, leaves, marked))
        out = self._fn(*args_list, **kwargs)
        aux: Any = None
        if self._has_aux:
            if not isinstance(out, tuple) or len(out) != 2:
                raise GradientError.make("with has_aux=True the function must return (loss, aux)", op="grad")
            out, aux = out
        value = self._check_scalar(out)
        markers = [m for _, _, marked in marked_trees for m in marked if m is not None]
        if isinstance(value, Tensor):
            root = to_node(value, ctx)
            found = iter(backward(ctx, [(root, _ones_like(ctx, root))], [m.node for m in markers]))
        else:
            found = iter([None] * len(markers))  # the loss does not depend on any tensor
        gradients = []
        for tree, leaves, marked in marked_trees:
            parts = []
            for leaf, m in zip(leaves, marked):
                cotangent = next(found) if m is not None else None
                if cotangent is None:
                    cotangent = self._zero_gradient(ctx, leaf)
                parts.append(cotangent)
            gradients.append(tree.unflatten(parts))
        result = gradients[0] if isinstance(self._wrt, int) else tuple(gradients)
        if self._with_value:
            return ((out, aux), result) if self._has_aux else (out, result)
        return (result, aux) if self._has_aux else result

    @staticmethod
    def _mark(ctx: TraceContext, leaf: Any) -> Tensor | None:
        """A fresh identity node for a differentiable leaf, so that only uses through the argument are differentiated."""
        if isinstance(leaf, float) or (is_arraylike(leaf) and leaf.dtype.kind == "f"):
            node = to_node(leaf, ctx, op="grad")
            weak = isinstance(leaf, float) or (isinstance(leaf, Tensor) and leaf.weak)
            return Tensor(ctx.builder.add(GRAD_INPUT, (node,), {"uid": next(_uids)}), ctx, weak)
        return None

    @staticmethod
    def _zero_gradient(ctx: TraceContext, leaf: Any) -> Any:
        if is_arraylike(leaf):
            return zeros(ctx, leaf.shape, leaf.dtype)
        if isinstance(leaf, bool | int | float):
            return type(leaf)(0)
        return None

    def _check_scalar(self, value: Any) -> Any:
        name = getattr(self._fn, "__name__", "the function")
        if isinstance(value, float):
            return value
        if not is_arraylike(value):
            hint = (
                "return (loss, aux) and pass has_aux=True"
                if isinstance(value, tuple)
                else "return a scalar loss"
            )
            raise GradientError.make(
                f"{name} must return a scalar, got {type(value).__name__}", op="grad", hint=hint
            )
        if value.shape != ():
            raise GradientError.make(
                f"{name} must return a scalar",
                op="grad",
                got={"result": value},
                hint="reduce it, e.g. with .mean() or .sum()",
            )
        if value.dtype.kind != "f":
            raise GradientError.make(
                f"{name} must return a floating-point scalar", op="grad", got={"result": value}
            )
        return value


# -- vjp of a whole graph, jvp -------------------------------------------------------------------------------------


def vjp_graph(graph: Graph, wrt: Sequence[int]) -> Graph:
    """The graph ``(inputs..., one cotangent per output...) -> cotangents of inputs[i] for i in wrt``.

    Used for the bodies of control flow. Zero cotangents are explicit; every ``wrt`` input must be floating-point, and
    cotangents of non-float outputs are accepted and ignored.
    """
    ctx = TraceContext(f"{graph.name}_vjp")
    from tracejit.graph import inline

    with recording(ctx):
        inputs = [ctx.add_input(n.name, n.shape, n.dtype) for n in graph.inputs]
        marked = {i: ctx.builder.add(GRAD_INPUT, (inputs[i],), {"uid": next(_uids)}) for i in wrt}
        outputs = inline(ctx.builder, graph, [marked.get(i, n) for i, n in enumerate(inputs)])
        cotangents = [ctx.add_input(f"ct{i}", n.shape, n.dtype) for i, n in enumerate(graph.outputs)]
        roots = [(o, Tensor(c, ctx)) for o, c in zip(outputs, cotangents) if o.dtype.kind == "f"]
        found = backward(ctx, roots, [marked[i] for i in wrt])
        results = [
            (zeros(ctx, inputs[i].shape, inputs[i].dtype) if g is None else g).node
            for i, g in zip(wrt, found)
        ]
    return Graph.build(ctx.name, ctx.inputs, results, [f"d{i}" for i in wrt], ctx.effects)


def jvp(fn: Callable[..., Any], primals: Sequence[Any], tangents: Sequence[Any]) -> tuple[Any, Any]:
    """``(fn(*primals), directional derivative along tangents)``, as ``jax.jvp``; trees are allowed.

    Forward mode by transposing reverse mode twice: the cotangent map u -> J^T u is linear, and its own transpose
    applied to the tangents is J v (Townsend 2017, "A new trick for calculating Jacobian vector products").
    """
    if len(primals) != len(tangents):
        raise GradientError.make(f"{len(primals)} primals but {len(tangents)} tangents", op="jvp")
    if current_context() is None:
        from tracejit.jit import TracedFunction

        traced = TracedFunction(
            lambda p, t: _jvp(fn, p, t), name=f"jvp({getattr(fn, '__name__', 'function')})", environment=fn
        )
        with changed(disable_jit=False):
            return traced(tuple(primals), tuple(tangents))
    return _jvp(fn, tuple(primals), tuple(tangents))


def _jvp(fn: Callable[..., Any], primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Any, Any]:
    ctx = current_context()
    assert ctx is not None
    leaves, tree = trees.flatten(primals)
    directions, tangent_tree = trees.flatten(tangents)
    if tangent_tree != tree:
        raise GradientError.make("primals and tangents have different tree structures", op="jvp")
    marked = [_Gradient._mark(ctx, leaf) for leaf in leaves]
    out = fn(*tree.unflatten([leaf if m is None else m for leaf, m in zip(leaves, marked)]))
    out_leaves, out_tree = trees.flatten(out)
    roots, dummies = [], []
    for leaf in out_leaves:
        if isinstance(leaf, Tensor) and leaf.dtype.kind == "f":
            node = to_node(leaf, ctx)
            dummy = ctx.builder.add(
                GRAD_INPUT, (zeros(ctx, node.shape, node.dtype).node,), {"uid": next(_uids)}
            )
            roots.append((node, Tensor(dummy, ctx)))
            dummies.append(dummy)
    wrt = [m.node for m in marked if m is not None]
    pulled = backward(ctx, roots, wrt)
    second = []
    for cotangent, direction, primal in zip(
        pulled, (d for d, m in zip(directions, marked) if m is not None), wrt
    ):
        if cotangent is None:
            continue
        from tracejit import functions as F

        value = F.astype(Tensor(to_node(direction, ctx, op="jvp"), ctx), primal.dtype)
        if value.shape != primal.shape:
            raise ShapeError.make(
                "a tangent must have the shape of its primal",
                op="jvp",
                got={"primal": primal, "tangent": value},
            )
        second.append((cotangent.node, value))
    pushed = iter(backward(ctx, second, dummies))
    results = []
    for leaf in out_leaves:
        if isinstance(leaf, Tensor) and leaf.dtype.kind == "f":
            tangent = next(pushed)
            results.append(zeros(ctx, leaf.shape, leaf.dtype) if tangent is None else tangent)
        else:
            results.append(_Gradient._zero_gradient(ctx, leaf))
    return out, out_tree.unflatten(results)
