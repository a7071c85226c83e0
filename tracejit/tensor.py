"""The symbolic Tensor that stands for an array while a function is traced, and the context it is recorded in.

``bind`` is the one door through which every operation enters the graph. The Python operators and NumPy protocols of
:class:`Tensor` forward to ``tracejit.functions``, which has NumPy's promotion and broadcasting.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

import numpy as np

from tracejit import source as _source
from tracejit.context import TraceContext, current_context, recording
from tracejit.dtypes import WEAK_DTYPES, DType, canonical, weak_type
from tracejit.errors import DTypeError, LeakedTensorError, ShapeError, TracingError, describe
from tracejit.graph import ArrayLiteral, Node
from tracejit.ops.registry import Op
from tracejit.state import state


class Tensor:
    """A value of the traced function that does not exist yet: shape and dtype are known, elements are not.

    Behaves like ``numpy.ndarray`` in expressions. ``weak`` marks values that stand for Python scalars (NEP 50).
    """

    __slots__ = ("__weakref__", "ctx", "node", "weak")

    # ndarray operators must hand over to ours; this also beats np.generic scalars.
    __array_priority__ = 1000

    def __init__(self, node: Node, ctx: TraceContext, weak: bool = False) -> None:
        self.node = node
        self.ctx = ctx
        self.weak = weak

    # -- what is known -------------------------------------------------------------------------------------------

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the axes."""
        return self.node.shape

    @property
    def dtype(self) -> DType:
        """Element type."""
        return self.node.dtype

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.node.shape)

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.node.size

    @property
    def nbytes(self) -> int:
        """Bytes of the value."""
        return self.node.nbytes

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return self.node.dtype.itemsize

    def __len__(self) -> int:
        if not self.node.shape:
            raise TypeError("len() of unsized object")
        return self.node.shape[0]

    def __iter__(self) -> Iterator[Any]:
        if not self.node.shape:
            raise TypeError("iteration over a 0-d array")
        return (self[i] for i in range(self.node.shape[0]))

    def __repr__(self) -> str:
        where = f" made at {self.node.source}" if self.node.source else ""
        return f"Tensor({describe(self)}, {self.node.op.name}{where})"

    __hash__ = None  # type: ignore[assignment]

    # -- what is not known ---------------------------------------------------------------------------------------

    def _concrete(self, wanted: str) -> Any:
        """The value as a Python scalar if it follows from scalar arguments and constants (then guarded), else an error."""
        from tracejit.concrete import concretize

        return concretize(self, wanted)

    def __bool__(self) -> bool:
        return bool(self._concrete("bool"))

    def __int__(self) -> int:
        return int(self._concrete("int"))

    def __float__(self) -> float:
        return float(self._concrete("float"))

    def __complex__(self) -> complex:
        return complex(self._concrete("complex"))

    def __index__(self) -> int:
        if self.dtype.kind not in "iu":
            raise TypeError(
                f"only integer scalar arrays can be converted to a scalar index, not {describe(self)}"
            )
        return int(self._concrete("index"))

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return np.asarray(self._concrete("NumPy array"), dtype=dtype)

    def item(self, *args: int) -> Any:
        """The Python scalar, where it is known while tracing."""
        return (self[args] if args else self)._concrete("Python scalar")

    def tolist(self) -> Any:
        """The nested list, where it is known while tracing."""
        value = self._concrete("list")
        return value.tolist() if isinstance(value, np.ndarray) else value

    def __contains__(self, value: Any) -> bool:
        return bool((self == value).any())

    def __setitem__(self, index: Any, value: Any) -> NoReturn:
        raise TracingError.make(
            "arrays cannot be assigned to in traced code, because recorded values are immutable",
            op="setitem",
            got={"x": self},
            hint="use tj.where(mask, new, x), np.concatenate, or x.at-style rebuilding instead",
        )

    def __copy__(self) -> Tensor:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self  # immutable, and its trace is not copied

    def __reduce__(self) -> NoReturn:
        raise TracingError.make(
            "a tensor cannot be pickled: it has no value while its function is traced", got={"x": self}
        )

    def __format__(self, spec: str) -> str:
        if spec:
            return format(self._concrete("formatted number"), spec)
        return repr(self)

    # -- NumPy protocols -----------------------------------------------------------------------------------------

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **kwargs: Any) -> Any:
        from tracejit.functions import dispatch

        return dispatch.array_ufunc(ufunc, method, inputs, kwargs)

    def __array_function__(
        self, func: Any, types: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Any:
        from tracejit.functions import dispatch

        return dispatch.array_function(func, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        from tracejit.functions import dispatch

        return dispatch.missing_attribute(self, name)

    # -- operators -----------------------------------------------------------------------------------------------
    # One line each: the function has NumPy's semantics and does the rest.

    def __add__(self, other: Any) -> Any:
        return _binary("add", self, other)

    def __radd__(self, other: Any) -> Any:
        return _binary("add", other, self)

    def __sub__(self, other: Any) -> Any:
        return _binary("subtract", self, other)

    def __rsub__(self, other: Any) -> Any:
        return _binary("subtract", other, self)

    def __mul__(self, other: Any) -> Any:
        return _binary("multiply", self, other)

    def __rmul__(self, other: Any) -> Any:
        return _binary("multiply", other, self)

    def __truediv__(self, other: Any) -> Any:
        return _binary("divide", self, other)

    def __rtruediv__(self, other: Any) -> Any:
        return _binary("divide", other, self)

    def __floordiv__(self, other: Any) -> Any:
        return _binary("floor_divide", self, other)

    def __rfloordiv__(self, other: Any) -> Any:
        return _binary("floor_divide", other, self)

    def __mod__(self, other: Any) -> Any:
        return _binary("remainder", self, other)

    def __rmod__(self, other: Any) -> Any:
        return _binary("remainder", other, self)

    def __divmod__(self, other: Any) -> Any:
        return _binary("floor_divide", self, other), _binary("remainder", self, other)

    def __rdivmod__(self, other: Any) -> Any:
        return _binary("floor_divide", other, self), _binary("remainder", other, self)

    def __pow__(self, other: Any) -> Any:
        return _binary("power", self, other)

    def __rpow__(self, other: Any) -> Any:
        return _binary("power", other, self)

    def __and__(self, other: Any) -> Any:
        return _binary("bitwise_and", self, other)

    def __rand__(self, other: Any) -> Any:
        return _binary("bitwise_and", other, self)

    def __or__(self, other: Any) -> Any:
        return _binary("bitwise_or", self, other)

    def __ror__(self, other: Any) -> Any:
        return _binary("bitwise_or", other, self)

    def __xor__(self, other: Any) -> Any:
        return _binary("bitwise_xor", self, other)

    def __rxor__(self, other: Any) -> Any:
        return _binary("bitwise_xor", other, self)

    def __lshift__(self, other: Any) -> Any:
        return _binary("left_shift", self, other)

    def __rlshift__(self, other: Any) -> Any:
        return _binary("left_shift", other, self)

    def __rshift__(self, other: Any) -> Any:
        return _binary("right_shift", self, other)

    def __rrshift__(self, other: Any) -> Any:
        return _binary("right_shift", other, self)

    def __lt__(self, other: Any) -> Any:
        return _binary("less", self, other)

    def __le__(self, other: Any) -> Any:
        return _binary("less_equal", self, other)

    def __gt__(self, other: Any) -> Any:
        return _binary("greater", self, other)

    def __ge__(self, other: Any) -> Any:
        return _binary("greater_equal", self, other)

    def __eq__(self, other: Any) -> Any:
        return _never(self, False) if _is_foreign(other) else _binary("equal", self, other)

    def __ne__(self, other: Any) -> Any:
        return _never(self, True) if _is_foreign(other) else _binary("not_equal", self, other)

    def __neg__(self) -> Any:
        return _f().negative(self)

    def __pos__(self) -> Any:
        return _f().positive(self)

    def __abs__(self) -> Any:
        return _f().absolute(self)

    def __invert__(self) -> Any:
        return _f().invert(self)

    def __round__(self, ndigits: int | None = None) -> Any:
        if ndigits is None and not self.node.shape and self.dtype.kind == "f":  # as Python: an integer
            return _f().astype(_f().round(self), np.int64)
        return _f().round(self, ndigits or 0)

    def __matmul__(self, other: Any) -> Any:
        return _binary("matmul", self, other)

    def __rmatmul__(self, other: Any) -> Any:
        return _binary("matmul", other, self)

    def __getitem__(self, index: Any) -> Any:
        return _f().getitem(self, index)

    # -- methods and attributes of ndarray -----------------------------------------------------------------------

    @property
    def T(self) -> Any:
        """All axes reversed."""
        return _f().transpose(self)

    @property
    def mT(self) -> Any:
        """The last two axes swapped."""
        return _f().matrix_transpose(self)

    @property
    def flat(self) -> Any:
        """The flattened tensor (a copy, unlike NumPy's iterator)."""
        return _f().ravel(self)

    @property
    def real(self) -> Tensor:
        """The tensor itself: there are no complex numbers."""
        return self

    @property
    def imag(self) -> Any:
        """Zeros: there are no complex numbers."""
        return _f().imag(self)

    def astype(self, dtype: Any, **kwargs: Any) -> Any:
        """Conversion as in NumPy (float to int truncates)."""
        return _f().astype(self, dtype)

    def reshape(self, *shape: Any, order: str = "C") -> Any:
        """As ``np.reshape``; one size may be -1."""
        return _f().reshape(self, shape[0] if len(shape) == 1 else shape, order=order)

    def transpose(self, *axes: Any) -> Any:
        """As ``ndarray.transpose``."""
        if not axes or (len(axes) == 1 and axes[0] is None):
            return _f().transpose(self)
        return _f().transpose(self, axes[0] if len(axes) == 1 and not isinstance(axes[0], int) else axes)

    def dot(self, other: Any) -> Any:
        """As ``np.dot``."""
        return _f().dot(self, other)

    def copy(self, order: str = "C") -> Tensor:
        """The tensor itself: recorded values are immutable."""
        return self


def _f() -> Any:
    from tracejit import functions

    return functions


def _is_foreign(other: Any) -> bool:
    """What no number equals: ``x == None`` and ``x == "text"`` are False for every element, as in NumPy."""
    return other is None or isinstance(other, str | bytes)


def _never(x: Tensor, value: bool) -> Any:
    check_alive(x)
    return _f().full_like(x, value, dtype=bool)


def _binary(name: str, left: Any, right: Any) -> Any:
    for operand in (left, right):
        if not isinstance(operand, Tensor | np.ndarray | np.generic | bool | int | float) and not hasattr(
            operand, "__array__"
        ):
            if isinstance(operand, list | tuple):
                continue
            if isinstance(operand, complex):
                raise DTypeError.make(
                    "complex numbers are not supported", op=name, got={"x": left, "y": right}
                )
            return NotImplemented
    return getattr(_f(), name)(*(_joined(v) for v in (left, right)))


def _joined(operand: Any) -> Any:
    """A list of tensors as one: NumPy takes ``[a, b] * x`` too."""
    if isinstance(operand, list | tuple) and any(isinstance(v, Tensor | list | tuple) for v in operand):
        return _f().asarray(operand)
    return operand


# Methods that are the NumPy function with the array as first argument.
for _name in (
    "sum", "mean", "std", "var", "prod", "max", "min", "argmax", "argmin", "any", "all", "cumsum", "cumprod", "ravel",
    "squeeze", "swapaxes", "clip", "round", "repeat", "take", "argsort", "diagonal", "trace", "conj",
    "conjugate", "searchsorted",
):  # fmt: skip

    def _method(self: Tensor, *args: Any, _name: str = _name, **kwargs: Any) -> Any:
        return getattr(_f(), _name)(self, *args, **kwargs)

    _method.__name__ = _name
    _method.__doc__ = f"As ``np.{_name}`` with this tensor as first argument."
    setattr(Tensor, _name, _method)


def _flatten(self: Tensor, order: str = "C") -> Any:
    """As ``ndarray.flatten``."""
    return _f().ravel(self, order)


def _sort(self: Tensor, axis: int = -1) -> NoReturn:
    """In-place sorting does not exist for recorded values."""
    raise TracingError.make(
        "x.sort() sorts in place, which traced code cannot", op="sort", hint="use np.sort(x)"
    )


Tensor.flatten = _flatten  # type: ignore[attr-defined]
Tensor.sort = _sort  # type: ignore[attr-defined]


# -- entering the graph --------------------------------------------------------------------------------------------


def bind(op: Op, operands: Sequence[Any], attrs: Mapping[str, Any]) -> Any:
    """Record ``op`` if any operand is a Tensor (or there are none and a trace is running), else compute it now."""
    ctx = context_of(operands)
    if ctx is None:
        if operands or state.context is None:
            return op.reference(*(np.asarray(o) for o in operands), **attrs)
        ctx = state.context
    nodes = tuple(to_node(o, ctx, op=op.name) for o in operands)
    node = ctx.builder.add(op, nodes, attrs)
    if "effect" in op.traits and node not in ctx.effects:
        ctx.effects.append(node)
    if node.avals:
        project = _project()
        return tuple(
            Tensor(ctx.builder.add(project, (node,), {"index": i}), ctx) for i in range(len(node.avals))
        )
    return Tensor(node, ctx)


def _project() -> Op:
    from tracejit.ops import registry

    return registry.get("proj")


def context_of(operands: Sequence[Any]) -> TraceContext | None:
    """The innermost open context among the operands that are tensors; None if none is a tensor."""
    if not any(isinstance(o, Tensor) for o in operands):
        return None
    current = state.context
    for o in operands:
        if isinstance(o, Tensor):
            check_alive(o)
            if not o.ctx.encloses(current):
                raise LeakedTensorError.make(
                    f"a tensor recorded for {o.ctx.name!r} is used in another trace",
                    got={"x": o},
                    hint="pass it as an argument instead",
                )
    return current


def check_alive(tensor: Tensor) -> None:
    """LeakedTensorError if the trace that made ``tensor`` has ended; the message names the line that made it."""
    if not tensor.ctx.open:
        raise LeakedTensorError.make(
            f"this tensor was made by line {tensor.node.source or '?'} while tracing {tensor.ctx.name!r}, which has ended; "
            "it never had a value",
            got={"x": tensor},
            hint="return it from the traced function instead of storing it in a global, an attribute or a closure",
        )


def to_node(value: Any, ctx: TraceContext, *, op: str = "") -> Node:
    """The node in ``ctx`` that stands for an operand: a tensor, an array (captured by reference) or a Python scalar."""
    if isinstance(value, Tensor):
        check_alive(value)
        if value.ctx is ctx:
            return value.node
        chain = []
        inner: TraceContext | None = ctx
        while inner is not None and inner is not value.ctx:
            chain.append(inner)
            inner = inner.parent
        if inner is None:
            raise LeakedTensorError.make(
                f"a tensor recorded for {value.ctx.name!r} is used in another trace", got={"x": value}
            )
        for level in reversed(chain):
            value = Tensor(level.lift(value), level, value.weak)
        return value.node
    kind = type(value)
    if kind in WEAK_DTYPES:
        check_int_range(value, op)
        return ctx.builder.const(value, WEAK_DTYPES[kind])
    if isinstance(value, np.generic):
        return ctx.builder.const(value.item(), canonical(value.dtype, op=op))
    array = as_array(value, op=op)
    if array is not value and array.ndim == 0:
        return ctx.builder.const(array.item(), canonical(array.dtype, op=op))
    if array is not value and isinstance(array, np.ndarray):  # a list literal in the user's code: a constant
        return ctx.builder.add("literal", (), {"value": ArrayLiteral(array)})
    return ctx.capture(array)


def check_int_range(value: Any, op: str) -> None:
    """OverflowError, as NumPy raises, for Python integers that no 64-bit integer can hold."""
    if type(value) is int and not -(1 << 63) <= value < (1 << 63):
        raise OverflowError(f"[{op}] Python integer {value} out of bounds for int64; at {_source.location()}")


def unlike_array(value: np.ndarray) -> bool:
    """Whether a subclass of ndarray follows other rules than its parent: a masked array or a matrix.

    ``numpy.ma`` is looked up, not imported (12 ms): without it nothing can be a masked array.
    """
    masked = getattr(sys.modules.get("numpy.ma"), "MaskedArray", np.matrix)
    return isinstance(value, masked | np.matrix)


def as_array(value: Any, *, op: str = "") -> Any:
    """A NumPy or device array of a supported dtype; a clear DTypeError for objects, strings, ragged lists, ..."""
    if isinstance(value, np.ndarray):
        if type(value) is not np.ndarray and unlike_array(value):
            kind = type(value).__name__
            raise DTypeError.make(
                f"a {kind} follows other rules than an array",
                op=op,
                got={"x": value},
                hint="use np.asarray(x)",
            )
        canonical(value.dtype, op=op)
        return value
    if hasattr(value, "__tracejit_array__"):
        return value
    try:
        array = np.asarray(value)
    except ValueError as error:  # ragged nested sequences
        raise ShapeError.make(f"cannot make an array of {type(value).__name__}: {error}", op=op) from None
    canonical(array.dtype, op=op)
    return array


def is_arraylike(value: Any) -> bool:
    """True for NumPy arrays and scalars, device arrays, and tensors."""
    return isinstance(value, Tensor | np.ndarray | np.generic) or hasattr(value, "__tracejit_array__")


def aval_dtype(value: Any, *, op: str = "") -> DType | type:
    """The dtype of an operand, or the Python type ``bool``/``int``/``float`` for weakly typed ones."""
    if isinstance(value, Tensor):
        return weak_type(value.dtype) if value.weak else value.dtype
    kind = type(value)
    if kind in WEAK_DTYPES:
        return kind
    if isinstance(value, complex):
        raise DTypeError.make("complex numbers are not supported", op=op)
    dtype = getattr(value, "dtype", None)
    if dtype is None:
        dtype = as_array(value, op=op).dtype
    return canonical(dtype, op=op)


def zeros(ctx: TraceContext, shape: tuple[int, ...], dtype: DType, value: float = 0) -> Tensor:
    """A tensor of ``shape`` filled with a constant, recorded in ``ctx``."""
    scalar = ctx.builder.const(value, dtype)
    node = scalar if shape == () else ctx.builder.add("broadcast_to", (scalar,), {"shape": shape})
    return Tensor(node, ctx)


def lift(value: Any, ctx: TraceContext, like: Node) -> Tensor:
    """A concrete scalar or array as a tensor with the shape and dtype of ``like`` (broadcast if need be)."""
    if isinstance(value, Tensor):
        return value
    scalar = Tensor(to_node(np.asarray(value, dtype=like.dtype)[()], ctx), ctx)
    return _f().broadcast_to(scalar, like.shape)


__all__ = [
    "Tensor",
    "TraceContext",
    "as_array",
    "aval_dtype",
    "bind",
    "check_alive",
    "context_of",
    "current_context",
    "is_arraylike",
    "lift",
    "recording",
    "to_node",
    "zeros",
]
