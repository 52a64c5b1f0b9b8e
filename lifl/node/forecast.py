"""The measurements that a Node carries from round to round: the rate of updates, and the costs of this machine.

Asks the planner, which is pure, for the shape of each round. It reads no clock. Called with the Node's lock held.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from lifl.planner.choose import choose_shape
from lifl.planner.costs import Costs, Sizes, predict
from lifl.planner.load import Load, observe
from lifl.planner.shape import Shape
from lifl.report.report import RoundReport
from lifl.round.pacing import Pace
from lifl.round.settings import Terms
from lifl.workers.traffic import Interval

MAX_PREDICTED = 4096
"""The most updates of a round for which the cost model is asked afterwards; each takes some microseconds."""
MIN_TELLING_S = 0.005
"""A shorter end of a round tells more about wake-ups than about this machine's memory, and corrects no costs."""


class Forecast:
    """The cost model of one Node, and what it has learnt.

    Attributes
    ----------
    costs : Costs
        Measured, or assumed where they were not, and corrected after each round.
    load : Load or None
        Arrival rate and execution time, smoothed; None before the first round.
    """

    def __init__(self, costs: Costs, workers: int, passed: Callable[[], Interval | None] = lambda: None) -> None:
        self.costs, self._workers, self._passed = costs, workers, passed
        self.load: Load | None = None
        self._shapes: dict[tuple[object, ...], Shape] = {}

    def pace(self, terms: Terms) -> Pace:
        """The plan of a round with these terms."""
        sizes = sizes_of(terms)

        def choose(rate: float | None) -> Shape:
            # Rounded to powers of two: the planner is asked once for rates that are much the same.
            step = None if rate is None else rate if rate in (0, math.inf) else 2.0 ** round(math.log2(rate))
            key = (terms.expected, step, sizes, terms.timing)
            if key not in self._shapes:
                self._shapes[key] = choose_shape(terms.expected, step, sizes, self.costs, self._workers, terms.timing)
            return self._shapes[key]

        shape = terms.shape
        most = min(self._workers, self.costs.cores)
        if shape is None and terms.is_flower:
            shape = Shape(0, most)
        elif shape is None and terms.commit_every is not None:
            shape = Shape(most, 0)  # shards would hold updates without a bound
        rate = self.load.arrival_rate if self.load is not None and self.load.arrival_rate > 0 else None
        return Pace(terms.timing, choose, shape, terms.expected, rate, self.costs.work(sizes).batch_s(1, False))

    def predict(self, terms: Terms, shape: Shape, arrivals: Sequence[float]) -> dict[str, float] | None:
        """The cost model's prediction for a round whose updates were ready at `arrivals` (seconds, sorted).

        ``completion_s``, ``last_to_result_s``, ``cpu_s`` and ``peak_bytes``; None if there are too many.
        """
        if len(arrivals) > MAX_PREDICTED:
            return None
        prediction = predict(shape, terms.timing, arrivals, sizes_of(terms), self.costs, self._workers)
        return {
            "completion_s": prediction.completion_s,
            "last_to_result_s": prediction.last_to_result_s,
            "cpu_s": prediction.cpu_s,
            "peak_bytes": prediction.peak_bytes,
        }

    def learn(self, report: RoundReport) -> None:
        """Takes a round that is over into account: its arrivals, and the error of its prediction.

        The kernel's counts go before the workers' notes, if the kernel has seen all updates.
        """
        arrivals = [update.arrived_s for update in report.accepted]
        busy_s = sum(s.end_s - s.begin_s for s in report.spans if s.role in ("leaf", "shard"))
        if len(arrivals) > 1 and busy_s > 0:
            # Updates that come faster than they can be folded are as good as all at once.
            seconds = max(max(arrivals) - min(arrivals), busy_s / (4 * self._workers))
            updates, seen = len(arrivals), self._passed()
            if seen is not None and seen.updates >= updates:  # else no worker had some of them until the end
                updates, seconds, busy_s = seen.updates, seen.seconds, seen.busy_s
            self.load = observe(self.load, updates, seconds, busy_s)
        prediction, real_s = report.predicted, report.stages["last_to_result"]
        if prediction is not None and not report.deaths and min(prediction["last_to_result_s"], real_s) > MIN_TELLING_S:
            self.costs = self.costs.corrected(prediction["last_to_result_s"], real_s)
            self._shapes.clear()


def sizes_of(terms: Terms) -> Sizes:
    """Sizes for the cost model; each at least 1."""
    layout = terms.layout
    update, total, mean = (max(1, n) for n in (layout.update_bytes, layout.sum_bytes, layout.mean_bytes))
    return Sizes(update, total, mean, arrays=max(1, len(terms.spec)))
