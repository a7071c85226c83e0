"""The window on a screen with small pixels: drawn at a comfortable size and enlarged. Called by ``app``.

``TRACEJIT_VIEW_SCALE=1.5`` sets the factor; else ``GDK_SCALE`` or ``QT_SCALE_FACTOR``, which desktops set, else 2 on a
4K screen under X11. Wayland, macOS and Windows enlarge windows by themselves. Ctrl + and Ctrl - change it.
"""

from __future__ import annotations

import os

import pygame

STEPS = (0.75, 1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0)
FOUR_K = 2000  # screen height from which pixels are small


def default_scale() -> float:
    """The factor for this screen. Called once the display is open."""
    for name in ("TRACEJIT_VIEW_SCALE", "GDK_SCALE", "QT_SCALE_FACTOR"):
        try:
            return min(STEPS[-1], max(STEPS[0], float(os.environ[name])))
        except (KeyError, ValueError):
            continue
    if pygame.display.get_driver() != "x11":
        return 1.0
    return 2.0 if max(h for _, h in pygame.display.get_desktop_sizes()) >= FOUR_K else 1.0


class Magnifier:
    """Stands between what is drawn (``screen``) and the window."""

    def __init__(self, window: pygame.Surface, scale: float = 1.0) -> None:
        self.window, self.scale = window, scale
        self.screen = window
        self.resize(window)

    def resize(self, window: pygame.Surface, scale: float | None = None) -> None:
        """The window has another surface, or the user another wish."""
        self.window = window
        self.scale = scale if scale is not None else self.scale
        if self.scale == 1:
            self.screen = window
            return
        w, h = window.get_size()
        size = max(1, round(w / self.scale)), max(1, round(h / self.scale))
        if self.screen is window or self.screen.get_size() != size:
            self.screen = pygame.Surface(size).convert(window)

    def step(self, by: int) -> float:
        """The next larger or smaller factor; 0 goes back to 1."""
        if by == 0:
            return 1.0
        larger = [s for s in STEPS if s > self.scale + 1e-6]
        smaller = [s for s in STEPS if s < self.scale - 1e-6]
        return larger[0] if by > 0 and larger else smaller[-1] if by < 0 and smaller else self.scale

    def show(self, changed: list[pygame.Rect] | None) -> None:
        """Bring what was drawn to the screen: the changed parts, all of it for None."""
        if self.screen is self.window:
            if changed is None:
                pygame.display.flip()
            else:
                pygame.display.update(changed)
            return
        k = int(self.scale)
        if changed is None or k != self.scale or self.window.get_width() != k * self.screen.get_width():
            pygame.transform.smoothscale(self.screen, self.window.get_size(), self.window)
            pygame.display.flip()
            return
        bounds = self.screen.get_rect()
        large: list[pygame.Rect] = []
        for part in (r.clip(bounds) for r in changed):
            if part.w > 0 and part.h > 0:
                at = pygame.Rect(part.x * k, part.y * k, part.w * k, part.h * k).clip(self.window.get_rect())
                picture = pygame.transform.smoothscale(self.screen.subsurface(part), (part.w * k, part.h * k))
                large.append(self.window.blit(picture, at))
        pygame.display.update(large)

    def translate(self, event: pygame.event.Event) -> pygame.event.Event:
        """The event with places in what is drawn instead of in the window."""
        if self.scale == 1 or not hasattr(event, "pos"):
            return event
        fields = dict(event.dict)
        for name in ("pos", "rel"):
            if name in fields:
                fields[name] = tuple(round(v / self.scale) for v in fields[name])
        return pygame.event.Event(event.type, fields)
