"""A still picture of a graph, for notebooks and documentation. Needs no display. Called by ``plugin.render_png``."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from typing import Any

os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")

import pygame

from .camera import Camera
from .draw.canvas import Canvas
from .draw.layer import GraphLayer
from .draw.text import BOLD, MONO, REGULAR, Fonts
from .draw.theme import BG, FAINT, LEGEND, MUTED, TEXT, category
from .fold import Choices
from .history import Session
from .recording import graph_trainer
from .scene import Scene

HEADER, FOOTER = 44, 26


def graph_png(
    graph: Any, ops: Mapping[str, Mapping[str, str]] | None = None, size: tuple[int, int] = (1280, 720)
) -> bytes:
    """PNG bytes of a graph document. Raises :class:`GraphFormatError` for a bad one, ValueError for a silly size."""
    w, h = int(size[0]), int(size[1])
    if not (64 <= w <= 16384 and 64 <= h <= 16384):
        raise ValueError(f"picture size must be between 64 and 16384 pixels, got {w} x {h}")
    session = next(iter(graph_trainer(graph, ops).sessions.values()))
    out = io.BytesIO()
    pygame.image.save(draw_graph(session, (w, h)), out, "graph.png")
    return out.getvalue()


def draw_graph(session: Session, size: tuple[int, int], choices: Choices | None = None) -> pygame.Surface:
    """The whole page of a program with its name and the colour key, everything lit."""
    pygame.font.init()
    w, h = size
    fonts = Fonts()
    top, foot = (HEADER, FOOTER) if h >= 260 and w >= 360 else (0, 0)
    view = (w, max(8, h - top - foot))
    scene = Scene(session, choices or Choices(), "both", view)
    camera = Camera()
    camera.fit(
        (-16.0, -24.0, scene.page.width + 32, scene.page.height + 30), view, margin=14 if w < 600 else 26
    )
    scale = 2 if view[0] * view[1] <= 9_000_000 else 1
    origin = (camera.x - view[0] / 2 / camera.zoom, camera.y - view[1] / 2 / camera.zoom)
    layer = GraphLayer(scene, fonts, origin, camera.zoom, view, "op", scale)
    layer.finish()
    picture = pygame.Surface(size)
    picture.blit(layer.full, (0, top))
    if not top:
        return picture
    c = Canvas(w, top, fonts, background=BG)
    x = 22 + c.text(session.name, (22, top / 2 + 4), 17, TEXT, weight=BOLD)
    counts = {k: v for k, v in session.model.counts().items() if v}
    notes = [f"{len(session.model.nodes)} nodes"]
    if len(counts) > 1:
        notes += [f"{v} {k}" for k, v in counts.items()]
    note = fonts.fit(" · ".join(notes), 12, w - x - 40, MONO, REGULAR)
    c.text(note, (x + 14, top / 2 + 5), 12, FAINT, MONO, REGULAR)
    picture.blit(c.finish(), (0, 0))
    c = Canvas(w, foot, fonts, background=BG)
    present = {it.category for it in scene.items}
    x = 22
    for name in LEGEND:
        if name in present and x < w - 90:
            c.circle((x + 4, foot / 2), 4, category(name))
            x += 31 + c.text(name, (x + 13, foot / 2), 11, MUTED)
    picture.blit(c.finish(), (0, h - foot))
    return picture
