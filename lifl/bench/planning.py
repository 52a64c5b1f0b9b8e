"""The time that it takes to plan a round, and the cluster that is planned for.

Owns the clock around the planner, which reads none itself. Nothing is printed here.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

from rich.table import Table

from lifl.planner.hierarchy import FAN_IN
from lifl.planner.load import EXECUTION_S, Load, ServerNode
from lifl.planner.placement import Rule
from lifl.planner.plan import Plan, make_plan, replan

CORES = 8
"""Default number of cores of each node."""
SPARE = 1.25
"""Default capacity of all nodes together, in updates per client."""
GOAL_MS = 20.0
"""Goal for the time to plan for ``GOAL`` clients and nodes, in milliseconds."""
GOAL = (10_000, 100)
SIZES = ((1_000, 10), GOAL, (100_000, 1_000), (1_000, 100), (10_000, 1_000), (100_000, 100))
"""Clients and nodes: three sizes of cluster with 100 clients on each node, then fewer and more clients on each."""
REPETITIONS = 5


def cluster_of(
    clients: int,
    nodes: int,
    capacity: float | None = None,
    cores: int = CORES,
    rate: float = 0.0,
    execution_s: float = EXECUTION_S,
) -> tuple[list[str], list[ServerNode]]:
    """Names of clients, and equal nodes, for a plan.

    Parameters
    ----------
    clients, nodes : int
        Number of clients and of nodes.
    capacity : float, optional
        MC, updates that a node can aggregate at once. Default: ``ceil(SPARE * clients / nodes) + ceil(k * E)``, so
        that all clients fit in addition to the present load, and a fifth of the places stays free.
    cores : int
        Cores of each node.
    rate : float
        Present load: updates per second over all nodes, ``k = rate / nodes`` at each.
    execution_s : float
        E, seconds for one of the updates of the present load.

    Raises ``ValueError`` for a number that is negative or not finite.
    """
    if not (math.isfinite(rate) and rate >= 0):  # Load would name the rate of one node
        raise ValueError(f"rate={rate!r}: give a finite number from 0 up")
    load = Load(rate / max(1, nodes), execution_s)
    if capacity is None:
        capacity = math.ceil(SPARE * clients / max(1, nodes)) + math.ceil(load.queue)
    return (
        [f"client-{i}" for i in range(clients)],
        [ServerNode(f"node-{i}", capacity, cores, load) for i in range(nodes)],
    )


def timed_plan(
    clients: list[str],
    nodes: list[ServerNode],
    rule: Rule = Rule.BEST_FIT,
    fan_in: int = FAN_IN,
    arity: int | None = None,
) -> tuple[Plan, float]:
    """The plan, and the milliseconds that making it took: the median of ``REPETITIONS`` times.

    A plan is the placement, the tree and the processes. Raises ``PlanError`` if there is no plan.
    """
    plan, times = _timed(lambda: make_plan(clients, nodes, rule=rule, fan_in=fan_in, arity=arity), REPETITIONS)
    return plan, statistics.median(times)


def _timed(make: Callable[[], Plan], repetitions: int) -> tuple[Plan, list[float]]:
    """The plan, and the milliseconds of each repetition."""
    times = []
    for _ in range(repetitions):
        begin = time.perf_counter()
        plan = make()
        times.append(1000 * (time.perf_counter() - begin))
    return plan, times


def measure_planning(
    repetitions: int = REPETITIONS,
    *,
    sizes: tuple[tuple[int, int], ...] = SIZES,
    on_progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Times plans of rounds of several sizes, on nodes of ``CORES`` cores, and new plans without the top's node.

    Returns
    -------
    dict
        ``goal_ms``, ``goal_clients``, ``goal_nodes``, ``cores`` (of a node), ``repetitions``, and ``rows``: dicts with
        ``clients``, ``nodes``, ``nodes_used``, ``leaves``, ``levels``, ``median_ms``, ``worst_ms``,
        ``ms_per_1000_clients``, ``replan_ms`` (median) and ``moved``, the number of updates that the second plan moves.

    Raises ``ValueError`` for fewer than one repetition.
    """
    if repetitions < 1:
        raise ValueError(f"repetitions={repetitions}: give at least 1")
    rows = []
    for clients, nodes in sizes:
        if on_progress is not None:
            on_progress(f"{clients:,} clients on {nodes:,} nodes")
        rows.append(_row(clients, nodes, repetitions))
    goal = {"goal_ms": GOAL_MS, "goal_clients": GOAL[0], "goal_nodes": GOAL[1]}
    return goal | {"cores": CORES, "repetitions": repetitions, "rows": rows}


def _row(clients: int, nodes: int, repetitions: int) -> dict[str, Any]:
    names, servers = cluster_of(clients, nodes)
    plan, times = _timed(lambda: make_plan(names, servers), repetitions)
    left = [node for node in servers if node.name != plan.top.node]
    after, again = _timed(lambda: replan(plan, left), repetitions)
    was, now = plan.placement.at, after.placement.at
    median = statistics.median(times)
    return {
        "clients": clients,
        "nodes": nodes,
        "nodes_used": plan.nodes_used,
        "leaves": len(plan.leaves),
        "levels": plan.levels,
        "median_ms": median,
        "worst_ms": max(times),
        "ms_per_1000_clients": 1000 * median / clients,
        "replan_ms": statistics.median(again),
        "moved": sum(now.get(client) != node for client, node in was.items()),
    }


def planning_table(figures: dict[str, Any]) -> Table:
    """The figures of :func:`measure_planning` as a table."""
    table = Table(
        title=f"Planning a round on nodes of {figures['cores']} cores, median of {figures['repetitions']}",
        caption=(
            f"Goal for {figures['goal_clients']:,} clients on {figures['goal_nodes']:,} nodes: a plan in under "
            f"{figures['goal_ms']:g} ms. Per 1,000: clients. A node gone: the new plan, and the updates that it moves."
        ),
        caption_justify="left",
    )
    for heading in (
        *("clients", "nodes", "nodes\nused", "leaves", "plan\nms", "worst\nms", "ms per\n1,000"),
        *("a node\ngone, ms", "moved"),
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in figures["rows"]:
        counts = (f"{row[key]:,}" for key in ("clients", "nodes", "nodes_used", "leaves"))
        times = (f"{row[key]:.2f}" for key in ("median_ms", "worst_ms", "ms_per_1000_clients", "replan_ms"))
        table.add_row(*counts, *times, f"{row['moved']:,}")
    return table
