"""Summaries of tensors asked for by the viewer: statistics, a histogram, a small picture. Runs on the training side, only
when someone asked. Called by ``client``.
"""

from __future__ import annotations

import numpy as np

from .history import NodeValues

BINS = 40
LARGEST_IMAGE = 192
SAMPLE = 4_000_000


def summarize(array: np.ndarray, step: int) -> NodeValues:
    """Statistics of one array (any shape, any numeric dtype)."""
    array = np.asarray(array)
    if array.dtype.kind not in "biufc" or array.size == 0:
        return NodeValues(step, {"size": float(array.size)}, [], (0.0, 0.0), None, "empty or not numeric")
    if array.dtype.kind == "c":
        array = np.abs(array)
    flat = array.reshape(-1)
    note = ""
    if flat.size > SAMPLE:
        flat = flat[:: -(-flat.size // SAMPLE)]
        note = f"from a sample of {flat.size:,} of {array.size:,} elements"
    x = flat.astype(np.float64)
    finite = x[np.isfinite(x)]
    stats = {
        "size": float(x.size),
        "nan": float(np.isnan(x).sum()),
        "inf": float(np.isinf(x).sum()),
        "zero": float((x == 0).sum()),
    }
    histogram: list[int] = []
    edges = (0.0, 0.0)
    if finite.size:
        lo, hi = float(finite.min()), float(finite.max())
        stats |= {"min": lo, "max": hi, "mean": float(finite.mean()), "std": float(finite.std())}
        span = (lo, hi) if hi > lo else (lo - 0.5, hi + 0.5)
        histogram = np.histogram(finite, BINS, span)[0].tolist()
        edges = (float(span[0]), float(span[1]))
    else:
        note = "no finite value"
    return NodeValues(step, stats, histogram, edges, picture(array), note)


def picture(array: np.ndarray) -> np.ndarray | None:
    """A tensor of rank two or more as an RGB image (uint8): its first matrix, blue below zero, warm above.

    A 3-channel image batch (NCHW) is shown as a grey or colour picture instead.
    """
    if array.ndim < 2 or min(array.shape[-2:]) < 2:
        return None
    if array.ndim == 4 and array.shape[1] in (1, 3):
        sample = np.moveaxis(array[0].astype(np.float64), 0, -1)
        sample = _shrink(sample)
        lo, hi = np.nanmin(sample), np.nanmax(sample)
        grey = np.nan_to_num((sample - lo) / (hi - lo if hi > lo else 1.0))
        return np.ascontiguousarray((np.broadcast_to(grey, (*grey.shape[:2], 3)) * 255).astype(np.uint8))
    matrix = _shrink(array.reshape(-1, *array.shape[-2:])[0].astype(np.float64))
    finite = np.isfinite(matrix)
    top = float(np.max(np.abs(matrix[finite]))) if finite.any() else 0.0
    v = np.where(finite, matrix, 0.0) / (top or 1.0)
    up, down = np.clip(v, 0, 1)[..., None], np.clip(-v, 0, 1)[..., None]
    ground, warm, cold = np.array([18.0, 22, 32]), np.array([255.0, 190, 110]), np.array([97.0, 149, 255])
    rgb = ground + up**0.7 * (warm - ground) + down**0.7 * (cold - ground)
    rgb[~finite] = (255, 84, 112)
    return np.clip(rgb, 0, 255).astype(np.uint8)


def _shrink(m: np.ndarray) -> np.ndarray:
    rows, cols = -(-m.shape[0] // LARGEST_IMAGE), -(-m.shape[1] // LARGEST_IMAGE)
    return m[::rows, ::cols]
