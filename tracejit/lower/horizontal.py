"""Merging independent kernels: equal contractions into one batch (weight gradients of equal layers), small loops into one
kernel (optimiser updates, bias gradients).

Called by ``lower`` on kernels in program order. Merging delays the early ones, which keeps their operands alive longer;
backends that batch contractions accept that, others only within a small slack.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from tracejit.lower import costs
from tracejit.lower.structure import kernel_key
from tracejit.program import Buffer, Capabilities, ContractKernel, Decision, Kernel, LoopKernel

_SMALL_BYTES = 8 << 20  # loops that move more than this fill the machine by themselves
_SLACK_BYTES = 256 << 10
_SLACK_SHARE = 50  # of all temporaries


def bindings(buffers: Sequence[Buffer], ids: set[int], separate: bool) -> int:
    """How many buffers a kernel binds: all arena temporaries are one."""
    temps = {b for b in ids if buffers[b].kind == "temp"}
    return len(ids) - len(temps) + (len(temps) if separate else min(1, len(temps)))


@dataclass
class Item:
    """A kernel that may stand for several; ``desc`` is the bit set of items that depend on it."""

    kernel: Kernel
    rank: int
    bit: int
    desc: int
    ids: set[int]
    held: int


class Merger:
    """Kernels with reachability, so that merging never makes a cycle."""

    def __init__(
        self, kernels: Sequence[Kernel], ranks: Sequence[int], buffers: Sequence[Buffer], caps: Capabilities
    ) -> None:
        self.buffers = buffers
        self.caps = caps
        self.decisions: list[Decision] = []
        writers: dict[int, list[int]] = {}
        last: dict[int, int] = {}
        for i, k in enumerate(kernels):
            for b in k.writes:
                writers.setdefault(b, []).append(i)
            for b in k.reads:
                last[b] = i
        self.items: list[Item] = []
        for i, k in enumerate(kernels):
            held = sum(buffers[b].nbytes for b in k.reads if buffers[b].kind == "temp" and last[b] == i)
            self.items.append(Item(k, ranks[i], 1 << i, 0, {*k.reads, *k.writes}, held))
        for i in range(len(kernels) - 1, -1, -1):
            for b in kernels[i].reads:
                for w in writers.get(b, ()):
                    if w != i:
                        self.items[w].desc |= self.items[i].bit
        for i in range(len(kernels) - 1, -1, -1):
            for j, other in enumerate(self.items):
                if other.desc >> i & 1 and j != i:
                    other.desc |= self.items[i].desc
        total = sum(b.nbytes for b in buffers if b.kind == "temp")
        self.slack = float("inf") if caps.batch_contracts > 1 else max(_SLACK_BYTES, total // _SLACK_SHARE)

    def free(self, a: Item, b: Item) -> bool:
        """True if neither depends on the other."""
        return not (a.desc & b.bit or b.desc & a.bit)

    def fits(self, a: Item, b: Item) -> bool:
        """True if the merged kernel stays within the bindings budget."""
        limit = self.caps.max_buffers
        return limit is None or bindings(self.buffers, a.ids | b.ids, self.caps.separate_outputs) <= limit

    def join(self, a: Item, b: Item, kernel: Kernel) -> None:
        """Replace ``a`` and ``b`` by one item."""
        a.kernel, a.rank = kernel, max(a.rank, b.rank)
        a.bit |= b.bit
        a.desc = a.desc | b.desc
        a.ids |= b.ids
        a.held += b.held
        self.items.remove(b)
        for k in self.items:
            if k.desc & a.bit:
                k.desc |= a.bit | a.desc

    def batch_contracts(self) -> None:
        """Equal independent contractions become one kernel."""
        if self.caps.batch_contracts <= 1:
            return
        groups: dict[Hashable, list[Item]] = {}
        for item in list(self.items):
            if not isinstance(item.kernel, ContractKernel):
                continue
            key, _ = kernel_key(item.kernel, self.buffers)
            for other in groups.get(key, ()):
                kernel = other.kernel
                assert isinstance(kernel, ContractKernel)
                if (
                    len(kernel.problems) < self.caps.batch_contracts
                    and self.free(item, other)
                    and self.fits(item, other)
                ):
                    self.join(other, item, self.merged_contract(kernel, item.kernel))
                    break
            else:
                groups.setdefault(key, []).append(item)
        for group in groups.values():
            for item in group:
                if isinstance(item.kernel, ContractKernel) and len(item.kernel.problems) > 1:
                    n = len(item.kernel.problems)
                    self.decisions.append(
                        Decision("batched products", item.kernel.nodes, f"{n} products of one shape")
                    )

    def merged_contract(self, a: ContractKernel, b: ContractKernel) -> Kernel:
        """One kernel for the problems of both."""
        nodes = tuple(sorted({*a.nodes, *b.nodes}))
        return costs.joined(ContractKernel(a.name, nodes, (), (), problems=a.problems + b.problems), (a, b))

    def merge_loops(self) -> None:
        """Small independent loops become one kernel."""
        if self.caps.horizontal <= 1:
            return
        targets: list[Item] = []
        recent: list[Item] = []
        for item in list(self.items):
            if not isinstance(item.kernel, LoopKernel) or item.kernel.bytes > _SMALL_BYTES:
                continue
            terminal = item.desc == 0
            for other in reversed(targets if terminal else recent):
                if self.may_merge(item, other):
                    assert isinstance(other.kernel, LoopKernel)
                    self.join(other, item, self.merged_loop(other.kernel, item.kernel))
                    break
            else:
                if terminal:
                    targets.append(item)
                else:
                    recent = [*recent[-3:], item]
        for item in targets + recent:
            if isinstance(item.kernel, LoopKernel) and len(item.kernel.bodies) > 1:
                n = len(item.kernel.bodies)
                self.decisions.append(
                    Decision("horizontal fusion", item.kernel.nodes, f"{n} independent loops")
                )

    def may_merge(self, item: Item, other: Item) -> bool:
        """True if two loop kernels are independent and merging costs nothing that matters."""
        a, b = item.kernel, other.kernel
        assert isinstance(a, LoopKernel) and isinstance(b, LoopKernel)
        if len(a.bodies) + len(b.bodies) > self.caps.horizontal or a.bytes + b.bytes > 8 * _SMALL_BYTES:
            return False
        if not self.free(item, other) or not self.fits(item, other):
            return False
        return (
            other.held <= self.slack
            if item.desc == 0
            else other.held + item.held <= self.slack and near(item, other)
        )

    def merged_loop(self, a: LoopKernel, b: LoopKernel) -> Kernel:
        """One kernel with the bodies of both."""
        nodes = tuple(sorted({*a.nodes, *b.nodes}))
        name = a.name if b.name in a.name.split("+") else f"{a.name}+{b.name}"
        if name.count("+") > 3:
            name = a.name
        return costs.joined(LoopKernel(name, nodes, (), (), bodies=a.bodies + b.bodies), (a, b))


def near(a: Item, b: Item) -> bool:
    """True for kernels close to each other in the program."""
    return abs(a.rank - b.rank) <= 64


def merge_kernels(
    kernels: Sequence[Kernel], ranks: Sequence[int], buffers: Sequence[Buffer], caps: Capabilities
) -> tuple[list[Kernel], list[int], list[Decision]]:
    """Kernels (given in a valid order) after batching and horizontal fusion, with their ranks."""
    merger = Merger(kernels, ranks, buffers, caps)
    merger.batch_contracts()
    merger.merge_loops()
    return [i.kernel for i in merger.items], [i.rank for i in merger.items], merger.decisions
