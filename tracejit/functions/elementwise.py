"""NumPy's elementwise functions on tensors: every ufunc that has a traced form.

Reached through operators, ``np.*`` dispatch and ``tracejit.functions``; on concrete arrays NumPy's own result. Functions
that are no ufuncs (``where``, ``clip``, ``round``, ...) are in ``numeric``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from tracejit.dtypes import BOOL, FLOAT64
from tracejit.errors import DTypeError
from tracejit.functions import promotion as pr
from tracejit.ops import elementwise as ew
from tracejit.ops.registry import Op
from tracejit.source import named_scope
from tracejit.tensor import Tensor

UfuncLike = Callable[..., Any]


def _ufunc(ufunc: np.ufunc, lower: Callable[..., Any]) -> UfuncLike:
    """The traced form of ``ufunc``: ``lower`` gets tensors of the dtypes NumPy computes in, broadcast to one shape."""
    name, nin = ufunc.__name__, ufunc.nin

    def function(*operands: Any, out: Any = None, dtype: Any = None, **kwargs: Any) -> Any:
        if len(operands) == nin + 1 and out is None:
            operands, out = operands[:nin], operands[nin]
        if len(operands) != nin:
            raise TypeError(f"{name}() takes {nin} positional operand{'s' * (nin > 1)}, got {len(operands)}")
        if not pr.any_tensor(*operands):
            return ufunc(*operands, out=out, dtype=dtype, **kwargs)
        if out is not None or kwargs:
            pr.reject_keywords(name, out, **kwargs)
        dtypes = pr.ufunc_dtypes(ufunc, operands, dtype)
        tensors = [pr.tensor(o, name, d) for o, d in zip(operands, dtypes, strict=False)]
        result = lower(*pr.broadcast(name, *tensors, operands=operands))
        return pr.weakly(result, dtype is None and all(map(pr.is_weak, operands)))

    return _describe(function, name, ufunc.__doc__)


def _describe(function: Any, name: str, doc: str | None) -> UfuncLike:
    function.__name__ = function.__qualname__ = name
    function.__doc__ = f"As ``np.{name}``, on tensors too.\n\n{doc or ''}"
    return function


def _or_bool(op: Op, for_bool: Op) -> Callable[..., Any]:
    """NumPy's arithmetic on bools is logic."""
    return lambda x, y: for_bool(x, y) if x.dtype == BOOL else op(x, y)


def _identity_unless(kinds: str, op: Op) -> Callable[[Tensor], Tensor]:
    return lambda x: op(x) if x.dtype.kind in kinds else x


# -- arithmetic ----------------------------------------------------------------------------------------------

add = _ufunc(np.add, _or_bool(ew.add, ew.bitwise_or))
subtract = _ufunc(np.subtract, ew.sub)
multiply = _ufunc(np.multiply, _or_bool(ew.mul, ew.bitwise_and))
divide = true_divide = _ufunc(np.divide, ew.div)
floor_divide = _ufunc(np.floor_divide, ew.floordiv)
remainder = mod = _ufunc(np.remainder, ew.mod)
fmod = _ufunc(np.fmod, ew.fmod)
negative = _ufunc(np.negative, ew.neg)
positive = _ufunc(np.positive, lambda x: x)
absolute = abs = _ufunc(np.absolute, _identity_unless("if", ew.abs_))
fabs = _ufunc(np.fabs, ew.abs_)
sign = _ufunc(np.sign, ew.sign)
square = _ufunc(np.square, lambda x: ew.mul(x, x))


def divmod(x1: Any, x2: Any, /, **kwargs: Any) -> tuple[Any, Any]:
    """As ``np.divmod``: quotient rounded down, and remainder."""
    return floor_divide(x1, x2, **kwargs), remainder(x1, x2, **kwargs)


def _reciprocal(x: Tensor) -> Any:
    if x.dtype.kind == "f":
        return ew.reciprocal(x)
    # Integer division of 1: only ±1 have a non-zero result. NumPy leaves 1/0 undefined; here it is 0.
    zero = pr.constant_like(x, 0)
    unit = ew.equal(ew.abs_(x), pr.constant_like(x, 1))
    return ew.where(unit, x, zero)


reciprocal = _ufunc(np.reciprocal, _reciprocal)
_power = _ufunc(np.power, ew.pow_)
float_power = _ufunc(np.float_power, ew.pow_)


def power(x1: Any, x2: Any, /, out: Any = None, *, dtype: Any = None, **kwargs: Any) -> Any:
    """As ``np.power``. A constant exponent that is a small whole number becomes multiplications, exact at zero.

    DTypeError for an integer base with a negative integer constant as exponent, where NumPy raises too.
    """
    if not pr.any_tensor(x1) or not isinstance(x2, int | float | np.number):
        return _power(x1, x2, out=out, dtype=dtype, **kwargs)
    pr.reject_keywords("power", out, **kwargs)
    result = pr.ufunc_dtypes(np.power, (x1, x2), dtype)[-1]
    base, exponent = pr.tensor(x1, "power", result), float(x2)
    if result.kind in "iu":
        pr.tensor(x2, "power", result)  # NumPy's range check of the constant
        if exponent < 0:
            raise DTypeError.make(
                "integers to negative integer powers are not allowed", op="power", got={"x1": x1, "x2": x2},
                hint="use a float base, e.g. x.astype(float)",
            )  # fmt: skip
    weak = dtype is None and pr.is_weak(x1) and pr.is_weak(x2)
    if exponent == 0.5:
        return pr.weakly(ew.sqrt(base), weak)
    if exponent == -1.0:
        return pr.weakly(ew.reciprocal(base), weak)
    if exponent in _SMALL_POWERS:
        return pr.weakly(_repeated_product(base, int(exponent)), weak)
    return _power(x1, x2, dtype=dtype)


_SMALL_POWERS = frozenset(range(9))


def _repeated_product(x: Tensor, n: int) -> Any:
    if n == 0:
        return pr.constant_like(x, 1)
    half = x if n == 1 else _repeated_product(x, n // 2)
    if n == 1:
        return x
    squared = ew.mul(half, half)
    return ew.mul(squared, x) if n % 2 else squared


# -- exponentials, logarithms, roots -------------------------------------------------------------------------

exp = _ufunc(np.exp, ew.exp)
exp2 = _ufunc(np.exp2, ew.exp2)
expm1 = _ufunc(np.expm1, ew.expm1)
log = _ufunc(np.log, ew.log)
log2 = _ufunc(np.log2, ew.log2)
log10 = _ufunc(np.log10, ew.log10)
log1p = _ufunc(np.log1p, ew.log1p)
sqrt = _ufunc(np.sqrt, ew.sqrt)
cbrt = _ufunc(np.cbrt, ew.cbrt)


def _log_sum(x: Tensor, y: Tensor, softplus: Callable[[Any], Any]) -> Any:
    """max(x, y) + softplus(-|x - y|); where x - y is NaN (equal infinities, or a NaN operand) x + y is the answer."""
    difference = ew.sub(x, y)
    undefined = ew.isnan(difference)
    gap = ew.abs_(ew.where(undefined, pr.constant_like(x, 0.0), difference))
    return ew.where(undefined, ew.add(x, y), ew.add(ew.maximum(x, y), softplus(ew.neg(gap))))


def _logaddexp(x: Tensor, y: Tensor) -> Any:
    with named_scope("logaddexp"):
        return _log_sum(x, y, lambda d: ew.log1p(ew.exp(d)))


def _logaddexp2(x: Tensor, y: Tensor) -> Any:
    with named_scope("logaddexp2"):
        return _log_sum(x, y, lambda d: ew.log1p(ew.exp2(d)) * (1.0 / math.log(2.0)))


logaddexp = _ufunc(np.logaddexp, _logaddexp)
logaddexp2 = _ufunc(np.logaddexp2, _logaddexp2)


def erf(x: Any) -> Any:
    """Error function ``2/√π ∫₀ˣ exp(-t²) dt``, elementwise; integers are computed as float64."""
    if not pr.any_tensor(x):
        array = np.asarray(x)
        return ew.erf(array if array.dtype.kind == "f" else array.astype(FLOAT64))[()]
    return ew.erf(pr.tensor(x, "erf", x.dtype if x.dtype.kind == "f" else FLOAT64))


# -- trigonometry --------------------------------------------------------------------------------------------

sin = _ufunc(np.sin, ew.sin)
cos = _ufunc(np.cos, ew.cos)
tan = _ufunc(np.tan, ew.tan)
arcsin = asin = _ufunc(np.arcsin, ew.arcsin)
arccos = acos = _ufunc(np.arccos, ew.arccos)
arctan = atan = _ufunc(np.arctan, ew.arctan)
arctan2 = atan2 = _ufunc(np.arctan2, ew.arctan2)
sinh = _ufunc(np.sinh, ew.sinh)
cosh = _ufunc(np.cosh, ew.cosh)
tanh = _ufunc(np.tanh, ew.tanh)
arcsinh = asinh = _ufunc(np.arcsinh, ew.arcsinh)
arccosh = acosh = _ufunc(np.arccosh, ew.arccosh)
arctanh = atanh = _ufunc(np.arctanh, ew.arctanh)
deg2rad = _ufunc(np.deg2rad, lambda x: x * (math.pi / 180.0))
rad2deg = _ufunc(np.rad2deg, lambda x: x * (180.0 / math.pi))
radians = _ufunc(np.radians, lambda x: x * (math.pi / 180.0))
degrees = _ufunc(np.degrees, lambda x: x * (180.0 / math.pi))


def _hypot(x: Tensor, y: Tensor) -> Any:
    """Scaled by the larger leg, so that squares neither overflow nor vanish; an infinite leg wins over NaN."""
    with named_scope("hypot"):
        x, y = ew.abs_(x), ew.abs_(y)
        long, short = ew.maximum(x, y), ew.minimum(x, y)
        zero, one = pr.constant_like(x, 0.0), pr.constant_like(x, 1.0)
        infinite = ew.bitwise_or(ew.isinf(x), ew.isinf(y))
        scalable = ew.bitwise_and(ew.not_equal(long, zero), ew.logical_not(infinite))
        ratio = ew.div(ew.where(scalable, short, zero), ew.where(scalable, long, one))
        length = ew.mul(long, ew.sqrt(ew.add(ew.mul(ratio, ratio), one)))
        return ew.where(infinite, pr.constant_like(x, math.inf), length)


hypot = _ufunc(np.hypot, _hypot)

# -- rounding and parts of a number --------------------------------------------------------------------------

floor = _ufunc(np.floor, _identity_unless("f", ew.floor))
ceil = _ufunc(np.ceil, _identity_unless("f", ew.ceil))
trunc = _ufunc(np.trunc, _identity_unless("f", ew.trunc))
rint = _ufunc(np.rint, ew.rint)
copysign = _ufunc(np.copysign, ew.copysign)


def _signbit(x: Tensor) -> Any:
    zero, one = pr.constant_like(x, 0.0), pr.constant_like(x, 1.0)
    return ew.less(ew.copysign(one, x), zero)


def _heaviside(x: Tensor, at_zero: Tensor) -> Any:
    zero, one = pr.constant_like(x, 0.0), pr.constant_like(x, 1.0)
    step = ew.where(ew.equal(x, zero), at_zero, ew.where(ew.less(x, zero), zero, one))
    return ew.where(ew.isnan(x), x, step)


signbit = _ufunc(np.signbit, _signbit)
heaviside = _ufunc(np.heaviside, _heaviside)


def modf(x: Any, /, **kwargs: Any) -> tuple[Any, Any]:
    """As ``np.modf``: fractional and whole part, both with the sign of ``x``."""
    if not pr.any_tensor(x):
        return np.modf(x, **kwargs)
    pr.reject_keywords("modf", **kwargs)
    x = pr.tensor(x, "modf", pr.ufunc_dtypes(np.modf, (x,))[0])
    whole = ew.trunc(x)
    fraction = ew.where(ew.isinf(x), pr.constant_like(x, 0.0), ew.sub(x, whole))
    return ew.copysign(fraction, x), whole


# -- extrema -------------------------------------------------------------------------------------------------


def _ignoring_nan(op: Op, for_bool: Op) -> Callable[..., Any]:
    def lower(x: Tensor, y: Tensor) -> Any:
        if x.dtype.kind != "f":
            return _or_bool(op, for_bool)(x, y)
        return ew.where(ew.isnan(x), y, ew.where(ew.isnan(y), x, op(x, y)))

    return lower


maximum = _ufunc(np.maximum, _or_bool(ew.maximum, ew.bitwise_or))
minimum = _ufunc(np.minimum, _or_bool(ew.minimum, ew.bitwise_and))
fmax = _ufunc(np.fmax, _ignoring_nan(ew.maximum, ew.bitwise_or))
fmin = _ufunc(np.fmin, _ignoring_nan(ew.minimum, ew.bitwise_and))

# -- comparisons ---------------------------------------------------------------------------------------------

_MIRROR = {"less": "greater", "less_equal": "greater_equal", "greater": "less", "greater_equal": "less_equal"}


def _comparison(ufunc: np.ufunc, op: Op) -> UfuncLike:
    """Comparisons never overflow: a Python integer that the other dtype cannot hold has a known answer.

    int64 against uint64 is compared exactly, as NumPy does.
    """
    name = ufunc.__name__
    ordinary = _ufunc(ufunc, lambda x, y: op(x, y) if x.dtype == y.dtype else _mixed_signs(op, x, y))

    def function(x1: Any, x2: Any, /, *args: Any, **kwargs: Any) -> Any:
        for one, other, relation in ((x1, x2, name), (x2, x1, _MIRROR.get(name, name))):
            if type(other) is int and isinstance(one, Tensor) and one.dtype.kind in "iu" and not one.weak:
                side = pr.out_of_range(other, one.dtype)
                if side:
                    truth = relation == "not_equal" or relation.startswith("less" if side > 0 else "greater")
                    return pr.broadcast_to(pr.tensor(truth, name, BOOL), one.shape)
        return ordinary(x1, x2, *args, **kwargs)

    return _describe(function, name, ufunc.__doc__)


def _mixed_signs(op: Op, x: Tensor, y: Tensor) -> Any:
    """One operand is signed, the other unsigned: negative ones are below all others, the rest compare as unsigned."""
    signed = x if x.dtype.kind == "i" else y
    unsigned = y.dtype if signed is x else x.dtype
    negative_one = ew.less(signed, pr.constant_like(signed, 0))
    same = op(pr.tensor(x, op.name, unsigned), pr.tensor(y, op.name, unsigned))
    below = op.name == "not_equal" or op.name.startswith("less" if signed is x else "greater")
    return ew.where(negative_one, pr.constant_like(negative_one, below), same)


equal = _comparison(np.equal, ew.equal)
not_equal = _comparison(np.not_equal, ew.not_equal)
less = _comparison(np.less, ew.less)
less_equal = _comparison(np.less_equal, ew.less_equal)
greater = _comparison(np.greater, ew.greater)
greater_equal = _comparison(np.greater_equal, ew.greater_equal)

# -- logic and bits ------------------------------------------------------------------------------------------


def _logical(ufunc: np.ufunc, op: Op) -> UfuncLike:
    """Every operand is reduced to its truth value first; NaN is true."""
    name = ufunc.__name__

    def function(*operands: Any, out: Any = None, dtype: Any = None, **kwargs: Any) -> Any:
        if len(operands) != ufunc.nin:
            raise TypeError(f"{name}() takes {ufunc.nin} positional operands, got {len(operands)}")
        if not pr.any_tensor(*operands):
            return ufunc(*operands, out=out, dtype=dtype, **kwargs)
        pr.reject_keywords(name, out, **kwargs)
        return op(*pr.broadcast(name, *(pr.tensor(o, name, BOOL) for o in operands), operands=operands))

    return _describe(function, name, ufunc.__doc__)


logical_and = _logical(np.logical_and, ew.bitwise_and)
logical_or = _logical(np.logical_or, ew.bitwise_or)
logical_xor = _logical(np.logical_xor, ew.bitwise_xor)
logical_not = _logical(np.logical_not, ew.logical_not)
bitwise_and = _ufunc(np.bitwise_and, ew.bitwise_and)
bitwise_or = _ufunc(np.bitwise_or, ew.bitwise_or)
bitwise_xor = _ufunc(np.bitwise_xor, ew.bitwise_xor)
invert = bitwise_not = bitwise_invert = _ufunc(np.invert, ew.invert)
left_shift = bitwise_left_shift = _ufunc(np.left_shift, ew.left_shift)
right_shift = bitwise_right_shift = _ufunc(np.right_shift, ew.right_shift)

# -- special values ------------------------------------------------------------------------------------------


def _test(op: Op, otherwise: bool) -> Callable[[Tensor], Any]:
    """Integers and bools are never NaN or infinite."""

    def lower(x: Tensor) -> Any:
        if x.dtype.kind == "f":
            return op(x)
        return pr.broadcast_to(pr.tensor(otherwise, op.name, BOOL), x.shape)

    return lower


isnan = _ufunc(np.isnan, _test(ew.isnan, False))
isinf = _ufunc(np.isinf, _test(ew.isinf, False))
isfinite = _ufunc(np.isfinite, _test(ew.isfinite, True))

__all__ = [
    "abs", "absolute", "acos", "acosh", "add", "arccos", "arccosh", "arcsin", "arcsinh", "arctan", "arctan2", "arctanh",
    "asin", "asinh", "atan", "atan2", "atanh", "bitwise_and", "bitwise_invert", "bitwise_left_shift", "bitwise_not",
    "bitwise_or", "bitwise_right_shift", "bitwise_xor", "cbrt", "ceil", "copysign", "cos", "cosh", "deg2rad", "degrees",
    "divide", "divmod", "equal", "erf", "exp", "exp2", "expm1", "fabs", "float_power", "floor", "floor_divide", "fmax",
    "fmin", "fmod", "greater", "greater_equal", "heaviside", "hypot", "invert", "isfinite", "isinf", "isnan",
    "left_shift", "less", "less_equal", "log", "log10", "log1p", "log2", "logaddexp", "logaddexp2", "logical_and",
    "logical_not", "logical_or", "logical_xor", "maximum", "minimum", "mod", "modf", "multiply", "negative",
    "not_equal", "positive", "power", "rad2deg", "radians", "reciprocal", "remainder", "right_shift", "rint", "sign",
    "signbit", "sin", "sinh", "sqrt", "square", "subtract", "tan", "tanh", "true_divide", "trunc",
]  # fmt: skip
