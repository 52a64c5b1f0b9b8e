"""The part of the arena that a round's clients may hold, and the one way for a client to get a block of it."""

from __future__ import annotations

import time
from collections.abc import Callable

from lifl.errors import AdmissionError
from lifl.round import admission
from lifl.round.admission import Limits
from lifl.round.blocks import Assignment
from lifl.round.clients import Clients
from lifl.round.host import WAIT_CAP_S, Host, deadline_of, wait_for_block
from lifl.shm.arena import Block
from lifl.shm.sizes import units_of


class Quota:
    """The quotas of one round. Each question counts anew, from the loans and the updates that are not folded.

    The caller holds the host's lock.
    """

    def __init__(self, host: Host, limits: Limits, update_bytes: int, clients: Clients, work: Assignment) -> None:
        self._host, self._limits, self._update_bytes = host, limits, update_bytes
        self._clients, self._work = clients, work

    def held_by(self, client_id: str) -> int:
        """Bytes of the arena that the loan or the update of a client takes."""
        if client_id not in self._clients:
            return 0
        updates = sum(update.client_id == client_id for update in self._work.updates.values())
        return (self._clients.has_loan(client_id) + updates) * units_of(self._update_bytes)

    @property
    def held(self) -> int:
        """Bytes of the arena that all loans and updates of the round take."""
        return (self._clients.num_loans + len(self._work.updates)) * units_of(self._update_bytes)

    def take_block(self, client_id: str, timeout: float | None, check: Callable[[], None]) -> Block:
        """A block for one more update of a client, as soon as there is room and the quotas have some.

        `check` raises if the client may not have a block; it is called before and after each wait.

        Raises :class:`AdmissionError` (``quota``) at once if only clients can give back what is missing: the blocks of
        this client, and loans. For updates that are being copied or folded it waits, up to `timeout` seconds.
        """
        deadline = deadline_of(timeout)
        while True:
            check()
            self._wait_for_share(client_id, deadline, check)
            if deadline is not None and self._limits.total_bytes is not None:
                timeout = max(0.0, deadline - time.monotonic())
            block = wait_for_block(self._host, self._update_bytes, timeout, f"an update of client {client_id}")
            try:
                check()
            except AdmissionError:
                self._host.arena.reclaim(block)
                raise
            if self._client_refusal(client_id) is None and self._share_refusal(client_id) is None:
                return block
            # The wait for the block let go of the lock, and others were faster: the quotas are asked again.
            self._host.arena.reclaim(block)

    def _client_refusal(self, client_id: str) -> AdmissionError | None:
        bound = self._limits.client_bytes
        if bound is None:
            return None
        held = 0 if self._clients.is_unnamed(client_id) else self._host.held_by(client_id)
        return admission.refuse_quota(client_id, "the client", held, units_of(self._update_bytes), bound)

    def _share_refusal(self, client_id: str) -> AdmissionError | None:
        bound = self._limits.total_bytes
        if bound is None:
            return None
        return admission.refuse_quota(client_id, "the round", self.held, units_of(self._update_bytes), bound)

    def _wait_for_share(self, client_id: str, deadline: float | None, check: Callable[[], None]) -> None:
        if (refusal := self._client_refusal(client_id)) is not None:
            raise refusal
        while self._share_refusal(client_id) is not None:
            self._work.press()
            self._host.pump()
            if (refusal := self._share_refusal(client_id)) is None:
                return
            left = WAIT_CAP_S if deadline is None else deadline - time.monotonic()
            if left <= 0 or not (self._work.is_busy or self._clients.is_copying):
                raise refusal
            self._host.changed.wait(min(left, WAIT_CAP_S))
            check()
