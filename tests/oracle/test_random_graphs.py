"""Property tests: for random programs, the value is plain NumPy's and the gradient that of central differences.

The programs come from the rules of ``tests/fuzz_programs.py``, with every decision drawn by hypothesis, so that a failure
shrinks to a short program.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import HealthCheck, assume, given, note, settings
from hypothesis import strategies as st

import tracejit as tj
from tests.fuzz_programs import F32, F64, WIDE_DTYPES, Maker, Program, small_numbers


class Drawn:
    """Decisions drawn by hypothesis."""

    def __init__(self, draw: Any) -> None:
        self.draw = draw

    def integer(self, low: int, high: int) -> int:
        return self.draw(st.integers(low, high))

    def array(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        return small_numbers(np.random.default_rng(self.draw(st.integers(0, 1000))), shape, dtype)


@st.composite
def programs(draw: Any, dtypes: tuple[np.dtype, ...] = WIDE_DTYPES, most: int = 10) -> Program:
    steps = draw(st.integers(1, most))
    return Maker(Drawn(draw), 0, dtypes=dtypes).build(steps)


SETTINGS = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)


@SETTINGS
@given(programs())
def test_values_are_numpys(program: Program) -> None:
    note(str(program))
    fn = program.function()
    with np.errstate(all="ignore"):
        expected = fn(*program.arrays())
    got = tj.trace(fn)(*program.arrays(), device="numpy")
    for name, g, e in zip(program.outputs, got, expected):
        e = np.asarray(e)
        assert np.asarray(g).dtype == e.dtype, name
        assert np.shape(g) == e.shape, name
        if e.dtype.kind == "f" and e.size:
            eps = np.finfo(e.dtype).eps
            least = max(
                [eps, *(np.finfo(v.narrow.dtype).eps for v in program.values.values() if v.kind == "f")]
            )
            scale = np.abs(e).max() + 1
            np.testing.assert_allclose(g, e, rtol=500 * least, atol=500 * least * scale, err_msg=name)
        else:
            np.testing.assert_array_equal(g, e, err_msg=name)


@settings(SETTINGS, max_examples=150)
@given(programs(dtypes=(F64, F64, F64, np.dtype(np.int64), np.dtype(np.bool_)), most=7))
def test_gradients_are_central_differences(program: Program) -> None:
    floats = [v for v in program.inputs if v.kind == "f" and v.narrow.size]
    assume(floats)
    assume(sum(v.narrow.size for v in floats) <= 60)
    assume("stop_gradient" not in program.source())
    note(str(program))
    weights = {
        n: np.cos(np.arange(program.values[n].narrow.size)).reshape(program.values[n].shape)
        for n in program.outputs
    }
    run = program.function(wide=True)

    def loss(*arrays: Any) -> Any:
        total: Any = 0.0
        for name, value in zip(program.outputs, run(*arrays)):
            if program.values[name].kind == "f":
                total = total + (value * weights[name]).sum()
        return total

    rng = np.random.default_rng(1)
    arrays = program.arrays(wide=True)
    wrt = tuple(i for i, v in enumerate(program.inputs) if v.kind == "f")
    assume(any(program.values[n].kind == "f" for n in program.outputs))
    # Off the grid of small numbers, where kinks and ties of abs, max, sort and floor sit.
    for i in wrt:
        arrays[i] = np.asarray(arrays[i] + rng.uniform(0.011, 0.1, arrays[i].shape))
    with np.errstate(all="ignore"):
        gradients = tj.grad(loss, wrt=wrt)(*arrays)
        for i, gradient in zip(wrt, gradients):
            direction = rng.normal(size=arrays[i].shape)
            numeric = [difference(loss, arrays, i, direction, step) for step in (1e-4, 1e-5, 1e-6)]
            analytic = float((gradient * direction).sum())
            spread = max(abs(a - numeric[1]) for a in numeric)
            assume(np.isfinite(spread))
            # Close to a kink the quotients disagree among themselves; then they say nothing.
            assume(spread < 1e-3 * (1 + abs(numeric[1])))
            assert abs(analytic - numeric[1]) <= 2e-5 * (1 + abs(numeric[1])) + 3 * spread, (
                i,
                analytic,
                numeric,
            )


def difference(loss: Any, arrays: list[np.ndarray], which: int, direction: np.ndarray, step: float) -> float:
    """The central difference quotient of ``loss`` along ``direction``."""
    values = []
    for sign in (1, -1):
        moved = list(arrays)
        moved[which] = np.asarray(arrays[which] + sign * step * direction)
        values.append(float(loss(*moved)))
    return (values[0] - values[1]) / (2 * step)


def test_the_generator_reaches_what_it_should() -> None:
    """Two hundred programs use every rule's functions, several dtypes, and zero-size and 0-d arrays."""
    from tests.fuzz_programs import random_program

    text, dtypes, shapes = "", set(), set()
    for seed in range(200):
        program = random_program(seed)
        text += program.source()
        dtypes |= {v.narrow.dtype for v in program.values.values()}
        shapes |= {v.shape for v in program.values.values()}
    for name in (
        "tanh", "softmax", "layer_norm", "cumsum", "argmax", "sort", "where", "concatenate", "einsum", "@", "pad", "astype",
        "reshape", "take_along_axis", "swapaxes", "floor", "// ", "prod", "erf", "[::-1]", "np.max(", "broadcast_to",
    ):  # fmt: skip
        assert name in text, name
    assert {F32, F64, np.dtype(np.float16), np.dtype(np.int64), np.dtype(bool), np.dtype(np.uint8)} <= dtypes
    assert any(0 in s for s in shapes) and () in shapes and max(map(len, shapes)) >= 4
