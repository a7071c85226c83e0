"""What is shown of a graph: repeated blocks folded, composites collapsed, constants beside each of their users.

Pure: turns a :class:`GraphModel` and the user's open/closed choices into *items* (cards) and edges between them. Called
by ``scene``; the layout places the items. No pygame.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field

from .labels import composite_category, constant_text, node_label, shape_text, short_name
from .model import GRADIENT, OPTIMIZER, GraphModel, Node
from .scopes import SHARED, Fold, Path, Placed, apply_folds, find_folds, home_scopes, optimizer_scopes

#: Up to this many visible nodes everything is shown; above it composites (softmax, layer_norm, ...) start collapsed,
#: above ``COLLAPSE_ALL_ABOVE`` every innermost scope does.
COLLAPSE_ABOVE = 40
COLLAPSE_ALL_ABOVE = 420
#: Below this many computed nodes repeated blocks start unfolded.
FOLD_ABOVE = 260
CHUNK = 320  # a scope with more direct children than this is cut into numbered parts

_COMPOSITE = re.compile(
    r"^(ln|(layer|rms|batch|group)?_?norm|(log_)?softmax|logsumexp|gelu|silu|swish|elu|selu|softplus|sigmoid|relu|"
    r"dropout|cross_entropy|mse(_loss)?|mean|var|std|embedding|one_hot|clip_by.*|max_pool2d|avg_pool2d)"
    r"(_?\d+|_f)?( #\d+)?$"
)


@dataclass(slots=True)
class Item:
    """One card on the page: a node, or a collapsed scope, possibly standing for several equal ones."""

    index: int
    kind: str  # "node" | "group"
    nodes: tuple[int, ...]
    head: int  # the node that names it: the only node, or the last of a group
    phase: str
    path: Path  # scopes it is drawn inside, outermost first
    label: str
    detail: str
    category: str
    width: float
    height: float
    group: Path = ()  # the scope a "group" item stands for
    copies: int = 1  # how many equal nodes it stands for

    @property
    def order(self) -> int:
        """Position in execution order: its first node."""
        return self.nodes[0]


@dataclass
class Choices:
    """The user's open/closed state; survives a new arrangement. None means: decide by size."""

    opened: set[tuple[str, Path]] = field(default_factory=set)  # (phase, scope) forced open
    closed: set[tuple[str, Path]] = field(default_factory=set)  # forced closed
    fold_repeats: bool | None = None
    collapse: bool | None = None


@dataclass
class Arrangement:
    """Items and edges for the layout, and the way back from nodes to items."""

    items: list[Item]
    edges: dict[tuple[int, int], tuple[int, int]]  # (item, item) -> one (node, node) behind it
    item_of: list[int]  # node -> item (the first one, for copied constants)
    folds: dict[Path, Fold]
    collapsible: set[tuple[str, Path]]


def arrange(model: GraphModel, choices: Choices | None = None) -> Arrangement:
    """Decide the cards. Deterministic in the graph and the choices."""
    choices = choices or Choices()
    computed = sum(1 for n in model.nodes if not n.is_source and n.phase != OPTIMIZER)
    fold_on = choices.fold_repeats if choices.fold_repeats is not None else computed > FOLD_ABOVE
    scope = home_scopes(model)
    folds = find_folds(model, scope) if fold_on else {}
    placed = apply_folds(model, scope, folds)
    optimizer_scopes(model, placed)
    _chunk_flat(model, placed.shown)
    closed, collapsible = _closed_groups(model, placed, choices)
    builder = _Builder(model, placed, closed)
    builder.build()
    _merge_single_scopes(builder.items)
    return Arrangement(builder.items, builder.links, builder.item_of, folds, collapsible)


def _chunk_flat(model: GraphModel, shown: list[Path]) -> None:
    """Cut scopes with too many direct nodes into numbered parts, in execution order."""
    direct: dict[tuple[str, Path], list[int]] = defaultdict(list)
    for n in model.nodes:
        if not n.is_source:
            direct[n.phase, shown[n.id]].append(n.id)
    for (_, path), ids in direct.items():
        if len(ids) > CHUNK:
            for k, v in enumerate(ids):
                a = k // CHUNK * CHUNK
                shown[v] = (*path, f"ops {a + 1}–{min(a + CHUNK, len(ids))}")


def _closed_groups(
    model: GraphModel, placed: Placed, choices: Choices
) -> tuple[set[tuple[str, Path]], set[tuple[str, Path]]]:
    """Which scopes start as one card, and which could be."""
    seen: dict[tuple[str, Path], set[object]] = defaultdict(set)
    parents: set[tuple[str, Path]] = set()
    for n in model.nodes:
        if n.is_source:
            continue
        path = placed.shown[n.id]
        key = placed.merge[n.id]
        for i in range(1, len(path) + 1):
            seen[n.phase, path[:i]].add(n.id if key is None else key)
            if i > 1:
                parents.add((n.phase, path[: i - 1]))
    count = {g: len(keys) for g, keys in seen.items()}
    visible = sum(c for (phase, path), c in count.items() if len(path) == 1 and phase != OPTIMIZER)
    collapsible = {g for g, c in count.items() if c > 1}
    closed: set[tuple[str, Path]] = set()
    if choices.collapse is not False:
        forced = choices.collapse is True
        for g in collapsible:
            phase, path = g
            if g in parents and not _COMPOSITE.match(path[-1]):
                continue
            if path[-1].startswith("ops "):
                continue
            if phase == OPTIMIZER:
                if count[g] > 2:
                    closed.add(g)
            elif _COMPOSITE.match(path[-1]):
                if forced or visible > COLLAPSE_ABOVE:
                    closed.add(g)
            elif (forced or visible > COLLAPSE_ALL_ABOVE) and len(path) > 1:
                closed.add(g)
    closed |= choices.closed & collapsible
    closed -= choices.opened
    return closed, collapsible


class _Builder:
    """Makes items and the edges between them."""

    def __init__(self, model: GraphModel, placed: Placed, closed: set[tuple[str, Path]]) -> None:
        self.model, self.placed, self.closed = model, placed, closed
        self.items: list[Item] = []
        self.behind: list[list[int]] = []
        self.item_of = [-1] * len(model.nodes)
        self.links: dict[tuple[int, int], tuple[int, int]] = {}
        self._slot: dict[object, int] = {}
        self._occurrence: Counter[object] = Counter()

    def build(self) -> None:
        """Computed nodes first, then what they read, then the edges, then the words."""
        nodes, placed = self.model.nodes, self.placed
        for n in nodes:
            if n.is_source:
                continue
            path = placed.shown[n.id]
            group = self._closed_prefix(n.phase, path)
            key: object
            if group is not None:
                key = (n.phase, group)
                self.item_of[n.id] = self._item(
                    key, n, "group", group[:-1] or (() if n.phase == OPTIMIZER else group), group
                )
            else:
                key = n.id if placed.merge[n.id] is None else placed.merge[n.id]
                self.item_of[n.id] = self._item(key, n, "node", path)
        for n in reversed(nodes):  # a view of a constant is placed before the constant behind it
            if n.is_source:
                self._place_source(n)
        for n in nodes:
            if not n.is_source:
                self._connect(n)
        for item, ids in zip(self.items, self.behind):
            _describe(item, ids, self.model)

    def _closed_prefix(self, phase: str, path: Path) -> Path | None:
        for i in range(1, len(path) + 1):
            if (phase, path[:i]) in self.closed:
                return path[:i]
        return None

    def _item(self, key: object, n: Node, kind: str, path: Path, group: Path = ()) -> int:
        i = self._slot.get(key)
        if i is None:
            i = self._slot[key] = len(self.items)
            self.items.append(Item(i, kind, (), n.id, n.phase, path, "", "", n.category, 0, 0, group))
            self.behind.append([])
        self.behind[i].append(n.id)
        return i

    def _connect(self, n: Node) -> None:
        nodes, member, shown = self.model.nodes, self.placed.member, self.placed.shown
        b = self.item_of[n.id]
        for s in n.inputs:
            a = self.item_of[s]
            if nodes[s].is_source or a == b:
                continue
            if member[s] >= 0 and member[n.id] >= 0 and member[s] != member[n.id]:
                if nodes[s].phase != n.phase or shown[s][:1] == shown[n.id][:1]:
                    continue  # from one repeat of a block to the next: the fold's name says it
            self.links.setdefault((a, b), (s, n.id))

    def _place_source(self, n: Node) -> None:
        """Inputs beside their first user; constants beside every user (absorbed by a collapsed one)."""
        nodes, placed = self.model.nodes, self.placed
        users = [u for u in n.users if not nodes[u].is_source]
        if not users:
            views = [u for u in n.users if self.item_of[u] >= 0]
            if views:  # only its views are used: they stand for it
                i = self.item_of[n.id] = self.item_of[views[0]]
                self.behind[i].append(n.id)
            else:
                self.item_of[n.id] = self._item(n.id, n, "node", placed.shown[n.id])
            return
        users.sort(key=lambda u: (nodes[u].phase != n.phase, u))
        if n.category == "constant":
            self._place_constant(n, users)
            return
        first = self.items[self.item_of[users[0]]]
        if n.phase == OPTIMIZER and first.kind == "group" and n.size > 1:
            self.item_of[n.id] = first.index  # optimiser state belongs to the update that owns it
            self.behind[first.index].append(n.id)
            return
        home = first.path if first.kind == "node" or first.path != first.group else first.group
        key: object = n.id
        repeat = placed.member[users[0]]
        if repeat >= 0:
            base = (n.phase, home, first.index, n.op, n.shape, re.sub(r"\d+", "#", n.name))
            k = self._occurrence[base, repeat]
            self._occurrence[base, repeat] += 1
            key = (base, k)
        i = self.item_of[n.id] = self._item(key, n, "node", home)
        for u in users:
            if self.item_of[u] != i:
                self.links.setdefault((i, self.item_of[u]), (n.id, u))

    def _place_constant(self, n: Node, users: list[int]) -> None:
        root = self.model.nodes[n.constant if n.constant is not None else n.id]
        value = (root.op, root.shape, root.dtype, repr(root.attrs), n.op, n.shape)
        for u in users:
            j = self.item_of[u]
            user = self.items[j]
            if user.kind == "group":
                if self.item_of[n.id] < 0:
                    self.item_of[n.id] = j
                    self.behind[j].append(n.id)
                continue
            beside = j if root.size == 1 else -1
            i = self._item(("const", value, user.path, beside, user.phase), n, "node", user.path)
            self.items[i].phase = user.phase
            if self.item_of[n.id] < 0 or self.items[self.item_of[n.id]].kind == "group":
                self.item_of[n.id] = i
            self.links.setdefault((i, j), (n.id, u))


def _merge_single_scopes(items: list[Item]) -> None:
    """A scope that holds nothing but one scope is drawn as one frame: ``qkv / linear`` becomes ``qkv``."""
    while True:
        direct: set[tuple[str, Path]] = set()
        children: dict[tuple[str, Path], set[Path]] = defaultdict(set)
        for it in items:
            if it.path:
                direct.add((it.phase, it.path))
                for i in range(1, len(it.path)):
                    children[it.phase, it.path[:i]].add(it.path[: i + 1])
        single = {
            (p, next(iter(kids)))
            for (p, path), kids in children.items()
            if len(kids) == 1 and (p, path) not in direct
        }
        if not single:
            return
        for it in items:
            for i in range(len(it.path), 1, -1):
                if (it.phase, it.path[:i]) in single:
                    it.path = (*it.path[: i - 1], *it.path[i:])


def _describe(it: Item, ids: list[int], model: GraphModel) -> None:
    """Label, detail line, category and size of a card."""
    nodes = model.nodes
    it.nodes = tuple(dict.fromkeys(ids))
    if it.kind == "group":
        own = [v for v in it.nodes if not nodes[v].is_source]
        it.nodes = tuple(sorted(it.nodes))
        it.head = max(own, default=it.nodes[-1])
        _describe_group(it, [nodes[v] for v in own], nodes[it.head], model)
    else:
        it.head = it.nodes[0]
        _describe_node(it, nodes[it.head], model)
    it.width = round(it.width)


def _describe_group(it: Item, own: list[Node], head: Node, model: GraphModel) -> None:
    name = it.group[-1]
    it.label = name if it.phase != GRADIENT else f"{name}′"
    it.detail = shape_text(head.shape) or "scalar"
    if it.phase == OPTIMIZER:
        it.label = name
        it.detail = f"{len(own)} ops" if name == SHARED else f"update · {len(own)} ops"
        it.category = "elementwise"
    else:
        it.category = composite_category(name.partition(" #")[0], [n.category for n in own], model.ops)
    if model.loss is not None and model.loss in it.nodes:
        it.label, it.category = f"{it.label} → loss", "loss"
    it.width, it.height = max(104.0, 7.9 * len(it.label) + 26, 5.8 * len(it.detail) + 22), 42.0


def _describe_node(it: Item, head: Node, model: GraphModel) -> None:
    it.copies = len(it.nodes)
    it.category = head.category
    if head.category == "constant":
        it.copies = 1
        it.label, it.detail = (
            constant_text(model.nodes[head.constant if head.constant is not None else head.id]),
            "",
        )
        it.width, it.height = max(58.0, 6.6 * len(it.label) + 30), 30.0
    elif head.category in ("parameter", "input"):
        it.label, it.detail = short_name(head.name) or "input", shape_text(head.shape)
        base, it.height = (78.0, 32.0) if head.category == "parameter" else (96.0, 40.0)
        it.width = max(base, 7.4 * len(it.label) + 28, 5.4 * len(it.detail) + 28)
    else:
        it.label, it.detail = node_label(head), shape_text(head.shape) or "scalar"
        if model.loss == it.head:
            it.label = f"{it.label} → loss"
        it.width, it.height = max(104.0, 7.9 * len(it.label) + 26, 5.8 * len(it.detail) + 22), 42.0
