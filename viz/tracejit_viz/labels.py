"""Words and numbers as the viewer prints them: labels of nodes, exact constants, times, sizes, rates.

Called by ``fold`` and every panel. Pure; no pygame.
"""

from __future__ import annotations

import math
import re
import struct
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .model import Node

_SHORT = {
    "dot_general": "matmul",
    "broadcast_to": "broadcast",
    "broadcast_in_dim": "broadcast",
    "convert_element_type": "astype",
    "convert": "astype",
    "reduce_sum": "sum",
    "reduce_max": "max",
    "integer_pow": "pow",
    "select_n": "where",
    "add_any": "add",
}


def node_label(n: Node) -> str:
    """What a card says: the op under its everyday name, with an exponent or target dtype where that is the point."""
    if n.op == "input":
        return short_name(n.name) or "input"
    if n.op == "const":
        return constant_text(n)
    label = _SHORT.get(n.op, n.op)
    if label == "astype":
        return f"→ {n.dtype}"
    return label


def short_name(name: str, parts: int = 2) -> str:
    """The telling tail of an argument path: ``params.blocks[0].attn.q.weight`` -> ``q.weight``."""
    if not name:
        return ""
    pieces = [p for p in re.split(r"[./\[\]'\"]+", name) if p]
    if not pieces:
        return name
    tail = pieces[-parts:]
    while len(tail) > 1 and len(".".join(tail)) > 22:
        tail = tail[1:]
    return ".".join(tail)


def short_stem(name: str) -> str:
    """A parameter's name without block numbers: ``blocks[3].norm1.weight`` -> ``blocks.norm1.weight``."""
    return short_name(re.sub(r"\[\d+\]|(?<=[._])\d+(?=[._])", "", name))


def shape_text(shape: tuple[int, ...]) -> str:
    """``(8, 64, 256)`` -> ``8·64·256``; the empty string for a scalar."""
    return "·".join(map(str, shape))


def constant_text(n: Node) -> str:
    """The value of a constant, exact where it fits, or what it is."""
    if n.op == "iota":
        return f"0…{max(n.shape, default=1) - 1}"
    value = n.attrs.get("value")
    if value is None:
        return n.name or (shape_text(n.shape) or "const")
    return value_text(value)


def value_text(value: object, limit: int = 12) -> str:
    """A scalar as the shortest text that reads back to it; arrays as their first values."""
    if isinstance(value, bool) or value is None:
        return str(value)
    if isinstance(value, int):
        return f"{value:,}".replace(",", " ") if abs(value) < 10**9 else f"{value:.4g}"
    if isinstance(value, float):
        if math.isnan(value):
            return "NaN"
        if math.isinf(value):
            return "∞" if value > 0 else "−∞"
        if value == int(value) and abs(value) < 1e9:
            return str(int(value))
        single = struct.unpack("f", struct.pack("f", value))[0] if abs(value) < 3e38 else value
        for digits in range(1, 10):
            text = f"{value:.{digits}g}"
            if (
                float(text) == value
                or struct.unpack("f", struct.pack("f", min(float(text), 3e38)))[0] == single
            ):
                return text
        return f"{value:.9g}"
    if isinstance(value, (list, tuple)):
        flat = ", ".join(value_text(v) for v in value[:4])
        return f"[{flat}{', …' if len(value) > 4 else ''}]"
    text = str(value)
    return text if len(text) <= limit * 2 else text[: limit * 2 - 1] + "…"


def exact_bits(value: object, dtype: str) -> str:
    """The bit pattern of a float32/float64 constant, for readers who want to be sure."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return ""
    try:
        if dtype == "float32":
            return "0x" + struct.pack(">f", value).hex().upper()
        if dtype == "float64":
            return "0x" + struct.pack(">d", value).hex().upper()
    except (OverflowError, struct.error):
        return ""
    return ""


def composite_category(name: str, categories: Iterable[str], ops: Mapping[str, Mapping[str, str]]) -> str:
    """The colour of a collapsed scope: what its name says it is, else its most telling op."""
    known = ops.get(f"{name}/", {}).get("category")
    if known:
        return known
    low = name.lower()
    for words, category in (
        (("loss", "cross_entropy", "mse"), "loss"),
        (("norm", "ln"), "norm"),
        (("softmax", "logsumexp", "mean", "sum", "var", "pool"), "reduction"),
        (("gelu", "relu", "silu", "tanh", "sigmoid", "elu", "act"), "activation"),
        (("head", "view", "split", "merge", "reshape"), "view" if not low.startswith("head") else ""),
    ):
        if category and any(w in low for w in words):
            return category
    count = Counter(c for c in categories if c not in ("constant", "parameter", "input"))
    for best in ("contraction", "norm", "gather", "reduction", "activation", "random"):
        if count[best]:
            return best
    return count.most_common(1)[0][0] if count else "elementwise"


def time_text(seconds: float) -> str:
    """``6.12e-5`` -> ``61.2 µs``."""
    if not math.isfinite(seconds):
        return "–"
    a = abs(seconds)
    for scale, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"), (1e-9, "ns")):
        if a >= scale * 0.9995 or unit == "ns":
            v = seconds / scale
            return f"{v:.0f} {unit}" if abs(v) >= 100 or unit == "ns" else f"{v:.3g} {unit}"
    return "0"


def bytes_text(n: float) -> str:
    """Binary units: ``1.00 MiB``."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(n) < 1024 or unit == "TiB":
            return f"{n:.0f} B" if unit == "B" else f"{n:.2f} {unit}" if n < 10 else f"{n:.1f} {unit}"
        n /= 1024
    return ""


def rate_text(per_second: float, unit: str) -> str:
    """``3.86e10, "B/s"`` -> ``38.6 GB/s``."""
    for scale, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if per_second >= scale:
            return f"{per_second / scale:.3g} {prefix}{unit}"
    return f"{per_second:.3g} {unit}"


def count_text(n: int) -> str:
    """Thousands apart by a thin gap: ``1 284``."""
    return f"{n:,}".replace(",", " ")


def number_text(x: float) -> str:
    """Four significant figures, fixed when that is short."""
    if not math.isfinite(x):
        return "NaN" if math.isnan(x) else ("∞" if x > 0 else "−∞")
    if x == 0:
        return "0"
    if 1e-3 <= abs(x) < 1e5:
        return f"{x:.4f}" if abs(x) < 10 else f"{x:.4g}"
    return f"{x:.3e}"
