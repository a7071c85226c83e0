"""Gradient rules given by the user: ``custom_vjp`` and ``stop_gradient``. The reverse sweep in ``autograd.py`` calls back.

``nn`` uses them where a closed form makes a smaller gradient graph (softmax, layer norm, cross-entropy).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from tracejit import trees
from tracejit.errors import GradientError
from tracejit.graph import Node
from tracejit.ops import registry
from tracejit.tensor import Tensor, TraceContext, current_context, is_arraylike, lift, to_node, zeros


class _CustomRule:
    """What a ``custom_vjp`` node carries: the user's backward function and how to rebuild its arguments."""

    arg_slots: list[int]  # argument leaves that are operands of the node
    arg_tree: Any
    out_slots: list[int]  # result leaves that are outputs of the node
    out_tree: Any
    res_static: list[tuple[Any] | None]  # residual leaves that are no tensors, wrapped; None for tensors
    res_tree: Any
    n_out: int

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
        """Call the function; while tracing, record it together with its rule."""
        leaves, _ = trees.flatten((args, kwargs))
        ctx = current_context()
        if ctx is None or not any(isinstance(leaf, Tensor) for leaf in leaves):
            return self._fn(*args, **kwargs)
        if self._fwd is None or self._bwd is None:
            raise GradientError.make("call defvjp(fwd, bwd) before using the function", op=self._fn.__name__)
        if kwargs:
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
        out_leaves, rule.out_tree = trees.flatten(out)
        arg_leaves, rule.arg_tree = trees.flatten(args)
        res_leaves, rule.res_tree = trees.flatten(residuals)
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


def pull_back_custom(ctx: TraceContext, node: Node, cotangents: list[Any]) -> list[Tensor | None]:
    """Run the user's backward function for a ``custom_vjp`` node."""
    rule: Any = node.attrs["rule"]
    if not isinstance(rule, _CustomRule):
        raise GradientError.make(
            "this graph was loaded from text, which cannot hold the rule of a custom_vjp", op="custom_vjp"
        )
    n_out, n_diff = rule.n_out, len(rule.arg_slots)
    tensors = [Tensor(n, ctx) for n in node.inputs]
    filled = [
        zeros(ctx, shape, dtype) if c is None else c for c, (shape, dtype) in zip(cotangents, node.avals)
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
        raise GradientError.make(
            f"bwd returned {len(found)} cotangents for {len(children)} arguments", op=rule.name
        )
    for value, child in zip(found, children):
        if value is None:
            parts.extend([None] * child.num_leaves)
            continue
        leaves = trees.leaves(value, none_is_leaf=True)
        if len(leaves) != child.num_leaves:
            raise GradientError.make(
                "a cotangent returned by bwd has another tree structure than its argument", op=rule.name
            )
        parts.extend(leaves)
    result: list[Tensor | None] = [None] * len(node.inputs)
    for k, slot in enumerate(rule.arg_slots):
        operand, value = node.inputs[n_out + k], parts[slot]
        if value is None or operand.dtype.kind != "f":
            continue
        tensor = value if isinstance(value, Tensor) else lift(value, ctx, operand)
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
    return trees.tree_map(lambda v: op(v) if isinstance(v, Tensor) else v, x)
