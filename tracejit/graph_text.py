"""The text form of a graph: readable, stable, and parsed back to an equal graph (``str`` and ``Graph.parse``).

One node per line, in order, ``%n`` being node number n::

    graph loss {
      %0 = input {index=0, kind="argument"} : float32[8,64] name "x" @"model.py:3"
      %1 = const {value=2.0, dtype=float32} : float32[]
      %2 = broadcast_to(%1) {shape=(8, 64)} : float32[8,64] @"model.py:4" in "block0/scale"
      %3 = mul(%0, %2) : float32[8,64] @"model.py:4" in "block0/scale"
      return %3 as "out"
    }

After the type come, where known: the argument path (``name``), the user's line (``@``), the scope (``in``)
and the forward node of a gradient node (``grad_of %n``). Attribute values are None, True, False, integers,
floats (``nan``, ``inf``), strings, dtypes, tuples, arrays (``array<float32[2]>"base64"``) and graphs. The
rule object of a ``custom_vjp`` cannot be written: it appears as ``opaque "name"``, and a graph read back with
one runs but has no gradient there. ``#`` starts a comment. Nothing in a text is ever executed; reading checks
every node against the shape rule of its op.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import numpy as np

from tracejit.dtypes import SUPPORTED, DType
from tracejit.errors import GraphError, TraceError
from tracejit.graph import TUPLE, ArrayLiteral, Graph, Node, Shape
from tracejit.ops import registry

#: Limits against absurd input: characters of text, depth of nesting, axes, elements of one array.
MAX_TEXT, MAX_DEPTH, MAX_AXES, MAX_ELEMENTS = 1 << 28, 32, 64, 1 << 40


@dataclass(frozen=True)
class Opaque:
    """Stands for an attribute that no file can hold (the rule of a ``custom_vjp``); keeps its name."""

    name: str


def opaque_name(value: Any) -> str:
    """The name under which an attribute that cannot be written appears."""
    return (
        value.name if isinstance(value, Opaque) else str(getattr(value, "name", None) or type(value).__name__)
    )


# -- writing ---------------------------------------------------------------------------------------

_BARE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")
_KEYWORDS = {"None", "True", "False", "nan", "inf", "array", "opaque", "graph", "return"} | set(SUPPORTED)


def _quote(text: str) -> str:
    plain = json.dumps(text, ensure_ascii=False)
    try:
        plain.encode()
    except UnicodeEncodeError:  # lone surrogates, which no file can hold
        return json.dumps(text)
    return plain


def _type_text(shape: Shape, dtype: DType) -> str:
    return f"{dtype.name}[{','.join(map(str, shape))}]"


def _value_text(value: Any, indent: str) -> str:
    if value is None or isinstance(value, bool | np.bool_):
        return str(value)
    if isinstance(value, int | np.integer):
        return str(int(value))
    if isinstance(value, float | np.floating):
        return repr(float(value))
    if isinstance(value, str):
        return _quote(value)
    if isinstance(value, tuple):
        inner = ", ".join(_value_text(v, indent) for v in value)
        return f"({inner},)" if len(value) == 1 else f"({inner})"
    if isinstance(value, np.dtype):
        return value.name
    if isinstance(value, ArrayLiteral):
        data = base64.b64encode(value.array.tobytes()).decode()
        return f'array<{_type_text(value.array.shape, value.array.dtype)}>"{data}"'
    if isinstance(value, Graph):
        return _graph_text(value, indent + "  ")
    return f"opaque {_quote(opaque_name(value))}"


def _node_text(graph: Graph, node: Node, indent: str) -> str:
    attrs = dict(node.attrs)
    if node.op.name == "input":  # the type says it
        for key, implied in (("shape", node.shape), ("dtype", node.dtype)):
            if attrs.get(key) == implied:
                del attrs[key]
    text = f"%{graph.id(node)} = {node.op.name}"
    if node.inputs:
        text += f"({', '.join(f'%{graph.id(i)}' for i in node.inputs)})"
    if attrs:
        text += " {" + ", ".join(f"{k}={_value_text(v, indent)}" for k, v in attrs.items()) + "}"
    results = ", ".join(_type_text(s, d) for s, d in node.avals)
    text += " : " + (f"({results})" if node.dtype == TUPLE else _type_text(node.shape, node.dtype))
    if node.name:
        text += f" name {_quote(node.name)}"
    if node.source:
        text += f" @{_quote(node.source)}"
    if node.scope:
        text += f" in {_quote(node.scope)}"
    if node.grad_of is not None and node.grad_of in graph:
        text += f" grad_of %{graph.id(node.grad_of)}"
    return text


def _graph_text(graph: Graph, indent: str) -> str:
    name = graph.name if _BARE.match(graph.name) and graph.name not in _KEYWORDS else _quote(graph.name)
    header = f"graph {name}"
    if graph.inputs != tuple(n for n in graph.nodes if n.op.name == "input"):
        header += f"({', '.join(f'%{graph.id(n)}' for n in graph.inputs)})"
    lines = [header + " {"]
    lines += [f"{indent}  {_node_text(graph, node, indent + '  ')}" for node in graph.nodes]
    outputs = zip(graph.outputs, graph.output_names, strict=True)
    returned = ", ".join(f"%{graph.id(n)} as {_quote(label)}" for n, label in outputs)
    lines.append(f"{indent}  return {returned}".rstrip())
    lines.append(indent + "}")
    return "\n".join(lines)


def to_text(graph: Graph) -> str:
    """The text form of ``graph``; equal graphs have equal texts."""
    return _graph_text(graph, "")


# -- building nodes from what was read (also used by graph_json) -----------------------------------


def make_node(
    op_name: str,
    inputs: Sequence[Node],
    attrs: Mapping[str, Any],
    avals: Sequence[tuple[Shape, DType]],
    *,
    multi: bool,
    source: str,
    scope: str,
    name: str,
) -> Node:
    """A node whose stated results agree with its op's shape rule; GraphError otherwise."""
    op = registry.get(op_name)
    if op.arity is not None and len(inputs) != op.arity:
        raise GraphError(f"[{op_name}] takes {op.arity} operands, got {len(inputs)}")
    try:
        inferred: Any = op.infer(*inputs, **attrs)
        found = [(tuple(s), d) for s, d in (inferred if "multi" in op.traits else [inferred])]
    except TraceError as error:
        raise GraphError(str(error)) from None
    except Exception as error:  # wrong attribute names or types reach code that expects the right ones
        raise GraphError(f"[{op_name}] the attributes do not fit: {type(error).__name__}: {error}") from None
    if multi != ("multi" in op.traits) or found != list(avals):
        stated, right = (", ".join(_type_text(s, d) for s, d in a) for a in (avals, found))
        raise GraphError(f"[{op_name}] gives {right}, not {stated}")
    shape, dtype = ((), TUPLE) if multi else found[0]
    return Node(
        op,
        tuple(inputs),
        dict(attrs),
        shape,
        dtype,
        source=source,
        scope=scope,
        name=name,
        avals=tuple(found) if multi else (),
    )


def make_graph(
    name: str,
    nodes: Sequence[Node],
    inputs: Sequence[Node],
    outputs: Sequence[Node],
    output_names: Sequence[str],
    forward: Mapping[int, int],
) -> Graph:
    """The verified graph; ``forward`` maps positions of gradient nodes to those of their forward nodes."""
    for i, j in forward.items():
        if not 0 <= j < len(nodes):
            raise GraphError(f"grad_of %{j} is not a node")
        object.__setattr__(nodes[i], "grad_of", nodes[j])
    if {n for n in nodes if n.op.name == "input"} != set(inputs) or len(set(inputs)) != len(inputs):
        raise GraphError(f"graph {name!r}: the inputs are not exactly the input nodes")
    return Graph(name, tuple(nodes), tuple(inputs), tuple(outputs), tuple(output_names)).verify()


def make_array(shape: Shape, dtype: DType, data: str) -> ArrayLiteral:
    """The array that base64 ``data`` holds; GraphError if it is malformed or of another length."""
    try:
        raw = base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise GraphError(f"malformed array data: {error}") from None
    if len(raw) != math.prod(shape) * dtype.itemsize:
        raise GraphError(f"array data has {len(raw)} bytes, not {math.prod(shape)} elements of {dtype}")
    return ArrayLiteral(np.frombuffer(raw, dtype).reshape(shape))


def check_shape(sizes: Sequence[Any]) -> Shape:
    """A shape within the limits, or GraphError."""
    if (
        len(sizes) > MAX_AXES
        or any(type(n) is not int or n < 0 for n in sizes)
        or math.prod(sizes) > MAX_ELEMENTS
    ):
        raise GraphError(f"absurd shape {list(sizes)[:8]}")
    return tuple(sizes)


# -- reading ---------------------------------------------------------------------------------------

_TOKEN = re.compile(
    r"""(?P<space>[ \t\r]+|\#[^\n]*) | (?P<newline>\n) | (?P<ref>%[0-9]{1,9}(?![0-9A-Za-z_]))
      | (?P<string>"(?:[^"\\\n]|\\.)*")
      | (?P<float>-?(?:[0-9]+\.[0-9]*(?:e[+-]?[0-9]+)?|[0-9]+e[+-]?[0-9]+|inf\b|nan\b))
      | (?P<int>-?[0-9]{1,40}(?![0-9A-Za-z_.]))
      | (?P<word>[A-Za-z_][A-Za-z0-9_]*) | (?P<mark>[=(){}\[\],:@<>])""",
    re.VERBOSE,
)


class _Token(NamedTuple):
    kind: str
    text: str
    line: int


def _tokens(text: str) -> Iterator[_Token]:
    at, line = 0, 1
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None:
            raise GraphError(f"graph text, line {line}: cannot read {text[at : at + 20]!r}")
        kind = match.lastgroup or ""
        at = match.end()
        if kind == "newline":
            line += 1
        elif kind != "space":
            yield _Token(kind, match.group(), line)
    yield _Token("end", "end of text", line)


class _Parser:
    """Recursive descent over the tokens; every error names the line."""

    def __init__(self, text: str) -> None:
        self._stream = _tokens(text)
        self._token = next(self._stream)
        self._line = 1
        self._depth = 0

    def fail(self, what: str, line: int | None = None) -> NoReturn:
        raise GraphError(f"graph text, line {self._token.line if line is None else line}: {what}")

    def advance(self) -> _Token:
        token = self._token
        if token.kind != "end":
            self._token = next(self._stream)
        return token

    def at(self, text: str) -> bool:
        return self._token.text == text and self._token.kind in ("mark", "word")

    def accept(self, text: str) -> bool:
        if self.at(text):
            self.advance()
            return True
        return False

    def expect(self, text: str) -> None:
        if not self.accept(text):
            self.fail(f"expected {text!r}, found {self._token.text[:40]!r}")

    def take(self, kind: str, what: str) -> str:
        if self._token.kind != kind:
            self.fail(f"expected {what}, found {self._token.text[:40]!r}")
        return self.advance().text

    def string(self, what: str) -> str:
        token = self._token
        try:
            return str(json.loads(self.take("string", what), strict=False))
        except ValueError as error:
            self.fail(f"malformed string: {error}", token.line)

    def reference(self) -> int:
        return int(self.take("ref", "a node such as %0")[1:])

    def references(self) -> list[int]:
        """``(%0, %1)``, possibly empty."""
        found: list[int] = []
        self.expect("(")
        while not self.accept(")"):
            found.append(self.reference())
            if not self.at(")"):
                self.expect(",")
        return found

    def dtype(self) -> DType:
        word = self.take("word", "a dtype")
        if word not in SUPPORTED:
            self.fail(f"unknown dtype {word!r}")
        return SUPPORTED[word]

    def aval(self) -> tuple[Shape, DType]:
        """``float32[8,64]``."""
        line, dtype, sizes = self._token.line, self.dtype(), []
        self.expect("[")
        while not self.accept("]"):
            sizes.append(int(self.take("int", "a size")))
            if not self.at("]"):
                self.expect(",")
        try:
            return check_shape(sizes), dtype
        except GraphError as error:
            self.fail(str(error), line)

    def value(self) -> Any:
        token = self._token
        if token.kind == "int":
            return int(self.advance().text)
        if token.kind == "float":
            return float(self.advance().text)
        if token.kind == "string":
            return self.string("a string")
        if self.at("("):
            return self.nested(self.tuple)
        if self.at("graph"):
            return self.nested(self.graph)
        word = self.take("word", "a value")
        constants = {"None": None, "True": True, "False": False}
        if word in constants:
            return constants[word]
        if word in SUPPORTED:
            return SUPPORTED[word]
        if word == "opaque":
            return Opaque(self.string("a name"))
        if word == "array":
            self.expect("<")
            shape, dtype = self.aval()
            self.expect(">")
            line, data = self._token.line, self.take("string", "array data")
            try:
                return make_array(shape, dtype, data[1:-1])
            except GraphError as error:
                self.fail(str(error), line)
        self.fail(f"unknown value {word!r}", token.line)

    def nested(self, rule: Any) -> Any:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            self.fail(f"nested more than {MAX_DEPTH} deep")
        found = rule()
        self._depth -= 1
        return found

    def tuple(self) -> tuple[Any, ...]:
        self.expect("(")
        found = []
        while not self.accept(")"):
            found.append(self.value())
            if not self.at(")"):
                self.expect(",")
        return tuple(found)

    def attrs(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        self.expect("{")
        while not self.accept("}"):
            key = self.take("word", "an attribute")
            if key in found:
                self.fail(f"attribute {key!r} is given twice")
            self.expect("=")
            found[key] = self.value()
            if not self.at("}"):
                self.expect(",")
        return found

    def node(self, nodes: list[Node], forward: dict[int, int]) -> None:
        line, number = self._token.line, self.reference()
        if number != len(nodes):
            self.fail(f"nodes are numbered in order: expected %{len(nodes)}, found %{number}", line)
        self.expect("=")
        op_name = self.take("word", "an operation")
        operands = self.references() if self.at("(") else []
        for i in operands:
            if i >= number:
                self.fail(f"%{number} reads %{i}, which comes later", line)
        attrs = self.attrs() if self.at("{") else {}
        self.expect(":")
        multi, avals = self.at("("), []
        if multi:
            self.expect("(")
            while not self.accept(")"):
                avals.append(self.aval())
                if not self.at(")"):
                    self.expect(",")
        else:
            avals.append(self.aval())
        if op_name == "input" and not multi:
            attrs.setdefault("shape", avals[0][0])
            attrs.setdefault("dtype", avals[0][1])
        name = self.string("a name") if self.accept("name") else ""
        source = self.string("a source line") if self.accept("@") else ""
        scope = self.string("a scope") if self.accept("in") else ""
        if self.accept("grad_of"):
            forward[number] = self.reference()
        try:
            made = make_node(
                op_name,
                [nodes[i] for i in operands],
                attrs,
                avals,
                multi=multi,
                source=source,
                scope=scope,
                name=name,
            )
        except GraphError as error:
            self.fail(str(error), line)
        nodes.append(made)

    def graph(self) -> Graph:
        line = self._token.line
        self.expect("graph")
        name = (
            self.string("a name") if self._token.kind == "string" else self.take("word", "the graph's name")
        )
        arguments = self.references() if self.at("(") else None
        self.expect("{")
        nodes: list[Node] = []
        forward: dict[int, int] = {}
        while self._token.kind == "ref":
            self.node(nodes, forward)
        self.expect("return")
        outputs, labels = [], []
        while not self.at("}"):
            outputs.append(self.reference())
            self.expect("as")
            labels.append(self.string("the output's name"))
            if not self.at("}"):
                self.expect(",")
        for i in (*outputs, *(arguments or ())):
            if i >= len(nodes):
                self.fail(f"%{i} is not a node")
        self.expect("}")
        inputs = (
            [n for n in nodes if n.op.name == "input"] if arguments is None else [nodes[i] for i in arguments]
        )
        try:
            return make_graph(name, nodes, inputs, [nodes[i] for i in outputs], labels, forward)
        except GraphError as error:
            self.fail(str(error), line)


def parse(text: str) -> Graph:
    """The graph that ``text`` describes; GraphError names the line of whatever is wrong."""
    if not isinstance(text, str):
        raise GraphError(f"a graph is parsed from text, not {type(text).__name__}")
    if len(text) > MAX_TEXT:
        raise GraphError(f"graph text of {len(text)} characters is longer than {MAX_TEXT}")
    parser = _Parser(text)
    graph = parser.graph()
    if parser._token.kind != "end":
        parser.fail(f"unexpected {parser._token.text[:40]!r} after the graph")
    return graph


__all__ = [
    "Opaque",
    "check_shape",
    "make_array",
    "make_graph",
    "make_node",
    "opaque_name",
    "parse",
    "to_text",
]
