"""Messages to nodes of which objects are still on their way: who waits for them is told when they are whole.

Owns who waits for which object. A SuperNode that gets a message too early sleeps a second before it asks for its
objects again.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Iterator

import attrs

from lifl.superlink.http.long_poll import LongPolls

STALE_S = 200.0
"""Longer than a push session: whose objects have not come by then has been given up by its ServerApp."""


@attrs.define(eq=False)
class _Coming:
    node_id: int
    missing: set[str]
    since_s: float = attrs.field(factory=time.monotonic)


class Comings:
    """One server's. Any thread."""

    def __init__(self, holding: LongPolls) -> None:
        self._holding = holding
        self._lock = threading.Lock()
        self._coming: dict[str, _Coming] = {}
        self._awaited: dict[str, list[str]] = {}  # object -> messages that wait for it
        self._incoming: Counter[int] = Counter()
        self._noting = 0  # messages that are being registered
        self._came: set[str] = set()  # objects that have come meanwhile: who registers them may not know

    @contextlib.contextmanager
    def noting(self) -> Iterator[None]:
        """While a message is registered: what comes between its registration and its :meth:`add` counts too."""
        with self._lock:
            self._noting += 1
        try:
            yield
        finally:
            with self._lock:
                self._noting -= 1
                if not self._noting:
                    self._came.clear()

    def __contains__(self, message_id: object) -> bool:
        return message_id in self._coming

    def add(self, message_id: str, node_id: int, missing: set[str]) -> None:
        """A message to a node is registered; the node is told when nothing is missing."""
        with self._lock:
            missing = missing - self._came
            if missing:
                self._coming[message_id] = _Coming(node_id, missing)
                self._incoming[node_id] += 1
                for object_id in missing:
                    self._awaited.setdefault(object_id, []).append(message_id)
                return
        self._holding.news(node_id)

    def available(self, object_id: str) -> None:
        """An object is there, whoever brought it."""
        informed: list[int] = []
        with self._lock:
            if self._noting:
                self._came.add(object_id)
            for message_id in self._awaited.pop(object_id, ()):
                coming = self._coming.get(message_id)
                if coming is None:
                    continue
                coming.missing.discard(object_id)
                if not coming.missing:
                    del self._coming[message_id]
                    self._incoming[coming.node_id] -= 1
                    informed.append(coming.node_id)
        for node_id in informed:
            self._holding.news(node_id)

    def is_incoming(self, node_id: int) -> bool:
        """True while a message for a node is announced whose objects have not all come."""
        return self._incoming[node_id] > 0

    def forget_stale(self) -> None:
        """Called now and then."""
        with self._lock:
            before_s = time.monotonic() - STALE_S
            for message_id in [m for m, coming in self._coming.items() if coming.since_s < before_s]:
                coming = self._coming.pop(message_id)
                self._incoming[coming.node_id] -= 1
                for object_id in coming.missing:
                    waiting = self._awaited.get(object_id, [])
                    if message_id in waiting:
                        waiting.remove(message_id)
                    if not waiting:
                        self._awaited.pop(object_id, None)
