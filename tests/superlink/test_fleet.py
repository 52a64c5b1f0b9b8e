"""Virtual SuperNodes call as real ones do: who they are, how connections are kept, what they do when a call fails."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from flwr.proto import fleet_pb2, heartbeat_pb2
from flwr.superlink.routers.fleet import node_auth
from flwr.superlink.routers.fleet.router import router

from lifl.bench.fleet import caller, virtual_node
from lifl.bench.fleet.caller import Caller, Identity, Traffic
from lifl.bench.fleet.canned_reply import Prebuilt
from lifl.bench.fleet.fleet import Fleet
from lifl.errors import PeerGoneError

Respond = Callable[[str, bytes], tuple[int, bytes]]


@contextlib.contextmanager
def server(respond: Respond) -> Iterator[SimpleNamespace]:
    """An HTTP/1.1 server: `address`, and the `requests` that came, each with its headers and its connection."""
    told = SimpleNamespace(requests=[], address="")

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            told.requests.append((self.path, dict(self.headers), body, self.client_address[1]))
            status, answer = respond(self.path, body)
            self.send_response(status)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *args: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    thread = threading.Thread(target=http.serve_forever, args=(0.01,))
    thread.start()
    told.address = f"127.0.0.1:{http.server_address[1]}"
    try:
        yield told
    finally:
        http.shutdown()
        thread.join()
        http.server_close()


@contextlib.contextmanager
def calling(address: str) -> Iterator[Caller]:
    """A caller of that server."""
    made = Caller(address, Identity(), threading.Event())
    yield made
    made.close()


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Failed calls are made again at once."""
    monkeypatch.setattr(caller, "RETRY_S", 0.01)


# ---------------------------------------------------------------- one connection


def test_calls_share_a_connection_and_are_counted() -> None:
    """Bodies of any length go and come whole, over one connection, and every byte is counted."""
    with server(lambda _, body: (200, body[::-1])) as there, calling(there.address) as here:
        for length in (0, 10, 3_000_000, 5):
            body = bytes(range(256)) * (length // 256 + 1)
            parts = (body[: length // 2], memoryview(body)[length // 2 : length])
            assert here.call("/x", *parts) == (200, body[:length][::-1])
        assert len({connection for *_, connection in there.requests}) == 1
        assert here.traffic.calls == 4
        assert here.traffic.repeated == 0
        assert here.traffic.received_bytes > 3_000_015
        assert 3_000_015 < here.traffic.sent_bytes < 3_000_015 + 4 * 2_000


def test_a_call_is_signed_as_flower_checks_it() -> None:
    """Flower's own check of the headers finds the node that it knows by this key."""
    with server(lambda *_: (200, b"")) as there, calling(there.address) as here:
        here.call("/v1/fleet/pull-messages", b"")
        here.call("/v1/fleet/pull-messages", b"")
    key = here._identity.public_key
    for _, headers, _, _ in there.requests:
        request = SimpleNamespace(
            headers={name.lower(): value for name, value in headers.items()},
            state=SimpleNamespace(protobuf_request=fleet_pb2.ActivateNodeRequest(public_key=key)),
        )
        node_auth.authenticate_node(request)  # type: ignore[arg-type]  # raises HTTPException
        assert request.headers["content-type"] == "application/protobuf"
        assert request.headers["flwr-package-name"] == "flwr"
    signatures = {headers["flwr-signature"] for _, headers, _, _ in there.requests}
    assert len(signatures) == 2


def test_a_closed_connection_is_made_anew() -> None:
    """A connection that the server closed while it was idle is no failure."""
    with server(lambda *_: (200, b"ok")) as there, calling(there.address) as here:
        here.call("/x")
        here.interrupt()  # to poll(2) it looks as if the server had closed it
        assert here.call("/x") == (200, b"ok")
        assert len({connection for *_, connection in there.requests}) == 2
        assert here.traffic.repeated == 0


@pytest.mark.usefixtures("hasty")
def test_a_server_that_is_busy_is_asked_again() -> None:
    """503 and a connection that breaks off are not the end; any other status is an answer."""
    statuses = [503, 502, 404]
    with server(lambda *_: (statuses.pop(0), b"what")) as there, calling(there.address) as here:
        assert here.call("/x") == (404, b"what")
        assert here.traffic.repeated == 2


@pytest.mark.usefixtures("hasty")
def test_a_call_that_has_no_answer_ends_with_the_fleet() -> None:
    """Nobody listens: the call is repeated until the fleet is stopped, then it says why."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        stop = threading.Event()
        here = Caller(f"127.0.0.1:{bound.getsockname()[1]}", Identity(), stop)
        threading.Timer(0.1, stop.set).start()
        with pytest.raises(PeerGoneError, match=r"had no answer when the fleet was stopped: .*refused"):
            here.call("/x")
        assert here.traffic.repeated > 1


def test_traffic_adds_up() -> None:
    """Sums and differences are field by field."""
    assert Traffic(1, 2, 3, 4) + Traffic(10, 20, 30, 40) - Traffic(1, 1, 1, 1) == Traffic(10, 21, 32, 43)


# ---------------------------------------------------------------- the Fleet API


def test_every_path_is_one_of_flowers() -> None:
    """Every path that a virtual node calls is a route of Flower's."""
    known = {route.path for route in router.routes}  # type: ignore[attr-defined]
    calls = [one for one in vars(virtual_node).values() if isinstance(one, virtual_node.Call)]
    assert len(calls) == 12
    assert {one.path for one in calls} <= known | {f"/v1/fleet{path}" for path in known}


def quiet(path: str, _: bytes) -> tuple[int, bytes]:
    """A server that knows one node and has nothing for it."""
    answers = {
        "activate-node": fleet_pb2.ActivateNodeResponse(node_id=3),
        "send-node-heartbeat": heartbeat_pb2.SendNodeHeartbeatResponse(success=True),
    }
    answer = answers.get(path.rpartition("/")[2], fleet_pb2.PullMessagesResponse())
    return 200, answer.SerializeToString()


REPLY = Prebuilt({"w": np.ones(3, np.float32)}, 1.0)


def test_a_fleet_joins_asks_and_leaves() -> None:
    """Each node registers, is activated, beats, polls, and says good-bye; the first asks most."""
    with server(quiet) as there:
        with Fleet(there.address, [REPLY, REPLY]) as fleet:
            assert [node.node_id for node in fleet._nodes] == [3, 3]
            fleet.wait(1.0)
        paths = [path.rpartition("/")[2] for path, *_ in there.requests]
    assert paths[:2] == ["register-node", "activate-node"]
    assert paths[-2:] == ["deactivate-node", "unregister-node"]
    assert paths.count("send-node-heartbeat") == 2
    polls = [headers["flwr-public-key"] for path, headers, *_ in there.requests if path.endswith("pull-messages")]
    counts = sorted(polls.count(key) for key in set(polls))
    assert len(counts) == 2
    assert counts[0] < counts[1]
    assert fleet.traffic.calls == len(paths)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(("node-", "heartbeats"))]


def test_what_ends_a_node_is_told() -> None:
    """A server that refuses a call ends the fleet with what it said."""

    def refuse(path: str, body: bytes) -> tuple[int, bytes]:
        return (400, b"no such one") if path.endswith("pull-messages") else quiet(path, body)

    with server(refuse) as there:
        with (
            pytest.raises(PeerGoneError, match="pull-messages failed with status 400: no such one"),
            Fleet(there.address, [REPLY]) as fleet,
        ):
            fleet.wait(5.0)
        with pytest.raises(PeerGoneError, match="status 400"), Fleet(there.address, [REPLY]) as fleet:
            fleet._has_failed.wait(5.0)


def test_a_fleet_of_none_is_refused() -> None:
    """There has to be a node."""
    with pytest.raises(ValueError, match="at least 1 node"):
        Fleet("127.0.0.1:1", [])
