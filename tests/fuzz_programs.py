"""Random programs over NumPy functions. Made for ``tests/fuzz.py`` and ``tests/oracle/test_random_graphs.py``.

A program is ordinary NumPy source text, so a failure prints a function to paste. It is built together with its values in
NumPy: a step that overflows, divides by nearly nothing or grows too large is never taken. Steps with jumps (``floor``,
``argmax``, ``x > y``) are applied only to *exact* values, which every correct run has bit for bit.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

import tracejit as tj

F16, F32, F64 = np.dtype(np.float16), np.dtype(np.float32), np.dtype(np.float64)
_LARGEST = {"f": 200.0, "i": 2000, "u": 200, "b": 1}
_MAX_SIZE = 4096


class Choose(Protocol):
    """Where decisions come from: a NumPy generator, or hypothesis (which can then shrink the program)."""

    def integer(self, low: int, high: int) -> int:
        """An integer in ``[low, high]``."""
        ...

    def array(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """Multiples of 1/4 (or integers) near zero."""
        ...


class RandomChoose:
    """Decisions from a seeded NumPy generator."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)

    def integer(self, low: int, high: int) -> int:
        return int(self.rng.integers(low, high + 1))

    def array(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        return small_numbers(self.rng, shape, dtype)


def small_numbers(rng: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Numbers that float16 holds exactly and whose sums and products stay exact for a while."""
    if dtype.kind == "b":
        return np.asarray(rng.integers(0, 2, shape), dtype)
    if dtype.kind == "u":
        return np.asarray(rng.integers(0, 9, shape), dtype)
    if dtype.kind == "i":
        return np.asarray(rng.integers(-8, 9, shape), dtype)
    return np.asarray(rng.integers(-10, 11, shape) / 4.0, dtype)


@dataclass(frozen=True)
class Value:
    """A variable of the program: its value as written and in float64.

    ``exact``: the same in every correct run. ``constant``: a NumPy array also while tracing, as it depends on no argument.
    """

    name: str
    narrow: np.ndarray
    wide: np.ndarray
    exact: bool
    constant: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        return self.narrow.shape

    @property
    def ndim(self) -> int:
        return self.narrow.ndim

    @property
    def kind(self) -> str:
        return self.narrow.dtype.kind


_NARROW = {"np": np, "tj": tj, "f16": np.float16, "f32": np.float32, "f64": np.float64}
_WIDE = {**_NARROW, "f16": np.float64, "f32": np.float64}


@dataclass
class Program:
    """``steps`` are ``(variable, expression)``; ``outputs`` names variables; ``values`` are known from building it."""

    seed: int
    inputs: list[Value] = field(default_factory=list)
    steps: list[tuple[str, str]] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    values: dict[str, Value] = field(default_factory=dict)

    def source(self, *, noisy: bool = False) -> str:
        """The program as a Python function; ``noisy`` multiplies each inexact value by an element of ``noise``."""
        names = [v.name for v in self.inputs]
        lines = [f"def program({', '.join(names)}{', noise' if noisy else ''}):"]
        for name, expression in self.steps:
            lines.append(f"    {name} = {expression}")
            if noisy and not self.values[name].exact:
                lines[-1] = f"    {name} = ({expression}) * noise[{name!r}]"
        lines.append(f"    return ({', '.join(self.outputs)},)")
        return "\n".join(lines)

    def function(self, *, wide: bool = False, noisy: bool = False) -> Callable[..., tuple[Any, ...]]:
        """The program, runnable on arrays and traceable."""
        namespace = dict(_WIDE if wide else _NARROW)
        exec(compile(self.source(noisy=noisy), f"<fuzz {self.seed}>", "exec"), namespace)
        return namespace["program"]

    def arrays(self, *, wide: bool = False) -> list[np.ndarray]:
        return [(v.wide if wide else v.narrow).copy() for v in self.inputs]

    def noise(self, rng: np.random.Generator, least: np.dtype) -> dict[str, np.ndarray]:
        """Rounding errors of one unit in the last place of each variable's type (at least that of ``least``)."""
        out = {}
        for name, _ in self.steps:
            v = self.values[name]
            if not v.exact:
                eps = max(np.finfo(v.narrow.dtype).eps, np.finfo(least).eps)
                out[name] = 1 + eps * rng.uniform(-1, 1, v.shape)
        return out

    def truncated(self, count: int) -> Program:
        """The first ``count`` steps, returning the last of them: to find the step that goes wrong."""
        steps = self.steps[:count]
        return Program(self.seed, self.inputs, steps, [steps[-1][0]], self.values)

    def __str__(self) -> str:
        kinds = ", ".join(f"{v.name}: {v.narrow.dtype}{list(v.shape)}" for v in self.inputs)
        return f"# seed {self.seed}; {kinds}\n{self.source()}"


# -- building ------------------------------------------------------------------------------------------------------

_SMOOTH = (
    "np.tanh({x})", "np.sin({x})", "np.cos({x})", "np.exp(-np.abs({x}))", "np.exp(np.minimum({x}, 2.0))",
    "np.log1p({x} * {x})", "np.sqrt({x} * {x} + 0.5)", "np.arctan({x})", "np.expm1(np.tanh({x}))",
    "1.0 / (1.0 + np.exp(-{x}))", "np.square({x})", "{x} / 3", "np.cbrt({x} * {x} + 1)",
    "np.power({x} * {x} + 0.5, 0.7)", "np.log(np.abs({x}) + 1.5)", "np.exp2(np.tanh({x}))", "np.arcsinh({x})",
    "{x} ** 2", "{x} ** 3", "np.reciprocal({x} * {x} + 1)", "np.logaddexp({x}, 0.5)", "tj.erf({x})",
    "np.log2({x} * {x} + 1)", "np.log10({x} * {x} + 2)", "np.sinh(np.tanh({x}))", "np.cosh(np.sin({x}))",
    "np.arctan2({x}, {x} * {x} + 1)", "np.arcsin(0.9 * np.sin({x}))", "np.tan(np.tanh({x}))", "1.7 * {x} - 0.3",
    "tj.nn.gelu({x})", "tj.nn.silu({x})", "tj.nn.sigmoid({x})", "tj.nn.relu({x})",
)  # fmt: skip
# Applied to exact values these give exact values wherever NumPy's float32 and float64 runs agree.
_ROUNDED_UNARY = ("{x} * 0.25", "{x} + 1", "2 - {x}", "{x} * {x}", "{x} * -1", "{x} - 0.5")
_EXACT_UNARY = (
    "-{x}", "np.abs({x})", "np.maximum({x}, 0)", "np.minimum({x}, 0.5)", "np.clip({x}, -1.5, 1.5)", "+{x}",
    "np.where({x} > 0, {x}, 0)", "tj.stop_gradient({x})",
)  # fmt: skip
_JUMPS = ("np.floor({x})", "np.ceil({x})", "np.rint({x})", "np.trunc({x})", "np.sign({x})", "np.round({x})")
_BINARY = ("{x} + {y}", "{x} - {y}", "{x} * {y}")
_SMOOTH_BINARY = ("{x} / ({y} * {y} + 1)", "np.hypot({x}, {y} + 3.0)", "np.arctan2({x}, np.abs({y}) + 1)")
_PICKING_BINARY = ("np.maximum({x}, {y})", "np.minimum({x}, {y})")
_COMPARISONS = ("{x} > {y}", "{x} <= {y}", "{x} == {y}", "{x} != {y}")
_INTEGER_BINARY = (
    "{x} + {y}", "{x} - {y}", "{x} * {y}", "np.maximum({x}, {y})", "{x} & {y}", "{x} | {y}", "{x} ^ {y}",
    "{x} // (np.abs({y}) + 1)", "{x} % (np.abs({y}) + 1)", "np.minimum({x}, {y})",
)  # fmt: skip
_INTEGER_UNARY = (
    "{x} + 1",
    "{x} * 2",
    "{x} // 3",
    "{x} % 4",
    "{x} << 1",
    "{x} >> 1",
    "~{x}",
    "np.abs({x})",
    "{x} ** 2",
)
_LOGIC = ("{x} & {y}", "{x} | {y}", "{x} ^ {y}", "np.logical_and({x}, {y})")


class Maker:
    """Builds one program step by step. A rule returns ``(expression, how exactness carries over)`` or None."""

    def __init__(self, choose: Choose, seed: int, *, dtypes: Sequence[np.dtype]) -> None:
        self.choose = choose
        self.dtypes = list(dtypes)
        self.program = Program(seed)
        self.values: list[Value] = []

    # -- decisions ---------------------------------------------------------------------------------------------------

    def one_of(self, options: Sequence[Any]) -> Any:
        return options[self.choose.integer(0, len(options) - 1)]

    def chance(self, one_in: int) -> bool:
        return self.choose.integer(1, one_in) == one_in

    def pick(self, test: Callable[[Value], bool]) -> Value | None:
        """A value that passes ``test``; later ones are likelier, so that programs are deep as well as wide."""
        found = [v for v in self.values if test(v)]
        if not found:
            return None
        recent = found[-4:] if self.chance(2) else found
        return self.one_of(recent)

    def floats(self, test: Callable[[Value], bool] = lambda v: True) -> Value | None:
        return self.pick(lambda v: v.kind == "f" and test(v))

    def partner(self, x: Value, kind: str) -> Value | None:
        """A value that broadcasts against ``x``."""

        def fits(v: Value) -> bool:
            if v.kind not in kind:
                return False
            try:
                return int(np.prod(np.broadcast_shapes(v.shape, x.shape))) <= _MAX_SIZE
            except ValueError:
                return False

        return self.pick(fits)

    def new_input(self, shape: tuple[int, ...], dtype: np.dtype) -> Value:
        array = self.choose.array(shape, dtype)
        wide = array.astype(np.float64) if dtype.kind == "f" else array
        value = Value(f"x{len(self.program.inputs)}", array, wide, True)
        self.program.inputs.append(value)
        self.program.values[value.name] = value
        self.values.append(value)
        return value

    # -- the build ---------------------------------------------------------------------------------------------------

    def build(self, steps: int) -> Program:
        for _ in range(self.choose.integer(1, 3)):
            shape = tuple(self.one_of((1, 2, 3, 4, 5, 8, 17)) for _ in range(self.choose.integer(0, 3)))
            if self.chance(25):
                shape = (*shape, 0)
            self.new_input(shape, self.one_of(self.dtypes))
        if not any(v.kind == "f" for v in self.values):
            self.new_input((3, 4), F32)
        for _ in range(steps):
            for _attempt in range(8):
                made = self.one_of(RULES)(self)
                if made is not None and self.take(*made):
                    break
        program = self.program
        used = {name for _, e in program.steps for name in program.values if name in _words(e)}
        ends = [name for name, _ in program.steps if name not in used]
        program.outputs = ends[-6:] or [program.steps[-1][0] if program.steps else program.inputs[0].name]
        return program

    def take(self, expression: str, exactness: str) -> bool:
        """Add the step if NumPy can compute it and the result is tame."""
        names = _words(expression)
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                narrow = eval(expression, dict(_NARROW), {v.name: v.narrow for v in self.values})
                wide = eval(expression, dict(_WIDE), {v.name: v.wide for v in self.values})
            except (ValueError, IndexError, TypeError):
                return False
        narrow, wide = np.asarray(narrow), np.asarray(wide)
        if narrow.shape != wide.shape or narrow.size > _MAX_SIZE or narrow.ndim > 5:
            return False
        kind = narrow.dtype.kind
        if kind not in "fiub" or (narrow.dtype == F16 and F16 not in self.dtypes):
            return False
        if narrow.size and (
            not np.isfinite(wide).all()
            or not np.isfinite(narrow).all()
            or abs(wide.astype(float)).max() > _LARGEST[kind]
        ):
            return False
        exact = all(v.exact for v in self.values if v.name in names)
        if kind == "f" and exactness != "exact":
            exact = exact and exactness == "rounded" and np.array_equal(narrow.astype(np.float64), wide)
        if kind != "f" and not exact:
            return False
        if (
            kind == "f" and not exact and narrow.size
        ):  # ill-conditioned already: nothing could be concluded from it
            error = np.abs(narrow.astype(np.float64) - wide)
            if (error > 0.02 * np.abs(wide) + 0.02).any():
                return False
        name = f"v{len(self.program.steps)}"
        constant = expression.startswith(("np.arange", "np.full(", "np.tril", "np.eye")) or all(
            v.constant for v in self.values if v.name in names
        )
        value = Value(name, narrow, wide, exact, constant)
        self.program.steps.append((name, expression))
        self.program.values[name] = value
        self.values.append(value)
        return True


def _words(expression: str) -> set[str]:
    word, out = "", set()
    for c in expression + " ":
        if c.isalnum() or c == "_":
            word += c
        elif word:
            out.add(word)
            word = ""
    return out


Made = tuple[str, str] | None


def _smooth(m: Maker) -> Made:
    x = m.floats()
    return None if x is None else (m.one_of(_SMOOTH).format(x=x.name), "inexact")


def _rounded_unary(m: Maker) -> Made:
    x = m.floats()
    return None if x is None else (m.one_of(_ROUNDED_UNARY).format(x=x.name), "rounded")


def _exact_unary(m: Maker) -> Made:
    x = m.floats()
    return None if x is None else (m.one_of(_EXACT_UNARY).format(x=x.name), "exact")


def _jump(m: Maker) -> Made:
    x = m.floats(lambda v: v.exact)
    return None if x is None else (m.one_of(_JUMPS).format(x=x.name), "exact")


def _binary(m: Maker) -> Made:
    x = m.floats()
    y = x and m.partner(x, "fib")
    return None if x is None or y is None else (m.one_of(_BINARY).format(x=x.name, y=y.name), "rounded")


def _smooth_binary(m: Maker) -> Made:
    x = m.floats()
    y = x and m.partner(x, "f")
    return (
        None if x is None or y is None else (m.one_of(_SMOOTH_BINARY).format(x=x.name, y=y.name), "inexact")
    )


def _picking_binary(m: Maker) -> Made:
    x = m.floats()
    y = x and m.partner(x, "f")
    return None if x is None or y is None else (m.one_of(_PICKING_BINARY).format(x=x.name, y=y.name), "exact")


def _compare(m: Maker) -> Made:
    x = m.pick(lambda v: v.exact and v.kind != "b")
    y = x and m.partner(x, "fiu")
    if x is None or y is None or not y.exact:
        return None
    return m.one_of(_COMPARISONS).format(x=x.name, y=y.name), "exact"


def _where(m: Maker) -> Made:
    x = m.floats()
    c = x and m.partner(x, "b")
    y = x and m.partner(x, "f")
    if x is None or c is None or y is None:
        return None
    return f"np.where({c.name}, {x.name}, {y.name})", "exact"


def _integer(m: Maker) -> Made:
    x = m.pick(lambda v: v.kind in "iu")
    if x is None:
        return None
    if m.chance(2):
        return m.one_of(_INTEGER_UNARY).format(x=x.name), "exact"
    y = m.partner(x, x.kind)
    return None if y is None else (m.one_of(_INTEGER_BINARY).format(x=x.name, y=y.name), "exact")


def _logic(m: Maker) -> Made:
    x = m.pick(lambda v: v.kind == "b")
    if x is None:
        return None
    y = m.partner(x, "b")
    if y is None or m.chance(3):
        return f"~{x.name}", "exact"
    return m.one_of(_LOGIC).format(x=x.name, y=y.name), "exact"


def _cast(m: Maker) -> Made:
    x = m.pick(lambda v: v.exact)
    if x is None:
        return None
    target = m.one_of(m.dtypes)
    if target.kind == "f":
        return f"{x.name}.astype({'f' + target.name[5:]})", "rounded"
    if target.kind == "u":
        return (
            f"np.abs({x.name}).astype(np.{target.name})"
            if x.kind != "b"
            else f"{x.name}.astype(np.{target.name})",
            "exact",
        )
    return f"{x.name}.astype(np.{'bool_' if target.kind == 'b' else target.name})", "exact"


def _axis(m: Maker, x: Value) -> str:
    axes = list(range(x.ndim))
    if not axes or m.chance(4):
        return "None"
    first = m.one_of(axes)
    if x.ndim > 1 and m.chance(3):
        second = m.one_of([a for a in axes if a != first])
        return f"({first}, {second - x.ndim})"
    return str(first - x.ndim if m.chance(2) else first)


def _reduce(m: Maker) -> Made:
    x = m.floats(lambda v: v.narrow.size > 0 or m.chance(4))
    if x is None:
        return None
    keep = ", keepdims=True" if m.chance(3) else ""
    name, exactness = m.one_of(
        (("sum", "rounded"), ("sum", "rounded"), ("mean", "inexact"), ("max", "exact"), ("min", "exact"), ("var", "inexact"),
         ("prod", "inexact"), ("std", "inexact"))
    )  # fmt: skip
    axis = _axis(m, x)
    if name == "std":
        return f"np.sqrt(np.var({x.name}, axis={axis}{keep}) + 0.1)", exactness
    return f"np.{name}({x.name}, axis={axis}{keep})", exactness


def _reduce_other(m: Maker) -> Made:
    x = m.pick(lambda v: v.kind in "iub" and v.narrow.size > 0)
    if x is None:
        return None
    name = m.one_of(("any", "all")) if x.kind == "b" else m.one_of(("sum", "max", "min"))
    return f"np.{name}({x.name}, axis={_axis(m, x)})", "exact"


def _arg_reduce(m: Maker) -> Made:
    x = m.pick(lambda v: v.exact and v.ndim > 0 and v.narrow.size > 0 and v.kind != "b")
    if x is None:
        return None
    axis = m.choose.integer(-x.ndim, x.ndim - 1)
    return f"np.{m.one_of(('argmax', 'argmin'))}({x.name}, axis={axis})", "exact"


def _sort(m: Maker) -> Made:
    x = m.pick(lambda v: v.exact and v.ndim > 0 and v.kind != "b")
    if x is None:
        return None
    axis = m.choose.integer(-x.ndim, x.ndim - 1)
    if m.chance(3):
        return f'np.argsort({x.name}, axis={axis}, kind="stable")', "exact"
    return f"np.sort({x.name}, axis={axis})", "exact"


def _cumulate(m: Maker) -> Made:
    x = m.floats(lambda v: v.ndim > 0)
    if x is None:
        return None
    axis = m.choose.integer(-x.ndim, x.ndim - 1)
    return f"np.cumsum({x.name}, axis={axis})", "rounded"


def _row(m: Maker) -> Made:
    """Softmax, log-sum-exp, layer norm over an axis: what the compiled backends fuse into one kernel."""
    x = m.floats(lambda v: v.ndim > 0 and v.narrow.size > 0)
    if x is None:
        return None
    axis = m.choose.integer(-x.ndim, x.ndim - 1)
    n = x.name
    return m.one_of(
        (
            f"tj.nn.softmax({n}, axis={axis})",
            f"tj.nn.log_softmax({n}, axis={axis})",
            f"tj.nn.layer_norm({n}, eps=0.1)",
            f"np.exp({n} - np.max({n}, axis={axis}, keepdims=True))",
            f"{n} - np.mean({n}, axis={axis}, keepdims=True)",
            f"{n} / (np.sum(np.abs({n}), axis={axis}, keepdims=True) + 1)",
        )
    ), "inexact"


def _reshape(m: Maker) -> Made:
    x = m.pick(lambda v: True)
    if x is None:
        return None
    size, n = int(np.prod(x.shape)), x.name
    divisors = [d for d in range(1, min(size, 64) + 1) if size and size % d == 0] or [1]
    d = m.one_of(divisors)
    options = [f"{n}[None]", f"np.expand_dims({n}, -1)", f"np.ravel({n})", f"np.squeeze({n})"]
    if size:
        options += [f"{n}.reshape({d}, -1)", f"np.reshape({n}, (-1, {d}))"] * 2
    if x.ndim > 1:
        i, j = m.choose.integer(0, x.ndim - 1), m.choose.integer(-x.ndim, -1)
        options += [f"{n}.T", f"np.swapaxes({n}, {i}, {j})", f"np.moveaxis({n}, {i}, {j})"] * 2
    return m.one_of(options), "exact"


def _rearrange(m: Maker) -> Made:
    x = m.pick(lambda v: v.ndim > 0)
    if x is None:
        return None
    n, axis = x.name, m.choose.integer(-x.ndim, x.ndim - 1)
    lead = ":, " * (axis % x.ndim)
    k = m.choose.integer(0, max(0, x.shape[axis] - 1))
    options = [
        f"np.flip({n}, axis={axis})",
        f"np.roll({n}, {k}, axis={axis})",
        f"{n}[{lead}{k}:]",
        f"{n}[{lead}::2]",
        f"{n}[{lead}::-1]",
        f"{n}[{lead}-1:None:-2]",
        f"np.repeat({n}, 2, axis={axis})",
        f"np.tile({n}, 2)",
        f"np.pad({n}, 1)",
        f"np.concatenate([{n}, {n}], axis={axis})",
        f"np.stack([{n}, {n}], axis={axis})",
        f"np.broadcast_to({n}, (2, *{x.shape}))",
    ]
    if x.shape[axis]:
        options += [f"{n}[{lead}{k}]", f"{n}[{lead}-1]", f"np.take({n}, [{k}, 0, {k}, -1], axis={axis})"]
        options += [f"{n}[{lead}np.array([[0, {k}], [{k}, 0]])]"]
    return m.one_of(options), "exact"


def _join(m: Maker) -> Made:
    x = m.floats(lambda v: v.ndim > 0)
    if x is None:
        return None
    y = m.floats(lambda v: v.shape == x.shape)
    assert y is not None
    axis = m.choose.integer(-x.ndim, x.ndim - 1)
    return f"np.{m.one_of(('concatenate', 'stack'))}([{x.name}, {y.name}], axis={axis})", "exact"


def _gather(m: Maker) -> Made:
    x = m.pick(lambda v: v.ndim > 0 and v.shape[0] > 0)
    i = m.pick(lambda v: v.kind in "iu" and v.narrow.size > 0)
    if x is None or i is None or x.narrow.size // x.shape[0] * i.narrow.size > _MAX_SIZE:
        return None
    if x.constant and i.ndim == 0:
        return None  # like= takes no NumPy scalar
    if x.constant:  # NumPy's own arrays cannot be indexed by traced values
        return f"np.asarray({x.name}, like={i.name})[{i.name} % {x.shape[0]}]", "exact"
    return f"{x.name}[{i.name} % {x.shape[0]}]", "exact"


def _gather_along(m: Maker) -> Made:
    x = m.floats(lambda v: v.ndim > 0 and v.narrow.size > 0)
    if x is None:
        return None
    axis = m.choose.integer(0, x.ndim - 1)
    i = m.pick(lambda v: v.kind == "i" and v.shape == x.shape)
    if i is None:
        if not x.exact:
            return None
        return (
            f'np.take_along_axis({x.name}, np.argsort({x.name}, axis={axis}, kind="stable"), axis={axis})',
            "exact",
        )
    return f"np.take_along_axis({x.name}, {i.name} % {x.shape[axis]}, axis={axis})", "exact"


def _product(m: Maker) -> Made:
    x = m.floats(lambda v: v.ndim > 0)
    if x is None:
        return None
    n = x.name
    if x.ndim >= 2 and m.chance(3):
        return m.one_of(
            (
                f"{n} @ np.swapaxes({n}, -1, -2) / {x.shape[-1] or 1}",
                f'np.einsum("...ij,...ij->...i", {n}, {n})',
                f"np.swapaxes({n}, -1, -2) @ {n}",
            )
        ), "inexact"
    y = m.floats(lambda v: v.ndim > 0 and v.shape[-2 if v.ndim > 1 else -1] == x.shape[-1])
    if y is None or m.chance(3):
        columns = m.one_of((1, 3, 4, 16))
        y = m.new_input((x.shape[-1], columns), x.narrow.dtype)
    form = m.one_of(("{x} @ {y}", "np.matmul({x}, {y})", "np.dot({x}, {y})", "np.tensordot({x}, {y}, 1)"))
    if "tensordot" in form and y.ndim > 2:
        form = "{x} @ {y}"
    return form.format(x=n, y=y.name) + m.one_of((" * 0.25", "", " + 1")), "inexact"


def _network(m: Maker) -> Made:
    """A dense layer with an activation: product, bias and epilogue in one step."""
    x = m.floats(lambda v: v.ndim > 0 and v.shape[-1] > 0)
    if x is None:
        return None
    columns = m.one_of((2, 5, 8))
    w = m.new_input((x.shape[-1], columns), x.narrow.dtype)
    b = m.new_input((columns,), x.narrow.dtype)
    return f"np.tanh({x.name} @ {w.name} * 0.5 + {b.name})", "inexact"


def _create(m: Maker) -> Made:
    x = m.floats(lambda v: v.ndim > 0)
    if x is None:
        return None
    n = x.name
    return m.one_of(
        (
            f"np.arange({n}.shape[0]) * 0.5 + np.zeros({n}.shape[0], f32)",
            f"np.ones_like({n}) * 2",
            f"np.full({n}.shape, 0.25, f32)",
            f"np.tril(np.ones(({n}.shape[-1], {n}.shape[-1]), f32))",
            f"np.eye({n}.shape[-1], dtype=f32)",
            f"np.zeros_like({n})",
        )
    ), "rounded"


RULES: tuple[Callable[[Maker], Made], ...] = (
    *[_smooth] * 5, *[_rounded_unary] * 2, *[_exact_unary] * 2, _jump, *[_binary] * 5, *[_smooth_binary] * 2,
    _picking_binary, _compare, *[_where] * 2, *[_integer] * 2, _logic, _cast, *[_reduce] * 4, _reduce_other, _arg_reduce,
    _sort, _cumulate, *[_row] * 3, *[_reshape] * 3, *[_rearrange] * 3, _join, _gather, _gather_along, *[_product] * 3,
    *[_network] * 2, _create,
)  # fmt: skip

WIDE_DTYPES = tuple(
    np.dtype(t)
    for t in (
        "float32",
        "float32",
        "float32",
        "float32",
        "float64",
        "float64",
        "float16",
        "int32",
        "int64",
        "uint8",
        "int16",
        "bool",
    )
)
#: What every WebGPU adapter computes in.
NARROW_DTYPES = tuple(
    np.dtype(t) for t in ("float32", "float32", "float32", "float32", "int32", "uint32", "bool")
)


def random_program(
    seed: int, *, steps: int | None = None, dtypes: Sequence[np.dtype] = WIDE_DTYPES
) -> Program:
    """The program number ``seed``: the same on every machine."""
    choose = RandomChoose(seed)
    return Maker(choose, seed, dtypes=dtypes).build(choose.integer(3, 18) if steps is None else steps)
