"""Listening sockets that a fork of this process must not keep.

A fork has none of the threads that serve them: whoever connected to its copy would wait for nobody, and a port would be
taken for as long as it lives.
"""

from __future__ import annotations

import os
import socket
import weakref

_sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()


def keep_from_forks(listening: socket.socket) -> None:
    """Closes the copy of a socket in every fork that is made from now on."""
    _sockets.add(listening)


def _close_in_child() -> None:
    for listening in list(_sockets):
        listening.close()


if hasattr(os, "register_at_fork"):  # not on Windows, where importing lifl must work too
    os.register_at_fork(after_in_child=_close_in_child)
