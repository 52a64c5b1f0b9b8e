"""Placement: the node that aggregates each client's update.

Locality is first: an update stays on the node on which it lands. The other updates are placed by a rule. An update
takes one of a node's places (LIFL, MLSys 2024: residual capacity); no node gets more updates than it has room for.
"""

from __future__ import annotations

import bisect
import heapq
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum

import attrs

from lifl.errors import PlanError
from lifl.planner.load import ServerNode


class Rule(StrEnum):
    """The rule for clients whose updates have not landed.

    ``BEST_FIT`` is lifl's; the others are for comparison.
    """

    BEST_FIT = "best-fit"
    WORST_FIT = "worst-fit"
    FIRST_FIT = "first-fit"
    ROUND_ROBIN = "round-robin"


@attrs.frozen
class Group:
    """The clients whose updates one node aggregates, in the order in which they were given."""

    node: str
    clients: tuple[str, ...]


@attrs.frozen
class Placement:
    """The clients of each node.

    Attributes
    ----------
    groups : tuple of Group
        The nodes that have clients, in the order of the nodes.
    waiting : tuple of str
        Clients for whom no node has room now; the next plan places them first.
    """

    groups: tuple[Group, ...]
    waiting: tuple[str, ...] = ()

    @property
    def at(self) -> dict[str, str]:
        """The node of each placed client."""
        return {client: group.node for group in self.groups for client in group.clients}


def place(
    clients: Sequence[str],
    nodes: Sequence[ServerNode],
    rule: Rule = Rule.BEST_FIT,
    at: Mapping[str, str] | None = None,
) -> Placement:
    """Places `clients` on `nodes`.

    Parameters
    ----------
    clients : sequence of str
        No client twice.
    nodes : sequence of ServerNode
        No name twice.
    rule : Rule
        The rule for clients that are on none of the nodes yet.
    at : mapping of str to str, optional
        Client to node: the node on which its update lands, or on which an earlier plan has put it. The client stays
        there while there is room, so that removing a node moves only that node's clients. Names of unknown nodes are
        ignored.

    Raises ``PlanError`` if there is no client or no node, if a name is there twice, or if no node has any room.
    """
    _check(clients, nodes)
    room = {node.name: node.room for node in nodes}
    placed: dict[str, list[str]] = {node.name: [] for node in nodes}
    away = []
    for client in clients:
        name = at.get(client) if at else None
        if name is not None and room.get(name, 0) > 0:
            room[name] -= 1
            placed[name].append(client)
        else:
            away.append(client)
    shares = RULES[rule](len(away), room, [name for name, here in placed.items() if here])
    start = 0
    for name, share in shares:
        placed[name] += away[start : start + share]
        start += share
    groups = tuple(Group(name, tuple(here)) for name, here in placed.items() if here)
    return Placement(groups, tuple(away[start:]))


def _check(clients: Sequence[str], nodes: Sequence[ServerNode]) -> None:
    if not clients or not nodes:
        raise PlanError(f"{len(clients)} clients on {len(nodes)} nodes: a plan needs one of each at least")
    for what, names in (("client", clients), ("node", [node.name for node in nodes])):
        if len(set(names)) < len(names):
            twice = next(name for name, times in Counter(names).items() if times > 1)
            raise PlanError(f"{what} {twice!r} is there twice: give each once")
    if not any(node.room for node in nodes):
        capacity, queue = sum(node.capacity for node in nodes), sum(node.load.queue for node in nodes)
        raise PlanError(
            f"none of the {len(nodes)} nodes has room for an update: they can aggregate {capacity:g} at once and have"
            f" {queue:g} in work; add nodes, or wait"
        )


Shares = list[tuple[str, int]]
"""Nodes and the numbers of clients that they take, in the order in which clients are given to them."""


def _best_fit(n: int, room: Mapping[str, int], used: Sequence[str]) -> Shares:
    """Uses as few nodes as possible.

    First come the places of nodes that have clients already. Then all other clients go to the node with the least room
    that fits them all; if no node does, the node with the most room is filled, and so on.

    Best fit of single updates would fill the smallest nodes first and so use more nodes than worst fit, which takes
    the largest (rooms 1, 1, 1, 10 and four clients: four nodes against one). So the group has to fit.
    """
    shares: Shares = []
    for name in used:
        if n and room[name]:
            shares.append((name, min(n, room[name])))
            n -= shares[-1][1]
    carrying = set(used)
    free = sorted((places, i, name) for i, (name, places) in enumerate(room.items()) if places and name not in carrying)
    while n and free:
        # The first of the smallest that fit; if none does, the first of the largest.
        places, _, name = free.pop(bisect.bisect_left(free, (min(n, free[-1][0]),)))
        shares.append((name, min(n, places)))
        n -= shares[-1][1]
    return shares


def _worst_fit(n: int, room: Mapping[str, int], used: Sequence[str]) -> Shares:
    """Gives each client to the node with the most room left: as evenly and over as many nodes as possible."""
    heap = [(-places, i, name) for i, (name, places) in enumerate(room.items()) if places]
    heapq.heapify(heap)
    taken: dict[str, int] = {}
    for _ in range(n):
        if not heap:
            break
        places, i, name = heap[0]
        taken[name] = taken.get(name, 0) + 1
        if places == -1:
            heapq.heappop(heap)
        else:
            heapq.heapreplace(heap, (places + 1, i, name))
    return list(taken.items())


def _first_fit(n: int, room: Mapping[str, int], used: Sequence[str]) -> Shares:
    """Gives each client to the first node, in their order, that has room."""
    shares: Shares = []
    for name, places in room.items():
        if n and places:
            shares.append((name, min(n, places)))
            n -= shares[-1][1]
    return shares


def _round_robin(n: int, room: Mapping[str, int], used: Sequence[str]) -> Shares:
    """Gives a client to each node in turn, while the node has room."""
    taken = dict.fromkeys(room, 0)
    while n:
        free = [name for name, places in room.items() if taken[name] < places]
        if not free:
            break
        # Whole turns at once: as many as the fullest of the nodes has room for.
        turns = max(1, min(n // len(free), min(room[name] - taken[name] for name in free)))
        for name in free[:n]:
            taken[name] += turns
            n -= turns
    return [(name, share) for name, share in taken.items() if share]


RULES: dict[Rule, Callable[[int, Mapping[str, int], Sequence[str]], Shares]] = {
    Rule.BEST_FIT: _best_fit,
    Rule.WORST_FIT: _worst_fit,
    Rule.FIRST_FIT: _first_fit,
    Rule.ROUND_ROBIN: _round_robin,
}
