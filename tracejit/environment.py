"""What a traced function reads besides its arguments, remembered so that a change takes effect as in plain Python.

``jit.py`` takes a snapshot after each trace and checks it on every call. Names, closure cells and attributes are compared
by identity, then by value for scalars; containers by their items; functions and objects are looked into (``reads.py``).
Arrays in the graph are inputs read at each call; the contents of those that the function used outside of it are compared.
"""

from __future__ import annotations

import enum
import functools
import random
import re
import sys
import types
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from operator import is_
from typing import Any

import numpy as np
from numpy.lib.array_utils import byte_bounds

from tracejit import source, trees
from tracejit.reads import Reads, reads_of

_MISSING = object()
#: Bounds of one snapshot: slots and objects looked into, items and leaves of a container, bytes of an array.
_MAX_SLOTS = 2048
_MAX_ITEMS = 1024
_MAX_LEAVES = 4096
_MAX_BYTES = 1 << 20

#: (container, name, value): container has ``get`` (globals, an object's __dict__) or is a closure cell (name for messages).
Slot = tuple[Any, str, Any]


class FrozenValueWarning(UserWarning):
    """A traced function drew random numbers from NumPy or Python: they are constants of the compiled program."""


class Environment:
    """A snapshot of what a function reads, taken when it was traced."""

    __slots__ = ("_arrays", "_cells", "_fixed", "_names", "_sets", "_slots", "_trees")

    def __init__(
        self, slots: Iterable[Slot], arrays: Iterable[np.ndarray] = (), fixed: Iterable[Any] = ()
    ) -> None:
        self._slots = slots = list(slots)
        self._fixed = list(fixed)
        found = [(c, n, *trees.flatten(v), _shadow(v)) for c, n, v in slots if _is_tree(v)]
        self._trees = [t for t in found if len(t[2]) <= _MAX_LEAVES]
        watched = {(id(c), n) for c, n, *_ in self._trees}
        # Of larger ones only the identity is compared.
        plain = [s for s in slots if (id(s[0]), s[1]) not in watched]
        self._names = [(c.get, n, v) for c, n, v in plain if not isinstance(c, types.CellType)]
        self._cells = [s for s in plain if isinstance(s[0], types.CellType)]
        self._sets = [(v, frozenset(v)) for _, _, v in plain if isinstance(v, set)]
        self._arrays = [(a, a.tobytes()) for a in arrays]

    def __bool__(self) -> bool:
        return bool(self._names or self._cells or self._trees or self._arrays)

    def unchanged(self) -> bool:
        """True if everything still has the value it had: the check on the call path."""
        for get, name, value in self._names:
            now = get(name, _MISSING)
            if now is not value and not _same(now, value):
                return False
        for cell, name, value in self._cells:
            now = _read(cell, name)
            if now is not value and not _same(now, value):
                return False
        return not (self._trees or self._sets or self._arrays) or self._contents_unchanged()

    def _contents_unchanged(self) -> bool:
        for container, name, leaves, tree, shadow in self._trees:
            now = _read(container, name)
            if shadow is not None and _identical(now, shadow):
                continue
            if now is _MISSING or not _is_tree(now):
                return False
            new_leaves, new_tree = trees.flatten(now)
            if new_tree != tree or not all(a is b or _same(a, b) for a, b in zip(new_leaves, leaves)):
                return False
        return self._compared_contents_unchanged()

    def _compared_contents_unchanged(self) -> bool:
        return all(s == before for s, before in self._sets) and all(
            array.tobytes() == before for array, before in self._arrays
        )

    def rebound(self) -> tuple[list[tuple[Any, Any]], Environment] | None:
        """The arrays that were replaced by others of equal type, as (old, new), if nothing else changed.

        Also the environment with the new ones. None if an old array was reached in another way too, so that one input of
        the graph would have to become two.
        """
        if not self._compared_contents_unchanged():
            return None
        pairs: list[tuple[Any, Any]] = []
        places: Counter[int] = Counter(id(a) for a in self._fixed)
        slots: list[Slot] = []
        for container, name, value in self._slots:
            now = _read(container, name)
            slots.append((container, name, now))
            old, new = [value], [now]
            if _is_tree(value) or trees.is_node(value):
                if type(now) is not type(value):
                    return None
                (old, tree), (new, new_tree) = trees.flatten(value), trees.flatten(now)
                known = next((t for t in self._trees if t[0] is container and t[1] == name), None)
                if known is not None:  # its items may have been replaced in place
                    old, tree = known[2], known[3]
                if tree != new_tree:
                    return None
            for a, b in zip(old, new, strict=True):
                places[id(a)] += _is_array(a)
                if a is b or _same(b, a):
                    continue
                if not (_is_array(a) and type(a) is type(b) and (a.dtype, a.shape) == (b.dtype, b.shape)):
                    return None
                pairs.append((a, b))
        if any(places[id(a)] != 1 for a, _ in pairs):
            return None
        return pairs, Environment(slots, [a for a, _ in self._arrays], self._fixed)

    def changes(self) -> list[str]:
        """What changed, for the retrace explanation."""
        out = []
        names = [(name, get(name, _MISSING), value) for get, name, value in self._names]
        cells = [(name, _read(cell, name), value) for cell, name, value in self._cells]
        for name, now, value in names + cells:
            if now is not value and not _same(now, value):
                out.append(f"{name}: {_short(value)} -> {_short(now)}")
        if not self._contents_unchanged():
            what = [t[1] for t in self._trees] or ["a set or an array whose values were used while tracing"]
            out.append("the contents of a closed-over or global container: " + ", ".join(what))
        return out


def snapshot(
    fn: Callable[..., Any], objects: Sequence[Any] = (), captured: Sequence[tuple[Any, int]] = ()
) -> Environment:
    """The environment of ``fn``, of the functions and objects it reads, and of ``objects`` (static arguments such as self).

    ``captured`` are the arrays that became inputs of the graph, each with how often it was used there.
    """
    walk = _Walk(fn, objects)
    compared = list(walk.arrays_used_outside(captured))
    return Environment(walk.slots.values(), compared, [*walk.fixed.values(), *compared])


# -- random numbers ------------------------------------------------------------------------------------------------


class RandomStates:
    """Notices that a trace drew from NumPy's or Python's random numbers, which would then never change again."""

    def __init__(self, fn: Callable[..., Any], objects: Sequence[Any] = ()) -> None:
        self._generators = list(_Walk(fn, objects).generators.values())
        self._before = self._states()

    def _states(self) -> list[tuple[str, Any]]:
        found: list[tuple[str, Any]] = [("random", random.getstate())]
        if "numpy.random" in sys.modules:
            state: Any = np.random.get_state()  # noqa: NPY002 - the legacy generator is the one to watch
            found.append(("np.random", (state[1].tobytes(), state[2])))
        found += [
            ("a NumPy Generator", repr(g.bit_generator.state)) for g in self._generators if _is_generator(g)
        ]
        return found

    def used(self) -> str:
        """Which source of random numbers was drawn from since; the empty string for none."""
        return ", ".join(name for (name, a), (_, b) in zip(self._before, self._states()) if a != b)


def _is_view(part: Any, whole: np.ndarray) -> bool:
    """True if all of ``part`` is memory of ``whole``, as for ``whole.T`` and ``whole[1:]``."""
    base = getattr(part, "base", None)
    if base is None or (base is not whole and base is not whole.base):
        return False
    (low, high), (first, last) = byte_bounds(part), byte_bounds(whole)
    return first <= low and high <= last


def _is_generator(value: Any) -> bool:
    # By type: asking an arbitrary object for an attribute may run its code.
    return type(value).__name__ == "Generator" and type(value).__module__.startswith("numpy")


# -- walking -------------------------------------------------------------------------------------------------------


class _Walk:
    """Everything that a function can reach by the names and attributes in its code, breadth first.

    Attribute names are not tied to objects: ``self.layer.w`` in some function means that ``layer`` and ``w`` of every object
    reached are watched. That may watch too much, never too little; names that no code mentions are not watched.
    """

    def __init__(self, fn: Callable[..., Any], objects: Sequence[Any]) -> None:
        self.slots: dict[tuple[int, str], Slot] = {}
        self.generators: dict[int, Any] = {}
        #: Arrays reached in other ways than through a slot: defaults, arguments of partials.
        self.fixed: dict[int, np.ndarray] = {}
        self._arrays: dict[int, np.ndarray] = {}
        self._loads: Counter[int] = Counter()
        #: The attribute names and constant keys under which each array is found.
        self._found_as: dict[int, set[tuple[str, Any]]] = {}
        self._attributes: Counter[str] = Counter(("__call__",))
        self._keys: Counter[Any] = Counter()
        self._objects: dict[int, Any] = {}
        self._codes: set[tuple[int, ...]] = set()
        self._values: dict[int, Any] = {}  # holds them, so that no id is used twice
        self._function(fn)
        for value in objects:
            self._value(value, 1)
        self._look_into_objects()

    def arrays_used_outside(self, captured: Sequence[tuple[Any, int]]) -> Iterator[np.ndarray]:
        """Arrays that the function read more often than they entered the graph: some use went through NumPy at once.

        Reads by a name are counted exactly. Which object an attribute or a key was read of is not known, so for these the
        arrays found under it are counted together; one that never entered the graph is always among the result.
        """
        inside = {
            key: sum(n for c, n in captured if c is array or _is_view(c, array))
            for key, array in self._arrays.items()
        }
        together: Counter[tuple[str, Any]] = Counter()
        for key, found in self._found_as.items():
            together.update(dict.fromkeys(found, inside[key]))
        for key, array in self._arrays.items():
            reads = {
                (kind, name): self._attributes[name] if kind == "attribute" else max(self._keys[name], 1)
                for kind, name in self._found_as.get(key, ())
            }
            least = self._loads[key] + any(reads.values())
            if inside[key] >= least and all(together[f] >= n for f, n in reads.items()):
                continue
            if array.nbytes <= _MAX_BYTES and array.dtype != object:
                yield array

    def _look_into_objects(self) -> None:
        """Watch every attribute name on every object, until neither grows; new pairs only, in the order of discovery."""
        objects: list[Any] = []
        attributes: list[str] = []
        while len(self.slots) < _MAX_SLOTS and len(self._objects) < _MAX_SLOTS:
            new_objects = list(self._objects.values())[len(objects) :]
            new_attributes = list(self._attributes)[len(attributes) :]
            if not new_objects and not new_attributes:
                return
            pairs = [(o, a) for o in objects for a in new_attributes]
            pairs += [(o, a) for o in new_objects for a in (*attributes, *new_attributes)]
            objects += new_objects
            attributes += new_attributes
            for obj, attribute in pairs:
                self._attribute(obj, attribute)

    def _function(self, fn: Any) -> None:
        code = getattr(fn, "__code__", None)
        if code is None:
            self._value(fn, 1)
            return
        closure = fn.__closure__ or ()
        # Two closures of one function differ in their cells.
        key = (id(code), *map(id, closure))
        if key in self._codes or source.is_internal(code.co_filename):
            return
        reads: Reads = reads_of(code)
        if (id(code),) not in self._codes:
            self._attributes.update(reads.attributes)
            self._keys.update(reads.keys)
        self._codes |= {key, (id(code),)}
        for name, loads in reads.names.items():
            if name in fn.__globals__:
                self._slot(fn.__globals__, id(fn.__globals__), name, fn.__globals__[name], loads)
        for name, cell in zip(code.co_freevars, closure):
            value = _read(cell, name)
            if value is not _MISSING:
                self._slot(cell, id(cell), name, value, reads.cells.get(name, 0))
        positional = code.co_varnames[: code.co_argcount]
        defaults = dict(zip(reversed(positional), reversed(fn.__defaults__ or ()))) | (
            fn.__kwdefaults__ or {}
        )
        for name, value in defaults.items():
            self._value(value, reads.locals.get(name, 0))

    def _slot(self, container: Any, owner: int, name: str, value: Any, loads: int) -> None:
        if isinstance(value, types.ModuleType):
            if not _is_library(value.__name__):
                self._objects[id(value)] = value
            return
        self.slots.setdefault((owner, name), (container, name, value))
        self._value(value, loads, in_slot=True)

    def _attribute_slot(self, container: Any, owner: int, name: str, value: Any) -> None:
        if isinstance(value, np.ndarray):
            self._found_as.setdefault(id(value), set()).add(("attribute", name))
        self._slot(container, owner, name, value, 0)

    def _value(self, value: Any, loads: int, in_slot: bool = False) -> None:
        """Look into a value that the function can reach."""
        if isinstance(value, np.ndarray):
            if not in_slot:
                self.fixed[id(value)] = value
            self._arrays[id(value)] = value
            self._loads[id(value)] += loads
            return
        if isinstance(value, _SCALARS) or id(value) in self._values:
            return
        self._values[id(value)] = value
        if isinstance(value, types.FunctionType):
            self._function(value)
        elif isinstance(value, types.MethodType):
            self._function(value.__func__)
            self._value(value.__self__, 1)
        elif isinstance(value, functools.partial):
            for part in (value.func, *value.args, *value.keywords.values()):
                self._value(part, 1)
        elif isinstance(value, property):
            self._value(value.fget, 1)
        elif isinstance(value, functools.cached_property):
            self._value(value.func, 1)
        elif isinstance(value, staticmethod | classmethod):
            self._value(value.__func__, 1)
        elif _is_tree(value):
            for path, leaf in trees.with_paths(value):
                if isinstance(leaf, np.ndarray):
                    self._found_as.setdefault(id(leaf), set()).add(("key", path[-1]))
                self._value(leaf, 0, in_slot)
        elif _is_generator(value):
            self.generators[id(value)] = value
        elif not isinstance(value, type) and "__wrapped__" in _fields(value):
            self._value(_fields(value)["__wrapped__"], 1)
        elif _is_object(value):
            self._objects[id(value)] = value

    def _attribute(self, obj: Any, name: str) -> None:
        """Watch one attribute of an object, class or module, wherever Python would find it."""
        own = _fields(obj)
        if not isinstance(obj, type) and name in own:
            self._attribute_slot(own, id(obj), name, own[name])
            return
        if isinstance(obj, types.ModuleType):
            return
        for cls in (obj if isinstance(obj, type) else type(obj)).__mro__:
            found = vars(cls).get(name, _MISSING)
            if found is _MISSING:
                continue
            if isinstance(found, types.MemberDescriptorType):  # __slots__
                fields = _Fields(obj)
                value = fields.get(name, _MISSING)
                if value is not _MISSING and not isinstance(obj, type):
                    self._attribute_slot(fields, id(obj), name, value)
            elif not _is_library(cls.__module__):
                self._attribute_slot(vars(cls), id(cls), name, found)
            return


def _fields(obj: Any) -> Any:
    """The ``__dict__`` of an object; not through ``vars`` or ``getattr`` of the object's own making."""
    try:
        return object.__getattribute__(obj, "__dict__")
    except AttributeError:
        return {}


class _Fields:
    """The attributes of an object without ``__dict__``, read like a dict."""

    def __init__(self, obj: Any) -> None:
        self._obj = obj

    def get(self, name: str, default: Any) -> Any:
        return getattr(self._obj, name, default)


_SCALARS = (bool, int, float, str, bytes, type(None), enum.Enum, np.generic, np.dtype)
_STANDARD = sys.stdlib_module_names - {"__main__"}


@functools.lru_cache(maxsize=4096)
def _is_library(module: str | None) -> bool:
    """True for modules of Python, tracejit and installed packages: they do not change under a running program.

    A package that is installed in editable mode, or imported from a source folder, is the user's own code.
    """
    top = (module or "").partition(".")[0]
    if top in _STANDARD or top == "tracejit" or top.startswith("tracejit_"):
        return True
    found = sys.modules.get(top)
    places = [getattr(found, "__file__", None) or "", *getattr(found, "__path__", ())]
    return any(
        part in ("site-packages", "dist-packages") for p in places for part in re.split(r"[\\/]", str(p))
    )


def _is_tree(value: Any) -> bool:
    """Containers whose items may be replaced without the name being rebound."""
    return isinstance(value, dict | list | tuple | deque) and len(value) <= _MAX_ITEMS


def _is_object(value: Any) -> bool:
    """Objects and classes of the user's, whose attributes a function may read: a config, a model, a trainer."""
    if isinstance(value, set):
        return False
    return not _is_library((value if isinstance(value, type) else type(value)).__module__) or isinstance(
        value, types.SimpleNamespace
    )


def _is_array(value: Any) -> bool:
    return isinstance(value, np.ndarray) or hasattr(type(value), "__tracejit_array__")


#: A container as it was: its type, keys (None for sequences), items, and the shadows of items that are containers.
_Shadow = tuple[type, Any, tuple[Any, ...], tuple[tuple[Any, "_Shadow"], ...]]


def _shadow(value: Any) -> _Shadow | None:
    """None if something in the container is a tree of another kind, whose fields may change."""
    keys, items = (tuple(value), tuple(value.values())) if isinstance(value, dict) else (None, tuple(value))
    inner = []
    for item in items:
        if isinstance(item, dict | list | tuple | deque):
            below = _shadow(item)
            if below is None:
                return None
            inner.append((item, below))
        elif item is not None and trees.is_node(item):
            return None
    return type(value), keys, items, tuple(inner)


def _identical(now: Any, shadow: _Shadow) -> bool:
    """True if a container has the very items it had, at every depth: the cheap check that nearly always suffices."""
    kind, keys, items, inner = shadow
    if type(now) is not kind:
        return False
    container: Any = now
    if len(container) != len(items):
        return False
    if keys is None:
        if not all(map(is_, container, items)):
            return False
    elif not all(map(is_, container.values(), items)) or tuple(container) != keys:
        return False
    return all(_identical(item, below) for item, below in inner)


def _same(now: Any, before: Any) -> bool:
    if type(now) is not type(before):
        return False
    if isinstance(now, _SCALARS):
        return bool(now == before) or (now != now and before != before)
    if isinstance(now, types.MethodType):  # made anew at every look-up
        return bool(now == before)
    return False


def _read(container: Any, name: str) -> Any:
    if isinstance(container, types.CellType):
        try:
            return container.cell_contents
        except ValueError:  # emptied
            return _MISSING
    return container.get(name, _MISSING)


def _short(value: Any) -> str:
    if value is _MISSING:
        return "deleted"
    if isinstance(value, np.ndarray):
        return f"array at {id(value):#x}"
    text = repr(value)
    return text if len(text) < 40 else text[:37] + "..."


__all__ = ["Environment", "FrozenValueWarning", "RandomStates", "snapshot"]
