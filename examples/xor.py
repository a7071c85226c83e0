"""Learn exclusive-or, which no linear model can, with a network of two small layers.

    python examples/xor.py [--device cpu] [--seed 0]

Expected output: the loss falls from about 0.7 to below 0.01 and all four answers are right::

    step    0  loss 0.6930
    step  100  loss 0.0022
    ...
    0 xor 0 = 0  (probability of 1: 0.00)
    0 xor 1 = 1  (probability of 1: 1.00)
    1 xor 0 = 1  (probability of 1: 1.00)
    1 xor 1 = 0  (probability of 1: 0.00)
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np

import tracejit as tj
from tracejit import nn, optim

X = np.array([[0, 0], [0, 1], [1, 0], [1, 1]], np.float32)
Y = np.array([0, 1, 1, 0], np.float32)


class MLP(nn.Module):
    """2 -> 8 -> 1, a logit."""

    hidden: nn.Linear
    out: nn.Linear

    def __init__(self, *, rng: np.random.Generator) -> None:
        self.hidden = nn.Linear(2, 8, rng=rng)
        self.out = nn.Linear(8, 1, rng=rng)

    def __call__(self, x: Any) -> Any:
        return self.out(np.tanh(self.hidden(x)))[:, 0]


def loss_fn(model: MLP, x: Any, y: Any) -> Any:
    return nn.binary_cross_entropy_with_logits(model(x), y)


opt = optim.adam(0.05)


@tj.trace
def train_step(model, state, x, y):
    loss, grads = tj.value_and_grad(loss_fn)(model, x, y)
    model, state = opt.update(model, grads, state)
    return loss, model, state


@tj.trace
def predict(model, x):
    return nn.sigmoid(model(x))


def train(
    steps: int = 400, seed: int = 0, device: str | None = None, verbose: bool = True
) -> tuple[MLP, float]:
    """The trained model and its last loss."""
    model = MLP(rng=np.random.default_rng(seed))
    state = opt.init(model)
    loss = np.inf
    for step in range(steps):
        loss, model, state = train_step(model, state, X, Y, device=device)
        if verbose and step % 100 == 0:
            print(f"step {step:4d}  loss {float(loss):.4f}")
    return model, float(loss)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Learn exclusive-or.")
    parser.add_argument("--device", default=None, help="cpu, wgpu or numpy (default: the best there is)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    model, _ = train(seed=args.seed, device=args.device)
    for (a, b), p in zip(X.astype(int), np.asarray(predict(model, X, device=args.device)), strict=True):
        print(f"{a} xor {b} = {int(p > 0.5)}  (probability of 1: {p:.2f})")


if __name__ == "__main__":
    main()
