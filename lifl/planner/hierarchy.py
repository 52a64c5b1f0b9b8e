"""The tree: the aggregations, their nodes, and the aggregation that each one feeds.

LIFL (MLSys 2024): two levels on each node, ceil(Q_i / I) leaves of I updates and one middle, and one top over all
nodes. Here no level is useless: only a leaf may have a single input.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum
from itertools import pairwise
from typing import TypeVar

import attrs

from lifl.errors import PlanError
from lifl.planner.load import ServerNode
from lifl.planner.placement import Group, Placement

T = TypeVar("T")

FAN_IN = 2
"""I, the updates of one leaf in LIFL."""


class Role(StrEnum):
    """The role of a worker in a tree."""

    LEAF = "leaf"
    MIDDLE = "middle"
    TOP = "top"


@attrs.frozen
class Task:
    """An aggregation, done by one worker.

    Attributes
    ----------
    number : int
        The task's place in the plan's ``tasks``; the tasks that feed it come before it.
    node : str
    role : Role
        A tree of one task is a top that has clients.
    clients : tuple of str
        The clients whose updates the task folds.
    inputs : tuple of int
        The tasks whose sums the task adds up.
    feeds : int or None
        The task that takes the sum; None: the task is the top and makes the mean.
    """

    number: int
    node: str
    role: Role
    clients: tuple[str, ...] = ()
    inputs: tuple[int, ...] = ()
    feeds: int | None = None


class _Draft:
    """Tasks that are still being connected."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, tuple[str, ...], tuple[int, ...]]] = []  # node, clients, inputs
        self.feeds: dict[int, int] = {}

    def add(self, node: str, clients: tuple[str, ...] = (), inputs: Sequence[int] = ()) -> int:
        number = len(self.rows)
        self.rows.append((node, clients, tuple(inputs)))
        for one in inputs:
            self.feeds[one] = number
        return number

    def reduce(self, inputs: Sequence[int], arity: int) -> list[int]:
        """Adds a level: a task over every `arity` inputs, on the first one's node. Returns the next level's inputs."""
        left = []
        for part in _even_parts(inputs, -(-len(inputs) // arity)):
            left.append(part[0] if len(part) == 1 else self.add(self.rows[part[0]][0], inputs=part))
        return left

    def done(self) -> tuple[Task, ...]:
        tasks = []
        for number, (node, clients, inputs) in enumerate(self.rows):
            feeds = self.feeds.get(number)  # the last task alone feeds none
            role = Role.TOP if feeds is None else Role.MIDDLE if inputs else Role.LEAF
            tasks.append(Task(number, node, role, clients, inputs, feeds))
        return tuple(tasks)


def build_tree(
    placement: Placement, nodes: Sequence[ServerNode], fan_in: int = FAN_IN, arity: int | None = None
) -> tuple[Task, ...]:
    """The tasks for the placed clients; one of them, the last, is the top.

    Node i, with n_i clients, gets ``L_i = min(ceil(n_i / fan_in), cores_i)`` leaves of ``n_i / L_i`` updates each (they
    differ by one at most): more leaves than cores would only take turns and write more partial sums. In this round n_i
    is LIFL's Q_i, all that the node has to do; its work for others has already made its room smaller. A node with
    several leaves has a middle over them, so that one sum leaves the node. The top is on the node with the most clients
    (the first, if several have as many), whose sums would be the most to move; the leaves there feed the top directly.

    Parameters
    ----------
    placement : Placement
    nodes : sequence of ServerNode
        All nodes of the placement, and perhaps others.
    fan_in : int
        I, updates of a leaf; a leaf has more only where the cores are too few.
    arity : int, optional
        The most inputs that a task other than a leaf may have; levels are added as needed, on a node before between
        nodes. Default: no bound, which is LIFL's two levels on a node.

    Raises ``PlanError`` for a fan-in below 1 or an arity below 2.
    """
    if fan_in < 1 or (arity is not None and arity < 2):
        raise PlanError(f"fan_in={fan_in}, arity={arity}: give a fan_in of 1 at least and an arity of 2 at least")
    if arity is None:
        arity = max(2, sum(len(group.clients) for group in placement.groups))  # no task can have more inputs
    cores = {node.name: node.cores for node in nodes}
    draft = _Draft()
    home = max(range(len(placement.groups)), key=lambda i: (len(placement.groups[i].clients), -i))
    # The top's own node is last: its leaves may feed the top, which has to come after all tasks that feed it.
    away = [group for i, group in enumerate(placement.groups) if i != home]
    sums = [_reduce_to(draft, _leaves(draft, group, cores, fan_in), 1, arity)[0] for group in away]
    here = _leaves(draft, placement.groups[home], cores, fan_in)
    here = _reduce_to(draft, here, max(1, arity - len(sums)), arity)
    inputs = _reduce_to(draft, [*here, *sums], arity, arity)
    if len(inputs) > 1:
        draft.add(placement.groups[home].node, inputs=inputs)
    return draft.done()


def _leaves(draft: _Draft, group: Group, cores: Mapping[str, int], fan_in: int) -> list[int]:
    n = len(group.clients)
    count = min(-(-n // fan_in), cores[group.node])
    return [draft.add(group.node, tuple(part)) for part in _even_parts(group.clients, count)]


def _reduce_to(draft: _Draft, inputs: list[int], at_most: int, arity: int) -> list[int]:
    """Adds levels until at most `at_most` inputs are left."""
    while len(inputs) > at_most:
        inputs = draft.reduce(inputs, arity)
    return inputs


def _even_parts(items: Sequence[T], count: int) -> list[Sequence[T]]:
    """`count` runs of `items`, the longer ones first, whose lengths differ by one at most."""
    size, longer = divmod(len(items), count)
    bounds = [i * size + min(i, longer) for i in range(count + 1)]
    return [items[start:end] for start, end in pairwise(bounds)]


def depth(tasks: Sequence[Task]) -> int:
    """The number of tasks on the longest way from an update to the mean."""
    levels: list[int] = []
    for task in tasks:
        levels.append(1 + max((levels[i] for i in task.inputs), default=0))
    return max(levels, default=0)
