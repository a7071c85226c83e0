"""The Abstract Semantic Graph: immutable nodes, the builder that makes them unique, and the graph of a whole function.

Made by tracing, autograd and the passes; read by backends, the lowering, the viewer. Text and JSON forms are in
``graph_text.py``. Nothing in here knows Python tensors or devices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tracejit import source as _source
from tracejit.dtypes import DType
from tracejit.errors import GraphError, ShapeError
from tracejit.ops import registry
from tracejit.ops.registry import Op

Shape = tuple[int, ...]

#: NumPy refuses arrays beyond this many bytes as well; caught early so that the message is ours.
MAX_BYTES = 1 << 62

#: The dtype of nodes with several results (``scan``, ``cond``, ...), which ``proj`` nodes read one by one.
TUPLE: DType = np.dtype("V")


class ArrayLiteral:
    """A constant array inside attrs: compared and hashed by content, read-only."""

    __slots__ = ("_hash", "array")

    def __init__(self, array: Any) -> None:
        copy = np.array(array, order="C", copy=True)
        copy.flags.writeable = False
        self.array = copy
        self._hash = hash((copy.shape, copy.dtype.str, copy.tobytes()))

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, ArrayLiteral)
            and self.array.dtype == other.array.dtype
            and self.array.shape == other.array.shape
            and self.array.tobytes() == other.array.tobytes()
        )

    def __hash__(self) -> int:
        return self._hash

    def __repr__(self) -> str:
        return f"ArrayLiteral({self.array.dtype}[{','.join(map(str, self.array.shape))}])"


class Node:
    """One value of the graph. Immutable; identity is equality (the builder hash-conses).

    ``source`` is the user's ``file:line``, ``scope`` the path of named scopes, ``grad_of`` the forward node whose
    gradient rule made this one, ``name`` the argument path of inputs. ``avals`` lists the results of a multi-output op.
    """

    __slots__ = (
        "attrs",
        "avals",
        "dtype",
        "grad_of",
        "inputs",
        "key",
        "name",
        "op",
        "scope",
        "shape",
        "source",
    )

    op: Op
    inputs: tuple[Node, ...]
    attrs: Mapping[str, Any]
    shape: Shape
    dtype: DType
    source: str
    scope: str
    grad_of: Node | None
    name: str
    avals: tuple[tuple[Shape, DType], ...]
    #: What makes two requests equal for the builder: op, identities of operands, attributes; None = never merged.
    key: tuple[str, tuple[int, ...], Any] | None

    def __init__(
        self,
        op: Op,
        inputs: tuple[Node, ...],
        attrs: Mapping[str, Any],
        shape: Shape,
        dtype: DType,
        *,
        source: str = "",
        scope: str = "",
        grad_of: Node | None = None,
        name: str = "",
        avals: tuple[tuple[Shape, DType], ...] = (),
        key: tuple[str, tuple[int, ...], Any] | None = None,
    ) -> None:
        put = object.__setattr__
        put(self, "op", op)
        put(self, "inputs", inputs)
        put(self, "attrs", attrs)
        put(self, "shape", shape)
        put(self, "dtype", dtype)
        put(self, "source", source)
        put(self, "scope", scope)
        put(self, "grad_of", grad_of)
        put(self, "name", name)
        put(self, "avals", avals)
        put(self, "key", key)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"graph nodes are immutable; cannot set {name!r}")

    @property
    def size(self) -> int:
        """Number of elements."""
        n = 1
        for s in self.shape:
            n *= s
        return n

    @property
    def nbytes(self) -> int:
        """Bytes of the value; the sum over results for a multi-output node."""
        if self.avals:
            return sum(int(np.prod(s, dtype=np.int64)) * d.itemsize for s, d in self.avals)
        return self.size * self.dtype.itemsize

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    def __repr__(self) -> str:
        shape = ",".join(map(str, self.shape))
        where = f" at {self.source}" if self.source else ""
        return f"<{self.op.name} {self.dtype}[{shape}]{where}>"


def attr_key(value: Any) -> Any:
    """A hashable key that tells 1, 1.0, True, -0.0 and nan apart, as attribute equality must."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return ("f", value.hex())
    if isinstance(value, bool):
        return ("b", value)
    if isinstance(value, int):
        return ("i", value)
    if isinstance(value, tuple):
        return tuple(map(attr_key, value))
    return value


class GraphBuilder:
    """Makes nodes, checks them by the op's shape rule, and returns an existing node for an equal request (CSE for free).

    One builder serves one trace or one pass; it is not shared between threads.
    """

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self._unique: dict[Any, Node] = {}
        #: Forward node that gradient rules are being applied to; stamped on new nodes as ``grad_of``.
        self.grad_of: Node | None = None

    def add(
        self,
        op: Op | str,
        inputs: Sequence[Node] = (),
        attrs: Mapping[str, Any] | None = None,
        *,
        like: Node | Provenance | None = None,
        name: str = "",
    ) -> Node:
        """The node ``op(*inputs, **attrs)``. Source and scope come from ``like`` if given, else from the user's stack."""
        if isinstance(op, str):
            op = registry.get(op)
        attrs = attrs or {}
        inputs = tuple(inputs)
        if op.arity is not None and len(inputs) != op.arity:
            raise GraphError(f"[{op.name}] takes {op.arity} operands, got {len(inputs)}")
        key = None
        if "effect" not in op.traits:
            parts = tuple(sorted((k, attr_key(v)) for k, v in attrs.items())) if attrs else ()
            key = _node_key(op, inputs, parts)
            found = self._unique.get(key)
            if found is not None:
                if found.grad_of is not None and self.grad_of is None and like is None:
                    # The forward program uses it too (a shared constant): it is not a gradient node.
                    object.__setattr__(found, "grad_of", None)
                return found
        inferred: Any = op.infer(*inputs, **attrs)
        avals: tuple[tuple[Shape, DType], ...] = ()
        if "multi" in op.traits:
            avals = tuple((tuple(s), d) for s, d in inferred)
            shape, dtype = (), TUPLE
        else:
            shape, dtype = inferred
            if math.prod(shape) * dtype.itemsize > MAX_BYTES:
                raise ShapeError.make(
                    f"the result {dtype}[{','.join(map(str, shape))}] is too large for any memory", op=op.name
                )
        # A node made by a gradient rule belongs to the line and scope of the forward node.
        origin = like if like is not None else self.grad_of
        node = Node(
            op,
            inputs,
            attrs,
            tuple(shape),
            dtype,
            source=origin.source if origin is not None else _source.location(),
            scope=origin.scope if origin is not None else _source.current_scope(),
            grad_of=self.grad_of if like is None else like.grad_of,
            name=name or (like.name if like is not None else ""),
            avals=avals,
            key=key,
        )
        if key is not None:
            self._unique[key] = node
        self.nodes.append(node)
        return node

    def keep(self, node: Node, inputs: tuple[Node, ...], grad_of: Node | None) -> Node:
        """``node`` of another builder with new operands of equal types; itself if nothing changes, so passes are cheap."""
        if node.key is None:
            key = None
        else:
            key = node.key if inputs == node.inputs else _node_key(node.op, inputs, node.key[2])
            found = self._unique.get(key)
            if found is not None:
                return found
        if node.grad_of is not grad_of or inputs != node.inputs:
            node = Node(
                node.op,
                inputs,
                node.attrs,
                node.shape,
                node.dtype,
                source=node.source,
                scope=node.scope,
                grad_of=grad_of,
                name=node.name,
                avals=node.avals,
                key=key,
            )
        if key is not None:
            self._unique[key] = node
        self.nodes.append(node)
        return node

    def const(self, value: Any, dtype: DType, *, like: Node | Provenance | None = None) -> Node:
        """The scalar constant ``value`` of ``dtype``; the value is rounded to the dtype, exactly as NumPy does."""
        scalar = np.asarray(value).astype(dtype).item()
        return self.add("const", (), {"value": scalar, "dtype": dtype}, like=like)


def _node_key(op: Op, inputs: tuple[Node, ...], attrs: Any) -> tuple[str, tuple[int, ...], Any]:
    ids = tuple(map(id, inputs))
    if "commutative" in op.traits:
        ids = tuple(sorted(ids))
    return op.name, ids, attrs


@dataclass(frozen=True)
class GuardInfo:
    """A trace-time scalar value that the graph depends on: input position, value, and the line that used it."""

    index: int
    value: Any
    source: str


@dataclass(frozen=True, eq=False)
class Graph:
    """Nodes in topological order (inputs first) with named inputs and outputs. Immutable.

    Two graphs are equal when their structure, attributes, names, sources and scopes are (``==`` compares that).
    """

    name: str
    nodes: tuple[Node, ...]
    inputs: tuple[Node, ...]
    outputs: tuple[Node, ...]
    output_names: tuple[str, ...] = ()
    _index: dict[Node, int] = field(default_factory=dict, repr=False)

    @staticmethod
    def build(
        name: str,
        inputs: Sequence[Node],
        outputs: Sequence[Node],
        output_names: Sequence[str] = (),
        effects: Sequence[Node] = (),
    ) -> Graph:
        """Collect the nodes that ``outputs`` and ``effects`` need, in a stable topological order, plus all ``inputs``."""
        order: dict[Node, None] = dict.fromkeys(inputs)
        for root in (*effects, *outputs):
            stack = [root]
            while stack:
                node = stack[-1]
                waiting = [i for i in node.inputs if i not in order]
                if waiting:
                    stack.extend(reversed(waiting))
                else:
                    order[node] = None
                    stack.pop()
        names = tuple(output_names) or tuple(
            f"out{i}" if len(outputs) > 1 else "out" for i in range(len(outputs))
        )
        return Graph(name, tuple(order), tuple(inputs), tuple(outputs), names)

    def __post_init__(self) -> None:
        self._index.update({n: i for i, n in enumerate(self.nodes)})

    def id(self, node: Node) -> int:
        """Position of ``node`` in :attr:`nodes`; the ``%7`` of the text form."""
        try:
            return self._index[node]
        except KeyError:
            raise GraphError(f"{node!r} is not a node of graph {self.name!r}") from None

    def __contains__(self, node: Node) -> bool:
        return node in self._index

    def __len__(self) -> int:
        return len(self.nodes)

    def __iter__(self) -> Iterator[Node]:
        return iter(self.nodes)

    def users(self) -> dict[Node, list[Node]]:
        """For each node, the nodes that read it (one entry per reading operand)."""
        out: dict[Node, list[Node]] = {n: [] for n in self.nodes}
        for n in self.nodes:
            for i in n.inputs:
                out[i].append(n)
        return out

    @property
    def effects(self) -> tuple[Node, ...]:
        """Nodes kept for what they do rather than for their value: ``print``, and control flow that prints."""
        return tuple(n for n in self.nodes if n.op.name != "input" and has_effect(n))

    def rewrite(self, rule: Callable[[GraphBuilder, Node, tuple[Node, ...]], Node | None]) -> Graph:
        """A new graph with each node replaced by ``rule(builder, node, new_inputs)``; None keeps the node.

        The rule sees nodes in topological order with their operands already rewritten. Dead nodes disappear, equal
        nodes merge, names of inputs and outputs stay. Every pass is one such call.
        """
        builder = GraphBuilder()
        new: dict[Node, Node] = {}
        for node in self.nodes:
            inputs = tuple(new[i] for i in node.inputs)
            replacement = rule(builder, node, inputs) if node.op.name != "input" else None
            if replacement is None:
                # Almost always the forward node comes first; _relink mends the rest.
                forward = new.get(node.grad_of) if node.grad_of is not None else None
                replacement = builder.keep(node, inputs, forward)
            new[node] = replacement
        _relink(self.nodes, new)
        return Graph.build(
            self.name,
            [new[n] for n in self.inputs],
            [new[n] for n in self.outputs],
            self.output_names,
            [new[n] for n in self.effects],
        )

    def __str__(self) -> str:
        from tracejit.graph_text import to_text

        return to_text(self)

    @staticmethod
    def parse(text: str) -> Graph:
        """The graph whose text form is ``text``; GraphError names the line that is wrong."""
        from tracejit.graph_text import parse

        return parse(text)

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dict (format ``tracejit-graph``, version 1)."""
        from tracejit.graph_json import to_json

        return to_json(self)

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Graph:
        """The graph of :meth:`to_json`; GraphError on anything malformed."""
        from tracejit.graph_json import from_json

        return from_json(data)

    def view(self) -> None:
        """Open a window on the graph (nothing runs)."""
        from tracejit.watching import view

        view(self)

    def _repr_png_(self) -> bytes | None:
        """The picture that notebooks show; None (they show the text) without a viewer."""
        from tracejit.watching import notebook_png

        return notebook_png(self)

    def _repr_html_(self) -> str | None:
        """The picture with a line of text, for notebooks and exported pages."""
        from tracejit.watching import notebook_html

        return notebook_html(self)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Graph):
            return NotImplemented
        return self is other or self._signature() == other._signature()

    def __hash__(self) -> int:
        return hash((self.name, len(self.nodes), self.output_names))

    def _signature(self) -> Any:
        at = self._index

        def node_signature(n: Node) -> Any:
            attrs = tuple(
                sorted(
                    (k, v._signature() if isinstance(v, Graph) else attr_key(v)) for k, v in n.attrs.items()
                )
            )
            forward = at.get(n.grad_of) if n.grad_of is not None else None
            return (
                n.op.name,
                tuple(at[i] for i in n.inputs),
                attrs,
                n.shape,
                n.dtype,
                n.source,
                n.scope,
                forward,
                n.name,
            )

        return (
            self.name,
            tuple(map(node_signature, self.nodes)),
            tuple(at[n] for n in self.inputs),
            tuple(at[n] for n in self.outputs),
            self.output_names,
        )

    def verify(self) -> Graph:
        """Check every invariant and return self: order, arity, inferred shapes, inputs, provenance."""
        seen: set[Node] = set()
        for node in self.nodes:
            for i in node.inputs:
                if i not in seen:
                    raise GraphError(
                        f"graph {self.name!r}: %{self.id(node)} {node!r} reads a node that comes later or is missing"
                    )
            if node in seen:
                raise GraphError(f"graph {self.name!r}: {node!r} is listed twice")
            if node.op.arity is not None and len(node.inputs) != node.op.arity:
                raise GraphError(
                    f"graph {self.name!r}: {node!r} has {len(node.inputs)} operands instead of {node.op.arity}"
                )
            if node.grad_of is not None and not isinstance(node.grad_of, Node):
                raise GraphError(f"graph {self.name!r}: grad_of of {node!r} is not a node: {node.grad_of!r}")
            for value in node.attrs.values():
                if isinstance(value, Graph):
                    value.verify()
            seen.add(node)
            if node.op.name == "input":
                if node not in self.inputs:
                    raise GraphError(
                        f"graph {self.name!r}: {node!r} is an input node that is not among the inputs"
                    )
                continue
            inferred: Any = node.op.infer(*node.inputs, **node.attrs)
            if "multi" in node.op.traits:
                expected: Any = tuple((tuple(s), d) for s, d in inferred)
                actual: Any = node.avals
            else:
                expected, actual = (tuple(inferred[0]), inferred[1]), (node.shape, node.dtype)
            if expected != actual:
                raise GraphError(f"graph {self.name!r}: %{self.id(node)} {node!r} should be {expected}")
        for n in (*self.inputs, *self.outputs):
            if n not in seen:
                raise GraphError(
                    f"graph {self.name!r}: {n!r} is an input or output but not a node of the graph"
                )
        if len(self.output_names) != len(self.outputs):
            raise GraphError(
                f"graph {self.name!r}: {len(self.outputs)} outputs but {len(self.output_names)} names"
            )
        return self


def has_effect(node: Node) -> bool:
    """True for ``print`` and for control flow whose sub-graphs print."""
    return "effect" in node.op.traits or any(isinstance(v, Graph) and v.effects for v in node.attrs.values())


def _relink(nodes: Iterable[Node], new: Mapping[Node, Node]) -> None:
    """Point ``grad_of`` of copied nodes at the copied forward nodes, which may have been made after them."""
    nodes = tuple(nodes)
    # A gradient node that became a node of the forward program (2*x/2 -> x) does not make that one a gradient node.
    forward_copies = {new[n] for n in nodes if n.grad_of is None and n in new}
    for node in nodes:
        copy = new.get(node)
        if copy is None or copy is node or node.grad_of is None or copy in forward_copies:
            continue
        if copy.grad_of is None or copy.grad_of is node.grad_of:
            forward = new.get(node.grad_of)
            if forward is not copy:
                object.__setattr__(copy, "grad_of", forward)


@dataclass(frozen=True)
class Provenance:
    """What ``GraphBuilder.add(like=...)`` copies: source, scope, forward node and name."""

    source: str
    scope: str
    grad_of: Node | None
    name: str


def inline(builder: GraphBuilder, graph: Graph, inputs: Iterable[Node]) -> list[Node]:
    """Copy ``graph`` into ``builder`` with its inputs replaced by ``inputs``; returns the nodes of its outputs."""
    new: dict[Node, Node] = dict(zip(graph.inputs, inputs, strict=True))
    for node in graph.nodes:
        if node not in new:
            forward = new.get(node.grad_of) if node.grad_of is not None else None
            new[node] = builder.keep(node, tuple(new[i] for i in node.inputs), forward)
    _relink(graph.nodes, new)
    return [new[n] for n in graph.outputs]
