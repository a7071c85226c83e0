"""tracejit on a GPU beside PyTorch CUDA eager, in one process: ``python -m tests.benchmarks.gpu [--out DIR] [--only ...]``.

Measures train steps (a small GPT and a GPT-2-like one), matrix products in every layout and bandwidth-bound functions,
float32, with parameters and optimiser state resident on the device and nothing read back per step. Rounds of both sides
are interleaved; a GPU that was idle runs at low clocks, so every burst starts with 150 ms of gap-free work. Writes
``gpu.txt`` and ``gpu.json`` (with a breakdown by kernel) to DIR. Without torch or CUDA only tracejit's side is measured.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import pathlib
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

import tracejit as tj
from tests.benchmarks import gpu_checks, gpu_torch
from tests.benchmarks.gpu_models import SIZES, Sizes, batch, parameters, train_step
from tracejit import nn

PARTS = ("small", "big", "matmul", "bandwidth")
LAYOUTS = {"NN": ((0, 1), (0, 1)), "NT": ((0, 1), (1, 0)), "TN": ((1, 0), (0, 1))}


class Report:
    """Lines for people and a dict for programs, kept together and written after every part."""

    def __init__(self, folder: pathlib.Path | None) -> None:
        self.folder = folder
        self.lines: list[str] = []
        self.data: dict[str, Any] = {}
        self._start = time.perf_counter()

    def say(self, text: str, *, quiet: bool = False) -> None:
        """Add a line; ``quiet`` ones go to the file only."""
        self.lines.append(text)
        if not quiet:
            print(f"[{time.perf_counter() - self._start:5.0f} s] {text}", flush=True)

    def write(self) -> None:
        """Write what there is so far."""
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "gpu.txt").write_text("\n".join(self.lines) + "\n", encoding="utf-8")
        (self.folder / "gpu.json").write_text(json.dumps(self.data, indent=1), encoding="utf-8")


@dataclasses.dataclass(frozen=True)
class Side:
    """One contestant: queue a step, wait for everything queued."""

    step: Callable[[], Any]
    wait: Callable[[], Any]


def burst(side: Side, seconds: float, least: int = 3) -> float:
    """Seconds per step over a burst of steps queued one after the other."""
    side.step()
    side.wait()
    start = time.perf_counter()
    side.step()
    side.wait()
    once = time.perf_counter() - start
    count = max(least, int(seconds / once))
    side.step()
    start = time.perf_counter()
    for _ in range(count):
        side.step()
    side.wait()
    return (time.perf_counter() - start) / (count + 1)


def compare(sides: Mapping[str, Side], rounds: int, seconds: float) -> dict[str, list[float]]:
    """Seconds per step of every side in each round; the rounds are interleaved."""
    out: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            burst(side, 0.15)  # ramp the clocks up
            out[name].append(burst(side, seconds))
    return out


def _summary(times: Sequence[float]) -> dict[str, float]:
    middle = statistics.median(times)
    return {
        "median": middle,
        "low": min(times),
        "high": max(times),
        "spread": (max(times) - min(times)) / middle,
    }


def _ms(s: Mapping[str, float]) -> str:
    return f"{s['median'] * 1e3:8.3f} ms (+-{50 * s['spread']:.1f}%)"


# ---------------------------------------------------------------------------------------------------- parts
def train(name: str, sizes: Sizes, args: argparse.Namespace, report: Report) -> None:
    """A training step against torch's, its correctness, its dispatches and where its time goes."""
    params = parameters(sizes)
    x, y = batch(sizes)
    opt, step = train_step(sizes)
    first = time.perf_counter()
    held: dict[str, Any] = {"p": params, "s": opt.init(params)}
    dx, dy = to_device(x, args.device), to_device(y, args.device)

    def ours() -> None:
        held["loss"], held["p"], held["s"] = step(held["p"], held["s"], dx, dy, device=args.device)

    def wait() -> float:
        return float(held["loss"])

    ours()
    wait()
    first = time.perf_counter() - first
    for line in gpu_checks.check_step(name, sizes, params, x, y, args):
        report.say(line)
    inspection = step.inspect(held["p"], held["s"], dx, dy, device=args.device)
    listing = inspection.code["dispatches"]
    if report.folder is not None:
        report.folder.mkdir(parents=True, exist_ok=True)
        (report.folder / f"{name}.wgsl").write_text(inspection.code["WGSL"], encoding="utf-8")
    report.say(f"{name}: {listing.splitlines()[0]}; first call {first:.2f} s")
    sides = {"tracejit": Side(ours, wait)}
    rivals = {} if args.no_torch else gpu_torch.train_sides(sizes, params, x, y, args.peers)
    sides.update({k: Side(*v) for k, v in rivals.items()})
    times = {k: _summary(v) for k, v in compare(sides, args.rounds, args.seconds).items()}
    mine = times["tracejit"]
    for rival, t in times.items():
        ratio = "" if rival == "tracejit" else f"   tracejit / {rival} = {mine['median'] / t['median']:.3f}"
        report.say(f"{name} step, {rival:14s} {_ms(t)}{ratio}")
    start = time.perf_counter()
    for _ in range(10):
        ours()
    host = (time.perf_counter() - start) / 10
    wait()
    report.say(f"{name}: host time per call (10 calls queued) {host * 1e3:.3f} ms")

    def fresh() -> None:
        held["loss"], held["p"], held["s"] = step(held["p"], held["s"], x, y, device=args.device)

    fed = burst(Side(fresh, wait), args.seconds)
    report.say(f"{name}: with a fresh host batch every step {fed * 1e3:.3f} ms")
    breakdown = profile(step, (held["p"], held["s"], dx, dy), args, report)
    report.data[name] = {
        "sizes": dataclasses.asdict(sizes), "times": times, "first_call_s": first, "host_s": host,
        "with_upload_s": fed, "dispatches": listing.splitlines(), "breakdown": breakdown,
    }  # fmt: skip
    report.say(listing, quiet=True)
    report.write()


def profile(
    fn: Any, arguments: tuple[Any, ...], args: argparse.Namespace, report: Report
) -> list[dict[str, Any]]:
    """Time by dispatch (timestamps inside the pass; median of several runs), printed by family."""
    from tracejit_wgpu.observe import timed_segment

    entry, leaves = fn._entry_for(arguments, {"device": args.device})
    program, inputs = entry.executable, entry.gather(leaves)
    runtime = program._live()
    total = len(program._dispatches)
    runs: list[list[int]] = []
    for _ in range(3 + args.profile_runs):
        with runtime.lock:
            held, _ = program._bind(runtime, inputs)
            key = tuple([h.buffer.uid for h in held.values()])
            recording = program._recording(runtime, key, held, (0, total))
            spans = timed_segment(runtime, recording, list(range(total)))
        runs.append([end - start for _, start, end in spans])
    median = np.median(np.array(runs[3:]), axis=0) / 1e3
    kernels = {k.id: k for k in program.kernels}
    rows = []
    last = -1
    steps = [s for s in program._plan.steps if s.dispatch is not None]
    for step, us in zip(steps, median):
        k = kernels[step.kernel]
        rows.append({
            "kernel": k.id, "name": k.name, "label": step.dispatch.label, "grid": step.dispatch.grid,
            "us": round(float(us), 2),
            "flops": k.flops if k.id != last else 0, "bytes": k.bytes if k.id != last else 0,
        })  # fmt: skip
        last = k.id
    families: dict[str, list[float]] = {}
    for r in rows:
        f = families.setdefault(r["label"], [0.0, 0, 0, 0])
        f[0] += r["us"]
        f[1] += 1
        f[2] += r["flops"]
        f[3] += r["bytes"]
    whole = sum(f[0] for f in families.values())
    report.say(f"  by dispatch (each timed alone, so without overlap): {whole:.0f} us")
    for label, (us, count, flops, moved) in sorted(families.items(), key=lambda z: -z[1][0])[: args.rows]:
        rates = f"{flops / us / 1e6:6.1f} TF {moved / us / 1e3:7.0f} GB/s"
        report.say(f"  {us:9.1f} us {100 * us / whole:5.1f}%  x{count:<3d} {rates}  {label}")
    for r in rows:
        report.say(
            f"    {r['us']:8.1f} us  {r['flops'] / max(r['us'], 0.01) / 1e6:6.1f} TF  "
            f"{r['bytes'] / max(r['us'], 0.01) / 1e3:6.0f} GB/s  {r['kernel']}: {r['label']} {r['grid']}",
            quiet=True,
        )
    return rows


def to_device(array: np.ndarray, device: str) -> Any:
    """A copy of ``array`` on the device."""
    return tj.trace(lambda v: v + 0)(array, device=device)


def matmul(args: argparse.Namespace, report: Report) -> None:
    """C = A B with each operand as it lies or transposed, as TFLOP/s."""
    rng = np.random.default_rng(0)
    out: dict[str, Any] = {}
    for n in args.matmul:
        host = [rng.standard_normal((n, n), dtype=np.float32) for _ in range(2)]
        for layout, (pa, pb) in LAYOUTS.items():
            fn = tj.trace(lambda a, b, pa=pa, pb=pb: a.transpose(pa) @ b.transpose(pb))
            a, b = (to_device(h, args.device) for h in host)
            held: dict[str, Any] = {}

            def ours(fn=fn, a=a, b=b, held=held) -> None:
                held["c"] = fn(a, b, device=args.device)

            sides = {"tracejit": Side(ours, waiter(held, "c"))}
            ours()
            got = np.asarray(held["c"])[:64].astype(np.float64)
            ref = (host[0].transpose(pa)[:64].astype(np.float64)) @ host[1].transpose(pb).astype(np.float64)
            error = float(np.linalg.norm(got - ref) / np.linalg.norm(ref))
            if not args.no_torch:
                sides.update({k: Side(*v) for k, v in gpu_torch.matmul_sides(host, pa, pb).items()})
            times = {k: _summary(v) for k, v in compare(sides, args.rounds, args.seconds / 3).items()}
            rates = {k: 2 * n**3 / t["median"] / 1e12 for k, t in times.items()}
            rates["tracejit in one pass"] = 2 * n**3 / device_seconds(fn, (a, b), args) / 1e12
            text = "  ".join(f"{k} {r:5.1f}" for k, r in rates.items())
            spread = 50 * times["tracejit"]["spread"]
            report.say(f"matmul {n}^3 {layout} TFLOP/s: {text}  (+-{spread:.1f}%, error {error:.1e})")
            out[f"{n} {layout}"] = {"tflops": rates, "times": times, "error": error}
    report.data["matmul"] = out
    report.write()


def device_seconds(fn: Any, arguments: tuple[Any, ...], args: argparse.Namespace, repeat: int = 20) -> float:
    """Device time of one call by timestamps around ``repeat`` of them in one pass: no submission, no host."""
    from tracejit_wgpu.observe import timed_runs

    entry, leaves = fn._entry_for(arguments, {"device": args.device})
    program, inputs = entry.executable, entry.gather(leaves)
    runtime = program._live()
    with runtime.lock:
        held, _ = program._bind(runtime, inputs)
        key = tuple([h.buffer.uid for h in held.values()])
        recording = program._recording(runtime, key, held, (0, len(program._dispatches)))
        best = min(timed_runs(runtime, list(recording) * repeat) for _ in range(4))
    return best / repeat * 1e-9


def waiter(held: dict[str, Any], key: str) -> Callable[[], None]:
    """Wait for the device by its queue, without copying the result."""
    from tracejit_wgpu import runtime

    def wait() -> None:
        held[key].storage.runtime.finish()

    assert runtime
    return wait


def bandwidth(args: argparse.Namespace, report: Report) -> None:
    """Elementwise functions and row pipelines as GB/s and as a share of a copy's bandwidth."""
    rng = np.random.default_rng(0)
    rows, columns = args.rows_by_columns
    x = rng.standard_normal((rows, columns), dtype=np.float32)
    nbytes = 2 * x.nbytes
    functions: dict[str, Callable[[Any], Any]] = {
        "-x": lambda v: -v,
        "x * a + b": lambda v: v * 0.7 + 0.1,
        "gelu": lambda v: nn.gelu(v, approximate="tanh"),
        "tanh exp sqrt": lambda v: np.tanh(v * 0.7 + 0.1) * np.exp(-v * v) + np.sqrt(np.abs(v)),
        "softmax": lambda v: nn.softmax(v),
        "layer_norm": lambda v: nn.layer_norm(v),
        "x.T copy": lambda v: v.T + 0,
    }
    device_x = to_device(x, args.device)
    copies = {"buffer copy": Side(*_buffer_copy(device_x))}
    if not args.no_torch:
        copies.update({k: Side(*v) for k, v in gpu_torch.copy_sides(x).items()})
    speeds = {k: nbytes / min(v) / 1e9 for k, v in compare(copies, args.rounds, args.seconds / 3).items()}
    best = max(speeds.values())
    for name, speed in speeds.items():
        report.say(f"{name}: {speed:.0f} GB/s")
    out: dict[str, Any] = {"copies": speeds}
    for name, fn in functions.items():
        traced = tj.trace(fn)
        held: dict[str, Any] = {}

        def ours(traced=traced, held=held) -> None:
            held["y"] = traced(device_x, device=args.device)

        ours()
        sides = {"tracejit": Side(ours, waiter(held, "y"))}
        if not args.no_torch:
            sides.update({k: Side(*v) for k, v in gpu_torch.function_sides(name, x).items()})
        times = {k: _summary(v) for k, v in compare(sides, args.rounds, args.seconds / 3).items()}
        speed = {k: nbytes / t["median"] / 1e9 for k, t in times.items()}
        device = nbytes / device_seconds(traced, (device_x,), args) / 1e9
        text = "  ".join(f"{k} {v:.0f} GB/s ({100 * v / best:.0f}%)" for k, v in speed.items())
        report.say(f"{name:14s} {text}  in one pass {device:.0f} GB/s")
        out[name] = {"gbs": speed, "share_of_copy": speed["tracejit"] / best, "device_gbs": device}
    report.data["bandwidth"] = out
    report.write()


def _buffer_copy(source: Any) -> tuple[Callable[[], None], Callable[[], None]]:
    runtime, handle = source.storage.runtime, source.storage.handle
    target = runtime.pool.acquire(handle.nbytes)
    return (lambda: runtime.copy([(handle, 0, target, 0, handle.nbytes)])), runtime.finish


class _Tuning(logging.Handler):
    """Tuning lines of the backend, into the report."""

    def __init__(self, report: Report) -> None:
        super().__init__(logging.INFO)
        self.report = report

    def emit(self, record: logging.LogRecord) -> None:
        """Keep lines about tuning."""
        text = record.getMessage()
        if text.startswith("tune"):
            self.report.say(text)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse arguments and run the parts."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path)
    parser.add_argument("--only", default=",".join(PARTS), help="parts, with commas: " + ", ".join(PARTS))
    parser.add_argument("--device", default="wgpu")
    parser.add_argument("--peers", default="eager", help="torch forms: eager, compile")
    parser.add_argument("--no-torch", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.4, help="length of one burst")
    parser.add_argument("--profile-runs", type=int, default=9)
    parser.add_argument("--rows", type=int, default=24, help="families printed in a breakdown")
    parser.add_argument("--matmul", type=int, nargs="*", default=[1024, 2048, 4096])
    parser.add_argument(
        "--tiny", action="store_true", help="sizes for a software driver: only to see that it runs"
    )
    parser.add_argument("--tune", action="store_true", help="tune tiles first; kept on disk for this adapter")
    parser.add_argument("--verbose", action="store_true")
    args = parser.parse_args(argv)
    args.rows_by_columns = (1 << 14, 1 << 12)
    sizes = dict(SIZES)
    if args.tiny:
        sizes = {"small": Sizes(2, 128, 2, 64, 2, 256), "big": Sizes(3, 192, 3, 64, 2, 512)}
        args.matmul, args.rows_by_columns = [256], (256, 1024)
        args.rounds, args.seconds, args.profile_runs = 2, 0.05, 3
    register()
    args.no_torch = args.no_torch or not gpu_torch.available()
    report = Report(args.out)
    if args.tune:
        os.environ["TRACEJIT_WGPU_TUNE"] = "1"
        logging.getLogger("tracejit").addHandler(_Tuning(report))
        logging.getLogger("tracejit").setLevel(logging.INFO)
    report.data["machine"] = describe(args.device)
    report.say(" | ".join(f"{k}: {v}" for k, v in report.data["machine"].items()))
    for part in args.only.split(","):
        if part in sizes:
            train(part, sizes[part], args, report)
        elif part == "matmul":
            matmul(args, report)
        elif part == "bandwidth":
            bandwidth(args, report)
        else:
            parser.error(f"unknown part {part!r}")
    report.write()
    return 0


def register() -> None:
    """Make the backends known when the package is not installed but only on the path."""
    from tracejit.backend import backend_names

    if "wgpu" not in backend_names():
        import tracejit_cpu
        import tracejit_numpy
        import tracejit_wgpu

        for module in (tracejit_numpy, tracejit_cpu, tracejit_wgpu):
            tj.register_backend(module.backend)


def describe(device: str) -> dict[str, str]:
    """What runs the benchmark."""
    from tracejit_wgpu import runtime

    rt = runtime.get(device.partition(":")[2])
    out = {
        "adapter": rt.adapter.name, "driver": rt.adapter.description.partition("\n")[0], "api": rt.adapter.backend,
        "subgroup": str(rt.target.subgroup), "workgroup memory": str(rt.target.workgroup_memory),
        "buffers": str(rt.target.buffers), "python": platform.python_version(), "numpy": np.__version__,
        **gpu_torch.describe(),
    }  # fmt: skip
    return {k: str(v) for k, v in out.items()}


if __name__ == "__main__":
    sys.exit(main())
