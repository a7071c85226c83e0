"""NumPy's products of matrices and vectors on tensors, diagonals, triangles and norms.

Reached through ``@``, ``np.*`` and ``np.linalg.*`` dispatch (names with ``linalg_``) and ``tracejit.functions``; on
concrete arrays NumPy's own result.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod as _prod
from typing import Any

import numpy as np

from tracejit.dtypes import FLOAT64, INT64, DType
from tracejit.errors import ShapeError, UnsupportedFunctionError
from tracejit.functions import elementwise as el
from tracejit.functions import promotion as pr
from tracejit.functions import reductions as rd
from tracejit.functions.contract import Label, contract, einsum
from tracejit.ops import elementwise as ew
from tracejit.ops import registry, rules
from tracejit.source import named_scope
from tracejit.tensor import Tensor


def _pair(op: str, a: Any, b: Any, dtype: DType | None = None) -> tuple[Tensor, Tensor]:
    """Both operands as tensors of NumPy's common dtype (or ``dtype``)."""
    common = dtype or pr.common_dtype(op, a, b)
    return pr.tensor(a, op, common), pr.tensor(b, op, common)


def _stack_labels(ndim: int, core: Sequence[Label]) -> tuple[Label, ...]:
    """Labels of an operand with broadcasting leading axes and ``core`` axes at the end."""
    lead = ndim - len(core)
    return (*(("stack", i - lead) for i in range(lead)), *core)


def _stacked(
    name: str,
    ufunc: Any,
    a: Any,
    b: Any,
    a_core: str,
    b_core: str,
    out_core: str,
    out: Any,
    dtype: Any,
    kwargs: Any,
) -> Any:
    """A product over the last axes with broadcasting leading axes; letters name the core axes, ``k`` is contracted."""
    pr.reject_keywords(name, out, **kwargs)
    wanted = pr.ufunc_dtypes(ufunc, (a, b), dtype)[0]
    x, y = _pair(name, a, b, wanted)
    for t, core, which in ((x, a_core, "first"), (y, b_core, "second")):
        if t.ndim < len(core):
            hint = "use * to multiply by a scalar" if t.ndim == 0 else ""
            raise ShapeError.make(
                f"the {which} operand needs at least {len(core)} dimensions",
                op=name,
                got={"x1": a, "x2": b},
                hint=hint,
            )
    i, j = a_core.index("k") - len(a_core), b_core.index("k") - len(b_core)
    if x.shape[i] != y.shape[j]:
        words = {-1: "last", -2: "second to last"}
        raise ShapeError.make(
            f"the {words[i]} axis of the first operand (size {x.shape[i]}) must match the {words[j]} axis of the second "
            f"(size {y.shape[j]})",
            op=name,
            got={"x1": a, "x2": b},
        )
    xl, yl = _stack_labels(x.ndim, a_core), _stack_labels(y.ndim, b_core)
    lead = (x.shape[: x.ndim - len(a_core)], y.shape[: y.ndim - len(b_core)])
    ndim = len(pr.broadcast_shapes(name, (x, y), list(lead)))
    return contract(x, xl, y, yl, _stack_labels(ndim + len(out_core), out_core))


def matmul(x1: Any, x2: Any, /, out: Any = None, *, dtype: Any = None, **kwargs: Any) -> Any:
    """Matrix product over the last two axes, as ``np.matmul``: 1-D operands are vectors, leading axes broadcast."""
    if not pr.any_tensor(x1, x2):
        return np.matmul(x1, x2, out=out, dtype=dtype, **kwargs)
    first = len(pr.shape_of(x1, "matmul")) == 1
    second = len(pr.shape_of(x2, "matmul")) == 1
    a_core, b_core = "k" if first else "mk", "k" if second else "kn"
    out_core = ("" if first else "m") + ("" if second else "n")
    return _stacked("matmul", np.matmul, x1, x2, a_core, b_core, out_core, out, dtype, kwargs)


def vecdot(x1: Any, x2: Any, /, out: Any = None, *, axis: int = -1, dtype: Any = None, **kwargs: Any) -> Any:
    """Dot product along ``axis`` with broadcasting leading axes, as ``np.vecdot``."""
    if not pr.any_tensor(x1, x2):
        return np.vecdot(x1, x2, out=out, axis=axis, dtype=dtype, **kwargs)  # type: ignore[call-overload]
    x1, x2 = _axis_last(x1, axis), _axis_last(x2, axis)
    return _stacked("vecdot", np.vecdot, x1, x2, "k", "k", "", out, dtype, kwargs)


def _axis_last(x: Any, axis: int) -> Any:
    if axis == -1:
        return x
    x = pr.tensor(x, "vecdot")
    axis = rd.normalize_axis(axis, x.ndim, "vecdot")
    return rules.transpose(x, (*(i for i in range(x.ndim) if i != axis), axis))


def matvec(x1: Any, x2: Any, /, out: Any = None, *, dtype: Any = None, **kwargs: Any) -> Any:
    """Matrices times vectors over the last axes, as ``np.matvec`` (NumPy 2.2)."""
    if not pr.any_tensor(x1, x2):
        return np.matvec(x1, x2, out=out, dtype=dtype, **kwargs)
    return _stacked("matvec", np.matmul, x1, x2, "mk", "k", "m", out, dtype, kwargs)


def vecmat(x1: Any, x2: Any, /, out: Any = None, *, dtype: Any = None, **kwargs: Any) -> Any:
    """Vectors times matrices over the last axes, as ``np.vecmat`` (NumPy 2.2)."""
    if not pr.any_tensor(x1, x2):
        return np.vecmat(x1, x2, out=out, dtype=dtype, **kwargs)
    return _stacked("vecmat", np.matmul, x1, x2, "k", "kn", "n", out, dtype, kwargs)


def dot(a: Any, b: Any, out: Any = None) -> Any:
    """As ``np.dot``: last axis of ``a`` with the second to last of ``b`` (its only one if 1-D); scalars multiply."""
    if not pr.any_tensor(a, b):
        return np.dot(a, b, out=out)
    pr.reject_keywords("dot", out)
    if not pr.shape_of(a, "dot") or not pr.shape_of(b, "dot"):
        return el.multiply(a, b)
    ndim = len(pr.shape_of(b, "dot"))
    return _product("dot", a, b, (-1,), (max(ndim - 2, 0),))


def inner(a: Any, b: Any, /) -> Any:
    """As ``np.inner``: the last axes of both are contracted; scalars multiply."""
    if not pr.any_tensor(a, b):
        return np.inner(a, b)
    if not pr.shape_of(a, "inner") or not pr.shape_of(b, "inner"):
        return el.multiply(a, b)
    return _product("inner", a, b, (-1,), (-1,))


def tensordot(a: Any, b: Any, axes: Any = 2) -> Any:
    """As ``np.tensordot``: contract the last ``axes`` of ``a`` with the first of ``b``, or the two lists of axes."""
    if not pr.any_tensor(a, b):
        return np.tensordot(a, b, axes)
    if isinstance(axes, int):
        first, second = tuple(range(-axes, 0)), tuple(range(axes))
    else:
        first, second = (tuple(s) if isinstance(s, Sequence | np.ndarray) else (s,) for s in axes)
    return _product("tensordot", a, b, first, second)


def _product(op: str, a: Any, b: Any, a_axes: Sequence[int], b_axes: Sequence[int]) -> Any:
    """Contract pairs of axes; free axes of ``a``, then of ``b``."""
    x, y = _pair(op, a, b)
    first = [rd.normalize_axis(i, x.ndim, op) for i in a_axes]
    second = [rd.normalize_axis(i, y.ndim, op) for i in b_axes]
    if len(first) != len(second) or len(set(first)) != len(first) or len(set(second)) != len(second):
        raise ShapeError.make(
            f"axes {tuple(a_axes)} and {tuple(b_axes)} do not pair up", op=op, got={"a": a, "b": b}
        )
    for i, j in zip(first, second, strict=True):
        if x.shape[i] != y.shape[j]:
            raise ShapeError.make(
                f"axis {i} of a (size {x.shape[i]}) must match axis {j} of b (size {y.shape[j]})",
                op=op,
                got={"a": a, "b": b},
            )
    xl: list[Label] = [("a", i) for i in range(x.ndim)]
    yl: list[Label] = [("b", j) for j in range(y.ndim)]
    for k, (i, j) in enumerate(zip(first, second, strict=True)):
        xl[i] = yl[j] = ("k", k)
    return contract(x, xl, y, yl, [label for label in (*xl, *yl) if label[0] != "k"])  # type: ignore[index]


def vdot(a: Any, b: Any, /) -> Any:
    """As ``np.vdot``: dot product of the flattened operands."""
    if not pr.any_tensor(a, b):
        return np.vdot(a, b)
    return _product("vdot", _flat(a, "vdot"), _flat(b, "vdot"), (0,), (0,))


def outer(a: Any, b: Any, out: Any = None) -> Any:
    """As ``np.outer``: all products of elements of the flattened operands."""
    if not pr.any_tensor(a, b):
        return np.outer(a, b, out=out)
    pr.reject_keywords("outer", out)
    x, y = _flat(a, "outer"), _flat(b, "outer")
    return el.multiply(rules.reshape(x, (x.size, 1)), y)


def _flat(a: Any, op: str) -> Tensor:
    x = pr.tensor(a, op)
    return rules.reshape(x, (x.size,))


def kron(a: Any, b: Any) -> Any:
    """As ``np.kron``: the Kronecker product, blocks of ``b`` scaled by the elements of ``a``."""
    if not pr.any_tensor(a, b):
        return np.kron(a, b)
    with named_scope("kron"):
        x, y = pr.tensor(a, "kron"), pr.tensor(b, "kron")
        ndim = max(x.ndim, y.ndim)
        first = (1,) * (ndim - x.ndim) + x.shape
        second = (1,) * (ndim - y.ndim) + y.shape
        x = rules.reshape(x, tuple(n for s in first for n in (s, 1)))
        y = rules.reshape(y, tuple(n for s in second for n in (1, s)))
        blocks = el.multiply(x, y)
        return rules.reshape(blocks, tuple(s * t for s, t in zip(first, second, strict=True)))


# -- diagonals and triangles ---------------------------------------------------------------------------------


def diagonal(a: Any, offset: int = 0, axis1: int = 0, axis2: int = 1) -> Any:
    """The diagonal of the planes of two axes, as the last axis. As ``np.diagonal``; the gradient fills a diagonal."""
    if not pr.any_tensor(a):
        return np.diagonal(a, offset, axis1, axis2)
    x = pr.tensor(a, "diagonal")
    if x.ndim < 2:
        raise ShapeError.make("needs at least two dimensions", op="diagonal", got={"a": a})
    first, second = (rd.normalize_axis(i, x.ndim, "diagonal") for i in (axis1, axis2))
    if first == second:
        raise ShapeError.make("axis1 and axis2 must differ", op="diagonal", got={"a": a})
    lead = [i for i in range(x.ndim) if i not in (first, second)]
    x = rules.transpose(x, (*lead, first, second))
    rows, columns = x.shape[-2:]
    start = offset if offset >= 0 else -offset * columns
    length = max(min(rows, columns - offset) if offset >= 0 else min(rows + offset, columns), 0)
    # In a flattened plane the diagonal is every (columns + 1)-th element.
    flat = rules.reshape(x, (*x.shape[:-2], rows * columns))
    step = columns + 1
    stop = start + (length - 1) * step + 1 if length else 0
    n = len(lead)
    return registry.get("slice")(
        flat,
        start=(*(0,) * n, start if length else 0),
        stop=(*flat.shape[:n], stop),
        step=(*(1,) * n, step),
    )


def trace(a: Any, offset: int = 0, axis1: int = 0, axis2: int = 1, dtype: Any = None, out: Any = None) -> Any:
    """Sum of a diagonal, as ``np.trace``."""
    if not pr.any_tensor(a):
        return np.trace(a, offset, axis1, axis2, dtype, out)
    return rd.sum(diagonal(a, offset, axis1, axis2), -1, dtype, out)


def tril(m: Any, k: int = 0) -> Any:
    """``m`` with zeros above the ``k``-th diagonal of the last two axes, as ``np.tril``."""
    if not pr.any_tensor(m):
        return np.tril(m, k)
    return _triangle("tril", m, k, lower=True)


def triu(m: Any, k: int = 0) -> Any:
    """``m`` with zeros below the ``k``-th diagonal of the last two axes, as ``np.triu``."""
    if not pr.any_tensor(m):
        return np.triu(m, k)
    return _triangle("triu", m, k, lower=False)


def _triangle(op: str, m: Any, k: int, lower: bool) -> Any:
    x = pr.tensor(m, op)
    if x.ndim == 0:
        raise ShapeError.make("needs at least one dimension", op=op, got={"m": m})
    if x.ndim == 1:  # NumPy repeats a vector to a square
        x = pr.broadcast_to(x, (x.shape[0], x.shape[0]))
    shape = x.shape[-2:]
    column, row = _positions(shape)
    edge = ew.add(row, pr.constant_like(row, int(k)))
    mask = ew.less_equal(column, edge) if lower else ew.greater_equal(column, edge)
    return ew.where(pr.broadcast_to(mask, x.shape), x, pr.constant_like(x, 0))


def _positions(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The column and the row number of each element of a matrix."""
    iota = registry.get("iota")
    return iota(shape=shape, axis=1, dtype=INT64), iota(shape=shape, axis=0, dtype=INT64)


# -- np.linalg -----------------------------------------------------------------------------------------------


def linalg_norm(x: Any, ord: Any = None, axis: Any = None, keepdims: bool = False) -> Any:
    """Vector norms (any order) and the Frobenius, 1 and ∞ norms of matrices, as ``np.linalg.norm``.

    The gradient of the 2-norm at the zero vector is 0. UnsupportedFunctionError for norms that need singular values.
    """
    if not pr.any_tensor(x):
        return np.linalg.norm(x, ord, axis, keepdims)
    with named_scope("norm"):
        x = pr.tensor(x, "norm", x.dtype if x.dtype.kind == "f" else FLOAT64)
        if axis is None and (
            ord is None or (ord in ("f", "fro") and x.ndim == 2) or (ord == 2 and x.ndim == 1)
        ):
            axes: tuple[int, ...] = tuple(range(x.ndim))
            return rd.restore_axes(_root_of_squares(x, axes), x.shape, axes, keepdims)
        ordered = (
            tuple(range(x.ndim)) if axis is None else axis if isinstance(axis, tuple | list) else (axis,)
        )
        ordered = tuple(rd.normalize_axis(a, x.ndim, "norm") for a in ordered)
        if len(ordered) == 1:
            return _vector_norm(x, ord, ordered, keepdims)
        if len(ordered) == 2 and ordered[0] != ordered[1]:
            return _matrix_norm(x, ord, ordered, keepdims)
        raise ShapeError.make("norms are over one axis (vectors) or two (matrices)", op="norm", got={"x": x})


def _root_of_squares(x: Tensor, axes: tuple[int, ...]) -> Any:
    total = rd.sum(ew.mul(x, x), tuple(axes))
    zero = pr.constant_like(total, 0.0)
    none = ew.equal(total, zero)
    return ew.where(none, zero, ew.sqrt(ew.where(none, pr.constant_like(total, 1.0), total)))


def _vector_norm(x: Tensor, ord: Any, axes: tuple[int, ...], keepdims: bool) -> Any:
    size = el.absolute(x)
    if ord is None or ord == 2:
        return rd.restore_axes(_root_of_squares(x, axes), x.shape, axes, keepdims)
    if isinstance(ord, str):
        raise ShapeError.make(f"ord={ord!r} is a norm of matrices", op="norm", got={"x": x})
    if ord == np.inf:
        return rd.max(size, axes, keepdims=keepdims)
    if ord == -np.inf:
        return rd.min(size, axes, keepdims=keepdims)
    if ord == 0:
        return rd.sum(pr.tensor(el.not_equal(x, 0), "norm", x.dtype), axes, keepdims=keepdims)
    if ord == 1:
        return rd.sum(size, axes, keepdims=keepdims)
    return el.power(rd.sum(el.power(size, float(ord)), axes, keepdims=keepdims), 1.0 / ord)


def _matrix_norm(x: Tensor, ord: Any, axes: tuple[int, ...], keepdims: bool) -> Any:
    if ord is None or ord in ("f", "fro"):
        ordered = tuple(sorted(axes))
        return rd.restore_axes(_root_of_squares(x, ordered), x.shape, ordered, keepdims)
    if ord not in (1, -1, np.inf, -np.inf):
        raise UnsupportedFunctionError.make(
            f"the matrix norm ord={ord!r} needs singular values, which cannot be traced",
            op="norm",
            got={"x": x},
            hint="supported for matrices: 'fro', 1, -1, inf, -inf",
        )
    row, column = axes
    summed, searched = (row, column) if ord in (1, -1) else (column, row)
    sums = rd.sum(el.absolute(x), summed, keepdims=True)
    found = (rd.max if ord > 0 else rd.min)(sums, searched, keepdims=True)
    if keepdims:
        return found
    return rules.reshape(found, tuple(s for i, s in enumerate(x.shape) if i not in axes))


def linalg_vector_norm(x: Any, /, *, axis: Any = None, keepdims: bool = False, ord: Any = 2) -> Any:
    """As ``np.linalg.vector_norm``: the norm of the elements along ``axis`` (all of them if None)."""
    if not pr.any_tensor(x):
        return np.linalg.vector_norm(x, axis=axis, keepdims=keepdims, ord=ord)
    axes = rd.normalize_axes(axis, x.ndim, "vector_norm")
    x = pr.tensor(x, "vector_norm", x.dtype if x.dtype.kind == "f" else FLOAT64)
    kept = tuple(i for i in range(x.ndim) if i not in axes)
    flat = rules.reshape(
        rules.transpose(x, kept + axes), (*(x.shape[i] for i in kept), _prod(x.shape[i] for i in axes))
    )
    return rd.restore_axes(linalg_norm(flat, ord, -1), x.shape, axes, keepdims)


def linalg_matrix_norm(x: Any, /, *, keepdims: bool = False, ord: Any = "fro") -> Any:
    """As ``np.linalg.matrix_norm``: the norm of the matrices in the last two axes."""
    if not pr.any_tensor(x):
        return np.linalg.matrix_norm(x, keepdims=keepdims, ord=ord)
    return linalg_norm(x, ord, (-2, -1), keepdims)


def linalg_matrix_power(a: Any, n: int) -> Any:
    """``a`` multiplied ``n`` times with itself by repeated squaring, for ``n`` ≥ 0. As ``np.linalg.matrix_power``."""
    if not pr.any_tensor(a):
        return np.linalg.matrix_power(a, n)
    x = pr.tensor(a, "matrix_power")
    if x.ndim < 2 or x.shape[-1] != x.shape[-2]:
        raise ShapeError.make("needs square matrices in the last two axes", op="matrix_power", got={"a": a})
    if n < 0:
        raise UnsupportedFunctionError.make(
            "negative powers need an inverse, which cannot be traced", op="matrix_power"
        )
    if n == 0:
        column, row = _positions(x.shape[-2:])
        return pr.broadcast_to(pr.tensor(ew.equal(column, row), "matrix_power", x.dtype), x.shape)
    result, square = None, x
    while n:
        if n & 1:
            result = square if result is None else matmul(result, square)
        n >>= 1
        square = matmul(square, square) if n else square
    return result


def linalg_multi_dot(arrays: Sequence[Any], *, out: Any = None) -> Any:
    """The product of a chain of matrices in the order that costs least, as ``np.linalg.multi_dot``."""
    if not pr.any_tensor(*arrays):
        return np.linalg.multi_dot(arrays, out=out)
    pr.reject_keywords("multi_dot", out)
    if len(arrays) < 2:
        raise ShapeError.make("needs at least two arrays", op="multi_dot")
    terms: list[Any] = []
    last = len(arrays) - 1
    for i, a in enumerate(arrays):
        ndim = len(pr.shape_of(a, "multi_dot"))
        if ndim != 2 and not (ndim == 1 and i in (0, last)):
            raise ShapeError.make(
                "needs matrices; only the first and last may be vectors", op="multi_dot", got={"a": a}
            )
        terms += [a, [i + 1] if ndim == 1 and i == 0 else [i] if ndim == 1 else [i, i + 1]]
    ends = [0] * (len(terms[1]) == 2) + [last + 1] * (len(terms[-1]) == 2)
    return einsum(*terms, ends)


def linalg_trace(x: Any, /, *, offset: int = 0, dtype: Any = None) -> Any:
    """As ``np.linalg.trace``: the trace of the last two axes."""
    return trace(x, offset, -2, -1, dtype)


def linalg_diagonal(x: Any, /, *, offset: int = 0) -> Any:
    """As ``np.linalg.diagonal``: the diagonal of the last two axes."""
    return diagonal(x, offset, -2, -1)


def linalg_outer(x1: Any, x2: Any, /) -> Any:
    """As ``np.linalg.outer``: the outer product of two vectors."""
    if len(pr.shape_of(x1, "outer")) != 1 or len(pr.shape_of(x2, "outer")) != 1:
        raise ShapeError.make("operands must be one-dimensional", op="outer", got={"x1": x1, "x2": x2})
    return outer(x1, x2)


def linalg_vecdot(x1: Any, x2: Any, /, *, axis: int = -1) -> Any:
    """As ``np.linalg.vecdot``."""
    return vecdot(x1, x2, axis=axis)


def linalg_matmul(x1: Any, x2: Any, /) -> Any:
    """As ``np.linalg.matmul``."""
    return matmul(x1, x2)


def linalg_tensordot(a: Any, b: Any, /, *, axes: Any = 2) -> Any:
    """As ``np.linalg.tensordot``."""
    return tensordot(a, b, axes)


__all__ = [
    "diagonal", "dot", "einsum", "inner", "kron", "linalg_diagonal", "linalg_matmul", "linalg_matrix_norm",
    "linalg_matrix_power", "linalg_multi_dot", "linalg_norm", "linalg_outer", "linalg_tensordot", "linalg_trace",
    "linalg_vecdot", "linalg_vector_norm", "matmul", "matvec", "outer", "tensordot", "trace", "tril", "triu", "vdot",
    "vecdot", "vecmat",
]  # fmt: skip
