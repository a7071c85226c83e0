"""Which names and attributes a piece of bytecode reads. Called by ``environment.py`` to know what a trace depends on."""

from __future__ import annotations

import dis
import functools
import types
from collections import Counter
from typing import Any, NamedTuple

#: Reading only these of an array does not look at its elements; a new shape is a new array, which is noticed anyway.
_METADATA = frozenset({"shape", "dtype", "ndim", "size", "nbytes", "itemsize"})
_NAME_LOADS = frozenset({"LOAD_GLOBAL", "LOAD_NAME"})
_CELL_LOADS = frozenset({"LOAD_DEREF", "LOAD_CLASSDEREF", "LOAD_FROM_DICT_OR_DEREF"})
_ATTRIBUTE_LOADS = frozenset({"LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR"})


class Reads(NamedTuple):
    """How often each global name, closure cell, local, attribute and constant key is loaded for its value.

    A count of zero means that only its shape or the like is looked at.
    """

    names: Counter[str]
    cells: Counter[str]
    locals: Counter[str]
    attributes: Counter[str]
    keys: Counter[Any]


@functools.lru_cache(maxsize=4096)
def reads_of(code: types.CodeType) -> Reads:
    """The reads of ``code`` and of the functions nested in it.

    ``x.shape`` and ``len(x)`` count no load of ``x``. String constants that could be attribute names are listed as such,
    for ``getattr(self, "w")``.
    """
    names: Counter[str] = Counter()
    cells: Counter[str] = Counter()
    local: Counter[str] = Counter()
    attributes: Counter[str] = Counter()
    keys: Counter[Any] = Counter()
    instructions = [
        i for i in dis.get_instructions(code) if i.opname not in ("CACHE", "EXTENDED_ARG", "PUSH_NULL")
    ]
    for k, instruction in enumerate(instructions):
        opname, name = instruction.opname, instruction.argval
        if opname in _ATTRIBUTE_LOADS:
            counter = attributes
        elif opname == "BINARY_SUBSCR" or (opname == "BINARY_OP" and instruction.argrepr == "[]"):
            before = instructions[k - 1]
            if not before.opname.startswith("LOAD_CONST") and before.opname != "LOAD_SMALL_INT":
                continue
            counter, name = keys, before.argval
            if not isinstance(name, str | int):
                continue
        elif opname in _NAME_LOADS:
            counter = names
        elif opname in _CELL_LOADS:
            counter = cells
        elif opname.startswith("LOAD_FAST"):
            # Newer Pythons load two locals by one instruction.
            for each in name if isinstance(name, tuple) else (name,):
                local[each] += 1
            continue
        else:
            continue
        following = instructions[k + 1] if k + 1 < len(instructions) else None
        metadata = following is not None and (
            (following.opname == "LOAD_ATTR" and following.argval in _METADATA)
            or (
                following.opname in ("PRECALL", "CALL")
                and following.arg == 1
                and k > 0
                and instructions[k - 1].argval == "len"
            )
        )
        counter[name] += 0 if metadata else 1
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            inner = reads_of(constant)
            names.update(inner.names)
            cells.update(inner.cells)
            attributes.update(inner.attributes)
            keys.update(inner.keys)
        elif isinstance(constant, str) and constant.isidentifier():
            attributes[constant] += 0
    return Reads(names, cells, local, attributes, keys)


__all__ = ["Reads", "reads_of"]
