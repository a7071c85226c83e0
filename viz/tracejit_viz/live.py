"""The viewer's process: ``python -m tracejit_viz.live``. Started by ``client`` when a program is first watched.

Listens before it opens the window, so that the trainer can connect while pygame is still loading.
"""

from __future__ import annotations

import os
import sys

from . import place
from .errors import ViewerError


def main() -> int:
    """Serve trainers until the window is closed. 0 also when another viewer already serves them."""
    from .hub import Hub

    try:
        hub = Hub(place.meeting_dir())
        if not hub.listening:
            return 0
        try:
            from .app import App, default_size, open_screen
            from .magnify import default_scale
            from .spare import Manners

            screen = open_screen(_size() or (1600, 900))
            if _size() is None:
                screen = open_screen(default_size())
            App(screen, hub=hub, manners=Manners(), scale=default_scale()).run()
        finally:
            hub.close()
    except ViewerError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _size() -> tuple[int, int] | None:
    """``TRACEJIT_VIEWER_SIZE=1280x720`` fixes the window's size."""
    text = os.environ.get("TRACEJIT_VIEWER_SIZE", "")
    w, _, h = text.partition("x")
    return (int(w), int(h)) if w.isdigit() and h.isdigit() else None


if __name__ == "__main__":
    raise SystemExit(main())
