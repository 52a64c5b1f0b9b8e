"""The end of a Node: closed by its owner, by several at once, with workers stopped, killed or never started."""

from __future__ import annotations

import os
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import lifl
from lifl.errors import AdmissionError, LeaseError, PeerGoneError, RoundError
from lifl.tensor import Tensor

pytestmark = pytest.mark.transports

WAIT_S = 120.0
TINY = {"w": np.ones((2, 3), np.float32)}
TINY_SPEC = lifl.TensorSpec.from_arrays(TINY)


@pytest.mark.parametrize("workers", [0, 2])
def test_closed_node_says_so(workers: int) -> None:
    """Closing twice is harmless; closed rounds and the Node raise instead of hanging."""
    node = lifl.Node("4MiB", workers=workers)
    round_ = node.open_round(TINY_SPEC, expected=2)
    round_.submit(TINY)
    node.close()
    node.close()
    round_.close()
    assert not node.is_open
    with pytest.raises(LeaseError, match="closed"):
        node.open_round(TINY_SPEC, expected=2)
    with pytest.raises(RoundError, match="closed"):
        round_.result(WAIT_S)
    with pytest.raises((LeaseError, AdmissionError)):
        round_.submit(TINY)


def test_no_thread_is_left() -> None:
    """Closing a Node ends the thread that hears its workers."""
    before = threading.enumerate()
    lifl.Node("1MiB", workers=1).close()
    assert threading.enumerate() == before


@pytest.mark.parametrize("workers", [0, 1])
def test_node_that_is_closed_under_its_users_tells_them(workers: int) -> None:
    """Threads that submit or wait when the Node is closed get an error of lifl's and do not hang."""
    node = lifl.Node("4MiB", workers=workers)
    round_ = node.open_round(TINY_SPEC, expected=10**6)

    def submit_for_ever() -> None:
        while True:
            round_.submit(TINY)

    with ThreadPoolExecutor(3) as threads:
        busy = [threads.submit(submit_for_ever), threads.submit(submit_for_ever), threads.submit(round_.result)]
        with pytest.raises(TimeoutError):
            busy[0].result(0.05)
        node.close()
        for one in busy:
            with pytest.raises((LeaseError, AdmissionError, RoundError)):
                one.result(WAIT_S)


@pytest.mark.parametrize(
    "program",
    [
        "/bin/false",
        "/nonexistent",
    ],
)
def test_workers_that_cannot_be_started_are_told(monkeypatch: pytest.MonkeyPatch, program: str) -> None:
    """If the process that starts workers cannot run, making a Node is PeerGoneError and leaves nothing."""
    monkeypatch.setattr(sys, "executable", program)
    with pytest.raises(PeerGoneError):
        lifl.Node("1MiB", workers=2)


@pytest.mark.parametrize("workers", [0, 2])
def test_loan_that_outlives_its_node_is_over(workers: int) -> None:
    """Leaving a loan after its Node was closed under it raises nothing but LeaseError at its use."""
    node = lifl.Node("4MiB", workers=workers)
    with node.open_round(TINY_SPEC, expected=2) as round_:
        loan = round_.loan()
        loan.arrays["w"][...] = 1
        node.close()
        with pytest.raises((LeaseError, AdmissionError)):
            loan.send(1)


def test_leaving_a_loan_after_its_node_was_closed() -> None:
    """A ``with`` block on a loan can be left without an error of its own after the Node was closed."""
    node = lifl.Node("4MiB", workers=0)
    with node.open_round(TINY_SPEC, expected=2) as round_, round_.loan():
        node.close()


def test_workers_that_are_stopped_lose_nothing() -> None:
    """With every worker stopped its ring runs full; when they go on, everything arrives."""
    with lifl.Node("64MiB", workers=2) as node:
        one, two = node.open_round(TINY_SPEC, 400, "lazy"), node.open_round(TINY_SPEC, 400, "eager")
        for pid in node.pids():
            os.kill(pid, signal.SIGSTOP)
        for _ in range(200):
            one.submit(TINY)
            two.submit(TINY)
        for pid in node.pids():
            os.kill(pid, signal.SIGCONT)
        for _ in range(200):
            two.submit(TINY)
            one.submit(TINY)
        assert (one.result(WAIT_S).num_updates, two.result(WAIT_S).num_updates) == (400, 400)


def test_full_ring_of_a_lazy_round_is_sent_on() -> None:
    """Descriptors that did not fit into a full ring reach their worker without any other event."""
    with lifl.Node("64MiB", workers=1) as node, node.open_round(TINY_SPEC, expected=600, timing="lazy") as round_:
        round_.submit(TINY)
        (pid,) = node.pids()
        os.kill(pid, signal.SIGSTOP)
        for _ in range(599):
            round_.submit(TINY)
        os.kill(pid, signal.SIGCONT)
        try:
            assert round_.result(5).num_updates == 600
        finally:
            os.kill(pid, signal.SIGKILL)  # else a close that waits for it would take half a minute


def test_killed_worker_wakes_who_waits_for_room() -> None:
    """A caller that waits for memory of a dead worker gets it when the successor has folded."""
    spec = lifl.TensorSpec((Tensor("w", "float32", (2**18,)),))
    with lifl.Node("8MiB", workers=1) as node, node.open_round(spec, expected=50) as round_:
        (pid,) = node.pids()
        os.kill(pid, signal.SIGSTOP)

        def submit_all() -> None:
            for _ in range(50):
                round_.submit({"w": np.zeros(2**18, np.float32)})

        with ThreadPoolExecutor(1) as threads:
            waiting = threads.submit(submit_all)
            with pytest.raises(TimeoutError):
                waiting.result(0.2)
            os.kill(pid, signal.SIGKILL)
            waiting.result(WAIT_S)
        assert round_.result(WAIT_S).num_updates == 50
