"""The window: events in, frames out. Started by ``live`` (trainers connect), ``tracejit view`` and ``view_graph``.

Owns the clock, the camera and the UI state; drawing is ``draw.window``, data is ``hub`` or a loaded recording.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable

os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
if (
    sys.platform == "linux"
):  # a plain shared-memory image: without a GPU, SDL's way through OpenGL takes 40 ms a frame
    os.environ.setdefault("SDL_FRAMEBUFFER_ACCELERATION", "0")

import pygame

from .camera import Camera, around
from .draw.window import Window
from .errors import NoDisplayError
from .fold import Choices
from .history import Session, Trainer
from .hub import Hub
from .layout.compound import LayoutCache
from .magnify import Magnifier, default_scale
from .mouse import Mouse
from .relayout import Relayout
from .scene import Scene
from .spare import Manners, Spare
from .ui import UiState

FPS = 60
#: While a program keeps every core busy and nobody touches the window, drawing may take this part of the machine: a
#: program that runs on all cores in step loses as much time as any one of them does.
POLITE_SHARE = 0.0015
POLITE_FPS = (0.5, 30.0)
FREE_CORES = 0.9  # idle cores from which on drawing is in nobody's way
IDLE_FPS = 8
LISTEN = 0.17  # seconds after which even a sleeping window notices a touch
#: Seconds between new pictures of the page for the sake of its times: costly, and they change less and less.
REFRESH = (20.0, 320.0)
TOUCHED = 1.5  # seconds after the last input during which the window runs at full speed
BIG = 3000  # nodes from which on a new layout is made on a thread
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
    """Most of the screen, at most 1920 x 1080 where pixels have their usual size."""
    try:
        w, h = pygame.display.get_desktop_sizes()[0]
    except (pygame.error, IndexError, AttributeError):
        w, h = 1920, 1080
    if w >= 3840 and default_scale() > 1:
        return int(w * 0.8), int(h * 0.8)
    return (min(1920, w), min(1080, h)) if w >= 1920 else (max(320, int(w * 0.94)), max(240, int(h * 0.88)))


class App(Mouse):
    """One viewer window."""

    def __init__(
        self,
        screen: pygame.Surface,
        *,
        hub: Hub | None = None,
        trainers: list[Trainer] | None = None,
        manners: Manners | None = None,
        scale: float = 1.0,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.magnifier = Magnifier(screen, scale)
        self.screen, self.hub, self.clock = self.magnifier.screen, hub, clock
        self._own = trainers or []
        self._manners = manners  # only of a window that has a process of its own
        self.window = Window()
        self.window.layout(self.screen.get_size())
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
        self._busy_until = clock() + TOUCHED
        self._drawn = -2
        self._refresh_at = clock() + REFRESH[0]
        self._refresh = REFRESH[0]
        self._spare = Spare()
        self._changed: list[pygame.Rect] | None = None  # of the last frame; None: everything
        self._cost = 0.003  # seconds of processor time for a frame, smoothed
        self._title = ""
        self._layout: Relayout | None = None
        self._stood: tuple[int, int, int] | None = None
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
            rect = around(page.items[item])
        if now is None:
            self.camera.fit(rect, view)
            self._fitted = item is None
        else:
            self.camera.fly(Camera.fitted(rect, view), now)
            self._fitted = item is None

    # -- one frame -----------------------------------------------------------------------------------------------------
    def run(self, frames: int | None = None) -> None:
        """The main loop; ``frames`` limits it for tests and benchmarks."""
        while self.running and (frames is None or frames > 0):
            spent, begun = time.process_time(), time.perf_counter()
            if self.frame(pygame.event.get()):
                self.magnifier.show(self._changed)
                self._cost += 0.1 * (time.process_time() - spent - self._cost)
            self._pause(begun + 1.0 / self.frame_rate())
            if frames is not None:
                frames -= 1

    def _pause(self, until: float) -> None:
        """Sleep until the next frame is due, or somebody touches the window."""
        while (left := until - time.perf_counter()) > 0:
            time.sleep(min(left, LISTEN))
            if left > LISTEN and pygame.event.peek():
                return

    def frame_rate(self) -> float:
        """Frames per second that the present moment deserves."""
        now = self.clock()
        if self._touched(now):
            return FPS
        playing = self.ui.playing and self.ui.step is not None
        drawing = self.window.graph is None or not self.window.graph.sharp
        if not (drawing or playing or self.ui.typing):
            return IDLE_FPS
        if not self.ui.live or self._spare.update() >= FREE_CORES:
            return FPS
        share = POLITE_SHARE * (os.cpu_count() or 1)
        return min(POLITE_FPS[1], max(POLITE_FPS[0], share / max(1e-4, self._cost)))

    def _touched(self, now: float) -> bool:
        """True while somebody looks at the window so closely that every frame counts."""
        return now < self._busy_until or self.camera.flying or self._gif is not None

    def frame(self, events: list[pygame.event.Event]) -> bool:
        """Handle events, advance time, draw. False when nothing can have changed and nothing was drawn."""
        now = self.clock()
        dt = min(0.1, max(0.0, now - self._now))
        self._now = now
        if events:
            self._busy_until = now + TOUCHED
        for event in events:
            self.handle(event, now)
        if self.hub is not None:
            self._listen(now)
        self._advance(dt, now)
        self.camera.update(now)
        self._take_layout(now)
        if self._still(now):
            return False
        self._drawn = self.ui.session.revision if self.ui.session is not None else -1
        self.ui.programs = tuple(s.name for _, s in self.programs())
        self.ui.program = next((i for i, (_, s) in enumerate(self.programs()) if s is self.ui.session), 0)
        calm = self.ui.live and not self._touched(now) and not self.ui.typing
        if self._manners is not None:
            self._manners.stand_back(calm)
        self._changed = self.window.draw(
            self.screen, self.ui, self.scene, self.camera, now, self.mouse, calm=calm
        )
        self._caption()
        if self._gif is not None:
            self._gif_frame(now)
        return True

    def _still(self, now: float) -> bool:
        """True while the picture on screen stays right: paused, untouched, nothing new from the program."""
        ui, graph = self.ui, self.window.graph
        moving = ui.playing and ui.step is not None
        if moving or ui.typing or self._touched(now) or self._layout is not None:
            return False
        if now < ui.toast_until + 0.5 or (ui.step is not None and ui.step.nan_node is not None):
            return False
        revision = ui.session.revision if ui.session is not None else -1
        return graph is not None and graph.sharp and self._drawn == revision and self.scene is graph.scene

    def _caption(self) -> None:
        """Window title: program, state, selection. Set only when it changes."""
        ui = self.ui
        parts = ["tracejit"]
        if ui.session is not None:
            parts.append(ui.session.name)
            parts.append("playing" if ui.playing else "paused")
        if ui.held == "held":
            parts.append(f"held at step {ui.held_step}")
        if ui.selected is not None and self.scene is not None:
            parts.append(f"#{self.scene.items[ui.selected].head}")
        text = " · ".join(parts)
        if text != self._title:
            self._title = text
            pygame.display.set_caption(text)

    def _listen(self, now: float) -> None:
        assert self.hub is not None
        self.hub.poll()
        for trainer, session in self.hub.fresh:
            current = self.ui.session
            if current is None or current.ended or (current.name == session.name and len(current.steps) < 2):
                self.show_program(trainer, session)
        self.hub.fresh.clear()
        self._follow_held()
        for text in self.hub.messages:
            self.toast(text, now, 5.0)
        self.hub.messages.clear()
        shown = self.ui.session
        if shown is not None:
            self.ui.live = not shown.ended
            if shown.ended:
                self.ui.note = "The training ended; this is its last recorded step."
            if self.ui.step is None and shown.last is not None:
                self.ui.step = shown.last
                self.ui.auto_speed()
            last = shown.last
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
            if self.window.graph is not None and now >= self._refresh_at:
                self._refresh_at = now + self._refresh
                self._refresh = min(REFRESH[1], 2 * self._refresh)
                self.window.graph.refresh()
            return
        ui.t += dt * 1e9 * ui.speed
        if ui.t >= ui.duration:
            ui.t = ui.duration
            self._ended_at = now

    # -- events --------------------------------------------------------------------------------------------------------
    def handle(self, event: pygame.event.Event, now: float) -> None:
        """One pygame event."""
        event = self.magnifier.translate(event)
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
        if surface is not None:
            self.magnify(surface, self.magnifier.scale)

    def magnify(self, surface: pygame.Surface, scale: float) -> None:
        """Use a window of another size, or show everything larger or smaller."""
        self.magnifier.resize(surface, scale)
        self.screen = self.magnifier.screen
        self.window.layout(self.screen.get_size(), self.ui.panels)
        if self._fitted:
            self.fit(now=None)

    def rebuild(self, keep: tuple[float, float] | None = None) -> None:
        """Lay out again after opening or closing, keeping the selection and roughly the place.

        A big graph takes seconds: it is done on a thread while the old page stays in use.
        """
        if self.scene is None:
            return
        if len(self.scene.model.nodes) > BIG:
            if self._layout is None or self._layout.scene is not self.scene:
                self._layout = Relayout(self.scene, keep, self.clock())
            else:
                self._layout.again = True
            return
        old = self.scene.page.width, self.scene.page.height
        node = self._selected_node()
        self.scene.rebuild()
        self._rebuilt(node, old, keep)

    def _take_layout(self, now: float) -> None:
        """Show the page a thread has laid out, or say that it is still at it."""
        job = self._layout
        if job is None:
            return
        if job.scene is not self.scene:  # another program is shown by now
            self._layout = None
        elif not job.done:
            count = len(job.scene.model.nodes)
            self.toast(f"laying out {count:,} nodes … {now - job.since:.0f} s".replace(",", " "), now, 0.3)
        elif job.again:  # the choices have changed meanwhile
            self._layout = Relayout(job.scene, None, job.since)
        else:
            self._layout = None
            self.ui.toast_until = now
            node, old = self._selected_node(), (job.scene.page.width, job.scene.page.height)
            self.scene = self._scenes[id(job.scene.session)] = job.result()
            self._rebuilt(node, old, job.keep)

    def _selected_node(self) -> int | None:
        if self.scene is None or self.ui.selected is None:
            return None
        return self.scene.items[self.ui.selected].head

    def _rebuilt(self, node: int | None, old: tuple[float, float], keep: tuple[float, float] | None) -> None:
        assert self.scene is not None
        self.ui.selected = self.scene.item_of(node) if node is not None else None
        self.ui.hovered = self.ui.second = self.ui.kernel = None
        self.ui.path = ""
        self.search(self.ui.query)
        if self._fitted or keep is None:
            self.fit(now=self.clock())
        else:  # the same relative place of the page stays in view
            self.camera.x *= self.scene.page.width / max(1.0, old[0])
            self.camera.y *= self.scene.page.height / max(1.0, old[1])
