"""Convolution and pooling. A convolution is a contraction over overlapping windows: its operands are affine in
(image, position) x (channel, kernel cell), so it runs on the matrix-product generator after padding; pooling and its
gradients are loop bodies in which each result gathers what it needs, in a fixed order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from tracejit.program import Access, Contract, LoopBody, OpKernel
from tracejit_wgpu.build import BOOL, I32, BodyBuilder, row_major
from tracejit_wgpu.contract import contract_dispatches
from tracejit_wgpu.emit import Dispatch, Tables
from tracejit_wgpu.loops import loop_dispatches

Pair = tuple[int, int]


def _epilogue(
    domain: tuple[int, ...], acc: np.dtype, buffer: int, strides: tuple[int, ...], dtype: np.dtype
) -> LoopBody:
    b = BodyBuilder(domain)
    value = b.op("acc", dtype=acc)
    if acc != dtype:
        value = b.op("convert", value, dtype=dtype)
    b.store(value, buffer, strides)
    return b.body()


def _acc(dtype: np.dtype) -> np.dtype:
    return np.dtype(np.float32) if dtype.kind == "f" else dtype


def _spread(
    tables: Tables, source: int, shape: tuple[int, ...], low: Pair, size: Pair, dilation: Pair, label: str
) -> tuple[int, tuple[int, ...], list[Dispatch]]:
    """``source`` [N, C, H, W] with zeros between elements (dilation) and around: ``out[low + i * dilation] = x[i]``."""
    n, c, h, w = shape
    same = low == (0, 0) and dilation == (1, 1) and size == (h, w)
    if same:
        return source, shape, []
    dtype = tables.dtype(source)
    full = (n, c, *size)
    out = tables.scratch(n * c * size[0] * size[1], dtype)
    b = BodyBuilder(full)
    strides = list(row_major(shape))
    position: list[int] = []
    valid: int | None = None
    for axis, (start, step, extent) in enumerate(zip(low, dilation, (h, w)), 2):
        value = b.affine([(axis, 1)], -start)
        inside = b.within(value, (extent - 1) * step + 1)
        if step > 1:
            on = b.op("equal", b.op("mod", value, b.const(step)), b.const(0), dtype=BOOL)
            inside = b.both(inside, on)
            value = b.op("floordiv", value, b.const(step))
        position.append(value)
        valid = inside if valid is None else b.both(valid, inside)
    gather = tuple((p, s, e) for p, s, e in zip(position, strides[2:], (h, w)))
    value = b.load(source, (strides[0], strides[1], 0, 0), dtype, gather=gather, predicate=valid)
    b.store(value, out, row_major(full))
    return out, full, loop_dispatches([b.body()], tables, label)


def conv2d(kernel: OpKernel, tables: Tables) -> list[Dispatch]:
    """y[n, o, i, j] = sum x[n, c, i s + p d, j s + q d] w[o, c, p, q] over the padded image."""
    (x, xs), (w, ws) = kernel.operands
    (y, ys), a = kernel.results[0], kernel.attrs
    (sh, sw), (dh, dw), groups = a["stride"], a["dilation"], a["groups"]
    padding = a["padding"]
    size = tuple(e + lo + hi for e, (lo, hi) in zip(xs[2:], padding))
    padded, ps, out = _spread(
        tables, x, xs, (padding[0][0], padding[1][0]), size, (1, 1), kernel.name + "_pad"
    )
    n, o, oh, ow = ys
    og, (cg, kh, kw) = o // groups, ws[1:]
    px, pw, py = row_major(ps), row_major(ws), row_major(ys)
    # batch (groups), m (n, i, j), n (o), k (c, p, q)
    image = Access(padded, (cg * px[1], px[0], sh * px[2], sw, 0, px[1], dh * px[2], dw))
    weight = Access(w, (og * pw[0], 0, 0, 0, pw[0], pw[1], pw[2], 1))
    dtype = tables.dtype(y)
    strides = (og * py[1], py[0], py[2], 1, py[1])
    domain = (groups, n, oh, ow, og)
    epilogue = _epilogue(domain, _acc(dtype), y, strides, dtype)
    problem = Contract((groups,), (n, oh, ow), (og,), (cg, kh, kw), image, weight, epilogue, _acc(dtype))
    return out + contract_dispatches([problem], tables, kernel.name)


def conv2d_input_grad(kernel: OpKernel, tables: Tables) -> list[Dispatch]:
    """dx[n, c, h, w] = sum over o, p, q of g at the windows that read x[h, w]: a convolution of the spread g, w flipped."""
    (g, gs), (w, ws) = kernel.operands
    (y, ys), a = kernel.results[0], kernel.attrs
    (sh, sw), (dh, dw), groups = a["stride"], a["dilation"], a["groups"]
    padding = a["padding"]
    n, _, h, wd = ys
    o, cg, kh, kw = ws
    og = o // groups
    low = ((kh - 1) * dh - padding[0][0], (kw - 1) * dw - padding[1][0])
    size = (h + (kh - 1) * dh, wd + (kw - 1) * dw)
    spread, ss, out = _spread(tables, g, gs, low, size, (sh, sw), kernel.name + "_spread")
    ps, pw, py = row_major(ss), row_major(ws), row_major(ys)
    image = Access(spread, (og * ps[1], ps[0], ps[2], 1, 0, ps[1], dh * ps[2], dw))
    last = (kh - 1) * pw[2] + (kw - 1)
    weight = Access(w, (og * pw[0], 0, 0, 0, pw[1], pw[0], -pw[2], -1), last)
    dtype = tables.dtype(y)
    domain = (groups, n, h, wd, cg)
    epilogue = _epilogue(domain, _acc(dtype), y, (cg * py[1], py[0], py[2], 1, py[1]), dtype)
    problem = Contract((groups,), (n, h, wd), (cg,), (og, kh, kw), image, weight, epilogue, _acc(dtype))
    return out + contract_dispatches([problem], tables, kernel.name)


def conv2d_weight_grad(kernel: OpKernel, tables: Tables) -> list[Dispatch]:
    """dw[o, c, p, q] = sum over n, i, j of g[n, o, i, j] x[n, c, i s + p d, j s + q d]."""
    (x, xs), (g, gs) = kernel.operands
    (y, ys), a = kernel.results[0], kernel.attrs
    (sh, sw), (dh, dw), groups = a["stride"], a["dilation"], a["groups"]
    padding = a["padding"]
    size = tuple(e + lo + hi for e, (lo, hi) in zip(xs[2:], padding))
    padded, ps, out = _spread(
        tables, x, xs, (padding[0][0], padding[1][0]), size, (1, 1), kernel.name + "_pad"
    )
    n, o, oh, ow = gs
    cg, kh, kw = ys[1:]
    og = o // groups
    px, pg, py = row_major(ps), row_major(gs), row_major(ys)
    grad = Access(g, (og * pg[1], pg[1], 0, 0, 0, pg[0], pg[2], 1))
    image = Access(padded, (cg * px[1], 0, px[1], dh * px[2], dw, px[0], sh * px[2], sw))
    dtype = tables.dtype(y)
    domain = (groups, og, cg, kh, kw)
    epilogue = _epilogue(domain, _acc(dtype), y, (og * py[0], py[0], py[1], py[2], 1), dtype)
    problem = Contract((groups,), (og,), (cg, kh, kw), (n, oh, ow), grad, image, epilogue, _acc(dtype))
    return out + contract_dispatches([problem], tables, kernel.name)


# ---------------------------------------------------------------------------------------------------- pooling
def _window_load(
    b: BodyBuilder, source: int, shape: tuple[int, ...], dtype: np.dtype, a: Mapping[str, Any], fill: Any
) -> tuple[int, int]:
    """Load x[n, c, i s + p - top, j s + q - left] over the domain (n, c, i, j, p, q); also its "inside the image"."""
    n, c, sh, sw = row_major(shape)
    (st, sl), ((top, _), (left, _)) = a["stride"], a["padding"]
    rows, cols = b.affine([(2, st), (4, 1)], -top), b.affine([(3, sl), (5, 1)], -left)
    inside = b.both(b.within(rows, shape[2]), b.within(cols, shape[3]))
    strides = (n, c, st * sh, sl * sw, sh, sw)
    return b.load(source, strides, dtype, -top * sh - left * sw, predicate=inside, fill=fill), inside


def _lowest(dtype: np.dtype) -> Any:
    return (
        -np.inf
        if dtype.kind == "f"
        else (0 if dtype.kind == "u" else -(1 << (8 * min(dtype.itemsize, 4) - 1)))
    )


def _winner(
    b: BodyBuilder, source: int, shape: tuple[int, ...], dtype: np.dtype, a: Mapping[str, Any]
) -> int:
    """Row-major cell of the first maximum of each window inside the image."""
    value, inside = _window_load(b, source, shape, dtype, a, _lowest(dtype))
    cell = b.affine([(4, a["kernel"][1]), (5, 1)])
    cell = b.op("where", inside, cell, b.const((1 << 31) - 2))
    return b.op("reduce", value, dtype=np.int64, kind="argmax", index_arg=cell)


def max_pool2d(kernel: OpKernel, tables: Tables) -> list[Dispatch]:
    """The maximum of each window; padding never wins, NaN always does."""
    (x, xs), (y, ys), a = kernel.operands[0], kernel.results[0], kernel.attrs
    dtype = tables.dtype(x)
    b = BodyBuilder((*ys, *a["kernel"]), (4, 5))
    value, _ = _window_load(b, x, xs, dtype, a, _lowest(dtype))
    b.store(b.op("reduce", value, kind="max"), y, (*row_major(ys), 0, 0))
    return loop_dispatches([b.body()], tables, kernel.name)


def avg_pool2d(kernel: OpKernel, tables: Tables) -> list[Dispatch]:
    """The mean of each window, padding counted as zeros."""
    (x, xs), (y, ys), a = kernel.operands[0], kernel.results[0], kernel.attrs
    dtype = tables.dtype(x)
    b = BodyBuilder((*ys, *a["kernel"]), (4, 5))
    value, _ = _window_load(b, x, xs, dtype, a, 0)
    total = b.op("reduce", value, kind="sum")
    b.store(
        b.op("mul", total, b.const(1 / (a["kernel"][0] * a["kernel"][1]), dtype)), y, (*row_major(ys), 0, 0)
    )
    return loop_dispatches([b.body()], tables, kernel.name)


def _from_windows(
    tables: Tables,
    g: int,
    gs: tuple[int, ...],
    y: int,
    ys: tuple[int, ...],
    a: Mapping[str, Any],
    winner: int | None,
    label: str,
) -> list[Dispatch]:
    """Each image element sums g over the windows that contain it (and that it won), in the order of the kernel's cells."""
    kh, kw = a["kernel"]
    (sh, sw), ((top, _), (left, _)) = a["stride"], a["padding"]
    dtype = tables.dtype(g)
    b = BodyBuilder((*ys, kh, kw), (4, 5))
    valid: int | None = None
    place = []
    for axis, cell, step, lo, count in ((2, 4, sh, top, gs[2]), (3, 5, sw, left, gs[3])):
        value = b.affine([(axis, 1), (cell, -1)], lo)
        ok = b.within(value, (count - 1) * step + 1)
        if step > 1:
            ok = b.both(ok, b.op("equal", b.op("mod", value, b.const(step)), b.const(0), dtype=BOOL))
            value = b.op("floordiv", value, b.const(step))
        place.append(value)
        valid = ok if valid is None else b.both(valid, ok)
    strides = row_major(gs)
    gather = tuple((p, s, c) for p, s, c in zip(place, strides[2:], gs[2:]))
    base = (strides[0], strides[1], 0, 0, 0, 0)
    if winner is not None:
        won = b.load(winner, base, I32, gather=gather, predicate=valid, fill=-1)
        hit = b.op("equal", won, b.affine([(4, kw), (5, 1)]), dtype=BOOL)
        assert valid is not None
        valid = b.both(valid, hit)
    total = b.op("reduce", b.load(g, base, dtype, gather=gather, predicate=valid), kind="sum")
    if winner is None:
        total = b.op("mul", total, b.const(1 / (kh * kw), dtype))
    b.store(total, y, (*row_major(ys), 0, 0))
    return loop_dispatches([b.body()], tables, label)


def max_pool2d_grad(kernel: OpKernel, tables: Tables) -> list[Dispatch]:
    """g goes to the first maximum of each window."""
    (x, xs), (g, gs) = kernel.operands
    y, ys = kernel.results[0]
    a = kernel.attrs
    winner = tables.scratch(int(np.prod(gs)), I32)
    b = BodyBuilder((*gs, *a["kernel"]), (4, 5))
    b.store(_winner(b, x, xs, tables.dtype(x), a), winner, (*row_major(gs), 0, 0))
    return loop_dispatches([b.body()], tables, kernel.name + "_winner") + _from_windows(
        tables, g, gs, y, ys, a, winner, kernel.name
    )


def max_pool2d_select(kernel: OpKernel, tables: Tables) -> list[Dispatch]:
    """t at the position of each window's first maximum in x."""
    (x, xs), (t, _) = kernel.operands
    (y, ys), a = kernel.results[0], kernel.attrs
    b = BodyBuilder((*ys, *a["kernel"]), (4, 5))
    cell = b.op("convert", _winner(b, x, xs, tables.dtype(x), a), dtype=I32)
    (sh, sw), ((top, _), (left, _)) = a["stride"], a["padding"]
    width = b.const(a["kernel"][1])
    row = b.op("add", b.affine([(2, sh)], -top), b.op("floordiv", cell, width))
    col = b.op("add", b.affine([(3, sw)], -left), b.op("mod", cell, width))
    strides = row_major(xs)
    gather = ((row, strides[2], xs[2]), (col, strides[3], xs[3]))
    value = b.load(t, (strides[0], strides[1], 0, 0, 0, 0), tables.dtype(t), gather=gather)
    b.store(value, y, (*row_major(ys), 0, 0))
    return loop_dispatches([b.body()], tables, kernel.name)


def avg_pool2d_grad(kernel: OpKernel, tables: Tables) -> list[Dispatch]:
    """g / area to every element of each window."""
    (g, gs), (y, ys) = kernel.operands[0], kernel.results[0]
    return _from_windows(tables, g, gs, y, ys, kernel.attrs, None, kernel.name)


def _nonempty(
    run: Callable[[OpKernel, Tables], list[Dispatch]],
) -> Callable[[OpKernel, Tables], list[Dispatch] | None]:
    """Convolutions with nothing to add up go to the reference, which fills zeros."""

    def generate(kernel: OpKernel, tables: Tables) -> list[Dispatch] | None:
        if kernel.epilogue is not None or any(0 in shape for _, shape in (*kernel.operands, *kernel.results)):
            return None
        return run(kernel, tables)

    return generate


GENERATORS = {
    f.__name__: _nonempty(f)
    for f in (
        conv2d,
        conv2d_input_grad,
        conv2d_weight_grad,
        max_pool2d,
        max_pool2d_grad,
        max_pool2d_select,
        avg_pool2d,
        avg_pool2d_grad,
    )
}
