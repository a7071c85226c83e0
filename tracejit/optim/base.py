"""The optimiser interface: transforms of gradients in a row, then one step of the weights. Called by
``optimizers``.

State is a plain tree of arrays: a step counter (int32, so that a traced step never retraces) and, per
transform, slots keyed by the weight's path (``"blocks.0.attn.qkv.weight"``): readable when saved, and cheap
to flatten on each call. Every leaf that is not a floating-point array is left alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import optree

from tracejit.dtypes import DType
from tracejit.errors import ShapeError, TraceError
from tracejit.source import named_scope
from tracejit.tensor import Tensor, is_arraylike

#: Weights or gradients by path.
Leaves = dict[str, Any]
#: A learning rate: a number, an array or traced scalar, or a function of the number of steps taken so far.
Rate = Any

FLOAT16, FLOAT32 = np.dtype(np.float16), np.dtype(np.float32)


class OptimizerState(NamedTuple):
    """``step``: int32 scalar, how many updates were made; ``slots``: one mapping per transform that keeps
    something.
    """

    step: Any
    slots: tuple[Any, ...]


@dataclass(frozen=True)
class Transform:
    """One stage: ``init(weights) -> slots`` and ``apply(grads, slots, weights, step) -> (grads, slots)``, all
    by path.

    ``step`` counts from 1 in ``apply``. Stages see gradients in the arithmetic dtype (float32 for float16
    weights).
    """

    init: Callable[[Leaves], Any]
    apply: Callable[[Leaves, Any, Leaves, Any], tuple[Leaves, Any]]

    def __call__(self, grads: Any) -> Any:
        """The transform on a tree of gradients, for stages without state (clipping)."""
        tree = _Tree(grads)
        out, _ = self.apply(tree.weights, self.init(tree.weights), tree.weights, 1)
        return tree.rebuilt({name: as_dtype(g, tree.weights[name].dtype) for name, g in out.items()})


@dataclass(frozen=True)
class Optimizer:
    """What ``sgd``, ``adam``, ... return: ``init`` and ``update``, both pure."""

    stages: tuple[Transform, ...]
    learning_rate: Rate
    decay: float = 0.0  # decoupled: each step also scales the weights by 1 - rate * decay

    def init(self, model: Any) -> OptimizerState:
        """The state for a tree of weights (arrays; zeros, on the host)."""
        weights = _Tree(model).weights
        return OptimizerState(np.zeros((), np.int32), tuple(stage.init(weights) for stage in self.stages))

    def update(self, model: Any, grads: Any, state: OptimizerState) -> tuple[Any, OptimizerState]:
        """``(model, state)`` after one step along ``grads``, a tree like ``model``.

        Every weight keeps its dtype. ShapeError if a gradient does not fit its weight; TraceError if the
        state belongs to another model or optimiser.
        """
        with named_scope("optimizer"):
            tree = _Tree(model)
            weights = tree.weights
            gradients = {
                name: as_dtype(g, arithmetic_dtype(weights[name])) for name, g in tree.matching(grads).items()
            }
            self._check_state(state, weights)
            step = state.step + np.int32(1)
            slots = []
            for stage, kept in zip(self.stages, state.slots):
                gradients, kept = stage.apply(gradients, kept, weights, step)
                slots.append(optree.tree_map(lambda x: as_dtype(x, x.dtype), kept))
            rate = current_rate(self.learning_rate, state.step)
            moved = {}
            for (name, w), g in zip(weights.items(), gradients.values()):
                scale, wide = scalar_as(rate, g.dtype), as_dtype(w, g.dtype)
                kept_part = wide * (1.0 - scale * self.decay) if self.decay else wide
                moved[name] = as_dtype(kept_part - g * scale, w.dtype)
            return tree.rebuilt(moved), OptimizerState(as_dtype(step, np.dtype(np.int32)), tuple(slots))

    def _check_state(self, state: OptimizerState, weights: Leaves) -> None:
        """TraceError if ``state`` was made by another optimiser or for another model."""
        expected = [stage.init({}).keys() for stage in self.stages]
        hint = "state = opt.init(model)"
        if not isinstance(state, OptimizerState) or [kept.keys() for kept in state.slots] != expected:
            raise TraceError.make("this state was made by another optimiser", op="optimizer", hint=hint)
        for slot in (slot for kept in state.slots for slot in kept.values()):
            if slot.keys() != weights.keys():
                different = min(slot.keys() ^ weights.keys())
                raise TraceError.make(
                    f"this state belongs to another model: they differ at {different!r}",
                    op="optimizer",
                    hint=hint,
                )


def chain(*parts: Transform | Optimizer) -> Optimizer:
    """Transforms in front of an optimiser, applied in order: ``chain(clip_by_global_norm(1.0),
    adamw(3e-4))``.
    """
    if (
        not parts
        or not isinstance(parts[-1], Optimizer)
        or not all(isinstance(p, Transform) for p in parts[:-1])
    ):
        raise TypeError(
            "chain takes transforms such as clip_by_global_norm(...), then one optimiser, in this order"
        )
    last = parts[-1]
    stages = (*parts[:-1], *last.stages)
    return Optimizer(stages, last.learning_rate, last.decay)  # type: ignore[arg-type]


# -- trees ---------------------------------------------------------------------------------------------------


class _Tree:
    """A tree taken apart: its floating-point arrays by path, and what is needed to rebuild it."""

    def __init__(self, tree: Any) -> None:
        paths, self.leaves, self.spec = optree.tree_flatten_with_path(tree)
        self.names = [".".join(map(str, path)) for path in paths]
        self.weights: Leaves = {}
        for name, leaf in zip(self.names, self.leaves):
            if isinstance(leaf, float) and not isinstance(leaf, np.floating):
                leaf = np.asarray(leaf)  # a Python float is a float64 weight, as it is when traced
            if is_arraylike(leaf) and leaf.dtype.kind == "f":
                if name in self.weights:
                    raise TraceError.make(f"two leaves of the tree are called {name!r}", op="optimizer")
                self.weights[name] = leaf

    def matching(self, grads: Any) -> Leaves:
        """The gradients of the weights, by path, from a tree of the same structure (or with more below
        non-weights).
        """
        try:
            parts = self.spec.flatten_up_to(grads)
        except ValueError as error:
            raise ShapeError.make(
                f"the gradients have another tree structure than the model: {error}", op="optimizer"
            ) from None
        found = {}
        part: Any
        for name, part in zip(self.names, parts):
            weight = self.weights.get(name)
            if weight is None:
                continue
            if isinstance(part, float):
                part = np.asarray(part)
            if not is_arraylike(part) or tuple(part.shape) != tuple(weight.shape):
                raise ShapeError.make(
                    f"the gradient of {name!r} does not fit its weight",
                    op="optimizer",
                    got={"weight": weight, "gradient": part},
                )
            found[name] = part
        return found

    def rebuilt(self, weights: Leaves) -> Any:
        """The tree with other weights."""
        return self.spec.unflatten(weights.get(name, leaf) for name, leaf in zip(self.names, self.leaves))


# -- dtypes --------------------------------------------------------------------------------------------------


def arithmetic_dtype(weight: Any) -> DType:
    """float32 for float16 weights, whose squared gradients would underflow; else the weight's own."""
    return FLOAT32 if weight.dtype == FLOAT16 else weight.dtype


def as_dtype(x: Any, dtype: DType) -> Any:
    """``x`` as ``dtype``: an array even where NumPy would make a scalar."""
    if isinstance(x, Tensor):
        return x if x.dtype == dtype and not x.weak else x.astype(dtype)
    return np.asarray(x, dtype=dtype)


def scalar_as(x: Any, dtype: DType) -> Any:
    """A rate or coefficient that does not promote arrays of ``dtype``: a Python number, or a scalar of that
    dtype.
    """
    return x if isinstance(x, float | int) else as_dtype(x, dtype)


def current_rate(rate: Rate, step: Any) -> Any:
    """The learning rate of the step after ``step`` updates."""
    value = rate(step) if callable(rate) else rate
    if isinstance(value, np.floating):  # np.float64 is not weak: a Python float is
        value = float(value)
    if getattr(value, "shape", ()) != ():
        raise ShapeError.make(
            "the learning rate must be a scalar", op="optimizer", got={"learning_rate": value}
        )
    return value


def zeros_like(weights: Leaves) -> Leaves:
    """Slots of zeros in the arithmetic dtype."""
    return {name: np.zeros(w.shape, arithmetic_dtype(w)) for name, w in weights.items()}


def stateless(apply: Callable[[Leaves, Leaves], Leaves]) -> Transform:
    """A transform that keeps nothing: ``apply(grads, weights) -> grads``."""
    return Transform(lambda weights: {}, lambda grads, slots, weights, step: (apply(grads, weights), slots))


def check_range(
    owner: str, low: float, high: float, values: Mapping[str, Any] | Sequence[tuple[str, Any]]
) -> None:
    """ValueError for a Python number outside ``low <= value <= high``; traced values pass."""
    for name, value in dict(values).items():
        if isinstance(value, int | float) and not low <= value <= high:
            raise ValueError(f"[{owner}] {name} must be between {low} and {high}, not {value}")


__all__ = ["Optimizer", "OptimizerState", "Transform", "chain"]
