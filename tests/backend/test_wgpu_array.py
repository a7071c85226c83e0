"""``tj.Array``: what a program on a device without host memory returns behaves like a read-only NumPy array."""

from __future__ import annotations

import copy
import operator
import pickle
import warnings
from typing import Any

import numpy as np
import pytest

import tracejit as tj
from tracejit_wgpu import runtime

X = np.array([[1.5, -2.0, 3.0], [0.0, 4.0, -0.5]], np.float32)


def on_device(x: np.ndarray) -> Any:
    """``x`` as a tj.Array."""
    return tj.trace(lambda v: v[...])(x, device="wgpu")


@pytest.fixture
def y() -> Any:
    return on_device(X)


def is_device(value: Any, expected: Any) -> None:
    """A result that stayed on the device, with NumPy's values, shape and dtype."""
    assert isinstance(value, tj.Array)
    expected = np.asarray(expected)
    assert value.shape == expected.shape and value.dtype == expected.dtype
    np.testing.assert_allclose(np.asarray(value), expected, rtol=1e-6)


def test_describes_itself_like_an_ndarray(y: Any) -> None:
    assert (y.shape, y.dtype, y.ndim, y.size, y.itemsize, y.nbytes) == ((2, 3), np.float32, 2, 6, 4, 24)
    assert y.device == "wgpu:0" and len(y) == 2
    assert repr(y) == (
        "Array([[ 1.5, -2. ,  3. ],\n       [ 0. ,  4. , -0.5]], dtype=float32, device='wgpu:0')"
    )
    assert str(y) == str(X)
    with pytest.raises(TypeError, match="unsized"):
        len(on_device(np.float32(1)))


def test_becomes_numpy_and_python(y: Any) -> None:
    host = np.asarray(y)
    np.testing.assert_array_equal(host, X)
    host[0, 0] = 9  # a copy: nothing on the device changes
    assert y[0, 0] == 1.5
    assert np.asarray(y, np.float64).dtype == np.float64
    with pytest.raises(ValueError, match="without a copy"):
        np.asarray(y, copy=False)
    one = on_device(np.array([2.75], np.float32))
    assert (float(one), int(one), bool(one), complex(one), one.item()) == (2.75, 2, True, 2.75, 2.75)
    assert f"{on_device(np.float32(1.25)):.1f}" == "1.2"
    assert [10, 20, 30][operator.index(on_device(np.int32(1)))] == 20
    assert y.tolist() == X.tolist()
    with pytest.raises(TypeError, match=r"one element.*\(2, 3\)"):
        float(y)
    with pytest.raises(ValueError, match="ambiguous"):
        bool(y)


def test_indexing_iteration_and_membership(y: Any) -> None:
    for key in (0, -1, slice(1), (1, 2), ..., None, [1, 0], X > 0, (slice(None), 1)):
        np.testing.assert_array_equal(y[key], X[key])
    with pytest.raises(IndexError):
        y[2]
    for got, row in zip(y, X, strict=True):
        np.testing.assert_array_equal(got, row)
    with pytest.raises(TypeError, match="0-d"):
        iter(on_device(np.float32(1)))
    assert 4.0 in y and 5.0 not in y


def test_cannot_be_changed(y: Any) -> None:
    with pytest.raises(TypeError, match=r"cannot be changed.*np\.array"):
        y[0] = 1
    with pytest.raises(TypeError, match="immutable"):
        np.add(X, X, out=y)
    for name in ("sort", "fill", "put", "resize"):  # on the host copy they would do nothing
        with pytest.raises(AttributeError, match="cannot be changed"):
            getattr(y, name)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        y.nothing


OPERATORS = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "truediv": operator.truediv,
    "pow": operator.pow, "floordiv": operator.floordiv, "mod": operator.mod, "lt": operator.lt, "eq": operator.eq,
    "ne": operator.ne,
}  # fmt: skip


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_with_every_kind_of_operand(name: str) -> None:
    op, host = OPERATORS[name], np.abs(X) + np.float32(0.5)
    y = on_device(host)
    for other in (on_device(host + 1), host[0] + 1, np.float32(2), 2, 1.5, True):
        plain = np.asarray(other) if isinstance(other, tj.Array) else other
        is_device(op(y, other), op(host, plain))
        is_device(op(other, y), op(plain, host))


def test_ufuncs_matmul_and_functions(y: Any) -> None:
    is_device(np.tanh(y), np.tanh(X))
    is_device(np.maximum(y, 0), np.maximum(X, 0))
    is_device(-y, -X)
    is_device(abs(y), abs(X))
    is_device(y @ X.T, X @ X.T)
    is_device(X @ on_device(X.T.copy()), X @ X.T)
    np.testing.assert_array_equal(np.concatenate([y, X]), np.concatenate([X, X]))
    np.testing.assert_allclose(np.mean(y, axis=0), X.mean(0))
    np.testing.assert_allclose(y.sum(), X.sum())
    np.testing.assert_array_equal(y.T, X.T)
    np.testing.assert_array_equal(np.add.reduce(y), X.sum(0))
    np.testing.assert_array_equal(np.divmod(y, 2)[1], X % 2)
    np.testing.assert_array_equal(np.add(y, 1, dtype=np.float64), np.add(X, 1, dtype=np.float64))
    host = X.copy()
    host += y  # NumPy's own in-place operators take one
    np.testing.assert_array_equal(host, 2 * X)


def test_in_place_operators_bind_the_name_to_a_new_array(y: Any) -> None:
    old = y
    y += 1
    y *= X
    is_device(y, (X + 1) * X)
    np.testing.assert_array_equal(old, X)


def test_many_shapes_are_no_retrace_storm() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for n in range(1, 40):
            assert (on_device(np.ones(n, np.float32)) * 3).shape == (n,)


def test_moves_between_devices(y: Any) -> None:
    assert y.to("wgpu") is y and y.to("wgpu:0") is y
    for device in ("cpu", "numpy"):
        host = y.to(device)
        assert type(host) is np.ndarray
        np.testing.assert_array_equal(host, X)
    double = tj.trace(lambda v: v * 2)
    np.testing.assert_array_equal(double(y, device="cpu"), X * 2)
    is_device(double(y, device="wgpu"), X * 2)
    with pytest.raises(tj.DeviceError, match="nothing"):
        y.to("nothing")


def test_copy_pickle_and_dlpack(y: Any) -> None:
    assert copy.copy(y) is y and copy.deepcopy({"w": y})["w"] is y
    loaded = pickle.loads(pickle.dumps(y))  # a pickle must open where there is no GPU
    assert type(loaded) is np.ndarray
    np.testing.assert_array_equal(loaded, X)
    assert y.__dlpack_device__() == (1, 0)
    np.testing.assert_array_equal(np.from_dlpack(y), X)


def test_saves_and_loads(y: Any, tmp_path: Any) -> None:
    path = tmp_path / "weights.safetensors"
    tj.save(path, {"w": y})
    np.testing.assert_array_equal(tj.load(path, like={"w": X})["w"], X)


def test_empty_bool_and_narrow_arrays() -> None:
    for host in (
        np.zeros((0, 3), np.float32), X > 0, np.arange(-3, 3, dtype=np.int8), np.arange(7, dtype=np.uint16),
        X.astype(np.float16), np.array(3, np.uint8),
    ):  # fmt: skip
        got = on_device(host)
        assert got.dtype == host.dtype and got.shape == host.shape
        np.testing.assert_array_equal(np.asarray(got), host)


def test_memory_returns_when_the_last_reference_goes() -> None:
    pool = runtime.get().pool
    x = np.zeros(1 << 20, np.float32)
    on_device(x)
    before = pool.in_use
    held = [on_device(x) for _ in range(5)]
    assert pool.in_use >= before + 5 * x.nbytes
    total = pool.total
    del held
    assert pool.in_use <= before
    assert on_device(x).nbytes == x.nbytes and pool.total == total  # from the pool, not from the driver
