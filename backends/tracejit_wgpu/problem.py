"""A contraction in the form that the tile generator takes: axes merged, the result's contiguous axis in n.

Made from ``Contract`` by ``contract.py``; ``operands.py`` and ``tile_kernel.py`` read it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

import numpy as np

from tracejit.program import Access, Contract, LoopBody
from tracejit_wgpu import body as bodies


@dataclass(frozen=True)
class Problem:
    """A normalised contraction: axes merged, the result's contiguous axis in n. Strides are per axis of each group."""

    batch: tuple[int, ...]
    m: tuple[int, ...]
    n: tuple[int, ...]
    k: tuple[int, ...]
    a: Access
    b: Access
    epilogue: LoopBody
    acc: np.dtype
    #: Where the sums of the operands over k go, as flat (buffer, offset): their elements are contiguous.
    a_sum: Access | None = None
    b_sum: Access | None = None

    def part(self, access: Access, group: str) -> tuple[int, ...]:
        """The strides of an access along one group of axes."""
        sizes = {"batch": self.batch, "m": self.m, "n": self.n, "k": self.k}
        start = 0
        for name, axes in sizes.items():
            if name == group:
                return access.strides[start : start + len(axes)]
            start += len(axes)
        raise KeyError(group)


def normalise(c: Contract) -> Problem:
    """Merge axes inside each group where every access allows, and swap m and n if the result is contiguous along m."""
    sizes = (*c.batch, *c.m, *c.n, *c.k)
    outer = len(c.batch) + len(c.m) + len(c.n)
    bounds = [0, len(c.batch), len(c.batch) + len(c.m), outer, len(sizes)]
    epilogue = bodies.with_axes(c.epilogue)
    indexed = {i.attrs["axis"] for i in epilogue.instrs if i.op == "index"}
    strides = [bodies._strides(i) for i in epilogue.instrs]
    rows = [s for s in strides if s is not None]
    merged: list[list[tuple[int, ...]]] = []
    for g in range(4):
        groups: list[tuple[int, ...]] = []
        for axis in range(bounds[g], bounds[g + 1]):
            size = sizes[axis]
            if size == 1 and axis not in indexed:
                continue
            if groups:
                last = groups[-1][-1]
                fits = (
                    c.a.strides[last] == c.a.strides[axis] * size
                    and c.b.strides[last] == c.b.strides[axis] * size
                )
                fits = fits and not {last, axis} & indexed
                if fits and (g == 3 or all(s[last] == s[axis] * size for s in rows)):
                    groups[-1] = (*groups[-1], axis)
                    continue
            groups.append((axis,))
        merged.append(groups)
    store = next(i for i in epilogue.instrs if i.op == "store").attrs["access"].strides
    if merged[1] and merged[2] and store[merged[1][-1][-1]] == 1 and store[merged[2][-1][-1]] != 1:
        merged[1], merged[2] = merged[2], merged[1]
        first, second, sums = c.b, c.a, (c.b_sum, c.a_sum)
    else:
        first, second, sums = c.a, c.b, (c.a_sum, c.b_sum)
    order = [g[-1] for groups in merged for g in groups]

    def fix(access: Access) -> Access:
        return replace(access, strides=tuple(access.strides[x] for x in order))

    def total(groups: list[tuple[int, ...]]) -> tuple[int, ...]:
        return tuple(prod(sizes[x] for x in g) for g in groups)

    batch, m, n, k = (total(g) for g in merged)
    body = bodies.remap(epilogue, [*merged[0], *merged[1], *merged[2]])
    return Problem(batch, m, n, k, fix(first), fix(second), body, c.acc_dtype, *sums)
