"""Switches that change how traced functions run: ``disable_jit``, ``debug_nans``, ``TRACEJIT_LOG``. Read by ``jit.py``.

Each switch is a context manager for a block on this thread and an environment variable for the whole process.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator

from tracejit.state import changed


@contextlib.contextmanager
def disable_jit(disable: bool = True) -> Iterator[None]:
    """Run traced functions as plain Python on NumPy arrays inside the block, for debuggers and ``print``."""
    with changed(disable_jit=disable):
        yield


@contextlib.contextmanager
def debug_nans(enable: bool = True) -> Iterator[None]:
    """Inside the block the first NaN raises NonFiniteError naming its node and its forward source line.

    Every node runs one by one on the reference backend, so it is slow; results are the same.
    """
    with changed(debug_nans=enable):
        yield


_log_topics: frozenset[str] | None = None


def log_enabled(topic: str) -> bool:
    """True if ``TRACEJIT_LOG`` (a comma-separated list: ``retrace``, ``compile``, ``passes``) has ``topic`` or ``all``."""
    global _log_topics
    if _log_topics is None:
        _log_topics = frozenset(t.strip() for t in os.environ.get("TRACEJIT_LOG", "").split(",") if t.strip())
    return topic in _log_topics or "all" in _log_topics


def set_log(topics: str) -> None:
    """Replace the topics of ``TRACEJIT_LOG`` for this process."""
    global _log_topics
    _log_topics = frozenset(t.strip() for t in topics.split(",") if t.strip())


def log(topic: str, message: str) -> None:
    """Print ``message`` to stderr if ``topic`` is enabled."""
    if log_enabled(topic):
        print(f"tracejit [{topic}] {message}", file=sys.stderr)
