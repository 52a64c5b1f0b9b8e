"""The memory that a reply takes once it is inflated, found from its objects' bytes before anything is built.

Pure. The client chooses every byte that is read here. An object is a head (its kind, the ids of its children, its
body's length), a zero byte and a body; a reply is Message -> RecordDict -> records -> Array -> ArrayChunk. Each mention
of an object counts: a chunk of 5 MB that one Array names 400 times takes 2 GB, and so does an Array of 5 MB that a
record names 400 times.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping

import attrs

MAX_MESSAGE_BYTES = 2**16
"""Limit for the body of a Message object: metadata, and perhaps an error with its reason."""

MAX_ARRAY_BYTES = 2**20
"""Limit for the body of an Array object; enough for 100,000 chunks. Parsed, JSON takes up to 30 times its bytes."""

MAX_TEXT = 1000
"""Limit for the characters of a dtype (NumPy spells out structured ones) or of the kind of a stream."""

MAX_DIMENSIONS = 64  # NumPy's own limit

MAX_VALUES = 2**18
"""Limit for names, values and texts in lists of one MetricRecord or ConfigRecord.

Each may take only two bytes on the wire, and each costs time.
"""

NAMING_BYTES = 250
"""Bytes of the Python objects around an entry of a record, an Array or a value."""

HEAD_BYTES, ID_BYTES = 128, 65

ANY_ARRAY_BYTES, ANY_BYTES = 256 * 2**20, 64 * 2**20

_ENTRY = re.compile(rb'\s*"(?:[^"\\]++|\\.)*+"\s*:\s*"([^"\\]{1,64})"\s*([,}])', re.DOTALL)
_EMPTY = re.compile(rb"\s*\{\s*\}\s*")
_BEGIN, _END = re.compile(rb"\s*\{"), re.compile(rb"\s*")

# Field numbers of MetricRecordValue and ConfigRecordValue in Flower's recorddict.proto, by the kind of their content.
_TEXT, _BYTES, _DOUBLES, _SINTS, _UINTS, _BOOLS, _TEXTS, _BLOBS = 5, 6, 21, 22, 23, 24, 25, 26

# Bytes for a number in a list, and for each character of a text: protobuf's copy, the list's slot, Python's object.
_NUMBER_BYTES, _CHARACTER_BYTES = 48, 6

_ABOVE = bytes(range(128, 256))


def bound_of(sent_bytes: int, came_bytes: int) -> int:
    """The most bytes that a reply of `came_bytes` may take when the arrays of its message had `sent_bytes`.

    The larger of two bounds: twice the model plus some slack if the model is known (`sent_bytes` is not 0), and four
    times the bytes that came plus some slack.
    """
    by_model = 2 * sent_bytes + ANY_ARRAY_BYTES if sent_bytes else 0
    return max(by_model, 4 * came_bytes + ANY_BYTES)


def children_of(content: bytes, most: int) -> list[str]:
    """The ids in the head of an object, at most `most`; raises ``ValueError`` if `content` begins with no head."""
    return _parse(content, most)[1]


def built_bytes(message_id: str, contents: Mapping[str, bytes], most_bytes: int) -> int:
    """Approximate bytes that a reply will take once it is inflated from its objects.

    Raises
    ------
    ValueError
        If the reply takes more than `most_bytes`, or the objects do not fit together: an object is missing, is of
        another kind than its place demands, or has a description longer than any honest client writes. The message
        names the object.
    """
    return _Reply(contents, most_bytes).message(message_id)


@attrs.frozen
class _Object:
    """An object, parsed; `name` is its kind and the first characters of its id, for errors."""

    name: str
    kind: str
    children: list[str]
    body: memoryview


class _Reply:
    """The objects of a reply. The size of each is computed once; every sum is checked while it grows."""

    def __init__(self, contents: Mapping[str, bytes], most_bytes: int) -> None:
        self._contents = contents
        self._most_bytes = most_bytes
        self._known: dict[str, int] = {}  # id of a record or Array -> its bytes

    def message(self, message_id: str) -> int:
        message = self._object(message_id, "Message")
        if len(message.body) > MAX_MESSAGE_BYTES:
            raise ValueError(f"{message.name} describes itself in {len(message.body):,} bytes")
        if len(message.children) > 1:
            raise ValueError(f"{message.name} has {len(message.children):,} contents")
        return len(message.body) + sum(map(self._content, message.children))

    def _content(self, object_id: str) -> int:
        return self._sum_of_names(self._object(object_id, "RecordDict"), self._record)

    def _record(self, object_id: str) -> int:
        if object_id not in self._known:
            record = self._object(object_id, "ArrayRecord", "MetricRecord", "ConfigRecord")
            if record.kind == "ArrayRecord":
                self._known[object_id] = self._sum_of_names(record, self._array)
            else:
                self._known[object_id] = self._sum(record, self._values(record))
        return self._known[object_id]

    def _values(self, record: _Object) -> Iterator[int]:
        for count, nbytes in enumerate(_values(record.body)):
            if count >= MAX_VALUES:
                raise ValueError(f"{record.name} has more than {MAX_VALUES:,} values")
            yield nbytes

    def _array(self, object_id: str) -> int:
        if object_id not in self._known:
            array = self._object(object_id, "Array")
            self._known[object_id] = self._sum(array, self._chunks(array))
        return self._known[object_id]

    def _chunks(self, array: _Object) -> Iterator[int]:
        if len(array.body) > MAX_ARRAY_BYTES:
            raise ValueError(f"{array.name} describes itself in {len(array.body):,} bytes")
        try:
            description = json.loads(bytes(array.body).decode())
        except RecursionError:
            raise ValueError(f"{array.name} is described by nested JSON") from None
        if not isinstance(description, dict):
            raise ValueError(f"{array.name} is described by no JSON object")
        texts = (description.get("dtype"), description.get("stype"))
        shape = description.get("shape")
        order = description.get("arraychunk_ids")
        if not all(isinstance(text, str) and len(text) <= MAX_TEXT for text in texts):
            raise ValueError(f"{array.name} names its dtype or its kind by no short text")
        if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS or not all(map(_is_length, shape)):
            raise ValueError(f"{array.name} describes itself with a shape that no array has")
        if not isinstance(order, list) or not all(type(i) is int and 0 <= i < len(array.children) for i in order):
            raise ValueError(f"{array.name} names chunks that it does not have")
        lengths = [len(self._object(child, "ArrayChunk").body) for child in array.children]
        yield NAMING_BYTES
        yield from (lengths[i] for i in order)

    def _sum_of_names(self, record: _Object, measure: Callable[[str], int]) -> int:
        known = set(record.children)
        return self._sum(record, (NAMING_BYTES + measure(self._own(record, known, i)) for i in _ids(record)))

    def _own(self, record: _Object, known: set[str], object_id: str) -> str:
        if object_id not in known:
            raise ValueError(f"{record.name} names {object_id[:12]!r}, which is no part of it")
        return object_id

    def _sum(self, one: _Object, parts: Iterator[int]) -> int:
        total = len(one.body)
        for part in parts:
            total += part
            if total > self._most_bytes:
                raise ValueError(f"{one.name} would take more than {self._most_bytes:,} bytes once it is inflated")
        return total

    def _object(self, object_id: str, *kinds: str) -> _Object:
        content = self._contents.get(object_id)
        if content is None:
            raise ValueError(f"object {object_id[:12]!r} is named but did not come")
        kind, children, at = _parse(content, len(self._contents))
        if kind not in kinds:
            raise ValueError(f"object {object_id[:12]} is of kind {kind[:40]!r}, {' or '.join(kinds)} was expected")
        if len(set(children)) != len(children):
            raise ValueError(f"{kind} {object_id[:12]} has a child twice")
        return _Object(f"{kind} {object_id[:12]}", kind, children, memoryview(content)[at:])


def _parse(content: bytes, most_children: int) -> tuple[str, list[str], int]:
    """The kind of an object, the ids of its children, and the offset of its body."""
    end = content.find(b"\0", 0, HEAD_BYTES + ID_BYTES * most_children)
    if end < 0:
        raise ValueError(f"an object has no head, or more children than came: it begins with {content[:20]!r}")
    parts = content[:end].decode("ascii").split(" ")
    if len(parts) != 3:
        raise ValueError(f"an object's head is {content[: min(end, 40)]!r}")
    return parts[0], parts[1].split(",") if parts[1] else [], end + 1


def _is_length(n: object) -> bool:
    return type(n) is int and 0 <= n < 2**63


def _ids(record: _Object) -> Iterator[str]:
    """The ids in a record's JSON, one for each name; raises ``ValueError`` for any other JSON, before it is parsed."""
    body = bytes(record.body)
    if _EMPTY.fullmatch(body):
        return
    begin = _BEGIN.match(body)
    at, close = (begin.end() if begin else -1), b","
    while close == b",":
        entry = _ENTRY.match(body, at) if at >= 0 else None
        if entry is None:
            raise ValueError(f"{record.name} is no list of names and ids")
        close, at = entry[2], entry.end()
        yield entry[1].decode("ascii", "replace")
    if not _END.fullmatch(body, at):
        raise ValueError(f"{record.name} goes on after its last name")


# ---------------------------------------------------------------- the values of metrics and configs


def _values(body: memoryview) -> Iterator[int]:
    """Bytes that each item of a MetricRecord or a ConfigRecord takes in Python."""
    for number, item in _fields(body):
        yield NAMING_BYTES
        for part, value in _fields(item) if number == 1 else ():
            if part == 2:
                for kind, held in _fields(value):
                    yield from _value(kind, held)
            else:
                yield NAMING_BYTES + len(value) * _CHARACTER_BYTES


def _value(kind: int, held: memoryview) -> Iterator[int]:
    if kind in (_TEXTS, _BLOBS):
        for _, one in _fields(held):
            yield NAMING_BYTES + len(one) * (2 if kind == _BLOBS else _CHARACTER_BYTES)
    elif kind == _DOUBLES:
        yield NAMING_BYTES + len(held) // 8 * _NUMBER_BYTES
    elif kind in (_SINTS, _UINTS, _BOOLS):
        # Varints: the last byte of each number, and only that, is below 128.
        yield NAMING_BYTES + len(bytes(held).translate(None, _ABOVE)) * _NUMBER_BYTES
    else:
        yield NAMING_BYTES + len(held) * (2 if kind == _BYTES else _CHARACTER_BYTES)


def _fields(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    """The fields of a protobuf message: their numbers and, for those with a length, their contents."""
    at, nothing = 0, data[:0]
    while at < len(data):
        tag, at = _varint(data, at)
        length = {0: 0, 1: 8, 2: 0, 5: 4}.get(tag & 7)
        if length is None:
            raise ValueError(f"a record has a field of wire type {tag & 7}")
        if tag & 7 == 0:
            _, at = _varint(data, at)
        elif tag & 7 == 2:
            length, at = _varint(data, at)
        if length > len(data) - at:
            raise ValueError("a record ends within a field")
        yield tag >> 3, data[at : at + length] if tag & 7 == 2 else nothing
        at += length


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise ValueError("a record ends within a number")
        value |= (data[at] & 127) << shift
        at += 1
        if data[at - 1] < 128:
            return value, at
    raise ValueError("a record has a number of more than ten bytes")
