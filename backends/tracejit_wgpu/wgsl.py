"""WGSL text: types, literals, helper functions, and one expression per elementwise op, with NumPy's semantics.

Used by every kernel generator of this package. All floats are computed as f32 (f16 results are rounded after each op),
all signed integers as i32, all unsigned as u32; narrow integers are wrapped after each op. WGSL lets a compiler assume
that there are no NaNs, so NaN tests are made on bits.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from tracejit.errors import CompileError
from tracejit_wgpu.mathlib import LIBRARY

DType = np.dtype[Any]

#: Storage and compute type per dtype kind; bool is stored as u32 (0 or 1).
_COMPUTE = {"f": "f32", "i": "i32", "u": "u32", "b": "bool"}


def compute_type(dtype: DType) -> str:
    """The WGSL type in which values of ``dtype`` are computed."""
    return _COMPUTE[dtype.kind]


def storage_type(dtype: DType, f16: bool) -> str:
    """The WGSL element type of a buffer of ``dtype``; f16 needs the adapter's shader-f16."""
    if dtype == np.float16 and f16:
        return "f16"
    return "u32" if dtype.kind == "b" else _COMPUTE[dtype.kind]


def storage_dtype(dtype: DType, f16: bool) -> DType:
    """The NumPy dtype of the bytes in a device buffer that holds values of ``dtype``."""
    if dtype == np.float16:
        return np.dtype(np.float16 if f16 else np.float32)
    return np.dtype({"f": np.float32, "i": np.int32, "u": np.uint32, "b": np.uint32}[dtype.kind])


def literal(value: Any, dtype: DType) -> str:
    """A WGSL expression for a Python or NumPy scalar; non-finite values go through a run-time bit pattern."""
    if dtype.kind == "b":
        return "true" if value else "false"
    if dtype.kind == "f":
        number = float(np.float16(value)) if dtype == np.float16 else float(value)
        with np.errstate(over="ignore"):
            single = np.float32(number)
        if not math.isfinite(single):
            bits = "nan_bits" if math.isnan(single) else ("inf_bits" if single > 0 else "ninf_bits")
            return f"bitcast<f32>({bits})"
        if single != 0 and abs(single) < np.finfo(np.float32).tiny:
            return f"bitcast<f32>(0x{struct.unpack('<I', struct.pack('<f', single))[0]:08x}u)"
        if single == 0 and math.copysign(1.0, single) < 0:
            return "(-0.0f)"
        text = repr(float(single))  # the exact value in decimal
        return f"({text}f)" if single < 0 else f"{text}f"
    number_i = int(value)
    if dtype.kind == "u":
        if not 0 <= number_i < 1 << 32:
            raise CompileError(
                f"the constant {number_i} does not fit uint32, the widest unsigned integer of the device"
            )
        return f"{number_i}u"
    if not -(1 << 31) <= number_i < 1 << 31:
        raise CompileError(f"the constant {number_i} does not fit int32, the widest integer of the device")
    return (
        "i32(-2147483647 - 1)"
        if number_i == -(1 << 31)
        else (f"({number_i}i)" if number_i < 0 else f"{number_i}i")
    )


class Helpers:
    """Collects the library functions that a shader uses, with those that they call."""

    def __init__(self) -> None:
        self._used: dict[str, None] = {}

    def __call__(self, name: str) -> str:
        """Ask for a helper; returns its name, so that it can stand in an f-string."""
        if name not in self._used:
            needs = LIBRARY[name][1]
            for other in needs:
                self(other)
            self._used[name] = None
        return name

    def text(self) -> str:
        """The definitions in dependency order."""
        return "".join(LIBRARY[name][0] + "\n" for name in self._used)


#: float unary ops that are one helper function.
_HELPED = {
    "exp": "exp_",
    "exp2": "exp2_",
    "expm1": "expm1_",
    "log": "log_",
    "log2": "log2_",
    "log10": "log10_",
    "log1p": "log1p_",
    "cbrt": "cbrt_",
    "sin": "sin_",
    "cos": "cos_",
    "tan": "tan_",
    "arcsin": "asin_",
    "arccos": "acos_",
    "arctan": "atan_",
    "sinh": "sinh_",
    "cosh": "cosh_",
    "tanh": "tanh_",
    "arcsinh": "asinh_",
    "arccosh": "acosh_",
    "arctanh": "atanh_",
    "erf": "erf_",
}
_COMPARE = {
    "equal": "==",
    "less": "<",
    "less_equal": "<=",
    "greater": ">",
    "greater_equal": ">=",
    "not_equal": "!=",
}
_BITWISE = {"bitwise_and": "&", "bitwise_or": "|", "bitwise_xor": "^"}
_IDENTITY = frozenset({"stop_gradient", "identity", "print", "custom_vjp"})


def wrap(expr: str, dtype: DType) -> str:
    """Bring an i32/u32 result back into the range of a narrow integer dtype, or round to float16."""
    bits = dtype.itemsize * 8
    if dtype.kind == "i" and bits < 32:
        return f"(({expr}) << {32 - bits}u) >> {32 - bits}u"
    if dtype.kind == "u" and bits < 32:
        return f"(({expr}) & {(1 << bits) - 1}u)"
    return expr


def expression(op: str, args: Sequence[str], source: DType, dtype: DType, use: Helpers) -> str:
    """The WGSL expression for an elementwise op on scalar operands; ``source`` is the dtype of the last operand.

    ``args`` must be names or otherwise cheap: they may be repeated. Raises CompileError for an unknown op.
    """
    text = _expression(op, args, source, dtype, use)
    if dtype == np.float16:
        use("round16")
        return f"round16_({text})"
    return wrap(text, dtype) if dtype.kind in "iu" and dtype.itemsize < 4 else text


def zero_sign(op: str, zeros: Sequence[float | None], same: bool) -> tuple[str, int, str] | None:
    """(helper, operand that stays, sign bits of the zero) where a literal zero, or one value twice, must not be folded.

    ``zeros`` has the value of each operand that is a constant zero; ``same``: both operands are one value.
    """
    if same and op in ("sub", "div"):
        return f"self_{op}_", 0, ""
    for place, zero in enumerate(zeros):
        if zero is None or op not in ("mul", "div") or len(zeros) != 2:
            continue
        sign = "0x80000000u" if math.copysign(1.0, zero) < 0 else "0u"
        if op == "mul":
            return "mul0_", 1 - place, sign
        return ("zero_over_", 1, sign) if place == 0 else ("div0_", 0, sign)
    return None


def _expression(op: str, a: Sequence[str], source: DType, dtype: DType, use: Helpers) -> str:
    kind = source.kind
    if op in _IDENTITY:
        return a[0]
    if op == "convert":
        return convert(a[0], source, dtype, use)
    if op == "where":
        return f"select({a[2]}, {a[1]}, {a[0]})"
    if op in _COMPARE:
        if kind == "b" and op not in ("equal", "not_equal"):
            return f"(u32({a[0]}) {_COMPARE[op]} u32({a[1]}))"
        if op == "not_equal" and kind == "f":
            return f"!({a[0]} == {a[1]})"
        return f"({a[0]} {_COMPARE[op]} {a[1]})"
    if op in _BITWISE:
        if kind == "b" and op == "bitwise_xor":
            return f"({a[0]} != {a[1]})"
        return f"({a[0]} {_BITWISE[op]} {a[1]})"
    if op in ("isnan", "isinf", "isfinite"):
        if kind != "f":
            return "true" if op == "isfinite" else "false"
        return f"{use(op + '_')}({a[0]})"
    if op == "logical_not":
        return f"!({convert(a[0], source, np.dtype(bool), use)})"
    if op == "invert":
        return f"!({a[0]})" if kind == "b" else f"(~{a[0]})"
    if kind == "b":
        return _bool_expression(op, a)
    if kind == "f":
        return _float_expression(op, a, use)
    return _int_expression(op, a, kind, use)


def _bool_expression(op: str, a: Sequence[str]) -> str:
    if op in ("add", "maximum"):
        return f"({a[0]} || {a[1]})"
    if op in ("mul", "minimum", "pow"):
        return f"({a[0]} && {a[1]})" if op != "pow" else f"({a[0]} || !{a[1]})"
    if op == "abs":
        return a[0]
    raise CompileError(f"wgpu has no lowering of {op!r} for bool")


def _float_expression(op: str, a: Sequence[str], use: Helpers) -> str:
    x = a[0]
    if op in _HELPED:
        return f"{use(_HELPED[op])}({x})"
    match op:
        case "add":
            return f"({x} + {a[1]})"
        case "sub":
            return f"({x} - {a[1]})"
        case "mul":
            return f"({x} * {a[1]})"
        case "div":
            return f"({x} / {a[1]})"
        case "neg":
            return f"(-{x})"
        case "reciprocal":
            return f"(1.0f / {x})"
        case "rsqrt":
            return f"(1.0f / sqrt({x}))"
        case "rint":
            return f"round({x})"
        case "abs" | "floor" | "ceil" | "trunc" | "sqrt":
            return f"{op}({x})"
        case "sign":
            return f"{use('sign_')}({x})"
        case "maximum":
            return f"{use('nmax')}({x}, {a[1]})"
        case "minimum":
            return f"{use('nmin')}({x}, {a[1]})"
        case "floordiv":
            return f"{use('floordiv_')}({x}, {a[1]})"
        case "mod":
            return f"{use('mod_')}({x}, {a[1]})"
        case "fmod":
            return f"{use('fmod_')}({x}, {a[1]})"
        case "pow":
            return f"{use('pow_')}({x}, {a[1]})"
        case "arctan2":
            return f"{use('atan2_')}({x}, {a[1]})"
        case "copysign":
            return f"{use('copysign_')}({x}, {a[1]})"
    raise CompileError(f"wgpu has no lowering of {op!r} for floating point")


def _int_expression(op: str, a: Sequence[str], kind: str, use: Helpers) -> str:
    x = a[0]
    signed = kind == "i"
    t = "i" if signed else "u"
    match op:
        case "add" | "sub" | "mul":
            return f"({x} {({'add': '+', 'sub': '-', 'mul': '*'})[op]} {a[1]})"
        case "neg":
            return f"(-{x})" if signed else f"(0u - {x})"
        case "abs":
            return f"abs({x})" if signed else x
        case "sign":
            return f"sign({x})" if signed else f"min({x}, 1u)"
        case "floor" | "ceil" | "trunc" | "rint":
            return x
        case "maximum":
            return f"max({x}, {a[1]})"
        case "minimum":
            return f"min({x}, {a[1]})"
        case "floordiv" | "mod" | "fmod" | "pow" | "left_shift" | "right_shift":
            return f"{use(f'{op}_{t}')}({x}, {a[1]})"
    raise CompileError(f"wgpu has no lowering of {op!r} for integers")


def convert(x: str, source: DType, target: DType, use: Helpers) -> str:
    """``x.astype(target)`` as NumPy does it on a typical machine (truncation, wraparound)."""
    s, t = source.kind, target.kind
    if t == "b":
        return {"b": x, "f": f"!({x} == 0.0f)", "i": f"({x} != 0i)", "u": f"({x} != 0u)"}[s]
    if s == "b":
        return f"select({literal(0, target)}, {literal(1, target)}, {x})"
    if t == "f":
        return x if s == "f" else f"f32({x})"
    if s == "f":
        return f"i32({x})" if t == "i" else f"{use('f2u')}({x})"
    if s == t:
        return x
    return f"bitcast<{compute_type(target)}>({x})"


def identity_element(kind: str, dtype: DType) -> str:
    """The neutral value of a reduction."""
    match kind:
        case "sum":
            return literal(0, dtype)
        case "prod":
            return literal(1, dtype)
        case "any":
            return "false"
        case "all":
            return "true"
        case "max" | "argmax":
            if dtype.kind == "f":
                return literal(-math.inf, dtype)
            return literal(False, dtype) if dtype.kind == "b" else literal(_lowest(dtype), dtype)
        case "min" | "argmin":
            if dtype.kind == "f":
                return literal(math.inf, dtype)
            return literal(True, dtype) if dtype.kind == "b" else literal(_highest(dtype), dtype)
    raise CompileError(f"unknown reduction {kind!r}")


def _lowest(dtype: DType) -> int:
    return 0 if dtype.kind == "u" else -(1 << 31)


def _highest(dtype: DType) -> int:
    return (1 << 32) - 1 if dtype.kind == "u" else (1 << 31) - 1


def combine(kind: str, a: str, b: str, dtype: DType, use: Helpers) -> str:
    """``a (+) b`` for a reduction kind other than argmax/argmin."""
    if kind == "any" or (dtype.kind == "b" and kind in ("sum", "max")):
        return f"({a} | {b})"
    if kind == "all" or (dtype.kind == "b" and kind in ("prod", "min")):
        return f"({a} & {b})"
    op = {"sum": "add", "prod": "mul", "max": "maximum", "min": "minimum"}[kind]
    return expression(op, (a, b), dtype, dtype if dtype != np.float16 else np.dtype(np.float32), use)


def u32_offset(terms: Iterable[tuple[int, str]], offset: int) -> str:
    """``offset + sum(stride * index)`` in u32 arithmetic that may wrap (negative strides)."""
    parts: list[str] = []
    for stride, index in terms:
        if stride == 0 or index == "0u":
            continue
        if stride == 1:
            parts.append(index)
        elif stride > 0:
            parts.append(f"{index} * {stride}u")
        else:
            parts.append(f"{index} * {(stride + (1 << 32)) % (1 << 32)}u")
    if offset or not parts:
        parts.append(f"{offset % (1 << 32)}u")
    return " + ".join(parts)


def kernel_constants(text: str) -> str:
    """Module-scope run-time bit patterns for the non-finite literals that occur in ``text``."""
    table: Mapping[str, str] = {
        "nan_bits": "0x7fc00000u",
        "inf_bits": "0x7f800000u",
        "ninf_bits": "0xff800000u",
    }
    return "".join(f"var<private> {n}: u32 = {v};\n" for n, v in table.items() if n in text)
