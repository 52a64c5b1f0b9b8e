"""Any number of virtual SuperNodes that keep a server busy.

Owns their threads. Each node speaks the real Fleet API, see ``virtual_node``; a server cannot distinguish it from a
real SuperNode, but it waits less and computes nothing.

An idle SuperNode asks for a message every 3 s, and a short measurement would mostly consist of these waits. If all
nodes of a fleet asked more often, the server would be busy with polls. So one node asks every 0.1 s and wakes the
others when it has got a message; they ask at once, again after pauses that double, and in the end every 3 s.
"""

from __future__ import annotations

import contextlib
import heapq
import random
import threading
import time
from collections.abc import Callable, Sequence
from typing import Self

from lifl.bench.fleet.caller import Traffic
from lifl.bench.fleet.canned_reply import Prebuilt
from lifl.bench.fleet.virtual_node import Answered, RunIsOverError, VirtualNode
from lifl.errors import PeerGoneError

POLL_S, MAX_POLL_S = 0.1, 3.0
"""The first and the longest pause after a poll without a message; the first node always makes the first one."""

HEARTBEAT_S = 20.0
"""Average time between two heartbeats of a node; a SuperNode's is (30 s - 5 s) * (0.7 to 0.9)."""


class Fleet:
    """`with Fleet("127.0.0.1:9092", replies) as fleet:` runs one node for each of `replies`.

    The block begins when all nodes are registered and active. `is_patient`: the nodes wait as long as SuperNodes do,
    3 s after an empty poll, each on its own, and 1 s and more for a missing object. `on_answered` is called by a
    node's thread each time it has answered a message. An error that ends a node is raised by :meth:`wait`, and at the
    end of the block.

    Raises
    ------
    PeerGoneError
        If the server refuses a request that a SuperNode may make, or sends an object with a wrong id.
    """

    def __init__(
        self,
        address: str,
        replies: Sequence[Prebuilt],
        *,
        is_checking: bool = False,
        is_patient: bool = False,
        on_answered: Callable[[Answered], None] | None = None,
    ) -> None:
        if not replies:
            raise ValueError("a fleet needs at least 1 node")
        self.answered: list[Answered] = []
        self._stop = threading.Event()
        self._hints = [threading.Event() for _ in replies]
        self._has_failed = threading.Event()
        self._failures: list[BaseException] = []
        self._on_answered = on_answered or (lambda _: None)
        self._is_patient = is_patient
        self._nodes = [
            VirtualNode(address, index, reply, self._stop, is_checking=is_checking, is_patient=is_patient)
            for index, reply in enumerate(replies)
        ]
        # One thread for each node and one for all heartbeats; __enter__ starts them, stop() ends them.
        self._threads = [threading.Thread(target=self._guarded, args=(self._beat,), name="heartbeats")]
        for node in self._nodes:
            arguments = (self._serve, node)
            self._threads.append(threading.Thread(target=self._guarded, args=arguments, name=f"node-{node.index}"))

    def __enter__(self) -> Self:
        try:
            for node in self._nodes:
                node.join()
        except BaseException:
            self.stop()
            raise
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        self.stop()
        if kind is None and self._failures:
            raise self._failures[0]

    @property
    def traffic(self) -> Traffic:
        """Traffic of all nodes together, so far."""
        return sum((node.traffic for node in self._nodes), Traffic())

    def wait(self, timeout: float | None = None) -> None:
        """Returns after `timeout` seconds; raises the error of a node as soon as one has failed."""
        if self._has_failed.wait(timeout):
            raise self._failures[0]

    def stop(self) -> None:
        """Ends the threads, unregisters the nodes if the server still answers, and closes the connections."""
        self._stop.set()
        for node, hint in zip(self._nodes, self._hints, strict=True):
            hint.set()
            node.interrupt()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()
        for node in self._nodes:
            # The server may be gone, or may have forgotten the node.
            with contextlib.suppress(PeerGoneError, RunIsOverError):
                node.leave()
            node.close()

    def _guarded(self, body: Callable[..., None], *args: object) -> None:
        try:
            body(*args)
        except (PeerGoneError, OSError, RunIsOverError, ValueError) as error:
            if not self._stop.is_set():
                self._failures.append(error)
                self._has_failed.set()

    def _serve(self, node: VirtualNode) -> None:
        pause_s = POLL_S
        while not self._stop.is_set():
            polled = node.poll()
            if polled is None and self._is_patient:
                self._stop.wait(MAX_POLL_S)
                continue
            if polled is None:
                if self._hints[node.index].wait(pause_s):
                    self._hints[node.index].clear()
                    pause_s = POLL_S
                elif node.index:
                    pause_s = min(2 * pause_s, MAX_POLL_S)
                continue
            if node.index == 0 and not self._is_patient:
                for hint in self._hints[1:]:
                    hint.set()
            pause_s = POLL_S
            if (answered := node.answer(polled)) is not None:
                self.answered.append(answered)
                self._on_answered(answered)

    def _beat(self) -> None:
        due = [(time.monotonic(), node.index) for node in self._nodes]
        while not self._stop.is_set():
            at, index = due[0]
            if not self._stop.wait(max(0.0, at - time.monotonic())):
                self._nodes[index].heartbeat()
                heapq.heapreplace(due, (time.monotonic() + random.uniform(0.9, 1.1) * HEARTBEAT_S, index))
