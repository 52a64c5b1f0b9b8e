"""A run whose replies all break one rule stops, with what was sent and what came back; one bad client stops nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from scripted import Client, content, failing, plain, record, replies_of, run, silent

import lifl
from lifl.errors import RoundError
from lifl.strategy import FedAdam, FedAvg

pytestmark = pytest.mark.usefixtures("clock")
MODEL = {"w": np.zeros(3, np.float32), "steps": np.array(0), "norm.mean": np.ones(2, np.float32)}


def replies(change: Callable[[dict[str, Any]], dict[str, Any]], weight: Any = 1) -> Client:
    """A client that changes the model that it was sent."""
    return lambda message: content(change(plain(message.content["arrays"])), weight, loss=0.5)


def second_record(message: Message) -> RecordDict:
    """A reply with two MetricRecords."""
    said = content(plain(message.content["arrays"]), 1, loss=0.5)
    said["more"] = MetricRecord({"n": 1})
    return said


def without_arrays(_: Message) -> RecordDict:
    """A reply with metrics alone."""
    return RecordDict({"arrays": ArrayRecord({}), "metrics": MetricRecord({"num-examples": 1})})


WRONG: dict[str, tuple[Client, str]] = {
    "a subset of the keys": (replies(lambda a: {"w": a["w"], "steps": a["steps"]}), "missing 'norm.mean'"),
    "a key more": (replies(lambda a: a | {"x": a["w"]}), "not in the model: 'x'"),
    "another shape": (replies(lambda a: a | {"w": a["w"][:2]}), "'w'"),
    "floats for integers": (replies(lambda a: a | {"steps": np.array(0.5)}), "'steps' has dtype float64"),
    "another width": (replies(lambda a: a | {"w": a["w"].astype(np.float64)}), "'w' has dtype float64"),
    "NaN": (replies(lambda a: a | {"w": a["w"] * np.nan}), "'w' holds nan"),
    "a weight of 0": (replies(lambda a: a, 0), "weight"),
    "a second MetricRecord": (second_record, "MetricRecord"),
    "no arrays": (without_arrays, "missing"),
}


@pytest.mark.parametrize(("client", "said"), WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("cls", [FedAvg, FedAdam])
def test_the_run_stops_with_what_was_sent_and_what_came_back(
    cls: Any, client: Client, said: str, node: lifl.Node
) -> None:
    """In the round in which it happens, with the report kept; with the argument it goes on with the first model."""
    strategy = cls(node=node, fraction_evaluate=0.0)
    with pytest.raises(RoundError) as caught:
        run(strategy, {1: client, 2: client, 3: client}, 3, initial_arrays=record(MODEL))
    text = str(caught.value)
    assert text.startswith("round 1: all replies were refused for the same reason (")
    assert "Sent: 'w' float32 (3,), 'steps' int64 (), 'norm.mean' float32 (2,). Came back: from node " in text
    assert said in text
    assert "; and 1 more. Make the ClientApp and the model agree, or go on all the same with stop_if_" in text
    assert list(strategy.reports) == [1]
    assert len(strategy.reports[1].rejected) == 3
    going_on = cls(node=node, fraction_evaluate=0.0, stop_if_all_refused=False)
    result, _ = run(going_on, {1: client, 2: client, 3: client}, 2, initial_arrays=record(MODEL))
    assert sorted(result.reports) == [1, 2]
    assert plain(result.arrays)["norm.mean"].tolist() == [1.0, 1.0]


BAD = replies(lambda a: {"w": a["w"]})
OTHER = replies(lambda a: a | {"w": a["w"] * np.nan})


@pytest.mark.parametrize(
    "clients",
    [
        {1: BAD, 2: failing, 3: failing},
        {1: BAD, 2: silent, 3: silent},
        {1: BAD, 2: OTHER, 3: OTHER},
        {1: failing, 2: failing, 3: failing},
    ],
    ids=["the others fail", "the others are silent", "for two reasons", "all fail"],
)
def test_a_few_bad_clients_stop_no_run(clients: dict[int, Client], node: lifl.Node) -> None:
    """Such a round has no result, and the next one may have."""
    strategy = FedAvg(node=node, fraction_evaluate=0.0, deadline=20.0)
    result, _ = run(strategy, clients, 2, initial_arrays=record(MODEL))
    assert sorted(result.reports) == [1, 2]
    assert all(report.error for report in result.reports.values())


def test_a_long_model_is_shown_in_short(node: lifl.Node) -> None:
    """Five arrays, and how many more there are."""
    model = {f"layer{i}": np.zeros(2, np.float32) for i in range(60)}
    clients = dict.fromkeys((1, 2), replies(lambda a: {"x": a["layer0"]}))
    with pytest.raises(RoundError, match=r"'layer4' float32 \(2,\) and 55 more\. Came back: from node"):
        run(FedAvg(node=node), clients, 1, initial_arrays=record(model))


def test_outside_a_run_nothing_stops(node: lifl.Node) -> None:
    """A list of replies that somebody aggregates by hand has no result, as before."""
    replied = replies_of([{"w": np.full(3, np.nan, np.float32)}] * 2, [1, 1], loss=1.0)
    assert FedAvg(node=node).aggregate_train(1, replied) == (None, None)
