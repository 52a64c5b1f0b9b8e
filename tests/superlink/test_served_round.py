"""The moves of a message's state: those of the table, and no other."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

import lifl
from lifl.superlink.rounds.chunk_map import Geometry
from lifl.superlink.rounds.served_round import ALLOWED, Announced, AskedMessage, ServedRound, State

SPEC = lifl.TensorSpec.from_arrays({"w": np.zeros(3, np.float32)})
WAYS = [
    [State.STORED, State.ARRIVING, State.TAKEN, State.SETTLED, State.CLOSED],
    [State.ARRIVING, State.TAKEN, State.SETTLED],  # a reply before its message is noted as stored
    [State.STORED, State.SETTLED],  # an error that Flower makes
    [State.SETTLED],  # a reply that is refused unread
    [State.STORED, State.ARRIVING, State.REFUSED, State.SETTLED],  # a reply that is refused while it comes
    *([*before, State.CLOSED] for before in ([], [State.STORED], [State.ARRIVING], [State.ARRIVING, State.TAKEN])),
    [State.ARRIVING, State.REFUSED, State.CLOSED],
]


def make_round(*nodes: int) -> ServedRound:
    """A round that expects one message to each of the nodes; its Round is never used."""
    announced = Announced(run_id=1, message_type="train", group_id="1", nodes=list(nodes), weight_key="n")
    no_round: Any = None
    return ServedRound(announced, no_round, Geometry(SPEC, 1000), lambda _: None, Counter(nodes))


def make_message(state: State = State.ASKED) -> AskedMessage:
    """A message to node 7."""
    return AskedMessage(message_id="m", node_id=7, served=make_round(7), state=state)


@pytest.mark.parametrize("before", State)
@pytest.mark.parametrize("after", State)
def test_only_the_moves_of_the_table_are_made(before: State, after: State) -> None:
    """Any other move raises, and the state stays as it was."""
    asked = make_message(before)
    if after in ALLOWED[before]:
        asked.move(after)
        assert asked.state is after
    else:
        with pytest.raises(RuntimeError, match=f"message m is {before.name} and cannot become {after.name}"):
            asked.move(after)
        assert asked.state is before


def test_the_table_is_this() -> None:
    """Each state is in it; forwards only, so that no message comes back to a state; and nothing follows the end."""
    assert set(ALLOWED) == set(State)
    assert all(after.value > before.value for before in State for after in ALLOWED[before])
    assert all(State.CLOSED in ALLOWED[before] for before in State if before is not State.CLOSED)
    assert not ALLOWED[State.CLOSED]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: " ".join(state.name.lower() for state in way))
def test_ways_of_a_message(way: list[State]) -> None:
    """From the moment it is asked."""
    asked = make_message()
    for state in way:
        assert asked.is_unanswered == (asked.state in (State.ASKED, State.STORED))
        asked.move(state)
    assert asked.state is way[-1]


def test_a_message_is_answered_once() -> None:
    """Its second reply is no move of the table: it is not noted, and the node has no second name."""
    asked = make_message()
    asked.answer("r", State.ARRIVING)
    with pytest.raises(RuntimeError, match="cannot become ARRIVING"):
        asked.answer("s", State.ARRIVING)
    assert (asked.reply_id, asked.client, asked.served.replies) == ("r", "7", {"r": asked})


def test_a_node_with_two_messages_has_two_names() -> None:
    """In the order of its replies, as in Flower."""
    served = make_round(7, 7, 8)
    first, second, other = (AskedMessage(str(n), node, served) for n, node in enumerate((7, 7, 8)))
    for asked in (second, other, first):
        asked.answer(f"reply to {asked.message_id}", State.ARRIVING)
    assert (first.client, second.client, other.client) == ("7#2", "7", "8")


@pytest.mark.parametrize("end", [State.SETTLED, State.CLOSED])
def test_a_reply_that_is_over_is_let_go_of(end: State) -> None:
    """Its reception knows all its objects: of thousands of clients that is much memory."""
    asked = make_message(State.TAKEN)
    reception: Any = object()
    asked.reception = reception
    asked.move(end)
    assert asked.reception is None
