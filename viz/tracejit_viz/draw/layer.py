"""The graph as cached pictures: everything finished, everything pending, and the two combined for the present moment.

Drawing thousands of cards takes longer than a frame, so it is done once per zoom into pictures larger than the view, in
small portions between frames (:meth:`GraphLayer.work`). Playing an animation then only copies the small rectangles of
cards that changed from the bright picture. Called by ``graphview``.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator

import numpy as np
import pygame

from ..labels import time_text
from ..scene import ACTIVE, DONE, Moment, Scene
from .canvas import ribbon
from .cards import LABEL_BELOW, PLAIN_BELOW, paint_card, paint_label
from .text import BOLD, MONO, REGULAR, SEMIBOLD, UI, Fonts
from .theme import BG, FAINT, GRID, LINE, MUTED, PANEL, STAVE, STAVE_TITLE, TEXT, category, heat, mix

BAND = 192

#: source picture, where to, which part: an entry of ``Surface.blits``.
Stamp = tuple[pygame.Surface, tuple[int, int], tuple[int, int, int, int]]
PENDING_ALPHA = 92  # how much of the finished picture a pending card shows, of 255


class GraphLayer:
    """Pictures of the page around a view: ``origin`` is the page point of the top-left pixel, ``zoom`` px per unit."""

    def __init__(
        self,
        scene: Scene,
        fonts: Fonts,
        origin: tuple[float, float],
        zoom: float,
        size: tuple[int, int],
        mode: str = "op",
        scale: int = 2,
    ) -> None:
        self.scene, self.fonts, self.origin, self.zoom, self.size = scene, fonts, origin, zoom, size
        self.mode, self.scale = mode, scale
        self.version = scene.version
        self.full = pygame.Surface(size)
        self.dim = pygame.Surface(size)
        self.now = pygame.Surface(size)
        self.last = self.full
        self.lit = np.zeros(len(scene.items), bool)
        self.ready = False
        self._pieces: dict[int, list[tuple[int, int, int, int]]] = {}
        boxes = np.empty_like(scene.rects)
        if len(boxes):
            boxes[:, 0] = (scene.rects[:, 0] - origin[0]) * zoom
            boxes[:, 1] = (scene.rects[:, 1] - origin[1]) * zoom
            boxes[:, 2:] = scene.rects[:, 2:] * zoom
        self.boxes = boxes
        inside = (
            (boxes[:, 0] < size[0])
            & (boxes[:, 1] < size[1])
            & (boxes[:, 0] + boxes[:, 2] > 0)
            & (boxes[:, 1] + boxes[:, 3] > 0)
        )
        self.visible = np.flatnonzero(inside)
        self._is_visible = inside
        self._wires_of: dict[int, list[int]] = {}
        self._seconds = scene.item_seconds()
        self._tints = self._heat_tints()
        self._job = self._draw()

    # -- public ------------------------------------------------------------------------------------------------------
    def work(self, budget: float) -> bool:
        """Draw for about ``budget`` seconds; True when finished."""
        end = time.perf_counter() + budget
        while not self.ready and time.perf_counter() < end:
            if next(self._job, None) is None:
                self.ready = True
        return self.ready

    def finish(self) -> None:
        """Draw to the end at once."""
        while not self.ready:
            self.work(1.0)

    def show(self, moment: Moment | None) -> pygame.Surface:
        """The picture at a moment (everything finished when None). Only what changed since the last call is copied."""
        if moment is None:
            self.last = self.full
            return self.full
        self.last = self.now
        lit = moment.state != 0
        changed = np.flatnonzero(lit != self.lit)
        if len(changed):
            on = changed[lit[changed]]
            off = changed[~lit[changed]]
            if len(off) > 40 and len(off) > len(self.lit) // 3:
                self.now.blit(self.dim, (0, 0))
                on, off = np.flatnonzero(lit), off[:0]
            if len(off):
                self.now.blits(self._stamps(off, self.dim), doreturn=False)
            if len(on):
                self.now.blits(self._stamps(on, self.full), doreturn=False)
            self.lit = lit.copy()
        return self.now

    def cards(self, items: Iterable[int]) -> list[Stamp]:
        """The rectangles of some cards as last shown, without what is around them."""
        out: list[Stamp] = []
        for i in items:
            if self._is_visible[i]:
                x, y, w, h = self.boxes[i]
                r = (round(x), round(y), round(w) + 1, round(h) + 1)
                out.append((self.last, r[:2], r))
        return out

    def to_px(self, x: float, y: float) -> tuple[float, float]:
        """Page point to pixel of the layer."""
        return (x - self.origin[0]) * self.zoom, (y - self.origin[1]) * self.zoom

    # -- stamps ------------------------------------------------------------------------------------------------------
    def _stamps(self, items: np.ndarray, source: pygame.Surface) -> list[Stamp]:
        out: list[Stamp] = []
        z = max(1.0, self.zoom)
        for i in items:
            for w in self._wires_of.get(int(i), ()):
                pieces = self._pieces.get(w)
                if pieces is None:
                    pieces = self._pieces[w] = self._wire_pieces(w)
                out.extend((source, r[:2], r) for r in pieces)
            if self._is_visible[i]:
                x, y, w_, h_ = self.boxes[i]
                r = (int(x - 2), int(y - 2), int(w_ + 5 + 3 * z), int(h_ + 4 + 4 * z))
                out.append((source, r[:2], r))
        return out

    def _wire_pieces(self, w: int) -> list[tuple[int, int, int, int]]:
        pts = (self.scene.polylines[w] - self.origin) * self.zoom
        step = np.hypot(*np.diff(pts, axis=0).T)
        n = np.maximum(1, np.ceil(step / 9.0)).astype(int)
        if n.sum() > 600:
            return []
        out = []
        pad = 2 + math.ceil(self.zoom)
        for a, b, k in zip(pts, pts[1:], n):
            for j in range(k):
                p, q = a + (b - a) * (j / k), a + (b - a) * ((j + 1) / k)
                x0, y0 = min(p[0], q[0]) - pad, min(p[1], q[1]) - pad
                x1, y1 = max(p[0], q[0]) + pad, max(p[1], q[1]) + pad
                x0, y0 = max(0, int(x0)), max(0, int(y0))
                if x1 > x0 and y1 > y0:
                    out.append((x0, y0, int(x1) - x0, int(y1) - y0))
        return out

    # -- drawing -----------------------------------------------------------------------------------------------------
    def _heat_tints(self) -> dict[int, tuple[int, int, int]]:
        if self.mode == "op":
            return {}
        values = self._seconds if self.mode == "time" else self.scene.item_bytes()
        top = float(values.max()) if len(values) else 0.0
        if top <= 0:
            return {}
        level = np.sqrt(values / top)  # square root: the eye should see the second-hottest too
        cold = mix(PANEL, TEXT, 0.12)
        return {i: heat(float(v)) if v > 0.01 else cold for i, v in enumerate(level)}

    def _draw(self) -> Iterator[bool]:
        scene, k, (width, height) = self.scene, self.scale, self.size
        lines = [(p - self.origin) * (self.zoom * k) for p in scene.polylines]
        boxes = (scene.wire_boxes - np.tile(self.origin, 2)) * self.zoom
        for w, wire in enumerate(scene.page.wires):
            if (
                not wire.cross
                and boxes[w, 2] > 0
                and boxes[w, 0] < width
                and boxes[w, 3] > 0
                and boxes[w, 1] < height
            ):
                self._wires_of.setdefault(wire.source, []).append(w)
        yield True
        scratch = pygame.Surface((width * k, min(BAND, height) * k))
        for top in range(0, height, BAND):
            tall = min(BAND, height - top)
            band = scratch.subsurface((0, 0, width * k, tall * k))
            band.fill(BG)
            self._grid(band, top, tall)
            self._frames(band, top, tall)
            yield True
            near = np.flatnonzero(
                (boxes[:, 3] >= top - 4)
                & (boxes[:, 1] <= top + tall + 4)
                & (boxes[:, 2] >= 0)
                & (boxes[:, 0] <= width)
            )
            cross = [int(w) for w in near if scene.page.wires[w].cross]
            inner = [int(w) for w in near if not scene.page.wires[w].cross]
            busy = len(scene.page.wires) ** 0.5
            for count, wire_id in enumerate(cross):
                w = wire_id
                source = scene.items[scene.page.wires[w].source]
                same = source.phase == scene.page.wires[w].phase != "optimizer"
                # between staves only a hint: hovering a card shows its own
                faint = max(0.18, min(0.42, 7.0 / busy)) if same else max(0.03, min(0.10, 1.0 / busy))
                color = mix(BG, category(source.category), faint)
                ribbon(band, lines[w] - (0, top * k), color, max(0.9, 1.1 * self.zoom) * k)
                if count % 120 == 119:
                    yield True
            target = (0, top, width, tall)
            self._reduce(band, self.dim.subsurface(target))
            yield True
            for count, wire_id in enumerate(inner):
                w = wire_id
                item = scene.items[scene.page.wires[w].source]
                ribbon(
                    band,
                    lines[w] - (0, top * k),
                    mix(BG, category(item.category), 0.46),
                    max(0.9, self._thickness(item.head) * self.zoom) * k,
                )
                if count % 120 == 119:
                    yield True
            if self.zoom > 0.32:
                self._arrows(band, inner, lines, top)
            on_band = self.visible[
                (self.boxes[self.visible, 1] < top + tall + 6)
                & (self.boxes[self.visible, 1] + self.boxes[self.visible, 3] > top - 6)
            ]
            for count, i in enumerate(on_band):
                x, y, w_, h_ = self.boxes[i]
                self._card(band, int(i), (x, y - top, w_, h_))
                if count % 150 == 149:
                    yield True
            self._reduce(band, self.full.subsurface(target))
            yield True
        for count, i in enumerate(self.visible):
            box = self.boxes[i]
            paint_label(self.full, self.fonts, tuple(box), scene.items[i], self.zoom)
            if count % 40 == 39:
                yield True
        self._titles()
        yield True
        veil = self.full.copy()
        veil.set_alpha(PENDING_ALPHA)
        for top in range(0, height, BAND * 2):
            self.dim.blit(veil, (0, top), (0, top, width, BAND * 2))
            yield True
        self.now.blit(self.dim, (0, 0))

    def _reduce(self, band: pygame.Surface, target: pygame.Surface) -> None:
        if self.scale == 1:
            target.blit(band, (0, 0))
        else:
            pygame.transform.smoothscale(band, target.get_size(), target)

    def _grid(self, band: pygame.Surface, top: int, tall: int) -> None:
        step = 28.0
        while step * self.zoom < 20:
            step *= 2
        while step * self.zoom > 56:
            step /= 2
        px = step * self.zoom
        k = self.scale
        x0 = -((self.origin[0] % step) * self.zoom)
        y0 = -((self.origin[1] % step) * self.zoom)
        dot = max(1, round(1.2 * k))
        row = y0 + math.ceil((top - y0) / px) * px
        while row < top + tall:
            x = x0
            y = round((row - top) * k)
            while x < self.size[0]:
                band.fill(GRID, (round(x * k), y, dot, dot))
                x += px
            row += px

    def _frames(self, band: pygame.Surface, top: int, tall: int) -> None:
        page, z, k = self.scene.page, self.zoom, self.scale

        def box(r: tuple[float, float, float, float]) -> pygame.Rect | None:
            x, y = self.to_px(r[0], r[1])
            w, h = r[2] * z, r[3] * z
            if y > top + tall or y + h < top or x > self.size[0] or x + w < 0:
                return None
            return pygame.Rect(round(x * k), round((y - top) * k), max(1, round(w * k)), max(1, round(h * k)))

        for stave in page.staves:
            x, y, _, h = stave.rect
            r = box((x - 14 / z, y, 3 / z, h))
            if r:
                pygame.draw.rect(band, mix(BG, STAVE[stave.phase], 0.75), r, border_radius=k)
        for _, (x, y, w, h) in page.spans:
            mid = y + h
            r = box((x, mid, w, 2 / z))
            if r:
                pygame.draw.rect(band, mix(BG, MUTED, 0.35), (r.x, r.y, r.w, max(1, k)))
            for end in (x, x + w - 1.5 / z):
                r = box((end, mid, 1.5 / z, 8 / z))
                if r:
                    pygame.draw.rect(band, mix(BG, MUTED, 0.35), r)
        for cell in page.cells:
            r = box(cell.rect)
            if r:
                tint = STAVE[cell.phase]
                radius = int(12 * min(1.0, max(z, 0.35)) * k)
                pygame.draw.rect(band, mix(PANEL, tint, 0.035), r, border_radius=radius)
                pygame.draw.rect(
                    band, mix(LINE, tint, 0.16), r, max(1, k // 2 if z < 0.3 else k), border_radius=radius
                )
        for (phase, path), rect in sorted(page.groups.items(), key=lambda kv: len(kv[0][1])):
            r = box(rect)
            if r and r.h > 6 * k:
                depth = min(4, len(path))
                tint = STAVE[phase]
                radius = int(9 * min(1.0, z) * k)
                pygame.draw.rect(
                    band, mix(mix(PANEL, TEXT, 0.012 * depth), tint, 0.045), r, border_radius=radius
                )
                pygame.draw.rect(band, mix(LINE, tint, 0.10), r, max(1, k // 2), border_radius=radius)

    def _thickness(self, node: int) -> float:
        size = max(1, self.scene.model.nodes[node].size)
        return (1.0 + math.log10(size) * 0.35) * 0.62

    def _arrows(self, band: pygame.Surface, wires: list[int], lines: list[np.ndarray], top: int) -> None:
        h = 6.2 * self.zoom * self.scale
        last = {path[-1] for path in self.scene.page.paths.values() if path}
        for w in wires:
            if w not in last or len(lines[w]) < 2:
                continue
            (x1, y1), (x0, y0) = lines[w][-1] - (0, top * self.scale), lines[w][-2] - (0, top * self.scale)
            a = math.atan2(y1 - y0, x1 - x0)
            color = mix(BG, category(self.scene.items[self.scene.page.wires[w].source].category), 0.55)
            pygame.draw.polygon(
                band,
                color,
                [
                    (x1, y1),
                    (x1 - h * math.cos(a - 0.42), y1 - h * math.sin(a - 0.42)),
                    (x1 - h * math.cos(a + 0.42), y1 - h * math.sin(a + 0.42)),
                ],
            )

    def _card(self, band: pygame.Surface, i: int, box: tuple[float, float, float, float]) -> None:
        item = self.scene.items[i]
        k, z = self.scale, self.zoom
        paint_card(band, k, box, item, z, self._tints.get(i))
        top = float(self._seconds.max()) if len(self._seconds) else 0.0
        if self.mode == "op" and top > 0 and self._seconds[i] > 0.01 * top and box[3] >= PLAIN_BELOW:
            level = min(1.0, float(self._seconds[i]) / top)
            x, y, w, h = box
            gap = (5.5 if item.copies > 1 or item.kind == "group" else 2.5) * z
            bar = pygame.Rect(
                round((x + 8 * z) * k),
                round((y + h + gap) * k),
                max(k, round((w - 16 * z) * math.sqrt(level) * k)),
                max(k, round(2.2 * z * k)),
            )
            pygame.draw.rect(band, heat(math.sqrt(level)), bar, border_radius=k)

    def _titles(self) -> None:
        page, z = self.scene.page, self.zoom
        counts: dict[tuple[str, int], int] = {}
        spent: dict[tuple[str, int], float] = {}
        head = page.head
        for cell in page.cells:
            number = next(
                (
                    s.system
                    for s in page.staves
                    if s.phase == cell.phase and s.rect[1] - 1 <= cell.rect[1] <= s.rect[1] + s.rect[3]
                ),
                0,
            )
            seconds = self.scene.cell_seconds(self._seconds, cell.items)
            counts[cell.phase, number] = counts.get((cell.phase, number), 0) + sum(
                len(self.scene.items[i].nodes) for i in cell.items
            )
            spent[cell.phase, number] = spent.get((cell.phase, number), 0.0) + seconds
            x, y = self.to_px(cell.rect[0], cell.rect[1])
            w = cell.rect[2] * z
            px = min(15.0, max(8.0, head * z * 0.46))
            pad = min(14.0, head * 0.5 * z)
            room = w - 2 * pad
            tint = STAVE[cell.phase]
            note = time_text(seconds) if seconds > 0 else ""
            note_w = self.fonts.width(note, round(px * 0.85), MONO, REGULAR) if note else 0
            title = self.fonts.fit(cell.title, round(px), room - note_w - (10 if note else 0), UI, SEMIBOLD)
            if title != cell.title:
                title, note = self.fonts.fit(cell.title, round(px), room, UI, SEMIBOLD), ""
            cy = y + min(head * z * 0.6, 22.0)
            if cell.rect[3] * z > 16 and (len(title) > 2 or title == cell.title):
                self._put(title, x + pad, cy, px, mix(MUTED, tint, 0.35), UI, SEMIBOLD, "lc")
                if note:
                    self._put(note, x + w - pad, cy, px * 0.85, FAINT, MONO, REGULAR, "rc")
        for (phase, path), rect in page.groups.items():
            x, y = self.to_px(rect[0], rect[1])
            px = min(13.0, 10.5 * z + 0.6)
            if px >= LABEL_BELOW:
                name = self.fonts.fit(path[-1], round(px), rect[2] * z - 14 * z, UI, SEMIBOLD)
                self._put(name, x + 9 * z, y + 12 * z, px, mix(MUTED, STAVE[phase], 0.25), UI, SEMIBOLD, "lc")
        for stave in page.staves:
            x, y = self.to_px(stave.rect[0], stave.rect[1])
            title = STAVE_TITLE[stave.phase]
            px = 10.5
            self._put(title, x - 12, y - 12, px, mix(BG, STAVE[stave.phase], 0.95), UI, BOLD, "lc")
            n, seconds = (
                counts.get((stave.phase, stave.system), 0),
                spent.get((stave.phase, stave.system), 0.0),
            )
            note = f"{n} nodes"
            if stave.phase == "gradient":
                note = f"flows right to left · {note}"
            if seconds > 0:
                note += f" · {time_text(seconds)}"
            left = x + self.fonts.width(title, round(px), UI, BOLD) + 2
            self._put(note, left, y - 12, px, FAINT, MONO, REGULAR, "lc")
        for title, (x, y, w, h) in page.spans:
            px_x, px_y = self.to_px(x + w / 2, y + h)
            self._put(
                title,
                px_x,
                px_y - 9,
                min(13.0, max(9.0, head * z * 0.4)),
                mix(MUTED, TEXT, 0.2),
                UI,
                SEMIBOLD,
                "cc",
            )

    def _put(
        self,
        text: str,
        x: float,
        y: float,
        px: float,
        color: tuple[int, int, int],
        kind: str,
        weight: int,
        anchor: str,
    ) -> None:
        if not text or not (-400 < x < self.size[0] + 400 and -30 < y < self.size[1] + 30):
            return
        label = self.fonts.render(text, round(px), color, kind, weight)
        dx = 0.0 if anchor[0] == "l" else label.get_width() / 2 if anchor[0] == "c" else label.get_width()
        at = (round(x - dx), round(y - label.get_height() / 2))
        self.full.blit(label, at)
        self.dim.blit(label, at)


def state_word(state: int) -> str:
    """``pending``, ``running`` or ``done``."""
    return {ACTIVE: "running", DONE: "done"}.get(int(state), "pending")
