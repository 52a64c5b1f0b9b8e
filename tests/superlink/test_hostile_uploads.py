"""Uploads as no SuperNode makes them: what they hold is bounded and given back; honest rounds beside them are right."""

from __future__ import annotations

import contextlib
import hashlib
import resource
import socket
import struct
import threading
import time
from collections.abc import Iterator
from itertools import count
from typing import Any

import numpy as np
import pytest
from flower_objects import update
from flwr.app import Message
from flwr.proto import message_pb2
from raw_http import Headers, Line, call, head, headers_of, soon
from rig import HOST, UNIT, Node, Rig
from scripted_clients import Client, check_mean, play, wait_until

from lifl.round import core as round_module
from lifl.superlink.http import protocol, upload

PUSH = "/v1/fleet/push-object"
MIB = 2**20
LIMIT = 12 * MIB
_numbers = count()

MODEL = {"w": np.zeros((100, 500), np.float32), "b": np.zeros(3)}
HONEST = [
    ({"w": np.full((100, 500), 1, np.float32), "b": np.ones(3)}, 1.0),
    ({"w": np.full((100, 500), 5, np.float32), "b": np.arange(3.0)}, 3.0),
]


class Here:
    """A server, a run, a node, and objects that it has announced."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.run_id = 0
        self.node: Node = rig.node()
        rig.state.deactivate_node(self.node.id)  # so that no round samples it
        self.headers: Headers = headers_of(self.node)  # good for minutes: signing takes a millisecond

    def announce(self, nbytes: int = 200_000) -> tuple[str, bytes, str]:
        """An object's id, its content, and the session that lacks it."""
        content = b"ArrayChunk  %d\0" % nbytes + (next(_numbers).to_bytes(8, "little") * (nbytes // 8 + 1))[:nbytes]
        object_id = hashlib.sha256(content).hexdigest()
        session_id = self.rig.state.start_session(self.run_id)
        self.rig.state.preregister_object_tree(message_pb2.ObjectTree(object_id=object_id), session_id)
        return object_id, content, session_id

    def body(self, object_id: str, content: bytes, session_id: str = "") -> bytes:
        """A request."""
        return message_pb2.PushObjectRequest(
            node=self.node.proto,
            run_id=self.run_id,
            object_id=object_id,
            object_content=content,
            session_id=session_id,
        ).SerializeToString(deterministic=True)

    def line(self) -> Line:
        """A connection."""
        return Line(self.rig.port)

    def has(self, object_id: str) -> bool:
        """True if the object is there."""
        return bool(self.rig.store.get(object_id))


STORED = message_pb2.PushObjectResponse(stored=True).SerializeToString()


def threads() -> set[str]:
    """Those that run, but for pools, which keep theirs."""
    pools = ("asyncio_", "AnyIO", "lifl-assembler", "ThreadPoolExecutor")
    return {f"{thread.name}-{thread.ident}" for thread in threading.enumerate() if not thread.name.startswith(pools)}


@pytest.fixture(scope="module")
def server() -> Iterator[Here]:
    """A server for most of the tests; a peer that stalls is soon given up."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(protocol, "STALL_S", 0.4)
        with Rig("48MiB", max_object=LIMIT) as rig:
            made = Here(rig)
            yield made
            made.node.close()


@pytest.fixture
def here(server: Here) -> Iterator[Here]:
    """The server; after the test it holds nothing, no thread is left, and an honest round ends right."""
    rig, before = server.rig, threads()
    server.run_id, _ = rig.start_run()  # one that nobody keeps alive
    yield server
    server.node.caller.close()
    assert soon(lambda: not rig.plane.protocol.busy)
    assert rig.plane.gateway.uploads == 0
    rig.store.clear()
    rig.settle()
    assert soon(lambda: threads() <= before), threads() - before
    round_, _ = play(rig, MODEL, HONEST)
    check_mean(round_, HONEST)
    assert not round_.refused
    assert len(round_.report.accepted) == len(HONEST)


# ---------------------------------------------------------------- many at once


def test_a_thousand_half_open_uploads(here: Here) -> None:
    """At every point of a request: what they hold is what has come of them, and the round beside ends right."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 4 * 1000
    if soft < wanted <= hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    each = 250 if max(soft, hard) >= wanted else 50
    announced = here.body(*here.announce(100_000))
    unknown = here.body("f" * 64, b"x" * 100_000)
    begun = head(PUSH, here.headers, len(announced))
    nothing, half_a_head = b"", begun[:200]
    starts = [nothing, half_a_head, begun + announced[:50_000], begun + unknown[:50_000]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(here.rig.plane.protocol, "give_up_if_stalled", lambda *_: None)
        lines = []
        try:
            for _ in range(each):
                for start in starts:
                    lines.append(socket.create_connection((HOST, here.rig.port), 10))
                    lines[-1].sendall(start)
            wait_until(lambda: here.rig.plane.gateway.uploads == 2 * each)
            wait_until(lambda: here.rig.plane.gateway.spooled_bytes == each * UNIT)  # 50,000 bytes of each object came
            assert here.rig.used_bytes == 0
            round_, _ = play(here.rig, MODEL, HONEST, is_alone=False)
            check_mean(round_, HONEST)
            assert not round_.refused
            assert here.rig.plane.gateway.spooled_bytes == each * UNIT
        finally:
            for line in lines:
                line.close()
    here.rig.settle()
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_uploads_that_stall_are_given_up(here: Here) -> None:
    """In the small fields, in the object, behind it, and of one that was refused; one that goes on slowly is not."""
    announced = [here.announce() for _ in range(4)]
    bodies = [here.body(*one) for one in announced]
    stranger = [(name, value) for name, value in here.headers if "signature" not in name]
    stalls = [
        (here.headers, bodies[0], 20),
        (here.headers, bodies[0], 120_000),
        (here.headers, bodies[1], len(bodies[1]) - 10),
        (stranger, bodies[2], 1000),
    ]
    lines = []
    for headers, body, end in stalls:
        lines.append(here.line())
        lines[-1].send(head(PUSH, headers, len(body)) + body[:end])
    with here.line() as slow:
        slow.send(head(PUSH, here.headers, len(bodies[3])) + bodies[3][:150_000])
        step = 1500  # faster than what every peer has to be
        for at in range(150_000, 150_000 + 16 * step, step):
            slow.send(bodies[3][at : at + step])
            time.sleep(0.05)
        assert lines[3].answer()[0] == 401
        assert all(line.is_closed for line in lines)
        slow.send(bodies[3][150_000 + 16 * step :])
        assert slow.answer() == (200, STORED)
    for line in lines:
        line.close()
    assert [here.has(one[0]) for one in announced] == [False, False, False, True]


# ---------------------------------------------------------------- bodies that do not fit


def test_a_body_that_is_longer_than_declared(here: Here) -> None:
    """The declared bytes are taken; the bytes that follow are no request, and end the connection."""
    object_id, content, session_id = here.announce()
    body = here.body(object_id, content, session_id)
    with here.line() as line:
        line.send(head(PUSH, here.headers, len(body)) + body + b"and more" * 20_000)
        assert line.answer() == (200, STORED)
        assert line.answer()[0] == 400
        assert line.is_closed
    assert here.has(object_id)


def test_an_object_that_is_longer_than_its_body(here: Here) -> None:
    """Its length is not believed: no memory is taken for it."""
    object_id, content, session_id = here.announce()
    body = here.body(object_id, content, session_id)
    for length in (len(body) - 1, 1000):
        assert call(here.rig.port, PUSH, here.headers, body[:length]).status == 400
    assert not here.has(object_id)
    prefix = here.body(object_id, b"")
    huge = prefix + b"\x22\xff\xff\xff\xff\x0f"  # 4 GiB
    assert call(here.rig.port, PUSH, here.headers, huge + b"x" * 100).status == 400


@pytest.mark.parametrize("end", ["shutdown", "close", "reset"])
@pytest.mark.parametrize("sent", [30, 100_000, -1])
def test_a_client_that_goes_in_the_middle(here: Here, end: str, sent: int) -> None:
    """The object can still come after its client shuts down, closes or resets the connection."""
    object_id, content, session_id = here.announce()
    body = here.body(object_id, content, session_id)
    line = here.line()
    line.send(head(PUSH, here.headers, len(body)) + body[:sent])
    wait_until(lambda: here.rig.plane.gateway.uploads == 1)
    if sent != 30:
        wait_until(lambda: here.rig.plane.gateway.spooled_bytes >= 100_000 - 1000)
    if end == "shutdown":
        line.socket.shutdown(socket.SHUT_WR)
        assert line.is_closed
    if end == "reset":
        line.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    line.close()
    wait_until(lambda: here.rig.plane.gateway.spooled_bytes == 0)
    here.rig.settle()
    assert not here.has(object_id)
    assert here.node.push(here.run_id, session_id, object_id, content)


def test_a_client_that_does_not_read_its_answers(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    """It asks for a large object again and again: what waits for it is bounded, and goes with it."""
    monkeypatch.setattr(here.rig.plane.protocol, "give_up_if_stalled", lambda *_: None)
    object_id, content, session_id = here.announce(LIMIT - 100)  # more than sockets hold
    assert here.node.push(here.run_id, session_id, object_id, content)
    used_bytes = here.rig.used_bytes
    ask = message_pb2.PullObjectRequest(node=here.node.proto, run_id=here.run_id, object_id=object_id)
    body = ask.SerializeToString()
    before = here.rig.plane.gateway.sent_bytes
    lines = [here.line() for _ in range(10)]
    for line in lines:
        line.send(head("/v1/fleet/pull-object", here.headers, len(body)) + body)
    wait_until(lambda: here.rig.plane.gateway.sent_bytes - before > 10 * len(content))
    here.rig.store.clear()
    assert here.rig.used_bytes == used_bytes, "it is still being sent"
    status, answer = lines[0].answer()
    assert status == 200
    assert message_pb2.PullObjectResponse.FromString(answer).object_content == content
    for line in lines:
        line.close()
    here.rig.settle()


def test_an_object_that_is_too_large(here: Here) -> None:
    """413, whether or not all of it is sent."""
    object_id, content, session_id = here.announce(LIMIT)  # with its head it is larger
    answer = call(here.rig.port, PUSH, here.headers, here.body(object_id, content, session_id))
    assert answer.status == 413
    assert b"--lifl-max-object" in answer.body
    object_id, content, session_id = here.announce(LIMIT - 100)
    assert here.node.push(here.run_id, session_id, object_id, content)


# ---------------------------------------------------------------- the same object again


def test_wrong_bytes_are_not_stored(here: Here) -> None:
    """The right ones can still come, and again and again."""
    object_id, content, session_id = here.announce()
    wrong = content[:-1] + b"?"
    for _ in range(3):
        assert not here.node.push(here.run_id, session_id, object_id, wrong)
        assert here.rig.used_bytes == 0
    assert here.node.push(here.run_id, session_id, object_id, content)
    assert not here.node.push(here.run_id, session_id, object_id, content), "the session has it"
    assert not here.node.push(here.run_id, session_id, object_id, wrong)
    assert here.rig.store.get(object_id) == content
    assert here.rig.used_bytes == 4 * UNIT


@pytest.mark.parametrize("first", ["right", "wrong"])
def test_two_connections_bring_the_same_object_at_once(here: Here, first: str) -> None:
    """Whichever ends first, what is stored is right, and there once."""
    object_id, content, session_id = here.announce()
    right = here.body(object_id, content, session_id)
    wrong = here.body(object_id, bytes(len(content)), session_id)
    with here.line() as a, here.line() as b, here.line() as c:
        for line, body in ((a, right), (b, wrong), (c, right)):
            line.send(head(PUSH, here.headers, len(body)) + body[:100_000])
        wait_until(lambda: here.rig.plane.gateway.spooled_bytes >= 3 * 100_000 - 1000)
        order = ((b, wrong, b""), (a, right, STORED)) if first == "wrong" else ((a, right, STORED), (b, wrong, b""))
        for line, body, answer in (*order, (c, right, b"")):
            line.send(body[100_000:])
            assert line.answer() == (200, answer)
    assert here.rig.store.get(object_id) == content
    assert here.rig.used_bytes == 4 * UNIT


def test_an_object_that_goes_while_it_comes_again(here: Here) -> None:
    """It was there when its upload began: that was read away, and is not taken for the object that is wanted since."""
    object_id, content, session_id = here.announce()
    other, root = here.rig.state.start_session(here.run_id), "e" * 64
    tree = message_pb2.ObjectTree(object_id=root, children=[message_pb2.ObjectTree(object_id=object_id)])
    here.rig.state.preregister_object_tree(tree, other)
    assert here.node.push(here.run_id, session_id, object_id, content)
    body = here.body(object_id, content, other)
    with here.line() as line:
        line.send(head(PUSH, here.headers, len(body)) + body[:100_000])
        wait_until(lambda: here.rig.plane.gateway.uploads == 1)
        for one in (root, object_id):  # both were announced
            here.rig.store.delete(one)
        assert object_id not in here.rig.store
        here.rig.store.preregister(here.run_id, tree)
        line.send(body[100_000:])
        assert line.answer() == (200, b"")
    assert here.rig.store.is_wanted(object_id)


THEIRS = {"w": np.full((100, 500), 7, np.float32), "b": np.ones(3)}


class Twice:
    """Brings the large object of a reply over two connections at once, one of which brings wrong bytes."""

    def __init__(self, how: str) -> None:
        self.how = how
        self.is_checked, self.is_changed = threading.Event(), threading.Event()
        if not how.endswith("goes on"):
            self.is_changed.set()
        self.name = ""
        self._look: Any = round_module.look_for_nonfinite

    def look(self, spec: Any, loan: Any) -> None:
        """Looks for NaN and Inf; between that and the fold the other connection goes on."""
        self._look(spec, loan)
        if loan.client_id == self.name:
            self.is_checked.set()
            self.is_changed.wait(5)

    def __call__(self, client: Client, asked: Message) -> None:
        """Answers."""
        self.name = client.name
        made = client.announce(asked, update(THEIRS))
        large = max(made.missing, key=lambda i: len(made.objects[i].content))
        content = made.objects[large].content
        right = client.request(asked, made, large)
        poison = np.full((100, 500), np.nan, np.float32).tobytes()
        wrong = client.request(asked, made, large, content[: -len(poison)] + poison)
        headers = headers_of(client.node)
        with Line(client.rig.port) as good, Line(client.rig.port) as bad:
            order = ((bad, wrong), (good, right)) if self.how.startswith("wrong") else ((good, right), (bad, wrong))
            for line, body in order:
                line.send(head(PUSH, headers, len(body)) + body[:100_000])
                time.sleep(0.05)  # so that the first has the place in the update
            if self.how.endswith("ends first"):
                bad.send(wrong[100_000:])
                assert bad.answer() == (200, b"")
            good.send(right[100_000:])
            assert good.answer() == (200, STORED)
            assert all(client.push(asked, made, *(i for i in made.missing if i != large)))
            if self.how.endswith("goes on"):
                wait_until(lambda: self.is_checked.is_set() or client.rig.store.get(made.message.id) is None)
                bad.send(wrong[100_000:-10])
                time.sleep(0.05)
                self.is_changed.set()
                bad.send(wrong[-10:])
                assert bad.answer() == (200, b"")


@pytest.mark.parametrize("how", ["wrong, ends first", "right, ends first", "wrong, goes on", "right, goes on"])
def test_one_place_of_an_update_is_written_twice_at_once(here: Here, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes that were checked count, whoever had the place, and whatever else is sent for it."""
    twice = Twice(how)
    monkeypatch.setattr(round_module, "look_for_nonfinite", twice.look)
    round_, _ = play(here.rig, MODEL, HONEST, twice)
    check_mean(round_, [*HONEST, (THEIRS, 1.0)])
    assert not round_.refused


@pytest.mark.parametrize("sent", [50, None], ids=["in pieces", "whole"])
def test_a_body_that_the_server_fails_to_take(here: Here, sent: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a fault of its own: the client is told, and the connection goes on."""

    def fail(*_: Any) -> Any:
        raise MemoryError("for the first bytes")

    object_id, content, session_id = here.announce(1000)
    body = here.body(object_id, content, session_id)
    with here.line() as line:
        with monkeypatch.context() as patch:
            patch.setattr(upload, "cut", fail)
            line.send(head(PUSH, here.headers, len(body)) + body[:sent])
            assert line.answer()[0] == 500
        line.send(b"" if sent is None else body[sent:], head(PUSH, here.headers, len(body)) + body)
        assert line.answer() == (200, STORED)


# ---------------------------------------------------------------- other ways to speak HTTP


def test_pipelined_requests_are_answered_in_order(here: Here) -> None:
    """Several objects in one piece, and one behind a request that takes its time."""
    announced = [here.announce(1000 * (n + 1)) for n in range(3)]
    bodies = [here.body(*one) for one in announced]
    with here.line() as line:
        line.send(b"".join(head(PUSH, here.headers, len(body)) + body for body in bodies))
        assert line.answers(3) == [(200, STORED)] * 3
    assert all(here.has(one[0]) for one in announced)
    object_id, content, session_id = here.announce()
    push = here.body(object_id, content, session_id)
    poll = here.body("f" * 64, b"")  # any request with the node in it
    with here.line() as line:
        poll_whole = head("/v1/fleet/pull-messages", here.headers, len(poll)) + poll
        line.send(poll_whole + head(PUSH, here.headers, len(push)) + push)
        answers = line.answers(2)
    assert [status for status, _ in answers] == [200, 200]
    assert here.has(object_id)


@pytest.mark.parametrize("pieces", [1, 40])
def test_a_body_in_chunks_is_flowers(here: Here, pieces: int) -> None:
    """A body of unknown length has no place: Flower's own route stores it."""
    object_id, content, session_id = here.announce()
    body, headers = here.body(object_id, content, session_id), here.headers
    begun = head(PUSH, [*headers, ("transfer-encoding", "chunked")], 0).replace(b"content-length: 0\r\n", b"")
    size = len(body) // pieces + 1
    chunks = [body[at : at + size] for at in range(0, len(body), size)]
    with here.line() as line:
        line.send(begun, *(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks), b"0\r\n\r\n")
        assert line.answer() == (200, STORED)
    assert here.has(object_id)


def test_both_lengths_are_no_request(here: Here) -> None:
    """A length and chunks: a way to smuggle a request past somebody."""
    object_id, content, session_id = here.announce(1000)
    body = here.body(object_id, content, session_id)
    with here.line() as line:
        line.send(head(PUSH, [*here.headers, ("transfer-encoding", "chunked")], len(body)) + body)
        assert line.answer()[0] == 400
        assert line.is_closed
    with here.line() as line:
        line.send(head(PUSH, [*here.headers, ("content-length", "5")], len(body)) + body)
        assert line.answer()[0] == 400
        assert line.is_closed
    assert not here.has(object_id)


def test_who_expects_to_be_told_to_go_on_is_told(here: Here) -> None:
    """100, then the answer."""
    object_id, content, session_id = here.announce()
    body = here.body(object_id, content, session_id)
    with here.line() as line:
        line.send(head(PUSH, here.headers, len(body), ["expect: 100-continue"]))
        assert line.answer()[0] == 100
        line.send(body)
        assert line.answer() == (200, STORED)


@pytest.mark.parametrize("more", ["connection: close", "Connection: Close", "connection: keep-alive, close", None])
@pytest.mark.parametrize("route", ["push-object", "pull-messages"])
def test_who_wants_no_more_is_answered_and_closed(here: Here, route: str, more: str | None) -> None:
    """By its header, or because it speaks HTTP/1.0."""
    object_id, content, session_id = here.announce()
    body = here.body(object_id, content, session_id) if route == "push-object" else here.body("f" * 64, b"")
    headers = [(name, value) for name, value in here.headers if name != "connection"]
    version = "1.0" if more is None else "1.1"
    with here.line() as line:
        line.send(head(f"/v1/fleet/{route}", headers, len(body), [more] if more else [], version) + body)
        assert line.answer()[0] == 200
        line.socket.settimeout(2)
        assert line.is_closed


def test_who_wants_another_protocol_gets_an_answer(here: Here) -> None:
    """A web socket where objects are pushed: nothing is left of either."""
    object_id, content, session_id = here.announce(1000)
    body = here.body(object_id, content, session_id)
    headers = [(name, value) for name, value in here.headers if name != "connection"]
    more = ["connection: upgrade", "upgrade: websocket", "sec-websocket-version: 13", "sec-websocket-key: aGVsbG8="]
    for parts in ([body], [body[:200], body[200:]]):
        with here.line() as line, contextlib.suppress(EOFError, ConnectionError):
            line.socket.settimeout(2)
            line.send(head(PUSH, headers, len(body), more), *parts)
            while True:
                assert line.answer()[0] in (200, 400, 403, 426)


@pytest.mark.parametrize(
    "request_line",
    [
        b"POST /v1/fleet/push-object HTTP/1.1",
        b"GET /v1/fleet/push-object HTTP/1.1",
        b"PUT /v1/fleet/push-object HTTP/1.1",
        b"POST /v1/fleet/push-object HTTP/9.9",
        b"POST /v1/fleet/push-object",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    ],
)
def test_other_first_lines(here: Here, request_line: bytes) -> None:
    """Without any header, of another method, of another version, or no HTTP at all."""
    with here.line() as line:
        line.send(request_line + b"\r\nhost: x\r\ncontent-length: 4\r\n\r\nbody")
        status, _ = line.answer()
        assert 400 <= status < 500


def test_heads_of_any_size_are_the_parsers_business(here: Here) -> None:
    """A head that does not end is not kept for ever, and one in small pieces is read."""
    object_id, content, session_id = here.announce(1000)
    body = here.body(object_id, content, session_id)
    whole = head(PUSH, here.headers, len(body)) + body
    with here.line() as line:
        line.send(*(whole[at : at + 7] for at in range(0, len(whole), 7)))
        assert line.answer() == (200, STORED)


# ---------------------------------------------------------------- the arena is full


def fill(rig: Rig, spare_units: int = 0) -> list[Any]:
    """Takes all of the arena but so much."""
    arena, taken = rig.plane.node.arena, []
    while (block := arena.alloc(UNIT)) is not None:
        taken.append(block)
    for block in taken[:spare_units]:
        arena.reclaim(block)
    return taken[spare_units:]


def give_back(rig: Rig, taken: list[Any]) -> None:
    """Gives it back."""
    for block in taken:
        rig.plane.node.arena.reclaim(block)
    taken.clear()


def test_when_the_arena_is_full_nothing_is_read(here: Here) -> None:
    """The client's socket fills up; when room comes free the upload goes on."""
    object_id, content, session_id = here.announce(LIMIT - 100)
    body = here.body(object_id, content, session_id)
    taken = fill(here.rig)
    with here.line() as line:
        line.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**16)
        line.send(head(PUSH, here.headers, len(body)))
        line.socket.settimeout(0.7)  # longer than a stall: who waits for the server has not stalled
        with contextlib.suppress(TimeoutError):
            while body:
                sent = line.socket.send(body)
                body = body[sent:]
        assert len(body) > MIB
        give_back(here.rig, taken)
        line.socket.settimeout(10)
        line.send(body)
        assert line.answer() == (200, STORED)
    assert here.rig.store.get(object_id) == content


def test_one_that_fails_while_it_waits_for_room_holds_nobody_up(here: Here) -> None:
    """An upload behind it, and one that comes later, have their turn."""

    def fail() -> bool:
        raise OSError("a fault of the server's")

    bodies = [here.body(*here.announce(200_000)) for _ in range(2)]
    taken = fill(here.rig)
    gateway, loop = here.rig.plane.gateway, here.rig.plane.long_polls.loop
    with here.line() as line, here.line() as later:
        for one in (line, later):
            one.socket.settimeout(5)
        loop.call_soon_threadsafe(gateway.wait_for_room, fail)
        line.send(head(PUSH, here.headers, len(bodies[0])) + bodies[0])
        wait_until(lambda: gateway.uploads == 1)
        later.send(head(PUSH, here.headers, len(bodies[1])) + bodies[1])
        give_back(here.rig, taken)
        assert [one.answer() for one in (line, later)] == [(200, STORED)] * 2


def test_an_upload_that_fails_to_begin_is_answered(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    """At once, or when there is room for it."""

    def fail(*_: Any) -> None:
        raise OSError("a fault of the server's")

    for waits in (False, True):
        body = here.body(*here.announce(200_000))
        taken = fill(here.rig) if waits else []
        with here.line() as line, monkeypatch.context() as patch:
            line.socket.settimeout(5)
            patch.setattr(upload.Upload, "aim", fail)
            line.send(head(PUSH, here.headers, len(body)) + body)
            if waits:
                wait_until(lambda: here.rig.plane.gateway._waiting)
            give_back(here.rig, taken)
            assert line.answer()[0] == 500


@pytest.mark.parametrize("what", ["a connection", "the memory for bodies"])
def test_a_look_at_peers_that_fails_is_not_the_last(here: Here, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer that stalls afterwards is dropped as always."""
    failed = threading.Event()

    def fail(*_: Any) -> None:
        failed.set()
        raise OSError("a fault of the server's")

    with monkeypatch.context() as patch, here.line() as other:
        if what == "a connection":
            wait_until(lambda: here.rig.plane.protocol.open)
            patch.setattr(next(iter(here.rig.plane.protocol.open)), "give_up_if_stalled", fail)
        else:
            patch.setattr(here.rig.plane.gateway, "look", fail)
        assert failed.wait(5)
        assert what != "a connection" or other.is_closed
    with here.line() as line:
        line.send(b"P")
        assert line.is_closed


def test_who_waits_for_room_and_goes_is_forgotten(here: Here) -> None:
    """Those behind it are asked in turn; small objects need no room."""
    announced = [here.announce(200_000) for _ in range(3)]
    bodies = [here.body(*one) for one in announced]
    taken = fill(here.rig)
    lines = []
    for body in bodies:
        lines.append(here.line())
        lines[-1].send(head(PUSH, here.headers, len(body)) + body[:1000])
    wait_until(lambda: here.rig.plane.gateway.uploads == 3)
    lines[0].close()
    small = here.announce(1000)
    assert here.node.push(here.run_id, small[2], small[0], small[1])
    for line, body in zip(lines[1:], bodies[1:], strict=True):
        line.send(body[1000:])
    give_back(here.rig, taken)
    assert [line.answer() for line in lines[1:]] == [(200, STORED)] * 2
    for line in lines[1:]:
        line.close()
    assert [here.has(one[0]) for one in announced] == [False, True, True]


def test_a_round_whose_updates_do_not_fit_at_once_ends_right(here: Here) -> None:
    """Eight updates and half-open uploads in room for four: they wait for each other."""
    honest = [({"w": np.full((100, 500), n, np.float32), "b": np.full(3, float(n))}, 1.0) for n in range(8)]
    object_id, content, session_id = here.announce(400_000)
    body = here.body(object_id, content, session_id)
    taken = fill(here.rig, 40)
    with here.line() as line:
        line.send(head(PUSH, here.headers, len(body)) + body[:1000])
        wait_until(lambda: here.rig.plane.gateway.uploads == 1)
        round_, _ = play(here.rig, MODEL, honest, is_alone=False)
    give_back(here.rig, taken)
    check_mean(round_, honest)
    assert not round_.refused
