"""Messages out, replies in as they become ready: what replaces Flower's poll every three seconds.

Owns no round. Works with any Grid: it asks only `push_messages` and `pull_messages` of it, for few
message ids at a time, because one pull inflates every reply that is ready. Of Flower's HttpGrid replies are
pulled one by one, see :mod:`lifl.strategy.pulling`.
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
LONGEST_PAUSE_S = 1.0
PAUSE_SHARE = 0.1
"""A pause is this share of the time since something last came: it adds at most so much to a wait."""

PULL_BYTES = 256 * 2**20
"""Replies pulled at once are meant to stay under this, by the size of the model that was sent."""

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
        What one reply is expected to take in memory.
    take : callable
        Called with each reply as it comes and the node that was asked (an error reply may be the
        SuperLink's own); what it returns is in the list that is returned.
    missing : callable
        Called with the node id of each message that has no reply at the time-out.
    are_pushed : bool
        The messages have been pushed already.
    """
    # A Grid leaves out what it could not push (InMemoryGrid, and HttpGrid if all is too large) or gives
    # None in its place (HttpGrid): to wait for those would be to wait for the time-out.
    ids = [m.metadata.message_id for m in messages] if are_pushed else push(grid, messages)
    waiting = {i: None for i in ids if i}
    asked = [(m.metadata.message_id, m.metadata.dst_node_id) for m in messages]
    nodes = dict(asked)
    pull = puller(grid, max(reply_bytes, _largest(messages)))
    messages.clear()  # they hold the model, which the grid has by now
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
                del reply  # which may have been refused, and must not stay until the next one comes
                last = time.monotonic()
        now = time.monotonic()
        if not waiting or (end is not None and now >= end):
            break
        pause = min(LONGEST_PAUSE_S, max(FIRST_PAUSE_S, PAUSE_SHARE * (now - last)))
        # The last look is at the time-out, so that a reply that was there in time counts.
        time.sleep(pause if end is None else min(pause, end - now))
    answered = {reply.metadata.reply_to_message_id for reply in replies}
    for message_id, node_id in asked:
        if message_id not in answered:
            missing(node_id)
    return replies


def _largest(messages: list[Message]) -> int:
    """Bytes of the arrays in the largest message; many messages share their records."""
    known: dict[int, int] = {}
    largest = 0
    for message in messages:
        records = message.content.array_records.values() if message.has_content() else ()
        known |= {id(record): record.count_bytes() for record in records if id(record) not in known}
        largest = max(largest, sum(known[id(record)] for record in records))
    return largest


def push(grid: Grid, messages: list[Message]) -> list[str]:
    """Pushes messages; their ids, with None or "" for one that could not be pushed.

    Pushes them a second time if an object is refused: a SuperLink that was killed and is back has it already, but its
    answer was lost, and Flower's SuperLink takes no object twice. It knows the messages, and asks for what it lacks.
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
    """For `take`: nothing is done with a reply."""
    return reply


def not_reported(_: int) -> None:
    """For `missing`: Flower returns what it has, silently."""


class EventGrid(Grid):
    """The user's grid with another `send_and_receive`; everything else is passed on to it."""

    def __init__(
        self, grid: Grid, send_and_receive: Callable[[Grid, list[Message], float | None], list[Message]]
    ) -> None:
        self._grid, self._exchange = grid, send_and_receive

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Flower's, event-driven."""
        batch = list(messages)
        del messages  # whose models the exchange lets go of
        # Only Flower's loop asks for a round. What a user's hook sends and gets is its own affair.
        if sys._getframe(1).f_code is Strategy.start.__code__:
            return self._exchange(self._grid, batch, timeout)
        return exchange(self._grid, batch, timeout, 0, as_it_is, not_reported)

    def set_run(self, run: Any) -> None:
        """Passed on."""
        self._grid.set_run(run)

    @property
    def run(self) -> Any:
        """Passed on."""
        return self._grid.run

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        """Passed on."""
        return self._grid.create_message(*args, **kwargs)

    def get_node_ids(self) -> Iterable[int]:
        """Passed on."""
        return self._grid.get_node_ids()

    def get_nodes(self) -> Any:
        """Passed on."""
        return self._grid.get_nodes()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Passed on."""
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Passed on."""
        return self._grid.pull_messages(message_ids)

    def __getattr__(self, name: str) -> Any:
        """What only the user's grid has."""
        return getattr(self._grid, name)
