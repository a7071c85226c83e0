"""What the window can be told to do, whoever says it: a key, a button, a test. The other half of ``app.App``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import pygame

from .ui import SPEEDS, UiState, speed_text

if TYPE_CHECKING:
    from .camera import Camera
    from .draw.window import Window
    from .history import Session, Step, Trainer
    from .hub import Hub
    from .scene import Scene

GIF_FPS = 12
GIF_SECONDS = 20
GIF_WIDTH = 1200


class Actions:
    """Actions on the state that :class:`tracejit_viz.app.App` owns."""

    screen: pygame.Surface
    hub: Hub | None
    window: Window
    ui: UiState
    camera: Camera
    scene: Scene | None
    _fitted: bool
    _ended_at: float | None
    _stood: tuple[int, int, int] | None  # where the program on screen was last seen held
    _gif: list[pygame.Surface] | None
    _gif_next: float

    # provided by App
    def fit(self, now: float | None, item: int | None = None) -> None:
        """Show the whole page or a card."""
        raise AssertionError("provided by App")

    def rebuild(self, keep: tuple[float, float] | None = None) -> None:
        """Lay out again."""
        raise AssertionError("provided by App")

    def programs(self) -> list[tuple[Trainer, Session]]:
        """All programs of all trainers."""
        raise AssertionError("provided by App")

    def show_program(self, trainer: Trainer, session: Session) -> None:
        """Make a program the one on screen."""
        raise AssertionError("provided by App")

    def toast(self, text: str, now: float, seconds: float = 2.5) -> None:
        """Say something briefly."""
        self.ui.toast, self.ui.toast_until = text, now + seconds

    def next_program(self, by: int = 1) -> None:
        """Go through the programs."""
        raise AssertionError("provided by App")

    def _use(self, step: Step) -> None:
        self.ui.step = step
        self.ui.t = min(self.ui.t, self.ui.duration)
        self.ui.auto_speed()

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
        elif name == "hold":
            self.hold_program(now)
        elif name == "step":
            self.step_program(now)
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

    # -- the program itself --------------------------------------------------------------------------------------------
    def _trainer(self) -> Trainer | None:
        return next((t for t, s in self.programs() if s is self.ui.session), None)

    def hold_program(self, now: float) -> None:
        """Stop the program that is on screen after its present step, or let it go on."""
        trainer = self._trainer()
        done = False
        if trainer is not None and self.hub is not None:
            done = self.hub.release(trainer) if trainer.held else self.hub.hold(trainer)
        self._ordered(done, now)

    def step_program(self, now: float) -> None:
        """Let a held program run one step; a running one is asked to stop."""
        trainer = self._trainer()
        done = False
        if trainer is not None and self.hub is not None:
            if trainer.held == "held":
                done = self.hub.step(trainer)
            else:  # a key held down asks no faster than the program can step
                done = bool(trainer.held) or self.hub.hold(trainer)
        self._ordered(done, now)

    def _ordered(self, done: bool, now: float) -> None:
        if not done:
            self.toast("only a running program can be held and stepped", now)
        elif self.ui.session is not None:
            self.ui.session.revision += 1

    def _follow_held(self) -> None:
        """Say which program is held; show the step at which it has come to stand."""
        ui, shown = self.ui, self._trainer()
        ui.held = shown.held if shown is not None else ""
        ui.held_name = ""
        if shown is None or not shown.held:
            other = next((t for t, _ in self.programs() if t.held == "held"), None)
            ui.held_name = other.title if other is not None else ""
        if shown is None or shown.held_at is None or ui.held != "held":
            return
        program, step = shown.held_at
        ui.held_step = step
        session = shown.sessions.get(program)
        if session is None or self._stood == (id(shown), program, step):
            return
        self._stood = (id(shown), program, step)
        self.show_program(shown, session)
        if session.last is not None:
            self._use(session.last)
        ui.follow = True
        self._ended_at = None
        if ui.playing:
            ui.t = 0.0

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
        where = node.source or (
            self.scene.model.nodes[node.grad_of].source if node.grad_of is not None else ""
        )
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
        save_gif(frames, path, fps=GIF_FPS)
        self.toast(f"saved {path.name} ({len(frames)} frames)", now, 4.0)

    def _gif_frame(self, now: float) -> None:
        assert self._gif is not None
        if now >= self._gif_next:
            self._gif_next = now + 1 / GIF_FPS
            w, h = self.screen.get_size()
            k = min(1.0, GIF_WIDTH / w)
            self._gif.append(pygame.transform.smoothscale(self.screen, (int(w * k), int(h * k))))
            if len(self._gif) >= GIF_FPS * GIF_SECONDS:
                self.toggle_gif(now)


def _free_name(directory: Path, stem: str, suffix: str) -> Path:
    n = 1
    while (path := directory / f"{stem}-{n:03d}{suffix}").exists():
        n += 1
    return path
