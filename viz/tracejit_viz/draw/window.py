"""One frame of the window: graph, overlay, panels, sheets. Called by ``app`` each frame and by ``export`` for pictures.

Holds no event handling: it draws a :class:`UiState` and a :class:`Scene`, and can say what lies under a point.
"""

from __future__ import annotations

import numpy as np
import pygame

from ..camera import Camera
from ..labels import time_text
from ..scene import Moment, Scene
from ..ui import Action, Regions, UiState, divide
from .canvas import Sprites
from .graphview import GraphView
from .inspector import Inspector
from .minimap import Minimap
from .overlay import Overlay, spotlight
from .sheets import Sheets
from .text import Fonts
from .theme import ACCENT, BG, FAINT, MUTED, TEXT, WARM, WHITE, mix
from .timeline import Timeline
from .topbar import TopBar


class Window:
    """All drawing of one window, on whatever surface it is given."""

    def __init__(self, fonts: Fonts | None = None) -> None:
        self.fonts = fonts or Fonts()
        self.sprites = Sprites(self.fonts)
        self.overlay = Overlay(self.fonts, self.sprites)
        self.topbar = TopBar(self.fonts)
        self.inspector = Inspector(self.fonts)
        self.timeline = Timeline(self.fonts)
        self.minimap = Minimap(self.fonts)
        self.sheets = Sheets(self.fonts, self.sprites)
        self.graph: GraphView | None = None
        self.regions: Regions = divide(1920, 1080)
        self.moment: Moment | None = None
        self._panels: object = (
            None  # what the panels on screen were drawn for; None when something lies over them
        )

    def layout(self, size: tuple[int, int], panels: str = "all") -> Regions:
        """Divide a window of this size."""
        self.regions = divide(size[0], size[1], panels)
        return self.regions

    @property
    def view(self) -> pygame.Rect:
        """The graph's part of the window."""
        return pygame.Rect(self.regions.view)

    def draw(
        self,
        screen: pygame.Surface,
        ui: UiState,
        scene: Scene | None,
        camera: Camera,
        clock: float,
        mouse: tuple[int, int] | None = None,
        budget: float = 0.006,
        calm: bool = False,
    ) -> list[pygame.Rect] | None:
        """Draw one frame; returns what changed on ``screen``, None for all of it. ``clock`` (seconds) drives pulses.

        ``calm`` spares the processor: panels are looked at less often, and what is still on screen is left alone.
        """
        self.layout(screen.get_size(), ui.panels)
        view = self.view
        covered = bool(ui.sheet) or ui.hovered is not None or (bool(ui.toast) and clock < ui.toast_until)
        panels = (
            None if covered else (id(screen), screen.get_size(), ui.panels, ui.mode, id(scene), ui.scroll)
        )
        kept = calm and panels is not None and panels == self._panels
        self._panels = panels
        if scene is None:
            screen.fill(BG, view)
            self._empty(screen, ui, view)
            self.moment = None
        else:
            self._graph(screen, ui, scene, camera, clock, view, budget)
            if ui.hovered is not None and mouse is not None and not ui.sheet:
                self.sheets.hover(screen, scene, ui.hovered, mouse, view)
        screen.set_clip(None)
        changed = [view]
        if not kept:
            self.sheets.legend(screen, self.regions.legend, ui)
        changed.append(self.timeline.draw(screen, self.regions.timeline, ui, clock, kept=kept))
        side = self.regions.side
        map_height = self.minimap.height(side[2], scene) if side[2] and scene is not None else 0
        if side[3] < map_height + 240:
            map_height = 0
        told = self.inspector.draw(screen, side, ui, scene, clock, map_height, calm=calm, kept=kept)
        if told:
            changed.append(pygame.Rect(side))
        if map_height and scene is not None:
            area = pygame.Rect(side[0] + 1, side[1] + side[3] - map_height, side[2] - 1, map_height)
            if self.minimap.draw(screen, area, scene, self.moment, camera, view, kept=kept and not told):
                changed.append(area)
        else:
            self.minimap.rect = pygame.Rect(0, 0, 0, 0)
        if self.topbar.draw(screen, self.regions.top, ui, clock, calm=calm, kept=kept):
            changed.append(pygame.Rect(self.regions.top))
        if ui.toast and clock < ui.toast_until:
            self.sheets.toast(screen, ui.toast, view)
        if ui.sheet == "help":
            self.sheets.help(screen)
        elif ui.sheet == "code":
            self.sheets.code(screen, ui)
        return changed if kept else None

    def _graph(
        self,
        screen: pygame.Surface,
        ui: UiState,
        scene: Scene,
        camera: Camera,
        clock: float,
        view: pygame.Rect,
        budget: float,
    ) -> None:
        if self.graph is None or self.graph.scene is not scene:
            self.graph = GraphView(scene, self.fonts, view)
        if self.graph.rect != view:
            self.graph.rect = view
            self.graph.front = self.graph.back = None
        self.graph.mode = ui.mode
        scene.use_step(ui.step)
        self.moment = scene.moment(ui.t) if ui.step is not None else None
        self.graph.prepare(camera, clock, budget)
        lit = self._highlight(ui, scene)
        shown = spotlight(scene, lit) if lit is not None else (self.moment if ui.mode == "op" else None)
        self.graph.draw(screen, camera, shown)
        if self.graph.front is None:  # thousands of cards at once: over the next frames
            note = self.fonts.render(
                f"drawing {len(scene.page.items):,} cards …".replace(",", " "), 14, MUTED
            )
            screen.blit(note, note.get_rect(center=view.center))
            return
        screen.set_clip(view)
        o = self.overlay
        arriving = o.arriving(scene, self.moment) if self.moment is not None and lit is None else []
        o.edges(screen, scene, arriving, camera, view, None, 0.9)
        bold: list[tuple[int, int]] = []
        if lit is not None and ui.path:
            inside = set(lit)
            bold = [e for e in scene.page.paths if e[0] in inside and e[1] in inside][:900]
            o.edges(screen, scene, bold, camera, view, ACCENT, 0.8, limit=900)
        elif ui.selected is not None and ui.selected in scene.page.items:
            bold = self._touching(scene, ui.selected)
            o.edges(screen, scene, bold, camera, view, ACCENT, 0.75)
        if ui.hovered is not None and ui.hovered in scene.page.items and ui.hovered != ui.selected:
            near = self._touching(scene, ui.hovered)
            o.edges(screen, scene, near, camera, view)
            bold = bold + near
        crossed = o.crossed(scene, [*arriving, *bold[:300]])
        self.graph.restamp(screen, camera, crossed)
        if ui.hovered is not None and ui.hovered in scene.page.items and ui.hovered != ui.selected:
            o.outline(screen, scene, ui.hovered, camera, view, mix(BG, TEXT, 0.6), 1.2)
        for i in ui.matches if ui.query else ():
            o.outline(screen, scene, i, camera, view, mix(BG, ACCENT, 0.75), 1.3)
        if ui.kernel is not None and scene.session.kernels:
            members = scene.kernel_items(ui.kernel)
            for n, i in enumerate(members):
                o.outline(screen, scene, i, camera, view, WARM, 1.6)
                if n < 60:
                    o.badge(screen, scene, i, f"k{scene.session.kernels[ui.kernel].id}", camera, view)
        if ui.selected is not None and ui.selected in scene.page.items:
            for j in scene.partners(ui.selected)[:12]:
                if j in scene.page.items:
                    o.link(screen, scene, ui.selected, j, camera, view)
        o.tokens(screen, scene, arriving, camera, view, clock, crossed)
        if self.moment is not None and lit is None and len(self.moment.active):
            o.running(
                screen,
                scene,
                self.moment,
                camera,
                view,
                clock,
                ui.session.device if ui.session else "",
                self._flags(ui, scene),
            )
        if ui.selected is not None and ui.selected in scene.page.items:
            o.outline(screen, scene, ui.selected, camera, view, ACCENT, 1.8)
        if ui.second is not None and ui.second in scene.page.items:
            o.outline(screen, scene, ui.second, camera, view, WHITE, 1.8)
        if ui.query and ui.matches:
            o.outline(screen, scene, ui.matches[ui.match % len(ui.matches)], camera, view, WHITE, 1.8)
        if ui.step is not None and ui.step.nan_node is not None:
            bad = scene.item_of(ui.step.nan_node)
            if bad is not None:
                o.alarm(screen, scene, bad, camera, view, clock)
        screen.set_clip(None)

    def _highlight(self, ui: UiState, scene: Scene) -> list[int] | None:
        """Cards to spotlight, None when the whole graph is shown in its normal state."""
        if ui.path and ui.selected is not None:
            if ui.path == "between" and ui.second is not None:
                return list(scene.between(ui.selected, ui.second) or {ui.selected, ui.second})
            if ui.path == "ancestors":
                return list(scene.ancestors(ui.selected))
            if ui.path == "descendants":
                return list(scene.descendants(ui.selected))
        if ui.query and ui.matches:
            return list(ui.matches)
        if ui.kernel is not None and scene.session.kernels:
            return scene.kernel_items(ui.kernel)
        return None

    def _touching(self, scene: Scene, item: int) -> list[tuple[int, int]]:
        pairs = [(a, item) for a in scene.in_edges.get(item, ())]
        return pairs + [(item, b) for b in scene.out_edges.get(item, ())]

    def _flags(self, ui: UiState, scene: Scene) -> list[tuple[int, str]]:
        """One flag per running kernel (at most three), on the last visible card it computes."""
        step, s = ui.step, ui.session
        if step is None or s is None:
            return []
        out: list[tuple[int, str]] = []
        for k in np.flatnonzero((step.start <= ui.t) & (ui.t < step.end))[:3]:
            slot = s.slot.get(int(step.kernels[k]))
            if slot is None:
                continue
            for v in reversed(s.kernels[slot].nodes):
                i = scene.item_of(v)
                if i is not None and not scene.model.nodes[v].is_source:
                    out.append((i, time_text(float(step.end[k] - step.start[k]) * 1e-9)))
                    break
        return out

    def _empty(self, screen: pygame.Surface, ui: UiState, view: pygame.Rect) -> None:
        title = self.fonts.render("waiting for a traced program", 17, MUTED)
        note = self.fonts.render(ui.note or "run a function with watch=True", 12, FAINT)
        screen.blit(title, title.get_rect(center=(view.centerx, view.centery - 12)))
        screen.blit(note, note.get_rect(center=(view.centerx, view.centery + 16)))

    def action_at(self, pos: tuple[int, int]) -> Action | None:
        """The button under a point."""
        for zones in (self.topbar.zones, self.inspector.zones):
            for rect, action in zones:
                if rect.collidepoint(pos):
                    return action
        return None
