"""What ``fn.inspect(...)`` returns: every stage of a program as text, from the recorded graph to generated code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tracejit.events import KernelInfo
from tracejit.graph import Graph

if TYPE_CHECKING:
    from tracejit.compilation import Entry
    from tracejit.program import Program


@dataclass(frozen=True)
class Inspection:
    """The stages of one compiled program. ``str()`` gives a readable report; the fields are for programs and tests.

    ``passes`` holds ``(name, graph)`` after each pass; ``kernels`` what runs, in order; ``memory`` the memory plan in
    words; ``code`` generated code by title (``"LLVM IR"``, ``"WGSL"``, ...), empty on the reference backend.
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
            _memory(entry),
            entry.executable.inspect(),
        )

    def __str__(self) -> str:
        lines = [f"{self.name} on {self.device}", "", "recorded graph", str(self.graph), "", "passes"]
        before = len(self.graph)
        for name, graph in self.passes:
            lines.append(f"  {name}: {before} -> {len(graph)} nodes")
            before = len(graph)
        lines += ["", "optimised graph", str(self.optimised), "", f"{len(self.kernels)} kernels"]
        lines += [
            f"  k{k.id} {k.name} ({k.kind}): nodes {', '.join(f'%{n}' for n in k.nodes)}; "
            f"{k.bytes:,} bytes, {k.flops:,} flops"
            for k in self.kernels
        ]
        lines += ["", "memory", self.memory]
        if self.program.report:
            lines += ["", "fusion report"]
            lines += [
                f"  {d.action} {', '.join(f'%{n}' for n in d.nodes)}: {d.reason}" for d in self.program.report
            ]
        for title, text in self.code.items():
            lines += ["", title, text]
        return "\n".join(lines)


def _memory(entry: Entry) -> str:
    program = entry.program
    inputs = sum(n.nbytes for n in entry.optimised.inputs)
    outputs = sum(n.nbytes for n in entry.optimised.outputs)
    text = f"  inputs {inputs:,} bytes, outputs {outputs:,} bytes"
    if not program.kernels:
        return text + "; intermediates are freed at their last use"
    text += f", arena {program.arena:,} bytes (lower bound {program.live_bound:,})"
    for b in program.buffers:
        if b.kind == "temp":
            place = "own buffer" if b.offset is None else f"offset {b.offset:,}"
            text += f"\n  b{b.id}: {b.nbytes:,} bytes, {b.dtype}, {place}"
    return text
