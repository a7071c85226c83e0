"""The cache key of a call: what about its arguments a trace depends on, and how two keys differ in words.

``jit.py`` builds the common part of the key inline for speed; everything unusual comes here.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Any

import numpy as np

from tracejit import trees
from tracejit.dtypes import canonical
from tracejit.errors import DTypeError, ShapeError, TracingError, describe
from tracejit.graph import MAX_BYTES
from tracejit.tensor import Tensor, check_alive, check_int_range, unlike_array


class Static:
    """Key part of a leaf that is traced by value: bool, str, enum, callable, any hashable configuration object."""

    __slots__ = ("_hash", "value")

    def __init__(self, value: Any) -> None:
        self.value = value
        # Slices are hashable from Python 3.12 on.
        same = (value.start, value.stop, value.step) if isinstance(value, slice) else value
        self._hash = hash((type(value), same))

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Static)
            and type(self.value) is type(other.value)
            and bool(self.value == other.value)
        )

    def __repr__(self) -> str:
        return f"static {self.value!r}"


def leaf_key(leaf: Any, path: str) -> tuple[Any, Any]:
    """``(key part, leaf to use)`` for a leaf of an unusual type; arrays and Python numbers come out as in the fast path.

    Raises DTypeError/TypeError with the path of the argument for what cannot be an argument.
    """
    if isinstance(leaf, np.ndarray):
        if type(leaf) is not np.ndarray and unlike_array(leaf):
            raise DTypeError.make(
                f"argument {path} is a {type(leaf).__name__}, whose semantics differ from ndarray's",
                hint="pass np.asarray(x)",
            )
        return (leaf.dtype, leaf.shape), np.asarray(leaf)
    kind = type(leaf)
    if kind is float or kind is int:
        return kind, leaf
    if isinstance(leaf, Tensor):
        check_alive(leaf)
        return ("tensor", leaf.shape, leaf.dtype, leaf.weak), leaf
    if isinstance(leaf, np.generic):
        array = np.asarray(leaf)
        return (array.dtype, ()), array
    if hasattr(leaf, "__tracejit_array__"):
        return (leaf.dtype, leaf.shape), leaf
    if hasattr(leaf, "__next__"):
        raise TracingError.make(
            f"argument {path} is a {kind.__name__}, which a call would use up",
            hint="pass a list or tuple",
        )
    if isinstance(leaf, bool | str | bytes | enum.Enum | type | np.dtype) or leaf is None or callable(leaf):
        return Static(leaf), leaf
    if isinstance(leaf, complex):
        raise DTypeError.make(f"argument {path} is complex, which is not supported", got={path: leaf})
    if hasattr(leaf, "__array__") or hasattr(leaf, "__dlpack__"):
        try:
            array = np.asarray(leaf)
        except Exception as error:
            raise DTypeError.make(
                f"argument {path}: cannot convert {kind.__name__} to an array: {error}"
            ) from None
        return (array.dtype, array.shape), array
    try:
        return Static(leaf), leaf
    except TypeError:
        raise DTypeError.make(
            f"argument {path} of type {kind.__module__}.{kind.__qualname__} is neither an array, a number, a tree of them, "
            "nor hashable",
            hint="register the class as a tree with optree, or make it a frozen dataclass",
        ) from None


def check_leaf(leaf: Any, path: str) -> None:
    """Refuse, before tracing, array arguments that no device can take."""
    if type(leaf) is int:
        check_int_range(leaf, f"argument {path}")
        return
    dtype = getattr(leaf, "dtype", None)
    if dtype is None or isinstance(leaf, Tensor):
        return
    try:
        canonical(dtype)
    except DTypeError:
        kind = dtype.kind
        what = {
            "O": "an array of Python objects (a ragged list, mixed types, or None among numbers)",
            "U": "an array of strings",
            "S": "an array of byte strings",
            "V": "a structured array",
            "c": "a complex array",
            "M": "an array of dates",
            "m": "an array of time spans",
        }.get(kind, f"an array of dtype {dtype}")
        raise DTypeError.make(
            f"argument {path} is {what}, which is not supported",
            got={path: leaf},
            hint="convert it first, e.g. x.astype(np.float32)",
        ) from None
    size = 1
    for s in leaf.shape:
        size *= s
    if size * dtype.itemsize > MAX_BYTES:
        raise ShapeError.make(f"argument {path} is too large", got={path: leaf})


def leaf_paths(args: tuple[Any, ...], kwargs: dict[str, Any], parameters: Sequence[str]) -> list[str]:
    """Readable paths of the leaves of ``(args, kwargs)``: ``params['w']``, ``x``, ``model.blocks[0].weight``."""
    out = []
    for text in trees.paths((args, kwargs)):
        head, _, rest = text[1:].partition("]")
        if head == "0":  # positional: name it by the parameter
            index, _, rest = rest[1:].partition("]")
            position = int(index)
            name = parameters[position] if position < len(parameters) else f"args[{position}]"
        else:
            key, _, rest = rest[1:].partition("]")
            name = key.strip("'\"")
        out.append(name + rest)
    return out


def describe_part(part: Any) -> str:
    """A key part in words: ``f32[8,64]``, ``a Python float``, ``static True``."""
    if isinstance(part, type):
        return f"a Python {part.__name__}"
    if isinstance(part, Static):
        return repr(part)
    if isinstance(part, tuple) and len(part) == 2 and isinstance(part[0], np.dtype):
        return describe(_Aval(part[1], part[0]))
    return repr(part)


class _Aval:
    def __init__(self, shape: tuple[int, ...], dtype: Any) -> None:
        self.shape, self.dtype = shape, dtype


def difference(old: Sequence[Any], new: Sequence[Any], paths: Sequence[str]) -> list[str]:
    """What changed between two leaf-key lists of the same tree, one line per leaf, naming the dimension."""
    lines = []
    for a, b, path in zip(old, new, paths):
        if a == b:
            continue
        line = f"argument {path}: {describe_part(a)} -> {describe_part(b)}"
        if (
            isinstance(a, tuple)
            and isinstance(b, tuple)
            and len(a) == 2 == len(b)
            and a[0] == b[0]
            and len(a[1]) == len(b[1])
        ):
            dims = [f"dimension {i} from {p} to {q}" for i, (p, q) in enumerate(zip(a[1], b[1])) if p != q]
            line += f" ({', '.join(dims)})"
        lines.append(line)
    return lines
