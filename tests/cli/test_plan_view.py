"""The tree that ``lifl plan`` shows."""

from __future__ import annotations

from terminal import shown

from lifl.bench.planning import cluster_of, timed_plan
from lifl.cli.plan_view import plan_tree


def test_the_tree_is_drawn() -> None:
    """Every line of the outline, with the guides of a terminal."""
    plan, milliseconds = timed_plan(*cluster_of(10, 2, 6))
    assert milliseconds > 0
    assert shown(plan_tree(plan)) == (
        "top on node-0: 10 updates from 2 nodes\n"
        "├── 3 leaves on node-0: 6 updates, 2 each\n"
        "└── middle on node-1: 4 updates\n"
        "    └── 2 leaves on node-1: 4 updates, 2 each\n"
    )
