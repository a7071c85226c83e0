"""``tj.Array``: an immutable array that stays on its device. Returned by traced functions on devices without host memory.

It becomes NumPy where NumPy is needed (``np.asarray``, ``float``, printing, indexing, ndarray methods); ufuncs and
operators between arrays run on the device. Backends make it around a :class:`Storage`; nothing here knows a backend.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from math import prod
from typing import Any, Protocol

import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin

from tracejit.errors import DeviceLostError

#: ndarray methods that change the array: on the host copy behind ``__getattr__`` they would be lost without a word.
_CHANGING = frozenset(
    {"byteswap", "fill", "itemset", "partition", "put", "resize", "setfield", "setflags", "sort"}
)
_IMMUTABLE = (
    "a tj.Array cannot be changed; make a NumPy copy with np.array(x), or build a new array with tj.where"
)


class Storage(Protocol):
    """What a backend keeps for one array."""

    @property
    def device(self) -> str:
        """The device string, e.g. ``"wgpu:0"``."""
        ...

    def read(self, shape: tuple[int, ...]) -> np.ndarray:
        """Wait for the device and return a fresh host copy; DeviceLostError if the device went away."""
        ...


class Array(NDArrayOperatorsMixin):
    """An array on a device: ``shape``, ``dtype``, ``device``, and everything NumPy asks of an array-like.

    Feeding one to a traced call on the same device copies nothing. Device memory returns to the device's pool when the
    last reference goes. Immutable: item assignment raises TypeError.
    """

    __slots__ = ("__weakref__", "dtype", "shape", "storage")

    __tracejit_array__ = True
    __array_priority__ = 900

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    storage: Storage

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype[Any], storage: Storage) -> None:
        self.shape, self.dtype, self.storage = shape, dtype, storage

    # -- what it is ------------------------------------------------------------------------------------------------
    @property
    def device(self) -> str:
        """Where it lives, as ``device=`` takes it."""
        return self.storage.device

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def itemsize(self) -> int:
        """Bytes per element as NumPy would store it."""
        return int(self.dtype.itemsize)

    @property
    def nbytes(self) -> int:
        """Bytes as NumPy would store it; a device may keep it in another width."""
        return self.size * self.itemsize

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("len() of unsized object")
        return self.shape[0]

    def __repr__(self) -> str:
        prefix = "Array("
        try:
            body = np.array2string(self.numpy(), separator=", ", prefix=prefix, threshold=200)
        except DeviceLostError:  # a debugger or an error message must be able to show it
            body = f"<lost with its device>, shape={self.shape}"
        return f"{prefix}{body}, dtype={self.dtype}, device={self.device!r})"

    def __str__(self) -> str:
        return str(self.numpy())

    def __format__(self, spec: str) -> str:
        return format(self.numpy()[()] if self.shape == () else self.numpy(), spec)

    # -- becoming NumPy or Python ------------------------------------------------------------------------------------
    def numpy(self) -> np.ndarray:
        """A fresh NumPy array with the values; waits for the device."""
        return self.storage.read(self.shape)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("an array on a device cannot become a NumPy array without a copy")
        host = self.numpy()
        return host if dtype is None else host.astype(dtype, copy=False)

    def item(self, *index: int) -> Any:
        """One element as a Python scalar."""
        return self.numpy().item(*index)

    def tolist(self) -> Any:
        """Nested lists of Python scalars."""
        return self.numpy().tolist()

    def __float__(self) -> float:
        return float(self._scalar())

    def __int__(self) -> int:
        return int(self._scalar())

    def __bool__(self) -> bool:
        return bool(self.numpy())  # NumPy's error for more than one element

    def __complex__(self) -> complex:
        return complex(self._scalar())

    def __index__(self) -> int:
        return operator.index(self.numpy()[()])

    def _scalar(self) -> Any:
        if self.size != 1:
            raise TypeError(
                f"only arrays of one element can be converted to Python scalars, this has shape {self.shape}"
            )
        return self.numpy().reshape(())[()]

    def __getitem__(self, key: Any) -> Any:
        return self.numpy()[key]

    def __setitem__(self, key: Any, value: Any) -> None:
        raise TypeError(_IMMUTABLE)

    def __iter__(self) -> Iterator[Any]:
        if not self.shape:
            raise TypeError("iteration over a 0-d array")
        return iter(self.numpy())

    def __contains__(self, value: Any) -> bool:
        return value in self.numpy()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or not hasattr(np.ndarray, name):
            raise AttributeError(f"'Array' object has no attribute {name!r}")
        if name in _CHANGING:
            raise AttributeError(f"no {name}: {_IMMUTABLE}")
        return getattr(self.numpy(), name)

    # -- moving --------------------------------------------------------------------------------------------------------
    def to(self, device: str) -> Any:
        """The same values on another device: a ``tj.Array`` there (itself if it is there already), or a NumPy array for
        devices in host memory."""
        from tracejit.backend import resolve

        target = resolve(device)
        if target.backend.on_host:
            return self.numpy()
        return target.backend.to_device(self, target.spec)

    def __dlpack__(self, **kwargs: Any) -> Any:
        return self.numpy().__dlpack__(**kwargs)

    def __dlpack_device__(self) -> tuple[int, int]:
        return (1, 0)  # kDLCPU: the capsule is a host copy

    def __copy__(self) -> Array:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Array:
        return self

    def __reduce__(self) -> tuple[Any, tuple[np.ndarray]]:
        return (np.asarray, (self.numpy(),))

    # -- computing -----------------------------------------------------------------------------------------------------
    # ``x += y`` makes a new array and binds the name to it, as for every immutable type.
    __iadd__ = NDArrayOperatorsMixin.__add__
    __isub__ = NDArrayOperatorsMixin.__sub__
    __imul__ = NDArrayOperatorsMixin.__mul__
    __imatmul__ = NDArrayOperatorsMixin.__matmul__
    __itruediv__ = NDArrayOperatorsMixin.__truediv__
    __ifloordiv__ = NDArrayOperatorsMixin.__floordiv__
    __imod__ = NDArrayOperatorsMixin.__mod__
    __ipow__ = NDArrayOperatorsMixin.__pow__
    __ilshift__ = NDArrayOperatorsMixin.__lshift__
    __irshift__ = NDArrayOperatorsMixin.__rshift__
    __iand__ = NDArrayOperatorsMixin.__and__
    __ixor__ = NDArrayOperatorsMixin.__xor__
    __ior__ = NDArrayOperatorsMixin.__or__

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **kwargs: Any) -> Any:
        if any(_is_tensor(x) for x in inputs):
            return NotImplemented  # the tensor's own rule records it
        plain = method == "__call__" and not kwargs and ufunc.nout == 1
        if plain and all(isinstance(x, Array | np.ndarray | np.generic | bool | int | float) for x in inputs):
            return _on_device(ufunc, inputs)
        if any(isinstance(x, Array) for x in kwargs.get("out", ())):
            raise TypeError("a tj.Array cannot be the out= of a ufunc: it is immutable")
        host = [x.numpy() if isinstance(x, Array) else x for x in inputs]
        return getattr(ufunc, method)(*host, **kwargs)

    def __array_function__(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        if any(not issubclass(t, Array | np.ndarray) for t in types):
            return NotImplemented
        return func(*_to_host(args), **_to_host(kwargs))


_eager: dict[np.ufunc, Any] = {}


def _on_device(ufunc: np.ufunc, inputs: tuple[Any, ...]) -> Any:
    """Run one ufunc on the device of the first Array among the operands; on the host where it cannot be traced."""
    from tracejit.errors import UnsupportedFunctionError
    from tracejit.jit import TracedFunction

    traced = _eager.get(ufunc)
    if traced is None:
        traced = TracedFunction(_caller(ufunc), name=ufunc.__name__, cache_size=512)
        traced._warned = True  # every new shape is a new program here: that is no storm the user could avoid
        _eager[ufunc] = traced
    device = next(x.device for x in inputs if isinstance(x, Array))
    try:
        return traced(*inputs, device=device)
    except UnsupportedFunctionError:
        return ufunc(*(x.numpy() if isinstance(x, Array) else x for x in inputs))


def _caller(ufunc: np.ufunc) -> Any:
    def call(*operands: Any) -> Any:
        return ufunc(*operands)

    return call


def _is_tensor(value: Any) -> bool:
    from tracejit.tensor import Tensor

    return isinstance(value, Tensor)


def _to_host(value: Any) -> Any:
    if isinstance(value, Array):
        return value.numpy()
    if isinstance(value, tuple | list):
        return type(value)(_to_host(v) for v in value)
    if isinstance(value, dict):
        return {k: _to_host(v) for k, v in value.items()}
    return value
