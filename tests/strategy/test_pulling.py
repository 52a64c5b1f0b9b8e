"""Whatever a reply on a SuperLink is made of, it costs that reply and no other: honest ones count, the run goes on."""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import random
import tracemalloc
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
from flower_objects import array, weight
from flower_objects import record as array_record
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common.constant import ErrorCode
from flwr.proto.message_pb2 import ObjectTree
from flwr.proto.recorddict_pb2 import MetricRecord as MetricRecordProto
from flwr.superlink.grid.http_grid import HttpGrid
from linked import (
    NOT_YET,
    Answer,
    Client,
    FlowerObject,
    Link,
    announced,
    honest,
    message_of,
    metadata_of,
    metrics,
    reply,
    says,
    update,
)
from scripted import Clock, record

import lifl
from lifl.strategy import FedAvg, exchange, pulling
from lifl.strategy.exchange import as_it_is

MODEL = {"w": np.zeros((8, 4), np.float32), "b": np.zeros(3)}
ONES = {"w": np.full((8, 4), 1, np.float32), "b": np.arange(3.0)}
FIVES = {"w": np.full((8, 4), 5, np.float32), "b": np.ones(3)}
NINES = {"w": np.full((8, 4), 9, np.float32), "b": np.full(3, 9.0)}
MEAN = {"w": np.full((8, 4), 4, np.float32), "b": (np.arange(3.0) + 3) / 4}

Row = Callable[[Any], Answer]
ROWS: dict[str, Row] = {}


def row(function: Row) -> Row:
    """A kind of bad reply, named as its function is."""
    ROWS[function.__name__.replace("_", " ").strip()] = function
    return function


def of(content: FlowerObject) -> Row:
    """A reply that is what it should be, down to its content."""
    return says(content)  # type: ignore[return-value]


def body(kind: str, text: Any, *children: FlowerObject) -> FlowerObject:
    """An object with a body of JSON, or of the bytes that are given."""
    return FlowerObject(kind, children, text if isinstance(text, bytes) else json.dumps(text).encode())


def with_array(one: FlowerObject) -> FlowerObject:
    """A reply of which one array is this."""
    return update({**NINES, "w": one})


# ---------------------------------------------------------------- objects that do not fit together


@row
def a_child_that_nobody_has(asked: Any) -> Answer:
    """A record's head names an array that is in no tree and in no store."""
    message = message_of(asked, update(NINES))
    one = next(thing for thing in message.all() if thing.kind == "Array")
    answer = announced(asked, message)
    del answer.contents[one.id]
    answer.tree = ObjectTree(object_id=message.id, children=[ObjectTree(object_id=i) for i in answer.contents])
    return answer


@row
def an_announced_object_that_is_gone(asked: Any) -> Answer:
    """The tree has an object that the SuperLink has not."""
    answer = announced(asked, message_of(asked, update(NINES)))
    del answer.contents[next(iter(answer.contents))]
    return answer


@row
def a_tree_of_another_message(asked: Any) -> Answer:
    """The tree's root is not the message that is announced."""
    other = announced(asked, message_of(asked, update(NINES)))
    return Answer(metadata_of(asked, message_id="a" * 64), other.tree, other.contents)


@row
def an_empty_tree(asked: Any) -> Answer:
    """The tree has no object at all."""
    return Answer(metadata_of(asked, message_id="a" * 64), ObjectTree(), {})


ROWS |= {
    "JSON that is none": of(body("RecordDict", b"{not JSON", weight(1))),
    "JSON of another form": of(body("RecordDict", [1, 2], weight(1))),
    "JSON of numbers": of(body("RecordDict", {"a": 5}, weight(1))),
    "more after the JSON": of(body("RecordDict", json.dumps({"m": weight(1).id}).encode() + b"{}", weight(1))),
    "a name of nothing": of(body("RecordDict", {"m": "b" * 64}, weight(1))),
    "a child without a name": of(body("RecordDict", {}, weight(1))),
    "a record that is an Array": of(body("RecordDict", {"a": array(np.ones(2)).id}, array(np.ones(2)))),
    "an array that is a chunk": of(update({**NINES, "w": FlowerObject("ArrayChunk", (), b"12345")})),
    "a chunk that is a record": of(with_array(array(np.ones(2), chunks=[weight(1)]))),
    "a chunk with a child": of(
        with_array(array(np.ones(2), chunks=[FlowerObject("ArrayChunk", (weight(1),), b"1234")]))
    ),
    "an unknown kind": of(FlowerObject("Pickle", (), b"cos\nsystem\n(S'true'\ntR.")),
    "a kind with a line feed": of(FlowerObject("Record\nERROR forged", (), b"")),
    "bytes that are no text": of(body("RecordDict", b'{"\xff": "' + weight(1).id.encode() + b'"}', weight(1))),
    "an array of nested JSON": of(with_array(body("Array", b"[" * 100_000))),
    "an array of no JSON": of(with_array(body("Array", b"\0\1\2"))),
    "an array of a list": of(with_array(body("Array", []))),
    "an array without a shape": of(with_array(body("Array", {"dtype": "f", "stype": "s", "arraychunk_ids": []}))),
    "a shape of texts": of(with_array(array(np.ones(2), shape=["2"]))),
    "a shape beyond int64": of(with_array(array(np.ones(2), shape=[2**63]))),
    "a shape of 100 dimensions": of(with_array(array(np.ones(2), shape=[1] * 100))),
    "a chunk that it has not": of(with_array(array(np.ones(2), arraychunk_ids=[1]))),
    "a chunk from the end": of(with_array(array(np.ones(2), arraychunk_ids=[-1]))),
    "a chunk by a fraction": of(with_array(array(np.ones(2), arraychunk_ids=[0.0]))),
    "a dtype of a number": of(with_array(array(np.ones(2), dtype=5))),
    "metrics that are garbage": of(
        reply(arrays=array_record(NINES), metrics=FlowerObject("MetricRecord", (), b"\xff" * 50))
    ),
    "metrics that end early": of(
        reply(arrays=array_record(NINES), metrics=FlowerObject("MetricRecord", (), b"\x0a\x7f"))
    ),
    "metrics with a child": of(
        reply(arrays=array_record(NINES), metrics=FlowerObject("MetricRecord", (weight(1),), b""))
    ),
    "metrics of groups": of(reply(arrays=array_record(NINES), metrics=FlowerObject("MetricRecord", (), b"\x0b\x0c"))),
    "a long number": of(
        reply(arrays=array_record(NINES), metrics=FlowerObject("MetricRecord", (), b"\x08" + b"\x80" * 20))
    ),
}


@row
def a_chain_of_records(asked: Any) -> Answer:
    """Two thousand RecordDicts, each in the one before: deeper than Python's stack."""
    one, contents = weight(1), {weight(1).id: weight(1).content}
    for _ in range(2000):
        one = FlowerObject("RecordDict", (attrs_free(one),), json.dumps({"r": one.id}).encode())
        contents[one.id] = one.content
    message = message_of(asked, attrs_free(one))
    tree = ObjectTree(object_id=message.id, children=[ObjectTree(object_id=i) for i in contents])
    return Answer(metadata_of(asked, message_id=message.id), tree, {**contents, message.id: message.content})


class Named(FlowerObject):
    """A child of which only the id is known."""

    @property
    def id(self) -> str:
        """Given, not made of its content."""
        return self.kind


def attrs_free(one: FlowerObject) -> Named:
    """A stand-in for a thing with many below it, whose id would be made anew each time it is asked for."""
    return Named(one.id)


# ---------------------------------------------------------------- heads


@row
def a_head_without_an_end(asked: Any) -> Answer:
    """An object without the zero byte between head and body."""
    message = message_of(asked, update(NINES))
    record_id = next(thing.id for thing in message.all() if thing.kind == "ArrayRecord")
    return announced(asked, message, {record_id: b"ArrayRecord " * 1000})


@row
def a_head_of_one_word(asked: Any) -> Answer:
    """A head that does not have three parts."""
    message = message_of(asked, update(NINES))
    return announced(asked, message, {message.id: b"Message\0"})


@row
def a_head_with_a_child_twice(asked: Any) -> Answer:
    """A head that names its child a thousand times."""
    message = message_of(asked, update(NINES))
    root = message.children[0].id
    ids = ",".join([root] * 1000).encode()
    return announced(asked, message, {message.id: b"Message " + ids + b" 0\0" + message.body})


@row
def a_head_that_is_no_text(asked: Any) -> Answer:
    """A head of bytes beyond ASCII."""
    message = message_of(asked, update(NINES))
    return announced(asked, message, {message.id: b"\xff\xfe  0\0"})


# ---------------------------------------------------------------- messages


@row
def no_message(asked: Any) -> Answer:
    """The object that is announced as a message is a RecordDict."""
    return announced(asked, update(NINES))


@row
def a_chunk_for_a_message(asked: Any) -> Answer:
    """The object that is announced as a message is an ArrayChunk."""
    return announced(asked, FlowerObject("ArrayChunk", (), b"some bytes"))


@row
def a_message_of_two_contents(asked: Any) -> Answer:
    """A message may have one content."""
    return announced(asked, message_of(asked, update(NINES), reply()))


@row
def a_message_of_nothing(asked: Any) -> Answer:
    """Neither a content nor an error."""
    return announced(asked, message_of(asked))


@row
def a_message_of_metrics(asked: Any) -> Answer:
    """Its content is a record, not a RecordDict."""
    return announced(asked, message_of(asked, weight(1)))


@row
def a_message_that_is_garbage(asked: Any) -> Answer:
    """Its body is no protobuf."""
    return announced(asked, FlowerObject("Message", (update(NINES),), b"\xff\xff\xff"))


@row
def a_message_of_no_known_type(asked: Any) -> Answer:
    """Flower raises for a message type that it does not know."""
    return announced(asked, message_of(asked, update(NINES), message_type="no such type"))


@row
def a_message_with_a_long_error(asked: Any) -> Answer:
    """An error whose reason has a megabyte."""
    return announced(asked, message_of(asked, error="x" * 2**20))


def of_another(**changed: Any) -> Row:
    """A message whose own metadata are not those that were announced."""
    return lambda asked: announced(asked, message_of(asked, update(NINES), **changed))


ROWS |= {
    "a reply to another message": of_another(reply_to_message_id="c" * 64),
    "a reply to no message": of_another(reply_to_message_id=""),
    "a reply of another run": of_another(run_id=77),
    "a reply of another node": of_another(src_node_id=3),
    "a reply to another node": of_another(dst_node_id=99),
}

# ---------------------------------------------------------------- more than came

CHUNK = FlowerObject("ArrayChunk", (), bytes(2**20))
LARGE = array(np.zeros(1, np.float32), chunks=[CHUNK])


def numbers(count: int) -> FlowerObject:
    """A MetricRecord of so many small whole numbers, a byte each."""
    item = MetricRecordProto.Item(key="n")
    item.value.sint_list.vals.extend([-50] * count)
    return FlowerObject("MetricRecord", (), MetricRecordProto(items=[item]).SerializeToString())


BOMBS: dict[str, Row] = {
    "a chunk named 400 times": of(with_array(array(np.ones(1), chunks=[CHUNK], arraychunk_ids=[0] * 400))),
    "an array named 400 times": of(
        reply(arrays=body("ArrayRecord", {f"k{i}": LARGE.id for i in range(400)}, LARGE), metrics=weight(1))
    ),
    "a record named 400 times": of(
        body("RecordDict", {f"r{i}": array_record({"k": LARGE}).id for i in range(400)}, array_record({"k": LARGE}))
    ),
    "a dtype of 23 MB": of(with_array(array(np.ones(2), dtype="f" * 23_000_000))),
    "a name of 23 MB in a shape": of(with_array(array(np.ones(2), shape=["f" * 23_000_000]))),
    "an array of a million lists": of(with_array(body("Array", b"[" + b"[]," * 1_000_000 + b"[]]"))),
    "a record of a million lists": of(reply(arrays=body("ArrayRecord", b"[" + b"[]," * 1_000_000 + b"[]]"))),
    "metrics of six million numbers": of(reply(arrays=array_record(NINES), metrics=numbers(6_000_000))),
}
ROWS |= BOMBS
ROWS |= {
    "metrics of 300,000 items": of(
        reply(arrays=array_record(NINES), metrics=FlowerObject("MetricRecord", (), b"\x0a\x00" * 300_000))
    ),
}


def run(
    node: lifl.Node, bad: Client, rounds: int = 2, strategy: Any = None, link: Link | None = None
) -> tuple[Any, FedAvg, Link]:
    """A run with two honest nodes, 1 and 3, and a bad one, 2, between them."""
    link = link or Link({1: honest(ONES, 1), 2: bad, 3: honest(FIVES, 3)})
    strategy = strategy or FedAvg(node=node)
    return strategy.start(link.grid(), record(MODEL), num_rounds=rounds, timeout=5), strategy, link


def in_training(bad: Row) -> Client:
    """Bad in training, honest in evaluation."""
    return lambda asked: (bad if asked.message_type == "train" else honest(ONES, 1))(asked)


def check_mean(result: Any) -> None:
    """The model is the mean of the two honest ones, bit by bit."""
    for name, expected in MEAN.items():
        np.testing.assert_array_equal(result.arrays[name].numpy(), expected)


@pytest.mark.parametrize("kind", ROWS)
def test_a_bad_reply_costs_its_node_the_round(node: lifl.Node, clock: Clock, kind: str) -> None:
    """The honest mean is exact, the report names the bad node and why, and the run goes on to its next round."""
    result, _, link = run(node, in_training(ROWS[kind]))
    assert sorted(result.reports) == [1, 2]
    for report in result.reports.values():
        assert report.error is None
        assert [one.client_id for one in report.accepted] == ["1", "3"]
        assert [(one.client_id, one.rule) for one in report.rejected] == [("2", "error")]
        assert not report.late
        (reason,) = [one.reason for one in report.rejected]
        assert "reply" in reason
        assert reason.isascii()
        assert reason.isprintable()
        assert len(reason) <= 500
    check_mean(result)
    assert not clock.sleeps  # nobody was waited for
    assert result.evaluate_metrics_clientapp[2]["loss"] == 0.5
    assert len(link.confirmed) == 12


@pytest.mark.parametrize("kind", ["a chunk named 400 times", "metrics that are garbage", "a reply of another node"])
def test_a_bad_evaluation_costs_its_node_the_evaluation(
    node: lifl.Node, clock: Clock, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    """The mean of the metrics is that of the others, and the run goes on."""

    def bad(asked: Any) -> Answer | None:
        return (ROWS[kind] if asked.message_type == "evaluate" else honest(FIVES, 3))(asked)

    link = Link({1: honest(ONES, 1, 1.0), 2: bad, 3: honest(FIVES, 3, 2.0)})
    with caplog.at_level(logging.INFO, "flwr"):
        result, _, _ = run(node, bad, link=link)
    assert [metrics["loss"] for metrics in result.evaluate_metrics_clientapp.values()] == [1.75, 1.75]
    assert "error in reply from node 2" in caplog.text
    assert not clock.sleeps


class Asking(FedAvg):
    """Its hook asks every node something before each round."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.answers: list[list[Message]] = []

    def configure_train(self, server_round: int, arrays: Any, config: Any, grid: Any) -> Iterable[Message]:
        """Asks first."""
        queries = [Message(RecordDict({"c": ConfigRecord()}), node, "query") for node in grid.get_node_ids()]
        self.answers.append(list(grid.send_and_receive(queries, timeout=5)))
        return super().configure_train(server_round, arrays, config, grid)


@pytest.mark.parametrize("kind", ["an array named 400 times", "JSON that is none", "a reply to another message"])
def test_a_bad_answer_to_a_query_is_an_error_reply(node: lifl.Node, clock: Clock, kind: str) -> None:
    """A hook's query gets the answers of the others, and an error of the bad node's."""

    def bad(asked: Any) -> Answer | None:
        return (ROWS[kind] if asked.message_type == "query" else honest(ONES, 1))(asked)

    strategy = Asking(node=node, fraction_evaluate=0.0)
    result, _, _ = run(node, bad, strategy=strategy)
    assert len(result.reports) == len(strategy.answers) == 2
    for answers in strategy.answers:
        assert [one.metadata.src_node_id for one in answers] == [1, 2, 3]
        assert [one.has_error() for one in answers] == [False, True, False]
        assert answers[1].error.code == ErrorCode.MOD_FAILED_PRECONDITION
    assert not clock.sleeps


@pytest.mark.parametrize("kind", BOMBS)
def test_a_bomb_takes_no_more_than_came(kind: str) -> None:
    """Refusing a reply of a few bytes that would become gigabytes takes memory in proportion to the few."""
    link = Link({2: ROWS[kind]})
    messages = [Message(RecordDict({"arrays": record(MODEL)}), 2, "train")]
    ids = link.grid().push_messages(messages)
    came = sum(map(len, link.answers[next(iter(ids))].contents.values()))
    gc.collect()
    tracemalloc.start()
    try:
        (answer,) = exchange.exchange(link.grid(), messages, 5, 1000, as_it_is, pytest.fail, are_pushed=True)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert answer.has_error()
    assert peak < 4 * came + 2**25


# ---------------------------------------------------------------- replies that are as they should be


def ask(link: Link, timeout: float = 5.0, sent: RecordDict | None = None) -> tuple[list[Message], list[int]]:
    """Asks every node once: the replies, and the nodes that are missing."""
    missing: list[int] = []
    content = sent or RecordDict({"arrays": record(MODEL)})
    messages = [Message(content, node, "train") for node in link.clients]
    return exchange.exchange(link.grid(), messages, timeout, 0, as_it_is, missing.append), missing


def as_flower(link: Link) -> list[Message]:
    """The same by Flower's own method."""
    grid = link.grid()
    ids = grid.push_messages([Message(RecordDict({"arrays": record(MODEL)}), node, "train") for node in link.clients])
    return list(grid.pull_messages(ids))


def test_a_good_reply_is_what_flower_makes_of_it() -> None:
    """Content, error and metadata are those that Flower's own method gives."""
    config = ConfigRecord({"a": b"blob" * 1000, "b": ["x", "y"], "c": True, "d": [b"1", b"2"], "e": [1.5] * 100})
    numbers = MetricRecord({"n": [-1, 2, 2**62], "u": 2**64 - 1, "f": [1.5, 2.5], "x": 0.25})

    def rich(asked: Any) -> Answer:
        said = [
            FlowerObject(r.deflate().split(b" ")[0].decode(), (), r.deflate().partition(b"\0")[2])
            for r in (config, numbers)
        ]
        odd = {'a "name"\\': np.zeros((3, 0)), "\u00fc": np.arange(4), "tied": np.arange(4), "big": np.zeros(2_000_000)}
        content = reply(arrays=array_record(odd), config=said[0], metrics=said[1])
        return announced(asked, message_of(asked, content))

    clients: dict[int, Client] = {
        1: rich,
        2: lambda asked: announced(asked, message_of(asked, error="the disk is full")),
        3: lambda asked: announced(asked, message_of(asked, reply())),
    }
    ours, missing = ask(Link(clients))
    theirs = as_flower(Link(clients))
    assert not missing
    assert not ours[0].has_error()
    for one, other in zip(ours, theirs, strict=True):
        assert one.has_error() == other.has_error()
        assert one.has_error() or one.content == other.content
        for name in ("run_id", "src_node_id", "dst_node_id", "group_id", "message_type", "src_task_id", "ttl"):
            assert getattr(one.metadata, name) == getattr(other.metadata, name)
        assert len(one.metadata.message_id) == 64
    assert ours[1].error.reason == "the disk is full"


def test_what_all_came_is_never_too_large() -> None:
    """A reply of other sizes than the model's is taken if its bytes came, and so is one of the model's, in zeros."""
    large = np.random.default_rng(1).random(2_000_000)
    zeros = np.zeros(40_000_000, np.float32)
    replies, _ = ask(Link({1: says(update({"x": large})), 2: says(update({"x": large, "y": np.arange(3)}))}))
    assert not any(one.has_error() for one in replies)
    replies, _ = ask(Link({1: says(update({"x": zeros}))}), sent=RecordDict({"arrays": record({"x": zeros})}))
    assert not replies[0].has_error()
    assert replies[0].content["arrays"]["x"].numpy().nbytes == zeros.nbytes


# ---------------------------------------------------------------- replies that are on their way


def on_its_way(parts: int) -> Client:
    """A client that announces its reply and sends the last `parts` objects of it never."""

    def client(asked: Any) -> Answer:
        answer = announced(asked, message_of(asked, update(FIVES, 3)))
        for object_id in list(answer.contents)[-parts:]:
            answer.contents[object_id] = NOT_YET
        return answer

    return client


@pytest.mark.parametrize("parts", [1, 3, 8])
def test_nobody_waits_for_what_is_announced_and_not_sent(node: lifl.Node, clock: Clock, parts: int) -> None:
    """A node that never sends its reply's objects is late at the time-out; the others' replies are taken at once."""
    result, _, link = run(node, in_training(on_its_way(parts)), rounds=1)  # type: ignore[arg-type]
    (report,) = result.reports.values()
    assert [one.client_id for one in report.accepted] == ["1", "3"]
    assert report.late == ("2",)
    check_mean(result)
    assert sum(clock.sleeps) == pytest.approx(5.0)
    assert link.calls["PullObject"] < 2 * 9 * 3 + 9 + 4 * len(clock.sleeps)


def test_what_comes_later_counts(node: lifl.Node, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reply whose last objects come after it was handed over is taken then; what was there is not pulled again."""
    link = Link({1: honest(ONES, 1), 2: on_its_way(3)})
    sleep, full = clock.sleep, update(FIVES, 3)
    pulled: list[str] = []
    pull = link.PullObject

    def wait(seconds: float) -> None:
        sleep(seconds)
        if clock.now > 1002.0:
            late = [i for i, content in link.contents.items() if content == NOT_YET]
            answers = {thing.id: thing.content for thing in full.all()}
            (message_id,) = (i for i in late if i not in answers) if late else (None,)
            link.contents |= {i: answers[i] for i in late if i in answers}
            if message_id is not None:
                link.contents[message_id] = messages[message_id]

    messages: dict[str, bytes] = {}

    def remember(asked: Any) -> Answer:
        message = message_of(asked, full)
        messages[message.id] = message.content
        answer = announced(asked, message)
        for object_id in list(answer.contents)[-3:]:
            answer.contents[object_id] = NOT_YET
        return answer

    def noted(request: Any) -> Any:
        response = pull(request)
        if response.object_available:
            pulled.append(request.object_id)
        return response

    link.clients[2] = remember
    monkeypatch.setattr(clock, "sleep", wait)
    monkeypatch.setattr(link, "PullObject", noted)
    replies, missing = ask(link)
    assert [one.metadata.src_node_id for one in replies] == [1, 2]
    assert not missing
    assert 2.0 < sum(clock.sleeps) < 2.5
    assert len(pulled) <= len(set(pulled)) + 4  # one may be on its way when the reply's turn ends


def test_a_reply_of_many_objects_takes_turns(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reply that takes long to pull is gone on with after the others, where it was left."""
    monkeypatch.setattr(pulling, "SLICE_S", -1.0)
    many = says(update({f"k{i}": np.full(1, i) for i in range(20)}))
    link = Link({1: many, 2: lambda asked: announced(asked, message_of(asked, error="no"))})
    replies, missing = ask(link, 60.0)
    assert [one.metadata.src_node_id for one in replies] == [2, 1]
    assert not missing
    # Flower pulls two objects at a time: the second is on its way when the turn ends, and may be asked for again.
    assert len(clock.sleeps) > 5
    assert link.calls["PullObject"] <= len(link.contents) + len(clock.sleeps) + 1


def test_an_object_that_is_named_often_is_pulled_once() -> None:
    """A tree that names one object a hundred thousand times costs one request for it."""

    def client(asked: Any) -> Answer:
        message = message_of(asked, update(ONES))
        answer = announced(asked, message)
        some = next(iter(answer.contents))
        answer.tree.children.extend(ObjectTree(object_id=some) for _ in range(100_000))
        return answer

    link = Link({2: client})
    (answer,), _ = ask(link)
    assert not answer.has_error()
    assert link.calls["PullObject"] == len(link.contents)


def test_a_reply_of_too_many_objects_is_not_pulled(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tree of more objects than any reply has is refused before one of them is asked for."""
    monkeypatch.setattr(pulling, "MAX_OBJECTS", 10)
    link = Link({2: says(update({f"k{i}": np.full(1, i) for i in range(5)}))})
    (answer,), _ = ask(link)
    assert "objects" in str(answer.error.reason)
    assert "PullObject" not in link.calls
    assert len(link.confirmed) == 1


@pytest.mark.parametrize("slice_s", [5.0, -1.0])
def test_no_client_can_take_the_parts_of_anothers_object_away(
    node: lifl.Node, clock: Clock, monkeypatch: pytest.MonkeyPatch, slice_s: float
) -> None:
    """A tree without an array's chunks, as a SuperLink has it if another announced the array so first, is completed."""
    monkeypatch.setattr(pulling, "SLICE_S", slice_s)

    def robbed(asked: Any) -> Answer:
        answer = announced(asked, message_of(asked, update(FIVES, 3)))
        (root,) = answer.tree.children
        for one in root.children:
            for part in one.children:
                del part.children[:]
        return answer

    result, _, _ = run(node, in_training(honest(ONES, 1)), link=Link({1: honest(ONES, 1), 2: robbed}), rounds=1)  # type: ignore[arg-type]
    assert len(result.reports[1].accepted) == 2
    check_mean(result)


# ---------------------------------------------------------------- what is not a reply's fault


def test_a_lost_connection_is_no_replys_fault() -> None:
    """An error of the connection is raised, as by Flower; it loses no reply that was taken before."""
    link = Link({1: honest(ONES, 1), 2: honest(ONES, 1)})
    taken: list[int] = []

    def confirm(request: Any) -> None:
        if taken:
            raise ConnectionError("the SuperLink is gone")

    def take(message: Message, node_id: int) -> Message:
        taken.append(node_id)
        return message

    link.ConfirmMessageReceived = confirm  # type: ignore[method-assign]
    messages = [Message(RecordDict(), node, "train") for node in link.clients]
    with pytest.raises(ConnectionError, match="is gone"):
        exchange.exchange(link.grid(), messages, 5, 0, take, lambda _: None)
    assert taken == [1]


def test_a_request_that_is_too_large_is_no_end(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    """An answer 413 means no replies, and a line in the log, as in Flower."""

    class TooLargeError(Exception):
        class response:
            status_code = 413

    link = Link({1: honest(ONES, 1)})

    def pull(_: Any) -> None:
        raise TooLargeError

    link.PullMessages = pull  # type: ignore[method-assign]
    with caplog.at_level(logging.ERROR, "flwr"):
        assert ask(link, 1.0) == ([], [1])
    assert "too large" in caplog.text


def test_a_grid_with_a_way_of_its_own_keeps_it(clock: Clock) -> None:
    """A subclass of HttpGrid that pulls otherwise, or a grid whose method was replaced, is asked."""

    class Own(HttpGrid):
        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            pulled.append(list(message_ids))
            return super().pull_messages(message_ids)

    pulled: list[list[str]] = []
    link = Link({1: honest(ONES, 1)})
    grid = Own(token="none")
    grid._run, grid._client = link.grid()._run, link  # type: ignore[assignment]
    (answer,) = exchange.exchange(grid, [Message(RecordDict(), 1, "train")], 5, 0, as_it_is, pytest.fail)
    assert answer.metadata.src_node_id == 1
    assert len(pulled) == 1


@pytest.mark.parametrize("gone", ["a name", "the client"])
def test_another_flower_pulls_for_itself(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, gone: str
) -> None:
    """If a private name of Flower's is gone, its own method pulls, and the log says so once."""
    pulling._warn_once.cache_clear()
    link = Link({1: honest(ONES, 1)})
    if gone == "a name":
        monkeypatch.setattr(pulling, "_missing", "cannot import name 'pull_objects'")
    else:
        grid = link.grid()
        del grid.node
        monkeypatch.setattr(link, "grid", lambda: grid)
    with caplog.at_level(logging.WARNING, "flwr"):
        for _ in range(2):
            if gone == "a name":
                (answer,), _ = ask(Link({1: honest(ONES, 1)}))
                assert answer.content["arrays"] is not None
            else:
                assert pulling.puller(link.grid(), 0).__name__ == "<lambda>"
    assert caplog.text.count("flwr has changed") == 1
    pulling._warn_once.cache_clear()


# ---------------------------------------------------------------- fuzz

ODD = [
    b"",
    b"\0",
    b"\xff" * 9,
    b"Array",
    b" ",
    b",",
    b"{",
    b"[" * 5000,
    b'"',
    b"-1",
    b"1e999",
    b"null",
    b"\n",
    b"a" * 64,
]
VALUES = [None, True, -1, 0, 2**63, 2**70, 1e308, "", "f" * 2000, [], [[]], {}, {"a": {}}, "a" * 64, [0] * 50, ["x"]]


def mutate_json(rng: random.Random, said: Any) -> Any:
    """The same JSON with one thing in it replaced, dropped or added."""
    if isinstance(said, dict) and said and rng.random() < 0.8:
        key = rng.choice(list(said))
        change = rng.randrange(4)
        if change == 0:
            return {name: value for name, value in said.items() if name != key}
        if change == 1:
            return {**said, rng.choice(["more", "\ud800", ""]): said[key]}
        return {**said, key: mutate_json(rng, said[key]) if change == 2 else rng.choice(VALUES)}
    if isinstance(said, list) and said and rng.random() < 0.5:
        at = rng.randrange(len(said))
        return [*said[:at], rng.choice(VALUES), *said[at + rng.randrange(2) :]]
    return rng.choice(VALUES)


def mutate_content(rng: random.Random, content: bytes, ids: list[str]) -> bytes:
    """The same object with its head or its body changed."""
    head, _, rest = content.partition(b"\0")
    parts = head.split(b" ")
    change = rng.randrange(8)
    if change == 0:
        parts[0] = rng.choice(
            [b"Message", b"RecordDict", b"ArrayRecord", b"Array", b"ArrayChunk", b"MetricRecord", b"X"]
        )
    elif change == 1 and len(parts) > 1:
        children = [i for i in parts[1].decode(errors="replace").split(",") if i]
        other = rng.choice(ids)
        parts[1] = ",".join(rng.choice([[*children, other], children[1:], [other], children * 2])).encode()
    elif change == 2:
        return content[: rng.randrange(len(content))] or b"x"
    elif change == 3:
        at = rng.randrange(len(content) + 1)
        return content[:at] + rng.choice(ODD) + content[at:] or b"x"
    elif change == 4:
        flipped = bytearray(content)
        for _ in range(rng.randrange(1, 5)):
            flipped[rng.randrange(len(flipped))] = rng.randrange(256)
        return bytes(flipped)
    elif change < 7 and rest[:1] == b"{":
        with contextlib.suppress(ValueError, RecursionError):  # changed before
            rest = json.dumps(mutate_json(rng, json.loads(rest))).encode()
    else:
        rest = rest[: rng.randrange(len(rest) + 1)] + rng.choice(ODD) + rest[rng.randrange(len(rest) + 1) :]
    return b" ".join(parts) + b"\0" + rest


def mutate(rng: random.Random, answer: Answer) -> Answer:
    """The same reply with an object, the tree, or what is announced changed."""
    for _ in range(rng.randrange(1, 4)):
        ids = list(answer.contents)
        one, change = rng.choice(ids), rng.randrange(10)
        if change == 0:
            answer.contents = {i: content for i, content in answer.contents.items() if i != one}
        elif change == 1:
            answer.contents[one] = NOT_YET
        elif change == 2:
            nodes = [answer.tree]
            while nodes[-1].children and rng.random() < 0.7:
                nodes.append(rng.choice(list(nodes[-1].children)))
            if rng.random() < 0.5:
                del nodes[-1].children[:]
            else:
                nodes[-1].object_id = rng.choice([*ids, "", "z" * 64])
        elif change == 3:
            name = rng.choice(["run_id", "src_node_id", "dst_node_id", "message_id", "message_type", "ttl"])
            kind = type(getattr(answer.metadata, name))
            setattr(answer.metadata, name, kind(rng.choice([0, 1, 7, 12345])))
        else:
            answer.contents[one] = mutate_content(rng, answer.contents[one] or b"x", ids)
    return answer


def mutant(seed: int) -> Client:
    """A client that sends a right reply, changed as its seed says."""

    def client(asked: Any) -> Answer:
        # No object of one is an object of another's: a store would not take a wrong content for it.
        said = metrics(**{"num-examples": 1 + seed % 5, "loss": 0.5, "parts": [1.0, float(seed)]})
        arrays = {"w": np.full((8, 4), seed, np.float32), "b": np.full(3, float(seed))}
        content = reply(metrics=said)
        if asked.message_type.startswith("train"):
            content = reply(arrays=array_record(arrays), metrics=said)
        return mutate(random.Random(seed), announced(asked, message_of(asked, content)))

    return client


@pytest.mark.parametrize("part", range(4))
def test_no_reply_makes_an_exchange_raise(clock: Clock, part: int) -> None:
    """Whatever replies are made of, each node that was asked has one reply, or is missing at the time-out."""
    nodes = range(100 + 150 * part, 250 + 150 * part)
    link = Link({node: mutant(node) for node in nodes} | {1: honest(ONES, 1)})
    replies, missing = ask(link)
    answered = [one.metadata.src_node_id for one in replies]
    by_message = [one.metadata.reply_to_message_id for one in replies]
    assert len(set(by_message)) == len(by_message)
    assert len(by_message) + len(missing) == len(link.clients)
    assert 1 in answered
    for one in replies:
        assert one.has_error() or isinstance(one.content, RecordDict)
    errors = [str(one.error.reason) for one in replies if one.has_error()]
    assert len(errors) > 60
    assert all(len(reason) <= 500 and reason.isprintable() for reason in errors)


@pytest.mark.parametrize("part", range(3))
def test_no_reply_makes_a_run_end(node: lifl.Node, clock: Clock, part: int) -> None:
    """Rounds of mutants and two honest nodes have a result each; all that the mutants bring about is in the reports."""
    nodes = range(2000 + 30 * part, 2030 + 30 * part)
    link = Link({1: honest(ONES, 1), 3: honest(FIVES, 3)} | {n: mutant(n) for n in nodes})
    result = FedAvg(node=node, max_weight=1000).start(link.grid(), record(MODEL), num_rounds=2, timeout=5)
    assert sorted(result.reports) == [1, 2]
    for report in result.reports.values():
        assert report.error is None
        assert {"1", "3"} <= {one.client_id for one in report.accepted}
        named = [one.client_id for one in (*report.accepted, *report.rejected)] + list(report.late)
        assert sorted(named) == sorted(map(str, link.clients))
