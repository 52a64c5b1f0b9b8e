"""What a round did: who counted, who did not and why, and where the time went. Values only.

Times are seconds since the round was opened, on the monotonic clock.
"""

from __future__ import annotations

from typing import Any

import attrs


@attrs.frozen
class Contribution:
    """One update that is in the model.

    ``runtime`` is the worker that folded it (0: the calling process), ``arrived_s`` when it was ready in
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
class RoundReport:
    """A round as it really was.

    Attributes
    ----------
    round : int
        The Node's number of the round.
    expected : int
        How many updates it waited for.
    timing, order : str
        As given to ``open_round``.
    accepted : tuple of Contribution
        In order of arrival. If there is a result, exactly the updates in it.
    rejected : tuple of Rejection
        In order of refusal.
    late : tuple of str
        Clients that were asked and did not answer in time; a strategy knows them, a Node does not.
    deaths : int
        Workers that died while they had a part in the round, and were replaced.
    stages : dict
        Seconds: ``receive`` (opened -> last update ready), ``land`` (copying and checking, all updates),
        ``fold`` (workers' time in folds, all), ``finish`` (the top's), ``last_to_result``, ``total``.
    error : str or None
        Why there is no result.
    """

    round: int
    expected: int
    timing: str
    order: str
    accepted: tuple[Contribution, ...] = ()
    rejected: tuple[Rejection, ...] = ()
    late: tuple[str, ...] = ()
    deaths: int = 0
    stages: dict[str, float] = attrs.field(factory=dict)
    error: str | None = None

    @property
    def runtimes(self) -> int:
        """Workers that took part."""
        return len({c.runtime for c in self.accepted})

    @property
    def weight(self) -> float:
        """The sum of the accepted weights."""
        return sum(c.weight for c in self.accepted)

    def to_dict(self) -> dict[str, Any]:
        """The same as plain dicts, lists, strings and numbers, for JSON."""
        return attrs.asdict(self)

    @classmethod
    def from_dict(cls, said: dict[str, Any]) -> RoundReport:
        """The report that :meth:`to_dict` was called on."""
        accepted = tuple(Contribution(**one) for one in said["accepted"])
        rejected = tuple(Rejection(**one) for one in said["rejected"])
        return cls(**{**said, "accepted": accepted, "rejected": rejected, "late": tuple(said["late"])})

    def __str__(self) -> str:
        """One line, as it is logged."""
        line = f"{len(self.accepted)} of {self.expected} updates, weight {self.weight:g}"
        if self.rejected:
            line += "; refused: " + ", ".join(f"{r.client_id} ({r.rule}: {r.reason})" for r in self.rejected)
        if clipped := [f"{c.client_id} (to {c.clipped:.3g})" for c in self.accepted if c.clipped < 1]:
            line += "; clipped: " + ", ".join(clipped)
        if self.late:
            line += "; late: " + ", ".join(self.late)
        if self.deaths:
            line += f"; workers replaced: {self.deaths}"
        if self.error:
            return f"{line}; no result: {self.error}"
        times = ", ".join(f"{name} {seconds:.3f}s" for name, seconds in self.stages.items())
        return f"{line}; {times}"
