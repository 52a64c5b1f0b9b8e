"""Thousands of workers of one Node die; it goes on, with all its blocks."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from contextlib import suppress

import numpy as np
import pytest

import lifl
from lifl.strategy.heap import give_back

pytestmark = [pytest.mark.ladder, pytest.mark.transports]

DEATHS = {"rings": 2_000, "ebpf": 1_500}
if os.environ.get("LIFL_CRASH") == "all":
    DEATHS = dict.fromkeys(DEATHS, 10_000)
MEMORY_DRIFT = 512 * 1024
"""Bytes: what is kept per death, were it only half a kilobyte, would be more between the two looks."""
SPEC = lifl.TensorSpec.from_arrays({"w": np.zeros(64), "n": np.array(0)})
SENT = [{"w": np.full(64, 2.0**i), "n": np.array(2**i)} for i in range(6)]
WAIT_S = 60.0


class CountingNode(lifl.Node):
    """A Node that counts the workers whose death is proven."""

    deaths = 0

    def replace(self, pidfd: int) -> None:
        """Counts a death."""
        self.deaths += 1
        super().replace(pidfd)


def look(node: lifl.Node, free: int) -> dict[str, int]:
    """The means that the owner and its spawner hold, when every worker is there and every block is back."""
    assert node._supervisor is not None
    spawner = node._supervisor.spawner.pid
    end, held = time.monotonic() + WAIT_S, -1
    while time.monotonic() < end:
        is_whole = node.arena.free_bytes == free and len(node.pids()) == 3
        # The spawner reaps: neither a zombie nor a worker more. It may still hold what it gave to the last one.
        before, held = held, len(os.listdir(f"/proc/{spawner}/fd"))
        if is_whole and sorted(children_of(spawner)) == sorted(node.pids()) and held == before:
            break
        time.sleep(0.05)
    give_back()  # what is left is in use
    return {
        "free bytes": node.arena.free_bytes,
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
        "processes": 1 + len(children_of(spawner)),
        "spawner's descriptors": len(os.listdir(f"/proc/{spawner}/fd")),
        "memory": private_bytes(os.getpid()),
        "spawner's memory": private_bytes(spawner),
    }


def children_of(pid: int) -> list[int]:
    """Processes whose parent this is; zombies too."""
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(child) for child in file.read().split()]


def private_bytes(pid: int) -> int:
    """The memory that only this process has, without the arena."""
    with open(f"/proc/{pid}/smaps_rollup") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("Anonymous:"))


@pytest.mark.timeout(600)
def test_thousands_of_deaths(transport: str) -> None:
    """Up to two of three workers are killed in every round: each round is exact, and nothing is kept of the dead."""
    choose, deaths = random.Random(5), DEATHS[transport]
    with CountingNode("16MiB", workers=3) as node:
        free = node.arena.free_bytes
        while node.deaths < deaths // 10:
            one_round(node, choose)
        before = look(node, free)
        while node.deaths < deaths:
            one_round(node, choose)
        after = look(node, free)
        assert before["free bytes"] == free
        drift = {what: after[what] - before[what] for what in before}
        memory = {what: drift.pop(what) for what in ("memory", "spawner's memory")}
        assert drift == dict.fromkeys(drift, 0)
        assert max(memory.values()) < MEMORY_DRIFT, memory
        with node.open_round(SPEC, 6) as round_:
            for i, update in enumerate(SENT):
                round_.submit(update, client_id=i)
            assert round_.result(WAIT_S).arrays["w"][0] == 63 / 6


def one_round(node: lifl.Node, choose: random.Random) -> None:
    """A round in which workers are killed at two moments of chance."""
    with node.open_round(SPEC, 6, choose.choice(["eager", "lazy"])) as round_:  # type: ignore[arg-type]
        moments = {choose.randrange(7), choose.randrange(7)}
        for i in range(7):
            if i in moments and (pids := node.pids()):
                with suppress(ProcessLookupError):
                    os.kill(choose.choice(pids), signal.SIGKILL)
            if i < 6:
                round_.submit(SENT[i], client_id=i)
        result = round_.result(WAIT_S)
        who = {int(c.client_id) for c in result.report.accepted}
        refused = {int(r.client_id): r.rule for r in result.rejected}
        assert set(refused.values()) <= {"poison"}  # two deaths in a row at one update may be chance here
        assert who | set(refused) == set(range(6))
        assert not who & set(refused)
        assert result.arrays["w"][0] == sum(2**i for i in who) / len(who)
