"""A plan: the node of each update, the tree, the processes, and the routes that follow from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import attrs

from lifl.planner.drawing import count, tree_svg
from lifl.planner.hierarchy import FAN_IN, Task, build_tree, depth
from lifl.planner.load import REPLAN_THRESHOLD, ServerNode, has_changed
from lifl.planner.placement import Placement, Rule, place
from lifl.planner.reuse import Reuse, assign_processes
from lifl.planner.timing import Timing, check_timing


@attrs.frozen(repr=False)
class Plan:
    """The plan of one round, a value; it does nothing itself.

    Attributes
    ----------
    nodes : tuple of ServerNode
        The nodes that the plan was made for, with updates or without.
    placement : Placement
    tasks : tuple of Task
        The tasks that feed a task come before it; the last task is the top.
    reuse : Reuse
    timing : Timing
    rule, fan_in, arity, is_reusing
        The arguments of :func:`make_plan`; the next plan is made with the same.
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
        """The tasks that fold updates; in a tree of one task this is the top."""
        return tuple(task for task in self.tasks if task.clients)

    @property
    def levels(self) -> int:
        """The number of tasks on the longest way from an update to the mean."""
        return depth(self.tasks)

    @property
    def nodes_used(self) -> int:
        """Nodes that aggregate at least one update."""
        return len(self.placement.groups)

    @property
    def updates(self) -> int:
        """Clients whose updates are aggregated; clients that wait do not count."""
        return sum(len(group.clients) for group in self.placement.groups)

    @property
    def channels(self) -> tuple[tuple[int, int], ...]:
        """The edges of the tree: (task, the task that takes its sum), by number."""
        return tuple((task.number, task.feeds) for task in self.tasks if task.feeds is not None)

    @property
    def routes(self) -> dict[str, dict[int, int | str]]:
        """The routing table of each node that has updates; the table of its transport is made from it.

        For each task whose sum is made on the node or arrives there, the table has the process (slot) on this node
        that takes the sum, or the name of the node to send it to.
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

        ``nodes`` are those of the plan, with the number of their updates; ``tasks`` are the vertices and ``channels``
        the edges, both as in the plan; ``routes`` is the table of each node (its keys are strings in JSON).
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
        """A line: updates, nodes, levels, leaves, processes, timing, and clients that wait."""
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
        # The whole plan would be megabytes; `to_dict` has it.
        return f"<Plan: {self}>"

    def _repr_html_(self) -> str:
        """The picture of the tree, as a notebook shows the plan."""
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
    """Plans one round: placement, then the tree, then the processes. The time grows linearly with the clients.

    See :func:`~lifl.planner.placement.place`, :func:`~lifl.planner.hierarchy.build_tree` and
    :func:`~lifl.planner.reuse.assign_processes` for the arguments and the rules.

    Raises ``PlanError`` when there is no plan, naming the constraint, or for an unknown timing.
    """
    check_timing(timing)
    placement = place(clients, nodes, rule, at)
    tasks = build_tree(placement, nodes, fan_in, arity)
    reuse = assign_processes(tasks, nodes, is_reusing)
    return Plan(tuple(nodes), placement, tasks, reuse, timing, rule, fan_in, arity, is_reusing)


def replan(plan: Plan, nodes: Sequence[ServerNode], clients: Sequence[str] | None = None) -> Plan:
    """The next plan, which moves as few updates as it can.

    A client c that `plan` put on node i stays there if i is among `nodes` and ``RC'_i > s``, with RC'_i the room that i
    has now and s the number of clients before c that stay on it. So ``max(0, n_i - RC'_i)`` of a node's n_i clients
    move, and all n_i of a node that is gone. Clients that move, waited or are new are placed by the plan's rule. If
    nothing has changed, the plan is the same.

    Parameters
    ----------
    plan : Plan
    nodes : sequence of ServerNode
        The nodes as they are now. Their loads are their work besides this round.
    clients : sequence of str, optional
        The clients of the next round. Default: the same; those that waited come first.

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
    """True if the plan should be made anew during its round; between rounds it is made anew anyway.

    A new plan is needed if a node that has n_i > 0 of the clients is gone, has too little room now (``RC'_i < n_i``),
    or has a load that :func:`~lifl.planner.load.has_changed` by more than `threshold`; or if clients wait and a node
    has a free place again (``RC'_i > n_i``).

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
