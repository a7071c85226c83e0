"""What lies on top: hover card, keyboard sheet, kernel code, short messages, the legend line. Called by ``window``."""

from __future__ import annotations

import pygame

from ..describe import op_entry, source_lines
from ..labels import exact_bits, time_text, value_text
from ..scene import Scene
from ..ui import SHORTCUTS, UiState
from .canvas import Canvas, Sprites
from .inspector import wrap
from .text import BOLD, MEDIUM, MONO, REGULAR, SEMIBOLD, UI, Fonts
from .theme import ACCENT, BG, CARD, FAINT, LEGEND, LINE, MUTED, PANEL, TEXT, category, heat, mix


class Sheets:
    """The things on top of the graph."""

    def __init__(self, fonts: Fonts, sprites: Sprites) -> None:
        self.fonts, self.sprites = fonts, sprites
        self._hover_key: object = None
        self._hover: pygame.Surface | None = None
        self._legend_key: object = None
        self._legend: pygame.Surface | None = None

    # -- legend ------------------------------------------------------------------------------------------------------
    def legend(self, screen: pygame.Surface, rect: tuple[int, int, int, int], ui: UiState) -> None:
        """Colours of the categories (or the heat scale) and the most useful keys."""
        if rect[3] <= 0:
            return
        key = (rect[2:], ui.mode)
        if key != self._legend_key or self._legend is None:
            self._legend_key = key
            c = Canvas(rect[2], rect[3], self.fonts, background=BG)
            y, x = rect[3] / 2, 20.0
            if ui.mode == "op":
                for name in LEGEND:
                    if x + 24 + self.fonts.width(name, 11) > rect[2]:
                        break
                    c.circle((x + 4, y), 4, category(name))
                    x += 14 + c.text(name, (x + 13, y), 11, MUTED) + 18
            else:
                c.text(f"heat: {ui.mode}", (x, y), 11, TEXT, weight=SEMIBOLD)
                x += 96
                for j in range(80):
                    c.rect((x + j * 2, y - 4, 2.4, 8), heat(j / 79))
                c.text("least", (x - 6, y), 10, FAINT, anchor="rc")
                x += 166
                x += c.text("most", (x, y), 10, FAINT) + 20
            hint = "Space play   ← → step   F fit   G gradient   H heat   / search   P path   S screenshot   ? help"
            if rect[2] - x > self.fonts.width(hint, 11) + 20:
                c.text(hint, (rect[2] - 16, y), 11, FAINT, anchor="rc")
            self._legend = c.finish()
        screen.blit(self._legend, rect[:2])

    # -- hover card --------------------------------------------------------------------------------------------------
    def hover(
        self, screen: pygame.Surface, scene: Scene, item: int, mouse: tuple[int, int], view: pygame.Rect
    ) -> None:
        """Op, shape, dtype, exact constants, formula, meaning and source line beside the pointer."""
        key = (id(scene), scene.version, item, scene.session.revision // 30)
        if key != self._hover_key or self._hover is None:
            self._hover_key = key
            self._hover = self._paint_hover(scene, item)
        w, h = self._hover.get_size()
        x = mouse[0] + 18
        y = mouse[1] + 14
        if x + w > view.right - 6:
            x = mouse[0] - w - 14
        if y + h > view.bottom - 6:
            y = mouse[1] - h - 10
        screen.blit(self._hover, (max(view.x + 4, x), max(view.y + 4, y)))

    def _paint_hover(self, scene: Scene, index: int) -> pygame.Surface:
        item = scene.items[index]
        node = scene.model.nodes[item.head]
        entry = op_entry(scene, item)
        lines: list[tuple[str, int, tuple[int, int, int], str, int]] = []
        shape = f"{node.dtype}[{', '.join(map(str, node.shape))}]"
        lines.append((shape, 12, TEXT, MONO, REGULAR))
        root = scene.model.nodes[node.constant] if node.constant is not None else node
        if root.op == "const" and "value" in root.attrs:
            value = root.attrs["value"]
            lines.append(
                (
                    f"= {value_text(value, 20)}  {exact_bits(value, node.dtype)}".rstrip(),
                    12,
                    category("constant"),
                    MONO,
                    MEDIUM,
                )
            )
        elif node.name:
            lines.append((node.name, 12, category(node.category), MONO, REGULAR))
        if entry.get("formula"):
            for line in wrap(entry["formula"], self.fonts, 12, 330, MONO)[:2]:
                lines.append((line, 12, ACCENT, MONO, REGULAR))
        if entry.get("meaning"):
            for line in wrap(entry["meaning"], self.fonts, 12, 330)[:3]:
                lines.append((line, 12, MUTED, UI, REGULAR))
        elif item.kind == "group":
            lines.append((f"{len(item.nodes)} nodes, double-click to open", 12, MUTED, UI, REGULAR))
        for k, text in enumerate(source_lines(node.source)):
            lines.append((text, 11, FAINT if k == 0 else mix(MUTED, TEXT, 0.3), MONO, REGULAR))
        t = scene.session.timing(scene.session.slots_of(item.nodes))
        title_w = self.fonts.width(item.label, 15, UI, BOLD) + 30
        note = time_text(t.mean) if t else ""
        if note:
            title_w += self.fonts.width(note, 12, MONO, MEDIUM) + 20
        lines = [
            (self.fonts.fit(s, px, 360, kind, weight), px, color, kind, weight)
            for s, px, color, kind, weight in lines
        ]
        w = max([title_w, *(self.fonts.width(s, px, kind, weight) for s, px, _, kind, weight in lines)]) + 28
        h = 38 + 18 * len(lines) + 8
        c = Canvas(int(w), int(h), self.fonts, background=None)
        c.rect((0, 0, w, h), mix(PANEL, TEXT, 0.03), 9)
        c.rect((0.5, 0.5, w - 1, h - 1), mix(LINE, category(item.category), 0.45), 9, 1)
        c.circle((18, 20), 4.5, category(item.category))
        c.text(item.label, (30, 20), 15, TEXT, weight=BOLD)
        if note:
            c.text(note, (w - 14, 20), 12, MUTED, MONO, MEDIUM, "rc")
        y = 46.0
        for s, px, color, kind, weight in lines:
            c.text(s, (14, y), px, color, kind, weight)
            y += 18
        return c.finish()

    # -- sheets ------------------------------------------------------------------------------------------------------
    def help(self, screen: pygame.Surface) -> None:
        """The keyboard sheet."""
        sw, sh = screen.get_size()
        rows = len(SHORTCUTS)
        line = 26 if sh >= rows * 26 + 110 else max(13, (sh - 90) // rows)
        px = 13 if line >= 22 else 10
        w, h = min(620, sw - 12), min(rows * line + 86, sh - 8)
        sheet = self.sprites.get(("help", w, h, line), w, h, lambda c: self._paint_help(c, w, h, line, px))
        self._veil(screen)
        screen.blit(sheet, ((sw - w) // 2, (sh - h) // 2))

    def _paint_help(self, c: Canvas, w: int, h: int, line: int, px: int) -> None:
        c.rect((0, 0, w, h), PANEL, 14)
        c.rect((0.5, 0.5, w - 1, h - 1), LINE, 14, 1)
        c.text("Keyboard and mouse", (28, 34), 18 if px > 10 else 14, TEXT, weight=BOLD)
        keys = min(150, w * 0.28)
        for n, (key, text) in enumerate(SHORTCUTS):
            y = 66 + n * line + line / 2 - 6
            if y > h - 10:
                break
            c.text(key, (28, y), px, ACCENT, MONO, MEDIUM)
            c.text(self.fonts.fit(text, px, w - keys - 50), (28 + keys, y), px, TEXT)

    def code(self, screen: pygame.Surface, ui: UiState) -> None:
        """Generated code of a kernel, scrollable."""
        sw, sh = screen.get_size()
        w, h = min(1080, sw - 16), min(sh - 24, 860)
        x, y = (sw - w) // 2, (sh - h) // 2
        self._veil(screen)
        screen.blit(self.sprites.pill(w, h, PANEL, 14, LINE), (x - 1, y - 1))
        title = self.fonts.fit(ui.code_title, 15, w - 56, UI, BOLD)
        screen.blit(self.fonts.render(title, 15, TEXT, UI, BOLD), (x + 26, y + 20))
        lines = ui.code.expandtabs(4).splitlines() or [""]
        room = max(1, (h - 84) // 17)
        ui.code_scroll = max(0, min(ui.code_scroll, len(lines) - room))
        for n, text in enumerate(lines[ui.code_scroll : ui.code_scroll + room]):
            ty = y + 58 + n * 17
            number = self.fonts.render(str(ui.code_scroll + n + 1), 11, FAINT, MONO, REGULAR)
            screen.blit(number, (x + 56 - number.get_width(), ty))
            cut = self.fonts.fit(text[:240], 12, w - 92, MONO, REGULAR)
            if cut:
                screen.blit(self.fonts.render(cut, 12, code_color(text), MONO, REGULAR), (x + 68, ty))
        if len(lines) > room:
            bar = max(20, (h - 84) * room // len(lines))
            at = y + 58 + (h - 84 - bar) * ui.code_scroll // max(1, len(lines) - room)
            screen.fill(LINE, (x + w - 12, at, 4, bar))
        hint = self.fonts.render("wheel scrolls · Esc closes", 11, FAINT)
        screen.blit(hint, (x + w - 26 - hint.get_width(), y + 22))

    def _veil(self, screen: pygame.Surface) -> None:
        veil = self.sprites.get(("veil", screen.get_size()), 1, 1, lambda c: None)
        veil = pygame.transform.scale(veil, screen.get_size())
        veil.fill((*BG, 190))
        screen.blit(veil, (0, 0))

    def toast(self, screen: pygame.Surface, text: str, view: pygame.Rect) -> None:
        """A short message at the foot of the graph."""
        text = self.fonts.fit(text, 12, max(60, view.w - 60), UI, SEMIBOLD)
        label = self.fonts.render(text, 12, TEXT, UI, SEMIBOLD)
        pill = self.sprites.pill(label.get_width() + 32, 30, CARD, 15, mix(LINE, ACCENT, 0.5))
        x = view.centerx - pill.get_width() // 2
        y = view.bottom - 48
        screen.blit(pill, (x, y))
        screen.blit(label, (x + 17, y + 16 - label.get_height() // 2))


def code_color(line: str) -> tuple[int, int, int]:
    """A little colour for LLVM IR and WGSL: comments faint, labels and attributes warm, the rest plain."""
    text = line.strip()
    if text.startswith((";", "//")):
        return FAINT
    if text.endswith(":") or text.startswith(
        ("@", "define", "fn ", "declare", "attributes", "struct", "def ")
    ):
        return category("contraction")
    if text.startswith(("br ", "ret ", "for ", "if ", "else", "return", "loop", "var", "let", "store")):
        return category("activation")
    return mix(TEXT, MUTED, 0.25)
