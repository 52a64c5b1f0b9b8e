"""A round at this server, and its messages: one record for each message, with one state.

Owns the states of a message and the table of the moves between them. ``Registry`` keeps the rounds and the lock that
guards them; nothing here waits, stores or deletes.
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Callable
from typing import Any

import attrs

from lifl.round.round import Round
from lifl.superlink.rounds.chunk_map import Geometry
from lifl.superlink.rounds.incoming_reply import Reception, Settled


class State(enum.Enum):
    """The stages of a message and its reply."""

    ASKED = enum.auto()
    """The message belongs to the round; Flower's state may not have it yet."""

    STORED = enum.auto()
    """Flower's state has the message; its node has not replied."""

    ARRIVING = enum.auto()
    """A reply is announced, and its objects come."""

    TAKEN = enum.auto()
    """Nothing more has to come: the reply is whole, and is read and folded."""

    REFUSED = enum.auto()
    """Nothing more of the reply is taken: it is refused before it was whole, and its objects are deleted."""

    SETTLED = enum.auto()
    """The strategy learns, or has learnt, what became of the message."""

    CLOSED = enum.auto()
    """The round is over; nobody learns any more what became of the message."""


ALLOWED: dict[State, frozenset[State]] = {
    # A node may reply before the thread that stores the message has noted that it is stored.
    State.ASKED: frozenset({State.STORED, State.ARRIVING, State.SETTLED, State.CLOSED}),
    # Settled without a reply: Flower makes an error reply for a node that is gone, and a reply may be refused unread.
    State.STORED: frozenset({State.ARRIVING, State.SETTLED, State.CLOSED}),
    State.ARRIVING: frozenset({State.TAKEN, State.REFUSED, State.CLOSED}),
    State.TAKEN: frozenset({State.SETTLED, State.CLOSED}),
    State.REFUSED: frozenset({State.SETTLED, State.CLOSED}),
    State.SETTLED: frozenset({State.CLOSED}),
    State.CLOSED: frozenset(),
}
"""state -> the states that may follow it."""


@attrs.frozen
class Announced:
    """A round as its strategy announces it: the messages it will send, to which nodes, and how replies are weighed."""

    run_id: int
    message_type: str
    group_id: str
    nodes: list[int]
    weight_key: str


@attrs.define(eq=False)
class AskedMessage:
    """A message to a node that belongs to a round, and the reply to it.

    Attributes
    ----------
    announcing : int
        Replies to the message that Flower is storing at this moment.
    client : str
        The node's name in the report; "" before there is a reply.
    reply_id : str
        Id of the reply that counts, or that Flower has made for a node that is gone; "" before there is one.
    reception : Reception or None
        The reply while its state is ARRIVING, TAKEN or REFUSED.
    missing : set of str
        Objects of the reply that have not come.
    sessions : list of str
        Push sessions in which the node sends the reply: one for each time that the node has announced it.
    """

    message_id: str
    node_id: int
    served: ServedRound
    state: State = State.ASKED
    announcing: int = 0
    client: str = ""
    reply_id: str = ""
    reception: Reception | None = None
    missing: set[str] = attrs.field(factory=set)
    sessions: list[str] = attrs.field(factory=list)

    @property
    def is_unanswered(self) -> bool:
        """True before there is a reply."""
        return self.state in (State.ASKED, State.STORED)

    def move(self, to: State) -> None:
        """Changes the state; raises ``RuntimeError`` for a move that is not in the table."""
        if to not in ALLOWED[self.state]:
            raise RuntimeError(f"message {self.message_id} is {self.state.name} and cannot become {to.name}")
        self.state = to
        if to in (State.SETTLED, State.CLOSED):
            self.reception = None  # of thousands of clients these are much memory, while the round goes on

    def answer(self, reply_id: str, to: State) -> None:
        """Notes the first reply to the message, and moves on."""
        self.move(to)
        self.client = self.served.take_name(self.node_id)
        self.reply_id = reply_id
        self.served.replies[reply_id] = self


@attrs.define(eq=False)
class ServedRound:
    """A round at this server, open or closed.

    Attributes
    ----------
    on_settled : Callable
        Called with each reply that is settled, from any thread.
    expected : Counter of int
        For each node the number of messages that the strategy will send and has not sent.
    is_cleared : bool
        True if the round is over, and its messages and the replies to them are deleted.
    asked : dict of str to AskedMessage
        The round's messages by their ids.
    replies : dict of str to AskedMessage
        The same records by the ids of their replies.
    """

    announced: Announced
    round: Round
    geometry: Geometry
    on_settled: Callable[[Settled], None]
    expected: Counter[int]
    is_cleared: bool = False
    asked: dict[str, AskedMessage] = attrs.field(factory=dict)
    replies: dict[str, AskedMessage] = attrs.field(factory=dict)
    _names: Counter[int] = attrs.field(factory=Counter)

    def expects(self, meta: Any) -> bool:
        """True for the metadata of a message that the strategy has announced and that the round does not have yet."""
        announced = self.announced
        its = (announced.run_id, announced.message_type, announced.group_id)
        is_announced = (meta.run_id, meta.message_type, meta.group_id) == its and self.expected[meta.dst_node_id] > 0
        # Not one that its ServerApp sends again, because an answer was lost: another message to the node is to come.
        return is_announced and meta.message_id not in self.asked

    def next_name(self, node_id: int) -> str:
        """The client's name for a node's next reply: a node that was sent two messages counts twice, as in Flower."""
        count = self._names[node_id]
        return f"{node_id}#{count + 1}" if count else str(node_id)

    def take_name(self, node_id: int) -> str:
        """The same name, which is used by a reply from now on."""
        name = self.next_name(node_id)
        self._names[node_id] += 1
        return name
