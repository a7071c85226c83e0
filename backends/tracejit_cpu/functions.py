"""The elementary functions by name: which are computed in place, which in a shared function, which by libm per lane.

Called by ``mathlib.emit``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from tracejit_cpu import math64
from tracejit_cpu.irbuilder import Fn, vec
from tracejit_cpu.math32 import erf32, exp32, log32, tanh32
from tracejit_cpu.num import Num

_LIBM = {
    "arcsin": "asin",
    "arccos": "acos",
    "arctan": "atan",
    "arctan2": "atan2",
    "arcsinh": "asinh",
    "arccosh": "acosh",
    "arctanh": "atanh",
}


_WIDE: dict[str, Callable[..., str]] = {
    "exp2": lambda n, x: math64.exp64(n, n.mul(x, n.c(math.log(2.0)))),
    "expm1": math64.expm1_64,
    "log2": lambda n, x: n.mul(math64.log64(n, x), n.c(1.0 / math.log(2.0))),
    "log10": lambda n, x: n.mul(math64.log64(n, x), n.c(1.0 / math.log(10.0))),
    "log1p": math64.log1p64,
    "sinh": math64.sinh64,
    "cosh": math64.cosh64,
    "arcsin": math64.asin64,
    "arccos": math64.acos64,
    "arctan": math64.atan64,
    "arctan2": math64.atan2_64,
    "arcsinh": math64.asinh64,
    "arccosh": math64.acosh64,
    "arctanh": math64.atanh64,
    "cbrt": math64.cbrt64,
    "pow": math64.pow64,
    "sin": lambda n, x: math64.sincos64(n, x)[0],
    "cos": lambda n, x: math64.sincos64(n, x)[1],
    "tan": lambda n, x: (lambda sc: n.div(sc[0], sc[1]))(math64.sincos64(n, x)),
}


_INLINE32: dict[str, Callable[[Num, str], str]] = {
    "exp": exp32,
    "log": log32,
    "tanh": tanh32,
    "erf": erf32,
}


_SIGNED_ZERO = frozenset(
    {"expm1", "log1p", "sinh", "sin", "tan", "arctan", "arcsin", "arctanh", "arcsinh", "cbrt"}
)


def _shared(fn: Fn, name: str, ty: str, lanes: int, args: Sequence[str], make: Callable[[Fn], str]) -> str:
    """Call a function of the module that computes ``name`` on vectors; it is emitted on first use."""
    symbol = f"m_{name}_{lanes}{ty}"
    full = vec(ty, lanes)
    if symbol not in fn.module.functions:
        fn.module.functions[symbol] = ""  # reserve: make() may call other shared functions
        params = ", ".join(f"{full} %x{i}" for i in range(len(args)))
        inner = Fn(fn.module, symbol, params, full)
        result = make(inner)
        inner.finish(f"ret {full} {result}")
    return fn.op(f"call {full} @{symbol}({', '.join(f'{full} {a}' for a in args)})")


def per_lane(fn: Fn, symbol: str, ty: str, lanes: int, args: Sequence[str], via: str = "") -> str:
    """Call a scalar function of libm (or of this module) once per lane, in type ``via`` if that differs."""
    call_ty = via or ty
    if f"{symbol}" not in fn.module.functions:
        fn.module.declare(f"declare {call_ty} @{symbol}({', '.join([call_ty] * len(args))})")
    full = vec(ty, lanes)
    out = "poison"
    for lane in range(lanes):
        scalars = []
        for a in args:
            s = a if lanes == 1 else fn.op(f"extractelement {full} {a}, i64 {lane}")
            scalars.append(s if call_ty == ty else fn.op(f"fpext {ty} {s} to {call_ty}"))
        r = fn.op(f"call {call_ty} @{symbol}({', '.join(f'{call_ty} {s}' for s in scalars)})")
        if call_ty != ty:
            r = fn.op(f"fptrunc {call_ty} {r} to {ty}")
        out = r if lanes == 1 else fn.op(f"insertelement {full} {out}, {ty} {r}, i64 {lane}")
    return out


def _wide32(fn: Fn, name: str, lanes: int, args: Sequence[str]) -> str:
    """A float32 function computed in float64 and rounded once."""

    def make(inner: Fn) -> str:
        narrow, wide = Num(inner, "float", lanes), Num(inner, "double", lanes)
        xs = [inner.op(f"fpext {narrow.full} %x{i} to {wide.full}") for i in range(len(args))]
        if name in ("sin", "cos", "tan"):
            # beyond 1e5 (and for inf, NaN) the two-part reduction is too short: libm per lane
            slot = inner.var(narrow.full)
            huge = narrow.fn.op(f"fcmp ugt {narrow.full} {narrow.abs('%x0')}, {narrow.c(1e5)}")
            some = huge
            if lanes > 1:
                inner.module.declare(f"declare i1 @llvm.vector.reduce.or.v{lanes}i1(<{lanes} x i1>)")
                some = inner.op(f"call i1 @llvm.vector.reduce.or.v{lanes}i1(<{lanes} x i1> {huge})")
            slow, fast, join = inner.new_label("slow"), inner.new_label("fast"), inner.new_label("join")
            inner.emit(f"br i1 {some}, label %{slow}, label %{fast}")
            inner.label(slow)
            inner.set(narrow.full, per_lane(inner, name, "float", lanes, ["%x0"], via="double"), slot)
            inner.emit(f"br label %{join}")
            inner.label(fast)
            r = _WIDE[name](wide, xs[0])
            inner.set(narrow.full, inner.op(f"fptrunc {wide.full} {r} to {narrow.full}"), slot)
            inner.emit(f"br label %{join}")
            inner.label(join)
            out = inner.get(narrow.full, slot)
        else:
            r = _WIDE[name](wide, *xs)
            out = inner.op(f"fptrunc {wide.full} {r} to {narrow.full}")
        if name in _SIGNED_ZERO:
            out = narrow.select(narrow.cmp("oeq", "%x0", narrow.c(0.0)), "%x0", out)
        return out

    return _shared(fn, name, "float", lanes, args, make)


def function(fn: Fn, name: str, ty: str, lanes: int, args: Sequence[str]) -> str:
    """Emit the elementary function ``name`` on ``lanes`` values of type ``ty``."""
    n = Num(fn, ty, lanes)
    if name == "sqrt":
        return n.unary("sqrt", args[0])
    if name == "rsqrt":
        return n.div(n.c(1.0), n.unary("sqrt", args[0]))
    if ty == "float":
        if name in _INLINE32:
            return _INLINE32[name](n, args[0])
        return _wide32(fn, name, lanes, args)
    if name == "exp":
        return _shared(fn, "exp", ty, lanes, args, lambda f: math64.exp64(Num(f, ty, lanes), "%x0"))
    if name == "log":
        return _shared(fn, "log", ty, lanes, args, lambda f: math64.log64(Num(f, ty, lanes), "%x0"))
    return per_lane(fn, _LIBM.get(name, name), ty, lanes, args)


FUNCTIONS = frozenset(_WIDE) | frozenset(_INLINE32) | {"sqrt", "rsqrt"}
