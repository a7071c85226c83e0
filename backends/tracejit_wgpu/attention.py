"""Flash attention, forward and backward (Dao et al., FlashAttention-2, 2023), in WGSL.

Square tiles of queries and keys in workgroup memory; the tile shrinks until the three operand tiles fit the device's
limit (64 rows at 48 KB, 16 at WebGPU's default of 16 KB, for head size 64). Backward is two dispatches: the row sums of
dout * out, then dK and dV per key block beside dQ per query block; every sum has a fixed order.
"""

from __future__ import annotations

import re
from math import ceil, prod

import numpy as np

from tracejit.program import Access, AttentionKernel
from tracejit_wgpu import attention_composite as composite
from tracejit_wgpu import wgsl
from tracejit_wgpu.build import BodyBuilder, row_major
from tracejit_wgpu.emit import XYZW, Dispatch, Shader, Tables, decompose
from tracejit_wgpu.loops import grid_of, loop_dispatches

_LOG2E = 1.4426950408889634
_LN2 = 0.6931471805599453
_MASKED = "-3.0e38f"
_BARRIER = " workgroupBarrier();\n"


def attention_dispatches(kernel: AttentionKernel, tables: Tables) -> list[Dispatch]:
    """Compile an AttentionKernel."""
    if kernel.tq == 0 or prod(kernel.batch) == 0:
        return []
    target = tables.target
    small = (
        tile_size(kernel.d, kernel.dv_dim, target.workgroup_memory, target.subgroup) < 16 or kernel.tk == 0
    )
    if not kernel.grad:
        return composite.forward(kernel, tables) if small else [_Attention(kernel, tables).forward()]
    delta, first = _delta(kernel, tables)
    if small:
        return [*first, *composite.backward(kernel, tables, delta)]
    operands = (kernel.q, kernel.k, kernel.v, kernel.mask, kernel.dout, kernel.dq, kernel.dk, kernel.dv)
    bound = {tables.alias.get(a.buffer, a.buffer) for a in operands if a is not None}
    if len(bound) < target.buffers:  # and delta
        return [*first, _Attention(kernel, tables).backward(delta)]
    return [
        *first,
        _Attention(kernel, tables).backward_keys(delta),
        _Attention(kernel, tables).backward_queries(delta),
    ]


def _delta(k: AttentionKernel, tables: Tables) -> tuple[int, list[Dispatch]]:
    """One scratch buffer (to save a binding) with, per query, the row sum of dout * out, then the lse in units of log2."""
    assert k.out is not None and k.dout is not None and k.lse is not None
    shape = (*k.batch, k.tq)
    rows = prod(shape)
    delta = tables.scratch(2 * rows, np.float32)
    b = BodyBuilder((*shape, k.dv_dim), (len(shape),))
    single = np.dtype(np.float32)
    parts = [b.op("load", dtype=tables.dtype(a.buffer), access=a) for a in (k.out, k.dout)]
    parts = [p if b.instrs[p].dtype == single else b.op("convert", p, dtype=single) for p in parts]
    b.store(b.op("reduce", b.op("mul", *parts), kind="sum"), delta, (*row_major(shape), 0))
    lse = b.load(k.lse.buffer, (*k.lse.strides, 0), tables.dtype(k.lse.buffer), k.lse.offset)
    lse = lse if b.instrs[lse].dtype == single else b.op("convert", lse, dtype=single)
    b.store(b.op("mul", lse, b.const(_LOG2E, single)), delta, (*row_major(shape), 0), rows)
    return delta, loop_dispatches([b.body()], tables, k.name + "_delta")


def tile_size(d: int, dv: int, memory: int, subgroup: int = 0) -> int:
    """Rows of a tile: the largest power of two up to 64 whose three tiles fit ``memory`` bytes."""
    size = 64
    while size > 4 and _memory(size, d, dv, subgroup) > memory:
        size //= 2
    return size


def _shuffles(size: int, subgroup: int) -> bool:
    """True if the threads that share a row of a tile lie in one subgroup; else their results go through memory."""
    return bool(subgroup) and size // 4 <= subgroup and subgroup % (size // 4) == 0


def _memory(size: int, d: int, dv: int, subgroup: int) -> int:
    d4, e4, s4 = ceil(d / 4), ceil(dv / 4), size // 4
    words = size * (max(d4, e4) + max(d4, e4, s4) + max(e4, s4)) * 4
    return (words if _shuffles(size, subgroup) else words + size * s4) * 4


def twice(name: str, count: int, body: str) -> str:
    """A loop over ``count``, two rounds per iteration where that comes out even: 5% on an H100; four are no better."""
    if count % 2:
        return f" for (var {name} = 0u; {name} < {count}u; {name}++) {{\n{body} }}\n"
    first, second = (f" {{ let {name} = {name}_ + {i}u;\n{body} }}\n" for i in range(2))
    return f" for (var {name}_ = 0u; {name}_ < {count}u; {name}_ += 2u) {{\n{first}{second} }}\n"


class _Attention:
    """One dispatch under construction. Names in the WGSL: a, b, c are the tiles, rows are in groups of four per thread."""

    def __init__(self, kernel: AttentionKernel, tables: Tables) -> None:
        self.k, self.tables = kernel, tables
        self.shader = Shader(tables)
        d, dv = kernel.d, kernel.dv_dim
        limit = tables.target.workgroup_memory
        self.bt = tile_size(d, dv, limit, tables.target.subgroup)
        self.d4, self.e4 = ceil(d / 4), ceil(dv / 4)
        self.tx, self.ty = self.bt // 4, self.bt // 4
        self.threads = self.tx * self.ty
        s4 = self.bt // 4
        sizes = {"a": max(self.d4, self.e4), "b": max(self.d4, self.e4, s4), "c": max(self.e4, s4)}
        self.start: dict[str, int] = {}
        total = 0
        for name, width in sizes.items():
            self.start[name] = total
            total += self.bt * width
        self.tiles = self.shader.memory("vec4<f32>", total)
        self.shuffle = _shuffles(self.bt, tables.target.subgroup)
        if not self.shuffle:
            self.shader.memory("f32", self.bt * self.tx)
        self.cd, self.ce = ceil(self.d4 / self.tx), ceil(self.e4 / self.tx)
        self.nq, self.nk = ceil(kernel.tq / self.bt), ceil(kernel.tk / self.bt)

    # ------------------------------------------------------------ access
    def bind(self, access: Access | None, width: int, write: bool = False) -> None:
        """Declare an operand whose last axis has ``width`` elements."""
        if access is None:
            return
        vector = (
            access.strides[-1] == 1
            and width % 4 == 0
            and access.offset % 4 == 0
            and all(s % 4 == 0 for s in access.strides[:-1])
        )
        self.shader.bind(access.buffer, vector=vector, write=write)

    def base(self, access: Access, batch: list[str]) -> str:
        """Address of (t=0, d=0) of this workgroup's batch element."""
        return wgsl.u32_offset(zip(access.strides[:-2], batch), access.offset)

    def load(
        self,
        tile: str,
        access: Access,
        base: str,
        first: str,
        count: int,
        width: int,
        w4: int,
        scale: str = "",
    ) -> str:
        """Fill a tile with rows ``first .. first + bt`` of an operand, zeros outside; swizzled against bank conflicts."""
        sh, total = self.shader, self.bt * w4
        vector = sh.binding(access.buffer).vector
        dtype = self.tables.dtype(access.buffer)
        st, sd = access.strides[-2:]
        row = f"{base} + (t0 + r) * {st}u"
        if vector:
            raw = f"{sh.binding(access.buffer).name}[({row} + c * 4u) >> 2u]"
            value = f"v = vec4<f32>({raw});"
        else:
            parts = []
            for j in range(4):
                element = sh.read(access.buffer, f"{row} + (c * 4u + {j}u) * {sd}u")
                line = f"v.{XYZW[j]} = f32({element});"
                parts.append(line if width % 4 == 0 else f"if (c * 4u + {j}u < {width}u) {{ {line} }}")
            value = " ".join(parts)
        assert dtype.kind == "f"
        # All loads first, then the stores: as many reads in flight as the tile has pieces per thread.
        reads, writes = "", ""
        for n in range(ceil(total / self.threads)):
            start = f"li + {n * self.threads}u" if n else "li"
            guard = [f"li + {n * self.threads}u < {total}u"] if (n + 1) * self.threads > total else []
            if count % self.bt:
                guard.append(f"t0 + r{n} < {count}u")
            body = re.sub(r"\b([rcv])\b", rf"\g<1>{n}", value)
            body = f"if ({' && '.join(guard)}) {{ {body} }}" if guard else body
            reads += f"  let r{n} = ({start}) / {w4}u; let c{n} = ({start}) % {w4}u; var v{n} = vec4<f32>(); {body}\n"
            put = f"{self.at(tile, f'r{n}', f'c{n}', w4)} = v{n}{scale};"
            writes += f"  if ({guard[0]}) {{ {put} }}\n" if (n + 1) * self.threads > total else f"  {put}\n"
        return f" {{ let t0 = {first};\n{reads}{writes} }}\n"

    def at(self, tile: str, row: str, column: str, w4: int) -> str:
        """Place of vector ``column`` of a row in a tile."""
        mask = min(15, w4 - 1) if w4 & (w4 - 1) == 0 else 0
        where = f"({column} ^ (({row} >> 2u) & {mask}u))" if mask else column
        return f"{self.tiles}[{self.start[tile]}u + ({row}) * {w4}u + {where}]"

    # ------------------------------------------------------------ arithmetic
    def scores(self, a: str, b: str, w4: int, name: str) -> str:
        """name_i = four columns (tx * 4 ..) of row i of A B^T."""
        start = "".join(f" var {name}{i} = vec4<f32>();\n" for i in range(4))
        out = ""
        for j in range(4):
            out += f"  let b{j} = {self.at(b, f'(tx * 4u + {j}u)', 'd', w4)};\n"
        for i in range(4):
            out += f"  let a{i} = {self.at(a, f'(ty * 4u + {i}u)', 'd', w4)};\n"
        for c in XYZW:
            out += f"  let b_{c} = vec4<f32>(b0.{c}, b1.{c}, b2.{c}, b3.{c});\n"
            out += "".join(f"  {name}{i} = fma(vec4<f32>(a{i}.{c}), b_{c}, {name}{i});\n" for i in range(4))
        return start + twice("d", w4, out)

    def put(self, tile: str, name: str) -> str:
        """Store the score tile ``name`` as [row][column / 4]."""
        return "".join(
            f" {self.at(tile, f'(ty * 4u + {i}u)', 'tx', self.bt // 4)} = {name}{i};\n" for i in range(4)
        )

    def accumulators(self, name: str, groups: int) -> str:
        """Four rows by ``groups`` vectors of columns."""
        return "".join(f" var {name}{i}_{g} = vec4<f32>();\n" for i in range(4) for g in range(groups))

    def column(self, g: int, w4: int) -> str:
        """Vector column of group g of this thread, clamped."""
        text = f"(tx + {g * self.tx}u)" if g else "tx"
        return text if (g + 1) * self.tx <= w4 else f"min({text}, {w4 - 1}u)"

    def times(self, p: str, x: str, name: str, groups: int, w4: int) -> str:
        """name += P X, P the score tile."""
        out = "".join(
            f"  let p{i} = {self.at(p, f'(ty * 4u + {i}u)', 'j', self.bt // 4)};\n" for i in range(4)
        )
        for q, c in enumerate(XYZW):
            for g in range(groups):
                out += f"  let v{q}_{g} = {self.at(x, f'(j * 4u + {q}u)', self.column(g, w4), w4)};\n"
            out += "".join(
                f"  {name}{i}_{g} = fma(vec4<f32>(p{i}.{c}), v{q}_{g}, {name}{i}_{g});\n"
                for i in range(4)
                for g in range(groups)
            )
        return twice("j", self.bt // 4, out)

    def transposed_times(self, p: str, x: str, name: str, groups: int, w4: int) -> str:
        """name += P^T X."""
        out = ""
        for q in range(4):  # four at a time: their loads overlap
            out += f"  let p{q} = {self.at(p, f'(j * 4u + {q}u)', 'ty', self.bt // 4)};\n"
            for g in range(groups):
                out += f"  let v{q}_{g} = {self.at(x, f'(j * 4u + {q}u)', self.column(g, w4), w4)};\n"
        out += "".join(
            f"  {name}{i}_{g} = fma(vec4<f32>(p{q}.{XYZW[i]}), v{q}_{g}, {name}{i}_{g});\n"
            for q in range(4)
            for i in range(4)
            for g in range(groups)
        )
        return twice("j", self.bt // 4, out)

    def reduce(self, names: list[str], op: str) -> str:
        """Combine one value per row over the threads of the row; every thread gets the result."""
        out = ""

        def join(a: str, b: str) -> str:
            return f"max({a}, {b})" if op == "max" else f"({a} + {b})"

        if self.shuffle:
            step = 1
            while step < self.tx:
                out += "".join(f" {n} = {join(n, f'subgroupShuffleXor({n}, {step}u)')};\n" for n in names)
                step *= 2
            return out
        memory = self.shader.memory("f32", self.bt * self.tx)
        out += (
            _BARRIER
            + "".join(f" {memory}[(ty * 4u + {i}u) * {self.tx}u + tx] = {n};\n" for i, n in enumerate(names))
            + _BARRIER
        )
        for i, n in enumerate(names):
            out += f" {n} = {memory}[(ty * 4u + {i}u) * {self.tx}u];\n"
            joined = join(n, f"{memory}[(ty * 4u + {i}u) * {self.tx}u + s]")
            out += f" for (var s = 1u; s < {self.tx}u; s++) {{ {n} = {joined}; }}\n"
        return out

    def mask(self, name: str, q0: str, k0: str, batch: list[str], rows_too: bool) -> str:
        """Apply bounds, causality and the mask operand to a score tile (in units of log2), where the tile needs it."""
        k, sh, out = self.k, self.shader, ""
        edges = []
        if k.causal:
            edges.append(f"{k0} + {self.bt - 1}u > {q0}")
        if k.tk % self.bt:
            edges.append(f"{k0} + {self.bt}u > {k.tk}u")
        if rows_too and k.tq % self.bt:
            edges.append(f"{q0} + {self.bt}u > {k.tq}u")
        for i in range(4):
            for j in range(4):
                keep: list[str] = []
                if k.tk % self.bt:
                    keep.append("kc < " + f"{k.tk}u")
                if rows_too and k.tq % self.bt:
                    keep.append(f"qr < {k.tq}u")
                if k.causal:
                    keep.append("kc <= qr")
                lines = f"let qr = {q0} + ty * 4u + {i}u; let kc = {k0} + tx * 4u + {j}u; "
                target = f"{name}{i}.{XYZW[j]}"
                if k.mask is not None:
                    mq, mk = k.mask.strides[-2:]
                    place = f"{self.base(k.mask, batch)} + min(qr, {k.tq - 1}u) * {mq}u + min(kc, {k.tk - 1}u) * {mk}u"
                    value = sh.read(k.mask.buffer, place)
                    if self.tables.dtype(k.mask.buffer).kind == "b":
                        keep.append(value)
                    else:
                        lines += f"{target} = max({target} + f32({value}) * {_LOG2E}f, {_MASKED}); "
                if keep:
                    lines += f"{target} = select({_MASKED}, {target}, {' && '.join(keep)});"
                if keep or k.mask is not None:
                    out += f" {{ {lines} }}\n"
        return f" if ({' || '.join(edges)}) {{\n{out} }}\n" if out and k.mask is None else out

    def write(
        self,
        access: Access,
        base: str,
        row: str,
        count: int,
        width: int,
        w4: int,
        name: str,
        groups: int,
        scale: str,
    ) -> str:
        """Store accumulators as rows of a result."""
        sh, out = self.shader, ""
        st, sd = access.strides[-2:]
        dtype = self.tables.dtype(access.buffer)
        bound = sh.binding(access.buffer)
        for i in range(4):
            lines = ""
            for g in range(groups):
                column = f"(tx + {g * self.tx}u)"
                value = f"{name}{i}_{g}"
                if bound.vector:
                    vec = f"vec4<{bound.element}>({value}{scale.replace('@', str(i))})"
                    line = f"{bound.name}[({base} + row * {st}u + {column} * 4u) >> 2u] = {vec};"
                else:
                    line = ""
                    for j in range(4):
                        one = sh.stored(f"({value}.{XYZW[j]}{scale.replace('@', str(i))})", dtype)
                        inner = (
                            f"{bound.name}[{base} + row * {st}u + ({column} * 4u + {j}u) * {sd}u] = {one};"
                        )
                        line += (
                            inner
                            if width % 4 == 0
                            else f"if ({column} * 4u + {j}u < {width}u) {{ {inner} }} "
                        )
                lines += line if (g + 1) * self.tx <= w4 else f"if ({column} < {w4}u) {{ {line} }} "
            guard = f"if (row < {count}u) {{ {lines} }}" if count % self.bt else lines
            out += f" {{ let row = {row} + ty * 4u + {i}u; {guard} }}\n"
        return out

    def finish(self, text: str, blocks: int, label: str) -> Dispatch:
        """Wrap the body into the entry point: one workgroup per block and batch element."""
        groups = blocks * prod(self.k.batch)
        grid, number = grid_of(groups, self.tables.target.workgroups)
        guard = f" if (wg >= {groups}u) {{ return; }}\n" if grid[0] * grid[1] != groups else ""
        main = (
            f"@compute @workgroup_size({self.threads}) fn main(@builtin(workgroup_id) wid: vec3<u32>, "
            f"@builtin(local_invocation_index) li: u32) {{\n let wg = {number};\n{guard}"
            f" let block = wg % {blocks}u; let bz = wg / {blocks}u;\n{text}}}\n"
        )
        return self.shader.dispatch(main, grid, f"{self.k.name}{label} {self.bt}x{self.bt}")

    def batch(self) -> tuple[str, list[str]]:
        """Batch index names."""
        out = [f" let tx = li % {self.tx}u; let ty = li / {self.tx}u;\n"]
        names = decompose(self.shader, "bz", self.k.batch, out)
        return "".join(out), names

    # ------------------------------------------------------------ kernels
    def forward(self) -> Dispatch:
        """out and lse of a block of queries."""
        k = self.k
        assert k.q and k.k and k.v and k.out
        for access, width in ((k.q, k.d), (k.k, k.d), (k.v, k.dv_dim)):
            self.bind(access, width)
        if k.mask is not None:
            self.shader.bind(k.mask.buffer, vector=False, write=False)
        self.bind(k.out, k.dv_dim, True)
        if k.lse is not None:
            self.shader.bind(k.lse.buffer, vector=False, write=True)
        text, batch = self.batch()
        bt = self.bt
        # heavy blocks first: the last query blocks see the most keys
        text += f" let qb = {self.nq - 1}u - block; let q0 = qb * {bt}u;\n"
        for name, access in (("qa", k.q), ("ka", k.k), ("va", k.v), ("oa", k.out)):
            text += f" let {name} = {self.base(access, batch)};\n"
        text += self.load("a", k.q, "qa", "q0", k.tq, k.d, self.d4, f" * {k.scale * _LOG2E!r}f")
        text += self.accumulators("o", self.ce)
        text += "".join(f" var m{i} = -1.0e30f; var l{i} = 0.0f;\n" for i in range(4))
        last = f"min(qb, {self.nk - 1}u)" if k.causal else f"{self.nk - 1}u"
        loop = _BARRIER + self.load("b", k.k, "ka", "k0", k.tk, k.d, self.d4)
        loop += self.load("c", k.v, "va", "k0", k.tk, k.dv_dim, self.e4) + _BARRIER
        loop += self.scores("a", "b", self.d4, "s") + self.mask("s", "q0", "k0", batch, False)
        loop += "".join(f" var t{i} = max(max(s{i}.x, s{i}.y), max(s{i}.z, s{i}.w));\n" for i in range(4))
        loop += self.reduce([f"t{i}" for i in range(4)], "max")
        for i in range(4):
            loop += f" t{i} = max(t{i}, m{i}); let f{i} = exp2(m{i} - t{i}); m{i} = t{i}; s{i} = exp2(s{i} - t{i});\n"
            loop += f" l{i} = l{i} * f{i} + ((s{i}.x + s{i}.y) + (s{i}.z + s{i}.w));\n"
            loop += "".join(f" o{i}_{g} *= f{i};\n" for g in range(self.ce))
        loop += _BARRIER + self.put("b", "s") + _BARRIER + self.times("b", "c", "o", self.ce, self.e4)
        if self.nk:
            text += f" for (var kb = 0u; kb <= {last}; kb++) {{ let k0 = kb * {bt}u;\n{loop} }}\n"
        text += self.reduce([f"l{i}" for i in range(4)], "add")
        text += self.write(k.out, "oa", "q0", k.tq, k.dv_dim, self.e4, "o", self.ce, " / l@")
        if k.lse is not None:
            name = self.shader.binding(k.lse.buffer).name
            base = wgsl.u32_offset(zip(k.lse.strides[:-1], batch), k.lse.offset)
            for i in range(4):
                line = f"{name}[{base} + row * {k.lse.strides[-1]}u] = (m{i} + log2(l{i})) * {_LN2}f;"
                text += (
                    f" if (tx == 0u) {{ let row = q0 + ty * 4u + {i}u; if (row < {k.tq}u) {{ {line} }} }}\n"
                )
        return self.finish(text, self.nq, "")

    def _rows(self, delta: int, batch: list[str]) -> str:
        """L (log2) and D of this thread's four query rows."""
        k = self.k
        rows = prod(k.batch) * k.tq
        base = wgsl.u32_offset(zip(row_major((*k.batch, k.tq))[:-1], batch), 0)
        out = ""
        for i in range(4):
            row = f"{base} + min(q0 + ty * 4u + {i}u, {k.tq - 1}u)"
            out += f" let L{i} = {self.shader.read(delta, f'{rows}u + {row}')};\n"
            out += f" let D{i} = {self.shader.read(delta, row)};\n"
        return out

    def _bind_backward(self, delta: int) -> None:
        k = self.k
        for access, width in ((k.q, k.d), (k.k, k.d), (k.v, k.dv_dim), (k.dout, k.dv_dim)):
            self.bind(access, width)
        self.shader.bind(delta, vector=False, write=False)
        if k.mask is not None:
            self.shader.bind(k.mask.buffer, vector=False, write=False)

    def backward(self, delta: int) -> Dispatch:
        """dk, dv and dq in one dispatch, half of the workgroups each: the two halves run side by side."""
        self._bind_backward(delta)
        self._bind_keys()
        self.bind(self.k.dq, self.k.d, True)
        text, batch = self.batch()
        keys, queries = self._keys(delta, batch), self._queries(delta, batch)
        text += f" if (block < {self.nk}u) {{\n{keys} }} else {{\n let block_q = block - {self.nk}u;\n"
        text += queries.replace("u - block;", "u - block_q;", 1) + " }\n"
        return self.finish(text, self.nk + self.nq, "")

    def _bind_keys(self) -> None:
        self.bind(self.k.dk, self.k.d, True)
        self.bind(self.k.dv, self.k.dv_dim, True)

    def backward_keys(self, delta: int) -> Dispatch:
        """dk and dv of a block of keys."""
        self._bind_backward(delta)
        self._bind_keys()
        text, batch = self.batch()
        return self.finish(text + self._keys(delta, batch), self.nk, "_dkdv")

    def _keys(self, delta: int, batch: list[str]) -> str:
        k, bt = self.k, self.bt
        assert k.q and k.k and k.v and k.dout and k.dk and k.dv
        text = f" let jb = block; let k0 = jb * {bt}u;\n"
        for name, access in (
            ("qa", k.q),
            ("ka", k.k),
            ("va", k.v),
            ("ga", k.dout),
            ("dka", k.dk),
            ("dva", k.dv),
        ):
            text += f" let {name} = {self.base(access, batch)};\n"
        text += self.accumulators("k", self.cd) + self.accumulators("w", self.ce)
        loop = _BARRIER + self.load("a", k.q, "qa", "q0", k.tq, k.d, self.d4, f" * {k.scale * _LOG2E!r}f")
        loop += self.load("b", k.k, "ka", "k0", k.tk, k.d, self.d4) + self.load(
            "c", k.dout, "ga", "q0", k.tq, k.dv_dim, self.e4
        )
        loop += self._rows(delta, batch) + _BARRIER
        loop += self.scores("a", "b", self.d4, "s") + self.mask("s", "q0", "k0", batch, True)
        loop += "".join(f" s{i} = exp2(s{i} - L{i});\n" for i in range(4))
        if k.tq % bt:
            loop += "".join(
                f" if (q0 + ty * 4u + {i}u >= {k.tq}u) {{ s{i} = vec4<f32>(); }}\n" for i in range(4)
            )
        loop += _BARRIER + self.load("b", k.v, "va", "k0", k.tk, k.dv_dim, self.e4) + _BARRIER
        loop += self.scores("c", "b", self.e4, "d") + "".join(
            f" d{i} = s{i} * (d{i} - D{i});\n" for i in range(4)
        )
        loop += (
            _BARRIER + self.put("b", "s") + _BARRIER + self.transposed_times("b", "c", "w", self.ce, self.e4)
        )
        loop += (
            _BARRIER + self.put("b", "d") + _BARRIER + self.transposed_times("b", "a", "k", self.cd, self.d4)
        )
        start = "jb" if k.causal else "0u"
        text += f" for (var qb = {start}; qb < {self.nq}u; qb++) {{ let q0 = qb * {bt}u;\n{loop} }}\n"
        text += self.write(k.dk, "dka", "k0", k.tk, k.d, self.d4, "k", self.cd, f" * {_LN2}f")
        text += self.write(k.dv, "dva", "k0", k.tk, k.dv_dim, self.e4, "w", self.ce, "")
        return text

    def backward_queries(self, delta: int) -> Dispatch:
        """dq of a block of queries."""
        self._bind_backward(delta)
        self.bind(self.k.dq, self.k.d, True)
        text, batch = self.batch()
        return self.finish(text + self._queries(delta, batch), self.nq, "_dq")

    def _queries(self, delta: int, batch: list[str]) -> str:
        k, bt = self.k, self.bt
        assert k.q and k.k and k.v and k.dout and k.dq
        text = f" let qb = {self.nq - 1}u - block; let q0 = qb * {bt}u;\n"
        for name, access in (("qa", k.q), ("ka", k.k), ("va", k.v), ("ga", k.dout), ("dqa", k.dq)):
            text += f" let {name} = {self.base(access, batch)};\n"
        text += self._rows(delta, batch) + self.accumulators("k", self.cd)
        last = f"min(qb, {self.nk - 1}u)" if k.causal else f"{self.nk - 1}u"
        loop = _BARRIER + self.load("a", k.q, "qa", "q0", k.tq, k.d, self.d4, f" * {k.scale * _LOG2E!r}f")
        loop += (
            self.load("b", k.k, "ka", "k0", k.tk, k.d, self.d4)
            + self.load("c", k.v, "va", "k0", k.tk, k.dv_dim, self.e4)
            + _BARRIER
        )
        loop += self.scores("a", "b", self.d4, "s") + self.mask("s", "q0", "k0", batch, True)
        loop += "".join(f" s{i} = exp2(s{i} - L{i});\n" for i in range(4))
        loop += _BARRIER + self.load("a", k.dout, "ga", "q0", k.tq, k.dv_dim, self.e4) + _BARRIER
        loop += self.scores("a", "c", self.e4, "d") + "".join(
            f" d{i} = s{i} * (d{i} - D{i});\n" for i in range(4)
        )
        loop += _BARRIER + self.put("c", "d") + _BARRIER + self.times("c", "b", "k", self.cd, self.d4)
        if self.nk:
            text += f" for (var kb = 0u; kb <= {last}; kb++) {{ let k0 = kb * {bt}u;\n{loop} }}\n"
        text += self.write(k.dq, "dqa", "q0", k.tq, k.d, self.d4, "k", self.cd, f" * {k.scale!r}f")
        return text
