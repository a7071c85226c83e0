"""Wire and recordings: what is written is what is read; what is damaged says so and loses only itself."""

from __future__ import annotations

import json
import struct

import numpy as np
import pytest
import synth

from tracejit.events import CompileEvent, KernelInfo, StepEvent
from tracejit_viz import wire
from tracejit_viz.errors import RecordingError, ViewerError, WireError
from tracejit_viz.history import NodeValues
from tracejit_viz.recording import RecordObserver, load_recording, open_any
from tracejit_viz.values import summarize


def frames(data: bytes) -> list[wire.Frame]:
    return list(wire.FrameReader().feed(data))


def test_a_step_survives_the_wire(small_event):
    event = synth.step_event(small_event, 5, begin=10**15, nan_node=3)
    data = bytes(wire.StepEncoder().encode(event, skipped=4))
    (frame,) = frames(data)
    program, step = wire.decode_step(frame.data)
    assert (program, step.step, step.skipped, step.nan_node) == (1, 5, 4, 3)
    np.testing.assert_array_equal(step.kernels, event.kernels)
    np.testing.assert_array_equal(step.start, event.start - event.begin)
    np.testing.assert_array_equal(step.end, event.end - event.begin)
    np.testing.assert_array_equal(step.live, event.live)
    assert step.duration == event.finish - event.begin and step.begin == 10**15 and step.loss == event.loss


def test_long_steps_and_large_memory_scale():
    """A step of a minute and 100 GB still fit 32 bits, to better than one part in a million."""
    n = 3
    t = np.array([0, 20, 40], np.int64) * 10**9
    event = StepEvent(
        1,
        0,
        np.arange(n, dtype=np.uint32),
        t,
        t + 19 * 10**9,
        np.full(n, 100 << 30),
        np.zeros(n, np.uint8),
        0,
        60 * 10**9,
    )
    _, step = wire.decode_step(bytes(wire.StepEncoder().encode(event))[wire.HEAD.size :])
    np.testing.assert_allclose(step.end, event.end, rtol=1e-6)
    np.testing.assert_allclose(step.live, event.live, rtol=1e-6)
    assert step.loss is None


def test_one_encoder_for_steps_of_any_size():
    encoder = wire.StepEncoder()
    for n in (5, 500, 0, 17):
        e = np.arange(n)
        event = StepEvent(2, n, e.astype(np.uint32), e, e + 1, e, e.astype(np.uint8), 0, n + 1, loss=0.25)
        _, step = wire.decode_step(bytes(encoder.encode(event))[wire.HEAD.size :])
        assert len(step.kernels) == n and step.loss == 0.25


@pytest.mark.parametrize("size", [1, 3, 7, 64, 10_000])
def test_frames_arrive_in_any_pieces(small_event, size):
    data = wire.pack(wire.HELLO, {"a": 1}) + wire.compile_frame(small_event, with_source=True)
    data += bytes(wire.StepEncoder().encode(synth.step_event(small_event)))
    reader = wire.FrameReader()
    got = [f for i in range(0, len(data), size) for f in reader.feed(data[i : i + size])]
    assert [f.kind for f in got] == [wire.HELLO, wire.COMPILE, wire.STEP]
    assert reader.pending == 0


def test_json_without_surprises():
    """NaN, infinities, NumPy scalars and odd objects in attributes neither break JSON nor execute anything."""
    header = {
        "a": float("nan"),
        "b": float("-inf"),
        "c": np.float32(1.5),
        "d": (1, np.int64(2)),
        "e": object,
        "f": None,
    }
    (frame,) = frames(wire.pack(wire.HELLO, header))
    assert frame.header["a"] == "nan" and frame.header["b"] == "-inf" and frame.header["c"] == 1.5
    assert frame.header["d"] == [1, 2] and "object" in frame.header["e"] and frame.header["f"] is None


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"PK\x03\x04 this is a zip file", "not a tracejit stream"),
        (wire.HEAD.pack(wire.MAGIC, 9, wire.HELLO, 0, 0), "wire version 9"),
        (wire.HEAD.pack(wire.MAGIC, wire.VERSION, 77, 0, 0), "damaged frame"),
        (wire.HEAD.pack(wire.MAGIC, wire.VERSION, wire.STEP, 0, 0xFFFFFFFF), "damaged frame"),
        (wire.HEAD.pack(wire.MAGIC, wire.VERSION, wire.HELLO, 5, 0) + b"{nope", "damaged frame header"),
        (wire.HEAD.pack(wire.MAGIC, wire.VERSION, wire.HELLO, 2, 0) + b"[]", "not an object"),
    ],
)
def test_nonsense_is_refused(data, words):
    with pytest.raises(WireError, match=words):
        frames(data)


def test_damaged_steps_are_refused(small_event):
    data = bytes(wire.StepEncoder().encode(synth.step_event(small_event)))[wire.HEAD.size :]
    for bad in (data[:10], data[:-1], data + b"x"):
        with pytest.raises(WireError, match="damaged step"):
            wire.decode_step(bad)


@pytest.mark.parametrize(
    "array",
    [
        np.linspace(-2, 3, 1000, dtype=np.float32),
        np.array([[1.0, np.nan], [np.inf, 0.0]]),
        np.zeros((4, 4)),
        np.arange(12).reshape(3, 4),
        np.array([True, False, True]),
        np.random.default_rng(0).normal(size=(2, 3, 28, 28)),
        np.float32(3.0),
        np.zeros((0, 4)),
    ],
)
def test_values_survive_the_wire(array):
    values = summarize(array, 12)
    (frame,) = frames(wire.values_frame(4, 9, values))
    program, node, back = wire.decode_values(frame)
    assert (program, node, back.step) == (4, 9, 12)
    assert back.stats == pytest.approx(values.stats) and back.histogram == values.histogram
    if values.image is None:
        assert back.image is None
    else:
        np.testing.assert_array_equal(back.image, values.image)


def test_summaries_are_right():
    v = summarize(np.array([[1.0, -3.0, 0.0], [np.nan, np.inf, 2.0]]), 0)
    assert (v.stats["min"], v.stats["max"], v.stats["mean"]) == (-3.0, 2.0, 0.0)
    assert (v.stats["nan"], v.stats["inf"], v.stats["zero"], v.stats["size"]) == (1, 1, 1, 6)
    assert sum(v.histogram) == 4 and v.edges == (-3.0, 2.0)
    assert v.image.shape == (2, 3, 3) and tuple(v.image[1, 0]) == (255, 84, 112)
    assert "no finite value" in summarize(np.array([np.nan]), 0).note
    big = summarize(np.ones((4100, 1000), np.float32), 0)
    assert "sample" in big.note and max(big.image.shape[:2]) <= 192


# -- recordings --------------------------------------------------------------------------------------------------------
def test_record_and_read_back(recording, small_event):
    trainer = load_recording(recording)
    session = trainer.sessions[small_event.program]
    assert trainer.message == "" and [s.step for s in session.steps] == list(range(8))
    assert [k.name for k in session.kernels] == [k.name for k in small_event.kernels]
    assert session.kernels[0].source.startswith("define void")
    assert session.ops == synth.OPS and session.ended


def test_a_truncated_recording_shows_what_is_complete(recording, tmp_path):
    data = recording.read_bytes()
    whole = len(load_recording(recording).sessions[1].steps)
    seen = set()
    for cut in range(len(data) - 1, 0, -997):
        path = tmp_path / "cut.tjrec"
        path.write_bytes(data[:cut])
        try:
            trainer = load_recording(path)
        except RecordingError as error:
            assert "cut off before its first graph" in str(error)
            seen.add("error")
            continue
        n = len(trainer.sessions[1].steps)
        assert n <= whole
        seen.add("ok")
    assert seen == {"ok", "error"}
    path.write_bytes(data[: len(data) - 20])
    assert "cut off in the middle of a step" in load_recording(path).message


def test_a_damaged_recording_keeps_what_came_before(recording):
    data = bytearray(recording.read_bytes())
    data[-200:-150] = b"\xff" * 50
    at = data.rfind(b"TJ", 0, -1200)
    data[at : at + 2] = b"XX"
    recording.write_bytes(bytes(data))
    trainer = load_recording(recording)
    assert trainer.message.startswith("damaged:") and 0 < len(trainer.sessions[1].steps) < 8


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "empty"),
        (b"hello, world: this is not a recording", "not a tracejit stream"),
        (struct.pack("<2sBBII", b"TJ", 2, 1, 0, 0), "wire version 2; this viewer reads version 1"),
        (wire.pack(wire.HELLO, {"wire": 1}), "cut off before its first graph"),
        (wire.pack(wire.COMPILE, {"graph": {"nodes": "?"}}), "not a graph document"),
    ],
)
def test_files_that_cannot_be_shown_say_why(tmp_path, data, words):
    path = tmp_path / "bad.tjrec"
    path.write_bytes(data)
    with pytest.raises(RecordingError, match=words):
        load_recording(path)


def test_missing_files_and_graph_files(tmp_path):
    with pytest.raises(ViewerError, match="cannot read"):
        open_any(tmp_path / "none.tjrec")
    path = tmp_path / "graph.json"
    path.write_text(json.dumps(synth.random_graph(1)))
    trainer = open_any(path)
    assert next(iter(trainer.sessions.values())).name == "random1"
    path.write_text("{broken")
    with pytest.raises(ViewerError, match="not JSON"):
        open_any(path)


def test_recording_into_a_missing_folder_is_a_clear_error(tmp_path):
    with pytest.raises(RecordingError, match="cannot record to"):
        RecordObserver(tmp_path / "no" / "such" / "run.tjrec")


def test_a_full_disk_stops_the_recording_not_the_training(tmp_path, small_event):
    class Full:
        def write(self, data):
            raise OSError(28, "No space left on device")

        def flush(self): ...
        def close(self): ...

    observer = RecordObserver(tmp_path / "r.tjrec")
    observer._file.close()
    observer._file = Full()
    with pytest.warns(RuntimeWarning, match="No space left"):
        observer.on_compile(small_event)
    observer.on_step(synth.step_event(small_event))
    observer.close()


def test_long_recordings_are_thinned(tmp_path, small_event):
    path = tmp_path / "long.tjrec"
    limit = 400_000
    with RecordObserver(path, size_limit=limit) as observer:
        observer.on_compile(small_event)
        for k in range(2000):
            observer.on_step(synth.step_event(small_event, k))
    assert path.stat().st_size < 1.3 * limit and observer.skipped > 1000
    steps = [s.step for s in load_recording(path).sessions[1].steps]
    assert steps == sorted(steps) and steps[0] == 0 and steps[-1] > 1800


def test_a_kernel_whose_source_fails_is_recorded_without_it(tmp_path):
    def broken() -> str:
        raise RuntimeError("no IR kept")

    event = CompileEvent(
        1, "f", "cpu", synth.random_graph(2), [KernelInfo(0, "k", "op", (1,), source=broken)]
    )
    path = tmp_path / "r.tjrec"
    with RecordObserver(path) as observer:
        observer.on_compile(event)
    assert load_recording(path).sessions[1].kernels[0].source is None


def test_values_of_another_shape_are_refused():
    good = NodeValues(1, {"min": 0.0}, [1, 2], (0.0, 1.0), np.zeros((2, 2, 3), np.uint8))
    frame = frames(wire.values_frame(1, 2, good))[0]
    frame.header["image"] = [5, 5, 3]
    with pytest.raises(WireError, match="damaged values"):
        wire.decode_values(frame)
