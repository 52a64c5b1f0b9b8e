"""Workers that are stopped or stuck: nothing is taken from the living, and past the deadline they are killed."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import numpy as np
import pytest

import lifl

pytestmark = pytest.mark.transports

SPEC = lifl.TensorSpec.from_arrays({"w": np.zeros(10_000), "n": np.array(0)})
STALL_S = 0.4
WAIT_S = 60.0


def update(i: int) -> dict[str, Any]:
    """Client i's: a power of two, so that a sum tells exactly who is in it."""
    return {"w": np.full(10_000, 2.0**i), "n": np.array(2**i)}


@pytest.mark.parametrize("timing", ["eager", "lazy"])
@pytest.mark.parametrize("shape", [lifl.Shape(2, 0), lifl.Shape(2, 2), lifl.Shape(0, 2)], ids=str)
@pytest.mark.parametrize("which", [0, 1])
def test_stopped_worker_is_killed_and_replaced(timing: Any, shape: lifl.Shape, which: int) -> None:
    """A stopped worker, whatever its role, holds a round up for the stall timeout and costs it nothing."""
    with (
        lifl.Node("16MiB", workers=2, stall_timeout=STALL_S) as node,
        node.open_round(SPEC, 8, timing, shape=shape) as round_,
    ):
        before = node.pids()
        os.kill(before[which], signal.SIGSTOP)
        for i in range(8):
            round_.submit(update(i), client_id=i)
        result = round_.result(WAIT_S)
        assert result.arrays["w"][0] == sum(2**i for i in range(8)) / 8
        assert result.report.deaths == 1
        assert set(before) - set(node.pids()) == {before[which]}


def test_all_stopped() -> None:
    """Every worker stopped at once: each is killed once, and the round ends right."""
    shape = lifl.Shape(3, 0)
    with (
        lifl.Node("16MiB", workers=3, stall_timeout=STALL_S) as node,
        node.open_round(SPEC, 5, shape=shape) as round_,
    ):
        before = node.pids()
        for pid in before:
            os.kill(pid, signal.SIGSTOP)
        for i in range(5):
            round_.submit(update(i), client_id=i)
        assert round_.result(WAIT_S).arrays["n"] == round(31 / 5)
        assert not set(before) & set(node.pids())


def test_stopped_at_rest() -> None:
    """A worker that is stopped while it has nothing to do, and so cannot leave when it is told to, does not stay."""
    with lifl.Node("16MiB", workers=1, warm=0, idle_timeout=0.3, stall_timeout=STALL_S) as node:
        with node.open_round(SPEC, 1) as round_:
            round_.submit(update(0), client_id=0)
            assert round_.result(WAIT_S).arrays["n"] == 1
            os.kill(stopped := node.pids()[0], signal.SIGSTOP)
        end = time.monotonic() + WAIT_S
        while node.pids() and time.monotonic() < end:
            time.sleep(0.01)
        assert node.pids() == ()
        with node.open_round(SPEC, 1) as round_:
            round_.submit(update(1), client_id=1)
            assert round_.result(WAIT_S).arrays["n"] == 2
            assert stopped not in node.pids()


def test_a_short_stop_kills_nobody() -> None:
    """Stopped for less than the stall timeout, a worker goes on, and so does the round."""
    with lifl.Node("16MiB", workers=1, stall_timeout=30) as node, node.open_round(SPEC, 3) as round_:
        (pid,) = node.pids()
        os.kill(pid, signal.SIGSTOP)
        for i in range(3):
            round_.submit(update(i), client_id=i)
        with pytest.raises(lifl.errors.RoundError, match=r"after 0\.5 s"):
            round_.result(0.5)
        os.kill(pid, signal.SIGCONT)
        result = round_.result(WAIT_S)
        assert (result.arrays["w"] == 7 / 3).all()
        assert node.pids() == (pid,)
        assert result.report.deaths == 0


def test_nothing_is_taken_from_a_stopped_worker() -> None:
    """Not reclaimed while alive: its blocks stay its own until it is proven dead."""
    with lifl.Node("16MiB", workers=1, stall_timeout=30) as node, node.open_round(SPEC, 3) as round_:
        (pid,) = node.pids()
        os.kill(pid, signal.SIGSTOP)
        for i in range(3):
            round_.submit(update(i), client_id=i)
        held = node.arena.free_bytes
        time.sleep(0.3)
        assert node.arena.free_bytes == held
        os.kill(pid, signal.SIGCONT)
        round_.result(WAIT_S)


def test_stopped_while_nobody_needs_it() -> None:
    """A worker that owes nothing may sleep for as long as it likes; the first round that needs it replaces it."""
    with lifl.Node("16MiB", workers=1, stall_timeout=STALL_S) as node:
        (pid,) = node.pids()
        os.kill(pid, signal.SIGSTOP)
        time.sleep(4 * STALL_S)
        assert node.pids() == (pid,)
        with node.open_round(SPEC, 1) as round_:
            round_.submit(update(2))
            assert round_.result(WAIT_S).arrays["n"] == 4
        assert node.pids() != (pid,)


def test_a_round_is_closed_over_a_stopped_worker() -> None:
    """Closing waits until the worker has let go, which a dead one has."""
    with lifl.Node("16MiB", workers=2, stall_timeout=STALL_S) as node:
        free = node.arena.free_bytes
        with node.open_round(SPEC, 8) as round_:
            os.kill(node.pids()[0], signal.SIGSTOP)
            for i in range(4):
                round_.submit(update(i), client_id=i)
        assert node.arena.free_bytes == free


@pytest.mark.parametrize("sent", ["SIGSTOP", "SIGKILL"])
def test_poison_is_refused_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Any, sent: str) -> None:
    """An update that stops or kills who reads it is refused by name after two deaths; those behind it count."""
    # It is real: the worker stops or kills itself as soon as it folds the value 13.
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal, ctypes\n"
        "import lifl.fold as fold\n"
        "real = fold.fold_at\n"
        "def fold_at(layout, total, before, updates, weights):\n"
        "    if any(ctypes.c_double.from_address(u).value == 13.0 for u in updates):\n"
        f"        os.kill(os.getpid(), signal.{sent})\n"
        "    return real(layout, total, before, updates, weights)\n"
        "fold.fold_at = fold_at\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    spec = lifl.TensorSpec.from_arrays({"w": np.zeros(8)})
    with (
        lifl.Node("16MiB", workers=1, stall_timeout=STALL_S) as node,
        node.open_round(spec, 3, shape=lifl.Shape(1, 0)) as round_,
    ):
        for i in range(3):
            round_.submit({"w": np.full(8, 13.0 if i == 1 else float(i))}, client_id=i)
        round_.close_early()
        result = round_.result(WAIT_S)
        assert [(r.client_id, r.rule) for r in result.rejected] == [("1", "poison")]
        assert (result.arrays["w"] == 1).all()
        assert result.report.deaths == 2


@pytest.mark.parametrize("stall_timeout", [0, -1, float("nan")])
def test_stall_timeout_is_checked(stall_timeout: float) -> None:
    """Zero, negative and NaN say what to give."""
    with pytest.raises(ValueError, match="give seconds above 0"):
        lifl.Node("16MiB", workers=0, stall_timeout=stall_timeout)


@pytest.mark.parametrize("every", [1, 2, 64])
def test_commit_every_bounds_a_batch(every: int) -> None:
    """However many updates are ready, a leaf folds at most so many before it commits; the mean is the same."""
    with lifl.Node("16MiB", workers=1) as node, node.open_round(SPEC, 7, "lazy", commit_every=every) as round_:
        for i in range(7):
            round_.submit(update(i), client_id=i)
        result = round_.result(WAIT_S)
        assert (result.arrays["w"] == 127 / 7).all()
        commits = {c.folded_s for c in result.report.accepted}
        assert len(commits) == -(-7 // every)


@pytest.mark.parametrize("every", [0, 65, -1])
def test_commit_every_is_checked(every: int) -> None:
    """A batch fits into a manifest."""
    with lifl.Node("16MiB", workers=0) as node, pytest.raises(ValueError, match="give 1 to 64"):
        node.open_round(SPEC, 1, commit_every=every)
