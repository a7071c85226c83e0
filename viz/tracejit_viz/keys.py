"""What each key does. Called by ``app``; ``ui.SHORTCUTS`` lists the same for the ``?`` sheet (a test compares them)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pygame

from .ui import PANELS

if TYPE_CHECKING:
    from .app import App

MODES = ("op", "time", "memory")
ZOOM_KEYS = {
    pygame.K_PLUS: 1,
    pygame.K_EQUALS: 1,
    pygame.K_KP_PLUS: 1,
    pygame.K_MINUS: -1,
    pygame.K_KP_MINUS: -1,
    pygame.K_0: 0,
}
SHOWS = ("forward", "gradient", "both")


def press(app: App, event: pygame.event.Event, now: float) -> None:
    """One key press."""
    key, text = event.key, event.unicode
    shift = bool(event.mod & pygame.KMOD_SHIFT)
    ui = app.ui
    if ui.typing:
        _type(app, event, now)
        return
    if ui.sheet and (key in (pygame.K_ESCAPE, pygame.K_RETURN) or text in ("?", "c", "C")):
        ui.sheet = ""
        return
    if key == pygame.K_ESCAPE:
        _escape(app)
    elif key == pygame.K_SPACE:
        app.toggle_play()
    elif key in (pygame.K_LEFT, pygame.K_RIGHT):
        by = 1 if key == pygame.K_RIGHT else -1
        app.step_record(by, now) if shift else app.step_kernel(by)
    elif key == pygame.K_HOME:
        app._seek(0.0)
    elif key == pygame.K_END:
        app._seek(ui.duration)
    elif key in (pygame.K_PAGEUP, pygame.K_PAGEDOWN):
        step = 12 if ui.sheet == "code" else 200
        sign = 1 if key == pygame.K_PAGEDOWN else -1
        if ui.sheet == "code":
            ui.code_scroll += sign * step
        else:
            ui.scroll += sign * step
    elif key == pygame.K_TAB:
        app.next_program(-1 if shift else 1)
    elif text == "?" or key == pygame.K_F1:
        ui.sheet = "help"
    elif text == "/":
        ui.typing = True
    elif event.mod & pygame.KMOD_CTRL and key in ZOOM_KEYS:
        scale = app.magnifier.step(ZOOM_KEYS[key])
        app.magnify(app.magnifier.window, scale)
        app.toast(f"size {100 * scale:.0f} %", now, 1.5)
    elif text in ("+", "="):
        app.faster(1, now)
    elif text in ("-", "−", "_"):
        app.faster(-1, now)
    elif key == pygame.K_f:
        app.fit(now, ui.selected if app._fitted and not app.camera.flying else None)
    elif key == pygame.K_l:
        app.follow()
    elif key == pygame.K_b:
        app.hold_program(now)
    elif key == pygame.K_o:
        app.step_program(now)
    elif key == pygame.K_g:
        app.set_show(SHOWS[(SHOWS.index(ui.show) + 1) % 3])
    elif key == pygame.K_h:
        ui.mode = MODES[(MODES.index(ui.mode) + 1) % 3]
        app.toast(
            {"op": "heat map off", "time": "heat map: time", "memory": "heat map: memory"}[ui.mode], now, 1.5
        )
    elif key == pygame.K_p:
        _path(app, now)
    elif key == pygame.K_k:
        _kernel(app, now)
    elif key == pygame.K_c:
        slot = ui.kernel if ui.kernel is not None else _selected_kernel(app)
        if slot is None:
            app.toast("select a card that ran in a kernel first", now)
        else:
            app.show_code(slot, now)
    elif key == pygame.K_v and ui.selected is not None and app.scene is not None:
        app.ask_values(app.scene.items[ui.selected].head, now)
    elif key == pygame.K_n:
        app.jump_to_nan(now)
    elif key == pygame.K_r and app.scene is not None:
        choices = app.scene.choices
        folded = bool(app.scene.arrangement.folds)
        choices.fold_repeats = not folded
        app.rebuild()
        app.toast("repeated blocks unfolded" if folded else "repeated blocks folded", now, 1.5)
    elif key == pygame.K_e and app.scene is not None:
        choices = app.scene.choices
        closed = any(it.kind == "group" for it in app.scene.items)
        choices.opened.clear()
        choices.closed.clear()
        choices.collapse = not closed
        app.rebuild()
        app.toast("composites opened" if closed else "composites collapsed", now, 1.5)
    elif key == pygame.K_m:
        ui.panels = PANELS[(PANELS.index(ui.panels) + 1) % 3]
        app.window.layout(app.screen.get_size(), ui.panels)
        if app._fitted:
            app.fit(None)
    elif key == pygame.K_s:
        app.toggle_gif(now) if shift else app.screenshot(now)


def _type(app: App, event: pygame.event.Event, now: float) -> None:
    ui = app.ui
    if event.key == pygame.K_ESCAPE:
        ui.typing = False
        app.search("")
    elif event.key in (pygame.K_RETURN, pygame.K_KP_ENTER):
        if len(ui.matches) and event.mod & pygame.KMOD_SHIFT:
            app.next_match(now, -1)
        else:
            app.next_match(
                now,
                1 if app.camera.zoom and ui.match >= 0 and getattr(app, "_searched", "") == ui.query else 0,
            )
        app._searched = ui.query  # type: ignore[attr-defined]
    elif event.key == pygame.K_BACKSPACE:
        app.search(ui.query[:-1])
    elif event.unicode and event.unicode.isprintable() and len(ui.query) < 60:
        app.search(ui.query + event.unicode)


def _escape(app: App) -> None:
    """Clear the most recent thing first."""
    ui = app.ui
    if ui.path:
        ui.path, ui.second = "", None
    elif ui.query:
        app.search("")
    elif ui.kernel is not None:
        ui.kernel = None
    else:
        ui.selected = ui.second = None


def _path(app: App, now: float) -> None:
    ui = app.ui
    if ui.selected is None:
        app.toast("select a card first", now)
        return
    ui.path = {"": "ancestors", "ancestors": "descendants", "descendants": "", "between": ""}[ui.path]
    ui.second = None
    if ui.path:
        app.toast({"ancestors": "what it depends on", "descendants": "what depends on it"}[ui.path], now, 1.5)


def _selected_kernel(app: App) -> int | None:
    ui = app.ui
    if ui.selected is None or app.scene is None or ui.session is None:
        return None
    slots = ui.session.slots_of(app.scene.items[ui.selected].nodes)
    return slots[-1] if slots else None


def _kernel(app: App, now: float) -> None:
    ui = app.ui
    slot = _selected_kernel(app)
    if slot is None:
        ui.kernel = None
        app.toast("select a card that ran in a kernel first", now)
        return
    ui.kernel = None if ui.kernel == slot else slot
