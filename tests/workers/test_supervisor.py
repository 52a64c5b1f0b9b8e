"""Signs of life: who is asked, who is killed for silence, and who is not."""

from __future__ import annotations

import os
import resource
import signal
import time
from collections.abc import Iterator

import pytest

from lifl.errors import PeerGoneError
from lifl.shm.arena import Arena
from lifl.shm.ring import Bell
from lifl.workers.supervisor import Dead, Supervisor

STALL_S = 8.0
WAIT_S = 10.0


@pytest.fixture
def supervisor() -> Iterator[Supervisor]:
    """Two real workers, which nobody asks anything through their rings."""
    arena, bell = Arena.create(2**20, 4), Bell()
    supervisor = Supervisor(arena.fd, bell.fd, 0.0, 2, STALL_S)
    yield supervisor
    supervisor.close()
    bell.close()
    arena.close()


def is_alive(pid: int) -> bool:
    """False once it is dead, reaped or not; waits a moment for a kill to take effect."""
    end = time.monotonic() + 0.5
    while time.monotonic() < end:
        try:
            with open(f"/proc/{pid}/stat") as file:
                if file.read().rpartition(") ")[2][0] == "Z":
                    return False
        except FileNotFoundError:
            return False
        time.sleep(0.01)
    return True


def test_only_the_silent_one_is_killed(supervisor: Supervisor) -> None:
    """Asked once, a worker that answers lives; one that does not is killed when the time is over, not before."""
    first, second = supervisor.pids
    assert supervisor.tick(0.0, 0.0) == [1, 2]
    for second_s in range(1, 9):
        supervisor.heard(1, False)
        assert supervisor.tick(float(second_s), 0.0) == [1]
    assert supervisor.tick(8.5, 0.0) == []
    assert is_alive(first)
    assert not is_alive(second)


def test_work_takes_its_time(supervisor: Supervisor) -> None:
    """A worker that may be reading all of a large arena is given the time for it."""
    supervisor.tick(0.0, 5.0)
    for second in range(1, 13):
        supervisor.tick(float(second), 5.0)
    assert all(is_alive(pid) for pid in supervisor.pids)
    supervisor.tick(14.0, 5.0)
    assert not any(is_alive(pid) for pid in supervisor.pids)


def test_nobody_is_blamed_for_a_pause_of_this_process(supervisor: Supervisor) -> None:
    """An hour between two looks is this process's own absence."""
    supervisor.tick(0.0, 0.0)
    assert supervisor.tick(3600.0, 0.0) == []
    assert all(is_alive(pid) for pid in supervisor.pids)


def test_rest_forgives_silence(supervisor: Supervisor) -> None:
    """A worker without work is not asked, and its time begins anew when it has work."""
    for second in range(8):
        supervisor.tick(float(second), 0.0)
    supervisor.rest()
    assert supervisor.tick(100.0, 0.0) == [1, 2]
    supervisor.tick(101.0, 0.0)
    assert all(is_alive(pid) for pid in supervisor.pids)


def test_a_dead_worker_has_a_successor(supervisor: Supervisor) -> None:
    """A pidfd tells the death; the successor has the same number and another process."""
    pid = supervisor.pids[0]
    os.kill(pid, signal.SIGKILL)
    (pidfd,) = supervisor.wait(WAIT_S)
    assert supervisor.remove(pidfd) == Dead(1, pid, was_heard=False, was_leaving=False)
    assert len(supervisor.pids) == 1
    assert supervisor.there == {1, 2}  # as good as: its successor comes next
    supervisor.start(1)
    assert supervisor.there == {1, 2}
    assert pid not in supervisor.pids


def test_a_worker_at_rest_is_ended(supervisor: Supervisor) -> None:
    """A worker that has had nothing to do for so long is asked to stop, once; work in between restarts the time."""
    assert supervisor.retire(0.0, set(), 10.0) == ([], 10.0)
    assert supervisor.retire(6.0, {2}, 10.0) == ([], 4.0)
    assert supervisor.retire(9.0, set(), 10.0) == ([], 1.0)
    assert supervisor.retire(10.5, set(), 10.0) == ([1], 8.5)
    assert (supervisor.there, supervisor.leaving) == ({2}, {1})
    assert supervisor.retire(11.0, {2}, 10.0) == ([], None)


def test_who_works_between_two_looks_does_not_rest(supervisor: Supervisor) -> None:
    """Nobody is seen at work in short rounds; what a worker says of them counts. That it is there does not."""
    supervisor.retire(0.0, set(), 10.0)
    supervisor.heard(1, True)
    supervisor.heard(2, False)
    assert supervisor.retire(10.0, set(), 10.0)[0] == [2]


def test_one_that_was_told_to_stop_counts_as_no_death(supervisor: Supervisor) -> None:
    """Its end is what was asked of it."""
    supervisor.retire(0.0, set(), 1.0)
    assert supervisor.retire(2.0, {2}, 1.0)[0] == [1]
    pid = supervisor.pids[0]
    os.kill(pid, signal.SIGKILL)
    (pidfd,) = supervisor.wait(WAIT_S)
    assert supervisor.remove(pidfd) == Dead(1, pid, was_heard=False, was_leaving=True)
    supervisor.leave_empty(1)
    assert supervisor.there == {2}


# ---------------------------------------------------------------- the process that starts them


def bury_all(supervisor: Supervisor, count: int) -> list[Dead]:
    """Buries so many, each when its own pidfd says that it is dead."""
    dead: list[Dead] = []
    end = time.monotonic() + WAIT_S
    while len(dead) < count and time.monotonic() < end:
        dead += map(supervisor.remove, supervisor.wait(WAIT_S))
    return sorted(dead, key=lambda one: one.number)


def test_a_dead_spawner_takes_its_workers_along_and_is_replaced(supervisor: Supervisor) -> None:
    """Nothing that they were given is to blame; the next start has another spawner, and the old one is reaped."""
    first, second = supervisor.pids
    old = supervisor.spawner.pid
    supervisor.heard(1, True)
    os.kill(old, signal.SIGKILL)
    dead = bury_all(supervisor, 2)
    assert [(one.number, one.pid) for one in dead] == [(1, first), (2, second)]
    # One that has not begun may see that the spawner's end of a pipe is gone, and end, before the kernel kills it.
    assert dead[0] == Dead(1, first, was_heard=True, was_leaving=False, was_orphaned=True)
    assert not any(one.died_of_work for one in dead)
    supervisor.start(1)
    assert supervisor.spawner.pid != old
    with pytest.raises(ProcessLookupError):
        os.kill(old, 0)
    supervisor.start(2)
    assert len({*supervisor.pids, first, second}) == 4


def test_a_worker_that_dies_alone_may_have_died_of_work(supervisor: Supervisor) -> None:
    """Its spawner lives, and it had said a word."""
    supervisor.heard(1, False)
    os.kill(supervisor.pids[0], signal.SIGKILL)
    (dead,) = bury_all(supervisor, 1)
    assert dead.died_of_work


def test_a_stopped_spawner_is_not_waited_for_for_ever(supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stopped spawner is killed when its time is over, and its workers die; the start goes on with another."""
    monkeypatch.setattr("lifl.workers.spawner.FORK_TIMEOUT_S", 0.2)
    old = supervisor.spawner.pid
    os.kill(supervisor.pids[0], signal.SIGKILL)
    bury_all(supervisor, 1)
    os.kill(old, signal.SIGSTOP)
    supervisor.start(1)
    assert supervisor.spawner.pid != old
    (dead,) = bury_all(supervisor, 1)
    assert (dead.number, dead.was_orphaned) == (2, True)


def test_a_spawner_that_refuses_is_kept(supervisor: Supervisor) -> None:
    """No process or descriptor is left for a worker: another spawner would have none either, and the others go on."""
    old, pids = supervisor.spawner.pid, supervisor.pids
    limit = resource.prlimit(old, resource.RLIMIT_NOFILE)
    resource.prlimit(old, resource.RLIMIT_NOFILE, (3, limit[1]))
    with pytest.raises(PeerGoneError, match="Too many open files"):
        supervisor.start(3)
    resource.prlimit(old, resource.RLIMIT_NOFILE, limit)
    assert (supervisor.spawner.pid, supervisor.pids) == (old, pids)
    supervisor.start(3)
    assert supervisor.spawner.pid == old
