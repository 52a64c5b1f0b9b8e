"""Rates, queues and execution times of the workers, from the counters of the kernel.

The clock is a parameter. Called with the Node's lock held. With rings there is nothing: the kernel does not see them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import attrs

from lifl.shm.arena import OWNER

if TYPE_CHECKING:
    from lifl.ebpf.record import Metrics


@attrs.frozen
class Flow:
    """The traffic of one worker between two looks.

    Attributes
    ----------
    arrival_rate : float
        k, updates per second that were sent to the worker.
    execution_s : float
        E, seconds that the worker took for each update that it folded; 0 if it folded none.
    queue : int
        Descriptors that the worker had not taken at the second look.
    """

    arrival_rate: float
    execution_s: float
    queue: int


@attrs.frozen
class Interval:
    """The traffic of all workers of a Node in an interval: updates sent, its seconds, and seconds of work."""

    updates: int
    seconds: float
    busy_s: float


class Traffic:
    """The traffic of one Node.

    Parameters
    ----------
    read : callable
        Returns the kernel's counters of each participant, which only rise.
    queued : callable
        Returns the number of descriptors that a participant has not taken.
    clock : callable
        Returns seconds.
    """

    def __init__(
        self, read: Callable[[], dict[int, Metrics]], queued: Callable[[int], int], clock: Callable[[], float]
    ) -> None:
        self._read = read
        self._queued = queued
        self._clock = clock
        self._begin: tuple[float, int, int] | None = None  # seconds, updates, nanoseconds of work
        self._last: tuple[float, dict[int, Metrics]] | None = None
        self.flows: dict[int, Flow] = {}

    def begin(self) -> None:
        """Begins an interval: a round opens, and no other is open."""
        self._last = self._clock(), self._workers()
        self._begin = self._last[0], *_sums(self._last[1])

    def look(self) -> dict[int, Flow]:
        """The flow of each worker since the last look; ``flows`` keeps it. Empty at the first look."""
        now_s, now = self._clock(), self._workers()
        if self._last is not None and now_s > self._last[0]:
            seconds, before = now_s - self._last[0], self._last[1]
            self.flows = {}
            for worker, counted in now.items():
                updates, folded, busy_ns = counted.updates, counted.folded, counted.busy_ns
                if (old := before.get(worker)) is not None:
                    updates, folded, busy_ns = updates - old.updates, folded - old.folded, busy_ns - old.busy_ns
                execution_s = busy_ns / 1e9 / folded if folded else 0.0
                self.flows[worker] = Flow(updates / seconds, execution_s, self._queued(worker))
        self._last = now_s, now
        return self.flows

    def take(self) -> Interval | None:
        """The traffic since the last call, or since :meth:`begin`; None if the kernel has seen no update."""
        self.look()
        assert self._last is not None, "there was a look"
        now_s = self._last[0]
        begin, self._begin = self._begin, (now_s, *_sums(self._last[1]))
        if begin is None or not now_s > begin[0]:
            return None
        updates, busy_ns = self._begin[1] - begin[1], self._begin[2] - begin[2]
        return Interval(updates, now_s - begin[0], busy_ns / 1e9) if updates else None

    def _workers(self) -> dict[int, Metrics]:
        return {worker: counted for worker, counted in self._read().items() if worker != OWNER}


def _sums(counted: dict[int, Metrics]) -> tuple[int, int]:
    return sum(one.updates for one in counted.values()), sum(one.busy_ns for one in counted.values())
