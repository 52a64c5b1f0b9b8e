"""Signs of life: who is asked, who is killed for silence, and who is not."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import pytest

from lifl.crew import Crew, Dead
from lifl.ring import Bell
from lifl.shm import Arena

STALL_S = 8.0
WAIT_S = 10.0


@pytest.fixture
def crew() -> Iterator[Crew]:
    """Two real workers, which nobody asks anything through their rings."""
    arena, bell = Arena.create(2**20, 3), Bell()
    crew = Crew(arena.fd, bell.fd, 0.0, 2, STALL_S)
    yield crew
    crew.close()
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


def test_only_the_silent_one_is_killed(crew: Crew) -> None:
    """Asked once, a worker that answers lives; one that does not is killed when the time is over, not before."""
    first, second = crew.pids
    assert crew.tick(0.0, 0.0) == [1, 2]
    for second_s in range(1, 9):
        crew.heard(1, False)
        assert crew.tick(float(second_s), 0.0) == [1]
    assert crew.tick(8.5, 0.0) == []
    assert is_alive(first)
    assert not is_alive(second)


def test_work_takes_its_time(crew: Crew) -> None:
    """Who may be reading all of a large arena is given the time for it."""
    crew.tick(0.0, 5.0)
    for second in range(1, 13):
        crew.tick(float(second), 5.0)
    assert all(is_alive(pid) for pid in crew.pids)
    crew.tick(14.0, 5.0)
    assert not any(is_alive(pid) for pid in crew.pids)


def test_nobody_is_blamed_for_a_pause_of_this_process(crew: Crew) -> None:
    """An hour between two looks is this process's own absence."""
    crew.tick(0.0, 0.0)
    assert crew.tick(3600.0, 0.0) == []
    assert all(is_alive(pid) for pid in crew.pids)


def test_rest_forgives_silence(crew: Crew) -> None:
    """Who owes nothing is not asked, and starts anew when he does."""
    for second in range(8):
        crew.tick(float(second), 0.0)
    crew.rest()
    assert crew.tick(100.0, 0.0) == [1, 2]
    crew.tick(101.0, 0.0)
    assert all(is_alive(pid) for pid in crew.pids)


def test_a_dead_one_is_buried_and_has_a_successor(crew: Crew) -> None:
    """A pidfd tells the death; the successor has the same number and another process."""
    pid = crew.pids[0]
    os.kill(pid, signal.SIGKILL)
    (pidfd,) = crew.wait(WAIT_S)
    assert crew.bury(pidfd) == Dead(1, pid, was_heard=False, was_leaving=False)
    assert len(crew.pids) == 1
    assert crew.there == {1, 2}  # as good as: its successor comes next
    crew.start(1)
    assert crew.there == {1, 2}
    assert pid not in crew.pids


def test_who_rests_is_dismissed(crew: Crew) -> None:
    """Who has had nothing to do for so long is told to stop, once; who works in between begins to rest anew."""
    assert crew.dismiss(0.0, set(), 10.0) == ([], 10.0)
    assert crew.dismiss(6.0, {2}, 10.0) == ([], 4.0)
    assert crew.dismiss(9.0, set(), 10.0) == ([], 1.0)
    assert crew.dismiss(10.5, set(), 10.0) == ([1], 8.5)
    assert (crew.there, crew.leaving) == ({2}, {1})
    assert crew.dismiss(11.0, {2}, 10.0) == ([], None)


def test_who_works_between_two_looks_does_not_rest(crew: Crew) -> None:
    """Nobody is seen at work in short rounds; what a worker says of them counts. That it is there does not."""
    crew.dismiss(0.0, set(), 10.0)
    crew.heard(1, True)
    crew.heard(2, False)
    assert crew.dismiss(10.0, set(), 10.0)[0] == [2]


def test_one_that_was_told_to_stop_counts_as_no_death(crew: Crew) -> None:
    """Its end is what was asked of it."""
    crew.dismiss(0.0, set(), 1.0)
    assert crew.dismiss(2.0, {2}, 1.0)[0] == [1]
    pid = crew.pids[0]
    os.kill(pid, signal.SIGKILL)
    (pidfd,) = crew.wait(WAIT_S)
    assert crew.bury(pidfd) == Dead(1, pid, was_heard=False, was_leaving=True)
    crew.leave_empty(1)
    assert crew.there == {2}
