"""A process and its forks that pass messages back and forth: their cores, the times of the trips, their CPU time.

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
"""Numbers of the two sides, also in an arena that they share."""
PAYLOAD = bytes(16)
"""Message for the ways without rings, with as many bytes as a descriptor."""

Measure = Callable[[int], list[int]]
"""Makes a number of round trips; returns the nanoseconds of each."""

_libc = ctypes.CDLL(None, use_errno=True)
_others: list[int] = []
"""Ids of the forked processes that have not ended."""
_cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def share_a_core() -> None:
    """Binds this process, and its later forks, to one core."""
    del _cores[1:]
    os.sched_setaffinity(0, _cores)


def timed(trip: Callable[[], object], messages: int) -> list[int]:
    """Calls `trip` `messages` times, one after another; the nanoseconds of each call."""
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


def _take_half(side: int) -> None:
    """Binds this process to its side's half of the cores.

    Otherwise the scheduler sometimes puts both sides on one core: then a wake-up is a context switch, ten
    times as fast as waking an idle core, and the figures jump between the two.
    """
    if len(_cores) > 1:
        os.sched_setaffinity(0, _cores[side::2])


def spent_ns() -> int:
    """Nanoseconds of CPU time, user's and kernel's, of this process and its living forks."""
    spent = time.process_time_ns()
    for pid in _others:
        clock = ctypes.c_int()
        if error := _libc.clock_getcpuclockid(ctypes.c_int(pid), ctypes.byref(clock)):
            raise OSError(error, f"CPU clock of process {pid}: {os.strerror(error)}")
        spent += time.clock_gettime_ns(clock.value)
    return spent
