"""What a round needs of the Node that runs it, and the one way to wait for memory."""

from __future__ import annotations

import errno
import threading
import time
from typing import TYPE_CHECKING, Protocol

from lifl.errors import ShmError
from lifl.ring import Outbox
from lifl.shm import Arena, Block

if TYPE_CHECKING:
    from lifl.forecast import Forecast
    from lifl.pool import Pool
    from lifl.tally import Tally
    from lifl.transport import Transport

WAIT_CAP_S = 0.1
"""No wait is longer in one piece: signals and lost peers are noticed within it."""


class Host(Protocol):
    """What a round needs of the Node that runs it."""

    arena: Arena
    outbox: Outbox
    transport: Transport
    changed: threading.Condition
    pool: Pool
    forecast: Forecast
    tally: Tally

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

    def forget(self, number: int) -> None:
        """The round has been closed."""


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
