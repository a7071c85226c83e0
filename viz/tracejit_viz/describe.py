"""Everything the inspector and the hover card say about a card, as words and numbers. Pure; no pygame.

Meanings, formulas and rules come from the op table that the compile event carries (the core's op registry); nothing is
explained from a table of the viewer's own.
"""

from __future__ import annotations

import linecache
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from .fold import Item
from .history import Step
from .labels import bytes_text, count_text, exact_bits, number_text, rate_text, time_text, value_text
from .model import Node
from .scene import Scene

HIDDEN_ATTRS = frozenset({"kind", "value", "source", "consts"})


@dataclass
class ItemFacts:
    """The inspector's content for one card."""

    item: Item
    node: Node
    where: str
    tags: list[str]
    meaning: str
    formula: str
    here: str
    tensor: list[tuple[str, str]]
    timing: list[tuple[str, str]]
    kernel_note: str
    slots: list[int]
    source: list[str]
    rules: list[tuple[str, str]]
    partner_title: str
    partners: list[tuple[int, str, str]] = field(default_factory=list)


def op_entry(scene: Scene, item: Item) -> Mapping[str, str]:
    """The op table's entry for a card: of the composite's name for a collapsed scope, else of its op."""
    ops = scene.model.ops
    if item.kind == "group":
        name = item.group[-1].partition(" #")[0]  # "linear #2" is the second call
        return ops.get(f"{name}/") or ops.get(f"{name.rstrip('0123456789_')}/") or {}
    return ops.get(scene.model.nodes[item.head].op) or {}


def describe_item(scene: Scene, index: int, step: Step | None) -> ItemFacts:
    """Collect what is known about a card."""
    item, model, session = scene.items[index], scene.model, scene.session
    node = model.nodes[item.head]
    entry = op_entry(scene, item)
    slots = session.slots_of(item.nodes)
    tags = [session.device]
    fused = [s for s in slots if len(session.kernels[s].nodes) > 1]
    if fused:
        tags.append(
            f"fused k{session.kernels[fused[-1]].id}" + (f" +{len(fused) - 1}" if len(fused) > 1 else "")
        )
    if item.copies > 1:
        tags.append(f"× {item.copies}")
    timing, note = _timing_rows(scene, slots)
    partners, title = _partners(scene, index, step)
    return ItemFacts(
        item=item,
        node=node,
        where=" / ".join((*item.path, *item.group[len(item.path) :])) or item.phase,
        tags=tags,
        meaning=_meaning(scene, item, entry),
        formula=entry.get("formula", ""),
        here=_here(scene, item, node),
        tensor=_tensor_rows(item, node, scene),
        timing=timing,
        kernel_note=note,
        slots=slots,
        source=source_lines(node.source),
        rules=[
            (label, entry[k])
            for k, label in (("shape_rule", "shape"), ("grad_rule", "gradient"))
            if entry.get(k)
        ],
        partner_title=title,
        partners=partners,
    )


def _meaning(scene: Scene, item: Item, entry: Mapping[str, str]) -> str:
    if entry.get("meaning"):
        return entry["meaning"]
    if item.kind == "group":
        nodes = scene.model.nodes
        names = list(dict.fromkeys(nodes[v].op for v in item.nodes if not nodes[v].is_source))
        shown = ", ".join(names[:8]) + (", …" if len(names) > 8 else "")
        return f"{len(item.nodes)} nodes: {shown}. Double-click to open."
    return ""


def _here(scene: Scene, item: Item, node: Node) -> str:
    """What this card is doing in this program: which layer, which role."""
    nodes = scene.model.nodes
    scope = " / ".join((*item.path, *item.group[len(item.path) :])) if item.phase != "optimizer" else ""
    place = f" in {scope}" if scope else ""
    if node.category == "parameter":
        return f"A trainable tensor, {node.name or 'unnamed'}; read by {len(node.users)} node{'s' * (len(node.users) != 1)}."
    if node.op == "input":
        return f"An argument of the function, {node.name or 'unnamed'}."
    if node.category == "constant":
        return f"A constant the trace recorded{place}."
    if scene.model.loss == node.id:
        return "The scalar loss: where the gradient pass begins."
    if node.phase == "gradient" and node.grad_of is not None:
        f = nodes[node.grad_of]
        outputs = [name for name, ref in scene.model.outputs if ref in item.nodes]
        what = f"Part of the gradient of {f.op} #{f.id}{place}: carries d loss backwards through it."
        return what + (f" Returned as {outputs[0]}." if outputs and outputs[0] else "")
    if node.phase == "optimizer":
        return f"Optimiser: updates {' / '.join(item.group or item.path) or 'a parameter'} after the gradient pass."
    outputs = [name for name, ref in scene.model.outputs if ref == node.id]
    if outputs:
        return f"Computes an output of the function{': ' + outputs[0] if outputs[0] else ''}{place}."
    params = [nodes[s].name for s in node.inputs if nodes[s].category == "parameter" and nodes[s].name]
    if params:
        return f"Forward pass{place}, applying {', '.join(params[:2])}."
    return f"Forward pass{place}." if place else "Forward pass."


def _tensor_rows(item: Item, node: Node, scene: Scene) -> list[tuple[str, str]]:
    rows = [("shape", str(node.shape) if node.shape else "() scalar"), ("dtype", node.dtype)]
    if node.nbytes:
        rows.append(("size", bytes_text(node.nbytes)))
    if node.name:
        rows.append(("name", node.name))
    root = scene.model.nodes[node.constant] if node.constant is not None else node
    if root.op == "const" and "value" in root.attrs:
        value = root.attrs["value"]
        bits = exact_bits(value, node.dtype)
        rows.append(("value (exact)", f"{value_text(value, 16)}  {bits}".strip()))
    if node.attrs.get("consts"):
        rows.append(("constants", ", ".join(map(str, node.attrs["consts"][:4]))))
    for key, value in list(node.attrs.items())[:8]:
        if key not in HIDDEN_ATTRS:
            rows.append((key, value_text(value)))
    for s in node.inputs:  # scalar constants it uses, exactly: the mask's -1e9, the scale's 0.1767767
        c = scene.model.nodes[s].constant
        n = scene.model.nodes[c if c is not None else s]
        if n.op == "const" and n.size == 1 and "value" in n.attrs:
            rows.append(
                (
                    f"constant #{n.id}",
                    f"{value_text(n.attrs['value'])}  {exact_bits(n.attrs['value'], n.dtype)}".strip(),
                )
            )
    if item.kind == "group":
        rows.append(("nodes", count_text(len(item.nodes))))
    return rows


def _timing_rows(scene: Scene, slots: list[int]) -> tuple[list[tuple[str, str]], str]:
    session = scene.session
    t = session.timing(slots)
    if t is None:
        return [], ""
    rows = [
        ("last", time_text(t.last)),
        ("mean / p95", f"{time_text(t.mean)} / {time_text(t.p95)}"),
        ("share of step", f"{100 * t.share:.1f} %"),
    ]
    achieved = [rate_text(r, u) for r, u in ((t.flops_rate, "FLOP/s"), (t.bytes_rate, "B/s")) if r > 0]
    if achieved:
        rows.append(("achieved", "  ".join(achieved)))
    note = ""
    whole = [s for s in slots if len(session.kernels[s].nodes) > 1]
    if whole:
        k = session.kernels[whole[-1]]
        note = f"Times are of the whole kernel k{k.id} {k.name} ({k.kind}, {len(k.nodes)} nodes)."
        if len(slots) > 1:
            note = (
                f"Sum of {len(slots)} kernels; " + note[0].lower() + note[1:]
                if len(whole) == 1
                else f"Sum of {len(slots)} kernels."
            )
    return rows, note


def _partners(scene: Scene, index: int, step: Step | None) -> tuple[list[tuple[int, str, str]], str]:
    item = scene.items[index]
    title = "gradient" if item.phase == "forward" else "forward"
    out = []
    for j in scene.partners(index)[:6]:
        other = scene.items[j]
        slots = scene.session.slots_of(other.nodes)
        t = scene.session.timing(slots)
        out.append((j, other.label, time_text(t.mean) if t else f"#{other.head}"))
    return out, title


def source_lines(source: str) -> list[str]:
    """``["model.py:87", "p = softmax(scores)"]``: the place, and the line itself when the file is there to read."""
    if not source:
        return []
    path, _, number = source.rpartition(":")
    if not path or not number.isdigit():
        return [source]
    out = [f"{Path(path).name}:{number}"]
    text = linecache.getline(path, int(number)).strip() if Path(path).suffix == ".py" else ""
    if text:
        out.append(text)
    return out


@dataclass
class ProgramFacts:
    """The inspector's content when nothing is selected."""

    title: str
    subtitle: str
    rows: list[tuple[str, str]]
    hottest: list[tuple[int, str, float, float]]  # kernel slot, name, seconds, share

    @staticmethod
    def time_of(seconds: float, share: float) -> str:
        """``61 µs · 4.1 %``."""
        return f"{time_text(seconds)} · {100 * share:.1f} %"


def program_facts(scene: Scene, step: Step | None) -> ProgramFacts:
    """Sizes, rates and the most expensive kernels of a program."""
    session, model = scene.session, scene.model
    counts = model.counts()
    rows = [("nodes", count_text(len(model.nodes)))]
    rows += [(phase, count_text(n)) for phase, n in counts.items() if n]
    parameters = sum(n.size for n in model.nodes if n.category == "parameter" and n.phase == "forward")
    if parameters:
        rows.append(("parameters", count_text(parameters)))
    if session.kernels:
        fused = sum(1 for k in session.kernels if len(k.nodes) > 1)
        rows.append(("kernels", f"{len(session.kernels)}" + (f" ({fused} fused)" if fused else "")))
    flops = sum(k.flops for k in session.kernels)
    mean = session.mean_duration() if session.steps else float("nan")
    if step is not None and len(step.live) and step.live.max() > 0:
        rows.append(("peak memory", bytes_text(float(step.live.max()))))
    if session.steps:
        rows.append(("step time", time_text(mean)))
        if flops and mean > 0:
            rows.append(("achieved", rate_text(flops / mean, "FLOP/s")))
        busy = session.timing(range(len(session.kernels)))
        if busy is not None and mean > 0:
            rows.append(("in kernels", f"{min(100.0, 100 * busy.mean / mean):.0f} %"))
    if session.loss:
        rows.append(("loss", number_text(session.loss[-1])))
    hottest = []
    ns = session.mean_kernel_ns()
    ranked = sorted((float(v), i) for i, v in enumerate(ns[: len(session.kernels)]) if v == v)[::-1][:6]
    for v, i in ranked:
        k = session.kernels[i]
        last = model.nodes[k.nodes[-1]] if k.nodes else None
        name = k.name
        if last is not None:
            name = f"{k.name}  {'/'.join(last.scope[-2:])}" if last.scope else k.name
        hottest.append((i, name, v * 1e-9, v * 1e-9 / mean if mean > 0 else 0.0))
    return ProgramFacts(session.name, f"{session.device} · traced program", rows, hottest)
