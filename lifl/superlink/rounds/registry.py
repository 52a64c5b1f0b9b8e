"""Every message that the open rounds have asked, and each move of its state.

Owns the open rounds, the index of their arriving replies, and the lock that guards both and every record in them. A
method makes one move, or returns a value that says that no move was made: None from `close`, `bind` and `give_up`,
False from `settle` and `settle_unread`. It neither stores nor deletes nor calls Flower, so that the lock is never held
for long. ``Rounds`` and ``Watcher`` do what follows from a move.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Collection, Iterator
from typing import Any

from lifl.superlink.rounds.chunk_map import Form
from lifl.superlink.rounds.incoming_reply import Reception
from lifl.superlink.rounds.reply_index import ReplyIndex
from lifl.superlink.rounds.served_round import AskedMessage, ServedRound, State


class Registry:
    """The messages of all open rounds of one server. Any thread.

    Parameters
    ----------
    on_taken : Callable
        Called with a message and its reply's reception when the reply is whole, with the lock held: only notes it.
    """

    def __init__(self, on_taken: Callable[[AskedMessage, Reception], None]) -> None:
        self._on_taken = on_taken
        # Guards everything below and all records that can be reached from there. A thread that holds this lock takes
        # neither the store's nor one of Flower's.
        self._lock = threading.Lock()
        self._rounds: list[ServedRound] = []
        self._index = ReplyIndex()

    def __len__(self) -> int:
        with self._lock:
            return len(self._rounds) + len(self._index)

    # ------------------------------------------------------------ rounds

    def open(self, served: ServedRound) -> None:
        """From now on messages may be bound to the round."""
        with self._lock:
            self._rounds.append(served)

    def rounds(self) -> list[ServedRound]:
        """The open rounds."""
        with self._lock:
            return list(self._rounds)

    def close(self, served: ServedRound, *, clears: bool = True) -> tuple[list[Reception], list[str]] | None:
        """Closes a round and all its messages, which are deleted next if it `clears`; None if it was closed before.

        Returns the replies that were not settled, and their push sessions.
        """
        with self._lock:
            if served not in self._rounds:
                return None
            self._rounds.remove(served)
            served.is_cleared = clears
            receptions = [asked.reception for asked in served.asked.values() if asked.reception is not None]
            sessions = list[str]()
            for asked in served.asked.values():
                sessions += self._index.forget(asked)
                asked.move(State.CLOSED)
            return receptions, sessions

    # ------------------------------------------------------------ messages

    def find(self, message_id: str) -> AskedMessage | None:
        """The message of an open round with this id."""
        with self._lock:
            return self._find(message_id)

    def _find(self, message_id: str) -> AskedMessage | None:
        # A ServerApp that came back may have a round open in which its messages are asked once more: the newest counts.
        found = (served.asked.get(message_id) for served in reversed(self._rounds))
        return next((asked for asked in found if asked is not None), None)

    def bind(self, meta: Any) -> AskedMessage | None:
        """Notes a message that is about to be stored; None if no round expects it, or if its round has it."""
        with self._lock:
            for served in reversed(self._rounds):  # the newest counts, as in `_find`
                if served.expects(meta):
                    served.expected[meta.dst_node_id] -= 1
                    asked = AskedMessage(meta.message_id, meta.dst_node_id, served)
                    served.asked[meta.message_id] = asked
                    return asked
        return None

    def unbind(self, asked: AskedMessage) -> tuple[Reception | None, list[str]]:
        """Forgets a message that Flower did not store: its round expects it again.

        Returns its reply if its node has replied nevertheless, and the reply's push sessions.
        """
        with self._lock:
            if asked.state is State.CLOSED:  # `close` has returned the reply
                return None, []
            del asked.served.asked[asked.message_id]
            asked.served.expected[asked.node_id] += 1
            reception = asked.reception
            asked.move(State.CLOSED)
            return reception, self._index.forget(asked)

    def stored(self, asked: AskedMessage) -> None:
        """Notes that Flower's state has a message: from now on its node may be found to be gone."""
        with self._lock:
            if asked.state is State.ASKED:  # else its node has replied before this thread came here
                asked.move(State.STORED)

    # ------------------------------------------------------------ replies

    @contextlib.contextmanager
    def announcing(self, meta: Any) -> Iterator[bool]:
        """Lasts while Flower stores a reply; false if nothing more of the reply is needed."""
        with self._lock:
            asked = self._find(meta.reply_to_message_id)
            known = None if asked is None else asked.served.replies.get(meta.message_id)
            is_needed = known is None or known.state not in (State.TAKEN, State.REFUSED, State.SETTLED)
            if asked is not None:
                asked.announcing += 1
        try:
            yield is_needed
        finally:
            # Only after `announced`: in between, the watcher would find a message without a reply and ask Flower for
            # one; Flower would give it the reply, and take that for delivered.
            if asked is not None:
                with self._lock:
                    asked.announcing -= 1

    def announced(self, message: Any, tree: Any, missing: set[str], session_id: str, form: Form | None) -> None:
        """Notes that Flower has stored a reply, of which the objects in `missing` are to come in a push session.

        The first reply to a message counts. The same reply may be announced again, with another tree, while it comes.
        """
        meta = message.metadata
        with self._lock:
            asked = self._find(meta.reply_to_message_id)
            if asked is None:
                return
            served = asked.served
            if served.replies.get(meta.message_id, asked) is not asked:
                return  # a reply of another node has that id
            if asked.is_unanswered:
                reception = Reception(  # before the move: an arriving reply has one
                    round_=served.round,
                    geometry=served.geometry,
                    weight_key=served.announced.weight_key,
                    client=served.next_name(asked.node_id),
                    message=message,
                    tree=tree,
                    missing=missing,
                    form=form,
                )
                asked.answer(meta.message_id, State.ARRIVING)
                asked.reception = reception
            elif asked.state is not State.ARRIVING or asked.reply_id != meta.message_id:
                return
            self._index.expect(asked, missing, session_id)
            self._take_if_whole(asked)

    def pushed(self, session_id: str, object_id: str) -> None:
        """Notes that a node has pushed an object: a reply is whole when its node has pushed all that it was asked for.

        So a reply does not count as whole while its node still pushes what another node has brought meanwhile.
        """
        with self._lock:
            for asked in self._index.pushing(session_id, object_id):
                if asked.reception is not None:
                    asked.reception.hear()
                self._index.came(asked, [object_id])
                self._take_if_whole(asked)

    def brought(self, asked: AskedMessage, object_ids: Collection[str]) -> None:
        """Notes that a reply's objects are there which its own node has not pushed."""
        with self._lock:
            self._index.came(asked, object_ids)
            self._take_if_whole(asked)

    def _take_if_whole(self, asked: AskedMessage) -> None:
        if asked.state is State.ARRIVING and not asked.missing:
            asked.move(State.TAKEN)
            assert asked.reception is not None, "an arriving reply has one"
            self._on_taken(asked, asked.reception)

    def forget(self, asked: AskedMessage) -> list[str]:
        """Expects nothing more for a reply; its push sessions."""
        with self._lock:
            return self._index.forget(asked)

    def give_up(self, asked: AskedMessage) -> Reception | None:
        """Takes no more of an arriving reply, and returns its reception; None if it is not arriving any more.

        Its push sessions stay known until :meth:`forget`, so that nothing more is pushed in them.
        """
        with self._lock:
            if asked.state is not State.ARRIVING:
                return None
            asked.move(State.REFUSED)
            self._index.came(asked, list(asked.missing))
            return asked.reception

    def settle(self, asked: AskedMessage) -> bool:
        """Ends a reply that was taken or refused; false if the round ended first, and then nobody learns of it."""
        with self._lock:
            if asked.state not in (State.TAKEN, State.REFUSED):
                return False
            asked.move(State.SETTLED)
            return True

    def settle_unread(self, asked: AskedMessage, reply_id: str) -> bool:
        """Ends a message with a reply of which nothing is read; false if it has another reply, or its round is over."""
        with self._lock:
            if not asked.is_unanswered:
                return False
            asked.answer(reply_id, State.SETTLED)
            return True

    def is_cleared(self, asked: AskedMessage) -> bool:
        """True if a message's round is over, and what Flower stores of its reply from now on is for nobody."""
        with self._lock:
            return asked.served.is_cleared

    def is_known(self, asked: AskedMessage, reply_id: str) -> bool:
        """True if a reply to a message of the same round has that id."""
        with self._lock:
            return reply_id in asked.served.replies

    # ------------------------------------------------------------ questions

    def may_push(self, session_id: str) -> bool:
        """False in a push session of a reply that is refused, whatever Flower would say.

        A whole reply's node may push an object again, because the answer was lost: Flower's state knows the answer.
        """
        with self._lock:
            asked = self._index.of_session(session_id)
            return asked is None or asked.state is not State.REFUSED

    def pushing(self, session_id: str, object_id: str) -> list[AskedMessage]:
        """The replies that an object is pushed for, see ``ReplyIndex``."""
        with self._lock:
            return self._index.pushing(session_id, object_id)

    def sender(self, object_id: str, node_id: int) -> AskedMessage | None:
        """The reply of a node that waits for an object, if there is one."""
        with self._lock:
            return self._index.sender(object_id, node_id)

    def session_of(self, object_id: str, node_id: int) -> str | None:
        """The session of a node's push that names none; "" if nobody awaits the object, None: only others do."""
        with self._lock:
            return self._index.session_of(object_id, node_id)

    def arriving(self) -> list[Reception]:
        """The replies that are arriving."""
        with self._lock:
            asked = (one for served in self._rounds for one in served.asked.values())
            return [one.reception for one in asked if one.state is State.ARRIVING and one.reception is not None]

    def unanswered(self, served: ServedRound) -> list[AskedMessage]:
        """A round's messages that Flower's state has, and to which it neither has a reply nor is storing one."""
        with self._lock:
            return [one for one in served.asked.values() if one.state is State.STORED and not one.announcing]

    def silent(self, served: ServedRound, since_s: float) -> list[tuple[AskedMessage, Reception, list[str]]]:
        """A round's arriving replies of which nothing has come since then, and what is missing of each."""
        with self._lock:
            return [
                (one, one.reception, list(one.missing))
                for one in served.asked.values()
                if one.state is State.ARRIVING and one.reception is not None and one.reception.heard_s < since_s
            ]
