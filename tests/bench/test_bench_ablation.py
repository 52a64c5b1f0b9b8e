"""The ablation is carried out for real as the policies say, and what comes out is the mean of all updates."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest

from lifl import TensorSpec
from lifl.bench import ablation as bench
from lifl.bench import cluster as real
from lifl.bench.ablation import COUNTS, STEPS, measure_ablation
from lifl.bench.cluster import Cluster
from lifl.errors import LiflError
from lifl.node import calibration
from lifl.planner.costs import Sizes
from lifl.planner.simulate import LIFL, POLICIES, Policy, cluster, divide
from lifl.planner.traces import ablation
from lifl.tensor import Array

pytestmark = pytest.mark.ladder

SPEC = TensorSpec.from_arrays(
    {"w": np.empty((30, 70), np.float32), "n": np.empty((), np.int64), "none": np.empty((0, 4), np.float32)}
)
LAYOUT = SPEC.layout
SIZES = Sizes(LAYOUT.update_bytes, LAYOUT.sum_bytes, LAYOUT.mean_bytes, len(SPEC))
NODES = cluster(5, 20, 2)
UPDATES = [bench._numbers(SPEC, k) for k in range(3)]


@pytest.fixture(autouse=True)
def soon_cold(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runtimes that are not kept end soon, and others on the machine are not waited for."""
    monkeypatch.setattr(real, "COLD_TIMEOUT_S", 0.05)
    monkeypatch.setattr(bench, "MAX_TRIES", 1)
    monkeypatch.setattr(bench, "WARM_ROUNDS", 1)


@pytest.fixture(scope="module")
def figures() -> Iterator[dict[str, Any]]:
    """All of the ablation, with little updates, once for the tests of what comes out."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(real, "COLD_TIMEOUT_S", 0.05)
        patch.setattr(bench, "MAX_TRIES", 1)
        patch.setattr(bench, "WARM_ROUNDS", 1)
        costs = calibration.default_costs()
        yield measure_ablation((5, 30), (4,), 1, window_s=0.1, patience_s=0.0, spec=SPEC, costs=costs)


def played(policy: Policy, n: int, rounds: int = 1) -> list[real.Played]:
    """Rounds of n updates, with their model compared with the mean in float64."""
    trace, costs = ablation(n, 5, SIZES), calibration.default_costs()
    parts = divide(trace, policy, NODES, costs)
    weights = [1.0 + i for i in range(n)]
    mean, allowed = bench._expected(SPEC, UPDATES, weights)
    checked = 0

    def check(model: Mapping[str, Array]) -> None:
        nonlocal checked
        checked += 1
        assert all((np.abs(model[name] - mean[name]) <= allowed[name]).all() for name in SPEC)

    with Cluster(SPEC, trace, policy, [node.name for node in NODES], parts) as nodes:
        done = [nodes.play(UPDATES, weights, check) for _ in range(rounds)]
    assert checked == rounds
    return done


def test_every_step_gives_the_mean_and_saves_what_it_is_for() -> None:
    """Locality: all but the nodes' means stay; hierarchy: runtimes; reuse: none is started, in the second round too."""
    done = {policy.name: played(policy, 22, 2) for policy in STEPS}
    for one, two in done.values():
        assert one.updates == two.updates == 22
        assert (one.nodes_used, one.bytes_between_nodes) == (two.nodes_used, two.bytes_between_nodes)
        assert one.runtimes_started == two.runtimes_started
    baseline, locality, hierarchy, *warm = (one for one, _ in done.values())
    assert [baseline.nodes_used, locality.nodes_used] == [5, 2]
    assert baseline.bytes_between_nodes >= 17 * SPEC.nbytes
    assert baseline.runtimes_started > locality.runtimes_started > hierarchy.runtimes_started > 0
    for one in (locality, hierarchy, *warm):
        assert one.bytes_between_nodes == SPEC.nbytes  # the mean of the node that is not the top's
    assert {one.runtimes_started for one in warm} == {0}


def test_a_wrong_update_ends_the_round() -> None:
    """The waiter for the model reports the failure of a gateway, and nothing hangs."""
    trace, costs = ablation(5, 5, SIZES), calibration.default_costs()
    bad = {**UPDATES[0], "w": np.full((30, 70), np.nan, np.float32)}
    for policy in (POLICIES[0], LIFL):
        parts = divide(trace, policy, NODES, costs)
        with (
            Cluster(SPEC, trace, policy, [node.name for node in NODES], parts) as nodes,
            pytest.raises((LiflError, ValueError), match=r"NaN|nan|finite"),
        ):
            nodes.play([bad], [1.0] * 5, lambda model: None)


def test_figures_are_what_is_documented(figures: dict[str, Any]) -> None:
    """Each setting has a row for each step, each row its counts."""
    assert json.loads(json.dumps(figures)) == figures
    keys = {"update_bytes", "cores", "capacity", "repetitions", "costs", "simulated", "real"}
    assert set(figures) == keys | {"median_error", "median_last_error"}
    assert [(one["nodes"], one["updates"]) for one in figures["simulated"]] == [(5, 5), (5, 30), (100, 100), (100, 600)]
    assert [(one["updates"], one["window_s"]) for one in figures["real"]] == [(4, 0.0), (4, pytest.approx(0.1))]
    for setting in (*figures["simulated"], *figures["real"]):
        assert [row["policy"] for row in setting["rows"]] == [policy.name for policy in STEPS]
        assert all(set(row) >= {"policy", *COUNTS} for row in setting["rows"])
    for setting in figures["real"]:
        assert setting["memory_bytes"] > 0
        for row in setting["rows"]:
            assert set(row) == {"policy", *COUNTS, "simulated", "error", "last_error", "others", "rounds"}
            for name in ("runtimes_started", "nodes_used"):
                assert row[name] == row["simulated"][name]
            assert row["bytes_between_nodes"] == pytest.approx(row["simulated"]["bytes_between_nodes"], rel=0.02)
            off = abs(row["simulated"]["completion_s"] - row["completion_s"])
            assert row["error"] == pytest.approx(off / row["completion_s"])
    assert math.isfinite(figures["median_error"])


def test_nonsense_is_refused() -> None:
    """Before anything is measured or started."""
    for wrong in ({"updates": ()}, {"updates": (0,)}, {"real_updates": (0,)}, {"repetitions": 0}):
        with pytest.raises(ValueError, match="at least 1"):
            measure_ablation(**wrong)
    for wrong in ({"updates": (101,)}, {"real_updates": (20, 101)}):
        with pytest.raises(ValueError, match="5 nodes have room for 100"):
            measure_ablation(**wrong)
