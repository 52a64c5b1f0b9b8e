"""The moments at which updates are folded ahead, and at which the plan is made anew."""

from __future__ import annotations

from typing import Any

import pytest

import lifl
from lifl.round.pacing import MAX_REPLANS, Pace

AHEAD, AT_THE_END = lifl.Shape(1, 2), lifl.Shape(0, 2)
FOLD_S = 0.1


def choose(rate: float | None) -> lifl.Shape:
    """A planner that folds ahead if updates come slower than they are folded, or nothing is known."""
    return AHEAD if rate is None or rate * FOLD_S < 1 else AT_THE_END


def make(timing: Any, shape: lifl.Shape | None = None, rate: float | None = None, expected: int = 10) -> Pace:
    """A pace over that planner."""
    return Pace(timing, choose, shape, expected, rate, FOLD_S)


@pytest.mark.parametrize(("timing", "is_ahead"), [("eager", True), ("lazy", False)])
def test_a_shape_that_was_given_is_kept(timing: Any, is_ahead: bool) -> None:
    """However fast updates come."""
    pace = make(timing, AHEAD)
    assert [pace.is_folding_ahead(0.0, 1) for _ in range(5)] == [is_ahead] * 5
    assert (pace.shape, pace.replans) == (AHEAD, 0)


def test_a_burst_is_noticed() -> None:
    """Planned for a trickle, updates that come all at once are held for the end."""
    pace = make("eager")
    assert pace.is_folding_ahead(0.0, 1)
    assert not pace.is_folding_ahead(0.001, 2)
    assert (pace.shape, pace.replans) == (AT_THE_END, 1)


def test_a_trickle_is_noticed() -> None:
    """Planned for a burst, updates that come slowly are folded as they come, those that were held too."""
    pace = make("eager", rate=1000.0)
    assert not pace.is_folding_ahead(0.0, 1)
    assert pace.is_folding_ahead(3.0, 2)
    assert pace.shape == AHEAD


def test_what_goes_as_planned_is_not_planned_anew() -> None:
    """A rate that differs by less than the threshold is the same one."""
    pace = make("eager", rate=100.0)
    for i in range(10):
        pace.is_folding_ahead(i / 90, 1)
    assert pace.replans == 0


def test_plans_are_few() -> None:
    """A rate that changes with every update does not keep the planner busy."""
    pace, now = make("eager", expected=1000), 0.0
    for i in range(100):
        now = now * 3 + 1e-9 if i % 2 else now + 1e-9
        pace.is_folding_ahead(now, 1)
    assert pace.replans <= MAX_REPLANS


def test_just_in_time() -> None:
    """An update that is held is given when folding it takes as long as the wait for the last update."""
    pace = make("jit", AHEAD)
    # One a second, a tenth of a second each: begun before the last but one, it would be ready too early.
    assert [pace.is_folding_ahead(float(i), i + 1) for i in range(10)] == [False] * 8 + [True] * 2
    pace = make("jit", AHEAD)
    # Ten a second: with k held, k * 0.1 s of work against (9 - k) * 0.1 s of waiting.
    assert [pace.is_folding_ahead(i / 10, i + 1) for i in range(6)] == [False, False, False, False, True, True]
