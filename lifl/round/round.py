"""One round as its owner sees it: open, submit or loan, result, closed.

Decides who is accepted and refused at the door; how the round goes on is its Lifecycle's business.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from lifl.errors import AdmissionError, LeaseError, RoundError
from lifl.report.entries import Rejection
from lifl.report.report import RoundReport
from lifl.report.result import RoundResult
from lifl.round import admission
from lifl.round.blocks import Assignment
from lifl.round.clients import Roster
from lifl.round.host import WAIT_CAP_S, Host
from lifl.round.intake import copy_in, look_for_nonfinite
from lifl.round.lifecycle import Lifecycle
from lifl.round.loan import Loan
from lifl.round.pacing import Pace
from lifl.round.quota import Quota
from lifl.round.record import Update
from lifl.round.settings import Terms
from lifl.shm.arena import Block, Lease

CLOSE_TIMEOUT_S = 30.0


class Round:
    """An open round. Made by :meth:`lifl.Node.open_round`; a context manager that closes it.

    Safe to use from several threads.
    """

    def __init__(self, host: Host, number: int, terms: Terms, assignment: Assignment, pace: Pace) -> None:
        self._host, self.number = host, number
        self.spec, self.expected, self.timing, self.order = terms.spec, terms.expected, terms.timing, terms.order
        self.limits, self._clip, self._roster = terms.limits, terms.clip, Roster()
        self.quota = Quota(host, terms.limits, terms.spec.layout.update_bytes, self._roster, assignment)
        self.lifecycle = Lifecycle(host, number, terms, assignment, pace, self._roster)

    # ------------------------------------------------------------ updates in

    def submit(
        self,
        arrays: Mapping[str, Any],
        weight: float = 1.0,
        client_id: object = None,
        *,
        timeout: float | None = None,
    ) -> None:
        """Copies one update into the arena, looking for NaN and Inf on the way, and hands it on.

        Parameters
        ----------
        arrays : mapping of str to array
            NumPy arrays or torch tensors with exactly the spec's names, shapes and dtypes.
        weight : float
            Finite, above 0; usually the client's number of examples.
        client_id : object
            Named in refusals and in the report by its ``str``; one update of each client counts. Without
            one, the update is numbered.
        timeout : float or None
            Seconds to wait for room in the arena; ``None`` waits as long as room can still come free.

        Raises
        ------
        AdmissionError
            If it is refused; the round goes on.
        ShmError
            If the arena stays full.
        """
        who = self._name(client_id)
        try:
            weight = admission.check_weight(who, weight, self.limits.max_weight)
            admission.check_arrays(who, self.spec, arrays)
        except AdmissionError as error:
            self.reject(error)
            raise
        with self._lend(who, timeout, is_copy=True) as loan:
            begin = time.monotonic()
            try:
                copy_in(self.spec, arrays, loan)
                clipped = self._clipped(loan)
                self._count(loan, weight, clipped, begin)
            except AdmissionError as refusal:
                self.reject(refusal)
                raise

    def loan(self, client_id: object = None, *, timeout: float | None = None) -> Loan:
        """Room for one update, to be written in place: see :class:`Loan`.

        Waits while the arena is full and room can come free; `timeout` in seconds bounds that.

        Raises
        ------
        AdmissionError
            If the client has an update in the round, a quota is used up, or the round is complete.
        ShmError
            ENOSPC if the arena stays full.
        """
        return self._lend(self._name(client_id), timeout, is_copy=False)

    def _lend(self, who: str, timeout: float | None, is_copy: bool) -> Loan:
        with self._locked():
            try:
                block = self.quota.take_block(who, timeout, lambda: self._check_open(who))
            except AdmissionError as error:
                self.reject(error)
                raise
            self._roster.enter(who, is_copy)
        return Loan(self, who, Lease(self._host.arena, block))

    def _clipped(self, loan: Loan) -> float:
        factor = 1.0 if self._clip is None else self._clip.apply(loan.arrays)
        if factor == 0:
            raise admission.refuse_norm(loan.client_id)
        return factor

    def reject(self, error: AdmissionError) -> None:
        """Puts a refusal into the report, also one decided elsewhere (an error reply, a bad format)."""
        with self._locked():
            self.lifecycle.books.reject(Rejection(error.client_id, error.rule, error.reason))

    def _name(self, client_id: object) -> str:
        if client_id is not None:
            return str(client_id)
        with self._locked():
            return self._roster.next_name()

    def _locked(self) -> threading.Condition:
        """The host's lock. In a fork it may be held by a thread that is not there, so that is told first."""
        if self._host.is_foreign:
            self._host.check_workers()
        self._roster.tidy()
        return self._host.changed

    def dropped(self, client_id: str) -> None:
        """A loan was collected unsent; may be called by the garbage collector at any moment."""
        self._roster.drop(client_id)

    def _check_open(self, who: str) -> None:
        if who in self._roster:
            raise AdmissionError(who, "duplicate", "an update of this client is in the round: the first one counts")
        self._check_phase(who)

    def _check_phase(self, who: str) -> None:
        self._host.check_workers()
        if self.lifecycle.phase != "open":
            state = "complete" if self.lifecycle.phase in ("folding", "done") else self.lifecycle.phase
            raise AdmissionError(who, "closed", f"round {self.number} is {state}: open another one")

    def returned(self, loan: Loan) -> None:
        """A loan ended unsent: its client may try again."""
        with self._locked():
            self._roster.leave(loan.client_id)
            self._host.changed.notify_all()

    def take_back(self, loan: Loan, weight: float) -> None:
        """A loan was written in place: looks for NaN and Inf, clips, then counts it (see ``Loan.send``)."""
        if not loan.lease.is_live:
            raise LeaseError("the loan has been sent or released before")
        begin = time.monotonic()
        try:
            look_for_nonfinite(self.spec, loan)
            weight = admission.check_weight(loan.client_id, weight, self.limits.max_weight)
            self._count(loan, weight, self._clipped(loan), begin)
        except AdmissionError as refusal:
            self.reject(refusal)
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
            self._roster.count(loan.client_id)
            self.lifecycle.count(update)
        host.pump()

    # ------------------------------------------------------------ the result

    def close_early(self) -> None:
        """Takes no more updates: the result is made of those that are in. Harmless when complete."""
        with self._locked():
            if self.lifecycle.phase == "open":
                if self.lifecycle.books.updates:
                    self.lifecycle.flush()
                else:
                    self.lifecycle.fail(
                        RoundError(f"round {self.number} was closed without an update{self.lifecycle.books.refusals()}")
                    )
        self._host.pump()

    def result(self, timeout: float | None = None) -> RoundResult:
        """Waits until `expected` updates are in and folded, or the round was closed early.

        Parameters
        ----------
        timeout : float or None
            Seconds; ``None`` waits for ever. Ctrl-C ends the wait.

        Raises
        ------
        RoundError
            At the time-out (the round stays open), if no update was accepted, if a mean overflowed,
            or if the round was closed.
        PeerGoneError
            If a worker died and could not be replaced.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._locked():
            while self.lifecycle.phase in ("open", "folding"):
                self._host.check_workers()
                left = WAIT_CAP_S if deadline is None else deadline - time.monotonic()
                if left <= 0:
                    have = f"{len(self.lifecycle.books.updates)} of {self.expected} updates are in"
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
        """Where the mean lies: valid as long as a view of a result's arrays is held."""
        return self.lifecycle.mean

    @property
    def mean_buffer(self) -> Any:
        """The memory of :attr:`mean`, which stays in the arena as long as a view of it is held."""
        return memoryview(self._host.arena.buffer(self.mean))

    def report(self) -> RoundReport:
        """The books as they stand now; final once there is a result."""
        with self._locked():
            return self.lifecycle.report()

    # ------------------------------------------------------------ the end

    def close(self) -> None:
        """Ends the round, with or without a result, and gives every block back. Harmless when closed.

        Loans that are still out end at their ``send`` or ``release``. The result stays valid.
        """
        host = self._host
        if host.is_foreign:
            return
        with self._locked():
            if self.lifecycle.phase == "closed":
                return
            is_done = self.lifecycle.phase == "done"
            if not is_done:
                self.lifecycle.fail(RoundError(f"round {self.number} was closed before its result"))
                self.lifecycle.abort()
        if not is_done:
            host.pump()
            self._take_back()
        with self._locked():
            self.lifecycle.phase = "closed"
            self.lifecycle.result = None  # who asked for it has it; a kept Round must not pin its memory
            host.forget(self.number)
            host.changed.notify_all()

    def _take_back(self) -> None:
        """Waits until no worker touches the round any more, then reclaims what it had."""
        host, deadline = self._host, time.monotonic() + CLOSE_TIMEOUT_S
        with self._locked():
            while not self.lifecycle.is_let_go:
                try:
                    host.check_workers()
                except Exception:
                    return  # a worker is gone, and with it the Node: nothing is reclaimed from the living
                if time.monotonic() > deadline:
                    raise RoundError(f"round {self.number}: workers did not let go of it in {CLOSE_TIMEOUT_S:g} s")
                host.changed.wait(WAIT_CAP_S)
            held = self.lifecycle.take_all()
            # A sum that was on its way to the top when that let go comes free a moment later.
            while (held := [block for block in held if not host.arena.reclaim(block)]) and time.monotonic() < deadline:
                host.changed.wait(0.001)

    def __enter__(self) -> Round:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        count = len(self.lifecycle.books.updates)
        return f"<Round {self.number}: {count} of {self.expected} updates, {self.lifecycle.phase}>"
