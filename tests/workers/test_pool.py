"""The workers that a round gets: idle ones, else new ones, else those with the least work; and idle workers end."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator

import attrs
import numpy as np
import pytest

import lifl
from lifl.errors import PeerGoneError
from lifl.round.round import core_of
from lifl.shm.arena import Arena
from lifl.shm.ring import Bell
from lifl.workers.pool import Pool
from lifl.workers.supervisor import Supervisor

pytestmark = pytest.mark.transports

SPEC = lifl.TensorSpec.from_arrays({"w": np.zeros(64)})
WAIT_S = 30.0


@attrs.define
class Bench:
    """A pool of up to four real workers, of whom two are there, and what they do."""

    pool: Pool
    supervisor: Supervisor
    engaged: Counter[int]


@pytest.fixture
def bench() -> Iterator[Bench]:
    """Nobody asks the workers anything."""
    arena, bell = Arena.create(2**20, 5), Bell()
    supervisor, engaged = Supervisor(arena.fd, bell.fd, 0.0, 2, 60.0), Counter[int]()
    yield Bench(Pool(4, supervisor, lambda: engaged), supervisor, engaged)
    supervisor.close()
    bell.close()
    arena.close()


def test_who_rests_comes_first(bench: Bench) -> None:
    """No process is started while one has nothing to do."""
    assert set(bench.pool.choose(2)) == {1, 2}
    bench.engaged[1] = 1
    assert bench.pool.choose(1) == (2,)
    assert bench.pool.choose(1, {2}) != (1,)
    assert bench.pool.cold_starts == 1


def test_new_ones_are_started_up_to_the_cap(bench: Bench) -> None:
    """If all who are there are busy; beyond the cap the one with least to do has one thing more."""
    bench.engaged.update({1: 2, 2: 1})
    assert set(bench.pool.choose(9)) == {1, 2, 3, 4}
    assert (len(bench.supervisor.pids), bench.pool.cold_starts) == (4, 2)
    bench.engaged.update({3: 3, 4: 3})
    assert bench.pool.choose(1) == (2,)
    assert bench.pool.choose(1, {1, 2, 3, 4}) == ()
    assert bench.pool.cold_starts == 2


def test_prepared_ones_are_there(bench: Bench) -> None:
    """Asked for in time, they need not be started when they are needed; twice is once."""
    for _ in range(2):
        bench.pool.prepare(3)
    assert (bench.supervisor.there, bench.pool.cold_starts) == ({1, 2, 3}, 1)
    bench.pool.prepare(99)
    assert bench.supervisor.there == {1, 2, 3, 4}


def test_who_cannot_be_started_is_done_without(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a limit of processes or descriptors the work goes on with who is there; if nobody is, it is an error."""

    def refuse(me: int) -> None:
        raise PeerGoneError(f"no descriptor is left for worker {me}")

    monkeypatch.setattr(bench.supervisor, "start", refuse)
    bench.engaged.update({1: 1, 2: 2})
    assert bench.pool.choose(3) == (1, 2)
    bench.pool.prepare(4)
    assert bench.supervisor.there == {1, 2}
    with pytest.raises(PeerGoneError, match="no descriptor is left"):
        bench.pool.choose(1, {1, 2})


def test_those_alike_take_turns(bench: Bench) -> None:
    """Round after round, the first is another one."""
    assert sorted(bench.pool.choose(1)[0] for _ in range(4)) == [1, 1, 2, 2]


def test_one_in_this_process() -> None:
    """Without processes there is one worker, which is always there."""
    pool = Pool(1, None, Counter)
    assert (pool.choose(3), pool.choose(1, {1}), pool.present) == ((1,), (), {1})
    pool.prepare(5)
    assert pool.cold_starts == 0


# ---------------------------------------------------------------- in a Node


def run(node: lifl.Node, **how: object) -> lifl.RoundReport:
    """Runs a round of eight updates."""
    with node.open_round(SPEC, 8, **how) as round_:  # type: ignore[arg-type]
        for i in range(8):
            round_.submit({"w": np.full(64, float(i))})
        result = round_.result(WAIT_S)
    assert (result.arrays["w"] == 3.5).all()
    return result.report


@pytest.mark.parametrize("shape", [None, lifl.Shape(2, 0), lifl.Shape(0, 2), lifl.Shape(2, 2)], ids=str)
def test_second_round_starts_nobody(shape: lifl.Shape | None) -> None:
    """The first one warms the pool; after it every role is taken by who is there."""
    with lifl.Node("8MiB", workers=2, warm=0) as node:
        assert node.pids() == ()
        first = run(node, shape=shape)
        pids = node.pids()
        assert first.started == len(pids) > 0
        for _ in range(5):
            assert run(node, shape=shape).started == 0
        assert node.pids() == pids


def test_scale_to_zero_and_back() -> None:
    """After the idle timeout nobody is left; the next round starts who it needs, and is right."""
    with lifl.Node("8MiB", workers=2, idle_timeout=0.05) as node:
        free = node.arena.free_bytes
        for _ in range(3):
            run(node, shape=lifl.Shape(2, 2))
            end = time.monotonic() + WAIT_S
            while node.pids():
                assert time.monotonic() < end, "somebody stays"
                time.sleep(0.01)
        assert node.arena.free_bytes == free


def test_an_open_round_keeps_only_who_works_for_it() -> None:
    """A leaf with a sum stays, however long the next update takes; the others go."""
    shape = lifl.Shape(1, 1)
    with (
        lifl.Node("8MiB", workers=3, idle_timeout=0.05) as node,
        node.open_round(SPEC, 2, shape=shape) as round_,
    ):
        round_.submit({"w": np.ones(64)})
        end = time.monotonic() + WAIT_S
        while len(node.pids()) > 1:
            assert time.monotonic() < end, "somebody stays"
            time.sleep(0.01)
        time.sleep(0.2)
        assert len(node.pids()) == 1
        round_.submit({"w": np.zeros(64)})
        assert (round_.result(WAIT_S).arrays["w"] == 0.5).all()


def test_ended_at_any_moment() -> None:
    """Rounds that come just when workers are told to stop are right, and lose nothing."""
    with lifl.Node("8MiB", workers=2, idle_timeout=0.004) as node:
        free = node.arena.free_bytes
        for i in range(60):
            run(node, shape=(lifl.Shape(2, 0), lifl.Shape(0, 2), lifl.Shape(2, 2), None)[i % 4])
            time.sleep(0.0005 * (i % 16))
        end = time.monotonic() + WAIT_S
        while node.arena.free_bytes != free:
            assert time.monotonic() < end, "blocks are lost"
            time.sleep(0.01)


def test_leaves_join_on_demand() -> None:
    """A single leaf serves while it keeps up; another one joins when work waits behind work."""
    update = {"w": np.ones(64)}
    with lifl.Node("8MiB", workers=3, warm=0) as node:
        # The shape allows three, and is not given as an order: as the planner would.
        with node.open_round(SPEC, 40) as round_:
            core_of(round_).lifecycle._pace.shape = lifl.Shape(3, 2)
            core_of(round_).lifecycle._pace._is_planned = False
            for _ in range(2):
                round_.submit(update)
                time.sleep(0.1)
            assert len(core_of(round_).lifecycle._assignment.leaves) == 1
            for pid in node.pids():
                os.kill(pid, 19)  # SIGSTOP
            for _ in range(6):
                round_.submit(update)
            for pid in node.pids():
                os.kill(pid, 18)  # SIGCONT
            for _ in range(32):
                round_.submit(update)
            report = round_.result(WAIT_S).report
        assert 1 < report.leaves <= 3
        assert report.started >= 2


@pytest.mark.parametrize("wrong", [{"warm": 3}, {"warm": -1}, {"idle_timeout": 0}, {"idle_timeout": float("nan")}])
def test_nonsense_is_refused(wrong: dict[str, float]) -> None:
    """The message has the value."""
    with pytest.raises(ValueError, match=r"warm=|idle_timeout="):
        lifl.Node("8MiB", workers=2, **wrong)  # type: ignore[arg-type]
