"""The inner loops of attention kernels: products with static shapes and the exponential. Used by ``attention*.py``.

Unlike ``micro.py``'s kernels these know all strides and, where it is short, the depth when they are made: with sums over
8 or 16 elements a call's set-up would cost as much as its work.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from tracejit_cpu import mathlib
from tracejit_cpu.irbuilder import Fn, Module, const, vec

UNROLL = 16  # sums up to this length are one straight piece of code

# Minimax fit of 2**r on |r| <= 1/2 with p(0) = 1 (relative error 0.9e-7, 1.4 ulp with float32's rounding)
_EXP2 = (
    0.001326465280726552,
    0.009671511128544807,
    0.05550733953714371,
    0.24022242426872253,
    0.6931470036506653,
    1.0,
)
_MAGIC = (
    12582912.0 + 127.0
)  # adding it leaves the integer part, biased as float32's exponent is, in the low bits


def exp_below(n: mathlib.Num, x: str) -> str:
    """2**x in float32, e**x in float64, for x that does not exceed zero by much; NaN stays NaN.

    The scores' unit is chosen accordingly (``AttentionBase.unit``): 2**x needs no reduction in two parts. Results below
    2**-126 become zero.
    """
    if n.ty == "double":
        dtype = np.dtype(np.float64)
        return mathlib.emit(n.fn, "exp", [x], [dtype], dtype, n.lanes, {})
    x = n.floor_at(x, -127.0)
    t = n.add(x, n.c(_MAGIC))
    p = n.poly(n.sub(x, n.sub(t, n.c(_MAGIC))), _EXP2)
    # Multiplied, not added to the exponent, so that NaN stays NaN and 2**-127 becomes 0.
    return n.mul(p, n.from_bits(n.iop("shl", n.to_bits(t), n.ci(23))))


def heights(rows: int, most: int) -> list[tuple[int, int]]:
    """Cut ``rows`` into strips of nearly equal height up to ``most``: (height, how many) pairs."""
    count = -(-rows // most)
    low, more = divmod(rows, count)
    return [(h, c) for h, c in ((low + 1, more), (low, count - more)) if h and c]


def strip(
    module: Module,
    ty: str,
    lanes: int,
    mr: int,
    nv: int,
    a: tuple[int, int],
    b: int,
    out: int,
    depth: int | None,
    add: bool,
) -> str:
    """``void f(ptr a, ptr b, ptr out, i64 tiles, i64 depth)``: ``tiles`` times ``mr`` rows of a product; returns its name.

    out[i*out + j] (+)= sum_k a[i*rs + k*ks] * b[k*b + j] for ``nv`` vectors of ``lanes``, with ``a`` = (rs, ks). A
    ``depth`` of None is taken from the last argument, which is ignored otherwise.
    """
    rs, ks = a
    name = "_".join(map(str, ("strip", ty, mr, nv, rs, ks, b, out, depth or "n", "add" if add else "set")))
    if name in module.functions:
        return name
    fn = Fn(module, name, "ptr %a, ptr %b, ptr %out, i64 %tiles, i64 %depth")
    full = vec(ty, lanes)
    with fn.loop(0, "%tiles") as tile:
        base, to = fn.gep("%a", fn.imul(tile, mr * rs), ty), fn.gep("%out", fn.imul(tile, mr * out), ty)
        places = [[fn.gep(to, i * out + j * lanes, ty) for j in range(nv)] for i in range(mr)]
        acc = [[fn.var(full) for _ in range(nv)] for _ in range(mr)]
        for i in range(mr):
            for j in range(nv):
                zero = const(0.0, ty, lanes)
                fn.set(full, fn.load(ty, places[i][j], lanes) if add else zero, acc[i][j])

        def step(pa: str, pb: str, u: int, acc: list[list[str]] = acc) -> None:
            right = [fn.load(ty, fn.gep(pb, u * b + j * lanes, ty), lanes) for j in range(nv)]
            for i in range(mr):
                left = fn.splat(fn.load(ty, fn.gep(pa, i * rs + u * ks, ty)), ty, lanes)
                for j in range(nv):
                    old = fn.get(full, acc[i][j])
                    if module.host.fma:
                        new = fn.intrinsic("fma", ty, lanes, left, right[j], old)
                    else:
                        new = fn.op(f"fadd {full} {fn.op(f'fmul {full} {left}, {right[j]}')}, {old}")
                    fn.set(full, new, acc[i][j])

        if depth is not None and depth <= UNROLL:
            for u in range(depth):
                step(base, "%b", u)
        else:
            pa, pb = fn.var("ptr", base), fn.var("ptr", "%b")
            count = "%depth" if depth is None else str(depth)
            whole = fn.op("and i64 %depth, -4") if depth is None else str(depth & -4)
            for low, high, by in (("0", whole, 4), (whole, count, 1)):
                if low == high:
                    continue
                with fn.loop(low, high, by):
                    p, q = fn.get("ptr", pa), fn.get("ptr", pb)
                    for u in range(by):
                        step(p, q, u)
                    fn.set("ptr", fn.gep(p, by * ks, ty), pa)
                    fn.set("ptr", fn.gep(q, by * b, ty), pb)
        for i in range(mr):
            for j in range(nv):
                fn.store(ty, fn.get(full, acc[i][j]), places[i][j], lanes)
    fn.finish()
    return name


def pieces(fn: Fn, low: str, high: str, by: int) -> Iterator[tuple[str, int]]:
    """The bodies of two loops over ``low ... high``, as (index, count): first ``by`` at a time, then the rest singly."""
    if low == high:
        return
    length = high if low == "0" else fn.op(f"sub i64 {high}, {low}")
    if length.isdigit():
        whole = str(int(length) // by * by)
    else:
        whole = fn.op(f"and i64 {length}, {-by}")  # by is a power of two
    middle = fn.iadd(low, whole)
    with fn.loop(low, middle, by) as i:
        yield i, by
    with fn.loop(middle, high) as i:
        yield i, 1
