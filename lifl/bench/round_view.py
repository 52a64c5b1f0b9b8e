"""A table of measured rounds for a terminal, and their picture in a file. Measures nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.table import Table

from lifl.bench.ablation_view import check_picture
from lifl.planner.drawing import count

COLOURS = {"unheld": "#4f7f4f", "flower": "#9a9a9a", "nvflare": "#c9a227", "strategy": "#7fb0e0", "server": "#1b4f8f"}
WIDTH_INCHES, HEIGHT_INCHES, ROW_INCHES = 12.0, 1.1, 0.4
FIGURES = (
    ("last_to_model_s", "Last update in to new model, s", 1.0),
    ("cpu_s", "Server's CPU time of a round, s", 1.0),
    ("peak_bytes", "Server's peak memory above idle, MB", 1e6),
)


def round_table(figures: dict[str, Any]) -> Table:
    """The figures of :func:`lifl.bench.round.measure_round` as a table."""
    each = f"{figures['nodes']} nodes, {figures['model']}"
    model = f"{figures['arrays']:,} arrays, {figures['update_bytes'] / 1e6:.1f} MB"
    rows = figures["rows"]
    is_compared = any("over_flower" in row for row in rows if row["side"] != "flower")
    below = "; below each, how many times as much Flower takes" if is_compared else ""
    patience = "between two requests as long as" if figures.get("is_patient") else "less between two requests than"
    table = Table(
        title=f"Whole rounds: {each} ({model}), {figures['timing']}, {figures['cores']} cores",
        title_justify="left",
        caption=(
            f"Medians of {count(figures['repetitions'], 'run')} of {count(figures['rounds'], 'round')}{below}. lifl's "
            "strategy: on Flower's SuperLink. lifl-superlink: with lifl's strategy. The nodes are virtual and return "
            f"at once; they wait {patience} SuperNodes do. Every model is checked."
        ),
        caption_justify="left",
    )
    table.add_column("", no_wrap=True)
    for row in rows:
        table.add_column(row["title"], justify="right")
    lines: dict[str, Callable[[dict[str, Any]], str]] = {
        "round, s": lambda row: _cell(row, "wall_s", 1.0),
        "model to all nodes, s": lambda row: "-" if row.get("model_out_s") is None else _number(row["model_out_s"]),
        "last update to model, s": lambda row: _cell(row, "last_to_model_s", 1.0),
        "server's CPU, s a round": lambda row: _cell(row, "cpu_s", 1.0),
        "peak above idle, MB": lambda row: _cell(row, "peak_bytes", 1e6),
        "peak over updates": lambda row: f"{row['peak_over_updates']:.2f} x",
        "requests": lambda row: f"{row['requests']:,.0f}" if row["requests"] else "-",
        "MB in and out": lambda row: f"{_bytes(row) / 1e6:,.0f}" if row["requests"] else "-",
    }
    for name, cell in lines.items():
        table.add_row(name, *map(cell, rows))
    return table


def profile_table(figures: dict[str, Any]) -> Table:
    """A table of lifl-superlink's CPU time by activity: per round, per request and per GB sent and received."""
    row = next(row for row in figures["rows"] if row["profile_s"])
    gigabytes = _bytes(row) / 1e9
    table = Table(
        title="Where lifl-superlink's CPU time went",
        title_justify="left",
        caption=f"{gigabytes:.2f} GB in and out and {row['requests']:,.0f} requests a round.{_copied(row)}",
        caption_justify="left",
    )
    for heading in ("", "ms a round", "us a request", "ms per GB", "share"):
        table.add_column(heading, justify="right" if heading else "left")
    total = sum(row["profile_s"].values())
    for name, seconds in sorted(row["profile_s"].items(), key=lambda item: -item[1]):
        cells = (seconds * 1e3, seconds / row["requests"] * 1e6, seconds / gigabytes * 1e3)
        table.add_row(name, *(f"{cell:,.0f}" for cell in cells), f"{seconds / total:.0%}")
    return table


def _bytes(row: dict[str, Any]) -> float:
    return float(row["sent_bytes"] + row["received_bytes"])


def _copied(row: dict[str, Any]) -> str:
    counts = row.get("gateway_bytes")
    if not counts:
        return ""
    share = counts["copied"] / max(counts["received"], 1)
    return f" Of {counts['received'] / 1e6:,.0f} MB received in all, {share:.1%} were copied once more."


def _cell(row: dict[str, Any], name: str, unit: float) -> str:
    text = _number(row[name] / unit)
    over = row.get("over_flower", {}).get(name, 1.0)
    return text if row["side"] == "flower" or not over > 0 or over == 1 else f"{text}\n{1 / over:.3g} x"


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def save_picture(figures: dict[str, Any], path: Path) -> None:
    """Draws three of the figures into an SVG, PNG or PDF file. Needs matplotlib.

    Raises ``ValueError`` for another ending or a folder that does not exist.
    """
    check_picture(path)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = figures["rows"]
    figure = Figure(figsize=(WIDTH_INCHES, HEIGHT_INCHES + ROW_INCHES * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    for ax, (name, title, unit) in zip(figure.subplots(1, len(FIGURES), sharey=True), FIGURES, strict=True):
        values = [row[name] / unit for row in rows]
        bars = ax.barh(range(len(rows)), values, 0.72, color=[COLOURS[row["side"]] for row in rows])
        ax.bar_label(bars, [_number(value) for value in values], padding=3, fontsize=8)
        ax.set_yticks(range(len(rows)), [row["title"] for row in rows])
        ax.margins(x=0.16)
        ax.set_xlim(left=0)
        ax.set_title(title, loc="left", fontsize=10)
        ax.spines[["top", "right", "left"]].set_visible(False)
        ax.tick_params(axis="y", length=0)
        ax.grid(axis="x", color="#dddddd", linewidth=0.6)
        ax.set_axisbelow(True)
    ax.invert_yaxis()  # the axis is shared, so this puts the first side at the top of all panels
    setting = f"{figures['nodes']} nodes, {figures['model']}, {figures['cores']} cores"
    figure.suptitle(f"Whole rounds of FedAvg: {setting}", x=0.01, ha="left", fontsize=11)
    # By default matplotlib writes the date into an SVG, and each run would change the file.
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
