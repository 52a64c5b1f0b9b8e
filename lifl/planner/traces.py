"""Traces: the times and nodes at which the updates of a round arrive, made up with a seed or measured.

The settings of LIFL's paper (MLSys 2024) are second hand: the numbers of clients, the models and the delays are known;
everything else is an argument.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from random import Random

import attrs

from lifl.errors import PlanError
from lifl.planner.costs import Sizes

RESNET18 = Sizes.of_float32(11_689_512)
RESNET34 = Sizes.of_float32(21_797_672)
RESNET152 = Sizes.of_float32(60_192_808)

LONGEST_DELAY_S = 60.0
"""The longest delay of a client in the paper's ResNet-18 setting; each is delayed by 0 to so many seconds."""

ABLATION_NODES = 5
ABLATION_CAPACITY = 20
"""Updates that a node of the ablation aggregates at once."""
ABLATION_UPDATES = (20, 60, 100)


def _sorted(instance: object, attribute: attrs.Attribute[tuple[float, ...]], times: tuple[float, ...]) -> None:
    if not times or any(later < earlier for earlier, later in pairwise(times)) or not math.isfinite(times[-1]):
        raise PlanError(f"{len(times)} arrivals: give at least one, sorted and finite")


@attrs.frozen
class Trace:
    """The updates of one round. All are of one model, and so of one size.

    Attributes
    ----------
    times_s : tuple of float
        The time of each update's arrival, when its bytes are there, in seconds, sorted.
    sizes : Sizes
    landing : tuple of str or None
        The node on which each client has to land its update; None: any node. Default: any node for all.
    """

    times_s: tuple[float, ...] = attrs.field(validator=_sorted)
    sizes: Sizes
    landing: tuple[str | None, ...] = attrs.field()

    @landing.default
    def _anywhere(self) -> tuple[str | None, ...]:
        return (None,) * len(self.times_s)

    @landing.validator
    def _is_complete(self, attribute: object, landing: tuple[str | None, ...]) -> None:
        if len(landing) != len(self.times_s):
            raise PlanError(f"{len(landing)} landing nodes for {len(self.times_s)} updates: give one each, or None")

    def __len__(self) -> int:
        return len(self.times_s)

    @property
    def rate(self) -> float:
        """``(n - 1) / (t_n - t_1)``, updates per second; inf: all at once."""
        passed = self.times_s[-1] - self.times_s[0]
        return (len(self) - 1) / passed if passed > 0 else math.inf

    def landing_on(self, nodes: Sequence[str]) -> Trace:
        """The trace with the clients bound to `nodes` in turn, as an ordinary load balancer spreads them."""
        return attrs.evolve(self, landing=tuple(nodes[i % len(nodes)] for i in range(len(self))))


def at_once(n: int, sizes: Sizes) -> Trace:
    """All updates arrive at time 0."""
    return Trace((0.0,) * n, sizes)


def uniform(n: int, window_s: float, sizes: Sizes, random: Random) -> Trace:
    """Each update arrives at a random time in 0 to `window_s`, uniformly."""
    return Trace(tuple(sorted(random.uniform(0.0, window_s) for _ in range(n))), sizes)


def evenly(n: int, window_s: float, sizes: Sizes) -> Trace:
    """Update i arrives at ``i * window_s / (n - 1)``: they trickle in, the first at 0 and the last at the end."""
    return Trace(tuple(i * window_s / max(1, n - 1) for i in range(n)), sizes)


def heavy_tailed(n: int, median_s: float, sizes: Sizes, random: Random, alpha: float = 1.5) -> Trace:
    """Stragglers: delays with a Pareto tail, ``P(delay > t) = (1 + t / s) ** -alpha``.

    Half of them arrive by `median_s`, so ``s = median / (2 ** (1 / alpha) - 1)``. The smaller alpha, the later the last
    one: with 1.5 the mean exists and the variance does not.
    """
    scale = median_s / (2 ** (1 / alpha) - 1)
    return Trace(tuple(sorted(scale * (random.paretovariate(alpha) - 1) for _ in range(n))), sizes)


def paper_resnet18(random: Random, clients: int = 120) -> Trace:
    """The paper's small devices: 120 clients of ResNet-18, each delayed by 0 to 60 s."""
    return uniform(clients, LONGEST_DELAY_S, RESNET18, random)


def paper_resnet152(random: Random, clients: int = 15, window_s: float = LONGEST_DELAY_S) -> Trace:
    """The paper's servers as clients: 15 of ResNet-152. The window in which they reply is not known."""
    return uniform(clients, window_s, RESNET152, random)


def ablation(updates: int, nodes: int = ABLATION_NODES, sizes: Sizes = RESNET18, window_s: float = 0.0) -> Trace:
    """The paper's ablation: 20, 60 or 100 updates for 5 nodes, and as many for each node if there are more.

    The trace has ``updates * nodes / 5`` updates, rounded up, evenly over `window_s`; by default all at once.
    """
    return evenly(-(-updates * nodes // ABLATION_NODES), window_s, sizes)
