"""The JSON form of a graph (format ``tracejit-graph``, version 1) for the viewer, recordings and other tools.

``Graph.to_json`` and ``Graph.from_json`` call it. A node is ``{"id", "op", "inputs", "attrs", "shape",
"dtype"}`` plus, where known, ``"name"``, ``"source"``, ``"scope"``, ``"grad_of"``, and ``"results"`` for a
node with several results (whose dtype is ``"tuple"``). Attributes are plain JSON: tuples are lists, dtypes
strings under the key ``dtype``, non-finite floats ``{"float": "nan"}``, arrays ``{"array": ...}``, sub-graphs
nested documents, and what no file can hold ``{"opaque": name}``.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from tracejit.dtypes import SUPPORTED, DType
from tracejit.errors import GraphError
from tracejit.graph import TUPLE, ArrayLiteral, Graph, Node, Shape
from tracejit.graph_text import MAX_DEPTH, Opaque, check_shape, make_array, make_graph, make_node, opaque_name

FORMAT, VERSION = "tracejit-graph", 1


# -- writing ---------------------------------------------------------------------------------------


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": repr(value)}
    if isinstance(value, tuple):
        return [_plain(v) for v in value]
    if isinstance(value, np.dtype):
        return value.name
    if isinstance(value, ArrayLiteral):
        array = value.array
        data = base64.b64encode(array.tobytes()).decode()
        return {"array": {"shape": list(array.shape), "dtype": array.dtype.name, "data": data}}
    if isinstance(value, Graph):
        return to_json(value)
    return {"opaque": opaque_name(value)}


def _node_json(graph: Graph, node: Node) -> dict[str, Any]:
    row: dict[str, Any] = {
        "id": graph.id(node),
        "op": node.op.name,
        "inputs": [graph.id(i) for i in node.inputs],
        "attrs": {k: _plain(v) for k, v in node.attrs.items()},
        "shape": list(node.shape),
        "dtype": "tuple" if node.dtype == TUPLE else node.dtype.name,
    }
    for key in ("name", "source", "scope"):
        if getattr(node, key):
            row[key] = getattr(node, key)
    if node.grad_of is not None and node.grad_of in graph:
        row["grad_of"] = graph.id(node.grad_of)
    if node.dtype == TUPLE:
        row["results"] = [{"shape": list(s), "dtype": d.name} for s, d in node.avals]
    return row


def to_json(graph: Graph) -> dict[str, Any]:
    """A document of dicts, lists, strings and finite numbers only."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "name": graph.name,
        "nodes": [_node_json(graph, n) for n in graph.nodes],
        "inputs": [graph.id(n) for n in graph.inputs],
        "outputs": [
            {"name": label, "node": graph.id(n)}
            for label, n in zip(graph.output_names, graph.outputs, strict=True)
        ],
    }


# -- reading ---------------------------------------------------------------------------------------


def _get(row: Any, key: str, kind: type, where: str, default: Any = ...) -> Any:
    if not isinstance(row, Mapping):
        raise GraphError(f"{where} must be an object, is {type(row).__name__}")
    if key not in row:
        if default is ...:
            raise GraphError(f"{where} has no {key!r}")
        return default
    value = row[key]
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise GraphError(f"{where}.{key} must be {kind.__name__}, is {type(value).__name__}")
    return value


def _dtype(name: Any, where: str) -> DType:
    if not isinstance(name, str) or name not in SUPPORTED:
        raise GraphError(f"{where}: unknown dtype {name!r}")
    return SUPPORTED[name]


def _aval(row: Any, where: str) -> tuple[Shape, DType]:
    try:
        shape = check_shape(_get(row, "shape", list, where))
    except GraphError as error:
        raise GraphError(f"{where}: {error}") from None
    return shape, _dtype(row.get("dtype"), where)


def _value(value: Any, where: str, depth: int) -> Any:
    if depth > MAX_DEPTH:
        raise GraphError(f"{where} is nested more than {MAX_DEPTH} deep")
    if isinstance(value, list):
        return tuple(_value(v, where, depth + 1) for v in value)
    if not isinstance(value, Mapping):
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise GraphError(f"{where} has a value of type {type(value).__name__}")
    if "float" in value:
        try:
            return {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}[value["float"]]
        except (KeyError, TypeError):
            raise GraphError(f"{where}: {value['float']!r} is not a non-finite float") from None
    if "array" in value:
        shape, dtype = _aval(value["array"], where)
        return make_array(shape, dtype, _get(value["array"], "data", str, where))
    if "opaque" in value:
        return Opaque(_get(value, "opaque", str, where))
    if value.get("format") == FORMAT:
        return _graph(value, where, depth + 1)
    raise GraphError(f"{where} has an unknown value {sorted(map(str, value))[:6]}")


def _attrs(op: str, row: Mapping[str, Any], where: str, depth: int) -> dict[str, Any]:
    found = {str(k): _value(v, f"{where}.attrs.{k}", depth) for k, v in row.items()}
    if isinstance(found.get("dtype"), str):
        found["dtype"] = _dtype(found["dtype"], where)
    if (
        op == "const"
        and isinstance(found.get("dtype"), np.dtype)
        and isinstance(found.get("value"), bool | int | float)
    ):
        # Other tools write 1.0 as 1: the dtype says which it was.
        kinds: dict[str, type] = {"f": float, "b": bool}
        found["value"] = kinds.get(found["dtype"].kind, int)(found["value"])
    return found


def _node(row: Any, nodes: list[Node], forward: dict[int, int], where: str, depth: int) -> Node:
    if _get(row, "id", int, where) != len(nodes):
        raise GraphError(f"{where}.id must be {len(nodes)}, the node's position")
    op = _get(row, "op", str, where)
    inputs = _get(row, "inputs", list, where)
    for i in inputs:
        if type(i) is not int or not 0 <= i < len(nodes):
            raise GraphError(f"{where}.inputs: {i!r} is not an earlier node")
    multi = row.get("dtype") == "tuple"
    if multi:
        results = enumerate(_get(row, "results", list, where))
        avals = [_aval(r, f"{where}.results[{i}]") for i, r in results]
    else:
        avals = [_aval(row, where)]
    if row.get("grad_of") is not None:
        forward[len(nodes)] = _get(row, "grad_of", int, where)
    attrs = _attrs(op, _get(row, "attrs", Mapping, where, {}), where, depth)
    labels = {k: _get(row, k, str, where, "") for k in ("source", "scope", "name")}
    try:
        return make_node(op, [nodes[i] for i in inputs], attrs, avals, multi=multi, **labels)
    except GraphError as error:
        raise GraphError(f"{where}: {error}") from None


def _graph(data: Mapping[str, Any], where: str, depth: int) -> Graph:
    if _get(data, "format", str, where) != FORMAT:
        raise GraphError(f"{where} has the format {data['format']!r}, not {FORMAT!r}")
    if _get(data, "version", int, where) != VERSION:
        raise GraphError(f"{where} has version {data['version']}; this tracejit reads version {VERSION}")
    nodes: list[Node] = []
    forward: dict[int, int] = {}
    for i, row in enumerate(_get(data, "nodes", list, where)):
        nodes.append(_node(row, nodes, forward, f"{where}.nodes[{i}]", depth))

    def at(i: Any, what: str) -> Node:
        if type(i) is not int or not 0 <= i < len(nodes):
            raise GraphError(f"{where}.{what}: {i!r} is not a node")
        return nodes[i]

    inputs = [at(i, "inputs") for i in _get(data, "inputs", list, where)]
    rows = _get(data, "outputs", list, where)
    outputs = [at(_get(r, "node", int, f"{where}.outputs"), "outputs") for r in rows]
    labels = [_get(r, "name", str, f"{where}.outputs") for r in rows]
    return make_graph(_get(data, "name", str, where), nodes, inputs, outputs, labels, forward)


def from_json(data: Mapping[str, Any]) -> Graph:
    """The graph that :func:`to_json` wrote; GraphError names the place of whatever is wrong."""
    return _graph(data, "graph", 0)


__all__ = ["FORMAT", "VERSION", "from_json", "to_json"]
