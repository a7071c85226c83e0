"""The whole page in a corner, with the part in view framed. Called by ``window``; a click there moves the camera."""

from __future__ import annotations

import numpy as np
import pygame

from ..camera import Camera
from ..scene import Moment, Scene
from .canvas import Canvas
from .text import BOLD, Fonts
from .theme import ACCENT, BG, CARD, FAINT, LINE, PANEL, STAVE, WHITE, category, mix

PAD = 20


class Minimap:
    """A small picture of the page, lit as the step proceeds."""

    def __init__(self, fonts: Fonts) -> None:
        self.fonts = fonts
        self._key: object = None
        self.rect = pygame.Rect(0, 0, 0, 0)
        self.k = 1.0
        self._lit = np.zeros(0, bool)
        self._shown: object = None

    def height(self, width: int, scene: Scene | None) -> int:
        """Pixels the map wants at a width."""
        if scene is None or scene.page.width <= 0:
            return 0
        return int(min(210, max(60, (width - 2 * PAD) * scene.page.height / scene.page.width))) + 46

    def draw(
        self,
        screen: pygame.Surface,
        area: pygame.Rect,
        scene: Scene,
        moment: Moment | None,
        camera: Camera,
        view: pygame.Rect,
        *,
        kept: bool = False,
    ) -> bool:
        """Draw into ``area`` (the foot of the side panel). With ``kept`` it may be on screen already: False then."""
        w, h = scene.page.width, scene.page.height
        if w <= 0 or h <= 0 or area.h < 50:
            self.rect = pygame.Rect(0, 0, 0, 0)
            return False
        inner = pygame.Rect(area.x + PAD, area.y + 30, area.w - 2 * PAD, area.h - 44)
        self.k = min(inner.w / w, inner.h / h)
        self.rect = pygame.Rect(0, 0, max(2, round(w * self.k)), max(2, round(h * self.k)))
        self.rect.center = inner.center
        key = (id(scene), scene.version, inner.size)
        if key != self._key:
            self._key = key
            self._paint(scene)
        state = None if moment is None else (moment.state.tobytes(), moment.active.tobytes())
        shown = (key, tuple(area), state, camera.x, camera.y, camera.zoom, tuple(view))
        if kept and shown == self._shown:
            return False
        self._shown = shown
        screen.fill(PANEL, area)
        screen.fill(LINE, (area.x + PAD, area.y + 4, area.w - 2 * PAD, 1))
        label = self.fonts.render("MAP", 10, FAINT, weight=BOLD)
        screen.blit(label, (area.x + PAD, area.y + 12))
        at = (self.rect.x - 5, self.rect.y - 5)
        if moment is None or len(moment.state) != len(self._lit):
            screen.blit(self._full, at)
        else:
            lit = moment.state != 0
            changed = np.flatnonzero(lit != self._lit)
            if len(changed) > len(lit) // 3:
                self._now.blit(self._dim, (0, 0))
                changed = np.flatnonzero(lit)
            for i in changed:
                box = self._boxes[i]
                if box is not None:
                    self._now.blit(self._full if lit[i] else self._dim, box[:2], box)
            self._lit = lit.copy()
            screen.blit(self._now, at)
            for i in moment.active:
                box = self._boxes[i]
                if box is not None:
                    screen.fill(WHITE, (at[0] + box[0], at[1] + box[1], max(2, box[2]), max(2, box[3])))
        x0, y0 = camera.to_page(-view.w / 2, -view.h / 2)
        frame = pygame.Rect(
            round(self.rect.x + x0 * self.k),
            round(self.rect.y + y0 * self.k),
            max(4, round(view.w / camera.zoom * self.k)),
            max(4, round(view.h / camera.zoom * self.k)),
        ).clip(self.rect.inflate(12, 12))
        pygame.draw.rect(screen, ACCENT, frame, 1, border_radius=4)
        return True

    def page_point(self, pos: tuple[int, int]) -> tuple[float, float]:
        """Page point under a pixel of the map."""
        return (pos[0] - self.rect.x) / self.k, (pos[1] - self.rect.y) / self.k

    def _paint(self, scene: Scene) -> None:
        size = (self.rect.w + 10, self.rect.h + 10)

        def base() -> Canvas:
            c = Canvas(*size, self.fonts, background=BG)
            for cell in scene.page.cells:
                x, y, w, h = (v * self.k for v in cell.rect)
                c.rect((x + 5, y + 5, w, h), mix(CARD, STAVE[cell.phase], 0.10), 2)
            return c

        full, dim = base(), base()
        self._boxes: list[tuple[int, int, int, int] | None] = [None] * len(scene.items)
        for i in scene.shown:
            x, y, w, h = (float(v) * self.k for v in scene.rects[i])
            color = category(scene.items[i].category)
            box = (x + 5, y + 5, max(1.0, w), max(1.0, h))
            full.rect(box, mix(BG, color, 0.85))
            dim.rect(box, mix(BG, color, 0.28))
            self._boxes[i] = (int(box[0]), int(box[1]), int(box[2]) + 1, int(box[3]) + 1)
        self._full, self._dim = full.finish(), dim.finish()
        self._now = self._dim.copy()
        self._lit = np.zeros(len(scene.items), bool)
