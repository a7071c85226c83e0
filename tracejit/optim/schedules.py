"""Learning-rate schedules: functions of the number of steps taken so far, on ints, arrays and tensors.
Imported by users.

They compute in float32, so a traced step has the schedule inside and never retraces.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from tracejit.source import named_scope
from tracejit.tensor import Tensor

Schedule = Callable[[Any], Any]


def _as_float(step: Any) -> Any:
    return step.astype(np.float32) if isinstance(step, Tensor) else np.asarray(step, np.float32)


def _check_steps(owner: str, **steps: int) -> None:
    for name, count in steps.items():
        if isinstance(count, bool) or not isinstance(count, int | np.integer) or count < 1:
            raise ValueError(f"[{owner}] {name} must be a positive int, not {count!r}")


def constant(learning_rate: float) -> Schedule:
    """The same rate at every step."""
    return lambda step: learning_rate


def cosine(learning_rate: float, steps: int, final: float = 0.0) -> Schedule:
    """From ``learning_rate`` at step 0 along half a cosine to ``final`` at ``steps`` and after (Loshchilov &
    Hutter, 2017).
    """
    _check_steps("cosine", steps=steps)

    def schedule(step: Any) -> Any:
        with named_scope("schedule"):
            done = np.minimum(_as_float(step) * (1.0 / steps), 1.0)
            return (np.cos(done * math.pi) + 1.0) * (0.5 * (learning_rate - final)) + final

    return schedule


def linear_warmup(learning_rate: float, steps: int) -> Schedule:
    """``learning_rate * (step + 1) / steps`` up to ``learning_rate``: the first step already moves."""
    _check_steps("linear_warmup", steps=steps)

    def schedule(step: Any) -> Any:
        with named_scope("schedule"):
            return np.minimum((_as_float(step) + 1.0) * (1.0 / steps), 1.0) * learning_rate

    return schedule


def warmup_cosine(learning_rate: float, warmup_steps: int, total_steps: int, final: float = 0.0) -> Schedule:
    """:func:`linear_warmup` for ``warmup_steps``, then :func:`cosine` to ``final`` at ``total_steps``."""
    _check_steps("warmup_cosine", warmup_steps=warmup_steps, total_steps=total_steps)
    if total_steps <= warmup_steps:
        raise ValueError(
            f"[warmup_cosine] total_steps={total_steps} must be above warmup_steps={warmup_steps}"
        )
    rise, fall = (
        linear_warmup(learning_rate, warmup_steps),
        cosine(learning_rate, total_steps - warmup_steps, final),
    )

    def schedule(step: Any) -> Any:
        s = _as_float(step)
        return np.where(s < warmup_steps, rise(s), fall(np.maximum(s - warmup_steps, 0.0)))

    return schedule


__all__ = ["constant", "cosine", "linear_warmup", "warmup_cosine"]
