"""Order of kernels, and what must have finished before each one.

``order`` chooses a sequence with a low peak of live temporaries; ``dependencies`` lists, after the memory plan, for each
kernel the earlier kernels that it must wait for (true, anti and output dependencies on overlapping memory).
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import replace

from tracejit.program import Buffer, Kernel, OpKernel


def order(kernels: Sequence[Kernel], buffers: Sequence[Buffer], ranks: Sequence[int]) -> list[int]:
    """Positions of ``kernels`` in a good sequence. ``ranks`` are positions in program order (of their first node).

    A kernel is taken as soon as it frees at least as much as it allocates; else the one that comes first in the program.
    """
    n = len(kernels)
    writers: dict[int, list[int]] = {}
    for i, k in enumerate(kernels):
        for b in k.writes:
            writers.setdefault(b, []).append(i)
    needs: list[set[int]] = [set() for _ in range(n)]
    for i, k in enumerate(kernels):
        for b in k.reads:
            needs[i].update(w for w in writers.get(b, ()) if w != i)
    printed = -1
    for i, k in enumerate(kernels):
        if isinstance(k, OpKernel) and k.op == "print":
            if printed >= 0:
                needs[i].add(printed)
            printed = i
    users: list[list[int]] = [[] for _ in range(n)]
    for i, before in enumerate(needs):
        for j in before:
            users[j].append(i)
    missing = [len(x) for x in needs]
    readers: dict[int, int] = {}
    for k in kernels:
        for b in k.reads:
            if buffers[b].kind == "temp":
                readers[b] = readers.get(b, 0) + 1

    def growth(i: int) -> int:
        new = sum(
            buffers[b].nbytes for b in kernels[i].writes if buffers[b].kind == "temp" and b not in alive
        )
        dead = sum(buffers[b].nbytes for b in kernels[i].reads if readers.get(b) == 1)
        return new - dead

    alive: set[int] = set()
    ready = [(ranks[i], i) for i in range(n) if missing[i] == 0]
    heapq.heapify(ready)
    done: list[int] = []
    while ready:
        best: tuple[int, int, int] | None = None
        for rank, i in ready:
            g = growth(i)
            key = (0 if g <= 0 else 1, rank, i)
            if best is None or key < best:
                best = key
        assert best is not None
        i = best[2]
        ready.remove((ranks[i], i))
        done.append(i)
        for b in kernels[i].writes:
            alive.add(b)
        for b in kernels[i].reads:
            if b in readers:
                readers[b] -= 1
        for j in users[i]:
            missing[j] -= 1
            if missing[j] == 0:
                ready.append((ranks[j], j))
    if len(done) != n:
        raise AssertionError("the kernels form a cycle")
    return done


def dependencies(kernels: Sequence[Kernel], buffers: Sequence[Buffer]) -> list[Kernel]:
    """``kernels`` (in order) with ``after`` filled in: direct predecessors only, transitive ones left out."""

    def ranges(ids: Sequence[int]) -> list[tuple[int, int, int]]:
        out = []
        for b in ids:
            buffer = buffers[b]
            if buffer.kind in ("input", "const"):
                continue
            if buffer.offset is None:
                out.append((b, 0, 1))
            else:
                out.append((-1, buffer.offset, buffer.offset + max(1, buffer.nbytes)))
        return out

    done: list[Kernel] = []
    reach: list[int] = []
    read: list[list[tuple[int, int, int]]] = []
    written: list[list[tuple[int, int, int]]] = []
    printed = -1
    for j, k in enumerate(kernels):
        r, w = ranges(k.reads), ranges(k.writes)
        after: list[int] = []
        covered = 0
        for i in range(j - 1, -1, -1):
            if covered >> i & 1:
                continue
            if (
                overlap(written[i], r)
                or overlap(written[i], w)
                or overlap(read[i], w)
                or (i == printed and is_print(k))
            ):
                after.append(i)
                covered |= reach[i] | 1 << i
        if is_print(k):
            printed = j
        read.append(r)
        written.append(w)
        reach.append(covered)
        done.append(replace(k, after=tuple(sorted(after))))
    return done


def is_print(k: Kernel) -> bool:
    """True for kernels whose order among each other is visible."""
    return isinstance(k, OpKernel) and k.op == "print"


def overlap(a: Sequence[tuple[int, int, int]], b: Sequence[tuple[int, int, int]]) -> bool:
    """True if two sets of memory ranges share a byte."""
    return any(x[0] == y[0] and x[1] < y[2] and y[1] < x[2] for x in a for y in b)
