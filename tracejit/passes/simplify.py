"""Algebraic simplification that never changes a bit of a finite result: identities, views of views, scalar chains.

Part of the pipeline in ``passes/__init__.py``. Rules that would turn NaN into a number (``x * 0``) or change rounding
(``(x * a) * b`` with inexact ``a * b``) are left out on purpose.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from tracejit.graph import Graph, GraphBuilder, Node

Rule = Callable[[GraphBuilder, Node, tuple[Node, ...]], Node | None]


def simplify(graph: Graph) -> Graph:
    """Apply the local rules of :data:`RULES` bottom-up until nothing changes (mostly two sweeps)."""
    for _ in range(8):
        changed = False

        def rule(builder: GraphBuilder, node: Node, inputs: tuple[Node, ...]) -> Node | None:
            nonlocal changed
            found = RULES.get(node.op.name)
            result = found(builder, node, inputs) if found is not None else None
            if result is None:
                return None
            changed = True
            # What a rule made may match again: follow it on the spot instead of sweeping the whole graph anew.
            for _ in range(16):
                again = RULES.get(result.op.name)
                better = again(builder, result, result.inputs) if again is not None else None
                if better is None or better is result:
                    break
                result = better
            return result

        graph = graph.rewrite(rule)
        if not changed:
            break
    return graph


def scalar_of(node: Node) -> Any:
    """The Python value if ``node`` is a constant, possibly broadcast; else None."""
    while node.op.name == "broadcast_to":
        node = node.inputs[0]
    return node.attrs["value"] if node.op.name == "const" else None


def _is(node: Node, value: float) -> bool:
    found = scalar_of(node)
    return found is not None and found == value and not (value == 0 and _negative_zero(found))


def _negative_zero(value: Any) -> bool:
    return isinstance(value, float) and value == 0 and math.copysign(1.0, value) < 0


def _add(b: GraphBuilder, node: Node, inputs: tuple[Node, ...]) -> Node | None:
    x, y = inputs
    # x + 0.0 turns -0.0 into +0.0, which compares equal; NumPy users cannot tell in arithmetic, and gradients rely on it.
    for value, other in ((x, y), (y, x)):
        if _is(value, 0):
            return other
    return None


def _sub(b: GraphBuilder, node: Node, inputs: tuple[Node, ...]) -> Node | None:
    return inputs[0] if _is(inputs[1], 0) else None


def _mul(b: GraphBuilder, node: Node, inputs: tuple[Node, ...]) -> Node | None:
    x, y = inputs
    for value, other in ((x, y), (y, x)):
        if _is(value, 1):
            return other
        if _is(value, -1) and node.dtype.kind == "f":
            return b.add("neg", (other,), like=node)
    return _scale_of_scale(b, node, inputs)


def _scale_of_scale(b: GraphBuilder, node: Node, inputs: tuple[Node, ...]) -> Node | None:
    """(x * c1) * c2 -> x * (c1 c2) when one factor is a power of two (exact barring over- and underflow)."""
    if node.dtype.kind != "f":
        return None
    for value, other in (inputs, inputs[::-1]):
        c2 = scalar_of(value)
        if c2 is None or other.op.name != "mul":
            continue
        for inner, x in (other.inputs, other.inputs[::-1]):
            c1 = scalar_of(inner)
            if c1 is None or not (_power_of_two(c1) or _power_of_two(c2)):
                continue
            product = float(c1) * float(c2)
            if product == 0 or not math.isfinite(product) or float(node.dtype.type(product)) != product:
                continue
            factor = b.const(product, node.dtype, like=node)
            if node.shape != ():
                factor = b.add("broadcast_to", (factor,), {"shape": node.shape}, like=node)
            return b.add("mul", (x, factor), like=node)
    return None


def _power_of_two(value: Any) -> bool:
    return math.isfinite(value) and value != 0 and abs(math.frexp(value)[0]) == 0.5


def _div(b: GraphBuilder, node: Node, inputs: tuple[Node, ...]) -> Node | None:
    x, y = inputs
    divisor = scalar_of(y)
    if divisor is None:
        return None
    if divisor == 1:
        return x
    if (
        node.dtype.kind == "f"
        and _power_of_two(divisor)
        and abs(divisor) < 2.0**14
        and abs(divisor) > 2.0**-14
    ):
        factor = b.const(1.0 / divisor, node.dtype, like=node)
        if node.shape != ():
            factor = b.add("broadcast_to", (factor,), {"shape": node.shape}, like=node)
        return b.add("mul", (x, factor), like=node)
    return None


def _neg(b: GraphBuilder, node: Node, inputs: tuple[Node, ...]) -> Node | None:
    return inputs[0].inputs[0] if inputs[0].op.name == "neg" else None


def _pow(b: GraphBuilder, node: Node, inputs: tuple[Node, ...]) -> Node | None:
    x, y = inputs
    exponent = scalar_of(y)
    if exponent == 1:
        return x
    if exponent == 2:
        return b.add("mul", (x, x), like=node)
    if exponent == 0.5 and node.dtype.kind == "f":
        return None  # pow(-0.0, 0.5) is +0.0 and pow(-inf, 0.5) is inf: not sqrt
    return None


def _convert(b: GraphBuilder, node: Node, inputs: tuple[Node, ...]) -> Node | None:
    x = inputs[0]
    if x.dtype == node.dtype:
        return x
    if x.op.name == "convert":
        inner = x.inputs[0]
        # Widening first loses nothing, so both steps are one.
        if np.can_cast(inner.dtype, x.dtype, "safe") and not (
            inner.dtype.kind == "b" and node.dtype.kind == "b"
        ):
            if inner.dtype == node.dtype:
                return inner
            return b.add("convert", (inner,), {"dtype": node.dtype}, like=node)
    if x.op.name == "broadcast_to":  # convert the small thing
        small = b.add("convert", (x.inputs[0],), {"dtype": node.dtype}, like=node)
        return b.add("broadcast_to", (small,), {"shape": node.shape}, like=node)
    if x.op.name == "const":
        with np.errstate(all="ignore"):
            value = np.asarray(x.attrs["value"], dtype=x.dtype).astype(node.dtype).item()
        return b.const(value, node.dtype, like=node)
    return None


def _reshape(b: GraphBuilder, node: Node, inputs: tuple[Node, ...]) -> Node | None:
    x = inputs[0]
    if x.shape == node.shape:
        return x
    if x.op.name == "reshape":
        return b.add("reshape", (x.inputs[0],), {"shape": node.shape}, like=node)
    if x.op.name == "broadcast_to" and x.inputs[0].shape == ():
        return b.add("broadcast_to", (x.inputs[0],), {"shape": node.shape}, like=node)
    if x.op.name == "const":
        return b.add("broadcast_to", (x,), {"shape": node.shape}, like=node)
    return None


def _transpose(b: GraphBuilder, node: Node, inputs: tuple[Node, ...]) -> Node | None:
    x, perm = inputs[0], node.attrs["perm"]
    if perm == tuple(range(len(perm))):
        return x
    if x.op.name == "transpose":
        inner = x.attrs["perm"]
        return b.add("transpose", (x.inputs[0],), {"perm": tuple(inner[p] for p in perm)}, like=node)
    if x.op.name == "broadcast_to" and x.inputs[0].shape == ():
        return b.add("broadcast_to", (x.inputs[0],), {"shape": node.shape}, like=node)
    if x.op.name == "dot_general":
        return _transposed_product(b, node, x)
    # Moving axes of size one moves no data: a reshape says so to everyone behind.
    kept = [p for p in perm if x.shape[p] != 1]
    if kept == sorted(kept):
        return b.add("reshape", (x,), {"shape": node.shape}, like=node)
    return None


def _transposed_product(b: GraphBuilder, node: Node, product: Node) -> Node | None:
    """(A B)^T = B^T A^T: a transpose that swaps the free axes of a product is the product with swapped operands."""
    at, (lhs, rhs) = product.attrs, product.inputs
    batch = len(at["lhs_batch"])
    left = lhs.ndim - batch - len(at["lhs_contract"])
    right = rhs.ndim - batch - len(at["rhs_contract"])
    swapped = (*range(batch), *range(batch + left, batch + left + right), *range(batch, batch + left))
    if not left or not right or node.attrs["perm"] != swapped:
        return None
    attrs = {
        "lhs_batch": at["rhs_batch"],
        "rhs_batch": at["lhs_batch"],
        "lhs_contract": at["rhs_contract"],
        "rhs_contract": at["lhs_contract"],
    }
    return b.add("dot_general", (rhs, lhs), attrs, like=node)


def _broadcast_to(b: GraphBuilder, node: Node, inputs: tuple[Node, ...]) -> Node | None:
    x = inputs[0]
    if x.shape == node.shape:
        return x
    if x.op.name == "broadcast_to":
        return b.add("broadcast_to", (x.inputs[0],), {"shape": node.shape}, like=node)
    return None


def _slice(b: GraphBuilder, node: Node, inputs: tuple[Node, ...]) -> Node | None:
    return inputs[0] if inputs[0].shape == node.shape and all(s == 1 for s in node.attrs["step"]) else None


def _pad(b: GraphBuilder, node: Node, inputs: tuple[Node, ...]) -> Node | None:
    return inputs[0] if inputs[0].shape == node.shape else None


def _concatenate(b: GraphBuilder, node: Node, inputs: tuple[Node, ...]) -> Node | None:
    return inputs[0] if len(inputs) == 1 else None


def _where(b: GraphBuilder, node: Node, inputs: tuple[Node, ...]) -> Node | None:
    cond, x, y = inputs
    if x is y:
        return x
    known = scalar_of(cond)
    return None if known is None else (x if known else y)


def _sum(b: GraphBuilder, node: Node, inputs: tuple[Node, ...]) -> Node | None:
    x = inputs[0]
    if x.shape == node.shape and x.dtype == node.dtype and not node.attrs["axes"]:
        return x
    if all(x.shape[a] == 1 for a in node.attrs["axes"]) and x.dtype == node.dtype:
        return b.add("reshape", (x,), {"shape": node.shape}, like=node)
    return None


RULES: dict[str, Rule] = {
    "add": _add,
    "sub": _sub,
    "mul": _mul,
    "div": _div,
    "neg": _neg,
    "pow": _pow,
    "convert": _convert,
    "reshape": _reshape,
    "transpose": _transpose,
    "broadcast_to": _broadcast_to,
    "slice": _slice,
    "pad": _pad,
    "concatenate": _concatenate,
    "where": _where,
    "sum": _sum,
    "max": _sum,
    "min": _sum,
    "prod": _sum,
}
