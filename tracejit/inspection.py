"""What ``fn.inspect(...)`` returns: every stage of a program as text, from the recorded graph to generated code."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tracejit.events import KernelInfo
from tracejit.graph import Graph
from tracejit.profile import where

if TYPE_CHECKING:
    from tracejit.compilation import Entry
    from tracejit.program import Program

_CODE_LINES = 24  # of each piece of generated code that ``str()`` shows
_WIDTH = 100


@dataclass(frozen=True)
class Inspection:
    """The stages of one compiled program. ``str()`` gives a readable report; the fields are for programs and tests.

    ``passes`` holds ``(name, graph)`` after each pass; ``kernels`` what runs, in order (``kernels[0].source()`` is the code
    generated for one of them); ``memory`` the memory plan in words; ``code`` all generated code by title (``"LLVM IR"``,
    ``"assembly"``, ``"WGSL"``, ...), empty on the reference backend. ``report(code_lines=None)`` shows all of it.
    """

    name: str
    device: str
    graph: Graph
    optimised: Graph
    passes: Sequence[tuple[str, Graph]]
    kernels: Sequence[KernelInfo]
    program: Program
    memory: str
    code: Mapping[str, str] = field(default_factory=dict)

    @staticmethod
    def of(entry: Entry) -> Inspection:
        """Collect the stages of a cache entry; the passes run once more to show their steps."""
        from tracejit.passes import optimise

        trail: list[tuple[str, Graph]] = []
        optimise(entry.traced.graph, trail)
        return Inspection(
            entry.name,
            str(entry.device),
            entry.traced.graph,
            entry.optimised,
            tuple(trail),
            tuple(entry.executable.kernels),
            entry.program,
            "\n".join(_memory(entry)),
            entry.executable.inspect(),
        )

    def __str__(self) -> str:
        return self.report()

    def report(self, *, code_lines: int | None = _CODE_LINES) -> str:
        """All stages; of each piece of generated code only the first ``code_lines`` lines (None: everything)."""
        lines = [f"{self.name} on {self.device}: {self._summary()}"]
        lines += ["", "recorded graph", str(self.graph), "", "passes", *self._passes()]
        lines += [
            "",
            "optimised graph",
            str(self.optimised),
            "",
            f"{len(self.kernels)} kernels",
            *self._kernels(),
        ]
        lines += ["", "memory", self.memory]
        if self.program.report:
            lines += ["", "fusion report", *self._fusion()]
        for title, text in self.code.items():
            lines += ["", title, *_shortened(text.splitlines(), code_lines, f".code[{title!r}]")]
        return "\n".join(lines)

    def _summary(self) -> str:
        flops, moved = sum(k.flops for k in self.kernels), sum(k.bytes for k in self.kernels)
        text = f"{len(self.graph)} nodes recorded, {len(self.optimised)} after the passes, {len(self.kernels)} kernels"
        return text + (f", {flops:,} flops, {moved:,} bytes moved" if flops or moved else "")

    def _passes(self) -> Iterator[str]:
        before = len(self.graph)
        for name, graph in self.passes:
            yield f"  {name}: {before} -> {len(graph)} nodes"
            before = len(graph)

    def _kernels(self) -> Iterator[str]:
        for k in self.kernels:
            place = where(self.optimised, k.nodes)
            cost = f": {k.bytes:,} bytes, {k.flops:,} flops" if k.bytes or k.flops else ""
            yield f"  k{k.id} {k.name} ({k.kind}){f' in {place}' if place else ''}{cost}"
            if k.nodes:
                yield from _wrapped("nodes " + ", ".join(f"%{n}" for n in k.nodes), "     ")

    def _fusion(self) -> Iterator[str]:
        for d in self.program.report:
            nodes = ", ".join(f"%{n}" for n in d.nodes)
            yield from _wrapped(f"{d.action} {nodes}: {d.reason}", "  ", "      ")


def _wrapped(text: str, indent: str, further: str | None = None) -> list[str]:
    return textwrap.wrap(
        text, _WIDTH, initial_indent=indent, subsequent_indent=indent if further is None else further,
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip


def _shortened(lines: Sequence[str], limit: int | None, rest: str) -> list[str]:
    if limit is None or len(lines) <= limit:
        return list(lines)
    return [*lines[:limit], f"... {len(lines) - limit:,} more lines in {rest}"]


def _memory(entry: Entry) -> Iterator[str]:
    """The memory plan: sizes, then each temporary with its place in the arena and the kernels between which it lives."""
    program = entry.program
    inputs = sum(n.nbytes for n in entry.optimised.inputs)
    outputs = sum(n.nbytes for n in entry.optimised.outputs)
    text = f"  inputs {inputs:,} bytes, outputs {outputs:,} bytes"
    if not program.kernels:
        yield text + "; intermediates are freed at their last use"
        return
    yield text + f", arena {program.arena:,} bytes (lower bound {program.live_bound:,})"
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    for at, kernel in enumerate(program.kernels):
        for touched in (*kernel.writes, *kernel.reads):
            first.setdefault(touched, at)
            last[touched] = at
    temps = [b for b in program.buffers if b.kind == "temp" and b.id in first]
    for b in sorted(temps, key=lambda b: (first[b.id], b.offset or 0)):
        place = "own buffer" if b.offset is None else f"offset {b.offset:,}"
        yield f"  b{b.id} k{first[b.id]}-k{last[b.id]}: {b.nbytes:,} bytes, {b.dtype}, {place}"
