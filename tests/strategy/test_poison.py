"""A reply that kills the workers that fold it: refused by name, however late that is known; nothing of it counts."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message, RecordDict
from scripted import Client, content, plain, record, replies_of, run, says

import lifl
from lifl.strategy import FedAvg

pytestmark = pytest.mark.usefixtures("clock")

# It is real: a worker kills itself as soon as it is to fold an update that begins with 13.
DEADLY = """
import ctypes, os, signal
import lifl.fold as fold

def deadly(real, at):
    def call(*args):
        if any(ctypes.c_double.from_address(update).value == 13.0 for update in (args[at] if len(args) > at else ())):
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args)
    return call

fold.fold_at, fold.flower_at, fold.finish_at = (
    deadly(fold.fold_at, 3), deadly(fold.flower_at, 2), deadly(fold.finish_at, 4)
)
"""
MODEL = {"w": np.zeros(8)}
POISON = 2


def client(value: float, **metrics: Any) -> Client:
    """Says a model full of one value, with a weight of 1."""
    return says(content({"w": np.full(8, value)}, 1, **{"loss": value, **metrics}))


CLIENTS: Mapping[int, Client] = {1: client(1.0), POISON: client(13.0), 3: client(4.0)}


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[lifl.Node]:
    """A Node whose workers die of 13."""
    (tmp_path / "sitecustomize.py").write_text(DEADLY)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    with lifl.Node("16MiB", workers=2) as node:
        yield node


class Looking(FedAvg):
    """A user's strategy that looks at the replies and passes them on."""

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
        """The same."""
        return super().aggregate_train(server_round, list(replies))


class Changing(FedAvg):
    """A user's strategy that changes them: they are folded again."""

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
        """All of them with another weight."""
        changed = list(replies)
        for reply in changed:
            reply.content.metric_records["metrics"]["num-examples"] = 2
        return super().aggregate_train(server_round, changed)


@pytest.mark.parametrize("timing", ["eager", "lazy"])
@pytest.mark.parametrize(
    ("cls", "order"), [(FedAvg, "any"), (FedAvg, "flower"), (Looking, "any"), (Changing, "any"), (Changing, "flower")]
)
def test_it_is_refused_alone(node: lifl.Node, cls: Any, order: Any, timing: Any) -> None:
    """It is in the report, its metrics are not in their mean, and the model is that of the other two."""
    result, _ = run(cls(node=node, order=order, timing=timing), CLIENTS, 1, initial_arrays=record(MODEL))
    report = result.reports[1]
    assert report.error is None
    assert [(r.client_id, r.rule) for r in report.rejected] == [(str(POISON), "poison")]
    assert sorted(c.client_id for c in report.accepted) == ["1", "3"]
    assert f"{POISON} (poison: 2 workers died while they folded it)" in str(report)
    assert (plain(result.arrays)["w"] == 2.5).all()
    assert result.train_metrics_clientapp[1]["loss"] == 2.5


def test_users_metrics_function_does_not_get_it(node: lifl.Node) -> None:
    """The function gets the contents of those accepted replies that count in the end."""
    seen: list[Any] = []

    def losses(contents: list[RecordDict], weight_key: str) -> Any:
        seen.extend(said.metric_records["metrics"]["loss"] for said in contents)
        return next(iter(contents[0].metric_records.values()))

    run(FedAvg(node=node, train_metrics_aggr_fn=losses), CLIENTS, 1, initial_arrays=record(MODEL))
    assert seen == [1.0, 4.0]


@pytest.mark.parametrize(("quorum", "needed"), [(3, 3), (1.0, 3), (2, None), (0.6, None)])
@pytest.mark.parametrize("order", ["any", "flower"])
def test_it_does_not_count_for_the_quorum(
    node: lifl.Node, caplog: pytest.LogCaptureFixture, quorum: Any, needed: int | None, order: Any
) -> None:
    """A round that had its quorum only with it has no result, and says so; the model stays as it was."""
    with caplog.at_level(logging.ERROR):
        strategy = FedAvg(node=node, quorum=quorum, order=order)
        result, _ = run(strategy, CLIENTS, 1, initial_arrays=record(MODEL))
    report = result.reports[1]
    assert [(r.client_id, r.rule) for r in report.rejected] == [(str(POISON), "poison")]
    if needed is None:
        assert report.error is None
        assert (plain(result.arrays)["w"] == 2.5).all()
        return
    assert report.error == f"2 of 3 updates were accepted, the quorum is {needed}"
    assert "has no new model" in caplog.text
    assert (plain(result.arrays)["w"] == 0).all()
    assert result.train_metrics_clientapp == {}


def test_it_is_the_only_one(node: lifl.Node) -> None:
    """Nothing is left to make a model of: the round says why, and the next one has its result."""
    first = iter([13.0, 4.0])

    def better(message: Message) -> Any:
        is_train = message.metadata.message_type.startswith("train")
        return client(next(first) if is_train else 4.0)(message)

    strategy = FedAvg(node=node, min_train_nodes=1, min_evaluate_nodes=1, min_available_nodes=1)
    result, _ = run(strategy, {1: better}, 2, initial_arrays=record(MODEL))
    assert [(r.client_id, r.rule) for r in result.reports[1].rejected] == [("1", "poison")]
    assert "no update is left" in str(result.reports[1].error)
    assert result.reports[2].error is None
    assert (plain(result.arrays)["w"] == 4).all()


def test_by_itself(node: lifl.Node) -> None:
    """So it is where aggregate_train is called with a list of replies, outside a run."""
    strategy = FedAvg(node=node)
    updates = [{"w": np.full(8, value)} for value in (1.0, 13.0, 4.0)]
    arrays, metrics = strategy.aggregate_train(1, replies_of(updates, [1, 1, 1]))
    assert (plain(arrays)["w"] == 2.5).all()
    assert metrics is not None
    assert [(r.client_id, r.rule) for r in strategy.reports[1].rejected] == [("2", "poison")]
