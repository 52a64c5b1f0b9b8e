"""Processes: as many as a node has leaves, and only those started that are not warm."""

from __future__ import annotations

from collections import defaultdict
from itertools import pairwise

from hypothesis import given

from lifl.planner.hierarchy import Role, Task
from lifl.planner.load import ServerNode
from lifl.planner.plan import Plan, make_plan
from lifl.planner.reuse import assign_processes
from tests.planner.clusters import plans


@given(plans())
def test_a_node_needs_as_many_processes_as_leaves(plan: Plan) -> None:
    """With reuse every other task is done by one that has become free; without, each has its own."""
    for group in plan.placement.groups:
        tasks = [task for task in plan.tasks if task.node == group.node]
        leaves = sum(bool(task.clients) for task in tasks)
        assert plan.reuse.needed[group.node] == (leaves if plan.is_reusing else len(tasks))
    assert set(plan.reuse.needed) == {group.node for group in plan.placement.groups}


@given(plans())
def test_only_what_is_not_warm_is_started(plan: Plan) -> None:
    """started = max(0, needed - warm); without reuse nothing is warm."""
    warm = {node.name: node.warm if plan.is_reusing else 0 for node in plan.nodes}
    assert plan.reuse.started == {name: max(0, n - warm[name]) for name, n in plan.reuse.needed.items()}


@given(plans())
def test_a_process_does_one_task_after_the_other(plan: Plan) -> None:
    """The later task of a process takes the sum of its earlier task, so that the process is free by then."""
    done: dict[tuple[str, int], list[int]] = defaultdict(list)
    for task in plan.tasks:
        slot = plan.reuse.slots[task.number]
        assert 0 <= slot < plan.reuse.needed[task.node]
        done[task.node, slot].append(task.number)
    for numbers in done.values():
        assert all(plan.tasks[a].feeds == b for a, b in pairwise(numbers))
    assert len(done) == sum(plan.reuse.needed.values())


def test_a_process_does_not_move_to_another_node() -> None:
    """A task takes over from the first of its inputs that is on its node, wherever that is among them."""
    a, b = (Task(i, node, Role.LEAF, (node,), (), 2) for i, node in enumerate("ab"))
    nodes = [ServerNode(name, 1) for name in "abc"]
    for node, needed in (("a", {"a": 1, "b": 1}), ("b", {"a": 1, "b": 1}), ("c", {"a": 1, "b": 1, "c": 1})):
        reuse = assign_processes([a, b, Task(2, node, Role.TOP, (), (0, 1))], nodes)
        assert (reuse.slots, reuse.needed) == ((0, 0, 0), needed)


def test_the_first_leaf_becomes_the_middle_and_then_the_top() -> None:
    """The first process is leaf, middle and top; the other node's process is leaf and middle."""
    clients, nodes = [str(i) for i in range(8)], [ServerNode("a", 4, 2, warm=1), ServerNode("b", 4, 2, warm=5)]
    reuse = make_plan(clients, nodes).reuse
    assert (reuse.slots, reuse.needed, reuse.started) == ((0, 1, 0, 0, 1, 0), {"a": 2, "b": 2}, {"a": 1, "b": 0})
    cold = make_plan(clients, nodes, is_reusing=False).reuse
    assert (cold.slots, cold.started) == ((0, 1, 2, 0, 1, 2), {"a": 3, "b": 3})
