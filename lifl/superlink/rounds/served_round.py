"""One round at this server: what its strategy said of it, and which of its messages and replies are known.

A record; ``Rounds`` keeps it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import attrs

from lifl.round.round import Round
from lifl.superlink.rounds.chunk_map import Geometry
from lifl.superlink.rounds.incoming_reply import Reception, Settled


@attrs.frozen
class Announced:
    """What a strategy says of a round: to whom it will send which messages, and what it does with replies."""

    run_id: int
    message_type: str
    group_id: str
    nodes: list[int]
    weight_key: str


@attrs.define(eq=False)
class ServedRound:
    """One open round. `tell` is called with each reply that is settled, from any thread."""

    said: Announced
    round: Round
    geometry: Geometry
    tell: Callable[[Settled], None]
    expected: Counter[int]
    asked: dict[str, int] = attrs.field(factory=dict)  # message -> node
    stored: set[str] = attrs.field(factory=set)  # of these, what Flower's state has
    receptions: dict[str, Reception] = attrs.field(factory=dict)  # reply -> its reception
    replied: set[str] = attrs.field(factory=set)  # messages with a reply
    names: Counter[int] = attrs.field(factory=Counter)
    taken: set[str] = attrs.field(factory=set)  # replies that have come whole
    settled: list[str] = attrs.field(factory=list)  # replies that are kept until the round ends
    is_closed: bool = False

    def name(self, node_id: int) -> str:
        """A node that was sent two messages counts twice, as in Flower."""
        self.names[node_id] += 1
        return str(node_id) if self.names[node_id] == 1 else f"{node_id}#{self.names[node_id]}"
