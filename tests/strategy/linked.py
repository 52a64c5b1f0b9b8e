"""A SuperLink's Runtime API without a server, for Flower's HttpGrid: replies of objects that a test makes by hand."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import attrs
from flower_objects import FlowerObject, metrics, reply, update
from flwr.proto import message_pb2, runtime_pb2
from flwr.proto.error_pb2 import Error as ErrorProto
from flwr.proto.node_pb2 import NodeInfo
from flwr.supercore.run import Run
from flwr.superlink.grid.http_grid import HttpGrid

RUN_ID = 1
NOT_YET = b""


@attrs.define
class Answer:
    """A reply as a SuperLink has it: announced metadata, a tree of ids, contents; NOT_YET for what is on its way."""

    metadata: Any
    tree: Any
    contents: dict[str, bytes]


Client = Callable[[Any], "Answer | None"]
"""A function of the metadata of the message that it gets; None: no answer ever."""


def metadata_of(asked: Any, **changed: Any) -> Any:
    """The metadata of a reply to a message with metadata `asked`."""
    right = {
        "run_id": asked.run_id,
        "src_node_id": asked.dst_node_id,
        "dst_node_id": asked.src_node_id,
        "reply_to_message_id": asked.message_id,
        "group_id": asked.group_id,
        "ttl": 100.0,
        "created_at": time.time(),
        "message_type": asked.message_type,
    }
    return message_pb2.Metadata(**{**right, **changed})


def message_of(asked: Any, *contents: FlowerObject, error: str | None = None, **changed: Any) -> FlowerObject:
    """A Message object: its metadata may be `changed`, and it may have any number of contents."""
    said = None if error is None else ErrorProto(code=1, reason=error)
    body = message_pb2.Message(metadata=metadata_of(asked, **changed), error=said)
    return FlowerObject("Message", contents, body.SerializeToString(deterministic=True))


def announced(asked: Any, message: FlowerObject, more: Mapping[str, bytes] | None = None, tree: Any = None) -> Answer:
    """A reply of these objects, rightly announced; `more` are contents in the place of the right ones."""
    contents = {thing.id: thing.content for thing in message.all()}
    return Answer(metadata_of(asked, message_id=message.id), tree or message.tree, {**contents, **(more or {})})


def says(content: FlowerObject) -> Client:
    """A client that says the same to every message."""
    return lambda asked: announced(asked, message_of(asked, content))


def honest(arrays: Mapping[str, Any], examples: int, loss: float = 0.5) -> Client:
    """A client that answers training with its arrays, and everything else with metrics."""

    def client(asked: Any) -> Answer:
        if asked.message_type.startswith("train"):
            content = update(arrays, examples)
        else:
            content = reply(metrics=metrics(**{"num-examples": examples, "loss": loss}))
        return announced(asked, message_of(asked, content))

    return client


class Link:
    """The client of the Runtime API that a grid has; ``calls`` counts requests, ``confirmed`` are ids of replies.

    As Flower's SuperLink does, it forgets a message when it hands over the reply to it, and answers whoever asks for
    it again with an error.
    """

    def __init__(self, clients: Mapping[int, Client]) -> None:
        self.clients = dict(clients)
        self.answers: dict[str, Answer] = {}
        self.contents: dict[str, bytes] = {}
        self.calls: dict[str, int] = {}
        self.confirmed: list[str] = []
        self.asked: dict[str, Any] = {}

    def grid(self) -> HttpGrid:
        """Flower's grid over it."""
        grid = HttpGrid(token="none")
        grid.set_run(Run.create_empty(RUN_ID))
        grid._client = self  # type: ignore[assignment]
        return grid

    def GetNodes(self, _: Any) -> Any:
        """All nodes."""
        return runtime_pb2.GetNodesResponse(nodes=[NodeInfo(node_id=node_id) for node_id in self.clients])

    def PushMessages(self, request: Any) -> Any:
        """Asks each client at once."""
        for message in request.messages_list:
            self.asked[message.metadata.message_id] = message.metadata
            answer = self.clients[message.metadata.dst_node_id](message.metadata)
            if answer is not None:
                self.answers[message.metadata.message_id] = answer
        return runtime_pb2.PushAppMessagesResponse(message_ids=[m.metadata.message_id for m in request.messages_list])

    def PushObject(self, request: Any) -> Any:
        """Never asked for: PushMessages says that every object is there."""
        raise NotImplementedError(request.object_id)

    def PullMessages(self, request: Any) -> Any:
        """The answers that are there, each once."""
        self._count("PullMessages")
        response = runtime_pb2.PullAppMessagesResponse()
        for message_id in request.message_ids:
            if message_id not in self.asked:
                raise LookupError(f"message {message_id} is asked for again, of which the reply was handed over")
            if answer := self.answers.pop(message_id, None):
                del self.asked[message_id]
                self.contents |= answer.contents
                response.messages_list.append(message_pb2.Message(metadata=answer.metadata))
                response.message_object_trees.append(answer.tree)
        return response

    def PullObject(self, request: Any) -> Any:
        """Answers the pull of an object."""
        self._count("PullObject")
        content = self.contents.get(request.object_id)
        return message_pb2.PullObjectResponse(
            object_found=content is not None, object_available=bool(content), object_content=content or b""
        )

    def ConfirmMessageReceived(self, request: Any) -> Any:
        """Notes it."""
        self.confirmed.append(request.message_object_id)
        return message_pb2.ConfirmMessageReceivedResponse()

    def _count(self, name: str) -> None:
        self.calls[name] = self.calls.get(name, 0) + 1
