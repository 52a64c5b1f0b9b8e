"""64 workers, a million records, routes that change a hundred times a second: nothing is lost, nothing goes astray."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import crowd as program
import numpy as np
import pytest
from crowd import BATCH, BATCHES, CHANGED, CHANGES_PER_S, IDS, RECORD, WORKERS

from lifl.ebpf.links import TOP
from lifl.ebpf.record import RECORD_BYTES

pytestmark = pytest.mark.ladder

EACH = BATCHES * BATCH
Array = np.ndarray[Any, Any]


class Seen:
    """The records and counts that the crowd left behind."""

    def __init__(self, folder: Path, said: dict[str, Any]) -> None:
        self.said = said
        self.got = {me: np.load(folder / f"got-{me}.npy") for me in range(1, 1 + WORKERS)}
        self.times = np.stack([np.load(folder / f"times-{me}.npy") for me in range(1, 1 + WORKERS)])
        self.moves = np.load(folder / "moves.npy")


@pytest.fixture(scope="module")
def seen(kernel: None, tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """It runs once; every test looks at one thing of it."""
    folder = tmp_path_factory.mktemp("crowd")
    command = [sys.executable, program.__file__, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["statuses"] == [0] * WORKERS, done.stderr
    return Seen(folder, said)


def test_none_is_lost_and_none_comes_twice(seen: Seen) -> None:
    """A million went out, and each of them came in once."""
    assert RECORD.itemsize == RECORD_BYTES
    everything = np.concatenate([*seen.got.values()])
    assert len(everything) == WORKERS * EACH == 1_000_000
    names = everything["src"].astype(np.int64) * EACH + everything["seq"]
    assert np.array_equal(np.sort(names), np.arange(EACH, (1 + WORKERS) * EACH))
    assert not seen.said["strays"]


def test_routes_changed_all_the_while(seen: Seen) -> None:
    """A hundred times a second, with some room for a machine that is busy; aggregators have been at many workers."""
    changes = (len(seen.moves) - IDS) / CHANGED
    assert changes >= 0.5 * CHANGES_PER_S * seen.said["seconds"]
    assert changes >= BATCHES
    where = [me for me, one in seen.got.items() for _ in np.unique(one["dst"])]
    assert len(where) > 5 * IDS


def test_each_went_where_its_aggregator_was(seen: Seen) -> None:
    """A receiver had the aggregator at some moment of the call that sent the record, the old way or the new.

    Between the begin and the end of a route's change either may be in force.
    """
    where = np.concatenate([np.full(len(one), me) for me, one in seen.got.items()])
    everything = np.concatenate([*seen.got.values()])
    begin, end = seen.times[everything["src"] - 1, everything["seq"] // BATCH].T
    num_old = 0
    for k in range(IDS):
        moves = seen.moves[seen.moves[:, 0] == k]
        mine = everything["dst"] == (TOP | k)
        # From the last change that was over before the call, to the last that had begun before its end.
        first = np.searchsorted(moves[:, 3], begin[mine], side="right") - 1
        last = np.searchsorted(moves[:, 2], end[mine], side="right") - 1
        is_right = np.zeros(len(first), bool)
        for step in range(int((last - first).max()) + 1):
            at = np.minimum(first + step, last)
            is_right |= moves[at, 1] == where[mine]
        assert is_right.all(), f"{(~is_right).sum()} records of aggregator {k} went astray"
        num_old += int((moves[last, 1] != where[mine]).sum())
    # Else nothing was in flight while a route changed, and this test has seen nothing.
    assert num_old > 0


def test_order_is_kept_per_sender(seen: Seen) -> None:
    """A worker gets the records of another worker to one aggregator in the order in which they were sent."""
    for one in seen.got.values():
        line = one["src"].astype(np.int64) * IDS + (one["dst"] & (TOP - 1))
        order = np.argsort(line, kind="stable")
        same = np.diff(line[order]) == 0
        assert (np.diff(one["seq"][order].astype(np.int64))[same] > 0).all()


def test_counters_are_exact(seen: Seen) -> None:
    """Summed over the CPUs, the kernel has counted for each worker what that got, and nothing for anybody else."""
    metrics = {int(me): counted for me, counted in seen.said["metrics"].items()}
    assert {me: counted["records"] for me, counted in metrics.items()} == {me: len(x) for me, x in seen.got.items()}
    for counted in metrics.values():
        assert counted["bytes"] == counted["records"] * RECORD_BYTES
        assert counted["missed"] == counted["updates"] == counted["folded"] == counted["busy_ns"] == 0
        assert 0 < counted["first_ns"] <= counted["last_ns"]
