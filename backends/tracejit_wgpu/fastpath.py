"""The few uses of wgpu-native behind wgpu-py's public API, each with a fallback to it. Nothing else touches cffi handles.

* trusted shader modules (no bounds checks): matmul 38 -> 46 TFLOP/s on an H100;
* encoding dispatches through raw handles: 4-6 us instead of 7.5-12 us each;
* submissions with an index, so that a loop can wait for an old one instead of all.

``TRACEJIT_WGPU_FASTPATH=0`` turns it off. Called by ``runtime.py`` only.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

_native: Any = None


def _load() -> Any:
    """(ffi, lib, checked lib) or None when this wgpu-py is built differently."""
    global _native
    if _native is None:
        _native = False
        if os.environ.get("TRACEJIT_WGPU_FASTPATH", "1") != "0":
            try:
                from wgpu.backends.wgpu_native import _api, lib

                for name in (
                    "wgpuComputePassEncoderSetPipeline",
                    "wgpuComputePassEncoderSetBindGroup",
                    "wgpuComputePassEncoderDispatchWorkgroups",
                    "wgpuQueueSubmitForIndex",
                    "wgpuDevicePoll",
                    "wgpuDeviceCreateShaderModuleTrusted",
                ):
                    getattr(lib, name)
                _native = (_api.ffi, lib, _api.libf, _api)
            except (ImportError, AttributeError):
                _native = False
    return _native or None


def available() -> bool:
    """True if the raw path can be used."""
    return _load() is not None


def shader_module(device: Any, code: str, *, trusted: bool) -> Any:
    """A shader module; ``trusted`` ones have no bounds checks, so only for code whose indices are proven."""
    native = _load()
    if native is None or not trusted:
        return device.create_shader_module(code=code)
    ffi, lib, libf, api = native
    try:
        text = code.encode()
        data = ffi.new("char[]", text)
        source = ffi.new("WGPUShaderSourceWGSL *")
        source.chain.sType = lib.WGPUSType_ShaderSourceWGSL
        source.code.data, source.code.length = data, len(text)
        descriptor = ffi.new("WGPUShaderModuleDescriptor *")
        descriptor.nextInChain = ffi.cast("WGPUChainedStruct *", source)
        create = getattr(libf, "wgpuDeviceCreateShaderModuleTrusted", lib.wgpuDeviceCreateShaderModuleTrusted)
        handle = create(device._internal, descriptor, 0)
        if handle == ffi.NULL:
            raise RuntimeError("shader module creation failed")
        return api.GPUShaderModule("", handle, device)
    except (AttributeError, TypeError):
        return device.create_shader_module(code=code)


def record(dispatches: Sequence[tuple[Any, Any, tuple[int, int, int]]]) -> list[tuple[Any, ...]]:
    """Prepare (pipeline, bind group, grid) triples for :func:`encode`: a list that is cheap to walk."""
    raw = available()
    return [(p._internal, g._internal, *grid) if raw else (p, g, *grid) for p, g, grid in dispatches]


def encode(compute_pass: Any, recording: Sequence[tuple[Any, ...]]) -> None:
    """Encode all dispatches of a recording into an open compute pass."""
    native = _load()
    if native is None:
        for pipeline, group, x, y, z in recording:
            compute_pass.set_pipeline(pipeline)
            compute_pass.set_bind_group(0, group)
            compute_pass.dispatch_workgroups(x, y, z)
        return
    ffi, lib, _, _ = native
    set_pipeline = lib.wgpuComputePassEncoderSetPipeline
    set_group = lib.wgpuComputePassEncoderSetBindGroup
    dispatch = lib.wgpuComputePassEncoderDispatchWorkgroups
    handle, null, last = compute_pass._internal, ffi.NULL, None
    for pipeline, group, x, y, z in recording:
        if pipeline is not last:
            set_pipeline(handle, pipeline)
            last = pipeline
        set_group(handle, 0, group, 0, null)
        dispatch(handle, x, y, z)


def write_timestamp(compute_pass: Any, query_set: Any, index: int) -> bool:
    """A timestamp inside a pass, where wgpu-native has it."""
    native = _load()
    if native is None:
        return False
    _, lib, _, _ = native
    lib.wgpuComputePassEncoderWriteTimestamp(compute_pass._internal, query_set._internal, index)
    return True


def submit(queue: Any, commands: Any) -> int | None:
    """Submit one command buffer; its index for :func:`wait`, or None."""
    native = _load()
    if native is None:
        queue.submit([commands])
        return None
    ffi, _, libf, _ = native
    array = ffi.new("WGPUCommandBuffer[]", [commands._internal])
    return int(libf.wgpuQueueSubmitForIndex(queue._internal, 1, array))


def wait(device: Any, index: int | None) -> bool:
    """Block until the submission with that index (None: everything) has finished; False if that is not possible here."""
    native = _load()
    if native is None:
        return False
    ffi, lib, _, _ = native
    lib.wgpuDevicePoll(
        device._internal, True, ffi.NULL if index is None else ffi.new("WGPUSubmissionIndex *", index)
    )
    return True
