"""A round's books: who was accepted, who was refused, and when what happened."""

from __future__ import annotations

import time

import attrs

from lifl.metrics import Contribution, Rejection, RoundReport
from lifl.shm import Block


@attrs.define(eq=False)
class Update:
    """An accepted update, until it is folded and after."""

    client_id: str
    weight: float
    block: Block
    arrived_s: float
    clipped: float = 1.0
    runtime: int = 0
    folded_s: float = 0.0
    fold_ns: tuple[int, int] = (0, 0)
    deaths: int = 0  # of workers that were reading it


@attrs.define(eq=False)
class Books:
    """Mutable while the round is open; not locked: that is the round's business."""

    updates: list[Update] = attrs.field(factory=list)
    rejected: list[Rejection] = attrs.field(factory=list)
    opened_s: float = attrs.field(factory=time.monotonic)
    land_s: float = 0.0
    done_s: float = 0.0
    deaths: int = 0
    finish_ns: int = 0

    def now_s(self) -> float:
        """Seconds since the round was opened."""
        return time.monotonic() - self.opened_s

    @property
    def weight(self) -> float:
        """The sum of the accepted weights."""
        return sum(u.weight for u in self.updates)

    def refusals(self) -> str:
        """The end of a message that says who was refused; empty if nobody was."""
        if not self.rejected:
            return ""
        shown = "; ".join(f"{r.client_id} ({r.rule}: {r.reason})" for r in self.rejected[:5])
        return f"; refused: {shown}" + (f" and {len(self.rejected) - 5} more" if len(self.rejected) > 5 else "")

    def report(self, number: int, expected: int, timing: str, order: str, error: Exception | None) -> RoundReport:
        """The books as they stand; the times are final once there is a result."""
        now = self.done_s or self.now_s()
        last = max((u.arrived_s for u in self.updates), default=0.0)
        folds = {(u.runtime, u.fold_ns) for u in self.updates}
        stages = {
            "receive": last,
            "land": self.land_s,
            "fold": sum(end - begin for _, (begin, end) in folds) / 1e9,
            "finish": self.finish_ns / 1e9,
            "last_to_result": now - last,
            "total": now,
        }
        accepted = (
            Contribution(u.client_id, u.weight, u.runtime, u.arrived_s, u.folded_s, u.clipped) for u in self.updates
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
        )
