"""The workloads that a NumPy user would write by hand, gradients included. None for those nobody would (c, h)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tests.benchmarks import workloads as w

f32 = np.float32


def make(name: str) -> Callable[[], Any] | None:
    """One step of the workload, or None."""
    data, p = w.make(name)
    x = data["x"]
    if name in ("a", "b"):
        return _mlp(name, data, p)
    if name == "f":
        return _ln_mlp(data, p)
    if name in ("c", "h"):
        return None

    def softmax(x):
        e = np.exp(x - x.max(-1, keepdims=True))
        e /= e.sum(-1, keepdims=True)
        return e

    a, b = f32(w.SCALE), f32(w.SHIFT)
    functions = {
        "d": lambda x: np.tanh(x * a + b) * np.exp(-x * x) + np.sqrt(np.abs(x)),
        "e1": softmax,
        "e2": lambda x: _layer_norm(x, data["g"], data["b"])[2],
        "g0": lambda x: x.sum(0),
        "g1": lambda x: x.sum(1),
        "gall": lambda x: x.sum(),
    }
    return lambda: functions[name](x)


def _layer_norm(x: np.ndarray, g: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    c = x - x.mean(-1, keepdims=True)
    r = 1 / np.sqrt((c * c).mean(-1, keepdims=True) + f32(1e-5))
    c *= r
    return c, r, c * g + b


def _mlp(name: str, data: dict[str, np.ndarray], p: list[np.ndarray]) -> Callable[[], Any]:
    m, v = [np.zeros_like(q) for q in p], [np.zeros_like(q) for q in p]
    x, y = data["x"], data["y"]
    t = [0]

    def run() -> float:
        h = [x]
        for i in (0, 2, 4):
            z = h[-1] @ p[i]
            z += p[i + 1]
            if i < 4:
                np.maximum(z, 0, out=z)
            h.append(z)
        z = h[-1] - h[-1].max(1, keepdims=True)
        e = np.exp(z)
        s = e.sum(1, keepdims=True)
        rows = np.arange(len(y))
        loss = (np.log(s[:, 0]) - z[rows, y]).mean()
        d = e / s
        d[rows, y] -= 1
        d /= len(y)
        g: list[Any] = [None] * 6
        for i in (4, 2, 0):
            g[i] = h[i // 2].T @ d
            g[i + 1] = d.sum(0)
            if i:
                d = d @ p[i].T
                d *= h[i // 2] > 0
        if name == "a":
            for q, gq in zip(p, g):
                gq *= f32(0.01)
                q -= gq
            return float(loss)
        t[0] += 1
        c1, c2 = f32(1 - 0.9 ** t[0]), f32(1 - 0.999 ** t[0])
        for q, gq, a, b in zip(p, g, m, v):
            a *= f32(0.9)
            a += f32(0.1) * gq
            b *= f32(0.999)
            gq *= gq
            gq *= f32(0.001)
            b += gq
            q -= f32(1e-3) / c1 * a / (np.sqrt(b / c2) + f32(1e-8))
        return float(loss)

    return run


def _ln_mlp(data: dict[str, np.ndarray], p: list[np.ndarray]) -> Callable[[], Any]:
    g1, b1, w1, c1, w2, c2 = p
    x, dy = data["x"], data["gy"]
    k = f32((2 / np.pi) ** 0.5)

    def run() -> Any:
        xh, r, n = _layer_norm(x, g1, b1)
        z = n @ w1
        z += c1
        t = np.tanh(k * (z + f32(0.044715) * z * z * z))
        a = f32(0.5) * z * (1 + t)
        y = a @ w2 + c2
        loss = (y * dy).sum()
        dw2, dc2, da = a.T @ dy, dy.sum(0), dy @ w2.T
        dz = da * (f32(0.5) * (1 + t) + f32(0.5) * z * (1 - t * t) * k * (1 + f32(3 * 0.044715) * z * z))
        dw1, dc1, dn = n.T @ dz, dz.sum(0), dz @ w1.T
        dg, db, dh = (dn * xh).sum(0), dn.sum(0), dn * g1
        dx = r * (dh - dh.mean(-1, keepdims=True) - xh * (dh * xh).mean(-1, keepdims=True))
        return loss, dx, dg, db, dw1, dc1, dw2, dc2

    return run
