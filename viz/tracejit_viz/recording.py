"""Recordings: the stream of ``wire`` in a ``.tjrec`` file. Written by an observer, read by ``tracejit view`` and ``export``.

A recording that was cut off (the program was killed, the disk was full) shows everything up to the cut.
"""

from __future__ import annotations

import json
import os
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from . import wire
from .errors import GraphFormatError, RecordingError, ViewerError, WireError
from .history import Session, Trainer

if TYPE_CHECKING:
    from tracejit.events import CompileEvent, StepEvent

SIZE_LIMIT = 512 << 20  # bytes; beyond it every second step is kept, then every fourth, ...


class RecordObserver:
    """Writes the event stream to a file. Implements :class:`tracejit.events.Observer`; never raises into the program."""

    def __init__(self, path: str | os.PathLike[str], *, size_limit: int = SIZE_LIMIT) -> None:
        self.path = Path(path)
        try:
            self._file: IO[bytes] | None = open(self.path, "wb", buffering=1 << 20)  # noqa: SIM115 - closed in close()
        except OSError as error:
            raise RecordingError(f"cannot record to {self.path}: {error.strerror or error}") from None
        self.steps = 0
        self.skipped = 0
        self._limit = size_limit / 2
        self._budget = size_limit / 2
        self._stride = 1
        self._encoder = wire.StepEncoder()
        self._known: set[int] = set()
        self._counts: dict[int, int] = {}
        self._written = 0
        self._next_flush = 0.0
        self._write(
            wire.pack(
                wire.HELLO,
                {"wire": wire.VERSION, "pid": os.getpid(), "time": time.time(), "title": "recording"},
            )
        )

    def on_compile(self, event: CompileEvent) -> None:
        """Write a program once, with the generated code of its kernels."""
        if event.program not in self._known:
            self._known.add(event.program)
            try:
                frame = wire.compile_frame(event, with_source=True)
            except Exception:  # a backend whose source() fails must not stop the recording
                frame = wire.compile_frame(event, with_source=False)
            self._write(frame)
            if self._file is not None:
                self._file.flush()

    def on_step(self, event: StepEvent) -> None:
        """Write a step; long recordings keep fewer and fewer of them."""
        if self._file is None:
            return
        seen = self._counts.get(event.program, 0)
        self._counts[event.program] = seen + 1
        if seen % self._stride and event.nan_node is None:
            self.skipped += 1
            return
        self._write(self._encoder.encode(event))
        self.steps += 1
        if self._written > self._limit:
            self._stride *= 2
            self._limit += self._budget / self._stride
        now = time.monotonic()
        if now > self._next_flush and self._file is not None:
            self._next_flush = now + 1.0
            self._file.flush()

    def wanted(self, program: int) -> Sequence[int]:
        """A recording asks for no values."""
        return ()

    def close(self) -> None:
        """Finish the file."""
        if self._file is not None:
            self._write(wire.pack(wire.BYE))
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self, data: bytes | memoryview) -> None:
        if self._file is None:
            return
        try:
            self._file.write(data)
            self._written += len(data)
        except OSError as error:
            warnings.warn(
                f"tracejit recording stopped: {error.strerror or error}", RuntimeWarning, stacklevel=3
            )
            self._file = None

    def __enter__(self) -> RecordObserver:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def apply_frame(trainer: Trainer, frame: wire.Frame, keep: int | None = None) -> Session | None:
    """Take one frame into a trainer's history; the session it concerned, if any. Shared with ``hub``."""
    if frame.kind == wire.HELLO:
        trainer.title = str(frame.header.get("title") or trainer.title)
        return None
    if frame.kind == wire.COMPILE:
        session = Session(frame.header)
        if keep is not None:
            session.keep = max(session.keep, keep // max(1, len(session.kernels)))
        trainer.sessions[session.program] = session
        if trainer.active is None:
            trainer.active = session.program
        return session
    if frame.kind == wire.STEP:
        program, step = wire.decode_step(frame.data)
        found = trainer.sessions.get(program)
        if found is not None:
            found.add_step(step)
        return found
    if frame.kind == wire.VALUES:
        program, node, values = wire.decode_values(frame)
        found = trainer.sessions.get(program)
        if found is not None:
            found.values[node] = values
            found.wanted.discard(node)
            found.revision += 1
        return found
    if frame.kind == wire.SOURCE:
        found = trainer.sessions.get(int(frame.header.get("program", -1)))
        slot = found.slot.get(int(frame.header.get("kernel", -1))) if found else None
        if found is not None and slot is not None:
            found.kernels[slot].source = str(frame.header.get("source") or "")
            found.revision += 1
        return found
    if frame.kind == wire.BYE:
        trainer.alive = False
        for s in trainer.sessions.values():
            s.ended = True
    return None


def load_recording(path: str | os.PathLike[str]) -> Trainer:
    """Read a ``.tjrec`` file. ``trainer.message`` says what is missing when it was cut off or damaged.

    Raises :class:`RecordingError` when nothing can be shown: no such file, not a recording, another version, no graph.
    """
    path = Path(path)
    trainer = Trainer(path.name, alive=False)
    reader = wire.FrameReader()
    try:
        with open(path, "rb") as file:
            while chunk := file.read(1 << 20):
                for frame in reader.feed(chunk):
                    apply_frame(trainer, frame, keep=16_000_000)
    except OSError as error:
        raise RecordingError(f"cannot read {path}: {error.strerror or error}") from None
    except (WireError, GraphFormatError) as error:
        if not trainer.sessions:
            raise RecordingError(f"{path}: {error}") from None
        trainer.message = f"damaged: {error}; showing what came before"
    if not trainer.sessions:
        what = "empty" if path.stat().st_size == 0 else "cut off before its first graph"
        raise RecordingError(f"{path}: not a usable recording ({what})")
    if reader.pending and not trainer.message:
        trainer.message = "cut off in the middle of a step: showing the complete ones"
    trainer.title = path.name
    for session in trainer.sessions.values():
        session.ended = True
    busiest = max(trainer.sessions.values(), key=lambda s: len(s.steps) * max(1, len(s.kernels)))
    trainer.active = busiest.program
    return trainer


def load_graph(path: str | os.PathLike[str]) -> Trainer:
    """Read a graph JSON file (``Graph.to_json()``, or ``{"graph": ..., "ops": ...}``) as a program without steps."""
    path = Path(path)
    try:
        doc: Any = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ViewerError(f"cannot read {path}: {error.strerror or error}") from None
    except ValueError as error:
        raise GraphFormatError(f"{path} is not JSON: {error}") from None
    return graph_trainer(doc, title=path.name)


def graph_trainer(doc: Any, ops: Any = None, title: str = "graph") -> Trainer:
    """A program without steps from a graph document."""
    if isinstance(doc, dict) and "graph" in doc and "nodes" not in doc:
        ops = ops or doc.get("ops")
        doc = doc["graph"]
    session = Session({"graph": doc, "ops": ops or {}, "device": "static"})
    session.ended = True
    return Trainer(title, {session.program: session}, session.program, alive=False)


def open_any(path: str | os.PathLike[str]) -> Trainer:
    """A recording or a graph file, told apart by its first bytes."""
    try:
        with open(path, "rb") as file:
            start = file.read(64).lstrip()
    except OSError as error:
        raise ViewerError(f"cannot read {path}: {error.strerror or error}") from None
    if start.startswith(b"{"):
        return load_graph(path)
    return load_recording(path)
