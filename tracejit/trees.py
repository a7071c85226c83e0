"""Nested containers of arrays (pytrees), through optree: the one place that names its namespace and its untyped API.

Dicts, lists, tuples, named tuples, and classes registered with optree (``nn`` modules) are trees; None is an empty one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import optree

#: Classes register themselves in this optree namespace (or globally).
NAMESPACE = "tracejit"

# optree.tree_flatten is a Python wrapper around this; the call path of ``jit.py`` saves the wrapper where it can.
flatten_fast: Any = getattr(getattr(optree, "_C", None), "flatten", None) or optree.tree_flatten


def flatten(tree: Any) -> tuple[list[Any], Any]:
    """``(leaves, structure)``; the structure is hashable and has ``unflatten``, ``num_leaves`` and ``children``."""
    return optree.tree_flatten(tree, namespace=NAMESPACE)


def leaves(tree: Any, *, none_is_leaf: bool = False) -> list[Any]:
    """The leaves in order."""
    return optree.tree_leaves(tree, none_is_leaf=none_is_leaf, namespace=NAMESPACE)


def unflatten(structure: Any, new_leaves: Sequence[Any]) -> Any:
    """The tree of ``structure`` with other leaves."""
    return optree.tree_unflatten(structure, new_leaves)


def with_paths(tree: Any) -> list[tuple[tuple[Any, ...], Any]]:
    """For each leaf, its path of keys, indices and field names, and the leaf."""
    found, leaves_found, _ = optree.tree_flatten_with_path(tree, namespace=NAMESPACE)
    return list(zip(found, leaves_found, strict=True))


def is_node(value: Any) -> bool:
    """True for anything that is not a leaf: a container, a module, None."""
    return not optree.tree_is_leaf(value, namespace=NAMESPACE)


def tree_map(fn: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """``fn`` applied to corresponding leaves of trees of equal structure."""
    return optree.tree_map(fn, tree, *rest, namespace=NAMESPACE)


def paths(tree: Any) -> list[str]:
    """For each leaf, how to reach it from the root in Python syntax: ``['w']``, ``.blocks[0].weight``; ``""`` for a leaf."""
    accessors, _, _ = optree.tree_flatten_with_accessor(tree, namespace=NAMESPACE)
    return [a.codify("") for a in accessors]
