"""A reply that is made once and sent many times: Flower's objects, deflated, with their ids.

Owns the objects below the Message; the Message itself is new each time, because it names the message that it answers.
"""

from __future__ import annotations

from collections.abc import Mapping

import attrs
from flwr.app import Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_to_proto
from flwr.proto import message_pb2
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)

from lifl.strategy.reference import make_reply
from lifl.tensor import Array


class Placeholder(RecordDict):
    """A stand-in for the content of a Message, when only the content's id is needed."""

    def __init__(self, object_id: str) -> None:
        super().__init__()
        self.__dict__["_placeholder_id"] = object_id

    @property
    def object_id(self) -> str:
        """The id of the content in whose place this object stands."""
        return str(self.__dict__["_placeholder_id"])


@attrs.frozen
class Answer:
    """A reply to one message, ready to be pushed: as a message without content, and as objects.

    Attributes
    ----------
    order : list of str
        The ids of all objects, each after its children.
    """

    message: message_pb2.Message
    tree: message_pb2.ObjectTree
    order: list[str]
    objects: dict[str, bytes]


class Prebuilt:
    """The content of a node's replies: arrays and their weight, as Flower's ClientApp would return them.

    Copies the arrays.
    """

    def __init__(self, arrays: Mapping[str, Array], weight: float) -> None:
        content = make_reply(arrays, weight)
        with no_object_id_recompute():
            self.tree = get_object_tree(content)
            self.objects = {name: one.deflate() for name, one in get_all_nested_objects(content).items()}
        self._order = list(dict.fromkeys(node.object_id for node in iterate_object_tree(self.tree)))

    def answer(self, message: Message) -> Answer:
        """The reply to a message; only the Message object is new."""
        reply = Message(Placeholder(self.tree.object_id), reply_to=message)
        deflated, reply_id = reply.deflate(), reply.object_id
        reply.metadata.__dict__["_message_id"] = reply_id  # private in flwr; the SuperNode sets it in this way too
        return Answer(
            message_to_proto(remove_content_from_message(reply)),
            message_pb2.ObjectTree(object_id=reply_id, children=[self.tree]),
            [*self._order, reply_id],
            self.objects | {reply_id: deflated},
        )
