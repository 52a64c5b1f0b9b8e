"""The content invariant: whatever can be read under an object's id is, at every moment, what was hashed to that id.

Replies are announced, pushed in pieces, given up, pushed again and settled in orders that a seed chooses, several at a
time, by clients that name keys and chunks in other orders than the model, share arrays and announce other objects than
their messages have. After every step every object of the store is hashed again. In the end the mean is that of what the
replies say by name, computed by a slow reference, and who cannot be read is refused.
"""

from __future__ import annotations

import hashlib
import io
import json
import threading
from collections.abc import Iterator
from random import Random
from typing import Any

import attrs
import numpy as np
import pytest
from flower_objects import NUMPY, FlowerObject, chunks_of, record, reply, saved, weight
from flwr.app import RecordDict
from flwr.app.message import make_message
from flwr.app.metadata import Metadata
from flwr.proto.message_pb2 import ObjectTree

import lifl
from lifl.superlink.http.targets import Sink, Spool, SpoolBudget
from lifl.superlink.http.upload import Target
from lifl.superlink.rounds.chunk_map import Geometry
from lifl.superlink.rounds.incoming_reply import Reception, Settled
from lifl.superlink.rounds.model_objects import recognise
from lifl.superlink.store.store import ArenaStore

CASES = 240
CHUNK_BYTES = 160  # a header is 128 bytes long: the small arrays have two chunks, the others more
RUN = 1
UNIT = 65536

MODEL = {
    "a": np.zeros(40, np.float32),
    "b": np.zeros(40, np.float32),
    "c": np.zeros((4, 10), np.float32),
    "bn1.count": np.zeros((), np.int64),
    "bn2.count": np.zeros((), np.int64),
    "d": np.zeros(8, np.float64),
    "e": np.zeros(8, np.float64),
}
SPEC = lifl.TensorSpec.from_arrays(MODEL)


@pytest.fixture(scope="module")
def node() -> Iterator[lifl.Node]:
    """It folds in this process, and overwrites what is freed."""
    with lifl.Node("2MiB", workers=0, debug=True) as made:
        yield made


# ---------------------------------------------------------------- replies


def cut(numbers: Any, order: list[int] | None = None, *, turned: bool = False) -> FlowerObject:
    """An Array in small chunks, which it names in an order; `turned` has them below it in that order too."""
    chunks = chunks_of(saved(numbers), CHUNK_BYTES)
    unique = list(dict.fromkeys(chunks))
    named = [unique.index(chunk) for chunk in chunks]
    named = [named[i] for i in order] if order is not None else named
    if turned:
        unique = list(dict.fromkeys(unique[i] for i in named))
        named = list(range(len(unique)))
    said = {"dtype": str(numbers.dtype), "shape": list(numbers.shape), "stype": NUMPY, "arraychunk_ids": named}
    return FlowerObject("Array", tuple(unique), json.dumps(said).encode())


POOL = [0, 1, 2, 3]
"""Arrays are full of one of few numbers, so that many are equal, or are counted up from it, so that few are."""


def make_reply(random: Random) -> FlowerObject:
    """A reply whose arrays are the model's or nearly so."""
    arrays: dict[str, FlowerObject] = {}
    names = list(MODEL)
    if random.random() < 0.3:
        random.shuffle(names)
    for name in names:
        like = MODEL[name]
        numbers = np.full(like.shape, random.choice(POOL), like.dtype)
        if like.size > 1 and random.random() < 0.6:
            numbers = (np.arange(like.size) + random.choice(POOL)).reshape(like.shape).astype(like.dtype)
        order = None
        if like.size > 1 and random.random() < 0.05:  # behind the header, so that it can be read all the same
            count = len(chunks_of(saved(numbers), CHUNK_BYTES))
            order = [0, *random.sample(range(1, count), count - 1)]
        arrays[name] = cut(numbers, order, turned=random.random() < 0.5)
    if random.random() < 0.05:
        arrays[random.choice(names)] = cut(np.ones(3, np.float32))
    if random.random() < 0.05:
        arrays["more"] = cut(np.ones(3, np.float32))
    if random.random() < 0.1 and len({*MODEL} & {*arrays}) > 1:
        first, second = random.sample(names, 2)
        arrays[first], arrays[second] = arrays[second], arrays[first]
    return reply(arrays=record(arrays), metrics=weight(1))


def said_by(store: ArenaStore, said: FlowerObject) -> dict[str, Any] | None:
    """The contents of a reply by name, read from the store's bytes in the slowest way; None if it does not count."""
    objects = {one.id: one for one in said.all()}

    def there(one: FlowerObject) -> bool:
        return store.get(one.id) == one.content

    if not all(there(one) for one in objects.values()):
        return None
    arrays = {}
    for name, array_id in json.loads(said.children[0].body).items():
        array = objects[array_id]
        chunks = list(dict.fromkeys(array.children))
        stream = b"".join(chunks[i].body for i in json.loads(array.body)["arraychunk_ids"])
        try:
            arrays[name] = np.load(io.BytesIO(stream), allow_pickle=False)
        except ValueError:
            return None
        if len(stream) != len(saved(arrays[name])):
            return None
    if arrays.keys() != MODEL.keys():
        return None
    if any(arrays[n].shape != m.shape or not np.can_cast(arrays[n].dtype, m.dtype) for n, m in MODEL.items()):
        return None
    return arrays


# ---------------------------------------------------------------- a server without a network


@attrs.define(eq=False)
class Push:
    """An object on its way: what has been written of it, and where."""

    object_id: str
    content: bytes
    target: Target
    pieces: list[Any]
    at: int = 0
    revoked: bool | None = None  # its place is given up: with True, what has come is kept

    def write(self, nbytes: int) -> None:
        """Some more of it comes."""
        end, begin = min(self.at + nbytes, len(self.content)), 0
        for piece in self.pieces:
            low, high = max(self.at, begin), min(end, begin + len(piece))
            if low < high:
                piece[low - begin : high - begin] = self.content[low:high]
            begin += len(piece)
        self.at = end


@attrs.define(eq=False)
class Client:
    """A client: the contents of its message, its announcement, and its reply at the server."""

    said: FlowerObject
    message: FlowerObject
    objects: dict[str, FlowerObject]
    reception: Reception
    missing: set[str]
    pushes: list[Push] = attrs.field(factory=list)
    settled: Settled | None = None


class Desk:
    """The steps of the gateway and the rounds with replies, one after another."""

    def __init__(self, node: lifl.Node, geometry: Geometry) -> None:
        self.node, self.geometry, self.store = node, geometry, ArenaStore()
        self.budget = SpoolBudget(2**30, 2**30)
        self.round = node.open_round(SPEC, expected=100, commit_every=1, shape=lifl.Shape(leaves=1, shards=0))
        self.clients: list[Client] = []

    def announce(self, node_id: int, said: FlowerObject, announced: FlowerObject) -> None:
        """A client says that `announced` will come, and its message has `said`."""
        message = FlowerObject("Message", (said,), b"%d" % node_id)
        tree = ObjectTree(object_id=message.id, children=[announced.tree])
        recognised = recognise(self.geometry, tree, node_id)
        held = self.store.offer(recognised.objects)
        missing = set(self.store.preregister(RUN, tree))
        self.store.withdraw(held)
        meta = Metadata(RUN, message.id, node_id, 1, "asked", "1", 1e9, 1e9, "train")
        metadata = make_message(metadata=meta, content=RecordDict())
        reception = Reception(
            self.round, self.geometry, "num-examples", str(node_id), metadata, tree, missing, recognised.form
        )
        objects = {one.id: one for one in (*said.all(), *announced.all(), message)}
        self.clients.append(Client(said, message, objects, reception, missing))

    def begin(self, client: Client, object_id: str, *, is_wrong: bool = False) -> None:
        """An object begins to come, if it is wanted; or something else of its length."""
        content = client.objects[object_id].content
        if is_wrong:
            content = content[:-8] + bytes(8)
        if not self.store.is_wanted(object_id):
            return
        target: Any = client.reception.place(object_id, len(content))
        if target is None:
            assert self.budget.announce("one", len(content)) is None
            target = Spool(self.node.arena, self.budget, "one", len(content), lambda: None)
        push = Push(object_id, content, target, [p for p in target.pieces() if len(p)])
        target.watch(lambda keeps: setattr(push, "revoked", keeps))
        client.pushes.append(push)

    def move(self, push: Push) -> None:
        """An upload whose place is given up goes on elsewhere, some time later."""
        if push.revoked:
            target: Any = Spool(self.node.arena, self.budget, "one", len(push.content), lambda: None)
            assert self.budget.announce("one", len(push.content)) is None
        else:
            target = Sink(len(push.content))
        came = b"".join(push.pieces)[: push.at]
        push.target.drop()
        push.target, push.at, push.revoked = target, 0, None
        push.pieces = [bytearray(len(push.content))] if isinstance(target, Sink) else list(target.pieces())
        content, push.content = push.content, came + push.content[len(came) :]
        push.write(len(came))
        push.content = content

    def end(self, client: Client, push: Push) -> None:
        """All of an object has come; it is stored if its hash is right."""
        client.pushes.remove(push)
        landed = push.target.landed(hashlib.sha256(push.content).hexdigest())
        try:
            self.store.put(push.object_id, landed)
        except Exception:  # it has gone meanwhile, or it is something else
            landed.drop()
        else:
            client.missing.discard(push.object_id)

    def drop(self, client: Client, push: Push) -> None:
        """Its connection is gone."""
        client.pushes.remove(push)
        push.target.drop()

    def settle(self, client: Client) -> None:
        """A reply is complete."""

        def release() -> None:
            for push in client.pushes:  # what is on its way goes on, also between the check and the fold
                push.write(10_000)
            for root in client.reception.roots:
                self.store.delete(root)
            self.store.keep(client.reception.object_ids)

        client.settled = client.reception.settle(self.store, release)
        release()
        self.overwrite()
        self.check()

    def overwrite(self) -> None:
        """Writes over all of the arena that is free."""
        taken = []
        while (block := self.node.arena.alloc(UNIT)) is not None:
            taken.append(block)
            memoryview(self.node.arena.buffer(block))[:] = b"\xee" * UNIT
        for block in taken:
            self.node.arena.reclaim(block)

    def is_complete(self, client: Client) -> bool:
        """All that was missing has come, from whomever."""
        return not any(self.store.is_wanted(i) for i in client.missing)

    def check(self) -> None:
        """The invariant, over all objects."""
        for object_id, entry in self.store._entries.items():
            if entry.content is not None:
                assert hashlib.sha256(bytes(entry.content)).hexdigest() == object_id

    def close(self) -> None:
        """Ends what is under way."""
        for client in self.clients:
            for push in list(client.pushes):
                self.drop(client, push)
            client.reception.drop()
        self.store.close()
        self.round.close()


def play(desk: Desk, random: Random) -> None:
    """Several clients at once, a step of one or another at a time."""
    replies = [make_reply(random) for _ in range(random.randint(1, 3))]
    for node_id, said in enumerate(replies, 2):
        announced = make_reply(random) if random.random() < 0.15 else said
        desk.announce(node_id, said, announced)
    exact = {name: np.zeros(one.shape) for name, one in MODEL.items()}
    counted: set[str] = set()
    for _ in range(3000):
        open_ = [client for client in desk.clients if client.settled is None]
        if not open_:
            break
        client = random.choice(open_)
        under_way = {push.object_id for push in client.pushes}
        wanted = [i for i in client.objects if desk.store.is_wanted(i)]
        waiting = [i for i in wanted if i not in under_way]
        step = random.random()
        if step < 0.01:
            client.reception.give_way(desk.store)
        elif step < 0.03 and client.pushes:
            desk.drop(client, random.choice(client.pushes))
        elif step < 0.06 and under_way:  # the same object once more, on another connection
            desk.begin(client, random.choice(sorted(under_way)), is_wrong=random.random() < 0.5)
        elif step < 0.4 and waiting:
            desk.begin(client, random.choice(waiting), is_wrong=random.random() < 0.02)
        elif client.pushes:
            push = random.choice(client.pushes)
            if push.revoked is not None and random.random() < 0.7:
                desk.move(push)
            elif push.at < len(push.content):
                push.write(random.choice([1, 100, 10_000]))
            else:
                desk.end(client, push)
        elif waiting and not desk.is_complete(client):
            desk.begin(client, random.choice(waiting))
        if client.settled is None and desk.is_complete(client) and (not waiting or random.random() < 0.1):
            is_there = desk.store.get(client.message.id) == client.message.content
            said = said_by(desk.store, client.said) if is_there else None
            desk.settle(client)
            assert client.settled is not None
            assert (client.settled.refusal is None) == (said is not None), client.settled.refusal
            if said is not None:
                counted.add(client.reception.client)
                for name, one in said.items():
                    exact[name] += one
        late = [one for one in desk.clients if one.settled is not None and one.pushes]
        if late and random.random() < 0.2:  # a connection that goes on when its reply is settled
            client = random.choice(late)
            push = random.choice(client.pushes)
            if push.at < len(push.content):
                push.write(10_000)
            else:
                desk.end(client, push)
        if random.random() < 0.3:
            desk.check()
    if counted:
        desk.round.close_early()
        result = desk.round.result(timeout=10)
        assert {one.client_id for one in result.report.accepted} == counted
        for name, one in exact.items():
            mean = one / len(counted)
            mean = np.rint(mean) if MODEL[name].dtype.kind == "i" else mean
            np.testing.assert_allclose(result.arrays[name], mean, rtol=1e-6)
        del result
    desk.check()


@pytest.mark.parametrize("first", range(0, CASES, CASES // 4))
def test_an_ids_bytes_are_its_bytes(node: lifl.Node, first: int) -> None:
    """At every moment, in any order of work; and the mean is that of what the replies say."""
    for seed in range(first, first + CASES // 4):
        random, geometry = Random(seed), Geometry(SPEC, CHUNK_BYTES)
        for _ in range(2):  # the second round's replies come to a server that has been taught, and to used blocks
            desk = Desk(node, geometry)
            try:
                play(desk, random)
            except BaseException:
                print(f"seed {seed}")
                raise
            finally:
                desk.close()
        assert node.used_bytes == 0


def test_a_block_that_others_wait_for_stays_while_its_update_is_completed(node: lifl.Node) -> None:
    """A slow reply is to give its block back, and comes whole in the same moment."""
    desk, ready, go = Desk(node, Geometry(SPEC, CHUNK_BYTES)), threading.Event(), threading.Event()
    said = reply(arrays=record({name: cut(one) for name, one in MODEL.items()}), metrics=weight(1))
    desk.announce(2, said, said)
    (client,) = desk.clients
    for object_id in sorted(client.missing):
        desk.begin(client, object_id)
        client.pushes[0].write(10_000)
        desk.end(client, client.pushes[0])
    store = desk.store

    class Slow:
        """The store, as somebody sees it who keeps the contents of a block when the update is being completed."""

        def keep(self, object_ids: Any) -> None:
            ready.set()
            assert go.wait(10)
            store.keep(object_ids)

    class Completing:
        """The store, as somebody sees it who completes the update while the block is given back."""

        def peek_at(self, object_id: str) -> Any:
            if not go.is_set():
                go.set()
                thread.join(10)
            return store.peek_at(object_id)

        def __getattr__(self, name: str) -> Any:
            return getattr(store, name)

    slow: Any = Slow()
    thread = threading.Thread(target=client.reception.give_way, args=(slow,))
    thread.start()
    assert ready.wait(10)
    completing: Any = Completing()
    desk.store = completing
    desk.settle(client)
    desk.store = store
    assert client.settled is not None
    assert client.settled.refusal is None
    desk.round.close_early()
    assert desk.round.result(timeout=10).num_updates == 1
    desk.close()


def test_the_game_is_played() -> None:
    """Some random replies count and some do not, so that both are tested."""
    store = ArenaStore()
    said = [make_reply(Random(seed)) for seed in range(200)]
    for one in said:
        store.preregister(RUN, one.tree)
        for each in one.all():
            store.put(each.id, each.content)
    counted = sum(said_by(store, one) is not None for one in said)
    assert 100 < counted < 190
