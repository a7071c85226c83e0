"""The base class of modules: frozen dataclasses that are pytrees, in the style of equinox (Kidger & Garcia,
2021).

A module is its fields. Arrays, other modules and containers of them are children of the tree; fields
declared with :func:`static_field` are part of its structure, so changing one retraces. To write your own::

    class MLP(nn.Module):
        hidden: nn.Linear
        out: nn.Linear

        def __init__(self, *, rng):
            self.hidden = nn.Linear(784, 128, rng=rng)
            self.out = nn.Linear(128, 10, rng=rng)

        def __call__(self, x):
            return self.out(nn.relu(self.hidden(x)))

Classes are registered in optree's global namespace, so any ``tree_flatten`` sees them. Flattening sits on the
path of every warm call, hence the attribute getters written in C instead of a loop over fields.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Callable
from typing import Any, ClassVar, Self, dataclass_transform

import optree
from optree.registry import __GLOBAL_NAMESPACE as _GLOBAL_NAMESPACE

from tracejit.errors import describe

_BUILDING = "_building"


def static_field(*, default: Any = dataclasses.MISSING, **kwargs: Any) -> Any:
    """A field that belongs to the module's structure (an int, a name, a function): hashable, never traced.

    Without it a number in a module is a leaf like any array: traced, differentiated, stored by ``tj.save``.
    """
    metadata = {**kwargs.pop("metadata", {}), "static": True}
    return dataclasses.field(default=default, metadata=metadata, **kwargs)


def _getter(names: tuple[str, ...]) -> Callable[[Any], tuple[Any, ...]]:
    """A function from an instance to the tuple of the named attributes."""
    if not names:
        return lambda module: ()
    get = operator.attrgetter(*names)
    return get if len(names) > 1 else lambda module: (get(module),)


class _ModuleMeta(type):
    """Opens an instance for assignment during ``__init__``, then checks and freezes it."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        self: Any = object.__new__(cls)  # type: ignore[arg-type]
        fields = self.__dict__
        fields[_BUILDING] = True
        self.__init__(*args, **kwargs)
        del fields[_BUILDING]
        missing = [f.name for f in dataclasses.fields(cls) if f.name not in fields]  # type: ignore[arg-type]
        if missing:
            raise TypeError(f"{cls.__name__}.__init__ did not set {', '.join(missing)}")
        for name in cls._static_names:  # type: ignore[attr-defined]
            try:
                hash(fields[name])
            except TypeError:
                raise TypeError(
                    f"the static field {cls.__name__}.{name} must be hashable, not {type(fields[name])}"
                ) from None
        return self


@dataclass_transform(eq_default=False, field_specifiers=(dataclasses.field, static_field))
class Module(metaclass=_ModuleMeta):
    """Base of all modules; see the module's docstring. Instances are immutable: :meth:`replace` makes changed
    copies.
    """

    _dynamic_names: ClassVar[tuple[str, ...]] = ()
    _static_names: ClassVar[tuple[str, ...]] = ()
    _own_init: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" in cls.__dict__:
            cls._own_init = True
        dataclasses.dataclass(init=not cls._own_init, eq=False, repr=False)(cls)
        fields = dataclasses.fields(cls)  # type: ignore[arg-type]
        dynamic = tuple(f.name for f in fields if not f.metadata.get("static"))
        static = tuple(f.name for f in fields if f.metadata.get("static"))
        cls._dynamic_names, cls._static_names = dynamic, static
        get_dynamic, get_static = _getter(dynamic), _getter(static)
        new, names = object.__new__, dynamic + static

        def flatten(module: Any) -> tuple[Any, Any, tuple[str, ...]]:
            values = get_static(module)
            # The types as well: 2 == 2.0, but a program for one of them is wrong for the other.
            return get_dynamic(module), (values, (*map(type, values),)), dynamic

        def unflatten(structure: Any, children: Any) -> Any:
            module = new(cls)
            module.__dict__.update(zip(names, (*children, *structure[0])))
            return module

        optree.register_pytree_node(
            cls,  # type: ignore[arg-type]
            flatten,
            unflatten,
            path_entry_type=optree.GetAttrEntry,
            namespace=_GLOBAL_NAMESPACE,
        )

    def __setattr__(self, name: str, value: Any) -> None:
        if _BUILDING not in self.__dict__:
            raise dataclasses.FrozenInstanceError(
                f"cannot assign {type(self).__name__}.{name}: modules are immutable, use replace({name}=...)"
            )
        if name not in type(self).__dataclass_fields__:  # type: ignore[attr-defined]
            raise AttributeError(
                f"{type(self).__name__} has no field {name!r}: declare it in the class body, `{name}: type`"
            )
        self.__dict__[name] = value

    def __delattr__(self, name: str) -> None:
        raise dataclasses.FrozenInstanceError(
            f"modules are immutable, cannot delete {type(self).__name__}.{name}"
        )

    def replace(self, **fields: Any) -> Self:
        """A copy with the given fields changed; TypeError for a name that is not a field."""
        known = type(self).__dataclass_fields__  # type: ignore[attr-defined]
        unknown = [name for name in fields if name not in known]
        if unknown:
            raise TypeError(
                f"{type(self).__name__} has no field {', '.join(unknown)}; its fields are {', '.join(known)}"
            )
        copy = object.__new__(type(self))
        copy.__dict__.update(self.__dict__, **fields)
        return copy

    def __repr__(self) -> str:
        return _show(self, "")


def _show(value: Any, indent: str) -> str:
    """One line for a module of arrays, an indented tree for a module of modules."""
    deeper = indent + "  "
    if isinstance(value, Module):
        parts = [(f"{n}=", getattr(value, n, None)) for n in (*value._dynamic_names, *value._static_names)]
        shown = [name + _show(part, deeper) for name, part in parts if part is not None]
        head = type(value).__name__
        if not any(_holds_module(part) for _, part in parts):
            return f"{head}({', '.join(shown)})"
        return (
            f"{head}(  # {parameter_count(value):,} parameters\n"
            + "".join(f"{deeper}{s},\n" for s in shown)
            + f"{indent})"
        )
    if isinstance(value, list | tuple) and _holds_module(value):
        left, right = "[]" if isinstance(value, list) else "()"
        return left + "\n" + "".join(f"{deeper}{_show(v, deeper)},\n" for v in value) + indent + right
    if isinstance(value, dict) and _holds_module(value):
        return (
            "{\n" + "".join(f"{deeper}{k!r}: {_show(v, deeper)},\n" for k, v in value.items()) + indent + "}"
        )
    if callable(value) and hasattr(value, "__name__"):
        return str(value.__name__)
    return describe(value)


def _holds_module(value: Any) -> bool:
    if isinstance(value, dict):
        value = tuple(value.values())
    return isinstance(value, Module) or (
        isinstance(value, list | tuple) and any(_holds_module(v) for v in value)
    )


def parameter_count(tree: Any) -> int:
    """How many floating-point numbers the arrays of a tree hold."""
    return sum(
        math.prod(leaf.shape)
        for leaf in optree.tree_leaves(tree)
        if hasattr(leaf, "shape") and hasattr(leaf, "dtype") and leaf.dtype.kind == "f"
    )


__all__ = ["Module", "parameter_count", "static_field"]
