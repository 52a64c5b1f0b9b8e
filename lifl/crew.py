"""A Node's workers as its agent holds them: started, watched by pidfd, asked for a sign of life.

Knows processes, not rounds. A worker that was asked and has not answered for too long, because it is
stopped or stuck, is killed; only then, when it is proven dead, may what it held be taken up. Time comes in.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal

import attrs

from lifl.errors import PeerGoneError
from lifl.nursery import Nursery

log = logging.getLogger("lifl.crew")

MOST_DEATHS_IN_A_ROW = 8
TICKS_PER_STALL = 4
LONGEST_TICK_S = 1.0


@attrs.define
class _Worker:
    me: int
    pid: int
    is_asked: bool = False
    silent_s: float = 0.0  # since it was asked


class Crew:
    """The nursery and its workers 1 to `count`; raises :class:`PeerGoneError` if they cannot be started."""

    def __init__(self, arena_fd: int, bell_fd: int, spin_s: float, count: int, stall_timeout: float) -> None:
        self._workers: dict[int, _Worker] = {}  # by pidfd
        self._deaths: dict[int, int] = {}  # worker -> since it was last heard
        self._stall_timeout = stall_timeout
        self._last_tick_s: float | None = None
        self.tick_s = min(LONGEST_TICK_S, stall_timeout / TICKS_PER_STALL)
        self.nursery = Nursery(arena_fd, bell_fd, spin_s)
        try:
            for me in range(1, 1 + count):
                self.start(me)
        except BaseException:
            self.close()
            raise

    @property
    def pidfds(self) -> tuple[int, ...]:
        """A descriptor of each worker, readable when that is dead."""
        return tuple(self._workers)

    @property
    def pids(self) -> tuple[int, ...]:
        """The workers' process ids."""
        return tuple(worker.pid for worker in self._workers.values())

    def start(self, me: int) -> int:
        """Starts worker `me`; its pidfd, which stays the crew's."""
        if self._deaths.get(me, 0) > MOST_DEATHS_IN_A_ROW:
            raise PeerGoneError(f"worker {me} died {MOST_DEATHS_IN_A_ROW} times before it had started")
        pid, pidfd = self.nursery.start_worker(me)
        self._workers[pidfd] = _Worker(me, pid)
        return pidfd

    def bury(self, pidfd: int) -> tuple[int, int]:
        """A worker is proven dead: who it was, and its pid."""
        worker = self._workers.pop(pidfd)
        os.close(pidfd)
        self._deaths[worker.me] = self._deaths.get(worker.me, 0) + 1
        return worker.me, worker.pid

    # ------------------------------------------------------------ signs of life

    def heard(self, me: int) -> None:
        """Worker `me` said something."""
        self._deaths[me] = 0
        for worker in self._workers.values():
            if worker.me == me:
                worker.is_asked, worker.silent_s = False, 0.0

    def tick(self, now_s: float, work_s: float) -> list[int]:
        """Kills who has been silent for too long; whom to ask for a sign of life.

        Parameters
        ----------
        now_s : float
            On the monotonic clock.
        work_s : float
            Seconds that one uninterrupted piece of work may take, beside the stall timeout.
        """
        # Counted in ticks, not by the clock: if this process was stopped too, nobody else is to blame.
        passed = 0.0 if self._last_tick_s is None else min(now_s - self._last_tick_s, 2 * self.tick_s)
        self._last_tick_s = now_s
        asked = []
        for pidfd, worker in self._workers.items():
            if not worker.is_asked:
                worker.is_asked = True
                asked.append(worker.me)
                continue
            worker.silent_s += passed
            if worker.silent_s >= self._stall_timeout + work_s:
                silent = f"worker {worker.me} (pid {worker.pid}) gave no sign of life for {worker.silent_s:.1f} s"
                log.warning("%s: killed", silent)
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        return asked

    def rest(self) -> None:
        """Nothing is asked of the workers, so nobody waits for a sign."""
        self._last_tick_s = None
        for worker in self._workers.values():
            worker.is_asked, worker.silent_s = False, 0.0

    def close(self) -> None:
        """Ends the nursery and every worker; returns when they are gone."""
        self.nursery.close()
        for pidfd in self._workers:
            os.close(pidfd)
        self._workers = {}
