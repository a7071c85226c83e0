"""Elementwise operations in LLVM IR: arithmetic with NumPy's semantics and vectorised elementary functions.

``emit`` is the one entry, called by ``loops.py`` and by every epilogue. float32 functions stay within 2 ulp: exp, log,
tanh and erf are evaluated in float32 (Cephes, S. Moshier), the rarer ones in float64 vectors and rounded once. float64
functions other than exp and log call libm per lane. All keep NaN, infinities, denormals and signed zeros.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from tracejit_cpu.irbuilder import Fn, const, intrinsic_suffix, type_bytes, value_type, vec

_LIBM = {
    "arcsin": "asin",
    "arccos": "acos",
    "arctan": "atan",
    "arctan2": "atan2",
    "arcsinh": "asinh",
    "arccosh": "acosh",
    "arctanh": "atanh",
}


class Num:
    """Operators on ``lanes`` values of one IR type; keeps the emitters below readable."""

    def __init__(self, fn: Fn, ty: str, lanes: int) -> None:
        self.fn, self.ty, self.lanes = fn, ty, lanes
        self.full = vec(ty, lanes)
        self.bits = vec({"float": "i32", "double": "i64"}.get(ty, ty), lanes)
        self.bool = vec("i1", lanes)
        self.float = ty in ("float", "double")

    def c(self, value: object) -> str:
        return const(value, self.ty, self.lanes)

    def ci(self, value: int) -> str:
        return const(value, {"float": "i32", "double": "i64"}.get(self.ty, self.ty), self.lanes)

    def _two(self, op: str, a: str, b: str) -> str:
        return self.fn.op(f"{op} {self.full} {a}, {b}")

    def add(self, a: str, b: str) -> str:
        return self._two("fadd" if self.float else "add", a, b)

    def sub(self, a: str, b: str) -> str:
        return self._two("fsub" if self.float else "sub", a, b)

    def mul(self, a: str, b: str) -> str:
        return self._two("fmul" if self.float else "mul", a, b)

    def div(self, a: str, b: str) -> str:
        return self._two("fdiv", a, b)

    def neg(self, a: str) -> str:
        return self.fn.op(f"fneg {self.full} {a}") if self.float else self._two("sub", self.c(0), a)

    def fma(self, a: str, b: str, c: str) -> str:
        if self.fn.module.host.fma:
            return self.fn.intrinsic("fma", self.ty, self.lanes, a, b, c)
        return self.add(self.mul(a, b), c)

    def poly(self, x: str, coefficients: Sequence[float]) -> str:
        """Horner's rule, highest power first."""
        p = self.c(coefficients[0])
        for k in coefficients[1:]:
            p = self.fma(p, x, self.c(k))
        return p

    def cmp(self, how: str, a: str, b: str) -> str:
        return self.fn.op(f"{'fcmp' if self.float else 'icmp'} {how} {self.full} {a}, {b}")

    def select(self, cond: str, a: str, b: str) -> str:
        return self.fn.op(f"select {self.bool} {cond}, {self.full} {a}, {self.full} {b}")

    def isnan(self, a: str) -> str:
        return self.cmp("uno", a, self.c(0.0))

    def to_bits(self, a: str) -> str:
        return self.fn.op(f"bitcast {self.full} {a} to {self.bits}")

    def from_bits(self, a: str) -> str:
        return self.fn.op(f"bitcast {self.bits} {a} to {self.full}")

    def iop(self, op: str, a: str, b: str) -> str:
        """An integer operation on bit patterns."""
        return self.fn.op(f"{op} {self.bits} {a}, {b}")

    def unary(self, name: str, a: str) -> str:
        return self.fn.intrinsic(name, self.ty, self.lanes, a)

    def abs(self, a: str) -> str:
        return self.unary("fabs", a)

    def copysign(self, a: str, b: str) -> str:
        return self.fn.intrinsic("copysign", self.ty, self.lanes, a, b)

    def floor_at(self, x: str, low: float) -> str:
        """The larger of x and ``low`` in one instruction; NaN stays NaN."""
        return self.select(self.cmp("olt", x, self.c(low)), self.c(low), x)

    def clamp(self, x: str, low: float, high: float) -> str:
        """Into [low, high]; NaN stays NaN."""
        x = self.select(self.cmp("ogt", x, self.c(high)), self.c(high), x)
        return self.floor_at(x, low)

    def logic(self, op: str, a: str, b: str) -> str:
        return self.fn.op(f"{op} {self.bool} {a}, {b}")


# -- float32 ----------------------------------------------------------------------------------------------------------
# Minimax fits whose coefficients are float32 themselves: e**r on |r| <= ln2/2 (0.04 ulp), e**2r on half that range
# (weighted as tanh needs it, 0.4 ulp there), (tanh(x) / x - 1) / x**2 in x**2 up to 0.565 (0.7 ulp of tanh).
_EXP32 = (
    0.001378893735818565,
    0.008368692360818386,
    0.04166889935731888,
    0.1666652113199234,
    0.49999991059303284,
    1.0,
    1.0,
)
_EXP32_TWICE = (
    0.26658034324645996,
    0.6701876521110535,
    1.3333789110183716,
    1.9999696016311646,
    1.9999995231628418,
    1.0,
)
_TANH32 = (0.01629873551428318, -0.052601754665374756, 0.1331969052553177, -0.33332905173301697)
_LOG32 = (
    7.0376836292e-2,
    -1.1514610310e-1,
    1.1676998740e-1,
    -1.2420140846e-1,
    1.4249322787e-1,
    -1.6668057665e-1,
    2.0000714765e-1,
    -2.4999993993e-1,
    3.3333331174e-1,
)
# erf(x)/x in x*x on [0, 1] and exp(x*x)*erfc(x) in x-2.5 on [1, 4]: Chebyshev fits of scipy.special, error < 2e-9, < 1e-8
_ERF_LOW = (
    7.882497105278621e-05,
    -0.0008018854991391581,
    0.005189311942533931,
    -0.026854328795989323,
    0.11283597463486247,
    -0.37612626903580326,
    0.1283791658815026,  # less 1: x is added after the product, which halves the rounding error
)
_ERF_HIGH = (
    1.6718017851233992e-06,
    -6.386085703837755e-06,
    1.4353662572380783e-05,
    -5.358580906010503e-05,
    0.00021297208022041806,
    -0.0007389975677464437,
    0.0024659823576754017,
    -0.007999345595343451,
    0.024938203738504475,
    -0.07434760092710327,
    0.21080635752833898,
)


_MAGIC32 = 12582912.0  # 1.5 * 2**23: adding it rounds to an integer, which is then in the low mantissa bits


def _exp32(n: Num, x: str, span: str = "any") -> str:
    """e**x: x = k ln2 + r, a polynomial on |r| <= ln2/2, scaled by 2**k.

    Results may be denormal or infinite, which a single factor 2**k cannot give. So k is moved by 64 towards zero (inside
    the rounding constant, at no cost) and a factor 2**-64 or 2**64 makes up for it. ``span`` says what is known of x:
    "any"; "below" promises x <= 0, where the factor is in the coefficients; "safe" promises -87 <= x <= 88 or NaN, which
    needs none, and does not keep NaN.
    """
    if span == "safe":
        magic, factor, scale = n.c(_MAGIC32), "", 1.0
    elif span == "below":
        x = n.floor_at(x, -104.5)
        magic, factor, scale = n.c(_MAGIC32 + 64), "", 2.0**-64
    else:
        x = n.clamp(x, -104.5, 89.0)
        negative = n.fn.op(f"icmp slt {n.bits} {n.to_bits(x)}, {n.ci(0)}")
        magic, scale = n.select(negative, n.c(_MAGIC32 + 64), n.c(_MAGIC32 - 64)), 1.0
        factor = n.select(negative, n.c(2.0**-64), n.c(2.0**64))
    t = n.fma(x, n.c(1.4426950408889634), magic)
    k = n.sub(t, magic)
    r = n.fma(k, n.c(-0.693145751953125), x)
    r = n.fma(k, n.c(-1.428606765330187e-06), r)
    p = n.poly(r, [c * scale for c in _EXP32])
    exponent = n.iop(
        "shl", n.to_bits(t), n.ci(23)
    )  # only k is left: the constant's own bits fall out at the top
    if span == "safe":
        return n.from_bits(n.iop("add", n.to_bits(p), exponent))
    p = n.mul(p, n.from_bits(n.iop("add", exponent, n.ci(0x3F800000))))  # a product, so that NaN stays NaN
    return n.mul(p, factor) if factor else p


def _log32(n: Num, x: str) -> str:
    tiny = n.cmp("olt", x, n.c(1.1754943508222875e-38))
    xs = n.select(tiny, n.mul(x, n.c(8388608.0)), x)
    bits = n.to_bits(xs)
    # m in [sqrt(1/2), sqrt(2)): subtract the bits of sqrt(1/2), keep the exponent's part
    shifted = n.iop("sub", bits, n.ci(0x3F3504F3))
    e = n.iop("ashr", shifted, n.ci(23))
    m = n.from_bits(n.iop("sub", bits, n.iop("shl", e, n.ci(23))))
    ef = n.fn.op(f"sitofp {n.bits} {e} to {n.full}")
    ef = n.select(tiny, n.sub(ef, n.c(23.0)), ef)
    f = n.sub(m, n.c(1.0))
    z = n.mul(f, f)
    y = n.mul(n.mul(n.poly(f, _LOG32), f), z)
    y = n.fma(ef, n.c(-2.12194440e-4), y)
    y = n.fma(z, n.c(-0.5), y)
    r = n.fma(ef, n.c(0.693359375), n.add(f, y))
    r = n.select(n.cmp("olt", x, n.c(math.inf)), r, x)  # inf and NaN pass
    r = n.select(n.cmp("oeq", x, n.c(0.0)), n.c(-math.inf), r)
    return n.select(n.cmp("olt", x, n.c(0.0)), n.c(math.nan), r)


def _tanh32(n: Num, x: str) -> str:
    """An odd polynomial up to 0.56, above that 1 - 2 / (e**2|x| + 1), where a rougher exponential is enough.

    The more |x| exceeds 0.56 the less the exponential's error matters, so ln2 needs no second part.
    """
    sign = n.iop("and", n.to_bits(x), n.ci(-0x80000000))
    a, z = n.abs(x), n.mul(x, x)
    small = n.fma(n.mul(n.poly(z, _TANH32), z), a, a)
    b = n.select(n.cmp("ogt", a, n.c(10.0)), n.c(10.0), a)
    t = n.fma(b, n.c(2.0 * 1.4426950408889634), n.c(_MAGIC32))
    r = n.fma(n.sub(t, n.c(_MAGIC32)), n.c(-0.5 * math.log(2.0)), b)
    p = n.to_bits(n.poly(r, _EXP32_TWICE))
    e = n.from_bits(n.iop("add", p, n.iop("shl", n.to_bits(t), n.ci(23))))
    big = n.sub(n.c(1.0), n.div(n.c(2.0), n.add(e, n.c(1.0))))
    out = n.select(n.cmp("ogt", a, n.c(0.56)), big, small)
    return n.from_bits(n.iop("or", n.to_bits(out), sign))


def _erf32(n: Num, x: str) -> str:
    a = n.abs(x)
    small = n.fma(n.poly(n.mul(x, x), _ERF_LOW), x, x)
    ac = n.select(n.cmp("ogt", a, n.c(4.0)), n.c(4.0), a)
    e = _exp32(n, n.neg(n.mul(ac, ac)), "safe")
    tail = n.mul(e, n.poly(n.sub(ac, n.c(2.5)), _ERF_HIGH))
    big = n.sub(n.c(1.0), tail)
    return n.copysign(n.select(n.cmp("ult", a, n.c(1.0)), small, big), x)


# -- float64 cores ------------------------------------------------------------------------------------------------------
def _exp64(n: Num, x: str) -> str:
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


def _log64(n: Num, x: str) -> str:
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


def _log1p64(n: Num, x: str) -> str:
    """ln(1+x) by Kahan's correction: log(u) * x / (u-1) with u = 1+x rounded."""
    u = n.add(x, n.c(1.0))
    d = n.sub(u, n.c(1.0))
    r = n.div(n.mul(_log64(n, u), x), d)
    r = n.select(n.cmp("oeq", d, n.c(0.0)), x, r)
    return n.select(n.cmp("oeq", u, n.c(math.inf)), u, r)


def _expm1_64(n: Num, x: str) -> str:
    small = n.mul(n.poly(x, [1.0 / math.factorial(i) for i in range(11, 0, -1)]), x)
    return n.select(n.cmp("olt", n.abs(x), n.c(0.5)), small, n.sub(_exp64(n, x), n.c(1.0)))


def _sinh64(n: Num, x: str) -> str:
    z = n.mul(x, x)
    small = n.mul(n.poly(z, [1.0 / math.factorial(i) for i in range(13, 0, -2)]), x)
    big = n.mul(n.sub(_exp64(n, x), _exp64(n, n.neg(x))), n.c(0.5))
    return n.select(n.cmp("olt", n.abs(x), n.c(1.0)), small, big)


def _cosh64(n: Num, x: str) -> str:
    return n.mul(n.add(_exp64(n, x), _exp64(n, n.neg(x))), n.c(0.5))


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


def _atan64(n: Num, x: str) -> str:
    """Cephes: |x| > tan(3pi/8) uses -1/x, |x| > 0.66 uses (x-1)/(x+1), then a rational function."""
    a = n.abs(x)
    big = n.cmp("ogt", a, n.c(2.41421356237309504880))
    mid = n.cmp("ogt", a, n.c(0.66))
    t = n.select(big, n.div(n.c(-1.0), a), n.select(mid, n.div(n.sub(a, n.c(1.0)), n.add(a, n.c(1.0))), a))
    y = n.select(big, n.c(math.pi / 2), n.select(mid, n.c(math.pi / 4), n.c(0.0)))
    z = n.mul(t, t)
    r = n.div(n.mul(z, n.poly(z, _ATAN_P)), n.poly(z, _ATAN_Q))
    return n.copysign(n.add(y, n.fma(t, r, t)), x)


def _atan2_64(n: Num, y: str, x: str) -> str:
    ay, ax = n.abs(y), n.abs(x)
    swap = n.cmp("ogt", ay, ax)
    low, high = n.select(swap, ax, ay), n.select(swap, ay, ax)
    q = n.div(low, high)
    q = n.select(n.cmp("oeq", high, n.c(0.0)), n.c(0.0), q)
    q = n.select(n.cmp("oeq", low, n.c(math.inf)), n.c(1.0), q)
    q = n.select(n.isnan(y), y, q)
    q = n.select(n.isnan(x), x, q)
    r = _atan64(n, q)
    r = n.abs(r)
    r = n.select(swap, n.sub(n.c(math.pi / 2), r), r)
    negative = n.fn.op(f"icmp slt {n.bits} {n.to_bits(x)}, {const(0, 'i64', n.lanes)}")
    r = n.select(negative, n.sub(n.c(math.pi), r), r)
    return n.copysign(r, y)


def _asin64(n: Num, x: str) -> str:
    return _atan2_64(n, x, n.unary("sqrt", n.mul(n.sub(n.c(1.0), x), n.add(n.c(1.0), x))))


def _acos64(n: Num, x: str) -> str:
    return _atan2_64(n, n.unary("sqrt", n.mul(n.sub(n.c(1.0), x), n.add(n.c(1.0), x))), x)


def _asinh64(n: Num, x: str) -> str:
    a = n.abs(x)
    z = n.mul(a, a)
    root = n.unary("sqrt", n.add(z, n.c(1.0)))
    r = _log1p64(n, n.add(a, n.div(z, n.add(n.c(1.0), root))))
    r = n.select(n.cmp("oeq", a, n.c(math.inf)), a, r)
    return n.copysign(r, x)


def _acosh64(n: Num, x: str) -> str:
    t = n.sub(x, n.c(1.0))
    r = _log1p64(n, n.add(t, n.unary("sqrt", n.mul(t, n.add(x, n.c(1.0))))))
    return n.select(n.cmp("olt", x, n.c(1.0)), n.c(math.nan), r)


def _atanh64(n: Num, x: str) -> str:
    a = n.abs(x)
    r = n.mul(_log1p64(n, n.div(n.mul(a, n.c(2.0)), n.sub(n.c(1.0), a))), n.c(0.5))
    r = n.select(n.cmp("ogt", a, n.c(1.0)), n.c(math.nan), r)
    return n.copysign(r, x)


def _cbrt64(n: Num, x: str) -> str:
    return n.copysign(_exp64(n, n.mul(_log64(n, n.abs(x)), n.c(1.0 / 3.0))), x)


def _sincos64(n: Num, x: str) -> tuple[str, str]:
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


def _pow64(n: Num, x: str, y: str) -> str:
    """|x|**y by exp(y ln|x|), then IEEE 754 ``pow``'s special cases (for float32 results)."""
    r = _exp64(n, n.mul(_log64(n, n.abs(x)), y))
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


_WIDE: dict[str, Callable[..., str]] = {
    "exp2": lambda n, x: _exp64(n, n.mul(x, n.c(math.log(2.0)))),
    "expm1": _expm1_64,
    "log2": lambda n, x: n.mul(_log64(n, x), n.c(1.0 / math.log(2.0))),
    "log10": lambda n, x: n.mul(_log64(n, x), n.c(1.0 / math.log(10.0))),
    "log1p": _log1p64,
    "sinh": _sinh64,
    "cosh": _cosh64,
    "arcsin": _asin64,
    "arccos": _acos64,
    "arctan": _atan64,
    "arctan2": _atan2_64,
    "arcsinh": _asinh64,
    "arccosh": _acosh64,
    "arctanh": _atanh64,
    "cbrt": _cbrt64,
    "pow": _pow64,
    "sin": lambda n, x: _sincos64(n, x)[0],
    "cos": lambda n, x: _sincos64(n, x)[1],
    "tan": lambda n, x: (lambda sc: n.div(sc[0], sc[1]))(_sincos64(n, x)),
}
_INLINE32: dict[str, Callable[[Num, str], str]] = {
    "exp": _exp32,
    "log": _log32,
    "tanh": _tanh32,
    "erf": _erf32,
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


def _per_lane(fn: Fn, symbol: str, ty: str, lanes: int, args: Sequence[str], via: str = "") -> str:
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
            inner.set(narrow.full, _per_lane(inner, name, "float", lanes, ["%x0"], via="double"), slot)
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


def _function(fn: Fn, name: str, ty: str, lanes: int, args: Sequence[str]) -> str:
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
        return _shared(fn, "exp", ty, lanes, args, lambda f: _exp64(Num(f, ty, lanes), "%x0"))
    if name == "log":
        return _shared(fn, "log", ty, lanes, args, lambda f: _log64(Num(f, ty, lanes), "%x0"))
    return _per_lane(fn, _LIBM.get(name, name), ty, lanes, args)


FUNCTIONS = frozenset(_WIDE) | frozenset(_INLINE32) | {"sqrt", "rsqrt"}


# -- integers -----------------------------------------------------------------------------------------------------------
def _int_divide(fn: Fn, op: str, ty: str, lanes: int, signed: bool, a: str, b: str) -> str:
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


def _float_divide(fn: Fn, op: str, ty: str, lanes: int, a: str, b: str) -> str:
    """NumPy's divmod for floats (npy_divmod); fmod is C's."""
    n = Num(fn, ty, lanes)
    name = "fmodf" if ty == "float" else "fmod"
    rest = _per_lane(fn, name, ty, lanes, [a, b])
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


def _int_pow(fn: Fn, ty: str, lanes: int, signed: bool, a: str, b: str) -> str:
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
        return _per_lane(fn, symbol, ty, lanes, [a, b])
    # for a in {1, -1} the low bit of b decides, negative or not
    unit = n.logic("or", n.cmp("eq", a, n.c(1)), n.cmp("eq", a, n.c(-1)))
    negative = n.cmp("slt", b, n.c(0))
    low = n._two("and", b, n.c(1))
    power = n.select(negative, low, b)
    whole = _per_lane(fn, symbol, ty, lanes, [a, power])
    return n.select(n.logic("and", negative, n.logic("xor", unit, const(True, "i1", lanes))), n.c(0), whole)


def _shift(fn: Fn, op: str, ty: str, lanes: int, signed: bool, a: str, b: str) -> str:
    n = Num(fn, ty, lanes)
    width = type_bytes(ty) * 8
    fits = n.cmp("ult", b, n.c(width))
    safe = n.select(fits, b, n.c(0))
    if op == "left_shift":
        return n.select(fits, n._two("shl", a, safe), n.c(0))
    if not signed:
        return n.select(fits, n._two("lshr", a, safe), n.c(0))
    return n.select(fits, n._two("ashr", a, safe), n._two("ashr", a, n.c(width - 1)))


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
        half = fn.op(f"fptrunc {fb} {single} to {vec('half', lanes)}")
        return fn.op(f"fpext {vec('half', lanes)} {half} to {fb}")
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
            return _float_divide(fn, op, ty, lanes, args[0], args[1])
        if ty == "i1":
            wide8 = [fn.op(f"zext {n.full} {a} to {vec('i8', lanes)}") for a in args]
            out8 = _int_divide(fn, op, "i8", lanes, False, *wide8)
            return fn.op(f"trunc {vec('i8', lanes)} {out8} to {n.full}") if dst.kind == "b" else out8
        return _int_divide(fn, op, ty, lanes, signed, args[0], args[1])
    if op == "pow" and not floating:
        return _int_pow(fn, ty, lanes, signed, args[0], args[1])
    if op in ("bitwise_and", "bitwise_or", "bitwise_xor", "logical_and", "logical_or", "logical_xor"):
        return n._two(op.rsplit("_", 1)[1], args[0], args[1])
    if op in ("left_shift", "right_shift"):
        return _shift(fn, op, ty, lanes, signed, args[0], args[1])
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
        return _int_divide(fn, "fmod" if first.kind == "b" else "floordiv", n.ty, lanes, False, n.c(1), x)
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
            return _exp32(n, x, "below")
        return _function(fn, op, n.ty, lanes, args)
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


# -- horizontal reductions ------------------------------------------------------------------------------------------------
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
]
_ = intrinsic_suffix
