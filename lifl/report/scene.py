"""The contents of a round's picture: windows of time, bars, roles, marks and texts. Pure.

Times are seconds since the round was opened; places are pixels of a picture that is ``WIDTH_PX`` wide.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Protocol

import attrs

from lifl.report.entries import Contribution, Rejection, Span

COLOURS = {"receive": "#3b82d6", "aggregate": "#d97706", "send": "#c2458f"}
"""Colours of the steps. Each has a contrast of at least 3:1 to white and to nearly black."""

LANES = {"receive": (0.0, 0.25), "aggregate": (0.25, 0.75), "send": (0.75, 1.0)}
"""Top and bottom of each step in a row's track, as parts of its height, so that a short bar covers no other step."""

WIDTH_PX, LABEL_PX, MIN_PX, LETTER_PX = 960.0, 88.0, 2.0, 6.2
MIN_S, MAX_S = 1e-6, 1e9  # no time of a round is outside these
ENLARGED_BELOW = 0.12
"""An end of the round that is a smaller part of it than this is drawn once more, enlarged."""


class Shown(Protocol):
    """The part of :class:`lifl.RoundReport` that is drawn."""

    @property
    def round(self) -> int:
        """The Node's number of the round."""

    @property
    def expected(self) -> int:
        """Updates that the round waited for."""

    @property
    def timing(self) -> str:
        """The timing that was given to ``open_round``."""

    @property
    def shape(self) -> str:
        """The tree that was carried out, in words."""

    @property
    def weight(self) -> float:
        """The sum of the accepted weights."""

    @property
    def accepted(self) -> Sequence[Contribution]:
        """Updates in the result."""

    @property
    def rejected(self) -> Sequence[Rejection]:
        """Updates that were refused."""

    @property
    def late(self) -> Sequence[str]:
        """Clients that did not reply in time."""

    @property
    def spans(self) -> Sequence[Span]:
        """The work of each worker."""

    @property
    def stages(self) -> Mapping[str, float]:
        """Seconds by stage."""

    @property
    def predicted(self) -> Mapping[str, float] | None:
        """The cost model's prediction."""

    @property
    def error(self) -> str | None:
        """The reason why there is no result."""

    @property
    def deaths(self) -> int:
        """Workers that died and were replaced."""

    @property
    def started(self) -> int:
        """Processes started cold."""

    @property
    def shards(self) -> int:
        """Ranges of coordinates in which the mean was made."""

    def to_dict(self) -> dict[str, object]:
        """The report as plain values, for JSON."""


@attrs.frozen
class Window:
    """A stretch of time and the place where it is drawn. Its axis counts from `origin_s`."""

    begin_s: float
    end_s: float
    left_px: float
    width_px: float
    origin_s: float = 0.0

    @property
    def least_s(self) -> float:
        """The time that is as wide as the smallest bar."""
        return (self.end_s - self.begin_s) * MIN_PX / self.width_px

    @property
    def unit(self) -> tuple[float, str]:
        """The unit of the axis, and how many of it a second is."""
        length = self.end_s - self.begin_s
        return (1.0, "s") if length >= 1 else (1e3, "ms") if length >= 1e-3 else (1e6, "µs")

    def has(self, at_s: float) -> bool:
        """True if the moment is inside."""
        return self.begin_s <= at_s <= self.end_s

    def x(self, at_s: float) -> float:
        """The pixel of a moment; that of the nearest edge for a moment outside."""
        part = (at_s - self.begin_s) / (self.end_s - self.begin_s)
        return self.left_px + self.width_px * min(max(part, 0.0), 1.0)

    def at(self, x: float) -> float:
        """The moment of a pixel, the reverse of :meth:`x`."""
        return self.begin_s + (x - self.left_px) / self.width_px * (self.end_s - self.begin_s)

    def ticks(self) -> Iterator[tuple[float, str]]:
        """Moments and their labels: steps of 1, 2 or 5 times a power of ten, 60 px or more apart."""
        per_s, unit = self.unit
        least = (self.end_s - self.begin_s) * per_s * 60 / self.width_px
        power = 10.0 ** math.floor(math.log10(least))
        step = next(power * digit for digit in (1, 2, 5, 10) if power * digit >= least)
        first = math.ceil((self.begin_s - self.origin_s) * per_s / step - 1e-9)
        last = math.floor((self.end_s - self.origin_s) * per_s / step + 1e-9)
        for number in range(first, last + 1):
            sign = "+" if self.origin_s and number > 0 else ""
            yield self.origin_s + number * step / per_s, f"{sign}{number * step:.6g} {unit}"


@attrs.frozen
class Bar:
    """A bar: one span, or several of the same worker, role and step that are too close to be drawn apart."""

    runtime: int
    role: str
    step: str
    begin_s: float
    end_s: float
    updates: int
    spans: int = 1

    def __str__(self) -> str:
        what = f" of {self.updates} update{'s' * (self.updates != 1)}" if self.updates else ""
        times = f"{self.spans} times, " if self.spans > 1 else ""
        took = short_time(self.end_s - self.begin_s)
        at = f"{self.begin_s:.6g} to {self.end_s:.6g} s ({took})"
        return f"{row_name(self.runtime)}, {self.role}: {self.step}{what}, {times}{at}"


@attrs.frozen
class Scene:
    """All that the picture of a report shows."""

    spans: tuple[Span | Bar, ...]
    workers: tuple[int, ...]
    arrivals: tuple[tuple[float, str], ...]
    marks: tuple[tuple[float, str], ...]  # the last update, the end, the prediction
    windows: tuple[Window, ...]


def scene_of(report: Shown) -> Scene:
    """The scene of a report. If it has no spans, arrivals and commits are shown."""
    spans: Iterable[Span | Bar] = report.spans or (
        Bar(c.runtime, "leaf", "aggregate", c.folded_s, c.folded_s, 1) for c in report.accepted if c.folded_s
    )
    spans = [s for s in spans if abs(s.begin_s) < MAX_S and abs(s.end_s) < MAX_S]  # false for NaN too
    arrivals = sorted((c.arrived_s, f"client {c.client_id}, weight {c.weight:g}") for c in report.accepted)
    total = report.stages.get("total", 0.0)
    end = max([total, *(s.end_s for s in spans), *(at for at, _ in arrivals)])
    marks = [(arrivals[-1][0], "last update")] if arrivals else []
    is_ready = report.error is None and (report.stages.get("finish", 0) > 0 or report.shards > 0)
    marks.append((total, "no result" if report.error is not None else "model ready" if is_ready else "so far"))
    if report.predicted:
        first_s = arrivals[0][0] if arrivals else 0.0  # the prediction counts from the first arrival
        marks.append((first_s + report.predicted["completion_s"], "predicted"))
        if total < marks[-1][0] < 1.5 * end:
            end = marks[-1][0]
    end = max(end, MIN_S)
    workers = tuple(sorted({0, *(s.runtime for s in spans)}))
    return Scene(tuple(spans), workers, tuple(arrivals), tuple(marks), choose_windows(end, is_ready, marks))


def choose_windows(end: float, is_ready: bool, marks: list[tuple[float, str]]) -> tuple[Window, ...]:
    """The whole round and, if the time after the last update is a short part of it, that time once more, enlarged."""
    left, width = LABEL_PX, WIDTH_PX - LABEL_PX - 24
    last, ready = marks[0][0], marks[1][0] if len(marks) > 1 else 0.0
    tail = ready - last
    if not is_ready or not MIN_S < tail < ENLARGED_BELOW * end:
        return (Window(0.0, end * 1.02, left, width),)
    shown = max(at for at, _ in marks if at < ready + tail)
    whole = Window(0.0, end * 1.02, left, 0.58 * width)
    begin = max(last - 0.3 * tail, 0.0)
    return whole, Window(begin, shown + 0.45 * tail, left + 0.63 * width, 0.37 * width, last)


def bars_in(scene: Scene, window: Window) -> list[Bar]:
    """The bars of a window; spans that are closer than the smallest bar become one bar."""
    rows: defaultdict[tuple[int, str, str], list[Bar]] = defaultdict(list)
    near = window.least_s / 2
    for s in sorted(scene.spans, key=lambda s: s.begin_s):
        end = max(s.end_s, s.begin_s)
        if end < window.begin_s or s.begin_s > window.end_s:
            continue
        row = rows[s.runtime, s.role, s.step]
        if (
            row
            and s.begin_s < row[-1].end_s + near
            and min(end - s.begin_s, row[-1].end_s - row[-1].begin_s) < 4 * near
        ):
            before = row[-1]
            end, updates = max(end, before.end_s), before.updates + s.updates
            row[-1] = attrs.evolve(before, end_s=end, updates=updates, spans=before.spans + 1)
        else:
            row.append(Bar(s.runtime, s.role, s.step, s.begin_s, end, s.updates))
    return [bar for row in rows.values() for bar in row]


def lane_of(scene: Scene, worker: int, step: str) -> tuple[float, float]:
    """Top and bottom of a step in its row, as parts of the height; the whole height if the worker does nothing else."""
    steps = {s.step for s in scene.spans if s.runtime == worker}
    return (0.0, 1.0) if len(steps) == 1 else LANES.get(step, (0.0, 1.0))


def roles_of(scene: Scene, worker: int) -> list[tuple[float, float, str]]:
    """Begin, end and name of each stretch in which a worker had one role. Landing is no role here: the row names it."""
    found: list[tuple[float, float, str]] = []
    for s in sorted(scene.spans, key=lambda s: s.begin_s):
        if s.runtime != worker or s.role == "gateway":
            continue
        if found and found[-1][2] == s.role:
            found[-1] = (found[-1][0], max(found[-1][1], s.end_s), s.role)
        else:
            found.append((s.begin_s, s.end_s, s.role))
    return found


def role_labels(roles: list[tuple[float, float, str]], window: Window) -> list[tuple[float, bool, str]]:
    """Pixel, whether the label ends there, and text of each label; labels that would touch become one."""
    labels: list[tuple[float, list[str]]] = []
    for begin, end, role in roles:
        if end < window.begin_s - window.least_s or begin > window.end_s:
            continue
        at = window.x(begin)
        if labels and at < labels[-1][0] + LETTER_PX * len(" → ".join(labels[-1][1])) + 8:
            labels[-1][1].append(role)
        else:
            labels.append((at, [role]))
    right = window.left_px + window.width_px
    texts = [(at, " → ".join(names if len(names) < 4 else [*names[:2], "…", names[-1]])) for at, names in labels]
    return [(min(at, right), at + LETTER_PX * len(text) > right, text) for at, text in texts]


def marks_in(scene: Scene, window: Window) -> Iterator[tuple[float, str, bool]]:
    """Moment and name of each mark, and whether its label is in this window: only the last window that has it."""
    for at, what in scene.marks:
        having = [one for one in scene.windows if one.has(at)]
        if window in having:
            yield at, what, window == having[-1]


def ends_at_mark(what: str, x: float, window: Window) -> bool:
    """True if the label of a mark is to its left."""
    if what == "last update":
        return x > window.left_px + LETTER_PX * len(what)
    return x > window.left_px + window.width_px - 12 - LETTER_PX * len(what)


def row_name(worker: int) -> str:
    """The name of a worker's row."""
    return f"worker {worker}" if worker else "gateway"


def short_time(seconds: float) -> str:
    """A time with three digits in a fitting unit."""
    for per_s, unit in ((1.0, "s"), (1e3, "ms")):
        if abs(seconds) * per_s >= 1:
            return f"{seconds * per_s:.3g} {unit}" if seconds < 1000 else f"{seconds:.0f} s"
    return f"{seconds * 1e6:.3g} µs"


def headline(report: Shown) -> str:
    """The round in a line of text."""
    parts = [f"round {report.round}: {len(report.accepted)} of {report.expected} updates", report.shape, report.timing]
    if report.error is None and "last_to_result" in report.stages:
        parts.append(f"{short_time(report.stages['last_to_result'])} from the last update to the model")
    return " · ".join(filter(None, parts))


def remarks(report: Shown) -> str:
    """Everything that did not go as planned, in a line of text; empty if all did."""
    died = "1 worker died and was" if report.deaths == 1 else f"{report.deaths} workers died and were"
    parts = [
        f"† {died} replaced" if report.deaths else "",
        f"{len(report.rejected)} refused" if report.rejected else "",
        f"{len(report.late)} late" if report.late else "",
        f"{report.started} started cold" if report.started else "",
        f"no result: {report.error}" if report.error is not None else "",
    ]
    return " · ".join(filter(None, parts))


def arrivals_in(scene: Scene, window: Window) -> list[tuple[float, str]]:
    """Moments and descriptions of arrivals; arrivals that are closer than the smallest bar become one."""
    found: list[tuple[float, str]] = []
    count = 1
    for at, whose in scene.arrivals:
        if not window.has(at):
            continue
        if found and at - found[-1][0] < window.least_s:
            count += 1
            found[-1] = (found[-1][0], f"{count} updates around {found[-1][0]:.6g} s")
        else:
            count = 1
            found.append((at, f"{whose}: {at:.6g} s"))
    return found


def plain(text: object) -> str:
    """The text as one line that can be shown everywhere: no control characters, half pairs or turns of direction."""
    return "".join(" " if c.isspace() else c if c.isprintable() else "\ufffd" for c in str(text))


def shorten(text: str, most: int) -> str:
    """About `most` characters of the text: its middle is cut out, as a traceback names the error at its end."""
    return text if len(text) <= most else f"{text[: most // 2]} … {text[most // 2 - most :]}"
