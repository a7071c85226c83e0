"""``barrier``: a value that is only there once others are. It keeps a recomputation apart from the first computation.

Recorded by ``checkpointing.py``. Equal nodes are merged as soon as they are made, so a function could never be computed
twice; behind a barrier with a number of its own its inputs, and so all its nodes, are new.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tracejit.ops.registry import HasAval, define


def _infer(x: HasAval, *after: HasAval, uid: int) -> Any:
    return tuple(x.shape), x.dtype


barrier = define(
    "barrier",
    arity=None,
    infer=_infer,
    reference=lambda x, *after, uid: x,
    vjp=lambda g, y, x, *after, uid: [g, *(None for _ in after)],
    category="control",
    meaning="The first operand, once the others have been computed; never merged with the value it passes on.",
    formula="y = x",
    shape_rule="same as the first operand",
    grad_rule="dx = g, none for the others",
    samples=lambda: [
        ((np.arange(3.0),), {"uid": 0}),
        ((np.arange(4.0).reshape(2, 2), np.ones(3)), {"uid": 1}),
    ],
    attrs={"uid": "int: tells barriers of one graph apart"},
    traits=("view",),
)
