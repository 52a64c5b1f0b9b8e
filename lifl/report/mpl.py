"""The picture of a round with matplotlib, which is imported late: it is an extra (``lifl[plot]``)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

from lifl.report.scene import (
    COLOURS,
    Scene,
    Shown,
    Window,
    arrivals_in,
    bars_in,
    ends_at_mark,
    headline,
    lane_of,
    marks_in,
    plain,
    remarks,
    role_labels,
    roles_of,
    row_name,
    shorten,
    show_scene,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw(report: Shown, ax: Axes | None = None) -> Axes:
    """Draws a report: see :meth:`lifl.RoundReport.plot`."""
    scene = show_scene(report)
    if ax is None:
        with _told():
            from matplotlib import pyplot

            return _draw_all(report, scene, pyplot.figure(figsize=_size(scene), layout="constrained"))
    _draw(scene, scene.windows[0], ax)
    ax.set_title(plain(headline(report)), loc="left", fontsize="medium", parse_math=False)
    return ax


def make_figure(report: Shown) -> Figure:
    """A figure for a file. It is not pyplot's, which would keep it, and choose a window system."""
    scene = show_scene(report)
    with _told():
        from matplotlib.figure import Figure

        figure = Figure(figsize=_size(scene), layout="constrained")
    _draw_all(report, scene, figure)
    return figure


@contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        name = (error.name or "").partition(".")[0]
        raise ModuleNotFoundError(f"{name} is not installed: pip install 'lifl[plot]'", name=name) from error


def _size(scene: Scene) -> tuple[float, float]:
    return 10.0, 1.6 + 0.45 * len(scene.runtimes)


def _draw_all(report: Shown, scene: Scene, figure: Figure) -> Axes:
    widths = [window.width_px for window in scene.windows]
    first, *others = figure.subplots(1, len(widths), squeeze=False, width_ratios=widths)[0]
    for window, ax in zip(scene.windows, (first, *others), strict=True):
        _draw(scene, window, ax)
    for ax in others:
        ax.set_yticks([])
        ax.set_xlabel("the end, enlarged: after the last update")
    title = "\n".join(filter(None, (plain(headline(report)), shorten(plain(remarks(report)), 120))))
    figure.suptitle(title, x=0.01, ha="left", fontsize="medium", parse_math=False)
    handles, labels = first.get_legend_handles_labels()
    # Lines come first there; the steps shall.
    handles, labels = handles[2:] + handles[:2], labels[2:] + labels[:2]
    figure.legend(handles, labels, loc="outside lower left", ncols=6, fontsize="small", frameon=False)
    return cast("Axes", first)


def _draw(scene: Scene, window: Window, ax: Axes) -> None:
    from matplotlib import rcParams

    ink = rcParams["text.color"]
    rows = {runtime: float(row) for row, runtime in enumerate(scene.runtimes)}
    for row in rows.values():
        ax.axhspan(row - 0.3, row + 0.3, color=ink, alpha=0.08, linewidth=0)
    bars = sorted(bars_in(scene, window), key=lambda bar: bar.begin_s - bar.end_s)
    for step, colour in COLOURS.items():
        ax.barh([0], [0], color=colour, label=step)  # for the legend, also of a step that does not occur
    for bar in bars:
        low, high = lane_of(scene, bar.runtime, bar.step)
        y, width = rows[bar.runtime] - 0.3 + 0.6 * low, max(bar.end_s - bar.begin_s, window.least_s)
        ax.barh(y, width, 0.6 * (high - low), bar.begin_s, align="edge", color=COLOURS.get(bar.step, ink))
    arrivals = [at for at, _ in arrivals_in(scene, window)]
    ax.plot(
        arrivals, [-0.3] * len(arrivals), "|", color=ink, markersize=6, markeredgewidth=0.8, label="update has arrived"
    )
    for runtime, row in rows.items():
        roles = roles_of(scene, runtime)
        for at, is_end, text in role_labels(roles, window):
            side = "right" if is_end else "left"
            ax.text(window.at(at), row - 0.33, plain(text), ha=side, va="bottom", fontsize="x-small", parse_math=False)
        changes = [begin for begin, _, _ in roles[1:] if window.has(begin)]
        ax.vlines(changes, row - 0.34, row + 0.34, color=ink, linewidth=1.2)
        ax.plot(changes, [row] * len(changes), "D", color=ink, markersize=4, label="" if row else "role changes")
    for at, what, is_told in marks_in(scene, window):
        ax.vlines(
            at,
            -0.65,
            len(rows) - 0.5,
            color=ink,
            linewidth=1.2,
            linestyle={"last update": ":", "predicted": "--"}.get(what, "-"),
        )
        if is_told:
            side = "right" if ends_at_mark(what, window.x(at), window) else "left"
            ax.text(at, -0.95 if what == "predicted" else -0.7, f" {what} ", ha=side, va="bottom", fontsize="x-small")
    ax.set_xlim(window.begin_s, window.end_s)
    ax.set_ylim(len(rows) - 0.5, -1.15)
    ax.set_yticks(list(rows.values()), [row_name(runtime) for runtime in rows])
    ticks = list(window.ticks())
    ax.set_xticks([at for at, _ in ticks], [text for _, text in ticks])
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.tick_params(left=False)
    ax.grid(axis="x", alpha=0.3)
    ax.set_axisbelow(True)
