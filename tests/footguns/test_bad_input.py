"""Bad and unusual input: each is a clear error that names the argument, or NumPy's behaviour, on every device.

Nothing is lost by a refused call: the cache stays clean and the next good call works.
"""

from __future__ import annotations

import datetime
import pathlib
import subprocess
import sys
import textwrap
from collections import OrderedDict, defaultdict, namedtuple
from typing import Any

import numpy as np
import pytest

import tracejit as tj

X = np.arange(6, dtype=np.float32).reshape(2, 3)


def double(x):
    return x * 2


def same(got: Any, expected: Any) -> None:
    """Equal values; devices without 64-bit types may return 32-bit ones."""
    got, expected = np.asarray(got), np.asarray(expected)
    assert got.shape == expected.shape
    assert got.dtype.kind == expected.dtype.kind
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


# -- arrays that no device takes -------------------------------------------------------------------------------------

REFUSED = {
    "objects": (np.array([1, None, "a"], dtype=object), "Python objects"),
    "None among numbers": (np.array([1.0, None]), "Python objects"),
    "strings": (np.array(["a", "b"]), "strings"),
    "byte strings": (np.array([b"a", b"b"]), "byte strings"),
    "structured": (np.zeros(3, dtype=[("x", "f4"), ("y", "i4")]), "structured"),
    "record array": (np.zeros(3, dtype=[("x", "f4")]).view(np.recarray), "structured"),
    "complex": (np.array([1 + 2j]), "complex"),
    "complex64": (np.zeros(2, np.complex64), "complex"),
    "dates": (np.array(["2024-01-01"], dtype="datetime64[D]"), "dates"),
    "time spans": (np.array([1, 2], dtype="timedelta64[s]"), "time spans"),
    "long double": (np.zeros(2, np.longdouble), "float128|longdouble|float96"),
    "void": (np.zeros(2, "V4"), "structured|V4"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_unsupported_arrays_are_refused_by_name(name: str, device: str) -> None:
    array, word = REFUSED[name]
    if np.dtype(np.longdouble) == np.float64 and name == "long double":
        return  # this platform has no longer double
    f = tj.trace(lambda params: params["w"] * 2)
    with pytest.raises(tj.DTypeError, match=rf"(?s)params\['w'\].*({word})"):
        f({"w": array}, device=device)
    assert f.cache_info() == (0, 0, 128, 0)
    same(f({"w": X}, device=device), X * 2)


@pytest.mark.parametrize("name", REFUSED)
def test_unsupported_arrays_are_refused_as_closures(name: str) -> None:
    array, _ = REFUSED[name]
    if np.dtype(np.longdouble) == np.float64 and name == "long double":
        return
    f = tj.trace(lambda x: x + array)
    with pytest.raises((tj.DTypeError, tj.UnsupportedFunctionError)):
        f(X)


@pytest.mark.parametrize("value", [1 + 2j, np.complex128(1j)])
def test_complex_scalars_are_refused(value: complex) -> None:
    with pytest.raises(tj.DTypeError, match="complex"):
        tj.trace(double)(value)
    with pytest.raises(tj.DTypeError, match="complex"):
        tj.trace(lambda x: x * value)(X)


def test_masked_arrays_and_matrices_are_refused_with_advice() -> None:
    masked = np.ma.masked_array([1.0, 2.0], mask=[True, False])
    with pytest.raises(tj.DTypeError, match=r"(?s)x is a MaskedArray.*np.asarray"):
        tj.trace(double)(masked)
    with pytest.warns(PendingDeprecationWarning):
        matrix = np.matrix([[1.0, 2.0]])
    with pytest.raises(tj.DTypeError, match=r"(?s)x is a matrix.*np.asarray"):
        tj.trace(double)(matrix)
    with pytest.raises(tj.DTypeError, match="MaskedArray"):
        tj.trace(lambda x: x + masked)(np.ones(2))
    with pytest.raises(tj.DTypeError, match="matrix"):
        tj.trace(lambda x: x @ matrix)(np.ones(1))


def test_other_array_subclasses_are_taken_as_arrays(device: str) -> None:
    class Labelled(np.ndarray):
        pass

    same(tj.trace(double)(X.view(Labelled), device=device), X * 2)


def test_dates_and_arbitrary_unhashable_objects() -> None:
    class Strange:
        __hash__ = None  # type: ignore[assignment]

    with pytest.raises(tj.DTypeError, match=r"argument x.*Strange"):
        tj.trace(double)(Strange())
    # A date is hashable: static, and multiplied as Python would, which fails in Python's words.
    with pytest.raises(TypeError):
        tj.trace(double)(datetime.date(2024, 1, 1))


# -- lists, tuples, trees --------------------------------------------------------------------------------------------


def test_lists_and_tuples_are_trees_of_scalars_not_arrays() -> None:
    f = tj.trace(lambda pair: pair[0] * 10 + pair[1])
    assert f([1.0, 2.0]) == 12.0
    assert f((1.0, 2.0)) == 12.0
    assert f.cache_info().misses == 2, "a list and a tuple are different trees"
    assert f([3.0, 4.0]) == 34.0
    assert f.cache_info().misses == 2


def test_ragged_lists_in_traced_code_are_refused() -> None:
    with pytest.raises(tj.ShapeError, match=r"test_bad_input.py:\d+"):
        tj.trace(lambda x: np.add(x, [[1.0, 2.0], [3.0]]))(X)
    with pytest.raises((tj.ShapeError, ValueError), match=r"(?i)inhomogeneous|shape"):
        tj.trace(lambda x: np.concatenate([x, [[1.0], [2.0, 3.0]]]))(X)


def test_list_literals_in_traced_code_work_like_in_numpy(device: str) -> None:
    f = tj.trace(lambda x: np.multiply(x, [1.0, 2.0, 3.0]) - [[1.0], [2.0]])
    same(f(X, device=device), X * [1.0, 2.0, 3.0] - [[1.0], [2.0]])


def test_empty_trees(device: str) -> None:
    f = tj.trace(lambda empty, x: (empty, x * 2))
    for empty in ({}, [], (), {"a": []}, None, [None, ()]):
        tree, y = f(empty, X, device=device)
        assert tree == empty and type(tree) is type(empty)
        same(y, X * 2)


def test_a_call_without_any_array(device: str) -> None:
    assert tj.trace(lambda: None)(device=device) is None
    assert tj.trace(lambda: {"a": ()})(device=device) == {"a": ()}
    assert tj.trace(lambda: "text")(device=device) == "text"
    same(tj.trace(lambda: np.zeros(3))(device=device), np.zeros(3))


def test_none_leaves_stay_none() -> None:
    f = tj.trace(lambda tree: {"w": tree["w"] * 2, "b": tree["b"]})
    out = f({"w": X, "b": None})
    assert out["b"] is None
    np.testing.assert_array_equal(f({"w": X, "b": X})["b"], X)
    assert f.cache_info().misses == 2


def test_mappings_keep_their_kind_and_their_order_does_not_matter() -> None:
    f = tj.trace(lambda tree: {k: v * 2 for k, v in tree.items()})
    np.testing.assert_array_equal(f({"a": X, "b": X + 1})["b"], 2 * X + 2)
    np.testing.assert_array_equal(f({"b": X + 1, "a": X})["b"], 2 * X + 2)
    assert f.cache_info().misses == 1
    g = tj.trace(lambda tree: tree)
    assert type(g(OrderedDict(a=X))) is OrderedDict
    assert type(g(defaultdict(list, a=X))) is defaultdict
    Point = namedtuple("Point", "x y")
    assert type(g(Point(X, X))) is Point


def test_keys_that_cannot_be_sorted_are_no_problem() -> None:
    out = tj.trace(lambda t: {k: v * 2 for k, v in t.items()})({1: X, "a": X, (2, 3): X})
    np.testing.assert_array_equal(out[(2, 3)], X * 2)


def test_a_tree_that_contains_itself_is_refused() -> None:
    loop: list[Any] = [X]
    loop.append(loop)
    with pytest.raises((tj.TraceError, RecursionError)):
        tj.trace(lambda t: t[0])(loop)


def test_sets_and_generators_are_not_trees() -> None:
    with pytest.raises(tj.DTypeError, match=r"argument x.*set"):
        tj.trace(lambda x: x)({1.0, 2.0})
    with pytest.raises(tj.TraceError, match=r"argument x.*generator.*list"):
        tj.trace(lambda x: sum(x))(v for v in [X, X])
    with pytest.raises(tj.TraceError, match=r"argument x.*list_iterator|argument x.*iterator"):
        tj.trace(lambda x: next(x))(iter([X]))


# -- values ----------------------------------------------------------------------------------------------------------


def test_nan_and_infinity_pass_through_like_in_numpy(device: str) -> None:
    x = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, 1.0], np.float32)

    def f(x):
        return (
            x + 1,
            x * 0,
            np.maximum(x, 0),
            np.minimum(x, 0),
            np.abs(x),
            x.max(),
            x.sum(),
            np.isnan(x),
            x > 0,
            x == x,
        )

    with np.errstate(all="ignore"):
        expected = f(x)
    for got, want in zip(tj.trace(f)(x, device=device), expected):
        np.testing.assert_array_equal(np.asarray(got), want)


def test_division_by_zero_gives_numpys_values_without_warning(device: str) -> None:
    x = np.array([1.0, -1.0, 0.0], np.float32)
    with np.errstate(all="ignore"):
        expected = x / np.float32(0)
    np.testing.assert_array_equal(np.asarray(tj.trace(lambda x: x / 0)(x, device=device)), expected)


def test_integer_division_by_zero_is_defined_and_does_not_kill_the_process(device: str) -> None:
    x = np.array([7, -7, 0, np.iinfo(np.int32).min], np.int32)
    zero, minus = np.zeros(4, np.int32), np.full(4, -1, np.int32)
    f = tj.trace(lambda a, b: (a // b, a % b))
    with np.errstate(all="ignore"):
        for b in (zero, minus):
            for got, want in zip(f(x, b, device=device), (x // b, x % b)):
                np.testing.assert_array_equal(np.asarray(got), want)


def test_integer_overflow_wraps_like_in_numpy(device: str) -> None:
    x = np.array([np.iinfo(np.int32).max, np.iinfo(np.int32).min], np.int32)
    f = tj.trace(lambda x: (x + 1, x * 3, -x, np.abs(x)))
    with np.errstate(all="ignore"):
        expected = (x + 1, x * 3, -x, np.abs(x))
    for got, want in zip(f(x, device=device), expected):
        np.testing.assert_array_equal(np.asarray(got), want)


def test_denormals_survive_on_the_reference() -> None:
    x = np.array([1e-45, -1e-40], np.float32)
    np.testing.assert_array_equal(tj.trace(lambda x: x * 1 + 0)(x), x)


@pytest.mark.parametrize("value", [2**63, -(2**63) - 1, 10**30])
def test_huge_python_integers_are_an_overflow_error(value: int) -> None:
    with pytest.raises(OverflowError, match="out of bounds"):
        tj.trace(double)(value)
    with pytest.raises(OverflowError, match="out of bounds"):
        tj.trace(lambda x: x + value)(np.arange(3))


def test_python_integers_beyond_the_arrays_type_are_an_overflow_error() -> None:
    x = np.zeros(3, np.int8)
    with pytest.raises(OverflowError, match="300"):
        tj.trace(lambda x: x + 300)(x)
    with pytest.raises(OverflowError, match="-1"):
        tj.trace(lambda x: x + -1)(np.zeros(3, np.uint8))


def test_large_but_valid_integers(device: str) -> None:
    big = 2**31 - 5
    same(tj.trace(lambda x: x + 2)(np.array([big], np.int32), device=device), np.array([big + 2], np.int32))
    assert tj.trace(lambda n: n + 1, device="numpy")(2**62) == 2**62 + 1


# -- shapes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (2, 0, 4), (0, 0)])
def test_zero_size_dimensions(shape: tuple[int, ...], device: str) -> None:
    x = np.zeros(shape, np.float32)

    def f(x):
        return (
            x + 1,
            np.tanh(x),
            x.sum(),
            x.sum(axis=0),
            np.transpose(x),
            np.concatenate([x, x]),
            x.reshape(-1),
            x.prod(),
        )

    for got, want in zip(tj.trace(f)(x, device=device), f(x)):
        np.testing.assert_array_equal(np.asarray(got), want)
        assert np.asarray(got).dtype == want.dtype


def test_products_over_an_empty_axis_are_zero(device: str) -> None:
    a, b = np.zeros((2, 0), np.float32), np.zeros((0, 3), np.float32)
    np.testing.assert_array_equal(
        np.asarray(tj.trace(np.matmul)(a, b, device=device)), np.zeros((2, 3), np.float32)
    )


def test_the_maximum_of_nothing_is_an_error_as_in_numpy() -> None:
    with pytest.raises(ValueError, match="no elements"):
        tj.trace(lambda x: x.max())(np.zeros((0, 3)))
    with pytest.raises(ValueError, match=r"no elements|empty"):
        tj.trace(lambda x: np.argmax(x))(np.zeros(0))


def test_gradients_of_zero_size_arrays(device: str) -> None:
    g = tj.trace(tj.grad(lambda x: (x * x).sum()))(np.zeros((0, 3), np.float32), device=device)
    assert np.asarray(g).shape == (0, 3)


def test_arrays_of_no_dimension_and_scalars(device: str) -> None:
    f = tj.trace(lambda x: x * 2 + 1)
    for x in (3.0, np.float32(3), np.array(3.0, np.float32), np.float64(3), 3, np.int32(3), np.array(3)):
        got = f(x, device=device)
        assert np.shape(got) == ()
        assert float(got) == 7.0
    assert np.asarray(f(np.float32(3), device=device)).dtype == np.float32


def test_results_of_no_dimension_are_numpy_scalars_on_host_devices() -> None:
    assert isinstance(tj.trace(lambda x: x.sum())(X), np.float32)
    assert isinstance(tj.trace(lambda x: x.sum(), device="numpy")(np.arange(3)), np.int64)


def test_many_dimensions(device: str) -> None:
    x = np.arange(2**8, dtype=np.float32).reshape((2,) * 8)
    same(tj.trace(lambda x: np.transpose(x).sum(axis=(0, 3)) + 1)(x, device=device), x.T.sum(axis=(0, 3)) + 1)


def test_a_result_of_terabytes_is_a_clear_error_and_the_process_survives(device: str) -> None:
    f = tj.trace(lambda x: x[:, None] * x[None, :])
    x = np.ones(1 << 20, np.float32)  # 4 TiB
    with pytest.raises((tj.TraceError, MemoryError), match=r"(?i)memory|large|bytes|allocate"):
        f(x, device=device)
    same(tj.trace(double)(X, device=device), X * 2)


def test_a_shape_beyond_the_address_space_is_a_clear_error() -> None:
    with pytest.raises((tj.ShapeError, tj.DeviceOutOfMemoryError), match=r"(?i)large|memory|bytes"):
        tj.trace(lambda x: np.broadcast_to(x, (1 << 40, 1 << 40)) + 1)(np.float32(1))
    with pytest.raises((tj.TraceError, ValueError, OverflowError)):
        tj.trace(lambda x: x + np.zeros((1 << 62, 1 << 10)))(np.float32(1))


def test_shapes_that_do_not_fit_name_both(device: str) -> None:
    with pytest.raises(tj.ShapeError, match=r"f32\[2,3\].*f32\[4\].*test_bad_input.py:\d+"):
        tj.trace(lambda a, b: a + b)(X, np.zeros(4, np.float32), device=device)


# -- memory layouts --------------------------------------------------------------------------------------------------


def layouts() -> dict[str, np.ndarray]:
    base = np.arange(48, dtype=np.float32).reshape(6, 8)
    read_only = base[:2, :3].copy()
    read_only.flags.writeable = False
    buffer = bytearray(4 * 6 + 1)
    unaligned = np.frombuffer(buffer, np.uint8)[1:].view(np.float32).reshape(2, 3)
    unaligned[:] = X
    return {
        "transposed": base.T,
        "every second": base[::2, ::3],
        "negative strides": base[::-1, ::-2],
        "fortran order": np.asfortranarray(base),
        "broadcast": np.broadcast_to(base[0], (5, 8)),
        "zero strides": np.broadcast_to(np.float32(3), (2, 3)),
        "column": base[:, 3:4],
        "read-only": read_only,
        "byte-swapped": base.astype(base.dtype.newbyteorder()),
        "byte-swapped and strided": base.astype(base.dtype.newbyteorder())[::2, ::-1],
        "unaligned": unaligned,
        "window": np.lib.stride_tricks.sliding_window_view(base[0], 3),
    }


@pytest.mark.parametrize("name", layouts())
def test_memory_layouts(name: str, device: str) -> None:
    x = layouts()[name]
    before = x.copy()
    f = tj.trace(lambda x: (x * 2, x.sum(axis=0), x.T @ x, np.tanh(x)[::-1]))
    native = x.astype(np.float32)
    for _ in range(2):  # the second call takes the fast path
        for got, want in zip(
            f(x, device=device), (native * 2, native.sum(axis=0), native.T @ native, np.tanh(native)[::-1])
        ):
            got = np.asarray(got)
            assert got.dtype == np.float32 and got.dtype.isnative
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(x, before)


@pytest.mark.parametrize("dtype", ["<i4", ">i4", "<f4", ">f4", ">u2", ">f8"])
def test_byte_orders_of_every_kind(dtype: str, device: str) -> None:
    x = np.arange(5).astype(dtype)
    same(
        tj.trace(lambda x: x * 2 + 1)(x, device=device),
        np.arange(5).astype(np.dtype(dtype).newbyteorder("=")) * 2 + 1,
    )


def test_byte_swapped_closures_and_gradients() -> None:
    table = np.arange(3.0).astype(">f8")
    np.testing.assert_array_equal(tj.trace(lambda x: x + table)(np.ones(3)), [1, 2, 3])
    np.testing.assert_array_equal(tj.grad(lambda x: (x * x).sum())(table), [0, 2, 4])


def test_layouts_share_one_trace_and_never_mix_up_values() -> None:
    f = tj.trace(lambda x: x * 2)
    a = np.arange(6, dtype=np.float32).reshape(2, 3)
    for x in (a, np.asfortranarray(a), a[::-1], a.copy()[:, ::-1]):
        np.testing.assert_array_equal(f(x), x * 2)
    assert f.cache_info().misses == 1


def test_memory_mapped_files(tmp_path: pathlib.Path, device: str) -> None:
    path = tmp_path / "x.npy"
    np.save(path, X)
    mapped = np.load(path, mmap_mode="r")
    assert isinstance(mapped, np.memmap)
    same(tj.trace(double)(mapped, device=device), X * 2)
    del mapped


def test_read_only_results_of_a_call_are_not_a_thing() -> None:
    """Results are always writable and the caller's own, also when they are an unchanged, read-only argument."""
    x = X.copy()
    x.flags.writeable = False
    y = tj.trace(lambda x: x)(x)
    y[0, 0] = 99
    assert x[0, 0] == 0


# -- foreign arrays --------------------------------------------------------------------------------------------------


class HasArray:
    """What pandas, xarray, PIL and others are to NumPy: an object with ``__array__``."""

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return np.asarray(X, dtype=dtype)


class BrokenArray:
    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        raise RuntimeError("the file is gone")


def test_objects_with_an_array_method_are_arrays(device: str) -> None:
    f = tj.trace(double)
    same(f(HasArray(), device=device), X * 2)
    f(X, device=device)
    assert f.cache_info().misses == 1, "same shape and dtype: same trace"


def test_an_array_method_that_fails_is_reported_with_its_reason() -> None:
    with pytest.raises(tj.DTypeError, match=r"argument x.*BrokenArray.*the file is gone"):
        tj.trace(double)(BrokenArray())


def test_torch_tensors_are_taken_by_value() -> None:
    torch = pytest.importorskip("torch", exc_type=ImportError)
    got = tj.trace(double)(torch.arange(6, dtype=torch.float32).reshape(2, 3))
    assert isinstance(got, np.ndarray)
    np.testing.assert_array_equal(got, X * 2)
    with pytest.raises(tj.DTypeError, match=r"argument x.*requires grad"):
        tj.trace(double)(torch.ones(3, requires_grad=True))


def test_buffers_and_bytes_are_not_arrays() -> None:
    with pytest.raises(tj.TraceError, match=r"argument x.*bytearray"):
        tj.trace(double)(bytearray(b"abc"))
    assert tj.trace(lambda x: x)(b"abc") == b"abc", "bytes are hashable: static"


# -- the process survives --------------------------------------------------------------------------------------------


def test_a_failing_call_leaves_no_trace_in_global_state(device: str) -> None:
    f = tj.trace(lambda x, y: x @ y)
    for _ in range(3):
        with pytest.raises(tj.ShapeError):
            f(X, X, device=device)
    same(f(X, X.T.copy(), device=device), X @ X.T)
    assert f.cache_info().currsize == 1


def test_out_of_memory_in_a_process_with_little_of_it() -> None:
    """The reference backend turns NumPy's MemoryError into one that names op, size and line."""
    if not sys.platform.startswith("linux"):
        return  # address-space limits are a Linux matter; the error path itself is tested above
    code = textwrap.dedent(
        """
        import resource, numpy as np, tracejit as tj
        f = tj.trace(lambda x: np.exp(x[:, None] - x[None, :]), device="numpy")
        f(np.ones(4, np.float32))
        resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
        try:
            f(np.ones(1 << 15, np.float32))
        except tj.DeviceOutOfMemoryError as error:
            assert isinstance(error, MemoryError)
            assert "bytes" in str(error) and "<string>:" in str(error), error
            print("explained", f(np.ones(4, np.float32)).sum())
        """
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert "explained 16.0" in out.stdout, out.stderr
