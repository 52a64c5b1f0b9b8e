"""A round on many nodes in virtual time: an arrival trace replayed against a policy, with measured costs.

Each node aggregates what is placed on it by lifl's own rules (``lifl.planner.aggregation``) and sends its mean, with
its weight, to the node of the top, which takes it as one more update.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial

import attrs

from lifl.errors import PlanError
from lifl.planner.aggregation import Aggregation
from lifl.planner.choose import choose_shape
from lifl.planner.costs import Costs, Sizes
from lifl.planner.engine import Done, Engine
from lifl.planner.hierarchy import FAN_IN
from lifl.planner.load import ServerNode
from lifl.planner.placement import Group, Rule, place
from lifl.planner.shape import Shape
from lifl.planner.site import Site, Span
from lifl.planner.timing import Timing, check_timing
from lifl.planner.traces import Trace

FORMS = ("fixed", "tree", "best")


def _known_form(instance: object, attribute: object, value: str) -> None:
    if value not in FORMS:
        raise PlanError(f"form={value!r}: give one of {', '.join(FORMS)}")


def _known_timing(instance: object, attribute: object, value: str) -> None:
    check_timing(value)


@attrs.frozen
class Policy:
    """A way to aggregate rounds on a cluster.

    Attributes
    ----------
    name : str
    is_local : bool
        An update is aggregated where it lands, and clients are led to few nodes (best fit). Without it they land on
        the nodes in turn and each update goes to the node with the most room (worst fit), wherever that is.
    form : str
        ``fixed``: every node has the tree that its capacity asks for, ceil(capacity / 2) leaves.
        ``tree``: ``min(ceil(n / 2), cores)`` leaves for the n updates that the node gets.
        ``best``: the shape that the cost model chooses, shards included.
    is_reusing : bool
        Workers are warm from the round before and change their roles. Without it each task has a new process.
    timing : Timing
        ``eager``, ``lazy`` or ``jit``.
    is_changing_roles : bool
        Matters only without reuse: the first leaf that is done becomes the top, as in lifl's own Node, which has no
        other way; the leaves are new processes all the same.
    """

    name: str
    is_local: bool = True
    form: str = attrs.field(default="best", validator=_known_form)
    is_reusing: bool = True
    timing: Timing = attrs.field(default="eager", validator=_known_timing)
    is_changing_roles: bool = False


POLICIES = (
    Policy("baseline", is_local=False, form="fixed", is_reusing=False, timing="lazy"),
    Policy("+ locality", form="fixed", is_reusing=False, timing="lazy"),
    Policy("+ hierarchy", form="tree", is_reusing=False, timing="lazy"),
    Policy("+ reuse", form="tree", timing="lazy"),
    Policy("+ eager", form="tree"),
)
"""The ablation: one idea more at a time."""

LIFL = Policy("+ shards")
"""Beyond the paper: all of the ablation's, and the shape that the cost model chooses."""


@attrs.frozen
class Part:
    """The part of one node in a round.

    Attributes
    ----------
    node : str
    clients : tuple of int
        The clients that it aggregates, by their places in the trace.
    expected : int
        Updates that it folds: those of its clients, and at the top the means of the other nodes.
    shape : Shape
    is_top : bool
        True for the node that makes the model; the others send it their means.
    """

    node: str
    clients: tuple[int, ...]
    expected: int
    shape: Shape
    is_top: bool


@attrs.frozen
class Outcome:
    """The cost of a round.

    Attributes
    ----------
    policy : str
    updates : int
        Clients' updates that are in the model.
    completion_s : float
        From the first arrival to the model.
    last_to_model_s : float
        From the last arrival to the model.
    cpu_s : float
        CPU time on all cores of all machines: landing, sending, starting, aggregating.
    runtimes_started : int
        Worker processes that were started for the round.
    nodes_used : int
        Nodes that aggregate something.
    bytes_between_nodes : int
        Updates and means that went from one node to another; also between two nodes of one machine.
    peak_bytes : int
        The most that the updates, sums and means of one node took, for the node that took most.
    spans : tuple of Span
        The work of every worker, by node, worker and time; empty without ``has_spans``.
    """

    policy: str
    updates: int
    completion_s: float
    last_to_model_s: float
    cpu_s: float
    runtimes_started: int
    nodes_used: int
    bytes_between_nodes: int
    peak_bytes: int
    spans: tuple[Span, ...] = ()


def cluster(count: int, capacity: float, cores: int, warm: int | None = None) -> tuple[ServerNode, ...]:
    """`count` equal nodes, ``n0`` and on; `warm` workers on each, by default one a core, from the round before."""
    ready = cores if warm is None else warm
    return tuple(ServerNode(f"n{i}", capacity, cores, warm=ready) for i in range(count))


def simulate(
    trace: Trace,
    policy: Policy,
    nodes: Sequence[ServerNode],
    costs: Costs,
    *,
    machines: Mapping[str, str] | None = None,
    has_spans: bool = False,
) -> Outcome:
    """Plays one round: `trace` arrives at `nodes`, which aggregate it by `policy`.

    Parameters
    ----------
    trace : Trace
    policy : Policy
    nodes : sequence of ServerNode
        Their capacity bounds how many updates are placed on them, their cores how many workers a policy plans, and
        ``warm`` is how many wait for work where workers are reused.
    costs : Costs
        The costs of each machine. A node takes in ``wire_bytes_s`` from others, one sender after another.
    machines : mapping of str to str, optional
        Node to machine: nodes of one machine share its cores and its memory bus. Default: one for each node.
    has_spans : bool
        True if the outcome is to have ``spans``.

    Raises ``PlanError`` if the nodes have no room for all the updates.
    """
    return _Simulation(trace, policy, nodes, costs, machines or {}, has_spans).outcome()


# ---------------------------------------------------------------- the plan


def divide(trace: Trace, policy: Policy, nodes: Sequence[ServerNode], costs: Costs) -> tuple[Part, ...]:
    """The part of each node: :func:`simulate` plays it, and a real node carries it out.

    Raises ``PlanError`` if the nodes have no room for all the updates.
    """
    clients = [str(i) for i in range(len(trace))]
    bound = {str(i): node for i, node in enumerate(trace.landing) if node is not None}
    rule = Rule.BEST_FIT if policy.is_local else Rule.WORST_FIT
    placement = place(clients, nodes, rule, bound if policy.is_local else None)
    if placement.waiting:
        room = sum(node.room for node in nodes)
        raise PlanError(f"{len(clients)} updates on nodes with room for {room}: give more nodes or more capacity")
    groups = placement.groups
    top = max(groups, key=lambda group: len(group.clients)).node
    known = {node.name: node for node in nodes}
    parts = []
    for group in groups:
        is_top = group.node == top
        expected = len(group.clients) + (len(groups) - 1 if is_top else 0)
        rate = _rate(trace, groups if is_top else (group,), expected, costs)
        shape = _shape(policy, known[group.node], expected, rate, trace.sizes, costs)
        parts.append(Part(group.node, tuple(int(client) for client in group.clients), expected, shape, is_top))
    return tuple(parts)


def _shape(policy: Policy, node: ServerNode, expected: int, rate: float, sizes: Sizes, costs: Costs) -> Shape:
    if policy.form == "fixed":
        return Shape(max(1, math.ceil(node.capacity / FAN_IN)), 0)
    if policy.form == "tree":
        return Shape(max(1, min(math.ceil(expected / FAN_IN), node.cores)), 0)
    return choose_shape(expected, rate, sizes, costs, node.cores, policy.timing)


def _rate(trace: Trace, groups: Sequence[Group], expected: int, costs: Costs) -> float:
    """Updates per second that reach a node, the means of other nodes included; `groups` are all that feed it.

    ``(expected - 1) / max(t_last - t_first, means * wire)``: the means follow the last update of a node, one after
    another over the wire.
    """
    own = max(groups, key=lambda group: len(group.clients))
    last = max(trace.times_s[int(one.clients[-1])] for one in groups)
    wire_s = trace.sizes.update_bytes / costs.wire_bytes_s
    passed = max(last - trace.times_s[int(own.clients[0])], (len(groups) - 1) * wire_s)
    return (expected - 1) / passed if passed > 0 else math.inf


def doors_of(trace: Trace, policy: Policy, names: Sequence[str], parts: Sequence[Part]) -> tuple[str, ...]:
    """The node of `names` at which each update lands: the one that aggregates it, or without locality any."""
    if not policy.is_local:
        return tuple(bound or names[i % len(names)] for i, bound in enumerate(trace.landing))
    at = {i: part.node for part in parts for i in part.clients}
    return tuple(at[i] for i in range(len(trace)))


# ---------------------------------------------------------------- virtual time


class _Simulation:
    def __init__(
        self,
        trace: Trace,
        policy: Policy,
        nodes: Sequence[ServerNode],
        costs: Costs,
        machines: Mapping[str, str],
        has_spans: bool,
    ) -> None:
        self._trace, self._policy, self._costs = trace, policy, costs
        self._nodes = {node.name: node for node in nodes}
        self._engine, self._work = Engine(), costs.work(trace.sizes)
        names = {node.name: machines.get(node.name, node.name) for node in nodes}
        self._machines = {name: costs.machine() for name in dict.fromkeys(names.values())}
        self._spans: list[Span] | None = [] if has_spans else None
        self._sites = {
            node: Site(self._engine, self._machines[machine], node, self._spans) for node, machine in names.items()
        }
        self._wire_s = trace.sizes.update_bytes / costs.wire_bytes_s
        self._wire_cpu_s = trace.sizes.update_bytes / costs.wire_cpu_bytes_s
        self._sent = 0
        self._parts = divide(trace, policy, nodes, costs)
        self._top = next(part.node for part in self._parts if part.is_top)
        self._at = {part.node: self._aggregation(part) for part in self._parts}

    def _aggregation(self, part: Part) -> Aggregation:
        node, policy = self._nodes[part.node], self._policy
        return Aggregation(
            self._sites[part.node],
            self._work,
            part.shape,
            policy.timing,
            part.expected,
            workers=node.cores,
            warm=node.warm,
            is_reusing=policy.is_reusing,
            is_changing_roles=policy.is_changing_roles,
            on_done=_end if part.is_top else partial(self._send, part.node, self._top),
        )

    # ------------------------------------------------------------ what happens

    def outcome(self) -> Outcome:
        """Plays the round."""
        trace, first = self._trace, self._trace.times_s[0]
        target = {i: part.node for part in self._parts for i in part.clients}
        doors = doors_of(trace, self._policy, list(self._nodes), self._parts)
        for i, time in enumerate(trace.times_s):
            node, door = target[i], doors[i]
            then = self._at[node].ready if door == node else partial(self._send, door, node)
            self._engine.at(time - first, partial(self._sites[door].land, self._work.land_s, then))
        self._engine.run()
        done_s = self._at[self._top].done_s
        folded = sum(one.folded for one in self._at.values()) - (len(self._parts) - 1)
        spans = sorted(self._spans or (), key=lambda s: (s.node, -1 if s.runtime is None else s.runtime, s.begin_s))
        return Outcome(
            policy=self._policy.name,
            updates=folded,
            completion_s=done_s,
            last_to_model_s=done_s - (trace.times_s[-1] - first),
            cpu_s=sum(machine.cpu_s for machine in self._machines.values()),
            runtimes_started=sum(one.started for one in self._at.values()),
            nodes_used=len(self._parts),
            bytes_between_nodes=self._sent * trace.sizes.update_bytes,
            peak_bytes=max(one.peak_bytes for one in self._at.values()),
            spans=tuple(spans),
        )

    def _send(self, source: str, target: str) -> None:
        """An update, or a node's mean, which is as large, to another node."""
        self._sent += 1
        self._sites[target].enter(partial(self._transfer, source, target))

    def _transfer(self, source: str, target: str) -> None:
        """Both sides and the wire work at the same time; the update is there when the slowest of the three is done.

        It is received into the block that will be folded, so the check only reads it and copies nothing.
        """
        left = _Countdown(3, partial(self._sites[target].leave, self._at[target].ready))
        self._sites[source].work(None, "gateway", "send", self._wire_cpu_s, left.one)
        self._sites[target].work(None, "gateway", "receive", self._wire_cpu_s + self._work.update_s, left.one)
        self._engine.at(self._engine.now + self._wire_s, left.one)


def _end() -> None:
    """Does nothing: the model is there."""


class _Countdown:
    def __init__(self, count: int, then: Done) -> None:
        self._left, self._then = count, then

    def one(self) -> None:
        self._left -= 1
        if not self._left:
            self._then()
