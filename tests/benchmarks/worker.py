"""One peer, one workload, one process: step counts on stdin, times as JSON lines on stdout. See ``compare.py``."""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from typing import Any


def _maker(peer: str, workload: str) -> Callable[[], Any]:
    """Import the peer (timed as part of import, not of the first call) and return a function that builds its step."""
    if peer.startswith("torch"):
        import torch

        from tests.benchmarks import peer_torch

        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        return lambda: peer_torch.make(workload, peer.partition("-")[2] or "eager")
    if peer == "jax":
        import jax  # noqa: F401

        from tests.benchmarks import peer_jax

        return lambda: peer_jax.make(workload)
    if peer == "numpy":
        from tests.benchmarks import peer_numpy

        return lambda: peer_numpy.make(workload)
    from tests.benchmarks import peer_tracejit

    return lambda: peer_tracejit.make(workload, peer.partition("-")[2] or None)


def main() -> None:
    """The protocol: one line after the first calls, then one per request ``n`` until end of input or ``q``."""
    peer, workload = sys.argv[1:3]
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # peers print to stdout; the protocol must stay clean

    def say(**fields: Any) -> None:
        out.write(json.dumps(fields) + "\n")
        out.flush()

    try:
        t0 = time.perf_counter()
        make = _maker(peer, workload)
        t1 = time.perf_counter()
        run = make()
        if run is None:
            say(error="not written for this peer")
            return
        first = run()
        t2 = time.perf_counter()
        for _ in range(4):
            last = run()
        t3 = time.perf_counter()
        loss = lambda v: v if isinstance(v, float) else None  # noqa: E731
        say(
            imported=t1 - t0, first=t2 - t1, warm=(t3 - t2) / 4, loss_first=loss(first), loss_fifth=loss(last)
        )
        for line in sys.stdin:
            if line.strip() == "q":
                break
            run()
            times = []
            for _ in range(int(line)):
                start = time.perf_counter()
                run()
                times.append(time.perf_counter() - start)
            say(times=times, rss_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    except Exception as error:
        import traceback

        traceback.print_exc()
        say(error=f"{type(error).__name__}: {error}"[:300])


if __name__ == "__main__":
    main()
