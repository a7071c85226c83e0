"""``tj.vmap`` for users: which axes are mapped, the trace of one example, and the axes of the results, after ``jax.vmap``.

The rules that turn the trace of one example into many are in the files beside this one.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import optree

from tracejit import trees
from tracejit.batching.core import Batcher, Lane
from tracejit.dtypes import WEAK_DTYPES
from tracejit.errors import ShapeError, TracingError
from tracejit.graph import Graph
from tracejit.signature import leaf_paths
from tracejit.tensor import Tensor, TraceContext, current_context, is_arraylike, recording, to_node


def vmap(fn: Callable[..., Any], in_axes: Any = 0, out_axes: Any = 0) -> Callable[..., Any]:
    """A function that applies ``fn`` to every example along an axis of its arguments, all at once, and stacks the results.

    ``in_axes`` says which axis of each positional argument runs over the examples: an int (negative ones count from the
    end) or None (the argument is the same for all) for all arguments, or a tuple with an entry per argument, each an
    int, None, or a tree of them with the structure of the argument or of an outer part of it. Keyword arguments are
    mapped over axis 0. ``out_axes`` likewise says where the axis appears in the results; None keeps a result that is the
    same for all examples without it. Inside, ``fn`` sees one example: shapes without the mapped axis.

    Works inside and outside of ``@trace`` (outside, the whole is traced and cached) and nests with itself, ``grad``,
    ``value_and_grad``, ``jvp`` and control flow: ``vmap(grad(loss), in_axes=(None, 0, 0))`` gives a gradient per example.
    A ``cond`` whose condition differs between examples computes both branches. As ``jax.vmap``.

    Errors: ShapeError if mapped axes differ in size, do not exist, or ``in_axes``/``out_axes`` do not fit the trees;
    TracingError if nothing is mapped or a result is no array.
    """
    return _Mapped(fn, in_axes, out_axes)


class _Mapped:
    """What :func:`vmap` returns. Holds a traced version of itself for calls from outside a trace."""

    def __init__(self, fn: Callable[..., Any], in_axes: Any, out_axes: Any) -> None:
        if not callable(fn):
            raise TracingError.make(f"vmap takes a function, got {type(fn).__name__}", op="vmap")
        self._in_axes = tuple(in_axes) if isinstance(in_axes, list) else in_axes
        self._out_axes = out_axes
        if not (in_axes is None or _is_axis(in_axes) or isinstance(self._in_axes, tuple)):
            raise TracingError.make(
                f"in_axes must be an int, None or a tuple with an entry per argument, got {in_axes!r}",
                op="vmap",
            )
        for name, axes in (("in_axes", self._in_axes), ("out_axes", out_axes)):
            wrong = [a for a in trees.leaves(axes, none_is_leaf=True) if not (a is None or _is_axis(a))]
            if wrong:
                raise TracingError.make(f"{name} consists of ints and None, not {wrong[0]!r}", op="vmap")
        self._fn = fn
        self._name: str = getattr(fn, "__name__", "function")
        self._traced: Any = None
        self._parameters = _parameters(fn)
        functools.update_wrapper(self, fn, updated=())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if current_context() is None:
            return self._outside()(*args, **kwargs)
        return self._inside(args, kwargs)

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self if instance is None else functools.partial(self, instance)

    def _outside(self) -> Any:
        if self._traced is None:
            from tracejit.jit import TracedFunction

            self._traced = TracedFunction(self._entry, name=f"vmap({self._name})", environment=self._fn)
            self._traced._parameters = self._parameters  # inputs are named as fn names them
        return self._traced

    def _entry(self, *args: Any, **kwargs: Any) -> Any:
        if current_context() is None:  # tj.disable_jit()
            return self._loop(args, kwargs)
        return self._inside(args, kwargs)

    def graph(self, *args: Any, **kwargs: Any) -> Graph:
        """The graph for many examples, as for a traced function."""
        return self._outside().graph(*args, **kwargs)

    def inspect(self, *args: Any, **kwargs: Any) -> Any:
        """Every stage of the program for these arguments, as for a traced function."""
        return self._outside().inspect(*args, **kwargs)

    # -- arguments and results ---------------------------------------------------------------------------------------

    def _arguments(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[Any, list[Any], list[int | None], int]:
        """Tree, leaves, mapped axis per leaf (non-negative), and the number of examples."""
        if isinstance(self._in_axes, tuple) and len(self._in_axes) != len(args):
            raise ShapeError.make(
                f"in_axes has {len(self._in_axes)} entries, but {self._name} was called with {len(args)} positional "
                "arguments",
                op="vmap",
            )
        leaves, tree = trees.flatten((args, dict(kwargs)))
        names = leaf_paths(args, dict(kwargs), self._parameters)
        axes = _spread(self._in_axes, args, "in_axes", "the arguments")
        axes += [0] * (len(leaves) - len(axes))
        sizes: dict[str, int] = {}
        for i, (leaf, axis, name) in enumerate(zip(leaves, axes, names)):
            if axis is None:
                continue
            if not is_arraylike(leaf) or leaf.shape == ():
                raise ShapeError.make(
                    f"{name} has no axis {axis} to map over", op="vmap", got={name: leaf},
                    hint="give it None in in_axes" if i < tree.num_leaves - len(kwargs) else "keyword arguments are "
                    "mapped over axis 0; bind it with functools.partial",
                )  # fmt: skip
            axes[i] = _normalised(axis, len(leaf.shape), f"in_axes maps axis {axis} of {name}", {name: leaf})
            sizes[name] = leaf.shape[axis]
        if not sizes:
            raise TracingError.make(
                f"nothing to map: no argument of {self._name} has a mapped axis",
                op="vmap",
                hint="in_axes=0 maps over the first axis of every argument",
            )
        if len(set(sizes.values())) > 1:
            text = ", ".join(
                f"axis {a} of {n} has {sizes[n]}" for n, a in zip(names, axes) if a is not None and n in sizes
            )
            got = {n: leaf for n, leaf, a in zip(names, leaves, axes) if a is not None}
            raise ShapeError.make(f"the mapped axes differ in size: {text}", op="vmap", got=got)
        return tree, leaves, axes, next(iter(sizes.values()))

    def _result_axes(self, result: Any) -> list[int | None]:
        return _spread(self._out_axes, result, "out_axes", f"what {self._name} returns")

    def _inside(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        ctx = current_context()
        assert ctx is not None
        tree, leaves, axes, size = self._arguments(args, kwargs)
        batcher, out, out_tree = map_over(
            lambda a, k: self._fn(*a, **k), tree, leaves, axes, size, self._name, self._parameters
        )
        wanted = self._result_axes(out_tree.unflatten(out))
        paths = trees.paths(out_tree.unflatten(out))
        results = []
        for value, axis, path in zip(out, wanted, paths):
            if axis is None:
                if isinstance(value, Lane) and value.batched:
                    raise ShapeError.make(
                        f"out_axes is None for result{path}, which differs between the examples",
                        op="vmap",
                        got={f"result{path}": value},
                        hint="give the axis that it is to have",
                    )
                results.append(Tensor(value.node, ctx) if isinstance(value, Lane) else value)
                continue
            node = batcher.every(value if isinstance(value, Lane) else _constant(value, ctx, path))
            at = _normalised(
                axis, node.ndim, f"out_axes puts axis {axis} into result{path}", {f"result{path}": node}
            )
            results.append(Tensor(batcher.move(node, 0, at), ctx))
        return out_tree.unflatten(results)

    def _loop(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The meaning of vmap, in plain Python: what runs under ``tj.disable_jit()``."""
        tree, leaves, axes, size = self._arguments(args, kwargs)
        examples = []
        for k in range(size):
            one = [
                leaf if a is None else np.asarray(leaf)[(slice(None),) * a + (k,)]
                for leaf, a in zip(leaves, axes)
            ]
            a, kw = tree.unflatten(one)
            examples.append(self._fn(*a, **kw))
        if not examples:
            raise ShapeError.make("no examples to run in plain Python", op="vmap")
        wanted = self._result_axes(examples[0])
        flat = [trees.leaves(e) for e in examples]
        _, out_tree = trees.flatten(examples[0])
        columns = [
            column[0] if axis is None else np.stack(column, axis)
            for axis, column in zip(wanted, zip(*flat, strict=True))
        ]
        return out_tree.unflatten(columns)


def map_over(
    fn: Callable[..., Any],
    tree: Any,
    leaves: Sequence[Any],
    axes: Sequence[int | None],
    size: int,
    name: str,
    parameters: Sequence[str] = (),
) -> tuple[Batcher, list[Any], Any]:
    """Trace ``fn(*tree.unflatten(one example))`` and emit it for all examples into the running trace.

    Returns the batcher (to finish the results), the result leaves, and their tree. Tensors among the leaves are lanes;
    everything else is as ``fn`` returned it.
    """
    ctx = current_context()
    assert ctx is not None
    batcher = Batcher(ctx.builder, size)
    inner = TraceContext(name.strip("<>"), parent=ctx)
    lanes: dict[Any, Lane] = {}
    with recording(inner):
        example = []
        for i, (leaf, axis) in enumerate(zip(leaves, axes, strict=True)):
            if axis is None:
                example.append(leaf)  # used like a value of the surroundings
                continue
            whole = to_node(leaf, ctx, op="vmap")
            shape = whole.shape[:axis] + whole.shape[axis + 1 :]
            node = inner.add_input(f"example{i}", shape, whole.dtype)
            lanes[node] = Lane(batcher.move(whole, axis, 0), True)
            example.append(Tensor(node, inner))
        out, out_tree = trees.flatten(fn(*tree.unflatten(example)))
        traced = {i: to_node(leaf, inner, op=name) for i, leaf in enumerate(out) if isinstance(leaf, Tensor)}
    for tensor, node in inner.lifted.values():
        lanes[node] = Lane(tensor.node, False)
    graph = Graph.build(inner.name, inner.inputs, list(traced.values()), (), inner.effects)
    found = batcher.run(graph, [lanes[n] for n in graph.inputs])
    ctx.effects.extend(e for e in batcher.effects if e not in ctx.effects)
    for i, lane in zip(traced, found, strict=True):
        out[i] = lane
    return batcher, out, out_tree


def _is_axis(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _parameters(fn: Callable[..., Any]) -> list[str]:
    try:
        parameters = inspect.signature(fn).parameters.values()
    except (TypeError, ValueError):  # some builtins have none
        return []
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [p.name for p in parameters if p.kind in positional]


def _spread(prefix: Any, tree: Any, name: str, what: str) -> list[int | None]:
    """The axis of each leaf of ``tree`` (None among its nodes is no leaf) from a prefix of its structure."""
    try:
        axes = optree.broadcast_prefix(prefix, tree, none_is_leaf=True, namespace=trees.NAMESPACE)
    except ValueError as error:
        raise ShapeError.make(f"{name} does not fit the structure of {what}: {error}", op="vmap") from None
    leaves = trees.leaves(tree, none_is_leaf=True)
    return [a for a, leaf in zip(axes, leaves, strict=True) if leaf is not None]


def _normalised(axis: int, ndim: int, role: str, got: Mapping[str, Any]) -> int:
    if not -ndim <= axis < ndim:
        raise ShapeError.make(f"{role}, which has {ndim} axes", op="vmap", got=got)
    return int(axis) % ndim


def _constant(value: Any, ctx: TraceContext, path: str) -> Lane:
    """A result that was known while tracing, as a value that all examples share."""
    if not (is_arraylike(value) or type(value) in WEAK_DTYPES):
        raise TracingError.make(
            f"result{path} is no array but a {type(value).__name__}, which cannot be stacked", op="vmap",
            hint="return it with out_axes=None",
        )  # fmt: skip
    return Lane(to_node(value, ctx, op="vmap"), False)


__all__ = ["map_over", "vmap"]
