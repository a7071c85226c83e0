"""The backend-neutral Program: kernels, buffers and their order. Made by ``tracejit.lower``, consumed by compiled backends.

A program is a list of kernels over flat buffers. Kernels come from a small closed set (DESIGN section 4):

* :class:`LoopKernel`: one or more independent :class:`LoopBody` (elementwise chains, reductions, row pipelines such as
  softmax or layer norm, optimiser updates). A body is straight-line SSA over a named iteration domain.
* :class:`ContractKernel`: batched matrix products of equal shape, each with a LoopBody epilogue.
* :class:`AttentionKernel`: flash attention, forward or backward.
* :class:`OpKernel`: one op on contiguous operands, for which a backend has a lowering of its own: convolution, pooling,
  scatter, sort, cumulative sums, control flow.

Everything here is immutable data without behaviour beyond validation, so that a pass is a function and a backend a reader.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from tracejit.graph import Graph

BufferKind: TypeAlias = Literal["input", "const", "temp", "output"]
ReduceKind: TypeAlias = Literal["sum", "prod", "max", "min", "any", "all"]


@dataclass(frozen=True)
class Buffer:
    """A flat, C-contiguous run of ``size`` elements. Several graph values may share one (views, in-place reuse).

    ``index`` is the position among the program's inputs, constants or outputs; for temporaries it is -1 and ``offset``
    is the byte offset in the arena chosen by the memory plan (None when the backend allocates it by itself).
    ``shape`` is the shape that a user sees for inputs and outputs.
    """

    id: int
    size: int
    dtype: np.dtype[Any]
    kind: BufferKind
    index: int = -1
    offset: int | None = None
    shape: tuple[int, ...] = ()

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.size * self.dtype.itemsize


@dataclass(frozen=True)
class Access:
    """An affine address: element ``offset + sum(strides[d] * index[d])`` of ``buffer``; strides are in elements.

    ``strides`` has one entry per axis of the domain of the body that uses it (0 = does not vary along the axis).
    """

    buffer: int
    strides: tuple[int, ...]
    offset: int = 0


@dataclass(frozen=True)
class Instr:
    """One SSA instruction of a :class:`LoopBody`; ``args`` are positions of earlier instructions of the same body.

    ``axes`` are the domain axes along which the value varies (sorted); a backend hoists by it. ``attrs`` is read-only.
    ``node`` is the id of the graph node that the instruction computes, or -1.

    Elementwise instructions have the name of the elementwise op (``add``, ``exp``, ``where``, ``convert``, ``less``,
    ...), operands already converted to a common dtype, and NumPy's semantics. Besides those:

    * ``const``: attrs ``value`` (a Python scalar).
    * ``index``: attrs ``axis``; the int64 position along that domain axis.
    * ``load``: attrs ``access``. Optional attrs ``gather``: tuple of ``(arg position, stride, size)``; the value of each
      such argument (an integer already normalised to ``0 <= i < size``; a backend clamps it before the access) times
      stride is added to the address. Optional attrs ``predicate``: arg position of a bool, with ``fill``: where it is
      False the result is ``fill`` and memory is not touched.
    * ``store``: args ``(value,)`` or ``(value, predicate)``; attrs ``access``. The value is converted beforehand.
    * ``reduce``: args ``(value,)``; attrs ``kind`` (sum prod max min any all). Reduces over *all* reduce axes of the
      body. max/min propagate NaN. Also ``argmax``/``argmin`` kinds: result int64 linear position over the reduce axes,
      first occurrence wins, NaN wins over numbers.
    * ``random_bits``: args ``(k0, k1)`` uint32; attrs ``strides``: the uint32 counter is ``sum(strides[d] * index[d])``;
      Threefry-2x32-20 as in ``tracejit.random``.
    * ``acc``: only in an epilogue: the accumulator of the contraction at (batch, m, n).
    """

    op: str
    args: tuple[int, ...]
    dtype: np.dtype[Any]
    axes: tuple[int, ...]
    attrs: Mapping[str, Any] = field(default_factory=dict)
    node: int = -1


@dataclass(frozen=True)
class LoopBody:
    """Straight-line SSA over an iteration domain; ``reduce_axes`` are the axes that every ``reduce`` in it removes.

    Instructions whose ``axes`` contain a reduce axis run per element ("full level"), the others once per point of the
    parallel axes ("row level"). A full-level instruction may use the result of a reduce (softmax: load, max, sub, exp,
    sum, div, store): a backend makes one sweep over the row per dependency level and recomputes or keeps full-level
    values between sweeps, as it sees fit. With no reduce axes it is a plain elementwise loop.
    """

    domain: tuple[int, ...]
    instrs: tuple[Instr, ...]
    reduce_axes: tuple[int, ...] = ()


@dataclass(frozen=True)
class KernelBase:
    """What every kernel knows: its name, the graph nodes it covers, the buffers it touches, its cost.

    ``reads``/``writes`` are buffer ids. ``after`` are the positions in ``Program.kernels`` that must have finished
    (true, anti and output dependencies, with in-place reuse of the arena taken into account); kernels that do not
    depend on each other may overlap. ``bytes`` is memory traffic, ``flops`` floating-point operations per execution.
    """

    name: str
    nodes: tuple[int, ...]
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    after: tuple[int, ...] = ()
    bytes: int = 0
    flops: int = 0


@dataclass(frozen=True)
class LoopKernel(KernelBase):
    """Independent loop bodies that run as one kernel (horizontal fusion when there is more than one)."""

    bodies: tuple[LoopBody, ...] = ()


@dataclass(frozen=True)
class Contract:
    """C[b, m, n] = sum_k A[b, m, k] * B[b, k, n], then the epilogue.

    The iteration domain is ``batch + m + n + k`` (each a tuple of sizes; after coalescing mostly one axis each, possibly
    none for batch). ``a`` and ``b`` address that whole domain (stride 0 where they do not vary). ``a_sum`` and ``b_sum``,
    over ``batch + m + n``, also get the sum of that operand over k (bias gradients beside weight gradients; only for
    backends that state ``contract_sums``). ``epilogue`` is a
    LoopBody over ``batch + m + n`` that contains exactly one ``acc`` instruction and at least one ``store``; it may
    have no reduce. ``acc_dtype`` is the accumulator's type (float32 for float16 and float32 operands).
    """

    batch: tuple[int, ...]
    m: tuple[int, ...]
    n: tuple[int, ...]
    k: tuple[int, ...]
    a: Access
    b: Access
    epilogue: LoopBody
    acc_dtype: np.dtype[Any]
    a_sum: Access | None = None
    b_sum: Access | None = None


@dataclass(frozen=True)
class ContractKernel(KernelBase):
    """Contractions of equal sizes and strides on different buffers, in one kernel (usually just one)."""

    problems: tuple[Contract, ...] = ()


@dataclass(frozen=True)
class AttentionKernel(KernelBase):
    """softmax(scale * Q K^T + mask) V without the score matrix (Dao et al., FlashAttention-2, 2023).

    Accesses are over the domain ``batch + (t, d)`` with t the query or key position; ``batch`` usually is (B, H).
    Forward: reads q, k, v (and mask, a bool or float Access over ``batch + (tq, tk)``), writes ``out`` and ``lse``
    (log-sum-exp per query row, over ``batch + (tq,)``; natural logarithm of the scaled scores' sum of exponentials).
    Backward (``grad`` True): also reads ``dout``, ``out`` and ``lse`` and writes ``dq``, ``dk``, ``dv``.
    A query row whose keys are all masked gives NaN, as the composite does.
    """

    batch: tuple[int, ...] = ()
    tq: int = 0
    tk: int = 0
    d: int = 0
    dv_dim: int = 0
    scale: float = 1.0
    causal: bool = False
    grad: bool = False
    q: Access | None = None
    k: Access | None = None
    v: Access | None = None
    mask: Access | None = None
    out: Access | None = None
    lse: Access | None = None
    dout: Access | None = None
    dq: Access | None = None
    dk: Access | None = None
    dv: Access | None = None
    dtype: np.dtype[Any] = field(default_factory=lambda: np.dtype(np.float32))


@dataclass(frozen=True)
class OpKernel(KernelBase):
    """One graph op on whole contiguous buffers, lowered by the backend's own table keyed by ``op``.

    ``operands`` are ``(buffer, shape)`` in the order of the op's inputs, ``results`` likewise for its outputs.
    ``epilogue`` (only convolution) is a LoopBody over the result's shape with one ``acc``, replacing the plain store.
    Ops that arrive this way: conv2d, conv2d_input_grad, conv2d_weight_grad, max_pool2d, max_pool2d_grad, avg_pool2d,
    avg_pool2d_grad, scatter_add, sort, argsort, cumsum, cumprod, cond, while_loop, scan, print, and any op a backend
    declares in ``Capabilities.op_kernels``.
    """

    op: str = ""
    attrs: Mapping[str, Any] = field(default_factory=dict)
    operands: tuple[tuple[int, tuple[int, ...]], ...] = ()
    results: tuple[tuple[int, tuple[int, ...]], ...] = ()
    epilogue: LoopBody | None = None


Kernel: TypeAlias = LoopKernel | ContractKernel | AttentionKernel | OpKernel


@dataclass(frozen=True)
class Decision:
    """One line of the fusion report: what was (not) fused and why; ``tests`` and ``inspect()`` read it."""

    action: str
    nodes: tuple[int, ...]
    reason: str


@dataclass(frozen=True)
class Program:
    """Everything a compiled backend needs. Kernels are in a valid sequential order.

    ``inputs``/``outputs`` are buffer ids in the order of the graph's inputs and outputs; one buffer may be the output
    twice, and an output may be an input's or constant's own buffer (the backend then copies or passes it on).
    ``constants`` are the arrays of the ``const`` buffers by ``Buffer.index``. ``arena`` is the arena's size in bytes and
    ``live_bound`` the lower bound: the largest sum of temporaries alive at once.
    """

    name: str
    graph: Graph
    buffers: tuple[Buffer, ...]
    kernels: tuple[Kernel, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    constants: tuple[np.ndarray, ...] = ()
    arena: int = 0
    live_bound: int = 0
    report: tuple[Decision, ...] = ()


@dataclass(frozen=True)
class Capabilities:
    """What a compiled backend tells the lowering so that the passes can be steered; the defaults suit a CPU.

    ``max_buffers`` bounds distinct buffers per kernel (None = no bound), ``horizontal`` how many loop bodies may share
    a kernel, ``batch_contracts`` how many equal contractions may, ``row_limit`` the longest row (elements) that a row
    pipeline may keep on chip, ``attention`` whether attention kernels exist (for heads of at most
    ``attention_dim`` features), ``separate_outputs`` whether independent results should get buffers of their own
    instead of the arena (hazards tracked per buffer), ``contract_epilogue`` and ``conv_epilogue`` whether loops fuse
    behind products (if they touch at most ``epilogue_buffers`` buffers, None = any number: optimiser updates touch 7,
    bias and activation 2 or 3), ``recompute_flops`` the cost below which a producer is recomputed in each consumer
    instead of stored, ``op_kernels`` ops that must arrive as :class:`OpKernel`.
    ``contract_sums``: a product can store the sums of its operands over k too (:class:`Contract`).
    ``split_k`` is the largest number of partial sums into which a contraction with at most ``split_k_limit`` results and
    a single consumer may be split: it arrives as a contraction with an extra leading batch axis (the parts) and a plain
    store, and the consumer adds the parts. No more parts are made once ``split_k_work`` partial results (those of the
    equal products in the same batch included) keep the device busy.
    """

    max_buffers: int | None = None
    horizontal: int = 1_000_000
    batch_contracts: int = 1
    row_limit: int = 1 << 20
    attention: bool = True
    attention_dim: int = 256
    separate_outputs: bool = False
    contract_epilogue: bool = True
    contract_sums: bool = False
    epilogue_buffers: int | None = None
    conv_epilogue: bool = True
    recompute_flops: int = 8
    index_bits: int = 64
    split_k: int = 1
    split_k_limit: int = 1 << 20
    split_k_work: int = 1 << 62
    op_kernels: frozenset[str] = frozenset()
    dtypes: frozenset[str] = frozenset(
        {
            "bool",
            "int8",
            "int16",
            "int32",
            "int64",
            "uint8",
            "uint16",
            "uint32",
            "uint64",
            "float16",
            "float32",
            "float64",
        }
    )
