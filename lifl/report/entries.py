"""The entries of a round's report: updates that count, updates that do not, and stretches of work. Values only.

Times are seconds since the round was opened, on the monotonic clock.
"""

from __future__ import annotations

import attrs


@attrs.frozen
class Contribution:
    """An update that is in the model.

    ``runtime`` is the worker that folded the update (the first, if several folded it, each in its range of
    coordinates). ``arrived_s`` is the time at which the update was ready in the arena, ``folded_s`` the time at which
    it was committed to a partial sum. ``clipped`` is the factor by which its distance from the base model was reduced
    (1: not reduced; see ``Limits.clipping_norm``).
    """

    client_id: str
    weight: float
    runtime: int
    arrived_s: float
    folded_s: float
    clipped: float = 1.0


@attrs.frozen
class Rejection:
    """An update that was refused: the rule that it broke, and what was wrong with it."""

    client_id: str
    rule: str
    reason: str


@attrs.frozen
class Span:
    """A stretch of one worker's work; times are seconds since the round was opened.

    ``runtime`` is the worker's number (0: the calling process, which lands updates, and folds them if there are no
    workers). ``role`` is "gateway" (landing), "leaf", "top" or "shard" (one coordinate range of the mean).
    ``step`` is "receive", "aggregate" or "send". ``updates`` is the number of updates (or sums) in the work.
    """

    runtime: int
    role: str
    step: str
    begin_s: float
    end_s: float
    updates: int = 0
