"""Ten thousand workers of one Node die; it goes on, with all its blocks."""

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

DEATHS = 10_000
SPEC = lifl.TensorSpec.from_arrays({"w": np.zeros(64), "n": np.array(0)})
SENT = [{"w": np.full(64, 2.0**i), "n": np.array(2**i)} for i in range(6)]
WAIT_S = 60.0


def private_bytes() -> int:
    """The memory that only this process has, without the arena."""
    with open("/proc/self/smaps_rollup") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("Anonymous:"))


@pytest.mark.timeout(600)
def test_ten_thousand_deaths() -> None:
    """Two of three workers are killed in every round: each is exact, and blocks, descriptors and threads stay."""
    choose = random.Random(5)
    killed: set[tuple[int, int]] = set()
    with lifl.Node("16MiB", workers=3) as node:
        free, memory = node.arena.free_bytes, 0
        before = len(os.listdir("/proc/self/fd")), threading.active_count()
        rounds = 0
        while len(killed) < DEATHS:
            one_round(node, choose, killed, rounds)
            rounds += 1
            if len(killed) > DEATHS // 10 and not memory:
                memory = private_bytes()
        end = time.monotonic() + WAIT_S
        while (node.arena.free_bytes != free or len(node.pids()) != 3) and time.monotonic() < end:
            time.sleep(0.01)
        assert node.arena.free_bytes == free
        assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == before
        # Nine thousand deaths at a hundred bytes each would be a megabyte.
        assert private_bytes() - memory < 2**20
        with node.open_round(SPEC, 6) as round_:
            for i, update in enumerate(SENT):
                round_.submit(update, client_id=i)
            assert round_.result(WAIT_S).arrays["w"][0] == 63 / 6


def one_round(node: lifl.Node, choose: random.Random, killed: set[tuple[int, int]], number: int) -> None:
    """A round in which two workers are killed at a moment of chance."""
    with node.open_round(SPEC, 6, choose.choice(["eager", "lazy"])) as round_:  # type: ignore[arg-type]
        moments = {choose.randrange(7), choose.randrange(7)}
        for i in range(7):
            if i in moments and (pids := node.pids()):
                pid = choose.choice(pids)
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                    killed.add((pid, number))
            if i < 6:
                round_.submit(SENT[i], client_id=i)
        result = round_.result(WAIT_S)
        who = {int(c.client_id) for c in result.report.accepted}
        assert who | {int(r.client_id) for r in result.rejected} == set(range(6))
        assert result.arrays["w"][0] == pytest.approx(sum(2**i for i in who) / len(who), rel=1e-15)
