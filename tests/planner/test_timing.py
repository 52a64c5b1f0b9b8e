"""The rules of timing, that the live Node and the simulation share, at their edges."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lifl.errors import PlanError
from lifl.planner.hierarchy import FAN_IN
from lifl.planner.timing import MAX_RATE, TIMINGS, begins_just_in_time, check_timing, seen_rate, wants_leaf

COUNTS = st.integers(1, 10_000)


def test_a_leaf_joins_when_fan_in_updates_wait_for_each() -> None:
    """Not one update sooner, and not beyond the shape's leaves."""
    assert not wants_leaf(FAN_IN - 1, 1, 2)
    assert wants_leaf(FAN_IN, 1, 2)
    assert not wants_leaf(100 * FAN_IN, 2, 2)


def test_the_rate_that_is_seen() -> None:
    """One update shows none; n of them have n - 1 gaps; those that came at once have no end of rate."""
    assert seen_rate(1, 0.0) is None
    assert seen_rate(5, 2.0) == 2.0
    assert seen_rate(2, 0.0) == math.inf


@given(
    held=COUNTS, arrived=COUNTS, expected=COUNTS, rate=st.one_of(st.none(), st.just(math.inf), st.just(2 * MAX_RATE))
)
def test_one_batch_without_a_rate_and_all_at_once(held: int, arrived: int, expected: int, rate: float | None) -> None:
    """Leaves never begin before the last."""
    assert not begins_just_in_time(held, 1.0, arrived, expected, rate)


def test_at_the_highest_rate_there_still_is_a_moment() -> None:
    """The bound itself is a rate like any other."""
    assert begins_just_in_time(1, 1.0, 1, 3, MAX_RATE)


@pytest.mark.parametrize(("held", "begins"), [(3, False), (4, True), (5, True)])
def test_it_begins_when_the_work_takes_as_long_as_the_arrivals(held: int, begins: bool) -> None:
    """Five of ten are in; the last comes 4 / rate = 2 s after the next one; a fold takes half a second."""
    assert begins_just_in_time(held, 0.5, 5, 10, 2.0) is begins


@given(held=COUNTS, expected=st.integers(2, 10_000), rate=st.floats(1e-3, MAX_RATE))
def test_it_begins_with_the_update_before_the_last(held: int, expected: int, rate: float) -> None:
    """Whatever the work takes: the next arrival is the last."""
    assert begins_just_in_time(held, 1e-9, expected - 1, expected, rate)


def test_a_timing_that_is_none() -> None:
    """The error shows it, and names those that are."""
    for timing in TIMINGS:
        check_timing(timing)
    with pytest.raises(PlanError, match="timing='soon': give one of eager, lazy, jit"):
        check_timing("soon")
