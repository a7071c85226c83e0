"""Where the user is: the source line that asked for an operation, and the named scope it belongs to.

Called by the graph builder for every node and by errors for every message, so both look-ups are cheap.
"""

from __future__ import annotations

import contextlib
import os
import sys
import sysconfig
import threading
from collections.abc import Iterator

_PACKAGE = os.path.dirname(os.path.abspath(__file__)) + os.sep
_ROOT = os.path.dirname(os.path.dirname(_PACKAGE)) + os.sep
# Frames of these libraries are never "the user's line": NumPy dispatches to us, the others call us back.
_LIBRARIES = (
    "numpy",
    "optree",
    "functools",
    "contextlib",
    "tracejit_numpy",
    "tracejit_cpu",
    "tracejit_wgpu",
    "tracejit_viz",
)
_known: dict[str, bool] = {}


def is_internal(filename: str) -> bool:
    """True for files of tracejit itself and of the libraries through which users reach it."""
    known = _known.get(filename)
    if known is None:
        path = os.path.abspath(filename)
        parts = path.replace("\\", "/").split("/")
        stem = parts[-1].removesuffix(".py")
        known = (
            path.startswith(_PACKAGE)
            or filename.startswith("<frozen")
            or any(p in _LIBRARIES for p in parts[:-1])
            or (stem in _LIBRARIES and path.startswith(sysconfig.get_paths()["stdlib"]))
        )
        _known[filename] = known
    return known


def location() -> str:
    """``file.py:line`` of the innermost frame of user code, or the empty string."""
    frame = sys._getframe(1)
    while frame is not None:
        filename = frame.f_code.co_filename
        known = _known.get(filename)
        if not (is_internal(filename) if known is None else known):
            return f"{_display(filename)}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return ""


def stack_level() -> int:
    """The ``stacklevel`` with which a warning of the calling function points at the innermost line of user code."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and is_internal(frame.f_code.co_filename):
        frame, level = frame.f_back, level + 1
    return level


_shown: dict[str, str] = {}


def _display(filename: str) -> str:
    """A path relative to the working directory where that is shorter, so that messages stay readable."""
    shown = _shown.get(filename)
    if shown is None:
        shown = filename
        if os.path.isabs(filename):
            with contextlib.suppress(ValueError):  # another drive on Windows
                relative = os.path.relpath(filename)
                shown = relative if len(relative) < len(filename) else filename
        _shown[filename] = shown = shown.replace("\\", "/")
    return shown


class _Scopes(threading.local):
    def __init__(self) -> None:
        self.path = ""
        self.counts: dict[str, int] = {}


_scopes = _Scopes()


def current_scope() -> str:
    """The current scope path, e.g. ``block0/attn/softmax``; empty at top level."""
    return _scopes.path


@contextlib.contextmanager
def named_scope(name: str, *, numbered: bool = False) -> Iterator[str]:
    """Group everything recorded inside under ``name`` (one path component) for the viewer, errors and profiles.

    With ``numbered``, the n-th entry within the same parent is called ``name0``, ``name1``, ...
    """
    if not name or "/" in name or '"' in name:
        raise ValueError(f"a scope name is one non-empty path component without '/' or quotes, got {name!r}")
    before = _scopes.path
    if numbered:
        slot = f"{before}/{name}"
        n = _scopes.counts.get(slot, 0)
        _scopes.counts[slot] = n + 1
        name = f"{name}{n}"
    _scopes.path = f"{before}/{name}" if before else name
    try:
        yield _scopes.path
    finally:
        _scopes.path = before


@contextlib.contextmanager
def at_scope(path: str) -> Iterator[None]:
    """Continue in exactly the scope ``path`` (gradient nodes live in the scope of their forward node)."""
    before = _scopes.path
    _scopes.path = path
    try:
        yield
    finally:
        _scopes.path = before


@contextlib.contextmanager
def fresh_scopes() -> Iterator[None]:
    """A new trace starts at the top level with scope numbers from zero, whatever its caller was doing."""
    before, counts = _scopes.path, _scopes.counts
    _scopes.path, _scopes.counts = "", {}
    try:
        yield
    finally:
        _scopes.path, _scopes.counts = before, counts
