"""Replies pulled from a SuperLink one by one; a reply that cannot be used becomes an error reply and harms no other.

Does the work of Flower's ``HttpGrid.pull_messages``, with the same HTTP client; in that method an error of one reply
is raised for all replies of the call. Owns the replies whose objects are still arriving; knows no round.
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
"""Limit for the objects of a reply, each of which costs a request. Each Array and each chunk is one object."""

SLICE_S = 5.0
"""Seconds for which one reply is pulled before the next one has its turn."""

GENERATIONS = 5
"""Levels of a reply's tree of objects: Message, RecordDict, record, Array, chunk."""

TOO_LARGE = 413

Pull = Callable[[list[str]], Iterator[Message]]


def puller(grid: Grid, sent_bytes: int) -> Pull:
    """A function that pulls those replies to the messages with given ids that are ready.

    Replies of Flower's HttpGrid are pulled one by one, by :class:`Puller`; of any other grid, and of a user's subclass
    with its own `pull_messages`, that method is called. `sent_bytes` is the size of the arrays in the largest message.
    """
    if getattr(grid.pull_messages, "__func__", None) is not HttpGrid.pull_messages:
        return lambda ids: _each(grid.pull_messages(ids))
    # `_runtime_client` is private in flwr 1.42. Without it Flower's own method is used, and a warning says so.
    if _missing is not None or not hasattr(grid, "_runtime_client") or not hasattr(grid, "node"):
        _warn_once(_missing or "HttpGrid has another client")
        return lambda ids: _each(grid.pull_messages(ids))
    return Puller(cast(HttpGrid, grid), sent_bytes).pull


def _each(replies: Iterable[Message]) -> Iterator[Message]:
    """The replies, each freed before the next one is used: a reply may be as large as the model."""
    came = list(replies)
    while came:
        yield came.pop(0)


@cache
def _warn_once(missing: str) -> None:
    log(WARNING, "lifl: Flower pulls the replies, and a bad one can end the run, because flwr has changed: %s", missing)


class _NotYetError(Exception):
    """A reply is not complete yet: an object has not arrived, or the turn of the reply is over."""


@attrs.define(eq=False)
class _Arriving:
    """A reply that the SuperLink has announced, with the objects pulled so far; `metadata` is the protobuf message."""

    metadata: Any
    wanted: list[str]
    contents: dict[str, bytes] = attrs.field(factory=dict)


class Puller:
    """Pulls the replies to the messages of one exchange.

    Parameters
    ----------
    grid : HttpGrid
        Flower's grid; its HTTP client, its node and its run are used.
    sent_bytes : int
        Bytes of the arrays in a message; 0 if not known. See :func:`lifl.strategy.extent.bound_of`.
    """

    def __init__(self, grid: HttpGrid, sent_bytes: int) -> None:
        self._grid = grid
        self._client = grid._runtime_client
        self._run_id = grid.run.run_id
        self._sent_bytes = sent_bytes
        self._arriving: list[_Arriving] = []
        self._pull_object = make_pull_object_fn_protobuf(self._client.PullObject, grid.node, self._run_id)

    def pull(self, message_ids: list[str]) -> Iterator[Message]:
        """The complete replies to messages with `message_ids`, one after another as the caller iterates.

        A reply with a missing object is tried again at the next call with its message's id: its client may be slow, or
        may never send the object, and other replies must not wait for it.

        Raises the errors of the connection to the SuperLink, and none that a reply causes.
        """
        for arriving in self._announced(message_ids):
            reply = self._receive(arriving)
            if reply is not None:
                self._arriving.remove(arriving)
                arriving.contents.clear()
                yield reply
                del reply  # it may be as large as the model, and must not stay in memory until the next one comes

    def _announced(self, message_ids: list[str]) -> list[_Arriving]:
        """The replies to these messages that have been announced, now or before."""
        asked = set(message_ids)
        before = [one for one in self._arriving if one.metadata.reply_to_message_id in asked]
        # The SuperLink forgets a message once it has announced the reply, so it must not be asked a second time.
        asked -= {one.metadata.reply_to_message_id for one in before}
        new = []
        if asked:
            ids = [message_id for message_id in message_ids if message_id in asked]
            try:
                answer = self._client.PullMessages(PullAppMessagesRequest(message_ids=ids))
            except Exception as error:
                # Handled as in Flower. The error is httpx's, which flwr depends on and lifl does not, so it is
                # recognised by its status code instead of its class.
                if getattr(getattr(error, "response", None), "status_code", None) != TOO_LARGE:
                    raise
                log(ERROR, "The SuperLink refuses a request for %s replies at once as too large", len(ids))
                return before
            for message, tree in zip(answer.messages_list, answer.message_object_trees, strict=True):
                new.append(_Arriving(message.metadata, _ids_of(tree)))
        self._arriving += new
        return before + new

    def _receive(self, arriving: _Arriving) -> Message | None:
        """A complete reply, or the error reply in its place; None if an object is still missing."""
        try:
            self._fetch(arriving)
        except _NotYetError:
            return None
        except ObjectPullError as error:  # the time to send the object is over, or the object was never announced
            self._confirm(arriving)
            return self._error(arriving, ErrorCode.MESSAGE_UNAVAILABLE, f"the reply's objects are gone: {error}")
        self._confirm(arriving)
        return self._inflate(arriving)

    def _fetch(self, arriving: _Arriving) -> None:
        """Pulls the missing objects, unless they are too many; raises ``_NotYetError`` if some have to wait."""
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
            # A SuperLink keeps one tree of each object, from the client that announced it first. That client may have
            # left out the children, which would be missing here; so the children named by the heads are pulled too.
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
            # As in Flower (1.42): the id of a message is not part of its object, and is set in the private attribute.
            message.metadata.__dict__["_message_id"] = announced.message_id
            return message
        except Exception as error:  # Flower's code may raise any error for bytes that a client chose
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
        """An error reply from the same node, to the same message as the announced reply."""
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
        # The reason may quote a client, which must not forge lines of a log, nor bring in text that cannot be encoded.
        escaped = shortened(reason).encode("unicode_escape").decode("ascii")
        return make_message(metadata=metadata, error=Error(code, shortened(escaped)))


def _ids_of(tree: ObjectTree) -> list[str]:
    """The ids in a tree of objects, without repetition."""
    return list(dict.fromkeys(one.object_id for one in iterate_object_tree(tree)))


def _named_by(content: bytes) -> list[str]:
    """The children named in the head of an object; none if `content` has no head, which is refused later."""
    try:
        return extent.children_of(content, MAX_OBJECTS)
    except ValueError:
        return []


def _check(message: Message, announced: Any) -> None:
    """Raises ``ValueError`` if an inflated message is not the one that was announced."""
    for name in ("run_id", "reply_to_message_id", "src_node_id", "dst_node_id"):
        inflated, expected = getattr(message.metadata, name), getattr(announced, name)
        if inflated != expected:
            raise ValueError(f"its metadata have {name} {inflated!r}, {expected!r} was announced")
