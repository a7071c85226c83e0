"""The example that trains a Transformer gives one loss curve on every backend."""

from __future__ import annotations

import numpy as np
import pytest

from tests.unit.test_examples import example

#: Largest relative difference of a loss from the reference's. Measured: 1.2e-7 on lavapipe, 1.1e-7 on the CPU backend.
TOLERANCE = 1e-5


def test_the_transformer_example_has_the_reference_backends_loss_curve(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = example("train_transformer")
    monkeypatch.setattr(module, "VALIDATION_BATCHES", 2)
    config = module.Config(layers=1, d_model=32, heads=2, context=32, batch=4, steps=12, peak_rate=4e-3)
    corpus = module.load_corpus()
    results = {
        device: module.train(config, seed=3, device=device, corpus=corpus, show_progress=False)
        for device in ("numpy", "cpu", "wgpu")
    }
    expected = results["numpy"]
    assert expected.losses[-1] < 0.9 * expected.losses[0]
    for device in ("cpu", "wgpu"):
        np.testing.assert_allclose(results[device].losses, expected.losses, rtol=TOLERANCE)
        np.testing.assert_allclose(results[device].validation, expected.validation, rtol=TOLERANCE)
