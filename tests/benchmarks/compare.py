"""tracejit beside its peers: ``python -m tests.benchmarks.compare [-w a,b,...] [-p peers] [--json out.json]``.

Each peer runs in its own process; bursts of steps are interleaved between peers and start only when the machine is idle
(spinning threads of the previous peer must have gone to sleep). Compare the ratios: absolute times drift.
Peers that are not installed are left out: ``pip install -e '.[bench]'``.
"""

from __future__ import annotations

import argparse
import compileall
import importlib.util
import json
import os
import pathlib
import platform
import select
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

from tests.benchmarks.workloads import NAMES

ROOT = pathlib.Path(__file__).parents[2]
PEERS = ("tracejit", "torch-eager", "torch-compile", "torch-func", "jax", "numpy")
_BURST_S = 0.06
_FIRST_LIMIT_S = 240


def installed(peers: tuple[str, ...]) -> list[str]:
    """The peers whose package is here."""
    return [p for p in peers if p.startswith("tracejit") or importlib.util.find_spec(p.partition("-")[0])]


def wait_until_idle(limit_s: float) -> bool:
    """Wait until other processes leave 85% of the cores idle for 50 ms; False if that did not happen in time."""
    if not os.path.exists("/proc/stat"):
        time.sleep(0.2)
        return True

    def read() -> tuple[int, int]:
        with open("/proc/stat", encoding="ascii") as file:
            fields = [int(v) for v in file.readline().split()[1:9]]
        return sum(fields), fields[3]

    end = time.time() + limit_s
    while True:
        before = read()
        time.sleep(0.05)
        after = read()
        total = after[0] - before[0]
        if total == 0 or (after[1] - before[1]) / total > 0.85:
            return True
        if time.time() > end:
            return False


def environment(threads: int, scratch: str) -> dict[str, str]:
    """The same thread count for everybody, no peer's disk cache, and byte code for all: pip has compiled the peers'."""
    left_out = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE", "PYTHONDONTWRITEBYTECODE")
    env = {k: v for k, v in os.environ.items() if k not in left_out}
    n = str(threads)
    env.update(OMP_NUM_THREADS=n, OPENBLAS_NUM_THREADS=n, MKL_NUM_THREADS=n, TRACEJIT_NUM_THREADS=n)
    env.update(JAX_PLATFORMS="cpu", PYTHONWARNINGS="ignore", TORCHINDUCTOR_FX_GRAPH_CACHE="0")
    env.update(
        TORCHINDUCTOR_CACHE_DIR=scratch,
        XDG_CACHE_HOME=scratch,
        TRACEJIT_CACHE_DIR=os.path.join(scratch, "tracejit"),
    )
    return env


def compare(
    workload: str, peers: list[str], rounds: int, threads: int, idle_s: float
) -> dict[str, dict[str, Any]]:
    """Measure one workload on all peers; per peer: median and minimum ms, first call s, peak memory MB, losses."""
    results: dict[str, dict[str, Any]] = {}
    running: dict[str, subprocess.Popen[str]] = {}
    scratch = tempfile.mkdtemp(prefix="tracejit-bench-")
    try:
        for peer in peers:
            own = os.path.join(scratch, peer)
            os.makedirs(own, mode=0o700)
            wait_until_idle(idle_s)
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.benchmarks.worker", peer, workload],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                env=environment(threads, own), cwd=ROOT,
            )  # fmt: skip
            assert process.stdout is not None
            ready, _, _ = select.select([process.stdout], [], [], _FIRST_LIMIT_S)
            line = process.stdout.readline() if ready else json.dumps({"error": "time-out"})
            facts = json.loads(line or '{"error": "died"}')
            if "error" in facts:
                process.kill()
                if facts["error"] != "not written for this peer":
                    print(f"{workload}: {peer}: {facts['error']}", file=sys.stderr)
                continue
            running[peer] = process
            results[peer] = {**facts, "times": [], "quiet": 0}
        for round_ in range(rounds):
            for peer, process in running.items():
                r = results[peer]
                if r["warm"] > 2 and round_ > 1:
                    continue
                r["quiet"] += wait_until_idle(idle_s)
                n = max(1, min(400, int(_BURST_S / max(r["warm"], 1e-6))))
                assert process.stdin is not None and process.stdout is not None
                process.stdin.write(f"{n + 1}\n")
                process.stdin.flush()
                answer = json.loads(process.stdout.readline())
                r["times"] += answer["times"][1:]
                r["rss_mb"] = answer["rss_mb"]
    finally:
        for process in running.values():
            process.kill()
            process.wait()
        shutil.rmtree(scratch, ignore_errors=True)
    for r in results.values():
        times = r.pop("times")
        r["ms"] = statistics.median(times) * 1e3
        r["min_ms"] = min(times) * 1e3
        r["n"] = len(times)
    return results


def table(results: dict[str, dict[str, dict[str, Any]]], peers: list[str]) -> str:
    """A Markdown table of median ms, with tracejit's ratio to the best peer, first calls and memory."""
    others = [p for p in peers if not p.startswith("tracejit")]
    head = [
        "workload",
        *peers,
        "tracejit / best peer",
        "first call s: tracejit",
        "jax",
        "RSS MB: tracejit",
        "torch-eager",
        "jax",
    ]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name, row in results.items():

        def cell(peer: str, key: str, digits: int = 3, row: dict[str, dict[str, Any]] = row) -> str:
            return f"{row[peer][key]:.{digits}f}" if peer in row else "-"

        best = min((row[p]["ms"] for p in others if p in row), default=float("nan"))
        ratio = f"**{row['tracejit']['ms'] / best:.2f}**" if "tracejit" in row else "-"
        cells = [name, *(cell(p, "ms") for p in peers), ratio]
        cells += [cell("tracejit", "first", 2), cell("jax", "first", 2)]
        cells += [cell(p, "rss_mb", 0) for p in ("tracejit", "torch-eager", "jax")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run, print the table, and write JSON on request."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-w", "--workloads", default=",".join(NAMES))
    parser.add_argument("-p", "--peers", default=",".join(PEERS))
    parser.add_argument("-r", "--rounds", type=int, default=9)
    parser.add_argument("-t", "--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument(
        "--idle", type=float, default=1.2, help="seconds to wait for an idle machine before each burst"
    )
    parser.add_argument("--json", help="also write everything to this file")
    options = parser.parse_args()
    peers = installed(tuple(options.peers.split(",")))
    for folder in ("tracejit", "backends", "tests/benchmarks"):  # as pip does for what it installs
        compileall.compile_dir(ROOT / folder, quiet=2)
    results = {}
    for name in options.workloads.split(","):
        results[name] = compare(name, peers, options.rounds, options.threads, options.idle)
        print(table({name: results[name]}, peers).splitlines()[-1], file=sys.stderr, flush=True)
    machine = platform.processor() or platform.machine()
    print(f"{time.strftime('%Y-%m-%d')}, {machine}, {options.threads} threads; median ms per call")
    print(table(results, peers))
    if options.json:
        pathlib.Path(options.json).write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
