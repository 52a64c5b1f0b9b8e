"""A user's subclass of Flower's FedAvg works as before when only its import has changed.

Each class here is written once, over a base that is given, and run over Flower's FedAvg and over lifl's.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg as FlowerFedAvg
from flwr.serverapp.strategy.strategy_utils import aggregate_metricrecords
from scripted import (
    MODEL,
    Client,
    Clock,
    content,
    failing,
    metrics_of,
    nudge,
    plain,
    record,
    replies_of,
    run,
    says,
    silent,
)

import lifl
from lifl.strategy import FedAvg

CLIENTS: dict[int, Client] = {5: nudge(5), 2: nudge(2), 3: nudge(3), 4: nudge(4), 9: failing, 10: silent}
Base = Any
Replies = Iterable[Message]


def calls_super(base: Base) -> Any:
    """Passes everything on."""

    class Strategy(base):  # type: ignore[misc]
        def aggregate_train(self, server_round: int, replies: Replies) -> Any:
            return super().aggregate_train(server_round, replies)

    return Strategy()


def passes_an_iterator(base: Base) -> Any:
    """Passes the replies that are no errors on, as an iterator."""

    class Strategy(base):  # type: ignore[misc]
        def aggregate_train(self, server_round: int, replies: Replies) -> Any:
            return super().aggregate_train(server_round, (r for r in list(replies) if not r.has_error()))

    return Strategy()


def filters(base: Base) -> Any:
    """Leaves a node out by what it reports."""

    class Strategy(base):  # type: ignore[misc]
        def aggregate_train(self, server_round: int, replies: Replies) -> Any:
            good = [r for r in replies if not r.has_error() and r.content["metrics"]["loss"] < 0.7]
            assert len(good) == 3
            return super().aggregate_train(server_round, good)

    return Strategy()


def drops_all(base: Base) -> Any:
    """Wants none of them."""

    class Strategy(base):  # type: ignore[misc]
        def aggregate_train(self, server_round: int, _: Replies) -> Any:
            return super().aggregate_train(server_round, [])

    return Strategy()


def sorts(base: Base) -> Any:
    """Brings the replies into an order of its own, on which the last bits depend."""

    class Strategy(base):  # type: ignore[misc]
        def aggregate_train(self, server_round: int, replies: Replies) -> Any:
            return super().aggregate_train(server_round, sorted(replies, key=lambda r: r.metadata.src_node_id))

    return Strategy()


def repeats(base: Base) -> Any:
    """Counts the first reply three times."""

    class Strategy(base):  # type: ignore[misc]
        def aggregate_train(self, server_round: int, replies: Replies) -> Any:
            replies = list(replies)
            return super().aggregate_train(server_round, [replies[0], replies[0], *replies])

    return Strategy()


def replaces_arrays(base: Base) -> Any:
    """Clips every update, with a new ArrayRecord, as Flower's differential privacy does."""

    class Strategy(base):  # type: ignore[misc]
        def aggregate_train(self, server_round: int, replies: Replies) -> Any:
            replies = list(replies)
            for reply in replies:
                if not reply.has_error():
                    arrays = plain(reply.content["arrays"])
                    reply.content["arrays"] = record({k: np.clip(v, -1, 1) for k, v in arrays.items()})
            return super().aggregate_train(server_round, replies)

    return Strategy()


def changes_one_array(base: Base) -> Any:
    """Writes into the ArrayRecord of one reply."""

    class Strategy(base):  # type: ignore[misc]
        def aggregate_train(self, server_round: int, replies: Replies) -> Any:
            replies = list(replies)
            arrays = replies[1].content["arrays"]
            arrays["weight"] = Array(arrays["weight"].numpy() * np.float32(2))
            return super().aggregate_train(server_round, replies)

    return Strategy()


def changes_bytes(base: Base) -> Any:
    """Writes into an Array of one reply."""

    class Strategy(base):  # type: ignore[misc]
        def aggregate_train(self, server_round: int, replies: Replies) -> Any:
            replies = list(replies)
            array = replies[1].content["arrays"]["weight"]
            array.data = Array(array.numpy() * np.float32(3)).data
            return super().aggregate_train(server_round, replies)

    return Strategy()


def changes_dtypes(base: Base) -> Any:
    """Computes in float64, whatever the clients send."""

    class Strategy(base):  # type: ignore[misc]
        def aggregate_train(self, server_round: int, replies: Replies) -> Any:
            replies = list(replies)
            for reply in replies:
                if not reply.has_error():
                    arrays = plain(reply.content["arrays"])
                    reply.content["arrays"] = record({k: v.astype(np.float64) for k, v in arrays.items()})
            return super().aggregate_train(server_round, replies)

    return Strategy()


def changes_weights(base: Base) -> Any:
    """Lets every update count the same."""

    class Strategy(base):  # type: ignore[misc]
        def aggregate_train(self, server_round: int, replies: Replies) -> Any:
            replies = list(replies)
            for reply in replies:
                if not reply.has_error():
                    reply.content["metrics"]["num-examples"] = 1
            return super().aggregate_train(server_round, replies)

    return Strategy()


def adds_a_metric(base: Base) -> Any:
    """Leaves the arrays as they are and adds to the metrics."""

    class Strategy(base):  # type: ignore[misc]
        def aggregate_train(self, server_round: int, replies: Replies) -> Any:
            replies = list(replies)
            for reply in replies:
                if not reply.has_error():
                    reply.content["metrics"]["node"] = float(reply.metadata.src_node_id)
            return super().aggregate_train(server_round, replies)

    return Strategy()


def looks_into_arrays(base: Base) -> Any:
    """Computes something from the arrays and hands the replies on untouched."""

    class Strategy(base):  # type: ignore[misc]
        def aggregate_train(self, server_round: int, replies: Replies) -> Any:
            norms = [float(abs(plain(r.content["arrays"])["weight"]).sum()) for r in replies if not r.has_error()]
            arrays, metrics = super().aggregate_train(server_round, replies)
            metrics["norms"] = sorted(norms)
            return arrays, metrics

    return Strategy()


def looks_into_arrays_afterwards(base: Base) -> Any:
    """Computes something from the arrays after Flower has aggregated them."""

    class Strategy(base):  # type: ignore[misc]
        def aggregate_train(self, server_round: int, replies: Replies) -> Any:
            arrays, metrics = super().aggregate_train(server_round, replies)
            far = [
                abs(plain(r.content["arrays"])["weight"] - plain(arrays)["weight"]).sum()
                for r in replies
                if not r.has_error()
            ]
            metrics["distances"] = sorted(float(f) for f in far)
            return arrays, metrics

    return Strategy()


def aggregates_itself(base: Base) -> Any:
    """Takes the median and does not call Flower's method at all."""

    class Strategy(base):  # type: ignore[misc]
        def aggregate_train(self, server_round: int, replies: Replies) -> Any:
            updates = [plain(r.content["arrays"]) for r in replies if not r.has_error()]
            median = {k: np.asarray(np.median([u[k] for u in updates], axis=0)) for k in updates[0]}
            return record(median), MetricRecord({"updates": len(updates)})

    return Strategy()


def calls_super_twice(base: Base) -> Any:
    """Aggregates two halves and takes the mean of the means."""

    class Strategy(base):  # type: ignore[misc]
        def aggregate_train(self, server_round: int, replies: Replies) -> Any:
            good = [r for r in replies if not r.has_error()]
            one, _ = super().aggregate_train(server_round, good[:2])
            two, metrics = super().aggregate_train(server_round, good[2:])
            mean = {k: np.asarray((v + plain(two)[k]) / 2) for k, v in plain(one).items()}
            return record(mean), metrics

    return Strategy()


def works_on_the_mean(base: Base) -> Any:
    """Changes what Flower's method returned, in place."""

    class Strategy(base):  # type: ignore[misc]
        def aggregate_train(self, server_round: int, replies: Replies) -> Any:
            arrays, metrics = super().aggregate_train(server_round, replies)
            for name, array in plain(arrays).items():
                array += 1
                arrays[name] = Array(array)
            return arrays, metrics

    return Strategy()


def keeps_the_replies(base: Base) -> Any:
    """Uses the replies of the last round in this one."""

    class Strategy(base):  # type: ignore[misc]
        last: Any = ()

        def aggregate_train(self, server_round: int, replies: Replies) -> Any:
            replies = [r for r in replies if not r.has_error()]
            before, self.last = self.last, replies
            return super().aggregate_train(server_round, [*before, *replies])

    return Strategy()


def decodes(base: Base) -> Any:
    """Clients send a form of their own, which only this class can read."""

    class Strategy(base):  # type: ignore[misc]
        def configure_train(self, server_round: int, arrays: Any, config: Any, grid: Grid) -> Iterable[Message]:
            self.sent = plain(arrays)
            config["send"] = "bytes"
            return super().configure_train(server_round, arrays, config, grid)

        def aggregate_train(self, server_round: int, replies: Replies) -> Any:
            replies = list(replies)
            for reply in replies:
                if not reply.has_error():
                    sent = plain(reply.content["arrays"])
                    assert sent["weight"].dtype == np.uint16
                    new = {k: np.asarray(sent[k].astype(np.float32) / 1000, v.dtype) for k, v in self.sent.items()}
                    reply.content["arrays"] = record(new)
            return super().aggregate_train(server_round, replies)

    return Strategy()


def coder(client: Client) -> Client:
    """The client, which sends 16-bit numbers if it is asked to."""

    def code(message: Message) -> Any:
        said = client(message)
        if message.metadata.message_type == "train" and message.content["config"].get("send") == "bytes":
            arrays = plain(said["arrays"])  # type: ignore[index]
            said["arrays"] = record({k: np.asarray(abs(v) * 1000 + 1, np.uint16) for k, v in arrays.items()})  # type: ignore[index]
        return said

    return code


def configures(base: Base) -> Any:
    """Sends a growing step and asks only some nodes."""

    class Strategy(base):  # type: ignore[misc]
        def configure_train(self, server_round: int, arrays: Any, config: Any, grid: Grid) -> Iterable[Message]:
            config["step"] = 0.1 * server_round
            messages = list(super().configure_train(server_round, arrays, config, grid))
            return messages[: 1 + server_round]

    return Strategy()


def sends_to_each_its_own(base: Base) -> Any:
    """Makes every message itself, with a content of its own."""

    class Strategy(base):  # type: ignore[misc]
        def configure_train(self, server_round: int, arrays: Any, config: Any, grid: Grid) -> Iterable[Message]:
            for node in grid.get_node_ids():
                own = {"arrays": arrays, "config": ConfigRecord({"server-round": server_round + node})}
                yield Message(RecordDict(own), node, MessageType.TRAIN)  # type: ignore[arg-type]

    return Strategy()


def checks_replies(base: Base) -> Any:
    """Has its own idea of a good reply."""

    class Strategy(base):  # type: ignore[misc]
        def _check_and_log_replies(self, replies: Replies, is_train: bool, validate: bool = True) -> Any:
            valid, errors = super()._check_and_log_replies(replies, is_train, validate)
            assert all(len(array.data) for r in valid if is_train for array in r.content["arrays"].values())
            return valid, errors

    return Strategy()


def evaluates(base: Base) -> Any:
    """Overrides the other two hooks."""

    class Strategy(base):  # type: ignore[misc]
        def configure_evaluate(self, server_round: int, arrays: Any, config: Any, grid: Grid) -> Iterable[Message]:
            return list(super().configure_evaluate(server_round, arrays, config, grid))[:3] if server_round == 2 else []

        def aggregate_evaluate(self, server_round: int, replies: Replies) -> Any:
            metrics = super().aggregate_evaluate(server_round, replies)
            if metrics is not None:
                metrics["replies"] = len(list(replies))
            return metrics

    return Strategy()


def metrics_functions(base: Base) -> Any:
    """Functions for metrics that look at everything in a reply, the arrays too."""

    def train(contents: list[RecordDict], key: str) -> MetricRecord:
        norms = [float(abs(plain(c["arrays"])["weight"]).sum()) for c in contents]  # type: ignore[arg-type]
        return MetricRecord({"norms": sorted(norms), "weights": [c["metrics"][key] for c in contents]})  # type: ignore[dict-item]

    return base(
        train_metrics_aggr_fn=train, evaluate_metrics_aggr_fn=lambda contents, _: MetricRecord({"n": len(contents)})
    )


def patched(base: Base) -> Any:
    """No subclass at all: a method of the one strategy is replaced."""
    strategy = base()
    original = strategy.aggregate_train

    def aggregate_train(self: Any, server_round: int, replies: Replies) -> Any:
        total = sum(float(plain(r.content["arrays"])["weight"].sum()) for r in replies if not r.has_error())
        arrays, metrics = original(server_round, replies)
        metrics["total"] = total
        return arrays, metrics

    strategy.aggregate_train = types.MethodType(aggregate_train, strategy)
    return strategy


def own_arguments(base: Base) -> Any:
    """Adds arguments of its own before Flower's."""

    class Strategy(base):  # type: ignore[misc]
        def __init__(self, factor: float, *, note: str = "", **flowers: Any) -> None:
            super().__init__(**flowers)
            self.factor, self.note = factor, note

        def aggregate_train(self, server_round: int, replies: Replies) -> Any:
            arrays, metrics = super().aggregate_train(server_round, replies)
            return record({k: np.asarray(v * self.factor, v.dtype) for k, v in plain(arrays).items()}), metrics

    return Strategy(0.5, note="x", fraction_evaluate=0.5)


def own_start(base: Base) -> Any:
    """Wraps the run."""

    class Strategy(base):  # type: ignore[misc]
        def start(self, *args: Any, **kwargs: Any) -> Any:
            result = super().start(*args, **kwargs)
            result.arrays = ArrayRecord(dict(reversed(result.arrays.items())))
            return result

        def summary(self) -> None:
            """Says nothing."""

    return Strategy()


def mixed_in(base: Base) -> Any:
    """Gets its hook from a class that knows nothing of Flower."""

    class Counting:
        rounds = 0

        def aggregate_train(self, server_round: int, replies: Replies) -> Any:
            self.rounds += 1
            return super().aggregate_train(server_round, replies)  # type: ignore[misc]

    class Strategy(Counting, base):  # type: ignore[misc]
        pass

    return Strategy()


BODIES: list[Callable[[Base], Any]] = [
    calls_super,
    passes_an_iterator,
    filters,
    drops_all,
    sorts,
    repeats,
    replaces_arrays,
    changes_one_array,
    changes_bytes,
    changes_dtypes,
    changes_weights,
    adds_a_metric,
    looks_into_arrays,
    looks_into_arrays_afterwards,
    aggregates_itself,
    calls_super_twice,
    works_on_the_mean,
    keeps_the_replies,
    decodes,
    configures,
    sends_to_each_its_own,
    checks_replies,
    evaluates,
    metrics_functions,
    patched,
    own_arguments,
    own_start,
    mixed_in,
]


def over(base: type[Any], **options: Any) -> type[Any]:
    """The base as a user imports it, with some of lifl's options set so that results can be compared."""

    class Configured(base):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **options, **kwargs)

    Configured.__module__ = base.__module__
    return Configured


@pytest.mark.parametrize("body", BODIES, ids=lambda body: body.__name__)
def test_the_same_class_gives_the_same_run(node: lifl.Node, clock: Clock, body: Callable[[Base], Any]) -> None:
    """Model and metrics are Flower's, bit by bit, whatever the class does with its hooks."""
    clients = {n: coder(c) for n, c in CLIENTS.items()}
    # Flower makes float64 of the model's counter, so that last round's replies and this one's differ in dtype.
    start = record({k: v for k, v in MODEL.items() if v.dtype.kind == "f" or body is not keeps_the_replies})
    flowers, _ = run(body(FlowerFedAvg), clients, 3, timeout=20, initial_arrays=start)
    ours = body(over(FedAvg, node=node, order="flower"))
    result, _ = run(ours, clients, 3, clock, timeout=20, initial_arrays=start)
    assert metrics_of(result) == metrics_of(flowers)
    # Flower's Result is empty if no round has a result, and lifl's has the initial model.
    assert result.arrays.object_id == flowers.arrays.object_id or not flowers.arrays
    assert not node.has_rounds


@pytest.mark.parametrize("body", BODIES, ids=lambda body: body.__name__)
def test_the_same_class_gives_nearly_the_same_run_in_any_order(
    node: lifl.Node, clock: Clock, body: Callable[[Base], Any]
) -> None:
    """So they are without order="flower", to the precision of the model's dtypes."""
    clients = {n: coder(c) for n, c in CLIENTS.items()}
    start = record({"weight": np.ones((4, 3), np.float32), "bias": np.zeros(3)})
    flowers, _ = run(body(FlowerFedAvg), clients, 1, timeout=20, initial_arrays=start)
    result, _ = run(body(over(FedAvg, node=node)), clients, 1, clock, timeout=20, initial_arrays=start)
    # The metrics are summed in the order of the replies, which is Flower's here.
    assert metrics_of(result) == metrics_of(flowers) or body is looks_into_arrays_afterwards
    for name, array in plain(flowers.arrays).items():
        np.testing.assert_allclose(plain(result.arrays)[name], array, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------- and lifl's own promises, with such a class


def subclass(body: Callable[[Base], Any], **options: Any) -> Any:
    """A class from above over lifl's FedAvg."""
    return body(over(FedAvg, **options))


@pytest.mark.parametrize("body", [calls_super, replaces_arrays, filters, sorts], ids=lambda body: body.__name__)
def test_a_quorum_is_of_the_nodes_that_were_asked(node: lifl.Node, clock: Clock, body: Callable[[Base], Any]) -> None:
    """Handing on changed or fewer replies does not make the quorum smaller, nor forget who failed or is late."""
    result, _ = run(subclass(body, node=node, quorum=0.9), CLIENTS, 1, clock, timeout=20)
    report = result.reports[1]
    counted = 3 if body is filters else 4
    assert report.error == f"{counted} of 6 updates were accepted, the quorum is 6"
    assert report.expected == 6
    assert [(r.client_id, r.rule) for r in report.rejected] == [("9", "error")]
    assert report.late == ("10",)


def test_refusing_all_is_reported(node: lifl.Node, clock: Clock) -> None:
    """A class that hands on nothing has a round without a result, in the report too."""
    result, _ = run(subclass(drops_all, node=node), CLIENTS, 1, clock, timeout=20)
    assert result.reports[1].error == "0 of 6 updates were accepted, the quorum is 1"
    assert result.reports[1].late == ("10",)


@pytest.mark.parametrize("body", [calls_super, replaces_arrays, sorts, mixed_in], ids=lambda body: body.__name__)
def test_bad_replies_do_not_end_the_run(node: lifl.Node, clock: Clock, body: Callable[[Base], Any]) -> None:
    """The class sees bad replies as Flower's would; what it hands on of them is refused by name."""
    bad = {
        20: says(content({"weight": np.zeros(1, np.float32)})),
        21: says(content({name: np.full_like(a, np.nan) if a.dtype.kind == "f" else a for name, a in MODEL.items()})),
        22: says(RecordDict({"arrays": record(MODEL), "metrics": MetricRecord({"num-examples": -1})})),
    }
    clients = {**bad, **CLIENTS}
    strategy = subclass(body, node=node, order="flower", fraction_evaluate=0.0)
    result, _ = run(strategy, clients, 2, clock, timeout=20)
    for report in result.reports.values():
        rules = {r.client_id: r.rule for r in report.rejected}
        assert rules == {"9": "error", "20": "keys", "21": "values", "22": "weight"}
        assert sorted(c.client_id for c in report.accepted) == ["2", "3", "4", "5"]
    good, _ = run(body(over(FlowerFedAvg, fraction_evaluate=0.0)), CLIENTS, 2, timeout=20)
    assert result.arrays.object_id == good.arrays.object_id


def test_replies_handed_on_untouched_are_not_folded_again(
    node: lifl.Node, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A class that only looks costs no second aggregation; one that changes something does."""
    opened: list[int] = []
    open_round = node.open_round
    monkeypatch.setattr(node, "open_round", lambda *args, **options: opened.append(1) or open_round(*args, **options))
    for body, rounds in ((looks_into_arrays, 1), (adds_a_metric, 1), (sorts, 1), (filters, 2), (changes_bytes, 2)):
        opened.clear()
        run(subclass(body, node=node), CLIENTS, 1, clock, timeout=20)
        assert len(opened) == rounds, body.__name__


def test_a_class_that_never_calls_super_leaves_no_round_open(node: lifl.Node, clock: Clock) -> None:
    """Memory of replies that landed for nothing is given back."""
    free = node.arena.free_bytes
    result, _ = run(subclass(aggregates_itself, node=node), CLIENTS, 2, clock, timeout=20)
    assert result.reports == {}
    assert node.arena.free_bytes == free


def test_signatures_of_subclasses() -> None:
    """Help and tools show a class's own arguments, or those that it inherits, whatever its bases are."""

    class Inherits(FedAvg):
        pass

    class Own(FedAvg):
        def __init__(self, factor: float, **flowers: Any) -> None:
            super().__init__(**flowers)
            self.factor = factor

    class InheritsOwn(Own):
        pass

    assert inspect.signature(Inherits) == inspect.signature(FedAvg)
    assert list(inspect.signature(Own).parameters) == ["factor", "flowers"]
    assert inspect.signature(InheritsOwn) == inspect.signature(Own)
    assert InheritsOwn(2.0, quorum=3).quorum == 3


def test_calling_the_hooks_by_hand(node: lifl.Node) -> None:
    """A user's own loop may call configure and aggregate itself, without start."""
    strategy = subclass(looks_into_arrays, node=node, order="flower")
    flowers = looks_into_arrays(FlowerFedAvg)
    updates = [{"weight": np.float32([1, 2])}, {"weight": np.float32([5, 7])}]
    ours = strategy.aggregate_train(1, replies_of(updates, [1, 2], loss=0.5))
    theirs = flowers.aggregate_train(1, replies_of(updates, [1, 2], loss=0.5))
    assert ours[0].object_id == theirs[0].object_id
    assert ours[1] == theirs[1]
    assert aggregate_metricrecords is strategy.train_metrics_aggr_fn
