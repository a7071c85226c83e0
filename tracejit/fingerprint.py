"""Names for recorded graphs that mean the same in every process: the keys of what backends keep on disk of a program.

``compilation.py`` asks for the key of a graph before it optimises and lowers it; a backend that has the outcome on disk
saves both. Everything that the outcome depends on is in the key: the graph, this package's sources, NumPy.
"""

from __future__ import annotations

import functools
import hashlib
import os
import sys
from typing import Any

import numpy as np

from tracejit._version import __version__
from tracejit.graph import ArrayLiteral, Graph


def program_key(graph: Graph) -> str | None:
    """The key of ``graph``; None if it holds something whose value has no stable name (a Python callable)."""
    try:
        text = "\n".join(_lines(graph))
    except TypeError:
        return None
    return hashlib.sha256(f"{sources()}\n{text}".encode()).hexdigest()


def _lines(graph: Graph) -> list[str]:
    """One line for each node: what the passes and the lowering can see of it, and nothing that only messages show."""
    at = {id(n): i for i, n in enumerate(graph.nodes)}
    known: dict[
        int, str
    ] = {}  # texts of operators' attributes; equal nodes of equal layers share few of them
    lines = [graph.name, ",".join(graph.output_names)]
    for n in graph.nodes:
        attrs, text = n.attrs, ""
        if attrs:
            if (left_out := _PRIVATE.get(n.op.name)) is not None:
                attrs = {k: v for k, v in attrs.items() if k != left_out}
            text = known.get(id(n.attrs), "")
            if not text:
                text = known[id(n.attrs)] = _text(attrs)
        forward = n.grad_of
        lines.append(
            f"{n.op.name}|{[at[id(i)] for i in n.inputs]}|{text}|{n.scope!r}|{n.name!r}|"
            f"{'' if forward is None else at.get(id(forward), '-')}"
        )
    lines.append(repr([at[id(n)] for n in graph.inputs]))
    lines.append(repr([at[id(n)] for n in graph.outputs]))
    return lines


#: Attributes that only autograd reads, of ops that the first pass erases: a Python object, a number that is never the same.
_PRIVATE = {"custom_vjp": "rule", "grad_input": "uid"}
_ATOMS = frozenset({str, int, bool, type(None)})


def _text(value: Any) -> str:
    """A text that differs when the value does; TypeError for a value of an unknown kind."""
    kind = type(value)
    if kind in _ATOMS:
        return repr(value)
    if kind is tuple:
        return "(" + ",".join(map(_text, value)) + ")"
    if kind is float:
        return value.hex()
    if isinstance(value, np.dtype):
        return f"d{value.str}"
    if kind is dict:
        return "{" + ",".join(f"{k}:{_text(v)}" for k, v in sorted(value.items())) + "}"
    if isinstance(value, np.generic):
        return f"{value.dtype.str}{value.tobytes().hex()}"
    if kind is ArrayLiteral:
        array = value.array
        return f"a{array.dtype.str}{array.shape}{hashlib.sha256(array.tobytes()).hexdigest()}"
    if isinstance(value, Graph):
        return "[" + "\n".join(_lines(value)) + "]"
    raise TypeError(f"{kind.__name__} has no stable name")


@functools.cache
def sources() -> str:
    """Names the state of this package's sources: version, and size and times of every file (reading them takes 10 ms)."""
    parts = [__version__, np.__version__, sys.version]
    folders = [os.path.dirname(__file__)]
    while folders:
        folder = folders.pop()
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir():
                    folders.append(entry.path)
                elif entry.name.endswith(".py"):
                    info = entry.stat()
                    parts.append(f"{entry.path}|{info.st_size}|{info.st_mtime_ns}|{info.st_ctime_ns}")
    return hashlib.sha256("\n".join(sorted(parts)).encode()).hexdigest()


__all__ = ["program_key", "sources"]
