"""The reference backend: interprets the graph with NumPy, op by op. The oracle of every test; found as device "numpy".

Slow next to the native backends, complete by definition: it runs the NumPy reference that every op must have.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tracejit.backend import DeviceInfo, Executable
from tracejit.errors import DeviceError
from tracejit.program import Capabilities, Program


class NumpyBackend:
    """Implements :class:`tracejit.backend.Backend`; see there for the meaning of each member."""

    name = "numpy"
    priority = 0
    on_host = True

    def capabilities(self, spec: str) -> Capabilities | None:
        """None: this backend needs the graph only."""
        _check(spec)
        return None

    def compile(self, program: Program, spec: str) -> Executable:
        """Plan the interpretation of ``program.graph``."""
        from tracejit_numpy.interpreter import Interpreter

        _check(spec)
        return Interpreter(program.graph)

    def devices(self) -> list[DeviceInfo]:
        """The one host device."""
        return [
            DeviceInfo("numpy", "numpy", "cpu", True, f"NumPy {np.__version__}, the reference interpreter")
        ]

    def to_device(self, array: np.ndarray, spec: str) -> Any:
        """Arrays stay where they are."""
        return np.asarray(array)

    def from_device(self, array: Any) -> np.ndarray:
        """Arrays are where they should be."""
        return np.asarray(array)


def _check(spec: str) -> None:
    if spec:
        raise DeviceError.make(f'device "numpy" has no variants, got "numpy:{spec}"', op="device")


backend = NumpyBackend()
