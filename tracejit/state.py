"""What is ambient on this thread: the running trace, the chosen device, observers, switches. One object, one test per call.

Each room changes its own field through :func:`changed`; ``jit.py`` looks only at ``busy`` on the hot path.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tracejit.backend import Device
    from tracejit.events import Observer
    from tracejit.tensor import TraceContext


def env_flag(name: str) -> bool:
    """True if the environment variable ``name`` is set to something that means yes."""
    return os.environ.get(name, "").lower() not in ("", "0", "false", "no", "off")


class State(threading.local):
    """Ambient state of one thread. ``busy`` is True when more than the device differs from plain execution."""

    def __init__(self) -> None:
        self.context: TraceContext | None = None
        self.device: Device | None = None
        self.observers: tuple[Observer, ...] = ()
        self.disable_jit = env_flag("TRACEJIT_DISABLE_JIT")
        self.debug_nans = env_flag("TRACEJIT_DEBUG_NANS")
        self.busy = False
        self.refresh()

    def refresh(self) -> None:
        """Recompute ``busy`` after a field changed."""
        self.busy = bool(self.context is not None or self.observers or self.disable_jit or self.debug_nans)


state = State()


@contextlib.contextmanager
def changed(**fields: Any) -> Iterator[None]:
    """Set fields of the thread's state for a block."""
    before = {name: getattr(state, name) for name in fields}
    for name, value in fields.items():
        setattr(state, name, value)
    state.refresh()
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(state, name, value)
        state.refresh()
