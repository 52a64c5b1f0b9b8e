"""Messages of open rounds, their replies, and the orders in which threads may come to them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from flwr.proto.message_pb2 import ObjectTree
from test_served_round import make_round

from lifl.superlink.rounds import registry
from lifl.superlink.rounds.registry import Registry
from lifl.superlink.rounds.served_round import AskedMessage, ServedRound, State


class Desk:
    """A registry with one open round, and the replies that it found to be whole."""

    def __init__(self, *nodes: int) -> None:
        self.taken: list[AskedMessage] = []
        self.registry = Registry(lambda asked, _: self.taken.append(asked))
        self.served = self.open(*nodes)

    def open(self, *nodes: int) -> ServedRound:
        """One more round."""
        served = make_round(*nodes)
        self.registry.open(served)
        return served

    def bind(self, message_id: str, node_id: int) -> AskedMessage | None:
        """A message is about to be stored."""
        meta = {"message_id": message_id, "dst_node_id": node_id, "run_id": 1, "message_type": "train", "group_id": "1"}
        return self.registry.bind(SimpleNamespace(**meta))

    def ask(self, message_id: str, node_id: int) -> AskedMessage:
        """A message is stored."""
        asked = self.bind(message_id, node_id)
        assert asked is not None
        self.registry.stored(asked)
        return asked

    def announce(self, reply_id: str, to: str, *missing: str, session: str = "") -> bool:
        """A reply is announced, of which these objects are missing; whether it was needed."""
        message = SimpleNamespace(metadata=SimpleNamespace(message_id=reply_id, reply_to_message_id=to))
        tree = ObjectTree(object_id=reply_id, children=[ObjectTree(object_id=one) for one in missing])
        with self.registry.announcing(message.metadata) as is_needed:
            if is_needed:
                self.registry.announced(message, tree, set(missing), session or f"session of {reply_id}", None)
        return is_needed


def raise_memory_error(**_: Any) -> Any:
    """Takes the place of a class."""
    raise MemoryError


@pytest.fixture
def desk() -> Desk:
    """Its round has two nodes."""
    return Desk(7, 8)


def test_a_reply_is_whole_when_its_node_has_pushed_it(desk: Desk) -> None:
    """Each object once, in its own session; then it is settled once."""
    asked = desk.ask("m", 7)
    desk.announce("r", "m", "a", "b")
    for session, object_id in [("another", "a"), ("session of r", "a"), ("session of r", "a"), ("another", "b")]:
        desk.registry.pushed(session, object_id)
        assert (asked.state, desk.taken) == (State.ARRIVING, [])
    desk.registry.pushed("session of r", "b")
    assert (asked.state, desk.taken) == (State.TAKEN, [asked])
    assert desk.registry.forget(asked) == ["session of r"]
    assert desk.registry.forget(asked) == []
    assert desk.registry.settle(asked)
    assert not desk.registry.settle(asked)


def test_a_reply_before_its_message_is_noted_as_stored(desk: Desk) -> None:
    """The thread that stores the message comes later, and changes nothing."""
    asked = desk.bind("m", 7)
    assert asked is not None
    desk.announce("r", "m", "a")
    desk.registry.stored(asked)
    assert asked.state is State.ARRIVING


def test_a_message_that_is_sent_again_is_one(desk: Desk) -> None:
    """A second message to the same node is still expected then."""
    served = desk.open(9, 9)
    first = desk.ask("m", 9)
    assert desk.bind("m", 9) is None
    assert desk.bind("n", 9) is not None
    assert desk.bind("o", 9) is None
    assert served.asked["m"] is first


def test_a_message_that_is_not_stored_is_expected_again(desk: Desk) -> None:
    """Under the same id or another."""
    asked = desk.bind("m", 7)
    assert asked is not None
    desk.registry.unbind(asked)
    assert desk.registry.find("m") is None
    assert desk.bind("n", 7) is not None
    assert desk.bind("m", 7) is None


def test_a_reply_to_a_message_that_is_not_stored_is_handed_back(desk: Desk) -> None:
    """Once, by `unbind` or by `close`: nothing waits for its objects then, and it is not settled."""
    asked, other = desk.ask("m", 7), desk.ask("n", 8)
    desk.announce("r", "m", "a")
    desk.announce("s", "n", "b")
    reception = asked.reception
    assert reception is not None
    assert desk.registry.unbind(asked) == (reception, ["session of r"])
    desk.registry.pushed("session of r", "a")
    assert (desk.taken, desk.registry.settle(asked), asked.reception) == ([], False, None)
    left = desk.registry.close(desk.served)
    assert left is not None
    assert left[0] != [reception]
    assert left[1] == ["session of s"]
    assert desk.registry.unbind(other) == (None, [])
    assert len(desk.registry) == 0


def test_a_reply_that_cannot_be_received_is_no_reply(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its message waits for another, which is the node's first."""
    asked = desk.ask("m", 7)
    with monkeypatch.context() as patch:
        patch.setattr(registry, "Reception", raise_memory_error)
        with pytest.raises(MemoryError):
            desk.announce("r", "m", "a")
    assert asked.is_unanswered
    desk.announce("s", "m", "a")
    assert (asked.state, asked.client) == (State.ARRIVING, "7")


def test_a_message_that_no_round_expects_is_bound_to_none(desk: Desk) -> None:
    """To a node that the round does not have, or when the round is closed."""
    assert desk.bind("m", 5) is None
    desk.registry.close(desk.served)
    assert desk.bind("m", 7) is None


def test_the_newest_round_has_a_message_that_is_in_two(desk: Desk) -> None:
    """Its ServerApp came back, and the server has not closed the round before yet."""
    before = desk.ask("m", 7)
    desk.open(7)
    after = desk.ask("m", 7)
    assert desk.registry.find("m") is after is not before
    desk.registry.close(desk.served)
    assert desk.registry.find("m") is after


def test_the_newest_round_takes_a_message_that_two_expect(desk: Desk) -> None:
    """Its ServerApp came back before it had sent all messages of the round before."""
    newest = desk.open(7)
    assert desk.ask("m", 7).served is newest
    assert desk.ask("n", 7).served is desk.served


def test_of_two_replies_the_first_counts(desk: Desk) -> None:
    """The first is taken even if the second is whole sooner."""
    asked = desk.ask("m", 7)
    desk.announce("r", "m", "a")
    desk.announce("s", "m")
    assert (asked.state, asked.reply_id, desk.taken) == (State.ARRIVING, "r", [])
    desk.registry.pushed("session of r", "a")
    desk.announce("s", "m", "c")
    assert desk.taken == [asked]
    assert desk.registry.sender("c", 7) is None


def test_a_reply_that_is_announced_again_waits_for_what_is_missing_then(desk: Desk) -> None:
    """Others have brought an object; the session is the new one, also for a node that names none."""
    asked = desk.ask("m", 7)
    desk.announce("r", "m", "a", "b", session="first")
    desk.announce("r", "m", "b", "c", session="second")
    assert [desk.registry.sender(one, 7) for one in "abc"] == [None, asked, asked]
    assert desk.registry.session_of("b", 7) == "second"
    for object_id in "bc":
        desk.registry.pushed("second", object_id)
    assert desk.taken == [asked]


@pytest.mark.parametrize("is_settled", [False, True])
def test_a_reply_that_is_taken_is_not_needed_again(desk: Desk, is_settled: bool) -> None:
    """While it is folded, and afterwards: also for another node that names its id."""
    asked = desk.ask("m", 7)
    desk.ask("n", 8)
    assert desk.announce("r", "m")
    if is_settled:
        assert desk.registry.settle(asked)
    assert not desk.announce("r", "m", "a")
    assert not desk.announce("r", "n", "a")
    assert desk.registry.sender("a", 7) is None


def test_another_nodes_reply_with_the_same_id_is_not_taken(desk: Desk) -> None:
    """The first one comes on, and the other node may still reply."""
    first, other = desk.ask("m", 7), desk.ask("n", 8)
    desk.announce("r", "m", "a")
    desk.announce("r", "n", "b", session="other")
    assert (first.state, other.state) == (State.ARRIVING, State.STORED)
    assert desk.registry.sender("b", 8) is None
    desk.registry.pushed("other", "a")
    assert first.missing == {"a"}
    desk.announce("s", "n")
    assert desk.taken == [other]


def test_nobody_asks_flower_for_a_reply_that_is_being_stored(desk: Desk) -> None:
    """Nor for one to a message that is: Flower would say that the message never existed."""
    asked = desk.bind("m", 7)
    assert asked is not None
    assert desk.registry.unanswered(desk.served) == []
    desk.registry.stored(asked)
    assert desk.registry.unanswered(desk.served) == [asked]
    meta: Any = SimpleNamespace(message_id="r", reply_to_message_id="m")
    with desk.registry.announcing(meta), desk.registry.announcing(meta):
        assert desk.registry.unanswered(desk.served) == []
        with desk.registry.announcing(meta):
            pass
        assert desk.registry.unanswered(desk.served) == [], "two others are being stored"
    assert desk.registry.unanswered(desk.served) == [asked], "Flower took none of them"
    desk.announce("r", "m", "a")
    assert desk.registry.unanswered(desk.served) == []


def test_an_error_counts_only_without_a_reply(desk: Desk) -> None:
    """Flower's for a node that is gone, or of a reply that is refused unread."""
    gone, there = desk.ask("m", 7), desk.ask("n", 8)
    desk.announce("r", "n", "a")
    assert desk.registry.settle_unread(gone, "error")
    assert not desk.registry.settle_unread(gone, "another error")
    assert not desk.registry.settle_unread(there, "error")
    assert (gone.state, gone.client, there.state) == (State.SETTLED, "7", State.ARRIVING)


def test_a_reply_is_given_up_only_while_it_arrives(desk: Desk) -> None:
    """Once: nothing waits for its objects then, and it is not needed again."""
    asked = desk.ask("m", 7)
    assert desk.registry.give_up(asked) is None
    desk.announce("r", "m", "a")
    assert desk.registry.may_push("session of r")
    assert desk.registry.give_up(asked) is not None
    assert asked.state is State.REFUSED
    assert desk.registry.give_up(asked) is None
    assert desk.registry.sender("a", 7) is None
    assert not desk.announce("r", "m", "a")
    assert not desk.registry.may_push("session of r")
    assert desk.registry.may_push("another")
    desk.registry.pushed("session of r", "a")
    assert desk.taken == []
    assert desk.registry.forget(asked) == ["session of r"]
    assert desk.registry.settle(asked)
    assert len(desk.registry) == 1, "the round, and nothing in the index"


def test_an_object_of_a_whole_reply_may_be_pushed_again(desk: Desk) -> None:
    """Its node has not had the answer: Flower's state knows whether the object is stored."""
    asked = desk.ask("m", 7)
    desk.announce("r", "m", "a")
    desk.registry.pushed("session of r", "a")
    assert asked.state is State.TAKEN
    assert desk.registry.may_push("session of r")


def test_objects_that_others_bring_make_a_reply_whole(desk: Desk) -> None:
    """Those that were looked for, and not one that it has been announced with since."""
    asked = desk.ask("m", 7)
    desk.announce("r", "m", "a", "b")
    (silent,) = desk.registry.silent(desk.served, since_s=1e12)
    assert set(silent[2]) == {"a", "b"}
    assert desk.registry.silent(desk.served, since_s=0.0) == []
    desk.announce("r", "m", "a", "c", session="again")
    desk.registry.brought(asked, silent[2])
    assert (asked.state, asked.missing) == (State.ARRIVING, {"c"})
    desk.registry.brought(asked, ["c"])
    assert desk.taken == [asked]
    desk.registry.forget(asked)
    assert len(desk.registry) == 1, "the round, and nothing in the index"


def test_a_round_that_ends_closes_its_messages(desk: Desk) -> None:
    """Wherever each of them is; threads that come later find that they are too late."""
    arriving, taken = desk.ask("m", 7), desk.ask("n", 8)
    desk.announce("r", "m", "a")
    desk.announce("s", "n")
    left = desk.registry.close(desk.served)
    assert left is not None
    assert [len(one) for one in left] == [2, 2]
    assert desk.registry.close(desk.served) is None
    assert len(desk.registry) == 0
    assert {one.state for one in desk.served.asked.values()} == {State.CLOSED}
    desk.registry.pushed("session of r", "a")
    desk.registry.brought(arriving, ["a"])
    assert desk.registry.give_up(arriving) is None
    assert not desk.registry.settle(taken)
    assert not desk.registry.settle_unread(arriving, "error")
    assert desk.taken == [taken]
