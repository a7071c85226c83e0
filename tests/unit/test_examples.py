"""The examples as a newcomer runs them: what they print, what they learn, what they do with bad arguments."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import optree
import pytest

import tracejit as tj

EXAMPLES = Path(__file__).parents[2] / "examples"


def example(name: str) -> ModuleType:
    """The script as a module, loaded once."""
    full = f"examples_{name}"
    if full not in sys.modules:
        spec = importlib.util.spec_from_file_location(full, EXAMPLES / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        sys.modules[full] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[full]


@pytest.fixture(autouse=True)
def reference_backend() -> Iterator[None]:
    """What the examples promise holds on the oracle of all backends."""
    with tj.device("numpy"):
        yield


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda p: p.stem)
def test_every_example_says_how_to_run_it_and_what_to_expect(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    docstring = text.split('"""')[1]
    assert f"python examples/{path.name}" in docstring
    assert "Expected output" in docstring


def test_linear_regression_finds_the_least_squares_line(capsys: pytest.CaptureFixture[str]) -> None:
    module = example("linear_regression")
    module.main(["--device", "numpy"])
    printed, promised = capsys.readouterr().out, module.__doc__.split("::\n\n")[1]
    number = r"-?\d+\.?\d*"
    assert re.sub(number, "#", printed).split() == re.sub(number, "#", promised).split()
    np.testing.assert_allclose(
        *(np.array(re.findall(number, t), float) for t in (printed, promised)), atol=2e-4
    )
    fitted = module.train(seed=7, verbose=False)
    slope, intercept = np.polyfit(*module.make_data(7), deg=1)
    np.testing.assert_allclose([fitted["slope"], fitted["intercept"]], [slope, intercept], rtol=1e-3)


def test_xor_answers_all_four_questions(capsys: pytest.CaptureFixture[str]) -> None:
    example("xor").main([])
    out = capsys.readouterr().out
    assert re.findall(r"(\d) xor (\d) = (\d)", out) == [
        ("0", "0", "0"),
        ("0", "1", "1"),
        ("1", "0", "1"),
        ("1", "1", "0"),
    ]
    assert float(re.findall(r"loss ([\d.]+)", out)[-1]) < 0.01


@pytest.mark.parametrize(("kind", "epochs", "at_least"), [("mlp", 6, 0.93), ("cnn", 2, 0.75)])
def test_digits_are_recognised(kind: str, epochs: int, at_least: float) -> None:
    pytest.importorskip("sklearn")
    _, score = example("digits").train(kind, epochs, verbose=False)
    assert score > at_least


# -- the main job --------------------------------------------------------------------------------------------


def test_transformer_run_saves_and_reloads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = example("train_transformer")
    out = tmp_path / "weights.safetensors"
    assert module.main(["--steps", "3", "--device", "numpy", "--out", str(out)]) == 0
    text = capsys.readouterr().out
    trained, reloaded = (
        re.search(r"validation loss ([\d.]+)", text),
        re.search(r"after reloading ([\d.]+)", text),
    )
    assert trained is not None
    assert reloaded is not None
    assert trained[1] == reloaded[1]
    assert "sample" in text
    assert "head.weight" in tj.load(out)


def test_reloaded_transformer_is_the_trained_one(tmp_path: Path) -> None:
    module = example("train_transformer")
    corpus = module.load_corpus()
    small = module.SIZES["small"]
    result = module.train(small, 3, seed=0, corpus=corpus, show_progress=False)
    tj.save(tmp_path / "w", result.model)
    fresh = module.GPT(len(corpus.alphabet), small, rng=np.random.default_rng(99))
    assert module.validation_loss(fresh, corpus, small) != result.validation
    reloaded = tj.load(tmp_path / "w", like=fresh)
    assert module.validation_loss(reloaded, corpus, small) == result.validation
    for a, b in zip(optree.tree_leaves(result.model), optree.tree_leaves(reloaded), strict=True):
        np.testing.assert_array_equal(a, b)


def test_transformer_learns_and_a_seed_fixes_the_loss_curve() -> None:
    module = example("train_transformer")
    small = module.SIZES["small"]
    first = module.train(small, 25, seed=0, show_progress=False)
    assert first.losses[0] == pytest.approx(
        np.log(len(module.load_corpus().alphabet)), abs=0.4
    )  # a fresh model knows nothing: uniform
    assert first.validation < 3.1  # letter frequencies alone give 3.24
    assert len(first.losses) == 25
    again, other = (module.train(small, 4, seed=seed, show_progress=False).losses for seed in (0, 1))
    assert again == module.train(small, 4, seed=0, show_progress=False).losses
    assert again != other


def test_transformer_corpus_is_split_without_overlap() -> None:
    corpus = example("train_transformer").load_corpus()
    total = len(corpus.train) + len(corpus.validation)
    assert total > 400_000
    assert len(corpus.validation) == pytest.approx(total / 10, abs=1)
    assert corpus.train.max() < len(corpus.alphabet)
    assert "Python" in corpus.decode(corpus.train)


def test_transformer_labels_are_the_next_characters() -> None:
    module = example("train_transformer")
    config = module.SIZES["base"]
    x, y = module.sample_batch(np.arange(1000, dtype=np.int32), np.random.default_rng(0), config)
    assert x.shape == y.shape == (config.batch, config.context)
    np.testing.assert_array_equal(y, x + 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "--steps must be at least 1"),
        (["--out", "no/such/directory/w"], "directory .* does not exist"),
        (["--steps", "many"], "invalid int value"),
    ],
)
def test_transformer_refuses_bad_arguments_before_training(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        example("train_transformer").main(arguments)
    assert re.search(message, capsys.readouterr().err)


def test_transformer_on_an_unknown_device(tmp_path: Path) -> None:
    with pytest.raises(tj.DeviceError, match="abacus"):
        example("train_transformer").main(["--device", "abacus", "--out", str(tmp_path / "w")])
