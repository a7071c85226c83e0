"""The lowering's working form of a graph: mutable values with users, kinds and analysis fields.

``prepare.py`` makes them from a graph, ``fusion.py`` assigns them to clusters, ``emit.py`` turns clusters into kernels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from tracejit.dtypes import DType

if TYPE_CHECKING:
    from tracejit.lower.affine import Map
    from tracejit.lower.cluster import Cluster

Shape = tuple[int, ...]

#: What a value is to the fusion pass.
LEAF, CONST, GENERATOR, VIEW, MAP, REDUCE, DOT, OP, PROJ, ATTENTION = (
    "leaf",
    "const",
    "generator",
    "view",
    "map",
    "reduce",
    "dot",
    "op",
    "proj",
    "attention",
)

VIEW_OPS = frozenset({"reshape", "transpose", "broadcast_to", "slice", "flip", "pad", "concatenate"})
REDUCE_OPS = frozenset({"sum", "prod", "max", "min", "any", "all", "argmax", "argmin"})
GATHER_OPS = frozenset({"take", "take_along_axis"})
GENERATOR_OPS = frozenset({"iota", "random_bits"})

#: Rough cost of one elementwise result in simple floating-point operations; everything else costs 1.
WEIGHTS: Mapping[str, float] = {
    "div": 3, "reciprocal": 3, "sqrt": 4, "rsqrt": 4, "cbrt": 20, "floordiv": 4, "mod": 5, "fmod": 5, "pow": 25,
    "exp": 8, "exp2": 7, "expm1": 12, "log": 9, "log2": 9, "log10": 9, "log1p": 12,
    "sin": 12, "cos": 12, "tan": 18, "arcsin": 16, "arccos": 16, "arctan": 14, "arctan2": 20,
    "sinh": 16, "cosh": 16, "tanh": 14, "arcsinh": 20, "arccosh": 20, "arctanh": 20, "erf": 18,
    "random_bits": 90, "take": 90, "take_along_axis": 90,
    "reshape": 0, "transpose": 0, "broadcast_to": 0, "slice": 0, "flip": 0, "pad": 1, "concatenate": 1, "iota": 0.5,
    "convert": 0.5, "where": 1, "neg": 0.5, "abs": 0.5,
}  # fmt: skip


class Value:
    """One value; identity is equality. ``nid`` is the id of the graph node it came from (-1 if none).

    ``maps`` holds, for every cluster that wants the value, the index maps at which it does; ``home`` is the cluster that
    stores it, if any must; ``required`` says that somebody needs it in memory whatever the clusters do.
    """

    __slots__ = (
        "attrs", "consumers", "cost", "dtype", "epi", "home", "index", "inputs", "kind", "layout", "leaves",
        "maps", "nid", "op", "parts", "place",
        "reds", "required", "rows", "segments", "shape", "size", "sure", "target", "users",
    )  # fmt: skip

    def __init__(
        self,
        op: str,
        kind: str,
        inputs: Sequence[Value],
        attrs: Mapping[str, Any],
        shape: Shape,
        dtype: DType,
        nid: int,
    ) -> None:
        self.op = op
        self.kind = kind
        self.inputs = tuple(inputs)
        self.attrs = attrs
        self.shape = shape
        self.dtype = dtype
        self.nid = nid
        self.size: int = prod(shape)
        self.index = -1
        self.users: list[Value] = []
        #: Pads of zeros along one axis: (axis, ((low, high, value), ...)); sums of such become concatenations.
        self.segments: Any = None
        # fusion state
        self.maps: dict[Cluster, dict[Map, None]] = {}
        self.consumers: dict[Cluster, None] = {}
        self.home: Cluster | None = None
        self.required = False
        self.cost = 0.0
        self.leaves: frozenset[Value] | None = frozenset()
        self.epi: Value | None = None
        #: Reductions of the same rows (``reds``) and those broadcast into it (``rows``); ``sure``: the analysis expects
        #: it to be stored.
        self.rows: frozenset[Value] = frozenset()
        self.reds: frozenset[Value] = frozenset()
        self.sure = False
        #: Memory: ``layout`` are wanted strides, ``target`` is (owner, strides, offset) inside another value,
        #: ``place`` the final answer, ``parts`` the number of split-K partial sums.
        self.layout: tuple[int, ...] | None = None
        self.target: Any = None
        self.place: Any = None
        self.parts = 1

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.size * self.dtype.itemsize

    @property
    def scalar(self) -> Any:
        """The Python value of a CONST."""
        return self.attrs["value"]

    def __repr__(self) -> str:
        return f"<{self.op}#{self.index} %{self.nid} {np.dtype(self.dtype).name}{list(self.shape)}>"


def weight(v: Value) -> float:
    """Cost per element."""
    return WEIGHTS.get(v.op, 1.0)


def constant_of(v: Value) -> Any:
    """The scalar that every element of ``v`` equals, or None."""
    while v.op in ("broadcast_to", "reshape", "transpose"):
        v = v.inputs[0]
    return v.scalar if v.kind == CONST else None
