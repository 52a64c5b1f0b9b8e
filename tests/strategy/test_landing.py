"""The replies that a client may send, those that are refused and by which rule, and the memory that stays."""

from __future__ import annotations

import gc
import io
import logging
import weakref
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.app.error import Error
from flwr.serverapp.strategy import FedAvg as FlowerFedAvg
from scripted import (
    MODEL,
    Client,
    Clock,
    ScriptedGrid,
    content,
    failing,
    metrics_of,
    nudge,
    plain,
    record,
    replies_of,
    run,
    says,
)

import lifl
from lifl.strategy import FedAvg

GOOD: dict[int, Client] = {1: nudge(1), 2: nudge(2), 3: nudge(3)}
BAD_NODE = 2**63 - 1


def changed(**arrays: Any) -> dict[str, Any]:
    """The model with other arrays in some places; None removes one."""
    return {name: array for name, array in {**MODEL, **arrays}.items() if array is not None}


def raw(data: bytes, stype: str = "numpy.ndarray") -> RecordDict:
    """A reply whose bias is these bytes."""
    arrays = record(MODEL)
    arrays["bias"] = Array(dtype="float64", shape=(3,), stype=stype, data=data)
    return content(arrays)


def saved(array: Any, **options: Any) -> bytes:
    """The bytes that np.save writes."""
    stream = io.BytesIO()
    np.save(stream, array, **options)
    return stream.getvalue()


def archive() -> bytes:
    """An npz file."""
    stream = io.BytesIO()
    np.savez(stream, bias=np.zeros(3))
    return stream.getvalue()


BIAS = saved(np.zeros(3))

BAD: dict[str, tuple[RecordDict | Error, str, str]] = {
    "NaN": (content(changed(bias=np.array([0, np.nan, 0]))), "values", "'bias' holds nan at flat index 1"),
    "Inf": (content(changed(scale=np.float16(-np.inf))), "values", "'scale' holds -inf at flat index 0"),
    "a shape that would be broadcast": (content(changed(bias=np.zeros(1))), "shape", "'bias' has shape (1,)"),
    "no shape": (content(changed(bias=np.array(0.0))), "shape", "'bias' has shape ()"),
    "another shape": (content(changed(weight=np.zeros((3, 4), np.float32))), "shape", "the model has (4, 3)"),
    "a missing array": (content(changed(bias=None)), "keys", "missing 'bias'"),
    "an extra array": (content(changed(extra=np.zeros(1))), "keys", "not in the model: 'extra'"),
    "float64 for float32": (content(changed(weight=np.zeros((4, 3)))), "dtype", "float64, the model has float32"),
    "int64 for float32": (content(changed(weight=np.zeros((4, 3), int))), "dtype", "int64, the model has float32"),
    "complex": (content(changed(bias=np.zeros(3, complex))), "format", "'bias': dtype '<c16' is not one of"),
    "text": (content(changed(bias=np.array(["a", "b", "c"]))), "format", "'bias': dtype '<U1'"),
    "big-endian": (content(changed(bias=np.zeros(3, ">f8"))), "format", "'bias': dtype '>f8'"),
    "a structure": (content(changed(bias=np.zeros(3, "f4,f4"))), "format", "'bias': unreadable"),
    "no bytes": (raw(b""), "format", "'bias': not a .npy stream"),
    "truncated": (raw(BIAS[:-1]), "format", "'bias': shape (3,) of float64 is 24 bytes, 23 came"),
    "too long": (raw(BIAS + b"x"), "format", "24 bytes, 25 came"),
    "an archive": (raw(archive()), "format", "'bias': not a .npy stream"),
    "a pickle": (raw(saved(np.array([1, None]), allow_pickle=True)), "format", "'bias': dtype '|O'"),
    "256 GiB": (
        raw(BIAS.replace(b"(3,), }" + b" " * 10, b"(34359738368,), }")),
        "format",
        "is 274877906944 bytes, 24 came",
    ),
    "another serialisation": (raw(BIAS, "torch.save"), "format", "'bias' is 'torch.save'"),
    "weight NaN": (content(MODEL, float("nan")), "weight", "the weight is nan"),
    "weight Inf": (content(MODEL, float("inf")), "weight", "the weight is inf"),
    "weight 0": (content(MODEL, 0), "weight", "the weight is 0.0"),
    "weight 1e300": (content(MODEL, 1e300), "weight", "the weight is 1e+300"),
    "negative weight": (content(MODEL, -3), "weight", "the weight is -3.0"),
    "weights": (content(MODEL, [1, 2]), "weight", "the weight is a list"),
    "no weight": (content(MODEL, None, loss=1.0), "weight", "no 'num-examples' among the metrics ['loss']"),
    "two ArrayRecords": (RecordDict({"a": record(MODEL), **content(MODEL)}), "format", "2 ArrayRecords"),
    "no ArrayRecord": (RecordDict({"metrics": MetricRecord({"num-examples": 1})}), "format", "0 ArrayRecords"),
    "two MetricRecords": (RecordDict({"m": MetricRecord(), **content(MODEL)}), "format", "2 MetricRecords"),
    "no MetricRecord": (RecordDict({"arrays": record(MODEL)}), "format", "0 MetricRecords"),
    "nothing": (RecordDict(), "format", "0 ArrayRecords"),
    "an error": (Error(0, "the GPU is gone"), "error", "the GPU is gone"),
}


class LooksAt(FedAvg):
    """A user's class that may look into replies, so that they stay as they came until it has."""

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
        """Flower's."""
        return super().aggregate_train(server_round, replies)


@pytest.mark.parametrize("cls", [FedAvg, LooksAt])
@pytest.mark.parametrize("case", BAD)
def test_a_bad_reply_is_refused_by_name_and_the_others_count(
    node: lifl.Node, clock: Clock, caplog: pytest.LogCaptureFixture, cls: type[FedAvg], case: str
) -> None:
    """The report and the log name node, rule and what it sent; the run is that of the others, bit by bit."""
    said, rule, reason = BAD[case]
    expected, _ = run(FlowerFedAvg(min_available_nodes=3), GOOD)
    with caplog.at_level(logging.INFO, "flwr"):
        # The first one to answer, so that it does not decide what a good reply looks like.
        clients = {BAD_NODE: says(said, failing), **GOOD}
        result, _ = run(cls(node=node, order="flower"), clients, clock=clock)
    assert result.arrays.object_id == expected.arrays.object_id
    assert metrics_of(result) == metrics_of(expected)
    for report in result.reports.values():
        assert [(r.client_id, r.rule) for r in report.rejected] == [(str(BAD_NODE), rule)]
        assert reason in report.rejected[0].reason
        assert sorted(c.client_id for c in report.accepted) == ["1", "2", "3"]
        assert report.error is None
        assert not report.late
    assert f"refused: {BAD_NODE} ({rule}: " in caplog.text
    assert "aggregate_train: Received 3 results and 1 failures" in caplog.text
    assert f"Received error in reply from node {BAD_NODE}: " in caplog.text
    assert not node.has_rounds


@pytest.mark.parametrize("order", ["any", "flower"])
def test_the_model_that_was_sent_decides_not_the_many(node: lifl.Node, clock: Clock, order: str) -> None:
    """More bad clients than good ones cannot agree on another form, also where replies have smaller dtypes."""
    start = record({"x": np.zeros(2)})
    bad = {n: says(content({"x": np.zeros(1, np.float32)})) for n in (11, 12, 13)}
    good = {n: nudge(n, "float32") for n in (1, 2)}
    strategy = FedAvg(node=node, order=order, fraction_evaluate=0.0)
    result, _ = run(strategy, {**bad, **good}, 2, clock, initial_arrays=start)
    for report in result.reports.values():
        assert [(r.client_id, r.rule) for r in report.rejected] == [("11", "shape"), ("12", "shape"), ("13", "shape")]
    expected, _ = run(FlowerFedAvg(fraction_evaluate=0.0), good, 2, initial_arrays=start)
    np.testing.assert_allclose(plain(result.arrays)["x"], plain(expected.arrays)["x"], rtol=1e-6)
    assert order == "any" or result.arrays.object_id == expected.arrays.object_id


def test_everything_bad_at_once(node: lifl.Node, clock: Clock) -> None:
    """Thirty bad clients and three good ones make the model of the good ones, in any order of summation."""
    bad = {1000 + i: says(said, failing) for i, (said, _, _) in enumerate(BAD.values())}
    expected, _ = run(FedAvg(node=node), GOOD, clock=clock)
    result, _ = run(FedAvg(node=node), {**bad, **GOOD}, clock=clock)
    rules = {r.client_id: r.rule for r in result.reports[2].rejected}
    assert rules == {str(1000 + i): rule for i, (_, rule, _) in enumerate(BAD.values())}
    for name, array in plain(result.arrays).items():
        np.testing.assert_allclose(array, plain(expected.arrays)[name], rtol=1e-5)


READABLE = [case for case, (said, rule, _) in BAD.items() if rule in ("values", "dtype", "format") and len(said) == 2]


@pytest.mark.parametrize("case", [case for case in READABLE if case != "no MetricRecord"])
def test_a_bad_reply_in_a_list(node: lifl.Node, case: str) -> None:
    """Called by itself, aggregate_train refuses what Flower would have folded into the model or choked on."""
    said = BAD[case][0]
    assert isinstance(said, RecordDict)
    replies = replies_of([MODEL, MODEL, MODEL], [1, 2, 3])
    replies[0].content = said
    strategy = FedAvg(node=node)
    arrays, _ = strategy.aggregate_train(1, replies)
    assert [r.rule for r in strategy.reports[1].rejected] == [BAD[case][1]]
    np.testing.assert_array_equal(plain(arrays)["weight"], MODEL["weight"])


@pytest.mark.parametrize("cls", [FedAvg, LooksAt])
def test_a_sum_beyond_float64_ends_the_round_not_the_run(node: lifl.Node, clock: Clock, cls: type[FedAvg]) -> None:
    """A finite weight times a finite value may be too large: that round has no model, and the next one has."""
    huge = content(changed(bias=np.array([1e300, 0, 0])), 1e30)

    def greedy(message: Message) -> RecordDict:
        return huge if message.content["config"]["server-round"] == 1 else nudge(3)(message)

    result, _ = run(cls(node=node, fraction_evaluate=0.0), {1: nudge(1), 2: greedy}, clock=clock)
    assert "left the range of float64" in str(result.reports[1].error)
    assert result.reports[2].error is None
    assert len(result.reports[2].accepted) == 2


def test_metrics_that_cannot_be_averaged_do_not_end_the_run(
    node: lifl.Node, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    """Metrics of another form than most are left out, with a warning; the arrays beside them count."""
    odd = {4: nudge(4, extra=1.0), 5: nudge(5, parts=[1.0]), 6: nudge(6, parts=0.5)}
    clients = {**GOOD, 7: nudge(7), **odd}
    with caplog.at_level(logging.WARNING, "flwr"):
        result, _ = run(FedAvg(node=node, fraction_evaluate=0.0), clients, 1, clock)
    assert len(result.reports[1].accepted) == 7
    assert "metrics of 3 replies have another form" in caplog.text
    expected, _ = run(FlowerFedAvg(fraction_evaluate=0.0), {**GOOD, 7: nudge(7)}, 1)
    assert metrics_of(result) == metrics_of(expected)


def test_fortran_order_and_odd_addresses(node: lifl.Node, clock: Clock) -> None:
    """The order of the numbers in a reply's bytes, transposed or unaligned, makes no difference."""

    def client(message: Message) -> RecordDict:
        said = nudge(5)(message)
        arrays = plain(said["arrays"])
        new = record({**arrays, "weight": np.asfortranarray(arrays["weight"])})
        data = new["bias"].data
        length = int.from_bytes(data[8:10], "little") - 3
        moved = data[:8] + length.to_bytes(2, "little") + data[10 : 10 + length - 1] + b"\n" + data[-24:]
        new["bias"] = Array(dtype="float64", shape=(3,), stype="numpy.ndarray", data=moved)
        return content(new, 5, loss=5 / 7, parts=[5 / 3, 1.0])

    clients = {1: nudge(1), 5: client}
    result, _ = run(FedAvg(node=node, order="flower", fraction_evaluate=0.0), clients, clock=clock)
    expected, _ = run(FlowerFedAvg(fraction_evaluate=0.0), clients)
    assert len(result.reports[1].accepted) == 2
    assert result.arrays.object_id == expected.arrays.object_id


def test_two_messages_to_one_node(node: lifl.Node, clock: Clock) -> None:
    """A configure_train that asks a node twice gets two updates of it, as in Flower."""

    def twice(base: Any) -> Any:
        class Twice(base):  # type: ignore[misc]
            def configure_train(self, *args: Any) -> Iterable[Message]:
                return [*super().configure_train(*args), *super().configure_train(*args)]

        return Twice

    result, _ = run(twice(FedAvg)(node=node, order="flower"), GOOD, clock=clock)
    expected, _ = run(twice(FlowerFedAvg)(), GOOD)
    assert result.arrays.object_id == expected.arrays.object_id
    assert sorted(c.client_id for c in result.reports[1].accepted) == ["1", "1#2", "2", "2#2", "3", "3#2"]
    assert result.reports[1].expected == 6


# ---------------------------------------------------------------- what stays in memory


class Watching(ScriptedGrid):
    """Notes the arrays of every reply as it hands it over, and how many of them are alive at each pull."""

    alive: list[int]
    arrays: list[weakref.ref[Any]]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The replies; the grid itself holds none of them."""
        self.__dict__.setdefault("arrays", [])
        self.__dict__.setdefault("alive", [])
        gc.collect()
        self.alive.append(self.num_alive)
        came = super().pull_messages(message_ids)
        self.pulled.clear()
        for message in came:
            if message.has_content() and message.content.array_records:
                self.arrays += [weakref.ref(a) for a in message.content["arrays"].values()]  # type: ignore[union-attr]
        return came

    @property
    def num_alive(self) -> int:
        """Arrays of replies that somebody holds."""
        return sum(array() is not None for array in self.arrays)


def watched(strategy: Any, clock: Clock, **options: Any) -> tuple[Any, Watching]:
    """A round of twenty clients under watch, pulled four at a time."""
    grid = Watching({i: nudge(i) for i in range(1, 21)}, clock, **options)
    return strategy.start(grid, record(MODEL), 1), grid


@pytest.mark.usefixtures("four_at_once")
def test_arrays_that_nobody_looks_at_are_dropped_as_they_land(node: lifl.Node, clock: Clock) -> None:
    """Whenever more replies are pulled, those that came before have no arrays any more."""
    result, grid = watched(FedAvg(node=node), clock)
    assert len(grid.arrays) == 20 * len(MODEL)
    assert set(grid.alive) == {0}
    assert len(result.reports[1].accepted) == 20


@pytest.mark.usefixtures("four_at_once")
def test_refused_replies_are_dropped_too(node: lifl.Node, clock: Clock) -> None:
    """Bad clients cannot fill the server's memory with what is refused."""
    grid = Watching({i: lambda _: content(changed(bias=np.full(3, np.nan))) for i in range(1, 21)}, clock)
    FedAvg(node=node, fraction_evaluate=0.0, stop_if_all_refused=False).start(grid, record(MODEL), 1)
    assert len(grid.arrays) == 20 * len(MODEL)
    assert set(grid.alive) == {0}


@pytest.mark.usefixtures("four_at_once")
def test_arrays_that_somebody_looks_at_are_kept_until_then(node: lifl.Node, clock: Clock) -> None:
    """A subclass with its own aggregate_train sees every array; after the round they are gone."""
    sums: list[float] = []

    class Sums(FedAvg):
        def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
            sums.extend(float(plain(r.content["arrays"])["weight"].sum()) for r in replies)  # type: ignore[arg-type]
            return super().aggregate_train(server_round, replies)

    _, grid = watched(Sums(node=node, fraction_evaluate=0.0), clock)
    assert len(set(sums)) == 20
    assert grid.alive == [4 * len(MODEL) * i for i in range(5)]
    gc.collect()
    assert grid.num_alive == 0


@pytest.fixture
def four_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pulls of four."""
    from lifl.strategy import exchange

    monkeypatch.setattr(exchange, "PULL_BYTES", 1)


def test_dropping_arrays_leaves_the_clients_objects_alone(node: lifl.Node, clock: Clock) -> None:
    """A grid in one process may hand over the very model that was sent: it must not lose its arrays."""
    echoed: list[ArrayRecord] = []

    def echo(message: Message) -> RecordDict:
        if message.metadata.message_type == "evaluate":
            return nudge(1)(message)
        echoed.append(message.content["arrays"])  # type: ignore[arg-type]
        message.content["metrics"] = MetricRecord({"num-examples": 1})
        return message.content

    start = record(MODEL)
    before = start.object_id
    result, _ = run(FedAvg(node=node), {1: echo, 2: echo}, 2, clock, initial_arrays=start)
    assert start.object_id == before == result.arrays.object_id
    assert all(arrays.object_id == before for arrays in echoed)


def test_a_models_dtype_that_lifl_cannot_fold_is_named_before_anybody_is_asked(node: lifl.Node, clock: Clock) -> None:
    """A model that lifl cannot aggregate is an error of the run's own, at once."""
    grid = ScriptedGrid(GOOD, clock)
    with pytest.raises(ValueError, match="dtype '<c16' is not one of"):
        FedAvg(node=node).start(grid, record({"x": np.zeros(2, complex)}), 1)
    assert not grid.asked
    assert not node.has_rounds
