"""The gate that makes ``os.fork`` wait for threads that trace or compile."""

from __future__ import annotations

import os
import threading
import time

import pytest

from tracejit import forking

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system"),
    pytest.mark.filterwarnings(
        "ignore:.*fork:DeprecationWarning"
    ),  # from Python 3.12 on, when there are threads
]


def fork() -> None:
    """Fork, and see that the child can pass the gate."""
    child = os.fork()
    if child == 0:
        with forking.gate:
            os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def hold(seconds: float) -> threading.Thread:
    """A thread that is inside the gate for that long."""
    inside = threading.Event()

    def work() -> None:
        with forking.gate, forking.gate:
            inside.set()
            time.sleep(seconds)

    thread = threading.Thread(target=work)
    thread.start()
    assert inside.wait(10)
    return thread


def test_a_fork_waits_for_the_others_and_not_for_itself() -> None:
    thread = hold(0.2)
    with forking.gate:
        fork()
        assert not forking.gate._inside.keys() - {threading.get_ident()}
    thread.join()
    fork()


def test_a_fork_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forking, "PATIENCE", 0.05)
    thread = hold(0.5)
    fork()
    assert thread.is_alive()
    thread.join()


def test_whoever_comes_while_a_fork_waits_comes_after_it() -> None:
    first, order = hold(0.3), []
    forker = threading.Thread(target=lambda: (fork(), order.append("fork")))
    forker.start()
    while not forking.gate._forking:
        time.sleep(0.001)
    with forking.gate:
        order.append("late")
    forker.join()
    first.join()
    assert sorted(order) == ["fork", "late"]
    assert forking.gate._inside == {} and not forking.gate._forking
