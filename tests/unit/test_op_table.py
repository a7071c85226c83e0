"""The op table is complete: every primitive says everything that autograd, backends, the viewer and the tests need."""

from __future__ import annotations

import numpy as np
import pytest

from tracejit.ops import registry

OPS = list(registry.all_ops())
_NO_SAMPLES = {
    "input",
    "const",
    "literal",
    "iota",
    "proj",
    "custom_vjp",
    "print",
    "cond",
    "while_loop",
    "scan",
}


def test_there_are_ops_and_not_too_many() -> None:
    assert 60 <= len(OPS) <= 130


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_op_is_fully_described(op: registry.Op) -> None:
    assert op.meaning and len(op.meaning) < 300, "one line of meaning for the viewer"
    assert op.formula
    assert op.shape_rule, "the shape rule in words"
    assert op.grad_rule, "the gradient rule in words, or 'none'"
    assert callable(op.infer) and callable(op.reference)
    assert callable(op.vjp) or op.vjp is registry.NONDIFFERENTIABLE
    assert op.category in registry.CATEGORIES


@pytest.mark.parametrize("op", [o for o in OPS if o.name not in _NO_SAMPLES], ids=lambda op: op.name)
def test_samples_exercise_the_op(op: registry.Op) -> None:
    samples = op.samples()
    assert samples, "every op has samples"
    for arrays, attrs in samples:
        if op.arity is not None:
            assert len(arrays) == op.arity
        shape, dtype = op.infer(*arrays, **attrs)
        result = op.reference(*arrays, **attrs)
        assert np.shape(result) == tuple(shape)
        assert np.asarray(result).dtype == dtype


def test_names_are_python_identifiers() -> None:
    assert all(op.name.isidentifier() and op.name == op.name.lower() for op in OPS)
