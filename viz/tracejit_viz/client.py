"""The training side: an observer that hands steps to the viewer's window and never holds up the program.

Timing every kernel slows a call down, so only as many calls are timed as cost 0.1% together (the window shows
one step for seconds anyway); the others run at full speed and only report their duration and loss. One non-blocking send
per shown step from a preallocated batch; a full pipe drops the step. A
viewer that is closed, killed or was never there only means that nothing is shown. Made by
``tracejit_viz.viewer.watch_observer``.
"""

from __future__ import annotations

import atexit
import contextlib
import math
import os
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import place, wire
from .errors import NoDisplayError
from .gate import Gate
from .values import summarize

if TYPE_CHECKING:
    from tracejit.events import CompileEvent, KernelInfo, StepEvent

MAX_RATE = 30.0  # timed steps per second
LIGHT_RATE = 4.0  # steps without kernel times per second: loss curve, step rate
BUDGET = 0.001  # part of the program's time that timing its kernels may take
LONGEST = 10.0  # seconds between timed steps at most
RETRY = 0.05  # seconds between attempts to connect
POLL = 0.1  # seconds between looks for requests
REST = 0.1  # seconds between calls that are told to the observer at all, once a program has run for SETTLED seconds
SETTLED = 1.0
GIVE_UP = 15.0  # seconds to wait for a viewer that was started
EXIT_WAIT = 6.0  # seconds granted at exit to hand over the last step
QUEUE_LIMIT = 64 << 20

#: Viewers started by this process. They outlive their observers, so somebody has to keep (and reap) the handles.
_STARTED: list[subprocess.Popen[bytes]] = []


def has_display() -> bool:
    """Whether a window can be opened: always tried on macOS and Windows, a display server needed elsewhere."""
    if os.environ.get("SDL_VIDEODRIVER"):
        return True
    if sys.platform in ("win32", "darwin"):
        return True
    return bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def start_viewer(directory: Path) -> subprocess.Popen[bytes]:
    """Start the window's process. Raises :class:`NoDisplayError` when there is no screen for it."""
    if not has_display():
        raise NoDisplayError(
            "no display for the viewer: set DISPLAY, or record instead with tj.watch(record='run.tjrec') "
            "and look later: tracejit view run.tjrec, or tracejit export run.tjrec out.png"
        )
    env = dict(os.environ)
    roots = [str(Path(__file__).resolve().parent.parent)]
    roots += [p for p in sys.path if p and Path(p, "tracejit").is_dir()]
    env["PYTHONPATH"] = os.pathsep.join(
        dict.fromkeys([*roots, *env.get("PYTHONPATH", "").split(os.pathsep)])
    ).strip(os.pathsep)
    env["TRACEJIT_VIEWER_DIR"] = str(directory)
    log = open(directory / "viewer.log", "wb")  # noqa: SIM115 - handed to the child
    try:
        flags: dict[str, Any] = {"creationflags": 0x208} if os.name == "nt" else {"start_new_session": True}
        process = subprocess.Popen(
            [sys.executable, "-m", "tracejit_viz.live"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=env,
            **flags,
        )
        _STARTED[:] = [p for p in _STARTED if p.poll() is None]
        _STARTED.append(process)
        return process
    finally:
        log.close()


class LiveObserver:
    """Sends the event stream of this process to the viewer. Implements :class:`tracejit.events.Observer`."""

    def __init__(self, directory: Path | None = None, *, spawn: bool = True) -> None:
        self.directory = directory or place.meeting_dir()
        self.sent = 0
        self.dropped = 0
        self._encoder = wire.StepEncoder()
        self._queue: deque[memoryview] = deque()
        self._queued = 0
        self._socket: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._reader = wire.FrameReader()
        self._gate = Gate()
        self._wanted: dict[int, set[int]] = {}
        self._kernels: dict[int, dict[int, KernelInfo]] = {}
        self._asked_source: list[tuple[int, int]] = []
        self._known: set[int] = set()
        self._next_try = self._next_step = self._next_light = self._next_poll = self._next_timed = 0.0
        self._rest_until = 0.0
        self._rest_from: dict[int, float] = {}
        self._last_sent: dict[int, int] = {}  # step
        self._held: dict[bool, StepEvent] = {}  # the newest step with kernel times (True) and without (False)
        self._plain: dict[int, float] = {}  # seconds of a call that is not timed
        self._dead = False
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._deadline = time.monotonic() + GIVE_UP
        self._queue_bytes(wire.pack(wire.HELLO, self._hello()))
        self._try_connect()
        if self._socket is None and spawn:
            try:
                self._process = start_viewer(self.directory)
            except (NoDisplayError, OSError) as error:
                self._give_up(str(error))
        atexit.register(self.close)

    def _hello(self) -> dict[str, object]:
        return {
            "wire": wire.VERSION,
            "pid": os.getpid(),
            "title": Path(sys.argv[0]).name if sys.argv and sys.argv[0] else "python",
            "time": time.time(),
            "token": place.token(self.directory),
        }

    @property
    def alive(self) -> bool:
        """False once the viewer is gone for good; the observer is then a few nanoseconds of nothing."""
        return not self._dead and self._pid == os.getpid()

    # -- the observer protocol ---------------------------------------------------------------------------------------
    def on_compile(self, event: CompileEvent) -> None:
        """Send a program's graph (kept until it is delivered; kernel code only when asked for)."""
        if not self.alive:
            return
        with self._lock:
            self._kernels[event.program] = {k.id: k for k in event.kernels}
            if event.program not in self._known:
                self._known.add(event.program)
                self._queue_bytes(wire.compile_frame(event, with_source=False))
            self._pump()

    def timed(self, program: int) -> bool:
        """Whether the next call is to be timed: when values were asked for, when stepped, and now and then."""
        if self._dead:
            return False
        now = self._look()
        known = self._plain.get(program)
        if known is None or self._gate.closed or self._wanted.get(program):
            return True
        return now >= self._next_timed and math.isfinite(known)

    def resting(self, program: int) -> bool:
        """Most calls are left alone: one that is told was seen to take 90 to 150 us longer in a program that fills the
        processor's caches. The last step it learns of is at most 0.1 s from the end.
        """
        return time.monotonic() < self._rest_until and program in self._rest_from

    def _look(self) -> float:
        """Read the viewer's requests a few times a second; the time."""
        now = time.monotonic()
        if now >= self._next_poll and self.alive:
            self._next_poll = now + POLL
            if self._lock.acquire(blocking=False):
                try:
                    self._receive()
                finally:
                    self._lock.release()
        return now

    def on_step(self, event: StepEvent) -> None:
        """Send a step if it is time for one and the pipe has room; otherwise count it."""
        if self._dead:
            return
        now = time.monotonic()
        urgent = event.nan_node is not None or bool(event.values)
        whole = urgent or len(event.kernels) > 0
        if whole:  # a call of seconds stops at its own end
            now = self._look()
        self._account(event, whole, now)
        if self._gate.closed and self.alive:
            self._stand(event)
            return
        if not urgent and now < (self._next_step if whole else self._next_light):
            self._held[whole] = event
            if now > self._rest_from.setdefault(event.program, now + SETTLED):
                self._rest_until = min(now + REST, self._next_light, self._next_timed)
            return
        if not self.alive or not self._lock.acquire(blocking=False):
            return
        try:
            if whole:
                self._next_step = now + 1.0 / MAX_RATE
            self._next_light = now + 1.0 / LIGHT_RATE
            self._held[whole] = event
            self._queue_values(event)
            if not self._pump() and not urgent:
                self.dropped += 1
                return
            self._send_step(event, whole)
            if whole:  # sending is part of the price
                self._next_timed += (time.monotonic() - now) / BUDGET
        finally:
            self._lock.release()

    def _stand(self, event: StepEvent) -> None:
        """Show the step at which the program is held, and wait there until the viewer lets it go or is gone."""
        with self._lock:
            self._held.clear()  # whatever is older
            self._queue_values(event)
            self._queue_bytes(bytes(self._encode(event)))
            self._tell_held(event, True)
            self.sent += 1
        why = "interrupted"
        try:
            why = self._gate.wait(lambda: self._socket if self.alive else None, self._serve)
        finally:
            if why:  # an interrupted program shall end, or go on with what it does about it
                self._gate.closed = False
            with self._lock:
                if not self._dead:
                    self._tell_held(event, False, why)
                    self._pump()
                self._next_poll = 0.0

    def _tell_held(self, event: StepEvent, held: bool, why: str = "") -> None:
        self._queue_bytes(
            wire.pack(wire.HELD, {"program": event.program, "step": event.step, "held": held, "why": why})
        )

    def _serve(self) -> bool:
        """Answer the viewer while the program waits; True when something is left to send."""
        with self._lock:
            self._receive()
            return not self._pump()

    def _queue_values(self, event: StepEvent) -> None:
        for node, array in event.values.items():
            self._wanted.get(event.program, set()).discard(node)
            self._queue_bytes(wire.values_frame(event.program, node, summarize(array, event.step)))

    def _account(self, event: StepEvent, whole: bool, now: float) -> None:
        """Learn what a call takes without kernel times, and from that when the next timed one is due."""
        seconds = (event.finish - event.begin) * 1e-9
        known = self._plain.get(event.program)
        if not whole:
            self._plain[event.program] = (
                seconds if known is None or seconds < known else 0.9 * known + 0.1 * seconds
            )
        elif known is None:
            self._plain[event.program] = math.inf  # next, a call that is not timed
            self._next_timed = now + 1.0 / MAX_RATE
        else:
            extra = max(0.0, seconds - known) / BUDGET
            self._next_timed = now + min(LONGEST, max(1.0 / MAX_RATE, extra))

    def wanted(self, program: int) -> Sequence[int]:
        """Nodes the viewer asked for."""
        self._look()
        asked = self._wanted.get(program)
        return tuple(asked) if asked else ()

    def close(self) -> None:
        """Hand over what is queued and the last step, waiting a moment for a viewer that is still starting."""
        if not self.alive:
            return
        with self._lock:
            for event in sorted(self._held.values(), key=lambda e: e.step):
                self._queue_bytes(bytes(self._encode(event)))
            self._held.clear()
            self._queue_bytes(wire.pack(wire.BYE))
            end = time.monotonic() + EXIT_WAIT
            while not self._dead and not self._pump() and time.monotonic() < end:
                time.sleep(0.01)
            self._disconnect()
            self._dead = True

    # -- plumbing ----------------------------------------------------------------------------------------------------
    def _send_step(self, event: StepEvent, whole: bool) -> None:
        frame = self._encode(event)
        if self._socket is None or self._queue:
            if event.nan_node is not None:
                self._queue_bytes(bytes(frame))
            else:
                self.dropped += 1
            return
        try:
            n = self._socket.send(frame)
        except BlockingIOError:
            self.dropped += 1
            return
        except OSError:
            self._lost()
            return
        self.sent += 1
        self._held.pop(whole, None)
        if n < len(frame):  # the rest must follow before anything else
            self._queue.appendleft(memoryview(bytes(frame[n:])))
            self._queued += len(frame) - n

    def _encode(self, event: StepEvent) -> memoryview:
        """The frame of a step, which also says how many were left out since the one before."""
        before = self._last_sent.get(event.program, event.step - 1)
        self._last_sent[event.program] = event.step
        return self._encoder.encode(event, max(0, event.step - before - 1))

    def _queue_bytes(self, data: bytes) -> None:
        self._queue.append(memoryview(data))
        self._queued += len(data)
        if self._queued > QUEUE_LIMIT:
            self._give_up("the viewer does not read; stopped watching")

    def _pump(self) -> bool:
        """Send queued bytes as far as they go; True when nothing is left."""
        if self._dead:
            return False
        if self._socket is None:
            self._try_connect()
            if self._socket is None:
                return False
        while self._queue:
            part = self._queue[0]
            try:
                n = self._socket.send(part)
            except BlockingIOError:
                return False
            except OSError:
                self._lost()
                return False
            self._queued -= n
            if n == len(part):
                self._queue.popleft()
            else:
                self._queue[0] = part[n:]
        return True

    def _try_connect(self) -> None:
        now = time.monotonic()
        if now < self._next_try:
            return
        self._next_try = now + RETRY
        s = place.connect(self.directory)
        if s is not None:
            s.setblocking(False)
            with contextlib.suppress(OSError):
                s.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
            self._socket = s
            if not place.use_unix() and self._queue:  # the token exists only once the viewer listens
                hello = wire.pack(wire.HELLO, self._hello())
                self._queued += len(hello) - len(self._queue[0])
                self._queue[0] = memoryview(hello)
            return
        if self._process is not None and self._process.poll() not in (None, 0):
            self._give_up(f"the viewer could not start: {self._log_tail()}")
        elif now > self._deadline:
            self._give_up("the viewer did not answer; training goes on without it")

    def _log_tail(self) -> str:
        try:
            lines = (self.directory / "viewer.log").read_text(errors="replace").strip().splitlines()
        except OSError:
            lines = []
        return lines[-1] if lines else f"exit code {self._process.returncode if self._process else '?'}"

    def _receive(self) -> None:
        if self._socket is None:
            self._pump()
            return
        try:
            data = self._socket.recv(1 << 16)
        except BlockingIOError:
            return
        except OSError:
            self._lost()
            return
        if not data:
            self._lost()
            return
        try:
            for frame in self._reader.feed(data):
                self._request(frame)
        except Exception:
            self._lost()  # not a viewer we understand

    def _request(self, frame: wire.Frame) -> None:
        if frame.kind == wire.CONTROL:
            self._gate.hear(str(frame.header.get("run")))
            self._rest_until = 0.0
            return
        if frame.kind != wire.WANT:
            return
        program = int(frame.header.get("program", -1))
        if "kernel" in frame.header:
            k = self._kernels.get(program, {}).get(int(frame.header["kernel"]))
            text = ""
            if k is not None and k.source is not None:
                try:
                    text = k.source()
                except Exception as error:
                    text = f"(no source: {error})"
            self._queue_bytes(
                wire.pack(
                    wire.SOURCE, {"program": program, "kernel": int(frame.header["kernel"]), "source": text}
                )
            )
            self._pump()
        for node in frame.header.get("nodes", ()):
            self._wanted.setdefault(program, set()).add(int(node))

    def _lost(self) -> None:
        """The viewer went away: stop for good. Silently, unless it failed to start: then its last words are a warning."""
        self._disconnect()
        if self._process is not None and not self._dead and time.monotonic() < self._deadline:
            with contextlib.suppress(subprocess.TimeoutExpired):
                if self._process.wait(0.3) == 1:
                    self._dead = True
                    warnings.warn(
                        f"tracejit viewer: the viewer could not start: {self._log_tail()}",
                        RuntimeWarning,
                        stacklevel=5,
                    )
        self._dead = True
        self._queue.clear()
        self._wanted.clear()
        self._held.clear()

    def _give_up(self, why: str) -> None:
        self._lost()
        warnings.warn(f"tracejit viewer: {why}", RuntimeWarning, stacklevel=4)

    def _disconnect(self) -> None:
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.close()
            self._socket = None
