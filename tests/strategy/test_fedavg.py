"""lifl's FedAvg against Flower's: the same numbers, hooks and metrics; quorum, deadline and reports beside them."""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Callable, Iterable
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.app.error import Error
from flwr.serverapp import Grid
from flwr.serverapp.exception import InconsistentMessageReplies
from flwr.serverapp.strategy import FedAvg as FlowerFedAvg
from flwr.serverapp.strategy import Result as FlowerResult
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import (
    MODEL,
    Client,
    Clock,
    after,
    content,
    failing,
    metrics_of,
    nudge,
    plain,
    record,
    replies_of,
    reply,
    run,
    says,
    silent,
)

import lifl
from lifl.fold import MANTISSA_BITS, SMALLEST, mean_reference, tolerance
from lifl.strategy import FedAvg
from lifl.tensor import DTYPES

NUMPY_NAMES = [name for name in DTYPES if name != "bfloat16"]
FOUR: dict[int, Client] = {node: nudge(node) for node in (1, 2, 3, 2**63 - 1)}
REFUSE_ALL: dict[int, Client] = {1: failing, 2: says(content({"other": np.zeros(1)}), nudge(2))}


# ---------------------------------------------------------------- aggregate_train, called by itself


@pytest.mark.parametrize("order", ["any", "flower"])
def test_known_numbers(node: lifl.Node, order: str) -> None:
    """A weighted mean that can be checked by hand, of arrays and of metrics."""
    first = {"w": np.float32([[1, 2, 3], [4, 5, 6]]), "b": np.float32([7, 8, 9, 10]), "s": np.array(1.0)}
    second = {"w": np.float32([[4, 8, 0], [1, 5, 9]]), "b": np.float32([7, 5, 3, 1]), "s": np.array(4.0)}
    replies = replies_of([first, second], [1, 2])
    replies[0].content["metrics"]["loss"], replies[1].content["metrics"]["loss"] = 3.0, 6.0
    arrays, metrics = FedAvg(node=node, order=order).aggregate_train(1, replies)
    mean = plain(arrays)
    np.testing.assert_allclose(mean["w"], [[3, 6, 1], [2, 5, 8]], rtol=1e-6)
    np.testing.assert_allclose(mean["b"], [7, 6, 5, 4], rtol=1e-6)
    np.testing.assert_allclose(mean["s"], 3.0, rtol=1e-6)
    assert list(mean) == ["w", "b", "s"]
    assert mean["w"].dtype == np.float32
    assert mean["s"].shape == ()
    assert metrics is not None
    assert dict(metrics) == pytest.approx({"loss": 5.0})


def test_mocked_replies(node: lifl.Node) -> None:
    """Mocks of Message with only content and has_error, as Flower's own tests make them, are replies."""
    replies = []
    for value, weight in ((1.0, 0.25), (2.0, 0.75)):
        message = Mock(spec=Message)
        message.content = content({"x": np.array([value])}, weight)
        message.has_error.side_effect = lambda: False
        replies.append(message)
    strategy = FedAvg(node=node, order="flower")
    arrays, _ = strategy.aggregate_train(1, replies)
    expected, _ = FlowerFedAvg().aggregate_train(1, replies)
    again, _ = strategy.aggregate_train(2, replies)
    assert arrays is not None
    assert expected is not None
    assert again is not None
    assert arrays.object_id == expected.object_id == again.object_id


@st.composite
def rounds(draw: st.DrawFn, any_bits: bool = False) -> tuple[list[dict[str, Any]], list[int | float]]:
    """Replies of 1 to 6 clients for a model of 1 to 4 arrays of any dtype, and their weights."""
    shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)
    spec = draw(st.lists(st.tuples(st.sampled_from(NUMPY_NAMES), shapes), min_size=1, max_size=4))
    weight = st.one_of(st.integers(1, 2**40), st.floats(1e-6, 1e9))
    weights = draw(st.lists(weight, min_size=1, max_size=6))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    size = None if any_bits else draw(st.sampled_from([0.0, 1e-3, 1.0, 1e4]))
    return [{f"{i}": noise(rng, *part, size) for i, part in enumerate(spec)} for _ in weights], weights


def noise(rng: np.random.Generator, name: str, shape: tuple[int, ...], size: float | None) -> np.ndarray[Any, Any]:
    """Random finite numbers of a dtype: floats of a size, integers of up to 48 bits; or any bits.

    With more bits, the rounding of the sum of fractional weights is more than one unit of an int64.
    """
    dtype = np.dtype(name)
    if dtype.kind == "b":
        return np.asarray(rng.integers(0, 2, shape), dtype)
    if size is None:
        bits = np.frombuffer(rng.bytes(int(np.prod(shape)) * dtype.itemsize), dtype).reshape(shape)
        return np.where(np.isfinite(bits), bits, np.zeros((), dtype))
    if dtype.kind == "f":
        return np.asarray(rng.normal(size=shape) * size, dtype)
    low, high = max(np.iinfo(dtype).min, -(2**48)), min(np.iinfo(dtype).max, 2**48)
    return np.asarray(rng.integers(low, high, shape, endpoint=True, dtype=dtype))


@settings(max_examples=60, deadline=None)
@given(rounds(), st.sampled_from(["eager", "lazy", "jit"]))
def test_the_mean_is_flowers_within_the_derived_tolerance(
    node: lifl.Node, round_: tuple[list[dict[str, Any]], list[int | float]], timing: Any
) -> None:
    """Nearer to the exact mean than the derived bound, so from Flower's by no more than Flower's own error."""
    updates, weights = round_
    arrays, metrics = FedAvg(node=node, timing=timing).aggregate_train(1, replies_of(updates, weights, loss=0.5))
    flowers, flower_metrics = FlowerFedAvg().aggregate_train(1, replies_of(updates, weights, loss=0.5))
    spec = lifl.TensorSpec.from_arrays(updates[0])
    bound, exact = tolerance(updates, weights, spec), mean_reference(updates, weights)
    mean, flower = plain(arrays), plain(flowers)
    assert metrics == flower_metrics
    assert mean.keys() == flower.keys()
    for name, array in mean.items():
        tensor = spec[name]
        assert (array.dtype.name, array.shape) == (tensor.dtype, tensor.shape)
        got = array.astype(np.longdouble)
        assert (abs(got - exact[name].astype(np.longdouble)) <= bound[name]).all()
        # Flower rounds each factor, product and sum to its dtype: n + 2 roundings of relative size u.
        dtype = tensor.dtype if tensor.dtype in MANTISSA_BITS else "float64"
        size = sum(abs(u[name].astype(np.longdouble)) * w for u, w in zip(updates, weights, strict=True)) / sum(weights)
        own = (len(updates) + 3) * (size * 2.0 ** -MANTISSA_BITS[dtype] + SMALLEST[dtype])
        rounding = 0.0 if tensor.dtype in MANTISSA_BITS else 0.5
        assert (abs(got - flower[name].astype(np.longdouble)) <= bound[name] + own + rounding).all()


@settings(max_examples=60, deadline=None)
@given(st.booleans().flatmap(rounds))
def test_the_mean_is_flowers_bit_by_bit(
    node: lifl.Node, round_: tuple[list[dict[str, Any]], list[int | float]]
) -> None:
    """With order="flower" the ArrayRecord has Flower's object id, and the metrics are Flower's."""
    updates, weights = round_
    strategy = FedAvg(node=node, order="flower")
    arrays, metrics = strategy.aggregate_train(1, replies_of(updates, weights, loss=[0.5, 0.1], n=3))
    flowers, flower_metrics = FlowerFedAvg().aggregate_train(1, replies_of(updates, weights, loss=[0.5, 0.1], n=3))
    assert arrays is not None
    assert flowers is not None
    assert arrays.object_id == flowers.object_id
    assert metrics == flower_metrics


def test_every_reply_of_a_list_counts(node: lifl.Node) -> None:
    """As in Flower: two replies of one node, or one reply twice, are two updates, and each has a name."""
    one, two = (reply(content({"x": np.array([value])})) for value in (1.0, 3.0))
    strategy = FedAvg(node=node)
    assert plain(strategy.aggregate_train(1, [one, two])[0])["x"] == [2.0]
    assert plain(strategy.aggregate_train(2, [one, two, two, two])[0])["x"] == [2.5]
    assert [c.client_id for c in strategy.reports[2].accepted] == ["7", "7#2", "7#3", "7#4"]


@pytest.mark.parametrize("order", ["any", "flower"])
def test_in_a_list_the_form_of_most_replies_is_the_models(node: lifl.Node, order: str) -> None:
    """Without a model that was sent, one reply of another form, even the first, does not turn out the others."""
    updates = [{"x": np.zeros(2)}, {"x": np.float64([1.0])}, {"x": np.float64([3.0])}]
    strategy = FedAvg(node=node, order=order)
    assert plain(strategy.aggregate_train(1, replies_of(updates, [1, 1, 1]))[0])["x"] == [2.0]
    assert [(r.client_id, r.rule) for r in strategy.reports[1].rejected] == [("1", "shape")]


@pytest.mark.parametrize("timing", ["eager", "lazy", "jit"])
def test_an_iterator_of_replies(node: lifl.Node, timing: Any) -> None:
    """Replies may be any iterable, and errors among them are left out, as in Flower."""
    good = replies_of([{"x": np.array([1.0])}, {"x": np.array([5.0])}], [3, 1])
    replies = [reply(Error(0, "the disk is full"), 9), *good]
    strategy = FedAvg(node=node, timing=timing)
    assert plain(strategy.aggregate_train(1, iter(replies))[0])["x"] == [2.0]
    assert [(r.client_id, r.rule) for r in strategy.reports[1].rejected] == [("9", "error")]
    assert strategy.reports[1].timing == timing


@pytest.mark.parametrize("replies", [[], [reply(Error(0, "no"))]], ids=["nothing", "an error"])
def test_nothing_to_aggregate(node: lifl.Node, replies: list[Message]) -> None:
    """Without a reply that carries something there is no result, as in Flower."""
    assert FedAvg(node=node).aggregate_train(1, replies) == (None, None)
    assert FlowerFedAvg().aggregate_train(1, replies) == (None, None)


@pytest.mark.parametrize(
    "odd",
    [
        content({"y": np.zeros(1)}),
        content({"x": np.zeros(1)}, 1, extra=2.0),
        content({"x": np.zeros(1)}, None),
        RecordDict({"arrays": record({"x": np.zeros(1)})}),
        RecordDict({"metrics": MetricRecord({"num-examples": 1})}),
        RecordDict({"a": record({"x": np.zeros(1)}), **content({"x": np.zeros(1)})}),
    ],
    ids=["other keys", "other metrics", "no weight", "no metrics", "no arrays", "two records"],
)
def test_inconsistent_replies_raise_as_in_flower(node: lifl.Node, odd: RecordDict) -> None:
    """Called outside a run, aggregate_train keeps Flower's checks and their exception."""
    for strategy in (FlowerFedAvg(), FedAvg(node=node)):
        replies = [*replies_of([{"x": np.zeros(1)}], [1]), reply(odd, 2)]
        with pytest.raises(InconsistentMessageReplies):
            strategy.aggregate_train(1, replies)
    assert not node.has_rounds


def test_a_model_without_arrays(node: lifl.Node) -> None:
    """Clients that send only metrics are averaged too."""
    for strategy in (FlowerFedAvg(), FedAvg(node=node)):
        arrays, metrics = strategy.aggregate_train(1, replies_of([{}, {}], [1, 3], loss=2.0))
        assert arrays is not None
        assert not arrays
        assert metrics == {"loss": 2.0}


@pytest.mark.parametrize("workers", [0, 1])
def test_other_numbers_of_workers(workers: int) -> None:
    """A Node without workers folds in this process, with the same result."""
    with lifl.Node("16MiB", workers=workers) as node:
        result, _ = run(FedAvg(node=node, order="flower"), FOUR)
    expected, _ = run(FlowerFedAvg(), FOUR)
    assert result.arrays.object_id == expected.arrays.object_id


# ---------------------------------------------------------------- start: Flower's loop


def recorded(base: type[Any], events: list[Any], **kwargs: Any) -> Any:
    """A strategy that notes each call of a hook: its name, and the types and the round of what it gets and gives."""

    def form(value: Any) -> Any:
        if isinstance(value, int):
            return value
        if isinstance(value, Grid):
            return "Grid"
        if isinstance(value, Message):
            kind = "error" if value.has_error() else [type(r).__name__ for r in value.content.values()]
            return (value.metadata.message_type, kind)
        if isinstance(value, (list, tuple)):
            return [form(v) for v in value]
        return type(value).__name__

    class Recorded(base):  # type: ignore[misc]
        pass

    def hook(name: str) -> Callable[..., Any]:
        def method(self: Any, *args: Any) -> Any:
            events.append((name, form(args)))
            result = getattr(super(Recorded, self), name)(*args)
            events.append((f"{name} returns", form(result)))
            return result

        return method

    for name in ("configure_train", "aggregate_train", "configure_evaluate", "aggregate_evaluate", "summary"):
        setattr(Recorded, name, hook(name))

    def aggregate(name: str) -> Callable[[list[RecordDict], str], MetricRecord]:
        def function(contents: list[RecordDict], key: str) -> MetricRecord:
            events.append((name, form(contents), key))
            return MetricRecord({"replies": len(contents)})

        return function

    for name in ("train_metrics_aggr_fn", "evaluate_metrics_aggr_fn"):
        kwargs[name] = aggregate(name)
    return Recorded(**kwargs)


def evaluator(events: list[Any]) -> Callable[[int, ArrayRecord], MetricRecord | None]:
    """An evaluate_fn that notes what it is given, and has nothing to say of round 1."""

    def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
        events.append(("evaluate_fn", server_round, type(arrays).__name__, arrays.object_id))
        return None if server_round == 1 else MetricRecord({"norm": float(abs(plain(arrays)["weight"]).sum())})

    return evaluate


@pytest.mark.parametrize(
    "clients",
    [FOUR, {**FOUR, 5: failing}, {**FOUR, 5: silent}, {1: failing, 2: failing}],
    ids=["all answer", "one fails", "one is silent", "all fail"],
)
def test_the_hooks_are_called_as_flower_calls_them(node: lifl.Node, clock: Clock, clients: dict[int, Client]) -> None:
    """The same hooks in the same order, with the same types and models; and the same Result."""
    flower_events: list[Any] = []
    events: list[Any] = []
    stock = recorded(FlowerFedAvg, flower_events)
    flowers, _ = run(stock, clients, 3, timeout=20, evaluate_fn=evaluator(flower_events))
    ours = recorded(FedAvg, events, node=node, order="flower")
    result, _ = run(ours, clients, 3, clock, timeout=20, evaluate_fn=evaluator(events))
    assert events == flower_events
    assert metrics_of(result) == metrics_of(flowers)
    assert isinstance(result, FlowerResult)
    assert result.arrays.object_id == (flowers.arrays or record(MODEL)).object_id


def test_a_run_is_flowers_within_the_derived_tolerance(node: lifl.Node, clock: Clock) -> None:
    """Without order="flower" each round's model keeps its dtypes and is as near to Flower's as one rounding."""
    sent: list[ArrayRecord] = []

    def keep(_: int, arrays: ArrayRecord) -> None:
        sent.append(arrays)

    result, grid = run(FedAvg(node=node), FOUR, 3, clock, evaluate_fn=keep)
    assert [a.dtype for a in result.arrays.values()] == [str(a.dtype) for a in MODEL.values()]
    for number, arrays in enumerate(sent[1:]):
        clients = [client(_train(number + 1, sent[number])) for client in FOUR.values()]
        updates = [plain(said["arrays"]) for said in clients]  # type: ignore[index]
        weights = [said["metrics"]["num-examples"] for said in clients]  # type: ignore[index]
        exact = mean_reference(updates, weights)
        for name, bound in tolerance(updates, weights, lifl.TensorSpec.from_arrays(MODEL)).items():
            difference = plain(arrays)[name].astype(np.longdouble) - exact[name].astype(np.longdouble)
            assert (abs(difference) <= bound).all()
    assert result.arrays is sent[-1]
    assert not grid.called


def _train(server_round: int, arrays: ArrayRecord) -> Message:
    from flwr.app import ConfigRecord

    config = ConfigRecord({"server-round": server_round})
    return Message(RecordDict({"arrays": arrays, "config": config}), 1, "train")


def test_default_evaluation_and_training_metrics(node: lifl.Node, clock: Clock) -> None:
    """Without functions of the user's, the metrics of both rounds are Flower's weighted means."""
    flowers, _ = run(FlowerFedAvg(fraction_evaluate=0.5), FOUR, 3)
    result, _ = run(FedAvg(fraction_evaluate=0.5, node=node), FOUR, 3, clock)
    assert metrics_of(result) == metrics_of(flowers)
    assert sorted(result.reports) == [1, 2, 3]


def test_no_training_and_no_evaluation(node: lifl.Node, clock: Clock) -> None:
    """With fraction 0 Flower's loop asks nobody, and so does lifl's: the model stays as it was."""
    result, grid = run(FedAvg(fraction_train=0.0, fraction_evaluate=0.0, node=node), FOUR, 2, clock)
    assert not grid.asked
    assert not grid.pulls
    assert result.reports == {}
    assert result.arrays.object_id == record(MODEL).object_id


def test_the_embedded_node(clock: Clock) -> None:
    """Without a Node of the user's, the process's own is made, and serves every strategy after."""
    from lifl.node import embedded

    first, _ = run(FedAvg(order="flower"), FOUR, 1, clock)
    made = embedded._node
    second, _ = run(FedAvg(order="flower"), FOUR, 1, clock)
    assert made is not None
    assert embedded._node is made
    expected, _ = run(FlowerFedAvg(), FOUR, 1)
    assert first.arrays.object_id == second.arrays.object_id == expected.arrays.object_id
    made.close()


def test_one_strategy_twice(node: lifl.Node, clock: Clock) -> None:
    """A strategy may be started again; its reports are those of the last run."""
    strategy = FedAvg(node=node)
    first, _ = run(strategy, FOUR, 2, clock)
    second, _ = run(strategy, FOUR, 1, clock)
    assert sorted(first.reports) == [1, 2]
    assert sorted(second.reports) == sorted(strategy.reports) == [1]


# ---------------------------------------------------------------- float64 models, float32 clients


@pytest.mark.parametrize("order", ["any", "flower"])
def test_float32_replies_to_a_float64_model(node: lifl.Node, clock: Clock, order: str) -> None:
    """A model that became float64 on the server may come back as float32, as PyTorch's clients send it."""
    start = record({"x": np.zeros(5), "y": np.zeros(2, np.float32)})
    clients = {n: nudge(n, "float32") for n in (1, 2, 3)}
    flowers, _ = run(FlowerFedAvg(), clients, 2, initial_arrays=start)
    result, _ = run(FedAvg(node=node, order=order), clients, 2, clock, initial_arrays=start)
    assert not result.reports[1].rejected
    assert not result.reports[2].rejected
    if order == "flower":
        assert result.arrays.object_id == flowers.arrays.object_id
    else:
        assert [a.dtype for a in result.arrays.values()] == ["float64", "float32"]
        np.testing.assert_allclose(plain(result.arrays)["x"], plain(flowers.arrays)["x"], rtol=1e-5)


# ---------------------------------------------------------------- quorum and deadline


@pytest.mark.parametrize(
    ("quorum", "is_enough"), [(None, True), (2, True), (3, False), (0.5, True), (0.51, False), (1.0, False), (9, False)]
)
def test_quorum(node: lifl.Node, clock: Clock, caplog: pytest.LogCaptureFixture, quorum: Any, is_enough: bool) -> None:
    """A round of four with two good updates counts from quorum=2 or 0.5 on; else the model stays as it was."""
    clients = {1: nudge(1), 2: nudge(2), 3: failing, 4: silent}
    seen: list[str] = []
    with caplog.at_level(logging.INFO, "flwr"):
        result, _ = run(
            FedAvg(node=node, quorum=quorum),
            clients,
            2,
            clock,
            timeout=10,
            evaluate_fn=lambda _, arrays: seen.append(arrays.object_id),
        )
    errors = [r.getMessage() for r in caplog.records if r.levelno == logging.ERROR]
    report = result.reports[1]
    assert [c.client_id for c in report.accepted] == ["1", "2"]
    assert [(r.client_id, r.rule) for r in report.rejected] == [("3", "error")]
    assert report.late == ("4",)
    assert report.expected == 4
    if is_enough:
        assert not errors
        assert report.error is None
        assert len(set(seen)) == 3
        return
    assert len(errors) == 2
    assert "round 1 has no new model" in errors[0]
    assert f"2 of 4 updates were accepted, the quorum is {report.error.split()[-1]}" in errors[0]  # type: ignore[union-attr]
    assert "refused: 3 (error: RuntimeError: the client's disk is full)" in errors[0]
    assert "late: 4" in errors[0]
    assert len(set(seen)) == 1
    assert result.arrays.object_id == record(MODEL).object_id
    assert result.train_metrics_clientapp == {}
    assert sorted(result.evaluate_metrics_clientapp) == [1, 2]
    assert not node.has_rounds


@pytest.mark.parametrize(
    ("fraction", "expected", "needed"),
    [(0.07, 100, 7), (0.55, 100, 55), (0.28, 25, 7), (0.7, 10, 7), (0.71, 10, 8), (0.01, 10, 1), (1.0, 3, 3)],
)
def test_a_fraction_is_of_the_sampled_nodes(fraction: float, expected: int, needed: int) -> None:
    """It is rounded up, but a product that floats make a little more than a whole number is that number."""
    assert FedAvg(quorum=fraction)._needed(expected) == needed


@pytest.mark.parametrize("clients", [REFUSE_ALL, {1: silent, 2: silent}, {1: failing, 2: failing}])
@pytest.mark.parametrize("order", ["any", "flower"])
def test_not_one_good_update(node: lifl.Node, clock: Clock, clients: dict[int, Client], order: str) -> None:
    """A round in which nobody counts has no result; the run goes on with the model as it was."""
    result, grid = run(FedAvg(node=node, order=order), clients, 2, clock, timeout=5)
    assert [r.error for r in result.reports.values()] == ["0 of 2 updates were accepted, the quorum is 1"] * 2
    assert len(result.reports[2].rejected) + len(result.reports[2].late) == 2
    assert result.arrays.object_id == record(MODEL).object_id
    assert len(grid.asked) == 8


def test_a_round_that_fails_is_followed_by_one_that_does_not(node: lifl.Node, clock: Clock) -> None:
    """A quorum missed in round 1 leaves nothing behind that would disturb round 2."""
    slow_start = {
        n: (lambda m, n=n: nudge(n)(m) if m.content["config"]["server-round"] == 2 else failing(m)) for n in (1, 2)
    }
    result, _ = run(FedAvg(node=node, quorum=2), slow_start, 2, clock)
    assert result.reports[1].error is not None
    assert result.reports[2].error is None
    assert len(result.reports[2].accepted) == 2
    assert sorted(result.train_metrics_clientapp) == [2]


def test_a_reply_after_the_deadline_is_late(node: lifl.Node, clock: Clock) -> None:
    """The round goes on at the deadline, names who is late, and the late reply counts in no later round."""
    clients = {1: nudge(1), 2: after(1.9, nudge(2)), 3: after(2.1, nudge(3)), 2**63 - 1: silent}
    began = clock.now
    result, grid = run(FedAvg(node=node, deadline=2.0, fraction_evaluate=0.0), clients, 2, clock)
    for report in result.reports.values():
        assert sorted(c.client_id for c in report.accepted) == ["1", "2"]
        assert sorted(report.late) == ["3", str(2**63 - 1)]
        assert report.error is None
    assert clock.now - began == pytest.approx(4.0)
    assert {m.metadata.src_node_id for m in grid.pulled} == {1, 2}


def test_the_deadline_holds_for_evaluation(node: lifl.Node, clock: Clock) -> None:
    """An evaluation round goes on at the deadline with the replies that are there."""
    clients = {1: nudge(1), 2: lambda m: nudge(2)(m) if m.metadata.message_type == "train" else None}
    began = clock.now
    result, _ = run(FedAvg(node=node, deadline=2.0), clients, 1, clock)
    assert clock.now - began == pytest.approx(2.0)
    assert dict(result.evaluate_metrics_clientapp[1]) == {"loss": 1 / 3}
    assert not result.reports[1].late


@pytest.mark.parametrize(("deadline", "timeout"), [(None, 7.0), (9.0, 7.0), (7.0, 100.0)])
def test_the_shorter_of_deadline_and_timeout(
    node: lifl.Node, clock: Clock, deadline: float | None, timeout: float
) -> None:
    """Flower's timeout bounds a round too, and alone where no deadline is given."""
    began = clock.now
    strategy = FedAvg(node=node, deadline=deadline, fraction_evaluate=0.0)
    run(strategy, {1: nudge(1), 2: silent}, 1, clock, timeout=timeout)
    assert clock.now - began == pytest.approx(7.0)


# ---------------------------------------------------------------- reports and log


def test_reports_are_json(node: lifl.Node, clock: Clock) -> None:
    """Each round's report says who counted, who did not and why, and the times; all of it as JSON too."""
    clients = {**FOUR, 5: failing, 6: silent}
    result, _ = run(FedAvg(node=node), clients, 2, clock, timeout=5)
    said = json.loads(json.dumps({n: r.to_dict() for n, r in result.reports.items()}))
    one = said["1"]
    assert sorted(c["client_id"] for c in one["accepted"]) == sorted(map(str, FOUR))
    assert {c["client_id"]: c["weight"] for c in one["accepted"]} == {str(n): float(min(n, 2**63)) for n in FOUR}
    assert one["rejected"] == [{"client_id": "5", "rule": "error", "reason": "RuntimeError: the client's disk is full"}]
    assert one["late"] == ["6"]
    assert one["error"] is None
    assert set(one["stages"]) == {"receive", "land", "fold", "finish", "last_to_result", "total"}
    assert all(seconds >= 0 for seconds in one["stages"].values())
    assert result.reports[1].weight == pytest.approx(sum(FOUR))


def test_one_log_line_per_round(node: lifl.Node, clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    """Beside Flower's own lines there is one of lifl's per round, in Flower's log and style."""
    with caplog.at_level(logging.INFO, "flwr"):
        run(FedAvg(node=node), {**FOUR, 5: failing}, 2, clock)
    lines = [r for r in caplog.records if "lifl:" in r.getMessage()]
    assert [r.levelno for r in lines] == [logging.INFO] * 2
    assert {r.name for r in lines} == {"flwr"}
    assert "└──> lifl: 4 of 5 updates" in lines[0].getMessage()
    assert "refused: 5 (error: RuntimeError: the client's disk is full)" in lines[0].getMessage()
    assert "\n" not in lines[0].getMessage()
    everything = caplog.text
    assert "aggregate_train: Received 4 results and 1 failures" in everything
    assert "Received error in reply from node 5: RuntimeError" in everything


def test_the_summary_has_lifls_settings(caplog: pytest.LogCaptureFixture) -> None:
    """The settings are in the log before the run, and Flower's settings after them."""
    with caplog.at_level(logging.INFO, "flwr"):
        FedAvg(quorum=0.9, deadline=60.0, timing="lazy", order="flower").summary()
        FedAvg().summary()
    for part in ("Timing: lazy | order: flower", "Quorum: 0.9 | deadline: 60s", "Node: embedded", "Sampling:"):
        assert part in caplog.text
    assert "Quorum: 1 update | deadline: Flower's timeout" in caplog.text


def test_the_result_prints_as_flowers(node: lifl.Node, clock: Clock) -> None:
    """The end of the log is the same: reports are not part of the Result's text."""
    flowers, _ = run(FlowerFedAvg(), FOUR, 2)
    result, _ = run(FedAvg(node=node, order="flower"), FOUR, 2, clock)
    assert str(result) == str(flowers)


# ---------------------------------------------------------------- arguments


def test_flowers_arguments_by_name_and_place() -> None:
    """FedAvg takes Flower's arguments in Flower's order, then lifl's by name; and shows all of them."""
    flowers = inspect.signature(FlowerFedAvg)
    ours = inspect.signature(FedAvg)
    assert list(ours.parameters)[: len(flowers.parameters)] == list(flowers.parameters)
    added = ["quorum", "deadline", "timing", "order", "node", "max_weight", "clipping_norm"]
    added += ["client_bytes", "total_bytes", "checkpoint", "resume", "tensorboard", "stop_if_all_refused"]
    assert list(ours.parameters)[len(flowers.parameters) :] == added
    for name, parameter in flowers.parameters.items():
        assert ours.parameters[name] == parameter
    strategy = FedAvg(0.5, 0.25, 3, 4, 5, "weight", "model", "settings", deadline=3)
    stock = FlowerFedAvg(0.5, 0.25, 3, 4, 5, "weight", "model", "settings")
    assert {k: vars(strategy)[k] for k in vars(stock)} == vars(stock)
    assert isinstance(strategy, FlowerFedAvg)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("quorum", 0),
        ("quorum", -1),
        ("quorum", 0.0),
        ("quorum", 1.5),
        ("deadline", 0),
        ("deadline", -1.0),
        ("deadline", float("nan")),
        ("timing", "late"),
        ("order", "best"),
    ],
)
def test_wrong_arguments_are_named(argument: str, value: Any) -> None:
    """A value that means nothing raises ValueError with the argument, the value and what to give."""
    with pytest.raises(ValueError, match=f"{argument}={value!r}: (give|use) "):
        FedAvg(**{argument: value})


def test_unknown_arguments_raise_as_in_flower() -> None:
    """A misspelt argument is a TypeError, as it is in Flower."""
    with pytest.raises(TypeError, match="quorom"):
        FedAvg(quorom=0.5)


def test_other_keys_in_records(node: lifl.Node, clock: Clock) -> None:
    """weighted_by_key, arrayrecord_key and configrecord_key are Flower's."""

    def client(seed: int) -> Client:
        def said(message: Message) -> RecordDict:
            weight = MetricRecord({"weight": seed})
            if message.metadata.message_type == "evaluate":
                return RecordDict({"metrics": weight})
            assert "settings" in message.content
            new = {k: np.asarray(v + seed, v.dtype) for k, v in plain(message.content["model"]).items()}
            return RecordDict({"answer": record(new), "metrics": weight})

        return said

    clients = {n: client(n) for n in (1, 2, 3)}
    keys = {"weighted_by_key": "weight", "arrayrecord_key": "model", "configrecord_key": "settings"}
    flowers, _ = run(FlowerFedAvg(**keys), clients)  # type: ignore[arg-type]
    result, _ = run(FedAvg(node=node, order="flower", **keys), clients, clock=clock)
    assert result.arrays.object_id == flowers.arrays.object_id


def test_iterables_of_messages(node: lifl.Node, clock: Clock) -> None:
    """A configure_train that is a generator works as it does with Flower's grids."""

    class Lazy(FedAvg):
        def configure_train(self, *args: Any) -> Iterable[Message]:
            yield from super().configure_train(*args)

    result, _ = run(Lazy(node=node, order="flower"), FOUR, 2, clock)
    expected, _ = run(FlowerFedAvg(), FOUR, 2)
    assert result.arrays.object_id == expected.arrays.object_id
