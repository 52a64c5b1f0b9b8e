"""The shapes of a round's picture: the one place that decides what is drawn where. Pure.

A shape is at a moment, in seconds since the round was opened, and at a height in rows: row 0 is the gateway's, a row's
track is ``TRACK`` rows high, and its middle is at the row's number. ``svg`` and ``mpl`` only paint shapes.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Literal

import attrs

from lifl.report.scene import (
    COLOURS,
    Scene,
    Window,
    arrivals_in,
    bars_in,
    ends_at_mark,
    lane_of,
    marks_in,
    role_labels,
    roles_of,
)

TRACK = 0.6
"""Height of a track; the rest of a row has the labels of its roles."""

TOP = -TRACK / 2
"""The upper edge of the first track; above it are the labels of the marks."""

LEGEND = {"diamond": "role changes", "tick": "update has arrived", "triangle": "the last one"}
"""Meaning of the signs; those of the colours are the steps."""

ENLARGED = "the end, enlarged: after the last update"
"""Caption of a second window."""


@attrs.frozen
class Block:
    """A rectangle. Without a colour it has that of the text."""

    begin_s: float
    end_s: float
    top: float
    bottom: float
    colour: str | None = None
    opacity: float = 1.0
    title: str = ""


@attrs.frozen
class Stroke:
    """A vertical line, in the colour of the text."""

    at_s: float
    top: float
    bottom: float
    width_px: float = 1.0
    style: Literal["solid", "dotted", "dashed"] = "solid"
    opacity: float = 1.0
    title: str = ""


@attrs.frozen
class Sign:
    """A small mark of a fixed size, with its middle there, in the colour of the text."""

    kind: Literal["diamond", "triangle"]
    at_s: float
    y: float
    title: str = ""


@attrs.frozen
class Label:
    """A line of text on the base line `y`. It begins at the moment, or ends there, `gap_px` pixels off."""

    text: str
    at_s: float
    y: float
    is_end: bool = False
    is_bold: bool = False
    gap_px: float = 0.0


Shape = Block | Stroke | Sign | Label


def shapes_in(scene: Scene, window: Window) -> Iterator[Shape]:
    """All shapes of a window, those behind first. Axes, names of rows and the legend are the painter's."""
    rows = {worker: float(row) for row, worker in enumerate(scene.workers)}
    for row in rows.values():
        yield Block(window.begin_s, window.end_s, row - TRACK / 2, row + TRACK / 2, opacity=0.08)
    for at, _ in window.ticks():
        yield Stroke(at, TOP - 0.1, bottom_of(scene), opacity=0.2)
    # The shortest last, so that none is hidden.
    for bar in sorted(bars_in(scene, window), key=lambda bar: bar.begin_s - bar.end_s):
        low, high = lane_of(scene, bar.runtime, bar.step)
        top = rows[bar.runtime] - TRACK / 2
        begin = min(max(bar.begin_s, window.begin_s), window.end_s - window.least_s)
        # A quarter of the least width keeps neighbours apart.
        end = max(min(bar.end_s, window.end_s) - window.least_s / 4, begin + window.least_s)
        yield Block(begin, end, top + low * TRACK, top + high * TRACK, COLOURS.get(bar.step), title=str(bar))
    for at, text in arrivals_in(scene, window):
        yield Stroke(at, TOP - 0.1, TOP + 0.125, opacity=0.7, title=text)
    for worker, row in rows.items():
        yield from _roles(scene, window, worker, row)
    yield from _marks(scene, window)


def enlarged_part(scene: Scene) -> Iterator[Block]:
    """The part of the whole round that a second window beside it enlarges, if there is one."""
    whole = scene.windows[0]
    edge = whole.least_s / 2
    for window in scene.windows[1:]:
        width = max(window.end_s - window.begin_s, 3 * edge)
        yield Block(window.begin_s - edge, window.begin_s + width + edge, TOP - 0.2, bottom_of(scene), opacity=0.15)


def bottom_of(scene: Scene) -> float:
    """The height at which the lines of axes and marks end, just below the last track."""
    return len(scene.workers) - 1 + TRACK / 2 + 0.1


def _roles(scene: Scene, window: Window, worker: int, row: float) -> Iterator[Shape]:
    roles = roles_of(scene, worker)
    for x, is_end, text in role_labels(roles, window):
        yield Label(text, window.at(x), row - TRACK / 2 - 0.075, is_end)
    for (_, _, before), (begin, _, after) in pairwise(roles):
        if window.has(begin):
            yield Stroke(begin, row - TRACK / 2 - 0.05, row + TRACK / 2 + 0.05, width_px=1.5)
            yield Sign("diamond", begin, row, f"from {before} to {after} at {begin:.6g} s")


def _marks(scene: Scene, window: Window) -> Iterator[Shape]:
    styles: dict[str, Literal["dotted", "dashed"]] = {"last update": "dotted", "predicted": "dashed"}
    for at, what, is_labelled in marks_in(scene, window):
        title = f"{what}: {at:.6g} s"
        yield Stroke(at, TOP - 0.3, bottom_of(scene), width_px=1.5, style=styles.get(what, "solid"), title=title)
        if what == "last update":
            yield Sign("triangle", at, TOP - 0.24)
        if is_labelled:
            # The prediction is near the end: its label is a line higher.
            y = TOP - 0.75 if what == "predicted" else TOP - 0.4
            is_bold = what in ("model ready", "no result")
            yield Label(what, at, y, ends_at_mark(what, window.x(at), window), is_bold, gap_px=2)
