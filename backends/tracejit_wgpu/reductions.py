"""Reductions of a loop kernel: accumulators of one sweep, and their combination over the lanes that share a point.

By subgroup shuffles where the device has them, by a tree in workgroup memory where not, always in a fixed order. Used by
``loops.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from tracejit.program import LoopBody
from tracejit_wgpu import wgsl
from tracejit_wgpu.emit import Emitter, Shader

if TYPE_CHECKING:
    from tracejit_wgpu.loops import Strategy


class Reductions:
    """Accumulators of the reductions of one sweep and their combination over the lanes of a point."""

    def __init__(
        self, shader: Shader, body: LoopBody, plan: Strategy, positions: Sequence[int], emitter: Emitter
    ) -> None:
        self.shader, self.body, self.plan, self.emitter = shader, body, plan, emitter
        self.positions = positions
        self.width = {p: emitter.lanes(body.instrs[p]) for p in positions}

    def _kinds(self, position: int) -> tuple[str, np.dtype, bool]:
        instr = self.body.instrs[position]
        kind = instr.attrs["kind"]
        return kind, self.body.instrs[instr.args[0]].dtype, kind.startswith("arg")

    def declare(self) -> str:
        """The accumulators, at their neutral values."""
        out = []
        for p in self.positions:
            kind, dtype, arg = self._kinds(p)
            for k in range(self.width[p]):
                out.append(
                    f"var a{p}_{k}: {wgsl.compute_type(dtype)} = {wgsl.identity_element(kind, dtype)};\n"
                )
                if arg:
                    out.append(f"var x{p}_{k}: i32 = 2147483647i;\n")
        return "".join(out)

    def _merge(self, p: int, k: int, value: str, index: str) -> str:
        kind, dtype, arg = self._kinds(p)
        use = self.shader.use
        if not arg:
            return f"a{p}_{k} = {wgsl.combine(kind, f'a{p}_{k}', value, dtype, use)};\n"
        # better value, or a NaN where there was none, or an equal value at an earlier position; no branch, not even that of
        # a short-circuit operator: NVIDIA's threads need not have met again when the next subgroup operation runs
        a, x = f"a{p}_{k}", f"x{p}_{k}"
        sooner = f"(({value} == {a}) & ({index} < {x}))"
        if dtype.kind == "f":
            use("isnan_")
            beats = f"({value} {'>' if kind == 'argmax' else '<'} {a})"
            condition = (
                f"(isnan_({value}) & (!isnan_({a}) | ({index} < {x}))) | "
                f"(!isnan_({value}) & !isnan_({a}) & ({beats} | {sooner}))"
            )
        elif dtype.kind == "b":
            beats = f"({value} & !{a})" if kind == "argmax" else f"(!{value} & {a})"
            condition = f"{beats} | {sooner}"
        else:
            condition = f"({value} {'>' if kind == 'argmax' else '<'} {a}) | {sooner}"
        better = self.shader.name("c")
        return (
            f"let {better} = {condition}; {a} = select({a}, {value}, {better}); "
            f"{x} = select({x}, {index}, {better});\n"
        )

    def accumulate(self, linear: str, valid: str) -> str:
        """Fold the current element's values in; ``linear`` is the i32 position over the reduce axes of lane 0."""
        out = []
        for p in self.positions:
            instr = self.body.instrs[p]
            along = self.emitter.axis is not None and self.emitter.axis in self.body.reduce_axes
            source = self.emitter.values[instr.args[0]]
            pair = instr.attrs.get("index_arg")
            for k in range(self.emitter.width if along or self.width[p] > 1 else 1):
                value = source[k] if len(source) > 1 else source[0]
                index = f"({linear} + {k}i)" if along and k else linear
                if pair is not None:
                    index = self.emitter.lane(pair, k)
                out.append(self._merge(p, k if self.width[p] > 1 else 0, value, index))
        text = "".join(out)
        return f"if ({valid}) {{ {text} }}\n" if valid and text else text

    def combine(self, first: bool) -> str:
        """Combine over lanes; afterwards every lane holds the result."""
        if self.plan.lanes == 1 or not self.positions:
            return ""
        plan, shader = self.plan, self.shader
        size = shader.target.subgroup
        if plan.rows and size and (size % plan.lanes == 0 or plan.lanes % size == 0):
            out = self._shuffle(min(size, plan.lanes))
            if plan.lanes <= size:
                return out
            return out + self._through_memory(first, plan.lanes // size, size)
        return self._tree(first)

    def _slots(self) -> list[tuple[int, int, str, str, int]]:
        """(position, lane, variable, type, slot) of everything that goes through workgroup memory."""
        out: list[tuple[int, int, str, str, int]] = []
        count: dict[str, int] = {}
        for p in self.positions:
            _, dtype, arg = self._kinds(p)
            for k in range(self.width[p]):
                kind = wgsl.compute_type(dtype)
                out.append((p, k, f"a{p}_{k}", kind, count.setdefault(kind, 0)))
                count[kind] += 1
                if arg:
                    out.append((p, k, f"x{p}_{k}", "i32", count.setdefault("i32", 0)))
                    count["i32"] += 1
        return out

    def _place(self, kind: str, slot: int, per: int, offset: str) -> str:
        """A slot's place in workgroup memory."""
        return f"{self.shader.memory(kind, (slot + 1) * per)}[{slot * per}u + {offset}]"

    def _put(self, slots: list[tuple[int, int, str, str, int]], per: int, offset: str) -> str:
        """Write every variable to its place."""
        out = []
        for _, _, name, kind, slot in slots:
            value = f"select(0u, 1u, {name})" if kind == "bool" else name
            out.append(f"{self._place(kind, slot, per, offset)} = {value};\n")
        return "".join(out)

    def _get(self, kind: str, slot: int, per: int, offset: str) -> str:
        """The value in a place."""
        place = self._place(kind, slot, per, offset)
        return f"({place} != 0u)" if kind == "bool" else place

    def _all(self, value: str) -> str:
        out = []
        for p in self.positions:
            arg = self._kinds(p)[2]
            for k in range(self.width[p]):
                index = value.replace("@", f"x{p}_{k}") if arg else ""
                out.append((p, k, value.replace("@", f"a{p}_{k}"), index))
        return "".join(self._merge(p, k, v, x) for p, k, v, x in out)

    def _shuffle(self, lanes: int) -> str:
        out = []
        step = 1
        while step < lanes:
            for p in self.positions:
                _, dtype, arg = self._kinds(p)
                for k in range(self.width[p]):
                    name = self.shader.name("s")
                    a = f"a{p}_{k}"
                    if dtype.kind == "b":
                        out.append(f"let {name} = subgroupShuffleXor(select(0u, 1u, {a}), {step}u) != 0u;\n")
                    else:
                        out.append(f"let {name} = subgroupShuffleXor({a}, {step}u);\n")
                    index = ""
                    if arg:
                        index = self.shader.name("s")
                        out.append(f"let {index} = subgroupShuffleXor(x{p}_{k}, {step}u);\n")
                    out.append(self._merge(p, k, name, index))
            step *= 2
        return "".join(out)

    def _through_memory(self, first: bool, parts: int, size: int) -> str:
        """One value per subgroup through workgroup memory; every thread adds up its row's parts in order."""
        slots = self._slots()
        per = self.plan.threads // size
        out = [] if first else ["workgroupBarrier();\n"]
        out.append(f"if (li % {size}u == 0u) {{\n")
        out.append(self._put(slots, per, f"li / {size}u"))
        out.append("}\nworkgroupBarrier();\n")
        base = f"(li / {self.plan.lanes}u) * {parts}u"
        return "".join(out) + self._gather(slots, per, base, parts, "1u")

    def _gather(
        self, slots: list[tuple[int, int, str, str, int]], per: int, base: str, parts: int, step: str
    ) -> str:
        out = []
        where = {(p, k, name[0]): (kind, slot) for p, k, name, kind, slot in slots}
        for p in self.positions:
            arg = self._kinds(p)[2]
            for k in range(self.width[p]):
                j, value = self.shader.name("j"), self.shader.name("s")
                kind, slot = where[(p, k, "a")]
                out.append(f"a{p}_{k} = {self._get(kind, slot, per, base)};\n")
                each = f"let {value} = {self._get(kind, slot, per, f'{base} + {j} * {step}')}; "
                if arg:
                    kind, slot = where[(p, k, "x")]
                    out.append(f"x{p}_{k} = {self._get(kind, slot, per, base)};\n")
                    each += f"let {value}x = {self._get(kind, slot, per, f'{base} + {j} * {step}')}; "
                each += self._merge(p, k, value, f"{value}x" if arg else "")
                out.append(f"for (var {j} = 1u; {j} < {parts}u; {j}++) {{ {each}}}\n")
        return "".join(out)

    def _tree(self, first: bool) -> str:
        plan = self.plan
        slots = self._slots()
        per = plan.threads
        out = [] if first else ["workgroupBarrier();\n"]

        out.append(self._put(slots, per, "li"))
        step = plan.lanes // 2
        stride = 1 if plan.rows else plan.points
        lane = f"(li % {plan.lanes}u)" if plan.rows else f"(li / {plan.points}u)"
        where = {(p, k, name[0]): (kind, slot) for p, k, name, kind, slot in slots}
        while step:
            out.append(f"workgroupBarrier();\nif ({lane} < {step}u) {{\n")
            other = f"li + {step * stride}u"
            for p in self.positions:
                arg = self._kinds(p)[2]
                for k in range(self.width[p]):
                    value, index = self.shader.name("s"), ""
                    out.append(f"let {value} = {self._get(*where[(p, k, 'a')], per, other)};\n")
                    if arg:
                        index = self.shader.name("s")
                        out.append(f"let {index} = {self._get(*where[(p, k, 'x')], per, other)};\n")
                    out.append(self._merge(p, k, value, index))
            out.append(self._put(slots, per, "li") + "}\n")
            step //= 2
        out.append("workgroupBarrier();\n")
        base = f"(li / {plan.lanes}u) * {plan.lanes}u" if plan.rows else f"li % {plan.points}u"
        for _, _, name, kind, slot in slots:
            out.append(f"{name} = {self._get(kind, slot, per, base)};\n")
        return "".join(out)

    def publish(self) -> None:
        """Make the results values of the emitter."""
        for p in self.positions:
            _, dtype, arg = self._kinds(p)
            names = []
            for k in range(self.width[p]):
                value = f"x{p}_{k}" if arg else f"a{p}_{k}"
                result = self.body.instrs[p].dtype
                if not arg and dtype == np.float16:
                    self.shader.use("round16")
                    value = f"round16_({value})"
                elif not arg and result.kind in "iu" and result.itemsize < 4:
                    value = wgsl.wrap(value, result)
                elif not arg and result.kind != dtype.kind:
                    value = wgsl.convert(value, dtype, result, self.shader.use)
                names.append(self.emitter.let(p, k, value))
            self.emitter.values[p] = names
