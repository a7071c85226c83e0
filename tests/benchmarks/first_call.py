"""How long the first call takes: ``python -m tests.benchmarks.first_call [-w a,b,...]``.

For each workload two new processes: one with an empty disk cache, one with the cache that the first left. Reported are
the first call less a steady call (what tracing, lowering and compiling add) in wall and processor time, and for the second
process the same after one other program has been compiled: what each further program of a process costs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time

from tests.benchmarks.compare import ROOT, environment
from tests.benchmarks.workloads import NAMES


def child(name: str, after_another: bool) -> None:
    """Measure in this process and print one line of JSON."""
    import numpy as np

    import tracejit as tj
    from tests.benchmarks import peer_tracejit

    if after_another:  # loads LLVM and the backend, which belong to the process, not to the program
        tj.trace(lambda x: x * 2 + 1)(np.ones(8, np.float32))
    run = peer_tracejit.make(name)
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    first, first_cpu = time.perf_counter() - wall, time.process_time() - cpu
    steady, steady_cpu = 1e9, 1e9
    for _ in range(3):
        wall, cpu = time.perf_counter(), time.process_time()
        run()
        steady, steady_cpu = (
            min(steady, time.perf_counter() - wall),
            min(steady_cpu, time.process_time() - cpu),
        )
    print(json.dumps({"ms": (first - steady) * 1e3, "cpu_ms": (first_cpu - steady_cpu) * 1e3}))


def measure(name: str, scratch: str, after_another: bool) -> dict[str, float]:
    """One new process."""
    command = [sys.executable, "-m", "tests.benchmarks.first_call", "--child", name]
    out = subprocess.run(
        [*command, *(["--after-another"] if after_another else [])],
        env=environment(2, scratch), cwd=ROOT, check=True, capture_output=True, text=True,
    )  # fmt: skip
    facts: dict[str, float] = json.loads(out.stdout.splitlines()[-1])
    return facts


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-w", "--workloads", default=",".join(NAMES))
    parser.add_argument("-n", "--repeat", type=int, default=3, help="processes per figure; the best counts")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--after-another", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child, options.after_another)
        return
    print(
        "| workload | empty cache, ms wall (cpu) | warm disk cache | warm, further program |\n|---|---|---|---|"
    )
    for name in options.workloads.split(","):
        cells = [name]
        with tempfile.TemporaryDirectory(prefix="tracejit-first-") as scratch:
            for kind in ("cold", "warm", "further"):
                found = []
                for i in range(options.repeat):
                    own = os.path.join(scratch, f"{i}" if kind == "cold" else "0")
                    os.makedirs(own, mode=0o700, exist_ok=True)
                    if kind == "further" and i == 0:
                        measure(name, own, True)  # stores the other program too
                    found.append(measure(name, own, kind == "further"))
                cells.append(f"{min(f['ms'] for f in found):.0f} ({min(f['cpu_ms'] for f in found):.0f})")
        print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
