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
from .outline import ABSORB_ABOVE, Outline, closed_groups, outline
from .scopes import Fold, Path, Placed, is_composite


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


def arrange(
    model: GraphModel, choices: Choices | None = None, budget: int = 140, tree: Outline | None = None
) -> Arrangement:
    """Decide the cards; about ``budget`` of them unless the user's choices ask for more. Deterministic."""
    choices = choices or Choices()
    tree = tree or outline(model, choices)
    builder = _Builder(model, tree.placed, closed_groups(tree, choices, budget), tree)
    builder.build()
    _merge_single_scopes(builder.items)
    return Arrangement(builder.items, builder.links, builder.item_of, tree.folds, tree.collapsible)


class _Builder:
    """Makes items and the edges between them."""

    def __init__(
        self, model: GraphModel, placed: Placed, closed: set[tuple[str, Path]], tree: Outline
    ) -> None:
        self.model, self.placed, self.closed, self.tree = model, placed, closed, tree
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
            _describe(item, ids, self.model, self._title(item), self._leaves(item.phase, item.group))

    def _title(self, it: Item) -> str:
        """What a collapsed scope is called: ``norm1 / layer_norm`` goes by the name the field knows."""
        if it.kind != "group":
            return ""
        path = it.group
        while True:
            m = self.tree.measure[it.phase, path]
            child = next(iter(m.children), None)
            if m.direct or len(m.children) != 1 or child is None or not is_composite(child[-1]):
                return path[-1]
            path = child

    def _leaves(self, phase: str, path: Path) -> int:
        """Innermost scopes below one: for the optimiser, the tensors it updates there. 0 when it has none below."""
        m = self.tree.measure.get((phase, path)) if path else None
        return sum(self._leaves(phase, c) or 1 for c in m.children) if m else 0

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
        if first.kind == "group" and self._absorbs(first, n):
            self.item_of[n.id] = first.index
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

    def _absorbs(self, card: Item, n: Node) -> bool:
        """Optimiser state belongs to the update that owns it; a scope of many parameters stands for them too."""
        if n.phase == OPTIMIZER:
            return n.size > 1
        if n.category != "parameter":
            return False
        return self.tree.measure[card.phase, card.group].all_pills > ABSORB_ABOVE

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


def _describe(it: Item, ids: list[int], model: GraphModel, title: str, tensors: int) -> None:
    """Label, detail line, category and size of a card."""
    nodes = model.nodes
    it.nodes = tuple(dict.fromkeys(ids))
    if it.kind == "group":
        own = [v for v in it.nodes if not nodes[v].is_source]
        it.nodes = tuple(sorted(it.nodes))
        it.head = max(own, default=it.nodes[-1])
        _describe_group(it, title, tensors, [nodes[v] for v in own], nodes[it.head], model)
    else:
        it.head = it.nodes[0]
        _describe_node(it, nodes[it.head], model)
    it.width = round(it.width)


def _describe_group(
    it: Item, name: str, tensors: int, own: list[Node], head: Node, model: GraphModel
) -> None:
    it.label = name if it.phase != GRADIENT else f"{name}′"
    it.detail = shape_text(head.shape) or "scalar"
    if it.phase == OPTIMIZER:
        it.category = "elementwise"
        if tensors:
            it.label, it.detail = "update", f"{tensors} tensor{'s' * (tensors != 1)}"
        else:
            it.detail = f"{len(own)} ops"
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
