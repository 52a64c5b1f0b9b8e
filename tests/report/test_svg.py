"""SVG, HTML and files of a report: well-formed and escaped whatever it holds, legible, never half written."""

from __future__ import annotations

import json
import os
import re
import stat
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lifl.report.entries import Contribution, Rejection, Span
from lifl.report.report import RoundReport
from lifl.report.scene import WIDTH_PX
from lifl.report.svg import COLOURS, SUFFIXES, escaped, gantt_svg, report_html

SVG = "{http://www.w3.org/2000/svg}"
HOSTILE = "<script>alert('1')</script>&\"\x00\x1b\ud800\u202e]]>"


def report_of(updates: int, workers: int, total: float) -> RoundReport:
    """Updates that come one by one, folded by workers in turn, and a top."""
    spans, accepted = [], []
    for i in range(updates):
        at, worker = total * 0.8 * (i + 1) / updates, 1 + i % workers
        spans.append(Span(0, "gateway", "receive", at - total * 1e-4, at, 1))
        spans.append(Span(worker, "leaf", "aggregate", at, at + total * 1e-4, 1))
        accepted.append(Contribution(f"client {i}", 1, worker, at, at + total * 1e-4))
    spans.append(Span(1, "top", "aggregate", total * 0.9, total * 0.99, workers))
    stages = {"receive": total * 0.8, "finish": total * 0.09, "last_to_result": total * 0.2, "total": total}
    return RoundReport(1, updates, "eager", "any", tuple(accepted), stages=stages, spans=tuple(spans), leaves=workers)


PLAIN = report_of(4, 2, 10.0)
EVIL = attrs.evolve(
    PLAIN,
    accepted=(Contribution(HOSTILE, 1, 1, 1.0, 2.0, 0.5),),
    rejected=(Rejection(HOSTILE, HOSTILE, HOSTILE),),
    late=(HOSTILE,),
    error=HOSTILE,
    timing=HOSTILE,
    spans=(Span(1, HOSTILE, HOSTILE, 0.0, 1.0, 1), Span(1, HOSTILE + "2", "send", 1.0, 2.0)),
)

texts = st.text(max_size=20)
times = st.floats(0, 1e4) | st.floats()
reports = st.builds(
    RoundReport,
    st.integers(0, 100),
    st.integers(1, 100),
    st.sampled_from(["eager", "lazy"]),
    st.just("any"),
    st.lists(st.builds(Contribution, texts, st.just(1.0), st.integers(0, 3), st.floats(0, 1e4), st.floats(0, 1e4))),
    st.lists(st.builds(Rejection, texts, texts, texts), max_size=3).map(tuple),
    st.lists(texts, max_size=3).map(tuple),
    st.integers(0, 3),
    st.fixed_dictionaries({"total": st.floats(0, 1e4)}, optional={"finish": st.floats(0, 1), "receive": times}),
    st.none() | texts,
    st.lists(st.builds(Span, st.integers(0, 9), texts, st.sampled_from(sorted(COLOURS)), times, times), max_size=20),
    st.integers(0, 2),
    st.integers(0, 2),
)


class Tags(HTMLParser):
    """The tags and attributes that a browser would see."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Called for each."""
        self.seen += [tag, *(name for name, _ in attrs)]


def bars(svg: str) -> list[ElementTree.Element]:
    """The bars of a picture, which say what they are."""
    return [rect for rect in ElementTree.fromstring(svg).iter(f"{SVG}rect") if rect.find(f"{SVG}title") is not None]


def luminance(colour: str) -> float:
    """The relative luminance of WCAG 2."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return sum(factor * c for factor, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


# ---------------------------------------------------------------- the picture


@given(reports)
def test_every_report_gives_well_formed_svg(report: RoundReport) -> None:
    """Whatever is in it: XML that can be read, and no bar outside the picture or too small to be seen."""
    for rect in bars(gantt_svg(report)):
        x, width = float(rect.get("x", "")), float(rect.get("width", ""))
        assert 0 <= x <= x + width <= WIDTH_PX
        assert width >= 2
    gantt_svg(report).encode()


def test_picture_has_what_happened() -> None:
    """Rows, roles, the change of role, arrivals, the end and the legend."""
    svg = gantt_svg(attrs.evolve(PLAIN, deaths=1, predicted={"completion_s": 9.5}))
    said = "".join(ElementTree.fromstring(svg).itertext())
    for words in ("gateway", "worker 1", "worker 2", "leaf", "top", "last update", "model ready", "predicted"):
        assert words in said
    assert "† 1 worker died and was replaced" in said
    assert "from leaf to top at 9 s" in said
    assert "client 2, weight 1: 6 s" in said
    assert {rect.get("fill") for rect in bars(svg)} == {COLOURS["receive"], COLOURS["aggregate"]}


def test_many_spans_stay_small_and_legible() -> None:
    """The picture of 5000 updates has no more bars than there are places for them."""
    svg = gantt_svg(report_of(5000, 8, 10.0))
    assert len(bars(svg)) < 9 * WIDTH_PX / 2
    assert len(bars(gantt_svg(report_of(200, 8, 10.0)))) == 401


def test_round_in_which_nothing_happened_is_drawn() -> None:
    """An empty report has a gateway and an axis."""
    said = "".join(ElementTree.fromstring(gantt_svg(RoundReport(1, 1, "eager", "any"))).itertext())
    assert "gateway" in said
    assert "so far" in said


@pytest.mark.parametrize("background", ["#ffffff", "#1a1e26"])
@pytest.mark.parametrize("colour", COLOURS.values())
def test_colours_are_seen_on_light_and_dark(colour: str, background: str) -> None:
    """Each step's colour has a contrast of 3 to both, as WCAG 2 asks of graphics."""
    low, high = sorted((luminance(colour), luminance(background)))
    assert (high + 0.05) / (low + 0.05) >= 3


def test_inline_picture_takes_the_colour_of_its_page() -> None:
    """A notebook's theme is not the system's: all that has no colour of its own has the text's."""
    svg = gantt_svg(PLAIN)
    assert set(re.findall(r'(?:fill|stroke)="([^"]+)"', svg)) <= {"currentColor", *COLOURS.values()}
    assert "<style" not in svg
    assert " id=" not in svg


# ---------------------------------------------------------------- what comes from outside


def test_nothing_from_outside_becomes_markup() -> None:
    """The tags of a page with hostile names and reasons are those of one with harmless names."""
    tame = attrs.evolve(
        EVIL,
        accepted=(attrs.evolve(EVIL.accepted[0], client_id="a"),),
        rejected=(Rejection("a", "b", "c"),),
        late=("a",),
        error="e",
        timing="eager",
        spans=(Span(1, "r", "s", 0.0, 1.0, 1), Span(1, "r2", "send", 1.0, 2.0)),
    )
    assert set(Tags(report_html(EVIL)).seen) == set(Tags(report_html(tame)).seen)
    assert "<script" not in report_html(EVIL)
    assert "&lt;script&gt;" in report_html(EVIL)
    ElementTree.fromstring(gantt_svg(EVIL))


def test_what_cannot_be_shown_is_replaced() -> None:
    """Control characters, half pairs and what turns the direction of writing are not passed on."""
    assert escaped("a\x00b\ud800c\u202ed\n<") == "a\ufffdb\ufffdc\ufffdd &lt;"
    assert len(escaped("x" * 10_000)) < 400


def test_long_lists_are_cut() -> None:
    """A hundred refusals are a dozen and a number."""
    refused = tuple(Rejection(f"client {i}", "keys", "no 'w'") for i in range(100))
    page = report_html(attrs.evolve(PLAIN, rejected=refused))
    assert "client 11 (" in page
    assert "client 12 (" not in page
    assert "and 88 more" in page


# ---------------------------------------------------------------- the table


def test_table_has_predicted_beside_real() -> None:
    """With how far off it was."""
    predicted = {"completion_s": 12.0, "last_to_result_s": 2.01, "cpu_s": 3.0, "peak_bytes": 2e9}
    text = re.sub(r"<[^>]+>", " ", report_html(attrs.evolve(PLAIN, predicted=predicted)))
    text = " ".join(text.split())
    assert "total 10 s 12 s (+20%)" in text
    assert "last to result 2 s 2.01 s (+0.5%)" in text
    assert "CPU time 3 s peak memory 2,000 MB" in text


def test_table_without_prediction_has_one_column() -> None:
    """Nothing is said of what nobody predicted."""
    page = report_html(PLAIN)
    assert "real" in page
    assert "predicted" not in page


def test_notebook_shows_picture_and_table() -> None:
    """A report in the last line of a cell shows itself."""
    shown = PLAIN._repr_html_()
    assert shown == report_html(PLAIN)
    assert "<svg" in shown
    assert "<table>" in shown


# ---------------------------------------------------------------- files


def test_file_is_of_the_kind_of_its_suffix(tmp_path: Path) -> None:
    """In capitals too, and nothing else is left in the folder. Those of matplotlib are tested with it."""
    begins = {".html": b"<!doctype html>", ".svg": b"<svg", ".json": b"{"}
    assert set(begins) | {".png", ".pdf"} == set(SUFFIXES)
    for suffix, begin in begins.items():
        EVIL.save(tmp_path / f"round{suffix.upper()}")
        assert (tmp_path / f"round{suffix.upper()}").read_bytes().startswith(begin)
    assert len(list(tmp_path.iterdir())) == len(begins)


def test_json_is_the_report(tmp_path: Path) -> None:
    """The file has what to_dict says."""
    PLAIN.save(tmp_path / "round.json")
    assert RoundReport.from_dict(json.loads((tmp_path / "round.json").read_text())) == PLAIN


def test_page_stands_alone(tmp_path: Path) -> None:
    """The page fits light and dark systems and loads nothing."""
    PLAIN.save(str(tmp_path / "round.html"))
    page = (tmp_path / "round.html").read_text()
    assert "color-scheme: light dark" in page
    assert "prefers-color-scheme: dark" in page
    assert not re.findall(r"(?:src|href)=|url\(|@import", page)


def test_svg_file_has_its_own_background(tmp_path: Path) -> None:
    """It may be put on a page of any colour."""
    PLAIN.save(tmp_path / "round.svg")
    root = ElementTree.parse(tmp_path / "round.svg").getroot()
    assert root.find(f"{SVG}rect[@class='card']") is not None


@pytest.mark.parametrize("name", ["round.jpeg", "round", ".html"])
def test_unknown_suffix_is_refused(tmp_path: Path, name: str) -> None:
    """With what was asked for, and the choices."""
    with pytest.raises(ValueError, match=re.escape(repr(name))) as caught:
        PLAIN.save(tmp_path / name)
    assert ".html, .svg, .png, .pdf, .json" in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_file_is_old_or_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If it cannot be replaced it stays as it was, and nothing is left beside it."""
    path = tmp_path / "round.svg"
    path.write_text("old")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("no")))
    with pytest.raises(OSError, match="no"):
        PLAIN.save(path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_file_has_the_rights_of_any_other(tmp_path: Path) -> None:
    """A user who may read a file that was written in the usual way may read this one."""
    PLAIN.save(tmp_path / "round.svg")
    (tmp_path / "other").write_text("")
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert len(modes) == 1


def test_missing_folder_is_an_error(tmp_path: Path) -> None:
    """No folder is made on the way."""
    with pytest.raises(FileNotFoundError):
        PLAIN.save(tmp_path / "none" / "round.html")
