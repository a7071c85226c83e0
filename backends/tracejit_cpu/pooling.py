"""Max and average pooling with their gradients: one task per image plane. Called by ``ops.py``."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from tracejit.program import OpKernel
from tracejit_cpu import mathlib
from tracejit_cpu.irbuilder import Fn, Module, const, memory_type, value_type
from tracejit_cpu.loops import Compiled, Stage

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
        source = "%a0"
        with fn.loop("%lo", "%hi") as plane:
            image_at, window_at = fn.imul(plane, self.h * self.w), fn.imul(plane, self.oh * self.ow)
            if grad:
                target = fn.gep("%out", image_at, self.mem)
                with fn.loop(0, self.h * self.w) as i:
                    self.store(const(0.0, self.ty), fn.gep(target, i, self.mem))
            with fn.loop(0, self.oh) as y, fn.loop(0, self.ow) as x:
                at = fn.iadd(window_at, fn.iadd(fn.imul(y, self.ow), x))
                if self.op == "avg_pool2d":
                    total = const(0.0, self.ty)
                    plane_p = fn.gep(source, image_at, self.mem)
                    for cell, ok in self.cells(y, x):
                        value = self.load(fn.gep(plane_p, cell, self.mem))
                        if ok is not None:
                            value = fn.op(
                                f"select i1 {ok}, {self.ty} {value}, {self.ty} {const(0.0, self.ty)}"
                            )
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
        fn.finish()
        cost = self.planes * self.oh * self.ow * area * (4 if self.pads else 2) * 0.6
        return Stage(fn.name, list(range(self.operands + 1)), self.planes, cost)

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
