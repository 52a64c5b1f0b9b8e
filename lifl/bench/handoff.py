"""The cost of passing one descriptor from one Python process to another, by lifl's ways and by others.

Owns the titles of the ways and the figures; ``lifl.bench.pair`` owns the processes. One way is half a round
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
from lifl.ebpf import probe
from lifl.shm.machine import cores

TITLES = {
    "ring_spinning": "lifl ring, spinning",
    "ring_sleeping": "lifl ring, futex",
    "ring_poll": "lifl ring, eventfd, poll",
    "ring_asyncio": "lifl ring, eventfd, asyncio",
    "ebpf": "lifl socket, eBPF sidecar",
    "unix": "Unix socket",
    "proxy": "Unix sockets and a proxy",
    "queue": "multiprocessing.Queue",
    "grpc": "gRPC unary call",
}
GOALS_US = {"ring_spinning": 5.0, "ring_sleeping": 30.0}
"""Goals for lifl's medians on two idle cores, in microseconds."""
CHOOSE = (
    "Rings hand over the fastest and need no privileges. Choose the eBPF sidecar where the kernel is to count and "
    "route, or aggregators have network namespaces of their own: it does the work of a proxy in less time."
)


def measure_handoff(messages: int = 20_000, *, on_progress: Callable[[str], None] | None = None) -> dict[str, Any]:
    """Passes `messages` descriptors, one after another, in every way; a tenth as many in the slow ways.

    Both processes start clean, run on half of the cores each, and have ended on return. A second run has both on one
    core, where passing a descriptor is a context switch, and a side that spins keeps the other from the core.

    Returns
    -------
    dict
        ``cores``, ``choose`` (advice on the choice of a way), and ``rows``: a list of dicts with ``way``, ``title``,
        ``messages``, ``median_us``, ``p99_us``, ``cpu_us`` (CPU time per message, user's and kernel's, of all
        processes), ``slower_than_spinning`` (the ratio of the medians) and ``same_core`` (a dict of ``messages``,
        ``median_us``, ``p99_us`` and ``cpu_us`` on one core); or with ``way``, ``title`` and ``skipped``, the reason.
        Microseconds are those of one way.

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
        if reason := _missing(way):
            rows.append(row | {"skipped": reason})
            continue
        if on_progress is not None:
            on_progress(title)
        few = math.ceil(messages / 10)
        row |= one_way(pair.run(way, messages if way == "ring_spinning" else few))
        row["same_core"] = one_way(pair.run(way, few, is_same_core=True))
        rows.append(row)
        row["slower_than_spinning"] = row["median_us"] / rows[0]["median_us"]
    return {"cores": cores(), "choose": CHOOSE, "rows": rows}


def _missing(way: str) -> str:
    """The reason why a way cannot be measured here; empty if it can."""
    if way == "grpc" and importlib.util.find_spec("grpc") is None:
        return "grpcio is not installed: pip install 'lifl[bench]'"
    if way == "ebpf" and not (support := probe.support()).available:
        return f"{support.reason}; {support.remedy}"
    return ""


def one_way(trips: pair.Trips) -> dict[str, Any]:
    """Median and 99th percentile of half of each round trip, and the CPU time of half of one, in microseconds."""
    halves_us = sorted(ns / 2000 for ns in trips.ns)
    p99_us = halves_us[min(len(halves_us) - 1, len(halves_us) * 99 // 100)]
    cpu_us = trips.cpu_ns / 2000 / len(halves_us)
    return {
        "messages": len(halves_us),
        "median_us": statistics.median(halves_us),
        "p99_us": p99_us,
        "cpu_us": cpu_us,
    }


def handoff_table(figures: dict[str, Any]) -> Table:
    """The figures of :func:`measure_handoff` as a table."""
    table = Table(title=f"One descriptor from one Python process to another, us ({figures['cores']} cores)")
    table.add_column("way")
    for heading in ("median", "99 %\nwithin", "CPU", "against\nspinning", "median,\none core", "CPU,\none core"):
        table.add_column(heading, justify="right", no_wrap=True)
    goals = (f"{TITLES[way]} under {goal:g}" for way, goal in GOALS_US.items())
    notes = [figures["choose"], f"Goals for the median: {'; '.join(goals)}."]
    for row in figures["rows"]:
        if "skipped" in row:
            table.add_row(row["title"], *"------")
            notes.append(f"{row['title']}: {row['skipped']}")
            continue
        beside = row["same_core"]
        ratio = f"{row['slower_than_spinning']:.1f} x"
        numbers = row["median_us"], row["p99_us"], row["cpu_us"], ratio, beside["median_us"], beside["cpu_us"]
        table.add_row(row["title"], *(one if isinstance(one, str) else f"{one:.1f}" for one in numbers))
    table.caption = Text("\n".join(notes))  # as rich's markup, 'lifl[bench]' would lose its brackets
    return table
