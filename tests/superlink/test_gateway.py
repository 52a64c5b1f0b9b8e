"""Each route that lifl takes over answers as Flower's own, and lets in nobody whom Flower's does not.

The same requests go to the gateway and to a second server of the same app with Flower's routes and uvicorn's protocol.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from datetime import timedelta
from itertools import count
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.common.serde import message_from_proto
from flwr.proto import fleet_pb2, message_pb2, node_pb2
from flwr.supercore import date
from flwr.supercore.constant import TASK_TOKEN_HEADER
from raw_http import Answer, Headers, Line, call, flowers_server, head, headers_of, replaced, soon, without
from rig import Node, Rig

from lifl.bench.fleet.caller import Identity
from lifl.bench.fleet.canned_reply import Prebuilt
from lifl.superlink.http.protocol import MAX_DISCARD_BYTES

TOKEN = TASK_TOKEN_HEADER.lower()
_numbers = count()


def chunk(nbytes: int = 200_000) -> tuple[str, bytes]:
    """An object that no other test has, and its id."""
    body = next(_numbers).to_bytes(8, "little") * (nbytes // 8)
    content = b"ArrayChunk  %d\0" % len(body) + body
    return hashlib.sha256(content).hexdigest(), content


class Servers:
    """A gateway and Flower's own server with one state: a running run, one that has ended, and two nodes."""

    def __init__(self, rig: Rig, flowers_port: int) -> None:
        self.rig, self.ports = rig, (rig.port, flowers_port)
        self.run_id, self.token = 0, ""
        self.ended_run_id, self.ended_token = rig.start_run()
        rig.state.stop_run(self.ended_run_id)
        self.node, self.other = rig.node(), rig.node()
        self.superlink = node_pb2.Node(node_id=1)

    def close(self) -> None:
        """Ends the nodes' connections."""
        self.node.close()
        self.other.close()

    def announce(self, nbytes: int = 200_000, run_id: int | None = None) -> tuple[str, bytes, str]:
        """An object's id, its content, and the session that lacks it."""
        object_id, content = chunk(nbytes)
        session_id = self.rig.state.start_session(run_id or self.run_id)
        self.rig.state.preregister_object_tree(message_pb2.ObjectTree(object_id=object_id), session_id)
        return object_id, content, session_id

    def effects(self) -> Any:
        """The state that may not change when a request is refused."""
        store, state = self.rig.store, self.rig.state
        return len(store), state.num_message_ins(), state.num_message_res(), self.rig.used_bytes

    def both(self, path: str, make: Callable[[], tuple[Headers, bytes]]) -> Answer:
        """Makes a request twice, one for each server; their answer, which must be the same, as must be what it did."""
        before = self.effects()
        ours, flowers = (call(port, path, *make()) for port in self.ports)
        assert ours == flowers
        assert self.effects() == before
        return ours

    def push(self, node: Node | None, **fields: Any) -> Any:
        """A push-object request of the node, or of a ServerApp."""
        proto = self.superlink if node is None else node.proto
        return message_pb2.PushObjectRequest(**{"node": proto, "run_id": self.run_id, **fields})

    def runtime_headers(self) -> Headers:
        """Those of a ServerApp."""
        headers = without(headers_of(self.node), "flwr-public-key", "flwr-signature", "flwr-timestamp")
        return [*headers, (TOKEN, self.token)]

    def ask(self) -> Message:
        """A message for the node, as it has it when it has polled; of the answer's objects none has come."""
        with self.rig.grid(self.run_id, self.token) as grid:
            content = RecordDict({"config": ConfigRecord({"n": next(_numbers)})})
            assert grid.push_messages([Message(content, self.node.id, "query")])
        _, body = self.node.say("pull-messages", fleet_pb2.PullMessagesRequest(node=self.node.proto))
        return message_from_proto(fleet_pb2.PullMessagesResponse.FromString(body).messages_list[0])


DURABLE = pytest.param("SQLite", marks=pytest.mark.leaves("SQLAlchemy's pool opens connections when it needs them"))


@pytest.fixture(scope="module", params=["memory", DURABLE])
def servers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    """With either of Flower's LinkStates."""
    folder: Path = tmp_path_factory.mktemp("gateway")
    database = str(folder / "state.db") if request.param == "SQLite" else None
    with Rig(database=database, max_object=2**22) as rig, flowers_server(rig) as port:
        made = Servers(rig, port)
        yield made
        made.close()
        engines = [getattr(one, "_engine", None) for one in (rig.state, rig.store)]
    for engine in engines:
        if engine is not None:
            engine.dispose()


@pytest.fixture(autouse=True)
def nothing_left(servers: Servers) -> Iterator[None]:
    """After each test the gateway holds nothing and the arena is back where it was."""
    servers.rig.store.clear()
    servers.rig.settle()
    servers.run_id, servers.token = servers.rig.start_run()  # one that nobody keeps alive
    yield
    servers.rig.store.clear()
    servers.rig.settle()
    assert soon(lambda: servers.rig.plane.gateway.uploads == 0)
    assert soon(lambda: not servers.rig.plane.protocol.busy)


# ---------------------------------------------------------------- who is not let in: SuperNodes


def fleet_requests(servers: Servers, node: Node) -> dict[str, Any]:
    """A request of a node to each of the routes, which would do something."""
    object_id, content, session_id = servers.announce()
    asked = servers.ask() if node is servers.node else None
    requests = {
        "push-object": servers.push(node, object_id=object_id, object_content=content, session_id=session_id),
        "pull-object": message_pb2.PullObjectRequest(node=node.proto, run_id=servers.run_id, object_id=object_id),
        "pull-messages": fleet_pb2.PullMessagesRequest(node=node.proto),
        "confirm-message-received": message_pb2.ConfirmMessageReceivedRequest(
            node=node.proto, run_id=servers.run_id, message_object_id=object_id
        ),
    }
    if asked is not None:
        answer = Prebuilt({"w": np.ones(3)}, 1).answer(asked)
        requests["push-messages"] = fleet_pb2.PushMessagesRequest(
            node=node.proto, messages_list=[answer.message], message_object_trees=[answer.tree]
        )
    return requests


def signed_at(node: Node, seconds: float) -> Headers:
    """Headers whose time is so many seconds from now, signed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lifl.bench.fleet.caller.now", lambda: date.now() + timedelta(seconds=seconds))
        return headers_of(node)


@attrs.define(eq=False)
class Stranger:
    """A key pair that no node has."""

    identity: Identity = attrs.field(factory=Identity)


BAD: dict[str, Callable[[Servers], Headers]] = {
    "no public key": lambda s: without(headers_of(s.node), "flwr-public-key"),
    "no signature": lambda s: without(headers_of(s.node), "flwr-signature"),
    "no timestamp": lambda s: without(headers_of(s.node), "flwr-timestamp"),
    "nothing": lambda s: without(headers_of(s.node), "flwr-public-key", "flwr-signature", "flwr-timestamp"),
    "no base64": lambda s: replaced(headers_of(s.node), flwr_signature="%%%"),
    "no key": lambda s: replaced(headers_of(s.node), flwr_public_key="aGVsbG8="),
    "no signature of anything": lambda s: replaced(headers_of(s.node), flwr_signature="aGVsbG8="),
    "signature of another time": lambda s: replaced(headers_of(s.node), flwr_timestamp=date.now().isoformat()),
    "no time": lambda s: replaced(headers_of(s.node), flwr_timestamp="yesterday"),
    "old": lambda s: signed_at(s.node, -3600),
    "not yet": lambda s: signed_at(s.node, 3600),
    "another node's signature": lambda s: replaced(
        headers_of(s.node), flwr_signature=dict(headers_of(s.other))["flwr-signature"]
    ),
    "another node's key": lambda s: headers_of(s.other),
    "a stranger's key": lambda s: headers_of(Stranger()),  # type: ignore[arg-type]
}
FLEET = ["push-object", "pull-object", "pull-messages", "push-messages", "confirm-message-received"]


@pytest.mark.parametrize("wrong", BAD)
def test_no_fleet_route_lets_in_who_is_not_who_he_says(servers: Servers, wrong: str) -> None:
    """401, with Flower's words, and nothing done; with the right credentials the same requests do something."""
    requests = fleet_requests(servers, servers.node)
    for route in FLEET:
        body = requests[route].SerializeToString()
        answer = servers.both(f"/v1/fleet/{route}", lambda body=body: (BAD[wrong](servers), body))
        assert answer.status == 401, route
        assert answer.body == b'{"detail":"Invalid SuperNode authentication"}'
    status, _ = servers.node.say("push-object", requests["push-object"])
    assert status == 200


def test_no_fleet_route_lets_a_node_speak_for_another(servers: Servers) -> None:
    """The other's id in the request, its own key and signature."""
    for route, request in fleet_requests(servers, servers.node).items():
        request.node.node_id = servers.other.id
        answer = servers.both(f"/v1/fleet/{route}", lambda r=request: (headers_of(servers.node), r.SerializeToString()))
        assert answer.status == 401, route
        request.ClearField("node")
        answer = servers.both(f"/v1/fleet/{route}", lambda r=request: (headers_of(servers.node), r.SerializeToString()))
        assert answer.status == 401, route


def test_what_is_behind_the_object_cannot_change_who_speaks(servers: Servers) -> None:
    """Protobuf takes the last of several; the checks are made of the first: then they have to be the same."""
    object_id, content, session_id = servers.announce()
    elsewhere_id, _, elsewhere = servers.announce()
    first = servers.push(servers.node, object_id=object_id, object_content=content, session_id=session_id)
    later = [
        message_pb2.PushObjectRequest(node=servers.other.proto),
        message_pb2.PushObjectRequest(run_id=servers.ended_run_id),
        message_pb2.PushObjectRequest(object_id=elsewhere_id, session_id=elsewhere),
    ]
    for more in later:
        body = first.SerializeToString(deterministic=True) + more.SerializeToString()
        answer = call(servers.rig.port, "/v1/fleet/push-object", headers_of(servers.node), body)
        assert answer.status == 400, more
        assert not servers.rig.store.get(object_id)
        assert not servers.rig.store.get(elsewhere_id)
    body = first.SerializeToString(deterministic=True) + servers.push(servers.node).SerializeToString()
    answer = call(servers.rig.port, "/v1/fleet/push-object", headers_of(servers.node), body)
    assert answer.status == 200, "the same again changes nothing"
    assert servers.rig.store.get(object_id) == content


@pytest.mark.parametrize("route", FLEET)
@pytest.mark.parametrize("which", ["ended", "unknown"])
def test_a_run_that_does_not_run_takes_nothing(servers: Servers, route: str, which: str) -> None:
    """A run that has ended and a run that never was are answered as by Flower."""
    request = fleet_requests(servers, servers.node)[route]
    run_id = servers.ended_run_id if which == "ended" else 12345
    if route == "push-messages":
        request.messages_list[0].metadata.run_id = run_id
    elif route != "pull-messages":  # which names none
        request.run_id = run_id
    else:
        return
    before = servers.rig.plane.gateway.checks._running.copy()
    answer = servers.both(f"/v1/fleet/{route}", lambda: (headers_of(servers.node), request.SerializeToString()))
    assert answer.status == (403 if which == "ended" else 500)
    assert servers.rig.plane.gateway.checks._running.keys() <= before.keys() | {servers.run_id}


def test_a_run_that_ends_takes_nothing_more(servers: Servers) -> None:
    """Also an object that is on its way, and one that comes in the moment in which the run was last seen running."""
    run_id, _ = servers.rig.start_run()
    sessions = [servers.announce(run_id=run_id) for _ in range(3)]
    requests = [
        servers.push(servers.node, run_id=run_id, object_id=object_id, object_content=content, session_id=session_id)
        for object_id, content, session_id in sessions
    ]
    assert servers.node.say("push-object", requests[0])[0] == 200
    body = requests[1].SerializeToString(deterministic=True)
    with Line(servers.rig.port) as line:
        line.send(head("/v1/fleet/push-object", headers_of(servers.node), len(body)), body[:1000])
        assert soon(lambda: servers.rig.plane.gateway.uploads == 1)
        assert servers.rig.state.stop_run(run_id)
        assert servers.node.say("push-object", requests[2])[0] == 403
        line.send(body[1000:])
        assert line.answer()[0] == 403
    assert len(servers.rig.store) == 0


# ---------------------------------------------------------------- who is not let in: ServerApps


def runtime_requests(servers: Servers) -> dict[str, Any]:
    """A request to each of the routes of a ServerApp, which would do something."""
    object_id, content, session_id = servers.announce()
    return {
        "push-object": servers.push(None, object_id=object_id, object_content=content, session_id=session_id),
        "pull-object": message_pb2.PullObjectRequest(
            node=servers.superlink, run_id=servers.run_id, object_id=object_id
        ),
    }


WRONG_TOKENS: dict[str, Callable[[Servers], Headers]] = {
    "no token": lambda s: without(s.runtime_headers(), TOKEN),
    "wrong token": lambda s: [*without(s.runtime_headers(), TOKEN), (TOKEN, "x" * len(s.token))],
    "empty token": lambda s: [*without(s.runtime_headers(), TOKEN), (TOKEN, "")],
    "two tokens": lambda s: [*s.runtime_headers(), (TOKEN, s.token)],
    "a wrong one beside": lambda s: [*s.runtime_headers(), (TOKEN, "x")],
    "the token of a run that has ended": lambda s: [*without(s.runtime_headers(), TOKEN), (TOKEN, s.ended_token)],
    "a SuperNode's credentials": lambda s: headers_of(s.node),
}

OTHER_VERSIONS: dict[str, Callable[[Servers], Headers]] = {
    "old": lambda s: replaced(s.runtime_headers(), flwr_package_version="1.2.3"),
    "no version": lambda s: replaced(s.runtime_headers(), flwr_package_version="new"),
    "half of it": lambda s: without(s.runtime_headers(), "flwr-package-version"),
    "another package": lambda s: replaced(s.runtime_headers(), flwr_package_name="flower"),
    "old, and no token": lambda s: replaced(without(s.runtime_headers(), TOKEN), flwr_package_version="1.2.3"),
}


@pytest.mark.parametrize("wrong", WRONG_TOKENS)
def test_no_runtime_route_lets_in_who_has_no_token(servers: Servers, wrong: str) -> None:
    """With Flower's words, and nothing done."""
    for route, request in runtime_requests(servers).items():
        body = request.SerializeToString()
        answer = servers.both(f"/v1/runtime/{route}", lambda body=body: (WRONG_TOKENS[wrong](servers), body))
        assert answer.status == 401, route


@pytest.mark.parametrize("which", OTHER_VERSIONS)
def test_no_runtime_route_lets_in_another_version(servers: Servers, which: str) -> None:
    """The version is looked at before the token."""
    for route, request in runtime_requests(servers).items():
        body = request.SerializeToString()
        answer = servers.both(f"/v1/runtime/{route}", lambda body=body: (OTHER_VERSIONS[which](servers), body))
        assert answer.status not in (200, 401, 500), route


def test_a_serverapp_of_an_old_flower_says_no_version(servers: Servers) -> None:
    """A ServerApp that gives no version is let in."""
    bare = without(servers.runtime_headers(), "flwr-package-version", "flwr-package-name", "flwr-component-name")
    request = runtime_requests(servers)["pull-object"]
    answer = servers.both("/v1/runtime/pull-object", lambda: (bare, request.SerializeToString()))
    assert answer.status == 200


@pytest.mark.parametrize("route", ["push-object", "pull-object"])
def test_a_serverapp_speaks_as_the_superlinks_node(servers: Servers, route: str) -> None:
    """Any other is refused as by Flower."""
    request = runtime_requests(servers)[route]
    request.node.node_id = servers.node.id
    answer = servers.both(f"/v1/runtime/{route}", lambda: (servers.runtime_headers(), request.SerializeToString()))
    assert answer.status not in (200, 500)


def test_a_serverapps_run_is_its_tokens(servers: Servers) -> None:
    """Whatever run it names, its session's run has to be that of its token."""
    object_id, content, session_id = servers.announce(run_id=servers.rig.start_run()[0])
    request = servers.push(None, object_id=object_id, object_content=content, session_id=session_id)
    answer = servers.both("/v1/runtime/push-object", lambda: (servers.runtime_headers(), request.SerializeToString()))
    assert (answer.status, answer.body) == (200, b"")


# ---------------------------------------------------------------- what is not taken


def headers_for(servers: Servers, api: str) -> Headers:
    """Good ones."""
    return headers_of(servers.node) if api == "fleet" else servers.runtime_headers()


@pytest.mark.parametrize("api", ["fleet", "runtime"])
@pytest.mark.parametrize(
    "change",
    [
        {"session_id": "no such session"},
        {"object_id": "f" * 64},
        {"object_id": "no hash"},
        {"object_id": ""},
        {"object_content": b"ArrayChunk  5\x00wrong"},
        {"object_content": b"nothing of the kind"},
        {"object_content": b""},
        {"object_id": "f" * 64, "session_id": ""},
    ],
    ids=lambda change: ",".join(f"{name}={value[:8]!r}" for name, value in change.items()),
)
def test_what_is_not_to_be_stored_is_answered_as_by_flower(servers: Servers, api: str, change: dict[str, Any]) -> None:
    """Not stored, and the object can still come."""
    object_id, content, session_id = servers.announce()
    node = servers.node if api == "fleet" else None
    right = {"object_id": object_id, "object_content": content, "session_id": session_id}
    request = servers.push(node, **{**right, **change})
    answer = servers.both(
        f"/v1/{api}/push-object", lambda: (headers_for(servers, api), request.SerializeToString(deterministic=True))
    )
    assert (answer.status, answer.body) == (200, b"")
    request = servers.push(node, **right)
    answer = call(servers.rig.port, f"/v1/{api}/push-object", headers_for(servers, api), request.SerializeToString())
    assert message_pb2.PushObjectResponse.FromString(answer.body).stored


@pytest.mark.parametrize("nbytes", [8, 1000, 65536, 200_000])
@pytest.mark.parametrize("api", ["fleet", "runtime"])
def test_what_is_stored_and_pulled_is_answered_as_by_flower(servers: Servers, api: str, nbytes: int) -> None:
    """Pushed to either server it is there for both, byte for byte; and it counts as the run's traffic."""
    node = servers.node if api == "fleet" else None
    proto = servers.node.proto if node is not None else servers.superlink
    pushed, pulled, traffic = [], [], []
    for port in servers.ports:
        object_id, content, session_id = servers.announce(nbytes)
        request = servers.push(node, object_id=object_id, object_content=content, session_id=session_id)
        ask = message_pb2.PullObjectRequest(node=proto, run_id=servers.run_id, object_id=object_id)
        before = servers.rig.state.get_run_info(run_ids=[servers.run_id])[0]
        body = request.SerializeToString()
        early = [
            call(p, f"/v1/{api}/pull-object", headers_for(servers, api), ask.SerializeToString()) for p in servers.ports
        ]
        assert early[0] == early[1]
        pushed.append(call(port, f"/v1/{api}/push-object", headers_for(servers, api), body))
        late = [
            call(p, f"/v1/{api}/pull-object", headers_for(servers, api), ask.SerializeToString()) for p in servers.ports
        ]
        assert late[0] == late[1]
        assert message_pb2.PullObjectResponse.FromString(late[0].body).object_content == content
        pulled.append(late[0].headers)
        after = servers.rig.state.get_run_info(run_ids=[servers.run_id])[0]
        traffic.append((after.bytes_sent - before.bytes_sent, after.bytes_recv - before.bytes_recv))
    assert pushed[0] == pushed[1]
    assert pulled[0] == pulled[1]
    assert traffic[0] == traffic[1] == ((2 * len(content), len(content)) if api == "fleet" else (0, 0))


def test_messages_come_and_go_as_on_flowers_server(servers: Servers) -> None:
    """Polled, replied to and confirmed, once at each server: the same answers but for what is random in them."""
    node, said = servers.node, []
    for port in servers.ports:
        with servers.rig.grid(servers.run_id, servers.token) as grid:
            content = RecordDict({"config": ConfigRecord({"n": 5})})
            assert grid.push_messages([Message(content, node.id, "query")])

        def ask(route: str, request: Any, port: int = port) -> bytes:
            answer = call(port, f"/v1/fleet/{route}", headers_of(node), request.SerializeToString())
            assert answer.status == 200
            return answer.body

        polled = fleet_pb2.PullMessagesResponse.FromString(
            ask("pull-messages", fleet_pb2.PullMessagesRequest(node=node.proto))
        )
        assert len(polled.messages_list) == 1
        assert ask("pull-messages", fleet_pb2.PullMessagesRequest(node=node.proto)) == b""
        message = message_from_proto(polled.messages_list[0])
        answer = Prebuilt({"w": np.ones(3)}, 1).answer(message)
        reply = fleet_pb2.PushMessagesRequest(
            node=node.proto, messages_list=[answer.message], message_object_trees=[answer.tree]
        )
        pushed = fleet_pb2.PushMessagesResponse.FromString(ask("push-messages", reply))
        assert pushed.results == {answer.tree.object_id: 0}
        confirm = message_pb2.ConfirmMessageReceivedRequest(
            node=node.proto, run_id=servers.run_id, message_object_id=message.metadata.message_id
        )
        assert ask("confirm-message-received", confirm) == b""
        assert message.metadata.message_id not in servers.rig.store
        said.append((len(set(pushed.objects_to_push)), pushed.reconnect.reconnect, bool(pushed.session_id)))
    assert said[0] == said[1]
    servers.rig.state.delete_messages(set(servers.rig.state.get_message_ids_from_run_id(servers.run_id)))


@pytest.mark.parametrize("kind", [None, "application/json", "application/protobuf; charset=x", "APPLICATION/PROTOBUF"])
@pytest.mark.parametrize("route", ["fleet/push-object", "fleet/pull-messages", "runtime/pull-object"])
def test_the_content_type_is_looked_at_as_by_flower(servers: Servers, route: str, kind: str | None) -> None:
    """Any other than protobuf's is refused before anything else."""
    api, _, name = route.partition("/")
    requests = fleet_requests(servers, servers.other) if api == "fleet" else runtime_requests(servers)
    node_headers = headers_of(servers.other) if api == "fleet" else servers.runtime_headers()
    headers = without(node_headers, "content-type")
    body = requests[name].SerializeToString()
    if name == "push-object":  # what is stored by the first cannot be by the second
        body = servers.push(servers.other, object_id="f" * 64, object_content=b"x").SerializeToString()
    more = [] if kind is None else [("content-type", kind)]
    answer = servers.both(f"/v1/{route}", lambda: ([*headers, *more], body))
    assert (answer.status == 200) == (kind is not None and "json" not in kind)


@pytest.mark.parametrize(
    "route", ["fleet/pull-object", "fleet/push-messages", "runtime/push-object", "fleet/push-object"]
)
@pytest.mark.parametrize("body", [b"\xff", b"\x1a\x05ab", b"\x1a\x02\xff\xfe" + b"\x22\x01x", b"\x0b", b"\x22\x80"])
def test_what_is_no_protobuf_is_refused_as_by_flower(servers: Servers, route: str, body: bytes) -> None:
    """Before it is asked who sent it; a string that is no text is none either."""
    for headers in (headers_for(servers, route.partition("/")[0]), [("content-type", "application/protobuf")]):
        answer = servers.both(f"/v1/{route}", lambda headers=headers: (headers, body))
        assert answer.status == 400


@pytest.mark.parametrize(
    "route", ["fleet/push-object", "fleet/pull-messages", "fleet/push-messages", "runtime/pull-object"]
)
def test_an_empty_body_is_a_message_too(servers: Servers, route: str) -> None:
    """All of its fields are empty: refused as by Flower."""
    api = route.partition("/")[0]
    servers.both(f"/v1/{route}", lambda: (headers_for(servers, api), b""))


def test_other_paths_and_methods_are_flowers(servers: Servers) -> None:
    """A request that is not exactly for one of the routes is not lifl's."""
    for path in (
        "/v1/fleet/push-object/",
        "/v1/fleet/push-objects",
        "/v1/fleet/push-object?x=1",
        "//v1/fleet/push-object",
    ):
        body = servers.push(servers.node, object_id="f" * 64, object_content=b"x").SerializeToString()
        servers.both(path, lambda body=body: (headers_of(servers.node), body))


# ---------------------------------------------------------------- refused before it is accepted

MIB = 2**20


def refused_early(servers: Servers, api: str, headers: Headers, request: Any, nbytes: int = 3 * MIB) -> int:
    """The status of a push-object of which only the head and the small fields were sent; nothing may be held for it."""
    fields = request.SerializeToString(deterministic=True)
    prefix = (
        fields + b"\x22" + bytes([nbytes & 127 | 128, nbytes >> 7 & 127 | 128, nbytes >> 14 & 127 | 128, nbytes >> 21])
    )
    before, lines = servers.effects(), Line(servers.rig.port)
    with lines as line:
        line.send(head(f"/v1/{api}/push-object", headers, len(prefix) + nbytes), prefix, b"x" * 100)
        status, _ = line.answer()
        assert servers.effects() == before
        assert servers.rig.plane.gateway.uploads == 0
        sent = 100
        while sent < nbytes:  # the rest is read and forgotten
            part = min(MIB, nbytes - sent)
            line.send(b"x" * part)
            sent += part
            assert servers.rig.used_bytes == before[-1]
        # And the connection is as good as before.
        good = fleet_pb2.PullMessagesRequest(node=servers.other.proto).SerializeToString()
        line.send(head("/v1/fleet/pull-messages", headers_of(servers.other), len(good)), good)
        assert line.answer() == (200, b"")
    return status


@pytest.mark.parametrize("wrong", BAD)
def test_an_object_of_who_is_not_let_in_is_not_accepted(servers: Servers, wrong: str) -> None:
    """The answer is there before its body is, and no memory is taken for it."""
    request = servers.push(servers.node, object_id=servers.announce()[0])
    assert refused_early(servers, "fleet", BAD[wrong](servers), request) == 401


@pytest.mark.parametrize("wrong", ["no token", "wrong token", "two tokens", "the token of a run that has ended"])
def test_an_object_of_a_serverapp_without_token_is_not_accepted(servers: Servers, wrong: str) -> None:
    """Nor of one of another version, or of one that is not the SuperLink's node."""
    request = servers.push(None, object_id=servers.announce()[0])
    assert refused_early(servers, "runtime", WRONG_TOKENS[wrong](servers), request) == 401
    assert refused_early(servers, "runtime", OTHER_VERSIONS["old"](servers), request) not in (200, 401, 500)
    request.node.node_id = servers.node.id
    assert refused_early(servers, "runtime", servers.runtime_headers(), request) not in (200, 401, 500)


@pytest.mark.parametrize("which", ["ended", "unknown"])
def test_an_object_of_a_run_that_does_not_run_is_not_accepted(servers: Servers, which: str) -> None:
    """The run's status is known from the head of the body."""
    run_id = servers.ended_run_id if which == "ended" else 12345
    request = servers.push(servers.node, run_id=run_id, object_id=servers.announce()[0])
    assert refused_early(servers, "fleet", headers_of(servers.node), request) == (403 if which == "ended" else 500)


def test_an_object_that_is_too_large_is_not_accepted(servers: Servers) -> None:
    """413, with what can be done; before it is asked who sends it."""
    request = servers.push(servers.node, object_id=servers.announce()[0])
    assert refused_early(servers, "fleet", headers_of(servers.node), request, 2**22 + 1) == 413


def test_of_a_body_beyond_all_bounds_the_rest_is_not_read(servers: Servers) -> None:
    """The connection ends."""
    fields = servers.push(servers.node, object_id=servers.announce()[0]).SerializeToString()
    nbytes = MAX_DISCARD_BYTES + 2**20
    prefix = (
        fields + b"\x22" + bytes([nbytes & 127 | 128, nbytes >> 7 & 127 | 128, nbytes >> 14 & 127 | 128, nbytes >> 21])
    )
    with Line(servers.rig.port) as line:
        line.send(head("/v1/fleet/push-object", headers_of(servers.node), len(prefix) + nbytes), prefix)
        status, reason = line.answer()
        assert status == 413
        assert b"--lifl-max-object" in reason
        assert line.is_closed


def test_a_node_that_is_unregistered_is_refused_at_once(servers: Servers) -> None:
    """The server remembers keys, not the nodes that have them."""
    node = servers.rig.node()
    object_id, content, session_id = servers.announce()
    request = fleet_pb2.PullMessagesRequest(node=node.proto)
    assert node.say("pull-messages", request)[0] == 200
    node.say("unregister-node", fleet_pb2.UnregisterNodeFleetRequest(node_id=node.id))
    push = servers.push(node, object_id=object_id, object_content=content, session_id=session_id)
    for route, said in (("pull-messages", request), ("push-object", push)):
        answer = servers.both(f"/v1/fleet/{route}", lambda said=said: (headers_of(node), said.SerializeToString()))
        assert answer.status == 401
    node.close()


def test_the_clock_of_a_signature_goes_on(servers: Servers) -> None:
    """Headers that were good are not good for ever, on the same connection."""
    body = fleet_pb2.PullMessagesRequest(node=servers.node.proto).SerializeToString()
    headers = headers_of(servers.node)
    assert call(servers.rig.port, "/v1/fleet/pull-messages", headers, body).status == 200
    later = date.now() + timedelta(seconds=3600)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flwr.superlink.routers.fleet.node_auth.now", lambda: later)
        answer = servers.both("/v1/fleet/pull-messages", lambda: (headers, body))
        assert answer.status == 401
