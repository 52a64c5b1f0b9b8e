"""A Node over the sidecar: workers that die with their sockets full, and a sidecar at rest, which costs nothing."""

from __future__ import annotations

import os
import signal
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

import lifl
from lifl.ebpf import bpf
from lifl.round.blocks import Assignment
from lifl.round.round import core_of
from lifl.shm.arena import OWNER, State
from lifl.shm.messages import Descriptor, Kind
from lifl.shm.ring import counts_of

SPEC = lifl.TensorSpec.from_arrays({"w": np.zeros(1000), "n": np.array(0)})
WAIT_S = 60.0
IDLE_S = 5.0
"""Longer than any sleep of a worker without work (two seconds), or of who takes part in a round."""
BPF_ENABLE_STATS, BPF_STATS_RUN_TIME = 32, 0

pytestmark = pytest.mark.usefixtures("kernel")


def update(i: int) -> dict[str, np.ndarray]:
    """Client i's: a power of two, so that a sum tells exactly who is in it."""
    return {"w": np.full(1000, 2.0**i), "n": np.array(2**i)}


def wait_until(is_so: Callable[[], bool]) -> None:
    """Waits for something that must come."""
    end = time.monotonic() + WAIT_S
    while not is_so():
        assert time.monotonic() < end, "that did not come"
        time.sleep(0.005)


def state_of(pid: int) -> str:
    """The state of a process, as one letter: T is stopped."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0]


def stop(pid: int) -> None:
    """Stops a process, and returns when it stands still."""
    os.kill(pid, signal.SIGSTOP)
    wait_until(lambda: state_of(pid) == "T")


# ---------------------------------------------------------------- deaths


@pytest.mark.parametrize("leaves", [1, 2])
def test_worker_killed_with_a_full_socket_costs_the_round_nothing(leaves: int) -> None:
    """It is stopped, is sent updates that it does not read, and is killed: the mean is exactly that of all updates."""
    with lifl.Node("64MiB", workers=2, transport="ebpf") as node:
        free, before = node.arena.free_bytes, node.pids()
        with node.open_round(SPEC, 20, shape=lifl.Shape(leaves, 0)) as round_:
            for i in range(4):
                round_.submit(update(i), client_id=i)
            victim = next(me for me in (1, 2) if node.engaged()[me])
            stop(before[victim - 1])
            for i in range(4, 19):
                round_.submit(update(i), client_id=i)
            sent, taken = counts_of(node.arena, victim)
            assert sent > taken, "nothing was in its socket"
            os.kill(before[victim - 1], signal.SIGKILL)
            round_.submit(update(19), client_id=19)
            result = round_.result(WAIT_S)
            assert (result.arrays["w"] == (2**20 - 1) / 20).all()
            assert result.arrays["n"] == round((2**20 - 1) / 20)
            assert result.num_updates == 20
            assert result.report.deaths == 1
        result = None
        wait_until(lambda: node.arena.free_bytes == free)
        assert set(node.pids()) & set(before) == {before[2 - victim]}


def test_a_killed_workers_socket_is_full_and_its_credits_are_used_up() -> None:
    """More than can be on their way to it wait: what it had and what it had not been sent reach its successor."""
    with lifl.Node("64MiB", workers=1, transport="ebpf") as node:
        (pid,) = node.pids()
        with node.open_round(SPEC, 400, commit_every=1, shape=lifl.Shape(1, 0)) as round_:
            round_.submit(update(0), client_id=0)
            wait_until(lambda: not node.outbox._backlog[1] and counts_of(node.arena, 1)[0] >= 4)
            stop(pid)
            for i in range(1, 399):
                round_.submit(update(i % 20), client_id=i)
            sent, taken = counts_of(node.arena, 1)
            assert sent - taken == 256
            assert node.outbox._backlog[1]
            os.kill(pid, signal.SIGKILL)
            round_.submit(update(399 % 20), client_id=399)
            result = round_.result(WAIT_S)
            assert (result.arrays["w"] == (2**20 - 1) / 20).all()
            assert result.num_updates == 400


def test_a_leafs_sum_that_dies_with_its_top_is_told_again() -> None:
    """The top is stopped, the other leaf's sum is in its socket, and goes with it: the round ends all the same."""
    with lifl.Node("64MiB", workers=2, transport="ebpf") as node:
        for _ in range(5):
            pids = node.pids()
            with node.open_round(SPEC, 8, "lazy", shape=lifl.Shape(2, 0)) as round_:
                for i in range(7):
                    round_.submit(update(i), client_id=i)
                for pid in pids:
                    stop(pid)
                round_.submit(update(7), client_id=7)
                work = core_of(round_).lifecycle._assignment
                leaf = 3 - work.top
                # The sum is the top's from before it is sent; then the leaf has nothing more to do, and sleeps.
                os.kill(pids[leaf - 1], signal.SIGCONT)
                wait_until(lambda: is_handed_over(node, work) and state_of(pids[leaf - 1]) == "S")  # noqa: B023
                os.kill(pids[work.top - 1], signal.SIGKILL)
                assert (round_.result(WAIT_S).arrays["w"] == 255 / 8).all()
                assert round_.result().report.deaths == 1


def is_handed_over(node: lifl.Node, work: Assignment) -> bool:
    """True when a leaf's sum belongs to the top."""
    words = [node.arena.describe(block.index)[1:3] for block in work._sums[3 - work.top]]
    return (work.top, State.COMMITTED) in words


# ---------------------------------------------------------------- at rest


@contextmanager
def statistics() -> Iterator[None]:
    """The kernel counts how often programs run."""
    fd = bpf.bpf(BPF_ENABLE_STATS, struct.pack("=I", BPF_STATS_RUN_TIME))
    try:
        yield
    finally:
        os.close(fd)


def runs_of(program: int) -> int:
    """The number of times that a program has run while the kernel counted."""
    lines = Path(f"/proc/self/fdinfo/{program}").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("run_cnt"))


def sleeps_of(task: int) -> int:
    """The number of times that a thread has gone to sleep, and so has been awake."""
    lines = Path(f"/proc/{task}/status").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if "ctxt_switches" in line)


@pytest.mark.ladder
@pytest.mark.parametrize("is_open", [False, True], ids=["after a round", "while a round waits"])
def test_an_idle_node_spends_nothing_on_the_sidecar(is_open: bool) -> None:
    """No record is sent, no program runs, and neither the agent's thread nor a worker wakes up."""
    with lifl.Node("64MiB", workers=2, transport="ebpf") as node, statistics():
        program = node.transport._program.fd
        agent = next(thread for thread in threading.enumerate() if thread.name == "lifl-listener")
        assert agent.native_id is not None
        before = runs_of(program), sleeps_of(agent.native_id)
        with node.open_round(SPEC, 4, shape=lifl.Shape(2, 0)) as round_:
            for i in range(4):
                round_.submit(update(i), client_id=i)
            assert (round_.result(WAIT_S).arrays["w"] == 15 / 4).all()
        # Any traffic would be seen here: every record is a run, and every answer wakes the agent.
        assert runs_of(program) >= before[0] + 4
        assert sleeps_of(agent.native_id) > before[1]
        if is_open:
            round_ = node.open_round(SPEC, 4)
            round_.submit(update(0))
        time.sleep(1)  # what workers and the agent still have to do for it is not idling

        tasks = [agent.native_id, *node.pids()]
        before = runs_of(program), [*map(sleeps_of, tasks)]
        records = {me: counted.records for me, counted in node.transport.metrics().items()}
        time.sleep(IDLE_S)
        assert (runs_of(program), [*map(sleeps_of, tasks)]) == before
        assert {me: counted.records for me, counted in node.transport.metrics().items()} == records

        node.outbox.push(1, Descriptor(Kind.PING, 0))
        wait_until(lambda: node.transport.metrics()[OWNER].records == records[OWNER] + 1)
        assert runs_of(program) == before[0] + 2
        if is_open:
            round_.close()
