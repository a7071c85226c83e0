"""``@trace``: the decorator, its cache, and the path of a call. What users touch first; everything else hangs below it.

A warm call does: flatten the arguments, build the key, look it up, check guards, run the executable. Tracing is in
``tracing.py``, compilation in ``compilation.py``, key parts in ``signature.py``, closures in ``environment.py``.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tracejit import backend as _backend
from tracejit import source
from tracejit.callplan import Reader, reader
from tracejit.compilation import Entry, compile_entry
from tracejit.config import log, log_enabled
from tracejit.environment import FrozenValueWarning, RandomStates, snapshot
from tracejit.errors import TraceError, TracingError, hide_internal_frames
from tracejit.forking import gate
from tracejit.graph import Graph
from tracejit.signature import Static, check_leaf, difference, leaf_key, leaf_paths
from tracejit.state import state
from tracejit.tensor import Tensor
from tracejit.tracing import Traced, trace_function
from tracejit.trees import NAMESPACE, flatten_fast

if TYPE_CHECKING:
    from tracejit.inspection import Inspection
    from tracejit.profile import Profile

_ndarray = np.ndarray
_RESERVED = ("device", "watch")
_STORM = 16
_MAX_PLANS = 4
_MAX_INLINE_DEPTH = 100


class CacheInfo(NamedTuple):
    """As ``functools.lru_cache``: calls served from the cache, traces made, bound and current number of entries."""

    hits: int
    misses: int
    maxsize: int
    currsize: int


class RetraceWarning(UserWarning):
    """A traced function is traced anew on nearly every call, so it runs slower than plain Python."""


class _Depth(threading.local):
    def __init__(self) -> None:
        self.counts: dict[int, int] = {}


_inlining = _Depth()


class TracedFunction:
    """A function that is recorded once per input signature and then runs compiled. Made by :func:`trace`."""

    def __init__(
        self,
        fn: Callable[..., Any],
        *,
        name: str | None = None,
        device: str | None = None,
        static_argnames: Iterable[str] = (),
        cache_size: int = 128,
        environment: Callable[..., Any] | None = None,
    ) -> None:
        self._fn = fn
        self._name: str = name or str(getattr(fn, "__name__", type(fn).__name__))
        self._device = device
        self._static = frozenset((static_argnames,) if isinstance(static_argnames, str) else static_argnames)
        self._cache_size = int(cache_size)
        self._environment = environment or fn
        if self._cache_size < 1:
            raise ValueError(f"cache_size must be at least 1, got {cache_size}")
        self._cache: OrderedDict[Any, list[Entry]] = OrderedDict()
        #: The fast path by ambient device: readers of arguments, each with its entry; dropped as a whole on every eviction.
        self._plans: dict[Any, tuple[tuple[Reader, Entry], ...]] = {}
        self._lock = threading.RLock()
        self._hits = 0
        self._misses = 0
        self._streak = 0
        self._warned = False
        self._parameters = _check_function(fn, self._static)
        functools.update_wrapper(self, fn, updated=())

    # -- calling ---------------------------------------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the function; ``device=`` and ``watch=`` are tracejit's, all else is the function's."""
        try:
            if not state.busy:
                # The fast path: arguments like those of an earlier call, nobody watching on this thread.
                for read, entry in self._plans.get(state.device, ()):
                    leaves = read(args, kwargs)
                    if leaves is not None and entry.matches(leaves):
                        self._hits += 1
                        entry.used = True
                        return entry.run(leaves)
            return self._general(args, kwargs)
        except Exception as error:
            # Raised once, here, so that a traceback shows one line of ours between the caller and the traced function.
            raise hide_internal_frames(error)  # noqa: B904

    def _general(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Everything the fast path leaves: keywords, unusual leaves, nesting, devices, observers, misses."""
        device: Any = self._device
        given = dict(kwargs)
        if kwargs:
            watch = kwargs.pop("watch", None)
            device = kwargs.pop("device", None) or device
            if watch:
                from tracejit.watching import watch as open_viewer

                with open_viewer():
                    return self._general(args, {k: v for k, v in given.items() if k != "watch"})
        if state.context is not None:
            return self._inline(args, kwargs)
        if state.disable_jit:
            return self._fn(*args, **kwargs)
        if state.observers and not state.debug_nans:  # being watched costs no look-up by flattening either
            for read, entry in self._plans.get(state.device, ()):
                found = read(args, given)
                if found is not None and entry.matches(found):
                    self._hits += 1
                    entry.used = True
                    return entry.run_special(found)
        entry, leaves = self._find(args, kwargs, _backend.resolve(device))
        if not (state.debug_nans or self._static):
            self._plan(args, given, entry)
        if state.debug_nans or state.observers:
            return entry.run_special(leaves)
        return entry.run(leaves)

    def _plan(self, args: tuple[Any, ...], kwargs: dict[str, Any], entry: Entry) -> None:
        """From the third call on, an entry has a reader for arguments like these; the newest are tried first."""
        entry.calls += 1
        # One for each way to ask for the entry's device: the default, a block, a keyword.
        way = (state.device, kwargs.get("device"))
        if entry.calls < 3 or way in entry.planned:
            return
        entry.planned.add(way)
        read = reader(args, kwargs)
        if read is not None:
            with self._lock:
                before = self._plans.get(state.device, ())
                # A new dict, so that an eviction on another thread is not undone half-way.
                self._plans = {**self._plans, state.device: ((read, entry), *before)[:_MAX_PLANS]}

    def _find(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], device: _backend.Device
    ) -> tuple[Entry, Sequence[Any]]:
        """The entry for a call, made if need be, and the leaves of the call."""
        static: tuple[Any, ...] = ()
        if self._static:
            args, kwargs, static = self._split_static(args, kwargs)
        leaves, tree = flatten_fast((args, kwargs), None, False, NAMESPACE)
        leaves, key = self._full_key(leaves, [tree, device, static], args, kwargs)
        full = tuple(key)
        found = self._cache.get(full)
        for entry in found or ():
            if entry.matches(leaves):
                self._hits += 1
                self._touch(full)
                return entry, leaves
        return self._miss(full, leaves, tree, args, kwargs, static, found), leaves

    def _full_key(
        self, leaves: Sequence[Any], head: list[Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[list[Any], list[Any]]:
        """``head`` and one part per leaf; leaves of unusual types are converted to arrays or become static."""
        key, new = head, []
        paths: list[str] | None = None
        for i, leaf in enumerate(leaves):
            kind = type(leaf)
            if kind is _ndarray:
                key.append((leaf.dtype, leaf.shape))
            elif kind is float or kind is int:
                key.append(kind)
            elif hasattr(leaf, "__tracejit_array__"):
                key.append((leaf.dtype, leaf.shape))
            else:
                try:
                    part, leaf = leaf_key(leaf, "?")
                except TraceError:
                    paths = paths or leaf_paths(args, kwargs, self._parameters)
                    part, leaf = leaf_key(leaf, paths[i])
                key.append(part)
            new.append(leaf)
        return new, key

    def _touch(self, key: Any) -> None:
        # The key may have been evicted by another thread meanwhile; the entry in hand stays valid.
        with contextlib.suppress(KeyError):
            self._cache.move_to_end(key)

    def _evict(self) -> None:
        """Drop the least recently used key; keys used through the fast path since the last look get a second chance."""
        candidates = list(self._cache)[:-1]  # never the newest
        victim = candidates[0]
        for key in candidates:
            entries = self._cache[key]
            if not any(e.used for e in entries):
                victim = key
                break
            for e in entries:
                e.used = False
        del self._cache[victim]
        self._plans = {}

    def _split_static(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any], tuple[Any, ...]]:
        """Take the arguments named in ``static_argnames`` out of the tree; they become part of the key by value."""
        try:
            bound = inspect.signature(self._fn).bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{self._name}() {error}") from None
        dynamic: dict[str, Any] = {}
        static = []
        for name, value in bound.arguments.items():
            if name in self._static:
                try:
                    static.append((name, Static(value)))
                except TypeError:
                    raise TracingError.make(
                        f"static argument {name!r} of {self._name} is not hashable", got={name: value}
                    ) from None
            elif inspect.signature(self._fn).parameters[name].kind in (
                inspect.Parameter.VAR_POSITIONAL,
                inspect.Parameter.VAR_KEYWORD,
            ):
                raise TracingError.make(
                    f"static_argnames cannot be combined with *args or **kwargs in {self._name}"
                )
            else:
                dynamic[name] = value
        return (), dynamic, tuple(static)

    def _inline(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A traced function called while another is traced becomes part of it, under a scope of its name."""
        counts = _inlining.counts
        depth = counts.get(id(self), 0)
        if depth >= _MAX_INLINE_DEPTH:
            raise TracingError.make(
                f"{self._name} calls itself without end while being traced",
                hint="recursion must stop on a Python value (a depth counter), not on an array's; or use tj.while_loop",
                where=source.location(),  # without a scope of a hundred names
            )
        counts[id(self)] = depth + 1
        try:
            with source.named_scope(_scope_name(self._name)):
                return self._fn(*args, **kwargs)
        finally:
            counts[id(self)] = depth

    # -- a miss ------------------------------------------------------------------------------------------------------

    def _miss(
        self,
        key: Any,
        leaves: Sequence[Any],
        tree: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        static: tuple[Any, ...],
        seen: list[Entry] | None,
    ) -> Entry:
        with gate, self._lock:
            for entry in self._cache.get(key, ()):  # another thread may have traced it while we waited
                if entry.matches(leaves):
                    self._hits += 1
                    return entry
            _backend.prepare(key[1])
            paths = leaf_paths(args, kwargs, self._parameters)
            if log_enabled("retrace") and self._cache:
                log("retrace", self._explain(key, leaves, paths, seen))
            self._watch_storm(key, leaves, paths, seen)
            objects = [leaf for leaf, part in zip(leaves, key[3:]) if isinstance(part, Static)]
            objects += [part.value for _, part in static]
            randomness = RandomStates(self._environment, objects)
            try:
                traced = self._trace(key, leaves, tree, paths, static)
                entry = compile_entry(traced, self._name, key[1], leaves)
            except RecursionError as error:
                raise TracingError.make(f"{self._name} recursed too deeply while being traced") from error
            if drawn := randomness.used():
                warnings.warn(
                    f"{self._name} drew from {drawn} while it was traced: these numbers are now constants of the compiled "
                    "program. Use tj.random with a key argument, or draw outside and pass the array.",
                    FrozenValueWarning,
                    stacklevel=source.stack_level(),
                )
            captured = list(zip(traced.captures, traced.uses))
            entry.environment = snapshot(self._environment, objects, captured) or None
            entry.key, entry.paths = key, paths
            # Newest first: after a closure changed, its newest value is the likeliest.
            self._cache[key] = [entry, *self._cache.get(key, [])][:8]
            self._cache.move_to_end(key)
            while len(self._cache) > self._cache_size:
                self._evict()
            self._misses += 1
            return entry

    def _trace(
        self, key: Any, leaves: Sequence[Any], tree: Any, paths: Sequence[str], static: tuple[Any, ...]
    ) -> Traced:
        fn = self._fn
        if static:
            fn = functools.partial(fn, **{name: part.value for name, part in static})
        for leaf, path in zip(leaves, paths):
            check_leaf(leaf, path)
        return trace_function(fn, self._name, leaves, key[3:], tree, paths)

    def _explain(
        self, key: Any, leaves: Sequence[Any], paths: Sequence[str], seen: list[Entry] | None
    ) -> str:
        """Why this call was not in the cache, measured against the nearest earlier entry."""
        if seen:
            entry = seen[0]
            reasons = [
                f"argument {paths[g.index]} was used as the Python value {g.value!r} at {g.source}, now {leaves[g.index]!r}"
                for g in entry.traced.guards
                if leaves[g.index] != g.value
            ]
            reasons += (
                [f"changed since: {c}" for c in entry.environment.changes()] if entry.environment else []
            )
            return f"{self._name}: " + "; ".join(reasons or ["a guard failed"])
        best: list[str] | None = None
        for entries in reversed(self._cache.values()):
            old = entries[0].key
            if old[0] != key[0] or len(old) != len(key):
                continue
            lines = difference(old[3:], key[3:], paths)
            if old[1] != key[1]:
                lines.insert(0, f"device: {old[1]} -> {key[1]}")
            if old[2] != key[2]:
                lines.insert(0, f"static arguments: {old[2]} -> {key[2]}")
            if best is None or len(lines) < len(best):
                best = lines
        return f"{self._name}: " + ("; ".join(best) if best else self._explain_structure(paths))

    def _explain_structure(self, paths: Sequence[str]) -> str:
        """How the argument trees differ from the nearest earlier ones."""
        now, changes = set(paths), []
        known = [set(entries[0].paths) for entries in reversed(self._cache.values())]
        before = min(known, key=lambda old: len(old ^ now))
        for what, found in (
            ("new", [p for p in paths if p not in before]),
            ("missing", sorted(before - now)),
        ):
            if found:
                changes.append(f"{what}: {', '.join(found[:4])}" + (", ..." if len(found) > 4 else ""))
        return "the arguments have a new tree structure" + (f" ({'; '.join(changes)})" if changes else "")

    def _watch_storm(
        self, key: Any, leaves: Sequence[Any], paths: Sequence[str], seen: list[Entry] | None
    ) -> None:
        """Warn once when a function keeps being traced instead of being served from the cache."""
        self._streak += 1
        if not self._warned and self._streak >= _STORM and self._hits < 2 * self._streak:
            self._warned = True
            warnings.warn(
                f"{self._name} was traced {self._streak} times for {self._hits + self._streak} calls; last reason: "
                f"{self._explain(key, leaves, paths, seen)}. Keep shapes fixed (pad the last batch) or pass changing "
                "Python values as arrays or floats.",
                RetraceWarning,
                stacklevel=source.stack_level(),
            )

    # -- looking inside ----------------------------------------------------------------------------------------------

    def cache_info(self) -> CacheInfo:
        """Hits, misses, bound and size of the cache."""
        return CacheInfo(self._hits, self._misses, self._cache_size, len(self._cache))

    def cache_clear(self) -> None:
        """Forget every trace and the counters."""
        with self._lock:
            self._cache.clear()
            self._plans = {}
            self._hits = self._misses = self._streak = 0
            self._warned = False

    def _entry_for(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Entry, Sequence[Any]]:
        """The cache entry for a call, made if need be, without running it; also the leaves of the call."""
        kwargs = dict(kwargs)
        kwargs.pop("watch", None)
        return self._find(args, kwargs, _backend.resolve(kwargs.pop("device", None) or self._device))

    def graph(self, *args: Any, **kwargs: Any) -> Graph:
        """The optimised graph that a call with these arguments runs (traced if need be, not run)."""
        return self._entry_for(args, kwargs)[0].optimised

    def inspect(self, *args: Any, **kwargs: Any) -> Inspection:
        """Everything about the program for these arguments: graphs, kernels, memory plan, generated code."""
        return self._entry_for(args, kwargs)[0].inspection()

    def profile(self, *args: Any, repeat: int = 20, **kwargs: Any) -> Profile:
        """Run the call ``repeat`` times under observation: a table of kernels with times; ``.to_chrome_trace(path)``."""
        from tracejit.profile import profile_call

        entry, leaves = self._entry_for(args, kwargs)
        return profile_call(entry, leaves, repeat)

    # -- being a function --------------------------------------------------------------------------------------------

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self if instance is None else _BoundMethod(self, instance)

    def __reduce__(self) -> str:
        # Like a function: pickled by name, copied as itself.
        return str(getattr(self, "__qualname__", self._name))

    def __repr__(self) -> str:
        info = self.cache_info()
        return f"<traced {self._name}: {info.currsize} programs, {info.hits} hits, {info.misses} traces>"


class _BoundMethod:
    """A traced function looked up on an instance: the instance is the first argument of everything."""

    def __init__(self, function: TracedFunction, instance: Any) -> None:
        self.__func__ = function
        self.__self__ = instance
        self.__wrapped__ = function._fn

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.__func__(self.__self__, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.__func__, name)
        if name in ("graph", "inspect", "profile"):
            return functools.partial(value, self.__self__)
        return value


def _check_function(fn: Any, static: frozenset[str]) -> list[str]:
    """Refuse what cannot be traced, at decoration; returns the names of the positional parameters."""
    if not callable(fn):
        raise TypeError(f"@trace takes a function, got {type(fn).__name__}")
    if inspect.isgeneratorfunction(fn) or inspect.iscoroutinefunction(fn) or inspect.isasyncgenfunction(fn):
        raise TracingError.make(
            f"{getattr(fn, '__name__', fn)} is a generator or coroutine, which cannot be traced",
            hint="return a list or tuple",
        )
    if isinstance(fn, type):
        raise TracingError.make(f"{fn.__name__} is a class", hint="decorate its methods instead")
    try:
        parameters = inspect.signature(fn).parameters
    except (TypeError, ValueError):  # some builtins have none
        return []
    for name in _RESERVED:
        if name in parameters:
            raise TracingError.make(
                f"{getattr(fn, '__name__', fn)} has a parameter named {name!r}, which @trace reserves for its per-call "
                f"keyword {name}=",
                hint="rename the parameter",
            )
    has_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    for name in static:
        if name not in parameters and not has_any:
            raise TracingError.make(
                f"static_argnames names {name!r}, which is not a parameter of {getattr(fn, '__name__', fn)}",
                hint=f"parameters: {', '.join(parameters)}",
            )
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [p.name for p in parameters.values() if p.kind in positional]


def _scope_name(name: str) -> str:
    return name.replace("/", "_").replace('"', "") or "function"


def trace(
    fn: Callable[..., Any] | None = None,
    *,
    device: str | None = None,
    static_argnames: Iterable[str] = (),
    cache_size: int = 128,
) -> Any:
    """Decorate a NumPy function so that it is recorded once per input signature and then runs compiled.

    Use as ``@trace`` or ``@trace(device="wgpu", static_argnames=("mode",), cache_size=32)``. Calls take two more
    keywords: ``device=`` ("cpu", "wgpu", "wgpu:1", "numpy") and ``watch=True`` (open the viewer on this call).

    Arrays are traced by shape and dtype, Python ints and floats weakly typed and never cause a retrace unless their
    value is needed while tracing, everything else by value. Closed-over arrays are inputs read at each call.
    """
    if fn is None:
        return functools.partial(trace, device=device, static_argnames=static_argnames, cache_size=cache_size)
    if isinstance(fn, staticmethod | classmethod):
        raise TracingError.make("put @trace below @staticmethod or @classmethod")
    return TracedFunction(fn, device=device, static_argnames=static_argnames, cache_size=cache_size)


__all__ = ["CacheInfo", "RetraceWarning", "Tensor", "TracedFunction", "trace"]
