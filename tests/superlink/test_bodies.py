"""Bodies of requests: what is taken of one before its sender is known, and of all that a sender has under way."""

from __future__ import annotations

import contextlib
import gc
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from flwr.proto import fleet_pb2, message_pb2
from raw_http import Headers, Line, call, head, headers_of, soon, without
from rig import HOST, Node, Rig

from lifl.superlink.http import allowance, protocol
from lifl.superlink.http.allowance import Allowance

MIB = 2**20
TREES = "/v1/fleet/push-messages"
CHUNKED = ["transfer-encoding: chunked"]
TAKEN = 500
"""The answer of Flower's handler to a tree without a message, when the whole request has come and been checked."""


def resident_bytes() -> int:
    """The resident bytes of this process, in which the server is too."""
    with open("/proc/self/status") as status:
        return 1024 * int(next(line for line in status if line.startswith("VmRSS")).split()[1])


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    """A server."""
    with Rig("8MiB") as made:
        yield made


@pytest.fixture
def node(rig: Rig) -> Iterator[Node]:
    """A node; after the test no body holds anything."""
    made = rig.node()
    yield made
    made.close()
    gateway = rig.plane.gateway
    assert soon(lambda: not rig.plane.protocol.busy)
    assert soon(lambda: gateway.allowance.nbytes == gateway.strangers.nbytes == 0)


def tree(nodes: int) -> message_pb2.ObjectTree:
    """A tree of so many objects."""
    made = message_pb2.ObjectTree(object_id="0" * 64)
    made.children.extend(message_pb2.ObjectTree(object_id=f"{n:064x}") for n in range(nodes))
    return made


def whole_chunk(data: bytes) -> bytes:
    """A chunk, without the end of the body."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def chunked_head(path: str, headers: Headers) -> bytes:
    """The head of a request whose length is not known."""
    return head(path, headers, 0, CHUNKED).replace(b"content-length: 0\r\n", b"")


def strangers(node: Node, kind: str) -> Headers:
    """Headers of nobody whom the server knows."""
    if kind == "nobody":
        return [("content-type", "application/protobuf")]
    if kind == "unsigned":
        return without(headers_of(node), "flwr-signature")
    from lifl.bench.fleet.caller import Identity

    made = Identity().headers().split("\r\n")
    return [(name, value.strip()) for name, _, value in (line.partition(":") for line in made if line)]


@pytest.mark.parametrize("how", ["declared", "chunked"])
@pytest.mark.parametrize("kind", ["nobody", "unsigned", "unknown key"])
def test_strangers_take_no_memory(rig: Rig, node: Node, kind: str, how: str) -> None:
    """Ten bodies of 30 MiB for an object tree: each is refused with 401 before 128 KiB of it are kept."""
    headers = strangers(node, kind)
    gc.collect()
    before = resident_bytes()
    part, count = bytes(MIB), 30
    lines = []
    for _ in range(10):
        line = Line(rig.port)
        line.socket.settimeout(10)
        lines.append(line)
        with contextlib.suppress(ConnectionError):
            if how == "declared":
                line.send(head(TREES, headers, count * MIB))
                line.send(*[part] * (count - 1))
            else:
                line.send(chunked_head(TREES, headers), *[whole_chunk(part)] * (count - 1))
    grown = resident_bytes() - before
    answers = [line.answers(1) for line in lines]
    for line in lines:
        line.close()
    assert grown < 40 * MIB
    for answer in answers:
        assert [status for status, _ in answer] == [401]
        assert answer[0][1] == b'{"detail":"Invalid SuperNode authentication"}'


@pytest.mark.parametrize("how", ["declared", "chunked"])
def test_a_tree_of_many_objects_is_taken(rig: Rig, node: Node, how: str) -> None:
    """A tree of 20,000 objects is taken, as by Flower's server; in chunks, which no SuperNode sends, one of 14,000."""
    count = 20_000 if how == "declared" else 14_000
    request = fleet_pb2.PushMessagesRequest(node=node.proto, message_object_trees=[tree(count)])
    body = request.SerializeToString()
    assert (len(body) > MIB) == (how == "declared")
    with Line(rig.port) as line:
        if how == "declared":
            line.send(head(TREES, headers_of(node), len(body)) + body)
        else:
            line.send(chunked_head(TREES, headers_of(node)), whole_chunk(body), b"0\r\n\r\n")
        assert line.answer()[0] == TAKEN
    small = fleet_pb2.PushMessagesRequest(node=node.proto, message_object_trees=[tree(1)])
    assert call(rig.port, TREES, headers_of(node), small.SerializeToString()).status == TAKEN


def test_a_node_that_speaks_for_another_is_refused_in_the_end(rig: Rig, node: Node) -> None:
    """Its key lets its body in, and Flower's check of the whole request refuses it."""
    other = rig.node()
    request = fleet_pb2.PushMessagesRequest(node=other.proto, message_object_trees=[tree(2000)])
    answer = call(rig.port, TREES, headers_of(node), request.SerializeToString())
    assert answer.status == 401
    other.close()


def test_a_nodes_second_large_body_waits_and_others_do_not(
    rig: Rig, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first has all that a node may have; when it is gone the second goes on."""
    monkeypatch.setattr(rig.plane.gateway.allowance, "sender_bytes", MIB)
    monkeypatch.setattr(allowance, "PATIENCE_S", 60.0)
    other = rig.node()
    body = fleet_pb2.PushMessagesRequest(node=node.proto, message_object_trees=[tree(12_000)]).SerializeToString()
    theirs = fleet_pb2.PushMessagesRequest(node=other.proto, message_object_trees=[tree(12_000)]).SerializeToString()
    assert MIB / 2 < len(body) < MIB
    with Line(rig.port) as first, Line(rig.port) as second:
        first.send(head(TREES, headers_of(node), len(body)) + body[:-1])
        assert soon(lambda: rig.plane.gateway.allowance.nbytes == len(body) - 1)
        second.send(head(TREES, headers_of(node), len(body)) + body)
        assert call(rig.port, TREES, headers_of(other), theirs).status == TAKEN
        assert soon(lambda: rig.plane.gateway.allowance._waiting)
        first.send(body[-1:])
        assert first.answer()[0] == TAKEN
        assert second.answer()[0] == TAKEN
    other.close()


@pytest.mark.parametrize("how", ["declared", "chunked"])
def test_bodies_that_hold_what_others_need_are_given_up(
    rig: Rig, node: Node, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """Those of nodes that hold back the last byte: the honest one is taken, they are told to try again."""
    monkeypatch.setattr(rig.plane.gateway.allowance, "total_bytes", 2 * MIB)
    monkeypatch.setattr(allowance, "PATIENCE_S", 0.2)
    bad = [rig.node() for _ in range(4)]
    lines, held_bytes = [], 0
    for one in bad:
        body = fleet_pb2.PushMessagesRequest(node=one.proto, message_object_trees=[tree(7000)]).SerializeToString()
        lines.append(Line(rig.port))
        if how == "declared":
            lines[-1].send(head(TREES, headers_of(one), len(body)) + body[:-1])
        else:
            lines[-1].send(chunked_head(TREES, headers_of(one)), whole_chunk(body))
        held_bytes += len(body) - (how == "declared")
    assert soon(lambda: rig.plane.gateway.allowance.nbytes == held_bytes)
    body = fleet_pb2.PushMessagesRequest(node=node.proto, message_object_trees=[tree(7000)]).SerializeToString()
    for _ in range(3):
        assert call(rig.port, TREES, headers_of(node), body).status == TAKEN
    for line in lines:
        line.socket.settimeout(0.2)
    refused = []
    for line in lines:
        with contextlib.suppress(TimeoutError):
            refused.append(line.answer()[0])
    assert refused
    assert set(refused) == {503}
    for line, one in zip(lines, bad, strict=True):
        line.close()
        one.close()


@pytest.mark.ladder
def test_a_long_body_to_a_route_of_anybody_is_within_what_strangers_have(
    rig: Rig, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They take nothing away from nodes, and when they are in each other's way they are given up."""
    monkeypatch.setattr(allowance, "PATIENCE_S", 60.0)
    monkeypatch.setattr(rig.plane.gateway.strangers, "sender_bytes", MIB)
    path, part = "/v1/control/start-run", bytes(MIB // 4)
    headers = [("content-type", "application/protobuf")]
    gc.collect()
    before = resident_bytes()
    lines = []
    for _ in range(10):
        line = socket.create_connection((HOST, rig.port), 10)
        line.setblocking(False)
        lines.append(line)
        with contextlib.suppress(OSError):
            line.sendall(chunked_head(path, headers))
            for _ in range(160):
                line.sendall(whole_chunk(part))
    assert soon(lambda: rig.plane.gateway.strangers._waiting)
    body = fleet_pb2.PushMessagesRequest(node=node.proto, message_object_trees=[tree(7000)]).SerializeToString()
    assert call(rig.port, TREES, headers_of(node), body).status == TAKEN
    assert rig.plane.gateway.strangers.nbytes <= MIB
    assert resident_bytes() - before < 40 * MIB
    monkeypatch.setattr(allowance, "PATIENCE_S", 0.0)  # none of them can come whole: they go one after another
    assert soon(lambda: rig.plane.gateway.strangers.nbytes == 0, 20)
    for line in lines:
        line.close()


UNWANTED = head("/v1/runtime/push-messages", [("content-type", "application/protobuf")], 2000) + bytes(2000)
BEHIND = {
    "nothing": b"",
    "requests": b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n" * 4,
    "a body that is too long": b"POST /v1/fleet/pull-messages HTTP/1.1\r\nhost: x\r\ncontent-length: 99999999\r\n\r\n",
    "another such body": UNWANTED,
    "such a body and a request": UNWANTED + head("/nothing", [], 0),
}


@pytest.mark.parametrize("before", [b"", b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"], ids=["first", "second"])
@pytest.mark.parametrize("behind", BEHIND)
def test_a_refused_body_is_the_last_of_its_connection(
    rig: Rig, node: Node, behind: str, before: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever came with it in one packet: the requests before it are answered, it is, and none behind it."""
    monkeypatch.setattr(protocol, "FREE_BYTES", 1000)
    monkeypatch.setattr(protocol, "LINGER_S", 0.05)
    with Line(rig.port) as line:
        line.socket.settimeout(5)
        line.send(before + UNWANTED + BEHIND[behind])
        statuses = [status for status, _ in line.answers(10)]
        assert statuses == [200] * bool(before) + [401]
        assert line.is_closed
    node.caller.close()
    assert soon(lambda: not rig.plane.protocol.open)


def test_a_request_behind_a_body_that_nobody_reads_is_answered(
    rig: Rig, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flower has answered while the body waited for memory, which it does not need any more."""
    monkeypatch.setattr(protocol, "FREE_BYTES", 1000)
    monkeypatch.setattr(allowance, "PATIENCE_S", 60.0)
    monkeypatch.setattr(rig.plane.gateway.strangers, "sender_bytes", 100)
    with Line(rig.port) as line:
        line.socket.settimeout(5)
        line.send(head("/nothing", [], 2000) + bytes(2000))
        assert line.answer()[0] == 404
        line.send(head("/nothing", [], 0))
        assert line.answer()[0] == 404


@pytest.mark.parametrize("route", ["pull-messages", "pull-object", "confirm-message-received"])
def test_a_small_request_is_small(rig: Rig, node: Node, route: str) -> None:
    """64 KiB are taken, and not a byte more; the rest is read and the connection goes on."""
    poll = fleet_pb2.PullMessagesRequest(node=node.proto).SerializeToString()
    with Line(rig.port) as line:
        line.send(head(f"/v1/fleet/{route}", headers_of(node), 2**16 + 1))
        assert line.answer()[0] == 413
        line.send(bytes(2**16 + 1), head("/v1/fleet/pull-messages", headers_of(node), len(poll)) + poll)
        assert line.answer() == (200, b"")
        line.send(head(f"/v1/fleet/{route}", headers_of(node), 2**16) + bytes(2**16))
        assert line.answer()[0] == 400


def test_headers_without_end_are_not_kept(rig: Rig, node: Node) -> None:
    """Nor those behind a body in chunks, nor what may stand behind the size of a chunk."""
    begun = chunked_head(TREES, headers_of(node))
    for start in (b"GET /x HTTP/1.1\r\nx: ", begun + b"0\r\nx: ", begun + b"1;"):
        before = resident_bytes()
        with Line(rig.port) as line:
            with contextlib.suppress(ConnectionError):
                line.send(start, *[b"y" * 2**16] * 640)
            assert resident_bytes() - before < 20 * MIB
            assert [status for status, _ in line.answers(2)] in ([431], [])  # the end may be quicker than the answer
            assert line.is_closed


# ---------------------------------------------------------------- the counts


class Taker:
    """Somebody with a share; notes what happens."""

    def __init__(self, made: Allowance, sender: Any) -> None:
        self.told: list[str] = []
        self.share = made.share(sender, self.give_up)

    def grow(self, nbytes: int) -> bool:
        """More of the body."""
        return self.share.grow(nbytes, lambda: self.told.append("go on"))

    def give_up(self) -> None:
        """It is not wanted any more."""
        self.told.append("give up")
        self.share.close()


def test_an_allowance_counts_by_sender_and_in_all() -> None:
    """A body that does not fit waits, room that is given back is given on, and at the end nothing is held."""
    made = Allowance(10, 15)
    a, b, c = Taker(made, "a"), Taker(made, "a"), Taker(made, "c")
    assert a.grow(6)
    assert not b.grow(6)
    assert c.grow(8)
    assert not c.grow(4)
    assert (made.nbytes, b.told, c.told) == (14, [], [])
    a.share.close()
    a.share.close()
    assert (b.told, c.told) == (["go on"], [])
    b.share.close()
    assert c.told == []
    assert c.share.wanted_bytes == 4
    c.share.close()
    assert (made.nbytes, dict(made._by_sender), made._waiting, made._shares) == (0, {}, [], set())


def test_what_costs_most_is_given_up_first() -> None:
    """Bytes times seconds; what has come whole is not, and a sender who has too much under way gives up its own."""
    made = Allowance(100, 100)
    old, large, whole, new = (Taker(made, name) for name in ("old", "large", "whole", "new"))
    old.share.began_s -= 100
    whole.share.began_s -= 1e6
    assert old.grow(10)
    assert large.grow(60)
    assert whole.grow(30)
    whole.share.is_whole = True
    now_s = new.share.began_s
    assert not new.grow(5)
    made.look(now_s)
    assert old.told == large.told == []
    made.look(now_s + allowance.PATIENCE_S + 1)
    assert (old.told, large.told, whole.told, new.told) == (["give up"], [], [], ["go on"])
    other, another = Taker(made, "other"), Taker(made, "other")
    made.sender_bytes, made.total_bytes = 70, 1000
    assert other.grow(60)
    assert not another.grow(50)
    made.look(now_s + 100)
    assert (large.told, other.told, another.told) == ([], ["give up"], ["go on"])
