"""Loads are smoothed as the formula says, and set against what a node can do."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lifl.planner.load import ALPHA, REPLAN_THRESHOLD, Load, ServerNode, has_changed, observe


def test_first_observation_is_taken_as_it_is() -> None:
    """There is no old value to keep a part of."""
    assert observe(None, 20, 10.0, 4.0) == Load(2.0, 0.2)
    assert observe(None, 0, 10.0, 0.0) == Load(0.0, 0.0)


def test_a_later_one_is_smoothed() -> None:
    """new = alpha * old + (1 - alpha) * measured, for both."""
    after = observe(Load(2.0, 0.2), 40, 10.0, 16.0, alpha=0.7)
    assert after.arrival_rate == pytest.approx(0.7 * 2.0 + 0.3 * 4.0)
    assert after.execution_s == pytest.approx(0.7 * 0.2 + 0.3 * 0.4)
    assert after.queue == after.arrival_rate * after.execution_s


def test_a_quiet_interval_teaches_nothing_about_execution() -> None:
    """Without updates the rate falls and the execution time stays."""
    assert observe(Load(2.0, 0.2), 0, 10.0, 0.0) == Load(2.0 * ALPHA, 0.2)


def test_execution_that_was_never_measured_is_not_averaged() -> None:
    """A node that was quiet at first does not think that updates take no time."""
    assert observe(observe(None, 0, 1.0, 0.0), 10, 1.0, 5.0).execution_s == 0.5


@given(
    st.floats(0, 1e6),
    st.lists(st.tuples(st.integers(0, 1000), st.floats(0.1, 100), st.floats(0, 50)), min_size=1),
    st.floats(0, 1),
)
def test_smoothed_values_stay_between_what_was_seen(rate: float, seen: list, alpha: float) -> None:
    """An EWMA is an average: it is never beyond its values."""
    load = Load(rate, 0.0)
    for updates, seconds, busy in seen:
        load = observe(load, updates, seconds, busy, alpha)
    rates = [rate, *(updates / seconds for updates, seconds, _ in seen)]
    assert min(rates) * (1 - 1e-9) <= load.arrival_rate <= max(rates) * (1 + 1e-9)


@pytest.mark.parametrize("wrong", [(-1, 1.0, 0.0, 0.7), (1, 0.0, 0.0, 0.7), (1, 1.0, -1.0, 0.7), (1, 1.0, 1.0, 1.5)])
def test_nonsense_is_refused(wrong: tuple) -> None:
    """The message has the value."""
    with pytest.raises(ValueError, match=r"updates=|alpha="):
        observe(None, *wrong)


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_loads_are_finite(value: float) -> None:
    """A rate that is no number would make every plan nonsense."""
    with pytest.raises(ValueError, match="arrival_rate"):
        Load(value, 1.0)
    with pytest.raises(ValueError, match="capacity"):
        ServerNode("a", value)
    with pytest.raises(ValueError, match="too much at a time"):
        Load(1e200, 1e200)


def test_room_is_what_is_left_in_whole_updates() -> None:
    """RC = MC - k * E."""
    assert ServerNode("a", 20, load=Load(10.0, 0.35)).room == 16
    assert ServerNode("a", 20).room == 20
    assert ServerNode("a", 2, load=Load(10.0, 0.35)).room == 0


def test_change_is_relative_and_symmetric() -> None:
    """Twice as much is the same change as half as much, on a small node as on a large one."""
    for k in (1.0, 1000.0):
        assert has_changed(Load(k, 1.0), Load(2.1 * k, 1.0))
        assert has_changed(Load(2.1 * k, 1.0), Load(k, 1.0))
        assert not has_changed(Load(k, 1.0), Load(1.9 * k, 1.0))
    assert not has_changed(Load(), Load())
    assert has_changed(Load(), Load(1.0, 1.0))


def test_less_than_an_update_is_no_change() -> None:
    """An idle node that gets a little to do has changed by all of it, and yet needs no new plan."""
    assert not has_changed(Load(), Load(0.9, 1.0))
    assert not has_changed(Load(0.9, 1.0), Load())


@given(st.builds(Load, st.floats(0, 100), st.floats(0, 10)), st.builds(Load, st.floats(0, 100), st.floats(0, 10)))
def test_a_change_is_one_in_both_directions(one: Load, other: Load) -> None:
    """And a higher threshold sees no more of them."""
    for threshold in (0.0, REPLAN_THRESHOLD, 1.0):
        assert has_changed(one, other, threshold) == has_changed(other, one, threshold)
    assert has_changed(one, other, 0.0) >= has_changed(one, other) >= has_changed(one, other, 1.0)
    assert not has_changed(one, one, 0.0)


@pytest.mark.parametrize("threshold", [-0.1, 1.1, math.nan])
def test_a_threshold_is_a_part(threshold: float) -> None:
    """Beyond 0 to 1 it would say always or never."""
    with pytest.raises(ValueError, match="threshold="):
        has_changed(Load(), Load(), threshold)
