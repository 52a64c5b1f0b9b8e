"""Replies pulled from a SuperLink one by one: each that cannot be used becomes an error reply, and costs no other.

Does what Flower's ``HttpGrid.pull_messages`` does, with the same client; that method raises for all replies of a
call what one of them brings about. Owns replies of which objects are still arriving. Keeps no round, looks at no array.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from logging import ERROR, WARNING
from typing import Any, cast

import attrs
from flwr.app import Error, Message, Metadata
from flwr.app.message import make_message
from flwr.common.constant import ErrorCode
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, ObjectTree
from flwr.serverapp import Grid
from flwr.supercore import log
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.superlink.grid.http_grid import HttpGrid

from lifl.errors import shortened
from lifl.strategy import extent

try:
    from flwr.proto.runtime_pb2 import PullAppMessagesRequest
    from flwr.supercore.constant import SYSTEM_MESSAGE_TYPE
    from flwr.supercore.inflatable.inflatable_protobuf_utils import make_pull_object_fn_protobuf
    from flwr.supercore.inflatable.inflatable_utils import (
        ObjectPullError,
        ObjectUnavailableError,
        inflate_object_from_contents,
        pull_objects,
    )
except ImportError as error:
    _missing: str | None = str(error)
else:
    _missing = None

MAX_OBJECTS = 250_000
"""Objects of a reply: each costs a request. Arrays and their chunks are one object each."""

SLICE_S = 5.0
"""A reply is pulled for so long before others have their turn."""

GENERATIONS = 5
"""A Message, its RecordDict, a record, an Array, its chunks."""

TOO_LARGE = 413

Pull = Callable[[list[str]], Iterator[Message]]


def puller(grid: Grid, sent_bytes: int) -> Pull:
    """A function that pulls the replies that are ready, of messages with these ids.

    A SuperLink's replies are pulled one by one, by :class:`Puller`; any other grid, and a subclass of the user's with a
    method of its own, is asked for them. `sent_bytes` is what the arrays of the largest message took.
    """
    if getattr(grid.pull_messages, "__func__", None) is not HttpGrid.pull_messages:
        return lambda ids: _each(grid.pull_messages(ids))
    if _missing is not None or not hasattr(grid, "_runtime_client") or not hasattr(grid, "node"):
        _say_once(_missing or "HttpGrid has another client")
        return lambda ids: _each(grid.pull_messages(ids))
    return Puller(cast(HttpGrid, grid), sent_bytes).pull


def _each(replies: Iterable[Message]) -> Iterator[Message]:
    """Replies, let go of one by one: each may be as large as the model."""
    came = list(replies)
    while came:
        yield came.pop(0)


@cache
def _say_once(missing: str) -> None:
    log(WARNING, "lifl: Flower pulls the replies, and a bad one can end the run, because flwr has changed: %s", missing)


class _NotYetError(Exception):
    """A reply is not complete yet: an object is not there, or its turn is over."""


@attrs.define(eq=False)
class _Arriving:
    """A reply that the SuperLink has handed over, with those of its objects that are here; `metadata` is protobuf's."""

    metadata: Any
    wanted: list[str]
    contents: dict[str, bytes] = attrs.field(factory=dict)


class Puller:
    """The replies to one exchange's messages.

    Parameters
    ----------
    grid : HttpGrid
        Flower's, of which the client, the node and the run are used.
    sent_bytes : int
        What the arrays of a message took; 0 if not known. See :func:`lifl.strategy.extent.bound_of`.
    """

    def __init__(self, grid: HttpGrid, sent_bytes: int) -> None:
        self._grid, self._client, self._run_id = grid, grid._runtime_client, grid.run.run_id
        self._sent_bytes = sent_bytes
        self._arriving: list[_Arriving] = []
        self._pull_object = make_pull_object_fn_protobuf(self._client.PullObject, grid.node, self._run_id)

    def pull(self, message_ids: list[str]) -> Iterator[Message]:
        """Those replies to messages with `message_ids` that are here now, one after another as they are asked for.

        A reply of which an object is not there yet is tried again when its message is asked for again: its client may
        be slow, or never mean to send it, and others are not to wait for that.

        Raises what the connection to the SuperLink raises, and nothing that is a reply's fault.
        """
        for arriving in self._announced(message_ids):
            reply = self._receive(arriving)
            if reply is not None:
                self._arriving.remove(arriving)
                arriving.contents.clear()
                yield reply
                del reply  # not held while the next one comes

    def _announced(self, message_ids: list[str]) -> list[_Arriving]:
        """The replies to these messages that have been announced, now or before."""
        asked = set(message_ids)
        before = [one for one in self._arriving if one.metadata.reply_to_message_id in asked]
        # The SuperLink forgets a message when it hands over the reply to it: it is never asked a second time.
        asked -= {one.metadata.reply_to_message_id for one in before}
        new = []
        if asked:
            ids = [message_id for message_id in message_ids if message_id in asked]
            try:
                said = self._client.PullMessages(PullAppMessagesRequest(message_ids=ids))
            except Exception as error:
                # As in Flower; httpx, whose error it is, is a library of Flower's and not of lifl's.
                if getattr(getattr(error, "response", None), "status_code", None) != TOO_LARGE:
                    raise
                log(ERROR, "The SuperLink finds a request for %s replies at once too large", len(ids))
                return before
            for message, tree in zip(said.messages_list, said.message_object_trees, strict=True):
                new.append(_Arriving(message.metadata, _ids_of(tree)))
        self._arriving += new
        return before + new

    def _receive(self, arriving: _Arriving) -> Message | None:
        """A reply, or the error reply in its place; None if not all of it is there yet."""
        try:
            self._fetch(arriving)
        except _NotYetError:
            return None
        except ObjectPullError as error:  # the time to send it is over, or it names what nobody has sent
            self._confirm(arriving)
            return self._error(arriving, ErrorCode.MESSAGE_UNAVAILABLE, f"the reply's objects are gone: {error}")
        self._confirm(arriving)
        return self._inflate(arriving)

    def _fetch(self, arriving: _Arriving) -> None:
        """Pulls what is not here yet, unless that is too much; raises if it has to be gone on with later."""
        end = time.monotonic() + SLICE_S

        def fetch(object_id: str) -> bytes:
            try:
                arriving.contents[object_id] = self._pull_object(object_id)
            except ObjectUnavailableError:
                raise _NotYetError from None
            if time.monotonic() > end:
                raise _NotYetError
            return b""

        for _ in range(GENERATIONS):
            if len(arriving.wanted) > MAX_OBJECTS:
                return
            absent = [object_id for object_id in arriving.wanted if object_id not in arriving.contents]
            if absent:
                pull_objects(absent, fetch)
            # A SuperLink keeps one tree of an object, that of whoever announced it first, and a client that announces
            # another's object without its children must not take them away from it. So the heads have a say too.
            named = dict.fromkeys(child for one in arriving.wanted for child in _named_by(arriving.contents[one]))
            new = [object_id for object_id in named if object_id not in arriving.contents]
            if not new:
                return
            arriving.wanted += new

    def _inflate(self, arriving: _Arriving) -> Message:
        announced, contents = arriving.metadata, arriving.contents
        try:
            if len(arriving.wanted) > MAX_OBJECTS:
                raise ValueError(f"it has {len(arriving.wanted):,} objects, at most {MAX_OBJECTS:,} are pulled")
            bound = extent.bound_of(self._sent_bytes, sum(map(len, contents.values())))
            extent.built_bytes(announced.message_id, contents, bound)
            message = cast(Message, inflate_object_from_contents(announced.message_id, contents))
            _check(message, announced)
            # Flower's own: what a message is known by is not part of its object.
            message.metadata.__dict__["_message_id"] = announced.message_id
            return message
        except Exception as error:  # whatever Flower's code raises of a client's bytes
            kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
            reason = f"the reply cannot be read: {kind}{error}"
        return self._error(arriving, ErrorCode.MOD_FAILED_PRECONDITION, reason)

    def _confirm(self, arriving: _Arriving) -> None:
        """Lets the SuperLink delete the reply's objects."""
        message_id = arriving.metadata.message_id
        self._client.ConfirmMessageReceived(
            ConfirmMessageReceivedRequest(node=self._grid.node, run_id=self._run_id, message_object_id=message_id)
        )

    def _error(self, arriving: _Arriving, code: int, reason: str) -> Message:
        """An error reply that answers what the announced one answers, of the same node."""
        announced = arriving.metadata
        metadata = Metadata(
            run_id=self._run_id,
            message_id=announced.message_id,
            src_node_id=announced.src_node_id,
            dst_node_id=announced.dst_node_id,
            reply_to_message_id=announced.reply_to_message_id,
            group_id=announced.group_id,
            created_at=announced.created_at,
            ttl=announced.ttl,
            message_type=SYSTEM_MESSAGE_TYPE,
        )
        # The reason may quote the client, which must not forge lines in a log, nor write what cannot be encoded.
        plain = shortened(reason).encode("unicode_escape").decode("ascii")
        return make_message(metadata=metadata, error=Error(code, shortened(plain)))


def _ids_of(tree: ObjectTree) -> list[str]:
    """The ids in a tree, each once however often it is named."""
    return list(dict.fromkeys(one.object_id for one in iterate_object_tree(tree)))


def _named_by(content: bytes) -> list[str]:
    """The children that an object's head names; none if it is no head, which is refused later."""
    try:
        return extent.children_of(content, MAX_OBJECTS)
    except ValueError:
        return []


def _check(message: Message, announced: Any) -> None:
    """Raises ``ValueError`` if an inflated message is not the one that was announced."""
    for name in ("run_id", "reply_to_message_id", "src_node_id", "dst_node_id"):
        said, expected = getattr(message.metadata, name), getattr(announced, name)
        if said != expected:
            raise ValueError(f"its metadata say {name} {said!r}, {expected!r} was announced")
