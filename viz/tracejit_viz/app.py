"""The window: events in, frames out. Started by ``live`` (trainers connect), ``tracejit view`` and ``view_graph``.

Owns the clock, the camera and the UI state; drawing is ``draw.window``, data is ``hub`` or a loaded recording.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")

import pygame

from .camera import Camera
from .draw.window import Window
from .errors import NoDisplayError
from .fold import Choices
from .history import Session, Step, Trainer
from .hub import Hub
from .layout.compound import LayoutCache
from .scene import Scene
from .ui import SPEEDS, UiState, speed_text

FPS = 60
IDLE_FPS = 12
END_PAUSE = 0.6  # seconds at the end of a replay before the next one


def open_screen(size: tuple[int, int]) -> pygame.Surface:
    """Open the window. Raises :class:`NoDisplayError` with a way out when there is none."""
    try:
        pygame.display.init()
        pygame.font.init()
        pygame.display.set_caption("tracejit")
        screen = pygame.display.set_mode(size, pygame.RESIZABLE)
    except pygame.error as error:
        raise NoDisplayError(
            f"cannot open a window ({error}). Without a display use: tracejit export RUN.tjrec out.png"
        ) from None
    pygame.key.set_repeat(300, 60)
    return screen


def default_size() -> tuple[int, int]:
    """Most of the screen, at most 1920 x 1080."""
    try:
        w, h = pygame.display.get_desktop_sizes()[0]
    except (pygame.error, IndexError, AttributeError):
        w, h = 1920, 1080
    return (min(1920, w), min(1080, h)) if w >= 1920 else (max(320, int(w * 0.94)), max(240, int(h * 0.88)))


class App:
    """One viewer window."""

    def __init__(
        self,
        screen: pygame.Surface,
        *,
        hub: Hub | None = None,
        trainers: list[Trainer] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.screen, self.hub, self.clock = screen, hub, clock
        self._own = trainers or []
        self.window = Window()
        self.window.layout(screen.get_size())
        self.ui = UiState(live=hub is not None)
        self.camera = Camera()
        self.scene: Scene | None = None
        self.running = True
        self.mouse: tuple[int, int] | None = None
        self._scenes: dict[int, Scene] = {}
        self._drag: str = ""
        self._drag_from = (0, 0)
        self._moved = False
        self._last_click = (-9.0, (0, 0))
        self._now = clock()
        self._ended_at: float | None = None
        self._fitted = False
        self._gif: list[pygame.Surface] | None = None
        self._gif_next = 0.0
        self._busy_until = 0.0
        self._title = ""
        programs = self.programs()
        if programs:
            self.show_program(*programs[0])
            for trainer, session in programs:
                if trainer.active == session.program:
                    self.show_program(trainer, session)
                    break

    # -- programs ----------------------------------------------------------------------------------------------------
    def programs(self) -> list[tuple[Trainer, Session]]:
        """All programs of all trainers, in order of appearance."""
        trainers = self.hub.trainers if self.hub is not None else self._own
        return [(t, s) for t in trainers for s in t.sessions.values()]

    def show_program(self, trainer: Trainer, session: Session) -> None:
        """Make a program the one on screen."""
        ui = self.ui
        if ui.session is session:
            return
        ui.session = session
        ui.step = session.last
        ui.t = 0.0
        ui.selected = ui.second = ui.hovered = ui.kernel = None
        ui.path = ui.query = ""
        ui.matches = []
        ui.note = trainer.message
        ui.speed_chosen = False
        ui.auto_speed()
        if not session.kernels and not session.steps:
            ui.playing = False
        scene = self._scenes.get(id(session))
        if scene is None or scene.session is not session:
            view = self.window.view.size
            scene = Scene(session, Choices(), ui.show, view, LayoutCache())
            if len(self._scenes) > 6:
                self._scenes.clear()
            self._scenes[id(session)] = scene
        self.scene = scene
        self.fit(now=None)

    def next_program(self, by: int = 1) -> None:
        """Go through the programs."""
        programs = self.programs()
        if not programs:
            return
        at = next((i for i, (_, s) in enumerate(programs) if s is self.ui.session), 0)
        self.show_program(*programs[(at + by) % len(programs)])

    def fit(self, now: float | None, item: int | None = None) -> None:
        """Show the whole page, or a card with its surroundings; fly there when ``now`` is given."""
        if self.scene is None:
            return
        view = self.window.view.size
        page = self.scene.page
        rect = (-16.0, -24.0, page.width + 32, page.height + 30)
        if item is not None and item in page.items:
            x, y, w, h = page.items[item]
            rect = (x - 420, y - 260, w + 840, h + 520)
        if now is None:
            self.camera.fit(rect, view)
            self._fitted = item is None
        else:
            self.camera.fly(Camera.fitted(rect, view), now)
            self._fitted = item is None

    # -- one frame -----------------------------------------------------------------------------------------------------
    def run(self, frames: int | None = None) -> None:
        """The main loop; ``frames`` limits it for tests and benchmarks."""
        tick = pygame.time.Clock()
        while self.running and (frames is None or frames > 0):
            self.frame(pygame.event.get())
            pygame.display.flip()
            tick.tick(FPS if self._lively() else IDLE_FPS)
            if frames is not None:
                frames -= 1

    def _lively(self) -> bool:
        now = self.clock()
        if now < self._busy_until or self.camera.flying or self._gif is not None:
            return True
        if self.ui.playing and self.ui.step is not None:
            return True
        return self.window.graph is None or not self.window.graph.sharp

    def frame(self, events: list[pygame.event.Event]) -> None:
        """Handle events, advance time, draw."""
        now = self.clock()
        dt = min(0.1, max(0.0, now - self._now))
        self._now = now
        if events:
            self._busy_until = now + 0.5
        for event in events:
            self.handle(event, now)
        if self.hub is not None:
            self._listen(now)
        self._advance(dt, now)
        self.camera.update(now)
        self.ui.programs = tuple(s.name for _, s in self.programs())
        self.ui.program = next((i for i, (_, s) in enumerate(self.programs()) if s is self.ui.session), 0)
        self.window.draw(self.screen, self.ui, self.scene, self.camera, now, self.mouse)
        self._caption()
        if self._gif is not None:
            self._gif_frame(now)

    def _caption(self) -> None:
        """Window title: program, state, selection. Set only when it changes."""
        ui = self.ui
        parts = ["tracejit"]
        if ui.session is not None:
            parts.append(ui.session.name)
            parts.append("playing" if ui.playing else "paused")
        if ui.selected is not None and self.scene is not None:
            parts.append(f"#{self.scene.items[ui.selected].head}")
        text = " · ".join(parts)
        if text != self._title:
            self._title = text
            pygame.display.set_caption(text)

    def _listen(self, now: float) -> None:
        assert self.hub is not None
        if self.hub.poll():
            self._busy_until = now + 0.3
        for trainer, session in self.hub.fresh:
            current = self.ui.session
            if current is None or current.ended or (current.name == session.name and len(current.steps) < 2):
                self.show_program(trainer, session)
        self.hub.fresh.clear()
        for text in self.hub.messages:
            self.toast(text, now, 5.0)
        self.hub.messages.clear()
        session = self.ui.session
        if session is not None:
            self.ui.live = not session.ended
            if session.ended:
                self.ui.note = "The training ended; this is its last recorded step."
            if self.ui.step is None and session.last is not None:
                self.ui.step = session.last
                self.ui.auto_speed()
            last = session.last
            if last is not None and last.nan_node is not None and self.ui.step is not last and self.ui.follow:
                self._use(last)
                self.jump_to_nan(now)

    def _advance(self, dt: float, now: float) -> None:
        ui = self.ui
        if ui.step is None or not ui.playing:
            return
        if self._ended_at is not None:
            if now - self._ended_at < END_PAUSE:
                return
            self._ended_at = None
            session = ui.session
            if session is not None and session.last is not None and ui.follow:
                self._use(session.last)
            ui.t = 0.0
            if self.window.graph is not None:
                self.window.graph.refresh()
            return
        ui.t += dt * 1e9 * ui.speed
        if ui.t >= ui.duration:
            ui.t = ui.duration
            self._ended_at = now

    def _use(self, step: Step) -> None:
        self.ui.step = step
        self.ui.t = min(self.ui.t, self.ui.duration)
        self.ui.auto_speed()

    def toast(self, text: str, now: float, seconds: float = 2.5) -> None:
        """Say something briefly."""
        self.ui.toast, self.ui.toast_until = text, now + seconds

    # -- events --------------------------------------------------------------------------------------------------------
    def handle(self, event: pygame.event.Event, now: float) -> None:
        """One pygame event."""
        kind = event.type
        if kind == pygame.QUIT:
            self.running = False
        elif kind in (pygame.VIDEORESIZE, getattr(pygame, "WINDOWSIZECHANGED", -1)):
            self._resized()
        elif kind == pygame.KEYDOWN:
            from .keys import press

            press(self, event, now)
        elif kind == pygame.MOUSEBUTTONDOWN and event.button in (1, 2, 3):
            self._press(event.pos, event.button, now)
        elif kind == pygame.MOUSEBUTTONUP and event.button in (1, 2, 3):
            self._release(event.pos, event.button, now)
        elif kind == pygame.MOUSEMOTION:
            self._motion(event.pos, event.rel)
        elif kind == pygame.MOUSEWHEEL:
            self._wheel(event, now)
        elif kind == getattr(pygame, "WINDOWLEAVE", -1):
            self.mouse, self.ui.hovered = None, None

    def _resized(self) -> None:
        surface = pygame.display.get_surface()
        if surface is None:
            return
        self.screen = surface
        self.window.layout(surface.get_size(), self.ui.panels)
        if self._fitted:
            self.fit(now=None)

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
            self.ui.hovered = self.scene.at(*self._page_at(pos), slack=2 / self.camera.zoom) if inside else None

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
        pos = self.mouse or pygame.mouse.get_pos()
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
            choices.closed.discard((it.phase, it.group))
            choices.opened.add((it.phase, it.group))
        elif item is None:
            group = scene.group_at(*at)
            if group is None or group not in scene.arrangement.collapsible:
                return
            choices.opened.discard(group)
            choices.closed.add(group)
        else:
            return
        self.rebuild(keep=at)

    def rebuild(self, keep: tuple[float, float] | None = None) -> None:
        """Lay out again after opening or closing, keeping the selection and roughly the place."""
        if self.scene is None:
            return
        node = self.scene.items[self.ui.selected].head if self.ui.selected is not None else None
        old = (self.scene.page.width, self.scene.page.height)
        self.scene.rebuild()
        self.ui.selected = self.scene.item_of(node) if node is not None else None
        self.ui.hovered = self.ui.second = self.ui.kernel = None
        self.ui.path = ""
        self.search(self.ui.query)
        if self._fitted or keep is None:
            self.fit(now=self.clock())
        else:  # the same relative place of the page stays in view
            self.camera.x *= self.scene.page.width / max(1.0, old[0])
            self.camera.y *= self.scene.page.height / max(1.0, old[1])

    # -- actions -------------------------------------------------------------------------------------------------------
    def act(self, name: str, argument: object, now: float) -> None:
        """A button of the bar or the inspector."""
        ui = self.ui
        if name == "play":
            self.toggle_play()
        elif name in ("prev", "next"):
            self.step_kernel(1 if name == "next" else -1)
        elif name == "show":
            self.set_show(str(argument))
        elif name == "search":
            ui.typing = True
        elif name == "follow":
            self.follow()
        elif name == "program":
            self.next_program()
        elif name == "select" and isinstance(argument, int):
            ui.selected, ui.scroll = argument, 0
            self.fit(now, argument)
        elif name == "kernel" and isinstance(argument, int):
            ui.kernel = None if ui.kernel == argument else argument
        elif name == "code" and isinstance(argument, int):
            self.show_code(argument, now)
        elif name == "values" and isinstance(argument, int):
            self.ask_values(argument, now)

    def toggle_play(self) -> None:
        """Play or pause; from the end, start again."""
        ui = self.ui
        ui.playing = not ui.playing
        self._ended_at = None
        if ui.playing and ui.t >= ui.duration:
            ui.t = 0.0

    def follow(self) -> None:
        """Go on with the newest step."""
        ui = self.ui
        ui.follow = not ui.follow
        if ui.follow and ui.session is not None and ui.session.last is not None:
            self._use(ui.session.last)
            ui.t, ui.playing = 0.0, True

    def _seek(self, t: float) -> None:
        self.ui.t = t
        self.ui.playing = False
        self._ended_at = None

    def step_kernel(self, by: int) -> None:
        """Pause and move to the middle of the next or previous kernel."""
        ui, step = self.ui, self.ui.step
        if step is None or not len(step.kernels):
            return
        middles = sorted(((step.start + step.end) / 2.0).tolist())
        if by > 0:
            t = next((m for m in middles if m > ui.t + 0.5), middles[-1])
        else:
            t = next((m for m in reversed(middles) if m < ui.t - 0.5), middles[0])
        self._seek(t)

    def step_record(self, by: int, now: float) -> None:
        """Another recorded step."""
        ui = self.ui
        if ui.session is None or ui.step is None:
            return
        steps = ui.session.steps
        at = next((i for i, s in enumerate(steps) if s is ui.step), len(steps) - 1)
        at = min(len(steps) - 1, max(0, at + by))
        self._use(steps[at])
        ui.follow = False
        self.toast(f"step {ui.step.step}", now, 1.0)

    def _set_speed(self, speed: float) -> None:
        self.ui.speed, self.ui.speed_chosen = speed, True

    def faster(self, by: int, now: float) -> None:
        """One notch faster or slower."""
        at = min(range(len(SPEEDS)), key=lambda i: abs(SPEEDS[i] - self.ui.speed))
        self._set_speed(SPEEDS[min(len(SPEEDS) - 1, max(0, at + by))])
        self.toast(speed_text(self.ui.speed), now, 1.0)

    def set_show(self, show: str) -> None:
        """Forward, gradient or both staves."""
        if self.scene is None or show == self.ui.show:
            return
        self.ui.show = self.scene.show = show
        self._fitted = True
        self.rebuild()

    def search(self, text: str) -> None:
        """Set the query and find its cards."""
        ui = self.ui
        ui.query = text
        ui.matches = self.scene.search(text) if self.scene is not None and text else []
        ui.match = 0

    def next_match(self, now: float, by: int = 1) -> None:
        """Fly to the next card found."""
        ui = self.ui
        if ui.matches:
            ui.match = (ui.match + by) % len(ui.matches)
            self.fit(now, ui.matches[ui.match])

    def ask_values(self, node: int, now: float) -> None:
        """Ask the trainer for a tensor."""
        if self.ui.session is None or self.hub is None or not self.hub.ask_values(self.ui.session, node):
            self.toast("only a running program can be asked for values", now)
        else:
            self.ui.session.revision += 1

    def show_code(self, slot: int, now: float) -> None:
        """Open the generated code of a kernel; a live trainer is asked for it first."""
        session = self.ui.session
        if session is None:
            return
        k = session.kernels[slot]
        if k.source is None and self.hub is not None and self.hub.ask_source(session, k.id):
            end = time.monotonic() + 1.0
            while k.source is None and time.monotonic() < end:
                self.hub.poll()
                time.sleep(0.005)
        self.ui.sheet, self.ui.code_scroll, self.ui.kernel = "code", 0, slot
        kind = {"op": "interpreted"}.get(k.kind, k.kind)
        self.ui.code_title = f"k{k.id}  {k.name}  ·  {kind}  ·  {len(k.nodes)} nodes"
        self.ui.code = k.source or (
            "This kernel is interpreted by the backend: it has no generated code."
            if k.source is not None or k.kind == "op"
            else "The code was not sent (the trainer answers at its next step)."
        )

    def jump_to_nan(self, now: float) -> None:
        """Select and show the first card with a non-finite value."""
        ui = self.ui
        if self.scene is None or ui.session is None:
            return
        step = ui.step
        if step is None or step.nan_node is None:
            step = next((s for s in reversed(ui.session.steps) if s.nan_node is not None), None)
        if step is None or step.nan_node is None:
            self.toast("no NaN or Inf was reported", now)
            return
        self._use(step)
        node = self.scene.model.nodes[step.nan_node] if step.nan_node < len(self.scene.model.nodes) else None
        item = self.scene.item_of(step.nan_node)
        if node is None or item is None:
            return
        ui.selected, ui.playing = item, False
        where = node.source or (self.scene.model.nodes[node.grad_of].source if node.grad_of is not None else "")
        self.toast(f"first NaN / Inf: {node.op} #{node.id}" + (f" at {where}" if where else ""), now, 8.0)
        self.fit(now, item)

    def _map_to(self, pos: tuple[int, int]) -> None:
        x, y = self.window.minimap.page_point(pos)
        self.camera.stop()
        self.camera.x, self.camera.y = x, y
        self._fitted = False

    # -- pictures --------------------------------------------------------------------------------------------------------
    def screenshot(self, now: float, directory: Path | None = None) -> Path:
        """Save what is on screen."""
        path = _free_name(directory or Path.cwd(), "tracejit", ".png")
        pygame.image.save(self.screen, str(path))
        self.toast(f"saved {path.name}", now)
        return path

    def toggle_gif(self, now: float) -> None:
        """Start or finish recording the window as a GIF."""
        if self._gif is None:
            self._gif = []
            self._gif_next = now
            self.toast("recording a GIF: Shift S to stop", now, 3.0)
            return
        from .export import save_gif

        frames, self._gif = self._gif, None
        path = _free_name(Path.cwd(), "tracejit", ".gif")
        save_gif(frames, path, fps=12)
        self.toast(f"saved {path.name} ({len(frames)} frames)", now, 4.0)

    def _gif_frame(self, now: float) -> None:
        assert self._gif is not None
        if now >= self._gif_next:
            self._gif_next = now + 1 / 12
            w, h = self.screen.get_size()
            k = min(1.0, 1200 / w)
            self._gif.append(pygame.transform.smoothscale(self.screen, (int(w * k), int(h * k))))
            if len(self._gif) >= 12 * 20:
                self.toggle_gif(now)


def _free_name(directory: Path, stem: str, suffix: str) -> Path:
    n = 1
    while (path := directory / f"{stem}-{n:03d}{suffix}").exists():
        n += 1
    return path
