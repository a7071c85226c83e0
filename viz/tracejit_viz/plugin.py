"""What the core calls: the object behind the entry point ``tracejit.viewers``. Imports its parts when first used."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import NoDisplayError

if TYPE_CHECKING:
    from tracejit.events import Observer

    from .client import LiveObserver
    from .recording import RecordObserver

REOPEN_AFTER = 3.0  # seconds without a watched call after which a closed window may be opened again


class Viewer:
    """The viewer as a plugin. Thread-safe as far as its observers are."""

    def __init__(self) -> None:
        self._observer: LiveObserver | None = None
        self._asked = 0.0

    def watch_observer(self) -> Observer:
        """An observer connected to the window, which is opened if there is none.

        A window closed by the user stays closed while watched calls go on; after a pause of a few seconds the next
        watched call opens a new one. Without a display a warning says so, once, and nothing is watched.
        """
        now = time.monotonic()
        paused = now - self._asked > REOPEN_AFTER
        self._asked = now
        if self._observer is None or (not self._observer.alive and paused):
            from .client import LiveObserver

            self._observer = LiveObserver()
        return self._observer

    def record_observer(self, path: str | os.PathLike[str]) -> RecordObserver:
        """An observer that writes a ``.tjrec`` recording; call its ``close()`` at the end."""
        from .recording import RecordObserver

        return RecordObserver(path)

    def view_graph(
        self, graph_json: Mapping[str, Any], ops: Mapping[str, Mapping[str, str]] | None = None
    ) -> None:
        """Show a graph that is not running. Returns when the window has it.

        Raises :class:`NoDisplayError` without a screen, :class:`GraphFormatError` for a bad document.
        """
        from tracejit.events import CompileEvent, next_program_id

        from .client import LiveObserver, has_display
        from .model import parse_graph

        parse_graph(graph_json, ops or {})  # a clear error here, not in the other process
        if not has_display():
            raise NoDisplayError(
                "no display to show the graph on; fn.graph(...) also renders to PNG in notebooks"
            )
        observer = LiveObserver()
        name = str(graph_json.get("name") or "graph")
        observer.on_compile(CompileEvent(next_program_id(), name, "static", graph_json, (), ops or {}))
        observer.close()

    def render_png(
        self,
        graph_json: Mapping[str, Any],
        ops: Mapping[str, Mapping[str, str]] | None = None,
        size: tuple[int, int] = (1280, 720),
    ) -> bytes:
        """A picture of a graph as PNG bytes; needs no display."""
        from .static import graph_png

        return graph_png(graph_json, ops or {}, size)

    def main_view(self, argv: Sequence[str]) -> int:
        """``tracejit view FILE``."""
        from .cli import main_view

        return main_view(argv)

    def main_export(self, argv: Sequence[str]) -> int:
        """``tracejit export FILE OUT``."""
        from .cli import main_export

        return main_export(argv)

    def __repr__(self) -> str:
        return f"<tracejit viewer at {Path(__file__).parent}>"


viewer = Viewer()
