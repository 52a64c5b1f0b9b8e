"""What a round needs of the Node that runs it, and the one way to wait for memory."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Container, Sequence
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
    """A Node's workers: how many there may be, which are there, and which are the best choice.

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
        """The best `n` workers for a new part in a round; starts those that are not there."""

    def prepare(self, n: int) -> None:
        """Starts workers until `n` are there."""


class Router(Protocol):
    """The way to the workers, as a round uses it."""

    def route_top(self, number: int, me: int | None) -> None:
        """Partial sums of round `number` go to worker `me`; None: to nobody any more."""


class Predictor(Protocol):
    """The cost model, as a round uses it."""

    def pace(self, terms: Terms) -> Pace:
        """The plan of a round with these terms."""

    def predict(self, terms: Terms, shape: Shape, arrivals: Sequence[float]) -> dict[str, float] | None:
        """Seconds that each phase of a round is expected to take; None if the model does not apply."""

    def learn(self, report: RoundReport) -> None:
        """Takes a finished round into account."""


class Host(Protocol):
    """What a round needs of the Node that runs it."""

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
        """The way to them."""

    @property
    def forecast(self) -> Predictor:
        """The Node's cost model."""

    def pump(self) -> None:
        """Gets the work going that is there; without workers it is done now, in the calling thread."""

    @property
    def is_foreign(self) -> bool:
        """True in a fork of the Node's process, where nothing of it may be used, its lock neither."""

    def check_workers(self) -> None:
        """Raises PeerGoneError if one is gone and has no successor."""

    def relieve(self) -> bool:
        """Memory is short: makes lazy rounds fold what they hold; false if nothing will come free."""

    def held_by(self, client_id: str) -> int:
        """Bytes of the arena that a client holds, in all open rounds."""

    @property
    def largest_update_bytes(self) -> int:
        """Bytes of the largest update of the open rounds; 0 if none is open."""

    def next_number(self) -> int:
        """The number of a round that is being opened."""

    def forget(self, number: int) -> None:
        """Takes note that a round has been closed."""


def wait_for_block(host: Host, nbytes: int, timeout: float | None, purpose: str, *, apart: bool = False) -> Block:
    """A WRITING block of the agent's, as soon as there is one. The caller holds ``host.changed``.

    Raises :class:`ShmError` (ENOSPC) at the time-out, or at once if nothing will come free by itself.
    """
    deadline = None if timeout is None else time.monotonic() + timeout
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
