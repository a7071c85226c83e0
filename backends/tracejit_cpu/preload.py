"""Loads LLVM and the native support code in a thread of its own while Python traces and lowers the first program.

``CpuBackend.prepare`` starts it. Nearly all of its time is spent in C without the GIL; the modules it needs are imported
before it starts, because two threads that both run Python slow each other down.
"""

from __future__ import annotations

import contextlib
import threading
from types import ModuleType

from tracejit.forking import gate

_lock = threading.Lock()
_thread: threading.Thread | None = None


def start() -> None:
    """Start loading, once per process."""
    global _thread
    if _thread is not None:
        return
    with _lock:
        if _thread is not None:
            return
        from tracejit_cpu import support

        # not a daemon: LLVM must not be torn down under it when the interpreter exits at once
        _thread = threading.Thread(target=_load, args=(support,), name="tracejit-cpu-preload", daemon=False)
        _thread.start()


def _load(module: ModuleType) -> None:
    with contextlib.suppress(Exception), gate:  # the first call meets the same error and reports it
        module.support()
