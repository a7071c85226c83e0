"""Contraction of labelled operands: the common ground of matmul, dot, tensordot and einsum.

``contract`` lowers one pair of operands to ``dot_general`` (or to a broadcast product where nothing is summed);
``einsum`` adds the subscript language. Called by ``functions.linalg`` and NumPy's dispatch.
"""

from __future__ import annotations

import string
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from tracejit.dtypes import BOOL, FLOAT32, canonical
from tracejit.errors import ShapeError
from tracejit.functions import promotion as pr
from tracejit.ops import contraction, reduction, rules
from tracejit.ops import elementwise as ew
from tracejit.tensor import Tensor

Label = Hashable
Labels = tuple[Label, ...]


def contract(
    x: Tensor, x_labels: Sequence[Label], y: Tensor, y_labels: Sequence[Label], out: Sequence[Label]
) -> Any:
    """Σ over all labels not in ``out`` of ``x``·``y``, with the axes of the result in the order of ``out``.

    Each axis carries a label, unique within its operand; equal labels are the same index, and size 1 broadcasts.
    Operands have one dtype. Bools are contracted as "any of both".
    """
    if x.dtype == BOOL:
        # Sums of zeros and ones never cancel, so "non-zero" survives float32 rounding.
        counts = contract(ew.convert(x, dtype=FLOAT32), x_labels, ew.convert(y, dtype=FLOAT32), y_labels, out)
        return ew.convert(counts, dtype=BOOL)
    xl, yl, wanted = tuple(x_labels), tuple(y_labels), tuple(out)
    x, xl, y, yl = *_drop_broadcast(x, xl, y, yl), *_drop_broadcast(y, yl, x, xl)
    x, xl = _sum_out(x, xl, {*yl, *wanted})
    y, yl = _sum_out(y, yl, {*xl, *wanted})
    summed = [a for a in xl if a in yl and a not in wanted]
    batch = [a for a in xl if a in yl and a in wanted]
    x_free, y_free = [a for a in xl if a not in yl], [a for a in yl if a not in xl]
    if not summed:
        return ew.mul(*pr.broadcast("einsum", _align(x, xl, wanted), _align(y, yl, wanted)))
    if batch and not x_free and not y_free and x.dtype != np.float16:
        # Many short dot products: a product and a sum fuse into one loop, where a batched matmul would crawl.
        order = (*(a for a in wanted if a in batch), *summed)
        both = ew.mul(*pr.broadcast("einsum", _align(x, xl, order), _align(y, yl, order)))
        return reduction.sum_(both, axes=tuple(range(len(batch), len(order))))
    result = contraction.dot_general(
        x,
        y,
        lhs_batch=tuple(xl.index(a) for a in batch),
        rhs_batch=tuple(yl.index(a) for a in batch),
        lhs_contract=tuple(xl.index(a) for a in summed),
        rhs_contract=tuple(yl.index(a) for a in summed),
    )
    labels = (*batch, *x_free, *y_free)
    return rules.transpose(result, tuple(labels.index(a) for a in wanted))


def _drop_broadcast(x: Tensor, xl: Labels, y: Tensor, yl: Labels) -> tuple[Tensor, Labels]:
    """Remove axes of size 1 from ``x`` where ``y`` has the same label with another size."""
    drop = {a for a in xl if a in yl and x.shape[xl.index(a)] == 1 and y.shape[yl.index(a)] != 1}
    if not drop:
        return x, xl
    kept = tuple(a for a in xl if a not in drop)
    return rules.reshape(x, tuple(x.shape[xl.index(a)] for a in kept)), kept


def _sum_out(x: Tensor, xl: Labels, keep: set[Label]) -> tuple[Tensor, Labels]:
    """Sum the axes of ``x`` whose labels nothing else needs."""
    axes = tuple(i for i, a in enumerate(xl) if a not in keep)
    return (reduction.sum_(x, axes=axes), tuple(a for a in xl if a in keep)) if axes else (x, xl)


def _align(x: Tensor, xl: Labels, wanted: Labels) -> Tensor:
    """``x`` with its axes in the order of ``wanted`` and axes of size 1 for labels it lacks."""
    x = rules.transpose(x, tuple(xl.index(a) for a in wanted if a in xl))
    sizes = iter(x.shape)
    return rules.reshape(x, tuple(next(sizes) if a in xl else 1 for a in wanted))


# -- einsum --------------------------------------------------------------------------------------------------


def einsum(*operands: Any, out: Any = None, dtype: Any = None, optimize: Any = False, **kwargs: Any) -> Any:
    """Einstein summation, as ``np.einsum``: subscripts with ellipsis, implicit output, repeated indices, sublists.

    More than two operands are contracted in the pairwise order that ``np.einsum_path`` finds.
    """
    arrays = operands[1:] if isinstance(operands[0], str) else operands[::2]
    if not pr.any_tensor(*arrays):
        return np.einsum(
            *operands, out=out, optimize=optimize, **({"dtype": dtype} if dtype is not None else {}), **kwargs
        )
    pr.reject_keywords("einsum", out, **kwargs)
    values, terms, output = _terms(operands)
    common = (
        canonical(dtype, op="einsum")
        if dtype is not None
        else pr.common_dtype("einsum", *map(_strong, values))
    )
    tensors = [pr.tensor(v, "einsum", common) for v in values]
    labels, wanted = _expand(tensors, terms, output)
    sizes = _sizes(tensors, labels)
    for a in wanted:
        if a not in sizes:
            raise _wrong(f"the output index {a!r} is not among the inputs", tensors)
    if len(set(wanted)) != len(wanted):
        raise _wrong("an output index appears twice", tensors)
    work = [_diagonals(t, terms_) for t, terms_ in zip(tensors, labels, strict=True)]
    for pair in _path(work, wanted, sizes):
        group = [work[i] for i in pair]
        work = [w for i, w in enumerate(work) if i not in pair]
        needed = {*wanted, *(a for _, other in work for a in other)}
        current = group[0]
        for k, (y, yl) in enumerate(group[1:]):
            later = {a for _, other in group[k + 2 :] for a in other}
            x, xl = current
            order = tuple(a for a in dict.fromkeys((*xl, *yl)) if a in needed or a in later)
            order = wanted if set(order) == set(wanted) else order
            current = contract(x, xl, y, yl, order), order
        work.append(current)
    x, xl = work[0]
    return _finish(x, xl, wanted)


def _finish(x: Tensor, xl: Labels, wanted: Labels) -> Any:
    if x.dtype == BOOL:
        axes = tuple(i for i, a in enumerate(xl) if a not in wanted)
        x, xl = (reduction.any_(x, axes=axes) if axes else x), tuple(a for a in xl if a in wanted)
    x, xl = _sum_out(x, xl, set(wanted))
    return rules.transpose(x, tuple(xl.index(a) for a in wanted))


def _strong(value: Any) -> Any:
    return Tensor(value.node, value.ctx) if isinstance(value, Tensor) else np.asarray(value)


def _wrong(what: str, tensors: Sequence[Any]) -> ShapeError:
    return ShapeError.make(what, op="einsum", got={f"operand {i}": t for i, t in enumerate(tensors)})


def _terms(operands: tuple[Any, ...]) -> tuple[list[Any], list[list[Label]], list[Label] | None]:
    """Operands, their labels (Ellipsis for ``...``), and the labels of the output or None if implicit."""
    if not isinstance(operands[0], str):
        values = list(operands[: len(operands) // 2 * 2 : 2])
        terms = [list(t) for t in operands[1::2]]
        return values, terms, list(operands[-1]) if len(operands) % 2 else None
    subscripts, values = operands[0].replace(" ", ""), list(operands[1:])
    left, arrow, right = subscripts.partition("->")
    parsed = [_term(t, values) for t in left.split(",")]
    if len(parsed) != len(values):
        raise _wrong(f"{subscripts!r} names {len(parsed)} operands, {len(values)} were given", values)
    return values, parsed, _term(right, values) if arrow else None


def _term(text: str, values: list[Any]) -> list[Label]:
    head, dots, tail = text.partition("...")
    for letter in head + tail:
        if letter not in string.ascii_letters:
            raise _wrong(f"the subscript {text!r} has {letter!r}, which is no letter", values)
    return [*head, Ellipsis, *tail] if dots else [*head]


def _expand(
    tensors: list[Tensor], terms: list[list[Label]], output: list[Label] | None
) -> tuple[list[Labels], Labels]:
    """Replace each ellipsis by labels counted from the right, and find the implicit output."""
    labels: list[Labels] = []
    dots = 0
    for t, term in zip(tensors, terms, strict=True):
        hidden = t.ndim - (len(term) - term.count(Ellipsis))
        if term.count(Ellipsis) > 1 or hidden < 0 or (hidden and Ellipsis not in term):
            text = "".join("..." if a is Ellipsis else str(a) for a in term)
            raise _wrong(f"the subscript {text!r} does not fit an operand of {t.ndim} dimensions", tensors)
        dots = max(dots, hidden)
        labels.append(_fill(term, hidden))
    if output is None:
        flat = [a for term in terms for a in term if a is not Ellipsis]
        single = sorted(a for a in set(flat) if flat.count(a) == 1)  # type: ignore[type-var]
        output = [Ellipsis, *single]
    elif Ellipsis not in output and dots:
        raise _wrong("the output has no ellipsis for the axes that the inputs' ellipsis stands for", tensors)
    return labels, _fill(output, dots)


def _fill(term: list[Label], count: int) -> Labels:
    filled: list[Label] = []
    for a in term:
        filled += [("...", i) for i in range(-count, 0)] if a is Ellipsis else [a]
    return tuple(filled)


def _sizes(tensors: list[Tensor], labels: list[Labels]) -> dict[Label, int]:
    """The size of each index; size 1 gives way to any other."""
    sizes: dict[Label, int] = {}
    for t, term in zip(tensors, labels, strict=True):
        for a, n in zip(term, t.shape, strict=True):
            if sizes.setdefault(a, n) == 1:
                sizes[a] = n
            elif n not in (1, sizes[a]):
                name = "..." if isinstance(a, tuple) else a
                raise _wrong(f"the index {name!r} has sizes {sizes[a]} and {n}", tensors)
    return sizes


def _diagonals(x: Tensor, labels: Labels) -> tuple[Tensor, Labels]:
    """Replace each pair of axes with one label by its diagonal."""
    from tracejit.functions.linalg import diagonal

    for a in dict.fromkeys(labels):
        while labels.count(a) > 1:
            i = labels.index(a)
            j = labels.index(a, i + 1)
            if x.shape[i] != x.shape[j]:
                raise _wrong(f"the repeated index {a!r} has sizes {x.shape[i]} and {x.shape[j]}", [x])
            x = diagonal(x, 0, i, j)
            labels = (*(b for k, b in enumerate(labels) if k not in (i, j)), a)
    return x, labels


def _path(
    work: list[tuple[Tensor, Labels]], wanted: Labels, sizes: dict[Label, int]
) -> list[tuple[int, ...]]:
    """The contractions in order, each a tuple of positions in the shrinking list of operands."""
    if len(work) <= 2:
        return [tuple(range(len(work)))] if len(work) == 2 else []
    if len(sizes) > len(string.ascii_letters):
        return [(0, len(work) - 1 - k) if k else (0, 1) for k in range(len(work) - 1)]
    letter = dict(zip(sizes, string.ascii_letters, strict=False))
    text = ",".join("".join(letter[a] for a in labels) for _, labels in work)
    text += "->" + "".join(letter[a] for a in wanted)
    shapes = [np.broadcast_to(np.float32(0), x.shape) for x, _ in work]
    path = np.einsum_path(text, *shapes, optimize="greedy")[0][1:]
    return [tuple(step) for step in path]
