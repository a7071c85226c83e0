"""exp, log, tanh and erf in float32, within 2 ulp (Cephes, S. Moshier, and own minimax fits). Used by ``functions.py``."""

from __future__ import annotations

import math

from tracejit_cpu.num import Num

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


def exp32(n: Num, x: str, span: str = "any") -> str:
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


def log32(n: Num, x: str) -> str:
    """ln x: the mantissa in [sqrt(1/2), sqrt(2)) by a polynomial, the exponent times ln2 in two parts."""
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


def tanh32(n: Num, x: str) -> str:
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


def erf32(n: Num, x: str) -> str:
    """erf x: an odd polynomial up to 1, above that 1 - exp(-x*x) times a polynomial."""
    a = n.abs(x)
    small = n.fma(n.poly(n.mul(x, x), _ERF_LOW), x, x)
    ac = n.select(n.cmp("ogt", a, n.c(4.0)), n.c(4.0), a)
    e = exp32(n, n.neg(n.mul(ac, ac)), "safe")
    tail = n.mul(e, n.poly(n.sub(ac, n.c(2.5)), _ERF_HIGH))
    big = n.sub(n.c(1.0), tail)
    return n.copysign(n.select(n.cmp("ult", a, n.c(1.0)), small, big), x)
