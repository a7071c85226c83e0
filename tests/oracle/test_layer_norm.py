"""LayerNorm's gradients for gamma, beta and x: the ancestor of this project had them wrong.

Three independent witnesses in float64: central differences, the closed form, and linearity facts that any correct
gradient has. ``x̂ = (x - mean) / sqrt(var + eps)``, ``y = gamma x̂ + beta``:

- ``d_beta = Σ_rows g``, ``d_gamma = Σ_rows g x̂``,
- ``d_x = (h - mean(h) - x̂ mean(h x̂)) / sqrt(var + eps)`` with ``h = g gamma``   (Ba, Kiros & Hinton 2016).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import optree
import pytest

import tracejit as tj
from tracejit import nn

EPS = 1e-5
SHAPES = [(4, 5), (7,), (2, 3, 6), (1, 2), (3, 1), (2, 2, 2, 33)]


def problem(shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """``x, gamma, beta`` and the weights ``g`` that make a scalar of the result: ``loss = Σ g y``."""
    rng = np.random.default_rng(len(shape))
    n = shape[-1]
    return 3 + 2 * rng.normal(size=shape), rng.normal(size=n), rng.normal(size=n), rng.normal(size=shape)


def closed_form(x: np.ndarray, gamma: np.ndarray, g: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    mean = x.mean(-1, keepdims=True)
    deviation = np.sqrt(((x - mean) ** 2).mean(-1, keepdims=True) + EPS)
    xhat = (x - mean) / deviation
    rows = tuple(range(x.ndim - 1))
    h = g * gamma
    d_x = (h - h.mean(-1, keepdims=True) - xhat * (h * xhat).mean(-1, keepdims=True)) / deviation
    return d_x, (g * xhat).sum(rows), g.sum(rows)


def loss(x: Any, gamma: Any, beta: Any, g: Any) -> Any:
    return (nn.layer_norm(x, gamma, beta, eps=EPS) * g).sum()


def central(which: int, *arrays: np.ndarray, step: float = 1e-5) -> np.ndarray:
    out = np.zeros_like(arrays[which])
    for index in np.ndindex(out.shape):
        values = []
        for sign in (1, -1):
            moved = [a.copy() for a in arrays]
            moved[which][index] += sign * step
            values.append(float(loss(*moved)))
        out[index] = (values[0] - values[1]) / (2 * step)
    return out


@pytest.mark.parametrize("shape", SHAPES)
def test_the_value_is_the_textbook_formula(shape: tuple[int, ...], device: str) -> None:
    x, gamma, beta, _ = problem(shape)
    expected = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + EPS) * gamma + beta
    got = tj.trace(lambda *a: nn.layer_norm(*a, eps=EPS))(x, gamma, beta, device=device)
    tolerance = 1e-4 if device == "wgpu" else 1e-11
    np.testing.assert_allclose(np.asarray(got), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_match_the_closed_form(shape: tuple[int, ...], device: str) -> None:
    x, gamma, beta, g = problem(shape)
    gradients = tj.trace(tj.grad(loss, wrt=(0, 1, 2)))(x, gamma, beta, g, device=device)
    tolerance = 2e-3 if device == "wgpu" else 1e-9
    for got, want in zip(gradients, closed_form(x, gamma, g)):
        np.testing.assert_allclose(np.asarray(got), want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shape", SHAPES[:-1])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_gradients_match_central_differences(shape: tuple[int, ...], which: int) -> None:
    x, gamma, beta, g = problem(shape)
    got = tj.grad(loss, wrt=which)(x, gamma, beta, g)
    np.testing.assert_allclose(got, central(which, x, gamma, beta, g), rtol=1e-6, atol=1e-7)


def test_gradients_in_single_precision(device: str) -> None:
    x, gamma, beta, g = (a.astype(np.float32) for a in problem((16, 64)))
    gradients = tj.trace(tj.grad(loss, wrt=(0, 1, 2)))(x, gamma, beta, g, device=device)
    exact = closed_form(*(a.astype(np.float64) for a in (x, gamma, g)))
    for got, want in zip(gradients, exact):
        assert np.asarray(got).dtype == np.float32
        np.testing.assert_allclose(np.asarray(got), want, rtol=1e-4, atol=1e-4)


def test_the_gradient_of_x_has_no_mean_and_is_orthogonal_to_x() -> None:
    """Layer norm ignores shifts and (but for eps) scalings of a row, so its gradient has no part along them."""
    x, gamma, beta, g = problem((5, 40))
    d_x = tj.grad(loss)(x, gamma, beta, g)
    np.testing.assert_allclose(d_x.sum(-1), 0, atol=1e-10)
    centred = x - x.mean(-1, keepdims=True)
    np.testing.assert_allclose((d_x * centred).sum(-1), 0, atol=1e-4)


def test_second_derivatives() -> None:
    x, gamma, beta, g = problem((3, 4))
    v = np.cos(x)

    def directional(x):
        return (tj.grad(loss)(x, gamma, beta, g) * v).sum()

    got = tj.grad(directional)(x)
    step = 1e-5
    want = np.zeros_like(x)
    for index in np.ndindex(x.shape):
        up, down = x.copy(), x.copy()
        up[index] += step
        down[index] -= step
        want[index] = float(directional(up) - directional(down)) / (2 * step)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-7)


def test_the_module_has_the_same_gradients() -> None:
    x, gamma, beta, g = problem((4, 5))
    layer = with_values(nn.LayerNorm(5, eps=EPS, dtype=np.float64), gamma, beta)
    gradient = tj.grad(lambda m: (m(x) * g).sum())(layer)
    _, d_gamma, d_beta = closed_form(x, gamma, g)
    np.testing.assert_allclose(gradient.weight, d_gamma, rtol=1e-9)
    np.testing.assert_allclose(gradient.bias, d_beta, rtol=1e-9)


def with_values(layer: nn.LayerNorm, gamma: np.ndarray, beta: np.ndarray) -> nn.LayerNorm:
    """The module with other parameters: modules are frozen, trees are rebuilt."""
    names = [a.codify("").strip(".") for a in optree.tree_accessors(layer, namespace="tracejit")]
    values = {"weight": gamma, "bias": beta}
    tree = optree.tree_structure(layer, namespace="tracejit")
    return optree.tree_unflatten(tree, [values[n] for n in names])


def test_rows_of_equal_values_are_finite() -> None:
    """Variance zero: eps keeps value and gradient finite."""
    x = np.full((2, 8), 3.0)
    value, gradient = tj.value_and_grad(loss)(x, np.ones(8), np.zeros(8), np.ones((2, 8)) * np.arange(8))
    assert np.isfinite(value) and np.isfinite(gradient).all()


def test_large_offsets_keep_their_precision(device: str) -> None:
    """The variance is computed from differences to the mean, not as E[x²] - E[x]², which cancels."""
    x = (np.random.default_rng(0).normal(size=(4, 64)) + 3000).astype(np.float32)
    want = x.astype(np.float64)
    want = (want - want.mean(-1, keepdims=True)) / np.sqrt(want.var(-1, keepdims=True) + EPS)
    got = tj.trace(lambda x: nn.layer_norm(x, eps=EPS))(x, device=device)
    np.testing.assert_allclose(np.asarray(got), want, atol=5e-3)
