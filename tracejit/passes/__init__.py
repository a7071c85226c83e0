"""Graph -> Graph passes, one pure function per file, and the pipeline that ``jit.py`` runs before compilation.

``optimise`` keeps every intermediate graph when asked, so that ``inspect()`` can show what each pass did; under
``TRACEJIT_DEBUG_PASSES=1`` (set in the tests) the verifier runs after each pass.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from tracejit.config import log, log_enabled
from tracejit.graph import Graph
from tracejit.passes.cse import eliminate_common_subexpressions
from tracejit.passes.dce import eliminate_dead_code
from tracejit.passes.fold import fold_constants
from tracejit.passes.markers import erase_markers
from tracejit.passes.simplify import simplify

Pass = Callable[[Graph], Graph]

#: The order matters: markers hide patterns, folding makes constants that simplification uses.
PIPELINE: tuple[Pass, ...] = (
    erase_markers,
    fold_constants,
    simplify,
    eliminate_common_subexpressions,
    eliminate_dead_code,
)


def checking() -> bool:
    """Whether ``TRACEJIT_DEBUG_PASSES`` asks for the verifier after each pass."""
    return os.environ.get("TRACEJIT_DEBUG_PASSES", "") not in ("", "0")


def optimise(graph: Graph, trail: list[tuple[str, Graph]] | None = None) -> Graph:
    """Run the pipeline; with ``trail`` each pass's name and result is appended to it."""
    check = checking()
    for run in PIPELINE:
        before = len(graph)
        graph = run(graph)
        if check:
            graph.verify()
        if log_enabled("passes"):
            log("passes", f"{graph.name}: {run.__name__}: {before} -> {len(graph)} nodes")
        if trail is not None:
            trail.append((run.__name__, graph))
    return graph


__all__ = [
    "PIPELINE",
    "checking",
    "eliminate_common_subexpressions",
    "eliminate_dead_code",
    "erase_markers",
    "fold_constants",
    "optimise",
    "simplify",
]
