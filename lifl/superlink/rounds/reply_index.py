"""The replies that are on their way: which of them waits for which object, and which push session is of which reply.

Owns that index and nothing else. Not for several threads: ``Rounds``, whose it is, has a lock.
"""

from __future__ import annotations

import time

from lifl.superlink.rounds.incoming_reply import Reception


class Awaited:
    """One server's."""

    def __init__(self) -> None:
        self._by_object: dict[str, list[Reception]] = {}
        self._by_session: dict[str, Reception] = {}

    def __len__(self) -> int:
        return len(self._by_object) + len(self._by_session)

    def expect(self, reception: Reception, missing: set[str], session_id: str) -> None:
        """A reply is announced, or announced again: `missing` is what its client will push now."""
        for object_id in reception.missing - missing:  # others have brought these meanwhile
            self._drop(reception, object_id)
        reception.missing = missing
        self._by_session[session_id] = reception
        for object_id in missing:
            waiting = self._by_object.setdefault(object_id, [])
            if reception not in waiting:
                waiting.append(reception)

    def pushed(self, session_id: str, object_id: str) -> list[Reception]:
        """An object has come; the replies that it was pushed for.

        Not those of other clients that wait for the same object: a reply that is settled while its client still
        pushes would have that push refused. SuperNodes of before there were sessions name none.
        """
        found = self.pushing(session_id, object_id)
        for reception in found:
            reception.heard_s = time.monotonic()
            reception.missing.discard(object_id)
            self._drop(reception, object_id)
        return found

    def pushing(self, session_id: str, object_id: str) -> list[Reception]:
        """The replies that an object is pushed for."""
        if session_id:
            return [self._by_session[session_id]] if session_id in self._by_session else []
        return self.waiting(object_id)

    def waiting(self, object_id: str) -> list[Reception]:
        """The replies that wait for an object."""
        return list(self._by_object.get(object_id, ()))

    def forget(self, reception: Reception) -> list[str]:
        """Nothing more is expected for a reply; harmless when it is said again. Its push sessions."""
        if reception.is_forgotten:
            return []
        reception.is_forgotten = True
        for object_id in reception.missing:
            self._drop(reception, object_id)
        sessions = [s for s, known in self._by_session.items() if known is reception]
        for session_id in sessions:
            del self._by_session[session_id]
        return sessions

    def session_of(self, object_id: str, node_id: int) -> str | None:
        """The session of a node's push that names none; "" if nobody awaits the object, None: only others do."""
        waiting = self.waiting(object_id)
        own = [one for one in waiting if one.message.metadata.src_node_id == node_id]
        return next((s for s, known in self._by_session.items() if known in own), None if waiting else "")

    def _drop(self, reception: Reception, object_id: str) -> None:
        waiting = self._by_object.get(object_id)
        if waiting is not None and reception in waiting:
            waiting.remove(reception)
            if not waiting:
                del self._by_object[object_id]
