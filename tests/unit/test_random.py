"""``tj.random``: fixed numbers, the same traced or not, independent keys, and the right distributions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import tracejit as tj
from tests.unit._evaluate import run
from tracejit import random
from tracejit.errors import DTypeError, ShapeError

KEY = random.key(42)


def kolmogorov(sample: np.ndarray, cdf: Callable[[np.ndarray], np.ndarray]) -> float:
    """√n · the largest distance between the empirical and the true distribution; below 1.95 in 99.9 % of all
    cases."""
    values = np.sort(sample.astype(np.float64).ravel())
    n = len(values)
    exact = cdf(values)
    steps = np.arange(n + 1) / n
    return float(np.sqrt(n) * max(np.max(steps[1:] - exact), np.max(exact - steps[:-1])))


def normal_cdf(x: np.ndarray) -> np.ndarray:
    return (1 + tj.erf(x / np.sqrt(2))) / 2


# -- fixed numbers ---------------------------------------------------------------------------------


def test_numbers_are_pinned() -> None:
    """Saved models and papers depend on these; a change here is a breaking change."""
    key = random.key(0)
    np.testing.assert_array_equal(key, np.array([0, 0], np.uint32))
    assert random.bits(key, (2,)).tolist() == [0x6B200159, random.bits(key, (2,)).tolist()[1]]
    np.testing.assert_array_equal(random.split(key), [[2727313097, 782797610], [854515392, 596030429]])
    np.testing.assert_array_equal(random.fold_in(key, 3), [1594409478, 122326284])
    np.testing.assert_array_equal(random.uniform(key, (1,)), np.float32([(0x6B200159 >> 8) * 2.0**-24]))


CALLS: dict[str, Callable[[Any], Any]] = {
    "split": lambda k: random.split(k, 3),
    "fold_in": lambda k: random.fold_in(k, 7),
    "bits": lambda k: random.bits(k, (5,)),
    "bits8": lambda k: random.bits(k, (5,), np.uint8),
    "bits64": lambda k: random.bits(k, (5,), np.uint64),
    "uniform": lambda k: random.uniform(k, (3, 4)),
    "uniform16": lambda k: random.uniform(k, (5,), np.float16),
    "uniform64": lambda k: random.uniform(k, (5,), np.float64, -2.0, 3.0),
    "normal": lambda k: random.normal(k, (3, 4)),
    "normal16": lambda k: random.normal(k, (5,), np.float16),
    "normal64": lambda k: random.normal(k, (5,), np.float64),
    "exponential": lambda k: random.exponential(k, (5,)),
    "gumbel": lambda k: random.gumbel(k, (5,)),
    "bernoulli": lambda k: random.bernoulli(k, 0.3, (9,)),
    "bernoulli_array": lambda k: random.bernoulli(k, np.float32([0.0, 1.0, 0.5])),
    "randint": lambda k: random.randint(k, (9,), -5, 12),
    "randint_wide": lambda k: random.randint(k, (9,), -(2**31), 2**31),
    "randint_array": lambda k: random.randint(k, (2, 3), [0, 10, 20], [1, 20, 40], np.int64),
    "permutation": lambda k: random.permutation(k, 10),
    "permutation_array": lambda k: random.permutation(k, np.arange(6.0).reshape(2, 3), axis=1),
    "categorical": lambda k: random.categorical(k, np.log([0.2, 0.3, 0.5]), shape=(9,)),
}


@pytest.mark.parametrize("name", CALLS)
def test_the_same_traced_or_not(name: str) -> None:
    concrete = np.asarray(CALLS[name](KEY))
    (traced,) = (np.asarray(v) for v in run(CALLS[name], KEY))
    assert (traced.shape, traced.dtype) == (concrete.shape, concrete.dtype)
    np.testing.assert_array_equal(traced, concrete)


WIDE = (
    "bits64",
    "uniform64",
    "normal64",
)  # 64-bit results, which a GPU does not have (it computes 32 bits and warns)


def _compare_on(device: str, name: str) -> None:
    """Integers, plain uniforms and normals bit for bit, the others to the rounding of logarithms."""
    expected = np.asarray(CALLS[name](KEY))
    actual = np.asarray(tj.trace(CALLS[name])(KEY, device=device))
    exact = name.startswith("normal") and "16" not in name and device in ("numpy", "cpu")
    if expected.dtype.kind != "f" or name == "uniform" or exact:
        np.testing.assert_array_equal(actual, expected)
    else:
        tolerance = 4e-3 if "16" in name else 1e-13 if "64" in name else 4e-6
        np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.filterwarnings("ignore:.*64-bit types")
@pytest.mark.parametrize("name", [n for n in CALLS if n not in WIDE])
def test_the_same_on_every_device(name: str, device: str) -> None:
    _compare_on(device, name)


@pytest.mark.parametrize("name", WIDE)
@pytest.mark.parametrize("processor", ["numpy", "cpu"])
def test_64_bit_numbers_are_the_same_on_processors(name: str, processor: str) -> None:
    _compare_on(processor, name)


def test_a_key_of_the_surroundings_is_captured_not_frozen() -> None:
    holder = np.array(KEY)
    draw = tj.trace(lambda x: x + random.uniform(holder, (3,)))
    first = draw(np.zeros(3, np.float32), device="numpy")
    holder[:] = random.key(7)
    second = draw(np.zeros(3, np.float32), device="numpy")
    np.testing.assert_array_equal(first, random.uniform(KEY, (3,)))
    np.testing.assert_array_equal(second, random.uniform(random.key(7), (3,)))


def test_traced_seeds_steps_and_bounds() -> None:
    (key,) = run(lambda s: random.key(s), np.int64(42))
    np.testing.assert_array_equal(key, KEY)
    (folded,) = run(lambda s: random.fold_in(KEY, s), np.int32(7))
    np.testing.assert_array_equal(folded, random.fold_in(KEY, 7))
    (drawn,) = run(lambda lo, hi: random.randint(KEY, (20,), lo, hi), np.int64(-3), np.int64(4))
    np.testing.assert_array_equal(drawn, random.randint(KEY, (20,), -3, 4))
    (u,) = run(lambda lo: random.uniform(KEY, (4,), low=lo, high=2.0), np.float32(1))
    np.testing.assert_array_equal(u, random.uniform(KEY, (4,), low=1.0, high=2.0))


def test_a_prefix_does_not_depend_on_the_length() -> None:
    np.testing.assert_array_equal(random.bits(KEY, (10,)), random.bits(KEY, (1000,))[:10])
    np.testing.assert_array_equal(random.normal(KEY, (6,)).reshape(2, 3), random.normal(KEY, (2, 3)))


# -- distributions ---------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, 2**40 + 5])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_uniform_and_normal_have_their_distributions(seed: int, dtype: type) -> None:
    key, n = random.key(seed), 40_000
    u = random.uniform(key, (n,), dtype)
    assert u.dtype == dtype and u.min() >= 0 and u.max() < 1
    assert kolmogorov(u, lambda x: x) < 1.95
    z = random.normal(key, (n,), dtype)
    assert z.dtype == dtype
    assert kolmogorov(z, normal_cdf) < 1.95
    assert abs(z.mean()) < 4 / np.sqrt(n) and abs(z.var() - 1) < 4 * np.sqrt(2 / n)


def test_float16_and_exponential_and_gumbel() -> None:
    n = 40_000
    u = random.uniform(KEY, (n,), np.float16).astype(np.float64)
    assert u.min() >= 0 and u.max() < 1 and abs(u.mean() - 0.5) < 4 / np.sqrt(12 * n) + 2.0**-12
    e = random.exponential(KEY, (n,))
    assert kolmogorov(e, lambda x: 1 - np.exp(-x)) < 1.95
    g = random.gumbel(KEY, (n,))
    assert np.isfinite(g).all() and kolmogorov(g, lambda x: np.exp(-np.exp(-x))) < 1.95


def test_uniform_stays_below_its_upper_end() -> None:
    """Rounding up to ``high`` is likely here: the interval holds few float32 numbers."""
    u = random.uniform(
        KEY, (100_000,), np.float32, 1.0, np.nextafter(np.float32(1), np.float32(2)) + np.float32(3e-7)
    )
    assert u.min() >= 1.0 and u.max() < np.nextafter(np.float32(1), np.float32(2)) + np.float32(3e-7)


def test_normal_quantiles_are_accurate() -> None:
    """The quantile function of the normal distribution at powers of two, and single against double."""
    q = np.array([0.0, 0.4, 2.0**-10 - 0.5, 2.0**-30 - 0.5, 2.0**-52 - 0.5])
    exact = [0.0, 1.2815515655446004, -3.0972690781987846, -6.009353565530744, -8.125890664701908]
    np.testing.assert_allclose(random._normal_quantile64(q), exact, rtol=1e-15, atol=1e-16)
    np.testing.assert_allclose(random._normal_quantile64(-q), np.negative(exact), rtol=1e-15, atol=1e-16)
    cells = ((np.arange(-(2**23), 2**23, 1009) + 0.5) * 2.0**-24).astype(np.float32)
    single, double = random._normal_quantile32(cells), random._normal_quantile64(cells.astype(np.float64))
    np.testing.assert_allclose(single, double, rtol=2e-6, atol=2e-7)


@pytest.mark.parametrize(("low", "high"), [(0, 6), (-3, 4), (0, 1000)])
def test_randint_is_even(low: int, high: int) -> None:
    n = 60_000
    values = random.randint(KEY, (n,), low, high)
    assert values.dtype == np.int32 and values.min() >= low and values.max() < high
    k = high - low
    counts = np.bincount(values - low, minlength=k)
    chi2 = ((counts - n / k) ** 2 / (n / k)).sum()
    assert abs(chi2 - (k - 1)) < 4 * np.sqrt(2 * (k - 1)) + 4


def test_randint_is_exact_arithmetic() -> None:
    """⌊b · span / 2⁶⁴⌋ in Python's integers."""
    words = random.bits(KEY, (2, 50)).astype(object)
    for low, high in ((0, 7), (-5, 2**31 - 1), (-(2**31), 2**31), (0, 2**32 - 1)):
        drawn = random.randint(KEY, (50,), low, high, np.int64)
        b = words[0] * 2**32 + words[1]
        np.testing.assert_array_equal(drawn, (b * (high - low) // 2**64 + low).astype(np.int64))


def test_bernoulli_and_categorical_have_their_frequencies() -> None:
    n = 40_000
    assert abs(random.bernoulli(KEY, 0.3, (n,)).mean() - 0.3) < 4 * np.sqrt(0.21 / n)
    np.testing.assert_array_equal(random.bernoulli(KEY, np.array([0.0, 1.0])), [False, True])
    p = np.array([0.1, 0.2, 0.7])
    drawn = random.categorical(KEY, np.log(p), shape=(n,))
    assert drawn.dtype == np.int64
    np.testing.assert_allclose(np.bincount(drawn) / n, p, atol=4 * np.sqrt(0.25 / n))
    rows = random.categorical(KEY, np.log(np.stack([p, p[::-1]], 1)), axis=0, shape=(n, 2))
    np.testing.assert_allclose(np.bincount(rows[:, 1]) / n, p[::-1], atol=4 * np.sqrt(0.25 / n))


def test_permutations_are_permutations_and_fair() -> None:
    np.testing.assert_array_equal(np.sort(random.permutation(KEY, 1000)), np.arange(1000))
    first = [int(random.permutation(k, 4)[0]) for k in random.split(KEY, 2000)]
    np.testing.assert_allclose(np.bincount(first) / 2000, 0.25, atol=4 * np.sqrt(0.1875 / 2000))
    x = np.arange(12).reshape(3, 4)
    mixed = random.permutation(KEY, x, axis=1)
    np.testing.assert_array_equal(np.sort(mixed, axis=1), x)
    assert random.permutation(KEY, 0).shape == (0,)
    assert random.permutation(KEY, 1).tolist() == [0]


# -- independence ----------------------------------------------------------------------------------


def test_keys_give_uncorrelated_numbers() -> None:
    n = 20_000
    keys = [
        random.key(0),
        random.key(1),
        *random.split(random.key(0), 4),
        *(random.fold_in(KEY, i) for i in range(4)),
    ]
    samples = np.stack([random.normal(k, (n,)) for k in keys])
    correlation = np.corrcoef(samples) - np.eye(len(keys))
    assert np.abs(correlation).max() < 4.5 / np.sqrt(n)
    z = samples[0]
    for lag in (1, 2, 7):  # and within one sequence
        assert abs(np.corrcoef(z[:-lag], z[lag:])[0, 1]) < 4.5 / np.sqrt(n)


def test_derived_keys_are_all_different() -> None:
    keys = [tuple(k) for seed in range(50) for k in random.split(random.key(seed), 20)]
    keys += [tuple(random.fold_in(random.key(seed), i)) for seed in range(50) for i in range(20)]
    assert len(set(map(tuple, np.array(keys).tolist()))) == len(keys)
    assert random.split(KEY, (2, 3)).shape == (2, 3, 2)


def test_every_bit_is_fair() -> None:
    words = random.bits(KEY, (20_000,))
    ones = ((words[:, None] >> np.arange(32, dtype=np.uint32)) & 1).mean(axis=0)
    assert np.abs(ones - 0.5).max() < 4.5 * 0.5 / np.sqrt(20_000)


# -- mistakes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: random.uniform(42, (3,)), DTypeError, r"tj\.random\.key"),
        (lambda: random.uniform(np.zeros(2), (3,)), DTypeError, "uint32"),
        (lambda: random.normal(random.split(KEY, 2), (3,)), DTypeError, r"uint32\[2\]"),
        (lambda: random.key(1.5), DTypeError, "integer"),
        (lambda: random.uniform(KEY, (3,), np.int32), DTypeError, "float"),
        (lambda: random.bits(KEY, (3,), np.int32), DTypeError, "unsigned"),
        (lambda: random.randint(KEY, (3,), 5, 5), ShapeError, "greater"),
        (lambda: random.randint(KEY, (3,), 0, 300, np.uint8), DTypeError, "does not fit"),
        (lambda: random.randint(KEY, (3,), 0, 2, np.float32), DTypeError, "integers"),
        (lambda: random.permutation(KEY, -1), ShapeError, "-1"),
        (lambda: random.categorical(KEY, np.zeros((2, 3)), shape=(5, 4)), ShapeError, "must end with"),
        (lambda: random.uniform(KEY, "ab"), TypeError, "shape"),
    ],
)
def test_mistakes_are_explained(call: Callable[[], Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_many_normal_numbers_are_bit_for_bit_the_same_on_processors(dtype: Any) -> None:
    draw = tj.trace(lambda key: random.normal(key, (20_000,), dtype))
    reference, native = draw(KEY, device="numpy"), draw(KEY, device="cpu")
    np.testing.assert_array_equal(reference, native)
    np.testing.assert_array_equal(reference, random.normal(KEY, (20_000,), dtype))


def test_the_logarithm_of_normal_numbers_is_one() -> None:
    u = np.concatenate([2.0 ** -np.arange(0.0, 60.0), np.linspace(1e-9, 1.0, 10_001)])
    np.testing.assert_allclose(random._minus_log(u), -np.log(u), rtol=2e-15, atol=1e-16)
    narrow = u[u > 2.0**-60].astype(np.float32)
    np.testing.assert_allclose(random._minus_log(narrow), -np.log(narrow), rtol=4e-7, atol=1e-7)
