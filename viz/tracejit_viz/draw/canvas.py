"""Smooth shapes with pygame: a supersampled canvas, glows, and small cached sprites. Called by the drawing files.

pygame's rounded rectangles are jagged and its antialiased lines one pixel wide, so shapes are drawn at twice the size
and reduced once; text and glows are composed afterwards at screen size.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
import pygame

from .text import MEDIUM, UI, Fonts
from .theme import BG, TEXT, Color

Box = tuple[float, float, float, float]


class Canvas:
    """A picture of ``w x h`` screen pixels drawn at ``scale`` times that. Coordinates are screen pixels."""

    def __init__(self, w: int, h: int, fonts: Fonts, scale: int = 2, background: Color | None = BG) -> None:
        self.w, self.h, self.scale, self.fonts = w, h, scale, fonts
        if background is None:
            self.surface = pygame.Surface((w * scale, h * scale), pygame.SRCALPHA)
        else:
            self.surface = pygame.Surface((w * scale, h * scale))
            self.surface.fill(background)
        self._alpha = background is None
        self._labels: list[tuple[pygame.Surface, tuple[int, int]]] = []
        self._glows: list[tuple[pygame.Surface, tuple[int, int]]] = []

    def _rect(self, box: Box) -> pygame.Rect:
        k = self.scale
        x0, y0 = round(box[0] * k), round(box[1] * k)
        return pygame.Rect(
            x0, y0, max(1, round((box[0] + box[2]) * k) - x0), max(1, round((box[1] + box[3]) * k) - y0)
        )

    def rect(self, box: Box, color: Color, radius: float = 0.0, width: float = 0.0) -> None:
        """A filled (width 0) or outlined rounded rectangle."""
        r = self._rect(box)
        radius_px = int(min(radius * self.scale, r.w / 2, r.h / 2))
        pygame.draw.rect(
            self.surface, color, r, max(1, round(width * self.scale)) if width else 0, border_radius=radius_px
        )

    def circle(self, center: tuple[float, float], radius: float, color: Color, width: float = 0.0) -> None:
        """A disc or a ring."""
        k = self.scale
        pygame.draw.circle(
            self.surface,
            color,
            (center[0] * k, center[1] * k),
            radius * k,
            max(1, round(width * k)) if width else 0,
        )

    def poly(self, points: Sequence[tuple[float, float]], color: Color, width: float = 0.0) -> None:
        """A filled or outlined polygon."""
        pts = [(x * self.scale, y * self.scale) for x, y in points]
        if width:
            pygame.draw.lines(self.surface, color, True, pts, max(1, round(width * self.scale)))
        else:
            pygame.draw.polygon(self.surface, color, pts)

    def line(
        self, points: np.ndarray | Sequence[tuple[float, float]], color: Color, width: float = 1.0
    ) -> None:
        """A smooth polyline."""
        ribbon(self.surface, np.asarray(points, float) * self.scale, color, width * self.scale)

    def text(
        self,
        text: str,
        pos: tuple[float, float],
        px: float = 13,
        color: Color = TEXT,
        kind: str = UI,
        weight: int = MEDIUM,
        anchor: str = "lc",
    ) -> int:
        """Put a label; ``anchor`` is l/c/r and t/c/b. Returns its width."""
        label = self.fonts.render(text, round(px), color, kind, weight)
        self._labels.append((label, place(label, pos, anchor)))
        return label.get_width()

    def glow(self, center: tuple[float, float], radius: float, color: Color) -> None:
        """Additive light around a point."""
        g = glow_disc(max(2, int(radius)), color)
        self._glows.append((g, (round(center[0] - g.get_width() / 2), round(center[1] - g.get_height() / 2))))

    def finish(self) -> pygame.Surface:
        """Reduce, add glows and text: the finished picture."""
        if self.scale == 1:
            out = self.surface
        else:
            out = pygame.transform.smoothscale(self.surface, (self.w, self.h))
        for g, at in self._glows:
            out.blit(g, at, special_flags=pygame.BLEND_RGB_ADD)
        for label, at in self._labels:
            out.blit(label, at)
        return out


def place(label: pygame.Surface, pos: tuple[float, float], anchor: str) -> tuple[int, int]:
    """Top-left corner of a label anchored at a point."""
    w, h = label.get_size()
    x = pos[0] - (0 if anchor[0] == "l" else w / 2 if anchor[0] == "c" else w)
    y = pos[1] - (0 if anchor[1] == "t" else h / 2 if anchor[1] == "c" else h)
    return round(x), round(y)


def ribbon(surface: pygame.Surface, points: np.ndarray, color: Color, width: float) -> None:
    """A polyline of any width without gaps at its joints: one filled outline, antialiased edges."""
    if len(points) < 2:
        return
    if width <= 1.6:
        pygame.draw.aalines(surface, color, False, points.tolist())
        return
    d = np.empty_like(points)
    d[1:-1] = points[2:] - points[:-2]
    d[0], d[-1] = points[1] - points[0], points[-1] - points[-2]
    n = np.hypot(d[:, 0], d[:, 1])
    n[n == 0] = 1.0
    off = np.stack([-d[:, 1] / n, d[:, 0] / n], 1) * (width / 2)
    outline = np.concatenate([points + off, (points - off)[::-1]]).tolist()
    pygame.draw.polygon(surface, color, outline)
    pygame.draw.aalines(surface, color, True, outline)


@lru_cache(128)
def glow_disc(radius: int, color: Color, power: float = 2.2) -> pygame.Surface:
    """A round glow to be added to what is below."""
    s = pygame.Surface((2 * radius, 2 * radius))
    px = pygame.surfarray.pixels3d(s)
    y, x = np.ogrid[-radius + 0.5 : radius + 0.5, -radius + 0.5 : radius + 0.5]
    d = np.clip(1 - np.sqrt(x * x + y * y) / radius, 0, 1) ** power
    px[:] = (d[..., None] * np.array(color)).astype(np.uint8)
    del px
    return s


@lru_cache(64)
def glow_rect(w: int, h: int, radius: int, color: Color) -> pygame.Surface:
    """A glow around a rectangle of ``w x h``, reaching ``radius`` beyond it; to be added."""
    full_w, full_h = w + 2 * radius, h + 2 * radius
    s = pygame.Surface((full_w, full_h))
    px = pygame.surfarray.pixels3d(s)
    ax, ay = np.arange(full_w), np.arange(full_h)
    x = np.maximum(np.maximum(radius - ax, ax - (full_w - radius - 1)), 0)[:, None]
    y = np.maximum(np.maximum(radius - ay, ay - (full_h - radius - 1)), 0)[None]
    d = np.clip(1 - np.sqrt(x * x + y * y) / radius, 0, 1) ** 2.4
    px[:] = (d[..., None] * np.array(color)).astype(np.uint8)
    del px
    return s


class Sprites:
    """Small smooth pictures with transparency, drawn once at four times their size."""

    def __init__(self, fonts: Fonts, limit: int = 600) -> None:
        self.fonts, self.limit = fonts, limit
        self._cache: OrderedDict[object, pygame.Surface] = OrderedDict()

    def get(self, key: object, w: int, h: int, paint: Callable[[Canvas], None]) -> pygame.Surface:
        """The sprite for ``key``; ``paint`` draws it when it is not there yet."""
        s = self._cache.get(key)
        if s is not None:
            self._cache.move_to_end(key)
            return s
        canvas = Canvas(max(1, w), max(1, h), self.fonts, scale=4, background=None)
        paint(canvas)
        s = self._cache[key] = canvas.finish()
        if len(self._cache) > self.limit:
            self._cache.popitem(last=False)
        return s

    def outline(self, w: float, h: float, radius: float, color: Color, width: float) -> pygame.Surface:
        """An empty rounded frame."""
        iw, ih = math.ceil(w) + 2, math.ceil(h) + 2
        key = ("outline", iw, ih, round(radius, 1), color, round(width, 1))
        return self.get(key, iw, ih, lambda c: c.rect((1, 1, w, h), color, radius, width))

    def pill(
        self, w: float, h: float, color: Color, radius: float | None = None, edge: Color | None = None
    ) -> pygame.Surface:
        """A filled rounded box, with an outline when ``edge`` is given."""
        iw, ih = math.ceil(w) + 2, math.ceil(h) + 2
        r = h / 2 if radius is None else radius
        key = ("pill", iw, ih, round(r, 1), color, edge)

        def paint(c: Canvas) -> None:
            c.rect((1, 1, w, h), color, r)
            if edge is not None:
                c.rect((1, 1, w, h), edge, r, 1)

        return self.get(key, iw, ih, paint)
