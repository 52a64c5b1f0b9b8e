"""A plan: who is aggregated where, in which tree, by how many processes, and the routes that follow from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import attrs

from lifl.planner.drawing import count, tree_svg
from lifl.planner.hierarchy import FAN_IN, Task, build_tree, depth
from lifl.planner.load import REPLAN_THRESHOLD, ServerNode, has_changed
from lifl.planner.placement import Placement, Rule, place
from lifl.planner.reuse import Reuse, assign_processes
from lifl.planner.timing import Timing


@attrs.frozen(repr=False)
class Plan:
    """What is to be done for one round. A value: the runtime carries it out.

    Attributes
    ----------
    nodes : tuple of ServerNode
        Those it was made for, whether or not they have a part in it.
    placement : Placement
    tasks : tuple of Task
        What feeds a task comes before it; the last is the top.
    reuse : Reuse
    timing : Timing
    rule, fan_in, arity, is_reusing
        What it was made with, see :func:`make_plan`; the next plan is made with the same.
    """

    nodes: tuple[ServerNode, ...]
    placement: Placement
    tasks: tuple[Task, ...]
    reuse: Reuse
    timing: Timing = "eager"
    rule: Rule = Rule.BEST_FIT
    fan_in: int = FAN_IN
    arity: int | None = None
    is_reusing: bool = True

    @property
    def top(self) -> Task:
        """The task that makes the mean."""
        return self.tasks[-1]

    @property
    def leaves(self) -> tuple[Task, ...]:
        """The tasks that fold updates; in a tree of one task that is the top."""
        return tuple(task for task in self.tasks if task.clients)

    @property
    def levels(self) -> int:
        """How many tasks the longest way from an update to the mean goes through."""
        return depth(self.tasks)

    @property
    def nodes_used(self) -> int:
        """Nodes that aggregate at least one update."""
        return len(self.placement.groups)

    @property
    def updates(self) -> int:
        """Clients whose updates are aggregated; those that wait are not among them."""
        return sum(len(group.clients) for group in self.placement.groups)

    @property
    def channels(self) -> tuple[tuple[int, int], ...]:
        """The edges of the tree: (task, the task that takes its sum), by their numbers."""
        return tuple((task.number, task.feeds) for task in self.tasks if task.feeds is not None)

    @property
    def routes(self) -> dict[str, dict[int, int | str]]:
        """The routing table of each node that has a part, from which that of its transport is made.

        For each task whose sum is made on the node or comes to it: the process (slot) on this node that takes the
        sum, or the name of the node to send it to.
        """
        tables: dict[str, dict[int, int | str]] = {group.node: {} for group in self.placement.groups}
        for number, feeds in self.channels:
            source, target = self.tasks[number].node, self.tasks[feeds].node
            tables[target][number] = self.reuse.slots[feeds]
            if source != target:
                tables[source][number] = target
        return tables

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain values for JSON: the totals, and the topology as a graph.

        ``nodes`` are those of the plan, with their updates (0: no part in it); ``tasks`` the vertices and ``channels``
        the edges, both as in the plan; ``routes`` the table of each node (its keys are strings in JSON).
        """
        here = {group.node: len(group.clients) for group in self.placement.groups}
        return {
            "levels": self.levels,
            "nodes_used": self.nodes_used,
            "updates": self.updates,
            "waiting": list(self.placement.waiting),
            "timing": self.timing,
            "rule": self.rule.value,
            "leaves": len(self.leaves),
            "processes": sum(self.reuse.needed.values()),
            "started": sum(self.reuse.started.values()),
            "nodes": [
                {
                    "name": node.name,
                    "room": node.room,
                    "updates": here.get(node.name, 0),
                    "processes": self.reuse.needed.get(node.name, 0),
                    "started": self.reuse.started.get(node.name, 0),
                }
                for node in self.nodes
            ],
            "tasks": [
                {
                    "number": task.number,
                    "role": task.role.value,
                    "node": task.node,
                    "process": self.reuse.slots[task.number],
                    "clients": list(task.clients),
                    "inputs": list(task.inputs),
                    "feeds": task.feeds,
                }
                for task in self.tasks
            ],
            "channels": [list(channel) for channel in self.channels],
            "routes": self.routes,
        }

    def __str__(self) -> str:
        """One line: updates, nodes, levels, leaves, processes, and who waits."""
        waiting = len(self.placement.waiting)
        return ", ".join(
            (
                count(self.updates, "update"),
                f"{self.nodes_used:,} of {count(len(self.nodes), 'node')}",
                count(self.levels, "level"),
                count(len(self.leaves), "leaf", "leaves"),
                f"{count(sum(self.reuse.needed.values()), 'process', 'processes')}"
                f" ({sum(self.reuse.started.values()):,} to start)",
                self.timing,
                *([f"{count(waiting, 'client')} without a place"] if waiting else []),
            )
        )

    def __repr__(self) -> str:
        # All that is in a plan is megabytes; `to_dict` has it.
        return f"<Plan: {self}>"

    def _repr_html_(self) -> str:
        """How a notebook shows it."""
        head = f"{count(self.updates, 'update')} on {self.nodes_used:,} of {count(len(self.nodes), 'node')}"
        line = str(self).partition("nodes, " if len(self.nodes) > 1 else "node, ")[2]
        return tree_svg(self.tasks, head, line, f"plan: {self}")


def make_plan(
    clients: Sequence[str],
    nodes: Sequence[ServerNode],
    *,
    at: Mapping[str, str] | None = None,
    rule: Rule = Rule.BEST_FIT,
    fan_in: int = FAN_IN,
    arity: int | None = None,
    timing: Timing = "eager",
    is_reusing: bool = True,
) -> Plan:
    """Plans one round: placement, then the tree, then the processes. Time grows linearly with the clients.

    See :func:`~lifl.planner.placement.place`, :func:`~lifl.planner.hierarchy.build_tree` and
    :func:`~lifl.planner.reuse.assign_processes` for the arguments and the rules.

    Raises ``PlanError`` when there is no plan, naming the constraint.
    """
    placement = place(clients, nodes, rule, at)
    tasks = build_tree(placement, nodes, fan_in, arity)
    reuse = assign_processes(tasks, nodes, is_reusing)
    return Plan(tuple(nodes), placement, tasks, reuse, timing, rule, fan_in, arity, is_reusing)


def replan(plan: Plan, nodes: Sequence[ServerNode], clients: Sequence[str] | None = None) -> Plan:
    """The next plan, which moves as few updates as it can.

    A client c that `plan` put on node i stays there if i is among `nodes` and ``RC'_i > s``, with RC'_i the room that i
    has now and s how many clients before c have stayed on it. So ``max(0, n_i - RC'_i)`` of a node's n_i clients move,
    all n_i of a node that is gone, and none of another. Who moves, who waited and who is new is placed by the plan's
    rule. Nothing has changed: the same plan.

    Parameters
    ----------
    plan : Plan
    nodes : sequence of ServerNode
        As they are now. Their loads are what they do besides this round.
    clients : sequence of str, optional
        Those of the next round. Default: the same, those that waited first.

    Raises ``PlanError`` when there is no plan.
    """
    at = plan.placement.at
    return make_plan(
        [*plan.placement.waiting, *at] if clients is None else clients,
        nodes,
        at=at,
        rule=plan.rule,
        fan_in=plan.fan_in,
        arity=plan.arity,
        timing=plan.timing,
        is_reusing=plan.is_reusing,
    )


def needs_replan(plan: Plan, nodes: Sequence[ServerNode], threshold: float = REPLAN_THRESHOLD) -> bool:
    """True if the plan should be made anew inside its round; between rounds it is made anew anyway.

    That is so if a node that has n_i > 0 of the clients is gone, has too little room now (``RC'_i < n_i``), or has a
    load that :func:`~lifl.planner.load.has_changed` by more than `threshold`; or if clients wait and there is a place
    again (``RC'_i > n_i`` for some node).

    Raises ``ValueError`` for a threshold outside 0 to 1.
    """
    before = {node.name: node for node in plan.nodes}
    now = {node.name: node for node in nodes}
    here = {group.node: len(group.clients) for group in plan.placement.groups}
    if any(has_changed(before[name].load, now[name].load, threshold) for name in here if name in now):
        return True
    if any(name not in now or now[name].room < n for name, n in here.items()):
        return True
    return bool(plan.placement.waiting) and any(node.room > here.get(name, 0) for name, node in now.items())
