"""Which shape and timing a Node takes for a round, from what the cost model predicts for each."""

from __future__ import annotations

from collections.abc import Iterator

import attrs

from lifl.errors import PlanError
from lifl.planner.costs import Costs, Prediction, Sizes, predict
from lifl.planner.shape import Shape
from lifl.planner.timing import check_timing

MAX_ARRIVALS = 64
"""With how many arrivals shapes are compared at most: what a shape gains shows in a few batches."""

WORTH_IT = 0.02
"""What part of the best time a cheaper shape may lose and still be taken: below it the prediction is noise."""


def choose_shape(
    expected: int, rate: float | None, sizes: Sizes, costs: Costs, workers: int, timing: str = "eager"
) -> Shape:
    """The shape with the earliest result; of those within ``WORTH_IT``, the one that takes least CPU, then memory.

    The time is ``last_to_result_s``, from the last arrival to the mean, if update i of `expected` is at the door at
    ``i / rate``. Landing counts: a leaf that folds meanwhile takes the memory bus from it. Without a rate the time is
    the sum of two: all at once, and each after the one before has been folded; so a shape is taken that is good for
    both.

    With all at once shards win: each byte is read once and no sum is written. With arrivals slower than folding a leaf
    ahead wins: when the last update comes, all but that one are in the sum.

    Parameters
    ----------
    expected : int
        Updates of the round.
    rate : float or None
        Updates per second; None: not known. ``math.inf``: all at once.
    sizes : Sizes
    costs : Costs
    workers : int
        The most runtimes. No more leaves or shards are planned than that, nor than there are cores.
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
    """The timing, with the best shape for it, that has the result first; else the one that takes least CPU and memory.

    By the same measure as :func:`choose_shape`, over the `timings` that are allowed. With updates that trickle in it is
    eager or jit; with all at once any does, and the first that costs least is taken.
    """
    tried = []
    for timing in timings:
        shape = choose_shape(expected, rate, sizes, costs, workers, timing)
        tried.append(_Try(shape, timing, _outcomes(shape, expected, rate, sizes, costs, workers, timing)))
    return _best(tried).timing


def candidates(expected: int, cores: int, workers: int) -> Iterator[Shape]:
    """Trees, shards and both, of at most ``min(cores, workers)`` runtimes, and no more leaves than updates.

    Leaves are tried in powers of two and all; shards none, one a core.
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
