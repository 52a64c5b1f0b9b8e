"""A prebuilt reply is, object by object, what Flower's own classes would have made for each message."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from flwr.app import Message, RecordDict
from flwr.app.message import make_message
from flwr.app.metadata import Metadata
from flwr.proto import message_pb2, node_pb2
from flwr.supercore.date import now
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree

from lifl.bench.fleet.canned_reply import Prebuilt
from lifl.bench.fleet.virtual_node import push_request
from lifl.strategy.reference import make_reply

ARRAYS = {
    "large": np.random.default_rng(1).random((1500, 1000), np.float32),  # of two chunks
    "zeros": np.zeros((3_000, 1000), np.float32),  # two of its chunks are one object
    "count": np.array(7, np.int64),
}


def message(message_id: str) -> Message:
    """A train message to a node, as the node has it after it was polled."""
    metadata = Metadata(1, message_id, 7, 11, "", "", now().timestamp(), 3600.0, "train")
    return make_message(metadata=metadata, content=RecordDict())


@pytest.fixture(scope="module")
def prebuilt() -> Prebuilt:
    """A reply, built once."""
    return Prebuilt(ARRAYS, 5.0)


def test_it_is_what_flower_makes(prebuilt: Prebuilt) -> None:
    """Ids, bytes and the tree are those of a Message with the content in it; also for the next message."""
    for message_id in ("a" * 64, "b" * 64):
        answer = prebuilt.answer(message(message_id))
        inflated = Message.inflate(
            answer.objects[answer.tree.object_id], {prebuilt.tree.object_id: make_reply(ARRAYS, 5.0)}
        )
        assert inflated.object_id == answer.tree.object_id == answer.message.metadata.message_id
        assert get_object_tree(inflated) == answer.tree
        expected = {name: one.deflate() for name, one in get_all_nested_objects(inflated).items()}
        assert expected == answer.objects
        assert inflated.metadata.reply_to_message_id == answer.message.metadata.reply_to_message_id == message_id
        assert inflated.metadata.src_node_id == 11


def test_every_object_has_its_id_and_comes_after_its_parts(prebuilt: Prebuilt) -> None:
    """An id is the SHA-256 of the bytes; the order names each object once, the Message last."""
    answer = prebuilt.answer(message("a" * 64))
    for object_id, content in answer.objects.items():
        assert hashlib.sha256(content).hexdigest() == object_id
    assert sorted(answer.order) == sorted(answer.objects)
    seen: set[str] = set()
    for object_id in answer.order:
        children = answer.objects[object_id].partition(b"\0")[0].split(b" ")[1].decode()
        assert set(filter(None, children.split(","))) <= seen
        seen.add(object_id)
    assert answer.order[-1] == answer.tree.object_id


@pytest.mark.parametrize("length", [0, 1, 127, 128, 70_000])
def test_a_push_request_is_what_protobuf_writes(length: int) -> None:
    """The parts are together the message as it would be serialised whole."""
    node, content = node_pb2.Node(node_id=2**63 + 5), b"x" * length
    whole = message_pb2.PushObjectRequest(
        node=node, run_id=2**64 - 1, object_id="c" * 64, object_content=content, session_id="s"
    )
    parts = push_request(node, 2**64 - 1, "c" * 64, content, "s")
    # Protobuf leaves out what is empty; here it is written, with length 0: read, it is the same.
    assert message_pb2.PushObjectRequest.FromString(b"".join(parts)) == whole
    if length:
        assert b"".join(parts) == whole.SerializeToString(deterministic=True)
