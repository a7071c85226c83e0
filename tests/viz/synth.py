"""Graphs and steps for the viewer's tests: random scoped graphs, and plausible timings for any graph.

The timings are invented (seeded); tests of real programs use the numpy backend instead.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np

from tracejit.events import CompileEvent, KernelInfo, StepEvent

HERE = Path(__file__).parent

OPS = {
    "add": {
        "category": "elementwise",
        "meaning": "Sum of two tensors, element by element.",
        "formula": "y = a + b",
        "shape_rule": "broadcast(a, b)",
        "grad_rule": "da = dy, db = dy, summed over broadcast axes",
    },
    "mul": {
        "category": "elementwise",
        "meaning": "Product of two tensors, element by element.",
        "formula": "y = a * b",
        "shape_rule": "broadcast(a, b)",
        "grad_rule": "da = dy * b, db = dy * a",
    },
    "exp": {
        "category": "activation",
        "meaning": "Exponential of every element.",
        "formula": "y = e^x",
        "shape_rule": "same as x",
        "grad_rule": "dx = dy * y",
    },
    "dot_general": {
        "category": "contraction",
        "meaning": "Matrix product over the last axis of a and the second to last of b.",
        "formula": "y[i,j] = sum_k a[i,k] * b[k,j]",
        "shape_rule": "(..., m, k) x (..., k, n) -> (..., m, n)",
        "grad_rule": "da = dy @ b^T, db = a^T @ dy",
    },
}


def load(name: str) -> dict[str, Any]:
    """A traced graph from ``fixtures``: ``grad_step`` (339 nodes) or ``train_step`` (1761)."""
    return json.loads((HERE / "fixtures" / f"{name}.json").read_text())


def chain_graph(n: int) -> dict[str, Any]:
    """``n`` nodes in one unscoped line: a flat program without any structure to help the layout."""
    nodes: list[dict[str, Any]] = []
    for i in range(n):
        inputs = [i - 1] if i % 7 else ([i - 1, i - 7] if i >= 7 else [])
        op = "input" if not inputs else ("add", "mul", "exp")[i % 3]
        nodes.append(
            {
                "id": i,
                "op": op,
                "inputs": inputs,
                "attrs": {},
                "shape": [8, 8],
                "dtype": "float32",
                "scope": "",
            }
        )
    return {
        "format": "tracejit-graph",
        "version": 1,
        "name": "chain",
        "nodes": nodes,
        "inputs": [0],
        "outputs": [],
    }


def random_graph(seed: int, blocks: int = 3, per_block: int = 10, train: bool = True) -> dict[str, Any]:
    """A random scoped graph with forward, gradient and optimiser parts, like a small training step."""
    rng = random.Random(seed)
    nodes: list[dict[str, Any]] = []

    def add(op: str, inputs: list[int], scope: str, **extra: Any) -> int:
        shape = rng.choice(([8, 16], [16], [4, 8, 16], []))
        node = {
            "id": len(nodes),
            "op": op,
            "inputs": inputs,
            "attrs": {},
            "shape": shape,
            "dtype": "float32",
            "scope": scope,
        }
        node.update(extra)
        nodes.append(node)
        return len(nodes) - 1

    add("input", [], "", name="x", attrs={"kind": "argument"})
    params: list[int] = []
    alive = [0]
    forward: list[int] = []
    for b in range(blocks):
        for k in range(per_block):
            sub = rng.choice(("", "/attn", "/attn/softmax", "/mlp", "/norm"))
            scope = f"block{b}{sub}"
            op = rng.choice(("add", "mul", "exp", "dot_general", "sum", "reshape", "tanh"))
            inputs = [rng.choice(alive[-6:])]
            if op in ("add", "mul", "dot_general"):
                kind = rng.random()
                if kind < 0.4:
                    p = add("input", [], "", name=f"params.block{b}.w{k}", attrs={"kind": "argument"})
                    params.append(p)
                    inputs.append(p)
                elif kind < 0.6:
                    inputs.append(
                        add("const", [], scope, attrs={"value": rng.choice((0.5, -1e9, 0.1767767, 3))})
                    )
                else:
                    inputs.append(rng.choice(alive))
            v = add(op, inputs, scope, source=f"model.py:{20 + k}")
            alive.append(v)
            forward.append(v)
    loss = add("sum", [alive[-1]], "loss")
    nodes[loss]["shape"] = []
    outputs = [{"name": "loss", "node": loss}]
    if train:
        grad: dict[int, int] = {}
        last = add("mul", [loss], "loss", grad_of=loss)
        for v in reversed(forward):
            last = grad[v] = add(
                rng.choice(("mul", "dot_general", "sum")), [last, v], nodes[v]["scope"], grad_of=v
            )
        for p in params:
            user = next(n["id"] for n in nodes if p in n["inputs"])
            m = add("input", [], "", name=f"state.m.{nodes[p]['name']}", attrs={"kind": "argument"})
            nodes[m]["shape"] = nodes[p]["shape"] = [8, 16]
            g = grad.get(user, last)
            a = add("mul", [m, g], "optimizer/adam")
            c = add("add", [a, p], "optimizer/adam")
            for v in (a, c):
                nodes[v]["shape"] = [8, 16]
            outputs.append({"name": f"new.{nodes[p]['name']}", "node": c})
    inputs = [n["id"] for n in nodes if n["op"] == "input"]
    return {
        "format": "tracejit-graph",
        "version": 1,
        "name": f"random{seed}",
        "nodes": nodes,
        "inputs": inputs,
        "outputs": outputs,
    }


def compile_event(
    graph: dict[str, Any], *, program: int = 1, device: str = "cpu", fuse: int = 1, name: str | None = None
) -> CompileEvent:
    """A program for a graph: ``fuse`` consecutive elementwise nodes of one scope to a kernel."""
    kernels: list[KernelInfo] = []
    group: list[int] = []

    def close() -> None:
        if group:
            i = len(kernels)
            size = sum(_size(graph["nodes"][v]) for v in group)
            heavy = any(graph["nodes"][v]["op"] == "dot_general" for v in group)
            kernels.append(
                KernelInfo(
                    i,
                    f"{graph['nodes'][group[-1]]['op']}_{i}",
                    "contract" if heavy else "loop" if len(group) > 1 else "op",
                    tuple(group),
                    bytes=12 * size,
                    flops=size * (256 if heavy else 1),
                    source=(lambda i=i: f"define void @k{i}(ptr %out, ptr %in) {{\nentry:\n  ret void\n}}\n"),
                )
            )
            group.clear()

    previous = None
    for n in graph["nodes"]:
        if not n["inputs"]:
            continue
        same = previous is not None and previous["scope"] == n["scope"] and len(group) < fuse
        if not same or n["op"] == "dot_general":
            close()
        group.append(n["id"])
        previous = n
    close()
    return CompileEvent(program, name or graph["name"], device, graph, kernels, OPS)


def _size(n: dict[str, Any]) -> int:
    return int(np.prod(n["shape"])) if n["shape"] else 1


def step_event(
    event: CompileEvent, step: int = 0, *, seed: int = 0, begin: int = 0, nan_node: int | None = None
) -> StepEvent:
    """A plausible execution: each kernel takes time by its size, one after another."""
    rng = np.random.default_rng(seed + step)
    n = len(event.kernels)
    cost = np.array([2_000 + k.flops / 40 + k.bytes / 12 for k in event.kernels]) * rng.uniform(0.9, 1.15, n)
    gap = rng.uniform(300, 900, n)
    end = np.cumsum(cost + gap).astype(np.int64)
    start = (end - cost).astype(np.int64)
    half = np.arange(n) / max(1, n)
    live = (4_000_000 + 60_000_000 * np.sin(np.pi * np.clip(half * 1.1, 0, 1)) ** 1.4).astype(np.int64)
    loss = 0.42 + 2.6 * float(np.exp(-step / 22)) + float(rng.uniform(-0.04, 0.04))
    finish = int(end[-1]) + 5_000 if n else 1_000
    return StepEvent(
        event.program,
        step,
        np.array([k.id for k in event.kernels], np.uint32),
        start + begin,
        end + begin,
        live,
        np.zeros(n, np.uint8),
        begin,
        begin + finish,
        loss=loss,
        nan_node=nan_node,
    )
