"""A server's bounds in Flower: weights, distances, and evaluation replies that cannot be averaged."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from flwr.app import MetricRecord, RecordDict
from flwr.serverapp.exception import InconsistentMessageReplies
from flwr.serverapp.strategy import FedAvg as FlowerFedAvg
from flwr.supercore.differential_privacy import compute_clip_model_update
from scripted import MODEL, Client, content, metrics_of, nudge, plain, replies_of, run, says

import lifl
from lifl.strategy import FedAvg

pytestmark = pytest.mark.usefixtures("clock")

GOOD: Mapping[int, Client] = {1: nudge(1), 2: nudge(2), 3: nudge(3)}
FLOATS = {name: array for name, array in MODEL.items() if array.dtype.kind == "f"}


def far(factor: float) -> dict[str, Any]:
    """The model, moved."""
    return {name: np.asarray(array + factor, array.dtype) for name, array in FLOATS.items()} | {
        "num_batches_tracked": MODEL["num_batches_tracked"]
    }


def test_a_weight_above_the_cap(node: lifl.Node) -> None:
    """Refused by name, not cut; the same reply counts where there is no cap."""
    clients = {**GOOD, 4: says(content(far(1.0), 10_001))}
    capped, _ = run(FedAvg(node=node, max_weight=10_000), clients, 1)
    (refused,) = capped.reports[1].rejected
    assert (refused.client_id, refused.rule) == ("4", "weight")
    assert "10001" in refused.reason
    honest, _ = run(FedAvg(node=node), GOOD, 1)
    for name, array in plain(honest.arrays).items():
        assert plain(capped.arrays)[name].tobytes() == array.tobytes()
    free, _ = run(FedAvg(node=node), clients, 1)
    assert free.reports[1].rejected == ()


@pytest.mark.parametrize("order", ["any", "flower"])
def test_a_model_too_far_away_is_clipped_as_flower_clips(node: lifl.Node, order: Any) -> None:
    """The mean is that of updates clipped by Flower's own function, against the model that was sent."""
    norm = 2.0
    moved = [far(0.01), far(3.0), far(-40.0)]
    clients = {i: says(content(arrays, i)) for i, arrays in enumerate(moved, 1)}
    result, _ = run(FedAvg(node=node, clipping_norm=norm, order=order), clients, 1)
    accepted = {int(c.client_id): c.clipped for c in result.reports[1].accepted}
    assert accepted[1] == 1
    assert accepted[3] < accepted[2] < 1
    assert "clipped: 2 (to " in str(result.reports[1])
    total = {name: np.zeros_like(array, np.float64) for name, array in FLOATS.items()}
    for i, arrays in enumerate(moved, 1):
        # As vectors: Flower's function leaves arrays without dimensions as they are.
        theirs = [arrays[name].astype(np.float64).reshape(-1) for name in FLOATS]
        compute_clip_model_update(theirs, [array.astype(np.float64).reshape(-1) for array in FLOATS.values()], norm)
        for name, array in zip(FLOATS, theirs, strict=True):
            total[name] += i * array.reshape(total[name].shape) / 6
    for name, array in total.items():
        # One rounding of each clipped update and one of the mean; in Flower's order one more for each step.
        eps = np.finfo(MODEL[name].dtype).eps
        np.testing.assert_allclose(plain(result.arrays)[name], array, atol=4 * eps * (1 + np.abs(array).max()))


UNITS = 64 * 1024
"""Bytes of the arena that an update of MODEL takes."""


@pytest.mark.parametrize("order", ["any", "flower"])
def test_a_quota_of_each_client(node: lifl.Node, order: Any) -> None:
    """Too small for one update it refuses every reply by name; one that is large enough refuses none."""
    refused, _ = run(FedAvg(node=node, order=order, client_bytes=UNITS - 1), GOOD, 1)
    assert [(r.client_id, r.rule) for r in refused.reports[1].rejected] == [(str(i), "quota") for i in GOOD]
    assert "the client holds 0 bytes of the arena and may hold 65,535" in refused.reports[1].rejected[0].reason
    assert "0 of 3 updates were accepted" in str(refused.reports[1].error)
    taken, _ = run(FedAvg(node=node, order=order, client_bytes=UNITS), GOOD, 1)
    assert taken.reports[1].rejected == ()
    assert len(taken.reports[1].accepted) == 3


@pytest.mark.parametrize("timing", ["eager", "lazy"])
def test_a_quota_of_all(node: lifl.Node, timing: Any) -> None:
    """With room for one update at a time each reply waits for the one before, and all of them count."""
    bounded, _ = run(FedAvg(node=node, timing=timing, total_bytes=UNITS), GOOD, 2)
    free, _ = run(FedAvg(node=node, timing=timing), GOOD, 2)
    assert [len(report.accepted) for report in bounded.reports.values()] == [3, 3]
    for name, array in plain(free.arrays).items():
        np.testing.assert_allclose(plain(bounded.arrays)[name], array, rtol=1e-3 if array.dtype == np.float16 else 1e-6)


def test_a_quota_of_all_in_flowers_order(node: lifl.Node) -> None:
    """There all replies stay until the last is in, so what is beyond the quota is refused by name."""
    result, _ = run(FedAvg(node=node, order="flower", total_bytes=2 * UNITS), GOOD, 1)
    assert [(r.client_id, r.rule) for r in result.reports[1].rejected] == [("3", "quota")]
    assert [c.client_id for c in result.reports[1].accepted] == ["1", "2"]


@pytest.mark.parametrize("bound", ["client_bytes", "total_bytes"])
@pytest.mark.parametrize("value", [0, -1, 1.5, "much", True])
def test_senseless_quotas(bound: str, value: Any) -> None:
    """Refused when the strategy is made, by name and value."""
    with pytest.raises(ValueError, match=rf"{bound}={value!r}"):
        FedAvg(**{bound: value})


def test_bounds_are_in_the_log(node: lifl.Node, caplog: pytest.LogCaptureFixture) -> None:
    """The settings that Flower logs at the start have them."""
    with caplog.at_level(logging.INFO):
        FedAvg(node=node, client_bytes=2**20).summary()
    assert "Weights up to: 1.26765e+30 | clipping norm: none" in caplog.text
    assert "Bytes of a client: 1,048,576 | of a round: any" in caplog.text


def test_clipping_needs_the_model_that_was_sent(node: lifl.Node) -> None:
    """Outside a run there is none: an error that says so, not an average without a bound."""
    with pytest.raises(ValueError, match=r"clipping_norm=1 needs the model that the clients were sent.*call start"):
        FedAvg(node=node, clipping_norm=1.0).aggregate_train(1, replies_of([far(0.0)], [1]))


@pytest.mark.parametrize("bound", ["max_weight", "clipping_norm"])
@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf"), "five", True])
def test_senseless_bounds(bound: str, value: Any) -> None:
    """Refused when the strategy is made, by name and value."""
    with pytest.raises(ValueError, match=bound):
        FedAvg(**{bound: value})


def evaluating(said: RecordDict) -> Client:
    """Trains honestly, evaluates badly."""
    honest = nudge(9)
    return lambda message: said if message.metadata.message_type.startswith("evaluate") else honest(message)


BAD = {
    "weight 0": RecordDict({"metrics": MetricRecord({"num-examples": 0, "loss": 1.0})}),
    "weight NaN": RecordDict({"metrics": MetricRecord({"num-examples": float("nan"), "loss": 1.0})}),
    "no weight": RecordDict({"metrics": MetricRecord({"loss": 1.0})}),
    "above the cap": RecordDict({"metrics": MetricRecord({"num-examples": 10**9, "loss": 1.0})}),
    "a list": RecordDict({"metrics": MetricRecord({"num-examples": 1, "loss": [1.0]})}),
    "another metric": RecordDict({"metrics": MetricRecord({"num-examples": 1, "mood": 1.0})}),
    "nothing": RecordDict({}),
    "two records": RecordDict({"a": MetricRecord({"num-examples": 1}), "b": MetricRecord({"num-examples": 1})}),
    "beyond float64": RecordDict({"metrics": MetricRecord({"num-examples": 1, "loss": 10**400})}),
}


@pytest.mark.parametrize("how", BAD)
def test_a_bad_evaluation_is_left_out(node: lifl.Node, caplog: pytest.LogCaptureFixture, how: str) -> None:
    """It is named in the log, the others' mean is as without it, and the run goes on to its end."""
    without, _ = run(FedAvg(node=node, fraction_train=0.0), GOOD, 2)
    with caplog.at_level(logging.WARNING):
        strategy = FedAvg(node=node, fraction_train=0.0, max_weight=10**6)
        result, _ = run(strategy, {**GOOD, 4: evaluating(BAD[how])}, 2)
    assert metrics_of(result)[1] == metrics_of(without)[1]
    assert "aggregate_evaluate: round 1 leaves out: 4 (" in caplog.text


def test_stock_flower_ends_the_run_at_one() -> None:
    """So that the test above proves something."""
    with pytest.raises(InconsistentMessageReplies):
        run(FlowerFedAvg(fraction_train=0.0), {**GOOD, 4: evaluating(BAD["another metric"])}, 1)
