"""What is shown of a graph: repeated blocks folded, composites collapsed, constants beside each of their users.

Pure: turns a :class:`GraphModel` and the user's open/closed choices into *items* (cards) and edges between them. Called
by ``scene``; the layout places the items. No pygame.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field

from .labels import composite_category, constant_text, node_label, shape_text, short_name
from .model import FORWARD, GRADIENT, OPTIMIZER, GraphModel, Node

Path = tuple[str, ...]

#: Up to this many visible nodes everything is shown; above it composites (softmax, layer_norm, ...) start collapsed,
#: above ``COLLAPSE_ALL_ABOVE`` every innermost scope does.
COLLAPSE_ABOVE = 90
COLLAPSE_ALL_ABOVE = 420
_COMPOSITE = re.compile(
    r"^(ln|(layer|rms|batch|group)?_?norm|(log_)?softmax|logsumexp|gelu|silu|swish|elu|selu|softplus|sigmoid|relu|"
    r"dropout|cross_entropy|mse(_loss)?|var|std|embedding|one_hot|clip_by.*|max_pool2d|avg_pool2d)(_?\d+|_f)?$"
)
#: Below this many computed nodes repeated blocks start unfolded.
FOLD_ABOVE = 260
CHUNK = 320  # a scope with more direct children than this is cut into numbered parts


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


@dataclass(slots=True)
class Fold:
    """Equal sibling scopes drawn once: ``stem x count``."""

    key: Path  # parent path + (display name,)
    members: tuple[Path, ...]


@dataclass
class Choices:
    """The user's open/closed state; survives a new arrangement."""

    opened: set[tuple[str, Path]] = field(default_factory=set)  # (phase, scope) forced open
    closed: set[tuple[str, Path]] = field(default_factory=set)  # forced closed
    unfolded: set[Path] = field(default_factory=set)
    fold_repeats: bool | None = None  # None: decide by size
    collapse: bool | None = None


@dataclass
class Arrangement:
    """Items and edges for the layout, and the way back from nodes to items."""

    items: list[Item]
    edges: dict[tuple[int, int], tuple[int, int]]  # (item, item) -> one (node, node) behind it
    item_of: list[int]  # node -> item (the first one, for copied constants)
    folds: dict[Path, Fold]
    collapsible: set[tuple[str, Path]]
    linear: list[int]  # item order of execution


_TRAILING = re.compile(r"[\[._-]?\d+\]?$")


def stem_of(name: str) -> str:
    """``block12`` -> ``block``, ``layers[3]`` -> ``layers``; the name itself when it carries no number."""
    return _TRAILING.sub("", name) or name


def arrange(model: GraphModel, choices: Choices | None = None) -> Arrangement:
    """Decide the cards. Deterministic in the graph and the choices."""
    choices = choices or Choices()
    nodes = model.nodes
    computed = sum(1 for n in nodes if not n.is_source and n.phase != OPTIMIZER)
    fold_on = choices.fold_repeats if choices.fold_repeats is not None else computed > FOLD_ABOVE
    scope = _home_scopes(model)
    folds = find_folds(model, scope) if fold_on else {}
    folds = {k: f for k, f in folds.items() if k not in choices.unfolded}
    shown, instance = _apply_folds(scope, folds)
    _chunk_flat(model, shown)
    closed, collapsible = _closed_groups(model, shown, choices, folds)
    return _build(model, shown, instance, closed, collapsible, folds)


def _home_scopes(model: GraphModel) -> list[Path]:
    """Scope path of every node, with unscoped nodes put beside what they compute with."""
    nodes = model.nodes
    scope: list[Path] = [n.scope for n in nodes]
    scoped = any(n.scope for n in nodes)
    _optimizer_scopes(model, scope)
    if not scoped:
        return scope
    for n in nodes:
        if not scope[n.id] and n.inputs and n.phase != OPTIMIZER:
            near = [scope[s] for s in n.inputs if not nodes[s].is_source and nodes[s].phase == n.phase and scope[s]]
            near += [scope[s] for s in n.inputs if not nodes[s].is_source and scope[s]]
            if near:
                scope[n.id] = near[-1][:1]
    for n in reversed(nodes):
        if not scope[n.id] and n.users and n.phase != OPTIMIZER:
            near = [u for u in n.users if nodes[u].phase == n.phase and scope[u]] or [u for u in n.users if scope[u]]
            if near:
                scope[n.id] = scope[min(near)] if n.is_source else scope[min(near)][:1]
    return scope


def _optimizer_scopes(model: GraphModel, scope: list[Path]) -> None:
    """One scope per updated parameter, named after it; shared scalars stay in the scope ``shared``."""
    nodes = model.nodes
    parent: dict[int, int] = {}

    def find(v: int) -> int:
        while parent[v] != v:
            parent[v] = parent[parent[v]]
            v = parent[v]
        return v

    update = [n for n in nodes if n.phase == OPTIMIZER and not n.is_source]
    if not update:
        return
    for n in update:  # join through tensors, never through scalars (learning rate, step count, global norm)
        if n.size == 1 and len(n.users) != 1:
            continue
        for s in n.inputs:
            if nodes[s].size > 1 or (not nodes[s].is_source and len(nodes[s].users) == 1):
                for v in (n.id, s):
                    parent.setdefault(v, v)
                parent[find(n.id)] = find(s)
    members: dict[int, list[Node]] = defaultdict(list)
    for v in parent:
        members[find(v)].append(nodes[v])
    name_of: dict[int, str] = {}
    taken: Counter[str] = Counter()
    for root, group in sorted(members.items(), key=lambda kv: min(n.id for n in kv[1])):
        group.sort(key=lambda n: n.id)
        named = [n for n in group if n.op == "input" and n.name]
        forward = [n for n in named if any(nodes[u].phase == FORWARD for u in n.users)]
        label = short_name((forward or named or group)[0].name or "update", parts=3)
        taken[label] += 1
        name_of[root] = label if taken[label] == 1 else f"{label} ({taken[label]})"
    for n in update:
        scope[n.id] = (name_of[find(n.id)],) if n.id in parent else ("shared",)
    for n in reversed(nodes):
        if n.is_source and n.phase == OPTIMIZER and n.users:
            scope[n.id] = scope[n.users[0]]


def find_folds(model: GraphModel, scope: list[Path]) -> dict[Path, Fold]:
    """Runs of three or more sibling scopes with the same forward structure."""
    members: dict[Path, list[tuple[str, tuple[int, ...], Path]]] = defaultdict(list)
    for n in model.nodes:
        if n.phase == FORWARD and not n.is_source:
            path = scope[n.id]
            for i in range(len(path)):
                members[path[: i + 1]].append((n.op, n.shape, path[i + 1 :]))
    siblings: dict[tuple[Path, str], list[Path]] = defaultdict(list)
    for path in members:
        if stem_of(path[-1]) != path[-1]:
            siblings[path[:-1], stem_of(path[-1])].append(path)
    out: dict[Path, Fold] = {}
    for (parent, stem), paths in siblings.items():
        alike: dict[int, list[Path]] = defaultdict(list)
        for p in paths:
            alike[hash(tuple(sorted(members[p])))].append(p)
        for group in alike.values():
            if len(group) >= 3:
                key = (*parent, f"{stem} × {len(group)}")
                out[key] = Fold(key, tuple(group))
    # a fold inside a folded block would be counted twice: keep the outermost
    inside = {m for f in out.values() for m in f.members}
    return {k: f for k, f in out.items() if not any(k[:i] in inside for i in range(1, len(k)))}


def _apply_folds(scope: list[Path], folds: dict[Path, Fold]) -> tuple[list[Path], list[int]]:
    """Paths with block numbers replaced by the fold's name, and which block each node came from (-1: none)."""
    where: dict[Path, tuple[Path, int]] = {}
    for fold in folds.values():
        for k, member in enumerate(fold.members):
            where[member] = (fold.key, k)
    shown: list[Path] = []
    instance: list[int] = []
    for path in scope:
        new, inst = path, -1
        for i in range(len(path)):
            hit = where.get(path[: i + 1])
            if hit:
                new, inst = (*hit[0], *path[i + 1 :]), hit[1]
                break
        shown.append(new)
        instance.append(inst)
    return shown, instance


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
    for n in reversed(model.nodes):
        if n.is_source and n.users:
            shown[n.id] = shown[min(n.users)] if n.phase != OPTIMIZER else shown[n.id]


def _closed_groups(
    model: GraphModel, shown: list[Path], choices: Choices, folds: dict[Path, Fold]
) -> tuple[set[tuple[str, Path]], set[tuple[str, Path]]]:
    """Which scopes start as one card, and which could be."""
    count: Counter[tuple[str, Path]] = Counter()
    parents: set[tuple[str, Path]] = set()
    for n in model.nodes:
        if n.is_source:
            continue
        path = shown[n.id]
        for i in range(1, len(path) + 1):
            count[n.phase, path[:i]] += 1
            if i > 1:
                parents.add((n.phase, path[: i - 1]))
    for phase, path in list(count):
        copies = max((len(f.members) for k, f in folds.items() if path[: len(k)] == k), default=1)
        count[phase, path] //= copies
    visible = sum(c for (phase, path), c in count.items() if len(path) == 1 and phase != OPTIMIZER)
    collapsible = {g for g, c in count.items() if c > 1}
    closed: set[tuple[str, Path]] = set()
    if choices.collapse is not False:
        forced = choices.collapse is True
        for g in collapsible:
            phase, path = g
            leaf = g not in parents and not path[-1].startswith("ops ")
            if not leaf:
                continue
            if phase == OPTIMIZER:
                closed.add(g)
            elif _COMPOSITE.match(path[-1]):
                if forced or visible > COLLAPSE_ABOVE:
                    closed.add(g)
            elif (forced or visible > COLLAPSE_ALL_ABOVE) and len(path) > 1:
                closed.add(g)
    closed |= choices.closed & collapsible
    closed -= choices.opened
    return closed, collapsible


def _build(
    model: GraphModel,
    shown: list[Path],
    instance: list[int],
    closed: set[tuple[str, Path]],
    collapsible: set[tuple[str, Path]],
    folds: dict[Path, Fold],
) -> Arrangement:
    nodes = model.nodes
    items: list[Item] = []
    item_of = [-1] * len(nodes)
    slot: dict[object, int] = {}
    behind: list[list[int]] = []
    occurrence: Counter[object] = Counter()

    def closed_prefix(phase: str, path: Path) -> Path | None:
        for i in range(1, len(path) + 1):
            if (phase, path[:i]) in closed:
                return path[:i]
        return None

    def new_item(key: object, n: Node, kind: str, path: Path, group: Path = ()) -> int:
        i = slot.get(key)
        if i is None:
            i = slot[key] = len(items)
            items.append(Item(i, kind, (), n.id, n.phase, path, "", "", n.category, 0, 0, group))
            behind.append([])
        behind[i].append(n.id)
        return i

    for n in nodes:
        if n.is_source:
            continue
        path = shown[n.id]
        group = closed_prefix(n.phase, path)
        if group is not None:
            item_of[n.id] = new_item((n.phase, group), n, "group", group[:-1] or group, group)
        elif instance[n.id] >= 0:
            base = (n.phase, path, n.op, n.shape)
            k = occurrence[base, instance[n.id]]
            occurrence[base, instance[n.id]] += 1
            item_of[n.id] = new_item((base, k), n, "node", path)
        else:
            item_of[n.id] = new_item(n.id, n, "node", path)
    links: dict[tuple[int, int], tuple[int, int]] = {}
    for n in nodes:
        if n.is_source:
            _place_source(n, nodes, shown, instance, items, item_of, occurrence, new_item, links)
    for n in nodes:
        if n.is_source:
            continue
        b = item_of[n.id]
        for s in n.inputs:
            if nodes[s].is_source:
                continue
            a = item_of[s]
            if a == b:
                continue
            other = instance[s] >= 0 and instance[n.id] >= 0 and instance[s] != instance[n.id]
            if other and shown[s][:1] == shown[n.id][:1]:
                continue  # from one repeat of a block to the next: the fold's name says it
            links.setdefault((a, b), (s, n.id))
    for it, ids in zip(items, behind):
        _describe(it, ids, model)
    linear = sorted(range(len(items)), key=lambda i: items[i].nodes[0])
    return Arrangement(items, links, item_of, folds, collapsible, linear)


def _place_source(n, nodes, shown, instance, items, item_of, occurrence, new_item, links) -> None:  # type: ignore[no-untyped-def]
    """Inputs beside their first user; constants beside every user (absorbed by a collapsed one)."""
    if not n.users:
        item_of[n.id] = new_item(n.id, n, "node", shown[n.id])
        return
    users = sorted(n.users, key=lambda u: (nodes[u].phase != n.phase, u))
    if n.category != "constant":
        first = items[item_of[users[0]]]
        home = first.path
        key: object = n.id
        if instance[users[0]] >= 0:
            base = (n.phase, home, first.index, n.op, n.shape, _input_stem(n.name))
            k = occurrence[base, instance[users[0]]]
            occurrence[base, instance[users[0]]] += 1
            key = (base, k)
        i = item_of[n.id] = new_item(key, n, "node", home)
        for u in users:
            j = item_of[u]
            # a repeat's own input feeds that repeat only; drawn from the folded card it feeds the folded users
            if j != i:
                links.setdefault((i, j), (n.id, u))
        return
    scalar = n.size == 1
    for u in users:
        j = item_of[u]
        user = items[j]
        if user.kind == "group":
            if item_of[n.id] < 0:
                item_of[n.id] = j
            continue
        key = ("const", n.id if instance[u] < 0 else _constant_key(n), user.path, j if scalar else -1, user.phase)
        i = new_item(key, n, "node", user.path)
        items[i].phase = user.phase
        if item_of[n.id] < 0 or items[item_of[n.id]].kind == "group":
            item_of[n.id] = i
        links.setdefault((i, j), (n.id, u))


def _constant_key(n: Node) -> object:
    return (n.op, n.shape, n.dtype, repr(n.attrs))


def _input_stem(name: str) -> str:
    return re.sub(r"\d+", "#", name)


def _describe(it: Item, ids: list[int], model: GraphModel) -> None:
    """Label, detail line, category and size of a card."""
    nodes = model.nodes
    it.nodes = tuple(dict.fromkeys(ids))
    it.head = it.nodes[-1] if it.kind == "group" else it.nodes[0]
    head = nodes[it.head]
    if it.kind == "group":
        name = it.group[-1]
        it.label = name if it.phase != GRADIENT else f"{name}′"
        own = [nodes[v] for v in it.nodes if not nodes[v].is_source]
        if it.phase == OPTIMIZER:
            it.label = name
            it.detail = f"{len(own)} ops" if name == "shared" else f"update · {len(own)} ops"
            it.category = "elementwise"
        else:
            it.detail = shape_text(head.shape) or "scalar"
            it.category = composite_category(name, [n.category for n in own], model.ops)
        it.width, it.height = max(104.0, 7.9 * len(it.label) + 26, 5.8 * len(it.detail) + 22), 42.0
        return
    it.copies = len(it.nodes)
    it.category = head.category
    if head.category == "constant":
        it.label, it.detail = constant_text(head), ""
        it.width, it.height = max(58.0, 6.6 * len(it.label) + 30), 30.0
    elif head.category in ("parameter", "input"):
        it.label, it.detail = short_name(head.name) or "input", shape_text(head.shape)
        base, height = (78.0, 32.0) if head.category == "parameter" else (96.0, 40.0)
        it.width = max(base, 7.4 * len(it.label) + 28, 5.4 * len(it.detail) + 28)
        it.height = height
    else:
        it.label, it.detail = node_label(head), shape_text(head.shape) or "scalar"
        if model.loss == it.head:
            it.label = f"{it.label} → loss"
        it.width, it.height = max(104.0, 7.9 * len(it.label) + 26, 5.8 * len(it.detail) + 22), 42.0
    it.width = round(it.width)
