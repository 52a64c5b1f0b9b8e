"""The thread that looks for nodes that are gone, so that a round does not wait for them.

Owns that thread. Flower makes an error reply for a message whose node is offline, but only when somebody asks for the
reply; and it ends the push session of a reply that stays incomplete, but only when somebody asks for the object.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from logging import ERROR
from typing import Any

from flwr.app import Error
from flwr.app.message import make_message

from lifl.superlink import flower
from lifl.superlink.rounds.incoming_reply import Settled
from lifl.superlink.rounds.outgoing import Outgoing
from lifl.superlink.rounds.registry import Registry
from lifl.superlink.rounds.served_round import AskedMessage, ServedRound
from lifl.superlink.store.store import Store

_names, _server = flower.part("rounds"), flower.part("server")

WATCH_S = 1.0
"""Seconds between two looks."""

IDLE_S = 10.0
"""A reply of which nothing came for so long is looked at: its push session may be over."""


class Watcher:
    """The watcher of one server's rounds.

    Parameters
    ----------
    state : LinkState
        Flower's.
    give_up : Callable
        Ends a message whose reply is arriving and does not become whole, see ``Rounds``.
    """

    def __init__(
        self,
        registry: Registry,
        outgoing: Outgoing,
        store: Store,
        state: Any,
        give_up: Callable[[AskedMessage, Settled], None],
    ) -> None:
        self._registry, self._outgoing, self._store, self._state = registry, outgoing, store, state
        self._give_up = give_up
        self._stop = threading.Event()
        # Started by `start`, ended by `close`, which does not wait: a database may hold the thread up for long.
        self._thread = threading.Thread(target=self._run, name="lifl-watch", daemon=True)

    def start(self) -> None:
        """Begins to look."""
        self._thread.start()

    def close(self) -> None:
        """Ends the thread after its present look."""
        self._stop.set()

    def _run(self) -> None:
        while not self._stop.wait(WATCH_S):
            try:
                self._outgoing.forget_stale()
            except Exception as error:
                _server.log(ERROR, "messages that their ServerApps gave up could not be forgotten: %r", error)
            for served in self._registry.rounds():
                try:
                    self._look_for_errors(served)
                    self._look_for_broken(served)
                except Exception as error:
                    _server.log(ERROR, "nodes of a round could not be looked after: %r", error)

    def _look_for_errors(self, served: ServedRound) -> None:
        """Messages whose nodes are gone: Flower has an error reply for each."""
        # Without those that are being stored: of these Flower would say that they never existed.
        unanswered = {asked.message_id: asked for asked in self._registry.unanswered(served)}
        if not unanswered:
            return
        for message in self._state.get_message_res(message_ids=set(unanswered), run_id=served.announced.run_id):
            # A reply without an error came this moment, and is received as any other.
            if message.has_error():
                meta = message.metadata
                asked = unanswered[meta.reply_to_message_id]
                if self._registry.settle_unread(asked, meta.message_id):
                    served.on_settled(Settled(asked.client, message, {}, None))

    def _look_for_broken(self, served: ServedRound) -> None:
        """Replies whose push session is over before they are whole: an error, as Flower's grid makes of them."""
        for asked, reception, missing in self._registry.silent(served, time.monotonic() - IDLE_S):
            object_id = next((one for one in missing if self._store.is_wanted(one)), None)
            if object_id is None:
                self._registry.brought(asked, missing)
                continue
            # Flower ends a session that is too old, and deletes the reply, when an object of the session is asked for.
            if self._state.get_object(served.announced.run_id, object_id) is None:
                error = Error(_names.ErrorCode.MESSAGE_UNAVAILABLE, "the reply was announced and has not come whole")
                message = make_message(metadata=reception.message.metadata, error=error)
                self._give_up(asked, Settled(reception.client, message, {}, None))
