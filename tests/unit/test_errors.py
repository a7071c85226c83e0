"""One mistake per error class, the form of their messages, short tracebacks, and the names of the public API."""

from __future__ import annotations

import pathlib
import re
import subprocess
import sys
import traceback
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import tracejit as tj
from tracejit import errors

X = np.arange(6, dtype=np.float32).reshape(2, 3)
ROOT = pathlib.Path(tj.__file__).parents[1]
HERE = "test_errors.py"


def leak() -> Any:
    kept = []
    tj.trace(lambda x: kept.append(x * 2))(X)
    return kept[0] + 1


def parse_damaged() -> Any:
    return tj.Graph.parse(str(tj.trace(np.tanh).graph(X))[:-8])


def load_damaged() -> Any:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "half.safetensors"
        path.write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{")
        return tj.load(path)


def nan() -> Any:
    with tj.debug_nans():
        return tj.trace(np.log)(-X - 1)


def out_of_memory() -> Any:
    return tj.trace(lambda x: x[:, None] * x, device="numpy")(np.ones(1 << 20, np.float32))


#: error class, built-in class it also is, a mistake that raises it, what the message says.
MISTAKES: list[tuple[type[Exception], type[Exception], Callable[[], Any], str]] = [
    (tj.ShapeError, ValueError, lambda: tj.trace(lambda x: x @ x)(X), r"^\[matmul\] .*f32\[2,3\]"),
    (tj.ShapeError, ValueError, lambda: tj.trace(lambda x: x.reshape(4, 4))(X), r"^\[reshape\] .*f32\[2,3\]"),
    (tj.DTypeError, TypeError, lambda: tj.trace(lambda x: x & 1)(X), r"^\[bitwise_and\] .*f32\[2,3\]"),
    (tj.DTypeError, TypeError, lambda: tj.trace(lambda x: x)(np.array([None])), r"Python objects.*astype"),
    (tj.IndexingError, IndexError, lambda: tj.trace(lambda x: x[5])(X), r"5.*f32\[2,3\]|5.*size 2"),
    (tj.IndexingError, IndexError, lambda: tj.trace(lambda x: x[0, 0, 0])(X), r"f32\[2,3\]"),
    (
        tj.ConcretizationError,
        TypeError,
        lambda: tj.trace(lambda x: 1 if x.sum() > 0 else 2)(X),
        r"bool.*tj\.where",
    ),
    (tj.ConcretizationError, TypeError, lambda: tj.trace(lambda x: float(x.sum()))(X), r"float"),
    (tj.LeakedTensorError, RuntimeError, leak, r"made by line \S*test_errors\.py:\d+"),
    (tj.UnsupportedFunctionError, TypeError, lambda: tj.trace(np.unique)(X), r"np\.unique"),
    (tj.UnsupportedFunctionError, TypeError, lambda: tj.trace(lambda x: x.partition(1))(X), r"partition"),
    (tj.GradientError, TypeError, lambda: tj.grad(lambda x: x * 2)(X), r"^\[grad\] .*must return a scalar"),
    (tj.TracingError, RuntimeError, lambda: tj.trace(lambda x: x.sort())(X), r"^\[sort\] .*np\.sort"),
    (tj.GraphError, ValueError, parse_damaged, r"line \d+"),
    (
        tj.DeviceError,
        Exception,
        lambda: tj.trace(np.tanh)(X, device="cuda"),
        r"^\[device\] unknown device 'cuda'",
    ),
    (
        tj.DeviceOutOfMemoryError,
        MemoryError,
        out_of_memory,
        r"f32\[1048576,1048576\], 4,398,046,511,104 bytes",
    ),
    (tj.FileFormatError, ValueError, load_damaged, r"half\.safetensors"),
    (tj.NonFiniteError, FloatingPointError, nan, r"^\[log\] first NaN: 6 of 6 elements"),
]


@pytest.mark.parametrize(("cls", "builtin", "mistake", "message"), MISTAKES)
def test_each_mistake_has_its_error(
    cls: type[Exception], builtin: type[Exception], mistake: Callable[[], Any], message: str
) -> None:
    with pytest.raises(cls) as info:
        mistake()
    assert isinstance(info.value, builtin) and isinstance(info.value, tj.TraceError)
    assert re.search(message, str(info.value), re.DOTALL), str(info.value)


def test_every_error_class_has_a_mistake_here_or_needs_a_broken_device() -> None:
    classes = {v for v in vars(errors).values() if isinstance(v, type) and issubclass(v, tj.TraceError)}
    shown = {cls for cls, *_ in MISTAKES}
    assert classes - shown == {tj.TraceError, tj.DeviceLostError, tj.CompileError}


def test_every_error_class_is_public_and_has_an_example() -> None:
    for cls in vars(errors).values():
        if isinstance(cls, type) and issubclass(cls, tj.TraceError):
            assert getattr(tj, cls.__name__) is cls
            assert cls.__doc__ and len(cls.__doc__) > 40
            if cls not in (tj.TraceError, tj.DeviceLostError, tj.CompileError, tj.NonFiniteError):
                assert "Example" in cls.__doc__, cls


def test_errors_of_devices_that_break_are_kinds_of_device_error() -> None:
    assert issubclass(tj.DeviceLostError, tj.DeviceError)
    assert issubclass(tj.DeviceOutOfMemoryError, tj.DeviceError)
    assert issubclass(tj.CompileError, RuntimeError)


# -- the form of a message -------------------------------------------------------------------------------------------


def test_a_message_has_op_operands_line_scope_and_hint() -> None:
    with tj.named_scope("block0"), tj.named_scope("attn"):
        error = tj.ShapeError.make(
            "shapes do not fit", op="matmul", got={"x": X, "w": X.T}, hint="transpose one"
        )
    pattern = r"\[matmul\] shapes do not fit; got x: f32\[2,3\], w: f32\[3,2\]; at \S*:\d+ in block0/attn; transpose one"
    assert re.fullmatch(pattern, str(error)), str(error)
    assert HERE in str(error)


def test_parts_that_are_not_there_leave_no_trace() -> None:
    assert re.fullmatch(rf"plain; at \S*{HERE}:\d+", str(tj.TraceError.make("plain")))
    assert str(tj.TraceError.make("plain", where="")) == "plain"
    assert str(tj.TraceError.make("plain", where="a.py:3", hint="h")) == "plain; at a.py:3; h"


def test_values_are_described_by_type_and_shape_or_a_short_repr() -> None:
    assert errors.describe(X) == "f32[2,3]"
    assert errors.describe(np.bool_(True)) == "bool[]"
    assert errors.describe(np.zeros(2, np.uint8)) == "u8[2]"
    assert errors.describe(3) == "3"
    assert len(errors.describe(list(range(1000)))) <= 60


def test_an_error_inside_a_model_names_the_line_and_the_scope() -> None:
    def block(x, w):
        with tj.named_scope("ffn"):
            return x @ w

    @tj.trace
    def model(x, w):
        with tj.named_scope("block0"):
            return block(x, w)

    with pytest.raises(tj.ShapeError) as info:
        model(X, np.ones((5, 5), np.float32))
    line = block.__code__.co_firstlineno + 2
    assert re.search(rf"at \S*{HERE}:{line} in block0/ffn", str(info.value)), str(info.value)


def test_a_concretization_error_shows_the_chain_behind_the_value() -> None:
    @tj.trace
    def f(x):
        total = np.exp(x).sum()
        flag = total > 3
        return 1 if flag else 2

    with pytest.raises(tj.ConcretizationError) as info:
        f(X)
    text = str(info.value)
    first = f.__wrapped__.__code__.co_firstlineno + 2
    assert text.index("greater: bool[]") < text.index("sum: f32[]") < text.index("exp: f32[2,3]")
    assert re.search(rf"exp: f32\[2,3\]  \(\S*{HERE}:{first}\)", text), text


def test_unsupported_functions_name_the_nearest_supported_one() -> None:
    with pytest.raises(
        tj.UnsupportedFunctionError, match=r"np\.nanquantile.*(nearest|use|did you mean|supported)"
    ):
        tj.trace(lambda x: np.nanquantile(x, 0.5))(X)


# -- tracebacks ------------------------------------------------------------------------------------------------------


def frames_of(error: BaseException) -> tuple[list[str], list[str]]:
    """Files of ours and of the user in the traceback."""
    files = [f.filename for f in traceback.extract_tb(error.__traceback__)]
    package = str(pathlib.Path(tj.__file__).parent)
    return [f for f in files if f.startswith(package)], [f for f in files if HERE in f]


def inner(x):
    return np.tanh(x) @ x


@pytest.mark.parametrize(
    "call",
    [
        lambda: tj.trace(inner)(X),
        lambda: tj.trace(lambda x: inner(x) * 2)(X),
        lambda: tj.grad(lambda x: inner(x).sum())(X),
        lambda: tj.trace(tj.grad(lambda x: inner(x).sum()))(X),
        lambda: tj.trace(lambda x: tj.trace(inner)(x))(X),
        lambda: tj.trace(lambda x: tj.scan(lambda c, _: (inner(c), None), x, None, length=2))(X),
        lambda: tj.trace(lambda x: tj.cond(x.sum() > 0, inner, inner, x))(X),
    ],
)
def test_a_traceback_has_at_most_one_frame_of_ours_and_ends_at_the_users_line(
    call: Callable[[], Any],
) -> None:
    with pytest.raises(tj.ShapeError) as info:
        call()
    ours, users = frames_of(info.value)
    assert len(ours) <= 1, ours
    assert len(users) >= 2
    last = traceback.extract_tb(info.value.__traceback__)[-1]
    assert last.name == "inner"


def test_errors_of_the_user_keep_their_type_and_their_frames() -> None:
    class Mine(Exception):
        pass

    def fails(x):
        raise Mine("here")

    with pytest.raises(Mine, match="here") as info:
        tj.trace(lambda x: fails(x))(X)
    ours, _ = frames_of(info.value)
    assert len(ours) <= 1
    assert traceback.extract_tb(info.value.__traceback__)[-1].name == "fails"


def test_full_tracebacks_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACEJIT_TRACEBACK", "full")
    with pytest.raises(tj.ShapeError) as info:
        tj.trace(inner)(X)
    assert len(frames_of(info.value)[0]) > 3


def test_what_a_user_sees_is_at_most_ten_lines(tmp_path: pathlib.Path) -> None:
    script = tmp_path / "model.py"
    script.write_text(
        "import numpy as np, tracejit as tj\n"
        "@tj.trace\n"
        "def f(x):\n"
        "    return x @ x\n"
        "f(np.ones((2, 3), np.float32))\n"
    )
    out = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60)
    lines = out.stderr.strip().splitlines()
    assert len(lines) <= 14, out.stderr
    assert lines[-1].startswith("tracejit.errors.ShapeError: [matmul]") and "model.py:4" in lines[-1]


# -- the public API --------------------------------------------------------------------------------------------------

API = (
    "trace", "device", "watch", "value_and_grad", "grad", "jvp", "vmap", "checkpoint", "custom_vjp", "stop_gradient",
    "cond", "while_loop", "scan", "where", "print", "devices", "disable_jit", "debug_nans", "save", "load", "Array",
    "Graph", "TraceError", "nn", "optim", "random", "__version__",
)  # fmt: skip
NN = (
    "relu", "gelu", "silu", "softmax", "log_softmax", "layer_norm", "cross_entropy", "scaled_dot_product_attention",
    "conv2d", "max_pool2d", "embedding", "dropout", "Linear", "Embedding", "LayerNorm", "MultiHeadAttention",
    "FeedForward", "TransformerBlock", "Conv2d",
)  # fmt: skip
OPTIM = ("sgd", "momentum", "nesterov", "rmsprop", "adam", "adamw")
RANDOM = ("key", "split", "uniform", "normal", "bernoulli", "permutation")


@pytest.mark.parametrize("name", API)
def test_public_names_exist_and_are_listed(name: str) -> None:
    assert hasattr(tj, name)
    assert name in dir(tj)


@pytest.mark.parametrize(("room", "names"), [("nn", NN), ("optim", OPTIM), ("random", RANDOM)])
def test_rooms_have_their_names(room: str, names: tuple[str, ...]) -> None:
    module = getattr(tj, room)
    assert [n for n in names if not callable(getattr(module, n, None))] == []


def test_every_public_name_is_documented() -> None:
    for name in tj.__all__:
        value = getattr(tj, name)
        if callable(value):
            assert value.__doc__, name


def test_a_misspelt_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'tracee'"):
        tj.tracee
    assert not hasattr(tj, "frobnicate")
