"""The strip at the bottom: one lane per device queue, dispatch ticks, the memory curve with its peak, the playhead.

Two prepared pictures (bright for the past, dim for the future) are cut at the playhead each frame. Called by ``window``.
"""

from __future__ import annotations

import math

import numpy as np
import pygame

from ..history import Session, Step
from ..labels import bytes_text, node_label
from ..ui import UiState
from .canvas import Canvas, glow_disc
from .text import MONO, REGULAR, SEMIBOLD, UI, Fonts
from .theme import ACCENT, CATEGORY, FAINT, LINE, MUTED, PANEL, TEXT, WHITE, category, mix

LEFT, RIGHT = 92, 20


class Timeline:
    """Draws one step and maps between pixels and time."""

    def __init__(self, fonts: Fonts) -> None:
        self.fonts = fonts
        self._key: object = None
        self._past: pygame.Surface | None = None
        self._future: pygame.Surface | None = None
        self.rect = pygame.Rect(0, 0, 0, 0)
        self.span = 1.0
        self._lane_rows: dict[int, int] = {}
        self._marks = pygame.Rect(0, 0, 0, 0)  # where the playhead and the running kernels were drawn

    def x_of(self, t: float) -> float:
        """Pixel (within the window) of a time in ns."""
        return self.rect.x + LEFT + (self.rect.w - LEFT - RIGHT) * min(1.0, max(0.0, t / self.span))

    def t_of(self, x: float) -> float:
        """Time in ns of a pixel."""
        return min(1.0, max(0.0, (x - self.rect.x - LEFT) / max(1, self.rect.w - LEFT - RIGHT))) * self.span

    def draw(
        self,
        screen: pygame.Surface,
        rect: tuple[int, int, int, int],
        ui: UiState,
        clock: float,
        *,
        kept: bool = False,
    ) -> pygame.Rect:
        """Blit the strip with the playhead at ``ui.t``; with ``kept`` only what moves. Returns the part drawn."""
        self.rect = pygame.Rect(rect)
        if rect[3] <= 0:
            return self.rect
        s, step = ui.session, ui.step
        key = (rect, id(s), id(step), step.step if step else -1)
        if key != self._key or self._past is None or self._future is None:
            self._key, kept = key, False
            if s is None or step is None or not len(step.kernels):
                self._past = self._future = self._empty(rect, s, step)
            else:
                self.span = float(max(1, step.duration))
                self._past = self._paint(rect, s, step, True)
                self._future = self._paint(rect, s, step, False)
        if s is None or step is None or not len(step.kernels):
            screen.blit(self._past, self.rect.topleft)
            return self.rect
        x = round(self.x_of(ui.t)) - self.rect.x
        running = np.flatnonzero((step.start <= ui.t) & (ui.t < step.end))[:16]
        ends = [self.rect.x + x - 17, self.rect.x + x + 17]
        ends += [round(self.x_of(float(t))) for k in running for t in (step.start[k], step.end[k])]
        marks = pygame.Rect(min(ends), self.rect.y, max(ends) - min(ends) + 3, self.rect.h)
        part = marks.union(self._marks).clip(self.rect) if kept else self.rect
        self._marks = marks
        screen.set_clip(part)
        screen.blit(self._past, self.rect.topleft, (0, 0, x, rect[3]))
        screen.blit(self._future, (self.rect.x + x, self.rect.y), (x, 0, rect[2] - x, rect[3]))
        self._now(screen, s, step, running)
        px = self.rect.x + x
        top = self.rect.y
        glow = glow_disc(16, mix((0, 0, 0), ACCENT, 0.6))
        screen.blit(glow, (px - 16, top + 8), special_flags=pygame.BLEND_RGB_ADD)
        screen.fill(ACCENT, (px - 1, top + 24, 2, rect[3] - 32))
        pygame.draw.polygon(screen, ACCENT, [(px - 7, top + 19), (px + 7, top + 19), (px, top + 30)])
        pygame.draw.aalines(screen, ACCENT, True, [(px - 7, top + 19), (px + 7, top + 19), (px, top + 30)])
        screen.set_clip(None)
        return part

    def _now(self, screen: pygame.Surface, s: Session, step: Step, running: np.ndarray) -> None:
        """Brighten the kernels that run at the playhead."""
        for k in running:
            slot = s.slot.get(int(step.kernels[k]))
            if slot is None:
                continue
            x0, x1 = self.x_of(float(step.start[k])), self.x_of(float(step.end[k]))
            color = mix(category(kernel_category(s, slot)), WHITE, 0.45)
            y = self.rect.y + self._lane_y(int(step.lane[k]))
            pygame.draw.rect(screen, color, (round(x0), y, max(2, round(x1 - x0)), 20), border_radius=3)

    def _empty(self, rect: tuple[int, int, int, int], s: Session | None, step: Step | None) -> pygame.Surface:
        c = Canvas(rect[2], rect[3], self.fonts, background=PANEL)
        c.rect((0, 0, rect[2], 1), LINE)
        text = (
            "waiting for the first step"
            if s is not None and s.kernels
            else "a static graph: no step was recorded"
        )
        if step is not None and step.nan_node is not None:
            text = "checked node by node: the step stopped at its first NaN or Inf"
        c.text(self.fonts.fit(text, 13, rect[2] - 20), (rect[2] / 2, rect[3] / 2), 13, FAINT, anchor="cc")
        return c.finish()

    def _lane_y(self, lane: int) -> int:
        return 34 + self._lane_rows.get(lane, 0) * 24

    def _paint(self, rect: tuple[int, int, int, int], s: Session, step: Step, past: bool) -> pygame.Surface:
        w, h = rect[2], rect[3]
        c = Canvas(w, h, self.fonts, background=PANEL)
        c.rect((0, 0, w, 1), LINE)
        lanes = sorted({int(v) for v in step.lane})
        self._lane_rows = {lane: min(i, 2) for i, lane in enumerate(lanes)}
        rows = min(3, len(lanes))
        base = self.rect.x
        small = h < 150
        self._axis(c, w, h)
        for lane in lanes[:3]:
            name = s.device if len(lanes) == 1 else f"{s.device} · {lane}"
            c.text(
                self.fonts.fit(name, 11, LEFT - 22, UI, SEMIBOLD),
                (18, self._lane_y(lane) + 10),
                11.5,
                MUTED,
                weight=SEMIBOLD,
            )
        self._bars(c, s, step, past, base)
        if small:
            return c.finish()
        tick_y = 34 + rows * 24 + 14
        c.text("dispatch", (18, tick_y), 11.5, MUTED, weight=SEMIBOLD)
        color = mix(PANEL, TEXT, 0.5 if past else 0.15)
        seen = -9.0
        for t in np.sort(step.start):
            x = self.x_of(float(t)) - base
            if x - seen >= 1.2:
                c.rect((x - 0.8, tick_y - 5, 1.6, 10), color)
                seen = x
        self._memory(c, step, past, base, tick_y + 20, h - 12)
        return c.finish()

    def _axis(self, c: Canvas, w: int, h: int) -> None:
        room = w - LEFT - RIGHT
        target = self.span * 1e-9 / max(2, room / 130)
        mag = 10 ** math.floor(math.log10(max(target, 1e-12)))
        tick = next(m * mag for m in (1, 2, 5, 10) if m * mag >= target)
        n = 0
        while n * tick <= self.span * 1e-9 * 1.0001:
            x = LEFT + room * (n * tick / (self.span * 1e-9))
            c.rect((x, 26, 1, h - 36), (31, 37, 51))
            if x < w - 50:
                c.text(_tick_text(n * tick, tick), (x + 5, 15), 10, FAINT, MONO, REGULAR)
            n += 1

    def _bars(self, c: Canvas, s: Session, step: Step, past: bool, base: int) -> None:
        order = np.argsort(step.end - step.start)  # long ones last, on top
        for k in order:
            slot = s.slot.get(int(step.kernels[k]))
            if slot is None:
                continue
            x0, x1 = self.x_of(float(step.start[k])) - base, self.x_of(float(step.end[k])) - base
            color = category(kernel_category(s, slot))
            fill = mix(PANEL, color, 0.82 if past else 0.25)
            y = self._lane_y(int(step.lane[k]))
            width = max(1.0, x1 - x0 - (1.0 if x1 - x0 > 3 else 0.0))
            c.rect((x0, y, width, 20), fill, 3 if width > 5 else 0)
            if width > 44:
                text = self.fonts.fit(kernel_label(s, slot), 10, width - 8, UI, SEMIBOLD)
                if len(text) > 2:
                    c.text(
                        text,
                        (x0 + 5, y + 10),
                        10,
                        mix(fill, (8, 10, 14), 0.86) if past else FAINT,
                        weight=SEMIBOLD,
                    )

    def _memory(self, c: Canvas, step: Step, past: bool, base: int, top: float, bottom: float) -> None:
        c.text("memory", (18, (top + bottom) / 2 + 4), 11.5, MUTED, weight=SEMIBOLD)
        live = step.live.astype(float)
        peak = float(live.max()) if len(live) else 0.0
        if peak <= 0:
            c.text("not reported", (LEFT, (top + bottom) / 2 + 4), 10, FAINT, MONO, REGULAR)
            return
        order = np.argsort(step.start, kind="stable")
        room = max(8.0, bottom - top - 12)
        xs = [self.x_of(float(step.start[k])) - base for k in order]
        ys = [bottom - room * live[k] / peak for k in order]
        if len(xs) > 1500:
            pick = np.linspace(0, len(xs) - 1, 1500).astype(int)
            pick = np.unique(np.append(pick, int(np.argmin(ys))))
            xs, ys = [xs[i] for i in pick], [ys[i] for i in pick]
        pts = [(xs[0], ys[0])]
        for (_, y0), x, y in zip(zip(xs, ys), xs[1:], ys[1:]):
            pts += [(x, y0), (x, y)]
        end = self.x_of(float(step.end[order[-1]])) - base
        pts.append((end, pts[-1][1]))
        strength = 0.34 if past else 0.12
        c.poly([*pts, (end, bottom), (pts[0][0], bottom)], mix(PANEL, CATEGORY["norm"], strength))
        c.line(pts, mix(PANEL, CATEGORY["norm"], strength * 2.2), 1.4)
        at = self.x_of(float(step.start[int(np.argmax(live))])) - base
        text = f"peak {bytes_text(peak)}"
        half = self.fonts.width(text, 10, MONO, REGULAR) / 2
        at = min(max(at, LEFT + half), c.w - RIGHT - half)
        c.text(text, (at, bottom - room - 8), 10, CATEGORY["norm"], MONO, REGULAR, "cc")


def _tick_text(value: float, tick: float) -> str:
    for scale, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"), (1e-9, "ns")):
        if tick >= scale * 0.09 or unit == "ns":
            digits = max(0, -math.floor(math.log10(tick / scale) + 1e-9))
            return f"{value / scale:.{digits}f} {unit}"
    return ""


def kernel_category(s: Session, slot: int) -> str:
    """The colour of a kernel: of its heaviest kind of node."""
    nodes = s.model.nodes
    rank = {"contraction": 5, "loss": 4, "norm": 3, "gather": 3, "reduction": 2, "activation": 1}
    best, score = "elementwise", -1
    for v in s.kernels[slot].nodes:
        cat = nodes[v].category
        r = rank.get(cat, 0)
        if r > score:
            best, score = cat, r
    return best


def kernel_label(s: Session, slot: int) -> str:
    """A short name: the op of its most telling node."""
    k = s.kernels[slot]
    cat = kernel_category(s, slot)
    for v in k.nodes:
        n = s.model.nodes[v]
        if n.category == cat:
            label = node_label(n)
            return label if n.phase != "gradient" else f"{label}′"
    return k.name
