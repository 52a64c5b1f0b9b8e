"""The rules for what a SuperNode announces: its own reply to a message that it was sent, within bounds.

Flower stores a message without looking who sends it. So a node could send messages in the SuperLink's name, which a
round would take for its own, or reply in another node's name. Owns nothing but the change to Flower's handler.
"""

from __future__ import annotations

from collections.abc import Callable
from logging import WARNING
from typing import Any

from lifl.superlink import flower
from lifl.superlink.store.store import MAX_OBJECTS, count_of

_names, _server = flower.part("gateway"), flower.part("server")

MAX_TEXT = 1000
"""Characters of an id, a type or a group in a message."""

MAX_ID = 64

MAX_REASON = 2**16
"""Characters of the reason in an error reply."""

_MARK = "_is_guarded_by_lifl"


def guard(handlers: Any) -> None:
    """Makes the Fleet API's ``push_messages`` check announcements; harmless when done before."""
    original: Callable[..., Any] = handlers.push_messages
    if hasattr(original, _MARK):
        return

    def push_messages(request: Any, state: Any) -> Any:
        reason = why_not(request)
        if reason is None:
            return original(request=request, state=state)
        _server.log(WARNING, "A message of node %s is not taken: %s", request.node.node_id, reason)
        return _names.PushMessagesResponse()  # asks for no object, as for a message that Flower does not take

    setattr(push_messages, _MARK, True)
    handlers.push_messages = push_messages


def why_not(request: Any) -> str | None:
    """The reason why a push-messages request is not passed on; None if it is."""
    # SuperNodes announce one reply at a time, and Flower reads only the first: others are counted, and not read.
    if (count := max(len(request.messages_list), len(request.message_object_trees))) > 1:
        return f"{count:,} messages or trees in one request, where one of each is taken"
    for message in request.messages_list:
        meta = message.metadata
        if not meta.reply_to_message_id:
            return "it is no reply"
        if meta.src_node_id != request.node.node_id:
            return f"it says that it is of node {meta.src_node_id}"
        texts = (meta.message_id, meta.reply_to_message_id, meta.group_id, meta.message_type)
        if (longest := max(map(len, texts))) > MAX_TEXT:
            return f"an id, a type or a group of {longest:,} characters"
        if (length := len(message.error.reason)) > MAX_REASON:
            return f"an error with a reason of {length:,} characters: send at most {MAX_REASON:,}"
    for message, tree in zip(request.messages_list, request.message_object_trees, strict=False):
        if tree.object_id != message.metadata.message_id:
            return f"its tree is that of {tree.object_id[:MAX_ID]!r}, it is {message.metadata.message_id[:MAX_ID]!r}"
        if count_of(tree, MAX_OBJECTS) > MAX_OBJECTS:
            return f"more than {MAX_OBJECTS:,} objects"
    return None
