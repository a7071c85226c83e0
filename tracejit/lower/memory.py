"""The memory plan: life times of temporaries, in-place reuse, and offsets in one arena (or buffers of their own).

Called by ``lower`` once the order of kernels is fixed. Offsets are aligned to 256 bytes, which every GPU accepts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from tracejit.lower.costs import body_accesses
from tracejit.program import Buffer, Kernel, LoopBody, LoopKernel

ALIGN = 256


@dataclass
class Life:
    """A temporary from the kernel that first writes it to the last that touches it; ``within`` reuses another's memory."""

    buffer: int
    size: int
    first: int
    last: int
    offset: int = -1


def lives(kernels: Sequence[Kernel], buffers: Sequence[Buffer]) -> dict[int, Life]:
    """Life times of all temporaries that are touched."""
    out: dict[int, Life] = {}
    for i, k in enumerate(kernels):
        for b in (*k.writes, *k.reads):
            if buffers[b].kind == "temp":
                life = out.get(b)
                if life is None:
                    out[b] = Life(b, aligned(buffers[b].nbytes), i, i)
                else:
                    life.last = i
    return out


def aligned(n: int) -> int:
    """``n`` rounded up to the alignment (at least one unit)."""
    return max(1, -(-n // ALIGN)) * ALIGN


def plan(
    kernels: Sequence[Kernel], buffers: Sequence[Buffer], separate: bool
) -> tuple[list[Buffer], int, int]:
    """(buffers with offsets, arena size, live bound). With ``separate`` every temporary keeps a buffer of its own."""
    alive = lives(kernels, buffers)
    bound = live_bound(alive.values(), len(kernels))
    if separate:
        return list(buffers), 0, bound
    chains = in_place(kernels, buffers, alive)
    arena = place(chains)
    out = list(buffers)
    for chain in chains:
        for life in chain.members:
            out[life.buffer] = replace(out[life.buffer], offset=chain.offset)
    return out, arena, bound


def live_bound(alive: object, n: int) -> int:
    """The largest sum of temporaries alive at once (before in-place reuse)."""
    change = [0] * (n + 1)
    for life in alive:  # type: ignore[attr-defined]
        change[life.first] += life.size
        change[life.last + 1] -= life.size
    best = now = 0
    for c in change:
        now += c
        best = max(best, now)
    return best


@dataclass
class Chain:
    """Temporaries that take turns in one piece of memory (in-place updates)."""

    members: list[Life]
    size: int
    first: int
    last: int
    offset: int = -1


def in_place(kernels: Sequence[Kernel], buffers: Sequence[Buffer], alive: dict[int, Life]) -> list[Chain]:
    """Let results take the memory of operands that die in the same kernel and are read at the same addresses."""
    chain_of = {b: Chain([life], life.size, life.first, life.last) for b, life in alive.items()}
    for i, k in enumerate(kernels):
        if not isinstance(k, LoopKernel) or len(k.bodies) != 1:
            continue
        taken: set[int] = set()
        for out in k.writes:
            life = alive.get(out)
            if life is None or life.first != i:
                continue
            for source in k.reads:
                old = alive.get(source)
                if (
                    old is None or source in taken or source in k.writes or old.last != i or old.first == i
                    or buffers[source].dtype.itemsize != buffers[out].dtype.itemsize
                    or buffers[source].size != buffers[out].size
                    or not same_addresses(k.bodies[0], source, out)
                ):  # fmt: skip
                    continue
                taken.add(source)
                a, b = chain_of[source], chain_of[out]
                merged = Chain(a.members + b.members, max(a.size, b.size), a.first, b.last)
                for m in merged.members:
                    chain_of[m.buffer] = merged
                break
    return list({id(c): c for c in chain_of.values()}.values())


def same_addresses(body: LoopBody, source: int, out: int) -> bool:
    """True if ``out`` may overwrite ``source`` within a body: each element is read only where it is then written."""
    reads = {a for store, a, _ in body_accesses(body) if not store and a.buffer == source}
    writes = {a for store, a, _ in body_accesses(body) if store and a.buffer == out}
    if len(reads) != 1 or len(writes) != 1:
        return False
    (r,), (w,) = reads, writes
    if r.strides != w.strides or r.offset != w.offset:
        return False
    # A sweep after the one that overwrites must not need the operand again: backends recompute across sweeps.
    level = [0] * len(body.instrs)
    derived = [False] * len(body.instrs)
    reduced = set(body.reduce_axes)
    stored = latest = 0
    for n, i in enumerate(body.instrs):
        level[n] = max((level[a] for a in i.args), default=0) + (i.op == "reduce")
        mine = i.op == "load" and i.attrs["access"].buffer == source
        if mine and ("gather" in i.attrs or "predicate" in i.attrs):
            return False
        derived[n] = mine or any(derived[a] for a in i.args)
        if derived[n] and reduced & set(i.axes):
            latest = max(latest, level[n])
        if i.op == "store" and i.attrs["access"].buffer == out:
            stored = level[n]
    return stored >= latest


def place(chains: Sequence[Chain]) -> int:
    """Offsets for all chains, largest first, each at the lowest gap that fits; returns the arena's size."""
    arena = 0
    placed: list[Chain] = []
    for c in sorted(chains, key=lambda c: (-c.size, c.first)):
        busy = sorted(
            (p.offset, p.offset + p.size) for p in placed if p.first <= c.last and c.first <= p.last
        )
        at = 0
        best: int | None = None
        best_gap = 0
        for low, high in busy:
            gap = low - at
            if gap >= c.size and (best is None or gap < best_gap):
                best, best_gap = at, gap
            at = max(at, high)
        c.offset = at if best is None else best
        placed.append(c)
        arena = max(arena, c.offset + c.size)
    return arena
