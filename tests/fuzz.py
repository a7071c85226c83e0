"""How far two correct runs of a random program may differ, and whether a backend's run is within that.

Used by ``tests/backend/test_fuzz.py``; ``python -m tests.fuzz --device cpu --count 2000`` runs many programs and prints
those that differ with the shortest prefix that shows it. What rounding may do to a result is measured: the program is run in
float64, again with every inexact value disturbed by random rounding errors, and a result may differ by a multiple of what
that changed. So a test that fails has found a real difference.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

import tracejit as tj
from tests.fuzz_programs import F32, F64, NARROW_DTYPES, WIDE_DTYPES, Program, random_program, small_numbers


@dataclass
class Difference:
    """One result that is further from the truth than rounding explains."""

    what: str
    worst: float
    got: Any
    expected: Any

    def __str__(self) -> str:
        return f"{self.what}: {self.worst:.3g} times the allowance\n  got      {self.got!r}\n  expected {self.expected!r}"


def _differences(
    what: str,
    got: Any,
    narrow: Any,
    wide: Any,
    disturbed: Sequence[Any],
    *,
    exact: bool,
    eps: float,
    slack: float,
    loose: bool,
) -> list[Difference]:
    got, narrow, wide = np.asarray(got), np.asarray(narrow), np.asarray(wide)
    if got.shape != narrow.shape:
        return [Difference(f"{what} has shape {got.shape} instead of {narrow.shape}", np.inf, got, narrow)]
    if got.dtype != narrow.dtype and not (loose and got.dtype.kind == narrow.dtype.kind):
        return [Difference(f"{what} has dtype {got.dtype} instead of {narrow.dtype}", np.inf, got, narrow)]
    if not narrow.size:
        return []
    if exact:
        if np.array_equal(got, narrow):
            return []
        return [Difference(f"{what} should be exact", np.inf, got, narrow)]
    g, n = got.astype(np.float64), narrow.astype(np.float64)
    moved = np.abs(n - wide)
    for d in disturbed:
        moved = np.maximum(moved, np.abs(np.asarray(d) - wide))
    allowed = slack * (moved + eps * np.abs(wide) + eps * np.abs(wide).max() + eps * moved.max()) + 1e-30
    with np.errstate(invalid="ignore"):
        ratio = np.where(np.isfinite(g), np.abs(g - wide) / allowed, np.inf)
    worst = float(ratio.max())
    return [] if worst <= 1 else [Difference(what, worst, got, narrow)]


def _jittered(arrays: Sequence[np.ndarray], rng: np.random.Generator, least: Any) -> list[np.ndarray]:
    """The inputs in the device's types, each floating-point number moved by up to one unit in the last place."""
    out = []
    for x in arrays:
        x = np.asarray(x)
        if x.dtype.kind == "f":
            x = x.astype(min(x.dtype, np.dtype(least), key=lambda d: d.itemsize))
            x = (x * (1 + np.finfo(x.dtype).eps * rng.uniform(-1, 1, x.shape))).astype(x.dtype)
        out.append(x)
    return out


def _is_cancellation(got: Any, wide: Any, again: Sequence[Any], eps: float, slack: float) -> bool:
    """Whether NumPy itself, in the device's types, gives results that far apart for inputs a rounding error apart.

    The disturbed runs miss what cancels inside one operation's gradient: ``1 - tanh(x)**2`` near one, sums that are zero by
    algebra. Only differences that are tiny beside the result's scale can be excused, so a wrong branch or tie cannot.
    """
    g, w = np.asarray(got).astype(np.float64), np.asarray(wide).astype(np.float64)
    # Intermediate values are of the order of one: their own rounding error is an absolute one for what is left of them.
    spread = np.full_like(w, eps)
    for a in again:
        spread = np.maximum(spread, np.abs(np.asarray(a).astype(np.float64) - w))
    off = np.abs(g - w)
    return bool(
        (off <= 1e-5 * (1 + np.abs(w).max(initial=0.0))).all()
        and (off <= slack * spread.max(initial=0.0)).all()
    )


def compare(
    program: Program, device: str, *, gradients: bool = True, slack: float = 64.0
) -> list[Difference]:
    """Run ``program`` and its gradient on ``device``; what differs from NumPy by more than rounding explains."""
    loose = device.startswith("wgpu")
    least = F32 if loose else F64
    narrow_eps = [np.finfo(v.narrow.dtype).eps for v in program.values.values() if v.kind == "f"]
    eps = max([np.finfo(least).eps, *narrow_eps])
    arrays, wides = program.arrays(), program.arrays(wide=True)
    fn = program.function()
    rng = np.random.default_rng(program.seed)
    with np.errstate(all="ignore"):
        narrow = fn(*arrays)
        wide = program.function(wide=True)(*wides)
        noisy_fn = program.function(wide=True, noisy=True)
        noises = [program.noise(rng, least) for _ in range(3)]
        disturbed = [noisy_fn(*wides, noise) for noise in noises]
    got = tj.trace(fn)(*arrays, device=device)
    found: list[Difference] = []
    for i, name in enumerate(program.outputs):
        exact = program.values[name].exact
        wrong = _differences(
            f"output {name}", got[i], narrow[i], wide[i], [d[i] for d in disturbed],
            exact=exact, eps=eps, slack=slack, loose=loose,
        )  # fmt: skip
        # A GPU contracts ``x - mean * scale`` into one operation, so what is zero by algebra in NumPy need not be there.
        if wrong and loose and not exact and _is_cancellation(got[i], wide[i], [], eps, slack):
            continue
        found += wrong
    floats = [i for i, v in enumerate(program.inputs) if v.kind == "f"]
    weights = {
        name: small_numbers(rng, program.values[name].shape, F64)
        for name in program.outputs
        if program.values[name].kind == "f"
    }
    if not gradients or not floats or not weights:
        return found

    def loss_of(run: Callable[..., Any], wide: bool) -> Callable[..., Any]:
        def loss(*args: Any) -> Any:
            total: Any = 0.0
            for name, value in zip(program.outputs, run(*args)):
                if name in weights:
                    w = weights[name] if wide else weights[name].astype(program.values[name].narrow.dtype)
                    total = total + (value * w).sum()
            return total

        return loss

    # The gradient of one loss over all outputs, on the device, in NumPy as written, in float64, and disturbed.
    wrt = tuple(floats)
    got_gradients = tj.grad(loss_of(fn, False), wrt=wrt)
    narrow_gradients = tj.trace(got_gradients)(*arrays, device="numpy")
    wide_gradients = tj.trace(tj.grad(loss_of(program.function(wide=True), True), wrt=wrt))(
        *wides, device="numpy"
    )
    noisy = tj.trace(tj.grad(loss_of(noisy_fn, True), wrt=wrt))
    disturbed_gradients = [noisy(*wides, noise, device="numpy") for noise in noises]
    actual = tj.trace(got_gradients)(*arrays, device=device)
    again: list[Any] = []  # the gradient at inputs a rounding error away, computed once and only when needed
    for k, i in enumerate(floats):
        wrong = _differences(
            f"gradient of {program.inputs[i].name}", actual[k], narrow_gradients[k], wide_gradients[k],
            [d[k] for d in disturbed_gradients], exact=False, eps=eps, slack=4 * slack, loose=loose,
        )  # fmt: skip
        if wrong and not again:
            traced = tj.trace(got_gradients)
            again = [traced(*_jittered(arrays, rng, least), device="numpy") for _ in range(4)]
        if wrong and not _is_cancellation(actual[k], wide_gradients[k], [a[k] for a in again], eps, slack):
            found += wrong
    return found


def explain(program: Program, device: str, **options: Any) -> str:
    """What differs, and the shortest prefix of the program that shows a difference."""
    text = [str(program), *map(str, compare(program, device, **options))]
    for count in range(1, len(program.steps)):
        part = program.truncated(count)
        try:
            wrong = compare(part, device, **options)
        except Exception as error:
            text.append(f"shortest: {type(error).__name__}: {error}\n{part}")
            break
        if wrong:
            text.append(f"shortest:\n{part}\n" + "\n".join(map(str, wrong)))
            break
    return "\n".join(text)


def main(argv: Sequence[str] | None = None) -> int:
    """Run many programs and print those that differ; the exit status is the number of failures (at most 100)."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="number of the first program")
    parser.add_argument("--max-failures", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after this long")
    options = parser.parse_args(argv)
    dtypes = NARROW_DTYPES if options.device.startswith("wgpu") else WIDE_DTYPES
    failures, start, done = 0, time.time(), 0
    for seed in range(options.seed, options.seed + options.count):
        if time.time() - start > options.seconds or failures >= options.max_failures:
            break
        program = random_program(seed, dtypes=dtypes)
        done += 1
        try:
            if compare(program, options.device):
                failures += 1
                print(explain(program, options.device), "\n", flush=True)
        except Exception as error:
            failures += 1
            print(f"{program}\n{type(error).__name__}: {error}", flush=True)
            for count in range(1, len(program.steps)):
                try:
                    compare(program.truncated(count), options.device)
                except Exception:
                    print(f"shortest:\n{program.truncated(count)}\n", flush=True)
                    break
    print(f"{done} programs on {options.device}: {failures} failures, {time.time() - start:.0f} s")
    return min(failures, 100)


if __name__ == "__main__":
    sys.exit(main())
