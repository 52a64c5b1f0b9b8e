"""The report of a round: updates that count, updates that do not and why, and times. Values only; drawn elsewhere.

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
    """A round as it really went.

    Attributes
    ----------
    round : int
        The Node's number of the round.
    expected : int
        Updates that the round waited for.
    timing, order : str
        As given to ``open_round``.
    accepted : tuple of Contribution
        In the order of arrival. If there is a result, exactly the updates in it.
    rejected : tuple of Rejection
        In the order of refusal.
    late : tuple of str
        Clients that did not reply in time. A strategy knows them, a Node does not.
    deaths : int
        Workers that died while they had a role in the round, and were replaced.
    stages : dict
        Seconds: ``receive`` (opened -> last update ready), ``land`` (copying and checking, summed over all updates),
        ``fold`` (folding, summed over all workers), ``finish`` (the top's work), ``last_to_result``, ``total``.
    error : str or None
        The reason why there is no result.
    spans : tuple of Span
        The work of every worker.
    leaves, shards : int
        The shape that was carried out: leaves that folded updates, and ranges of coordinates in which the mean was
        made (0: the top made all of it).
    started : int
        Processes started cold for the round.
    predicted : dict or None
        The cost model's prediction for the real arrivals: ``completion_s``, ``last_to_result_s``,
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
        """The tree that was carried out, in words such as "2 leaves, 4 shards"; empty if it is not known."""
        counts = ((self.leaves, "leaf", "leaves"), (self.shards, "shard", "shards"))
        return ", ".join(f"{n} {one if n == 1 else many}" for n, one, many in counts if n)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain dicts, lists, strings and numbers, for JSON."""
        return attrs.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> RoundReport:
        """The reverse of :meth:`to_dict`; also reads the values of a version that had fewer fields."""
        entries = {
            "accepted": tuple(Contribution(**one) for one in values["accepted"]),
            "rejected": tuple(Rejection(**one) for one in values["rejected"]),
            "late": tuple(values["late"]),
            "spans": tuple(Span(**one) for one in values.get("spans", ())),
        }
        return cls(**{**values, **entries})

    def __str__(self) -> str:
        """The report in a line, as it is logged."""
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

    # ------------------------------------------------------------ pictures: drawn elsewhere, imported late

    def _repr_html_(self) -> str:
        """The picture and a table, as a notebook shows the report."""
        from lifl.report.svg import report_html

        return report_html(self)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draws the work of every worker over time, with matplotlib (``pip install 'lifl[plot]'``).

        Parameters
        ----------
        ax : matplotlib.axes.Axes or None
            The axes to draw into. ``None`` makes a figure with pyplot, in which the time after the last update is
            drawn once more, enlarged, if it is short.

        Returns
        -------
        matplotlib.axes.Axes
            The axes of the whole round; x is seconds since the round was opened.

        Raises
        ------
        ModuleNotFoundError
            If matplotlib is not installed.
        """
        from lifl.report.mpl import draw

        return draw(self, ax)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the report into a file. The file is replaced as a whole or, if that fails, stays as it was.

        Parameters
        ----------
        path : str or os.PathLike
            The suffix chooses the format: ``.html`` is a page with the picture and the table, ``.svg`` the picture,
            ``.png`` and ``.pdf`` the picture made with matplotlib, ``.json`` the values of :meth:`to_dict`.

        Raises
        ------
        ValueError
            If the suffix is none of these.
        OSError
            If the file cannot be written.
        ModuleNotFoundError
            For ``.png`` and ``.pdf``, if matplotlib is not installed.
        """
        from lifl.report.svg import save

        save(self, path)
