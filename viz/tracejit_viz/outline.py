"""How much of a graph is shown at once: which scopes start open, so that the cards of a page can be read.

A page has room for a number of cards (:func:`card_budget`). Starting from one card per top scope, scopes are opened
outermost first, equal ones together and a scope's forward and gradient halves together, as long as the cards fit; the
user opens the rest, and the optimiser, with a double-click. Called by ``fold``. Pure; no pygame.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .model import OPTIMIZER, GraphModel, Node
from .scopes import (
    Fold,
    Path,
    Placed,
    apply_folds,
    find_folds,
    home_scopes,
    is_composite,
    optimizer_scopes,
    stem_of,
)

if TYPE_CHECKING:
    from .fold import Choices

Group = tuple[str, Path]

#: Up to this many visible nodes composites (softmax, layer_norm, ...) start open too.
COLLAPSE_ABOVE = 40
#: Below this many computed nodes repeated blocks start unfolded.
FOLD_ABOVE = 260
CHUNK = 320  # a scope with more direct children than this is cut into numbered parts
ABSORB_ABOVE = 3  # a collapsed scope with more parameters than this draws none of them
PIXELS_PER_CARD = 9500.0  # a readable card with its share of edges, frames and air
FEWEST, MOST = 24, 700


def card_budget(view: tuple[float, float]) -> int:
    """How many cards a view of that many pixels shows at a readable size."""
    return int(min(MOST, max(FEWEST, view[0] * view[1] / PIXELS_PER_CARD)))


@dataclass(slots=True)
class _Measure:
    """What a scope holds: cards of its own, parameters of its own and below, sub-scopes, position."""

    direct: set[object] = field(default_factory=set)
    pills: int = 0
    all_pills: int = 0
    units: set[object] = field(default_factory=set)
    children: set[Path] = field(default_factory=set)
    first: int = 1 << 60

    @property
    def closed(self) -> int:
        """Cards when collapsed."""
        return 1 + (self.all_pills if self.all_pills <= ABSORB_ABOVE else 0)


@dataclass(slots=True)
class Outline:
    """The scope tree of a graph as it would be drawn, before anything is collapsed. Made once per graph and folding."""

    folds: dict[Path, Fold]
    placed: Placed
    measure: dict[Group, _Measure]
    collapsible: set[Group]
    visible: int  # computed forward and gradient nodes, equal ones counted once
    loose: int  # cards outside any scope


def outline(model: GraphModel, choices: Choices) -> Outline:
    """Fold repeats, place optimiser nodes, measure every scope."""
    computed = sum(1 for n in model.nodes if not n.is_source and n.phase != OPTIMIZER)
    fold_on = choices.fold_repeats if choices.fold_repeats is not None else computed > FOLD_ABOVE
    scope = home_scopes(model)
    folds = find_folds(model, scope) if fold_on else {}
    placed = apply_folds(model, scope, folds)
    optimizer_scopes(model, placed)
    _chunk_flat(model, placed.shown)
    measure: dict[Group, _Measure] = defaultdict(_Measure)
    loose: set[object] = set()
    for n in model.nodes:
        if n.is_source:
            _measure_source(model, placed, n, measure)
            continue
        path = placed.shown[n.id]
        key = n.id if placed.merge[n.id] is None else placed.merge[n.id]
        for i in range(1, len(path) + 1):
            m = measure[n.phase, path[:i]]
            m.units.add(key)
            m.first = min(m.first, n.id)
            if i < len(path):
                m.children.add(path[: i + 1])
        if path:
            measure[n.phase, path].direct.add(key)
        else:
            loose.add(key)
    collapsible = {g for g, m in measure.items() if len(m.units) > 1}
    visible = sum(
        len(m.units) for (phase, path), m in measure.items() if len(path) == 1 and phase != OPTIMIZER
    )
    return Outline(folds, placed, measure, collapsible, visible, len(loose))


def _measure_source(model: GraphModel, placed: Placed, n: Node, measure: dict[Group, _Measure]) -> None:
    if n.category != "parameter" or placed.member[n.id] > 0:
        return
    user = next(
        (u for u in n.users if model.nodes[u].phase == n.phase and not model.nodes[u].is_source), None
    )
    if user is None or n.phase == OPTIMIZER or placed.member[user] > 0:
        return
    path = placed.shown[user]
    for i in range(1, len(path) + 1):
        measure[n.phase, path[:i]].all_pills += 1
    if path:
        measure[n.phase, path].pills += 1


def _chunk_flat(model: GraphModel, shown: list[Path]) -> None:
    """Cut scopes with too many direct nodes into numbered parts, in execution order."""
    direct: dict[Group, list[int]] = defaultdict(list)
    for n in model.nodes:
        if not n.is_source:
            direct[n.phase, shown[n.id]].append(n.id)
    for (_, path), ids in direct.items():
        if len(ids) > CHUNK:
            for k, v in enumerate(ids):
                a = k // CHUNK * CHUNK
                shown[v] = (*path, f"ops {a + 1}–{min(a + CHUNK, len(ids))}")


def closed_groups(o: Outline, choices: Choices, budget: int) -> set[Group]:
    """The scopes drawn as one card."""
    closed = set() if choices.collapse is False else o.collapsible - open_groups(o, budget)
    closed |= choices.closed & o.collapsible
    return closed - choices.opened


def open_groups(o: Outline, budget: int) -> set[Group]:
    """The scopes that start open: outermost first, cheapest first, as long as at most ``budget`` cards result."""
    small = o.visible <= COLLAPSE_ABOVE
    families: dict[tuple[bool, Path, str], list[Group]] = defaultdict(list)
    for g in o.measure:
        phase, path = g
        stems = tuple(stem_of(p.partition(" #")[0]) for p in path)
        families[phase == OPTIMIZER, stems[:-1], stems[-1]].append(g)
    below: dict[Group, set[tuple[bool, Path, str]]] = defaultdict(set)
    for key, groups in families.items():
        for phase, path in groups:
            below[phase, path[:-1]].add(key)

    def cost(groups: list[Group]) -> int:
        """Cards added by opening these."""
        more = 0
        for g in groups:
            m = o.measure[g]
            inside = sum(o.measure[g[0], c].closed for c in m.children)
            more += len(m.direct) + m.pills + inside - m.closed
        return more

    heap: list[tuple[bool, int, int, int, tuple[bool, Path, str]]] = []

    def push(key: tuple[bool, Path, str]) -> None:
        if not small and (key[0] or is_composite(key[2])):
            return
        groups = families[key]
        heapq.heappush(
            heap, (key[0], len(key[1]), cost(groups), min(o.measure[g].first for g in groups), key)
        )

    opened: set[Group] = set()
    total = o.loose
    for key, groups in families.items():
        if not key[1]:
            total += sum(o.measure[g].closed for g in groups)
            push(key)
    while heap:
        _, _, more, _, key = heapq.heappop(heap)
        if total + more > budget:
            continue
        total += more
        opened.update(families[key])
        ready = {k for g in families[key] for k in below[g]}
        for k in sorted(ready, key=str):
            push(k)
    return opened
