"""Pictures and films of a recording, without a display. Called by ``tracejit export`` and by the window's own GIFs."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")

import pygame

from .camera import Camera, around
from .draw.window import Window
from .errors import ViewerError
from .fold import Choices
from .history import Session, Step, Trainer
from .scene import Scene
from .static import draw_graph
from .ui import UiState

FORMATS = (".png", ".gif", ".mp4")
DEFAULT_SECONDS = 8.0  # of a film when no speed is given
MAX_FRAMES = 3000
_TIME = re.compile(r"^(\d+(?:\.\d+)?)(ns|us|µs|ms|s|%)$")
_UNITS = {"ns": 1.0, "us": 1e3, "µs": 1e3, "ms": 1e6, "s": 1e9}


@dataclass
class Shot:
    """What to show. ``start``/``stop`` are ``STEP``, ``STEP:TIME`` or ``TIME``; TIME like ``1.5ms`` or ``60%``."""

    size: tuple[int, int] = (1920, 1080)
    start: str = ""
    stop: str = ""
    speed: float | None = None  # program seconds per film second
    fps: int = 20
    show: str = "both"
    mode: str = "op"
    select: str = ""
    panels: str = "all"
    program: str = ""
    unfold: bool = False
    zoom: bool = False  # to the selected card


def parse_moment(text: str, session: Session, default: str) -> tuple[int, float]:
    """(index into the recorded steps, ns into that step). Raises :class:`ViewerError` with the accepted forms."""
    text = (text or default).strip()
    step_text, _, time_text = text.partition(":")
    if _TIME.match(step_text):
        step_text, time_text = "", step_text
    index = len(session.steps) - 1
    if step_text:
        if not step_text.isdigit():
            raise ViewerError(
                f"cannot read {text!r}: write a step (12), a time in a step (1.5ms, 60%), or both (12:60%)"
            )
        number = int(step_text)
        index = min(range(len(session.steps)), key=lambda i: abs(session.steps[i].step - number))
    step = session.steps[index]
    if not time_text:
        return index, 0.0
    found = _TIME.match(time_text)
    if not found:
        raise ViewerError(f"cannot read the time {time_text!r}: write it as 250us, 1.5ms, 2s or 60%")
    value, unit = float(found[1]), found[2]
    ns = value / 100 * step.duration if unit == "%" else value * _UNITS[unit]
    return index, min(float(step.duration), ns)


def choose_session(trainer: Trainer, name: str = "") -> Session:
    """The program to show: by name, else the busiest one of the recording."""
    if name:
        for s in trainer.sessions.values():
            if name in (s.name, str(s.program)):
                return s
        known = ", ".join(s.name for s in trainer.sessions.values())
        raise ViewerError(f"no program {name!r} in this recording; it has: {known}")
    if trainer.active is not None and trainer.active in trainer.sessions:
        return trainer.sessions[trainer.active]
    return next(iter(trainer.sessions.values()))


class Stage:
    """A window without a screen, set up for one program."""

    def __init__(self, session: Session, shot: Shot) -> None:
        pygame.font.init()
        w, h = shot.size
        if not (64 <= w <= 8192 and 64 <= h <= 8192):
            raise ViewerError(f"--size must be between 64x64 and 8192x8192, got {w}x{h}")
        self.surface = pygame.Surface((w, h))
        self.window = Window()
        self.window.layout((w, h), shot.panels)
        view = self.window.view.size
        self.scene = Scene(session, Choices(fold_repeats=False if shot.unfold else None), shot.show, view)
        self.camera = Camera()
        page = self.scene.page
        self.camera.fit((-16.0, -24.0, page.width + 32, page.height + 30), view)
        self.ui = UiState(session=session, show=shot.show, mode=shot.mode, panels=shot.panels, follow=True)
        if shot.select:
            found = self.scene.search(shot.select)
            if not found:
                raise ViewerError(f"--select {shot.select!r}: nothing in the graph matches")
            exact = [i for i in found if self.scene.items[i].label == shot.select]
            linked = [i for i in exact or found if self.scene.partners(i)]
            self.ui.selected = (linked or exact or found)[0]
            if shot.zoom:
                self.camera.fit(around(page.items[self.ui.selected]), view)

    def picture(self, step: Step | None, t: float, clock: float) -> pygame.Surface:
        """One frame; the surface is reused."""
        self.ui.step, self.ui.t = step, t
        self.window.draw(self.surface, self.ui, self.scene, self.camera, clock, None, budget=10.0)
        return self.surface


def film(session: Session, shot: Shot) -> tuple[int, Iterator[pygame.Surface]]:
    """(number of frames, frames) from ``shot.start`` to ``shot.stop``."""
    first, t0 = parse_moment(shot.start, session, "0%")
    last, t1 = parse_moment(shot.stop, session, "100%")
    if shot.stop and ":" not in shot.stop and not _TIME.match(shot.stop.strip()):
        t1 = float(session.steps[last].duration)
    if shot.start and not shot.stop:
        last, t1 = max(first, last if ":" not in shot.start and shot.start.isdigit() else first), 0.0
        t1 = float(session.steps[last].duration)
    if (last, t1) <= (first, t0):
        raise ViewerError("--to must come after --from")
    parts: list[tuple[Step, float, float]] = []
    for i in range(first, last + 1):
        step = session.steps[i]
        parts.append((step, t0 if i == first else 0.0, t1 if i == last else float(max(1, step.duration))))
    total = sum(b - a for _, a, b in parts)
    speed = shot.speed if shot.speed is not None else total * 1e-9 / DEFAULT_SECONDS
    if speed <= 0:
        raise ViewerError("--speed must be positive, for example 0.001 or 1/1000")
    per_frame = speed * 1e9 / shot.fps
    count = sum(max(1, int((b - a) / per_frame)) for _, a, b in parts) + shot.fps // 2
    if count > MAX_FRAMES:
        raise ViewerError(
            f"that film would have {count:,} frames (limit {MAX_FRAMES:,}): raise --speed or narrow --from/--to"
        )

    def frames() -> Iterator[pygame.Surface]:
        stage = Stage(session, shot)
        stage.ui.speed = speed
        n = 0
        for step, a, b in parts:
            many = max(1, int((b - a) / per_frame))
            for k in range(many):
                yield stage.picture(step, a + (b - a) * k / many, n / shot.fps)
                n += 1
        for _ in range(shot.fps // 2):
            yield stage.picture(parts[-1][0], parts[-1][2], n / shot.fps)
            n += 1

    return count, frames()


def export(
    trainer: Trainer,
    out: str | os.PathLike[str],
    shot: Shot | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write a PNG, GIF or MP4 of a recording (or a PNG of a graph). Returns the path written."""
    shot = shot or Shot()
    path = Path(out)
    kind = path.suffix.lower()
    if kind not in FORMATS:
        raise ViewerError(f"cannot export {path.name}: the name must end in .png, .gif or .mp4")
    if not path.parent.is_dir():
        raise ViewerError(f"no such folder: {path.parent}")
    session = choose_session(trainer, shot.program)
    tell = progress or (lambda done, total: None)
    if not session.steps:
        if kind != ".png":
            raise ViewerError("this recording has no steps: only a .png of its graph can be made")
        pygame.image.save(draw_graph(session, shot.size), str(path))
        tell(1, 1)
        return path
    if kind == ".png":
        index, t = parse_moment(shot.start, session, "60%")
        stage = Stage(session, shot)
        stage.ui.step = session.steps[index]
        stage.ui.auto_speed()
        pygame.image.save(stage.picture(session.steps[index], t, 1.3), str(path))
        tell(1, 1)
        return path
    count, frames = film(session, shot)

    def counted() -> Iterator[pygame.Surface]:
        for n, frame in enumerate(frames):
            tell(n, count)
            yield frame
        tell(count, count)

    if kind == ".gif":
        save_gif(counted(), path, shot.fps)
    else:
        save_mp4(counted(), path, shot.fps, shot.size)
    return path


def save_gif(frames: Iterable[pygame.Surface], path: Path, fps: int) -> None:
    """Frames as an animated GIF with one shared palette; only the rectangle that changed is stored."""
    try:
        from PIL import Image
    except ImportError:
        raise ViewerError("a GIF needs Pillow: pip install pillow") from None
    images = []
    palette = None
    for frame in frames:
        image = Image.frombytes("RGB", frame.get_size(), pygame.image.tobytes(frame, "RGB"))
        if palette is None:
            palette = _palette(image)
        images.append(image.quantize(palette=palette, dither=Image.Dither.NONE))
    if not images:
        raise ViewerError("no frames to save")
    images[0].save(
        path,
        save_all=True,
        append_images=images[1:],
        duration=round(1000 / fps),
        loop=0,
        optimize=False,
        disposal=1,
    )


def _palette(image: Any) -> Any:
    """255 colours: what the first frame uses, and every colour (and its glow) a later one can light up."""
    from PIL import Image

    from .draw.theme import ACCENT, BG, CATEGORY, PANEL, TEXT, WARM, WHITE, mix

    swatches = [ACCENT, WARM, TEXT, WHITE]
    for color in CATEGORY.values():
        swatches += [mix(BG, color, k) for k in (0.15, 0.34, 0.6, 0.8)] + [color, mix(color, WHITE, 0.4)]
        swatches += [mix(PANEL, color, 0.82), mix(PANEL, color, 0.25)]
    base = image.quantize(colors=255 - len(set(swatches)), dither=Image.Dither.NONE)
    used = base.getpalette()[: 3 * (255 - len(set(swatches)))]
    for color in dict.fromkeys(swatches):
        used += list(color)
    palette = Image.new("P", (1, 1))
    palette.putpalette(used[: 3 * 256])
    return palette


def save_mp4(frames: Iterable[pygame.Surface], path: Path, fps: int, size: tuple[int, int]) -> None:
    """Frames as H.264 video through imageio-ffmpeg, an optional dependency."""
    try:
        import imageio_ffmpeg
    except ImportError:
        raise ViewerError(
            "an MP4 needs imageio-ffmpeg: pip install 'tracejit[video]' (a .gif needs nothing more)"
        ) from None
    w, h = size[0] // 2 * 2, size[1] // 2 * 2
    writer = imageio_ffmpeg.write_frames(
        str(path),
        (w, h),
        fps=fps,
        codec="libx264",
        pix_fmt_out="yuv420p",
        quality=8,
        macro_block_size=2,
        ffmpeg_log_level="error",
    )
    writer.send(None)
    try:
        for frame in frames:
            part = frame if frame.get_size() == (w, h) else frame.subsurface((0, 0, w, h)).copy()
            writer.send(pygame.image.tobytes(part, "RGB"))
    finally:
        writer.close()
