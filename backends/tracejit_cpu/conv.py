"""Convolutions as implicit matrix products: forward, input gradient, weight gradient. Called by ``ops.py``.

A task takes one image (or some rows of it): it copies the image into a padded scratch image, unfolds it block by block
(``columns[c, kh, kw][pixel]``) and multiplies with the weights by the micro-kernels of ``micro.py``. The input gradient
is the same convolution of the zero-stuffed gradient with the flipped, transposed weights. The weight gradient sums fixed
groups of images into partial results, which a second stage adds in order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tracejit.program import Access, Instr, LoopBody
from tracejit_cpu.body import Local, body_cost, localize
from tracejit_cpu.epilogue import Epilogue
from tracejit_cpu.irbuilder import Fn, Module, const, memory_type, vec
from tracejit_cpu.micro import Tile, micro_kernel, pack, tile_for
from tracejit_cpu.stages import Compiled, Stage

COLUMN_BYTES = 192 << 10  # unfolded block of one task
PARTIALS = 16


@dataclass(frozen=True)
class Geometry:
    """A stride-``stride`` correlation of images that are first spread (``insert``) and shifted into a padded frame."""

    images: int
    groups: int
    cin: int  # channels per group
    cout: int  # results per group
    size: tuple[int, int]  # of the source image
    frame: tuple[int, int]  # padded image
    insert: tuple[int, int]  # distance of source pixels in the frame
    shift: tuple[int, int]  # position of source pixel (0, 0) in the frame; may be negative
    kernel: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    out: tuple[int, int]

    @property
    def depth(self) -> int:
        """Length of the contraction."""
        return self.cin * self.kernel[0] * self.kernel[1]

    @property
    def pixels(self) -> int:
        """Results per image and channel."""
        return self.out[0] * self.out[1]


def forward_geometry(
    x: tuple[int, ...], w: tuple[int, ...], out: tuple[int, ...], attrs: Mapping[str, Any]
) -> Geometry:
    """Geometry of ``conv2d(x, w)`` with result shape ``out``."""
    (top, bottom), (left, right) = attrs["padding"]
    groups = int(attrs.get("groups", 1))
    frame = (x[2] + top + bottom, x[3] + left + right)
    return Geometry(
        x[0], groups, w[1], w[0] // groups, (x[2], x[3]), frame, (1, 1), (top, left), (w[2], w[3]),
        tuple(attrs["stride"]), tuple(attrs["dilation"]), (out[2], out[3]),
    )  # fmt: skip


def input_grad_geometry(
    g: tuple[int, ...], w: tuple[int, ...], x: tuple[int, ...], attrs: Mapping[str, Any]
) -> Geometry:
    """Geometry of the correlation that gives dx: g spread by the stride, kernel flipped."""
    (top, _), (left, _) = attrs["padding"]
    groups = int(attrs.get("groups", 1))
    dy, dx = attrs["dilation"]
    reach = ((w[2] - 1) * dy, (w[3] - 1) * dx)
    return Geometry(
        x[0], groups, w[0] // groups, w[1], (g[2], g[3]), (x[2] + reach[0], x[3] + reach[1]), tuple(attrs["stride"]),
        (reach[0] - top, reach[1] - left), (w[2], w[3]), (1, 1), (dy, dx), (x[2], x[3]),
    )  # fmt: skip


def plain_epilogue(shape: tuple[int, ...], buffer: int, dtype: np.dtype) -> LoopBody:
    """Store the accumulator."""
    strides, step = [], 1
    for n in reversed(shape):
        strides.append(step)
        step *= n
    axes = tuple(range(len(shape)))
    instrs = (
        Instr("acc", (), dtype, axes),
        Instr("store", (0,), dtype, axes, {"access": Access(buffer, tuple(reversed(strides)))}),
    )
    return LoopBody(shape, instrs)


class ConvCompiler:
    """Emits the stages of one convolution. Pointers of stages: result buffers of the epilogue, source, weights."""

    def __init__(
        self, module: Module, name: str, geometry: Geometry, src: np.dtype, weights: np.dtype, acc: str
    ) -> None:
        self.module, self.name, self.g = module, name, geometry
        self.src_type, self.w_type = memory_type(src), memory_type(weights)
        self.tile: Tile = tile_for(module.host, acc)
        self.ty = acc
        self.temps: list[int] = []
        self.stages: list[Stage] = []
        g = geometry
        rows = max(1, COLUMN_BYTES // max(1, g.depth * g.out[1] * self.tile.bytes))
        self.block_rows = min(rows, g.out[0])
        self.pitch = -(-self.block_rows * g.out[1] // self.tile.nr) * self.tile.nr + self.tile.lanes
        self.frame_bytes = (
            -(-(g.cin * g.frame[0] * g.frame[1] + 4 * self.tile.lanes) * self.tile.bytes // 64) * 64
        )
        self.column_bytes = -(-(g.depth * self.pitch + 4 * self.tile.nr) * self.tile.bytes // 64) * 64

    # -- pieces -------------------------------------------------------------------------------------------------------
    def _build_frame(self, fn: Fn, source: str, frame: str) -> None:
        """Copy one group of channels of an image into the padded frame (zero where no source pixel falls)."""
        g, ty, t = self.g, self.ty, self.tile
        fh, fw = g.frame
        plain = g.insert == (1, 1) and g.shift == (0, 0) and g.frame == g.size and self.src_type == ty
        if plain:
            self._copy(fn, source, frame, g.cin * fh * fw)
            return
        self._fill_zero(fn, frame, g.cin * fh * fw)
        low = [-(s // i) if s < 0 else 0 for s, i in zip(g.shift, g.insert)]
        high = [min(n, -(-(f - s) // i)) for n, f, s, i in zip(g.size, g.frame, g.shift, g.insert)]
        with fn.loop(0, g.cin) as c, fn.loop(low[0], max(low[0], high[0])) as y:
            src = fn.gep(
                source, fn.iadd(fn.imul(c, g.size[0] * g.size[1]), fn.imul(y, g.size[1])), self.src_type
            )
            at = fn.iadd(fn.imul(c, fh * fw), fn.imul(fn.iadd(fn.imul(y, g.insert[0]), g.shift[0]), fw))
            dst = fn.gep(frame, fn.iadd(at, g.shift[1]), ty)
            count = high[1] - low[1]
            vectors = count // t.lanes if g.insert[1] == 1 and self.src_type == ty else 0
            if vectors:
                with fn.loop(low[1], low[1] + vectors * t.lanes, t.lanes) as x:
                    fn.store(ty, fn.load(ty, fn.gep(src, x, ty), t.lanes), fn.gep(dst, x, ty), t.lanes)
            with fn.loop(low[1] + vectors * t.lanes, max(low[1], high[1])) as x:
                value = fn.load(self.src_type, fn.gep(src, x, self.src_type))
                if self.src_type != ty:
                    value = fn.op(f"fpext {self.src_type} {value} to {ty}")
                fn.store(ty, value, fn.gep(dst, fn.imul(x, g.insert[1]), ty))

    def _fill_zero(self, fn: Fn, pointer: str, count: int) -> None:
        t = self.tile
        with fn.loop(0, count, t.lanes) as i:
            fn.store(self.ty, const(0.0, self.ty, t.lanes), fn.gep(pointer, i, self.ty), t.lanes)

    def _copy(self, fn: Fn, source: str, target: str, count: int) -> None:
        t, whole = self.tile, count // self.tile.lanes * self.tile.lanes
        with fn.loop(0, whole, t.lanes) as i:
            fn.store(
                self.ty,
                fn.load(self.ty, fn.gep(source, i, self.ty), t.lanes),
                fn.gep(target, i, self.ty),
                t.lanes,
            )
        with fn.loop(whole, count) as i:
            fn.store(self.ty, fn.load(self.ty, fn.gep(source, i, self.ty)), fn.gep(target, i, self.ty))

    def _unfold(self, fn: Fn, frame: str, columns: str, first_row: str, rows: int | str) -> None:
        """columns[k][r*ow + x] = frame pixel under weight k for result row ``first_row + r``."""
        g, ty, t = self.g, self.ty, self.tile
        (fh, fw), (kh, kw), (oh, ow) = g.frame, g.kernel, g.out
        del oh
        with fn.loop(0, g.cin) as c, fn.loop(0, kh) as y, fn.loop(0, kw) as x:
            k = fn.iadd(fn.imul(fn.iadd(fn.imul(c, kh), y), kw), x)
            row0 = fn.iadd(fn.imul(first_row, g.stride[0]), fn.imul(y, g.dilation[0]))
            at = fn.iadd(fn.iadd(fn.imul(c, fh * fw), fn.imul(row0, fw)), fn.imul(x, g.dilation[1]))
            src0 = fn.gep(frame, at, ty)
            dst0 = fn.gep(columns, fn.imul(k, self.pitch), ty)
            with fn.loop(0, rows) as r:
                src = fn.gep(src0, fn.imul(r, g.stride[0] * fw), ty)
                dst = fn.gep(dst0, fn.imul(r, ow), ty)
                if g.stride[1] != 1:
                    with fn.loop(0, ow) as v:
                        at = fn.gep(src, fn.imul(v, g.stride[1]), ty)
                        fn.store(ty, fn.load(ty, at), fn.gep(dst, v, ty))
                # whole vectors: what spills over is overwritten by the next row or never used
                elif ow > 8 * t.lanes:
                    with fn.loop(0, ow, t.lanes) as v:
                        fn.store(ty, fn.load(ty, fn.gep(src, v, ty), t.lanes), fn.gep(dst, v, ty), t.lanes)
                else:
                    for first in range(0, ow, t.lanes):
                        value = fn.load(ty, fn.gep(src, first, ty), t.lanes)
                        fn.store(ty, value, fn.gep(dst, first, ty), t.lanes)

    def _convert_stage(self, count: int, buffer: int, transpose: tuple[int, ...] | None) -> int:
        """Weights into a temporary in the accumulator's type; with ``transpose`` flipped for the input gradient."""
        g, ty = self.g, self.ty
        temp = len(self.temps)
        self.temps.append(count * self.tile.bytes + 256)
        fn = Fn(self.module, f"{self.name}_w", "ptr %src, ptr %dst, i64 %lo, i64 %hi, ptr %scr")

        def read(at: str) -> str:
            value = fn.load(self.w_type, fn.gep("%src", at, self.w_type))
            return value if self.w_type == ty else fn.op(f"fpext {self.w_type} {value} to {ty}")

        taps = g.kernel[0] * g.kernel[1]
        if transpose is None:
            with fn.loop("%lo", "%hi") as o, fn.loop(0, g.depth) as k:
                at = fn.iadd(fn.imul(o, g.depth), k)
                fn.store(ty, read(at), fn.gep("%dst", at, ty))
            tasks = g.groups * g.cout
        else:
            # row (group, c), column (o, kh', kw') <- w[group*cin + o, c, KH-1-kh', KW-1-kw']; cin, cout as in Geometry
            tasks = g.groups * g.cout
            with fn.loop("%lo", "%hi") as row, fn.loop(0, g.cin) as o, fn.loop(0, taps) as tap:
                group, c = fn.op(f"udiv i64 {row}, {g.cout}"), fn.op(f"urem i64 {row}, {g.cout}")
                source = fn.imul(fn.iadd(fn.imul(fn.iadd(fn.imul(group, g.cin), o), g.cout), c), taps)
                source = fn.iadd(source, fn.op(f"sub i64 {taps - 1}, {tap}"))
                at = fn.iadd(fn.iadd(fn.imul(row, g.depth), fn.imul(o, taps)), tap)
                fn.store(ty, read(source), fn.gep("%dst", at, ty))
        fn.finish()
        self.stages.append(Stage(fn.name, [buffer, ~temp], tasks, count * 1.0, only_reads=[buffer]))
        return temp

    # -- correlation ----------------------------------------------------------------------------------------------------
    def correlate(self, local: Local, flipped: bool) -> Compiled:
        """Forward and input gradient: results go through the epilogue ``local`` with axes (image, channel, pixel)."""
        g, t, ty = self.g, self.tile, self.ty
        count = len(local.buffers)
        source, weights = count, count + 1
        temp = None
        if flipped or self.w_type != ty:
            temp = self._convert_stage(g.groups * g.cout * g.depth, weights, (1,) if flipped else None)
        rows = min(t.mr, g.cout)
        blocks = -(-g.cout // rows)
        splits = 1
        while g.images * g.groups * splits < 16 and splits * 2 <= -(-g.out[0] // self.block_rows):
            splits *= 2
        full_blocks, rest = divmod(g.out[0], self.block_rows)
        epilogue = Epilogue(self.module, local, self.name, t, [0], 1, 2)
        params = [f"ptr %arg{i}" for i in range(count)] + ["ptr %src", "ptr %w"]
        fn = Fn(self.module, f"{self.name}_c", ", ".join([*params, "i64 %lo", "i64 %hi", "ptr %scr"]))
        frame, columns = "%scr", fn.gep("%scr", self.frame_bytes, "i8")
        out_tile = fn.gep("%scr", self.frame_bytes + self.column_bytes, "i8")
        all_blocks = full_blocks + (1 if rest else 0)
        per = -(-all_blocks // splits)
        epilogue.begin(fn)
        with fn.loop("%lo", "%hi") as task:
            part = fn.op(f"urem i64 {task}, {splits}") if splits > 1 else "0"
            rest_task = fn.op(f"udiv i64 {task}, {splits}") if splits > 1 else task
            group = fn.op(f"urem i64 {rest_task}, {g.groups}") if g.groups > 1 else "0"
            image = fn.op(f"udiv i64 {rest_task}, {g.groups}") if g.groups > 1 else rest_task
            plane = g.size[0] * g.size[1]
            offset = fn.imul(fn.iadd(fn.imul(image, g.groups), group), g.cin * plane)
            self._build_frame(fn, fn.gep("%src", offset, self.src_type), frame)
            w = fn.gep("%w", fn.imul(group, g.cout * g.depth), ty)

            def block(index: str, height: int) -> None:
                first = fn.imul(index, self.block_rows)
                self._unfold(fn, frame, columns, first, height)
                width = height * g.out[1]
                pixel0 = fn.imul(first, g.out[1])

                def panel(at: str | int, w_panel: int) -> None:
                    mk = micro_kernel(self.module, t, rows, -(-w_panel // t.lanes))
                    bp = fn.gep(columns, at, ty)
                    with fn.loop(0, blocks) as b:
                        start = fn.imul(b, rows)
                        m0 = fn.imin(start, g.cout - rows) if g.cout % rows else start
                        ap = fn.gep(w, fn.imul(m0, g.depth), ty)
                        left, right = f"ptr {ap}, i64 {g.depth}, i64 1", f"ptr {bp}, i64 {self.pitch}"
                        fn.emit(f"call void @{mk}({left}, {right}, i64 {g.depth}, ptr {out_tile}, i64 0)")
                        skip = fn.op(f"sub i64 {start}, {m0}")
                        new = fn.op(f"sub i64 {rows}, {skip}")
                        result = fn.gep(out_tile, fn.imul(skip, t.nr), ty)
                        channel = fn.iadd(fn.imul(group, g.cout), start)
                        pixel = fn.iadd(pixel0, at)
                        epilogue.apply(fn, w_panel, [image], channel, new, pixel, result)

                whole = width // t.nr * t.nr
                if whole:
                    with fn.loop(0, whole, t.nr) as at:
                        panel(at, t.nr)
                if width % t.nr:
                    panel(whole, width % t.nr)

            low = fn.imul(part, per)
            high = fn.imin(fn.iadd(low, per), all_blocks)
            if full_blocks:
                with fn.loop(low, fn.imin(high, full_blocks)) as i:
                    block(i, self.block_rows)
            if rest:
                with fn.when(fn.op(f"icmp eq i64 {high}, {all_blocks}") if splits > 1 else "true"):
                    block(str(full_blocks), rest)
        fn.finish()
        flops = 2.0 * g.images * g.groups * g.cout * g.depth * g.pixels
        cost = flops / (4 * t.lanes) * 0.6 + g.images * g.groups * g.cout * g.pixels * body_cost(local) * 0.05
        scratch = self.frame_bytes + self.column_bytes + t.mr * t.nr * t.bytes + 256
        pointers = [*range(count), source, weights if temp is None else ~temp]
        after = list(range(len(self.stages)))
        self.stages.append(Stage(fn.name, pointers, g.images * g.groups * splits, cost, scratch, after))
        return Compiled(self.stages, self.temps)

    # -- weight gradient --------------------------------------------------------------------------------------------------
    def weight_grad(self, result: np.dtype) -> Compiled:
        """dW from (x, g): pointers 0 = dW, 1 = x, 2 = g."""
        g, t, ty = self.g, self.tile, self.ty
        parts = min(g.images, PARTIALS)
        each = -(-g.images // parts)
        parts = -(-g.images // each)
        rows = min(t.mr, g.depth)
        blocks, panels = -(-g.depth // rows), -(-g.cout // t.nr)
        tile_items = t.mr * t.nr
        part_items = g.groups * panels * blocks * tile_items
        self.temps.append(parts * part_items * t.bytes + 256)
        packed_items = self.block_rows * g.out[1] * t.nr + 4 * t.lanes
        packed_bytes = -(-packed_items * t.bytes // 64) * 64
        g_type = self.w_type
        fn = Fn(self.module, f"{self.name}_g", "ptr %x, ptr %g, ptr %p, i64 %lo, i64 %hi, ptr %scr")
        frame, columns = "%scr", fn.gep("%scr", self.frame_bytes, "i8")
        packed = fn.gep("%scr", self.frame_bytes + self.column_bytes, "i8")
        full_blocks, rest = divmod(g.out[0], self.block_rows)
        with fn.loop("%lo", "%hi") as task:
            group = fn.op(f"urem i64 {task}, {g.groups}") if g.groups > 1 else "0"
            chunk = fn.op(f"udiv i64 {task}, {g.groups}") if g.groups > 1 else task
            mine = fn.gep(
                "%p", fn.iadd(fn.imul(chunk, part_items), fn.imul(group, panels * blocks * tile_items)), ty
            )
            first = fn.imul(chunk, each)
            with fn.loop(first, fn.imin(fn.iadd(first, each), g.images)) as image:
                plane = fn.iadd(fn.imul(image, g.groups), group)
                self._build_frame(
                    fn, fn.gep("%x", fn.imul(plane, g.cin * g.size[0] * g.size[1]), self.src_type), frame
                )
                grads = fn.gep("%g", fn.imul(plane, g.cout * g.pixels), g_type)

                def block(index: str, height: int) -> None:
                    row = fn.imul(index, self.block_rows)
                    self._unfold(fn, frame, columns, row, height)
                    pixels = height * g.out[1]
                    behind = fn.op(f"sub i64 {image}, {first}")
                    begun = fn.op(f"icmp ne i64 {fn.op(f'or i64 {row}, {behind}')}, 0")
                    add = fn.op(f"zext i1 {begun} to i64")
                    with fn.loop(0, panels) as pn:
                        o0 = fn.imul(pn, t.nr)
                        left = fn.imin(fn.op(f"sub i64 {g.cout}, {o0}"), t.nr)
                        src = fn.gep(grads, fn.iadd(fn.imul(o0, g.pixels), fn.imul(row, g.out[1])), g_type)
                        name = pack(self.module, ty, g_type, t.lanes, t.nr)
                        fn.emit(
                            f"call void @{name}(ptr {src}, i64 1, i64 {g.pixels}, i64 {pixels}, i64 {left}, ptr {packed})"
                        )
                        mk = micro_kernel(self.module, t, rows, t.nv if g.cout > t.lanes else 1)
                        with fn.loop(0, blocks) as b:
                            m0 = fn.imul(b, rows)
                            m0 = fn.imin(m0, g.depth - rows) if g.depth % rows else m0
                            ap = fn.gep(columns, fn.imul(m0, self.pitch), ty)
                            out = fn.gep(mine, fn.imul(fn.iadd(fn.imul(pn, blocks), b), tile_items), ty)
                            left, right = f"ptr {ap}, i64 {self.pitch}, i64 1", f"ptr {packed}, i64 {t.nr}"
                            fn.emit(f"call void @{mk}({left}, {right}, i64 {pixels}, ptr {out}, i64 {add})")

                if full_blocks:
                    with fn.loop(0, full_blocks) as i:
                        block(i, self.block_rows)
                if rest:
                    block(str(full_blocks), rest)
        fn.finish()
        flops = 2.0 * g.images * g.groups * g.cout * g.depth * g.pixels
        scratch = self.frame_bytes + self.column_bytes + packed_bytes + 256
        self.stages.append(Stage(fn.name, [1, 2, ~0], parts * g.groups, flops / (4 * t.lanes) * 0.7, scratch))
        self._sum_partials(parts, part_items, rows, blocks, panels, result)
        return Compiled(self.stages, self.temps)

    def _sum_partials(
        self, parts: int, part_items: int, rows: int, blocks: int, panels: int, result: np.dtype
    ) -> None:
        """dW[o, k] = sum over the groups of images, in order; one task per tile."""
        g, t, ty = self.g, self.tile, self.ty
        out_type = memory_type(result)
        fn = Fn(self.module, f"{self.name}_s", "ptr %out, ptr %p, i64 %lo, i64 %hi, ptr %scr")
        with fn.loop("%lo", "%hi") as task:
            b = fn.op(f"urem i64 {task}, {blocks}")
            above = fn.op(f"udiv i64 {task}, {blocks}")
            pn = fn.op(f"urem i64 {above}, {panels}")
            group = fn.op(f"udiv i64 {above}, {panels}")
            start = fn.imul(b, rows)
            m0 = fn.imin(start, g.depth - rows) if g.depth % rows else start
            o0 = fn.imul(pn, t.nr)
            left = fn.imin(fn.op(f"sub i64 {g.cout}, {o0}"), t.nr)
            source = fn.gep("%p", fn.imul(task, t.mr * t.nr), ty)
            with fn.loop(0, rows) as r:
                for v in range(t.nv if g.cout > t.lanes else 1):
                    total = fn.var(vec(ty, t.lanes), const(0.0, ty, t.lanes))
                    with fn.loop(0, parts) as c:
                        at = fn.iadd(fn.imul(c, part_items), fn.iadd(fn.imul(r, t.nr), v * t.lanes))
                        x = fn.load(ty, fn.gep(source, at, ty), t.lanes)
                        fn.set(
                            vec(ty, t.lanes),
                            fn.op(f"fadd {vec(ty, t.lanes)} {fn.get(vec(ty, t.lanes), total)}, {x}"),
                            total,
                        )
                    fn.store(ty, fn.get(vec(ty, t.lanes), total), fn.gep("%scr", v * t.lanes, ty), t.lanes)
                k = fn.iadd(m0, r)
                with fn.loop(0, left) as o:
                    value = fn.load(ty, fn.gep("%scr", o, ty))
                    if out_type != ty:
                        value = fn.op(f"fptrunc {ty} {value} to {out_type}")
                    row = fn.iadd(fn.iadd(fn.imul(group, g.cout), o0), o)
                    fn.store(out_type, value, fn.gep("%out", fn.iadd(fn.imul(row, g.depth), k), out_type))
        fn.finish()
        cost = parts * part_items * 0.3
        self.stages.append(Stage(fn.name, [0, ~0], g.groups * panels * blocks, cost, t.nr * t.bytes + 64))


def epilogue_axes(body: LoopBody, dtype_of: Callable[[int], np.dtype]) -> Local | None:
    """The epilogue over (image, channel, pixel); None if rows and columns of the image do not merge."""
    rows, columns = body.domain[2], body.domain[3]
    for ins in body.instrs:
        strides = ins.attrs["access"].strides if "access" in ins.attrs else ins.attrs.get("strides")
        if strides is not None and rows > 1 and columns > 1 and strides[2] != strides[3] * columns:
            return None
        if ins.op == "index" and ins.attrs["axis"] in (2, 3):
            return None
    pixel = [2, 3] if columns > 1 else [3, 2]
    return localize(body, dtype_of, [[0], [1], pixel])
