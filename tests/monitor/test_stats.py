"""The state of a Node as values: open rounds, workers, totals, with either transport; the values go through JSON."""

from __future__ import annotations

import gc
import itertools
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest

import lifl
from lifl.ebpf import probe
from lifl.errors import AdmissionError, LeaseError, RoundError
from lifl.monitor.stats import MemoryStats, NodeStats, RoundStats, SuperlinkStats, Totals, WorkerStats
from lifl.round.round import core_of

WAIT_S = 60.0
MODEL = {"w": np.ones(1000, np.float32)}
SPEC = lifl.TensorSpec.from_arrays(MODEL)

STATS = NodeStats(
    *(7, 1, "ebpf", "prebuilt", 2.5),
    MemoryStats(100, 10),
    (RoundStats(3, "open", "eager", 5, 2, {"values": 1}, 80, 1.5),),
    1,
    Totals(2, 1, 9, 360, {"values": 1, "weight": 2}),
    (WorkerStats(1, 11, ("leaf", "top"), (3,), 12, 1, 7, 0.25, 0), WorkerStats(2, None, ("off",), (), 0, 0, 0, 0.0, 1)),
    SuperlinkStats(1, 2, 3, 4, None, 5, 6, 7),
)


def wait_for(node: lifl.Node, is_so: Callable[[NodeStats], Any]) -> NodeStats:
    """The first look at which it is so."""
    end = time.monotonic() + WAIT_S
    while not is_so(stats := node.stats()):
        assert time.monotonic() < end, stats
        time.sleep(0.005)
    return stats


def stop(node: lifl.Node) -> None:
    """Stops every worker; returns when they stand still."""
    end = time.monotonic() + WAIT_S
    for pid in node.pids():
        os.kill(pid, signal.SIGSTOP)
        while Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "T":
            assert time.monotonic() < end
            time.sleep(0.001)


def one_round(node: lifl.Node, updates: int, **options: Any) -> None:
    """A round with its mean."""
    with node.open_round(SPEC, updates, **options) as round_:
        for k in range(updates):
            round_.submit(MODEL, client_id=k)
        round_.result(WAIT_S)


# ---------------------------------------------------------------- values


def test_values_go_through_json() -> None:
    """A snapshot is the same after JSON; what a newer version says more is left out."""
    said = json.loads(json.dumps(STATS.to_dict()))
    assert NodeStats.from_dict(said) == STATS
    said["mood"] = said["workers"][0]["mood"] = "fine"
    assert NodeStats.from_dict(said) == STATS
    without = attrs.evolve(STATS, superlink=None)
    assert NodeStats.from_dict(json.loads(json.dumps(without.to_dict()))) == without


@pytest.mark.parametrize(
    "said",
    [None, 3, [], "x", {}, {**STATS.to_dict(), "memory": 5}, {**STATS.to_dict(), "workers": [{"id": 1}]}],
    ids=str,
)
def test_what_is_no_snapshot_is_told(said: Any) -> None:
    """Nonsense is a ValueError."""
    with pytest.raises(ValueError, match="no snapshot"):
        NodeStats.from_dict(said)


# ---------------------------------------------------------------- a Node


@pytest.mark.transports
def test_node_at_rest(transport: str) -> None:
    """The snapshot has the Node's identity and means, and no event; workers that are not there are off."""
    with lifl.Node("4MiB", workers=3, warm=1) as node:
        stats = wait_for(node, lambda stats: not stats.workers[0].queued)
        assert (stats.pid, stats.transport) == (os.getpid(), transport)
        assert stats.loader == (probe.support().loader if transport == "ebpf" else None)
        assert stats.memory == MemoryStats(node.arena.block_bytes, 0)
        assert stats.totals == Totals(0, 0, 0, 0, {})
        assert (stats.rounds, stats.open_rounds, stats.superlink) == ((), 0, None)
        assert [worker.id for worker in stats.workers] == [1, 2, 3]
        assert [worker.roles for worker in stats.workers] == [("idle",), ("off",), ("off",)]
        assert [worker.pid for worker in stats.workers] == [*node.pids(), None, None]
        assert node.stats().uptime_s > stats.uptime_s > 0
        with lifl.Node("1MiB", workers=0) as other:
            assert other.stats().number == stats.number + 1


@pytest.mark.transports
def test_round_that_is_open() -> None:
    """Its progress, its refusals by rule, its bytes; and in the totals as well."""
    with lifl.Node("4MiB", workers=1) as node:
        with node.open_round(SPEC, 3, "lazy") as round_:
            round_.submit(MODEL, client_id="a")
            for wrong, weight in (({"w": np.full(1000, np.nan, np.float32)}, 1.0), (MODEL, -1.0), (MODEL, 0.0)):
                with pytest.raises(AdmissionError):
                    round_.submit(wrong, weight, client_id="b")
            stats = node.stats()
            (seen,) = stats.rounds
            refused = {"values": 1, "weight": 2}
            assert attrs.evolve(seen, age_s=0.0) == RoundStats(
                round_.number, "open", "lazy", 3, 1, refused, SPEC.nbytes, 0.0
            )
            assert stats.totals == Totals(0, 0, 1, SPEC.nbytes, refused)
            assert stats.memory.used_bytes == node.used_bytes > 0
            round_.submit(MODEL, client_id="b")
            round_.submit(MODEL, client_id="c")
            round_.result(WAIT_S)
            (seen,) = node.stats().rounds
            assert (seen.phase, seen.accepted) == ("done", 3)
            assert node.stats().totals == Totals(1, 0, 3, 3 * SPEC.nbytes, refused)
        with pytest.raises(AdmissionError):
            round_.submit(MODEL, client_id="d")  # it is closed, and counts all the same
        stats = node.stats()
        assert (stats.rounds, stats.open_rounds) == ((), 0)
        assert stats.totals == Totals(1, 0, 3, 3 * SPEC.nbytes, {**refused, "closed": 1})


@pytest.mark.transports
def test_rounds_without_a_result_have_failed() -> None:
    """A round that is closed before its result, and a round that is closed early without an update, count once each."""
    with lifl.Node("4MiB", workers=1) as node:
        node.open_round(SPEC, 3).close()
        with node.open_round(SPEC, 3) as round_:
            round_.close_early()
            assert node.stats().rounds[0].phase == "failed"
            with pytest.raises(RoundError):
                round_.result(WAIT_S)
        one_round(node, 1)
        totals = node.stats().totals
        assert (totals.rounds_done, totals.rounds_failed) == (1, 2)


@pytest.mark.transports
def test_queue_of_a_worker_that_is_stopped() -> None:
    """The queue counts what a stopped worker has not taken, without a wait; then the worker folds and counts it."""
    with (
        lifl.Node("8MiB", workers=1) as node,
        node.open_round(SPEC, 4, shape=lifl.Shape(1, 0)) as round_,
    ):
        before = wait_for(node, lambda stats: not stats.workers[0].queued).workers[0]
        (pid,) = node.pids()
        stop(node)
        for k in range(3):
            round_.submit(MODEL, client_id=k)
        (worker,) = node.stats().workers
        assert (worker.pid, worker.roles, worker.rounds) == (pid, ("leaf",), (round_.number,))
        assert worker.queued >= 3
        assert worker.arrivals - before.arrivals == worker.queued
        assert worker.folded == 0
        os.kill(pid, signal.SIGCONT)
        (worker,) = wait_for(node, lambda stats: stats.workers[0].folded == 3).workers
        assert worker.queued == 0
        assert worker.busy_s > 0
        round_.submit(MODEL, client_id="last")
        round_.result(WAIT_S)
        (worker,) = node.stats().workers
        assert (worker.folded, worker.roles, worker.rounds, worker.deaths) == (4, ("idle",), (), 0)


@pytest.mark.transports
def test_roles_while_a_model_is_made() -> None:
    """Workers that are stopped before they make the mean in shards are seen as that, in each of two rounds."""
    shape = lifl.Shape(0, 2)
    with (
        lifl.Node("8MiB", workers=2) as node,
        node.open_round(SPEC, 2, "lazy", shape=shape) as one,
        node.open_round(SPEC, 2, "lazy", shape=lifl.Shape(2, 0)) as two,
    ):
        stop(node)
        for k in range(2):
            one.submit(MODEL, client_id=k)
        stats = node.stats()
        assert [worker.roles for worker in stats.workers] == [("leaf", "shard")] * 2
        assert [worker.rounds for worker in stats.workers] == [(one.number, two.number)] * 2
        assert [seen.phase for seen in stats.rounds] == ["folding", "open"]
        for pid in node.pids():
            os.kill(pid, signal.SIGCONT)
        one.result(WAIT_S)
        assert [worker.roles for worker in node.stats().workers] == [("leaf",)] * 2


@pytest.mark.transports
def test_top_has_folded_its_own() -> None:
    """The leaf that is to add up is the top from when it has nothing of its own to fold; then it waits for others."""
    with (
        lifl.Node("8MiB", workers=2) as node,
        node.open_round(SPEC, 2, "lazy", shape=lifl.Shape(2, 0)) as round_,
    ):
        round_.submit(MODEL, client_id="a")
        stop(node)
        round_.submit(MODEL, client_id="b")
        pids = {worker.id: worker.pid or 0 for worker in node.stats().workers}
        top = core_of(round_).lifecycle._assignment.top
        assert {worker.roles for worker in node.stats().workers} == {("leaf",)}
        os.kill(pids[top], signal.SIGCONT)
        # The sidecar counts the message that an update is folded before the owner has read it.
        stats = wait_for(node, lambda stats: stats.workers[top - 1].roles == ("top",))
        assert stats.workers[top - 1].folded == 1
        assert {worker.id: worker.roles for worker in stats.workers} == {top: ("top",), 3 - top: ("leaf",)}
        os.kill(pids[3 - top], signal.SIGCONT)
        round_.result(WAIT_S)


@pytest.mark.transports
def test_deaths_are_counted() -> None:
    """A worker that is killed in a round is counted, its successor is seen, and the round ends right."""
    with lifl.Node("8MiB", workers=1) as node, node.open_round(SPEC, 3) as round_:
        round_.submit(MODEL, client_id="a")
        (pid,) = node.pids()
        os.kill(pid, signal.SIGKILL)
        stats = wait_for(node, lambda stats: stats.workers[0].pid not in (pid, None))
        assert stats.workers[0].deaths == 1
        for client in "bc":
            round_.submit(MODEL, client_id=client)
        assert (round_.result(WAIT_S).arrays["w"] == 1).all()
        assert node.stats().totals.accepted == 3


def test_worker_that_was_told_to_stop_has_not_died() -> None:
    """A worker that ends because it has nothing to do is off, and counts as no death."""
    with lifl.Node("4MiB", workers=1, idle_timeout=0.05) as node:
        one_round(node, 1)
        (worker,) = wait_for(node, lambda stats: stats.workers[0].pid is None).workers
        assert (worker.roles, worker.deaths) == (("off",), 0)
        one_round(node, 1)
        assert node.stats().workers[0].folded + node.stats().totals.rounds_done >= 2


def test_without_workers() -> None:
    """The process itself is the one worker."""
    with lifl.Node("4MiB", workers=0) as node:
        one_round(node, 3)
        stats = node.stats()
        (worker,) = stats.workers
        assert (worker.pid, worker.roles, worker.queued) == (os.getpid(), ("idle",), 0)
        assert worker.busy_s > 0
        assert stats.totals == Totals(1, 0, 3, 3 * SPEC.nbytes, {})


@pytest.mark.usefixtures("ebpf")
def test_kernel_and_books_agree() -> None:
    """The kernel's counts are those of the workers, in every shape: times to the microsecond, folds exactly."""
    with lifl.Node("16MiB", workers=2, transport="ebpf") as node:
        for shape in (lifl.Shape(1, 0), lifl.Shape(2, 0), lifl.Shape(0, 2), lifl.Shape(2, 2)):
            for timing in ("eager", "lazy"):
                one_round(node, 9, shape=shape, timing=timing)
        stats = wait_for(node, lambda stats: not any(worker.queued for worker in stats.workers))
        for worker in stats.workers:
            assert abs(worker.busy_s * 1e9 - node.tally.busy_ns[worker.id]) < 1000
            assert worker.folded == node.tally.folded[worker.id] > 0


# ---------------------------------------------------------------- at any time


def rising(stats: NodeStats) -> list[float]:
    """All that must never fall."""
    totals, workers = stats.totals, stats.workers
    each = [(one.arrivals, one.folded, one.busy_s, one.deaths) for one in workers]
    return [
        *(stats.uptime_s, totals.rounds_done, totals.rounds_failed, totals.accepted, totals.accepted_bytes),
        *(totals.refused.get(rule, 0) for rule in ("values", "poison")),
        *(figure for one in each for figure in one),
    ]


@pytest.mark.transports
def test_looks_in_the_middle_of_rounds_with_deaths() -> None:
    """While rounds go on and workers are killed every look succeeds, no count falls, every mean is right."""
    with lifl.Node("16MiB", workers=2) as node:
        seen, errors, is_over = [node.stats()], [], threading.Event()

        def look() -> None:
            try:
                while not is_over.is_set():
                    seen.append(node.stats())
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=look)
        thread.start()
        for number in range(12):
            with node.open_round(SPEC, 6) as round_:
                for k in range(6):
                    round_.submit(MODEL, client_id=k)
                    if k == 3 and number % 3 == 0:
                        os.kill(node.pids()[number % 2], signal.SIGKILL)
                assert (round_.result(WAIT_S).arrays["w"] == 1).all()
            wait_for(node, lambda stats: all(worker.pid for worker in stats.workers))
        is_over.set()
        thread.join()
        assert not errors
        seen.append(node.stats())
        for before, after in itertools.pairwise(seen):
            assert all(a <= b for a, b in zip(rising(before), rising(after), strict=True)), (before, after)
        assert seen[-1].totals == Totals(12, 0, 72, 72 * SPEC.nbytes, {})
        assert sum(worker.deaths for worker in seen[-1].workers) == 4


@pytest.mark.transports
def test_a_thousand_looks_leak_nothing() -> None:
    """Neither objects nor descriptors nor memory of the arena."""
    with lifl.Node("4MiB", workers=2) as node, node.open_round(SPEC, 3) as round_:
        round_.submit(MODEL, client_id="a")
        node.stats()
        gc.collect()
        before = len(gc.get_objects()), len(os.listdir("/proc/self/fd")), node.used_bytes
        for _ in range(1000):
            node.stats()
        gc.collect()
        after = len(gc.get_objects()), len(os.listdir("/proc/self/fd")), node.used_bytes
        assert after[0] - before[0] < 100
        assert after[1] == before[1]
        assert after[2] <= before[2]


def test_closed_and_forked(in_fork: Callable[[Callable[[], None]], int]) -> None:
    """A closed Node, and a fork's copy of one, say so instead of telling old figures."""

    def ask() -> None:
        with pytest.raises(LeaseError, match="not to its fork"):
            node.stats()

    with lifl.Node("4MiB", workers=1) as node:
        assert in_fork(ask) == 0
        assert node.stats().pid == os.getpid()
    with pytest.raises(LeaseError, match="closed"):
        node.stats()
