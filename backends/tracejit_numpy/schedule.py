"""The order of steps: as recorded, but what frees at least as much memory as it takes goes first.

Called by ``interpreter.py`` while it plans. A graph lists what each output needs, output after output, so that the weight
gradients of a network would come after its whole backward pass and keep alive all they are made of.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from tracejit.graph import Node, has_effect


def low_peak_order(
    order: Sequence[Node],
    operands: Mapping[Node, Sequence[Node]],
    base: Callable[[Node], Node],
    kept: set[Node],
) -> list[Node]:
    """``order``, a topological order, with steps pulled forward that do not let memory grow.

    ``base(node)`` is the node that owns the memory of ``node`` (another one for views); memory of nodes in ``kept`` (the
    outputs) is never freed. Nodes that print keep their order.
    """
    position = {n: i for i, n in enumerate(order)}
    needs: dict[Node, set[Node]] = {n: {o for o in operands[n] if o in position} for n in order}
    last = None
    for n in order:
        if has_effect(n):
            if last is not None:
                needs[n].add(last)
            last = n
    users: dict[Node, list[Node]] = {n: [] for n in order}
    readers: dict[Node, set[Node]] = {}
    for n in order:
        for o in needs[n]:
            users[o].append(n)
        for b in {base(o) for o in operands[n]}:
            readers.setdefault(b, set()).add(n)
    missing = {n: len(needs[n]) for n in order}

    def growth(n: Node) -> int:
        new = n.nbytes if base(n) is n else 0
        return new - sum(
            b.nbytes
            for b in {base(o) for o in operands[n]}
            if b in position and b not in kept and readers[b] == {n}
        )

    done: dict[Node, None] = {}
    for start in order:
        bargains = [start]
        while bargains:
            n = bargains.pop()
            if n in done:
                continue
            done[n] = None
            changed = []
            for u in users[n]:
                missing[u] -= 1
                if missing[u] == 0:
                    changed.append(u)
            for b in {base(o) for o in operands[n]}:
                readers[b].discard(n)
                changed += [u for u in readers[b] if missing[u] == 0] if len(readers[b]) == 1 else []
            changed = [u for u in dict.fromkeys(changed) if u not in done and growth(u) <= 0]
            bargains += sorted(changed, key=position.__getitem__, reverse=True)
    return list(done)
