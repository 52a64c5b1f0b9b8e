"""A node's messages cost that node: attacks that were tried on the server, each beside honest clients."""

from __future__ import annotations

import contextlib
import hashlib
import json
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flower_objects import NUMPY, FlowerObject, array, chunks_of, metrics, record, reply, saved, update, weight
from flwr.app import Message, RecordDict
from flwr.app.message import make_message
from flwr.common.serde import message_to_proto
from flwr.proto import fleet_pb2, message_pb2
from raw_http import Line, call, head, headers_of
from rig import HOST, Node, Rig
from scripted_clients import Client, check_mean, play, prepare, says, wait_until

from lifl.bench.fleet.canned_reply import Placeholder
from lifl.superlink.rounds import incoming_reply as reception
from lifl.superlink.rounds import rounds
from lifl.superlink.store.content import BlockContent, Landed, PartContent, varint

MIB = 2**20
STORED = message_pb2.PushObjectResponse(stored=True).SerializeToString()
MODEL = {"w": np.zeros((100, 500), np.float32), "b": np.zeros(3), "c": np.zeros(3)}
HONEST = [
    ({"w": np.full((100, 500), 1, np.float32), "b": np.ones(3), "c": np.arange(3.0)}, 1.0),
    ({"w": np.full((100, 500), 5, np.float32), "b": np.arange(3.0), "c": np.ones(3)}, 3.0),
]
THEIRS = {"w": np.full((100, 500), 7, np.float32), "b": np.full(3, 7.0), "c": np.full(3, 9.0)}


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    """A server for all attacks of this module."""
    with Rig("64MiB") as made:
        yield made


def resident_bytes() -> int:
    """Memory of this process, which is the server's."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmRSS")) * 1024


@contextlib.contextmanager
def peak_below(most_bytes: int) -> Iterator[None]:
    """Memory grows by less than so much meanwhile."""
    before, stop, seen = resident_bytes(), threading.Event(), [0]

    def look() -> None:
        while not stop.wait(0.005):
            seen[0] = max(seen[0], resident_bytes() - before)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
    assert seen[0] < most_bytes, f"{seen[0]:,} bytes more at the peak"


# ---------------------------------------------------------------- whose bytes are whose


def turned(arrays: dict[str, Any]) -> FlowerObject:
    """A reply with the keys in another order than the model's."""
    return update(dict(reversed(arrays.items())))


def test_keys_in_another_order_are_read_by_name() -> None:
    """Arrays of one size, each full of another number; in the first round, and when the server has seen the order."""
    model = {name: np.zeros(300, np.float32) for name in "abcd"}
    first, second, third = ({n: np.full(300, 10**k * i, np.float32) for i, n in enumerate("abcd", 1)} for k in range(3))
    with Rig("64MiB") as rig:
        for honest in ([(first, 1.0)], [(first, 1.0), (second, 3.0)]):
            round_, _ = play(rig, model, honest, says(turned(third)), num_rounds=3)
            assert not round_.refused
            check_mean(round_, [*honest, (third, 1.0)])
        round_, _ = play(rig, model, [], says(turned(first)), says(turned(second)), num_rounds=2)
        check_mean(round_, [(first, 1.0), (second, 1.0)])


def test_chunks_in_another_order_are_what_they_are() -> None:
    """An array that names its chunks in another order has its numbers in that order."""
    count = 3 * 1_310_720
    numbers = np.arange(count, dtype=np.float32)
    parts = chunks_of(saved(numbers))
    assert len(parts) == 4
    said = {"dtype": "float32", "shape": [count], "stype": NUMPY, "arraychunk_ids": [0, 2, 1, 3]}
    stream = b"".join(parts[i].body for i in said["arraychunk_ids"])
    theirs = np.frombuffer(stream, np.float32, count, 128)
    with Rig("256MiB") as rig:
        bad = update({"w": FlowerObject("Array", tuple(parts), json.dumps(said).encode())})
        zeros = {"w": np.zeros(count, np.float32)}
        round_, _ = play(rig, zeros, [(zeros, 1.0)], says(bad))
        check_mean(round_, [(zeros, 1.0), ({"w": theirs}, 1.0)])


@pytest.mark.parametrize("turn", range(3))
def test_one_nodes_reply_changes_no_others(rig: Rig, turn: int) -> None:
    """Arrays that change places, and a weight that hardly counts: the next rounds of honest clients are exact."""
    names = list(THEIRS)
    order = names[turn:] + names[:turn]
    order[0], order[-1] = order[-1], order[0]
    bad = update({name: THEIRS[name] for name in order}, 2.0**-60)
    round_, _ = play(rig, MODEL, HONEST, says(bad), num_rounds=3)
    assert not round_.refused
    check_mean(round_, HONEST)


# ---------------------------------------------------------------- what a reply says of itself


def described(name: str, **said: Any) -> FlowerObject:
    """A right reply but for what one array says of itself; text as it is, not escaped."""
    numbers = THEIRS[name]
    chunks = chunks_of(saved(numbers))
    right = {"dtype": "float64", "shape": [3], "stype": NUMPY, "arraychunk_ids": [0]}
    body = json.dumps({**right, **said}, ensure_ascii=False).encode()
    return update({**THEIRS, name: FlowerObject("Array", tuple(chunks), body)})


BIG = FlowerObject("ArrayChunk", body=bytes(5 * MIB))
ONE = array(np.zeros(1, np.float32))
MANY = record({f"k{i}": ONE for i in range(400)})
NAMES_400 = FlowerObject("ArrayRecord", (ONE,), json.dumps({f"k{i}": ONE.id for i in range(400)}).encode())
SAID = {
    "23 MB of dtype": (described("b", dtype="\u00e9" * 11_500_000), "the description of 'b': 23,000,1"),
    "a long dtype": (described("b", dtype="x" * 100), "by no short text"),
    "a long stype": (described("b", stype="x" * 100), "by no short text"),
    "a dtype that is none": (described("b", dtype=7), "by no short text"),
    "10,000 dimensions": (described("b", shape=[1] * 10_000), "a shape that no array has"),
    "a length beyond 64 bits": (described("b", shape=[10**30]), "a shape that no array has"),
    "half a length": (described("b", shape=[1.5]), "a shape that no array has"),
    "one chunk 400 times": (
        update({**THEIRS, "w": array(THEIRS["w"], chunks=[BIG], arraychunk_ids=[0] * 400)}),
        "not a .npy stream",
    ),
    "one chunk 100,000 times": (
        update({**THEIRS, "w": array(THEIRS["w"], chunks=[FlowerObject("ArrayChunk")], arraychunk_ids=[0] * 100_000)}),
        "bytes came, at most|100,000 chunks, at most",
    ),
    "one array 400 times": (reply(arrays=NAMES_400, metrics=weight(1)), "the list of arrays: |not in the model"),
    "one record 400 times": (
        FlowerObject(
            "RecordDict", (NAMES_400, weight(1)), json.dumps({f"r{i}": NAMES_400.id for i in range(400)}).encode()
        ),
        "400 ArrayRecords, one is expected",
    ),
    "a long list of records": (
        FlowerObject("RecordDict", (weight(1),), json.dumps({f"r{i}": weight(1).id for i in range(5000)}).encode()),
        "the list of records: ",
    ),
    "a long key": (update({**THEIRS, "k" * 100_000: THEIRS["b"]}), "the list of arrays: |not in the model"),
    "a million metrics": (
        reply(arrays=record(THEIRS), metrics=metrics(**{"num-examples": 1}, **{f"m{i}": 1.0 for i in range(300_000)})),
        "more than 262,144 values beside its arrays",
    ),
}


@pytest.mark.parametrize("names", [list(SAID)[i : i + 5] for i in range(0, len(SAID), 5)], ids=lambda names: names[0])
def test_a_reply_that_says_too_much_is_refused_at_once(rig: Rig, names: list[str]) -> None:
    """Before anything is built of it: memory grows by what came; the run goes on, and the mean is the others'."""
    came = sum(len(one.content) for name in names for one in SAID[name][0].all())
    play(rig, MODEL, HONEST)  # what a first round needs for good
    with peak_below(4 * came + 64 * MIB):
        round_, clients = play(rig, MODEL, HONEST, *(says(SAID[name][0]) for name in names), num_rounds=2)
    check_mean(round_, HONEST)
    said = {client.name: name for client, name in zip(clients, names, strict=False)}
    assert {said[who] for who in round_.refused} == {*names}
    for who, reason in round_.reasons.items():
        assert any(one in reason for one in SAID[said[who]][1].split("|")), (said[who], reason)


def test_a_reply_larger_than_any_is_refused_while_it_comes(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes that are sent after the refusal are not kept, and the round goes on without the reply."""
    monkeypatch.setattr(reception, "MAX_BESIDE_BYTES", MIB)
    answers: list[int] = []

    def large(client: Client, asked: Message) -> None:
        beside = [FlowerObject("ArrayChunk", body=bytes([n]) * MIB) for n in range(8)]
        announced = client.announce(asked, reply(arrays=record({"w": array(MODEL["w"], chunks=beside)}), m=weight(1)))
        for object_id in announced.missing:
            body = client.request(asked, announced, object_id)
            answers.append(client.node.caller.call("/v1/fleet/push-object", body)[0])

    round_, clients = play(rig, MODEL, HONEST, large)
    check_mean(round_, HONEST)
    assert round_.refused == {clients[0].name: "format"}
    assert "more than twice the model" in round_.reasons[clients[0].name]
    assert answers.count(413) == 1


def test_a_reply_that_is_too_large_gives_its_block_back_at_once(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """While all threads that read replies wait, maybe for that room."""
    monkeypatch.setattr(reception, "MAX_BESIDE_BYTES", MIB)
    loans: list[bool] = []
    free = threading.Event()

    def large(client: Client, asked: Message) -> None:
        beside = [FlowerObject("ArrayChunk", body=bytes([n]) * MIB) for n in range(4)]
        announced = client.announce(asked, update(THEIRS))
        assert client.push(asked, announced, chunks_of(saved(THEIRS["w"]))[0].id) == [True]
        (theirs,) = (one for one in rig.plane.rounds.registry.arriving() if one.client == client.name)
        loans.append(theirs._loan is not None)
        tree = message_pb2.ObjectTree(object_id=announced.message.id, children=announced.message.tree.children)
        tree.children.extend(one.tree for one in beside)
        again = client.announce_again(announced, tree)
        bodies = [client.request(asked, again, one.id, one.content) for one in beside]
        statuses = [client.node.caller.call("/v1/fleet/push-object", body)[0] for body in bodies]
        loans.append(theirs._loan is not None)
        assert 413 in statuses
        free.set()

    for _ in range(rounds.ASSEMBLERS):
        rig.plane.rounds._assemblers.submit(free.wait, 10)
    round_, clients = play(rig, MODEL, HONEST, large)
    assert loans == [True, False]
    assert round_.refused == {clients[0].name: "format"}


@pytest.mark.parametrize("how", ["query", "chunked", "again"])
def test_no_other_way_past_the_size_of_a_reply(rig: Rig, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """A request with a query, one whose body comes in chunks, which Flower's own route takes; a tree that grows."""
    monkeypatch.setattr(reception, "MAX_BESIDE_BYTES", MIB)
    stored: list[bool] = []

    def large(client: Client, asked: Message) -> None:
        beside = [FlowerObject("ArrayChunk", body=bytes([n]) * MIB) for n in range(8)]
        said = reply(arrays=record({"w": array(MODEL["w"], chunks=beside)}), m=weight(1))
        announced = prepare(asked, said)
        if how == "again":  # at first without what is large
            client.announce_again(announced, message_pb2.ObjectTree(object_id=announced.message.id))
        announced = client.announce_again(announced)
        for object_id in announced.missing:
            body = client.request(asked, announced, object_id)
            target = "/v1/fleet/push-object" + ("?a=1" if how == "query" else "")
            begun = head(target, headers_of(client.node), len(body))
            if how == "chunked":
                begun = begun.replace(b"content-length: %d" % len(body), b"transfer-encoding: chunked")
                body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
            with socket.create_connection((HOST, rig.port), 10) as line:
                line.sendall(begun + body)
                stored.append(
                    line.recv(2**16).endswith(message_pb2.PushObjectResponse(stored=True).SerializeToString())
                )

    round_, clients = play(rig, MODEL, HONEST, large)
    check_mean(round_, HONEST)
    assert round_.refused == {clients[0].name: "format"}
    assert "more than twice the model" in round_.reasons[clients[0].name]
    assert sum(stored) <= 3


def test_a_node_does_not_fill_the_arena() -> None:
    """With whole objects of a reply that it never completes: honest updates have their room all the same."""
    with Rig("16MiB") as rig:
        is_full = threading.Event()

        def fill(client: Client, asked: Message) -> None:
            beside = [FlowerObject("ArrayChunk", body=bytes([n]) * MIB) for n in range(20)]
            announced = client.announce(
                asked, reply(arrays=record({"w": array(MODEL["w"], chunks=beside)}), m=weight(1))
            )
            assert all(client.push(asked, announced, *(one.id for one in beside)))
            is_full.set()

        def honest(client: Client, asked: Message) -> None:
            assert is_full.wait(20)
            client.answer(asked, update(*HONEST[0]))

        round_, clients = play(rig, MODEL, [], fill, honest, honest, deadline=2.0)
        assert {one.client_id for one in round_.report.accepted} == {one.name for one in clients[1:]}
        check_mean(round_, [HONEST[0]])


@pytest.mark.parametrize("where", ["memory", "database"])
def test_a_reply_of_very_many_objects_is_refused_at_once(tmp_path: Path, where: str) -> None:
    """Nothing of it is stored, and the round ends without it."""
    with Rig("16MiB", database=str(tmp_path / "state.db") if where == "database" else None) as rig:

        def wide(client: Client, asked: Message) -> None:
            announced = prepare(asked, update(*HONEST[0]))
            tree = announced.message.tree
            tree.children.extend(message_pb2.ObjectTree(object_id=f"{n:064x}") for n in range(5000))
            assert client.announce_again(announced, tree).missing == []
            assert client.announce_again(announced, tree).missing == [], "said again"
            assert f"{7:064x}" not in rig.store

        round_, clients = play(rig, MODEL, HONEST, wide)
        check_mean(round_, HONEST)
        assert round_.refused == {clients[0].name: "format"}
        assert "objects in a reply" in round_.reasons[clients[0].name]


def test_a_stranger_does_not_push_for_another(rig: Rig) -> None:
    """Without a session, as SuperNodes did before there were any: what only another node announced stays its own."""
    is_announced, is_tried, tried = threading.Event(), threading.Event(), list[bool]()
    shared: list[tuple[int, FlowerObject]] = []

    def honest(client: Client, asked: Message) -> None:
        announced = client.announce(asked, update(*HONEST[0]))
        shared.extend((asked.metadata.run_id, announced.objects[one]) for one in announced.missing)
        is_announced.set()
        assert is_tried.wait(20)
        assert all(client.push(asked, announced))

    def stranger(client: Client, _: Message) -> None:
        assert is_announced.wait(20)
        tried.extend(client.node.push(run_id, "", one.id, one.content) for run_id, one in shared)
        is_tried.set()

    round_, clients = play(rig, MODEL, [], honest, stranger, deadline=2.0)
    assert tried
    assert not any(tried)
    assert [one.client_id for one in round_.report.accepted] == [clients[0].name]


def test_an_old_supernode_pushes_without_a_session(rig: Rig) -> None:
    """Its own reply, also when another node is about to push the same objects."""

    def old(client: Client, asked: Message) -> None:
        announced = client.announce(asked, update(*HONEST[0]))
        announced.session_id = ""
        assert all(client.push(asked, announced))

    round_, clients = play(rig, MODEL, HONEST, old)
    check_mean(round_, [*HONEST, HONEST[0]])
    assert clients[0].name in {one.client_id for one in round_.report.accepted}


def test_no_push_session_outlives_its_round(rig: Rig) -> None:
    """Replies that were announced and never came leave no session."""

    def half(client: Client, asked: Message) -> None:
        client.announce(asked, update(*HONEST[0]))

    def look(_: list[Client]) -> None:
        assert not rig.state._object_push_sessions

    play(rig, MODEL, HONEST, half, half, deadline=1.0, beside=look)


# ---------------------------------------------------------------- what an upload holds


def half_open(rig: Rig, node: Node, run_id: int, object_id: str, nbytes: int, sent: int) -> socket.socket:
    """A connection on which so much of an object has come."""
    prefix = message_pb2.PushObjectRequest(node=node.proto, run_id=run_id, object_id=object_id)
    body = prefix.SerializeToString(deterministic=True) + b"\x22" + varint(nbytes)
    line = socket.create_connection((HOST, rig.port), 10)
    begun = head("/v1/fleet/push-object", headers_of(node), len(body) + nbytes)
    line.sendall(begun + body + b"x" * sent)
    return line


def test_half_open_uploads_hold_what_has_come(rig: Rig) -> None:
    """Uploads of 60 MiB each stay half open; the round beside ends as usual, and afterwards nothing is held."""
    lines: list[Any] = []

    def attack(client: Client, asked: Message) -> None:
        run_id = asked.metadata.run_id
        ids = [hashlib.sha256(b"%d" % n).hexdigest() for n in range(60)]
        children = [message_pb2.ObjectTree(object_id=object_id) for object_id in ids]
        root = message_pb2.ObjectTree(object_id="e" * 64, children=children)
        session_id = client.rig.state.start_session(run_id)
        client.rig.state.preregister_object_tree(root, session_id)
        for object_id in ids:
            lines.append(half_open(client.rig, client.node, run_id, object_id, 60 * MIB, 100))
        client.answer(asked, update(THEIRS))

    with peak_below(48 * MIB):
        round_, _ = play(rig, MODEL, HONEST, attack, is_alone=False)
        check_mean(round_, [*HONEST, (THEIRS, 1.0)])
        assert rig.plane.gateway.spooled_bytes <= len(lines) * 2**14
    for line in lines:
        line.close()
    wait_until(lambda: rig.plane.gateway.spooled_bytes == 0)


class Announced:
    """A run with an object that is wanted, and nodes that may bring it."""

    def __init__(self, rig: Rig, nbytes: int) -> None:
        self.rig = rig
        self.content = b"ArrayChunk  %d\0" % nbytes + bytes(nbytes)
        self.object_id = hashlib.sha256(self.content).hexdigest()
        self.run_id, _ = rig.start_run()
        self.session_id = rig.state.start_session(self.run_id)
        self.nodes = [rig.node() for _ in range(2)]

    def announce(self, *object_ids: str) -> None:
        """The object, and others."""
        children = [message_pb2.ObjectTree(object_id=one) for one in (self.object_id, *object_ids)]
        root = message_pb2.ObjectTree(object_id="e" * 64, children=children)
        self.rig.state.preregister_object_tree(root, self.session_id)

    def push(self, node: Node) -> tuple[int, bytes]:
        """The object's bytes come from a node; the answer."""
        body = message_pb2.PushObjectRequest(
            node=node.proto,
            run_id=self.run_id,
            object_id=self.object_id,
            object_content=self.content,
            session_id=self.session_id,
        ).SerializeToString(deterministic=True)
        answer = call(self.rig.port, "/v1/fleet/push-object", headers_of(node), body)
        return answer.status, answer.body

    def __enter__(self) -> Announced:
        return self

    def __exit__(self, *_: object) -> None:
        for node in self.nodes:
            self.rig.state.deactivate_node(node.id)
            node.close()
        self.rig.state.stop_run(self.run_id)


def test_a_node_sends_so_much_at_once(rig: Rig) -> None:
    """A node's next object is refused until others have come; another node's is not."""
    with Announced(rig, 10 * MIB) as announced:
        others = ["a" * 64, "b" * 64]
        announced.announce(*others)
        first, second = announced.nodes
        with contextlib.ExitStack() as lines:
            for object_id in others:
                lines.enter_context(half_open(rig, first, announced.run_id, object_id, 60 * MIB, 10))
            wait_until(lambda: rig.plane.gateway.uploads == 2)
            status, said = announced.push(first)
            assert status == 503
            assert b"is sending 125,829,120 bytes already, and may send 134,217,728 at once" in said
            assert announced.push(second) == (200, STORED)
        wait_until(lambda: rig.plane.gateway.spooled_bytes == 0)
        assert rig.store.get(announced.object_id) == announced.content


def test_serverapps_hold_no_other_run_up(rig: Rig) -> None:
    """To the server all of them are one node; what each sends counts for its run."""

    def spool(run_id: int) -> Any:
        request = message_pb2.PushObjectRequest(node={"node_id": 1}, run_id=run_id)
        return rig.plane.gateway.spool_for(request, 100 * MIB, is_trusted=True)

    first, second = spool(1), spool(2)
    with pytest.raises(MemoryError, match="run 1 is sending 104,857,600 bytes already"):
        spool(1)
    for one in (first, second):
        one.drop()
    spool(1).drop()
    assert not rig.plane.gateway._budget._announced


def test_what_comes_into_spools_is_bounded(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond it an upload is read, forgotten and answered with 503; it can come again."""
    with Announced(rig, 3 * MIB) as announced:
        announced.announce()
        monkeypatch.setattr(rig.plane.gateway._budget, "_most", MIB)
        assert announced.push(announced.nodes[0]) == (503, b"too much is coming in at once: try again later")
        assert rig.plane.gateway.spooled_bytes == 0
        monkeypatch.undo()
        assert announced.push(announced.nodes[0]) == (200, STORED)
        assert rig.store.get(announced.object_id) == announced.content


def test_half_replies_hold_no_room_that_others_need(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three nodes begin a reply, which takes a block each, and stop; the arena has no more. The others are served."""
    monkeypatch.setattr(rounds, "SLOW_S", 0.2)
    model = {"w": np.zeros(2_000_000, np.float32)}
    honest = [({"w": np.full(2_000_000, n, np.float32)}, 1.0) for n in (1, 3)]
    begun: list[Any] = []

    def half(client: Client, asked: Message) -> None:
        announced = client.announce(asked, update({"w": np.full(2_000_000, 7, np.float32)}))
        large = max(announced.missing, key=lambda i: len(announced.objects[i].content))
        body = client.request(asked, announced, large)
        line = socket.create_connection((HOST, client.rig.port), 10)
        line.sendall(head("/v1/fleet/push-object", headers_of(client.node), len(body)) + body[:100_000])
        begun.append(line)

    def late(arrays: dict[str, Any]) -> Any:
        def act(client: Client, asked: Message) -> None:
            wait_until(lambda: len(begun) == 3)
            client.answer(asked, update(arrays))

        return act

    with Rig("80MiB") as rig:
        round_, _ = play(
            rig, model, [], half, half, half, *(late(one) for one, _ in honest), deadline=6.0, is_alone=False
        )
        assert len(round_.report.accepted) == 2
        check_mean(round_, honest)
        for line in begun:
            line.close()


def test_an_upload_that_loses_its_place_twice_is_whole(rig: Rig) -> None:
    """Before the loop has moved it once: it goes on beside the arena, and the reply counts."""

    def lose(client: Client, asked: Message) -> None:
        announced = client.announce(asked, update(THEIRS))
        large = chunks_of(saved(THEIRS["w"]))[0].id
        body = client.request(asked, announced, large)
        done = threading.Event()

        def twice() -> None:
            for _ in range(2):
                theirs.give_way(rig.store)
            done.set()

        with Line(rig.port) as line:
            line.send(head("/v1/fleet/push-object", headers_of(client.node), len(body)) + body[:100_000])
            (theirs,) = (one for one in rig.plane.rounds.registry.arriving() if one.client == client.name)
            wait_until(lambda: theirs._came_bytes > 50_000)
            rig.plane.long_polls.loop.call_soon_threadsafe(twice)
            assert done.wait(10)
            line.send(body[100_000:])
            assert line.answer() == (200, STORED)
        assert all(client.push(asked, announced, *(one for one in announced.missing if one != large)))

    round_, _ = play(rig, MODEL, HONEST, lose)
    check_mean(round_, [*HONEST, (THEIRS, 1.0)])


def test_uploads_of_a_round_that_is_over_hold_nothing(rig: Rig) -> None:
    """Their connections are open and still send; the arena is empty as soon as the round is over."""
    lines: list[tuple[socket.socket, bytes]] = []

    def half(client: Client, asked: Message) -> None:
        announced = client.announce(asked, update(THEIRS))
        large = max(announced.missing, key=lambda i: len(announced.objects[i].content))
        body = client.request(asked, announced, large)
        line = socket.create_connection((HOST, client.rig.port), 10)
        line.sendall(head("/v1/fleet/push-object", headers_of(client.node), len(body)) + body[:100_000])
        lines.append((line, body[100_000:]))

    def look(_: list[Client]) -> None:
        rig.settle()
        assert rig.plane.gateway.spooled_bytes == 0
        for line, rest in lines:  # what is still to come is read, and not stored
            line.sendall(rest)
            assert line.recv(1000).startswith(b"HTTP/1.1 200")
            line.close()

    round_, clients = play(rig, MODEL, HONEST, half, half, deadline=1.0, beside=look)
    check_mean(round_, HONEST)
    assert set(round_.report.late) == {client.name for client in clients}


# ---------------------------------------------------------------- who says what


@pytest.mark.parametrize("way", ["length", "chunked"])
@pytest.mark.parametrize("what", ["a message", "another's reply"])
def test_a_node_speaks_for_itself(rig: Rig, what: str, way: str) -> None:
    """Not in the SuperLink's name, and not in another node's, by whichever way the request comes."""
    taken: list[Any] = []

    def forge(client: Client, asked: Message) -> None:
        meta = asked.metadata
        if what == "a message":
            said = Message(Placeholder(update(THEIRS).id), client.node.id, "train", group_id=meta.group_id)
            proto = message_to_proto(make_message(metadata=said.metadata, content=RecordDict()))
            proto.metadata.src_node_id, proto.metadata.run_id = 1, meta.run_id
        else:
            said = Message(Placeholder(update(THEIRS).id), reply_to=asked)
            proto = message_to_proto(make_message(metadata=said.metadata, content=RecordDict()))
            proto.metadata.src_node_id = 12345
        proto.metadata.message_id = "d" * 64
        tree = message_pb2.ObjectTree(object_id="d" * 64)
        request = fleet_pb2.PushMessagesRequest(
            node=client.node.proto, messages_list=[proto], message_object_trees=[tree]
        )
        body = request.SerializeToString(deterministic=True)
        headers = headers_of(client.node)
        begun = head("/v1/fleet/push-messages", headers, len(body))
        if way == "chunked":
            length = b"content-length: %d\r\n" % len(body)
            begun = begun.replace(length, b"transfer-encoding: chunked\r\n")
            body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
        with socket.create_connection((HOST, client.rig.port), 10) as line:
            line.sendall(begun + body)
            taken.append(line.recv(100_000))
        client.answer(asked, update(THEIRS))

    round_, clients = play(rig, MODEL, HONEST, forge)
    assert not round_.refused
    assert taken[0].startswith(b"HTTP/1.1 200")
    assert b"d" * 64 not in taken[0]
    assert len(clients[0].asked) == 1, "it sent no message, to itself either"
    check_mean(round_, [*HONEST, (THEIRS, 1.0)])


EMPTY_TREES, EMPTY_CHILDREN, EMPTY_MESSAGES = b"\x1a\x00", b"\x12\x00", b"\x12\x00"


@pytest.mark.parametrize("mebibytes", [1, 3, 30, 60])
@pytest.mark.parametrize("what", ["trees", "children", "messages"])
def test_an_announcement_of_nothing_costs_nothing(rig: Rig, what: str, mebibytes: int) -> None:
    """Two bytes each, in one request: nothing is built of them, and the server answers at once."""
    node = rig.node()
    begin = fleet_pb2.PushMessagesRequest(node=node.proto).SerializeToString()
    count = mebibytes * MIB // 2 - 100
    many = {
        "trees": EMPTY_TREES * count,
        "children": b"\x1a" + varint(2 * count) + EMPTY_CHILDREN * count,
        "messages": EMPTY_MESSAGES * count,
    }[what]
    with peak_below((4 * mebibytes + 64) * MIB):
        answer = call(rig.port, "/v1/fleet/push-messages", headers_of(node), begin + many)
    assert answer.status in (200, 400, 413, 500), answer
    assert not len(rig.store)
    rig.state.deactivate_node(node.id)
    node.close()


# ---------------------------------------------------------------- reading while it goes


def test_what_is_pulled_while_it_goes_is_right_or_not_there(rig: Rig) -> None:
    """Objects are offered and withdrawn, pushed and deleted, freed memory is overwritten, while others pull them."""
    run_id, _ = rig.start_run()
    store, arena = rig.store, rig.plane.node.arena
    stop, seen = threading.Event(), Counter[str]()
    numbers, begin = bytes(range(250)) * 1200, b"ArrayChunk  300000\0"
    right = [begin + numbers, b"ArrayChunk  200000\0" + numbers[:200_000]]
    ids = [hashlib.sha256(one).hexdigest() for one in right]

    def offer() -> None:
        while not stop.is_set():
            if (block := arena.alloc(len(numbers))) is None:
                continue
            memory = memoryview(arena.buffer(block))
            memory[: len(numbers)] = numbers
            held = store.offer({ids[0]: PartContent(begin, memory[: len(numbers)])})
            del memory
            time.sleep(0.0003)
            store.withdraw(held)
            arena.reclaim(block)

    def push() -> None:
        for n in range(10**9):
            if stop.is_set():
                return
            root = hashlib.sha256(b"r%d" % n).hexdigest()
            child = message_pb2.ObjectTree(object_id=ids[1])
            store.preregister(run_id, message_pb2.ObjectTree(object_id=root, children=[child]))
            if (content := BlockContent.make(arena, len(right[1]))) is not None:
                content.view[:] = right[1]
                store.put(ids[1], Landed(content, len(right[1]), ids[1]))
                del content
                time.sleep(0.0003)
            store.delete(root)

    def scribble() -> None:
        while not stop.wait(0.002):
            taken = [block for _ in range(100) if (block := arena.alloc(65536)) is not None]
            for block in taken:
                memoryview(arena.buffer(block))[:] = b"\xee" * 65536
            for block in taken:
                arena.reclaim(block)

    def pull(which: int) -> None:
        node = rig.node()
        request = message_pb2.PullObjectRequest(node=node.proto, run_id=run_id, object_id=ids[which])
        while not stop.is_set():
            status, body = node.say("pull-object", request)
            try:
                content = message_pb2.PullObjectResponse.FromString(body).object_content
            except Exception:
                content = b"unparsable"
            kind = "right" if content == right[which] else "nothing" if not content else "wrong"
            seen[kind if status == 200 else f"status {status}"] += 1
        rig.state.deactivate_node(node.id)
        node.close()

    interval = sys.getswitchinterval()
    sys.setswitchinterval(2e-6)
    threads = [threading.Thread(target=one) for one in (offer, push, scribble)]
    threads += [threading.Thread(target=pull, args=(n % 2,)) for n in range(4)]
    try:
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + 20
        while seen["right"] < 300 and time.monotonic() < deadline:
            time.sleep(0.05)
    finally:
        stop.set()
        for thread in threads:
            thread.join(20)
        sys.setswitchinterval(interval)
    rig.state.stop_run(run_id)
    assert set(seen) <= {"right", "nothing"}, seen
    assert seen["right"] >= 300
