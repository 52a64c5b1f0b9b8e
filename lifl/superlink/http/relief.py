"""Memory of the arena that slow readers hold, given to those who wait for room.

Owns the choice of who is dropped and whose answer is copied. A reader that is quick keeps its view of the arena.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

from lifl.superlink.http.rates import MIN_RATE

PRIVATE_BYTES = 2**28
"""So much of what slow readers have not had may be copied out of the arena."""

QUICK_S = 1.0
"""Who has all in so long is quick."""

PATIENCE_S = 10.0
"""Of those that cannot be copied, readers that need longer are dropped."""


class Connection(Protocol):
    """A connection, as far as it sends."""

    @property
    def rates(self) -> Any:
        """How fast it goes, see ``lifl.superlink.http.rates``."""

    @property
    def pinned_bytes(self) -> int:
        """Bytes of the arena that are still to be sent."""

    @property
    def private_bytes(self) -> int:
        """Bytes still to be sent that were copied out of it."""

    def unpin(self) -> None:
        """Copies what is still to be sent."""

    def drop(self, reason: str) -> None:
        """Ends it at once."""


def relieve(connections: Iterable[Connection]) -> bool:
    """Frees memory of the arena that slow readers hold; True if there was some. Belongs to the loop.

    Those who took less than ``MIN_RATE`` of late are dropped. Others who are not quick get what is left as a copy, the
    slowest first; beyond ``PRIVATE_BYTES`` of copies, those who need more than ``PATIENCE_S`` are dropped.
    """
    all_of_them = list(connections)
    pinning = [one for one in all_of_them if one.rates.sending is not None and one.pinned_bytes]
    if not pinning:
        return False
    private_bytes = sum(one.private_bytes for one in all_of_them)
    has_freed = False
    for one in sorted(pinning, key=lambda one: one.rates.sending):
        rate, nbytes = one.rates.sending, one.pinned_bytes
        is_copied = rate >= MIN_RATE and private_bytes + nbytes <= PRIVATE_BYTES
        if nbytes <= rate * QUICK_S or (rate >= MIN_RATE and not is_copied and nbytes <= rate * PATIENCE_S):
            continue
        has_freed = True
        if is_copied:
            one.unpin()
            private_bytes += nbytes
        else:
            one.drop(f"memory is short, and an answer is taken at {rate:,.0f} bytes a second")
    return has_freed
