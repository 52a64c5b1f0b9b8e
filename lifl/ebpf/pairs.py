"""Pairs of connected TCP sockets.

TCP, because of others the kernel takes no notice: UDP and Unix sockets are let into the map, and never met again.
"""

from __future__ import annotations

import socket

TIMEOUT_S = 5.0


def pair() -> tuple[socket.socket, socket.socket]:
    """A participant's socket and its anchor, over this network namespace's loopback; blocking, not inheritable.

    Raises ``OSError`` if that is not up.
    """
    with socket.create_server(("127.0.0.1", 0), backlog=1) as listening:
        listening.settimeout(TIMEOUT_S)
        own = socket.create_connection(listening.getsockname(), timeout=TIMEOUT_S)
        try:
            while True:  # whoever else connects to this port is sent away
                anchor, peer = listening.accept()
                if peer == own.getsockname():
                    break
                anchor.close()
        except OSError:
            own.close()
            raise
    own.settimeout(None)
    anchor.settimeout(None)
    return own, anchor
