"""Control flow for users: ``tj.cond``, ``tj.while_loop``, ``tj.scan`` and ``tj.print``, after ``jax.lax``.

While tracing, branches and loop bodies are recorded as sub-graphs; values of the surroundings that they use
become operands. Outside a trace, and for a condition whose value is known, plain Python runs instead.
"""

from __future__ import annotations

import builtins
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import optree

from tracejit.dtypes import BOOL, WEAK_DTYPES, DType, canonical
from tracejit.errors import DTypeError, ShapeError, TracingError, describe
from tracejit.functions.promotion import shape_of
from tracejit.graph import Graph, GraphBuilder, Node, inline
from tracejit.ops import control as ops
from tracejit.ops import registry
from tracejit.tensor import (
    Tensor,
    TraceContext,
    bind,
    current_context,
    is_arraylike,
    recording,
    to_node,
)

_NAMESPACE = "tracejit"


@dataclass(frozen=True)
class _Aval:
    """What is known of a value before it exists."""

    shape: tuple[int, ...]
    dtype: DType
    weak: bool


@dataclass
class _Body:
    """A function recorded as a sub-graph in progress: its own inputs, its results, and what it used from
    outside."""

    context: TraceContext
    inputs: list[Node]
    outputs: list[Node]
    weak: list[bool]
    tree: Any

    @property
    def outer(self) -> dict[int, Tensor]:
        """Tensors of the enclosing trace that the body reads, by the identity of their node."""
        return {key: tensor for key, (tensor, _) in self.context.lifted.items()}

    def avals(self) -> list[_Aval]:
        """Shapes and dtypes of the results."""
        return [_Aval(n.shape, n.dtype, w) for n, w in zip(self.outputs, self.weak, strict=True)]

    def convert(self, i: int, dtype: DType) -> None:
        """Give weakly typed result ``i`` another dtype."""
        self.outputs[i] = self.context.builder.add("convert", (self.outputs[i],), {"dtype": dtype})
        self.weak[i] = False

    def close(
        self,
        outer: dict[int, Tensor],
        *,
        head: int,
        pass_through: bool,
        outputs: Sequence[Node] | None = None,
    ) -> Graph:
        """The finished sub-graph with inputs ``own[:head], outer values, own[head:]``.

        With ``pass_through`` the results are ``own[:head], outer values unchanged, own[head:]`` as loops need
        it.
        """
        builder = GraphBuilder()
        lifted = {key: node for key, (_, node) in self.context.lifted.items()}
        sources = [
            *((n, n, n.name, "argument") for n in self.inputs[:head]),
            *(
                (t.node, lifted.get(key), t.node.name or f"outer{i}", "outer")
                for i, (key, t) in enumerate(outer.items())
            ),
            *((n, n, n.name, "argument") for n in self.inputs[head:]),
        ]
        fresh: list[Node] = []
        known: dict[Node, Node] = {}
        for like, inner, name, kind in sources:
            fresh.append(ops.input_node(builder, len(fresh), (like.shape, like.dtype), name, kind))
            if inner is not None:  # None: only the other body of the operation reads this outer value
                known[inner] = fresh[-1]
        results = list(self.outputs if outputs is None else outputs)
        effects = self.context.effects
        draft = Graph.build(self.context.name, self.context.inputs, [*results, *effects], (), effects)
        copied = inline(builder, draft, [known[n] for n in draft.inputs])
        results = copied[: len(results)]
        if pass_through:
            results[head:head] = fresh[head : head + len(outer)]
        return Graph.build(self.context.name, fresh, results, (), copied[len(copied) - len(effects) :])


def _flatten(tree: Any) -> tuple[list[Any], Any]:
    leaves, spec = optree.tree_flatten(tree, namespace=_NAMESPACE)
    return leaves, spec


def _aval(leaf: Any, op: str, role: str) -> _Aval:
    if isinstance(leaf, Tensor):
        return _Aval(leaf.shape, leaf.dtype, leaf.weak)
    if type(leaf) in WEAK_DTYPES:
        return _Aval((), WEAK_DTYPES[type(leaf)], True)
    if is_arraylike(leaf):
        return _Aval(tuple(leaf.shape), canonical(leaf.dtype, op=op), False)
    raise DTypeError.make(f"{role} must consist of arrays and numbers, not {type(leaf).__name__}", op=op)


def _record(
    fn: Callable[..., Any], op: str, avals: Sequence[_Aval], spec: Any, names: Sequence[str]
) -> _Body:
    """Trace ``fn(*spec.unflatten(inputs of these avals))`` as a sub-graph of the current trace."""
    context = TraceContext(getattr(fn, "__name__", op).strip("<>"), parent=current_context())
    with recording(context):
        nodes = [context.add_input(n, a.shape, a.dtype) for n, a in zip(names, avals, strict=True)]
        tensors = [Tensor(n, context, a.weak) for n, a in zip(nodes, avals, strict=True)]
        result = fn(*spec.unflatten(tensors)) if spec is not None else fn()
        leaves, tree = _flatten(result)
        weak = [_aval(leaf, op, "the result").weak for leaf in leaves]
        outputs = [to_node(leaf, context, op=op) for leaf in leaves]
    return _Body(context, nodes, outputs, weak, tree)


def _emit(op: Any, operands: Sequence[Any], attrs: dict[str, Any], bodies: Sequence[_Body]) -> Sequence[Any]:
    """Record or compute the operation; if a body prints, the whole operation is kept for its effect."""
    context = current_context()
    if context is not None and any(b.context.effects for b in bodies):
        operands = [Tensor(to_node(o, context), context) for o in operands]
    results: Sequence[Any] = bind(op, operands, attrs)
    if context is not None and any(b.context.effects for b in bodies):
        node = results[0].node.inputs[0]
        if node not in context.effects:
            context.effects.append(node)
    return results


def _reweaken(value: Any, weak: bool) -> Any:
    return Tensor(value.node, value.ctx, True) if weak and isinstance(value, Tensor) else value


def _unify(op: str, role: str, want: _Aval, got: _Aval, path: str) -> DType | None:
    """None if ``got`` is like ``want``; the dtype to convert a weakly typed ``got`` to; else an error."""
    pair = {"expected": want, "result": got}
    if want.shape != got.shape:
        raise ShapeError.make(f"{role}{path} has another shape", op=op, got=pair)
    if want.dtype == got.dtype:
        return None
    if got.weak and _absorbs(want.dtype, got.dtype):
        return want.dtype
    raise DTypeError.make(
        f"{role}{path} has another dtype", op=op, got=pair, hint="convert with x.astype(...)"
    )


def _absorbs(strong: DType, weak: DType) -> bool:
    """True if a Python scalar of the kind of ``weak`` takes the dtype ``strong`` in NumPy's promotion (NEP
    50)."""
    rank = {"b": 0, "u": 1, "i": 1, "f": 2}
    return rank[weak.kind] <= rank[strong.kind]


def _structure(tree: Any) -> Any:
    return optree.tree_structure(tree, namespace=_NAMESPACE)


def _paths(spec: Any) -> list[str]:
    return [accessor.codify("") for accessor in spec.accessors()]


# -- cond ------------------------------------------------------------------------------------------


def cond(pred: Any, true_fn: Callable[..., Any], false_fn: Callable[..., Any], *operands: Any) -> Any:
    """``true_fn(*operands)`` if ``pred`` else ``false_fn(*operands)``; only that branch runs.

    Both functions return trees of equal structure, shapes and dtypes (a Python number adapts to the other
    branch's dtype). ``pred`` is a scalar; a number counts as true if it is not zero. Differentiable. As
    ``jax.lax.cond``.

    Errors: ShapeError, DTypeError, TracingError if the branches differ; ShapeError if ``pred`` is not a
    scalar.
    """
    for fn in (true_fn, false_fn):
        if not callable(fn):
            raise TracingError.make(f"the branches must be functions, got {describe(fn)}", op="cond")
    if shape_of(pred, "cond") != ():
        raise ShapeError.make(
            "the condition must be a scalar",
            op="cond",
            got={"pred": pred},
            hint="tj.where chooses per element",
        )
    if not isinstance(pred, Tensor):
        return (true_fn if pred else false_fn)(*operands)
    # Operands that are tensors reach the branches like closed-over values: both are lifted into the
    # sub-graph.
    chosen = _record(lambda: true_fn(*operands), "cond", (), None, ())
    other = _record(lambda: false_fn(*operands), "cond", (), None, ())
    chosen.context.name = getattr(true_fn, "__name__", "true").strip("<>")
    other.context.name = getattr(false_fn, "__name__", "false").strip("<>")
    if chosen.tree != other.tree:
        raise TracingError.make(
            f"the branches return trees of different structure: {chosen.tree} and {other.tree}", op="cond"
        )
    weak = []
    for i, path in enumerate(_paths(chosen.tree)):
        a, b = chosen.avals()[i], other.avals()[i]
        weak.append(a.weak and b.weak)
        if (a.weak and not b.weak) or (a.weak and b.weak and _absorbs(b.dtype, a.dtype)):
            a, b, target = b, a, chosen
        else:
            target = other
        dtype = _unify("cond", "the result of one branch", a, b, path)
        if dtype is not None:
            target.convert(i, dtype)
    if not chosen.outputs:
        return chosen.tree.unflatten([])
    outer = {**chosen.outer, **other.outer}
    graphs = {
        "true_graph": chosen.close(outer, head=0, pass_through=False),
        "false_graph": other.close(outer, head=0, pass_through=False),
    }
    flag = pred if pred.dtype == BOOL else registry.get("not_equal")(pred, _zero(pred.dtype))
    results = _emit(ops.cond, [flag, *outer.values()], graphs, (chosen, other))
    return chosen.tree.unflatten([_reweaken(r, w) for r, w in zip(results, weak, strict=True)])


def _zero(dtype: DType) -> Any:
    return registry.get("const")(value=np.zeros((), dtype).item(), dtype=dtype)


# -- loops: carries that keep their type -----------------------------------------------------------


def _stable_body(
    op: str,
    fn: Callable[..., Any],
    carry: list[_Aval],
    carry_spec: Any,
    xs: list[_Aval],
    spec: Any,
    names: list[str],
    split: Callable[[Any], tuple[Any, Any]],
) -> tuple[_Body, list[_Aval]]:
    """Record the body until its carry has the type that it takes; weakly typed initial carries may be
    widened.

    ``split`` says which part of the result tree is the carry. Returns the body and the final types of the
    carry.
    """

    def checked(*args: Any) -> Any:
        new, rest = split(fn(*args))
        found = _structure(new)
        if found != carry_spec:
            raise TracingError.make(
                f"the body must return a carry of the structure it takes, {carry_spec}, but returns {found}",
                op=op,
            )
        return new, rest

    paths = _paths(carry_spec)
    for _ in range(4):  # bool -> int -> float, then stable
        body = _record(checked, op, [*carry, *xs], spec, names)
        body.context.name = getattr(fn, "__name__", op).strip("<>")
        widened = list(carry)
        for i, (before, after) in enumerate(zip(carry, body.avals(), strict=False)):
            same_shape = before.shape == after.shape
            if (
                same_shape
                and before.weak
                and before.dtype != after.dtype
                and _absorbs(after.dtype, before.dtype)
            ):
                widened[i] = _Aval(after.shape, after.dtype, after.weak)
            elif same_shape and before.weak and before.dtype == after.dtype and not after.weak:
                widened[i] = _Aval(after.shape, after.dtype, False)
            else:
                dtype = _unify(op, "the new carry", before, after, paths[i])
                if dtype is not None:
                    body.convert(i, dtype)
        if widened == carry:
            return body, carry
        carry = widened
    raise TracingError.make("the type of the carry does not settle", op=op)


def _as_carry(leaf: Any, aval: _Aval) -> Any:
    """The initial value of a carry in its final dtype."""
    if isinstance(leaf, Tensor):
        return leaf if leaf.dtype == aval.dtype else registry.get("convert")(leaf, dtype=aval.dtype)
    if is_arraylike(leaf):
        return leaf
    return aval.dtype.type(leaf)


def _check_same(op: str, before: Any, after: Any) -> None:
    """The checks of a traced loop's carry, for loops that run as plain Python."""
    old, spec = _flatten(before)
    new, found = _flatten(after)
    if spec != found:
        raise TracingError.make(
            f"the body must return a carry of the structure it takes, {spec}, but returns {found}", op=op
        )
    for path, a, b in zip(_paths(spec), old, new, strict=True):
        x, y = _aval(a, op, "the carry"), _aval(b, op, "the carry")
        if not (x.weak and x.shape == y.shape and _absorbs(y.dtype, x.dtype)):
            _unify(op, "the new carry", x, y, path)


def while_loop(cond_fn: Callable[[Any], Any], body_fn: Callable[[Any], Any], init: Any) -> Any:
    """``while cond_fn(value): value = body_fn(value)``, starting at ``init``; returns the last value.

    ``value`` is a tree whose structure, shapes and dtypes the body keeps; ``cond_fn`` returns a boolean
    scalar. Has no reverse-mode gradient (GradientError): use :func:`scan`. As ``jax.lax.while_loop``.
    """
    leaves, spec = _flatten(init)
    avals = [_aval(leaf, "while_loop", "the initial value") for leaf in leaves]
    if current_context() is None:
        value = init
        while _truth(cond_fn(value)):
            new = body_fn(value)
            _check_same("while_loop", value, new)
            value = new
        return value
    arguments = _structure((init,))
    names = [f"carry{p}" for p in _paths(spec)]
    body, avals = _stable_body(
        "while_loop", body_fn, avals, spec, [], arguments, names, lambda result: (result, ())
    )
    test = _record(cond_fn, "while_loop", avals, arguments, names)
    if len(test.outputs) != 1 or test.outputs[0].shape != () or test.outputs[0].dtype != BOOL:
        got = {f"result{i}": n for i, n in enumerate(test.outputs[:4])}
        raise TracingError.make("the condition must return one boolean scalar", op="while_loop", got=got)
    if not leaves:
        raise TracingError.make("the loop carries no value", op="while_loop")
    outer = {**test.outer, **body.outer}
    graphs = {
        "cond_graph": test.close(outer, head=len(leaves), pass_through=False),
        "body_graph": body.close(outer, head=len(leaves), pass_through=True),
    }
    start = [_as_carry(leaf, a) for leaf, a in zip(leaves, avals, strict=True)]
    results = _emit(ops.while_loop, [*start, *outer.values()], graphs, (test, body))
    return spec.unflatten([_reweaken(r, a.weak) for r, a in zip(results, avals, strict=False)])


def _truth(value: Any) -> bool:
    if shape_of(value, "while_loop") != ():
        raise TracingError.make(
            "the condition must return one boolean scalar", op="while_loop", got={"result": value}
        )
    return bool(value)


# -- scan ------------------------------------------------------------------------------------------


def scan(
    f: Callable[[Any, Any], tuple[Any, Any]],
    init: Any,
    xs: Any = None,
    length: int | None = None,
    reverse: bool = False,
) -> tuple[Any, Any]:
    """A loop of fixed length over the leading axis: ``carry, y = f(carry, x)``; returns ``(carry, stacked
    ys)``.

    ``init`` is a tree whose structure, shapes and dtypes ``f`` keeps; ``xs`` a tree of arrays with equal
    leading axis (or None, then ``length`` says how often, and ``x`` is None). With ``reverse`` the loop runs
    from the last slice to the first, and ``ys[i]`` still belongs to ``xs[i]``. Differentiable: the gradient
    is a scan over the saved carries. As ``jax.lax.scan``.

    Errors: ShapeError for unequal leading axes or a carry of another shape, DTypeError, TracingError.
    """
    init_leaves, init_spec = _flatten(init)
    x_leaves, x_spec = _flatten(xs)
    carry = [_aval(leaf, "scan", "init") for leaf in init_leaves]
    sizes = [_aval(leaf, "scan", "xs") for leaf in x_leaves]
    count = _scan_length(x_leaves, sizes, length)
    if current_context() is None and count:
        return _scan_python(f, init, x_leaves, x_spec, count, reverse)
    if current_context() is None:  # nothing to run, but the shapes of the ys must be found
        with recording(TraceContext("scan")):
            body = _record(_pair(f), "scan", [*carry, *(_Aval(a.shape[1:], a.dtype, False) for a in sizes)],
                           _structure((init, xs)), [""] * (len(carry) +
                           len(sizes)))  # fmt: skip
        _, y_spec = body.tree.children()
        return init, y_spec.unflatten([np.empty((0, *n.shape), n.dtype) for n in body.outputs[len(carry) :]])
    slices = [_Aval(a.shape[1:], a.dtype, False) for a in sizes]
    spec = _structure((init, xs))
    names = [f"carry{p}" for p in _paths(init_spec)] + [f"x{p}" for p in _paths(x_spec)]
    body, carry = _stable_body("scan", f, carry, init_spec, slices, spec, names, _split_pair)
    n = len(carry)
    outer = body.outer
    graph = body.close(outer, head=n, pass_through=True)
    start = [_as_carry(leaf, a) for leaf, a in zip(init_leaves, carry, strict=True)]
    attrs = {"body_graph": graph, "n_carry": n + len(outer), "length": count, "reverse": bool(reverse)}
    _, y_spec = body.tree.children()
    if not graph.outputs:
        return init, y_spec.unflatten([])
    results = _emit(ops.scan, [*start, *outer.values(), *x_leaves], attrs, (body,))
    last = [_reweaken(r, a.weak) for r, a in zip(results, carry, strict=False)]
    return init_spec.unflatten(last), y_spec.unflatten(list(results[n + len(outer) :]))


def _split_pair(result: Any) -> tuple[Any, Any]:
    if not isinstance(result, tuple) or len(result) != 2:
        raise TracingError.make(
            f"the function must return a pair (carry, y), got {type(result).__name__}",
            op="scan",
            hint="return (carry, None) if there is nothing to stack",
        )
    return result


def _pair(f: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    return lambda carry, x: _split_pair(f(carry, x))


def _scan_length(leaves: Sequence[Any], avals: Sequence[_Aval], length: int | None) -> int:
    for leaf, a in zip(leaves, avals, strict=True):
        if not a.shape:
            raise ShapeError.make("xs must have a leading axis to loop over", op="scan", got={"xs": leaf})
    found = {a.shape[0] for a in avals}
    if len(found) > 1:
        got = {f"xs[{i}]": leaf for i, leaf in enumerate(leaves[:6])}
        raise ShapeError.make("the leading axes of xs have different sizes", op="scan", got=got)
    if length is None:
        if not found:
            raise ShapeError.make("either xs or length must be given", op="scan")
        return found.pop()
    count = length.__index__()
    if count < 0 or (found and found != {count}):
        raise ShapeError.make(f"length {count} does not fit the leading axis of xs {found or ''}", op="scan")
    return count


def _scan_python(
    f: Callable[[Any, Any], Any], init: Any, x_leaves: Sequence[Any], x_spec: Any, count: int, reverse: bool
) -> tuple[Any, Any]:
    carry, ys = init, []
    arrays = [np.asarray(x) for x in x_leaves]
    for i in reversed(range(count)) if reverse else range(count):
        new, y = _split_pair(f(carry, x_spec.unflatten([x[i] for x in arrays])))
        _check_same("scan", carry, new)
        carry = new
        ys.append(y)
    if reverse:
        ys.reverse()
    columns = [_flatten(y) for y in ys]
    spec = columns[0][1]
    if builtins.any(s != spec for _, s in columns):
        raise TracingError.make("the function returns ys of different structure from step to step", op="scan")
    return carry, spec.unflatten(
        [np.stack(column) for column in zip(*(leaves for leaves, _ in columns), strict=True)]
    )


# -- print -----------------------------------------------------------------------------------------


def print(fmt: str, *values: Any) -> None:
    """Print ``fmt.format(*values)`` each time the program runs (a plain ``print`` runs once, while tracing).

    Fields are ``{}`` or ``{0}``, with a format specification that applies to each element; values of a format without
    fields follow it, as in ``tj.print("loss", x)``. Outside a trace it prints at once. Errors: TracingError if the format
    does not fit the number of values.
    """
    if not isinstance(fmt, str):
        raise TracingError.make(
            f"the format must be a string, got {describe(fmt)}", op="print", hint='tj.print("{}", x)'
        )
    if "{" not in fmt:
        fmt += " {}" * len(values)
    try:
        ops.format_message(
            fmt, [np.zeros(a.shape, a.dtype) for a in (_aval(v, "print", "values") for v in values)]
        )
    except (IndexError, ValueError, TypeError) as error:
        raise TracingError.make(
            f"the format {fmt!r} does not fit {len(values)} values: {error}", op="print"
        ) from None
    context = current_context()
    if context is None:
        ops.print_.reference(*(np.asarray(v) for v in values), fmt=fmt) if values else builtins.print(fmt)
        return
    operands = [Tensor(to_node(v, context, op="print"), context) for v in (values or (0,))]
    bind(ops.print_, operands, {"fmt": fmt})


__all__ = ["cond", "print", "scan", "while_loop"]
