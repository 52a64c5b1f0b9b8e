"""A push-object body is cut where protobuf would cut it, however it comes, and what is no such body is refused."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from flwr.app import ConfigRecord, MetricRecord
from flwr.proto import fleet_pb2, message_pb2, node_pb2
from flwr.supercore.inflatable.inflatable_object import get_object_body
from hypothesis import given
from hypothesis import strategies as st

from lifl.superlink.http import body as body_module
from lifl.superlink.http.body import MAX_PREFIX_BYTES, MAX_TAIL_BYTES, Cut, count_objects, count_values, cut
from lifl.superlink.store.content import varint

CONTENT = b"\x22"
"""The tag of field 4, of kind 2."""


def body(content: bytes = b"numbers", session_id: str = "s" * 36, node_id: int = 7, run_id: int = 2**63) -> bytes:
    """As a SuperNode writes it; protobuf leaves out what is empty."""
    request = message_pb2.PushObjectRequest(
        node=node_pb2.Node(node_id=node_id),
        run_id=run_id,
        object_id="c" * 64,
        object_content=content,
        session_id=session_id,
    )
    return request.SerializeToString(deterministic=True)


def field(number: int, payload: bytes) -> bytes:
    """A field of bytes."""
    length, head = len(payload), bytearray([number << 3 | 2])
    while length > 127:
        head.append(length & 127 | 128)
        length >>= 7
    return bytes([*head, length]) + payload


def first_cut(whole: bytes, pieces: list[int], length: int | None = None) -> Cut | None:
    """The cut that is found when the body comes in such pieces, when it is found first."""
    prefix, at = bytearray(), 0
    for size in [*pieces, len(whole)]:
        prefix += whole[at : at + size]
        at += size
        found = cut(prefix, len(whole) if length is None else length)
        if found is not None:
            assert len(prefix) >= found.begin, "what is before the content is there"
            return found
    return None


@given(
    content=st.binary(max_size=300),
    session_id=st.text("s", max_size=40),
    node_id=st.integers(0, 2**64 - 1),
    run_id=st.integers(0, 2**64 - 1),
    pieces=st.lists(st.integers(0, 200)),
)
def test_any_split_of_a_request_is_cut_the_same(
    content: bytes, session_id: str, node_id: int, run_id: int, pieces: list[int]
) -> None:
    """The content is found as soon as its length is there, and the small fields around it are protobuf's."""
    whole = body(content, session_id, node_id, run_id)
    found = first_cut(whole, pieces)
    assert found is not None
    assert whole[found.begin : found.end] == content
    assert (found.nbytes, found.tail_bytes, found.length) == (len(content), len(whole) - found.end, len(whole))
    small = message_pb2.PushObjectRequest.FromString(whole[: found.field_at] + whole[found.end :])
    small.object_content = content
    assert small == message_pb2.PushObjectRequest.FromString(whole)


def test_the_content_is_found_by_its_length_alone() -> None:
    """No byte of the content need have come."""
    whole = body(b"x" * 1000)
    begin = whole.index(b"x" * 1000)
    assert cut(whole[: begin - 1], len(whole)) is None
    assert cut(whole[:begin], len(whole)) == Cut(begin - 3, begin, begin + 1000, len(whole))


def test_fields_in_another_order_are_found_too() -> None:
    """The content may be the first field or the last; others are protobuf's to read, in whatever order."""
    node, run, name, session = field(1, b"\x08\x07"), b"\x10\x09", field(3, b"c" * 64), field(5, b"s" * 36)
    for before, after in (((), (node, run, name, session)), ((session, name, run, node), ()), ((run, node), (name,))):
        head, tail = b"".join(before), b"".join(after)
        whole = head + field(4, b"numbers") + tail
        assert cut(whole, len(whole)) == Cut(len(head), len(head) + 2, len(head) + 9, len(whole))


def test_fields_that_nobody_knows_are_left_to_protobuf() -> None:
    """Before the content and behind it, numbers and bytes."""
    strange = field(13, b"what") + b"\x70\xff\xff\x03"
    whole = strange + body() + strange
    found = cut(whole, len(whole))
    assert found is not None
    assert whole[found.begin : found.end] == b"numbers"


def test_without_content_it_ends_at_the_end() -> None:
    """Protobuf leaves an empty content out; written, with length 0, it is found where it is."""
    whole = body(b"")
    assert cut(whole, len(whole)) == Cut(len(whole), len(whole), len(whole), len(whole))
    head = field(3, b"c" * 64)
    whole = head + CONTENT + b"\x00" + field(5, b"s")
    assert cut(whole, len(whole)) == Cut(len(head), len(head) + 2, len(head) + 2, len(whole))


def test_without_content_all_of_it_has_to_come() -> None:
    """The last field is not taken to be there when only its length is."""
    whole = body(b"")
    for end in range(len(whole)):
        assert cut(whole[:end], len(whole)) is None


@given(content=st.binary(min_size=1, max_size=50), end=st.integers(0, 200))
def test_what_is_cut_short_is_waited_for_or_refused(content: bytes, end: int) -> None:
    """No content is found of a body that ends early, by its declared length, unless all of the content is there."""
    whole = body(content)
    short = whole[: min(end, len(whole) - 1)]
    try:
        found = cut(short, len(short))
    except ValueError:
        return
    assert found is not None, "all of it has come"
    assert found.end <= len(short)
    assert found.nbytes in (0, len(content))


@pytest.mark.parametrize(
    ("whole", "reason"),
    [
        (CONTENT + b"\x80\x80\x04", "a field of 65,536 bytes in a body of 4"),
        (CONTENT + b"\xff" * 9 + b"\x01", "a field of 18,446,744,073,709,551,615 bytes"),
        (b"\xff" * 11, "more than 64 bits"),
        (b"\x23", "wire type 3 in field 4"),
        (b"\x27", "wire type 7 in field 4"),
        (b"\x25\0\0\0\0", "wire type 5 in field 4"),
        (b"\x08\xff", "ends in the middle of a field"),
        (b"\x22", "ends in the middle of a field"),
        (field(3, b"c" * MAX_PREFIX_BYTES) + field(4, b"x"), "before the object's content"),
        (field(4, b"x") + field(5, b"s" * MAX_TAIL_BYTES), "around the object's content"),
        (field(3, b"c" * (MAX_PREFIX_BYTES - 2)) + field(4, b"x"), "around the object's content|before the object's"),
    ],
    ids=lambda value: value[:24] if isinstance(value, str) else "",
)
def test_nonsense_is_refused(whole: bytes, reason: str) -> None:
    """With what is wrong, and as soon as it is known."""
    with pytest.raises(ValueError, match=reason):
        cut(whole, len(whole))


def test_a_prefix_that_does_not_end_is_refused_before_the_body_is_there() -> None:
    """No more of a long body is kept than any request has before its content."""
    whole = field(3, b"c" * 2**20) + field(4, b"x")
    assert cut(whole[:2], len(whole)) is None
    with pytest.raises(ValueError, match="before the object's content"):
        cut(whole[:10], len(whole))
    numbers = b"\x08\x01" * 2**12  # of which each is all right
    with pytest.raises(ValueError, match="before the object's content"):
        cut(numbers, 2**20)


@given(st.binary(max_size=300), st.integers(0, 400))
def test_any_bytes_are_cut_or_refused(data: bytes, more: int) -> None:
    """Nothing else is raised, and what is found lies within the body."""
    try:
        found = cut(data, len(data) + more)
    except ValueError:
        return
    if found is not None:
        assert 0 <= found.field_at <= found.begin <= found.end <= found.length == len(data) + more


# ---------------------------------------------------------------- what is counted before it is built

NUMBERS = st.floats(allow_nan=False) | st.integers(-(2**63), 2**63 - 1)
METRICS = st.dictionaries(st.text(max_size=5), NUMBERS | st.lists(st.floats(allow_nan=False)), max_size=8)
CONFIGS = st.dictionaries(
    st.text(max_size=5),
    NUMBERS | st.booleans() | st.text() | st.binary() | st.lists(st.text()) | st.lists(st.binary()),
    max_size=8,
)


def values_in(record: Any) -> int:
    """Names, values, and what texts are in lists."""
    lists = [value for value in record.values() if isinstance(value, list) and value]
    texts = sum(len(value) for value in lists if isinstance(value[0], (str, bytes)))
    return 3 * len(record) + len(lists) + texts  # an item, its name, its value, and a field of that


@given(record=st.builds(MetricRecord, METRICS) | st.builds(ConfigRecord, CONFIGS))
def test_values_of_a_record_are_counted(record: Any) -> None:
    """Each text counts, of numbers sixteen."""
    data = get_object_body(record.deflate(), type(record))
    counted = count_values(data, 10**9)
    # An empty name is not written.
    assert -len(record) <= counted - values_in(record) <= len(record) + len(data) // 16
    for most in (0, counted // 2, counted - 1):
        assert count_values(data, max(most, 0)) == min(counted, max(most, 0) + 1)


@pytest.mark.parametrize("values", [[1] * 100_000, [2**40] * 20_000, [0.5] * 20_000], ids=["small", "large", "floats"])
def test_numbers_in_lists_count_less(values: Any) -> None:
    """By the bytes that they take on the wire."""
    record = MetricRecord({"x": values})
    data = get_object_body(record.deflate(), MetricRecord)
    assert len(values) // 16 <= count_values(data, 10**9) <= len(values) // 2


def trees(depth: int) -> Any:
    """Trees of objects, ids of any length."""
    ids = st.text("0123456789abcdef", max_size=64)
    below = st.just([]) if depth == 0 else st.lists(trees(depth - 1), max_size=3)
    return st.builds(lambda i, c: message_pb2.ObjectTree(object_id=i, children=c), ids, below)


def size(tree: Any) -> int:
    """Objects in a tree."""
    return 1 + sum(size(child) for child in tree.children)


@given(found=st.lists(trees(3), max_size=3))
def test_objects_of_a_tree_are_counted(found: list[Any]) -> None:
    """All of them, at any depth; no further than is asked."""
    request = fleet_pb2.PushMessagesRequest(node={"node_id": 3}, message_object_trees=found)
    request.messages_list.add().metadata.message_id = "x" * 64
    data, total = request.SerializeToString(), 2 + sum(map(size, found))  # a node and a message are in it too
    assert count_objects(data, 10**9) == total
    assert count_objects(data, total // 2) == min(total, total // 2 + 1)


@given(data=st.binary(max_size=200))
def test_what_is_no_message_is_counted_or_refused(data: bytes) -> None:
    """Nothing else is raised, and what protobuf parses is not refused for want of bytes."""
    for count in (count_values, count_objects):
        with contextlib.suppress(ValueError):
            count(data, 100)


def test_objects_without_an_id_count_too() -> None:
    """Two bytes each: of these protobuf would make fifty times as much."""
    for data in (b"\x1a" + varint(2 * 300_000) + b"\x12\x00" * 300_000, b"\x12\x00" * 300_000, b"\x1a\x00" * 300_000):
        assert count_objects(data, 2**18) == 2**18 + 1


@pytest.mark.parametrize("field", [b"\x50\x01", b"\x52\x00", b"\x0a\x00"], ids=["unknown", "unknown text", "id"])
def test_fields_without_end_are_not_counted_to_their_end(monkeypatch: pytest.MonkeyPatch, field: bytes) -> None:
    """The fields of a tree are not counted to their end: an object has two of them."""
    seen, fields = [0], body_module._fields

    def counted(*args: Any) -> Any:
        for one in fields(*args):
            seen[0] += 1
            yield one

    monkeypatch.setattr(body_module, "_fields", counted)
    data = b"\x1a" + varint(2 * 300_000) + field * 300_000
    assert count_objects(data, 1000) == 1001
    assert seen[0] <= 2 * 1000 + 1
