"""The content of a reply: its records, read from the store with every bound checked before anything is built.

Knows Flower's objects and the model's geometry; owns nothing. A client chooses every byte that is read here. So the
length of a name, a description or a list is checked first, and memory is bounded by the bytes that came or the model.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

import attrs
from flwr.app import Array, ArrayRecord, MetricRecord

from lifl.errors import AdmissionError
from lifl.round import admission
from lifl.strategy import npy
from lifl.strategy.reply import check_records, weight_of
from lifl.superlink import flower
from lifl.superlink.http.body import count_values
from lifl.superlink.rounds.chunk_map import Geometry
from lifl.superlink.store.content import CHUNK_HEAD
from lifl.superlink.store.store import Store

_names = flower.part("rounds")

NUMPY = "numpy.ndarray"

MAX_RECORDS_BYTES = 2**16
"""The object that names a reply's records: about 700 of them."""

MAX_BESIDE_BYTES = 2**27
"""All of a reply's records that are not arrays: they go to the ServerApp in one frame."""

MAX_BESIDE_VALUES = 2**18
"""Names, texts and the like in those records: Python takes some 250 bytes for each, however short it is."""

MAX_SLACK_BYTES = 4096
"""A description may be so much longer than a right one: then the refusal can name the error in it."""

MAX_CHUNKS_PER_PIECE, MAX_CHUNKS = 64, 1024
"""A client may cut arrays into smaller chunks than Flower does: so many for each of Flower's, and so many beside."""

MAX_TEXT = 64
"""Characters of a dtype's or a stream's name."""

HEAD_BYTES = 128
"""An ArrayChunk's head is shorter, and so is the kind of any object."""


@attrs.frozen
class ArrayDescription:
    """An Array object's description of itself, and the ids of its chunks in order."""

    object_id: str
    dtype: str
    shape: tuple[int, ...]
    stype: str
    chunks: tuple[str, ...]


@attrs.frozen
class ReplyContent:
    """A reply that can be read: its arrays by name in its record's order, its weight as it came, and its records.

    A record in ``records`` is an ArrayRecord without data, or, for another kind of record, the content of its object.
    """

    arrays: Mapping[str, ArrayDescription]
    weight: Any
    records: Mapping[str, ArrayRecord | bytes]


class ReplyReader:
    """Reads a client's reply, to a model whose geometry is known.

    Every method raises :class:`AdmissionError` if a rule is broken, and ``ValueError`` and its like if an object does
    not have Flower's form.
    """

    def __init__(self, store: Store, geometry: Geometry, client: str) -> None:
        self._store = store
        self._geometry = geometry
        self._client = client

    def read(self, message_id: str, weight_key: str) -> ReplyContent:
        """The records of a message."""
        _, (root,), _ = _names.head_of(self._content(message_id, MAX_SLACK_BYTES, "the message"))
        named = _named(self._body(root, "RecordDict", MAX_RECORDS_BYTES, "the list of records"))
        kinds = {name: self._kind(object_id) for name, object_id in named.items()}
        for name, kind in kinds.items():
            if kind not in ("ArrayRecord", "MetricRecord", "ConfigRecord"):
                raise self._refuse("format", f"record {name[:MAX_TEXT]!r} is a {kind[:MAX_TEXT]!r}, not a record", kind)
        counts = Counter(kinds.values())
        check_records(self._client, counts["ArrayRecord"], counts["MetricRecord"])
        records: dict[str, ArrayRecord | bytes] = {}
        weight: Any = None
        arrays: dict[str, ArrayDescription] = {}
        bytes_left, values_left = MAX_BESIDE_BYTES, MAX_BESIDE_VALUES
        for name, object_id in named.items():
            if kinds[name] == "ArrayRecord":
                arrays = self._arrays(object_id)
                records[name] = _without_data(arrays)
                continue
            nbytes, content = self._store.read(object_id, bytes_left)
            if nbytes > bytes_left:
                raise self._refuse("format", f"more than {MAX_BESIDE_BYTES:,} bytes beside its arrays", nbytes)
            bytes_left -= len(content)
            # A value of two bytes may take Python hundreds: values are counted before they are made.
            count = count_values(_body_of(content, kinds[name]), values_left)
            if count > values_left:
                raise self._refuse("format", f"more than {MAX_BESIDE_VALUES:,} values beside its arrays", count)
            values_left -= count
            record = _names.classes[kinds[name]].inflate(content)  # refused here if it cannot be read, not there
            if isinstance(record, MetricRecord):
                weight = weight_of(self._client, record, weight_key)
            records[name] = content
        return ReplyContent(arrays, weight, records)

    def views(self, arrays: Mapping[str, ArrayDescription]) -> dict[str, Any]:
        """The arrays as they came, as read-only NumPy arrays with memory of their own.

        Names, shapes and lengths are checked against the model first. Equal arrays are built once.
        """
        declared = {name: self._declared(name, one) for name, one in arrays.items()}
        built: dict[tuple[str, ...], Any] = {}
        for name, one in arrays.items():
            if one.chunks not in built:
                built[one.chunks] = self._view(name, one, declared[name][1])
        return {name: built[one.chunks] for name, one in arrays.items()}

    # ------------------------------------------------------------ descriptions

    def _arrays(self, record_id: str) -> dict[str, ArrayDescription]:
        spec = self._geometry.spec
        # JSON writes at most six bytes for one of a name; an id and the signs around it are fewer than 80.
        usual = sum(6 * len(name.encode()) + 80 for name in spec) + MAX_SLACK_BYTES
        named = _named(self._body(record_id, "ArrayRecord", 2 * usual, "the list of arrays"))
        if named.keys() != spec.keys():
            # The error names the arrays that are missing and those that are too many.
            admission.check_arrays(self._client, spec, dict.fromkeys(named))
        arrays = {}
        for j, tensor in enumerate(spec.tensors):
            most = MAX_CHUNKS + MAX_CHUNKS_PER_PIECE * len(self._geometry.pieces[j])
            arrays[tensor.name] = self._described(tensor.name, named[tensor.name], most)
        return {name: arrays[name] for name in named}

    def _described(self, name: str, object_id: str, most_chunks: int) -> ArrayDescription:
        bound = MAX_SLACK_BYTES + 80 * most_chunks
        content = self._content(object_id, bound, f"the description of {name!r}")
        _, children, _ = _names.head_of(content)
        described = json.loads(_body_of(content, "Array"))
        order = described["arraychunk_ids"]
        if not all(type(i) is int and 0 <= i < len(children) for i in order):
            raise ValueError("an Array names chunks that it does not have")
        if len(order) > most_chunks:
            raise self._refuse("format", f"{name!r} has {len(order):,} chunks, at most {most_chunks:,} are taken", None)
        dtype, stype, shape = described["dtype"], described["stype"], described["shape"]
        if not (type(dtype) is type(stype) is str and len(dtype) <= MAX_TEXT and len(stype) <= MAX_TEXT):
            raise self._refuse("format", f"{name!r} names its dtype or its kind by no short text", None)
        if len(shape) > npy.MAX_DIMENSIONS or not all(type(n) is int and 0 <= n < 2**63 for n in shape):
            raise self._refuse("format", f"{name!r} describes itself with a shape that no array has", None)
        if stype != NUMPY:
            raise self._refuse("format", f"{name!r} is {stype!r}, not {NUMPY!r}", stype)
        return ArrayDescription(object_id, dtype, tuple(shape), stype, tuple(children[i] for i in order))

    # ------------------------------------------------------------ arrays

    def _declared(self, name: str, one: ArrayDescription) -> tuple[npy.Header, int]:
        """The header of an array's stream and the length of the stream; builds nothing."""
        begin, nbytes = bytearray(), 0
        for object_id in one.chunks:
            found = self._store.begin(object_id, HEAD_BYTES + max(npy.MAX_BYTES - len(begin), 0))
            if found is None:
                raise ValueError(f"object {object_id} of the message is not there")
            length, content = found
            head = CHUNK_HEAD.match(content[:HEAD_BYTES])
            if head is None:
                raise ValueError(f"a chunk of {name!r} is no ArrayChunk: it begins with {content[:20]!r}")
            nbytes += length - head.end()
            begin += content[head.end() :]
        try:
            header = npy.parse_header(bytes(begin[: npy.MAX_BYTES]), nbytes)
        except ValueError as error:
            raise self._refuse("format", f"{name!r}: {error}", one.dtype) from None
        if header.shape != (shape := self._geometry.spec[name].shape):
            raise self._refuse("shape", f"{name!r} has shape {header.shape}, the model has {shape}", header.shape)
        return header, nbytes

    def _view(self, name: str, one: ArrayDescription, nbytes: int) -> Any:
        stream, at = bytearray(nbytes), 0
        for object_id in one.chunks:
            body = _body_of(self._content(object_id, nbytes + HEAD_BYTES, f"a chunk of {name!r}"), "ArrayChunk")
            if at + len(body) > nbytes:
                raise ValueError(f"the chunks of {name!r} have changed")
            stream[at : at + len(body)] = body
            at += len(body)
        return npy.view(memoryview(stream).toreadonly())

    # ------------------------------------------------------------ objects

    def _kind(self, object_id: str) -> str:
        found = self._store.begin(object_id, HEAD_BYTES)
        if found is None or not found[0]:
            raise ValueError(f"object {object_id[:MAX_TEXT]} of the message is not there")
        return found[1].partition(b" ")[0].decode("ascii", "replace")

    def _content(self, object_id: str, most_bytes: int, what: str) -> bytes:
        nbytes, content = self._store.read(object_id, most_bytes)
        if nbytes > most_bytes:
            raise self._refuse("format", f"{what}: {nbytes:,} bytes came, at most {most_bytes:,} are read", nbytes)
        if not nbytes:
            raise ValueError(f"object {object_id[:MAX_TEXT]} of the message is not there")
        return content

    def _body(self, object_id: str, kind: str, most_bytes: int, what: str) -> bytes:
        return _body_of(self._content(object_id, most_bytes, what), kind)

    def _refuse(self, rule: str, reason: str, value: object) -> AdmissionError:
        return AdmissionError(self._client, rule, reason, value)


def _body_of(content: bytes, kind: str) -> bytes:
    body: bytes = _names.body_of(content, _names.classes[kind])
    return body


def _named(body: bytes) -> dict[str, str]:
    """The names and ids in the body of a RecordDict or an ArrayRecord."""
    named = json.loads(body)
    if not isinstance(named, dict) or not all(type(object_id) is str for object_id in named.values()):
        raise TypeError("a record names its parts by no object ids")
    return named


def _without_data(arrays: Mapping[str, ArrayDescription]) -> ArrayRecord:
    return ArrayRecord(
        {name: Array(dtype=a.dtype, shape=a.shape, stype=a.stype, data=b"") for name, a in arrays.items()}
    )
