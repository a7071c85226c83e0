"""Where values live: which buffer, with which strides. Filled in after fusion, read by ``emit.py``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tracejit.lower import affine
from tracejit.lower.values import LEAF, OP, PROJ, Value

if TYPE_CHECKING:
    from tracejit.lower.fusion import Fusion


@dataclass(frozen=True)
class Place:
    """Element ``offset + sum(strides * index)`` of the buffer of value ``root``."""

    root: Value
    strides: tuple[int, ...]
    offset: int = 0


def place_of(v: Value, fusion: Fusion) -> Place:
    """The place of a value that is in memory (decided on first use)."""
    if v.place is not None:
        return v.place
    if v.target is not None:
        within, strides, offset = v.target
        owner = place_of(within, fusion)
        place = Place(owner.root, strides, owner.offset + offset)
    elif v.layout is not None:
        place = Place(v, v.layout)
    elif v.kind in (LEAF, OP) or (v.kind == PROJ and v.inputs[0].kind == OP) or is_flat(v):
        place = Place(v, affine.contiguous(v.shape))
    else:
        place = Place(v, fusion.preferred_layout(v))
    v.place = place
    return place


def memory_of(v: Value, fusion: Fusion) -> Value:
    """The root value whose buffer holds exactly the required value ``v``, in row-major order."""
    place = place_of(fusion.memory.get(v, v), fusion)
    assert place.offset == 0 and place.root.size == v.size, v
    return place.root


def is_flat(v: Value) -> bool:
    """True if somebody reads ``v`` by its row-major position."""
    return any(m[2] for maps in v.maps.values() for m in maps)


def is_stored(v: Value) -> bool:
    """True if the home of ``v`` must write it to memory."""
    return v.required or any(c is not v.home and v not in c.members for c in v.maps)
