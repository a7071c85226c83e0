"""Indexing, gather and scatter against NumPy itself: every form of index, values, placement of axes,
gradients, errors."""

from __future__ import annotations

import numpy as np
import pytest

import tracejit.functions as F
from tests.unit._evaluate import DTYPES, check, check_gradient, record, run
from tracejit.errors import ConcretizationError, DTypeError, IndexingError, ShapeError, TracingError
from tracejit.ops import indexing as ops

RNG = np.random.default_rng(0)
X = np.arange(2 * 3 * 4 * 5, dtype=np.float64).reshape(2, 3, 4, 5)
ROWS = np.array([1, 0, -1])
GRID = np.array([[0, 2], [1, -2]])

INDICES = {
    "int": 1,
    "negative": -2,
    "ints": (1, -1, 2, 0),
    "numpy_int": np.int32(1),
    "slice": slice(1, None),
    "slice_stop": slice(None, -1),
    "slice_step": (slice(None), slice(None, None, 2)),
    "slice_negative_step": (slice(None), slice(None, None, -1)),
    "slice_negative_range": (slice(None), slice(None), slice(3, 0, -2)),
    "slice_empty": slice(2, 1),
    "slice_beyond": slice(-9, 9),
    "slice_empty_negative": (slice(None), slice(0, 2, -1)),
    "ellipsis": (..., 1),
    "ellipsis_middle": (0, ..., 1),
    "ellipsis_alone": ...,
    "ellipsis_nothing": (0, 1, 2, ..., 3),
    "new_axis": (None, 1, None, ..., None),
    "empty_tuple": (),
    "array": ROWS,
    "array_second": (slice(None), ROWS),
    "array_matrix": (slice(None), slice(None), GRID),
    "array_list": [0, 1, 1],
    "array_empty": (slice(None), np.zeros(0, np.int64)),
    "array_scalar": (slice(None), np.array(2)),
    "array_unsigned": np.array([1, 0], np.uint8),
    "two_adjacent": (slice(None), ROWS, ROWS),
    "two_broadcast": (slice(None), GRID, ROWS[:2]),
    "two_apart": (ROWS[:2] % 2, slice(None), ROWS[:2]),
    "array_and_int": (0, ROWS),
    "array_and_int_after": (slice(None), ROWS, 2),
    "int_apart_from_array": (0, slice(None), ROWS),
    "array_new_axis_between": (slice(None), ROWS, None, ROWS),
    "array_new_axis_first": (None, ROWS % 2, slice(None), None),
    "array_slices_reversed": (slice(None, None, -1), ROWS, slice(1, 3)),
    "three_arrays": (ROWS[:2] % 2, ROWS[:2], GRID),
    "ellipsis_array": (..., ROWS),
    "array_ellipsis_array": (ROWS % 2, ..., ROWS),
    "grid": np.ix_([0, 1], [0, 2], [1, 3]),
    "mask": np.array([True, False]),
    "mask_second": (slice(None), np.array([True, False, True])),
    "mask_two_axes": np.array([[True, False, True], [False, False, True]]),
    "mask_and_array": (np.array([True, True]), slice(None), np.array([1, 2])),
    "mask_none": np.array([False, False]),
    "mask_list": [True, False],
}


@pytest.mark.parametrize("name", INDICES)
def test_getitem_as_numpy(name: str) -> None:
    check(lambda x: x[INDICES[name]], X)


@pytest.mark.parametrize("name", [n for n in INDICES if "empty" not in n and n != "mask_none"])
def test_getitem_gradient(name: str) -> None:
    check_gradient(lambda x: x[INDICES[name]], RNG.normal(size=X.shape))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["slice_negative_step", "array_matrix", "two_apart", "int"])
def test_getitem_keeps_every_dtype(name: str, dtype: str) -> None:
    check(lambda x: x[INDICES[name]], X.astype(dtype))


def test_random_indices_as_numpy() -> None:
    """Two hundred random mixtures of integers, slices, new axes and arrays."""
    rng = np.random.default_rng(5)
    for _ in range(200):
        rank = int(rng.integers(1, 5))
        shape = (
            int(rng.integers(1, 5)),
        ) * rank  # equal sizes: the ellipsis may move an index to another axis
        items: list[object] = []
        broadcast = (int(rng.integers(1, 4)),)
        for n in shape[: rng.integers(0, rank + 1)]:
            kind = rng.integers(0, 5)
            if kind == 0:
                items.append(int(rng.integers(-n, n)))
            elif kind == 1:
                step = int(rng.choice([-3, -2, -1, 1, 2, 3]))
                ends = [None if rng.random() < 0.3 else int(rng.integers(-n - 1, n + 2)) for _ in range(2)]
                items.append(slice(*ends, step))
            elif kind == 2:
                items.append(rng.integers(-n, n, broadcast if rng.random() < 0.7 else (2, *broadcast)))
            elif kind == 3:
                items.append(slice(None))
            else:
                items.append(rng.integers(-n, n, ()))
        for _ in range(int(rng.integers(0, 2))):
            items.insert(int(rng.integers(0, len(items) + 1)), None)
        if rng.random() < 0.3:
            items.insert(int(rng.integers(0, len(items) + 1)), Ellipsis)
        index = tuple(items)
        check(lambda x, index=index: x[index], rng.normal(size=shape))


def test_traced_indices() -> None:
    x = RNG.normal(size=(4, 3, 5))
    check(lambda x, i: x[i], x, np.int64(2))
    check(lambda x, i: x[:, i], x, np.int32(-1))
    check(lambda x, i: x[i], x, np.array([[3, -1], [0, 0]]))
    check(lambda x, i, j: x[i, :, j], x, np.array([1, 2]), np.array([4, -5]))
    check(lambda x, i, j: x[:, i, j], x, np.array([1, -1]), np.array([[4], [0]]))
    check(lambda x, i: x[i, [0, 1]], x, 3)  # a Python int argument: traced, weakly typed
    check(lambda x, i: x[[0, i]], x, np.int64(2))
    check(lambda table, i: np.take(table, i, axis=0), x, np.array([1, 1, 0]))


def test_an_embedding_gradient_adds_up_repeated_rows() -> None:
    table, rows = RNG.normal(size=(5, 3)), np.array([[1, 4, 1], [0, 1, -1]])
    check_gradient(lambda t: t[rows], table)
    check_gradient(lambda t: np.take(t, rows, axis=1), RNG.normal(size=(2, 5)))


def test_traced_indices_out_of_range_wrap_once_and_are_clipped() -> None:
    x = np.arange(4.0)
    (y,) = run(lambda x, i: x[i], x, np.array([-5, -1, 3, 9]))
    np.testing.assert_array_equal(y, [0, 3, 3, 3])
    (y,) = run(lambda x, i: np.take(x, i, mode="wrap"), x, np.array([-5, 9]))
    np.testing.assert_array_equal(y, np.take(x, [-5, 9], mode="wrap"))
    (y,) = run(lambda x, i: np.take(x, i, mode="clip"), x, np.array([-1, 9]))
    np.testing.assert_array_equal(y, np.take(x, [-1, 9], mode="clip"))
    # Several traced indices are clipped axis by axis, not in the flattened array.
    (y,) = run(lambda x, i, j: x[i, j], np.arange(6.0).reshape(2, 3), np.array([5]), np.array([-7]))
    np.testing.assert_array_equal(y, [3])


@pytest.mark.parametrize("axis", [None, 0, -1, 1])
def test_take(axis: int | None) -> None:
    x = RNG.normal(size=(3, 4))
    check(lambda x: np.take(x, [[0, -1], [2, 1]], axis=axis), x)
    check(lambda x: np.take(x, 2, axis=axis), x)
    check(lambda x: x.take([0, 1], axis), x)
    check_gradient(lambda x: np.take(x, [[0, -1], [2, 1]], axis=axis), x)


@pytest.mark.parametrize("axis", [0, 1, -1, None])
def test_take_along_axis(axis: int | None) -> None:
    x = RNG.normal(size=(3, 4))
    order = np.argsort(x, axis=axis)
    check(lambda x, i: np.take_along_axis(x, i, axis), x, order)
    check_gradient(lambda x: np.take_along_axis(x, order, axis), x)


def test_take_along_axis_of_one_element_per_row_has_a_gradient_that_fuses() -> None:
    x, labels = RNG.normal(size=(3, 4)), np.array([[3], [0], [-1]])
    check_gradient(lambda x: np.take_along_axis(x, labels, 1), x)
    check(lambda x: np.take_along_axis(x, labels[:1], 1), x)  # the other axes broadcast
    g = ops.take_along_axis.vjp(np.ones((3, 1)), None, x, labels, axis=1)[0]  # type: ignore[operator]
    np.testing.assert_array_equal(g, [[0, 0, 0, 1], [1, 0, 0, 0], [0, 0, 0, 1]])


@pytest.mark.parametrize("axis", [0, 1])
def test_scatter_add_is_the_transpose_of_take(axis: int) -> None:
    base, idx = RNG.normal(size=(4, 5)), np.array([[2, -1, 2], [0, 1, 3]])
    upd_shape = (*base.shape[:axis], *idx.shape, *base.shape[axis + 1 :])
    upd = RNG.normal(size=upd_shape)
    expected = base.copy()
    for j in np.ndindex(idx.shape):
        where = (slice(None),) * axis
        expected[(*where, idx[j])] += upd[(*where, *j)]
    np.testing.assert_allclose(ops.scatter_add(base, idx, upd, axis=axis), expected)
    along = np.array([[2, -1, 2], [0, 1, 3], [0, 0, 0], [1, 2, 3]])
    upd = RNG.normal(size=along.shape)
    expected = base.copy()
    for i, j in np.ndindex(along.shape):
        expected[i, along[i, j]] += upd[i, j]
    np.testing.assert_allclose(ops.scatter_add_along_axis(base, along, upd, axis=1), expected)


def test_zero_size() -> None:
    check(lambda x: x[:, :0], X)
    check(lambda x: x[..., None, :0], np.zeros((0, 3)))
    check(lambda x: np.take(x, np.zeros((0, 2), np.int64), axis=0), np.zeros((0, 3)))
    base = np.zeros((0, 3))
    out = ops.scatter_add(base, np.zeros(0, np.int64), np.zeros((0, 3)), axis=0)
    assert out.shape == (0, 3)


def test_choices() -> None:
    x = RNG.normal(size=(3, 4))
    check(lambda x: np.select([x < 0, x < 1], [x * 2, 7.0], default=-1), x)
    check(lambda x: np.select([x < 0, x < 1], [x, x**2]), x.astype(np.float32))
    check(lambda i, x: np.choose(i, [x, -x, 0.5]), np.array([0, 2, 1, 1]), x)
    check(lambda x: np.compress([True, False, True], x, axis=0), x)
    check_gradient(lambda x: np.select([x < 0], [x * x], default=3 * x), x)


@pytest.mark.parametrize("side", ["left", "right"])
def test_searchsorted(side: str) -> None:
    a = np.array([-1.0, 0.0, 0.0, 2.5, np.nan])
    v = np.array([[-2.0, 0.0, 2.5], [3.0, np.nan, -0.0]])
    check(lambda a, v: np.searchsorted(a, v, side), a, v)
    check(lambda a, v: np.searchsorted(a, v, side), a[:3], np.float64(0))
    check(lambda a, v: np.searchsorted(a, v, side), np.array([1, 3, 5]), np.array([0, 3, 9]))


@pytest.mark.parametrize("k", [0, 1, -2])
def test_diag(k: int) -> None:
    check(lambda x: np.diag(x, k), RNG.normal(size=3))
    check(lambda x: np.diag(x, k), RNG.normal(size=1))
    check(lambda x: np.diag(x, k), RNG.normal(size=(3, 5)))
    check(lambda x: np.diag(x, k), RNG.normal(size=(4, 2)))
    check_gradient(lambda x: np.diag(np.diag(x, k), k), RNG.normal(size=(4, 4)))


def test_indices_and_concrete_calls() -> None:
    check(lambda x: F.indices((2, 3)) + x.astype(int), np.zeros(()))
    check(lambda x: [a + x for a in F.indices((2, 3), sparse=True)], np.zeros((), np.int64))
    np.testing.assert_array_equal(F.take(X, [1], axis=1), np.take(X, [1], axis=1))
    np.testing.assert_array_equal(F.searchsorted([1, 2], 2), 1)


def test_a_concrete_index_array_is_read_at_each_call_not_frozen() -> None:
    rows = np.array([0, 1])
    _, graph, values = record(lambda x: x[rows], np.arange(4.0))
    assert any(v is rows for v in values.values()), "the array is an input of the graph"
    assert "literal" not in {n.op.name for n in graph}


@pytest.mark.parametrize(
    ("f", "error", "words"),
    [
        (lambda x: x[3], IndexingError, "index 3 is out of bounds for axis 0 with size 3"),
        (lambda x: x[:, -5], IndexingError, "out of bounds for axis 1 with size 4"),
        (lambda x: x[[0, 3]], IndexingError, "index 3 is out of bounds"),
        (lambda x: np.take(x, [7], axis=1), IndexingError, "index 7"),
        (lambda x: np.take_along_axis(x, np.array([[4]]), 1), IndexingError, "index 4"),
        (lambda x: x[0, 0, 0], IndexingError, "too many indices"),
        (lambda x: x[..., ...], IndexingError, "one ellipsis"),
        (lambda x: x[1.5], IndexingError, "only integers"),
        (lambda x: x["a"], IndexingError, "only integers"),
        (lambda x: x[np.array([0.5])], IndexingError, "integer or boolean"),
        (lambda x: x[x > 0], IndexingError, "tj.where"),
        (lambda x: x[np.array([True, False])], IndexingError, "does not match"),
        (lambda x: x[: x.sum().astype(int)], ConcretizationError, "index of an array"),
        (lambda x: np.take(x, x), DTypeError, "integers"),
        (lambda x: np.take_along_axis(x, np.array([0]), 1), ShapeError, "as many axes"),
        (lambda x: np.put_along_axis(x, np.array([[0]]), 1.0, 0), TracingError, "writes into"),
        (lambda x: np.compress(x[0] > 0, x), IndexingError, "depends on values"),
        (lambda x: np.select([x], [x]), DTypeError, "boolean"),
        (lambda x: np.diag(x[None]), ShapeError, "one or two axes"),
        (
            lambda x: np.zeros((0, 4))[:, None] + np.take(x[:0], x.astype(int), axis=0),
            IndexingError,
            "size zero",
        ),
    ],
)
def test_mistakes_are_explained(f, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words) as caught:
        record(f, np.ones((3, 4)))
    assert "test_indexing.py" in str(caught.value), "the message names the user's line"


def test_a_bool_mask_of_another_trace_time_value_is_baked_knowingly() -> None:
    mask = np.array([True, False, True])
    check(lambda x: x[mask] * 2, np.arange(3.0))
    check_gradient(lambda x: x[mask], np.arange(3.0))
