"""Shared by all tests: the verifier runs after every pass, and ``device`` runs a test once per usable backend."""

from __future__ import annotations

import os

os.environ.setdefault("TRACEJIT_DEBUG_PASSES", "1")
os.environ.setdefault("XDG_RUNTIME_DIR", "/tmp")

import numpy as np
import pytest

from tracejit import backend as _backend


def _usable_devices() -> list[str]:
    """One device of each installed backend that works here; a required but missing wgpu adapter is a failure, not a skip."""
    names = []
    for name in _backend.backend_names():
        found = _backend.get_backend(name).devices()
        if any(d.available for d in found):
            names.append(name)
        elif name == "wgpu" and os.environ.get("TRACEJIT_REQUIRE_WGPU") == "1":
            names.append(name)  # let its tests fail with the backend's own message
    return names


# Whichever test first hands wgpu a 64-bit array would get the one warning; tests/backend/test_wgpu_dtypes.py expects it.
_NARROW = pytest.mark.filterwarnings("ignore:WebGPU has no 64-bit types")


@pytest.fixture(params=[pytest.param(d, marks=_NARROW) if d == "wgpu" else d for d in _usable_devices()])
def device(request: pytest.FixtureRequest) -> str:
    """The name of a backend; tests that take it run once for each."""
    return request.param


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
