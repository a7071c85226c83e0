"""Generated Python for the two ends of a warm call: take the argument trees apart, put the result tree together.

A reader checks the structure of the arguments and the type, dtype and shape of every leaf against one cache entry while
it unpacks them, in straight-line code: no key is built or hashed. A builder is the same for results. ``jit.py`` and
``compilation.py`` make them; both fall back to optree for containers that are not listed here. The code is generated from
types and keys only; values are passed by reference.
"""

from __future__ import annotations

import keyword
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import optree

from tracejit import trees

#: More leaves than this and generating code costs more than it saves.
_MAX_LEAVES = 1024

Reader = Callable[[tuple[Any, ...], dict[str, Any]], "list[Any] | None"]


class _Unsupported(Exception):
    """A container or leaf that only the general path handles."""


class _Source:
    """Lines of one generated function and the objects they refer to."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.names: dict[str, Any] = {"ndarray": np.ndarray, "asarray": np.asarray}
        self._known: dict[int, str] = {}
        self._count = 0

    def fresh(self) -> str:
        self._count += 1
        return f"v{self._count}"

    def ref(self, value: Any) -> str:
        """A name for an object; small values are written out."""
        if value is None or isinstance(value, bool) or type(value) in (int, str):
            return repr(value)
        name = self._known.get(id(value))
        if name is None:
            name = self._known[id(value)] = f"k{len(self._known)}"
            self.names[name] = value
        return name

    def function(self, header: str) -> Any:
        scope = dict(self.names)
        exec(compile(f"{header}\n" + "\n".join(self.lines), "<tracejit call plan>", "exec"), scope)
        return scope["call"]


# -- reading arguments ---------------------------------------------------------------------------------------------


def reader(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Reader | None:
    """A function from the arguments of a later call to their leaves, or to None if they differ in anything.

    What may differ is what a cache entry allows: contents of arrays, values of Python numbers. ``device`` and ``watch`` are
    compared but no leaves. None instead of a function if the arguments need the general path on every call.
    """
    source = _Source()
    leaves: list[str] = []
    try:
        names = [source.fresh() for _ in args]
        if names:
            source.lines.append(f"        {', '.join(names)}, = args")
        else:
            source.lines.append("        if args: return None")
        for name, value in zip(names, args, strict=True):
            _read(source, name, value, leaves)
        if kwargs:
            source.lines.append(f"        if len(kwargs) != {len(kwargs)}: return None")
        else:
            source.lines.append("        if kwargs: return None")
        for key in sorted(kwargs):  # as optree does
            child = source.fresh()
            source.lines.append(f"        {child} = kwargs[{key!r}]")
            _read(source, child, kwargs[key], [] if key in ("device", "watch") else leaves)
    except _Unsupported:
        return None
    source.lines += [
        f"        return [{', '.join(leaves)}]",
        # Another number of items, a missing key or field: another structure.
        "    except (ValueError, LookupError, AttributeError): return None",
    ]
    found: Reader = source.function("def call(args, kwargs):\n    try:")
    return found


def _read(source: _Source, name: str, value: Any, leaves: list[str]) -> None:
    kind = type(value)
    put = source.lines.append
    if value is None:
        put(f"        if {name} is not None: return None")
    elif kind is dict:
        put(f"        if type({name}) is not dict or len({name}) != {len(value)}: return None")
        for key in _entries(value):
            child = source.fresh()
            put(f"        {child} = {name}[{source.ref(key)}]")
            _read(source, child, value[key], leaves)
    elif kind is list or kind is tuple or _is_namedtuple(kind):
        expected = "list" if kind is list else "tuple" if kind is tuple else source.ref(kind)
        children = [source.fresh() for _ in value]
        put(f"        if type({name}) is not {expected}: return None")
        # Unpacking raises ValueError for another length.
        put(
            f"        {', '.join(children)}, = {name}" if children else f"        if len({name}): return None"
        )
        for child, item in zip(children, value, strict=True):
            _read(source, child, item, leaves)
    elif _is_module(kind):
        put(f"        if type({name}) is not {source.ref(kind)}: return None")
        for field in kind._static_names:
            static = source.fresh()
            want = getattr(value, field)
            put(f"        {static} = {name}.{field}")
            # The type as well: 2 == 2.0 == True in part, but they promote differently.
            put(
                f"        if type({static}) is not {source.ref(type(want))} or {static} != {source.ref(want)}: return None"
            )
        for field in kind._dynamic_names:
            child = source.fresh()
            put(f"        {child} = {name}.{field}")
            _read(source, child, getattr(value, field), leaves)
    else:
        leaves.append(_check_leaf(source, name, value))
        if len(leaves) > _MAX_LEAVES:
            raise _Unsupported


def _check_leaf(source: _Source, name: str, value: Any) -> str:
    """Emit the check of a leaf; returns the expression of what the executable gets."""
    kind = type(value)
    leaf = name
    if kind is np.ndarray and value.dtype.isnative:
        # A dtype that is equal but another object is left to the general path.
        dtype, shape = source.ref(value.dtype), repr(tuple(map(int, value.shape)))
        test = f"type({name}) is not ndarray or {name}.dtype is not {dtype} or {name}.shape != {shape}"
    elif hasattr(kind, "__tracejit_array__"):
        dtype, shape = source.ref(value.dtype), repr(tuple(map(int, value.shape)))
        test = f"type({name}) is not {source.ref(kind)} or {name}.dtype is not {dtype} or {name}.shape != {shape}"
    elif kind is float or kind is int:
        test = f"type({name}) is not {kind.__name__}"
    elif (
        isinstance(value, np.generic) and value.dtype.kind in "biuf"
    ):  # the step count that an optimiser returned
        test, leaf = f"type({name}) is not {source.ref(kind)}", f"asarray({name})"
    elif kind is bool:
        test = f"{name} is not {value}"
    elif kind is str:
        test = f"type({name}) is not str or {name} != {value!r}"
    else:
        raise _Unsupported
    source.lines.append(f"        if {test}: return None")
    return leaf


def _entries(value: dict[Any, Any]) -> Sequence[Any]:
    """The keys in the order in which optree flattens them."""
    tree: Any = value
    entries: Sequence[Any] = optree.tree_flatten_one_level(tree, namespace=trees.NAMESPACE)[2]
    if not all(isinstance(key, str | int) for key in entries):
        raise _Unsupported
    return entries


def _is_namedtuple(kind: Any) -> bool:
    return optree.is_namedtuple_class(kind) and kind.__len__ is tuple.__len__


def _is_module(kind: type) -> bool:
    """An ``nn.Module``, known by what its metaclass records; ``nn`` is not imported for it."""
    names = (*getattr(kind, "_static_names", (None,)), *getattr(kind, "_dynamic_names", (None,)))
    return all(isinstance(n, str) and n.isidentifier() and not keyword.iskeyword(n) for n in names)


# -- building results ----------------------------------------------------------------------------------------------


def builder(out_tree: Any, leaves: Sequence[tuple[str, Any]], scalars: Sequence[int]) -> Any:
    """A function from the executable's outputs to the result tree, or None where only optree can build it.

    ``leaves`` says for each leaf of ``out_tree`` where it comes from, as in ``Traced.outputs``; outputs in ``scalars`` are
    0-d arrays that become NumPy scalars.
    """
    if len(leaves) > _MAX_LEAVES:
        return None
    source = _Source()
    items = []
    for kind, value in leaves:
        if kind == "const":
            items.append(source.ref(value) if value is not None else "None")
        else:
            items.append(f"outs[{value}][()]" if value in scalars else f"outs[{value}]")
    marks = [_Mark(item) for item in items]
    try:
        text = _build(source, out_tree.unflatten(marks))
    except _Unsupported:
        return None
    source.lines.append(f"    return {text}")
    return source.function("def call(outs):")


class _Mark:
    """Stands for a leaf of the result; holds its expression."""

    def __init__(self, text: str) -> None:
        self.text = text


def _build(source: _Source, value: Any) -> str:
    kind = type(value)
    if kind is _Mark:
        return str(value.text)
    if value is None:
        return "None"
    if kind is dict:
        return "{" + ", ".join(f"{source.ref(k)}: {_build(source, v)}" for k, v in value.items()) + "}"
    if kind is list:
        return "[" + ", ".join(_build(source, v) for v in value) + "]"
    if kind is tuple:
        return "(" + "".join(_build(source, v) + ", " for v in value) + ")"
    if _is_namedtuple(kind):
        return f"{source.ref(kind)}({', '.join(_build(source, v) for v in value)})"
    if _is_module(kind):
        fields = [f"{n!r}: {_build(source, getattr(value, n))}" for n in kind._dynamic_names]
        fields += [f"{n!r}: {source.ref(getattr(value, n))}" for n in kind._static_names]
        source.names["module"] = _module
        return f"module({source.ref(kind)}, {{{', '.join(fields)}}})"
    raise _Unsupported


def _module(cls: Any, fields: dict[str, Any]) -> Any:
    """As the unflatten rule of ``nn.Module``."""
    made = object.__new__(cls)
    made.__dict__.update(fields)
    return made


__all__ = ["Reader", "builder", "reader"]
