"""Recognise the 8x8 handwritten digits of scikit-learn with a small network, dense or convolutional.

    python examples/digits.py [--model mlp|cnn] [--device cpu] [--epochs N] [--seed 0]

Needs scikit-learn (``pip install tracejit[examples]``) for the 1797 images. Expected output: the accuracy on
360 images that were not trained on rises to 96-99%, within 5 s (MLP) or 20 s (CNN) on ``--device numpy``::

    epoch  1  loss 1.868  test accuracy 82.2%
    ...
    epoch  8  loss 0.047  test accuracy 98.3%
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np

import tracejit as tj
from tracejit import nn, optim

BATCH = 48


def load_digits(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(train images, train labels, test images, test labels); images (n, 1, 8, 8) float32 in [0, 1]."""
    from sklearn import datasets

    images, labels = datasets.load_digits(return_X_y=True)
    images = (images / 16.0).astype(np.float32).reshape(-1, 1, 8, 8)
    order = np.random.default_rng(seed).permutation(len(images))
    train, test = order[:1437], order[1437:]
    return images[train], labels[train], images[test], labels[test]


def make_mlp(rng: np.random.Generator) -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 64, rng=rng), nn.relu, nn.Linear(64, 10, rng=rng))


def make_cnn(rng: np.random.Generator) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, rng=rng),
        nn.relu,
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1, rng=rng),
        nn.relu,
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * 2 * 2, 10, rng=rng),
    )


MODELS = {"mlp": make_mlp, "cnn": make_cnn}


def loss_fn(model: Any, x: Any, y: Any) -> Any:
    return nn.cross_entropy(model(x), y)


opt = optim.adamw(6e-3)


@tj.trace
def train_step(model, state, x, y):
    loss, grads = tj.value_and_grad(loss_fn)(model, x, y)
    model, state = opt.update(model, grads, state)
    return loss, model, state


@tj.trace
def accuracy(model, x, y):
    return np.mean(np.argmax(model(x), axis=-1) == y)


def train(
    kind: str = "cnn", epochs: int = 8, seed: int = 0, device: str | None = None, verbose: bool = True
) -> tuple[Any, float]:
    """The trained model and its accuracy on the test images."""
    x, y, x_test, y_test = load_digits(seed)
    rng = np.random.default_rng(seed)
    model = MODELS[kind](rng)
    state = opt.init(model)
    score = 0.0
    for epoch in range(1, epochs + 1):
        order = rng.permutation(len(x))
        losses = []
        for start in range(0, len(x) - BATCH + 1, BATCH):
            batch = order[start : start + BATCH]
            loss, model, state = train_step(model, state, x[batch], y[batch], device=device)
            losses.append(float(loss))
        score = float(accuracy(model, x_test, y_test, device=device))
        if verbose:
            print(f"epoch {epoch:2d}  loss {np.mean(losses):.3f}  test accuracy {score:.1%}")
    return model, score


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Recognise handwritten digits.")
    parser.add_argument("--model", choices=sorted(MODELS), default="cnn")
    parser.add_argument("--device", default=None, help="cpu, wgpu or numpy (default: the best there is)")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    train(args.model, args.epochs, args.seed, args.device)


if __name__ == "__main__":
    main()
