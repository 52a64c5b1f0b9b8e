"""Requests for messages that are held open while there is no message: no thread, one timer each.

Owns the requests that wait, and their time. A SuperNode that finds no message sleeps three seconds before it asks
again; its HTTP client gives a request up after five.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

import attrs

HOLD_S = 4.0
"""Time for which an empty answer is held back: the SuperNode's time-out, less a second for the way."""


@attrs.define(eq=False)
class LongPoll:
    """A request for messages, from the moment before it looks for one.

    Attributes
    ----------
    node_id : int
    has_news : bool
        True if a message has come since. Set in any thread.
    wake : callable or None
        Answers the request; None while it looks for a message, and when it has been answered or forgotten.
    timer : asyncio.TimerHandle or None
    """

    node_id: int
    has_news: bool = False
    wake: Callable[[], None] | None = None
    timer: asyncio.TimerHandle | None = None


class LongPolls:
    """The requests for messages at one server.

    All methods but :meth:`note`, :meth:`news` and ``held`` belong to the event loop.

    Parameters
    ----------
    hold_s : float
        Time for which a request is held open; 0: not at all.

    Attributes
    ----------
    loop : asyncio.AbstractEventLoop or None
        Set by the plane when the server starts.
    """

    def __init__(self, hold_s: float = HOLD_S) -> None:
        self._hold_s = hold_s
        self._by_node: dict[int, set[LongPoll]] = {}
        # Guards `_by_node`: requests are noted in threads of the executor, and news comes from any thread.
        self._lock = threading.Lock()
        self.loop: asyncio.AbstractEventLoop | None = None

    @property
    def is_on(self) -> bool:
        """False if no request is held open."""
        return self._hold_s > 0

    @property
    def held(self) -> int:
        """Requests that are held open now. Any thread."""
        with self._lock:
            return sum(poll.wake is not None for waiting in self._by_node.values() for poll in waiting)

    def note(self, node_id: int) -> LongPoll:
        """Notes a request, before it looks for a message: one that comes from now on is news. Any thread.

        The other order would lose a message that comes between the look and the note.
        """
        poll = LongPoll(node_id)
        with self._lock:
            self._by_node.setdefault(node_id, set()).add(poll)
        return poll

    def news(self, node_id: int) -> None:
        """Wakes the requests of a node: there is a message for it. Any thread."""
        with self._lock:
            waiting = list(self._by_node.get(node_id, ()))
        for poll in waiting:
            # Before the loop is called: a request that is not held yet finds the news in `hold`.
            poll.has_news = True
            if self.loop is not None:
                self.loop.call_soon_threadsafe(self._wake, poll)

    def hold(self, poll: LongPoll, wake: Callable[[], None]) -> None:
        """Calls `wake` when there is news or the time is over."""
        poll.wake = wake
        if poll.has_news or self._hold_s <= 0:
            self._wake(poll)
        else:
            poll.timer = asyncio.get_running_loop().call_later(self._hold_s, self._wake, poll)

    def release(self, poll: LongPoll | None) -> None:
        """Wakes a request before its time."""
        if poll is not None:
            self._wake(poll)

    def forget(self, poll: LongPoll | None) -> None:
        """Forgets a request: nobody waits for its answer any more."""
        if poll is None:
            return
        if poll.timer is not None:
            poll.timer.cancel()
        poll.wake = None
        with self._lock:
            waiting = self._by_node.get(poll.node_id)
            if waiting is not None:
                waiting.discard(poll)
                if not waiting:
                    del self._by_node[poll.node_id]

    def _wake(self, poll: LongPoll) -> None:
        wake = poll.wake
        if wake is not None:  # else the request still looks for a message, and `hold` will find the news
            self.forget(poll)
            wake()
