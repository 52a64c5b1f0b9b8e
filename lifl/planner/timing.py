"""The timings of a round, and the rules of timing: when a leaf joins, and when just-in-time begins.

The live Node (``lifl.round``) and the simulation (``lifl.planner.aggregation``) both ask these functions. Pure: counts,
seconds and rates come in as arguments.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

from lifl.errors import PlanError
from lifl.planner.hierarchy import FAN_IN

MAX_RATE = 1e9
"""Updates per second; a higher rate counts as all at once."""

Timing = Literal["eager", "lazy", "jit"]
"""The moment at which updates are folded.

``eager``: each as it arrives. ``lazy``: all of them when the last is in. ``jit``, just in time: so late that the work
ends when the last update is expected; it is woken less often than an eager leaf, and is done almost as early.
"""

TIMINGS: tuple[Timing, ...] = get_args(Timing)


def check_timing(timing: str) -> None:
    """Raises ``PlanError`` for a timing that is none of ``TIMINGS``."""
    if timing not in TIMINGS:
        raise PlanError(f"timing={timing!r}: give one of {', '.join(TIMINGS)}")


def wants_leaf(least_outstanding: int, leaves: int, max_leaves: int) -> bool:
    """True if one more leaf is to join before the next update is given away: ``FAN_IN`` updates or more wait for each.

    Parameters
    ----------
    least_outstanding : int
        Updates that the least busy leaf was given and has not folded yet.
    leaves : int
        Leaves that the round has.
    max_leaves : int
        Leaves that its shape allows.
    """
    return leaves < max_leaves and least_outstanding >= FAN_IN


def seen_rate(arrived: int, passed_s: float) -> float | None:
    """Updates per second, seen so far: ``(arrived - 1) / passed_s``.

    None for a first update, which shows no rate; inf for updates that came all at once.

    Parameters
    ----------
    arrived : int
        Updates that have arrived, at least 1.
    passed_s : float
        Seconds from the first of them to the last.
    """
    if arrived < 2:
        return None
    return (arrived - 1) / passed_s if passed_s > 0 else math.inf


def begins_just_in_time(held: int, fold_s: float, arrived: int, expected: int, rate: float | None) -> bool:
    """True if leaves have to begin with the held updates now, because the next arrival would be too late.

    That is ``held * fold_s >= (expected - arrived - 1) / rate``: the work that is there takes as long as the updates
    that follow the next one. So leaves begin with the update before the last at the latest. With a rate that is not
    known, or with all at once (above ``MAX_RATE``), false: one batch of all the updates writes the fewest sums.

    Parameters
    ----------
    held : int
        Updates that no leaf was given yet.
    fold_s : float
        Seconds that a leaf needs for one update alone, its sum included: ``Work.batch_s(1, False)``.
    arrived, expected : int
        Updates that have arrived, and that will have when the round is complete.
    rate : float or None
        Updates per second: the rate that was seen, or before there is one the rate that is expected.
    """
    if rate is None or rate > MAX_RATE:
        return False
    return held * fold_s * rate >= expected - arrived - 1
