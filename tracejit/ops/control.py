"""Control flow over sub-graphs (cond, while_loop, scan) and print. Recorded by ``tracejit/control.py``.

The sub-graphs are :class:`~tracejit.graph.Graph` values in the attributes; :func:`interpret` runs one with
NumPy. All outer values that a sub-graph reads are operands: for loops they are carried unchanged
("pass-through" carries, whose body output is the body input itself), which backends may recognise and never
copy.
"""

from __future__ import annotations

import string
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tracejit.dtypes import BOOL, DType
from tracejit.errors import DTypeError, GradientError, GraphError, ShapeError
from tracejit.ops.registry import HasAval, Op, define
from tracejit.ops.shape import concatenate, reshape, slice_

if TYPE_CHECKING:
    from tracejit.graph import Graph, GraphBuilder, Node

Aval = tuple[tuple[int, ...], DType]


# -- running a sub-graph ---------------------------------------------------------------------------


class Interpreter:
    """Runs a graph with the NumPy references of its ops; prepared once, called many times (a loop body)."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        position = {node: i for i, node in enumerate(graph.nodes)}
        self._outputs = [position[n] for n in graph.outputs]
        last_use = {position[i]: k for k, node in enumerate(graph.nodes) for i in node.inputs}
        kept = set(self._outputs)
        self._inputs = [position[n] for n in graph.inputs]
        self._steps = [
            (
                k,
                node.op.reference,
                tuple(position[i] for i in node.inputs),
                node.attrs,
                [i for i in {position[i] for i in node.inputs} if last_use[i] == k and i not in kept],
            )
            for k, node in enumerate(graph.nodes)
            if node.op.name != "input"
        ]

    def __call__(self, values: Sequence[Any]) -> list[Any]:
        """The outputs for ``values``, one per graph input."""
        slots: list[Any] = [None] * len(self._graph.nodes)
        for slot, value in zip(self._inputs, values, strict=True):
            slots[slot] = value
        for k, reference, operands, attrs, dead in self._steps:
            slots[k] = reference(*(slots[i] for i in operands), **attrs)
            for i in dead:
                slots[i] = None
        return [slots[i] for i in self._outputs]


def interpret(graph: Graph, values: Sequence[Any]) -> list[Any]:
    """The outputs of ``graph`` for arrays ``values``, computed node by node with NumPy."""
    return Interpreter(graph)(values)


def input_node(builder: GraphBuilder, index: int, like: Aval, name: str, kind: str = "argument") -> Node:
    """A new input number ``index`` of a graph under construction; it belongs to no line of the user's code."""
    from tracejit.graph import Provenance

    shape, dtype = like
    attrs = {"index": index, "kind": kind, "shape": tuple(shape), "dtype": dtype}
    return builder.add("input", (), attrs, like=Provenance("", "", None, name))


def _avals(nodes: Sequence[HasAval]) -> list[Aval]:
    return [(tuple(n.shape), n.dtype) for n in nodes]


def _check_inputs(op: str, which: str, graph: Graph, operands: Sequence[HasAval]) -> None:
    if _avals(graph.inputs) != _avals(operands):
        got = {f"operand{i}": o for i, o in enumerate(operands[:6])}
        raise GraphError.make(f"the operands do not fit the inputs of the {which}", op=op, got=got)


def _float_indices(nodes: Sequence[HasAval]) -> list[int]:
    return [i for i, n in enumerate(nodes) if n.dtype.kind == "f"]


def _restricted(graph: Graph, outputs: Sequence[int]) -> Graph:
    """``graph`` with only the given outputs, so that its gradient takes only their cotangents."""
    from tracejit.graph import Graph as GraphType

    return GraphType.build(graph.name, graph.inputs, [graph.outputs[i] for i in outputs])


# -- cond ------------------------------------------------------------------------------------------


def _cond_infer(pred: HasAval, *operands: HasAval, true_graph: Graph, false_graph: Graph) -> list[Aval]:
    if pred.shape != () or pred.dtype != BOOL:
        raise DTypeError.make("the condition must be a boolean scalar", op="cond", got={"pred": pred})
    _check_inputs("cond", "true branch", true_graph, operands)
    _check_inputs("cond", "false branch", false_graph, operands)
    results = _avals(true_graph.outputs)
    if results != _avals(false_graph.outputs):
        raise GraphError.make("the branches have different results", op="cond")
    return results


def _cond_reference(pred: Any, *operands: Any, true_graph: Graph, false_graph: Graph) -> tuple[Any, ...]:
    return tuple(interpret(true_graph if pred else false_graph, operands))


def _cond_vjp(
    g: Sequence[Any], y: Any, pred: Any, *operands: Any, true_graph: Graph, false_graph: Graph
) -> list[Any]:
    from tracejit.autograd import vjp_graph

    wrt, results = _float_indices(operands), _float_indices(true_graph.outputs)
    cotangents: list[Any] = [None] * (1 + len(operands))
    if wrt and results:
        branches = [vjp_graph(_restricted(b, results), wrt) for b in (true_graph, false_graph)]
        found = cond(
            pred, *operands, *(g[i] for i in results), true_graph=branches[0], false_graph=branches[1]
        )
        for i, value in zip(wrt, found, strict=True):
            cotangents[1 + i] = value
    return cotangents


def _sample_graph(name: str, avals: Sequence[Aval], body: Any) -> Graph:
    """A small sub-graph for the samples below: ``body(builder, *input nodes)`` returns the output nodes."""
    from tracejit.graph import Graph as GraphType
    from tracejit.graph import GraphBuilder as Builder

    builder = Builder()
    inputs = [input_node(builder, i, a, f"x{i}") for i, a in enumerate(avals)]
    return GraphType.build(name, inputs, body(builder, *inputs))


_VECTOR: Aval = ((3,), np.dtype("float64"))
_COUNT: Aval = ((), np.dtype("int64"))


def _cond_samples() -> list[tuple[tuple[np.ndarray, ...], dict[str, Any]]]:
    x = np.array([0.5, -1.0, 2.0])
    attrs = {
        "true_graph": _sample_graph("double", [_VECTOR], lambda b, a: [b.add("add", (a, a))]),
        "false_graph": _sample_graph("sine", [_VECTOR], lambda b, a: [b.add("sin", (a,))]),
    }
    return [((np.asarray(p), x), attrs) for p in (True, False)]


cond: Op = define(
    "cond",
    arity=None,
    infer=_cond_infer,  # type: ignore[arg-type]  # multi-output ops return a list
    reference=_cond_reference,
    vjp=_cond_vjp,
    category="control",
    meaning="Runs one of two sub-graphs, chosen by a boolean scalar.",
    formula="y = true_graph(x) if pred else false_graph(x)",
    shape_rule="the results of the branches, which agree",
    grad_rule="dx = cond(pred, gradient of true_graph, gradient of false_graph)",
    samples=_cond_samples,
    attrs={"true_graph": "Graph", "false_graph": "Graph"},
    traits=("multi",),
)

# -- while_loop ------------------------------------------------------------------------------------


def _while_infer(*init: HasAval, cond_graph: Graph, body_graph: Graph) -> list[Aval]:
    _check_inputs("while_loop", "condition", cond_graph, init)
    _check_inputs("while_loop", "body", body_graph, init)
    if _avals(cond_graph.outputs) != [((), BOOL)]:
        raise GraphError.make("the condition must give one boolean scalar", op="while_loop")
    if _avals(body_graph.outputs) != _avals(init):
        raise GraphError.make("the body must return values like the ones it takes", op="while_loop")
    return _avals(init)


def _while_reference(*init: Any, cond_graph: Graph, body_graph: Graph) -> tuple[Any, ...]:
    condition, body = Interpreter(cond_graph), Interpreter(body_graph)
    values: Sequence[Any] = init
    while condition(values)[0]:
        values = body(values)
    return tuple(values)


def _while_vjp(g: Any, y: Any, *init: Any, cond_graph: Graph, body_graph: Graph) -> list[Any]:
    raise GradientError.make(
        "while_loop has no reverse-mode gradient: the number of its iterations, and so the memory for "
        "intermediate values, is unknown",
        op="while_loop",
        hint="use tj.scan with a fixed length (and tj.where to freeze the result), or tj.stop_gradient",
    )


def _while_samples() -> list[tuple[tuple[np.ndarray, ...], dict[str, Any]]]:
    avals = [_COUNT, _VECTOR]

    def condition(b: GraphBuilder, i: Node, x: Node) -> list[Node]:
        return [b.add("less", (i, b.const(3, np.dtype("int64"))))]

    def body(b: GraphBuilder, i: Node, x: Node) -> list[Node]:
        return [b.add("add", (i, b.const(1, np.dtype("int64")))), b.add("sin", (x,))]

    attrs = {
        "cond_graph": _sample_graph("below_three", avals, condition),
        "body_graph": _sample_graph("step", avals, body),
    }
    return [((np.asarray(0), np.array([0.5, -1.0, 2.0])), attrs)]


while_loop = define(
    "while_loop",
    arity=None,
    infer=_while_infer,  # type: ignore[arg-type]  # multi-output ops return a list
    reference=_while_reference,
    vjp=_while_vjp,
    category="control",
    meaning="Repeats the body as long as the condition holds.",
    formula="while cond_graph(x): x = body_graph(x)",
    shape_rule="the same as the operands",
    grad_rule="none: the number of iterations is unknown (raises GradientError)",
    samples=_while_samples,
    attrs={"cond_graph": "Graph", "body_graph": "Graph"},
    traits=("multi",),
)

# -- scan ------------------------------------------------------------------------------------------


def _scan_infer(
    *operands: HasAval, body_graph: Graph, n_carry: int, length: int, reverse: bool
) -> list[Aval]:
    init, xs = operands[:n_carry], operands[n_carry:]
    if length < 0 or n_carry > len(operands):
        raise GraphError.make(f"length {length} or n_carry {n_carry} is out of range", op="scan")
    for i, x in enumerate(xs):
        if len(x.shape) == 0 or x.shape[0] != length:
            raise ShapeError.make(f"xs need a leading axis of size {length}", op="scan", got={f"xs[{i}]": x})
    expected = [*_avals(init), *((tuple(x.shape[1:]), x.dtype) for x in xs)]
    if _avals(body_graph.inputs) != expected:
        raise GraphError.make("the operands do not fit the inputs of the body", op="scan")
    results = _avals(body_graph.outputs)
    if results[:n_carry] != _avals(init):
        raise GraphError.make("the body must return carries like the ones it takes", op="scan")
    return [*results[:n_carry], *(((length, *s), d) for s, d in results[n_carry:])]


def _scan_reference(
    *operands: Any, body_graph: Graph, n_carry: int, length: int, reverse: bool
) -> tuple[Any, ...]:
    body = Interpreter(body_graph)
    carry, xs = list(operands[:n_carry]), operands[n_carry:]
    stacked = [np.empty((length, *n.shape), n.dtype) for n in body_graph.outputs[n_carry:]]
    for i in reversed(range(length)) if reverse else range(length):
        results = body([*carry, *(x[i] for x in xs)])
        carry = results[:n_carry]
        for out, value in zip(stacked, results[n_carry:], strict=True):
            out[i] = value
    return (*carry, *stacked)


def _saved_carries(
    moving: Sequence[int],
    y: Sequence[Any],
    operands: Sequence[Any],
    body: Graph,
    n_carry: int,
    length: int,
    reverse: bool,
) -> list[Any]:
    """For each carry in ``moving``, its value at the start of every step, stacked.

    Often the forward scan returns it already: as a y (the carry it got), or shifted by one step (the carry it hands
    on, as in ``return h, h``). For the rest the scan is run once more with the carries as its ys.
    """
    from tracejit.graph import Graph as GraphType

    found: dict[int, Any] = {}
    for i in moving:
        for k in range(n_carry, len(body.outputs)):
            if body.outputs[k] is body.inputs[i]:
                found[i] = y[k]
            elif body.outputs[k] is body.outputs[i] and i not in found and length:
                start, rest = (
                    reshape(operands[i], shape=(1, *operands[i].shape)),
                    (0,) * len(operands[i].shape),
                )
                first, last = (1, length) if reverse else (0, length - 1)
                stop = (last, *operands[i].shape)
                kept = slice_(y[k], start=(first, *rest), stop=stop, step=(1,) * len(stop))
                found[i] = concatenate(*((kept, start) if reverse else (start, kept)), axis=0)
    missing = [i for i in moving if i not in found]
    if missing:
        outs = [*body.outputs[:n_carry], *(body.inputs[i] for i in missing)]
        keeping = GraphType.build(f"{body.name}_saving", body.inputs, outs)
        results = scan(*operands, body_graph=keeping, n_carry=n_carry, length=length, reverse=reverse)
        found.update(zip(missing, results[n_carry:], strict=True))
    return [found[i] for i in moving]


def _scan_vjp(
    g: Sequence[Any],
    y: Any,
    *operands: Any,
    body_graph: Graph,
    n_carry: int,
    length: int,
    reverse: bool,
) -> list[Any]:
    """A scan in the other direction over the saved carries, with the cotangents of the carries as its carry.

    Saved are only the carries that the gradient of the body reads and that change; pass-through carries are passed
    through again.
    """
    from tracejit.autograd import vjp_graph
    from tracejit.graph import Graph as GraphType
    from tracejit.graph import GraphBuilder as Builder
    from tracejit.graph import inline

    body, n_in = body_graph, len(body_graph.inputs)
    wrt = _float_indices(body.inputs)
    results = _float_indices(body.outputs)
    cotangents: list[Any] = [None] * len(operands)
    if not wrt or not results:
        return cotangents
    step = vjp_graph(_restricted(body, results), wrt)
    users, outputs = step.users(), set(step.outputs)
    read = [bool(users[n]) or n in outputs for n in step.inputs]
    fixed = [i for i in range(n_carry) if read[i] and body.outputs[i] is body.inputs[i]]
    moving = [i for i in range(n_carry) if read[i] and body.outputs[i] is not body.inputs[i]]
    xs = [i for i in range(n_carry, n_in) if read[i]]
    saved = _saved_carries(moving, y, operands, body, n_carry, length, reverse)

    # The body of the backward scan: carries (fixed values, cotangents of carries), then slices (saved
    # carries, xs, cotangents of ys).
    carried = [i for i in results if i < n_carry]
    stacked = [i for i in results if i >= n_carry]
    builder = Builder()
    inputs: list[Any] = []
    place: dict[int, Any] = {}

    def take(position: int, like: Node, name: str) -> None:
        node = input_node(builder, len(inputs), (like.shape, like.dtype), name)
        inputs.append(node)
        place[position] = node

    at_cotangent = {i: n_in + k for k, i in enumerate(results)}
    for i in fixed:
        take(i, body.inputs[i], body.inputs[i].name)
    for i in carried:
        take(at_cotangent[i], body.outputs[i], f"d_carry{i}")
    for i in (*moving, *xs):
        take(i, body.inputs[i], body.inputs[i].name)
    for i in stacked:
        take(at_cotangent[i], body.outputs[i], f"d_y{i - n_carry}")
    unread = builder.const(
        0, np.dtype("float32")
    )  # stands in for inputs that nothing reads; dropped by build
    found = inline(builder, step, [place.get(i, unread) for i in range(len(step.inputs))])
    backward = GraphType.build(step.name, inputs, [*(place[i] for i in fixed), *found])
    pulled = scan(
        *(operands[i] for i in fixed),
        *(g[i] for i in carried),
        *saved,
        *(operands[i] for i in xs),
        *(g[i] for i in stacked),
        body_graph=backward,
        n_carry=len(fixed) + len(carried),
        length=length,
        reverse=not reverse,
    )
    for i, value in zip(wrt, pulled[len(fixed) :], strict=True):
        cotangents[i] = value
    return cotangents


def _scan_samples() -> list[tuple[tuple[np.ndarray, ...], dict[str, Any]]]:
    def body(b: GraphBuilder, carry: Node, x: Node) -> list[Node]:
        new = b.add("sin", (b.add("mul", (carry, x)),))
        return [new, b.add("add", (new, x))]

    graph = _sample_graph("step", [_VECTOR, _VECTOR], body)
    arrays = (np.array([0.5, -1.0, 2.0]), np.linspace(-1.0, 1.0, 12).reshape(4, 3))
    return [
        (arrays, {"body_graph": graph, "n_carry": 1, "length": 4, "reverse": reverse})
        for reverse in (False, True)
    ]


scan: Op = define(
    "scan",
    arity=None,
    infer=_scan_infer,  # type: ignore[arg-type]  # multi-output ops return a list
    reference=_scan_reference,
    vjp=_scan_vjp,
    category="control",
    meaning="A loop of fixed length: carries values along, reads a slice of each xs, stacks a y per step.",
    formula="for i in 0 … length−1 (reverse: backwards): carry, yᵢ = body_graph(carry, xsᵢ)",
    shape_rule="the carries, then each y with a leading axis of size length",
    grad_rule="a scan in the other direction over the saved carries",
    samples=_scan_samples,
    attrs={"body_graph": "Graph", "n_carry": "int", "length": "int", "reverse": "bool"},
    traits=("multi",),
)

# -- print -----------------------------------------------------------------------------------------


class _ArrayFormatter(string.Formatter):
    """``str.format`` for arrays, restricted to ``{}`` and ``{0}``: a loaded graph cannot reach attributes."""

    def get_field(self, field_name: str, args: Sequence[Any], kwargs: Any) -> tuple[Any, Any]:
        if not str(field_name).isdigit():
            raise ValueError(f"only {{}} and {{0}} are allowed in a format, not {{{field_name}}}")
        return args[int(field_name)], field_name

    def format_field(self, value: Any, format_spec: str) -> str:
        array = np.asarray(value)
        if array.ndim == 0:
            return format(array.item(), format_spec)
        if not format_spec:
            return str(array)
        return np.array2string(array, formatter={"all": lambda v: format(v, format_spec)})


def format_message(fmt: str, values: Sequence[Any]) -> str:
    """``fmt.format(*values)``; a format specification applies to each element of an array."""
    return _ArrayFormatter().format(fmt, *values)


def _print_infer(*values: HasAval, fmt: str) -> Aval:
    if not values:
        raise GraphError.make("print needs at least one operand", op="print")
    return tuple(values[0].shape), values[0].dtype


def _print_reference(*values: Any, fmt: str) -> Any:
    sys.stdout.write(format_message(fmt, values) + "\n")
    sys.stdout.flush()
    return values[0]


print_ = define(
    "print",
    arity=None,
    infer=_print_infer,
    reference=_print_reference,
    vjp=lambda g, y, *values, fmt: [g, *(None for _ in values[1:])],
    category="control",
    meaning="Prints values while the program runs; the result is the first value.",
    formula="y = x₀, and print(fmt.format(x₀, x₁, …))",
    shape_rule="same as the first operand",
    grad_rule="dx₀ = g",
    samples=lambda: [((np.arange(3.0),), {"fmt": "sample {}"})],
    attrs={"fmt": "str with {} or {0} fields"},
    traits=("effect",),
)
