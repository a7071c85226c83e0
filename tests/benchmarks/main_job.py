"""The training step of ``examples/train_transformer.py`` on the reference backend and on ``cpu``, side by side.

    python -m tests.benchmarks.main_job [--rounds 3] [--size base]

NumPy's products run with one thread and with as many as there are cores; the faster of the two counts. Every measurement
is a process of its own; rounds alternate between them, and the table has the median over all rounds.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[2]
#: (name, device, threads of NumPy's products or None for all cores, steps)
RUNS = (("cpu", "cpu", 1, 40), ("numpy, 1 thread", "numpy", 1, 5), ("numpy, all cores", "numpy", None, 5))


def measure(device: str, size: str, steps: int) -> float:
    """Median seconds of a step after two that are not counted."""
    spec = importlib.util.spec_from_file_location("example", ROOT / "examples" / "train_transformer.py")
    assert spec is not None and spec.loader is not None
    example: Any = importlib.util.module_from_spec(spec)
    sys.modules["example"] = example
    spec.loader.exec_module(example)
    config, corpus, rng = example.SIZES[size], example.load_corpus(), np.random.default_rng(0)
    model = example.GPT(len(corpus.alphabet), config, rng=rng)
    optimizer, train_step = example.make_train_step(config.steps, config.peak_rate)
    state = optimizer.init(model)
    times = []
    for _ in range(steps + 2):
        x, y = example.sample_batch(corpus.train, rng, config)
        start = time.perf_counter()
        _, model, state = train_step(model, state, x, y, device=device)
        times.append(time.perf_counter() - start)
    return float(np.median(times[2:]))


def main(argv: Sequence[str] | None = None) -> int:
    """Print ms per step of every run and how much faster ``cpu`` is."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--size", default="base")
    parser.add_argument("--one", nargs=2, metavar=("DEVICE", "STEPS"), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.one:
        print(measure(options.one[0], options.size, int(options.one[1])))
        return 0
    found: dict[str, list[float]] = {name: [] for name, *_ in RUNS}
    for _ in range(options.rounds):
        for name, device, threads, steps in RUNS:
            command = [sys.executable, "-m", "tests.benchmarks.main_job", "--size", options.size]
            blas = str(threads or os.cpu_count() or 1)
            done = subprocess.run(
                [*command, "--one", device, str(steps)],
                env={**os.environ, "OPENBLAS_NUM_THREADS": blas, "OMP_NUM_THREADS": blas},
                capture_output=True, text=True, check=True, cwd=ROOT,
            )  # fmt: skip
            found[name].append(float(done.stdout))
    median = {name: float(np.median(values)) for name, values in found.items()}
    for name, values in found.items():
        print(
            f"{name:18} {median[name] * 1e3:8.1f} ms per step ({min(values) * 1e3:.1f} to {max(values) * 1e3:.1f})"
        )
    print(f"cpu is {min(v for n, v in median.items() if n != 'cpu') / median['cpu']:.1f} times faster")
    return 0


if __name__ == "__main__":
    sys.exit(main())
