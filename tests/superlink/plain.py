"""HTTP as no client of Flower's speaks it: heads and bodies by hand, in pieces, on connections of their own."""

from __future__ import annotations

import contextlib
import http.client
import re
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import attrs
import uvicorn
from rig import HOST, Node, Rig

Headers = list[tuple[str, str]]


@attrs.frozen
class Answer:
    """What a server said, without what changes from answer to answer."""

    status: int
    body: bytes
    headers: tuple[tuple[str, str], ...]


def call(port: int, path: str, headers: Headers, body: bytes) -> Answer:
    """One request on a connection of its own; `headers` may have a name twice."""
    connection = http.client.HTTPConnection(HOST, port, timeout=20)
    try:
        connection.putrequest("POST", path, skip_accept_encoding=True)
        for name, value in headers:
            connection.putheader(name, value)
        connection.putheader("content-length", str(len(body)))
        connection.endheaders(body)
        answer = connection.getresponse()
        found = ((n.lower(), v.replace(f":{port}/", "/")) for n, v in answer.getheaders())
        said = tuple(sorted(header for header in found if header[0] != "date"))
        return Answer(answer.status, answer.read(), said)
    finally:
        connection.close()


def headers_of(node: Node) -> Headers:
    """Those of a SuperNode's request, signed now."""
    lines = node.identity.headers().split("\r\n")
    return [(name, value.strip()) for name, _, value in (line.partition(":") for line in lines if line)]


def without(headers: Headers, *names: str) -> Headers:
    """The others."""
    return [(name, value) for name, value in headers if name.lower() not in names]


def replaced(headers: Headers, **values: str) -> Headers:
    """Some of them with another value; an underscore stands for a hyphen."""
    wanted = {name.replace("_", "-"): value for name, value in values.items()}
    return [(name, wanted.get(name.lower(), value)) for name, value in headers]


class Line:
    """A connection on which bytes are sent as they are."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection((HOST, port), 20)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._have = b""

    def send(self, *parts: bytes) -> None:
        """Sends them, each in a packet of its own."""
        for part in parts:
            self.socket.sendall(part)

    def answer(self) -> tuple[int, bytes]:
        """The next answer's status and body; raises ``EOFError`` if the server has closed the connection."""
        while b"\r\n\r\n" not in self._have:
            self._more()
        head, _, rest = self._have.partition(b"\r\n\r\n")
        if head.startswith(b"HTTP/1.1 100"):
            self._have = rest
            return 100, b""
        found = re.search(rb"content-length: *([0-9]+)", head, re.IGNORECASE)
        assert found is not None, head
        length = int(found[1])
        while len(rest) < length:
            self._more()
            rest = self._have.partition(b"\r\n\r\n")[2]
        self._have = rest[length:]
        return int(head[9:12]), rest[:length]

    @property
    def is_closed(self) -> bool:
        """True if the server has closed it, without an answer."""
        try:
            self.answer()
        except (EOFError, ConnectionError):
            return True
        return False

    def close(self) -> None:
        """Lets go of it."""
        self.socket.close()

    def _more(self) -> None:
        data = self.socket.recv(2**16)
        if not data:
            raise EOFError("the server has closed the connection")
        self._have += data

    def __enter__(self) -> Line:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def head(path: str, headers: Headers, length: int, more: Sequence[str] = (), version: str = "1.1") -> bytes:
    """The head of a request."""
    lines = [f"POST {path} HTTP/{version}", "host: x", *(f"{name}: {value}" for name, value in headers)]
    return "\r\n".join([*lines, f"content-length: {length}", *more, "", ""]).encode("latin-1")


@contextlib.contextmanager
def flowers_server(rig: Rig) -> Iterator[int]:
    """The port of a second server of a rig's app: Flower's own routes and uvicorn's own protocol, the same state."""
    config = uvicorn.Config(
        rig.plane.app, host=HOST, port=0, http="httptools", loop="asyncio", lifespan="off", log_level="warning"
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, name="Flower's server")
    thread.start()
    try:
        deadline = time.monotonic() + 20
        while not server.started and thread.is_alive() and time.monotonic() < deadline:
            time.sleep(0.005)
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(20)


def soon(is_true: Any, timeout: float = 5.0) -> bool:
    """Waits for something to become true; whether it did."""
    deadline = time.monotonic() + timeout
    while not is_true():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.002)
    return True
