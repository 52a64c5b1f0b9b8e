"""Which process does which task: the one that is done first becomes the next level, before any is started.

LIFL (MLSys 2024): a runtime that has sent its sum is free, and holds nothing of the round. The first leaf of a node
that is done becomes its middle, and one of those the top; so a node needs as many processes as it has leaves.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import attrs

from lifl.planner.hierarchy import Task
from lifl.planner.load import ServerNode


@attrs.frozen
class Reuse:
    """Processes for the tasks of a plan.

    Attributes
    ----------
    slots : tuple of int
        For each task, which of its node's processes does it, from 0. Which process is done first is known only when
        it is; the plan says how many are needed, and names the first leaf.
    needed, started : dict of str to int
        Per node: processes, and how many of them are not warm yet.
    """

    slots: tuple[int, ...]
    needed: dict[str, int]
    started: dict[str, int]


def assign_processes(tasks: Sequence[Task], nodes: Sequence[ServerNode], is_reusing: bool = True) -> Reuse:
    """A process for each task: ``started_i = max(0, needed_i - warm_i)``.

    With reuse a task over others takes the process of the first of them that is on its node, which is free by then.
    Without it every task has a process of its own, and none is warm: what a serverless platform does cold.
    """
    slots: list[int] = []
    needed: Counter[str] = Counter()
    for task in tasks:
        mine = next((i for i in task.inputs if tasks[i].node == task.node), None) if is_reusing else None
        if mine is None:
            slots.append(needed[task.node])
            needed[task.node] += 1
        else:
            slots.append(slots[mine])
    warm = {node.name: node.warm if is_reusing else 0 for node in nodes}
    return Reuse(tuple(slots), dict(needed), {name: max(0, n - warm[name]) for name, n in needed.items()})
