"""Divisions, remainders, integer powers and shifts with NumPy's semantics. Called by ``mathlib.emit``."""

from __future__ import annotations

from tracejit_cpu.functions import per_lane
from tracejit_cpu.irbuilder import Fn, const, type_bytes
from tracejit_cpu.num import Num


def int_divide(fn: Fn, op: str, ty: str, lanes: int, signed: bool, a: str, b: str) -> str:
    """floordiv, mod (sign of the divisor) and fmod (sign of the dividend); a zero divisor gives 0, nothing traps."""
    n = Num(fn, ty, lanes)
    zero = n.cmp("eq", b, n.c(0))
    safe = n.select(zero, n.c(1), b)
    if not signed:
        out = n._two("udiv" if op == "floordiv" else "urem", a, safe)
        return n.select(zero, n.c(0), out)
    lowest = -(1 << (type_bytes(ty) * 8 - 1))
    overflow = n.logic("and", n.cmp("eq", a, n.c(lowest)), n.cmp("eq", safe, n.c(-1)))
    safe = n.select(overflow, n.c(1), safe)
    quotient = n._two("sdiv", a, safe)
    rest = n.sub(a, n.mul(quotient, safe))
    if op == "fmod":
        return n.select(zero, n.c(0), rest)
    opposite = n.cmp("slt", n._two("xor", rest, safe), n.c(0))
    adjust = n.logic("and", n.cmp("ne", rest, n.c(0)), opposite)
    if op == "floordiv":
        return n.select(zero, n.c(0), n.select(adjust, n.sub(quotient, n.c(1)), quotient))
    return n.select(zero, n.c(0), n.select(adjust, n.add(rest, safe), rest))


def float_divide(fn: Fn, op: str, ty: str, lanes: int, a: str, b: str) -> str:
    """NumPy's divmod for floats (npy_divmod); fmod is C's."""
    n = Num(fn, ty, lanes)
    name = "fmodf" if ty == "float" else "fmod"
    rest = per_lane(fn, name, ty, lanes, [a, b])
    if op == "fmod":
        return rest
    nonzero = n.cmp("une", rest, n.c(0.0))
    differ = n.logic("xor", n.cmp("olt", b, n.c(0.0)), n.cmp("olt", rest, n.c(0.0)))
    adjust = n.logic("and", nonzero, differ)
    if op == "mod":
        out = n.select(adjust, n.add(rest, b), rest)
        return n.select(nonzero, out, n.copysign(n.c(0.0), b))
    quotient = n.div(n.sub(a, rest), b)
    quotient = n.select(adjust, n.sub(quotient, n.c(1.0)), quotient)
    floor = n.unary("floor", quotient)
    floor = n.select(n.cmp("ogt", n.sub(quotient, floor), n.c(0.5)), n.add(floor, n.c(1.0)), floor)
    plain = n.div(a, b)
    floor = n.select(n.cmp("une", quotient, n.c(0.0)), floor, n.copysign(n.c(0.0), plain))
    return n.select(n.cmp("oeq", b, n.c(0.0)), plain, floor)


def int_pow(fn: Fn, ty: str, lanes: int, signed: bool, a: str, b: str) -> str:
    """Repeated squaring per lane, modulo 2**bits as NumPy; a negative power is truncated: 0 unless |a| is 1."""
    symbol = f"ipow_{ty}"
    if symbol not in fn.module.functions:
        inner = Fn(fn.module, symbol, f"{ty} %a, {ty} %b", ty)
        base, power, out = inner.var(ty, "%a"), inner.var(ty, "%b"), inner.var(ty, "1")
        with inner.loop(0, type_bytes(ty) * 8):
            p, x, r = inner.get(ty, power), inner.get(ty, base), inner.get(ty, out)
            bit = inner.op(f"trunc {ty} {p} to i1")
            prod = inner.op(f"mul {ty} {r}, {x}")
            inner.set(ty, inner.op(f"select i1 {bit}, {ty} {prod}, {ty} {r}"), out)
            inner.set(ty, inner.op(f"mul {ty} {x}, {x}"), base)
            inner.set(ty, inner.op(f"lshr {ty} {p}, 1"), power)
        inner.finish(f"ret {ty} {inner.get(ty, out)}")
    n = Num(fn, ty, lanes)
    if not signed:
        return per_lane(fn, symbol, ty, lanes, [a, b])
    # for a in {1, -1} the low bit of b decides, negative or not
    unit = n.logic("or", n.cmp("eq", a, n.c(1)), n.cmp("eq", a, n.c(-1)))
    negative = n.cmp("slt", b, n.c(0))
    low = n._two("and", b, n.c(1))
    power = n.select(negative, low, b)
    whole = per_lane(fn, symbol, ty, lanes, [a, power])
    return n.select(n.logic("and", negative, n.logic("xor", unit, const(True, "i1", lanes))), n.c(0), whole)


def shift(fn: Fn, op: str, ty: str, lanes: int, signed: bool, a: str, b: str) -> str:
    """Shifts; by the width or more gives 0, or the sign."""
    n = Num(fn, ty, lanes)
    width = type_bytes(ty) * 8
    fits = n.cmp("ult", b, n.c(width))
    safe = n.select(fits, b, n.c(0))
    if op == "left_shift":
        return n.select(fits, n._two("shl", a, safe), n.c(0))
    if not signed:
        return n.select(fits, n._two("lshr", a, safe), n.c(0))
    return n.select(fits, n._two("ashr", a, safe), n._two("ashr", a, n.c(width - 1)))
