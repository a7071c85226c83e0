"""NumPy's dispatch protocols: what happens when ``np.tanh(x)``, ``np.sum(x)`` or ``x.tanh`` meets a tensor.

Called by :class:`tracejit.tensor.Tensor` only. Which functions are supported follows from the names in
``tracejit.functions``; everything else is an error that names the nearest supported function.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NoReturn

import numpy as np

from tracejit import functions
from tracejit.dtypes import canonical
from tracejit.errors import TracingError, UnsupportedFunctionError
from tracejit.functions import promotion as pr
from tracejit.functions.creation import _holds_tensor
from tracejit.tensor import Tensor

# -- ufuncs --------------------------------------------------------------------------------------------------

#: ``ufunc.reduce`` and ``ufunc.accumulate`` that are a function of their own.
_REDUCE = {
    "add": "sum",
    "multiply": "prod",
    "maximum": "max",
    "minimum": "min",
    "fmax": "nanmax",
    "fmin": "nanmin",
    "logical_and": "all",
    "logical_or": "any",
    "logaddexp": "logaddexp_reduce",
}
_ACCUMULATE = {
    "add": "cumsum",
    "multiply": "cumprod",
    "maximum": "maximum_accumulate",
    "minimum": "minimum_accumulate",
}


def array_ufunc(ufunc: np.ufunc, method: str, inputs: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """``ufunc(*inputs, **kwargs)`` with a tensor among the operands; the result is strong even for weak operands."""
    name = ufunc.__name__
    if kwargs.get("out") is not None:
        raise TracingError.make(
            "out= and in-place operators on arrays cannot take a traced result, because recorded values are immutable",
            op=name,
            got=pr.got(tuple(inputs)),
            hint="write x = x + y instead of x += y, and use the returned value instead of out=",
        )
    function = _supported_ufunc(ufunc)
    inputs = [functions.asarray(v) if isinstance(v, list | tuple) and _holds_tensor(v) else v for v in inputs]
    if method == "__call__":
        return _strong(function(*inputs, **kwargs))
    if method == "reduce" and name in _REDUCE:
        return _reduce(name, *inputs, **kwargs)
    if method == "accumulate" and name in _ACCUMULATE:
        return _accumulate(name, *inputs, **kwargs)
    if method == "outer" and ufunc.nin == 2:
        return _outer(function, *inputs, **kwargs)
    raise UnsupportedFunctionError.make(
        f"np.{name}.{method} cannot be traced",
        op=f"{name}.{method}",
        got=pr.got(tuple(inputs)),
        hint="; ".join(
            f"{kind}: {', '.join(f'np.{n}.{kind}' for n in table)}"
            for kind, table in (("reduce", _REDUCE), ("accumulate", _ACCUMULATE))
            if kind == method
        )
        or "np.add.reduce, np.add.accumulate and outer of any two-operand function can be traced",
    )


def _reduce(
    name: str,
    array: Any,
    axis: Any = 0,
    dtype: Any = None,
    out: Any = None,
    keepdims: bool = False,
    **kwargs: Any,
) -> Any:
    function = getattr(functions, _REDUCE[name])
    if name in ("add", "multiply"):
        kwargs["dtype"] = dtype
    elif dtype is not None and np.dtype(dtype) != np.dtype(bool):
        array = functions.astype(array, dtype)
    return function(array, axis=axis, out=out, keepdims=keepdims, **kwargs)


def _accumulate(name: str, array: Any, axis: int = 0, dtype: Any = None, out: Any = None) -> Any:
    return getattr(functions, _ACCUMULATE[name])(array, axis=axis, dtype=dtype)


def _outer(function: Callable[..., Any], a: Any, b: Any, **kwargs: Any) -> Any:
    a, b = pr.tensor(a, "outer"), pr.tensor(b, "outer")
    return function(functions.reshape(a, (*a.shape, *(1,) * b.ndim)), b, **kwargs)


def _strong(result: Any) -> Any:
    if isinstance(result, tuple):
        return tuple(map(_strong, result))
    return Tensor(result.node, result.ctx) if isinstance(result, Tensor) and result.weak else result


@lru_cache(maxsize=512)
def _ufunc_table(ufunc: np.ufunc) -> Callable[..., Any] | None:
    name = ufunc.__name__
    # A third party's ufunc may share a name with one of NumPy's; only NumPy's own has our meaning.
    ours = getattr(functions, name, None) if getattr(np, name, None) is ufunc else None
    return ours if callable(ours) else None


def _supported_ufunc(ufunc: np.ufunc) -> Callable[..., Any]:
    function = _ufunc_table(ufunc)
    if function is None:
        _unsupported(f"np.{ufunc.__name__}", ufunc.__name__)
    return function


# -- functions -----------------------------------------------------------------------------------------------


def array_function(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """``func(*args, **kwargs)`` with a tensor among the arguments."""
    about = _ABOUT.get(func)
    if about is not None:
        return about(*args, **kwargs)
    if func in _CONVERSIONS and args and not _holds_tensor(args[0]):
        # np.asarray(table, like=x): an array of the surroundings enters the trace, by reference.
        dtype = kwargs.get("dtype") if len(args) < 2 else args[1]
        return pr.tensor(
            args[0], func.__name__, None if dtype is None else canonical(dtype, op=func.__name__)
        )
    ours = _function_table(func)
    if ours is None:
        name = func.__name__
        module = getattr(func, "__module__", "") or "numpy"
        _unsupported(f"{module.replace('numpy', 'np', 1)}.{name}", name, _REASONS.get(name, ""))
    return _strong(ours(*args, **{k: v for k, v in kwargs.items() if v is not pr._NO_VALUE}))


#: Reached without a tensor to convert only through their ``like=`` argument.
_CONVERSIONS = frozenset({np.array, np.asarray, np.asanyarray, np.ascontiguousarray})


@lru_cache(maxsize=1024)
def _function_table(func: Any) -> Callable[..., Any] | None:
    """Our function for one of NumPy's: same name, with the prefix ``linalg_`` for those of ``np.linalg``."""
    module = getattr(func, "__module__", "") or ""
    if module == "numpy.linalg":
        name = f"linalg_{func.__name__}"
        if not hasattr(functions, name) and func.__name__ == "matrix_transpose":
            name = func.__name__
    elif module == "numpy" or func is np.lib.stride_tricks.sliding_window_view:
        name = func.__name__
    else:
        return None
    ours = getattr(functions, name, None)
    return ours if callable(ours) else None


def _stand_in(value: Any) -> Any:
    """Something of equal dtype (Python scalars stay weak) for NumPy functions that look at types only."""
    if isinstance(value, Tensor):
        return type(value.dtype.type(0).item())(0) if value.weak else value.dtype
    return value


#: Functions that ask about shape and type only, answered while tracing.
_ABOUT: dict[Any, Callable[..., Any]] = {
    np.shape: lambda a: pr.shape_of(a, "shape"),
    np.ndim: lambda a: len(pr.shape_of(a, "ndim")),
    np.size: lambda a, axis=None: _size(pr.shape_of(a, "size"), axis),
    np.result_type: lambda *args: np.result_type(*map(_stand_in, args)),
    np.can_cast: lambda from_, to, casting="safe": np.can_cast(_stand_in(from_), _stand_in(to), casting),
    np.iscomplexobj: lambda x: False,
    np.isrealobj: lambda x: True,
    np.common_type: lambda *args: np.common_type(
        *(np.empty(0, x.dtype) if isinstance(x, Tensor) else x for x in args)
    ),
    np.may_share_memory: lambda a, b, max_work=None: False,
    np.shares_memory: lambda a, b, max_work=None: False,
}


def _size(shape: tuple[int, ...], axis: Any) -> int:
    if axis is None:
        return int(np.prod(shape, dtype=np.int64))
    axes = axis if isinstance(axis, tuple) else (axis,)
    return int(np.prod([shape[i] for i in axes], dtype=np.int64))


# -- what is not supported -----------------------------------------------------------------------------------

_VALUES = "the shape of its result depends on values, which are not known while tracing"
_IN_PLACE = "it writes into its operand, and recorded values are immutable"
_REASONS = {
    **dict.fromkeys(
        ("unique", "nonzero", "argwhere", "flatnonzero", "extract", "trim_zeros", "compress"), _VALUES
    ),
    **dict.fromkeys(
        ("setdiff1d", "union1d", "intersect1d", "setxor1d", "unique_values", "histogram"), _VALUES
    ),
    **dict.fromkeys(("copyto", "put", "putmask", "place", "fill_diagonal", "put_along_axis"), _IN_PLACE),
    **dict.fromkeys(
        ("save", "savez", "savetxt", "array2string", "array_repr", "array_str"), "it needs the values"
    ),
}
_METHOD_REASONS = {
    **dict.fromkeys(("fill", "put", "resize", "partition", "setflags", "byteswap", "itemset"), _IN_PLACE),
    **dict.fromkeys(("nonzero", "compress"), _VALUES),
    **dict.fromkeys(("tobytes", "tofile", "dump", "dumps", "data", "ctypes"), "it needs the values"),
    **dict.fromkeys(
        ("strides", "flags", "base", "view", "getfield"), "recorded values have no memory layout"
    ),
}
_HINTS = {
    _VALUES: "use np.where(mask, x, neutral) and keep the shape",
    _IN_PLACE: "build a new array with np.where or np.concatenate",
    "it needs the values": "return the tensor from the traced function and do this with the result",
    "recorded values have no memory layout": "use x.astype(...) or x.reshape(...)",
}


def _nearest(name: str, choices: Sequence[str]) -> str:
    found = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    return found[0] if found else ""


def supported_names() -> list[str]:
    """The names of all NumPy functions that can be traced, ``linalg.norm`` in that form."""
    names = {n for n in dir(functions) if not n.startswith("_") and callable(getattr(functions, n))}
    plain = {n for n in names if hasattr(np, n)}
    return sorted(plain | {n.replace("linalg_", "linalg.", 1) for n in names if n.startswith("linalg_")})


def _unsupported(title: str, name: str, reason: str = "") -> NoReturn:
    linalg = title.startswith("np.linalg.")
    choices = {n.removeprefix("linalg."): n for n in supported_names() if n.startswith("linalg.") == linalg}
    near = "" if reason else _nearest(name, list(choices))
    hints = [f"the nearest supported function is np.{choices[near]}"] if near else []
    if reason:
        hints.append(_HINTS.get(reason, ""))
    raise UnsupportedFunctionError.make(
        f"{title} cannot be traced" + (f": {reason}" if reason else ""),
        op=name,
        hint="; ".join(filter(None, hints)),
    )


def missing_attribute(tensor: Tensor, name: str) -> NoReturn:
    """The error for an attribute that ndarrays have and tensors lack, or that neither has.

    An AttributeError of some kind, so that ``hasattr`` works.
    """
    reason = _METHOD_REASONS.get(name, "")
    known = hasattr(np.ndarray, name)
    near = _nearest(name, [n for n in dir(Tensor) if not n.startswith("_")])
    hints = [_HINTS[reason]] if reason else []
    if callable(getattr(functions, name, None)) and hasattr(np, name):
        hints = [f"use np.{name}(x)"]
    elif near and not reason:
        hints = [f"did you mean .{near}?"]
    what = f".{name} cannot be traced" if known else f"arrays have no attribute {name!r}"
    raise MissingAttributeError.make(
        what + (f": {reason}" if reason else ""), got={"x": tensor}, hint="; ".join(hints)
    )


class MissingAttributeError(UnsupportedFunctionError, AttributeError):
    """An attribute that tensors lack. Example: ``x.tobytes()`` inside a traced function."""


__all__ = ["MissingAttributeError", "array_function", "array_ufunc", "missing_attribute", "supported_names"]
