"""Whole replies that are a little wrong, many at a time: each costs its own node the round, and nobody else anything.

A right reply's objects and its announced tree are changed at random; nodes push what they made in a random order, some
of it never, some wrong first. A round of many of them and two honest nodes ends with the exact mean of the honest ones
and of those mutants that the report has as accepted, which a slow reader must be able to read as right replies.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from random import Random
from typing import Any

import attrs
import numpy as np
import pytest
from flower_objects import FlowerObject, array, metrics, record, saved, weight
from flwr.app import Message
from flwr.proto import message_pb2
from rig import Rig
from scripted_clients import Client, check_mean, play, prepare

ROUNDS, BAD = 2, 16
SEEDS = range(3)

MODEL = {
    "w": np.zeros((60, 500), np.float32),
    "b": np.zeros(5, np.float32),
    "scale": np.zeros((), np.float32),
    "bn1.count": np.zeros((), np.int64),
    "bn2.count": np.zeros((), np.int64),
    "none": np.zeros((0, 3), np.float32),
}


def numbers(seed: int) -> dict[str, Any]:
    """Some update."""
    random = np.random.default_rng(seed)
    return {n: random.integers(0, 9, one.shape).astype(one.dtype) for n, one in MODEL.items()}


HONEST = [(numbers(1), 1.0), (numbers(2), 3.0)]


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    """A server for all replies."""
    with Rig("32MiB") as made:
        yield made


# ---------------------------------------------------------------- what is changed

JUNK: list[Any] = [None, True, 0, -1, 2**70, 1.5, "", "x" * 300, [], {}, [[]], {"a": 1}, "\ud800", "e" * 64, ["e" * 64]]


def changed_json(random: Random, body: bytes) -> bytes:
    """A body of JSON with a value, a key, a byte or its end changed."""
    said = json.loads(body)
    keys = list(said)
    step = random.randrange(7)
    if step == 0 and keys:
        said[random.choice(keys)] = random.choice(JUNK)
    elif step == 1 and keys:
        del said[random.choice(keys)]
    elif step == 2:
        said[random.choice(["", "more", "k" * 50, "w", "dtype", "\u00e9"])] = random.choice([*said.values(), *JUNK])
    elif step == 3 and len(keys) > 1:
        first, second = random.sample(keys, 2)
        said[first], said[second] = said[second], said[first]
    elif step == 4:
        return body[: random.randrange(len(body) + 1)]
    elif step == 5 and body:
        at = random.randrange(len(body))
        return body[:at] + bytes([random.randrange(256)]) + body[at + 1 :]
    else:
        return random.choice([b"", b"[]", b"null", b"7", b"[" * 9_000, b'"x"', b"\xff" * 9])
    return json.dumps(said).encode()


def changed(random: Random, one: FlowerObject) -> FlowerObject:
    """An object with its kind, its children or its body changed."""
    step = random.randrange(6)
    if step == 0:
        kinds = ["ArrayChunk", "Array", "ArrayRecord", "MetricRecord", "ConfigRecord", "RecordDict", "Message", "Error"]
        return attrs.evolve(one, kind=random.choice(kinds))
    if step == 1 and one.children:
        kept = random.sample(one.children, random.randrange(len(one.children)))
        return attrs.evolve(one, children=tuple(kept))
    if step == 2:
        return attrs.evolve(one, children=(*one.children, FlowerObject("ArrayChunk", body=random.randbytes(9))))
    if one.kind in ("RecordDict", "ArrayRecord", "Array"):
        return attrs.evolve(one, body=changed_json(random, one.body))
    body = bytearray(one.body or b"x")
    for _ in range(random.choice([1, 1, 5])):
        body[random.randrange(min(len(body), 200))] = random.randrange(256)
    return attrs.evolve(one, body=bytes(body[: random.choice([len(body), random.randrange(len(body) + 1)])]))


def replaced(one: FlowerObject, old: FlowerObject, new: FlowerObject) -> FlowerObject:
    """A tree with one object replaced, and the ids that name it, so that all hashes are right again."""
    if one is old:
        return new
    children = tuple(replaced(child, old, new) for child in one.children)
    body = one.body
    for before, after in zip(one.children, children, strict=True):
        if one.kind != "Array":
            body = body.replace(before.id.encode(), after.id.encode())
    return attrs.evolve(one, children=children, body=body)


def mutant(random: Random, right: FlowerObject) -> FlowerObject:
    """A right reply with one, two or three objects changed."""
    made = right
    for _ in range(random.choice([1, 1, 1, 2, 3])):
        old = random.choice(made.all())
        made = replaced(made, old, changed(random, old))
    return made


def tree_of(random: Random, tree: Any) -> Any:
    """The tree that is announced: mostly the reply's, else one that lies."""
    step = random.random()
    if step < 0.8:
        return tree
    lying = message_pb2.ObjectTree.FromString(tree.SerializeToString())
    nodes, waiting = [], [lying]
    while waiting:
        nodes.append(waiting.pop())
        waiting.extend(nodes[-1].children)
    node, other = random.choice(nodes), random.choice(nodes)
    if step < 0.87:
        node.ClearField("children")
    elif step < 0.94:
        node.children.add().object_id = other.object_id
    else:
        node.object_id = random.choice(["e" * 64, other.object_id])
    return lying


class Bad:
    """A node that replies with a mutant, or sometimes with a right reply."""

    def __init__(self, random: Random, seed: int) -> None:
        self.random, self.arrays = random, numbers(seed)
        made = {name: array(one) for name, one in self.arrays.items()}
        names = list(made)
        random.shuffle(names)
        beside = random.choice([weight(2), metrics(**{"num-examples": 2, "loss": 0.5, "many": [1, 2]})])
        arrays = record({name: made[name] for name in names})
        body = json.dumps({"arrays": arrays.id, "metrics": beside.id}).encode()
        right = FlowerObject("RecordDict", (arrays, beside), body)
        self.said = right if random.random() < 0.15 else mutant(random, right)

    def __call__(self, client: Client, asked: Message) -> None:
        """Announces it and pushes what it is asked for."""
        random = self.random
        announced = prepare(asked, self.said)
        try:
            announced = client.announce_again(announced, tree_of(random, announced.message.tree))
        except AssertionError:  # the server refused what is no tree
            return
        missing = [one for one in announced.missing if one in announced.objects]
        random.shuffle(missing)
        for object_id in missing:
            if random.random() < 0.01:
                continue
            wrong = random.random() < 0.03
            content = announced.objects[object_id].content
            for sent in ([content[:-1] + b"?"] if wrong else []) + [content]:
                body = client.request(asked, announced, object_id, sent)
                client.node.caller.call("/v1/fleet/push-object", body)


@pytest.mark.ladder
@pytest.mark.parametrize("seed", SEEDS)
def test_a_wrong_reply_costs_its_own_node_and_nobody_else(rig: Rig, seed: int) -> None:
    """Rounds of mutants end with the exact mean of those that count, and nothing is left of any."""
    accepted = refused = 0
    for number in range(ROUNDS):
        random = Random(f"{seed} {number}")
        bad = [Bad(random, 100 * number + n) for n in range(BAD)]
        round_, clients = play(rig, MODEL, HONEST, *bad, deadline=2.0)
        names = {one.client_id for one in round_.report.accepted}
        counted = [one for client, one in zip(clients, bad, strict=False) if client.name in names]
        weights = {one.client_id: one.weight for one in round_.report.accepted}
        said = [(read(one.said), weights[c.name]) for c, one in zip(clients, bad, strict=False) if c.name in names]
        check_mean(round_, [*HONEST, *said])
        accepted, refused = accepted + len(counted), refused + len(round_.refused)
    assert accepted > 0
    assert refused > 5


def read(said: FlowerObject) -> dict[str, Any]:
    """The arrays of a reply by name, read by NumPy; fails if it is no right reply."""
    objects = {one.id: one for one in said.all()}
    (arrays,) = [objects[i] for i in json.loads(said.body).values() if objects[i].kind == "ArrayRecord"]
    found = {}
    for name, object_id in json.loads(arrays.body).items():
        one = objects[object_id]
        chunks = list({chunk.id: chunk for chunk in one.children}.values())
        stream = b"".join(chunks[i].body for i in json.loads(one.body)["arraychunk_ids"])
        found[name] = np.load(io.BytesIO(stream), allow_pickle=False)
        assert len(saved(found[name])) == len(stream)
    assert found.keys() == MODEL.keys()
    assert all(found[n].shape == m.shape and found[n].dtype == m.dtype for n, m in MODEL.items())
    return found
