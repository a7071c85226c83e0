"""``tj.Array``: what a device call returns behaves like an immutable NumPy array, wherever its memory is."""

from __future__ import annotations

import copy
import os
import pickle
from typing import Any

import numpy as np
import pytest

import tracejit as tj
from tracejit import backend

X = np.arange(6, dtype=np.float32).reshape(2, 3)


@pytest.fixture
def array() -> Any:
    """The result of a call on a device with memory of its own."""
    for name in backend.backend_names():
        found = backend.get_backend(name)
        if not found.on_host and any(d.available for d in found.devices()):
            return tj.trace(lambda x: x * 2, device=name)(X)
    if os.environ.get("TRACEJIT_REQUIRE_WGPU") == "1":
        pytest.fail("wgpu is required here but has no device")
    pytest.skip("no device with memory of its own is installed")


def test_operators_and_ufuncs_stay_on_the_device(array: Any) -> None:
    assert isinstance(array, tj.Array)
    for got, want in (
        (array + 1, X * 2 + 1),
        (2 - array, 2 - X * 2),
        (array > 3, X * 2 > 3),
        (-array, -X * 2),
        (array + array, X * 4),
        (np.tanh(array), np.tanh(X * 2)),
        (np.maximum(array, np.float32(3)), np.maximum(X * 2, 3)),
        (array + X, X * 3),
    ):
        assert isinstance(got, tj.Array)
        np.testing.assert_allclose(np.asarray(got), want, rtol=1e-5)


def test_a_ufunc_that_cannot_be_traced_runs_on_the_host(array: Any) -> None:
    np.testing.assert_array_equal(np.spacing(array), np.spacing(X * 2))


def test_everything_else_is_numpys_on_the_values(array: Any) -> None:
    assert (array.shape, array.dtype, array.ndim, array.size, len(array)) == ((2, 3), np.float32, 2, 6, 2)
    np.testing.assert_array_equal(array[1], X[1] * 2)
    np.testing.assert_array_equal(array.T, X.T * 2)
    np.testing.assert_array_equal(array.sum(axis=0), (X * 2).sum(axis=0))
    np.testing.assert_array_equal(np.concatenate([array, array]), np.concatenate([X * 2, X * 2]))
    np.testing.assert_array_equal(array @ array.T, X @ X.T * 4)
    assert array.tolist() == (X * 2).tolist()
    assert float(array[0, 1]) == 2.0
    assert str(X * 2) in repr(array).replace("      ", "") or "2." in str(array)
    assert f"{array.sum():.1f}" == "30.0"
    np.testing.assert_array_equal(np.stack(list(array)), X * 2)


def test_it_is_an_argument_like_any_array_and_uploads_nothing(array: Any) -> None:
    f = tj.trace(lambda x: x + 1, device=array.device)
    np.testing.assert_array_equal(np.asarray(f(array)), X * 2 + 1)
    np.testing.assert_array_equal(np.asarray(f(X)), X + 1)
    assert f.cache_info().misses == 1
    np.testing.assert_array_equal(tj.trace(lambda x: x + 1)(array, device="numpy"), X * 2 + 1)


def test_copies_and_pickles(array: Any) -> None:
    for twin in (copy.copy(array), copy.deepcopy(array), pickle.loads(pickle.dumps(array))):
        np.testing.assert_array_equal(np.asarray(twin), X * 2)
    with pytest.raises((TypeError, ValueError)):
        array[0] = 1
