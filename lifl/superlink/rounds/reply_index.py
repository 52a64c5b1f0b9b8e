"""Replies that are arriving, by the objects that they wait for and by their push sessions.

Owns that index and nothing else. Not safe for several threads: ``Registry``, which owns it, has the lock.
"""

from __future__ import annotations

from collections.abc import Iterable

from lifl.superlink.rounds.served_round import AskedMessage


class ReplyIndex:
    """The index over all open rounds."""

    def __init__(self) -> None:
        self._by_object: dict[str, list[AskedMessage]] = {}
        self._by_session: dict[str, AskedMessage] = {}

    def __len__(self) -> int:
        return len(self._by_object) + len(self._by_session)

    def expect(self, asked: AskedMessage, missing: set[str], session_id: str) -> None:
        """Notes that a reply is announced, or announced again: `missing` is what its node will push now."""
        self.came(asked, asked.missing - missing)  # others have brought these meanwhile
        asked.missing = missing
        if session_id not in asked.sessions:
            asked.sessions.append(session_id)
        self._by_session[session_id] = asked
        for object_id in missing:
            waiting = self._by_object.setdefault(object_id, [])
            if asked not in waiting:
                waiting.append(asked)

    def came(self, asked: AskedMessage, object_ids: Iterable[str]) -> None:
        """A reply waits for these objects no longer."""
        for object_id in object_ids:
            asked.missing.discard(object_id)
            waiting = self._by_object.get(object_id)
            if waiting is not None and asked in waiting:
                waiting.remove(asked)
                if not waiting:
                    del self._by_object[object_id]

    def forget(self, asked: AskedMessage) -> list[str]:
        """Expects nothing more for a reply; returns its push sessions. Harmless when repeated: there are none then."""
        self.came(asked, list(asked.missing))
        sessions = [one for one in asked.sessions if self._by_session.get(one) is asked]
        asked.sessions = []
        for session_id in sessions:
            del self._by_session[session_id]
        return sessions

    def pushing(self, session_id: str, object_id: str) -> list[AskedMessage]:
        """The replies that an object is pushed for: that of the session, or all that wait if no session is named.

        Replies of other nodes that wait for the same object are not among them: a reply that is settled while its node
        still pushes would have that push refused. SuperNodes from before there were sessions name none.
        """
        if not session_id:
            return list(self._by_object.get(object_id, ()))
        asked = self.of_session(session_id)
        return [] if asked is None else [asked]

    def of_session(self, session_id: str) -> AskedMessage | None:
        """The reply of a push session, if it is one of a round's."""
        return self._by_session.get(session_id)

    def sender(self, object_id: str, node_id: int) -> AskedMessage | None:
        """The reply of a node that waits for an object, if there is one."""
        return next((asked for asked in self._by_object.get(object_id, ()) if asked.node_id == node_id), None)

    def session_of(self, object_id: str, node_id: int) -> str | None:
        """The session of a node's push that names none; "" if nobody awaits the object, None: only others do."""
        if object_id not in self._by_object:
            return ""
        asked = self.sender(object_id, node_id)
        # The last one: Flower ends a reply's earlier session when the reply is announced again.
        return None if asked is None or not asked.sessions else asked.sessions[-1]
