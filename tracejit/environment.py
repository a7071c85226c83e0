"""What a traced function reads besides its arguments: globals, closure cells, attributes of configuration objects.

A trace depends on the values these had; ``jit.py`` checks them on every call, so that rebinding a global or changing a
closed-over learning rate takes effect, as it does in plain Python. Arrays are compared by identity (their contents are
read at each call); scalars, strings and tuples by value; functions by identity, and looked into.
"""

from __future__ import annotations

import dis
import enum
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from tracejit import source, trees

_MISSING = object()
_DEPTH = 4
_LIMIT = 256

#: (container, name, value): container is a dict (globals, an object's __dict__) or a closure cell (name unused).
Slot = tuple[Any, str, Any]


class Environment:
    """A snapshot of the slots that a function reads, taken when it was traced."""

    __slots__ = ("_cells", "_names", "_trees")

    def __init__(self, slots: list[Slot]) -> None:
        self._names = [s for s in slots if not isinstance(s[0], types.CellType) and not _is_tree(s[2])]
        self._cells = [s for s in slots if isinstance(s[0], types.CellType) and not _is_tree(s[2])]
        self._trees = [(c, n, v, *trees.flatten(v)) for c, n, v in slots if _is_tree(v)]

    def __bool__(self) -> bool:
        return bool(self._names or self._cells or self._trees)

    def unchanged(self) -> bool:
        """True if every slot still has the value it had: the check on the call path."""
        for container, name, value in self._names:
            now = container.get(name, _MISSING)
            if now is not value and not _same(now, value):
                return False
        for cell, _, value in self._cells:
            try:
                now = cell.cell_contents
            except ValueError:  # emptied
                return False
            if now is not value and not _same(now, value):
                return False
        return not self._trees or self._trees_unchanged()

    def _trees_unchanged(self) -> bool:
        for container, name, _, leaves, tree in self._trees:
            now = _read(container, name)
            if now is _MISSING:
                return False
            new_leaves, new_tree = trees.flatten(now)
            if new_tree != tree or not all(a is b or _same(a, b) for a, b in zip(new_leaves, leaves)):
                return False
        return True

    def changes(self) -> list[str]:
        """Names of the slots that changed, for the retrace explanation."""
        out = []
        for container, name, value in (*self._names, *self._cells):
            now = _read(container, name)
            if now is not value and not _same(now, value):
                out.append(f"{name}: {_short(value)} -> {_short(now)}")
        if self._trees and not self._trees_unchanged():
            out.append("a closed-over or global container: " + ", ".join(t[1] for t in self._trees))
        return out


def snapshot(fn: Callable[..., Any], extra: Sequence[Slot] = ()) -> Environment:
    """The environment of ``fn`` and of the plain Python functions it reads, to a bounded depth, plus ``extra`` slots."""
    slots: dict[tuple[int, str], Slot] = {(id(c), n): (c, n, v) for c, n, v in extra}
    seen: set[int] = set()
    for container, name, value in _slots(fn, _DEPTH, seen):
        slots.setdefault((id(container), name), (container, name, value))
        if len(slots) >= _LIMIT:
            break
    return Environment(list(slots.values()))


def _slots(fn: Any, depth: int, seen: set[int]) -> Iterator[Slot]:
    while hasattr(fn, "__wrapped__") and not isinstance(fn, types.FunctionType):
        fn = fn.__wrapped__
    if isinstance(fn, types.MethodType):
        fn = fn.__func__
    code = getattr(fn, "__code__", None)
    if code is None or id(fn) in seen or source.is_internal(code.co_filename):
        return
    seen.add(id(fn))
    names, attributes = _reads(code)
    bound: list[tuple[Any, str, Any]] = [
        (fn.__globals__, n, fn.__globals__[n]) for n in names if n in fn.__globals__
    ]
    for name, cell in zip(code.co_freevars, fn.__closure__ or ()):
        try:
            bound.append((cell, name, cell.cell_contents))
        except ValueError:
            continue
    for container, name, value in bound:
        if _guardable(value):
            yield container, name, value
        if isinstance(value, types.FunctionType) or hasattr(value, "__wrapped__"):
            if not isinstance(value, types.FunctionType) or not source.is_internal(
                value.__code__.co_filename
            ):
                yield container, name, value
            if depth > 0:
                yield from _slots(value, depth - 1, seen)
        elif _is_config(value):
            yield container, name, value
            fields = vars(value)
            for attribute in attributes:
                if attribute in fields and _guardable(fields[attribute]):
                    yield fields, attribute, fields[attribute]


def object_slots(value: Any) -> list[Slot]:
    """Attributes of a static object argument (``self`` of a method) that a trace may have read."""
    if not _is_config(value):
        return []
    return [(vars(value), name, item) for name, item in vars(value).items() if _guardable(item)]


_GLOBAL_READS = frozenset({"LOAD_GLOBAL", "LOAD_NAME"})


def _reads(code: types.CodeType) -> tuple[set[str], set[str]]:
    """Global names and attribute names that ``code`` and the functions nested in it read."""
    names: set[str] = set()
    attributes: set[str] = set()
    for instruction in dis.get_instructions(code):
        if instruction.opname in _GLOBAL_READS:
            names.add(instruction.argval)
        elif instruction.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            attributes.add(instruction.argval)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            inner_names, inner_attributes = _reads(constant)
            names |= inner_names
            attributes |= inner_attributes
    return names, attributes


_SCALARS = (bool, int, float, str, bytes, type(None), enum.Enum, np.generic, np.dtype)


def _guardable(value: Any) -> bool:
    if isinstance(value, (*_SCALARS, np.ndarray)) or hasattr(value, "__tracejit_array__"):
        return True
    return _is_tree(value)


def _is_tree(value: Any) -> bool:
    """Containers whose items may be replaced without the name being rebound."""
    return type(value) in (dict, list, tuple) and len(value) <= 256


def _is_config(value: Any) -> bool:
    """Objects whose attributes a function reads: a config instance, a trainer; not modules, classes or arrays."""
    return (
        hasattr(value, "__dict__")
        and not isinstance(value, types.ModuleType | type | types.FunctionType | types.BuiltinFunctionType)
        and not hasattr(value, "__tracejit_array__")
        and not type(value).__module__.startswith(("numpy", "tracejit"))
    )


def _same(now: Any, before: Any) -> bool:
    if type(now) is not type(before) or isinstance(now, np.ndarray) or hasattr(now, "__tracejit_array__"):
        return False
    if isinstance(now, _SCALARS):
        return bool(now == before) or (now != now and before != before)
    return False


def _read(container: Any, name: str) -> Any:
    if isinstance(container, types.CellType):
        try:
            return container.cell_contents
        except ValueError:
            return _MISSING
    return container.get(name, _MISSING)


def _short(value: Any) -> str:
    if value is _MISSING:
        return "deleted"
    if isinstance(value, np.ndarray):
        return f"array at {id(value):#x}"
    text = repr(value)
    return text if len(text) < 40 else text[:37] + "..."
