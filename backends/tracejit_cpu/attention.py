"""Flash attention, forward and backward, on the micro-kernels of ``micro.py``. Called by ``compiler.py``.

One task handles the queries of one head (forward: or a group of query blocks). Scores exist only for a block of queries:
they are computed tile by tile, turned into probabilities row by row, and consumed at once (Dao, FlashAttention-2, 2023).
With ``causal`` the keys behind a block are skipped. Operands are first copied into scratch with rows padded to whole
tiles, which makes every layout and dtype alike; padded rows and columns only produce values that are never stored.
"""

from __future__ import annotations

import math
from functools import partial

from tracejit.program import AttentionKernel
from tracejit_cpu import mathlib
from tracejit_cpu.attention_base import AttentionBase, DtypeOf
from tracejit_cpu.irbuilder import Fn, Module, memory_type, vec
from tracejit_cpu.stages import Compiled


class AttentionCompiler(AttentionBase):
    """The forward and the backward kernel."""

    # -- forward ----------------------------------------------------------------------------------------------------------
    def forward(self) -> Compiled:
        """softmax(scale Q K^T + mask) V, block of queries by block of queries."""
        k, t, ty, lanes = self.k, self.tile, self.ty, self.tile.lanes
        fn = self._begin(["q", "k", "v", "mask", "out", "lse"])
        blocks = self.blocks
        groups = 1 if self.heads >= 16 else min(blocks, -(-16 // max(1, self.heads)))
        per = -(-blocks // groups)
        groups = -(-blocks // per)
        n = mathlib.Num(fn, ty, lanes)
        one = mathlib.Num(fn, ty, 1)
        full = vec(ty, lanes)
        with fn.loop("%lo", "%hi") as task:
            head = fn.op(f"udiv i64 {task}, {groups}") if groups > 1 else task
            group = fn.op(f"urem i64 {task}, {groups}") if groups > 1 else "0"
            at = self._heads(fn, head)
            kc = self._copy(fn, "k", at["k"], k.tk, k.d, self.tk, self.dp)
            kt = self._panels(fn, kc, self.dp, self.dp)
            vc = self._copy(fn, "v", at["v"], k.tk, k.dv_dim, self.tk, self.vp)
            qc = self._scratch(fn, self.block * self.dp)
            scores = self._scratch(fn, self.block * self.tk)
            probs = self._scratch(fn, self.block * self.tk)
            acc = self._scratch(fn, self.block * self.vp)
            inverse, peaks = self._scratch(fn, self.block), self._scratch(fn, self.block)
            low = fn.imul(group, per)
            with fn.loop(low, fn.imin(fn.iadd(low, per), blocks)) as b:
                first = fn.imul(b, self.block)
                rows, whole = self._rows(fn, first)
                self._copy_block(fn, "q", at["q"], first, rows, k.d, qc, self.dp)
                step = self.block * t.nr
                self._product(
                    fn, whole, self._panels_for(fn, self._keys(fn, first, rows)), qc, self.dp, 1,
                    kt, t.nr * self.dp, t.nr, k.d, scores, step, 0,
                    start=partial(self._start, fn, first),
                )  # fmt: skip
                with fn.loop(0, rows) as r:
                    row = fn.iadd(first, r)
                    limit = self._limit(fn, row)
                    panels = self._panels_for(fn, self._seen(fn, first, self._tile_of(fn, r)))
                    source, target = (
                        fn.gep(scores, fn.imul(r, t.nr), ty),
                        fn.gep(probs, fn.imul(r, self.tk), ty),
                    )
                    top = fn.var(full, n.c(-math.inf))
                    for p, end in self._key_loops(fn, limit, panels):
                        for v in range(t.nv):
                            key = fn.iadd(fn.imul(p, t.nr), v * lanes)
                            raw = fn.load(ty, fn.gep(source, fn.iadd(fn.imul(p, step), v * lanes), ty), lanes)
                            x = self._score(fn, n, raw, row, key, end, at.get("mask"))
                            fn.store(ty, x, fn.gep(target, key, ty), lanes)
                            old = fn.get(full, top)
                            fn.set(full, n.select(n.cmp("ogt", x, old), x, old), top)
                    peak = mathlib.horizontal(fn, "max", self._dtype(), lanes, fn.get(full, top))
                    none = one.cmp("oeq", peak, one.c(-math.inf))
                    safe = fn.splat(one.select(none, one.c(0.0), peak), ty, lanes)
                    sums = [fn.var(full, n.c(0.0)) for _ in range(t.nv)]
                    with fn.loop(0, panels) as p:
                        for v in range(t.nv):
                            pointer = fn.gep(target, fn.iadd(fn.imul(p, t.nr), v * lanes), ty)
                            e = self._exp(fn, n, n.sub(fn.load(ty, pointer, lanes), safe))
                            fn.store(ty, e, pointer, lanes)
                            fn.set(full, n.add(fn.get(full, sums[v]), e), sums[v])
                    total = fn.get(full, sums[0])
                    for s in sums[1:]:
                        total = n.add(total, fn.get(full, s))
                    total = mathlib.horizontal(fn, "sum", self._dtype(), lanes, total)
                    fn.store(ty, total, fn.gep(inverse, r, ty))
                    fn.store(ty, peak, fn.gep(peaks, r, ty))
                self._finish_rows(fn, first, rows, inverse, peaks, at)
                self._product(
                    fn, whole, self.vp // t.nr, probs, self.tk, 1, vc, t.nr, self.vp, 0, acc, step, 0,
                    span=partial(self._forward_span, fn, first),
                )  # fmt: skip
                self._store_rows(fn, "out", at["out"], first, rows, k.dv_dim, acc, step, inverse)
        fn.finish()
        return self._finish(fn, self.heads * groups, 2)

    def _finish_rows(self, fn: Fn, first: str, rows: str, sums: str, peaks: str, at: dict[str, str]) -> None:
        """Sums of exponentials become their inverses; the log-sum-exp of each row is stored for the gradient."""
        ty, lanes, lse = self.ty, self.tile.lanes, self.k.lse
        n = mathlib.Num(fn, ty, lanes)
        with fn.loop(0, self.block, lanes) as r:
            place = fn.gep(sums, r, ty)
            total = fn.load(ty, place, lanes)
            total = n.select(n.cmp("oeq", total, n.c(0.0)), n.c(math.nan), total)  # a row without keys
            fn.store(ty, n.div(n.c(1.0), total), place, lanes)
            if lse is not None:
                log = mathlib.emit(fn, "log", [total], [self._dtype()], self._dtype(), lanes, {})
                place = fn.gep(peaks, r, ty)
                fn.store(ty, n.add(fn.load(ty, place, lanes), log), place, lanes)
        if lse is None:
            return
        mem = memory_type(self.dtype_of(lse.buffer))
        with fn.loop(0, rows) as r:
            value = fn.load(ty, fn.gep(peaks, r, ty))
            if mem == "half":
                value = fn.op(f"fptrunc float {value} to half")
            fn.store(mem, value, fn.gep(at["lse"], fn.imul(fn.iadd(first, r), lse.strides[-1]), mem))

    # -- backward -----------------------------------------------------------------------------------------------------------
    def backward(self) -> Compiled:
        """dq, dk and dv of one head per task; probabilities are recomputed from the stored log-sum-exp."""
        k, t, ty, lanes = self.k, self.tile, self.ty, self.tile.lanes
        fn = self._begin(["q", "k", "v", "mask", "out", "lse", "dout", "dq", "dk", "dv"])
        assert k.lse is not None
        n = mathlib.Num(fn, ty, lanes)
        step = self.block * t.nr
        with fn.loop("%lo", "%hi") as head:
            at = self._heads(fn, head)
            kc = self._copy(fn, "k", at["k"], k.tk, k.d, self.tk, self.dp)
            vc = self._copy(fn, "v", at["v"], k.tk, k.dv_dim, self.tk, self.vp)
            kt, vt = self._panels(fn, kc, self.dp, self.dp), self._panels(fn, vc, self.vp, self.vp)
            qc, gc = self._scratch(fn, self.block * self.dp), self._scratch(fn, self.block * self.vp)
            oc = self._scratch(fn, self.block * self.vp)
            scores, dprobs = self._scratch(fn, self.block * self.tk), self._scratch(fn, self.block * self.tk)
            probs, dscores = self._scratch(fn, self.block * self.tk), self._scratch(fn, self.block * self.tk)
            dq = self._scratch(fn, self.block * self.dp)
            dk, dv = self._scratch(fn, self.tall * self.dp), self._scratch(fn, self.tall * self.vp)
            for pointer, items in ((dk, self.tall * self.dp), (dv, self.tall * self.vp)):
                with fn.loop(0, items, lanes) as i:
                    fn.store(ty, n.c(0.0), fn.gep(pointer, i, ty), lanes)
            with fn.loop(0, self.blocks) as b:
                first = fn.imul(b, self.block)
                rows, whole = self._rows(fn, first)
                self._copy_block(fn, "q", at["q"], first, rows, k.d, qc, self.dp)
                self._copy_block(fn, "dout", at["dout"], first, rows, k.dv_dim, gc, self.vp)
                self._copy_block(fn, "out", at["out"], first, rows, k.dv_dim, oc, self.vp)
                keys = self._keys(fn, first, rows)
                panels = self._panels_for(fn, keys)

                start = partial(self._start, fn, first)
                self._product(
                    fn, whole, panels, qc, self.dp, 1, kt, t.nr * self.dp, t.nr, k.d, scores, step, 0, start
                )
                self._product(
                    fn,
                    whole,
                    panels,
                    gc,
                    self.vp,
                    1,
                    vt,
                    t.nr * self.vp,
                    t.nr,
                    k.dv_dim,
                    dprobs,
                    step,
                    0,
                    start,
                )
                with fn.loop(0, rows) as r:
                    seen = self._panels_for(fn, self._seen(fn, first, self._tile_of(fn, r)))
                    self._row_grad(fn, n, r, first, seen, step, at, (gc, oc, scores, dprobs, probs, dscores))
                # dq = dS K;  dv += P^T dO;  dk += dS^T Q
                self._product(
                    fn, whole, self.dp // t.nr, dscores, self.tk, 1, kc, t.nr, self.dp, 0, dq, step, 0,
                    span=partial(self._forward_span, fn, first),
                )  # fmt: skip
                self._store_rows(fn, "dq", at["dq"], first, rows, k.d, dq, step, None)

                span = partial(self._backward_span, fn, first, rows)
                tall = self.tall * t.nr
                for what, grad, source, width in ((probs, dv, gc, self.vp), (dscores, dk, qc, self.dp)):
                    self._product(
                        fn,
                        keys,
                        width // t.nr,
                        what,
                        1,
                        self.tk,
                        source,
                        t.nr,
                        width,
                        0,
                        grad,
                        tall,
                        1,
                        span=span,
                    )
            tall = self.tall * t.nr
            self._store_rows(fn, "dk", at["dk"], "0", str(k.tk), k.d, dk, tall, None)
            self._store_rows(fn, "dv", at["dv"], "0", str(k.tk), k.dv_dim, dv, tall, None)
        fn.finish()
        return self._finish(fn, self.heads, 5)

    def _row_grad(
        self,
        fn: Fn,
        n: mathlib.Num,
        r: str,
        first: str,
        panels: str,
        step: int,
        at: dict[str, str],
        scratch: tuple[str, ...],
    ) -> None:
        """Probabilities and score gradients of one query row."""
        k, t, ty, lanes = self.k, self.tile, self.ty, self.tile.lanes
        gc, oc, scores, dprobs, probs, dscores = scratch
        full = vec(ty, lanes)
        row = fn.iadd(first, r)
        limit = self._limit(fn, row)
        total = fn.var(full, n.c(0.0))
        base = fn.imul(r, self.vp)
        with fn.loop(0, self.vp, lanes) as c:
            here = fn.iadd(base, c)
            x, y = fn.load(ty, fn.gep(gc, here, ty), lanes), fn.load(ty, fn.gep(oc, here, ty), lanes)
            fn.set(full, n.fma(x, y, fn.get(full, total)), total)
        delta = fn.splat(mathlib.horizontal(fn, "sum", self._dtype(), lanes, fn.get(full, total)), ty, lanes)
        assert k.lse is not None
        dtype = self.dtype_of(k.lse.buffer)
        mem = memory_type(dtype)
        lse = fn.load(mem, fn.gep(at["lse"], fn.imul(row, k.lse.strides[-1]), mem))
        if mem == "half":
            lse = fn.op(f"fpext half {lse} to float")
        lse = fn.splat(lse, ty, lanes)
        source = fn.imul(r, t.nr)
        target = fn.imul(r, self.tk)
        for p, end in self._key_loops(fn, limit, panels):
            for v in range(t.nv):
                key = fn.iadd(fn.imul(p, t.nr), v * lanes)
                here = fn.iadd(source, fn.iadd(fn.imul(p, step), v * lanes))
                x = self._score(
                    fn, n, fn.load(ty, fn.gep(scores, here, ty), lanes), row, key, end, at.get("mask")
                )
                e = self._exp(fn, n, n.sub(x, lse))
                d = n.sub(fn.load(ty, fn.gep(dprobs, here, ty), lanes), delta)
                ds = n.mul(n.mul(e, d), n.c(k.scale))
                there = fn.iadd(target, key)
                fn.store(ty, e, fn.gep(probs, there, ty), lanes)
                fn.store(ty, ds, fn.gep(dscores, there, ty), lanes)


def compile_attention(
    module: Module, k: AttentionKernel, dtype_of: DtypeOf, name: str
) -> tuple[Compiled, list[int]]:
    """Emit an attention kernel; returns its stage and the program buffers behind its pointers."""
    compiler = AttentionCompiler(module, k, dtype_of, name)
    compiled = compiler.backward() if k.grad else compiler.forward()
    return compiled, compiler.buffers
