"""Colours and measures of the window (design/viewer.md, "Look"). Used by every drawing file."""

from __future__ import annotations

Color = tuple[int, int, int]

BG: Color = (13, 16, 23)
PANEL: Color = (20, 24, 34)
CARD: Color = (27, 32, 45)
LINE: Color = (42, 49, 66)
TEXT: Color = (230, 236, 245)
MUTED: Color = (139, 150, 172)
FAINT: Color = (84, 94, 117)
GRID: Color = (25, 30, 42)
ACCENT: Color = (94, 234, 212)
WARM: Color = (255, 138, 101)
BAD: Color = (255, 84, 112)
GOOD: Color = (126, 211, 160)
WHITE: Color = (255, 255, 255)

CATEGORY: dict[str, Color] = {
    "contraction": (97, 149, 255),
    "elementwise": (126, 211, 160),
    "activation": (255, 202, 97),
    "reduction": (187, 134, 252),
    "norm": (79, 209, 232),
    "view": (126, 140, 172),
    "parameter": (255, 158, 100),
    "constant": (148, 163, 190),
    "loss": (255, 107, 139),
    "input": (226, 232, 240),
    "gather": (110, 200, 255),
    "random": (232, 150, 220),
    "control": (240, 240, 180),
}
LEGEND = (
    "contraction",
    "elementwise",
    "activation",
    "reduction",
    "norm",
    "view",
    "gather",
    "parameter",
    "constant",
    "loss",
)

STAVE: dict[str, Color] = {
    "forward": CATEGORY["contraction"],
    "gradient": WARM,
    "optimizer": CATEGORY["elementwise"],
}
STAVE_TITLE = {"forward": "FORWARD", "gradient": "GRADIENT", "optimizer": "OPTIMISER"}

TOP_BAR, TIMELINE, SIDE = 60, 176, 348
LEGEND_BAR = 26


def category(name: str) -> Color:
    """Colour of an op category; grey-blue for one this version does not know."""
    return CATEGORY.get(name, CATEGORY["view"])


def mix(a: Color, b: Color, t: float) -> Color:
    """Linear blend from a (t=0) to b (t=1)."""
    return (int(a[0] + (b[0] - a[0]) * t), int(a[1] + (b[1] - a[1]) * t), int(a[2] + (b[2] - a[2]) * t))


def heat(t: float) -> Color:
    """Cold to hot for 0..1: teal, amber, red."""
    t = min(1.0, max(0.0, t))
    if t < 0.55:
        return mix((70, 200, 170), (255, 196, 87), t / 0.55)
    return mix((255, 196, 87), (255, 82, 82), (t - 0.55) / 0.45)
