"""A Node's workers as its agent holds them: started, watched by pidfd, asked for a sign of life.

Knows processes, not rounds. A worker that was asked and has not answered for too long, because it is
stopped or stuck, is killed; only then, when it is proven dead, may what it held be taken up. Time comes in.
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
"""Spawners that are made for one worker, before it is given up."""
MAX_LOST_IN_A_ROW = 8
"""Spawners that may be lost without a worker's having done anything meanwhile."""
RESTART_TIMEOUT_S = 15.0
"""For the first answer of a spawner that replaces one: rounds wait. Its files were read before; it takes 0.3 s."""


@attrs.define
class _Worker:
    me: int
    pid: int
    parent: Spawner
    is_asked: bool = False
    silent_s: float = 0.0  # since it was asked
    rests_since_s: float | None = None
    is_heard: bool = False  # it has said a word, so that it may have read what it was given
    is_leaving: bool = False  # it has been told to stop, because it had nothing to do


@attrs.frozen
class Dead:
    """Who is proven dead.

    Attributes
    ----------
    was_heard : bool
        It had said a word since its start.
    was_leaving : bool
        It had been told to stop.
    was_orphaned : bool
        The spawner had died or been killed, and the kernel then kills its workers, whatever they do.
    """

    me: int
    pid: int
    was_heard: bool
    was_leaving: bool
    was_orphaned: bool = False

    @property
    def died_of_work(self) -> bool:
        """True if what it was given may have killed it."""
        return self.was_heard and not self.was_orphaned


class Supervisor:
    """The spawner and its workers, at first 1 to `count`; raises :class:`PeerGoneError` if they cannot be started.

    A spawner that is dead, stopped or stuck is replaced when a worker has to be started.
    `admit` is asked for the descriptor that a worker is given when it starts, which is closed here.
    """

    def __init__(
        self,
        arena_fd: int,
        bell_fd: int,
        spin_s: float,
        count: int,
        stall_timeout: float,
        admit: Callable[[int], int | None] = lambda me: None,
    ) -> None:
        self._workers: dict[int, _Worker] = {}  # by pidfd
        self._deaths: dict[int, int] = {}  # worker -> since it was last heard
        self._stall_timeout, self._admit = stall_timeout, admit
        self._last_tick_s: float | None = None
        self.tick_s = min(LONGEST_TICK_S, stall_timeout / TICKS_PER_STALL)
        self._vacant: set[int] = set()  # buried, and not decided yet whether they have a successor
        self._calls: dict[int, Callable[[], None]] = {}  # by descriptor that is listened to
        self._make_spawner = partial(Spawner, arena_fd, bell_fd, spin_s)
        self._lost_in_a_row = 0  # spawners
        self.spawner = self._make_spawner()
        self._poll = select.epoll()
        try:
            self._poll.register(bell_fd, select.EPOLLIN)
            for me in range(1, 1 + count):
                # At first one try: what is wrong with the first spawner is wrong with the next.
                self._start(me, tries=1)
        except BaseException:
            self.close()
            raise

    def listen(self, fd: int, then: Callable[[], None] | None = None) -> None:
        """:meth:`wait` returns when this is readable too.

        With `then` it calls that before it returns, once each time that something more has come.
        """
        if then is not None:
            self._calls[fd] = then
        self._poll.register(fd, select.EPOLLIN if then is None else select.EPOLLIN | select.EPOLLET)

    def wait(self, timeout_s: float | None) -> list[int]:
        """Waits until the bell rings, a worker is dead, or the time is over; the pidfds of the dead.

        Workers may be started meanwhile, by other threads.
        """
        seen = self._poll.poll(None if timeout_s is None else math.ceil(timeout_s * 1000) / 1000)
        for fd, _ in seen:
            if fd in self._calls:
                self._calls[fd]()
        return [fd for fd, _ in seen if fd in self._workers]

    @property
    def pids(self) -> tuple[int, ...]:
        """The workers' process ids."""
        return tuple(worker.pid for worker in self._workers.values())

    def by_number(self) -> dict[int, int]:
        """The process ids of the workers that are there, leaving or not, by their numbers."""
        return {worker.me: worker.pid for worker in self._workers.values()}

    @property
    def there(self) -> frozenset[int]:
        """The workers that can be given work without starting them; one that was buried will have a successor then."""
        return frozenset(worker.me for worker in self._workers.values() if not worker.is_leaving) | self._vacant

    @property
    def leaving(self) -> frozenset[int]:
        """The workers that were told to stop and are not proven dead yet."""
        return frozenset(worker.me for worker in self._workers.values() if worker.is_leaving)

    def start(self, me: int) -> None:
        """Starts worker `me`. Raises :class:`PeerGoneError` if it cannot be started, with the reason."""
        self._start(me, MAX_TRIES)

    def _start(self, me: int, tries: int) -> None:
        if self._deaths.get(me, 0) > MAX_DEATHS_IN_A_ROW:
            raise PeerGoneError(f"worker {me} died {MAX_DEATHS_IN_A_ROW} times before it had started")
        given = self._admit(me)
        try:
            pid, pidfd = self._fork(me, given, tries)
        finally:
            if given is not None:
                os.close(given)
        self._workers[pidfd] = _Worker(me, pid, self.spawner)
        self._vacant.discard(me)
        self._poll.register(pidfd, select.EPOLLIN)

    def _fork(self, me: int, given: int | None, tries: int) -> tuple[int, int]:
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
                return self.spawner.start_worker(me, given)
            except PeerGoneError as error:
                if not self.spawner.is_gone or tries == 1:
                    raise
                log.warning("%s", str(error))  # a record that is kept must not keep the frames
                if not left:
                    advice = "see the log, and whether memory, processes and descriptors are left"
                    raise PeerGoneError(f"{error} ({tries} tries): {advice}") from error
        raise AssertionError("the last try has returned or raised")

    def _replace_spawner(self) -> None:
        """The old one is reaped. Its workers are dead when their own pidfds say so, not before."""
        self._lost_in_a_row += 1
        self.spawner.kill()
        old, self.spawner = self.spawner, self._make_spawner(RESTART_TIMEOUT_S)
        log.warning("the process that starts workers (pid %d) is gone: pid %d replaces it", old.pid, self.spawner.pid)

    def bury(self, pidfd: int) -> Dead:
        """A worker is proven dead.

        :meth:`start` or :meth:`leave_empty` has to follow.
        """
        worker = self._workers.pop(pidfd)
        self._poll.unregister(pidfd)
        os.close(pidfd)
        # Exact for those that have begun: the kernel kills them with the spawner, and they are dead only after its
        # pidfd says that it is. One that has not begun may end a little before.
        was_orphaned = worker.parent.is_gone
        if not worker.is_leaving and not was_orphaned:
            self._deaths[worker.me] = self._deaths.get(worker.me, 0) + 1
        self._vacant.add(worker.me)
        return Dead(worker.me, worker.pid, worker.is_heard, worker.is_leaving, was_orphaned)

    def leave_empty(self, me: int) -> None:
        """Worker `me`, who was buried, has no successor for now."""
        self._vacant.discard(me)

    # ------------------------------------------------------------ rest

    def dismiss(self, now_s: float, busy: Container[int], idle_timeout: float) -> tuple[list[int], float | None]:
        """Who has rested for `idle_timeout` seconds and is to be told to stop; seconds until the next one has.

        `busy` are those that have a part in a round. None: nobody rests.
        """
        leaving, left_s = [], None
        for worker in self._workers.values():
            if worker.is_leaving:
                continue
            if worker.me in busy:
                worker.rests_since_s = None
                continue
            if worker.rests_since_s is None:
                worker.rests_since_s = now_s
            rest = worker.rests_since_s + idle_timeout - now_s
            if rest <= 0:
                worker.is_leaving = True
                leaving.append(worker.me)
            else:
                left_s = rest if left_s is None else min(left_s, rest)
        return leaving, left_s

    # ------------------------------------------------------------ signs of life

    def heard(self, me: int, has_worked: bool) -> None:
        """Worker `me` said something: that it has worked, or only that it is there."""
        self._deaths[me] = 0
        if has_worked:
            self._lost_in_a_row = 0
        for worker in self._workers.values():
            if worker.me == me:
                worker.is_asked, worker.silent_s, worker.is_heard = False, 0.0, True
                if has_worked:  # between two looks it may have had a part in many rounds
                    worker.rests_since_s = None

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
        """Ends the spawner and every worker; returns when they are gone."""
        self.spawner.close()
        deadline = time.monotonic() + KILL_TIMEOUT_S
        for pidfd in self._workers:  # those of a spawner that was killed die a moment later than it
            poll = select.poll()
            poll.register(pidfd, select.POLLIN)
            poll.poll(max(0.0, deadline - time.monotonic()) * 1000)
            os.close(pidfd)
        self._workers = {}
        self._poll.close()
