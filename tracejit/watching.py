"""``tj.watch`` and ``tj.view``: attach the viewer, or a recording, to what runs. Finds the viewer through an entry point.

The viewer package is named nowhere in tracejit; it publishes itself under the entry-point group ``tracejit.viewers``.
"""

from __future__ import annotations

import base64
import contextlib
import html
import os
from collections.abc import Callable, Iterator
from typing import Any

from tracejit import events, plugins
from tracejit.errors import TraceError
from tracejit.graph import Graph
from tracejit.ops.composites import op_table

_viewer: Any = None  # once found


def viewer() -> Any:
    """The installed viewer object; TraceError if there is none."""
    global _viewer
    if _viewer is not None:
        return _viewer
    for entry in plugins.find("tracejit.viewers").values():
        _viewer = entry.load()
        return _viewer
    raise TraceError.make(
        "no viewer is installed", op="watch", hint="reinstall tracejit: pip install tracejit"
    )


@contextlib.contextmanager
def watch(record: str | os.PathLike[str] | None = None) -> Iterator[events.Observer]:
    """Show every traced call of the block in the viewer, or write it to the file ``record`` (``.tjrec``) instead.

    The window lives in a process of its own; closing it never disturbs the program.
    """
    if record is not None:
        recorder = viewer().record_observer(os.fspath(record))
        try:
            with events.observe(recorder):
                yield recorder
        finally:
            recorder.close()
        return
    with events.observe(viewer().watch_observer()) as observer:
        yield observer


def view(target: Graph | Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """Open a window on a graph without running it: ``tj.view(fn, *args)`` or ``tj.view(fn.graph(*args))``."""
    graph = target if isinstance(target, Graph) else target.graph(*args, **kwargs)  # type: ignore[attr-defined]
    viewer().view_graph(graph.to_json(), op_table(graph))


def render_png(graph: Graph, size: tuple[int, int] = (1280, 720)) -> bytes:
    """A static picture of ``graph`` as PNG bytes (what notebooks show)."""
    return viewer().render_png(graph.to_json(), op_table(graph), size)


def notebook_png(graph: Graph) -> bytes | None:
    """:func:`render_png`, or None where there is no viewer to draw it: a notebook then shows the text."""
    try:
        return render_png(graph)
    except (TraceError, ImportError):
        return None


def notebook_html(graph: Graph) -> str | None:
    """The picture as a page fragment that needs no files beside it; None where there is no viewer."""
    png = notebook_png(graph)
    if png is None:
        return None
    data = base64.b64encode(png).decode()
    name = html.escape(graph.name)
    return (
        f'<figure style="margin:0"><img alt="graph of {name}" style="max-width:100%;border-radius:8px" '
        f'src="data:image/png;base64,{data}"><figcaption><code>{name}</code>: {len(graph)} nodes. '
        "<code>.view()</code> opens it in a window.</figcaption></figure>"
    )
