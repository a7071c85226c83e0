"""Where the page is seen from: pan, zoom, fit, smooth flights. Called by ``app`` and ``export``; no pygame."""

from __future__ import annotations

import math
from dataclasses import dataclass

MIN_ZOOM, MAX_ZOOM = 0.004, 4.0
FLIGHT = 0.35  # seconds


def around(card: tuple[float, float, float, float]) -> tuple[float, float, float, float]:
    """A card with its surroundings, to be shown from near."""
    x, y, w, h = card
    return x - 420, y - 260, w + 840, h + 520


@dataclass
class Camera:
    """Page point at the centre of the view, and pixels per page unit."""

    x: float = 0.0
    y: float = 0.0
    zoom: float = 1.0
    _from: tuple[float, float, float] | None = None
    _to: tuple[float, float, float] | None = None
    _start: float = 0.0

    def fit(
        self, rect: tuple[float, float, float, float], view: tuple[float, float], margin: float = 22.0
    ) -> None:
        """Show a whole rectangle."""
        self._to = None
        self.x, self.y, self.zoom = self.fitted(rect, view, margin)

    @staticmethod
    def fitted(
        rect: tuple[float, float, float, float],
        view: tuple[float, float],
        margin: float = 22.0,
        most: float = 1.6,
    ) -> tuple[float, float, float]:
        """Centre and zoom that show a rectangle."""
        x, y, w, h = rect
        room = (max(20.0, view[0] - 2 * margin), max(20.0, view[1] - 2 * margin))
        zoom = min(room[0] / max(w, 1.0), room[1] / max(h, 1.0), most)
        return x + w / 2, y + h / 2, max(MIN_ZOOM, zoom)

    def fly(self, target: tuple[float, float, float], now: float) -> None:
        """Move there smoothly, starting at clock time ``now``."""
        self._from, self._to, self._start = (self.x, self.y, self.zoom), target, now

    def update(self, now: float) -> bool:
        """Advance a flight; True while moving."""
        if self._to is None or self._from is None:
            return False
        t = min(1.0, (now - self._start) / FLIGHT)
        e = t * t * (3 - 2 * t)
        (x0, y0, z0), (x1, y1, z1) = self._from, self._to
        self.zoom = math.exp(math.log(z0) + (math.log(z1) - math.log(z0)) * e)
        # move in proportion to the zoom, so that the target does not swing
        k = e if abs(z1 - z0) < 1e-9 * z0 else (1 / z0 - 1 / self.zoom) / (1 / z0 - 1 / z1)
        self.x, self.y = x0 + (x1 - x0) * k, y0 + (y1 - y0) * k
        if t >= 1.0:
            self.x, self.y, self.zoom = self._to
            self._to = None
        return True

    @property
    def flying(self) -> bool:
        """True during a flight."""
        return self._to is not None

    def stop(self) -> None:
        """End a flight where it is."""
        self._to = None

    def pan(self, dx: float, dy: float) -> None:
        """Move by screen pixels."""
        self._to = None
        self.x -= dx / self.zoom
        self.y -= dy / self.zoom

    def zoom_at(self, factor: float, sx: float, sy: float) -> None:
        """Zoom, keeping the page point under (sx, sy) pixels from the view's centre in place."""
        self._to = None
        new = min(MAX_ZOOM, max(MIN_ZOOM, self.zoom * factor))
        px, py = self.x + sx / self.zoom, self.y + sy / self.zoom
        self.zoom = new
        self.x, self.y = px - sx / new, py - sy / new

    def to_page(self, sx: float, sy: float) -> tuple[float, float]:
        """Pixels from the view's centre to page point."""
        return self.x + sx / self.zoom, self.y + sy / self.zoom

    def to_view(self, px: float, py: float) -> tuple[float, float]:
        """Page point to pixels from the view's centre."""
        return (px - self.x) * self.zoom, (py - self.y) * self.zoom
