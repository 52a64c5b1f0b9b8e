"""Memory that the bodies of requests may take while they come: a limit for each sender, and one for all.

Owns the counts and the order of the bodies that wait. Knows no socket: a connection that has to wait stops reading, one
that is given up is answered and ends. Everything here belongs to the event loop.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable

MAX_SENDER_BYTES = 2**26
"""Default limit for one sender."""

MAX_TOTAL_BYTES = 2**28
"""Default limit for all senders."""

PATIENCE_S = 1.0
"""Time that a body waits for others; then the most expensive of them is given up, see :meth:`Allowance.look`."""


class Share:
    """The part of one body in an allowance. To be closed when the body is gone.

    Parameters
    ----------
    allowance : Allowance
    sender : hashable
        All bodies of one sender share its limit.
    give_up : callable
        Called if the memory is needed for others; closes the share.
    """

    def __init__(self, allowance: Allowance, sender: Hashable, give_up: Callable[[], None]) -> None:
        self._allowance = allowance
        self.sender = sender
        self.give_up = give_up
        self.began_s = time.monotonic()
        self.nbytes = 0
        self.wanted_bytes = 0  # bytes that it waits for
        self.waits_since_s = 0.0
        self.is_whole = False  # the body has come whole: it will be gone soon, and is not given up any more
        self.is_closed = False
        self.then: Callable[[], None] = lambda: None

    def grow(self, nbytes: int, then: Callable[[], None]) -> bool:
        """Takes more memory. False if it has to wait for it: `then` is called when it has it."""
        return self._allowance.grow(self, nbytes, then)

    def close(self) -> None:
        """Gives all of its memory back; harmless when closed."""
        self._allowance.close(self)


class Allowance:
    """The memory for all bodies of one kind.

    Parameters
    ----------
    sender_bytes, total_bytes : int
        Limits for one sender and for all. The largest body has to fit into either.

    Attributes
    ----------
    nbytes : int
        Bytes that all shares have taken.
    """

    def __init__(self, sender_bytes: int = MAX_SENDER_BYTES, total_bytes: int = MAX_TOTAL_BYTES) -> None:
        self.sender_bytes = sender_bytes
        self.total_bytes = total_bytes
        self.nbytes = 0
        self._by_sender: dict[Hashable, int] = defaultdict(int)
        self._shares: set[Share] = set()
        self._waiting: list[Share] = []

    def share(self, sender: Hashable, give_up: Callable[[], None]) -> Share:
        """Makes an empty share; see :class:`Share`."""
        made = Share(self, sender, give_up)
        self._shares.add(made)
        return made

    def grow(self, share: Share, nbytes: int, then: Callable[[], None]) -> bool:
        """See :meth:`Share.grow`."""
        if share.is_closed:
            return True
        if not share.wanted_bytes and self._fits(share, nbytes):
            self._take(share, nbytes)
            return True
        if not share.wanted_bytes:
            share.waits_since_s = time.monotonic()
            self._waiting.append(share)
        share.wanted_bytes += nbytes
        share.then = then
        return False

    def close(self, share: Share) -> None:
        """See :meth:`Share.close`."""
        if share.is_closed:
            return
        share.is_closed = True
        self._shares.discard(share)
        if share.wanted_bytes:
            self._waiting.remove(share)
        self.nbytes -= share.nbytes
        self._by_sender[share.sender] -= share.nbytes
        if not self._by_sender[share.sender]:
            del self._by_sender[share.sender]
        for one in list(self._waiting):
            if one.wanted_bytes and not one.is_closed and self._fits(one, one.wanted_bytes):
                self._waiting.remove(one)
                nbytes, one.wanted_bytes = one.wanted_bytes, 0
                self._take(one, nbytes)
                one.then()

    def look(self, now_s: float) -> None:
        """Gives up the most expensive body, in bytes times seconds, if a body has waited too long; called now and then.

        The body is chosen among those of all senders if the total is exhausted, else among those of the sender that
        waits. An honest body comes quickly and costs little, however many there are; a body that is held back costs
        more each second. So no body waits for ever, and no two bodies wait for each other.
        """
        waiting = [one for one in self._waiting if now_s - one.waits_since_s >= PATIENCE_S]
        if any(self.nbytes + one.wanted_bytes > self.total_bytes for one in waiting):
            self._give_up(self._shares, now_s)
            return
        for sender in {one.sender for one in waiting}:
            self._give_up([one for one in self._shares if one.sender == sender], now_s)

    def _give_up(self, shares: Iterable[Share], now_s: float) -> None:
        costs: dict[Hashable, float] = defaultdict(float)
        coming = [one for one in shares if not one.is_whole]
        for one in coming:
            costs[one.sender] += self._cost(one, now_s)
        if costs:
            dearest = max(costs, key=lambda sender: costs[sender])
            theirs = [one for one in coming if one.sender == dearest]
            max(theirs, key=lambda one: self._cost(one, now_s)).give_up()

    @staticmethod
    def _cost(share: Share, now_s: float) -> float:
        return share.nbytes * (now_s - share.began_s)

    def _fits(self, share: Share, nbytes: int) -> bool:
        is_theirs = self._by_sender.get(share.sender, 0) + nbytes <= self.sender_bytes
        return is_theirs and self.nbytes + nbytes <= self.total_bytes

    def _take(self, share: Share, nbytes: int) -> None:
        share.nbytes += nbytes
        self.nbytes += nbytes
        self._by_sender[share.sender] += nbytes
