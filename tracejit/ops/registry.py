"""What an op is, in one place: shape rule, NumPy reference, gradient rule, meaning, samples. One :class:`Op` per primitive.

Families (``elementwise.py``, ``reduction.py``, ...) call :func:`define`; the graph builder, autograd, the reference
backend, the lowering, the viewer and the meta-test read the table. Backends keep lowerings of their own, keyed by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import numpy as np

from tracejit.dtypes import DType
from tracejit.errors import GraphError


class HasAval(Protocol):
    """Anything with a shape and a dtype: a node, a tensor, an array."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the axes."""
        ...

    @property
    def dtype(self) -> DType:
        """Element type."""
        ...


class _NonDifferentiable:
    """Marks ops whose results carry no gradient (comparisons, integer results, control markers)."""

    def __repr__(self) -> str:
        return "NONDIFFERENTIABLE"


NONDIFFERENTIABLE: Final = _NonDifferentiable()

#: ``vjp(g, y, *inputs, **attrs)`` -> one cotangent (or None) per input; tensors in, tensors out.
VjpRule = Callable[..., Sequence[Any]]
#: Samples for tests: a list of (tuple of input arrays, attrs).
Samples = Callable[[], "list[tuple[tuple[np.ndarray, ...], dict[str, Any]]]"]

CATEGORIES = (
    "elementwise",
    "activation",
    "reduction",
    "contraction",
    "norm",
    "view",
    "parameter",
    "constant",
    "loss",
    "random",
    "gather",
    "sort",
    "control",
    "window",
)


@dataclass(frozen=True, eq=False, repr=False)
class Op:
    """One primitive operation.

    ``infer(*inputs, **attrs)`` gives ``(shape, dtype)`` or raises in the user's terms; ``reference(*arrays, **attrs)``
    computes with NumPy; ``vjp`` builds the cotangents of the inputs from differentiable operations. ``arity`` is None
    for variadic ops. ``attrs`` names the attributes and their types in words. Traits in use: ``elementwise``,
    ``commutative``, ``reduction``, ``view`` (the reference may return a view), ``effect`` (never merged or removed),
    ``multi`` (result is a tuple, read through ``proj``).
    """

    name: str
    arity: int | None
    infer: Callable[..., tuple[tuple[int, ...], DType]]
    reference: Callable[..., Any]
    vjp: VjpRule | _NonDifferentiable
    category: str
    meaning: str
    formula: str
    shape_rule: str
    grad_rule: str
    samples: Samples
    attrs: Mapping[str, str] = field(default_factory=dict)
    traits: frozenset[str] = frozenset()

    def __repr__(self) -> str:
        return f"<op {self.name}>"

    def __call__(self, *operands: Any, **attrs: Any) -> Any:
        """Record the op if an operand is symbolic, else compute it now with the NumPy reference.

        Strict: operands must already have the shapes and dtypes that ``infer`` wants. User-level functions, which
        promote and broadcast, are in ``tracejit.functions``.
        """
        from tracejit.tensor import bind

        return bind(self, operands, attrs)

    @property
    def elementwise(self) -> bool:
        """True if each result element depends on the operand elements at the same position only."""
        return "elementwise" in self.traits

    def describe(self) -> dict[str, str]:
        """The row of the op table that events carry to the viewer."""
        return {
            "category": self.category,
            "meaning": self.meaning,
            "formula": self.formula,
            "shape_rule": self.shape_rule,
            "grad_rule": self.grad_rule,
        }


_table: dict[str, Op] = {}


def define(
    name: str,
    *,
    arity: int | None,
    infer: Callable[..., tuple[tuple[int, ...], DType]],
    reference: Callable[..., Any],
    vjp: VjpRule | _NonDifferentiable,
    category: str,
    meaning: str,
    formula: str,
    samples: Samples,
    shape_rule: str = "",
    grad_rule: str = "",
    attrs: Mapping[str, str] | None = None,
    traits: Sequence[str] = (),
) -> Op:
    """Register a primitive; names are unique and stable because they appear in saved graphs."""
    if name in _table:
        raise GraphError(f"op {name!r} is defined twice")
    if category not in CATEGORIES:
        raise GraphError(f"op {name!r} has the unknown category {category!r}")
    op = Op(
        name=name,
        arity=arity,
        infer=infer,
        reference=reference,
        vjp=vjp,
        category=category,
        meaning=meaning,
        formula=formula,
        shape_rule=shape_rule or ("same as the operands" if "elementwise" in traits else ""),
        grad_rule=grad_rule or ("none" if vjp is NONDIFFERENTIABLE else ""),
        samples=samples,
        attrs=dict(attrs or {}),
        traits=frozenset(traits),
    )
    _table[name] = op
    return op


def get(name: str) -> Op:
    """The op called ``name``; GraphError if there is none."""
    try:
        return _table[name]
    except KeyError:
        raise GraphError(f"unknown op {name!r}") from None


def all_ops() -> Iterator[Op]:
    """Every registered op, in the order of definition."""
    return iter(_table.values())
