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
        link.trainer.alive = False
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
