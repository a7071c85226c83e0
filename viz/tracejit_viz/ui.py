"""The state of the window that is not in the data: what is selected, played, searched; and how the window is divided.

Shared by ``app`` (changes it) and the panels (draw it). No pygame.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from .history import Session, Step

Rect4 = tuple[int, int, int, int]

#: What the zones of the window do when clicked: (action, argument).
Action = tuple[str, object]

SPEEDS = tuple(
    1.0 / s for s in (100000, 50000, 20000, 10000, 5000, 2000, 1000, 500, 200, 100, 50, 20, 10, 5, 2, 1)
)

SHORTCUTS = (
    ("Space", "play / pause"),
    ("← →", "previous / next kernel"),
    ("Shift ← →", "previous / next recorded step"),
    ("Home End", "start / end of the step"),
    ("+ −", "faster / slower;  with Ctrl: everything larger / smaller"),
    ("L", "follow the training live"),
    ("F", "fit everything (again: fit the selection)"),
    ("B", "hold the program itself after its present step / let it go on"),
    ("O", "let the held program run one step"),
    ("wheel, drag", "zoom, pan"),
    ("G", "forward / gradient / both"),
    ("H", "heat map: off / time / memory"),
    ("/", "search op, scope, shape, dtype; Enter: next match"),
    ("P", "path: ancestors / descendants / off; Shift-click: path between two"),
    ("K", "cards that ran in the same kernel; C: its code"),
    ("V", "values of the selected tensor at the next step"),
    ("double-click", "open or close a scope"),
    ("R", "fold / unfold repeated blocks"),
    ("E", "expand / collapse all composites"),
    ("N", "jump to the first NaN / Inf"),
    ("Tab", "next program or trainer"),
    ("S", "screenshot;  Shift S: record a GIF"),
    ("M", "all panels / the timeline only / none"),
    ("Esc", "clear; close"),
    ("?", "this sheet"),
)


@dataclass(slots=True)
class Regions:
    """The parts of a window of a given size; panels vanish, in order of importance, when it is small."""

    top: Rect4
    view: Rect4
    side: Rect4
    timeline: Rect4
    legend: Rect4


PANELS = ("all", "timeline", "none")


def divide(w: int, h: int, panels: str = "all") -> Regions:
    """Split a window into regions (x, y, w, h); absent ones have no area. ``panels`` is one of :data:`PANELS`."""
    top = 60 if h >= 420 else (38 if h >= 140 else 0)
    side = 348 if w >= 1000 and h >= 420 and panels == "all" else 0
    line = 176 if h >= 560 and w >= 420 else 96 if h >= 380 else 0
    if panels == "none":
        line = 0
    legend = 26 if line and w - side >= 560 else 0
    inner = w - side
    return Regions(
        (0, 0, w, top),
        (0, top, inner, max(1, h - top - line - legend)),
        (inner, top, side, h - top),
        (0, h - line, inner, line),
        (0, h - line - legend, inner, legend),
    )


@dataclass
class UiState:
    """Everything the user changes."""

    session: Session | None = None
    step: Step | None = None
    t: float = 0.0  # ns into the step
    playing: bool = True
    follow: bool = True  # jump to the newest step when a replay ends
    speed: float = 1 / 200
    speed_chosen: bool = False
    show: str = "both"
    mode: str = "op"  # op | time | memory
    selected: int | None = None
    second: int | None = None
    hovered: int | None = None
    path: str = ""  # "" | ancestors | descendants | between
    kernel: int | None = None  # slot of the highlighted kernel
    query: str = ""
    typing: bool = False
    matches: list[int] = field(default_factory=list)
    match: int = 0
    sheet: str = ""  # "" | help | code
    code: str = ""
    code_title: str = ""
    code_scroll: int = 0
    scroll: int = 0
    panels: str = "all"  # one of PANELS
    toast: str = ""
    toast_until: float = 0.0
    note: str = ""  # a lasting line: "training ended", "recording truncated", ...
    programs: tuple[str, ...] = ()
    program: int = 0
    live: bool = False
    steps_total: int = 0
    held: str = ""  # of the program on screen: "" | asked | held | stepping (see history.Trainer)
    held_step: int = 0
    held_name: str = ""  # another program that is held

    @property
    def duration(self) -> float:
        """Length of the loaded step in ns; 1 when there is none."""
        return float(max(1, self.step.duration)) if self.step else 1.0

    def auto_speed(self) -> None:
        """A dilation that plays a step in about six seconds."""
        if self.step is None or self.speed_chosen or not len(self.step.kernels):
            return
        wanted = self.duration * 1e-9 / 6.0
        self.speed = min(SPEEDS, key=lambda s: abs(math.log(s / max(wanted, 1e-12))))


def speed_text(speed: float) -> str:
    """``1/200×``."""
    return "1×" if speed >= 0.999 else f"1/{round(1 / speed):,}×".replace(",", " ")
