"""A recording in progress: which builder, which inputs, which captured arrays and guards. Used by ``tensor.py`` and tracing.

The innermost recording of a thread is ``state.context``; control-flow bodies record into a child of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tracejit import source as _source
from tracejit.dtypes import DType, canonical
from tracejit.graph import GraphBuilder, GuardInfo, Node, Provenance
from tracejit.state import state

if TYPE_CHECKING:
    from tracejit.tensor import Tensor


class TraceContext:
    """One recording in progress: the builder, the inputs so far, captured arrays, and guards on scalar values.

    ``parent`` is set for the body of ``cond``/``while_loop``/``scan``; tensors of an outer context used inside become
    extra inputs of the body (see :attr:`lifted`).
    """

    def __init__(self, name: str, parent: TraceContext | None = None) -> None:
        self.name = name
        self.parent = parent
        self.builder = GraphBuilder()
        self.inputs: list[Node] = []
        self.open = True
        self.made_at = _source.location()
        #: Arrays used inside that are not arguments: id -> (array, input node). Held by reference, read at each call.
        self.captured: dict[int, tuple[Any, Node]] = {}
        #: How often each of them was used: id -> count (kept by the outermost context).
        self.uses: dict[int, int] = {} if parent is None else parent.uses
        #: Outer tensors used inside a control-flow body: id of outer node -> (outer tensor, inner input node).
        self.lifted: dict[int, tuple[Tensor, Node]] = {}
        #: Values of weakly typed scalar arguments at trace time, by input node; reading one makes a guard.
        self.scalars: dict[Node, Any] = {}
        self.guards: dict[int, GuardInfo] = {}
        self.effects: list[Node] = []

    def add_input(self, name: str, shape: Sequence[int], dtype: DType, kind: str = "argument") -> Node:
        """A new input node; its position among the inputs is its index."""
        attrs = {"index": len(self.inputs), "kind": kind, "shape": tuple(shape), "dtype": dtype}
        # An argument belongs to no line of the function; its name says where it comes from.
        node = self.builder.add("input", (), attrs, like=Provenance("", "", None, name))
        self.inputs.append(node)
        return node

    def capture(self, array: Any) -> Node:
        """The input node for an array of the surroundings (a closed-over weight, a global table)."""
        self.uses[id(array)] = self.uses.get(id(array), 0) + 1
        return self._capture(array)

    def _capture(self, array: Any) -> Node:
        found = self.captured.get(id(array))
        if found is not None:
            return found[1]
        if self.parent is not None and self.parent.open:
            from tracejit.tensor import Tensor

            return self.lift(Tensor(self.parent._capture(array), self.parent))
        node = self.add_input(
            f"capture{len(self.captured)}", array.shape, canonical(array.dtype), kind="capture"
        )
        self.captured[id(array)] = (array, node)
        return node

    def lift(self, outer: Tensor) -> Node:
        """The input node of this control-flow body for a tensor of an enclosing context."""
        key = id(outer.node)
        found = self.lifted.get(key)
        if found is None:
            node = self.add_input(
                outer.node.name or f"outer{len(self.lifted)}", outer.shape, outer.dtype, kind="outer"
            )
            found = self.lifted[key] = (outer, node)
        return found[1]

    def encloses(self, inner: TraceContext | None) -> bool:
        """True if this context is ``inner`` or one of its ancestors."""
        while inner is not None:
            if inner is self:
                return True
            inner = inner.parent
        return False


def current_context() -> TraceContext | None:
    """The innermost recording of this thread, or None."""
    return state.context


class recording:
    """Context manager: make ``context`` the innermost recording; on exit it is closed and its tensors become invalid."""

    def __init__(self, context: TraceContext) -> None:
        self.context = context

    def __enter__(self) -> TraceContext:
        self._before = state.context
        state.context = self.context
        state.refresh()
        return self.context

    def __exit__(self, *exc: object) -> None:
        state.context = self._before
        state.refresh()
        self.context.open = False
