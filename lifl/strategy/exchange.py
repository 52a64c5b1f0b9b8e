"""Messages out, and replies in as they become ready, in place of Flower's poll every three seconds.

Owns no round. Works with any Grid: it calls only `push_messages` and `pull_messages`, the latter with few message ids
at a time, because one pull inflates every reply that is ready. From Flower's HttpGrid replies are pulled one by one,
see :mod:`lifl.strategy.pulling`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from logging import WARNING
from typing import Any

from flwr.app import Message
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from flwr.supercore import log
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError

from lifl.strategy.heap import give_back
from lifl.strategy.pulling import puller

FIRST_PAUSE_S = 0.005
MAX_PAUSE_S = 1.0
PAUSE_SHARE = 0.1
"""A pause is this share of the time since the last reply, so polling lengthens a wait by at most this share."""

PULL_BYTES = 256 * 2**20
"""Goal for the replies pulled at once, computed with the size of the model that was sent."""

MIN_PER_PULL = 4


def exchange(
    grid: Grid,
    messages: list[Message],
    timeout: float | None,
    reply_bytes: int,
    take: Callable[[Message, int], Message],
    missing: Callable[[int], None],
    *,
    are_pushed: bool = False,
) -> list[Message]:
    """Pushes `messages`, then pulls replies one small subset after another until all are in.

    Parameters
    ----------
    timeout : float or None
        Seconds, counted from the end of the push; ``None`` waits for all.
    reply_bytes : int
        Bytes that one reply is expected to take in memory.
    take : callable
        Called with each reply as it comes and the id of the node that was asked (an error reply may come from the
        SuperLink itself); the returned list holds the results of these calls.
    missing : callable
        Called with the node id of each message that has no reply at the time-out.
    are_pushed : bool
        The messages have been pushed already.
    """
    # A Grid leaves out a message that it could not push (InMemoryGrid, and HttpGrid if all are too large) or has None
    # in its place (HttpGrid). No reply will come to such a message, so waiting would last until the time-out.
    ids = [m.metadata.message_id for m in messages] if are_pushed else push(grid, messages)
    waiting = {i: None for i in ids if i}
    asked = [(m.metadata.message_id, m.metadata.dst_node_id) for m in messages]
    nodes = dict(asked)
    pull = puller(grid, max(reply_bytes, _largest(messages)))
    messages.clear()  # the messages hold the model, which the grid has by now
    give_back()
    replies: list[Message] = []
    at_once = max(MIN_PER_PULL, PULL_BYTES // max(reply_bytes, 1))
    last = time.monotonic()
    end = None if timeout is None else last + timeout
    while waiting:
        for subset in _subsets(list(waiting), at_once):
            for reply in pull(subset):
                if reply.metadata.reply_to_message_id not in waiting:
                    log(WARNING, "A second reply of node %s to one message is left out", reply.metadata.src_node_id)
                    continue
                del waiting[reply.metadata.reply_to_message_id]
                node_id = nodes.get(reply.metadata.reply_to_message_id, reply.metadata.src_node_id)
                replies.append(take(reply, node_id))
                del reply  # it may be as large as the model, and must not stay in memory until the next one comes
                last = time.monotonic()
        now = time.monotonic()
        if not waiting or (end is not None and now >= end):
            break
        pause = min(MAX_PAUSE_S, max(FIRST_PAUSE_S, PAUSE_SHARE * (now - last)))
        # The last pull is at the time-out, so that a reply that was ready in time counts.
        time.sleep(pause if end is None else min(pause, end - now))
    answered = {reply.metadata.reply_to_message_id for reply in replies}
    for message_id, node_id in asked:
        if message_id not in answered:
            missing(node_id)
    return replies


Exchange = Callable[..., list[Message]]


def _of_grid(grid: Grid) -> list[type]:
    """The classes of a grid that have a ``send_and_receive`` with a body, the most derived first."""
    classes = [cls for cls in type(grid).__mro__ if "send_and_receive" in vars(cls)]
    return [cls for cls in classes if not getattr(vars(cls)["send_and_receive"], "__isabstractmethod__", False)]


def own_exchange(grid: Grid) -> Exchange | None:
    """The exchange by the grid's ``send_and_receive``, if that is the user's: it overrides another one, for a reason.

    It takes the arguments of :func:`exchange`. None for a grid of Flower's, and for one that is the user's altogether.
    """
    overrides = "send_and_receive" in getattr(grid, "__dict__", {}) or len(_of_grid(grid)) > 1
    return _by_the_grid if overrides else None


def _by_the_grid(
    grid: Grid,
    messages: list[Message],
    timeout: float | None,
    _: int,
    take: Callable[[Message, int], Message],
    missing: Callable[[int], None],
) -> list[Message]:
    replies = list(grid.send_and_receive(messages, timeout=timeout))
    asked = {message.metadata.message_id: message.metadata.dst_node_id for message in messages}
    taken = []
    while replies:
        reply = replies.pop(0)
        node_id = asked.pop(reply.metadata.reply_to_message_id, reply.metadata.src_node_id)
        taken.append(take(reply, node_id))
    for node_id in asked.values():
        missing(node_id)
    return taken


def warn_of_grid(grid: Grid) -> None:
    """Says that the ``send_and_receive`` of a grid that is the user's altogether is not called."""
    classes = _of_grid(grid)
    if own_exchange(grid) is None and classes and not classes[0].__module__.startswith(("flwr.", "lifl.")):
        log(
            WARNING,
            "%s.send_and_receive is not called: lifl pushes the messages and pulls each reply as it comes. If it does "
            "more than that, derive the grid from one that has the method, and override it there",
            classes[0].__qualname__,
        )


def _largest(messages: list[Message]) -> int:
    """Bytes of the arrays in the largest message; a record that many messages share is measured once."""
    known: dict[int, int] = {}
    largest = 0
    for message in messages:
        records = message.content.array_records.values() if message.has_content() else ()
        known |= {id(record): record.count_bytes() for record in records if id(record) not in known}
        largest = max(largest, sum(known[id(record)] for record in records))
    return largest


def push(grid: Grid, messages: list[Message]) -> list[str]:
    """Pushes messages and returns their ids, with None or "" for a message that could not be pushed.

    Pushes all a second time if an object is refused: a SuperLink that was killed and restarted may have the object
    already, its answer was lost, and Flower's SuperLink takes no object twice. At the second push the SuperLink knows
    the messages, and asks only for the objects that it lacks.
    """
    try:
        return list(grid.push_messages(messages))
    except ObjectPushError as error:
        log(WARNING, "The messages of a round are pushed again: %s", error)
        return list(grid.push_messages(messages))


def _subsets(ids: list[str], size: int) -> Iterator[list[str]]:
    for start in range(0, len(ids), size):
        yield ids[start : start + size]


def as_it_is(reply: Message, _: int) -> Message:
    """A `take` that returns the reply unchanged."""
    return reply


def not_reported(_: int) -> None:
    """A `missing` that does nothing, as Flower, which returns the replies that it has and logs nothing."""


class EventGrid(Grid):
    """The user's grid with another `send_and_receive`; every other call is passed on to the user's grid."""

    def __init__(
        self, grid: Grid, send_and_receive: Callable[[Grid, list[Message], float | None], list[Message]]
    ) -> None:
        self._grid = grid
        self._exchange = send_and_receive

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Flower's ``Grid.send_and_receive``, event-driven."""
        batch = list(messages)
        del messages  # the exchange frees the models in `batch` once they are pushed; a second list would keep them
        # Flower's loop and a user's hook call the same method with the same arguments; only the caller's frame tells
        # them apart. A call from the loop is a round; the messages of a hook are exchanged and not aggregated.
        if sys._getframe(1).f_code is Strategy.start.__code__:
            return self._exchange(self._grid, batch, timeout)
        return (own_exchange(self._grid) or exchange)(self._grid, batch, timeout, 0, as_it_is, not_reported)

    def set_run(self, run: Any) -> None:
        """Calls the user's grid."""
        self._grid.set_run(run)

    @property
    def run(self) -> Any:
        """The run of the user's grid."""
        return self._grid.run

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        """Calls the user's grid."""
        return self._grid.create_message(*args, **kwargs)

    def get_node_ids(self) -> Iterable[int]:
        """Calls the user's grid."""
        return self._grid.get_node_ids()

    def get_nodes(self) -> Any:
        """Calls the user's grid."""
        return self._grid.get_nodes()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Calls the user's grid."""
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Calls the user's grid."""
        return self._grid.pull_messages(message_ids)

    def __getattr__(self, name: str) -> Any:
        """Attributes that only the user's grid has."""
        return getattr(self._grid, name)
