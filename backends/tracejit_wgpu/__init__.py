"""The GPU backend: WGSL generated from Programs, run through wgpu (Vulkan, Metal, DirectX 12).

tracejit finds :data:`backend` through the entry-point group ``tracejit.backends``. wgpu itself is imported when a
device is first needed.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tracejit.backend import DeviceInfo, Executable
from tracejit.errors import DeviceError
from tracejit.program import Capabilities, Program


class WgpuBackend:
    """See :class:`tracejit.backend.Backend`. Never the default: a GPU is asked for by name."""

    name = "wgpu"
    priority = -1
    on_host = False

    def capabilities(self, spec: str) -> Capabilities:
        """Steers the lowering by the device's real limits; starts the device."""
        from tracejit_wgpu import runtime

        target = runtime.get(spec).target
        return Capabilities(
            max_buffers=target.buffers,
            horizontal=16,
            batch_contracts=16,
            row_limit=1 << 16,
            attention=True,
            attention_dim=64 if target.workgroup_memory < 32768 else 128,
            separate_outputs=True,
            contract_epilogue=True,
            contract_sums=True,
            epilogue_buffers=4,
            split_k=8,
            split_k_limit=600_000,
            split_k_work=1 << 20,
            conv_epilogue=False,
            recompute_flops=16,
            index_bits=32,
            dtypes=frozenset(
                {"bool", "int8", "int16", "int32", "uint8", "uint16", "uint32", "float16", "float32"}
            ),
        )

    def compile(self, program: Program, spec: str) -> Executable:
        """Generate WGSL, build pipelines, plan memory."""
        from tracejit_wgpu.executable import Executable as Compiled

        return Compiled(program, spec)

    def devices(self) -> list[DeviceInfo]:
        """All adapters, or one entry that says what to install."""
        from tracejit_wgpu import adapters

        try:
            found = adapters.adapters()
        except DeviceError as error:
            return [DeviceInfo("wgpu", "wgpu", "unknown", False, "not usable in this process", str(error))]
        if not found:
            return [DeviceInfo("wgpu", "wgpu", "gpu", False, "no GPU adapter", adapters.install_hint())]
        out = []
        for a in found:
            properties: dict[str, Any] = {
                "vendor": a.vendor,
                "type": a.kind,
                "api": a.backend,
                "limits": {k: a.limits[k] for k in adapters.DEFAULT_LIMITS if k in a.limits},
                "features": sorted(set(adapters.FEATURES) & a.features),
                "tensor_cores": "experimental-cooperative-matrix" in a.features,
            }
            kind = "cpu" if a.is_cpu else "gpu"
            what = f"{a.name} ({a.vendor}, {a.kind}, {a.backend})"
            out.append(DeviceInfo(f"wgpu:{a.index}", "wgpu", kind, True, what, a.description, properties))
        return out

    def to_device(self, array: Any, spec: str) -> Any:
        """A ``tj.Array`` on the device with a copy of ``array``; ``array`` itself if it is one."""
        from tracejit.array import Array
        from tracejit_wgpu import runtime
        from tracejit_wgpu.storage import WgpuStorage
        from tracejit_wgpu.transfer import to_storage

        rt = runtime.get(spec)
        storage = array.storage if isinstance(array, Array) else None
        if isinstance(storage, WgpuStorage) and storage.runtime is rt:
            return array
        array = np.asarray(array)
        handle = rt.upload(to_storage(array, array.dtype, rt.target.f16))
        return Array(array.shape, array.dtype, WgpuStorage(rt, handle, array.size, array.dtype))

    def from_device(self, array: Any) -> np.ndarray:
        """Wait for the device and copy to the host."""
        return np.asarray(array)


backend = WgpuBackend()
