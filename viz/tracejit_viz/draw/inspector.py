"""The side panel: everything about the selected card, or about the whole program when nothing is selected.

Times come from ``history``, explanations from the op table of the compile event. Called by ``window``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import pygame

from ..describe import ItemFacts, describe_item, program_facts
from ..history import NodeValues
from ..labels import count_text, number_text
from ..scene import Scene
from ..ui import Action, UiState
from .canvas import Canvas
from .cards import paint_card
from .text import BOLD, MEDIUM, MONO, REGULAR, SEMIBOLD, UI, Fonts
from .theme import (
    ACCENT,
    BAD,
    BG,
    CARD,
    FAINT,
    GOOD,
    LINE,
    MUTED,
    PANEL,
    TEXT,
    WARM,
    Color,
    category,
    heat,
    mix,
)

Zone = tuple[pygame.Rect, Action]
EDGE = 20
REFRESH, CALM_REFRESH = 0.7, 12.0  # seconds between looks at the numbers of a running program
TALLEST = 2400


class _Flow:
    """A cursor that writes rows down a canvas."""

    def __init__(self, c: Canvas, fonts: Fonts, w: int) -> None:
        self.c, self.fonts, self.w, self.y = c, fonts, w, 8.0
        self.zones: list[Zone] = []

    def heading(self, text: str) -> None:
        self.y += 15
        self.c.rect((EDGE, self.y, self.w - 2 * EDGE, 1), LINE)
        self.y += 17
        self.c.text(text.upper(), (EDGE, self.y), 10.5, FAINT, weight=BOLD)
        self.y += 6

    def row(self, name: str, value: str, color: Color = TEXT) -> None:
        self.y += 23
        used = self.c.text(name, (EDGE, self.y - 5), 12.5, MUTED)
        text = self.fonts.fit(value, 12, self.w - 2 * EDGE - used - 14, MONO, MEDIUM)
        self.c.text(text, (self.w - EDGE, self.y - 5), 12.5, color, MONO, MEDIUM, "rc")

    def paragraph(
        self, text: str, color: Color = MUTED, kind: str = UI, px: float = 12.5, lines: int = 6
    ) -> None:
        for line in wrap(text, self.fonts, round(px), self.w - 2 * EDGE, kind)[:lines]:
            self.y += px * 1.5
            self.c.text(line, (EDGE, self.y - 3), px, color, kind, REGULAR)

    def code(self, lines: Sequence[tuple[str, Color]]) -> None:
        self.y += 10
        self.c.rect((EDGE, self.y, self.w - 2 * EDGE, 8 + 19 * len(lines)), BG, 6)
        for text, color in lines:
            self.y += 19
            fitted = self.fonts.fit(text, 11, self.w - 2 * EDGE - 20, MONO, REGULAR)
            self.c.text(fitted, (EDGE + 10, self.y - 5), 11.5, color, MONO, REGULAR)
        self.y += 8

    def button(self, text: str, action: Action, color: Color = ACCENT) -> None:
        self.y += 8
        w = self.fonts.width(text, 11, UI, SEMIBOLD) + 24
        self.c.rect((EDGE, self.y, w, 24), mix(PANEL, color, 0.14), 7)
        self.c.rect((EDGE, self.y, w, 24), mix(PANEL, color, 0.4), 7, 1)
        self.c.text(text, (EDGE + w / 2, self.y + 12), 11.5, color, weight=SEMIBOLD, anchor="cc")
        self.zones.append((pygame.Rect(EDGE, self.y, w, 24), action))
        self.y += 24


def wrap(text: str, fonts: Fonts, px: int, room: float, kind: str = UI) -> list[str]:
    """Break a text into lines that fit."""
    out: list[str] = []
    for part in text.splitlines() or [""]:
        line = ""
        for word in part.split(" "):
            trial = f"{line} {word}" if line else word
            if line and fonts.width(trial, px, kind, REGULAR) > room:
                out.append(line)
                line = word
            else:
                line = trial
        out.append(fonts.fit(line, px, room, kind, REGULAR))
    return out


class Inspector:
    """Draws the panel; keeps the picture while nothing it shows changes."""

    def __init__(self, fonts: Fonts) -> None:
        self.fonts = fonts
        self.zones: list[Zone] = []
        self._key: object = None
        self._picture: pygame.Surface | None = None
        self._made: list[Zone] = []
        self._live: object = None
        self._painted = 0.0
        self._tall = 700  # of the picture: as much as the content needed last
        self.content_height = 0

    def draw(
        self,
        screen: pygame.Surface,
        rect: tuple[int, int, int, int],
        ui: UiState,
        scene: Scene | None,
        clock: float,
        map_height: int,
        *,
        calm: bool = False,
        kept: bool = False,
    ) -> bool:
        """Blit the panel into ``rect``, leaving ``map_height`` pixels at its foot for the minimap.

        ``calm``, ``kept`` and the answer are as in :meth:`TopBar.draw`.
        """
        if rect[2] <= 0:
            self.zones = []
            return False
        s = ui.session
        values = None
        if s is not None and scene is not None and ui.selected is not None and ui.selected < len(scene.items):
            values = s.values.get(scene.items[ui.selected].head)
        key = (
            rect[2],
            id(scene),
            scene.version if scene else 0,
            ui.selected,
            ui.second,
            ui.kernel,
            id(values),
            ui.path,
            len(s.wanted) if s else 0,
            ui.held and ui.held_step,  # a held program is shown as it stands
        )
        live = (s.revision if s else 0, id(ui.step))
        if (
            key != self._key
            or (live != self._live and not 0 <= clock - self._painted < (CALM_REFRESH if calm else REFRESH))
            or self._picture is None
        ):
            self._key, self._live, self._painted = key, live, clock
            self._picture = self._paint(rect[2], ui, scene, values)
        elif kept:
            return False
        self.zones = []
        room = pygame.Rect(rect[0], rect[1], rect[2], max(10, rect[3] - map_height))
        ui.scroll = max(0, min(ui.scroll, self.content_height - room.h + 10))
        screen.fill(PANEL, pygame.Rect(rect))
        screen.blit(self._picture, room.topleft, (0, ui.scroll, room.w, room.h))
        screen.fill(LINE, (rect[0], rect[1], 1, rect[3]))
        if self.content_height > room.h + 10:
            bar = max(24, room.h * room.h // self.content_height)
            at = room.y + (room.h - bar) * ui.scroll // max(1, self.content_height - room.h + 10)
            screen.fill(LINE, (room.right - 4, at, 3, bar))
        for r, action in self._made:
            moved = r.move(rect[0], rect[1] - ui.scroll)
            if room.colliderect(moved):
                self.zones.append((moved, action))
        return True

    def _paint(self, w: int, ui: UiState, scene: Scene | None, values: NodeValues | None) -> pygame.Surface:
        c = Canvas(w, self._tall, self.fonts, background=PANEL)
        f = _Flow(c, self.fonts, w)
        if scene is None or ui.session is None:
            f.y = 30
            c.text("No program yet", (EDGE, f.y), 17, TEXT, weight=BOLD)
            f.y += 14
            f.paragraph(ui.note or "Waiting for a trainer to connect.")
        elif ui.selected is None or ui.selected >= len(scene.items):
            self._program(f, ui, scene)
        else:
            self._item(f, ui, scene, describe_item(scene, ui.selected, ui.step), values)
        self._made = f.zones
        self.content_height = int(f.y + 24)
        if self.content_height > self._tall:
            self._tall = min(TALLEST, self.content_height + 40)
            if self.content_height <= TALLEST:
                return self._paint(w, ui, scene, values)
        return c.finish()

    # -- nothing selected --------------------------------------------------------------------------------------------
    def _program(self, f: _Flow, ui: UiState, scene: Scene) -> None:
        facts = program_facts(scene, ui.step)
        f.y = 30
        f.c.text(
            self.fonts.fit(facts.title, 18, f.w - 2 * EDGE, UI, BOLD), (EDGE, f.y), 19, TEXT, weight=BOLD
        )
        f.y += 26
        f.c.text(facts.subtitle, (EDGE, f.y), 12.5, MUTED)
        f.y += 6
        if ui.note:
            f.paragraph(ui.note, WARM)
        f.heading("program")
        for name, value in facts.rows:
            f.row(name, value)
        if facts.hottest:
            f.heading("where the time goes")
            top = facts.hottest[0][2]
            for slot, name, seconds, share in facts.hottest:
                f.y += 25
                f.c.rect(
                    (EDGE, f.y + 4, (f.w - 2 * EDGE) * (seconds / top if top else 0), 2.4),
                    heat(math.sqrt(share)),
                    1,
                )
                text = self.fonts.fit(name, 12, f.w - 2 * EDGE - 130, UI, MEDIUM)
                f.c.text(text, (EDGE, f.y - 7), 12.5, TEXT)
                f.c.text(
                    facts.time_of(seconds, share), (f.w - EDGE, f.y - 7), 11.5, MUTED, MONO, REGULAR, "rc"
                )
                f.zones.append((pygame.Rect(EDGE, f.y - 17, f.w - 2 * EDGE, 24), ("kernel", slot)))
                f.y += 2
        f.heading("how to look")
        f.paragraph(
            "Click a card to inspect it, hover for its edges. Space plays the step, ? lists all keys."
        )

    # -- a card ------------------------------------------------------------------------------------------------------
    def _item(self, f: _Flow, ui: UiState, scene: Scene, facts: ItemFacts, values: NodeValues | None) -> None:
        c, item = f.c, facts.item
        f.y = 30
        icon = (EDGE, f.y - 10, 26.0, 20.0)
        paint_card(c.surface, c.scale, icon, item, 0.62)
        title = self.fonts.fit(item.label, 18, f.w - EDGE - 56 - 70, UI, BOLD)
        c.text(title, (EDGE + 38, f.y), 19, TEXT, weight=BOLD)
        c.text(f"#{facts.node.id}", (f.w - EDGE, f.y), 13, FAINT, MONO, MEDIUM, "rc")
        f.y += 26
        c.text(self.fonts.fit(facts.where, 12, f.w - 2 * EDGE), (EDGE, f.y), 12.5, MUTED)
        f.y += 24
        x = float(EDGE)
        tags = [(item.category, category(item.category))] + [
            (t, ACCENT if i == 0 else category("activation")) for i, t in enumerate(facts.tags)
        ]
        for text, color in tags:
            tw = self.fonts.width(text, 11, UI, SEMIBOLD) + 20
            if x + tw > f.w - EDGE:
                break
            c.rect((x, f.y - 10, tw, 20), mix(PANEL, color, 0.18), 10)
            c.text(text, (x + tw / 2, f.y), 11, color, weight=SEMIBOLD, anchor="cc")
            x += tw + 7
        f.y += 14
        if facts.meaning or facts.formula:
            f.paragraph(facts.meaning, mix(MUTED, TEXT, 0.45))
            if facts.formula:
                f.code(
                    [
                        (line, TEXT)
                        for line in wrap(facts.formula, self.fonts, 11, f.w - 2 * EDGE - 20, MONO)[:4]
                    ]
                )
        if facts.here:
            f.paragraph(facts.here, MUTED)
        f.heading("tensor")
        for name, value in facts.tensor:
            f.row(name, value)
        if facts.timing:
            f.heading("time")
            for name, value in facts.timing:
                f.row(name, value, category("activation") if name == "share of step" else TEXT)
            if facts.kernel_note:
                f.paragraph(facts.kernel_note, FAINT, px=11.5)
            if facts.slots:
                f.button("show kernel code  C", ("code", facts.slots[-1]))
        self._values(f, ui, facts, values)
        if facts.source:
            f.heading("source")
            f.code([(text, ACCENT if i == 0 else TEXT) for i, text in enumerate(facts.source)])
        if facts.rules:
            f.heading("rules")
            for name, text in facts.rules:
                f.paragraph(name, FAINT, px=11.0)
                f.paragraph(text, TEXT, MONO, 11.5, lines=4)
        if facts.partners:
            f.heading(facts.partner_title)
            for index, text, state in facts.partners[:6]:
                f.y += 10
                warm = WARM if facts.partner_title == "gradient" else category("contraction")
                c.rect((EDGE, f.y, f.w - 2 * EDGE, 26), mix(PANEL, warm, 0.12), 6)
                c.text(text, (EDGE + 12, f.y + 13), 12.5, warm, weight=SEMIBOLD)
                c.text(state, (f.w - EDGE - 10, f.y + 13), 11.5, MUTED, MONO, REGULAR, "rc")
                f.zones.append((pygame.Rect(EDGE, f.y, f.w - 2 * EDGE, 26), ("select", index)))
                f.y += 24

    def _values(self, f: _Flow, ui: UiState, facts: ItemFacts, v: NodeValues | None) -> None:
        if facts.node.dtype == "tuple":
            return
        f.heading(f"values · step {count_text(v.step)}" if v else "values")
        if v is None:
            waiting = ui.session is not None and facts.node.id in ui.session.wanted
            if waiting:
                f.paragraph("asked: arriving with the next step …", ACCENT)
            elif ui.live:
                f.paragraph("Statistics and a histogram of this tensor at the next step.")
                f.button("ask for values  V", ("values", facts.node.id))
            else:
                f.paragraph("Only a running program can be asked for values.", FAINT)
            return
        c = f.c
        if v.histogram and max(v.histogram) > 0:
            f.y += 10
            top = max(math.log1p(b) for b in v.histogram)
            n = len(v.histogram)
            step = (f.w - 2 * EDGE) / n
            color = category(facts.item.category)
            for j, b in enumerate(v.histogram):
                h = 58 * math.log1p(b) / top
                c.rect(
                    (EDGE + j * step, f.y + 58 - h, max(1.0, step - 2), h + 1),
                    mix(CARD, color, 0.35 + 0.5 * h / 58),
                    2,
                )
            f.y += 64
            c.rect((EDGE, f.y, f.w - 2 * EDGE, 1), LINE)
            f.y += 11
            c.text(number_text(v.edges[0]), (EDGE, f.y), 10, FAINT, MONO, REGULAR)
            c.text("log-scale", (f.w / 2, f.y), 10, FAINT, MONO, REGULAR, "cc")
            c.text(number_text(v.edges[1]), (f.w - EDGE, f.y), 10, FAINT, MONO, REGULAR, "rc")
            f.y += 4
        st = v.stats
        f.row(
            "min  /  max", f"{number_text(st.get('min', math.nan))} / {number_text(st.get('max', math.nan))}"
        )
        f.row(
            "mean ± std", f"{number_text(st.get('mean', math.nan))} ± {number_text(st.get('std', math.nan))}"
        )
        bad = st.get("nan", 0) + st.get("inf", 0)
        zero = 100 * st.get("zero", 0) / max(1, st.get("size", 1))
        f.row(
            "NaN / Inf / zero",
            f"{st.get('nan', 0):.0f} / {st.get('inf', 0):.0f} / {zero:.1f} %",
            BAD if bad else GOOD,
        )
        if v.note:
            f.paragraph(v.note, FAINT, px=11.0)
        if v.image is not None:
            self._image(f, v)
        if ui.live:
            f.button("refresh  V", ("values", facts.node.id))

    def _image(self, f: _Flow, v: NodeValues) -> None:
        assert v.image is not None
        rows, cols = v.image.shape[:2]
        room = f.w - 2 * EDGE
        k = min(room / cols, 150 / rows)
        w, h = max(4, round(cols * k)), max(4, round(rows * k))
        data = v.image if v.image.ndim == 3 else v.image[..., None].repeat(3, 2)
        picture = pygame.image.frombuffer(data.astype("uint8").tobytes(), (cols, rows), "RGB")
        f.y += 12
        scale = f.c.scale
        big = pygame.transform.scale(picture, (w * scale, h * scale))
        f.c.rect((EDGE - 1, f.y - 1, w + 2, h + 2), LINE)
        f.c.surface.blit(big, (EDGE * scale, round(f.y * scale)))
        f.y += h + 4
