"""The native code that every program shares, as one object: thread pool, driver, Python entry.

``runtime.py`` loads it when the pool is made, ``preload.py`` before that in a thread of its own. One object costs one run
of the code generator and one load from the disk cache instead of three.
"""

from __future__ import annotations

from tracejit_cpu import codecache, entry, plan, runtime
from tracejit_cpu.host import host, once


@once
def support() -> codecache.Loaded:
    """The object: ``tj_launch``, ``tj_worker``, ``tj_spin``, ``tj_barrier``, ``tj_run``; ``tj_entry`` where it is safe."""
    futex, symbols = runtime.uses_futex(), entry.symbols()

    def make() -> str:
        here = host()
        parts = [f'target triple = "{here.triple}"\n', runtime.runtime_ir(here, futex), plan.driver_ir()]
        return "".join(parts if symbols is None else [*parts, entry.entry_ir()])

    # Level 0 takes a quarter of the time: none of it is in a loop that matters.
    return codecache.load_support(f"shared {futex} {symbols is not None}", make, symbols, level=0)
