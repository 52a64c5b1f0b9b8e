"""A process and the others that it forks to pass messages with: where they run, how long a trip took, what CPU time.

Owns the forks: each ends when its function returns, or with the process that forked it. Judges nothing.
"""

from __future__ import annotations

import ctypes
import os
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from lifl.workers.aggregator import die_with

ASKER, ECHO = 0, 1
"""The two sides; also participants of an arena between them."""
PAYLOAD = bytes(16)
"""What the ways without rings carry: as many bytes as a descriptor has."""

Measure = Callable[[int], list[int]]
"""Makes so many round trips; the nanoseconds of each."""

_libc = ctypes.CDLL(None, use_errno=True)
_others: list[int] = []
"""The processes that this one has forked and that have not ended."""
_cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def share_a_core() -> None:
    """Keeps this process, and all that it will fork, to one core."""
    del _cores[1:]
    os.sched_setaffinity(0, _cores)


def timed(trip: Callable[[], object], messages: int) -> list[int]:
    """Makes so many trips, one after another; the nanoseconds of each."""
    trips = []
    for _ in range(messages):
        begin = time.perf_counter_ns()
        trip()
        trips.append(time.perf_counter_ns() - begin)
    return trips


@contextmanager
def forked(echo: Callable[[], None]) -> Iterator[None]:
    """Runs `echo` in a child until it returns; the caller makes it return before the end."""
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            die_with(parent)
            _take_half(ECHO)
            echo()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    _others.append(pid)
    _take_half(ASKER)
    yield
    os.waitpid(pid, 0)
    _others.remove(pid)


def _take_half(me: int) -> None:
    """Each side keeps to its half of the cores.

    Left alone, the scheduler sometimes puts both on one core: then a wake-up is a context switch, ten
    times as fast as waking an idle core, and the figures jump between the two.
    """
    if len(_cores) > 1:
        os.sched_setaffinity(0, _cores[me::2])


def spent_ns() -> int:
    """CPU time, user's and kernel's, that this process and all that it has forked have taken, in nanoseconds."""
    spent = time.process_time_ns()
    for pid in _others:
        clock = ctypes.c_int()
        if error := _libc.clock_getcpuclockid(ctypes.c_int(pid), ctypes.byref(clock)):
            raise OSError(error, f"CPU clock of process {pid}: {os.strerror(error)}")
        spent += time.clock_gettime_ns(clock.value)
    return spent
