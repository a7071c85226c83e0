"""The thread pool of the native CPU backend: how many threads, equal results, idleness, fork, exit, interrupts."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import numpy as np
import pytest

import tracejit as tj
from tracejit_cpu import host, runtime

ROOT = Path(__file__).parents[2]
PORTABLE = {"TRACEJIT_CPU_PORTABLE_THREADS": "1"}
MODES = [pytest.param({}, id="futex"), pytest.param(PORTABLE, id="portable")]

SETUP = """
    import os, signal, sys, threading, time
    import numpy as np
    import tracejit as tj
    x = np.random.default_rng(0).standard_normal((400, 400)).astype(np.float32)
    f = tj.trace(lambda x: np.tanh(x @ x).sum(axis=0), device="cpu")
    want = f(x).copy()
    assert os.environ["TRACEJIT_NUM_THREADS"] in map(str, f._entry_for((x,), {})[0].executable._threads)
    same = lambda: np.array_equal(f(x), want)
"""


def python(*args: str, threads: int | None = 3, timeout: float = 60, **env: str) -> str:
    """Run an interpreter with ``threads`` threads of ours; its output, once it ended well."""
    extra = {} if threads is None else {"TRACEJIT_NUM_THREADS": str(threads)}
    done = subprocess.run(
        [sys.executable, *args], env={**os.environ, **extra, **env}, cwd=ROOT, timeout=timeout,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr[-3000:]}"
    return done.stdout


def script(body: str, **options: object) -> str:
    """Run :data:`SETUP` and ``body`` in a process of their own."""
    return python("-c", textwrap.dedent(SETUP) + textwrap.dedent(body), **options)  # type: ignore[arg-type]


# -- how many ---------------------------------------------------------------------------------------------------------------


def test_the_environment_variable_decides(monkeypatch):
    monkeypatch.setenv("TRACEJIT_NUM_THREADS", "7")
    assert host.thread_count() == 7
    for wrong in ("0", "-2", "many", "1.5"):
        monkeypatch.setenv("TRACEJIT_NUM_THREADS", wrong)
        with pytest.raises(ValueError, match="TRACEJIT_NUM_THREADS must be a positive integer"):
            host.thread_count()


def test_otherwise_the_cores_of_this_process(monkeypatch):
    monkeypatch.delenv("TRACEJIT_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    monkeypatch.setattr(host, "_cgroup_cores", lambda: math.inf)
    assert host.thread_count() == 6
    monkeypatch.setattr(host, "_cgroup_cores", lambda: 2.5)
    assert host.thread_count() == 3
    monkeypatch.setattr(host, "_cgroup_cores", lambda: 0.2)
    assert host.thread_count() == 1


def test_cgroup_quotas_of_both_versions(tmp_path):
    root, own = tmp_path / "cgroup", tmp_path / "self"
    inner = root / "slice" / "job"
    inner.mkdir(parents=True)
    own.write_text("0::/slice/job\n")
    assert host._cgroup_cores(root, own) == math.inf
    (inner / "cpu.max").write_text("max 100000\n")
    assert host._cgroup_cores(root, own) == math.inf
    (root / "slice" / "cpu.max").write_text("350000 100000\n")
    assert host._cgroup_cores(root, own) == 3.5
    (inner / "cpu.max").write_text("200000 100000\n")
    assert host._cgroup_cores(root, own) == 2.0
    (inner / "cpu.max").write_text("nonsense\n")
    assert host._cgroup_cores(root, own) == 3.5
    one = tmp_path / "v1"
    (one / "cpu" / "docker").mkdir(parents=True)
    (one / "cpu" / "docker" / "cpu.cfs_quota_us").write_text("150000")
    (one / "cpu" / "docker" / "cpu.cfs_period_us").write_text("100000")
    own.write_text("4:cpu,cpuacct:/docker\n")
    assert host._cgroup_cores(one, own) == 1.5
    assert host._cgroup_cores(tmp_path / "missing", tmp_path / "missing") == math.inf


def test_small_programs_stay_on_one_thread():
    def threads(f, *args):
        return f._entry_for(args, {})[0].executable._threads

    f = tj.trace(lambda x: np.tanh(x @ x), device="cpu")
    assert threads(f, np.ones((8, 8), np.float32)) == [1]
    assert threads(f, np.ones((512, 512), np.float32)) == [runtime.pool().threads]


# -- the same bits ----------------------------------------------------------------------------------------------------------


def test_results_do_not_depend_on_the_number_of_threads():
    def digests(threads, **env):
        return json.loads(python("-m", "tests.backend.cpu_identity", threads=threads, timeout=300, **env))

    one = digests(1)
    assert len(one) == 5
    for threads in (2, 3, 5):
        assert digests(threads) == one
    assert digests(3, **PORTABLE) == one


@pytest.mark.parametrize("several", [False, True], ids=["one function", "several functions"])
def test_python_threads_may_call_at_once(several):
    rng = np.random.default_rng(0)
    inputs = [rng.standard_normal((n, 300)).astype(np.float32) for n in (40, 200, 200, 333)]
    functions = [
        tj.trace(lambda x: np.tanh(x @ x.T).sum(axis=0), device="cpu") for _ in range(4 if several else 1)
    ]
    want = [functions[i % len(functions)](x).copy() for i, x in enumerate(inputs)]
    failures: list[object] = []

    def work(i: int) -> None:
        try:
            for _ in range(60):
                got = functions[i % len(functions)](inputs[i])
                if not np.array_equal(got, want[i]):
                    failures.append(i)
        except BaseException as error:
            failures.append(error)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for w in workers:
        w.start()
    for w in workers:
        w.join(60)
    assert not failures and not any(w.is_alive() for w in workers)


# -- being a good citizen ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_an_idle_process_uses_no_cpu(mode):
    out = script(
        """
        assert same()
        time.sleep(0.2)
        before = time.process_time()
        time.sleep(0.6)
        print(time.process_time() - before)
        assert same()
        """,
        **mode,
    )
    assert float(out) < 0.03


@pytest.mark.parametrize("mode", MODES)
def test_fork_after_the_pool_was_used(mode):
    script(
        """
        child = os.fork()
        if child == 0:
            ok = same() and same()
            os._exit(0 if ok else 1)
        assert same()
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert same()
        """,
        **mode,
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_fork_while_another_thread_runs_a_program():
    script(
        """
        stop = False
        def keep_busy():
            while not stop:
                assert same()
        worker = threading.Thread(target=keep_busy)
        worker.start()
        for _ in range(5):
            child = os.fork()
            if child == 0:
                os._exit(0 if same() and same() else 1)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        stop = True
        worker.join()
        """
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_fork_while_other_threads_trace_and_compile():
    """A lock that is held in another thread, LLVM's included, stays held in the child for ever."""
    script(
        """
        stop = False
        def compile_things():
            i = 0
            while not stop:
                i += 1
                tj.trace(lambda x, i=i: np.tanh(x @ x.T) * float(i) + np.sin(x)[: i % 7 + 1].sum())(x)
        workers = [threading.Thread(target=compile_things) for _ in range(2)]
        for worker in workers:
            worker.start()
        for k in range(12):
            time.sleep(0.003 * k)
            child = os.fork()
            if child == 0:
                signal.alarm(30)
                tj.trace(lambda x: np.cos(x @ x.T).sum())(x)
                os._exit(0 if same() else 1)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        stop = True
        for worker in workers:
            worker.join()
        """
    )


@pytest.mark.parametrize("mode", MODES)
def test_exit_while_a_daemon_thread_runs_programs(mode):
    out = script(
        """
        def forever():
            while True:
                f(x)
        for _ in range(2):
            threading.Thread(target=forever, daemon=True).start()
        time.sleep(0.1)
        print("end")
        """,
        **mode,
    )
    assert out == "end\n"


@pytest.mark.parametrize("mode", MODES)
def test_keyboard_interrupt_during_a_call(mode):
    out = script(
        """
        # A shell that starts the tests in the background has them ignore the signal.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        big = np.ones((1200, 1200), np.float32)
        long = tj.trace(lambda x: (x @ x @ x @ x @ x @ x).sum(), device="cpu")
        value = long(big)
        for delay in (0.01, 0.05):
            timer = threading.Timer(delay, os.kill, (os.getpid(), signal.SIGINT))
            try:
                timer.start()
                for _ in range(100):
                    long(big)
                print("not interrupted")
            except KeyboardInterrupt:
                timer.join()
            assert long(big) == value and same()
        print("done")
        """,
        **mode,
    )
    assert out == "done\n"


def test_more_threads_than_cores_end():
    script("assert all(same() for _ in range(20))", threads=2 * (os.cpu_count() or 1) + 3)


def test_a_wrong_number_of_threads_is_an_error_that_says_so():
    out = python(
        "-c",
        "import numpy as np, tracejit as tj\n"
        "try: tj.trace(lambda x: x + 1, device='cpu')(np.ones(3))\n"
        "except ValueError as e: print(e)",
        threads=None,
        TRACEJIT_NUM_THREADS="lots",
    )
    assert out == "TRACEJIT_NUM_THREADS must be a positive integer, got 'lots'\n"
