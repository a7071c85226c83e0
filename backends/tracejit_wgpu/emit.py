"""Shader text under construction: bindings, workgroup memory, and the SSA emitter from LoopBody instructions to WGSL.

Kernel generators (``loops.py``, ``contract.py``, ``conv.py``) create one :class:`Shader` per dispatch and one
:class:`Emitter` per body. Values are lists of lanes: one name, or four when the value varies along the vector axis.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tracejit.program import Access, Buffer, Instr, LoopBody
from tracejit_wgpu import body as bodies
from tracejit_wgpu import wgsl

XYZW = "xyzw"


@dataclass(frozen=True)
class Target:
    """What generated code may assume of the device: features and limits."""

    f16: bool = False
    subgroup: int = 0  # fixed subgroup size with linear lane numbering, or 0
    invocations: int = 256
    workgroup_memory: int = 16384
    workgroups: int = 65535
    buffers: int = 8
    binding_bytes: int = 128 << 20
    adapter: str = ""  # for what was tuned on it


@dataclass
class Binding:
    """One entry of the bind group: a program or scratch buffer under a WGSL name."""

    buffer: int
    name: str
    element: str
    vector: bool
    write: bool = False


@dataclass(frozen=True)
class Dispatch:
    """A finished shader and how to run it. ``buffers`` are buffer ids in binding order, ``written`` a subset of them."""

    code: str
    buffers: tuple[int, ...]
    written: frozenset[int]
    grid: tuple[int, int, int]
    uses_scalars: bool = False
    label: str = ""
    trusted: bool = True


@dataclass
class Tables:
    """What generators must know of the program around a kernel.

    ``alias`` maps a buffer to the one whose memory it shares in place, ``scalars`` a weak scalar input to its slot in
    the uniform block. Scratch buffers get negative ids through :meth:`scratch`.
    """

    buffers: dict[int, Buffer]
    target: Target
    alias: Mapping[int, int] = field(default_factory=dict)
    scalars: Mapping[int, int] = field(default_factory=dict)
    scratch_sizes: dict[int, tuple[int, np.dtype]] = field(default_factory=dict)

    def scratch(self, size: int, dtype: Any) -> int:
        """A new temporary of the backend's own, of ``size`` elements."""
        number = -1 - len(self.scratch_sizes)
        self.scratch_sizes[number] = (max(1, size), np.dtype(dtype))
        return number

    def dtype(self, buffer: int) -> np.dtype:
        """Element type of a program or scratch buffer."""
        return self.scratch_sizes[buffer][1] if buffer < 0 else self.buffers[buffer].dtype

    def size(self, buffer: int) -> int:
        """Elements of a program or scratch buffer."""
        return self.scratch_sizes[buffer][0] if buffer < 0 else self.buffers[buffer].size


class Shader:
    """One WGSL module with one entry point."""

    def __init__(self, tables: Tables) -> None:
        self.tables = tables
        self.target = tables.target
        self.use = wgsl.Helpers()
        self.bindings: dict[int, Binding] = {}
        self.workgroup: dict[str, tuple[str, int]] = {}
        self.functions: list[str] = []
        self.uses_scalars = False
        self._names = 0

    def canonical(self, buffer: int) -> int:
        """The buffer whose binding stands for ``buffer``."""
        return self.tables.alias.get(buffer, buffer)

    def bind(self, buffer: int, *, vector: bool, write: bool) -> None:
        """Declare an access to a buffer; a buffer is a vec4 array only if every declaration says so."""
        if buffer in self.tables.scalars:
            self.uses_scalars = True
            return
        key = self.canonical(buffer)
        found = self.bindings.get(key)
        if found is None:
            element = wgsl.storage_type(self.tables.dtype(key), self.target.f16)
            self.bindings[key] = Binding(key, f"b{len(self.bindings)}", element, vector, write)
        else:
            found.vector &= vector
            found.write |= write

    def bind_body(self, body: LoopBody, axis: int | None) -> None:
        """Declare all accesses of a body vectorised along ``axis``."""
        vectors = bodies.vector_buffers(body, axis)
        _, writes = bodies.buffers(body)
        for buffer, vector in vectors.items():
            self.bind(buffer, vector=vector, write=buffer in writes)

    def binding(self, buffer: int) -> Binding:
        """The binding of a declared buffer."""
        return self.bindings[self.canonical(buffer)]

    def memory(self, kind: str, size: int) -> str:
        """Workgroup memory of at least ``size`` elements of a type, shared by all bodies of the dispatch.

        bool is kept as u32: NVIDIA's driver loses what is written to a workgroup array of bool.
        """
        name = "wm_" + kind.replace("<", "_").replace(">", "")
        old = self.workgroup.get(name, (kind, 0))[1]
        self.workgroup[name] = ("u32" if kind == "bool" else kind, max(old, size))
        return name

    def name(self, stem: str = "t") -> str:
        """A fresh identifier."""
        self._names += 1
        return f"{stem}{self._names}"

    def read(self, buffer: int, address: str) -> str:
        """Expression: one element, in its compute type."""
        dtype = self.tables.dtype(buffer)
        if buffer in self.tables.scalars:
            slot = self.tables.scalars[buffer]
            raw = f"scalars[{slot // 4}].{XYZW[slot % 4]}"
            return {
                "f": f"bitcast<f32>({raw})",
                "i": f"bitcast<i32>({raw})",
                "u": raw,
                "b": f"({raw} != 0u)",
            }[dtype.kind]
        bound = self.binding(buffer)
        raw = (
            f"{bound.name}[({address}) >> 2u][({address}) & 3u]"
            if bound.vector
            else f"{bound.name}[{address}]"
        )
        return self.loaded(raw, dtype)

    def loaded(self, raw: str, dtype: np.dtype) -> str:
        """Storage type to compute type."""
        if dtype.kind == "b":
            return f"({raw} != 0u)"
        return f"f32({raw})" if dtype == np.float16 and self.target.f16 else raw

    def stored(self, value: str, dtype: np.dtype) -> str:
        """Compute type to storage type."""
        if dtype.kind == "b":
            return f"select(0u, 1u, {value})"
        return f"f16({value})" if dtype == np.float16 and self.target.f16 else value

    def text(self, main: str) -> str:
        """The module: bindings, memory, helpers, functions, entry point."""
        out: list[str] = []
        body = "".join(self.functions) + main
        helpers = self.use.text()
        if self.target.f16 and (
            "f16" in body or "f16" in helpers or any(b.element == "f16" for b in self.bindings.values())
        ):
            out.append("enable f16;\n")
        for i, b in enumerate(self.bindings.values()):
            element = f"vec4<{b.element}>" if b.vector else b.element
            access = "read_write" if b.write else "read"
            out.append(f"@group(0) @binding({i}) var<storage, {access}> {b.name}: array<{element}>;\n")
        if self.uses_scalars:
            blocks = (len(self.tables.scalars) + 3) // 4
            out.append(
                f"@group(0) @binding({len(self.bindings)}) var<uniform> scalars: array<vec4<u32>, {blocks}>;\n"
            )
        for name, (kind, size) in self.workgroup.items():
            out.append(f"var<workgroup> {name}: array<{kind}, {size}>;\n")
        out.append(wgsl.kernel_constants(helpers + body))
        out.append(helpers)
        out.append(body)
        return "".join(out)

    def dispatch(
        self, main: str, grid: tuple[int, int, int], label: str, *, trusted: bool = True
    ) -> Dispatch:
        """Close the module."""
        return Dispatch(
            self.text(main),
            tuple(self.bindings),
            frozenset(b.buffer for b in self.bindings.values() if b.write),
            grid,
            self.uses_scalars,
            label,
            trusted,
        )


def vector(element: str, lanes: Sequence[str]) -> str:
    """``vec4<T>(...)`` of four lanes, or a splat of one."""
    return f"vec4<{element}>({', '.join(lanes if len(lanes) == 4 else [lanes[0]] * 4)})"


class Emitter:
    """Emits instructions of one body at one point (or four neighbours along ``axis``) of its domain.

    ``index[a]`` is a u32 expression of the position along axis ``a`` (of lane 0 along the vector axis); ``quarter`` is
    a quarter of it for the vector axis. Lines go to ``lines``; values are remembered until :meth:`forget`.
    """

    def __init__(
        self,
        shader: Shader,
        body: LoopBody,
        index: Sequence[str],
        *,
        axis: int | None = None,
        width: int = 1,
        quarter: str = "",
        prefix: str = "v",
    ) -> None:
        self.shader = shader
        self.body = body
        self.index = list(index)
        self.axis = axis if width > 1 else None
        self.width = width
        self.quarter = quarter
        self.prefix = prefix
        self.lines: list[str] = []
        self.values: dict[int, list[str]] = {}

    # ------------------------------------------------------------ helpers
    def lanes(self, instr: Instr) -> int:
        """Number of lanes of a result."""
        return self.width if self.axis is not None and self.axis in instr.axes else 1

    def position(self, axis: int, lane: int) -> str:
        """u32 position along an axis in a lane."""
        base = self.index[axis]
        return f"({base} + {lane}u)" if lane and axis == self.axis else base

    def address(self, access: Access, lane: int, gathers: Sequence[tuple[str, int]] = ()) -> str:
        """u32 element address of one lane.

        One below zero that is known here becomes 0: only a load whose mask is false has it (padding), and the validator,
        which sees it too, would reject the whole module.
        """
        offset = access.offset
        if lane and self.axis is not None:
            offset += lane * access.strides[self.axis]
        terms = [*zip(access.strides, self.index), *((s, g) for g, s in gathers)]
        if offset < 0 and all(stride == 0 or index == "0u" for stride, index in terms):
            offset = 0
        return wgsl.u32_offset(terms, offset)

    def address4(self, access: Access, gathers: Sequence[tuple[str, int]] = ()) -> str:
        """Address of an aligned vector, in vectors."""
        terms = [
            (1, self.quarter) if a == self.axis else (s // 4, self.index[a])
            for a, s in enumerate(access.strides)
        ]
        return wgsl.u32_offset([*terms, *((s // 4, g) for g, s in gathers)], access.offset // 4)

    def let(self, position: int, lane: int, expr: str, *, typ: str = "") -> str:
        """Bind an expression to the name of an instruction's lane."""
        name = f"{self.prefix}{position}_{lane}"
        self.lines.append(f"let {name} = {expr};\n")
        return name

    def lane(self, position: int, lane: int) -> str:
        """The name of an operand in a lane (lane 0 if it does not vary)."""
        values = self.values[position]
        return values[lane] if len(values) > 1 else values[0]

    # ------------------------------------------------------------ instructions
    def emit(self, position: int) -> None:
        """Emit one instruction other than store, reduce and acc; its operands must be there."""
        if position in self.values:
            return
        instr = self.body.instrs[position]
        lanes = range(self.lanes(instr))
        match instr.op:
            case "const":
                self.values[position] = [
                    self.let(position, 0, wgsl.literal(instr.attrs["value"], instr.dtype))
                ]
            case "index":
                axis = instr.attrs["axis"]
                to = "i32" if instr.dtype.kind == "i" else wgsl.compute_type(instr.dtype)
                self.values[position] = [
                    self.let(position, k, f"{to}({self.position(axis, k)})") for k in lanes
                ]
            case "load":
                self.values[position] = self._load(position, instr)
            case "random_bits":
                self.values[position] = [self.let(position, k, self._random(instr, k)) for k in lanes]
            case _:
                self.values[position] = [
                    self.let(position, k, self._expression(instr, [self.lane(p, k) for p in instr.args]))
                    for k in lanes
                ]

    def _expression(self, instr: Instr, args: Sequence[str]) -> str:
        source, use = bodies.argument_dtype(self.body, instr), self.shader.use
        if instr.dtype.kind == "f" and instr.op in ("mul", "div", "sub"):
            operands = [self.body.instrs[p] for p in instr.args]
            zeros = [
                float(o.attrs["value"]) if o.op == "const" and o.attrs["value"] == 0 else None
                for o in operands
            ]
            special = wgsl.zero_sign(instr.op, zeros, len(set(instr.args)) == 1)
            if special is not None:
                name, place, sign = special
                return f"{use(name)}({args[place]}{', ' + sign if sign else ''})"
        return wgsl.expression(instr.op, args, source, instr.dtype, use)

    def _random(self, instr: Instr, lane: int) -> str:
        strides = instr.attrs["strides"]
        offset = lane * strides[self.axis] if lane and self.axis is not None else 0
        counter = wgsl.u32_offset(list(zip(strides, self.index)), offset)
        k0, k1 = (self.lane(p, lane) for p in instr.args[:2])
        return f"{self.shader.use('threefry')}({k0}, {k1}, {counter}, 0u).x"

    def _gathers(self, instr: Instr, lane: int) -> list[tuple[str, int]]:
        out = []
        for position, stride, size in instr.attrs.get("gather", ()):
            name = self.lane(position, lane)
            if self.body.instrs[position].dtype.kind == "u":
                out.append((f"min({name}, {size - 1}u)", stride))
            else:
                out.append((f"u32(clamp({name}, 0i, {size - 1}i))", stride))
        return out

    def _load(self, position: int, instr: Instr) -> list[str]:
        shader, access = self.shader, instr.attrs["access"]
        predicate = instr.attrs.get("predicate")
        lanes = self.lanes(instr)
        scalar = access.buffer in shader.tables.scalars
        vectors = not scalar and shader.binding(access.buffer).vector
        gathered = [g[0] for g in instr.attrs.get("gather", ())]
        together = (
            vectors
            and lanes > 1
            and self.axis is not None
            and access.strides[self.axis] == 1
            and all(len(self.values[g]) == 1 for g in gathered)
            and (predicate is None or len(self.values[predicate]) == 1)
        )
        kind = wgsl.compute_type(instr.dtype)
        if together:
            bound = shader.binding(access.buffer)
            where = self.address4(access, self._gathers(instr, 0))
            name = f"{self.prefix}{position}_q"
            if predicate is None:
                self.lines.append(f"let {name} = {bound.name}[{where}];\n")
                return [
                    self.let(position, k, shader.loaded(f"{name}.{XYZW[k]}", instr.dtype))
                    for k in range(lanes)
                ]
            fill = wgsl.literal(instr.attrs.get("fill", 0), instr.dtype)
            splat = shader.stored(fill, instr.dtype)
            self.lines.append(
                f"var {name} = vec4<{bound.element}>({splat}); "
                f"if ({self.lane(predicate, 0)}) {{ {name} = {bound.name}[{where}]; }}\n"
            )
            return [
                self.let(position, k, shader.loaded(f"{name}.{XYZW[k]}", instr.dtype)) for k in range(lanes)
            ]
        out = []
        for k in range(lanes):
            read = shader.read(access.buffer, self.address(access, k, self._gathers(instr, k)))
            if predicate is None:
                out.append(self.let(position, k, read))
            else:
                fill = wgsl.literal(instr.attrs.get("fill", 0), instr.dtype)
                name = f"{self.prefix}{position}_{k}"
                self.lines.append(
                    f"var {name}: {kind} = {fill}; if ({self.lane(predicate, k)}) {{ {name} = {read}; }}\n"
                )
                out.append(name)
        return out

    def store(self, position: int, guard: str = "") -> None:
        """Emit a store under an optional condition."""
        instr = self.body.instrs[position]
        shader, access = self.shader, instr.attrs["access"]
        value = instr.args[0]
        predicate = instr.args[1] if len(instr.args) > 1 else None
        bound = shader.binding(access.buffer)
        along = access.strides[self.axis] if self.axis is not None else 0
        dtype = shader.tables.dtype(access.buffer)
        lines: list[str] = []
        varying = predicate is not None and len(self.values[predicate]) > 1
        if bound.vector and self.axis is not None and along == 1 and not varying:
            lanes = [shader.stored(self.lane(value, k), dtype) for k in range(len(self.values[value]))]
            line = f"{bound.name}[{self.address4(access)}] = {vector(bound.element, lanes)};"
            lines.append(
                f"if ({self.lane(predicate, 0)}) {{ {line} }}\n" if predicate is not None else line + "\n"
            )
        else:
            for k in range(self.width if along else 1):
                address = self.address(access, k)
                place = (
                    f"{bound.name}[({address}) >> 2u][({address}) & 3u]"
                    if bound.vector
                    else f"{bound.name}[{address}]"
                )
                line = f"{place} = {shader.stored(self.lane(value, k), dtype)};"
                lines.append(
                    f"if ({self.lane(predicate, k)}) {{ {line} }}\n" if predicate is not None else line + "\n"
                )
        text = "".join(lines)
        self.lines.append(f"if ({guard}) {{ {text} }}\n" if guard else text)

    def forget(self, keep: set[int]) -> None:
        """Drop values defined in a scope that was closed."""
        self.values = {p: v for p, v in self.values.items() if p in keep}

    def take(self) -> str:
        """The lines so far; starts a new list."""
        text = "".join(self.lines)
        self.lines.clear()
        return text


def decompose(shader: Shader, linear: str, sizes: Sequence[int], out: list[str]) -> list[str]:
    """Names of u32 positions along axes of ``sizes`` from a linear (row-major) position."""
    names = ["0u"] * len(sizes)
    rest = linear
    live = [a for a, s in enumerate(sizes) if s > 1]
    for n, axis in enumerate(reversed(live)):
        if n == len(live) - 1:
            names[axis] = rest
            break
        name = shader.name("i")
        out.append(f"let {name} = {rest} % {sizes[axis]}u;\n")
        names[axis] = name
        upper = shader.name("q")
        out.append(f"let {upper} = {rest} / {sizes[axis]}u;\n")
        rest = upper
    return names
