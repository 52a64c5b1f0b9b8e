"""The process for each task: a process that is done first takes a task of the next level, before any is started.

LIFL (MLSys 2024): a worker that has sent its sum is free, and holds nothing of the round. The first leaf of a node
that is done becomes its middle, and one of the middles becomes the top; so a node needs as many processes as leaves.
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
        For each task the number of its process on its node, from 0. The plan cannot know which process is done first;
        it has the number of processes, and names the first leaf's.
    needed, started : dict of str to int
        For each node: its processes, and how many of them are not warm yet.
    """

    slots: tuple[int, ...]
    needed: dict[str, int]
    started: dict[str, int]


def assign_processes(tasks: Sequence[Task], nodes: Sequence[ServerNode], is_reusing: bool = True) -> Reuse:
    """Gives each task a process; ``started_i = max(0, needed_i - warm_i)``.

    With reuse a task over others takes the process of the first of them that is on its node, which is free by then.
    Without reuse every task has a process of its own, and none is warm, as on a serverless platform that starts cold.
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
