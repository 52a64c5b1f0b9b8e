"""A round as its Node, its loans and the server use it: the part behind ``lifl.round.round.Round``.

Opens the round, decides which updates are accepted at the door, and gives everything back at the end. The course of the
round between the two is the business of ``lifl.round.lifecycle``.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

from lifl.errors import AdmissionError, LeaseError, RoundError
from lifl.report.entries import Rejection
from lifl.report.report import RoundReport
from lifl.report.result import RoundResult
from lifl.round import admission
from lifl.round.blocks import Assignment
from lifl.round.clients import Clients
from lifl.round.host import WAIT_CAP_S, Host, deadline_of
from lifl.round.lifecycle import Lifecycle, Phase
from lifl.round.loan import Loan, copy_in, look_for_nonfinite
from lifl.round.quota import Quota
from lifl.round.record import Update
from lifl.round.settings import Terms
from lifl.shm.arena import Block, Lease
from lifl.tensor import TensorSpec

CLOSE_TIMEOUT_S = 30.0
"""Workers have so long to let go of a round that is closed before its result."""


class RoundCore:
    """An open round. Safe to use from several threads; the Node's lock guards all that is mutable in it.

    The constructor opens the round: it waits until memory is free for the round's sums and its mean, and takes that
    memory. The caller holds ``host.changed``, enters the round into the host's books, and then calls
    :meth:`engage_leaves`: a leaf that dies at once is then a death in this round.

    Attributes
    ----------
    number : int
        The round's number, unique in its Node.
    terms : Terms
    lifecycle : Lifecycle
    quota : Quota

    Raises
    ------
    ShmError
        ENOSPC if the memory is not free and nothing will come free.
    """

    def __init__(self, host: Host, terms: Terms) -> None:
        Assignment.wait_for_room(host, terms)
        # The wait lets go of the lock, so the number is taken after it.
        self._host = host
        self.terms = terms
        self.number = host.next_number()
        self._clients = Clients()
        blocks = Assignment(host, self.number, terms)
        self.quota = Quota(host, terms.limits, terms.layout.update_bytes, self._clients, blocks)
        self.lifecycle = Lifecycle(host, self.number, terms, blocks, self._clients)

    def engage_leaves(self) -> None:
        """Engages the leaves that the terms ask for. The caller holds ``host.changed``."""
        self.lifecycle.enlist(0 if self.terms.shape is None else self.terms.shape.leaves)

    @property
    def spec(self) -> TensorSpec:
        """The form of an update."""
        return self.terms.spec

    # ------------------------------------------------------------ updates in

    def submit(self, arrays: Mapping[str, Any], weight: float, client_id: object, timeout: float | None) -> None:
        """Copies one update into the arena and counts it; see :meth:`lifl.Round.submit`."""
        name = self._name(client_id)
        try:
            weight = admission.check_weight(name, weight, self.terms.limits.max_weight)
            admission.check_arrays(name, self.spec, arrays)
        except AdmissionError as error:
            self._reject(error)
            raise
        with self._lend(name, timeout, is_copy=True) as loan:
            begin = time.monotonic()
            try:
                copy_in(self.spec, arrays, loan)
                clipped = self._clipped(loan)
                self._count(loan, weight, clipped, begin)
            except AdmissionError as refusal:
                self._reject(refusal)
                raise

    def loan(self, client_id: object, timeout: float | None) -> Loan:
        """Lends room for one update; see :meth:`lifl.Round.loan`."""
        return self._lend(self._name(client_id), timeout, is_copy=False)

    def _lend(self, client_id: str, timeout: float | None, is_copy: bool) -> Loan:
        with self._locked():
            try:
                block = self.quota.take_block(client_id, timeout, lambda: self._check_open(client_id))
            except AdmissionError as error:
                self._reject(error)
                raise
            self._clients.enter(client_id, is_copy)
        return Loan(self, client_id, Lease(self._host.arena, block))

    def _clipped(self, loan: Loan) -> float:
        factor = 1.0 if self.terms.clip is None else self.terms.clip.apply(loan.arrays)
        if factor == 0:
            raise admission.refuse_norm(loan.client_id)
        return factor

    def _reject(self, error: AdmissionError) -> None:
        """Puts a refusal into the report."""
        with self._locked():
            self.lifecycle.books.reject(Rejection(error.client_id, error.rule, error.reason))

    def _name(self, client_id: object) -> str:
        if client_id is not None:
            return str(client_id)
        with self._locked():
            return self._clients.next_name()

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Holds the host's lock.

        In a fork a thread that does not exist there may hold it for ever, so a fork is refused first.
        """
        if self._host.is_foreign:
            self._host.check_workers()
        with self._host.changed:
            self._clients.tidy()
            yield

    def dropped(self, client_id: str) -> None:
        """Notes that a loan was collected unsent. The garbage collector may call this at any moment: no lock."""
        self._clients.drop(client_id)

    def _check_open(self, client_id: str) -> None:
        if client_id in self._clients:
            reason = "an update of this client is in the round: the first one counts"
            raise AdmissionError(client_id, "duplicate", reason)
        self._check_phase(client_id)

    def _check_phase(self, client_id: str) -> None:
        self._host.check_workers()
        if (phase := self.lifecycle.phase) is not Phase.OPEN:
            state = "complete" if phase.is_ending or phase is Phase.DONE else phase
            raise AdmissionError(client_id, "closed", f"round {self.number} is {state}: open another one")

    def returned(self, loan: Loan) -> None:
        """Takes note of a loan that ended unsent: its client may try again."""
        with self._locked():
            self._clients.leave(loan.client_id)
            self._host.changed.notify_all()

    def take_back(self, loan: Loan, weight: float) -> None:
        """Takes a loan that was written in place: looks for NaN and Inf, clips it, counts it (see ``Loan.send``)."""
        if not loan.lease.is_live:
            raise LeaseError("the loan has been sent or released before")
        begin = time.monotonic()
        try:
            look_for_nonfinite(self.spec, loan)
            weight = admission.check_weight(loan.client_id, weight, self.terms.limits.max_weight)
            self._count(loan, weight, self._clipped(loan), begin)
        except AdmissionError as refusal:
            self._reject(refusal)
            loan.abandon()
            raise

    def _count(self, loan: Loan, weight: float, clipped: float, begin: float) -> None:
        host, block = self._host, loan.lease.block
        with self._locked():
            self._check_phase(loan.client_id)
            update = Update(loan.client_id, weight, block, self.lifecycle.books.now_s(), clipped)
            update.landed_s = begin - self.lifecycle.books.opened_s
            host.arena.note(block.index).weight = weight
            loan.hand_over()
            self._clients.count(loan.client_id)
            self.lifecycle.count(update)
        host.pump()

    # ------------------------------------------------------------ the result

    def close_early(self) -> None:
        """Takes no more updates; see :meth:`lifl.Round.close_early`."""
        with self._locked():
            if self.lifecycle.phase is Phase.OPEN:
                if self.lifecycle.books.updates:
                    self.lifecycle.flush()
                else:
                    self.lifecycle.fail(
                        RoundError(f"round {self.number} was closed without an update{self.lifecycle.books.refusals()}")
                    )
        self._host.pump()

    def result(self, timeout: float | None) -> RoundResult:
        """Waits for the mean; see :meth:`lifl.Round.result`."""
        deadline = deadline_of(timeout)
        with self._locked():
            while self.lifecycle.phase.is_running:
                self._host.check_workers()
                left = WAIT_CAP_S if deadline is None else deadline - time.monotonic()
                if left <= 0:
                    have = f"{len(self.lifecycle.books.updates)} of {self.terms.expected} updates are in"
                    advice = "wait longer, or call close_early() for what is there"
                    raise RoundError(
                        f"round {self.number}: {have} after {timeout:g} s; {advice}{self.lifecycle.books.refusals()}"
                    )
                self._host.changed.wait(min(left, WAIT_CAP_S))
            self.lifecycle.add_prediction()
            if self.lifecycle.result is None:
                raise self.lifecycle.error or RoundError(f"round {self.number} is closed")
            return self.lifecycle.result

    @property
    def mean(self) -> Block:
        """The block that holds the mean; valid as long as a view of a result's arrays is held."""
        return self.lifecycle.mean

    @property
    def mean_buffer(self) -> Any:
        """The memory of :attr:`mean`, which stays in the arena as long as a view of it is held."""
        return memoryview(self._host.arena.buffer(self.mean))

    def report(self) -> RoundReport:
        """The report as it stands now; see :meth:`lifl.Round.report`."""
        with self._locked():
            return self.lifecycle.report()

    # ------------------------------------------------------------ the end

    def close(self) -> None:
        """Ends the round and gives every block back; see :meth:`lifl.Round.close`."""
        host = self._host
        if host.is_foreign:
            return
        with self._locked():
            if self.lifecycle.phase is Phase.CLOSED:
                return
            is_done = self.lifecycle.phase is Phase.DONE
            if not is_done:
                self.lifecycle.fail(RoundError(f"round {self.number} was closed before its result"))
                self.lifecycle.abort()
        if not is_done:
            host.pump()
            self._reclaim_all()
        with self._locked():
            self.lifecycle.close()
            host.forget(self.number)
            host.changed.notify_all()

    def _reclaim_all(self) -> None:
        """Waits until no worker touches the round any more, then reclaims what it had."""
        host, deadline = self._host, time.monotonic() + CLOSE_TIMEOUT_S
        with self._locked():
            while not self.lifecycle.is_let_go:
                try:
                    host.check_workers()
                except Exception:
                    return  # a worker is lost, and so the Node is: nothing is reclaimed from the living workers
                if time.monotonic() > deadline:
                    raise RoundError(f"round {self.number}: workers did not let go of it in {CLOSE_TIMEOUT_S:g} s")
                host.changed.wait(WAIT_CAP_S)
            held = self.lifecycle.take_all()
            # A sum that was on its way to the top when the top let go comes free a moment later.
            while (held := [block for block in held if not host.arena.reclaim(block)]) and time.monotonic() < deadline:
                host.changed.wait(0.001)

    def __repr__(self) -> str:
        count = len(self.lifecycle.books.updates)
        return f"<Round {self.number}: {count} of {self.terms.expected} updates, {self.lifecycle.phase.shown}>"
