"""Loop kernels: elementwise grids, row pipelines, column and multi-stage reductions, several bodies per dispatch.

A reducing body runs on tiles of ``points x lanes``: ``points`` positions of the parallel axes per workgroup and
``lanes`` threads that share each position's reduction. Lanes are contiguous when the reduce axis is (rows), points are
contiguous when the parallel axis is (columns). Every sum has a fixed order: results are deterministic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

from tracejit.program import Instr, LoopBody
from tracejit_wgpu import body as bodies
from tracejit_wgpu.emit import Dispatch, Emitter, Shader, Tables, decompose
from tracejit_wgpu.reductions import Reductions
from tracejit_wgpu.tiled import tile_axis, tiled_body, usable

_UNROLL = 8  # chunks of a row that a thread keeps in registers between sweeps


@dataclass(frozen=True)
class Strategy:
    """How one body is mapped to threads. ``chunks`` > 0: the row lives in registers; 0: loops that recompute."""

    threads: int
    points: int = 0
    lanes: int = 1
    rows: bool = True
    axis: int | None = None
    width: int = 1
    chunks: int = 0
    tile: int | None = None  # an elementwise body in square tiles of this axis and the last
    split: int = 1  # axis 0 of the domain splits the reduction into that many ranges


def loop_dispatches(loop_bodies: Sequence[LoopBody], tables: Tables, label: str) -> list[Dispatch]:
    """Compile independent bodies to dispatches: as many bodies per dispatch as the bindings allow, plus second stages."""
    stages: list[list[tuple[LoopBody, Strategy | None]]] = [[]]
    for raw in loop_bodies:
        if prod(s for a, s in enumerate(raw.domain) if a not in raw.reduce_axes) == 0:
            continue
        for stage, item in enumerate(_split(bodies.normalise(bodies.with_axes(raw)), tables)):
            while len(stages) <= stage:
                stages.append([])
            stages[stage].append(item)
    out: list[Dispatch] = []
    for stage, items in enumerate(stages):
        for group in _fit(items, tables):
            out.append(_compile(group, tables, label + (f"_stage{stage}" if stage else "")))
    return out


def _fit(
    items: Sequence[tuple[LoopBody, Strategy | None]], tables: Tables
) -> list[list[tuple[LoopBody, Strategy | None]]]:
    groups: list[list[tuple[LoopBody, Strategy | None]]] = []
    used: set[int] = set()
    for item in items:
        reads, writes = bodies.buffers(item[0])
        mine = {tables.alias.get(b, b) for b in (*reads, *writes) if b not in tables.scalars}
        if groups and len(used | mine) <= tables.target.buffers:
            groups[-1].append(item)
            used |= mine
        else:
            groups.append([item])
            used = mine
    return groups


def _compile(items: Sequence[tuple[LoopBody, Strategy | None]], tables: Tables, label: str) -> Dispatch:
    shader = Shader(tables)
    plans = [(body, given or choose(body, tables)) for body, given in items]
    threads = max(plan.threads for _, plan in plans)
    plans = [
        (body, given if items[i][1] else choose(body, tables, threads))
        for i, (body, given) in enumerate(plans)
    ]
    for body, plan in plans:
        shader.bind_body(body, plan.axis if plan.width > 1 else None)
    calls: list[str] = []
    start = 0
    for i, (body, plan) in enumerate(plans):
        if plan.tile is not None:
            text, groups = tiled_body(shader, body, plan.tile, threads)
        else:
            text, groups = (_reduce_body if body.reduce_axes else _map_body)(shader, body, plan, threads)
        shader.functions.append(f"fn body{i}(wg: u32, li: u32) {{\n{text}}}\n")
        if len(plans) == 1:
            calls.append("body0(wg, li);\n")
        else:
            calls.append(
                f"{'else ' if i else ''}if (wg < {start + groups}u) {{ body{i}(wg - {start}u, li); }}\n"
            )
        start += groups
    grid, group_index = grid_of(start, tables.target.workgroups)
    guard = f"if (wg >= {start}u) {{ return; }}\n" if grid[1] * grid[0] != start else ""
    main = (
        f"@compute @workgroup_size({threads}) fn main(@builtin(workgroup_id) wid: vec3<u32>, "
        f"@builtin(local_invocation_index) li: u32) {{\nlet wg = {group_index};\n{guard}{''.join(calls)}}}\n"
    )
    return shader.dispatch(main, grid, label)


def grid_of(groups: int, limit: int) -> tuple[tuple[int, int, int], str]:
    """A grid of at least ``groups`` workgroups within the limit per dimension, and the linear workgroup number."""
    if groups <= limit:
        return (max(groups, 1), 1, 1), "wid.x"
    y = -(-groups // limit)
    x = -(-groups // y)
    return (x, y, 1), f"wid.y * {x}u + wid.x"


# ---------------------------------------------------------------------------------------------------- strategy
def _pow2(n: int) -> int:
    return 1 << max(0, (n - 1).bit_length())


def choose(body: LoopBody, tables: Tables, threads: int | None = None) -> Strategy:
    """The mapping of a body, by its sizes; ``threads`` fixes the workgroup size (several bodies in one dispatch)."""
    limit = min(256, tables.target.invocations)
    last = len(body.domain) - 1
    if not body.reduce_axes:
        tile = tile_axis(body)
        if tile is not None and usable(threads or min(256, limit)):
            return Strategy(threads or min(256, limit), tile=tile)
        wide = last >= 0 and bodies.vector_gain(body, last) > 0 and len(body.instrs) <= 400
        total = prod(body.domain) // (4 if wide else 1)
        return Strategy(
            threads or (limit if total > 64 * limit else 64),
            axis=last if wide else None,
            width=4 if wide else 1,
        )
    parallel = [a for a in range(len(body.domain)) if a not in body.reduce_axes]
    size = prod(body.domain[a] for a in parallel)
    length = prod(body.domain[a] for a in body.reduce_axes)
    inner_reduce = max(body.reduce_axes)
    inner_parallel = max((a for a in parallel if body.domain[a] > 1), default=None)
    row_score = column_score = 0.0
    for instr in body.instrs:
        if instr.op in ("load", "store") and set(instr.axes) | set(_varies(instr)):
            strides = instr.attrs["access"].strides
            if set(_varies(instr)) & set(body.reduce_axes):
                elements = prod(body.domain[a] for a in _varies(instr))  # a vector per row weighs little
                row_score += elements if strides[inner_reduce] == 1 else 0
                column_score += elements if inner_parallel is not None and strides[inner_parallel] == 1 else 0
    if column_score > row_score and inner_parallel is not None:
        return _column(body, size, length, inner_parallel, threads or limit, tables)
    return _row(body, size, length, inner_reduce, threads, limit)


def _varies(instr: Instr) -> tuple[int, ...]:
    return tuple(a for a, s in enumerate(instr.attrs["access"].strides) if s)


def _sweeps(body: LoopBody) -> int:
    full = bodies.full_level(body)
    levels = bodies.levels(body)
    reduces = max((levels[p] for p, i in enumerate(body.instrs) if i.op == "reduce"), default=0)
    stores = any(full[p] or _stores_full(body, i) for p, i in enumerate(body.instrs) if i.op == "store")
    return reduces + (1 if stores else 0)


def _stores_full(body: LoopBody, instr: Instr) -> bool:
    return any(instr.attrs["access"].strides[a] for a in body.reduce_axes)


def _row(body: LoopBody, size: int, length: int, axis: int, threads: int | None, limit: int) -> Strategy:
    wide = bodies.vector_gain(body, axis) > 0
    units = max(1, length // 4 if wide else length)
    ceiling = threads or limit
    lanes = min(ceiling, _pow2(-(-units // 4)))
    while size * lanes < 1 << 16 and lanes < min(ceiling, _pow2(units)):
        lanes *= 2
    if _sweeps(body) > 1:
        while units / lanes > _UNROLL and lanes < ceiling:
            lanes *= 2
    group = threads or max(lanes, min(limit, 128) if size * lanes >= 128 else 64)
    points = max(1, group // lanes)
    chunks = -(-units // lanes)
    keep = _sweeps(body) > 1 and chunks <= _UNROLL
    return Strategy(
        points * lanes if threads is None else threads,
        points,
        lanes,
        True,
        axis if wide else None,
        4 if wide else 1,
        chunks if keep else 0,
    )


def _column(body: LoopBody, size: int, length: int, axis: int, group: int, tables: Tables) -> Strategy:
    reduces = sum(i.op == "reduce" for i in body.instrs)
    wide = bodies.vector_gain(body, axis) > 0 and size >= 4 * 32 * 64
    if wide and reduces * group * 16 > min(tables.target.workgroup_memory, 16384):
        wide = False
    units = size // 4 if wide else size
    if length <= 16 and units >= 64:
        points, lanes = group, 1
    else:
        points = min(32, _pow2(units))
        lanes = group // points
        while lanes > 1 and lanes > _pow2(length):
            lanes //= 2
            points *= 2
    return Strategy(group, points, lanes, False, axis if wide else None, 4 if wide else 1, 0)


# ---------------------------------------------------------------------------------------------------- bodies
def _map_body(shader: Shader, body: LoopBody, plan: Strategy, threads: int) -> tuple[str, int]:
    sizes = list(body.domain)
    if plan.axis is not None:
        sizes[plan.axis] //= 4
    total = prod(sizes)
    out = [f"let t = wg * {threads}u + li;\nif (t >= {total}u) {{ return; }}\n"]
    index, quarter = _indices(shader, "t", sizes, plan, out)
    emitter = Emitter(shader, body, index, axis=plan.axis, width=plan.width, quarter=quarter)
    for position, instr in enumerate(body.instrs):
        if instr.op == "store":
            emitter.store(position)
        else:
            emitter.emit(position)
    return "".join(out) + emitter.take(), -(-total // threads)


def _indices(
    shader: Shader,
    linear: str,
    sizes: Sequence[int],
    plan: Strategy,
    out: list[str],
    axes: Sequence[int] | None = None,
) -> tuple[list[str], str]:
    names = decompose(shader, linear, sizes, out)
    quarter = ""
    for n, name in enumerate(names):
        if plan.axis is not None and (axes[n] if axes is not None else n) == plan.axis:
            quarter = name
            full = shader.name("i")
            out.append(f"let {full} = {name} * 4u;\n")
            names[n] = full
    return names, quarter


def _reduce_body(shader: Shader, body: LoopBody, plan: Strategy, threads: int) -> tuple[str, int]:
    plan = replace(plan, threads=threads)
    parallel = [a for a in range(len(body.domain)) if a not in body.reduce_axes]
    reduced = list(body.reduce_axes)
    psizes = [body.domain[a] // (4 if a == plan.axis else 1) for a in parallel]
    rsizes = [body.domain[a] // (4 if a == plan.axis else 1) for a in reduced]
    total, length = prod(psizes), prod(rsizes)
    active = plan.points * plan.lanes
    out: list[str] = []
    if plan.rows:
        out.append(f"let pt = wg * {plan.points}u + li / {plan.lanes}u;\nlet lane = li % {plan.lanes}u;\n")
    else:
        out.append(f"let pt = wg * {plan.points}u + li % {plan.points}u;\nlet lane = li / {plan.points}u;\n")
    inside = f"pt < {total}u" + (f" && li < {active}u" if active < threads else "")
    if active < threads:
        out.append(f"let ok = {inside};\nlet p = min(pt, {total - 1}u);\n")
    else:
        exact = total % plan.points == 0
        out.append("let p = pt;\n" if exact else f"let ok = {inside};\nlet p = min(pt, {total - 1}u);\n")
        inside = "" if exact else "ok"
    if active < threads:
        inside = "ok"
    index: list[str] = [""] * len(body.domain)
    names, quarter = _indices(shader, "p", psizes, plan, out, parallel)
    for a, name in zip(parallel, names):
        index[a] = name
    emitter = Emitter(shader, body, index, axis=plan.axis, width=plan.width, quarter=quarter)
    levels, full = bodies.levels(body), bodies.full_level(body)
    full = [f or (i.op == "store" and _stores_full(body, i)) for f, i in zip(full, body.instrs)]
    rounds = max((levels[p] for p, i in enumerate(body.instrs) if i.op == "reduce"), default=0)
    chunk_values: list[dict[int, list[str]]] = [{} for _ in range(plan.chunks)]
    chunk_index: list[tuple[list[str], str, str, str]] = []
    for c in range(plan.chunks):
        unit = f"(lane + {c * plan.lanes}u)" if c else "lane"
        tail = (c + 1) * plan.lanes > length
        name = shader.name("e")
        out.append(f"let {name} = {f'min({unit}, {length - 1}u)' if tail else unit};\n")
        rnames, rquarter = _indices(shader, name, rsizes, plan, out, reduced)
        valid = f"{unit} < {length}u" if tail else ""
        chunk_index.append((rnames, rquarter, valid, name))

    def row_values(limit: int) -> None:
        for q, instr in enumerate(body.instrs):
            if (
                not full[q]
                and instr.op not in ("reduce", "store")
                and levels[q] <= limit
                and q not in emitter.values
            ):
                emitter.emit(q)

    def needed(targets: Sequence[int]) -> list[int]:
        seen: set[int] = set()
        stack = [p for t in targets for p in bodies.operands(body.instrs[t])]
        while stack:
            p = stack.pop()
            if p in seen or not full[p]:
                continue
            seen.add(p)
            stack.extend(bodies.operands(body.instrs[p]))
        return sorted(seen)

    stores = [p for p, i in enumerate(body.instrs) if i.op == "store"]
    for sweep in range(rounds + 1):
        row_values(sweep)
        reduces = [p for p, i in enumerate(body.instrs) if i.op == "reduce" and levels[p] == sweep + 1]
        if plan.chunks:  # values stay in registers, so results may be stored as soon as they are known
            ready = [p for p in stores if full[p] and levels[p] == sweep]
        else:
            ready = [p for p in stores if full[p]] if sweep == rounds else []
        out.append(emitter.take())
        sums = Reductions(shader, body, plan, reduces, emitter)
        out.append(sums.declare())
        work = needed([*reduces, *ready])
        outer = set(emitter.values)
        if reduces or ready:
            if plan.chunks:
                for c in range(plan.chunks):
                    _enter(emitter, reduced, chunk_index[c], plan, quarter)
                    emitter.prefix = f"v{c}_"
                    emitter.values.update(chunk_values[c])
                    for q in work:
                        emitter.emit(q)
                    chunk_values[c] = {q: v for q, v in emitter.values.items() if full[q]}
                    valid = chunk_index[c][2]
                    linear = f"i32({chunk_index[c][3]}{' * 4u' if plan.axis in reduced else ''})"
                    emitter.lines.append(sums.accumulate(linear, valid))
                    for q in ready:
                        emitter.store(q, " && ".join(g for g in (inside, valid) if g))
                    emitter.forget(outer)
                emitter.prefix = "v"
            else:
                start, end = "lane", f"{length}u"
                if plan.split > 1:
                    span = -(-length // plan.split)
                    start, end = (
                        f"{index[0]} * {span}u + lane",
                        f"min({index[0]} * {span}u + {span}u, {length}u)",
                    )
                e = shader.name("e")
                inner: list[str] = []
                rnames, rquarter = _indices(shader, e, rsizes, plan, inner, reduced)
                _enter(emitter, reduced, (rnames, rquarter, "", e), plan, quarter)
                emitter.lines.append(
                    f"for (var {e} = {start}; {e} < {end}; {e} += {plan.lanes}u) {{\n{''.join(inner)}"
                )
                for q in work:
                    emitter.emit(q)
                linear = f"i32({e}{' * 4u' if plan.axis in reduced else ''})"
                emitter.lines.append(sums.accumulate(linear, ""))
                for q in ready:
                    emitter.store(q, inside)
                emitter.lines.append("}\n")
                emitter.forget(outer)
        out.append(emitter.take())
        out.append(sums.combine(sweep == 0))
        sums.publish()
    row_values(rounds)
    first = "lane == 0u" if plan.lanes > 1 else ""
    for p in stores:
        if not full[p]:
            emitter.store(p, " && ".join(g for g in (inside, first) if g))
    out.append(emitter.take())
    return "".join(out), -(-total // plan.points)


def _enter(
    emitter: Emitter,
    reduced: Sequence[int],
    where: tuple[list[str], str, str, str],
    plan: Strategy,
    quarter: str,
) -> None:
    for a, name in zip(reduced, where[0]):
        emitter.index[a] = name
    emitter.quarter = where[1] if plan.axis in reduced else quarter


# ---------------------------------------------------------------------------------------------------- stages
def _split(body: LoopBody, tables: Tables) -> list[tuple[LoopBody, Strategy | None]]:
    """One stage, or several when few points share a long reduction: partial sums, their sum, then the rest."""
    if not body.reduce_axes:
        return [(body, None)]
    size = prod(body.domain[a] for a in range(len(body.domain)) if a not in body.reduce_axes)
    length = prod(body.domain[a] for a in body.reduce_axes)
    plan = choose(body, tables)
    groups = -(-size // (plan.points * plan.width if plan.axis not in body.reduce_axes else plan.points))
    per_thread = length // (plan.lanes * (plan.width if plan.axis in body.reduce_axes else 1))
    if groups >= 128 or per_thread < 16 or (_sweeps(body) > 1 and length <= 32768):
        return [(body, None)]
    parts = max(2, min(512 // groups, per_thread // 4, 512))
    return _bound(body, tables, parts)


def _bound(body: LoopBody, tables: Tables, parts: int) -> list[tuple[LoopBody, Strategy | None]]:
    """The stages of a body, half of its stores at a time if their scratch buffers do not fit in the bindings of a stage."""

    def bindings(b: LoopBody) -> set[int]:
        reads, writes = bodies.buffers(b)
        return {tables.alias.get(x, x) for x in (*reads, *writes) if x not in tables.scalars}

    stages = _stages(body, tables, parts)
    if all(len(bindings(b)) <= tables.target.buffers for b, _ in stages):
        return stages
    reads, writes = bodies.buffers(body)
    in_place = {tables.alias.get(b, b) for b in reads} & {tables.alias.get(b, b) for b in writes}
    stores = [p for p, i in enumerate(body.instrs) if i.op == "store"]
    if in_place or len(stores) < 2:
        return [(body, None)]  # slower, but within the bindings that the lowering counted
    half = len(stores) // 2
    first, second = (
        _bound(bodies.only(body, part), tables, parts) for part in (stores[:half], stores[half:])
    )
    return [*first, *second]


def _stages(body: LoopBody, tables: Tables, parts: int) -> list[tuple[LoopBody, Strategy | None]]:
    from tracejit_wgpu.stages import final_body, partial_body, sum_body

    out: list[tuple[LoopBody, Strategy | None]] = []
    rounds = max(bodies.levels(body)[p] for p, i in enumerate(body.instrs) if i.op == "reduce")
    done: dict[int, int] = {}  # reduce position -> scratch buffer with its result
    for level in range(1, rounds + 1):
        partial, where = partial_body(body, level, parts, done, tables)
        plan = replace(choose(partial, tables), chunks=0, split=parts)
        out.append((partial, plan))
        last = level == rounds
        summed = sum_body(
            body, level, parts, where, done, tables, finish=last and _sweeps(body) == rounds and rounds == 1
        )
        out.append((bodies.normalise(summed), None))
    if _sweeps(body) > rounds or rounds > 1:
        out.extend((bodies.normalise(b), None) for b in final_body(body, done))
    return out
