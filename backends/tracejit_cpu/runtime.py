"""The native thread pool: persistent workers, launch, barrier. ``executable.py`` launches programs through it.

A program is one native function ``void f(ptr table, i64 tid, i64 nt, ptr state)`` that all threads run together. The
workers are Python daemon threads parked in native code without the GIL: they spin for about a millisecond after a
program, then sleep (futex on Linux; a Python condition elsewhere), so an idle process uses no CPU. A second Python
thread that calls while the pool is busy runs its program alone, with the same results bit for bit.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import sys
import threading
import time

from tracejit_cpu.host import Host, host, thread_count

# Byte offsets in the state block; each group of fields that one side writes has its own pair of cache lines.
(
    GEN,
    GEN_SLEEP,
    FUNCTION,
    ARGS,
    NT,
    DONE,
    DONE_SLEEP,
    BAR_COUNT,
    BAR_GEN,
    BAR_SLEEP,
    LOCK,
    SPIN,
    STARTED,
    PARKED,
) = (
    0,
    64,
    128,
    136,
    144,
    256,
    320,
    384,
    448,
    512,
    576,
    640,
    704,
    768,
)
STATE_BYTES = 1024


def _pause(target: Host) -> tuple[str, str]:
    if target.arch == "x86_64":
        return "declare void @llvm.x86.sse2.pause()", "call void @llvm.x86.sse2.pause()"
    if target.arch == "aarch64":
        return "declare void @llvm.aarch64.hint(i32)", "call void @llvm.aarch64.hint(i32 1)"
    return "", "fence seq_cst"


def uses_futex() -> bool:
    """Whether sleeping goes through the Linux futex system call."""
    return (
        sys.platform.startswith("linux")
        and host().arch in ("x86_64", "aarch64")
        and not os.environ.get("TRACEJIT_CPU_PORTABLE_THREADS")
    )


def runtime_ir(target: Host, futex: bool) -> str:
    """LLVM IR of the pool, for ``support.py``: ``tj_barrier``, ``tj_launch``, ``tj_worker``, ``tj_spin``."""
    declare, pause = _pause(target)
    number = 202 if target.arch == "x86_64" else 98
    if futex:
        system = "declare i64 @syscall(i64, ...)\ndeclare i32 @sched_yield()"
        give = "call i32 @sched_yield()"  # on a crowded machine the thread we wait for may want this core
        sleep = f"call i64 (i64, ...) @syscall(i64 {number}, ptr %p, i32 128, i32 %old, ptr null, ptr null, i32 0)"
        wake = f"call i64 (i64, ...) @syscall(i64 {number}, ptr %p, i32 129, i32 2147483647, ptr null, ptr null, i32 0)"
    else:
        name = "SwitchToThread" if sys.platform == "win32" else "sched_yield"
        system = f"declare i32 @{name}()"
        sleep, wake = f"call i32 @{name}()", "add i32 0, 0"
        give = sleep
    park = "1" if not futex else "0"
    return f"""{declare}
{system}

define internal i32 @wait(ptr %st, ptr %p, i32 %old, ptr %sleepers, i32 %park) {{
entry:
  %limit.p = getelementptr i8, ptr %st, i64 {SPIN}
  %limit = load i32, ptr %limit.p
  br label %spin
spin:
  %k = phi i32 [ 0, %entry ], [ %k1, %again ], [ %k1, %offer ]
  %x = load atomic i32, ptr %p acquire, align 4
  %changed = icmp ne i32 %x, %old
  br i1 %changed, label %out, label %next
next:
  %k1 = add i32 %k, 1
  %tired = icmp ugt i32 %k1, %limit
  br i1 %tired, label %doze, label %again
again:
  {pause}
  %low = and i32 %k1, 255
  %polite = icmp eq i32 %low, 0
  br i1 %polite, label %offer, label %spin
offer:
  %ry = {give}
  br label %spin
doze:
  %s0 = atomicrmw add ptr %sleepers, i32 1 seq_cst
  %give.up = icmp ne i32 %park, 0
  br label %check
check:
  %y = load atomic i32, ptr %p seq_cst, align 4
  %moved = icmp ne i32 %y, %old
  br i1 %moved, label %awake, label %asleep
asleep:
  br i1 %give.up, label %parked, label %rest
rest:
  %r = {sleep}
  br label %check
awake:
  %s1 = atomicrmw sub ptr %sleepers, i32 1 seq_cst
  br label %out
parked:
  %s2 = atomicrmw sub ptr %sleepers, i32 1 seq_cst
  ret i32 1
out:
  ret i32 0
}}

define internal void @notify(ptr %p, ptr %sleepers) {{
  %n = load atomic i32, ptr %sleepers seq_cst, align 4
  %some = icmp ne i32 %n, 0
  br i1 %some, label %wake, label %out
wake:
  %r = {wake}
  br label %out
out:
  ret void
}}

define void @tj_barrier(ptr %st, i64 %nt) {{
entry:
  %alone = icmp eq i64 %nt, 1
  br i1 %alone, label %out, label %go
go:
  %count = getelementptr i8, ptr %st, i64 {BAR_COUNT}
  %gen = getelementptr i8, ptr %st, i64 {BAR_GEN}
  %sleepers = getelementptr i8, ptr %st, i64 {BAR_SLEEP}
  %g = load atomic i32, ptr %gen monotonic, align 4
  %o = atomicrmw add ptr %count, i32 1 acq_rel
  %n = trunc i64 %nt to i32
  %n1 = sub i32 %n, 1
  %last = icmp eq i32 %o, %n1
  br i1 %last, label %release, label %wait
release:
  store atomic i32 0, ptr %count monotonic, align 4
  %g1 = add i32 %g, 1
  store atomic i32 %g1, ptr %gen seq_cst, align 4
  call void @notify(ptr %gen, ptr %sleepers)
  br label %out
wait:
  %w = call i32 @wait(ptr %st, ptr %gen, i32 %g, ptr %sleepers, i32 0)
  br label %out
out:
  ret void
}}

define i32 @tj_worker(ptr %st, i64 %tid, i32 %seen, ptr %last.out) {{
entry:
  %sleepers = getelementptr i8, ptr %st, i64 {GEN_SLEEP}
  %fn.p = getelementptr i8, ptr %st, i64 {FUNCTION}
  %args.p = getelementptr i8, ptr %st, i64 {ARGS}
  %nt.p = getelementptr i8, ptr %st, i64 {NT}
  %done = getelementptr i8, ptr %st, i64 {DONE}
  %done.sleepers = getelementptr i8, ptr %st, i64 {DONE_SLEEP}
  br label %top
top:
  %last = phi i32 [ %seen, %entry ], [ %g, %finished ]
  %idle = call i32 @wait(ptr %st, ptr %st, i32 %last, ptr %sleepers, i32 {park})
  %leave = icmp ne i32 %idle, 0
  br i1 %leave, label %parked, label %work
work:
  %g = load atomic i32, ptr %st acquire, align 4
  %fn = load ptr, ptr %fn.p
  %stop = icmp eq ptr %fn, null
  br i1 %stop, label %stopped, label %run
run:
  %args = load ptr, ptr %args.p
  %nt = load i64, ptr %nt.p
  call void %fn(ptr %args, i64 %tid, i64 %nt, ptr %st)
  %d = atomicrmw add ptr %done, i32 1 seq_cst
  %d1 = add i32 %d, 2
  %n = trunc i64 %nt to i32
  %all = icmp eq i32 %d1, %n
  br i1 %all, label %tell, label %finished
tell:
  call void @notify(ptr %done, ptr %done.sleepers)
  br label %finished
finished:
  br label %top
parked:
  store i32 %last, ptr %last.out
  ret i32 1
stopped:
  ret i32 0
}}

define void @tj_launch(ptr %st, ptr %fn, ptr %args, i64 %nt) {{
entry:
  %one = icmp eq i64 %nt, 1
  br i1 %one, label %single, label %try
single:
  call void %fn(ptr %args, i64 0, i64 1, ptr %st)
  ret void
try:
  %started.p = getelementptr i8, ptr %st, i64 {STARTED}
  %started = load atomic i32, ptr %started.p acquire, align 4
  %up = icmp ne i32 %started, 0
  br i1 %up, label %lock, label %single
lock:
  %lock.p = getelementptr i8, ptr %st, i64 {LOCK}
  %pair = cmpxchg ptr %lock.p, i32 0, i32 1 acquire monotonic
  %got = extractvalue {{ i32, i1 }} %pair, 1
  br i1 %got, label %multi, label %single
multi:
  %fn.p = getelementptr i8, ptr %st, i64 {FUNCTION}
  %args.p = getelementptr i8, ptr %st, i64 {ARGS}
  %nt.p = getelementptr i8, ptr %st, i64 {NT}
  %done = getelementptr i8, ptr %st, i64 {DONE}
  %done.sleepers = getelementptr i8, ptr %st, i64 {DONE_SLEEP}
  %sleepers = getelementptr i8, ptr %st, i64 {GEN_SLEEP}
  store ptr %fn, ptr %fn.p
  store ptr %args, ptr %args.p
  store i64 %nt, ptr %nt.p
  store atomic i32 0, ptr %done monotonic, align 4
  %g = atomicrmw add ptr %st, i32 1 seq_cst
  call void @notify(ptr %st, ptr %sleepers)
  call void %fn(ptr %args, i64 0, i64 %nt, ptr %st)
  %n = trunc i64 %nt to i32
  %target = sub i32 %n, 1
  br label %join
join:
  %x = load atomic i32, ptr %done acquire, align 4
  %all = icmp eq i32 %x, %target
  br i1 %all, label %out, label %hold
hold:
  %w = call i32 @wait(ptr %st, ptr %done, i32 %x, ptr %done.sleepers, i32 0)
  br label %join
out:
  store atomic i32 0, ptr %lock.p release, align 4
  ret void
}}

define void @tj_spin(i32 %n) {{
entry:
  br label %top
top:
  %k = phi i32 [ 0, %entry ], [ %k1, %top ]
  {pause}
  %k1 = add i32 %k, 1
  %more = icmp ult i32 %k1, %n
  br i1 %more, label %top, label %out
out:
  ret void
}}
"""


class Pool:
    """The process's pool. ``state`` is the address of its state block, ``threads`` the number of threads it runs."""

    def __init__(self) -> None:
        from tracejit_cpu.support import support

        self.threads = thread_count()
        self.futex = uses_futex()
        self.loaded = support()
        self._memory = ctypes.create_string_buffer(STATE_BYTES + 128)
        base = ctypes.addressof(self._memory)
        self.state = base + (-base) % 128
        self._launch = ctypes.CFUNCTYPE(
            None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64
        )(self.loaded.address("tj_launch"))
        self._worker = ctypes.CFUNCTYPE(
            ctypes.c_int32, ctypes.c_void_p, ctypes.c_int64, ctypes.c_uint32, ctypes.c_void_p
        )(self.loaded.address("tj_worker"))
        self._lock = threading.Lock()
        self._condition = threading.Condition()
        self._launching = 0  # programs running or about to; only used without futex
        self._workers: list[threading.Thread] = []
        self._set(SPIN, self._spins_per_millisecond())
        atexit.register(self.stop)
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._after_fork)

    def _get(self, offset: int) -> int:
        return ctypes.c_uint32.from_address(self.state + offset).value

    def _set(self, offset: int, value: int) -> None:
        ctypes.c_uint32.from_address(self.state + offset).value = value & 0xFFFFFFFF

    def _spins_per_millisecond(self) -> int:
        """How many pauses take about 1 ms here (a pause costs 10 to 150 cycles, depending on the CPU)."""
        spin = ctypes.CFUNCTYPE(None, ctypes.c_uint32)(self.loaded.address("tj_spin"))
        best = 1e9
        for _ in range(3):
            start = time.perf_counter()
            spin(2000)
            best = min(best, time.perf_counter() - start)
        return max(100, min(1_000_000, int(2000 * 1e-3 / max(best, 1e-7))))

    def start(self) -> None:
        """Start the workers if they do not run (first use, or after a fork)."""
        if self.threads < 2 or self._get(STARTED):
            return
        with self._lock:
            if self._get(STARTED):
                return
            seen = self._get(GEN)
            self._workers = [
                threading.Thread(target=self._work, args=(tid, seen), name=f"tracejit-cpu-{tid}", daemon=True)
                for tid in range(1, self.threads)
            ]
            for worker in self._workers:
                worker.start()
            self._set(STARTED, 1)

    def _work(self, tid: int, seen: int) -> None:
        last = ctypes.c_uint32(seen)
        while self._worker(self.state, tid, last.value, ctypes.addressof(last)):
            with self._condition:  # no futex: sleep in Python until somebody is about to launch
                while not self._launching and self._get(GEN) == last.value:
                    self._condition.wait()

    def run(self, function: int, table: int, threads: int) -> None:
        """Run a program from Python (the slow path and observed runs)."""
        if threads == 1:
            self._launch(self.state, function, table, 1)
            return
        self.start()
        if self.futex:
            self._launch(self.state, function, table, self.threads)
            return
        self._announce(1)
        try:
            self._launch(self.state, function, table, self.threads)
        finally:
            self._announce(-1)

    def _announce(self, change: int) -> None:
        with self._condition:
            self._launching += change
            self._condition.notify_all()

    def stop(self) -> None:
        """Let the workers return; called at exit."""
        with self._lock:
            if not self._get(STARTED):
                return
            deadline = time.monotonic() + 1.0
            while self._get(LOCK) and time.monotonic() < deadline:  # another thread is inside a program
                time.sleep(0.001)
            if self._get(LOCK):
                return
            self._set(STARTED, 0)
            ctypes.c_uint64.from_address(self.state + FUNCTION).value = 0
            if self.futex:
                self._wake_all()
            else:
                self._set(GEN, self._get(GEN) + 1)
                self._announce(0)
            for worker in self._workers:
                worker.join(timeout=1.0)
            self._workers = []

    def _wake_all(self) -> None:
        self._set(GEN, self._get(GEN) + 1)
        libc = ctypes.CDLL(None)
        number = 202 if host().arch == "x86_64" else 98
        libc.syscall(
            ctypes.c_long(number),
            ctypes.c_void_p(self.state),
            ctypes.c_int(129),
            ctypes.c_int(2147483647),
            ctypes.c_void_p(None),
            ctypes.c_void_p(None),
            ctypes.c_int(0),
        )

    def _after_fork(self) -> None:
        """In a forked child: the workers are gone; forget them and start anew on first use."""
        spins = self._get(SPIN)
        ctypes.memset(self.state, 0, STATE_BYTES)
        self._set(SPIN, spins)
        self._lock = threading.Lock()
        self._condition = threading.Condition()
        self._launching = 0
        self._workers = []


_pool: Pool | None = None
_pool_lock = threading.Lock()


def pool() -> Pool:
    """The process's pool, made on first use."""
    global _pool
    if _pool is None:
        with _pool_lock:
            if _pool is None:
                _pool = Pool()
    return _pool
