"""Flash attention, forward and backward. Called by ``compiler.py``.

Vectors hold scores of one key for neighbouring queries, so that a softmax needs no sums across lanes and every product
reads its other operand element by element: nothing is transposed but blocks of queries. Scores exist only for a block of
queries and a tile of keys (Dao, FlashAttention-2, 2023): forward, a task handles blocks of queries of a head and rescales
once per tile; backward, a task handles a head, tile of keys by tile of keys, so that a tile's gradients stay in the cache.
With ``causal``, keys behind a block are skipped, and only tiles that some of its queries do not see are masked. Operands
are first copied into scratch memory with padded rows, which makes every layout and dtype alike.
"""

from __future__ import annotations

import math

from tracejit.program import AttentionKernel
from tracejit_cpu import mathlib
from tracejit_cpu.attention_base import KEYS, TALLEST, AttentionBase, DtypeOf
from tracejit_cpu.attention_tiles import exp_below, pieces
from tracejit_cpu.irbuilder import Fn, Module, const, memory_type, vec
from tracejit_cpu.stages import Compiled


class AttentionCompiler(AttentionBase):
    """The forward and the backward kernel."""

    # -- forward ----------------------------------------------------------------------------------------------------------
    def forward(self) -> Compiled:
        """softmax(scale Q K^T + mask) V, block of queries by block of queries."""
        k, ty, nr = self.k, self.ty, self.nr
        fn = self._begin(["q", "k", "v", "mask", "out", "lse"])
        n = mathlib.Num(fn, ty, self.lanes)
        full = vec(ty, self.lanes)
        # Later blocks of a causal head see more keys: groups take turns, so that each gets a like amount of work.
        groups = 1 if self.heads >= 16 else min(self.blocks, -(-16 // max(1, self.heads)))
        with fn.loop("%lo", "%hi") as task:
            head = fn.op(f"udiv i64 {task}, {groups}") if groups > 1 else task
            group = fn.op(f"urem i64 {task}, {groups}") if groups > 1 else "0"
            at = self._heads(fn, head)
            kc, vc = self._scratch(fn, self.tall * self.dp), self._scratch(fn, self.tall * self.vp)
            self._copy(fn, "k", at["k"], k.tk, k.d, kc, self.tall, self.dp)
            self._copy(fn, "v", at["v"], k.tk, k.dv_dim, vc, self.tall, self.vp)
            rows_of_q, qt = self._scratch(fn, nr * self.dp), self._scratch(fn, self.dp * nr)
            out, turned = self._scratch(fn, self.vp * nr), self._scratch(fn, self.vp * nr)
            tile, results = self._scratch(fn, KEYS * nr), self._scratch(fn, nr)
            with fn.loop(group, self.blocks, groups) as b:
                first = fn.imul(b, nr)
                rows = fn.imin(fn.op(f"sub i64 {k.tq}, {first}"), nr)
                self._copy(fn, "q", self._at(fn, "q", at["q"], first), rows, k.d, rows_of_q, nr, self.dp)
                self._lanes_of(fn, rows_of_q, self.dp, k.d, qt)
                self._scale(fn, n, qt, k.d, [n.c(k.scale / self.unit)] * self.nv)
                self._clear(fn, out, self.vp * nr)
                peaks = [fn.var(full, n.c(-math.inf)) for _ in range(self.nv)]
                sums = [fn.var(full, n.c(0.0)) for _ in range(self.nv)]
                mask_rows = self._mask_rows(fn, first)
                limit = self._limit(fn, first)
                with fn.loop(0, limit, KEYS) as key:
                    count = fn.imin(fn.op(f"sub i64 {limit}, {key}"), KEYS)
                    keys = fn.gep(kc, fn.imul(key, self.dp), ty)
                    self._scores(fn, keys, self.dp, qt, k.d, count, tile)
                    before = [fn.get(full, p) for p in peaks]
                    self._peaks(fn, n, tile, key, count, first, peaks, mask_rows, at.get("mask"))
                    shifts, factors = [], []
                    for v in range(self.nv):
                        peak = fn.get(full, peaks[v])
                        none = n.cmp("oeq", peak, n.c(-math.inf))
                        shifts.append(n.select(none, n.c(0.0), peak))
                        factors.append(exp_below(n, n.sub(before[v], shifts[v])))
                        fn.set(full, n.mul(fn.get(full, sums[v]), factors[v]), sums[v])
                    self._scale(fn, n, out, k.dv_dim, factors)
                    with fn.loop(0, count) as i:
                        for v in range(self.nv):
                            p = fn.gep(tile, fn.iadd(fn.imul(i, nr), v * self.lanes), ty)
                            e = exp_below(n, n.sub(fn.load(ty, p, self.lanes), shifts[v]))
                            fn.store(ty, e, p, self.lanes)
                            fn.set(full, n.add(fn.get(full, sums[v]), e), sums[v])
                    values = fn.gep(vc, fn.imul(key, self.vp), ty)
                    self._gather_keys(fn, values, self.vp, k.dv_dim, tile, count, out)
                totals = [fn.get(full, s) for s in sums]
                # A row that sees no key is NaN.
                totals = [n.select(n.cmp("oeq", s, n.c(0.0)), n.c(math.nan), s) for s in totals]
                self._scale(fn, n, out, k.dv_dim, [n.div(n.c(1.0), s) for s in totals])
                self._store_block(fn, "out", at["out"], first, rows, k.dv_dim, out, turned)
                if k.lse is not None:
                    self._store_lse(
                        fn, n, at["lse"], first, rows, [fn.get(full, p) for p in peaks], totals, results
                    )
        fn.finish()
        return self._finish(fn, self.heads * groups, 2)

    def _peaks(
        self,
        fn: Fn,
        n: mathlib.Num,
        tile: str,
        key: str,
        count: str,
        first: str,
        peaks: list[str],
        mask_rows: list[str],
        mask: str | None,
    ) -> None:
        """Raise each query's peak to the largest score of the tile, masking scores in place where that is needed."""
        shared = self._open(fn, first, key, count)
        for i, many in pieces(fn, "0", shared, 4):
            for v in range(self.nv):
                top = fn.get(n.full, peaks[v])
                for u in range(many):
                    p = fn.gep(tile, fn.iadd(fn.imul(fn.iadd(i, u), self.nr), v * self.lanes), self.ty)
                    x = fn.load(self.ty, p, self.lanes)
                    top = n.select(n.cmp("ogt", x, top), x, top)
                fn.set(n.full, top, peaks[v])
        if shared == count:
            return
        with fn.loop(shared, count) as i:
            for v in range(self.nv):
                p = fn.gep(tile, fn.iadd(fn.imul(i, self.nr), v * self.lanes), self.ty)
                x = fn.load(self.ty, p, self.lanes)
                x = self._masked(fn, n, x, fn.iadd(key, i), first, v, mask_rows[v], mask)
                fn.store(self.ty, x, p, self.lanes)
                top = fn.get(n.full, peaks[v])
                fn.set(n.full, n.select(n.cmp("ogt", x, top), x, top), peaks[v])

    def _store_lse(
        self,
        fn: Fn,
        n: mathlib.Num,
        target: str,
        first: str,
        rows: str,
        peaks: list[str],
        totals: list[str],
        results: str,
    ) -> None:
        """Write the logarithm of each query's sum of exponentials, which the gradient starts from."""
        ty = self.ty
        assert self.k.lse is not None
        for v, (peak, total) in enumerate(zip(peaks, totals)):
            log = mathlib.emit(fn, "log", [total], [self._dtype()], self._dtype(), self.lanes, {})
            fn.store(ty, n.fma(peak, n.c(self.unit), log), fn.gep(results, v * self.lanes, ty), self.lanes)
        mem = memory_type(self.dtype_of(self.k.lse.buffer))
        with fn.loop(0, rows) as r:
            value = fn.load(ty, fn.gep(results, r, ty))
            if mem == "half":
                value = fn.op(f"fptrunc float {value} to half")
            fn.store(mem, value, fn.gep(target, fn.imul(fn.iadd(first, r), self.k.lse.strides[-1]), mem))

    # -- backward -----------------------------------------------------------------------------------------------------------
    def backward(self) -> Compiled:
        """dq, dk and dv of one head per task; probabilities are recomputed from the stored log-sum-exp."""
        k, ty, nr, dp, vp = self.k, self.ty, self.nr, self.dp, self.vp
        fn = self._begin(["q", "k", "v", "mask", "out", "lse", "dout", "dq", "dk", "dv"])
        n = mathlib.Num(fn, ty, self.lanes)
        with fn.loop("%lo", "%hi") as head:
            at = self._heads(fn, head)
            kc, vc = self._scratch(fn, self.tall * dp), self._scratch(fn, self.tall * vp)
            self._copy(fn, "k", at["k"], k.tk, k.d, kc, self.tall, dp)
            self._copy(fn, "v", at["v"], k.tk, k.dv_dim, vc, self.tall, vp)
            padded = self.blocks * nr
            qc, qt = self._scratch(fn, padded * dp), self._scratch(fn, padded * dp)
            gc, gt = self._scratch(fn, padded * vp), self._scratch(fn, padded * vp)
            dq, turned = self._scratch(fn, padded * dp), self._scratch(fn, nr * dp)
            deltas, logs = self._scratch(fn, padded), self._scratch(fn, padded)
            self._copy(fn, "q", at["q"], k.tq, k.d, qc, padded, dp)
            self._copy(fn, "dout", at["dout"], k.tq, k.dv_dim, gc, padded, vp)
            self._clear(fn, dq, padded * dp)
            self._prepare(fn, n, at, (qc, qt, gc, gt, deltas, logs))
            probs, dscores = self._scratch(fn, KEYS * nr), self._scratch(fn, KEYS * nr)
            dk, dv = self._scratch(fn, KEYS * dp), self._scratch(fn, KEYS * vp)
            with fn.loop(0, k.tk, KEYS) as key:
                count = fn.imin(fn.op(f"sub i64 {k.tk}, {key}"), KEYS)
                keys, values = fn.gep(kc, fn.imul(key, dp), ty), fn.gep(vc, fn.imul(key, vp), ty)
                self._clear(fn, dk, KEYS * dp)
                self._clear(fn, dv, KEYS * vp)
                start = fn.op(f"udiv i64 {key}, {nr}") if k.causal else "0"
                with fn.loop(start, self.blocks) as b:
                    first = fn.imul(b, nr)
                    seen = count
                    if k.causal:
                        seen = fn.imin(fn.op(f"sub i64 {fn.iadd(first, nr)}, {key}"), count)
                    q_at, g_at = fn.imul(first, dp), fn.imul(first, vp)
                    self._scores(fn, keys, dp, fn.gep(qt, q_at, ty), k.d, seen, probs)
                    self._scores(fn, values, vp, fn.gep(gt, g_at, ty), k.dv_dim, seen, dscores)
                    tiles = (probs, dscores, fn.gep(deltas, first, ty), fn.gep(logs, first, ty))
                    self._score_grads(fn, n, tiles, key, seen, first, at.get("mask"))
                    # dv += P^T dO;  dk += dS^T Q;  dq += dS K
                    self._gather_queries(fn, probs, fn.gep(gc, g_at, ty), vp, seen, dv)
                    self._gather_queries(fn, dscores, fn.gep(qc, q_at, ty), dp, seen, dk)
                    self._gather_keys(fn, keys, dp, k.d, dscores, seen, fn.gep(dq, q_at, ty))
                scale = n.c(k.scale)
                self._store_rows(
                    fn, "dk", self._at(fn, "dk", at["dk"], key), count, k.d, dk, dp, self.lanes, scale
                )
                self._store_rows(
                    fn, "dv", self._at(fn, "dv", at["dv"], key), count, k.dv_dim, dv, vp, self.lanes
                )
            with fn.loop(0, self.blocks) as b:
                first = fn.imul(b, nr)
                rows = fn.imin(fn.op(f"sub i64 {k.tq}, {first}"), nr)
                block = fn.gep(dq, fn.imul(first, dp), ty)
                self._scale(fn, n, block, k.d, [n.c(k.scale)] * self.nv)
                self._store_block(fn, "dq", at["dq"], first, rows, k.d, block, turned)
        fn.finish()
        return self._finish(fn, self.heads, 5)

    def _prepare(self, fn: Fn, n: mathlib.Num, at: dict[str, str], scratch: tuple[str, ...]) -> None:
        """For every block of queries: Q and dO with queries along lanes, sum(dO * O) and the log-sum-exp in our unit."""
        k, ty, nr, dp, vp = self.k, self.ty, self.nr, self.dp, self.vp
        qc, qt, gc, gt, deltas, logs = scratch
        oc, ot = self._scratch(fn, nr * vp), self._scratch(fn, nr * vp)
        full = n.full
        assert k.lse is not None
        mem = memory_type(self.dtype_of(k.lse.buffer))
        # Lanes beyond the queries: their P is exp(0 - inf) = 0.
        with fn.loop(0, self.blocks * nr, self.lanes) as i:
            fn.store(ty, n.c(math.inf), fn.gep(logs, i, ty), self.lanes)
        with fn.loop(0, k.tq) as r:
            lse = fn.load(mem, fn.gep(at["lse"], fn.imul(r, k.lse.strides[-1]), mem))
            if mem == "half":
                lse = fn.op(f"fpext half {lse} to float")
            lse = fn.op(f"fmul {ty} {lse}, {const(1.0 / self.unit, ty)}")
            fn.store(ty, lse, fn.gep(logs, r, ty))
        with fn.loop(0, self.blocks) as b:
            first = fn.imul(b, nr)
            rows = fn.imin(fn.op(f"sub i64 {k.tq}, {first}"), nr)
            q_at, g_at = fn.imul(first, dp), fn.imul(first, vp)
            q_block, g_block = fn.gep(qt, q_at, ty), fn.gep(gt, g_at, ty)
            self._lanes_of(fn, fn.gep(qc, q_at, ty), dp, k.d, q_block)
            self._scale(fn, n, q_block, k.d, [n.c(k.scale / self.unit)] * self.nv)
            self._lanes_of(fn, fn.gep(gc, g_at, ty), vp, k.dv_dim, g_block)
            self._copy(fn, "out", self._at(fn, "out", at["out"], first), rows, k.dv_dim, oc, nr, vp)
            self._lanes_of(fn, oc, vp, k.dv_dim, ot)
            totals = [fn.var(full, n.c(0.0)) for _ in range(self.nv)]
            with fn.loop(0, k.dv_dim) as c:
                for v in range(self.nv):
                    here = fn.iadd(fn.imul(c, nr), v * self.lanes)
                    x, y = (fn.load(ty, fn.gep(p, here, ty), self.lanes) for p in (g_block, ot))
                    fn.set(full, n.fma(x, y, fn.get(full, totals[v])), totals[v])
            for v in range(self.nv):
                to = fn.gep(deltas, fn.iadd(first, v * self.lanes), ty)
                fn.store(ty, fn.get(full, totals[v]), to, self.lanes)

    def _score_grads(
        self,
        fn: Fn,
        n: mathlib.Num,
        tiles: tuple[str, ...],
        key: str,
        count: str,
        first: str,
        mask: str | None,
    ) -> None:
        """Turn a tile of scores into probabilities and a tile of dP into dS / scale; rows up to a whole strip become 0."""
        ty, lanes = self.ty, self.lanes
        probs, dscores, deltas, logs = tiles
        delta = [fn.load(ty, fn.gep(deltas, v * lanes, ty), lanes) for v in range(self.nv)]
        log = [fn.load(ty, fn.gep(logs, v * lanes, ty), lanes) for v in range(self.nv)]
        mask_rows = self._mask_rows(fn, first)

        def one(i: str, masked: bool) -> None:
            for v in range(self.nv):
                at = fn.iadd(fn.imul(i, self.nr), v * lanes)
                p, q = fn.gep(probs, at, ty), fn.gep(dscores, at, ty)
                x = fn.load(ty, p, lanes)
                if masked:
                    x = self._masked(fn, n, x, fn.iadd(key, i), first, v, mask_rows[v], mask)
                e = exp_below(n, n.sub(x, log[v]))
                fn.store(ty, e, p, lanes)
                fn.store(ty, n.mul(e, n.sub(fn.load(ty, q, lanes), delta[v])), q, lanes)

        shared = self._open(fn, first, key, count)
        with fn.loop(0, shared) as i:
            one(i, False)
        if shared != count:
            with fn.loop(shared, count) as i:
                one(i, True)
        with fn.loop(count, fn.imul(self._tiles(fn, count, TALLEST), TALLEST)) as i:
            for pointer in (probs, dscores):
                for v in range(self.nv):
                    to = fn.gep(pointer, fn.iadd(fn.imul(i, self.nr), v * lanes), ty)
                    fn.store(ty, n.c(0.0), to, lanes)


def compile_attention(
    module: Module, k: AttentionKernel, dtype_of: DtypeOf, name: str
) -> tuple[Compiled, list[int]]:
    """Emit an attention kernel; returns its stage and the program buffers behind its pointers."""
    compiler = AttentionCompiler(module, k, dtype_of, name)
    compiled = compiler.backward() if k.grad else compiler.forward()
    return compiled, compiler.buffers
