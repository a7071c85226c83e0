"""Losses with PyTorch's names; classes are on the last axis. Used through ``tracejit.nn``.

The cross-entropy picks the label's logit by comparing a class counter with the label, which stays inside one
row kernel forward and backward where a gather and a scatter would be kernels of their own.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tracejit.errors import IndexingError, ShapeError
from tracejit.nn._common import (
    check_integer,
    float_operand,
    iota,
    named_scope,
    narrow,
    operand,
    reduce_loss,
    widen,
    with_vjp,
)
from tracejit.nn.activations import _softplus_value
from tracejit.tensor import Tensor

# -- classification ------------------------------------------------------------------------------------------


def _label_positions(logits: Any, labels: Any) -> Any:
    """Boolean array of the shape of ``logits``: True at each row's label."""
    classes = iota(logits.shape, -1)
    return np.expand_dims(labels.astype(np.int32), -1) == classes


def _picked(scores: Any, labels: Any) -> Any:
    """``scores[..., labels]``: the score of each row's label."""
    return np.sum(np.where(_label_positions(scores, labels), scores, 0), axis=-1)


def _check_classification(scores: Any, labels: Any, ignore_index: int | None, op: str) -> None:
    check_integer(labels, op)
    if scores.ndim == 0 or tuple(labels.shape) != tuple(scores.shape[:-1]):
        raise ShapeError.make(
            "labels must have the shape of the scores without their last axis, which holds the classes",
            op=op,
            got={"scores": scores, "labels": labels},
        )
    if isinstance(labels, Tensor) or not labels.size:
        return
    wrong = (labels < 0) | (labels >= scores.shape[-1])
    if ignore_index is not None:
        wrong &= labels != ignore_index
    if wrong.any():
        raise IndexingError.make(
            f"label {labels[wrong].flat[0]} is not one of the {scores.shape[-1]} classes",
            op=op,
            got={"scores": scores, "labels": labels},
            hint="pass ignore_index=... for rows that do not count",
        )


def _cross_entropy_fwd(logits: Any, labels: Any) -> tuple[Any, Any]:
    shifted = logits - np.max(logits, axis=-1, keepdims=True)
    log_sum = np.log(np.sum(np.exp(shifted), axis=-1, keepdims=True))
    loss = np.squeeze(log_sum, axis=-1) - _picked(shifted, labels)
    return loss, (shifted, log_sum, labels)


def _cross_entropy_bwd(residuals: Any, g: Any) -> tuple[Any, None]:
    shifted, log_sum, labels = residuals
    p = np.exp(shifted - log_sum)
    return np.expand_dims(g, -1) * np.where(_label_positions(shifted, labels), p - 1.0, p), None


#: One loss per row, ``logsumexp(logits) - logits[label]``; its gradient is ``softmax - one_hot``.
_cross_entropy_rows = with_vjp("cross_entropy", _cross_entropy_fwd, _cross_entropy_bwd)


def _mean_without(losses: Any, labels: Any, ignore_index: int | None, reduction: str, op: str) -> Any:
    """Reduction over the rows whose label is not ``ignore_index``; the mean over none of them is NaN, as in
    PyTorch.
    """
    if ignore_index is None:
        return reduce_loss(losses, reduction, op)
    counts = labels != ignore_index
    losses = np.where(counts, losses, 0)
    if reduction != "mean":
        return reduce_loss(losses, reduction, op)
    with np.errstate(invalid="ignore"):
        return np.sum(losses) / np.sum(counts.astype(losses.dtype))


def cross_entropy(
    logits: Any,
    labels: Any,
    label_smoothing: float = 0.0,
    ignore_index: int | None = None,
    *,
    reduction: str = "mean",
) -> Any:
    """Cross-entropy between ``softmax(logits)`` and integer labels, in nats; stable for huge logits.

    ``logits``: (..., classes); ``labels``: integers (...). Returns a scalar in the dtype of ``logits`` (or
    (...) with ``reduction="none"``). ``label_smoothing`` in [0, 1] mixes in the uniform distribution (Szegedy
    et al., 2016); rows with label ``ignore_index`` do not count, in the mean's denominator either. Labels out
    of range: IndexingError on arrays; in traced code, where values are unknown, such a row is treated as
    having no label.
    """
    op = "cross_entropy"
    logits, labels = float_operand(logits, op), operand(labels, op)
    _check_classification(logits, labels, ignore_index, op)
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"[{op}] label_smoothing must be between 0 and 1, not {label_smoothing}")
    with named_scope(op):
        wide = widen(logits)
        losses = _cross_entropy_rows(wide, labels)
        if label_smoothing:
            # (1-s) * (lse - z_label) + s * (lse - mean(z)) = (lse - z_label) + s * (z_label - mean(z))
            losses = losses + (_picked(wide, labels) - np.mean(wide, axis=-1)) * label_smoothing
        return narrow(_mean_without(losses, labels, ignore_index, reduction, op), logits.dtype)


def nll_loss(log_probs: Any, labels: Any, ignore_index: int | None = None, *, reduction: str = "mean") -> Any:
    """``-log_probs[..., label]``; ``log_probs``: (..., classes), ``labels``: integers (...). Reduced to a
    scalar.
    """
    op = "nll_loss"
    log_probs, labels = float_operand(log_probs, op), operand(labels, op)
    _check_classification(log_probs, labels, ignore_index, op)
    with named_scope(op):
        losses = -_picked(widen(log_probs), labels)
        return narrow(_mean_without(losses, labels, ignore_index, reduction, op), log_probs.dtype)


def _bce_fwd(logits: Any, targets: Any) -> tuple[Any, Any]:
    return _softplus_value(logits) - logits * targets, (logits, targets)


def _bce_bwd(residuals: Any, g: Any) -> tuple[Any, Any]:
    logits, targets = residuals
    z = np.exp(-np.abs(logits))
    probability = np.where(logits >= 0, 1.0, z) / (1.0 + z)
    return g * (probability - targets), -(g * logits)


_bce = with_vjp("binary_cross_entropy_with_logits", _bce_fwd, _bce_bwd)


def binary_cross_entropy_with_logits(logits: Any, targets: Any, *, reduction: str = "mean") -> Any:
    """``-t log(sigmoid(x)) - (1-t) log(1-sigmoid(x))`` in nats, stable for huge logits.

    ``logits`` and ``targets`` (in [0, 1], any dtype) have the same shape. Reduced to a scalar in the dtype of
    ``logits``.
    """
    op = "binary_cross_entropy_with_logits"
    logits, targets = _same_shape(logits, targets, op)
    with named_scope(op):
        wide = widen(logits)
        return narrow(reduce_loss(_bce(wide, narrow(targets, wide.dtype)), reduction, op), logits.dtype)


# -- regression ----------------------------------------------------------------------------------------------


def _same_shape(prediction: Any, target: Any, op: str) -> tuple[Any, Any]:
    """Both operands as floats; ShapeError where broadcasting would hide a mistake."""
    prediction, target = float_operand(prediction, op), operand(target, op)
    if tuple(prediction.shape) != tuple(target.shape):
        raise ShapeError.make(
            "prediction and target must have the same shape",
            op=op,
            got={"prediction": prediction, "target": target},
            hint="a silent broadcast is nearly always a mistake; use np.broadcast_to if it is meant",
        )
    if target.dtype.kind != "f":
        target = target.astype(prediction.dtype)
    return prediction, target


def mse_loss(prediction: Any, target: Any, *, reduction: str = "mean") -> Any:
    """``(prediction - target)^2`` reduced over all elements; ShapeError unless the shapes are equal."""
    prediction, target = _same_shape(prediction, target, "mse_loss")
    with named_scope("mse_loss"):
        error = widen(prediction) - widen(target)
        return narrow(
            reduce_loss(error * error, reduction, "mse_loss"), np.result_type(prediction.dtype, target.dtype)
        )


mse = mse_loss


def l1_loss(prediction: Any, target: Any, *, reduction: str = "mean") -> Any:
    """``|prediction - target|`` reduced over all elements; ShapeError unless the shapes are equal."""
    prediction, target = _same_shape(prediction, target, "l1_loss")
    with named_scope("l1_loss"):
        losses = np.abs(widen(prediction) - widen(target))
        return narrow(
            reduce_loss(losses, reduction, "l1_loss"), np.result_type(prediction.dtype, target.dtype)
        )


def huber_loss(prediction: Any, target: Any, delta: float = 1.0, *, reduction: str = "mean") -> Any:
    """``e^2/2`` where ``|e| <= delta``, else ``delta * (|e| - delta/2)`` (Huber, 1964), with ``e = prediction
    - target``.
    """
    prediction, target = _same_shape(prediction, target, "huber_loss")
    with named_scope("huber_loss"):
        error = np.abs(widen(prediction) - widen(target))
        small = np.minimum(error, delta)
        losses = small * (error - small * 0.5)
        return narrow(
            reduce_loss(losses, reduction, "huber_loss"), np.result_type(prediction.dtype, target.dtype)
        )


__all__ = [
    "binary_cross_entropy_with_logits",
    "cross_entropy",
    "huber_loss",
    "l1_loss",
    "mse",
    "mse_loss",
    "nll_loss",
]
