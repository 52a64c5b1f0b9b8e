"""How a round goes: what is accepted is folded ahead or held, the mean is made, and what workers say is taken in.

Decides who counts and when the round is over, and survives workers that die. It starts no process and reads no ring;
its host (a Node) carries descriptors to and from it, with the host's lock held.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from typing import Literal

import attrs

from lifl.errors import ArenaCorruptError, PeerGoneError, RoundError
from lifl.report.entries import Rejection
from lifl.report.report import RoundReport
from lifl.report.result import RoundResult
from lifl.round.blocks import Assignment
from lifl.round.clients import Roster
from lifl.round.host import Host
from lifl.round.mean import Finish
from lifl.round.pacing import Pace
from lifl.round.record import Books, Update
from lifl.round.settings import Terms
from lifl.shm import messages
from lifl.shm.arena import Block
from lifl.shm.messages import Descriptor, Kind

MAX_DEATHS = 2
MAX_DEATHS_IN_VAIN = 8
"""Workers that may die one after another without anything being folded between: then the round fails."""


class Lifecycle:
    """One round, as its host and its workers move it.

    Attributes
    ----------
    phase : str
        "open" (takes updates), "folding" (all are in), "done", "failed" or "closed".
    error : Exception or None
        Why it failed.
    result : RoundResult or None
    """

    def __init__(
        self, host: Host, number: int, terms: Terms, assignment: Assignment, pace: Pace, roster: Roster
    ) -> None:
        self._host, self.number, self._assignment, self._pace = host, number, assignment, pace
        self._terms, self._roster = terms, roster
        self._finish = Finish(host, number, assignment, terms.order == "flower")
        self.books = Books(host.tally, terms.spec.nbytes, cold_starts=host.pool.cold_starts)
        self.phase: Literal["open", "folding", "done", "failed", "closed"] = "open"
        self.error: Exception | None = None
        self.result: RoundResult | None = None
        self.acks: set[int] = set()  # workers that have let go
        self._is_ended = False  # the mean is there; every leaf may not have been heard yet
        self._is_predicted = False
        self._predicted: dict[str, float] | None = None
        self._deaths_in_vain = 0

    # ------------------------------------------------------------ updates come in

    def count(self, update: Update) -> None:
        """One more update is accepted: it is folded ahead, or held. With the last one the end begins."""
        work, pace = self._assignment, self._pace
        self.books.accept(update)
        work.add(update)
        is_folding = pace.is_folding_ahead(update.arrived_s, len(work.held))
        work.shape = pace.shape
        is_last = len(self.books.updates) == self._terms.expected
        self._host.pool.prepare(work.shape.shards)
        with self._ended_without_workers():
            if is_folding and self._terms.order == "any" and not (is_last and work.shape.shards):
                work.give()
            if is_last:
                self.flush()

    @contextlib.contextmanager
    def _ended_without_workers(self) -> Iterator[None]:
        """If there is no worker and none can be started the round fails, and its result says why.

        The error must not reach whoever hands in an update: that counts already. Nor who needs room in another round.
        """
        try:
            yield
        except PeerGoneError as error:
            self.fail(error)

    def press(self) -> None:
        """Makes leaves fold what is held, because memory is short. The host holds the lock."""
        with self._ended_without_workers():
            self._assignment.press()

    @property
    def is_moving(self) -> bool:
        """True if blocks of this round will come free while this thread waits. The host holds the lock."""
        return self.phase == "folding" or self._assignment.is_busy or self._roster.others_hold_loans

    def enlist(self, leaves: int) -> None:
        """Takes on so many leaves now, if there is room for their sums; others join when there is work for them."""
        self._assignment.shape = self._pace.shape
        with contextlib.suppress(PeerGoneError):  # the first update asks again
            while len(self._assignment.leaves) < leaves and self._assignment.enlist():
                pass

    @property
    def engaged(self) -> set[int]:
        """The workers that have a part in it now. The host holds the lock."""
        if self.phase in ("done", "closed"):
            return set()
        return self._assignment.working | self._finish.makers

    def roles(self) -> dict[int, str]:
        """What each of :attr:`engaged` is now: "leaf", "top" or "shard". The host holds the lock."""
        makers, work = self._finish.makers, self._assignment
        return {me: "shard" if me in makers else "top" if work.is_top(me) else "leaf" for me in self.engaged}

    @property
    def waits_for_workers(self) -> bool:
        """True while a worker owes this round something. The host holds the lock."""
        return self.phase in ("folding", "failed") or self._assignment.is_busy

    def flush(self) -> None:
        """Everything that will come has come: commit, then make the mean."""
        self.phase = "folding"
        with self._ended_without_workers():
            self._assignment.flush()
            self._make_mean()

    def _make_mean(self) -> None:
        """Orders the mean as soon as every sum of which it is made is there; a tree's top needs no order."""
        is_due = self.phase == "folding" and not self._is_ended and not self._finish.is_running
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
        """Puts into the result's report what the cost model says of the arrivals as they were."""
        if self.result is not None and not self._is_predicted:
            self._is_predicted = True
            report, terms = self.result.report, self._terms
            arrivals, shape = sorted(update.arrived_s for update in report.accepted), self._assignment.shape
            self._predicted = self._host.forecast.predict(terms, shape, arrivals)
            report = attrs.evolve(report, predicted=self._predicted)
            self._host.forecast.learn(report)
            self.result = attrs.evolve(self.result, report=report)

    # ------------------------------------------------------------ what workers say; the host holds the lock

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
            self._is_ended = True
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
        self._finish_if_ended()

    def _all_made(self) -> None:
        """Every range of an order is made, or was given up."""
        if self.phase == "folding" and self._finish.is_done():
            held, times = self._assignment.held, self._finish.times()
            for worker, begin_ns, end_ns in times:
                self.books.add_span(worker, "shard", begin_ns, end_ns, len(held))
            for update in held:
                # All of them folded it, each in its range.
                update.runtime, update.folded_s = times[0][0], self.books.now_s()
            self._is_ended = True
        self._make_mean()

    def _note_top(self, top: int) -> None:
        note = self._host.arena.note(self._assignment.mean.index)
        self.books.add_span(top, "top", note.begin_ns, note.end_ns, len(self._assignment.leaves))

    def _finish_if_ended(self) -> None:
        # The top may be heard before another leaf has told all that it folded.
        if self._is_ended and not self._assignment.is_busy and self.phase == "folding":
            self._finished()

    def _folded(self, sender: int, d: Descriptor) -> None:
        update = self._assignment.updates.get((d.block, d.generation))
        if update is None:
            raise ArenaCorruptError(errno.EBADMSG, f"worker {sender} folded block {d.block}, which is no update")
        self._settle(update)

    def _settle(self, update: Update) -> None:
        """The update is in a committed sum, and its block free."""
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
        self.phase = "done"
        self.books.tally.done += 1
        buffer = self._host.arena.buffer(self._assignment.mean)
        views = self._terms.spec.flower_views if self._terms.order == "flower" else self._terms.spec.views
        report = self.report()
        weight = sum(u.weight for u in self.books.updates)
        self.result = RoundResult(
            self._terms.spec, views(buffer), weight, len(self.books.updates), report.rejected, report
        )
        del buffer
        for block in self._assignment.take_all():
            self._host.arena.reclaim(block)

    def recover(self, me: int, of_work: bool) -> list[Descriptor]:
        """Takes up what a dead worker left of this round; what its successor has to be told, in order.

        Not `of_work`: one that had not started, or whose parent died, has died of nothing that it was given. The host
        holds the lock and has heard all that the dead one had said.
        """
        work = self._assignment
        if me not in self.workers or self.phase in ("done", "closed"):
            return []
        if self.phase == "failed":
            # Its successor says when it has let go: a leaf's sum may be on its way to it.
            self.books.deaths += 1
            work.free(me)
            return [work.aborted]
        if work.has_made_mean(me):
            # It had made the mean, and only not said so.
            self.books.deaths += 1
            work.free(me)
            for update in work.held_by(me):
                self._settle(update)
            self._is_ended = True
            self._finish_if_ended()
            return []
        if me not in work.working and me not in self._finish.makers:
            return []
        self.books.deaths += 1
        self._deaths_in_vain += of_work
        if self._deaths_in_vain >= MAX_DEATHS_IN_VAIN:
            died = f"{self._deaths_in_vain} workers died of it, one after another"
            self.fail(RoundError(f"round {self.number}: {died}{self.books.refusals()}"))
            work.free(me)
            return [work.aborted]
        told = self._recover_leaf(me, of_work) if me in work.working else []
        if self.phase == "folding" and me in self._finish.makers:
            told += self._recover_shard(me) if of_work else self._finish.tell_again(me)
        self._make_mean()
        return told

    def _recover_leaf(self, me: int, of_work: bool) -> list[Descriptor]:
        work = self._assignment
        remains = work.sweep(me, of_work)
        for update in remains.counted:
            self._settle(update)
        for update in [update for update in work.held_by(me) if update.deaths >= MAX_DEATHS]:
            self._refuse_poison(update)
        if not self.books.updates and self.phase == "folding":
            self.fail(RoundError(f"round {self.number}: no update is left{self.books.refusals()}"))
            work.free(me)
            return []
        return work.retell(me, remains)

    def _recover_shard(self, me: int) -> list[Descriptor]:
        finish = self._finish
        told = finish.lost(me)
        suspect = finish.suspect
        if suspect is not None and suspect.deaths >= MAX_DEATHS:
            finish.drop_suspect()
            self._refuse_poison(suspect)
            return []
        if not finish.is_running:
            self._all_made()
        return told

    def _refuse_poison(self, update: Update) -> None:
        """An update that two workers died of is not given to a third."""
        reason = f"{update.deaths} workers died while they folded it"
        self.books.reject(Rejection(update.client_id, "poison", reason))
        self.books.updates.remove(update)
        self._roster.leave(update.client_id)
        self._assignment.refuse(update)
        self._deaths_in_vain = 0

    @property
    def mean(self) -> Block:
        """What takes the mean."""
        return self._assignment.mean

    @property
    def workers(self) -> set[int]:
        """Everybody who has had a part."""
        return {*self._assignment.leaves, *self._finish.workers}

    def fail(self, error: Exception) -> None:
        """Ends the round without a result. The host holds the lock."""
        if self.phase in ("open", "folding"):
            self.phase, self.error = "failed", error
            self.books.tally.failed += 1
            self.books.done_s = self.books.now_s()

    # ------------------------------------------------------------ the end

    def abort(self) -> None:
        """Whoever has had a part is told to let go; ``acks`` says who has."""
        self._assignment.abort(self.workers)

    @property
    def is_let_go(self) -> bool:
        """True when no living worker touches the round any more."""
        return self.acks >= (self.workers & self._host.pool.present)

    def take_all(self) -> list[Block]:
        """Every block that may still be the round's, for good."""
        return self._assignment.take_all()
