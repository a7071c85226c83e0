"""JIT traps around state: mutation, aliasing, leaks, exceptions, threads, recursion, generators."""

from __future__ import annotations

import threading
import traceback
import warnings

import numpy as np
import pytest

import tracejit as tj
from tracejit.config import set_log

X = np.arange(6, dtype=np.float32).reshape(2, 3)


def test_mutating_an_input_after_the_call_leaves_the_result_alone() -> None:
    @tj.trace
    def f(x):
        return x.T, x.reshape(-1), x

    x = X.copy()
    a, b, c = f(x)
    x[:] = -1
    np.testing.assert_array_equal(a, X.T)
    np.testing.assert_array_equal(b, X.reshape(-1))
    np.testing.assert_array_equal(c, X)


def test_mutating_a_result_leaves_the_input_and_later_results_alone() -> None:
    @tj.trace
    def f(x):
        return x + 0, x.reshape(3, 2)

    x = X.copy()
    a, b = f(x)
    a[:] = 99
    b[:] = 98
    np.testing.assert_array_equal(x, X)
    a2, b2 = f(x)
    np.testing.assert_array_equal(a2, X)
    np.testing.assert_array_equal(b2, X.reshape(3, 2))


def test_results_of_successive_calls_do_not_share_memory() -> None:
    @tj.trace
    def f(x):
        return x * 2

    first = f(X)
    second = f(X + 1)
    np.testing.assert_array_equal(first, X * 2)
    assert not np.shares_memory(first, second)


def test_a_constant_result_is_fresh_each_time() -> None:
    @tj.trace
    def f(x):
        return np.zeros_like(x)

    first = f(X)
    first[:] = 7
    np.testing.assert_array_equal(f(X), np.zeros_like(X))


def test_the_same_tensor_returned_twice_gives_independent_arrays() -> None:
    @tj.trace
    def f(x):
        y = x + 1
        return y, y

    a, b = f(X)
    a[:] = 0
    np.testing.assert_array_equal(b, X + 1)


def test_aliasing_inputs_are_read_correctly() -> None:
    @tj.trace
    def f(a, b):
        return a + b, a - b

    x = X.copy()
    s, d = f(x, x)
    np.testing.assert_array_equal(s, X * 2)
    np.testing.assert_array_equal(d, X * 0)
    s, d = f(x, x[:, ::-1])
    np.testing.assert_array_equal(s, X + X[:, ::-1])


def test_feeding_results_back_in_is_safe() -> None:
    @tj.trace
    def step(w, v):
        return w + v, v * 0.5

    w, v = np.zeros(4, np.float32), np.ones(4, np.float32)
    for _ in range(20):
        w, v = step(w, v)
    np.testing.assert_allclose(w, 2.0, rtol=1e-5)


def test_item_assignment_is_refused_with_advice() -> None:
    @tj.trace
    def f(x):
        x[0] = 0
        return x

    with pytest.raises(tj.TracingError, match=r"(?s)assigned.*test_state_and_errors.py:\d+.*where"):
        f(X)


def test_a_leaked_tensor_names_the_line_that_made_it() -> None:
    leaked = []

    @tj.trace
    def f(x):
        y = x * 2
        leaked.append(y)
        return y

    f(X)
    with pytest.raises(tj.LeakedTensorError, match=r"made by line .*test_state_and_errors.py:\d+"):
        leaked[0] + 1
    with pytest.raises(tj.LeakedTensorError):
        bool(leaked[0].sum() > 0)


def test_a_tensor_of_one_trace_cannot_enter_another() -> None:
    leaked = []

    @tj.trace
    def f(x):
        leaked.append(x)
        return x

    @tj.trace
    def g(x):
        return x + leaked[0]

    f(X)
    with pytest.raises(tj.LeakedTensorError):
        g(X)


def test_an_exception_while_tracing_leaves_the_cache_clean() -> None:
    fail = [True]

    @tj.trace
    def f(x, mode="a"):
        if fail[0]:
            raise KeyError("mine")
        return x + 1

    with pytest.raises(KeyError, match="mine"):
        f(X)
    assert f.cache_info() == (0, 0, 128, 0)
    fail[0] = False
    np.testing.assert_array_equal(f(X), X + 1)


def test_keyboard_interrupt_while_tracing_leaves_everything_usable() -> None:
    interrupt = [True]

    @tj.trace
    def f(x):
        y = x + 1
        if interrupt[0]:
            raise KeyboardInterrupt
        return y

    with pytest.raises(KeyboardInterrupt):
        f(X)
    interrupt[0] = False
    np.testing.assert_array_equal(f(X), X + 1)
    np.testing.assert_array_equal(np.tanh(X), np.tanh(X))


def test_data_dependent_if_shows_the_line_and_the_chain() -> None:
    @tj.trace
    def f(x):
        total = x.sum()
        if total > 0:
            return x
        return -x

    with pytest.raises(tj.ConcretizationError) as info:
        f(X)
    message = str(info.value)
    assert "test_state_and_errors.py" in message
    for word in ("greater", "sum", "tj.where", "tj.cond"):
        assert word in message


def test_data_dependent_loop_count_is_explained() -> None:
    @tj.trace
    def f(x, n):
        for _ in range(n[0]):
            x = x + 1
        return x

    with pytest.raises(tj.ConcretizationError, match=r"scan"):
        f(X, np.array([3]))


def test_tracebacks_show_the_user_not_the_machinery() -> None:
    @tj.trace
    def f(x):
        return x @ x

    with pytest.raises(tj.ShapeError) as info:
        f(X)
    own = [f for f in traceback.extract_tb(info.value.__traceback__) if "/tracejit/" in f.filename]
    assert len(own) <= 1, own
    assert any(f.name == "f" for f in traceback.extract_tb(info.value.__traceback__))


def test_errors_name_op_operands_and_line() -> None:
    @tj.trace
    def f(x, w):
        return x @ w

    with pytest.raises(tj.ShapeError) as info:
        f(X, np.ones((4, 5), np.float32))
    message = str(info.value)
    assert "matmul" in message and "f32[2,3]" in message and "f32[4,5]" in message
    assert "test_state_and_errors.py" in message


def test_threads_calling_at_once_trace_once_and_get_right_results() -> None:
    @tj.trace
    def f(x, k):
        return np.tanh(x * k).sum()

    results: dict[int, float] = {}
    start = threading.Barrier(8)

    def run(i: int) -> None:
        start.wait()
        for _ in range(20):
            results[i] = float(f(X, float(i)))

    threads = [threading.Thread(target=run, args=(i,)) for i in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for i in range(8):
        assert results[i] == pytest.approx(float(np.tanh(X * i).sum()), rel=1e-5)
    assert f.cache_info().misses == 1


def test_endless_recursion_is_explained() -> None:
    @tj.trace
    def f(x):
        return f(x) + 1

    with pytest.raises(tj.TracingError, match="calls itself") as info:
        f(X)
    assert len(str(info.value)) < 400


def test_recursion_that_ends_on_a_python_value_works() -> None:
    @tj.trace
    def power(x, n):
        return x if n == 1 else x * power(x, n - 1)

    np.testing.assert_allclose(power(X, 4), X**4)


def test_nested_traced_functions_become_one_graph() -> None:
    @tj.trace
    def inner(x):
        return np.exp(x)

    @tj.trace
    def outer(x):
        return inner(x) * 2

    np.testing.assert_allclose(outer(X), np.exp(X) * 2, rtol=1e-6)
    assert inner.cache_info().misses == 0
    assert "inner" in str(outer.graph(X))


def test_generator_functions_are_refused() -> None:
    with pytest.raises(tj.TracingError, match="generator"):

        @tj.trace
        def f(x):
            yield x


def test_returning_a_generator_is_refused() -> None:
    @tj.trace
    def f(x):
        return (x + i for i in range(3))

    with pytest.raises(tj.TracingError, match="generator"):
        f(X)


def test_side_effects_happen_while_tracing_only() -> None:
    calls = []

    @tj.trace
    def f(x):
        calls.append(x.shape)
        return x + 1

    f(X)
    f(X)
    assert calls == [(2, 3)]


def test_disable_jit_runs_plain_python() -> None:
    seen = []

    @tj.trace
    def f(x):
        seen.append(type(x))
        if x.sum() > 0:
            return x * 2
        return x

    with tj.disable_jit():
        np.testing.assert_array_equal(f(X), X * 2)
    assert seen == [np.ndarray]


def test_changing_the_batch_retraces_and_stays_right() -> None:
    @tj.trace
    def f(x):
        return x.mean(axis=0)

    for n in (4, 8, 4, 3):
        x = np.random.default_rng(n).normal(size=(n, 5))
        np.testing.assert_allclose(f(x), x.mean(axis=0))
    assert f.cache_info().misses == 3


def test_the_cache_is_bounded_and_drops_the_oldest() -> None:
    @tj.trace(cache_size=2)
    def f(x):
        return x + 1

    for n in (1, 2, 3):
        f(np.zeros(n))
    assert f.cache_info().currsize == 2
    f(np.zeros(3))
    assert f.cache_info().hits == 1
    f(np.zeros(1))
    assert f.cache_info().misses == 4


def test_cache_clear_forgets_everything() -> None:
    @tj.trace
    def f(x):
        return x + 1

    f(X)
    f.cache_clear()
    assert f.cache_info() == (0, 0, 128, 0)


def test_a_retrace_storm_warns_once_and_names_the_dimension() -> None:
    @tj.trace
    def f(x):
        return x + 1

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for n in range(1, 40):
            f(np.zeros(n, np.float32))
    storms = [w for w in caught if issubclass(w.category, tj.RetraceWarning)]
    assert len(storms) == 1
    assert "dimension 0" in str(storms[0].message)


def test_retraces_are_explained_on_request(capsys: pytest.CaptureFixture[str]) -> None:
    @tj.trace
    def f(params, n):
        return params["w"].reshape(n, -1)

    set_log("retrace")
    try:
        f({"w": np.zeros((2, 6), np.float32)}, 2)
        f({"w": np.zeros((4, 6), np.float32)}, 2)
        f({"w": np.zeros((4, 6), np.float64)}, 2)
        f({"w": np.zeros((4, 6), np.float64)}, 3)
    finally:
        set_log("")
    lines = capsys.readouterr().err.splitlines()
    assert "params['w']" in lines[0] and "dimension 0 from 2 to 4" in lines[0]
    assert "f32[4,6] -> f64[4,6]" in lines[1]
    assert "argument n was used as the Python value 2" in lines[2] and "now 3" in lines[2]


def test_a_scalar_and_a_0d_array_are_not_confused() -> None:
    @tj.trace
    def f(x, s):
        return x * s

    assert f(X, 2.0).dtype == np.float32
    assert f(X, np.float64(2.0)).dtype == np.float64
    assert f(X, np.array(2.0)).dtype == np.float64
    assert f(X, np.float32(2.0)).dtype == np.float32


def test_print_of_a_tensor_describes_it_instead_of_crashing() -> None:
    texts = []

    @tj.trace
    def f(x):
        texts.append(f"{x}")
        return x + 1

    f(X)
    assert "f32[2,3]" in texts[0]


def test_tensors_are_not_hashable_like_arrays() -> None:
    @tj.trace
    def f(x):
        return {x: 1}[x]

    with pytest.raises(TypeError, match="unhashable"):
        f(X)


def test_numpy_out_argument_is_refused() -> None:
    @tj.trace
    def f(x):
        return np.add(x, 1, out=np.zeros((2, 3), np.float32))

    with pytest.raises(tj.TraceError, match="out"):
        f(X)
