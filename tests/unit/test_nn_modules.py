"""Modules: pytrees with static fields, immutability, repr, initial weights, Transformers, masks, scopes."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import optree
import pytest

import tracejit as tj
from tracejit import nn


@pytest.fixture(autouse=True)
def reference_backend() -> Iterator[None]:
    """These tests are about nn, not about devices: they run on the oracle of all backends."""
    with tj.device("numpy"):
        yield


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


class Net(nn.Module):
    """What a user writes: fields, an __init__ that assigns them, a __call__."""

    layers: list[nn.Linear]
    scale: Any
    depth: int = nn.static_field(default=2)

    def __init__(self, *, rng: np.random.Generator) -> None:
        self.layers = [nn.Linear(3, 4, rng=rng), nn.Linear(4, 2, bias=False, rng=rng)]
        self.scale = np.ones(2, np.float32)
        self.depth = 2

    def __call__(self, x: Any) -> Any:
        for layer in self.layers[: self.depth]:
            x = layer(x)
        return x * self.scale


class Generated(nn.Module):
    """A module without an __init__ of its own gets the dataclass's."""

    weight: Any
    power: int = nn.static_field(default=1)

    def __call__(self, x: Any) -> Any:
        return x * self.weight**self.power


# -- trees ---------------------------------------------------------------------------------------------------


def test_a_module_is_a_pytree_of_its_arrays_with_readable_paths() -> None:
    net = Net(rng=rng())
    paths = [".".join(map(str, p)) for p in optree.tree_paths(net)]
    assert paths == ["layers.0.weight", "layers.0.bias", "layers.1.weight", "scale"]
    leaves, spec = optree.tree_flatten(net)
    assert all(isinstance(leaf, np.ndarray) for leaf in leaves)
    again = spec.unflatten(leaves)
    assert isinstance(again, Net)
    assert again.depth == 2
    np.testing.assert_array_equal(again(np.ones((1, 3))), net(np.ones((1, 3))))


def test_static_fields_are_structure() -> None:
    a, b = Generated(np.ones(2)), Generated(np.ones(2), power=2)
    assert optree.tree_structure(a) != optree.tree_structure(b)
    assert optree.tree_structure(a) == optree.tree_structure(Generated(np.zeros(2), 1))
    f = tj.trace(lambda m, x: m(x))
    x = np.full(2, 3.0)
    for module, expected in ((a, 3), (b.replace(weight=np.full(2, 2.0)), 12), (a, 3)):
        np.testing.assert_array_equal(f(module, x), expected)
    assert f.cache_info().misses == 2


def test_trees_of_anything_can_be_made_from_a_module() -> None:
    shapes = optree.tree_map(np.shape, Net(rng=rng()))
    assert shapes.layers[0].weight == (4, 3)


def test_gradients_are_modules() -> None:
    net, x = Net(rng=rng()), np.ones((5, 3), np.float32)
    value, grads = tj.value_and_grad(lambda net, x: np.sum(net(x)))(net, x)
    assert isinstance(grads, Net)
    assert grads.layers[0].bias.shape == (4,)
    assert grads.layers[1].bias is None
    np.testing.assert_allclose(grads.scale, np.sum(net(x), axis=0), rtol=1e-5)
    np.testing.assert_allclose(value, np.sum(net(x)), rtol=1e-5)


def test_modules_are_frozen_dataclasses() -> None:
    net = Net(rng=rng())
    assert dataclasses.is_dataclass(net)
    with pytest.raises(
        dataclasses.FrozenInstanceError, match=r"cannot assign Net.scale: .*replace\(scale=...\)"
    ):
        net.scale = np.zeros(2)  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError, match="cannot delete"):
        del net.scale


def test_replace_makes_a_changed_copy() -> None:
    net = Net(rng=rng())
    other = net.replace(scale=np.zeros(2), depth=1)
    assert (other.depth, net.depth) == (1, 2)
    assert other.layers is net.layers
    assert (net.scale == 1).all()
    with pytest.raises(TypeError, match="Net has no field sclae; its fields are layers, scale, depth"):
        net.replace(sclae=1)


def test_modules_can_be_copied_and_subclassed() -> None:
    net = Net(rng=rng())
    twin = copy.deepcopy(net)
    assert twin.layers[0].weight is not net.layers[0].weight
    np.testing.assert_array_equal(twin.layers[0].weight, net.layers[0].weight)

    class Shifted(Net):
        shift: Any

        def __init__(self, *, rng: np.random.Generator) -> None:
            super().__init__(rng=rng)
            self.shift = np.full(2, 10.0)

        def __call__(self, x: Any) -> Any:
            return super().__call__(x) + self.shift

    shifted = Shifted(rng=rng())
    np.testing.assert_allclose(shifted(np.ones((1, 3))), net(np.ones((1, 3))) + 10)
    assert len(optree.tree_leaves(shifted)) == 5


def test_mistakes_in_module_definitions() -> None:
    class Forgets(nn.Module):
        weight: Any
        bias: Any

        def __init__(self) -> None:
            self.weight = 1

    class Undeclared(nn.Module):
        def __init__(self) -> None:
            self.weight = 1

    class Unhashable(nn.Module):
        sizes: Any = nn.static_field()

    with pytest.raises(TypeError, match=r"Forgets\.__init__ did not set bias"):
        Forgets()
    with pytest.raises(AttributeError, match="Undeclared has no field 'weight': declare it"):
        Undeclared()
    with pytest.raises(TypeError, match=r"static field .*Unhashable\.sizes must be hashable"):
        Unhashable([1, 2])


def test_repr_shows_structure_and_parameter_counts() -> None:
    assert (
        repr(nn.Linear(3, 4, rng=rng()))
        == "Linear(weight=f32[4,3], bias=f32[4], in_features=3, out_features=4)"
    )
    text = repr(Net(rng=rng()))
    assert text.startswith("Net(  # 26 parameters\n")
    assert "Linear(weight=f32[2,4], in_features=4, out_features=2)" in text
    assert nn.parameter_count(Net(rng=rng())) == 3 * 4 + 4 + 4 * 2 + 2


def test_changing_weights_does_not_retrace() -> None:
    f = tj.trace(lambda net, x: net(x))
    x = np.ones((1, 3), np.float32)
    for seed in range(3):
        net = Net(rng=rng(seed))
        np.testing.assert_allclose(f(net, x), net(x), rtol=1e-5)
    assert f.cache_info().misses == 1


# -- layers --------------------------------------------------------------------------------------------------


def test_weights_are_float32_unless_asked_and_the_same_for_a_seed() -> None:
    make = {
        "linear": lambda **k: nn.Linear(3, 4, rng=rng(), **k),
        "embedding": lambda **k: nn.Embedding(5, 4, rng=rng(), **k),
        "layer_norm": lambda **k: nn.LayerNorm(4, **k),
        "rms_norm": lambda **k: nn.RMSNorm(4, **k),
        "group_norm": lambda **k: nn.GroupNorm(2, 4, **k),
        "conv": lambda **k: nn.Conv2d(2, 4, 3, rng=rng(), **k),
        "block": lambda **k: nn.TransformerBlock(8, 2, rng=rng(), **k),
        "positions": lambda **k: nn.LearnedPositions(7, 4, rng=rng(), **k),
    }
    for name, build in make.items():
        assert {leaf.dtype for leaf in optree.tree_leaves(build())} == {np.dtype(np.float32)}, name
        assert {leaf.dtype for leaf in optree.tree_leaves(build(dtype=np.float16))} == {
            np.dtype(np.float16)
        }, name
        for a, b in zip(optree.tree_leaves(build()), optree.tree_leaves(build()), strict=True):
            np.testing.assert_array_equal(a, b)


def test_layers_compute_in_their_weights_dtype_and_keep_float32() -> None:
    x = rng().standard_normal((2, 5, 8)).astype(np.float32)
    block = nn.TransformerBlock(8, 2, rng=rng(), use_rotary=True, norm="rms", gated=True, activation="silu")
    assert block(x).dtype == np.float32
    assert tj.trace(lambda b, x: b(x))(block, x).dtype == np.float32
    half = nn.TransformerBlock(8, 2, rng=rng(), dtype=np.float16, use_rotary=True)
    assert half(x.astype(np.float16)).dtype == np.float16


def test_sequential_takes_modules_and_functions() -> None:
    model = nn.Sequential(nn.Linear(3, 4, rng=rng()), nn.relu, nn.Dropout(0.5), nn.Linear(4, 2, rng=rng()))
    x = np.ones((2, 3), np.float32)
    by_hand = model[3](nn.relu(model[0](x)))
    np.testing.assert_array_equal(model(x), by_hand)
    assert len(model) == 4
    assert len(optree.tree_leaves(model)) == 4
    noisy = model(x, key=tj.random.key(0))
    assert not np.allclose(noisy, by_hand)
    np.testing.assert_array_equal(noisy, model(x, key=tj.random.key(0)))
    with pytest.raises(TypeError, match="Sequential takes modules and functions, not int"):
        nn.Sequential(3)  # type: ignore[arg-type]


def test_a_small_cnn_has_the_right_shapes_and_a_gradient_everywhere() -> None:
    cnn = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1, rng=rng()),
        nn.relu,
        nn.MaxPool2d(2),
        nn.Conv2d(4, 6, (3, 1), stride=2, rng=rng()),
        nn.GroupNorm(2, 6),
        nn.AvgPool2d(2, stride=1),
        nn.Flatten(),
        nn.Linear(6, 3, rng=rng()),
    )
    x = rng().standard_normal((5, 1, 12, 6)).astype(np.float32)
    assert cnn(x).shape == (5, 3)
    grads = tj.grad(lambda m, x: nn.cross_entropy(m(x), np.arange(5) % 3))(cnn, x)
    assert all(np.isfinite(g).all() and np.any(g != 0) for g in optree.tree_leaves(grads))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: nn.Linear(0, 3, rng=rng()), r"\[Linear\] in_features must be a positive int, got 0"),
        (lambda: nn.Linear(3, 2.5, rng=rng()), r"\[Linear\] out_features must be a positive int"),  # type: ignore[arg-type]
        (lambda: nn.MultiHeadAttention(10, 3, rng=rng()), "d_model=10 does not divide into num_heads=3"),
        (lambda: nn.MultiHeadAttention(6, 2, use_rotary=True, rng=rng()), "even head size, got 3"),
        (lambda: nn.Conv2d(3, 4, 3, groups=2, rng=rng()), "do not divide into 2 groups"),
        (lambda: nn.GroupNorm(3, 4), "4 channels do not divide into 3 groups"),
    ],
)
def test_impossible_sizes(build: Any, message: str) -> None:
    with pytest.raises(tj.ShapeError, match=message):
        build()


def test_bad_constructor_arguments() -> None:
    with pytest.raises(TypeError, match="rng must be a NumPy Generator"):
        nn.Linear(2, 2, rng=0)  # type: ignore[arg-type]
    with pytest.raises(tj.DTypeError, match="weights are floating-point, not int32"):
        nn.Linear(2, 2, rng=rng(), dtype=np.int32)
    with pytest.raises(ValueError, match="unknown activation 'gelo'; known: relu, gelu"):
        nn.FeedForward(4, activation="gelo", rng=rng())
    with pytest.raises(ValueError, match="norm must be 'layer' or 'rms'"):
        nn.TransformerBlock(4, 2, norm="batch", rng=rng())


def test_wrong_input_width_names_the_user_line() -> None:
    with pytest.raises(
        tj.ShapeError, match=r"got x: f64\[2,4\], weight: f32\[5,3\]; at .*test_nn_modules\.py"
    ):
        nn.Linear(3, 5, rng=rng())(np.ones((2, 4)))
    with pytest.raises(tj.ShapeError, match=r"x must be \(..., positions, 8\)"):
        nn.TransformerBlock(8, 2, rng=rng())(np.ones((2, 3, 4)))
    with pytest.raises(tj.ShapeError, match="9 positions but the table has 7"):
        nn.LearnedPositions(7, 4, rng=rng())(np.ones((9, 4)))


# -- initialisers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "variance"),
    [
        (nn.init.xavier_uniform, 2 / 500),
        (nn.init.xavier_normal, 2 / 500),
        (nn.init.kaiming_uniform, 2 / 300),
        (nn.init.kaiming_normal, 2 / 300),
        (lambda s, r: nn.init.normal(s, r, 0.1), 0.01),
        (lambda s, r: nn.init.uniform(s, r, -1, 1), 1 / 3),
    ],
)
def test_initialisers_have_their_variance(make: Any, variance: float) -> None:
    weight = make((200, 300), rng())
    assert weight.dtype == np.float32
    assert abs(weight.mean()) < 4 * (variance / weight.size) ** 0.5
    np.testing.assert_allclose(weight.var(), variance, rtol=0.03)


def test_convolution_fans_count_the_receptive_field() -> None:
    np.testing.assert_allclose(nn.init.kaiming_normal((500, 10, 3, 3), rng()).var(), 2 / 90, rtol=0.05)
    with pytest.raises(tj.ShapeError, match="at least two axes"):
        nn.init.xavier_normal((5,), rng())
    assert nn.init.zeros((2,)).sum() == 0
    assert nn.init.ones((2,)).sum() == 2


# -- Transformers --------------------------------------------------------------------------------------------


def test_attention_padding_hides_positions() -> None:
    attention = nn.MultiHeadAttention(8, 2, rng=rng())
    x = rng(1).standard_normal((2, 5, 8)).astype(np.float32)
    real = nn.sequence_mask(np.array([5, 3]), 5)
    changed = x.copy()
    changed[1, 3:] += 10
    before, after = attention(x, padding_mask=real), attention(changed, padding_mask=real)
    np.testing.assert_array_equal(before[1, :3], after[1, :3])
    with pytest.raises(tj.ShapeError, match="padding_mask must be boolean"):
        attention(x, padding_mask=np.ones((2, 4), bool))


def test_masks_combine() -> None:
    """causal & padding given as flags equals the same given as one explicit mask, boolean or added."""
    attention = nn.MultiHeadAttention(8, 2, rng=rng())
    x = rng(1).standard_normal((2, 5, 8)).astype(np.float32)
    real = nn.sequence_mask(np.array([5, 3]), 5)
    causal = np.tril(np.ones((5, 5), bool))
    expected = attention(x, mask=causal & real[:, None, None, :])
    np.testing.assert_allclose(attention(x, padding_mask=real, is_causal=True), expected, rtol=1e-6)
    np.testing.assert_allclose(attention(x, mask=causal, padding_mask=real), expected, rtol=1e-6)
    added = np.where(causal, 0, -np.inf).astype(np.float32)
    np.testing.assert_allclose(attention(x, mask=added, padding_mask=real), expected, rtol=1e-6)


def test_unbatched_input_equals_a_batch_of_one() -> None:
    block = nn.TransformerBlock(8, 2, rng=rng(), is_causal=True)
    x = rng(1).standard_normal((5, 8)).astype(np.float32)
    np.testing.assert_allclose(block(x), block(x[None])[0], rtol=1e-5, atol=1e-6)


def test_cross_attention_with_another_width() -> None:
    attention = nn.MultiHeadAttention(8, 2, context_dim=6, rng=rng())
    x, context = np.ones((2, 5, 8), np.float32), rng(2).standard_normal((2, 3, 6)).astype(np.float32)
    assert attention(x, context).shape == (2, 5, 8)
    with pytest.raises(tj.ShapeError, match="needs a context"):
        attention(x)
    with pytest.raises(tj.ShapeError, match=r"context must be \(..., positions, 6\)"):
        attention(x, x)


def test_decoder_block_attends_to_its_context() -> None:
    block = nn.TransformerBlock(8, 2, cross_attention=6, is_causal=True, rng=rng())
    x, context = np.ones((2, 5, 8), np.float32), rng(2).standard_normal((2, 3, 6)).astype(np.float32)
    real = nn.sequence_mask(np.array([3, 1]), 3)
    y = block(x, context, context_padding_mask=real)
    changed = context.copy()
    changed[1, 1:] = 7
    np.testing.assert_array_equal(block(x, changed, context_padding_mask=real), y)
    assert not np.allclose(block(x, context + 1), block(x, context))
    with pytest.raises(tj.ShapeError, match="needs a block built with cross_attention"):
        nn.TransformerBlock(8, 2, rng=rng())(x, context)


def test_dropout_is_on_with_a_key_only_and_repeats_with_it() -> None:
    block = nn.TransformerBlock(8, 2, dropout=0.5, rng=rng())
    x = rng(1).standard_normal((2, 5, 8)).astype(np.float32)
    plain, noisy = block(x), block(x, key=tj.random.key(1))
    np.testing.assert_array_equal(block(x), plain)
    np.testing.assert_array_equal(block(x, key=tj.random.key(1)), noisy)
    assert not np.allclose(plain, noisy)
    assert not np.allclose(noisy, block(x, key=tj.random.key(2)))
    traced = tj.trace(lambda block, x, key: block(x, key=key))(block, x, tj.random.key(1))
    np.testing.assert_allclose(traced, noisy, rtol=1e-4, atol=1e-5)


def test_rotary_attention_knows_order_and_plain_attention_does_not() -> None:
    x = rng(1).standard_normal((1, 5, 8)).astype(np.float32)
    swapped = x[:, [0, 2, 1, 3, 4]]
    for use_rotary in (False, True):
        attention = nn.MultiHeadAttention(8, 2, use_rotary=use_rotary, rng=rng())
        same = np.allclose(attention(x)[0, 4], attention(swapped)[0, 4], atol=1e-6)
        assert same is not use_rotary


def test_positions_are_added() -> None:
    x = np.zeros((2, 5, 6), np.float32)
    np.testing.assert_array_equal(nn.SinusoidalPositions()(x)[1], nn.sinusoidal_positions(5, 6))
    learned = nn.LearnedPositions(7, 6, rng=rng())
    np.testing.assert_array_equal(learned(x)[1], learned.weight[:5])
    np.testing.assert_array_equal(nn.RotaryPositions()(x + 1), nn.rotary(x + 1))


def test_scopes_of_a_transformer() -> None:
    blocks = [nn.TransformerBlock(8, 2, rng=rng()) for _ in range(2)]

    def model(blocks: list[nn.TransformerBlock], x: Any) -> Any:
        for block in blocks:
            x = block(x)
        return x

    graph = tj.trace(model).graph(blocks, np.ones((2, 5, 8), np.float32))
    scopes = {node.scope for node in graph.nodes}
    for block in ("block0", "block1"):
        for part in (
            "norm1/layer_norm",
            "attn/qkv/linear",
            "attn/attention/softmax",
            "attn/proj/linear",
            "mlp/gelu",
        ):
            assert f"{block}/{part}" in scopes
    assert not any(scope.startswith("block2") for scope in scopes)
