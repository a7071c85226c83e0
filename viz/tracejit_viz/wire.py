"""The stream between a trainer, a viewer and a recording file: frames of a JSON header and raw little-endian arrays.

A frame is ``b"TJ"``, wire version, kind, two lengths, JSON, bytes. Nothing on the wire is code: no pickle, no eval. Used
by ``client`` (writes), ``hub`` (reads), ``recording`` (both).
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import WireError
from .history import NodeValues, Step

if TYPE_CHECKING:
    from tracejit.events import CompileEvent, StepEvent

MAGIC = b"TJ"
VERSION = 1
#: CONTROL: the viewer holds the program or lets it go on; HELD: where it stands. Never in recordings.
HELLO, COMPILE, STEP, VALUES, SOURCE, WANT, BYE, CONTROL, HELD = range(1, 10)
KINDS = frozenset(range(1, 10))

HEAD = struct.Struct("<2sBBII")
#: program, step, kernels, begin ns, duration ns, ns per time unit, bytes per memory unit, loss, NaN node, flags, skipped
STEP_HEAD = struct.Struct("<IQIqqIIdiII")
_HAS_LOSS = 1
MAX_PART = 1 << 28


@dataclass(slots=True)
class Frame:
    """One message."""

    kind: int
    header: dict[str, Any]
    data: bytes


def pack(kind: int, header: Mapping[str, Any] | None = None, data: bytes = b"") -> bytes:
    """A frame as bytes. Values JSON cannot express (NaN included) are written as null or text."""
    text = json.dumps(_plain(header), separators=(",", ":"), allow_nan=False).encode() if header else b""
    return HEAD.pack(MAGIC, VERSION, kind, len(text), len(data)) + text + data


def _plain(value: Any) -> Any:
    """JSON without surprises: NumPy scalars to Python, infinities and NaN to text the reader knows, the rest to str."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    return str(value)


class FrameReader:
    """Cuts a byte stream into frames, however it arrives."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    @property
    def pending(self) -> int:
        """Bytes of an incomplete frame."""
        return len(self._buffer)

    def feed(self, data: bytes) -> Iterator[Frame]:
        """Add bytes; yield the frames completed. Raises :class:`WireError` on anything that is not a frame."""
        self._buffer += data
        at = 0
        try:
            while len(self._buffer) - at >= HEAD.size:
                magic, version, kind, n_json, n_data = HEAD.unpack_from(self._buffer, at)
                if magic != MAGIC:
                    raise WireError(
                        "not a tracejit stream, or damaged: a frame does not start where it should"
                    )
                if version != VERSION:
                    raise WireError(f"written by wire version {version}; this viewer reads version {VERSION}")
                if kind not in KINDS or n_json > MAX_PART or n_data > MAX_PART:
                    raise WireError(f"damaged frame: kind {kind}, {n_json} + {n_data} bytes")
                end = at + HEAD.size + n_json + n_data
                if len(self._buffer) < end:
                    break
                body = at + HEAD.size
                header: Any = {}
                if n_json:
                    try:
                        header = json.loads(self._buffer[body : body + n_json])
                    except ValueError as error:
                        raise WireError(f"damaged frame header: {error}") from None
                    if not isinstance(header, dict):
                        raise WireError("damaged frame header: not an object")
                payload = bytes(self._buffer[body + n_json : end])
                at = end
                yield Frame(kind, header, payload)
        finally:
            del self._buffer[:at]


# -- messages ----------------------------------------------------------------------------------------------------------
def compile_frame(event: CompileEvent, *, with_source: bool) -> bytes:
    """The graph, kernels and op table of a program."""
    return pack(COMPILE, event.to_json(with_source=with_source))


class StepEncoder:
    """Writes step frames into one buffer that is allocated once per program size."""

    def __init__(self) -> None:
        self._buffer = bytearray(0)

    def encode(self, event: StepEvent, skipped: int = 0) -> memoryview:
        """The frame of a step. The view is valid until the next call."""
        n = len(event.kernels)
        size = HEAD.size + STEP_HEAD.size + 17 * n
        if len(self._buffer) < size:
            self._buffer = bytearray(size)
        duration = max(0, int(event.finish) - int(event.begin))
        time_unit = 1 + (duration >> 32)
        top = int(event.live.max()) if n else 0
        live_unit = 1 + (top >> 32)
        HEAD.pack_into(self._buffer, 0, MAGIC, VERSION, STEP, 0, size - HEAD.size)
        loss = event.loss
        STEP_HEAD.pack_into(
            self._buffer,
            HEAD.size,
            event.program,
            event.step,
            n,
            int(event.begin),
            duration,
            time_unit,
            live_unit,
            float(loss) if loss is not None else 0.0,
            -1 if event.nan_node is None else int(event.nan_node),
            _HAS_LOSS if loss is not None else 0,
            skipped,
        )
        at = HEAD.size + STEP_HEAD.size
        for values in (
            event.kernels,
            _relative(event.start, event.begin, time_unit),
            _relative(event.end, event.begin, time_unit),
            event.live // live_unit if live_unit > 1 else event.live,
        ):
            np.frombuffer(self._buffer, np.uint32, n, at)[:] = values
            at += 4 * n
        np.frombuffer(self._buffer, np.uint8, n, at)[:] = event.lane
        return memoryview(self._buffer)[:size]


def _relative(t: np.ndarray, begin: int, unit: int) -> np.ndarray:
    out = np.clip(t - begin, 0, None)
    return out // unit if unit > 1 else np.minimum(out, 0xFFFFFFFF)


def decode_step(data: bytes) -> tuple[int, Step]:
    """(program, step) of a STEP frame's data. Raises :class:`WireError` when lengths disagree."""
    if len(data) < STEP_HEAD.size:
        raise WireError("damaged step: too short")
    (program, step, n, begin, duration, time_unit, live_unit, loss, nan_node, flags, skipped) = (
        STEP_HEAD.unpack_from(data)
    )
    if len(data) != STEP_HEAD.size + 17 * n:
        raise WireError(f"damaged step: {n} kernels do not fit {len(data)} bytes")
    at = STEP_HEAD.size
    parts = []
    for _ in range(4):
        parts.append(np.frombuffer(data, np.uint32, n, at))
        at += 4 * n
    kernels, start, end, live = parts
    return program, Step(
        step=step,
        kernels=kernels,
        start=start.astype(np.int64) * time_unit,
        end=end.astype(np.int64) * time_unit,
        live=live.astype(np.int64) * live_unit,
        lane=np.frombuffer(data, np.uint8, n, at),
        duration=duration,
        begin=begin,
        loss=loss if flags & _HAS_LOSS else None,
        nan_node=None if nan_node < 0 else nan_node,
        skipped=skipped,
    )


def values_frame(program: int, node: int, values: NodeValues) -> bytes:
    """The answer to a request for a tensor."""
    image = values.image
    header = {
        "program": program,
        "node": node,
        "step": values.step,
        "stats": values.stats,
        "histogram": values.histogram,
        "edges": list(values.edges),
        "image": list(image.shape) if image is not None else None,
        "note": values.note,
    }
    return pack(VALUES, header, image.tobytes() if image is not None else b"")


def decode_values(frame: Frame) -> tuple[int, int, NodeValues]:
    """(program, node, values) of a VALUES frame."""
    h = frame.header
    try:
        shape = h.get("image")
        image = np.frombuffer(frame.data, np.uint8).reshape(shape) if shape else None
        stats = {str(k): float(v) for k, v in h["stats"].items()}
        edges = (float(h["edges"][0]), float(h["edges"][1]))
        values = NodeValues(
            int(h["step"]), stats, [int(b) for b in h["histogram"]], edges, image, str(h.get("note", ""))
        )
        return int(h["program"]), int(h["node"]), values
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise WireError(f"damaged values: {error!r}") from None
