"""Placement: nobody twice, no node beyond its room, few nodes by best fit, and nobody moved without need."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lifl.errors import PlanError
from lifl.planner.load import Load, ServerNode
from lifl.planner.placement import Placement, Rule, place
from tests.planner.clusters import clusters

EVERY = pytest.mark.parametrize("rule", Rule)


def naive(clients: list[str], nodes: list[ServerNode], rule: Rule) -> dict[str, int]:
    """Places one client after another, as the textbook does; returns the number of clients of each node."""
    room = {node.name: node.room for node in nodes}
    taken = dict.fromkeys(room, 0)
    turn = 0
    for _ in clients:
        free = [name for name in room if taken[name] < room[name]]
        if not free:
            break
        if rule is Rule.WORST_FIT:
            name = max(free, key=lambda one: room[one] - taken[one])
        elif rule is Rule.FIRST_FIT:
            name = free[0]
        else:
            order = list(room)
            while order[turn % len(order)] not in free:
                turn += 1
            name = order[turn % len(order)]
            turn += 1
        taken[name] += 1
    return {name: n for name, n in taken.items() if n}


@EVERY
@given(clusters())
def test_nobody_twice_and_no_node_beyond_its_room(rule: Rule, cluster: tuple) -> None:
    """Each client is on one node or waits; who waits does so because all is full."""
    clients, nodes, at = cluster
    placement = place(clients, nodes, rule, at)
    placed = [client for group in placement.groups for client in group.clients]
    assert sorted([*placed, *placement.waiting]) == sorted(clients)
    room = {node.name: node.room for node in nodes}
    assert all(0 < len(group.clients) <= room[group.node] for group in placement.groups)
    assert len(placed) == min(len(clients), sum(room.values()))
    assert [group.node for group in placement.groups] == [n.name for n in nodes if n.name in placement.at.values()]


@EVERY
@given(clusters())
def test_who_has_landed_stays(rule: Rule, cluster: tuple) -> None:
    """Locality first: only those move whose node has no room, or is gone."""
    clients, nodes, at = cluster
    where = place(clients, nodes, rule, at).at
    room = {node.name: node.room for node in nodes}
    for client in clients:
        if client in at and where.get(client) != at[client]:
            here = [one for one in clients if at.get(one) == at[client]]
            assert len(here) > room.get(at[client], 0)


@EVERY
@given(clusters())
def test_removing_a_node_moves_only_its_clients(rule: Rule, cluster: tuple) -> None:
    """The others' updates stay where the earlier plan put them."""
    clients, nodes, _ = cluster
    before = place(clients, nodes, rule)
    gone = before.groups[0].node
    left = [node for node in nodes if node.name != gone]
    if any(node.room for node in left):
        after = place(clients, left, rule, before.at).at
        assert {c: n for c, n in before.at.items() if n != gone}.items() <= after.items()


@given(clusters())
def test_best_fit_uses_the_fewest_nodes(cluster: tuple) -> None:
    """Never more than another rule, with or without updates that have landed."""
    clients, nodes, at = cluster
    for where in (None, at):
        used = {rule: len(place(clients, nodes, rule, where).groups) for rule in Rule}
        assert used[Rule.BEST_FIT] == min(used.values())


@pytest.mark.parametrize("rule", [Rule.WORST_FIT, Rule.FIRST_FIT, Rule.ROUND_ROBIN])
@given(clusters())
def test_other_rules_are_the_textbooks(rule: Rule, cluster: tuple) -> None:
    """Held against the same rule for one client after another."""
    clients, nodes, _ = cluster
    placement = place(clients, nodes, rule)
    assert {group.node: len(group.clients) for group in placement.groups} == naive(clients, nodes, rule)


def one_by_one(n: int, rooms: list[int]) -> int:
    """The number of nodes that best fit of single updates takes: it fills the smallest first."""
    left = sorted(rooms)
    used = 0
    while n > 0 and left:
        n -= left.pop(0)
        used += 1
    return used


@given(st.integers(1, 60), st.lists(st.integers(1, 30), min_size=1, max_size=8))
def test_best_fit_needs_no_fewer_nodes_than_there_are_rooms_for(n: int, rooms: list[int]) -> None:
    """As many as the largest rooms that hold all: no placement has fewer, and one update after another has more."""
    nodes = [ServerNode(f"n{i}", room) for i, room in enumerate(rooms)]
    used = len(place([f"c{i}" for i in range(n)], nodes).groups)
    largest = sorted(rooms, reverse=True)
    least = next((k for k in range(1, len(rooms) + 1) if sum(largest[:k]) >= n), len(rooms))
    assert used == least <= one_by_one(n, rooms)


def sizes(placement: Placement) -> dict[str, int]:
    """The number of clients of each node."""
    return {group.node: len(group.clients) for group in placement.groups}


def test_best_fit_fits_the_group() -> None:
    """The smallest node that takes all; else the largest is filled, and the rest fits again."""
    nodes = [ServerNode("a", 1), ServerNode("b", 10), ServerNode("c", 6), ServerNode("d", 1)]
    clients = [str(i) for i in range(14)]
    assert sizes(place(clients[:1], nodes)) == {"a": 1}
    assert sizes(place(clients[:5], nodes)) == {"c": 5}
    assert sizes(place(clients[:7], nodes)) == {"b": 7}
    assert sizes(place(clients[:11], nodes)) == {"a": 1, "b": 10}
    assert sizes(place(clients, nodes)) == {"b": 10, "c": 4}


def test_a_node_that_carries_the_tree_is_filled_first() -> None:
    """Its places cost no further node."""
    nodes = [ServerNode("a", 4), ServerNode("b", 10)]
    assert sizes(place([str(i) for i in range(4)], nodes, at={"0": "b"})) == {"b": 4}


def test_load_takes_places() -> None:
    """Work for other rounds is not planned over."""
    nodes = [ServerNode("a", 20, load=Load(10, 1.5)), ServerNode("b", 20, load=Load(10, 1.9))]
    placement = place([str(i) for i in range(8)], nodes)
    assert sizes(placement) == {"a": 5, "b": 1}
    assert placement.waiting == ("6", "7")


@pytest.mark.parametrize(
    ("clients", "nodes", "message"),
    [
        ([], [ServerNode("a", 1)], "0 clients on 1 nodes"),
        (["a"], [], "1 clients on 0 nodes"),
        (["a", "b", "a"], [ServerNode("a", 1)], "client 'a' is there twice"),
        (["a"], [ServerNode("x", 1), ServerNode("x", 2)], "node 'x' is there twice"),
        (["a"], [ServerNode("x", 3, load=Load(1, 4))], "none of the 1 nodes has room.*aggregate 3 at once and have 4"),
    ],
)
def test_no_plan_fits(clients: list[str], nodes: list[ServerNode], message: str) -> None:
    """The constraint that fails is named, with its values."""
    with pytest.raises(PlanError, match=message):
        place(clients, nodes)
