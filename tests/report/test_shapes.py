"""The shapes of a picture: inside their window, wide enough to be seen, and the same for both painters."""

from __future__ import annotations

from xml.etree import ElementTree

import attrs
import pytest
from hypothesis import given

from lifl.report.report import RoundReport
from lifl.report.scene import plain, scene_of
from lifl.report.shapes import Block, Label, Sign, Stroke, enlarged_part, shapes_in
from lifl.report.svg import gantt_svg
from tests.report.test_svg import EVIL, PLAIN, SVG, report_of, reports

TRICKLED = report_of(40, 3, 10.0)
TRICKLED = attrs.evolve(TRICKLED, stages={**TRICKLED.stages, "total": 8.1}, predicted={"completion_s": 7.9})


@given(reports)
def test_every_shape_is_in_its_window(report: RoundReport) -> None:
    """No block is outside or narrower than the least bar, and no line is outside."""
    scene = scene_of(report)
    for window in scene.windows:
        slack = 1e-6 * (window.end_s - window.begin_s)
        for shape in shapes_in(scene, window):
            if isinstance(shape, Block):
                assert window.begin_s - slack <= shape.begin_s
                assert shape.end_s <= window.end_s + slack
                assert shape.end_s - shape.begin_s >= window.least_s - slack
            else:
                assert window.begin_s - slack <= shape.at_s <= window.end_s + slack


def test_later_shapes_are_in_front() -> None:
    """Tracks, then lines of the axis, then bars, then the marks."""
    scene = scene_of(PLAIN)
    shapes = list(shapes_in(scene, scene.windows[0]))
    bars = [number for number, shape in enumerate(shapes) if isinstance(shape, Block) and shape.title]
    assert {type(shape) for shape in shapes[: bars[0]]} == {Block, Stroke}
    assert {type(shape) for shape in shapes[bars[-1] + 1 :]} == {Stroke, Sign, Label}


def test_enlarged_part_is_marked_where_there_is_one() -> None:
    """A second window shows the part of the first that is marked."""
    scene = scene_of(TRICKLED)
    (block,) = enlarged_part(scene)
    assert block.begin_s < scene.windows[1].begin_s < scene.windows[1].end_s < block.end_s
    assert not list(enlarged_part(scene_of(PLAIN)))


@pytest.mark.parametrize("report", [PLAIN, EVIL, TRICKLED, report_of(200, 20, 3.0)])
def test_both_painters_paint_all_of_them(report: RoundReport) -> None:
    """Every block, line and label is in the SVG and in matplotlib's axes, with the same text."""
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("agg")
    from lifl.report.mpl import make_figure

    scene = scene_of(report)
    figure = make_figure(report)
    root = ElementTree.fromstring(gantt_svg(report))
    titles = [title.text for title in root.iter(f"{SVG}title")]
    texts = [text.text for text in root.iter(f"{SVG}text")]
    for window, ax in zip(scene.windows, figure.axes, strict=True):
        shapes = list(shapes_in(scene, window))
        labels = [plain(shape.text) for shape in shapes if isinstance(shape, Label)]
        assert [text.get_text() for text in ax.texts] == labels
        assert set(labels) <= set(texts)
        blocks = [shape for shape in shapes if isinstance(shape, Block)]
        colours = [matplotlib.colors.to_hex(patch.get_facecolor()) for patch in ax.patches]
        for block in blocks:
            assert block.colour is None or block.colour in colours
        extra = 3 + len(list(enlarged_part(scene))) * (window == scene.windows[0])  # the legend's; the marked part
        assert len(ax.patches) == len(blocks) + extra
        assert sum(bool(title) for title in titles) >= sum(bool(block.title) for block in blocks)
