"""One round as its owner sees it: open, submit or loan, result, closed.

Decides who is accepted and refused, and keeps the books; who has its blocks is its Assignment's business.
It starts no process and reads no ring; its host (a Node) carries descriptors to and from it, with the host's
lock held.
"""

from __future__ import annotations

import errno
import math
import threading
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Literal

from lifl import admission, fold
from lifl.assignment import Assignment
from lifl.books import Books, Update
from lifl.errors import AdmissionError, ArenaCorruptError, LeaseError, RoundError
from lifl.host import WAIT_CAP_S, Host
from lifl.intake import copy_in, look_for_nonfinite
from lifl.loan import Loan
from lifl.metrics import Rejection, RoundReport
from lifl.quota import Quota
from lifl.result import RoundResult
from lifl.ring import Descriptor, Kind
from lifl.roster import Roster
from lifl.shm import Lease
from lifl.terms import Terms

CLOSE_TIMEOUT_S = 30.0
MOST_DEATHS = 2


class Round:
    """An open round. Made by :meth:`lifl.Node.open_round`; a context manager that closes it.

    Safe to use from several threads.
    """

    def __init__(self, host: Host, number: int, terms: Terms, assignment: Assignment) -> None:
        self._host, self.number, self._assignment = host, number, assignment
        self.spec, self.expected, self.timing, self.order = terms.spec, terms.expected, terms.timing, terms.order
        self.limits, self._clip, self._roster = terms.limits, terms.clip, Roster()
        self.quota = Quota(host, terms.limits, terms.spec.layout.update_bytes, self._roster, assignment)
        self._phase: Literal["open", "folding", "done", "failed", "closed"] = "open"
        self._error: Exception | None = None
        self._books = Books()
        self._acks: set[int] = set()
        self._is_ended = False  # the top has said so; every leaf may not have been heard yet
        self._result: RoundResult | None = None

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
                self._books.land_s += time.monotonic() - begin
                self._count(loan, weight, clipped)
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
            self._books.rejected.append(Rejection(error.client_id, error.rule, error.reason))

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
        if self._phase != "open":
            state = "complete" if self._phase in ("folding", "done") else self._phase
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
        try:
            look_for_nonfinite(self.spec, loan)
            weight = admission.check_weight(loan.client_id, weight, self.limits.max_weight)
            self._count(loan, weight, self._clipped(loan))
        except AdmissionError as refusal:
            self.reject(refusal)
            loan.abandon()
            raise

    def _count(self, loan: Loan, weight: float, clipped: float) -> None:
        host, block = self._host, loan.lease.block
        with self._locked():
            self._check_phase(loan.client_id)
            update = Update(loan.client_id, weight, block, self._books.now_s(), clipped)
            note = host.arena.note(block.index)
            note.weight, note.tag = weight, len(self._books.updates)
            loan.hand_over()
            self._roster.count(loan.client_id)
            self._books.updates.append(update)
            self._assignment.add(update)
            if self.order == "any":
                self._assignment.give(update)
            if len(self._books.updates) == self.expected:
                self._flush()
        host.pump()

    def press(self) -> None:
        """Makes lazy leaves fold what they hold, because memory is short. The host holds the lock."""
        self._assignment.press()

    @property
    def is_moving(self) -> bool:
        """True if blocks of this round will come free while this thread waits. The host holds the lock."""
        return self._phase == "folding" or self._assignment.is_busy or self._roster.others_hold_loans

    @property
    def waits_for_workers(self) -> bool:
        """True while a worker owes this round something. The host holds the lock."""
        return self._phase in ("folding", "failed") or self._assignment.is_busy

    def _flush(self) -> None:
        """Everything that will come has come: commit, send to the top, finish."""
        self._phase = "folding"
        if self.order == "flower":
            factors = fold.flower_factors([u.weight for u in self._books.updates])
            for update, factor in zip(self._books.updates, factors, strict=True):
                self._host.arena.note(update.block.index).weight = factor
                self._assignment.give(update)
        self._assignment.flush()

    # ------------------------------------------------------------ the result

    def close_early(self) -> None:
        """Takes no more updates: the result is made of those that are in. Harmless when complete."""
        with self._locked():
            if self._phase == "open":
                if self._books.updates:
                    self._flush()
                else:
                    self.fail(RoundError(f"round {self.number} was closed without an update{self._books.refusals()}"))
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
            while self._phase in ("open", "folding"):
                self._host.check_workers()
                left = WAIT_CAP_S if deadline is None else deadline - time.monotonic()
                if left <= 0:
                    have = f"{len(self._books.updates)} of {self.expected} updates are in"
                    advice = "wait longer, or call close_early() for what is there"
                    raise RoundError(
                        f"round {self.number}: {have} after {timeout:g} s; {advice}{self._books.refusals()}"
                    )
                self._host.changed.wait(min(left, WAIT_CAP_S))
            if self._result is None:
                raise self._error or RoundError(f"round {self.number} is closed")
            return self._result

    def report(self) -> RoundReport:
        """The books as they stand now; final once there is a result."""
        with self._locked():
            return self._books.report(self.number, self.expected, self.timing, self.order, self._error)

    # ------------------------------------------------------------ what workers say; the host holds the lock

    def handle(self, sender: int, d: Descriptor) -> None:
        """Takes a descriptor from a worker into the books."""
        if d.kind == Kind.FOLDED:
            self._folded(sender, d)
        elif d.kind == Kind.RESULT:
            self._is_ended = True
        elif d.kind == Kind.ABORTED:
            self._acks.add(sender)
        elif d.kind == Kind.FAILED:
            self.fail(
                RoundError(
                    f"round {self.number}: worker {sender} failed; its traceback is in this process's standard error"
                )
            )
        self._finish_if_ended()

    def _finish_if_ended(self) -> None:
        # The top may be heard before another leaf has told all that it folded.
        if self._is_ended and not self._assignment.is_busy and self._phase == "folding":
            self._finished()

    def _folded(self, sender: int, d: Descriptor) -> None:
        update = self._assignment.updates.get((d.block, d.generation))
        if update is None:
            raise ArenaCorruptError(errno.EBADMSG, f"worker {sender} folded block {d.block}, which is no update")
        self._settle(update)

    def _settle(self, update: Update) -> None:
        """The update is in a committed sum, and its block free."""
        note = self._host.arena.note(update.block.index)
        update.fold_ns = (note.begin_ns, note.end_ns)
        update.folded_s = note.end_ns / 1e9 - self._books.opened_s
        self._assignment.settle(update)

    def _finished(self) -> None:
        note = self._host.arena.note(self._assignment.mean.index)
        if note.tag != len(self._books.updates):
            message = (
                f"round {self.number}: the mean contains {note.tag} updates, {len(self._books.updates)} were accepted"
            )
            self.fail(ArenaCorruptError(errno.EBADMSG, message))
            return
        if not math.isfinite(note.weight):
            message = f"round {self.number}: a weighted sum left the range of float64: use smaller weights"
            self.fail(RoundError(message))
            return
        self._books.finish_ns = note.end_ns - note.begin_ns
        self._books.done_s = self._books.now_s()
        self._phase = "done"
        buffer = self._host.arena.buffer(self._assignment.mean)
        views = self.spec.flower_views if self.order == "flower" else self.spec.views
        report = self.report()
        weight = sum(u.weight for u in self._books.updates)
        self._result = RoundResult(self.spec, views(buffer), weight, len(self._books.updates), report.rejected, report)
        del buffer
        for block in self._assignment.take_all():
            self._host.arena.reclaim(block)

    def recover(self, me: int) -> list[Descriptor]:
        """Takes up what a dead worker left of this round; what its successor has to be told, in order.

        The host holds the lock and has heard all that the dead one had said.
        """
        work = self._assignment
        if me not in work.leaves or self._phase in ("done", "closed"):
            return []
        self._books.deaths += 1
        if self._phase == "failed":
            # Its successor says when it has let go: a leaf's sum may be on its way to it.
            work.free(me)
            return [work.aborted]
        if work.has_made_mean(me):
            # It had made the mean, and only not said so.
            work.free(me)
            for update in work.held_by(me):
                self._settle(update)
            self._is_ended = True
            self._finish_if_ended()
            return []
        remains = work.sweep(me)
        for update in remains.counted:
            self._settle(update)
        if not self._refuse_poison(me):
            work.free(me)
            return []
        return work.retell(me, remains)

    def _refuse_poison(self, me: int) -> bool:
        """An update that two workers died of is not given to a third; false if the round ends by that."""
        poison = [update for update in self._assignment.held_by(me) if update.deaths >= MOST_DEATHS]
        if poison and self.order == "flower":
            self.fail(RoundError(f"round {self.number}: {MOST_DEATHS} workers died of it"))
            return False
        for update in poison:
            reason = f"{update.deaths} workers died while they folded it"
            self._books.rejected.append(Rejection(update.client_id, "poison", reason))
            self._books.updates.remove(update)
            self._roster.leave(update.client_id)
            self._assignment.refuse(update)
        if poison and not self._books.updates and self._phase == "folding":
            self.fail(RoundError(f"round {self.number}: no update is left{self._books.refusals()}"))
            return False
        return True

    def fail(self, error: Exception) -> None:
        """Ends the round without a result. The host holds the lock."""
        if self._phase in ("open", "folding"):
            self._phase, self._error = "failed", error
            self._books.done_s = self._books.now_s()

    # ------------------------------------------------------------ the end

    def close(self) -> None:
        """Ends the round, with or without a result, and gives every block back. Harmless when closed.

        Loans that are still out end at their ``send`` or ``release``. The result stays valid.
        """
        host = self._host
        if host.is_foreign:
            return
        with self._locked():
            if self._phase == "closed":
                return
            is_done = self._phase == "done"
            if not is_done:
                self.fail(RoundError(f"round {self.number} was closed before its result"))
                self._assignment.abort()
        if not is_done:
            host.pump()
            self._take_back()
        with self._locked():
            self._phase = "closed"
            self._result = None  # who asked for it has it; a kept Round must not pin its memory
            host.forget(self.number)
            host.changed.notify_all()

    def _take_back(self) -> None:
        """Waits until no worker touches the round any more, then reclaims what it had."""
        host, deadline = self._host, time.monotonic() + CLOSE_TIMEOUT_S
        with self._locked():
            while self._acks < set(self._assignment.leaves):
                try:
                    host.check_workers()
                except Exception:
                    return  # a worker is gone, and with it the Node: nothing is reclaimed from the living
                if time.monotonic() > deadline:
                    raise RoundError(f"round {self.number}: workers did not let go of it in {CLOSE_TIMEOUT_S:g} s")
                host.changed.wait(WAIT_CAP_S)
            held = self._assignment.take_all()
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
        return f"<Round {self.number}: {len(self._books.updates)} of {self.expected} updates, {self._phase}>"
