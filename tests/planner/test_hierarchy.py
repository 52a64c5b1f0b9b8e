"""The tree: one root, every update in one leaf, no level that does nothing, and no more inputs than allowed."""

from __future__ import annotations

import math

import pytest
from hypothesis import given

from lifl.errors import PlanError
from lifl.planner.hierarchy import Role, Task, build_tree, depth
from lifl.planner.load import ServerNode
from lifl.planner.placement import place
from lifl.planner.plan import Plan
from tests.planner.clusters import plans


def tree_of(*sizes: int, cores: int = 8, fan_in: int = 2, arity: int | None = None) -> tuple[Task, ...]:
    """The tree for nodes with so many clients each."""
    nodes = [ServerNode(f"n{i}", size, cores) for i, size in enumerate(sizes)]
    return build_tree(place([f"c{i}" for i in range(sum(sizes))], nodes), nodes, fan_in, arity)


@given(plans())
def test_every_update_has_exactly_one_leaf(plan: Plan) -> None:
    """Each placed client is in one task, on the node on which it was placed; who waits is in none."""
    folded = [(client, task.node) for task in plan.tasks for client in task.clients]
    assert sorted(folded) == sorted(plan.placement.at.items())


@given(plans())
def test_the_tree_has_one_root(plan: Plan) -> None:
    """Every task but the last feeds exactly one that comes after it, and that one knows it as its input."""
    for number, task in enumerate(plan.tasks):
        assert task.number == number
        assert (task.feeds is None) == (task is plan.top)
        assert [one.number for one in plan.tasks if number in one.inputs] == ([] if task is plan.top else [task.feeds])
        assert all(one < number for one in task.inputs)
        assert len(set(task.inputs)) == len(task.inputs)


@given(plans())
def test_no_task_is_useless(plan: Plan) -> None:
    """A task folds updates or adds up at least two sums, never both; its role says which."""
    for task in plan.tasks:
        assert bool(task.clients) != bool(task.inputs)
        assert len(task.inputs) != 1
        if task is plan.top:
            assert task.role is Role.TOP
        else:
            assert task.role is (Role.LEAF if task.clients else Role.MIDDLE)


@given(plans())
def test_leaves_are_as_many_as_the_formula_says(plan: Plan) -> None:
    """L_i = min(ceil(n_i / fan_in), cores_i), of n_i / L_i updates each, which differ by one at most."""
    cores = {node.name: node.cores for node in plan.nodes}
    for group in plan.placement.groups:
        sizes = [len(task.clients) for task in plan.leaves if task.node == group.node]
        assert len(sizes) == min(math.ceil(len(group.clients) / plan.fan_in), cores[group.node])
        assert max(sizes) - min(sizes) <= 1


@given(plans())
def test_arity_bounds_the_sums_of_a_task(plan: Plan) -> None:
    """Without one, a tree over several nodes has three levels at most, and two on one node."""
    if plan.arity is None:
        assert plan.levels <= (3 if plan.nodes_used > 1 else 2)
    else:
        assert all(len(task.inputs) <= plan.arity for task in plan.tasks)


@given(plans())
def test_one_sum_leaves_a_node(plan: Plan) -> None:
    """Every node but the top's sends one sum away, however many leaves it has; the top's own is where most clients are.

    With an arity a node may also add up the sums of others, and then sends that one away.
    """
    for group in plan.placement.groups:
        away = [a for a, b in plan.channels if plan.tasks[a].node == group.node != plan.tasks[b].node]
        assert len(away) == (group.node != plan.top.node)
    assert len(next(g for g in plan.placement.groups if g.node == plan.top.node).clients) == max(
        len(group.clients) for group in plan.placement.groups
    )


def test_a_single_node_has_no_middle_above_its_top() -> None:
    """Its leaves feed the top; and what one leaf can do is done by the top alone."""
    assert [(task.role, len(task.clients), task.inputs) for task in tree_of(5)] == [
        (Role.LEAF, 2, ()),
        (Role.LEAF, 2, ()),
        (Role.LEAF, 1, ()),
        (Role.TOP, 0, (0, 1, 2)),
    ]
    assert [(task.role, len(task.clients), task.inputs) for task in tree_of(2)] == [(Role.TOP, 2, ())]
    assert [(task.role, len(task.clients), task.inputs) for task in tree_of(90, cores=1)] == [(Role.TOP, 90, ())]


def test_two_levels_on_each_node_and_one_top() -> None:
    """LIFL's tree: a middle over the leaves of each node, but for the top's own."""
    tasks = tree_of(4, 6, 2)
    assert [(task.node, task.role, task.inputs) for task in tasks] == [
        ("n0", Role.LEAF, ()),
        ("n0", Role.LEAF, ()),
        ("n0", Role.MIDDLE, (0, 1)),
        ("n2", Role.LEAF, ()),
        ("n1", Role.LEAF, ()),
        ("n1", Role.LEAF, ()),
        ("n1", Role.LEAF, ()),
        ("n1", Role.TOP, (4, 5, 6, 2, 3)),
    ]
    assert depth(tasks) == 3


def test_levels_are_added_for_the_arity() -> None:
    """Sixteen leaves by twos are five levels; and there are no more than are needed where all sums fit."""
    assert depth(tree_of(32, cores=16, arity=2)) == 5
    assert depth(tree_of(6, 2, arity=4)) == 2
    assert depth(tree_of(8, 2, arity=4)) == 3
    assert depth(tree_of(*[2] * 64, arity=4)) == 4


@pytest.mark.parametrize(("fan_in", "arity"), [(0, None), (2, 1), (-1, 2)])
def test_a_tree_that_cannot_be_is_refused(fan_in: int, arity: int | None) -> None:
    """The message has both values."""
    with pytest.raises(PlanError, match=f"fan_in={fan_in}, arity={arity}"):
        tree_of(4, fan_in=fan_in, arity=arity)
