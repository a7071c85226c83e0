"""Where a program waits between two watched calls while the viewer's user steps it. Called by ``client``.

A thread that ends a watched call while the gate is closed stays there until the user lets all waiting threads run one
call (``step``) or opens the gate (``go``). Nothing is locked meanwhile, the processor sleeps in the socket, Ctrl+C works,
and the program runs on by itself when the viewer is gone or has not been heard for :data:`PATIENCE` seconds.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import time
from collections.abc import Callable

HOLD, STEP, GO, ALIVE = "hold", "step", "go", "alive"
HEARTBEAT = 1.0  # seconds between signs of life of a viewer that holds a program
PATIENCE = 5.0  # seconds without one after which the program runs on
NAP = 0.2  # seconds after which a waiting thread looks up, should another one have read what it waits for
SOON = 0.01  # the same while something still has to be sent


class Gate:
    """Closed or open; one for each connection to a viewer."""

    def __init__(self) -> None:
        self.closed = False
        self._turn = 0  # grows when those who wait may pass
        self._heard = 0.0

    def hear(self, what: str) -> None:
        """Take a request of the viewer: ``hold``, ``step``, ``go`` or ``alive``."""
        self._heard = time.monotonic()
        if what in (HOLD, STEP):
            self.closed = True
        if what == GO:
            self.closed = False
        if what in (STEP, GO):
            self._turn += 1

    def wait(self, connection: Callable[[], socket.socket | None], serve: Callable[[], bool]) -> str:
        """Stay until released. ``connection`` is None once the viewer is gone.

        ``serve`` sends and receives without blocking; True while there is something left to send. Returns why the
        program runs on although the viewer did not say so, else the empty string.
        """
        turn, self._heard = self._turn, time.monotonic()
        eager = serve()
        with selectors.DefaultSelector() as selector:
            sock = connection()
            if sock is not None:
                with contextlib.suppress(OSError, ValueError):  # closed by another thread just now
                    selector.register(sock, selectors.EVENT_READ)
            while self.closed and self._turn == turn and sock is not None and connection() is sock:
                if time.monotonic() - self._heard > PATIENCE:
                    self.closed = False
                    return f"the viewer was not heard for {PATIENCE:.0f} seconds"
                selector.select(SOON if eager else NAP)
                eager = serve()
        return ""
