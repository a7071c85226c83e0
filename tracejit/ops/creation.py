"""Ops without array operands (inputs, constants, iota, random bits) and markers that pass values on.

Recorded by tracing, ``functions/creation.py`` and ``random.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tracejit.dtypes import UINT32, DType
from tracejit.errors import DTypeError, GraphError, ShapeError
from tracejit.ops.registry import NONDIFFERENTIABLE, HasAval, define

Aval = tuple[tuple[int, ...], DType]

# -- values that exist before the graph runs -------------------------------------------------------


def _input_infer(*, index: int, kind: str, shape: tuple[int, ...], dtype: DType) -> Aval:
    return shape, dtype


def _input_reference(**attrs: Any) -> Any:
    raise GraphError.make("an input has no value of its own: the caller supplies it", op="input")


input_ = define(
    "input",
    arity=0,
    infer=_input_infer,
    reference=_input_reference,
    vjp=NONDIFFERENTIABLE,
    category="parameter",
    meaning="A value given at each call: an argument, a captured array, or an outer value of a sub-graph.",
    formula="xᵢ",
    shape_rule="as given by the caller",
    grad_rule="the sum of all cotangents that reach it is the gradient",
    samples=list,
    attrs={
        "index": "int: position among the inputs",
        "kind": "str: argument, scalar (a Python number), capture or outer",
        "shape": "tuple of int",
        "dtype": "dtype",
    },
    traits=("effect",),  # never merged with an equal-looking input
)

const = define(
    "const",
    arity=0,
    infer=lambda *, value, dtype: ((), dtype),
    reference=lambda *, value, dtype: np.asarray(value, dtype=dtype),
    vjp=NONDIFFERENTIABLE,
    category="constant",
    meaning="A scalar constant.",
    formula="c",
    shape_rule="()",
    samples=lambda: [
        ((), {"value": 2.5, "dtype": np.dtype("float32")}),
        ((), {"value": -3, "dtype": np.dtype("int64")}),
        ((), {"value": True, "dtype": np.dtype("bool")}),
    ],
    attrs={"value": "scalar", "dtype": "dtype"},
)


def _literal_samples() -> list[tuple[tuple[np.ndarray, ...], dict[str, Any]]]:
    from tracejit.graph import ArrayLiteral  # the graph module imports the op table

    return [((), {"value": ArrayLiteral(np.arange(6, dtype=np.float32).reshape(2, 3))})]


literal = define(
    "literal",
    arity=0,
    infer=lambda *, value: (value.array.shape, value.array.dtype),
    reference=lambda *, value: value.array,
    vjp=NONDIFFERENTIABLE,
    category="constant",
    meaning="A constant array held by the graph, such as a list in the user's code.",
    formula="[c₀, c₁, …]",
    shape_rule="the shape of the array",
    samples=_literal_samples,
    attrs={"value": "ArrayLiteral"},
)


def _iota_infer(*, shape: tuple[int, ...], axis: int, dtype: DType) -> Aval:
    if not 0 <= axis < len(shape):
        raise ShapeError.make(f"axis {axis} does not exist in shape {shape}", op="iota")
    if dtype.kind == "b":
        raise DTypeError.make("positions cannot be booleans", op="iota")
    return shape, dtype


def _iota_reference(*, shape: tuple[int, ...], axis: int, dtype: DType) -> np.ndarray:
    column = np.arange(shape[axis]).astype(dtype).reshape([-1 if i == axis else 1 for i in range(len(shape))])
    return np.ascontiguousarray(np.broadcast_to(column, shape))


iota = define(
    "iota",
    arity=0,
    infer=_iota_infer,
    reference=_iota_reference,
    vjp=NONDIFFERENTIABLE,
    category="constant",
    meaning="The position along one axis.",
    formula="y[i₀, …, iₙ] = i_axis",
    shape_rule="the shape attribute",
    samples=lambda: [
        ((), {"shape": (5,), "axis": 0, "dtype": np.dtype("int64")}),
        ((), {"shape": (2, 3), "axis": 1, "dtype": np.dtype("float32")}),
    ],
    attrs={"shape": "tuple of int", "axis": "int", "dtype": "dtype"},
)

# -- random bits -----------------------------------------------------------------------------------

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = np.uint32(0x1BD11BDA)
_BLOCK = 1 << 14  # elements per pass: four uint32 buffers of this length stay in the level-1/2 cache


def threefry2x32(k0: Any, k1: Any, c0: np.ndarray, c1: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Threefry-2x32-20: the two output words for key ``(k0, k1)`` and counters ``(c0, c1)``, all uint32.

    Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011. With ``ks = (k0, k1,
    k0 ^ k1 ^ 0x1BD11BDA)`` and all arithmetic modulo 2**32::

        x0 = c0 + ks[0];  x1 = c1 + ks[1]
        for r in range(20):
            x0 = x0 + x1
            x1 = rotl(x1, R[r % 8]) ^ x0           # R = 13 15 26 6 17 29 16 24
            if r % 4 == 3:
                s = r // 4 + 1
                x0 = x0 + ks[s % 3];  x1 = x1 + ks[(s + 1) % 3] + s
    """
    one = np.ones(1, np.uint32)  # arrays wrap around silently, NumPy scalars would warn
    key0, key1 = one * np.uint32(k0), one * np.uint32(k1)
    keys = (key0, key1, key0 ^ key1 ^ _PARITY)
    x0, x1 = c0 + keys[0], c1 + keys[1]
    for group in range(5):
        for rotation in _ROTATIONS[group % 2]:
            x0 += x1
            high = x1 << np.uint32(rotation)
            x1 >>= np.uint32(32 - rotation)
            x1 |= high
            x1 ^= x0
        step = group + 1
        x0 += keys[step % 3]
        x1 += keys[(step + 1) % 3] + np.uint32(step)
    return x0, x1


def _random_bits_infer(k0: HasAval, k1: HasAval, *, shape: tuple[int, ...]) -> Aval:
    for key in (k0, k1):
        if key.shape != () or key.dtype != UINT32:
            raise DTypeError.make(
                "the key words must be uint32 scalars", op="random_bits", got={"k0": k0, "k1": k1}
            )
    return shape, UINT32


def _random_bits_reference(k0: Any, k1: Any, *, shape: tuple[int, ...]) -> np.ndarray:
    size = int(np.prod(shape, dtype=np.int64))
    out = np.empty(size, np.uint32)
    for start in range(0, size, _BLOCK):
        counter = np.arange(start, min(start + _BLOCK, size), dtype=np.uint64)
        low, high = counter.astype(np.uint32), (counter >> np.uint64(32)).astype(np.uint32)
        out[start : start + len(counter)] = threefry2x32(k0, k1, low, high)[0]
    return out.reshape(shape)


random_bits = define(
    "random_bits",
    arity=2,
    infer=_random_bits_infer,
    reference=_random_bits_reference,
    vjp=NONDIFFERENTIABLE,
    category="random",
    meaning="Random 32-bit words from a counter-based generator: element i depends on the key and on i only.",
    formula="yᵢ = threefry2x32₂₀(key = (k₀, k₁), counter = (i mod 2³², ⌊i / 2³²⌋))₀, i the row-major index",
    shape_rule="the shape attribute",
    samples=lambda: [
        ((np.asarray(7, np.uint32), np.asarray(11, np.uint32)), {"shape": (3, 4)}),
        ((np.asarray(0, np.uint32), np.asarray(0, np.uint32)), {"shape": ()}),
    ],
    attrs={"shape": "tuple of int"},
)

# -- markers and projections -----------------------------------------------------------------------

identity = define(
    "identity",
    arity=1,
    infer=lambda x: (x.shape, x.dtype),
    reference=lambda x: x,
    vjp=lambda g, y, x: [g],
    category="control",
    meaning="The value itself.",
    formula="y = x",
    shape_rule="same as the operand",
    grad_rule="dx = g",
    samples=lambda: [((np.arange(3.0),), {}), ((np.asarray(2, np.int32),), {})],
    traits=("view",),
)


def _proj_infer(x: Any, *, index: int) -> Aval:
    avals: Sequence[Aval] = getattr(x, "avals", ())
    if not 0 <= index < len(avals):
        raise GraphError.make(f"result {index} does not exist among {len(avals)} results", op="proj")
    return avals[index]


proj = define(
    "proj",
    arity=1,
    infer=_proj_infer,
    reference=lambda x, *, index: x[index],
    vjp=NONDIFFERENTIABLE,
    category="control",
    meaning="One result of an operation that has several.",
    formula="y = xᵢ",
    shape_rule="the shape of that result",
    grad_rule="autograd hands the cotangents of all results to the operation as one tuple",
    samples=list,
    attrs={"index": "int"},
    traits=("view",),
)


def _custom_vjp_infer(*operands: HasAval, rule: Any, n_out: int) -> list[Aval]:
    if not 0 <= n_out <= len(operands):
        raise GraphError.make(f"{n_out} results but only {len(operands)} operands", op="custom_vjp")
    return [(o.shape, o.dtype) for o in operands[:n_out]]


custom_vjp = define(
    "custom_vjp",
    arity=None,
    infer=_custom_vjp_infer,  # type: ignore[arg-type]  # multi-output ops return a list
    reference=lambda *operands, rule, n_out: tuple(operands[:n_out]),
    vjp=NONDIFFERENTIABLE,  # autograd.py applies attrs["rule"]
    category="control",
    meaning="Marks results that have a gradient rule of their own; passes the first operands through.",
    formula="(y₀ … yₙ₋₁) = (x₀ … xₙ₋₁); operands n … are the arguments the rule differentiates by",
    shape_rule="the shapes of the first n_out operands",
    grad_rule="the user's rule, applied to the operands after the first n_out",
    samples=lambda: [
        ((np.arange(3.0), np.ones(2)), {"rule": None, "n_out": 1}),
    ],
    attrs={"rule": "object or None: the rule; not serialised", "n_out": "int"},
    traits=("multi",),
)
