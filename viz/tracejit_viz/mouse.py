"""What the mouse does in the window: buttons, panning, dragging, the wheel, clicks on cards. A part of ``app.App``."""

from __future__ import annotations

import pygame

from .actions import Actions
from .model import FORWARD, GRADIENT, OPTIMIZER


class Mouse(Actions):
    """The state of the pointer and what it touches."""

    mouse: tuple[int, int] | None
    _drag: str
    _drag_from: tuple[int, int]
    _moved: bool
    _last_click: tuple[float, tuple[int, int]]

    def _page_at(self, pos: tuple[int, int]) -> tuple[float, float]:
        v = self.window.view
        return self.camera.to_page(pos[0] - v.centerx, pos[1] - v.centery)

    def _press(self, pos: tuple[int, int], button: int, now: float) -> None:
        self.mouse = pos
        self._drag_from, self._moved = pos, False
        if self.ui.sheet:
            self._drag = "sheet"
            return
        action = self.window.action_at(pos)
        if button == 1 and action is not None:
            self._drag = "speed" if action[0] == "speed" else "button"
            if action[0] == "speed":
                self._set_speed(self.window.topbar.speed_at(pos[0]))
        elif self.window.timeline.rect.collidepoint(pos) and self.ui.step is not None:
            self._drag = "time"
            self._seek(self.window.timeline.t_of(pos[0]))
        elif self.window.minimap.rect.inflate(12, 12).collidepoint(pos) and self.scene is not None:
            self._drag = "map"
            self._map_to(pos)
        elif self.window.view.collidepoint(pos):
            self._drag = "pan"
        else:
            self._drag = ""

    def _motion(self, pos: tuple[int, int], rel: tuple[int, int]) -> None:
        self.mouse = pos
        if abs(pos[0] - self._drag_from[0]) + abs(pos[1] - self._drag_from[1]) > 4:
            self._moved = True
        if self._drag == "pan" and self._moved:
            self.camera.pan(*rel)
            self._fitted = False
        elif self._drag == "time":
            self._seek(self.window.timeline.t_of(pos[0]))
        elif self._drag == "map":
            self._map_to(pos)
        elif self._drag == "speed":
            self._set_speed(self.window.topbar.speed_at(pos[0]))
        elif not self._drag and self.scene is not None:
            inside = self.window.view.collidepoint(pos) and not self.ui.sheet
            self.ui.hovered = (
                self.scene.at(*self._page_at(pos), slack=2 / self.camera.zoom) if inside else None
            )

    def _release(self, pos: tuple[int, int], button: int, now: float) -> None:
        drag, self._drag = self._drag, ""
        if drag == "sheet":
            self.ui.sheet = ""
        elif drag == "button":
            action = self.window.action_at(pos)
            if action is not None:
                self.act(action[0], action[1], now)
        elif drag == "pan" and not self._moved and self.scene is not None:
            then, where = self._last_click
            double = now - then < 0.35 and abs(pos[0] - where[0]) + abs(pos[1] - where[1]) < 8
            self._last_click = (now, pos)
            shift = bool(pygame.key.get_mods() & pygame.KMOD_SHIFT)
            self.click(pos, shift=shift, double=double, now=now)

    def _wheel(self, event: pygame.event.Event, now: float) -> None:
        pos = self.mouse or (0, 0)
        if self.ui.sheet == "code":
            self.ui.code_scroll -= 3 * event.y
            return
        side = pygame.Rect(self.window.regions.side)
        if side.collidepoint(pos):
            self.ui.scroll = max(0, self.ui.scroll - 40 * event.y)
            return
        v = self.window.view
        if v.collidepoint(pos):
            self.camera.zoom_at(1.16**event.y, pos[0] - v.centerx, pos[1] - v.centery)
            self._fitted = False

    def click(self, pos: tuple[int, int], *, shift: bool, double: bool, now: float) -> None:
        """A click on the graph: select, path between two, open or close a scope."""
        assert self.scene is not None
        ui, at = self.ui, self._page_at(pos)
        item = self.scene.at(*at, slack=2 / self.camera.zoom)
        if double:
            self._toggle_scope(item, at, now)
        elif item is None:
            ui.selected = ui.second = ui.kernel = None
            ui.path = ""
        elif shift and ui.selected is not None and item != ui.selected:
            ui.second, ui.path = item, "between"
            if not self.scene.between(ui.selected, item):
                self.toast("no path between these two", now)
        else:
            ui.selected, ui.second, ui.scroll = item, None, 0
            if ui.path == "between":
                ui.path = ""

    def _toggle_scope(self, item: int | None, at: tuple[float, float], now: float) -> None:
        assert self.scene is not None
        scene, choices = self.scene, self.scene.choices
        if item is not None and scene.items[item].kind == "group":
            it = scene.items[item]
            for g in _both(it.phase, it.group):
                choices.closed.discard(g)
                choices.opened.add(g)
            self.ui.selected = None
        elif item is None:
            group = scene.group_at(*at)
            if group is None or group not in scene.arrangement.collapsible:
                return
            for g in _both(*group):
                choices.opened.discard(g)
                choices.closed.add(g)
        else:
            return
        self.rebuild(keep=at)


def _both(phase: str, path: tuple[str, ...]) -> list[tuple[str, tuple[str, ...]]]:
    """A scope and its other half: forward and gradient are opened and closed together."""
    return [(phase, path)] if phase == OPTIMIZER else [(FORWARD, path), (GRADIENT, path)]
