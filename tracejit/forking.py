"""Lets ``os.fork`` wait until no thread is tracing or compiling.

A forked child has only the thread that forked. What other threads had locked stays locked in it for ever, LLVM's own locks
included, so a child that was forked while another thread compiled would hang on its first compilation. ``jit.py`` and the
backends enter :data:`gate` around such work.
"""

from __future__ import annotations

import os
import threading
import time
from typing import Any

#: Seconds that a fork waits at most: longer than any compilation, and the end of a wait in a circle through a user's locks.
PATIENCE = 10.0


class Gate:
    """A context manager that any number of threads may be inside of, again and again, but not while a process forks."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside: dict[int, int] = {}
        self._forking = False
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(
                before=self._before, after_in_parent=self._in_parent, after_in_child=self._in_child
            )

    def __enter__(self) -> None:
        me = threading.get_ident()
        with self._changed:
            while self._forking and me not in self._inside:
                self._changed.wait()
            self._inside[me] = self._inside.get(me, 0) + 1

    def __exit__(self, *exc: Any) -> None:
        me = threading.get_ident()
        with self._changed:
            self._inside[me] -= 1
            if not self._inside[me]:
                del self._inside[me]
            if self._forking:
                self._changed.notify_all()

    def _before(self) -> None:
        me = threading.get_ident()
        self._changed.acquire()
        deadline = time.monotonic() + PATIENCE
        while self._forking and time.monotonic() < deadline:  # another thread forks
            self._changed.wait(0.1)
        self._forking = True
        while self._inside.keys() - {me} and (left := deadline - time.monotonic()) > 0:
            self._changed.wait(left)

    def _in_parent(self) -> None:
        self._forking = False
        self._changed.notify_all()
        self._changed.release()

    def _in_child(self) -> None:
        me = threading.get_ident()
        self._changed = threading.Condition()
        self._inside = {me: self._inside[me]} if me in self._inside else {}
        self._forking = False


gate = Gate()
