"""A new layout of a big scene on a thread, while the window goes on showing the old one. Called by ``app``."""

from __future__ import annotations

import threading

from .scene import Scene


class Relayout:
    """A new layout of a scene, being made on a thread."""

    def __init__(self, scene: Scene, keep: tuple[float, float] | None, since: float) -> None:
        self.scene, self.keep, self.since, self.again = scene, keep, since, False
        self._found: Scene | Exception | None = None
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def _work(self) -> None:
        try:
            self._found = self.scene.relaid()
        except Exception as error:  # raised again where the result is taken
            self._found = error

    @property
    def done(self) -> bool:
        """True once :meth:`result` has something."""
        return self._found is not None

    def result(self) -> Scene:
        """The new scene; raises what went wrong."""
        if isinstance(self._found, Exception):
            raise self._found
        assert self._found is not None
        return self._found
