"""A server with a database goes on where a killed one stopped: requests whose answers were lost are answered again.

Owns the list of messages that had been given out and not received when this server started, and the times since when
incomplete replies are withheld. Flower marks a message as delivered before the SuperNode has it, refuses an object that
is pushed a second time, and forgets a reply that its ServerApp has begun to pull: without this room, a SuperNode or a
ServerApp that asks again because its answer was lost gets nothing.
"""

from __future__ import annotations

import time
from logging import WARNING
from typing import Any

from lifl.superlink import flower
from lifl.superlink.store.store import DurableStore

_server = flower.part("server")

# Flower deletes the objects of a message when its SuperNode confirms that it has all of them: while they are there, a
# message that is marked as delivered has not been received.
IS_LOST = """
delivered_at != '' AND message_id IN (SELECT object_id FROM objects)
AND message_id NOT IN (SELECT reply_to_message_id FROM message_res)
"""
FIND = f"SELECT message_id, dst_node_id FROM message_ins WHERE {IS_LOST}"
RELEASE = f"UPDATE message_ins SET delivered_at = '' WHERE message_id = :message_id AND {IS_LOST}"

LOCK = "UPDATE run SET run_id = run_id WHERE run_id = :run_id"
INCOMPLETE = """
SELECT message_res.reply_to_message_id FROM message_res
JOIN object_push_session_roots ON root_object_id = message_res.message_id
JOIN object_push_sessions ON object_push_sessions.session_id = object_push_session_roots.session_id
WHERE pending_count > 0 AND message_res.run_id = :run_id
"""

WITHHELD_S = 200.0
"""Longer than a push session, after which Flower makes an error of a reply that has not come whole."""


def resume(state: Any, store: DurableStore) -> None:
    """Changes a LinkState over a database that another server may have left; before it is used."""
    _accept_again(state, store)
    try:
        found = state.query(FIND)
        state.query(INCOMPLETE, {"run_id": 0})
    except Exception as error:  # Flower has changed its tables
        _server.log(WARNING, "messages whose delivery was interrupted are not delivered again: %r", error)
        return
    _withhold_halves(state)
    lost: dict[int, list[str]] = {}
    for row in found:
        lost.setdefault(row["dst_node_id"], []).append(row["message_id"])
    _deliver_again(state, lost)


def _accept_again(state: Any, store: DurableStore) -> None:
    """Makes the state answer that an object is stored if it is pushed again, for want of an answer."""
    original = state.store_object

    def store_object(run_id: int, session_id: str, object_id: str, object_content: Any) -> bool:
        return original(run_id, session_id, object_id, object_content) or bool(store.get(object_id))

    state.store_object = store_object


def _deliver_again(state: Any, lost: dict[int, list[str]]) -> None:
    """Makes the state give a SuperNode that asks for work the messages that it was given and has not received.

    A SuperNode asks for work only when it is not receiving a message, so no message is given twice at once.
    """
    original = state.get_message_ins

    def get_message_ins(node_id: int, *args: Any, **kwargs: Any) -> Any:
        for message_id in lost.pop(_signed(node_id), ()):
            state.query(RELEASE, {"message_id": message_id})
        return original(node_id, *args, **kwargs)

    state.get_message_ins = get_message_ins


def _withhold_halves(state: Any) -> None:
    """Makes the state give a reply out only when the reply is whole.

    Its SuperNode may not know yet that the reply has been announced, and announces it again: then Flower must still
    have it. And the watcher, which asks for replies to see whether nodes are gone, must not take one that its own round
    receives: a ServerApp that pulls it later would not find it.
    """
    original = state.get_message_res
    since_s: dict[str, float] = {}

    def get_message_res(message_ids: set[str], run_id: int) -> Any:
        run, now_s = {"run_id": _signed(run_id)}, time.monotonic()
        with state.session():  # in which the original goes on
            # Locked before the look: a reply that is announced while the original waits for the database would be
            # given out otherwise.
            state.query(LOCK, run)
            halves = {row["reply_to_message_id"] for row in state.query(INCOMPLETE, run)} & message_ids
            withheld = {one for one in halves if now_s - since_s.setdefault(one, now_s) < WITHHELD_S}
            for message_id in message_ids - withheld:
                since_s.pop(message_id, None)
            return original(message_ids=message_ids - withheld, run_id=run_id)

    state.get_message_res = get_message_res


def _signed(number: int) -> int:
    """An id as a signed number, as a database has it that knows no unsigned ones."""
    return number - 2**64 if number >= 2**63 else number
