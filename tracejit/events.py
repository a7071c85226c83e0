"""The public event stream: what an executing program tells the outside world, and nothing else.

Backends emit these events when an observer is attached; the viewer, the profiler, recordings, the Chrome-trace export
and the tests consume them. One :class:`CompileEvent` is sent per compiled program, then one :class:`StepEvent` per call.
Without an observer a program pays nothing.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np

from tracejit.state import changed, state

SCHEMA_VERSION = 1

_program_ids = itertools.count(1)


def next_program_id() -> int:
    """A process-wide unique number for a freshly compiled program."""
    return next(_program_ids)


@dataclass(frozen=True)
class KernelInfo:
    """One schedulable unit of a program: which graph nodes run in it and what it costs.

    ``source`` returns generated code (LLVM IR, WGSL, ...) on demand; None for interpreted kernels.
    ``bytes`` is the memory traffic in bytes and ``flops`` the floating-point operations of one execution.
    ``kind`` is one of the kernel kinds of DESIGN section 4 in lower case, or ``"op"`` for an interpreted node.
    """

    id: int
    name: str
    kind: str
    nodes: tuple[int, ...]
    bytes: int = 0
    flops: int = 0
    source: Callable[[], str] | None = None

    def to_json(self, *, with_source: bool = False) -> dict[str, Any]:
        """A JSON-ready dict; the generated source is included only on request because it can be large."""
        out: dict[str, Any] = {
            "id": self.id,
            "name": self.name,
            "kind": self.kind,
            "nodes": list(self.nodes),
            "bytes": int(self.bytes),
            "flops": int(self.flops),
        }
        if with_source and self.source is not None:
            out["source"] = self.source()
        return out


@dataclass(frozen=True)
class CompileEvent:
    """Sent once per compiled program, before its first step.

    ``graph`` is the JSON form of the graph that executes (``Graph.to_json()``); node ids in ``kernels`` index it.
    ``ops`` describes each op that occurs (category, meaning, formula, shape rule, gradient rule), and each composite
    under its name with a slash (``softmax/``), so that a consumer needs no op registry of its own.
    """

    program: int
    name: str
    device: str
    graph: Mapping[str, Any]
    kernels: Sequence[KernelInfo]
    ops: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    def to_json(self, *, with_source: bool = True) -> dict[str, Any]:
        """A JSON-ready dict (the payload of the wire and of recordings)."""
        return {
            "schema": SCHEMA_VERSION,
            "program": self.program,
            "name": self.name,
            "device": self.device,
            "graph": dict(self.graph),
            "kernels": [k.to_json(with_source=with_source) for k in self.kernels],
            "ops": {k: dict(v) for k, v in self.ops.items()},
        }


@dataclass(slots=True, eq=False)  # frozen would cost 2 us on every watched call
class StepEvent:
    """Sent once per call of an observed program: parallel arrays, one entry per executed kernel. Not to be changed.

    The arrays are empty when no observer wanted this call timed (:func:`wants_times`): it then ran at full speed, and
    ``finish`` equals ``begin`` where the end is not known (a GPU still at work).

    ``start``/``end`` are nanoseconds on the host's ``time.perf_counter_ns`` clock (device timestamps are shifted onto
    it), ``live`` the bytes of intermediate and output memory alive while the kernel runs, ``lane`` a small integer that
    separates concurrent queues or devices. ``loss`` is the first scalar floating-point output, if there is one.
    ``values`` answers :meth:`Observer.wanted` (node id -> concrete array). ``nan_node`` is the first node with a
    non-finite value when ``tj.debug_nans`` is on.
    """

    program: int
    step: int
    kernels: np.ndarray  # uint32[n]
    start: np.ndarray  # int64[n]
    end: np.ndarray  # int64[n]
    live: np.ndarray  # int64[n]
    lane: np.ndarray  # uint8[n]
    begin: int  # ns, call entered
    finish: int  # ns, results ready
    loss: float | None = None
    values: Mapping[int, np.ndarray] = field(default_factory=dict)
    nan_node: int | None = None


@runtime_checkable
class Observer(Protocol):
    """What a consumer of the stream implements. Calls come from the thread that runs the program; return quickly.

    An observer may also have a method ``timed(program) -> bool``, asked before each call: False lets the call run
    without kernel times, as fast as if nobody watched. An observer without it gets the times of every call. And it may
    have a method ``resting(program) -> bool``: True lets the call run without telling it anything at all.
    """

    def on_compile(self, event: CompileEvent) -> None:
        """A program was compiled (or an already compiled one is seen by this observer for the first time)."""
        ...

    def on_step(self, event: StepEvent) -> None:
        """A program finished one call."""
        ...

    def wanted(self, program: int) -> Sequence[int]:
        """Node ids whose values the observer wants with the next step; empty almost always."""
        ...


class Recorder:
    """An observer that keeps everything in memory: for tests, ``profile()`` and small scripts."""

    def __init__(self) -> None:
        self.compiles: list[CompileEvent] = []
        self.steps: list[StepEvent] = []
        self.want: dict[int, tuple[int, ...]] = {}

    def on_compile(self, event: CompileEvent) -> None:
        """Keep the compile event."""
        self.compiles.append(event)

    def on_step(self, event: StepEvent) -> None:
        """Keep the step event."""
        self.steps.append(event)

    def wanted(self, program: int) -> Sequence[int]:
        """The nodes put into ``want[program]`` by the test or script."""
        return self.want.get(program, ())


def current_observers() -> tuple[Observer, ...]:
    """Observers attached to this thread, outermost first; the empty tuple when nobody watches."""
    return state.observers


def at_rest(observers: Sequence[Observer], program: int) -> bool:
    """Whether none of the observers wants to hear of the next call of a program."""
    for observer in observers:
        resting = getattr(observer, "resting", None)
        if resting is None or not resting(program):
            return False
    return bool(observers)


def wants_times(observers: Sequence[Observer], program: int) -> bool:
    """Whether any of the observers wants kernel times for the next call of a program."""
    wanted = False
    for observer in observers:  # everyone is asked: an observer may use the question to look around
        timed = getattr(observer, "timed", None)
        wanted |= timed is None or timed(program)
    return wanted


@contextlib.contextmanager
def observe(observer: Observer) -> Iterator[Observer]:
    """Attach ``observer`` to every program run by this thread inside the block."""
    with changed(observers=(*state.observers, observer)):
        yield observer
