"""Peers that are slower than a rate, in either direction, are dropped; those that wait by the server's will are not."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import socket
import time
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

import attrs
import numpy as np
import pytest
from flwr.proto import fleet_pb2, message_pb2
from raw_http import Headers, Line, head, headers_of, soon, without
from rig import HOST, Rig
from scripted_clients import Arrays, check_mean, play

from lifl.superlink.http import gateway, protocol
from lifl.superlink.http.rates import MIN_RATE, Rate, Rates, look_s
from lifl.superlink.http.relief import PRIVATE_BYTES, relieve

MIB = 2**20
WINDOW_S = 0.4
PUSH, PULL, POLL = "/v1/fleet/push-object", "/v1/fleet/pull-object", "/v1/fleet/pull-messages"
_numbers = count()


class Here:
    """A server, a run and a node."""

    def __init__(self, rig: Rig) -> None:
        self.rig, self.node = rig, rig.node()
        rig.state.deactivate_node(self.node.id)  # so that no round samples it
        self.run_id, _ = rig.start_run()
        self.headers: Headers = headers_of(self.node)

    def push_body(self, nbytes: int = 200_000) -> bytes:
        """A request with an object that its session lacks."""
        content = b"ArrayChunk  %d\0" % nbytes + (next(_numbers).to_bytes(8, "little") * (nbytes // 8 + 1))[:nbytes]
        self.object_id, self.content = hashlib.sha256(content).hexdigest(), content
        session_id = self.rig.state.start_session(self.run_id)
        self.rig.state.preregister_object_tree(message_pb2.ObjectTree(object_id=self.object_id), session_id)
        return message_pb2.PushObjectRequest(
            node=self.node.proto,
            run_id=self.run_id,
            object_id=self.object_id,
            object_content=content,
            session_id=session_id,
        ).SerializeToString(deterministic=True)

    def pull_body(self) -> bytes:
        """A request for the last object."""
        request = message_pb2.PullObjectRequest(node=self.node.proto, run_id=self.run_id, object_id=self.object_id)
        return request.SerializeToString()

    def store(self, nbytes: int) -> None:
        """Has an object of so many bytes in the store."""
        body = self.push_body(nbytes)
        with Line(self.rig.port) as line:
            line.send(head(PUSH, self.headers, len(body)), body)
            assert line.answer()[0] == 200

    def reader(self) -> Line:
        """A connection that has asked for the last object; its kernel takes little by itself."""
        line = Line(self.rig.port)
        line.socket.close()
        line.socket = socket.socket()
        line.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        line.socket.settimeout(10)
        line.socket.connect((HOST, self.rig.port))
        body = self.pull_body()
        before = self.rig.plane.gateway.sent_bytes
        line.send(head(PULL, self.headers, len(body)) + body)
        assert soon(lambda: self.rig.plane.gateway.sent_bytes > before)
        return line

    def in_loop(self, work: Callable[[], Any]) -> Any:
        """Does something where the server does its own."""

        async def do() -> Any:
            return work()

        return asyncio.run_coroutine_threadsafe(do(), self.rig.plane.holding.loop).result(10)


@pytest.fixture(scope="module")
def server() -> Iterator[Here]:
    """A server that looks at its peers often."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(protocol, "STALL_S", WINDOW_S)
        with Rig("48MiB", max_object=30 * MIB, hold_s=1.5) as rig:
            made = Here(rig)
            yield made
            made.node.close()


@pytest.fixture
def here(server: Here, monkeypatch: pytest.MonkeyPatch) -> Iterator[Here]:
    """The server; after the test it holds nothing. Each dropped peer is logged."""
    monkeypatch.setattr(protocol, "SAID_S", 0.0)
    yield server
    server.rig.store.clear()
    server.node.caller.close()
    assert soon(lambda: not server.rig.plane.protocol.open)
    assert server.rig.plane.gateway.uploads == 0
    server.rig.settle()


def drip(line: Line, data: bytes, each: int, pause_s: float = 0.05, limit: int = 60) -> bool:
    """Sends so many bytes at a time; False if the server ends the connection."""
    line.socket.settimeout(pause_s)
    for at in range(0, min(len(data), each * limit), each):
        try:
            line.socket.sendall(data[at : at + each])
            if not line.socket.recv(1):
                return False
        except TimeoutError:
            continue
        except ConnectionError:
            return False
        return True  # an answer
    return True


def begun(here: Here, what: str) -> tuple[bytes, bytes]:
    """The beginning of a request, and what drips of it."""
    body = here.push_body()
    whole = head(PUSH, here.headers, len(body)) + body
    starts = {
        "the first byte": (b"P", whole[1:]),
        "a head": (whole[:100], whole[100:]),
        "the small fields": (whole[: -len(body) + 10], body[10:]),
        "an object": (whole[:-50_000], whole[-50_000:]),
        "behind an object": (whole[:-10], whole[-10:]),
        "a refused body": (
            head(PUSH, without(here.headers, "flwr-signature"), len(body)) + body[:1000],
            body[1000:],
        ),
        "a request without object": (head(POLL, here.headers, 60_000) + b"x", b"x" * 59_999),
        "chunks": (
            head(PUSH, [*here.headers, ("transfer-encoding", "chunked")], 0).replace(b"content-length: 0\r\n", b"")
            + b"%x\r\n" % len(body),
            body,
        ),
        "a body for nobody": (head("/nothing", [], 60_000), b"x" * 60_000),
    }
    return starts[what]


@pytest.mark.parametrize(
    "what",
    [
        *("the first byte", "a head", "the small fields", "an object", "behind an object", "a refused body"),
        *("a request without object", "chunks"),
    ],
)
def test_a_request_that_drips_is_dropped(here: Here, what: str, caplog: pytest.LogCaptureFixture) -> None:
    """A byte every now and then does not keep it: wherever it is; the log says whose it was."""
    caplog.set_level(logging.WARNING, "uvicorn.error")
    start, rest = begun(here, what)
    with Line(here.rig.port) as line:
        line.send(start)
        if what == "a refused body":
            assert line.answer()[0] == 401
        host, port = line.socket.getsockname()
        assert not drip(line, rest, 1)
    (said,) = [one.getMessage() for one in caplog.records if "is dropped" in one.getMessage()]
    assert said.startswith(f"The connection of {host}:{port} is dropped: ")
    assert "head" in said if what in ("the first byte", "a head") else "bytes a second, less than 16,384" in said


def test_a_request_that_is_slow_but_not_too_slow_is_taken(here: Here) -> None:
    """40 KiB a second."""
    body = here.push_body(60_000)
    with Line(here.rig.port) as line:
        line.send(head(PUSH, here.headers, len(body)))
        for at in range(0, len(body), 2048):
            line.send(body[at : at + 2048])
            time.sleep(0.05)
        assert line.answer()[0] == 200
    assert here.rig.store.get(here.object_id) == here.content


def test_who_waits_by_the_servers_will_is_not_dropped(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a message, and for room in the arena."""
    monkeypatch.setattr(gateway, "FULL_S", 1000.0)
    poll = fleet_pb2.PullMessagesRequest(node=here.node.proto).SerializeToString()
    body = here.push_body(MIB)
    original = here.rig.plane.gateway.target_for
    until_s = time.monotonic() + 4 * WINDOW_S

    def full(*args: Any, **options: Any) -> Any:
        if time.monotonic() < until_s:
            raise BlockingIOError
        return original(*args, **options)

    monkeypatch.setattr(here.rig.plane.gateway, "target_for", full)
    with Line(here.rig.port) as waiting, Line(here.rig.port) as pushing:
        waiting.send(head(POLL, here.headers, len(poll)) + poll)
        pushing.send(head(PUSH, here.headers, len(body)) + body)
        assert waiting.answer() == (200, b"")
        assert pushing.answer()[0] == 200
    assert time.monotonic() > until_s


def test_a_connection_without_a_request_is_not_dropped(here: Here) -> None:
    """Before its first; as uvicorn does it, which ends one that has had its answer after five seconds."""
    with Line(here.rig.port) as line:
        time.sleep(3 * WINDOW_S)
        poll = fleet_pb2.PullMessagesRequest(node=here.node.proto).SerializeToString()
        line.send(head(POLL, without(here.headers, "flwr-signature"), len(poll)) + poll)
        assert line.answer()[0] == 401


@pytest.mark.parametrize("way", ["ours", "Flower's"])
def test_an_answer_that_is_not_read_is_dropped(here: Here, way: str) -> None:
    """And what it holds comes free; one that is read at once is not touched."""
    here.store(16 * MIB)
    body = here.pull_body()
    request = head(PULL, here.headers, len(body)) + body
    with Line(here.rig.port) as line, Line(here.rig.port) as good:
        if way == "ours":
            line.send(request)
        else:
            line.send(b"GET /nothing HTTP/1.1\r\nhost: x\r\n\r\n" + request)  # what is behind another is Flower's
        assert soon(
            lambda: any(one._sending or one.transport.get_write_buffer_size() for one in here.rig.plane.protocol.open)
        )
        good.send(request)
        assert good.answer()[0] == 200
        here.rig.store.clear()
        here.rig.settle()
        assert soon(lambda: len(here.rig.plane.protocol.open) == 1)
        got = 0
        with contextlib.suppress(ConnectionError):
            while data := line.socket.recv(MIB):
                got += len(data)
        assert got < 16 * MIB


# ---------------------------------------------------------------- when memory is short


@attrs.define
class Sender:
    """A connection as ``relieve`` sees it."""

    rate: float | None
    pinned_bytes: int
    private_bytes: int = 0
    told: str = ""

    @property
    def rates(self) -> Any:
        """Its rate of late."""
        return attrs.make_class("R", ["sending"])(self.rate)

    def unpin(self) -> None:
        """It gets a copy."""
        self.told = "copied"

    def drop(self, reason: str) -> None:
        """It ends."""
        assert "memory is short" in reason
        self.told = "dropped"


@pytest.mark.parametrize(
    ("sender", "told"),
    [
        (Sender(None, MIB), ""),  # it has only begun
        (Sender(0.0, MIB), "dropped"),
        (Sender(MIN_RATE - 1.0, 100), ""),  # it has all of it in a moment
        (Sender(MIN_RATE - 1.0, MIB), "dropped"),
        (Sender(MIN_RATE + 1.0, MIB), "copied"),
        (Sender(2.0 * MIB, MIB), ""),
        (Sender(2.0 * MIB, 4 * MIB), "copied"),
        (Sender(2.0 * MIB, 0, 4 * MIB), ""),
        (Sender(2.0 * MIB, 2 * PRIVATE_BYTES), "dropped"),
        (Sender(PRIVATE_BYTES / 2, 2 * PRIVATE_BYTES), ""),
    ],
)
def test_who_is_dropped_when_memory_is_short(sender: Sender, told: str) -> None:
    """A peer that takes nothing is dropped; a slow one gets a copy, if there is memory for it; a quick one stays."""
    assert relieve([sender]) == bool(told)
    assert sender.told == told


def test_copies_are_bounded() -> None:
    """The slowest get them first; what others have already counts."""
    rates = [1.0 * MIB, 2.0 * MIB, 3.0 * MIB]
    senders = [Sender(rate, PRIVATE_BYTES // 2) for rate in reversed(rates)]
    assert relieve([*senders, Sender(None, 0, PRIVATE_BYTES // 4)])
    assert [one.told for one in senders] == ["dropped", "dropped", "copied"]


def test_a_reader_that_takes_nothing_holds_no_memory_that_others_need(
    here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be dropped after a while: when there is somebody who waits for room it goes at once."""
    monkeypatch.setattr(protocol, "STALL_S", 1000.0)  # looked at each second
    monkeypatch.setattr(gateway, "FULL_S", 1000.0)
    here.store(24 * MIB)
    with here.reader():
        here.rig.store.clear()
        assert here.rig.used_bytes > 24 * MIB
        body = here.push_body(28 * MIB)
        with Line(here.rig.port) as line:
            line.send(head(PUSH, here.headers, len(body)), body)
            assert line.answer()[0] == 200


def test_a_reader_that_is_slow_gets_its_answer_from_a_copy(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it, byte for byte; the arena has its memory back while it reads on."""
    monkeypatch.setattr(protocol, "STALL_S", 10.0)
    here.store(8 * MIB)
    with here.reader() as line:
        got = bytearray()
        line.socket.settimeout(0.01)
        (reader,) = (one for one in here.rig.plane.protocol.open if one._sending)
        deadline = time.monotonic() + 20
        while here.rig.used_bytes or not reader.private_bytes:
            assert time.monotonic() < deadline
            with contextlib.suppress(TimeoutError):
                got += line.socket.recv(8192)
            time.sleep(0.01)
            here.rig.store.clear()
            here.in_loop(here.rig.plane.relieve)
        line.socket.settimeout(10)
        while not got.endswith(here.content) and (data := line.socket.recv(2**16)):
            got += data
        assert got.endswith(here.content)


def test_rounds_are_served_beside_readers_that_do_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """A round is opened although it needs the memory that slow readers hold."""
    model = {"w": np.zeros(1_000_000, np.float32)}
    updates: list[tuple[Arrays, float]] = [({"w": np.full(1_000_000, n, np.float32)}, 1.0) for n in (1, 3)]
    with Rig("40MiB", max_object=30 * MIB) as rig:
        here = Here(rig)
        here.store(28 * MIB)
        with here.reader():
            rig.store.clear()
            round_, _ = play(rig, model, updates, is_alone=False)
            check_mean(round_, updates)
        here.node.close()
        rig.settle()


# ---------------------------------------------------------------- the rates


def test_a_rate_is_an_average_over_a_window() -> None:
    """Slow moments do not matter, and what was before something else began does not count."""
    rate = Rate()
    assert rate.look(True, 0, 1.0, 10.0) is None, "it has only begun"
    for _ in range(2):
        for second in range(10):
            assert rate.look(True, 10 * MIN_RATE if second == 7 else 0, 1.0, 10.0) is None
    assert rate.of_late == 0.0
    for _ in range(9):
        assert rate.look(True, MIN_RATE - 1, 1.0, 10.0) is None
    assert rate.look(True, MIN_RATE - 1, 1.0, 10.0) == MIN_RATE - 1
    for _ in range(9):
        assert rate.look(True, 0, 1.0, 10.0) is None
    rate.begin()
    assert rate.of_late is None
    for _ in range(10):
        assert rate.look(True, 0, 1.0, 10.0) is None
    assert rate.look(False, 0, 1.0, 10.0) is None
    for _ in range(10):
        assert rate.look(True, 0, 1.0, 10.0) is None
    assert rate.look(True, 0, 1.0, 10.0) == 0.0


def test_a_loop_that_has_no_time_is_nobodys_fault() -> None:
    """Between two looks at most twice the usual time counts."""
    rates = Rates(0.0)
    assert rates.look(1.0, 10.0, "body", None) is None
    assert rates.look(100.0, 10.0, "body", None) is None
    for second in range(7):
        assert rates.look(101.0 + second, 10.0, "body", None) is None
    assert "0 bytes a second" in str(rates.look(108.0, 10.0, "body", None))
    assert look_s(10.0) == 1.0


def test_what_a_peer_takes_is_what_it_has_had_less() -> None:
    """The bytes that a peer took are the answers that it was given, less those unsent."""
    rates = Rates(0.0)
    rates.begin_out(1000)
    assert rates.look(1.0, 10.0, None, 600) is None
    assert rates.sending is None
    assert rates.look(2.0, 10.0, None, 300) is None
    assert rates.sending == 300.0
    rates.begin_in()
    assert rates.look(3.0, 10.0, None, None) is None
    assert rates.sending is None
