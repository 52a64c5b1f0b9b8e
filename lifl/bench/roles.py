"""The time in which a warm worker takes its next role, compared with the start of a new worker.

Owns the rounds in which workers change roles, and the times read from their spans. Nothing is printed here.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
from rich.table import Table

from lifl.bench.limits import start_workers
from lifl.node.node import Node
from lifl.planner.shape import Shape
from lifl.report.report import RoundReport
from lifl.shm.machine import cores
from lifl.tensor import TensorSpec

TITLES = {
    "change": "role change, leaf to top",
    "told": "role change, ordered by the owner",
    "warm": "a sleeping worker's answer",
    "cold": "one more worker's first answer",
    "first": "the first answer of a Node's first worker",
}
ARRAYS = {"w": np.ones(1000, np.float32)}
"""A model so small that a fold takes a microsecond."""

SPEC = TensorSpec.from_arrays(ARRAYS)
MEMORY_BYTES = 16 * 2**20
GOAL_TIMES = 100.0
"""Goal for the time of a cold start divided by that of a role change."""

CHANGES = 10
"""Role changes of each kind for each start of a worker; a start takes a thousand times as long."""

ROUNDS = 2
WAIT_S = 60.0


def measure_roles(
    repetitions: int = 20, workers: int | None = None, *, on_progress: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """Times role changes and starts, which take turns; and counts the workers that a second round starts.

    ``change``: a leaf becomes the top of its tree. The time is from the end of its fold to the beginning of the mean,
    by the worker's clock: it commits, frees the updates and reports that, passes its sum on, and maps the blocks of the
    mean. ``told``: the last update is in, and the owner gives a former leaf a range of the mean; the time is from the
    owner's clock to the worker's, both CLOCK_MONOTONIC. ``cold``: from the demand for one more worker to its first
    answer; ``first``: the same, with the start of the spawner. All are medians.

    Parameters
    ----------
    repetitions : int
        Starts of each kind; role changes are ``CHANGES`` times as many.
    workers : int, optional
        Workers of the Node that runs two rounds; default: one per core.

    Returns
    -------
    dict
        ``cores``, ``repetitions``, ``goal_times``;
        ``rows``: dicts with ``way``, ``title``, ``median_us``, ``min_us``, and ``times_change`` (the median divided by
        that of ``change``);
        ``reuse``: ``workers``, ``started`` (workers started cold in each of two rounds of a Node that began with none),
        ``is_same`` (the process ids are the same after both).

    Raises
    ------
    ValueError
        For counts below 1.
    """
    workers = cores() if workers is None else workers
    if repetitions < 1 or workers < 1:
        raise ValueError(f"repetitions={repetitions}, workers={workers}: give at least 1 of each")
    say = on_progress or (lambda _: None)
    seconds: dict[str, list[float]] = {way: [] for way in TITLES}
    with Node(MEMORY_BYTES, 1) as node:
        for repetition in range(repetitions + 1):
            say(f"repetition {repetition}" if repetition else "warming up")
            for way, shape in (("change", Shape(1, 0)), ("told", Shape(1, 1))) * CHANGES:
                change_s = _change_s(node, shape)
                if repetition:
                    seconds[way].append(change_s)
            started = start_workers()
            if repetition:
                for way, name in (("warm", "worker_warm_s"), ("cold", "worker_start_s"), ("first", "worker_cold_s")):
                    seconds[way].append(started[name])
    median = {way: statistics.median(some) for way, some in seconds.items()}
    say("two rounds")
    return {
        "cores": cores(),
        "repetitions": repetitions,
        "goal_times": GOAL_TIMES,
        "rows": [
            {
                "way": way,
                "title": title,
                "median_us": median[way] * 1e6,
                "min_us": min(seconds[way]) * 1e6,
                "times_change": median[way] / median["change"],
            }
            for way, title in TITLES.items()
        ],
        "reuse": _reuse(workers),
    }


def _change_s(node: Node, shape: Shape) -> float:
    """Seconds from the end of all folds and the last arrival to the begin of the mean, in a round on one worker."""
    report = _round(node, 2, shape)
    spans = [span for span in report.spans if span.step == "aggregate"]
    mean = next(span for span in spans if span.role != "leaf")
    folded = [span.end_s for span in spans if span.role == "leaf"]
    return mean.begin_s - max([*folded, *(one.arrived_s for one in report.accepted)])


def _reuse(workers: int) -> dict[str, Any]:
    """Runs two rounds that need all workers, on a Node that begins with none; see ``reuse`` above."""
    started, pids = [], []
    with Node(MEMORY_BYTES, workers, warm=0) as node:
        for _ in range(ROUNDS):
            started.append(_round(node, 2 * workers, Shape(workers, workers)).started)
            pids.append(sorted(node.pids()))
    return {"workers": workers, "started": started, "is_same": pids[0] == pids[-1]}


def _round(node: Node, updates: int, shape: Shape) -> RoundReport:
    with node.open_round(SPEC, expected=updates, timing="eager", shape=shape) as round_:
        for k in range(updates):
            round_.submit(ARRAYS, client_id=k)
        return round_.result(WAIT_S).report


def roles_table(figures: dict[str, Any]) -> Table:
    """The figures of :func:`measure_roles` as a table."""
    reuse = figures["reuse"]
    first, second = reuse["started"]
    same = "the same" if reuse["is_same"] else "not the same"
    table = Table(
        title=f"A warm worker's next role against a cold start ({figures['cores']} cores)",
        caption=(
            f"Medians of {figures['repetitions']} starts, and of {figures['repetitions'] * CHANGES} role changes.\n"
            f"A Node of {reuse['workers']} workers that began with none:\nthe first round started {first}, the second "
            f"{second}; the processes were {same}."
        ),
        caption_justify="left",
    )
    table.add_column("time of")
    for heading in ("median\nus", "least\nus", "against\nrole change", "goal"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in figures["rows"]:
        goal = f"over {figures['goal_times']:g} x" if row["way"] in ("cold", "first") else ""
        numbers = (f"{row['median_us']:,.0f}", f"{row['min_us']:,.0f}", f"{row['times_change']:,.1f} x")
        table.add_row(row["title"], *numbers, goal)
    return table
