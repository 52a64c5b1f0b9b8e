"""The benchmark of planning plans what it says, and shows all of it."""

from __future__ import annotations

import json

import pytest
from terminal import shown

from lifl.bench.planning import CORES, GOAL, SIZES, cluster_of, measure_planning, planning_table, timed_plan
from lifl.errors import PlanError


def test_every_size_is_measured_and_shown() -> None:
    """Each row has its plan and its times; the goal stands below, and no number is cut off in a pipe."""
    said: list[str] = []
    figures = measure_planning(2, sizes=((100, 10), GOAL), on_progress=said.append)
    assert json.loads(json.dumps(figures)) == figures
    assert said == ["100 clients on 10 nodes", "10,000 clients on 100 nodes"]
    small, goal = figures["rows"]
    assert (small["nodes_used"], small["leaves"], small["levels"], small["moved"]) == (8, 54, 3, 13)
    assert (goal["nodes_used"], goal["leaves"], goal["levels"], goal["moved"]) == (80, 640, 3, 125)
    for row in figures["rows"]:
        assert 0 < row["median_ms"] <= row["worst_ms"]
        assert row["ms_per_1000_clients"] == pytest.approx(row["median_ms"] * 1000 / row["clients"])
        assert row["replan_ms"] > 0
    text = shown(planning_table(figures), width=80)
    assert text.count("under 20") == 1
    assert "…" not in text
    assert all(f"{row['clients']:,}" in text for row in figures["rows"])


def test_sizes_grow_to_100000_clients_and_1000_nodes() -> None:
    """In the first three by tens, with as many clients on each node."""
    assert {clients / nodes for clients, nodes in SIZES[:3]} == {100}
    assert [clients for clients, _ in SIZES[:3]] == [1_000, 10_000, 100_000]
    assert GOAL in SIZES


@pytest.mark.parametrize(("clients", "nodes"), [(1, 1), (1, 9), (120, 5), (999, 7)])
@pytest.mark.parametrize("rate", [0.0, 3.7, 5000.0])
def test_all_clients_fit_without_a_capacity(clients: int, nodes: int, rate: float) -> None:
    """Beside what arrives already; with a capacity there are as many places as it says."""
    plan, _ = timed_plan(*cluster_of(clients, nodes, rate=rate))
    assert (plan.updates, plan.placement.waiting) == (clients, ())
    assert all(node.cores == CORES for node in plan.nodes)
    assert [node.room for node in cluster_of(clients, nodes, 7.5, 2)[1]] == [7] * nodes


def test_nonsense_is_refused() -> None:
    """As an error in one line."""
    with pytest.raises(ValueError, match="rate=-1: give"):
        cluster_of(1, 1, rate=-1)
    with pytest.raises(PlanError, match="0 clients on 0 nodes"):
        timed_plan(*cluster_of(0, 0))
    with pytest.raises(ValueError, match="repetitions=0"):
        measure_planning(0)
