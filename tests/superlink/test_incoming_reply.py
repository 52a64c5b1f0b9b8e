"""Replies that break rules, in rounds that the server folds: each is named with its rule, the others are the mean."""

from __future__ import annotations

import copy
import json
import re
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flower_objects import FlowerObject, array, chunks_of, metrics, record, reply, saved, update, weight
from flwr.app import Error, Message, MetricRecord, RecordDict
from flwr.app.message import make_message
from flwr.proto import message_pb2
from flwr.supercore import date
from flwr.supercore.inflatable.inflatable_object import get_object_tree
from raw_http import Line, head, headers_of
from rig import UNIT, Rig
from scripted_clients import Client, check_mean, flowers, never, play, prepare, says, settled, wait_until

from lifl.bench.fleet.canned_reply import Placeholder
from lifl.errors import RoundError
from lifl.round.admission import Limits
from lifl.strategy.landing import spec_of
from lifl.strategy.server_client import Server
from lifl.superlink import app_socket
from lifl.superlink.rounds import reply as reply_module
from lifl.superlink.rounds import watcher
from lifl.superlink.rounds.chunk_map import Geometry
from lifl.superlink.rounds.incoming_reply import Reception


def model(seed: int = 99, dtype: Any = np.float32) -> dict[str, Any]:
    """A model of several dtypes and shapes; one array is large enough for a block of its own."""
    random = np.random.default_rng(seed)
    return {
        "w": random.random((60, 500)).astype(dtype),
        "b": random.random(5).astype(dtype),
        "scale": np.array(random.random(), dtype),
        "bn1.count": np.array(seed, np.int64),
        "bn2.count": np.array(seed, np.int64),
        "none": np.zeros((0, 3), dtype),
    }


HONEST = [(model(1), 1.0), (model(2), 3.0)]
THEIRS = model(7)
RIGHT = {name: array(one) for name, one in THEIRS.items()}


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    """A server for all rounds of this module."""
    with Rig("32MiB") as made:
        yield made


def test_things_are_what_flower_makes() -> None:
    """Built by hand, a right reply has the ids of Flower's own objects."""
    said = RecordDict({"arrays": flowers(model(1)), "metrics": MetricRecord({"num-examples": 3})})
    assert update(model(1), 3).tree == get_object_tree(said)


# ---------------------------------------------------------------- what is refused


def but(name: str, one: Any) -> FlowerObject:
    """A right reply but for one array."""
    return update({**RIGHT, name: one})


def at(index: int, value: float) -> Any:
    """The large array with one number changed."""
    changed = THEIRS["w"].copy()
    changed.flat[index] = value
    return changed


def streamed(stream: bytes) -> FlowerObject:
    """The small array, of another stream."""
    return but("b", array(THEIRS["b"], stream=stream))


def header(said: str, version: bytes = b"\x01\x00") -> bytes:
    """A ``.npy`` header that says so."""
    text = said.encode() + b" " * (-len(said) % 16) + b"\n"
    return b"\x93NUMPY" + version + struct.pack("<H", len(text)) + text


def claims(shape: str, descr: str = "<f4", payload: bytes = THEIRS["b"].tobytes()) -> FlowerObject:
    """The small array under a header that lies."""
    return streamed(header(f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}") + payload)


def said_by(name: str, **said: Any) -> FlowerObject:
    """An array that describes itself in another way."""
    return but(name, array(THEIRS[name], **said))


RECORD = record(RIGHT)
NO_OBJECT = "f" * 64

REFUSED: dict[str, tuple[FlowerObject | Error, str, str]] = {
    # numbers
    "NaN": (but("w", at(0, np.nan)), "values", r"'w' holds nan at flat index 0"),
    "Inf at the end": (but("w", at(-1, np.inf)), "values", r"'w' holds inf at flat index 29999"),
    "NaN in a 0-d array": (but("scale", np.array(np.nan, np.float32)), "values", "'scale' holds nan"),
    # weights
    "no weight": (reply(arrays=RECORD, metrics=metrics(loss=1.0)), "weight", "no 'num-examples' among"),
    "negative weight": (update(RIGHT, -1), "weight", "the weight is -1.0"),
    "weight 0": (update(RIGHT, 0), "weight", "finite number above 0"),
    "weight NaN": (update(RIGHT, float("nan")), "weight", "the weight is nan"),
    "weight Inf": (update(RIGHT, float("inf")), "weight", "the weight is inf"),
    "weight 1e300": (update(RIGHT, 1e300), "weight", "the weight is 1e[+]300"),
    "weight 2**-200": (update(RIGHT, 2.0**-200), "weight", "send one from"),
    "weights": (update(RIGHT, [1, 2]), "weight", "the weight is a list"),
    # keys, shapes, dtypes
    "an extra key": (update({**RIGHT, "more": np.ones(2)}), "keys", "not in the model: 'more'"),
    "a missing key": (update({n: a for n, a in RIGHT.items() if n != "b"}), "keys", "missing 'b'"),
    "a key of another name": (update({("c" if n == "b" else n): a for n, a in RIGHT.items()}), "keys", "missing 'b'"),
    "no arrays": (update({}), "keys", "missing"),
    "fewer numbers": (but("b", np.ones(1, np.float32)), "shape", r"'b' has shape \(1,\)"),
    "0-d for 1-d": (but("b", np.float32(1)), "shape", r"'b' has shape \(\)"),
    "a dimension more": (but("b", np.ones((5, 1), np.float32)), "shape", r"\(5, 1\), the model has \(5,\)"),
    "as many in another shape": (but("w", THEIRS["w"].reshape(500, 60)), "shape", r"\(500, 60\)"),
    "more numbers": (but("w", np.ones((60, 501), np.float32)), "shape", r"\(60, 501\)"),
    "numbers for none": (but("none", np.ones((1, 3), np.float32)), "shape", "'none' has shape"),
    "float64 for float32": (but("w", THEIRS["w"].astype(np.float64)), "dtype", "'w' has dtype float64"),
    "int32 for float32": (but("b", np.ones(5, np.int32)), "dtype", "'b' has dtype int32"),
    "float64 for int64": (but("bn1.count", np.array(1.5)), "dtype", "'bn1.count' has dtype float64"),
    "complex": (but("b", np.ones(5, np.complex64)), "format", "dtype '<c8' is not one of"),
    "strings": (but("b", np.array(["a"] * 5)), "format", "is not one of"),
    "big-endian": (but("b", THEIRS["b"].astype(">f4")), "format", "dtype '>f4' is not one of"),
    "pickled objects": (claims("(5,)", "|O", b"cos\nsystem\n"), "format", "dtype '|O' is not one of|'.O'"),
    # .npy streams that lie
    "256 GiB": (claims("(68719476736,)"), "format", "is 274877906944 bytes, 20 came"),
    "an overflow": (claims("(4294967296, 4294967296, 16)"), "format", "20 came"),
    "more than there is": (claims("(6,)"), "format", r"shape \(6,\) of float32 is 24 bytes, 20 came"),
    "less than there is": (claims("(4,)"), "format", "is 16 bytes, 20 came"),
    "a negative length": (claims("(-5,)"), "format", "unreadable .npy header"),
    "code for a shape": (claims("(__import__('os').abort(),)"), "format", "unreadable .npy header"),
    "another version": (streamed(b"\x93NUMPY\x09\x00" + bytes(100)), "format", "version 9.0 is not known"),
    "a header that does not end": (streamed(b"\x93NUMPY\x01\x00\xff\xff" + bytes(40)), "format", "claims 65535 bytes"),
    "nothing of .npy": (streamed(b"PK\x03\x04" + bytes(200)), "format", "not a .npy stream"),
    "a torn stream": (streamed(saved(THEIRS["b"])[:-3]), "format", "20 bytes, 17 came"),
    "a stream with a tail": (streamed(saved(THEIRS["b"]) + b"tail"), "format", "20 bytes, 24 came"),
    "no bytes": (but("b", array(THEIRS["b"], chunks=[], arraychunk_ids=[])), "format", "not a .npy stream"),
    # objects that do not fit together
    "a chunk that is not there": (said_by("b", arraychunk_ids=[0, 7]), "format", "names chunks that it does not have"),
    "a chunk from behind": (said_by("b", arraychunk_ids=[-1]), "format", "names chunks that it does not have"),
    "a chunk by name": (said_by("b", arraychunk_ids=["0"]), "format", "names chunks that it does not have"),
    "a chunk twice": (said_by("b", arraychunk_ids=[0, 0]), "format", "came"),
    "a chunk left out": (said_by("b", arraychunk_ids=[]), "format", "not a .npy stream"),
    "another kind of stream": (said_by("w", stype="torch.tensor"), "format", "'w' is 'torch.tensor'"),
    "no description": (
        but("b", FlowerObject("Array", tuple(chunks_of(saved(THEIRS["b"]))), b"{}")),
        "format",
        "KeyError",
    ),
    "no JSON": (but("b", FlowerObject("Array", (), b"{")), "format", "JSONDecodeError"),
    "a list for a description": (but("b", FlowerObject("Array", (), b"[]")), "format", "TypeError"),
    "a deep nest": (
        but("b", FlowerObject("Array", (), b"[" * 100_000)),
        "format",
        "100,014 bytes came, at most 91,136",
    ),
    "a chunk for an array": (but("b", chunks_of(saved(THEIRS["b"]))[0]), "format", "do not match"),
    "an array that was never pushed": (
        reply(
            arrays=FlowerObject("ArrayRecord", (), json.dumps(dict.fromkeys(THEIRS, NO_OBJECT)).encode()),
            metrics=weight(1),
        ),
        *("format", f"object {NO_OBJECT} of the message is not there"),
    ),
    "a record that was never pushed": (
        FlowerObject("RecordDict", (), json.dumps({"a": NO_OBJECT}).encode()),
        "format",
        "not there",
    ),
    "records by number": (FlowerObject("RecordDict", (), b"[1]"), "format", "names its parts by no object ids"),
    "a record for a reply": (RECORD, "format", "do not match"),
    "a reply in a reply": (
        reply(arrays=RECORD, metrics=weight(1), more=reply()),
        "format",
        "'more' is a 'RecordDict', not a record",
    ),
    "two ArrayRecords": (
        reply(arrays=RECORD, more=record({"v": np.ones(2)}), metrics=weight(1)),
        "format",
        "2 ArrayRecords",
    ),
    "two of the same": (reply(arrays=RECORD, more=RECORD, metrics=weight(1)), "format", "2 ArrayRecords"),
    "no ArrayRecord": (reply(metrics=weight(1)), "format", "0 ArrayRecords"),
    "no metrics": (reply(arrays=RECORD), "format", "0 MetricRecords"),
    "two MetricRecords": (reply(arrays=RECORD, m=weight(1), n=weight(2)), "format", "2 MetricRecords"),
    "nothing": (reply(), "format", "0 ArrayRecords"),
    # what is no reply
    "an error": (Error(code=0, reason="CUDA out of memory"), "error", "CUDA out of memory"),
}


def in_groups(names: list[str], size: int = 8) -> list[list[str]]:
    """So many at a time: a round costs more than a client."""
    return [names[start : start + size] for start in range(0, len(names), size)]


@pytest.mark.parametrize("names", in_groups(list(REFUSED)), ids=lambda names: f"{names[0]} and so on")
def test_what_breaks_a_rule_is_refused_by_name(rig: Rig, names: list[str]) -> None:
    """The report says who was refused, by which rule, and what was sent; the mean is that of the others."""
    round_, clients = play(rig, model(), HONEST, *(says(REFUSED[name][0]) for name in names))
    check_mean(round_, HONEST)
    said = {client.name: name for client, name in zip(clients, names, strict=False)}
    assert {said[who]: rule for who, rule in round_.refused.items()} == {name: REFUSED[name][1] for name in names}
    for who, reason in round_.reasons.items():
        assert re.search(REFUSED[said[who]][2], reason), (said[who], reason)
    assert len(round_.report.accepted) == len(HONEST)


@pytest.mark.parametrize("names", [["NaN", "weight 0", "float64 for float32", "a torn stream", "an error"]])
def test_a_round_of_bad_replies_alone_has_no_model(rig: Rig, names: list[str]) -> None:
    """The model stays as it was, and the report says why."""
    round_, _ = play(rig, model(), [], *(says(REFUSED[name][0]) for name in names))
    assert sorted(round_.refused.values()) == sorted(REFUSED[name][1] for name in names)
    assert round_.report.error is not None
    for name, one in model().items():
        np.testing.assert_array_equal(round_.arrays[name], one)


# ---------------------------------------------------------------- what is taken

FORTRAN = {**THEIRS, "w": np.asfortranarray(THEIRS["w"])}

HEADER = "{'descr': '<f4', 'fortran_order': False, 'shape': (5,), }"

TAKEN: dict[str, FlowerObject] = {
    "keys in another order": update(dict(reversed(RIGHT.items()))),
    "records in another order": reply(metrics=weight(1), arrays=RECORD),
    "Fortran's order": update(FORTRAN),
    "a wide header": streamed(header(HEADER + " " * 99) + THEIRS["b"].tobytes()),
    "small chunks": update({n: array(a, chunks=chunks_of(saved(a), 1000)) for n, a in THEIRS.items()}),
    "a chunk of nothing": but(
        "b", array(THEIRS["b"], chunks=[*chunks_of(saved(THEIRS["b"])), FlowerObject("ArrayChunk")])
    ),
    "a wrong description": said_by("b", dtype="float64", shape=[7, 7]),
    "other metrics beside": reply(arrays=RECORD, metrics=metrics(**{"num-examples": 1, "loss": 0.5, "x": [1.0, 2.0]})),
    "a smaller dtype": but("b", THEIRS["b"]),
    "a weight as an integer": update(RIGHT, 1),
}


@pytest.mark.parametrize("names", in_groups(list(TAKEN), 5), ids=lambda names: f"{names[0]} and so on")
def test_what_is_unusual_and_right_counts(rig: Rig, names: list[str]) -> None:
    """With its weight, as what it says."""
    round_, _ = play(rig, model(), HONEST, *(says(TAKEN[name]) for name in names))
    assert not round_.refused, round_.reasons
    check_mean(round_, [*HONEST, *[(THEIRS, 1.0)] * len(names)])


def test_a_reply_whose_form_cannot_be_learnt_counts(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its update is in the mean by then."""

    def fail(*_: Any) -> None:
        raise KeyError("a fault of the server's")

    monkeypatch.setattr(Geometry, "learn", fail)
    theirs = update({name: RIGHT[name] for name in reversed(RIGHT)})
    round_, _ = play(rig, model(), HONEST, says(theirs))
    assert not round_.refused
    check_mean(round_, [*HONEST, (THEIRS, 1.0)])


def test_replies_in_a_smaller_dtype_are_widened(rig: Rig) -> None:
    """A model that is float64 at the server takes float32, and nothing complex."""
    wide, narrow = model(99, np.float64), model(7)
    honest = [(model(1, np.float64), 1.0), (model(2, np.float64), 3.0)]
    complex_ = update({**narrow, "b": np.ones(5, np.complex64)})
    round_, clients = play(rig, wide, honest, says(update(narrow, 2)), says(complex_))
    assert round_.refused == {clients[1].name: "format"}
    check_mean(round_, [*honest, ({name: one.astype(wide[name].dtype) for name, one in narrow.items()}, 2.0)])


def test_the_servers_bound_on_weights_holds(rig: Rig) -> None:
    """A weight beyond it is refused, not cut."""
    round_, clients = play(rig, model(), HONEST, says(update(RIGHT, 2**62)), says(update(RIGHT, 10)), max_weight=10)
    assert round_.refused == {clients[0].name: "weight"}
    check_mean(round_, [*HONEST, (THEIRS, 10.0)])


def test_what_a_serverapp_is_told_of_a_reply_is_bounded(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Records that are not arrays go to it in one frame; a reply with more is refused, and ends nothing."""
    monkeypatch.setattr(reply_module, "MAX_BESIDE_BYTES", 10_000)
    beside = metrics(**{"num-examples": 1, "more": [0.5] * 2_000})
    round_, clients = play(rig, model(), HONEST, says(reply(arrays=RECORD, metrics=beside)), says(update(RIGHT)))
    assert round_.refused == {clients[0].name: "format"}
    assert "more than 10,000 bytes beside its arrays" in round_.reasons[clients[0].name]
    check_mean(round_, [*HONEST, (THEIRS, 1.0)])


def test_rules_hold_with_a_database_too(tmp_path: Path) -> None:
    """Objects are read from it, and nothing of a round stays in it."""
    names = ["NaN", "a torn stream"]
    with Rig("32MiB", database=str(tmp_path / "state.db")) as rig:
        round_, clients = play(rig, model(), HONEST, *(says(REFUSED[name][0]) for name in names))
        engines = [rig.state._engine, rig.store._engine]
    for engine in engines:
        engine.dispose()
    check_mean(round_, HONEST)
    said = {client.name: name for client, name in zip(clients, names, strict=True)}
    assert {said[who]: rule for who, rule in round_.refused.items()} == {name: REFUSED[name][1] for name in names}


# ---------------------------------------------------------------- what replies share


def test_identical_updates_all_count(rig: Rig) -> None:
    """Three clients send the same objects; each has its weight."""
    same = [(model(1), 1.0), (model(1), 2.0), (model(1), 5.0), (model(2), 8.0)]
    round_, _ = play(rig, model(), same)
    check_mean(round_, same)
    assert len(round_.report.accepted) == 4


def test_a_client_may_send_back_what_it_got(rig: Rig) -> None:
    """Its objects are the model's, which others still need; also in the next rounds, when they are the mean's."""
    round_, _ = play(rig, model(), [(model(), 1.0), (model(), 3.0)], num_rounds=3)
    for name, one in model().items():
        np.testing.assert_array_equal(round_.arrays[name], one)


def test_frozen_layers_are_shared_by_all(rig: Rig) -> None:
    """An array is the same in the model and in all replies, another array in all replies."""
    frozen, common = model()["w"], np.float32([1, 2, 3, 4, 5])
    honest = [({**model(n), "w": frozen, "b": common}, float(n)) for n in (1, 2, 3)]
    round_, _ = play(rig, {**model(), "w": frozen}, honest, num_rounds=2)
    check_mean(round_, honest)


def overwrite(rig: Rig) -> None:
    """Writes over all of the arena that is free."""
    arena, taken = rig.plane.node.arena, []
    while (block := arena.alloc(UNIT)) is not None:
        taken.append(block)
        memoryview(arena.buffer(block))[:] = b"\xff" * UNIT
    for block in taken:
        arena.reclaim(block)


@pytest.mark.parametrize("wrong", ["weight", "format", "dtype", "a round that ends"])
def test_what_a_refused_reply_shares_with_another_stays(rig: Rig, wrong: str) -> None:
    """A chunk that came with the refused one, and is the other's too, is what it was when the other is read."""
    theirs = {**model(5), "w": model(1)["w"]}
    said = {
        "weight": lambda: update(theirs, float("nan")),
        "format": lambda: update({**theirs, "b": array(theirs["b"], arraychunk_ids=[9])}),
        "dtype": lambda: update({**theirs, "b": theirs["b"].astype(np.float64)}),
        "a round that ends": lambda: update(theirs),
    }[wrong]()
    announced, refused = threading.Event(), threading.Event()

    def bad(client: Client, asked: Message) -> None:
        made = client.announce(asked, said)
        large = max(made.missing, key=lambda i: len(made.objects[i].content))
        assert all(client.push(asked, made, large))
        announced.set()
        if wrong == "a round that ends":
            wait_until(lambda: reported)
            return
        assert all(client.push(asked, made, *(i for i in made.missing if i != large)))
        wait_until(lambda: client.rig.store.get(made.message.id) is None)
        refused.set()

    reported: list[int] = []

    def honest(client: Client, asked: Message) -> None:
        assert announced.wait(10)
        made = client.announce(asked, update(model(1), 1))
        if wrong != "a round that ends":
            assert refused.wait(10)
        overwrite(client.rig)
        assert all(client.push(asked, made))
        reported.append(1)

    options = {"deadline": 1.0} if wrong == "a round that ends" else {}
    round_, clients = play(rig, model(), HONEST[1:], bad, honest, **options)
    assert clients[1].name not in round_.refused
    check_mean(round_, HONEST)


# ---------------------------------------------------------------- who does not answer


def test_a_node_that_goes_offline_is_not_waited_for(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower makes an error reply for it."""
    monkeypatch.setattr(watcher, "WATCH_S", 0.05)

    def leave(client: Client, _: Message) -> None:
        assert client.rig.state.deactivate_node(client.node.id)

    round_, clients = play(rig, model(), HONEST, leave)
    assert round_.refused == {clients[0].name: "error"}
    check_mean(round_, HONEST)


def test_a_look_after_nodes_that_fails_is_not_the_last(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next one finds a node that is gone."""
    monkeypatch.setattr(watcher, "WATCH_S", 0.05)
    failed = threading.Event()

    def forget_stale() -> None:
        failed.set()
        fail()

    def leave(client: Client, _: Message) -> None:
        assert failed.wait(10)
        assert client.rig.state.deactivate_node(client.node.id)

    monkeypatch.setattr(rig.plane.rounds._outgoing, "forget_stale", forget_stale)
    round_, clients = play(rig, model(), HONEST, leave)
    assert round_.refused == {clients[0].name: "error"}


def test_a_node_that_goes_offline_in_the_middle_of_its_reply_is_not_waited_for(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its push session ends, as at Flower's server, and the reply counts as an error."""
    monkeypatch.setattr(watcher, "WATCH_S", 0.05)
    monkeypatch.setattr(watcher, "IDLE_S", 0.1)

    def leave(client: Client, asked: Message) -> None:
        made = client.announce(asked, update(THEIRS))
        assert all(client.push(asked, made, *made.missing[:2]))
        client.rig.state._object_push_sessions[made.session_id].expires_at = date.now()
        assert client.rig.state.deactivate_node(client.node.id)

    round_, clients = play(rig, model(), HONEST, leave)
    assert round_.refused == {clients[0].name: "error"}
    check_mean(round_, HONEST)


def test_a_reply_after_the_deadline_does_not_count(rig: Rig) -> None:
    """It is late in the report, and when it comes nobody takes it."""
    over = threading.Event()
    taken: list[bool] = []

    def late(client: Client, asked: Message) -> None:
        assert over.wait(10)
        made = client.announce(asked, update(THEIRS))
        assert not made.missing
        made.missing = list(made.objects)
        taken.extend(client.push(asked, made))

    def wait(_: list[Client]) -> None:
        over.set()
        wait_until(lambda: len(taken) == len(update(THEIRS).all()) + 1)

    round_, clients = play(rig, model(), HONEST, late, deadline=0.3, beside=wait)
    assert round_.report.late == (clients[0].name,)
    assert not round_.refused
    assert not any(taken)
    check_mean(round_, HONEST)


def test_a_reply_of_which_a_part_is_there_at_the_deadline_does_not_count(rig: Rig) -> None:
    """Nor is anything left of it: objects that came, one that was on its way, and those that come later."""
    over = threading.Event()
    taken: list[bool] = []

    def slow(client: Client, asked: Message) -> None:
        made = client.announce(asked, update(THEIRS))
        large = max(made.missing, key=lambda i: len(made.objects[i].content))
        rest = [i for i in made.missing if i != large]
        assert all(client.push(asked, made, *rest[:2]))
        body = client.request(asked, made, large)
        with Line(client.rig.port) as line:
            line.send(head("/v1/fleet/push-object", headers_of(client.node), len(body)), body[:50_000])
            assert over.wait(10)
            line.send(body[50_000:])
            assert line.answer() == (200, b"")
        taken.extend(client.push(asked, made, *rest[2:]))

    def wait(_: list[Client]) -> None:
        over.set()
        wait_until(lambda: taken)

    round_, clients = play(rig, model(), HONEST, slow, deadline=0.3, beside=wait)
    assert round_.report.late == (clients[0].name,)
    assert not any(taken)
    check_mean(round_, HONEST)


def test_too_few_good_replies_leave_the_model_as_it_was(rig: Rig) -> None:
    """The quorum counts those that were accepted."""
    round_, clients = play(rig, model(), HONEST, says(REFUSED["NaN"][0]), never, quorum=3, deadline=0.3)
    assert round_.refused == {clients[0].name: "values"}
    assert round_.report.late == (clients[1].name,)
    assert "2 of 4 updates were accepted, the quorum is 3" in str(round_.report.error)
    for name, one in model().items():
        np.testing.assert_array_equal(round_.arrays[name], one)


# ---------------------------------------------------------------- replies that come twice


def test_a_reply_that_is_announced_twice_counts_once(rig: Rig) -> None:
    """A node restarts in the middle of its reply and says it all again: what came need not come again."""

    def twice(client: Client, asked: Message) -> None:
        first = client.announce(asked, update(THEIRS, 2))
        large = max(first.missing, key=lambda i: len(first.objects[i].content))
        assert all(client.push(asked, first, large))
        again = client.announce_again(first)
        assert set(again.missing) <= set(first.missing) - {large}
        assert not any(client.push(asked, first, again.missing[0])), "its session has been replaced"
        assert all(client.push(asked, again))
        wait_until(lambda: asked.metadata.message_id not in client.rig.state.message_ins_store)
        assert client.announce_again(first).missing == []

    round_, _ = play(rig, model(), HONEST, twice)
    assert not round_.refused
    check_mean(round_, [*HONEST, (THEIRS, 2.0)])


def test_of_two_replies_the_first_counts(rig: Rig) -> None:
    """The second is not asked for, whether the first has come whole or not."""

    def both(client: Client, asked: Message) -> None:
        first = client.announce(asked, update(THEIRS, 2))
        assert client.announce(asked, update(model(8), 100)).missing == []
        assert all(client.push(asked, first))
        assert client.announce(asked, update(model(8), 100)).missing == []

    round_, _ = play(rig, model(), HONEST, both)
    assert not round_.refused
    check_mean(round_, [*HONEST, (THEIRS, 2.0)])


def test_a_reply_that_comes_too_early_takes_nothing_from_the_serverapp(rig: Rig) -> None:
    """A client that replies before it can have read the message: the ServerApp can still push it, for the others."""
    client = Client(rig, says(update(THEIRS)))
    run_id, token = rig.start_run()
    with rig.grid(run_id, token) as grid:
        server = Server.find(grid)
        assert server is not None
        content = reply(arrays=record(model()))
        message = Message(Placeholder(content.id), client.node.id, "train", group_id="1")
        message_id = message.object_id
        message.metadata.__dict__["_message_id"] = message_id
        round_ = server.open_round(
            run_id, [message], spec_of(flowers(model())), "num-examples", "eager", "any", Limits()
        )
        session_id = rig.state.start_session(run_id)
        tree = message_pb2.ObjectTree(object_id=message_id, children=[content.tree])
        stored, missing = rig.state.store_message_and_object_tree(message, tree, session_id)
        assert stored
        assert next(server.replies(10)).refusal is None
        contents = {one.id: one.content for one in content.all()} | {message_id: message.deflate()}
        assert all(rig.state.store_object(run_id, session_id, i, contents[i]) for i in dict.fromkeys(missing))
        assert round_.result().num_updates == 1
        server.close()
    client.close()
    settled(rig)
    rig.state.stop_run(run_id)


def test_a_reply_that_is_stored_while_its_round_ends_leaves_nothing(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The round is closed when Flower has stored it and nobody has noted it: none of its objects is asked for."""
    rounds, missing = rig.plane.rounds, list[list[str]]()
    announced = rounds.registry.announced

    def end_before(*args: Any) -> None:
        rounds.end(rounds.registry.rounds()[0])
        announced(*args)

    monkeypatch.setattr(rounds.registry, "announced", end_before)
    pushed = threading.Event()

    def announce(client: Client, asked: Message) -> None:
        assert pushed.wait(10)
        missing.append(client.announce(asked, update(THEIRS)).missing)

    client = Client(rig, announce)
    run_id, token = rig.start_run()
    with rig.grid(run_id, token) as grid:
        server = Server.find(grid)
        assert server is not None
        messages = [Message(RecordDict({"arrays": flowers(model())}), client.node.id, "train", group_id="1")]
        server.open_round(run_id, messages, spec_of(flowers(model())), "num-examples", "eager", "any", Limits())
        assert grid.push_messages(messages)
        pushed.set()
        wait_until(lambda: missing or client.error)
        server.close()
    client.close()
    assert missing == [[]]
    settled(rig)
    rig.state.stop_run(run_id)


def test_a_reply_that_came_in_time_is_read_later(rig: Rig) -> None:
    """The strategy was busy with another one until after the time-out."""
    first, answered = threading.Event(), threading.Event()

    def second(client: Client, asked: Message) -> None:
        assert first.wait(10)
        client.answer(asked, update(model(2)))
        answered.set()

    clients = [Client(rig, says(update(THEIRS))), Client(rig, second)]
    run_id, token = rig.start_run()
    with rig.grid(run_id, token) as grid:
        server = Server.find(grid)
        assert server is not None
        content = RecordDict({"arrays": flowers(model())})
        messages = [Message(content, client.node.id, "train", group_id="1") for client in clients]
        server.open_round(run_id, messages, spec_of(flowers(model())), "num-examples", "eager", "any", Limits())
        assert grid.push_messages(messages)
        end_s, count = time.monotonic() + 1.5, 0
        for _ in server.replies(1.5):
            count += 1
            first.set()
            assert answered.wait(10)
            time.sleep(max(end_s + 0.2 - time.monotonic(), 0))
        assert count == 2
        server.close()
    for client in clients:
        client.close()
    settled(rig)
    rig.state.stop_run(run_id)


def fail(*_: Any, **__: Any) -> Any:
    """Takes the place of what does not fail."""
    raise OSError("a fault of the server's")


@pytest.mark.parametrize("what", ["reading", "clearing", "telling"])
def test_a_reply_that_the_server_cannot_settle_has_an_end(rig: Rig, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its strategy does not wait: it is told, and what is in the mean counts."""
    rounds, convert = rig.plane.rounds, app_socket._names.message_to_proto
    names: list[str] = []

    def answer(client: Client, asked: Message) -> None:
        names.append(client.name)
        client.answer(asked, update(THEIRS))

    def is_theirs(thing: Any) -> bool:
        return thing.client in names

    settle, release = Reception.settle, rounds._release
    if what == "reading":
        monkeypatch.setattr(Reception, "settle", lambda s, *rest: fail() if is_theirs(s) else settle(s, *rest))
    elif what == "clearing":

        def release_and_fail(asked: Any, reception: Any) -> None:
            release(asked, reception)
            if is_theirs(reception) and reception._loan is None and not reception._is_placing:
                fail()

        monkeypatch.setattr(rounds, "_release", release_and_fail)
    else:
        monkeypatch.setattr(
            app_socket._names,
            "message_to_proto",
            lambda m: fail() if str(m.metadata.src_node_id) in names and names.pop() else convert(m),
        )
    round_, clients = play(rig, model(), HONEST, answer, is_alone=what != "reading")
    assert round_.refused == ({} if what == "clearing" else {clients[0].name: "error"})
    assert not round_.report.late
    if what != "telling":
        check_mean(round_, [*HONEST, *[(THEIRS, 1.0)] * (what == "clearing")])


def test_a_node_cannot_reply_for_another(rig: Rig) -> None:
    """To a message that it was not sent."""
    asked_of_other: list[Message] = []

    def remember(client: Client, asked: Message) -> None:
        asked_of_other.append(asked)
        client.answer(asked, update(THEIRS, 2))

    def meddle(client: Client, asked: Message) -> None:
        wait_until(lambda: asked_of_other)
        stolen = make_message(metadata=copy.copy(asked_of_other[0].metadata), content=RecordDict())
        stolen.metadata.__dict__["_dst_node_id"] = client.node.id
        assert client.announce(stolen, update(model(8), 100)).missing == []
        client.answer(asked, update(model(6), 1))

    round_, _ = play(rig, model(), HONEST, remember, meddle)
    assert not round_.refused
    check_mean(round_, [*HONEST, (THEIRS, 2.0), (model(6), 1.0)])


def test_objects_that_are_not_the_messages_do_not_stay(rig: Rig) -> None:
    """A tree whose root is another object's is not taken: nothing is registered with it, however often it comes."""
    counts: list[int] = []

    def lying(client: Client, asked: Message) -> None:
        for n in range(3):
            root = FlowerObject("RecordDict", (update(THEIRS),), b"not the message %d" % n)
            counts.append(len(client.rig.store))
            assert client.announce_again(prepare(asked, update(THEIRS)), root.tree).missing == []
            counts.append(len(client.rig.store))

    round_, clients = play(rig, model(), [], lying, deadline=0.5, is_alone=False)
    assert round_.report.late == (clients[0].name,)
    assert len(set(counts)) == 1
    settled(rig)


# ---------------------------------------------------------------- a ServerApp that dies


@pytest.mark.parametrize("when", ["before the messages", "after them", "in the middle of a reply", "with the mean"])
def test_what_a_serverapp_leaves_behind_is_cleared(rig: Rig, when: str) -> None:
    """Its connection ends: its round is closed, its messages and their replies are gone."""
    going, gone = threading.Event(), threading.Event()
    late: list[Any] = []

    def slow(client: Client, asked: Message) -> None:
        made = client.announce(asked, update(THEIRS))
        large = max(made.missing, key=lambda i: len(made.objects[i].content))
        body = client.request(asked, made, large)
        with Line(client.rig.port) as line:
            line.send(head("/v1/fleet/push-object", headers_of(client.node), len(body)), body[:50_000])
            wait_until(lambda: client.rig.plane.gateway.uploads == 1)
            going.set()
            assert gone.wait(10)
            line.send(body[50_000:])
            late.append(line.answer())
        late.extend(client.push(asked, made, *(i for i in made.missing if i != large)))

    act = slow if when == "in the middle of a reply" else says(update(THEIRS))
    client = Client(rig, never if when == "after them" else act)
    run_id, token = rig.start_run()
    with rig.grid(run_id, token) as grid:
        server = Server.find(grid)
        assert server is not None
        content = RecordDict({"arrays": flowers(model())})
        messages = [Message(content, client.node.id, "train", group_id="1")]
        spec = spec_of(flowers(model()))
        round_ = server.open_round(run_id, messages, spec, "num-examples", "eager", "any", Limits())
        if when != "before the messages":
            assert grid.push_messages(messages)
            assert server.count_bound([messages[0].metadata.message_id]) == 1
        if when == "in the middle of a reply":
            assert going.wait(10)
        if when == "with the mean":
            assert next(server.replies(10)).refusal is None
            assert round_.result().num_updates == 1
        server.close()
        wait_until(lambda: not rig.plane.rounds.registry.rounds())
        gone.set()
        wait_until(lambda: not late or len(late) > 1 or when != "in the middle of a reply")
    client.close()
    rig.state.stop_run(run_id)
    settled(rig)
    if when == "in the middle of a reply":
        assert late[0] == (200, b"")
        assert not any(late[1:])


def test_a_round_of_a_run_that_is_not_here_is_refused(rig: Rig) -> None:
    """It says so."""
    run_id, token = rig.start_run()
    with rig.grid(run_id, token) as grid:
        server = Server.find(grid)
        assert server is not None
        messages = [Message(RecordDict(), 5, "train")]
        with pytest.raises(RoundError, match="no run 77 here"):
            server.open_round(77, messages, spec_of(flowers(model())), "n", "eager", "any", Limits())
        server.close()
    rig.state.stop_run(run_id)
