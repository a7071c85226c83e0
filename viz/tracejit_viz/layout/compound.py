"""Recursive layout of nested scopes. Called by ``score`` for each cell of the page.

Every scope is laid out by :func:`layered` with its sub-scopes as boxes. An edge that leaves a scope passes through a
*port* on its rim, so that the pieces drawn at each level join. Results are kept by structure in a :class:`LayoutCache`:
twelve equal transformer blocks are laid out once, and collapsing a scope re-lays out only its ancestors.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field

from .layered import Layering, layered

PAD = 14.0
HEAD = 22.0
TOP_DOWN, LEFT_RIGHT, RIGHT_LEFT = "TB", "LR", "RL"

#: Tangent of the flow at a waypoint, per direction.
_TANGENT = {TOP_DOWN: (0.0, 1.0), LEFT_RIGHT: (1.0, 0.0), RIGHT_LEFT: (-1.0, 0.0)}

#: One waypoint of a wire: x, y, and the unit tangent there.
Waypoint = tuple[float, float, float, float]
#: One end of an edge inside a level: (child, port). Port -1 is the child itself; child -1 / -2 is this level's own
#: in-port / out-port of that number.
End = tuple[int, int]
IN, OUT = -1, -2


@dataclass(slots=True)
class Group:
    """A scope during construction: its children in order, and what crosses its rim."""

    path: tuple[str, ...]
    children: list[Group | int] = field(default_factory=list)
    slot: dict[Hashable, int] = field(default_factory=dict)
    ins: dict[int, int] = field(default_factory=dict)  # outside source item -> in-port number
    outs: dict[int, int] = field(default_factory=dict)  # inside source item -> out-port number
    edges: dict[tuple[End, End], int] = field(default_factory=dict)  # -> index of the edge


@dataclass(slots=True)
class Solved:
    """The layout of one scope in its own coordinates (0, 0 = top-left of its frame).

    Ports sit where the scope's own flow enters and leaves. When the scope around it flows the other way they move to
    the sides that face the neighbours: ``side_ins``/``side_outs``, with the wires to them in ``side_wires``.
    """

    width: float
    height: float
    direction: str
    corner: list[tuple[float, float]]  # top-left of each child
    ins: list[Waypoint]
    outs: list[Waypoint]
    wires: list[list[Waypoint]]
    children: list[Solved | None]
    side_ins: list[Waypoint]
    side_outs: list[Waypoint]
    side_wires: dict[int, list[Waypoint]]


class LayoutCache:
    """Layouts by structure. One per window; bounded, oldest structures dropped first."""

    def __init__(self, limit: int = 4096) -> None:
        self.limit = limit
        self.ids: dict[Hashable, int] = {}
        self.solved: dict[int, Solved] = {}
        self.misses = 0

    def intern(self, signature: Hashable) -> int:
        """A small integer for a structure; equal structures get equal integers."""
        return self.ids.setdefault(signature, len(self.ids))

    def trim(self) -> None:
        """Forget everything when the bound is passed (structures refer to each other, so all or nothing)."""
        if len(self.ids) > self.limit:
            self.ids.clear()
            self.solved.clear()


@dataclass(slots=True)
class Wire:
    """One drawn piece of an edge: where it starts (item), its waypoints in page coordinates."""

    source: int
    points: list[Waypoint]


@dataclass(slots=True)
class CompoundLayout:
    """Rectangles (x, y, w, h) of items and scopes, the wires, and for each edge the wires that make it up in order."""

    items: dict[int, tuple[float, float, float, float]]
    groups: dict[tuple[str, ...], tuple[float, float, float, float]]
    wires: list[Wire]
    paths: dict[tuple[int, int], list[int]]
    directions: dict[tuple[str, ...], str]
    width: float
    height: float


def compound(
    scopes: dict[int, tuple[str, ...]],
    sizes: dict[int, tuple[float, float]],
    edges: Iterable[tuple[int, int]],
    *,
    cache: LayoutCache | None = None,
    mirrored: bool = False,
    aspect: float = 1.1,
) -> CompoundLayout:
    """Lay out items inside nested scopes.

    ``scopes`` gives each item its scope path (relative to this drawing), ``sizes`` its width and height. ``mirrored``
    makes sideways levels run right to left (the gradient stave). ``aspect`` is the wanted width/height.
    """
    cache = cache or LayoutCache()
    root, parent_of = _build_tree(scopes)
    unique = [e for e in dict.fromkeys(edges) if e[0] != e[1] and e[0] in scopes and e[1] in scopes]
    pieces = {e: _thread(e, root, parent_of) for e in unique}
    solved = _solve(root, sizes, cache, mirrored, aspect, top=True)[1]
    out = CompoundLayout({}, {}, [], {}, {}, solved.width, solved.height)
    wire_index: dict[tuple[int, int], int] = {}
    _place(root, solved, 0.0, 0.0, False, sizes, out, wire_index)
    for (s, d), parts in pieces.items():
        out.paths[s, d] = [wire_index[id(g), k] for g, k in parts]
        for w in out.paths[s, d]:
            out.wires[w].source = s
    cache.trim()
    return out


def _build_tree(scopes: dict[int, tuple[str, ...]]) -> tuple[Group, dict[int, list[Group]]]:
    root = Group(())
    groups: dict[tuple[str, ...], Group] = {(): root}
    chain_of: dict[int, list[Group]] = {}
    for item, path in scopes.items():
        chain = [root]
        for i in range(1, len(path) + 1):
            sub = path[:i]
            group = groups.get(sub)
            if group is None:
                group = groups[sub] = Group(sub)
                above = chain[-1]
                above.slot[sub] = len(above.children)
                above.children.append(group)
            chain.append(group)
        home = chain[-1]
        home.slot[item] = len(home.children)
        home.children.append(item)
        chain_of[item] = chain
    return root, chain_of


def _thread(edge: tuple[int, int], root: Group, chain_of: dict[int, list[Group]]) -> list[tuple[Group, int]]:
    """Lead an edge through every level it crosses, making ports; return its pieces as (level, edge number)."""
    s, d = edge
    a, b = chain_of[s], chain_of[d]
    common = 0
    while common < len(a) and common < len(b) and a[common] is b[common]:
        common += 1
    parts: list[tuple[Group, int]] = []

    def add(group: Group, tail: End, head: End) -> None:
        number = group.edges.setdefault((tail, head), len(group.edges))
        parts.append((group, number))

    end: End = (a[-1].slot[s], -1)
    for level in range(len(a) - 1, common - 1, -1):  # out of the source's scopes
        group = a[level]
        port = group.outs.setdefault(s, len(group.outs))
        add(group, end, (OUT, port))
        end = (a[level - 1].slot[group.path], port)
    meet = a[common - 1]
    into: list[tuple[Group, int]] = []
    for level in range(common, len(b)):
        into.append((b[level], b[level].ins.setdefault(s, len(b[level].ins))))
    for k, (group, port) in enumerate(into):  # down into the target's scopes
        holder = meet if k == 0 else into[k - 1][0]
        # the head end names the group as a child and, shifted past its out-ports, the in-port
        add(holder, end, (holder.slot[group.path], -2 - port))
        end = (IN, port)
    add(into[-1][0] if into else meet, end, (b[-1].slot[d], -1))
    return parts


def _solve(
    group: Group,
    sizes: dict[int, tuple[float, float]],
    cache: LayoutCache,
    mirrored: bool,
    aspect: float,
    *,
    top: bool,
) -> tuple[int, Solved]:
    shape: list[Hashable] = []
    boxes: list[tuple[float, float]] = []
    inner: list[Solved | None] = []
    for child in group.children:
        if isinstance(child, Group):
            key, solved = _solve(child, sizes, cache, mirrored, aspect, top=False)
            shape.append(key)
            boxes.append((solved.width, solved.height))
            inner.append(solved)
        else:
            shape.append(sizes[child])
            boxes.append(sizes[child])
            inner.append(None)
    signature = (tuple(shape), len(group.ins), len(group.outs), tuple(group.edges), mirrored, aspect, top)
    key = cache.intern(signature)
    found = cache.solved.get(key)
    if found is None:
        cache.misses += 1
        found = _layout_level(group, boxes, inner, mirrored, aspect, top)
        cache.solved[key] = found
    return key, found


def _vertex(end: End, n: int, n_in: int) -> int:
    child, port = end
    if child == IN:
        return n + port
    if child == OUT:
        return n + n_in + port
    return child


def _layout_level(
    group: Group,
    boxes: Sequence[tuple[float, float]],
    inner: list[Solved | None],
    mirrored: bool,
    aspect: float,
    top: bool,
) -> Solved:
    n, n_in, n_out = len(boxes), len(group.ins), len(group.outs)
    flat = [(_vertex(t, n, n_in), _vertex(h, n, n_in)) for t, h in group.edges]
    ports = [(8.0, 0.0)] * (n_in + n_out)
    firsts, lasts = range(n, n + n_in), range(n + n_in, n + n_in + n_out)

    def run(sideways: bool) -> Layering:
        sized = [(h, w) if sideways else (w, h) for w, h in boxes] + ports
        gap = 18.0 if any(inner) else 16.0
        return layered(
            [w for w, _ in sized],
            [h for _, h in sized],
            flat,
            first=firsts,
            last=lasts,
            gap_x=gap,
            gap_y=34.0 if sideways else 22.0,
        )

    plan = run(False)
    direction = TOP_DOWN
    if n > 2:
        upright = math.log(max(1.0, plan.width) / max(1.0, plan.height) / aspect)
        if (
            upright < -0.35
        ):  # much taller than wanted: a chain that would hang far down may lie better on its side
            other = run(True)
            lying = math.log(max(1.0, other.height) / max(1.0, other.width) / aspect)
            if abs(lying) + 0.15 < abs(upright):
                plan, direction = other, RIGHT_LEFT if mirrored else LEFT_RIGHT
    return _finish(plan, direction, boxes, inner, group, mirrored, top)


def _finish(
    plan: Layering,
    direction: str,
    boxes: Sequence[tuple[float, float]],
    inner: list[Solved | None],
    group: Group,
    mirrored: bool,
    top: bool,
) -> Solved:
    n, n_in = len(boxes), len(group.ins)
    sideways = direction != TOP_DOWN
    inset = 0.0 if top else PAD
    head = 0.0 if top else HEAD + PAD * 0.6
    w, h = (plan.height, plan.width) if sideways else (plan.width, plan.height)

    def spot(x: float, y: float) -> tuple[float, float]:
        if direction == LEFT_RIGHT:
            x, y = y, x
        elif direction == RIGHT_LEFT:
            x, y = w - y, x
        return x + inset, y + head

    full_w, full_h = w + 2 * inset, h + head + inset
    tangent = _TANGENT[direction]
    centre = [spot(plan.x[v], plan.y[v]) for v in range(len(plan.x))]
    corner = [(cx - bw / 2, cy - bh / 2) for (cx, cy), (bw, bh) in zip(centre, boxes)]

    def rim(v: int, entering: bool) -> Waypoint:
        x, y = centre[v]
        if direction == TOP_DOWN:
            return (x, 0.0 if entering else full_h, *tangent)
        left = entering == (direction == LEFT_RIGHT)
        return (0.0 if left else full_w, y, *tangent)

    ins = [rim(n + k, True) for k in range(n_in)]
    outs = [rim(n + n_in + k, False) for k in range(len(group.outs))]

    def attach(end: End, tail: bool) -> Waypoint:
        child, port = end
        if child == IN:
            return ins[port]
        if child == OUT:
            return outs[port]
        x, y = corner[child]
        sub = inner[child]
        if sub is not None and port != -1:
            turned = _turned(sub.direction, direction)
            if port >= 0:
                px, py, tx, ty = (sub.side_outs if turned else sub.outs)[port]
            else:
                px, py, tx, ty = (sub.side_ins if turned else sub.ins)[-2 - port]
            return (x + px, y + py, tx, ty)
        bw, bh = boxes[child]
        if direction == TOP_DOWN:
            return (x + bw / 2, y + (bh if tail else 0.0), *tangent)
        right = tail == (direction == LEFT_RIGHT)
        return (x + (bw if right else 0.0), y + bh / 2, *tangent)

    wires: list[list[Waypoint]] = []
    for tail, head_end in group.edges:
        pair = (_vertex(tail, n, n_in), _vertex(head_end, n, n_in))
        points = [attach(tail, True)]
        points.extend((*spot(x, y), *tangent) for x, y in plan.bends.get(pair, ()))
        points.append(attach(head_end, False))
        wires.append(points)
    side_ins, side_outs, side_wires = _side_ports(group, direction, mirrored, full_w, full_h, wires)
    return Solved(full_w, full_h, direction, corner, ins, outs, wires, inner, side_ins, side_outs, side_wires)


def _turned(inner: str, outer: str) -> bool:
    return (inner == TOP_DOWN) != (outer == TOP_DOWN)


def _side_ports(
    group: Group, direction: str, mirrored: bool, width: float, height: float, wires: list[list[Waypoint]]
) -> tuple[list[Waypoint], list[Waypoint], dict[int, list[Waypoint]]]:
    """Ports for a surrounding scope that flows across this one: level with the cards they belong to."""
    flow = _TANGENT[(RIGHT_LEFT if mirrored else LEFT_RIGHT) if direction == TOP_DOWN else TOP_DOWN]
    span = height if direction == TOP_DOWN else width
    low, high = (HEAD + 4.0, span - 6.0) if direction == TOP_DOWN else (8.0, span - 8.0)

    def place(count: int, ends: dict[int, list[Waypoint]], entering: bool) -> list[Waypoint]:
        wanted = []
        for k in range(count):
            near = [(p[1] if direction == TOP_DOWN else p[0]) for p in ends.get(k, ())]
            wanted.append(sum(near) / len(near) if near else span / 2)
        gap = min(7.0, (high - low) / max(1, count))
        at = [0.0] * count
        cursor = low
        order = sorted(range(count), key=lambda k: (wanted[k], k))
        for k in order:
            at[k] = cursor = max(cursor, min(wanted[k], high))
            cursor += gap
        over = max(0.0, cursor - gap - high) if count else 0.0
        out: list[Waypoint] = []
        for k in range(count):
            v = max(low, at[k] - over)
            if direction == TOP_DOWN:
                left = entering == (flow[0] > 0)
                out.append((0.0 if left else width, v, *flow))
            else:
                out.append((v, 0.0 if entering else height, *flow))
        return out

    heads: dict[int, list[Waypoint]] = {}
    tails: dict[int, list[Waypoint]] = {}
    for (tail, head), points in zip(group.edges, wires):
        if tail[0] == IN:
            heads.setdefault(tail[1], []).append(points[-1])
        if head[0] == OUT:
            tails.setdefault(head[1], []).append(points[0])
    side_ins, side_outs = place(len(group.ins), heads, True), place(len(group.outs), tails, False)
    side_wires: dict[int, list[Waypoint]] = {}
    for k, ((tail, head), points) in enumerate(zip(group.edges, wires)):
        if tail[0] == IN or head[0] == OUT:
            first = side_ins[tail[1]] if tail[0] == IN else points[0]
            last = side_outs[head[1]] if head[0] == OUT else points[-1]
            middle = points[1:-1] if tail[0] != IN and len(points) > 3 else []
            side_wires[k] = [first, *middle, last]
    return side_ins, side_outs, side_wires


def _place(
    group: Group,
    solved: Solved,
    ox: float,
    oy: float,
    turned: bool,
    sizes: dict[int, tuple[float, float]],
    out: CompoundLayout,
    wire_index: dict[tuple[int, int], int],
) -> None:
    out.directions[group.path] = solved.direction
    for k, own in enumerate(solved.wires):
        points = solved.side_wires.get(k, own) if turned else own
        wire_index[id(group), k] = len(out.wires)
        out.wires.append(Wire(-1, [(x + ox, y + oy, tx, ty) for x, y, tx, ty in points]))
    for child, (x, y), sub in zip(group.children, solved.corner, solved.children):
        if isinstance(child, Group):
            assert sub is not None
            out.groups[child.path] = (x + ox, y + oy, sub.width, sub.height)
            _place(
                child, sub, x + ox, y + oy, _turned(sub.direction, solved.direction), sizes, out, wire_index
            )
        else:
            w, h = sizes[child]
            out.items[child] = (x + ox, y + oy, w, h)
