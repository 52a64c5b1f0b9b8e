"""The supervisor of a Node's workers: starts them, watches their pidfds, asks them for signs of life.

Knows processes, not rounds. A worker that was asked and gives no answer for too long, because it is stopped or stuck,
is killed. Its blocks may be taken over only then, when it is proven dead. The time is a parameter.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import select
import signal
import time
from collections.abc import Callable, Container
from functools import partial

import attrs

from lifl.errors import PeerGoneError
from lifl.workers.spawner import KILL_TIMEOUT_S, Spawner

log = logging.getLogger("lifl.workers.supervisor")

MAX_DEATHS_IN_A_ROW = 8
TICKS_PER_STALL = 4
LONGEST_TICK_S = 1.0
MAX_TRIES = 3
"""Spawners that are made for the start of one worker; then the start has failed."""
MAX_LOST_IN_A_ROW = 8
"""Spawners that may be lost one after another without any work done by a worker in between."""
RESTART_TIMEOUT_S = 15.0
"""The time for the first answer of a spawner that replaces another: rounds wait. Its files were read before: 0.3 s."""


@attrs.define
class _Worker:
    number: int
    pid: int
    parent: Spawner
    is_asked: bool = False
    silent_s: float = 0.0  # since it was asked for a sign of life
    rests_since_s: float | None = None
    is_heard: bool = False  # it has sent a message, so it may have read its own
    is_leaving: bool = False  # it was idle, and got a STOP


@attrs.frozen
class Dead:
    """A worker that is proven dead.

    Attributes
    ----------
    was_heard : bool
        The worker had sent a message since its start.
    was_leaving : bool
        The worker had got a STOP.
    was_orphaned : bool
        The spawner had died or been killed; the kernel then kills its workers, whatever they do.
    """

    number: int
    pid: int
    was_heard: bool
    was_leaving: bool
    was_orphaned: bool = False

    @property
    def died_of_work(self) -> bool:
        """True if the worker's work may have killed it."""
        return self.was_heard and not self.was_orphaned


class Supervisor:
    """The spawner and the workers, at first 1 to `count`; raises :class:`PeerGoneError` if they cannot be started.

    A spawner that is dead, stopped or stuck is replaced at the next start of a worker. `admit` returns the file
    descriptor for a worker that starts, or None; it is closed here.
    """

    def __init__(
        self,
        arena_fd: int,
        bell_fd: int,
        spin_s: float,
        count: int,
        stall_timeout: float,
        admit: Callable[[int], int | None] = lambda number: None,
    ) -> None:
        self._workers: dict[int, _Worker] = {}  # by pidfd
        self._deaths: dict[int, int] = {}  # worker -> its deaths since its last message
        self._stall_timeout = stall_timeout
        self._admit = admit
        self._last_tick_s: float | None = None
        self.tick_s = min(LONGEST_TICK_S, stall_timeout / TICKS_PER_STALL)
        self._vacant: set[int] = set()  # removed, and a successor not yet started or ruled out
        self._calls: dict[int, Callable[[], None]] = {}  # file descriptor -> what `wait` calls when it is readable
        self._make_spawner = partial(Spawner, arena_fd, bell_fd, spin_s)
        self._lost_in_a_row = 0  # spawners
        self.spawner = self._make_spawner()
        self._poll = select.epoll()
        try:
            self._poll.register(bell_fd, select.EPOLLIN)
            for number in range(1, 1 + count):
                # A single try at first: what is wrong with the first spawner is wrong with the next.
                self._start(number, tries=1)
        except BaseException:
            self.close()
            raise

    def listen(self, fd: int, then: Callable[[], None] | None = None) -> None:
        """Makes :meth:`wait` return when `fd` is readable too.

        With `then`, :meth:`wait` calls it before it returns, once for each arrival.
        """
        if then is not None:
            self._calls[fd] = then
        self._poll.register(fd, select.EPOLLIN if then is None else select.EPOLLIN | select.EPOLLET)

    def wait(self, timeout_s: float | None) -> list[int]:
        """Waits until the bell rings, a worker is dead, or the time is over; returns the pidfds of the dead.

        Other threads may start workers meanwhile.
        """
        seen = self._poll.poll(None if timeout_s is None else math.ceil(timeout_s * 1000) / 1000)
        for fd, _ in seen:
            if fd in self._calls:
                self._calls[fd]()
        return [fd for fd, _ in seen if fd in self._workers]

    @property
    def pids(self) -> tuple[int, ...]:
        """The process ids of the workers."""
        return tuple(worker.pid for worker in self._workers.values())

    def by_number(self) -> dict[int, int]:
        """The process ids of the workers that run, leaving or not, by their numbers."""
        return {worker.number: worker.pid for worker in self._workers.values()}

    @property
    def there(self) -> frozenset[int]:
        """The workers that need no start to get work. A removed one counts: its successor gets the work."""
        return frozenset(worker.number for worker in self._workers.values() if not worker.is_leaving) | self._vacant

    @property
    def leaving(self) -> frozenset[int]:
        """The workers that got a STOP and are not proven dead yet."""
        return frozenset(worker.number for worker in self._workers.values() if worker.is_leaving)

    def start(self, number: int) -> None:
        """Starts a worker. Raises :class:`PeerGoneError` with the reason if it cannot be started."""
        self._start(number, MAX_TRIES)

    def _start(self, number: int, tries: int) -> None:
        if self._deaths.get(number, 0) > MAX_DEATHS_IN_A_ROW:
            raise PeerGoneError(f"worker {number} died {MAX_DEATHS_IN_A_ROW} times before it had started")
        given = self._admit(number)
        try:
            pid, pidfd = self._fork(number, given, tries)
        finally:
            if given is not None:
                os.close(given)
        self._workers[pidfd] = _Worker(number, pid, self.spawner)
        self._vacant.discard(number)
        self._poll.register(pidfd, select.EPOLLIN)

    def _fork(self, number: int, given: int | None, tries: int) -> tuple[int, int]:
        """Asks the spawner for a worker; if that is gone, another one."""
        if self._lost_in_a_row >= MAX_LOST_IN_A_ROW and self.spawner.is_gone:
            self._lost_in_a_row = 0  # a later round may try again
            raise PeerGoneError(
                f"the process that starts workers died {MAX_LOST_IN_A_ROW} times before a worker had done anything: "
                "see what kills it (memory, limits, the kernel's log)"
            )
        for left in reversed(range(tries)):
            try:
                if self.spawner.is_gone:
                    self._replace_spawner()
                return self.spawner.start_worker(number, given)
            except PeerGoneError as error:
                if not self.spawner.is_gone or tries == 1:
                    raise
                log.warning("%s", str(error))  # a record that is kept must not keep the frames
                if not left:
                    advice = "see the log, and whether memory, processes and descriptors are left"
                    raise PeerGoneError(f"{error} ({tries} tries): {advice}") from error
        raise AssertionError("the last try has returned or raised")

    def _replace_spawner(self) -> None:
        """Kills and reaps the spawner, and makes another. Its workers are dead only when their own pidfds show it."""
        self._lost_in_a_row += 1
        self.spawner.kill()
        old, self.spawner = self.spawner, self._make_spawner(RESTART_TIMEOUT_S)
        log.warning("the process that starts workers (pid %d) is gone: pid %d replaces it", old.pid, self.spawner.pid)

    def remove(self, pidfd: int) -> Dead:
        """Removes a worker that is proven dead. A call of :meth:`start` or :meth:`leave_empty` must follow."""
        worker = self._workers.pop(pidfd)
        self._poll.unregister(pidfd)
        os.close(pidfd)
        # Exact for workers that have begun: the kernel kills them with the spawner, and they are dead only after the
        # spawner's pidfd shows its death. A worker that has not begun may end a little before.
        was_orphaned = worker.parent.is_gone
        if not worker.is_leaving and not was_orphaned:
            self._deaths[worker.number] = self._deaths.get(worker.number, 0) + 1
        self._vacant.add(worker.number)
        return Dead(worker.number, worker.pid, worker.is_heard, worker.is_leaving, was_orphaned)

    def leave_empty(self, number: int) -> None:
        """Leaves a worker, which was removed, without a successor for now."""
        self._vacant.discard(number)

    # ------------------------------------------------------------ rest

    def retire(self, now_s: float, busy: Container[int], idle_timeout: float) -> tuple[list[int], float | None]:
        """The workers that were idle for `idle_timeout` seconds, for the caller to stop; the seconds until the next.

        `busy` workers have a part in a round. The seconds are None if no worker is idle.
        """
        leaving, left_s = [], None
        for worker in self._workers.values():
            if worker.is_leaving:
                continue
            if worker.number in busy:
                worker.rests_since_s = None
                continue
            if worker.rests_since_s is None:
                worker.rests_since_s = now_s
            rest = worker.rests_since_s + idle_timeout - now_s
            if rest <= 0:
                worker.is_leaving = True
                leaving.append(worker.number)
            else:
                left_s = rest if left_s is None else min(left_s, rest)
        return leaving, left_s

    # ------------------------------------------------------------ signs of life

    def heard(self, number: int, has_worked: bool) -> None:
        """Notes a message of a worker: it has worked, or it only lives."""
        self._deaths[number] = 0
        if has_worked:
            self._lost_in_a_row = 0
        for worker in self._workers.values():
            if worker.number == number:
                worker.is_asked, worker.silent_s, worker.is_heard = False, 0.0, True
                if has_worked:  # between two looks it may have had a part in rounds
                    worker.rests_since_s = None

    def tick(self, now_s: float, work_s: float) -> list[int]:
        """Kills the workers that were silent for too long; returns those to ask for a sign of life.

        Parameters
        ----------
        now_s : float
            The time on the monotonic clock.
        work_s : float
            Seconds that one piece of work may take beyond the stall timeout.
        """
        # Silence is counted in ticks, not by the clock: if this process was stopped too, the workers are not to blame.
        passed = 0.0 if self._last_tick_s is None else min(now_s - self._last_tick_s, 2 * self.tick_s)
        self._last_tick_s = now_s
        asked = []
        for pidfd, worker in self._workers.items():
            if not worker.is_asked:
                worker.is_asked = True
                asked.append(worker.number)
                continue
            worker.silent_s += passed
            if worker.silent_s >= self._stall_timeout + work_s:
                silent = f"worker {worker.number} (pid {worker.pid}) gave no sign of life for {worker.silent_s:.1f} s"
                log.warning("%s: killed", silent)
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        return asked

    def rest(self) -> None:
        """Ends the wait for signs of life: no round asks anything of the workers."""
        self._last_tick_s = None
        for worker in self._workers.values():
            worker.is_asked, worker.silent_s = False, 0.0

    def close(self) -> None:
        """Ends the spawner and every worker; returns when they are gone."""
        self.spawner.close()
        deadline = time.monotonic() + KILL_TIMEOUT_S
        for pidfd in self._workers:  # workers die a moment after a spawner that was killed
            poll = select.poll()
            poll.register(pidfd, select.POLLIN)
            poll.poll(max(0.0, deadline - time.monotonic()) * 1000)
            os.close(pidfd)
        self._workers = {}
        self._poll.close()
