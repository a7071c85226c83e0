"""A small builder of LLVM IR text: functions, loops, vectors, memory. Called by every emitter of this package.

Text is several times faster to make than an object tree, and it is what ``inspect()`` shows. Loop counters and
accumulators live in ``alloca`` slots that LLVM's ``sroa`` pass turns into registers.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterator

import numpy as np

from tracejit_cpu.host import Host

I64 = "i64"
TASK_ARGS = "i64 %lo, i64 %hi, ptr %scr"  # how the parameters of every task function end

_IR_TYPES = {
    "bool": "i1",
    "int8": "i8",
    "uint8": "i8",
    "int16": "i16",
    "uint16": "i16",
    "int32": "i32",
    "uint32": "i32",
    "int64": "i64",
    "uint64": "i64",
    "float16": "float",
    "float32": "float",
    "float64": "double",
}
_BYTES = {"i1": 1, "i8": 1, "i16": 2, "half": 2, "i32": 4, "float": 4, "i64": 8, "double": 8, "ptr": 8}


def value_type(dtype: np.dtype) -> str:
    """IR type in which a value of ``dtype`` is computed (float16 is widened, bool is a bit)."""
    return _IR_TYPES[dtype.name]


def memory_type(dtype: np.dtype) -> str:
    """IR type in which a value of ``dtype`` lies in memory."""
    if dtype.name == "bool":
        return "i8"
    return "half" if dtype.name == "float16" else _IR_TYPES[dtype.name]


def type_bytes(ty: str) -> int:
    """Size of a scalar IR type in memory."""
    return _BYTES[ty]


def vec(ty: str, lanes: int) -> str:
    """The type of ``lanes`` values of ``ty``; a plain scalar for one lane."""
    return ty if lanes == 1 else f"<{lanes} x {ty}>"


def literal(value: object, ty: str) -> str:
    """A scalar constant in IR syntax."""
    if ty == "float":
        single = struct.unpack("f", struct.pack("f", _to_single(value)))[0]
        return f"0x{struct.unpack('Q', struct.pack('d', single))[0]:016X}"
    if ty == "double":
        return f"0x{struct.unpack('Q', struct.pack('d', float(value)))[0]:016X}"  # type: ignore[arg-type]
    if ty == "i1":
        return "true" if value else "false"
    bits = _BYTES[ty] * 8
    whole = int(value) & ((1 << bits) - 1)  # type: ignore[call-overload]
    return str(whole - (1 << bits) if whole >> (bits - 1) else whole)


def _to_single(value: object) -> float:
    with np.errstate(over="ignore"):
        return float(np.float32(value))  # type: ignore[arg-type]


def const(value: object, ty: str, lanes: int = 1) -> str:
    """A constant in IR syntax, the same in every lane."""
    text = literal(value, ty)
    return text if lanes == 1 else f"splat ({ty} {text})"


class Module:
    """Collects functions, declarations and constant tables of one LLVM module."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.declarations: set[str] = set()
        self.globals: list[str] = []
        self.functions: dict[str, str] = {}
        self._tables: dict[bytes, str] = {}
        self.support: dict[str, tuple[object, ...]] = {}
        self.tasks: list[str] = []  # task functions, in the order of the exported table

    def declare(self, text: str) -> None:
        """Add a ``declare`` line once."""
        self.declarations.add(text)

    def need(self, name: str, spec: tuple[object, ...], params: str) -> None:
        """Declare an external support function; ``spec`` says how ``micro.support`` makes it."""
        self.support[name] = spec
        self.declare(f"declare void @{name}({params})")

    def table(self, values: np.ndarray) -> str:
        """A constant int64 array; returns its symbol."""
        key = np.ascontiguousarray(values, np.int64).tobytes()
        if key not in self._tables:
            name = f"@tab{len(self._tables)}"
            items = ", ".join(f"i64 {int(v)}" for v in values)
            self.globals.append(
                f"{name} = private unnamed_addr constant [{len(values)} x i64] [{items}], align 64"
            )
            self._tables[key] = name
        return self._tables[key]

    def attributes(self) -> str:
        """The attribute group shared by all functions."""
        width = f'"prefer-vector-width"="{self.host.vector_bytes * 8}"'
        extra = (
            f' {width} "min-legal-vector-width"="{self.host.vector_bytes * 8}"'
            if self.host.arch == "x86_64"
            else ""
        )
        return f'attributes #0 = {{ nounwind alignstack=64 "target-features"="{self.host.features}"{extra} }}'

    def _task_table(self) -> list[str]:
        """Addresses of the task functions under one exported name."""
        if not self.tasks:
            return []
        items = ", ".join(f"ptr @{name}" for name in self.tasks)
        return [f"@tj_tasks = constant [{len(self.tasks)} x ptr] [{items}]"]

    def text(self) -> str:
        """The whole module as LLVM IR."""
        return "\n".join(
            [
                f'target triple = "{self.host.triple}"',
                *self.globals,
                *sorted(self.declarations),
                *self.functions.values(),
                *self._task_table(),
                self.attributes(),
                "",
            ]
        )


class Fn:
    """One function under construction. Values are SSA names or constants, as text."""

    def __init__(
        self, module: Module, name: str, args: str, ret: str = "void", linkage: str = "internal"
    ) -> None:
        self.module = module
        self.name = name
        self.args = args
        self.ret = ret
        self.linkage = linkage
        self.body: list[str] = []
        self.allocas: list[str] = []
        self.count = 0
        if args.endswith(TASK_ARGS):
            self._load_pointers(args[: -len(TASK_ARGS)])

    def _load_pointers(self, names: str) -> None:
        """A task function gets its pointers through the program's table: pointer i is ``table[slots[i]]``."""
        self.args = "ptr %tab, ptr %slots, " + TASK_ARGS
        self.module.tasks.append(self.name)
        for i, name in enumerate(n.split()[1] for n in names.rstrip(", ").split(",") if n.strip()):
            at = self.op(f"load i64, ptr {self.gep('%slots', i, 'i64')}")
            pointer = self.gep("%tab", at, "ptr")
            self.emit(f"{name} = load ptr, ptr {pointer}")

    # -- text ---------------------------------------------------------------------------------------------------
    def emit(self, line: str) -> None:
        """Append one instruction without a result."""
        self.body.append("  " + line)

    def op(self, text: str) -> str:
        """Append one instruction; returns the name of its result."""
        self.count += 1
        name = f"%t{self.count}"
        self.body.append(f"  {name} = {text}")
        return name

    def new_label(self, prefix: str) -> str:
        """A fresh block label."""
        self.count += 1
        return f"{prefix}{self.count}"

    def label(self, name: str) -> None:
        """Start a block."""
        self.body.append(f"{name}:")

    def finish(self, result: str = "ret void") -> str:
        """Close the function, register it with the module and return its text."""
        self.emit(result)
        head = f"define {self.linkage + ' ' if self.linkage else ''}{self.ret} @{self.name}({self.args}) #0 {{\nentry:\n"
        text = head + "\n".join(self.allocas + self.body) + "\n}\n"
        self.module.functions[self.name] = text
        return text

    # -- memory -------------------------------------------------------------------------------------------------
    def var(self, ty: str, init: str | None = None) -> str:
        """A stack slot of type ``ty``, optionally initialised here."""
        self.count += 1
        name = f"%v{self.count}"
        self.allocas.append(f"  {name} = alloca {ty}")
        if init is not None:
            self.emit(f"store {ty} {init}, ptr {name}")
        return name

    def get(self, ty: str, slot: str) -> str:
        """Read a stack slot."""
        return self.op(f"load {ty}, ptr {slot}")

    def set(self, ty: str, value: str, slot: str) -> None:
        """Write a stack slot."""
        self.emit(f"store {ty} {value}, ptr {slot}")

    def gep(self, ptr: str, index: str | int, ty: str) -> str:
        """Address of element ``index``."""
        if index in (0, "0"):
            return ptr
        return self.op(f"getelementptr {ty}, ptr {ptr}, i64 {index}")

    def load(self, ty: str, ptr: str, lanes: int = 1) -> str:
        """Load with element alignment."""
        return self.op(f"load {vec(ty, lanes)}, ptr {ptr}, align {type_bytes(ty)}")

    def store(self, ty: str, value: str, ptr: str, lanes: int = 1) -> None:
        """Store with element alignment."""
        self.emit(f"store {vec(ty, lanes)} {value}, ptr {ptr}, align {type_bytes(ty)}")

    def store_first(self, ty: str, value: str, ptr: str, lanes: int, count: int) -> None:
        """Store the first ``count`` lanes in power-of-two pieces and touch nothing behind them."""
        if count == lanes:
            self.store(ty, value, ptr, lanes)
            return
        full = vec(ty, lanes)
        at, part = 0, lanes // 2
        while at < count:
            while part > count - at:
                part //= 2
            order = ", ".join(f"i32 {at + i}" for i in range(part))
            if part == 1:
                piece = self.op(f"extractelement {full} {value}, i64 {at}")
            else:
                piece = self.op(f"shufflevector {full} {value}, {full} poison, <{part} x i32> <{order}>")
            self.store(ty, piece, self.gep(ptr, at, ty), part)
            at += part

    def masked_load(self, ty: str, ptr: str, lanes: int, mask: str, fill: str) -> str:
        """Load the lanes whose mask bit is set; the others give ``fill``."""
        name = f"@llvm.masked.load.v{lanes}{intrinsic_suffix(ty)}.p0"
        full = vec(ty, lanes)
        self.module.declare(f"declare {full} {name}(ptr, <{lanes} x i1>, {full})")
        return self.op(
            f"call {full} {name}(ptr align {type_bytes(ty)} {ptr}, <{lanes} x i1> {mask}, {full} {fill})"
        )

    def masked_store(self, ty: str, value: str, ptr: str, lanes: int, mask: str) -> None:
        """Store the lanes whose mask bit is set."""
        count = mask.count("true")
        if self.module.host.vector_bytes < 64 and mask == mask_first(count, lanes):
            # In pieces: without mask registers a masked store takes a dozen cycles or more on AMD's processors.
            self.store_first(ty, value, ptr, lanes, count)
            return
        name = f"@llvm.masked.store.v{lanes}{intrinsic_suffix(ty)}.p0"
        full = vec(ty, lanes)
        self.module.declare(f"declare void {name}({full}, ptr, <{lanes} x i1>)")
        self.emit(
            f"call void {name}({full} {value}, ptr align {type_bytes(ty)} {ptr}, <{lanes} x i1> {mask})"
        )

    def gather(self, ty: str, ptrs: str, lanes: int, mask: str, fill: str) -> str:
        """Load one element per lane from a vector of pointers."""
        name = f"@llvm.masked.gather.v{lanes}{intrinsic_suffix(ty)}.v{lanes}p0"
        full = vec(ty, lanes)
        self.module.declare(f"declare {full} {name}(<{lanes} x ptr>, <{lanes} x i1>, {full})")
        align = type_bytes(ty)
        return self.op(
            f"call {full} {name}(<{lanes} x ptr> align {align} {ptrs}, <{lanes} x i1> {mask}, {full} {fill})"
        )

    def scatter(self, ty: str, value: str, ptrs: str, lanes: int, mask: str) -> None:
        """Store one element per lane to a vector of pointers."""
        name = f"@llvm.masked.scatter.v{lanes}{intrinsic_suffix(ty)}.v{lanes}p0"
        full = vec(ty, lanes)
        self.module.declare(f"declare void {name}({full}, <{lanes} x ptr>, <{lanes} x i1>)")
        align = type_bytes(ty)
        self.emit(
            f"call void {name}({full} {value}, <{lanes} x ptr> align {align} {ptrs}, <{lanes} x i1> {mask})"
        )

    # -- arithmetic ---------------------------------------------------------------------------------------------
    def imul(self, a: str | int, b: str | int) -> str:
        """64-bit product; folds the trivial cases."""
        if _is_int(a) and _is_int(b):
            return str(int(a) * int(b))
        if a in (0, "0") or b in (0, "0"):
            return "0"
        if a in (1, "1"):
            return str(b)
        if b in (1, "1"):
            return str(a)
        return self.op(f"mul nsw i64 {a}, {b}")

    def iadd(self, a: str | int, b: str | int) -> str:
        """64-bit sum; folds the trivial cases."""
        if _is_int(a) and _is_int(b):
            return str(int(a) + int(b))
        if a in (0, "0"):
            return str(b)
        if b in (0, "0"):
            return str(a)
        return self.op(f"add nsw i64 {a}, {b}")

    def imin(self, a: str | int, b: str | int) -> str:
        """Smaller of two signed 64-bit values."""
        if _is_int(a) and _is_int(b):
            return str(min(int(a), int(b)))
        less = self.op(f"icmp slt i64 {a}, {b}")
        return self.op(f"select i1 {less}, i64 {a}, i64 {b}")

    def splat(self, value: str, ty: str, lanes: int) -> str:
        """The scalar in every lane (constants stay constants)."""
        if lanes == 1:
            return value
        if not value.startswith("%"):
            return f"splat ({ty} {value})"
        full = vec(ty, lanes)
        first = self.op(f"insertelement {full} poison, {ty} {value}, i64 0")
        return self.op(f"shufflevector {full} {first}, {full} poison, <{lanes} x i32> zeroinitializer")

    def intrinsic(self, name: str, ty: str, lanes: int, *args: str) -> str:
        """Call ``llvm.<name>`` whose operands and result have one type."""
        full = vec(ty, lanes)
        suffix = (f"v{lanes}" if lanes > 1 else "") + intrinsic_suffix(ty)
        symbol = f"@llvm.{name}.{suffix}"
        self.module.declare(f"declare {full} {symbol}({', '.join([full] * len(args))})")
        return self.op(f"call {full} {symbol}({', '.join(f'{full} {a}' for a in args)})")

    # -- control ------------------------------------------------------------------------------------------------
    @contextlib.contextmanager
    def loop(self, low: str | int, high: str | int, step: str | int = 1) -> Iterator[str]:
        """``for i in range(low, high, step)``; yields i."""
        slot = self.var(I64, str(low))
        head, body, done = self.new_label("head"), self.new_label("body"), self.new_label("end")
        self.emit(f"br label %{head}")
        self.label(head)
        index = self.get(I64, slot)
        more = self.op(f"icmp slt i64 {index}, {high}")
        self.emit(f"br i1 {more}, label %{body}, label %{done}")
        self.label(body)
        yield index
        after = self.op(f"add nsw i64 {index}, {step}")
        self.set(I64, after, slot)
        self.emit(f"br label %{head}")
        self.label(done)

    @contextlib.contextmanager
    def when(self, condition: str) -> Iterator[None]:
        """``if condition:``"""
        inside, after = self.new_label("then"), self.new_label("after")
        self.emit(f"br i1 {condition}, label %{inside}, label %{after}")
        self.label(inside)
        yield
        self.emit(f"br label %{after}")
        self.label(after)


def _is_int(x: str | int) -> bool:
    return isinstance(x, int) or x.lstrip("-").isdigit()


def intrinsic_suffix(ty: str) -> str:
    """The type part of an overloaded intrinsic's name."""
    return {"float": "f32", "double": "f64", "half": "f16"}.get(ty, ty)


def mask_first(count: int, lanes: int) -> str:
    """A constant mask with the first ``count`` lanes set."""
    return "<" + ", ".join("i1 true" if i < count else "i1 false" for i in range(lanes)) + ">"


def iota(ty: str, lanes: int, scale: int = 1) -> str:
    """The constant vector 0, scale, 2*scale, ..."""
    return "<" + ", ".join(f"{ty} {i * scale}" for i in range(lanes)) + ">"
