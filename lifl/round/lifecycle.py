"""The course of a round, from its first update to its mean, and the phases that it goes through.

Decides which updates count and when the round is over, and survives workers that die. Starts no process and reads no
ring: its host (a Node) carries descriptors to and from it, with the host's lock held.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from enum import StrEnum

import attrs

from lifl.errors import ArenaCorruptError, PeerGoneError, RoundError
from lifl.report.entries import Rejection
from lifl.report.report import RoundReport
from lifl.report.result import RoundResult
from lifl.round.blocks import Assignment
from lifl.round.clients import Clients
from lifl.round.host import Host
from lifl.round.mean import Finish
from lifl.round.record import Books, Update
from lifl.round.settings import Terms
from lifl.shm import messages
from lifl.shm.arena import Block
from lifl.shm.messages import Descriptor, Kind

MAX_DEATHS = 2
MAX_DEATHS_IN_VAIN = 8
"""Workers that may die one after another without anything being folded between: then the round fails."""


class Phase(StrEnum):
    """The phase of a round: OPEN takes updates; FOLDING has all of them, and no mean yet.

    MADE has its mean, and waits until each leaf has reported all that it folded. DONE has its result, FAILED an error.
    CLOSED has given everything back.
    """

    OPEN = "open"
    FOLDING = "folding"
    MADE = "made"
    DONE = "done"
    FAILED = "failed"
    CLOSED = "closed"

    @property
    def is_running(self) -> bool:
        """True while there is neither a result nor an error."""
        return self is Phase.OPEN or self.is_ending

    @property
    def is_ending(self) -> bool:
        """True while all updates are in, and there is neither a result nor an error."""
        return self in (Phase.FOLDING, Phase.MADE)

    @property
    def shown(self) -> str:
        """The phase as statistics and messages name it: MADE is a part of "folding"."""
        return str(Phase.FOLDING if self is Phase.MADE else self)


NEXT: dict[Phase, frozenset[Phase]] = {
    Phase.OPEN: frozenset({Phase.FOLDING, Phase.FAILED}),
    Phase.FOLDING: frozenset({Phase.MADE, Phase.FAILED}),
    Phase.MADE: frozenset({Phase.DONE, Phase.FAILED}),
    Phase.DONE: frozenset({Phase.CLOSED}),
    Phase.FAILED: frozenset({Phase.CLOSED}),
    Phase.CLOSED: frozenset(),
}
"""Phase -> the phases that may follow it."""


class Lifecycle:
    """The state of one round, moved by its host and by what its workers report.

    Attributes
    ----------
    error : Exception or None
        The reason why the round failed.
    result : RoundResult or None
    """

    def __init__(self, host: Host, number: int, terms: Terms, assignment: Assignment, clients: Clients) -> None:
        self._host = host
        self.number = number
        self._terms = terms
        self._assignment = assignment
        self._clients = clients
        self._pace = host.forecast.pace(terms)
        self._finish = Finish(host, number, assignment, terms.is_flower)
        self.books = Books(host.tally, terms.spec.nbytes, cold_starts=host.pool.cold_starts)
        self._phase = Phase.OPEN
        self.error: Exception | None = None
        self.result: RoundResult | None = None
        self.acks: set[int] = set()  # workers that have let go
        self._is_predicted = False
        self._predicted: dict[str, float] | None = None
        self._deaths_in_vain = 0

    @property
    def phase(self) -> Phase:
        """The phase that the round is in."""
        return self._phase

    def _move(self, to: Phase) -> None:
        """The one place where the phase changes; raises RoundError for a transition that is not in ``NEXT``."""
        if to not in NEXT[self._phase]:
            raise RoundError(f"round {self.number} cannot go from {self._phase} to {to}: this is a bug in lifl")
        self._phase = to

    # ------------------------------------------------------------ updates come in

    def count(self, update: Update) -> None:
        """Takes one more accepted update, to be folded ahead or held. With the last one the end begins."""
        work, pace = self._assignment, self._pace
        self.books.accept(update)
        work.add(update)
        is_folding = pace.is_folding_ahead(update.arrived_s, len(work.held))
        work.shape = pace.shape
        is_last = len(self.books.updates) == self._terms.expected
        self._host.pool.prepare(work.shape.shards)
        with self._ended_without_workers():
            if is_folding and not self._terms.is_flower and not (is_last and work.shape.shards):
                work.give()
            if is_last:
                self.flush()

    @contextlib.contextmanager
    def _ended_without_workers(self) -> Iterator[None]:
        """Fails the round if there is no worker and none can be started; its result raises the reason.

        The error must not reach the caller that hands in an update, which counts already, nor the caller that waits for
        room in another round.
        """
        try:
            yield
        except PeerGoneError as error:
            self.fail(error)

    def press(self) -> None:
        """Makes leaves fold the held updates, because memory is short. The host holds the lock."""
        with self._ended_without_workers():
            self._assignment.press()

    @property
    def is_moving(self) -> bool:
        """True if blocks of this round will come free while this thread waits. The host holds the lock."""
        is_ending = self._phase.is_ending
        return is_ending or self._assignment.is_busy or self._clients.others_hold_loans

    def enlist(self, leaves: int) -> None:
        """Engages so many leaves now, if there is room for their sums; others join when there is work for them."""
        self._assignment.shape = self._pace.shape
        with contextlib.suppress(PeerGoneError):  # the first update asks again
            while len(self._assignment.leaves) < leaves and self._assignment.enlist():
                pass

    @property
    def engaged(self) -> set[int]:
        """The workers that have a part in the round now. The host holds the lock."""
        if self._phase in (Phase.DONE, Phase.CLOSED):
            return set()
        return self._assignment.working | self._finish.makers

    def roles(self) -> dict[int, str]:
        """The role of each of the :attr:`engaged`: "leaf", "top" or "shard". The host holds the lock."""

        def role(worker: int) -> str:
            if worker in self._finish.makers:
                return "shard"
            return "top" if self._assignment.is_top(worker) else "leaf"

        return {worker: role(worker) for worker in self.engaged}

    @property
    def waits_for_workers(self) -> bool:
        """True while a worker has work of this round, or has to let go of it. The host holds the lock."""
        return self._phase.is_ending or self._phase is Phase.FAILED or self._assignment.is_busy

    def flush(self) -> None:
        """Ends the round's intake: the leaves commit, then the mean is made."""
        self._move(Phase.FOLDING)
        with self._ended_without_workers():
            self._assignment.flush()
            self._make_mean()

    def _make_mean(self) -> None:
        """Orders the mean as soon as all its sums are there; a tree's top needs no order."""
        is_due = self._phase is Phase.FOLDING and not self._finish.is_running
        if is_due and self._assignment.is_committed:
            if self._assignment.held or self._assignment.sums():
                self._finish.begin()
            else:
                self.fail(RoundError(f"round {self.number}: no update is left{self.books.refusals()}"))

    def report(self) -> RoundReport:
        """The books as they stand now; final once there is a result."""
        work, terms = self._assignment, self._terms
        self.books.started = self._host.pool.cold_starts - self.books.cold_starts
        how = (self.number, terms.expected, terms.timing, terms.order, len(work.leaves), work.shape.shards)
        return attrs.evolve(self.books.report(*how, self.error), predicted=self._predicted)

    def add_prediction(self) -> None:
        """Puts the cost model's prediction for the arrivals, as they were, into the result's report."""
        if self.result is not None and not self._is_predicted:
            self._is_predicted = True
            report, terms = self.result.report, self._terms
            arrivals, shape = sorted(update.arrived_s for update in report.accepted), self._assignment.shape
            self._predicted = self._host.forecast.predict(terms, shape, arrivals)
            report = attrs.evolve(report, predicted=self._predicted)
            self._host.forecast.learn(report)
            self.result = attrs.evolve(self.result, report=report)

    # ------------------------------------------------------------ descriptors from workers; the host holds the lock

    def handle(self, sender: int, d: Descriptor) -> None:
        """Takes a descriptor from a worker into the books."""
        if d.kind == Kind.FOLDED:
            self._folded(sender, d)
        elif d.kind == Kind.SUM:
            self._assignment.working.discard(sender)
            self._make_mean()
        elif d.kind == Kind.SHARDED:
            if self._finish.made(sender, *messages.made_of(d)):
                self._all_made()
        elif d.kind == Kind.RESULT:
            self._note_top(sender)
            if self._phase is Phase.FOLDING:
                self._move(Phase.MADE)
        elif d.kind == Kind.ABORTED:
            self.acks.add(sender)
        elif d.kind == Kind.FAILED:
            self.fail(
                RoundError(
                    f"round {self.number}: worker {sender} failed; its traceback is in this process's standard error"
                )
            )
        if d.kind in (Kind.FOLDED, Kind.SUM, Kind.RESULT):
            self._deaths_in_vain = 0
        self._end_if_settled()

    def _all_made(self) -> None:
        """Goes on when every range of an order is made or given up."""
        if self._phase is Phase.FOLDING and self._finish.is_done():
            held, times = self._assignment.held, self._finish.times()
            for worker, begin_ns, end_ns in times:
                self.books.add_span(worker, "shard", begin_ns, end_ns, len(held))
            for update in held:
                # Every maker folded it, each in its range: the first stands for all.
                update.worker, update.folded_s = times[0][0], self.books.now_s()
            self._move(Phase.MADE)
        self._make_mean()

    def _note_top(self, top: int) -> None:
        note = self._host.arena.note(self._assignment.mean.index)
        self.books.add_span(top, "top", note.begin_ns, note.end_ns, len(self._assignment.leaves))

    def _end_if_settled(self) -> None:
        # The top's report can come before another leaf has reported all that it folded.
        if self._phase is Phase.MADE and not self._assignment.is_busy:
            self._finished()

    def _folded(self, sender: int, d: Descriptor) -> None:
        update = self._assignment.updates.get((d.block, d.generation))
        if update is None:
            raise ArenaCorruptError(errno.EBADMSG, f"worker {sender} folded block {d.block}, which is no update")
        self._settle(update)

    def _settle(self, update: Update) -> None:
        """Notes that an update is in a committed sum, and its block free."""
        note = self._host.arena.note(update.block.index)
        self.books.folded(update, note.begin_ns, note.end_ns)
        self._assignment.settle(update)

    def _finished(self) -> None:
        note = self._host.arena.note(self._assignment.mean.index)
        if note.num_updates != (accepted := len(self.books.updates)):
            message = f"round {self.number}: the mean contains {note.num_updates} updates, {accepted} were accepted"
            self.fail(ArenaCorruptError(errno.EBADMSG, message))
            return
        if note.has_overflowed:
            message = f"round {self.number}: a weighted sum left the range of float64: use smaller weights"
            self.fail(RoundError(message))
            return
        for sent in self._assignment.sent():
            self.books.add_sent(*sent)
        self.books.done_s = self.books.now_s()
        self._move(Phase.DONE)
        self.books.tally.done += 1
        buffer = self._host.arena.buffer(self._assignment.mean)
        views = self._terms.spec.flower_views if self._terms.is_flower else self._terms.spec.views
        report = self.report()
        weight = sum(u.weight for u in self.books.updates)
        self.result = RoundResult(
            self._terms.spec, views(buffer), weight, len(self.books.updates), report.rejected, report
        )
        del buffer
        for block in self._assignment.take_all():
            self._host.arena.reclaim(block)

    def recover(self, worker: int, of_work: bool) -> list[Descriptor]:
        """Takes up what a dead worker left of this round; returns the descriptors for its successor, in order.

        `of_work` is false for a worker that had not started, or whose parent died: no update can be the cause. The host
        holds the lock and has read all descriptors of the dead worker.
        """
        work = self._assignment
        if worker not in self.workers or self._phase in (Phase.DONE, Phase.CLOSED):
            return []
        if self._phase is Phase.FAILED:
            # The successor has to let go too: a leaf's sum may be on its way to it.
            self.books.deaths += 1
            work.free(worker)
            return [work.aborted]
        if work.has_made_mean(worker):
            # The mean is made; only the RESULT is missing.
            self.books.deaths += 1
            work.free(worker)
            for update in work.held_by(worker):
                self._settle(update)
            if self._phase is Phase.FOLDING:
                self._move(Phase.MADE)
            self._end_if_settled()
            return []
        if worker not in work.working and worker not in self._finish.makers:
            return []
        self.books.deaths += 1
        self._deaths_in_vain += of_work
        if self._deaths_in_vain >= MAX_DEATHS_IN_VAIN:
            died = f"{self._deaths_in_vain} workers died of it, one after another"
            self.fail(RoundError(f"round {self.number}: {died}{self.books.refusals()}"))
            work.free(worker)
            return [work.aborted]
        told = self._recover_leaf(worker, of_work) if worker in work.working else []
        if self._phase is Phase.FOLDING and worker in self._finish.makers:
            told += self._recover_shard(worker) if of_work else self._finish.tell_again(worker)
        self._make_mean()
        return told

    def _recover_leaf(self, worker: int, of_work: bool) -> list[Descriptor]:
        work = self._assignment
        remains = work.sweep(worker, of_work)
        for update in remains.counted:
            self._settle(update)
        for update in [update for update in work.held_by(worker) if update.deaths >= MAX_DEATHS]:
            self._refuse_poison(update)
        if not self.books.updates and self._phase.is_ending:
            self.fail(RoundError(f"round {self.number}: no update is left{self.books.refusals()}"))
            work.free(worker)
            return []
        return work.retell(worker, remains)

    def _recover_shard(self, worker: int) -> list[Descriptor]:
        finish = self._finish
        told = finish.lost(worker)
        suspect = finish.suspect
        if suspect is not None and suspect.deaths >= MAX_DEATHS:
            finish.drop_suspect()
            self._refuse_poison(suspect)
            return []
        if not finish.is_running:
            self._all_made()
        return told

    def _refuse_poison(self, update: Update) -> None:
        """Refuses an update that two workers died of: a third one does not get it."""
        reason = f"{update.deaths} workers died while they folded it"
        self.books.reject(Rejection(update.client_id, "poison", reason))
        self.books.updates.remove(update)
        self._clients.leave(update.client_id)
        self._assignment.refuse(update)
        self._deaths_in_vain = 0

    @property
    def mean(self) -> Block:
        """The block of the mean."""
        return self._assignment.mean

    @property
    def workers(self) -> set[int]:
        """Every worker that has had a part."""
        return {*self._assignment.leaves, *self._finish.workers}

    def fail(self, error: Exception) -> None:
        """Ends the round without a result. The host holds the lock."""
        if self._phase.is_running:
            self._move(Phase.FAILED)
            self.error = error
            self.books.tally.failed += 1
            self.books.done_s = self.books.now_s()

    # ------------------------------------------------------------ the end

    def abort(self) -> None:
        """Makes every worker that has had a part let go; ``acks`` has those that did."""
        self._assignment.abort(self.workers)

    @property
    def is_let_go(self) -> bool:
        """True when no living worker touches the round any more."""
        return self.acks >= (self.workers & self._host.pool.present)

    def take_all(self) -> list[Block]:
        """Gives up every block that may still be the round's, and returns them to be reclaimed."""
        return self._assignment.take_all()

    def close(self) -> None:
        """Ends a round that is done or failed; harmless when closed. The host holds the lock."""
        if self._phase is not Phase.CLOSED:
            self._move(Phase.CLOSED)
        self.result = None  # whoever asked for the result has it; a kept Round must not pin its memory
