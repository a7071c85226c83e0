"""``tracejit view`` and ``tracejit export``. The core's command line dispatches here; errors are one line, exit code 2."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from .errors import ViewerError
from .ui import PANELS


def _size(text: str) -> tuple[int, int]:
    w, _, h = text.lower().partition("x")
    if not (w.isdigit() and h.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size like 1920x1080")
    return int(w), int(h)


def _speed(text: str) -> float:
    top, _, bottom = text.rstrip("×x").partition("/")
    try:
        value = float(top) / float(bottom) if bottom else float(top)
    except (ValueError, ZeroDivisionError):
        value = 0.0
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a speed like 0.005 or 1/200")
    return value


def main_view(argv: Sequence[str] | None = None) -> int:
    """Open a window on a recording or a graph file."""
    parser = argparse.ArgumentParser(
        prog="tracejit view", description="Open a window on a recording (.tjrec) or a graph (.json)."
    )
    parser.add_argument("file", type=Path, help="run.tjrec or graph.json")
    parser.add_argument("--size", type=_size, help="window size, for example 1600x900")
    parser.add_argument("--speed", type=_speed, help="replay speed, for example 1/200")
    options = parser.parse_args(argv)
    try:
        from .recording import open_any

        trainer = open_any(options.file)
        from .client import has_display

        if not has_display():
            raise ViewerError(
                f"no display to open a window on. Make a picture instead: tracejit export {options.file} out.png"
            )
        from .app import App, default_size, open_screen
        from .magnify import default_scale

        screen = open_screen(options.size or (1600, 900))
        if options.size is None:
            screen = open_screen(default_size())
        app = App(screen, trainers=[trainer], scale=default_scale())
        if options.speed:
            app._set_speed(options.speed)
        app.run()
    except ViewerError as error:
        print(f"tracejit view: {error}", file=sys.stderr)
        return 2
    return 0


def main_export(argv: Sequence[str] | None = None) -> int:
    """Write a picture or a film of a recording."""
    parser = argparse.ArgumentParser(
        prog="tracejit export",
        description="Turn a recording into a PNG, GIF or MP4, or a graph into a PNG. Needs no display.",
        epilog="--from and --to take a step (12), a time within a step (1.5ms, 60%%), or both (12:60%%).",
    )
    parser.add_argument("file", type=Path, help="run.tjrec or graph.json")
    parser.add_argument("out", type=Path, help="out.png, out.gif or out.mp4")
    parser.add_argument("--size", type=_size, default=(1920, 1080), help="1920x1080")
    parser.add_argument(
        "--from",
        dest="start",
        default="",
        metavar="WHEN",
        help="first moment (PNG: the moment, 60%% of the last step)",
    )
    parser.add_argument(
        "--to", dest="stop", default="", metavar="WHEN", help="last moment (the end of the step)"
    )
    parser.add_argument(
        "--speed", type=_speed, help="program time per film time, for example 1/200 (default: 8 s in all)"
    )
    parser.add_argument("--fps", type=int, default=20, help="frames per second (20)")
    parser.add_argument("--show", choices=("forward", "gradient", "both"), default="both")
    parser.add_argument(
        "--heat", choices=("off", "time", "memory"), default="off", help="colour cards by time or memory"
    )
    parser.add_argument("--select", default="", metavar="TEXT", help="select the first card that matches")
    parser.add_argument("--zoom", action="store_true", help="show the selected card from near")
    parser.add_argument("--program", default="", metavar="NAME", help="which program of the recording")
    parser.add_argument("--panels", choices=PANELS, default="all", help="what is shown beside the graph")
    parser.add_argument("--unfold", action="store_true", help="draw every repeated block")
    o = parser.parse_args(argv)
    if o.zoom and not o.select:
        parser.error("--zoom needs --select")
    if not 1 <= o.fps <= 60:
        parser.error("--fps must be between 1 and 60")
    os.environ["SDL_VIDEODRIVER"] = "dummy"
    try:
        from .export import Shot, export
        from .recording import open_any

        trainer = open_any(o.file)
        if trainer.message:
            print(f"tracejit export: {o.file}: {trainer.message}", file=sys.stderr)
        mode = {"off": "op"}.get(o.heat, o.heat)
        shot = Shot(
            o.size,
            o.start,
            o.stop,
            o.speed,
            o.fps,
            o.show,
            mode,
            o.select,
            o.panels,
            o.program,
            o.unfold,
            o.zoom,
        )
        _with_progress(o.out, lambda tell: export(trainer, o.out, shot, tell))
    except ViewerError as error:
        print(f"tracejit export: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"tracejit export: cannot write {o.out}: {error.strerror or error}", file=sys.stderr)
        return 2
    print(f"{o.out}  {o.out.stat().st_size / 1e6:.2f} MB")
    return 0


def _with_progress(out: Path, work: Callable[[Callable[[int, int], None]], object]) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(f"export {out.name}", total=None)
        work(lambda done, total: bar.update(task, completed=done, total=total))
