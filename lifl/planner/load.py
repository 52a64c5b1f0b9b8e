"""The load of a node: measured, smoothed, and set against its capacity.

The symbols are LIFL's (MLSys 2024): for node i, k_i updates arrive per second, each takes E_i seconds of a worker, so
Q_i = k_i * E_i updates are in work at a time, and of the MC_i that it can aggregate at once RC_i = MC_i - Q_i are free.
"""

from __future__ import annotations

import math

import attrs

ALPHA = 0.7
"""The part of the old value that an EWMA keeps; 0 forgets at once, 1 learns nothing."""

EXECUTION_S = 0.01
"""E where none was measured, in seconds: about one ResNet-18 update (47 MB), copied in and folded."""

REPLAN_THRESHOLD = 0.5
"""Two queues must differ by this part of the larger one for a new plan inside a round."""

REPLAN_UPDATES = 1.0
"""Two queues must differ by so many updates at least: the queue of an idle node that gets work changes by all of it."""


def _finite(instance: object, attribute: attrs.Attribute[float], value: float) -> None:
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{attribute.name}={value!r}: give a finite number from 0 up")


@attrs.frozen
class Load:
    """The work that arrives at one node.

    Attributes
    ----------
    arrival_rate : float
        k, updates per second.
    execution_s : float
        E, seconds of one worker per update.
    """

    arrival_rate: float = attrs.field(default=0.0, validator=_finite)
    execution_s: float = attrs.field(default=0.0, validator=_finite)

    def __attrs_post_init__(self) -> None:
        if not math.isfinite(self.queue):
            raise ValueError(
                f"arrival_rate={self.arrival_rate!r}, execution_s={self.execution_s!r}: too much at a time"
            )

    @property
    def queue(self) -> float:
        """Q = k * E, the expected number of updates in work at a time (Little's law)."""
        return self.arrival_rate * self.execution_s


def observe(old: Load | None, updates: int, seconds: float, busy_s: float, alpha: float = ALPHA) -> Load:
    """The load after one more interval, smoothed: ``new = alpha * old + (1 - alpha) * measured``.

    Parameters
    ----------
    old : Load or None
        The load before; None: nothing is known, and the measured values are taken as they are.
    updates : int
        Updates that arrived in the interval. Without any the execution time stays as it was.
    seconds : float
        Length of the interval; above 0.
    busy_s : float
        Seconds that the workers worked on these updates, all together.
    alpha : float
        From 0 to 1, see ``ALPHA``.

    Raises ``ValueError`` for an interval of no length, a negative count or an alpha outside 0 to 1.
    """
    if not seconds > 0 or updates < 0 or busy_s < 0:
        raise ValueError(f"updates={updates}, seconds={seconds!r}, busy_s={busy_s!r}: none is below 0, seconds above")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha={alpha!r}: give a number from 0 to 1")
    rate = updates / seconds
    if old is None:
        return Load(rate, busy_s / updates if updates else 0.0)
    execution_s = old.execution_s
    if updates:
        measured = busy_s / updates
        # An execution time of 0 was never measured, so no part of it is kept.
        execution_s = alpha * execution_s + (1 - alpha) * measured if execution_s else measured
    return Load(alpha * old.arrival_rate + (1 - alpha) * rate, execution_s)


def has_changed(planned: Load, now: Load, threshold: float = REPLAN_THRESHOLD) -> bool:
    """True if a plan made for one load should be made anew for the other.

    That is ``|Q' - Q| > threshold * max(Q, Q')`` and ``|Q' - Q| >= REPLAN_UPDATES``, with Q the queue (updates) of
    `planned` and Q' that of `now`: relative, so that it is the same for large and small nodes, and to the larger, so
    that growth and decline count alike.

    Raises ``ValueError`` for a threshold outside 0 to 1: no change is larger than all of the larger one.
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold={threshold!r}: give a number from 0 to 1")
    before, after = planned.queue, now.queue
    return abs(after - before) > threshold * max(before, after) and abs(after - before) >= REPLAN_UPDATES


@attrs.frozen
class ServerNode:
    """A machine, or a part of one, that aggregates; not Flower's SuperNode, which trains.

    Attributes
    ----------
    name : str
        Unique among the nodes of a plan.
    capacity : float
        MC, updates that it can aggregate at once.
    cores : int
        Workers that can work at a time. No more leaves than that are planned on it.
    load : Load
        The load of other rounds.
    warm : int
        Workers that wait for work there.
    """

    name: str
    capacity: float = attrs.field(validator=_finite)
    cores: int = attrs.field(default=1, validator=attrs.validators.ge(1))
    load: Load = Load()
    warm: int = attrs.field(default=0, validator=attrs.validators.ge(0))

    @property
    def room(self) -> int:
        """RC = MC - k * E, in whole updates: the node can take so many more. Never below 0."""
        return max(0, math.floor(self.capacity - self.load.queue))
