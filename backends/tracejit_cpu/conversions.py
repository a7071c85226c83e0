"""Casts between element types, as C and NumPy do them. Called by every emitter."""

from __future__ import annotations

import numpy as np

from tracejit_cpu.irbuilder import Fn, const, type_bytes, value_type, vec
from tracejit_cpu.num import Num


def round_to_half(fn: Fn, value: str, lanes: int) -> str:
    """A float32 rounded to the nearest float16, still as float32."""
    full, half = vec("float", lanes), vec("half", lanes)
    return fn.op(f"fpext {half} {fn.op(f'fptrunc {full} {value} to {half}')} to {full}")


def _round_to_odd(fn: Fn, value: str, lanes: int) -> str:
    """float64 to float32, inexact results with an odd last bit, so that rounding once more to float16 is exact.

    No processor rounds float64 to float16 itself, and the library function for it is not in every process.
    """
    wide, narrow = Num(fn, "double", lanes), Num(fn, "float", lanes)
    near = fn.op(f"fptrunc {wide.full} {value} to {narrow.full}")
    back = fn.op(f"fpext {narrow.full} {near} to {wide.full}")
    bits = narrow.to_bits(near)
    beyond = wide.cmp("ogt", wide.abs(back), wide.abs(value))
    down = fn.op(f"sext {wide.bool} {beyond} to {narrow.bits}")  # towards zero: the pattern less one
    sticky = fn.op(f"zext {wide.bool} {wide.cmp('une', back, value)} to {narrow.bits}")
    return narrow.from_bits(narrow.iop("or", narrow.iop("add", bits, down), sticky))


def convert(fn: Fn, value: str, src: np.dtype, dst: np.dtype, lanes: int) -> str:
    """A cast as C and NumPy do it; float to integer out of range is unspecified, as there."""
    a, b = value_type(src), value_type(dst)
    fa, fb = vec(a, lanes), vec(b, lanes)
    if dst.name == "float16" and src.name != "float16":
        if src.name == "float64":
            single = _round_to_odd(fn, value, lanes)
        else:
            single = value if src.kind == "f" else convert(fn, value, src, np.dtype(np.float32), lanes)
        return round_to_half(fn, single, lanes)
    if a == b and src.kind != "b" and dst.kind != "b":
        return value
    if src.kind == "b":
        if dst.kind == "b":
            return value
        return fn.op(f"{'uitofp' if dst.kind == 'f' else 'zext'} {fa} {value} to {fb}")
    if dst.kind == "b":
        if src.kind == "f":
            return fn.op(f"fcmp une {fa} {value}, {const(0.0, a, lanes)}")
        return fn.op(f"icmp ne {fa} {value}, {const(0, a, lanes)}")
    if src.kind == "f" and dst.kind == "f":
        return fn.op(f"{'fpext' if type_bytes(a) < type_bytes(b) else 'fptrunc'} {fa} {value} to {fb}")
    if src.kind == "f":
        if dst.name == "uint64":
            # NumPy's C cast wraps negatives on x86: go through int64 below 2**63
            n = Num(fn, a, lanes)
            high = n.cmp("oge", value, n.c(2.0**63))
            low = fn.op(f"fptosi {fa} {n.select(high, n.c(0.0), value)} to {fb}")
            top = fn.op(f"fptoui {fa} {n.select(high, value, n.c(2.0**63))} to {fb}")
            return fn.op(f"select {vec('i1', lanes)} {high}, {fb} {top}, {fb} {low}")
        if type_bytes(b) < 4 or dst.name == "uint32":
            mid = vec("i64" if dst.name == "uint32" else "i32", lanes)
            whole = fn.op(f"fptosi {fa} {value} to {mid}")
            return fn.op(f"trunc {mid} {whole} to {fb}")
        return fn.op(f"fptosi {fa} {value} to {fb}")
    if dst.kind == "f":
        return fn.op(f"{'uitofp' if src.kind == 'u' else 'sitofp'} {fa} {value} to {fb}")
    if type_bytes(a) > type_bytes(b):
        return fn.op(f"trunc {fa} {value} to {fb}")
    if type_bytes(a) < type_bytes(b):
        return fn.op(f"{'zext' if src.kind == 'u' else 'sext'} {fa} {value} to {fb}")
    return value
