"""Calls of the Fleet API over one keep-alive HTTP connection, signed as a SuperNode signs them.

Owns a node's identity, its sockets and the counters of its traffic. Knows no message and no round. Written on bare
sockets, because a load generator should take as little CPU time of the machine as possible, and httpx, which the
SuperNode uses, takes a millisecond for a call.
"""

from __future__ import annotations

import contextlib
import re
import select
import socket
import struct
import threading
from base64 import b64encode
from collections.abc import Sequence

import attrs
from flwr.common.constant import TIMESTAMP_HEADER
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.date import now
from flwr.supercore.primitives.asymmetric import generate_key_pairs, public_key_to_bytes, sign_message
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE
from flwr.supercore.runtime_version_compatibility import RuntimeVersionMetadata

from lifl.errors import PeerGoneError

TIMEOUT_S = 30
"""Time-out of one send or receive, as in the SuperNode's client (flwr 1.42)."""

RETRY_S = 1.0
"""The first pause before a failed call is repeated; the pause doubles each time, as in the SuperNode."""

MAX_RETRY_S = 20.0
RETRIED = (502, 503, 504)
END_OF_HEAD = b"\r\n\r\n"
LENGTH = re.compile(rb"\r\ncontent-length: *([0-9]+)", re.IGNORECASE)
BUFFER_BYTES = 1 << 16

Body = bytes | bytearray | memoryview


@attrs.define
class Traffic:
    """Counters of connections; bytes include the heads of HTTP, but not those of TCP."""

    calls: int = 0
    sent_bytes: int = 0
    received_bytes: int = 0
    repeated: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(*(a + b for a, b in zip(attrs.astuple(self), attrs.astuple(other), strict=True)))

    def __sub__(self, other: Traffic) -> Traffic:
        return Traffic(*(a - b for a, b in zip(attrs.astuple(self), attrs.astuple(other), strict=True)))


class Identity:
    """A new key pair, and the headers that prove its possession: those of Flower's NodeAuthHttpInterceptor."""

    def __init__(self) -> None:
        self._private_key, public_key = generate_key_pairs()
        self.public_key = public_key_to_bytes(public_key)
        metadata = RuntimeVersionMetadata.from_local_component("SuperNode").as_metadata()
        fixed = {
            "accept": PROTOBUF_MEDIA_TYPE,
            "accept-encoding": "identity",
            "connection": "keep-alive",
            "user-agent": "lifl",
            "content-type": PROTOBUF_MEDIA_TYPE,
            **dict(metadata),
            FLEET_HTTP_PUBLIC_KEY_HEADER: b64encode(self.public_key).decode("ascii"),
        }
        self._fixed = "".join(f"{name}: {value}\r\n" for name, value in fixed.items())

    def headers(self) -> str:
        """Headers for one call, with a signature over the present time."""
        timestamp = now().isoformat()
        signature = b64encode(sign_message(self._private_key, timestamp.encode("ascii"))).decode("ascii")
        return f"{self._fixed}{TIMESTAMP_HEADER}: {timestamp}\r\n{FLEET_HTTP_SIGNATURE_HEADER}: {signature}\r\n"


class Caller:
    """A connection to the server at `address`, made when it is first needed; for one thread at a time.

    `stop` ends every pause; :meth:`interrupt` ends a wait for the server.
    """

    def __init__(self, address: str, identity: Identity, stop: threading.Event) -> None:
        self.traffic = Traffic()
        self._address = address
        self._identity = identity
        self._stop = stop
        self._socket: socket.socket | None = None
        self._buffer = bytearray(BUFFER_BYTES)

    def call(self, path: str, *parts: Body) -> tuple[int, bytes]:
        """The status and the body of the answer to POST `path`; the request's body is `parts`, joined.

        A call that fails on the way, or with a status in ``RETRIED``, is repeated until it succeeds. Raises
        :class:`PeerGoneError` if the Fleet is stopped meanwhile.
        """
        pause_s = RETRY_S
        while True:
            try:
                status, body = self._once(path, parts)
                if status not in RETRIED:
                    return status, body
                problem = f"status {status}"
            except OSError as error:
                problem = str(error)
                self.close()
            self.traffic.repeated += 1
            if self._stop.wait(pause_s):
                raise PeerGoneError(f"{path} on {self._address} had no answer when the fleet was stopped: {problem}")
            pause_s = min(2 * pause_s, MAX_RETRY_S)

    def interrupt(self) -> None:
        """Ends the connection, so that a thread that waits for the server fails at once; for any thread."""
        if (connection := self._socket) is not None:
            with contextlib.suppress(OSError):  # the server has closed the connection already
                connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Closes the connection; the next call makes another one."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _once(self, path: str, parts: Sequence[Body]) -> tuple[int, bytes]:
        connection = self._connected()
        length = sum(map(len, parts))
        begin = f"POST {path} HTTP/1.1\r\nhost: {self._address}\r\n"
        head = f"{begin}{self._identity.headers()}content-length: {length}\r\n\r\n".encode("ascii")
        # The SuperNode's client sends the head in a packet of its own; the server must see the same pattern.
        connection.sendall(head)
        for part in parts:
            connection.sendall(part)
        self.traffic.calls += 1
        self.traffic.sent_bytes += len(head) + length
        return self._receive(connection)

    def _receive(self, connection: socket.socket) -> tuple[int, bytes]:
        have = 0
        while (end := self._buffer.find(END_OF_HEAD, 0, have)) < 0:
            if have == len(self._buffer):
                raise ConnectionError(f"the answer's head is longer than {have} bytes")
            have += self._some(connection, have, 0)
        head, body = bytes(self._buffer[:end]), end + len(END_OF_HEAD)
        match = LENGTH.search(head)
        if match is None:
            raise ConnectionError(f"the answer has no content-length: {head!r}")
        total = body + int(match[1])
        if total > len(self._buffer):
            self._buffer.extend(bytes(total - len(self._buffer)))
        while have < total:
            have += self._some(connection, have, total)
        self.traffic.received_bytes += total
        return int(head[9:12]), bytes(memoryview(self._buffer)[body:total])

    def _some(self, connection: socket.socket, have: int, until: int) -> int:
        """Receives bytes behind the first `have`: all up to `until`, or, if that is 0, those that have come."""
        with memoryview(self._buffer) as view:
            # MSG_WAITALL: one system call, and one wait for the GIL, for a body of any length.
            flags = socket.MSG_WAITALL if until else 0
            count = connection.recv_into(view[have : until or None], flags=flags)
        if count == 0:
            raise ConnectionError("the server closed the connection")
        return count

    def _connected(self) -> socket.socket:
        if self._socket is not None:
            # A server closes a connection that was idle for some seconds; poll() then reports it as readable.
            poll = select.poll()
            poll.register(self._socket, select.POLLIN)
            if not poll.poll(0):
                return self._socket
            self.close()
        host, _, port = self._address.rpartition(":")
        connection = socket.create_connection((host, int(port)), TIMEOUT_S)
        # Blocking, with the kernel's time-outs: with Python's own, the thread would wake for every piece of a body.
        connection.settimeout(None)
        limit = struct.pack("ll", TIMEOUT_S, 0)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket = connection
        return connection
