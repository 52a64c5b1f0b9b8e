"""The counts of the kernel, as rates and times; they agree with the workers' own notes."""

from __future__ import annotations

import time

import numpy as np
import pytest

import lifl
from lifl.ebpf.record import Metrics
from lifl.planner.load import observe
from lifl.workers.traffic import Flow, Interval, Traffic

SPEC = lifl.TensorSpec.from_arrays({"w": np.zeros(100_000, np.float32)})
UPDATES = 20


class Kernel:
    """Counters and a clock that a test sets."""

    def __init__(self) -> None:
        self.counted: dict[int, Metrics] = {}
        self.now_s = 0.0
        self.traffic = Traffic(lambda: dict(self.counted), lambda me: 10 * me, lambda: self.now_s)


def test_flows_are_of_what_passed_between_two_looks() -> None:
    """The agent is no aggregator; one that is new begins at nothing."""
    kernel = Kernel()
    kernel.counted = {0: Metrics(records=99, updates=9), 1: Metrics(updates=100, folded=50, busy_ns=10**9)}
    assert kernel.traffic.look() == {}
    kernel.now_s = 2.0
    kernel.counted[1] = Metrics(updates=110, folded=54, busy_ns=3 * 10**9)
    kernel.counted[2] = Metrics(updates=6)
    assert kernel.traffic.look() == {1: Flow(5.0, 0.5, 10), 2: Flow(3.0, 0.0, 20)}
    kernel.now_s = 3.0
    assert kernel.traffic.look() == {1: Flow(0.0, 0.0, 10), 2: Flow(0.0, 0.0, 20)}


def test_intervals_are_of_rounds() -> None:
    """Counts from before a round are left out, looks do not cut an interval, and each interval is taken once."""
    kernel = Kernel()
    assert kernel.traffic.take() is None
    kernel.counted = {1: Metrics(updates=100, busy_ns=10**9)}
    kernel.now_s = 10.0
    kernel.traffic.begin()
    kernel.now_s = 11.0
    kernel.counted = {1: Metrics(updates=103, busy_ns=2 * 10**9)}
    kernel.traffic.look()
    kernel.now_s = 14.0
    kernel.counted = {1: Metrics(updates=104, busy_ns=2 * 10**9), 2: Metrics(updates=4, busy_ns=10**9)}
    assert kernel.traffic.take() == Interval(8, 4.0, 2.0)
    kernel.now_s = 15.0
    assert kernel.traffic.take() is None


def test_rings_have_no_traffic() -> None:
    """The kernel sees nothing of them: the planner has what workers note."""
    with lifl.Node("16MiB", workers=1, transport="rings") as node:
        aggregate(node, lifl.Shape(1, 0))
        assert node.traffic.flows == {}
        assert node.traffic.take() is None
        assert node.forecast.load is not None


def aggregate(node: lifl.Node, shape: lifl.Shape, pause_s: float = 0.0) -> lifl.RoundReport:
    """Runs a round, with `pause_s` after each update."""
    with node.open_round(SPEC, UPDATES, shape=shape) as round_:
        for i in range(UPDATES):
            round_.submit({"w": np.full(100_000, i, np.float32)}, client_id=i)
            time.sleep(pause_s)
        return round_.result(30).report


@pytest.mark.usefixtures("ebpf")
def test_kernel_and_workers_agree() -> None:
    """On how many updates came, how long folding took, and so on the load that the planner is told."""
    with lifl.Node("64MiB", workers=2, transport="ebpf") as node:
        seen: list[Interval | None] = []
        passed = node.forecast._passed
        node.forecast._passed = lambda: seen.append(passed()) or seen[-1]  # type: ignore[func-returns-value]
        begin_s = time.monotonic()
        report = aggregate(node, lifl.Shape(2, 0), pause_s=0.01)
        whole_s = time.monotonic() - begin_s
        (interval,) = seen
        assert interval is not None
        assert interval.updates == len(report.accepted) == UPDATES
        # Workers report whole microseconds, and the last of them with their next record, perhaps of the next round.
        folds = [span for span in report.spans if span.role == "leaf" and span.step == "aggregate"]
        noted_s = sum(span.end_s - span.begin_s for span in folds)
        assert interval.busy_s <= noted_s + sum(s.end_s - s.begin_s for s in report.spans if s.role == "top")
        assert interval.busy_s >= noted_s - max(span.end_s - span.begin_s for span in folds) * 2 - 1e-6 * len(folds)
        arrived = [one.arrived_s for one in report.accepted]
        # The kernel's interval is the whole round, the Node's own is from the first update to the last.
        assert max(arrived) - min(arrived) <= interval.seconds <= whole_s
        assert node.forecast.load == observe(None, UPDATES, interval.seconds, interval.busy_s)
        flows = node.traffic.flows
        assert set(flows) == {1, 2}
        assert all(flow.queue == 0 for flow in flows.values())


@pytest.mark.usefixtures("ebpf")
def test_what_the_kernel_did_not_see_is_taken_from_the_workers() -> None:
    """In shards no update is sent to a leaf."""
    with lifl.Node("64MiB", workers=2, transport="ebpf") as node:
        aggregate(node, lifl.Shape(0, 2), pause_s=0.001)
        assert node.forecast.load is not None
        assert node.forecast.load.arrival_rate > 0
