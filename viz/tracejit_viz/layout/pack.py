"""Stacking small columns and wrapping long pages so that the whole fits its window as large as possible.

Called by ``score``.
"""

from __future__ import annotations

from dataclasses import dataclass

from .compound import CompoundLayout

Path = tuple[str, ...]

CELL_PAD = 16.0
COLUMN_GAP = 32.0
STACK_GAP = 18.0
STAVE_GAP = 54.0
SYSTEM_GAP = 96.0


@dataclass(slots=True)
class Stack:
    """Consecutive columns drawn above each other."""

    columns: list[Path]
    width: float
    heights: dict[str, float]


def pack(
    columns: list[Path],
    solved: dict[tuple[Path, str], CompoundLayout],
    used: list[str],
    head: float,
    stave_gap: float,
    view: tuple[float, float],
    wide: dict[Path, CompoundLayout],
) -> tuple[list[list[Stack]], float]:
    """Stack small neighbours and wrap into systems so that the page, scaled to the view, is as large as possible.

    ``wide`` are cells (of the optimiser) that lie below all columns of a family; the first of these is made wide enough.
    """
    firsts = {f: next((c for c in columns if c[: len(f)] == f), None) for f in wide}
    least = {firsts[f]: wide[f].width for f in wide}
    low = max((cell.height + head + CELL_PAD for cell in wide.values()), default=0.0)

    def cell_height(c: Path, p: str) -> float:
        cell = solved.get((c, p))
        return cell.height + head + CELL_PAD if cell else 0.0

    def cell_width(c: Path) -> float:
        widest = max([least.get(c, 0.0), *(solved[c, p].width for p in used if (c, p) in solved)])
        return max(widest, len(" / ".join(c[1:] or c)) * head * 0.26) + 2 * CELL_PAD

    tall = {p: [cell_height(c, p) for c in columns] for p in used}
    heights = sorted({round(h) for p in used for h in tall[p] if h})
    top = {p: max(tall[p], default=0.0) for p in used}
    best: tuple[float, list[list[Stack]]] | None = None
    factors = [1.0, 1.15, 1.35, 1.6, 2.0, 2.5, 3.2] if len(heights) > 1 or len(columns) > 3 else [1.0, 2.0]
    for factor in factors:
        stacks: list[Stack] = []
        for c in columns:
            need = {p: cell_height(c, p) for p in used}
            last = stacks[-1] if stacks else None
            same = last is not None and (
                last.columns[-1][:1] == c[:1] if len(c) > 1 else len(last.columns[-1]) == 1
            )
            if last is not None and same:
                grown = {
                    p: last.heights[p] + (STACK_GAP if last.heights[p] and need[p] else 0) + need[p]
                    for p in used
                }
                if all(grown[p] <= top[p] * factor + 1e-6 for p in used):
                    last.columns.append(c)
                    last.width = max(last.width, cell_width(c))
                    last.heights = grown
                    continue
            stacks.append(Stack([c], cell_width(c), need))
        for s in stacks:
            if any(s.columns[0][: len(f)] == f for f in wide):
                s.heights["optimizer"] = max(s.heights["optimizer"], low)
        for rows in range(1, min(7, len(stacks)) + 1):
            systems = break_rows(stacks, rows)
            w = max(sum(s.width for s in sys) + COLUMN_GAP * (len(sys) - 1) for sys in systems)
            h = sum(
                sum(max(s.heights[p] for s in sys) for p in used) + stave_gap * len(used) for sys in systems
            )
            h += SYSTEM_GAP * (len(systems) - 1)
            scale = min(view[0] / (w + 60), view[1] / (h + 60)) * (0.93 ** (len(systems) - 1))
            if best is None or scale > best[0] * 1.02:
                best = (scale, systems)
    assert best is not None
    return best[1], best[0]


def break_rows(stacks: list[Stack], rows: int) -> list[list[Stack]]:
    """Cut a list of stacks into rows of about equal width, keeping the order."""
    total = sum(s.width + COLUMN_GAP for s in stacks)
    out: list[list[Stack]] = [[]]
    used = 0.0
    for s in stacks:
        middle = used + (s.width + COLUMN_GAP) / 2
        row = min(rows - 1, int(middle / total * rows))
        while len(out) <= row:
            out.append([])
        out[row].append(s)
        used += s.width + COLUMN_GAP
    return [r for r in out if r]
