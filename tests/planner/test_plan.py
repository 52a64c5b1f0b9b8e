"""A plan keeps to the capacities, is the same for the same input, leads every sum to the top, and changes little."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import attrs
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from lifl.errors import PlanError
from lifl.planner.load import Load, ServerNode
from lifl.planner.placement import Rule
from lifl.planner.plan import Plan, make_plan, needs_replan, replan
from tests.planner.clusters import clusters, plans

TWO = [ServerNode("a", 10), ServerNode("b", 10)]
TEN = [f"c{i}" for i in range(10)]


@given(plans())
def test_capacity_is_never_exceeded(plan: Plan) -> None:
    """n_i + k_i * E_i <= MC_i on every node that has a part."""
    nodes = {node.name: node for node in plan.nodes}
    for group in plan.placement.groups:
        node = nodes[group.node]
        assert len(group.clients) + node.load.queue <= node.capacity + 1e-9


@given(clusters(), st.sampled_from(Rule), st.none() | st.integers(2, 5))
def test_same_input_same_plan(cluster: tuple, rule: Rule, arity: int | None) -> None:
    """From equal values, not only from the same ones."""
    clients, nodes, at = cluster
    copies = [ServerNode(**{f.name: getattr(node, f.name) for f in attrs.fields(ServerNode)}) for node in nodes]
    one = make_plan(clients, nodes, at=at, rule=rule, arity=arity)
    other = make_plan(tuple(clients), copies, at=dict(reversed(at.items())), rule=rule, arity=arity)
    assert one == other
    assert one.to_dict() == other.to_dict()


def test_same_plan_whatever_the_hash_seed() -> None:
    """Sets and dicts of names must not give a plan its order, or two processes would not agree on it."""
    code = (
        "import json\n"
        "from lifl.planner.load import ServerNode\n"
        "from lifl.planner.placement import Rule\n"
        "from lifl.planner.plan import make_plan, replan\n"
        "nodes = [ServerNode(f'node {i}', 5 + i * 7 % 11, 1 + i % 4, warm=i % 3) for i in range(12)]\n"
        "for rule in Rule:\n"
        "    plan = make_plan([f'client {i}' for i in range(90)], nodes, rule=rule, arity=3)\n"
        "    for one in (plan, replan(plan, nodes[2:])):\n"
        "        print(json.dumps(one.to_dict()), one, one._repr_html_())\n"
    )
    told = [
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    ]
    assert told[0] == told[1] != b""


@given(plans())
def test_routes_lead_from_every_leaf_to_the_top(plan: Plan) -> None:
    """Each sum is sent to the node of the task it feeds, once, and taken there by that task's process."""
    routes = plan.routes
    assert set(routes) == {group.node for group in plan.placement.groups}
    for leaf in plan.leaves:
        task, hops = leaf, 0
        while task is not plan.top:
            node = task.node
            hop = routes[node][task.number]
            if isinstance(hop, str):
                node, hop = hop, routes[hop][task.number]
            assert task.feeds is not None
            after = plan.tasks[task.feeds]
            assert (node, hop) == (after.node, plan.reuse.slots[after.number])
            task, hops = after, hops + 1
        assert hops < plan.levels
    assert sum(map(len, routes.values())) == len(plan.channels) + sum(
        plan.tasks[a].node != plan.tasks[b].node for a, b in plan.channels
    )


@given(plans())
def test_as_plain_values_it_is_a_graph(plan: Plan) -> None:
    """JSON has all: the totals, every node, every task, every channel."""
    graph = json.loads(json.dumps(plan.to_dict()))
    assert [node["name"] for node in graph["nodes"]] == [node.name for node in plan.nodes]
    assert sum(node["updates"] for node in graph["nodes"]) == graph["updates"] == len(plan.placement.at)
    assert sum(node["processes"] for node in graph["nodes"]) == graph["processes"]
    assert sum(node["started"] for node in graph["nodes"]) == graph["started"]
    assert sum(node["updates"] > 0 for node in graph["nodes"]) == graph["nodes_used"]
    assert all(node["updates"] <= node["room"] for node in graph["nodes"])
    assert [task["number"] for task in graph["tasks"]] == list(range(len(plan.tasks)))
    assert sorted(graph["channels"]) == sorted([i, task["number"]] for task in graph["tasks"] for i in task["inputs"])
    assert graph["leaves"] == sum(bool(task["clients"]) for task in graph["tasks"])
    assert graph["levels"] == plan.levels


# ---------------------------------------------------------------- the next plan


@given(plans())
def test_nothing_has_changed_and_nothing_changes(plan: Plan) -> None:
    """The same nodes and clients give the same plan, and no new one is needed."""
    assert not needs_replan(plan, plan.nodes)
    assert replan(plan, plan.nodes) == plan


@given(plans(), st.data())
def test_removing_nodes_moves_only_their_updates(plan: Plan, data: st.DataObject) -> None:
    """All others stay where they were."""
    gone = data.draw(st.sets(st.sampled_from([node.name for node in plan.nodes])))
    left = [node for node in plan.nodes if node.name not in gone]
    assume(any(node.room for node in left))
    was, now = plan.placement.at, replan(plan, left).placement.at
    assert {client: node for client, node in was.items() if node not in gone}.items() <= now.items()
    assert needs_replan(plan, left) >= bool(gone & set(was.values()))


@given(plans(), st.data())
def test_a_node_with_less_room_loses_no_more_than_it_must(plan: Plan, data: st.DataObject) -> None:
    """max(0, n - RC') of its updates move, and those of no other; nobody waits while there is a place."""
    capacity = st.integers(0, 30)
    nodes = [attrs.evolve(node, capacity=data.draw(capacity), load=Load()) for node in plan.nodes]
    assume(any(node.room for node in nodes))
    after = replan(plan, nodes)
    was, now = plan.placement.at, after.placement.at
    for node in nodes:
        here = [client for client in was if was[client] == node.name]
        stayed = [client for client in here if now.get(client) == node.name]
        assert len(stayed) == min(len(here), node.room)
        assert sum(name == node.name for name in now.values()) <= node.room
    clients = len(was) + len(plan.placement.waiting)
    assert len(now) == min(clients, sum(node.room for node in nodes))
    assert not needs_replan(after, nodes)


def test_those_who_waited_come_first() -> None:
    """Before the updates of a node that is gone."""
    plan = make_plan([f"c{i}" for i in range(22)], TWO)
    assert plan.placement.waiting == ("c20", "c21")
    after = replan(plan, [TWO[0], ServerNode("c", 3)])
    assert {"c20": "c", "c21": "c"}.items() <= after.placement.at.items()
    assert len(after.placement.waiting) == 9


def test_the_next_round_has_other_clients() -> None:
    """Clients that are there again stay; new clients get the places of the others. The terms are the old plan's."""
    plan = make_plan(TEN, TWO, rule=Rule.WORST_FIT, fan_in=3, arity=4, timing="jit", is_reusing=False)
    after = replan(plan, TWO, [*TEN[5:], "new"])
    assert {c: n for c, n in plan.placement.at.items() if c in TEN[5:]}.items() <= after.placement.at.items()
    assert set(after.placement.at) == {*TEN[5:], "new"}
    for name in ("rule", "fan_in", "arity", "timing", "is_reusing"):
        assert getattr(after, name) == getattr(plan, name)


def loaded(k: float, *, capacity: float = 30) -> list[ServerNode]:
    """Two nodes, of which the first has k updates in work for others."""
    return [ServerNode("a", capacity, load=Load(k, 1.0)), ServerNode("b", 5)]


def test_a_new_plan_is_needed_when_the_load_has_changed() -> None:
    """By more than the threshold, up or down, on a node that has a part in it."""
    plan = make_plan(TEN, loaded(8))
    assert plan.placement.at["c0"] == "a"
    assert not needs_replan(plan, loaded(12))
    assert needs_replan(plan, loaded(17))
    assert needs_replan(plan, loaded(3))
    assert needs_replan(plan, loaded(12), threshold=0.2)
    idle = [loaded(8)[0], attrs.evolve(plan.nodes[1], load=Load(4, 1.0))]
    assert not needs_replan(plan, idle)


def test_a_new_plan_is_needed_when_a_node_is_too_full() -> None:
    """However little the load has changed."""
    plan = make_plan(TEN, loaded(8, capacity=18.5))
    assert not needs_replan(plan, loaded(8.4, capacity=18.5))
    assert needs_replan(plan, loaded(8.6, capacity=18.5))


def test_a_new_plan_is_needed_when_there_is_a_place_again() -> None:
    """For who waits; a new node alone is no reason."""
    full = make_plan([f"c{i}" for i in range(22)], TWO)
    assert not needs_replan(full, TWO)
    assert needs_replan(full, [*TWO, ServerNode("c", 1)])
    assert not needs_replan(full, [*TWO, ServerNode("c", 0)])
    assert not needs_replan(make_plan(TEN, TWO), [*TWO, ServerNode("c", 1)])


def test_no_next_plan_fits() -> None:
    """All nodes are gone, or have no room: as for a first plan."""
    plan = make_plan(TEN, TWO)
    with pytest.raises(PlanError, match="10 clients on 0 nodes"):
        replan(plan, [])
    with pytest.raises(PlanError, match="none of the 1 nodes has room"):
        replan(plan, [ServerNode("a", 0)])


# ---------------------------------------------------------------- to look at


def test_as_text_it_is_one_line() -> None:
    """However large it is; in a list or a traceback too."""
    plan = make_plan([f"c{i}" for i in range(25)], TWO, fan_in=5)
    assert str(plan) == (
        "20 updates, 2 of 2 nodes, 2 levels, 2 leaves, 2 processes (2 to start), eager, 5 clients without a place"
    )
    assert repr(plan) == f"<Plan: {plan}>"
    one = make_plan(["c"], [ServerNode("a", 1, warm=1)], timing="lazy")
    assert str(one) == "1 update, 1 of 1 node, 1 level, 1 leaf, 1 process (0 to start), lazy"
