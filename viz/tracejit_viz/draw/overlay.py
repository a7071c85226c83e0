"""What moves over the graph: running cards and their flag, tokens on the edges, selection, links, highlighted paths.

Drawn every frame at screen size from cached sprites. Called by ``app`` and ``export`` after ``graphview``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import pygame

from ..camera import Camera
from ..fold import Item
from ..scene import DONE, Moment, Scene
from .canvas import Canvas, Sprites, glow_disc, glow_rect, ribbon
from .cards import PLAIN_BELOW, corner_radius, paint_card, paint_label
from .text import BOLD, MONO, Fonts
from .theme import ACCENT, BAD, BG, TEXT, WARM, WHITE, Color, category, mix

MAX_GLOWS = 48
MAX_TOKEN_EDGES = 40


class Overlay:
    """Per-frame drawing over one graph view."""

    def __init__(self, fonts: Fonts, sprites: Sprites) -> None:
        self.fonts, self.sprites = fonts, sprites
        self._crossed_key: object = None
        self._crossed: list[int] = []

    def _box(
        self, scene: Scene, item: int, camera: Camera, view: pygame.Rect
    ) -> tuple[float, float, float, float]:
        x, y, w, h = scene.rects[item]
        sx, sy = camera.to_view(x, y)
        return view.centerx + sx, view.centery + sy, w * camera.zoom, h * camera.zoom

    def _seen(self, box: tuple[float, float, float, float], view: pygame.Rect) -> bool:
        x, y, w, h = box
        return x < view.right and y < view.bottom and x + w > view.x and y + h > view.y

    def _line(self, scene: Scene, edge: tuple[int, int], camera: Camera, view: pygame.Rect) -> np.ndarray:
        pts = scene.edge_path(edge)
        return (pts - (camera.x, camera.y)) * camera.zoom + view.center

    # -- running -----------------------------------------------------------------------------------------------------
    def running(
        self,
        screen: pygame.Surface,
        scene: Scene,
        moment: Moment,
        camera: Camera,
        view: pygame.Rect,
        clock: float,
        device: str,
        flags: Sequence[tuple[int, str]],
    ) -> None:
        """Glowing cards and a flag with device and time."""
        boxes = [(int(i), self._box(scene, int(i), camera, view)) for i in moment.active]
        boxes = [(i, b) for i, b in boxes if self._seen(b, view)]
        pulse = 0.85 + 0.15 * math.sin(clock * 6.0)
        for n, (i, (x, y, w, h)) in enumerate(boxes):
            base = category(scene.items[i].category)
            if n < MAX_GLOWS and w < 600:
                for reach, strength in ((46 * camera.zoom + 6, 0.50 * pulse), (14 * camera.zoom + 3, 0.55)):
                    g = glow_rect(
                        max(2, int(w)), max(2, int(h)), int(reach), mix((0, 0, 0), base, round(strength, 1))
                    )
                    screen.blit(
                        g,
                        (round(x + w / 2 - g.get_width() / 2), round(y + h / 2 - g.get_height() / 2)),
                        special_flags=pygame.BLEND_RGB_ADD,
                    )
        for i, box in boxes:
            self._running_card(screen, scene, scene.items[i], box, camera.zoom)
        for item, text in flags:
            box = self._box(scene, item, camera, view)
            if self._seen(box, view):
                self._flag(screen, scene.items[item], box, f"{device}  {text}", view)

    def _running_card(
        self,
        screen: pygame.Surface,
        scene: Scene,
        item: Item,
        box: tuple[float, float, float, float],
        zoom: float,
    ) -> None:
        x, y, w, h = box
        if h < PLAIN_BELOW:
            screen.fill(
                mix(category(item.category), WHITE, 0.55),
                (round(x), round(y), max(2, round(w)), max(2, round(h))),
            )
            return
        pad = 6
        key = ("run", scene.version, item.index, round(zoom, 4), id(scene))

        def paint(canvas: Canvas) -> None:
            paint_card(canvas.surface, canvas.scale, (pad, pad, w, h), item, zoom, running=True)

        sprite = self.sprites.get(key, math.ceil(w + 2 * pad), math.ceil(h + 2 * pad), paint)
        screen.blit(sprite, (round(x - pad), round(y - pad)))
        paint_label(screen, self.fonts, (round(x), round(y), w, h), item, zoom, running=True)

    def _flag(
        self,
        screen: pygame.Surface,
        item: Item,
        box: tuple[float, float, float, float],
        text: str,
        view: pygame.Rect,
    ) -> None:
        x, y, w, h = box
        color = mix(TEXT, category(item.category), 0.12)
        label = self.fonts.render(text, 11, (20, 24, 34), MONO, BOLD)
        lw, lh = label.get_width() + 18, 20
        fx, fy = x + w + 9, y + h / 2 + 2
        left = fx + lw > view.right
        if left:
            fx = x - 9 - lw
        pill = self.sprites.pill(lw, lh, color)
        tip_x = fx - 7 if not left else fx + lw + 7
        mid = fy + lh / 2
        base_x = fx + 3 if not left else fx + lw - 3
        pygame.draw.polygon(screen, color, [(tip_x, mid), (base_x, mid - 5), (base_x, mid + 5)])
        screen.blit(pill, (round(fx) - 1, round(fy) - 1))
        screen.blit(label, (round(fx + 9), round(fy + lh / 2 - label.get_height() / 2)))

    def arriving(self, scene: Scene, moment: Moment) -> list[tuple[int, int]]:
        """The edges along which values travel into the running cards."""
        edges = [
            (a, int(b)) for b in moment.active for a in scene.in_edges.get(int(b), ()) if moment.state[a]
        ]
        return edges[:MAX_TOKEN_EDGES]

    def tokens(
        self,
        screen: pygame.Surface,
        scene: Scene,
        edges: Iterable[tuple[int, int]],
        camera: Camera,
        view: pygame.Rect,
        clock: float,
        behind: Iterable[int] = (),
    ) -> None:
        """Bright points that ride along edges, and disappear behind the cards of ``behind``."""
        hidden = [pygame.Rect(*map(round, self._box(scene, i, camera, view))) for i in behind]
        for a, b in edges:
            line = self._line(scene, (a, b), camera, view)
            base = category(scene.items[a].category)
            step = np.hypot(*np.diff(line, axis=0).T)
            total = float(step.sum())
            if total < 6:
                continue
            at = np.concatenate([[0.0], np.cumsum(step)])
            count = 1 if total < 60 else min(4, 2 + int(total // 160))
            for j in range(count):
                f = ((clock * 0.9 + j / count) % 1.0) * total
                px, py = float(np.interp(f, at, line[:, 0])), float(np.interp(f, at, line[:, 1]))
                if not view.collidepoint(px, py) or any(box.collidepoint(px, py) for box in hidden):
                    continue
                r = max(1.5, (2.0 + j * 0.4) * min(1.4, camera.zoom))
                g = glow_disc(
                    max(4, int((9 + 3 * j) * min(1.4, max(0.5, camera.zoom)))), mix((0, 0, 0), base, 0.4)
                )
                screen.blit(
                    g, (px - g.get_width() / 2, py - g.get_height() / 2), special_flags=pygame.BLEND_RGB_ADD
                )
                pygame.draw.circle(screen, mix(base, WHITE, 0.45), (px, py), r)

    def crossed(self, scene: Scene, edges: Iterable[tuple[int, int]]) -> list[int]:
        """Cards that lines drawn on top would cross out: all they pass over, and the ends they start from."""
        pairs = tuple(edges)
        key = (id(scene), scene.version, pairs)
        if key == self._crossed_key:
            return self._crossed
        hit: set[int] = set()
        rects = scene.rects[scene.shown]
        x0, y0 = rects[:, 0], rects[:, 1]
        x1, y1 = x0 + rects[:, 2], y0 + rects[:, 3]
        for edge in pairs:
            line = scene.edge_path(edge)
            low, high = line.min(0), line.max(0)
            near = np.flatnonzero((x1 >= low[0]) & (x0 <= high[0]) & (y1 >= low[1]) & (y0 <= high[1]))
            if not len(near):
                continue
            fine = np.stack([_refine(line[:, 0]), _refine(line[:, 1])], 1)
            px, py = fine[:, :1], fine[:, 1:]
            inside = ((px >= x0[near]) & (px <= x1[near]) & (py >= y0[near]) & (py <= y1[near])).any(0)
            hit.update(int(i) for i in scene.shown[near[inside]])
        self._crossed_key, self._crossed = key, sorted(hit)
        return self._crossed

    # -- pointing ----------------------------------------------------------------------------------------------------
    def outline(
        self,
        screen: pygame.Surface,
        scene: Scene,
        item: int,
        camera: Camera,
        view: pygame.Rect,
        color: Color,
        width: float = 1.6,
    ) -> None:
        """A frame around a card."""
        x, y, w, h = self._box(scene, item, camera, view)
        if not self._seen((x - 6, y - 6, w + 12, h + 12), view):
            return
        gap = 4.0 if h > 12 else 2.0
        radius = corner_radius(scene.items[item].category, h, camera.zoom) + gap
        frame = self.sprites.outline(w + 2 * gap, h + 2 * gap, min(radius, (h + 2 * gap) / 2), color, width)
        screen.blit(frame, (round(x - gap) - 1, round(y - gap) - 1))

    def edges(
        self,
        screen: pygame.Surface,
        scene: Scene,
        pairs: Iterable[tuple[int, int]],
        camera: Camera,
        view: pygame.Rect,
        color: Color | None = None,
        strength: float = 0.85,
        limit: int = 500,
    ) -> None:
        """Draw edges boldly, in one colour or their own."""
        for n, (a, b) in enumerate(pairs):
            if n >= limit:
                break
            line = self._line(scene, (a, b), camera, view)
            lo, hi = line.min(0), line.max(0)
            if hi[0] < view.x or lo[0] > view.right or hi[1] < view.y or lo[1] > view.bottom:
                continue
            tint = color or category(scene.items[a].category)
            ribbon(screen, line, mix(BG, tint, strength), max(1.2, 1.9 * camera.zoom))

    def link(
        self, screen: pygame.Surface, scene: Scene, a: int, b: int, camera: Camera, view: pygame.Rect
    ) -> None:
        """The dashed line between a node and its gradient."""
        xa, ya, wa, ha = self._box(scene, a, camera, view)
        xb, yb, wb, hb = self._box(scene, b, camera, view)
        bulge = max(30.0, min(74.0, 74 * camera.zoom)) + abs(xa + wa - xb - wb) * 0.12
        p0, p3 = np.array([xa + wa, ya + ha / 2]), np.array([xb + wb, yb + hb / 2])
        reach = np.array([bulge, 0.0])
        p1, p2 = p0 + reach, p3 + reach
        n = 24 + int(min(160, abs(p3[1] - p0[1]) / 6))
        t = np.linspace(0, 1, 2 * n)[:, None]
        u = 1 - t
        pts = u**3 * p0 + 3 * u * u * t * p1 + 3 * u * t * t * p2 + t**3 * p3
        at = np.concatenate([[0.0], np.cumsum(np.hypot(*np.diff(pts, axis=0).T))])
        for d in np.arange(0.0, at[-1], 9.0):
            f = np.array([d, d + 2.5, d + 5.0])
            ribbon(
                screen, np.stack([np.interp(f, at, pts[:, 0]), np.interp(f, at, pts[:, 1])], 1), ACCENT, 1.8
            )

    def alarm(
        self, screen: pygame.Surface, scene: Scene, item: int, camera: Camera, view: pygame.Rect, clock: float
    ) -> None:
        """A pulsing red frame: the first non-finite value."""
        x, y, w, h = self._box(scene, item, camera, view)
        if not self._seen((x - 60, y - 60, w + 120, h + 120), view):
            return
        k = 0.45 + 0.35 * (0.5 + 0.5 * math.sin(clock * 5.0))
        g = glow_rect(
            max(2, int(w)), max(2, int(h)), int(30 + 30 * camera.zoom), mix((0, 0, 0), BAD, round(k, 1))
        )
        screen.blit(
            g,
            (round(x + w / 2 - g.get_width() / 2), round(y + h / 2 - g.get_height() / 2)),
            special_flags=pygame.BLEND_RGB_ADD,
        )
        self.outline(screen, scene, item, camera, view, BAD, 2.2)
        tag = self.fonts.render("first NaN / Inf", 11, WHITE, MONO, BOLD)
        pill = self.sprites.pill(tag.get_width() + 16, 20, mix(BG, BAD, 0.8))
        at = (round(x + w / 2 - pill.get_width() / 2), round(y - 28))
        screen.blit(pill, at)
        screen.blit(tag, (at[0] + 9, at[1] + 11 - tag.get_height() // 2))

    def badge(
        self,
        screen: pygame.Surface,
        scene: Scene,
        item: int,
        text: str,
        camera: Camera,
        view: pygame.Rect,
        color: Color = WARM,
    ) -> None:
        """A small numbered tag on a card (kernel overlay, path ends)."""
        x, y, w, _ = self._box(scene, item, camera, view)
        label = self.fonts.render(text, 10, BG, MONO, BOLD)
        pill = self.sprites.pill(label.get_width() + 10, 15, color)
        at = (round(x + w - pill.get_width() / 2 - 4), round(y - 13))
        if view.collidepoint(at):
            screen.blit(pill, at)
            screen.blit(label, (at[0] + 6, at[1] + 8 - label.get_height() // 2))


def _refine(values: np.ndarray) -> np.ndarray:
    """Four points for every piece of a polyline, so that it cannot step over a card."""
    n = len(values)
    return np.interp(np.linspace(0, n - 1, 4 * (n - 1) + 1), np.arange(n), values)


def spotlight(scene: Scene, items: Iterable[int]) -> Moment:
    """A moment in which only some cards are lit: for paths, search results and kernels."""
    state = np.zeros(len(scene.items), np.int8)
    for i in items:
        state[i] = DONE
    return Moment(math.inf, state, state.astype(float), np.zeros(0, np.int64))
