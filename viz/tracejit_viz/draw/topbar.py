"""The top bar: name, Forward / Gradient / Both, transport, speed, search, loss curve and numbers. Called by ``window``."""

from __future__ import annotations

import math

import numpy as np
import pygame

from ..labels import count_text, number_text, time_text
from ..ui import SPEEDS, Action, UiState, speed_text
from .canvas import Canvas
from .text import BOLD, MEDIUM, MONO, REGULAR, SEMIBOLD, UI, Fonts
from .theme import ACCENT, CARD, CATEGORY, FAINT, GOOD, LINE, MUTED, PANEL, TEXT, WARM, mix

Zone = tuple[pygame.Rect, Action]
REFRESH, CALM_REFRESH = 0.25, 2.5  # seconds between looks at the numbers of a running program

NUMBERS = 290.0  # pixels for loss, step and step time beside the badge of a held program


class TopBar:
    """Draws the bar and remembers where its buttons are."""

    def __init__(self, fonts: Fonts) -> None:
        self.fonts = fonts
        self.zones: list[Zone] = []
        self._key: object = None
        self._news = -1
        self._painted = 0.0
        self._picture: pygame.Surface | None = None
        self.slider = pygame.Rect(0, 0, 0, 0)

    def draw(
        self,
        screen: pygame.Surface,
        rect: tuple[int, int, int, int],
        ui: UiState,
        clock: float,
        *,
        calm: bool = False,
        kept: bool = False,
    ) -> bool:
        """Blit the bar, redrawing it when something it shows changed (``calm``: not so often).

        ``kept`` says that it is still on ``screen``. False when there was nothing to do.
        """
        if rect[3] <= 0:
            self.zones = []
            return False
        s = ui.session
        key = (
            rect,
            id(s),
            ui.show,
            ui.playing,
            ui.speed,
            ui.query,
            ui.typing and int(clock * 2) % 2,
            len(ui.matches),
            ui.match,
            ui.step.step if ui.step else -1,
            ui.follow,
            ui.live,
            ui.program,
            ui.programs,
            ui.steps_total,
            ui.held,
            ui.held_step,
            ui.held_name,
        )
        news = s.revision if s else 0
        pause = CALM_REFRESH if calm else REFRESH
        late = news != self._news and not 0 <= clock - self._painted < pause
        if key != self._key or late or self._picture is None:
            self._key, self._news, self._painted = key, news, clock
            self._picture = self._paint(rect, ui, clock)
        elif kept:
            return False
        screen.blit(self._picture, rect[:2])
        return True

    def _paint(self, rect: tuple[int, int, int, int], ui: UiState, clock: float) -> pygame.Surface:
        w, h = rect[2], rect[3]
        c = Canvas(w, h, self.fonts, background=PANEL)
        self.zones = []
        mid = h / 2
        c.rect((0, h - 1, w, 1), LINE)
        if h < 50:
            self._small(c, w, h, ui)
            return c.finish()
        c.circle((30, mid), 11, ACCENT, 2.4)
        c.circle((30, mid), 4, ACCENT)
        c.circle((41, mid - 11), 3.4, WARM)
        c.text("tracejit", (54, mid), 19, TEXT, weight=BOLD)
        x = 142.0
        right = float(w)
        s = ui.session
        segment = 3 * 86
        needed = segment + 16 + 130 + 190
        if w >= 900 and s is not None:
            room = max(0.0, min(250.0, w - 142 - needed - (250 if w > 1100 else 0)))
            name = self.fonts.fit(s.name, 13, room - 30, MONO, REGULAR)
            if name:
                nw = c.text(name, (x, mid + 1), 13, MUTED, MONO, REGULAR)
                if len(ui.programs) > 1:
                    tag = f"{ui.program + 1}/{len(ui.programs)}"
                    c.text(tag, (x + nw + 8, mid + 1), 10.5, ACCENT, MONO, SEMIBOLD)
                    self.zones.append((pygame.Rect(x, 10, nw + 40, h - 20), ("program", 1)))
                    nw += 30
                x += nw + 24
        elif w < 700:
            x = 142.0
        x = max(x, min(404.0, w * 0.21)) if w >= 1200 else x
        held = bool(ui.held or ui.held_name)  # its badge needs room: what has a key as well makes it
        if w >= (1100 if held else 620):
            self._segment(c, x, h, ui)
            x += segment + 36
        for j, name in enumerate(("prev", "play", "next")):
            cx = x + 15 + j * 40
            on = name == "play"
            c.circle((cx, mid), 15, ACCENT if on else CARD)
            if not on:
                c.circle((cx, mid), 15, LINE, 1)
            self._glyph(c, cx, mid, name, ui.playing)
            self.zones.append((pygame.Rect(cx - 17, mid - 17, 34, 34), (name, None)))
        x += 120
        if x + 180 < right and (w >= 1500 or not held):
            x = self._speed(c, x + 2, mid, ui)
        badge, room = self._badge_for(ui, w - x - NUMBERS)
        right = self._numbers(c, w, mid, ui, x, room or 190.0)
        if badge:
            self._badge(c, x + 22, mid, ui, badge)
        elif right - x > 150:
            self._search(c, x + 24, min(214.0, right - x - 48), mid, ui, clock)
        if len(self.zones) == 0:
            self.zones.append((pygame.Rect(0, 0, w, h), ("none", None)))
        return c.finish()

    def _small(self, c: Canvas, w: int, h: int, ui: UiState) -> None:
        mid = h / 2
        for j, name in enumerate(("prev", "play", "next")):
            cx = 20 + j * 32
            on = name == "play"
            c.circle((cx, mid), 12, ACCENT if on else CARD)
            self._glyph(c, cx, mid, name, ui.playing)
            self.zones.append((pygame.Rect(cx - 14, 2, 28, h - 4), (name, None)))
        s = ui.session
        if ui.held:
            text = self.fonts.fit(self._badge_text(ui, brief=True), 12, w - 130 - 70)
            c.text(text, (118, mid), 12, WARM, weight=SEMIBOLD)
            self.zones.append((pygame.Rect(112, 2, max(1, w - 190), h - 4), ("hold", None)))
        elif s is not None:
            text = self.fonts.fit(s.name, 12, w - 130 - 70, MONO, REGULAR)
            c.text(text, (118, mid), 12, MUTED, MONO, REGULAR)
        if s is not None and s.loss:
            c.text(number_text(s.loss[-1]), (w - 10, mid), 12, TEXT, MONO, BOLD, "rc")

    def _glyph(self, c: Canvas, cx: float, mid: float, name: str, playing: bool) -> None:
        if name == "play":
            if playing:
                c.rect((cx - 5, mid - 6, 3.5, 12), PANEL, 1)
                c.rect((cx + 1.5, mid - 6, 3.5, 12), PANEL, 1)
            else:
                c.poly([(cx - 4, mid - 7), (cx + 7, mid), (cx - 4, mid + 7)], PANEL)
            return
        d = 1 if name == "next" else -1
        c.poly([(cx - 4 * d, mid - 6), (cx + 3 * d, mid), (cx - 4 * d, mid + 6)], TEXT)
        c.rect((cx + (3.5 if d > 0 else -5.5), mid - 6, 2, 12), TEXT)

    def _segment(self, c: Canvas, x: float, h: int, ui: UiState) -> None:
        top = h / 2 - 15
        c.rect((x, top, 258, 30), CARD, 8)
        c.rect((x, top, 258, 30), LINE, 8, 1)
        for j, (name, text) in enumerate(
            (("forward", "Forward"), ("gradient", "Gradient"), ("both", "Both"))
        ):
            on = ui.show == name
            if on:
                c.rect((x + j * 86 + 3, top + 3, 80, 24), mix(CARD, ACCENT, 0.24), 6)
            c.text(
                text, (x + j * 86 + 43, h / 2), 12.5, ACCENT if on else MUTED, weight=SEMIBOLD, anchor="cc"
            )
            self.zones.append((pygame.Rect(x + j * 86, top, 86, 30), ("show", name)))

    def _speed(self, c: Canvas, x: float, mid: float, ui: UiState) -> float:
        w = 110.0
        lo, hi = math.log(SPEEDS[0]), math.log(SPEEDS[-1])
        f = (math.log(max(ui.speed, SPEEDS[0])) - lo) / (hi - lo)
        c.rect((x, mid - 2, w, 4), LINE, 2)
        c.rect((x, mid - 2, w * f, 4), ACCENT, 2)
        c.circle((x + w * f, mid), 6.5, TEXT)
        self.slider = pygame.Rect(x, mid - 12, w, 24)
        self.zones.append((pygame.Rect(x - 8, mid - 14, w + 16, 28), ("speed", None)))
        tw = c.text(speed_text(ui.speed), (x + w + 13, mid), 12, MUTED, MONO, REGULAR)
        return x + w + 13 + max(tw, 50)

    def speed_at(self, x: float) -> float:
        """The speed a point of the slider means."""
        lo, hi = math.log(SPEEDS[0]), math.log(SPEEDS[-1])
        f = min(1.0, max(0.0, (x - self.slider.x) / max(1, self.slider.w)))
        return min(SPEEDS, key=lambda s: abs(math.log(s) - (lo + f * (hi - lo))))

    def _search(self, c: Canvas, x: float, w: float, mid: float, ui: UiState, clock: float) -> None:
        c.rect((x, mid - 15, w, 30), CARD, 8)
        c.rect((x, mid - 15, w, 30), ACCENT if ui.typing else LINE, 8, 1)
        c.circle((x + 16, mid - 1), 5, MUTED, 1.6)
        c.line([(x + 20, mid + 3), (x + 24, mid + 7)], MUTED, 1.8)
        if ui.query or ui.typing:
            note = f"{ui.match + 1 if ui.matches else 0}/{len(ui.matches)}" if ui.query else ""
            text = self.fonts.fit(ui.query, 12.5, w - 50 - 8 * len(note))  # type: ignore[arg-type]
            tw = c.text(text, (x + 32, mid), 12.5, TEXT)
            if ui.typing and int(clock * 2) % 2:
                c.rect((x + 33 + (tw if text else 0), mid - 8, 1.4, 16), ACCENT)
            c.text(
                note, (x + w - 10, mid), 11, MUTED if ui.matches else CATEGORY["loss"], MONO, REGULAR, "rc"
            )
        else:
            c.text(self.fonts.fit("Search op, scope, shape…", 12, w - 66), (x + 32, mid), 12.5, FAINT)
            c.rect((x + w - 30, mid - 9, 20, 18), LINE, 4)
            c.text("/", (x + w - 20, mid), 11, MUTED, MONO, BOLD, "cc")
        self.zones.append((pygame.Rect(x, mid - 15, w, 30), ("search", None)))

    # -- stepping the program itself ---------------------------------------------------------------------------------
    def _badge_text(self, ui: UiState, *, brief: bool = False) -> str:
        if not ui.held:
            return f"{ui.held_name[:24]} is held" if ui.held_name else ""
        if ui.held == "asked":
            return "holding …" if brief else "program stops after this step …"
        what = f"at step {count_text(ui.held_step)}" if ui.held == "held" else "runs one step …"
        if brief:
            return f"held {what}" if ui.held == "held" else what
        return f"program held {what}" if ui.held == "held" else f"program {what}"

    def _badge_for(self, ui: UiState, room: float) -> tuple[list[tuple[str, str, Action]], float]:
        """The badge of a held program as (key, text, action), first its title; and its width. The longest that fits."""
        if not (ui.held or ui.held_name):
            return [], 0.0
        keys: list[tuple[str, str, Action]]
        keys = [("O", "one step", ("step", None)), ("B", "go on", ("hold", None))]
        if not ui.held:
            keys = [("Tab", "to it", ("program", 1))]
        brief = self._badge_text(ui, brief=True)
        forms = ((self._badge_text(ui), True), (brief, True), (brief, False), ("held", False))
        # Room that numbers lose to a shorter form rather than to a longer one.
        spared = (0.0, 100.0, NUMBERS, NUMBERS)
        for (title, words), more in zip(forms, spared):
            parts: list[tuple[str, str, Action]] = [("", title, ("none", None))]
            parts += [(key, text if words else "", action) for key, text, action in keys]
            width = 16.0 + sum(self._part_width(key, text) for key, text, _ in parts)
            if width + 30 <= room + more:
                break
        return parts, width + 30

    def _part_width(self, key: str, text: str) -> float:
        cap = self.fonts.width(key, 11, MONO, BOLD) + 18 if key else 0.0
        return cap + (self.fonts.width(text, 12, UI, SEMIBOLD) + 12 if text else 0.0)

    def _badge(
        self, c: Canvas, x: float, mid: float, ui: UiState, parts: list[tuple[str, str, Action]]
    ) -> None:
        width = 16.0 + sum(self._part_width(key, text) for key, text, _ in parts)
        c.rect((x, mid - 15, width, 30), mix(PANEL, WARM, 0.2), 8)
        c.rect((x, mid - 15, width, 30), WARM, 8, 1.2)
        x += 12
        for key, text, action in parts:
            whole, at = self._part_width(key, text), x
            if key:
                cap = self.fonts.width(key, 11, MONO, BOLD) + 12
                c.rect((x, mid - 9, cap, 18), mix(PANEL, WARM, 0.75), 4)
                c.text(key, (x + cap / 2, mid), 11, PANEL, MONO, BOLD, "cc")
                at += cap + 6
                self.zones.append((pygame.Rect(x - 3, mid - 14, whole, 28), action))
            if text:
                c.text(text, (at, mid), 12, WARM if not key else TEXT, weight=SEMIBOLD)
            x += whole

    def _numbers(self, c: Canvas, w: int, mid: float, ui: UiState, left: float, kept: float) -> float:
        """Loss curve and numbers from the right edge; returns where they begin. ``kept`` pixels after ``left`` stay free."""
        s = ui.session
        if s is None:
            return float(w)
        step = ui.step
        entries: list[tuple[str, str, int]] = []
        if s.loss:
            newest = ui.live and ui.follow
            at = s.loss[-1] if newest or step is None or step.loss is None else step.loss
            entries.append(("loss", number_text(at), 16))
        if step is not None:
            at_step = s.total_steps - 1 if ui.live and ui.follow else step.step
            entries.append(("step", count_text(at_step), 14))
            entries.append(("step time", time_text(s.step_seconds(step)), 14))
        if s.rate > 0 and not ui.held:
            entries.append(
                ("steps/s", f"{s.rate:,.0f}".replace(",", " ") if s.rate >= 100 else f"{s.rate:.3g}", 14)
            )
        widths = [max(84.0, self.fonts.width(value, px, MONO, BOLD) + 26.0) for _, value, px in entries]
        live = 66 if ui.live and not (s.ended or ui.held) else 0
        curve = 130 if len(s.loss) > 2 else 0  # worth more than the step rate
        while entries and w - 6 - sum(widths) - live - (curve if len(entries) > 3 else 0) < left + kept:
            entries.pop()  # the least important goes first
            widths.pop()
        x = float(w) - 6
        for (title, value, px), width in zip(reversed(entries), reversed(widths)):
            x -= width
            c.text(title, (x, mid - 9), 11, MUTED)
            c.text(value, (x, mid + 8), px, TEXT, MONO, BOLD)
        if ui.live and not s.ended and not ui.held:
            dot = GOOD if ui.follow else MUTED
            if x - 60 > left + kept:
                c.circle((x - 26, mid), 4, dot)
                c.text("LIVE", (x - 34, mid), 9.5, dot, weight=BOLD, anchor="rc")
                self.zones.append((pygame.Rect(x - 66, mid - 14, 52, 28), ("follow", None)))
                x -= 66
        room = min(204.0, x - left - kept - 20)
        if len(s.loss) > 2 and room >= 80:
            self._curve(c, x - room - 16, room, mid, s.loss)
            x -= room + 28
        return x

    def _curve(self, c: Canvas, x: float, w: float, mid: float, loss: list[float]) -> None:
        values = np.array(loss, float)
        values = values[np.isfinite(values)]
        if len(values) < 2:
            return
        if len(values) > 160:
            values = values[np.linspace(0, len(values) - 1, 160).astype(int)]
        lo, hi = float(values.min()), float(values.max())
        span = hi - lo or 1.0
        ys = mid + 19 - (values - lo) / span * 36
        xs = x + np.arange(len(values)) * (w / (len(values) - 1))
        pts = [(float(a), float(b)) for a, b in zip(xs, ys)]
        color = CATEGORY["loss"]
        c.poly([*pts, (x + w, mid + 21), (x, mid + 21)], mix(PANEL, color, 0.16))
        c.line(pts, color, 1.7)
        c.circle(pts[-1], 3.4, color)
        c.glow(pts[-1], 12, mix((0, 0, 0), color, 0.8))


__all__ = ["TopBar", "Zone", "MEDIUM", "UI"]
