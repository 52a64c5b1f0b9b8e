"""The parts of a picture of a round: windows, ticks, bars, roles, marks."""

from __future__ import annotations

import attrs
import pytest

from lifl.report.entries import Contribution, Span
from lifl.report.report import RoundReport
from lifl.report.scene import (
    MIN_PX,
    Window,
    arrivals_in,
    bars_in,
    headline,
    marks_in,
    remarks,
    role_labels,
    roles_of,
    scene_of,
    short_time,
    shorten,
)

STAGES = {"receive": 1.0, "finish": 0.001, "last_to_result": 0.01, "total": 10.01}
TRICKLED = RoundReport(
    1,
    2,
    "eager",
    "any",
    accepted=(Contribution("a", 1, 1, 1.0, 1.1), Contribution("b", 1, 1, 10.0, 10.004)),
    stages=STAGES,
    spans=(
        Span(0, "gateway", "receive", 0.9, 1.0, 1),
        Span(1, "leaf", "aggregate", 1.0, 1.1, 1),
        Span(0, "gateway", "receive", 9.9, 10.0, 1),
        Span(1, "leaf", "aggregate", 10.0, 10.004, 1),
        Span(1, "shard", "aggregate", 10.005, 10.009, 2),
        Span(2, "shard", "aggregate", 10.005, 10.008, 2),
    ),
    leaves=1,
    shards=2,
)


@pytest.mark.parametrize(
    ("begin", "end", "said"),
    [
        (0, 10, ["0 s", "2 s", "4 s", "6 s", "8 s", "10 s"]),
        (0, 0.1, ["0 ms", "20 ms", "40 ms", "60 ms", "80 ms", "100 ms"]),
        (0, 2e-4, ["0 µs", "50 µs", "100 µs", "150 µs", "200 µs"]),
        (0, 3600, ["0 s", "1000 s", "2000 s", "3000 s"]),
    ],
)
def test_axis_is_in_a_fitting_unit(begin: float, end: float, said: list[str]) -> None:
    """Ticks are round numbers of s, ms or µs, far enough apart to be read."""
    assert [text for _, text in Window(begin, end, 0, 400).ticks()] == said


def test_axis_may_count_from_a_moment() -> None:
    """The enlarged end's axis is about what came after the last update."""
    ticks = list(Window(9.995, 10.02, 0, 400, 10.0).ticks())
    assert [text for _, text in ticks] == ["-5 ms", "0 ms", "+5 ms", "+10 ms", "+15 ms", "+20 ms"]
    assert ticks[1][0] == 10.0


def test_place_and_moment_are_inverse() -> None:
    """A window's places are its moments."""
    window = Window(2.0, 4.0, 50, 100)
    assert window.x(3.0) == 100
    assert window.at(100) == 3.0


def test_short_end_is_enlarged() -> None:
    """The time after the last update is shown once more if it is short; without a result there is no such window."""
    assert len(scene_of(TRICKLED).windows) == 2
    assert len(scene_of(attrs.evolve(TRICKLED, error="closed")).windows) == 1
    assert len(scene_of(attrs.evolve(TRICKLED, stages={**STAGES, "total": 15.0})).windows) == 1


def test_close_spans_become_one_bar() -> None:
    """A thousand spans in a second of a long round are one bar, which knows how many and how much they were."""
    spans = tuple(Span(1, "leaf", "aggregate", i / 1000, (i + 0.5) / 1000, 2) for i in range(1000))
    scene = scene_of(RoundReport(1, 1, "eager", "any", stages={"total": 1000.0}, spans=spans))
    (bar,) = bars_in(scene, scene.windows[0])
    assert (bar.spans, bar.updates, bar.begin_s) == (1000, 2000, 0.0)
    assert "1000 times" in str(bar)


def test_bars_that_can_be_told_apart_are_not_joined() -> None:
    """Back to back, but wide, they stay two."""
    spans = (Span(1, "leaf", "aggregate", 0.0, 1.0, 1), Span(1, "leaf", "aggregate", 1.0, 2.0, 1))
    scene = scene_of(RoundReport(1, 1, "eager", "any", stages={"total": 2.0}, spans=spans))
    assert len(bars_in(scene, scene.windows[0])) == 2


def test_close_arrivals_become_one() -> None:
    """Ticks that would touch are one tick that says how many they are."""
    accepted = tuple(Contribution(str(i), 1, 1, 1 + i * 1e-6, 1.1) for i in range(50))
    scene = scene_of(RoundReport(1, 50, "eager", "any", accepted, stages={"total": 100.0}))
    assert [text for _, text in arrivals_in(scene, scene.windows[0])] == ["50 updates around 1 s"]


def test_roles_are_stretches() -> None:
    """A role lasts until another begins; landing is none, or it would alternate with folding in one process."""
    spans = [Span(0, "gateway" if i % 2 else "leaf", "receive", i, i + 1, 1) for i in range(10)]
    spans.append(Span(0, "top", "aggregate", 10, 11))
    scene = scene_of(RoundReport(1, 1, "eager", "any", spans=tuple(spans)))
    assert roles_of(scene, 0) == [(0, 9, "leaf"), (10, 11, "top")]


def test_labels_of_roles_do_not_touch() -> None:
    """Roles that follow closely are one label, which ends at the edge if it would leave the window."""
    window = Window(0.0, 10.0, 0, 1000)
    assert role_labels([(0, 5, "leaf"), (5, 10, "top")], window) == [(0, False, "leaf"), (500, False, "top")]
    assert role_labels([(9.9, 9.95, "leaf"), (9.95, 10, "top")], window) == [(990, True, "leaf → top")]
    many = [(i / 100, i / 100, str(i)) for i in range(6)]
    assert role_labels(many, window)[0][2] == "0 → 1 → … → 5"


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({}, "model ready"),
        ({"error": "closed"}, "no result"),
        ({"stages": {**STAGES, "finish": 0.0}, "shards": 0}, "so far"),
    ],
)
def test_end_is_what_it_is(changes: dict[str, object], what: str) -> None:
    """A round ends with a model, without one, or has not ended."""
    scene = scene_of(attrs.evolve(TRICKLED, **changes))
    assert scene.marks[1][1] == what


def test_mark_is_said_once() -> None:
    """In the enlarged end if it is there, else in the whole round."""
    predicted = {"completion_s": 12.0, "last_to_result_s": 2.0, "cpu_s": 1.0, "peak_bytes": 1.0}
    scene = scene_of(attrs.evolve(TRICKLED, predicted=predicted))
    said = [[what for _, what, is_told in marks_in(scene, window) if is_told] for window in scene.windows]
    assert said == [["predicted"], ["last update", "model ready"]]


def test_report_without_spans_shows_commits() -> None:
    """Reports of earlier versions show when updates arrived and when they were in a sum."""
    scene = scene_of(attrs.evolve(TRICKLED, spans=()))
    assert scene.workers == (0, 1)
    assert [bar.begin_s for bar in bars_in(scene, scene.windows[0])] == [1.1, 10.004]


def test_times_that_are_none_are_left_out() -> None:
    """A span that is not finite is not drawn; one that ends before it begins is drawn where it begins."""
    spans = (Span(1, "leaf", "send", float("nan"), 1.0), Span(2, "leaf", "send", 1.0, float("inf")))
    scene = scene_of(attrs.evolve(TRICKLED, spans=(*spans, Span(3, "leaf", "send", 5.0, 4.0))))
    (bar,) = bars_in(scene, scene.windows[0])
    assert (bar.runtime, bar.begin_s, bar.end_s) == (3, 5.0, 5.0)


def test_smallest_bar_has_a_width() -> None:
    """The least time of a window is what the least width stands for."""
    assert Window(0, 100, 0, 100).least_s == MIN_PX


def test_lines_say_what_happened() -> None:
    """The headline has the round, the remarks what went wrong, and nothing if nothing did."""
    assert headline(TRICKLED) == (
        "round 1: 2 of 2 updates · 1 leaf, 2 shards · eager · 10 ms from the last update to the model"
    )
    assert remarks(TRICKLED) == ""
    wrong = attrs.evolve(TRICKLED, deaths=2, late=("x",), started=1, error="closed")
    assert remarks(wrong) == "† 2 workers died and were replaced · 1 late · 1 started cold · no result: closed"
    assert remarks(attrs.evolve(TRICKLED, deaths=1)) == "† 1 worker died and was replaced"


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.0, "0 µs"), (1.5e-6, "1.5 µs"), (0.0123, "12.3 ms"), (9.99, "9.99 s"), (125.0, "125 s"), (36000.0, "36000 s")],
)
def test_time_has_three_digits(seconds: float, said: str) -> None:
    """In the unit in which it is at least 1."""
    assert short_time(seconds) == said


def test_long_text_keeps_both_ends() -> None:
    """The shortened text keeps its beginning, which names the thing, and its end, which names the fault."""
    assert shorten("abc", 3) == "abc"
    assert shorten("begin" + "x" * 100 + "end", 10) == "begin … xxend"
