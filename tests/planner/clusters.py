"""Clusters and plans for property tests: nodes with odd rooms and loads, clients of which some have landed."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from lifl.planner.load import Load, ServerNode
from lifl.planner.placement import Rule
from lifl.planner.plan import Plan, make_plan
from lifl.planner.timing import TIMINGS


@st.composite
def clusters(draw: st.DrawFn) -> tuple[list[str], list[ServerNode], dict[str, str]]:
    """Clients, nodes of which at least one has room, and where some of the clients' updates land."""
    clients = [f"c{i}" for i in range(draw(st.integers(1, 60)))]
    loads = st.builds(Load, st.floats(0, 5), st.floats(0, 2))
    nodes: list[Any] = [
        ServerNode(f"n{i}", draw(st.integers(0, 30)), draw(st.integers(1, 8)), draw(loads), draw(st.integers(0, 8)))
        for i in range(draw(st.integers(1, 8)))
    ]
    if not any(node.room for node in nodes):
        nodes.append(ServerNode("roomy", 5))
    names = st.sampled_from([*(node.name for node in nodes), "gone"])
    at = {client: draw(names) for client in clients if draw(st.booleans())}
    return clients, nodes, at


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """A plan of such a cluster, by any rule and of any shape."""
    clients, nodes, at = draw(clusters())
    return make_plan(
        clients,
        nodes,
        at=at,
        rule=draw(st.sampled_from(Rule)),
        fan_in=draw(st.integers(1, 9)),
        arity=draw(st.none() | st.integers(2, 9)),
        timing=draw(st.sampled_from(TIMINGS)),
        is_reusing=draw(st.booleans()),
    )
