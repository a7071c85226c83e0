"""Dense products, embeddings, dropout and one-hot codes. Used through ``tracejit.nn``."""

from __future__ import annotations

from typing import Any

import numpy as np

from tracejit import random
from tracejit.errors import DTypeError, IndexingError, ShapeError
from tracejit.nn._common import check_integer, iota, named_scope, operand
from tracejit.tensor import Tensor


def linear(x: Any, weight: Any, bias: Any = None) -> Any:
    """``x @ weight.T + bias``, as ``torch.nn.functional.linear``.

    ``x``: (..., in); ``weight``: (out, in); ``bias``: (out,) or None. Returns (..., out). ShapeError if they
    do not fit.
    """
    x, weight = operand(x, "linear"), operand(weight, "linear")
    if weight.ndim != 2 or x.ndim == 0 or x.shape[-1] != weight.shape[1]:
        raise ShapeError.make(
            "weight is (out_features, in_features) and x must be (..., in_features)",
            op="linear",
            got={"x": x, "weight": weight},
        )
    with named_scope("linear"):
        y = np.matmul(x, np.swapaxes(weight, 0, 1))
        if bias is None:
            return y
        bias = operand(bias, "linear")
        if tuple(bias.shape) != (weight.shape[0],):
            raise ShapeError.make(
                "bias must be (out_features,)", op="linear", got={"weight": weight, "bias": bias}
            )
        return y + bias


def embedding(ids: Any, weight: Any) -> Any:
    """Rows of ``weight``: ``ids`` integers (...), ``weight`` (n, dim); returns (..., dim).

    DTypeError unless ``ids`` are integers. An id outside 0..n-1 is an IndexingError on arrays (a negative one
    too: it is nearly always a padding mark that was forgotten); traced ids are clipped.
    """
    ids, weight = operand(ids, "embedding"), operand(weight, "embedding")
    check_integer(ids, "embedding", "ids")
    if weight.ndim != 2:
        raise ShapeError.make("weight must be (num_embeddings, dim)", op="embedding", got={"weight": weight})
    if not isinstance(ids, Tensor) and ids.size and not (ids.min() >= 0 and ids.max() < weight.shape[0]):
        worst = ids.max() if ids.max() >= weight.shape[0] else ids.min()
        raise IndexingError.make(
            f"id {worst} is outside the table of {weight.shape[0]} rows",
            op="embedding",
            got={"ids": ids, "weight": weight},
        )
    with named_scope("embedding"):
        return np.take(weight, ids, axis=0)


def one_hot(labels: Any, num_classes: int, dtype: Any = np.float32) -> Any:
    """1 at each label and 0 elsewhere: ``labels`` integers (...); returns (..., num_classes). Out of range:
    all zeros.
    """
    labels = operand(labels, "one_hot")
    check_integer(labels, "one_hot")
    with named_scope("one_hot"):
        classes = iota((*labels.shape, num_classes), -1)
        return (np.expand_dims(labels.astype(np.int32), -1) == classes).astype(dtype)


def dropout(x: Any, p: float = 0.5, key: Any = None, training: bool = True) -> Any:
    """``x`` with each element zeroed with probability ``p`` and the others scaled by ``1/(1-p)`` (Srivastava
    et al., 2014).

    ``key`` is a ``tj.random`` key: the same key gives the same mask on every device. Without ``training`` or
    with ``p=0`` it is ``x`` itself. ValueError if ``p`` is not in [0, 1] or a key is missing.
    """
    x = operand(x, "dropout")
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"[dropout] p must be between 0 and 1, not {p}")
    if not training or p == 0.0:
        return x
    if key is None:
        raise ValueError("[dropout] training needs a key: dropout(x, p, key=tj.random.key(seed))")
    if x.dtype.kind != "f":
        raise DTypeError.make(
            "dropout scales its input, which must be floating-point", op="dropout", got={"x": x}
        )
    with named_scope("dropout"):
        if p == 1.0:
            return x * 0.0
        keep = random.bernoulli(key, 1.0 - p, x.shape)
        return np.where(keep, x * (1.0 / (1.0 - p)), 0)


__all__ = ["dropout", "embedding", "linear", "one_hot"]
