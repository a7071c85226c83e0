"""Loads LLVM and the native support code in a thread of its own while a program is still being lowered.

``CpuBackend.capabilities`` starts it: that is the first sign that this backend will compile something. Loading the LLVM
library and generating code release the GIL, so the first call waits for the longer of the two halves, not for their sum.
"""

from __future__ import annotations

import threading

from tracejit.forking import gate

_lock = threading.Lock()
_started = False


def start() -> None:
    """Start loading, once per process."""
    global _started
    if _started:
        return
    with _lock:
        if _started:
            return
        _started = True
    # not a daemon: LLVM must not be torn down under it when the interpreter exits at once
    threading.Thread(target=_load, name="tracejit-cpu-preload", daemon=False).start()


def _load() -> None:
    try:
        with gate:
            from tracejit_cpu import host

            host.llvm()
            from tracejit_cpu import entry, runtime

            runtime.pool()
            entry.available()
            from tracejit_cpu import executable

            executable.driver_address()
    except Exception:
        pass
