"""Shape functions and view ops against NumPy itself: values, dtypes, shapes, and gradients against central
differences."""

from __future__ import annotations

import numpy as np
import pytest

import tracejit.functions as F
from tests.unit._evaluate import DTYPES, check, check_gradient, record
from tracejit.errors import ConcretizationError, DTypeError, ShapeError, UnsupportedFunctionError
from tracejit.ops import shape as ops

RNG = np.random.default_rng(0)


def sample(shape: tuple[int, ...], dtype: str = "float64") -> np.ndarray:
    """Small whole numbers, which every dtype holds exactly."""
    return RNG.integers(0, 2 if dtype == "bool" else 9, shape).astype(dtype)


FUNCTIONS = {
    "reshape": lambda x: np.reshape(x, (4, -1)),
    "reshape_fortran": lambda x: np.reshape(x, (4, 6), order="F"),
    "reshape_method": lambda x: x.reshape(6, 4),
    "ravel": lambda x: np.ravel(x),
    "ravel_fortran": lambda x: np.ravel(x, "F"),
    "flatten": lambda x: x.flatten(),
    "transpose": lambda x: np.transpose(x),
    "transpose_axes": lambda x: np.transpose(x, (1, -1, 0)),
    "T": lambda x: x.T,
    "mT": lambda x: x.mT,
    "permute_dims": lambda x: np.permute_dims(x, (2, 0, 1)),
    "moveaxis": lambda x: np.moveaxis(x, -1, 0),
    "moveaxis_many": lambda x: np.moveaxis(x, (0, 1), (-1, 0)),
    "rollaxis": lambda x: np.rollaxis(x, 2, 1),
    "rollaxis_negative": lambda x: np.rollaxis(x, -1),
    "swapaxes": lambda x: np.swapaxes(x, 0, -1),
    "expand_dims": lambda x: np.expand_dims(x, (0, -1)),
    "squeeze": lambda x: np.squeeze(np.expand_dims(x, 1)),
    "squeeze_axis": lambda x: np.squeeze(np.expand_dims(x, (0, 1)), axis=-5),
    "broadcast_to": lambda x: np.broadcast_to(x, (2, *x.shape)),
    "flip": lambda x: np.flip(x),
    "flip_axes": lambda x: np.flip(x, (0, -1)),
    "fliplr": lambda x: np.fliplr(x),
    "flipud": lambda x: np.flipud(x),
    "rot90": lambda x: np.rot90(x),
    "rot90_three": lambda x: np.rot90(x, 3, (1, 2)),
    "rot90_two": lambda x: np.rot90(x, -2),
    "roll": lambda x: np.roll(x, 5),
    "roll_axes": lambda x: np.roll(x, (1, -7), axis=(0, -1)),
    "roll_same_axis": lambda x: np.roll(x, (1, 1), axis=(1, 1)),
    "tile": lambda x: np.tile(x, (2, 1, 1, 3)),
    "tile_scalar": lambda x: np.tile(x, 2),
    "repeat": lambda x: np.repeat(x, 3),
    "repeat_axis": lambda x: np.repeat(x, 2, axis=-1),
    "repeat_counts": lambda x: np.repeat(x, [0, 2, 1], axis=1),
    "repeat_zero": lambda x: np.repeat(x, 0, axis=0),
    "pad": lambda x: np.pad(x, 1),
    "pad_values": lambda x: np.pad(x, ((0, 1), (2, 0), (1, 1)), constant_values=((1, 2), (3, 4), (5, 6))),
    "pad_edge": lambda x: np.pad(x, ((1, 2), (0, 0), (3, 1)), mode="edge"),
    "pad_reflect": lambda x: np.pad(x, ((1, 0), (1, 2), (3, 7)), mode="reflect"),
    "pad_symmetric": lambda x: np.pad(x, 2, mode="symmetric"),
    "pad_wrap": lambda x: np.pad(x, (3, 2), mode="wrap"),
    "split": lambda x: np.split(x, 2, axis=-1),
    "split_points": lambda x: np.split(x, [1, 5, 2], axis=2),
    "array_split": lambda x: np.array_split(x, 3, axis=-1),
    "hsplit": lambda x: np.hsplit(x, 3),
    "vsplit": lambda x: np.vsplit(x, 2),
    "dsplit": lambda x: np.dsplit(x, 2),
    "concatenate": lambda x: np.concatenate([x, x * 2, x], axis=-2),
    "concatenate_flat": lambda x: np.concatenate([x, x], axis=None),
    "stack": lambda x: np.stack([x, x], axis=-1),
    "vstack": lambda x: np.vstack([x, x]),
    "hstack": lambda x: np.hstack([x, x]),
    "dstack": lambda x: np.dstack([x, x]),
    "append": lambda x: np.append(x, x),
    "append_axis": lambda x: np.append(x, x, axis=1),
    "iteration": lambda x: np.stack(list(x)),
    "copy": lambda x: np.copy(x),
    "atleast_1d": lambda x: np.atleast_1d(x),
}
if hasattr(np, "unstack"):
    FUNCTIONS["unstack"] = lambda x: np.unstack(x, axis=1)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_as_numpy(name: str) -> None:
    check(FUNCTIONS[name], sample((2, 3, 4)))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradient_as_central_differences(name: str) -> None:
    def one(x: np.ndarray) -> np.ndarray:
        y = FUNCTIONS[name](x)
        return y if not isinstance(y, list | tuple) else np.concatenate([np.ravel(part) for part in y])

    check_gradient(one, RNG.normal(size=(2, 3, 4)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "name",
    ["reshape", "transpose", "flip", "roll", "pad", "tile", "concatenate", "broadcast_to", "repeat_counts"],
)
def test_every_dtype_is_kept(name: str, dtype: str) -> None:
    if dtype == "bool" and name == "concatenate":  # x * 2 would be an integer
        check(lambda x: np.concatenate([x, x]), sample((2, 3, 4), dtype))
    else:
        check(FUNCTIONS[name], sample((2, 3, 4), dtype))


@pytest.mark.parametrize(
    "f",
    [
        lambda x: np.reshape(x, (0, 7)),
        lambda x: np.reshape(x, (3, -1)),
        lambda x: np.ravel(x),
        lambda x: np.transpose(x),
        lambda x: np.concatenate([x, x], axis=0),
        lambda x: np.stack([x, x]),
        lambda x: np.flip(x),
        lambda x: np.roll(x, 1),
        lambda x: np.tile(x, 2),
        lambda x: np.repeat(x, 2, axis=0),
        lambda x: np.pad(x, 1),
        lambda x: np.split(x, 1),
        lambda x: np.broadcast_to(x, (2, 3, 0)),
        lambda x: np.expand_dims(x, 0),
    ],
)
def test_zero_size(f) -> None:
    check(f, np.zeros((3, 0), np.float32))


@pytest.mark.parametrize(
    "f",
    [
        lambda x: np.reshape(x, (1, 1)),
        lambda x: np.ravel(x),
        lambda x: np.transpose(x),
        lambda x: np.expand_dims(x, 0),
        lambda x: np.broadcast_to(x, (2, 3)),
        lambda x: np.stack([x, x]),
        lambda x: np.atleast_1d(x),
        lambda x: np.atleast_2d(x),
        lambda x: np.atleast_3d(x),
        lambda x: np.tile(x, 3),
        lambda x: np.hstack([x, x]),
        lambda x: np.repeat(x, 2),
        lambda x: np.flip(x),
        lambda x: np.roll(x, 1),
    ],
)
def test_scalars(f) -> None:
    check(f, np.float32(1.5))


@pytest.mark.parametrize("shape", [(4,), (2, 3)])
def test_small_ranks(shape: tuple[int, ...]) -> None:
    x = sample(shape)
    for f in (
        np.atleast_1d,
        np.atleast_2d,
        np.atleast_3d,
        np.flipud,
        np.hstack,
        np.dstack,
        np.column_stack,
        np.vstack,
    ):
        check((lambda v, f=f: f([v, v])) if "stack" in f.__name__ else f, x)


def test_joining_promotes_as_numpy_does() -> None:
    a, b = sample((3,), "int32"), sample((3,), "float32")
    check(lambda x, y: np.concatenate([x, y]), a, b)
    check(lambda x, y: np.stack([x, y]), sample((2,), "uint8"), sample((2,), "int8"))
    check(lambda x: np.concatenate([x, [1.5, 2.5]]), b)
    check(lambda x: np.stack([x, 1.0]), np.float32(2))  # joining makes Python numbers arrays: float64
    check(lambda x: np.concatenate([x, x], dtype=np.float64), b)


def test_broadcast_arrays_and_static_facts() -> None:
    check(lambda x, y: np.broadcast_arrays(x, y), sample((2, 1)), sample((3,)))

    def facts(x):
        assert (np.shape(x), np.ndim(x), np.size(x), np.size(x, 1)) == ((2, 3), 2, 6, 3)
        return x

    check(facts, sample((2, 3)))


def test_a_shape_computed_from_a_shape_is_static() -> None:
    check(lambda x: x.reshape(x.shape[0] * x.shape[1], -1), sample((2, 3, 4)))


def test_concrete_arrays_get_numpys_own_result() -> None:
    x = sample((2, 3))
    assert type(F.reshape(x, (3, 2))) is np.ndarray
    assert F.concatenate([x, x]).shape == (4, 3)
    assert F.pad(x, 1).shape == (4, 5)
    np.testing.assert_array_equal(F.rot90(x), np.rot90(x))


def test_identities_record_nothing() -> None:
    _, graph, _ = record(lambda x: np.transpose(np.reshape(x, (2, 3)), (0, 1)), sample((2, 3)))
    assert [n.op.name for n in graph] == ["input"]


@pytest.mark.parametrize(
    ("f", "error", "words"),
    [
        (lambda x: np.reshape(x, (5, -1)), ShapeError, "cannot reshape 6 elements"),
        (lambda x: np.reshape(x, (-1, -1)), ShapeError, "at most one"),
        (lambda x: np.reshape(x, (2, 2)), ShapeError, "cannot reshape 6 elements"),
        (lambda x: np.reshape(x, (2.0, 3)), TypeError, "sequence of integers"),
        (lambda x: np.transpose(x, (0, 0)), ShapeError, "do not match"),
        (lambda x: np.transpose(x, (0, 5)), ShapeError, "axis 5"),
        (lambda x: np.squeeze(x, 0), ShapeError, "not one"),
        (lambda x: np.expand_dims(x, 7), ShapeError, "axis 7"),
        (lambda x: np.broadcast_to(x, (3, 2)), ShapeError, "cannot broadcast"),
        (lambda x: np.concatenate([x, np.ones((3, 2))]), ShapeError, "must be equal"),
        (lambda x: np.concatenate([x, np.ones(2)]), ShapeError, "as many axes"),
        (lambda x: np.concatenate([x[0, 0], x[0, 0]]), ShapeError, "np.stack"),
        (lambda x: np.concatenate([x, np.array(["a", "b"])]), DTypeError, "not supported"),
        (lambda x: np.stack([x, x[0]]), ShapeError, "same shape"),
        (lambda x: np.split(x, 2, axis=1), ShapeError, "equal parts"),
        (lambda x: np.pad(x, -1), ShapeError, "negative"),
        (lambda x: np.pad(x, ((1, 1), (1, 1), (1, 1))), ShapeError, "pad_width"),
        (lambda x: np.pad(x, 1, mode="linear_ramp"), UnsupportedFunctionError, "linear_ramp"),
        (lambda x: np.repeat(x, [1, 2, 3], axis=0), ShapeError, "2 integers"),
        (lambda x: np.repeat(x, -1), ShapeError, "negative"),
        (lambda x: np.moveaxis(x, (0, 1), 0), ShapeError, "same number"),
        (lambda x: np.rot90(x, 1, (0, 0)), ShapeError, "differ"),
        (lambda x: np.tile(x, -1), ShapeError, "negative"),
        (lambda x: np.reshape(x, (x.sum(), -1)), TypeError, "integers"),
        (lambda x: np.reshape(x, (np.int64(1) * x.astype(int).max(), -1)), ConcretizationError, "not known"),
    ],
)
def test_mistakes_are_explained(f, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words) as caught:
        record(f, np.ones((2, 3)))
    if issubclass(error, ShapeError):
        assert "test_shape.py" in str(caught.value), "the message names the user's line"


def test_primitives_are_strict() -> None:
    x = np.ones((2, 3))
    for op, attrs in (
        (ops.reshape, {"shape": (4,)}),
        (ops.transpose, {"perm": (0, 0)}),
        (ops.broadcast_to, {"shape": (3,)}),
        (ops.slice_, {"start": (0, 0), "stop": (3, 3), "step": (1, 1)}),
        (ops.slice_, {"start": (0,), "stop": (2,), "step": (1,)}),
        (ops.slice_, {"start": (0, 0), "stop": (2, 3), "step": (1, -1)}),
        (ops.pad, {"low": (-1, 0), "high": (0, 0), "interior": (0, 0), "value": 0.0}),
        (ops.flip, {"axes": (1, 0)}),
        (ops.concatenate, {"axis": 2}),
    ):
        with pytest.raises(ShapeError):
            op.infer(x, **attrs)


def test_slice_and_pad_are_each_others_gradient() -> None:
    rng = np.random.default_rng(1)
    x = rng.normal(size=(7, 4))
    cut = {"start": (1, 0), "stop": (6, 3), "step": (2, 2)}
    y = ops.slice_(x, **cut)
    g = rng.normal(size=y.shape)
    (dx,) = ops.slice_.vjp(g, y, x, **cut)  # type: ignore[operator]
    np.testing.assert_allclose((dx * x).sum(), (g * y).sum())
    widths = {"low": (2, 0), "high": (0, 1), "interior": (1, 3), "value": 0.0}
    z = ops.pad(x, **widths)
    g = rng.normal(size=z.shape)
    (dx,) = ops.pad.vjp(g, z, x, **widths)  # type: ignore[operator]
    np.testing.assert_allclose((dx * x).sum(), (g * z).sum())
