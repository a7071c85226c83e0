"""Every op, on every backend, against its NumPy reference: values, dtypes, and gradients.

The samples come with the op's definition, so a new op is covered on every backend the moment it is defined.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import tracejit as tj
from tracejit.ops import registry

# Inputs and control markers are made by tracing itself; control flow has tests of its own.
_STRUCTURAL = {"input", "const", "literal", "proj", "custom_vjp", "print", "cond", "while_loop", "scan"}

CASES = [
    pytest.param(op, i, id=f"{op.name}-{i}")
    for op in registry.all_ops()
    if op.name not in _STRUCTURAL
    for i in range(len(op.samples()))
]

#: Relative tolerance by dtype, in units of the type's epsilon; sums and products accumulate differently.
_EPS = {np.dtype(t): np.finfo(t).eps for t in (np.float16, np.float32, np.float64)}


def tolerance(dtype: np.dtype, depth: float = 1.0) -> dict[str, float]:
    eps = _EPS.get(dtype, 0.0)
    return {"rtol": 16 * eps * depth, "atol": 16 * eps * depth}


#: Their operands after the first are indices, which are int64 by the op's own rule on every device.
_INDEXING = {"take", "take_along_axis", "scatter_add", "scatter_add_along_axis"}


def as_device_computes(
    op: registry.Op, arrays: tuple[np.ndarray, ...], device: str
) -> tuple[np.ndarray, ...]:
    """Operands in the types that the device really computes in: 64-bit types become 32-bit ones on wgpu."""
    if device != "wgpu":
        return arrays
    narrow = {"float64": np.float32, "int64": np.int32, "uint64": np.uint32}

    def convert(position: int, a: np.ndarray) -> np.ndarray:
        is_index = position > 0 and op.name in _INDEXING and a.dtype == np.int64
        return a if is_index else a.astype(narrow.get(a.dtype.name, a.dtype))

    return tuple(convert(i, a) for i, a in enumerate(arrays))


def narrow_attrs(attrs: dict[str, Any], device: str) -> dict[str, Any]:
    if device != "wgpu":
        return attrs
    narrow = {"float64": np.float32, "int64": np.int32, "uint64": np.uint32}
    return {k: np.dtype(narrow.get(v.name, v)) if isinstance(v, np.dtype) else v for k, v in attrs.items()}


def check(actual: Any, expected: Any, *, exact_dtype: bool = True, depth: float = 1.0) -> None:
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape
    if exact_dtype:
        assert actual.dtype == expected.dtype
    if expected.dtype.kind == "f":
        np.testing.assert_allclose(actual, expected, **tolerance(expected.dtype, depth))
    else:
        np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize(("op", "index"), CASES)
def test_value(op: registry.Op, index: int, device: str) -> None:
    arrays, attrs = op.samples()[index]
    arrays, attrs = as_device_computes(op, arrays, device), narrow_attrs(attrs, device)
    fn = tj.trace(lambda *xs: op(*xs, **attrs))
    expected = op.reference(*arrays, **attrs)
    actual = fn(*arrays, device=device)
    depth = 1.0 + np.log2(max((a.size for a in arrays), default=1) or 1)
    for got, want in zip(*((actual, expected) if isinstance(expected, tuple) else ((actual,), (expected,)))):
        check(got, want, exact_dtype=device != "wgpu", depth=depth)


@pytest.mark.parametrize(
    ("op", "index"),
    [c for c in CASES if c.values[0].vjp is not registry.NONDIFFERENTIABLE],  # type: ignore[attr-defined]
)
def test_gradient(op: registry.Op, index: int, device: str) -> None:
    """The gradient graph on the device equals the gradient graph on the reference backend."""
    arrays, attrs = op.samples()[index]
    arrays, attrs = as_device_computes(op, arrays, device), narrow_attrs(attrs, device)
    floats = tuple(i for i, a in enumerate(arrays) if a.dtype.kind == "f")
    if not floats:
        return
    weights = np.random.default_rng(1)

    def loss(*xs):
        y = op(*xs, **attrs)
        if y.dtype.kind != "f":
            return xs[floats[0]].sum()
        w = np.random.default_rng(1).normal(size=y.shape).astype(y.dtype)
        return (y * w).sum()

    del weights
    gradient = tj.trace(tj.grad(loss, wrt=floats))
    expected = gradient(*arrays, device="numpy")
    actual = gradient(*arrays, device=device)
    for got, want in zip(actual, expected):
        check(got, want, exact_dtype=device != "wgpu", depth=8.0 + np.log2(max(a.size for a in arrays) or 1))
