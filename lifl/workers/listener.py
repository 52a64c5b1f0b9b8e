"""The owner's thread that listens to the workers: it wakes when one sends, dies, is silent or has been idle too long.

Owns the waiting and the clock. The Node decides what a message or a death means.
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
"""Bytes a second that the slowest worker reads. It may be silent for as long as it needs to read all in use."""
RETRY_S = 0.002
"""The wait before a descriptor that did not fit into a full ring is tried again: the consumer rings no bell."""


class Listened(Protocol):
    """The Node, as the thread uses it. All but :meth:`replace` is called with the Node's lock held."""

    outbox: Outbox
    changed: threading.Condition
    traffic: Traffic

    @property
    def is_closed(self) -> bool:
        """True when the thread must end."""

    @property
    def used_bytes(self) -> int:
        """Bytes of the arena in use: as much as a worker may be reading."""

    @property
    def waits_for_workers(self) -> bool:
        """True while a round waits for a worker."""

    def engaged(self) -> Container[int]:
        """The workers that have a part in a round."""

    def drain(self) -> bool:
        """Handles the messages of the workers; true if there were any."""

    def replace(self, pidfd: int) -> None:
        """Replaces a worker that is proven dead."""

    def lose(self, error: PeerGoneError) -> None:
        """Ends every round with this error: the Node cannot go on."""


class Listener:
    """The thread of one Node. It starts at once, and ends at a ring of the bell when ``is_closed`` is true."""

    def __init__(
        self, node: Listened, supervisor: Supervisor, inbox: Receiver, bell: Bell, idle_timeout: float | None
    ) -> None:
        self._node = node
        self._supervisor = supervisor
        self._inbox = inbox
        self._bell = bell
        self._idle_timeout = idle_timeout
        if inbox.fd is not None:
            supervisor.listen(inbox.fd)
        self._is_dozing = False  # no round waits for a worker: sleeps until the bell, and watches none
        # The constructor starts the thread, `Node.close` ends it. A daemon: a Node that is never closed must not keep
        # the interpreter from ending.
        self._thread = threading.Thread(target=self._run, name="lifl-listener", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """Begins to watch the workers again, because there is work."""
        if self._is_dozing:
            with self._node.changed:
                self._is_dozing = False
            self._bell.ring()

    def join(self) -> None:
        """Waits for the end of the thread; returns at once if the thread itself asks."""
        if self._thread is not threading.current_thread():
            self._thread.join()

    def _run(self) -> None:
        """Runs the thread. Without it no message would be heard, so an error that ends it ends the Node, loudly."""
        try:
            self._listen()
        except Exception as error:
            log.exception("the listener's thread ended")
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
        """Stops idle workers, and asks the others for a sign of life; returns the seconds until the next watch."""
        supervisor, outbox, left_s = self._supervisor, self._node.outbox, None
        if self._idle_timeout is not None:
            leaving, left_s = supervisor.retire(now, self._node.engaged(), self._idle_timeout)
            for worker in leaving:
                outbox.push(worker, messages.STOP)
        # A worker that got a STOP is watched too: one that is stuck would stay for ever.
        self._is_dozing = not self._node.waits_for_workers and not supervisor.leaving
        if self._is_dozing:
            supervisor.rest()
            return left_s
        self._node.traffic.look()
        for worker in supervisor.tick(now, self._node.used_bytes / SLOWEST_FOLD):
            outbox.push(worker, messages.PING)
        return supervisor.tick_s
