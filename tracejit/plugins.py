"""Finds installed plug-ins by entry point without ``importlib.metadata``, whose import costs a first call 20 ms.

``backend.py`` asks for the group ``tracejit.backends``, ``watching.py`` for ``tracejit.viewers``. Only what every
installer writes is read: the ``entry_points.txt`` in the ``*.dist-info`` and ``*.egg-info`` folders on ``sys.path``. Where
distributions can live elsewhere too (zip files, a finder of an import hook) the standard library looks for them.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

_MARK = (".dist-info", ".egg-info")


class EntryPoint:
    """One line of an entry-point group: ``name = module:attribute``."""

    __slots__ = ("name", "value")

    def __init__(self, name: str, value: str) -> None:
        self.name, self.value = name, value

    def load(self) -> Any:
        """Import the object that the line names."""
        module, _, attributes = self.value.partition("[")[0].partition(":")
        found: Any = importlib.import_module(module.strip())
        for attribute in filter(None, attributes.strip().split(".")):
            found = getattr(found, attribute)
        return found


def find(group: str) -> dict[str, Any]:
    """The entry points of ``group`` by name; each has ``load()``."""
    if not _plain(sys.path, sys.meta_path):
        import importlib.metadata

        return {e.name: e for e in importlib.metadata.entry_points(group=group)}
    out: dict[str, Any] = {}
    seen: set[str] = set()
    for folder in sys.path:
        for text in _files(folder or os.curdir, seen):
            for name, value in parse(text, group):
                out.setdefault(name, EntryPoint(name, value))
    return out


def _plain(path: list[str], finders: list[Any]) -> bool:
    """Whether all distributions are folders on ``sys.path``: no zip files, no other finder that knows of any."""
    for finder in finders:
        if hasattr(finder, "find_distributions") and getattr(finder, "__name__", "") != "PathFinder":
            return False
    # "python311.zip" is on every path, and nearly everywhere there is no such file
    return all(isinstance(p, str) and not os.path.isfile(p) for p in path)


def _files(folder: str, seen: set[str]) -> list[str]:
    """The texts of the ``entry_points.txt`` files of the distributions in a folder; the first of a distribution counts."""
    texts = []
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return []
    for name in names:
        if not name.endswith(_MARK):
            continue
        distribution = name.rpartition(".")[0].partition("-")[0].lower().replace("_", "-").replace(".", "-")
        if distribution in seen:
            continue
        seen.add(distribution)
        try:
            with open(os.path.join(folder, name, "entry_points.txt"), encoding="utf-8") as file:
                texts.append(file.read())
        except (OSError, UnicodeDecodeError):
            continue
    return texts


def parse(text: str, group: str) -> list[tuple[str, str]]:
    """``(name, value)`` of the lines of one group of an ``entry_points.txt``."""
    if group not in text:
        return []
    out, inside = [], False
    for line in map(str.strip, text.splitlines()):
        if line.startswith("["):
            inside = line.strip("[] ") == group
        elif inside and line and not line.startswith(("#", ";")):
            name, equals, value = line.partition("=")
            if equals:
                out.append((name.strip(), value.strip()))
    return out


__all__ = ["EntryPoint", "find", "parse"]
