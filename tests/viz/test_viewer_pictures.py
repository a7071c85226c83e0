"""Pictures: golden images with a tolerance, every size, heat maps, missing fonts, export of every format."""

from __future__ import annotations

import builtins
import io
import os
import sys
from pathlib import Path

import numpy as np
import pygame
import pytest
import synth

from tracejit_viz import cli, viewer
from tracejit_viz.camera import Camera
from tracejit_viz.draw.text import MONO, Fonts
from tracejit_viz.draw.window import Window
from tracejit_viz.errors import GraphFormatError, ViewerError
from tracejit_viz.export import Shot, Stage, export, film, parse_moment
from tracejit_viz.history import Session
from tracejit_viz.recording import load_recording
from tracejit_viz.scene import Scene
from tracejit_viz.static import draw_graph, graph_png
from tracejit_viz.ui import UiState

GOLDEN = Path(__file__).parent / "golden"
UPDATE = bool(os.environ.get("TRACEJIT_UPDATE_GOLDEN"))


def pixels(surface: pygame.Surface) -> np.ndarray:
    data = pygame.image.tobytes(surface, "RGB")
    return np.frombuffer(data, np.uint8).reshape(surface.get_height(), surface.get_width(), 3).astype(int)


def same_picture(surface: pygame.Surface, name: str) -> None:
    """At most 0.5 % of the pixels may differ by more than 8 levels from the stored picture."""
    path = GOLDEN / f"{name}.png"
    if UPDATE:
        GOLDEN.mkdir(exist_ok=True)
        pygame.image.save(surface, str(path))
    want = pixels(pygame.image.load(str(path)))
    got = pixels(surface)
    assert got.shape == want.shape
    wrong = (np.abs(got - want).max(axis=2) > 8).mean()
    assert wrong < 0.005, f"{100 * wrong:.2f} % of the pixels differ from {path.name}"


def stage(session: Session, **kwargs) -> Stage:
    return Stage(session, Shot(size=(960, 600), **kwargs))


# -- golden pictures -----------------------------------------------------------------------------------------------------
def needs_real_fonts() -> None:
    if not Fonts().fancy:
        pytest.skip("golden pictures are made with Inter and JetBrains Mono")


@pytest.mark.parametrize(
    ("name", "at", "kwargs"),
    [
        ("window_running", 0.55, {}),
        ("window_selected", 1.0, {"select": "matmul"}),
        ("window_heat", 0.3, {"mode": "time"}),
        ("window_forward", 0.2, {"show": "forward"}),
    ],
)
def test_golden_window(small_session, name, at, kwargs):
    needs_real_fonts()
    s = stage(small_session, **kwargs)
    step = small_session.last
    same_picture(s.picture(step, step.duration * at, clock=1.0).copy(), name)


def test_golden_static_graph(small_event):
    needs_real_fonts()
    session = Session({"graph": small_event.graph, "ops": synth.OPS})
    same_picture(draw_graph(session, (800, 450)), "static")


def test_pictures_are_reproducible(small_session):
    step = small_session.last
    a = pixels(stage(small_session).picture(step, step.duration * 0.4, 1.0))
    b = pixels(stage(small_session).picture(step, step.duration * 0.4, 1.0))
    np.testing.assert_array_equal(a, b)


# -- what the picture means ------------------------------------------------------------------------------------------
def card_brightness(s: Stage, item: int) -> float:
    x, y, w, h = s.scene.rects[item]
    v, c = s.window.view, s.camera
    sx, sy = c.to_view(x, y)
    x0, y0 = int(v.centerx + sx), int(v.centery + sy)
    part = pixels(s.surface)[y0 : y0 + int(h * c.zoom), x0 : x0 + int(w * c.zoom)]
    return float(part.mean())


def test_cards_brighten_as_they_finish(small_session):
    """Pending dim, running glowing, done full: read from the pixels of one card."""
    s, step = stage(small_session), small_session.last
    scene = s.scene
    scene.use_step(step)
    item = next(
        int(i)
        for i in scene.shown
        if scene.items[i].kind == "node"
        and scene.items[i].category == "contraction"
        and scene.item_start[i] > 0.2 * step.duration
    )
    start, end = scene.item_start[item], scene.item_end[item]
    level = {}
    for name, t in (("pending", start - 1), ("running", (start + end) / 2), ("done", end + 1)):
        s.picture(step, t, 1.0)
        level[name] = card_brightness(s, item)
    assert level["pending"] + 8 < level["done"] < level["running"] - 8


def test_going_back_in_time_dims_again(small_session):
    s, step = stage(small_session), small_session.last
    early = pixels(s.picture(step, step.duration * 0.1, 1.0)).copy()
    s.picture(step, step.duration * 0.95, 1.0)
    again = pixels(s.picture(step, step.duration * 0.1, 1.0))
    view = s.window.view
    part = (slice(view.top, view.bottom), slice(view.left, view.right))
    assert (np.abs(early[part] - again[part]).max(axis=2) > 12).mean() < 0.01


@pytest.mark.parametrize("size", [(64, 64), (320, 240), (1280, 720), (3840, 2160)])
def test_static_pictures_of_every_size(size):
    png = graph_png(synth.random_graph(4), synth.OPS, size)
    assert pygame.image.load(io.BytesIO(png)).get_size() == size


@pytest.mark.parametrize("n", [1, 2, 20_000])
def test_static_pictures_of_one_node_and_of_twenty_thousand(n):
    picture = pixels(pygame.image.load(io.BytesIO(viewer.render_png(synth.chain_graph(n), {}, (800, 500)))))
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 20


def test_bad_sizes_and_bad_graphs_are_errors():
    with pytest.raises(ValueError, match="picture size"):
        viewer.render_png(synth.random_graph(1), {}, (10, 10))
    with pytest.raises(GraphFormatError):
        viewer.render_png({"nodes": [{}]}, {})


# -- fonts -----------------------------------------------------------------------------------------------------------
def test_without_fonts_pygames_own_is_used(small_session):
    fonts = Fonts(plain=True)
    assert not fonts.fancy and fonts.render("softmax", 13).get_width() > 20
    window = Window(fonts)
    screen = pygame.Surface((960, 600))
    window.layout(screen.get_size())
    scene = Scene(small_session, view=window.view.size)
    camera = Camera()
    camera.fit((0, 0, scene.page.width, scene.page.height), window.view.size)
    window.draw(screen, UiState(session=small_session, step=small_session.last), scene, camera, 1.0)
    assert len(np.unique(pixels(screen).reshape(-1, 3), axis=0)) > 100


def test_without_pillow_the_window_still_has_text(monkeypatch):
    real = builtins.__import__

    def no_pillow(name, *args, **kwargs):
        if name == "PIL" or name.startswith("PIL."):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_pillow)
    for module in [m for m in sys.modules if m == "PIL" or m.startswith("PIL.")]:
        monkeypatch.delitem(sys.modules, module)
    fonts = Fonts()
    assert not fonts.fancy and fonts.render("∂W₁ · 61.2 µs", 12, kind=MONO).get_width() > 10


def test_text_is_cached_cut_and_bounded():
    fonts = Fonts(limit=50)
    assert fonts.render("add", 12) is fonts.render("add", 12)
    cut = fonts.fit("a very long scope name indeed", 12, 80)
    assert cut.endswith("…") and fonts.width(cut, 12) <= 80
    for k in range(200):
        fonts.render(f"label {k}", 12)
    assert len(fonts._labels) <= 50


# -- export ----------------------------------------------------------------------------------------------------------
def run(*argv) -> int:
    return cli.main_export([str(a) for a in argv])


def test_export_png(recording, tmp_path, capsys):
    out = tmp_path / "o.png"
    assert run(recording, out, "--size", "800x500", "--from", "3:40%", "--select", "matmul") == 0
    assert pygame.image.load(str(out)).get_size() == (800, 500)
    assert "o.png" in capsys.readouterr().out


def test_export_gif_moves(recording, tmp_path):
    from PIL import Image

    out = tmp_path / "o.gif"
    assert run(recording, out, "--size", "480x300", "--fps", "5") == 0
    with Image.open(out) as gif:
        assert gif.size == (480, 300) and gif.n_frames > 20 and gif.info["loop"] == 0
        first = np.asarray(gif.convert("RGB")).astype(int)
        gif.seek(gif.n_frames // 2)
        middle = np.asarray(gif.convert("RGB")).astype(int)
    assert (np.abs(first - middle).max(axis=2) > 30).mean() > 0.002


def test_export_mp4(recording, tmp_path):
    imageio_ffmpeg = pytest.importorskip("imageio_ffmpeg")
    out = tmp_path / "o.mp4"
    assert (
        run(
            recording,
            out,
            "--size",
            "481x300",
            "--fps",
            "5",
            "--from",
            "2",
            "--to",
            "3",
            "--speed",
            "1/20000",
        )
        == 0
    )
    reader = imageio_ffmpeg.read_frames(str(out))
    meta = next(reader)
    assert meta["size"] == (480, 300) and meta["duration"] > 0.3
    reader.close()


def test_mp4_without_ffmpeg_says_what_to_install(recording, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    assert run(recording, tmp_path / "o.mp4", "--size", "320x200") == 2
    assert "tracejit[video]" in capsys.readouterr().err


def test_gif_without_pillow_says_what_to_install(recording, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert run(recording, tmp_path / "o.gif", "--size", "320x200") == 2
    assert "pip install pillow" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("{rec}", "{tmp}/o.bmp"), "must end in .png, .gif or .mp4"),
        (("{tmp}/none.tjrec", "{tmp}/o.png"), "cannot read"),
        (("{rec}", "{tmp}/no/o.png"), "no such folder"),
        (("{rec}", "{tmp}/o.png", "--from", "soon"), "cannot read 'soon'"),
        (("{rec}", "{tmp}/o.png", "--from", "1:later"), "cannot read the time 'later'"),
        (("{rec}", "{tmp}/o.gif", "--from", "5", "--to", "2"), "--to must come after --from"),
        (("{rec}", "{tmp}/o.gif", "--speed", "1/100000000"), "frames"),
        (("{rec}", "{tmp}/o.png", "--select", "no_such_op"), "nothing in the graph matches"),
        (("{rec}", "{tmp}/o.png", "--program", "other"), "no program 'other'"),
        (("{rec}", "{tmp}/o.png", "--size", "9x9"), "--size must be between"),
    ],
)
def test_export_errors_are_one_clear_line(recording, tmp_path, argv, words, capsys):
    code = run(*(a.format(rec=recording, tmp=tmp_path) for a in argv))
    err = capsys.readouterr().err
    assert code == 2 and words in err and "Traceback" not in err


@pytest.mark.parametrize(
    "argv", [("--size", "big"), ("--speed", "-1"), ("--speed", "fast"), ("--fps", "900")]
)
def test_bad_options_are_refused(recording, tmp_path, argv, capsys):
    with pytest.raises(SystemExit):
        run(recording, tmp_path / "o.png", *argv)
    assert "error" in capsys.readouterr().err


def test_a_truncated_recording_is_exported_with_a_note(recording, tmp_path, capsys):
    recording.write_bytes(recording.read_bytes()[:-40])
    assert run(recording, tmp_path / "o.png", "--size", "320x240") == 0
    assert "cut off in the middle" in capsys.readouterr().err


def test_a_graph_file_exports_to_png_only(tmp_path, capsys):
    import json

    path = tmp_path / "g.json"
    path.write_text(json.dumps({"graph": synth.random_graph(2), "ops": synth.OPS}))
    assert run(path, tmp_path / "g.png", "--size", "640x400") == 0
    assert run(path, tmp_path / "g.gif") == 2
    assert "no steps" in capsys.readouterr().err


def test_moments_and_films(recording):
    session = next(iter(load_recording(recording).sessions.values()))
    last = session.steps[-1]
    assert parse_moment("", session, "60%") == (7, pytest.approx(0.6 * last.duration))
    assert parse_moment("3:2us", session, "") == (3, 2000.0)
    assert parse_moment("1ms", session, "")[1] <= last.duration
    assert parse_moment("2", session, "") == (2, 0.0)
    seen = []
    count, frames = film(
        session, Shot(size=(200, 120), start="1", stop="2", speed=session.steps[1].duration * 1e-9, fps=4)
    )
    for _ in frames:
        seen.append(1)
    assert len(seen) == count == 4 + 4 + 2


def test_progress_is_reported(recording, tmp_path):
    told = []
    export(
        load_recording(recording),
        tmp_path / "o.gif",
        Shot(size=(200, 120), fps=2),
        lambda a, b: told.append((a, b)),
    )
    assert told[0][0] == 0 and told[-1][0] == told[-1][1] == len(told) - 1


def test_view_without_a_display_points_to_export(recording, monkeypatch, capsys):
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "SDL_VIDEODRIVER"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    assert cli.main_view([str(recording)]) == 2
    assert "tracejit export" in capsys.readouterr().err


def test_zoom_shows_the_selected_card_from_near(small_session):
    far, near = stage(small_session, select="matmul"), stage(small_session, select="matmul", zoom=True)
    assert near.camera.zoom > 1.5 * far.camera.zoom
    x, y, w, h = near.scene.rects[near.ui.selected]
    assert near.camera.to_view(x + w / 2, y + h / 2) == pytest.approx((0, 0), abs=1)


def test_a_stage_of_a_silly_size_is_refused(small_session):
    with pytest.raises(ViewerError):
        Stage(small_session, Shot(size=(20000, 100)))
