"""Accuracy of the vectorised elementary functions: float32 over its whole range and at the edges, against float64."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tests.backend.test_cpu_loops import F32, Body
from tracejit_cpu.executable import CpuExecutable

UNARY = {
    "exp": np.exp,
    "exp2": np.exp2,
    "expm1": np.expm1,
    "log": np.log,
    "log2": np.log2,
    "log10": np.log10,
    "log1p": np.log1p,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "cbrt": np.cbrt,
    "sin": np.sin,
    "cos": np.cos,
    "tan": np.tan,
    "arcsin": np.arcsin,
    "arccos": np.arccos,
    "arctan": np.arctan,
    "sinh": np.sinh,
    "cosh": np.cosh,
    "tanh": np.tanh,
    "arcsinh": np.arcsinh,
    "arccosh": np.arccosh,
    "arctanh": np.arctanh,
    "erf": np.vectorize(math.erf, otypes=[np.float64]),
}
EDGES = np.array(
    [
        0.0,
        -0.0,
        1.0,
        -1.0,
        np.inf,
        -np.inf,
        np.nan,
        1e-45,
        -1e-45,
        1.1754944e-38,
        3.4028235e38,
        -3.4028235e38,
        88.7,
        89.0,
        -103.9,
        -104.5,
        0.5,
        2.0,
        1e5,
        1e10,
        0.625,
        4.0,
    ],
    np.float32,
)


def samples() -> np.ndarray:
    """Every float32 exponent and sign with random mantissas, the edges, and the ranges where functions are busy."""
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, 200_000, dtype=np.uint64).astype(np.uint32).view(np.float32)
    near = np.concatenate([rng.uniform(-s, s, 20_000) for s in (1e-3, 1.0, 5.0, 20.0, 100.0, 1e4)])
    return np.concatenate([EDGES, bits, near.astype(np.float32)])


def run(name, *inputs):
    b = Body(inputs[0].shape)
    args = [b.load(x.dtype) for x in inputs]
    b.store(b.op(name, *args))
    return CpuExecutable(b.program())(list(inputs))[0]


def ulps(got: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """Distance in units of the last place of the exact result's float32 (float64) neighbourhood."""
    with np.errstate(all="ignore"):
        rounded = exact.astype(got.dtype)
        unit = np.spacing(np.abs(rounded)).astype(np.float64)
        distance = np.abs(got.astype(np.float64) - exact.astype(np.float64)) / unit
    same = (got == rounded) | (np.isnan(got) & np.isnan(rounded))
    return np.where(same, 0.0, np.where(np.isnan(distance), np.inf, distance))


@pytest.mark.parametrize("name", UNARY)
def test_float32_functions_are_within_two_ulp_everywhere(name):
    x = samples()
    with np.errstate(all="ignore"):
        exact = UNARY[name](x.astype(np.float64))
    got = run(name, x)
    error = ulps(got, exact)
    worst = int(np.argmax(error))
    assert error[worst] <= 2.0, (
        f"{name}({x[worst]!r}) = {got[worst]!r}, exact {exact[worst]!r}: {error[worst]:.2f} ulp"
    )


@pytest.mark.parametrize(
    "name",
    [
        "sin",
        "tan",
        "tanh",
        "expm1",
        "log1p",
        "arcsin",
        "arctan",
        "sinh",
        "arcsinh",
        "arctanh",
        "cbrt",
        "sqrt",
        "erf",
    ],
)
def test_signed_zero_is_kept(name):
    got = run(name, np.array([0.0, -0.0] * 8, np.float32))
    np.testing.assert_array_equal(np.signbit(got), [False, True] * 8)


@pytest.mark.parametrize("name", ["exp", "log", "tanh", "erf", "sin", "sqrt"])
def test_float64_functions_are_within_a_few_ulp(name):
    rng = np.random.default_rng(0)
    x = np.concatenate(
        [
            EDGES.astype(np.float64),
            rng.uniform(-30, 30, 5000),
            rng.uniform(-1, 1, 5000),
            10.0 ** rng.uniform(-300, 300, 5000),
        ]
    )
    with np.errstate(all="ignore"):
        exact = UNARY[name](x)
    assert ulps(run(name, x), exact).max() <= 4.0


def test_power_in_float32():
    rng = np.random.default_rng(0)
    special = np.array([0.0, -0.0, 1.0, -1.0, 2.0, -2.0, 0.5, -0.5, 3.0, np.inf, -np.inf, np.nan], np.float32)
    base, power = (g.ravel() for g in np.meshgrid(special, special))
    base = np.concatenate(
        [base, rng.uniform(0, 10, 20_000).astype(np.float32), rng.uniform(-10, 10, 2000).astype(np.float32)]
    )
    power = np.concatenate(
        [power, rng.uniform(-30, 30, 20_000).astype(np.float32), rng.integers(-9, 9, 2000).astype(np.float32)]
    )
    with np.errstate(all="ignore"):
        exact = np.power(base.astype(np.float64), power.astype(np.float64))
    got = run("pow", base, power)
    error = ulps(got, exact)
    worst = int(np.argmax(error))
    assert error[worst] <= 2.0, (base[worst], power[worst], got[worst], exact[worst])


def test_arctan2_in_all_quadrants():
    special = np.array([0.0, -0.0, 1.0, -1.0, 1e-40, -1e-40, np.inf, -np.inf, np.nan, 3e38, 5.5], np.float32)
    y, x = (g.ravel() for g in np.meshgrid(special, special))
    exact = np.arctan2(y.astype(np.float64), x.astype(np.float64))
    got = run("arctan2", y, x)
    assert ulps(got, exact).max() <= 1.0
    np.testing.assert_array_equal(np.signbit(got[got == 0]), np.signbit(exact[got == 0]))


@pytest.mark.parametrize("op, numpy_op", [("maximum", np.maximum), ("minimum", np.minimum)])
def test_nan_propagates_through_maximum_and_minimum(op, numpy_op):
    x, y = (g.ravel().astype(np.float32) for g in np.meshgrid(EDGES, EDGES))
    np.testing.assert_array_equal(run(op, x, y), numpy_op(x, y))


@pytest.mark.parametrize("dtype", ["int8", "int32", "int64", "uint8", "uint32", "float32", "float64"])
@pytest.mark.parametrize(
    "op, numpy_op", [("floordiv", np.floor_divide), ("mod", np.remainder), ("fmod", np.fmod)]
)
def test_division_rounds_like_numpy_and_never_traps(op, numpy_op, dtype):
    kind = np.dtype(dtype).kind
    if kind == "f":
        v = np.array([0.0, -0.0, 1.5, -1.5, 7.0, -7.0, 2.0, -2.0, 1e30, 0.1], dtype)
    else:
        info = np.iinfo(dtype)
        v = np.array(
            [info.min, info.max, 0, 1, 2, 3, 7, info.max // 2, *([-1, -2, -7] if kind == "i" else [])], dtype
        )
    x, y = (g.ravel() for g in np.meshgrid(v, v))
    with np.errstate(all="ignore"):
        want = numpy_op(x, y)
    np.testing.assert_array_equal(run(op, x, y), want)


@pytest.mark.parametrize("dtype", ["int8", "int32", "int64", "uint8", "uint16"])
@pytest.mark.parametrize("op, numpy_op", [("left_shift", np.left_shift), ("right_shift", np.right_shift)])
def test_shifts_beyond_the_width(op, numpy_op, dtype):
    info = np.iinfo(dtype)
    x, y = (
        g.ravel().astype(dtype) for g in np.meshgrid([info.min, info.max, 1, 5], [0, 1, 7, 8, 31, 32, 63, 64])
    )
    np.testing.assert_array_equal(run(op, x, y), numpy_op(x, y))


def test_integer_power_wraps():
    x, y = (
        g.ravel() for g in np.meshgrid(np.array([0, 1, -1, 2, -3, 10, 2**31]), np.array([0, 1, 2, 5, 63, 64]))
    )
    np.testing.assert_array_equal(run("pow", x, y), np.power(x, y))


@pytest.mark.parametrize(
    "src",
    ["bool", "int8", "uint8", "int16", "int32", "uint32", "int64", "uint64", "float16", "float32", "float64"],
)
@pytest.mark.parametrize(
    "dst",
    ["bool", "int8", "uint8", "int16", "int32", "uint32", "int64", "uint64", "float16", "float32", "float64"],
)
def test_conversions(src, dst):
    x = np.array([0, 1, 2, 3, 50, 100, 120] * 3).astype(src)
    if np.dtype(src).kind in "if" and np.dtype(dst).kind in "if":
        x = np.concatenate([x, -x])
    b = Body(x.shape)
    b.store(b.op("convert", b.load(src), dtype=dst))
    np.testing.assert_array_equal(CpuExecutable(b.program())([x])[0], x.astype(dst))


@pytest.mark.parametrize(
    "name, numpy_op",
    [
        ("sign", np.sign),
        ("floor", np.floor),
        ("ceil", np.ceil),
        ("rint", np.rint),
        ("trunc", np.trunc),
        ("abs", np.abs),
        ("neg", np.negative),
        ("reciprocal", np.reciprocal),
    ],
)
def test_simple_functions_are_exact(name, numpy_op):
    x = np.concatenate([EDGES, np.arange(-3, 3, 0.25, np.float32)])
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(run(name, x), numpy_op(x))


def test_float64_rounds_once_to_float16():
    """Every float16, the midpoints between neighbours, and values a hair beside those: no double rounding."""
    every = np.arange(65536, dtype=np.uint16).view(np.float16).astype(np.float64)
    every = np.sort(every[np.isfinite(every)])
    middle = (every[1:] + every[:-1]) / 2
    special = [np.inf, -np.inf, np.nan, 1e300, -1e300, 1e-300, 65519.999999, 65520.0, 5e-324]
    x = np.concatenate([every, middle, np.nextafter(middle, np.inf), np.nextafter(middle, -np.inf), special])
    b = Body(x.shape)
    b.store(b.op("convert", b.load("float64"), dtype="float16"))
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(CpuExecutable(b.program())([x])[0], x.astype(np.float16))


@pytest.mark.parametrize("shape", ["-x * x", "-abs(x)", "x - max(x)", "min(x, 0)"])
def test_exp_of_what_is_known_to_be_negative(shape):
    """The shorter exponential: denormal results, infinities and NaN payloads included."""
    x = samples()
    x = np.concatenate([x, np.array([0x7F800001, 0xFFC00123, 0x7FFFFFFF], np.uint32).view(np.float32)])
    x = np.resize(x, (len(x) // 512 + 1, 512))
    reduce_axes = (1,) if "max" in shape else ()
    b = Body(x.shape, reduce_axes)
    v = b.load(F32)
    if shape == "-x * x":
        with np.errstate(all="ignore"):
            argument, numpy = b.op("mul", b.op("neg", v), v), -x * x
    elif shape == "-abs(x)":
        argument, numpy = b.op("neg", b.op("abs", v)), -np.abs(x)
    elif shape == "min(x, 0)":
        argument, numpy = b.op("minimum", v, b.const(0.0)), np.minimum(x, np.float32(0))
    else:
        with np.errstate(all="ignore"):
            argument, numpy = b.op("sub", v, b.reduce("max", v)), x - x.max(1, keepdims=True)
    b.store(b.op("exp", argument))
    with np.errstate(all="ignore"):
        exact = np.exp(numpy.astype(np.float64))
    assert ulps(CpuExecutable(b.program())([x])[0], exact).max() <= 1.0
