"""What is where, and in which state at time t: the layout of a session made ready for drawing and picking.

Joins ``fold`` (cards), ``layout`` (places) and ``history`` (times). Called by ``draw`` and ``app``; knows no pygame, so
it is tested without a window.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from .fold import Arrangement, Choices, Item, arrange
from .history import Session, Step
from .layout.compound import LayoutCache, Waypoint
from .layout.score import Page, layout_page
from .model import FORWARD, GRADIENT, OPTIMIZER, PHASES, Node
from .outline import FEWEST, card_budget, outline

PENDING, ACTIVE, DONE = 0, 1, 2
READABLE = 0.5  # pixels per page unit at which a card's name can be read
ATTEMPTS = 5
HOPELESS = 1500  # cards of a page that is not tried again with fewer

SHOW = {
    "forward": (FORWARD,),
    "gradient": (GRADIENT, OPTIMIZER),
    "both": PHASES,
}


@dataclass(slots=True)
class Moment:
    """The state of every card at one instant: PENDING/ACTIVE/DONE, and the fraction of its nodes that finished."""

    time: float
    state: np.ndarray
    fraction: np.ndarray
    active: np.ndarray  # item indices


class Scene:
    """A laid-out session. Rebuilt (cheaply, through the layout cache) when scopes are opened or closed."""

    def __init__(
        self,
        session: Session,
        choices: Choices | None = None,
        show: str = "both",
        view: tuple[float, float] = (1560.0, 830.0),
        cache: LayoutCache | None = None,
    ) -> None:
        self.session = session
        self.model = session.model
        self.choices = choices or Choices()
        self.show = show
        self.view = view
        self.cache = cache or LayoutCache()
        self.version = 0
        self._timed: Step | None = None
        self._tree_key: object = None
        self._hay: list[str] | None = None
        self._budget: dict[str, int] = {}
        self.rebuild()

    # -- layout ----------------------------------------------------------------------------------------------------
    def rebuild(self) -> None:
        """Arrange and lay out again after a change of choices."""
        key = (self.choices.fold_repeats, id(self.model))
        if key != self._tree_key:
            self._tree_key, self._tree, self._budget = key, outline(self.model, self.choices), {}
        self._arrange()
        self.items: list[Item] = self.arrangement.items
        shown = sorted(self.page.items)
        self.shown = np.array(shown, np.int64)
        self.rects = np.full((len(self.items), 4), np.nan)
        for i in shown:
            self.rects[i] = self.page.items[i]
        self._sample_wires()
        self.out_edges: dict[int, list[int]] = {}
        self.in_edges: dict[int, list[int]] = {}
        for a, b in self.page.paths:
            self.out_edges.setdefault(a, []).append(b)
            self.in_edges.setdefault(b, []).append(a)
        flat = [n for it in self.items for n in it.nodes]
        self._item_nodes = np.array(flat, np.int64)
        self._item_start = np.concatenate([[0], np.cumsum([len(it.nodes) for it in self.items])[:-1]]).astype(
            np.int64
        )
        self._item_count = np.array([len(it.nodes) for it in self.items], np.float64)
        self._timed = None
        self.version += 1

    def relaid(self) -> Scene:
        """Another scene with the present choices, laid out; this one can go on being drawn meanwhile (on a thread)."""
        other = copy.copy(self)
        other.choices, other._budget = copy.deepcopy(self.choices), dict(self._budget)
        other.rebuild()
        return other

    def _arrange(self) -> None:
        """Cards and their places. The first time, with as many cards as can be read; later with the same number."""
        chosen = self._budget.get(self.show)
        budget = chosen or card_budget(self.view)
        fits: tuple[int, Arrangement, Page] | None = None  # the most cards that can be read
        least: tuple[float, int, Arrangement, Page] | None = None  # else the largest scale
        too_many = 0
        for _ in range(ATTEMPTS):
            arrangement = arrange(self.model, self.choices, budget, self._tree)
            page = self._lay_out(arrangement)
            scale = min(self.view[0] / (page.width + 60), self.view[1] / (page.height + 60))
            if least is None or scale > least[0]:
                least = (scale, budget, arrangement, page)
            if scale >= READABLE:
                fits = (budget, arrangement, page)
            else:
                too_many = min(budget, len(page.items))
            if chosen or self.choices.collapse is False or len(page.items) > HOPELESS or not too_many:
                break
            known = fits[0] if fits else FEWEST
            if too_many - known < 0.12 * known:
                break
            wanted = (
                int(too_many * min(0.85, (scale / READABLE) ** 1.5)) if not fits else (known + too_many) // 2
            )
            budget = max(FEWEST, wanted)
        assert least is not None
        best = fits or least[1:]
        self._budget[self.show], self.arrangement, self.page = best

    def _lay_out(self, arrangement: Arrangement) -> Page:
        phases = SHOW[self.show]
        if not {it.phase for it in arrangement.items} & set(phases):
            phases = PHASES
        return layout_page(
            arrangement.items, list(arrangement.edges), phases=phases, view=self.view, cache=self.cache
        )

    def _sample_wires(self) -> None:
        """Every wire as a smooth polyline in page coordinates (one vectorised Bezier evaluation per length class)."""
        pieces: list[tuple[Waypoint, Waypoint]] = []
        spans: list[tuple[int, int]] = []
        for wire in self.page.wires:
            a = len(pieces)
            pieces.extend(zip(wire.points, wire.points[1:]))
            spans.append((a, len(pieces)))
        self.polylines: list[np.ndarray] = []
        self.wire_boxes = np.zeros((len(spans), 4))
        if not pieces:
            return
        p = np.array([s for s, _ in pieces])
        q = np.array([e for _, e in pieces])
        d = q[:, :2] - p[:, :2]
        dist = np.hypot(d[:, 0], d[:, 1])
        turning = (p[:, 2:] * q[:, 2:]).sum(1) < 0.5

        def reach(tangent: np.ndarray) -> np.ndarray:
            """How far the curve follows the tangent at one end: half way, less where it must turn a corner."""
            along = np.abs((d * tangent).sum(1))
            straight = np.maximum(along * 0.5, np.minimum(dist * 0.35, 40.0))
            return np.where(turning, np.minimum(dist * 0.42, 12.0 + 0.75 * along), straight)[:, None]

        b, c = p[:, :2] + p[:, 2:] * reach(p[:, 2:]), q[:, :2] - q[:, 2:] * reach(q[:, 2:])
        curves: dict[int, np.ndarray] = {}
        for points, chosen in ((8, dist < 70), (14, (dist >= 70) & (dist < 320)), (32, dist >= 320)):
            which = np.flatnonzero(chosen)
            if not len(which):
                continue
            t = np.linspace(0.0, 1.0, points)[None, :, None]
            u = 1.0 - t
            ctrl = [v[which][:, None, :2] for v in (p, b, c, q)]
            curve = u**3 * ctrl[0] + 3 * u * u * t * ctrl[1] + 3 * u * t * t * ctrl[2] + t**3 * ctrl[3]
            for at, samples in zip(which, curve):
                curves[int(at)] = samples
        for k, (i, j) in enumerate(spans):
            parts = [curves[m] if m == i else curves[m][1:] for m in range(i, j)]
            line = np.concatenate(parts) if j - i > 1 else parts[0]
            self.polylines.append(line)
            self.wire_boxes[k] = (*line.min(0), *line.max(0))

    def edge_path(self, edge: tuple[int, int]) -> np.ndarray:
        """The whole polyline of an edge, from card to card."""
        parts = [self.polylines[w] for w in self.page.paths[edge]]
        return np.concatenate(parts) if len(parts) > 1 else parts[0]

    # -- time ------------------------------------------------------------------------------------------------------
    def use_step(self, step: Step | None) -> None:
        """Load the times of a step; ``moment`` answers for it from now on."""
        if step is self._timed and step is not None:
            return
        self._timed = step
        if step is None:
            n = len(self.model.nodes)
            self.node_start, self.node_end = np.full(n, -1.0), np.full(n, -1.0)
        else:
            self.node_start, self.node_end = self.session.node_times(step)
        if len(self.items):
            self._s = self.node_start[self._item_nodes]
            self._e = self.node_end[self._item_nodes]
            self.item_start = np.minimum.reduceat(self._s, self._item_start)
            self.item_end = np.maximum.reduceat(self._e, self._item_start)

    def moment(self, t: float) -> Moment:
        """State of every card ``t`` nanoseconds into the loaded step (everything done when no step is loaded)."""
        if self._timed is None and not hasattr(self, "_s"):
            self.use_step(None)
        if not self.items:
            empty = np.zeros(0, np.int8)
            return Moment(t, empty, np.zeros(0), np.zeros(0, np.int64))
        running = (self._s <= t) & (t < self._e)
        finished = self._e <= t
        act = np.logical_or.reduceat(running, self._item_start)
        fraction = np.add.reduceat(finished.astype(np.float64), self._item_start) / self._item_count
        state = np.where(act, ACTIVE, np.where(fraction > 0, DONE, PENDING)).astype(np.int8)
        active = np.flatnonzero(act & ~np.isnan(self.rects[:, 0]))
        return Moment(t, state, fraction, active)

    # -- questions -------------------------------------------------------------------------------------------------
    def at(self, x: float, y: float, slack: float = 0.0) -> int | None:
        """The card under a point of the page."""
        if not len(self.shown):
            return None
        r = self.rects[self.shown]
        hit = np.flatnonzero(
            (r[:, 0] - slack <= x)
            & (x <= r[:, 0] + r[:, 2] + slack)
            & (r[:, 1] - slack <= y)
            & (y <= r[:, 1] + r[:, 3] + slack)
        )
        return int(self.shown[hit[0]]) if len(hit) else None

    def group_at(self, x: float, y: float) -> tuple[str, tuple[str, ...]] | None:
        """The innermost scope frame under a point."""
        best: tuple[float, tuple[str, tuple[str, ...]]] | None = None
        frames = [(k, r) for k, r in self.page.groups.items()]
        frames += [((c.phase, c.column), c.rect) for c in self.page.cells]
        for key, (gx, gy, w, h) in frames:
            if gx <= x <= gx + w and gy <= y <= gy + h and (best is None or w * h < best[0]):
                best = (w * h, key)
        return best[1] if best else None

    def item_of(self, node: int) -> int | None:
        """The visible card of a node."""
        i = self.arrangement.item_of[node] if 0 <= node < len(self.arrangement.item_of) else -1
        return i if i >= 0 and i in self.page.items else None

    def partners(self, item: int) -> list[int]:
        """Gradient cards of a forward card, or the forward card of a gradient one."""
        it = self.items[item]
        found: dict[int, None] = {}
        for n in it.nodes:
            for g in self.model.gradient_of.get(n, ()):
                j = self.item_of(g)
                if j is not None and j != item:
                    found[j] = None
            f = self.model.nodes[n].grad_of
            if f is not None:
                j = self.item_of(f)
                if j is not None and j != item:
                    found[j] = None
        return list(found)

    def _walk(self, start: Iterable[int], near: dict[int, list[int]]) -> set[int]:
        seen = set(start)
        queue = deque(seen)
        while queue:
            for w in near.get(queue.popleft(), ()):
                if w not in seen:
                    seen.add(w)
                    queue.append(w)
        return seen

    def ancestors(self, item: int) -> set[int]:
        """Everything the card depends on, itself included."""
        return self._walk([item], self.in_edges)

    def descendants(self, item: int) -> set[int]:
        """Everything that depends on the card, itself included."""
        return self._walk([item], self.out_edges)

    def between(self, a: int, b: int) -> set[int]:
        """Cards on some path between two cards, in whichever direction there is one; empty when there is none."""
        forward = self.descendants(a) & self.ancestors(b)
        return forward or (self.descendants(b) & self.ancestors(a))

    def search(self, text: str) -> list[int]:
        """Cards that match every word by op, name, scope, shape (``8x64`` or ``8,64``), dtype or source line."""
        words = text.lower().split()
        if not words:
            return []
        if self._hay is None:
            self._hay = [_searchable(n) for n in self.model.nodes]
        hay, out = self._hay, []
        for i in self.shown:
            it = self.items[int(i)]
            own = f"{it.label.lower()} {it.category} {it.phase} {'/'.join(it.path).lower()}"
            left = [w for w in words if w not in own]
            if not left or any(all(w in hay[v] for w in left) for v in it.nodes):
                out.append(int(i))
        return out

    def kernel_items(self, slot: int) -> list[int]:
        """Cards whose nodes ran in a kernel."""
        found = {self.item_of(n) for n in self.session.kernels[slot].nodes}
        return sorted(i for i in found if i is not None)

    # -- measures for the heat maps and titles -----------------------------------------------------------------------
    def item_seconds(self) -> np.ndarray:
        """Mean seconds per step of each card; a kernel's time goes to the last of its nodes that is a card of its own."""
        out = np.zeros(len(self.items))
        for slot, ns in enumerate(self.session.mean_kernel_ns()):
            if slot >= len(self.session.kernels) or not np.isfinite(ns):
                continue
            for n in reversed(self.session.kernels[slot].nodes):
                i = self.arrangement.item_of[n]
                if i >= 0:
                    out[i] += ns * 1e-9
                    break
        return out

    def item_bytes(self) -> np.ndarray:
        """Bytes of the values each card makes."""
        nodes = self.model.nodes
        return np.array([float(sum(nodes[v].nbytes for v in it.nodes[-1:])) for it in self.items])

    def cell_seconds(self, per_item: np.ndarray, items: Sequence[int]) -> float:
        """Seconds of all cards of a cell."""
        return float(per_item[list(items)].sum()) if len(items) else 0.0


def _searchable(n: Node) -> str:
    """Everything a node can be found by, in lower case."""
    by_x, by_comma = "x".join(map(str, n.shape)), ",".join(map(str, n.shape))
    text = f"{n.op} {n.name} {n.dtype} {'/'.join(n.scope)} {n.source} {by_x} {by_comma} #{n.id}"
    return text.lower()
