"""What one traced program did: its kernels, its recent steps, running statistics. Fed by ``wire`` messages, read by
``scene`` and the panels. Memory is bounded: old steps are thinned, statistics use a ring of recent steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .model import GraphModel, parse_graph

STATS_WINDOW = 256
KEEP_STEPS = 240  # full step records kept in memory
LOSS_POINTS = 4096


@dataclass(slots=True)
class Kernel:
    """One kernel of a program. ``source`` is its generated code, None until asked for."""

    id: int
    name: str
    kind: str
    nodes: tuple[int, ...]
    bytes: int
    flops: int
    source: str | None = None


@dataclass(slots=True)
class Step:
    """One call of a program. Times in nanoseconds from ``begin``; arrays have one entry per executed kernel."""

    step: int
    kernels: np.ndarray
    start: np.ndarray
    end: np.ndarray
    live: np.ndarray
    lane: np.ndarray
    duration: int
    begin: int = 0
    loss: float | None = None
    nan_node: int | None = None
    skipped: int = 0  # steps the trainer did not send since the one before


@dataclass(slots=True)
class NodeValues:
    """The answer to a request for a tensor: statistics, a histogram, and a picture where the shape allows one."""

    step: int
    stats: dict[str, float]
    histogram: list[int]
    edges: tuple[float, float]
    image: np.ndarray | None = None  # uint8 [h, w], or [h, w, 3]
    note: str = ""


@dataclass(slots=True)
class Timing:
    """Times of a set of kernels: seconds per step, and what they achieve."""

    last: float
    mean: float
    p95: float
    share: float
    flops_rate: float
    bytes_rate: float
    samples: int


class Session:
    """One traced program of one trainer."""

    def __init__(self, compiled: Mapping[str, Any]) -> None:
        self.program = int(compiled.get("program", 0))
        self.device = str(compiled.get("device") or "cpu")
        self.ops: Mapping[str, Mapping[str, str]] = compiled.get("ops") or {}
        self.model: GraphModel = parse_graph(compiled.get("graph"), self.ops)
        self.name = str(compiled.get("name") or self.model.name)
        self.kernels = [_kernel(k, len(self.model.nodes)) for k in compiled.get("kernels") or ()]
        self.slot = {k.id: i for i, k in enumerate(self.kernels)}
        self.kernels_of: dict[int, list[int]] = {}
        for i, k in enumerate(self.kernels):
            for n in k.nodes:
                self.kernels_of.setdefault(n, []).append(i)
        lengths = [len(k.nodes) for k in self.kernels]
        self._offset = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        self._covered = np.array([n for k in self.kernels for n in k.nodes], np.int64)
        self.steps: list[Step] = []
        self.keep = KEEP_STEPS
        self.total_steps = 0
        self.loss_steps: list[int] = []
        self.loss: list[float] = []
        self._loss_stride = 1
        self._loss_skip = 0
        self.window = np.full((STATS_WINDOW, max(1, len(self.kernels))), np.nan, np.float32)
        self.durations = np.full(STATS_WINDOW, np.nan, np.float32)
        self.plain = 0.0  # seconds of a call whose kernels were not timed, smoothed; 0 before the first
        self._rows = 0
        self.values: dict[int, NodeValues] = {}
        self.wanted: set[int] = set()
        self.rate = 0.0  # steps per second
        self._last_begin: tuple[int, int] | None = None
        self.ended = False
        self.revision = 0  # grows with every change; cheap way for panels to notice

    # -- feeding ---------------------------------------------------------------------------------------------------
    def add_step(self, step: Step) -> None:
        """Take one step in; thins old ones so that memory stays bounded however long the training runs."""
        self.total_steps = max(self.total_steps + 1, step.step + 1)
        self.revision += 1
        self._follow(step)
        if not len(step.kernels) and step.nan_node is None and self.kernels:  # ran untimed, at full speed
            seconds = step.duration * 1e-9
            if seconds > 0:  # unknown while a GPU is still at work
                self.plain = 0.9 * self.plain + 0.1 * seconds if self.plain else seconds
            return
        row = self._rows % STATS_WINDOW
        self._rows += 1
        self.window[row] = np.nan
        if len(step.kernels):
            slots = np.array([self.slot.get(int(k), -1) for k in step.kernels])
            ok = slots >= 0
            spent = np.zeros(self.window.shape[1], np.float64)
            np.add.at(spent, slots[ok], (step.end - step.start)[ok])
            ran = np.zeros(self.window.shape[1], bool)
            ran[slots[ok]] = True
            self.window[row, ran] = spent[ran]
        self.durations[row] = step.duration
        self.steps.append(step)
        if (
            len(self.steps) > self.keep
        ):  # thin: the recent half stays whole, the older half loses every other step
            half = len(self.steps) // 2
            self.steps[:half] = self.steps[:half:2]

    def _follow(self, step: Step) -> None:
        """Loss curve and step rate."""
        last = self._last_begin
        if last is not None and step.begin > last[0] and step.step > last[1]:
            now = (step.step - last[1]) / ((step.begin - last[0]) * 1e-9)
            self.rate = now if not self.rate else 0.85 * self.rate + 0.15 * now
        self._last_begin = (step.begin, step.step)
        if step.loss is not None:
            self._add_loss(step.step, float(step.loss))

    def stood(self) -> None:
        """The program was held: the time until its next step says nothing about its speed."""
        self._last_begin = None
        self.revision += 1

    def step_seconds(self, step: Step | None) -> float:
        """What a step of the training takes: untimed ones if there were any, else the given one."""
        if self.plain or step is None:
            return self.plain or math.nan
        return step.duration * 1e-9 if len(step.kernels) else self.mean_duration()

    def _add_loss(self, step: int, loss: float) -> None:
        self._loss_skip += 1
        if self._loss_skip < self._loss_stride:
            self.loss_steps[-1:], self.loss[-1:] = [step], [loss]  # the last point is always the newest
            return
        self._loss_skip = 0
        self.loss_steps.append(step)
        self.loss.append(loss)
        if len(self.loss) > LOSS_POINTS:
            self.loss_steps, self.loss = self.loss_steps[::2], self.loss[::2]
            self._loss_stride *= 2

    # -- asking ----------------------------------------------------------------------------------------------------
    @property
    def last(self) -> Step | None:
        """The newest step, None before the first."""
        return self.steps[-1] if self.steps else None

    def node_times(self, step: Step) -> tuple[np.ndarray, np.ndarray]:
        """When each node ran in a step: (start, end) in ns from its begin.

        Views folded into their users are ready when what they read is; inputs and constants when they are first used.
        """
        n = len(self.model.nodes)
        start = np.full(n, np.inf)
        end = np.full(n, -np.inf)
        if step.nan_node is not None and not len(
            step.kernels
        ):  # checked node by node, stopped at the bad one
            before = np.arange(n) < step.nan_node
            start[before] = end[before] = 0.0
            start[~before] = end[~before] = np.inf
            return start, end
        slots = np.array([self.slot.get(int(k), -1) for k in step.kernels], np.int64)
        ok = slots >= 0
        slots, s, e = slots[ok], step.start[ok].astype(float), step.end[ok].astype(float)
        if len(
            slots
        ):  # a node that several kernels compute (recomputed where it is used) ran in the first of them
            late_first = np.argsort(-s, kind="stable")
            slots, s, e = slots[late_first], s[late_first], e[late_first]
            counts = self._offset[slots + 1] - self._offset[slots]
            which = np.repeat(np.arange(len(slots)), counts)
            base = np.repeat(self._offset[slots], counts)
            within = np.arange(len(which)) - np.repeat(np.cumsum(counts) - counts, counts)
            nodes = self._covered[base + within]
            start[nodes], end[nodes] = s[which], e[which]
        for node in self.model.nodes:
            if not np.isfinite(start[node.id]) and not node.is_source:
                read = [end[u] for u in node.inputs if np.isfinite(end[u])]
                start[node.id] = end[node.id] = max(read, default=0.0)
        for node in reversed(self.model.nodes):  # inputs and constants light up with what first uses them
            if node.is_source:
                start[node.id] = end[node.id] = min((start[u] for u in node.users), default=0.0)
        return start, end

    def timing(self, slots: Sequence[int]) -> Timing | None:
        """Statistics of a set of kernels (indices into ``kernels``) over the recent steps; None before any ran."""
        slots = list(dict.fromkeys(slots))
        rows = min(self._rows, STATS_WINDOW)
        if not slots or not rows:
            return None
        block = self.window[:rows, slots].astype(np.float64)
        ran = ~np.all(np.isnan(block), axis=1)
        if not ran.any():
            return None
        per_step = np.nansum(block[ran], axis=1) * 1e-9
        newest = (self._rows - 1) % STATS_WINDOW
        last_row = self.window[newest, slots]
        last = float(np.nansum(last_row) * 1e-9) if not np.all(np.isnan(last_row)) else float(per_step[-1])
        mean = float(per_step.mean())
        whole = float(np.nanmean(self.durations[:rows][ran]) * 1e-9)
        flops = sum(self.kernels[i].flops for i in slots)
        moved = sum(self.kernels[i].bytes for i in slots)
        return Timing(
            last,
            mean,
            float(np.percentile(per_step, 95)),
            mean / whole if whole > 0 else 0.0,
            flops / mean if mean > 0 else 0.0,
            moved / mean if mean > 0 else 0.0,
            int(ran.sum()),
        )

    def slots_of(self, nodes: Sequence[int]) -> list[int]:
        """Kernels that run any of the nodes, in schedule order."""
        return sorted({i for n in nodes for i in self.kernels_of.get(n, ())})

    def mean_kernel_ns(self) -> np.ndarray:
        """Mean nanoseconds per kernel over the recent steps (nan where it never ran)."""
        rows = min(self._rows, STATS_WINDOW)
        if not rows:
            return np.full(self.window.shape[1], np.nan)
        block = self.window[:rows]
        count = np.sum(~np.isnan(block), axis=0)
        return np.where(count > 0, np.nansum(block, axis=0) / np.maximum(count, 1), np.nan)

    def mean_duration(self) -> float:
        """Mean seconds per step over the recent steps."""
        rows = min(self._rows, STATS_WINDOW)
        return float(np.nanmean(self.durations[:rows]) * 1e-9) if rows else float("nan")


def _kernel(raw: Mapping[str, Any], n_nodes: int) -> Kernel:
    nodes = tuple(int(v) for v in raw.get("nodes") or () if 0 <= int(v) < n_nodes)
    source = raw.get("source")
    return Kernel(
        int(raw.get("id", 0)),
        str(raw.get("name") or "kernel"),
        str(raw.get("kind") or "op"),
        nodes,
        int(raw.get("bytes") or 0),
        int(raw.get("flops") or 0),
        str(source) if source is not None else None,
    )


@dataclass
class Trainer:
    """One connected process (or one recording): its programs, most recently active first by ``active``."""

    title: str
    sessions: dict[int, Session] = field(default_factory=dict)
    active: int | None = None
    alive: bool = True
    message: str = ""
    held: str = ""  # "" | asked | held | stepping: how far the program has followed the user who steps it
    held_at: tuple[int, int] | None = None  # (program, step) where it stands, while ``held`` is "held"
