"""The socket at which other processes of the same user ask a Node for its figures.

Owns the socket, its name and the rule of who may ask. The name is in the abstract namespace of Unix sockets, without a
file, so that it is gone with the process, however that ends. A connection gets one snapshot, which the Node makes.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
from collections.abc import Callable
from typing import Any

from lifl.errors import LeaseError
from lifl.ipc import keep_from_forks, uid_of_peer

log = logging.getLogger("lifl.monitor.beacon")

PREFIX = "lifl-node"
BACKLOG = 16
MAX_AT_ONCE = BACKLOG + 1
"""Askers that are answered before the workers are heard again: all that can be in the queue by then. A later asker
makes the socket readable anew, which an edge-triggered wait needs."""
SEND_BYTES = 2**20
"""Bytes that a connection should take before anybody reads; the kernel may allow less (net.core.wmem_max)."""


def name_of(pid: int, number: int) -> str:
    """The name of a Node's socket for this user, without the NUL in front of it."""
    return f"{PREFIX}-{os.getuid()}-{pid}-{number}"


class Beacon:
    """The socket of one Node. Raises ``OSError`` if the socket cannot be had.

    `tell` makes a snapshot. It is called for each asker, by the thread that calls :meth:`serve`.
    """

    def __init__(self, number: int, tell: Callable[[], dict[str, Any]]) -> None:
        self._tell = tell
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.setblocking(False)
            self._socket.bind(f"\0{name_of(os.getpid(), number)}")
            self._socket.listen(BACKLOG)
        except OSError:
            self._socket.close()
            raise
        keep_from_forks(self._socket)

    @property
    def fd(self) -> int:
        """The socket's descriptor: readable when somebody asks. Wait for it edge-triggered, see :meth:`serve`."""
        return self._socket.fileno()

    def serve(self) -> None:
        """Answers all askers, and never blocks.

        If the process has no descriptor left, an asker stays in the queue until the next one connects.
        """
        for _ in range(MAX_AT_ONCE):
            try:
                asker, _address = self._socket.accept()
            except OSError as error:
                if not isinstance(error, BlockingIOError):
                    log.debug("no connection for a snapshot of the Node could be taken: %s", error)
                return
            with asker:
                self._answer(asker)

    def _answer(self, asker: socket.socket) -> None:
        try:
            asker.setblocking(False)
            if (uid := uid_of_peer(asker)) != os.getuid():
                log.debug("a process of user %s gets no snapshot of the Node", uid)
                return
            asker.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BYTES)
            asker.send(self._snapshot())
        except OSError as error:  # the asker has gone
            log.debug("a snapshot of the Node could not be sent: %s", error)
        finally:
            # Closing it is not enough: a fork that was made meanwhile may have a copy of the descriptor.
            with contextlib.suppress(OSError):
                asker.shutdown(socket.SHUT_RDWR)

    def _snapshot(self) -> bytes:
        try:
            return json.dumps(self._tell()).encode()
        except LeaseError:  # the Node is being closed: the answer is empty, as if it were gone already
            return b""
        except Exception as error:  # this thread hears the workers too: it must go on
            log.warning("no snapshot could be made: %r", error)
            return json.dumps({"error": repr(error)}).encode()

    def close(self) -> None:
        """Answers nobody any more; harmless when closed."""
        self._socket.close()
