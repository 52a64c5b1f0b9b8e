"""The tree that ``lifl plan`` shows."""

from __future__ import annotations

import os

from rich.console import Console

from lifl.bench.planning import cluster_of, timed_plan
from lifl.cli.plan_view import plan_tree


def shown(what: object) -> str:
    """What a user sees of it."""
    with open(os.devnull, "w") as nowhere:
        console = Console(width=160, record=True, file=nowhere)
        console.print(what)
    return console.export_text()


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
