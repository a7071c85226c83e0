"""Types and special values on wgpu: the 64-bit rule, narrow types, NaN, infinities, signed zeros, determinism."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import tracejit as tj
from tracejit import nn, random
from tracejit_wgpu import transfer

RNG = np.random.default_rng(0)
NAN, INF = np.nan, np.inf
SPECIAL = np.array([NAN, INF, -INF, 0.0, -0.0, 1.0, -1.5, 3e37, -3e37, 1e-30, 2.5, -0.5], np.float32)


def run(f: Callable[..., Any], *arrays: np.ndarray) -> np.ndarray:
    return np.asarray(tj.trace(f)(*arrays, device="wgpu"))


def normal(x: np.ndarray) -> np.ndarray:
    """Denormal numbers become zeros: a device may flush them, in operands and results."""
    return (
        np.where(np.abs(x) < np.finfo(np.float32).tiny, np.copysign(0, x), x) if x.dtype == np.float32 else x
    )


def same_bits(got: np.ndarray, expected: np.ndarray) -> None:
    """Equal values, NaN where NaN, and the same sign of zeros."""
    got, expected = normal(got), normal(expected)
    np.testing.assert_array_equal(got, expected)
    if np.asarray(expected).dtype.kind == "f":
        zeros = expected == 0
        np.testing.assert_array_equal(np.signbit(got[zeros]), np.signbit(expected[zeros]))


# -- 64 bits ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "words"), [("float64", "computed as float32"), ("int64", "computed as 32-bit")]
)
def test_one_warning_that_names_the_users_line(
    dtype: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "_warned", set())
    x = np.arange(4).astype(dtype)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for k in range(3):
            y = tj.trace(lambda x, k=k: x * 2 + k)(x, device="wgpu")
    assert len(caught) == 1 and words in str(caught[0].message) and caught[0].filename == __file__
    assert y.dtype == dtype  # what NumPy would give; the values have 32 bits
    np.testing.assert_array_equal(np.asarray(y), x * 2 + 2)


def test_no_warning_where_32_bits_lose_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "_warned", set())
    table, ids = RNG.standard_normal((9, 4)).astype(np.float32), RNG.integers(0, 9, (2, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same_bits(run(lambda t, i: t[i], table, ids), table[ids])
        same_bits(run(lambda i, t: (i == 3) * t[0, 0], ids, table), (ids == 3) * table[0, 0])
        np.testing.assert_allclose(
            run(lambda x: x * 2.5 + 3, table), table * np.float32(2.5) + np.float32(3), rtol=1e-6
        )


@pytest.mark.filterwarnings("ignore:WebGPU has no 64-bit types")
def test_integers_that_do_not_fit_are_an_error_never_wrapped() -> None:
    f = tj.trace(lambda x: x + 1)
    for value, dtype, word in (
        (2**31, np.int64, "int32"),
        (-(2**31) - 1, np.int64, "int32"),
        (2**32, np.uint64, "uint32"),
    ):
        with pytest.raises(tj.DTypeError, match=rf"value {value} does not fit {word}.*device='cpu'"):
            f(np.array([1, value], dtype), device="wgpu")
    with pytest.raises((tj.DTypeError, OverflowError), match=r"fit|large"):
        tj.trace(lambda x, k: x + k)(np.arange(3, dtype=np.int32), 2**40, device="wgpu")
    edge = np.array([2**31 - 1, -(2**31)], np.int64)
    np.testing.assert_array_equal(run(lambda x: x * 1, edge), edge)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(
            run(lambda x: x * 1, np.array([1e300])), [INF]
        )  # as astype(float32) does


def test_narrow_integers_wrap_like_numpys() -> None:
    for dtype in (np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32):
        info = np.iinfo(dtype)
        x = np.array([info.min, info.max, 1, 3, 100], dtype)
        with np.errstate(over="ignore"):
            for f in (
                lambda v: v + v,
                lambda v: v * v,
                lambda v: v - 3,
                lambda v: -v,
                lambda v: ~v,
                lambda v: v.cumsum(dtype=v.dtype),
            ):
                got, expected = run(f, x), f(x)
                assert got.dtype == expected.dtype
                np.testing.assert_array_equal(got, expected)


# -- float16 ---------------------------------------------------------------------------------------------------------

HALVES = np.concatenate(
    [
        np.array([NAN, INF, -INF, 0.0, -0.0, 65504.0, 6e-8, -6e-8, 6.1e-5, 1.0009765625], np.float16),
        RNG.standard_normal(200).astype(np.float16),
        (RNG.standard_normal(100) * 1e-5).astype(np.float16),
    ]
)


@pytest.mark.parametrize("limits", ["", "default"])
def test_float16_rounds_after_every_operation(limits: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With shader-f16 and, with the default limits, without: kept in 32 bits, rounded to 16 after each operation."""
    monkeypatch.setenv("TRACEJIT_WGPU_LIMITS", limits)
    x = HALVES
    y = np.roll(x, 7)
    forms = (
        lambda a, b: a + b, lambda a, b: a * b - b, lambda a, b: a / b, lambda a, b: np.maximum(a, b),
        lambda a, b: np.sqrt(np.abs(a)) + b, lambda a, b: a < b, lambda a, b: -a,
    )  # fmt: skip
    with np.errstate(all="ignore"):
        for f in forms:
            got, expected = run(f, x, y), f(x, y)
            assert got.dtype == expected.dtype
            np.testing.assert_array_equal(got, expected)
    a, b = x[10:210].reshape(10, 20), x[10:210].reshape(20, 10)
    np.testing.assert_allclose(
        run(lambda a, b: a @ b, a, b), a.astype(np.float32) @ b.astype(np.float32), rtol=2e-3, atol=2e-3
    )
    np.testing.assert_allclose(run(lambda a: a.sum(1), a), a.astype(np.float32).sum(1), rtol=2e-3, atol=4e-3)


# -- special values --------------------------------------------------------------------------------------------------

UNARY = {
    "neg": np.negative, "abs": np.abs, "sign": np.sign, "floor": np.floor, "ceil": np.ceil,
    "trunc": np.trunc, "rint": np.rint,
    "sqrt": np.sqrt, "isnan": np.isnan, "isinf": np.isinf, "isfinite": np.isfinite, "x*0": lambda x: x * 0,
    "x/0": lambda x: x / 0, "0/x": lambda x: 0 / x, "1/x": lambda x: 1 / x, "x-x": lambda x: x - x, "x/x": lambda x: x / x,
    "x*-0": lambda x: x * np.float32(-0.0), "x*inf": lambda x: x * np.float32(INF), "x+inf": lambda x: x + np.float32(INF),
    "x*1": lambda x: x * 1, "x==x": lambda x: x == x, "x!=x": lambda x: x != x, "x>0": lambda x: x > 0,
    "bool": lambda x: x.astype(bool),
    "where": lambda x: np.where(x > 0, x, -x), "clip": lambda x: np.clip(x, -1, 1), "maximum": lambda x: np.maximum(x, 0.5),
    "minimum": lambda x: np.minimum(x, np.float32(NAN)),
}  # fmt: skip


@pytest.mark.parametrize("name", UNARY)
def test_special_values_are_numpys(name: str) -> None:
    with np.errstate(all="ignore"):
        got, expected = run(UNARY[name], SPECIAL), UNARY[name](SPECIAL)
    if name == "1/x":
        np.testing.assert_allclose(normal(got), normal(expected), rtol=4e-7)
    else:
        same_bits(got, expected)


BINARY = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide, "maximum": np.maximum, "minimum": np.minimum,
    "less": np.less, "not_equal": np.not_equal, "copysign": np.copysign, "floordiv": np.floor_divide, "mod": np.mod,
    "fmod": np.fmod,
}  # fmt: skip


@pytest.mark.parametrize("name", BINARY)
def test_every_pair_of_special_values(name: str) -> None:
    a, b = (v.ravel() for v in np.meshgrid(SPECIAL, SPECIAL))
    with np.errstate(all="ignore"):
        expected = BINARY[name](a, b)
        got = run(BINARY[name], a, b)
    # Vulkan asks 2.5 ulp of a division, and nothing where the divisor is beyond 2^126.
    rtol = 4e-7 if name in ("div", "floordiv") else 0
    np.testing.assert_allclose(normal(got), normal(expected), rtol=rtol)


@pytest.mark.parametrize("size", [7, 300, 20_000])
def test_reductions_carry_nan_like_numpy(size: int) -> None:
    x = RNG.standard_normal((3, size)).astype(np.float32)
    x[0, size // 2] = x[0, size // 3] = NAN
    x[1, size - 1] = INF
    x[1, 0] = -INF
    forms = (
        lambda v: v.max(1), lambda v: v.min(1), lambda v: v.argmax(1), lambda v: v.argmin(1), lambda v: v.sum(1)[:2],
        lambda v: np.any(np.isnan(v), axis=1), lambda v: np.sort(v, 1), lambda v: np.argsort(v, 1, kind="stable"),
        lambda v: v.max(),
    )  # fmt: skip
    with np.errstate(all="ignore"):
        for f in forms:
            np.testing.assert_array_equal(run(f, x), f(x))


def test_sorting_is_stable_and_puts_nan_last() -> None:
    x = np.concatenate([SPECIAL, RNG.integers(0, 5, 5000).astype(np.float32)])
    np.testing.assert_array_equal(run(np.sort, x), np.sort(x))
    np.testing.assert_array_equal(
        run(lambda v: np.argsort(v, kind="stable"), x), np.argsort(x, kind="stable")
    )
    for dtype in (np.int32, np.uint32, np.int8, bool):
        y = RNG.integers(-100, 100, 3000).astype(dtype)
        np.testing.assert_array_equal(run(np.sort, y), np.sort(y))


# -- determinism -----------------------------------------------------------------------------------------------------


def test_scatter_and_sums_give_the_same_bits_every_time() -> None:
    """Many updates of one row, of many sizes: no atomics, a fixed order."""
    ids = RNG.integers(0, 5, 4000).astype(np.int32)
    rows = (RNG.standard_normal((4000, 8)) * 10.0 ** RNG.integers(-3, 4, (4000, 1))).astype(np.float32)

    @tj.trace(device="wgpu")
    def f(table: Any, ids: Any, rows: Any) -> Any:
        return tj.grad(lambda t: (t[ids] * rows).sum())(table), rows.sum(0), rows.sum(), np.cumsum(rows, 0)

    table = np.zeros((5, 8), np.float32)
    first = [np.asarray(v) for v in f(table, ids, rows)]
    expected = np.zeros((5, 8))
    np.add.at(expected, ids, rows.astype(np.float64))
    np.testing.assert_allclose(first[0], expected, rtol=1e-4, atol=1e-2)
    for _ in range(4):
        for got, want in zip(f(table, ids, rows), first, strict=True):
            assert np.asarray(got).tobytes() == want.tobytes()


def test_random_numbers_equal_the_cpus_bit_for_bit() -> None:
    key = random.key(2024)
    draws = {
        "bits": lambda k: random.bits(k, (1000,)),
        "uniform": lambda k: random.uniform(k, (1000,)),
        "bernoulli": lambda k: random.bernoulli(k, 0.3, (1000,)),
        "permutation": lambda k: random.permutation(k, 257),
        "randint": lambda k: random.randint(k, (1000,), -50, 50),
        "split": lambda k: random.split(k, 5),
    }
    for name, draw in draws.items():
        cpu = np.asarray(tj.trace(draw)(key, device="cpu"))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "WebGPU has no 64-bit types")
            gpu = np.asarray(tj.trace(draw)(key, device="wgpu"))
        assert gpu.dtype == cpu.dtype and gpu.tobytes() == cpu.tobytes(), name


def test_another_process_gives_the_same_bits() -> None:
    code = """
import numpy as np, tracejit as tj
from tests.backend.test_wgpu_dtypes import mixture
print(mixture().hex())
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == mixture().hex()


def mixture() -> bytes:
    """The bytes of a result that went through transcendental functions and reductions."""
    x = np.random.default_rng(0).standard_normal((65, 70)).astype(np.float32)
    return run(lambda x: nn.softmax(np.tanh(x) * np.exp(x)).sum(0), x).tobytes()
