"""What compiling a kernel yields: functions and how to call them. Made by every emitter, read by ``plan.py``.

A module of its own so that a program that comes from the disk cache loads none of the code generators.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Stage:
    """One compiled function and how to call it. ``pointers`` are local buffer numbers, or ``~t`` for temporary ``t``."""

    function: str
    pointers: list[int]
    tasks: int
    cost: float  # estimated nanoseconds on one thread
    scratch: int = 0  # bytes of per-thread scratch
    after: list[int] | None = None  # earlier stages it needs; None = the one before
    only_reads: list[int] | None = (
        None  # local buffers it reads: lets it start as soon as their writers are done
    )


@dataclass
class Compiled:
    """The stages of a body, each depending on the one before, and the sizes in bytes of shared temporaries."""

    stages: list[Stage]
    temps: list[int] = field(default_factory=list)
