"""The viewer's picture of a traced graph: a checked, plain form of ``Graph.to_json()``.

Called by ``fold`` (what to show), ``scene`` (state in time) and the inspector. Reads JSON only; knows no other part of
tracejit. A bad document raises :class:`GraphFormatError` that names the node at fault.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .errors import GraphFormatError

MAX_NUMBERS = 64  # kept of a constant array
FORWARD, GRADIENT, OPTIMIZER = "forward", "gradient", "optimizer"
PHASES = (FORWARD, GRADIENT, OPTIMIZER)

OPTIMIZER_SCOPES = frozenset({"optimizer", "optim"})

#: Ops whose meaning as a *category* is needed even for a graph file that carries no op table. Colour only; every
#: explanation the viewer prints comes from the op table of the compile event.
_FALLBACK_CATEGORY = {
    "contraction": "dot_general matmul conv2d conv einsum attention",
    "reduction": "sum mean max min prod argmax argmin reduce_sum reduce_max reduce_min reduce_prod any all cumsum sort "
    "softmax logsumexp",
    "activation": "exp log tanh sqrt rsqrt sigmoid gelu relu silu erf logistic softplus log1p expm1 sin cos",
    "norm": "layer_norm rms_norm batch_norm",
    "view": "reshape transpose broadcast_to broadcast_in_dim slice pad concatenate flip squeeze expand_dims split convert "
    "proj copy stop_gradient convert_element_type",
    "gather": "take gather scatter_add scatter-add dynamic_slice embedding",
    "constant": "const iota",
    "random": "random_bits uniform normal bernoulli",
    "control": "cond while while_loop scan",
    "loss": "cross_entropy",
}
FALLBACK_CATEGORY = {op: cat for cat, ops in _FALLBACK_CATEGORY.items() for op in ops.split()}

_PARAM_ROOTS = ("param", "model", "weights", "self", "theta", "net")
_PARAM_LEAVES = frozenset(
    ["w", "b", "weight", "bias", "scale", "gamma", "beta", "kernel", "embedding", "emb", "g"]
)


@dataclass(slots=True)
class Node:
    """One node of the traced graph, as the viewer needs it. ``scope`` is the scope path, outermost first."""

    id: int
    op: str
    inputs: tuple[int, ...]
    attrs: dict[str, Any]
    shape: tuple[int, ...]
    dtype: str
    scope: tuple[str, ...]
    name: str = ""
    source: str = ""
    grad_of: int | None = None
    phase: str = FORWARD
    category: str = "elementwise"
    users: list[int] = field(default_factory=list)
    constant: int | None = None  # the constant this node is, or is a view of

    @property
    def is_source(self) -> bool:
        """True for what reads nothing (inputs, constants, iota) and for mere views of a constant."""
        return not self.inputs or self.constant is not None

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the value, 0 when the dtype is unknown (tuples)."""
        return self.size * dtype_bytes(self.dtype)


def dtype_bytes(dtype: str) -> int:
    """Bytes per element of a dtype name such as ``float32``; 0 when unknown."""
    if dtype == "bool":
        return 1
    digits = "".join(c for c in dtype if c.isdigit())
    return int(digits) // 8 if digits else 0


@dataclass(slots=True)
class GraphModel:
    """A whole graph: nodes in topological order, outputs and the op table that explains its ops."""

    name: str
    nodes: list[Node]
    outputs: list[tuple[str, int]]
    ops: Mapping[str, Mapping[str, str]]
    gradient_of: dict[int, list[int]]  # forward node -> its gradient nodes
    loss: int | None = None

    def counts(self) -> dict[str, int]:
        """Number of nodes per phase."""
        out = dict.fromkeys(PHASES, 0)
        for n in self.nodes:
            out[n.phase] += 1
        return out


def _as_shape(value: Any, where: str) -> tuple[int, ...]:
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise GraphFormatError(f"{where}: shape must be a list of integers, got {value!r}")
    if not all(isinstance(d, int) and d >= 0 for d in value):
        return tuple(d if isinstance(d, int) and d >= 0 else 1 for d in value)  # symbolic sizes: show as 1
    return tuple(value)


def parse_graph(doc: Any, ops: Mapping[str, Mapping[str, str]] | None = None) -> GraphModel:
    """Check a graph document and turn it into a :class:`GraphModel`.

    ``doc`` is ``Graph.to_json()``: ``{"format": "tracejit-graph", "version": 1, "nodes": [...], "outputs": [...]}``.
    A file may wrap it as ``{"graph": ..., "ops": ...}``. Raises :class:`GraphFormatError` on anything else.
    """
    if isinstance(doc, Mapping) and "graph" in doc and "nodes" not in doc:
        return parse_graph(doc["graph"], ops or doc.get("ops") or {})
    if not isinstance(doc, Mapping) or not isinstance(doc.get("nodes"), (list, tuple)):
        raise GraphFormatError('not a graph document: expected an object with a "nodes" list')
    if doc.get("format", "tracejit-graph") != "tracejit-graph":
        raise GraphFormatError(f"not a tracejit graph: format is {doc.get('format')!r}")
    if doc.get("version", 1) != 1:
        raise GraphFormatError(f"graph of version {doc.get('version')!r}; this viewer reads version 1")
    ops = ops or {}
    nodes: list[Node] = []
    for i, raw in enumerate(doc["nodes"]):
        nodes.append(_parse_node(i, raw))
    for n in nodes:
        for s in dict.fromkeys(n.inputs):
            nodes[s].users.append(n.id)
    outputs: list[tuple[str, int]] = []
    for k, out in enumerate(doc.get("outputs") or ()):
        ref = out.get("node") if isinstance(out, Mapping) else out
        if not isinstance(ref, int) or not 0 <= ref < len(nodes):
            raise GraphFormatError(f"output {k} refers to node {ref!r}, which does not exist")
        outputs.append((str(out.get("name", "")) if isinstance(out, Mapping) else "", ref))
    model = GraphModel(str(doc.get("name") or "graph"), nodes, outputs, ops, {})
    _find_constants(model)
    _assign_phases(model)
    _assign_categories(model)
    return model


def _parse_node(i: int, raw: Any) -> Node:
    where = f"node {i}"
    if not isinstance(raw, Mapping) or not isinstance(raw.get("op"), str):
        raise GraphFormatError(f'{where}: expected an object with an "op"')
    if raw.get("id", i) != i:
        raise GraphFormatError(f"{where}: id is {raw.get('id')!r}, must equal its position")
    inputs = tuple(raw.get("inputs") or ())
    for s in inputs:
        if not isinstance(s, int) or not 0 <= s < i:
            raise GraphFormatError(f"{where} ({raw['op']}): input {s!r} is not an earlier node")
    grad_of = raw.get("grad_of")
    if grad_of is not None and not (isinstance(grad_of, int) and 0 <= grad_of < i):
        grad_of = None
    attrs = raw.get("attrs")
    return Node(
        id=i,
        op=raw["op"],
        inputs=inputs,
        attrs={str(k): _plain_value(v) for k, v in attrs.items()} if isinstance(attrs, Mapping) else {},
        shape=_as_shape(raw.get("shape") or (), where),
        dtype=str(raw.get("dtype") or "?"),
        scope=tuple(p for p in str(raw.get("scope") or "").split("/") if p),
        name=str(raw.get("name") or ""),
        source=str(raw.get("source") or ""),
        grad_of=grad_of,
    )


def _plain_value(value: Any) -> Any:
    """An attribute without the wrapping JSON needs: ``{"float": "-inf"}`` is a float, an array its numbers."""
    if isinstance(value, Mapping) and value.get("float") in ("nan", "inf", "-inf"):
        return float(value["float"])
    array = value.get("array") if isinstance(value, Mapping) else None
    if isinstance(array, Mapping):
        try:
            numbers = np.frombuffer(base64.b64decode(array["data"]), array["dtype"])
        except (KeyError, TypeError, ValueError):
            return "array"
        return numbers[:MAX_NUMBERS].tolist()
    return value


def _find_constants(model: GraphModel) -> None:
    """Mark constants, and the reshapes and broadcasts of them: shown as one hexagon beside each user."""
    for n in model.nodes:
        if n.op in ("const", "iota"):
            n.constant = n.id
        elif len(n.inputs) == 1 and model.nodes[n.inputs[0]].constant is not None:
            category = (model.ops.get(n.op) or {}).get("category") or FALLBACK_CATEGORY.get(n.op)
            if category == "view" and n.op != "proj":
                n.constant = model.nodes[n.inputs[0]].constant


def _assign_phases(model: GraphModel) -> None:
    """Forward, gradient or optimiser for every node; gradient nodes without a scope take their forward node's."""
    nodes = model.nodes
    explicit = any(n.scope and n.scope[0] in OPTIMIZER_SCOPES for n in nodes)
    for n in nodes:
        if n.scope and n.scope[0] in OPTIMIZER_SCOPES:
            n.phase = OPTIMIZER
        elif n.grad_of is not None:
            n.phase = GRADIENT
            model.gradient_of.setdefault(n.grad_of, []).append(n.id)
            if not n.scope:
                n.scope = nodes[n.grad_of].scope
        elif n.inputs and not n.is_source:
            before = {nodes[s].phase for s in n.inputs}
            if OPTIMIZER in before:
                n.phase = OPTIMIZER
            elif GRADIENT in before:  # rewritten gradient arithmetic, or an update written by hand
                n.phase = GRADIENT if explicit else OPTIMIZER
    for n in reversed(nodes):  # sources live where they are first needed
        if n.is_source and n.users:
            phases = {nodes[u].phase for u in n.users}
            n.phase = next(p for p in PHASES if p in phases)


def _assign_categories(model: GraphModel) -> None:
    nodes, ops = model.nodes, model.ops
    has_update = any(n.phase == OPTIMIZER for n in nodes)
    for n in nodes:
        entry = ops.get(n.op) or {}
        n.category = entry.get("category") or FALLBACK_CATEGORY.get(n.op, "elementwise")
        if n.op == "input":
            n.category = "parameter" if _looks_like_parameter(n, nodes, has_update) else "input"
        elif n.constant is not None:
            n.category = "constant"
    if any(n.phase == GRADIENT for n in nodes):
        for _, ref in model.outputs:
            n = nodes[ref]
            if n.phase == FORWARD and n.size == 1 and n.dtype.startswith("float") and not n.is_source:
                model.loss = ref
                n.category = "loss"
                break


def _looks_like_parameter(n: Node, nodes: list[Node], has_update: bool) -> bool:
    if not n.dtype.startswith(("float", "bfloat")):
        return False
    if n.attrs.get("kind") == "capture":
        return True
    if has_update and any(nodes[u].phase == OPTIMIZER for u in n.users):
        return True
    parts = [p for p in n.name.replace("[", ".").replace("]", "").replace("/", ".").split(".") if p]
    if not parts:
        return False
    return parts[0].lower().startswith(_PARAM_ROOTS) or (
        len(parts) > 1 and parts[-1].lower() in _PARAM_LEAVES
    )
