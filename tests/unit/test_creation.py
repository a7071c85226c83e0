"""Creation functions and the ops without operands, against NumPy itself, inside and outside of a trace."""

from __future__ import annotations

import numpy as np
import pytest

import tracejit.functions as F
from tests.unit._evaluate import DTYPES, check, check_gradient, record, run
from tracejit.errors import ConcretizationError, DTypeError, GraphError, ShapeError
from tracejit.graph import ArrayLiteral, GraphBuilder
from tracejit.ops import creation as ops


def created(f) -> tuple[np.ndarray, set[str]]:
    """What ``f()`` makes inside a trace, and the names of the ops it took; nothing may be a captured
    array."""
    _, graph, _ = record(lambda x: f(), np.zeros(()))
    names = {n.op.name for n in graph} - {"input"}
    assert len(graph.inputs) == 1, "a created array is part of the graph, not an input"
    return run(lambda x: f(), np.zeros(()))[0], names


CALLS = {
    "zeros": lambda m: m.zeros((2, 3)),
    "zeros_scalar": lambda m: m.zeros(()),
    "zeros_int": lambda m: m.zeros(3, dtype=np.int32),
    "zeros_empty": lambda m: m.zeros((0, 2), np.float16),
    "ones": lambda m: m.ones((2, 1), np.uint8),
    "full": lambda m: m.full((2, 2), 3),
    "full_float": lambda m: m.full(2, 1.5, dtype=np.float32),
    "full_bool": lambda m: m.full((1,), True),
    "eye": lambda m: m.eye(3),
    "eye_k": lambda m: m.eye(3, 4, k=-1, dtype=np.int64),
    "identity": lambda m: m.identity(2, dtype=np.float32),
    "tri": lambda m: m.tri(3, 5, 1),
    "arange": lambda m: m.arange(5),
    "arange_range": lambda m: m.arange(2, 9, 3),
    "arange_down": lambda m: m.arange(5, 0, -2),
    "arange_float": lambda m: m.arange(0.0, 1.0, 0.1),
    "arange_float32": lambda m: m.arange(1, 2, 0.25, dtype=np.float32),
    "arange_empty": lambda m: m.arange(3, 3),
    "arange_uint": lambda m: m.arange(7, dtype=np.uint16),
}


@pytest.mark.parametrize("name", CALLS)
def test_as_numpy_and_part_of_the_graph(name: str) -> None:
    wanted = CALLS[name](np)
    actual, _ = created(lambda: CALLS[name](F))
    assert (actual.shape, actual.dtype) == (wanted.shape, wanted.dtype)
    np.testing.assert_array_equal(actual, wanted)
    outside = CALLS[name](F)
    assert isinstance(outside, np.ndarray)
    np.testing.assert_array_equal(outside, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "f",
    [
        np.zeros_like,
        np.ones_like,
        lambda x: np.full_like(x, 1),
        lambda x: np.full_like(x, 1, dtype=np.float32),
    ],
)
def test_like_functions(f, dtype: str) -> None:
    check(f, np.zeros((2, 3), dtype))


def test_like_functions_with_another_shape_and_value() -> None:
    check(lambda x: np.zeros_like(x, shape=(4,)), np.ones((2, 3)))
    check(lambda x: np.ones_like(x, dtype=bool), np.ones(2))
    check(lambda x, v: np.full_like(x, v), np.ones((2, 3), np.float32), np.float64(2.5))
    (y,) = run(lambda x: np.empty_like(x), np.ones((2, 3)))
    np.testing.assert_array_equal(y, np.zeros((2, 3)))  # never uninitialised


def test_like_keyword_reaches_us_through_numpy() -> None:
    check(lambda x: np.zeros((2,), like=x) if hasattr(x, "node") else np.zeros(2), np.ones(2))
    check(lambda x: np.arange(3, like=x) if hasattr(x, "node") else np.arange(3), np.ones(2))


def test_linspace() -> None:
    for kwargs in (
        {},
        {"num": 5},
        {"num": 1},
        {"num": 0},
        {"num": 4, "endpoint": False},
        {"num": 7, "dtype": np.int32},
    ):
        check(lambda a, b, k=kwargs: np.linspace(a, b, **k), np.float64(-1.5), np.float64(2.0))
    check(lambda a: np.linspace(a, 2 * a, 4, axis=-1), np.array([1.0, 3.0]))
    check(lambda a: np.linspace(0, a, 3, retstep=True), np.float64(3))
    check_gradient(lambda a, b: np.linspace(a, b, 5), np.array(1.0), np.array(2.0))


def test_meshgrid() -> None:
    x, y, z = np.arange(3.0), np.arange(2.0), np.arange(4.0)
    for kwargs in ({}, {"indexing": "ij"}, {"sparse": True}, {"sparse": True, "indexing": "ij"}):
        check(lambda *v, k=kwargs: list(np.meshgrid(*v, **k)), x, y)
        check(lambda *v, k=kwargs: list(np.meshgrid(*v, **k)), x, y, z)
    check(lambda x: list(np.meshgrid(x)), x)


def test_arrays_of_tensors() -> None:
    x = np.arange(3.0)
    (y,) = run(lambda x: F.array([[x[0], 1.0], [x[1], x[2]]]), x)
    np.testing.assert_array_equal(y, [[0, 1], [1, 2]])
    (y,) = run(lambda x: F.asarray([x, x], dtype=np.float32), x)
    assert y.dtype == np.float32 and y.shape == (2, 3)
    (y,) = run(lambda x: F.array(x, ndmin=3), x)
    assert y.shape == (1, 1, 3)
    np.testing.assert_array_equal(F.array([1, 2]), [1, 2])


def test_sizes_from_shapes_are_static_and_from_values_are_refused() -> None:
    check(lambda x: F.zeros(x.shape[0]) + x if hasattr(x, "node") else x, np.ones(3))
    with pytest.raises(ConcretizationError):
        record(lambda x: F.arange(x.sum()), np.ones(3))
    with pytest.raises(ConcretizationError):
        record(lambda x: F.zeros(x), np.int64(3))
    with pytest.raises(TypeError, match="shape is an integer"):
        record(lambda x: F.zeros("ab"), np.int64(3))
    with pytest.raises(DTypeError, match="complex"):
        record(lambda x: F.zeros(3, complex), np.int64(3))
    with pytest.raises(ShapeError, match="negative"):
        record(lambda x: F.linspace(x, 1.0, -1), np.float64(3))


def test_threefry_known_answers() -> None:
    """The vectors of the Random123 distribution (kat_vectors, threefry2x32 with 20 rounds)."""
    ones = 0xFFFFFFFF
    for key, counter, expected in (
        ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
        ((ones, ones), (ones, ones), (0x1CB996FC, 0xBB002BE7)),
        ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
    ):
        c0, c1 = (np.array([c], np.uint32) for c in counter)
        assert tuple(int(w[0]) for w in ops.threefry2x32(*key, c0, c1)) == expected


def test_random_bits_count_in_row_major_order_across_blocks() -> None:
    k0, k1 = np.asarray(3, np.uint32), np.asarray(5, np.uint32)
    many = ops.random_bits(k0, k1, shape=(3, 20_000))
    index = np.arange(60_000, dtype=np.uint32)
    expected = ops.threefry2x32(k0, k1, index, np.zeros_like(index))[0]
    np.testing.assert_array_equal(many.ravel(), expected)
    assert ops.random_bits(k0, k1, shape=()) == expected[0]
    assert ops.random_bits(k0, k1, shape=(0, 2)).shape == (0, 2)


def test_literals_compare_by_content_and_const_by_bits() -> None:
    builder = GraphBuilder()
    a, b = (builder.add("literal", (), {"value": ArrayLiteral([1.0, 2.0])}) for _ in range(2))
    assert a is b
    assert builder.const(0.0, np.dtype("float64")) is not builder.const(-0.0, np.dtype("float64"))
    assert builder.const(np.nan, np.dtype("float64")) is builder.const(np.nan, np.dtype("float64"))
    assert builder.const(1, np.dtype("int64")) is not builder.const(True, np.dtype("bool"))


def test_markers() -> None:
    x = np.arange(3.0)
    assert ops.identity(x) is x
    assert ops.custom_vjp.reference(x, x + 1, rule=None, n_out=1) == (x,)
    assert ops.proj.reference((x, x + 1), index=1)[0] == 1
    with pytest.raises(GraphError, match="result 2 does not exist"):
        ops.proj.infer(x, index=2)
    with pytest.raises(GraphError, match="caller supplies"):
        ops.input_.reference(index=0, kind="argument", shape=(), dtype=np.dtype("float32"))
    with pytest.raises(DTypeError, match="uint32 scalars"):
        ops.random_bits.infer(x, x, shape=(2,))
    with pytest.raises(ShapeError, match="axis 2"):
        ops.iota.infer(shape=(2, 3), axis=2, dtype=np.dtype("int64"))
