"""The viewer's ear: accepts trainers, reads their frames without blocking the window, sends requests back.

Called by ``app`` once per frame. A connection that sends nonsense is closed; the others go on.
"""

from __future__ import annotations

import contextlib
import socket
import time
from dataclasses import dataclass, field
from pathlib import Path

from . import place, wire
from .errors import GraphFormatError, WireError
from .gate import ALIVE, GO, HEARTBEAT, HOLD, STEP
from .history import Session, Trainer
from .recording import apply_frame

KEEP_ENDED = 3  # trainers that ended and are still shown
CHUNK = 1 << 18


@dataclass
class _Link:
    sock: socket.socket
    trainer: Trainer
    reader: wire.FrameReader = field(default_factory=wire.FrameReader)
    greeted: bool = False
    out: bytearray = field(default_factory=bytearray)
    beat: float = 0.0  # when a held program was last told that the viewer lives


class Hub:
    """All connected trainers and their programs."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.server = place.listen(directory)
        self.token = place.token(directory)
        self.trainers: list[Trainer] = []
        self._links: list[_Link] = []
        self.messages: list[str] = []  # for the user, shown as toasts
        self.fresh: list[tuple[Trainer, Session]] = []  # programs that appeared since the last look

    @property
    def listening(self) -> bool:
        """False when another viewer already serves this directory."""
        return self.server is not None

    def poll(self, budget: float = 0.004) -> bool:
        """Accept and read for at most ``budget`` seconds; True when something arrived."""
        changed = False
        end = time.perf_counter() + budget
        while self.server is not None:
            try:
                sock, _ = self.server.accept()
            except (BlockingIOError, OSError):
                break
            sock.setblocking(False)
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
            self._links.append(_Link(sock, Trainer("trainer")))
        for link in list(self._links):
            while time.perf_counter() < end:
                if not self._read(link):
                    break
                changed = True
            if link.trainer.held == "held" and time.monotonic() > link.beat + HEARTBEAT:
                self._control(link, ALIVE)
            self._flush(link)
        return changed

    def _read(self, link: _Link) -> bool:
        try:
            data = link.sock.recv(CHUNK)
        except BlockingIOError:
            return False
        except OSError:
            data = b""
        if not data:
            self._close(link)
            return False
        try:
            for frame in link.reader.feed(data):
                if not link.greeted:
                    if frame.kind != wire.HELLO or (self.token and frame.header.get("token") != self.token):
                        raise WireError("a connection did not introduce itself as a tracejit trainer")
                    link.greeted = True
                    self._admit(link.trainer)
                session = apply_frame(link.trainer, frame)
                if frame.kind == wire.HELD:
                    self._stands(link.trainer, frame)
                if frame.kind == wire.COMPILE and session is not None:
                    self.fresh.append((link.trainer, session))
        except (WireError, GraphFormatError, ValueError, KeyError, TypeError) as error:
            self.messages.append(f"closed a connection: {error}")
            self._close(link)
            return False
        return True

    def _admit(self, trainer: Trainer) -> None:
        self.trainers.append(trainer)
        ended = [t for t in self.trainers if not t.alive]
        for old in ended[: max(0, len(ended) - KEEP_ENDED)]:
            self.trainers.remove(old)

    def _close(self, link: _Link) -> None:
        with contextlib.suppress(OSError):
            link.sock.close()
        if link in self._links:
            self._links.remove(link)
        link.trainer.alive, link.trainer.held = False, ""
        for s in link.trainer.sessions.values():
            s.ended = True
            s.wanted.clear()
            s.revision += 1
        if link.trainer in self.trainers and link.trainer.sessions:
            self.messages.append(f"{link.trainer.title} ended: its last step stays on screen")

    def _flush(self, link: _Link) -> None:
        if link.out:
            try:
                n = link.sock.send(link.out)
                del link.out[:n]
            except BlockingIOError:
                pass
            except OSError:
                self._close(link)

    def ask_values(self, session: Session, node: int) -> bool:
        """Ask a program's trainer for a tensor at its next step; False when it is gone."""
        link = self._link_of(session)
        if link is None:
            return False
        session.wanted.add(node)
        link.out += wire.pack(wire.WANT, {"program": session.program, "nodes": [node]})
        return True

    def ask_source(self, session: Session, kernel: int) -> bool:
        """Ask for the generated code of a kernel."""
        link = self._link_of(session)
        if link is None:
            return False
        link.out += wire.pack(wire.WANT, {"program": session.program, "kernel": kernel})
        return True

    # -- stepping the program itself ---------------------------------------------------------------------------------
    def hold(self, trainer: Trainer) -> bool:
        """Ask a program to stop at the end of its present step; False when it cannot be asked."""
        return self._order(trainer, HOLD, "asked")

    def step(self, trainer: Trainer) -> bool:
        """Let a held program run one step."""
        return self._order(trainer, STEP, "stepping")

    def release(self, trainer: Trainer) -> bool:
        """Let a held program run on."""
        return self._order(trainer, GO, "")

    def _order(self, trainer: Trainer, what: str, then: str) -> bool:
        link = next((k for k in self._links if k.trainer is trainer), None)
        if link is None or not trainer.alive:
            return False
        trainer.held = then
        self._control(link, what)
        self._flush(link)
        return True

    def _control(self, link: _Link, what: str) -> None:
        link.beat = time.monotonic()
        link.out += wire.pack(wire.CONTROL, {"run": what})

    def _stands(self, trainer: Trainer, frame: wire.Frame) -> None:
        """A program says that it is held at a step, or no longer."""
        program, step = int(frame.header.get("program", -1)), int(frame.header.get("step", 0))
        session, why = trainer.sessions.get(program), str(frame.header.get("why") or "")
        if session is None:
            return
        session.stood()
        if frame.header.get("held"):
            trainer.held, trainer.held_at = "held", (program, step)
        elif why:
            trainer.held = ""
            self.messages.append(f"{trainer.title} runs on: {why}")
        elif trainer.held == "held":
            trainer.held = ""

    def _link_of(self, session: Session) -> _Link | None:
        return next((k for k in self._links if session in k.trainer.sessions.values()), None)

    def close(self) -> None:
        """Stop listening and drop all connections."""
        for link in self._links:
            with contextlib.suppress(OSError):
                link.sock.close()
        self._links.clear()
        if self.server is not None:
            self.server.close()
            place.forget(self.directory)
            self.server = None
