"""Lowering: an optimised graph becomes a :class:`~tracejit.program.Program` of fused kernels with a memory plan.

``lower(graph, capabilities)`` is called by ``compilation.build_program`` for every compiled backend. Stages, one file
each: prepare (normal form), attention (pattern), fusion (clusters), kernels/emit/coalesce (code), sums (bias gradients
into weight gradients), horizontal (merging), schedule, memory.
"""

from __future__ import annotations

import gc
from dataclasses import replace

from tracejit.graph import Graph
from tracejit.lower import budget, memory, schedule
from tracejit.lower.fusion import Fusion
from tracejit.lower.horizontal import merge_kernels
from tracejit.lower.kernels import KernelBuilder, Unfusable
from tracejit.lower.prepare import Prepared
from tracejit.lower.siblings import merge_siblings
from tracejit.lower.sums import fuse_sums
from tracejit.program import Capabilities, Kernel, Program

_ATTEMPTS = 64


def lower(graph: Graph, capabilities: Capabilities) -> Program:
    """The program of ``graph`` for a backend with the given capabilities. Every graph lowers."""
    if any(n.op.name == "barrier" for n in graph.nodes):
        # tj.checkpoint: memory matters more than speed, and products computed in one go need all their operands at once.
        capabilities = replace(capabilities, batch_contracts=1)
    forced: frozenset[int] = frozenset()
    collecting = gc.isenabled()
    gc.disable()  # nothing here is garbage before the end; collections would cost a third of the time
    try:
        for _ in range(_ATTEMPTS):
            try:
                return _lower(graph, capabilities, forced)
            except Unfusable as stop:
                forced = forced | stop.nids
    finally:
        if collecting:
            gc.enable()
    raise AssertionError(f"lowering of {graph.name!r} does not settle; stored by force: {sorted(forced)}")


def _lower(graph: Graph, caps: Capabilities, forced: frozenset[int]) -> Program:
    prepared = Prepared(graph, caps)
    fusion = Fusion(prepared, caps, forced)
    merge_siblings(fusion)
    builder = KernelBuilder(fusion)
    kernels: list[Kernel] = []
    ranks: list[int] = []
    too_big: set[int] = set()
    for c in fusion.clusters:
        kernel = builder.kernel(c)
        if kernel is None:
            continue
        kernels.append(kernel)
        ranks.append(max([v.index for v in (*c.members, *c.reads) if v.home is c] or [0]))
        if budget.over_budget(kernel, caps, builder.buffers):
            too_big |= budget.cuts(c, fusion, caps)
    if too_big - forced:
        raise Unfusable(*too_big)
    kernels, ranks, sums = fuse_sums(kernels, ranks, builder.buffers, caps)
    sequence = schedule.order(kernels, builder.buffers, ranks)
    kernels, ranks, merged = merge_kernels(
        [kernels[i] for i in sequence], [ranks[i] for i in sequence], builder.buffers, caps
    )
    kernels = [kernels[i] for i in schedule.order(kernels, builder.buffers, ranks)]
    buffers, arena, bound = memory.plan(kernels, builder.buffers, caps.separate_outputs)
    kernels = schedule.dependencies(kernels, buffers)
    report = (*fusion.decisions, *sums, *merged)
    return Program(
        graph.name,
        graph,
        tuple(buffers),
        tuple(kernels),
        tuple(range(len(graph.inputs))),
        tuple(builder.outputs),
        tuple(builder.constants),
        arena,
        bound,
        report,
    )
