"""Attention: find softmax(scale * Q K^T + mask) V and its gradient, and replace them by kernels without a score matrix.

The composite of ``nn.scaled_dot_product_attention`` is recognised by its structure, anchored at the division that makes
the probabilities P; the backward by autograd's use of P (dV = P^T dO, dS = P * (dP - sum(dP * P))). If anything else uses
the scores or P, the composite stays as it is. :func:`match_attention` runs before fusion, the rest during and after it.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tracejit.lower import affine, costs
from tracejit.lower.cluster import Cluster, operand_maps
from tracejit.lower.layout import place_of
from tracejit.lower.prepare import Prepared
from tracejit.lower.values import ATTENTION, DOT, PROJ, Value, constant_of
from tracejit.program import Access, AttentionKernel, Capabilities, Decision, Kernel

if TYPE_CHECKING:
    from tracejit.lower.fusion import Fusion
    from tracejit.lower.kernels import KernelBuilder

Roles = tuple[str, ...]
#: A finite fill below this is as good as -inf where no row is masked completely.
_VERY_LOW = -1e9


@dataclass
class Side:
    """An operand with the meaning of each of its axes: b0, b1, ... q, k, d, v."""

    value: Value
    roles: Roles

    def base(self) -> tuple[Value, Roles]:
        """The value behind transposes, so that equal operands compare equal."""
        v, roles = self.value, list(self.roles)
        while v.op == "transpose":
            inner = [""] * len(roles)
            for r, p in zip(roles, v.attrs["perm"], strict=True):
                inner[p] = r
            v, roles = v.inputs[0], inner
        return v, tuple(roles)


@dataclass
class Found:
    """A matched forward pass; ``inside`` are values that disappear."""

    q: Side
    k: Side
    v: Side
    out: Value
    out_roles: Roles
    p: Value
    scale: float
    causal: bool
    mask: Value | None
    masks: list[Value]
    inside: set[Value]


def match_attention(prepared: Prepared, caps: Capabilities, decisions: list[Decision]) -> None:
    """Replace every attention that qualifies."""
    if not caps.attention:
        return
    changed = False
    for v in list(prepared.values):
        if v.op == "div" and v.kind == "map" and v.dtype.kind == "f" and v.dtype.itemsize >= 4:
            found = forward(v, caps)
            if found is None:
                continue
            reason = replace_attention(prepared, found)
            changed = changed or not reason
            nids = (v.nid, found.out.nid)
            decisions.append(
                Decision(
                    "attention" if not reason else "no attention kernel",
                    nids,
                    reason or "the scores are never stored",
                )
            )
    if changed:
        prepared.live()


# -- matching ----------------------------------------------------------------------------------------


def row_value(v: Value, op: str) -> Value | None:
    """``x`` if ``v`` is ``broadcast(reshape(op(x, last axis)))`` with the shape of ``x``."""
    if v.op != "broadcast_to":
        return None
    r = v.inputs[0]
    if r.op == "reshape":
        r = r.inputs[0]
    if r.op != op or r.kind != "reduce":
        return None
    x = r.inputs[0]
    kept = (*x.shape[:-1], 1)
    if r.attrs.get("axes") != (len(x.shape) - 1,) or v.inputs[0].shape != kept or v.shape != x.shape:
        return None
    return x


def between(v: Value, op: str) -> set[Value]:
    """The reduction and views of :func:`row_value`."""
    r = v.inputs[0]
    return {v, r, r.inputs[0]} if r.op == "reshape" else {v, r}


def is_causal(mask: Value) -> bool:
    """True for ``position of query >= position of key`` over the last two axes."""
    while mask.op == "broadcast_to" and len(mask.shape) >= 2:
        mask = mask.inputs[0]
    while mask.op == "reshape" and mask.inputs[0].shape[-2:] == mask.shape[-2:]:
        mask = mask.inputs[0]
    if mask.op == "literal" and len(mask.shape) >= 2:
        array = mask.attrs["value"].array
        return bool((array == np.tril(np.ones(array.shape, bool))).all())
    if mask.op not in ("greater_equal", "less_equal") or len(mask.shape) < 2:
        return False
    a, b = mask.inputs if mask.op == "greater_equal" else mask.inputs[::-1]
    return counts(a, -2) and counts(b, -1)


def counts(v: Value, axis: int) -> bool:
    """True if ``v`` is the position along ``axis`` (-1 or -2)."""
    at = axis + len(v.shape)
    while v.op in ("broadcast_to", "reshape", "convert"):
        x = v.inputs[0]
        if v.op == "broadcast_to":
            at -= len(v.shape) - len(x.shape)
        elif v.op == "reshape":
            wide = [i for i, n in enumerate(v.shape) if n != 1]
            inner = [i for i, n in enumerate(x.shape) if n != 1]
            if len(wide) != len(inner) or at not in wide:
                return False
            at = inner[wide.index(at)]
        v = x
        if at < 0:
            return False
    return v.op == "iota" and v.attrs["axis"] == at


def dot_roles(v: Value) -> tuple[int, int, int]:
    """(batch, left free, right free) axis counts of a product."""
    at = v.attrs
    nb = len(at["lhs_batch"])
    return (
        nb,
        len(v.inputs[0].shape) - nb - len(at["lhs_contract"]),
        len(v.inputs[1].shape) - nb - len(at["rhs_contract"]),
    )


def sides(v: Value, left: str, right: str, contracted: str) -> tuple[Side, Side, Roles] | None:
    """The operands of a product with one free axis each and one contracted axis, with the roles of all axes."""
    if v.kind != DOT or dot_roles(v)[1:] != (1, 1) or len(v.attrs["lhs_contract"]) != 1:
        return None
    out = []
    batch = [f"b{i}" for i in range(len(v.attrs["lhs_batch"]))]
    for x, side, free in ((v.inputs[0], "lhs", left), (v.inputs[1], "rhs", right)):
        roles = [free] * len(x.shape)
        for i, a in enumerate(v.attrs[f"{side}_batch"]):
            roles[a] = batch[i]
        roles[v.attrs[f"{side}_contract"][0]] = contracted
        out.append(Side(x, tuple(roles)))
    return out[0], out[1], (*batch, left, right)


def forward(p: Value, caps: Capabilities) -> Found | None:
    """The attention whose probabilities are ``p``."""
    e = p.inputs[0]
    if e.op != "exp" or row_value(p.inputs[1], "sum") is not e:
        return None
    shifted = e.inputs[0]
    if shifted.op != "sub" or row_value(shifted.inputs[1], "max") is not shifted.inputs[0]:
        return None
    x = shifted.inputs[0]
    inside = {p, e, shifted, *between(p.inputs[1], "sum"), *between(shifted.inputs[1], "max")}
    scale, causal, mask, masks = 1.0, False, None, []
    while x.kind != DOT:
        inside.add(x)
        if x.op == "where" and len(x.inputs) == 3:
            fill = constant_of(x.inputs[2])
            is_tri = is_causal(x.inputs[0])
            if fill is None or not (fill == -math.inf or (is_tri and fill <= _VERY_LOW)):
                return None
            masks.append(x.inputs[0])
            if is_tri and x.shape[-1] == x.shape[-2]:
                causal = True
            elif mask is None:
                mask = x.inputs[0]
            else:
                return None
            x = x.inputs[1]
        elif x.op in ("mul", "div"):
            c = constant_of(x.inputs[1])
            y = x.inputs[0]
            if c is None and x.op == "mul":
                c, y = constant_of(x.inputs[0]), x.inputs[1]
            if c is None or c <= 0:
                return None
            scale = scale * c if x.op == "mul" else scale / c
            x = y
        elif x.op == "add" and mask is None:
            a, b = x.inputs
            if leads_to_product(b):
                a, b = b, a
            if not leads_to_product(a) or scale != 1.0:
                return None
            mask, x = b, a
        else:
            return None
    scores = x
    inside.add(scores)
    parts = sides(scores, "q", "k", "d")
    if parts is None or scores.shape != p.shape:
        return None
    q, k, _ = parts
    products = [u for u in set(p.users) if u.kind == DOT and u.inputs[0] is p]
    for out in products:
        at = out.attrs
        last = len(p.shape) - 1
        if at["lhs_contract"] == (last,) and at["lhs_batch"] == tuple(range(last - 1)):
            parts = sides(out, "q", "v", "k")
            if (
                parts is None
                or max(scores.inputs[0].shape[scores.attrs["lhs_contract"][0]], out.shape[-1])
                > caps.attention_dim
            ):
                continue
            return Found(q, k, parts[1], out, parts[2], p, float(scale), causal, mask, masks, inside)
    return None


def leads_to_product(v: Value) -> bool:
    """True if ``v`` is a product, scaled perhaps."""
    while v.op in ("mul", "div", "where"):
        v = v.inputs[1] if v.op == "where" or constant_of(v.inputs[0]) is not None else v.inputs[0]
    return v.kind == DOT


def other_side(
    v: Value, known: Value, known_roles: Roles, free: str, contracted: str
) -> tuple[Side, Roles] | None:
    """For a product of ``known`` and something: that other operand with roles, and the roles of the result."""
    if v.kind != DOT or dot_roles(v)[1:] != (1, 1):
        return None
    mine = next(r for r in known_roles if not r.startswith("b") and r != contracted)
    for left, right, at in ((mine, free, 0), (free, mine, 1)):
        parts = sides(v, left, right, contracted)
        if parts is None or v.inputs[at] is not known:
            continue
        mine_side, other = (parts[0], parts[1]) if at == 0 else (parts[1], parts[0])
        if mine_side.roles == known_roles:
            return other, parts[2]
    return None


def backward(f: Found) -> tuple[dict[str, Any], set[Value]] | str:
    """The gradient that belongs to ``f``: values dq, dk, dv (with roles) and dout; or why there is none."""
    nb = len(f.p.shape) - 2
    roles: Roles = (*(f"b{i}" for i in range(nb)), "q", "k")
    users = set(f.p.users) - {f.out}
    products = [u for u in users if u.kind == DOT]
    if len(products) != 1:
        return "the probabilities are used elsewhere"
    dv = products[0]
    got = other_side(dv, f.p, roles, "v", "q")
    if got is None:
        return "the probabilities are used elsewhere"
    dout, dv_roles = got
    rest = users - {dv}
    inner = next((u for u in rest if u.op == "mul" and any(w.kind == "reduce" for w in u.users)), None)
    outer = next((u for u in rest if u.op == "mul" and u is not inner), None)
    if inner is None or outer is None or len(rest) != 2:
        return "the probabilities are used elsewhere"
    dp = inner.inputs[1] if inner.inputs[0] is f.p else inner.inputs[0]
    diff = outer.inputs[1] if outer.inputs[0] is f.p else outer.inputs[0]
    if diff.op != "sub" or diff.inputs[0] is not dp or row_value(diff.inputs[1], "sum") is not inner:
        return "the gradient of the softmax has another form"
    parts = sides(dp, "q", "k", "v")
    if parts is None or parts[2] != roles or parts[0].base() != dout.base() or parts[1].base() != f.v.base():
        return "the gradient of the probabilities has another form"
    inside = {inner, outer, diff, dp, *between(diff.inputs[1], "sum")}
    ds, scale = outer, 1.0
    while True:
        following = set(ds.users)
        if len(following) != 1:
            break
        (u,) = following
        if u.op == "where" and u.inputs[1] is ds and constant_of(u.inputs[2]) == 0 and u.inputs[0] in f.masks:
            pass
        elif u.op in ("mul", "div") and u.inputs[0] is ds and constant_of(u.inputs[1]) is not None:
            c = constant_of(u.inputs[1])
            scale = scale * c if u.op == "mul" else scale / c
        else:
            break
        inside.add(u)
        ds = u
    if not math.isclose(scale, f.scale, rel_tol=1e-5):
        return "the gradient of the scores has another scale"
    grads: dict[str, Any] = {"dout": dout, "dv": (dv, dv_roles)}
    for u in set(ds.users):
        for name, free, contracted, side in (("dq", "d", "k", f.k), ("dk", "d", "q", f.q)):
            got = other_side(u, ds, roles, free, contracted)
            if got is not None and got[0].base() == side.base() and name not in grads:
                grads[name] = (u, got[1])
                break
        else:
            return "the gradient of the scores is used elsewhere"
    if "dq" not in grads or "dk" not in grads:
        return "not all of the gradients of q, k and v are wanted"
    return grads, inside


def replace_attention(prepared: Prepared, f: Found) -> str:
    """Rewire the values; returns the reason if it cannot be done."""
    outside = set(prepared.outputs)
    grads: dict[str, Any] | None = None
    inside = set(f.inside)
    if set(f.p.users) != {f.out}:
        got = backward(f)
        if isinstance(got, str):
            return got
        grads, more = got
        inside |= more
    results = {f.out} | ({grads[n][0] for n in ("dq", "dk", "dv")} if grads else set())
    for v in inside:
        if v in outside or any(u not in inside and u not in results for u in v.users):
            return f"{v.op} inside is used elsewhere"
    batch = tuple(f.p.shape[:-2])
    common = {
        "batch": batch, "tq": f.p.shape[-2], "tk": f.p.shape[-1], "scale": f.scale, "causal": f.causal,
        "d": dict(zip(f.q.roles, f.q.value.shape, strict=True))["d"], "dv": f.out.shape[f.out_roles.index("v")],
    }  # fmt: skip
    operands = {"q": f.q, "k": f.k, "v": f.v}
    if f.mask is not None:
        n = len(batch)
        operands["mask"] = Side(f.mask, (*(f"b{i}" for i in range(n)), "q", "k"))
    results_of = {"out": (f.out, f.out_roles)}
    if grads is not None:
        lse = Value("proj", PROJ, (), {"index": 1}, f.p.shape[:-1], f.p.dtype, f.p.nid)
        lse_roles = (*(f"b{i}" for i in range(len(batch))), "q")
        results_of["lse"] = (lse, lse_roles)
    attend(prepared, operands, results_of, {**common, "grad": False}, f.out, [f.p])
    if grads is not None:
        operands = {
            **operands,
            "out": Side(f.out, f.out_roles),
            "lse": Side(lse, lse_roles),
            "dout": grads["dout"],
        }
        wanted = {n: grads[n] for n in ("dq", "dk", "dv")}
        first = min((w[0] for w in wanted.values()), key=lambda v: v.index)
        attend(prepared, operands, wanted, {**common, "grad": True}, first, [f.p])
    return ""


def attend(
    prepared: Prepared,
    operands: dict[str, Side],
    results: dict[str, Any],
    attrs: Any,
    before: Value,
    nodes: Any,
) -> None:
    """Insert an attention value in front of ``before``; its results become projections of it."""
    att = Value(
        "attention",
        ATTENTION,
        [s.value for s in operands.values()],
        {**attrs},
        (),
        before.dtype,
        nodes[0].nid,
    )
    att.attrs["operands"] = {n: s.roles for n, s in operands.items()}  # type: ignore[index]
    att.attrs["results"] = {n: (v, roles) for n, (v, roles) in results.items()}  # type: ignore[index]
    at = prepared.values.index(before)
    prepared.values.insert(at, att)
    for i, (v, _) in enumerate(results.values()):
        v.op, v.kind, v.inputs, v.attrs = "proj", PROJ, (att,), {"index": i}
        if v in prepared.values:
            prepared.values.remove(v)
        prepared.values.insert(at + 1, v)


# -- during and after fusion ---------------------------------------------------------------------------


def place_attention(fusion: Fusion, att: Value) -> None:
    """The cluster of an attention value: its results' home, and the maps of its operands."""
    results = att.attrs["results"]
    if not any(u.maps or u.required for u, _ in results.values()):
        return
    c = fusion.new_cluster("attention", root=att)
    c.contract = att
    for u, _ in results.values():
        u.home = c
        fusion.depends(c, list(u.consumers))
    region = fusion.new_cluster("operand", owner=c, root=att)
    fusion.regions[att] = region
    at = att.attrs
    sizes = {"q": at["tq"], "k": at["tk"], "d": at["d"], "v": at["dv"]}
    sizes |= {f"b{i}": n for i, n in enumerate(at["batch"])}
    exprs: dict[str, affine.Expr] = {}
    for name in (*(f"b{i}" for i in range(len(at["batch"]))), "q", "k", "d", "v"):
        axis = region.new_axis(sizes[name])
        region.groups[name] = [axis]
        exprs[name] = affine.var(axis)
    for (name, roles), v in zip(at["operands"].items(), att.inputs, strict=True):
        region.request_role(name, v, (tuple(exprs[r] for r in roles), (), False))


#: The two axes behind the batch of each access.
_TAILS = {
    "q": "qd", "k": "kd", "v": "kv", "mask": "qk", "out": "qv", "lse": "q", "dout": "qv", "dq": "qd", "dk": "kd", "dv": "kv",
}  # fmt: skip


def attention_kernel(builder: KernelBuilder, c: Cluster) -> Kernel:
    """The kernel of an attention cluster."""
    from tracejit.lower.kernels import Unfusable, address

    att = c.contract
    assert att is not None
    region = builder.fusion.regions[att]
    at = att.attrs
    names = [f"b{i}" for i in range(len(at["batch"]))]
    batch = [a for n in names for a in region.groups[n]]

    def access(name: str, full: Access, axes: list[int], nid: int) -> Access:
        strides = dict(zip(axes, full.strides, strict=True))
        out = [strides[a] for a in batch]
        for role in _TAILS[name]:
            group = region.groups[role]
            for o, i in itertools.pairwise(group):
                if strides[o] != strides[i] * region.sizes[i]:
                    raise Unfusable(nid)
            out.append(strides[group[-1]])
        return Access(full.buffer, tuple(out), full.offset)

    found: dict[str, Any] = {}  # field of the kernel -> access
    axes = list(region.sizes)
    for name in at["operands"]:
        x, m = region.roles[name]
        first = x
        while x in region.members:
            ((x, m),) = operand_maps(region, x, m)
        found[name] = access(name, address(builder, place_of(x, builder.fusion), m, axes), axes, first.nid)
    for name, (v, roles) in at["results"].items():
        exprs = []
        for r in roles:
            group = region.groups[r]
            exprs.append(affine.linear([affine.var(a) for a in group], [region.sizes[a] for a in group]))
        found[name] = access(
            name, address(builder, place_of(v, builder.fusion), (tuple(exprs), (), False), axes), axes, v.nid
        )
    nodes = {att.nid, *(v.nid for v, _ in at["results"].values()), *(v.nid for v in region.members)} - {-1}
    kernel = AttentionKernel(
        "attention_grad" if at["grad"] else "attention", tuple(sorted(nodes)), (), (),
        batch=tuple(region.sizes[a] for a in batch), tq=at["tq"], tk=at["tk"], d=at["d"], dv_dim=at["dv"],
        scale=at["scale"], causal=at["causal"], grad=at["grad"], dtype=att.dtype, **found,
    )  # fmt: skip
    return costs.finish(kernel, builder.buffers)
