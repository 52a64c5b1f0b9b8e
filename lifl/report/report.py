"""What a round did: who counted, who did not and why, and where the time went. Values only; drawn elsewhere.

Times are seconds since the round was opened, on the monotonic clock.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs

from lifl.report.entries import Contribution, Rejection, Span

if TYPE_CHECKING:
    import os

    from matplotlib.axes import Axes


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
    spans : tuple of Span
        What every runtime did when.
    leaves, shards : int
        The shape that was carried out: leaves that folded updates, ranges of coordinates that the mean was
        made in (0: the top made it in one).
    started : int
        Processes started cold for the round.
    predicted : dict or None
        What the cost model says of the arrivals as they were: ``completion_s``, ``last_to_result_s``,
        ``cpu_s`` (seconds) and ``peak_bytes``.
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
    spans: tuple[Span, ...] = ()
    leaves: int = 0
    shards: int = 0
    started: int = 0
    predicted: dict[str, float] | None = None

    @property
    def runtimes(self) -> int:
        """Workers that took part."""
        return len({span.runtime for span in self.spans if span.step == "aggregate"})

    @property
    def weight(self) -> float:
        """The sum of the accepted weights."""
        return sum(c.weight for c in self.accepted)

    @property
    def shape(self) -> str:
        """The tree that was carried out, in words, as "2 leaves, 4 shards"; empty if it is not known."""
        counts = ((self.leaves, "leaf", "leaves"), (self.shards, "shard", "shards"))
        return ", ".join(f"{n} {one if n == 1 else many}" for n, one, many in counts if n)

    def to_dict(self) -> dict[str, Any]:
        """The same as plain dicts, lists, strings and numbers, for JSON."""
        return attrs.asdict(self)

    @classmethod
    def from_dict(cls, said: dict[str, Any]) -> RoundReport:
        """The report that :meth:`to_dict` was called on, also by a version that knew fewer fields."""
        values = {
            "accepted": tuple(Contribution(**one) for one in said["accepted"]),
            "rejected": tuple(Rejection(**one) for one in said["rejected"]),
            "late": tuple(said["late"]),
            "spans": tuple(Span(**one) for one in said.get("spans", ())),
        }
        return cls(**{**said, **values})

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
        if self.shape:
            line += f"; {self.shape}"
        times = {name: f"{name} {seconds:.3f}s" for name, seconds in self.stages.items()}
        if self.predicted and "total" in times:
            times["total"] += f" (predicted {self.predicted['completion_s']:.3f}s)"
        return f"{line}; {', '.join(times.values())}"

    # ------------------------------------------------------------ to look at; drawn elsewhere, imported late

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        from lifl.report.svg import report_html

        return report_html(self)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draws what every runtime did when, with matplotlib (``pip install 'lifl[plot]'``).

        Parameters
        ----------
        ax : matplotlib.axes.Axes or None
            Where to; ``None`` makes a figure with pyplot, in which the time after the last update is drawn
            once more, enlarged, if it is short.

        Returns
        -------
        matplotlib.axes.Axes
            Of the whole round; its x is seconds since the round was opened.

        Raises
        ------
        ModuleNotFoundError
            Without matplotlib.
        """
        from lifl.report.mpl import draw

        return draw(self, ax)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the report into a file, which is replaced at once or, if that fails, stays as it was.

        Parameters
        ----------
        path : str or os.PathLike
            The suffix says what is written: ``.html`` a page with picture and table, ``.svg`` the picture,
            ``.png`` and ``.pdf`` the same with matplotlib, ``.json`` :meth:`to_dict`.

        Raises
        ------
        ValueError
            If the suffix is another.
        OSError
            If it cannot be written.
        ModuleNotFoundError
            For ``.png`` and ``.pdf`` without matplotlib.
        """
        from lifl.report.svg import save

        save(self, path)
