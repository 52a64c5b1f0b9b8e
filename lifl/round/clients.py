"""The clients that take part in a round: each has an update in it, or a loan. No arena, no lock."""

from __future__ import annotations

import threading
from collections import deque

import attrs


@attrs.frozen
class _Loan:
    """A loan that a client has: the thread that asked for it, and whether a submit copies into it."""

    thread: int
    is_copy: bool


class Clients:
    """The clients of one round. The caller holds the Node's lock, but for :meth:`drop`."""

    def __init__(self) -> None:
        self._clients: set[str] = set()  # with an accepted update, or a loan
        self._loans: dict[str, _Loan] = {}
        self._unnamed: set[str] = set()
        self._dropped: deque[str] = deque()

    def next_name(self) -> str:
        """A new name for an update without a client: #1, #2 and so on."""
        name = f"#{len(self._unnamed) + 1}"
        self._unnamed.add(name)
        return name

    def is_unnamed(self, client_id: str) -> bool:
        """True for a name from :meth:`next_name`, which names another client in each round."""
        return client_id in self._unnamed

    def __contains__(self, client_id: object) -> bool:
        return client_id in self._clients

    def enter(self, client_id: str, is_copy: bool) -> None:
        """Notes a loan for the client by the calling thread; a submit copies into the loan if `is_copy`."""
        self._clients.add(client_id)
        self._loans[client_id] = _Loan(threading.get_ident(), is_copy)

    def count(self, client_id: str) -> None:
        """Notes that the client's loan has become an update."""
        del self._loans[client_id]

    def leave(self, client_id: str) -> None:
        """Notes that the client's loan ended unsent, or its update was refused: the client may try again."""
        self._loans.pop(client_id, None)
        self._clients.discard(client_id)

    def drop(self, client_id: str) -> None:
        """Notes that the client's loan was collected unsent; :meth:`tidy` takes it off. Takes no lock."""
        self._dropped.append(client_id)  # one step of the interpreter, safe in the garbage collector

    def tidy(self) -> None:
        """Takes dropped loans off."""
        while self._dropped:
            self.leave(self._dropped.popleft())

    def has_loan(self, client_id: str) -> bool:
        """True while the client has a loan."""
        return client_id in self._loans

    @property
    def num_loans(self) -> int:
        """The number of loans that clients have."""
        return len(self._loans)

    @property
    def is_copying(self) -> bool:
        """True while a submit copies: such a loan ends by itself."""
        return any(loan.is_copy for loan in self._loans.values())

    @property
    def others_hold_loans(self) -> bool:
        """True if a thread other than the calling one holds a loan, and may give it back."""
        return any(loan.thread != threading.get_ident() for loan in self._loans.values())
