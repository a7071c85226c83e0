"""The viewer: watch a traced program's graph execute, live, from a recording, or as a picture.

The core finds :data:`viewer` through the entry-point group ``tracejit.viewers``. Importing this package loads neither
pygame nor Pillow.
"""

from __future__ import annotations

from .errors import GraphFormatError, NoDisplayError, RecordingError, ViewerError, WireError
from .plugin import Viewer, viewer

__all__ = [
    "GraphFormatError",
    "NoDisplayError",
    "RecordingError",
    "Viewer",
    "ViewerError",
    "WireError",
    "viewer",
]
