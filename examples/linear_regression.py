"""Fit a straight line by gradient descent: the smallest complete program.

    python examples/linear_regression.py [--device cpu] [--seed 0]

Expected output: the loss falls to the noise floor of about 0.01 and the weights agree with the closed-form
least-squares solution::

    step   0  loss 13.1899
    step 100  loss 0.0102
    gradient descent: slope 2.9966, intercept -1.0039
    closed form:      slope 2.9966, intercept -1.0039
"""

from __future__ import annotations

import argparse

import numpy as np

import tracejit as tj
from tracejit import nn, optim


def make_data(seed: int, n: int = 256) -> tuple[np.ndarray, np.ndarray]:
    """Points on y = 3 x - 1 with Gaussian noise of standard deviation 0.1; both (n,) float32."""
    rng = np.random.default_rng(seed)
    x = rng.uniform(-2, 2, n).astype(np.float32)
    return x, (3 * x - 1 + 0.1 * rng.standard_normal(n)).astype(np.float32)


def predict(params: dict, x: np.ndarray) -> np.ndarray:
    return x * params["slope"] + params["intercept"]


def loss_fn(params: dict, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return nn.mse_loss(predict(params, x), y)


opt = optim.sgd(0.1, momentum=0.5)


@tj.trace
def train_step(params, state, x, y):
    loss, grads = tj.value_and_grad(loss_fn)(params, x, y)
    params, state = opt.update(params, grads, state)
    return loss, params, state


def train(steps: int = 200, seed: int = 0, device: str | None = None, verbose: bool = True) -> dict:
    """The fitted ``{"slope": ..., "intercept": ...}``."""
    x, y = make_data(seed)
    params = {"slope": np.zeros((), np.float32), "intercept": np.zeros((), np.float32)}
    state = opt.init(params)
    for step in range(steps):
        loss, params, state = train_step(params, state, x, y, device=device)
        if verbose and step % 100 == 0:
            print(f"step {step:3d}  loss {float(loss):.4f}")
    return {name: float(value) for name, value in params.items()}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Fit a straight line by gradient descent.")
    parser.add_argument("--device", default=None, help="cpu, wgpu or numpy (default: the best there is)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    fitted = train(seed=args.seed, device=args.device)
    slope, intercept = np.polyfit(*make_data(args.seed), deg=1)
    print(f"gradient descent: slope {fitted['slope']:.4f}, intercept {fitted['intercept']:.4f}")
    print(f"closed form:      slope {slope:.4f}, intercept {intercept:.4f}")


if __name__ == "__main__":
    main()
