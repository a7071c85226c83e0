"""Which column each card belongs to, and the order of the columns. Called by ``score``. Pure.

Columns are scopes in execution order; a node and its gradient share one, and so do a parameter and its update.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Protocol

Path = tuple[str, ...]


class Card(Protocol):
    """What the page needs to know of an item."""

    @property
    def index(self) -> int:
        """Its number."""
        ...

    @property
    def phase(self) -> str:
        """The stave it belongs to."""
        ...

    @property
    def path(self) -> Path:
        """Scopes it is drawn inside."""
        ...

    @property
    def group(self) -> Path:
        """The scope it stands for, when it is a collapsed one."""
        ...

    @property
    def width(self) -> float:
        """Page units."""
        ...

    @property
    def height(self) -> float:
        """Page units."""
        ...

    @property
    def order(self) -> int:
        """Position in execution order."""
        ...


def choose_columns(paths: Sequence[Path], most: int = 14) -> list[Path]:
    """Scope prefixes that become columns: top scopes, opened up until none holds more than ``most`` cards."""
    columns = list(dict.fromkeys(p[:1] for p in paths if p))
    for _ in range(6):
        count: dict[Path, int] = defaultdict(int)
        children: dict[Path, dict[Path, int]] = defaultdict(dict)
        known = set(columns)
        for p in paths:
            for i in range(len(p), 0, -1):
                if p[:i] in known:
                    count[p[:i]] += 1
                    if len(p) > i:
                        children[p[:i]][p[: i + 1]] = children[p[:i]].get(p[: i + 1], 0) + 1
                    break
        # a scope whose own cards outweigh its sub-scopes stays whole: they would lose their frame
        big = {
            c
            for c in columns
            if count[c] > most and len(children[c]) > 1 and count[c] <= 2 * sum(children[c].values())
        }
        if not big:
            break
        columns = [part for c in columns for part in (children[c] if c in big else (c,))]
    return columns


def assign_columns(
    cards: Sequence[Card], edges: Sequence[tuple[int, int]]
) -> tuple[dict[int, Path], list[Path]]:
    """The column of every card, and the columns from left to right.

    An optimiser card that belongs to several columns of one top scope gets that scope, which is then no column itself.
    """
    main = [c for c in cards if c.phase != "optimizer"]
    columns = choose_columns([c.group or c.path for c in main])
    known = set(columns)
    pred: dict[int, list[int]] = defaultdict(list)
    succ: dict[int, list[int]] = defaultdict(list)
    for a, b in edges:
        pred[b].append(a)
        succ[a].append(b)
    phase = {c.index: c.phase for c in cards}
    out: dict[int, Path] = {}
    loose: list[Card] = []
    for c in main:
        own = c.group or c.path
        hit = next((own[:i] for i in range(len(own), 0, -1) if own[:i] in known), None)
        if hit is None:
            loose.append(c)
        else:
            out[c.index] = hit
    for _ in range(3):  # direct nodes of an opened scope go beside what they read, else what reads them
        waiting = []
        for c in loose:
            near = [out[v] for v in pred[c.index] if v in out and phase[v] == c.phase]
            near = near[-1:] or [out[v] for v in succ[c.index] if v in out and phase[v] == c.phase][:1]
            if near:
                out[c.index] = near[0]
            else:
                waiting.append(c)
        loose = waiting[::-1]
    for c in loose:
        near = [out[v] for v in (*pred[c.index], *succ[c.index]) if v in out]
        out[c.index] = near[0] if near else (c.path[:1] or ("main",))
    ordered = _keep_families_together(_execution_order(main, edges, out))
    _assign_updates(cards, pred, succ, phase, out, ordered)
    if not ordered:
        ordered = list(dict.fromkeys(out.values()))
    return out, ordered


def _execution_order(
    main: Sequence[Card], edges: Sequence[tuple[int, int]], column: Mapping[int, Path]
) -> list[Path]:
    """Columns in the order their forward cards depend on each other; ties and cycles by first execution.

    When the gradient stands alone its order is turned round: it flows from right to left.
    """
    phase = {c.index: c.phase for c in main}
    alone = "forward" not in phase.values()
    lead = "gradient" if alone else "forward"
    first: dict[Path, int] = {}
    for c in main:
        rank = (-c.order if alone else c.order) + (0 if c.phase == lead else 10**9)
        first[column[c.index]] = min(first.get(column[c.index], 1 << 60), rank)
    waits: dict[Path, set[Path]] = {p: set() for p in first}
    for a, b in edges:
        if phase.get(a) == phase.get(b) == lead and column[a] != column[b]:
            earlier, later = (b, a) if alone else (a, b)
            waits[column[later]].add(column[earlier])
    ordered: list[Path] = []
    left = sorted(first, key=lambda p: first[p])
    while left:
        after = min(left, key=lambda p: (len(waits[p]), first[p]))
        left.remove(after)
        ordered.append(after)
        for p in left:
            waits[p].discard(after)
    return ordered


def _assign_updates(
    cards: Sequence[Card],
    pred: Mapping[int, list[int]],
    succ: Mapping[int, list[int]],
    phase: Mapping[int, str],
    out: dict[int, Path],
    columns: Sequence[Path],
) -> None:
    """Optimiser cards stand under the column of the parameter they change; all cards of one scope in one column."""
    known = set(columns)
    families: dict[Path, list[Card]] = defaultdict(list)
    for c in cards:
        if c.phase == "optimizer":
            own = c.group or c.path
            hit = next((own[:i] for i in range(len(own), 0, -1) if own[:i] in known), None)
            if hit is None:
                families[own[:1] or ("", str(c.index))].append(c)
            else:
                out[c.index] = hit
    spans = {name for name in families if any(c[:1] == name for c in columns)}  # a cell below a whole family

    def settle(column: Path) -> Path:
        return column[:1] if column[:1] in spans else column

    first = settle(columns[0]) if columns else ("update",)
    for i, column in out.items():
        if phase[i] == "optimizer":
            out[i] = settle(column)
    for name, members in families.items():
        near = [out[v] for c in members for v in pred.get(c.index, ()) if v in out and phase[v] == "forward"]
        for c in members:
            if name in spans:
                out[c.index] = name
            elif near and name[0]:
                out[c.index] = settle(near[0])
            elif name[0]:  # what serves all updates comes first: where the gradient pass ends
                out[c.index] = first
            else:
                beside = [out[v] for v in (*pred.get(c.index, ()), *succ.get(c.index, ())) if v in out]
                out[c.index] = settle(next(iter(beside), first))


def _keep_families_together(columns: list[Path]) -> list[Path]:
    """Columns of one top scope stay side by side, where their first one stands."""
    families: dict[Path, list[Path]] = {}
    for c in columns:
        families.setdefault(c[:1], []).append(c)
    return [c for members in families.values() for c in members]
