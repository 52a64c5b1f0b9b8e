"""The pace of a round: its shape, and whether updates are folded as they arrive or held for the end.

Carries the round's rates; the rules are the planner's (``lifl.planner.timing``). No clock: times come in as arguments.
"""

from __future__ import annotations

from collections.abc import Callable

from lifl.planner.load import Load, has_changed
from lifl.planner.shape import Shape
from lifl.planner.timing import MAX_RATE, Timing, begins_just_in_time, seen_rate

MAX_REPLANS = 8
"""A round is planned anew at most so often, each time because its load has changed again."""


class Pace:
    """The plan of one round.

    Parameters
    ----------
    timing : {"eager", "lazy", "jit"}
    choose : callable
        The planner: the shape for updates that come at a rate (updates per second; inf: all at once; None: unknown).
    shape : Shape or None
        The shape of the round. None: the planner chooses, and again when updates come at another rate.
    expected : int
        Updates of the round.
    rate : float or None
        Updates per second that are expected to arrive; None if nothing is known.
    fold_s : float
        Seconds that a leaf needs for one update, its sum included.
    """

    def __init__(
        self,
        timing: Timing,
        choose: Callable[[float | None], Shape],
        shape: Shape | None,
        expected: int,
        rate: float | None,
        fold_s: float,
    ) -> None:
        self._timing = timing
        self._choose = choose
        self._is_planned = shape is None
        self._expected = expected
        self._rate = rate
        self._fold_s = fold_s
        self.shape = choose(rate) if shape is None else shape
        self._first_s = 0.0
        self._arrived = 0
        self.replans = 0

    def is_folding_ahead(self, now_s: float, waiting: int) -> bool:
        """Takes note of one more arrival; true if the held updates are to be given to leaves now.

        Parameters
        ----------
        now_s : float
            Seconds, on the clock of the calls before.
        waiting : int
            Updates that are held, this one included.
        """
        self._arrived += 1
        if self._arrived == 1:
            self._first_s = now_s
        seen = seen_rate(self._arrived, now_s - self._first_s)
        if seen is not None:
            self._replan(seen)
        if self._timing == "lazy" or not self.shape.leaves:
            return False
        if self._timing == "eager":
            return True
        rate = self._rate if seen is None else seen
        return begins_just_in_time(waiting, self._fold_s, self._arrived, self._expected, rate)

    def _replan(self, rate: float) -> None:
        planned, seen = (Load(min(k, MAX_RATE), self._fold_s) for k in (self._rate or 0.0, rate))
        if self._is_planned and self.replans < MAX_REPLANS and has_changed(planned, seen):
            self._rate = rate
            self.replans += 1
            self.shape = self._choose(rate)
