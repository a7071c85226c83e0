"""tracejit: make ordinary Python/NumPy model functions fast and visible.

``@tj.trace`` runs a function once with symbolic tensors, records a graph, differentiates and optimises it, and runs it
natively on CPU or on any GPU, chosen per call, while a window can show every node as it executes. See README.md.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from tracejit._version import __version__

if TYPE_CHECKING:
    from tracejit import nn as nn
    from tracejit import optim as optim
    from tracejit import random as random
    from tracejit.array import Array as Array
    from tracejit.autograd import grad as grad
    from tracejit.autograd import jvp as jvp
    from tracejit.autograd import value_and_grad as value_and_grad
    from tracejit.backend import DeviceInfo as DeviceInfo
    from tracejit.backend import device as device
    from tracejit.backend import devices as devices
    from tracejit.backend import register_backend as register_backend
    from tracejit.batching import vmap as vmap
    from tracejit.checkpointing import checkpoint as checkpoint
    from tracejit.config import debug_nans as debug_nans
    from tracejit.config import disable_jit as disable_jit
    from tracejit.control import cond as cond
    from tracejit.control import print as print
    from tracejit.control import scan as scan
    from tracejit.control import while_loop as while_loop
    from tracejit.custom import custom_vjp as custom_vjp
    from tracejit.custom import stop_gradient as stop_gradient
    from tracejit.environment import FrozenValueWarning as FrozenValueWarning
    from tracejit.errors import CompileError as CompileError
    from tracejit.errors import ConcretizationError as ConcretizationError
    from tracejit.errors import DeviceError as DeviceError
    from tracejit.errors import DeviceLostError as DeviceLostError
    from tracejit.errors import DeviceOutOfMemoryError as DeviceOutOfMemoryError
    from tracejit.errors import DTypeError as DTypeError
    from tracejit.errors import FileFormatError as FileFormatError
    from tracejit.errors import GradientError as GradientError
    from tracejit.errors import GraphError as GraphError
    from tracejit.errors import IndexingError as IndexingError
    from tracejit.errors import LeakedTensorError as LeakedTensorError
    from tracejit.errors import NonFiniteError as NonFiniteError
    from tracejit.errors import ShapeError as ShapeError
    from tracejit.errors import TraceError as TraceError
    from tracejit.errors import TracingError as TracingError
    from tracejit.errors import UnsupportedFunctionError as UnsupportedFunctionError
    from tracejit.functions import erf as erf
    from tracejit.functions import where as where
    from tracejit.graph import Graph as Graph
    from tracejit.graph import Node as Node
    from tracejit.io import load as load
    from tracejit.io import save as save
    from tracejit.jit import CacheInfo as CacheInfo
    from tracejit.jit import RetraceWarning as RetraceWarning
    from tracejit.jit import TracedFunction as TracedFunction
    from tracejit.jit import trace as trace
    from tracejit.source import named_scope as named_scope
    from tracejit.tensor import Tensor as Tensor
    from tracejit.watching import view as view
    from tracejit.watching import watch as watch

# Where each public name lives; loaded on first use, so that ``import tracejit`` costs little more than NumPy.
_HOMES: dict[str, tuple[str, ...]] = {
    "array": ("Array",),
    "autograd": ("grad", "jvp", "value_and_grad"),
    "backend": ("DeviceInfo", "device", "devices", "register_backend"),
    "batching": ("vmap",),
    "checkpointing": ("checkpoint",),
    "config": ("debug_nans", "disable_jit"),
    "control": ("cond", "print", "scan", "while_loop"),
    "custom": ("custom_vjp", "stop_gradient"),
    "environment": ("FrozenValueWarning",),
    "errors": (
        "CompileError", "ConcretizationError", "DTypeError", "DeviceError", "DeviceLostError", "DeviceOutOfMemoryError",
        "FileFormatError", "GradientError", "GraphError", "IndexingError", "LeakedTensorError", "NonFiniteError",
        "ShapeError", "TraceError", "TracingError", "UnsupportedFunctionError",
    ),
    "functions": ("erf", "where"),
    "graph": ("Graph", "Node"),
    "io": ("load", "save"),
    "source": ("named_scope",),
    "tensor": ("Tensor",),
    "jit": ("CacheInfo", "RetraceWarning", "TracedFunction", "trace"),
    "watching": ("view", "watch"),
}  # fmt: skip
_HOME = {name: module for module, names in _HOMES.items() for name in names}
_ROOMS = frozenset({"nn", "optim", "random"})


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is not None:
        value = getattr(importlib.import_module(f"tracejit.{home}"), name)
        globals()[name] = value
        return value
    if name in _ROOMS:
        return importlib.import_module(f"tracejit.{name}")
    raise AttributeError(f"module 'tracejit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME, *_ROOMS})


__all__ = ["__version__", *sorted(_HOME), *sorted(_ROOMS)]  # noqa: PLE0604
