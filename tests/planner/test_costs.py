"""The time of a round is predicted as the formulas say, for cases that are short enough to be written down."""

from __future__ import annotations

import json
import math
from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lifl.errors import PlanError
from lifl.planner.costs import Costs, Prediction, Sizes, predict
from lifl.planner.shape import Shape
from lifl.planner.timing import TIMINGS
from tests.planner.rounds import COSTS, MODEL, costs_of, rounds

WORK = COSTS.work(MODEL)


def played(shape: Shape, timing: str, arrivals: list[float], costs: Costs = COSTS, **more: Any) -> Prediction:
    """A prediction for the model that these tests are about."""
    return predict(shape, timing, arrivals, MODEL, costs, more.pop("workers", 2), **more)


def test_costs_survive_json() -> None:
    """The costs that are read from a file are those that were written to it."""
    assert Costs.from_dict(json.loads(json.dumps(COSTS.to_dict()))) == COSTS


@pytest.mark.parametrize(
    "wrong", [{"cores": 0}, {"parallel": math.nan}, {"dispatch_s": -1.0}, {"more": 1.0}, {"fold_bytes_s": "fast"}]
)
def test_wrong_costs_are_refused(wrong: dict[str, Any]) -> None:
    """A damaged file makes no plan."""
    with pytest.raises(PlanError):
        Costs.from_dict(COSTS.to_dict() | wrong)


def test_rounds_correct_the_costs() -> None:
    """A machine that is half as fast as was measured is known as that after some rounds, and a right one stays."""
    real = attrs.evolve(COSTS, fold_bytes_s=10e9, sum_bytes_s=20e9, mean_bytes_s=10e9)
    known, shape = COSTS, Shape(0, 2)
    for _ in range(20):
        said, took = (played(shape, "lazy", [0.0] * 16, costs).last_to_result_s for costs in (known, real))
        known = known.corrected(said, took)
    assert said == pytest.approx(took, rel=0.01)
    assert known.fold_bytes_s == pytest.approx(real.fold_bytes_s, rel=0.1)
    assert COSTS.corrected(1.0, 1.0) == COSTS
    assert COSTS.corrected(1e-9, 1.0, alpha=0).fold_bytes_s == COSTS.fold_bytes_s / 4
    with pytest.raises(PlanError, match="real_s=0"):
        COSTS.corrected(1.0, 0.0)


def test_sizes_are_those_of_a_model() -> None:
    """Four bytes a parameter, eight in a sum."""
    assert Sizes.of_float32(10) == Sizes(40, 80, 40)


@pytest.mark.parametrize("n", [1, 2, 16, 64])
def test_one_lazy_leaf_folds_once_and_becomes_the_top(n: int) -> None:
    """n updates read, a sum written, the sum read, the mean written."""
    expected = WORK.batch_s(n, is_first=True) + WORK.mean_of_s(1, 0)
    done = played(Shape(1, 0), "lazy", [0.0] * n, workers=1)
    assert done.completion_s == pytest.approx(expected)
    assert done.cpu_s == pytest.approx(expected)
    assert done.peak_bytes == n * MODEL.update_bytes + 2 * MODEL.sum_bytes + MODEL.mean_bytes


@pytest.mark.parametrize("n", [1, 16, 64])
@pytest.mark.parametrize("timing", TIMINGS)
def test_shards_read_each_update_once(n: int, timing: str) -> None:
    """Two ranges on two cores whose bus carries 1.5: each goes at 0.75 of what it does alone."""
    done = played(Shape(0, 2), timing, [0.0] * n)
    alone = (n * WORK.update_s + WORK.mean_s) / 2 + WORK.dispatch_s
    assert done.completion_s == pytest.approx(alone / (COSTS.parallel / 2))
    assert done.peak_bytes == n * MODEL.update_bytes + MODEL.mean_bytes


def test_eager_leaf_hides_the_work_behind_arrivals() -> None:
    """With arrivals slower than folds, one batch of one update and the top are left after the last."""
    gap = 3 * WORK.batch_s(1, is_first=False)
    done = played(Shape(1, 0), "eager", [i * gap for i in range(10)])
    assert done.last_to_result_s == pytest.approx(WORK.batch_s(1, is_first=False) + WORK.mean_of_s(1, 0))
    assert done.peak_bytes == MODEL.update_bytes + 2 * MODEL.sum_bytes + MODEL.mean_bytes


def test_last_update_is_left_to_the_ranges() -> None:
    """A leaf that is idle when the last update comes would write a sum for it alone."""
    gap = 3 * WORK.batch_s(1, is_first=False)
    done = played(Shape(1, 2), "eager", [i * gap for i in range(10)])
    assert done.last_to_result_s == pytest.approx(WORK.mean_of_s(1, 1, 2) / (COSTS.parallel / 2), rel=1e-3)


def test_what_no_leaf_has_begun_is_taken_back() -> None:
    """All at once: the leaf folds the first, the ranges are made of its sum and of the others."""
    done = played(Shape(1, 2), "eager", [0.0] * 16)
    first = WORK.batch_s(1, is_first=True)
    assert done.completion_s == pytest.approx(first + WORK.mean_of_s(1, 15, 2) / (COSTS.parallel / 2), rel=1e-3)


def test_just_in_time_folds_in_fewer_batches_and_is_as_early() -> None:
    """Held updates are folded in one batch, which ends about when the last is expected."""
    gap = 3 * WORK.batch_s(1, is_first=False)
    arrivals = [i * gap for i in range(20)]
    eager, jit, lazy = (played(Shape(1, 2), timing, arrivals, rate=1 / gap) for timing in ("eager", "jit", "lazy"))
    assert jit.last_to_result_s < eager.last_to_result_s + gap < lazy.last_to_result_s
    assert jit.cpu_s < eager.cpu_s
    assert played(Shape(1, 2), "jit", arrivals) == jit  # what it has seen is what was to be expected


def test_second_leaf_comes_when_the_first_has_work_waiting() -> None:
    """The round begins with one leaf and has no more than the shape says."""
    slow = played(Shape(2, 0), "eager", [i * 100.0 for i in range(6)])
    assert slow.peak_bytes == MODEL.update_bytes + 2 * MODEL.sum_bytes + MODEL.mean_bytes
    fast = played(Shape(2, 0), "eager", [0.0] * 6)
    assert fast.peak_bytes == 6 * MODEL.update_bytes + 4 * MODEL.sum_bytes + MODEL.mean_bytes


def test_a_cold_runtime_starts_first() -> None:
    """Its start is on the way to the result if nobody is warm, and behind the arrivals if they are slow.

    Memory touched for the first time is on the way too: the update, the sum, the mean.
    """
    cold, warm = (played(Shape(1, 0), "lazy", [0.0], warm=n, workers=1) for n in (0, 1))
    touched = WORK.update_touch_s + WORK.sum_made_s + WORK.touched_mean_s(0, 0)
    assert cold.completion_s == pytest.approx(warm.completion_s + COSTS.cold_start_s + touched)
    assert cold.cpu_s == pytest.approx(warm.cpu_s + COSTS.cold_start_s + touched)
    assert (cold.started, warm.started) == (1, 0)
    assert cold.runtimes == 1
    early = played(Shape(1, 0), "eager", [0.0, 10.0], warm=0)
    late = played(Shape(1, 0), "eager", [0.0, 10.0])
    assert early.last_to_result_s == pytest.approx(late.last_to_result_s + touched)
    thrice = played(Shape(1, 0), "eager", [0.0, 10.0, 20.0], warm=0)  # its two sums are touched by then
    assert thrice.last_to_result_s == pytest.approx(late.last_to_result_s + touched - WORK.sum_made_s)


def test_landing_is_part_of_it_when_asked_for() -> None:
    """The gateway copies one update after another, on a core for each."""
    done = played(Shape(0, 1), "eager", [0.0] * 4, has_landed=False)
    assert done.completion_s == pytest.approx(4 * WORK.land_s + WORK.mean_of_s(0, 4))
    assert done.cpu_s == pytest.approx(done.completion_s)


def test_nonsense_is_refused() -> None:
    """No arrivals, arrivals that go back in time, a timing that there is not."""
    for arrivals in ([], [1.0, 0.0]):
        with pytest.raises(PlanError, match="arrivals"):
            played(Shape(1, 0), "eager", arrivals)
    with pytest.raises(PlanError, match="timing"):
        played(Shape(1, 0), "soon", [0.0])


@given(rounds(), costs_of())
def test_every_round_ends_after_its_last_arrival(case: tuple[Shape, str, list[float], int], costs: Costs) -> None:
    """It takes at least what reading every update takes, on all cores, and the same input gives the same values."""
    shape, timing, arrivals, workers = case
    done = predict(shape, timing, arrivals, MODEL, costs, workers)
    assert done == predict(shape, timing, arrivals, MODEL, costs, workers)
    assert done.last_to_result_s > 0
    assert done.completion_s == pytest.approx(arrivals[-1] - arrivals[0] + done.last_to_result_s)
    work = costs.work(MODEL)
    assert done.cpu_s >= len(arrivals) * work.update_s * (1 - 1e-9)
    assert done.completion_s * costs.cores >= done.cpu_s * (1 - 1e-9)
    assert MODEL.update_bytes + MODEL.mean_bytes <= done.peak_bytes
    sums = 2 * shape.leaves * MODEL.sum_bytes
    assert done.peak_bytes <= len(arrivals) * MODEL.update_bytes + sums + MODEL.mean_bytes


RATES = ("land_bytes_s", "fold_bytes_s", "sum_bytes_s", "mean_bytes_s")


@given(rounds(at_once=True), costs_of(), st.sampled_from([*RATES, "cores"]), st.integers(2, 8))
def test_a_faster_machine_is_never_slower(
    case: tuple[Shape, str, list[float], int], costs: Costs, name: str, times: int
) -> None:
    """With all updates there nothing is decided by the moment at which something ends."""
    shape, _, arrivals, workers = case
    faster = attrs.evolve(costs, **{name: getattr(costs, name) * times})
    for timing in ("lazy", "eager") if not shape.leaves else ("lazy",):
        slow, fast = (predict(shape, timing, arrivals, MODEL, c, workers) for c in (costs, faster))
        assert fast.completion_s <= slow.completion_s * (1 + 1e-9)


@given(rounds(), costs_of(), st.sampled_from([*RATES, "cores"]), st.integers(2, 8))
def test_a_faster_machine_loses_a_batch_at_most(
    case: tuple[Shape, str, list[float], int], costs: Costs, name: str, times: int
) -> None:
    """A leaf that is done sooner may have begun a batch that it would not have begun, and writes one more sum.

    So in the worst case it is in that batch when the last update comes.
    """
    shape, timing, arrivals, workers = case
    faster = attrs.evolve(costs, **{name: getattr(costs, name) * times})
    slow, fast = (predict(shape, timing, arrivals, MODEL, c, workers) for c in (costs, faster))
    batch_s = costs.work(MODEL).batch_s(len(arrivals), is_first=False) * max(1, shape.leaves)
    assert fast.completion_s <= slow.completion_s + batch_s * (1 + 1e-9)
