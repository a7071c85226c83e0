"""The page: a score with one column per top scope and staves for forward, gradient and optimiser. Called by ``scene``.

Forward flows left to right, the gradient stave is its mirror and flows right to left, so a node and its gradient share
a column. Small consecutive columns are stacked; long scores wrap into several systems, as music does. Each cell is a
:func:`compound` layout; edges between cells are single sweeps.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from .columns import Card, assign_columns
from .compound import CompoundLayout, LayoutCache, Waypoint, compound
from .pack import CELL_PAD, COLUMN_GAP, STACK_GAP, STAVE_GAP, SYSTEM_GAP, Stack, pack

Path = tuple[str, ...]
Rect = tuple[float, float, float, float]

STAVES = ("forward", "gradient", "optimizer")


@dataclass(slots=True)
class Cell:
    """The frame of one scope in one stave."""

    column: Path
    phase: str
    title: str
    rect: Rect
    items: list[int]


@dataclass(slots=True)
class Stave:
    """A band of the page: all cells of one phase in one system."""

    phase: str
    system: int
    rect: Rect


@dataclass(slots=True)
class PageWire:
    """A piece of an edge in page coordinates; ``cross`` for sweeps between cells."""

    source: int
    points: list[Waypoint]
    cross: bool
    phase: str


@dataclass
class Page:
    """The finished layout. Rectangles are (x, y, width, height) with the origin at the top-left of the page."""

    items: dict[int, Rect] = field(default_factory=dict)
    groups: dict[tuple[str, Path], Rect] = field(default_factory=dict)
    cells: list[Cell] = field(default_factory=list)
    staves: list[Stave] = field(default_factory=list)
    spans: list[tuple[str, Rect]] = field(default_factory=list)
    wires: list[PageWire] = field(default_factory=list)
    paths: dict[tuple[int, int], list[int]] = field(default_factory=dict)
    directions: dict[tuple[str, Path], str] = field(default_factory=dict)
    column_of: dict[int, Path] = field(default_factory=dict)
    width: float = 0.0
    height: float = 0.0
    head: float = 28.0
    stave_gap: float = STAVE_GAP


def layout_page(
    cards: Sequence[Card],
    edges: Sequence[tuple[int, int]],
    *,
    phases: Sequence[str] = STAVES,
    view: tuple[float, float] = (1560.0, 830.0),
    cache: LayoutCache | None = None,
    titles: Mapping[Path, str] | None = None,
) -> Page:
    """Lay out all cards. ``phases`` are the staves to show, ``view`` the pixels the page should fill well."""
    cache = cache or LayoutCache()
    cards = [c for c in cards if c.phase in phases]
    page = Page()
    if not cards:
        return page
    index = {c.index: c for c in cards}
    edges = [(a, b) for a, b in edges if a in index and b in index]
    page.column_of, columns = assign_columns(cards, edges)
    members: dict[tuple[Path, str], list[Card]] = defaultdict(list)
    for c in cards:
        members[page.column_of[c.index], c.phase].append(c)
    inner: dict[tuple[Path, str], list[tuple[int, int]]] = defaultdict(list)
    crossing: list[tuple[int, int]] = []
    for a, b in edges:
        ca, cb = index[a], index[b]
        same = ca.phase == cb.phase and page.column_of[a] == page.column_of[b]
        if same and (ca.phase != "optimizer" or (ca.group or ca.path)[:1] == (cb.group or cb.path)[:1]):
            inner[page.column_of[a], ca.phase].append((a, b))
        else:
            crossing.append((a, b))
    best: tuple[float, _Plan] | None = None
    tries = (0.9, 1.6, 2.8, 4.5) if len(cards) <= 260 else (1.1, 2.4) if len(cards) <= 900 else (1.1,)
    for aspect in tries:
        plan = _plan(page, columns, members, inner, cache, view, aspect)
        if best is None or plan.scale > best[0] * 1.04:
            best = (plan.scale, plan)
        if plan.width_bound:
            break  # wider cells would only make the page smaller
    assert best is not None
    plan = best[1]
    solved, used, systems = plan.solved, plan.used, plan.systems
    page.head, page.stave_gap = plan.head, plan.stave_gap
    _place_systems(page, systems, solved, members, used, titles or {}, view)
    for a, b in crossing:
        page.paths[a, b] = [len(page.wires)]
        page.wires.append(_sweep(page, index[a], index[b]))
    return page


@dataclass(slots=True)
class _Plan:
    """One way to lay out the page, with the scale at which it fits the view."""

    solved: dict[tuple[Path, str], CompoundLayout]
    used: list[str]
    systems: list[list[Stack]]
    scale: float
    head: float
    stave_gap: float
    width_bound: bool


def _plan(
    page: Page,
    columns: list[Path],
    members: Mapping[tuple[Path, str], list[Card]],
    inner: Mapping[tuple[Path, str], list[tuple[int, int]]],
    cache: LayoutCache,
    view: tuple[float, float],
    aspect: float,
) -> _Plan:
    solved: dict[tuple[Path, str], CompoundLayout] = {}
    for key, group in members.items():
        column, phase = key
        if phase != "optimizer":
            scopes = {
                c.index: (c.path[len(column) :] if c.path[: len(column)] == column else ()) for c in group
            }
            sizes = {c.index: (c.width, c.height) for c in group}
            edges = inner.get(key, [])
            solved[key] = compound(
                scopes, sizes, edges, cache=cache, mirrored=phase == "gradient", aspect=aspect
            )
    for key, group in members.items():
        column, phase = key
        if phase == "optimizer":
            above = [
                cell.width for (c, p), cell in solved.items() if p != phase and c[: len(column)] == column
            ]
            solved[key] = _shelf(group, column, inner.get(key, []), cache, max(above, default=0.0))
    used = [p for p in STAVES if any(k[1] == p for k in solved)]
    columns = [c for c in columns if any((c, p) in solved for p in used)]
    wide = {c: solved[c, p] for c, p in solved if p == "optimizer" and c not in columns}
    page.head, page.stave_gap = 28.0, STAVE_GAP
    systems: list[list[Stack]] = []
    scale = 1.0
    for _ in range(3):  # titles keep their size on the screen, so their room grows as the page is scaled down
        systems, scale = pack(columns, solved, used, page.head, page.stave_gap, view, wide)
        head, gap = page.head, page.stave_gap
        page.head = min(170.0, max(28.0, 20.0 / max(scale, 1e-6)))
        page.stave_gap = min(330.0, max(STAVE_GAP, 34.0 / max(scale, 1e-6)))
    w = max(sum(s.width for s in sys) + COLUMN_GAP * (len(sys) - 1) for sys in systems)
    return _Plan(solved, used, systems, scale, head, gap, (w + 60) * scale >= 0.98 * view[0])


def _inside(card: Card, column: Path) -> Path:
    """The frames around an optimiser card within its column."""
    if card.path[: len(column)] == column:
        return card.path[len(column) :]
    return () if card.path[:1] == column[:1] else card.path


def _shelf(
    group: Sequence[Card],
    column: Path,
    edges: list[tuple[int, int]],
    cache: LayoutCache,
    room: float = 0.0,
) -> CompoundLayout:
    """Optimiser cells: many small independent pieces, packed in rows about as wide as the cells above them."""
    parent = {c.index: c.index for c in group}

    def find(v: int) -> int:
        while parent[v] != v:
            parent[v] = parent[parent[v]]
            v = parent[v]
        return v

    by_path: dict[Path, int] = {}
    for c in group:
        inside = _inside(c, column)
        if inside:
            parent[find(c.index)] = find(by_path.setdefault(inside[:1], c.index))
    for a, b in edges:
        parent[find(a)] = find(b)
    parts: dict[int, list[Card]] = defaultdict(list)
    for c in group:
        parts[find(c.index)].append(c)
    pieces: list[CompoundLayout] = []
    for cards in parts.values():
        ids = {c.index for c in cards}
        pieces.append(
            compound(
                {c.index: _inside(c, column) for c in cards},
                {c.index: (c.width, c.height) for c in cards},
                [e for e in edges if e[0] in ids],
                cache=cache,
            )
        )
    gap = 14.0
    area = sum((p.width + gap) * (p.height + gap) for p in pieces)
    limit = max(math.sqrt(area) * 1.5, max(p.width for p in pieces), room)
    order = sorted(range(len(pieces)), key=lambda k: (-round(pieces[k].height), k))
    out = CompoundLayout({}, {}, [], {}, {(): "TB"}, 0.0, 0.0)
    x = y = row = 0.0
    for k in order:
        p = pieces[k]
        if x and x + p.width > limit:
            x, y, row = 0.0, y + row + gap, 0.0
        base = len(out.wires)
        for i, (px, py, w, h) in p.items.items():
            out.items[i] = (px + x, py + y, w, h)
        for g, (px, py, w, h) in p.groups.items():
            out.groups[g] = (px + x, py + y, w, h)
        for wire in p.wires:
            wire.points = [(a + x, b + y, tx, ty) for a, b, tx, ty in wire.points]
            out.wires.append(wire)
        for e, path in p.paths.items():
            out.paths[e] = [base + w for w in path]
        out.directions.update({g: d for g, d in p.directions.items() if g})
        x += p.width + gap
        row = max(row, p.height)
        out.width = max(out.width, x - gap)
    out.height = y + row
    return out


def _place_systems(
    page: Page,
    systems: list[list[Stack]],
    solved: dict[tuple[Path, str], CompoundLayout],
    members: dict[tuple[Path, str], list[Card]],
    used: list[str],
    titles: Mapping[Path, str],
    view: tuple[float, float],
) -> None:
    page.width = max(sum(s.width for s in sys) + COLUMN_GAP * (len(sys) - 1) for sys in systems)
    head = page.head
    tall = sum(
        sum(max(s.heights[p] for s in sys) for p in used) + page.stave_gap * len(used) for sys in systems
    )
    tall += SYSTEM_GAP * (len(systems) - 1)
    wide = [
        c for c, p in solved if p == "optimizer" and not any(c in s.columns for sys in systems for s in sys)
    ]
    wanted = tall * view[0] / max(1.0, view[1])  # stretch, within reason, to the shape of the window
    grow = 1.0
    if page.width < wanted:
        page.width = min(wanted, page.width * 1.4)
    else:
        bands = sum(sum(max(s.heights[p] for s in sys) for p in used) for sys in systems)
        spare = page.width * view[1] / max(1.0, view[0]) - tall
        grow = min(1.35, 1.0 + max(0.0, spare) / max(1.0, bands))
    y = 0.0
    for number, system in enumerate(systems):
        natural = sum(s.width for s in system) + COLUMN_GAP * (len(system) - 1)
        slack = (page.width - natural) / len(system) if natural > 0.6 * page.width else 0.0
        spans = _spans(system)
        if spans:
            y += head * 1.15
        top_of_system = y
        for phase in used:
            band = max((s.heights[phase] for s in system), default=0.0) * grow
            if not band:
                continue
            y += page.stave_gap * (0.5 if y == top_of_system else 0.7)
            x = 0.0
            for s in system:
                width = s.width + slack
                order = s.columns if phase != "gradient" else s.columns[::-1]
                present = [c for c in order if (c, phase) in solved]
                if present:
                    extra = (band - s.heights[phase]) / len(present)
                    cy = y
                    for c in present:
                        h = solved[c, phase].height + head + CELL_PAD + extra
                        _place_cell(
                            page, c, phase, (x, cy, width, h), solved[c, phase], members[c, phase], titles
                        )
                        cy += h + STACK_GAP
                x += width + COLUMN_GAP
            if phase == "optimizer":
                for c in list(wide):
                    reach = [k for k, s in enumerate(system) if s.columns[0][: len(c)] == c]
                    if not reach:
                        continue
                    wide.remove(c)
                    x0, x1 = _reach(system, slack, reach[0], reach[-1])
                    h = band if band > solved[c, phase].height else solved[c, phase].height + head + CELL_PAD
                    _place_cell(
                        page, c, phase, (x0, y, x1 - x0, h), solved[c, phase], members[c, phase], titles
                    )
            page.staves.append(Stave(phase, number, (0.0, y, x - COLUMN_GAP, band)))
            y += band + page.stave_gap * 0.3
        for title, first, last in spans:
            x0, x1 = _reach(system, slack, first, last)
            page.spans.append((title, (x0, top_of_system - head * 0.95, x1 - x0, head * 0.5)))
        y += SYSTEM_GAP
    page.height = y - SYSTEM_GAP


def _reach(system: list[Stack], slack: float, first: int, last: int) -> tuple[float, float]:
    """Left and right of a run of stacks."""
    left = sum(s.width + slack + COLUMN_GAP for s in system[:first])
    return left, sum(s.width + slack + COLUMN_GAP for s in system[: last + 1]) - COLUMN_GAP


def _spans(system: list[Stack]) -> list[tuple[str, int, int]]:
    """Runs of stacks of one opened top scope, to be bracketed with its name."""
    out: list[tuple[str, int, int]] = []
    for k, s in enumerate(system):
        if len(s.columns[0]) < 2:
            continue
        title = s.columns[0][0]
        if out and out[-1][0] == title and out[-1][2] == k - 1:
            out[-1] = (title, out[-1][1], k)
        else:
            out.append((title, k, k))
    return out


def _place_cell(
    page: Page,
    column: Path,
    phase: str,
    rect: Rect,
    cell: CompoundLayout,
    cards: list[Card],
    titles: Mapping[Path, str],
) -> None:
    x, y, w, h = rect
    ox = x + (w - cell.width) / 2
    oy = y + page.head + (h - page.head - CELL_PAD - cell.height) / 2
    title = titles.get(column) or " / ".join(column[1:] or column)
    page.cells.append(Cell(column, phase, title, rect, [c.index for c in cards]))
    for i, (a, b, iw, ih) in cell.items.items():
        page.items[i] = (a + ox, b + oy, iw, ih)
    own = {c.path[:1] for c in cards if phase == "optimizer" and c.path[:1] != column[:1]}

    def full(g: Path) -> Path:
        return g if g[:1] in own else (*column, *g)

    for g, (a, b, gw, gh) in cell.groups.items():
        page.groups[phase, full(g)] = (a + ox, b + oy, gw, gh)
    for g, d in cell.directions.items():
        page.directions[phase, full(g) if g else column] = d
    base = len(page.wires)
    for wire in cell.wires:
        points = [(a + ox, b + oy, tx, ty) for a, b, tx, ty in wire.points]
        page.wires.append(PageWire(wire.source, points, False, phase))
    for e, path in cell.paths.items():
        page.paths[e] = [base + k for k in path]


def _sweep(page: Page, a: Card, b: Card) -> PageWire:
    """One curve between cards of different cells, leaving and arriving along the flow of the stave."""
    xa, ya, wa, ha = page.items[a.index]
    xb, yb, wb, hb = page.items[b.index]
    if a.phase == b.phase and a.phase != "optimizer":
        sideways = xb >= xa + wa if a.phase == "forward" else xb + wb <= xa
        if sideways:
            s = 1.0 if a.phase == "forward" else -1.0
            start = (xa + wa if s > 0 else xa, ya + ha / 2, s, 0.0)
            end = (xb if s > 0 else xb + wb, yb + hb / 2, s, 0.0)
            return PageWire(a.index, [start, end], True, a.phase)
    if yb >= ya + ha:
        points = [(xa + wa / 2, ya + ha, 0.0, 1.0), (xb + wb / 2, yb, 0.0, 1.0)]
    elif yb + hb <= ya:
        points = [(xa + wa / 2, ya, 0.0, -1.0), (xb + wb / 2, yb + hb, 0.0, -1.0)]
    else:
        s = 1.0 if xb > xa else -1.0
        points = [
            (xa + wa if s > 0 else xa, ya + ha / 2, s, 0.0),
            (xb if s > 0 else xb + wb, yb + hb / 2, s, 0.0),
        ]
    return PageWire(a.index, points, True, b.phase)
