"""Is the step that ``gpu.py`` times the right one? Loss and gradients against float64, and a short loss curve."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence

import numpy as np

import tracejit as tj
from tests.benchmarks import gpu_torch
from tests.benchmarks.gpu_models import Sizes, loss_function, train_step

TOLERANCE = 5e-4
CURVE = 8


def check_step(
    name: str, s: Sizes, params: Sequence[np.ndarray], x: np.ndarray, y: np.ndarray, args: argparse.Namespace
) -> Iterator[str]:
    """Lines that say how far loss, gradients and loss curve are off; raises AssertionError if too far."""
    rng = np.random.default_rng(2)  # biases and norms away from their special start values
    moved = [
        p + rng.standard_normal(p.shape).astype(np.float32) * np.float32(0.05) if p.ndim == 1 else p
        for p in params
    ]
    gradients = tj.trace(tj.value_and_grad(loss_function()))
    loss, grads = gradients(list(moved), x, y, device=args.device)
    got, mine = float(loss), [np.asarray(g) for g in grads]
    if args.no_torch:
        ref_loss, ref = gradients(list(moved), x, y, device="cpu")
        wanted, what = float(ref_loss), "float32 on the CPU"
        reference = [np.asarray(g) for g in ref]
    else:
        wanted, reference = gpu_torch.gradients(s, moved, x, y, double=True)
        what = "torch float64"
    errors = [
        float(np.linalg.norm(a.astype(np.float64) - b) / max(np.linalg.norm(b), 1e-30))
        for a, b in zip(mine, reference)
    ]
    worst = int(np.argmax(errors))
    yield (
        f"{name}: loss {got:.6f}, {what} {wanted:.6f}; worst gradient error {errors[worst]:.1e} "
        f"(parameter {worst} of {len(errors)}), median {np.median(errors):.1e}"
    )
    assert abs(got - wanted) < 1e-4 * max(1.0, abs(wanted)) and errors[worst] < TOLERANCE, errors
    if args.no_torch:
        return
    opt, step = train_step(s)
    p, state = list(params), opt.init(params)
    curve = []
    for _ in range(CURVE):
        value, p, state = step(p, state, x, y, device=args.device)
        curve.append(value)
    ours = [float(v) for v in curve]
    theirs = gpu_torch.losses(s, params, x, y, CURVE)
    gap = max(abs(a - b) for a, b in zip(ours, theirs))
    yield f"{name}: loss over {CURVE} steps {ours[0]:.5f} -> {ours[-1]:.5f}, torch {theirs[-1]:.5f}, largest gap {gap:.1e}"
    assert gap < 2e-3, (ours, theirs)
