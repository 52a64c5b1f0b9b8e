"""The picture with matplotlib: the same, in the caller's axes or in a figure, and what is said without matplotlib."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import attrs
import pytest

from lifl.report.entries import Contribution, Span
from lifl.report.report import RoundReport

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("agg")

from matplotlib import pyplot  # noqa: E402 (after the backend is chosen)

pytestmark = pytest.mark.leaves("matplotlib keeps its fonts open")

TRICKLED = RoundReport(
    1,
    1,
    "eager",
    "any",
    accepted=(Contribution("a", 1, 1, 10.0, 10.004),),
    stages={"finish": 0.004, "last_to_result": 0.01, "total": 10.01},
    spans=(
        Span(0, "gateway", "receive", 9.9, 10.0, 1),
        Span(1, "leaf", "aggregate", 10.0, 10.004, 1),
        Span(1, "top", "aggregate", 10.005, 10.009, 1),
    ),
    leaves=1,
    predicted={"completion_s": 0.015},  # from the first arrival
)


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    pyplot.close("all")


def test_plot_makes_a_figure_with_the_end_enlarged() -> None:
    """The axes that come back are those of the whole round; the end is beside them."""
    ax = TRICKLED.plot()
    assert ax.figure.axes[0] is ax
    assert len(ax.figure.axes) == 2
    assert ax.get_xlim() == (0.0, pytest.approx(10.015 * 1.02))
    assert [label.get_text() for label in ax.get_yticklabels()] == ["gateway", "worker 1"]
    assert {"last update", "model ready", "predicted"} <= {text.get_text().strip() for text in ax.figure.axes[1].texts}
    assert {"leaf", "top"} <= {text.get_text() for text in ax.figure.axes[1].texts}


def test_plot_draws_into_given_axes() -> None:
    """Only there: the figure is the caller's."""
    figure, (left, right) = pyplot.subplots(1, 2)
    assert TRICKLED.plot(left) is left
    assert figure.axes == [left, right]
    assert not right.patches
    assert {"last update", "model ready", "predicted"} <= {text.get_text() for text in left.texts}  # the end is short


def test_save_leaves_no_figure_open(tmp_path: Path) -> None:
    """A thousand saved rounds are no thousand figures in pyplot."""
    TRICKLED.save(tmp_path / "round.png")
    assert pyplot.get_fignums() == []


@pytest.mark.parametrize(("name", "begin"), [("round.png", b"\x89PNG"), ("round.PDF", b"%PDF")])
def test_file_is_of_the_kind_of_its_suffix(tmp_path: Path, name: str, begin: bytes) -> None:
    """And nothing else is left in the folder."""
    TRICKLED.save(tmp_path / name)
    assert (tmp_path / name).read_bytes().startswith(begin)
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("error", ["$\\frac{", "a\nb\t", "<&>", "\x00\ud800"])
def test_text_from_outside_is_no_formula(tmp_path: Path, error: str) -> None:
    """Dollars in an error or a role are dollars."""
    report = attrs.evolve(TRICKLED, error=error, spans=(Span(1, "$x_", "send", 0, 1), Span(1, "$", "send", 2, 3)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report.save(tmp_path / "round.png")


def test_empty_report_is_drawn(tmp_path: Path) -> None:
    """Nothing happened, and that is seen."""
    RoundReport(1, 1, "eager", "any").save(tmp_path / "round.pdf")


def test_without_matplotlib_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Plots and PNGs need it; the file is not begun."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for call in (TRICKLED.plot, lambda: TRICKLED.save(tmp_path / "round.png")):
        with pytest.raises(ModuleNotFoundError, match=r"pip install 'lifl\[plot\]'") as caught:
            call()
        assert caught.value.name == "matplotlib"
    assert not list(tmp_path.iterdir())
