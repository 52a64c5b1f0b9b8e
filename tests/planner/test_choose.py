"""The shape that is taken is the one that is predicted to be done first, and never more than the machine has."""

from __future__ import annotations

import math

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lifl.errors import PlanError
from lifl.planner.choose import candidates, choose_shape, choose_timing
from lifl.planner.costs import Costs, predict
from lifl.planner.shape import Shape
from lifl.planner.timing import TIMINGS
from tests.planner.rounds import COSTS, MODEL, costs_of

WORK = COSTS.work(MODEL)
SLOWLY = 1 / (4 * (WORK.land_s + WORK.batch_s(1, is_first=False)))
"""Updates per second: each is folded long before the next."""


def test_all_at_once_is_made_in_shards() -> None:
    """Each byte is read once, and no sum is written."""
    assert choose_shape(32, math.inf, MODEL, COSTS, 2) == Shape(0, 2)


def test_slow_arrivals_have_a_leaf_ahead() -> None:
    """All other updates are in one sum when the last one arrives; all cores make the mean of both."""
    assert choose_shape(32, SLOWLY, MODEL, COSTS, 2) == Shape(1, 2)


def test_unknown_rate_is_met_with_a_shape_for_both() -> None:
    """A leaf, in case they trickle in, and shards, in case they do not."""
    shape = choose_shape(32, None, MODEL, COSTS, 2)
    assert shape.leaves
    assert shape.shards == 2


def test_lazy_rounds_have_no_leaf_that_would_wait() -> None:
    """Nothing is folded ahead, so shards make the mean of everything."""
    assert choose_shape(32, SLOWLY, MODEL, COSTS, 2, "lazy") == Shape(0, 2)


@pytest.mark.parametrize("cores", [1, 2, 3, 16])
@pytest.mark.parametrize("workers", [0, 1, 2, 16])
@pytest.mark.parametrize("rate", [None, 1.0, 100.0, math.inf])
def test_no_more_is_planned_than_there_is(cores: int, workers: int, rate: float | None) -> None:
    """With two cores no sixteen workers."""
    costs = attrs.evolve(COSTS, cores=cores, parallel=min(4.0, cores))
    shape = choose_shape(20, rate, MODEL, costs, workers)
    assert max(shape.leaves, shape.shards) <= max(1, min(cores, workers))


def test_no_more_leaves_than_updates() -> None:
    """A leaf without an update is useless."""
    assert {shape.leaves for shape in candidates(2, 16, 16)} == {0, 1, 2}


@given(st.integers(1, 40), st.sampled_from([None, 0.5, 20.0, 500.0, math.inf]), costs_of(), st.sampled_from(TIMINGS))
def test_choice_is_no_worse_than_any_candidate(n: int, rate: float | None, costs: Costs, timing: str) -> None:
    """Up to what is noise; and the same input gives the same shape."""
    shape = choose_shape(n, rate, MODEL, costs, costs.cores, timing)
    assert shape == choose_shape(n, rate, MODEL, costs, costs.cores, timing)
    assert shape in set(candidates(n, costs.cores, costs.cores))
    if rate is None:
        return
    arrivals = [i / rate for i in range(n)]
    expects = None if rate == math.inf else rate

    def takes(one: Shape) -> float:
        done = predict(one, timing, arrivals, MODEL, costs, costs.cores, rate=expects, has_landed=False)
        return done.last_to_result_s

    assert takes(shape) <= 1.02 * min(map(takes, candidates(n, costs.cores, costs.cores))) * (1 + 1e-9)


def test_timing_folds_ahead_when_they_trickle_in() -> None:
    """Not lazy; and just in time where it is as early, because it writes fewer sums."""
    assert choose_timing(32, SLOWLY, MODEL, COSTS, 2) in ("eager", "jit")
    assert choose_timing(32, SLOWLY, MODEL, COSTS, 2, ("eager", "lazy")) == "eager"
    assert choose_timing(32, math.inf, MODEL, COSTS, 2, ("lazy", "eager")) == "lazy"


def test_nonsense_is_refused() -> None:
    """No updates, no rate, no such timing."""
    with pytest.raises(PlanError, match="expected=0"):
        choose_shape(0, 1.0, MODEL, COSTS, 2)
    with pytest.raises(PlanError, match="rate=0"):
        choose_shape(1, 0.0, MODEL, COSTS, 2)
    with pytest.raises(PlanError, match="timing"):
        choose_shape(1, 1.0, MODEL, COSTS, 2, "soon")
    with pytest.raises(PlanError, match="timing"):
        choose_timing(1, 1.0, MODEL, COSTS, 2, ("soon",))
