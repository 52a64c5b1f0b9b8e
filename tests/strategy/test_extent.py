"""The size of a reply is found from its objects' bytes before anything is built, and is about what the reply takes."""

from __future__ import annotations

import json
import tracemalloc
from typing import Any

import numpy as np
import pytest
from flower_objects import array, metrics
from flower_objects import record as array_record
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.app.message import make_message
from flwr.app.metadata import Metadata
from flwr.proto import recorddict_pb2
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from hypothesis import given, settings
from hypothesis import strategies as st
from linked import FlowerObject, reply, update

from lifl.strategy import extent

MIB = 2**20


def contents_of(content: RecordDict) -> tuple[str, dict[str, bytes]]:
    """A reply with this content as Flower deflates it."""
    message = make_message(metadata=Metadata(1, "", 7, 1, "a", "", 1.0, 60.0, "train"), content=content)
    return message.object_id, {object_id: one.deflate() for object_id, one in get_all_nested_objects(message).items()}


def built(root: FlowerObject, most_bytes: int = 2**40) -> int:
    """The extent of a reply with this content."""
    message = FlowerObject("Message", (root,), b"")
    return extent.built_bytes(message.id, {thing.id: thing.content for thing in message.all()}, most_bytes)


def values_of(kind: Any, **values: Any) -> int:
    """The extent of a record's values alone."""
    return sum(extent._values(memoryview(kind(values).deflate().partition(b"\0")[2])))


@pytest.mark.parametrize("count", [0, 1, 1000, 3_000_000])
def test_arrays_take_their_streams_bytes(count: int) -> None:
    """An array of any number of chunks takes the bytes of its stream, and little more for its description."""
    numbers = np.random.default_rng(1).random(count)
    found = built(update({"x": numbers}))
    assert numbers.nbytes <= found <= numbers.nbytes + 5000


def test_each_naming_counts() -> None:
    """A chunk that an Array names twice, an Array and a record that are named twice, each count twice."""
    chunk = FlowerObject("ArrayChunk", (), bytes(MIB))
    once = array(np.zeros(1), chunks=[chunk])
    twice = array(np.zeros(1), chunks=[chunk], arraychunk_ids=[0, 0])
    record = array_record({"a": twice, "b": twice, "c": once})
    root = FlowerObject("RecordDict", (record,), json.dumps({"r": record.id, "s": record.id}).encode())
    assert 10 * MIB <= built(root) <= 10 * MIB + 10_000


def test_honest_replies_are_within_the_bound() -> None:
    """Zeros, tied weights, long lists and blobs, of which few bytes came or many, are all taken."""
    zeros, blob = np.zeros(2_000_000, np.float32), b"x" * 1_000_000
    content = RecordDict(
        {
            "a": ArrayRecord({f"layer {i}": Array(zeros) for i in range(2)}),
            "m": MetricRecord({"n": 1, "curve": [0.5] * 50_000, "counts": list(range(10_000))}),
            "c": ConfigRecord({"blob": blob, "blobs": [blob] * 3, "text": "ü" * 10_000, "texts": ["a"] * 1_000}),
        }
    )
    message_id, contents = contents_of(content)
    came = sum(map(len, contents.values()))
    assert extent.built_bytes(message_id, contents, extent.bound_of(zeros.nbytes, came)) > 2 * zeros.nbytes
    del content["a"]
    message_id, contents = contents_of(content)
    assert extent.built_bytes(message_id, contents, extent.bound_of(0, sum(map(len, contents.values())))) > 4 * 10**6


def test_a_bound_knows_the_model_or_what_came() -> None:
    """Twice the model and 256 MiB; without a model, or when more came, four times what came and 64 MiB."""
    assert extent.bound_of(10**9, 100) == 2 * 10**9 + 256 * MIB
    assert extent.bound_of(0, 100) == 400 + 64 * MIB
    assert extent.bound_of(10, 10**9) == 4 * 10**9 + 64 * MIB


def test_a_sum_ends_where_it_is_too_large() -> None:
    """A million namings of a chunk are not added up once the bound is passed; the message names the object."""
    chunk = FlowerObject("ArrayChunk", (), bytes(10 * MIB))
    root = update({"x": array(np.zeros(1), chunks=[chunk], arraychunk_ids=[0] * 300_000)})
    with pytest.raises(ValueError, match=r"Array [0-9a-f]{12} would take more than 104,857,600 bytes"):
        built(root, 100 * MIB)


@pytest.mark.parametrize(
    ("kind", "values", "least", "most"),
    [
        (MetricRecord, {"x": 1.5}, 8, 1000),
        (MetricRecord, {"x": [0.5] * 10_000}, 320_000, 600_000),
        (MetricRecord, {"x": list(range(-50, 0)) * 200}, 360_000, 600_000),
        (MetricRecord, {"x": [2**63] * 1000}, 36_000, 60_000),
        (ConfigRecord, {"x": [True] * 10_000}, 80_000, 600_000),
        (ConfigRecord, {"x": "a" * 10_000}, 10_000, 70_000),
        (ConfigRecord, {"x": b"a" * 10_000}, 10_000, 30_000),
        (ConfigRecord, {"x": ["a"] * 10_000}, 500_000, 3_000_000),
        (ConfigRecord, {"x": [b"a" * 10_000] * 10}, 100_000, 300_000),
        (ConfigRecord, {f"key {i}": i for i in range(1000)}, 100_000, 900_000),
    ],
)
def test_values_take_what_python_takes(kind: Any, values: dict[str, Any], least: int, most: int) -> None:
    """Whatever it holds, a record takes about what Python's objects do: numbers in a list 32 bytes and more."""
    assert least <= values_of(kind, **values) <= most


@settings(max_examples=30, deadline=None)
@given(
    values=st.dictionaries(
        st.text(max_size=20),
        st.one_of(
            st.integers(-(2**63), 2**63 - 1),
            st.floats(),
            st.lists(st.integers(-(2**63), 2**63 - 1), max_size=400),
            st.lists(st.floats(), max_size=400),
        ),
        max_size=20,
    )
)
def test_no_metrics_take_more_than_was_found(values: dict[str, Any]) -> None:
    """Inflating a MetricRecord takes no more memory than the extent says."""
    content = MetricRecord(values).deflate()
    found = sum(extent._values(memoryview(content.partition(b"\0")[2])))
    tracemalloc.start()
    try:
        MetricRecord.inflate(content)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak <= 2 * found + 3 * len(content) + 10_000


@pytest.mark.parametrize(
    ("text", "is_right"),
    [
        ("{}", True),
        (" {\n} ", True),
        ('{"a": "ID"}', True),
        ('{"a":"ID","b":"ID"}', True),
        ('{ "a" : "ID" , "\\"b\\\\" : "ID" }', True),
        ('{"\\u00fc": "ID"}', True),
        ('{"": "ID"}', True),
        ("", False),
        ("[]", False),
        ('["ID"]', False),
        ('{"a": "ID"', False),
        ('{"a": "ID",}', False),
        ('{"a": "ID"} ', True),
        ('{"a": "ID"}}', False),
        ('{"a": ["ID"]}', False),
        ('{"a": {"b": "ID"}}', False),
        ('{"a": 1}', False),
        ('{"a": "I\\u0044"}', False),
        ('{"a" "ID"}', False),
        ('{"a: "ID"}', False),
        ('{"a\\": "ID"}', False),
        ("{" * 100_000, False),
        ('{"' + "\\" * 1_000_001 + '": "ID"}', False),
    ],
)
def test_a_records_names_are_read_without_a_parser(text: str, is_right: bool) -> None:
    """JSON of names and ids is what Flower writes, in any layout; anything else is refused."""
    chunk = array(np.zeros(1))
    record = FlowerObject("ArrayRecord", (chunk,), text.replace("ID", chunk.id).encode())
    if is_right:
        assert built(reply(a=record)) > 0
    else:
        with pytest.raises(ValueError, match=r"ArrayRecord [0-9a-f]{12}"):
            built(reply(a=record))


@pytest.mark.parametrize("nbytes", [1000, 100_000, 1_000_000])
def test_reading_names_takes_memory_in_proportion(nbytes: int) -> None:
    """However long a name is, and however many backslashes it has, reading it takes what it takes itself."""
    chunk = array(np.zeros(1))
    for filler in ("a", "\\\\"):
        record = FlowerObject(
            "ArrayRecord", (chunk,), f'{{"{filler * (nbytes // len(filler))}": "{chunk.id}"}}'.encode()
        )
        root = reply(a=record)
        contents = {thing.id: thing.content for thing in FlowerObject("Message", (root,), b"").all()}
        message_id = FlowerObject("Message", (root,), b"").id
        tracemalloc.start()
        try:
            extent.built_bytes(message_id, contents, 2**30)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak <= 3 * nbytes + 100_000


def test_values_are_counted() -> None:
    """A record of very many values, each of them tiny, is refused for their number."""
    item = recorddict_pb2.ConfigRecord.Item(key="k")
    item.value.string_list.vals.extend([""] * (extent.MAX_VALUES + 1))
    body = recorddict_pb2.ConfigRecord(items=[item]).SerializeToString()
    with pytest.raises(ValueError, match="more than 262,144 values"):
        built(reply(c=FlowerObject("ConfigRecord", (), body)))


@settings(max_examples=100, deadline=None)
@given(data=st.binary(max_size=60))
def test_any_bytes_are_values_or_refused(data: bytes) -> None:
    """Bytes that are no record raise ValueError; those that Flower can read are never refused for their form."""
    try:
        sum(extent._values(memoryview(data)))
    except ValueError:
        return
    assert extent.built_bytes(*_metrics(data), 2**30) > 0


def _metrics(data: bytes) -> tuple[str, dict[str, bytes]]:
    message = FlowerObject("Message", (reply(m=FlowerObject("MetricRecord", (), data)),), b"")
    return message.id, {thing.id: thing.content for thing in message.all()}


@settings(max_examples=25, deadline=None)
@given(
    values=st.dictionaries(
        st.text(max_size=9),
        st.one_of(
            *(st.lists(one, max_size=9) for one in (st.booleans(), st.text(max_size=9), st.binary(max_size=9))),
            *(st.booleans(), st.text(max_size=99), st.binary(max_size=99), st.floats(), st.integers(0, 2**64 - 1)),
        ),
        max_size=9,
    ),
    names=st.lists(st.text(max_size=30), unique=True, max_size=5),
)
def test_what_flower_deflates_is_never_refused(values: dict[str, Any], names: list[str]) -> None:
    """Any content of any names can be read, and inflating gives it back."""
    arrays = ArrayRecord({name: Array(np.arange(i)) for i, name in enumerate(names)})
    content = RecordDict({"c": ConfigRecord(values), "a": arrays, **{name: MetricRecord() for name in names}})
    message_id, contents = contents_of(content)
    assert extent.built_bytes(message_id, contents, extent.bound_of(0, 0)) > 0
    again: Any = inflate_object_from_contents(message_id, contents)
    assert str(again.content) == str(content)  # a NaN is not equal to itself


def test_things_are_what_flower_makes() -> None:
    """The objects that these tests make by hand have the extent of Flower's own."""
    said = {"num-examples": 3}
    mine = update({"x": np.arange(10.0)}, 3)
    message_id, contents = contents_of(
        RecordDict({"arrays": ArrayRecord({"x": Array(np.arange(10.0))}), "metrics": MetricRecord(said)})
    )
    assert set(contents) - {message_id} == {thing.id for thing in mine.all()}
    assert metrics(**said).id in contents
