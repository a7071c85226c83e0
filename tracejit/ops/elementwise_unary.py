"""Elementwise primitives of one operand: shape rule, NumPy reference, gradient, meaning.

Imported through ``ops.elementwise``; used by ``functions.elementwise``, gradient rules and composites.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tracejit.dtypes import BOOL, DType, canonical
from tracejit.ops import rules
from tracejit.ops.erf import erf as _erf_reference
from tracejit.ops.registry import NONDIFFERENTIABLE, HasAval, Op, define

_LN2, _LN10 = math.log(2.0), math.log(10.0)


def _none(g: Any, y: Any, *inputs: Any, **attrs: Any) -> tuple[None, ...]:
    """The gradient rule of piecewise constant functions: nothing flows back."""
    return (None,) * len(inputs)


def _samples(
    kinds: str, low: float, high: float, values: Sequence[float] = ()
) -> Callable[[], list[tuple[tuple[np.ndarray, ...], dict[str, Any]]]]:
    def samples() -> list[tuple[tuple[np.ndarray, ...], dict[str, Any]]]:
        arrays: list[np.ndarray] = []
        if "f" in kinds:
            arrays += [rules.floats(s, low, high) for s in rules.SHAPES]
            arrays += [rules.floats((7,), low, high, d) for d in ("float32", "float16")]
            if values:
                arrays.append(np.array(values))
        if "i" in kinds:
            arrays += [rules.integers(s, -9, 9, "int32") for s in rules.SHAPES]
            arrays += [rules.integers((6,), -99, 99, "int64")]
        if "u" in kinds:
            arrays += [rules.integers((6,), 0, 99, "uint8")]
        if "b" in kinds:
            arrays += [rules.bools(s) for s in rules.SHAPES]
        return [((a,), {}) for a in arrays]

    return samples


def _unary(
    name: str,
    reference: Callable[[Any], Any],
    gradient: Callable[[Any, Any, Any], Any] | None,
    formula: str,
    meaning: str,
    grad_rule: str = "",
    *,
    kinds: str = "f",
    result: DType | None = None,
    domain: tuple[float, float] = (-2.0, 2.0),
    values: Sequence[float] = (),
) -> Op:
    """Define a unary elementwise op.

    ``gradient(g, y, x)`` is the cotangent of a float operand; None means a zero gradient. With ``result`` the op has
    that dtype and no gradient at all. ``domain`` bounds the samples, ``values`` are further ones.
    """

    def infer(x: HasAval) -> rules.Aval:
        rules.check_kind(name, kinds, x=x)
        return tuple(x.shape), result or x.dtype

    def vjp(g: Any, y: Any, x: Any) -> tuple[Any]:
        assert gradient is not None
        return (gradient(g, y, x) if rules.is_float(x) else None,)

    discrete = result is not None or "f" not in kinds
    return define(
        name,
        arity=1,
        infer=infer,
        reference=rules.quiet(reference),
        vjp=NONDIFFERENTIABLE if discrete else _none if gradient is None else vjp,
        category="elementwise",
        meaning=meaning,
        formula=formula,
        grad_rule=grad_rule or ("none" if discrete else "0"),
        samples=_samples(kinds, *domain, values),
        traits=("elementwise",),
    )


def _reciprocal(g: Any, y: Any, x: Any) -> Any:
    return -(g * y * y)


# -- arithmetic and rounding ---------------------------------------------------------------------------------

neg = _unary("neg", np.negative, lambda g, y, x: -g, "y = -x", "Negation.", "dx = -g", kinds="iuf")
abs_ = _unary(
    "abs",
    np.absolute,
    lambda g, y, x: g * sign(x),
    "y = |x|",
    "Absolute value; the most negative integer stays itself.",
    "dx = g·sign(x), 0 at 0",
    kinds="iuf",
)
sign: Op = _unary(
    "sign",
    np.sign,
    None,
    "y = -1, 0 or 1",
    "Sign of each element; NaN stays NaN.",
    kinds="iuf",
    values=(0.0, -0.0, np.nan),
)
floor = _unary("floor", np.floor, None, "y = ⌊x⌋", "Largest whole number not above x.")
ceil = _unary("ceil", np.ceil, None, "y = ⌈x⌉", "Smallest whole number not below x.")
rint = _unary(
    "rint",
    np.rint,
    None,
    "y = round(x)",
    "Nearest whole number, halves to the even one.",
    values=(0.5, 1.5, 2.5, -0.5),
)
trunc = _unary("trunc", np.trunc, None, "y = sign(x)·⌊|x|⌋", "Fraction cut off, towards zero.")
reciprocal = _unary(
    "reciprocal",
    np.reciprocal,
    _reciprocal,
    "y = 1/x",
    "Reciprocal.",
    "dx = -g·y²",
    domain=(0.5, 3.0),
    values=(-0.5, -2.0),
)
sqrt = _unary(
    "sqrt",
    np.sqrt,
    lambda g, y, x: g * 0.5 / y,
    "y = √x",
    "Square root; NaN below 0.",
    "dx = g / (2y)",
    domain=(0.1, 4.0),
)
rsqrt = _unary(
    "rsqrt",
    lambda x: np.reciprocal(np.sqrt(x)),
    lambda g, y, x: g * y / x * -0.5,
    "y = 1/√x",
    "Reciprocal square root.",
    "dx = -g·y / (2x)",
    domain=(0.1, 4.0),
)
cbrt = _unary(
    "cbrt",
    np.cbrt,
    lambda g, y, x: g / (y * y * 3.0),
    "y = ∛x",
    "Cube root, negative for negative x.",
    "dx = g / (3y²)",
    domain=(0.2, 4.0),
    values=(-1.0, -0.3),
)

# -- exponentials and logarithms -----------------------------------------------------------------------------

exp = _unary("exp", np.exp, lambda g, y, x: g * y, "y = eˣ", "Exponential function.", "dx = g·y")
exp2 = _unary("exp2", np.exp2, lambda g, y, x: g * y * _LN2, "y = 2ˣ", "Power of two.", "dx = g·y·ln 2")
expm1 = _unary(
    "expm1",
    np.expm1,
    lambda g, y, x: g * (y + 1.0),
    "y = eˣ - 1",
    "eˣ - 1, exact for small x.",
    "dx = g·(y + 1)",
)
log = _unary(
    "log",
    np.log,
    lambda g, y, x: g / x,
    "y = ln x",
    "Natural logarithm; NaN below 0.",
    "dx = g / x",
    domain=(0.1, 4.0),
)
log2 = _unary(
    "log2",
    np.log2,
    lambda g, y, x: g / (x * _LN2),
    "y = log₂ x",
    "Logarithm to base 2.",
    "dx = g / (x·ln 2)",
    domain=(0.1, 4.0),
)
log10 = _unary(
    "log10",
    np.log10,
    lambda g, y, x: g / (x * _LN10),
    "y = log₁₀ x",
    "Logarithm to base 10.",
    "dx = g / (x·ln 10)",
    domain=(0.1, 4.0),
)
log1p = _unary(
    "log1p",
    np.log1p,
    lambda g, y, x: g / (x + 1.0),
    "y = ln(1 + x)",
    "ln(1 + x), exact for small x.",
    "dx = g / (1 + x)",
    domain=(-0.8, 2.0),
)

# -- trigonometry --------------------------------------------------------------------------------------------

sin = _unary("sin", np.sin, lambda g, y, x: g * cos(x), "y = sin x", "Sine of radians.", "dx = g·cos x")
cos: Op = _unary(
    "cos", np.cos, lambda g, y, x: -(g * sin(x)), "y = cos x", "Cosine of radians.", "dx = -g·sin x"
)
tan = _unary(
    "tan",
    np.tan,
    lambda g, y, x: g * (y * y + 1.0),
    "y = tan x",
    "Tangent of radians.",
    "dx = g·(1 + y²)",
    domain=(-1.2, 1.2),
)
arcsin = _unary(
    "arcsin",
    np.arcsin,
    lambda g, y, x: g * rsqrt(1.0 - x * x),
    "y = arcsin x",
    "Inverse sine, in [-π/2, π/2].",
    "dx = g / √(1 - x²)",
    domain=(-0.9, 0.9),
)
arccos = _unary(
    "arccos",
    np.arccos,
    lambda g, y, x: -(g * rsqrt(1.0 - x * x)),
    "y = arccos x",
    "Inverse cosine, in [0, π].",
    "dx = -g / √(1 - x²)",
    domain=(-0.9, 0.9),
)
arctan = _unary(
    "arctan",
    np.arctan,
    lambda g, y, x: g / (x * x + 1.0),
    "y = arctan x",
    "Inverse tangent, in (-π/2, π/2).",
    "dx = g / (1 + x²)",
)
sinh = _unary(
    "sinh", np.sinh, lambda g, y, x: g * cosh(x), "y = (eˣ - e⁻ˣ)/2", "Hyperbolic sine.", "dx = g·cosh x"
)
cosh: Op = _unary(
    "cosh", np.cosh, lambda g, y, x: g * sinh(x), "y = (eˣ + e⁻ˣ)/2", "Hyperbolic cosine.", "dx = g·sinh x"
)
tanh = _unary(
    "tanh", np.tanh, lambda g, y, x: g * (1.0 - y * y), "y = tanh x", "Hyperbolic tangent.", "dx = g·(1 - y²)"
)
arcsinh = _unary(
    "arcsinh",
    np.arcsinh,
    lambda g, y, x: g * rsqrt(x * x + 1.0),
    "y = ln(x + √(x² + 1))",
    "Inverse hyperbolic sine.",
    "dx = g / √(x² + 1)",
)
arccosh = _unary(
    "arccosh",
    np.arccosh,
    lambda g, y, x: g * rsqrt((x - 1.0) * (x + 1.0)),
    "y = ln(x + √(x² - 1))",
    "Inverse hyperbolic cosine; NaN below 1.",
    "dx = g / √(x² - 1)",
    domain=(1.2, 4.0),
)
arctanh = _unary(
    "arctanh",
    np.arctanh,
    lambda g, y, x: g / (1.0 - x * x),
    "y = ½ ln((1 + x)/(1 - x))",
    "Inverse hyperbolic tangent.",
    "dx = g / (1 - x²)",
    domain=(-0.9, 0.9),
)
erf = _unary(
    "erf",
    _erf_reference,
    lambda g, y, x: g * (2.0 / math.sqrt(math.pi)) * exp(-(x * x)),
    "y = 2/√π ∫₀ˣ e^(-t²) dt",
    "Error function.",
    "dx = g · 2/√π · e^(-x²)",
    domain=(-3.0, 3.0),
    values=(0.0, 5.0, -7.0),
)

# -- bits, truth and special values --------------------------------------------------------------------------

_SPECIAL = (np.nan, np.inf, -np.inf, 0.0)
invert = _unary("invert", np.invert, None, "y = ~x", "Every bit flipped; logical not for bool.", kinds="biu")
logical_not = _unary("logical_not", np.logical_not, None, "y = ¬x", "Logical not.", kinds="b")
isnan = _unary("isnan", np.isnan, None, "y = (x ≠ x)", "Where x is NaN.", result=BOOL, values=_SPECIAL)
isinf = _unary("isinf", np.isinf, None, "y = (|x| = ∞)", "Where x is +∞ or -∞.", result=BOOL, values=_SPECIAL)
isfinite = _unary(
    "isfinite",
    np.isfinite,
    None,
    "y = (|x| < ∞)",
    "Where x is neither NaN nor infinite.",
    result=BOOL,
    values=_SPECIAL,
)

# -- dtype and gradient flow ---------------------------------------------------------------------------------


def _convert_infer(x: HasAval, *, dtype: DType) -> rules.Aval:
    return tuple(x.shape), canonical(dtype, op="convert")


def _convert_reference(x: Any, *, dtype: DType) -> Any:
    return np.asarray(x).astype(dtype)


def _convert_vjp(g: Any, y: Any, x: Any, *, dtype: DType) -> tuple[Any]:
    return (convert(g, dtype=x.dtype) if rules.is_float(x) and dtype.kind == "f" else None,)


def _convert_samples() -> list[tuple[tuple[np.ndarray, ...], dict[str, Any]]]:
    x = rules.floats((3, 4), -4, 4)
    pairs: list[tuple[np.ndarray, str]] = [(x, d) for d in ("float32", "float16", "int32", "int8", "bool")]
    pairs += [(rules.integers((5,), -9, 9), d) for d in ("float32", "int64", "uint8", "bool")]
    pairs += [(rules.bools((4,)), d) for d in ("float32", "int32")]
    pairs += [(rules.floats((), -4, 4, "float32"), "float64"), (rules.floats((2, 0), 0, 1), "float32")]
    return [((a,), {"dtype": np.dtype(d)}) for a, d in pairs]


convert = define(
    "convert",
    arity=1,
    infer=_convert_infer,
    reference=rules.quiet(_convert_reference),
    vjp=_convert_vjp,
    category="elementwise",
    meaning="Conversion to another dtype, as NumPy's astype: float to int cuts the fraction, non-zero is True.",
    formula="y = dtype(x)",
    grad_rule="dx = dtype(x)(g) between floats, else none",
    samples=_convert_samples,
    attrs={"dtype": "the dtype of the result"},
    traits=("elementwise",),
)


def _identity_infer(x: HasAval) -> rules.Aval:
    return tuple(x.shape), x.dtype


stop_gradient = define(
    "stop_gradient",
    arity=1,
    infer=_identity_infer,
    reference=lambda x: x,
    vjp=_none,
    category="elementwise",
    meaning="x itself, treated as a constant by differentiation.",
    formula="y = x",
    grad_rule="0",
    samples=_samples("fib", -2.0, 2.0),
    traits=("elementwise", "view"),
)
