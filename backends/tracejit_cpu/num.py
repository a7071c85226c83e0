"""Operators on vectors of numbers in LLVM IR, the vocabulary of every formula of this package."""

from __future__ import annotations

from collections.abc import Sequence

from tracejit_cpu.irbuilder import Fn, const, vec


class Num:
    """Operators on ``lanes`` values of one IR type; keeps the emitters below readable."""

    def __init__(self, fn: Fn, ty: str, lanes: int) -> None:
        self.fn, self.ty, self.lanes = fn, ty, lanes
        self.full = vec(ty, lanes)
        self.bits = vec({"float": "i32", "double": "i64"}.get(ty, ty), lanes)
        self.bool = vec("i1", lanes)
        self.float = ty in ("float", "double")

    def c(self, value: object) -> str:
        """A constant of this type."""
        return const(value, self.ty, self.lanes)

    def ci(self, value: int) -> str:
        """An integer constant of the width of this type."""
        return const(value, {"float": "i32", "double": "i64"}.get(self.ty, self.ty), self.lanes)

    def _two(self, op: str, a: str, b: str) -> str:
        return self.fn.op(f"{op} {self.full} {a}, {b}")

    def add(self, a: str, b: str) -> str:
        """a + b."""
        return self._two("fadd" if self.float else "add", a, b)

    def sub(self, a: str, b: str) -> str:
        """a - b."""
        return self._two("fsub" if self.float else "sub", a, b)

    def mul(self, a: str, b: str) -> str:
        """a * b."""
        return self._two("fmul" if self.float else "mul", a, b)

    def div(self, a: str, b: str) -> str:
        """a / b of floating-point values."""
        return self._two("fdiv", a, b)

    def neg(self, a: str) -> str:
        """-a."""
        return self.fn.op(f"fneg {self.full} {a}") if self.float else self._two("sub", self.c(0), a)

    def fma(self, a: str, b: str, c: str) -> str:
        """a * b + c, rounded once where the processor can."""
        if self.fn.module.host.fma:
            return self.fn.intrinsic("fma", self.ty, self.lanes, a, b, c)
        return self.add(self.mul(a, b), c)

    def poly(self, x: str, coefficients: Sequence[float]) -> str:
        """Horner's rule, highest power first."""
        p = self.c(coefficients[0])
        for k in coefficients[1:]:
            p = self.fma(p, x, self.c(k))
        return p

    def cmp(self, how: str, a: str, b: str) -> str:
        """Compare with LLVM's predicate ``how``."""
        return self.fn.op(f"{'fcmp' if self.float else 'icmp'} {how} {self.full} {a}, {b}")

    def select(self, cond: str, a: str, b: str) -> str:
        """a where ``cond``, else b."""
        return self.fn.op(f"select {self.bool} {cond}, {self.full} {a}, {self.full} {b}")

    def isnan(self, a: str) -> str:
        """Lanes that hold NaN."""
        return self.cmp("uno", a, self.c(0.0))

    def to_bits(self, a: str) -> str:
        """Floating-point values as integers of their bits."""
        return self.fn.op(f"bitcast {self.full} {a} to {self.bits}")

    def from_bits(self, a: str) -> str:
        """The inverse of :meth:`to_bits`."""
        return self.fn.op(f"bitcast {self.bits} {a} to {self.full}")

    def iop(self, op: str, a: str, b: str) -> str:
        """An integer operation on bit patterns."""
        return self.fn.op(f"{op} {self.bits} {a}, {b}")

    def unary(self, name: str, a: str) -> str:
        """The LLVM intrinsic ``name``."""
        return self.fn.intrinsic(name, self.ty, self.lanes, a)

    def abs(self, a: str) -> str:
        """Without the sign."""
        return self.unary("fabs", a)

    def copysign(self, a: str, b: str) -> str:
        """a with the sign of b."""
        return self.fn.intrinsic("copysign", self.ty, self.lanes, a, b)

    def floor_at(self, x: str, low: float) -> str:
        """The larger of x and ``low`` in one instruction; NaN stays NaN."""
        return self.select(self.cmp("olt", x, self.c(low)), self.c(low), x)

    def clamp(self, x: str, low: float, high: float) -> str:
        """Into [low, high]; NaN stays NaN."""
        x = self.select(self.cmp("ogt", x, self.c(high)), self.c(high), x)
        return self.floor_at(x, low)

    def logic(self, op: str, a: str, b: str) -> str:
        """and, or, xor of masks."""
        return self.fn.op(f"{op} {self.bool} {a}, {b}")
