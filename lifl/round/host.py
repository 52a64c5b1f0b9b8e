"""The part of a Node that its rounds use, and the one way to wait for memory."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Container, Sequence
from numbers import Real
from typing import Protocol

from lifl.errors import ShmError
from lifl.planner.shape import Shape
from lifl.report.report import RoundReport
from lifl.round.pacing import Pace
from lifl.round.record import Tally
from lifl.round.settings import Terms
from lifl.shm.arena import Arena, Block
from lifl.shm.ring import Outbox

WAIT_CAP_S = 0.1
"""No wait is longer in one piece: signals and lost peers are noticed within it."""


class Workers(Protocol):
    """A Node's workers: their largest number, those that run, and the best choice of them.

    Attributes
    ----------
    most : int
        Workers that the Node may have.
    cold_starts : int
        Workers that were started so far.
    """

    most: int
    cold_starts: int

    @property
    def present(self) -> frozenset[int]:
        """The workers that are running."""

    def choose(self, n: int, without: Container[int] = ()) -> tuple[int, ...]:
        """The best `n` workers for a new part in a round; starts those that do not run."""

    def prepare(self, n: int) -> None:
        """Starts workers until `n` run."""


class Router(Protocol):
    """The way to the workers, as a round uses it."""

    def route_top(self, number: int, worker: int | None) -> None:
        """Routes the partial sums of round `number` to `worker`; None: to nobody any more."""


class Predictor(Protocol):
    """The cost model, as a round uses it."""

    def pace(self, terms: Terms) -> Pace:
        """The plan of a round with these terms."""

    def predict(self, terms: Terms, shape: Shape, arrivals: Sequence[float]) -> dict[str, float] | None:
        """The expected seconds, CPU seconds and bytes of a round, by name; None if the model does not apply."""

    def learn(self, report: RoundReport) -> None:
        """Takes a finished round into account."""


class Host(Protocol):
    """The Node of a round.

    Attributes
    ----------
    arena : Arena
    outbox : Outbox
        Descriptors to the workers.
    changed : threading.Condition
        The Node's lock. It guards the Node's books and those of all its rounds, and is notified of each change.
    tally : Tally
    """

    arena: Arena
    outbox: Outbox
    changed: threading.Condition
    tally: Tally

    # Properties, so that a Node may have more than a round asks for.
    @property
    def pool(self) -> Workers:
        """The Node's workers."""

    @property
    def transport(self) -> Router:
        """The way to the workers."""

    @property
    def forecast(self) -> Predictor:
        """The Node's cost model."""

    def pump(self) -> None:
        """Sets workers to the work that waits; without workers the calling thread does it now."""

    @property
    def is_foreign(self) -> bool:
        """True in a fork of the Node's process, where nothing of the Node may be used, not even its lock."""

    def check_workers(self) -> None:
        """Raises PeerGoneError if a worker is gone and has no successor."""

    def relieve(self) -> bool:
        """Makes lazy rounds fold what they hold, because memory is short; false if nothing will come free."""

    def held_by(self, client_id: str) -> int:
        """Bytes of the arena that a client holds, in all open rounds."""

    @property
    def largest_update_bytes(self) -> int:
        """Bytes of the largest update of the open rounds; 0 if none is open."""

    def next_number(self) -> int:
        """The number of a round that is being opened."""

    def forget(self, number: int) -> None:
        """Takes note that a round has been closed."""


def deadline_of(timeout: float | None) -> float | None:
    """The end of a wait of `timeout` seconds on the monotonic clock; None for a wait without end.

    Raises ``TypeError`` for what is no number, and ``ValueError`` for nan: no moment is after it, so the wait would
    never end.
    """
    if timeout is None:
        return None
    if not isinstance(timeout, Real):
        raise TypeError(f"timeout={timeout!r}: give seconds, or None to wait without end")
    if timeout != timeout:
        raise ValueError(f"timeout={timeout!r}: give seconds, or None to wait without end")
    return time.monotonic() + timeout


def wait_for_block(host: Host, nbytes: int, timeout: float | None, purpose: str, *, apart: bool = False) -> Block:
    """Waits for a block of `nbytes`; it is the owner's, in state WRITING. The caller holds ``host.changed``.

    Raises :class:`ShmError` (ENOSPC) at the time-out, or at once if nothing will come free by itself.
    """
    deadline = deadline_of(timeout)
    while (block := host.arena.alloc(nbytes, apart=apart)) is None:
        host.check_workers()
        moving = host.relieve()
        left = WAIT_CAP_S if deadline is None else deadline - time.monotonic()
        if not moving or left <= 0:
            if (block := host.arena.alloc(nbytes, apart=apart)) is not None:
                break
            free, total = host.arena.free_bytes, host.arena.block_bytes
            why = "nothing in it will come free by itself" if not moving else f"it was for {timeout:g} s"
            raise ShmError(
                errno.ENOSPC,
                f"no room for {purpose}: {nbytes:,} bytes wanted, {free:,} of {total:,} free, and {why}; "
                "give the Node more memory, close rounds, or drop old results",
            )
        host.changed.wait(min(left, WAIT_CAP_S))
    return block
