"""The call path of the native CPU backend: what is allocated, what is copied, what is shared."""

from __future__ import annotations

import gc
import tracemalloc
import weakref

import numpy as np
import pytest

import tracejit as tj
from tracejit_cpu import entry

needs_entry = pytest.mark.skipif(
    not entry.available(), reason="this interpreter lays out objects in another way: calls go through Python"
)


def double(dtype=np.float32, shape=(300, 50)):
    """A traced function, an argument, the right answer."""
    f = tj.trace(lambda x: x * 2 + 1, device="cpu")
    x = np.arange(np.prod(shape), dtype=dtype).reshape(shape)
    return f, x, x * 2 + 1


def python_calls(f, *args):
    """Make the executable's Python path count its calls; returns the list of them."""
    executable = f._entry_for(args, {})[0].executable
    calls = []
    plain = type(executable)._execute

    class Counting(type(executable)):
        def _execute(self, *inner):
            calls.append(1)
            return plain(self, *inner)

    executable.__class__ = Counting
    return calls


# -- results ------------------------------------------------------------------------------------------------------


@needs_entry
def test_memory_of_dead_results_is_used_again():
    f, x, want = double()
    places = set()
    for _ in range(10):
        result = f(x)
        np.testing.assert_array_equal(result, want)
        places.add(result.ctypes.data)
        del result
    assert len(places) <= 2


@needs_entry
def test_a_warm_call_allocates_no_arrays():
    f, x, _ = double()
    for _ in range(4):
        f(x)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(20):
            f(x)
        assert (
            tracemalloc.get_traced_memory()[1] - before < x.nbytes // 4
        )  # NumPy reports its buffers to tracemalloc
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("holder", ["array", "view", "memoryview", "weakref", "list"])
def test_a_result_that_is_still_reachable_is_not_overwritten(holder):
    f, x, want = double()
    kept = {
        "array": lambda a: a,
        "view": lambda a: a[3:5],
        "memoryview": memoryview,
        "weakref": weakref.ref,
        "list": lambda a: [a],
    }[holder](f(x))
    gc.collect()
    for _ in range(6):
        f(x * 0)
    now = kept[0] if holder == "list" else kept() if holder == "weakref" else kept
    if now is None:
        return
    now = np.asarray(now)
    np.testing.assert_array_equal(now, want[3:5] if holder == "view" else want)


@pytest.mark.filterwarnings("ignore:Setting the (shape|dtype) on a NumPy array")  # from NumPy 2.5 on
@pytest.mark.parametrize(
    "change",
    [
        lambda a: a.setflags(write=False),
        lambda a: setattr(a, "shape", (50, 300)),
        lambda a: setattr(a, "dtype", np.dtype(np.int32)),
        lambda a: a.resize((10, 10), refcheck=False),
    ],
    ids=["read-only", "reshaped", "retyped", "resized"],
)
def test_a_result_changed_by_its_user_is_not_handed_out_again(change):
    f, x, want = double()
    for _ in range(8):
        result = f(x)
        assert result.shape == want.shape and result.dtype == want.dtype and result.flags.writeable
        np.testing.assert_array_equal(result, want)
        change(result)
        del result


def test_results_are_never_the_memory_of_arguments_or_of_each_other():
    f = tj.trace(lambda x, y: (x, x, x.reshape(-1), y[:], x + 0, (x + 1, x + 1)), device="cpu")
    x, y = np.ones((4, 8), np.float32), np.ones(5, np.float32)
    a, b, c, d, e, (g, h) = f(x, y)
    results = [a, b, c, d, e, g, h]
    for i, r in enumerate(results):
        assert not np.shares_memory(r, x) and not np.shares_memory(r, y)
        assert not any(np.shares_memory(r, other) for other in results[:i])
        r[...] = -7
    assert (x == 1).all() and (y == 1).all()


def test_constants_are_not_handed_out():
    table = np.arange(5.0)
    f = tj.trace(lambda x: (np.zeros(3) + 1, x * 0 + np.arange(5.0)), device="cpu")
    for _ in range(3):
        ones, steps = f(table)
        np.testing.assert_array_equal(ones, [1, 1, 1])
        np.testing.assert_array_equal(steps, np.arange(5.0))
        ones[...] = steps[...] = 9


# -- arguments ----------------------------------------------------------------------------------------------------


def test_arguments_are_not_changed_even_when_they_could_be_updated_in_place():
    f = tj.trace(lambda p, g: (p - 0.1 * g, g * 0), device="cpu")
    p, g = np.ones((64, 64), np.float32), np.full((64, 64), 2, np.float32)
    for _ in range(3):
        f(p, g)
    assert (p == 1).all() and (g == 2).all()
    p.setflags(write=False)
    f(p, g)


@needs_entry
def test_plain_arguments_do_not_go_through_python():
    f, x, want = double()
    f(x)
    calls = python_calls(f, x)
    np.testing.assert_array_equal(f(x), want)
    fortran = np.asfortranarray(x)  # copied, then native too
    np.testing.assert_array_equal(f(fortran), want)
    assert not calls


def _unaligned(x):
    raw = np.empty(x.nbytes + 1, np.uint8)
    out = raw[1:].view(x.dtype).reshape(x.shape)
    out[...] = x
    return out


@pytest.mark.parametrize(
    "form",
    [
        np.asfortranarray,
        lambda x: np.repeat(x, 2, axis=1)[:, ::2],
        lambda x: x[::-1][::-1],
        lambda x: np.broadcast_to(x, x.shape),
        _unaligned,
        lambda x: x.astype(x.dtype.newbyteorder()),
        lambda x: x.view(np.dtype(x.dtype.str)),
        lambda x: x.view(type("Sub", (np.ndarray,), {})),
        lambda x: np.frombuffer(x.tobytes(), x.dtype).reshape(x.shape),
    ],
    ids=[
        "fortran",
        "strided",
        "flipped",
        "broadcast",
        "unaligned",
        "swapped",
        "dtype",
        "subclass",
        "read-only",
    ],
)
def test_unusual_arguments(form):
    f, x, want = double()
    f(x)
    y = form(x)
    before = np.array(y, copy=True)
    for _ in range(3):
        np.testing.assert_array_equal(f(y), want)
    np.testing.assert_array_equal(np.asarray(y), before)


def test_one_argument_twice_and_an_argument_that_is_a_result():
    f = tj.trace(lambda a, b: a + 2 * b, device="cpu")
    x = np.ones((40, 40), np.float32)
    np.testing.assert_array_equal(f(x, x), 3 * x)
    for _ in range(5):
        x = f(x, x)
    np.testing.assert_array_equal(x, np.full((40, 40), 3.0**5, np.float32))


def test_numbers_and_numpy_scalars_stay_on_the_fast_path(monkeypatch):
    f = tj.trace(lambda x, s, n: x * s + n, device="cpu")
    x = np.ones(10, np.float32)
    calls = [(x, 2.0, 3), (x, np.float32(2), np.int32(3)), (x, np.array(2.0), np.int64(3))]
    want = [f(*c) for c in calls for _ in range(3)][::3]
    monkeypatch.setattr(type(f), "_general", lambda *_: pytest.fail("left the fast path"))
    for c, w in zip(calls, want):
        got = f(*c)
        assert got.dtype == w.dtype
        np.testing.assert_array_equal(got, w)
    np.testing.assert_array_equal(f(x, 5.0, -1), np.full(10, 4, np.float32))


def test_a_device_per_call_stays_on_the_fast_path(monkeypatch):
    f = tj.trace(lambda x: x + 1)
    x = np.ones(4)
    for d in ("cpu", "numpy") * 3:
        f(x, device=d)
    monkeypatch.setattr(type(f), "_general", lambda *_: pytest.fail("left the fast path"))
    for d in ("cpu", "numpy"):
        np.testing.assert_array_equal(f(x, device=d), x + 1)


# -- programs with steps in Python --------------------------------------------------------------------------------


def test_programs_with_python_steps_keep_their_memory_and_results():
    @tj.trace(device="cpu")
    def f(x):
        total = tj.while_loop(lambda s: s.sum() < 1000, lambda s: s * 2, x)
        return np.tanh(total / 1000) + total

    x = np.linspace(0, 1, 4000, dtype=np.float32).reshape(40, 100)
    first = f(x).copy()
    executable = f._entry_for((x,), {})[0].executable
    assert executable._entry is None
    places = set()
    for _ in range(6):
        r = f(x)
        places.add(r.ctypes.data)
        np.testing.assert_array_equal(r, first)
        del r
    assert len(places) <= 2 and len(executable._spare) == 1
