"""Signs of life: who is asked, who is killed for silence, and who is not."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import pytest

from lifl.crew import Crew
from lifl.ring import Bell
from lifl.shm import Arena

STALL_S = 8.0


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
        crew.heard(1)
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
    pidfd, pid = crew.pidfds[0], crew.pids[0]
    os.kill(pid, signal.SIGKILL)
    assert crew.bury(pidfd) == (1, pid)
    successor = crew.start(1)
    assert successor in crew.pidfds
    assert len(crew.pids) == 2
    assert pid not in crew.pids
