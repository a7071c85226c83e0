"""wgpu with WebGPU's default limits (``TRACEJIT_WGPU_LIMITS=default``): what every WebGPU device has must be enough.

8 storage buffers per stage, 128 MiB bindings, 16 KiB of workgroup memory, 256 invocations, 65,535 workgroups per dimension,
no optional feature. The validation of wgpu itself refuses a shader or a dispatch beyond the limits that were asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import optree
import pytest

import tracejit as tj
from tests.backend import test_every_op, test_nn_devices
from tests.fuzz import compare, explain
from tests.fuzz_programs import NARROW_DTYPES, random_program
from tracejit import nn
from tracejit.errors import DeviceOutOfMemoryError
from tracejit_wgpu import adapters, runtime

pytestmark = pytest.mark.filterwarnings("ignore:WebGPU has no 64-bit types")


@pytest.fixture(autouse=True)
def _default_limits(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TRACEJIT_WGPU_LIMITS", "default")
    yield


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_the_device_really_has_the_default_limits() -> None:
    rt = runtime.get()
    for name, value in adapters.DEFAULT_LIMITS.items():
        assert rt.device.limits[name] == value
    assert not rt.features and not rt.target.f16 and rt.target.subgroup == 0
    assert rt.target.buffers == 8


@pytest.mark.parametrize("op", sorted({c.values[0].name for c in test_every_op.CASES}))
def test_one_sample_of_the_op(op: str) -> None:
    """The first sample of every op, value and gradient."""
    found = next(c.values for c in test_every_op.CASES if c.values[0].name == op)
    test_every_op.test_value(*found, "wgpu")
    if found[0].vjp is not test_every_op.registry.NONDIFFERENTIABLE:
        test_every_op.test_gradient(*found, "wgpu")


@pytest.mark.parametrize("name", test_nn_devices.FORMS)
def test_nn_forms_and_their_gradients(name: str) -> None:
    test_nn_devices.test_values_and_gradients_agree_with_the_reference(name, "wgpu")


@pytest.mark.parametrize("kind", ["gpt", "cnn"])
def test_training(kind: str) -> None:
    test_nn_devices.test_training_follows_the_reference(kind, "adamw", "wgpu")


def test_random_programs() -> None:
    for seed in range(1000, 1010):
        program = random_program(seed, dtypes=NARROW_DTYPES)
        if compare(program, "wgpu"):
            pytest.fail(explain(program, "wgpu"), pytrace=False)


LARGE: dict[str, tuple[Callable[..., Any], tuple[np.ndarray, ...]]] = {
    # more workgroups than one dimension of a grid may have
    "many elements": (lambda x: x * 2 + 1, (normal(65_537, 257),)),
    "many rows": (lambda x: nn.softmax(x), (normal(600_000, 7),)),
    "many columns": (lambda x: x.sum(0), (normal(3, 1_100_000),)),
    "many products": (lambda a, b: a @ b, (normal(66_000, 2, 3), normal(66_000, 3, 2, seed=1))),
    "many sorts": (lambda x: np.sort(x, -1), (normal(66_000, 5),)),
    "many scans": (lambda x: np.cumsum(x, -1), (normal(66_000, 5),)),
    "many gathers": (lambda x: x[np.arange(65_999, -1, -1)], (normal(66_000, 3),)),
    "many windows": (lambda x: nn.max_pool2d(x, 2), (normal(66_000, 1, 4, 4),)),
    # more operands than a stage may bind
    "many operands": (lambda *xs: sum(x * (i + 1) for i, x in enumerate(xs)), tuple(normal(65, seed=i) for i in range(20))),
    "many results": (lambda x: [x * i for i in range(20)], (normal(65),)),
    "many results of a row": (lambda x: [(x * i).sum(-1) for i in range(1, 20)], (normal(33, 65),)),
    # workgroup memory and invocations
    "long row": (lambda x: nn.layer_norm(x), (normal(3, 50_000),)),
    "wide attention": (
        lambda q, k, v: nn.scaled_dot_product_attention(q, k, v, is_causal=True),
        (normal(1, 2, 70, 64), normal(1, 2, 70, 64, seed=1), normal(1, 2, 70, 64, seed=2)),
    ),
    "very wide attention": (
        nn.scaled_dot_product_attention,
        (normal(1, 1, 40, 128), normal(1, 1, 40, 128, seed=1), normal(1, 1, 40, 128, seed=2)),
    ),
    "matrix product": (lambda a, b: np.tanh(a @ b), (normal(300, 130), normal(130, 270, seed=1))),
    "long sort": (lambda x: np.sort(x), (normal(10_000),)),
    "all statistics": (lambda x: (x.sum(), x.max(), x.min(), x.mean(), x.argmax(), x.argmin()), (normal(300_000),)),
}  # fmt: skip


@pytest.mark.parametrize("name", LARGE)
def test_sizes_beyond_one_dispatch(name: str) -> None:
    f, arrays = LARGE[name]
    got, expected = tj.trace(f)(*arrays, device="wgpu"), tj.trace(f)(*arrays, device="numpy")
    for g, e in zip(optree.tree_leaves(got), optree.tree_leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(g), e, rtol=2e-5, atol=2e-5 * max(1.0, float(np.abs(e).max())))


def test_a_tensor_beyond_one_binding_is_refused_with_the_numbers() -> None:
    x = np.zeros((34, 1 << 20), np.float32)  # 136 MiB
    with pytest.raises(
        DeviceOutOfMemoryError, match=r"142,606,336 bytes.*at most 134,217,728 bytes"
    ) as caught:
        tj.trace(lambda x: x * 2)(x, device="wgpu")
    assert "device='cpu'" in str(caught.value)
    half = x[:17]
    np.testing.assert_array_equal(
        np.asarray(tj.trace(lambda x: x[:, :3] + 1)(half, device="wgpu")), half[:, :3] + 1
    )
