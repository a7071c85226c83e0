"""Python asks a symbolic tensor for its value: give it where it is known while tracing (and guard it), else explain.

Called by ``Tensor.__bool__``, ``__int__``, ``__float__``, ``__index__``, ``__array__``, ``item``.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tracejit import source as _source
from tracejit.errors import ConcretizationError, describe
from tracejit.graph import GuardInfo, Node
from tracejit.tensor import Tensor, check_alive


def concretize(tensor: Tensor, wanted: str) -> Any:
    """The trace-time value of ``tensor`` if it depends on scalar arguments and constants only.

    Each scalar argument it depends on becomes a guard of the trace: another value next time means another entry.
    Otherwise a ConcretizationError that shows the user's line and the chain of operations behind the value.
    """
    check_alive(tensor)
    ctx = tensor.ctx
    values: dict[Node, Any] = {}
    order: list[Node] = []
    stack = [(tensor.node, 0)]
    seen: set[Node] = set()
    while stack:
        node, i = stack.pop()
        if i == 0:
            if node in seen:
                continue
            seen.add(node)
        if i < len(node.inputs):
            stack.append((node, i + 1))
            stack.append((node.inputs[i], 0))
        else:
            order.append(node)
    used: list[Node] = []
    for node in order:
        if node.op.name == "input":
            if node not in ctx.scalars:
                raise _unknown_value(tensor, wanted)
            used.append(node)
            values[node] = np.asarray(ctx.scalars[node], dtype=node.dtype)
        elif node.op.name in ("random_bits", "print") or node.avals or node.op.name == "proj":
            raise _unknown_value(tensor, wanted)
        else:
            values[node] = node.op.reference(*(values[i] for i in node.inputs), **node.attrs)
    where = _source.location()
    for node in used:
        index = node.attrs["index"]
        ctx.guards.setdefault(index, GuardInfo(index, ctx.scalars[node], where))
    value = np.asarray(values[tensor.node])
    return value.item() if value.ndim == 0 else value


def _unknown_value(tensor: Tensor, wanted: str) -> ConcretizationError:
    lines: list[str] = []
    node: Node | None = tensor.node
    while node is not None and len(lines) < 6:
        lines.append(
            f"    {node.name or node.op.name}: {describe(node)}"
            + (f"  ({node.source})" if node.source else "")
        )
        node = max(node.inputs, key=lambda n: (n.op.name not in ("const", "literal"), n.size), default=None)
    chain = "\n".join(lines)
    hints = {
        "bool": "`if`, `while`, `and`, `or`, `not` need a value: use tj.where(cond, a, b), tj.cond or tj.while_loop; "
        "`&`, `|`, `~` work on arrays",
        "index": "a loop count or index must be known while tracing: use a Python int argument, x.shape, tj.scan or np.take",
        "NumPy array": "NumPy's own memory cannot hold traced values: drop np.asarray or np.array around a tensor, join "
        "tensors with np.stack, use np.broadcast_to for np.full and np.where or np.concatenate for assignments; to index "
        "an array of the surroundings, write np.asarray(table, like=index)[index]",
    }
    return ConcretizationError.make(
        f"Python needs the {wanted} of an array, whose value is not known while tracing",
        got={"x": tensor},
        hint=hints.get(wanted, "return the tensor from the traced function and convert the result")
        + f"\n  the value comes from\n{chain}",
    )
