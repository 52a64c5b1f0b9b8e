"""Tables of the ablation for a terminal, and its picture in a file. Measures nothing."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.table import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {"real": "#1b4f8f", "simulated": "#9ec3ea"}
SIZES_COLOURS = ("#cfe1f5", "#7fb0e0", "#1b4f8f")
SUFFIXES = (".svg", ".png", ".pdf")
WIDTH_INCHES, ROW_INCHES = 12.0, 3.9
GOAL_ERROR = 20
"""Goal for the median of the simulation's error, in per cent."""


def ablation_tables(figures: dict[str, Any]) -> Group:
    """The figures of :func:`lifl.bench.ablation.measure_ablation` as tables."""
    tables = [_simulated_table(setting, figures) for setting in figures["simulated"]]
    tables += [table for setting in figures["real"] for table in _real_tables(setting)]
    if figures["median_error"] is not None:
        tables[-1].caption = (
            f"Median over all real rows: the simulation is off by {figures['median_error']:.0%} of the completion time "
            f"(goal: under {GOAL_ERROR} %), and by {figures['median_last_error']:.0%} of the time from the last "
            "arrival on."
        )
        tables[-1].caption_justify = "left"
    return Group(*tables)


def _simulated_table(setting: dict[str, Any], figures: dict[str, Any]) -> Table:
    title = f"Simulated: {setting['updates']:,} updates, {setting['nodes']} nodes of {figures['cores']} cores"
    table = _table(title, ("s", "last arrival\nto model, s", "CPU s", "started", "nodes", "GB between\nnodes"))
    for row in setting["rows"]:
        table.add_row(row["policy"], *_cells(row))
    return table


def _real_tables(setting: dict[str, Any]) -> tuple[Table, Table]:
    """Two tables: one with all columns would be wider than 80 characters, the width of a pipe."""
    when = f"over {setting['window_s']:g} s" if setting["window_s"] else "all at once"
    title = f"For real, and simulated: {setting['updates']} updates {when}, {setting['nodes']} Nodes of this machine"
    times = _table(title, ("s", "simulated", "error", "last arrival\nto model, s", "simulated"))
    headings = ("CPU s", "simulated", "started", "nodes", "GB between\nnodes", "others\ntook")
    costs = _table("The same rounds: CPU time, workers and nodes", headings)
    for row in setting["rows"]:
        simulated = row["simulated"]
        times.add_row(
            row["policy"],
            f"{row['completion_s']:.3f}",
            f"{simulated['completion_s']:.3f}",
            f"{row['error']:.0%}",
            f"{row['last_to_model_s']:.3f}",
            f"{simulated['last_to_model_s']:.3f}",
        )
        _, _, cpu_s, *counts = _cells(row)
        costs.add_row(row["policy"], cpu_s, f"{simulated['cpu_s']:,.2f}", *counts, f"{row['others']:.0%}")
    return times, costs


def _table(title: str, headings: tuple[str, ...]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("", no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    return (
        f"{row['completion_s']:.3f}",
        f"{row['last_to_model_s']:.3f}",
        f"{row['cpu_s']:,.2f}",
        f"{row['runtimes_started']:,.0f}",
        f"{row['nodes_used']:,.0f}",
        f"{row['bytes_between_nodes'] / 1e9:,.2f}",
    )


# ---------------------------------------------------------------- the picture


def check_picture(path: Path) -> None:
    """Raises the errors of :func:`save_picture`, so that a wrong path is noticed before minutes of measuring."""
    import matplotlib.figure  # noqa: F401 - an extra, whose import raises if it is not installed

    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path}: give a name that ends in one of {', '.join(SUFFIXES)}")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"{path}: there is no such folder")


def save_picture(figures: dict[str, Any], path: Path) -> None:
    """Draws the figures into an SVG, PNG or PDF file. Needs matplotlib.

    Raises ``ValueError`` for another ending or a folder that does not exist.
    """
    check_picture(path)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = 2 if figures["real"] else 1
    figure = Figure(figsize=(WIDTH_INCHES, ROW_INCHES * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, 3, squeeze=False)
    if figures["real"]:
        _draw_real(list(axes[0]), figures)
    _draw_simulated(list(axes[-1]), figures)
    # By default matplotlib writes the date into an SVG, and each run would change the file.
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def _draw_real(axes: list[Axes], figures: dict[str, Any]) -> None:
    at_once = [setting for setting in figures["real"] if not setting["window_s"]]
    setting = max(at_once or figures["real"], key=lambda one: one["updates"])
    where = f"{setting['nodes']} Nodes of this machine, {setting['updates']} updates"
    for ax, name, title in (
        (axes[0], "completion_s", f"Completion, s: {where}"),
        (axes[1], "cpu_s", "CPU time, s: the same rounds"),
    ):
        real = [row[name] for row in setting["rows"]]
        simulated = [row["simulated"][name] for row in setting["rows"]]
        groups = {"for real": (real, COLOURS["real"]), "simulated": (simulated, COLOURS["simulated"])}
        _bars(ax, title, setting["rows"], groups)
    gigabytes = [row["bytes_between_nodes"] / 1e9 for row in setting["rows"]]
    _bars(axes[2], "Between nodes, GB: the same rounds", setting["rows"], {"": (gigabytes, COLOURS["real"])})
    axes[0].legend(frameon=False, loc="lower right")


def _draw_simulated(axes: list[Axes], figures: dict[str, Any]) -> None:
    counts = sorted({setting["nodes"] for setting in figures["simulated"]})
    panels = [(counts[0], "completion_s", "Completion, s", 1.0), (counts[-1], "completion_s", "Completion, s", 1.0)]
    panels.append((counts[0], "runtimes_started", "Workers started", 1.0))
    for ax, (nodes, name, title, unit) in zip(axes, panels, strict=True):
        settings = [setting for setting in figures["simulated"] if setting["nodes"] == nodes]
        groups = {}
        for setting, colour in zip(settings, SIZES_COLOURS * len(settings), strict=False):
            label = f"{setting['updates']:,} updates"
            groups[label] = ([row[name] / unit for row in setting["rows"]], colour)
        _bars(ax, f"{title}: simulated, {nodes} nodes", settings[0]["rows"], groups)
        ax.legend(frameon=False, loc="lower right")


def _bars(ax: Axes, title: str, rows: list[dict[str, Any]], groups: dict[str, tuple[list[float], str]]) -> None:
    """Draws a group of bars for each policy, the first policy at the top."""
    height = 0.8 / len(groups)
    for i, (label, (values, colour)) in enumerate(groups.items()):
        places = [j + (i - (len(groups) - 1) / 2) * height for j in range(len(rows))]
        bars = ax.barh(places, values, height * 0.92, color=colour, label=label or None)
        ax.bar_label(bars, [_number(value) for value in values], padding=3, fontsize=8)
    ax.set_yticks(range(len(rows)), [row["policy"] for row in rows])
    ax.invert_yaxis()
    ax.margins(x=0.14)
    ax.set_xlim(left=0)
    ax.set_title(title, loc="left", fontsize=10)
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="x", color="#dddddd", linewidth=0.6)
    ax.set_axisbelow(True)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.2g}"
