"""Gradient rules record well: they keep the dtype of half and single precision, and are differentiable themselves."""

from __future__ import annotations

import numpy as np
import pytest

from tests.unit._evaluate import check_gradient, evaluate, record
from tracejit.ops import registry, rules

OPS = [
    op
    for op in registry.all_ops()
    if op.category in ("elementwise", "reduction", "contraction") and op.vjp is not registry.NONDIFFERENTIABLE
]


def pull_back(op, attrs):
    """``op``'s gradient rule as a function of its operands, with a fixed smooth cotangent."""

    def rule(*operands):
        y = op(*operands, **attrs)
        g = rules.full_like(y, 0.75)
        assert callable(op.vjp)
        return [c for c in op.vjp(g, y, *operands, **attrs) if c is not None]

    return rule


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_cotangents_have_the_dtype_and_shape_of_the_operands(op, dtype):
    """Recorded on tensors, where a float64 constant would promote everything after it."""
    for arrays, attrs in op.samples():
        if all(a.dtype.kind != "f" for a in arrays):
            continue
        narrow = [a.astype(dtype) if a.dtype.kind == "f" else a for a in arrays]
        wide = any(isinstance(v, np.dtype) and v.kind != "f" for v in attrs.values())
        cotangents, graph, values = record(pull_back(op, attrs), *narrow)
        evaluate(graph, {k: np.asarray(v) for k, v in values.items()})
        inputs = [a for a in narrow if a.dtype.kind == "f"]
        if len(cotangents) == len(inputs):
            assert [(c.shape, c.dtype) for c in cotangents] == [(a.shape, a.dtype) for a in inputs]
        else:
            assert len(cotangents) < len(inputs) and (op.name in ("copysign",) or not cotangents or wide)


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_gradient_rules_are_differentiable(op):
    """The second derivative, taken through the recorded rule, equals the central difference of the first."""
    for arrays, attrs in op.samples():
        floats = [i for i, a in enumerate(arrays) if a.dtype == np.float64]
        if (
            not floats
            or not all(np.isfinite(arrays[i]).all() for i in floats)
            or max(a.size for a in arrays) > 24
        ):
            continue
        if op.name in ("convert", "sign", "rint") or any(isinstance(v, np.dtype) for v in attrs.values()):
            continue
        results, _, _ = record(pull_back(op, attrs), *arrays)
        for k in range(len(results)):
            check_gradient(
                lambda *xs, k=k, attrs=attrs: pull_back(op, attrs)(*xs)[k],
                *arrays,
                wrt=floats,
                rtol=2e-5,
                step=1e-5,
            )
