"""A leaf that is stopped at any step while its top dies: whatever it does then, no block stays behind."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from stepping import Control, stepping

import lifl
from lifl.round import blocks as assignment
from lifl.round.round import core_of

pytestmark = [pytest.mark.ladder, pytest.mark.transports]

SPEC = lifl.TensorSpec.from_arrays({"w": np.zeros(64), "n": np.array(0)})
SENT = [{"w": np.full(64, 2.0**i), "n": np.array(2**i)} for i in range(2)]
WAIT_S = 10.0


class Pair:
    """A Node with a top and a leaf, which counts its steps."""

    def __init__(self, node: lifl.Node, control: Control) -> None:
        self.node, self.control, self.free = node, control, node.arena.free_bytes

    def pid_of(self, me: int) -> int | None:
        """The worker's; None while it has no successor."""
        assert self.node._supervisor is not None
        with self.node.changed:
            return next((worker.pid for worker in self.node._supervisor._workers.values() if worker.number == me), None)

    def replace(self, me: int) -> None:
        """Kills a worker; returns when its successor has been told what is left to do."""
        assert self.node._supervisor is not None
        before = self.pid_of(me)
        assert before is not None
        os.kill(before, signal.SIGKILL)
        wait_for(lambda: self.pid_of(me) not in (None, before), "a successor")
        wait_for(lambda: self.node._supervisor._deaths[me] == 0, "its first word")  # type: ignore[union-attr]

    def stop_leaf(self, step: int) -> tuple[lifl.Round, int, int] | None:
        """A round whose leaf is stopped at its `step`-th step: the round, the top, the leaf's pid."""
        top = 2 - self.node.pool._turn % 2
        leaf = 3 - top
        pid = self.pid_of(leaf)
        assert pid is not None
        self.control.arm(leaf, step, sent=signal.SIGSTOP)
        round_ = self.node.open_round(SPEC, 2, shape=lifl.Shape(leaves=2, shards=0))
        for i, update in enumerate(SENT):
            round_.submit(update, client_id=i)
        end = time.monotonic() + 0.3
        while not is_stopped(pid) and time.monotonic() < end:
            time.sleep(0.0005)
        self.control.disarm(leaf)
        if is_stopped(pid):
            return round_, top, pid
        assert round_.result(WAIT_S).num_updates == 2
        round_.close()
        return None

    def check(self) -> None:
        """Every block comes back."""
        wait_for(lambda: self.node.arena.free_bytes == self.free, "every block")


def is_stopped(pid: int) -> bool:
    """True for a process that SIGSTOP has stopped."""
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(") ")[2][0] == "T"


def wait_for(is_there: object, what: str) -> None:
    """Waits until it is there."""
    assert callable(is_there)
    end = time.monotonic() + WAIT_S
    while not is_there():
        assert time.monotonic() < end, f"{what} did not come within {WAIT_S:g} s"
        time.sleep(0.001)


@pytest.fixture
def pair(library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pair]:
    """Two workers that are not killed for being stopped; the first leaf is the top."""
    monkeypatch.setattr(assignment.Assignment, "_choose_top", lambda self: self.leaves[0])
    with (
        stepping(library, tmp_path, "steps") as control,
        lifl.Node("8MiB", workers=2, stall_timeout=600.0) as node,
    ):
        yield Pair(node, control)


@pytest.mark.parametrize("then", [signal.SIGCONT, signal.SIGKILL])
def test_top_dies_while_its_leaf_lingers(pair: Pair, then: int) -> None:
    """The new top may make the mean only when the leaf has let go of all: the end of a round is when it is swept."""
    steps = misses = 0
    while misses < 4:
        steps += 1
        if (stopped := pair.stop_leaf(steps)) is None:
            misses += 1
            continue
        round_, top, pid = stopped
        pair.replace(top)
        time.sleep(0.02)  # a new top that need not wait for the leaf makes the mean meanwhile
        os.kill(pid, then)
        assert round_.result(WAIT_S).arrays["w"][0] == 1.5
        round_.close()
        if then == signal.SIGKILL:
            wait_for(lambda top=top, pid=pid: pair.pid_of(1 + top % 2) not in (None, pid), "the leaf's successor")
        pair.check()
    assert steps > 20


@pytest.mark.parametrize("sweep", range(3))  # at which step it stops is a matter of chance too
def test_round_is_closed_while_its_leaf_lingers(pair: Pair, sweep: int) -> None:
    """A sum that is handed to a top that died meanwhile, and whose successor knows nothing of it, is taken back."""
    steps = misses = 0
    while misses < 4:
        steps += 1
        if (stopped := pair.stop_leaf(steps)) is None:
            misses += 1
            continue
        round_, top, pid = stopped
        closing = threading.Thread(target=round_.close)
        closing.start()
        wait_for(lambda round_=round_: core_of(round_).lifecycle.phase in ("failed", "closed"), "the abort")
        pair.replace(top)
        os.kill(pid, signal.SIGCONT)
        closing.join(WAIT_S)
        assert not closing.is_alive(), f"at step {steps} the round does not end"
        pair.check()
    assert steps > 20
