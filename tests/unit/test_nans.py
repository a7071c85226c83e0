"""``tj.debug_nans``: the first NaN is named with its op, operands, forward source line and scope."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import numpy as np
import pytest

import tracejit as tj
from tracejit.events import Recorder, observe

X = np.array([1.0, -1.0, 4.0], np.float32)


def test_without_the_switch_nans_pass_silently() -> None:
    assert np.isnan(tj.trace(np.log)(X)[1])


def test_the_first_nan_is_named_with_op_line_and_operands(device: str) -> None:
    @tj.trace
    def f(x):
        y = x * 2
        with tj.named_scope("entropy"):
            z = np.log(y)
        return z.sum()

    with tj.debug_nans(), pytest.raises(tj.NonFiniteError) as info:
        f(X, device=device)
    message = str(info.value)
    assert message.startswith("[log] first NaN: 1 of 3 elements")
    assert re.search(r"at \S*test_nans.py:\d+ in entropy", message)
    assert "f32[3] in [-2, 8]" in message


def test_a_nan_in_the_gradient_names_the_forward_line() -> None:
    """``sqrt`` is fine at zero, its derivative times zero is not: the classic."""

    line = 0

    @tj.trace
    def loss(x):
        with tj.named_scope("norm"):
            nonlocal line
            line = sys._getframe().f_lineno + 1
            n = np.sqrt(x * x)
        return (n * 0.0).sum()

    gradient = tj.trace(tj.grad(loss))
    zero = np.zeros(3, np.float32)
    assert np.isnan(gradient(zero)).all()
    with tj.debug_nans(), pytest.raises(tj.NonFiniteError) as info:
        gradient(zero)
    message = str(info.value)
    assert "in the gradient of sqrt" in message
    assert re.search(rf"at \S*test_nans.py:{line} in \S*norm", message)


def test_an_input_that_is_already_nan_is_said_to_be_so() -> None:
    with (
        tj.debug_nans(),
        pytest.raises(tj.NonFiniteError, match=r"input params\['w'\] already holds 1 NaN in 3"),
    ):
        tj.trace(lambda params: params["w"] * 2)({"w": np.array([1.0, np.nan, 2.0])})


def test_infinities_alone_are_no_error() -> None:
    with tj.debug_nans():
        assert np.isinf(tj.trace(lambda x: 1 / x)(np.zeros(1))).all()


def test_results_are_the_same(device: str) -> None:
    f = tj.trace(lambda x: {"a": np.tanh(x) @ x, "b": [x.sum(), x > 0]})
    plain = f(X, device=device)
    with tj.debug_nans():
        checked = f(X, device=device)
    np.testing.assert_allclose(np.asarray(checked["a"]), np.asarray(plain["a"]), rtol=1e-6)
    np.testing.assert_array_equal(np.asarray(checked["b"][1]), np.asarray(plain["b"][1]))
    assert type(checked["b"][0]) is type(plain["b"][0])


def test_control_flow_random_numbers_and_custom_rules_are_followed() -> None:
    def f(x):
        total, _ = tj.scan(lambda c, v: (c + np.log(v), None), np.float32(0), x)
        return total + tj.nn.gelu(x).sum() + tj.cond(total > 0, lambda: 1.0, lambda: 2.0)

    with tj.debug_nans():
        value = tj.trace(f)(np.abs(X))
        assert value == pytest.approx(float(tj.trace(f)(np.abs(X))), rel=1e-6)
        with pytest.raises(tj.NonFiniteError, match=r"^\[log\] first NaN: 1 of 1") as info:
            tj.trace(f)(X)
    assert "operand 0 (x): f32[] in [-1, -1]" in str(info.value), "inside the loop, at the second step"


def test_observers_learn_the_node() -> None:
    recorder = Recorder()
    with tj.debug_nans(), observe(recorder), pytest.raises(tj.NonFiniteError):
        tj.trace(lambda x: np.log(x * 2))(X)
    (step,) = recorder.steps
    nodes = recorder.compiles[0].graph["nodes"]
    assert nodes[step.nan_node]["op"] == "log"


def test_the_error_is_a_floating_point_error() -> None:
    with tj.debug_nans(), pytest.raises(FloatingPointError):
        tj.trace(np.log)(X)


def test_the_switch_nests_and_ends() -> None:
    f = tj.trace(np.log)
    with tj.debug_nans():
        with tj.debug_nans(False):
            f(X)
        with pytest.raises(tj.NonFiniteError):
            f(X)
    f(X)


def test_the_switch_in_the_environment() -> None:
    code = (
        "import numpy as np, tracejit as tj\n"
        "try: tj.trace(np.log)(-np.ones(3))\n"
        "except tj.NonFiniteError as e: print(e)\n"
    )
    out = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "TRACEJIT_DEBUG_NANS": "1"},
    )
    assert out.stdout.startswith("[log] first NaN"), out.stderr
