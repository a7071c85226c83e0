"""Elementwise functions agree with NumPy in value, dtype and shape, and their gradients with finite differences."""

from __future__ import annotations

import math
import operator

import numpy as np
import pytest

from tests.unit._evaluate import DTYPES, check, check_gradient, gradients, record, run
from tracejit import functions as F
from tracejit.errors import DTypeError, ShapeError, TracingError, UnsupportedFunctionError
from tracejit.ops import elementwise as ew
from tracejit.ops.erf import erf as erf_reference

UNARY = [
    "negative", "positive", "absolute", "fabs", "sign", "square", "reciprocal", "exp", "exp2", "expm1", "log",
    "log2", "log10", "log1p", "sqrt", "cbrt", "sin", "cos", "tan", "arcsin", "arccos", "arctan", "sinh",
    "cosh", "tanh", "arcsinh", "arccosh", "arctanh", "deg2rad", "rad2deg", "degrees", "radians", "floor",
    "ceil", "trunc", "rint", "signbit", "invert", "logical_not", "isnan", "isinf", "isfinite",
]  # fmt: skip
BINARY = [
    "add", "subtract", "multiply", "divide", "floor_divide", "remainder", "fmod", "power", "float_power",
    "arctan2", "hypot", "logaddexp", "logaddexp2", "copysign", "heaviside", "maximum", "minimum", "fmax",
    "fmin", "equal", "not_equal", "less", "less_equal", "greater", "greater_equal", "logical_and",
    "logical_or", "logical_xor", "bitwise_and", "bitwise_or", "bitwise_xor", "left_shift", "right_shift",
]  # fmt: skip


def values(dtype: str, shape: tuple[int, ...] = (2, 3), seed: int = 0) -> np.ndarray:
    """Numbers around zero of any dtype; for unsigned ones from zero."""
    rng = np.random.default_rng([seed, *shape])
    if dtype == "bool":
        return np.asarray(rng.integers(0, 2, shape)).astype(bool)
    if dtype.startswith("float"):
        return np.asarray(rng.uniform(-3, 3, shape)).astype(dtype)
    return np.asarray(rng.integers(0 if dtype.startswith("u") else -5, 6, shape)).astype(dtype)


def agree(f, *args) -> None:
    """Same result as NumPy, or, where NumPy has no loop for the dtypes, a DTypeError."""
    try:
        with np.errstate(all="ignore"):
            f(*args)
    except TypeError:
        with pytest.raises(DTypeError):
            run(f, *args)
    else:
        check(f, *args)


@pytest.mark.parametrize("name", UNARY)
@pytest.mark.parametrize("dtype", DTYPES)
def test_unary_functions_over_dtypes_and_shapes(name, dtype):
    ufunc = getattr(np, name)
    for shape in ((), (5,), (2, 3), (0, 2)):
        x = values(dtype, shape)
        if name == "reciprocal" and dtype not in ("float16", "float32", "float64"):
            x = np.where(x == 0, np.array(1, x.dtype), x)  # NumPy leaves the integer 1/0 undefined
        agree(ufunc, x)


@pytest.mark.parametrize("name", UNARY)
def test_unary_functions_on_special_values(name):
    if name == "invert":
        return check(np.invert, np.array([0, -1, 2**31 - 1, -(2**31)], np.int32))
    for dtype in ("float32", "float64"):
        x = np.array([0.0, -0.0, np.nan, np.inf, -np.inf, 1.0, -1.0, 0.5, -1.5, 2.5, 1e-30, 3e30], dtype)
        check(getattr(np, name), x)


@pytest.mark.parametrize("name", BINARY)
def test_binary_functions_over_pairs_of_dtypes(name):
    ufunc = getattr(np, name)
    for i, first in enumerate(DTYPES):
        for second in DTYPES:
            x, y = values(first, (2, 3), i), values(second, (3,), 50 + i)
            if name == "power" and np.result_type(x, y).kind in "biu":
                y = np.abs(y) if y.dtype.kind == "i" else y
            if name.endswith("shift") and y.dtype.kind == "i":
                y = np.abs(y)
            agree(ufunc, x, y)


@pytest.mark.parametrize("name", BINARY)
def test_binary_functions_broadcast(name):
    ufunc = getattr(np, name)
    dtype = "int32" if "bit" in name or "shift" in name else "float32"
    for first, second in (
        ((), (3,)),
        ((2, 1), (1, 4)),
        ((3, 1, 2), (4, 1)),
        ((0, 3), (1, 3)),
        ((1,), ()),
        ((2, 2), (2, 2)),
    ):
        x, y = values(dtype, first), values(dtype, second, 9)
        x, y = (np.abs(x), np.abs(y)) if "shift" in name or name == "power" else (x, y)
        check(ufunc, x, y)


@pytest.mark.parametrize("name", [n for n in BINARY if "bit" not in n and "shift" not in n])
def test_binary_functions_on_special_values(name):
    special = np.array([0.0, -0.0, np.nan, np.inf, -np.inf, 1.0, -2.5, 1e30], np.float64)
    x, y = np.meshgrid(special, special)
    check(getattr(np, name), x, y)


@pytest.mark.parametrize("name", BINARY)
def test_python_scalars_are_weak_on_either_side(name):
    """A Python scalar, constant or traced, takes the dtype of the array it meets (NEP 50)."""
    ufunc = getattr(np, name)
    for dtype in DTYPES:
        x = values(dtype)
        for scalar in (True, 2, 1.5):
            if name.endswith("shift") or name == "power":
                x = np.abs(x) if x.dtype.kind != "b" else x
            agree(lambda x, s=scalar: ufunc(x, s), x)
            agree(lambda x, s=scalar: ufunc(s, x), x)
            agree(ufunc, x, scalar)


OPERATORS = (
    operator.add, operator.sub, operator.mul, operator.truediv, operator.floordiv, operator.mod, operator.pow,
    operator.lt, operator.le, operator.gt, operator.ge, operator.eq, operator.ne,
)  # fmt: skip


@pytest.mark.parametrize("op", OPERATORS)
def test_operators_of_two_weak_scalars_stay_weak(op):
    """``x * (lr / 2)`` keeps the dtype of x, as it does in Python, where lr / 2 is a Python float."""
    (result,), _, _ = record(op, 3.0, 2)
    assert result.weak
    check(lambda x, a, b: x + op(a, b), values("float32"), 3.0, 2)


def test_ufuncs_of_weak_scalars_are_strong():
    """``np.sqrt(2.0)`` is a float64 scalar, which promotes; so is the root of a traced Python float."""
    check(lambda x, s: x * np.sqrt(s), values("float32"), 2.0)
    check(lambda x, s: x * np.add(s, 1.0), values("float32"), 2.0)
    check(lambda x, s: x * (-s + abs(s) * +s), values("float32"), 2.0)


def test_numpy_scalars_and_lists_are_operands():
    x = values("float32")
    check(lambda x: x + np.float64(1), x)
    check(lambda x: np.float64(1) * x, x)
    check(lambda x: x * np.float32(2) - np.int8(3), x)
    check(lambda x: x + [1.0, 2.0, 3.0], x)  # noqa: RUF005
    check(lambda x: [[1], [2]] - x, x)
    check(lambda x: np.arange(3) * x, x)


def test_python_integers_outside_the_dtype():
    """NumPy raises for arithmetic and knows the answer of comparisons."""
    x = np.array([0, 5, 255], np.uint8)
    for op in (operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge):
        for big in (300, -1, 10**30):
            check(lambda x, op=op, big=big: op(x, big), x)
            check(lambda x, op=op, big=big: op(big, x), x)
    with pytest.raises(OverflowError, match="300 out of bounds for uint8"):
        run(lambda x: x + 300, x)


def test_int64_and_uint64_are_compared_exactly():
    x = np.array([-1, 2**53 + 1, 5, -(2**63)], np.int64)
    y = np.array([2**64 - 1, 2**53, 5, 2**63], np.uint64)
    for name in ("equal", "not_equal", "less", "less_equal", "greater", "greater_equal"):
        check(getattr(np, name), x, y)
        check(getattr(np, name), y, x)


@pytest.mark.parametrize(
    "exponent", [0, 1, 2, 3, 5, 8, 11, -1, -2, 0.5, 2.0, 2.5, -0.5, np.float32(2), np.int64(3)]
)
def test_power_with_constant_exponents(exponent):
    for dtype in ("float16", "float32", "float64"):
        check(lambda x: x**exponent, np.abs(values(dtype)) + np.array(0.5, dtype))
    check_gradient(lambda x: x**exponent, np.array([0.5, 1.5, 2.0]))
    if exponent in (0, 1, 2, 3, 5, 8, 11):
        check(lambda x: x ** int(exponent), values("int32"))
        check_gradient(lambda x: x**exponent, np.array([0.0, -1.5, 2.0]))


def test_power_gradient_at_the_edges():
    """x² is flat at 0, x⁰ is flat everywhere, and the slope in the exponent is 0 for bases that have no logarithm."""
    base, exponent = np.array([0.0, 0.0, 0.0, -2.0, 2.0]), np.array([2.0, 1.0, 0.0, 3.0, 3.0])
    dx, dy = gradients(np.power, base, exponent)
    np.testing.assert_allclose(dx, [0.0, 1.0, 0.0, 12.0, 12.0])
    np.testing.assert_allclose(dy, [0.0, 0.0, 0.0, 0.0, 8 * math.log(2)])
    assert gradients(lambda x: x**2, np.array([0.0]))[0] == 0.0


def test_negative_constant_power_of_integers_is_an_error():
    with pytest.raises(DTypeError, match="negative integer powers"):
        run(lambda x: x**-1, np.array([1, 2]))


def test_integer_powers_with_traced_negative_exponents_truncate():
    """NumPy raises at run time; a graph cannot, and gives the truncated quotient."""
    (y,) = run(np.power, np.array([1, -1, -1, 2, 0]), np.array([-3, -3, -2, -1, 2]))
    np.testing.assert_array_equal(y, [1, -1, 1, 0, 0])


DIFFERENTIABLE = {
    "negative": (-2, 2), "positive": (-2, 2), "absolute": (0.2, 2), "square": (-2, 2), "reciprocal": (0.5, 2),
    "exp": (-2, 2), "exp2": (-2, 2), "expm1": (-2, 2), "log": (0.3, 3), "log2": (0.3, 3), "log10": (0.3, 3),
    "log1p": (-0.5, 2), "sqrt": (0.3, 3), "cbrt": (0.3, 3), "sin": (-2, 2), "cos": (-2, 2), "tan": (-1, 1),
    "arcsin": (-0.8, 0.8), "arccos": (-0.8, 0.8), "arctan": (-2, 2), "sinh": (-2, 2), "cosh": (-2, 2), "tanh": (-2, 2),
    "arcsinh": (-2, 2), "arccosh": (1.3, 3), "arctanh": (-0.8, 0.8), "deg2rad": (-90, 90), "degrees": (-2, 2),
    "sinc": (-2, 2), "floor": (0.1, 0.9), "sign": (0.1, 0.9), "rint": (0.6, 0.9), "nan_to_num": (-2, 2),
}  # fmt: skip


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_unary_gradients(name):
    low, high = DIFFERENTIABLE[name]
    x = np.random.default_rng(3).uniform(low, high, (2, 3))
    check_gradient(getattr(np, name), x)


SMOOTH = [
    "add", "subtract", "multiply", "divide", "remainder", "fmod", "power", "float_power", "arctan2",
    "hypot", "logaddexp", "logaddexp2", "copysign", "maximum", "minimum", "fmax", "fmin", "heaviside",
]  # fmt: skip


@pytest.mark.parametrize("name", SMOOTH)
def test_binary_gradients_with_broadcasting(name):
    rng = np.random.default_rng(4)
    x, y = rng.uniform(0.5, 2.9, (2, 3)), rng.uniform(0.6, 2.5, (3,))
    check_gradient(getattr(np, name), x, y, wrt=(0,) if name == "copysign" else None)


def test_gradients_at_ties_zeros_and_infinities():
    x = np.array([1.0, 2.0, 3.0])
    for name in ("maximum", "minimum"):
        for g in gradients(getattr(np, name), x, x.copy()):
            np.testing.assert_array_equal(g, [0.5, 0.5, 0.5])
    np.testing.assert_array_equal(gradients(np.absolute, np.array([0.0, -0.0]))[0], [0.0, 0.0])
    np.testing.assert_array_equal(gradients(np.sinc, np.array([0.0]))[0], [0.0])
    np.testing.assert_array_equal(gradients(np.hypot, np.zeros(1), np.zeros(1))[0], [0.0])
    for g in gradients(np.logaddexp, np.array([0.5, 800.0]), np.array([0.5, 800.0])):
        np.testing.assert_array_equal(g, [0.5, 0.5])
    for g in gradients(np.logaddexp, np.array([-np.inf]), np.array([1.0])):
        assert np.isfinite(g).all()


def test_integers_and_bools_carry_no_gradient():
    """A float computed from an integer does not send a gradient to it."""
    (g, h) = gradients(lambda n, x: (n * 2 + 1) * x, np.array([1, 2]), np.array([0.5, 0.25]))
    np.testing.assert_array_equal(g, [0, 0])
    np.testing.assert_array_equal(h, [3, 5])


def test_erf_is_accurate():
    x = np.concatenate([np.linspace(-7, 7, 4001), [0.0, -0.0, 1e-300, 0.46875, 4.0, 6.0, np.inf, -np.inf]])
    expected = np.array([math.erf(v) for v in x])
    np.testing.assert_allclose(erf_reference(x), expected, rtol=6e-16, atol=0)
    narrow = x.astype(np.float32)
    expected = np.array([math.erf(v) for v in narrow.astype(float)])
    np.testing.assert_allclose(erf_reference(narrow), expected, rtol=5e-7, atol=0)
    assert erf_reference(x.astype(np.float16)).dtype == np.float16
    assert (
        np.isnan(erf_reference(np.array([np.nan])))[0]
        and math.copysign(1, erf_reference(np.array(-0.0))) == -1
    )
    assert F.erf(np.float32(1)).dtype == np.float32 and F.erf(1).dtype == np.float64
    check_gradient(F.erf, np.linspace(-2, 2, 5))
    assert run(F.erf, np.array([1, 2]))[0].dtype == np.float64


@pytest.mark.parametrize("dtype", DTYPES)
def test_where(dtype):
    x, c = values(dtype), values("bool", (3,))
    check(lambda c, x: np.where(c, x, 0), c, x)
    check(lambda c, x: np.where(c, x, 1.5), c, x)
    check(lambda c, x: np.where(c, 1.5, 0.0), c, x)
    check(lambda c, x: np.where(x, c, x), c, x)
    for other in DTYPES:
        check(lambda c, x, o=other: np.where(c, x, np.ones((2, 1), o)), c, x)


def test_where_gradient_and_one_argument():
    c, x, y = values("bool", (2, 3)), values("float64"), values("float64", (3,))
    check_gradient(lambda x, y: F.where(c, x, y), x, y)
    with pytest.raises(UnsupportedFunctionError, match="depends on values"):
        run(lambda c: np.where(c), c)


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d != "bool"])
def test_clip(dtype):
    x = values(dtype, (3, 4))
    check(lambda x: np.clip(x, 1, 3), x)
    check(lambda x: np.clip(x, None, 2), x)
    check(lambda x: np.clip(x, 1, None), x)
    check(lambda x: np.clip(x, np.array([1, 2, 3, 4], dtype), 3), x)
    check(lambda x: x.clip(max=2), x)
    check(lambda x: np.clip(x, min=1, max=2), x)
    check(lambda x: np.clip(x, 0.5, 1.5), x)
    check(lambda x, low: np.clip(x, low, 3), x, 1)


def test_clip_gradient_and_nan():
    check(lambda x: np.clip(x, -1, 1), np.array([np.nan, -3, 3, 0.5]))
    check_gradient(lambda x: np.clip(x, -1.0, 1.0), np.array([-2.0, -0.5, 0.5, 2.0]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("decimals", [0, 1, 3, -1, -2])
def test_round(dtype, decimals):
    x = values(dtype) * np.array(7, dtype)
    if dtype == "bool" and decimals:
        x = x.astype("int8")
    check(lambda x: np.round(x, decimals), x)
    check(lambda x: x.round(decimals), x)
    check(lambda x: np.around(x, decimals), np.array([0.5, 1.5, 2.5, -2.675, 1234.5678]))


@pytest.mark.filterwarnings("ignore:numpy.fix is deprecated")  # from NumPy 2.5 on
def test_builtin_round_and_fix():
    check(lambda x: np.fix(x), np.array([-1.7, 1.7, -0.2]))
    np.testing.assert_array_equal(run(lambda x: round(x, 1), np.array([0.25, 0.37]))[0], [0.2, 0.4])


@pytest.mark.parametrize("source", DTYPES)
def test_astype_between_all_dtypes(source):
    x = np.abs(values(source)) if source != "bool" else values(source)
    for target in DTYPES:
        check(lambda x, t=target: x.astype(t), x)
        check(lambda x, t=target: np.astype(x, t), x)


def test_astype_of_special_values_and_its_gradient():
    x = np.array([np.nan, np.inf, -np.inf, 2.9, -2.9], np.float32)
    check(lambda x: x.astype(bool), x)
    check(lambda x: x.astype("int32"), x)
    check(lambda x: x.astype("float64"), x)
    (g,) = gradients(lambda x: x.astype("float32").astype("float64") * 2.0, np.array([1.0, 2.0]))
    np.testing.assert_array_equal(g, [2.0, 2.0])
    with pytest.raises(DTypeError, match="complex"):
        run(lambda x: x.astype(complex), x)


def test_nan_to_num_isclose_and_friends():
    x = np.array([np.nan, np.inf, -np.inf, 1.0, 1.0 + 1e-9], np.float64)
    y = np.array([np.nan, np.inf, np.inf, 1.0, 1.0])
    for dtype in ("float16", "float32", "float64"):
        check(np.nan_to_num, x.astype(dtype))
    check(lambda x: np.nan_to_num(x, nan=7.0, posinf=1.0, neginf=-1.0), x)
    check(np.nan_to_num, np.array([1, 2]))
    check(np.isclose, x, y)
    check(lambda x, y: np.isclose(x, y, equal_nan=True), x, y)
    check(lambda x: np.isclose(x, 1, rtol=0.5), np.array([1, 2, 3]))
    check(np.isposinf, x)
    check(np.isneginf, x)
    check(np.modf, np.array([1.5, -2.25, 0.0, -0.0, np.inf, -np.inf]))
    check(lambda x, y: divmod(x, y), np.array([7.5, -7.5]), np.array([2.0, 2.0]))
    check(np.divmod, np.array([7, -7]), np.array([2, 2]))
    for equal_nan in (False, True):
        assert bool(run(lambda x, y, e=equal_nan: np.allclose(x, y, equal_nan=e), y, y)[0]) is equal_nan
        assert bool(run(lambda x, y, e=equal_nan: np.array_equal(x, y, equal_nan=e), y, y)[0]) is equal_nan
    assert run(lambda x: np.array_equal(x, np.zeros(3)), x) == [False]
    check(np.sinc, np.array([0.0, 0.5, -2.0, 1e-9], np.float32))
    check(lambda x: x.conj() + np.real(x) - np.imag(x) + np.copy(x), x)


def test_dtype_keyword():
    x = values("int32")
    check(lambda x: np.add(x, 1, dtype=np.float64), x)
    check(lambda x: np.multiply(x, x, dtype="int64"), x)
    check(lambda x: np.exp(x, dtype="float64"), values("float32"))


def test_errors_say_what_the_user_did():
    x = values("float32")
    with pytest.raises(
        ShapeError, match=r"\[add\] shapes do not broadcast: axis -1 has sizes 3 and 4; got x1: f32\[2,3\]"
    ):
        run(lambda x: x + np.ones(4), x)
    with pytest.raises(DTypeError, match="boolean subtract"):
        run(lambda x: (x > 0) - (x > 1), x)
    with pytest.raises(DTypeError, match="boolean negative"):
        run(lambda x: -(x > 0), x)
    with pytest.raises(TracingError, match="out="):
        run(lambda x: np.add(x, x, out=np.zeros((2, 3), "f4")), x)
    with pytest.raises(UnsupportedFunctionError, match="where="):
        run(lambda x: np.add(x, x, where=np.array([True, False, True])), x)
    with pytest.raises(DTypeError, match="complex"):
        run(lambda x: np.add(x, 1j), x)
    with pytest.raises(DTypeError):
        run(lambda x: x + np.array(["a", "b", "c"]), x)
    with pytest.raises(DTypeError):
        run(lambda x: x + np.array([None, None, None]), x)


def test_concrete_operands_stay_numpy():
    """Without a tensor the functions are NumPy's own."""
    assert F.add(2, 3) == 5 and isinstance(F.add(2, 3), np.int64)
    np.testing.assert_array_equal(F.where([True, False], 1, 2), [1, 2])
    np.testing.assert_array_equal(F.clip(np.arange(5), 1, 3), np.clip(np.arange(5), 1, 3))
    assert F.round(2.567, 1) == 2.6 and F.power(2, 3) == 8
    out = np.zeros(2)
    assert F.add([1.0, 2.0], 1.0, out=out) is out


def test_every_unary_and_binary_op_is_strict():
    """Primitives take equal dtypes and shapes; user-level functions insert the conversions."""
    with pytest.raises(DTypeError, match="one dtype"):
        record(lambda x, y: ew.add(x, y), np.ones(2), np.ones(2, "f4"))
    with pytest.raises(ShapeError, match="one shape"):
        record(lambda x, y: ew.add(x, y), np.ones(2), np.ones(3))
    with pytest.raises(DTypeError, match="needs float operands"):
        record(lambda x: ew.exp(x), np.ones(2, "i4"))
    with pytest.raises(DTypeError, match="must be bool"):
        record(lambda x: ew.where(x, x, x), np.ones(2))
