"""Parsing of request bodies without building them: a push-object request is cut, values and objects are counted. Pure.

Flower's PushObjectRequest has the node, the run and the object's id before the content (field 4) and the session's id
behind it. Only those small fields are given to protobuf; the content is not copied.
"""

from __future__ import annotations

from collections.abc import Iterator

import attrs

CONTENT_FIELD = 4
MAX_PREFIX_BYTES = 4096
MAX_TAIL_BYTES = 4096


@attrs.frozen
class Cut:
    """The position of the content in a body of ``length`` bytes: [begin, end).

    The other fields lie before ``field_at``, where the content's field begins, and from ``end`` on.
    """

    field_at: int
    begin: int
    end: int
    length: int

    @property
    def nbytes(self) -> int:
        """Bytes of the content."""
        return self.end - self.begin

    @property
    def tail_bytes(self) -> int:
        """Bytes behind the content."""
        return self.length - self.end


def cut(prefix: bytes | bytearray, length: int) -> Cut | None:
    """Finds the content in a body whose first bytes are `prefix`; None if the prefix is too short for that.

    Raises
    ------
    ValueError
        If it is no protobuf message, its content is longer than the body, or there are more than ``MAX_PREFIX_BYTES``
        before the content or ``MAX_TAIL_BYTES`` behind it.
    """
    at = 0
    while at < length:
        field_at, begin = at, _varint(prefix, at)
        if begin is None:
            break
        key, at = begin
        kind, field = key & 7, key >> 3
        if kind == 0:
            skipped = _varint(prefix, at)
            if skipped is None:
                break
            at = skipped[1]
        elif kind == 2:
            length_field = _varint(prefix, at)
            if length_field is None:
                break
            nbytes, at = length_field
            if at + nbytes > length:
                raise ValueError(f"a field of {nbytes:,} bytes in a body of {length:,}")
            if field == CONTENT_FIELD:
                found = Cut(field_at, at, at + nbytes, length)
                if found.tail_bytes > MAX_TAIL_BYTES or at > MAX_PREFIX_BYTES:
                    raise ValueError(f"{at:,} + {found.tail_bytes:,} bytes around the object's content")
                return found
            at += nbytes
        else:
            raise ValueError(f"wire type {kind} in field {field}")
        if at > MAX_PREFIX_BYTES:
            raise ValueError(f"more than {MAX_PREFIX_BYTES:,} bytes before the object's content")
    else:
        if len(prefix) >= length:
            return Cut(length, length, length, length)  # no content: protobuf leaves an empty field out
        return None
    if len(prefix) >= min(length, MAX_PREFIX_BYTES):
        raise ValueError("the body ends in the middle of a field, or its content begins too late")
    return None


def _varint(data: bytes | bytearray, at: int) -> tuple[int, int] | None:
    """A number and the position behind it; None if the number is not all there."""
    if at < len(data) and (value := data[at]) < 0x80:  # most numbers have one byte
        return value, at + 1
    value = shift = 0
    while at < len(data):
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("a number of more than 64 bits")
    return None


WHOLE_LISTS, DOUBLE_LISTS, TEXT_LISTS = (22, 23, 24), (21,), (25, 26)
"""Fields of a value: lists of integers and booleans, of floats, of texts and bytes."""


def count_values(data: bytes, most: int) -> int:
    """The number of values that Python will make of a serialized MetricRecord or ConfigRecord, at most `most` + 1.

    A name, a value and a text count as one each, whatever their length. Sixteen numbers in a list, which take less
    memory, count as one. Nothing is built.

    Raises
    ------
    ValueError
        If it is no protobuf message.
    """
    count, waiting = 0, [(0, len(data), 0)]
    while waiting:
        begin, end, level = waiting.pop()
        for field, begin_at, end_at in _fields(data, begin, end):
            if level == 2 and field in WHOLE_LISTS:
                count += (end_at - begin_at) // 16
            elif level == 2 and field in DOUBLE_LISTS:
                count += (end_at - begin_at) // 128
            elif (level, field) in ((0, 1), (1, 2)) or (level == 2 and field in TEXT_LISTS):
                waiting.append((begin_at, end_at, level + 1))
            count += 1
            if count > most:
                return most + 1
    return count


def count_objects(data: bytes, most: int) -> int:
    """The number of messages, and of objects in their trees, in a serialized PushMessagesRequest, at most `most` + 1.

    An object has two fields, its id and its place in the tree. A request with more fields than twice `most` is taken
    to have too many objects. Nothing is built.

    Raises
    ------
    ValueError
        If it is no protobuf message.
    """
    count, fields, waiting = 0, 0, [(0, len(data), True)]
    while waiting:
        begin, end, is_request = waiting.pop()
        for field, begin_at, end_at in _fields(data, begin, end):
            is_tree = field == (TREES_FIELD if is_request else CHILDREN_FIELD)
            if is_tree:
                waiting.append((begin_at, end_at, False))
            count += is_tree or is_request
            fields += 1
            if count > most or fields > 2 * most:
                return most + 1
    return count


TREES_FIELD, CHILDREN_FIELD = 3, 2
"""The fields of the objects' trees in a PushMessagesRequest, and of the trees below in a tree."""


def _fields(data: bytes, at: int, end: int) -> Iterator[tuple[int, int, int]]:
    """The fields of a message in ``data[at:end]``: number, begin and end of the content, without its length."""
    while at < end:
        key, begin = _whole_varint(data, at, end)
        kind = key & 7
        if kind == 0:
            _, at = _whole_varint(data, begin, end)
        elif kind in (1, 5):
            at = begin + (8 if kind == 1 else 4)
        elif kind == 2:
            nbytes, begin = _whole_varint(data, begin, end)
            at = begin + nbytes
            if at > end:
                raise ValueError(f"a field of {nbytes:,} bytes where {end - begin:,} are left")
        else:
            raise ValueError(f"wire type {kind} in field {key >> 3}")
        yield key >> 3, begin, at


def _whole_varint(data: bytes, at: int, end: int) -> tuple[int, int]:
    found = _varint(data[at : min(at + 10, end)], 0)
    if found is None:
        raise ValueError("a number that does not end")
    return found[0], at + found[1]
