"""Errors of the viewer. Every file of ``tracejit_viz`` raises these; the CLI prints them without a traceback."""

from __future__ import annotations


class ViewerError(Exception):
    """Something the user can act on: bad file, no display, missing optional package. The message says what to do."""


class GraphFormatError(ViewerError):
    """A graph JSON document is not what :func:`tracejit_viz.model.parse_graph` can read."""


class RecordingError(ViewerError):
    """A ``.tjrec`` file is not a recording, is damaged before its first graph, or is of another version."""


class WireError(ViewerError):
    """Bytes on the wire that are not a frame of a version this program speaks."""


class NoDisplayError(ViewerError):
    """No screen to open a window on. Recording and ``tracejit export`` need none."""
