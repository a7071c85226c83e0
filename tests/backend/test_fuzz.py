"""Random programs and their gradients: every backend agrees with NumPy up to what rounding explains.

``TRACEJIT_FUZZ`` sets how many programs run per backend (60 by default). ``python -m tests.fuzz --device cpu`` runs any
number of them outside of pytest.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest

import tracejit as tj
from tests.fuzz import _differences, compare, explain
from tests.fuzz_programs import NARROW_DTYPES, WIDE_DTYPES, random_program

COUNT = int(os.environ.get("TRACEJIT_FUZZ", "60"))
_BATCH = 20


@pytest.mark.parametrize("first", range(0, COUNT, _BATCH))
def test_random_programs(first: int, device: str) -> None:
    dtypes = NARROW_DTYPES if device == "wgpu" else WIDE_DTYPES
    for seed in range(first, min(first + _BATCH, COUNT)):
        program = random_program(seed, dtypes=dtypes)
        if compare(program, device):
            pytest.fail(explain(program, device), pytrace=False)


def test_a_view_that_is_stacked_with_itself(device: str) -> None:
    """Found by program 864: the second part was read from where the first had been written, with other strides."""
    x = np.arange(36, dtype=np.float32).reshape(3, 4, 3)

    def f(x: Any) -> Any:
        view = x[1].reshape(3, -1)
        return np.stack([view, view], axis=-1), np.concatenate([view.T, view.T])

    for got, expected in zip(tj.trace(f)(x, device=device), f(x), strict=True):
        np.testing.assert_array_equal(np.asarray(got), expected)


def test_a_wrong_result_is_noticed() -> None:
    """The measuring stick itself: a result that is off by a relative 1e-4 is reported, and so is a changed dtype."""
    x = np.linspace(0.5, 1, 9, dtype=np.float32)
    wide = x.astype(np.float64)
    options = {"exact": False, "eps": 1.2e-7, "slack": 64.0, "loose": False}
    assert not _differences("x", x, x, wide, [wide * (1 + 1e-7)], **options)
    assert _differences("x", x * np.float32(1.0001), x, wide, [wide * (1 + 1e-7)], **options)
    assert _differences("x", x.astype(np.float64), x, wide, [wide], **options)
    assert _differences("x", x[:3], x, wide, [wide], **options)
