"""A server with a database goes on where a killed one stopped: what was being answered is answered again.

Owns which messages had been given out and not received when this server started. Flower marks a message as delivered
before the SuperNode has it, and refuses an object that is pushed a second time; whoever asks again because its answer
was lost would get nothing.
"""

from __future__ import annotations

from logging import WARNING
from typing import Any

from lifl.superlink import flower
from lifl.superlink.store import DurableStore

_server = flower.part("server")

# The objects of a message go when the SuperNode confirms that it has all of them.
IS_LOST = """
delivered_at != '' AND message_id IN (SELECT object_id FROM objects)
AND message_id NOT IN (SELECT reply_to_message_id FROM message_res)
"""
FIND = f"SELECT message_id, dst_node_id FROM message_ins WHERE {IS_LOST}"
RELEASE = f"UPDATE message_ins SET delivered_at = '' WHERE message_id = :message_id AND {IS_LOST}"


def resume(state: Any, store: DurableStore) -> None:
    """Changes a LinkState over a database that another server may have left; before it is used."""
    _accept_again(state, store)
    try:
        found = state.query(FIND)
    except Exception as error:  # Flower has changed its tables
        _server.log(WARNING, "messages whose delivery was interrupted are not delivered again: %r", error)
        return
    lost: dict[int, list[str]] = {}
    for row in found:
        lost.setdefault(row["dst_node_id"], []).append(row["message_id"])
    _deliver_again(state, lost)


def _accept_again(state: Any, store: DurableStore) -> None:
    """An object that is pushed again, for want of an answer, has been stored."""
    original = state.store_object

    def store_object(run_id: int, session_id: str, object_id: str, object_content: Any) -> bool:
        return original(run_id, session_id, object_id, object_content) or bool(store.get(object_id))

    state.store_object = store_object


def _deliver_again(state: Any, lost: dict[int, list[str]]) -> None:
    """A message that a SuperNode was given and has not received is given to it when it asks for work.

    A SuperNode asks for work only when it is not receiving a message, so it does not get one twice.
    """
    original = state.get_message_ins

    def get_message_ins(node_id: int, *args: Any, **kwargs: Any) -> Any:
        for message_id in lost.pop(_signed(node_id), ()):
            state.query(RELEASE, {"message_id": message_id})
        return original(node_id, *args, **kwargs)

    state.get_message_ins = get_message_ins


def _signed(node_id: int) -> int:
    """A node id as a database without unsigned numbers has it."""
    return node_id - 2**64 if node_id >= 2**63 else node_id
