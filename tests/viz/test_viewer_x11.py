"""Real clicks, wheel turns and keys: the window under Xvfb, driven by xdotool, watched through its title and pixels."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.gui,
    pytest.mark.skipif(
        not (shutil.which("Xvfb") and shutil.which("xdotool")), reason="needs Xvfb and xdotool (Linux only)"
    ),
]
SIZE = (1280, 800)


class Desktop:
    """An X server of our own with one viewer window."""

    def __init__(self, argv: list[str], cwd: Path) -> None:
        read, write = os.pipe()
        self.server = subprocess.Popen(
            ["Xvfb", "-displayfd", str(write), "-screen", "0", f"{SIZE[0]}x{SIZE[1]}x24", "-nolisten", "tcp"],
            pass_fds=[write],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(write)
        with os.fdopen(read) as pipe:
            self.env = {**os.environ, "DISPLAY": f":{pipe.readline().strip()}", "SDL_VIDEO_WINDOW_POS": "0,0"}
        self.env.pop("SDL_VIDEODRIVER", None)
        self.env["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
        self.app = subprocess.Popen([sys.executable, *argv], env=self.env, cwd=cwd, stderr=subprocess.PIPE)
        self.window = self.wait(self._find, 30)

    def wait(self, question, seconds: float = 10.0):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if answer := question():
                return answer
            if self.app.poll() not in (None, 0):
                pytest.fail(self.app.stderr.read().decode())
            time.sleep(0.05)
        pytest.fail(f"timed out; the title is {self.title()!r}")

    def do(self, *args: object) -> str:
        done = subprocess.run(["xdotool", *map(str, args)], env=self.env, capture_output=True, text=True)
        return done.stdout.strip()

    def _find(self) -> str:
        """The only window there is, once it has its title (search --name fails on titles that are not ASCII)."""
        window = self.do("search", "--class", ".").split("\n")[0]
        return window if window and self.do("getwindowname", window).startswith("tracejit") else ""

    def title(self) -> str:
        return self.do("getwindowname", self.window) if getattr(self, "window", "") else ""

    def shows(self, *words: str) -> None:
        self.wait(lambda: all(w in self.title() for w in words))

    def key(self, *keys: str) -> None:
        self.do("windowfocus", self.window)
        for k in keys:
            self.do("key", "--window", self.window, k)
            time.sleep(0.15)

    def click(self, x: int, y: int, button: int = 1) -> None:
        self.do("mousemove", x, y)
        time.sleep(0.1)
        self.do("click", button)
        time.sleep(0.15)

    def pixels(self):
        from PIL import ImageGrab

        return ImageGrab.grab(xdisplay=self.env["DISPLAY"]).convert("RGB")

    def close(self) -> None:
        for p in (self.app, self.server):
            p.kill()
            p.wait()
        self.app.stderr.close()


@pytest.fixture
def desktop(recording, tmp_path):
    code = "import sys; from tracejit_viz.cli import main_view; sys.exit(main_view(sys.argv[1:]))"
    d = Desktop(["-c", code, str(recording), "--size", f"{SIZE[0]}x{SIZE[1]}"], tmp_path)
    yield d
    d.close()


def card_position(recording: Path, category: str) -> tuple[int, int, int]:
    """Where a card lies in a window of that size, from the same layout: (node, x, y)."""
    from tracejit_viz.export import Shot, Stage
    from tracejit_viz.recording import load_recording

    stage = Stage(next(iter(load_recording(recording).sessions.values())), Shot(size=SIZE))
    scene, v = stage.scene, stage.window.view
    i = next(
        int(i) for i in scene.shown if scene.items[i].category == category and scene.items[i].kind == "node"
    )
    x, y, w, h = scene.rects[i]
    sx, sy = stage.camera.to_view(x + w / 2, y + h / 2)
    return scene.items[i].head, round(v.centerx + sx), round(v.centery + sy)


def differing(a, b) -> float:
    import numpy as np

    d = abs(np.asarray(a).astype(int) - np.asarray(b).astype(int)).max(axis=2)
    return float((d > 25).mean())


def test_mouse_and_keyboard(desktop, recording, tmp_path):
    d = desktop
    d.shows("random3", "playing")
    d.key("space")
    d.shows("paused")
    node, x, y = card_position(recording, "contraction")
    d.click(x, y)
    d.shows(f"#{node}")
    d.key("Escape")
    d.wait(lambda: f"#{node}" not in d.title())
    still = d.pixels()
    d.do("mousemove", x, y)
    for _ in range(4):
        d.do("click", 4)  # wheel up: zoom in
    d.wait(lambda: differing(still, d.pixels()) > 0.05)
    d.key("f")
    d.wait(lambda: differing(still, d.pixels()) < 0.03)
    d.key("question")
    d.wait(lambda: differing(still, d.pixels()) > 0.1)
    d.key("Escape")
    d.wait(lambda: differing(still, d.pixels()) < 0.03)
    d.key("s")
    d.wait(lambda: (tmp_path / "tracejit-001.png").exists())
    d.key("space")
    d.shows("playing")


def test_dragging_the_timeline_pauses_and_typing_searches(desktop):
    d = desktop
    d.shows("playing")
    d.do("mousemove", 300, SIZE[1] - 110, "mousedown", 1, "mousemove", 500, SIZE[1] - 110)
    time.sleep(0.2)
    d.do("mouseup", 1)
    d.shows("paused")
    before = d.pixels()
    d.key("slash", "m", "a", "t", "m", "u", "l")
    d.wait(lambda: differing(before, d.pixels()) > 0.005)


def test_closing_the_window_ends_the_program(desktop):
    d = desktop
    d.shows("playing")
    d.do("windowclose", d.window)
    d.do("windowquit", d.window)
    d.wait(lambda: d.app.poll() is not None)


TRAINER = """
import sys, time
import numpy as np
import tracejit as tj

@tj.trace
def descend(w, x):
    loss = ((x @ w) ** 2).mean()
    return loss, w - np.float32(0.01) * w

w, x = np.ones((16, 4), np.float32), np.ones((8, 16), np.float32)
with tj.watch():
    for step in range(100_000):
        loss, w = descend(w, x)
        print(step, flush=True)
        time.sleep(0.005)
"""


def test_the_program_itself_is_held_and_stepped(meeting, monkeypatch, tmp_path):
    """B holds it, O lets it run one step, a viewer that is killed lets it run on."""
    monkeypatch.setenv("TRACEJIT_VIEWER_SIZE", f"{SIZE[0]}x{SIZE[1]}")
    d = Desktop(["-m", "tracejit_viz.live"], tmp_path)
    out = tmp_path / "steps.txt"
    with open(out, "wb") as file:
        trainer = subprocess.Popen([sys.executable, "-c", TRAINER], env=d.env, stdout=file, cwd=tmp_path)

    def calls() -> int:
        return out.read_bytes().count(b"\n")

    try:
        d.shows("descend", "playing")
        running = d.pixels()
        d.key("b")
        d.shows("held at step")
        at = int(d.title().split("held at step ")[1].split()[0])
        for step in range(at, at + 3):
            assert calls() == step  # its call has not returned
            d.key("o")
            d.shows(f"held at step {step + 1}")
        assert differing(running, d.pixels()) > 0.001
        if shot := os.environ.get("TRACEJIT_KEEP_SHOT"):
            d.pixels().save(shot)
        spent = cpu_seconds(trainer.pid)
        time.sleep(1.0)
        assert cpu_seconds(trainer.pid) - spent <= 0.02 and calls() == at + 3
        d.key("b")
        d.wait(lambda: "held" not in d.title() and calls() > at + 10)
        d.key("b")
        d.shows("held at step")
        d.app.kill()
        before = calls()
        end = time.monotonic() + 10
        while calls() < before + 10:
            assert time.monotonic() < end and trainer.poll() is None
            time.sleep(0.02)
    finally:
        trainer.kill()
        trainer.wait()
        d.close()


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
