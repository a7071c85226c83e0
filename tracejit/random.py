"""Random numbers from explicit keys: ``tj.random.key``, ``split``, ``uniform``, ``normal``, ... after
``jax.random``.

Counter-based (Threefry-2x32-20, op ``random_bits``): a number depends only on the key and on its position, so
results are the same traced or not, on every backend, in any order of execution. Bits, integers, ``uniform`` on
[0, 1) and ``normal`` agree bit for bit between backends (``normal`` where the device rounds products, sums and
roots as IEEE 754 says; a GPU's driver may fuse them), the others to the rounding of ``log``. A key is an array of
two uint32 words and is meant to be used once: ``split`` it for more.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import numpy as np

from tracejit.dtypes import FLOAT32, FLOAT64, INT64, UINT32, DType, canonical
from tracejit.errors import DTypeError, ShapeError
from tracejit.functions import promotion as pr
from tracejit.functions.indexing import take
from tracejit.functions.reductions import argmax, normalize_axis
from tracejit.functions.shape import moveaxis, shape_argument
from tracejit.ops import elementwise as ew
from tracejit.ops import ordering
from tracejit.ops import shape as ops
from tracejit.ops.creation import random_bits
from tracejit.ops.registry import get as op
from tracejit.source import named_scope
from tracejit.tensor import Tensor, current_context, is_arraylike

Shape = tuple[int, ...]

# Keys derived for different purposes differ in these bits, so that children never repeat the numbers of a
# parent.
_SPLIT = 0x9E3779B9
_FOLD = 0xBB67AE85


# -- keys ------------------------------------------------------------------------------------------


def key(seed: Any) -> Any:
    """A key, uint32 [2] (high word, low word), from an integer seed (taken modulo 2**64; a traced one modulo
    2**32)."""
    if isinstance(seed, Tensor):
        if seed.dtype.kind not in "iu" or seed.shape != ():
            raise DTypeError.make("a seed is an integer", op="random.key", got={"seed": seed})
        low = ops.reshape(pr.tensor(seed, "random.key", UINT32), shape=(1,))
        return ops.concatenate(ops.filled(0, (1,), UINT32), low, axis=0)
    try:
        value = operator.index(seed) % (1 << 64)
    except TypeError:
        raise DTypeError.make("a seed is an integer", op="random.key", got={"seed": seed}) from None
    return np.array([value >> 32, value & 0xFFFFFFFF], np.uint32)


def _words(k: Any, name: str) -> tuple[Any, Any]:
    """The two words of a key: recorded while tracing (a key of the surroundings is captured, not baked
    in)."""
    if not is_arraylike(k) or k.dtype != UINT32 or tuple(k.shape) != (2,):
        raise DTypeError.make(
            "the key must be uint32[2]",
            op=f"random.{name}",
            got={"key": k},
            hint="make one with tj.random.key(seed), more with tj.random.split",
        )
    if current_context() is not None:
        k = pr.tensor(k, name)
    elif not isinstance(k, Tensor):
        k = np.asarray(k)
    return tuple(ops.reshape(ops.slice_(k, start=(i,), stop=(i + 1,), step=(1,)), shape=()) for i in (0, 1))


def _const(value: Any, like: Any, dtype: DType | None = None) -> Any:
    return ops.filled(value, tuple(like.shape), dtype or like.dtype)


def _xor(word: Any, value: int) -> Any:
    return ew.bitwise_xor(word, _const(value, word))


def split(key: Any, num: Any = 2) -> Any:
    """Independent new keys, uint32 [num, 2] (or [*num, 2] for a shape); do not use ``key`` itself again."""
    k0, k1 = _words(key, "split")
    with named_scope("split_key"):
        return random_bits(_xor(k0, _SPLIT), k1, shape=(*shape_argument(num, "split"), 2))


def fold_in(key: Any, data: Any) -> Any:
    """A new key from ``key`` and an integer (modulo 2**32), e.g. a step number, which may be traced."""
    k0, k1 = _words(key, "fold_in")
    if isinstance(data, Tensor):
        if data.dtype.kind not in "iu" or data.shape != ():
            raise DTypeError.make("data must be an integer scalar", op="random.fold_in", got={"data": data})
        word: Any = pr.tensor(data, "fold_in", UINT32)
    else:
        word = _const(operator.index(data) % (1 << 32), k0)
    with named_scope("fold_in"):
        return random_bits(ew.bitwise_xor(k0, word), _xor(k1, _FOLD), shape=(2,))


# -- bits and integers -----------------------------------------------------------------------------


def bits(key: Any, shape: Any = (), dtype: Any = np.uint32) -> Any:
    """Uniform random bits of an unsigned dtype."""
    found, sizes = canonical(dtype, op="random.bits"), shape_argument(shape, "bits")
    if found.kind != "u":
        raise DTypeError.make(f"bits come as unsigned integers, not {found}", op="random.bits")
    k0, k1 = _words(key, "bits")
    if found.itemsize <= 4:
        words = random_bits(k0, k1, shape=sizes)
        return words if found == UINT32 else ew.convert(words, dtype=found)
    high, low = (ew.convert(w, dtype=found) for w in _two_words(k0, k1, sizes))
    return ew.bitwise_or(ew.left_shift(high, _const(32, high)), low)


def _two_words(k0: Any, k1: Any, shape: Shape) -> tuple[Any, Any]:
    """Two independent words per element: positions 0 … n-1 and n … 2n-1 of the key's sequence."""
    words = random_bits(k0, k1, shape=(2, *shape))
    rest = len(shape)
    return tuple(
        ops.reshape(
            ops.slice_(words, start=(i, *(0,) * rest), stop=(i + 1, *shape), step=(1,) * (rest + 1)),
            shape=shape,
        )
        for i in (0, 1)
    )


def _multiply_words(x: Any, y: Any) -> tuple[Any, Any]:
    """High and low word of the 64-bit product of uint32 arrays, in uint32 arithmetic only."""
    half, mask = _const(16, x), _const(0xFFFF, x)
    (xh, yh), (xl, yl) = (ew.right_shift(v, half) for v in (x, y)), (ew.bitwise_and(v, mask) for v in (x, y))
    low, mid1, mid2 = ew.mul(xl, yl), ew.mul(xh, yl), ew.mul(xl, yh)
    carry = ew.add(ew.add(ew.right_shift(low, half), ew.bitwise_and(mid1, mask)), ew.bitwise_and(mid2, mask))
    high = ew.add(
        ew.add(ew.mul(xh, yh), ew.right_shift(mid1, half)),
        ew.add(ew.right_shift(mid2, half), ew.right_shift(carry, half)),
    )
    return high, ew.mul(x, y)


def randint(key: Any, shape: Any, minval: Any, maxval: Any, dtype: Any = np.int32) -> Any:
    """Integers, uniform on ``minval <= y < maxval`` (arrays broadcast to ``shape``); the range is at most
    2**32 wide.

    ``⌊b · span / 2⁶⁴⌋`` for 64 random bits ``b``: no value is more likely than another by more than span /
    2⁶⁴.
    """
    found, sizes = canonical(dtype, op="random.randint"), shape_argument(shape, "randint")
    if found.kind not in "iu":
        raise DTypeError.make(f"integers are needed, not {found}", op="random.randint")
    k0, k1 = _words(key, "randint")
    if not pr.any_tensor(minval, maxval):
        widths = np.asarray(maxval).astype(object) - np.asarray(minval).astype(object)
        if np.any(widths <= 0):
            raise ShapeError.make(
                "maxval must be greater than minval",
                op="random.randint",
                got={"minval": minval, "maxval": maxval},
            )
        info = np.iinfo(found)
        if np.any(widths > 1 << 32) or np.min(minval) < info.min or np.max(maxval) - 1 > info.max:
            raise DTypeError.make(
                f"[{minval}, {maxval}) does not fit {found} or is wider than 2**32", op="random.randint"
            )
        span = np.asarray(widths % (1 << 32)).astype(np.uint32)
        low: Any = np.asarray(minval).astype(found)
    else:
        low, high = (pr.tensor(v, "randint", INT64) for v in (minval, maxval))
        low, high = pr.broadcast("randint", low, high)
        span, low = ew.convert(ew.sub(high, low), dtype=UINT32), ew.convert(low, dtype=found)
    with named_scope("randint"):
        first, second = _two_words(k0, k1, sizes)
        wide = ops.broadcast_to(_in_trace(span), shape=sizes)
        high_word, low_word = _multiply_words(first, wide)
        extra, _ = _multiply_words(second, wide)
        total = ew.add(low_word, extra)
        carry = ew.convert(ew.less(total, extra), dtype=UINT32)
        whole = ew.equal(wide, _const(0, wide))  # a span of 2**32 is 0 in uint32
        offset = ew.where(whole, first, ew.add(high_word, carry))
        start = ops.broadcast_to(_in_trace(low), shape=sizes)
        return ew.add(ew.convert(offset, dtype=found), start)


def _in_trace(value: Any) -> Any:
    """A concrete parameter as an operand: a constant of the graph while tracing."""
    if isinstance(value, Tensor) or current_context() is None:
        return value
    array = np.asarray(value)
    return pr.tensor(array[()] if array.ndim == 0 else array.tolist(), "random", array.dtype)


def permutation(key: Any, x: Any, axis: int = 0) -> Any:
    """``arange(x)`` (int64) in random order for an integer ``x``, else ``x`` with its slices along ``axis``
    shuffled."""
    whole = not is_arraylike(x) or (x.ndim == 0)
    n = operator.index(x) if whole else x.shape[normalize_axis(axis, x.ndim, "random.permutation")]
    if n < 0:
        raise ShapeError.make(f"cannot permute {n} elements", op="random.permutation")
    _words(key, "permutation")
    with named_scope("permutation"):
        order: Any = None
        # Sorting by 32-bit numbers is fair up to ties; further rounds make those negligible (as jax.random
        # does).
        for i in range(max(1, math.ceil(3 * math.log(max(n, 2)) / math.log(2**32 - 1)))):
            k0, k1 = _words(key if i == 0 else fold_in(key, i), "permutation")
            rank = ordering.argsort(random_bits(k0, k1, shape=(n,)), axis=0)
            order = rank if order is None else op("take")(order, rank, axis=0)
        return order if whole else take(x, order, normalize_axis(axis, x.ndim, "random.permutation"))


# -- real numbers ----------------------------------------------------------------------------------


def _float(dtype: Any, name: str) -> DType:
    found = canonical(dtype, op=f"random.{name}")
    if found.kind != "f":
        raise DTypeError.make(f"a float dtype is needed, not {found}", op=f"random.{name}")
    return found


def _fraction(key: Any, shape: Shape, dtype: DType, name: str) -> tuple[Any, int]:
    """Whole numbers ``0 <= k < 2**bits``, exact in ``dtype``, and ``bits`` (11, 24 or 53)."""
    k0, k1 = _words(key, name)
    if dtype != FLOAT64:
        count = 24 if dtype == FLOAT32 else 11
        words = random_bits(k0, k1, shape=shape)
        return ew.convert(ew.right_shift(words, _const(32 - count, words)), dtype=dtype), count
    high, low = _two_words(k0, k1, shape)
    low = ew.right_shift(low, _const(11, low))
    high, low = ew.convert(high, dtype=dtype), ew.convert(low, dtype=dtype)
    return ew.add(ew.mul(high, _const(2.0**21, high)), low), 53


def uniform(key: Any, shape: Any = (), dtype: Any = np.float32, low: Any = 0.0, high: Any = 1.0) -> Any:
    """Uniform on ``low <= y < high`` (which broadcast to ``shape``): 24 random bits in float32, 53 in
    float64."""
    found, sizes = _float(dtype, "uniform"), shape_argument(shape, "uniform")
    with named_scope("uniform"):
        whole, count = _fraction(key, sizes, found, "uniform")
        unit = ew.mul(whole, _const(2.0**-count, whole))
        plain = not pr.any_tensor(low, high) and np.ndim(low) == np.ndim(high) == 0
        if plain and low == 0 and high == 1:
            return unit
        start, end = (_parameter(v, unit, "uniform") for v in (low, high))
        scaled = ew.add(ew.mul(unit, ew.sub(end, start)), start)
        if plain:  # rounding may reach ``high``, which does not belong to the interval
            last = np.nextafter(found.type(high), found.type(low))
            return ew.minimum(scaled, _const(last.item(), scaled)) if low < high else scaled
        return scaled


def _parameter(value: Any, like: Any, name: str) -> Any:
    """A parameter of a distribution in the dtype and shape of the samples."""
    shape = tuple(like.shape)
    if isinstance(like, Tensor) or isinstance(value, Tensor):
        return pr.broadcast_to(pr.tensor(value, name, like.dtype), shape)
    return np.broadcast_to(np.asarray(value, like.dtype), shape)


def normal(key: Any, shape: Any = (), dtype: Any = np.float32) -> Any:
    """Standard normal: the inverse distribution function of a uniform number, so one number per element.

    float32 and float16 by Giles, "Approximating the erfinv function" (GPU Computing Gems 2012); float64 by
    Wichura's algorithm AS 241, "The percentage points of the normal distribution" (1988).
    """
    found, sizes = _float(dtype, "normal"), shape_argument(shape, "normal")
    with named_scope("normal"):
        inner = FLOAT64 if found == FLOAT64 else FLOAT32
        whole, count = _fraction(key, sizes, inner, "normal")
        # The centres of 2**count equal cells of (-1/2, 1/2): exact, symmetric, never at an end.
        centred = ew.add(ew.sub(whole, _const(2.0 ** (count - 1), whole)), _const(0.5, whole))
        q = ew.mul(centred, _const(2.0**-count, whole))
        y = _normal_quantile64(q) if inner == FLOAT64 else _normal_quantile32(q)
        return y if found == inner else ew.convert(y, dtype=found)


def _polynomial(x: Any, coefficients: tuple[float, ...]) -> Any:
    """Horner's scheme, highest power first."""
    y = _const(coefficients[0], x)
    for c in coefficients[1:]:
        y = ew.add(ew.mul(y, x), _const(c, x))
    return y


_GILES_CENTRE = (
    2.81022636e-08, 3.43273939e-07, -3.5233877e-06, -4.39150654e-06, 0.00021858087, -0.00125372503,
    -0.00417768164, 0.246640727, 1.50140941,
)  # fmt: skip
_GILES_TAIL = (
    -0.000200214257, 0.000100950558, 0.00134934322, -0.00367342844, 0.00573950773, -0.0076224613,
    0.00943887047, 1.00167406, 2.83297682,
)  # fmt: skip


def _normal_quantile32(q: Any) -> Any:
    """The standard normal quantile of q + 1/2 to about 1e-6: √2 · erfinv(2q)."""
    x = ew.add(q, q)
    w = _minus_log(ew.mul(ew.sub(_const(1.0, x), x), ew.add(_const(1.0, x), x)))
    centre = _polynomial(ew.sub(w, _const(2.5, w)), _GILES_CENTRE)
    tail = _polynomial(ew.sub(op("sqrt")(w), _const(3.0, w)), _GILES_TAIL)
    scaled = ew.mul(x, _const(math.sqrt(2.0), x))
    return ew.mul(scaled, ew.where(ew.less(w, _const(5.0, w)), centre, tail))


#: log(1 + t) = t - t²/2 + t³ P(t)/Q(t) for 1 + t between √½ and √2: Cephes, logf.c and log.c (Moshier 1989).
_LOG32 = (
    7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1, -1.6668057665e-1,
    2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1,
)  # fmt: skip
_LOG64 = (
    (1.01875663804580931796e-4, 4.97494994976747001425e-1, 4.70579119878881725854, 1.44989225341610930846e1,
     1.79368678507819816313e1, 7.70838733755885391666),
    (1.0, 1.12873587189167450590e1, 4.52279145837532221105e1, 8.29875266912776603211e1, 7.11544750618563894466e1,
     2.31251620126765340583e1),
)  # fmt: skip


def _minus_log(u: Any) -> Any:
    """-log(u) for u in [2**-63, 1], from operations that round alike everywhere, which libraries' logarithms do not."""
    exponent = _const(0.0, u)
    for s in (32, 16, 8, 4, 2, 1):
        small = ew.less(u, _const(2.0**-s, u))
        u = ew.where(small, ew.mul(u, _const(2.0**s, u)), u)
        exponent = ew.where(small, ew.add(exponent, _const(float(s), u)), exponent)
    small = ew.less(u, _const(math.sqrt(0.5), u))
    t = ew.sub(ew.where(small, ew.add(u, u), u), _const(1.0, u))
    exponent = ew.where(small, ew.add(exponent, _const(1.0, u)), exponent)
    square = ew.mul(t, t)
    if u.dtype == FLOAT64:
        series = ew.div(_polynomial(t, _LOG64[0]), _polynomial(t, _LOG64[1]))
    else:
        series = _polynomial(t, _LOG32)
    rest = ew.sub(ew.mul(ew.mul(t, square), series), ew.mul(square, _const(0.5, u)))
    # log 2 in two parts, so that the first product is exact.
    low = ew.sub(ew.mul(exponent, _const(-2.121944400546905827679e-4, u)), rest)
    return ew.add(ew.mul(exponent, _const(0.693359375, u)), ew.sub(low, t))


_AS241 = (
    (
        (2.5090809287301226727e3, 3.3430575583588128105e4, 6.7265770927008700853e4, 4.5921953931549871457e4,
         1.3731693765509461125e4, 1.9715909503065514427e3, 1.3314166789178437745e2, 3.387132872796366608),
        (5.226495278852854561e3, 2.8729085735721942674e4, 3.930789580009271061e4, 2.1213794301586595867e4,
         5.3941960214247511077e3, 6.871870074920579083e2, 4.2313330701600911252e1, 1.0),
    ),
    (
        (7.7454501427834140764e-4, 2.27238449892691845833e-2, 2.4178072517745061177e-1,
        1.27045825245236838258,
         3.64784832476320460504, 5.7694972214606914055, 4.6303378461565452959, 1.42343711074968357734),
        (1.05075007164441684324e-9, 5.475938084995344946e-4, 1.51986665636164571966e-2,
        1.4810397642748007459e-1,
         6.8976733498510000455e-1, 1.6763848301838038494, 2.05319162663775882187, 1.0),
    ),
    (
        (2.01033439929228813265e-7, 2.71155556874348757815e-5, 1.2426609473880784386e-3,
        2.6532189526576123093e-2,
         2.9656057182850489123e-1, 1.7848265399172913358, 5.4637849111641143699, 6.6579046435011037772),
        (2.04426310338993978564e-15, 1.4215117583164458887e-7, 1.8463183175100546818e-5,
        7.868691311456132591e-4,
         1.48753612908506148525e-2, 1.3692988092273580531e-1, 5.9983220655588793769e-1, 1.0),
    ),
)  # fmt: skip


def _normal_quantile64(q: Any) -> Any:
    """The standard normal quantile of q + 1/2 to about 1e-15 (Wichura's PPND16)."""

    def ratio(x: Any, part: int) -> Any:
        return ew.div(_polynomial(x, _AS241[part][0]), _polynomial(x, _AS241[part][1]))

    size = op("abs")(q)
    centre = ew.mul(q, ratio(ew.sub(_const(0.180625, q), ew.mul(q, q)), 0))
    r = op("sqrt")(_minus_log(ew.sub(_const(0.5, q), size)))
    near, far = ratio(ew.sub(r, _const(1.6, r)), 1), ratio(ew.sub(r, _const(5.0, r)), 2)
    tail = ew.mul(op("sign")(q), ew.where(ew.less_equal(r, _const(5.0, r)), near, far))
    return ew.where(ew.less_equal(size, _const(0.425, q)), centre, tail)


def exponential(key: Any, shape: Any = (), dtype: Any = np.float32) -> Any:
    """Exponential with mean one: ``-log(1 - u)`` of a uniform number."""
    found, sizes = _float(dtype, "exponential"), shape_argument(shape, "exponential")
    with named_scope("exponential"):
        whole, count = _fraction(key, sizes, found, "exponential")
        unit = ew.mul(whole, _const(2.0**-count, whole))
        return ew.neg(op("log1p")(ew.neg(unit)))


def gumbel(key: Any, shape: Any = (), dtype: Any = np.float32) -> Any:
    """Standard Gumbel: ``-log(-log(u))`` of a uniform number strictly between 0 and 1."""
    found, sizes = _float(dtype, "gumbel"), shape_argument(shape, "gumbel")
    with named_scope("gumbel"):
        inner = FLOAT32 if found.itemsize == 2 else found
        whole, count = _fraction(key, sizes, inner, "gumbel")
        # Cell centres; half a cell is lost to rounding in the upper half, so stay below one explicitly.
        unit = ew.mul(ew.add(whole, _const(0.5, whole)), _const(2.0**-count, whole))
        unit = ew.minimum(unit, _const(1.0 - 2.0**-count, unit))
        y = ew.neg(op("log")(ew.neg(op("log")(unit))))
        return y if inner == found else ew.convert(y, dtype=found)


# -- choices ---------------------------------------------------------------------------------------


def bernoulli(key: Any, p: Any = 0.5, shape: Any = None) -> Any:
    """True with probability ``p`` (which broadcasts to ``shape``, by default its own)."""
    sizes = tuple(pr.shape_of(p, "bernoulli")) if shape is None else shape_argument(shape, "bernoulli")
    dtype = FLOAT64 if is_arraylike(p) and p.dtype == FLOAT64 and not pr.is_weak(p) else FLOAT32
    with named_scope("bernoulli"):
        unit = uniform(key, sizes, dtype)
        return ew.less(unit, _parameter(p, unit, "bernoulli"))


def categorical(key: Any, logits: Any, axis: int = -1, shape: Any = None) -> Any:
    """Indices (int64) drawn with probabilities ``softmax(logits)`` along ``axis``, by the Gumbel-max trick.

    ``shape`` is the result's; it ends with the shape of ``logits`` without ``axis`` (its default).
    """
    x = logits if is_arraylike(logits) else np.asarray(logits)
    if x.dtype.kind != "f":
        x = np.asarray(x, np.float32) if not isinstance(x, Tensor) else pr.tensor(x, "categorical", FLOAT32)
    axis = normalize_axis(axis, x.ndim, "random.categorical")
    x = moveaxis(x, axis, -1)
    batch = tuple(x.shape[:-1])
    sizes = batch if shape is None else shape_argument(shape, "categorical")
    if len(sizes) < len(batch) or sizes[len(sizes) - len(batch) :] != batch:
        raise ShapeError.make(
            f"shape {sizes} must end with {batch}, the shape of the logits without the axis",
            op="random.categorical",
        )
    with named_scope("categorical"):
        noise = gumbel(key, (*sizes, x.shape[-1]), x.dtype)
        return argmax(ew.add(noise, _parameter(x, noise, "categorical")), -1)


__all__ = [
    "bernoulli",
    "bits",
    "categorical",
    "exponential",
    "fold_in",
    "gumbel",
    "key",
    "normal",
    "permutation",
    "randint",
    "split",
    "uniform",
]
