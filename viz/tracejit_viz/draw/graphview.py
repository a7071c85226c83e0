"""The graph in its part of the window: keeps a prepared picture ahead of the camera and blits it each frame.

Panning moves a picture larger than the view; zooming scales the old one until the new one is ready; both are prepared in
slices between frames. Called by ``app`` and ``export``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import pygame

from ..camera import Camera
from ..scene import Moment, Scene
from .layer import GraphLayer
from .text import Fonts
from .theme import BG

MAX_PIXELS = 6_000_000  # of one prepared picture
FIRST = 0.25  # seconds a window may block for its first picture
SETTLE = 0.07  # seconds without zooming before a sharp picture is made


class GraphView:
    """Draws a scene through a camera into a rectangle."""

    def __init__(self, scene: Scene, fonts: Fonts, rect: pygame.Rect) -> None:
        self.scene, self.fonts, self.rect = scene, fonts, rect
        self.mode = "op"
        self.front: GraphLayer | None = None
        self.back: GraphLayer | None = None
        self._zoom_seen: tuple[float, float] = (0.0, 0.0)  # zoom, since when
        self._shown_from = pygame.Rect(0, 0, 1, 1)
        self.stale = False

    def set_scene(self, scene: Scene) -> None:
        """Show another scene."""
        self.scene = scene
        self.front = self.back = None

    def refresh(self) -> None:
        """Prepare a new picture (times or colours changed) while showing the old one."""
        self.stale = True

    def _new_layer(self, camera: Camera) -> GraphLayer:
        w, h = self.rect.size
        margin = 0.25
        while margin > 0.03 and (w * (1 + 2 * margin)) * (h * (1 + 2 * margin)) > MAX_PIXELS:
            margin -= 0.05
        mx, my = int(w * margin), int(h * margin)
        size = (w + 2 * mx, h + 2 * my)
        scale = 2 if size[0] * size[1] <= 9_000_000 else 1
        # the origin on whole pixels keeps text sharp while panning
        ox = camera.x - (w / 2 + mx) / camera.zoom
        oy = camera.y - (h / 2 + my) / camera.zoom
        self.stale = False
        return GraphLayer(self.scene, self.fonts, (ox, oy), camera.zoom, size, self.mode, scale)

    def _fits(self, layer: GraphLayer, camera: Camera, spare: float) -> bool:
        w, h = self.rect.size
        x, y = layer.to_px(camera.x, camera.y)
        return (
            x - w / 2 >= -spare
            and y - h / 2 >= -spare
            and x + w / 2 <= layer.size[0] + spare
            and y + h / 2 <= layer.size[1] + spare
        )

    def prepare(self, camera: Camera, now: float, budget: float) -> None:
        """Spend up to ``budget`` seconds on the next picture."""
        if camera.zoom != self._zoom_seen[0]:
            self._zoom_seen = (camera.zoom, now)
        if self.front is None:  # the first picture: at once if that is quick, else over the next frames
            if self.back is None or self.back.version != self.scene.version or self.back.zoom != camera.zoom:
                self.back = self._new_layer(camera)
            if self.back.work(max(budget, FIRST)):
                self.front, self.back = self.back, None
            return
        layer = self.front
        if (
            layer.version != self.scene.version
        ):  # cards have moved: better a moment's wait than a wrong picture
            budget = max(budget, FIRST)
        outdated = layer.version != self.scene.version or layer.mode != self.mode or self.stale
        wrong = layer.zoom != camera.zoom
        margin_x = (layer.size[0] - self.rect.w) / 2
        x, y = layer.to_px(camera.x, camera.y)
        off = max(abs(x - layer.size[0] / 2), abs(y - layer.size[1] / 2) * self.rect.w / max(1, self.rect.h))
        leaving = not wrong and off > margin_x * 0.55
        if self.back is not None:
            turned = self.back.zoom != camera.zoom or self.back.mode != self.mode
            # a picture of an older layout cannot be finished: its scene is gone
            if self.back.version != self.scene.version or (turned and now - self._zoom_seen[1] > SETTLE):
                self.back = None
        settled = now - self._zoom_seen[1] > SETTLE and not camera.flying
        if self.back is None and (outdated or leaving or (wrong and settled)):
            self.back = self._new_layer(camera)
        if self.back is not None and self.back.work(budget):
            self.front, self.back = self.back, None

    @property
    def sharp(self) -> bool:
        """True when the shown picture is the final one."""
        return self.front is not None and self.back is None and not self.stale

    def draw(self, screen: pygame.Surface, camera: Camera, moment: Moment | None) -> None:
        """Blit the part of the picture the camera sees."""
        layer = self.front
        if layer is None:
            screen.fill(BG, self.rect)
            return
        if layer.version != self.scene.version:
            moment = None
        picture = layer.show(moment) if layer.version == self.scene.version else layer.full
        w, h = self.rect.size
        cx, cy = layer.to_px(camera.x, camera.y)
        if abs(layer.zoom - camera.zoom) < 1e-12:
            x, y = round(cx - w / 2), round(cy - h / 2)
            if x < 0 or y < 0 or x + w > layer.size[0] or y + h > layer.size[1]:
                screen.fill(BG, self.rect)
            clip = screen.get_clip()
            screen.set_clip(self.rect.clip(clip))
            screen.blit(picture, self.rect.topleft, (x, y, w, h)) if x >= 0 and y >= 0 else screen.blit(
                picture, (self.rect.x - x, self.rect.y - y)
            )
            screen.set_clip(clip)
            return
        k = camera.zoom / layer.zoom
        source = pygame.Rect(
            math.floor(cx - w / 2 / k), math.floor(cy - h / 2 / k), math.ceil(w / k) + 1, math.ceil(h / k) + 1
        )
        part = source.clip(picture.get_rect())
        screen.fill(BG, self.rect)
        if part.w < 1 or part.h < 1:
            return
        clip = screen.get_clip()
        screen.set_clip(self.rect.clip(clip))
        size = (max(1, round(part.w * k)), max(1, round(part.h * k)))
        scaled = pygame.transform.scale(picture.subsurface(part), size)
        screen.blit(
            scaled,
            (round(self.rect.centerx + (part.x - cx) * k), round(self.rect.centery + (part.y - cy) * k)),
        )
        screen.set_clip(clip)

    def restamp(self, screen: pygame.Surface, camera: Camera, items: Iterable[int]) -> None:
        """Put cards back on top of lines drawn over them (once the picture is sharp: not while zooming)."""
        layer = self.front
        if layer is None or layer.version != self.scene.version or abs(layer.zoom - camera.zoom) > 1e-12:
            return
        cx, cy = layer.to_px(camera.x, camera.y)
        dx, dy = self.rect.x - round(cx - self.rect.w / 2), self.rect.y - round(cy - self.rect.h / 2)
        screen.blits(
            [(source, (at[0] + dx, at[1] + dy), part) for source, at, part in layer.cards(items)],
            doreturn=False,
        )
