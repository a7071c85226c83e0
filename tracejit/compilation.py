"""From a traced function to something that runs: optimise, lower, compile; and the cache entry that runs it.

Called by ``jit.py`` on a miss; :meth:`Entry.run` is the last stretch of the hot call path.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tracejit import events
from tracejit.backend import Device, Executable
from tracejit.callplan import builder
from tracejit.config import log, log_enabled
from tracejit.environment import Environment
from tracejit.fingerprint import program_key
from tracejit.graph import Graph
from tracejit.ops.composites import op_table
from tracejit.passes import checking, optimise
from tracejit.program import Program
from tracejit.state import state
from tracejit.tracing import Traced

if TYPE_CHECKING:
    from tracejit.inspection import Inspection

_NO_KERNELS, _NO_TIMES, _NO_LANES = np.zeros(0, np.uint32), np.zeros(0, np.int64), np.zeros(0, np.uint8)


def build_program(graph: Graph, device: Device) -> Program:
    """The program of ``graph`` for ``device``; without kernels when the backend interprets graphs."""
    capabilities = device.backend.capabilities(device.spec)
    if capabilities is None:
        return Program(graph.name, graph, (), (), (), ())
    from tracejit.lower import lower

    return lower(graph, capabilities)


class Stages:
    """The optimised graph and the program behind an executable; made on first use when it came from a disk cache."""

    __slots__ = ("_device", "_graph", "_optimised", "_program")

    def __init__(self, graph: Graph, device: Device) -> None:
        self._graph, self._device = graph, device
        self._optimised: Graph | None = None
        self._program: Program | None = None

    @property
    def optimised(self) -> Graph:
        """What the passes make of the recorded graph."""
        if self._optimised is None:
            self._optimised = optimise(self._graph)
        return self._optimised

    @property
    def program(self) -> Program:
        """What the lowering makes of that."""
        if self._program is None:
            self._program = build_program(self.optimised, self._device)
        return self._program


class Entry:
    """One compiled specialisation of a traced function: guards, executable, and how results are put together."""

    __slots__ = (
        "_build",
        "_loss_at",
        "_single",
        "_variants",
        "arity",
        "calls",
        "captures",
        "device",
        "environment",
        "executable",
        "fixups",
        "guards",
        "id",
        "key",
        "name",
        "paths",
        "planned",
        "scalars",
        "seen_by",
        "stages",
        "steps",
        "times",
        "trace_time",
        "traced",
        "used",
    )

    def __init__(
        self,
        traced: Traced,
        stages: Stages,
        executable: Executable,
        device: Device,
        name: str,
        fixups: Any,
    ) -> None:
        self.traced = traced
        self.stages = stages
        self.executable = executable
        self.device = device
        self.name = name
        self.environment: Environment | None = None
        self.key: Any = None
        self.paths: Sequence[str] = ()
        self.guards = tuple((g.index, g.value) for g in traced.guards)
        self.captures = list(traced.captures)
        self.fixups = fixups
        #: Leaf positions that are inputs; None = all of them.
        self.arity: tuple[int, ...] | None = None
        self.id = events.next_program_id()
        self.steps = 0
        self.times: dict[str, float] = {}
        self.seen_by: weakref.WeakSet[Any] = weakref.WeakSet()
        self._variants: dict[tuple[int, ...], Executable] = {}
        on_host = device.backend.on_host
        # NumPy functions return scalars, not 0-d arrays; device results stay on the device.
        results = traced.graph.outputs  # the passes keep shapes and types
        self.scalars = tuple(i for i, n in enumerate(results) if n.shape == ()) if on_host else ()
        losses = (i for i, n in enumerate(results) if n.shape == () and n.dtype.kind == "f")
        self._loss_at: int | None = next(losses, None)
        tree = traced.out_tree
        self._single = len(traced.outputs) == 1 and traced.outputs[0] == ("out", 0) and tree.num_nodes == 1
        #: Set by the fast path; the eviction gives used entries a second chance.
        self.used = False
        #: Calls of the general path, and the ways to call for which ``jit.py`` has tried to make a reader.
        self.calls = 0
        self.planned: set[Any] = set()
        self._build = builder(tree, traced.outputs, self.scalars)

    @property
    def optimised(self) -> Graph:
        """The graph that runs."""
        return self.stages.optimised

    @property
    def program(self) -> Program:
        """Its kernels; without any when the backend interprets graphs."""
        return self.stages.program

    def matches(self, leaves: Sequence[Any]) -> bool:
        """True if the guards hold: scalar values the graph depends on, and what the function read from outside."""
        for index, value in self.guards:
            now = leaves[index]
            if now != value or type(now) is not type(value):
                return False
        environment = self.environment
        return environment is None or environment.unchanged() or self._follow(environment)

    def _follow(self, environment: Environment) -> bool:
        """Where captured arrays were only replaced by others of their type, use the new ones: the graph stays right."""
        found = environment.rebound()
        if found is None:
            return False
        captures = list(self.captures)
        for old, new in found[0]:
            where = [i for i, c in enumerate(captures) if c is old]
            if len(where) != 1 or (isinstance(new, np.ndarray) and not new.dtype.isnative):
                return False
            captures[where[0]] = new
        # A call on another thread meanwhile sees the old arrays or the new ones, as in plain Python.
        self.captures, self.environment = captures, found[1]
        return True

    def gather(self, leaves: Sequence[Any]) -> Sequence[Any]:
        """The inputs of the executable: the dynamic leaves in order, then the captured arrays."""
        inputs: Any = leaves if self.arity is None else [leaves[i] for i in self.arity]
        if self.fixups:
            inputs = list(inputs)
            for i in self.fixups:  # byte-swapped arrays
                value = inputs[i]
                inputs[i] = value.astype(value.dtype.newbyteorder("="))
        if self.captures:
            inputs = [*inputs, *self.captures]
        return inputs

    def finish(self, outs: list[Any]) -> Any:
        """The result tree from the executable's outputs."""
        if self._build is not None:
            return self._build(outs)
        for i in self.scalars:
            outs[i] = outs[i][()]
        if self._single:
            return outs[0]
        traced = self.traced
        return traced.out_tree.unflatten([outs[v] if kind == "out" else v for kind, v in traced.outputs])

    def run(self, leaves: Sequence[Any]) -> Any:
        """Run unobserved."""
        return self.finish(self.executable(self.gather(leaves)))

    def run_special(self, leaves: Sequence[Any]) -> Any:
        """Run under observers or ``debug_nans``."""
        if state.debug_nans:
            return self._run_checked(leaves)
        observers = events.current_observers()
        if events.at_rest(observers, self.id):
            self.steps += 1
            return self.run(leaves)
        if events.wants_times(observers, self.id):
            return self.run_observed(leaves, observers)[0]
        return self._run_counted(leaves, observers)

    # -- observed ----------------------------------------------------------------------------------------------------

    def compile_event(self) -> events.CompileEvent:
        """What observers get once: graph, kernels, op table."""
        return events.CompileEvent(
            self.id,
            self.name,
            str(self.device),
            self.optimised.to_json(),
            tuple(self.executable.kernels),
            op_table(self.optimised),
        )

    def announce(self, observer: events.Observer) -> None:
        """Send the compile event to an observer that has not had it."""
        if observer not in self.seen_by:
            self.seen_by.add(observer)
            observer.on_compile(self.compile_event())

    def run_observed(
        self, leaves: Sequence[Any], observers: Sequence[events.Observer]
    ) -> tuple[Any, events.StepEvent]:
        """Run once with kernel times and tell ``observers``; returns the result and the event."""
        for observer in observers:
            self.announce(observer)
        inputs = self.gather(leaves)
        wanted = sorted({w for o in observers for w in o.wanted(self.id)})
        values = self._values(tuple(wanted), inputs) if wanted else {}
        begin = time.perf_counter_ns()
        outs, timing = self.executable.observed(inputs)
        finish = time.perf_counter_ns()
        loss = self._loss(outs)
        event = events.StepEvent(
            self.id,
            self.steps,
            timing.kernels,
            timing.start,
            timing.end,
            timing.live,
            timing.lane,
            begin,
            finish,
            loss,
            values,
        )
        self.steps += 1
        result = self.finish(outs)
        for observer in observers:
            observer.on_step(event)
        return result, event

    def _run_counted(self, leaves: Sequence[Any], observers: Sequence[events.Observer]) -> Any:
        """Run at full speed; observers learn that it ran, how long it took and, on the host, the loss."""
        for observer in observers:
            self.announce(observer)
        inputs = self.gather(leaves)
        begin = time.perf_counter_ns()
        outs = self.executable(inputs)
        if self.device.backend.on_host:
            finish, loss = time.perf_counter_ns(), self._loss(outs)
        else:  # a GPU has only been given its work, and waiting for it would slow the program
            finish, loss = begin, None
        event = events.StepEvent(
            self.id, self.steps, _NO_KERNELS, _NO_TIMES, _NO_TIMES, _NO_TIMES, _NO_LANES, begin, finish, loss
        )
        self.steps += 1
        result = self.finish(outs)
        for observer in observers:
            observer.on_step(event)
        return result

    def _loss(self, outs: Sequence[Any]) -> float | None:
        """The first scalar floating-point output."""
        return None if self._loss_at is None else float(outs[self._loss_at])

    def _values(self, wanted: tuple[int, ...], inputs: Sequence[Any]) -> dict[int, np.ndarray]:
        """Values of intermediate nodes, from a variant of the program that also returns them (made on first request)."""
        nodes = [
            self.optimised.nodes[i]
            for i in wanted
            if 0 <= i < len(self.optimised) and not self.optimised.nodes[i].avals
        ]
        key = tuple(self.optimised.id(n) for n in nodes)
        variant = self._variants.get(key)
        backend = self.device.backend
        if variant is None:
            graph = Graph.build(f"{self.name}_values", self.optimised.inputs, nodes)
            variant = backend.compile(build_program(graph, self.device), self.device.spec)
            self._variants = {key: variant}  # one at a time: the viewer looks at one selection
        outs = variant(inputs)
        return {i: np.array(backend.from_device(v)) for i, v in zip(key, outs)}

    def _run_checked(self, leaves: Sequence[Any]) -> Any:
        from tracejit.nancheck import run_checked

        inputs = [np.asarray(v) for v in self.gather(leaves)]
        outs = run_checked(self, inputs, events.current_observers())
        backend = self.device.backend
        if not backend.on_host:
            outs = [backend.to_device(np.asarray(o), self.device.spec) for o in outs]
        return self.finish(outs)

    def inspection(self) -> Inspection:
        """The report behind ``fn.inspect(...)``."""
        from tracejit.inspection import Inspection

        return Inspection.of(self)


def compile_entry(traced: Traced, name: str, device: Device, leaves: Sequence[Any]) -> Entry:
    """Optimise, lower and compile one trace for one device, or let the backend take all that from its disk cache."""
    t0 = time.perf_counter()
    stages = Stages(traced.graph, device)
    backend: Any = device.backend  # ``restore`` and ``remember`` are optional
    keeps = hasattr(backend, "restore") and not checking()
    key = program_key(traced.graph) if keeps else None
    executable = None if key is None else backend.restore(key, traced.graph, stages, device.spec)
    restored = executable is not None
    t1 = time.perf_counter()
    if executable is None:
        stages.optimised  # noqa: B018  # timed apart from the lowering
        t1 = time.perf_counter()
        program = stages.program
        t2 = time.perf_counter()
        executable = backend.compile(program, device.spec)
        if key is not None:
            backend.remember(key, executable)
    else:
        t2 = t1
    t3 = time.perf_counter()
    swapped = tuple(
        k
        for k, i in enumerate(traced.dynamic)
        if isinstance(leaves[i], np.ndarray) and not leaves[i].dtype.isnative
    )
    entry = Entry(traced, stages, executable, device, name, swapped)
    if len(traced.dynamic) != len(leaves):
        entry.arity = traced.dynamic
    entry.times = {"optimise": t1 - t0, "lower": t2 - t1, "compile": t3 - t2}
    if log_enabled("compile"):
        nodes = f"{len(traced.graph)} recorded" if restored else f"{len(stages.optimised)}"
        log(
            "compile",
            f"{name} on {device}: {nodes} nodes, {len(executable.kernels)} kernels, {(t3 - t0) * 1e3:.1f} ms"
            + (", from the disk cache" if restored else ""),
        )
    return entry
