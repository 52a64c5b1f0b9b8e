"""Pairs of connected TCP sockets.

Only TCP works: the kernel lets UDP and Unix sockets into the map, and then never runs the program for them.
"""

from __future__ import annotations

import socket

TIMEOUT_S = 5.0


def pair() -> tuple[socket.socket, socket.socket]:
    """A participant's socket and its anchor, over the loopback of this network namespace; blocking, not inheritable.

    Raises ``OSError`` if the loopback is not up.
    """
    with socket.create_server(("127.0.0.1", 0), backlog=1) as listening:
        listening.settimeout(TIMEOUT_S)
        own = socket.create_connection(listening.getsockname(), timeout=TIMEOUT_S)
        try:
            while True:  # any other process that connects to this port is refused
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
