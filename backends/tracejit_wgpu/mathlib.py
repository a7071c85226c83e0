"""The WGSL function library: accurate f32 math, NaN-aware helpers, integer semantics of NumPy, Threefry.

``LIBRARY`` maps a name to (source, names it calls). Used through :class:`tracejit_wgpu.wgsl.Helpers`. Vulkan allows
built-in exp, log, sin and friends large errors (sin: 2^-11 absolute), hence polynomials after Cephes (S. L. Moshier)
and, for erf, N. Juffa. Loops and rows are bound by memory, so the extra arithmetic costs nothing measurable.
"""

from __future__ import annotations

LIBRARY: dict[str, tuple[str, tuple[str, ...]]] = {}


def _add(name: str, code: str, *needs: str) -> None:
    LIBRARY[name] = (code.strip(), needs)


_add("isnan_", "fn isnan_(x: f32) -> bool { return (bitcast<u32>(x) & 0x7fffffffu) > 0x7f800000u; }")
_add("isinf_", "fn isinf_(x: f32) -> bool { return (bitcast<u32>(x) & 0x7fffffffu) == 0x7f800000u; }")
_add("isfinite_", "fn isfinite_(x: f32) -> bool { return (bitcast<u32>(x) & 0x7f800000u) != 0x7f800000u; }")
_add("nanf", "fn nanf() -> f32 { return bitcast<f32>(nan_bits); }")
_add("inff", "fn inff() -> f32 { return bitcast<f32>(inf_bits); }")
# A driver may take a >= b for !(a < b): both operands are tested on bits.
_add(
    "nmax",
    "fn nmax(a: f32, b: f32) -> f32 { return select(select(max(a, b), b, isnan_(b)), a, isnan_(a)); }",
    "isnan_",
)
_add(
    "nmin",
    "fn nmin(a: f32, b: f32) -> f32 { return select(select(min(a, b), b, isnan_(b)), a, isnan_(a)); }",
    "isnan_",
)
_add("sign_", "fn sign_(x: f32) -> f32 { return select(sign(x), x, isnan_(x)); }", "isnan_")
_add(
    "copysign_",
    "fn copysign_(x: f32, s: f32) -> f32 {"
    " return bitcast<f32>((bitcast<u32>(x) & 0x7fffffffu) | (bitcast<u32>(s) & 0x80000000u)); }",
)
_add("f2u", "fn f2u(x: f32) -> u32 { return select(u32(x), bitcast<u32>(i32(x)), x < 0.0f); }")
# Drivers fold x * 0, x / 0, 0 / x, x - x and x / x of a literal zero or one value as if there were no NaN and infinity.
_add(
    "self_div_",
    "fn self_div_(x: f32) -> f32 { let a = bitcast<u32>(x) & 0x7fffffffu;"
    " return bitcast<f32>(select(0x3f800000u, 0x7fc00000u, a == 0u || a >= 0x7f800000u)); }",
)
_add(
    "mul0_",
    "fn mul0_(x: f32, z: u32) -> f32 { let b = bitcast<u32>(x);"
    " return bitcast<f32>(select((b ^ z) & 0x80000000u, 0x7fc00000u, (b & 0x7f800000u) == 0x7f800000u)); }",
)
_add(
    "div0_",
    "fn div0_(x: f32, z: u32) -> f32 { let b = bitcast<u32>(x); let a = b & 0x7fffffffu;"
    " return bitcast<f32>(select(((b ^ z) & 0x80000000u) | 0x7f800000u, 0x7fc00000u, a == 0u || a > 0x7f800000u)); }",
)
_add(
    "zero_over_",
    "fn zero_over_(x: f32, z: u32) -> f32 { let b = bitcast<u32>(x); let a = b & 0x7fffffffu;"
    " return bitcast<f32>(select((b ^ z) & 0x80000000u, 0x7fc00000u, a == 0u || a > 0x7f800000u)); }",
)
_add(
    "self_sub_",
    "fn self_sub_(x: f32) -> f32 {"
    " return bitcast<f32>(select(0u, 0x7fc00000u, (bitcast<u32>(x) & 0x7f800000u) == 0x7f800000u)); }",
)
_add(
    "round16",
    """
fn round16_(x: f32) -> f32 { // to nearest even, on bits: drivers fold (x + big) - big and f32(f16(x))
 let b = bitcast<u32>(x); let a = b & 0x7fffffffu; let s = b & 0x80000000u;
 if (a >= 0x477ff000u) { return bitcast<f32>(select(s | 0x7f800000u, b, a > 0x7f800000u)); } // 65520 and more: infinity
 if (a < 0x38800000u) { // subnormal: multiples of 2^-24
  return bitcast<f32>(s | bitcast<u32>(round(bitcast<f32>(a) * 16777216.0f) * 5.9604644775390625e-8f));
 }
 return bitcast<f32>(s | ((a + 0xfffu + ((a >> 13u) & 1u)) & 0xffffe000u));
}""",
)
# ---------------------------------------------------------------- exponentials and logarithms
_add(
    "exp_poly",
    """
fn exp_poly(r: f32, n: f32) -> f32 { // 2^n * e^r, |r| <= 0.35
 var p = fma(r, 1.9875691500e-4f, 1.3981999507e-3f);
 p = fma(p, r, 8.3334519073e-3f); p = fma(p, r, 4.1665795894e-2f);
 p = fma(p, r, 1.6666665459e-1f); p = fma(p, r, 5.0000001201e-1f);
 p = fma(p, r * r, r) + 1.0f;
 let i = i32(n); let h = i / 2i;
 return p * bitcast<f32>((h + 127i) << 23u) * bitcast<f32>((i - h + 127i) << 23u);
}""",
)
_add(
    "exp_",
    """
fn exp_(x: f32) -> f32 {
 let c = clamp(select(x, 0.0f, isnan_(x)), -110.0f, 95.0f);
 let n = round(c * 1.44269504f);
 let r = (c - n * 0.693359375f) - n * -2.12194440e-4f;
 return select(exp_poly(r, n), x, isnan_(x));
}""",
    "isnan_",
    "exp_poly",
)
_add(
    "exp2_",
    """
fn exp2_(x: f32) -> f32 {
 let c = clamp(select(x, 0.0f, isnan_(x)), -155.0f, 135.0f);
 let n = round(c);
 return select(exp_poly((c - n) * 0.693147181f, n), x, isnan_(x));
}""",
    "isnan_",
    "exp_poly",
)
_add(
    "expm1_",
    """
fn expm1_(x: f32) -> f32 { // Kahan's correction of exp(x) - 1; a series where that loses digits
 if (isnan_(x)) { return x; }
 if (abs(x) < 0.5f) {
  var p = fma(x, 1.98412698e-4f, 1.38888889e-3f); p = fma(p, x, 8.33333333e-3f); p = fma(p, x, 4.16666667e-2f);
  p = fma(p, x, 1.66666667e-1f); p = fma(p, x, 0.5f);
  return fma(p, x * x, x);
 }
 return exp_(x) - 1.0f;
}""",
    "exp_",
)
_add(
    "log_parts",
    """
fn log_poly(f: f32) -> f32 { // log(1 + f), sqrt(1/2) <= 1 + f < sqrt(2)
 let z = f * f;
 var p = fma(f, 7.0376836292e-2f, -1.1514610310e-1f);
 p = fma(p, f, 1.1676998740e-1f); p = fma(p, f, -1.2420140846e-1f); p = fma(p, f, 1.4249322787e-1f);
 p = fma(p, f, -1.6668057665e-1f); p = fma(p, f, 2.0000714765e-1f); p = fma(p, f, -2.4999993993e-1f);
 p = fma(p, f, 3.3333331174e-1f);
 return f + (f * z * p - 0.5f * z);
}
fn log_parts(x: f32) -> vec2<f32> { // (e, log(m)) with x = 2^e m, sqrt(1/2) <= m < sqrt(2); x finite and > 0
 var y = x; var e = 0.0f;
 if (y < 1.17549435e-38f) { y = y * 16777216.0f; e = -24.0f; }
 let b = bitcast<u32>(y);
 var k = i32(b >> 23u) - 126i;
 var m = bitcast<f32>((b & 0x007fffffu) | 0x3f000000u);
 if (m < 0.70710678f) { m = m + m; k = k - 1i; }
 return vec2<f32>(e + f32(k), log_poly(m - 1.0f));
}""",
)
_add(
    "log_special",
    """
fn log_special(x: f32, y: f32) -> f32 { // y for x > 0 and finite, else -inf, nan or x
 if (x == 0.0f) { return bitcast<f32>(ninf_bits); }
 if (x < 0.0f) { return bitcast<f32>(nan_bits); }
 return select(x, y, isfinite_(x));
}""",
    "isfinite_",
)
_add(
    "log_",
    """
fn log_(x: f32) -> f32 { let p = log_parts(x);
 return log_special(x, (p.y + p.x * -2.12194440e-4f) + p.x * 0.693359375f); }""",
    "log_parts",
    "log_special",
)
_add(
    "log2_",
    "fn log2_(x: f32) -> f32 { let p = log_parts(x); return log_special(x, fma(p.y, 1.44269504f, p.x)); }",
    "log_parts",
    "log_special",
)
_add(
    "log10_",
    """
fn log10_(x: f32) -> f32 { let p = log_parts(x);
 return log_special(x, (p.y * 0.434294482f + p.x * 2.48745664e-4f) + p.x * 0.30078125f); }""",
    "log_parts",
    "log_special",
)
_add(
    "log1p_",
    """
fn log1p_(x: f32) -> f32 { // the polynomial takes 1 + x without rounding it; (1 + x) - 1 would be optimised away
 if (x > -0.29f && x < 0.41f) { return select(log_poly(x), x, x == 0.0f); }
 return log_(1.0f + x);
}""",
    "log_",
)
_add(
    "pow_pos",
    """
fn pow_pos(x: f32, y: f32) -> f32 { // x > 0 finite, y finite: 2^(y log2 x), the large part of the exponent kept exact
 let p = log_parts(x);
 let a = y * p.x; let la = fma(y, p.x, -a); let q = p.y * 1.44269504f; let b = y * q;
 let s = a + b;
 if (s >= 136.0f) { return bitcast<f32>(inf_bits); }
 if (s <= -156.0f) { return 0.0f; }
 let n = round(s); let r = ((a - n) + b) + la;
 return exp_poly(r * 0.693147181f, n);
}""",
    "log_parts",
    "exp_poly",
)
_add(
    "pow_",
    """
fn pow_(x: f32, y: f32) -> f32 {
 if (y == 0.0f || x == 1.0f) { return 1.0f; }
 if (isnan_(x) || isnan_(y)) { return bitcast<f32>(nan_bits); }
 if (y == 1.0f) { return x; }
 if (y == 2.0f) { return x * x; }
 if (y == 3.0f) { return x * x * x; }
 if (y == 0.5f && x >= 0.0f) { return sqrt(x); }
 if (y == -1.0f) { return 1.0f / x; }
 let ax = abs(x); let ay = abs(y);
 let whole = trunc(ay) == ay || ay >= 16777216.0f;
 let odd = whole && ay < 16777216.0f && (u32(ay) & 1u) == 1u;
 var r: f32;
 if (isinf_(y)) { r = select(select(0.0f, bitcast<f32>(inf_bits), (ax > 1.0f) == (y > 0.0f)), 1.0f, ax == 1.0f); return r; }
 if (ax == 0.0f || isinf_(ax)) { r = select(0.0f, bitcast<f32>(inf_bits), (ax == 0.0f) == (y < 0.0f)); }
 else { r = pow_pos(ax, y); }
 if ((bitcast<u32>(x) >> 31u) == 1u) {
  if (odd) { return -r; }
  if (!whole && ax != 0.0f && !isinf_(ax)) { return bitcast<f32>(nan_bits); }
 }
 return r;
}""",
    "isnan_",
    "isinf_",
    "pow_pos",
)
_add(
    "cbrt_",
    """
fn cbrt_(x: f32) -> f32 {
 if (x == 0.0f || !isfinite_(x)) { return x; }
 let a = abs(x); var y = pow_pos(a, 0.333333343f);
 y = y - (y - a / (y * y)) * 0.333333343f;
 return copysign_(y, x);
}""",
    "isfinite_",
    "pow_pos",
    "copysign_",
)
# ---------------------------------------------------------------- trigonometric
_add(
    "trig_reduce",
    """
fn mul_hi(a: u32, b: u32) -> u32 {
 let al = a & 0xffffu; let ah = a >> 16u; let bl = b & 0xffffu; let bh = b >> 16u;
 let m = ah * bl + ((al * bl) >> 16u); let k = al * bh + (m & 0xffffu);
 return ah * bh + (m >> 16u) + (k >> 16u);
}
var<private> two_over_pi: array<u32, 8> = array<u32, 8>(0u, 0xa2f9836eu,
  0x4e441529u, 0xfc2757d1u, 0xf534ddc0u, 0xdb629599u, 0x3c439041u, 0xfe5163abu);
fn trig_reduce(x: f32) -> vec2<f32> { // (r, quadrant) with x = r + quadrant * pi/2, |r| <= pi/4; x finite
 let a = abs(x); var n: f32; var r: f32;
 if (a < 4096.0f) {
  n = round(a * 0.636619772f);
  r = ((a - n * 1.5703125f) - n * 4.837512969970703125e-4f) - n * 7.54978995489188216e-8f;
 } else { // Payne and Hanek: the fraction of a * 2/pi from the bits of 2/pi that matter
  let b = bitcast<u32>(a); let e = (b >> 23u) - 127u; let m = (b & 0x7fffffu) | 0x800000u;
  let s = e + 7u; let w = s >> 5u; let t = s & 31u; // a = m 2^(e-23); word 0 holds 32 bits left of the point
  var p0 = two_over_pi[w]; var p1 = two_over_pi[w + 1u]; var p2 = two_over_pi[w + 2u]; let p3 = two_over_pi[w + 3u];
  if (t > 0u) { p0 = (p0 << t) | (p1 >> (32u - t)); p1 = (p1 << t) | (p2 >> (32u - t)); p2 = (p2 << t) | (p3 >> (32u - t)); }
  // product m * (p0 p1 p2), modulo 2^96: integer part in the top bits
  let l2 = m * p2; let h2 = mul_hi(m, p2); let l1 = m * p1; let h1 = mul_hi(m, p1);
  let w1 = l1 + h2; let c1 = select(0u, 1u, w1 < l1);
  let w0 = m * p0 + h1 + c1;
  n = f32(w0 >> 30u);
  var hi = (w0 << 2u) | (w1 >> 30u); var lo = (w1 << 2u) | (l2 >> 30u);
  let neg = (hi >> 31u) == 1u;
  if (neg) { n = n + 1.0f; lo = ~lo + 1u; hi = ~hi + select(0u, 1u, lo == 0u); }
  r = (f32(hi) * 2.3283064365386963e-10f + f32(lo) * 5.421010862427522e-20f) * 1.57079633f;
  if (neg) { r = -r; }
 }
 let q = f32(u32(n) & 3u);
 return vec2<f32>(r, q);
}
fn sin_poly(r: f32) -> f32 { let z = r * r; return fma(fma(fma(-1.9515295891e-4f,
  z, 8.3321608736e-3f), z, -1.6666654611e-1f), z * r, r); }
fn cos_poly(r: f32) -> f32 { let z = r * r; return fma(fma(fma(2.443315711809948e-5f,
  z, -1.388731625493765e-3f), z, 4.166664568298827e-2f), z * z, 1.0f - 0.5f * z); }
fn trig_(x: f32, shift: u32, neg: bool) -> f32 { // sin(|x| + shift pi/2), negated on request
 if (!isfinite_(x)) { return bitcast<f32>(nan_bits); }
 let p = trig_reduce(x); let q = u32(p.y) + shift;
 let v = select(sin_poly(p.x), cos_poly(p.x), (q & 1u) == 1u);
 return select(v, -v, ((q & 2u) == 2u) != neg);
}""",
    "isfinite_",
)
_add("sin_", "fn sin_(x: f32) -> f32 { return select(trig_(x, 0u, x < 0.0f), x, x == 0.0f); }", "trig_reduce")
_add("cos_", "fn cos_(x: f32) -> f32 { return trig_(x, 1u, false); }", "trig_reduce")
_add("tan_", "fn tan_(x: f32) -> f32 { return select(sin_(x) / cos_(x), x, x == 0.0f); }", "sin_", "cos_")
_add(
    "asin_core",
    """
fn asin_core(a: f32) -> f32 { // 0 <= a <= 1/2
 let z = a * a;
 var p = fma(4.2163199048e-2f, z, 2.4181311049e-2f); p = fma(p, z, 4.5470025998e-2f);
 p = fma(p, z, 7.4953002686e-2f); p = fma(p, z, 1.6666752422e-1f);
 return fma(p * z, a, a);
}""",
)
_add(
    "asin_",
    """
fn asin_(x: f32) -> f32 { let a = abs(x);
 if (!(a <= 1.0f)) { return bitcast<f32>(nan_bits); }
 if (a <= 0.5f) { return copysign_(asin_core(a), x); }
 return copysign_(1.57079633f - 2.0f * asin_core(sqrt(0.5f * (1.0f - a))), x); }""",
    "asin_core",
    "copysign_",
)
_add(
    "acos_",
    """
fn acos_(x: f32) -> f32 { let a = abs(x);
 if (!(a <= 1.0f)) { return bitcast<f32>(nan_bits); }
 if (a <= 0.5f) { return 1.57079633f - (copysign_(asin_core(a), x) - -4.37113883e-8f); }
 let h = 2.0f * asin_core(sqrt(0.5f * (1.0f - a)));
 return select(h, 3.14159265f - h, x < 0.0f); }""",
    "asin_core",
    "copysign_",
)
_add(
    "atan_",
    """
fn atan_(x: f32) -> f32 {
 if (isnan_(x)) { return x; }
 var a = abs(x); var y = 0.0f;
 if (a > 2.414213562f) { y = 1.57079633f; a = -1.0f / a; }
 else if (a > 0.4142135624f) { y = 0.785398163f; a = (a - 1.0f) / (a + 1.0f); }
 let z = a * a;
 var p = fma(8.05374449538e-2f, z, -1.38776856032e-1f); p = fma(p, z, 1.99777106478e-1f); p = fma(p, z, -3.33329491539e-1f);
 return copysign_(y + fma(p * z, a, a), x);
}""",
    "isnan_",
    "copysign_",
)
_add(
    "atan2_",
    """
fn atan2_(y: f32, x: f32) -> f32 {
 if (isnan_(x) || isnan_(y)) { return bitcast<f32>(nan_bits); }
 let ax = abs(x); let ay = abs(y); var r: f32;
 if (ay == 0.0f) { r = 0.0f; }
 else if (isinf_(ax) && isinf_(ay)) { r = 0.785398163f; }
 else if (ay > ax) { r = 1.57079633f - atan_(ax / ay); }
 else { r = atan_(ay / ax); }
 if ((bitcast<u32>(x) >> 31u) == 1u) { r = 3.14159265f - r; }
 return copysign_(r, y);
}""",
    "isnan_",
    "isinf_",
    "atan_",
    "copysign_",
)
# ---------------------------------------------------------------- hyperbolic and erf
_add(
    "tanh_",
    """
fn tanh_(x: f32) -> f32 {
 let a = abs(x); let z = x * x;
 var p = fma(-5.70498872745e-3f, z, 2.06390887954e-2f); p = fma(p, z, -5.37397155531e-2f);
 p = fma(p, z, 1.33314422036e-1f); p = fma(p, z, -3.33332819422e-1f);
 let small = fma(p * z, x, x);
 // 1 - 2 / (e^2a + 1), where an error of a few ulp in e^2a shrinks below one: a plain 2^y will do
 let y = min(a, 20.0f) * 2.885390082f; let n = round(y); let f = y - n;
 var e = fma(1.5252734e-5f, f, 1.54035304e-4f); e = fma(e, f, 1.33335581e-3f); e = fma(e, f, 9.61812911e-3f);
 e = fma(e, f, 5.55041087e-2f); e = fma(e, f, 2.40226507e-1f); e = fma(e, f, 6.93147181e-1f); e = fma(e, f, 1.0f);
 let t = 1.0f - 2.0f / (bitcast<f32>(bitcast<i32>(e) + (i32(n) << 23u)) + 1.0f);
 return copysign_(select(small, t, a >= 0.625f), x);
}""",
    "copysign_",
)
_add(
    "sinh_",
    """
fn sinh_(x: f32) -> f32 { let a = abs(x);
 if (a < 20.0f) { let m = expm1_(a); return copysign_(0.5f * (m + m / (m + 1.0f)), x); }
 let h = exp_(0.5f * a); return copysign_(0.5f * h * h, x); }""",
    "expm1_",
    "copysign_",
)
_add(
    "cosh_",
    "fn cosh_(x: f32) -> f32 { let h = exp_(0.5f * abs(x)); let i = 1.0f / h; return 0.5f * h * h + 0.5f * i * i; }",
    "exp_",
)
_add(
    "asinh_",
    """
fn asinh_(x: f32) -> f32 { let a = abs(x);
 if (!(a < 1.0e9f)) { return copysign_(log_(a) + 0.693147181f, x); }
 return copysign_(log1p_(a + a * a / (1.0f + sqrt(fma(a, a, 1.0f)))), x); }""",
    "log_",
    "log1p_",
    "copysign_",
)
_add(
    "acosh_",
    """
fn acosh_(x: f32) -> f32 { if (!(x >= 1.0f)) { return bitcast<f32>(nan_bits); }
 if (x > 1.0e9f) { return log_(x) + 0.693147181f; }
 let t = x - 1.0f; return log1p_(t + sqrt(2.0f * t + t * t)); }""",
    "log_",
    "log1p_",
)
_add(
    "atanh_",
    """
fn atanh_(x: f32) -> f32 { let a = abs(x);
 if (!(a <= 1.0f)) { return bitcast<f32>(nan_bits); }
 if (a == 1.0f) { return copysign_(bitcast<f32>(inf_bits), x); }
 return copysign_(0.5f * log1p_(2.0f * a / (1.0f - a)), x); }""",
    "log1p_",
    "copysign_",
)
_add(
    "erf_",
    """
fn erf_(x: f32) -> f32 { // N. Juffa, about 1 ulp
 if (isnan_(x)) { return x; }
 let t = min(abs(x), 10.0f); let s = t * t;
 if (t > 0.927734375f) {
  var r = fma(-1.72853470e-5f, t, 3.83197126e-4f); let u = fma(-3.88396438e-3f, t, 2.42546219e-2f);
  r = fma(r, s, u); r = fma(r, t, -1.06777847e-1f); r = fma(r, t, -6.34846687e-1f);
  r = fma(r, t, -1.28717512e-1f); r = fma(r, t, -t);
  return copysign_(1.0f - exp_(r), x);
 }
 var r = -5.96761703e-4f; r = fma(r, s, 4.99119423e-3f); r = fma(r, s, -2.67681349e-2f);
 r = fma(r, s, 1.12819925e-1f); r = fma(r, s, -3.76125336e-1f); r = fma(r, s, 1.28379166e-1f);
 return fma(r, x, x);
}""",
    "isnan_",
    "exp_",
    "copysign_",
)
# ---------------------------------------------------------------- division
_add(
    "fmod_",
    """
fn fmod_(a: f32, b: f32) -> f32 { // exact: shift and subtract, as the C function
 if (isnan_(a) || isnan_(b) || isinf_(a) || b == 0.0f) { return bitcast<f32>(nan_bits); }
 var r = abs(a); let y = abs(b);
 if (isinf_(b) || r < y) { return a; }
 var e = i32(bitcast<u32>(r) >> 23u) - i32(bitcast<u32>(y) >> 23u);
 while (e >= 0i) {
  let t = ldexp(y, e);
  if (r >= t) { r = r - t; }
  e = e - 1i;
 }
 return copysign_(r, a);
}""",
    "isnan_",
    "isinf_",
    "copysign_",
)
_add(
    "mod_",
    """
fn mod_(a: f32, b: f32) -> f32 {
 let r = fmod_(a, b);
 if (r == 0.0f) { return copysign_(0.0f, b); }
 return select(r, r + b, (r < 0.0f) != (b < 0.0f) && !isnan_(r));
}""",
    "fmod_",
)
_add(
    "floordiv_",
    """
fn floordiv_(a: f32, b: f32) -> f32 {
 if (b == 0.0f) { return a / b; }
 if (isinf_(b) && !isinf_(a) && !isnan_(a)) {
  return select(copysign_(0.0f, a) * sign(b), -1.0f, a != 0.0f && (a < 0.0f) != (b < 0.0f)); }
 let d = (a - mod_(a, b)) / b; let f = floor(d);
 if (d == 0.0f) { return copysign_(0.0f, a / b); }
 return select(f, f + 1.0f, d - f > 0.5f);
}""",
    "mod_",
)
# Vulkan leaves the remainder of negative operands undefined (NVIDIA's is another), so signed division works on magnitudes.
_PARTS = (
    " let x = bitcast<u32>(abs(a)); let d = select(bitcast<u32>(abs(b)), 1u, b == 0i); let q = x / d; let r = x - q * d;"
    " let apart = (a < 0i) != (b < 0i);"
)
for _name, _size, _negative in (
    ("floordiv_i", "q + select(0u, 1u, apart && r != 0u)", "apart"),
    ("mod_i", "select(r, d - r, apart && r != 0u)", "b < 0i"),
    ("fmod_i", "r", "a < 0i"),
):
    _add(
        _name,
        f"fn {_name}(a: i32, b: i32) -> i32 {{{_PARTS} let m = {_size};"
        f" return select(bitcast<i32>(select(m, 0u - m, {_negative})), 0i, b == 0i); }}",
    )
for _name, _size in (("floordiv_u", "a / d"), ("mod_u", "a % d"), ("fmod_u", "a % d")):
    _add(
        _name,
        f"fn {_name}(a: u32, b: u32) -> u32 {{ let d = select(b, 1u, b == 0u); return select({_size}, 0u, b == 0u); }}",
    )
for _t, _w, _z in (("i", "i32", "0i"), ("u", "u32", "0u")):
    _signed = _t == "i"
    _add(
        f"pow_{_t}",
        f"""
fn pow_{_t}(a: {_w}, b: {_w}) -> {_w} {{ var r = 1{_t}; var x = a; var n = u32(b);
 {"if (b < 0i) { return select(select(0i, select(-1i, 1i, (n & 1u) == 0u), a == -1i), 1i, a == 1i); }" if _signed else ""}
 while (n != 0u) {{ if ((n & 1u) == 1u) {{ r = r * x; }} x = x * x; n = n >> 1u; }} return r; }}""",
    )
    _far = f"select({_z}, -1i, a < 0i)" if _signed else _z
    _add(
        f"left_shift_{_t}",
        f"fn left_shift_{_t}(a: {_w}, b: {_w}) -> {_w} {{ return select(a << (u32(b) & 31u), {_z}, u32(b) > 31u); }}",
    )
    _add(
        f"right_shift_{_t}",
        f"fn right_shift_{_t}(a: {_w}, b: {_w}) -> {_w} {{ return select(a >> (u32(b) & 31u), {_far}, u32(b) > 31u); }}",
    )
# ---------------------------------------------------------------- order-preserving keys (sort, max over subgroups)
_add(
    "fkey",
    """
fn fkey(x: f32) -> u32 { // unsigned order = order of floats; every NaN above +inf
 let b = select(bitcast<u32>(x), 0x7fc00000u, isnan_(x));
 return b ^ select(0x80000000u, 0xffffffffu, (b >> 31u) == 1u); }
fn funkey(k: u32) -> f32 { return bitcast<f32>(k ^ select(0xffffffffu, 0x80000000u, (k >> 31u) == 1u)); }""",
    "isnan_",
)
# ---------------------------------------------------------------- Threefry-2x32-20 (Salmon et al., SC11)
_add(
    "threefry",
    """
fn rotl(x: u32, r: u32) -> u32 { return (x << r) | (x >> (32u - r)); }
fn threefry(k0: u32, k1: u32, c0: u32, c1: u32) -> vec2<u32> {
 let k2 = k0 ^ k1 ^ 0x1bd11bdau; var a = c0 + k0; var b = c1 + k1;
 """
    + "".join(
        "".join(
            f"a += b; b = rotl(b, {r}u) ^ a; " for r in ((13, 15, 26, 6) if i % 2 == 0 else (17, 29, 16, 24))
        )
        + f"a += {('k1', 'k2', 'k0')[i % 3]}; b += {('k2', 'k0', 'k1')[i % 3]} + {i + 1}u;\n "
        for i in range(5)
    )
    + "return vec2<u32>(a, b);\n}",
)
