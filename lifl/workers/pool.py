"""The choice of workers for rounds: first those that run and are free, then new ones, then the busy ones.

Knows which workers run and which have a part in a round, not what they do there. Called with the Node's lock held.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Container

from lifl.errors import PeerGoneError
from lifl.workers.supervisor import Supervisor

log = logging.getLogger("lifl.workers.pool")


class Pool:
    """Workers 1 to `most`. Each of them runs or does not.

    Parameters
    ----------
    most : int
        The largest number of workers; at least 1.
    supervisor : Supervisor or None
        The worker processes. None: the one worker is in the calling process.
    engaged : callable
        For each worker, the number of rounds in which it has a part now.
    """

    def __init__(self, most: int, supervisor: Supervisor | None, engaged: Callable[[], Counter[int]]) -> None:
        self.most = most
        self._supervisor = supervisor
        self._engaged = engaged
        self.cold_starts = 0
        self._turn = 0

    def choose(self, n: int, without: Container[int] = ()) -> tuple[int, ...]:
        """Up to `n` workers for a task, none of them in `without`; fewer only if there are no more.

        Workers that run and are free come first, then new ones, then those with a part in the fewest rounds. Raises
        :class:`PeerGoneError` if no worker runs and none can be started.
        """
        if self._supervisor is None:
            return (1,) if n and 1 not in without else ()
        there, leaving, engaged = self._supervisor.there, self._supervisor.leaving, self._engaged()

        def rank(worker: int) -> tuple[int, int, int]:
            is_free = worker in there and not engaged[worker]
            group = 0 if is_free else 2 if worker in there else 3 if worker in leaving else 1
            # Workers of one group take turns, so that the work is spread.
            return group, engaged[worker], (worker - self._turn) % self.most

        chosen: list[int] = []
        failure: PeerGoneError | None = None
        for worker in sorted((worker for worker in range(1, 1 + self.most) if worker not in without), key=rank):
            if len(chosen) == n:
                break
            if worker not in there and worker not in leaving:
                try:
                    self._start(worker)
                except PeerGoneError as error:  # the workers that run can do the task, in more time
                    failure = error
                    continue
            chosen.append(worker)
        if failure is not None:
            if not chosen:
                raise failure
            log.warning("%s; the round goes on with %d workers", failure, len(chosen))
        self._turn = chosen[0] + 1 if chosen else self._turn
        return tuple(chosen)

    def prepare(self, n: int) -> None:
        """Starts workers until `n` run, or as many as there may be."""
        if self._supervisor is None or len(self._supervisor.there) >= min(n, self.most):
            return
        absent = [worker for worker in range(1, 1 + self.most) if worker not in self.present]
        for worker in absent[: min(n, self.most) - len(self._supervisor.there)]:
            try:
                self._start(worker)
            except PeerGoneError as error:  # the round that needs the worker raises, or does without it
                log.warning("%s", error)
                return

    def _start(self, worker: int) -> None:
        assert self._supervisor is not None
        self._supervisor.start(worker)
        self.cold_starts += 1

    @property
    def present(self) -> frozenset[int]:
        """The workers that are not proven dead."""
        return frozenset([1]) if self._supervisor is None else self._supervisor.there | self._supervisor.leaving
