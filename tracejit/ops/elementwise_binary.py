"""Elementwise primitives of two and three operands: shape rule, NumPy reference, gradient, meaning.

Imported through ``ops.elementwise``; used by ``functions.elementwise``, gradient rules and composites. Operands have
one dtype and one shape: promotion and broadcasting are explicit nodes made by ``tracejit.functions``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tracejit.dtypes import BOOL, DType
from tracejit.errors import DTypeError
from tracejit.ops import rules
from tracejit.ops.elementwise_unary import floor, log, sign, trunc
from tracejit.ops.registry import NONDIFFERENTIABLE, HasAval, Op, define
from tracejit.ops.rules import full_like

Sample = tuple[tuple[np.ndarray, ...], dict[str, Any]]


def _samples(kinds: str, low: tuple[float, float], high: tuple[float, float]) -> Callable[[], list[Sample]]:
    def samples() -> list[Sample]:
        out: list[Sample] = []
        if "f" in kinds:
            for dtype, shapes in (("float64", rules.SHAPES), ("float32", ((4, 3),)), ("float16", ((7,),))):
                for s in shapes:
                    pair = tuple(rules.floats(s, low[i], high[i], dtype, i) for i in range(2))
                    out.append((pair, {}))
        if "i" in kinds:
            for dtype in ("int32", "int64", "int8"):
                for s in rules.SHAPES:
                    out.append(
                        (
                            tuple(rules.integers(s, max(-9, int(low[i]) - 5), 9, dtype, i) for i in range(2)),
                            {},
                        )
                    )
        if "u" in kinds:
            out.append(
                ((rules.integers((6,), 0, 99, "uint8", 0), rules.integers((6,), 1, 9, "uint8", 1)), {})
            )
        if "b" in kinds:
            out += [((rules.bools(s, 0), rules.bools(s, 1)), {}) for s in rules.SHAPES]
        return out

    return samples


def _binary(
    name: str,
    reference: Callable[[Any, Any], Any],
    gradient: Callable[[Any, Any, Any, Any], tuple[Any, Any]] | None,
    formula: str,
    meaning: str,
    grad_rule: str = "",
    *,
    kinds: str = "iuf",
    result: DType | None = None,
    low: tuple[float, float] = (-2.0, -2.0),
    high: tuple[float, float] = (2.0, 2.0),
    commutative: bool = False,
) -> Op:
    """Define a binary elementwise op.

    ``gradient(g, z, x, y)`` gives the cotangents of float operands; None means zero. With ``result`` the op has that
    dtype and no gradient at all. ``low`` and ``high`` bound the samples of the two operands.
    """

    def infer(x: HasAval, y: HasAval) -> rules.Aval:
        rules.check_kind(name, kinds, x=x, y=y)
        shape, dtype = rules.check_same(name, x=x, y=y)
        return shape, result or dtype

    def vjp(g: Any, z: Any, x: Any, y: Any) -> tuple[Any, Any]:
        if gradient is None or not rules.is_float(x):
            return None, None
        return gradient(g, z, x, y)

    discrete = result is not None or "f" not in kinds
    return define(
        name,
        arity=2,
        infer=infer,
        reference=rules.quiet(reference),
        vjp=NONDIFFERENTIABLE if discrete else vjp,
        category="elementwise",
        meaning=meaning,
        formula=formula,
        grad_rule=grad_rule,
        samples=_samples(kinds, low, high),
        traits=("elementwise", "commutative") if commutative else ("elementwise",),
    )


# -- arithmetic ----------------------------------------------------------------------------------------------

add = _binary(
    "add", np.add, lambda g, z, x, y: (g, g), "z = x + y", "Sum.", "dx = g, dy = g", commutative=True
)
sub = _binary("sub", np.subtract, lambda g, z, x, y: (g, -g), "z = x - y", "Difference.", "dx = g, dy = -g")
mul = _binary(
    "mul",
    np.multiply,
    lambda g, z, x, y: (g * y, g * x),
    "z = x·y",
    "Product.",
    "dx = g·y, dy = g·x",
    commutative=True,
)


def _div(g: Any, z: Any, x: Any, y: Any) -> tuple[Any, Any]:
    dx = g / y
    return dx, -(dx * z)


div = _binary(
    "div",
    np.true_divide,
    _div,
    "z = x / y",
    "Quotient.",
    "dx = g / y, dy = -g·z / y",
    kinds="f",
    low=(-2.0, 0.5),
    high=(2.0, 3.0),
)
floordiv = _binary(
    "floordiv",
    np.floor_divide,
    None,
    "z = ⌊x / y⌋",
    "Quotient rounded down; an integer divided by zero gives 0.",
    "0",
    low=(-5.0, 0.6),
    high=(5.0, 2.0),
)
mod = _binary(
    "mod",
    np.remainder,
    lambda g, z, x, y: (g, -(g * floor(x / y))),
    "z = x - ⌊x / y⌋·y",
    "Remainder with the sign of the divisor, as Python's %; an integer modulo zero gives 0.",
    "dx = g, dy = -g·⌊x / y⌋",
    low=(-5.0, 0.6),
    high=(5.0, 2.0),
)
fmod = _binary(
    "fmod",
    np.fmod,
    lambda g, z, x, y: (g, -(g * trunc(x / y))),
    "z = x - trunc(x / y)·y",
    "Remainder with the sign of the dividend, as C's fmod; an integer modulo zero gives 0.",
    "dx = g, dy = -g·trunc(x / y)",
    low=(-5.0, 0.6),
    high=(5.0, 2.0),
)


def _pow_reference(x: Any, y: Any) -> Any:
    if x.dtype.kind == "i" and np.any(y < 0):
        # NumPy raises here. A graph cannot, so x⁻ⁿ is truncated to an integer like every other integer result.
        whole = np.power(x, np.maximum(y, 0))
        odd = np.where(y & 1, x, 1)
        return np.where(y >= 0, whole, np.where(np.abs(x) == 1, odd, 0)).astype(x.dtype)
    return np.power(x, y)


def _pow(g: Any, z: Any, x: Any, y: Any) -> tuple[Any, Any]:
    # The guards keep 0·∞ and log(0) out: x⁰ is flat in x, and the slope in y is taken for positive bases only.
    zero, one = full_like(x, 0.0), full_like(x, 1.0)
    exponent = where(equal(y, zero), one, y)
    dx = where(equal(y, zero), zero, g * exponent * pow_(x, exponent - 1.0))
    positive = greater(x, zero)
    dy = where(positive, g * z * log(where(positive, x, one)), zero)
    return dx, dy


pow_ = _binary(
    "pow",
    _pow_reference,
    _pow,
    "z = xʸ",
    "Power; an integer to a negative power is truncated to an integer.",
    "dx = g·y·xʸ⁻¹ (0 where y = 0), dy = g·z·ln x (0 where x ≤ 0)",
    low=(0.2, -2.0),
    high=(3.0, 3.0),
)


def _arctan2(g: Any, z: Any, y: Any, x: Any) -> tuple[Any, Any]:
    scaled = g / (x * x + y * y)
    return scaled * x, -(scaled * y)


arctan2 = _binary(
    "arctan2",
    np.arctan2,
    _arctan2,
    "z = angle of the point (y, x)",
    "Angle between the positive x axis and the point with ordinate x₁ and abscissa x₂, in (-π, π].",
    "dx₁ = g·x₂ / (x₁² + x₂²), dx₂ = -g·x₁ / (x₁² + x₂²)",
    kinds="f",
    low=(0.3, -2.0),
)
copysign: Op = _binary(
    "copysign",
    np.copysign,
    lambda g, z, x, y: (g * sign(x) * copysign(full_like(y, 1.0), y), None),
    "z = |x|·sign(y)",
    "Magnitude of x with the sign of y; zeros have signs too.",
    "dx = g·sign(x)·sign(y), dy = 0",
    kinds="f",
)


def _extremum(wins: Callable[[Any, Any], Any]) -> Callable[[Any, Any, Any, Any], tuple[Any, Any]]:
    def gradient(g: Any, z: Any, x: Any, y: Any) -> tuple[Any, Any]:
        zero, half = full_like(g, 0.0), g * 0.5
        tie = equal(x, y)
        return where(tie, half, where(wins(x, y), g, zero)), where(tie, half, where(wins(y, x), g, zero))

    return gradient


maximum = _binary(
    "maximum",
    np.maximum,
    _extremum(lambda x, y: greater(x, y)),
    "z = max(x, y)",
    "The larger operand; NaN if either is NaN.",
    "g to the larger operand, half each on a tie",
    commutative=True,
)
minimum = _binary(
    "minimum",
    np.minimum,
    _extremum(lambda x, y: less(x, y)),
    "z = min(x, y)",
    "The smaller operand; NaN if either is NaN.",
    "g to the smaller operand, half each on a tie",
    commutative=True,
)

# -- bits ----------------------------------------------------------------------------------------------------

bitwise_and = _binary(
    "bitwise_and",
    np.bitwise_and,
    None,
    "z = x & y",
    "Bitwise and; logical and for bool.",
    kinds="biu",
    commutative=True,
)
bitwise_or = _binary(
    "bitwise_or",
    np.bitwise_or,
    None,
    "z = x | y",
    "Bitwise or; logical or for bool.",
    kinds="biu",
    commutative=True,
)
bitwise_xor = _binary(
    "bitwise_xor",
    np.bitwise_xor,
    None,
    "z = x ^ y",
    "Bitwise exclusive or; ≠ for bool.",
    kinds="biu",
    commutative=True,
)
left_shift = _binary(
    "left_shift",
    np.left_shift,
    None,
    "z = x·2ʸ",
    "Bits moved left; 0 if y reaches the width.",
    kinds="iu",
    low=(-2.0, 5.0),
)
right_shift = _binary(
    "right_shift",
    np.right_shift,
    None,
    "z = ⌊x / 2ʸ⌋",
    "Bits moved right, keeping the sign; all sign bits if y reaches the width.",
    kinds="iu",
    low=(-2.0, 5.0),
)

# -- comparisons ---------------------------------------------------------------------------------------------


def _compare(
    name: str, reference: Callable[[Any, Any], Any], symbol: str, words: str, commutative: bool = False
) -> Op:
    return _binary(
        name,
        reference,
        None,
        f"z = (x {symbol} y)",
        f"Where x {words} y; {'True' if name == 'not_equal' else 'False'} if either is NaN.",
        kinds="biuf",
        result=BOOL,
        commutative=commutative,
    )


equal = _compare("equal", np.equal, "=", "equals", True)
not_equal = _compare("not_equal", np.not_equal, "≠", "differs from", True)
less: Op = _compare("less", np.less, "<", "is less than")
less_equal = _compare("less_equal", np.less_equal, "≤", "is at most")
greater: Op = _compare("greater", np.greater, ">", "is greater than")
greater_equal = _compare("greater_equal", np.greater_equal, "≥", "is at least")

# -- selection -----------------------------------------------------------------------------------------------


def _where_infer(cond: HasAval, x: HasAval, y: HasAval) -> rules.Aval:
    if cond.dtype != BOOL:
        raise DTypeError.make("the condition of this primitive must be bool", op="where", got={"cond": cond})
    shape, dtype = rules.check_same("where", x=x, y=y)
    rules.check_same("where", condition=cond, x=_Shaped(shape))
    return shape, dtype


class _Shaped:
    """A bool of some shape, to compare the shape of a condition with."""

    dtype = BOOL

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape


def _where_vjp(g: Any, z: Any, cond: Any, x: Any, y: Any) -> tuple[Any, Any, Any]:
    if not rules.is_float(x):
        return None, None, None
    zero = full_like(g, 0.0)
    return None, where(cond, g, zero), where(cond, zero, g)


def _where_samples() -> list[Sample]:
    out: list[Sample] = []
    for s in rules.SHAPES:
        out.append(((rules.bools(s), rules.floats(s, -2, 2), rules.floats(s, -2, 2, seed=1)), {}))
    out.append(((rules.bools((4,)), rules.integers((4,), -9, 9), rules.integers((4,), -9, 9, seed=1)), {}))
    out.append(((rules.bools((4,)), rules.bools((4,), 1), rules.bools((4,), 2)), {}))
    return out


where = define(
    "where",
    arity=3,
    infer=_where_infer,
    reference=np.where,
    vjp=_where_vjp,
    category="elementwise",
    meaning="Elements of x where the condition holds, of y elsewhere.",
    formula="z = x if c else y",
    grad_rule="dx = g where c, else 0; dy = 0 where c, else g",
    samples=_where_samples,
    traits=("elementwise",),
)
