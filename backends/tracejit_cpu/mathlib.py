"""Elementwise operations in LLVM IR: arithmetic with NumPy's semantics and vectorised elementary functions.

``emit`` is the one entry, called by ``body.Emitter`` for loops and epilogues. float32 functions stay within 2 ulp: exp, log,
tanh and erf are evaluated in float32 (Cephes, S. Moshier), the rarer ones in float64 vectors and rounded once. float64
functions other than exp and log call libm per lane. All keep NaN, infinities, denormals and signed zeros.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tracejit_cpu.conversions import convert, round_to_half
from tracejit_cpu.division import float_divide, int_divide, int_pow, shift
from tracejit_cpu.functions import FUNCTIONS, function
from tracejit_cpu.irbuilder import Fn, const, value_type, vec
from tracejit_cpu.math32 import exp32
from tracejit_cpu.num import Num


def maximum(fn: Fn, ty: str, lanes: int, a: str, b: str, largest: bool, signed: bool = True) -> str:
    """Larger (smaller) of two; NaN of either operand propagates."""
    n = Num(fn, ty, lanes)
    if ty == "i1":
        return n.logic("or" if largest else "and", a, b)
    if not n.float:
        how = ("s" if signed else "u") + ("gt" if largest else "lt")
        return n.select(n.cmp(how, a, b), a, b)
    how = "ogt" if largest else "olt"
    if not a.startswith("%"):  # a constant is never NaN here: one max instruction that keeps b's NaN
        return n.select(n.cmp(how, a, b), a, b)
    if not b.startswith("%"):
        return n.select(n.cmp(how, b, a), b, a)
    best = n.select(n.cmp(how, a, b), a, b)
    return n.select(n.isnan(a), a, best)


_COMPARE = {
    "equal": ("oeq", "eq"),
    "not_equal": ("une", "ne"),
    "less": ("olt", "lt"),
    "less_equal": ("ole", "le"),
    "greater": ("ogt", "gt"),
    "greater_equal": ("oge", "ge"),
}


def emit(
    fn: Fn,
    op: str,
    args: Sequence[str],
    src: Sequence[np.dtype],
    dst: np.dtype,
    lanes: int,
    attrs: Mapping[str, Any],
) -> str:
    """Emit elementwise ``op`` on ``lanes`` values; ``src`` are the operands' dtypes, ``dst`` the result's.

    ``attrs["nonpositive"]`` promises that the argument of ``exp`` is not above zero.
    """
    first = src[0]
    ty = value_type(first)
    n = Num(fn, ty, lanes)
    floating, signed = first.kind == "f", first.kind == "i"
    if op in ("convert", "identity", "stop_gradient"):
        return convert(fn, args[0], first, dst, lanes)
    if op == "where":
        m = Num(fn, value_type(dst), lanes)
        return m.select(args[0], args[1], args[2])
    if op in _COMPARE:
        how = _COMPARE[op][0] if floating else _COMPARE[op][1]
        if not floating and how not in ("eq", "ne"):
            how = ("s" if signed else "u") + how
        return n.cmp(how, args[0], args[1])
    if op in ("add", "sub", "mul") and ty == "i1":
        return n.logic({"add": "or", "sub": "xor", "mul": "and"}[op], args[0], args[1])
    if op == "add":
        return n.add(args[0], args[1])
    if op == "sub":
        return n.sub(args[0], args[1])
    if op == "mul":
        return n.mul(args[0], args[1])
    if op == "div":
        if floating:
            return n.div(args[0], args[1])
        out = np.dtype(np.float64) if dst.kind != "f" else dst
        wide = Num(fn, value_type(out), lanes)
        return wide.div(convert(fn, args[0], first, out, lanes), convert(fn, args[1], first, out, lanes))
    if op in ("maximum", "minimum"):
        return maximum(fn, ty, lanes, args[0], args[1], op == "maximum", signed)
    if op in ("floordiv", "mod", "fmod"):
        if floating:
            return float_divide(fn, op, ty, lanes, args[0], args[1])
        if ty == "i1":
            wide8 = [fn.op(f"zext {n.full} {a} to {vec('i8', lanes)}") for a in args]
            out8 = int_divide(fn, op, "i8", lanes, False, *wide8)
            return fn.op(f"trunc {vec('i8', lanes)} {out8} to {n.full}") if dst.kind == "b" else out8
        return int_divide(fn, op, ty, lanes, signed, args[0], args[1])
    if op == "pow" and not floating:
        return int_pow(fn, ty, lanes, signed, args[0], args[1])
    if op in ("bitwise_and", "bitwise_or", "bitwise_xor", "logical_and", "logical_or", "logical_xor"):
        return n._two(op.rsplit("_", 1)[1], args[0], args[1])
    if op in ("left_shift", "right_shift"):
        return shift(fn, op, ty, lanes, signed, args[0], args[1])
    if op == "copysign":
        return n.copysign(args[0], args[1])
    return _emit_unary(fn, op, args, first, dst, lanes, n, attrs)


def _emit_unary(
    fn: Fn,
    op: str,
    args: Sequence[str],
    first: np.dtype,
    dst: np.dtype,
    lanes: int,
    n: Num,
    attrs: Mapping[str, Any],
) -> str:
    x = args[0]
    floating = first.kind == "f"
    if op == "neg":
        return n.neg(x)
    if op == "abs":
        if floating:
            return n.abs(x)
        return x if first.kind in "ub" else n.select(n.cmp("slt", x, n.c(0)), n.neg(x), x)
    if op == "sign":
        if first.kind in "ub":
            return fn.op(f"zext {n.bool} {n.cmp('ne', x, n.c(0))} to {n.full}") if first.kind == "u" else x
        up, down = (
            n.cmp("ogt" if floating else "sgt", x, n.c(0)),
            n.cmp("olt" if floating else "slt", x, n.c(0)),
        )
        zero = n.select(n.isnan(x), x, n.c(0.0)) if floating else n.c(0)
        return n.select(up, n.c(1), n.select(down, n.c(-1), zero))
    if op in ("floor", "ceil", "rint", "trunc"):
        return n.unary("roundeven" if op == "rint" else op, x) if floating else x
    if op == "reciprocal":
        if floating:
            return n.div(n.c(1.0), x)
        return int_divide(fn, "fmod" if first.kind == "b" else "floordiv", n.ty, lanes, False, n.c(1), x)
    if op in ("invert", "logical_not"):
        if n.ty != "i1" and op == "logical_not":
            return n.cmp("oeq" if floating else "eq", x, n.c(0))
        return n._two("xor", x, n.c(-1) if n.ty != "i1" else n.c(True))
    if op == "isnan":
        return n.isnan(x) if floating else const(False, "i1", lanes)
    if op in ("isinf", "isfinite"):
        if not floating:
            return const(op == "isfinite", "i1", lanes)
        return n.cmp("oeq" if op == "isinf" else "olt", n.abs(x), n.c(math.inf))
    if op in FUNCTIONS:
        if op == "exp" and attrs.get("nonpositive") and n.ty == "float":
            return exp32(n, x, "below")
        return function(fn, op, n.ty, lanes, args)
    raise KeyError(op)


ELEMENTWISE = (
    FUNCTIONS
    | frozenset(_COMPARE)
    | frozenset(
        [
            "convert",
            "identity",
            "stop_gradient",
            "where",
            "add",
            "sub",
            "mul",
            "div",
            "maximum",
            "round_to_half",
            "minimum",
            "floordiv",
            "mod",
            "fmod",
            "pow",
            "bitwise_and",
            "bitwise_or",
            "bitwise_xor",
            "logical_and",
            "logical_or",
            "logical_xor",
            "left_shift",
            "right_shift",
            "copysign",
            "neg",
            "abs",
            "sign",
            "floor",
            "ceil",
            "rint",
            "trunc",
            "reciprocal",
            "invert",
            "logical_not",
            "isnan",
            "isinf",
            "isfinite",
        ]
    )
)


# Rough cost of one lane-vector of each op in simple instructions; steers recomputation, unrolling and the thread choice.
COST = {
    "exp": 18,
    "log": 28,
    "tanh": 28,
    "erf": 45,
    "div": 5,
    "sqrt": 6,
    "rsqrt": 11,
    "pow": 150,
    "floordiv": 40,
    "mod": 40,
    "fmod": 40,
    "random_bits": 60,
    "load": 1,
}


def cost(op: str) -> int:
    """The cost of ``op`` (1 for plain arithmetic)."""
    if op in COST:
        return COST[op]
    return 70 if op in FUNCTIONS else 1


def identity(kind: str, dtype: np.dtype) -> object:
    """The neutral element of a reduction."""
    if kind in ("sum", "any"):
        return 0
    if kind in ("prod", "all"):
        return 1
    if dtype.kind == "f":
        return -math.inf if kind == "max" else math.inf
    if dtype.kind == "b":
        return kind == "min"
    info = np.iinfo(dtype)
    return info.min if kind == "max" else info.max


def combine(fn: Fn, kind: str, dtype: np.dtype, lanes: int, a: str, b: str) -> str:
    """One step of a reduction."""
    ty = value_type(dtype)
    n = Num(fn, ty, lanes)
    if ty == "i1":
        return n.logic("or" if kind in ("any", "max", "sum") else "and", a, b)
    if kind == "sum":
        return n.add(a, b)
    if kind == "prod":
        return n.mul(a, b)
    if kind in ("any", "all"):
        return n._two("or" if kind == "any" else "and", a, b)
    return maximum(fn, ty, lanes, a, b, kind == "max", dtype.kind != "u")


def horizontal(fn: Fn, kind: str, dtype: np.dtype, lanes: int, value: str) -> str:
    """Reduce the lanes of a vector to a scalar by halving (a fixed tree)."""
    ty = value_type(dtype)
    while lanes > 1:
        half = lanes // 2
        low = ", ".join(f"i32 {i}" for i in range(half))
        high = ", ".join(f"i32 {i + half}" for i in range(half))
        full = vec(ty, lanes)
        if half == 1:
            a = fn.op(f"extractelement {full} {value}, i64 0")
            b = fn.op(f"extractelement {full} {value}, i64 1")
        else:
            a = fn.op(f"shufflevector {full} {value}, {full} poison, <{half} x i32> <{low}>")
            b = fn.op(f"shufflevector {full} {value}, {full} poison, <{half} x i32> <{high}>")
        value = combine(fn, kind, dtype, half, a, b)
        lanes = half
    return value


__all__ = [
    "COST",
    "ELEMENTWISE",
    "FUNCTIONS",
    "Num",
    "combine",
    "convert",
    "cost",
    "emit",
    "horizontal",
    "identity",
    "maximum",
    "round_to_half",
]
