"""Relief for a full arena: memory that slow readers hold is freed for requests that wait for room.

Owns the choice of the readers that are dropped and of the answers that are copied. A quick reader keeps its view of the
arena.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

from lifl.superlink.http.rates import MIN_RATE

MAX_PRIVATE_BYTES = 2**28
"""Bytes of answers to slow readers that may be copied out of the arena, in all."""

QUICK_S = 1.0
"""A reader that needs no longer for the rest of its answer is quick."""

PATIENCE_S = 10.0
"""A reader that needs longer for the rest of its answer is dropped if that cannot be copied."""


class Connection(Protocol):
    """The sending side of a connection."""

    @property
    def rates(self) -> Any:
        """Its ``Rates``, see ``lifl.superlink.http.rates``."""

    @property
    def pinned_bytes(self) -> int:
        """Bytes of the arena that are still to be sent."""

    @property
    def private_bytes(self) -> int:
        """Bytes still to be sent that were copied out of the arena."""

    def unpin(self) -> None:
        """Copies the bytes that are still to be sent out of the arena."""

    def drop(self, reason: str) -> None:
        """Ends the connection at once."""


def relieve(connections: Iterable[Connection]) -> bool:
    """Frees memory of the arena that slow readers hold; True if there was some. Belongs to the event loop.

    Readers that took less than ``MIN_RATE`` of late are dropped. For others that are not quick the rest of the answer
    is copied, the slowest first; beyond ``MAX_PRIVATE_BYTES`` of copies, readers that need more than ``PATIENCE_S`` are
    dropped.
    """
    all_of_them = list(connections)
    pinning = [one for one in all_of_them if one.rates.sending is not None and one.pinned_bytes]
    if not pinning:
        return False
    private_bytes = sum(one.private_bytes for one in all_of_them)
    has_freed = False
    for one in sorted(pinning, key=lambda one: one.rates.sending):
        rate, nbytes = one.rates.sending, one.pinned_bytes
        is_copied = rate >= MIN_RATE and private_bytes + nbytes <= MAX_PRIVATE_BYTES
        if nbytes <= rate * QUICK_S or (rate >= MIN_RATE and not is_copied and nbytes <= rate * PATIENCE_S):
            continue
        has_freed = True
        if is_copied:
            one.unpin()
            private_bytes += nbytes
        else:
            one.drop(f"memory is short, and an answer is taken at {rate:,.0f} bytes a second")
    return has_freed
