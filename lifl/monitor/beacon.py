"""Where other processes of the same user ask a Node what it is doing: a socket with a name and no file.

Owns the socket, its name and who may ask. The name is in the abstract namespace of Unix sockets, so that it is gone
with the process, however that ends. One connection is one snapshot. What is told is the Node's.
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
"""Askers that are answered before the workers are heard again: all that can have queued up by then. Who comes later is
told of anew, which an edge-triggered wait needs."""
SEND_BYTES = 2**20
"""What a connection is to take without anybody reading; the kernel may allow less (net.core.wmem_max)."""


def name_of(pid: int, number: int) -> str:
    """The name of a Node of this user's, without the NUL in front of it."""
    return f"{PREFIX}-{os.getuid()}-{pid}-{number}"


class Beacon:
    """One Node's. Raises ``OSError`` if the socket cannot be had.

    `tell` is called for each snapshot, by who calls :meth:`serve`.
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
        """Readable when somebody asks; to be waited on edge-triggered, see :meth:`serve`."""
        return self._socket.fileno()

    def serve(self) -> None:
        """Answers those who ask, without ever blocking.

        If no descriptor is left for an asker it stays in the queue, and the socket readable, until the next one comes.
        """
        for _ in range(MAX_AT_ONCE):
            try:
                asker, _address = self._socket.accept()
            except OSError as error:
                if not isinstance(error, BlockingIOError):
                    log.debug("nobody can be told what the Node is doing: %s", error)
                return
            with asker:
                self._answer(asker)

    def _answer(self, asker: socket.socket) -> None:
        try:
            asker.setblocking(False)
            if (uid := uid_of_peer(asker)) != os.getuid():
                log.debug("a process of user %s is not told what the Node is doing", uid)
                return
            asker.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BYTES)
            asker.send(self._said())
        except OSError as error:  # it has gone
            log.debug("an asker was not told what the Node is doing: %s", error)
        finally:
            # Not only closed: a fork that was made meanwhile may have a copy.
            with contextlib.suppress(OSError):
                asker.shutdown(socket.SHUT_RDWR)

    def _said(self) -> bytes:
        try:
            return json.dumps(self._tell()).encode()
        except LeaseError:  # the Node is being closed: nothing is said, as if it were gone already
            return b""
        except Exception as error:  # the thread that serves hears the workers too: it must go on
            log.warning("no snapshot could be made: %r", error)
            return json.dumps({"error": repr(error)}).encode()

    def close(self) -> None:
        """Nobody is answered any more; harmless when closed."""
        self._socket.close()
