"""The thread that hears a Node's workers: it sleeps until one writes, dies, is silent or has rested long enough.

Owns the waiting and the clock; what was heard, and what a death means, is the Node's business.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Container
from typing import Protocol

from lifl.errors import PeerGoneError
from lifl.shm import messages
from lifl.shm.ring import Bell, Outbox, Receiver
from lifl.workers.supervisor import Supervisor
from lifl.workers.traffic import Traffic

log = logging.getLogger("lifl.workers.listener")

SLOWEST_FOLD = 100e6
"""Bytes a second that the slowest worker still reads: it may be silent as long as it takes to read all in use."""
RETRY_S = 0.002
"""What did not fit into a full ring is tried again so soon: its consumer does not ring."""


class Employer(Protocol):
    """The Node, as its agent needs it; all but :meth:`replace` is called with its lock held."""

    outbox: Outbox
    changed: threading.Condition
    traffic: Traffic

    @property
    def is_closed(self) -> bool:
        """True when the thread has to end."""

    @property
    def used_bytes(self) -> int:
        """Of the arena: what a worker may be reading."""

    @property
    def is_owed(self) -> bool:
        """True while a worker owes a round something."""

    def engaged(self) -> Container[int]:
        """The workers that have a part in a round."""

    def drain(self) -> bool:
        """Takes what workers have said into the books."""

    def replace(self, pidfd: int) -> None:
        """A worker is proven dead."""

    def lose(self, error: PeerGoneError) -> None:
        """The Node cannot go on."""


class Agent:
    """A Node's, started at once; it ends after ``is_closed`` and a ring of its bell."""

    def __init__(
        self, node: Employer, supervisor: Supervisor, inbox: Receiver, bell: Bell, idle_timeout: float | None
    ) -> None:
        self._node, self._supervisor, self._inbox, self._bell = node, supervisor, inbox, bell
        self._idle_timeout = idle_timeout
        if inbox.fd is not None:
            supervisor.listen(inbox.fd)
        self._is_dozing = False  # it sleeps until it is rung, and watches nobody
        # A daemon: a Node that is never closed must not keep the interpreter from ending.
        self._thread = threading.Thread(target=self._hear, name="lifl-agent", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """There is work: workers are watched again."""
        if self._is_dozing:
            with self._node.changed:
                self._is_dozing = False
            self._bell.ring()

    def join(self) -> None:
        """Waits for its end, unless it is the one that asks."""
        if self._thread is not threading.current_thread():
            self._thread.join()

    def _hear(self) -> None:
        """Without this nobody would hear the workers, so what ends it ends the Node, loudly."""
        try:
            self._listen()
        except Exception as error:
            log.exception("the agent's thread ended")
            with self._node.changed:
                self._node.lose(PeerGoneError(f"the thread that hears the workers ended: {error!r}"))

    def _listen(self) -> None:
        next_tick = 0.0
        while True:
            self._bell.clear()
            with self._node.changed:
                if self._node.is_closed:
                    return
                self._node.drain()
                wait_s: float | None = next_tick - (now := time.monotonic())
                if self._is_dozing or next_tick <= now:
                    wait_s, next_tick = self._watch(now), now + self._supervisor.tick_s
                is_sent = self._node.outbox.flush()
                if not self._inbox.arm():
                    continue
            for pidfd in self._supervisor.wait(wait_s if is_sent else RETRY_S):
                self._node.replace(pidfd)

    def _watch(self, now: float) -> float | None:
        """Ends who has nothing to do, asks who owes something for a sign of life; seconds until the next time."""
        supervisor, outbox, left_s = self._supervisor, self._node.outbox, None
        if self._idle_timeout is not None:
            leaving, left_s = supervisor.dismiss(now, self._node.engaged(), self._idle_timeout)
            for me in leaving:
                outbox.push(me, messages.STOP)
        # Who was told to stop and does not is watched too: it would stay for ever.
        self._is_dozing = not self._node.is_owed and not supervisor.leaving
        if self._is_dozing:
            supervisor.rest()
            return left_s
        self._node.traffic.look()
        for me in supervisor.tick(now, self._node.used_bytes / SLOWEST_FOLD):
            outbox.push(me, messages.PING)
        return supervisor.tick_s
