"""The entries of a round's report: updates that count, updates that do not, and stretches of work. Values only.

Times are seconds since the round was opened, on the monotonic clock.
"""

from __future__ import annotations

import attrs


@attrs.frozen
class Contribution:
    """One update that is in the model.

    ``runtime`` is the worker that folded it (of several that did, each in its range of coordinates, the first),
    ``arrived_s`` when it was ready in
    the arena, ``folded_s`` when it was committed to a partial sum. ``clipped`` is the factor by which its
    distance from the base model was reduced (1: it was not; see ``Limits.clipping_norm``).
    """

    client_id: str
    weight: float
    runtime: int
    arrived_s: float
    folded_s: float
    clipped: float = 1.0


@attrs.frozen
class Rejection:
    """One update that is not, by which rule, and what was wrong with it."""

    client_id: str
    rule: str
    reason: str


@attrs.frozen
class Span:
    """What one runtime did for a while; times are seconds since the round was opened.

    ``runtime`` is the worker's number (0: the calling process; it lands updates, and folds if there are no
    workers). ``role`` is "gateway" (landing), "leaf", "middle", "top" or "shard" (one coordinate range of the
    mean), ``step`` "receive", "aggregate" or "send". ``updates`` is how many updates (or sums) it was about.
    """

    runtime: int
    role: str
    step: str
    begin_s: float
    end_s: float
    updates: int = 0
