"""The cards: shapes and labels of nodes. Parameter pill, constant hexagon, view parallelogram, reduction trapezoid, the
rest rounded cards with a colour bar. Called by ``layer`` (all cards), ``overlay`` (running ones) and the inspector.
"""

from __future__ import annotations

import pygame

from ..fold import Item
from .text import MEDIUM, MONO, REGULAR, SEMIBOLD, UI, Fonts
from .theme import BG, CARD, LINE, MUTED, TEXT, WHITE, Color, category, mix

HEAVY = frozenset({"contraction", "loss"})
PLAIN_BELOW = 9.0  # screen height under which a card is a plain block
LABEL_BELOW = 6.0  # text smaller than this is not drawn


def outline_points(cat: str, x: float, y: float, w: float, h: float) -> list[tuple[float, float]] | None:
    """Corners of the polygon shapes; None for the rounded ones."""
    if cat == "constant":
        k = h * 0.32
        return [
            (x + k, y),
            (x + w - k, y),
            (x + w, y + h / 2),
            (x + w - k, y + h),
            (x + k, y + h),
            (x, y + h / 2),
        ]
    if cat == "view":
        k = h * 0.22
        return [(x + k, y), (x + w, y), (x + w - k, y + h), (x, y + h)]
    if cat == "reduction":
        k = h * 0.28
        return [(x, y), (x + w, y), (x + w - k, y + h), (x + k, y + h)]
    return None


def corner_radius(cat: str, h: float, zoom: float) -> float:
    """Radius of the rounded shapes."""
    return h / 2 if cat == "parameter" else 7.0 * zoom


def card_colors(cat: str, tint: Color | None = None) -> tuple[Color, Color, Color]:
    """Fill, outline and full colour of a card; ``tint`` replaces the category colour on heat maps."""
    base = tint or category(cat)
    strong = 0.5 if tint else (0.34 if cat in HEAVY else 0.13)
    return mix(CARD, base, strong), mix(LINE, base, 0.9 if cat in HEAVY or tint else 0.62), base


def paint_card(
    surface: pygame.Surface,
    scale: int,
    box: tuple[float, float, float, float],
    item: Item,
    zoom: float,
    tint: Color | None = None,
    running: bool = False,
) -> None:
    """Draw the shape of a card at ``scale`` times screen size; ``box`` in screen pixels."""
    cat = item.category
    fill, edge, base = card_colors(cat, tint)
    if running:
        fill, edge = mix(base, WHITE, 0.12), mix(base, WHITE, 0.7)
    x, y, w, h = (v * scale for v in box)
    if h < PLAIN_BELOW * scale:
        color = base if running else mix(CARD, base, 0.8 if tint else 0.62)
        pygame.draw.rect(
            surface, color, pygame.Rect(round(x), round(y), max(scale, round(w)), max(scale, round(h)))
        )
        return
    line = max(1, round((2.0 if running else 1.2) * scale))
    if (
        item.copies > 1 or item.kind == "group"
    ):  # a second edge behind: this card stands for more than one node
        d = 3.0 * zoom * scale
        _shape(
            surface, cat, (x + d, y + d, w, h), mix(BG, fill, 0.75), mix(BG, edge, 0.6), line, zoom * scale
        )
    _shape(surface, cat, (x, y, w, h), fill, edge, line, zoom * scale)
    if outline_points(cat, 0, 0, 1, 1) is None and cat != "parameter":
        bar = pygame.Rect(round(x), round(y + 6 * zoom * scale), max(2, round(3.2 * zoom * scale)), 0)
        bar.h = max(2, round(h - 12 * zoom * scale))
        pygame.draw.rect(surface, base, bar, border_radius=int(1.6 * zoom * scale))


def _shape(
    surface: pygame.Surface,
    cat: str,
    box: tuple[float, float, float, float],
    fill: Color,
    edge: Color,
    line: int,
    zoom: float,
) -> None:
    x, y, w, h = box
    points = outline_points(cat, x, y, w, h)
    if points is not None:
        pygame.draw.polygon(surface, fill, points)
        pygame.draw.lines(surface, edge, True, points, line)
        return
    r = pygame.Rect(round(x), round(y), round(w), round(h))
    radius = int(min(corner_radius(cat, h, zoom), r.w / 2, r.h / 2))
    pygame.draw.rect(surface, fill, r, border_radius=radius)
    pygame.draw.rect(surface, edge, r, line, border_radius=radius)


def paint_label(
    surface: pygame.Surface,
    fonts: Fonts,
    box: tuple[float, float, float, float],
    item: Item,
    zoom: float,
    running: bool = False,
) -> None:
    """Write a card's name and shape at screen size."""
    x, y, w, h = box
    px = 12.5 * zoom + (1.5 if zoom < 1.15 else 0.0)
    if px < LABEL_BELOW:
        return
    cat = item.category
    ink = (16, 12, 28) if running else mix(BG, TEXT, 0.95)
    soft = (50, 34, 84) if running else MUTED
    room = w - (2 * h * 0.3 if cat in ("constant", "reduction") else h * 0.3) + 2
    cx = x + w / 2
    one_line = not item.detail or px < 7.4
    if cat == "constant":
        _centre(surface, fonts, item.label, cx, y + h / 2, px * 0.88, ink, room, MONO, MEDIUM)
    elif cat == "parameter":
        _centre(
            surface,
            fonts,
            item.label,
            cx,
            y + h * (0.5 if one_line else 0.35),
            px * 0.95,
            mix(ink, _warm(cat), 0.35 * (not running)),
            room,
            UI,
            SEMIBOLD,
        )
        if not one_line:
            _centre(surface, fonts, item.detail, cx, y + h * 0.74, px * 0.64, soft, room, MONO, REGULAR)
    else:
        _centre(
            surface, fonts, item.label, cx, y + h * (0.5 if one_line else 0.345), px, ink, room, UI, SEMIBOLD
        )
        if not one_line:
            _centre(surface, fonts, item.detail, cx, y + h * 0.735, px * 0.73, soft, room, MONO, REGULAR)


def _warm(cat: str) -> Color:
    return category(cat)


def _centre(
    surface: pygame.Surface,
    fonts: Fonts,
    text: str,
    cx: float,
    cy: float,
    px: float,
    color: Color,
    room: float,
    kind: str,
    weight: int,
) -> None:
    size = round(px)
    if size < LABEL_BELOW:
        return
    text = fonts.fit(text, size, room, kind, weight)
    if text:
        label = fonts.render(text, size, color, kind, weight)
        surface.blit(label, (round(cx - label.get_width() / 2), round(cy - label.get_height() / 2)))
