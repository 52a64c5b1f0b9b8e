"""Requests for messages that are held open while there is none: no thread, one timer each.

Owns who waits and for how long. A SuperNode that finds no message sleeps three seconds; its HTTP client gives up
after five.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

import attrs

HOLD_S = 4.0
"""How long an empty answer is held back: less than the SuperNode's time-out, with a second for the way."""


@attrs.define(eq=False)
class Held:
    """One request. `has_news` is set by a message that comes after it was noted."""

    node_id: int
    has_news: bool = False
    wake: Callable[[], None] | None = None
    timer: asyncio.TimerHandle | None = None


class Holding:
    """Who waits at this server. All methods but :meth:`note`, :meth:`news` and ``held`` belong to the loop."""

    def __init__(self, hold_s: float = HOLD_S) -> None:
        self._hold_s = hold_s
        self._by_node: dict[int, set[Held]] = {}
        self._lock = threading.Lock()
        self.loop: asyncio.AbstractEventLoop | None = None

    @property
    def is_on(self) -> bool:
        """False if nothing is held."""
        return self._hold_s > 0

    @property
    def held(self) -> int:
        """Requests that are held open now. Any thread."""
        with self._lock:
            return sum(held.wake is not None for waiting in self._by_node.values() for held in waiting)

    def note(self, node_id: int) -> Held:
        """Before it is looked whether there is a message: one that comes from now on is news. Any thread."""
        held = Held(node_id)
        with self._lock:
            self._by_node.setdefault(node_id, set()).add(held)
        return held

    def news(self, node_id: int) -> None:
        """There is a message for a node. Any thread."""
        with self._lock:
            waiting = list(self._by_node.get(node_id, ()))
        for held in waiting:
            held.has_news = True
            if self.loop is not None:
                self.loop.call_soon_threadsafe(self._wake, held)

    def hold(self, held: Held, wake: Callable[[], None]) -> None:
        """Calls `wake` when there is news or the time is over."""
        held.wake = wake
        if held.has_news or self._hold_s <= 0:
            self._wake(held)
        else:
            held.timer = asyncio.get_running_loop().call_later(self._hold_s, self._wake, held)

    def release(self, held: Held | None) -> None:
        """Its time is over."""
        if held is not None:
            self._wake(held)

    def forget(self, held: Held | None) -> None:
        """Nobody waits for it any more."""
        if held is None:
            return
        if held.timer is not None:
            held.timer.cancel()
        held.wake = None
        with self._lock:
            waiting = self._by_node.get(held.node_id)
            if waiting is not None:
                waiting.discard(held)
                if not waiting:
                    del self._by_node[held.node_id]

    def _wake(self, held: Held) -> None:
        wake = held.wake
        if wake is not None:  # else it is being looked for, and `hold` will find the news
            self.forget(held)
            wake()
