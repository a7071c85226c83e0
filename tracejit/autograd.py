"""Reverse-mode differentiation, graph to graph: ``grad``, ``value_and_grad``, ``vjp_graph``, ``jvp``, ``custom_vjp``.

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
import optree

from tracejit import source
from tracejit.errors import GradientError, ShapeError, describe
from tracejit.graph import Graph, Node
from tracejit.ops import registry
from tracejit.ops.registry import NONDIFFERENTIABLE
from tracejit.tensor import Tensor, TraceContext, current_context, is_arraylike, recording, to_node

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


def backward(ctx: TraceContext, roots: Sequence[tuple[Node, Tensor]], wrt: Sequence[Node]) -> list[Tensor | None]:
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
            _accumulate(ctx, cotangents, node, cotangent)
    builder = ctx.builder
    for node in reversed(order):
        if node in targets or node not in needed or node not in cotangents:
            continue
        outer, builder.grad_of = builder.grad_of, node
        try:
            with source.at_scope(node.scope):
                for operand, cotangent in zip(node.inputs, _pull_back(ctx, node, cotangents.pop(node))):
                    if cotangent is not None and operand in needed:
                        _accumulate(ctx, cotangents, operand, cotangent)
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


def _accumulate(ctx: TraceContext, cotangents: dict[Node, Any], node: Node, value: Any) -> None:
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


def _pull_back(ctx: TraceContext, node: Node, cotangent: Any) -> Sequence[Tensor | None]:
    """The cotangents of the operands of ``node``."""
    op = node.op
    if op.name == "proj":
        parent = node.inputs[0]
        slots: list[Any] = [None] * len(parent.avals)
        slots[node.attrs["index"]] = cotangent
        return [slots]  # type: ignore[list-item]
    if op.name == "custom_vjp":
        return _pull_back_custom(ctx, node, cotangent)
    if op.vjp is NONDIFFERENTIABLE:
        return [None] * len(node.inputs)
    if node.avals:
        cotangent = [_zeros(ctx, s, d) if c is None else c for c, (s, d) in zip(cotangent, node.avals)]
        result: Any = tuple(
            Tensor(ctx.builder.add("proj", (node,), {"index": i}), ctx) for i in range(len(node.avals))
        )
    else:
        result = Tensor(node, ctx)
    operands = [Tensor(n, ctx) for n in node.inputs]
    found = op.vjp(cotangent, result, *operands, **node.attrs)  # type: ignore[operator]
    if len(found) != len(node.inputs):
        raise GradientError.make(f"the gradient rule of {op.name} returned {len(found)} values for {len(node.inputs)} operands")
    return [
        None if c is None or n.dtype.kind != "f" else c if isinstance(c, Tensor) else _lift(c, ctx, n)
        for c, n in zip(found, node.inputs)
    ]


def _lift(value: Any, ctx: TraceContext, like: Node) -> Tensor:
    """A concrete cotangent (a scalar or array that a rule returned) as a tensor of the operand's shape and dtype."""
    from tracejit import functions as F

    node = to_node(np.asarray(value, dtype=like.dtype)[()], ctx)
    return F.broadcast_to(Tensor(node, ctx), like.shape)


def _zeros(ctx: TraceContext, shape: tuple[int, ...], dtype: Any) -> Tensor:
    builder = ctx.builder
    zero = builder.const(0, dtype)
    return Tensor(zero if shape == () else builder.add("broadcast_to", (zero,), {"shape": shape}), ctx)


def _ones_like(ctx: TraceContext, node: Node) -> Tensor:
    builder = ctx.builder
    one = builder.const(1, node.dtype)
    return Tensor(one if node.shape == () else builder.add("broadcast_to", (one,), {"shape": node.shape}), ctx)


# -- value_and_grad ------------------------------------------------------------------------------------------------


def value_and_grad(
    fn: Callable[..., Any], wrt: int | Sequence[int] = 0, has_aux: bool = False, *, argnums: int | Sequence[int] | None = None
) -> Callable[..., Any]:
    """A function that returns ``(fn(...), gradients)``; ``fn`` must return a scalar (or ``(scalar, aux)`` with ``has_aux``).

    ``wrt`` says which positional argument(s) to differentiate: an int gives one gradient, a tuple a tuple of them, each
    with the argument's tree structure. Leaves that are integers get zeros. Works inside and outside of ``@trace``;
    outside, the whole is traced and cached like any traced function. ``argnums`` is accepted as JAX's name for ``wrt``.
    """
    return _Gradient(fn, wrt if argnums is None else argnums, has_aux, with_value=True)


def grad(
    fn: Callable[..., Any], wrt: int | Sequence[int] = 0, has_aux: bool = False, *, argnums: int | Sequence[int] | None = None
) -> Callable[..., Any]:
    """As :func:`value_and_grad` but returns the gradients only (``(gradients, aux)`` with ``has_aux``)."""
    return _Gradient(fn, wrt if argnums is None else argnums, has_aux, with_value=False)


class _Gradient:
    """What ``grad`` and ``value_and_grad`` return. Holds a traced version of itself for calls from outside a trace."""

    def __init__(self, fn: Callable[..., Any], wrt: int | Sequence[int], has_aux: bool, with_value: bool) -> None:
        if not callable(fn):
            raise GradientError.make(f"grad takes a function, got {type(fn).__name__}", op="grad")
        positions = (wrt,) if isinstance(wrt, int) else tuple(wrt)
        if not positions or not all(isinstance(p, int) for p in positions):
            raise GradientError.make(f"wrt must be an int or a tuple of ints, got {wrt!r}", op="grad")
        self._fn = fn
        self._wrt = wrt
        self._positions = positions
        self._has_aux = has_aux
        self._with_value = with_value
        self._traced: Any = None
        functools.update_wrapper(self, fn, updated=())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if current_context() is None:
            return self._outside()(*args, **kwargs)
        return self._inside(args, kwargs)

    def _outside(self) -> Any:
        if self._traced is None:
            from tracejit.jit import TracedFunction

            self._traced = TracedFunction(self._entry, name=f"grad({getattr(self._fn, '__name__', 'function')})", environment=self._fn)
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
        trees: list[tuple[Any, list[Any], list[Tensor | None]]] = []
        for position in self._positions:
            if not -len(args) <= position < len(args):
                raise GradientError.make(f"wrt={position} but the function was called with {len(args)} positional arguments", op="grad")
            leaves, tree = optree.tree_flatten(args_list[position], namespace="tracejit")
            marked = [self._mark(ctx, leaf) for leaf in leaves]
            if not any(m is not None for m in marked):
                raise GradientError.make(
                    f"argument {position} has nothing to differentiate",
                    op="grad",
                    got={"argument": args_list[position]},
                    hint="gradients exist for floating-point arrays and Python floats only; convert with astype(np.float32) or pass 3.0",
                )
            args_list[position] = tree.unflatten([leaf if m is None else m for leaf, m in zip(leaves, marked)])
            trees.append((tree, leaves, marked))
        out = self._fn(*args_list, **kwargs)
        aux: Any = None
        if self._has_aux:
            if not isinstance(out, tuple) or len(out) != 2:
                raise GradientError.make("with has_aux=True the function must return (loss, aux)", op="grad")
            out, aux = out
        value = self._check_scalar(out)
        markers = [m for _, _, marked in trees for m in marked if m is not None]
        if isinstance(value, Tensor):
            root = to_node(value, ctx)
            found = iter(backward(ctx, [(root, _ones_like(ctx, root))], [m.node for m in markers]))
        else:
            found = iter([None] * len(markers))  # the loss does not depend on any tensor
        gradients = []
        for tree, leaves, marked in trees:
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
            return _zeros(ctx, leaf.shape, leaf.dtype)
        if isinstance(leaf, bool | int | float):
            return type(leaf)(0)
        return None

    def _check_scalar(self, value: Any) -> Any:
        name = getattr(self._fn, "__name__", "the function")
        if isinstance(value, float):
            return value
        if not is_arraylike(value):
            hint = "return (loss, aux) and pass has_aux=True" if isinstance(value, tuple) else "return a scalar loss"
            raise GradientError.make(f"{name} must return a scalar, got {type(value).__name__}", op="grad", hint=hint)
        if value.shape != ():
            raise GradientError.make(
                f"{name} must return a scalar", op="grad", got={"result": value}, hint="reduce it, e.g. with .mean() or .sum()"
            )
        if value.dtype.kind != "f":
            raise GradientError.make(f"{name} must return a floating-point scalar", op="grad", got={"result": value})
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
            (_zeros(ctx, inputs[i].shape, inputs[i].dtype) if g is None else g).node for i, g in zip(wrt, found)
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

        traced = TracedFunction(lambda p, t: _jvp(fn, p, t), name=f"jvp({getattr(fn, '__name__', 'function')})", environment=fn)
        return traced(tuple(primals), tuple(tangents))
    return _jvp(fn, tuple(primals), tuple(tangents))


def _jvp(fn: Callable[..., Any], primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Any, Any]:
    ctx = current_context()
    assert ctx is not None
    leaves, tree = optree.tree_flatten(primals, namespace="tracejit")
    directions, tangent_tree = optree.tree_flatten(tangents, namespace="tracejit")
    if tangent_tree != tree:
        raise GradientError.make("primals and tangents have different tree structures", op="jvp")
    marked = [_Gradient._mark(ctx, leaf) for leaf in leaves]
    out = fn(*tree.unflatten([leaf if m is None else m for leaf, m in zip(leaves, marked)]))
    out_leaves, out_tree = optree.tree_flatten(out, namespace="tracejit")
    roots, dummies = [], []
    for leaf in out_leaves:
        if isinstance(leaf, Tensor) and leaf.dtype.kind == "f":
            node = to_node(leaf, ctx)
            dummy = ctx.builder.add(GRAD_INPUT, (_zeros(ctx, node.shape, node.dtype).node,), {"uid": next(_uids)})
            roots.append((node, Tensor(dummy, ctx)))
            dummies.append(dummy)
    wrt = [m.node for m in marked if m is not None]
    pulled = backward(ctx, roots, wrt)
    second = []
    for cotangent, direction, primal in zip(pulled, (d for d, m in zip(directions, marked) if m is not None), wrt):
        if cotangent is None:
            continue
        from tracejit import functions as F

        value = F.astype(Tensor(to_node(direction, ctx, op="jvp"), ctx), primal.dtype)
        if value.shape != primal.shape:
            raise ShapeError.make("a tangent must have the shape of its primal", op="jvp", got={"primal": primal, "tangent": value})
        second.append((cotangent.node, value))
    pushed = iter(backward(ctx, second, dummies))
    results = []
    for leaf in out_leaves:
        if isinstance(leaf, Tensor) and leaf.dtype.kind == "f":
            tangent = next(pushed)
            results.append(_zeros(ctx, leaf.shape, leaf.dtype) if tangent is None else tangent)
        else:
            results.append(_Gradient._zero_gradient(ctx, leaf))
    return out, out_tree.unflatten(results)


# -- rules given by the user ---------------------------------------------------------------------------------------


class _CustomRule:
    """What a ``custom_vjp`` node carries: the user's backward function and how to rebuild its arguments."""

    __slots__ = ("arg_slots", "arg_tree", "bwd", "n_args", "n_out", "name", "out_slots", "out_tree", "res_static", "res_tree")

    def __init__(self, name: str, bwd: Callable[..., Any]) -> None:
        self.name = name
        self.bwd = bwd

    def __repr__(self) -> str:
        return self.name


class custom_vjp:
    """A function with a gradient rule of its own, as ``jax.custom_vjp``.

    ``f = custom_vjp(fn); f.defvjp(fwd, bwd)`` where ``fwd(*args) -> (result, residuals)`` and
    ``bwd(residuals, cotangent) -> tuple with one cotangent per argument`` (None for "no gradient"), both trees.
    ``bwd`` is recorded like any code, so derivatives of any order work if it uses differentiable operations. On concrete
    arrays, and where no gradient is taken, it is just ``fn``.
    """

    def __init__(self, fn: Callable[..., Any]) -> None:
        self._fn = fn
        self._fwd: Callable[..., Any] | None = None
        self._bwd: Callable[..., Any] | None = None
        functools.update_wrapper(self, fn, updated=())

    def defvjp(self, fwd: Callable[..., Any], bwd: Callable[..., Any]) -> None:
        """Set the forward and backward functions."""
        self._fwd, self._bwd = fwd, bwd

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self if instance is None else functools.partial(self, instance)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        leaves, _ = optree.tree_flatten((args, kwargs), namespace="tracejit")
        ctx = current_context()
        if ctx is None or not any(isinstance(leaf, Tensor) for leaf in leaves):
            return self._fn(*args, **kwargs)
        if self._fwd is None or self._bwd is None:
            raise GradientError.make("call defvjp(fwd, bwd) before using the function", op=self._fn.__name__)
        if kwargs:
            import inspect

            bound = inspect.signature(self._fn).bind(*args, **kwargs)
            bound.apply_defaults()
            args = bound.args
        return self._record(ctx, args)

    def _record(self, ctx: TraceContext, args: tuple[Any, ...]) -> Any:
        assert self._fwd is not None and self._bwd is not None
        rule = _CustomRule(getattr(self._fn, "__name__", "custom"), self._bwd)
        result = self._fwd(*args)
        if not isinstance(result, tuple) or len(result) != 2:
            raise GradientError.make("fwd must return (result, residuals)", op=rule.name)
        out, residuals = result
        out_leaves, rule.out_tree = optree.tree_flatten(out, namespace="tracejit")
        arg_leaves, rule.arg_tree = optree.tree_flatten(args, namespace="tracejit")
        res_leaves, rule.res_tree = optree.tree_flatten(residuals, namespace="tracejit")
        rule.n_args = len(arg_leaves)
        rule.out_slots = [i for i, v in enumerate(out_leaves) if is_arraylike(v)]
        rule.arg_slots = [i for i, v in enumerate(arg_leaves) if is_arraylike(v) or isinstance(v, float)]
        dynamic = [i for i, v in enumerate(res_leaves) if is_arraylike(v)]
        rule.res_static = [None if is_arraylike(v) else (v,) for v in res_leaves]
        rule.n_out = len(rule.out_slots)
        operands = [
            *(out_leaves[i] for i in rule.out_slots),
            *(arg_leaves[i] for i in rule.arg_slots),
            *(res_leaves[i] for i in dynamic),
        ]
        nodes = [to_node(v, ctx, op=rule.name) for v in operands]
        marker = ctx.builder.add("custom_vjp", nodes, {"rule": rule, "n_out": rule.n_out})
        for k, i in enumerate(rule.out_slots):
            out_leaves[i] = Tensor(ctx.builder.add("proj", (marker,), {"index": k}), ctx)
        return rule.out_tree.unflatten(out_leaves)


def _pull_back_custom(ctx: TraceContext, node: Node, cotangents: list[Any]) -> list[Tensor | None]:
    """Run the user's backward function for a ``custom_vjp`` node."""
    rule: Any = node.attrs["rule"]
    if not isinstance(rule, _CustomRule):
        raise GradientError.make("this graph was loaded from text, which cannot hold the rule of a custom_vjp", op="custom_vjp")
    n_out, n_diff = rule.n_out, len(rule.arg_slots)
    tensors = [Tensor(n, ctx) for n in node.inputs]
    filled = [
        _zeros(ctx, shape, dtype) if c is None else c for c, (shape, dtype) in zip(cotangents, node.avals)
    ]
    out_leaves: list[Any] = [None] * rule.out_tree.num_leaves
    for slot, value in zip(rule.out_slots, filled):
        out_leaves[slot] = value
    dynamic = iter(tensors[n_out + n_diff :])
    residuals = [next(dynamic) if s is None else s[0] for s in rule.res_static]
    found = rule.bwd(rule.res_tree.unflatten(residuals), rule.out_tree.unflatten(out_leaves))
    if not isinstance(found, tuple):
        raise GradientError.make("bwd must return a tuple with one cotangent per argument", op=rule.name)
    # One cotangent (sub-)tree per argument; None stands for a whole argument without gradient.
    parts: list[Any] = []
    children = rule.arg_tree.children()
    if len(found) != len(children):
        raise GradientError.make(f"bwd returned {len(found)} cotangents for {len(children)} arguments", op=rule.name)
    for value, child in zip(found, children):
        if value is None:
            parts.extend([None] * child.num_leaves)
            continue
        leaves = optree.tree_leaves(value, none_is_leaf=True, namespace="tracejit")
        if len(leaves) != child.num_leaves:
            raise GradientError.make("a cotangent returned by bwd has another tree structure than its argument", op=rule.name)
        parts.extend(leaves)
    result: list[Tensor | None] = [None] * len(node.inputs)
    for k, slot in enumerate(rule.arg_slots):
        operand, value = node.inputs[n_out + k], parts[slot]
        if value is None or operand.dtype.kind != "f":
            continue
        tensor = value if isinstance(value, Tensor) else _lift(value, ctx, operand)
        if (tensor.shape, tensor.dtype) != (operand.shape, operand.dtype):
            raise GradientError.make(
                "bwd returned a cotangent of another shape or dtype than its argument",
                op=rule.name,
                got={"argument": operand, "cotangent": tensor},
            )
        result[n_out + k] = tensor
    return result


def stop_gradient(x: Any) -> Any:
    """The tree ``x`` itself, through which no gradient flows."""
    op = registry.get("stop_gradient")
    return optree.tree_map(lambda v: op(v) if isinstance(v, Tensor) else v, x, namespace="tracejit")
