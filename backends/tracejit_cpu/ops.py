"""Native lowerings of op kernels (convolution, pooling, scatter, cumulative sums), keyed by op name.

``compiler.py`` asks :func:`supports` and calls :func:`compile_op`; what is missing here runs as a host step.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tracejit.program import OpKernel
from tracejit_cpu import conv, pooling, scatter
from tracejit_cpu.irbuilder import Module, value_type
from tracejit_cpu.stages import Compiled

DtypeOf = Callable[[int], np.dtype]
Parts = list[tuple[Compiled, list[int]]]


def _float(kernel: OpKernel, dtype_of: DtypeOf) -> bool:
    return all(dtype_of(b).kind == "f" for b, _ in (*kernel.operands, *kernel.results))


def supports(kernel: OpKernel, dtype_of: DtypeOf) -> bool:
    """Whether :func:`compile_op` can lower this kernel."""
    if any(0 in shape for _, shape in (*kernel.operands, *kernel.results)):
        return False
    if kernel.op in ("conv2d", "conv2d_input_grad", "conv2d_weight_grad"):
        fits = kernel.epilogue is None or conv.epilogue_axes(kernel.epilogue, dtype_of) is not None
        return fits and _float(kernel, dtype_of) and len({dtype_of(b) for b, _ in kernel.operands}) == 1
    if kernel.epilogue is not None:
        return False
    if kernel.op in pooling.OPS:
        return _float(kernel, dtype_of)
    return kernel.op in scatter.OPS and all(dtype_of(b).kind in "fiub" for b, _ in kernel.operands)


def compile_op(module: Module, kernel: OpKernel, dtype_of: DtypeOf, name: str, in_place: bool) -> Parts:
    """Emit the kernel; returns compiled parts with the buffers behind their local numbers."""
    if kernel.op == "conv2d":
        return _conv(module, kernel, dtype_of, name)
    if kernel.op == "conv2d_input_grad":
        return _conv(module, kernel, dtype_of, name)
    if kernel.op == "conv2d_weight_grad":
        return _weight_grad(module, kernel, dtype_of, name)
    if kernel.op in pooling.OPS:
        return pooling.compile_pool(module, kernel, dtype_of, name)
    return scatter.compile_scatter(module, kernel, dtype_of, name, in_place)


def _conv(module: Module, kernel: OpKernel, dtype_of: DtypeOf, name: str) -> Parts:
    (first, first_shape), (weights, w_shape) = kernel.operands
    shape = kernel.epilogue.domain if kernel.epilogue is not None else kernel.results[0][1]
    flipped = kernel.op == "conv2d_input_grad"
    make = conv.input_grad_geometry if flipped else conv.forward_geometry
    geometry = make(first_shape, w_shape, shape, kernel.attrs)
    dtype = dtype_of(first)
    acc = value_type(dtype)
    body = kernel.epilogue or conv.plain_epilogue(shape, kernel.results[0][0], dtype)
    compiler = conv.ConvCompiler(module, name, geometry, dtype, dtype_of(weights), acc)
    local = conv.epilogue_axes(body, dtype_of)
    if local is not None:
        compiled = compiler.correlate(local, flipped)
        return [(compiled, [*local.buffers, first, weights])]
    raise ValueError("an epilogue that does not follow the image's layout")


def _weight_grad(module: Module, kernel: OpKernel, dtype_of: DtypeOf, name: str) -> Parts:
    (x, x_shape), (g, g_shape) = kernel.operands
    result, w_shape = kernel.results[0]
    geometry = conv.forward_geometry(x_shape, w_shape, g_shape, kernel.attrs)
    dtype = dtype_of(x)
    compiler = conv.ConvCompiler(module, name, geometry, dtype, dtype_of(g), value_type(dtype))
    return [(compiler.weight_grad(dtype_of(result)), [result, x, g])]
