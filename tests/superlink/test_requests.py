"""A request for messages is held open while there is none, and only of who is let in; it costs no thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.proto import fleet_pb2
from raw_http import Line, head, headers_of, soon, without
from rig import Node, Rig

PULL = "/v1/fleet/pull-messages"
HOLD_S = 0.6


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    """A server that holds requests, for less time than SuperNodes would wait."""
    with Rig("4MiB", hold_s=HOLD_S) as made:
        yield made


@pytest.fixture
def node(rig: Rig) -> Iterator[Node]:
    """A node; after the test nobody waits."""
    made = rig.node()
    yield made
    made.close()
    assert soon(lambda: not rig.plane.long_polls._by_node)
    assert soon(lambda: not rig.plane.protocol.busy)


def ask(line: Line, node: Node) -> None:
    """Asks for a message."""
    body = fleet_pb2.PullMessagesRequest(node=node.proto).SerializeToString()
    line.send(head(PULL, headers_of(node), len(body)) + body)


def tell(rig: Rig, node: Node) -> None:
    """Sends the node a message."""
    run_id, token = rig.start_run()
    with rig.grid(run_id, token) as grid:
        assert grid.push_messages([Message(RecordDict({"c": ConfigRecord({"n": 1})}), node.id, "query")])


def count_of(answer: tuple[int, bytes]) -> int:
    """The number of messages in an answer."""
    status, body = answer
    assert status == 200
    return len(fleet_pb2.PullMessagesResponse.FromString(body).messages_list)


def test_a_message_ends_the_wait(rig: Rig, node: Node) -> None:
    """The first of two requests of a node gets the message, the other waits on."""
    with Line(rig.port) as line, Line(rig.port) as other:
        ask(line, node)
        ask(other, node)
        assert soon(lambda: len(rig.plane.long_polls._by_node.get(node.id, ())) == 2)
        tell(rig, node)
        assert sorted([count_of(line.answer()), count_of(other.answer())]) == [0, 1]


def test_a_message_that_is_there_is_not_waited_for(rig: Rig, node: Node) -> None:
    """It is the answer, and nobody is held."""
    tell(rig, node)
    with Line(rig.port) as line:
        ask(line, node)
        assert count_of(line.answer()) == 1
    assert node.id not in rig.plane.long_polls._by_node


def test_the_wait_ends_before_the_node_gives_up(rig: Rig, node: Node) -> None:
    """With an empty answer, and the connection is used again."""
    with Line(rig.port) as line:
        for _ in range(2):
            begin = time.monotonic()
            ask(line, node)
            assert count_of(line.answer()) == 0
            assert time.monotonic() - begin > 0.9 * HOLD_S


@pytest.mark.parametrize("wrong", ["flwr-signature", "flwr-public-key"])
def test_who_is_not_let_in_is_not_held(rig: Rig, node: Node, wrong: str) -> None:
    """It is told, and never waits."""
    body = fleet_pb2.PullMessagesRequest(node=node.proto).SerializeToString()
    with Line(rig.port) as line, pytest.MonkeyPatch.context() as patch:
        patch.setattr(rig.plane.long_polls, "hold", lambda *_: pytest.fail("it is held"))
        line.send(head(PULL, without(headers_of(node), wrong), len(body)) + body)
        assert line.answer()[0] == 401


def test_who_goes_while_it_waits_is_forgotten(rig: Rig, node: Node) -> None:
    """And a message that comes then is the next one's who asks."""
    with Line(rig.port) as line:
        ask(line, node)
        assert soon(lambda: node.id in rig.plane.long_polls._by_node)
    assert soon(lambda: node.id not in rig.plane.long_polls._by_node)
    tell(rig, node)
    with Line(rig.port) as line:
        ask(line, node)
        assert count_of(line.answer()) == 1


def test_who_goes_before_it_is_noted_is_forgotten(rig: Rig, node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if the look for a message fails then."""
    arrived, gone, failed = threading.Event(), threading.Event(), threading.Event()
    gateway, fleet = rig.plane.gateway, rig.plane.gateway.checks.fleet

    def check_slowly(*args: object) -> None:
        fleet(*args)
        arrived.set()
        assert gone.wait(10)

    def fail(_: int) -> bool:
        failed.set()
        raise OSError("a fault of the server's")

    monkeypatch.setattr(gateway.checks, "fleet", check_slowly)
    monkeypatch.setattr(gateway, "is_incoming", fail)
    with Line(rig.port) as line:
        ask(line, node)
        assert arrived.wait(10)
    assert soon(lambda: not rig.plane.protocol.busy)
    gone.set()
    assert failed.wait(10)


def test_waiting_takes_no_thread(rig: Rig, node: Node) -> None:
    """However many wait; each has its answer when the time is over."""
    count = 200  # all of one node: identities take time to make
    threads = threading.active_count()
    lines = [Line(rig.port) for _ in range(count)]
    body = fleet_pb2.PullMessagesRequest(node=node.proto).SerializeToString()
    request = head(PULL, headers_of(node), len(body)) + body
    for line in lines:
        line.send(request)
    assert [count_of(line.answer()) for line in lines] == [0] * count
    assert threading.active_count() <= threads + 40  # asyncio's pool, which looks for messages
    for line in lines:
        line.close()


def test_a_server_that_ends_answers_who_waits() -> None:
    """At once."""
    with Rig("4MiB", hold_s=60.0) as rig:
        node = rig.node()
        line = Line(rig.port)
        ask(line, node)
        assert soon(lambda: node.id in rig.plane.long_polls._by_node)
        begin = time.monotonic()
    assert time.monotonic() - begin < 20
    assert count_of(line.answer()) == 0
    assert line.is_closed
    line.close()
    node.close()
