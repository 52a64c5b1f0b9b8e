"""The workers of one Node, in processes or in the owner's, and the transport to them.

Owns the bell, the transport and the processes; knows no rounds.
"""

from __future__ import annotations

import time
from functools import partial
from numbers import Integral

from lifl.shm.arena import Arena
from lifl.shm.machine import cores
from lifl.shm.ring import Bell, queued
from lifl.workers.aggregator import Aggregator
from lifl.workers.supervisor import Supervisor
from lifl.workers.traffic import Traffic
from lifl.workers.transport import Name, open_transport

SPIN_S = 50e-6
MAX_WORKERS = 255


def headcount(
    workers: int | None, warm: int | None, idle_timeout: float | None, stall_timeout: float
) -> tuple[int, int]:
    """The largest number of workers, and the number started at once; ``ValueError`` for numbers out of range."""
    if not stall_timeout > 0:
        raise ValueError(f"stall_timeout={stall_timeout!r}: give seconds above 0")
    if idle_timeout is not None and not idle_timeout > 0:
        raise ValueError(f"idle_timeout={idle_timeout!r}: give seconds above 0, or None for never")
    for name, count in (("workers", workers), ("warm", warm)):
        if count is not None and not isinstance(count, Integral):
            raise TypeError(f"{name}={count!r}: give a whole number")
    if warm is None:
        warm = 1 if workers is None else workers
    workers = cores() if workers is None else workers
    if not 0 <= workers <= MAX_WORKERS:
        raise ValueError(f"workers={workers}: give 0 (fold in this process) to {MAX_WORKERS}")
    if not 0 <= warm <= workers:
        raise ValueError(f"warm={warm}: give 0 to workers={workers}")
    return int(workers), int(warm)


class Team:
    """The workers, the transport and the bell of one Node.

    Raises :class:`PeerGoneError` if workers cannot be started, :class:`EbpfUnavailableError` if the transport is not
    available here.

    Attributes
    ----------
    supervisor : Supervisor or None
        The worker processes; None: there is one worker, `inline`, in the calling process.
    """

    def __init__(self, arena: Arena, workers: int, warm: int, stall_timeout: float, transport: Name | None) -> None:
        self.supervisor: Supervisor | None = None
        self.inline: Aggregator | None = None
        self.bell = Bell()
        try:
            self.transport = open_transport(transport, arena)
        except BaseException:
            self.bell.close()
            raise
        self.traffic = Traffic(self.transport.metrics, partial(queued, arena), time.monotonic)
        try:
            # The listener's thread sends descriptors that did not fit; it may be asleep.
            self.outbox = self.transport.outbox(on_backlog=self.bell.ring)
            self.inbox = self.transport.inbox()
            if workers:
                spin_s = SPIN_S if cores() > 1 else 0.0
                self.supervisor = Supervisor(arena.fd, self.bell.fd, spin_s, warm, stall_timeout, self.transport.admit)
            else:
                self.inline = Aggregator(arena, 1, self.transport.inbox(1), self.transport.outbox(1))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Ends every process; no thread may wait for one any more."""
        if self.supervisor is not None:
            self.supervisor.close()
        self.transport.close()
        self.bell.close()
