"""Traces are sorted, seeded, and distributed as they say."""

from __future__ import annotations

import math
import statistics
from random import Random

import attrs
import pytest

from lifl.errors import PlanError
from lifl.planner import traces
from lifl.planner.traces import RESNET18, RESNET152, Trace


def test_all_at_once_is_at_time_zero() -> None:
    """With an endless rate."""
    trace = traces.at_once(4, RESNET18)
    assert trace.times_s == (0.0,) * 4
    assert trace.rate == math.inf
    assert trace.landing == (None,) * 4


def test_uniform_fills_the_window() -> None:
    """Sorted, inside, and with the window's mean."""
    times = traces.uniform(2000, 60.0, RESNET18, Random(1)).times_s
    assert list(times) == sorted(times)
    assert all(0 <= time <= 60 for time in times)
    assert statistics.mean(times) == pytest.approx(30, abs=1.5)


def test_evenly_has_one_gap() -> None:
    """The first at 0, the last at the end of the window; one alone at 0."""
    trace = traces.evenly(5, 2.0, RESNET18)
    assert trace.times_s == (0.0, 0.5, 1.0, 1.5, 2.0)
    assert trace.rate == pytest.approx(2.0)
    assert traces.evenly(1, 2.0, RESNET18).times_s == (0.0,)


def test_stragglers_have_a_heavy_tail() -> None:
    """Half are in by the median, and the last comes far later than with a uniform window."""
    times = traces.heavy_tailed(2001, 10.0, RESNET18, Random(2)).times_s
    assert times[1000] == pytest.approx(10, rel=0.15)
    assert times[-1] > 50 * times[1000]
    light = traces.heavy_tailed(2001, 10.0, RESNET18, Random(2), alpha=6.0).times_s
    assert light[-1] < times[-1]


def test_same_seed_is_the_same_trace() -> None:
    """Nothing is drawn from a global."""
    for make in (traces.paper_resnet18, traces.paper_resnet152):
        assert make(Random(7)) == make(Random(7)) != make(Random(8))


def test_settings_of_the_paper() -> None:
    """120 clients of ResNet-18 within a minute; 15 of ResNet-152; 20, 60 and 100 updates for five nodes."""
    small = traces.paper_resnet18(Random(0))
    assert len(small) == 120
    assert small.sizes == RESNET18
    assert small.times_s[-1] <= 60
    large = traces.paper_resnet152(Random(0))
    assert (len(large), large.sizes) == (15, RESNET152)
    assert [len(traces.ablation(n)) for n in traces.ABLATION_UPDATES] == [20, 60, 100]
    assert traces.ablation(20).rate == math.inf
    assert traces.ablation(20, window_s=1.0).rate == pytest.approx(19.0)
    assert [len(traces.ablation(n, nodes=100)) for n in traces.ABLATION_UPDATES] == [400, 1200, 2000]


def test_clients_can_be_bound_to_nodes() -> None:
    """In turn."""
    assert traces.at_once(3, RESNET18).landing_on(["a", "b"]).landing == ("a", "b", "a")


@pytest.mark.parametrize("times", [(), (2.0, 1.0), (0.0, math.inf), (0.0, math.nan)])
def test_what_is_no_order_of_arrivals_is_refused(times: tuple[float, ...]) -> None:
    """Empty, going back, never."""
    with pytest.raises(PlanError, match="arrivals"):
        Trace(times, RESNET18)


def test_landing_is_for_all_or_none() -> None:
    """A list of another length would be somebody else's."""
    with pytest.raises(PlanError, match="landing"):
        attrs.evolve(traces.at_once(3, RESNET18), landing=("a",))
