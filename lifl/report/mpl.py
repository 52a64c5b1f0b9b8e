"""Painter of a round's shapes with matplotlib, which is imported late: it is an extra (``lifl[plot]``)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

import attrs

from lifl.report.scene import (
    COLOURS,
    Scene,
    Shown,
    Window,
    headline,
    plain,
    remarks,
    row_name,
    scene_of,
    shorten,
)
from lifl.report.shapes import ENLARGED, LEGEND, Block, Shape, Sign, Stroke, enlarged_part, shapes_in

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARKERS = {"tick": "|", "diamond": "D", "triangle": "v"}


def draw(report: Shown, ax: Axes | None = None) -> Axes:
    """Draws a report: see :meth:`lifl.RoundReport.plot`."""
    scene = scene_of(report)
    if ax is None:
        with _naming_the_extra():
            from matplotlib import pyplot

            return _draw_all(report, scene, pyplot.figure(figsize=_size(scene), layout="constrained"))
    # A mark's label is in the last window that has the mark, and these axes show only the first window.
    scene = attrs.evolve(scene, windows=scene.windows[:1])
    _draw(scene, scene.windows[0], ax)
    ax.set_title(plain(headline(report)), loc="left", fontsize="medium", parse_math=False)
    return ax


def make_figure(report: Shown) -> Figure:
    """A figure for a file. pyplot does not make it: it would keep the figure, and choose a window system."""
    scene = scene_of(report)
    with _naming_the_extra():
        from matplotlib.figure import Figure

        figure = Figure(figsize=_size(scene), layout="constrained")
    _draw_all(report, scene, figure)
    return figure


@contextmanager
def _naming_the_extra() -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        name = (error.name or "").partition(".")[0]
        raise ModuleNotFoundError(f"{name} is not installed: pip install 'lifl[plot]'", name=name) from error


def _size(scene: Scene) -> tuple[float, float]:
    return 10.0, 1.6 + 0.45 * len(scene.workers)


def _draw_all(report: Shown, scene: Scene, figure: Figure) -> Axes:
    widths = [window.width_px for window in scene.windows]
    first, *others = figure.subplots(1, len(widths), squeeze=False, width_ratios=widths)[0]
    for shape in enlarged_part(scene):
        _paint(shape, first)
    for window, ax in zip(scene.windows, (first, *others), strict=True):
        _draw(scene, window, ax)
    for ax in others:
        ax.set_yticks([])
        ax.set_xlabel(ENLARGED)
    title = "\n".join(filter(None, (plain(headline(report)), shorten(plain(remarks(report)), 120))))
    figure.suptitle(title, x=0.01, ha="left", fontsize="medium", parse_math=False)
    handles, names = first.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower left", ncols=6, fontsize="small", frameon=False)
    return cast("Axes", first)


def _draw(scene: Scene, window: Window, ax: Axes) -> None:
    from matplotlib import rcParams
    from matplotlib.patches import Rectangle

    ink = rcParams["text.color"]
    for step, colour in COLOURS.items():
        ax.add_patch(Rectangle((0, 0), 0, 0, color=colour, label=step))  # for the legend, also if no bar is so
    for kind, text in LEGEND.items():
        ax.plot([], [], MARKERS[kind], color=ink, markersize=5, label=text)
    for shape in shapes_in(scene, window):
        _paint(shape, ax)
    ax.set_xlim(window.begin_s, window.end_s)
    ax.set_ylim(len(scene.workers) - 0.5, -1.3)
    ax.set_yticks(range(len(scene.workers)), [row_name(worker) for worker in scene.workers])
    ticks = list(window.ticks())
    ax.set_xticks([at for at, _ in ticks], [text for _, text in ticks])
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.tick_params(left=False)


def _paint(shape: Shape, ax: Axes) -> None:
    """Adds one shape. All have the same ``zorder``, so that a later one covers an earlier one, as in the SVG."""
    from matplotlib import rcParams
    from matplotlib.lines import Line2D
    from matplotlib.patches import Rectangle

    ink = rcParams["text.color"]
    # in_layout: a figure's layout measures each artist that is in it, and thousands of bars would take seconds.
    if isinstance(shape, Block):
        corner, width, height = (shape.begin_s, shape.top), shape.end_s - shape.begin_s, shape.bottom - shape.top
        block = Rectangle(corner, width, height, color=shape.colour or ink, alpha=shape.opacity, linewidth=0, zorder=2)
        block.set_in_layout(False)
        ax.add_patch(block)
    elif isinstance(shape, Stroke):
        stroke = Line2D([shape.at_s] * 2, [shape.top, shape.bottom], color=ink, alpha=shape.opacity, zorder=2)
        stroke.set(linewidth=0.8 * shape.width_px, linestyle=shape.style, solid_capstyle="butt", in_layout=False)
        ax.add_line(stroke)
    elif isinstance(shape, Sign):
        ax.plot(shape.at_s, shape.y, MARKERS[shape.kind], color=ink, markersize=5, zorder=2)
    else:
        ax.annotate(
            plain(shape.text),
            (shape.at_s, shape.y),
            xytext=(-shape.gap_px if shape.is_end else shape.gap_px, 0),
            textcoords="offset points",
            horizontalalignment="right" if shape.is_end else "left",
            verticalalignment="baseline",
            fontsize="small",
            fontweight="bold" if shape.is_bold else "normal",
            parse_math=False,
            annotation_clip=False,
            zorder=2,
        )
