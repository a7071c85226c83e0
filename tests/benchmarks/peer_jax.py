"""The workloads in JAX, jitted with donated parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.benchmarks import workloads as w


def make(name: str) -> Callable[[], Any]:
    """One step of the workload."""
    import jax
    import jax.numpy as jnp

    data, parameters = w.make(name)
    d = {k: jnp.asarray(v) for k, v in data.items()}
    p = [jnp.asarray(q) for q in parameters]
    loss = _loss(name)
    if name in w.OPTIMISER:
        return _train(name, loss, p, d)
    x = d["x"]
    if name == "f":
        fn = jax.jit(lambda p, x, d: jax.value_and_grad(lambda p, x: loss(p, x, d), (0, 1))(p, x))
        return lambda: float(jax.block_until_ready(fn(p, x, d))[0])
    functions = {
        "d": lambda x: jnp.tanh(x * w.SCALE + w.SHIFT) * jnp.exp(-x * x) + jnp.sqrt(jnp.abs(x)),
        "e1": lambda x: jax.nn.softmax(x),
        "e2": lambda x: _layer_norm(x, d["g"], d["b"]),
        "g0": lambda x: x.sum(0),
        "g1": lambda x: x.sum(1),
        "gall": lambda x: x.sum(),
    }
    jitted = jax.jit(functions[name])
    return lambda: jitted(x).block_until_ready()


def _layer_norm(x: Any, g: Any, b: Any) -> Any:
    import jax

    m = x.mean(-1, keepdims=True)
    v = ((x - m) ** 2).mean(-1, keepdims=True)
    return (x - m) * jax.lax.rsqrt(v + 1e-5) * g + b


def _loss(name: str) -> Callable[..., Any]:
    import jax
    import jax.numpy as jnp

    def cross_entropy(z, y):
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(z), y[:, None], 1))

    def pool(x):
        return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 1, 2, 2), (1, 1, 2, 2), "VALID")

    def conv(x, k, b):
        return jax.lax.conv_general_dilated(x, k, (1, 1), "VALID") + b[:, None, None]

    def loss(p, x, d):
        if name in ("a", "b"):
            for i in (0, 2, 4):
                x = x @ p[i] + p[i + 1]
                x = jax.nn.relu(x) if i < 4 else x
            return cross_entropy(x, d["y"])
        if name == "h":
            x = pool(jax.nn.relu(conv(x, p[0], p[1])))
            x = pool(jax.nn.relu(conv(x, p[2], p[3])))
            return cross_entropy(x.reshape(64, -1) @ p[4] + p[5], d["y"])
        if name == "c":
            mask = jnp.tril(jnp.ones((w.SEQ, w.SEQ), bool))
            size = w.DIM // w.HEADS
            h = p[0][x] + p[1]
            i = 2
            for _ in range(w.LAYERS):
                n = _layer_norm(h, p[i], p[i + 1])
                q, k, v = (
                    (n @ p[i + 2] + p[i + 3])
                    .reshape(w.BATCH, w.SEQ, 3, w.HEADS, size)
                    .transpose(2, 0, 3, 1, 4)
                )
                s = jnp.where(mask, q @ k.swapaxes(-1, -2) * size**-0.5, -1e30)
                o = (jax.nn.softmax(s) @ v).transpose(0, 2, 1, 3).reshape(w.BATCH, w.SEQ, w.DIM)
                h = h + o @ p[i + 4] + p[i + 5]
                n = _layer_norm(h, p[i + 6], p[i + 7])
                h = h + jax.nn.gelu(n @ p[i + 8] + p[i + 9], approximate=True) @ p[i + 10] + p[i + 11]
                i += 12
            h = _layer_norm(h, p[i], p[i + 1])
            return cross_entropy((h @ p[i + 2]).reshape(-1, w.VOCAB), d["y"].reshape(-1))
        n = _layer_norm(x, p[0], p[1])
        return ((jax.nn.gelu(n @ p[2] + p[3], approximate=True) @ p[4] + p[5]) * d["gy"]).sum()

    return loss


def _train(name: str, loss: Callable[..., Any], p: list[Any], d: dict[str, Any]) -> Callable[[], Any]:
    import jax
    import jax.numpy as jnp

    kind, rate = w.OPTIMISER[name], w.LEARNING_RATE[name]

    def step(p, m, v, t, d):
        value, grads = jax.value_and_grad(lambda q: loss(q, d["x"], d))(p)
        t = t + 1
        if kind == "sgd":
            return value, [q - rate * g for q, g in zip(p, grads)], m, v, t
        m = [0.9 * a + 0.1 * g for a, g in zip(m, grads)]
        v = [0.999 * a + 0.001 * g * g for a, g in zip(v, grads)]
        c1, c2 = 1 - 0.9**t, 1 - 0.999**t
        decay = 0.01 if kind == "adamw" else 0.0
        p = [q - rate * ((a / c1) / (jnp.sqrt(b / c2) + 1e-8) + decay * q) for q, a, b in zip(p, m, v)]
        return value, p, m, v, t

    jitted = jax.jit(step, donate_argnums=(0, 1, 2, 3))
    zeros = [] if kind == "sgd" else p
    held = {"s": (p, [q * 0 for q in zeros], [q * 0 for q in zeros], jnp.float32(0))}

    def run() -> float:
        value, *state = jitted(*held["s"], d)
        held["s"] = tuple(state)
        jax.block_until_ready(held["s"])
        return float(value)

    return run
