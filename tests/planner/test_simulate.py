"""A simulated round loses nothing, agrees with the prediction for one node, and orders the ablation as it must."""

from __future__ import annotations

import math
from random import Random

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lifl.errors import PlanError
from lifl.planner import traces
from lifl.planner.choose import choose_shape
from lifl.planner.costs import Costs, predict
from lifl.planner.load import ServerNode
from lifl.planner.shape import Shape
from lifl.planner.simulate import FORMS, LIFL, POLICIES, Outcome, Policy, cluster, simulate
from lifl.planner.timing import TIMINGS
from lifl.planner.traces import Trace
from tests.planner.rounds import COSTS, MODEL, costs_of

WORK = COSTS.work(MODEL)

policies = st.builds(
    Policy, st.just("any"), st.booleans(), st.sampled_from(FORMS), st.booleans(), st.sampled_from(TIMINGS)
)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Trace, tuple[ServerNode, ...], dict[str, str]]:
    """A trace, nodes with room for it, and the machines that they are on."""
    nodes = cluster(draw(st.integers(1, 6)), draw(st.integers(8, 12)), draw(st.integers(1, 4)), draw(st.integers(0, 4)))
    n = draw(st.integers(1, 8 * len(nodes)))
    window = draw(st.sampled_from([0.0, 0.05, 1.0]))
    trace = traces.uniform(n, window, MODEL, Random(draw(st.integers(0, 99))))
    if draw(st.booleans()):
        trace = trace.landing_on([node.name for node in nodes])
    machines = {node.name: f"m{draw(st.integers(0, 2))}" for node in nodes} if draw(st.booleans()) else {}
    return trace, nodes, machines


@given(cases(), policies, costs_of())
def test_every_update_is_in_the_model_once(
    case: tuple[Trace, tuple[ServerNode, ...], dict[str, str]], policy: Policy, costs: Costs
) -> None:
    """Whatever the policy; the model comes after the last arrival; the same input gives the same outcome."""
    trace, nodes, machines = case
    outcome = simulate(trace, policy, nodes, costs, machines=machines, has_spans=True)
    assert outcome == simulate(trace, policy, nodes, costs, machines=machines, has_spans=True)
    assert outcome.updates == len(trace)
    assert outcome.last_to_model_s > 0
    assert outcome.completion_s == pytest.approx(outcome.last_to_model_s + trace.times_s[-1] - trace.times_s[0])
    assert 1 <= outcome.nodes_used <= len(nodes)
    work = costs.work(MODEL)
    assert outcome.cpu_s >= len(trace) * (work.land_s + work.update_s) * (1 - 1e-9)
    assert 0 <= outcome.bytes_between_nodes <= (len(trace) + len(nodes)) * MODEL.update_bytes


@given(cases(), policies, costs_of())
def test_spans_are_what_the_runtimes_did(
    case: tuple[Trace, tuple[ServerNode, ...], dict[str, str]], policy: Policy, costs: Costs
) -> None:
    """A runtime does one thing at a time; the last is the mean; there are as many starts as runtimes were started."""
    trace, nodes, machines = case
    outcome = simulate(trace, policy, nodes, costs, machines=machines, has_spans=True)
    assert sum(span.step == "start" for span in outcome.spans) == outcome.runtimes_started
    assert max(span.end_s for span in outcome.spans) == pytest.approx(outcome.completion_s)
    for one, after in zip(outcome.spans, outcome.spans[1:], strict=False):
        assert one.begin_s <= one.end_s
        if (one.node, one.runtime) == (after.node, after.runtime) and one.runtime is not None:
            assert one.end_s <= after.begin_s + 1e-9


@given(st.integers(1, 20), st.floats(0, 2), st.sampled_from(TIMINGS), st.integers(0, 9))
def test_one_node_is_as_predicted(n: int, window: float, timing: str, seed: int) -> None:
    """The simulation of one node and the prediction of its round are the same numbers."""
    trace = traces.uniform(n, window, MODEL, Random(seed))
    for form in ("tree", "best"):
        policy = Policy("one", form=form, timing=timing)
        outcome = simulate(trace, policy, cluster(1, 20, 2), COSTS)
        best = choose_shape(n, trace.rate, MODEL, COSTS, 2, timing)
        shape = best if form == "best" else Shape(min(-(-n // 2), 2), 0)
        done = predict(shape, timing, trace.times_s, MODEL, COSTS, 2, has_landed=False)
        assert outcome.completion_s == done.completion_s
        assert (outcome.cpu_s, outcome.peak_bytes) == (done.cpu_s, done.peak_bytes)


def test_one_update_on_one_node_is_a_sum_of_steps() -> None:
    """Landed, folded, sent to itself, divided; cold, two runtimes start on the way and touch all memory first."""
    nodes = cluster(1, 20, 1)
    warm, cold = (
        simulate(traces.at_once(1, MODEL), Policy("one", form="tree", is_reusing=reuse, timing="lazy"), nodes, COSTS)
        for reuse in (True, False)
    )
    steps = WORK.land_s + WORK.batch_s(1, is_first=True) + WORK.mean_of_s(1, 0)
    assert warm.completion_s == pytest.approx(steps)
    touched = WORK.update_touch_s + WORK.sum_made_s + WORK.touched_mean_s(1, 0)
    assert cold.completion_s == pytest.approx(steps + 2 * COSTS.cold_start_s + touched)
    assert (warm.runtimes_started, cold.runtimes_started) == (0, 2)


def test_mean_of_another_node_crosses_the_wire() -> None:
    """Two nodes with an update each: one's mean, as large as an update, is sent, landed and folded by the other."""
    trace = traces.at_once(2, MODEL).landing_on(["n0", "n1"])
    outcome = simulate(trace, Policy("two", form="tree", timing="lazy"), cluster(2, 5, 1), COSTS)
    one = WORK.land_s + WORK.batch_s(1, is_first=True) + WORK.mean_of_s(1, 0)
    wire = MODEL.update_bytes / COSTS.wire_bytes_s
    assert outcome.completion_s == pytest.approx(one + wire + WORK.batch_s(2, is_first=True) + WORK.mean_of_s(1, 0))
    assert outcome.bytes_between_nodes == MODEL.update_bytes
    assert outcome.nodes_used == 2


def ablation(updates: int, nodes: int, machines: dict[str, str] | None = None) -> list[Outcome]:
    """All steps of the ablation, on nodes of capacity 20 with two cores."""
    trace = traces.ablation(updates, nodes)
    return [simulate(trace, policy, cluster(nodes, 20, 2), COSTS, machines=machines) for policy in (*POLICIES, LIFL)]


@pytest.mark.parametrize("updates", traces.ABLATION_UPDATES)
@pytest.mark.parametrize("nodes", [5, 100])
def test_each_step_of_the_ablation_saves_what_it_is_for(updates: int, nodes: int) -> None:
    """Locality: nodes and bytes. Hierarchy: runtimes and CPU. Reuse: every start. Shards: CPU and time."""
    baseline, locality, hierarchy, reuse, eager, shards = ablation(updates, nodes)
    assert locality.nodes_used == math.ceil(updates * nodes / 5 / 20) <= baseline.nodes_used == nodes
    assert locality.bytes_between_nodes == (locality.nodes_used - 1) * traces.RESNET18.update_bytes
    assert locality.bytes_between_nodes < baseline.bytes_between_nodes
    assert locality.completion_s < baseline.completion_s
    assert hierarchy.runtimes_started < locality.runtimes_started
    assert hierarchy.cpu_s < locality.cpu_s
    assert hierarchy.completion_s < locality.completion_s
    assert reuse.runtimes_started == 0
    assert reuse.completion_s < hierarchy.completion_s
    assert eager.peak_bytes < reuse.peak_bytes
    assert shards.completion_s < eager.completion_s
    assert shards.cpu_s < eager.cpu_s


def test_eager_has_the_model_first_when_updates_trickle_in() -> None:
    """The paper's 120 clients within a minute: all but the last are folded when it comes."""
    trace = traces.paper_resnet18(Random(3))
    *_, reuse, eager = (simulate(trace, policy, cluster(5, 24, 2), COSTS) for policy in POLICIES)
    assert eager.last_to_model_s < reuse.last_to_model_s / 2


def test_nodes_on_one_machine_share_it() -> None:
    """Five nodes on two cores take longer than on ten, and no less CPU."""
    for apart, together in zip(ablation(100, 5), ablation(100, 5, {f"n{i}": "m" for i in range(5)}), strict=True):
        assert apart.completion_s < together.completion_s
        assert apart.bytes_between_nodes == together.bytes_between_nodes


@given(st.integers(1, 60), st.sampled_from(["fixed", "tree"]), st.booleans(), st.booleans(), costs_of())
def test_faster_lazy_rounds_are_never_slower(n: int, form: str, local: bool, reuse: bool, costs: Costs) -> None:
    """More cores in each machine, and each rate doubled."""
    policy = Policy("lazy", local, form, reuse, "lazy")
    trace, nodes = traces.at_once(n, MODEL), cluster(1 if local else 5, 60, 2)
    slow = simulate(trace, policy, nodes, costs)
    names = [field.name for field in attrs.fields(Costs) if field.name.endswith("bytes_s")]
    for faster in (
        attrs.evolve(costs, cores=2 * costs.cores),
        attrs.evolve(costs, **{name: 2 * getattr(costs, name) for name in names}),
    ):
        assert simulate(trace, policy, nodes, faster).completion_s <= slow.completion_s * (1 + 1e-9)


def test_hundreds_of_nodes_and_thousands_of_clients() -> None:
    """Every update is in, with stragglers that come hours later."""
    trace = traces.heavy_tailed(5000, 10.0, traces.RESNET18, Random(5))
    for policy in (POLICIES[0], LIFL):
        assert simulate(trace, policy, cluster(300, 20, 8), COSTS).updates == 5000


def test_bound_clients_stay_where_they_land() -> None:
    """With locality nothing but means crosses."""
    trace = traces.at_once(12, MODEL).landing_on(["n0", "n1", "n2"])
    assert simulate(trace, LIFL, cluster(4, 20, 2), COSTS).bytes_between_nodes == 2 * MODEL.update_bytes


def test_what_does_not_fit_is_refused() -> None:
    """Too many updates; a form or a timing that there is not."""
    with pytest.raises(PlanError, match="room for 10"):
        simulate(traces.at_once(11, MODEL), LIFL, cluster(2, 5, 2), COSTS)
    with pytest.raises(PlanError, match="form"):
        Policy("odd", form="round")
    with pytest.raises(PlanError, match="timing"):
        Policy("odd", timing="soon")
