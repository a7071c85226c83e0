"""Text: Inter and JetBrains Mono with real weights, cached as surfaces. Called by every drawing file.

The PyPI font packages hold variable fonts, of which pygame can show the default weight only; Pillow sets the weight,
so glyphs are drawn by Pillow (three times too large, then reduced: even spacing without hinting). When the packages or
Pillow's FreeType are missing, pygame's bundled font is used: plainer, never an error.
"""

from __future__ import annotations

import importlib
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pygame

from .theme import TEXT, Color

UI, MONO = "ui", "mono"
REGULAR, MEDIUM, SEMIBOLD, BOLD = 400, 500, 600, 700
_OVERSAMPLE = 3
_PACKAGES = {UI: ("fontpkg_inter", "Inter["), MONO: ("fontpkg_jetbrains_mono", "JetBrainsMono[")}


def _font_file(kind: str) -> Path | None:
    package, prefix = _PACKAGES[kind]
    try:
        module = importlib.import_module(package)
        root = Path(getattr(module, "ROOT", None) or Path(str(module.__file__)).parent)
        return next((p for p in sorted(root.rglob("*.ttf")) if p.name.startswith(prefix)), None)
    except Exception:
        return None


class Fonts:
    """Fonts by kind, weight and size, and an LRU cache of rendered labels."""

    def __init__(self, limit: int = 12000, plain: bool = False) -> None:
        self.limit = limit
        self._files = {UI: None, MONO: None} if plain else {k: _font_file(k) for k in _PACKAGES}
        self._pil: dict[tuple[str, int, int], Any] = {}
        self._pygame: dict[tuple[str, int], pygame.font.Font] = {}
        self._labels: OrderedDict[tuple[str, str, int, int, Color], pygame.Surface] = OrderedDict()
        self._widths: dict[tuple[str, str, int, int], int] = {}
        self._image: Any = None
        if not plain:
            try:
                from PIL import Image, ImageFont, features

                if features.check("freetype2"):
                    self._image = (Image, ImageFont)
            except ImportError:
                pass

    @property
    def fancy(self) -> bool:
        """True when the real fonts are used."""
        return self._image is not None and self._files[UI] is not None

    def _pillow_font(self, kind: str, weight: int, px: int) -> Any:
        key = (kind, weight, px)
        font = self._pil.get(key)
        if font is None:
            image_font = self._image[1]
            font = image_font.truetype(str(self._files[kind]), px * _OVERSAMPLE)
            try:
                axes = font.get_variation_axes()
                font.set_variation_by_axes([weight if b"eight" in a["name"] else a["default"] for a in axes])
            except OSError:
                pass  # a static font: one weight is better than none
            self._pil[key] = font
        return font

    def _plain_font(self, kind: str, px: int) -> pygame.font.Font:
        font = self._pygame.get((kind, px))
        if font is None:
            path = self._files[kind]
            try:
                font = pygame.font.Font(str(path) if path else None, px if path else round(px * 1.25))
            except (OSError, pygame.error):
                font = pygame.font.Font(None, round(px * 1.25))
            self._pygame[kind, px] = font
        return font

    def width(self, text: str, px: int, kind: str = UI, weight: int = MEDIUM) -> int:
        """Width in pixels of a label."""
        key = (text, kind, weight, px)
        w = self._widths.get(key)
        if w is None:
            if self._image and self._files[kind]:
                w = round(self._pillow_font(kind, weight, px).getlength(text) / _OVERSAMPLE)
            else:
                w = self._plain_font(kind, px).size(text)[0]
            if len(self._widths) > 4 * self.limit:
                self._widths.clear()
            self._widths[key] = w
        return w

    def fit(self, text: str, px: int, room: float, kind: str = UI, weight: int = MEDIUM) -> str:
        """The text, cut with an ellipsis when it is wider than ``room``."""
        if self.width(text, px, kind, weight) <= room:
            return text
        lo, hi = 0, len(text)
        while lo < hi:
            mid = (lo + hi + 1) // 2
            if self.width(text[:mid] + "…", px, kind, weight) <= room:
                lo = mid
            else:
                hi = mid - 1
        return text[:lo].rstrip() + "…" if lo else ""

    def render(
        self, text: str, px: int, color: Color = TEXT, kind: str = UI, weight: int = MEDIUM
    ) -> pygame.Surface:
        """A transparent surface with the text; the same object as long as it stays in the cache."""
        px = max(5, int(px))
        key = (text, kind, weight, px, color)
        label = self._labels.get(key)
        if label is not None:
            self._labels.move_to_end(key)
            return label
        if self._image and self._files[kind]:
            label = self._render_pillow(text, kind, weight, px, color)
        else:
            label = self._plain_font(kind, px).render(text, True, color)
        self._labels[key] = label
        if len(self._labels) > self.limit:
            for _ in range(self.limit // 8):
                self._labels.popitem(last=False)
        return label

    def _render_pillow(self, text: str, kind: str, weight: int, px: int, color: Color) -> pygame.Surface:
        image = self._image[0]
        font = self._pillow_font(kind, weight, px)
        ascent, descent = font.getmetrics()
        k = _OVERSAMPLE
        w = int(font.getlength(text) / k + 2) * k
        h = (int((ascent + descent) / k) + 1) * k
        if w <= 0 or not text:
            return pygame.Surface((1, max(1, h // k)), pygame.SRCALPHA)
        mask = image.new("L", (w, h), 0)
        from PIL import ImageDraw

        ImageDraw.Draw(mask).text((0, 0), text, fill=255, font=font)
        small = mask.reduce(k)
        coverage = np.frombuffer(small.tobytes().translate(_GAMMA), np.uint8).reshape(
            small.height, small.width
        )
        label = pygame.Surface(small.size, pygame.SRCALPHA)
        label.fill((*color, 0))
        pygame.surfarray.pixels_alpha(label)[:] = coverage.T
        return label


#: Light text on a dark ground looks thin when coverage is used as it is: lift the middle.
_GAMMA = bytes(round(255 * (i / 255) ** 0.80) for i in range(256))
