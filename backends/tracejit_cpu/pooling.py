"""Max and average pooling with their gradients: one task per image plane. Called by ``ops.py``.

Windows of a row are handled side by side in the lanes of vectors where columns step by one or two and nothing is padded
(gradients: where windows of two columns do not overlap); everything else goes window by window.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from tracejit.program import OpKernel
from tracejit_cpu import mathlib
from tracejit_cpu.irbuilder import Fn, Module, const, mask_first, memory_type, type_bytes, value_type, vec
from tracejit_cpu.stages import Compiled, Stage

OPS = frozenset({"max_pool2d", "max_pool2d_grad", "max_pool2d_select", "avg_pool2d", "avg_pool2d_grad"})


class Pool:
    """Emits one pooling kernel. Window cells are unrolled; cells in the padding are masked by selects."""

    def __init__(
        self, module: Module, kernel: OpKernel, dtype_of: Callable[[int], np.dtype], name: str
    ) -> None:
        self.op = kernel.op
        self.operands = len(kernel.operands)
        image = kernel.results[0][1] if kernel.op == "avg_pool2d_grad" else kernel.operands[0][1]
        windows = kernel.operands[-1][1] if kernel.op.endswith("_grad") else kernel.results[0][1]
        self.planes, (self.h, self.w), (self.oh, self.ow) = image[0] * image[1], image[2:], windows[2:]
        self.kernel, self.stride = tuple(kernel.attrs["kernel"]), tuple(kernel.attrs["stride"])
        (self.top, self.bottom), (self.left, self.right) = kernel.attrs["padding"]
        self.dtype = dtype_of(kernel.operands[0][0])
        self.ty, self.mem = value_type(self.dtype), memory_type(self.dtype)
        self.fn = Fn(
            module,
            f"{name}_p",
            ", ".join(
                [
                    *(f"ptr %a{i}" for i in range(len(kernel.operands))),
                    "ptr %out",
                    "i64 %lo",
                    "i64 %hi",
                    "ptr %scr",
                ]
            ),
        )
        self.pads = bool(self.top or self.bottom or self.left or self.right)
        self.lanes = module.host.vector_bytes // type_bytes(self.ty)
        step = self.stride[1] if self.op in ("max_pool2d", "avg_pool2d") else 0
        if (
            self.op.endswith("_grad")
            and self.stride[1] == self.kernel[1]
            and self.stride[0] >= self.kernel[0]
        ):
            step = self.stride[1] if self.stride[1] == 2 else 0
        #: Vectors work: an accumulator in the type of memory, columns that are a vector or two apart, no padding.
        self.vectors = self.mem == self.ty and self.dtype.kind == "f" and not self.pads and step in (1, 2)

    def load(self, pointer: str) -> str:
        """Read one element in the computation type."""
        raw = self.fn.load(self.mem, pointer)
        return raw if self.mem == self.ty else self.fn.op(f"fpext {self.mem} {raw} to {self.ty}")

    def store(self, value: str, pointer: str) -> None:
        """Write one element."""
        if self.mem != self.ty:
            value = self.fn.op(f"fptrunc {self.ty} {value} to {self.mem}")
        self.fn.store(self.mem, value, pointer)

    def cells(self, y: str, x: str) -> Iterator[tuple[str, str | None]]:
        """(offset in the plane, in-range condition or None) of every cell of window (y, x), row by row."""
        fn = self.fn
        y0 = fn.iadd(fn.imul(y, self.stride[0]), -self.top)
        x0 = fn.iadd(fn.imul(x, self.stride[1]), -self.left)
        for i in range(self.kernel[0]):
            for j in range(self.kernel[1]):
                row, column = fn.iadd(y0, i), fn.iadd(x0, j)
                at = fn.iadd(fn.imul(row, self.w), column)
                if not self.pads:
                    yield at, None
                    continue
                ok = fn.op(f"icmp ult i64 {row}, {self.h}")
                ok = fn.op(f"and i1 {ok}, {fn.op(f'icmp ult i64 {column}, {self.w}')}")
                yield fn.op(f"select i1 {ok}, i64 {at}, i64 0"), ok

    def winner(self, plane: str, y: str, x: str) -> tuple[str, str]:
        """(value, offset) of the first maximum of a window inside the image; the first NaN wins."""
        fn = self.fn
        n = mathlib.Num(fn, self.ty, 1)
        lowest = const(mathlib.identity("max", self.dtype), self.ty)
        best, place = lowest, "-1"
        for at, ok in self.cells(y, x):
            value = self.load(fn.gep(plane, at, self.mem))
            if n.float:
                better = n.cmp("ogt", value, best)
                nan = n.logic("and", n.isnan(value), n.cmp("ord", best, n.c(0.0)))
                better = n.logic("or", better, nan)
            else:
                better = n.cmp("sgt" if self.dtype.kind == "i" else "ugt", value, best)
            unset = fn.op(f"icmp eq i64 {place}, -1")
            better = n.logic("or", better, unset)
            if ok is not None:
                better = n.logic("and", better, ok)
            best = n.select(better, value, best)
            place = fn.op(f"select i1 {better}, i64 {at}, i64 {place}")
        return best, place

    def emit(self) -> Stage:
        """Emit the function; pointers are the operands in order, then the result."""
        fn = self.fn
        grad = self.op.endswith("_grad")
        area = self.kernel[0] * self.kernel[1]
        with fn.loop("%lo", "%hi") as plane:
            image_at, window_at = fn.imul(plane, self.h * self.w), fn.imul(plane, self.oh * self.ow)
            if grad:
                target = fn.gep("%out", image_at, self.mem)
                self._clear(target, self.h * self.w)
            if self.vectors:
                with fn.loop(0, self.oh) as y:
                    self._row(y, image_at, fn.iadd(window_at, fn.imul(y, self.ow)))
            else:
                self._windows(image_at, window_at)
        fn.finish()
        cost = self.planes * self.oh * self.ow * area * (4 if self.pads else 2) * 0.6
        return Stage(fn.name, list(range(self.operands + 1)), self.planes, cost)

    def _windows(self, image_at: str, window_at: str) -> None:
        """Window by window."""
        fn = self.fn
        area = self.kernel[0] * self.kernel[1]
        source, target = "%a0", fn.gep("%out", image_at, self.mem)
        with fn.loop(0, self.oh) as y, fn.loop(0, self.ow) as x:
            at = fn.iadd(window_at, fn.iadd(fn.imul(y, self.ow), x))
            if self.op == "avg_pool2d":
                total = const(0.0, self.ty)
                plane_p = fn.gep(source, image_at, self.mem)
                for cell, ok in self.cells(y, x):
                    value = self.load(fn.gep(plane_p, cell, self.mem))
                    if ok is not None:
                        value = fn.op(f"select i1 {ok}, {self.ty} {value}, {self.ty} {const(0.0, self.ty)}")
                    total = fn.op(f"fadd {self.ty} {total}, {value}")
                mean = fn.op(f"fmul {self.ty} {total}, {const(1 / area, self.ty)}")
                self.store(mean, fn.gep("%out", at, self.mem))
            elif self.op == "avg_pool2d_grad":
                share = fn.op(
                    f"fmul {self.ty} {self.load(fn.gep(source, at, self.mem))}, {const(1 / area, self.ty)}"
                )
                for cell, ok in self.cells(y, x):
                    self._add(target, cell, share, ok)
            else:
                best, place = self.winner(fn.gep(source, image_at, self.mem), y, x)
                if self.op == "max_pool2d":
                    self.store(best, fn.gep("%out", at, self.mem))
                elif self.op == "max_pool2d_select":
                    chosen = self.load(fn.gep(fn.gep("%a1", image_at, self.mem), place, self.mem))
                    self.store(chosen, fn.gep("%out", at, self.mem))
                else:
                    self._add(target, place, self.load(fn.gep("%a1", at, self.mem)), None)

    # -- in vectors --------------------------------------------------------------------------------------------------
    def _clear(self, target: str, count: int) -> None:
        fn, whole = self.fn, count // self.lanes * self.lanes if self.mem == self.ty else 0
        if whole:
            with fn.loop(0, whole, self.lanes) as i:
                fn.store(self.ty, const(0.0, self.ty, self.lanes), fn.gep(target, i, self.ty), self.lanes)
        with fn.loop(whole, count) as i:
            self.store(const(0.0, self.ty), fn.gep(target, i, self.mem))

    def _row(self, y: str, image_at: str, windows_at: str) -> None:
        """One row of windows: whole vectors of windows in a loop, then the rest."""
        fn, whole = self.fn, self.ow // self.lanes * self.lanes
        top = fn.iadd(image_at, fn.imul(y, self.stride[0] * self.w))
        if whole:
            with fn.loop(0, whole, self.lanes) as x:
                self._side_by_side(
                    fn.iadd(top, fn.imul(x, self.stride[1])), fn.iadd(windows_at, x), self.lanes
                )
        if self.ow > whole:
            self._side_by_side(
                fn.iadd(top, whole * self.stride[1]), fn.iadd(windows_at, whole), self.ow - whole
            )

    def _side_by_side(self, corner: str, window: str, count: int) -> None:
        """``count`` windows in a row, one per lane; ``corner`` is the first pixel, ``window`` the first window."""
        fn, n = self.fn, mathlib.Num(self.fn, self.ty, self.lanes)
        offsets = [i * self.w + j for i in range(self.kernel[0]) for j in range(self.kernel[1])]
        share = n.c(1 / len(offsets))
        if self.op == "avg_pool2d_grad":
            value = n.mul(self._read(fn.gep("%a0", window, self.ty), count), share)
            value = n.add(value, n.c(0.0))  # as adding to a cleared image does: no -0.0
            self._spread(corner, count, [value] * len(offsets))
            return
        cells = [self._every(fn.gep("%a0", fn.iadd(corner, at), self.ty), count) for at in offsets]
        best = n.c(0.0) if self.op == "avg_pool2d" else cells[0]
        bits = "i32" if self.ty == "float" else "i64"
        place = const(0, bits, self.lanes)
        for number, value in enumerate(cells):
            if self.op == "avg_pool2d":
                best = n.add(best, value)
            elif number:
                nan = n.logic("and", n.isnan(value), n.cmp("ord", best, n.c(0.0)))
                better = n.logic("or", n.cmp("ogt", value, best), nan)
                best = n.select(better, value, best)
                full = vec(bits, self.lanes)
                number_c = const(number, bits, self.lanes)
                place = fn.op(f"select <{self.lanes} x i1> {better}, {full} {number_c}, {full} {place}")
        if self.op == "avg_pool2d":
            best = n.mul(best, share)
        if not self.op.endswith("_grad"):
            self._write(best, fn.gep("%out", window, self.ty), count)
            return
        gradient = n.add(self._read(fn.gep("%a1", window, self.ty), count), n.c(0.0))
        parts = []
        for number in range(len(offsets)):
            full = vec(bits, self.lanes)
            chosen = fn.op(f"icmp eq {full} {place}, {const(number, bits, self.lanes)}")
            parts.append(n.select(chosen, gradient, n.c(0.0)))
        self._spread(corner, count, parts)

    def _read(self, pointer: str, count: int) -> str:
        """The first ``count`` elements in a vector; no others are touched."""
        if count >= self.lanes:
            return self.fn.load(self.ty, pointer, self.lanes)
        zero = const(0.0, self.ty, self.lanes)
        return self.fn.masked_load(self.ty, pointer, self.lanes, mask_first(count, self.lanes), zero)

    def _write(self, value: str, pointer: str, count: int) -> None:
        if count >= self.lanes:
            self.fn.store(self.ty, value, pointer, self.lanes)
        elif count > 0:
            self.fn.masked_store(self.ty, value, pointer, self.lanes, mask_first(count, self.lanes))

    def _shuffle(self, a: str, b: str, order: list[int]) -> str:
        full = vec(self.ty, self.lanes)
        places = ", ".join(f"i32 {i}" for i in order)
        return self.fn.op(f"shufflevector {full} {a}, {full} {b}, <{self.lanes} x i32> <{places}>")

    def _every(self, pointer: str, count: int) -> str:
        """``count`` elements, a column step apart."""
        lanes, needed = self.lanes, (count - 1) * self.stride[1] + 1
        low = self._read(pointer, needed)
        if self.stride[1] == 1:
            return low
        high = const(0.0, self.ty, lanes)
        if needed > lanes:
            high = self._read(self.fn.gep(pointer, lanes, self.ty), needed - lanes)
        return self._shuffle(low, high, [2 * i for i in range(lanes)])

    def _spread(self, corner: str, count: int, parts: list[str]) -> None:
        """Write the gradients of the cells of windows of two columns that do not overlap."""
        lanes = self.lanes
        for i in range(self.kernel[0]):
            left, right = parts[2 * i], parts[2 * i + 1]
            row = self.fn.gep("%out", self.fn.iadd(corner, i * self.w), self.ty)
            for half in range(2):
                order = [k // 2 + half * lanes // 2 + lanes * (k % 2) for k in range(lanes)]
                pointer = self.fn.gep(row, half * lanes, self.ty)
                if 2 * count > half * lanes:
                    self._write(self._shuffle(left, right, order), pointer, 2 * count - half * lanes)

    def _add(self, target: str, at: str, value: str, ok: str | None) -> None:
        fn = self.fn
        pointer = fn.gep(target, at, self.mem)
        if ok is not None:
            value = fn.op(f"select i1 {ok}, {self.ty} {value}, {self.ty} {const(-0.0, self.ty)}")
        total = fn.op(f"fadd {self.ty} {self.load(pointer)}, {value}")
        self.store(total, pointer)


def compile_pool(
    module: Module, kernel: OpKernel, dtype_of: Callable[[int], np.dtype], name: str
) -> list[tuple[Compiled, list[int]]]:
    """Emit a pooling op."""
    stage = Pool(module, kernel, dtype_of, name).emit()
    return [(Compiled([stage]), [*(b for b, _ in kernel.operands), kernel.results[0][0]])]
