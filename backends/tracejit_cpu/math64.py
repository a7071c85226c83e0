"""Elementary functions in float64 vectors: for float64 results (exp, log) and for the rarer float32 ones, rounded once.

Used by ``functions.py``.
"""

from __future__ import annotations

import math

from tracejit_cpu.irbuilder import const, vec
from tracejit_cpu.num import Num


def exp64(n: Num, x: str) -> str:
    """e**x within 1-2 ulp (Taylor polynomial of degree 13 on |r| <= ln2/2)."""
    magic = 6755399441055744.0  # 1.5 * 2**52
    xc = n.clamp(x, -746.0, 710.0)
    t = n.fma(xc, n.c(1.4426950408889634), n.c(magic))
    k = n.sub(t, n.c(magic))
    r = n.fma(k, n.c(-6.93147180369123816490e-01), xc)
    r = n.fma(k, n.c(-1.90821492927058770002e-10), r)
    p = n.poly(r, [1.0 / math.factorial(i) for i in range(13, 1, -1)])
    p = n.add(n.fma(p, n.mul(r, r), r), n.c(1.0))
    i = n.iop("sub", n.to_bits(t), n.ci(0x4338000000000000))
    half = n.iop("ashr", i, n.ci(1))
    for part in (half, n.iop("sub", i, half)):
        p = n.mul(p, n.from_bits(n.iop("shl", n.iop("add", part, n.ci(1023)), n.ci(52))))
    return p


_LOG64 = (
    1.479819860511658591e-01,
    1.531383769920937332e-01,
    1.818357216161805012e-01,
    2.222219843214978396e-01,
    2.857142874366239149e-01,
    3.999999999940941908e-01,
    6.666666666666735130e-01,
)  # fdlibm e_log.c, Sun Microsystems 1993


def log64(n: Num, x: str) -> str:
    """ln x within 1-2 ulp (fdlibm's polynomial)."""
    tiny = n.cmp("olt", x, n.c(2.2250738585072014e-308))
    xs = n.select(tiny, n.mul(x, n.c(2.0**54)), x)
    bits = n.to_bits(xs)
    e = n.iop("ashr", n.iop("sub", bits, n.ci(0x3FE6A09E667F3BCD)), n.ci(52))
    m = n.from_bits(n.iop("sub", bits, n.iop("shl", e, n.ci(52))))
    # int64 -> double without AVX-512DQ: the exponent fits 32 bits
    narrow = n.fn.op(f"trunc {n.bits} {e} to {vec('i32', n.lanes)}")
    ef = n.fn.op(f"sitofp {vec('i32', n.lanes)} {narrow} to {n.full}")
    ef = n.select(tiny, n.sub(ef, n.c(54.0)), ef)
    f = n.sub(m, n.c(1.0))
    s = n.div(f, n.add(f, n.c(2.0)))
    z = n.mul(s, s)
    r = n.mul(n.poly(z, _LOG64), z)
    half = n.mul(n.mul(f, f), n.c(0.5))
    # k*ln2_hi - ((hfsq - (s*(hfsq+R) + k*ln2_lo)) - f)
    inner = n.fma(ef, n.c(1.90821492927058770002e-10), n.mul(s, n.add(half, r)))
    out = n.sub(n.mul(ef, n.c(6.93147180369123816490e-01)), n.sub(n.sub(half, inner), f))
    out = n.select(n.cmp("olt", x, n.c(math.inf)), out, x)
    out = n.select(n.cmp("oeq", x, n.c(0.0)), n.c(-math.inf), out)
    return n.select(n.cmp("olt", x, n.c(0.0)), n.c(math.nan), out)


def log1p64(n: Num, x: str) -> str:
    """ln(1+x) by Kahan's correction: log(u) * x / (u-1) with u = 1+x rounded."""
    u = n.add(x, n.c(1.0))
    d = n.sub(u, n.c(1.0))
    r = n.div(n.mul(log64(n, u), x), d)
    r = n.select(n.cmp("oeq", d, n.c(0.0)), x, r)
    return n.select(n.cmp("oeq", u, n.c(math.inf)), u, r)


def expm1_64(n: Num, x: str) -> str:
    """e**x - 1: a polynomial up to 0.5."""
    small = n.mul(n.poly(x, [1.0 / math.factorial(i) for i in range(11, 0, -1)]), x)
    return n.select(n.cmp("olt", n.abs(x), n.c(0.5)), small, n.sub(exp64(n, x), n.c(1.0)))


def sinh64(n: Num, x: str) -> str:
    """sinh x: a polynomial up to 1."""
    z = n.mul(x, x)
    small = n.mul(n.poly(z, [1.0 / math.factorial(i) for i in range(13, 0, -2)]), x)
    big = n.mul(n.sub(exp64(n, x), exp64(n, n.neg(x))), n.c(0.5))
    return n.select(n.cmp("olt", n.abs(x), n.c(1.0)), small, big)


def cosh64(n: Num, x: str) -> str:
    """cosh x by two exponentials."""
    return n.mul(n.add(exp64(n, x), exp64(n, n.neg(x))), n.c(0.5))


_ATAN_P = (
    -8.750608600031904122785e-1,
    -1.615753718733365076637e1,
    -7.500855792314704667340e1,
    -1.228866684490136173410e2,
    -6.485021904942025371773e1,
)


_ATAN_Q = (
    1.0,
    2.485846490142306297962e1,
    1.650270098316988542046e2,
    4.328810604912902668951e2,
    4.853903996359136964868e2,
    1.945506571482613964425e2,
)


def atan64(n: Num, x: str) -> str:
    """Cephes: |x| > tan(3pi/8) uses -1/x, |x| > 0.66 uses (x-1)/(x+1), then a rational function."""
    a = n.abs(x)
    big = n.cmp("ogt", a, n.c(2.41421356237309504880))
    mid = n.cmp("ogt", a, n.c(0.66))
    t = n.select(big, n.div(n.c(-1.0), a), n.select(mid, n.div(n.sub(a, n.c(1.0)), n.add(a, n.c(1.0))), a))
    y = n.select(big, n.c(math.pi / 2), n.select(mid, n.c(math.pi / 4), n.c(0.0)))
    z = n.mul(t, t)
    r = n.div(n.mul(z, n.poly(z, _ATAN_P)), n.poly(z, _ATAN_Q))
    return n.copysign(n.add(y, n.fma(t, r, t)), x)


def atan2_64(n: Num, y: str, x: str) -> str:
    """The angle of (x, y) from the ratio of the smaller to the larger, by octants."""
    ay, ax = n.abs(y), n.abs(x)
    swap = n.cmp("ogt", ay, ax)
    low, high = n.select(swap, ax, ay), n.select(swap, ay, ax)
    q = n.div(low, high)
    q = n.select(n.cmp("oeq", high, n.c(0.0)), n.c(0.0), q)
    q = n.select(n.cmp("oeq", low, n.c(math.inf)), n.c(1.0), q)
    q = n.select(n.isnan(y), y, q)
    q = n.select(n.isnan(x), x, q)
    r = atan64(n, q)
    r = n.abs(r)
    r = n.select(swap, n.sub(n.c(math.pi / 2), r), r)
    negative = n.fn.op(f"icmp slt {n.bits} {n.to_bits(x)}, {const(0, 'i64', n.lanes)}")
    r = n.select(negative, n.sub(n.c(math.pi), r), r)
    return n.copysign(r, y)


def asin64(n: Num, x: str) -> str:
    """atan2(x, sqrt(1 - x*x))."""
    return atan2_64(n, x, n.unary("sqrt", n.mul(n.sub(n.c(1.0), x), n.add(n.c(1.0), x))))


def acos64(n: Num, x: str) -> str:
    """atan2(sqrt(1 - x*x), x)."""
    return atan2_64(n, n.unary("sqrt", n.mul(n.sub(n.c(1.0), x), n.add(n.c(1.0), x))), x)


def asinh64(n: Num, x: str) -> str:
    """ln(x + sqrt(x*x + 1)) without cancellation."""
    a = n.abs(x)
    z = n.mul(a, a)
    root = n.unary("sqrt", n.add(z, n.c(1.0)))
    r = log1p64(n, n.add(a, n.div(z, n.add(n.c(1.0), root))))
    r = n.select(n.cmp("oeq", a, n.c(math.inf)), a, r)
    return n.copysign(r, x)


def acosh64(n: Num, x: str) -> str:
    """ln(x + sqrt(x*x - 1)) without cancellation."""
    t = n.sub(x, n.c(1.0))
    r = log1p64(n, n.add(t, n.unary("sqrt", n.mul(t, n.add(x, n.c(1.0))))))
    return n.select(n.cmp("olt", x, n.c(1.0)), n.c(math.nan), r)


def atanh64(n: Num, x: str) -> str:
    """ln((1 + x) / (1 - x)) / 2."""
    a = n.abs(x)
    r = n.mul(log1p64(n, n.div(n.mul(a, n.c(2.0)), n.sub(n.c(1.0), a))), n.c(0.5))
    r = n.select(n.cmp("ogt", a, n.c(1.0)), n.c(math.nan), r)
    return n.copysign(r, x)


def cbrt64(n: Num, x: str) -> str:
    """exp(ln|x| / 3) with the sign of x."""
    return n.copysign(exp64(n, n.mul(log64(n, n.abs(x)), n.c(1.0 / 3.0))), x)


def sincos64(n: Num, x: str) -> tuple[str, str]:
    """sin and cos for |x| < 1e6 with about 1e-12 relative error (for float32 results)."""
    magic = 6755399441055744.0
    t = n.fma(x, n.c(2.0 / math.pi), n.c(magic))
    k = n.sub(t, n.c(magic))
    r = n.fma(k, n.c(-1.57079632673412561417e00), x)
    r = n.fma(k, n.c(-6.07710050650619224932e-11), r)
    z = n.mul(r, r)
    s = n.fma(n.mul(n.poly(z, [1 / 362880 * (1 - 0.0), -1 / 5040, 1 / 120, -1 / 6]), z), r, r)
    s = n.fma(n.mul(n.mul(n.mul(z, z), n.mul(z, z)), n.mul(z, r)), n.c(-1 / 39916800), s)
    c = n.poly(z, [1 / 479001600, -1 / 3628800, 1 / 40320, -1 / 720, 1 / 24, -0.5, 1.0])
    i = n.to_bits(t)
    bit0 = n.fn.op(f"trunc {n.bits} {i} to {n.bool}")
    odd1 = n.fn.op(f"trunc {n.bits} {n.iop('lshr', i, n.ci(1))} to {n.bool}")
    sine = n.select(bit0, c, s)
    sine = n.select(odd1, n.neg(sine), sine)
    cosine = n.select(bit0, s, c)
    flip = n.logic("xor", bit0, odd1)
    return sine, n.select(flip, n.neg(cosine), cosine)


def pow64(n: Num, x: str, y: str) -> str:
    """|x|**y by exp(y ln|x|), then IEEE 754 ``pow``'s special cases (for float32 results)."""
    r = exp64(n, n.mul(log64(n, n.abs(x)), y))
    whole = n.cmp("oeq", n.unary("trunc", y), y)
    half = n.mul(y, n.c(0.5))
    odd = n.logic("and", whole, n.cmp("one", n.unary("trunc", half), half))
    negative = n.fn.op(f"icmp slt {n.bits} {n.to_bits(x)}, {const(0, 'i64', n.lanes)}")
    r = n.select(n.logic("and", negative, odd), n.neg(r), r)
    below = n.logic("and", n.cmp("olt", x, n.c(0.0)), n.cmp("une", n.abs(x), n.c(math.inf)))
    undefined = n.logic("and", below, n.logic("xor", whole, const(True, "i1", n.lanes)))
    r = n.select(undefined, n.c(math.nan), r)
    both = n.logic("and", n.cmp("oeq", n.abs(x), n.c(1.0)), n.cmp("oeq", n.abs(y), n.c(math.inf)))
    one = n.logic("or", n.logic("or", n.cmp("oeq", y, n.c(0.0)), n.cmp("oeq", x, n.c(1.0))), both)
    return n.select(one, n.c(1.0), r)
