"""The books of a round: its accepted and refused updates, with their times. The tally of a Node: its counters.

A round's books add to its Node's tally. Called with the Node's lock held.
"""

from __future__ import annotations

import time
from collections import Counter

import attrs

from lifl.report.entries import Contribution, Rejection, Span
from lifl.report.report import RoundReport
from lifl.shm.arena import Block


@attrs.define(eq=False)
class Update:
    """An accepted update.

    Attributes
    ----------
    client_id : str
    weight : float
    block : Block
        The block that it lies in, until it is folded.
    arrived_s, landed_s, folded_s : float
        Seconds from the opening of the round to the acceptance of the update, to the begin of copying or checking it,
        and to its fold.
    clipped : float
        The factor that clipping moved it by; 1 if not at all.
    worker : int
        The leaf that it was given to, or the worker that made the first shard; 0: none yet.
    deaths : int
        Workers that died while they read it.
    """

    client_id: str
    weight: float
    block: Block
    arrived_s: float
    clipped: float = 1.0
    landed_s: float = 0.0
    worker: int = 0
    folded_s: float = 0.0
    deaths: int = 0


@attrs.define(eq=False)
class Tally:
    """The counters of a Node since its start; nothing is ever taken off, so the difference of two looks is a rate.

    ``accepted`` and ``accepted_bytes`` count updates at the door: an update that workers died of later stays
    in them, and is in ``refused``, by rule, too. ``folded``, ``busy_ns`` and ``deaths`` are by worker.
    """

    done: int = 0
    failed: int = 0
    accepted: int = 0
    accepted_bytes: int = 0
    refused: Counter[str] = attrs.field(factory=Counter)
    folded: Counter[int] = attrs.field(factory=Counter)
    busy_ns: Counter[int] = attrs.field(factory=Counter)
    deaths: Counter[int] = attrs.field(factory=Counter)


@attrs.define(eq=False)
class Books:
    """The books of one round. ``refused`` counts ``rejected`` by rule."""

    tally: Tally
    update_bytes: int
    updates: list[Update] = attrs.field(factory=list)
    rejected: list[Rejection] = attrs.field(factory=list)
    refused: Counter[str] = attrs.field(factory=Counter)
    opened_s: float = attrs.field(factory=time.monotonic)
    done_s: float = 0.0
    deaths: int = 0
    cold_starts: int = 0  # workers that the Node had started before the round
    started: int = 0
    sent: dict[int, tuple[int, int]] = attrs.field(factory=dict)  # leaf -> begin, end
    spans: dict[tuple[int, str, int, int], int] = attrs.field(factory=dict)  # worker, role, begin, end -> updates

    def now_s(self) -> float:
        """Seconds since the round was opened."""
        return time.monotonic() - self.opened_s

    @property
    def weight(self) -> float:
        """The sum of the accepted weights."""
        return sum(u.weight for u in self.updates)

    def accept(self, update: Update) -> None:
        """Counts one more update."""
        self.updates.append(update)
        self.tally.accepted += 1
        self.tally.accepted_bytes += self.update_bytes

    def reject(self, rejection: Rejection) -> None:
        """Notes a refused update, which may have been accepted before."""
        self.rejected.append(rejection)
        self.refused[rejection.rule] += 1
        self.tally.refused[rejection.rule] += 1

    def refusals(self) -> str:
        """The end of an error message that lists the refusals; empty without any."""
        if not self.rejected:
            return ""
        shown = "; ".join(f"{r.client_id} ({r.rule}: {r.reason})" for r in self.rejected[:5])
        return f"; refused: {shown}" + (f" and {len(self.rejected) - 5} more" if len(self.rejected) > 5 else "")

    def add_sent(self, leaf: int, begin_ns: int, end_ns: int) -> None:
        """Notes when a leaf handed its sum over, in nanoseconds of the monotonic clock."""
        self.sent[leaf] = begin_ns, end_ns

    def add_span(self, worker: int, role: str, begin_ns: int, end_ns: int, updates: int) -> None:
        """Notes that a worker aggregated `updates` updates or sums; times in nanoseconds of the monotonic clock."""
        span = (worker, role, begin_ns, end_ns)
        if span not in self.spans:  # a leaf reports a batch update by update, each with the batch's times
            self.tally.busy_ns[worker] += end_ns - begin_ns
        self.spans[span] = self.spans.get(span, 0) + updates

    def folded(self, update: Update, begin_ns: int, end_ns: int) -> None:
        """Notes that an update is in its leaf's sum."""
        self.tally.folded[update.worker] += 1
        if not end_ns:  # the leaf died after its commit and before it wrote the times
            update.folded_s = self.now_s()
            return
        update.folded_s = end_ns / 1e9 - self.opened_s
        self.add_span(update.worker, "leaf", begin_ns, end_ns, 1)

    def seconds_of(self, *roles: str) -> float:
        """Seconds that workers aggregated in these roles, all together."""
        return sum(end - begin for _, role, begin, end in self.spans if role in roles) / 1e9

    def _timeline(self) -> tuple[Span, ...]:
        landed = [Span(0, "gateway", "receive", u.landed_s, u.arrived_s, 1) for u in self.updates]
        made = [
            Span(worker, role, "aggregate", begin / 1e9 - self.opened_s, end / 1e9 - self.opened_s, n)
            for (worker, role, begin, end), n in self.spans.items()
        ]
        sent = [
            Span(leaf, "leaf", "send", begin / 1e9 - self.opened_s, end / 1e9 - self.opened_s, 1)
            for leaf, (begin, end) in self.sent.items()
        ]
        return tuple(sorted([*landed, *made, *sent], key=lambda span: span.begin_s))

    def report(
        self, number: int, expected: int, timing: str, order: str, leaves: int, shards: int, error: Exception | None
    ) -> RoundReport:
        """The books as they stand; the times are final once there is a result."""
        now = self.done_s or self.now_s()
        last = max((u.arrived_s for u in self.updates), default=0.0)
        stages = {
            "receive": last,
            "land": sum(u.arrived_s - u.landed_s for u in self.updates),
            "fold": self.seconds_of("leaf"),
            "finish": self.seconds_of("top", "shard"),
            "last_to_result": now - last,
            "total": now,
        }
        accepted = (
            Contribution(u.client_id, u.weight, u.worker, u.arrived_s, u.folded_s, u.clipped) for u in self.updates
        )
        return RoundReport(
            round=number,
            expected=expected,
            timing=timing,
            order=order,
            accepted=tuple(accepted),
            rejected=tuple(self.rejected),
            deaths=self.deaths,
            stages=stages,
            error=None if error is None else str(error),
            spans=self._timeline(),
            leaves=leaves,
            shards=shards,
            started=self.started,
        )
