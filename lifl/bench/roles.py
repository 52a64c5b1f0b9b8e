"""What it costs to give a warm worker its next role, against starting a worker for it.

Owns the rounds that make workers change roles, and what is read of their spans. Nothing is printed here.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
from rich.table import Table

from lifl.bench.limits import start_workers
from lifl.node.node import Node, cores
from lifl.planner.shape import Shape
from lifl.report.report import RoundReport
from lifl.tensor import TensorSpec

TITLES = {
    "change": "role change, leaf to top",
    "told": "the same by the agent",
    "warm": "a sleeping worker's answer",
    "cold": "one more worker's first answer",
    "first": "a Node's first worker's",
}
ARRAYS = {"w": np.ones(1000, np.float32)}
"""A model so small that a fold takes a microsecond."""

SPEC = TensorSpec.from_arrays(ARRAYS)
MEMORY_BYTES = 16 * 2**20
GOAL_TIMES = 100.0
"""How many times a role change is meant to be faster than a cold start."""

CHANGES = 10
"""Role changes of each kind for each start of a worker, which takes a thousand times as long."""

ROUNDS = 2
WAIT_S = 60.0


def measure_roles(
    repetitions: int = 20, workers: int | None = None, *, on_progress: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """Times role changes and starts, which take turns: medians; and counts what a second round starts.

    ``change``: a leaf becomes the top of its tree. From the end of its fold to the beginning of the mean, by its own
    clock: it commits, gives the updates' memory back and says so, hands its sum over, and takes up and maps what the
    mean is made of. ``told``: the last update is in, and a worker that was a leaf is told by the agent to make a range
    of the mean; from the agent's clock to the worker's, which is the same. ``cold``: from the demand for one more
    worker to its answer to a first question; ``first``: the same, with the process that forks workers.

    Parameters
    ----------
    repetitions : int
        Starts of each kind; role changes are ``CHANGES`` times as many.
    workers : int, optional
        Of the Node that is looked at for two rounds; default: one per core.

    Returns
    -------
    dict
        ``cores``, ``repetitions``, ``goal_times``;
        ``rows``: dicts with ``way``, ``title``, ``median_us``, ``min_us``, and ``times_change`` (the median over that
        of ``change``);
        ``reuse``: ``workers``, ``started`` (processes started cold for each of two rounds of a Node that had none),
        ``is_same`` (the same process ids after both).

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
    """A round of two updates on one worker: seconds until it begins with the mean, from when nothing else is due."""
    report = _round(node, 2, shape)
    spans = [span for span in report.spans if span.step == "aggregate"]
    mean = next(span for span in spans if span.role != "leaf")
    folded = [span.end_s for span in spans if span.role == "leaf"]
    return mean.begin_s - max([*folded, *(one.arrived_s for one in report.accepted)])


def _reuse(workers: int) -> dict[str, Any]:
    """Two rounds that need all workers, on a Node that begins with none."""
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
            f"Medians of {figures['repetitions']}, of role changes of {figures['repetitions'] * CHANGES}.\n"
            f"A Node of {reuse['workers']} workers that began with none:\nthe first round started {first}, the second "
            f"{second}; the processes were {same}."
        ),
        caption_justify="left",
    )
    table.add_column("what")
    for heading in ("median\nus", "least\nus", "against\nrole change", "goal"):
        table.add_column(heading, justify="right")
    for row in figures["rows"]:
        goal = f"over {figures['goal_times']:g} x" if row["way"] in ("cold", "first") else ""
        numbers = (f"{row['median_us']:,.0f}", f"{row['min_us']:,.0f}", f"{row['times_change']:,.1f} x")
        table.add_row(row["title"], *numbers, goal)
    return table
