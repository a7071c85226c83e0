"""Weights on disk: ``save`` and ``load`` of any tree through safetensors. Imported by users as ``tj.save``,
``tj.load``.

A file holds arrays by path (``"blocks.0.attn.qkv.weight"``) and no code. Writing is atomic: the file appears
complete or not at all. Format: https://huggingface.co/docs/safetensors
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from typing import Any

import numpy as np
import optree

from tracejit.dtypes import canonical
from tracejit.errors import DTypeError, FileFormatError, ShapeError
from tracejit.tensor import Tensor, is_arraylike

_METADATA = {"format": "tracejit", "version": "1"}


def _named_leaves(tree: Any, op: str) -> tuple[list[str], list[Any], Any]:
    """(paths, leaves, structure); FileFormatError if two leaves share a path (a key with a dot in it)."""
    paths, leaves, spec = optree.tree_flatten_with_path(tree)
    names = [".".join(map(str, path)) or "value" for path in paths]
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise FileFormatError.make(
                f"two leaves of the tree would both be called {name!r}: rename a key", op=op
            )
        seen.add(name)
    return names, leaves, spec


def _is_data(leaf: Any) -> bool:
    """True for what is stored: arrays and numbers. Names, functions and the like belong to the program."""
    return is_arraylike(leaf) or isinstance(leaf, bool | int | float | complex | list)


def _as_stored(name: str, leaf: Any) -> np.ndarray:
    if isinstance(leaf, Tensor):
        raise DTypeError.make(
            f"{name!r} has no value yet: save outside of traced code", op="save", got={name: leaf}
        )
    array = np.asarray(leaf)
    try:
        dtype = canonical(array.dtype, op="save")
    except DTypeError as error:
        raise DTypeError.make(f"{name!r} cannot be stored: {error}", op="save") from None
    return np.array(array, dtype=dtype, order="C", copy=None)


def save(path: str | os.PathLike[str], tree: Any) -> None:
    """Write all arrays and numbers of ``tree`` to the safetensors file ``path``, replacing it atomically.

    Strings, functions and other static leaves are not stored; ``load`` takes them from ``like``. DTypeError
    for an array that has no supported dtype, OSError if the file cannot be written (an existing file is then
    untouched).
    """
    from safetensors.numpy import save as serialize

    names, leaves, _ = _named_leaves(tree, "save")
    arrays = {name: _as_stored(name, leaf) for name, leaf in zip(names, leaves) if _is_data(leaf)}
    payload = serialize(arrays, metadata=_METADATA)
    target = os.path.abspath(os.fspath(path))
    # In the same directory, because a rename is atomic within one file system only.
    handle, temporary = tempfile.mkstemp(prefix=f".{os.path.basename(target)}.", dir=os.path.dirname(target))
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        if os.name == "posix":  # mkstemp makes files private; ours get what open() would give them
            os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def _umask() -> int:
    """The process's file mode mask; reading it means setting it for an instant."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def load(path: str | os.PathLike[str], like: Any = None) -> Any:
    """The tree stored in ``path``, with the structure of ``like``; without ``like``, a dict from path to
    array.

    Every array must have the shape and dtype of its counterpart: ShapeError or FileFormatError names the
    leaf. A file that is truncated, corrupted, or has missing or extra leaves is a FileFormatError. Nothing is
    executed.
    """
    stored = _read(path)
    if like is None:
        return stored
    names, leaves, spec = _named_leaves(like, "load")
    wanted = [name for name, leaf in zip(names, leaves) if _is_data(leaf)]
    missing = [name for name in wanted if name not in stored]
    extra = [name for name in stored if name not in set(wanted)]
    if missing or extra:
        parts = [
            f"{kind} {_listed(found)}"
            for kind, found in (("lacks", missing), ("has in addition", extra))
            if found
        ]
        raise FileFormatError.make(
            f"{os.fspath(path)} does not fit the tree: it {' and '.join(parts)}",
            op="load",
            hint="was it saved from another model? load(path) without like= shows what it holds",
        )
    return spec.unflatten(
        _checked(name, stored[name], leaf, path) if _is_data(leaf) else leaf
        for name, leaf in zip(names, leaves)
    )


def _listed(names: list[str]) -> str:
    return ", ".join(map(repr, names[:4])) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _read(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError
    from safetensors.numpy import load as deserialize

    with open(path, "rb") as file:
        payload = file.read()
    try:
        stored = deserialize(payload)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise FileFormatError.make(
            f"{os.fspath(path)} ({len(payload)} bytes) is not a complete safetensors file of NumPy dtypes: "
            f"{error}",
            op="load",
        ) from None
    # The library gives read-only views of the file's bytes; weights are ordinary arrays.
    return {name: np.array(array) for name, array in stored.items()}


def _checked(name: str, array: np.ndarray, leaf: Any, path: str | os.PathLike[str]) -> Any:
    """``array`` if it is what ``leaf`` is; Python numbers come back as Python numbers."""
    number = type(leaf) in (bool, int, float)
    expected = leaf if is_arraylike(leaf) else np.asarray(leaf)
    if tuple(array.shape) != tuple(expected.shape):
        raise ShapeError.make(
            f"{name!r} has another shape in {os.fspath(path)}",
            op="load",
            got={"file": array, "like": expected},
        )
    if array.dtype != np.dtype(expected.dtype).newbyteorder("="):
        raise FileFormatError.make(
            f"{name!r} has another dtype in {os.fspath(path)}",
            op="load",
            got={"file": array, "like": expected},
            hint="convert the tree or the file with astype",
        )
    return type(leaf)(array.item()) if number else array


__all__ = ["load", "save"]
