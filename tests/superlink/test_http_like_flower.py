"""Whatever way HTTP is spoken, lifl's server answers as Flower's own, which serves the same app.

Each row is what a client sends on one connection. Both servers get it, with objects of their own: the number of
answers, their status and body in order, whether the connection stays open, and which objects were stored must be the
same.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import socket
import time
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

import attrs
import pytest
from flwr.proto import fleet_pb2, message_pb2
from raw_http import Headers, flowers_server, headers_of, replaced, soon, without
from rig import HOST, Node, Rig

from lifl.superlink.http import protocol
from lifl.superlink.http.connection import AWAITED

QUIET_S = 0.25
"""After so long without a byte a server has said all."""

MAX_OBJECT = 2**20
HOLD_S = 0.1
_numbers = count()


@attrs.define
class Speaker:
    """Makes the requests of one row for one server; knows which objects it announced."""

    rig: Rig
    node: Node
    run_id: int
    headers: Headers
    object_ids: list[str] = attrs.field(factory=list)

    def request(self, path: str, body: bytes, *more: str, version: str = "1.1", **options: Any) -> bytes:
        """A POST; `headers` replaces the node's, `length` what is declared: None declares nothing."""
        headers, length = options.get("headers", self.headers), options.get("length", len(body))
        lines = [f"POST {path} HTTP/{version}", "host: x", *(f"{name}: {value}" for name, value in headers), *more]
        if length is not None:
            lines.append(f"content-length: {length}")
        return "\r\n".join([*lines, "", ""]).encode("latin-1") + body

    def body(self, nbytes: int = 1000) -> bytes:
        """A push-object request of an object that its session lacks."""
        content = b"ArrayChunk  %d\0" % nbytes + (next(_numbers).to_bytes(8, "little") * (nbytes // 8 + 1))[:nbytes]
        object_id = hashlib.sha256(content).hexdigest()
        session_id = self.rig.state.start_session(self.run_id)
        self.rig.state.preregister_object_tree(message_pb2.ObjectTree(object_id=object_id), session_id)
        self.object_ids.append(object_id)
        return message_pb2.PushObjectRequest(
            node=self.node.proto,
            run_id=self.run_id,
            object_id=object_id,
            object_content=content,
            session_id=session_id,
        ).SerializeToString(deterministic=True)

    def push(self, *more: str, nbytes: int = 1000, **options: Any) -> bytes:
        """A push-object."""
        return self.request("/v1/fleet/push-object", self.body(nbytes), *more, **options)

    def pull(self, *more: str, **options: Any) -> bytes:
        """A pull-object, of one that is not there."""
        body = message_pb2.PullObjectRequest(node=self.node.proto, run_id=self.run_id, object_id="f" * 64)
        return self.request("/v1/fleet/pull-object", body.SerializeToString(), *more, **options)

    def poll(self, *more: str, **options: Any) -> bytes:
        """A pull-messages: lifl's server holds it."""
        body = fleet_pb2.PullMessagesRequest(node=self.node.proto).SerializeToString()
        return self.request("/v1/fleet/pull-messages", body, *more, **options)

    def chunked(self, *more: str, nbytes: int = 1000, pieces: int = 3, path: str = "push-object") -> bytes:
        """A push-object in chunks."""
        body = self.body(nbytes)
        size = len(body) // pieces + 1
        chunks = [body[at : at + size] for at in range(0, len(body), size)]
        whole = b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\n\r\n"
        return self.request(f"/v1/fleet/{path}", whole, "transfer-encoding: chunked", *more, length=None)


def get(path: str = "/health", *more: str) -> bytes:
    """A GET."""
    return "\r\n".join([f"GET {path} HTTP/1.1", "host: x", *more, "", ""]).encode()


@attrs.frozen
class Said:
    """The acts of a server: its answers and their effects."""

    answers: tuple[tuple[int, bytes], ...]
    is_open: bool
    stored: tuple[bool, ...]

    @property
    def statuses(self) -> list[int]:
        """The statuses of the answers."""
        return [status for status, _ in self.answers]


def parse(data: bytes) -> Iterator[tuple[int, bytes]]:
    """The answers in what a server wrote."""
    while data:
        head, _, rest = data.partition(b"\r\n\r\n")
        status = int(head[9:12])
        length = re.search(rb"content-length: *([0-9]+)", head)
        if b"HTTP/" not in rest:  # the last: also one that ends with the connection
            body, data = rest, b""
        elif status == 100 or (length is None and b"transfer-encoding" not in head):
            body, data = b"", rest
        elif length is not None:
            body, data = rest[: int(length[1])], rest[int(length[1]) :]
        else:
            body, data = rest.partition(b"0\r\n\r\n")[::2]
        yield status, body


def say(port: int, packets: list[bytes]) -> tuple[bytes, bool]:
    """Sends them; what came back, and whether the connection is open."""
    got = b""
    with socket.create_connection((HOST, port), 10) as line:
        line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with contextlib.suppress(ConnectionError):  # answered and closed before all of it was sent
            for packet in packets:
                line.sendall(packet)
                time.sleep(0.02 if len(packets) > 1 else 0)
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            line.settimeout(QUIET_S if got else 2.0)
            try:
                data = line.recv(2**16)
            except TimeoutError:
                return got, True
            except ConnectionError:
                return got, False
            if not data:
                return got, False
            got += data
    raise AssertionError("the server does not stop to answer")


Make = Callable[[Speaker], list[bytes]]
UPGRADE = ("connection: Upgrade",)
WEBSOCKET = (
    "connection: Upgrade",
    "upgrade: websocket",
    "sec-websocket-version: 13",
    "sec-websocket-key: " + "A" * 22 + "==",
)
H2C = ("connection: Upgrade, HTTP2-Settings", "upgrade: h2c", "HTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA")


def bare(s: Speaker) -> Headers:
    """A node's headers without its signature."""
    return without(s.headers, "flwr-signature")


def json_kind(s: Speaker) -> Headers:
    """A node's headers, with another media type."""
    return replaced(s.headers, content_type="application/json")


def halves(data: bytes) -> list[bytes]:
    """Two packets."""
    return [data[: len(data) // 2], data[len(data) // 2 :]]


def odd(s: Speaker) -> Headers:
    """A node's headers in odd case."""
    return [(name.upper() if at % 2 else name.title(), value) for at, (name, value) in enumerate(s.headers)]


ROWS: dict[str, Make] = {
    # several at once
    "a push": lambda s: [s.push()],
    "two pushes in a packet": lambda s: [s.push() + s.push()],
    "three pushes in a packet": lambda s: [s.push() + s.push() + s.push()],
    "three large pushes": lambda s: [s.push(nbytes=200_000) + s.push(nbytes=200_000) + s.push(nbytes=200_000)],
    "pushes cut in the middle": lambda s: halves(s.push() + s.push() + s.push()),
    "a push behind a poll": lambda s: [s.poll() + s.push()],
    "a push a little behind a poll": lambda s: [s.poll(), s.push()],
    "three polls and a pull": lambda s: [s.poll() + s.poll() + s.poll() + s.pull()],
    "a large push behind a poll": lambda s: [s.poll() + s.push(nbytes=300_000)],
    "a push behind 401": lambda s: [s.push(headers=bare(s)) + s.push()],
    "a push behind 415": lambda s: [s.push(headers=json_kind(s)) + s.push()],
    "a push behind 400": lambda s: [s.request("/v1/fleet/push-object", b"\xff\xff") + s.push()],
    "a poll behind 401": lambda s: [s.poll(headers=bare(s)) + s.poll()],
    "an empty poll": lambda s: [s.request("/v1/fleet/pull-messages", b"") + s.push()],
    "GET, then push": lambda s: [get() + s.push()],
    "push, then GET": lambda s: [s.push() + get()],
    "GET between pushes": lambda s: [s.push() + get("/nothing") + s.push()],
    "push, unknown route, poll, push": lambda s: [s.push() + s.request("/v1/x", b"?") + s.poll() + s.push()],
    "twenty": lambda s: [b"".join(s.push() + get("/nothing") for _ in range(10))],
    "HEAD, then push": lambda s: [get().replace(b"GET", b"HEAD") + s.push()],
    "GET of a route of ours, then push": lambda s: [get("/v1/fleet/push-object") + s.push()],
    # the end of the connection
    "1.0": lambda s: [s.push(version="1.0")],
    "1.0, then more": lambda s: [s.push(version="1.0") + s.push()],
    "1.0 keep-alive": lambda s: [s.push("connection: keep-alive", version="1.0")],
    "1.0 keep-alive, then more": lambda s: [s.push("connection: keep-alive", version="1.0") + s.push()],
    "1.0 poll, then more": lambda s: [s.poll(version="1.0") + s.push()],
    "close": lambda s: [s.push("connection: close", headers=without(s.headers, "connection"))],
    "close, then more": lambda s: [s.push("connection: close", headers=without(s.headers, "connection")) + s.push()],
    "poll that closes, then more": lambda s: [
        s.poll("connection: close", headers=without(s.headers, "connection")) + s.push()
    ],
    "close, then nonsense": lambda s: [
        s.push("connection: close", headers=without(s.headers, "connection")),
        b"nonsense\r\n\r\n",
    ],
    "GET that closes, then push": lambda s: [get("/nothing", "connection: close") + s.push()],
    # another protocol
    **{
        f"{kind} {route}": lambda s, kind=kind, route=route: [getattr(s, route)(*UPGRADES[kind], headers=plain(s))]
        for kind in ("websocket", "h2c")
        for route in ("push", "pull", "poll")
    },
    "websocket GET": lambda s: [get("/health", *WEBSOCKET)],
    "h2c GET": lambda s: [get("/health", *H2C)],
    "h2c push, then push": lambda s: [s.push(*H2C, headers=plain(s)) + s.push()],
    "h2c push, a little later a push": lambda s: [s.push(*H2C, headers=plain(s)), s.push()],
    "h2c push in pieces": lambda s: cut_at_body(s.push(*H2C, headers=plain(s))),
    "upgrade without a protocol": lambda s: [s.push(*UPGRADE, headers=plain(s)) + s.push()],
    "a protocol without upgrade": lambda s: [s.push("upgrade: h2c") + s.push()],
    # bodies
    "100-continue": lambda s: [s.push("expect: 100-continue")],
    "100-continue, the body later": lambda s: cut_at_body(s.push("Expect: 100-Continue")),
    "100-continue poll": lambda s: [s.poll("expect: 100-continue")],
    "100-continue behind a push": lambda s: [s.push() + s.push("expect: 100-continue")],
    "chunked": lambda s: [s.chunked()],
    "chunked, large": lambda s: [s.chunked(nbytes=300_000, pieces=7)],
    "chunked, in single bytes": lambda s: [s.chunked(nbytes=300, pieces=500)],
    "chunked between pushes": lambda s: [s.push() + s.chunked() + s.push()],
    "chunked behind a poll": lambda s: [s.poll() + s.chunked(nbytes=200_000)],
    "chunked, no chunk": lambda s: [s.request(PUSH, b"zz\r\n", "transfer-encoding: chunked", length=None)],
    "identity": lambda s: [s.push("content-encoding: identity")],
    "identity poll, then push": lambda s: [s.poll("Content-Encoding: Identity") + s.push()],
    "gzip that is none": lambda s: [s.push("content-encoding: gzip")],
    "odd case": lambda s: [s.push(headers=odd(s)) + s.push()],
    "two lengths": lambda s: [s.push("content-length: 3")],
    "the same length twice": lambda s: [s.request(PUSH, s.body(), f"Content-Length: {len(s.body())}")],
    "a length that is no number": lambda s: [s.push(length="much")],
    "a negative length": lambda s: [s.push(length=-1)],
    "a length beyond all": lambda s: [s.push(length="9" * 30)],
    "a length and chunks": lambda s: [s.push("transfer-encoding: chunked")],
    "no length": lambda s: [s.request(PUSH, b"", length=None)],
    "no length, then push": lambda s: [s.request(PUSH, b"", length=None) + s.push()],
    "shorter than declared": lambda s: [s.push(length=5000)],
    "query": lambda s: [s.request(PUSH + "?a=1", s.body()) + s.push()],
    "encoded path": lambda s: [s.request(PUSH.replace("-", "%2D"), s.body()) + s.push()],
    "absolute path": lambda s: [s.request("http://x" + PUSH, s.body()) + s.push()],
    "nonsense": lambda s: [b"\x00\x01\x02\r\n\r\n"],
    "a push, much later nonsense": lambda s: [s.push(), b"", b"", b"", b"", b"nonsense\r\n\r\n"],
    "GET, then nonsense": lambda s: [get("/nothing") + b"nonsense\r\n\r\n"],
}
RACES = {"h2c push in pieces"}
"""Rows in which a server that is busy sees the body before it has answered the head, and then says one thing less."""
PUSH = "/v1/fleet/push-object"
UPGRADES = {"websocket": WEBSOCKET, "h2c": H2C}


def plain(s: Speaker) -> Headers:
    """A node's headers, without one that says whether the connection stays."""
    return without(s.headers, "connection")


def cut_at_body(data: bytes) -> list[bytes]:
    """The head, and the body a little later."""
    head, _, body = data.partition(b"\r\n\r\n")
    return [head + b"\r\n\r\n", body]


@attrs.frozen
class Other:
    """A row in which lifl differs on purpose."""

    make: Make
    why: str
    statuses: list[int]
    is_open: bool
    stored: list[bool]


OTHERS: dict[str, Other] = {
    "longer than declared": Other(
        lambda s: [s.push() + b"and more"],
        "what came before the nonsense is done and answered; Flower's server does it and does not say so",
        [200, 400],
        False,
        [True],
    ),
    "Close": Other(
        lambda s: [s.push("Connection: Close", headers=plain(s)), s.push()],
        "a client that wants to end the connection may write it as HTTP allows; Flower's server knows `close` alone",
        [200],
        False,
        [True, False],
    ),
    "keep-alive, close": Other(
        lambda s: [s.poll("connection: keep-alive, close", headers=plain(s))],
        "the same",
        [200],
        False,
        [],
    ),
    "nonsense behind a poll": Other(
        lambda s: [s.poll() + b"nonsense\r\n\r\n"],
        "the same: answers stay in order",
        [200, 400],
        False,
        [],
    ),
    "a large object": Other(
        lambda s: [s.push(nbytes=MAX_OBJECT + 1) + s.push()],
        "an object has at most --lifl-max-object bytes; what follows is answered",
        [413, 200],
        True,
        [False, True],
    ),
    "a large object, as it is": Other(
        lambda s: [s.push("content-encoding: identity", nbytes=MAX_OBJECT + 1) + s.push()],
        "also if it says that it has no coding",
        [413, 200],
        True,
        [False, True],
    ),
    "a large object in chunks": Other(
        lambda s: [s.chunked(nbytes=MAX_OBJECT + 2**14, pieces=9)],
        "also in chunks; how many are to come is not known, so the connection ends",
        [413],
        False,
        [False],
    ),
    "a large object behind a poll": Other(
        lambda s: [s.poll() + s.push(nbytes=MAX_OBJECT + 2**14)],
        "also behind another request, which is answered first",
        [200, 413],
        False,
        [False],
    ),
    "a large object, upgraded": Other(
        lambda s: [s.push(*H2C, headers=plain(s), nbytes=MAX_OBJECT + 2**14)],
        "also to a route of Flower's",
        [413],
        False,
        [False],
    ),
    "a body beyond all": Other(
        lambda s: [s.request("/nothing", b"x" * 1000, length=2**26 + 1)],
        "no route takes more than 64 MiB: it need not come",
        [413],
        False,
        [],
    ),
    "a large poll": Other(
        lambda s: [s.request("/v1/fleet/pull-messages", b"x" * (2**16 + 1)) + s.push()],
        "what is small by nature has at most 64 KiB",
        [413, 200],
        True,
        [True],
    ),
    "a large poll in chunks": Other(
        lambda s: [
            s.request(
                "/v1/fleet/pull-messages", b"11000\r\n" + bytes(0x11000), "transfer-encoding: chunked", length=None
            )
        ],
        "also in chunks",
        [413],
        False,
        [],
    ),
    "an endless head": Other(
        lambda s: [get("/nothing", *(f"x-{n}: " + "y" * 1000 for n in range(200)))[:-2]],
        "a head is kept in memory",
        [431],
        False,
        [],
    ),
    "many at once": Other(
        lambda s: [get("/nothing") * 200],
        "what waits for an answer is kept in memory",
        [404] * (protocol.MAX_PIPELINED + 1) + [503],
        False,
        [],
    ),
}


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[Rig, int, Node]]:
    """A server that holds requests, and Flower's; of the same app."""
    with (
        pytest.MonkeyPatch.context() as patch,
        Rig("16MiB", max_object=MAX_OBJECT, hold_s=HOLD_S) as rig,
        flowers_server(rig) as port,
    ):
        patch.setattr(protocol, "LINGER_S", 0.1)
        node = rig.node()
        yield rig, port, node
        node.close()


def done(server: tuple[Rig, int, Node], port: int, make: Make) -> Said:
    """The acts of a server for a row."""
    rig, _, node = server
    speaker = Speaker(rig, node, rig.start_run()[0], headers_of(node))
    packets = make(speaker)
    got, is_open = say(port, packets)
    assert soon(lambda: not rig.plane.protocol.busy or is_open)
    time.sleep(0.05)  # an answer that nobody hears may be on its way
    stored = tuple(bool(rig.store.get(object_id)) for object_id in speaker.object_ids)
    rig.store.clear()
    return Said(tuple(parse(got)), is_open, stored)


@pytest.fixture(autouse=True)
def nothing_left(server: tuple[Rig, int, Node]) -> Iterator[None]:
    """After each row no connection is open, and no memory is held."""
    rig = server[0]
    yield
    assert soon(lambda: not rig.plane.protocol.busy and not rig.plane.protocol.open - set(keepers(rig)))
    assert soon(lambda: rig.plane.gateway.allowance.nbytes == rig.plane.gateway.strangers.nbytes == 0)
    rig.settle()


def keepers(rig: Rig) -> Iterator[Any]:
    """Connections that are idle: those of the node itself."""
    return (one for one in rig.plane.protocol.open if one._state not in AWAITED and not one._bodies)


@pytest.mark.parametrize("row", ROWS)
def test_lifl_answers_as_flower(server: tuple[Rig, int, Node], row: str) -> None:
    """The same answers in the same order, the connection open or not, the same objects stored."""
    for _ in range(5 if row in RACES else 1):
        ours, flowers = (done(server, port, ROWS[row]) for port in (server[0].port, server[1]))
        if ours == flowers:
            break
    assert ours == flowers


def test_a_request_behind_one_that_is_held_is_not_held_up(
    server: tuple[Rig, int, Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is no message for the first: that is said at once, since the second waits for its turn."""
    monkeypatch.setattr(server[0].plane.long_polls, "_hold_s", 60.0)
    rows: list[Make] = [
        lambda s: [s.poll() + s.push()],
        lambda s: [s.poll(), s.push()],
        lambda s: [s.poll(), s.poll() + get()],
    ]
    for row in rows[:2]:
        assert done(server, server[0].port, row).statuses == [200, 200]
    assert done(server, server[0].port, rows[2]).statuses == [200, 200, 200]


@pytest.mark.parametrize("row", OTHERS)
def test_lifl_differs_where_it_says_so(server: tuple[Rig, int, Node], row: str) -> None:
    """Flower's server does something else, and lifl what the row says."""
    other = OTHERS[row]
    ours, flowers = (done(server, port, other.make) for port in (server[0].port, server[1]))
    assert ours != flowers, other.why
    assert ours.statuses == other.statuses, other.why
    assert ours.is_open == other.is_open
    assert list(ours.stored) == other.stored
