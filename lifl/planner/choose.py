"""The choice of a round's shape and timing, from the cost model's prediction for each."""

from __future__ import annotations

from collections.abc import Iterator

import attrs

from lifl.errors import PlanError
from lifl.planner.costs import Costs, Prediction, Sizes, predict
from lifl.planner.shape import Shape
from lifl.planner.timing import check_timing

MAX_ARRIVALS = 64
"""Shapes are compared with at most so many arrivals: the gain of a shape shows in a few batches."""

WORTH_IT = 0.02
"""A cheaper shape is taken if it loses at most this part of the best time: below it the prediction is noise."""


def choose_shape(
    expected: int, rate: float | None, sizes: Sizes, costs: Costs, workers: int, timing: str = "eager"
) -> Shape:
    """The shape with the earliest result; among those within ``WORTH_IT``, the one that takes least CPU, then memory.

    The time is ``last_to_result_s``, from the last arrival to the mean, if update i of `expected` arrives at
    ``i / rate``. Landing counts: a leaf that folds meanwhile takes the memory bus from it. Without a rate the time is
    the sum of two cases: all updates arrive at once, and each arrives after the one before is folded. So the shape is
    good for both.

    If all arrive at once, shards win: each byte is read once and no sum is written. If they arrive more slowly than
    they are folded, a leaf wins: when the last update arrives, all others are in the sum.

    Parameters
    ----------
    expected : int
        Updates of the round.
    rate : float or None
        Updates per second; None: unknown. ``math.inf``: all at once.
    sizes : Sizes
    costs : Costs
    workers : int
        The most workers. The shape has no more leaves or shards than workers, or than cores.
    timing : str
        One of ``lifl.planner.timing.TIMINGS``.

    Raises ``PlanError`` for an expected number or a rate that is not above 0, or an unknown timing.
    """
    if expected < 1 or (rate is not None and not rate > 0):
        raise PlanError(f"expected={expected}, rate={rate!r}: give numbers above 0")
    check_timing(timing)
    tried = [
        _Try(shape, timing, _outcomes(shape, expected, rate, sizes, costs, workers, timing))
        for shape in candidates(expected, costs.cores, workers)
    ]
    return _best(tried).shape


def choose_timing(
    expected: int,
    rate: float | None,
    sizes: Sizes,
    costs: Costs,
    workers: int,
    timings: tuple[str, ...] = ("eager", "jit", "lazy"),
) -> str:
    """The timing that, with the best shape for it, has the result first; among equals the one that costs least.

    The measure is that of :func:`choose_shape`, over the allowed `timings`. For updates that trickle in it is eager or
    jit. If all arrive at once, all timings are alike, and the first with the least cost is taken.
    """
    tried = []
    for timing in timings:
        shape = choose_shape(expected, rate, sizes, costs, workers, timing)
        tried.append(_Try(shape, timing, _outcomes(shape, expected, rate, sizes, costs, workers, timing)))
    return _best(tried).timing


def candidates(expected: int, cores: int, workers: int) -> Iterator[Shape]:
    """Trees, shards and both, for at most ``min(cores, workers)`` workers, and with no more leaves than updates.

    The leaves are none, a power of two, or as many as possible; the shards none, or as many as possible.
    """
    most = max(1, min(cores, workers))
    leaves = sorted({0, min(most, expected), *(n for n in _powers(most) if n <= expected)})
    for shards in sorted({0, most}):
        for n in leaves:
            if n or shards:
                yield Shape(n, shards)


def _powers(most: int) -> Iterator[int]:
    n = 1
    while n <= most:
        yield n
        n *= 2


@attrs.frozen
class _Try:
    shape: Shape
    timing: str
    outcomes: tuple[Prediction, ...]

    @property
    def last_to_result_s(self) -> float:
        return sum(outcome.last_to_result_s for outcome in self.outcomes)

    @property
    def cost(self) -> tuple[float, int]:
        return sum(outcome.cpu_s for outcome in self.outcomes), max(outcome.peak_bytes for outcome in self.outcomes)


def _best(tried: list[_Try]) -> _Try:
    bound = min(one.last_to_result_s for one in tried) * (1 + WORTH_IT)
    return min((one for one in tried if one.last_to_result_s <= bound), key=lambda one: one.cost)


def _outcomes(
    shape: Shape, expected: int, rate: float | None, sizes: Sizes, costs: Costs, workers: int, timing: str
) -> tuple[Prediction, ...]:
    n = min(expected, MAX_ARRIVALS)
    work = costs.work(sizes)
    gaps = (0.0, 2 * (work.land_s + work.batch_s(1, is_first=False))) if rate is None else (1 / rate,)
    outcomes = []
    for gap in gaps:
        arrivals, expects = [i * gap for i in range(n)], 1 / gap if gap else None
        outcomes.append(predict(shape, timing, arrivals, sizes, costs, workers, rate=expects, has_landed=False))
    return tuple(outcomes)
