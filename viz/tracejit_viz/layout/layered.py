"""Layered drawing of one directed graph, top to bottom. Called by ``compound`` for each scope.

Sugiyama's method: cycles broken by depth-first search, longest-path ranks tightened within their slack, long edges as
chains of dummies shared by all edges of one source, weighted-median ordering with adjacent transposition, and
Brandes-Koepf coordinates with node widths (Brandes & Koepf, "Fast and Simple Horizontal Coordinate Assignment", 2001;
compaction by longest path on the block graph). Everything is index based and deterministic.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

Edge = tuple[int, int]
DUMMY_WIDTH = 6.0


@dataclass(slots=True)
class Layering:
    """Centres of the nodes, the bend points of each edge (source to target, ends excluded), the size, the ranks."""

    x: list[float]
    y: list[float]
    bends: dict[Edge, list[tuple[float, float]]]
    width: float
    height: float
    rank: list[int]
    crossings: int


def break_cycles(n: int, edges: Iterable[Edge]) -> tuple[list[Edge], set[Edge]]:
    """Drop self loops and duplicates; return the edges and the subset that must be reversed to leave no cycle."""
    unique = [e for e in dict.fromkeys(edges) if e[0] != e[1]]
    succ: list[list[int]] = [[] for _ in range(n)]
    for s, d in unique:
        succ[s].append(d)
    state = bytearray(n)  # 0 new, 1 on the stack, 2 finished
    back: set[Edge] = set()
    for root in range(n):
        if state[root]:
            continue
        state[root] = 1
        stack = [(root, iter(succ[root]))]
        while stack:
            v, it = stack[-1]
            for w in it:
                if state[w] == 1:
                    back.add((v, w))
                elif not state[w]:
                    state[w] = 1
                    stack.append((w, iter(succ[w])))
                    break
            else:
                state[v] = 2
                stack.pop()
    return unique, back


def assign_ranks(
    n: int, succ: Sequence[Sequence[int]], pred: Sequence[Sequence[int]], first: set[int], last: set[int]
) -> list[int]:
    """Longest-path ranks, then every node moved within its slack to the side where it has more edges.

    ``first`` and ``last`` are pinned above and below everything else (ports on a group's rim).
    """
    indegree = [len(p) for p in pred]
    order = [v for v in range(n) if not indegree[v]]
    rank = [0] * n
    for v in order:
        for w in succ[v]:
            if rank[w] <= rank[v]:
                rank[w] = rank[v] + 1
            indegree[w] -= 1
            if not indegree[w]:
                order.append(w)
    for _ in range(6):
        changed = False
        for v in reversed(order):
            s = succ[v]
            if s and len(s) >= len(pred[v]) and v not in first:
                hi = min(rank[w] for w in s) - 1
                if hi > rank[v]:
                    rank[v], changed = hi, True
        for v in order:
            p = pred[v]
            if p and len(p) > len(succ[v]) and v not in last:
                lo = max(rank[u] for u in p) + 1
                if lo < rank[v]:
                    rank[v], changed = lo, True
        if not changed:
            break
    inner = [rank[v] for v in range(n) if v not in first and v not in last]
    if inner and (first or last):
        lo, hi = min(inner), max(inner)
        for v in first:
            rank[v] = lo - 1
        for v in last:
            rank[v] = hi + 1
    used = {r: i for i, r in enumerate(sorted(set(rank)))}
    return [used[r] for r in rank]


def _count_crossings(upper: Sequence[int], down: Sequence[Sequence[int]], pos: Sequence[int]) -> int:
    """Edge crossings between a layer and the next, by inversion counting in a binary tree (Barth et al. 2002)."""
    targets: list[int] = []
    for v in upper:
        d = down[v]
        if len(d) == 1:
            targets.append(pos[d[0]])
        elif d:
            targets.extend(sorted([pos[w] for w in d]))
    if len(targets) < 2:
        return 0
    size = 1
    top = max(targets) + 1
    while size < top:
        size *= 2
    tree = [0] * (2 * size)
    total = 0
    for t in targets:
        i = t + size
        tree[i] += 1
        while i > 1:
            if not i & 1:
                total += tree[i + 1]
            i >>= 1
            tree[i] += 1
    return total


class _Orderer:
    """Crossing reduction by layer sweeps. Keeps the best order seen."""

    def __init__(self, layers: list[list[int]], up: list[list[int]], down: list[list[int]], n: int) -> None:
        self.layers, self.up, self.down = layers, up, down
        self.pos = [0] * n
        for layer in layers:
            self._index(layer)

    def _index(self, layer: list[int]) -> None:
        pos = self.pos
        for i, v in enumerate(layer):
            pos[v] = i

    def total(self) -> int:
        return sum(_count_crossings(self.layers[r], self.down, self.pos) for r in range(len(self.layers) - 1))

    def _key(self, neighbours: list[int], mean: bool) -> float:
        pos = self.pos
        if len(neighbours) == 1:
            return pos[neighbours[0]]
        p = sorted([pos[w] for w in neighbours])
        m = len(p) // 2
        if mean:
            return sum(p) / len(p)
        if len(p) & 1:
            return p[m]
        if len(p) == 2:
            return (p[0] + p[1]) / 2
        left, right = p[m - 1] - p[0], p[-1] - p[m]
        if left + right:
            return (p[m - 1] * right + p[m] * left) / (left + right)
        return (p[m - 1] + p[m]) / 2

    def sweep(self, downwards: bool, mean: bool) -> None:
        near = self.up if downwards else self.down
        ranks = range(1, len(self.layers)) if downwards else range(len(self.layers) - 2, -1, -1)
        for r in ranks:
            layer = self.layers[r]
            keys = {v: self._key(near[v], mean) for v in layer if near[v]}
            moving = iter(sorted(keys, key=keys.__getitem__))
            layer[:] = [next(moving) if v in keys else v for v in layer]
            self._index(layer)

    def transpose(self, rounds: int = 3) -> None:
        """Swap neighbours while that removes crossings."""
        pos, up, down = self.pos, self.up, self.down
        for _ in range(rounds):
            improved = False
            for layer in self.layers:
                if len(layer) < 2:
                    continue
                above = {v: sorted([pos[w] for w in up[v]]) for v in layer}
                below = {v: sorted([pos[w] for w in down[v]]) for v in layer}
                for i in range(len(layer) - 1):
                    a, b = layer[i], layer[i + 1]
                    gain = _swap_gain(above[a], above[b]) + _swap_gain(below[a], below[b])
                    if gain > 0:
                        layer[i], layer[i + 1] = b, a
                        pos[a], pos[b] = i + 1, i
                        improved = True
            if not improved:
                return

    def run(self, sweeps: int, transpose: bool) -> int:
        best = self.total()
        keep = [list(layer) for layer in self.layers]
        stall = 0
        for k in range(sweeps):
            if best == 0 or stall >= 4:
                break
            self.sweep(k % 2 == 0, k % 4 >= 2)
            if transpose:
                self.transpose()
            now = self.total()
            if now < best:
                best, keep, stall = now, [list(layer) for layer in self.layers], 0
            else:
                stall += 1
        for layer, good in zip(self.layers, keep, strict=True):
            layer[:] = good
            self._index(layer)
        return best


def _swap_gain(a: list[int], b: list[int]) -> int:
    """Crossings removed by putting b before a, given the sorted positions of their neighbours in one layer."""
    if not a or not b or a[-1] < b[0]:
        return -1 if a and b else 0
    if len(a) == 1 and len(b) == 1:
        return (a[0] > b[0]) - (a[0] < b[0])
    now = after = 0
    for x in a:
        for y in b:
            if x > y:
                now += 1
            elif x < y:
                after += 1
    return now - after


def _conflicts(layers: list[list[int]], up: list[list[int]], pos: list[int], n_real: int) -> set[Edge]:
    """Type-1 conflicts: edges that cross an inner segment (dummy to dummy), which must stay straight."""
    out: set[Edge] = set()
    for r in range(1, len(layers)):
        layer = layers[r]
        k0, start = 0, 0
        width = len(layers[r - 1])
        for i, v in enumerate(layer):
            inner = up[v][0] if v >= n_real and up[v] and up[v][0] >= n_real else -1
            if inner < 0 and i != len(layer) - 1:
                continue
            k1 = pos[inner] if inner >= 0 else width
            for w in layer[start : i + 1]:
                for u in up[w]:
                    if (pos[u] < k0 or pos[u] > k1) and not (u >= n_real and w >= n_real):
                        out.add((u, w))
            start, k0 = i + 1, k1
    return out


def _coordinates(
    layers: list[list[int]],
    up: list[list[int]],
    down: list[list[int]],
    pos: list[int],
    width: list[float],
    n_real: int,
    gap: float,
) -> list[float]:
    """Brandes-Koepf: four extreme alignments, combined by the mean of the two middle values."""
    n = len(width)
    conflict = _conflicts(layers, up, pos, n_real)
    half_gap = gap * 0.5
    candidates: list[list[float]] = []
    for flip_v in (False, True):
        near = down if flip_v else up
        ordered_layers = layers[::-1] if flip_v else layers
        for flip_h in (False, True):
            rows = [row[::-1] for row in ordered_layers] if flip_h else ordered_layers
            place = [0] * n
            for row in rows:
                for i, v in enumerate(row):
                    place[v] = i
            root, align = list(range(n)), list(range(n))
            for row in rows:
                limit = -1
                for v in row:
                    nb = near[v]
                    if not nb:
                        continue
                    if len(nb) == 1:
                        mids: tuple[int, ...] = (nb[0],)
                    else:
                        s = sorted(nb, key=place.__getitem__)
                        m = (len(s) - 1) // 2
                        mids = (s[m],) if len(s) & 1 else (s[m], s[m + 1])
                    for u in mids:
                        if align[v] != v:
                            break
                        edge = (v, u) if flip_v else (u, v)
                        if limit < place[u] and edge not in conflict:
                            align[u] = v
                            root[v] = root[u]
                            align[v] = root[v]
                            limit = place[u]
            xs = _compact(rows, root, width, n_real, gap, half_gap)
            candidates.append([-x for x in xs] if flip_h else xs)
    spans = []
    for c in candidates:
        spans.append((min(x - w / 2 for x, w in zip(c, width)), max(x + w / 2 for x, w in zip(c, width))))
    lo, hi = min(spans, key=lambda s: s[1] - s[0])
    for i, c in enumerate(candidates):
        shift = lo - spans[i][0] if i % 2 == 0 else hi - spans[i][1]
        candidates[i] = [x + shift for x in c]
    out = []
    for a, b, c, d in zip(*candidates):
        out.append((a + b + c + d - max(a, b, c, d) - min(a, b, c, d)) / 2)
    return out


def _compact(
    rows: list[list[int]], root: list[int], width: list[float], n_real: int, gap: float, half_gap: float
) -> list[float]:
    """Blocks as far left as separation allows, then pulled right where they have room."""
    succ: dict[int, dict[int, float]] = {}
    pred: dict[int, dict[int, float]] = {}
    for row in rows:
        for a, b in pairwise(row):
            x, y = root[a], root[b]
            sep = (width[a] + width[b]) / 2 + (gap if a < n_real and b < n_real else half_gap)
            s = succ.setdefault(x, {})
            if sep > s.get(y, 0.0):
                s[y] = sep
                pred.setdefault(y, {})[x] = sep
    blocks = [v for row in rows for v in row if root[v] == v]
    degree = {b: len(pred.get(b, ())) for b in blocks}
    queue = [b for b in blocks if not degree[b]]
    at: dict[int, float] = {}
    for b in queue:
        at[b] = max((at[p] + s for p, s in pred.get(b, {}).items()), default=0.0)
        for y in succ.get(b, ()):
            degree[y] -= 1
            if not degree[y]:
                queue.append(y)
    for b in reversed(queue):
        after = succ.get(b)
        if after:
            room = min(at[y] - s for y, s in after.items())
            if room > at[b]:
                at[b] = room
    return [at[r] for r in root]


def layered(
    widths: Sequence[float],
    heights: Sequence[float],
    edges: Iterable[Edge],
    *,
    first: Iterable[int] = (),
    last: Iterable[int] = (),
    gap_x: float = 22.0,
    gap_y: float = 30.0,
    sweeps: int = 10,
) -> Layering:
    """Lay out a directed graph whose nodes are ``0..n-1`` with the given sizes; edges point downwards.

    Returns centres relative to the top-left corner of the drawing. Edges on a cycle are drawn upwards, the fewest that
    a depth-first search finds. ``first``/``last`` are pinned to a rank of their own at the top and bottom.
    """
    n = len(widths)
    if not n:
        return Layering([], [], {}, 0.0, 0.0, [], 0)
    pin_first, pin_last = set(first), set(last)
    unique, back = break_cycles(n, edges)
    succ: list[list[int]] = [[] for _ in range(n)]
    pred: list[list[int]] = [[] for _ in range(n)]
    dag = list(dict.fromkeys((d, s) if (s, d) in back else (s, d) for s, d in unique))
    for s, d in dag:
        succ[s].append(d)
        pred[d].append(s)
    rank = assign_ranks(n, succ, pred, pin_first, pin_last)

    width = list(widths)
    up: list[list[int]] = [[] for _ in range(n)]
    down: list[list[int]] = [[] for _ in range(n)]
    full_rank = list(rank)
    shared: dict[tuple[int, int], int] = {}
    chain: dict[Edge, list[int]] = {}
    for s, d in dag:
        path: list[int] = []
        current = s
        for r in range(rank[s] + 1, rank[d]):
            dummy = shared.get((s, r))
            if dummy is None:
                dummy = shared[s, r] = len(width)
                width.append(DUMMY_WIDTH)
                full_rank.append(r)
                up.append([current])
                down.append([])
                down[current].append(dummy)
            path.append(dummy)
            current = dummy
        down[current].append(d)
        up[d].append(current)
        chain[s, d] = path
    total = len(width)
    depth = max(full_rank) + 1
    layers: list[list[int]] = [[] for _ in range(depth)]
    seen = bytearray(total)
    for top in sorted(
        range(total), key=lambda v: -full_rank[v]
    ):  # depth first from the sinks keeps chains together
        stack = [top]
        while stack:
            v = stack.pop()
            if seen[v]:
                continue
            seen[v] = 1
            layers[full_rank[v]].append(v)
            stack.extend(u for u in reversed(up[v]) if not seen[u])
    orderer = _Orderer(layers, up, down, total)
    crossings = orderer.run(sweeps if total < 900 else 4, transpose=total < 3000)
    x = _coordinates(layers, up, down, orderer.pos, width, n, gap_x)

    y = [0.0] * total
    cursor = 0.0
    for r, layer in enumerate(layers):
        tall = max((heights[v] for v in layer if v < n), default=0.0)
        for v in layer:
            y[v] = cursor + tall / 2
        run = 0.0
        for v in layer:
            for w in down[v]:
                run = max(run, abs(x[v] - x[w]))
        pinned = (r == 0 and pin_first) or (r == depth - 2 and pin_last)
        cursor += tall + (gap_y * 0.6 if pinned else gap_y) + min(36.0, run * 0.04)
    left = min(x[v] - width[v] / 2 for v in range(total))
    x = [v - left for v in x]
    bends: dict[Edge, list[tuple[float, float]]] = {}
    for s, d in unique:
        reverse = (s, d) in back
        pts = [(x[k], y[k]) for k in chain[(d, s) if reverse else (s, d)]]
        bends[s, d] = pts[::-1] if reverse else pts
    full_width = max(x[v] + width[v] / 2 for v in range(total))
    full_height = max(y[v] + heights[v] / 2 for v in range(n))
    return Layering(x[:n], y[:n], bends, full_width, math.ceil(full_height), rank, crossings)
