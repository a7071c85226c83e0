"""The native CPU backend of tracejit: LLVM IR through llvmlite. Found through the entry-point group ``tracejit.backends``.

``import tracejit_cpu`` loads neither llvmlite nor NumPy extensions of its own; compilation does, on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from tracejit.backend import DeviceInfo
    from tracejit.compilation import Stages
    from tracejit.graph import Graph
    from tracejit.program import Capabilities, Program
    from tracejit_cpu.executable import CpuExecutable


class CpuBackend:
    """See :class:`tracejit.backend.Backend`."""

    name = "cpu"
    priority = 100
    on_host = True

    def capabilities(self, spec: str) -> Capabilities:
        """What steers the lowering."""
        from tracejit.program import Capabilities

        self._check(spec)
        return Capabilities()

    def prepare(self, spec: str) -> None:
        """Begin to load LLVM: a program is about to be traced."""
        from tracejit_cpu import preload

        preload.start()

    def compile(self, program: Program, spec: str = "") -> CpuExecutable:
        """Compile a program for this machine."""
        from tracejit_cpu.executable import CpuExecutable

        self._check(spec)
        return CpuExecutable(program)

    def restore(self, key: str, graph: Graph, stages: Stages, spec: str = "") -> CpuExecutable | None:
        """The executable of a program that an earlier process remembered; it is neither optimised nor lowered again."""
        from tracejit_cpu import programcache

        self._check(spec)
        return programcache.restore(key, graph, stages)

    def remember(self, key: str, executable: CpuExecutable) -> None:
        """Keep what :meth:`restore` needs."""
        from tracejit_cpu import programcache

        programcache.remember(key, executable)

    def devices(self) -> list[DeviceInfo]:
        """This machine's processor."""
        from tracejit.backend import DeviceInfo

        try:
            from tracejit_cpu.host import host, thread_count

            here = host()
            text = f"{here.arch}, {here.vector_bytes * 8}-bit vectors, {thread_count()} threads"
            properties = {
                "threads": thread_count(),
                "vector_bits": here.vector_bytes * 8,
                "features": here.features,
            }
            return [DeviceInfo("cpu", "cpu", "cpu", True, text, properties=properties)]
        except Exception as error:  # a broken llvmlite must not break the listing
            return [DeviceInfo("cpu", "cpu", "cpu", False, "native CPU", f"{type(error).__name__}: {error}")]

    def to_device(self, array: np.ndarray, spec: str = "") -> np.ndarray:
        """Arrays live in host memory already."""
        return np.asarray(array)

    def from_device(self, array: Any) -> np.ndarray:
        """Arrays live in host memory already."""
        return np.asarray(array)

    def peaks(self, spec: str = "") -> tuple[float, float]:
        """Measured ceilings of this machine, (GFLOP/s, GB/s), for profiles."""
        from tracejit_cpu.peaks import peaks

        return peaks()

    def cache_info(self) -> dict[str, Any]:
        """Location, entries, bytes, hits and misses of the object-code cache (for ``tracejit cache``)."""
        import dataclasses

        from tracejit_cpu import codecache

        return dataclasses.asdict(codecache.cache_info())

    def cache_clear(self) -> int:
        """Empty the object-code cache; returns the number of entries removed."""
        from tracejit_cpu import codecache

        return codecache.cache_clear()

    @staticmethod
    def _check(spec: str) -> None:
        if spec not in ("", "0"):
            from tracejit.errors import DeviceError

            raise DeviceError.make(f'there is one CPU device, "cpu", not "cpu:{spec}"', op="device")


backend = CpuBackend()
