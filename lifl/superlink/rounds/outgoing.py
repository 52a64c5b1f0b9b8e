"""Messages to nodes whose objects are still arriving from their ServerApp.

Owns the index of those messages by object. It tells the waiting SuperNode when a message is whole: a SuperNode that
gets a message too early sleeps a second before it asks for the objects again.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Iterator

import attrs

from lifl.superlink.http.long_poll import Holding

STALE_S = 200.0
"""Longer than a push session: a message that has no objects by then has been given up by its ServerApp."""


@attrs.define(eq=False)
class _Message:
    node_id: int
    missing: set[str]
    since_s: float = attrs.field(factory=time.monotonic)


class Outgoing:
    """The incomplete messages of one server, of rounds or not. Any thread."""

    def __init__(self, holding: Holding) -> None:
        self._holding = holding
        # Guards everything below. Single look-ups without it are safe: each is one step for Python.
        self._lock = threading.Lock()
        self._messages: dict[str, _Message] = {}
        self._by_object: dict[str, list[str]] = {}  # object -> messages that wait for it
        self._per_node: Counter[int] = Counter()
        self._registering = 0  # messages that are being registered
        self._came: set[str] = set()  # objects that have come since the first of these began

    @contextlib.contextmanager
    def registering(self) -> Iterator[None]:
        """Lasts while a message is registered and until :meth:`add`: an object that comes in between counts too."""
        with self._lock:
            self._registering += 1
        try:
            yield
        finally:
            with self._lock:
                self._registering -= 1
                if not self._registering:
                    self._came.clear()

    def __contains__(self, message_id: object) -> bool:
        return message_id in self._messages

    def add(self, message_id: str, node_id: int, missing: set[str]) -> None:
        """Notes that a message is registered; its node is woken when none of the objects is missing."""
        with self._lock:
            missing = missing - self._came
            if missing:
                self._messages[message_id] = _Message(node_id, missing)
                self._per_node[node_id] += 1
                for object_id in missing:
                    self._by_object.setdefault(object_id, []).append(message_id)
                return
        self._holding.news(node_id)

    def available(self, object_id: str) -> None:
        """Notes that an object is there, whoever brought it. The store calls this without its lock."""
        complete: list[int] = []
        with self._lock:
            if self._registering:
                self._came.add(object_id)
            for message_id in self._by_object.pop(object_id, ()):
                message = self._messages.get(message_id)
                if message is None:
                    continue
                message.missing.discard(object_id)
                if not message.missing:
                    del self._messages[message_id]
                    self._per_node[message.node_id] -= 1
                    complete.append(message.node_id)
        for node_id in complete:
            self._holding.news(node_id)

    def is_incoming(self, node_id: int) -> bool:
        """True while a message for a node is announced whose objects have not all come."""
        return self._per_node[node_id] > 0

    def forget_stale(self) -> None:
        """Forgets messages that have been incomplete for too long. The watcher calls this now and then."""
        with self._lock:
            before_s = time.monotonic() - STALE_S
            for message_id in [one for one, message in self._messages.items() if message.since_s < before_s]:
                message = self._messages.pop(message_id)
                self._per_node[message.node_id] -= 1
                for object_id in message.missing:
                    waiting = self._by_object.get(object_id, [])
                    if message_id in waiting:
                        waiting.remove(message_id)
                    if not waiting:
                        self._by_object.pop(object_id, None)
