"""What it costs to hand one descriptor from one Python process to another, lifl's ways and others.

Owns the list of ways and the figures; the processes are ``lifl.bench.pair``'s. One way is half a round
trip. Nothing is printed here.
"""

from __future__ import annotations

import importlib.util
import math
import statistics
from collections.abc import Callable
from typing import Any

from rich.table import Table
from rich.text import Text

from lifl.bench import pair
from lifl.runtime import cores

TITLES = {
    "ring_spinning": "lifl ring, spinning",
    "ring_sleeping": "lifl ring, futex",
    "ring_poll": "lifl ring, eventfd, poll",
    "ring_asyncio": "lifl ring, eventfd, asyncio",
    "queue": "multiprocessing.Queue",
    "grpc": "gRPC unary call",
}
GOALS_US = {"ring_spinning": 5.0, "ring_sleeping": 30.0}
"""Medians that lifl is meant to reach on two idle cores, in microseconds."""


def measure_handoff(messages: int = 20_000, *, on_progress: Callable[[str], None] | None = None) -> dict[str, Any]:
    """Hands `messages` descriptors over, one after another, in every way; a tenth of it the slow ways.

    Both processes start clean, keep to half of the cores each, and are gone on return.

    Returns
    -------
    dict
        ``cores``, and ``rows``: a list of dicts with ``way``, ``title``, ``messages``, ``median_us``,
        ``p99_us`` and ``slower_than_spinning`` (the ratio of the medians); or with ``way``, ``title``
        and ``skipped``, the reason. Microseconds one way.

    Raises
    ------
    PeerGoneError
        If the processes fail.
    """
    if messages < 1:
        raise ValueError(f"messages={messages}: at least 1 is needed")
    rows: list[dict[str, Any]] = []
    for way, title in TITLES.items():
        row: dict[str, Any] = {"way": way, "title": title}
        if way == "grpc" and importlib.util.find_spec("grpc") is None:
            rows.append(row | {"skipped": "grpcio is not installed: pip install 'lifl[bench]'"})
            continue
        if on_progress is not None:
            on_progress(title)
        number = messages if way == "ring_spinning" else math.ceil(messages / 10)
        rows.append(row | one_way(pair.run(way, number)))
        rows[-1]["slower_than_spinning"] = rows[-1]["median_us"] / rows[0]["median_us"]
    return {"cores": cores(), "rows": rows}


def one_way(round_trips_ns: list[int]) -> dict[str, Any]:
    """Median and 99th percentile of half of each round trip, in microseconds."""
    halves_us = sorted(trip / 2000 for trip in round_trips_ns)
    p99_us = halves_us[min(len(halves_us) - 1, len(halves_us) * 99 // 100)]
    return {"messages": len(halves_us), "median_us": statistics.median(halves_us), "p99_us": p99_us}


def handoff_table(figures: dict[str, Any]) -> Table:
    """The figures of :func:`measure_handoff` as a table."""
    table = Table(title=f"One descriptor from one Python process to another ({figures['cores']} cores)")
    table.add_column("way", no_wrap=True)
    for heading in ("median\nus", "99 % within\nus", "against\nspinning", "goal\nus"):
        table.add_column(heading, justify="right")
    for row in figures["rows"]:
        if "skipped" in row:
            table.add_row(row["title"], "-", "-", "-", "")
            table.caption = Text(f"{row['title']}: {row['skipped']}")  # as markup it would lose its brackets
            continue
        goal = GOALS_US.get(row["way"])
        table.add_row(
            row["title"],
            f"{row['median_us']:.1f}",
            f"{row['p99_us']:.1f}",
            f"{row['slower_than_spinning']:.1f} x",
            "" if goal is None else f"under {goal:g}",
        )
    return table
