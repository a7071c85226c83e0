"""The window driven by events, with the dummy video driver: every key, clicks, drags, wheel, resizing."""

from __future__ import annotations

import time

import pygame
import pytest
import synth
from conftest import session_of

from tracejit_viz import keys
from tracejit_viz.app import App
from tracejit_viz.history import Session, Trainer
from tracejit_viz.magnify import default_scale
from tracejit_viz.ui import SHORTCUTS, divide


class Driver:
    """An app with a clock the test turns."""

    def __init__(self, trainers, size=(1280, 800)) -> None:
        pygame.display.init()
        pygame.font.init()
        self.now = 100.0
        self.screen = pygame.display.set_mode(size, pygame.RESIZABLE)
        self.app = App(self.screen, trainers=trainers, clock=lambda: self.now)
        self.frame()

    def frame(self, *events, dt: float = 0.016) -> None:
        self.now += dt
        self.app.frame(list(events))

    def key(self, key: int, text: str = "", mod: int = 0) -> None:
        self.frame(pygame.event.Event(pygame.KEYDOWN, key=key, unicode=text, mod=mod))

    def type(self, text: str) -> None:
        for c in text:
            self.key(0, c)

    def click(self, pos, double: bool = False) -> None:
        for _ in range(2 if double else 1):
            self.frame(pygame.event.Event(pygame.MOUSEBUTTONDOWN, pos=pos, button=1))
            self.frame(pygame.event.Event(pygame.MOUSEBUTTONUP, pos=pos, button=1))

    def drag(self, a, b) -> None:
        self.frame(pygame.event.Event(pygame.MOUSEBUTTONDOWN, pos=a, button=1))
        half = ((a[0] + b[0]) // 2, (a[1] + b[1]) // 2)
        self.frame(
            pygame.event.Event(
                pygame.MOUSEMOTION, pos=half, rel=(half[0] - a[0], half[1] - a[1]), buttons=(1, 0, 0)
            )
        )
        self.frame(
            pygame.event.Event(
                pygame.MOUSEMOTION, pos=b, rel=(b[0] - half[0], b[1] - half[1]), buttons=(1, 0, 0)
            )
        )
        self.frame(pygame.event.Event(pygame.MOUSEBUTTONUP, pos=b, button=1))

    def at(self, item: int) -> tuple[int, int]:
        """Screen position of a card's centre."""
        x, y, w, h = self.app.scene.rects[item]
        sx, sy = self.app.camera.to_view(x + w / 2, y + h / 2)
        v = self.app.window.view
        return round(v.centerx + sx), round(v.centery + sy)

    def settle(self, seconds: float = 0.8) -> None:
        for _ in range(int(seconds / 0.05)):
            self.frame(dt=0.05)


@pytest.fixture
def driver(small_trainer):
    return Driver([small_trainer])


def visible(driver: Driver, **want) -> int:
    scene = driver.app.scene
    return next(int(i) for i in scene.shown if all(getattr(scene.items[i], k) == v for k, v in want.items()))


def test_play_pause_and_speed(driver):
    ui = driver.app.ui
    assert ui.playing and ui.t > 0
    driver.key(pygame.K_SPACE)
    t = ui.t
    driver.settle()
    assert not ui.playing and ui.t == t
    driver.key(pygame.K_SPACE)
    speed = ui.speed
    driver.key(0, "+")
    assert ui.speed > speed
    driver.key(0, "-")
    assert ui.speed == speed
    before = ui.t
    driver.frame(dt=0.05)
    assert ui.t == pytest.approx(before + 0.05 * 1e9 * speed, rel=1e-6)


def test_replay_ends_waits_and_starts_again(driver):
    ui = driver.app.ui
    ui.t = ui.duration - 1
    driver.frame(dt=0.1)
    assert ui.t == ui.duration
    driver.frame(dt=0.1)
    assert ui.t == ui.duration
    driver.settle(1.2)
    assert ui.t < ui.duration


def test_kernel_and_step_keys(driver):
    ui, session = driver.app.ui, driver.app.ui.session
    driver.key(pygame.K_HOME)
    assert ui.t == 0 and not ui.playing
    driver.key(pygame.K_RIGHT)
    step = ui.step
    assert step.start[0] < ui.t < step.end[0]
    driver.key(pygame.K_RIGHT)
    assert step.start[1] < ui.t < step.end[1]
    driver.key(pygame.K_LEFT)
    assert step.start[0] < ui.t < step.end[0]
    driver.key(pygame.K_END)
    assert ui.t == ui.duration
    driver.key(pygame.K_LEFT, mod=pygame.KMOD_SHIFT)
    assert ui.step is session.steps[-2]
    driver.key(pygame.K_RIGHT, mod=pygame.KMOD_SHIFT)
    assert ui.step is session.steps[-1]


def test_click_selects_hover_shows_and_escape_clears(driver):
    i = visible(driver, kind="node", category="contraction")
    pos = driver.at(i)
    driver.frame(pygame.event.Event(pygame.MOUSEMOTION, pos=pos, rel=(1, 1), buttons=(0, 0, 0)))
    assert driver.app.ui.hovered == i
    driver.click(pos)
    assert driver.app.ui.selected == i
    assert f"#{driver.app.scene.items[i].head}" in pygame.display.get_caption()[0]
    driver.key(pygame.K_ESCAPE)
    assert driver.app.ui.selected is None


def test_clicking_empty_ground_deselects(driver):
    driver.app.ui.selected = 0
    v = driver.app.window.view
    driver.click((v.x + 3, v.bottom - 4))
    assert driver.app.ui.selected is None


def test_paths(driver, monkeypatch):
    app = driver.app
    (a, b), _ = next(iter(app.scene.page.paths.items()))
    driver.click(driver.at(a))
    driver.key(pygame.K_p)
    assert app.ui.path == "ancestors"
    driver.key(pygame.K_p)
    assert app.ui.path == "descendants"
    driver.key(pygame.K_p)
    assert app.ui.path == ""
    monkeypatch.setattr(pygame.key, "get_mods", lambda: pygame.KMOD_SHIFT)
    driver.click(driver.at(b))
    assert app.ui.path == "between" and app.ui.second == b
    assert set(app.window._highlight(app.ui, app.scene)) >= {a, b}


def test_search_by_typing(driver):
    ui = driver.app.ui
    driver.key(0, "/")
    assert ui.typing
    driver.type("dot_general")
    assert ui.query == "dot_general" and ui.matches
    driver.key(pygame.K_RETURN)
    driver.key(pygame.K_RETURN)
    driver.key(pygame.K_BACKSPACE)
    assert ui.query == "dot_genera"
    driver.key(pygame.K_ESCAPE)
    assert not ui.typing and not ui.query and not ui.matches


def test_wheel_zooms_at_the_pointer_and_drag_pans(driver):
    app = driver.app
    pos = driver.at(visible(driver, kind="node"))
    driver.frame(pygame.event.Event(pygame.MOUSEMOTION, pos=pos, rel=(0, 0), buttons=(0, 0, 0)))
    before, zoom = app._page_at(pos), app.camera.zoom
    driver.frame(pygame.event.Event(pygame.MOUSEWHEEL, x=0, y=3))
    assert app.camera.zoom > zoom * 1.4
    assert app._page_at(pos) == pytest.approx(before)
    x = app.camera.x
    driver.drag(pos, (pos[0] + 120, pos[1] + 40))
    assert app.camera.x == pytest.approx(x - 120 / app.camera.zoom)
    driver.key(pygame.K_f)
    driver.settle()
    assert app.camera.zoom == pytest.approx(zoom)


def test_zoomed_picture_becomes_sharp(driver):
    app = driver.app
    driver.settle()
    assert app.window.graph.sharp
    pos = driver.at(visible(driver, kind="node"))
    driver.frame(pygame.event.Event(pygame.MOUSEMOTION, pos=pos, rel=(0, 0), buttons=(0, 0, 0)))
    driver.frame(pygame.event.Event(pygame.MOUSEWHEEL, x=0, y=5))
    assert app.window.graph.front.zoom != app.camera.zoom  # the old picture, scaled
    for _ in range(200):
        driver.frame(dt=0.05)
        if app.window.graph.front.zoom == app.camera.zoom and app.window.graph.sharp:
            break
    assert app.window.graph.front.zoom == app.camera.zoom


def test_timeline_drag_moves_the_playhead(driver):
    app = driver.app
    r = app.window.timeline.rect
    driver.drag((r.x + 200, r.y + 60), (r.x + 500, r.y + 60))
    assert not app.ui.playing
    assert app.ui.t == pytest.approx(app.window.timeline.t_of(r.x + 500))
    assert app.window.timeline.x_of(app.ui.t) == pytest.approx(r.x + 500, abs=1)


def test_minimap_click_moves_the_camera(driver):
    app = driver.app
    r = app.window.minimap.rect
    assert r.w > 0
    pos = (r.x + r.w // 4, r.y + r.h // 2)
    driver.click(pos)
    assert (app.camera.x, app.camera.y) == pytest.approx(app.window.minimap.page_point(pos))


def test_forward_gradient_both(driver):
    app = driver.app
    everything = len(app.scene.shown)
    driver.key(pygame.K_g)
    assert app.ui.show == "forward" and {app.scene.items[i].phase for i in app.scene.shown} == {"forward"}
    driver.key(pygame.K_g)
    assert app.ui.show == "gradient" and "forward" not in {app.scene.items[i].phase for i in app.scene.shown}
    driver.key(pygame.K_g)
    assert len(app.scene.shown) == everything


def test_buttons_of_the_bar(driver):
    app = driver.app
    zones = {
        action[0] if action[0] != "show" else f"show {action[1]}": rect
        for rect, action in app.window.topbar.zones
    }
    driver.click(zones["show gradient"].center)
    assert app.ui.show == "gradient"
    playing = app.ui.playing
    driver.click(zones["play"].center)
    assert app.ui.playing != playing
    driver.click(zones["search"].center)
    assert app.ui.typing
    driver.key(pygame.K_ESCAPE)
    slider = app.window.topbar.slider
    driver.drag((slider.x + 10, slider.centery), (slider.right, slider.centery))
    assert app.ui.speed == 1.0


def test_double_click_closes_and_opens_a_scope(driver):
    app = driver.app
    before = len(app.scene.items)
    cell = next(c for c in app.scene.page.cells if c.phase == "forward" and len(c.items) > 3)
    x, y = app.camera.to_view(cell.rect[0] + 12, cell.rect[1] + cell.rect[3] - 8)
    v = app.window.view
    driver.click((round(v.centerx + x), round(v.centery + y)), double=True)
    assert len(app.scene.items) < before
    driver.settle()
    card = next(
        i
        for i in app.scene.shown
        if app.scene.items[i].group == cell.column and app.scene.items[i].phase == "forward"
    )
    driver.now += 1
    driver.click(driver.at(int(card)), double=True)
    assert len(app.scene.items) == before


def test_expand_and_fold_keys(grad_session):
    driver = Driver([Trainer("t", {1: grad_session}, 1)])
    cards = len(driver.app.scene.items)
    driver.key(pygame.K_e)
    assert len(driver.app.scene.items) > cards and not any(i.kind == "group" for i in driver.app.scene.items)
    driver.key(pygame.K_e)
    assert len(driver.app.scene.items) <= cards
    driver.key(pygame.K_r)
    driver.key(pygame.K_r)


def test_a_big_graph_is_laid_out_behind_the_window():
    """Thousands of nodes: the window goes on, says what it waits for, and shows the newest wish in the end."""
    session = Session({"graph": synth.chain_graph(3200)})
    driver = Driver([Trainer("t", {1: session}, 1)])
    app = driver.app
    before = app.scene
    cards = len(before.items)

    def wait() -> None:
        end = time.monotonic() + 60
        while app._layout is not None and time.monotonic() < end:
            driver.frame(dt=0.1)
            time.sleep(0.005)

    driver.key(pygame.K_e)
    assert (
        app.scene is before and "laying out 3 200 nodes" in app.ui.toast
    )  # at once: nothing has changed yet
    driver.frame()
    wait()
    assert app.scene is not before and len(app.scene.items) > cards
    assert not any(it.kind == "group" for it in app.scene.items)
    driver.key(pygame.K_e)
    driver.key(pygame.K_e)  # a second thought before the first is ready
    wait()
    assert app.scene.choices.collapse is app.scene.relaid().choices.collapse
    assert driver.app.window.graph.scene is app.scene


def test_heat_maps_and_panels(driver):
    app = driver.app
    for mode in ("time", "memory", "op"):
        driver.key(pygame.K_h)
        assert app.ui.mode == mode
        driver.settle(0.4)
    side = app.window.regions.side[2]
    line = app.window.regions.timeline[3]
    sizes = []
    for _ in range(3):
        driver.key(pygame.K_m)
        sizes.append((app.window.regions.side[2], app.window.regions.timeline[3]))
    assert side > 0 and line > 0 and sizes == [(0, line), (0, 0), (side, line)]


def test_kernel_overlay_and_code(driver):
    app = driver.app
    i = visible(driver, kind="node", category="contraction")
    driver.click(driver.at(i))
    driver.key(pygame.K_k)
    slot = app.ui.kernel
    assert i in app.scene.kernel_items(slot)
    driver.key(pygame.K_c, "c")
    assert app.ui.sheet == "code" and "define void" in app.ui.code
    driver.frame(pygame.event.Event(pygame.MOUSEWHEEL, x=0, y=-5))
    driver.key(pygame.K_ESCAPE)
    assert app.ui.sheet == ""


def test_help_lists_every_key(driver):
    driver.key(0, "?")
    assert driver.app.ui.sheet == "help"
    driver.key(pygame.K_ESCAPE)
    assert driver.app.ui.sheet == ""
    listed = " ".join(k for k, _ in SHORTCUTS) + " ".join(t for _, t in SHORTCUTS)
    with open(keys.__file__, encoding="utf-8") as file:
        used = {
            line.split("pygame.K_")[1].split(":")[0].split(" ")[0]
            for line in file
            if "key == pygame.K_" in line
        }
    for name in used:
        if len(name) == 1:
            assert name.upper() in listed, f"the ? sheet does not mention {name}"


def test_screenshot_and_gif(driver, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    driver.key(pygame.K_s, "s")
    assert (tmp_path / "tracejit-001.png").stat().st_size > 5000
    driver.key(pygame.K_s, "s")
    assert (tmp_path / "tracejit-002.png").exists()
    driver.key(pygame.K_s, "S", mod=pygame.KMOD_SHIFT)
    driver.settle(0.5)
    driver.key(pygame.K_s, "S", mod=pygame.KMOD_SHIFT)
    assert (tmp_path / "tracejit-001.gif").read_bytes()[:4] == b"GIF8"


def test_nan_is_named_and_shown(small_event):
    session = session_of(small_event, 2)
    node = next(n.id for n in session.model.nodes if n.source and n.op == "dot_general")
    from conftest import wire

    data = bytes(wire.StepEncoder().encode(synth.step_event(small_event, 3, nan_node=node)))
    session.add_step(wire.decode_step(data[wire.HEAD.size :])[1])
    driver = Driver([Trainer("t", {1: session}, 1)])
    driver.app.ui.step = session.steps[0]
    driver.key(pygame.K_n)
    app = driver.app
    assert app.ui.step.nan_node == node and node in app.scene.items[app.ui.selected].nodes
    assert "first NaN" in app.ui.toast and "model.py:" in app.ui.toast
    driver.settle()
    assert app.window.view.collidepoint(driver.at(app.ui.selected))
    driver2 = Driver([Trainer("t", {1: session_of(small_event, 1)}, 1)])
    driver2.key(pygame.K_n)
    assert "no NaN" in driver2.app.ui.toast


def test_values_need_a_running_program(driver):
    driver.click(driver.at(visible(driver, kind="node")))
    driver.key(pygame.K_v, "v")
    assert "only a running program" in driver.app.ui.toast


def test_programs_are_switched_with_tab(small_session, grad_session):
    driver = Driver([Trainer("a", {1: small_session}, 1), Trainer("b", {1: grad_session}, 1)])
    assert driver.app.ui.session is small_session
    driver.key(pygame.K_TAB)
    assert driver.app.ui.session is grad_session
    driver.key(pygame.K_TAB)
    assert driver.app.ui.session is small_session


@pytest.mark.parametrize("size", [(320, 240), (640, 360), (1024, 600), (3840, 2160), (100, 80)])
def test_windows_of_every_size(small_trainer, size):
    driver = Driver([small_trainer], size)
    r = divide(*size)
    assert r.view[2] > 0 and r.view[3] > 0
    for x, y, w, h in (r.top, r.view, r.side, r.timeline):
        assert x >= 0 and y >= 0 and x + w <= size[0] and y + h <= size[1]
    driver.key(0, "?")
    driver.key(pygame.K_ESCAPE)
    driver.click((size[0] // 2, size[1] // 2))
    driver.frame(pygame.event.Event(pygame.MOUSEWHEEL, x=0, y=2))
    driver.settle(0.3)


def test_everything_larger_on_a_screen_with_small_pixels(small_trainer, monkeypatch):
    """Drawn at half the size and enlarged; clicks land where they are seen; Ctrl + and Ctrl - change it."""
    driver = Driver([small_trainer], (2560, 1600))
    monkeypatch.setenv("TRACEJIT_VIEW_SCALE", "2")
    assert default_scale() == 2.0
    monkeypatch.setenv("TRACEJIT_VIEW_SCALE", "a lot")
    assert default_scale() == 1.0
    app = driver.app
    small = app.window.regions.side[2] / app.screen.get_width()
    app.magnify(app.magnifier.window, 2.0)
    driver.settle(1.0)
    assert app.screen.get_size() == (1280, 800)
    assert app.window.regions.side[2] / app.screen.get_width() == 2 * small
    item = visible(driver, kind="node")
    x, y = driver.at(item)
    driver.click((2 * x, 2 * y))
    assert app.ui.selected == item
    app.magnifier.show(None)
    whole = pygame.surfarray.array3d(driver.screen)
    assert (whole[::2, ::2].astype(int) - pygame.surfarray.array3d(app.screen)).any()
    driver.screen.fill(0)
    app.magnifier.show([pygame.Rect(0, 0, 1280, 400), pygame.Rect(0, 400, 1280, 400)])
    again = pygame.surfarray.array3d(driver.screen)
    apart = abs(whole.astype(int) - again)  # in parts as at once, but for a fraction of a pixel
    assert (apart > 40).any(2).mean() < 0.01
    driver.key(pygame.K_MINUS, "-", pygame.KMOD_CTRL)
    assert app.magnifier.scale == 1.75 and app.screen.get_width() == round(2560 / 1.75)
    driver.key(pygame.K_0, "0", pygame.KMOD_CTRL)
    assert app.screen is driver.screen


def test_resizing_keeps_the_fit(driver):
    pygame.display.set_mode((900, 500), pygame.RESIZABLE)
    driver.frame(pygame.event.Event(pygame.VIDEORESIZE, size=(900, 500), w=900, h=500))
    app = driver.app
    w = app.scene.page.width * app.camera.zoom
    assert w <= app.window.view.w and app.screen.get_size() == (900, 500)


def test_closing_the_window(driver):
    driver.frame(pygame.event.Event(pygame.QUIT))
    assert not driver.app.running


def test_a_window_without_any_program():
    driver = Driver([])
    driver.key(pygame.K_SPACE)
    driver.key(pygame.K_f)
    driver.key(pygame.K_g)
    driver.key(pygame.K_n)
    driver.key(pygame.K_TAB)
    driver.click((400, 300))
    driver.frame(pygame.event.Event(pygame.MOUSEWHEEL, x=0, y=2))


def test_a_live_session_follows_the_newest_step(small_event, meeting):
    from test_viewer_live import LiveObserver, pump, send_steps

    from tracejit_viz import place
    from tracejit_viz.hub import Hub

    hub = Hub(place.meeting_dir())
    driver = Driver([])
    driver.app.hub = hub
    observer = LiveObserver(spawn=False)
    observer.on_compile(small_event)
    send_steps(observer, small_event, 3)
    pump(hub, lambda: hub.trainers and hub.trainers[0].sessions and hub.trainers[0].sessions[1].steps)
    driver.frame()
    app = driver.app
    assert app.ui.session is hub.trainers[0].sessions[1] and app.ui.step is not None and app.ui.live
    send_steps(observer, small_event, 3, 3)
    driver.frame()
    app.ui.t = app.ui.duration
    driver.settle(1.5)
    assert app.ui.step is app.ui.session.last
    i = visible(driver, kind="node", category="contraction")
    driver.click(driver.at(i))
    driver.key(pygame.K_v, "v")
    assert app.ui.session.wanted == {app.scene.items[i].head}
    observer.close()
    pump(hub, lambda: not hub.trainers[0].alive)
    driver.frame()
    assert not app.ui.live and "ended" in app.ui.note and app.ui.step is not None
    hub.close()


def test_a_paused_window_draws_nothing_until_touched(driver):
    """Nothing moves, nobody touches it: the processor belongs to the program."""
    app = driver.app
    driver.key(pygame.K_SPACE)
    driver.settle(3.0)
    assert not app.ui.playing
    assert app.frame([]) is False and app.frame_rate() < 10
    assert app.frame([pygame.event.Event(pygame.MOUSEMOTION, pos=(300, 300), rel=(1, 1), buttons=(0, 0, 0))])
    assert app.frame_rate() == 60


def test_a_playing_window_is_polite_while_the_program_runs(driver):
    app = driver.app
    driver.settle(3.0)
    assert app.ui.playing and app.frame_rate() == 60  # a recording: nobody else needs the processor
    app.ui.live = True
    app._cost = 0.004
    app._spare.cores, app._spare._seen = 0.1, (time.monotonic(), 0.0, 0.0)
    assert app.frame_rate() <= 30
    app._cost = 1.0
    assert app.frame_rate() == 0.5  # however slow the machine, the window lives
    app._spare.cores = 1.2
    assert app.frame_rate() == 60  # a core nobody uses


def test_a_calm_window_leaves_its_panels_alone(driver):
    """Nobody touches it, the program needs the processor: only what moves is drawn, and it is the same picture."""
    app = driver.app
    driver.settle(3.0)
    app.ui.live = True
    driver.frame()
    driver.frame(dt=0.3)
    assert app._changed is not None and sum(r.w * r.h for r in app._changed) < 0.85 * 1280 * 800
    seen = pygame.surfarray.array3d(driver.screen)
    app.window.draw(driver.screen, app.ui, app.scene, app.camera, driver.now, app.mouse)
    assert (seen != pygame.surfarray.array3d(driver.screen)).any(2).mean() < 1e-4
