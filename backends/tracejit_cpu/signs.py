"""What is known of the sign of values in a loop body; lets ``exp`` skip the half of its range that cannot occur.

``body.Emitter`` asks once per body. NaN is allowed everywhere: "not positive" means that no value is greater than zero.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tracejit_cpu.body import Ins, Local

_SAME = frozenset({"identity", "stop_gradient"})
_NEVER_NEGATIVE = frozenset({"abs", "exp", "exp2", "sqrt", "cosh", "arccos", "arccosh"})
_SIGN_OF_BOTH = frozenset({"add", "maximum", "minimum"})


def nonpositive(local: Local) -> set[int]:
    """The floating-point instructions whose values are never above zero."""
    up: set[int] = set()  # never below zero
    down: set[int] = set()  # never above zero
    for i, ins in enumerate(local.instrs):
        if ins.dtype.kind != "f":
            continue
        if ins.op == "const":
            value = float(ins.attrs["value"])
            up |= {i} if value >= 0 else set()
            down |= {i} if value <= 0 else set()
        elif ins.op in _SAME or (ins.op == "convert" and local.instrs[ins.args[0]].dtype.kind == "f"):
            up |= {i} if ins.args[0] in up else set()
            down |= {i} if ins.args[0] in down else set()
        elif ins.op in _NEVER_NEGATIVE:
            up.add(i)
        elif ins.op == "neg":
            up |= {i} if ins.args[0] in down else set()
            down |= {i} if ins.args[0] in up else set()
        elif ins.op in ("mul", "div"):
            _product(local, i, ins, up, down)
        elif ins.op == "sub":
            if _less_its_maximum(local, ins):
                down.add(i)
            up |= {i} if ins.args[0] in up and ins.args[1] in down else set()
            down |= {i} if ins.args[0] in down and ins.args[1] in up else set()
        elif ins.op in _SIGN_OF_BOTH:
            for facts, enough in ((up, "maximum"), (down, "minimum")):
                known = [a in facts for a in ins.args]
                if all(known) or (any(known) and ins.op == enough):
                    facts.add(i)
        elif ins.op == "where":
            for facts in (up, down):
                facts |= {i} if ins.args[1] in facts and ins.args[2] in facts else set()
        elif ins.op == "reduce" and ins.attrs["kind"] in ("sum", "max", "min"):
            up |= {i} if ins.args[0] in up else set()
            down |= {i} if ins.args[0] in down else set()
    return down


def _product(local: Local, i: int, ins: Ins, up: set[int], down: set[int]) -> None:
    a, b = ins.args
    if ins.op == "mul" and any(
        local.instrs[p].op == "neg" and local.instrs[p].args[0] == q for p, q in ((a, b), (b, a))
    ):  # -x * x
        down.add(i)
    if (ins.op == "mul" and a == b) or (a in up and b in up) or (a in down and b in down):
        up.add(i)
    if (a in up and b in down) or (a in down and b in up):
        down.add(i)


def _less_its_maximum(local: Local, ins: Ins) -> bool:
    """x - max(x), the argument of a stable softmax."""
    value, top = ins.args
    while local.instrs[top].op in _SAME:
        top = local.instrs[top].args[0]
    reduce = local.instrs[top]
    return reduce.op == "reduce" and reduce.attrs["kind"] == "max" and reduce.args[0] == value
