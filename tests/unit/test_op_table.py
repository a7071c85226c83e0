"""The op table is complete: every primitive says everything that autograd, backends, the viewer and the tests need."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from tracejit.ops import composites, registry

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


#: Scopes that say where something is, not what it is.
_PLACES = {"block", "up", "down", "gate"}


def test_every_composite_is_described_and_exists() -> None:
    """A row for each scope that nn, functions and optim open, and no row without one."""
    root = Path(composites.__file__).parent.parent
    scopes: set[str] = set()
    for folder in ("nn", "functions", "optim"):
        for path in (root / folder).glob("*.py"):
            text = path.read_text(encoding="utf-8")
            scopes |= set(re.findall(r'(?:named_scope|_pointwise)\("(\w+)"', text))
            if re.search(r"named_scope\((op|kind)\)", text):
                scopes |= set(re.findall(r'\bop = "(\w+)"', text)) | set(re.findall(r'"(\w+_pool2d)"', text))
    assert scopes - _PLACES == composites.COMPOSITES.keys()
    for name, row in composites.COMPOSITES.items():
        assert all(row[k] for k in ("category", "meaning", "formula", "shape_rule", "grad_rule")), name
        assert row["meaning"].endswith("."), name


def test_the_table_of_a_graph_has_its_composites() -> None:
    import tracejit as tj
    from tracejit import nn

    graph = tj.trace(lambda x: nn.softmax(x)).graph(np.ones((2, 3), np.float32))
    table = composites.op_table(graph)
    assert table["softmax/"]["grad_rule"] == "dx = y (g - sum(g y))" and "exp" in table
