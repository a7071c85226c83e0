"""Where each node belongs before anything is folded or collapsed: its scope path, tidied.

Traces reuse scope names (two calls of ``nn.linear`` are both in ``linear``), leave residual additions unscoped and put
every optimiser node under ``optimizer``. Here calls become instances, loose nodes join their neighbours, updates are
named after their parameter and repeated blocks are found. Called by ``fold``. Pure; no pygame.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from difflib import SequenceMatcher

from .labels import short_name, short_stem
from .model import FORWARD, GRADIENT, OPTIMIZER, GraphModel, Node

Path = tuple[str, ...]

SHARED = "shared scalars"
ALIKE = 0.8  # two blocks are repeats when this part of their forward ops agree

_COMPOSITE = re.compile(
    r"^(ln|(layer|rms|batch|group)?_?norm|(log_)?softmax|logsumexp|gelu|silu|swish|elu|selu|softplus|sigmoid|relu|"
    r"dropout|cross_entropy|mse(_loss)?|mean|var|std|embedding|one_hot|clip_by.*|max_pool2d|avg_pool2d|linear|"
    r"conv[123]d)(_?\d+|_f)?( #\d+)?$"
)
_TRAILING = re.compile(r"[\[._-]?\d+\]?$")


@dataclass(slots=True)
class Fold:
    """Equal sibling scopes drawn once: ``stem x count``."""

    key: Path  # parent path + (display name,)
    members: tuple[Path, ...]


def stem_of(name: str) -> str:
    """``block12`` -> ``block``, ``layers[3]`` -> ``layers``; the name itself when it carries no number."""
    return name if "#" in name else _TRAILING.sub("", name) or name


def is_composite(name: str) -> bool:
    """True for scopes that have a name of their own in the field: read as one operation, opened only on demand."""
    return bool(_COMPOSITE.match(name))


def home_scopes(model: GraphModel) -> list[Path]:
    """Scope path of every forward and gradient node."""
    nodes = model.nodes
    scope: list[Path] = [n.scope for n in nodes]
    if not any(n.scope for n in nodes if n.phase != OPTIMIZER):
        return scope
    split_instances(model, scope)
    for n in nodes:
        if not scope[n.id] and not n.is_source and n.phase != OPTIMIZER:
            read = [s for s in n.inputs if not nodes[s].is_source and scope[s]]
            near = [s for s in read if nodes[s].phase == n.phase] or read
            if near:
                scope[n.id] = _beside(scope[near[-1]])
    for n in reversed(nodes):
        if not scope[n.id] and n.users and n.phase != OPTIMIZER:
            named = [u for u in n.users if scope[u] and nodes[u].phase != OPTIMIZER]
            near = [u for u in named if nodes[u].phase == n.phase] or named
            if near:
                scope[n.id] = scope[min(near)] if n.is_source else _beside(scope[min(near)])
    return scope


def _beside(scope: Path) -> Path:
    """Where a node without a scope goes: into the layer next to it, but never into a ``relu`` or ``softmax``."""
    return () if not scope or is_composite(scope[0]) else scope[:1]


def split_instances(model: GraphModel, scope: list[Path]) -> None:
    """Separate the calls that share a scope name: ``linear``, ``linear #2``, ... in execution order.

    A later run of a scope is a new call when it reads nothing of the earlier ones.
    """
    nodes = model.nodes
    order = [n.id for n in nodes if n.phase == FORWARD and not n.is_source]
    depth = max((len(scope[v]) for v in order), default=0)
    for d in range(depth):
        runs: dict[Path, list[list[int]]] = defaultdict(list)
        last: Path | None = None
        for v in order:
            prefix = scope[v][: d + 1] if len(scope[v]) > d else None
            if prefix is not None:
                if prefix != last:
                    runs[prefix].append([])
                runs[prefix][-1].append(v)
            last = prefix
        for prefix, parts in runs.items():
            calls = [set(parts[0])]
            for part in parts[1:]:
                reads = {s for v in part for s in nodes[v].inputs}
                joined = next((k for k in range(len(calls) - 1, -1, -1) if reads & calls[k]), None)
                if joined is None:
                    joined = len(calls)
                    calls.append(set())
                calls[joined] |= set(part)
                if joined:
                    for v in part:
                        scope[v] = (*prefix[:-1], f"{prefix[-1]} #{joined + 1}", *scope[v][d + 1 :])
    for n in nodes:
        if n.phase == GRADIENT and n.grad_of is not None and n.scope == nodes[n.grad_of].scope:
            scope[n.id] = scope[n.grad_of]


def find_folds(model: GraphModel, scope: list[Path]) -> dict[Path, Fold]:
    """Runs of three or more numbered sibling scopes with nearly the same forward operations."""
    content: dict[Path, Counter[tuple[str, tuple[int, ...], Path]]] = defaultdict(Counter)
    for n in model.nodes:
        if n.phase == FORWARD and not n.is_source:
            path = scope[n.id]
            for i in range(len(path)):
                if stem_of(path[i]) != path[i]:
                    content[path[: i + 1]][n.op, n.shape, path[i + 1 :]] += 1
    siblings: dict[tuple[Path, str], list[Path]] = defaultdict(list)
    for path in content:
        siblings[path[:-1], stem_of(path[-1])].append(path)
    out: dict[Path, Fold] = {}
    for (parent, stem), paths in siblings.items():
        rest = paths
        while len(rest) >= 3:
            reference = rest[len(rest) // 2]
            total = sum(content[reference].values())
            same = [
                p
                for p in rest
                if sum((content[p] & content[reference]).values())
                >= ALIKE * max(total, sum(content[p].values()))
            ]
            if len(same) >= 3:
                key = (*parent, f"{stem} × {len(same)}")
                out[key] = Fold(key, tuple(same))
            rest = [p for p in rest if p not in same]
    inside = {m for f in out.values() for m in f.members}  # a fold within a folded block: keep the outer one
    return {k: f for k, f in out.items() if not any(k[:i] in inside for i in range(1, len(k)))}


@dataclass(slots=True)
class Placed:
    """Scope paths as shown, and for each node of a folded block which drawn node it belongs to (None: itself)."""

    shown: list[Path]
    merge: list[object | None]
    member: list[int]  # which repeat it came from, -1 outside folds


def apply_folds(model: GraphModel, scope: list[Path], folds: dict[Path, Fold]) -> Placed:
    """Draw the members of a fold over each other: nodes are matched in sequence, what matches nothing stays itself."""
    where: dict[Path, tuple[Fold, int]] = {}
    for fold in folds.values():
        for k, path in enumerate(fold.members):
            where[path] = (fold, k)
    n = len(scope)
    placed = Placed(list(scope), [None] * n, [-1] * n)
    sequences: dict[tuple[Path, str], list[list[int]]] = {}
    for node in model.nodes:
        path = scope[node.id]
        for i in range(1, len(path) + 1):
            hit = where.get(path[:i])
            if hit is not None:
                fold, k = hit
                placed.shown[node.id] = (*fold.key, *path[i:])
                placed.member[node.id] = k
                if not node.is_source:
                    lists = sequences.setdefault((fold.key, node.phase), [[] for _ in fold.members])
                    lists[k].append(node.id)
                break
    for (name, phase), members in sequences.items():
        if phase == GRADIENT:
            _match_gradients(model, placed, name, members)
        else:
            _match_sequences(model, placed, (name, phase), members)
    return placed


def _match_sequences(model: GraphModel, placed: Placed, key: object, members: list[list[int]]) -> None:
    """Forward nodes: align each repeat with the longest one, operation by operation."""
    tokens = [[(model.nodes[v].op, model.nodes[v].shape, placed.shown[v]) for v in m] for m in members]
    ref = max(range(len(members)), key=lambda k: (len(members[k]), -k))
    for k, ids in enumerate(members):
        if tokens[k] == tokens[ref]:
            for j, v in enumerate(ids):
                placed.merge[v] = (key, j)
            continue
        matcher = SequenceMatcher(None, tokens[ref], tokens[k], autojunk=False)
        for block in matcher.get_matching_blocks():
            for j in range(block.size):
                placed.merge[ids[block.b + j]] = (key, block.a + j)


def _match_gradients(model: GraphModel, placed: Placed, key: object, members: list[list[int]]) -> None:
    """Gradient nodes: equal when they are the same operation in the gradient of matched forward nodes."""
    for ids in members:
        count: Counter[object] = Counter()
        for v in ids:
            n = model.nodes[v]
            of = placed.merge[n.grad_of] if n.grad_of is not None else None
            token = (key, placed.shown[v], n.op, n.shape, of)
            placed.merge[v] = ("grad", token, count[token])
            count[token] += 1


def optimizer_scopes(model: GraphModel, placed: Placed) -> None:
    """Updates go under the scope whose parameter they change, then under its name: ``block0 / attn / q.weight``.

    What serves all updates (learning rate schedule, global norm, step count) keeps the name of its own scope. Updates of
    the parameters of folded blocks are folded with them.
    """
    nodes = model.nodes
    update = [n for n in nodes if n.phase == OPTIMIZER and not n.is_source]
    if not update:
        return
    shared = _shared_by_updates(model)
    parent: dict[int, int] = {}

    def find(v: int) -> int:
        while parent[v] != v:
            parent[v] = parent[parent[v]]
            v = parent[v]
        return v

    for n in update:  # join through tensors, never through scalars (learning rate, step count, global norm)
        if shared[n.id]:
            continue
        parent.setdefault(n.id, n.id)
        for s in n.inputs:
            if not shared[s]:
                parent.setdefault(s, s)
                parent[find(n.id)] = find(s)
    groups: dict[int, list[Node]] = defaultdict(list)
    for v in parent:
        groups[find(v)].append(nodes[v])
    taken: Counter[Path] = Counter()
    label_of: dict[int, tuple[Path, int, int]] = {}  # root -> (path, repeat, number of the group)
    for number, (root, group) in enumerate(sorted(groups.items(), key=lambda kv: min(n.id for n in kv[1]))):
        group.sort(key=lambda n: n.id)
        named = [n for n in group if n.op == "input" and n.name]
        forward = [n for n in named if any(nodes[u].phase == FORWARD for u in n.users)]
        chosen = (forward or named or group)[0]
        first = min((u for u in chosen.users if nodes[u].phase == FORWARD), default=None)
        home = placed.shown[first][:2] if first is not None else ()
        repeat = placed.member[first] if first is not None else -1
        if repeat >= 0:
            label_of[root] = ((*home, short_stem(chosen.name) or "update"), repeat, number)
            continue
        paths = [(*home, short_name(chosen.name, parts) or "update") for parts in (1, 2, 3, 4)]
        path = next((p for p in paths if not taken[p] and not p[-1].isdigit()), paths[-1])
        taken[path] += 1
        if taken[path] > 1:
            path = (*path[:-1], f"{path[-1]} ({taken[path]})")
        label_of[root] = (path, -1, number)
    seen: dict[tuple[int, tuple[int, ...], str], int] = {}
    for n in update:
        if n.id not in parent:
            placed.shown[n.id] = (n.scope[1] if len(n.scope) > 1 else SHARED,)
            continue
        path, repeat, number = label_of[find(n.id)]
        placed.shown[n.id] = path
        if repeat >= 0:
            key = (number, n.shape, n.op)
            k = seen[key] = seen.get(key, -1) + 1
            placed.merge[n.id] = ("update", path, n.op, n.shape, k)
            placed.member[n.id] = repeat
    for n in reversed(nodes):
        if n.is_source and n.phase == OPTIMIZER and n.users:
            placed.shown[n.id] = placed.shown[n.users[0]]


def _shared_by_updates(model: GraphModel) -> list[bool]:
    """Scalars, tensors filled from scalars, and what the optimiser reduces to a scalar: of no one parameter."""
    nodes = model.nodes
    shared = [False] * len(nodes)
    for n in nodes:
        if n.constant is not None:
            shared[n.id] = True
        elif not n.inputs:
            shared[n.id] = n.size == 1
        elif n.phase == OPTIMIZER:
            shared[n.id] = n.size == 1 or all(shared[s] for s in n.inputs)
    return shared
